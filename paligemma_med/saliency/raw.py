"""Raw attention: the answer's rows as the model made them, in numpy.

`rows` are float[L, N, R, C] of `capture.streamed`; a `map` is float[R, C] of any method, C columns as
in `trace`: P patches first, then the text.
"""

import numpy as np

from paligemma_med.saliency import rollout


def raw(rows, layers=None, heads=None, fuse="mean") -> np.ndarray:
    """Attention of chosen layers and heads, fused over both.

    Args:
      rows: float[L, N, R, C].
      layers, heads: int or ints, negative ones from the end; None takes all.
      fuse: "mean", "max" or "min".

    Returns:
      float32[R, C]. Rows sum to 1 for "mean" alone.

    Raises:
      ValueError: a layer or head that doesn't exist, or an empty choice; an unknown `fuse`.
    """
    rollout.check_fuse(fuse)
    rows = np.asarray(rows, np.float32)
    for axis, (name, chosen) in enumerate((("layers", layers), ("heads", heads))):
        if chosen is None:
            continue
        count, chosen = rows.shape[axis], np.atleast_1d(chosen)
        if not chosen.size or (chosen < -count).any() or (chosen >= count).any():
            raise ValueError(f"{name} is {chosen.tolist()}; expected some of 0 to {count - 1}.")
        rows = np.take(rows, chosen % count, axis=axis)
    return getattr(np, fuse)(rows, axis=(0, 1))


def mass(rows, patches, prompt) -> np.ndarray:
    """How much of each row falls on the image, the prompt and the answer.

    Args:
      rows: float[..., C].
      patches: P.
      prompt: slice of the prompt's columns, which begin at P.

    Returns:
      float32[..., 3], whose sum is the row's.
    """
    rows = np.asarray(rows, np.float32)
    parts = (rows[..., :patches], rows[..., prompt], rows[..., prompt.stop :])
    return np.stack([x.sum(-1) for x in parts], axis=-1)


def response_to_image(map, grid) -> np.ndarray:
    """float[R, C] → float32[R, h, w]: what each token of the answer takes from each patch."""
    map = np.asarray(map, np.float32)
    return map[:, : grid[0] * grid[1]].reshape(-1, *grid)


def image_to_response(map, patches) -> np.ndarray:
    """How the answer's attention to some patches is shared among its tokens.

    The transpose of `response_to_image`, not the patches' own attention, since they never see the
    answer. Shares are rescaled to sum to 1 over the answer: they compare tokens with each other and
    don't say how much the patches matter.

    Args:
      map: float[R, C].
      patches: ints, or bool[h, w] or bool[P], which patches.

    Returns:
      float32[R], sums to 1; zeros where no token takes anything from the patches.
    """
    patches = np.asarray(patches)
    if patches.dtype == bool:
        patches = np.flatnonzero(patches)
    taken = np.asarray(map, np.float32)[:, patches.reshape(-1)].sum(-1)
    return taken / taken.sum() if taken.sum() > 0 else np.zeros_like(taken)


def prompt_to_response(map, prompt) -> np.ndarray:
    """float[R, C] → float32[R, tokens of the prompt]: what each answer token takes from each prompt token."""
    return np.asarray(map, np.float32)[:, prompt]
