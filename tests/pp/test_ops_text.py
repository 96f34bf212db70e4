"""Templates, tokens and masks: the strings that the model is trained on and decodes from."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.pp import get_preprocess_fn
from paligemma_med.pp.tokenizer import get_tokenizer

PROMPT = (
    'strfmt("answer en {question}", outkey="prefix")|'
    'tok("tiny", key="prefix", bos="yes")|tok("tiny", key="septok", text="\\n")|'
)
TRAIN = (
    'copy("answer", "suffix")|' + PROMPT + 'tok("tiny", key="suffix", eos="yes")|'
    'masked_concat(["prefix", "septok", "suffix"], outkey="text", mask_ar=[0, 0, 1],'
    " mask_loss=[0, 0, 1])|"
    'tolen({0}, pad_value=0, key="text")|tolen({0}, pad_value=1, key="mask_ar")|'
    'tolen({0}, pad_value=0, key="mask_loss")|keep("text", "mask_ar", "mask_loss")'
)
EVAL = PROMPT + (
    'setdefault("suffix", "")|tok("tiny", key="suffix")|'
    'masked_concat(["prefix", "septok", "suffix"], outkey="text", mask_ar=[0, 0, 1],'
    " mask_input=[1, 1, 1])|"
    'tolen({0}, pad_value=0, key="text")|tolen({0}, pad_value=1, key="mask_ar")|'
    'tolen({0}, pad_value=0, key="mask_input")|keep("text", "mask_ar", "mask_input", "answer")'
)
ROW = {"question": "Is there a mass in the left lung?", "answer": "Yes"}


def train(length):
    return get_preprocess_fn(TRAIN.replace("{0}", str(length)))


def evaluate(length):
    return get_preprocess_fn(EVAL.replace("{0}", str(length)))


@given(question=st.text(max_size=30), answer=st.text(max_size=20))
def test_train_string(question, answer):
    out = train(400)({"question": question, "answer": answer})
    tiny = get_tokenizer("tiny")
    prefix = [2, *tiny.to_int("answer en " + question), *tiny.to_int("\n")]
    suffix = [*tiny.to_int(answer), 1]
    n, m = len(prefix), len(suffix)
    assert set(out) == {"text", "mask_ar", "mask_loss"}
    assert out["text"].tolist() == prefix + suffix + [0] * (400 - n - m)
    assert out["mask_ar"].tolist() == [0] * n + [1] * (400 - n)
    assert out["mask_loss"].tolist() == [0] * n + [1] * m + [0] * (400 - n - m)
    assert all(v.dtype == np.int32 and v.shape == (400,) for v in out.values())


def test_eval_string_holds_no_answer():
    out = evaluate(40)(ROW)
    n = int(out["mask_input"].sum())
    assert out["answer"] == "Yes"
    assert get_tokenizer("tiny").to_str(out["text"]) == "answer en " + ROW["question"] + "\n"
    assert out["text"][n:].tolist() == [0] * (40 - n) and out["text"][n - 1] != 0
    assert out["mask_ar"].tolist() == [0] * n + [1] * (40 - n)
    assert out["mask_input"].tolist() == [1] * n + [0] * (40 - n)


def test_suffix_in_an_eval_row_is_a_leak():
    with pytest.raises(ValueError, match="question_id '5'.*non-empty 'suffix'"):
        evaluate(40)({**ROW, "suffix": "Yes", "question_id": "5"})
    assert evaluate(40)({**ROW, "suffix": ""})["text"].shape == (40,)
    allowed = EVAL.replace("{0}", "40").replace("mask_input=", "allow_suffix=True, mask_input=")
    text = get_preprocess_fn(allowed)({**ROW, "suffix": "Yes"})["text"]
    assert get_tokenizer("tiny").to_str(text).endswith("\nYes")


@pytest.mark.parametrize("missing", [0, 1, 5])
def test_truncation_is_recorded(missing):
    full = int(train(400)(ROW)["mask_ar"].argmax()) + len(get_tokenizer("tiny").to_int("Yes")) + 1
    out = train(full - missing)(ROW)
    assert out.get("_truncated", 0) == missing
    assert ("_truncated" in out) == (missing > 0)
    if missing:
        assert out["_truncated"].dtype == np.int32
        assert 1 not in out["text"]  # the EOS is gone, which is why it has to be counted


def test_truncated_is_the_maximum_over_keys():
    pp = "tolen(3, key='a')|tolen(3, key='b')|tolen(3, key='c')|keep('a')"
    data = {"a": np.arange(5), "b": np.arange(9), "c": np.arange(4)}
    assert get_preprocess_fn(pp)(data)["_truncated"] == 6


@given(st.lists(st.integers(0, 99), max_size=9), st.integers(1, 9), st.booleans())
def test_tolen(values, length, sticky):
    out = get_preprocess_fn(f"tolen({length}, sticky_end={sticky}, pad_value=7, key='a')")(
        {"a": np.array(values, np.int32)}
    )["a"]
    assert len(out) == length and out.dtype == np.int32
    if len(values) <= length:
        assert out.tolist() == values + [7] * (length - len(values))
    else:
        last = values[-1] if sticky else values[length - 1]
        assert out.tolist() == values[: length - 1] + [last]


def test_tolen_odd_arguments():
    data = {"a": np.arange(3), "p": np.array([9, 8])}
    assert get_preprocess_fn("tolen(None, key='a')")(data)["a"].tolist() == [0, 1, 2]
    pp = "tolen(5, pad_key='p', inkey='a', outkey='b')"
    assert get_preprocess_fn(pp)(data)["b"].tolist() == [0, 1, 2, 9, 9]
    with pytest.raises(ValueError, match="pad_value"):
        get_preprocess_fn("tolen(5, key='a')")(data)
    with pytest.raises(ValueError, match="key="):
        get_preprocess_fn("tolen(5)")
    with pytest.raises(ValueError, match="1-D"):
        get_preprocess_fn("tolen(5, key='a')")({"a": np.zeros((2, 2))})


def test_strfmt_fills_plain_fields():
    data = {
        "q": "is {it} {0}?",
        "n": np.int64(3),
        "f": 0.5,
        "v": np.array([1, 2]),
        "b": b"caf\xc3\xa9",
    }
    fn = get_preprocess_fn('strfmt("{{x}} {q} {n} {f} {v} {b}", outkey="t")')
    assert fn(data)["t"] == "{x} is {it} {0}? 3 0.5 [1 2] café"


@pytest.mark.parametrize(
    "template",
    [
        "{q.__class__}",
        "{q[0]}",
        "{}",
        "{0}",
        "{q!r}",
        "{q:>9}",
        "{q:{n}}",
        "{q.real}",
        "{",
        "a } b",
    ],
)
def test_strfmt_refuses_anything_but_plain_fields(template):
    with pytest.raises(ValueError):
        get_preprocess_fn(f"strfmt({template!r}, outkey='t')")


def test_strfmt_missing_or_unprintable():
    fn = get_preprocess_fn("strfmt('answer en {question}', outkey='t')")
    with pytest.raises(ValueError, match=r"no key 'question'.*\['query'\]"):
        fn({"query": "q"})
    for bad in (None, {"a": 1}, b"\xff"):
        with pytest.raises(ValueError):
            fn({"question": bad})


def test_lower():
    fn = get_preprocess_fn("lower(key='a')")
    assert fn({"a": "Ödem LINKS"})["a"] == "ödem links"
    assert fn({"a": ["A", "b"]})["a"] == ["a", "b"]
    with pytest.raises(ValueError, match="one string, found int"):
        fn({"a": 3})


def test_strjoin():
    assert get_preprocess_fn("strjoin(', ', key='a')")({"a": ["x", "y"]})["a"] == "x, y"
    assert get_preprocess_fn("strjoin(', ', key='a')")({"a": []})["a"] == ""
    with pytest.raises(ValueError, match="one string"):
        get_preprocess_fn("strjoin(', ', key='a')")({"a": "xy"})


def test_tok_marks():
    ids = get_tokenizer("tiny").to_int("the left lung")
    out = get_preprocess_fn(
        "tok('tiny', inkey='a', outkey='b', bos='yes', eos='yes')|tok('tiny', inkey='a', outkey='c')"
    )({"a": "the left lung"})
    assert out["b"].tolist() == [2, *ids, 1] and out["b"].dtype == np.int32
    assert out["c"].tolist() == ids and out["a"] == "the left lung"


@pytest.mark.parametrize("source", ["key='a'", "key='a', text='the left lung and the liver'"])
def test_tok_length(source):
    data = {"a": "the left lung and the liver"}
    ids = get_tokenizer("tiny").to_int(data["a"])
    n = len(ids)
    for eos, last in (("yes", ids[2]), ("sticky", 1)):
        out = get_preprocess_fn(f"tok('tiny', 3, eos='{eos}', {source})")(data)
        assert out["a"].tolist() == [*ids[:2], last]
        assert out["_truncated"] == n + 1 - 3
    out = get_preprocess_fn(f"tok('tiny', {n + 4}, eos='sticky', {source})")(data)
    assert out["a"].tolist() == [*ids, 1, 0, 0, 0] and "_truncated" not in out


@pytest.mark.parametrize(
    "pp, message",
    [
        ("tok('tiny', key='a', bos='maybe')", "bos"),
        ("tok('tiny', key='a', eos=True)", "eos"),
        ("tok('tiny')", "key="),
        ("tok('tiny', inkey='a')", "key="),
        ("tok('tiny', text='x', inkey='a', outkey='b')", "either text= or inkey="),
        ("tok('tinny', key='a')", "unknown tokenizer"),
        ("masked_concat(['a', 'b'], mask_ar=[0])", "mask_ar has 1 values for 2 keys"),
        ("masked_concat(['a', 'b'], image_after='c')", r"image_after='c' must be one of the keys \['a', 'b'\], once"),
        ("masked_concat(['a', 'a'], image_after='a')", "image_after='a' must be one of the keys"),
        ("tok('tiny', key='a', special='yes')", "special='yes' is for a constant"),
        ("tok('tiny', key='a', special=True)", "special must be 'no', 'yes' or 'tokensets', found True"),
        ("blip_text(0)", "max_words must be a whole number, 1 or more, found 0"),
    ],
)
def test_mistakes_in_arguments(pp, message):
    with pytest.raises(ValueError, match=message):
        get_preprocess_fn(pp)


def test_text_constant_with_outkey():
    out = get_preprocess_fn("tok('tiny', text='\\n', outkey='sep')")({})
    assert out["sep"].tolist() == get_tokenizer("tiny").to_int("\n")


@pytest.mark.parametrize("bad", [["a", "b"], 3, None])
def test_tok_wants_one_string(bad):
    with pytest.raises(ValueError, match="key 'a' must be one string"):
        get_preprocess_fn("tok('tiny', key='a')")({"a": bad})


def test_masked_concat_wants_tokens():
    fn = get_preprocess_fn("masked_concat(['a', 'b'], mask_ar=[0, 1])")
    with pytest.raises(ValueError, match="key 'b' must hold tokens.*tok it first"):
        fn({"a": np.arange(2), "b": "text"})


def test_masked_concat_may_write_over_its_input():
    out = get_preprocess_fn("masked_concat(['a', 'b'], outkey='a', m=[5, 6])")(
        {"a": np.array([1, 2]), "b": np.array([3])}
    )
    assert out["a"].tolist() == [1, 2, 3] and out["m"].tolist() == [5, 5, 6]


def test_where_the_image_stands():
    pp = "masked_concat(['a', 'b', 'c'], m=[1, 1, 1], image_after='b')|tolen({}, pad_value=0, key='text')"
    data = dict(a=np.arange(3), b=np.arange(2), c=np.arange(4))
    out = get_preprocess_fn(pp.format(5))(data)
    assert out["image_at"] == 5 and out["image_at"].dtype == np.int32 and out["text"].tolist() == [0, 1, 2, 0, 1]
    assert "image_at" not in get_preprocess_fn("masked_concat(['a'], m=[1])")(data)
    with pytest.raises(ValueError, match="the image stands behind 5 tokens of text, but the text is cut to 4"):
        get_preprocess_fn(pp.format(4))(data)


def test_special_tokens_are_those_of_constants():
    text = "x</s>"  # so it is called in tiny's file
    fn = get_preprocess_fn(f"tok('tiny', text='{text}', special='yes', key='a')|tok('tiny', key='b')")
    out = fn({"b": text})
    tiny = get_tokenizer("tiny")
    assert out["a"].tolist() == [*tiny.to_int("x"), tiny.eos_token]
    assert out["b"].tolist() == tiny.to_int(text) and tiny.to_str(out["b"]) == text


def test_strip():
    assert get_preprocess_fn("strip(inkey='a', outkey='b')")({"a": " \n a b\n"}) == {"a": " \n a b\n", "b": "a b"}


def test_blip_text():
    """Expected texts are worked out by hand from LAVIS' rules."""
    fn = get_preprocess_fn("blip_text(4, key='a')")
    for text, expected in [
        ("Is it (the LUNG)?", "is it the lung"),
        ("a.b: c~d;  e f", "a b c d"),
        ("What's 50%-wide?\n", "what's 50%-wide?"),
        ("  one\n\ntwo  ", "one two"),
    ]:
        assert fn({"a": text})["a"].replace("lung ?", "lung") == expected, text
