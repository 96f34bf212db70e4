"""Overlap of answers with the truth: BLEU, ROUGE, CIDEr, METEOR, similarity of embeddings.

They are here because others report them. Their limits: an answer that echoes the question scores as
well as the paper's model (reference/medm.md, 4), "no mass" is close to "mass", and a one-word answer is
all or nothing. Compare them with the controls. ROUGE and BLEU take packages of the extra `text`.

Each function takes N predictions and N answers (one reference each) and returns one number per row. All
are fractions, 0 to 1, except CIDEr, 0 to 10. `METRICS`, at the end, lists those that every evaluation
of open answers computes; `score` is for any list of answers.
"""

import collections
import functools
import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from paligemma_med.metrics import answers as forms
from paligemma_med.metrics import protocols

ROUGES = ("rouge1", "rouge2", "rougeL")
_PACKAGES = {"rouge_score": "ROUGE", "sacrebleu": "BLEU"}  # of the extra `text`: {module: what it computes}


def score(predictions, answers, embed=None, meteor_too=False) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """All text metrics of N answers at once; evaluations use `METRICS` instead.

    Args:
      predictions, answers: N strings each.
      embed: as for `embedding_similarity`; None leaves it out.
      meteor_too: also METEOR, which needs WordNet: see `meteor`.

    Returns:
      (rows {name: float[N]}, corpus {name: float}), names bleu, rouge1, rouge2, rougeL, cider and,
      if asked for, meteor and embedding. A corpus' figure is the mean of its rows, except for bleu,
      whose counts are added up before they are divided.

    Raises:
      ValueError: like the functions themselves.
    """
    rows = {"bleu": sentence_bleu(predictions, answers), **rouge(predictions, answers)}
    rows["cider"] = cider(predictions, answers)
    if meteor_too:
        rows["meteor"] = meteor(predictions, answers)
    if embed is not None:
        rows["embedding"] = embedding_similarity(predictions, answers, embed)
    corpus = {name: float(np.mean(values)) for name, values in rows.items()}
    return rows, corpus | {"bleu": corpus_bleu(predictions, answers)}


def corpus_bleu(predictions, answers) -> float:
    """BLEU-4 of a corpus by sacrebleu with its defaults (13a tokens, case counts, exp smoothing).

      BP · exp(Σ_{n=1..4} ln p_n / 4), BP = min(1, exp(1 - length of answers / of predictions))
    with p_n the clipped n-gram precision over all rows. A corpus of one- and two-word answers has no
    4-grams and scores 0. Chinese and other scripts without blanks are taken by characters (`answers.spaced`).
    K. Papineni et al., ACL 2002; M. Post, WMT 2018 (1804.08771).

    Returns:
      float, 0 to 1: sacrebleu's score / 100.

    Raises:
      ValueError: no rows, lengths that differ, something that isn't a string, or sacrebleu isn't installed.
    """
    predictions, answers = _texts(predictions, answers)
    return _bleu().corpus_score([*map(forms.spaced, predictions)], [[*map(forms.spaced, answers)]]).score / 100


def sentence_bleu(predictions, answers) -> np.ndarray:
    """BLEU of each row, equal to sacrebleu's sentence_bleu: `corpus_bleu`'s settings, and only n-grams of
    orders that the prediction is long enough for.

    Returns:
      float[N], 0 to 1.

    Raises:
      ValueError: as `corpus_bleu`.
    """
    predictions, answers = _texts(predictions, answers)
    return np.array([x.score / 100 for x in _sentences(predictions, answers)])


def bleu_counts(predictions, answers) -> tuple[np.ndarray, np.ndarray]:
    """`sentence_bleu` of each row, and the counts that `corpus_bleu` adds up, for BLEU of many subsets.

    Returns:
      (float[N], int[N, 10]): the columns are matching n-grams and all n-grams of order 1 to 4, the
      prediction's length, the answer's.

    Raises:
      ValueError: as `corpus_bleu`.
    """
    predictions, answers = _texts(predictions, answers)
    scores = _sentences(predictions, answers)
    counts = [[*x.counts, *x.totals, x.sys_len, x.ref_len] for x in scores]
    return np.array([x.score / 100 for x in scores]), np.array(counts)


