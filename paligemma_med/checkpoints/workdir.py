"""A run's checkpoints in its workdir: what they hold, and how they are written, restored and read as weights.

    <workdir>/config.json           the run's config; names the weights that frozen leaves come from
    <workdir>/base.npz              frozen leaves that those weights don't have (random ones)
    <workdir>/base.json             fingerprints of the other frozen leaves
    <workdir>/checkpoints/<step>/   trained leaves, their average, optimizer state, place in the data
    <workdir>/damaged/<step>/       checkpoints that couldn't be read again, set aside

Frozen leaves aren't written with every checkpoint: at the 3B size they are 5 GB, and stage 1 trains 9 MB. Orbax writes
the checkpoints; `keep` decides which are kept; config.json and the two files of the base are written by
`training.run_files`. All processes of a run must call the methods of `Checkpoints` together, and share one folder.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from paligemma_med.checkpoints import fingerprint, npz
from paligemma_med.checkpoints import keep as keep_lib
from paligemma_med.checkpoints.errors import CheckpointError, first_line
from paligemma_med.checkpoints.plain_path import plain_path
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.pp import json_text

Path = os.PathLike | str

# Where the optimizer's state has an average of the trained leaves: the last of its links, under this key
# (`training.ema.EmaState`).
EMA = "ema_params"
# How a checkpoint's folder is named. Not `str.isdigit`, to which "²" is one.
_STEP = re.compile("[0-9]{1,18}")


class Damaged(CheckpointError):
    """A checkpoint that can't be read, or whose contents differ from what was written."""


