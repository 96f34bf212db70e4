"""Every figure of an evaluation, from the rows of its predictions.jsonl.

The evaluators and `tools.report` call the same function, so a figure can't differ from what the
predictions say. It needs no model and no file. The meaning of each figure is documented with its
function in `answers`, `protocols`, `text_metrics` and `stats`.

A figure is named `{who}/{group}/{figure}`.

who      "model" or a control: CONTROLS says what each is.
group    "overall", "answer_type/CLOSED", "content_type/Organ", "modality/CT", …: see GROUPS.
figure   acc         equal after `answers.normalise`; the figure of the tables. An answer with boxes is right if what
                     stands before them is, and each box (`detection.equal`)
        acc_strict  equal except for case and surrounding blanks: the usual "exact match"
         acc_set     as acc, but the parts of a comma-separated answer may come in any order
         and by protocol:
         closed           llava_closed
         open             those of `text_metrics.METRICS`: f1, recall, llava_recall, rouge1, …,
                          bleu (of the corpus), bleu_rows (mean over questions); ROUGE and BLEU where the
                          extra `text` is installed
         report           coco_bleu1 to coco_bleu4 (totals), coco_rougeL, cider: see `coco`
         lmms_eval_slake, …  other programs' own: see `peers`, whose name stands for all of them at once
         detection        iou, pointing, words, no_box, malformed, ap50, ap: see `detection`
        multiple_choice  acc_letter, acc_text, qa_score, no_letter (share of answers that name no
                          letter); if choices were scored, acc_likelihood and acc_likelihood_token

Each uses the first sample of every question. Suffixes:

_low, _high       95 % interval: for acc, Wilson's, for independent questions; for the others one that
                  keeps questions on one image together, Wilson's for shares of questions, the
                  bootstrap for means. Totals, such as bleu, have none; ap50 and ap have one overall.
_cluster_low, _cluster_high   for acc: the same, with questions on one image (or of one patient) kept together
_mean, _sd        with several samples: mean over the runs, and their standard deviation; run i is
                  sample i of every question
_mean_low, _mean_high   95 % interval of that mean, with questions on one image kept together; for
                  figures that have an interval

With several samples also nonrobust (share of questions with three or more different answers),
acc_penalised_item (both with _low and _high, images kept together) and acc_penalised_total (acc_mean
docked for those questions, by the two readings of `protocols.penalised`; in multiple choice letters are
compared and docked, if the truth is a letter).

Also: n (questions), `n/{group}`, images (distinct ones), and, if the rows say so, truncated (prompts
that lost tokens) and unfinished (answers of the model, over all samples, without EOS within
max_new_tokens).
"""

import functools

import numpy as np

from paligemma_med.metrics import answers, coco, detection, peers, protocols, stats, text_metrics
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import rows as row_keys

# Controls without a model: the most frequent answer in training, to the same question and to any
# question of the same answer type; the question itself as the answer.
TEXT_CONTROLS = ("majority", "majority_type", "echo")
# The mean box of training's answers to the same question, a control of answers with boxes.
MEAN_BOX = "mean_box"
ONE_TEXT = (*TEXT_CONTROLS, MEAN_BOX)  # controls that give a single answer
# The same model and prompts with other images: another question's, mid-grey, noise.
IMAGE_CONTROLS = ("shuffled_images", "blank_image", "noise_image")
CONTROLS = (*TEXT_CONTROLS, *IMAGE_CONTROLS)
# The same without any image, which only a model behind a server can be asked: ours takes one always.
QUESTION_ONLY = "question_only"
# Other ways of asking the same questions: see `dialogue`.
HISTORIES = ("true_history", "single_turn")
PROTOCOLS = ("vqa", "closed", "open", "multiple_choice", "detection", "report", *peers.NAMES)
# Keys of a row whose values are the groups in the tables.
GROUPS = ("turn", *row_keys.GROUPS)
MAX_VALUES = 30  # a key with more values than this is a description, not a group
NAMES = ("box_name",)  # groups of any number

_FORMS = dict(acc=answers.normalise, acc_strict=answers.strict, acc_set=answers.as_set)


@functools.lru_cache(1 << 16)
def _scores(prediction, answer):
    if not detection.has_boxes(answer):
        return tuple(form(prediction) == form(answer) for form in _FORMS.values())
    boxes = detection.equal(prediction, answer)
    said, true = (boxes_lib.read(text).answer for text in (prediction, answer))
    return tuple(boxes and form(said) == form(true) for form in _FORMS.values())


