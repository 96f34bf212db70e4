"""Replies in every form come out as the same pairs; any text at all is read, in linear time."""

import dataclasses
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import qa_files
from tests.linear import assert_linear
from tools.synthesize_qa import parse
from tools.synthesize_qa.parse import Pair, read_reply

PAIRS = (
    Pair("What is shown?", "A cyst."),
    Pair('Is "it" {large}?', "No"),
    Pair("Where is it [exactly]?", "In the left, upper lobe: apical"),
)


def _objects(pairs=PAIRS):
    return [{"question": p.question, "answer": p.answer} for p in pairs]


def _form(pattern, pairs=PAIRS):
    return "\n".join(pattern.format(n=n, q=p.question, a=p.answer) for n, p in enumerate(pairs, 1)).strip()


FORMS = {
    "json": [
        json.dumps({"pairs": _objects()}),
        json.dumps({"pairs": _objects()}, indent=2),
        json.dumps(_objects()),
        "\n".join(map(json.dumps, _objects())),
        json.dumps({"data": {"qa": _objects()[:1]}, "more": _objects()[1:]}),
        json.dumps([{"Q": p.question, "A": p.answer} for p in PAIRS]),
        json.dumps(
            {
                f"{k}{n}": v
                for n, p in enumerate(PAIRS, 1)
                for k, v in (("Question ", p.question), ("Answer ", p.answer))
            }
        ),
        json.dumps({p.question: p.answer for p in PAIRS}),
        json.dumps({"pairs": _objects()})[:-2] + ",],}",
        json.dumps(
            [{"question": f"Q{n}: {p.question}", "answer": f"A{n}: {p.answer}"} for n, p in enumerate(PAIRS, 1)]
        ),
    ],
    "json fenced": [
        "```json\n" + json.dumps(_objects()) + "\n```",
        "Here:\n\n```\n" + json.dumps({"pairs": _objects()}, indent=1) + "\n```\nBye!",
    ],
    "json in chatter": ['Sure, my 3 "pairs": ' + json.dumps(_objects()) + " I hope [this] helps."],
    "json cut off": [
        json.dumps({"pairs": _objects()})[:-1],
        json.dumps({"pairs": [*_objects(), {"question": "Who?", "answer": "Me"}]})[:-6],
        json.dumps({"pairs": [*_objects(), {"question": "Who?", "answer": "Me"}]})[:-26],
    ],
    "json broken": [
        json.dumps(_objects()).replace("}, {", "} {"),
        json.dumps(_objects()).replace('", "answer"', '" "answer"'),
    ],
    "Q:": [
        _form("Q: {q}\nA: {a}\n"),
        _form("{n}. Q: {q}\n   A: {a}"),
        _form("Q: {q} A: {a}"),
        _form("QUESTION: {q}\nAnswer: {a}\n"),
        _form("- Question: {q}\n- Answer: {a}\n"),
    ],
    "**Q:**": [_form("**Q:** {q}\n**A:** {a}\n")],
    "**Q: …**": [_form("**Q: {q}**\nA: {a}\n")],
    "Q1:": [
        _form("**Q{n}:** {q}\n**A{n}:** {a}\n"),
        _form("Question {n}: {q}\nAnswer {n}: {a}\n"),
        _form("Q{n}. {q}\nA{n}. {a}\n"),
        _form("### Q{n}: {q}\nA: {a}\n"),
        _form("**Question {n}:** {q} **Answer:** {a}"),
    ],
    "heading": [
        _form("### Question {n}\n{q}\n### Answer {n}\n{a}\n"),
        _form("**Question {n}**\n{q}\n**Answer**\n{a}\n"),
    ],
    "? A:": [_form("{n}. {q}\n   A: {a}\n"), _form("**{q}**\nAnswer: {a}\n"), _form("{n}) {q} \n- **Answer:** {a}\n")],
    "1.": [
        _form("{n}. {q}\n{a}\n"),
        _form("{n}. {q} {a}"),
        _form("{n}) **{q}**\n   - {a}\n"),
        _form("{n}. {q}\n\n{a}\n"),
        "Here are the pairs:\n\n" + _form("{n}. {q}\n   {a}\n"),
        "Sure! Three pairs:\n" + _form("{n}. **{q}** {a}"),
    ],
    "unmarked": [_form("{q}\n{a}\n"), _form("**{q}**\n\n{a}\n"), "The pairs:\n\n" + _form("{q}\n{a}")],
}


