"""Checkpoints of a run: what is kept, and the weights that a workdir stands for."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import checkpoints, experiment
from paligemma_med.checkpoints import npz, workdir
from paligemma_med.config import files as config_files
from paligemma_med.models.leaves import unflatten_tree
from tests import tiny


def base():
    rng = np.random.default_rng(0)
    names = ("img/head/kernel", "img/head/bias", "llm/final_norm/scale")
    return {n: rng.normal(size=(4, 3)).astype(np.float32) for n in names}


def write_run(folder, *, trained, steps=(3,), keep=1, model_init=None, opt_state=None):
    """A workdir as `train` leaves it, without training."""
    os.makedirs(folder, exist_ok=True)
    config = tiny.config(model_init=model_init)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
        f.write(config_files.to_json(config))
    with workdir.Checkpoints(folder, keep=keep) as ckpt:
        for step in steps:
            ckpt.save(step, {n: jnp.asarray(x) + step for n, x in trained.items()}, opt_state or {})
            ckpt.wait()


def head(scale=10.0):
    return {"img/head/kernel": np.full((4, 3), scale, np.float32)}


def assert_run_holds(folder, flat_base, trained):
    expected = unflatten_tree({**flat_base, **trained})
    found = checkpoints.load_params(str(folder))
    tiny.assert_trees_equal(found, expected)
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(found))


def test_newest_trained_leaves_on_an_npz_base(tmp_path):
    npz.save_npz(tmp_path / "w.npz", unflatten_tree(base()))
    write_run(tmp_path / "run", trained=head(), steps=(3, 5), model_init=str(tmp_path / "w.npz"))
    assert_run_holds(tmp_path / "run", base(), head(15.0))
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["5"]


def test_random_base_is_the_runs_own_file(tmp_path):
    frozen = {n: x.astype(jnp.bfloat16) for n, x in base().items() if n != "img/head/kernel"}
    npz.save_npz(tmp_path / "run" / "base.npz", unflatten_tree(frozen))
    write_run(tmp_path / "run", trained=head())
    assert_run_holds(tmp_path / "run", frozen, head(13.0))


def test_all_trained_needs_no_base(tmp_path):
    write_run(tmp_path / "run", trained=base())
    assert_run_holds(tmp_path / "run", {}, {n: x + 3 for n, x in base().items()})


def test_base_in_two_files(tmp_path):
    flat = base()
    for part in ("img", "llm"):
        mine = {n: x for n, x in flat.items() if n.startswith(part)}
        npz.save_npz(tmp_path / f"{part}.npz", unflatten_tree(mine))
    init = {part: f"{tmp_path}/{part}.npz:{part}" for part in ("img", "llm")}
    write_run(tmp_path / "run", trained=head(), model_init=init)
    assert_run_holds(tmp_path / "run", flat, head(13.0))


def test_chain_of_runs(tmp_path, monkeypatch):
    """Paths are kept absolute: the chain holds from any folder."""
    monkeypatch.chdir(tmp_path)
    npz.save_npz("w.npz", unflatten_tree(base()))
    write_run("one", trained=head(), model_init="w.npz")
    norm = {"llm/final_norm/scale": np.zeros((4, 3), np.float32)}
    write_run("two", trained=norm, model_init="one")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert_run_holds(tmp_path / "two", {**base(), **head(13.0)}, {n: x + 3 for n, x in norm.items()})


def test_base_that_moved(tmp_path):
    npz.save_npz(tmp_path / "w.npz", unflatten_tree(base()))
    write_run(tmp_path / "run", trained=head(), model_init=str(tmp_path / "w.npz"))
    os.rename(tmp_path / "w.npz", tmp_path / "elsewhere.npz")
    with pytest.raises(FileNotFoundError, match="run started from .model_init.*w.npz.*moved, --base=PATH says") as e:
        checkpoints.load_params(str(tmp_path / "run"))
    assert str(e.value).count("--base") == 1
    found = checkpoints.load_params(str(tmp_path / "run"), base=str(tmp_path / "elsewhere.npz"))
    tiny.assert_trees_equal(found, unflatten_tree({**base(), **head(13.0)}))
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        checkpoints.load_params(str(tmp_path / "run"), base=str(tmp_path / "nowhere.npz"))


def test_base_of_a_run_that_another_started_from_moved(tmp_path):
    npz.save_npz(tmp_path / "w.npz", unflatten_tree(base()))
    write_run(tmp_path / "one", trained=head(), model_init=str(tmp_path / "w.npz"))
    norm = {"llm/final_norm/scale": np.zeros((4, 3), np.float32)}
    write_run(tmp_path / "two", trained=norm, model_init=str(tmp_path / "one"))
    expected = unflatten_tree({**base(), **head(13.0), "llm/final_norm/scale": norm["llm/final_norm/scale"] + 3})
    os.rename(tmp_path / "w.npz", tmp_path / "moved.npz")
    with pytest.raises(FileNotFoundError, match="two started from.*one started from.*--base=PATH says") as e:
        checkpoints.load_params(str(tmp_path / "two"))
    assert str(e.value).count("--base") == 1
    tiny.assert_trees_equal(checkpoints.load_params(str(tmp_path / "two"), base=f"{tmp_path}/moved.npz"), expected)
    os.rename(tmp_path / "moved.npz", tmp_path / "w.npz")
    os.rename(tmp_path / "one", tmp_path / "moved")
    tiny.assert_trees_equal(checkpoints.load_params(str(tmp_path / "two"), base=f"{tmp_path}/moved"), expected)


def test_a_run_that_says_it_started_from_itself(tmp_path):
    write_run(tmp_path / "run", trained=head())
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps({**config, "model_init": f"{tmp_path}/run@3"}))
    with pytest.raises(checkpoints.CheckpointError, match="that it started from itself"):
        checkpoints.load_params(str(tmp_path / "run"))


@pytest.mark.parametrize("name", ["²", "٣", "3²", ".3.tmp", "-3"])
def test_folders_beside_the_checkpoints_are_no_steps(tmp_path, name):
    write_run(tmp_path / "run", trained=base())
    (tmp_path / "run" / "checkpoints" / name).mkdir()
    assert workdir.newest_step(tmp_path / "run") == 3
    assert_run_holds(tmp_path / "run", {}, {n: x + 3 for n, x in base().items()})
    assert workdir.split_spec(f"{tmp_path}/run@²") is None


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"model_init": "x", "frozen_dtype": "fl', "base.json: not valid JSON.*start anew in another --workdir"),
        ("[]", "found a list"),
        ('{"model_init": "x"}', "frozen_dtype is None"),
        ('{"model_init": "x", "frozen_dtype": "float32", "fingerprints": [1]}', r"fingerprints is \[1\]"),
    ],
)
def test_base_json_of_another_form(tmp_path, content, message):
    (tmp_path / "base.json").write_text(content)
    with pytest.raises(checkpoints.CheckpointError, match=message):
        workdir.read_base(tmp_path)


def test_no_checkpoint_yet(tmp_path):
    write_run(tmp_path / "run", trained=head(), steps=())
    with pytest.raises(checkpoints.CheckpointError, match="holds no complete checkpoint"):
        checkpoints.load_params(str(tmp_path / "run"))


def test_config_missing_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing.*is not a workdir"):
        workdir.read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(checkpoints.CheckpointError, match="config.json: not valid JSON"):
        workdir.read_config(tmp_path)


def test_config_json_gives_the_config_back(tmp_path):
    c = tiny.config(schedule=[("img/.*", dict(decay_type="cosine")), (".*", None)])
    plain = json.loads(config_files.to_json(c))
    again = config_files.from_json(plain)
    assert json.loads(config_files.to_json(again)) == plain
    assert experiment.make_model(again) == experiment.make_model(c)


def test_restore_puts_state_where_it_is_wanted(tmp_path):
    state = {"a": jnp.arange(16, dtype=jnp.float32), "count": jnp.int32(4)}
    write_run(tmp_path, trained={"a": np.ones(16, np.float32)}, opt_state=state)
    mesh = jax.make_mesh((8,), ("data",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with workdir.Checkpoints(tmp_path) as ckpt:
        assert ckpt.latest_step() == 3
        wanted = {"a": jax.ShapeDtypeStruct((16,), jnp.float32, sharding=cut)}
        count = {"count": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)}
        trained, found, _ = ckpt.restore(3, wanted, {**wanted, **count})
    assert trained["a"].sharding == found["a"].sharding == cut
    np.testing.assert_array_equal(trained["a"], np.full(16, 4.0))
    tiny.assert_trees_equal(jax.device_get(found), jax.device_get(state))


@pytest.mark.parametrize(
    "wanted, message",
    [
        ({"a": (16,)}, "the first is b: found \\(4,\\), expected None"),
        ({"a": (8,), "b": (4,)}, "the first is a: found \\(16,\\), expected \\(8,\\)"),
        ({"a": (16,), "b": (4,), "c": (1,)}, "the first is c: found None, expected \\(1,\\)"),
    ],
)
def test_restore_into_another_model(tmp_path, wanted, message):
    write_run(tmp_path, trained={"a": np.ones(16, np.float32), "b": np.ones(4, np.float32)})
    wanted = {n: jnp.zeros(shape) for n, shape in wanted.items()}
    with workdir.Checkpoints(tmp_path) as ckpt:
        with pytest.raises(checkpoints.CheckpointError, match=message):
            ckpt.restore(3, wanted, {})


def test_what_is_saved_is_not_what_comes_after(tmp_path):
    """Saving goes on in the background, while the next step overwrites the buffers."""
    add = jax.jit(lambda t: {n: x + 1 for n, x in t.items()}, donate_argnums=0)
    trained = {"a": jnp.zeros((1000, 1000))}
    write_run(tmp_path, trained={}, steps=())
    with workdir.Checkpoints(tmp_path) as ckpt:
        ckpt.save(1, trained, {})
        for _ in range(3):
            trained = add(trained)
        ckpt.wait()
    assert checkpoints.load_params(str(tmp_path))["a"].max() == 0


# --- Damage ---


def files_of(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def two_checkpoints(folder):
    """(trained, opt_state) as saved at steps 3 and 5; numbers that don't compress."""
    rng = np.random.default_rng(0)
    trained = {f"w{i}": jnp.asarray(rng.normal(size=(64, 33)), jnp.float32) for i in range(3)}
    state = (jnp.int32(7), {n: x * 2 for n, x in trained.items()})
    with workdir.Checkpoints(folder, keep=2) as ckpt:
        for step in (3, 5):
            ckpt.save(step, {n: x + step for n, x in trained.items()}, state, {"note": step})
            ckpt.wait()
    return trained, state


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 0x55
    path.write_bytes(content)