def score(prediction, answer) -> dict[str, bool]:
    """{figure: bool} for the three figures, without a thought before the prediction; `answer` is a text or several
    (`truths`), of which one is enough."""
    said = answers.without_thought(prediction)
    each = [_scores(said, a) for a in ([answer] if isinstance(answer, str) else answer)]
    return dict(zip(_FORMS, map(any, zip(*each))))


def truths(row) -> tuple[str, ...]:
    """What counts as right for a question: its answer, and the lines of `accepted_answers` where it has them."""
    return tuple(dict.fromkeys((row["answer"], *filter(None, str(row.get(row_keys.ACCEPTED) or "").split("\n")))))


def _nearest(prediction, row):
    """The accepted answer that shares most with a prediction, the first of equals: what other figures compare with."""
    right = truths(row)
    return max(right, key=lambda a: protocols.token_f1(prediction, a)) if len(right) > 1 else row["answer"]


def correct(prediction, answer, prefix="") -> dict[str, bool]:
    """`score` under the keys of a row: {prefix + "correct", …_strict, …_set: bool}."""
    return {prefix + figure.replace("acc", "correct"): x for figure, x in score(prediction, answer).items()}


def texts(row, who) -> list[str]:
    """The answers of the model or a control to a question: a list of strings, one per sample, without thoughts."""
    if who in ONE_TEXT:
        return [row[f"{who}_prediction"]]
    return [answers.without_thought(x) for x in row["predictions" if who == "model" else f"{who}_predictions"]]


def controls_of(rows) -> tuple[str, ...]:
    """The controls in rows of predictions.jsonl, in the order of the tables."""
    return tuple(
        c for c in (*ONE_TEXT, *IMAGE_CONTROLS, QUESTION_ONLY, *HISTORIES) if rows and f"{c}_correct" in rows[0]
    )


def summarise(rows, protocol="vqa", controls=None, groups=GROUPS) -> dict[str, float]:
    """The figures of an evaluation that the top of this file describes.

    Args:
      rows: dicts of predictions.jsonl, one or more.
      protocol: one of PROTOCOLS.
      controls: which controls to include; None: all that the rows have.
      groups: keys of a row; keys that rows lack, or that have many values, are left out.

    Returns:
      {name: number}.

    Raises:
      ValueError: no rows, or an unknown protocol.
    """
    if not rows:
        raise ValueError("there are no questions to evaluate on.")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; expected one of {list(PROTOCOLS)}.")
    columns = ("model", *(controls_of(rows) if controls is None else controls))
    members = {"overall": np.arange(len(rows))}
    for key in groups:
        values = np.array([str(row.get(key) or "") for row in rows])
        names = sorted({*values} - {""})
        if len(names) <= MAX_VALUES or key in NAMES:
            members |= {f"{key}/{v}": np.flatnonzero(values == v) for v in names}
    clusters = np.array([cluster(row) for row in rows])
    tables = {who: _values(rows, who, protocol) for who in columns}
    compared = {who: _compared(rows, who, protocol) for who in columns}
    metrics = {"n": len(rows), "images": len({_image(row) for row in rows})}
    if any(row.get("patient_id") for row in rows):
        metrics["patients"] = len({*clusters})
    for group, inside in members.items():
        if group != "overall":
            metrics[f"n/{group}"] = len(inside)
        for who in columns:
            values = {k: v[inside] for k, v in tables[who].items()}
            figures = _figures(values, clusters[inside])
            forms, name = compared[who]
            figures |= _robustness([forms[i] for i in inside], values[name], clusters[inside])
            metrics |= {f"{who}/{group}/{figure}": x for figure, x in figures.items()}
        metrics |= _bootstrapped(tables, columns, group, inside, clusters[inside])
    for who in columns if protocol == "detection" else ():
        metrics |= _precisions(rows, who, members, clusters)
    for name, count in (("tokens_cut", lambda x: x > 0), ("unfinished", int)):
        if name in rows[0]:
            key = {"tokens_cut": "truncated"}.get(name, name)
            metrics[key] = sum(int(count(row[name])) for row in rows)
    return metrics


def cluster(row) -> str:
    """The key that questions share which aren't independent: the patient, where one is named; else the image's digest,
    else its id."""
    if patient := row.get("patient_id"):
        return f"patient {patient}"
    return _image(row)


