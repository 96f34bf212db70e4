"""big_vision's training checkpoints: its layout, written and read by JAX as big_vision does it, and
what is damaged, unfinished or points elsewhere."""

import os
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.array_serialization import serialization

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, bv, lazy, npz, workdir
from paligemma_med.config import files as config_files
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.training import run_files
from tests.checkpoints.trees import assert_same
from tools import convert_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)


def params(seed=0):
    rng = np.random.default_rng(seed)
    layer = rng.normal(size=(2, 3)).astype(np.float32)
    return {
        "img": {
            "head": {"kernel": rng.integers(0, 0x7F80, (5, 7), np.uint16).view(BF16)},
            "zeros": np.zeros((4, 2), np.float32),
        },
        "llm": {"layers": {"w": rng.normal(size=(3, 4, 2)).astype(np.float32)}, "norm": layer},
    }


def state(seed=0):
    return {
        "params": params(seed),
        "opt": ((), ((np.int32(30), {"img/head/kernel": np.ones((5, 7), np.float32)}),)),
        "chrono": {"accum_examples_seen": np.int32(240)},
    }


def theirs(folder, tree, last=None, prefix="checkpoint.bv"):
    """Writes `tree` as big_vision's `save_checkpoint_ts` does, with JAX's own serialization."""
    flat = bv.flatten(tree)
    path = os.path.join(folder, f"{prefix}-{last}")
    os.makedirs(path)
    manager = serialization.GlobalAsyncCheckpointManager()
    names = [os.path.join(path, key.replace("/", "~")) for key in flat]
    manager.serialize_with_paths([jnp.asarray(x) for x in flat.values()], names)
    manager.wait_until_finished()
    with open(os.path.join(folder, f"{prefix}-LAST"), "w") as f:
        f.write(last)
    return path


@pytest.fixture
def their(tmp_path):
    """A workdir of big_vision's with a checkpoint of step 30."""
    theirs(tmp_path / "run", state(), "000000030-tmp")
    return tmp_path / "run"


def test_names_are_those_of_big_vision():
    named = {"params": {"a": {"b": 1}}, "opt": ([], (2, None, {"x/y": 3}), ()), "c": 4}
    assert bv.flatten(named) == {"params/a/b": 1, "opt/1/0": 2, "opt/1/2/x/y": 3, "c": 4}


ONE = "/checkpoint.bv-000000030-tmp"


@pytest.mark.parametrize("spec", ["", "/", "/checkpoint.bv", ONE, ONE + "/"])
def test_every_way_to_name_a_checkpoint(their, spec):
    spec = str(their) + spec
    assert checkpoints.kind_of(spec) == "big_vision"
    opened = checkpoints.open_params(spec)
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert_same(opened, params())
    spec = spec.rstrip("/")
    assert_same(checkpoints.open_params(spec + ":llm"), params()["llm"])
    assert_same(checkpoints.load_params(spec + ":params/llm/layers"), params()["llm"]["layers"])
    assert_same(checkpoints.load_params(spec + ":params"), params())


def test_the_newest_one_counts_and_an_older_one_can_be_named(their):
    theirs(their, state(1), "000000060")
    assert_same(checkpoints.open_params(their), params(1))
    assert_same(checkpoints.open_params(their / "checkpoint.bv-000000030-tmp"), params(0))


def test_any_prefix_will_do(tmp_path):
    theirs(tmp_path, state(), "000000030", prefix="kept")
    assert_same(checkpoints.open_params(tmp_path / "kept"), params())
    assert_same(checkpoints.open_params(tmp_path / "kept-000000030"), params())


def test_unrolled_layers_are_stacked(tmp_path):
    layers = {f"encoderblock_{i}": {"k": np.full((2,), i, np.float32)} for i in range(3)}
    theirs(tmp_path, {"params": {"img": {"Transformer": layers}}}, "000000001")
    found = checkpoints.load_params(tmp_path)["img"]["Transformer"]["encoderblock"]["k"]
    np.testing.assert_array_equal(found, [[0, 0], [1, 1], [2, 2]])


def test_the_rest_of_the_state_is_read_as_well(their):
    found = bv.open_state(their)
    assert set(found) == set(bv.flatten(state()))
    assert int(np.asarray(found["opt/1/0/0"])) == 30


# --- writing -----------------------------------------------------------------------------------


