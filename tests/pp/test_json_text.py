"""The one reader of JSON: what it refuses, and that it reads what Python's reads otherwise."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.pp import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(VALUES, st.booleans())
def test_reads_what_python_writes(value, ascii_only):
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert json_text.parse(text.encode(), "f") == value
    assert json_text.parse(b"\xef\xbb\xbf \n" + text.encode() + b"\r\n", "f") == value


@pytest.mark.parametrize(
    "text, message",
    [
        (b"", "f.json: not valid JSON at line 1 column 1"),
        (b"{}\n{", "f.json: not valid JSON at line 2 column 1"),
        (b'{"a": 1', "not valid JSON"),
        (b"\0" * 512 + b"\n", "nothing but 512 NUL characters, as a power cut leaves them"),
        (b'{"a": 1}\0', "not valid JSON"),
        (b'["\xff"]', "not UTF-8 text at byte 2"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git-LFS pointer"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b'{"a": [' * 60 + b"]}" * 60, "more than 100 levels"),
        (b'{"a": ' + b"1" * 6000 + b"}", "a whole number of 6,000 digits, 1111.*no float holds"),
        (b'{"a": -' + b"1" * 400 + b"}", "a whole number of 400 digits"),
        (b'{"a": 1e999}', "the number 1e999, which no float holds"),
        (b'{"a": NaN}', "NaN, which is not JSON"),
        (b'{"a": [-Infinity]}', "-Infinity, which is not JSON"),
        (b'{"a": ["\\ud800"]}', "half a surrogate pair in 'a'"),
        (b'{"\\uDFFF": 1}', "half a surrogate pair in "),
        (b"[]", "found a list; expected an example"),
        (b"3", "found the number 3; expected an example"),
        (b'"x"', "found a text"),
        (b"null", "found null"),
    ],
)
def test_refusals_name_the_file_and_what_was_expected(text, message):
    with pytest.raises(KeyError, match=message) as e:
        json_text.parse(text, "f.json", "an example", root=dict, error=KeyError)
    assert "f.json" in str(e.value)
    str(e.value).encode()
    assert len(str(e.value)) < 300


def test_a_pair_of_surrogates_is_a_character():
    assert json_text.parse(rb'["\ud83d\ude00"]', "f") == ["😀"]
    assert json_text.parse(rb'["\\ud83d"]', "f") == [r"\ud83d"]
    assert json_text.parse(rb'["\ud800"]', "f", halves=True) == ["\ud800"]


def test_constants_are_read_where_python_wrote_the_file():
    assert json_text.parse(b"[Infinity]", "f", constants=True) == [float("inf")]
    with pytest.raises(ValueError, match="1e400"):
        json_text.parse(b"[1e400]", "f", constants=True)


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"a": "x\u2028y\x85"}\r\n\n{"a": "\x0c"}\n'.replace("\x0c", "\\f").encode())
    assert list(json_text.lines(path, "rows")) == [(1, {"a": "x\u2028y\x85"}), (3, {"a": "\x0c"})]
    path.write_bytes(b'{"a": 1}\n\n{"a": \n')
    with pytest.raises(ValueError, match="a.jsonl, line 3: not valid JSON at column"):
        list(json_text.lines(path, "rows", root=dict))