@pytest.mark.parametrize("form, text", [(f, t) for f, texts in FORMS.items() for t in texts], ids=lambda x: x[:30])
def test_the_same_pairs_in_each_form(form, text):
    reply = read_reply(text)
    assert reply.pairs == PAIRS
    assert reply.form == form and reply.problem == ""
    # What is cut off is told, and nothing else of a good reply is.
    cut_object = form == "json cut off" and text.count("question") > 3
    assert [r for r, _ in reply.rejected] == [parse.CUT] * cut_object


def test_what_a_reply_holds_besides_text_is_text_or_refused():
    objects = [
        {"question": "Is it?", "answer": True},
        {"question": "Which one?", "answer": 3},
        {"question": "Both?", "answer": ["a", "b"]},
        {"question": "Nothing?", "answer": None},
        {"question": "…", "answer": "..."},
        {"question": "Ends?", "answer": "**"},
        {"question": "Is it?", "answer": "yes."},
        {"question": "Tidy\n is\tit?", "answer": " **A** cyst\x00 "},
    ]
    reply = read_reply(json.dumps(objects))
    assert [(p.question, p.answer) for p in reply.pairs] == [
        ("Is it?", "Yes"),
        ("Which one?", "3"),
        ("Tidy is it?", "A cyst"),
    ]
    assert [r for r, _ in reply.rejected] == [
        "question without an answer",
        "question without an answer",
        "empty question",
        "empty answer",
        parse.AGAIN,
    ]


@pytest.mark.parametrize("pattern", ["Q: {q}\nA: {a}\n", "{n}. {q}\n{a}\n", "{q}\n{a}\n"])
def test_a_pair_that_the_end_cut_off_is_not_used(pattern):
    """Wherever a reply ends: each pair that is used is whole."""
    text = _form(pattern) + "\n"
    for end in range(len(text)):
        reply = read_reply(text[:end], cut=True)
        assert reply.pairs == PAIRS[: len(reply.pairs)], text[:end]
    assert read_reply(text, cut=True).pairs == PAIRS
    assert read_reply(text[:-2]).pairs[-1] != PAIRS[-1]  # if it weren't told


def test_json_cut_off_anywhere_gives_the_whole_objects():
    text = json.dumps({"pairs": _objects()})
    ends = [text.index("}", text.index(json.dumps(p.answer))) for p in PAIRS]
    for end in range(len(text)):
        assert len(read_reply(text[:end], cut=True).pairs) == sum(e < end for e in ends)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "it was empty"),
        (" \n ", "it was empty"),
        ("I can't help with that.", "it held no question with an answer"),
        ("{}", "it held no question with an answer"),
        ("1. What?\n2. Why?", "it held no usable pair: question without an answer"),
        ('{"question": "What?"}', "it held no usable pair: question without an answer"),
        ('[{"question": "Wh', f"it held no usable pair: {parse.CUT}"),
    ],
)
def test_why_a_reply_cannot_be_used(text, problem):
    assert read_reply(text) == dataclasses.replace(read_reply(text), pairs=(), form="", problem=problem)


@pytest.mark.parametrize("text", [FORMS["json"][0], FORMS["Q:"][0], FORMS["1."][0]])
def test_thoughts_are_no_pairs(text):
    draft = "<think>\nQ: A draft?\nA: Yes\n\n" + json.dumps({"question": "Eh?", "answer": "No"})
    assert read_reply(f"{draft}\n</think>\n\n{text}").pairs == PAIRS
    assert read_reply(draft, cut=True).problem == "it was empty"


# --- Multiple choice ---

OPTIONS = ("Liver", "The spleen", "C. difficile", "Left kidney")


FOUR, REFERS = "other than four different options", "option that refers to others"


def _choice(**kw):
    return json.dumps({"pairs": [{"question": "Which organ?", "choices": OPTIONS, **kw}]})


def _lines(pattern, joint="\n"):
    return joint.join(pattern.format(x=x, y=x.lower(), o=o) for x, o in zip("ABCD", OPTIONS, strict=True))


def _flat(pattern):
    """Options as keys of the object."""
    found = {pattern.format(x=x, y=x.lower()): o for x, o in zip("ABCD", OPTIONS, strict=True)}
    return json.dumps({"question": "Which organ?", **found, "answer": "B"})


