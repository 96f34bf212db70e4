"""Measures saliency maps against boxes: do they point at what the answer names?

    python -m tools.eval_saliency --workdir=out/slake_mini --split=validate --out=out/saliency

Takes the questions whose answer names an organ or a finding that has a box in the image, has the
model answer them, and compares each method's map of that answer with the boxes, beside maps that
know nothing of the model. Deletion and insertion curves ask the model itself whether the patches
that a map ranks first matter. docs/saliency.md says what the figures mean.

Writes predictions.jsonl (a line a question), metrics.json and saliency.md to --out. Stopped at any
point, the same command goes on where it was.
"""
# The docstring above is what --help prints.

import contextlib
import math
import pathlib
import re
import sys

import numpy as np
import tqdm
from absl import app, flags

from paligemma_med import cli, decode, experiment, files, input_pipeline, weights
from paligemma_med.evaluation import results
from paligemma_med.evaluation.questions import image_key
from paligemma_med.metrics import answers, stats
from paligemma_med.parallel import distributed, sharding
from paligemma_med.pp import get_preprocess_fn, images
from paligemma_med.saliency import (
    capture,
    checks,
    localisation,
    occlusion,
    raw,
    relevancy,
    rollout,
    sanity,
    sequence,
)

# Of the model; `maps_of` makes them.
METHODS = ("raw_last", "raw_mean", "rollout", "rollout_siglip", "relevancy", "relevancy_siglip", "occlusion")
# Of nothing, of where things mostly are, of where the patient is, of where training boxes are, of
# where training boxes of the same label are (which takes the answer from the truth).
PRIORS = ("random", "centre", "body", "train_boxes", "label_boxes")
BOX_FIGURES = ("pointing", "touching", "energy", "iou")
CURVES = ("deletion", "insertion")
SANITY = ("randomised", "other_question")
BASES = ("centre", "body", "random")  # what differences are to
ROWS = 2  # raised when rows hold something else: old ones aren't gone on with
_PAD = 32  # text tokens: so few lengths, so few programs are compiled
RANDOM_MAPS, RANDOM_ORDERS = 32, 3  # a question

# --- Which questions ---

_PAIRS = ("kidney", "lung", "mandible", "temporal lobe", "eye", "ear", "parotid", "femoral head")
# How SLAKE's answers name what its boxes call otherwise. Words of wider or another meaning
# ("intestine", "brain", "left lobe") are left out.
NAMES = {
    "large bowel": {"colon"},
    "pleural effusion": {"effusion"},
    "pulmonary mass": {"mass"},
    "pulmonary nodule": {"nodule"},
    "pulmonary infiltration": {"infiltrate"},
    "infiltration": {"infiltrate"},
    "brain tumor": {"brain enhancing tumor", "brain non-enhancing tumor"},
    **{
        form.format(name): {f"left {name}", f"right {name}"}
        for name in _PAIRS
        for form in ("{}", "{}s", "both {}", "both {}s")
    },
}


def named(answer, labels):
    """The labels that an answer names, as a sorted list.

    The answer is cut at commas and "and"; each part must be a label of the image, or a word of
    NAMES for one or both of a pair, case apart.

    Args:
      answer: str.
      labels: str each, of the image's boxes.

    Returns:
      Labels in lower case; [] unless every part has a box: of an answer that is boxed in part, a
      map may point at the other part and be right.
    """
    there = {label.lower() for label in labels}
    parts = [answers.normalise(p) for p in re.split(r",|\band\b", answers.normalise(answer))]
    found = [there & ({part} | NAMES.get(part, set())) for part in parts if part]
    return sorted(set().union(*found)) if found and all(found) else []


