"""An own table as an evaluation: prompts of the run, answers of the table, all controls."""

import numpy as np
import PIL.Image
import pytest

from configs import own_data
from paligemma_med import evaluate, predict, table_eval
from paligemma_med.evaluation.results import read_rows
from paligemma_med.pp import registry
from paligemma_med.setup import TrainingSetup
from tests import tiny


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with q.csv, bare.csv and films/."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "films").mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "films" / f"{i}.png")
    asked = [(f"{i}.png", q, a) for i in range(8) for q, a in (("Is this an MRI?", "yes"), ("Wo?", "links"))]
    lines = ["Bild;question;answer;patient_id", *(f"{i};{q};{a};p{i[0]}" for i, q, a in asked)]
    (folder / "q.csv").write_text("\n".join(lines), encoding="utf-8")
    (folder / "bare.csv").write_text("image,question\n0.png,Why?\n", encoding="utf-8")
    return folder


def data_of(own, name="q.csv", **kw):
    return table_eval.data_of(own / name, images=own / "films", **kw)


def test_a_table_is_evaluated_with_all_controls(own, tmp_path):
    config = tiny.config(evals={})
    tiny.write_workdir(tmp_path / "w", config)
    data = data_of(own, columns="image=Bild")
    section = table_eval.section(config, data, data, max_new_tokens=3)
    config.evals = {"own": section}
    (metrics,) = evaluate.evaluate(config, str(tmp_path / "w"), str(tmp_path), controls="all").values()
    assert metrics["n"] == 16 and metrics["majority/overall/acc"] == 1.0
    assert {"shuffled_images/overall/acc", "blank_image/overall/acc", "noise_image/overall/acc"} <= {*metrics}
    rows = read_rows(tmp_path / "eval" / "own" / "predictions.jsonl")
    assert [r["answer_type"] for r in rows] == ["CLOSED", "OPEN"] * 8
    assert rows[0]["patient_id"] == "p0" and rows[2]["prompt"] == "answer en Is this an MRI?\n"
    image = (own / "films" / "1.png").read_bytes()
    found = predict.predict(config, str(tmp_path / "w"), image, ["Is this an MRI?", "Wo?"], max_new_tokens=3)
    assert [r["predictions"] for r in rows[2:4]] == [[x["answers"][0]["answer"]] for x in found]


def test_a_table_without_answers_is_told_so(own):
    with pytest.raises(ValueError, match="answer"):
        table_eval.section(tiny.config(evals={}), data_of(own, "bare.csv"))


def test_what_the_config_says_about_its_own_evaluations_holds(own):
    config = tiny.config("x")
    section = table_eval.section(config, data_of(own, columns="image=Bild"))
    assert section["batch_size"] == 32 and section["pred_kw"] == {"max_new_tokens": 4}
    del config.predict_pp
    with pytest.raises(ValueError, match="no predict_pp"):
        table_eval.section(config, data_of(own))


def test_a_run_that_was_trained_on_a_table_is_known(own):
    assert table_eval.trained_on(tiny.config("x")) is None
    assert table_eval.trained_on(own_data.get_config("tiny")) is None
    c = own_data.get_config(f"tiny,train={own}/films/../q.csv")
    found = table_eval.trained_on(c)
    assert found["split"] == "train"
    assert table_eval.is_same_table(found, data_of(own)) and not table_eval.is_same_table(
        found, data_of(own, "bare.csv")
    )


def test_columns_said_when_asking_hold_for_the_same_table_in_training(own):
    c = own_data.get_config(f"tiny,train={own / 'q.csv'}")  # without images= and columns=
    asked = data_of(own, columns="image=Bild")
    found = table_eval.trained_on(c, asked)
    assert found == asked | {"split": found["split"]} and found["split"] != "all"
    assert table_eval.section(c, asked, found)["train_data"] == found
    assert "columns" not in table_eval.trained_on(c, data_of(own, "bare.csv", columns="image=Bild"))


def test_the_prompt_is_that_of_prediction():
    pp = tiny.config(evals={}).predict_pp
    *ops, last = registry.split(table_eval.keeping(pp, ("answer", "my column's")))
    assert ops == registry.split(pp)[:-1]
    assert registry.parse_call(last)[1][-2:] == ("answer", "my column's")
    assert table_eval.keeping("decode|resize(8)", ("answer",)) == "decode|resize(8)"


@pytest.mark.parametrize("path, name", [("a/My q.v2.csv", "My_q_v2"), ("ü.csv", "table"), ("../q.xlsx", "q")])
def test_the_name_is_a_path(path, name):
    assert table_eval.name_of(path) == name


@pytest.mark.parametrize("stage, trained", [("1", {"img/head"}), ("lora", {"lora"}), ("both", {"img/head", "lora"})])
def test_what_is_trained(stage, trained):
    setup = TrainingSetup.without_data(own_data.get_config(f"tiny,train=q.csv,stage={stage}"))
    names = {n.rpartition("/")[0] if n.startswith("img/head") else "lora" for n in setup.trained_names}
    assert names == trained
    assert all("lora_" in n or n.startswith("img/head") for n in setup.trained_names)


def test_what_is_not_given_is_told():
    c = own_data.get_config("train='a,b.csv',images=/x,columns=\"image=file,question=frage\",tiny,val=v.csv")
    assert c.input.data.to_dict() == dict(
        name="table:a,b.csv", split="all", images="/x", columns="image=file,question=frage"
    )
    section = c.evals.own_validate
    assert section.data.name == "table:v.csv" and section.train_data == c.input.data
    c = own_data.get_config("train=q.csv,init=w.npz")
    assert (c.input.data.split, c.evals.own_validate.data.split, c.input.batch_size) == ("train", "validate", 96)
    for arg, said in {
        "train=q.csv": "init isn't given",
        "images=x": "train isn't given",
        "stage=2": "1, lora or both",
    }.items():
        with pytest.raises(ValueError, match=said):
            own_data.get_config(arg)