# Orbax leaves what it was reading unawaited when it fails.
orbax_fails = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@orbax_fails
@pytest.mark.parametrize("how", ["cut", "flip", "lost"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog, how):
    """A flipped bit in compressed numbers is read without complaint by Orbax and TensorStore."""
    trained, state = two_checkpoints(tmp_path)
    biggest = max(files_of(tmp_path / "checkpoints" / "5"), key=lambda p: p.stat().st_size)
    biggest.unlink() if how == "lost" else damage(biggest, how)
    with pytest.raises(workdir.Damaged):
        with workdir.Checkpoints(tmp_path, keep=2) as ckpt:
            ckpt.restore(5, trained, state)
    with workdir.Checkpoints(tmp_path, keep=2) as ckpt:
        step, found, found_state, run = ckpt.restore_newest(trained, state)
        assert (step, run) == (3, {"note": 3})
        np.testing.assert_array_equal(found["w1"], trained["w1"] + 3)
        tiny.assert_trees_equal(jax.device_get(found_state), jax.device_get(state))
        assert "damaged/5; trying the one before" in caplog.text
        # The run comes to that step again.
        ckpt.save(5, trained, state)
        ckpt.wait()
        assert ckpt.restore_newest(trained, state)[0] == 5
    assert (tmp_path / "damaged" / "5").is_dir()


@orbax_fails
@pytest.mark.slow
def test_no_damage_to_any_file_goes_unnoticed(tmp_path):
    """Either what is restored is what was saved, or the checkpoint counts as damaged."""
    trained, state = two_checkpoints(tmp_path)
    rng, noticed = np.random.default_rng(1), 0
    for path in files_of(tmp_path / "checkpoints" / "5"):
        whole = path.read_bytes()
        for place in {0, len(whole) - 1, *rng.integers(0, len(whole), 4)}:
            for cut in (False, True):
                content = bytearray(whole[:place] if cut else whole)
                if not cut:
                    content[place] ^= 1 << int(rng.integers(8))
                path.write_bytes(content)
                with workdir.Checkpoints(tmp_path, keep=2) as ckpt:
                    try:
                        found, found_state, _ = ckpt.restore(5, trained, state)
                    except workdir.Damaged:
                        noticed += 1
                        continue
                expected = {n: x + 5 for n, x in trained.items()}, state
                tiny.assert_trees_equal(*map(jax.device_get, ((found, found_state), expected)))
        path.write_bytes(whole)
    assert noticed > 20


@orbax_fails
def test_all_damaged_is_an_error_that_says_where_they_are(tmp_path):
    trained, state = two_checkpoints(tmp_path)
    for step in "35":
        damage(max(files_of(tmp_path / "checkpoints" / step), key=os.path.getsize), "cut")
    with workdir.Checkpoints(tmp_path, keep=2) as ckpt:
        with pytest.raises(checkpoints.CheckpointError, match="no checkpoint can be read.*another"):
            ckpt.restore_newest(trained, state)
    assert sorted(os.listdir(tmp_path / "damaged")) == ["3", "5"]


def test_damaged_weights_are_not_loaded(tmp_path):
    write_run(tmp_path, trained={}, steps=())
    trained, _ = two_checkpoints(tmp_path)
    folder = tmp_path / "checkpoints" / "5" / "trained"
    damage(max(files_of(folder), key=os.path.getsize), "flip")
    with pytest.raises(checkpoints.CheckpointError, match="5: .*not those that were written|read"):
        checkpoints.load_params(str(tmp_path))
    assert checkpoints.load_params(f"{tmp_path}@3").keys() == trained.keys()


FULL_DISK = """
import resource, sys
import jax.numpy as jnp
import numpy as np
from paligemma_med.checkpoints import npz, workdir
rng = np.random.default_rng(0)
small, big = ({"w": jnp.asarray(rng.normal(size=n), jnp.float32)} for n in (100, 10**6))
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
ckpt = workdir.Checkpoints(sys.argv[1], keep=2)
ckpt.save(1, small, {})
ckpt.wait()
ckpt.save(2, big, {})
try:
    ckpt.wait()
except npz.CheckpointError as e:
    print(e)
"""


def test_full_disk_leaves_earlier_checkpoints_alone(tmp_path, repo_root):
    """A limit on file sizes stands in for it: writing fails in the same places."""
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=repo_root, capture_output=True, text=True, timeout=120
    )
    assert "could not be written" in run.stdout, run.stdout + run.stderr
    assert "steps [1] are intact" in run.stdout and "disk full" in run.stdout
    assert "File too large" in run.stdout  # the cause stands at the end of a long message
    with workdir.Checkpoints(tmp_path, keep=2) as ckpt:
        step, found, *_ = ckpt.restore_newest({"w": jnp.zeros(100, jnp.float32)}, {})
    assert step == 1 and np.abs(found["w"]).max() > 0