CHOICES = [
    _choice(answer="B"),
    _choice(answer="B."),
    _choice(answer="(b)"),
    _choice(answer="B) The spleen"),
    _choice(answer="the spleen"),
    _choice(answer="Option B"),
    _choice(correct_answer="B"),
    _choice(answer="The spleen", answer_letter="B"),
    _choice(choices=dict(zip("ABCD", OPTIONS, strict=True)), answer="B"),
    _choice(choices=_lines("{x}. {o}").split("\n"), answer="B: The spleen"),
    _choice(answer="B").replace("choices", "options"),
    _flat("{x}"),
    _flat("choice_{y}"),
    _flat("Option {x}"),
    f"Which organ?\n{_lines('{x}. {o}')}\nAnswer: B",
    f"Hello:\n\n**Question 1:** Which organ?\n{_lines('- **{x})** {o}')}\n\n"
    "**Correct answer:** B) The spleen\n\nExplanation: no.",
    f"1. Which organ?\n{_lines('   ({y}) {o}')}\nThe correct answer is B.",
    f"Question 1:\nWhich organ?\n{_lines('Option {x}: {o}')}\nA: B",
    f"Q: Which organ? {_lines('{x}) {o},', ' ')} Answer: The spleen",
]


@pytest.mark.parametrize("text", CHOICES)
def test_multiple_choice_in_each_form(text):
    reply = read_reply(text, "choices")
    assert reply.pairs == (Pair("Which organ?", "The spleen", OPTIONS, "B"),)
    assert not reply.problem and reply.pairs[0].answer == reply.pairs[0].choices[1]


@pytest.mark.parametrize(
    "kw, reason",
    [
        ({"answer": "E"}, "answer that is none of the options"),
        ({"answer": "Heart"}, "answer that is none of the options"),
        ({"answer": "B) Liver"}, "answer that is none of the options"),
        ({"answer": "B", "correct_answer": "Liver"}, "answer that is none of the options"),
        ({"answer": "A liver"}, "answer that is none of the options"),
        ({}, "question without an answer"),
        ({"answer": "B", "choices": ["a1", "b1", "c1"]}, FOUR),
        ({"answer": "B", "choices": ["a1", "b1", "c1", "d1", "e1"]}, FOUR),
        ({"answer": "B", "choices": ["Liver", "b1", "liver.", "d1"]}, FOUR),
        ({"answer": "B", "choices": ["A", "B", "C", "D"]}, FOUR),
        ({"answer": "B", "choices": ["...", "b1", "c1", "d1"]}, "empty option"),
        ({"answer": "B", "choices": ["a1", "b1", "c1", "All of the above"]}, REFERS),
        ({"answer": "B", "choices": ["a1", "b1", "c1", "Both A and B"]}, REFERS),
        ({"answer": "B", "choices": None}, "question without options"),
        ({"answer": "B", "choices": "a, b, c, d"}, "question without options"),
    ],
)
def test_multiple_choice_that_is_none(kw, reason):
    reply = read_reply(_choice(**kw), "choices")
    assert not reply.pairs and reply.rejected[0] == (reason, "Which organ?")
    assert reason in reply.problem


def test_labels_out_of_order_keep_their_letters():
    text = _choice(choices=["B. two", "A. one", "D. four", "C. three"], answer="D")
    assert read_reply(text, "choices").pairs[0] == Pair("Which organ?", "four", ("one", "two", "three", "four"), "D")


def test_several_questions_as_lines_and_one_without_options():
    one = "{n}. Which {n}?\nA) a{n}\nB) b{n}\nC) c{n}\nD) d{n}\nAnswer: {x}\n"
    text = one.format(n=1, x="C") + "\n2. What else?\nAnswer: C\n\n" + one.format(n=3, x="A")
    reply = read_reply(text, "choices")
    assert [(p.question, p.letter, p.answer) for p in reply.pairs] == [
        ("Which 1?", "C", "c1"),
        ("Which 3?", "A", "a3"),
    ]
    assert [r[1] for r in reply.rejected] == ["2. What else?"]


# --- Anything ---

_PIECES = st.sampled_from(
    """{ } [ ] " : , \\ ``` ```json {"pairs": "question": "answer": "choices": Q: A: **Q1:** **A:**
    <think> </think> {"question":"a?","answer":"b"} 1. 2) ### ? Answer: **Answer**
    Question A) B. C: D) ** __ - *
    "\\ud800" 99999 1e999 NaN true null""".split()
    + [" ", "\n", "\n\n", "\t", "\r", "What is it?", "A mass", "\ud800", "\x00", "\u2028"]
)
_KEYS = "question answer q a choices options A B pairs x?".split()
TEXTS = st.one_of(
    st.text(max_size=60),
    st.text(st.characters(exclude_categories=()), max_size=20),
    st.lists(_PIECES, max_size=40).map("".join),
    st.lists(_PIECES, max_size=20).map(" ".join),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda x: st.lists(x, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), x),
        max_leaves=12,
    ).map(json.dumps),
)


