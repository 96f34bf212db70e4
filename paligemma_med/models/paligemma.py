"""PaliGemma under the name that outside code relies on, as in big_vision.

`vlm.Model` without arguments is PaliGemma 3B: SigLIP So400m/14 and Gemma 2B, image in front, a prefix-LM
mask.
"""

import functools

from paligemma_med.models import vlm
from paligemma_med.models.vlm import Model, abstract_params, init_params, patch_grid

perturbations = functools.partial(vlm.perturbations, Model())

__all__ = ["Model", "abstract_params", "init_params", "patch_grid", "perturbations"]
