"""What the experiments share: arguments, the prompt, and the preprocessing strings built from it.

The prompt is part of a checkpoint: a model answers best when asked in the words it was trained
with. Only `prompt_for` writes those words; training, evaluation and `predict` use it. They are
big_vision's for VQA: BOS, "answer en {question}", newline, then the
answer and EOS.
"""

import ast
from typing import Any

from ml_collections import ConfigDict, config_dict

from configs import common_prompts
from configs.common_prompts import op as _op
from paligemma_med.config import arguments
from paligemma_med.pp import rows

GEMMA = 'gemma(tokensets=("loc", "seg"))'
GEMMA_VOCAB = 256_000 + 1024 + 128
SEPARATOR = "\n"

# What evaluators need to know about each question, in addition to the arrays.
EVAL_KEYS = (*rows.KEYS, "content_type", "modality", "location", rows.ACCEPTED)


# Settings of the training loop at their defaults, written out in every config because the command line
# can only change keys that a config has. docs/training.md explains them.
LOOP = dict(keep_ckpt=2, skip_nonfinite=0, tensorboard=False, wandb=False, compilation_cache=True)


def path_or_none(value):
    """For a path that may be None: a placeholder, since the command line can't change a plain None."""
    return value or config_dict.placeholder(str)


def prompt_for(language="en", options=False) -> str:
    """The prompt as a template over the keys of a row, filled in by `strfmt`.

    Args:
      language: the answer's language, which the prompt tells PaliGemma: "en", "zh", or "{q_lang}" for
        the row's own. "" leaves it out.
      options: whether the four choices of the row follow the question.
    """
    text = f"answer {language} {{question}}" if language else "answer {question}"
    return text + " A: {choice_a} B: {choice_b} C: {choice_c} D: {choice_d}" if options else text


# The default of every function below.
PROMPT = prompt_for()


def dataset(name, split, data_dir="") -> dict[str, str]:
    """A `data` section; without `data_dir` the set is looked up in TFDS' default folder."""
    return dict(name=name, split=split, **(dict(data_dir=data_dir) if data_dir else {}))


def parse_arg(arg, **defaults) -> ConfigDict:
    """ "res=224,batch_size=8" → ConfigDict of `defaults` with those values; types as the defaults'.

    A path may have commas, or stand in quotes: see `arguments.split`.

    Raises:
      ValueError: an unknown name, or a value that can't be read as the default's type.
    """
    out = dict(defaults)
    texts = [name for name, default in defaults.items() if default is None or isinstance(default, str)]
    for name, text in arguments.split(arg, defaults, texts):
        if name not in defaults:
            raise ValueError(f"Config argument {name!r} is unknown; known are {sorted(defaults)}. {arguments.QUOTES}")
        default = defaults[name]
        if text is None:
            value = True
        elif isinstance(default, str) or (default is None and not _is_literal(text)):
            value = text
        else:
            value = ast.literal_eval(text) if _is_literal(text) else text
        is_flag = isinstance(value, bool) and not isinstance(default, bool)  # True is an int too
        if default is not None and (is_flag or not isinstance(value, _accepted(default))):
            found = name if text is None else f"{name}={text}"
            expected = f"{type(default).__name__}, as in {name}={default!r}"
            raise ValueError(f"Config argument {found!r}: expected {expected}.")
        out[name] = value
    return ConfigDict(out, convert_dict=False)


def _accepted(default):
    return (int, float) if isinstance(default, float) else type(default)


def _is_literal(text):
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return False
    return True


def image_pp(res, augment=(), method="bilinear") -> list[str]:
    """Ops from encoded bytes to float32[res, res, 3] in [-1, 1]; `augment` comes before resize, whose `method` is."""
    # By default big_vision decodes JPEG faster, but up to 8 grey levels off.
    size = _op("resize", res, antialias=True, **({} if method == "bilinear" else dict(method=method)))
    return ["decode(precise=True)", *augment, size, _op("value_range", -1, 1)]


def train_pp(res, text_len, tokenizer, augment=(), prompt=PROMPT, answer="answer", resize="bilinear", keep=()) -> str:
    """The pp string of a training set of questions and answers; `answer` is the key of the latter.

    Gives image float32[res, res, 3] and text, mask_ar, mask_loss int32[text_len + 1]: one more than
    the model reads, since it predicts the next token; and image_at int32 if the image isn't in front.

    Args:
      prompt: PaliGemma's, as from `prompt_for`, or a `common_prompts.Prompt`.
      resize: the method of `image_pp`.
      keep: what else of a row an evaluation of the loss needs.
    """
    if isinstance(prompt, common_prompts.Prompt):
        texts = common_prompts.to_ops(prompt, tokenizer, answer)
    else:
        texts = [
            _op("strfmt", prompt, outkey="prefix"),
            _op("copy", inkey=answer, outkey="suffix"),
            _op("tok", model=tokenizer, key="prefix", bos="yes"),
            _op("tok", model=tokenizer, key="suffix", eos="yes"),
            _op("tok", model=tokenizer, key="septok", text=SEPARATOR),
            _op("masked_concat", ["prefix", "septok", "suffix"], outkey="text", mask_ar=[0, 0, 1], mask_loss=[0, 0, 1]),
        ]
    return "|".join(
        [
            *image_pp(res, augment, resize),
            *texts,
            _op("tolen", text_len + 1, pad_value=0, key="text"),
            _op("tolen", text_len + 1, pad_value=1, key="mask_ar"),
            _op("tolen", text_len + 1, pad_value=0, key="mask_loss"),
            _op("keep", "image", "text", "mask_ar", "mask_loss", *_place(prompt), *keep),
        ]
    )


