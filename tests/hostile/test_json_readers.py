"""Every reader of JSON is fed wrong versions of a right file: it reads them, or raises the house's own error.

More cases: HOSTILE_CASES=3000 pytest tests/hostile/test_json_readers.py
"""

import json
import os

import numpy as np
import PIL.Image
import pytest

from data_prep import qa_files
from data_prep.curate import rows as curate_rows
from data_prep.datasets.medpix2 import cases as medpix
from data_prep.datasets.medpix2 import fake as medpix_fake
from data_prep.datasets.slake import layout as slake
from data_prep.files import DataError
from paligemma_med import input_pipeline
from paligemma_med.checkpoints import CheckpointError, bv, keep, peft, step_lines, workdir
from paligemma_med.checkpoints import hf as hf_forms
from paligemma_med.checkpoints.hf import tensors
from paligemma_med.config import files as config_files
from paligemma_med.config import values as config_values
from paligemma_med.evaluation import predictions, results
from paligemma_med.input_pipeline import InputError
from paligemma_med.judge import criteria, judge, replies
from tests import tiny
from tests.checkpoints import adapters
from tests.hostile import mutations
from tests.models import hf as models
from tools import fit_scaling_law
from tools.report import __main__ as report
from tools.report import evaluations, foreign, foreign_files
from tools.review_qa import rows as review_rows
from tools.synthesize_qa import sources as synthesis_sources
from tools.synthesize_qa import templates as synthesis_templates

CASES = int(os.environ.get("HOSTILE_CASES", "50"))


def check(read, path, good, errors, lines=False):
    """All cases, after the right file; most must be refused, or the file isn't looked at."""
    text = "\n".join(map(json.dumps, good)) if lines else json.dumps(good)
    path.write_text(text + "\n")
    read()
    assert mutations.check(read, path, good, errors, CASES, lines=lines) or errors == ()


def picture(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)


# --- Weights and runs ---


def test_adapter_config(tmp_path):
    peft.save_adapter(tmp_path / "a", adapters.random_adapter("mqa"))
    path = tmp_path / "a" / peft.CONFIG
    check(lambda: peft.load_adapter(tmp_path / "a"), path, json.loads(path.read_text()), CheckpointError)


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    case, _, _, params, _ = models.reference("gemma2")
    folder = tmp_path_factory.mktemp("hf") / "hf"
    hf_forms.save_hf(folder, params, img=case["img"], llm=case["llm"])
    return folder


def test_hugging_face_config(hf_folder):
    path = hf_folder / "config.json"
    check(lambda: hf_forms.open_hf(hf_folder), path, json.loads(path.read_text()), CheckpointError)


def test_hugging_face_index(hf_folder, tmp_path):
    [weights] = [p for p in hf_folder.iterdir() if p.suffix == ".safetensors"]
    os.symlink(weights, tmp_path / "a.safetensors")
    names = [t.name for t in tensors.open_all(hf_folder)]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    errors = (CheckpointError, FileNotFoundError)
    check(lambda: tensors.open_all(tmp_path), tmp_path / tensors.INDEX, index, errors)


def test_config_of_a_big_vision_run(tmp_path):
    (tmp_path / "checkpoint.bv-000000001-tmp").mkdir()
    (tmp_path / "checkpoint.bv-LAST").write_text("000000001-tmp")
    config = {"model_name": "paligemma_med", "model": {"img": {"a": 1}, "llm": {}, "lora": [["x", [["rank", 2]]]]}}
    check(lambda: bv.read_config(tmp_path), tmp_path / "config.json", config, CheckpointError)


def test_config_of_a_run(tmp_path):
    def read():
        config_values.checked_for_training(config_files.from_json(workdir.read_config(tmp_path)))

    good = json.loads(config_files.to_json(tiny.config(lora=[("llm/.*", dict(rank=2))], mesh=[("data", -1)])))
    check(read, tmp_path / "config.json", good, ValueError)


def test_base_json(tmp_path):
    base = {"model_init": "/w.npz", "frozen_dtype": "float32", "fingerprints": {"img/head/kernel": "0a", "b": "1b"}}
    check(lambda: workdir.read_base(tmp_path), tmp_path / "base.json", base, CheckpointError)


def test_lines_of_a_run(tmp_path):
    """Damaged ones are left out, and told."""
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": i, "training_loss": 0.5, "val/model/overall/acc": 0.1 * i} for i in range(1, 5)]
    best = keep.best_of(tmp_path, {"keep_best": {"metric": "val/model/overall/acc"}})

    def read():
        assert all(type(row["step"]) is int for _, row in step_lines.read(path))
        best([1, 2, 3, 4])

    check(read, path, rows, (), lines=True)


