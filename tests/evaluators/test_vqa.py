"""The VQA evaluator: what it asks, its controls, and the files it writes.

Most tests answer in the model's place, by a function of prompt and image; the last ones have a
model.
"""

import functools
import json

import jax
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.evaluation import results
from paligemma_med.evaluators import vqa
from paligemma_med.metrics import scoring, stats, tables
from paligemma_med.models import paligemma
from paligemma_med.parallel import sharding
from tests.evaluators.answering import (
    IMAGES,
    QUESTIONS,
    TOKENIZER,
    TRAIN,
    answer_with,
    look,
    make_evaluator,
    make_inputs,
    question,
)


def test_figures_controls_and_files(monkeypatch, tmp_path):
    answer_with(monkeypatch, look)
    metrics = make_evaluator(outdir=tmp_path / "eval" / "slake").run({})
    assert metrics["n"] == 5 and metrics["n/answer_type/CLOSED"] == 2
    assert metrics["n/content_type/Modality"] == 3
    assert metrics["model/overall/acc"] == 1.0
    assert metrics["model/overall/acc_strict"] == 0.8  # "MR." is right after normalising only
    assert metrics["majority/overall/acc"] == 0.2
    assert metrics["majority/answer_type/OPEN/acc"] == pytest.approx(1 / 3)
    assert metrics["majority/answer_type/CLOSED/acc"] == 0.0
    # "yes" needs no image, the modality does.
    assert metrics["shuffled_images/answer_type/CLOSED/acc"] == 1.0
    assert metrics["shuffled_images/content_type/Modality/acc"] == 0.0
    assert metrics["shuffled_images/overall/acc"] == 0.4
    low, high = stats.wilson(2, 5)
    assert metrics["shuffled_images/overall/acc_low"] == low
    assert metrics["shuffled_images/overall/acc_high"] == high
    assert metrics["unfinished"] == 0

    folder = tmp_path / "eval" / "slake"
    assert sorted(p.name for p in folder.iterdir()) == ["metrics.json", "predictions.jsonl"]
    written, about = results.read_metrics(folder / "metrics.json")
    assert written == metrics
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").open()]
    assert [row["question_id"] for row in rows] == ["q0", "q1", "q2", "q3", "q4"]
    first = rows[1]
    assert first | {"shuffled_images_image_id": 0, "shuffled_images_predictions": 0} == dict(
        question_id="q1",
        image_id="mr",
        image_key=first["image_key"],
        question="Which modality?",
        prompt="answer en Which modality?\n",
        answer="MR",
        answer_type="OPEN",
        content_type="Modality",
        predictions=["MR."],
        logprobs=first["logprobs"],
        correct=True,
        correct_strict=False,
        correct_set=True,
        unfinished=0,
        majority_prediction="MR",
        majority_correct=True,
        majority_correct_strict=True,
        majority_correct_set=True,
        majority_type_prediction="MR",
        majority_type_correct=True,
        majority_type_correct_strict=True,
        majority_type_correct_set=True,
        echo_prediction="Which modality?",
        echo_correct=False,
        echo_correct_strict=False,
        echo_correct_set=False,
        shuffled_images_image_id=0,
        shuffled_images_predictions=0,
        shuffled_images_logprobs=first["shuffled_images_logprobs"],
        shuffled_images_correct=False,
        shuffled_images_correct_strict=False,
        shuffled_images_correct_set=False,
    )
    assert first["logprobs"] == [-0.5 * (len(TOKENIZER.to_int("MR.")) + 1)]
    # Questions on one image share its key; the figures can be had from the file again.
    assert rows[2]["image_key"] == first["image_key"] != rows[0]["image_key"]
    assert scoring.summarise(rows) == metrics
    assert about["split_hash"] == results.split_hash(rows)
    assert about["prompt_hash"] == results.prompt_hash(rows) and about["protocol"] == "vqa"


