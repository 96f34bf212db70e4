"""Many questions: the same answers as one by one, each image through the tower once, batches that fit."""

import io

import numpy as np
import PIL.Image
import pytest

from paligemma_med import decode, predict
from paligemma_med.ask import answering
from paligemma_med.ask.answering import Answerer, Question
from paligemma_med.pp import get_preprocess_fn
from tests import tiny

KW = dict(max_new_tokens=3)
TEXTS = ["Is this an MRI?", "Which organ is abnormal, the left or the right lung?", "Where?"]


def png(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, its config, an `Answerer` of it)."""
    workdir = str(tmp_path_factory.mktemp("ask") / "w")
    config = tiny.config(evals={})
    tiny.write_workdir(workdir, config)
    return workdir, config, Answerer(config, workdir, batch_size=8, **KW)


@pytest.fixture
def answerer(run):
    """The same one, as new."""
    made = run[2]
    made._kept.clear()
    made._kept_bytes = made.encoded = 0
    made.batch_size = 8
    return made


def asked(images, **more):
    return [
        Question(dict(question=text, **more), lambda image=image: image, i)
        for i, (image, text) in enumerate((image, text) for image in images for text in TEXTS)
    ]


def flat(answerer, questions):
    return [answer for batch in answerer.answers(questions, len(questions)) for _, answer in batch]


def assert_close(a, b):
    assert [x.text for x in a] == [x.text for x in b]
    np.testing.assert_allclose([x.logprob for x in a], [x.logprob for x in b], rtol=1e-5)


def test_answers_are_those_of_predict(run, answerer):
    workdir, config, _ = run
    images = [png(i) for i in range(4)]
    found = flat(answerer, asked(images))
    for image, mine in zip(images[:2], (found[:3], found[3:6])):
        for row, answer in zip(predict.predict(config, workdir, image, TEXTS, **KW), mine, strict=True):
            assert answer.text == row["answers"][0]["answer"]
            assert answer.logprob == pytest.approx(row["answers"][0]["logprob"], rel=1e-5)
            assert not answer.error and answer.note in ("", "cut off after 3 tokens")
    assert len({x.logprob for x in found}) == len(found)  # each its own image's and question's


def test_each_image_is_seen_once(answerer, monkeypatch):
    images = [png(i) for i in range(4)]
    questions = asked(images)
    found = flat(answerer, questions)
    assert answerer.encoded == 4
    # In any order, also across batches.
    order = np.random.default_rng(0).permutation(len(questions))
    mixed = flat(answerer, [questions[i] for i in order])
    assert answerer.encoded == 4
    assert_close([mixed[i] for i in np.argsort(order)], found)
    monkeypatch.setattr(answering, "KEPT", 1)
    answerer._kept.clear()
    # With room for one image, those of the questions that follow one another.
    assert_close(flat(answerer, questions), found)
    assert answerer.encoded == 4 + 4
    mixed = flat(answerer, [questions[i] for i in order])
    assert_close([mixed[i] for i in np.argsort(order)], found)
    assert answerer.encoded > 4 + 4 + 4


def test_smaller_batches_where_memory_ends(answerer, monkeypatch):
    questions = asked([png(i) for i in range(8)])
    found = flat(answerer, questions)
    sizes, generate = [], decode.generate

    def small(model, params, batch, **kw):
        sizes.append(len(batch["text"]))
        if sizes[-1] > 8:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123456 bytes.")
        return generate(model, params, batch, **kw)

    monkeypatch.setattr(decode, "generate", small)
    answerer.batch_size = 32
    assert_close(flat(answerer, questions), found)
    assert sizes == [24, 8, 8, 8] and answerer.batch_size == 8
    monkeypatch.setattr(decode, "generate", lambda *a, **kw: (_ for _ in ()).throw(RuntimeError("RESOURCE_EXHAUSTED")))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        flat(answerer, questions)


def test_a_row_that_cannot_be_asked_has_its_error(answerer):
    def missing():
        raise FileNotFoundError(2, "No such file or directory", "c.png")

    good = asked([png(0)])
    bad = [Question(dict(question="Is it?"), missing, 7), Question(dict(question="Is it?"), lambda: b"no image", 8)]
    found = flat(answerer, [good[0], *bad, *good[1:]])
    assert [bool(x.error) for x in found] == [False, True, True, False, False]
    assert found[1].error == "No such file or directory" and "not a readable image" in found[2].error
    assert found[1].text == "" and found[1].logprob is None
    assert_close([found[0], *found[3:]], flat(answerer, good))
    assert all(x.error for x in flat(answerer, bad))


def test_the_right_answer_is_not_told(answerer):
    image = [png(0)]
    plain = flat(answerer, asked(image))
    assert flat(answerer, asked(image, answer="left", suffix="left", modality="MRI")) == plain
    telling = tiny.config(evals={}).predict_pp.replace("answer en {question}", "{question} {answer}")
    of_text = answerer._of_text
    answerer._of_text = get_preprocess_fn(answering.split_pp(telling)[1])
    try:
        assert "answer" in flat(answerer, asked(image, answer="left"))[0].error
    finally:
        answerer._of_text = of_text


def test_what_is_cut_is_noted(answerer):
    long = [Question(dict(question="Is it " + "very " * 60 + "bad?"), lambda: png(0), 0)]
    assert "the prompt lost its last" in flat(answerer, long)[0].note


@pytest.mark.parametrize(
    "pp, image, text",
    [
        ("decode|resize(8)|strfmt('a|b', outkey='c')", "decode|resize(8)", "strfmt('a|b', outkey='c')"),
        ("decode(key='image')|resize(8)", "", "decode(key='image')|resize(8)"),
        ("strfmt('a', outkey='c')|decode", "", "strfmt('a', outkey='c')|decode"),
        ("decode|resize(4)|value_range(-1, 1)", "decode|resize(4)|value_range(-1, 1)", ""),
    ],
)
def test_what_belongs_to_the_image(pp, image, text):
    assert answering.split_pp(pp) == (image, text)
