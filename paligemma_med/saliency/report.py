"""All arrays of a report at once: what `page` shows and `explain` writes.

Axis letters: P, T, S, R, L, N as in `paligemma_med.saliency`; H, W pixels; h, w patches; M regions;
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.saliency import capture, occlusion, raw, relevancy, rollout, sequence

METHODS = ("raw", "rollout", "relevancy", "occlusion")
# Fusing of heads, and share of the weakest keys that is left out of each row.
ROLLOUTS = {
    "mean of heads": dict(fuse="mean"),
    "maximum of heads": dict(fuse="max"),
    "minimum of heads": dict(fuse="min"),
    "mean of heads, weakest 90 % of each row left out": dict(fuse="mean", discard=0.9),
}
WHOLE = 2**28  # bytes of probabilities up to which both towers' are held at once
CELLS = 8  # occluded cells along the longer side, at most
REGIONS = 4  # lines of the coarse grid whose rectangles are occluded
OTHERS = 5  # alternatives to a token


def measure(model, params, image, prompt_ids, answer_ids, *, methods=METHODS, fill="blur",
            batch_size=32):  # fmt: skip
    """The arrays of one answer.

    Args:
      model, params: a `paligemma.Model`, not under attn_impl "cudnn", and its parameters.
      image: float[H, W, 3] in [-1, 1].
      prompt_ids, answer_ids: as `sequence.make` takes them.
      methods: some of METHODS; raw attention is always there.
      fill: of occluded cells, see `occlusion.fill_image`.
      batch_size: images a pass of occlusion.

    Returns:
      (arrays, score). arrays has, of a report (`page`), grid, logprobs, raw, mass, maps, occlusion,
      regions, and others: (tokens int[R, K], probabilities float[R, K]), most probable first.
      Relevancy is without the 1 that its rows start from at their own query. score: the answer's
      log-probabilities on other images, `occlusion.scorer`.

    Raises:
      ValueError: an unknown method or fill, a prompt or answer without tokens, under "cudnn".
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"methods has {unknown}; expected some of {list(METHODS)}.")
    if fill not in occlusion.FILLS:
        raise ValueError(f"fill is {fill!r}; expected one of {list(occlusion.FILLS)}.")
    seq = sequence.make(model, prompt_ids, answer_ids, image)
    score = occlusion.scorer(model, params, seq)
    logprobs, others = _others(model, params, seq)
    rows, rolled = _attention(model, params, seq, "rollout" in methods)
    end = seq.response.stop  # what stands behind is padding
    maps = []
    for variant, (row, pixels) in rolled.items():
        maps.append(dict(method="rollout", variant=variant, values=row[:, :end]))
        maps.append(dict(method="rollout_pixels", variant=variant, values=pixels))
    if "relevancy" in methods:
        found = relevancy.relevancy(model, params, seq.batch, seq.queries, seq.tokens)
        row = np.array(found.rows[:, :end])
        row[np.arange(len(row)), seq.queries] -= 1
        maps.append(dict(method="relevancy", variant="", values=row))
        maps.append(dict(method="relevancy_pixels", variant="", values=found.patches))
    arrays = dict(
        grid=seq.grid,
        logprobs=logprobs,
        others=others,
        raw=rows[..., :end],
        mass=raw.mass(rows[..., :end], seq.patches, seq.prompt),
        maps=maps,
        occlusion=None,
        regions=None,
    )
    if "occlusion" in methods:
        cell = -(-max(seq.grid) // CELLS)
        image = seq.batch["image"][0]
        drops = occlusion.occlusion(
            score, image, seq.grid, cell=cell, fill=fill, batch_size=batch_size
        )
        # Each patch gets the figure of its cell.
        drops = drops.repeat(cell, axis=1).repeat(cell, axis=2)[:, : seq.grid[0], : seq.grid[1]]
        values = drops.reshape(len(drops), -1)
        maps.append(dict(method="occlusion", variant="", values=values))
        arrays["occlusion"] = dict(fill=fill, cell=cell)
        arrays["regions"] = _regions(score, image, seq.grid, fill, batch_size)
    return arrays, score


def boxes(grid, lines=REGIONS):
    """int[M, 4] all rectangles of a coarse grid of at most `lines` × `lines` cells, as y0 x0 y1 x1
    in patches."""
    edges = [sorted({round(i * n / lines) for i in range(lines + 1)}) for n in grid]
    spans = [[(a, b) for i, a in enumerate(e) for b in e[i + 1 :]] for e in edges]
    return np.array([(y0, x0, y1, x1) for y0, y1 in spans[0] for x0, x1 in spans[1]])


def _regions(score, image, grid, fill, batch_size):
    """The answer's log-probabilities with each rectangle replaced."""
    found = boxes(grid)
    patch = image.shape[0] // grid[0], image.shape[1] // grid[1]

    def images():
        for y0, x0, y1, x1 in found:
            mask = np.zeros(image.shape[:2], bool)
            mask[y0 * patch[0] : y1 * patch[0], x0 * patch[1] : x1 * patch[1]] = True
            yield occlusion.replace(image, mask, fill, patch[0])

    return dict(fill=fill, boxes=found, logprobs=occlusion.in_batches(score, images(), batch_size))


def _attention(model, params, seq, rollouts):
    """(rows float32[L, N, R, S], {variant: (rollout [R, S], the same in patches [R, P])}).

    Where all probabilities of both towers fit into WHOLE bytes one pass gives everything, else one
    streamed pass a variant.
    """
    arrays = {k: seq.batch[k] for k in ("image", "text", "mask_ar")}
    variants = ROLLOUTS if rollouts else {}
    shapes = jax.eval_shape(functools.partial(_whole, model), params, arrays)
    if sum(4 * x.size for x in jax.tree.leaves(shapes)) <= WHOLE:
        found = capture.attention(model, params, arrays)
        rows = found.llm[:, 0][:, :, seq.queries]
        rolled = _rollouts(found.llm[:, 0], found.img[:, 0], seq.queries) if rollouts else {}
        return rows, jax.device_get(rolled)
    rows, rolled = None, {}
    for variant, kw in variants.items() or {"": {}}.items():
        found = capture.streamed(model, params, arrays, seq.queries, **kw)
        rows = found.rows
        if rollouts:
            pixels = rollout.to_patches(found.rollout[:, : seq.patches], found.img_rollout)
            rolled[variant] = (found.rollout, np.asarray(pixels))
    return rows, rolled


def _whole(model, params, arrays):
    out = model.apply({"params": params}, **arrays, capture_attention=True)[1]
    return out["llm/attn"], out["img/attn"]


@jax.jit
def _rollouts(llm, img, queries):
    """{variant: (float32[R, S], float32[R, P])} of probabilities [L, N, S, S] and [l, n, P, P]."""
    out = {}
    for variant, kw in ROLLOUTS.items():
        row = rollout.rollout(llm, **kw)[queries]
        out[variant] = row, rollout.to_patches(row[:, : img.shape[-1]], rollout.rollout(img, **kw))
    return out


def _others(model, params, seq):
    """(log-probabilities of the answer's tokens [R], (tokens [R, K], probabilities [R, K]))."""
    count = len(seq.queries)
    places = np.pad(seq.queries - seq.patches, (0, -count % capture.MULTIPLE), mode="edge")
    arrays = {k: seq.batch[k] for k in ("image", "text", "mask_ar")}
    logprobs, tokens, p = jax.device_get(_top(model, params, arrays, places[None]))
    return logprobs[:count], (tokens[:count], p[:count])


@functools.partial(jax.jit, static_argnames="model")
def _top(model, params, arrays, places):
    logits, _ = model.apply({"params": params}, **arrays, logit_positions=places)
    logprobs = jax.nn.log_softmax(logits[0])
    chosen = jnp.take_along_axis(logprobs, arrays["text"][0, places[0] + 1][:, None], axis=-1)
    top, tokens = jax.lax.top_k(logprobs, min(OTHERS, logprobs.shape[-1]))
    return chosen[:, 0], tokens, jnp.exp(top)
