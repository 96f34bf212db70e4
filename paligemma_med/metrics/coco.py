"""Figures of generated reports as the COCO caption evaluation computes them: BLEU-1 to -4, ROUGE-L, CIDEr, METEOR 1.5.

Papers on report generation (R2Gen and after, papers/004) have these from pycocoevalcap. Here they are the same numbers
on the same tokens, without Java. What differs is the tokeniser: theirs is Stanford's for the Penn Treebank, in Java;
ours is `text_metrics.tokens`. `tools.coco_scores` computes all of them with theirs, METEOR as well, where Java and
pycocoevalcap are. One reference each.

None of them knows negation or clinical weight: a report of the commonest sentences scores well. Compare with the
controls.
"""

import collections
import math
import subprocess

import numpy as np

from paligemma_med.metrics import text_metrics

_BETA = 1.2  # of ROUGE-L: how much recall weighs
# Words that pycocoevalcap drops after tokenising.
PTB_MARKS = frozenset("'' ' `` ` -LRB- -RRB- -LCB- -RCB- . ? ! , : - -- ... ;".split())


def bleu_counts(predictions, answers, tokenise=text_metrics.tokens) -> np.ndarray:
    """What BLEU of any subset adds up.

    Returns:
      int[N, 10]: matching n-grams of order 1 to 4 (clipped), all n-grams of the prediction, its length, the answer's.
    """
    out = []
    for prediction, answer in zip(predictions, answers, strict=True):
        said, true = tokenise(prediction), tokenise(answer)
        grams = [(_grams(said, n), _grams(true, n)) for n in (1, 2, 3, 4)]
        matches = [(a & b).total() for a, b in grams]
        out.append([*matches, *(max(0, len(said) - n + 1) for n in (1, 2, 3, 4)), len(said), len(true)])
    return np.array(out, np.int64).reshape(-1, 10)


def _grams(words, n):
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(counts, order=4) -> float:
    """BLEU of rows of `bleu_counts` up to this order: exp(1 - r/c), at most 1, times the geometric mean of the
    precisions. An order without any n-gram or match is nearly 0, as pycocoevalcap's tiny summands have it.

    K. Papineni et al., ACL 2002; bleu_scorer.py of pycocoevalcap 1.2 with option "closest".
    """
    total = np.sum(counts, axis=0).astype(float)
    product = math.prod((total[k] + 1e-15) / (total[4 + k] + 1e-9) for k in range(order))
    ratio = (total[8] + 1e-15) / (total[9] + 1e-9)
    return float(product ** (1 / order) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1.0))


def rouge_l(predictions, answers, tokenise=text_metrics.tokens) -> np.ndarray:
    """ROUGE-L of each row: F of the longest common subsequence of words, in which recall counts 1.44-fold.

    (1 + β²) · P · R / (R + β² · P), β = 1.2, P = LCS / words said, R = LCS / words of the answer. C.-Y. Lin, 2004;
    rouge.py of pycocoevalcap 1.2. `text_metrics.rouge` is Google's, with stems and β = 1.

    Returns:
      float[N], 0 to 1.
    """
    scores = []
    for prediction, answer in zip(predictions, answers, strict=True):
        said, true = tokenise(prediction) or [""], tokenise(answer) or [""]
        common = _common(said, true)
        p, r = common / len(said), common / len(true)
        scores.append((1 + _BETA**2) * p * r / (r + _BETA**2 * p) if common else 0.0)
    return np.array(scores)


def _common(a, b):
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        above = row
        row = [0]
        for j, y in enumerate(b):
            row.append(above[j] + 1 if x == y else max(above[j + 1], row[j]))
    return row[-1]


def _bleus(predictions, answers):
    counts = bleu_counts(predictions, answers)
    return {f"coco_bleu{n}": counts for n in (1, 2, 3, 4)}


def _total(order):
    return lambda counts: bleu(counts, order)


# What the protocol "report" computes besides exact match.
METRICS = (
    text_metrics.Metric(
        {f"coco_bleu{n}": f"BLEU-{n} (COCO)" for n in (1, 2, 3, 4)},
        _bleus,
        totals={f"coco_bleu{n}": _total(n) for n in (1, 2, 3, 4)},
    ),
    text_metrics.Metric({"coco_rougeL": "ROUGE-L (COCO)"}, lambda p, a: {"coco_rougeL": rouge_l(p, a)}),
    *(metric for metric in text_metrics.METRICS if "cider" in metric.titles),
)
MEANS = ("coco_rougeL",)
TOTALS = {name: total for metric in METRICS for name, total in metric.totals.items()}


# --- With Java ---


def ptb_words(texts, jar) -> list[list[str]]:
    """Stanford's words of each text, in lower case and without marks, as pycocoevalcap has them.

    Args:
      texts: any strings; line breaks count as blanks.
      jar: its stanford-corenlp-3.4.1.jar.

    Raises:
      ValueError: Java or the jar can't be run.
    """
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    out = _java(command, lines, jar).split("\n")[: len(texts)]
    return [[word for word in line.split(" ") if word and word not in PTB_MARKS] for line in out]


def meteor(said, true, jar) -> tuple[float, np.ndarray]:
    """METEOR 1.5 of tokenised texts, by its own program: (of all together, float[N] of each).

    M. Denkowski and A. Lavie, WMT 2014; English, -norm, as pycocoevalcap calls it. `text_metrics.meteor` is NLTK's, an
    earlier form without paraphrases.

    Args:
      said, true: [N][words].
      jar: meteor-1.5.jar, with its folder data beside it.

    Raises:
      ValueError: Java or the jar can't be run.
    """
    command = ["java", "-Xmx1G", "-jar", str(jar), "-", "-", "-stdio", "-l", "en", "-norm"]
    pairs = [(" ".join(a).replace("|||", ""), " ".join(b).replace("|||", "")) for a, b in zip(said, true, strict=True)]
    lines = "".join(f"SCORE ||| {b} ||| {a}\n" for a, b in pairs)
    counts = _java(command, lines, jar).splitlines()[: len(pairs)]
    found = _java(command, "EVAL ||| " + " ||| ".join(counts) + "\n", jar).splitlines()
    scores = [float(line) for line in found[: len(pairs) + 1]]
    return scores[-1], np.array(scores[:-1])


def _java(command, text, jar):
    try:
        done = subprocess.run(command, input=text.encode(), capture_output=True, check=True)
    except FileNotFoundError:
        raise ValueError("java isn't installed, which the COCO evaluation's tokeniser and METEOR are run by.") from None
    except subprocess.CalledProcessError as e:
        said = e.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(f"java can't run {jar}: {said[-1] if said else f'exit code {e.returncode}'}.") from None
    return done.stdout.decode()
