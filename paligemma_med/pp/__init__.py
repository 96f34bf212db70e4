"""Preprocessing: big_vision's pp strings on numpy, and the tokenizers they use.

`get_preprocess_fn("decode|resize(224)|…")` gives the function that turns one example of a data
source into what the model reads. Nothing here imports TensorFlow, JAX or the model.
"""

from paligemma_med.pp import ops_boxes, ops_general, ops_image, ops_text  # noqa: F401  they register their ops
from paligemma_med.pp.registry import PreprocessFn

__all__ = ["get_preprocess_fn"]


def get_preprocess_fn(pp: str) -> PreprocessFn:
    """Builds the preprocessing function of a pp string.

    Args:
        pp: ops separated by `|`, e.g. `decode|resize(224)|value_range(-1, 1)`. Empty sections are
            skipped; an empty string gives a function that copies the dict.

    Returns:
        `fn(data, rng=None) -> dict`, picklable. `rng` is a `np.random.Generator`; only random ops
        need it.

    Raises:
        ValueError: unknown op (near names are listed), wrong or non-literal arguments.
        FileNotFoundError: the tokenizer file that a `tok` op names doesn't exist.
    """
    return PreprocessFn(pp)
