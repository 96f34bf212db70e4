"""Sources: which rows come, in which order, what is counted, what is refused."""

import json

import pytest

from data_prep.build import build
from data_prep.datasets.medpix2 import fake
from data_prep.files import DataError
from tools.synthesize_qa import sources


def rows_of(*specs, **kw):
    books = sources.new_books()
    rows = sources.open_rows([str(s) for s in specs], books, **kw)
    dropped = books.to_report()["splits"]["rows"]["dropped"]
    return rows, {reason: note["count"] for reason, note in dropped.items()}


def write(path, text):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize("id_name", ["image_id", "ID", "Image", "name"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables(tmp_path, suffix, id_name):
    cells = [["b.png", "A cyst, large", "CT"], ["x/a.jpg", 'The "hot" spot', ""]]
    names = [id_name, "Caption", "Modality"]
    if suffix == ".jsonl":
        text = "\n".join(json.dumps(dict(zip(names, c))) for c in cells)
    else:
        mark, quote = ("\t", lambda c: c) if suffix == ".tsv" else (",", lambda c: '"' + c.replace('"', '""') + '"')
        text = "\n".join(mark.join(map(quote, c)) for c in [names, *cells])
    rows, dropped = rows_of(write(tmp_path / f"t{suffix}", "\ufeff" + text + "\n"))
    assert [(r.image_id, r.fields) for r in rows] == [
        ("b", {"caption": "A cyst, large", "modality": "CT"}),
        ("a", {"caption": 'The "hot" spot'}),
    ]
    assert not dropped and {r.source for r in rows} == {f"t{suffix}"}


def test_what_cannot_be_used_is_counted(tmp_path):
    lines = [
        {"image_id": "a", "caption": "A cyst."},
        {"image_id": "a", "caption": "Again."},
        {"image_id": "b", "caption": " \u202f "},
        {"image_id": "", "caption": "No id."},
        {"image_id": "c", "caption": ["no", "text"]},
        {"image_id": "d"},
        {"image_id": "e", "caption": "CT image"},
        {"image_id": "f", "caption": "\ud800 A mass."},
        {"image_id": "h", "caption": True},
    ]
    text = "\n".join(map(json.dumps, lines)) + '\nnot json\n[1]\n{"image_id": "g", "capt'
    rows, dropped = rows_of(write(tmp_path / "t.jsonl", text))
    assert [r.image_id for r in rows] == ["a", "f"]
    assert rows[1].fields["caption"] == "? A mass."  # can be written
    assert dropped == {
        "an image that came before": 1,
        "no caption": 1,
        "no image id": 1,
        "caption is no text": 2,
        "no caption's column": 1,
        "the caption says only that it is an image": 1,
        "a line that is no JSON object": 3,
    }


def test_lines_of_tables_that_are_wrong(tmp_path):
    text = 'image_id,caption\na,"A cyst",more\nb,"A "mass" here"\nc,A nodule\n'
    rows, dropped = rows_of(write(tmp_path / "t.csv", text))
    assert [r.image_id for r in rows] == ["c"]
    assert dropped == {"another number of cells than the header": 1, "a line that is no CSV": 1}
    text = f'image_id,caption\na,{"x" * 200_000}\nb,"A mass"\n'
    rows, dropped = rows_of(write(tmp_path / "t.csv", text))
    assert [r.image_id for r in rows] == ["b"]
    assert dropped == {"a cell of over 131,072 characters": 1}
    # A stray quote in a table with tabs swallows nothing.
    rows, _ = rows_of(write(tmp_path / "t.tsv", 'image_id\tcaption\na\t"A cyst\nb\tA mass\n'))
    assert [r.fields["caption"] for r in rows] == ['"A cyst', "A mass"]


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("t.csv", "ID,text\na,b\n", "no column caption among id, text; --caption_column names it"),
        ("t.csv", "x,caption\na,b\n", "no column image_id or id"),
        ("t.csv", 'ID,caption\na,"b\nc,d\n', "line 2: a quote opens there and is never closed"),
        ("t.csv", "ID,caption\n", "none of 0 rows"),
        ("t.csv", "id,Caption,caption\na,b,c\n", "line 1: the column caption stands there twice"),
        ("t.jsonl", '{"image_id": "a", "caption": "."}\n', "none of 1 rows has a usable caption"),
        ("t.jsonl", b'{"image_id": "a"}\n\xff\n', "line 2: not UTF-8"),
        ("t.csv", "version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("t.txt", "a b\n", "not a kind of source"),
    ],
)
def test_refusals(tmp_path, name, text, says):
    with pytest.raises(DataError, match=says) as e:
        rows_of(write(tmp_path / name, text))
    assert "t." in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "spec",
    [
        "nosuch.csv",
        "tfds:medpix2",
        "release:medpix2",
        "release:slake:x",
        "tfds:a/b:train",
        "rocov3",
    ],
)
def test_no_such_source(tmp_path, spec):
    with pytest.raises(ValueError, match="expected|not built") as e:
        rows_of(spec, data_dir=tmp_path)
    assert spec.split(":")[-1] in str(e.value) or "tfds" in str(e.value) or "a/b" in str(e.value)


