"""Own tables, Hugging Face's folders and big_vision's JSON lines as data sets."""

import json
import pickle

import ml_collections
import numpy as np
import PIL.Image
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError, splits, table_source
from paligemma_med.pp import images, own_table
from tests.input_pipeline.tiny_vqa import LENGTH, assert_equal, png


def rows(count, **more):
    return [dict(image=f"{i // 2}.png", question=f"what {i}?", answer=f"a{i}", number=i) | more for i in range(count)]


def write(folder, table, name="q.jsonl"):
    folder.mkdir(exist_ok=True)
    for i in range(len(table)):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in table))
    return dict(name=f"table:{folder / name}", split="all")


def pp(d, rng):
    text = np.full(LENGTH, int(d["number"]), np.int32)
    text[-1] = 1
    noise = rng.random(2).astype(np.float32)
    return dict(text=text, mask_loss=np.ones(LENGTH, np.int32), size=np.int32(len(d["image"])), noise=noise)


def batches(data, steps, start_step=0, **kw):
    cfg = dict(data=data, pp=pp, batch_size=4, **kw)
    with input_pipeline.training(cfg, seed=3, start_step=start_step) as found:
        return [next(found) for _ in range(steps)], found.state()


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    data = write(tmp_path, rows(10))
    expected, _ = batches(data, 5)
    assert_equal(batches(data, 2, start_step=3)[0], expected[3:])
    assert_equal(batches(data, 5, num_threads=3)[0], expected)
    copy = pickle.loads(pickle.dumps(input_pipeline.open_source(data)))
    assert copy[3]["image"] == png(1) and copy[3]["question_id"] == "row4"


def test_several_images_are_one_picture_and_choose_says_what_is_shown(tmp_path):
    write(tmp_path, rows(3))
    pages = [PIL.Image.new("L", (3, 2), grey) for grey in (10, 20)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    data = write(tmp_path, [dict(image=x, question="q?", answer="a") for x in ("pages.tif", "pages.tif#frame=1,2")])

    def greys(**kw):
        source = input_pipeline.open_source(data | kw)
        return [images.to_rgb(source[i]["image"])[1, ::3, 0].tolist() for i in range(2)]

    assert greys() == [[10], [10, 20]] and greys(choose="frame=2") == [[20], [10, 20]]
    with pytest.raises(InputError, match="choose=frame=x: frame=x: expected numbers from 1"):
        greys(choose="frame=x")
    with pytest.raises(InputError, match="data.choose=3: expected a text"):
        greys(choose=3)


@pytest.mark.slow
def test_worker_processes(tmp_path):
    data = write(tmp_path, rows(10))
    assert_equal(batches(data, 3, num_workers=2)[0], batches(data, 3)[0])


def test_a_changed_table_is_another_data_set(tmp_path):
    data = write(tmp_path, rows(10))
    _, state = batches(data, 1)
    before = input_pipeline.open_source(data).about()
    write(tmp_path, [r | dict(answer="b") for r in rows(10)])
    assert input_pipeline.open_source(data).about() != before
    with pytest.raises(InputError, match="made with another input"):
        input_pipeline.training(dict(data=data, pp=pp, batch_size=4), seed=3, start_step=1, state=state)


def members(data, key):
    opened = {s: input_pipeline.open_source(data | {"split": s}) for s in splits.NAMES}
    return {s: [r[key] for r in source.columns([key])] for s, source in opened.items()}


@pytest.mark.parametrize("key", ["image_id", "patient_id"])
def test_drawn_splits_share_nothing_and_do_not_depend_on_the_order(tmp_path, capsys, key):
    table = rows(60)
    if key == "patient_id":
        table = [r | dict(patient_id=f"p{i // 6}") for i, r in enumerate(table)]
    data = write(tmp_path / "a", table)
    found = members(data, key)
    said = capsys.readouterr().err
    assert said.count("names no splits: drawn by " + key.removesuffix("_id")) == 1
    sets = [set(x) for x in found.values()]
    assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]
    assert [len(x) for x in found.values()] == [48, 6, 6]
    turned = members(write(tmp_path / "b", table[::-1]), key)
    assert {s: set(x) for s, x in turned.items()} == {s: set(x) for s, x in found.items()}
    assert members(data | {"split_seed": 1}, key) != found


@pytest.mark.parametrize("images", [3, 4, 7])
def test_no_drawn_split_of_a_small_table_is_empty(tmp_path, images):
    found = members(write(tmp_path, rows(2 * images)), "image_id")
    assert [len(x) for x in found.values()] == [2 * (images - 2), 2, 2]
    ends = splits._ends((100, 0, 0), images)
    assert list(ends) == [images] * 3  # a split without a share gets nothing


def test_copies_of_an_image_stay_on_one_side(tmp_path):
    data = write(tmp_path, rows(40))
    for i in range(0, 20, 2):
        (tmp_path / f"{i + 1}.png").write_bytes((tmp_path / f"{i}.png").read_bytes())
    found = members(data, "image_id")
    side = {image: split for split, images in found.items() for image in images}
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows(40)[::-1]))
    turned = members(dict(name=f"table:{tmp_path / 'r.jsonl'}"), "image_id")
    assert side == {image: split for split, images in turned.items() for image in images}
    assert all(side[f"{i}.png"] == side[f"{i + 1}.png"] for i in range(0, 20, 2))


