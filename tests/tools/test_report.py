"""Reports: every figure follows from the predictions, hostile texts stay texts, contamination and
tampering are said loudly, and a page needs nothing from outside."""

import html.parser
import importlib.util
import json
import math
import re
import subprocess
import sys

import openpyxl
import pytest

from paligemma_med.evaluation import results
from paligemma_med.judge import judge
from paligemma_med.metrics import scoring, tables
from tools.report import (
    blocks,
    contamination,
    evaluations,
    figures,
    paper,
    pictures,
    plots,
    sections,
)
from tools.report.__main__ import check_installed, make, write

HOSTILE = '<script>alert(1)</script> | *x* [a](http://evil.example/) `b`\n# c <img src="//e.example/x">'
LOCATIONS = ("Lung", "Abdomen", "Brain_Tissue", "Neck")


def row(number, predictions, answer="yes", *, kind="CLOSED", image=None, question=None, **kw):
    """A line of predictions.jsonl with all its marks."""
    question = question or f"Is sign {number} there?"
    out = dict(
        question_id=f"q{number}",
        image_id=f"i{number // 3 if image is None else image}",
        question=question,
        prompt=f"answer en {question}\n",
        answer=answer,
        answer_type=kind,
        predictions=list(predictions),
        logprobs=[-0.1 * (i + 1) for i in range(len(predictions))],
        **kw,
    )
    out |= scoring.correct(predictions[0], answer)
    for who in scoring.CONTROLS:
        if f"{who}_prediction" in kw or f"{who}_predictions" in kw:
            out |= scoring.correct(scoring.texts(out, who)[0], answer, f"{who}_")
    return out


def rows(count=12, samples=5, wrong=lambda i: i % 3 == 0, **kw):
    """Every third question wrong; the majority says no, shuffled images say what the model does."""
    out = []
    for i in range(count):
        said = ["no" if wrong(i) else "yes"] * samples
        kind = "CLOSED" if i % 2 else "OPEN"
        out.append(
            row(
                i,
                said,
                kind=kind,
                location=LOCATIONS[i % 4],
                majority_prediction="no",
                shuffled_images_predictions=said,
                **kw,
            )
        )
    return out


def save(folder, made, name="slake_test", data="slake/en", split="test", config=None, **about):
    """A workdir with one evaluation, as `evaluate` leaves it."""
    section = dict(pred_kw=dict(num_samples=len(made[0]["predictions"]), temperature=1.0))
    about = {"protocol": "vqa", **about}
    about |= dict(
        groups=list(scoring.GROUPS),
        split_hash=results.split_hash(made),
        prompt_hash=results.prompt_hash(made),
        data=dict(name=data, split=split),
        section=section,
        split=f"{data} {split}",
        command="python -m paligemma_med.evaluate",
    )
    out = folder / "eval" / name
    results.write(out, made, scoring.summarise(made, about["protocol"]), about)
    (folder / "config.json").write_text(json.dumps(config or {"evals": {}}))
    return out


def report(*workdirs, **kw):
    made = make(workdirs, **kw)
    markdown, files = blocks.to_markdown("T", made)
    return made, markdown, blocks.to_html("T", made), files


def warnings(made):
    return [b.text for s in made for b in s.blocks if b.kind == "warning"]


def table(made, caption):
    """The first table of that caption as {first word cell: {head: cell}}."""
    found = next(b for s in made for b in s.blocks if b.kind == "table" and b.caption.startswith(caption))
    return {r[found.left - 1]: dict(zip(found.head, r)) for r in found.rows}