def test_what_is_written_is_what_jax_reads(tmp_path):
    prefix = str(tmp_path / "out" / "checkpoint.bv")
    bv.save_bv(prefix, 30, state())
    assert sorted(os.listdir(tmp_path / "out")) == ["checkpoint.bv-000000030", "checkpoint.bv-LAST"]
    assert (tmp_path / "out" / "checkpoint.bv-LAST").read_text() == "000000030"
    flat = bv.flatten(state())
    paths = [f"{prefix}-000000030/{key.replace('/', '~')}" for key in flat]
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    specs = [serialization.get_tensorstore_spec(p) for p in paths]
    found = serialization.run_deserialization([one] * len(flat), specs)
    assert_same(unflatten_tree(dict(zip(flat, found))), unflatten_tree(flat))
    assert_same(checkpoints.open_params(tmp_path / "out"), params())


def test_large_arrays_are_cut_into_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(bv, "_CHUNK", 100)
    tree = {"params": {"a": np.arange(143, dtype=np.float32).reshape(13, 11), "b": np.float32(2)}}
    bv.save_bv(tmp_path / "checkpoint.bv", 1, tree)
    files = os.listdir(tmp_path / "checkpoint.bv-000000001" / "params~a")
    assert len([f for f in files if f != ".zarray"]) == 7
    assert_same(checkpoints.open_params(tmp_path), tree["params"])
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    spec = serialization.get_tensorstore_spec(str(tmp_path / "checkpoint.bv-000000001/params~a"))
    [found] = serialization.run_deserialization([one], [spec])
    np.testing.assert_array_equal(found, tree["params"]["a"])


def test_dtype_casts_floating_parameters_alone(tmp_path):
    done = []
    bv.save_bv(tmp_path / "checkpoint.bv", 2, state(), dtype="bfloat16", progress=done.append)
    found = bv.open_state(tmp_path)
    assert {k.split("/")[0]: v.dtype for k, v in found.items() if v.dtype == BF16} == {"params": BF16}
    assert found["opt/1/0/1/img/head/kernel"].dtype == np.float32
    assert sum(done) == sum(np.asarray(x).nbytes for x in bv.flatten(state()).values())


