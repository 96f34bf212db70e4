"""Weights between big_vision's own functions and ours, and a run of ours as its train state."""

import jax
import ml_dtypes
import numpy as np
import pytest

from paligemma_med import checkpoints, experiment
from paligemma_med.checkpoints import CheckpointError, bv, npz, workdir
from paligemma_med.models import vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.training import optim, run_files
from paligemma_med.upstream import model, state
from tests.checkpoints.trees import assert_same
from tests.upstream import parity
from tools import convert_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


# --- without big_vision -------------------------------------------------------------------------


def run_of_ours(folder, stage, **changes):
    """A workdir at step 7 whose optimizer's state is made of random numbers."""
    init = folder / "w.npz"
    c = parity.config(stage)
    for key, value in changes.items():
        c[key] = value
    npz.save_npz(init, parity.random_weights(c))
    c.model_init = str(init)
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    names = optim.trained_names(c, list(abstract))
    tx, _ = optim.make(c, names, total_steps=20, num_examples=100, batch_size=4)
    rng = np.random.default_rng(0)

    def fill(x):
        full = x.dtype == np.int32
        return np.full(x.shape, 7, x.dtype) if full else rng.normal(size=x.shape).astype(x.dtype)

    trained = {n: fill(abstract[n]) for n in names}
    opt_state = jax.tree.map(fill, jax.eval_shape(tx.init, trained))
    run = folder / "run"
    run.mkdir()
    run_files.start(run, c, {}, 0)
    with workdir.Checkpoints(run) as saved:
        saved.save(7, *jax.tree.map(jax.numpy.asarray, (trained, opt_state)), {})
    return run, trained, opt_state


def test_its_trainer_loads_weights_of_ours(tmp_path):
    """As `model.load` is called there: what the file has, each leaf in its type; factors stay shapes."""
    c = parity.config(2)
    c.lora = None
    expected = parity.random_weights(c)
    c.lora = [("llm/layers/.*", dict(rank=2))]
    npz.save_npz(tmp_path / "w.npz", expected)
    shapes = vlm.abstract_params(experiment.make_model(c), image_size=c.res)
    config = dict(c.model.to_dict(), dtype="float32", lora=(("llm/layers/.*", (("rank", 2),)),))
    rules = (("img/.*", True), (".*", False))
    out = flatten_tree(model.load(shapes, str(tmp_path / "w.npz"), config, frozen_dtype="bfloat16", trained=rules))
    assert {*out} == {*flatten_tree(shapes)}
    for name, x in flatten_tree(expected).items():
        dtype = np.float32 if name.startswith("img/") else BF16
        assert out[name].tobytes() == x.astype(dtype).tobytes()
    assert all(isinstance(out[n], jax.ShapeDtypeStruct) == lora.is_factor(n) for n in out)


def test_the_optimizer_has_the_names_of_big_vision(tmp_path):
    run, trained, opt_state = run_of_ours(tmp_path, 3)
    step, found = state.train_state(str(run))
    flat = bv.flatten(found)
    # The chain of big_vision/optax.py: clip, Adam, lr, two lr_mults, two wd_mults, then a counter
    # for each schedule that trains. Everything but the clip's neighbour has no state.
    adam = opt_state[1]
    assert step == 7 and int(flat["opt/1/0/0"]) == 7
    assert {k for k in flat if k.startswith("opt/") and k.count("/") == 3} == {"opt/1/0/0", "opt/7/0/0", "opt/8/0/0"}
    for name in trained:
        assert flat[f"opt/1/0/1/{name}"].tobytes() == np.asarray(adam.mu[name]).tobytes()
        assert flat[f"opt/1/0/2/{name}"].tobytes() == np.asarray(adam.nu[name]).tobytes()
        assert np.asarray(flat[f"params/{name}"]).tobytes() == trained[name].tobytes()
    frozen = "img/pos_embedding"
    assert f"params/{frozen}" in flat and f"opt/1/0/1/{frozen}" not in flat
    assert {k: v.dtype for k, v in found["chrono"].items()} == {
        "accum_examples_seen": np.int32,
        "accum_program_time": np.float32,
        "accum_train_time": np.float32,
        "accum_pause_time": np.float32,
    }
    assert found["chrono"]["accum_examples_seen"] == 7 * 8