def test_no_question_keeps_its_image_and_prompts_stay(monkeypatch, tmp_path):
    calls = answer_with(monkeypatch, look)
    seen = set()
    for seed in range(6):
        calls.clear()
        make_evaluator(outdir=tmp_path, shuffle_seed=seed).run({})
        rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
        swap = {row["image_id"]: row["shuffled_images_image_id"] for row in rows}
        for row in rows:  # one permutation of images, not one of questions
            assert swap[row["image_id"]] == row["shuffled_images_image_id"] != row["image_id"]
        assert sorted(swap) == sorted(swap.values())
        seen.add(tuple(sorted(swap.items())))
        first, second = calls[:3], calls[3:]
        for a, b, (_, batch_rows) in zip(first, second, make_inputs(), strict=True):
            for key in ("text", "mask_ar", "mask_input", "_mask", "row_id"):
                np.testing.assert_array_equal(a[key], b[key])
            assert a["kw"] == b["kw"] and a["image"].shape == b["image"].shape
            for i, row in enumerate(batch_rows):
                own, other = IMAGES[row["image_id"]], IMAGES[swap[row["image_id"]]]
                np.testing.assert_array_equal(a["image"][i], np.float32(own))
                np.testing.assert_array_equal(b["image"][i], np.float32(other))
    assert len(seen) == 2  # both rings of three images come up


def test_one_picture_under_two_ids_is_not_given_back(monkeypatch, tmp_path):
    monkeypatch.setitem(IMAGES, "copy", IMAGES["ct"])
    rows = [*QUESTIONS[:2], question(5, "copy", "Which modality?", "CT", "OPEN")]
    calls = answer_with(monkeypatch, look)
    make_evaluator(inputs=make_inputs(rows, 3), outdir=tmp_path).run({})
    assert calls[1]["image"][:, 0, 0, 0].tolist() == pytest.approx([0.2, 0.1, 0.2])


def test_a_model_that_does_not_look_scores_the_same_shuffled(monkeypatch):
    answer_with(monkeypatch, lambda prompt, pixel, sample: "MR")
    metrics = make_evaluator().run({})
    assert metrics["model/overall/acc"] == metrics["shuffled_images/overall/acc"] == 0.2


def test_the_prompt_is_not_scored(monkeypatch, tmp_path):
    # A model that echoes nothing but names the answer gets all points; the prompt never shows up.
    rows = [question(0, "ct", "Is it CT or MR?", "CT", "OPEN")]
    answer_with(monkeypatch, lambda *a: "CT")
    make_evaluator(inputs=make_inputs(rows), controls=(), outdir=tmp_path).run({})
    row = json.loads((tmp_path / "predictions.jsonl").read_text())
    assert row["predictions"] == ["CT"] and row["prompt"] == "answer en Is it CT or MR?\n"
    # One that does echo the question is wrong.
    answer_with(monkeypatch, lambda prompt, *a: prompt + "CT")
    kw = dict(pred_kw=dict(max_new_tokens=64), controls=())
    assert make_evaluator(inputs=make_inputs(rows), **kw).run({})["model/overall/acc"] == 0
    # And a generate that gives the prompt back isn't accepted.
    monkeypatch.setattr(
        decode,
        "generate",
        lambda model, params, batch, **kw: (
            np.zeros((2, 1, 48 + 32), np.int32),
            np.zeros((2, 1, 48 + 32), np.float32),
        ),
    )
    with pytest.raises(AssertionError):
        make_evaluator(inputs=make_inputs(rows), controls=()).run({})


def test_samples(monkeypatch, tmp_path):
    calls = answer_with(monkeypatch, lambda p, x, sample: ["yes", "no", "a long one"][sample])
    metrics = make_evaluator(
        controls=(),
        outdir=tmp_path,
        pred_kw=dict(num_samples=3, temperature=0.7, seed=3, max_new_tokens=4),
    ).run({})
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert row["predictions"][:2] == ["yes", "no"] and len(row["logprobs"]) == 3
    assert metrics["model/answer_type/CLOSED/acc"] == 1.0  # the first is scored
    assert metrics["unfinished"] == 5  # "a long one" has no room for its EOS
    assert calls[0]["kw"] == dict(temperature=0.7, seed=3)


def test_a_thought_before_the_answer_is_kept_and_not_scored(monkeypatch, tmp_path):
    answer_with(monkeypatch, lambda p, x, sample: f"<unused94>thought, no?<unused95>{look(p, x)}")
    metrics = make_evaluator(controls=(), outdir=tmp_path, pred_kw=dict(max_new_tokens=96)).run({})
    row = json.loads((tmp_path / "predictions.jsonl").read_text().splitlines()[0])
    assert row["predictions"] == ["<unused94>thought, no?<unused95>ct"] and row["correct"]
    assert metrics["model/overall/acc"] == 1.0


