"""The state of a run: what a step reads and changes, and the run's progress."""

import dataclasses
from typing import Any

import jax

from paligemma_med import weights
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import ema, run_files, tokens_seen
from paligemma_med.training import step as train_step

Leaves = dict[str, Any]  # name → jax.Array, or jax.ShapeDtypeStruct with a sharding


@dataclasses.dataclass
class TrainState:
    """Everything about a run that isn't in its config.

    Attributes:
      trained: {name: float32 array}, what the optimizer changes.
      opt_state: the optimizer's state, over `trained`; with config.ema_decay the average of `trained` is in it.
      frozen: {name: array} of all other leaves; quantised ones together with their scales.
      kept: names of the frozen leaves that config.model_init doesn't give (random ones, and factors of
        config.adapter_init). The run stores them in base.npz, and fingerprints of the other frozen ones.
      step: steps taken so far.
      skipped_steps: how many of them had a loss or gradient that wasn't finite.
      tokens_seen: `tokens_seen.NAMES` → tokens trained on so far; None if that isn't known.
      input: the position in the data (`TrainingInput.state`); None at the start.
    """

    trained: Leaves
    opt_state: Any
    frozen: Leaves
    kept: frozenset[str] = frozenset()
    step: int = 0
    skipped_steps: int = 0
    tokens_seen: dict[str, int] | None = dataclasses.field(default_factory=lambda: dict.fromkeys(tokens_seen.NAMES, 0))
    input: dict[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """All parameters in the model's form, a nested tree."""
        return unflatten_tree({**self.frozen, **self.trained})

    @property
    def averaged_params(self) -> dict[str, Any]:
        """`params`, with the average of the trained leaves in their place if there is one (config.ema_decay)."""
        return unflatten_tree({**self.frozen, **(ema.averages(self.opt_state) or self.trained)})

    @property
    def kept_leaves(self) -> Leaves:
        return {n: x for n, x in self.frozen.items() if n in self.kept}

    @property
    def base_leaves(self) -> Leaves:
        """The frozen leaves that config.model_init gives."""
        return {n: x for n, x in self.frozen.items() if n not in self.kept}


def initial(setup: TrainingSetup) -> TrainState:
    """The state that a run starts from: weights on the devices, a fresh optimizer state.

    Raises:
      checkpoints.CheckpointError: what was found doesn't fit the config.
      ValueError: no file gives some of the weights to be quantised.
    """
    params, kept = weights.initial_params(setup)
    return of_params(setup, params, kept)


def of_params(setup: TrainingSetup, params: Leaves, kept=()) -> TrainState:
    """The state at step 0 with these parameters, which are on the devices."""
    frozen = dict(params)
    trained = {n: frozen.pop(n) for n in setup.trained_names}
    places = train_step.opt_shardings(setup.tx, trained, setup.mesh)
    opt_state = jax.jit(setup.tx.init, out_shardings=places)(trained)
    return TrainState(trained, opt_state, frozen, frozenset(kept) & frozen.keys())


def abstract(setup: TrainingSetup) -> TrainState:
    """`initial` as shapes with shardings; reads nothing."""
    frozen = weights.stored_params(setup.abstract, setup)
    trained = {n: frozen.pop(n) for n in setup.trained_names}
    opt_state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(setup.tx.init, trained),
        train_step.opt_shardings(setup.tx, trained, setup.mesh),
    )
    return TrainState(trained, opt_state, frozen)


def restore(state: TrainState, checkpoints: workdirs.Checkpoints, workdir: str) -> TrainState:
    """The state of a run's newest sound checkpoint, or `state`, the run's initial one, if there is none.

    Raises:
      checkpoints.CheckpointError: the checkpoint is of another config, or none can be read.
    """
    found = checkpoints.restore_newest(state.trained, state.opt_state)
    if not found:
        return state
    step, trained, opt_state, run = found
    run = run or {}  # none in checkpoints of early versions
    return dataclasses.replace(
        state,
        trained=trained,
        opt_state=opt_state,
        frozen={**state.frozen, **run_files.load_kept(workdir, state.kept_leaves)},
        step=step,
        skipped_steps=run.get("skipped_steps", 0),
        tokens_seen=run.get("tokens_seen"),
        input=run.get("input"),
    )


def save(state: TrainState, checkpoints: workdirs.Checkpoints) -> None:
    """Writes what training has changed; returns before everything is on disk."""
    run = {"input": state.input, "skipped_steps": state.skipped_steps, "tokens_seen": state.tokens_seen}
    checkpoints.save(state.step, state.trained, state.opt_state, run)
