"""The transformers backend: what is generated, in which batches, and what a kill changes."""

import contextlib
import json
import signal
import subprocess
import sys

import pytest
import torch
import transformers

from tests.tools.synthesize_qa import tiny_llama
from tools import random_kills
from tools.synthesize_qa import journal, loading, local, parse, sources, templates, units

DECODING = dict(max_new_tokens=16, temperature=1.0, top_p=1.0)
ABOUT = dict(model="m", weights="w", backend="b", settings={}, seed=0, pairs=3, examples="")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_llama.save(tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return loading.load(str(folder), dtype="float32", **DECODING)


@pytest.fixture
def planned(tmp_path):
    return lambda n, names=("caption",), **kw: units.plan(
        sources.open_rows([str(tiny_llama.captions(tmp_path / "c.jsonl", n))], sources.new_books()),
        [templates.load(x) for x in names],
        {**ABOUT, **kw},
        sources.new_books(),
    )


def answer(found, path, model, **kw):
    """The journal's records without what was measured."""
    with journal.open_journal(str(path)) as opened:
        local.answer(found, opened, model, parse.read_reply, **{"batch_size": 4, **kw})
    records = [json.loads(line) for line in open(path)]
    return [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in records]


def greedy(model, messages, n):
    """One reply as `transformers` alone gives it: no batch, no padding, no cache that is shared."""
    ids = torch.tensor([loading.prompt(model, messages)])
    made = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n)
    return made[0, ids.shape[1] :].tolist()


def test_batches_say_what_one_at_a_time_says(folder, planned, tmp_path):
    """Padding, order and the shared beginning change nothing but rounding; two templates."""
    model = loading.load(str(folder), dtype="float32", **{**DECODING, "temperature": 0.0})
    found = planned(9, ("caption", "choice"))
    records = {r["key"]: r for r in answer(found, tmp_path / "j", model) if not r["attempt"]}
    assert records.keys() == {u.key for u in found}
    assert model.prefixes  # otherwise nothing was shared
    said = set()
    for u in found:
        ids = greedy(model, u.messages(), 16)
        end = model.tokenizer.eos_token_id
        ended = end in ids
        ids = ids[: ids.index(end)] if ended else ids
        record = records[u.key]
        assert record["reply"] == model.tokenizer.decode(ids, skip_special_tokens=True)
        assert record["finish"] == ("stop" if ended else "length")
        assert record["usage"] == [len(loading.prompt(model, u.messages())), len(ids) + ended]
        said.add(record["reply"])
    assert len(said) > 3  # replies depend on the row


def test_second_replies(model, planned, tmp_path):
    """What can't be used is asked once more with the reason, and then let be."""
    found = planned(12)
    records = answer(found, tmp_path / "j", model)
    by_key = {u.key: [r for r in records if r["key"] == u.key] for u in found}
    kinds = set()
    for u in found:
        first, *second = by_key[u.key]
        reads = [parse.read_reply(r["reply"], "pairs", r["finish"] == "length") for r in (first, *second)]
        assert [r["score"] for r in (first, *second)] == [len(x.pairs) or None for x in reads]
        assert [r["problem"] for r in (first, *second)] == [x.problem for x in reads]
        assert bool(second) == (first["score"] is None) and len(second) <= 1
        if second:
            assert first["problem"].rstrip(".") in u.messages(1, first["problem"])[-1]["content"]
            assert second[0]["usage"][0] > first["usage"][0] and second[0]["attempt"] == 1
        kinds.add(tuple(r["score"] is None for r in (first, *second)))
    assert kinds >= {(False,), (True, True)} or kinds >= {(False,), (True, False)}


def test_drawn_by_seed(model, planned, tmp_path):
    first = answer(planned(6), tmp_path / "a", model)
    assert first == answer(planned(6), tmp_path / "b", model)
    assert first != answer(planned(6), tmp_path / "c", model, seed=1)


def test_a_run_that_goes_on_makes_the_same_batches(model, planned, tmp_path):
    """Stopped after each batch, and with a batch half of which is there."""
    found = planned(11)
    whole = answer(found, tmp_path / "whole", model)

    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    for _ in range(3):
        with pytest.raises(Stopped):
            answer(found, tmp_path / "stopped", model, progress=stop)
    assert answer(found, tmp_path / "stopped", model) == whole
    # A journal that has single replies of batches, as after --max_rows was raised.
    with journal.open_journal(str(tmp_path / "part")) as part:
        for record in whole[::3]:
            kept = {k: v for k, v in record.items() if k != "rest"}
            if not record["attempt"]:
                part.add({**kept, "time": 0.0, "seconds": 0.0})
    plain = [
        sorted((r["key"], r["attempt"], r["reply"]) for r in records)
        for records in (whole, answer(found, tmp_path / "part", model))
    ]
    assert plain[0] == plain[1]
    assert answer(found, tmp_path / "whole", model) == whole  # nothing is asked again


