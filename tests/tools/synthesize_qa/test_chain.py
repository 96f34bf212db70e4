"""The whole chain, each link as a user runs it: captions → synthesis → review → curation → built
set → stage 2 with the tiny model → evaluation. Nothing that was written is lost or mixed up."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from data_prep.build import build
from data_prep.curate.configs import paper
from data_prep.curate.run import curate
from data_prep.datasets.medpix2 import fake
from paligemma_med import evaluate, train
from tests.servers import FakeModel
from tools.review_qa import rows, verdicts
from tools.review_qa.__main__ import write_page

pytestmark = pytest.mark.slow
pytest.importorskip("openai")

ROOT = pathlib.Path(__file__).resolve().parents[3]
ORGANS = ("liver", "spleen", "pancreas", "stomach", "bladder", "thyroid", "pelvis", "sacrum")
FINDINGS = ("cyst", "abscess", "fracture", "hernia", "tumour", "thrombus", "stenosis", "oedema")


def made_up_release(folder):
    content = fake.release()
    for i, row in enumerate(content["descriptions"]):
        what, where = FINDINGS[i % 8], ORGANS[(i + i // 8) % 8]
        row["Description"]["Caption"] = f"Axial slice with a {what} of the {where}."
    return fake.write(folder, content)


def seen(texts):
    return re.search(r"with a (\w+) of the (\w+)", texts["caption"]).groups()


def say_pairs(texts):
    what, where = seen(texts)
    pairs = {
        "Which organ does the finding lie in?": where.capitalize(),
        f"Is there a {what} in the image?": "Yes",
        "What kind of finding is seen?": what.capitalize(),
        f"How large is the {what}?": "3 cm",  # to be dropped
    }
    made = [dict(question=q, answer=a) for q, a in pairs.items()]
    return "Sure! Here are the pairs:\n```json\n" + json.dumps({"pairs": made}) + "\n```"


def say_choices(texts):
    what, where = seen(texts)
    others = [o for o in ORGANS if o != where][:3]
    options = dict(zip("ABCD", [where, *others]))
    question = f"Where does the {what} lie?"
    return json.dumps({"pairs": [dict(question=question, choices=options, answer="A")]})


def synthesize(release, output, say, template):
    """As from a shell; the rows that were kept."""
    with FakeModel(say) as server:
        command = f"""-m tools.synthesize_qa --input=release:medpix2:{release} --output={output}
            --backend=server --base_url={server.url} --model=fake --templates={template}
            --pairs=4"""
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in output.open()]


def stage2(arg, folder):
    """(its metrics, those of `evaluate` afterwards, the rows of predictions.jsonl)."""
    arg = f"tiny,micro=8,accum=1,epochs=1,lr=1e-3,{arg}"
    c = importlib.import_module("configs.stage2_medpix2").get_config(arg)
    for tower in c.model.values():
        tower.scan = True  # quicker to compile, which is most of the time here
    c.evals.medpix2_validate.pred_kw.max_new_tokens = 8
    trained = train.train(c.copy_and_resolve_references(), str(folder))
    again = evaluate.evaluate(c, str(folder), str(folder / "again"))
    path = folder / "eval" / "medpix2_validate" / "predictions.jsonl"
    return trained["medpix2_validate"], again["medpix2_validate"], [json.loads(line) for line in path.open()]


def built(data_dir, split):
    found = tfds.data_source(
        "medpix2/qa", split=split, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [{k: v.decode() for k, v in r.items() if isinstance(v, bytes) and k != "image"} for r in found]


def test_from_captions_to_an_evaluated_model(tmp_path):
    release = made_up_release(tmp_path / "medpix2")
    made = synthesize(release, tmp_path / "qa.jsonl", say_pairs, "caption")
    assert len(made) == 16 * 3 and not any("3 cm" in r["answer"] for r in made)
    drops = [json.loads(x)["row"]["answer"] for x in (tmp_path / "qa.drops.jsonl").open()]
    assert drops == ["3 cm"] * 16

    images = [f"release:medpix2:{release}"]
    assert write_page(tmp_path / "qa.jsonl", tmp_path / "r.html", images=images) == (48, 48, 0)
    gone = made[5]["question_id"]
    (tmp_path / "v.csv").write_text(f"question_id,verdict,note\n{gone},discard,wrong\n")
    found = verdicts.read(tmp_path / "v.csv")
    verdicts.apply(tmp_path / "qa.jsonl", found, tmp_path / "v.csv", tmp_path / "reviewed.jsonl")

    config = json.loads(json.dumps(paper.get_config("min_cases=1").to_dict()))
    report = curate(config, [str(tmp_path / "reviewed.jsonl")], tmp_path / "kept.jsonl")
    assert (report["rows_read"], report["rows_kept"]) == (47, 47)  # its rules are ours
    assert set(report["categories"]) == {"Genitourinary"}

    options = {"qa": str(tmp_path / "kept.jsonl")}
    data = tmp_path / "data"
    build("medpix2", manual_dir=release, data_dir=data, config="qa", options=options)
    rows_built = [r for split in ("train", "validate", "test") for r in built(data, split)]
    keys = ("question_id", "image_id", "question", "answer", "answer_type")
    assert sorted([r[k] for k in keys] for r in rows_built) == sorted(
        [r[k] for k in keys] for r in made if r["question_id"] != gone
    )
    assert {r["qa_mode"] for r in rows_built} == {"caption"}
    assert all(r["answer"].lower() in r["caption"] or r["answer"] == "Yes" for r in rows_built)
    text = (data / "medpix2" / "qa" / "1.1.0" / "build_report.json").read_text()
    assert "of the file of pairs" not in text  # no pair was put into another split

    trained, again, predictions = stage2(f"data_dir={data}", tmp_path / "w")
    assert trained == again and trained["n"] == len(predictions) == len(built(data, "validate"))
    assert {p["question_id"] for p in predictions} <= {r["question_id"] for r in made}


def test_multiple_choice_keeps_its_options_to_the_evaluation(tmp_path):
    release = made_up_release(tmp_path / "medpix2")
    made = synthesize(release, tmp_path / "qa.jsonl", say_choices, "choice")
    by_id = {r["question_id"]: r for r in made}
    assert len(made) == 16 and len({r["answer_letter"] for r in made}) > 1  # drawn, not all A
    data = tmp_path / "data"
    options = {"qa": str(tmp_path / "qa.jsonl")}
    build("medpix2", manual_dir=release, data_dir=data, config="qa", options=options)
    for row in (r for split in ("train", "validate", "test") for r in built(data, split)):
        source = by_id[row["question_id"]]
        assert {k: row[k] for k in rows.CHOICES} == {k: source[k] for k in rows.CHOICES}
        assert row[f"choice_{row['answer_letter'].lower()}"] == row["answer"]
        assert row["answer"] in row["caption"] and row["answer_type"] == "CLOSED"
    trained, again, predictions = stage2(f"letters,data_dir={data}", tmp_path / "w")
    assert trained == again and trained["n"] == 4
    assert {k for k in trained if k.startswith("model/overall/acc_")} >= {
        "model/overall/acc_letter",
        "model/overall/acc_likelihood",
    }
    for p in predictions:
        assert p["answer"] == p["answer_letter"] == by_id[p["question_id"]]["answer_letter"]
        assert all(f"{x}: {c}" in p["prompt"] for x, c in zip("ABCD", p["choices"]))
