"""The same questions through a table and through TFDS: the same predictions and figures to the byte; and big_vision's
own data section for JSON lines trains here."""

import csv
import importlib.util
import json
import os
import pathlib

import numpy as np
import pytest

from configs import common
from paligemma_med import evaluate, input_pipeline, train
from paligemma_med.config import stand_ins
from paligemma_med.evaluation.results import read_metrics
from tests import tiny


@pytest.fixture(scope="module")
def copied(tiny_data, tmp_path_factory):
    """A folder with the phantom's questions as q.csv and q.jsonl beside their images, in the order of the TFDS set."""
    folder = tmp_path_factory.mktemp("copied")
    lines = []
    for split in ("train", "validate"):
        source = input_pipeline.open_source(dict(name="phantom", split=split, data_dir=str(tiny_data)))
        for i in range(len(source)):
            row = {k: v for k, v in source[i].items() if isinstance(v, str | bytes)}
            path = folder / f"{split}_{row['image_id']}.png"
            path.write_bytes(row["image"])
            lines.append(row | dict(image=path.name, split=split))
    with open(folder / "q.csv", "w", newline="", encoding="utf-16") as f:
        writer = csv.DictWriter(f, sorted(lines[0]), delimiter=";")
        writer.writeheader()
        writer.writerows(lines)
    theirs = [dict(image=x["image"], suffix=x["answer"]) for x in lines]
    (folder / "q.jsonl").write_text("".join(json.dumps(x) + "\n" for x in theirs))
    return folder


def test_batches_are_the_same(tiny_data, copied):
    pp = common.eval_pp(tiny.RES, tiny.TEXT_LEN, "tiny")
    data = dict(name="phantom", split="validate[:20]", data_dir=str(tiny_data))
    expected = list(input_pipeline.evaluation(data, pp, 8))
    found = list(input_pipeline.evaluation(dict(name=f"table:{copied / 'q.csv'}", split="validate[:20]"), pp, 8))
    assert [rows for _, rows in found] == [rows for _, rows in expected]
    for (a, _), (b, _) in zip(found, expected):
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_predictions_and_figures_are_the_same_to_the_byte(tiny_data, copied, tmp_path):
    tiny.write_workdir(tmp_path / "w", tiny.config(tiny_data))
    found = []
    for name in ("phantom", f"table:{copied / 'q.csv'}"):
        c = tiny.config(tiny_data)
        for key in ("data", "train_data"):
            c.evals.val[key].name = name
            if name != "phantom":
                del c.evals.val[key].data_dir
        c.evals.val.data.split = "validate[:20]"
        c.evals.val.controls = ("majority", "shuffled_images")
        evaluate.evaluate(c, str(tmp_path / "w"), str(tmp_path / name[:5]))
        folder = tmp_path / name[:5] / "eval" / "val"
        figures, about = read_metrics(folder / "metrics.json")
        found.append(((folder / "predictions.jsonl").read_bytes(), json.dumps(figures)))
    assert found[0] == found[1] and found[0][0].count(b"\n") == 20
    assert about["data"]["digest"] and about["data"]["examples"] == 20


# big_vision's combine_and_keep_train, spelt out.
_COMBINE = "|".join(
    [
        'tok(key="prefix", bos="yes", model="tiny")',
        'tok(key="suffix", eos="yes", model="tiny")',
        'tok(key="septok", text="\\n", model="tiny")',
        'masked_concat(["prefix", "septok", "suffix"], outkey="text", mask_ar=[0, 0, 1], mask_loss=[0, 0, 1])',
        f'tolen({tiny.TEXT_LEN + 1}, pad_value=0, key="text")',
        f'tolen({tiny.TEXT_LEN + 1}, pad_value=1, key="mask_ar")',
        f'tolen({tiny.TEXT_LEN + 1}, pad_value=0, key="mask_loss")',
        'keep("image", "text", "mask_ar", "mask_loss")',
    ]
)


@pytest.mark.slow
def test_big_visions_data_section_trains(copied, tmp_path):
    """That of proj/paligemma/transfers/forkme.py, and its pp, at a tiny size."""
    c = tiny.config("/none", total_steps=3)
    image = f"decode|resize({tiny.RES}, antialias=True)|value_range(-1, 1)"
    del c.input.data
    c.input.data = dict(name="bv:jsonl", fname=str(copied / "q.jsonl"), fopen_keys={"image": str(copied)})
    c.input.pp = "|".join([image, 'strfmt("caption en", outkey="prefix")', _COMBINE])
    c.input.shuffle_buffer_size, c.input.cache_raw = 1000, True
    del c.evals
    train.train(c, str(tmp_path / "w"))
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.big_vision
def test_the_real_forkme_trains(copied, tmp_path):
    """Its own `training_data`, with the names of files and the tokenizer replaced."""
    path = pathlib.Path(os.environ.get("BIG_VISION_DIR") or "/nowhere").expanduser()
    path /= "big_vision/configs/proj/paligemma/transfers/forkme.py"
    if not path.is_file():
        pytest.skip("BIG_VISION_DIR is no checkout of big_vision")
    with stand_ins.importable(path):
        spec = importlib.util.spec_from_file_location("forkme", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        section = module.training_data(tiny.RES, tiny.TEXT_LEN)
    c = tiny.config("/none", total_steps=3)
    del c.input, c.evals
    c.input = section
    c.input.pp = c.input.pp.replace(repr(module.TOKENIZER), "'tiny'")
    c.input.batch_size = 8
    assert c.input.data.name == "bv:jsonl" and c.input.cache_raw
    c.input.data.fname, c.input.data.fopen_keys = str(copied / "q.jsonl"), {"image": str(copied)}
    train.train(c, str(tmp_path / "w"))
    rows = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3]