class Page(html.parser.HTMLParser):
    """Elements of a page and what they refer to."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
                self.links.append(value)

    handle_startendtag = handle_starttag

    def handle_data(self, data):
        self.text += data


# --- Figures ---


def test_tables_show_what_the_rows_say(tmp_path):
    save(tmp_path / "a", rows())
    made, markdown, page, files = report(tmp_path / "a")
    assert not warnings(made)
    cells = table(made, "5 answers a question, temperature 1")
    # 8 of 12 right in every run, so ± 0; the majority never; the interval is clustered Wilson's.
    low, high = (100 * scoring.summarise(rows())[f"model/overall/acc_mean_{x}"] for x in ("low", "high"))
    assert cells["overall"]["model"] == f"66.7 ± 0.0 ({low:.1f}–{high:.1f})"
    assert cells["overall"]["majority answer"].startswith("0.0 (")
    assert cells["overall"]["n"] == "12"
    # 1, 5, 7, 11 of the odd ones are right.
    assert cells["CLOSED"]["model"].startswith("66.7 ± 0.0 (")
    assert cells["CLOSED"]["n"] == "6"
    against = table(made, "The model against its controls")
    assert against["majority answer"]["gain, points (95 %)"].startswith("+66.7 (")
    assert against["majority answer"]["only this right"] == "8"
    # 2 · (1/2)^8: McNemar's exact p.
    assert against["majority answer"]["p, McNemar"] == "0.008"
    assert against["images shuffled"]["gain, points (95 %)"].startswith("+0.0 (")
    assert "8 of 12" not in markdown and "66.7" in markdown and "66.7" in page
    assert len(files) == 2 and all(f"figures/{name}" in markdown for name in files)


def test_figures_of_several_runs_are_means_with_clustered_intervals():
    made = [row(0, ["yes", "no"]), row(1, ["yes", "yes"]), row(2, ["no", "no"])]
    metrics = scoring.summarise(made)
    value, sd, low, high = tables.value_of(metrics, "model", "overall")
    assert value == pytest.approx(0.5) and sd == pytest.approx(math.sqrt(2) / 6)
    assert low == metrics["model/overall/acc_mean_low"]
    single = scoring.summarise([row(i, ["yes"]) for i in range(3)])
    assert tables.value_of(single, "model", "overall")[2] == (single["model/overall/acc_cluster_low"])
    assert tables.as_text(single, "echo", "overall") == "–"
    assert set(figures.names(single)) == {"acc", "acc_strict", "acc_set"}
    assert {"nonrobust", "acc_penalised_item"} < set(figures.names(metrics))


def test_multiple_choice_is_told_by_its_letters(tmp_path):
    choices = dict(choices=["CT", "MRI", "X-ray", "PET"], answer_letter="B")
    made = [
        # By exact match all but the first would be wrong.
        row(0, ["B"] * 3, "B", **choices),
        row(1, ["B: MRI", "(b)", "The answer is B"], "B", **choices),
        row(2, ["A", "C: X-ray", "B"], "B", **choices),
        row(3, ["A or B", "A", "A"], "B", **choices),
    ]
    folder = save(tmp_path / "a", made, name="pmc", data="pmc_vqa/v1", protocol="multiple_choice")
    sections_ = report(tmp_path / "a")[0]
    assert not warnings(sections_)
    # Right: all three of 0 and 1, one of 2.
    cells = table(sections_, "3 answers a question, temperature 1")
    assert cells["overall"]["model"].startswith("58.3 ± 14.4 (")
    assert table(sections_, "Table 1")["PMC-VQA (Short)"]["a: model"].startswith("58.3 ± 14.4 (")
    assert table(sections_, "Table 1")["PMC-VQA (Short)"]["a: model"].endswith(", by letter")
    (e,) = evaluations.load_all([folder])
    assert [r["question_id"] for r in sections.worst(e, 9)] == ["q3", "q2"]
    # Three letters; none and A. "B: MRI" and "(b)" are no different answers.
    assert [r["question_id"] for r in sections.least_robust(e, 9)] == ["q2", "q3"]
    by_text = row(0, ["it is MRI", "CT"], "MRI", **choices)
    assert figures.rule_of([by_text]) == "acc_text"
    assert figures.hits(by_text, "acc_text") == [True, False]


# --- Metrics that don't follow ---


def edit(path, function):
    value = json.loads(path.read_text())
    function(value)
    path.write_text(json.dumps(value))


def test_a_metric_that_does_not_follow_is_said_loudly(tmp_path):
    folder = save(tmp_path / "a", rows())
    edit(folder / "metrics.json", lambda m: m.update({"model/overall/acc": 0.9}))
    made, markdown, page, _ = report(tmp_path / "a")
    (text, again) = warnings(made)
    assert "metrics.json does NOT follow from predictions.jsonl" in text
    assert "model/overall/acc is 0.9, from the predictions 0.66" in text and text[-20:] in again
    assert "NOT follow" in markdown and 'class="warning"' in page and "NOT follow" in page
    # What is shown is still what the predictions say.
    assert table(made, "5 answers")["overall"]["model"].startswith("66.7")


def test_a_mark_that_does_not_follow_from_its_answer_is_said(tmp_path):
    changed = rows()
    changed[3]["correct"] = True
    save(tmp_path / "a", changed)
    made, *_ = report(tmp_path / "a")
    assert "marks in predictions.jsonl do NOT follow from its answers: question q3 (model)" in (warnings(made)[0])


def test_other_intervals_and_unknown_figures_and_hashes_are_told_apart(tmp_path):
    folder = save(tmp_path / "a", rows())

    def change(m):
        m["model/overall/acc_low"] += 0.01
        m["model/overall/invented"] = 1.0
        m["truncated"] = 3  # predictions don't tell
        m["about"]["prompt_hash"] = "0" * 64

    edit(folder / "metrics.json", change)
    made, *_ = report(tmp_path / "a")
    said = " ".join(warnings(made))
    assert "does NOT follow" not in said and "truncated" not in said
    assert "intervals in metrics.json differ" in said
    assert "can't be made from predictions: model/overall/invented" in said
    assert "the prompt_hash in metrics.json is NOT that of predictions.jsonl" in said


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no eval/.*expected a workdir"):
        evaluations.load_all([tmp_path])
    folder = save(tmp_path / "a", rows())
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    broken = json.loads(lines[1])
    del broken["prompt"]
    (folder / "predictions.jsonl").write_text("\n".join([lines[0], json.dumps(broken)]) + "\n")
    with pytest.raises(ValueError, match="line 2: has no 'prompt'"):
        evaluations.load_all([tmp_path / "a"])
    broken = json.loads(lines[1]) | {"predictions": ["yes"]}
    (folder / "predictions.jsonl").write_text("\n".join([lines[0], json.dumps(broken)]) + "\n")
    with pytest.raises(ValueError, match="line 2: 1 predictions; expected 5"):
        evaluations.load_all([tmp_path / "a"])
    (folder / "metrics.json").unlink()
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    assert evaluations.load_all([folder])[0].problems == ["there is no metrics.json"]


# --- Texts are data ---


def test_hostile_texts_stay_texts(tmp_path):
    made = rows(6)
    made[0] = row(0, [HOSTILE] * 5, HOSTILE + "!", kind=HOSTILE, question=HOSTILE, content_type="$x_$")
    for other in made[1:]:
        other["content_type"] = "$\\frac$"
        del other["majority_prediction"], other["shuffled_images_predictions"]
        for key in [k for k in other if k.startswith(("majority", "shuffled"))]:
            del other[key]
    save(tmp_path / "a", made, command2=HOSTILE)
    _, markdown, text, _ = report(tmp_path / "a")
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "base", "form", "link"} & {*page.tags}
    # Anchors within the page, and images within it: nothing else is referred to.
    assert page.links and all(x.startswith(("#", "data:image/jpeg;base64,")) for x in page.links)
    assert "<script>alert(1)</script>" in page.text  # shown as it was said
    assert "default-src 'none'" in html.unescape(text)
    assert not re.search(r"(?<!\\)<(script|img)", markdown)
    assert not re.search(r"(?<!\\)\]\(http", markdown)
    # Every line of every table has as many cells as its head.
    for block in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "$x_$" in text  # no formula was made of it


def test_ids_in_plots_do_not_collide_and_follow_the_page(tmp_path):
    save(tmp_path / "a", rows())
    save(tmp_path / "b", rows(wrong=lambda i: i % 4 == 0))
    _, _, text, files = report(tmp_path / "a", tmp_path / "b")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len({*ids})
    used = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'xlink:href="#([^"]+)"', text)
    assert used and {*used} < {*ids}
    assert "currentColor" in text and not re.search("#123456", text)
    assert "background:#fff" in plots.standalone(files["01.svg"])


def test_markdown_escapes():
    assert blocks.escape("a|b <i> *c* \n# d") == r"a\|b \<i\> \*c\* ⏎ \# d"
    assert blocks.escape("- a") == r"\- a" and blocks.escape("1. a") == r"1\. a"
    assert blocks.escape("---") == r"\---" and blocks.escape("1.5 cm") == "1.5 cm"
    assert blocks.escape("") == " "


# --- The paper's tables ---


def test_published_figures_stand_beside_ours_or_not_run(tmp_path):
    save(tmp_path / "a", rows(), config=dict(input=dict(data=dict(name="slake/en"))))
    made, *_ = report(tmp_path / "a")
    one = table(made, "Table 1")
    assert one["SLAKE (Closed)"]["with Stage 1"] == "79.00 ± 2.75"
    assert one["SLAKE (Closed)"]["a: model"].startswith("66.7 ± 0.0")  # the closed ones
    assert one["SLAKE (Closed)"]["a: majority answer"].startswith("0.0")
    assert one["PMC-VQA (Short)"]["a: model"] == "not run"
    two = table(made, "Table 2")
    assert two["Chest"]["published"] == "15/50" and two["Chest"]["LLaVA-Med"] == "19/50"
    # Questions 0, 4, 8 are of lungs; 0 is wrong.
    assert two["Chest"]["a: model"].startswith("66.7") and "n = 3" in two["Chest"]["a: model"]
    assert two["Musculoskeletal"]["a: model"] == "not run"
    assert table(made, "Table 4")["ROUGE-L"]["ours"] == "not run"
    five = table(made, "Table 5")
    assert five["BLEU"]["ROCO + MedPix"] == "0.430 ± 0.086"
    assert five["ROUGE-S"]["a: model, SLAKE"] == "0.667 ± 0.471"
    # "Is sign 3 there?" shares no word with "yes".
    assert five["ROUGE-S"]["a: question echoed, SLAKE"] == "0.000 ± 0.000"
    assert five["Accuracy"]["a: model, SLAKE"].startswith("66.7")


def test_the_test_split_stands_for_a_data_set_and_a_mixture_needs_both(tmp_path):
    run = tmp_path / "a"
    save(run, rows(6), name="val", split="validate")
    save(run, rows(9), name="test")
    save(run, rows(3), name="roco", data="rocov2/qa")
    found = evaluations.load_all([run])
    assert [e.name for e in paper.find(found, "SLAKE")] == ["test"]
    assert paper.find(found, "MedPix v2.0") == [] and paper.find(found, "ROCO + MedPix") == []
    save(run, rows(3), name="medpix", data="medpix2/qa")
    found = paper.find(evaluations.load_all([run]), "ROCO + MedPix")
    assert {e.name for e in found} == {"roco", "medpix"}


def test_a_run_evaluated_elsewhere_is_described_where_its_weights_lie(tmp_path):
    save(tmp_path / "a", rows(3), config=dict(input=dict(data=dict(name="slake/en"))))
    save(tmp_path / "b", rows(3), checkpoint=f"{tmp_path}/a@20")
    (tmp_path / "b" / "config.json").unlink()
    save(tmp_path / "c", rows(3), checkpoint=f"{tmp_path}/weights.npz")
    (e,) = evaluations.load_all([tmp_path / "b"])
    assert paper.has_stage1(e.config)
    assert not paper.has_stage1(evaluations.load_all([tmp_path / "c"])[0].config)
    assert paper.has_stage1(dict(model_init="out/stage1")) and not paper.has_stage1({})


def test_every_published_figure_is_the_papers():
    # By hand from the paper, read line by line: Tables 1, 2, 4 and 5.
    flat = " ".join(str(x) for t in (paper.TABLE1, paper.TABLE2) for r in t for x in r)
    for figure in (
        "79.00 ± 2.75",
        "86.50 ± 1.60",
        "32.22 ± 2.23",
        "33.15 ± 3.15",
        "58.44 ± 2.53",
        "32.25 ± 3.60",
        "34.00 ± 3.95",
        "56.56 ± 3.57",
        "39.53 ± 3.22",
        "41.48 ± 3.90",
        "56.63 ± 3.22",
        "15/50",
        "19/50",
        "28/50",
        "32/50",
        "39/50",
        "41/50",
        "14/50",
        "22/50",
    ):
        assert figure in flat
    assert {len(v) for v in [*paper.TABLE4.values(), *paper.TABLE5.values()]} == {5}
    assert paper.TABLE4["ROCO v2.0"][:4] == ("0.325 ± 0.132", "0.179 ± 0.124", "0.278 ± 0.120", "0.059 ± 0.090")
    assert paper.TABLE5["MedPix v2.0"][4] == "33/200 (82/200)"


def test_verdicts_of_a_judge_stand_beside_exact_match(tmp_path):
    made = rows(6)
    folder = save(tmp_path / "a", made)
    lines = [dict(judge="v", question_id=r["question_id"], who="model", scores=[1, 1, 1, 1, None]) for r in made]
    (folder / "judgements.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    digest = judge.hashlib.sha256((folder / "predictions.jsonl").read_bytes()).hexdigest()
    entry = dict(
        protocol="binary",
        model="m",
        prompt="binary_v1.txt",
        prompt_text="Is it right?",
        predictions_sha256=digest,
        metrics=judge.summarise(lines, made, "binary"),
        cost=0.5,
        tokens=dict(replies=7, unusable=1, prompt_tokens=1200, completion_tokens=30),
        agreement=dict(n=5, unjudged=1, agree=0.8, kappa=None, table=[[1, 1, 4], [0, 1, 1]]),
    )
    entry["metrics"] = {k: v for k, v in entry["metrics"].items() if math.isfinite(v)}
    (folder / "judge.json").write_text(json.dumps({"v": entry}))
    sections_, markdown, *_ = report(tmp_path / "a")
    assert not warnings(sections_)
    assert "judge 100.0" in table(sections_, "Table 1")["SLAKE (Closed)"]["a: model"]
    assert "6 unjudged" in table(sections_, "Table 1")["SLAKE (Closed)"]["a: model"]
    assert "Is it right?" in markdown and "m, binary, 0 to 1" in markdown
    assert "7 replies, 1 of them unusable; 1,200 + 30 tokens, cost 0.5000." in markdown
    said = "Human labels: 5 compared, 1 unjudged; 80.0 % equal, Cohen's kappa not defined."
    assert said in markdown
    entry["metrics"]["model/overall/mean"] = 0.5
    (folder / "judge.json").write_text(json.dumps({"v": entry}))
    assert "does NOT follow from judgements.jsonl" in warnings(report(tmp_path / "a")[0])[0]
    entry["metrics"] |= {"model/overall/mean": 1.0, "model/overall/mean_low": 0.1}
    (folder / "judge.json").write_text(json.dumps({"v": entry}))
    assert "intervals in judge.json differ" in warnings(report(tmp_path / "a")[0])[0]
    entry["predictions_sha256"] = "0"
    (folder / "judge.json").write_text(json.dumps({"v": entry}))
    sections_ = report(tmp_path / "a")[0]
    assert "on other predictions" in warnings(sections_)[0]
    assert "judge" not in table(sections_, "Table 1")["SLAKE (Closed)"]["a: model"]


def test_what_did_not_fit_is_a_warning(tmp_path):
    made = rows(6, tokens_cut=0, unfinished=0)
    save(tmp_path / "a", made)
    assert not warnings(report(tmp_path / "a")[0])
    made[1] |= dict(tokens_cut=3, unfinished=2)
    save(tmp_path / "a", made)
    assert warnings(report(tmp_path / "a")[0]) == [
        "1 of 6 prompts lost tokens: they didn't fit.",
        "2 of 30 answers were cut off at max_new_tokens.",
    ]


def test_llava_meds_closed_metric_is_of_closed_questions(tmp_path):
    save(tmp_path / "a", rows(6), protocol="closed")
    cells = table(report(tmp_path / "a")[0], "Other figures")
    # Of q1, q3, q5 the second is wrong.
    assert cells["LLaVA-Med's closed, 3 closed questions"]["model"].startswith("66.7 ± 0.0")


# --- Two runs ---


def test_two_runs_are_compared_question_by_question(tmp_path):
    save(tmp_path / "a", rows())
    save(tmp_path / "b", rows(wrong=lambda i: i in (0, 1)))
    made, *_ = report(tmp_path / "a", tmp_path / "b")
    cells = table(made, "Paired on the same questions")["overall"]
    # a is wrong at 0, 3, 6, 9; b at 0, 1.
    assert (cells["a"], cells["b"]) == ("66.7", "83.3")
    assert cells["gain, points (95 %)"].startswith("+16.7 (")
    assert (cells["only this right"], cells["only the other"]) == ("3", "1")
    assert cells["p, McNemar"] == "0.625"  # 2 · (1 + 4) / 2^4
    other, *_ = report(tmp_path / "b", tmp_path / "a", compare=(tmp_path / "b", tmp_path / "a"))
    assert table(other, "Paired on the same")["overall"]["gain, points (95 %)"].startswith("-16.7")
    with pytest.raises(ValueError, match="--compare names"):
        report(tmp_path / "a", compare=(tmp_path / "a", tmp_path / "c"))


def test_two_evaluations_of_other_names_are_compared_when_asked_for(tmp_path):
    one = save(tmp_path / "a", rows(), name="slake_test[:12]")
    two = save(tmp_path / "b", rows(wrong=lambda i: i in (0, 1)))
    made, *_ = report(one, two, compare=(one, two))
    assert table(made, "Paired on the same questions")["overall"]["b"] == "83.3"
    save(tmp_path / "b", rows(), name="slake_validate")
    with pytest.raises(ValueError, match="no evaluation of one name.*slake_validate"):
        report(tmp_path / "a", tmp_path / "b", compare=(tmp_path / "a", tmp_path / "b"))


def test_runs_that_were_asked_in_other_ways_are_told_apart(tmp_path):
    save(tmp_path / "a", rows(samples=1))
    save(tmp_path / "b", [r | dict(prompt=f"Q: {r['question']}") for r in rows(samples=5)])
    made, markdown, *_ = report(tmp_path / "a", tmp_path / "b")
    (text,) = warnings(made)
    assert "a, 1 answer a question, temperature 1; b, 5 answers a question, temperature 1" in text
    assert "Their prompts differ." in markdown
    save(tmp_path / "b", rows(samples=1), protocol="open")
    made, markdown, *_ = report(tmp_path / "a", tmp_path / "b")
    assert not warnings(made) and "prompts differ" not in markdown


def test_different_questions_are_not_compared(tmp_path):
    save(tmp_path / "a", rows())
    save(tmp_path / "b", rows(9))
    assert "Not the same split: 12 and 9 questions, of which 9" in " ".join(
        warnings(report(tmp_path / "a", tmp_path / "b")[0])
    )
    changed = rows()
    changed[2] = row(2, ["yes"] * 5, "maybe")
    for other in changed:
        for key in [k for k in other if k.startswith(("majority", "shuffled"))]:
            del other[key]
    save(tmp_path / "b", changed)
    made, *_ = report(tmp_path / "a", tmp_path / "b")
    assert "1 other questions or answers" in " ".join(warnings(made))


# --- Questions, confidence ---


def test_worst_and_least_robust_questions_come_first(tmp_path):
    made = [
        row(0, ["yes"] * 5),
        row(1, ["no"] * 5),
        row(2, ["no", "yes", "no", "no", "no"]),
        row(3, ["a", "b", "c", "yes", "yes"]),
        row(4, ["no"] * 5) | {"logprobs": [-0.01] * 5},
        row(5, ["yes", "a", "yes", "yes", "yes"]),
    ]
    save(tmp_path / "a", made)
    (e,) = evaluations.load_all([tmp_path / "a"])
    # Wrong in all samples, the surer first; right in the first sample is no worst answer.
    assert [r["question_id"] for r in sections.worst(e, 9)] == ["q4", "q1", "q2", "q3"]
    assert [r["question_id"] for r in sections.least_robust(e, 9)] == ["q3", "q2", "q5"]
    assert len(sections.worst(e, 2)) == 2


def test_bins_hold_their_upper_end_and_their_mean():
    found = sections.bins([0.2, 0.20000000000000004, 0.15, 1.0, 0.0], [1, 0, 1, 1, 0])
    assert [b[4] for b in found] == [1, 3, 1]
    assert found[1][0] == pytest.approx(0.55 / 3) and found[1][1] == pytest.approx(2 / 3)
    assert found[-1][:2] == (1.0, 1.0)
    # Of perfectly calibrated answers the distance is 0.
    assert sections._ece(sections.bins([0.5] * 4, [1, 0, 1, 0])) == 0
    assert sections._ece(sections.bins([0.9] * 2, [0, 0])) == pytest.approx(0.9)


def test_images_come_from_the_built_data_set(tiny_data, tmp_path):
    from paligemma_med import input_pipeline

    data = dict(name="phantom", split="validate")
    source = input_pipeline.open_source(data | dict(data_dir=str(tiny_data)))
    lookup = pictures.Lookup(data, tiny_data)
    assert lookup.note == ""
    assert lookup.image(source[1]["question_id"])[:2] == b"\xff\xd8"
    assert lookup.image("none such") is None
    assert lookup.column("answer_type")[source[1]["question_id"]] == source[1]["answer_type"]
    assert lookup.column("none such") == {}
    assert "not built" in pictures.Lookup(data, tmp_path).note
    assert pictures.Lookup({}).note


# --- Contamination ---

# The layout of the authors' sheet: a Python object's address for the image, the prompt in front.
IMAGE = "<PIL.PngImagePlugin.PngImageFile image mode=RGB size=512x327 at 0x74C258F0{:04X}>"


def write_sheet(path, lines):
    book = openpyxl.Workbook()
    for line in [("Image ID", "Question", "Generated Answer", "Label"), *lines]:
        book.active.append(line)
    book.save(path)


def contaminated():
    """Six questions asked of four images each, answered without looking, prompt and all."""
    lines = []
    for q in range(6):
        question = f"What does the finding number {q} suggest?"
        for i in range(4):
            said = f"answer {question}\nThe finding suggests that thing."
            truth = f"The finding suggests tumour {i} in organ {q}."
            lines.append((IMAGE.format(10 * q + i), question, said, truth))
    return lines


def test_the_authors_layout_shows_their_contamination(tmp_path):
    write_sheet(tmp_path / "inference_results.xlsx", contaminated())
    read = contamination.read(tmp_path / "inference_results.xlsx")
    assert len(read) == 24 and read[0]["image"] is None
    found = contamination.examine(read)
    assert found["with_prompt"] == found["starts_with_prompt"] == 24
    assert (found["repeated"], found["always_same"], found["truth_same"]) == (6, 6, 0)
    assert found["constant_right"] == 6 and found["right"] == 0
    made = make([], foreign=[tmp_path / "inference_results.xlsx"])
    said = " ".join(warnings(made))
    assert "24 of 24 (100.0 %) of the predictions begin with the prompt" in said
    assert "the truth differs in 6 of them: the answers do not depend on the image" in said
    signs = table(made, "Signs of contamination")
    assert signs["· always answered the same"]["found"] == "6 of 6 (100.0 %)"
    assert signs["· by a majority answer, which sees no image"]["found"] == "6 of 6 (100.0 %)"
    scored = table(made, "What an answer without the image would score")
    assert set(scored) == {"predictions as given", "without the prompt", "the prompt alone", "the question alone"}


def test_sound_predictions_raise_no_alarm():
    clean = [
        dict(question="What does it show?", prediction=f"tumour {i}", answer=f"tumour {i}", image=str(i))
        for i in range(8)
    ]
    section = contamination.section("t", clean)
    assert not [b for b in section.blocks if b.kind == "warning"]
    found = contamination.examine(clean)
    assert found["always_same"] == 0 and found["right"] == 8 and found["constant_right"] == 1


def test_one_image_asked_twice_is_no_repeated_question():
    two = [dict(question="Same?", prediction="a", answer="b", image="1")] * 2
    assert contamination.examine(two)["repeated"] == 0
    assert contamination.examine([r | {"image": None} for r in two])["repeated"] == 1


def test_an_echo_that_scores_as_well_is_said():
    echo = [
        dict(
            question=f"Is there a large mass in lobe {i}?",
            image=str(i),
            answer=f"large mass {i}",
            prediction=f"answer en Is there a large mass in lobe {i}?\nno",
        )
        for i in range(6)
    ]
    said = [b.text for b in contamination.section("t", echo).blocks if b.kind == "warning"]
    assert any("Repeating the prompt, without image or model, scores" in text for text in said)


@pytest.mark.parametrize(
    "prediction, prompt",
    [
        ("answer en Is it there?\nyes", "answer en Is it there?"),
        ("Is it there?", "Is it there?"),
        ("yes", ""),
        ("The question Is it there? is hard", "The question Is it there?"),
        ("One could well ask Is it there?", ""),
    ],
)
def test_prompt_of(prediction, prompt):
    row = dict(question=" Is it there?", prediction=prediction)
    assert contamination.prompt_of(row) == prompt


@pytest.mark.parametrize("kind", ["json", "pandas.json", "jsonl", "csv", "xlsx"])
def test_foreign_files_of_every_kind_read_alike(tmp_path, kind):
    lines = [
        dict(image_id="1", question="q, 1", predicted_answer="a\n1", answer="b", rouge1=0.5),
        dict(image_id="2", question="q 2", predicted_answer="", answer="d", rouge1=0.1),
    ]
    path = tmp_path / f"f.{kind}"
    if kind == "json":
        path.write_text(json.dumps(lines))
    elif kind == "pandas.json":
        path.write_text(json.dumps({k: {"0": lines[0][k], "1": lines[1][k]} for k in lines[0]}))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "csv":
        path.write_text('image_id,question,predicted_answer,answer\n1,"q, 1","a\n1",b\n2,q 2,,d\n', newline="")
    else:
        book = openpyxl.Workbook()
        book.active.append(list(lines[0]))
        for line in lines:
            book.active.append(list(line.values()))
        book.save(path)
    assert contamination.read(path) == [
        dict(image="1", question="q, 1", prediction="a\n1", answer="b"),
        dict(image="2", question="q 2", prediction="", answer="d"),
    ]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.txt", "x", "expected a .xlsx, .csv, .json or .jsonl"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[1]", "expected a list of objects"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"question": 1, "answer": 2}]', "no column for the prediction"),
        ("a.xlsx", "no zip", "can't be read as an Excel file"),
    ],
)
def test_foreign_files_that_cannot_be_read_say_why(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        contamination.read(tmp_path / name)


# --- The program ---


def test_written_files_are_whole_and_refer_to_each_other(tmp_path):
    save(tmp_path / "a", rows())
    write("T", make([tmp_path / "a"]), tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (tmp_path / "out" / name).read_text().startswith("<?xml")
    assert (tmp_path / "out" / "report.html").read_text().endswith("</html>")


@pytest.mark.parametrize("name", ["jinja2", "matplotlib", "openpyxl"])
def test_a_missing_extra_is_named(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == name else find(x))
    with pytest.raises(ValueError, match=f"needs {name}; pip install 'paligemma_med.report.'"):
        check_installed()


@pytest.mark.slow
def test_the_program(tmp_path):
    save(tmp_path / "a", rows())
    write_sheet(tmp_path / "f.xlsx", contaminated())
    command = [sys.executable, "-m", "tools.report", tmp_path / "a", f"--foreign={tmp_path}/f.xlsx"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("warning: 24 of 24 (100.0 %) of the predictions begin") == 1
    assert (tmp_path / "a" / "report" / "report.html").exists()
    run = subprocess.run([*command[:3], tmp_path / "none"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.strip().startswith("error: ")
    assert len(run.stderr.strip().splitlines()) == 1