# --- Evaluations ---

ROWS = [
    {
        "question_id": f"q{i}",
        "image_id": "i",
        "question": "Is it?",
        "answer": "yes",
        "answer_type": "CLOSED",
        "prompt": "answer en Is it?\n",
        "predictions": ["yes"],
        "correct": True,
        "logprobs": [-0.5],
    }
    for i in range(3)
]
METRICS = {"model/overall/acc": 1.0, "model/overall/n": 3, "about": {"protocol": "vqa", "section": {"data": {}}}}


def evaluation(folder):
    folder.mkdir(parents=True, exist_ok=True)
    results.write(folder, ROWS, METRICS, METRICS["about"])
    return folder


def load(folder):
    return lambda: evaluations.load_all([folder])


def test_predictions_in_a_report(tmp_path):
    folder = evaluation(tmp_path / "eval" / "val")
    check(load(tmp_path), folder / results.PREDICTIONS, ROWS, ValueError, lines=True)


@pytest.mark.parametrize("name", [results.METRICS, judge.SUMMARY])
def test_figures_in_a_report(tmp_path, name):
    """What can't be read is a problem that the report tells; nothing is raised."""
    folder = evaluation(tmp_path / "eval" / "val")
    good = METRICS if name == results.METRICS else {"m": {"protocol": "vqa", "predictions_sha256": "", "metrics": {}}}
    check(load(tmp_path), folder / name, good, ())


def test_config_in_a_report(tmp_path):
    evaluation(tmp_path / "eval" / "val")
    good = json.loads(config_files.to_json(tiny.config()))
    check(load(tmp_path), tmp_path / "config.json", good, ValueError)


def test_part_of_an_evaluation(tmp_path):
    """Whatever can't be read is computed again."""
    header = {"a": 1, "b": [2]}
    lines = [header, ["model", 0, ROWS[:1]], ["model", 1, ROWS[1:]]]
    check(lambda: results.Part(tmp_path, header).close(), tmp_path / results.PART, lines, (), lines=True)


def test_finished_evaluation(tmp_path):
    evaluation(tmp_path)
    check(lambda: results.finished(tmp_path, {"protocol": "vqa"}), tmp_path / results.METRICS, METRICS, ())


def test_cache_of_replies(tmp_path):
    record = dict(key="k", score=1, reply="1", usage=[3, 1], finish="stop", model="m")
    path = tmp_path / "cache.jsonl"

    def read():
        with replies.Cache(path, "a reply", write=False) as cache:
            replies.totals(cache, ["k"])

    check(read, path, [record, {**record, "score": None}], ValueError, lines=True)


def test_predictions_to_judge(tmp_path):
    path, protocol = tmp_path / results.PREDICTIONS, next(iter(criteria.PROTOCOLS))
    check(
        lambda: judge.plan(predictions.read(path, judge.NEEDED), protocol, model="m"),
        path,
        ROWS,
        ValueError,
        lines=True,
    )


def test_summary_of_a_judge(tmp_path):
    check(lambda: judge.read_summary(tmp_path), tmp_path / judge.SUMMARY, {"m": {"metrics": {"a": 1.0}}}, ValueError)


# --- Tools ---


@pytest.mark.parametrize("name, lines", [("a.json", False), ("a.jsonl", True)])
def test_answers_of_others(tmp_path, name, lines):
    rows = [{"question": "Is it?", "answer": "yes", "prediction": "no", "image": "a.png"} for _ in range(3)]
    check(lambda: foreign_files.read(tmp_path / name), tmp_path / name, rows, ValueError, lines=lines)


def test_samples_of_lmms_eval(tmp_path):
    record = {"id": "q7", "answer_type": "closed", "modality": "ct"}
    doc = {"question": "Is it?", "choices": ["a", "b"], "answer_letter": "B", "question_id": "q7"}
    line = {"input": "Is it?", "target": "yes", "filtered_resps": [["no"]], "slake": record, "doc": doc}
    rows = [{"doc_id": i, **line} for i in range(3)]
    check(lambda: foreign.load(tmp_path / "a.jsonl", []), tmp_path / "a.jsonl", rows, ValueError, lines=True)


PAIRS = [{k: ROWS[i][k] for k in ("question_id", "image_id", "question", "answer")} for i in range(3)]


def test_pairs_to_review(tmp_path):
    path = tmp_path / "a.jsonl"
    check(lambda: [review_rows.digest(r) for _, _, r in review_rows.read(path)], path, PAIRS, ValueError, lines=True)


