"""Text metrics: worked by hand, and equal to the packages that others use.

pycocoevalcap and WordNet are large, so tests with them run where they are; what the first gives for
the sentences below stands here as numbers.
"""

import json
import math
import random
import re
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.metrics import scoring, text_metrics

SAID = ["a mass in the left lung", "no", "The heart is enlarged.", "left", "two cysts, both benign"]
TRUE = ["a large mass in the left lung", "yes", "the heart is not enlarged", "left", "a cyst"]


def test_rouge_by_hand():
    found = text_metrics.rouge(SAID, TRUE)
    # Precision 6/6, recall 6/7; pairs of words 4 of 5 and of 6; the cyst by its stem.
    assert found["rouge1"] == pytest.approx([12 / 13, 0, 8 / 9, 1, 2 / 6])
    assert found["rouge2"] == pytest.approx([8 / 11, 0, 4 / 7, 0, 0])
    assert found["rougeL"] == pytest.approx([12 / 13, 0, 8 / 9, 1, 2 / 6])
    assert text_metrics.rouge(["lung left"], ["left lung"])["rougeL"] == pytest.approx([1 / 2])


ZH = ["左肺结节", "没有胸腔积液", "肝脏囊肿"]


def test_texts_of_other_scripts_are_compared_by_their_letters():
    """rouge-score keeps a-z, and BLEU takes a Chinese answer for one word: right answers got 0."""
    rows, corpus = text_metrics.score(ZH, ZH)
    for name in ("bleu", "rouge1", "rouge2", "rougeL"):
        assert rows[name] == pytest.approx(1) and corpus[name] == pytest.approx(1)
    assert rows["cider"] == pytest.approx(10)
    found = text_metrics.rouge(["左肺有结节", "心脏", "Сердце увеличено."], ["左肺结节", "左肺", "сердце увеличено"])
    assert found["rouge1"] == pytest.approx([8 / 9, 0, 1])
    assert found["rougeL"] == pytest.approx([8 / 9, 0, 1])
    counts = text_metrics.bleu_counts(ZH, ZH)[1]
    assert text_metrics.bleu_of_counts(counts) == pytest.approx(1)


def test_texts_of_latin_letters_stay_the_packages_own():
    from rouge_score import rouge_scorer

    said, true = "Lungs: β-blockers, épanchement", "the lung and β-blockers; epanchement"
    theirs = rouge_scorer.RougeScorer(["rouge1"], use_stemmer=True).score(true, said)["rouge1"].fmeasure
    assert text_metrics.rouge([said], [true])["rouge1"] == pytest.approx([theirs])


