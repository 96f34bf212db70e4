"""A report of one answer: its fields, and `measure`, which computes its arrays.

`explain` adds texts and pictures, and the page shows them.

Axis letters: P, T, S, R, L, N as in `paligemma_med.saliency`; C = P + prompt + R columns of a map
(`trace`) without padding; H, W pixels; h, w patches; M regions; K alternatives; V vocabulary.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from paligemma_med.models import lean
from paligemma_med.saliency import occlusion, raw, sequence
from paligemma_med.saliency.methods import METHODS
from paligemma_med.saliency.passes import ROLLOUTS, Map, Passes

CELLS = 8  # occluded cells along the longer side, at most
REGIONS = 4  # lines of the coarse grid whose rectangles are occluded
BATCH = 32  # images in a pass of occlusion
SLOW_BATCH = 8  # where a pass of so many takes minutes, and progress should be told now and then


class Regions(NamedTuple):
    """The answer with each rectangle of the image replaced."""

    fill: str  # what replaces it: one of `occlusion.FILLS`
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
    """What `measure` computes for one answer of R tokens. Maps through the image tower ("…_siglip")
    differ only in their first P columns."""

    grid: tuple[int, int]  # (h, w): P = h · w
    logprobs: np.ndarray  # float32[R] of the answer's tokens
    rivals: tuple[np.ndarray, np.ndarray]  # tokens int32[R, K], probabilities float32[R, K], falling
    raw: np.ndarray  # float32[L, N, R, C] raw attention of the answer's queries
    mass: np.ndarray  # float32[L, N, R, 3] of it on image, prompt and answer
    maps: list[Map]
    occlusion: dict | None  # dict(fill, cell): how the maps of "occlusion" were made
    regions: Regions | None
    raw_constants: np.ndarray | None = None  # float32[L, N, R] of raw attention on learned constants (`trace`)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report(Arrays):
    """Everything about one answer. Samples, controls, flags and `about` have the form they have in JSON."""

    title: str  # the file's or study's name
    question: str
    answer: str
    prompt: list[str]  # the prompt's tokens as texts
    tokens: list[str]  # R of them: the answer's
    ended: bool  # the last token is EOS, which the whole answer's map leaves out
    others: list[list[tuple[str, float]]]  # `rivals` as R lists of (text, probability)
    picture: np.ndarray  # uint8[H, W, 3] as shown on the page
    seen: np.ndarray  # uint8[H', W', 3] as the model sees it
    samples: list[dict]  # answer, logprob
    controls: list[dict]  # name, answer to another image, logprob of the report's answer there
    mask: Masked | None
    causal: bool = False  # a token of the prompt sees only what stands before it
    flags: list[dict] = dataclasses.field(default_factory=list)  # name, says
    about: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # name, value
    given: str = ""  # the right answer, where somebody has given one


def measure(
    model,
    params,
    image,
    prompt_ids,
    answer_ids,
    *,
    mask_ar=0,
    image_at=None,
    methods=tuple(METHODS),
    fill="blur",
    batch_size=BATCH,
    pad_to=None,
    least=0,
    stage=lambda doing: contextlib.nullcontext(),
) -> tuple[Arrays, Callable]:
    """The arrays of one answer.

    Args:
      model, params: a `vlm.Model`, not under attn_impl "cudnn", and its parameters.
      image: float[H, W, 3] in [-1, 1].
      prompt_ids, answer_ids, mask_ar, image_at: as `sequence.make` takes them.
      methods: some of METHODS; raw attention is always there.
      fill: of occluded cells, see `occlusion.fill_image`.
      batch_size: images in a pass of occlusion.
      pad_to, least: as `sequence.make` takes them: given both, all answers up to these lengths have the same programs.
      stage: gives a context for each of its parts, from a phrase such as "computing maps by rollout"; for a caller
        that says what is being done. Its value, if it isn't None, is called with how many equal parts are done, and
        of how many.

    Returns:
      (`Arrays`, score); score gives the answer's log-probabilities on other images (`occlusion.scorer`).

    Raises:
      ValueError: an unknown method or fill, a prompt or answer without tokens, attn_impl "cudnn".
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"methods has {unknown}; expected some of {list(METHODS)}.")
    if fill not in occlusion.FILLS:
        raise ValueError(f"fill is {fill!r}; expected one of {list(occlusion.FILLS)}.")
    seq = sequence.make(
        model, prompt_ids, answer_ids, image, mask_ar=mask_ar, image_at=image_at, pad_to=pad_to, least=least
    )
    score = occlusion.scorer(model, params, seq)
    cell = -(-max(seq.grid) // CELLS)
    passes = Passes(
        model,
        params,
        seq,
        score,
        variants=ROLLOUTS if "rollout" in methods else {},
        cell=cell,
        fill=fill,
        batch_size=batch_size,
    )
    with stage("compiling the pass for attention, and computing it"):
        (rows, constants), _, logprobs, rivals = passes.attention
    occluded, maps, regions = "occlusion" in methods, [], None
    for name in METHODS:
        if name in methods:
            with stage(f"computing maps by {name}") as progress:
                maps += METHODS[name].maps(passes, progress)
    if occluded:
        with stage("asking again with rectangles of the image replaced") as progress:
            regions = _regions(score, seq.batch["image"][0], seq.grid, fill, batch_size, progress)
    return Arrays(
        grid=seq.grid,
        logprobs=logprobs,
        rivals=rivals,
        raw=rows,
        raw_constants=constants,
        mass=raw.mass(rows, seq.patches, seq.prompt),
        maps=maps,
        occlusion=dict(fill=fill, cell=cell) if occluded else None,
        regions=regions,
    ), score


def batch_size_for(params) -> int:
    """Images in a pass of occlusion with these parameters."""
    slow = (
        jax.default_backend() == "cpu" and sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) > lean.LARGE
    )
    return SLOW_BATCH if slow else BATCH


def boxes(grid, lines=REGIONS) -> np.ndarray:
    """int[M, 4]: all rectangles of a coarse grid of at most `lines` × `lines` cells, y0 x0 y1 x1 in patches."""
    edges = [sorted({round(i * n / lines) for i in range(lines + 1)}) for n in grid]
    spans = [[(a, b) for i, a in enumerate(e) for b in e[i + 1 :]] for e in edges]
    return np.array([(y0, x0, y1, x1) for y0, y1 in spans[0] for x0, x1 in spans[1]])


def _regions(score, image, grid, fill, batch_size, progress):
    """The answer's log-probabilities with each rectangle replaced."""
    found = boxes(grid)
    patch = image.shape[0] // grid[0], image.shape[1] // grid[1]
    replaced = occlusion.replacer(image, fill, patch[0])

    def images():
        for y0, x0, y1, x1 in found:
            mask = np.zeros(image.shape[:2], bool)
            mask[y0 * patch[0] : y1 * patch[0], x0 * patch[1] : x1 * patch[1]] = True
            yield replaced(mask)

    return Regions(fill, found, occlusion.in_batches(score, images(), batch_size, len(found), progress))
