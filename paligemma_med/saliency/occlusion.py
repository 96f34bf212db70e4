"""Occlusion: how much less probable the answer gets when a part of the image is replaced.

A check that uses neither attention nor gradients: the model is asked again, and only its answer
counts. A replaced part isn't a missing part: every fill is a picture itself, and the model may react to
it. So there are four fills, and a finding that only one of them shows is weak.

Introduced by Zeiler and Fergus, "Visualizing and Understanding Convolutional Networks"
(arXiv 1311.2901), section 4.2, there with a grey square. Here drops are in log-probability, and cells
don't overlap.

Axis letters: H, W pixels; h, w cells; B images; R response tokens; T text positions.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
import scipy.sparse
import scipy.sparse.linalg

from paligemma_med.models import lean
from paligemma_med.models.loss import token_logprobs
from paligemma_med.models.vit import MID_GREY
from paligemma_med.saliency import trace

FILLS = ("blur", "mean", "blank", "inpaint")


def occlusion(score, image, grid, *, cell=1, fill="blur", batch_size=32, progress=None) -> np.ndarray:
    """Drop of each response token's log-probability when a cell of the image is replaced.

      map[r, y, x] = log p(token r | image) - log p(token r | image with cell (y, x) replaced)

    Positive where the token needs what is there; negative where it gets likelier without.

    Args:
      score: float32[B, H, W, 3] → float32[B, R]; see `scorer`.
      image: float[H, W, 3] in [-1, 1], as the model sees it.
      grid: (rows, columns) of patches that the image tower cuts it into.
      cell: side of an occluded square in patches; it may be cut at the right and lower edge.
      fill: one of FILLS; see `fill_image`.
      batch_size: images in a pass; the last pass is filled up to as many.
      progress: see `in_batches`.

    Returns:
      float32[R, h, w]; h and w are the grid's rows and columns divided by `cell`, rounded up.

    Raises:
      ValueError: a cell or grid that doesn't fit the image, an unknown fill.
    """
    rows, columns = bands(image.shape[:2], grid, cell)
    patch = image.shape[0] // grid[0]
    filling = None if fill == "inpaint" else fill_image(image, None, fill, patch)

    def images():
        yield image
        for row in rows:
            for column in columns:
                yield replace(image, row[:, None] & column, fill, patch, filling=filling)

    scores = in_batches(score, images(), batch_size, 1 + len(rows) * len(columns), progress)
    return (scores[0] - scores[1:]).T.reshape(-1, len(rows), len(columns))


def region(score, image, mask, *, fill="blur", patch=16) -> tuple[np.ndarray, np.ndarray]:
    """The response tokens' log-probabilities before and after a given region is replaced.

    Args:
      score, image, fill: as in `occlusion`.
      mask: bool[H, W] of the image as the model sees it; True is replaced.
      patch: side of a patch in pixels, which sets the width of the blur.

    Returns:
      (before float32[R], after float32[R]).
    """
    return tuple(score(np.stack([image, replace(image, mask, fill, patch)])))


def bands(size, grid, cell=1) -> tuple[np.ndarray, np.ndarray]:
    """(bool[h, H], bool[w, W]): the pixels of each row and column of cells of `cell` × `cell`
    patches. The mask of cell (y, x) is rows[y][:, None] & columns[x].

    Args:
      size: (H, W) in pixels.
      grid: (rows, columns) of patches. Pixels that don't fill a patch belong to none, as in the
        image tower.
    """
    if not (isinstance(cell, int) and cell >= 1):
        raise ValueError(f"cell is {cell!r}; expected a whole number of patches, 1 or more.")
    out = []
    for pixels, patches in zip(size, grid, strict=True):
        if not 1 <= patches <= pixels:
            raise ValueError(f"grid is {tuple(grid)}; expected 1 to {tuple(size)} patches.")
        number = np.arange(pixels) // (pixels // patches)
        number = np.where(number < patches, number // cell, -1)
        out.append(number == np.arange(-(-patches // cell))[:, None])
    return tuple(out)


def replace(image, mask, fill="blur", patch=16, *, filling=None) -> np.ndarray:
    """float32[H, W, 3]: the image with the pixels of a bool[H, W] mask replaced; see `fill_image`.

    Args:
      filling: float[H, W, 3] to take the new pixels from, if the caller has it already.

    Raises:
      ValueError: a mask of another shape or type, or an unknown fill.
    """
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise ValueError(
            f"the mask is {mask.dtype}{list(mask.shape)}; expected bool{list(image.shape[:2])}, "
            "the image as the model sees it."
        )
    filling = fill_image(image, mask, fill, patch) if filling is None else filling
    return np.where(mask[..., None], filling, np.asarray(image, np.float32))


def replacer(image, fill="blur", patch=16) -> Callable:
    """`replace` for one image and many masks, as a function of the mask: a fill that doesn't depend on
    the mask is computed once."""
    if fill == "inpaint":
        return lambda mask: replace(image, mask, fill, patch)
    filled = fill_image(image, None, fill, patch)
    return lambda mask: np.where(mask[..., None], filled, image)


def fill_image(image, mask, fill="blur", patch=16) -> np.ndarray:
    """What replaces the masked pixels, float32[H, W, 3]; its other pixels mean nothing.

    blur     the image blurred by a Gaussian of standard deviation `patch`: rough brightness stays,
             structure goes, and few new edges arise.
    mean     the image's mean colour.
    blank    mid-grey: the image of a prompt without one (`decode.blank_image`).
    inpaint  the harmonic function of the surrounding pixels (each new pixel the mean of its four
            neighbours): a smooth membrane, without anything of what was there. If everything is
             masked, the same as blank.
    """
    image = np.asarray(image, np.float32)
    if fill == "blur":
        return scipy.ndimage.gaussian_filter(image, (patch, patch, 0), mode="nearest")
    if fill == "mean":
        return np.broadcast_to(image.mean((0, 1)), image.shape)
    if fill == "blank":
        return np.full_like(image, MID_GREY)
    if fill == "inpaint":
        return _membrane(image, mask)
    raise ValueError(f"fill is {fill!r}; expected one of {FILLS}.")


def _membrane(image, mask):
    """Solves the discrete Laplace equation on the masked pixels; beyond the image's edge there are
    no neighbours, so nothing flows there."""
    if mask.all():
        return np.full_like(image, MID_GREY)
    out = image.copy()
    ys, xs = np.nonzero(mask)
    if not len(ys):
        return out
    number = np.full(mask.shape, -1)
    number[ys, xs] = here = np.arange(len(ys))
    degree = np.zeros(len(ys))
    known = np.zeros((len(ys), image.shape[2]))
    entries = []
    for dy, dx in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        y, x = ys + dy, xs + dx
        inside = (y >= 0) & (y < mask.shape[0]) & (x >= 0) & (x < mask.shape[1])
        degree += inside
        to = np.where(inside, number[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)], 0)
        unknown, given = inside & (to >= 0), inside & (to < 0)
        entries.append((here[unknown], to[unknown]))
        known[given] += image[y[given], x[given]]
    rows, columns = (np.concatenate(e) for e in zip(*entries))
    matrix = scipy.sparse.diags(degree) - scipy.sparse.csr_matrix(
        (np.ones(len(rows)), (rows, columns)), (len(ys), len(ys))
    )
    out[ys, xs] = scipy.sparse.linalg.splu(matrix.tocsc()).solve(known)
    return out


# --- The model ---


def in_batches(score, images, batch_size, total=None, progress=None) -> np.ndarray:
    """float32[N, R]: scores of an iterable of N images float32[H, W, 3], `batch_size` at a time, and never
    more than one batch in memory. `progress` is called after each batch with how many images are done, and `total`."""
    scores, waiting = [], []

    def flush():
        # The last batch is filled up with copies: one shape needs one program only.
        full = waiting + [waiting[-1]] * (batch_size - len(waiting))
        scores.append(np.asarray(score(np.stack(full)))[: len(waiting)])
        waiting.clear()
        if progress is not None:
            progress(sum(map(len, scores)), total)

    for image in images:
        waiting.append(np.asarray(image, np.float32))
        if len(waiting) == batch_size:
            flush()
    if waiting:
        flush()
    return np.concatenate(scores)


def scorer(model, params, seq) -> Callable:
    """A function that gives a response's log-probabilities for other images.

    Args:
      model, params: a `vlm.Model` and its parameters.
      seq: `sequence.Sequence` of prompt and response; its own image isn't used.

    Returns:
      score(images float32[B, H, W, 3]) → float32[B, R]: log p(token r | image, prompt, tokens
      before r), teacher-forced in one pass.
    """
    inputs = {k: x for k, x in trace.inputs(seq.batch).items() if k != "image"}
    places, tokens = (trace.padded(x, seq.least) for x in (seq.places, seq.tokens))

    def score(images):
        out = _logprobs(model, params, jnp.asarray(images, jnp.float32), inputs, places[None], tokens)
        return np.asarray(out)[:, : len(seq.places)]

    return score


def lower(model, params, batch, images, count) -> jax.stages.Lowered:
    """The program that a `scorer` runs for so many `images` and tokens, from shapes alone."""
    inputs = {k: x for k, x in batch.items() if k != "image"}
    images = jax.ShapeDtypeStruct((images, *batch["image"].shape[1:]), jnp.float32)
    places, tokens = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, count), (count,)))
    return _logprobs.lower(model, params, images, inputs, places, tokens)


@functools.partial(lean.jit, static_argnames="model")
def _logprobs(model, params, images, inputs, places, tokens):
    """float32[B, R] of tokens int[R] predicted after text tokens int[1, R] of one sequence's inputs."""

    def tile(x):
        return jnp.broadcast_to(x, (images.shape[0], *x.shape[1:]))

    inputs = {k: tile(x) for k, x in inputs.items()}
    logits, _ = model.apply({"params": params}, images, **inputs, logit_positions=tile(places))
    return token_logprobs(logits, tile(tokens[None]))
