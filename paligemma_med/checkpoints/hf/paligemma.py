"""PaliGemma and PaliGemma 2 in Hugging Face's names (transformers' PaliGemmaForConditionalGeneration).

transformers' own table is models/paligemma/convert_paligemma_weights_to_hf.py.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import config, gemma, siglip
from paligemma_med.checkpoints.hf.layout import Row, Sizes, dense
from paligemma_med.models import presets

MODEL_TYPE = "paligemma"
NAME = "PaliGemma"

# Canonical names of the three modules, and their names in transformers, by the version that introduced them.
_TOWER, _PROJECTOR, _DECODER = "vision_tower", "multi_modal_projector", "language_model"
STYLES = {
    "4.41": {
        _TOWER: "vision_tower.vision_model",
        _PROJECTOR: "multi_modal_projector",
        _DECODER: "language_model.model",
    },
    "4.52": {
        _TOWER: "model.vision_tower.vision_model",
        _PROJECTOR: "model.multi_modal_projector",
        _DECODER: "model.language_model",
    },
    "5": {
        _TOWER: "model.vision_tower",
        _PROJECTOR: "model.multi_modal_projector",
        _DECODER: "model.language_model",
    },
}
PUBLISHED = "4.41"  # the style of Google's files, which every version reads

BUFFERS = tuple(
    rf"{module}\.{buffer}"
    for module, buffers in ((_TOWER, siglip.BUFFERS), (_DECODER, gemma.BUFFERS))
    for buffer in buffers
)
UNREAD = ()
EMBEDDING, HEAD = f"{_DECODER}.{gemma.EMBEDDING}", gemma.HEAD
PADDING = 64  # rows of the embedding after ours, as in Google's files: the first is the image token

# If a whole section is missing, PaliGemmaConfig has its own defaults; these are transformers 5.23's,
# models/paligemma/configuration_paligemma.py.
SECTIONS = {
    "vision_config": dict(
        model_type="siglip_vision_model",
        hidden_size=1152,
        intermediate_size=4096,
        num_hidden_layers=27,
        num_attention_heads=16,
        patch_size=14,
        image_size=224,
    ),
    "text_config": dict(
        model_type="gemma",
        hidden_size=2048,
        intermediate_size=16_384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        vocab_size=257_152,
    ),
}
IMAGE_TOKEN = 256_000


def table(paths: Collection[str]) -> tuple[Row, ...]:
    """All rows of a model that has leaves with these paths."""
    return (
        *siglip.rows(paths, _TOWER),
        *dense(f"{_PROJECTOR}.linear", "img/head"),
        *gemma.rows(paths, _DECODER),
    )


def canonical(name: str) -> str:
    """A tensor's or module's name without what differs between generations of transformers.

    "model.language_model.layers.0…" (since 4.52), "language_model.model.layers.0…" (before, and on
    Google's pages) → "language_model.layers.0…"; "…vision_tower.vision_model.encoder…" (before 5)
    → "vision_tower.encoder…"; "language_model.lm_head…" → "lm_head…".
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def describe(whole: Mapping[str, Any], path: str) -> config.Described:
    """The model of a config.json.

    Raises:
      CheckpointError: it needs something that our model doesn't compute.
    """
    vision, text = (
        config.section(
            whole,
            key,
            path,
            types=family.TYPES,
            absent=SECTIONS[key],
            defaults=family.DEFAULTS,
            fixed=family.FIXED,
        )
        for key, family in (("vision_config", siglip), ("text_config", gemma))
    )
    llm, llm_size = gemma.describe(text, _vocab_size(whole, text.number("vocab_size"), path))
    img, img_size = siglip.describe(vision, llm["width"])
    return config.Described(img, llm, dict(img=img_size, llm=llm_size))


def _vocab_size(whole, rows, path):
    """Rows of our table: theirs has more, from the image token on, without a meaning."""
    token = whole.get("image_token_index", whole.get("image_token_id", IMAGE_TOKEN))
    if isinstance(token, bool) or not isinstance(token, int) or token < 1:
        raise CheckpointError(f"{path}: image_token_index is {token!r}, expected a token's number")
    if rows - token > PADDING:
        raise CheckpointError(
            f"{path}: the embedding has {rows} rows, {rows - token} from image_token_index {token} "
            f"on, expected at most {PADDING}, which are padding"
        )
    return min(rows, token)


def make_config(
    sizes: Sizes,
    paths: Collection[str],
    img: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    connector: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The config.json of a model; arguments and errors are `families.Family.make_config`'s."""
    del connector  # a model that has one has other leaves
    image, text = sizes["img"], sizes["llm"]
    if image["E"] != text["D"]:
        raise CheckpointError(
            f"expected an image tower that leads into the language model's width: found widths {image['E']} "
            f"and {text['D']}"
        )
    if img is not None:
        img = {"variant": presets.DEFAULT["img"]["variant"], **img}
    if llm is not None:
        llm = {"variant": presets.DEFAULT["llm"]["variant"], **llm}
    rows = text["V"] + PADDING
    text_config = gemma.make_section(text, llm, post_norms=gemma.has_post_norms(paths), rows=rows)
    return dict(
        architectures=["PaliGemmaForConditionalGeneration"],
        model_type=MODEL_TYPE,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
        hidden_size=text["D"],
        projection_dim=image["E"],
        image_token_index=text["V"],
        tie_word_embeddings=True,
        text_config=dict(text_config, num_image_tokens=image["T"]),
        vision_config=siglip.make_section(image, img),
    )


def make_processor(sizes: Sizes) -> dict[str, Any]:
    """The preprocessor_config.json of a model. It differs from Google's in `resample`: 2, bilinear, as in big_vision
    and here. Theirs is 3, bicubic, by which pixels in [-1, 1] come out up to 0.125 otherwise."""
    image = sizes["img"]
    side = math.isqrt(image["T"]) * image["Y"]
    return dict(
        image_processor_type="SiglipImageProcessor",
        processor_class="PaliGemmaProcessor",
        do_convert_rgb=True,
        do_resize=True,
        size=dict(height=side, width=side),
        resample=2,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        image_seq_length=image["T"],
    )
