"""A family of models is one module: here one with other names, a head of its own for the logits, and no padding."""

import dataclasses
import json
import re
from typing import Any

import numpy as np
import pytest

from paligemma_med.checkpoints import CheckpointError, hf, peft
from paligemma_med.checkpoints.hf import families, paligemma
from tests.checkpoints import adapters
from tests.checkpoints.hf.folders import dicts, edit_config, ours_saved, rewrite, tensors_of
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference


def renamed(name):
    return name.replace("language_model.", "text.").replace("vision_tower.", "image.")


@dataclasses.dataclass(frozen=True)
class Toy:
    """PaliGemma's tensors as another family would call them."""

    MODEL_TYPE: str = "toy"
    NAME: str = "Toy"
    EMBEDDING: str = "text.embed_tokens.weight"
    HEAD: str = "lm_head.weight"
    PADDING: int = 0
    BUFFERS: tuple = ()
    UNREAD: tuple = ()
    PUBLISHED: str = "1"

    STYLES = {
        "1": {"text": "net.text", "image": "net.image", "multi_modal_projector": "net.bridge"},
        "2": {"text": "text", "image": "image", "multi_modal_projector": "bridge"},
    }

    def table(self, paths):
        return tuple(row._replace(name=renamed(row.name)) for row in paligemma.table(paths))

    def canonical(self, name):
        return re.sub(r"^(net\.)?", "", name).replace("bridge.", "multi_modal_projector.")

    def describe(self, whole, path):
        return paligemma.describe(dict(whole, image_token_index=whole["text_config"]["vocab_size"]), path)

    make_processor = staticmethod(paligemma.make_processor)

    def make_config(self, *args) -> dict[str, Any]:
        config = paligemma.make_config(*args)
        rows = config["text_config"]["vocab_size"] - paligemma.PADDING
        return dict(config, model_type="toy", text_config=dict(config["text_config"], vocab_size=rows))


def without_paligemma(monkeypatch):
    # Not delitem, which would put it back as the last of them.
    monkeypatch.setattr(families, "FAMILIES", {n: f for n, f in families.FAMILIES.items() if n != "paligemma"})


@pytest.fixture
def toy(monkeypatch):
    family = Toy()
    monkeypatch.setitem(families.FAMILIES, "toy", family)
    return family


@pytest.mark.parametrize("name", ["mqa", "mha", "gemma2"])
def test_weights_of_another_family_make_the_round_trip(toy, monkeypatch, name, tmp_path):
    case, _, _, params, _ = reference.reference(name)
    img, llm = dicts(case)
    with monkeypatch.context() as m:
        without_paligemma(m)  # which these leaves fit as well
        hf.save_hf(tmp_path / "w", params, img=img, llm=llm)
    names = tensors_of(tmp_path / "w").keys()
    assert all(n.startswith(("net.text.", "net.image.", "net.bridge.")) for n in names)
    assert json.loads((tmp_path / "w/config.json").read_text())["model_type"] == "toy"
    assert_same(hf.open_hf(tmp_path / "w"), params)
    assert hf.model_config(tmp_path / "w")["img"] == img


@pytest.mark.parametrize("style", Toy.STYLES)
@pytest.mark.parametrize("rules", [adapters.ALL, adapters.MIXED], ids=["all", "mixed"])
def test_adapters_of_another_family_make_the_round_trip(toy, rules, style, tmp_path):
    made = adapters.random_adapter("gqa", rules)
    peft.save_adapter(tmp_path / "a", made, key_style=style, model_type="toy")
    keys = tensors_of(tmp_path / "a").keys()
    first = tuple(f"base_model.model.{name}." for name in toy.STYLES[style].values())
    assert all(k.startswith(first) for k in keys)
    adapters.assert_equal(peft.load_adapter(tmp_path / "a"), made)


def test_an_unknown_family_is_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "toy"}')
    with pytest.raises(
        CheckpointError, match="has model_type 'toy': expected 'bloom' or 'gemma3' or .* or 'paligemma'"
    ):
        hf.open_hf(tmp_path)


@dataclasses.dataclass(frozen=True)
class Fused(Toy):
    """… whose tower keeps queries, keys and values in one tensor, and whose decoder counts its layers 1, 3, 5, …"""

    NAME: str = "Fused"

    def table(self, paths):
        return tuple(self._rows(super().table(paths)))

    def _rows(self, rows):
        for row in rows:
            for j, c in enumerate("qkv"):
                if row.name.startswith("image.") and f"self_attn.{c}_proj." in row.name:
                    row = row._replace(name=row.name.replace(f"{c}_proj", "qkv"), piece=(j, 3))
            yield row._replace(numbering=(1, 2)) if row.name.startswith("text.layers") else row

    def describe(self, whole, path):
        return paligemma.describe(whole, path)


def fuse(tensors):
    """PaliGemma's tensors as `Fused` has them."""
    out, qkv = {}, {}
    for name, x in tensors.items():
        name = renamed(paligemma.canonical(name))
        if match := re.fullmatch(r"(image\..*self_attn\.)([qkv])_proj(\..*)", name):
            qkv.setdefault(match[1] + "qkv" + match[3], {})[match[2]] = x
        else:
            out[re.sub(r"(?<=^text\.layers\.)\d+", lambda i: str(2 * int(i[0]) + 1), name)] = x
    return out | {name: np.concatenate([x[c] for c in "qkv"]) for name, x in qkv.items()}


def test_tensors_of_several_leaves_and_another_count_of_layers(monkeypatch, tmp_path):
    _, params = ours_saved("gqa", tmp_path / "w")
    family = Fused()
    monkeypatch.setitem(families.FAMILIES, "toy", family)
    rewrite(tmp_path / "w", fuse(tensors_of(tmp_path / "w")))
    edit_config(tmp_path / "w", model_type="toy")
    assert_same(hf.open_hf(tmp_path / "w"), params)
    adapted = {target.param for target in families.modules_of(family)}
    assert "img/head/kernel" in adapted and not any("/query/" in path for path in adapted)
    without_paligemma(monkeypatch)
    with pytest.raises(CheckpointError, match="Fused is read, but not written: image.encoder.layers.*qkv"):
        hf.save_hf(tmp_path / "again", params)
