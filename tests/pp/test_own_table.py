"""Own tables: what is read of each format, what is made up, and what becomes of rows that are wrong."""

import json
import pickle

import pytest

from paligemma_med.pp import own_table, tables

HEAD = ("image", "question", "answer")
ROWS = [("0.png", "Where is the lesion in the Hämatom?", "left; lower"), ("1.png", 'two\nlines, "quoted"', "Yes.")]


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    (folder / "deep").mkdir(parents=True)
    for i in range(3):
        (folder / f"{i}.png").write_bytes(bytes([i]) * (i + 1))
    return folder


def cells(rows, delimiter, end="\n"):
    quoted = ['"' + c.replace('"', '""') + '"' for row in rows for c in row]
    lines = [delimiter.join(quoted[i : i + len(rows[0])]) for i in range(0, len(quoted), len(rows[0]))]
    return end.join(lines) + end


def write(path, kind, rows=ROWS, head=HEAD):
    if kind == "xlsx":
        import openpyxl

        book = openpyxl.Workbook()
        for row in [head, *rows]:
            book.active.append(row)
        book.save(path)
    elif kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([dict(zip(head, row)) for row in rows]), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(head, row))) + "\n" for row in rows))
    else:
        delimiter, encoding, end = kind
        path.write_bytes(cells([head, *rows], delimiter, end).encode(encoding))
    return path


