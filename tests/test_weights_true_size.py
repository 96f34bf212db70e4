"""Systems 002 to 004 at their true size, from the names and shapes of their published sources; no weight is there.

Names of towers and query transformer are those of tests/checkpoints/hf/test_originals.py; those of language models are
transformers' (of LLaMA and BLOOM), and of MiniGPT-v2's checkpoint its code's (minigpt4/models/minigpt_v2.py).
"""

import json
import math

import pytest

from paligemma_med import weights
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.hf import assemble, originals, tensors
from paligemma_med.models import presets, vlm
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints.hf import test_originals as names
from tests.checkpoints.hf.test_generations import PUBLISHED

WIDTH = 4096  # of all three language models


def layers(at, count, shapes):
    return {f"{at}.{i}.{name}": shape for i in range(count) for name, shape in shapes.items()}


def llama(mlp, keys, vocab):
    attn = {f"self_attn.{n}_proj.weight": (keys if n in "kv" else WIDTH, WIDTH) for n in "qkvo"}
    ffw = {
        "mlp.gate_proj.weight": (mlp, WIDTH),
        "mlp.up_proj.weight": (mlp, WIDTH),
        "mlp.down_proj.weight": (WIDTH, mlp),
    }
    norms = {f"{n}_layernorm.weight": (WIDTH,) for n in ("input", "post_attention")}
    whole = {
        "model.embed_tokens.weight": (vocab, WIDTH),
        "lm_head.weight": (vocab, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    return whole | layers("model.layers", 32, {**attn, **ffw, **norms})


def bloom():
    def both(name, *shape):
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    block = both("input_layernorm", WIDTH) | both("post_attention_layernorm", WIDTH)
    block |= both("self_attention.query_key_value", 3 * WIDTH, WIDTH) | both("self_attention.dense", WIDTH, WIDTH)
    block |= both("mlp.dense_h_to_4h", 4 * WIDTH, WIDTH) | both("mlp.dense_4h_to_h", WIDTH, 4 * WIDTH)
    whole = (
        {"word_embeddings.weight": (250_880, WIDTH)} | both("word_embeddings_layernorm", WIDTH) | both("ln_f", WIDTH)
    )
    return whole | layers("h", 30, block)


def minigpt():
    lora = {f"{n}_proj.lora_{f}.weight": s for n in "qv" for f, s in (("A", (64, WIDTH)), ("B", (WIDTH, 64)))}
    lora = {f"self_attn.{n}": s for n, s in lora.items()}
    trained = {"llama_proj.weight": (WIDTH, 4 * 1408), "llama_proj.bias": (WIDTH,)}
    return trained | layers("llama_model.base_model.model.model.layers", 32, lora)


SOURCES = {
    "biomedclip": names.OPEN_CLIP,
    "eva": names.EVA,
    "blip2": names.qformer_shapes(1408),
    "minigpt": minigpt(),
    "llama2": llama(11_008, WIDTH, 32_000),
    "llama3": llama(14_336, 1024, 128_256),
    "bloom": bloom(),
}
CONFIGS = {"llama2": "pefomed", "llama3": "llama_clip", "bloom": "bloom_qformer"}
_CROSS = "connector/layers/block_0/cross"
CASES = {
    "llama_clip": (224, dict(img="biomedclip", llm="llama3"), {"img/head/kernel", "img/head/bias"}, 2),
    "bloom_qformer": (
        224,
        dict(img="biomedclip", connector="blip2", llm="bloom"),
        {f"{_CROSS}/key/kernel", f"{_CROSS}/value/kernel", "connector/proj/kernel", "connector/proj/bias"},
        2 + 12 * 6 + 3,
    ),
    "pefomed": (448, dict(img="eva", connector="minigpt", llm="llama2"), set(), 13 + 4 + 128),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for each source whose tensors have names and shapes alone."""
    found = {}
    for name, state in SOURCES.items():
        at = tmp_path / name
        at.mkdir()
        (at / "model.safetensors").touch()
        if name in CONFIGS:
            (at / "config.json").write_text(json.dumps(PUBLISHED[CONFIGS[name], "llm"]))
        found[str(at)] = [tensors.Tensor(str(at), n, s, lazy.BFLOAT16) for n, s in state.items()]
    monkeypatch.setattr(tensors, "open_all", found.get)
    return tmp_path


@pytest.mark.parametrize("preset", CASES)
def test_every_tensor_has_its_place_or_is_said(folder, monkeypatch, preset):
    res, spec, fresh, unread = CASES[preset]
    said = []
    monkeypatch.setattr(assemble, "tell_unread", lambda where, names: said.extend(names))
    model = vlm.Model(**presets.PRESETS[preset])
    abstract = flatten_tree(vlm.abstract_params(model, image_size=res))
    spec = {part: str(folder / name) for part, name in spec.items()}
    host = weights.load_host_params(spec, abstract, "bicubic", model.leaves, may_begin_afresh=True)
    assert {n: x.shape for n, x in host.items()} == {n: x.shape for n, x in abstract.items() if n not in fresh}
    assert all(isinstance(x, lazy.Lazy) for n, x in host.items() if "/encoder_norm/" not in n)
    assert len(said) == unread
    weights.check_described(spec, model)
    if preset == "pefomed":  # what they train: the projection, and adapters that adapter_init takes
        adapters = [n for n in said if ".lora_" in n]
        sizes = [math.prod(SOURCES["minigpt"][n]) for n in adapters]
        assert len(adapters) == 128
        assert sum(sizes) + abstract["connector/proj/kernel"].size + WIDTH == 56_627_200
        assert originals.EVA_LAYERS == abstract["img/Transformer/encoderblock/LayerNorm_0/scale"].shape[0]
