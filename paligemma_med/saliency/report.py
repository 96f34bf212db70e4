"""A report of one answer: its definition, and all of its arrays at once.

`measure` finds the arrays, `explain` adds texts and pictures, and the page shows them.

Axis letters: P, T, S, R, L, N as in `paligemma_med.saliency`; C = P + prompt + R columns of a map
(`trace`) without padding; H, W pixels; h, w patches; M regions; K alternatives; V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models.loss import token_logprobs
from paligemma_med.saliency import capture, occlusion, raw, relevancy, rollout, sequence, trace

METHODS = ("raw", "rollout", "relevancy", "occlusion")
# Fusing of heads, and share of the weakest keys that is left out of each row.
ROLLOUTS = {
    "mean of heads": dict(fuse="mean"),
    "maximum of heads": dict(fuse="max"),
    "minimum of heads": dict(fuse="min"),
    "mean of heads, weakest 90 % of each row left out": dict(fuse="mean", discard=0.9),
}
CELLS = 8  # occluded cells along the longer side, at most
REGIONS = 4  # lines of the coarse grid whose rectangles are occluded
OTHERS = 5  # alternatives to a token
BATCH = 32  # images a pass of occlusion


class Map(NamedTuple):
    """One method's map; variant is a choice within the method, "" where there is only one."""

    method: str
    variant: str
    values: np.ndarray  # float32[R, C], or float32[R, P] of the image alone


class Regions(NamedTuple):
    """The answer with each rectangle of the image replaced."""

    fill: str  # what stands in its place: one of `occlusion.FILLS`
    boxes: np.ndarray  # int[M, 4], y0 x0 y1 x1 in patches
    logprobs: np.ndarray  # float32[M, R]


class Masked(NamedTuple):
    """The answer with a given region replaced."""

    fill: str
    picture: np.ndarray  # uint8[H', W', 3]
    logprobs: np.ndarray  # float32[R] of the report's answer
    answer: str  # what the model says instead


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """What `measure` finds of one answer of R tokens. Maps through the image tower ("…_siglip")
    differ in their P first columns only. Relevancy is without the 1 that its rows start from."""

    grid: tuple[int, int]  # (h, w): P = h · w
    logprobs: np.ndarray  # float32[R] of the answer's tokens
    rivals: tuple[np.ndarray, np.ndarray]  # tokens int32[R, K], probabilities float32[R, K], falling
    raw: np.ndarray  # float32[L, N, R, C] raw attention of the answer's queries
    mass: np.ndarray  # float32[L, N, R, 3] of it on image, prompt and answer
    maps: list[Map]
    occlusion: dict | None  # dict(fill, cell): how the maps of "occlusion" were made
    regions: Regions | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Arrays):
    """All of one answer. Samples, controls, flags and `about` are as they go into JSON."""

    title: str  # the file's or study's name
    question: str
    answer: str
    prompt: list[str]  # its tokens as texts
    tokens: list[str]  # R of them: the answer's
    ended: bool  # the last of them is the end, and the whole answer's map that of the others
    others: list[list[tuple[str, float]]]  # `rivals` as R lists of (text, probability)
    picture: np.ndarray  # uint8[H, W, 3] as it is shown
    seen: np.ndarray  # uint8[H', W', 3] as the model sees it
    samples: list[dict]  # answer, logprob
    controls: list[dict]  # name, answer to another image, logprob of the report's answer there
    mask: Masked | None
    flags: list[dict] = dataclasses.field(default_factory=list)  # name, says
    about: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # name, value


