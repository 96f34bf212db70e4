"""The state of a run: what a step reads and changes, and how far the run has come."""

import dataclasses
from typing import Any

import jax

from paligemma_med import weights
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import run_files
from paligemma_med.training import step as train_step

Leaves = dict[str, Any]  # name → jax.Array, or jax.ShapeDtypeStruct with a sharding


@dataclasses.dataclass
class TrainState:
    """Everything of a run that isn't in its config.

    Attributes:
      trained: {name: float32 array}, what the optimizer changes.
      opt_state: the optimizer's, over `trained`.
      frozen: {name: array} of all other leaves; quantised ones have their scales beside them.
      kept: names of the frozen leaves that config.model_init doesn't give (random ones, and factors of
        config.adapter_init). The run keeps them in base.npz, and of the others fingerprints.
      step: steps taken so far.
      skipped_steps: those of them whose loss or gradient wasn't finite.
      input: where the data stand (`TrainingInput.state`); None at the start.
    """

    trained: Leaves
    opt_state: Any
    frozen: Leaves
    kept: frozenset[str] = frozenset()
    step: int = 0
    skipped_steps: int = 0
    input: dict[str, Any] | None = None

    @property
    def params(self) -> dict[str, Any]:
        """All parameters as the model takes them: a nested tree."""
        return unflatten_tree({**self.frozen, **self.trained})

    @property
    def kept_leaves(self) -> Leaves:
        return {n: x for n, x in self.frozen.items() if n in self.kept}

    @property
    def base_leaves(self) -> Leaves:
        """The frozen leaves that config.model_init gives."""
        return {n: x for n, x in self.frozen.items() if n not in self.kept}


def initial(setup: TrainingSetup) -> TrainState:
    """The state that a run starts from: weights on the devices, an empty optimizer.

    Raises:
      checkpoints.CheckpointError: what was found doesn't fit the config.
      ValueError: weights to be quantised that no file gives.
    """
    params, kept = weights.initial_params(setup)
    return of_params(setup, params, kept)


def of_params(setup: TrainingSetup, params: Leaves, kept=()) -> TrainState:
    """The state of step 0 with these parameters, which are on the devices."""
    frozen = dict(params)
    trained = {n: frozen.pop(n) for n in setup.trained_names}
    places = train_step.opt_shardings(setup.tx, trained, setup.mesh)
    opt_state = jax.jit(setup.tx.init, out_shardings=places)(trained)
    return TrainState(trained, opt_state, frozen, frozenset(kept) & frozen.keys())


def abstract(setup: TrainingSetup) -> TrainState:
    """What `initial` gives as shapes with shardings; reads nothing."""
    frozen = weights.stored_params(setup.abstract, setup)
    trained = {n: frozen.pop(n) for n in setup.trained_names}
    opt_state = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        jax.eval_shape(setup.tx.init, trained),
        train_step.opt_shardings(setup.tx, trained, setup.mesh),
    )
    return TrainState(trained, opt_state, frozen)


def restore(state: TrainState, checkpoints: workdirs.Checkpoints, workdir: str) -> TrainState:
    """The state of the newest sound checkpoint of a run, or `state`, which must be its initial one, if there is none.

    Raises:
      checkpoints.CheckpointError: a checkpoint of another config, or none of them can be read.
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
        input=run.get("input"),
    )


def save(state: TrainState, checkpoints: workdirs.Checkpoints) -> None:
    """Writes what training has changed; returns before all is on disk."""
    run = {"input": state.input, "skipped_steps": state.skipped_steps}
    checkpoints.save(state.step, state.trained, state.opt_state, run)
