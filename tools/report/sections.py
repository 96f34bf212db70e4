"""What a report says about each evaluation, and about two that answered the same questions."""

import collections
import math

import numpy as np

from paligemma_med.evaluation import results
from paligemma_med.judge.criteria import PROTOCOLS
from paligemma_med.metrics import answers, scoring, stats, tables
from tools.report import blocks, contamination, detection, figures, plots

_BINS = 10


def overview(evaluations) -> blocks.Section:
    """Which runs, on which questions, with which weights and command; and what is wrong with them."""
    parts = []
    for e in evaluations:
        parts += [blocks.Warning(f"{e.label}: {problem}.") for problem in e.problems]
    rows = []
    for e in evaluations:
        hashes = {
            "split_hash": results.split_hash(e.rows),
            "prompt_hash": results.prompt_hash(e.rows),
        }
        split = e.about.get("split") or " ".join(str(e.data[k]) for k in ("name", "split") if e.data.get(k))
        images = len(set(e.clusters)) if any(map(has_image, e.rows)) else None
        rows.append(
            [
                e.run,
                e.name,
                split or "unknown",
                e.protocol,
                f"{len(e.rows):,}",
                "?" if images is None else f"{images:,}",
                *(h[:12] for h in hashes.values()),
                str(e.about.get("fingerprint") or "")[:12] or str(e.about.get("model") or "?")[:60],
            ]
        )
    head = ["run", "evaluation", "split", "protocol", "questions", "images", "split hash"]
    head += ["prompt hash", "weights"]
    notes = [f"{e.label}: {e.about['command']}" for e in evaluations if isinstance(e.about.get("command"), str)]
    notes.append(
        "Equal split hashes: the same questions, images' ids and answers in the same order. "
        "Weights: their fingerprint, or the name of a model behind a server; ? where metrics.json doesn't say."
    )
    parts.append(blocks.Table(head, rows, "Evaluations", notes, left=4))
    return blocks.Section("What was evaluated", parts)


def has_image(row) -> bool:
    """Whether it is known which image a question is about."""
    return bool(row.get("image_key") or row.get("image_id"))


def about_measures() -> blocks.Section:
    """How to read the figures."""
    texts = [
        "Exact match: equal to the truth after lower-casing, spacing of commas and final "
        "punctuation; nothing else. Strict: lower case only. Any order: a list's parts may be "
        "swapped. With several answers a question, the first counts unless it says otherwise.",
        "Intervals are of 95 %: Wilson's for shares of questions, a bootstrap for other means, "
        "both with questions on one image kept together; where images are unknown, as if "
        "independent.",
        "Controls: majority answer, the most frequent training answer to the same question (no "
        "image needed); majority of type, to any question of its answer type; question echoed, the "
        "question as the answer; images shuffled, grey image, noise image: the same model and "
        "prompts with another question's image, mid-grey, or noise; question only: a model behind a "
        "server, asked without any image. A model that isn't above these has not been shown to use "
        "the image.",
        "Non-robust: three different answers or more among a question's samples. Penalised by "
        "item: such a question counts as wrong. Penalised in total: each takes a percentage point "
        "off the score. The paper's words allow for both.",
    ]
    return blocks.Section("How to read this", [blocks.Text(text) for text in texts])


# --- One evaluation ---


def of_evaluation(e, lookup, num_questions=8) -> list[blocks.Section]:
    """The sections on one evaluation.

    Args:
      e: `Evaluation`.
      lookup: `pictures.Lookup` of its data set.
      num_questions: how many worst and how many least robust questions to show.
    """
    top = [blocks.Warning(f"{problem}.") for problem in e.problems] + cut_short(e) + figures_of(e)
    out = [blocks.Section(e.label, top), reliability(e)]
    for title, rows, note in (
        ("Worst answers", worst(e, num_questions), _WORST),
        ("Least robust questions", least_robust(e, num_questions), _LEAST),
    ):
        shown = [blocks.Text(note.format(samples=e.samples))]
        if e.samples == 1 and title.startswith("Least"):
            shown = [blocks.Text("Not run: robustness needs several answers a question.")]
        elif not rows:
            shown = [blocks.Text("None.")]
        elif lookup.note:
            shown.append(blocks.Text(f"Without images: {lookup.note}."))
        shown += [question_block(e, row, lookup) for row in rows]
        out.append(blocks.Section(f"{title}: {e.label}", shown, 3))
    title = f"Does it look at the image? {e.label}"
    out.append(contamination.section(title, contamination.ours(e), 3, _unmoved(e)))
    return out


