"""Command lines: mistakes in flags, which config and weights the flags mean, and how a program ends."""

import subprocess
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli
from paligemma_med.checkpoints import hub
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from tests import environ, tiny


@pytest.mark.parametrize(
    "argv, sentence",
    [
        (["--config=configs/stage1_slake.py:ress=3"], "argument 'ress' is unknown; known are"),
        (["--config.nosuch=3"], "--config.nosuch: the config has no such key. Flags"),
        (["--config.lrr=3"], r"--config.lrr: the config has no such key (did you mean 'lr'?)"),
        (
            ["--config.modl.llm.x=3"],
            "--config.modl.llm.x: the config has no such key (did you mean",
        ),
        (["--config.lr.x=3"], "--config.lr.x: the config has no such key"),
        (["--config.lr=abc"], "flag --config.lr=abc: could not convert string to float"),
        (["--cnfig=x"], "Unknown command line flag 'cnfig'. Did you mean: config"),
    ],
)
def test_mistakes_on_the_command_line(argv, sentence, monkeypatch, repo_root):
    argv = ["train", "--config=configs/stage1_slake.py", *argv]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    monkeypatch.setattr(cli.flags, "FLAGS", values)
    monkeypatch.chdir(repo_root)
    with pytest.raises(SystemExit) as stop:
        cli.parse_flags(argv)
    assert sentence in stop.value.code
    assert len(stop.value.code.splitlines()) == 1


def test_a_run_given_as_checkpoint_brings_its_config(tmp_path):
    """--checkpoint of a run's folder, or of a step of it, needs no --config beside it."""
    workdir = str(tmp_path / "w")
    tiny.write_workdir(workdir, tiny.config())
    config = config_files.from_json(workdirs.read_config(workdir))
    values = flags.FlagValues()
    for name in (
        "config",
        "workdir",
        "checkpoint",
        "adapter",
        "base",
        "resample_posemb",
        "allow_nonfinite",
        "download",
    ):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for spec in (workdir, f"{workdir}@{workdirs.newest_step(workdir)}"):
        values(["x", f"--checkpoint={spec}"])
        with mock.patch.object(cli.flags, "FLAGS", values):
            found, checkpoint = cli.from_flags()
        assert checkpoint == spec
        assert found.to_dict() == config.to_dict()


@pytest.fixture
def source_flags(monkeypatch):
    """→ (flags of a program that answers questions, given its arguments; what `from_flags` makes of them)."""

    def parse(*argv):
        values = flags.FlagValues()
        monkeypatch.setattr(sys, "argv", ["evaluate", *argv])
        monkeypatch.setattr(cli.flags, "FLAGS", values)
        config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        for name in ("workdir", "checkpoint", "adapter", "base"):
            flags.DEFINE_string(name, None, "", flag_values=values)
        for name in ("resample_posemb", "allow_nonfinite", "download"):
            flags.DEFINE_bool(name, False, "", flag_values=values)
        cli.parse_flags(sys.argv)
        return cli.from_flags()

    return parse


def test_a_run_s_own_config_can_be_changed(tmp_path, source_flags):
    workdir = str(tmp_path / "My runs, a:b")
    tiny.write_workdir(workdir, tiny.config())
    before = workdirs.read_config(workdir)
    for source in (f"--workdir={workdir}", f"--checkpoint={workdir}@{workdirs.newest_step(workdir)}"):
        changes = ["--config.evals.val.data.split=validate[:3]", "--config.model_init=/x,y.npz", "--config.base=/b"]
        config, _ = source_flags(source, *changes, "--config.allow_nonfinite=True")
        assert cli.is_changed_run()
        assert config.evals.val.data.split == "validate[:3]"
        assert (config.model_init, config.base, config.allow_nonfinite) == ("/x,y.npz", "/b", True)
        config, _ = source_flags(source)
        assert not cli.is_changed_run()
        assert config.to_dict() == config_files.from_json(before).to_dict()
    with pytest.raises(SystemExit, match="--config.rez: the config has no such key"):
        source_flags(f"--workdir={workdir}", "--config.rez=3")
    with pytest.raises(SystemExit, match="config.json is missing: .* is not a workdir"):
        source_flags(f"--workdir={tmp_path}", "--config.res=3")


def test_flags_about_weights_reach_the_config(tmp_path, source_flags):
    workdir = str(tmp_path / "w")
    tiny.write_workdir(workdir, tiny.config())
    config, _ = source_flags(f"--workdir={workdir}", "--base=/moved.npz", "--resample_posemb", "--allow_nonfinite")
    assert (config.base, config.resample_posemb, config.allow_nonfinite) == ("/moved.npz", True, True)


