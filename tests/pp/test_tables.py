"""Tables that people and spreadsheets write."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.pp import tables

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"  # where str.splitlines splits


def read(text, **kw):
    columns, rows = tables.read(io.StringIO(text, newline=""), "t.csv", **kw)
    return columns, list(rows)


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_the_delimiter_is_the_headers(delimiter, end):
    text = end.join(
        delimiter.join(cells) for cells in [("question", "Answer"), ("Is it?", '"one, two; three"'), ("", "")]
    )
    assert read(text + end) == (["question", "Answer"], [(2, {"question": "Is it?", "Answer": "one, two; three"})])


def test_delimiters_in_a_quoted_name_do_not_count():
    assert read('"size, in cm";n\n"1,5";2\n') == (["size, in cm", "n"], [(2, {"size, in cm": "1,5", "n": "2"})])


def test_excels_own_line_and_blank_lines_before_the_header():
    assert read("sep=;\n\na;b,c,d\n1;2\n") == (["a", "b,c,d"], [(4, {"a": "1", "b,c,d": "2"})])
    assert read("") == read("\n \n") == read("sep=;\n") == ([], [])
    assert read("a,b\n") == (["a", "b"], [])


def test_characters_that_other_readers_split_at_stay_in_their_cells():
    cell = f"A lesion.{SEPARATORS}No effusion."
    assert read(f"a,b\n{cell},2\n") == (["a", "b"], [(2, {"a": cell, "b": "2"})])
    assert read(f'a;b\n"{cell}\nand";2\n3;4\n')[1][1] == (4, {"a": "3", "b": "4"})


@given(st.lists(st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=2, max_size=2), max_size=4))
def test_what_csv_writes_is_read_again(rows):
    import csv

    f = io.StringIO(newline="")
    csv.writer(f, delimiter=";", quoting=csv.QUOTE_ALL).writerows([("a", "b"), *rows])
    found = [list(row.values()) for _, row in read(f.getvalue())[1]]
    assert found == [row for row in rows if "".join(row).strip()]


@pytest.mark.parametrize(
    "text, says",
    [
        ('a,b\n1,"2\n3,4\n', "t.csv line 2: a quote opens there and is never closed"),
        ("a,B,b\n", "t.csv line 1: the column b stands there twice"),
        ('a,"b"c\n1,2\n', "t.csv line 1: a line that is no CSV; expected a table's header"),
    ],
)
def test_what_makes_the_rest_unreadable_ends_it(text, says):
    with pytest.raises(UserWarning, match=says):
        read(text, error=type("Error", (UserWarning,), {}))


def test_a_line_that_is_no_row_is_told_and_the_next_ones_are_read():
    rows = read(f'a,b\n1\n"1"2,3\n{"x" * 131_073},1\n{"x" * 131_072},1\n')[1]
    assert [row if isinstance(row, str) else len(row["a"]) for _, row in rows] == [
        tables.OTHER_WIDTH,
        tables.NO_CSV,
        tables.TOO_LONG,
        131_072,
    ]
    assert [line for line, _ in rows] == [2, 3, 4, 5]


def test_stray_quotes_in_tables_with_tabs():
    text = 'a\tb\n"1\t2\n"say ""x"""\t"\n'
    assert read(text, quotes=False)[1] == [(2, {"a": '"1', "b": "2"}), (3, {"a": 'say "x"', "b": '"'})]


def test_a_file_in_which_each_line_must_be_right(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("\ufeffImage;Other;QUESTION\na.png;1;Where?\n".encode())
    assert tables.read_file(path, ("image", "question")) == [
        (2, {"image": "a.png", "Other": "1", "question": "Where?"})
    ]
    for content, says in (
        (b"image\nx\n", "t.csv: no column question; found image"),
        (b"image,question\na,b\nc\n", "t.csv line 3: another number of cells"),
        (b"image,question\n\xff,b\n", "not UTF-8 .* save it as CSV UTF-8"),
        (b"", "no column image and question; found none"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            tables.read_file(path, ("image", "question"))
