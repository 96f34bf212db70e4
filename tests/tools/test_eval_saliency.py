"""The measurement of saliency: which questions, what is compared, and going on with it."""

import io
import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from paligemma_med import input_pipeline
from paligemma_med.evaluation import results
from paligemma_med.saliency import occlusion
from tests import tiny
from tools.eval_saliency import measure, own, priors, questions, summary, tables

LABELS = ("Left Kidney", "Right Kidney", "Liver", "Brain Edema", "Brain Enhancing Tumor")


@pytest.mark.parametrize(
    "answer, labels",
    [
        ("Liver", ["liver"]),
        ("liver.", ["liver"]),
        ("Kidneys", ["left kidney", "right kidney"]),
        ("left kidney", ["left kidney"]),
        ("both kidney", ["left kidney", "right kidney"]),
        ("Brain Edema, Brain Tumor", ["brain edema", "brain enhancing tumor"]),
        ("Liver and Kidney", ["left kidney", "liver", "right kidney"]),
        ("Liver, Heart", []),  # the heart has no box
        ("Kidney Cancer", []),
        ("Yes", []),
        ("Live", []),
        ("", []),
        (",", []),
    ],
)
def test_an_answer_names_labels(answer, labels):
    assert questions.named(answer, LABELS) == labels


def test_a_label_by_its_own_name_counts_beside_a_pair():
    assert questions.named("Lung", ["Lung", "Heart"]) == ["lung"]


def test_questions_of_a_data_set(tiny_data):
    source = input_pipeline.open_source(dict(name="phantom", split="validate", data_dir=str(tiny_data)))
    asked = questions.boxed_questions(source)
    assert 0 < len(asked) < len(source)
    records = [source[i] for i in range(len(source))]
    for row in asked:
        record = source[row["index"]]
        assert record["question_id"] == row["question_id"]
        kept = {label.lower() for label in record["boxes"]["label"]} & set(row["labels"])
        assert kept and not row["question"].startswith("Where")
        other = [r for r in records if r["question"] == row["other_question"]]
        assert any(r["image_id"] == row["image_id"] for r in other)
        assert all(r["answer"] != row["answer"] for r in other if r["image_id"] == row["image_id"])
        assert len(row["boxes"]) == sum(x.lower() in kept for x in record["boxes"]["label"])
    general, by_label = priors.box_priors(source, (4, 4))
    assert general.shape == (4, 4) and 0 < general.max() <= 1
    # Lungs lie to both sides, and the two are one map.
    lung = by_label["lung"]
    assert lung[1:3, 0].sum() > 0 and lung[1:3, 3].sum() > 0


def test_body_prior_by_hand():
    image = np.full((64, 64, 3), -1, np.float32)
    image[16:48, 16:40] = 0.5  # of cells of 16: one column whole, half of the next
    expected = np.zeros((4, 4))
    expected[1:3, 1], expected[1:3, 2] = 1, 0.5
    np.testing.assert_allclose(priors.body_prior(image, (4, 4)), expected, atol=0.01)


def test_data_without_boxes_is_refused():
    source = types.SimpleNamespace(features={"question_id": 0, "image_id": 0, "question": 0})
    with pytest.raises(ValueError, match="has no 'answer'"):
        questions.boxed_questions(source)


def test_eos_does_not_count():
    maps = np.arange(3.0)[:, None, None] * np.ones((3, 2, 2))
    assert measure.of_answer(maps, [7, 8, 1], (1,))[0, 0] == 0.5
    assert measure.of_answer(maps, [7, 8, 9], (1,))[0, 0] == 1  # cut off before it
    assert measure.of_answer(maps[2:], [1], (1,))[0, 0] == 2


def test_curves_by_hand():
    """One of four patches decides: p = 0.8 with it, 0.2 without."""
    image = np.ones((32, 32, 3), np.float32)

    def score(images):
        there = images[:, 16:, :16].mean((1, 2, 3)) > 0.5
        return np.log(np.where(there, 0.8, 0.2))[:, None]

    maps = {"first": [[1, 2], [9, 3]], "last": [[4, 2], [-1, 3]], "second": [[1, 2], [5, 7]]}
    maps = {k: np.array(v) for k, v in maps.items()}
    found, whole = measure.curves(score, image, maps, count=4, fill="blank", batch_size=7)
    assert whole == pytest.approx(0.8)
    # Deletion of "first": 0.8, then 0.2 four times; its area is 0.8/8 + 3·0.2/4 + 0.2/8.
    assert found["first"] == pytest.approx(dict(deletion=0.275, insertion=0.725))
    assert found["second"] == pytest.approx(dict(deletion=0.425, insertion=0.575))
    assert found["last"] == pytest.approx(dict(deletion=0.725, insertion=0.275))


