"""What vLLM expects of an export, as far as names and fields go: read in version 0.33.0 (commit 4ba787ec9),
vllm/model_executor/models/paligemma.py. vLLM itself isn't run."""

import json

import pytest

from paligemma_med.checkpoints.hf import families
from tests.checkpoints.hf.folders import ours_saved, tensors_of

# Prefixes of a file's names, and what they become; modules that its class has.
RENAMED = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
MODULES = ("language_model.model.", "vision_tower.vision_model.", "multi_modal_projector.linear.")


def in_vllm(name):
    """A tensor's name in vLLM."""
    old = next((prefix for prefix in RENAMED if name.startswith(prefix)), None)
    return name if old is None else RENAMED[old] + name.removeprefix(old)


@pytest.mark.parametrize("name", ["mqa", "gemma2"])
def test_names_and_fields_of_an_export(name, tmp_path):
    case, _ = ours_saved(name, tmp_path / "w")
    names = [in_vllm(n) for n in tensors_of(tmp_path / "w")]
    assert {next(m for m in MODULES if n.startswith(m)) for n in names} == {*MODULES}
    assert not any("lm_head" in n for n in names)  # tied: it takes the embedding
    assert len({*names}) == len(names)
    config = json.loads((tmp_path / "w/config.json").read_text())
    assert config["architectures"] == ["PaliGemmaForConditionalGeneration"]
    assert config["text_config"]["model_type"] == ("gemma2" if name == "gemma2" else "gemma")
    assert config["image_token_index"] == case["llm"]["vocab_size"] < config["text_config"]["vocab_size"]
    vision = config["vision_config"]
    assert vision["projection_dim"] == config["projection_dim"] == config["text_config"]["hidden_size"]
    assert vision["image_size"] % vision["patch_size"] == 0 and config["tie_word_embeddings"]


def test_an_adapters_modules_by_default():
    """PEFT's names of --key_style=4.52, which loses its own prefix there."""
    for kind in ("paligemma", "gemma3"):
        family = families.FAMILIES[kind]
        names = {in_vllm(families.in_style(family, n, "4.52")) for n in families.modules_of(family).values()}
        parts = {".".join(n.split(".")[:2]) for n in names} - {"multi_modal_projector.linear"}
        assert parts == {"language_model.model", "vision_tower.vision_model"}