def test_only_download_fetches_what_is_named(tmp_path, source_flags, monkeypatch):
    workdir, fetched = str(tmp_path / "w"), []
    tiny.write_workdir(workdir, tiny.config(model_init="hf:o/base"), {"img/head/bias": np.zeros(2, np.float32)})
    monkeypatch.setattr(hub, "fetch", fetched.append)
    flags = [f"--workdir={workdir}", "--adapter=hf:o/adapter", "--checkpoint=o/weights"]
    source_flags(*flags)
    assert not fetched
    config, checkpoint = source_flags(*flags, "--download")
    assert [x for x in fetched if x] == ["o/weights", "hf:o/base", "hf:o/adapter"]
    assert (config.adapter_init, checkpoint) == ("hf:o/adapter", "o/weights")


def test_a_mistake_is_one_line_and_a_bug_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr(cli.flags, "FLAGS", _Flags(verbosity=(False, -1)))

    @cli.command
    def main(argv):
        raise argv[0]

    with pytest.raises(SystemExit) as stop:
        main([ValueError("config.lr is 'x'; expected a number.")])
    assert stop.value.code == "error: config.lr is 'x'; expected a number."
    with pytest.raises(ZeroDivisionError):
        main([ZeroDivisionError()])
    monkeypatch.setattr(cli.flags, "FLAGS", _Flags(verbosity=(True, 1)))
    with pytest.raises(ValueError):  # whose traceback was asked for
        main([ValueError("x")])


@pytest.fixture
def ends(monkeypatch):
    """A program's last line, by what it raises."""
    monkeypatch.setattr(cli.flags, "FLAGS", _Flags(verbosity=(False, -1), config=(True, None)))

    @cli.command
    def main(argv):
        argv[0]()

    def run(raises):
        with pytest.raises(SystemExit) as stop:
            main([raises])
        return stop.value.code

    return run


def test_a_wrong_use_is_one_line(ends):
    """absl's own way is the whole help above it."""

    def wrong():
        raise app.UsageError("Give --image or --image_dir.")

    assert ends(wrong) == "error: Give --image or --image_dir. --help names all flags."


@pytest.mark.parametrize(
    "ask, amount",
    [
        (lambda: jax.block_until_ready(jnp.zeros(2**44, jnp.float32)), "6.55e+04 GiB"),
        (lambda: np.zeros(2**50), "8.00 PiB"),
    ],
)
def test_no_more_memory_is_one_line(ends, ask, amount):
    said = ends(ask)
    assert len(said.splitlines()) == 1 and "Traceback" not in said
    assert all(x in said for x in (amount, "grad_accum_steps", "frozen_dtype", "--dry_run"))


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_devices_that_are_not_there_are_one_line(platform, repo_root):
    code = "import jax, sys; from absl import app, flags; from paligemma_med import cli; " + (
        "app.run(cli.command(lambda argv: print(jax.numpy.ones(3))), argv=['x'])"
    )
    env = environ.of_program(JAX_PLATFORMS=platform)
    run = subprocess.run([sys.executable, "-c", code], cwd=repo_root, env=env, text=True, capture_output=True)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith(f"error: JAX_PLATFORMS={platform} asks for devices that aren't here")
    assert "Traceback" not in run.stderr


def test_jaxs_guards_are_left_aside(monkeypatch, capsys):
    """Optax and Orbax don't run under them."""
    monkeypatch.setattr(cli.flags, "FLAGS", _Flags(verbosity=(False, -1)))
    guards = {
        "jax_numpy_dtype_promotion": "strict",
        "jax_transfer_guard": "disallow",
        "jax_numpy_rank_promotion": "raise",
    }
    before = {name: getattr(jax.config, name) for name in guards}
    try:
        for name, value in guards.items():
            jax.config.update(name, value)
        cli.command(lambda argv: jax.jit(lambda x: x + np.int64(1))(np.ones(3, np.float16)))([])
        assert jax.config.jax_numpy_dtype_promotion == "standard"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[0].startswith("JAX_NUMPY_DTYPE_PROMOTION=strict is left aside")


class _Flags(dict):
    """flags.FLAGS of {name: (present, value)}."""

    def __init__(self, **values):
        super().__init__({name: mock.Mock(present=present) for name, (present, _) in values.items()})
        for name, (_, value) in values.items():
            setattr(self, name, value)