def test_holm_by_hand():
    assert summary.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert summary.holm([0.5, 0.9]) == [1.0, 1.0]


def rows_of(values, correct):
    """Rows in which "occlusion" has the given pointing, the others 0.5; two questions an image."""
    names = (*measure.METHODS, *priors.PRIORS)
    figures = (*measure.BOX_FIGURES, *measure.CURVES)
    rows = []
    for i, (value, right) in enumerate(zip(values, correct)):
        row = {name: dict.fromkeys(figures, 0.5) for name in names}
        row["occlusion"] = {**row["occlusion"], "pointing": value}
        maps = {name: [[i, 1], [2, 3]] for name in measure.METHODS}
        checks = dict(randomised=0.5 - i % 2, other_question=None if i % 2 else 0.25)
        rows.append(
            dict(
                figures=row,
                correct=right,
                image_key=f"{i // 2}",
                area=0.25,
                maps=maps,
                question_id=str(i),
                sanity=dict.fromkeys(measure.METHODS, checks),
            )
        )
    return rows


def test_summary_by_hand():
    found = summary.summarise(rows_of([1, 1, 0, 1] * 5, [True, True, False, True] * 5))
    assert (found["all"]["questions"], found["all"]["images"]) == (20, 10)
    assert (found["correct"]["questions"], found["correct"]["images"]) == (15, 10)
    at = found["all"]["table"]["occlusion"]["pointing"]
    to = at["centre"]
    assert at["mean"] == 0.75 and to["difference"] == 0.25 and to == at["random"]
    assert at["low"] < 0.75 < at["high"] and to["low"] < 0.25 < to["high"]
    right = found["correct"]["table"]["occlusion"]["pointing"]
    assert right["mean"] == right["low"] == 1 and right["centre"]["p_holm"] < 0.05
    same = found["all"]["table"]["rollout"]["pointing"]["centre"]
    assert same["difference"] == 0 and same["p_holm"] == 1
    checks = found["sanity"]["rollout"]
    assert checks["randomised"]["mean"] == 0 and checks["randomised"]["questions"] == 20
    assert checks["other_question"]["mean"] == 0.25 and checks["other_question"]["questions"] == 10
    text = tables.markdown(found)
    assert re.search(r"\| occlusion +\| +100\.0 \(100\.0–100\.0\) \|", text)
    assert "**+50.0 (+50.0 to +50.0)**" in text and "boxes cover 25.0 %" in text
    wrong = summary.summarise(rows_of([1, 0], [False, False]))
    assert wrong["correct"] == dict(questions=0, images=0)
    assert "other_image" not in wrong["sanity"]["rollout"]  # there is one image
    assert "## All: 2 questions" in tables.markdown(wrong)


HALF = "<loc0000><loc0000><loc0512><loc1023>"
SAID = {"heart": f"{HALF} Heart ; {HALF} spine", "lung": "Lung", "liver": f"{HALF} liver ; <loc0001>"}


class FakeSubject:
    """Answers "Heart" with two tokens; the image's brightness in one patch decides all."""

    model = params = None
    tok = types.SimpleNamespace(stop_tokens=(1,))
    asked = 0

    def ask(self, image, question, *, max_new_tokens=48):
        type(self).asked += 1
        if question.startswith("detect "):
            return None, SAID.get(question.removeprefix("detect "), "<loc0000>")
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB").resize((64, 64)))
        batch = {"image": pixels[None].astype(np.float32) / 127.5 - 1}
        seq = types.SimpleNamespace(batch=batch, grid=(4, 4), tokens=[5, 1])
        return seq, "Heart"

    def maps(self, seq, score, fill, *, noise=False):
        return {name: np.random.default_rng([i, noise]).uniform(0, 1, (4, 4)) for i, name in enumerate(measure.METHODS)}


@pytest.fixture
def measured(tiny_data, monkeypatch):
    """`measure_all` of a few phantom questions with a made-up model; a function of the folder."""
    FakeSubject.asked = 0

    def score(images):
        return np.minimum(images[:, 16:32, 16:32].mean((1, 2, 3)) - 1, 0)[:, None]

    monkeypatch.setattr(occlusion, "scorer", lambda *a: score)
    data = dict(name="phantom", split="validate", data_dir=str(tiny_data))
    source = input_pipeline.open_source(data)
    asked = questions.boxed_questions(source)[:3]

    def run(folder, **kw):
        part = results.Part(folder, {"of": "test"})
        rows = measure.measure_all(
            FakeSubject(), source, source, asked, part, steps=4, fill="blur", batch_size=8, seed=0, **kw
        )
        part.close()
        return rows

    return run