def _image(row):
    return str(row.get("image_key") or row.get("image_id") or row["question_id"])


def _precisions(rows, who, members, clusters):
    """Average precision of each group of questions, with an interval of all of them."""
    prefix = "" if who == "model" else f"{who}_"
    confidences = [row.get(f"{prefix}logprobs", [0.0])[0] for row in rows]
    found = detection.Matches([texts(row, who)[0] for row in rows], [row["answer"] for row in rows], confidences)
    out = {}
    for group, inside in members.items():
        ap50, ap = found.precision(np.bincount(inside, minlength=len(rows)))
        out |= {f"{who}/{group}/ap50": ap50, f"{who}/{group}/ap": ap}
    low, high = stats.resampled(found.precision, clusters)
    for i, figure in enumerate(("ap50", "ap")):
        out |= {f"{who}/overall/{figure}_{end}": float(x[i]) for end, x in (("low", low), ("high", high))}
    return {name: x for name, x in out.items() if np.isfinite(x)}


# --- Values: float[questions, samples] per figure, int[questions, samples, K] per total ---


def _values(rows, who, protocol):
    samples = [texts(row, who) for row in rows]
    if len(lengths := {len(x) for x in samples}) != 1:
        raise ValueError(f"questions have {sorted(lengths)} samples of {who}; expected as many for each.")
    pairs = [[(text, _nearest(text, row)) for text in x] for x, row in zip(samples, rows)]

    def each(function):
        return np.array([[function(*pair) for pair in x] for x in pairs], float)

    right = [[[score(text, truths(row))[f] for f in _FORMS] for text in x] for x, row in zip(samples, rows)]
    out = dict(zip(_FORMS, np.moveaxis(np.array(right, float), -1, 0)))
    if protocol == "closed":
        out["llava_closed"] = each(protocols.llava_med_closed)
    elif protocol in ("open", "report"):
        for metric in text_metrics.installed() if protocol == "open" else coco.METRICS:
            out |= _text_metric(metric, pairs)
    elif protocol == "multiple_choice":
        out |= _choices(rows, samples, who)
    elif protocol == "detection":
        scores = [[detection.score(text, row["answer"]) for text in x] for x, row in zip(samples, rows)]
        names = (*detection.MEANS, *detection.SHARES)
        out |= {name: np.array([[score[name] for score in x] for x in scores]) for name in names}
    elif protocol in peers.NAMES:
        scores = [[peers.score(row, text, protocol) for text in x] for x, row in zip(samples, rows)]
        out |= {name: np.array([[score[name] for score in x] for x in scores], float) for name in scores[0][0]}
    return out


def _text_metric(metric, pairs):
    """Values of a text metric for [question][sample] pairs of texts."""
    if metric.is_of_corpus:
        runs = [metric.score(*map(list, zip(*run))) for run in zip(*pairs)]
        return {name: np.stack([run[name] for run in runs], axis=1) for name in metric.titles}
    # Each distinct pair of texts is scored once.
    unique = sorted({pair for x in pairs for pair in x})
    place = {pair: i for i, pair in enumerate(unique)}
    index = np.array([[place[pair] for pair in x] for x in pairs])
    values = metric.score(*map(list, zip(*unique)))
    return {name: values[name][index] for name in metric.titles}


def _choices(rows, samples, who):
    for row in rows:
        if missing := [k for k in ("choices", "answer_letter") if not row.get(k)]:
            raise ValueError(
                f"question {row['question_id']!r} has no {missing[0]!r}, which the protocol "
                f"multiple_choice needs; found {sorted(row)}."
            )
    right = [ord(row["answer_letter"]) - ord("A") for row in rows]
    letters = _letters(rows, samples)
    out = dict(
        acc_letter=[[x == row["answer_letter"] for x in xs] for xs, row in zip(letters, rows)],
        no_letter=[[x is None for x in xs] for xs in letters],
        acc_text=[
            [protocols.closest_option(x, row["choices"]) == i for x in xs] for xs, row, i in zip(samples, rows, right)
        ],
        qa_score=[
            [protocols.qa_score(x, row["choices"], row["choices"][i]) for x in xs]
            for xs, row, i in zip(samples, rows, right)
        ],
    )
    prefix = "" if who == "model" else f"{who}_"
    if f"{prefix}option_logprobs" in rows[0]:
        for name, per_token in (("acc_likelihood", False), ("acc_likelihood_token", True)):
            chosen = [
                protocols.most_likely_option(
                    row[f"{prefix}option_logprobs"], row["option_tokens"] if per_token else None
                )
                for row in rows
            ]
            out[name] = [[i == j] for i, j in zip(chosen, right)]
    return {k: np.array(v, float) for k, v in out.items()}