def _place(prompt):
    return ("image_at",) if isinstance(prompt, common_prompts.Prompt) and prompt.before else ()


def eval_pp(res, text_len, tokenizer, keep=EVAL_KEYS, prompt=PROMPT, answer="answer", resize="bilinear") -> str:
    """The pp string of an evaluation set: only the prompt, and `keep` for the evaluator, to which the truth
    is called "answer" whatever its key in the data.

    Gives image as above, and text, mask_ar, mask_input int32[text_len]. Arguments as of `train_pp`.
    """
    if isinstance(prompt, common_prompts.Prompt):
        texts = common_prompts.to_ops(prompt, tokenizer)
    else:
        texts = [
            _op("strfmt", prompt, outkey="prefix"),
            _op("tok", model=tokenizer, key="prefix", bos="yes"),
            _op("tok", model=tokenizer, key="septok", text=SEPARATOR),
            _op("masked_concat", ["prefix", "septok"], outkey="text", mask_ar=[0, 0], mask_input=[1, 1]),
        ]
    return "|".join(
        [
            *image_pp(res, method=resize),
            *texts,
            *prompt_lengths(text_len),
            *([_op("copy", inkey=answer, outkey="answer")] if answer != "answer" else []),
            _op("keep", "image", "text", "mask_ar", "mask_input", *_place(prompt), *keep),
        ]
    )


def prompt_lengths(text_len) -> list[str]:
    """The ops that make a prompt `text_len` tokens long."""
    pads = dict(text=0, mask_ar=1, mask_input=0)
    return [_op("tolen", text_len, pad_value=pad, key=key) for key, pad in pads.items()]


def vqa_eval(
    c,
    name,
    split,
    *,
    text_len,
    max_new_tokens,
    prompt=PROMPT,
    train_split="train",
    data_dir="",
    batch_size=64,
    keep=EVAL_KEYS,
    answer="answer",
    samples=1,
    temperature=None,
    resize="bilinear",
    **kw,
) -> dict[str, Any]:
    """A section of config.evals: exact match on a split of the data set `name`, with its controls.

    Several `samples` of each question are drawn at `temperature` (by default 1) and give a mean and
    a standard deviation over runs; a single one is the most probable answer. Majority answers are
    counted on `train_split`.
    """
    if temperature is None:
        temperature = 1.0 if samples > 1 else 0.0
    return dict(
        type="vqa",
        data=dataset(name, split, data_dir),
        train_data=dataset(name, train_split, data_dir),
        **(dict(train_answer=answer) if answer != "answer" else {}),
        pp_fn=eval_pp(c.res, text_len, c.tokenizer, keep, prompt, answer, resize),
        batch_size=batch_size,
        pred_kw=dict(max_new_tokens=max_new_tokens, num_samples=samples, temperature=temperature),
        **kw,
    )


def loss_eval(
    c,
    name,
    split,
    *,
    prompt=PROMPT,
    data_dir="",
    batch_size=64,
    keep=EVAL_KEYS,
    answer="answer",
    resize="bilinear",
    **kw,
) -> dict[str, Any]:
    """A section of config.evals: the loss on a split, with the texts of training (c.text_len). It is one pass,
    without generating anything, and no control asks again.

    Arguments as of `vqa_eval`; `answer` is the key of what the model is trained to answer.
    """
    return dict(
        type="perplexity",
        data=dataset(name, split, data_dir),
        pp_fn=train_pp(c.res, c.text_len, c.tokenizer, (), prompt, answer, resize, keep),
        batch_size=batch_size,
        **kw,
    )


