"""Gemma 3 and MedGemma in Hugging Face's names (transformers' Gemma3ForConditionalGeneration).

Sources: transformers, models/gemma3/{configuration,modeling}_gemma3.py; config.json of google/medgemma-4b-it. Its tower
is SigLIP's without a head; its projector is ours of `models/projector.py`.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import config, gemma, paligemma, siglip
from paligemma_med.checkpoints.hf.layout import Row, Sizes, norm
from paligemma_med.models import connector as connectors
from paligemma_med.models import presets

MODEL_TYPE = "gemma3"
NAME = "Gemma 3"
# Its modules are named and were renamed as PaliGemma's were.
STYLES, PUBLISHED, PADDING = paligemma.STYLES, paligemma.PUBLISHED, paligemma.PADDING
BUFFERS = (
    *paligemma.BUFFERS,
    r"language_model\.rotary_emb\w*\.\w*inv_freq",
)
UNREAD = ()
EMBEDDING, HEAD = paligemma.EMBEDDING, paligemma.HEAD
canonical = paligemma.canonical

TYPES = ("gemma3_text",)
IMAGE_TOKEN = 262_144
# <bos>, <eos> or <end_of_turn>, <pad>: generation_config.json of google/medgemma-4b-it.
TOKENS = dict(bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0)
# Keys missing in a config.json have their class' default; these are transformers 5.24's. Google's file of MedGemma
# leaves out the heads, for example.
DEFAULTS = {
    "gemma3_text": dict(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        vocab_size=262_208,
        query_pre_attn_scalar=256,
        sliding_window=4096,
        sliding_window_pattern=6,
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=None,
        layer_types=None,
    ),
}
FIXED = {
    "gemma3_text": dict(
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=1e-6,
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        use_bidirectional_attention=False,
    )
}
_TOWER, _PROJECTOR, _DECODER = "vision_tower", "multi_modal_projector", "language_model"


def table(paths: Collection[str]) -> tuple[Row, ...]:
    """All rows of a model that has leaves with these paths."""
    return (
        *siglip.rows(paths, _TOWER),
        *projector_rows(),
        *decoder_rows(paths, _DECODER),
    )


def projector_rows() -> tuple[Row, ...]:
    """The rows of what is between tower and decoder."""
    return (
        Row(f"{_PROJECTOR}.mm_soft_emb_norm.weight", "D", "connector/norm/scale"),
        Row(f"{_PROJECTOR}.mm_input_projection_weight", "W E", "connector/proj/kernel"),
    )


def decoder_rows(paths: Collection[str], name: str) -> tuple[Row, ...]:
    """The rows of a decoder; `name` is their decoder's canonical name."""
    attn = "llm/layers/attn"
    qk_norms = [
        row for c in "qk" for row in norm(f"{name}.layers.{{i}}.self_attn.{c}_norm", f"{attn}/{c}_norm", bias=False)
    ]
    return (
        *gemma.rows({*paths, "llm/layers/post_attention_norm/scale"}, name),
        *(row._replace(theirs="H") for row in qk_norms),
    )


def text_section(whole: Mapping[str, Any], key: str | None, path: str) -> config.Section:
    """The decoder's section of a config.json; key None: the whole file."""
    return config.section(whole, key, path, types=TYPES, absent={}, defaults=DEFAULTS, fixed=FIXED)