def boxed_questions(source):
    """The questions of a split whose answer names something with a box.

    Left out are those that begin with "where": their answer is a place, even if it names an organ.

    Args:
      source: `input_pipeline.Source` with question_id, image_id, question, answer, boxes.

    Returns:
      A list of dicts: index (of the record), question_id, image_id, question, answer, labels, boxes
      [[x, y, width, height], …] in pixels of the stored image, other_question: the next one about
      the same image that has another answer; None where there is none.

    Raises:
      ValueError: data without boxes, or without such questions.
    """
    keys = ("question_id", "image_id", "question", "answer", "boxes")
    if missing := [k for k in keys if k not in source.features]:
        raise ValueError(f"{source} has no {missing[0]!r}; expected the features {keys}.")
    out, by_image = [], {}
    for index, row in enumerate(source.columns(keys)):
        texts = {k: str(row[k]) for k in keys[:4]}
        by_image.setdefault(texts["image_id"], []).append((index, texts))
        labels = named(row["answer"], row["boxes"]["label"])
        if not labels or row["question"].strip().lower().startswith("where"):
            continue
        boxes = _boxes(row["boxes"], labels)
        out.append(dict(index=index, **texts, labels=labels, boxes=boxes))
    if not out:
        raise ValueError(f"{source} has no question whose answer names a box of its image.")
    for row in out:
        others = by_image[row["image_id"]]
        others = sorted(others, key=lambda other: (other[0] <= row["index"], other[0]))
        fit = (t["question"] for _, t in others if _differ(t, row))
        row["other_question"] = next(fit, None)
    return out


def _differ(a, b):
    same = (answers.normalise(a[k]) == answers.normalise(b[k]) for k in ("question", "answer"))
    return not any(same)


def _boxes(boxes, labels):
    pairs = zip(boxes["label"], boxes["bbox"], strict=True)
    return [[float(x) for x in box] for label, box in pairs if label.lower() in labels]


# --- Maps that know nothing of the model ---


def box_priors(source, grid):
    """Where boxes are in training.

    Returns:
      (float[h, w] mean coverage over the questions of `boxed_questions`,
       {label: float[h, w] mean coverage by the boxes of a label over the images that have one}).
    """
    sizes = {}

    def size_of(index, image_id):
        if image_id not in sizes:
            sizes[image_id] = images.size(source[index]["image"])
        return sizes[image_id]

    questions = [
        localisation.coverage(row["boxes"], size_of(row["index"], row["image_id"]), grid)
        for row in boxed_questions(source)
    ]
    by_label, seen = {}, set()
    for index, row in enumerate(source.columns(("image_id", "boxes"))):
        if row["image_id"] in seen:
            continue
        seen.add(row["image_id"])
        for label in {label.lower() for label in row["boxes"]["label"]}:
            covered = localisation.coverage(_boxes(row["boxes"], [label]), size_of(index, row["image_id"]), grid)
            by_label.setdefault(label, []).append(covered)
    return np.mean(questions, axis=0), {k: np.mean(v, axis=0) for k, v in by_label.items()}


def body_prior(image, grid):
    """The share of each patch that the patient takes (`checks.body`), float64[h, w]: a map that
    finds the foreground and knows neither question nor answer."""
    rows, columns = (x.astype(np.float64) for x in occlusion.bands(image.shape[:2], grid))
    return rows @ checks.body(image) @ columns.T / np.outer(rows.sum(1), columns.sum(1))


# --- The model's maps ---


def maps_of(model, params, seq, score, *, fill="blur"):
    """{method: float32[R, h, w]} of METHODS, for each token of the answer."""
    plain = capture.capturable(model)
    streamed = capture.streamed(plain, params, seq.batch, seq.queries)
    relevant = relevancy.relevancy(plain, params, seq.batch, seq.queries, seq.tokens)
    found = {
        "raw_last": raw.raw(streamed.rows, layers=-1),
        "raw_mean": raw.raw(streamed.rows),
        "rollout": streamed.rollout,
        "rollout_siglip": rollout.to_patches(streamed.rollout[:, : seq.patches], streamed.img_rollout),
        "relevancy": relevant.rows,
        "relevancy_siglip": relevant.patches,
    }
    maps = {name: raw.response_to_image(rows, seq.grid) for name, rows in found.items()}
    maps["occlusion"] = occlusion.occlusion(score, seq.batch["image"][0], seq.grid, fill=fill)
    return maps


