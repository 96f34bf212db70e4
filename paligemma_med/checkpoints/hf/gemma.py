"""Gemma 1 and Gemma 2 in Hugging Face's names (transformers' GemmaModel and Gemma2Model)."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf.config import Section, check_agrees
from paligemma_med.checkpoints.hf.layout import Row, linear, norm
from paligemma_med.models import decoder

TYPES = ("gemma", "gemma2")
# Keys missing in a config.json have their class' default; these are transformers 5.23's,
# models/{gemma,gemma2}/configuration_*.py. Google's own files leave out head_dim, for example.
DEFAULTS = {
    "gemma": dict(
        hidden_size=3072,
        intermediate_size=24_576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        vocab_size=256_000,
    ),
    "gemma2": dict(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=256_000,
        query_pre_attn_scalar=256,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
    ),
}
# What our decoder computes without having an argument for it.
_BOTH = dict(rms_norm_eps=1e-6, attention_bias=False, rope_theta=1e4, rope_type="default", rope_scaling=None)
FIXED = {
    "gemma": dict(hidden_act="gelu_pytorch_tanh", **_BOTH),
    "gemma2": dict(hidden_activation="gelu_pytorch_tanh", **_BOTH),
}
BUFFERS = (r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",)  # in some versions; nothing learned
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def rows(paths: Collection[str], name: str, part: str = "llm") -> Iterator[Row]:
    """The rows of a decoder.

    Args:
      paths: of our decoder's leaves: one or two kernels for q, k and v, norms after sublayers or none.
      name: their decoder's canonical name.
      part: our part's name.
    """
    yield Row(f"{name}.{EMBEDDING}", "V D", f"{part}/embedder/input_embedding")
    at, layer = f"{name}.layers.{{i}}", f"{part}/layers"
    attn = f"{layer}/attn"
    if f"{attn}/qkv_einsum/w" in paths:
        for c in "qkv":
            yield linear(f"{at}.self_attn.{c}_proj", f"{attn}/qkv_einsum/w", c)
    else:
        yield linear(f"{at}.self_attn.q_proj", f"{attn}/q_einsum/w")
        for c in "kv":
            yield linear(f"{at}.self_attn.{c}_proj", f"{attn}/kv_einsum/w", c)
    yield linear(f"{at}.self_attn.o_proj", f"{attn}/attn_vec_einsum/w")
    for c in ("gate", "up"):
        yield linear(f"{at}.mlp.{c}_proj", f"{layer}/mlp/gating_einsum", c)
    yield linear(f"{at}.mlp.down_proj", f"{layer}/mlp/linear")
    yield from norm(f"{at}.input_layernorm", f"{layer}/pre_attention_norm", bias=False)
    if has_post_norms(paths, part):  # Gemma 1's second norm has the name of a different one in Gemma 2
        yield from norm(f"{at}.post_attention_layernorm", f"{layer}/post_attention_norm", bias=False)
        yield from norm(f"{at}.pre_feedforward_layernorm", f"{layer}/pre_ffw_norm", bias=False)
        yield from norm(f"{at}.post_feedforward_layernorm", f"{layer}/post_ffw_norm", bias=False)
    else:
        yield from norm(f"{at}.post_attention_layernorm", f"{layer}/pre_ffw_norm", bias=False)
    yield from norm(f"{name}.norm", f"{part}/final_norm", bias=False)


def has_post_norms(paths: Collection[str], part: str = "llm") -> bool:
    """Whether it is Gemma 2, which has norms after each sublayer."""
    return f"{part}/layers/post_attention_norm/scale" in paths


def describe(section: Section, vocab_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Our dict, for `vocab_size` tokens, and the sizes in the file.

    Raises:
      CheckpointError: it needs something that our decoder doesn't compute.
    """
    llm, size = sizes_of(section, vocab_size)
    if section["model_type"] == "gemma2":
        llm |= dict(
            post_norms=True,
            attn_logits_softcap=section.cap("attn_logit_softcapping"),
            final_logits_softcap=section.cap("final_logit_softcapping"),
            query_pre_attn_norm=query_norm(section, llm),
        )
    return llm, size