def test_a_run_without_moments_and_with_frozen_weights_in_bfloat16(tmp_path):
    run, trained, _ = run_of_ours(
        tmp_path, 1, optax_name="identity", optax={}, grad_clip_norm=None, frozen_dtype="bfloat16"
    )
    convert_checkpoint.convert(str(run), str(tmp_path / "bv"), "big_vision")
    found = bv.open_state(tmp_path / "bv")
    assert {k for k in found if k.startswith("opt")} == {"opt/3/0/0"}
    types = {k.removeprefix("params/"): v.dtype for k, v in found.items() if k.startswith("params")}
    assert {n for n, t in types.items() if t == np.float32} == set(trained)
    assert set(types.values()) == {np.dtype("float32"), BF16}
    ours = checkpoints.load_params(run)
    assert_same(checkpoints.load_params(f"{tmp_path / 'bv'}:img/head"), ours["img"]["head"])


def test_an_optimizer_of_another_config_is_told(tmp_path):
    run, _, opt_state = run_of_ours(tmp_path, 1)
    with pytest.raises(CheckpointError, match="doesn't fit the config"):
        workdir.load_opt_state(str(run), opt_state[:1] + ({"other": np.ones(3)},))
    with pytest.raises(CheckpointError, match="no checkpoint of step 8"):
        workdir.load_opt_state(f"{run}@8", opt_state)


# --- with big_vision ----------------------------------------------------------------------------

# Reads and writes with big_vision's own functions: argv is a folder.
THEIRS = """
import sys, os
from paligemma_med import upstream
upstream.install()
import jax, numpy as np, jax.numpy as jnp
import big_vision.utils as u
from jax.experimental.array_serialization import serialization
folder = sys.argv[1]

def save(tree, name):  # as configs/proj/paligemma/finetune_paligemma.ipynb saves weights
    np.savez(os.path.join(folder, name), **dict(u.tree_flatten_with_names(tree)[0]))

read = u.load_params(folder + "/ours.npz")
assert read["img"]["w"].dtype == jnp.bfloat16, read["img"]["w"].dtype
save(read, "back.npz")
save(u.load_params(folder + "/ours.npz:llm"), "llm.npz")
save(u.npload(folder + "/ours.npz"), "flat.npz")
save(u.load_params(folder + "/checkpoint.bv"), "ts.npz")
save(u.load_params(folder + "/checkpoint.bv:llm/layers"), "layers.npz")
save(u.load_checkpoint_ts(folder + "/checkpoint.bv"), "all.npz")

manager = serialization.GlobalAsyncCheckpointManager()
for step, keep in ((3, False), (6, True), (9, False)):
    tree = {"params": jax.tree.map(lambda x: x + jnp.asarray(step, x.dtype), read),
            "opt": (jnp.asarray(step),)}
    u.save_checkpoint_ts(manager, tree, folder + "/theirs", step, keep)
    manager.wait_until_finished()
"""


def tree():
    rng = np.random.default_rng(0)
    return {
        "img": {"w": np.arange(6).reshape(2, 3).astype(BF16), "b": np.zeros(4, np.float32)},
        "llm": {"layers": {"k": rng.normal(size=(3, 2, 4)).astype(np.float32)}, "s": np.ones(2)},
    }


@pytest.mark.big_vision
@pytest.mark.slow
def test_what_big_vision_reads_and_writes(tmp_path, run_python):
    ours = tree()
    ours["llm"]["s"] = ours["llm"]["s"].astype(np.float32)
    npz.save_npz(tmp_path / "ours.npz", ours)
    whole = {"params": ours, "opt": ((), (np.int32(5),)), "chrono": {"t": np.float32(1)}}
    bv.save_bv(tmp_path / "checkpoint.bv", 5, whole)
    run_python("-c", THEIRS, tmp_path)
    assert_same(npz.load_npz(tmp_path / "back.npz"), ours)
    assert_same(npz.load_npz(tmp_path / "llm.npz"), ours["llm"])
    assert_same(npz.load_npz(tmp_path / "flat.npz"), ours)
    assert_same(npz.load_npz(tmp_path / "ts.npz"), ours)
    assert_same(npz.load_npz(tmp_path / "layers.npz"), ours["llm"]["layers"])
    with np.load(tmp_path / "all.npz") as f:
        assert set(f) == set(bv.flatten(whole)) and f["opt/1/0"] == 5
    # Of its three checkpoints it keeps the second for good, and the last until there is another.
    names = {p.name for p in tmp_path.iterdir() if p.name.startswith("theirs")}
    assert names == {"theirs-000000006", "theirs-000000009-tmp", "theirs-LAST"}

    def after(step):
        return jax.tree.map(lambda x: (x + np.asarray(step, x.dtype)).astype(x.dtype), ours)

    assert_same(checkpoints.load_params(tmp_path / "theirs"), after(9))
    assert_same(checkpoints.load_params(tmp_path / "theirs-000000006"), after(6))
