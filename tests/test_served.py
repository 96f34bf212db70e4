"""A model behind a server, with known answers: figures by hand, faults, a kill, and what is refused."""

import base64
import io
import json
import random
import signal
import time
import types

import numpy as np
import PIL.Image
import pytest
from absl import app

from paligemma_med import evaluate as program_evaluate
from paligemma_med import input_pipeline, table_eval
from paligemma_med.evaluation import controls
from paligemma_med.evaluation.results import read_metrics, read_rows
from paligemma_med.judge import replies
from paligemma_med.judge.server import ServerError
from paligemma_med.served import evaluator, pictures, program, templates
from tests import processes, servers, tiny

SHADES = (20, 60, 200, 240)


def looks(texts):
    """Says whether a picture of one shade is bright, wrongly for the brightest; and always "left"."""
    if "side" in texts["text"]:
        return "left"
    if "image_url" not in texts:
        return "nothing"
    data = base64.b64decode(texts["image_url"].partition(",")[2])
    pixels = np.asarray(PIL.Image.open(io.BytesIO(data)).convert("RGB")).astype(float)
    shade = round(pixels.mean())
    if pixels.std() > 5:
        return "noise"
    return "grey" if shade == 128 else "yes" if 150 < shade < 230 else "no"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "films").mkdir()
    for shade in SHADES:
        pixels = np.full((12, shade // 10 + 10, 3), shade, np.uint8)
        PIL.Image.fromarray(pixels).save(tmp_path / "films" / f"{shade}.png")
    lines = ["image,question,answer"]
    for shade in SHADES:
        lines += [f"{shade}.png,Is it bright?,{'yes' if shade > 128 else 'no'}", f"{shade}.png,Which side?,left"]
    (tmp_path / "q.csv").write_text("\n".join(lines))
    return table_eval.data_of(tmp_path / "q.csv", images=tmp_path / "films")


def run(data, out, url, **kw):
    kw = dict(model="some-model", server=url, controls="all", backoff=0.01) | kw
    sections = {"own": program.table_section(data, data)}
    return program.evaluate(sections, str(out), **kw)["own"]


def check_figures(folder):
    """The accuracies in `folder` are those counted by hand."""
    rows = read_rows(folder / "predictions.jsonl")
    metrics, _ = read_metrics(folder / "metrics.json")
    keys = {row["image_key"]: shade for row, shade in zip(rows[::2], SHADES)}
    other = controls.derangement(list(keys), 0)
    said = {20: "no", 60: "no", 200: "yes", 240: "no"}
    right = sum(said[keys[other[key]]] == ("yes" if shade > 128 else "no") for key, shade in keys.items())
    acc = {who: metrics[f"{who}/overall/acc"] for who in ("model", *evaluator.Evaluator.known_controls)}
    assert acc == dict(
        model=7 / 8,
        majority=(2 + 4) / 8,
        majority_type=(2 + 4) / 8,
        echo=0,
        shuffled_images=(right + 4) / 8,
        blank_image=4 / 8,
        noise_image=4 / 8,
        question_only=4 / 8,
    )


NO_ANSWER = [f for f in servers.FAULTS if f not in ("cut", "hostile")]  # faults that no answer comes of


def test_figures_are_those_counted_by_hand_behind_a_faulty_proxy(data, tmp_path):
    faults = [f for f in NO_ANSWER if f != "timeout"]
    with servers.FakeModel(looks) as model, servers.Proxy(model.url, faults, most=3) as proxy:
        run(data, tmp_path / "out", proxy.url)
        asked = len(model.requests)
    assert any(entry["fault"] for entry in proxy.log)
    folder = tmp_path / "out" / "eval" / "own"
    check_figures(folder)
    rows = read_rows(folder / "predictions.jsonl")
    assert rows[0]["question_only_predictions"] == ["nothing"] and rows[0]["blank_image_predictions"] == ["grey"]
    assert rows[0]["noise_image_predictions"] == ["noise"] and rows[0]["unfinished"] == 0
    _, about = read_metrics(folder / "metrics.json")
    assert about["model"] == "some-model" and "127.0.0.1" not in json.dumps({**about, "command": ""})
    costs = json.loads((folder / "served.json").read_text())
    assert costs["replies"] <= asked and costs["faults"] and costs["prompt_tokens"] > 0
    for request in model.requests:
        assert "answer" not in request and request["temperature"] == 0


def test_killed_at_any_reply_nothing_is_asked_twice_and_the_files_are_the_same(data, tmp_path, monkeypatch):
    with servers.FakeModel(looks) as model:
        run(data, tmp_path / "whole", model.url)
        total = len(model.requests)
        model.requests.clear()
        add, kept = replies.Cache.add_many, []

        def dies(cache, records):
            add(cache, records)
            kept.append(1)
            if len(kept) in (3, 13, 30):
                raise KeyboardInterrupt

        monkeypatch.setattr(replies.Cache, "add_many", dies)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                run(data, tmp_path / "cut", model.url, concurrency=1)
        run(data, tmp_path / "cut", model.url, concurrency=1)
        assert len(model.requests) == total
        run(data, tmp_path / "cut", model.url)  # finished: not asked again
        assert len(model.requests) == total
    for name in ("metrics.json", "predictions.jsonl"):
        whole, cut = ((tmp_path / x / "eval" / "own" / name).read_bytes() for x in ("whole", "cut"))
        assert whole == cut


@pytest.mark.slow
def test_sigkill_anywhere_behind_a_faulty_proxy(data, tmp_path, monkeypatch):
    """The program, killed while replies come in: what was written isn't asked again, and the end is the same."""
    names, ask_all = {}, evaluator.judge_client.ask_all

    def noted(requests, *args, **kw):
        names.update({key: servers.name_of(servers.fenced(messages(0))) for key, messages in requests.items()})
        return ask_all(requests, *args, **kw)

    monkeypatch.setattr(evaluator.judge_client, "ask_all", noted)
    flags = [f"--table={tmp_path}/q.csv", f"--train_table={tmp_path}/q.csv", f"--images={tmp_path}/films"]
    kept = tmp_path / "out" / "eval" / "q" / evaluator.REPLIES
    rng, kills, done = random.Random(0), 0, None
    with servers.FakeModel(looks, delay=0.05) as model:
        sections = {"q": program.table_section(data, data)}
        program.evaluate(sections, str(tmp_path / "whole"), model="m", server=model.url, controls="all")
        total = len(model.requests)
        assert len(names) == len(set(names.values())) == total
        with servers.Proxy(model.url, NO_ANSWER, share=0.4, most=2, stall=1.5) as proxy:
            flags += [f"--server={proxy.url}", "--model=m", f"--out={tmp_path}/out", "--timeout=1", "--concurrency=3"]
            while done is None:
                written = {names[r["key"]] for r in read_rows(kept)} if kept.exists() else set()
                seen, enough = len(proxy.log), len(written) + rng.randrange(4, 12)
                (started,) = processes.start("paligemma_med.evaluate", flags, num=1)
                while started.poll() is None and not (kept.exists() and kept.read_bytes().count(b"\n") >= enough):
                    time.sleep(0.005)
                if started.poll() is None and enough < total:
                    started.send_signal(signal.SIGKILL)
                    kills += 1
                out, err = started.communicate(timeout=120)
                done = started.returncode if started.returncode != -signal.SIGKILL else None
                again = [entry["name"] for entry in proxy.log[seen:] if entry["name"] in written]
                assert not again, f"start {kills}: {len(again)} asked again of {len(written)} written"
                assert kills < 20
    assert done == 0, err
    assert kills >= 3 and len({entry["fault"] for entry in proxy.log}) > 3
    check_figures(tmp_path / "out" / "eval" / "q")
    whole, killed = (tmp_path / x / "eval" / "q" for x in ("whole", "out"))
    assert (whole / "predictions.jsonl").read_bytes() == (killed / "predictions.jsonl").read_bytes()
    assert read_metrics(whole / "metrics.json")[0] == read_metrics(killed / "metrics.json")[0]
    assert len(read_rows(kept)) == total  # one line a request


def test_questions_without_an_answer_are_counted_and_only_they_are_asked_again(data, tmp_path):
    with servers.FakeModel(looks) as model:
        with servers.Proxy(model.url, ["500"], share=0.4, most=1) as proxy:
            with pytest.raises(ServerError, match=r"of 8 questions \(model\) have no answer.*only these again"):
                run(data, tmp_path / "out", proxy.url, max_faults=1, controls=[], concurrency=1)
            before = len(model.requests)
            run(data, tmp_path / "out", proxy.url, controls=[])  # at the same address or another
        assert 0 < before < 8 and len(model.requests) == 8


def test_questions_about_one_image_have_no_shuffled_control(data, tmp_path, capsys):
    with servers.FakeModel(looks) as model:
        metrics = run(data | dict(split="all[:2]"), tmp_path / "out", model.url)
    assert controls.ONE_IMAGE in capsys.readouterr().err
    assert "blank_image/overall/acc" in metrics and "shuffled_images/overall/acc" not in metrics


def test_an_image_that_cannot_be_read_is_named_before_anything_is_asked(data, tmp_path):
    (tmp_path / "films" / f"{SHADES[1]}.png").write_bytes(b"no image")
    with servers.FakeModel(looks) as model:
        with pytest.raises(ValueError, match="split all, question 'row3': not a readable image"):
            run(data, tmp_path / "out", model.url)
        assert not model.requests


@pytest.mark.parametrize(
    "given, said",
    [
        (dict(table="q.csv", batch_size=4), "--batch_size is for weights of ours"),
        (dict(workdir="w"), "--workdir is for weights of ours"),
        (dict(images="films"), "--images goes with --table"),
        (dict(table="q.csv", only=["a"]), "--only chooses among config.evals"),
    ],
)
def test_flags_that_would_be_ignored_are_refused(given, said):
    with pytest.raises(app.UsageError, match=said):
        program_evaluate._evaluate_served(flags_of(**given))


def flags_of(**given):
    class Values:
        """absl's flags, of which these are given."""

        __getattr__ = staticmethod((dict(model="m", out="o") | given).get)

        def __getitem__(self, name):
            return types.SimpleNamespace(present=name in given, value=given.get(name))

    return Values()


def test_sections_of_a_config_on_a_built_data_set(tiny_data, tmp_path, capsys):
    config = tiny.config(tiny_data)
    config.evals.val.data.split = "validate[:6]"
    config.evals.talk = dict(type="dialogue")
    config.evals.other = dict(type="vqa")
    with servers.FakeModel(lambda texts: "yes") as model:
        given = dict(server=model.url, config=config, only=["val", "talk"], controls=["majority", "question_only"])
        given |= dict(out=str(tmp_path), resume=True, concurrency=4, timeout=20.0)
        program_evaluate._evaluate_served(flags_of(**given))
    assert "config.evals.talk is of type 'dialogue': left out" in capsys.readouterr().err
    rows = read_rows(tmp_path / "eval" / "val" / "predictions.jsonl")
    source = input_pipeline.open_source(config.evals.val.data.to_dict())
    assert [r["question_id"] for r in rows] == [source[i]["question_id"] for i in range(6)]
    assert all(r["predictions"] == ["yes"] == r["question_only_predictions"] and r["image_id"] for r in rows)
    asked = [r for r in model.requests if isinstance(r["messages"][-1]["content"], list)]
    assert all(r["max_tokens"] == 4 for r in asked) and {r["image_key"] for r in rows}
    assert read_metrics(tmp_path / "eval" / "val" / "metrics.json")[1]["data"]["name"].startswith("phantom")


def test_choices_of_an_own_table_are_asked_and_scored_by_letter(data, tmp_path):
    text = "image,question,answer,choices\n"
    text += "".join(f"{s}.png,Which?,{'MRI' if s > 128 else 'b'},CT|MRI{'|PET' if s == 20 else ''}\n" for s in SHADES)
    (tmp_path / "q.csv").write_text(text)
    said = []

    def letters(texts):
        said.append(texts["text"])
        return {"yes": "B.", "no": "The answer is A"}.get(looks(texts), "C")

    with servers.FakeModel(letters) as model:
        metrics = run(data, tmp_path / "out", model.url)
    assert "A. CT\nB. MRI\nC. PET\n" in "".join(said) and "A. CT\nB. MRI\nGive" in "".join(said)
    rows = read_rows(tmp_path / "out" / "eval" / "own" / "predictions.jsonl")
    assert [(r["answer"], r["answer_letter"], r["choices"][:2]) for r in rows] == [("B", "B", ["CT", "MRI"])] * 4
    # 200 alone looks bright; "C" isn't there for three of them; training says B.
    figures = {who: metrics[f"{who}/overall/acc_letter"] for who in ("model", "majority", "blank_image")}
    assert figures == dict(model=1 / 4, majority=1, blank_image=0)


def test_a_table_in_which_some_have_choices_is_asked_without_and_says_so(data, tmp_path, capsys):
    lines = "image,question,answer,choices\n20.png,Which?,MRI,CT|MRI\n60.png,Is it bright?,no,\n"
    (tmp_path / "q.csv").write_text(lines)
    with servers.FakeModel(looks) as model:
        metrics = run(data, tmp_path / "out", model.url, controls=[])
    assert metrics["model/overall/acc"] == 1 / 2 and "1 of 2 questions" in capsys.readouterr().err


def test_a_model_that_must_have_an_image_is_told_from_a_server_that_is_gone(data, tmp_path):
    class Strict(servers.FakeModel):
        def respond(self, handler, body):
            if b"image_url" in body:
                return super().respond(handler, body)
            return servers.send(handler, 500, b"no image")

    with Strict(looks) as model:
        with pytest.raises(ServerError, match="without an image, --controls=majority,.*noise_image leaves that out"):
            run(data, tmp_path / "out", model.url)
        metrics = run(data, tmp_path / "out", model.url, controls=["blank_image"])
    assert metrics["model/overall/acc"] == 7 / 8


def test_what_programs_read_differently_is_sent_as_8_bits(data, tmp_path):
    PIL.Image.fromarray(np.full((9, 8), 200 << 8, np.uint16)).save(tmp_path / "films" / "20.png")
    sent = {}

    def seen(texts):
        image = PIL.Image.open(io.BytesIO(base64.b64decode(texts["image_url"].partition(",")[2])))
        sent[image.size] = image.mode, np.asarray(image.convert("L")).max()
        return "yes"

    with servers.FakeModel(seen) as model:
        run(data, tmp_path / "out", model.url, controls=[])
    assert sent[8, 9] == ("RGB", 199)  # 51,200 of 65,535


def test_an_image_of_many_questions_is_decoded_once(data, tmp_path, monkeypatch):
    own, seen = pictures.own, []
    monkeypatch.setattr(pictures, "own", lambda content: [seen.append(content), own(content)][1])
    with servers.FakeModel(looks) as model:
        run(data, tmp_path / "out", model.url, controls=["blank_image", "noise_image", "question_only"])
    assert len(seen) == len(SHADES)


def test_settings_reach_the_server_and_seeds_are_the_same_in_each_run(data, tmp_path):
    section = program.table_section(data)
    section["pred_kw"] = dict(max_new_tokens=5, temperature=0.5, top_p=0.9, seed=7)
    seeds = []
    for out, seed in (("a", 7), ("b", 7), ("c", 8)):
        section["pred_kw"]["seed"] = seed
        with servers.FakeModel(looks) as model:
            program.evaluate({"own": section}, str(tmp_path / out), model="m", server=model.url, controls=[])
        asked = [{k: r[k] for k in ("max_tokens", "temperature", "top_p", "model")} for r in model.requests]
        assert asked == [dict(max_tokens=5, temperature=0.5, top_p=0.9, model="m")] * 8
        seeds.append(sorted(r["seed"] for r in model.requests))
    assert seeds[0] == seeds[1] and not {*seeds[0]} & {*seeds[2]}
    section["pred_kw"] = dict(max_new_tokens=5, beams=3)
    with pytest.raises(ValueError, match="'beams', which servers don't know"):
        program.evaluate({"own": section}, str(tmp_path), model="m", server="http://127.0.0.1:1/v1", controls=[])


def test_samples_have_seeds_of_their_own(data, tmp_path):
    section = program.table_section(data)
    section["pred_kw"] |= dict(num_samples=3, temperature=0.7)
    with servers.FakeModel(looks) as model:
        program.evaluate({"own": section}, str(tmp_path), model="m", server=model.url, controls=[])
    assert len({r["seed"] for r in model.requests}) == len(model.requests) == 24
    assert len(read_rows(tmp_path / "eval" / "own" / "predictions.jsonl")[0]["predictions"]) == 3


def test_images_leave_the_machine_only_for_the_host_that_is_named(data, tmp_path):
    for allowed in (None, "other.example"):
        with pytest.raises(ValueError, match="--send_images_to=api.example allows it"):
            run(data, tmp_path, "https://api.example/v1", send_images_to=allowed)


@pytest.mark.parametrize(
    "text, error",
    [
        ('{"user": "{question} {answer}"}', "tell the model the answer"),
        ('{"user": "{question} {colour}"}', "names {colour}"),
        ('{"user": "Well?"}', "no {question}"),
        ('{"user": "{question}", "image": "no"}', "before or after"),
        ('{"user": "{question}", "prompt": ""}', "has the key 'prompt'"),
        ('{"user": 3}', "expected a text"),
        ("[]", "expected a template"),
    ],
)
def test_a_wrong_template_is_refused(text, error, tmp_path):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=error):
        templates.read(path).check(["question", "answer"])


def test_a_template_fills_once_and_lists_choices():
    template = templates.read()
    row = dict(question="Is {answer} here?", answer="secret", choices=["left", "right", "up", "down", "none"])
    assert template.fill(row)[1].startswith("Is {answer} here?\nA. left\nB. right\nC. up\nD. down\nE. none\n")


def test_a_file_that_all_programs_read_alike_is_sent_as_it_is():
    content = pictures.png(np.zeros((2, 3, 3), np.uint8))
    assert pictures.own(content)[0] == content and pictures.data_url(content).startswith("data:image/png;base64,")