def figures_of(e) -> list:
    """Accuracies as a table and a plot, the other figures, the controls, and what judges said."""
    who = figures.who_of(e)
    plot = blocks.Figure(
        plots.accuracies(f"accuracies {e.label}", e.metrics, who, e.rule),
        f"{figures.RULES[e.rule].capitalize()}, with 95 % intervals; number of questions in brackets.",
        f"Accuracy of {', '.join(map(figures.title_of, who))} by group; the numbers are in the table above.",
    )
    more = (further_table(e), controls_table(e), judge_table(e))
    return [*detection.of_evaluation(e), accuracy_table(e), plot, *filter(None, more)]


def cut_short(e) -> list[str]:
    """Sentences about prompts and answers that didn't fit."""
    truncated, unfinished = (e.metrics.get(key, 0) for key in ("truncated", "unfinished"))
    said, out = len(e.rows) * e.samples, []
    if truncated:
        text = f"{truncated:,} of {len(e.rows):,} prompts lost tokens: they didn't fit."
        out.append(blocks.Warning(text))
    if unfinished:
        # At temperature 1 a few answers never end.
        kind = blocks.Warning if unfinished > said / 100 else blocks.Text
        out.append(kind(f"{unfinished:,} of {said:,} answers were cut off at max_new_tokens."))
    return out


_WORST = (
    "Wrong in most of their samples, and of these the ones of which the model was surest: the "
    "probability that it gave to its answer stands behind each."
)
_LEAST = "The questions with the most different answers among {samples}."


def accuracy_table(e) -> blocks.Table:
    """Exact match by group, of the model and its controls."""
    who = figures.who_of(e)
    rows, above = [], None
    for group, key, value, n in figures.groups_of(e.metrics):
        cells = [tables.as_text(e.metrics, name, group, e.rule) for name in who]
        rows.append(["" if key == above else key, value, *cells, f"{n:,}"])
        above = key
    head = ["", f"{figures.RULES[e.rule]}, %", *map(figures.title_of, who), "n"]
    notes = ["95 % in brackets; questions on one image are kept together."]
    if e.samples > 1:
        notes.append("Mean over runs ± their standard deviation; a control has as many as it ran.")
    return blocks.Table(head, rows, e.protocol, notes, left=2)


def further_table(e) -> blocks.Table:
    """The other figures of `scoring` over all questions, or over closed ones for figures made for those."""
    who, found = figures.who_of(e), []
    for name in figures.names(e.metrics):
        title, group = tables.FIGURES.get(name, name), tables.group_of(name, e.metrics)
        if group != "overall":
            title += f", {e.metrics[f'n/{group}']:,} closed questions"
        if name != e.rule:
            found.append([title, *(tables.as_text(e.metrics, w, group, name) for w in who)])
    head = ["all questions, %", *map(figures.title_of, who)]
    title = f"Other figures, protocol {e.about.get('protocol', 'vqa')}"
    notes = ["95 % in brackets, where there is an interval; questions on one image kept together."]
    if e.samples > 1:
        notes.append("Mean over runs ± their standard deviation.")
    return blocks.Table(head, found, title, notes)


def controls_table(e) -> blocks.Table | None:
    """Whether the model is above each control on the same questions."""
    model = _first(e)
    rows = []
    for c in e.controls:
        theirs = _first(e, c)
        rows.append([figures.title_of(c), *paired(theirs, model, e.clusters)])
    if not rows:
        return None
    return blocks.Table(["against", *_PAIRED], rows, "The model against its controls", [_PAIRED_NOTE])