def of_answer(maps, tokens, eos_token):
    """float[h, w] of float[R, h, w]: the mean over the answer's tokens; EOS, which names nothing,
    doesn't count unless it is all."""
    kept = len(tokens) - (len(tokens) > 1 and int(tokens[-1]) == eos_token)
    return np.asarray(maps[:kept], np.float64).mean(0)


def box_figures(values, boxes, size):
    """{figure: number} of BOX_FIGURES: see `localisation`. "touching" is the pointing game with a
    tolerance of half a cell: the maximal cell and a box have something in common."""
    covered = localisation.coverage(boxes, size, values.shape)
    return dict(
        pointing=localisation.pointing(values, boxes, size),
        touching=localisation.pointing(values, boxes, size, tolerance=0.5),
        energy=localisation.energy(values, covered),
        iou=localisation.best_iou(values, covered),
    )


def curves(score, image, maps, *, count, fill, batch_size=32):
    """Areas under the deletion and insertion curves of several maps.

    Deletion replaces patches of the image, the map's highest first, in `count` equal steps;
    insertion begins with all of them replaced and puts them back in the same order. The curve is
    the probability of the whole answer, EOS included. A good order has a small area in deletion and
    a large one in insertion. Petsiuk et al., arXiv 1806.07421.

    Args:
      score: as `occlusion.occlusion` takes it.
      image: float[H, W, 3].
      maps: {name: float[h, w]}.

    Returns:
      ({name: dict(deletion=float, insertion=float)}, probability with the whole image).
    """
    grid = next(iter(maps.values())).shape
    rows, columns = occlusion.bands(image.shape[:2], grid)
    patch = image.shape[0] // grid[0]
    # Inpainting would differ at every step; one filling for all keeps the two ends the same.
    filling = occlusion.fill_image(image, np.ones(image.shape[:2], bool), fill, patch)

    def pixels(cells):
        return (rows.T.astype(int) @ cells.astype(int) @ columns.astype(int)) > 0

    # The two ends are the same for all: each is asked once.
    def images():
        yield image
        yield occlusion.replace(image, pixels(np.ones(grid, bool)), filling=filling)
        for values in maps.values():
            between = localisation.steps(values, count)[1:-1]
            for cells in (*between, *~between):
                yield occlusion.replace(image, pixels(cells), filling=filling)

    p = np.exp(occlusion.in_batches(score, images(), batch_size).sum(-1, dtype=np.float64))
    whole, replaced = float(p[0]), float(p[1])
    p = p[2:].reshape(len(maps), 2, count - 1)
    return {
        name: dict(
            deletion=localisation.area_under([whole, *down, replaced]),
            insertion=localisation.area_under([replaced, *up, whole]),
        )
        for name, (down, up) in zip(maps, p)
    }, whole


# --- One question ---


