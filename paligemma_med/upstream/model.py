"""Our model as big_vision's trainer wants one: model_name = "paligemma_med".

big_vision builds `Model(**config.model)` and calls `load(shapes, config.model_init, config.model,
**config.model_load)`. config.model holds `img` and `llm` as here, and beside them what stands at
the top of our configs: `dtype`, `attn_impl` and `lora`.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import unfreeze
from ml_collections import ConfigDict

from paligemma_med import checkpoints, experiment
from paligemma_med.checkpoints import npz
from paligemma_med.models import lora, paligemma

Model = paligemma.Model


def load(
    init_params, init_file, model_cfg, *, resample_posemb=False, adapter_init=None,
    frozen_dtype="float32", trained=(),
):  # fmt: skip
    """Weights of any form that our `model_init` takes, fitted to the model.

    Args:
      init_params: {"img": …, "llm": …} of jax.ShapeDtypeStruct.
      init_file: a path, or a mapping img=path, llm=path.
      model_cfg: config.model.
      resample_posemb: take position embeddings of another resolution, and resample them.
      adapter_init: a PEFT folder to take LoRA factors from.
      frozen_dtype: type of the leaves that aren't `trained`.
      trained: names of those that are, which stay float32; by default all.

    Returns:
      The tree with numpy arrays for what was found. LoRA factors that aren't there remain
      jax.ShapeDtypeStruct, which big_vision then initialises.

    Raises:
      checkpoints.CheckpointError: the weights don't fit the model.
    """
    raise NotImplementedError