def test_what_two_given_splits_share_is_told(tmp_path, capsys):
    table = [
        dict(image=f"{i}.png", question="q?", answer="a", split=s, patient_id=p)
        for i, s, p in [(0, "train", "x"), (1, "test", "y"), (2, "test", "x"), (3, "dev", "z")]
    ]
    data = write(tmp_path, table)
    (tmp_path / "2.png").write_bytes(png(0))
    source = input_pipeline.open_source(data | {"split": "validation"})
    input_pipeline.open_source(data | {"split": "test"})
    said = capsys.readouterr().err
    assert len(source) == 1
    assert said.count("WARNING") == 2
    assert "1 image in both train and test (0.png)" in said and "1 patient in both train and test (x)" in said


def test_slices_are_those_of_tfds(tmp_path):
    data = write(tmp_path, [r | dict(split="train" if i < 13 else "test") for i, r in enumerate(rows(20))])

    def numbers(split):
        return [int(r["number"]) for r in input_pipeline.open_source(data | {"split": split}).columns(["number"])]

    everything = list(range(13))
    assert numbers("train[:5]") == everything[:5] and numbers("train[-5:]") == everything[-5:]
    assert numbers("train[20%:]") == everything[round(13 * 0.2) :]
    assert numbers("train[:2]+test[-1:]") == [0, 1, 19] and numbers("all") == list(range(20))
    for split, says in [
        ("train[:14]", "can't be read"),
        ("train[3:3]", "is empty"),
        ("val", "no split 'val'; it has tr"),
    ]:
        with pytest.raises(InputError, match=says):
            numbers(split)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(split=3), "data.split=3"),
        (dict(slit="x"), "unknown keys"),
        (dict(split_shares="1/2"), "split_shares"),
        (dict(split_seed="x"), "split_seed"),
        (dict(images="/nowhere"), "no such folder"),
        (dict(name="table:/nowhere.csv"), "/nowhere.csv: no such file"),
        (dict(name="hf:/nowhere"), "/nowhere: no such folder"),
        (dict(name="table:"), "names no table; expected table:PATH"),
        (dict(name="bv:tfds"), "no such kind of data"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, change, says):
    with pytest.raises(InputError, match=says):
        input_pipeline.open_source(write(tmp_path, rows(4)) | change)


def test_a_folder_of_parquet_shards(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "data").mkdir()
    for name, begin in [("train-00000-of-00002", 0), ("train-00001-of-00002", 4), ("validation-00000-of-00001", 8)]:
        table = [
            dict(image=dict(bytes=png(i), path=None), question="q?", answer=str(i)) for i in range(begin, begin + 4)
        ]
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "data" / f"{name}.parquet", row_group_size=2)
    source = input_pipeline.open_source(dict(name=f"hf:{tmp_path}", split="train"))
    assert len(source) == 8 and [source[i]["image"] for i in (7, 0)] == [png(7), png(0)]
    valid = input_pipeline.open_source(dict(name=f"hf:{tmp_path}", split="validate"))
    assert [r["answer"] for r in valid.columns(["answer"])] == list("89") + ["10", "11"]


def test_a_folder_of_images_with_metadata(tmp_path):
    for split in ("train", "test"):
        folder = tmp_path / split
        write(folder, [dict(file_name=f"{i}.png", question="q?", answer=split) for i in range(3)], "metadata.jsonl")
    source = input_pipeline.open_source(dict(name=f"hf:{tmp_path}", split="test"))
    assert len(source) == 3 and source[1]["answer"] == "test" and source[1]["image"] == png(1)
    assert source[1]["image_id"] == "test/1.png"


def test_what_is_held_does_not_grow_with_the_images(tmp_path):
    """50 bytes a row: numbers in arrays, no dict and no text."""
    data = write(tmp_path, rows(200))
    table = input_pipeline.open_source(data).table
    held = sum(x.nbytes for x in vars(table).values() if isinstance(x, np.ndarray))
    assert held <= 50 * len(table)
    assert len(pickle.dumps(table)) < 50 * len(table) + 4000


# --- big_vision's ---


def test_big_visions_jsonl(tmp_path):
    write(tmp_path, rows(6))
    data = dict(name="bv:jsonl", fname=str(tmp_path / "q.jsonl"), fopen_keys={"image": str(tmp_path)}, start=1, stop=5)
    source = input_pipeline.open_source(data)
    assert len(source) == 4 and source[0] == dict(rows(6)[1], id="0", image=png(0))
    assert [r["number"] for r in source.columns(["number"])] == [1, 2, 3, 4]
    assert input_pipeline.open_source(ml_collections.ConfigDict(data))[0] == source[0]
    assert pickle.loads(pickle.dumps(source))[3]["image"] == png(2)
    expected, _ = batches(data, 4)
    assert_equal(batches(data, 2, start_step=2)[0], expected[2:])
    for change, says in [
        (dict(download_keys=["image"]), "nothing is downloaded here"),
        (dict(fname="gs://b/x.jsonl"), "gs://b/x.jsonl is not on this machine"),
        (dict(fopen_keys=["pixels"]), "no 'pixels', which fopen_keys names"),
        (dict(fopen_keys=["image"]), None),
        (dict(start=9), "no rows from 9 on"),
        (dict(split="train"), "unknown keys"),
        (dict(fname="/nowhere.jsonl"), "/nowhere.jsonl"),
    ]:
        with pytest.raises(InputError, match=says):
            input_pipeline.open_source(data | change)[0]


def test_rows_of_the_table_are_open_tables(tmp_path):
    data = write(tmp_path, rows(3))
    assert isinstance(input_pipeline.open_source(data).table, own_table.OwnTable)
    assert table_source.NEEDS == ("image", "question", "answer")