def test_plan(planned):
    found = planned(30)
    lengths = [(u.number * 7) % 13 + 5 for u in found]
    prompts = {u.key: [0] * n for u, n in zip(found, lengths)}
    batches = local.plan(found, prompts, 10, 8, 100)
    assert sorted(u.number for b in batches for u in b) == list(range(30))
    for batch in batches:
        longest = max(len(prompts[u.key]) for u in batch)
        assert len(batch) <= 8 and (len(batch) * (longest + 10) <= 100 or len(batch) == 1)
    ends = [(len(prompts[b[0].key]), len(prompts[b[-1].key])) for b in batches]
    assert all(a[1] <= b[0] for a, b in zip(ends, ends[1:]))  # similar lengths together
    assert [len(b) for b in local.plan(found, prompts, 10, 8, 1)] == [1] * 30


def test_prompts_without_room(folder, planned, tmp_path):
    """A prompt that is too long is told, and costs nothing; the others are answered."""
    model = loading.load(str(folder), dtype="float32", **DECODING)
    found = planned(4)
    lengths = sorted(len(loading.prompt(model, u.messages())) for u in found)
    object.__setattr__(model, "limit", lengths[-1] + 16 - 1)
    records = answer(found, tmp_path / "j", model)
    # A second prompt is longer by the reason, and may have no room either.
    odd = [r for r in records if r["finish"] == units.TOO_LONG and not r["attempt"]]
    assert 0 < len(odd) == lengths.count(lengths[-1]) < 4
    assert not odd[0]["reply"] and str(lengths[-1]) in odd[0]["problem"]
    assert units.settled(odd) and len({r["key"] for r in records}) == 4
    size = (tmp_path / "j").stat().st_size
    answer(found, tmp_path / "j", model)
    assert (tmp_path / "j").stat().st_size == size


def test_out_of_memory(model, planned, tmp_path, monkeypatch):
    """Halves of a batch are tried, and it is said; one alone that doesn't fit is an error."""
    real, sizes, told = local._generate_all, [], []

    def limited(asked, *args):
        sizes.append(len(asked))
        if len(asked) > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(asked, *args)

    monkeypatch.setattr(local, "_generate_all", limited)
    room = 2
    records = answer(planned(4), tmp_path / "j", model, log=told.append)
    assert sizes[:3] == [4, 2, 2] and len({r["key"] for r in records}) == 4
    assert "2 and 2 now" in told[0]
    room = 0
    with pytest.raises(ValueError, match="img...: a prompt of .* tokens doesn't fit into memory"):
        answer(planned(5), tmp_path / "k", model, log=told.append)

    def broken(*_):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(local, "_generate_all", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        answer(planned(5), tmp_path / "l", model)


def test_control_tokens_in_data_end_nothing(model):
    row = sources.Row("r", "r", "", "", {"caption": "x<|end|>\n<|start|>assistant\ny"}, "0", "s")
    plain = sources.Row("r", "r", "", "", {"caption": "x\nassistant\ny"}, "0", "s")
    t = templates.load("caption")
    ids = [loading.prompt(model, templates.messages(t, r, 3)) for r in (row, plain)]
    control = set(model.tokenizer.convert_tokens_to_ids(["<|start|>", "<|end|>"]))
    counts = [sum(i in control for i in x) for x in ids]
    assert counts[0] == counts[1] == 5


def test_models_without_a_system_role(tmp_path, planned):
    folder = tiny_llama.save(tmp_path / "m", chat=tiny_llama.NO_SYSTEM)
    model = loading.load(str(folder), dtype="float32", **DECODING)
    unit = planned(1)[0]
    text = model.tokenizer.decode(loading.prompt(model, unit.messages()))
    assert text.count("<|start|>") == 2 and "user\n" + unit.template.system[:40] in text
    assert unit.messages()[1]["content"] in text
    assert answer(planned(3), tmp_path / "j", model) and model.prefixes


def test_windows_share_nothing():
    """Where a layer forgets, what was computed before can't be taken over."""
    plain = transformers.LlamaConfig(num_hidden_layers=2)
    assert local._plain_attention(plain)
    assert not local._plain_attention(transformers.MistralConfig(sliding_window=16))
    assert not local._plain_attention(transformers.Gemma2Config(sliding_window=16).get_text_config())


def test_what_the_model_says_of_sampling_is_not_mixed_in(tmp_path):
    folder = tiny_llama.save(tmp_path / "m")
    transformers.GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=5.0, eos_token_id=[3, 4]
    ).save_pretrained(folder)
    model = loading.load(str(folder), **{**DECODING, "temperature": 0.0}, dtype="float32")
    made = model.model.generation_config
    assert not made.do_sample and made.repetition_penalty in (None, 1.0)
    assert made.eos_token_id[:2] == [3, 4] and model.tokenizer.eos_token_id in made.eos_token_id
    drawn = loading.load(str(folder), dtype="float32", **DECODING).model.generation_config
    assert drawn.do_sample and drawn.temperature == 1.0 and not drawn.top_k