class Checkpoints:
    """The checkpoints of one run; created once and closed at the end (or used in a `with`)."""

    def __init__(self, workdir: Path, *, keep: int = 1, best: keep_lib.Best | None = None):
        """workdir: created if missing. keep, best: which checkpoints are kept, as for `keep.policy`."""
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep_lib.policy(keep, best),
            create=True,
            # Left by an interrupted save. Only complete checkpoints are named by their step.
            cleanup_tmp_directories=True,
        )
        self._workdir = os.path.abspath(workdir)
        self._folder = os.path.join(self._workdir, "checkpoints")
        os.makedirs(self._folder, exist_ok=True)
        self._manager = _manager(workdir, options)
        self._unread = None  # (step, shapes) of a save that wasn't read back yet

    def latest_step(self) -> int | None:
        """The newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, trained: Mapping[str, jax.Array], opt_state: Any, run: Any = None) -> None:
        """Writes a checkpoint, unless that step has one; returns before everything is on disk.

        The save before is waited for, and read back: what its metadata say is there, and its notes.

        Args:
          trained: {path: array}.
          opt_state: tree of arrays.
          run: what else is needed to resume the run, JSON-able.

        Raises:
          CheckpointError: this or the previous save failed.
        """
        if self._manager.latest_step() == step:
            return
        items = dict(trained=ocp.args.StandardSave(trained))
        if jax.tree.leaves(opt_state):
            items["opt_state"] = ocp.args.StandardSave(opt_state)
        prints = fingerprint.of_leaves((trained, opt_state))
        items["run"] = ocp.args.JsonSave({"run": run, "fingerprints": prints})
        self.wait()
        self._or_tell(self._manager.save, step, args=ocp.args.Composite(**items))
        self._unread = step, _shapes(trained), _shapes(opt_state)

    def restore(self, step: int, trained: Any, opt_state: Any) -> tuple[Any, Any, Any]:
        """Reads what `save` wrote at `step`.

        Args:
          trained, opt_state: trees of arrays or of jax.ShapeDtypeStruct with shardings: what is expected
            and where it goes.

        Returns:
          (trained, opt_state, run).

        Raises:
          CheckpointError: parameters, shapes or optimizer differ from what is expected.
          Damaged: it can't be read, or differs from what was written.
        """
        where = f"{self._folder}/{step}"
        found = self._read_or_damaged(where, self._manager.item_metadata, step)
        self._check(where, found, trained, opt_state)
        items = dict(trained=ocp.args.StandardRestore(trained))
        if jax.tree.leaves(opt_state):
            items["opt_state"] = ocp.args.StandardRestore(opt_state)
        if os.path.exists(os.path.join(where, "run")):  # older checkpoints have no fingerprints
            items["run"] = ocp.args.JsonRestore()
        args = ocp.args.Composite(**items)
        out = self._read_or_damaged(where, self._manager.restore, step, args=args)
        state = out["trained"], out.get("opt_state", opt_state)
        notes = (out.get("run") or {}) if "run" in items else {}
        if (prints := notes.get("fingerprints")) and fingerprint.of_leaves(state) != prints:
            raise Damaged(f"{where}: its numbers are not those that were written.")
        return *state, notes.get("run")

    def restore_newest(self, trained: Any, opt_state: Any) -> tuple[int, Any, Any, Any] | None:
        """Restores the newest sound checkpoint. Damaged ones are set aside, with a warning that says where.

        Returns:
          (step, trained, opt_state, run), or None if there is no checkpoint at all.

        Raises:
          CheckpointError: as in `restore`, or all checkpoints are damaged.
        """
        damaged = []
        while (step := self.latest_step()) is not None:
            error, out = "", None
            try:
                out = self.restore(step, trained, opt_state)
            except Damaged as e:
                error = str(e)
            if not _anywhere(bool(error)):
                return step, *out
            damaged.append(self._set_aside(step))
            logging.warning("%s It now lies in %s; trying the one before.", error, damaged[-1])
        if damaged:
            raise CheckpointError(
                f"{self._workdir}: no checkpoint can be read; the damaged ones lie in {damaged}. "
                "Use another --workdir to start from the beginning."
            )
        return None

    def _set_aside(self, step):
        folder = os.path.join(self._workdir, "damaged")
        os.makedirs(folder, exist_ok=True)
        name, before = os.path.join(folder, str(step)), 0
        while os.path.exists(name):  # from that step in an earlier start
            before += 1
            name = os.path.join(folder, f"{step}.{before}")
        _wait_for_all("before a damaged checkpoint is moved")
        if jax.process_index() == 0:
            os.rename(os.path.join(self._folder, str(step)), name)
        _wait_for_all("after a damaged checkpoint was moved")
        self._manager.reload()
        return name

    def _check(self, where, metadata, trained, opt_state):
        """Raises CheckpointError if a checkpoint's metadata don't fit this model and optimizer."""
        try:
            found = _shapes(metadata["trained"])
            found_opt = _shapes(metadata["opt_state"]) if jax.tree.leaves(opt_state) else {}
        except Exception as e:  # missing, or not metadata
            raise Damaged(f"{where}: its metadata can't be read: {_first_line(e)}") from e
        expected = _shapes(trained)
        if found != expected:
            wrong = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
            raise CheckpointError(
                f"{where}: {len(wrong)} trained parameters differ from the config's, the first is "
                f"{wrong[0]}: found {found.get(wrong[0])}, expected {expected.get(wrong[0])}. Use "
                "another --workdir, or the config it was made with."
            )
        if found_opt != _shapes(opt_state):
            raise CheckpointError(
                f"{where}: the optimizer's state doesn't fit the config's optax_name, optax, "
                "schedule, wd, grad_clip_norm and ema_decay. Use another --workdir, or the config it was made "
                "with."
            )

    def _read_or_damaged(self, where, read, *args, **kw):
        try:
            return read(*args, **kw)
        except Exception as e:  # Orbax and TensorStore have no errors of their own
            raise Damaged(f"{where}: can't be read: {_first_line(e)}") from e

    def _or_tell(self, write, *args, lost=None, **kw):
        try:
            write(*args, **kw)
        except Exception as e:
            steps = [step for step in self._complete_steps() if step != lost]
            raise CheckpointError(
                f"{self._folder}: a checkpoint could not be written: {_first_line(e)} "
                + (f"Those of steps {steps} are intact" if steps else "There is no earlier one")
                + "; fix the cause (is the disk full?), then run the same command to resume."
            ) from e

    def _complete_steps(self):
        return sorted(_steps(self._workdir))

    def wait(self) -> None:
        """Blocks until everything is on disk and was read back; CheckpointError if it couldn't be written."""
        saved, self._unread = self._unread, None
        self._or_tell(self._manager.wait_until_finished)
        if saved:
            self._or_tell(self._read_back, *saved, lost=saved[0])

    def _read_back(self, step, trained, opt_state):
        found = self._manager.item_metadata(step)
        if _shapes(found["trained"]) != trained or (opt_state and _shapes(found["opt_state"]) != opt_state):
            raise CheckpointError(f"what lies in {self._folder}/{step} is not what was written")
        self._manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore()))

    def close(self) -> None:
        """Like `wait`, and frees all resources."""
        try:
            self.wait()
        finally:
            self._or_tell(self._manager.close)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _shapes(tree):
    """{path: shape} of a tree of arrays or of Orbax's metadata of one."""
    paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {_path(path): tuple(leaf.shape) for path, leaf in paths}


