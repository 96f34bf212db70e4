"""What a path holds: one tree from any form of weights, and one message where there is none."""

import types

import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, Lazy, fit, forms, lazy, npz, workdir
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.trees import assert_same, tree


def test_load_params_reads_npz_and_stacks_layers(tmp_path):
    params = tree()
    path = tmp_path / "w.npz"
    npz.save_npz(path, fit.unstack_layers(params), dtype="bfloat16")
    back = checkpoints.load_params(path)
    assert back["img"]["Transformer"]["encoderblock"]["mlp"]["kernel"].shape == (3, 6, 8)
    assert_same(checkpoints.load_params(f"{path}:img"), back["img"])


def test_a_run_is_its_base_with_its_own_leaves_in_place(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints").mkdir()
    assert checkpoints.kind_of(tmp_path) == "workdir"
    npz.save_npz(tmp_path / "w.npz", tree())
    own = {"img/head/bias": np.ones(4, np.float32), "img/head/lora_a": np.ones((6, 2), np.float32)}
    monkeypatch.setattr(workdir, "open_leaves", lambda spec: ({"model_init": str(tmp_path / "w.npz")}, own))
    assert_same(checkpoints.load_params(tmp_path), unflatten_tree({**flatten_tree(tree()), **own}))
    monkeypatch.setattr(workdir, "open_leaves", lambda spec: ({}, own))
    assert_same(checkpoints.load_params(tmp_path), unflatten_tree(own))


def test_load_params_says_what_it_accepts(tmp_path):
    def fails(spec, says, error=CheckpointError):
        with pytest.raises(error, match=says) as e:
            checkpoints.load_params(spec)
        assert str(spec) in str(e.value) and "x.npz:img" in str(e.value)

    fails(tmp_path, "folder without weights")
    fails(tmp_path / "nothing", "no weights at", FileNotFoundError)
    (tmp_path / "w.bin").write_bytes(b"x")
    fails(tmp_path / "w.bin", "not a form of weights known")
    for name, says in (
        ("adapter_config.json", "holds a PEFT adapter"),
        ("pytorch_model.bin", "PyTorch pickles, which are never read"),
    ):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(CheckpointError, match=says):
            checkpoints.load_params(tmp_path)
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="w.npz"):
        checkpoints.load_params(tmp_path / "w.npz")


def test_open_init_takes_its_parts_from_different_files(tmp_path):
    npz.save_npz(tmp_path / "a.npz", tree(1))
    npz.save_npz(tmp_path / "b.npz", tree(2))
    spec = dict(img=f"{tmp_path}/a.npz:img", llm=f"{tmp_path}/b.npz:llm")
    want = dict(img=tree(1)["img"], llm=tree(2)["llm"])
    opened = checkpoints.open_init(spec)
    assert all(isinstance(x, Lazy) for x in flatten_tree(opened).values())
    assert_same(lazy.read_all(opened), want)
    assert_same(checkpoints.load_init(spec), want)
    with pytest.raises(ValueError, match="expected a path, or img and llm"):
        checkpoints.open_init(dict(img="a.npz"))


def test_another_form_of_adapters_is_one_entry(tmp_path, monkeypatch):
    """All that read and write adapters ask `forms`: here one that keeps them in an npz file."""

    def save(path, adapter, *, dtype=None, overwrite=False):
        rows = {str(i): np.array(t.name) for i, t in enumerate(adapter.specs)}
        np.savez(path, **rows)

    other = types.SimpleNamespace(
        NAME="npz",
        is_adapter=lambda path: path.endswith(".lora.npz"),
        load_adapter=lambda path, allow_nonfinite: ("read", path),
        save_adapter=save,
    )
    monkeypatch.setitem(forms.ADAPTERS, "other", other)
    path = str(tmp_path / "x.lora.npz")
    assert checkpoints.load_adapter(path) == ("read", path)
    params, rules = tree(), [("img/head/kernel", dict(rank=2))]
    params["img"]["head"] |= {"lora_a": np.ones((6, 2), np.float32), "lora_b": np.ones((2, 4), np.float32)}
    checkpoints.save_adapter(path, checkpoints.extract_adapter(rules, params), form="other")
    with np.load(path) as f:
        assert str(f["0"]) == "img/head/kernel"
    with pytest.raises(FileNotFoundError, match="expected a PEFT adapter's folder"):
        checkpoints.load_adapter(tmp_path)