def bleu_of_counts(counts) -> float:
    """`corpus_bleu` of rows, from the int[N, 10] of `bleu_counts`."""
    BLEU = _package("sacrebleu.metrics").BLEU
    *grams, predicted, wanted = np.sum(counts, axis=0).tolist()
    score = BLEU.compute_bleu(grams[:4], grams[4:], predicted, wanted, smooth_method="exp")
    return score.score / 100


def _sentences(predictions, answers):
    bleu = _bleu(effective_order=True)
    return [bleu.sentence_score(forms.spaced(p), [forms.spaced(a)]) for p, a in zip(predictions, answers)]


def _bleu(**settings):
    return _package("sacrebleu.metrics").BLEU(**settings)


def _package(module):
    """A module of the extra `text`, or one sentence."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        name = module.partition(".")[0]
        raise ValueError(f"{_PACKAGES[name]} comes with pip install 'paligemma_med[text]' ({e}).") from None


def rouge(predictions, answers) -> dict[str, np.ndarray]:
    """ROUGE-1, -2 and -L F-measures by rouge-score, with Porter's stemmer.

    ROUGE-1, -2: overlap of words and of pairs of words; ROUGE-L: of the longest common subsequence;
    each F = 2PR / (P + R). The package keeps only a-z and 0-9; a pair of which either text has mostly
    other letters is compared by its words in any script, by characters where a script writes no blanks.
    C.-Y. Lin, Text Summarization Branches Out, 2004. The paper's ROUGE-S, -M and -L are 1, 2 and L
    by their size (reference/medm.md, 4).

    Returns:
      {"rouge1": float[N], "rouge2": …, "rougeL": …}, 0 to 1.

    Raises:
      ValueError: as `corpus_bleu`.
    """
    rouge_scorer = _package("rouge_score.rouge_scorer")
    predictions, answers = _texts(predictions, answers)
    latin = rouge_scorer.RougeScorer(list(ROUGES), use_stemmer=True)
    other = rouge_scorer.RougeScorer(list(ROUGES), tokenizer=_Words())
    scores = [(other if _is_other(p) or _is_other(a) else latin).score(a, p) for p, a in zip(predictions, answers)]
    return {name: np.array([row[name].fmeasure for row in scores]) for name in ROUGES}


class _Words:
    """Words of any script, for rouge-score."""

    def tokenize(self, text):
        return re.findall(r"\w+", forms.spaced(text.lower()))


def _is_other(text):
    letters = sum(map(str.isalnum, text))
    return 2 * len(re.findall("[a-z0-9]", text.lower())) < letters


def tokens(text) -> list[str]:
    """Words of a text for `cider` and `meteor`.

    Lower case, no punctuation except within a word or before a number ("x-ray", "1.5", ".5", "-50"
    stay whole). On 500 answers of SLAKE the words equal those of the COCO evaluation's tokenizer; so do
    433 of 500 MedPix captions, and the others differ in how that one treats brackets ("-lrb-"), signs
    and abbreviations. In scripts without blanks between words each character is one (`answers.spaced`).
    """
    return re.findall(r"(?:(?<!\w)-?\.?(?=\d))?\w+(?:[-'’./,]\w+)*", forms.spaced(text.lower()))


def cider(predictions, answers, tokenise=tokens) -> np.ndarray:
    """CIDEr of each row, in the form (CIDEr-D) that the COCO captioning evaluation reports.

    With g_n(x)[w] = (count of n-gram w in x) · (ln N - ln max(1, df(w))), df(w) the number of
    answers that contain w:
      10 · mean_{n=1..4} Σ_w min(g_n(p)[w], g_n(a)[w]) · g_n(a)[w] / (|g_n(p)| · |g_n(a)|)
         · exp(-(l_p - l_a)² / (2 · 6²))
    or 0 if a norm is 0; l is the number of bigrams, words minus one. R. Vedantam et al., CVPR 2015
    (1411.5726); equal to CiderScorer of pycocoevalcap 1.2 on the same tokens.

    N-grams are weighted by how rare they are among *these* answers, so CIDEr can't be compared between
    splits; an n-gram in all answers has weight 0. A right answer of one word gets at most 2.5, since it
    has no longer n-grams.

    Args:
      predictions, answers: N strings each.
      tokenise: string → words. The COCO evaluation uses Stanford's tokenizer, which needs Java.

    Returns:
      float[N], 0 to 10.

    Raises:
      ValueError: as `corpus_bleu`.
    """
    predictions, answers = _texts(predictions, answers)
    predicted = [_ngrams(tokenise(p)) for p in predictions]
    wanted = [_ngrams(tokenise(a)) for a in answers]
    df = collections.Counter(w for counts in wanted for w in counts)
    log_n = math.log(len(answers))

    def vector(counts):
        """{n-gram: weight}, norm for each n, number of bigrams."""
        weights = {w: m * (log_n - math.log(max(1, df[w]))) for w, m in counts.items()}
        squares = np.zeros(4)
        for w, x in weights.items():
            squares[len(w) - 1] += x * x
        return weights, np.sqrt(squares), sum(m for w, m in counts.items() if len(w) == 2)

    scores = []
    for p, a in zip(predicted, wanted):
        (of_p, norm_p, length_p), (of_a, norm_a, length_a) = vector(p), vector(a)
        dots = np.zeros(4)
        for w, x in of_p.items():
            dots[len(w) - 1] += min(x, of_a.get(w, 0.0)) * of_a.get(w, 0.0)
        norms = norm_p * norm_a
        cosines = np.divide(dots, norms, out=np.zeros(4), where=norms > 0)
        scores.append(10 * cosines.mean() * math.exp(-((length_p - length_a) ** 2) / 72))
    return np.array(scores)


def _ngrams(words):
    return collections.Counter(tuple(words[i : i + n]) for n in (1, 2, 3, 4) for i in range(len(words) - n + 1))


def meteor(predictions, answers, wordnet=None, tokenise=tokens) -> np.ndarray:
    """METEOR of each row by NLTK: words matched by form, stem, and WordNet's synonyms.

      F · (1 - 0.5 · (chunks / matches)³), F = P · R / (0.9 · P + 0.1 · R)
    S. Banerjee and A. Lavie, ACL 2005 workshop; the parameters are those of M. Denkowski and
    A. Lavie that NLTK defaults to. This isn't METEOR 1.5, which uses paraphrase tables and Java; COCO's
    figures of that name are higher.

    WordNet must be where NLTK looks for it (corpora/wordnet in a folder that NLTK_DATA names, or after
    python -m nltk.downloader wordnet). Nothing is downloaded.

    Args:
      predictions, answers: N strings each.
      wordnet: an object with a method synsets(word) like NLTK's; None: NLTK's own.
      tokenise: string → words.

    Returns:
      float[N], 0 to 1.

    Raises:
      ValueError: no WordNet found; otherwise as `corpus_bleu`.
    """
    from nltk.translate.meteor_score import single_meteor_score

    predictions, answers = _texts(predictions, answers)
    if wordnet is None:
        wordnet = _wordnet()
        if wordnet is None:
            raise ValueError(
                "METEOR needs WordNet, which NLTK doesn't find; expected a folder corpora/wordnet "
                "in one that NLTK_DATA names."
            )
    return np.array(
        [float(single_meteor_score(tokenise(a), tokenise(p), wordnet=wordnet)) for p, a in zip(predictions, answers)]
    )


def has_wordnet() -> bool:
    """Whether `meteor` can be computed on this machine."""
    return _wordnet() is not None


def _wordnet():
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except (LookupError, OSError):  # no such folder, or files missing in it
        return None
    return wordnet


def embedding_similarity(predictions, answers, embed) -> np.ndarray:
    """Cosine of the embeddings of prediction and answer.

    The caller chooses the embedding model, which is part of the figure's name. Similarities of one model
    can't be compared with another's, and many models rate opposites as close.

    Args:
      predictions, answers: N strings each.
      embed: function from a list of strings to float[N, D].

    Returns:
      float[N], -1 to 1; 0 if an embedding is 0.

    Raises:
      ValueError: not one finite vector per text; otherwise as `corpus_bleu`.
    """
    predictions, answers = _texts(predictions, answers)
    vectors = np.asarray(embed(predictions + answers), np.float64)
    n = len(answers)
    if vectors.ndim != 2 or len(vectors) != 2 * n or not np.isfinite(vectors).all():
        raise ValueError(f"embed gave {vectors.shape} for {2 * n} texts; expected finite [{2 * n}, D].")
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = vectors / np.where(norms > 0, norms, 1)
    return np.sum(vectors[:n] * vectors[n:], axis=1)


def _texts(predictions, answers):
    predictions, answers = list(predictions), list(answers)
    if len(predictions) != len(answers) or not answers:
        raise ValueError(
            f"there are {len(predictions)} predictions and {len(answers)} answers; expected as many, one or more."
        )
    for i, text in enumerate(predictions + answers):
        if not isinstance(text, str):
            kind = "answer" if i >= len(answers) else "prediction"
            raise ValueError(f"{kind} {i % len(answers)} is {text!r}; expected a string.")
    return predictions, answers


# --- The metrics of an evaluation ---


class Metric(NamedTuple):
    """One or more figures of open answers, as evaluations compute them and tables show them.

    titles: {name of a figure: its title in tables}.
    score: function of N predictions and N answers → {name: float[N], one number per row}.
    totals: for a figure that isn't the mean of its rows, {name: function of int[M, K] → float}: the
      score then gives int[N, K] for this name, and the function the figure of any M rows.
    is_of_corpus: whether a row's number depends on the other rows.
    package: module of the extra `text` that it needs.
    """

    titles: Mapping[str, str]
    score: Callable[[list[str], list[str]], Mapping[str, np.ndarray]]
    totals: Mapping[str, Callable[[np.ndarray], float]] = {}
    is_of_corpus: bool = False
    package: str = ""


def _of_pairs(name, function):
    """The score of a metric that compares one prediction with its answer."""
    return lambda predictions, answers: {name: np.array([function(*x) for x in zip(predictions, answers)], float)}


def _bleu_figures(predictions, answers):
    rows, counts = bleu_counts(predictions, answers)
    return {"bleu_rows": rows, "bleu": counts}


# Everything that the protocol "open" reports besides exact match. To add a metric, write its function
# above and its line here: `scoring`, the tables and the reports follow.
METRICS = (
    Metric({"f1": "token F1"}, _of_pairs("f1", protocols.token_f1)),
    Metric({"recall": "token recall"}, _of_pairs("recall", protocols.token_recall)),
    Metric(
        {"llava_recall": "LLaVA-Med's recall"},
        _of_pairs("llava_recall", lambda prediction, answer: protocols.llava_med_f1(prediction, answer)[2]),
    ),
    Metric({"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}, rouge, package="rouge_score"),
    Metric(
        {"bleu_rows": "BLEU, mean of questions", "bleu": "BLEU of the corpus"},
        _bleu_figures,
        totals={"bleu": bleu_of_counts},
        package="sacrebleu",
    ),
    # Words are weighted by how rare they are among the answers to all questions.
    Metric(
        {"cider": "CIDEr × 100"},
        lambda predictions, answers: {"cider": cider(predictions, answers)},
        is_of_corpus=True,
    ),
)
# Figures that are means of numbers, not shares of questions.
MEANS = tuple(name for metric in METRICS for name in metric.titles if name not in metric.totals)
TOTALS = {name: total for metric in METRICS for name, total in metric.totals.items()}


def installed() -> tuple[Metric, ...]:
    """Those of METRICS whose package is installed. Says once which are left out."""
    missing = lacking()
    if missing:
        _say_left_out(missing)
    return tuple(metric for metric in METRICS if metric.package not in missing)


def lacking() -> tuple[str, ...]:
    """Modules of the extra `text` that aren't installed."""
    return tuple(name for name in _PACKAGES if importlib.util.find_spec(name) is None)


@functools.cache
def _say_left_out(missing):
    names = " and ".join(_PACKAGES[name] for name in missing)
    print(f"Left out: {names}, which pip install 'paligemma_med[text]' adds.", file=sys.stderr, flush=True)


def require(figure: str) -> None:
    """Raises ValueError if a figure asked for by name, such as "val/model/overall/rouge1", can't be computed here."""
    last = figure.rpartition("/")[2]
    for metric in METRICS:
        if metric.package in lacking() and any(last == name or last.startswith(f"{name}_") for name in metric.titles):
            raise ValueError(f"{figure} needs {_PACKAGES[metric.package]}: pip install 'paligemma_med[text]'.")