def _path(path):
    # Orbax writes tuples and named tuples as dicts.
    keys = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in path)
    return "/".join(map(str, keys))


def _first_line(error):
    return f"{type(error).__name__}: {first_line(error)}."


def _anywhere(flag):
    """Whether `flag` is set in any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(jax.numpy.asarray(flag)).any())


def _wait_for_all(name):
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _averages(manager, step):
    """{name: numpy array} of the average of the trained leaves in a checkpoint, or None if it has none."""
    folder = plain_path(f"{manager.directory}/{step}/opt_state")
    if not os.path.isdir(folder):
        return None
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            links = checkpointer.metadata(folder).item_metadata.tree
            if not isinstance(links, list) or not isinstance(links[-1], Mapping) or EMA not in links[-1]:
                return None
            # Moments and counters stay where they are.
            wanted = [jax.tree.map(lambda _: ocp.PLACEHOLDER, link) for link in links]
            wanted[-1][EMA] = dict.fromkeys(links[-1][EMA], 0)
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), links)
            args = ocp.args.PyTreeRestore(item=wanted, restore_args=as_numpy)
            found = checkpointer.restore(folder, args=args)[-1][EMA]
    except Exception as e:  # Orbax and TensorStore have no errors of their own
        raise Damaged(f"{folder}: can't be read: {_first_line(e)}") from e
    _check_prints(manager, step, found, last=True)
    return found


def _check_prints(manager, step, leaves, last=False):
    """Raises Damaged if `leaves` differ from what was written: the trained ones, or with `last` those written last."""
    where = f"{manager.directory}/{step}"
    if os.path.exists(os.path.join(where, "run")):
        args = ocp.args.Composite(run=ocp.args.JsonRestore())
        prints = manager.restore(step, args=args)["run"]["fingerprints"]
        prints = prints[-len(leaves) :] if last else prints[: len(leaves)]
        if fingerprint.of_leaves(leaves) != prints:
            raise Damaged(f"{where}: its numbers are not those that were written.")


def _manager(workdir, options=None):
    # Without handlers it doesn't know the contents of checkpoints that another process wrote.
    handlers = {k: ocp.StandardCheckpointHandler() for k in ("trained", "opt_state")}
    handlers["run"] = ocp.JsonCheckpointHandler()
    path = plain_path(os.path.join(workdir, "checkpoints"))
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


def is_workdir(folder: Path) -> bool:
    """Whether `folder` looks like a run's: a config and checkpoints in it."""
    return os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(os.path.join(folder, "checkpoints"))


def split_spec(spec: str) -> tuple[str, int | None] | None:
    """(folder, step or None) of "out/stage1@120" or "out/stage1"; None if it isn't a workdir.

    "out/stage1@best" is the step that the run's config.keep_best kept.
    """
    folder = os.path.expanduser(spec)
    if is_workdir(folder):
        return folder, None
    folder, at, step = folder.rpartition("@")
    if not at or not is_workdir(folder):
        return None
    if step == "best":
        return folder, _best_step(folder)
    return (folder, int(step)) if _STEP.fullmatch(step) else None


def _best_step(folder):
    config = read_config(folder)
    best = keep_lib.best_of(folder, config)
    if best is None:
        raise CheckpointError(f"{folder}@best: the run keeps no best checkpoint; set config.keep_best in training.")
    step = best(_steps(folder))
    if step is None:
        raise CheckpointError(
            f"{folder}@best: none of its checkpoints has a finite {config['keep_best']['metric']} in metrics.jsonl; "
            f"expected one, or name a step: {folder}@…"
        )
    return step


def pin(spec: str) -> str:
    """ "out/stage1" → "out/stage1@120", its newest step (or for "out/stage1@best" the best one); other specs are
    unchanged.

    A run that started from these weights must find the same ones after that other run has continued.
    """
    run = split_spec(spec)
    if run is None:
        return spec
    folder, step = run
    step = newest_step(folder) if step is None else step
    return spec if step is None else f"{folder}@{step}"


def newest_step(folder: Path) -> int | None:
    """Step of the newest complete checkpoint of a workdir, or None."""
    return max(_steps(folder), default=None)


