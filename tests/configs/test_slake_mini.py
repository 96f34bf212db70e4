"""configs/slake_mini.py: what its arguments become, and a run with all of them."""

import io

import numpy as np
import PIL.Image
import pytest

from configs import common_boxes, slake_mini
from data_prep.build import build
from paligemma_med import checkpoints, evaluate, train
from paligemma_med.config import values as config_values
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer
from tests.data_prep.conftest import SlakeFolder

ALL = (
    "vqa=0.4,zh=0.3,detect=0.3,ema=0.9,stem=8,width=32,depth=1,patch=8,res=32,rotate=5,noise=0.05,area=40,"
    "smoothing=0.1,size=8,epochs=0.003,eval=test"
)


def test_by_default_one_data_set_and_none_of_the_options():
    c = slake_mini.get_config()
    assert c.input.data.to_dict() == dict(name="slake/en", split="train") and "held_out" not in c.input
    assert (c.text_len, c.tokenizer, c.total_epochs, c.label_smoothing) == (40, "tiny", 30.0, 0.0)
    assert "ema_decay" not in c and "stem" not in c.model.img and "vocab_size" not in c.model.llm
    assert not any(op in c.input.pp for op in ("rotate", "noise")) and len(c.evals) == 2


@pytest.mark.parametrize(
    "name, question, answer, prompt",
    [
        ("vqa", "Is it a CT?", "Yes", "answer en Is it a CT?\n"),
        ("zh", "图像里包含肺吗?", "包含", "answer zh 图像里包含肺吗?\n"),
        ("detect", "detect liver", "<loc0000><loc0000><loc0512><loc0256> liver", "detect liver\n"),
    ],
)
def test_examples_of_each_set(name, question, answer, prompt):
    """Whole, prompt and answer and its end, in the tokens of the one tokenizer that the model has."""
    c = slake_mini.get_config(ALL + ",area=100")
    out = io.BytesIO()
    PIL.Image.new("RGB", (80, 40)).save(out, "PNG")
    row = dict(image=out.getvalue(), question=question, answer=answer)
    row["boxes"] = dict(label=["Liver"], bbox=np.array([[0, 0, 20, 20]]))
    made = get_preprocess_fn(c.input[name].pp)(row, np.random.default_rng(0))
    tokenizer, first = get_tokenizer(c.tokenizer), int(made["mask_loss"].argmax())
    assert len(made["text"]) == c.text_len + 1 and made["image"].shape == (32, 32, 3)
    assert tokenizer.to_str(made["text"][:first], stop_at_eos=False) == prompt
    assert tokenizer.to_str(made["text"][first:]).startswith(answer.partition("><")[0])
    assert made["text"][made["mask_loss"] > 0][-1] == tokenizer.eos_token
    assert made["text"].max() < c.model.llm.vocab_size == common_boxes.TINY_VOCAB


def test_a_mixture_has_as_many_steps_and_names_what_is_held_out():
    c = slake_mini.get_config("zh=0.5,vqa=0.5,epochs=2")
    assert c.total_examples == 2 * 4918 and "total_epochs" not in c
    assert c.input.data.to_dict() == dict(vqa=0.5, zh=0.5) and "detect" not in c.input
    assert c.input.held_out.to_dict() == dict(name="slake/en", split="validate+test")
    assert c.tokenizer == "tiny" and "slake_detect_validate" not in c.evals
    config_values.checked_for_training(c)
    assert "rotate" not in slake_mini.get_config(ALL).input.detect.pp


@pytest.mark.parametrize(
    "arg, message",
    [("width=100", "width=100: expected a multiple of 32"), ("res=100", "res=100: expected a multiple of patch=16")],
)
def test_sizes_that_do_not_fit(arg, message):
    with pytest.raises(ValueError, match=message):
        slake_mini.get_config(arg)


@pytest.mark.slow  # a run, its evaluations with controls, and one again
def test_a_run_with_all_of_them(tmp_path, monkeypatch):
    raw = SlakeFolder(tmp_path / "slake")
    raw.root.mkdir()
    raw.write()
    (raw.image(2).parent / "detection.json").write_text('[{"Lung": [5, 6, 7, 8]}]')
    for config in ("en", "en_detect", "zh_of_en_train"):
        build("slake", config=config, manual_dir=raw.root, data_dir=tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    c = slake_mini.get_config(ALL)
    del c.ckpt_epochs
    c.log_training_steps = 1
    for section in c.evals.values():
        if "pred_kw" in section:
            section.pred_kw.max_new_tokens = 4
    found = train.train(c, str(tmp_path / "w"))
    assert set(found) == {
        *("slake_en_test", "slake_en_test_as_trained", "slake_en_test_loss"),
        *("slake_detect_test", "slake_detect_test_loss"),
    }
    names = flatten_tree(checkpoints.load_params(str(tmp_path / "w")))
    assert names["img/stem_1/kernel"].shape == (3, 3, 8, 8) and names["img/embedding/kernel"].shape == (2, 2, 8, 32)
    again = evaluate.evaluate(c, str(tmp_path / "w"), str(tmp_path / "again"), only=["slake_en_test"])
    assert again["slake_en_test"] == found["slake_en_test"]
    build("slake", config="zh", manual_dir=raw.root, data_dir=tmp_path)
    c.input.zh.data.name = "slake/zh"
    with pytest.raises(InputError, match="slake/zh train has 2 images of input.held_out"):
        train.train(c, str(tmp_path / "leaks"))