_PAIRED = ("gain, points (95 %)", "p, bootstrap", "only this right", "only the other", "p, McNemar", "needed")
_PAIRED_NOTE = (
    "Paired on the same questions. The bootstrap draws images, not questions, where images can be "
    "told apart. McNemar's test is exact and takes questions for independent. Needed: questions "
    "that show a gain as large as this one (at 5 %, with 80 % power) in a paired test, more the "
    "more questions share an image."
)


def paired(a, b, clusters) -> list[str]:
    """Cells about b's gain over a: a list of texts for the columns of `_PAIRED`."""
    gain, low, high, p = stats.paired_bootstrap(a, b, clusters)
    only_a, only_b, exact = stats.mcnemar(a, b)
    both = (np.mean(a), np.mean(b))
    difference = np.asarray(b, float) - np.asarray(a, float)
    effect = stats.design_effect(difference, clusters)
    n = stats.needed(*both, (only_a + only_b) / len(a), design_effect=effect)
    ends = "–" if math.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
    return [
        f"{100 * gain:+.1f} ({ends})",
        _p(p),
        f"{only_b:,}",
        f"{only_a:,}",
        _p(exact),
        "∞" if math.isinf(n) else f"{n:,}",
    ]


def _p(p):
    return "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"


def judge_entry(e, protocol="binary") -> dict | None:
    """The part of judge.json with the paper's criterion, or None."""
    return next((x for x in e.verdicts if x["protocol"] == protocol), None)


def judge_table(e) -> blocks.Table | None:
    """What language models judged about the answers, if they were asked."""
    rows, notes = [], []
    for entry in e.verdicts:
        m, scores = entry["metrics"], PROTOCOLS[entry["protocol"]].scores
        for who in [k.partition("/")[0] for k in m if k.endswith("/overall/mean")]:
            values = {f: m.get(f"{who}/overall/{f}") for f in ("mean", "mean_low", "mean_high", "sd")}
            mean, low, high, sd = ("–" if v is None or math.isnan(v) else f"{v:.3f}" for v in values.values())
            counts = (f"{m[f'{who}/overall/{f}']:,}" for f in ("unjudged", "n"))
            name = f"{entry.get('model')}, {entry['protocol']}, {scores[0]} to {scores[-1]}"
            rows.append([name, figures.title_of(who), f"{mean} ({low}–{high})", sd, *counts])
        digest = str(entry.get("prompt_digest"))[:12]
        notes.append(f"Prompt {entry.get('prompt')} ({digest}): {entry.get('prompt_text')}")
        if (tokens := entry.get("tokens")) and "replies" in tokens:
            cost = entry.get("cost")
            notes.append(
                f"{tokens['replies']:,} replies, {tokens['unusable']:,} of them unusable; "
                f"{tokens['prompt_tokens']:,} + {tokens['completion_tokens']:,} tokens"
                + ("." if cost is None else f", cost {cost:.4f}.")
            )
        if found := entry.get("agreement"):
            kappas = (("kappa", "Cohen's kappa"), ("kappa_quadratic", "quadratic kappa"))
            said = [f"{100 * (found['agree'] or 0):.1f} % equal"] + [
                f"{title} " + ("not defined" if found[k] is None else f"{found[k]:.3f}")
                for k, title in kappas
                if k in found
            ]
            notes.append(f"Human labels: {found['n']:,} compared, {found['unjudged']:,} unjudged; {', '.join(said)}.")
    if not rows:
        return None
    head = ["judge", "of", "mean score (95 %)", "sd over runs", "unjudged", "verdicts"]
    return blocks.Table(head, rows, "Language models as judges", notes, left=2)


# --- Confidence ---