def test_an_interrupted_write_leaves_the_older_one(tmp_path):
    bv.save_bv(tmp_path / "checkpoint.bv", 1, state())

    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bv.save_bv(tmp_path / "checkpoint.bv", 2, state(1), progress=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint.bv-000000001", "checkpoint.bv-LAST"]
    assert_same(checkpoints.open_params(tmp_path), params())


def test_what_is_there_is_not_overwritten_unasked(tmp_path):
    prefix = tmp_path / "checkpoint.bv"
    bv.save_bv(prefix, 5, state())
    with pytest.raises(FileExistsError, match="000000005 exists"):
        bv.save_bv(prefix, 5, state(1))
    with pytest.raises(FileExistsError, match="names a newer checkpoint, of step 000000005"):
        bv.save_bv(prefix, 4, state(1))
    assert_same(checkpoints.open_params(tmp_path), params())
    bv.save_bv(prefix, 5, state(1), overwrite=True)
    assert_same(checkpoints.open_params(tmp_path), params(1))
    with pytest.raises(CheckpointError, match="holds a '~'"):
        bv.save_bv(prefix, 6, {"params": {"a~b": np.ones(1)}})
    with pytest.raises(CheckpointError, match="params/a: expected an array of numbers"):
        bv.save_bv(prefix, 6, {"params": {"a": "text"}})


# --- what is wrong ------------------------------------------------------------------------------


def _chunk(their, name):
    folder = their / "checkpoint.bv-000000030-tmp" / name
    return next(folder / f for f in os.listdir(folder) if f != ".zarray")


@pytest.mark.parametrize(
    "harm, says",
    [
        (lambda run, f: f.write_bytes(f.read_bytes()[:-6]), "Truncated|DATA|Error reading"),
        (lambda run, f: f.write_bytes(b"not zstd at all"), "Error reading"),
        # big_vision itself takes these for zeros.
        (lambda run, f: f.unlink(), "missing"),
        (lambda run, f: (f.parent / ".zarray").write_text("{"), "Invalid JSON"),
        (lambda run, f: (f.parent / ".zarray").unlink(), "does not exist"),
        (lambda run, f: shutil.rmtree(f.parent) or f.parent.touch(), "can't be read"),
    ],
)
def test_damage_is_told_in_one_sentence(their, harm, says):
    harm(their, _chunk(their, "params~llm~norm"))
    with pytest.raises(CheckpointError, match=says) as e:
        checkpoints.load_params(their)
    assert "params/llm/norm" in str(e.value) and "\n" not in str(e.value)
    assert len(str(e.value)) < 600


def test_pointers_that_lead_nowhere(their):
    pointer = their / "checkpoint.bv-LAST"
    for text in ("../../etc/passwd", "", "000000030/../x", "30"):
        pointer.write_text(text)
        with pytest.raises(CheckpointError, match="expected the number of a step"):
            checkpoints.open_params(their)
    pointer.write_text("000000031")
    with pytest.raises(CheckpointError, match="there is no folder .*-000000031"):
        checkpoints.open_params(their)


def test_a_checkpoint_that_was_never_finished(their):
    path = theirs(their, state(1), "000000060")
    (their / "checkpoint.bv-LAST").write_text("000000030-tmp")
    with pytest.raises(CheckpointError, match="not written to its end.*000000030"):
        checkpoints.open_params(path)
    assert_same(checkpoints.open_params(their), params(0))


def test_folders_without_parameters_and_parts_that_are_not_there(their, tmp_path):
    with pytest.raises(CheckpointError, match="no part 'head': found img, llm"):
        checkpoints.open_params(f"{their}:head")
    with pytest.raises(CheckpointError, match="single array"):
        checkpoints.open_params(f"{their}:llm/norm")
    with pytest.raises(CheckpointError, match="after the colon"):
        checkpoints.open_params(f"{their}:")
    (tmp_path / "checkpoint.bv-000000001").mkdir()
    with pytest.raises(CheckpointError, match="holds no parameters"):
        checkpoints.open_params(tmp_path / "checkpoint.bv-000000001")
    with pytest.raises(FileNotFoundError, match="no weights"):
        checkpoints.open_params(tmp_path / "nothing" / "checkpoint.bv")


def test_a_folder_with_two_runs_is_not_guessed_at(their):
    (their / "checkpoints").mkdir()
    (their / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="this project and of big_vision's"):
        checkpoints.kind_of(their)
    assert checkpoints.kind_of(their / "checkpoint.bv") == "big_vision"


# --- beside the weights -------------------------------------------------------------------------


def test_a_run_that_starts_from_one_notes_its_step(their):
    pinned = bv.pin(str(their))
    assert pinned == f"{their}/checkpoint.bv-000000030-tmp"
    assert bv.pin(f"{their}/checkpoint.bv:llm") == f"{pinned}:llm"
    assert bv.pin("x.npz") == "x.npz" == workdir.pin("x.npz")
    assert {str(their), f"{their}/checkpoint.bv", pinned} == bv.pinned_from(pinned)
    assert f"{their}:llm" in bv.pinned_from(f"{pinned}:llm")
    assert bv.pinned_from("out/x@30") == {"out/x@30"}


def test_a_resumed_run_keeps_to_the_step_it_started_from(their, tmp_path):
    config = ml_collections.ConfigDict({"model_init": str(their)})
    (tmp_path / "ours" / "checkpoints" / "5").mkdir(parents=True)
    (tmp_path / "ours" / "config.json").write_text(config_files.to_json(config))
    theirs(their, state(1), "000000060")
    resumed = run_files.with_pinned_init(config, str(tmp_path / "ours"))
    assert config.model_init == str(their)  # the caller's stays as it is
    assert resumed.model_init == f"{their}/checkpoint.bv-000000030-tmp"


def test_the_model_comes_from_the_config_beside_it(their):
    assert bv.read_config(their) == {}
    config = '{"model_name": "%s", "model": {"img": {"a": 1}, "llm": {}, "lora": [%s]}}'
    (their / "config.json").write_text(config % ("paligemma_med", '["y", null], ["x", [["rank", 2]]]'))
    found = bv.read_config(f"{their}/checkpoint.bv:llm")
    assert found == dict(model=dict(img={"a": 1}, llm={}), lora=[("y", None), ("x", {"rank": 2})])
    (their / "config.json").write_text(config % ("proj.paligemma.paligemma", ""))
    assert bv.read_config(their) == {}
    (their / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="config.json: found a list; expected the config of a run"):
        bv.read_config(their)


def test_the_converter_reads_it_and_says_what_it_cannot_write(their, tmp_path):
    convert_checkpoint.convert(str(their), str(tmp_path / "x.npz"), "npz")
    assert_same(npz.load_npz(tmp_path / "x.npz"), params())
    with pytest.raises(CheckpointError, match="is no workdir of this project"):
        convert_checkpoint.convert(str(tmp_path / "x.npz"), str(tmp_path / "y"), "big_vision")
    with pytest.raises(CheckpointError, match="no --merge"):
        convert_checkpoint.convert(str(their), str(tmp_path / "y"), "big_vision", merge=True)
