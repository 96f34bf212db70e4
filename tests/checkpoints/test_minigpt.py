"""The adapter in a checkpoint of MiniGPT-v2's: it is the one that PEFT's own folder would hold."""

import numpy as np
import pytest
import safetensors.numpy

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, hf

F32 = np.float32
WIDTH, HEADS, HEAD, RANK, LAYERS = 12, 3, 4, 2, 2


def factors(default=""):
    rng, out = np.random.default_rng(0), {}
    for i in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            at = f"llama_model.base_model.model.model.layers.{i}.self_attn.{name}.lora"
            out[f"{at}_A{default}.weight"] = rng.normal(size=(RANK, WIDTH)).astype(F32)
            out[f"{at}_B{default}.weight"] = rng.normal(size=(HEADS * HEAD, RANK)).astype(F32)
    return out


def write(path, state):
    safetensors.numpy.save_file(state, path)
    return str(path)


@pytest.mark.parametrize("default", ["", ".default"])
def test_factors_and_scale(tmp_path, default, caplog):
    proj = {"llama_proj.weight": np.ones((WIDTH, 20), F32), "llama_proj.bias": np.ones(WIDTH, F32)}
    file = write(tmp_path / "pefomed.safetensors", {**factors(default), **proj})
    adapter = checkpoints.load_adapter(file)
    assert f"{file} doesn't say how its adapter is scaled: alpha is 16" in caplog.text
    kernel = np.zeros((LAYERS, 3, HEADS, WIDTH, HEAD), F32)
    tree, specs = checkpoints.insert_adapter({"llm": {"layers": {"attn": {"qkv_einsum": {"w": kernel}}}}}, adapter)
    assert {t.name: (s.rank, s.scale) for t, s in specs.items()} == {
        "llm/layers/attn/qkv_einsum/w:q": (RANK, 8.0),
        "llm/layers/attn/qkv_einsum/w:v": (RANK, 8.0),
    }
    merged = checkpoints.merge(tree, specs)["llm"]["layers"]["attn"]["qkv_einsum"]["w"]
    state = factors()
    for i in range(LAYERS):
        for j, name in ((0, "q_proj"), (2, "v_proj")):
            at = f"llama_model.base_model.model.model.layers.{i}.self_attn.{name}.lora"
            want = 8 * state[f"{at}_B.weight"] @ state[f"{at}_A.weight"]
            want = want.reshape(HEADS, HEAD, WIDTH).transpose(0, 2, 1)
            np.testing.assert_allclose(merged[i, j], want, rtol=0, atol=1e-5 * abs(want).max())
    assert not merged[:, 1].any()
    # The same file as a connector.
    assert hf.open_hf(file)["connector"]["proj"]["kernel"].shape == (20, WIDTH)


def test_bad_adapters(tmp_path):
    state = factors()
    gone = state.pop("llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight")
    file = write(tmp_path / "x.safetensors", state)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.v_proj\.lora_B\.weight: missing"):
        checkpoints.load_adapter(file)
    state["llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"] = np.full_like(gone, np.nan)
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        checkpoints.load_adapter(write(tmp_path / "x.safetensors", state))
    other = write(tmp_path / "y.safetensors", {"llama_proj.weight": np.ones((2, 2), F32)})
    with pytest.raises(FileNotFoundError, match="expected a PEFT adapter's folder"):
        checkpoints.load_adapter(other)