class Subject:
    """A model as this program asks it: predict_pp, greedy answers, sequences."""

    def __init__(self, config, checkpoint):
        text = config.get("predict_pp")
        if not text:
            raise ValueError("config has no predict_pp, which makes a prompt of a question.")
        if "crop" in text:
            raise ValueError("config.predict_pp crops images; boxes would no longer fit them.")
        self.model, self.tok, self.mesh, self.params = weights.load(config, checkpoint)
        self._pp = get_preprocess_fn(text)
        self._noise = None

    def ask(self, image, question, *, max_new_tokens=48):
        """(`sequence.Sequence` of the most probable answer, the answer as text)."""
        row = self._pp({"image": image, "question": question})
        tokens, _ = decode.generate(
            self.model,
            self.params,
            decode.batch_of([row]),
            eos_token=self.tok.eos_token,
            max_new_tokens=max_new_tokens,
        )
        tokens = distributed.to_host(tokens)[0, 0]
        prompt = sequence.prompt_of(row)
        length = len(prompt["prompt_ids"]) + np.count_nonzero(tokens)
        padded = -(-length // _PAD) * _PAD
        seq = sequence.make(self.model, answer_ids=tokens, image=row["image"], pad_to=padded, **prompt)
        return seq, self.tok.to_str(tokens.tolist())

    def maps(self, seq, score, fill, *, noise=False):
        """{method: float64[h, w]} of the answer as a whole.

        Args:
          score: `occlusion.scorer` of seq, where it's at hand.
          noise: with all weights randomised, the answer being the same.
        """
        params = self.params
        if noise:
            if self._noise is None:
                leaves = self.model.leaves
                self._noise = sanity.randomised(params, sanity.stages(params, leaves), leaves=leaves)
            params = self._noise
        score = score or occlusion.scorer(self.model, params, seq)
        found = maps_of(self.model, params, seq, score, fill=fill)
        return {k: of_answer(x, seq.tokens, self.tok.eos_token) for k, x in found.items()}


def measure(subject, image, asked, priors, *, steps, fill, batch_size, seed):
    """The row of a question: what was asked and answered, maps {method: [h][w]}, figures {method:
    {figure: number}}, sanity {method: {check: rank correlation}} (see `sanity_of`).

    Args:
      image: encoded bytes, as stored.
      asked: an item of `boxed_questions`.
      priors: of `box_priors`.
    """
    seq, said = subject.ask(image, asked["question"])
    pixels, size = seq.batch["image"][0], images.size(image)
    score = occlusion.scorer(subject.model, subject.params, seq)
    of_model = subject.maps(seq, score, fill)
    maps = dict(of_model)
    general, by_label = priors
    maps["centre"] = localisation.centre_prior(seq.grid)
    maps["body"] = body_prior(pixels, seq.grid)
    maps["train_boxes"] = general
    known = [by_label[label] for label in asked["labels"] if label in by_label]
    maps["label_boxes"] = np.mean(known, axis=0) if known else general
    rng = np.random.default_rng([seed, asked["index"]])
    at_random = [localisation.random_order(seq.grid, rng) for _ in range(RANDOM_MAPS)]

    figures = {name: box_figures(values, asked["boxes"], size) for name, values in maps.items()}
    figures["random"] = _mean(box_figures(x, asked["boxes"], size) for x in at_random)
    orders = {f"random {i}": x for i, x in enumerate(at_random[:RANDOM_ORDERS])}
    ordered = {**of_model, "centre": maps["centre"], "body": maps["body"], **orders}
    areas, whole = curves(score, pixels, ordered, count=steps, fill=fill, batch_size=batch_size)
    areas["random"] = _mean(areas.pop(name) for name in orders)
    return {
        **asked,
        "image_key": image_key(pixels),
        "size": list(size),
        "grid": list(seq.grid),
        "area": float(localisation.coverage(asked["boxes"], size, seq.grid).mean()),
        "prediction": said,
        "probability": whole,
        "correct": answers.normalise(said) == answers.normalise(asked["answer"]),
        "figures": {name: {**figures[name], **areas.get(name, {})} for name in figures},
        "sanity": sanity_of(subject, image, asked["other_question"], seq, of_model, fill),
        "maps": {name: [[float(f"{x:.5g}") for x in row] for row in x] for name, x in of_model.items()},
    }


def sanity_of(subject, image, other_question, seq, maps, fill):
    """{method: {check: rank correlation of its map with the map it shouldn't equal}}.

    randomised: of the same answer, all weights being noise (`sanity.randomised`). other_question:
    of the model's answer to another question on the image; None where there is none.
    """
    changed = dict(randomised=subject.maps(seq, None, fill, noise=True), other_question=None)
    if other_question is not None:
        other, _ = subject.ask(image, other_question)
        changed["other_question"] = subject.maps(other, None, fill)
    return {
        name: {k: x and sanity.similarity(values, x[name]) for k, x in changed.items()} for name, values in maps.items()
    }


def _mean(dicts):
    dicts = list(dicts)
    return {k: float(np.mean([d[k] for d in dicts])) for k in dicts[0]}


# --- All questions ---


def summarise(rows, seed=0):
    """Means with intervals, and paired differences, of the rows of `measure`.

    Questions are drawn by image (`stats.bootstrap`). p_holm is over the methods of the model, for
    each figure by itself (S. Holm, Scandinavian Journal of Statistics 6 (1979), 65-70).

    Returns:
      {"correct" and "all": dict(questions, images, area, table={method: {figure: dict(mean, low,
      high, and to each of BASES a dict(difference, low, high, p, p_holm))}}, no table
      where there are no questions), "sanity": {method: {check: dict(mean, low, high)}}}.
    """
    out = {}
    for subset in ("correct", "all"):
        chosen = [row for row in rows if row["correct"] or subset == "all"]
        images = [row["image_key"] for row in chosen]
        out[subset] = dict(questions=len(chosen), images=len(set(images)))
        if not chosen:
            continue
        out[subset]["area"] = float(np.mean([row["area"] for row in chosen]))
        out[subset]["table"] = _table(chosen, images, seed)
    out["sanity"] = {name: _sanity(rows, name, seed) for name in METHODS}
    return out


def _table(rows, images, seed):
    table = {name: {} for name in (*METHODS, *PRIORS)}
    for figure in (*BOX_FIGURES, *CURVES):
        values = {
            name: [row["figures"][name][figure] for row in rows] for name in table if figure in rows[0]["figures"][name]
        }
        low, high = stats.bootstrap(np.stack([*values.values()], 1), images, seed=seed)
        for i, name in enumerate(values):
            cell = dict(mean=float(np.mean(values[name])), low=float(low[i]), high=float(high[i]))
            for base in BASES:
                found = stats.paired_bootstrap(values[base], values[name], images, seed=seed)
                cell[base] = dict(zip(("difference", "low", "high", "p"), found))
            table[name][figure] = cell
        for base in BASES:
            cells = [table[name][figure][base] for name in METHODS]
            for cell, p in zip(cells, holm([cell["p"] for cell in cells])):
                cell["p_holm"] = p
    return table


def _sanity(rows, name, seed):
    """The checks of `sanity_of`, and other_image: how alike the method's maps of different images
    are, which is what all its maps share."""
    out = {}
    for check in SANITY:
        found = [(row["sanity"][name][check], row["image_key"]) for row in rows]
        values, images = zip(*[x for x in found if x[0] is not None] or [((), ())])
        if not values:
            continue
        low, high = stats.bootstrap(values, images, seed=seed)
        out[check] = dict(mean=float(np.mean(values)), low=low, high=high, questions=len(values))
    pairs = sanity.between_questions(
        [np.ravel(row["maps"][name]) for row in rows],
        [row["image_key"] for row in rows],
        [row["question_id"] for row in rows],
        seed=seed,
    )["other_image"]
    if pairs:
        out["other_image"] = dict(mean=float(np.mean(pairs)))
    return out


def holm(ps):
    """p-values adjusted for being several, by Holm's step-down."""
    out, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps)):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out