def reliability(e) -> blocks.Section:
    """Confidence against accuracy: for the first answer its probability, for the most frequent one the share
    of samples that agree."""
    panels, notes = [], []
    if all(row.get("logprobs") for row in e.rows):
        confidence = [math.exp(min(0.0, row["logprobs"][0])) for row in e.rows]
        right = _first(e)
        panels.append(("probability of the first answer", bins(confidence, right)))
        notes.append(f"expected calibration error by probability {_ece(panels[-1][1]):.3f}")
    if e.samples > 1:
        confidence, right = [], []
        for row in e.rows:
            said = figures.forms(row, e.rule)
            common, count = collections.Counter(said).most_common(1)[0]
            confidence.append(count / len(said))
            right.append(figures.hits(row, e.rule)[said.index(common)])
        panels.append((f"agreement of {e.samples} answers", bins(confidence, right)))
        notes.append(f"by agreement {_ece(panels[-1][1]):.3f}")
    title = f"Reliability: {e.label}"
    if not panels:
        return blocks.Section(title, [blocks.Text("Not run: there are no log-probabilities.")], 3)
    caption = (
        "Confidence (mean of its tenth) against the share that is right, with 95 % Wilson "
        "intervals and the number of questions; on the dashed line confidence would be right. "
        f"Mean distance weighted by questions: {', '.join(notes)}."
    )
    alt = "; ".join(
        f"{name}: " + ", ".join(f"{100 * b[0]:.0f} % sure, {100 * b[1]:.0f} % right" for b in found)
        for name, found in panels
    )
    table = blocks.Table(
        ["confidence", "from", "to", "mean, %", "right, %", "95 %", "n"],
        [
            [
                name,
                *_tenth(b),
                f"{100 * b[0]:.1f}",
                f"{100 * b[1]:.1f}",
                f"{100 * b[2]:.1f}–{100 * b[3]:.1f}",
                f"{b[4]:,}",
            ]
            for name, found in panels
            for b in found
        ],
    )
    return blocks.Section(title, [blocks.Figure(plots.reliability(title, panels), caption, alt), table], 3)


def bins(confidence, right) -> list[tuple]:
    """[(mean confidence, accuracy, low, high, n)] for the tenths of [0, 1] that aren't empty; a tenth
    includes its upper end."""
    members = collections.defaultdict(list)
    for c, r in zip(confidence, right):
        members[_bin(c)].append((c, r))
    out = []
    for _, found in sorted(members.items()):
        hits, n = sum(r for _, r in found), len(found)
        low, high = stats.wilson(hits, n)
        out.append((sum(c for c, _ in found) / n, hits / n, low, high, n))
    return out


def _bin(confidence):
    # Rounded, since a mean of 0.2s may be 0.20000000000000004.
    return min(_BINS - 1, max(0, math.ceil(round(confidence * _BINS, 9)) - 1))


def _tenth(b):
    i = _bin(b[0])
    return f"{i / _BINS:.1f}", f"{(i + 1) / _BINS:.1f}"


def _ece(found):
    total = sum(b[4] for b in found)
    return sum(b[4] * abs(b[0] - b[1]) for b in found) / total


# --- Questions ---


def _first(e, who="model"):
    """Whether the first answer of each question is right."""
    return [figures.hits(row, e.rule, who)[0] for row in e.rows]


def worst(e, count) -> list[dict]:
    """The rows whose first answer is wrong, ordered by how often they are wrong, then by confidence."""

    def order(row):
        surest = (row.get("logprobs") or [-math.inf])[0]
        return np.mean(figures.hits(row, e.rule)), -surest, str(row["question_id"])

    rows = [row for row in e.rows if not figures.hits(row, e.rule)[0]]
    return sorted(rows, key=order)[:count]


def least_robust(e, count) -> list[dict]:
    """The rows with the most different answers, two or more."""

    def order(row):
        count = len({*figures.forms(row, e.rule)})
        return -count, np.mean(figures.hits(row, e.rule)), str(row["question_id"])

    return sorted((row for row in e.rows if order(row)[0] < -1), key=order)[:count]


def question_block(e, row, lookup) -> blocks.Question:
    """A question with its image, prompt, truth and answers."""
    texts = row["predictions"]
    logprobs = row.get("logprobs") or []
    remarks = [f"p = {math.exp(min(0.0, x)):.3f}" for x in logprobs]
    remarks += [""] * (len(texts) - len(remarks))
    return blocks.Question(
        f"{row['question_id']}: {row['question']}",
        row["prompt"],
        row["answer"],
        list(zip(texts, figures.hits(row, e.rule), remarks)),
        lookup.image(row["question_id"]),
    )


