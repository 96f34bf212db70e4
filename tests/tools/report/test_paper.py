"""tools.report: published figures beside ours."""

import hashlib
import json
import math

from paligemma_med.judge import figures
from tests.tools.report.reports import report, rows, save, table, warnings
from tools.report import (
    evaluations,
    paper,
)

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


def test_a_report_on_other_data_has_none_of_the_papers_tables(tmp_path):
    save(tmp_path / "a", rows(3), data="table:/study/slake.csv")
    markdown = report(tmp_path / "a")[1]
    assert "Table 1" not in markdown and "paper" not in markdown.partition("How to read this")[0]
    save(tmp_path / "b", rows(3), data="pmc_vqa/v1")
    assert "Table 1" in report(tmp_path / "a", tmp_path / "b")[1]


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
    digest = hashlib.sha256((folder / "predictions.jsonl").read_bytes()).hexdigest()
    entry = dict(
        protocol="binary",
        model="m",
        prompt="binary_v1.txt",
        prompt_text="Is it right?",
        predictions_sha256=digest,
        metrics=figures.summarise(lines, made, "binary"),
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