# --- The page ---

_TITLES = {
    "pointing": "pointing",
    "touching": "touching",
    "energy": "energy in box",
    "iou": "IoU, best threshold",
    "deletion": "deletion ↓",
    "insertion": "insertion ↑",
    "randomised": "randomised weights",
    "other_question": "another question, same image",
    "other_image": "another image",
}


def markdown(summary):
    """The tables of `summarise` as Markdown, in %; rank correlations as they are."""
    lines = []
    for subset in ("correct", "all"):
        found = summary[subset]
        if "table" not in found:
            continue
        table, figures = found["table"], (*BOX_FIGURES, *CURVES)
        lines += [
            f"## {subset.capitalize()}: {found['questions']:,} questions, {found['images']:,} "
            f"images; boxes cover {100 * found['area']:.1f} % of them",
            "",
            *_grid("%", figures, table, _interval),
        ]
        for base, title in (("centre", "the centre prior"), ("body", "the patient's area")):
            lines += [
                f"Differences to {title} (bold: p < 0.05 after Holm):",
                "",
                *_grid("%", figures, table, lambda cell, base=base: _difference(cell[base])),
            ]
    lines += [
        "## Sanity: rank correlation with the map of …",
        "",
        *_grid("", (*SANITY, "other_image"), summary["sanity"], _correlation),
    ]
    return "\n".join(lines)