def test_random_numbers_belong_to_questions(monkeypatch):
    calls = answer_with(monkeypatch, look)
    make_evaluator(controls=()).run({})
    ids = dict(zip("01234", np.concatenate([c["row_id"] for c in calls])))
    calls.clear()
    make_evaluator(inputs=make_inputs(QUESTIONS[::-1], 5), controls=()).run({})
    assert calls[0]["row_id"].tolist() == [ids[i] for i in "43210"]
    assert len(set(ids.values())) == 5


def test_controls_are_optional(monkeypatch, tmp_path):
    calls = answer_with(monkeypatch, look)
    metrics = make_evaluator(controls=(), train_data=None, outdir=tmp_path).run({})
    assert len(calls) == 3
    text = json.dumps(metrics) + (tmp_path / "predictions.jsonl").read_text()
    assert "majority" not in text and "shuffled" not in text
    table = tables.format_table(metrics).splitlines()
    assert table[0].replace(" ", "") == "|exactmatch,%|model|n|"


def test_table(monkeypatch):
    answer_with(monkeypatch, look)
    names = ("majority", "shuffled_images")
    *table, gap, note = tables.format_table(make_evaluator(controls=names).run({})).splitlines()
    assert gap == "" and note == "In brackets 95 %, by 3 images."
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in table]
    assert len({len(line) for line in table}) == 1
    assert cells[0] == ["exact match, %", "model", "majority answer", "images shuffled", "n"]
    assert [c.partition(" ")[0] for c in cells[2]] == ["overall", "100.0", "20.0", "40.0", "5"]
    low, high = stats.wilson_clustered([0, 1, 0, 0, 0], [0, 1, 1, 2, 2])
    assert cells[2][2] == f"20.0 ({100 * low:.1f}–{100 * high:.1f})"
    assert [row[0] for row in cells[3:]] == [
        "CLOSED",
        "OPEN",
        "Modality",
        "Organ",
        "overall, strict",
        "overall, any order",
    ]
    assert cells[-2] == ["overall, strict", "80.0", "20.0", "40.0", "5"]


def test_files_are_whole_or_not_there(monkeypatch, tmp_path):
    answer_with(monkeypatch, look)
    make_evaluator(outdir=tmp_path).run({})
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def fail(*a):
        raise OSError("no space")

    monkeypatch.setattr(results.os, "replace", fail)
    answer_with(monkeypatch, lambda *a: "other")
    with pytest.raises(OSError):
        make_evaluator(outdir=tmp_path).run({})
    assert {n: (tmp_path / n).read_bytes() for n in before} == before