def test_bleu_by_hand():
    # Row 1: of its n-grams 6/6, 4/5, 3/4, 2/3 are right, and 6 words stand for 7. Row 3 ("The" is
    # another word than "the", the period a word): 3/5 and 1/4, then none of 3 and none of 2, which
    # count as 1/2 and 1/4 of one.
    rows = text_metrics.sentence_bleu(SAID, TRUE)
    assert rows[0] == pytest.approx(math.exp(1 - 7 / 6) * (4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert rows[2] == pytest.approx((3 / 5 * 1 / 4 * 1 / 6 * 1 / 8) ** 0.25)
    assert rows[3] == pytest.approx(1)
    assert text_metrics.sentence_bleu(["no"], ["no"]) == pytest.approx([1])
    assert text_metrics.corpus_bleu([SAID[0]], [TRUE[0]]) == pytest.approx(rows[0])
    assert text_metrics.corpus_bleu(["left"] * 9, ["left"] * 9) == 0  # no 4-grams


def test_cider_by_hand():
    # Two answers; ln N - ln df: "left" is in both and weighs 0, every other word ln 2 =: w.
    # Row 1: "left lung" for "left lobe": the pair of words differs as well, so 0.
    # Row 2: right. One word that counts, one pair: cosines 1, 1, 0, 0, so 10 · 2 / 4.
    assert text_metrics.cider(["left lung", "left eye"], ["left lobe", "left eye"]) == (pytest.approx([0, 5]))
    # "eye" of "left eye": cosine 1 for words; a pair less, so exp(-1/72).
    assert text_metrics.cider(["eye", "eye"], ["left eye", "left ear"]) == (
        pytest.approx([10 / 4 * math.exp(-1 / 72), 0])
    )
    # Saying it twice is clipped: w · w / (2w · w); two pairs more... than one, "eye eye" and "eye".
    assert text_metrics.cider(["eye eye", "x"], ["eye", "ear"])[0] == (pytest.approx(10 / 4 / 2 * math.exp(-1 / 72)))


def test_cider_of_the_package():
    """Figures of pycocoevalcap 1.2, CiderScorer, for the words of these sentences."""
    said, true = SAID + TRUE[:1], TRUE + SAID[:1]
    expected = [5.102614806066682, 0, 4.578007631923552, 2.5, 0, 5.102614806066682]
    assert text_metrics.cider(said, true) == pytest.approx(expected, abs=1e-12)


def test_cider_of_one_row_says_nothing():
    assert text_metrics.cider(["left"], ["left"]) == [0]  # rare among one answer is no word


class Synonyms:
    """Stands in for WordNet."""

    def __init__(self, *groups):
        self._groups = groups

    def synsets(self, word):
        return [self] if any(word in group for group in self._groups) else []

    def lemmas(self):
        return [Lemma(word) for group in self._groups for word in group]


class Lemma:
    def __init__(self, name):
        self._name = name

    def name(self):
        return self._name


def test_meteor_by_hand():
    def meteor(said, true, *groups):
        return text_metrics.meteor([said], [true], wordnet=Synonyms(*groups))[0]

    # Two words of two, in one piece: F = 1, penalty 0.5 · (1/2)³.
    assert meteor("left lung", "left lung") == pytest.approx(1 - 0.5 / 8)
    assert meteor("left lungs", "left lung") == pytest.approx(1 - 0.5 / 8)
    # In two pieces.
    assert meteor("lung left", "left lung") == pytest.approx(0.5)
    # P = 1, R = 1/2: F = 0.5 / (0.9 + 0.05).
    assert meteor("lung", "left lung") == pytest.approx(0.5 / 0.95 * 0.5)
    assert meteor("left tumour", "left neoplasm") == pytest.approx(0.5 * 0.5)
    assert meteor("left tumour", "left neoplasm", ("tumour", "neoplasm")) == pytest.approx(15 / 16)
    assert meteor("heart", "lung") == 0


def test_embedding_similarity():
    def embed(texts):
        return [[text.count("a"), text.count("b")] for text in texts]

    found = text_metrics.embedding_similarity(["a", "b", "ab", "x"], ["aa", "a", "a", "a"], embed)
    assert found == pytest.approx([1, 0, 0.5**0.5, 0])
    for wrong in (lambda texts: [[1]], lambda texts: [1] * len(texts)):
        with pytest.raises(ValueError, match="embed gave"):
            text_metrics.embedding_similarity(["a"], ["b"], wrong)


@pytest.mark.parametrize(
    "text, words",
    [
        ("The X-ray, of 1.5 cm.", "the x-ray of 1.5 cm"),
        ("(left) lung/heart; don't", "left lung/heart don't"),
        ("-50 HU, .5 and 3-5", "-50 hu .5 and 3-5"),
        ("...", ""),
    ],
)
def test_tokens(text, words):
    assert text_metrics.tokens(text) == words.split()


texts = st.lists(
    st.lists(st.sampled_from("left right lung mass no heart".split()), min_size=1, max_size=6),
    min_size=2,
    max_size=8,
)


@given(texts, st.randoms())
def test_score(answers, random):
    true = [" ".join(words) for words in answers]
    said = random.sample(true, len(true))
    rows, corpus = text_metrics.score(said, true)
    assert list(rows) == ["bleu", "rouge1", "rouge2", "rougeL", "cider"] == list(corpus)
    for name, values in rows.items():
        top = 10 if name == "cider" else 1
        assert values.shape == (len(true),)
        assert (values >= 0).all() and (values <= top + 1e-9).all()
        if name != "bleu":
            assert corpus[name] == pytest.approx(values.mean())
    # Rows are scored for themselves, but for CIDEr's weights: order changes nothing.
    order = random.sample(range(len(true)), len(true))
    again, _ = text_metrics.score([said[i] for i in order], [true[i] for i in order])
    for name, values in rows.items():
        assert again[name] == pytest.approx(values[order])
    # Nothing is better than the truth.
    best, _ = text_metrics.score(true, true)
    assert all((best[name] >= rows[name] - 1e-9).all() for name in rows)
    assert best["rouge1"] == pytest.approx(np.ones(len(true)))


def test_bad_texts():
    for call in (text_metrics.rouge, text_metrics.cider, text_metrics.corpus_bleu):
        with pytest.raises(ValueError, match="1 predictions and 2 answers"):
            call(["a"], ["a", "b"])
        with pytest.raises(ValueError, match="one or more"):
            call([], [])
        with pytest.raises(ValueError, match="answer 1 is None"):
            call(["a", "b"], ["a", None])


def test_meteor_says_what_it_lacks(monkeypatch):
    monkeypatch.setattr(text_metrics, "_wordnet", lambda: None)
    assert not text_metrics.has_wordnet()
    with pytest.raises(ValueError, match="NLTK_DATA"):
        text_metrics.meteor(["a"], ["a"])


# --- Against the reference packages, on 500 real pairs ---


@pytest.fixture(scope="module", params=["slake", "medpix"])
def real_pairs(request, real_data):
    """500 (said, true): SLAKE's test answers, each with another one; the authors' MedPix questions
    with their answers, the echo that scores so well."""
    if request.param == "slake":
        rows = json.loads((real_data / "slake" / "test.json").read_text())
        true = [row["answer"] for row in rows if row["q_lang"] == "en"][:500]
        said = random.Random(0).sample(true, len(true))
        return said, true
    text = (real_data / "medm" / "qa_pairs_generated_all.json").read_text()
    pairs = re.findall(r"\\nQ: ([^\\]+)\\nA: ([^\\\"]+)", text)[:500]
    return [q for q, _ in pairs], [a for _, a in pairs]


@pytest.mark.real_data
def test_bleu_and_rouge_equal_their_packages(real_pairs):
    import sacrebleu
    from rouge_score import rouge_scorer

    said, true = real_pairs
    assert len(said) == 500
    rows, corpus = text_metrics.score(said, true)
    assert corpus["bleu"] == sacrebleu.corpus_bleu(said, [true]).score / 100
    expected = [sacrebleu.sentence_bleu(p, [a]).score / 100 for p, a in zip(said, true)]
    assert rows["bleu"].tolist() == expected
    for name in text_metrics.ROUGES:
        one = rouge_scorer.RougeScorer([name], use_stemmer=True)
        expected = [one.score(a, p)[name].fmeasure for p, a in zip(said, true)]
        assert rows[name].tolist() == expected
        assert corpus[name] == pytest.approx(np.mean(expected))
        assert 0 <= corpus[name] < 0.6 and (corpus[name] > 0.05 or name == "rouge2")


@pytest.mark.real_data
def test_cider_equals_its_package(real_pairs):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider_scorer").CiderScorer()
    said, true = real_pairs
    for p, a in zip(said, true):
        scorer += (" ".join(text_metrics.tokens(p)), [" ".join(text_metrics.tokens(a))])
    mean, rows = scorer.compute_score()
    assert mean > 0.05
    assert text_metrics.cider(said, true) == pytest.approx(rows, abs=1e-12)


@pytest.mark.real_data
@pytest.mark.slow
def test_meteor_equals_nltk(real_pairs):
    from nltk.translate.meteor_score import meteor_score

    if not text_metrics.has_wordnet():
        pytest.skip("WordNet isn't on this machine")
    said, true = real_pairs
    expected = [meteor_score([text_metrics.tokens(a)], text_metrics.tokens(p)) for p, a in zip(said, true)]
    assert text_metrics.meteor(said, true) == pytest.approx(expected)


@pytest.fixture
def bare(monkeypatch):
    """As where the extra `text` isn't installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] in ("rouge_score", "sacrebleu")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("rouge_score", "sacrebleu"):
        monkeypatch.setitem(sys.modules, name, None)
    text_metrics._say_left_out.cache_clear()
    yield
    text_metrics._say_left_out.cache_clear()


def test_without_the_extra_metrics_are_left_out_and_that_is_said(bare, capsys):
    rows = [dict(question_id=str(i), answer=a, predictions=[p]) for i, (p, a) in enumerate(zip(SAID, TRUE))]
    found = [scoring.summarise(rows, "open", controls=()) for _ in range(2)]
    assert found[0] == found[1] and {"model/overall/f1", "model/overall/cider"} <= found[0].keys()
    assert not [name for name in found[0] if "rouge" in name or "bleu" in name]
    said = capsys.readouterr().err
    assert said == "Left out: ROUGE and BLEU, which pip install 'paligemma_med[text]' adds.\n"


@pytest.mark.parametrize("call", [text_metrics.rouge, text_metrics.sentence_bleu, text_metrics.score])
def test_without_the_extra_what_asks_for_them_is_one_sentence(bare, call):
    with pytest.raises(ValueError, match=r"comes with pip install 'paligemma_med\[text\]'"):
        call(SAID, TRUE)


def test_a_figure_asked_for_by_name(bare):
    for name in ("val/model/overall/acc", "val/model/overall/f1_low", ""):
        text_metrics.require(name)
    for name in ("val/model/overall/rouge1", "val/model/overall/bleu_mean", "val/model/overall/rougeL_low"):
        with pytest.raises(ValueError, match="needs (ROUGE|BLEU): pip install"):
            text_metrics.require(name)


def test_with_the_extra_all_are_there(capsys):
    assert text_metrics.installed() == text_metrics.METRICS and text_metrics.lacking() == ()
    text_metrics.require("val/model/overall/rouge1")
    assert capsys.readouterr().err == ""
