"""All arrays of a report at once: what `page` shows and `explain` writes.

Axis letters: P, T, S, R, L, N as in `paligemma_med.saliency`; H, W pixels; h, w patches; M regions;
V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import vlm
from paligemma_med.saliency import capture, occlusion, raw, relevancy, rollout, sequence

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


def measure(model, params, image, prompt_ids, answer_ids, *, methods=METHODS, fill="blur", batch_size=BATCH):
    """The arrays of one answer.

    Args:
      model, params: a `vlm.Model`, not under attn_impl "cudnn", and its parameters.
      image: float[H, W, 3] in [-1, 1].
      prompt_ids, answer_ids: as `sequence.make` takes them.
      methods: some of METHODS; raw attention is always there.
      fill: of occluded cells, see `occlusion.fill_image`.
      batch_size: images a pass of occlusion.

    Returns:
      (arrays, score). arrays has, of a report (`page`), grid, logprobs, raw, mass, maps, occlusion,
      regions, and others: (tokens int[R, K], probabilities float[R, K]), most probable first.
      Maps through the image tower ("…_siglip") have the same columns behind the patches as those
      without it. Relevancy is without the 1 that its rows start from at their own query.
      score: the answer's log-probabilities on other images, `occlusion.scorer`.

    Raises:
      ValueError: an unknown method or fill, a prompt or answer without tokens, under "cudnn".
    """
    if unknown := sorted(set(methods) - set(METHODS)):
        raise ValueError(f"methods has {unknown}; expected some of {list(METHODS)}.")
    if fill not in occlusion.FILLS:
        raise ValueError(f"fill is {fill!r}; expected one of {list(occlusion.FILLS)}.")
    seq = sequence.make(model, prompt_ids, answer_ids, image)
    score = occlusion.scorer(model, params, seq)
    rows, rolled, logprobs, others = _attention(model, params, seq, "rollout" in methods)
    end = seq.response.stop  # what stands behind is padding
    maps = []

    def add(method, variant, row, pixels):
        row = row[:, :end]
        maps.append(dict(method=method, variant=variant, values=row))
        row = np.concatenate([pixels, row[:, seq.patches :]], axis=1)
        maps.append(dict(method=f"{method}_siglip", variant=variant, values=row))

    for variant in ROLLOUTS if rolled else ():  # in this order, which jit has lost
        add("rollout", variant, *rolled[variant])
    if "relevancy" in methods:
        found = relevancy.relevancy(model, params, seq.batch, seq.queries, seq.tokens)
        row = np.array(found.rows)
        row[np.arange(len(row)), seq.queries] -= 1
        add("relevancy", "", row, found.patches)
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
        drops = occlusion.occlusion(score, image, seq.grid, cell=cell, fill=fill, batch_size=batch_size)
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
    replaced = occlusion.replacer(image, fill, patch[0])

    def images():
        for y0, x0, y1, x1 in found:
            mask = np.zeros(image.shape[:2], bool)
            mask[y0 * patch[0] : y1 * patch[0], x0 * patch[1] : x1 * patch[1]] = True
            yield replaced(mask)

    return dict(fill=fill, boxes=found, logprobs=occlusion.in_batches(score, images(), batch_size))


class _Folds:
    """Several folds (`layers.capture`) as one: its outs are the first one's."""

    def __init__(self, folds):
        self.folds = folds

    def init(self, batch, heads, length):
        return [f.init(batch, heads, length) for f in self.folds]

    def step(self, states, probs):
        states, outs = zip(*(f.step(s, probs) for f, s in zip(self.folds, states)))
        return list(states), outs[0]


def _attention(model, params, seq, rollouts):
    """(rows float32[L, N, R, S], {variant: (rollout [R, S], carried on to patches [R, P])},
    log-probabilities float32[R], (tokens int[R, K], probabilities float[R, K]))."""
    count = len(seq.queries)
    queries = np.pad(seq.queries, (0, -count % capture.MULTIPLE), mode="edge")
    arrays = {k: seq.batch[k] for k in ("image", "text", "mask_ar")}
    rows, rolled, *rest = jax.device_get(_streamed(model, params, arrays, queries, rollouts))
    logprobs, tokens, p = (x[:count] for x in rest)
    rolled = {k: tuple(x[:count] for x in pair) for k, pair in rolled.items()}
    return rows[:, :, :count], rolled, logprobs, (tokens, p)


def lower(model, params, arrays, queries):
    """The pass for attention and all rollouts as `jax.jit` lowers it, of arrays or their shapes; to
    ask what memory it takes (tools/bench/saliency_memory.py)."""
    return _streamed.lower(model, params, arrays, queries, True)


@functools.partial(jax.jit, static_argnames=("model", "rollouts"))
def _streamed(model, params, arrays, queries, rollouts):
    """One pass for all variants, which holds a layer's probabilities and the rollouts."""
    variants = ROLLOUTS if rollouts else {"": {}}
    img = _Folds([capture.Rows(**kw) for kw in variants.values()])
    llm = _Folds([capture.Rows(queries, **kw) for kw in variants.values()])
    patches = int(np.prod(vlm.patch_grid(model, arrays["image"])))
    at = queries - patches
    logits, out = model.apply({"params": params}, **arrays, logit_positions=at[None], capture_attention=(img, llm))
    states, rows = out["llm/attn"]
    rolled = {}
    for variant, of_llm, of_img in zip(variants, states, out["img/attn"][0]):
        row = of_llm["rolled"][queries]
        rolled[variant] = row, rollout.to_patches(row[:, :patches], of_img["rolled"])
    logprobs = jax.nn.log_softmax(logits[0])
    chosen = jnp.take_along_axis(logprobs, arrays["text"][0, at + 1][:, None], axis=-1)[:, 0]
    top, tokens = jax.lax.top_k(logprobs, min(OTHERS, logprobs.shape[-1]))
    return rows, rolled if rollouts else {}, chosen, tokens, jnp.exp(top)
