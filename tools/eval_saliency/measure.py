"""One question: the model's maps of its answer, and their figures next to those of the priors."""

import sys

import numpy as np
import tqdm

from paligemma_med import decode, weights
from paligemma_med.evaluation.questions import image_key
from paligemma_med.metrics import answers
from paligemma_med.parallel import distributed
from paligemma_med.pp import get_preprocess_fn, images
from paligemma_med.saliency import capture, localisation, occlusion, raw, sanity, sequence
from paligemma_med.saliency.methods import KINDS
from paligemma_med.saliency.methods import METHODS as BY_NAME
from paligemma_med.saliency.passes import ROLLOUTS, Passes
from tools.eval_saliency.own import own_boxes
from tools.eval_saliency.priors import body_prior, box_priors

# Maps of the model; `maps_of` makes them.
METHODS = ("raw_last", "raw_mean", *(k for k in KINDS if k != "raw"))
BOX_FIGURES = ("pointing", "touching", "energy", "iou")
CURVES = ("deletion", "insertion")
SANITY = ("randomised", "other_question")
RANDOM_MAPS, RANDOM_ORDERS = 32, 3  # per question
_PAD = 32  # text tokens: few different lengths, so that few programs are compiled


def maps_of(model, params, seq, score, *, fill="blur") -> dict:
    """{method: float32[R, h, w]} of METHODS, for each token of the answer.

    Of a method's variants the first is used; cells of occlusion are single patches.
    """
    first = dict([next(iter(ROLLOUTS.items()))])
    passes = Passes(capture.capturable(model), params, seq, score, variants=first, fill=fill)
    rows = passes.attention.raw.values
    found = {"raw_last": raw.raw(rows, layers=-1), "raw_mean": raw.raw(rows)}
    for method in BY_NAME.values():
        for m in method.maps(passes):
            found.setdefault(m.method, m.values)
    return {name: raw.response_to_image(found[name], seq.grid) for name in METHODS}


def of_answer(maps, tokens, stop_tokens) -> np.ndarray:
    """float[R, h, w] → float[h, w]: the mean over the answer's tokens. EOS, which names nothing, only counts
    if there is nothing else."""
    kept = len(tokens) - (len(tokens) > 1 and int(tokens[-1]) in stop_tokens)
    return np.asarray(maps[:kept], np.float64).mean(0)


def box_figures(values, boxes, size) -> dict:
    """{figure: number} of BOX_FIGURES: see `localisation`. "touching" is the pointing game with a
    tolerance of half a cell: the maximal cell and a box overlap."""
    covered = localisation.coverage(boxes, size, values.shape)
    return dict(
        pointing=localisation.pointing(values, boxes, size),
        touching=localisation.pointing(values, boxes, size, tolerance=0.5),
        energy=localisation.energy(values, covered),
        iou=localisation.best_iou(values, covered),
    )


def curves(score, image, maps, *, count, fill, batch_size=32) -> tuple:
    """Areas under the deletion and insertion curves of several maps.

    Deletion replaces patches of the image, the map's highest first, in `count` equal steps;
    insertion begins with all of them replaced and puts them back in the same order. The curve is
    the probability of the whole answer, EOS included. A good order has a small area in deletion and
    a large one in insertion. Petsiuk et al., arXiv 1806.07421.

    Args:
      score: as for `occlusion.occlusion`.
      image: float[H, W, 3].
      maps: {name: float[h, w]}.

    Returns:
      ({name: dict(deletion=float, insertion=float)}, probability with the whole image).
    """
    grid = next(iter(maps.values())).shape
    rows, columns = occlusion.bands(image.shape[:2], grid)
    patch = image.shape[0] // grid[0]
    # Inpainting would differ at every step; one filling for all keeps the two ends equal.
    filling = occlusion.fill_image(image, np.ones(image.shape[:2], bool), fill, patch)

    def pixels(cells):
        return (rows.T.astype(int) @ cells.astype(int) @ columns.astype(int)) > 0

    # The two ends are the same for all maps and are computed once.
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