def _unmoved(e):
    """Answers that don't change when the image is replaced, if that was run."""
    rows = []
    for who in (*scoring.IMAGE_CONTROLS, scoring.QUESTION_ONLY):
        if who not in e.controls:
            continue
        same = [len({answers.normalise(scoring.texts(row, name)[0]) for name in (who, "model")}) == 1 for row in e.rows]
        right = [s and r for s, r in zip(same, _first(e))]
        shares = (f"{100 * np.mean(x):.1f}" for x in (same, right))
        rows.append([figures.title_of(who), *shares])
    if not rows:
        return [blocks.Text("Not run: answers with other images (controls=all runs them).")]
    head = ["image replaced by", "answer unchanged, %", "unchanged and right, %"]
    note = "First answers. When answers are sampled, some change by chance alone."
    return [blocks.Table(head, rows, "Answers that don't depend on the image", [note])]


# --- Two evaluations ---


def compare(a, b) -> blocks.Section:
    """b against a on the questions that both answered, as a `Section`."""
    in_a = {_key(row): row for row in a.rows}
    pairs = [(in_a[_key(row)], row) for row in b.rows if _key(row) in in_a]
    changed = sum(x["answer"] != y["answer"] or x["question"] != y["question"] for x, y in pairs)
    parts = []
    if not pairs or changed:
        what = "no question ids" if not pairs else f"ids, but {changed:,} other questions or answers"
        parts.append(blocks.Warning(f"They share {what}: there is nothing to compare."))
        return blocks.Section(f"{b.label} against {a.label}", parts)
    if len(pairs) < max(len(a.rows), len(b.rows)):
        parts.append(
            blocks.Warning(
                f"Not the same split: {len(a.rows):,} and {len(b.rows):,} questions, of which "
                f"{len(pairs):,} are in both and compared here."
            )
        )
    ways = [e.protocol.partition(", protocol")[0] for e in (a, b)]
    if ways[0] != ways[1]:
        parts.append(
            blocks.Warning(
                f"Not asked in the same way: {a.run}, {ways[0]}; {b.run}, {ways[1]}. First answers "
                "are compared, and a sampled one is right less often than the most probable one."
            )
        )
    if any(x["prompt"] != y["prompt"] for x, y in pairs):
        parts.append(blocks.Text("Their prompts differ."))
    groups = collections.OrderedDict(overall=pairs)
    for key in scoring.GROUPS:
        for value in sorted({str(y[key]) for _, y in pairs if y.get(key)}):
            groups[value] = [p for p in pairs if str(p[1].get(key)) == value]
    rows = []
    for name, members in groups.items():
        mine = [scoring.cluster(y) for _, y in members]
        both = [[figures.hits(row, b.rule)[0] for row in side] for side in zip(*members)]
        rates = [f"{100 * np.mean(x):.1f}" for x in both]
        rows.append([name, *rates, *paired(*both, mine), f"{len(members):,}"])
    head = [f"{figures.RULES[b.rule]}, %", a.run, b.run, *_PAIRED, "n"]
    notes = [_PAIRED_NOTE]
    if len(rows) > 1:
        notes.append(f"{len(rows)} tests: by chance alone one in 20 falls below 0.05.")
    parts.append(blocks.Table(head, rows, "Paired on the same questions", notes))
    if a.samples > 1 and b.samples > 1:
        shares = [[float(np.mean(figures.hits(row, b.rule))) for row in side] for side in zip(*pairs)]
        mine = [scoring.cluster(y) for _, y in pairs]
        gain, low, high, p = stats.paired_bootstrap(*shares, mine)
        parts.append(
            blocks.Text(
                f"Over all samples: {100 * np.mean(shares[0]):.1f} and "
                f"{100 * np.mean(shares[1]):.1f} %, a gain of {100 * gain:+.1f} points "
                f"({100 * low:+.1f} to {100 * high:+.1f}), p {_p(p)}."
            )
        )
    return blocks.Section(f"{b.label} against {a.label}", parts)


def _key(row):
    """The key of a question; in dialogues it can be asked at several places."""
    return tuple(str(row.get(key)) for key in ("question_id", "dialogue_id", "turn"))