def sizes_of(section: Section, vocab_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    """What all generations have: our dict's sizes, and those in the file."""
    llm = dict(
        variant=None,
        width=section.number("hidden_size"),
        depth=section.number("num_hidden_layers"),
        mlp_dim=section.number("intermediate_size"),
        num_heads=section.number("num_attention_heads"),
        num_kv_heads=section.number("num_key_value_heads"),
        head_dim=section.number("head_dim"),
        vocab_size=vocab_size,
    )
    size = dict(
        V=section.number("vocab_size"),
        D=llm["width"],
        N=llm["num_heads"],
        K=llm["num_kv_heads"],
        H=llm["head_dim"],
        F=llm["mlp_dim"],
        L=llm["depth"],
    )
    return llm, size


def query_norm(section: Section, llm: Mapping[str, Any]) -> str:
    """Our name of the scale of queries.

    Raises:
      CheckpointError: it is another.
    """
    scalar, per_head = section["query_pre_attn_scalar"], llm["width"] // llm["num_heads"]
    if scalar == llm["head_dim"]:
        return "rsqrt_head_dim"
    if scalar == per_head:
        return "rsqrt_emb_per_head"
    raise CheckpointError(
        f"{section.path}: query_pre_attn_scalar is {scalar!r}, expected head_dim ({llm['head_dim']}) or "
        f"hidden_size / num_attention_heads ({per_head})"
    )


def make_section(
    size: Mapping[str, int], llm: Mapping[str, Any] | None, *, post_norms: bool, rows: int
) -> dict[str, Any]:
    """text_config of a decoder of these sizes.

    Args:
      llm: our dict for it. Without it Gemma 2 must have the sizes of a known variant.
      rows: number of rows of the embedding in the file.

    Raises:
      CheckpointError: transformers has no such decoder, or `llm` gives other sizes.
    """
    return dict(
        model_type="gemma2" if post_norms else "gemma",
        **section_of(size, rows),
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        **_unseen(size, llm, post_norms),
    )


def section_of(size: Mapping[str, int], rows: int) -> dict[str, Any]:
    """The sizes of a decoder as transformers calls them."""
    return dict(
        hidden_size=size["D"],
        intermediate_size=size["F"],
        num_hidden_layers=size["L"],
        num_attention_heads=size["N"],
        num_key_value_heads=size.get("K", size["N"]),  # in one kernel with q, there are as many
        head_dim=size["H"],
        vocab_size=rows,
    )


# What every Gemma computes, as attributes of our decoder.
_ALL = dict(
    norm="rms_plus_one",
    norm_eps=1e-6,
    act="gelu_tanh",
    fused=False,
    position="rope",
    embed_scale=True,
    embed_norm=False,
    tie=True,
)
_OLD = dict(_ALL, qk_norm=False, rope_theta=1e4, rope_scale=1.0, window=None)


def _unseen(size, llm, post_norms):
    """What shapes don't show: soft-caps and the scale of queries."""
    if llm is None and not post_norms:
        return {}
    made = decoder_of(size, llm, unseen="soft-caps", post_norms=post_norms)
    check_computes(made, dict(_OLD, post_norms=post_norms), "Gemma 2" if post_norms else "Gemma")
    if post_norms:
        return dict(
            attn_logit_softcapping=made.attn_logits_softcap,
            final_logit_softcapping=made.final_logits_softcap,
            query_pre_attn_scalar=query_scalar(made),
        )
    if made.attn_logits_softcap or made.final_logits_softcap or query_scalar(made) != made.head_dim:
        raise CheckpointError(
            "llm has soft-caps or a scale of queries, but no norms after sublayers: transformers' "
            "Gemma has none of them, its Gemma 2 all"
        )
    return {}


def decoder_of(size: Mapping[str, int], llm: Mapping[str, Any] | None, *, unseen: str, **seen) -> Any:
    """Our decoder of these sizes, a module without parameters, for what it computes.

    Args:
      llm: our dict for it; None: it must have the sizes of a known variant.
      unseen: what of it shapes don't show, for the message.
      **seen: other arguments that shapes show.

    Raises:
      CheckpointError: it isn't known, or `llm` says something else than the shapes.
    """
    ours = dict(
        width=size["D"],
        depth=size["L"],
        mlp_dim=size["F"],
        num_heads=size["N"],
        num_kv_heads=size.get("K", size["N"]),
        head_dim=size["H"],
        vocab_size=size["V"],
        **seen,
    )
    if llm is None:
        llm = _known_variant(ours, unseen)
    variant = llm.get("variant")
    if variant and variant not in decoder.VARIANTS:
        raise CheckpointError(f"llm variant {variant!r} is unknown")
    given = {**decoder.VARIANTS.get(variant, {}), **llm}
    check_agrees("llm", {"post_norms": False, **given}, ours)
    try:
        return decoder.Model(**{**given, **ours, "variant": None})
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"llm is no decoder of ours: {e}") from None


def _known_variant(ours, unseen):
    for variant in decoder.VARIANTS.values():
        if all(ours[k] == v for k, v in variant.items() if k in ours and k != "vocab_size"):
            return variant
    raise CheckpointError(
        f"the language model has sizes {ours}, which is no known variant, and its {unseen} are not among the weights: "
        "say them with llm=dict(…)"
    )


def check_computes(made: Any, expected: Mapping[str, Any], name: str) -> None:
    """Raises CheckpointError if our decoder computes something that transformers' model `name` doesn't."""
    for key, value in expected.items():
        if getattr(made, key) != value:
            raise CheckpointError(f"llm has {key}={getattr(made, key)!r}, but transformers' {name} has {value!r}")


def query_scalar(made: Any) -> int:
    """transformers' name of the scale of queries: its square, inverted."""
    return made.width // made.num_heads if made.query_pre_attn_norm == "rsqrt_emb_per_head" else made.head_dim


# What Gemma 3 computes besides.
GEMMA3 = dict(_ALL, qk_norm=True, post_norms=True, attn_logits_softcap=None, final_logits_softcap=None)