class Subject:
    """A model as this program uses it: predict_pp, greedy answers, sequences."""

    def __init__(self, config, checkpoint):
        text = config.get("predict_pp")
        if not text:
            raise ValueError("config has no predict_pp, which makes a prompt of a question.")
        if "crop" in text:
            raise ValueError("config.predict_pp crops images; boxes would no longer fit them.")
        self.model, self.tok, self.mesh, self.params = weights.load(config, checkpoint)
        self._pp = get_preprocess_fn(text)
        self._noise = None

    def ask(self, image, question, *, max_new_tokens=48) -> tuple:
        """(`sequence.Sequence` of the most probable answer, the answer as text)."""
        row = self._pp({"image": image, "question": question})
        tokens, _ = decode.generate(
            self.model,
            self.params,
            decode.batch_of([row]),
            eos_token=self.tok.stop_tokens,
            max_new_tokens=max_new_tokens,
        )
        tokens = sequence.ended(distributed.to_host(tokens)[0, 0], self.tok.stop_tokens)
        prompt = sequence.prompt_of(row)
        length = len(prompt["prompt_ids"]) + len(tokens)
        padded = -(-length // _PAD) * _PAD
        seq = sequence.make(self.model, answer_ids=tokens, image=row["image"], pad_to=padded, **prompt)
        return seq, self.tok.to_str(tokens.tolist())

    def maps(self, seq, score, fill, *, noise=False) -> dict:
        """{method: float64[h, w]} of the answer as a whole.

        Args:
          score: `occlusion.scorer` of seq, if available.
          noise: randomise all weights, for the same answer.
        """
        params = self.params
        if noise:
            if self._noise is None:
                leaves = self.model.leaves
                self._noise = sanity.randomised(params, sanity.stages(params, leaves), leaves=leaves)
            params = self._noise
        score = score or occlusion.scorer(self.model, params, seq)
        found = maps_of(self.model, params, seq, score, fill=fill)
        return {k: of_answer(x, seq.tokens, self.tok.stop_tokens) for k, x in found.items()}


def measure(subject, image, asked, priors, *, steps, fill, batch_size, seed, own=False) -> dict:
    """The row of a question: question and answer, maps {method: [h][w]}, figures {method: {figure:
    number}}, sanity {method: {check: rank correlation}} (see `sanity_of`).

    Args:
      image: encoded bytes, as stored.
      asked: an item of `boxed_questions`.
      priors: from `box_priors`.
      own: also compare maps with the model's own boxes: keys own_boxes and, where it gives any, own_figures.
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
    compared = {}
    if own:
        compared["own_boxes"] = own_boxes(subject, image, asked["labels"], size)
        if compared["own_boxes"]:
            compared["own_figures"] = _against(compared["own_boxes"], asked["boxes"], size, maps, at_random)
    return {
        **asked,
        **compared,
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


def sanity_of(subject, image, other_question, seq, maps, fill) -> dict:
    """{method: {check: rank correlation of its map with a map it shouldn't equal}}.

    randomised: the map of the same answer with noise as weights (`sanity.randomised`). other_question:
    the map of the model's answer to another question on the image, or None without one.
    """
    changed = dict(randomised=subject.maps(seq, None, fill, noise=True), other_question=None)
    if other_question is not None:
        other, _ = subject.ask(image, other_question)
        changed["other_question"] = subject.maps(other, None, fill)
    return {
        name: {k: x and sanity.similarity(values, x[name]) for k, x in changed.items()} for name, values in maps.items()
    }


def _against(boxes, true_boxes, size, maps, at_random):
    """{map: {figure: number}} against the model's own boxes, of all maps and of "true_boxes", which people drew."""
    drawn = localisation.coverage(true_boxes, size, at_random[0].shape)
    found = {name: box_figures(x, boxes, size) for name, x in {**maps, "true_boxes": drawn}.items()}
    return found | {"random": _mean(box_figures(x, boxes, size) for x in at_random)}


def _mean(dicts):
    dicts = list(dicts)
    return {k: float(np.mean([d[k] for d in dicts])) for k in dicts[0]}


def measure_all(subject, source, train, asked, part, **settings) -> list[dict]:
    """Rows of `measure` for those of `asked` that `part` doesn't have yet.

    Args:
      source, train: `input_pipeline.Source` of the split and of training.
      part: `results.Part`.
      **settings: for `measure`.
    """
    priors, rows = None, []
    every = 0.1 if sys.stderr.isatty() else 30
    for i, question in enumerate(tqdm.tqdm(asked, desc="saliency", unit=" questions", mininterval=every)):
        saved = part.saved.get(("model", i))
        if saved is None:
            image = source[question["index"]]["image"]
            if priors is None:
                grid = subject.ask(image, question["question"])[0].grid
                priors = box_priors(train, grid)
            saved = [measure(subject, image, question, priors, **settings)]
            part.add("model", i, saved)
        rows += saved
    return rows
