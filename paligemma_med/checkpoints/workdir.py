"""Training checkpoints in a workdir, with Orbax: what training changes, and nothing else.

    <workdir>/config.json           the run's config; says which weights the frozen leaves are
    <workdir>/base.npz              frozen leaves that those weights don't have (random ones)
    <workdir>/checkpoints/<step>/   trained leaves and optimizer state

Frozen leaves aren't written again with every checkpoint: at the 3B size they are 5 GB, and stage 1
trains 9 MB.
"""

import json
import os

import jax
import orbax.checkpoint as ocp

from paligemma_med.checkpoints import lazy, npz


class Checkpoints:
    """The checkpoints of one run; made once, closed at the end (or used in a `with`)."""

    def __init__(self, workdir, *, keep=1):
        """workdir: created if need be. keep: how many of the newest checkpoints stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = _manager(workdir, options)

    def latest_step(self):
        """int, or None if there is no complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step, trained, opt_state):
        """Writes trained ({name: array}) and opt_state; returns before all is on disk."""
        if self._manager.latest_step() == step:
            return
        items = dict(trained=ocp.args.StandardSave(trained))
        if jax.tree.leaves(opt_state):
            items["opt_state"] = ocp.args.StandardSave(opt_state)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def restore(self, step, trained, opt_state):
        """Reads what `save` wrote at `step`.

        Args:
          trained, opt_state: trees of arrays or of jax.ShapeDtypeStruct with shardings, which say
            what is expected and where it goes.

        Returns:
          (trained, opt_state).

        Raises:
          npz.CheckpointError: another set of parameters, other shapes or another optimizer than
            expected.
        """
        self._check(step, trained)
        items = dict(trained=ocp.args.StandardRestore(trained))
        if jax.tree.leaves(opt_state):
            items["opt_state"] = ocp.args.StandardRestore(opt_state)
        try:
            out = self._manager.restore(step, args=ocp.args.Composite(**items))
        except ValueError as e:
            raise npz.CheckpointError(
                f"{self._manager.directory}/{step}: the optimizer's state doesn't fit the config's "
                "optax_name, optax, schedule, wd and grad_clip_norm. Use another --workdir, or the "
                "config it was made with."
            ) from e
        return out["trained"], out.get("opt_state", opt_state)

    def _check(self, step, trained):
        found = self._manager.item_metadata(step)["trained"]
        found = {k: tuple(v.shape) for k, v in found.items()}
        expected = {k: tuple(v.shape) for k, v in trained.items()}
        if found != expected:
            wrong = sorted(k for k in {*found, *expected} if found.get(k) != expected.get(k))
            raise npz.CheckpointError(
                f"{self._manager.directory}/{step}: {len(wrong)} trained parameters differ from "
                f"the config's, the first is {wrong[0]}: found {found.get(wrong[0])}, expected "
                f"{expected.get(wrong[0])}. Use another --workdir, or the config it was made with."
            )

    def wait(self):
        """Blocks until everything is on disk."""
        self._manager.wait_until_finished()

    def close(self):
        self._manager.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _manager(workdir, options=None):
    # Without handlers it doesn't know what is in checkpoints that another process wrote.
    handlers = {k: ocp.StandardCheckpointHandler() for k in ("trained", "opt_state")}
    path = os.path.join(os.path.abspath(workdir), "checkpoints")
    return ocp.CheckpointManager(path, options=options, item_handlers=handlers)


def is_workdir(folder):
    """Whether `folder` looks like a run's: a config and checkpoints in it."""
    return os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(
        os.path.join(folder, "checkpoints")
    )


def split_spec(spec):
    """(folder, step or None) of "out/stage1@120" or "out/stage1"; None if it is no workdir."""
    folder = os.path.expanduser(spec)
    if is_workdir(folder):
        return folder, None
    folder, at, step = folder.rpartition("@")
    return (folder, int(step)) if at and step.isdigit() and is_workdir(folder) else None


def pin(spec):
    """ "out/stage1" → "out/stage1@120", its newest step; a spec of another kind as it is.

    What starts from a run must go on meaning those weights when the run itself goes on.
    """
    found = split_spec(spec)
    if found is None or found[1] is not None:
        return spec
    step = newest_step(found[0])
    return spec if step is None else f"{spec}@{step}"


def newest_step(folder):
    """Step of the newest complete checkpoint of a workdir, or None."""
    checkpoints = os.path.join(folder, "checkpoints")
    names = os.listdir(checkpoints) if os.path.isdir(checkpoints) else []
    return max((int(n) for n in names if n.isdigit()), default=None)


def read_config(workdir):
    """<workdir>/config.json as a dict."""
    path = os.path.join(workdir, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: {workdir} is not a workdir.") from None
    except ValueError as e:
        raise npz.CheckpointError(f"{path} is not JSON: {e}.") from None


def open_params(spec):
    """The weights of a run: its base with the trained leaves in place.

    Args:
      spec: a workdir, for its newest checkpoint, or "workdir@step".

    Returns:
      Nested dict, {"img": …, "llm": …}; trained leaves are numpy arrays in float32, the base's as
      stored, and still in their files (`lazy.Lazy`).
    """
    from paligemma_med import checkpoints  # the base may be of any form

    workdir, step = split_spec(spec)
    config = read_config(workdir)
    with _manager(workdir) as manager:
        steps = manager.all_steps()
        if not steps:
            raise npz.CheckpointError(f"{workdir}/checkpoints holds no complete checkpoint.")
        step = max(steps) if step is None else step
        if step not in steps:
            raise npz.CheckpointError(
                f"{workdir} has no checkpoint of step {step} any more, only of {sorted(steps)}: "
                "has the run gone on since?"
            )
        target = {
            k: jax.ShapeDtypeStruct(v.shape, v.dtype)
            for k, v in manager.item_metadata(step)["trained"].items()
        }
        args = ocp.args.Composite(trained=ocp.args.StandardRestore(target))
        trained = jax.device_get(manager.restore(step, args=args)["trained"])
    own_base = os.path.join(workdir, "base.npz")
    flat = {}
    if config.get("model_init"):
        try:
            flat = npz.flatten_tree(checkpoints.open_init(config["model_init"]))
        except (FileNotFoundError, npz.CheckpointError) as e:
            raise type(e)(
                f"the weights that {workdir} started from (model_init in its config.json) can't be "
                f"read: {e}"
            ) from e
    if os.path.exists(own_base):
        flat |= npz.flatten_tree(npz.open_npz(own_base))
    return npz.unflatten_tree({**flat, **trained})


def load_params(spec):
    """`open_params`, all read into numpy arrays."""
    return lazy.read_all(open_params(spec))
