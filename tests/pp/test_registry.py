"""The pp mini-language: what parses, what is refused, and how errors point at their place."""

import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.pp import get_preprocess_fn, registry

literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(literals, max_size=3), literals)
def test_literals_survive_parsing(args, value):
    text = f"op({', '.join([*map(repr, args), f'name={value!r}'])})"
    assert registry.parse_call(text) == ("op", tuple(args), {"name": value})


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_split_ignores_bars_in_quoted_strings(texts):
    sections = [f"op({text!r}, k=[{text!r}])" for text in texts]
    assert registry.split("|".join(sections)) == sections


def test_bar_and_quotes_inside_a_template():
    fn = get_preprocess_fn("""strfmt("a|b '{x}' \\" | c", outkey="y")|copy("y", "z")""")
    assert fn({"x": "1|2"})["z"] == "a|b '1|2' \" | c"


def test_empty_sections_are_skipped():
    data = {"a": "X"}
    assert get_preprocess_fn("")(data) == data
    assert get_preprocess_fn('|lower(key="a")||')(data) == {"a": "x"}


def test_string_may_span_lines():
    assert get_preprocess_fn('lower(key="a")|\n  copy("a",\n "b")')({"a": "X"}) == {
        "a": "x",
        "b": "x",
    }


@pytest.mark.parametrize(
    "pp, message",
    [
        ("resze(4)", "did you mean resize"),
        ("decod", "did you mean decode"),
        ("zzzzqqqq", "known: .*decode.*value_range"),
        ("resize(__import__('os'))", "not a literal"),
        ("resize(size)", "'size' is not a literal"),
        ("resize(2 * 4)", "not a literal"),
        ("resize(1 | 2)", "not a literal"),
        ("resize([n for n in (1, 2)])", "not a literal"),
        ('strfmt(f"{1}")', "not a literal"),
        ("resize(*[1])", "not a literal"),
        ("resize(**{'size': 1})", r"\*\*"),
        ("os.system('ls')", "name or name"),
        ("(lambda: 1)()", "name or name"),
        ("1 + 1", "name or name"),
        ("resize(4", "not of the form"),
        ("lower('a", "ends inside"),
        ("a\0b", "not of the form"),
        ("resize(4, colour=1)", r"colour.*its arguments are resize\(size"),
        ("resize()", "missing a required argument: 'size'"),
        ("resize(4)|keep('a')|tolen(-1, key='a')", r"tolen\(-1, key='a'\)"),
    ],
)
def test_mistakes_in_the_string(pp, message):
    with pytest.raises(ValueError, match=message):
        get_preprocess_fn(pp)


@pytest.mark.parametrize("pp", [None, 3, ["decode"]])
def test_not_a_string(pp):
    with pytest.raises(ValueError, match="pp string is expected"):
        get_preprocess_fn(pp)


def test_input_dict_is_not_changed():
    data = {"a": "X", "b": np.arange(3), "c": ["y"]}
    before = dict(data)
    fn = get_preprocess_fn("lower(key='a')|copy('a','d')|tolen(2, key='b')|lower(key='c')|drop('c')")
    fn(data)
    assert data == before and data["b"] is before["b"] and data["c"] == ["y"]


def test_errors_name_op_and_row():
    fn = get_preprocess_fn("copy('x', 'y')|lower(key='z')")
    with pytest.raises(ValueError, match=r"lower\(key='z'\).*question_id '17', image_id 'xm3'.*'z'"):
        fn({"x": 1, "question_id": "17", "image_id": "xm3"})


def test_missing_key_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no key 'suffix'.*\['answer', 'question'\]"):
        get_preprocess_fn("lower(key='suffix')")({"question": "q", "answer": "a"})


@pytest.mark.parametrize(
    "op",
    ["inception_crop(2)", "brightness(0.1)", "contrast(0.5, 1.5)", "choice_no_replacement('l')"],
)
def test_random_op_without_rng(op):
    data = {"image": np.zeros((4, 4, 3), np.uint8), "l": ["a", "b"]}
    with pytest.raises(ValueError, match="random and got no rng"):
        get_preprocess_fn(op)(data)
    get_preprocess_fn(op)(data, np.random.default_rng(0))


def test_pickles_small_and_works_again():
    fn = get_preprocess_fn("tok('tiny', key='a', bos='yes')")
    data = pickle.dumps(fn)
    assert len(data) < 300
    np.testing.assert_array_equal(pickle.loads(data)({"a": "the lung"})["a"], fn({"a": "the lung"})["a"])


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="registered already"):
        registry.register("decode")(lambda: None)


def test_key_arguments():
    data = {"a": "A", "b": "B"}
    assert get_preprocess_fn("lower(key='a')")(data) == {"a": "a", "b": "B"}
    assert get_preprocess_fn("lower(inkey='a', outkey='c')")(data) == {"a": "A", "b": "B", "c": "a"}
    assert get_preprocess_fn("lower")({"text": "T"}) == {"text": "t"}


def test_no_code_runs(tmp_path):
    target = tmp_path / "made"
    with pytest.raises(ValueError):
        get_preprocess_fn(f"lower(key=open({os.fspath(target)!r}, 'w'))")
    assert not target.exists()