def test_progress_in_a_log_is_lines(monkeypatch, capfd):
    answer_with(monkeypatch, look)
    make_evaluator().run({})
    err = capfd.readouterr().err
    assert "\r" not in err and "vqa, images shuffled: 5 of 5" in err


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(suffix="CT"), "'q1' has a key 'suffix'"),
        (dict(answer=" . "), "'q1' has an empty answer"),
        (dict(answer_type=None), "'q1' has no 'answer_type'"),
        (dict(question_id=None), "has no 'question_id'"),
        (dict(image_id=None), "'q1' has no 'image_id'"),
    ],
)
def test_bad_rows(monkeypatch, change, message):
    answer_with(monkeypatch, look)
    inputs = list(make_inputs())
    row = {k: v for k, v in (inputs[0][1][1] | change).items() if v is not None}
    inputs[0] = (inputs[0][0], [inputs[0][1][0], row])
    with pytest.raises(ValueError, match=message):
        make_evaluator(inputs=inputs).run({})


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(controls=("blank",)), "controls has 'blank'"),
        (dict(protocol="vqb"), "protocol has 'vqb'; expected some of"),
        (dict(pred_kw=dict(num_samples=5)), "num_samples=5 at temperature 0.*set pred_kw.temp"),
        (dict(options="words"), "options has 'words'; expected some of"),
        (dict(options="letter"), "options='letter' scores choices, but choices names no keys"),
        (dict(train_data=None), "needs train_data"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        make_evaluator(**kw)


def test_nothing_to_evaluate_or_to_shuffle(monkeypatch, capsys):
    answer_with(monkeypatch, look)
    with pytest.raises(ValueError, match="a row of train_data has no 'question_id'"):
        make_evaluator(train_data=[dict(question="?")]).run({})
    with pytest.raises(ValueError, match="no questions"):
        make_evaluator(inputs=[]).run({})
    found = make_evaluator(inputs=make_inputs(QUESTIONS[1:3])).run({})  # on one image
    assert "no control with shuffled images" in capsys.readouterr().err
    assert "model/overall/acc" in found and not [k for k in found if k.startswith("shuffled_images")]
    batch, rows = next(make_inputs())
    with pytest.raises(ValueError, match="valid ones first"):
        make_evaluator(inputs=[(batch | {"_mask": np.array([False, True])}, rows[:1])]).run({})


@functools.cache
def make_model(vocab_size=1024):
    img = dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(4, 4))
    llm = dict(
        width=16,
        depth=1,
        mlp_dim=24,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=vocab_size,
    )
    model = paligemma.Model(img=img, llm=llm)
    rng = np.random.default_rng(0)
    shapes = paligemma.abstract_params(model, image_size=8)
    return model, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def test_with_a_model_and_a_mesh(tmp_path):
    model, params = make_model()
    kw = dict(train_data=TRAIN, pred_kw=dict(max_new_tokens=3, num_samples=2, temperature=1.0))
    inputs = list(make_inputs(batch_size=8, size=8))
    metrics = vqa.Evaluator(model, "tiny", inputs=inputs, outdir=tmp_path / "a", **kw).run(params)
    placed = [(jax.device_put(b, sharding.batch_sharding(sharding.make_mesh())), r) for b, r in inputs]
    params = jax.device_put(params, sharding.replicated(sharding.make_mesh()))
    on_mesh = vqa.Evaluator(model, "tiny", inputs=placed, outdir=tmp_path / "b", **kw).run(params)
    assert metrics == on_mesh
    for a, b in zip(*((tmp_path / x / "predictions.jsonl").open() for x in "ab"), strict=True):
        a, b = json.loads(a), json.loads(b)
        assert a["predictions"] == b["predictions"] and len(a["predictions"]) == 2
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=1e-4)
        assert a["shuffled_images_predictions"] == b["shuffled_images_predictions"]
        assert a["shuffled_images_logprobs"] != a["logprobs"]  # the image is read


CHOICES = dict(choice_a="CT", choice_b="MR scan", choice_c="X-Ray film", choice_d="none")


def choice_questions(**change):
    return [
        question(i, image, "Which modality? A: CT B: MR scan …", letter, "CLOSED", answer_letter=letter, **CHOICES)
        | change
        for i, (image, letter) in enumerate([("ct", "A"), ("mr", "B"), ("xr", "C")])
    ]


def test_multiple_choice_with_a_model(tmp_path):
    model, params = make_model()
    kw = dict(
        protocol="multiple_choice",
        choices=tuple(CHOICES),
        train_data=TRAIN,
        outdir=tmp_path,
        controls=("majority", "blank_image"),
        pred_kw=dict(max_new_tokens=3, num_samples=2, temperature=1.0),
    )

    inputs = list(make_inputs(choice_questions(), size=8))  # the last batch is not full

    def run(options, **more):
        evaluator = vqa.Evaluator(model, "tiny", inputs=inputs, options=options, **kw, **more)
        return evaluator.run(params), results.read_rows(tmp_path / "predictions.jsonl")

    def score(texts):
        """(log-likelihoods, tokens) of the same options to each question."""
        for batch, valid in inputs:
            each = [texts] * len(valid)
            yield from zip(*decode.score_choices(model, params, batch, each, TOKENIZER), strict=True)

    metrics, rows = run("text")
    texts = list(CHOICES.values())
    sums, lengths = zip(*score(texts))
    for row, a, b in zip(rows, sums, lengths, strict=True):
        assert row["choices"] == texts and not set(CHOICES) & set(row)
        assert row["option_logprobs"] == pytest.approx(a, abs=1e-5) and row["option_tokens"] == b
        assert "blank_image_option_tokens" not in row
        assert row["blank_image_option_logprobs"] != row["option_logprobs"]
    right = [np.argmax(a) == "ABC".index(row["answer_letter"]) for a, row in zip(sums, rows)]
    assert metrics["model/overall/acc_likelihood"] == np.mean(right)
    assert "majority/overall/acc_likelihood" not in metrics
    assert "majority/overall/acc_letter" in metrics
    assert scoring.summarise(rows, "multiple_choice") == metrics

    _, letters = run("letter")
    for row, (a, _) in zip(letters, score(list("ABCD")), strict=True):
        assert row["option_logprobs"] == pytest.approx(a, abs=1e-4)
    _, letters = run("letter", answer_prefix=" ")
    for row, (a, _) in zip(letters, score([" A", " B", " C", " D"]), strict=True):
        assert row["option_logprobs"] == pytest.approx(a, abs=1e-4)
    assert not [k for row in run("")[1] for k in row if "option" in k]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(answer_letter="E"), "'q0' has the answer_letter 'E'; expected one of ABCD"),
        (dict(answer_letter=""), "the answer_letter ''; expected"),
        (dict(answer_letter=None), "'q0' has no 'answer_letter'"),
        (dict(choice_c=None), "'q0' has no 'choice_c'"),
    ],
)
def test_choices_that_are_none(monkeypatch, change, message):
    answer_with(monkeypatch, look)
    rows = [{k: v for k, v in row.items() if v is not None} for row in choice_questions(**change)]
    with pytest.raises(ValueError, match=message):
        make_evaluator(inputs=list(make_inputs(rows)), choices=tuple(CHOICES)).run({})


