"""Preprocessing and evaluations of answers with boxes, in PaliGemma's <loc> tokens: docs/grounding.md.

One prompt for several tasks: a question that begins with "detect " or "ground " stands as it is, others are asked as
everywhere. One answer, too: where it has boxes, they are written anew after a crop.
"""

from typing import Any

from configs import common
from configs.common_prompts import op as _op

# For models from scratch: `tiny` with a token for each of 1,024 places.
TINY = 'tiny(tokensets=("loc",))'
TINY_VOCAB = 2048
DETECTION_CONTROLS = ("mean_box", "shuffled_images", "blank_image")


def _prompt(tokenizer) -> list[str]:
    return [
        _op("task_prompt", common.PROMPT),
        _op("tok", model=tokenizer, key="prefix", bos="yes"),
        _op("tok", model=tokenizer, key="septok", text=common.SEPARATOR),
    ]


def train_pp(res, text_len, tokenizer, augment=(), keep=()) -> str:
    """The pp string of training sets of questions, with boxes or without; arguments and what it gives as of
    `common.train_pp`. Rows must have the key boxes."""
    masks = dict(mask_ar=[0, 0, 1], mask_loss=[0, 0, 1])
    return "|".join(
        [
            "objects",
            *common.image_pp(res, augment),
            *_prompt(tokenizer),
            "loc_text",
            _op("tok", model=tokenizer, key="suffix", eos="yes", special="tokensets"),
            _op("masked_concat", ["prefix", "septok", "suffix"], outkey="text", **masks),
            _op("tolen", text_len + 1, pad_value=0, key="text"),
            _op("tolen", text_len + 1, pad_value=1, key="mask_ar"),
            _op("tolen", text_len + 1, pad_value=0, key="mask_loss"),
            _op("keep", "image", "text", "mask_ar", "mask_loss", *keep),
        ]
    )


def eval_pp(res, text_len, tokenizer, keep=common.EVAL_KEYS) -> str:
    """The pp string of an evaluation set, as `common.eval_pp`."""
    return "|".join(
        [
            *common.image_pp(res),
            *_prompt(tokenizer),
            _op("masked_concat", ["prefix", "septok"], outkey="text", mask_ar=[0, 0], mask_input=[1, 1]),
            *common.prompt_lengths(text_len),
            _op("keep", "image", "text", "mask_ar", "mask_input", *keep),
        ]
    )


def loss_eval(c, name, split, *, data_dir="", batch_size=64, keep=common.EVAL_KEYS, **kw) -> dict[str, Any]:
    """A section of config.evals: the loss of the true answers on a split of the data set `name`, boxes included.
    Arguments as of `common.loss_eval`."""
    return dict(
        type="perplexity",
        data=common.dataset(name, split, data_dir),
        pp_fn=train_pp(c.res, c.text_len, c.tokenizer, keep=keep),
        batch_size=batch_size,
        **kw,
    )


def detection_eval(c, name, split, *, text_len, max_new_tokens, data_dir="", batch_size=64, **kw) -> dict[str, Any]:
    """A section of config.evals: how well boxes agree with the true ones on a split of the data set `name`, with the
    controls. Arguments as of `common.vqa_eval`."""
    return dict(
        type="detection",
        data=common.dataset(name, split, data_dir),
        train_data=common.dataset(name, "train", data_dir),
        pp_fn=eval_pp(c.res, text_len, c.tokenizer),
        batch_size=batch_size,
        pred_kw=dict(max_new_tokens=max_new_tokens),
        **dict(controls=DETECTION_CONTROLS) | kw,
    )
