"""Each way in which a directory can be wrong."""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.checkpoints import CheckpointError, hf
from paligemma_med.checkpoints.hf import paligemma as names
from tests.checkpoints.hf.folders import INDEX, ours_saved, rewrite, tensors_of, theirs_saved
from tests.checkpoints.trees import assert_same


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    theirs_saved("mqa", tmp_path)
    tensors = tensors_of(tmp_path)
    gone = next(k for k in tensors if "layers.1.self_attn.k_proj.bias" in k)
    del tensors[gone]
    tensors["vision_tower.vision_model.head.probe"] = np.ones(3, np.float32)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(9)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    rewrite(tmp_path, tensors)
    with pytest.raises(CheckpointError) as e:
        hf.open_hf(tmp_path)
    assert "2 of" in str(e.value)
    assert f"{names.canonical(gone)}: missing, expected (24,)" in str(e.value)
    assert "vision_tower.head.probe: unexpected, found (3,)" in str(e.value)


def test_two_names_of_one_tensor_and_quantised_weights_are_errors(tmp_path):
    theirs_saved("mqa", tmp_path)
    tensors = tensors_of(tmp_path)
    name = next(k for k in tensors if "post_layernorm.weight" in k)
    rewrite(tmp_path, {**tensors, f"model.{name}": tensors[name]})
    with pytest.raises(CheckpointError, match="post_layernorm.weight is the same as"):
        hf.open_hf(tmp_path)
    rewrite(tmp_path, {**tensors, name: np.ones(24, np.uint8)})
    with pytest.raises(CheckpointError, match="post_layernorm.weight is no tensor of.*quantised"):
        hf.open_hf(tmp_path)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    theirs_saved("mqa", folder, max_shard_size="50KB")
    return folder


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_truncated_or_foreign_file_is_one_error(tmp_path_factory, sharded, data):
    folder = sharded
    broken = tmp_path_factory.mktemp("broken")
    for file in folder.iterdir():
        (broken / file.name).symlink_to(file)
    victim = broken / data.draw(st.sampled_from(sorted(p.name for p in folder.glob("*.safetensors"))))
    content = victim.read_bytes()
    victim.unlink()
    cut = data.draw(st.integers(0, len(content) - 1))
    foreign = data.draw(st.booleans())
    victim.write_bytes(data.draw(st.binary(max_size=100)) if foreign else content[:cut])
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as e:
        hf.open_hf(broken)
    assert victim.name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", 3, ".."])
def test_an_index_cannot_reach_out_of_its_folder(file, tmp_path):
    theirs_saved("mqa", tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    name = sorted(index["weight_map"])[0]
    index["weight_map"][name] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a .safetensors file of this folder"):
        hf.open_hf(tmp_path)


def test_an_index_that_differs_from_its_files_is_an_error(tmp_path):
    theirs_saved("mqa", tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    name = sorted(index["weight_map"])[0]
    del index["weight_map"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"1 tensors are either in the index.*{name}"):
        hf.open_hf(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON at line 1"):
        hf.open_hf(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        hf.open_hf(tmp_path)


def test_one_file_comes_before_an_index_and_others_as_in_transformers(tmp_path):
    params = theirs_saved("mqa", tmp_path, max_shard_size="50KB")[1]
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    theirs_saved("mqa", tmp_path / "one")
    os.rename(tmp_path / "one" / "model.safetensors", tmp_path / "model.safetensors")
    first.write_bytes(b"not looked at")
    assert_same(hf.open_hf(tmp_path), params)
    (tmp_path / INDEX).unlink()
    assert_same(hf.open_hf(tmp_path), params)


def test_headers_are_whole_words_as_the_format_wants(tmp_path):
    ours_saved("gqa", tmp_path / "w", max_shard_bytes=20_000)
    for file in (tmp_path / "w").glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        hf.open_hf(tmp_path)
    theirs_saved("mqa", tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        hf.open_hf(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="without model.safetensors.index.json"):
        hf.open_hf(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        hf.open_hf(tmp_path)