KINDS = [
    *("xlsx", "parquet", "jsonl", (",", "utf-8", "\n"), (";", "utf-8-sig", "\r\n"), ("\t", "utf-16", "\r\n")),
    *((";", "cp1252", "\r\n"), (",", "utf-16-le", "\n"), (",", "utf-16-be", "\n")),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_format_gives_the_same_rows(tmp_path, films, kind):
    suffix = kind if isinstance(kind, str) else "csv"
    path = write(tmp_path / f"q.{suffix}", kind)
    table = own_table.open_table(path, images=films)
    assert [table[i] for i in range(2)] == [
        dict(zip(HEAD, ROWS[0])) | dict(question_id="row1", image_id="0.png", answer_type="OPEN"),
        dict(zip(HEAD, ROWS[1])) | dict(question_id="row2", image_id="1.png", answer_type="CLOSED"),
    ]
    assert table.made == ("question_id", "image_id", "answer_type") and not table.dropped
    assert [table.image_bytes(i) for i in (0, 1, -1)] == [b"\0", b"\1\1", b"\1\1"]
    assert table.image_path(0) == films / "0.png"
    copy = pickle.loads(pickle.dumps(table))
    assert copy[1] == table[1] and copy.digest == table.digest


def test_wrong_rows_cost_themselves_alone(tmp_path, films):
    path = tmp_path / "q.csv"
    lines = ["file;Frage;answer", "0.png;a?;b", "9.png;a?;b", "../0.png;a?;b", "0.png; ;b", "0.png;a?", ";a?;b"]
    path.write_text("\n".join([*lines, "deep;a?;b", f"{films}/1.png;a?;", "/etc/passwd;a?;b"]))
    table = own_table.open_table(path, images=films, columns="image=file,question=frage".replace("frage", "Frage"))
    assert table.dropped == [
        (3, "no image file: 9.png"),
        (4, "the path of its image leaves the folder: ../0.png"),
        (5, "empty question"),
        (6, tables.OTHER_WIDTH),
        (7, "names no image"),
        (8, "a folder without images; those in folders below it don't count: deep"),
        (10, "the path of its image leaves the folder: /etc/passwd"),
    ]
    assert len(table) == 2 and table.read == 9 and [table.line(i) for i in range(2)] == [2, 9]
    assert table[1]["question_id"] == "row8" and table[1]["answer"] == ""  # the number doesn't change with mended rows
    text = "\n".join(table.summary())
    assert "7 of 9 rows can't be used" in text and "no image file: 1 (line 3; first: 9.png)" in text
    table = own_table.open_table(path, images=films, columns=dict(image="file", question="Frage"), needs=("answer",))
    assert (9, "empty answer") in table.dropped


def test_choices_letters_and_splits(tmp_path, films):
    path = tmp_path / "q.jsonl"
    rows = [
        dict(choices=["a", "b"], answer="B", split="dev"),
        dict(choices=["Left", "right", "C"], answer="left", split="Train"),
        dict(choices=["a", "b"], answer="c", split="test"),
        dict(choices="x|y", answer="x", answer_letter="b", split="", question_id="q"),
        dict(answer="no", split="own", question_id="q"),
        dict(answer="no", split="own", question_id="q"),
    ]
    path.write_text("".join(json.dumps({"image": "0.png", "question": "?!a", **r}) + "\n" for r in rows))
    table = own_table.open_table(path, images=films)
    found = [
        (r["answer"], r["answer_letter"], r["answer_type"], r["choice_a"]) for r in map(table.__getitem__, range(4))
    ]
    assert found == [
        ("b", "B", "CLOSED", "a"),
        ("Left", "A", "CLOSED", "Left"),
        ("y", "B", "CLOSED", "x"),
        ("no", "", "CLOSED", ""),
    ]
    assert table.dropped == [
        (3, "the answer is none of its choices: c"),
        (6, "its question_id stands in an earlier row"),
    ]
    assert table.splits == ("validate", "train", "own") and table.split_codes.tolist() == [0, 1, -1, 2]


def image_parquet(path, groups, rows=6):
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = [dict(bytes=bytes([i // 2]) * 50, path=None) for i in range(rows)]
    texts = [f"q{i}?" for i in range(rows)]
    pq.write_table(pa.table(dict(image=images, question=texts, answer=texts)), path, row_group_size=groups)


@pytest.mark.parametrize("limit", [0, 2**20])
def test_images_in_a_parquet_file(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(own_table.table_forms, "_GROUP", limit)
    image_parquet(tmp_path / "a.parquet", 2)
    table = own_table.open_table(tmp_path / "a.parquet")
    copy = pickle.loads(pickle.dumps(table))
    for t in (table, copy):
        assert [t.image_bytes(i) for i in (5, 0, 3)] == [b"\2" * 50, b"\0" * 50, b"\1" * 50]
    assert table[0]["image_id"] == table[1]["image_id"] != table[2]["image_id"]
    assert table.image_keys[0] == table.image_keys[1] != table.image_keys[2]
    assert table.image_path(0) is None


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("a.csv", b"image,question\n", "has no rows"),
        ("a.csv", b"bild,question\n0.png,a\n", "no column image; found bild, question. If it has another name"),
        ("a.jsonl", b'{"bild": 1}\n[1]\n', "none of its 2 rows can be used; the first, line 1: no question"),
        ("a.csv", b"image,question\n0.png,\xc3\xa4\n0.png,\xe4\n", r"a.csv line 3: byte 7 is not UTF-8.*in line 2"),
        ("a.csv", b"\xef\xbb\xbfimage,question\n0.png,\xe4\n", r"line 2: byte 7 is not UTF-8.*by the mark"),
        ("a.csv", b"image,question\n0.png,\x81\n", "a.csv line 2: byte 7 is neither UTF-8 nor Windows-1252"),
        ("a.csv", b"image,question\n0.png,\0\n", "line 2: NUL"),
        ("a.csv", b"\xff\xfei\0,\0\n\0a\0\0\xd8b\0", "not UTF-16"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\n", "git-LFS pointer"),
        ("a.xlsx", b"PK", "no .xlsx workbook"),
        ("a.parquet", b"PAR1", "no Parquet file"),
        ("a.ods", b"", "expected a table that ends in .csv"),
    ],
)
def test_what_is_no_table_is_one_sentence(tmp_path, films, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says) as e:
        own_table.open_table(tmp_path / name, images=films)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("columns", ["image", "image=", "image=a,question=a", {"image": 3}, "image=nothere"])
def test_columns_that_say_nothing(tmp_path, films, columns):
    path = write(tmp_path / "q.csv", (",", "utf-8", "\n"))
    with pytest.raises(ValueError, match="columns"):
        own_table.open_table(path, images=films, columns=columns)


def test_a_table_changed_meanwhile_is_told(tmp_path, films):
    path = write(tmp_path / "q.csv", (",", "utf-8", "\n"))
    table = own_table.open_table(path, images=films)
    path.write_text("")
    with pytest.raises(ValueError, match="q.csv line 2: can't be read again"):
        table[0]


def test_a_missing_reader_is_named(tmp_path, films, monkeypatch):
    (tmp_path / "a.xlsx").write_bytes(b"")

    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(own_table.table_forms.importlib, "import_module", absent)
    with pytest.raises(ValueError, match=r"openpyxl.*not installed: pip install 'paligemma_med\[tables\]'"):
        own_table.open_table(tmp_path / "a.xlsx", images=films)