def _check(text, kind, cut):
    reply = read_reply(text, kind, cut)
    assert bool(reply.pairs) == bool(reply.form) == (not reply.problem)
    for pair in reply.pairs:
        for x in (pair.question, pair.answer):
            assert any(map(str.isalnum, x)) and x == x.strip() and "**" not in x and "\0" not in x
        assert "\n" not in pair.question
        if kind == "choices":
            assert len(set(pair.choices)) == 4 and pair.choices["ABCD".index(pair.letter)] == pair.answer
        else:
            assert pair.choices == () and pair.letter == ""
    json.dumps(dataclasses.asdict(reply), ensure_ascii=False).encode()  # can be written
    assert read_reply(text, kind, cut) == reply


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.sampled_from(parse.KINDS), st.booleans())
def test_no_text_crashes_it(text, kind, cut):
    _check(text, kind, cut)


@pytest.mark.slow
@settings(max_examples=5_000, deadline=None)
@given(TEXTS, st.sampled_from(parse.KINDS), st.booleans())
def test_no_text_crashes_it_at_length(text, kind, cut):
    _check(text, kind, cut)


_WORDS = st.text(min_size=1, max_size=20).filter(lambda text: any(map(str.isalnum, text)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(_WORDS, _WORDS), min_size=1, max_size=4, unique_by=lambda x: parse._same(x[0])),
    st.booleans(),
)
def test_valid_json_loses_no_pair(pairs, ascii_only):
    """Whatever the texts are, but for marks and spaces around that the parser takes off."""
    text = json.dumps([{"question": q, "answer": a} for q, a in pairs], ensure_ascii=ascii_only)
    reply = read_reply(text)
    assert len(reply.pairs) + len(reply.rejected) == len(pairs)
    for pair in reply.pairs:
        assert any(pair.answer in parse._tidy(a) for _, a in pairs)


def test_long_and_hostile_texts_take_linear_time():
    n = 20_000
    repeated = """[|{|{"a":
|{"question":"|"|[1|*|? |Q: a?\n|A: a\n|1. a?\n|a?\nb\n|A) B) C) D) |- |\n
|# |[{"a":1}, |_|answer is | answer|a?|x?\nA) a\nB) b\n|{"question":"a","answer":"b"}|1
|{"a":"\\"""
    texts = [piece * n for piece in repeated.split("|")]
    spaces = " " * n
    texts += [f"{spaces}x", f"Q:{spaces}x", f"1.{spaces}x?", f"Q: a?{spaces}A", f"A)a{spaces}B)"]
    texts += ["Q" + "1" * n, '{"q":"' + "\\\\" * n, "[" + '{"question": "a" "answer" "b"}' * n]
    texts += ["[" * 7 + '{"a":{"b":c}} ' * n, '{"' + "a" * 30 + '":"' * n]
    for text in texts:
        for kind in parse.KINDS:
            assert_linear(functools.partial(read_reply, kind=kind, cut=True), text[:n])


def test_the_judge_of_linear_time_tells_quadratic_time():
    assert_linear(lambda text: text.count("a"), "a" * 100_000)
    with pytest.raises(AssertionError, match="for an eighth"):
        assert_linear(lambda text: [text[:i].count("a") for i in range(0, len(text), 10)], "a" * 40_000)


# --- What the authors' model wrote ---


@pytest.mark.real_data
def test_the_authors_records(real_data):
    """Their 2,052 records: none fails, five pairs each, and the same as the builders read."""
    forms, counts = {}, {}
    for record in qa_files.iter_objects(real_data / "medm" / "qa_pairs_generated_all.json"):
        reply = read_reply(record["qa_pairs_raw"])
        counts[len(reply.pairs)] = counts.get(len(reply.pairs), 0) + 1
        forms[reply.form] = forms.get(reply.form, 0) + 1
        expected, _ = qa_files.parse_pairs(record["qa_pairs_raw"])
        assert [(p.question, p.answer) for p in reply.pairs] == [p[:2] for p in expected]
        assert reply.rejected == ()
    assert counts == {5: 2052}
    assert forms == {"Q:": 1258, "**Q: …**": 652, "**Q:**": 86, "Q1:": 55, "unmarked": 1}