def _letters(rows, samples):
    return [[protocols.letter(x, row["choices"]) for x in xs] for xs, row in zip(samples, rows)]


# --- Figures of a group ---


def _figures(values, clusters):
    out, totals = {}, {}
    for name, x in values.items():
        if total := text_metrics.TOTALS.get(name) or coco.TOTALS.get(name):
            runs = [total(x[:, i]) for i in range(x.shape[1])]
            totals |= {name: runs[0]} | (_runs(name, np.array([runs])) if len(runs) > 1 else {})
            continue
        known = ~np.isnan(x[:, 0])  # by other programs' protocols figures are of some questions alone
        if not known.any():
            continue
        x, inside = x[known], clusters[known]
        out[name] = float(x[:, 0].mean())
        if name == "acc":
            out["acc_low"], out["acc_high"] = stats.wilson(int(x[:, 0].sum()), len(x))
            low, high = stats.wilson_clustered(x[:, 0], inside)
            out["acc_cluster_low"], out["acc_cluster_high"] = low, high
        elif not _is_mean(name) and name not in _FORMS:
            out[f"{name}_low"], out[f"{name}_high"] = stats.wilson_clustered(x[:, 0], inside)
        if x.shape[1] > 1:
            out |= _runs(name, x)
        if x.shape[1] > 1 and not _is_mean(name) and name not in ("acc_strict", "acc_set"):
            low, high = stats.wilson_clustered(x.mean(axis=1), inside)
            out[f"{name}_mean_low"], out[f"{name}_mean_high"] = low, high
    return out | totals


def _is_mean(name):
    return name in text_metrics.MEANS or name in coco.MEANS or name in detection.MEANS or name in peers.MEANS


def _runs(name, values):
    mean, sd = protocols.accuracy_over_runs(values)
    return {f"{name}_mean": mean, f"{name}_sd": sd}


def _compared(rows, who, protocol):
    """([question][sample] of what is compared between answers, the figure that goes with it)."""
    samples = [texts(row, who) for row in rows]
    if protocol == "multiple_choice" and all(r["answer"] == r["answer_letter"] for r in rows):
        return _letters(rows, samples), "acc_letter"
    return [[answers.normalise(x) for x in xs] for xs in samples], "acc"


def _robustness(forms, hits, clusters):
    if hits.shape[1] == 1:
        return {}
    bad = protocols.nonrobust(forms, form=None)
    out = {"nonrobust": float(bad.mean())}
    for reading in ("item", "total"):
        out[f"acc_penalised_{reading}"], _ = protocols.penalised(hits, forms, reading, form=None)
    shares = dict(nonrobust=bad, acc_penalised_item=np.where(bad, 0.0, hits.mean(axis=1)))
    for name, x in shares.items():
        out[f"{name}_low"], out[f"{name}_high"] = stats.wilson_clustered(x, clusters)
    return out


def _bootstrapped(tables, columns, group, inside, clusters):
    """Intervals of a group's means, all from the same draws of images."""
    names = [
        (who, k) for who in columns for k, x in tables[who].items() if _is_mean(k) and not np.isnan(x[inside, 0]).all()
    ]
    if not names:
        return {}
    values = {}
    for who, k in names:
        x = tables[who][k][inside]
        values[f"{who}/{group}/{k}"] = x[:, 0]
        if x.shape[1] > 1:
            values[f"{who}/{group}/{k}_mean"] = x.mean(axis=1)
    stacked = np.stack([*values.values()], axis=1)
    known = ~np.isnan(stacked)
    # Of some questions alone a mean is a ratio: their sum, over how many of them a draw has.
    weights = None if known.all() else known.astype(float)
    ends = zip(("low", "high"), stats.bootstrap(np.where(known, stacked, 0.0), clusters, weights=weights))
    figures = {f"{name}_{end}": float(x) for end, xs in ends for name, x in zip(values, xs)}
    # A single image gives no interval.
    return {k: x for k, x in figures.items() if np.isfinite(x)}