def test_an_interrupted_measurement_goes_on(measured, tmp_path, monkeypatch):
    whole = measured(tmp_path / "a")
    assert len(whole) == 3 and FakeSubject.asked == 7  # 3 + 3 others, 1 for the grid
    assert json.loads(json.dumps(whole)) == whole
    for row in whole:
        assert set(row["figures"]) == {*measure.METHODS, *priors.PRIORS}
        assert row["correct"] == (row["answer"] == "Heart")
        assert all(0 <= x <= 1 for f in row["figures"].values() for x in f.values())
        # The made-up maps know of weights, and nothing of questions.
        assert all(x["other_question"] == 1 > x["randomised"] for x in row["sanity"].values())
        assert np.shape(row["maps"]["occlusion"]) == (4, 4)
        assert row["figures"]["label_boxes"]["energy"] > row["figures"]["random"]["energy"]
    lines = (tmp_path / "a" / results.PART).read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / results.PART).write_text("".join(lines[:2]) + lines[2][:40])
    FakeSubject.asked = 0
    assert measured(tmp_path / "b") == whole
    assert FakeSubject.asked == 5


def test_boxes_that_a_model_says():
    """Only those of the name asked for; none of an answer with something malformed in it, or of another name."""
    ask = lambda *labels: own.own_boxes(FakeSubject(), None, labels, (20, 40))  # noqa: E731
    assert ask("heart") == [[0, 0, 40, pytest.approx(10, abs=0.01)]]
    assert ask("lung") == ask("liver") == ask("heart", "lung") == []
    assert len(ask("heart", "heart")) == 2


def test_maps_against_the_models_own_boxes(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "own_boxes", lambda subject, image, labels, size: [[0, 0, size[1], size[0] / 2]])
    rows = measured(tmp_path, own=True)
    for row in rows:
        found = row["own_figures"]
        assert set(found) == {*row["figures"], "true_boxes"}
        assert found["centre"]["energy"] == pytest.approx(0.5)
        maps = np.maximum(row["maps"]["occlusion"], 0)
        assert found["occlusion"]["energy"] == pytest.approx(maps[:2].sum() / maps.sum(), abs=1e-4)
    text = tables.markdown(summary.summarise(rows))
    assert "## Against the model's own boxes, all: 3 questions" in text and "boxes cover 50.0 %" in text
    table = text[text.index("own boxes, all") :]
    assert re.search(r"\| true_boxes +\|", table) and "deletion" not in table.split("## Sanity")[0]
    for row in rows:
        row["own_boxes"], _ = [], row.pop("own_figures")
    assert "The model gave no boxes of its own" in tables.markdown(summary.summarise(rows))


def test_a_finished_measurement_is_known(tmp_path):
    """Its figures are tables, which no other evaluation's are."""
    results.write(tmp_path, [dict(a=1)], {"saliency": {"all": {}}}, dict(of="test"))
    assert results.finished(tmp_path, dict(of="test")) == [dict(a=1)]
    assert results.finished(tmp_path, dict(of="another")) is None


@pytest.mark.parametrize("pp, message", [("", "no predict_pp"), ("decode|inception_crop(32)", "crops images")])
def test_configs_that_cannot_be_measured(pp, message):
    with pytest.raises(ValueError, match=message):
        measure.Subject(tiny.config(predict_pp=pp), "nowhere")


@pytest.mark.slow
def test_program(tiny_data, tmp_path, repo_root):
    """The whole of it on random weights; a second start asks nothing."""
    tiny.write_workdir(tmp_path / "w", tiny.config(tiny_data))
    out = tmp_path / "out"

    def program(*args):
        command = [sys.executable, "-m", "tools.eval_saliency", f"--workdir={tmp_path / 'w'}"]
        command += ["--data=phantom", f"--data_dir={tiny_data}", "--limit=2", "--steps=2", *args]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=500)

    first, second = program(f"--out={out}"), program(f"--out={out}")
    assert first.returncode == 0, first.stderr
    assert "## All: 2 questions" in first.stdout and first.stdout == second.stdout
    assert "is there for these weights" in second.stderr
    metrics = json.loads((out / results.METRICS).read_text())
    about = metrics["about"]
    rows = results.read_rows(out / results.PREDICTIONS)
    assert metrics["saliency"] == summary.summarise(rows)
    assert about["data"]["split"] == "validate" and about["section"]["steps"] == 2
    assert (out / "saliency.md").read_text() == first.stdout.removesuffix("\n")
    assert "Give --out" in program().stderr
