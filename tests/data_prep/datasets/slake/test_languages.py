"""Chinese questions about the images of English train: which are taken, and that no other image enters."""

import shutil

import pytest

from data_prep.build import build
from data_prep.datasets.slake import languages, layout
from data_prep.files import DataError
from paligemma_med.input_pipeline import open_source
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.input_pipeline.overlap import check_held_out


def test_all_chinese_questions_about_english_train_and_no_others(slake, tmp_path):
    slake.write()
    for config in ("en", "zh", "zh_of_en_train"):
        made = build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config=config)
    assert list(made) == ["slake/zh_of_en_train"]
    data = dict(name="slake/zh_of_en_train", split="train", data_dir=str(tmp_path / "d"))
    source = open_source(data)
    rows = [source[i] for i in range(len(source))]
    wanted = [r for split in slake.rows.values() for r in split if r["q_lang"] == "zh" and r["img_id"] in (0, 1)]
    assert {r["question_id"] for r in rows} == {str(r["qid"]) for r in wanted} and len(rows) == len(wanted) == 4
    assert {r["q_lang"] for r in rows} == {"zh"} and {r["image_id"] for r in rows} == {"xmlab0", "xmlab1"}
    held = dict(name="slake/en", split="validate+test", data_dir=str(tmp_path / "d"))
    mixture = {"data": {"vqa": 1, "zh": 1}, "vqa": dict(data=held | dict(split="train")), "held_out": held}
    check_held_out(mixture | dict(zh=dict(data=data)))
    with pytest.raises(InputError, match="slake/zh train has 2 images of input.held_out, slake/en.*xmlab3, xmlab4"):
        check_held_out(mixture | dict(zh=dict(data=data | dict(name="slake/zh"))))


def test_an_image_of_english_test_in_train_by_another_name(slake):
    slake.write()
    shutil.copy(slake.image(3), slake.image(1))
    folder = layout.read_folder(slake.root, "all")
    with pytest.raises(DataError, match="1 images are in both train and test of English, such as xmlab3"):
        languages.chinese_of_english_train(folder)