def test_other_images(monkeypatch, tmp_path):
    """Grey is grey, noise is an image's own; the prompts stay."""
    names = ("blank_image", "noise_image")
    calls = answer_with(monkeypatch, look)
    metrics = make_evaluator(inputs=make_inputs(batch_size=5), controls=names, train_data=None, outdir=tmp_path).run({})
    own, blank, noise = (c["image"] for c in calls)
    assert not blank.any() and blank.shape == own.shape and blank.dtype == np.float32
    same = np.array([[np.array_equal(a, b) for a in noise] for b in noise])
    ids = [row["image_id"] for row in QUESTIONS]
    np.testing.assert_array_equal(same, [[a == b for a in ids] for b in ids])
    for key in ("text", "mask_ar", "mask_input", "_mask", "row_id"):
        np.testing.assert_array_equal(calls[0][key], calls[1][key])
        np.testing.assert_array_equal(calls[0][key], calls[2][key])
    assert metrics["blank_image/answer_type/CLOSED/acc"] == 1.0
    assert metrics["blank_image/answer_type/OPEN/acc"] == 0.0
    rows = results.read_rows(tmp_path / "predictions.jsonl")
    assert rows[0]["blank_image_predictions"] == ["film"]
    # In other batches it's the same noise; with another seed another.
    calls.clear()
    make_evaluator(inputs=make_inputs(QUESTIONS[3:]), controls=names[1:]).run({})
    np.testing.assert_array_equal(calls[1]["image"], noise[3:])
    calls.clear()
    make_evaluator(controls=names[1:], noise_seed=1).run({})
    assert not np.array_equal(calls[1]["image"], noise[:2])


def test_what_else_is_kept_is_written(monkeypatch, tmp_path):
    """Other keys of a row, numbers of the batch, and what a prompt lost."""
    answer_with(monkeypatch, look)
    rows = [row | dict(modality="CT", phrases=["a", "b"]) for row in QUESTIONS]

    class Inputs(list):
        @property
        def cut(self):  # of the latest batch
            return [0, 3]

    inputs = Inputs(
        (batch | {"slice": np.arange(2) + i, "boxes": np.zeros((2, 4))}, given)
        for i, (batch, given) in enumerate(make_inputs(rows))
    )
    metrics = make_evaluator(inputs=inputs, outdir=tmp_path).run({})
    rows = results.read_rows(tmp_path / "predictions.jsonl")
    assert [r["slice"] for r in rows] == [0, 1, 1, 2, 2] and "boxes" not in rows[0]
    assert [r["tokens_cut"] for r in rows] == [0, 3, 0, 3, 0] and metrics["truncated"] == 2
    assert rows[4]["modality"] == "CT" and rows[4]["phrases"] == ["a", "b"]
    assert metrics["n/modality/CT"] == 5


def test_tokenizer_of_another_model():
    model, params = make_model(vocab_size=1025)
    evaluator = vqa.Evaluator(model, "tiny", inputs=make_inputs(size=8), controls=())
    with pytest.raises(ValueError, match="can say 1025 tokens, but the tokenizer knows 1024"):
        evaluator.run(params)
