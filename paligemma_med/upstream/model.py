"""Our model in the form that big_vision's trainer expects: model_name = "paligemma_med".

The trainer builds `Model(**config.model)` and calls `load(shapes, config.model_init, config.model,
**config.model_load)`. config.model holds `img` and `llm` as here, and also `dtype`, `attn_impl` and
`lora`, which are at the top level of our configs.
"""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from paligemma_med import weights
from paligemma_med.models import paligemma, parts, regexes, vlm
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.setup import Setup


def Model(*, lora=(), **kw) -> paligemma.Model:  # noqa: N802 (big_vision's name)
    """`paligemma.Model` with these arguments.

    Args:
      lora: ((regex, (("rank", 8), ("alpha", 32), …)), …), None in place of the pairs for no
        adapter. Pairs, because a frozen config can't hold a dict within a tuple; dicts work too.
    """
    return paligemma.Model(lora=_as_dicts(lora), **kw)


def _as_dicts(rules):
    return tuple((regex, spec if spec is None else dict(spec)) for regex, spec in rules)


def load(
    init_params,
    init_file,
    model_cfg,
    *,
    resample_posemb=False,
    base="",
    allow_nonfinite=False,
    adapter_init="",
    frozen_dtype="float32",
    trained=((".*", True),),
) -> dict:
    """Weights in any form that our `model_init` takes, fitted to the model.

    Args:
      init_params: {"img": …, "llm": …} of jax.ShapeDtypeStruct.
      init_file: a path, or a mapping img=path, llm=path.
      model_cfg: config.model.
      resample_posemb: resample position embeddings of another resolution.
      base: where the weights are that a run started from, if they aren't where its config.json says.
      allow_nonfinite: whether weights may be NaN or infinite.
      adapter_init: a PEFT folder to take LoRA factors from.
      frozen_dtype: for leaves that aren't trained; trained ones stay float32.
      trained: ((regex, bool), …) over names of leaves; the first full match counts.

    Returns:
      The tree, with numpy arrays for what was found. LoRA factors that are in no file stay
      jax.ShapeDtypeStruct, and big_vision initialises them.

    Raises:
      checkpoints.CheckpointError: the weights don't fit the model.
    """
    config = ml_collections.ConfigDict(model_cfg).unlock().to_dict()
    rules = config.pop("lora", None) or ()
    model = {key: value for key, value in config.items() if key not in ("dtype", "attn_impl")}
    out = flatten_tree(init_params)
    config = ml_collections.ConfigDict(
        dict(
            model=model,
            lora=_as_dicts(rules),
            model_init=init_file,
            adapter_init=adapter_init or None,
            resample_posemb=resample_posemb,
            base=base or None,
            allow_nonfinite=allow_nonfinite,
            text_len=1,  # of these two no weight depends
            tokenizer="tiny",
            res=vlm.image_size(parts.leaves_of(model), out),
        )
    )
    # Its trainer forbids implicit transfers to devices, which fingerprints need.
    with jax.transfer_guard("allow"):
        host, adapter = weights.initial_host_params(Setup(config))
        for name, array in {**host, **adapter}.items():
            stays = next((t for regex, t in trained if regexes.fullmatch(regex, name)), False)
            dtype = jnp.dtype("float32" if stays else frozen_dtype)
            out[name] = np.asarray(array).astype(dtype)
    return unflatten_tree(out)
