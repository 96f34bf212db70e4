"""Gemma 3's language models by themselves in Hugging Face's names (transformers' Gemma3ForCausalLM)."""

from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.hf import config, gemma3, llama
from paligemma_med.checkpoints.hf.layout import Row, Sizes

MODEL_TYPE = "gemma3_text"
NAME = "Gemma 3 (text)"
STYLES, PUBLISHED, PADDING = llama.STYLES, llama.PUBLISHED, 0
BUFFERS = (*llama.BUFFERS, r"model\.rotary_emb\w*\.\w*inv_freq")
UNREAD = ()
EMBEDDING, HEAD = llama.EMBEDDING, llama.HEAD
canonical = llama.canonical
make_processor = config.no_processor


def table(paths: Collection[str]) -> tuple[Row, ...]:
    """All rows of a model; every one has the same but for grouped heads."""
    return gemma3.decoder_rows(paths, "model")


def describe(whole: Mapping[str, Any], path: str) -> config.Described:
    """The model of a config.json.

    Raises:
      CheckpointError: it needs something that our decoder doesn't compute.
    """
    text = gemma3.text_section(whole, None, path)
    llm, size = gemma3.describe_text(text, text.number("vocab_size"))
    return config.Described(None, llm, dict(llm=size))


def make_config(
    sizes: Sizes,
    paths: Collection[str],
    img: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    connector: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The config.json of a model; arguments and errors are `families.Family.make_config`'s."""
    del paths, img, connector
    size = sizes["llm"]
    text = gemma3.make_text(size, llm, rows=size["V"])
    return dict(text, architectures=["Gemma3ForCausalLM"], **gemma3.TOKENS)