def big_vision_vqa_eval(
    c, name, split, *, text_len, max_new_tokens, prompt=PROMPT, batch_size=64, answer="answer", **kw
) -> dict[str, Any]:
    """The same questions for big_vision's own VQA evaluator, which only `paligemma_med.upstream.train` runs:
    one greedy answer each, right if it equals the truth exactly; see docs/big_vision.md.

    Arguments as of `vqa_eval`; outfile: where it writes the answers, by default
    <workdir>/<split>.json.
    """
    # It would treat any other kept text as an array.
    keep = ("question_id", "answer")
    if not any(key.startswith("log_") for key in kw):
        kw["log_percent"] = 1.0  # or it would never run
    return dict(
        type="proj.paligemma.transfers.vqa",
        pred="decode",
        pred_kw=dict(max_decode_len=max_new_tokens),
        tokenizer=c.tokenizer,
        data=dict(name=name, split=split),
        pp_fn=eval_pp(c.res, text_len, c.tokenizer, keep, prompt, answer),
        batch_size=batch_size,
        skip_first=True,
        **kw,
    )


def dialogue_eval(
    c, name, split, *, turns=3, text_len, prompt=PROMPT, answer="answer", protocol="vqa", **kw
) -> dict[str, Any]:
    """Dialogues of several `turns` on one image; each turn's prompt contains the previous questions and
    answers. See `paligemma_med.evaluators.dialogue`.

    Arguments as of `vqa_eval`; text_len is for the whole prompt, history included. Only PaliGemma's prompts: other
    systems' templates for several turns aren't written down here.
    """
    if isinstance(prompt, common_prompts.Prompt):
        raise ValueError("dialogue_eval has PaliGemma's prompts only.")
    section = vqa_eval(
        c,
        name,
        split,
        text_len=text_len,
        prompt=prompt,
        answer=answer,
        protocol=protocol,
        controls=("majority", "majority_type", "echo"),
        **kw,
    )
    turn = [
        _op("strfmt", prompt, outkey="prefix"),
        _op("tok", model=c.tokenizer, key="prefix"),
        _op("tok", model=c.tokenizer, key="septok", text=SEPARATOR),
    ]
    history_pp = [
        *turn,
        _op("copy", inkey="answer", outkey="suffix"),
        _op("tok", model=c.tokenizer, key="suffix"),
        _op("masked_concat", ["prefix", "septok", "suffix", "septok"], outkey="text"),
    ]
    prompt_pp = [
        *turn,
        _op("tok", model=c.tokenizer, key="bos", text="", bos="yes"),
        _op(
            "masked_concat", ["bos", "history", "prefix", "septok"], outkey="text", mask_ar=[0] * 4, mask_input=[1] * 4
        ),
        *prompt_lengths(text_len),
    ]
    return section | dict(type="dialogue", turns=turns, prompt_pp="|".join(prompt_pp), history_pp="|".join(history_pp))


def closed_eval(c, name, split, *, samples=5, **kw) -> dict[str, Any]:
    """The paper's protocol for closed questions: five samples at temperature 1, mean and standard
    deviation over runs, which questions aren't robust, and LLaVA-Med's closed metric.

    Arguments as of `vqa_eval`. The figures of answer_type/CLOSED are those of closed questions.
    """
    return vqa_eval(c, name, split, samples=samples, protocol="closed", **kw)


def open_eval(c, name, split, *, samples=1, **kw) -> dict[str, Any]:
    """Open questions by overlap of words: F1, recall, BLEU, ROUGE, CIDEr, with their controls.

    Arguments as of `vqa_eval`. An echo of the question scores well in some of these.
    """
    return vqa_eval(c, name, split, samples=samples, protocol="open", **kw)


def report_eval(c, name, split, *, samples=1, **kw) -> dict[str, Any]:
    """Generated reports and captions by the COCO evaluation's figures: BLEU-1 to -4, ROUGE-L, CIDEr.

    Arguments as of `vqa_eval`.
    """
    return vqa_eval(c, name, split, samples=samples, protocol="report", **kw)


def multiple_choice_eval(
    c,
    name,
    split,
    *,
    samples=5,
    choices=rows.CHOICES,
    keep=EVAL_KEYS,
    answer=rows.ANSWER_LETTER,
    options=None,
    **kw,
) -> dict[str, Any]:
    """Multiple choice by letter, by the nearest text, and by the likelihood of each choice; five
    samples at temperature 1 as in the paper.

    Args:
      choices: keys of the data that hold the choices' texts, in order. The data must have
        answer_letter.
      answer: key of what the model was trained to answer: the letter or, with "answer", the choice.
      options: which continuations of the prompt are scored, "letter" or "text"; by default the kind
        that `answer` is; "" scores none.
      Others as of `vqa_eval`. `prompt` must show the choices.
    """
    if options is None:
        options = "letter" if answer == rows.ANSWER_LETTER else "text"
    if prefix := getattr(kw.get("prompt"), "answer_prefix", ""):
        kw["answer_prefix"] = prefix
    return vqa_eval(
        c,
        name,
        split,
        samples=samples,
        keep=(*keep, *choices, rows.ANSWER_LETTER),
        answer=answer,
        protocol="multiple_choice",
        choices=choices,
        options=options,
        **kw,
    )
