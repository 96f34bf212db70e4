"""big_vision's PaliGemma and the shape of its update step as a side of a benchmark.

$BIG_VISION_DIR names a checkout of google-research/big_vision (tried with @0127fb6). It supplies the
model as in its configs (layers in a scan, each recomputed in the backward pass) and the optimizer with
its frozen schedule. The update step is that of trainers/proj/paligemma/train.py: logits at all text
positions against one-hot targets, gradients of all parameters, masks for frozen ones, and the norms that
it logs. It has no LoRA: for "lora" the attention modules of both towers get ours, as products of
activations, so that the work is the same as on the other sides.

TensorFlow, which big_vision imports for files, is replaced by an empty module. What today's JAX lacks,
`jax.sharding.PositionalSharding`, is only used in a barrier between hosts, which no step calls.
"""

import contextlib
import importlib
import os
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from paligemma_med.models import decoder, vit
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tools.bench import peers_ours, sizes, workers

# Module of a projection of attention → its kernel.
_PROJECTIONS = {
    os.path.basename(leaf.folder): leaf
    for leaf in (*vit.LEAVES, *decoder.LEAVES)
    if leaf.role == "product" and "H" in leaf.letters
}
_MODEL = "big_vision.models.proj.paligemma.paligemma"


def load_big_vision() -> tuple:
    """(its PaliGemma module, its Gemma module, its optax module, its sharding module).

    Raises:
      ValueError: $BIG_VISION_DIR is not a checkout.
    """
    folder = os.environ.get("BIG_VISION_DIR", "")
    if not os.path.isfile(os.path.join(folder, *_MODEL.split(".")) + ".py"):
        raise ValueError(f"$BIG_VISION_DIR is {folder!r}; expected a checkout of google-research/big_vision.")
    sys.path.insert(0, os.path.abspath(folder))
    empty = {n: types.ModuleType(n) for n in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile")}
    empty["tensorflow.io"].gfile = empty["tensorflow.io.gfile"]
    sys.modules.update(empty)
    names = (_MODEL, "big_vision.models.ppp.gemma", "big_vision.optax", "big_vision.sharding")
    found = tuple(importlib.import_module(n) for n in names)
    for name in empty:  # or others would think that TensorFlow is installed
        del sys.modules[name]
    return found


def make_model(paligemma, its_gemma, size) -> Any:
    """Its model of a size. Its Gemma only takes names of variants, so here every name means this one."""
    llm = {**decoder.VARIANTS.get(size.llm.get("variant"), {}), **size.llm}
    llm = dict(llm, variant="bench", norm_eps=1e-6, scan=True, remat_policy="nothing_saveable")
    its_gemma.get_config = lambda variant: ml_collections.ConfigDict(llm)
    tower = vit.Model(**size.img)
    img = {k: getattr(tower, k) for k in ("width", "depth", "mlp_dim", "num_heads", "patch_size")}
    return paligemma.Model(
        img=dict(img, pool_type="none", scan=True),
        llm=dict(variant="bench", vocab_size=llm["vocab_size"], scan=True),
    )


def _low_rank(module, x, inputs, outputs, prefix=""):
    """s·(x·A)·B with the factors as parameters of `module`, as in `lora`."""
    spec = lora.Spec(**sizes.LORA[0][1])
    shapes = (*x.shape[x.ndim - inputs :], spec.rank), (spec.rank, *outputs)
    a, b = (
        module.param(f"{prefix}{name}", nn.initializers.zeros_init(), shape)
        for name, shape in zip(lora.FACTORS, shapes)
    )
    return jnp.tensordot(jnp.tensordot(x, a, inputs) * spec.scale, b, 1)


def _adapt(next_call, args, kw, context):
    """An interceptor that adds LoRA to the outputs of the attention's projections."""
    y = next_call(*args, **kw)
    module, x = context.module, args[-1] if args else None
    if context.method_name != "__call__":
        return y
    leaf = _PROJECTIONS.get(module.name)
    if leaf is None:
        return y
    inputs, outputs = len(leaf.inputs), y.shape[len(leaf.inputs) - len(leaf.letters) :]
    if not leaf.parts:
        return y + _low_rank(module, x, inputs, outputs)
    return y + jnp.stack([_low_rank(module, x, inputs, outputs, f"{part}_") for part in leaf.parts])


def _its_name(name):
    """…/kernel of k and v/k/lora_a → …/kernel of k and v/k_lora_a."""
    for module, leaf in _PROJECTIONS.items():
        for part in leaf.parts:
            name = name.replace(f"/{module}/{part}/", f"/{module}/{part}_")
    return name


def make_optimizer(bv_optax, params, what) -> tuple:
    """(regex of the trained leaves, its config, its optax transformation). params: a tree of arrays or of shapes."""
    regex = sizes.TRAINED[what].replace("/lora_", "[/_]lora_")
    config = ml_collections.ConfigDict(
        dict(
            sizes.optimizer(),
            schedule=[(regex, dict(decay_type="stair"))]  # without stairs: constant
            + ([] if what == "full" else [(".*", None)]),
        )
    )
    tx, _ = bv_optax.make(config, params, sched_kw=dict(total_steps=10**6, batch_size=1, data_size=10**6))
    return regex, config, tx


def adapted(what) -> contextlib.AbstractContextManager:
    """Within it the attention modules have our LoRA, if `what` is "lora"."""
    return nn.intercept_methods(_adapt) if what == "lora" else contextlib.nullcontext()


def make_update(model, bv_optax, config, tx, what) -> Callable:
    """update(state, batch) → (state, (loss, norms)), to be jitted. state: dict(params, opt)."""

    def loss_fn(params, batch):
        with adapted(what):
            logits, _ = model.apply(
                {"params": params},
                batch["image"],
                batch["text"][:, :-1],
                batch["mask_ar"][:, :-1],
                train=True,
                rngs={"dropout": jax.random.key(0)},
            )
        targets = jax.nn.one_hot(batch["text"][:, 1:], logits.shape[-1])
        mask = batch["mask_loss"][:, 1:]
        found = jnp.sum(jax.nn.log_softmax(logits) * targets, axis=-1) * mask
        return jnp.mean(-jnp.sum(found, axis=-1) / jnp.maximum(jnp.sum(mask, axis=-1), 1))

    def update(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state["params"], batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        of_trained = bv_optax.replace_frozen(config.schedule, grads, 0.0)
        norms = [optax.global_norm(x) for x in (of_trained, params, updates)]
        return dict(params=params, opt=opt), (loss, norms)

    return update


def build(settings) -> peers_ours.JaxSide:
    """See `workers`. settings: size, dtype, what, weights (a folder), rows."""
    if settings["dtype"] != "float32":
        raise ValueError(f"big_vision's Gemma computes in float32 alone, found --dtype={settings['dtype']}.")
    paligemma, its_gemma, bv_optax, _ = load_big_vision()
    size, what = sizes.SIZES[settings["size"]], settings["what"]
    model = make_model(paligemma, its_gemma, size)
    _, host = peers_ours.read_weights(settings)
    names = list(host)
    params = unflatten_tree({_its_name(n): jax.device_put(np.asarray(host.pop(n), np.float32)) for n in names})
    regex, config, tx = make_optimizer(bv_optax, params, what)
    state = dict(params=params, opt=jax.jit(tx.init)(params))
    batch = jax.device_put(sizes.draw_batch(size, settings["rows"]))
    update = jax.jit(make_update(model, bv_optax, config, tx, what), donate_argnums=0)

    def step():
        nonlocal state
        state, (loss, _) = update(state, batch)
        return loss

    trained = [x for n, x in flatten_tree(params).items() if re.fullmatch(regex, n)]
    about = dict(trained=sum(x.size for x in trained))
    return peers_ours.JaxSide(step, "float32", about)


if __name__ == "__main__":
    workers.serve(peers_ours.device, build)