def test_metrics_for_a_scaling_law(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"x": 10.0 * i, "d": 5.0, "loss": 1.0 / i} for i in range(1, 5)]
    check(
        lambda: fit_scaling_law.columns(fit_scaling_law.read_rows(path), path, "x", "d", "loss"),
        path,
        rows,
        ValueError,
        lines=True,
    )


def test_captions_to_synthesise_from(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"image_id": f"i{i}", "caption": "A mass in the left lung."} for i in range(3)]

    def read():
        synthesis_sources.open_rows([str(path)], synthesis_sources.new_books())

    check(read, path, rows, DataError, lines=True)


def test_examples_of_a_synthesis(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"caption": "A mass.", "pairs": [{"question": "What?", "answer": "A mass."}]} for _ in range(2)]
    check(lambda: synthesis_templates.read_examples(path), path, rows, DataError, lines=True)


# --- Data ---


def slake_rows(image, first=0):
    row = dict.fromkeys(slake.TEXT_KEYS, "x") | dict(q_lang="en", answer_type="OPEN", img_name=f"{image}/source.jpg")
    return [{**row, "img_id": 1, "triple": ["vhead", "_", "_"], "qid": first + i} for i in range(2)]


@pytest.mark.parametrize("name", ["train.json", "detection"])
def test_slake(tmp_path, name):
    for i, split in enumerate(("train", "validate", "test")):
        (tmp_path / f"{split}.json").write_text(json.dumps(slake_rows(f"im{i}", 2 * i)))
        picture(tmp_path / "imgs" / f"im{i}" / "source.jpg", 40 * i)
        (tmp_path / "imgs" / f"im{i}" / "detection.json").write_text("[]")
    path, good = tmp_path / name, slake_rows("im0")
    if name == "detection":
        path, good = tmp_path / "imgs" / "im0" / "detection.json", [{"Liver": [0.0, 1, 2, 3]}, {"Lung": [1, 1, 1, 1]}]

    def read():
        folder = slake.read_folder(tmp_path, "en")
        slake.describe(folder.report)
        list(slake.examples(folder, "train"))

    check(read, path, good, DataError)


@pytest.mark.parametrize("key", ["Descriptions.json", "Case_topic.json", "uid_list.json"])
def test_medpix(tmp_path, key):
    medpix_fake.write(tmp_path)
    [path] = tmp_path.rglob(key) if key != "uid_list.json" else [next(tmp_path.rglob("*uid*"), tmp_path / "x")]
    if not path.is_file():
        pytest.skip(f"the made-up release has no {key}")
    check(lambda: medpix.read_folder(tmp_path), path, json.loads(path.read_text()), DataError)


@pytest.mark.parametrize("name, lines", [("a.json", False), ("a.jsonl", True)])
def test_pairs_of_medm(tmp_path, name, lines):
    path = tmp_path / name
    check(lambda: list(qa_files.read_qa(path)), path, PAIRS, DataError, lines=lines)


@pytest.mark.parametrize("name, lines", [("a.json", False), ("a.jsonl", True)])
def test_rows_to_curate(tmp_path, name, lines):
    path = tmp_path / name
    check(lambda: list(curate_rows.open_source(str(path)).read()), path, PAIRS, DataError, lines=lines)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    tiny.build_data(folder)
    return folder


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_what_a_built_set_says_of_itself(built, name):
    [path] = built.rglob(name)
    before = path.read_bytes()

    def read():
        source = input_pipeline.open_source(dict(name="phantom", split="train", data_dir=str(built)))
        source[0]
        list(source.columns(["question_id"]))

    try:
        check(read, path, json.loads(before), InputError)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", ["config.json", results.METRICS])
def test_a_whole_report(tmp_path, name):
    """Not only what is read, but what is made of it."""
    folder = evaluation(tmp_path / "eval" / "val")
    data = dict(name="phantom", split="validate")
    about = dict(METRICS["about"], data=data, section=dict(data=data, pred_kw=dict(num_samples=1)), checkpoint="/x@3")
    results.write(folder, ROWS, METRICS, about)
    path = tmp_path / name if name == "config.json" else folder / name
    good = json.loads(config_files.to_json(tiny.config()) if name == "config.json" else path.read_text())
    for i, text in enumerate(mutations.mutations(good, CASES // 12)):
        path.write_bytes(text)
        try:
            report.make([tmp_path])
        except ValueError:
            pass
        except Exception as e:
            raise AssertionError(f"case {i}: {type(e).__name__}: {e!s:.200} on {text!r:.600}") from e
