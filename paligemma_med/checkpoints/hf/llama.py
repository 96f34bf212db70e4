"""Language models of LLaMA's architecture in Hugging Face's names (transformers' LlamaForCausalLM), by themselves."""

from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import config, gemma
from paligemma_med.checkpoints.hf.layout import Row, Sizes

MODEL_TYPE = "llama"
NAME = "LLaMA"
_DECODER = "model"
STYLES, PUBLISHED, PADDING = {"4.41": {_DECODER: _DECODER}}, "4.41", 0
BUFFERS = tuple(rf"{_DECODER}\.{buffer}" for buffer in gemma.BUFFERS)
UNREAD = ()
EMBEDDING, HEAD = f"{_DECODER}.{gemma.EMBEDDING}", gemma.HEAD
# Keys missing in a config.json have their class' default; these are transformers 5.24's.
DEFAULTS = dict(
    hidden_size=4096,
    intermediate_size=11_008,
    num_hidden_layers=32,
    num_attention_heads=32,
    vocab_size=32_000,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    tie_word_embeddings=False,
)
FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, rope_type="default", rope_scaling=None)


def table(paths: Collection[str]) -> tuple[Row, ...]:
    """All rows of a model that has leaves with these paths."""
    output = "llm/embedder/output_embedding"
    return (*gemma.rows(paths, _DECODER), *((Row(HEAD, "V D", output),) if output in paths else ()))


def canonical(name: str) -> str:
    """A tensor's or module's name; some files leave out "model."."""
    return name if name.startswith((f"{_DECODER}.", "lm_head.")) else f"{_DECODER}.{name}"


def describe(whole: Mapping[str, Any], path: str) -> config.Described:
    """The model of a config.json.

    Raises:
      CheckpointError: it needs something that our decoder doesn't compute.
    """
    text = config.section(
        whole,
        None,
        path,
        types=(MODEL_TYPE,),
        absent={},
        defaults={MODEL_TYPE: DEFAULTS},
        fixed={MODEL_TYPE: FIXED},
    )
    heads, width = text.number("num_attention_heads"), text.number("hidden_size")
    absent = {"num_key_value_heads": heads, "head_dim": width // heads}  # or null
    text = config.Section({**text, **{k: v for k, v in absent.items() if text.get(k) is None}}, path)
    llm, size = gemma.sizes_of(text, text.number("vocab_size"))
    tie = text["tie_word_embeddings"]
    if not isinstance(tie, bool):
        raise CheckpointError(f"{path}: tie_word_embeddings is {tie!r}, expected true or false")
    llm |= dict(
        norm="rms",
        norm_eps=text.positive("rms_norm_eps"),
        act="silu",
        embed_scale=False,
        rope_theta=text.positive("rope_theta"),
        tie=tie,
    )
    return config.Described(None, llm, dict(llm=size))


# What it computes, as attributes of our decoder.
_COMPUTES = dict(
    norm="rms",
    act="silu",
    fused=False,
    qk_norm=False,
    position="rope",
    rope_scale=1.0,
    window=None,
    embed_scale=False,
    embed_norm=False,
    attn_logits_softcap=None,
    final_logits_softcap=None,
)
# The number of tokens tells the generations apart: config.json of meta-llama/Meta-Llama-3-8B and Llama-2-7b-hf.
_LLAMA3_ROWS = 128_256
_LLAMA3 = dict(bos_token_id=128_000, eos_token_id=128_001, max_position_embeddings=8192)
_LLAMA2 = dict(bos_token_id=1, eos_token_id=2, max_position_embeddings=4096)
make_processor = config.no_processor


def make_config(
    sizes: Sizes,
    paths: Collection[str],
    img: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    connector: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The config.json of a model; arguments and errors are `families.Family.make_config`'s."""
    del img, connector
    size, tie = sizes["llm"], "llm/embedder/output_embedding" not in paths
    made = gemma.decoder_of(size, llm, unseen="eps and RoPE's base", tie=tie)
    gemma.check_computes(made, _COMPUTES, NAME)
    if gemma.query_scalar(made) != made.head_dim:
        raise CheckpointError(f"llm has query_pre_attn_norm={made.query_pre_attn_norm!r}, which {NAME} has not")
    return dict(
        architectures=["LlamaForCausalLM"],
        model_type=MODEL_TYPE,
        **gemma.section_of(size, size["V"]),
        **(_LLAMA3 if size["V"] == _LLAMA3_ROWS else _LLAMA2),
        pad_token_id=None,
        hidden_act="silu",
        rms_norm_eps=made.norm_eps,
        rope_theta=made.rope_theta,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=tie,
    )
