"""PathVQA's copy on the Hub: Parquet files with their images, as its repository lays them out; all rows made up."""

import re

import pytest

from data_prep.datasets.pathvqa import hub, layout
from data_prep.files import DataError
from tests.data_prep import made
from tests.data_prep.datasets.pathvqa import test_pathvqa as official

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

# Images of each file.
FILES = {
    "train-00000-of-00002-41ec4f4fd8c5ad9b.parquet": (0, 1),
    "train-00001-of-00002-41ec4f4fd8c5ad9b.parquet": (1, 2),
    "validation-00000-of-00001-a92db0a4bdcd5d31.parquet": (3, 4),
    "test-00000-of-00001-e7fd0d1d8b8d0b0a.parquet": (5,),
}


def rows_of(images, question="What is  {}?"):
    asked = [(question, "liver"), ("Is {} here?", "yes")]
    return [
        dict(image=dict(bytes=made.image(i), path=None), question=q.format(i), answer=a)
        for i in images
        for q, a in asked
    ]


def write(root, rows=None, row_group_size=3):
    """A folder of FILES; `rows`: {beginning of a file's name: its rows}, in place of the made ones."""
    for name, images in FILES.items():
        (root / "data").mkdir(parents=True, exist_ok=True)
        given = next((v for k, v in (rows or {}).items() if name.startswith(k)), None)
        # Another question in each file, since image 1 is in two of them.
        table = pa.Table.from_pylist(given or rows_of(images, f"What is  {{}} of {images[-1]}?"))
        pq.write_table(table, root / "data" / name, row_group_size=row_group_size)
    return root


def test_records_and_images(tmp_path):
    root = write(tmp_path / "raw")
    report, splits = made.built("pathvqa", root, tmp_path / "d")  # the only config that the folder has files for
    assert {s: len(x) for s, x in splits.items()} == {"train": 8, "validate": 4, "test": 2}
    row = splits["validate"]["hub_val_q1"]
    assert row.pop("image") == made.image(3) and len(row["image_id"]) == 16
    assert row == dict(
        question_id="hub_val_q1",
        image_id=row["image_id"],
        question="Is 3 here?",
        answer="yes",
        answer_type="CLOSED",
        content_type="Yes or no",
    )
    train = splits["train"]
    assert [train[f"hub_train_q{i}"]["image"] for i in range(8)] == [made.image(i) for i in (0, 0, 1, 1, 1, 1, 2, 2)]
    assert train["hub_train_q2"]["question"] == "What is 1 of 1?"
    assert train["hub_train_q4"]["question"] == "What is 1 of 2?"
    assert len({x["image_id"] for x in train.values()}) == report["splits"]["train"]["images"] == 3
    # "Is 1 here?" stands in both files of train, as no question of the true copy does.
    assert report["splits"]["train"]["flags"]["the same question and answer again"]["first"] == ["hub_train_q5"]
    assert report["notes"]["questions read"].startswith("8 / 4 / 2, neither of the versions in use")


def test_both_layouts_in_one_folder_are_configs_of_their_own(tmp_path):
    root = write(tmp_path / "raw")
    with pytest.raises(DataError, match="the Hub's Parquet files alone; expected config hub, or split/images"):
        layout.read_folder(root, True)
    asked = {
        split: [dict(image=f"{split}_{i:04}", question="why?", answer="no") for i in images]
        for split, images in official.IMAGES.items()
    }
    official.write(root, asked)
    assert len(layout.read_folder(root, False).asked) == 7 and len(layout.read_hub(root).asked) == 14
    with pytest.raises(DataError, match="no Parquet file found; expected data/.train,validation,test"):
        layout.read_hub(official.write(tmp_path / "other", asked))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=dict(bytes=None, path="a.jpg")), "row 2: image has no bytes; expected the image itself"),
        (dict(answer=["x"]), r"row 2: answer is \['x'\]; expected text"),
        (dict(question=b"\xff"), "row 2: bytes in the column question; expected a text"),
    ],
)
def test_rows_refused(tmp_path, change, message):
    rows = rows_of((5,))
    for row in rows if "image" not in change else rows[1:]:  # a column has one type
        row.update({k: row["image"] | v if k == "image" else v for k, v in change.items()})
    message = message.replace("row 2", "row 1") if "image" not in change else message
    with pytest.raises(DataError, match=f"test-00000-of-00001-e7fd0d1d8b8d0b0a.parquet {message}"):
        layout.read_hub(write(tmp_path / "raw", {"test": rows}))


def test_files_refused(tmp_path):
    root = write(tmp_path / "raw")
    with pytest.raises(DataError, match=f"did you mean {re.escape(str(root))}"):
        layout.check_folder(tmp_path)
    first, second, *_ = sorted((root / "data").glob("train*"))
    second.rename(root / "kept")
    with pytest.raises(DataError, match=f"found {first.name}; expected 2 files of train, one of each number"):
        layout.read_hub(root)
    pq.write_table(pa.Table.from_pylist([dict(image=dict(bytes=b"x", path=None), question="?")]), second)
    with pytest.raises(DataError, match="no column 'answer', only image, question; expected"):
        layout.read_hub(root)
    second.write_bytes((root / "kept").read_bytes()[:-100])
    with pytest.raises(DataError, match=f"{second.name}: no Parquet file"):
        layout.read_hub(root)
    (root / "kept").rename(second)
    for path in (root / "data").glob("validation*"):
        path.unlink()
    with pytest.raises(DataError, match="nothing found of split validate"):
        made.built("pathvqa", root, tmp_path / "d")


def test_an_image_whose_file_is_gone_is_one_sentence(tmp_path):
    root = write(tmp_path / "raw")
    found = layout.read_hub(root)
    store = found.images["images"]
    names = [*store.names()]
    assert len(names) == 6 and all(store.has(name) for name in names) and not store.has("0" * 16)
    assert [store.read(name) for name in names] == [made.image(i) for i in range(6)]
    for path in hub.parquet_files(root, "test"):
        path.write_bytes(b"PAR1")
    fresh = hub.Images(root)
    with pytest.raises(DataError, match="no Parquet file"):
        [*hub.rows(hub.parquet_files(root, "test")[0], fresh)]
