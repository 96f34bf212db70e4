"""BLOOM in Hugging Face's names (transformers' BloomForCausalLM), by itself.

Its queries, keys and values are one matrix, head by head, and so they are in ours.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import config, gemma
from paligemma_med.checkpoints.hf.layout import Row, Sizes, dense, norm

MODEL_TYPE = "bloom"
NAME = "BLOOM"
_DECODER = "transformer"
STYLES, PUBLISHED, PADDING = {"4.41": {_DECODER: _DECODER}}, "4.41", 0
BUFFERS = ()
UNREAD = ()
EMBEDDING, HEAD = f"{_DECODER}.word_embeddings.weight", "lm_head.weight"
# Keys missing in a config.json have their class' default; these are transformers 5.24's.
DEFAULTS = dict(vocab_size=250_880, hidden_size=64, n_layer=2, n_head=8, layer_norm_epsilon=1e-5)
FIXED = dict(apply_residual_connection_post_layernorm=False)
# What its oldest files call them.
_OLD = dict(n_embed="hidden_size", num_hidden_layers="n_layer", num_attention_heads="n_head")


def table(paths: Collection[str]) -> tuple[Row, ...]:
    """All rows of a model; every one has the same."""
    del paths
    return tuple(_rows())


def _rows() -> Iterator[Row]:
    at, layer = f"{_DECODER}.h.{{i}}", "llm/layers"
    yield Row(EMBEDDING, "V D", "llm/embedder/input_embedding")
    yield from norm(f"{_DECODER}.word_embeddings_layernorm", "llm/embed_norm", bias=True)
    yield from norm(f"{at}.input_layernorm", f"{layer}/pre_attention_norm", bias=True)
    yield from dense(f"{at}.self_attention.query_key_value", f"{layer}/attn/qkv")
    yield from dense(f"{at}.self_attention.dense", f"{layer}/attn/out")
    yield from norm(f"{at}.post_attention_layernorm", f"{layer}/pre_ffw_norm", bias=True)
    yield from dense(f"{at}.mlp.dense_h_to_4h", f"{layer}/mlp/up")
    yield from dense(f"{at}.mlp.dense_4h_to_h", f"{layer}/mlp/down")
    yield from norm(f"{_DECODER}.ln_f", "llm/final_norm", bias=True)


def canonical(name: str) -> str:
    """A tensor's or module's name; some files leave out "transformer."."""
    return name if name.startswith((f"{_DECODER}.", "lm_head.")) else f"{_DECODER}.{name}"


def describe(whole: Mapping[str, Any], path: str) -> config.Described:
    """The model of a config.json.

    Raises:
      CheckpointError: it needs something that our decoder doesn't compute.
    """
    whole = {**{_OLD[k]: v for k, v in whole.items() if k in _OLD}, **whole}
    text = config.section(
        whole,
        None,
        path,
        types=(MODEL_TYPE,),
        absent={},
        defaults={MODEL_TYPE: DEFAULTS},
        fixed={MODEL_TYPE: FIXED},
    )
    width, heads = text.number("hidden_size"), text.number("n_head")
    if width % heads:
        raise CheckpointError(f"{path}: {heads} heads must divide the width of {width}")
    llm = dict(
        variant=None,
        width=width,
        depth=text.number("n_layer"),
        mlp_dim=4 * width,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width // heads,
        vocab_size=text.number("vocab_size"),
        norm="layer",
        norm_eps=text.positive("layer_norm_epsilon"),
        fused=True,
        position="alibi",
        embed_norm=True,
        embed_scale=False,
    )
    size = dict(V=llm["vocab_size"], D=width, L=llm["depth"], F=4 * width, N=heads, P=3, H=width // heads)
    return config.Described(None, llm, dict(llm=size))


# What it computes, as attributes of our decoder.
_COMPUTES = dict(
    norm="layer",
    act="gelu_tanh",
    fused=True,
    position="alibi",
    embed_scale=False,
    embed_norm=True,
    tie=True,
    attn_logits_softcap=None,
    final_logits_softcap=None,
)
make_processor = config.no_processor


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
    if (size["N"] * size["H"], size["F"]) != (size["D"], 4 * size["D"]):
        raise CheckpointError(
            f"{NAME}'s heads make up its width, and its MLP is 4 times as wide: found width {size['D']}, "
            f"{size['N']} heads of {size['H']}, and {size['F']}"
        )
    made = gemma.decoder_of(size, llm, unseen="eps", fused=True)
    gemma.check_computes(made, _COMPUTES, NAME)
    return dict(
        architectures=["BloomForCausalLM"],
        model_type=MODEL_TYPE,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        hidden_size=size["D"],
        n_layer=size["L"],
        n_head=size["N"],
        vocab_size=size["V"],
        layer_norm_epsilon=made.norm_eps,
        apply_residual_connection_post_layernorm=False,
        tie_word_embeddings=True,
    )