def _grid(corner, columns, table, text):
    """Lines of the table {row: {column: cell}}, cells being turned into text; – where none is."""
    lines = [
        f"| {corner} | " + " | ".join(_TITLES[c] for c in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, cells in table.items():
        texts = (text(cells[c]) if c in cells else "–" for c in columns)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _interval(x):
    return f"{100 * x['mean']:.1f} ({_number(x['low'])}–{_number(x['high'])})"


def _difference(x):
    text = f"{_number(x['difference'], '+')} ({_number(x['low'], '+')} to "
    text += f"{_number(x['high'], '+')})"
    return f"**{text}**" if x.get("p_holm", 1) < 0.05 else text


def _correlation(x):
    return f"{x['mean']:.2f}" + (f" ({x['low']:.2f} to {x['high']:.2f})" if "low" in x else "")


def _number(x, sign=""):
    return "–" if math.isnan(x) else f"{100 * x:{sign}.1f}"


# --- The program ---


@cli.command
def main(argv):
    del argv
    v = flags.FLAGS
    if not v.out:
        raise app.UsageError("Give --out, the folder to write to.")
    config, checkpoint = cli.from_flags()
    data, train = (
        dict(name=v.data, split=s, **(dict(data_dir=v.data_dir) if v.data_dir else {}))
        for s in (v.split, v.train_split)
    )
    source, train_source = input_pipeline.open_source(data), input_pipeline.open_source(train)
    asked = boxed_questions(source)[: v.limit]
    subject = Subject(config, checkpoint)
    settings = dict(steps=v.steps, fill=v.fill, seed=v.seed)
    section = dict(data=data, train=train, limit=v.limit, rows=ROWS, **settings)
    about = experiment.about(section, checkpoint, subject.params)
    identity = {k: x for k, x in about.items() if k not in ("checkpoint", "command")}
    rows = results.finished(v.out, identity)
    if rows is None:
        part = results.Part(v.out, identity)
        with contextlib.closing(part), sharding.rules(config, subject.mesh):
            rows = measure_all(subject, source, train_source, asked, part, batch_size=v.batch_size, **settings)
    else:
        print(f"{v.out} is there for these weights.", file=sys.stderr)
    summary = summarise(rows, v.seed)
    results.write(v.out, rows, {"saliency": summary}, about)
    text = markdown(summary)
    files.write_text(pathlib.Path(v.out) / "saliency.md", text)
    print(text)


def measure_all(subject, source, train, asked, part, **settings):
    """Rows of `measure` for all of `asked`, as far as `part` hasn't them already.

    Args:
      source, train: `input_pipeline.Source` of the split and of training.
      part: `results.Part`.
      **settings: for `measure`.
    """
    priors, rows = None, []
    every = 0.1 if sys.stderr.isatty() else 30
    for i, question in enumerate(tqdm.tqdm(asked, desc="saliency", unit=" questions", mininterval=every)):
        found = part.found.get(("model", i))
        if found is None:
            image = source[question["index"]]["image"]
            if priors is None:
                grid = subject.ask(image, question["question"])[0].grid
                priors = box_priors(train, grid)
            found = [measure(subject, image, question, priors, **settings)]
            part.add("model", i, found)
        rows += found
    return rows


if __name__ == "__main__":
    cli.define_source_flags()
    distributed.define_flags()
    flags.DEFINE_string("data", "slake/en", "Data set, as built by data_prep, with boxes.")
    flags.DEFINE_string("split", "validate", "Split that is measured.")
    flags.DEFINE_string("train_split", "train", "Split whose boxes make the priors.")
    flags.DEFINE_string("data_dir", None, "Where data sets are built; default: $TFDS_DATA_DIR.")
    flags.DEFINE_string("out", None, "Folder to write to.")
    flags.DEFINE_integer("limit", None, "So many questions, the first; default: all.")
    flags.DEFINE_integer("steps", 16, "Steps of the deletion and insertion curves.", lower_bound=1)
    flags.DEFINE_enum("fill", "blur", occlusion.FILLS, "What replaces patches.")
    flags.DEFINE_integer("batch_size", 32, "Images a pass.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of random maps and of the intervals' draws.")
    app.run(main, flags_parser=cli.parse_flags)