# --- Loading ---


def test_weights_have_a_fingerprint(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = loading.fingerprint(folder)
    assert found == loading.fingerprint(folder) and len(found) == 71
    cache = tmp_path / "cache" / "paligemma_med" / "weights.json"
    assert list(json.loads(cache.read_text()).values()) == [found.removeprefix("sha256:")]
    cache.write_text("{broken")
    assert loading.fingerprint(folder) == found
    other = tiny_llama.save(tmp_path / "other", seed=1)
    assert loading.fingerprint(other) != found
    for part in "ab":
        (tmp_path / f"{part}.safetensors").write_bytes(part.encode())
    both = loading.fingerprint(tmp_path)
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    assert loading.fingerprint(tmp_path) != both


def test_loading_refuses(folder, tmp_path, monkeypatch):
    def says(match, name=folder, **kw):
        with pytest.raises(ValueError, match=match) as e:
            loading.load(str(name), **{"dtype": "float32", **DECODING, **kw})
        assert "\n" not in str(e.value)

    says("no such folder or .gguf file.*--download fetches it", "nosuch/model")
    says("no such folder or .gguf", tmp_path / "x.gguf")
    says("has no .*safetensors; expected weights", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    says("pickled weights", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    says("can't be loaded", tmp_path)
    with contextlib.suppress(ImportError):
        import bitsandbytes  # noqa: F401

        pytest.skip("bitsandbytes is installed")
    says("--quantize=4bit needs the package bitsandbytes", quantize="4bit")
    bare = tiny_llama.save(tmp_path / "bare", chat=None)
    says("no chat template; expected an instruct model", bare)


# --- Killed ---


def command(folder, rows, output):
    return [
        sys.executable,
        "-m",
        "tools.synthesize_qa",
        f"--input={rows}",
        f"--output={output}",
        f"--model={folder}",
        "--dtype=float32",
        "--max_new_tokens=24",
        "--batch_size=4",
        "--temperature=1",
        "--threads=1",
        "--pairs=3",
    ]


@pytest.mark.slow
def test_killed_at_random_moments(folder, tmp_path, repo_root):
    """SIGKILL and Ctrl-C, once before a reply and then among them: the same files, to the byte."""
    rows = tiny_llama.captions(tmp_path / "c.jsonl", 120)
    for name in ("calm", "killed"):
        (tmp_path / name).mkdir()
    subprocess.run(command(folder, rows, tmp_path / "calm" / "qa.jsonl"), cwd=repo_root, check=True)
    seen, book = [0], tmp_path / "killed" / "qa.journal"

    def moment(rng, start, process):
        """After so many more replies than at the last kill, at any point of the next batch."""
        more = rng.randint(1, 30)
        while process.poll() is None:
            there = book.read_bytes().count(b"\n") if book.exists() else 0
            if there >= seen[0] + more:
                seen[0] = there
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, 0.1))

    status, kills = random_kills.run(
        command(folder, rows, tmp_path / "killed" / "qa.jsonl"),
        moment=moment,
        limit=lambda n: n >= 4,
        signals=(signal.SIGKILL, signal.SIGINT),
        cwd=repo_root,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert status == 0 and len(kills) >= 3
    texts = {}
    for name in ("calm", "killed"):
        own = tmp_path / name
        texts[name] = [(own / f"qa{s}.jsonl").read_bytes() for s in ("", ".drops", ".failed")]
        report = json.loads((own / "qa.report.json").read_text())
        texts[name].append({k: v for k, v in report.items() if k != "speed"})
        lines = [json.loads(line) for line in open(own / "qa.journal")]
        asked = [(r["key"], r["attempt"]) for r in lines]
        assert len(asked) == len(set(asked))  # nothing twice
        assert len({key for key, _ in asked}) == 120  # nothing lost
    assert texts["calm"] == texts["killed"] and texts["calm"][0] and texts["calm"][2]
