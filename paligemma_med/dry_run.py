"""What a training run would take, before it is run: the train step compiled on abstract arrays.

No weights and no data are touched.
"""

import math
import time

import jax

from paligemma_med import experiment, optim, sharding, train_step


def dry_run(config):
    """Compiles the train step on abstract arrays and prints what it takes; touches no files.

    Returns:
      dict of the printed figures, in GiB per device.
    """
    experiment.check_training_config(config)
    model = experiment.make_model(config)
    mesh = experiment.make_mesh(config)
    abstract = experiment.abstract_params(config, model)
    names = optim.trained_names(config, list(abstract))
    print(experiment.describe_params(config, abstract, names), flush=True)
    tx, learning_rate = optim.make(
        config, names, total_steps=10_000, num_examples=10_000, batch_size=config.input.batch_size
    )
    dtypes = experiment.param_dtypes(config, abstract, names)
    shardings = experiment.param_shardings(config, abstract, mesh)
    params = {
        n: jax.ShapeDtypeStruct(x.shape, dtypes[n], sharding=shardings[n])
        for n, x in abstract.items()
    }
    trained = {n: params.pop(n) for n in names}
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, trained), train_step.opt_shardings(tx, trained, mesh),
    )  # fmt: skip
    size, length = config.input.batch_size, config.text_len + 1
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((size, config.res, config.res, 3), "float32", sharding=rows),
        **{
            k: jax.ShapeDtypeStruct((size, length), "int32", sharding=rows)
            for k in ("text", "mask_ar", "mask_loss")
        },
    }
    started = time.monotonic()
    step = train_step.make_train_step(config, model, tx, learning_rate)
    step_fn = train_step.jit_step(step, tx, trained, mesh)
    i = jax.ShapeDtypeStruct((), "int32")
    compiled = step_fn.lower(trained, opt_state, params, batch, i).compile()
    memory = compiled.memory_analysis()

    def gib(tree):
        shapes = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes) / 2**30

    out = {
        "frozen parameters": gib(params),
        "trained parameters": gib(trained),
        "optimizer state": gib(opt_state),
        "batch": gib(batch),
        "compiled: arguments": memory.argument_size_in_bytes / 2**30,
        "compiled: temporary": memory.temp_size_in_bytes / 2**30,
    }
    devices = jax.devices()
    print(f"Compiled in {time.monotonic() - started:.0f} s for {len(devices)} × "
          f"{devices[0].device_kind}; on each, GiB:")  # fmt: skip
    for name, value in out.items():
        print(f"  {name:<22} {value:8.3f}")
    return out