def measure(
    model,
    params,
    image,
    prompt_ids,
    answer_ids,
    *,
    mask_ar=0,
    image_at=None,
    methods=METHODS,
    fill="blur",
    batch_size=BATCH,
) -> tuple[Arrays, Callable]:
    """The arrays of one answer.

    Args:
      model, params: a `vlm.Model`, not under attn_impl "cudnn", and its parameters.
      image: float[H, W, 3] in [-1, 1].
      prompt_ids, answer_ids, mask_ar, image_at: as `sequence.make` takes them.
      methods: some of METHODS; raw attention is always there.
      fill: of occluded cells, see `occlusion.fill_image`.
      batch_size: images a pass of occlusion.

    Returns:
      (`Arrays`, score), the second being the answer's log-probabilities on other images,
      `occlusion.scorer`.

    Raises:
      ValueError: an unknown method or fill, a prompt or answer without tokens, under "cudnn".
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"methods has {unknown}; expected some of {list(METHODS)}.")
    if fill not in occlusion.FILLS:
        raise ValueError(f"fill is {fill!r}; expected one of {list(occlusion.FILLS)}.")
    seq = sequence.make(model, prompt_ids, answer_ids, image, mask_ar=mask_ar, image_at=image_at)
    score = occlusion.scorer(model, params, seq)
    rows, rolled, logprobs, rivals = _attention(model, params, seq, "rollout" in methods)
    end = seq.response.stop  # what stands behind is padding
    maps = []

    def add(method, variant, row, pixels):
        row = row[:, :end]
        maps.append(Map(method, variant, row))
        maps.append(Map(f"{method}_siglip", variant, np.concatenate([pixels, row[:, seq.patches :]], axis=1)))

    for variant in ROLLOUTS if rolled else ():  # in this order, which jit has lost
        add("rollout", variant, *rolled[variant])
    if "relevancy" in methods:
        add("relevancy", "", *relevancy.relevancy(model, params, seq.batch, seq.queries, seq.tokens, own=False))
    regions = None
    if "occlusion" in methods:
        cell = -(-max(seq.grid) // CELLS)
        maps.append(_occlusion(score, seq, cell, fill, batch_size))
        regions = _regions(score, seq.batch["image"][0], seq.grid, fill, batch_size)
    return Arrays(
        grid=seq.grid,
        logprobs=logprobs,
        rivals=rivals,
        raw=rows[..., :end],
        mass=raw.mass(rows[..., :end], seq.patches, seq.prompt),
        maps=maps,
        occlusion=dict(fill=fill, cell=cell) if regions else None,
        regions=regions,
    ), score


def _occlusion(score, seq, cell, fill, batch_size):
    """`Map` of the drops, each patch having the figure of its cell."""
    image = seq.batch["image"][0]
    drops = occlusion.occlusion(score, image, seq.grid, cell=cell, fill=fill, batch_size=batch_size)
    drops = drops.repeat(cell, axis=1).repeat(cell, axis=2)[:, : seq.grid[0], : seq.grid[1]]
    return Map("occlusion", "", drops.reshape(len(drops), -1))


def boxes(grid, lines=REGIONS) -> np.ndarray:
    """int[M, 4] all rectangles of a coarse grid of at most `lines` × `lines` cells, as y0 x0 y1 x1
    in patches."""
    edges = [sorted({round(i * n / lines) for i in range(lines + 1)}) for n in grid]
    spans = [[(a, b) for i, a in enumerate(e) for b in e[i + 1 :]] for e in edges]
    return np.array([(y0, x0, y1, x1) for y0, y1 in spans[0] for x0, x1 in spans[1]])


def _regions(score, image, grid, fill, batch_size):
    """The answer's log-probabilities with each rectangle replaced."""
    found = boxes(grid)
    patch = image.shape[0] // grid[0], image.shape[1] // grid[1]
    replaced = occlusion.replacer(image, fill, patch[0])

    def images():
        for y0, x0, y1, x1 in found:
            mask = np.zeros(image.shape[:2], bool)
            mask[y0 * patch[0] : y1 * patch[0], x0 * patch[1] : x1 * patch[1]] = True
            yield replaced(mask)

    return Regions(fill, found, occlusion.in_batches(score, images(), batch_size))


class _Folds:
    """Several folds (`layers.capture`) as one, whose outs are those of the first."""

    def __init__(self, folds):
        self.folds = folds

    def init(self, batch, heads, length):
        return [f.init(batch, heads, length) for f in self.folds]

    def step(self, states, probs):
        states, outs = zip(*(f.step(s, probs) for f, s in zip(self.folds, states)))
        return list(states), outs[0]


def _attention(model, params, seq, rollouts):
    """(rows float32[L, N, R, P + T], {variant: (rollout [R, P + T], carried on to patches [R, P])},
    log-probabilities float32[R], (tokens int[R, K], probabilities float[R, K]))."""
    count = len(seq.queries)
    found = _streamed(model, params, trace.inputs(seq.batch), trace.padded(seq.queries), rollouts)
    rows, rolled, *rest = jax.device_get(found)
    logprobs, tokens, p = (x[:count] for x in rest)
    rolled = {k: tuple(x[:count] for x in pair) for k, pair in rolled.items()}
    return rows[:, :, :count], rolled, logprobs, (tokens, p)


def lower(model, params, arrays, queries):
    """The pass for attention and all rollouts as `jax.jit` lowers it, from arrays or their shapes, to
    ask how much memory it takes (tools/bench/saliency_memory.py)."""
    return _streamed.lower(model, params, arrays, queries, True)


@functools.partial(jax.jit, static_argnames=("model", "rollouts"))
def _streamed(model, params, arrays, queries, rollouts):
    """One pass for all variants, which holds a layer's probabilities and the rollouts."""
    variants = ROLLOUTS if rollouts else {"": {}}
    img = _Folds([capture.Rows(**kw) for kw in variants.values()])
    llm = _Folds([capture.Rows(queries, **kw) for kw in variants.values()])
    example = trace.of(model, arrays)
    tokens = example.predicted(queries)
    logits, out = model.apply(
        {"params": params}, **arrays, logit_positions=(tokens - 1)[None], capture_attention=(img, llm)
    )
    states, rows = out["llm/attn"]
    rolled = {}
    for variant, of_llm, of_img in zip(variants, states, out["img/attn"][0]):
        row = example.map(of_llm["rolled"][queries], out, rule="rollout")
        rolled[variant] = row, rollout.to_patches(row[:, : example.patches], of_img["rolled"])
    logprobs = token_logprobs(logits[0], arrays["text"][0, tokens])
    top, rivals = jax.lax.top_k(jax.nn.log_softmax(logits[0]), min(OTHERS, logits.shape[-1]))
    return example.map(rows, out, rule="raw"), rolled if rollouts else {}, logprobs, rivals, jnp.exp(top)
