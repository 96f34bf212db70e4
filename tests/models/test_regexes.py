"""Regexes mean what they mean to Python, and none takes more than linear time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.models import regexes

NAMES = ("", "a", "b", "ab", "ba", "aab.b", "a.b", "abc", "llm/layers/attn/q", "model.layers.0.q_proj", "model.lm_head")
PIECES = st.recursive(
    st.sampled_from(["a", "b", ".", r"\.", r"\w", r"\d+", "[ab]", "[^a]", "[]a]", "[(|]", "", "^", "$", r"\b", "a|b"]),
    lambda inner: st.one_of(
        st.builds("({})".format, inner),
        st.builds("(?:{})".format, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "{2}", "{1,3}"])),
        st.builds("{}{}".format, inner, inner),
        st.builds("{}|{}".format, inner, inner),
    ),
    max_leaves=6,
)


@given(PIECES, st.text("ab.c", max_size=6) | st.sampled_from(NAMES))
def test_it_matches_as_python_does(regex, name):
    assert regexes.fullmatch(regex, name) == bool(re.fullmatch(regex, name))


@given(PIECES, st.sampled_from("=!"), PIECES, PIECES, st.text("ab.c", max_size=6) | st.sampled_from(NAMES))
def test_a_lookahead_matches_as_pythons_does(before, ahead, inside, after, name):
    """Alternatives aside, which it doesn't take apart."""
    regex = f"(?:{before})(?{ahead}{inside})(?:{after})"
    assert regexes.fullmatch(regex, name) == bool(re.fullmatch(regex, name))


@pytest.mark.parametrize(
    "regex, matched",
    [
        (r"^(model)(?!.*(lm_head|output|emb|wte|shared)).*", ["model.layers.0.q_proj"]),  # as ms-swift writes it
        (r"^(?!.*(?:lm_head|layers\.1)).*(?:q_proj|v_proj).*", ["model.layers.0.q_proj"]),  # as LLaMA-Factory does
        (r"model(?=\.l)\.\w+", ["model.lm_head"]),
        (r"[(?!](?!b)", []),
        (r"\(?!|b", ["b"]),
    ],
)
def test_lookaheads_of_fine_tuning_programs(regex, matched):
    assert [name for name in NAMES if regexes.fullmatch(regex, name)] == matched


@pytest.mark.parametrize(
    "regex",
    [
        "(",
        "a**",
        "[a",
        "(a)\\1",
        "(?<=a)b",
        "(?<!a)b",
        "((?!a)b)",
        "(?!a)b|c",
        "a(?!b)(?!c)d",
        "(?!a)*b",
        "(?!a",
        "a)(?!b)",
    ]
    + ["(?!a)" + "b" * 20_000, "a{1001}", "((a{100}){100}){100}", "(?P<n>a)(?P=n)", "a++", "\ud800", "(?x) a", "\\"],
)
def test_what_it_does_not_know_is_one_sentence(regex):
    with pytest.raises(ValueError, match=r"^is not a regular expression of RE2's syntax .*: .+$") as e:
        regexes.compile(regex)
    assert len(str(e.value)) < 220


@pytest.mark.parametrize(
    "regex",
    [
        r"(([a-z._0-9])+)+$!",
        r"(([a-z._0-9])+)+!",
        r"^(([a-z]+)+)+$(?!b)",
        r"(.*)*(.*)*(.*)*(.*)*x",
        r"(?!(([a-z.0-9])+)+!)(([a-z._0-9])+)+!",
        r"(a|aa)+!",
        r"a{99999999999999999999}",
        "(" * 900 + "a" + ")*" * 900,
        "(?:" * 5000 + "a" + ")" * 5000,
        "|".join(f"(.*{i})*" for i in range(2000)),
        "[" * 3900 + "(?!a)",
    ],
)
def test_none_takes_long(regex):
    """Python's engine would take hours with the first six, and has no room for others."""
    before = time.process_time()
    try:
        pattern = regexes.compile(regex)
        assert not any(pattern.fullmatch(f"base.model.layers.{i}.self_attn.q_projection") for i in range(50))
    except ValueError:
        pass
    assert time.process_time() - before < 20


def test_names_that_are_no_text_match_nothing():
    assert not regexes.fullmatch("a.b", "a\ud800\ud800b") and regexes.fullmatch("a.b", "a\ud800b")
