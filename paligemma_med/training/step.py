"""One optimizer step: what is differentiated, how a batch is split up, and how it is jitted.

`train` runs the same step that `dry_run` compiles.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from paligemma_med.models import lean
from paligemma_med.models import loss as losses
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.training import optim, tokens_seen


def make_loss_fn(config, model) -> Callable:
    """The function that is differentiated.

    Returns:
      loss_fn(trained, frozen, batch, rng) → (sum of the rows' weighted losses float32[], number of
      supervised tokens that config.supervised_len cuts off). batch: as in `make_train_step`, plus
      row_weight float32[B] from `losses.row_weights`.
    """
    smoothing = config.get("label_smoothing") or 0.0

    def loss_fn(trained, frozen, batch, rng):
        params = unflatten_tree({**frozen, **trained})
        # The model reads all but the last token and predicts all but the first.
        text, mask_ar = batch["text"][:, :-1], batch["mask_ar"][:, :-1]
        positions, weights, lost = losses.supervised_positions(batch["mask_loss"][:, 1:], config.get("supervised_len"))
        x, _ = model.apply(
            {"params": params},
            batch["image"],
            text,
            mask_ar,
            True,
            image_at=batch.get("image_at"),
            logit_positions=positions,
            pre_logits=True,
            rngs={"dropout": rng},
        )
        labels = jnp.take_along_axis(batch["text"][:, 1:], positions, axis=1)

        def compute_logits(x):
            return model.apply({"params": params}, x, method="compute_logits")

        nll = losses.chunked_cross_entropy(compute_logits, x, labels, config.get("loss_chunk"), smoothing)
        return jnp.sum(nll * weights * batch["row_weight"][:, None]), lost

    return loss_fn


def make_train_step(config, model, tx, learning_rate) -> Callable:
    """The function that takes one optimizer step.

    Returns:
      step(trained, opt_state, frozen, batch, i) → (trained, opt_state, metrics), to be jitted.
      trained, frozen: {name: array}. batch: image float32[B, …], text int32[B, L + 1], mask_ar and
      mask_loss likewise, image_at int32[B] if there is one. i: int32[] number of the step, which
      seeds dropout. Gradients are only taken with respect to `trained`. A step whose loss or gradient isn't
      finite changes nothing, and its metric `finite` is False. With config.grad_accum_steps the batch is
      processed in that many micro-batches, whose gradients add up to exactly those of the whole batch.
    """
    accum = config.get("grad_accum_steps") or 1
    dropout_key = jax.random.key(config.get("seed", 0) + 1)
    loss_fn = make_loss_fn(config, model)

    def step(trained, opt_state, frozen, batch, i):
        rng = jax.random.fold_in(dropout_key, i)
        weight = losses.row_weights(batch["mask_loss"][:, 1:], config.get("loss_norm", "example"))
        batch = {**batch, "row_weight": weight}
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accum == 1:
            (loss, lost), grads = grad_fn(trained, frozen, batch, rng)
        else:
            # Every accum-th row, so that no row has to move to another device.
            micro = jax.tree.map(lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch)

            def body(total, x):
                out = grad_fn(trained, frozen, x[0], x[1])
                return jax.tree.map(jnp.add, total, out), None

            zero = ((jnp.float32(0), jnp.int32(0)), jax.tree.map(jnp.zeros_like, trained))
            total, _ = jax.lax.scan(body, zero, (micro, jax.random.split(rng, accum)))
            (loss, lost), grads = total
        l2_grads = optim.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(l2_grads)

        def update(trained, opt_state):
            updates, opt_state = tx.update(grads, opt_state, trained)
            trained = {n: p + updates[n] for n, p in trained.items()}
            return trained, opt_state, optim.global_norm(updates)

        def leave(trained, opt_state):
            return trained, opt_state, jnp.float32(0)

        # One bad step would ruin moments and parameters permanently. `cond` and not a `where` per leaf, which would
        # hold the old and the new state at once.
        trained, opt_state, l2_updates = jax.lax.cond(finite, update, leave, trained, opt_state)
        metrics = {
            "training_loss": loss,
            "l2_grads": l2_grads,
            "l2_updates": l2_updates,
            "l2_params": optim.global_norm(trained),
            "lr": learning_rate(i),
            **{name: jnp.where(finite, n, 0) for name, n in tokens_seen.of_batch(batch["mask_loss"]).items()},
            "lost": lost,
            "finite": finite,
        }
        return trained, opt_state, metrics

    return step


def opt_shardings(tx, trained, mesh) -> Any:
    """The shardings of the optimizer's state: moments are sharded like their parameter, the rest is replicated.

    Args:
      trained: {name: array, or jax.ShapeDtypeStruct with a sharding}.

    Returns:
      The tree of `tx.init(trained)`, of shardings.
    """

    def one(path, leaf):
        owner = trained.get(getattr(path[-1], "key", None))
        fits = owner is not None and owner.shape == leaf.shape
        return owner.sharding if fits else sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, trained))


def jitted(setup, trained) -> Callable:
    """The step of a `TrainingSetup`, jitted; see `make_train_step` and `jit_step`.

    Args:
      trained: {name: array, or jax.ShapeDtypeStruct with a sharding}.
    """
    step = make_train_step(setup.config, setup.model, setup.tx, setup.learning_rate)
    return jit_step(step, setup.tx, trained, setup.mesh)


def jit_step(step, tx, trained, mesh) -> Callable:
    """`step` of `make_train_step`, jitted. Its results have the shardings of its arguments, or the second call would
    compile again."""
    out = (
        {n: x.sharding for n, x in trained.items()},
        opt_shardings(tx, trained, mesh),
        sharding.replicated(mesh),
    )
    return lean.jit(step, donate_argnums=(0, 1), out_shardings=out)