def describe_text(text: config.Section, vocab_size: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Our dict of a decoder, for `vocab_size` tokens, and the sizes in the file.

    Raises:
      CheckpointError: it needs something that our decoder doesn't compute.
    """
    llm, size = gemma.sizes_of(text, vocab_size)
    llm |= dict(
        post_norms=True,
        qk_norm=True,
        query_pre_attn_norm=gemma.query_norm(text, llm),
        **_positions(text, llm["depth"]),
    )
    return llm, size


def describe(whole: Mapping[str, Any], path: str) -> config.Described:
    """The model of a config.json.

    Raises:
      CheckpointError: it needs something that our model doesn't compute.
    """
    vision = config.section(
        whole,
        "vision_config",
        path,
        types=siglip.TYPES,
        absent=paligemma.SECTIONS["vision_config"],
        defaults=siglip.DEFAULTS,
        fixed=siglip.FIXED,
    )
    text = text_section(whole, "text_config", path)
    token = config.Section({"image_token_index": IMAGE_TOKEN, **whole}, path).number("image_token_index")
    rows = text.number("vocab_size")
    if rows - token > PADDING:
        raise CheckpointError(
            f"{path}: the embedding has {rows} rows, {rows - token} from image_token_index {token} on, expected at "
            f"most {PADDING}, which are padding"
        )
    llm, llm_size = describe_text(text, min(rows, token))
    img, img_size = siglip.describe(vision, llm["width"])
    del img_size["E"]
    per_image = config.Section({"mm_tokens_per_image": 256, **whole}, path).number("mm_tokens_per_image")
    connector = dict(
        kind="projector", reduce="pool", factor=_factor(img_size["T"], per_image, path), norm=True, bias=False
    )
    between = dict(D=img_size["D"], W=img_size["D"], E=llm["width"])
    sizes = dict(img=img_size, connector=between, llm=llm_size)
    return config.Described(img, llm, sizes, connector, image_ar="block")


def _factor(patches, tokens, path):
    side, short = math.isqrt(patches), math.isqrt(tokens)
    if short**2 != tokens or side % short:
        raise CheckpointError(
            f"{path}: mm_tokens_per_image is {tokens}, expected the square of a number that divides the side of the "
            f"{side}×{side} patches"
        )
    return side // short


def _positions(text, depth):
    """Windows and RoPE. transformers before 5 writes rope_theta, rope_local_base_freq and rope_scaling, later ones
    rope_parameters for each kind of layer."""
    every = text.number("sliding_window_pattern")
    kinds = text["layer_types"]
    if kinds is not None:
        full = [i + 1 for i, kind in enumerate(kinds) if kind == "full_attention"]
        every = full[0] if full else depth + 1
        expected = ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(depth)]
        if list(kinds) != expected:
            raise CheckpointError(
                f"{text.path}: layer_types is {kinds}, expected every n-th layer to be full_attention"
            )
    if "full_attention" in text:
        near, far = (
            text[k] if isinstance(text.get(k), Mapping) else {} for k in ("sliding_attention", "full_attention")
        )
        theta, local, scaling = far.get("rope_theta", 1e6), near.get("rope_theta", 1e4), far
        if near.get("rope_type", "default") != "default":
            raise CheckpointError(
                f"{text.path}: rope_type of sliding_attention is {near['rope_type']!r}, expected 'default'"
            )
    else:
        theta, local, scaling = text["rope_theta"], text["rope_local_base_freq"], text["rope_scaling"] or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise CheckpointError(f"{text.path}: rope_type is {kind!r}, expected 'default' or 'linear'")
    out = dict(
        rope_theta=theta, local_rope_theta=local, rope_scale=scaling.get("factor", 1.0) if kind == "linear" else 1.0
    )
    for key, value in out.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(f"{text.path}: {key} is {value!r:.60}, expected a number above 0")
    return dict(window=text.number("sliding_window"), window_every=every, **{k: float(v) for k, v in out.items()})


def make_text(size: Mapping[str, int], llm: Mapping[str, Any] | None, *, rows: int) -> dict[str, Any]:
    """text_config of a decoder of these sizes, as versions of transformers from 4.50 on read it.

    Args:
      llm: our dict for it; None: it must have the sizes of a known variant.
      rows: number of rows of the embedding in the file.

    Raises:
      CheckpointError: transformers has no such decoder, or `llm` gives other sizes.
    """
    made = gemma.decoder_of(size, llm, unseen="windows and RoPE", post_norms=True, qk_norm=True)
    gemma.check_computes(made, gemma.GEMMA3, NAME)
    every = made.window_every if made.window else 1  # without a window all layers are of the other kind
    scaled = dict(rope_scaling=dict(factor=made.rope_scale, rope_type="linear")) if made.rope_scale != 1 else {}
    return dict(
        model_type=TYPES[0],
        **gemma.section_of(size, rows),
        hidden_activation="gelu_pytorch_tanh",
        rms_norm_eps=made.norm_eps,
        query_pre_attn_scalar=gemma.query_scalar(made),
        sliding_window=made.window or DEFAULTS[TYPES[0]]["sliding_window"],
        sliding_window_pattern=every,
        layer_types=["sliding_attention" if (i + 1) % every else "full_attention" for i in range(made.depth)],
        rope_theta=made.rope_theta,
        rope_local_base_freq=made.local_rope_theta,
        **scaled,
        attention_bias=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=True,
    )


def make_config(
    sizes: Sizes,
    paths: Collection[str],
    img: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    connector: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The config.json of a model; arguments and errors are `families.Family.make_config`'s.

    Without `connector`, which says how many patches become one token, it is MedGemma's.
    """
    del paths
    image, text = sizes["img"], sizes["llm"]
    if img is not None:
        img = {"variant": presets.DEFAULT["img"]["variant"], **img}
    for side, part in ((sizes["connector"]["W"], image), (sizes["connector"]["E"], text)):
        if side != part["D"]:
            raise CheckpointError(
                f"expected a connector from the tower's width {image['D']} to the language model's {text['D']}: found "
                f"{sizes['connector']['W']} to {sizes['connector']['E']}"
            )
    published = presets.PRESETS["medgemma_4b"]["connector"]
    given = published if connector is None else connector
    for key, value in published.items():
        if key != "factor" and given.get(key) != value:
            raise CheckpointError(f"connector has {key}={given.get(key)!r}, but transformers' {NAME} has {value!r}")
    try:
        per_image = connectors.tokens(dict(given), image["T"])
    except ValueError as e:
        raise CheckpointError(str(e)) from None
    vision = siglip.make_section(dict(image, E=text["D"]), img)
    for key in ("num_image_tokens", "projection_dim"):
        del vision[key]
    return dict(
        architectures=["Gemma3ForConditionalGeneration"],
        model_type=MODEL_TYPE,
        **TOKENS,
        boi_token_index=255_999,
        eoi_token_index=256_000,
        image_token_index=text["V"],
        mm_tokens_per_image=per_image,
        tie_word_embeddings=True,
        text_config=make_text(text, llm, rows=text["V"] + PADDING),
        vision_config=vision,
    )


def make_processor(sizes: Sizes) -> dict[str, Any]:
    """The preprocessor_config.json of a model. `resample` is Google's own: 2, bilinear."""
    out = paligemma.make_processor(sizes)
    del out["image_seq_length"]
    return dict(
        out, image_processor_type="Gemma3ImageProcessor", processor_class="Gemma3Processor", do_pan_and_scan=False
    )