def test_named_columns_and_max_rows(tmp_path):
    path = write(tmp_path / "t.csv", "Key,Text\na,A cyst\nb,A mass\nc,A clot\n")
    rows, _ = rows_of(path, id_column="key", caption_column="TEXT", max_rows=2)
    assert [r.row_id for r in rows] == ["a", "b"]


def test_digests_follow_the_content(tmp_path):
    def digests(*cells):
        text = "image_id,caption,modality,other\n" + ",".join(cells) + "\n"
        return rows_of(write(tmp_path / "t.csv", text))[0][0].digest

    base = digests("a", "A cyst", "CT", "1")
    assert base == digests("a", " A cyst ", "CT", "2")  # nobody is shown the fourth column
    others = [("b", "A cyst", "CT", ""), ("a", "A cysts", "CT", ""), ("a", "A cyst", "MR", "")]
    assert len({base, *(digests(*o) for o in others)}) == 4


def test_release_and_built_set_are_one(tmp_path):
    """The same rows from a release's folder, by split, and from the set that is built of it."""
    folder = fake.write(tmp_path / "raw", fake.release())
    build("medpix2", manual_dir=folder, data_dir=tmp_path / "data", config="caption")
    found, _ = rows_of(f"release:medpix2:{folder}:train")
    built, _ = rows_of("medpix2", data_dir=tmp_path / "data")
    plain = [{r.image_id: (r.fields, r.case_id, r.split, r.digest) for r in rows} for rows in (found, built)]
    assert plain[0] == plain[1] and len(found) > 2
    assert all(r.case_id and r.fields["diagnosis"] for r in found)
    assert found[0].source == "release:medpix2:train"
    everything, _ = rows_of(f"release:medpix2:{folder}")
    assert len(everything) > len(found) and {r.split for r in everything} > {"train"}
    # An image that a second source has again isn't asked about twice.
    both, dropped = rows_of(f"release:medpix2:{folder}:train", "medpix2", data_dir=tmp_path / "data")
    assert both == found and dropped["an image that came before"] == len(built)


@pytest.mark.real_data
def test_real_releases(real_data):
    rows, dropped = rows_of(f"release:medpix2:{real_data}/medpix2")
    assert len(rows) + sum(dropped.values()) == 2050
    assert dropped["placeholder in place of a caption"] == 23  # two of them "in progress"
    rows, dropped = rows_of(f"release:rocov2:{real_data}/rocov2:test")
    assert len(rows) + sum(dropped.values()) == 9927
    assert not any(r.fields["caption"] != r.fields["caption"].strip() for r in rows)
