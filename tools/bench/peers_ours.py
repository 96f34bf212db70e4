"""Our training step as a side of a benchmark: `train_step`, jitted as in `train`.

It reads the weights with `checkpoints` and holds frozen ones in the benchmark's type, trained ones in
float32. Neither TFDS, Grain nor ml_collections is imported: the batch is on the device, and the config
is a plain dict.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med import checkpoints, quantise
from paligemma_med.models import flops
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.training import optim
from paligemma_med.training import step as train_step
from tools.bench import sizes, workers


def device() -> dict:
    """The device that JAX computes on."""
    found = jax.devices()[0]
    return dict(platform=found.platform, device=found.device_kind)


class JaxSide:
    """The base of JAX sides; see `workers`. next_step: () → what `value` waits for."""

    def __init__(self, next_step, dtype, about):
        self.step = next_step
        self.about = {"jax": jax.__version__, **about}
        self._dtype, self._matrices = jnp.dtype(dtype), {}
        if dtype == "float32" and jax.default_backend() == "gpu":
            # PyTorch's default; JAX would use tf32. No step has been compiled yet.
            jax.config.update("jax_default_matmul_precision", "float32")

    value = staticmethod(float)

    def multiply(self, n) -> None:
        if n not in self._matrices:
            a, b = jax.random.normal(jax.random.key(0), (2, n, n), jnp.float32)
            self._matrices = {n: (a.astype(self._dtype), b.astype(self._dtype))}
        _product(*self._matrices[n]).block_until_ready()

    def peak(self) -> int | None:
        stats = jax.devices()[0].memory_stats()
        return stats and stats["peak_bytes_in_use"]


@jax.jit
def _product(a, b):
    return a @ b


class _Config(dict):
    """The part of a config's interface that `train_step` and `optim` use."""

    __getattr__ = dict.__getitem__


def read_weights(settings, **towers) -> tuple:
    """(model, {name: numpy array, or lazy.Lazy}) from the folder that `sizes.write_weights` made.

    towers: further arguments for both towers.
    """
    size, folder = sizes.SIZES[settings["size"]], settings["weights"]
    params = checkpoints.open_hf(f"{folder}/base")
    img, llm = ({**kw, **towers} for kw in (size.img, size.llm))
    if settings.get("what") == "lora":
        adapter = checkpoints.load_adapter(f"{folder}/adapter")
        model, params = checkpoints.apply_adapter(img, llm, params, adapter, dtype=settings["dtype"])
    else:
        model = checkpoints.apply_adapter(img, llm, params, checkpoints.Adapter({}, {}), dtype=settings["dtype"])[0]
    return model, flatten_tree(params)


def put_weights(settings) -> tuple:
    """(model, parameters on the device, all in the benchmark's type), without adapters."""
    towers = {k: settings[k] for k in ("scan", "attn_impl")}
    model, host = read_weights({**settings, "what": None}, **towers)
    dtype, params = jnp.dtype(settings["dtype"]), {}
    for name in list(host):  # one at a time, so that the host never holds all of them
        params[name] = jax.device_put(np.asarray(host.pop(name)).astype(dtype, copy=False))
    return model, unflatten_tree(params)


def build(settings) -> JaxSide:
    """See `workers`. settings: size, dtype, what, weights (a folder), rows, remat_policy, scan,
    attn_impl, frozen_dtype (int8 or nf4; None is dtype)."""
    size = sizes.SIZES[settings["size"]]
    towers = {k: settings[k] for k in ("remat_policy", "scan", "attn_impl")}
    model, host = read_weights(settings, **towers)
    config = _Config(
        sizes.optimizer(),
        supervised_len=size.answer_len,
        schedule=[(sizes.TRAINED[settings["what"]], dict(decay_type="constant"))]
        + ([] if settings["what"] == "full" else [(".*", None)]),
    )
    mesh = sharding.make_mesh([("data", 1)], jax.devices()[:1])
    names = optim.trained_names(config, list(host))
    tx, learning_rate = optim.make(config, names, total_steps=10**6, num_examples=10**6, batch_size=settings["rows"])
    whole = sharding.replicated(mesh)

    def put(name):
        array = np.asarray(host.pop(name))
        wanted = None if name in names else settings.get("frozen_dtype")
        if wanted and (kind := quantise.kind_of(name, array.shape, wanted)):
            return jax.device_put(quantise.quantise(name, array, kind), whole)
        dtype = np.float32 if name in names else jnp.dtype(settings["dtype"])
        return {name: jax.device_put(array.astype(dtype, copy=False), whole)}

    parameters = sum(math.prod(x.shape) for x in host.values())
    params = {}
    for name in list(host):
        params |= put(name)
    trained = {n: params.pop(n) for n in names}
    frozen = params
    where = train_step.opt_shardings(tx, trained, mesh)
    opt_state = jax.jit(tx.init, out_shardings=where)(trained)
    step_fn = train_step.make_train_step(config, model, tx, learning_rate)
    step_fn = train_step.jit_step(step_fn, tx, trained, mesh)
    batch = jax.device_put(sizes.draw_batch(size, settings["rows"]), sharding.batch_sharding(mesh))
    i = 0

    def step():
        nonlocal trained, opt_state, i
        with sharding.rules(config, mesh):
            trained, opt_state, metrics = step_fn(trained, opt_state, frozen, batch, i)
        i += 1
        return metrics["training_loss"]

    counted = flops.count(model, names, res=size.res, text_len=size.text_len, supervised_len=size.answer_len)
    about = dict(
        flops_a_step=counted.per_example_model * settings["rows"],
        trained=sum(x.size for x in trained.values()),
        parameters=parameters,
    )
    return JaxSide(step, settings["dtype"], about)


if __name__ == "__main__":
    workers.serve(device, build)