def _steps(folder):
    """The steps of the checkpoints in a workdir."""
    checkpoints = os.path.join(folder, "checkpoints")
    names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    return [int(name) for name in names if _STEP.fullmatch(name)]


def read_config(workdir: Path) -> dict[str, Any]:
    """<workdir>/config.json as a dict."""
    path = os.path.join(workdir, "config.json")
    try:
        return json_text.read(path, "the config of a run", root=dict, constants=True, error=CheckpointError)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {workdir} is not a workdir.") from None


def read_base(workdir: Path) -> dict[str, Any] | None:
    """<workdir>/base.json, or None if there is none: model_init, frozen_dtype and fingerprints ({leaf: text}) of the
    frozen weights that the run began with.

    Raises:
      CheckpointError: it holds something else.
    """
    path = os.path.join(workdir, "base.json")
    if not os.path.exists(path):
        return None
    expected = "what a run writes about its frozen weights; if the file is damaged, start anew in another --workdir"
    base = json_text.read(path, expected, root=dict, error=CheckpointError)
    for key, kind in (("model_init", object), ("frozen_dtype", str), ("fingerprints", dict)):
        if key not in base or not isinstance(base[key], kind):
            raise CheckpointError(f"{path}: {key} is {base.get(key)!r:.60}; expected {expected}")
    return base


def open_leaves(spec: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The leaves of a run's weights that are in its workdir, and the run's config, which says where the others are.

    Args:
      spec: a workdir, for its newest checkpoint, or "workdir@step".

    Returns:
      (config.json, {path: leaf}). All other leaves come from the config's model_init; the workdir's override
      those. Trained leaves are numpy arrays in float32, or their average if the run keeps one (config.ema_decay);
      frozen ones have their stored type and are still in their file (`lazy.Lazy`).

    Raises:
      FileNotFoundError: no config.json.
      CheckpointError: no complete checkpoint, none at that step, or a damaged one.
    """
    workdir, step = split_spec(spec)
    config = read_config(workdir)
    with _manager(workdir) as manager:
        step = _complete_step(manager, workdir, step)
        # A numpy array as target restores whole numpy arrays in every process. These use no memory.
        target = {
            k: np.broadcast_to(np.zeros((), v.dtype), v.shape)
            for k, v in manager.item_metadata(step)["trained"].items()
        }
        args = ocp.args.Composite(trained=ocp.args.StandardRestore(target))
        trained = _averages(manager, step)
        if trained is None:
            trained = manager.restore(step, args=args)["trained"]
            _check_prints(manager, step, trained)
    frozen = os.path.join(workdir, "base.npz")
    frozen = flatten_tree(npz.open_npz(frozen)) if os.path.exists(frozen) else {}
    return config, {**frozen, **trained}


def _complete_step(manager, workdir, step):
    """`step`, or the newest one if it is None; CheckpointError if it doesn't exist."""
    steps = manager.all_steps()
    if not steps:
        raise CheckpointError(f"{workdir}/checkpoints holds no complete checkpoint.")
    step = max(steps) if step is None else step
    if step not in steps:
        raise CheckpointError(
            f"{workdir} has no checkpoint of step {step} any more, only of {sorted(steps)}: has the run gone on since?"
        )
    return step


def load_opt_state(spec: str, expected: Any) -> Any:
    """The optimizer's state of a run.

    Args:
      spec: as in `open_leaves`.
      expected: the result of `tx.init`, of arrays or jax.ShapeDtypeStruct.

    Returns:
      The tree of `expected`, with numpy arrays.

    Raises:
      CheckpointError: the run has another optimizer, or its state is damaged.
    """
    workdir, step = split_spec(spec)
    if not jax.tree.leaves(expected):
        return expected
    with _manager(workdir) as manager:
        step = _complete_step(manager, workdir, step)
        where = f"{manager.directory}/{step}"
        try:
            if _shapes(manager.item_metadata(step)["opt_state"]) != _shapes(expected):
                raise CheckpointError(f"{where}: the optimizer's state doesn't fit the config of {workdir}.")
            target = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), expected)
            args = ocp.args.Composite(opt_state=ocp.args.StandardRestore(target))
            return manager.restore(step, args=args)["opt_state"]
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and TensorStore have no errors of their own
            raise Damaged(f"{where}: can't be read: {_first_line(e)}") from e
