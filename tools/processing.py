"""How a run reads images and questions, as files that transformers' PaliGemmaProcessor does the same by.

Nothing is inferred from the words of a pp string: it is tried on a picture and on questions, and what transformers can
do is compared with what it makes. What transformers can't do is a sentence, and the file isn't written.
"""

import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from paligemma_med.checkpoints.hf import tokens
from paligemma_med.pp import get_preprocess_fn, tokenizer

_MARK = "Zq7xW"  # what no prompt has
_NONE = "The tokenizer and the chat template aren't written (--processor=DIR copies them)"
_TRIED = ("Is the liver enlarged?", "what is 3  cm: (a) or <b>\u00e9\u6f22?")
_RESAMPLE = {"bilinear": PIL.Image.Resampling.BILINEAR, "bicubic": PIL.Image.Resampling.BICUBIC}


class Prompt(NamedTuple):
    """What stands before and behind a question, BOS and the line break left out, which the processor adds."""

    before: str
    behind: str


class Processing(NamedTuple):
    """What of a run transformers can do, and `notes`: sentences on what it can't.

    Attributes:
      tokenizer: the tokenizer's file; None if it isn't known.
      tokensets: {name: id} of the tokens behind those of the file.
      prompt: None if it isn't of the question alone.
      resample: a name of `_RESAMPLE`; None if images are made otherwise.
      new_tokens: tokens of the longest answer that an evaluation of the run lets the model give; None if there is none.
    """

    tokenizer: str | None = None
    tokensets: Mapping[str, int] = {}
    prompt: Prompt | None = None
    resample: str | None = None
    new_tokens: int | None = None
    notes: tuple[str, ...] = ()


def of_config(config: Mapping[str, Any] | None, side: int) -> Processing:
    """The processing of a run's config; `side` is that of the model's images in pixels."""
    config = config or {}
    pp, spec = config.get("predict_pp"), config.get("tokenizer")
    evals = [e for e in (config.get("evals") or {}).values() if isinstance(e, Mapping)]
    lengths = [(e.get("pred_kw") or {}).get("max_new_tokens") for e in evals]
    found = Processing(new_tokens=max((n for n in lengths if isinstance(n, int)), default=None))
    if not pp or not spec:
        missing = " and ".join(k for k, v in dict(predict_pp=pp, tokenizer=spec).items() if not v)
        return found._replace(notes=(f"{_NONE}: the source has no {missing}.",))
    try:
        name, path = tokenizer.file_of(spec)
        if name not in ("tiny", "gemma"):
            raise ValueError(f"PaliGemma's is Gemma's, and the run has {name}")
        tok = tokenizer.get_tokenizer(spec)
        made = _tried(pp, side)
    except (ValueError, OSError) as e:
        return found._replace(notes=(f"{_NONE}: {e}",))
    resample = next((name for name in _RESAMPLE if np.array_equal(made["image"], _resized(name, side))), None)
    prompt, notes = _prompt_of(pp, tok, side), ()
    if resample is None:
        notes += (
            "Images are made otherwise here than transformers' image processor can: the file written resizes to "
            f"{side} pixels by antialiased bilinear filtering, and answers may differ.",
        )
    if prompt is None:
        notes += ("The chat template isn't written: the run's prompt isn't its question between two fixed texts.",)
    return found._replace(tokenizer=path, tokensets=tok.tokensets, prompt=prompt, resample=resample, notes=notes)


def files(found: Processing, config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """{name: content} of the files beside the weights.

    Args:
      config: the export's config.json.
      processor: its preprocessor_config.json by default.

    Raises:
      CheckpointError: the tokenizer's ids don't fit the model, or transformers has no such tokenizer.
    """
    lengths = {} if found.new_tokens is None else dict(max_new_tokens=found.new_tokens)
    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    out = {"generation_config.json": dict(ids, do_sample=False, **lengths)}
    if found.resample:
        out["preprocessor_config.json"] = dict(processor, resample=int(_RESAMPLE[found.resample]))
    if found.tokenizer:
        made = tokens.make(found.tokenizer, config["image_token_index"], found.tokensets)
        out["tokenizer.json"] = json.dumps(made["tokenizer.json"], ensure_ascii=False)
        out["tokenizer_config.json"] = made["tokenizer_config.json"]
        if found.prompt:
            out["chat_template.jinja"] = _template(found.prompt)
    return out


def told(found: Processing, side: int, has_files: bool = True) -> list[str]:
    """Sentences on the processing, for a model card; `has_files`: whether `files` are beside the weights."""
    out = []
    if found.resample:
        out.append(
            f"Images are resized to {side} x {side} pixels by antialiased {found.resample} filtering, in training and "
            "by the image processor's settings."
            if has_files
            else f"Images were resized to {side} x {side} pixels by antialiased {found.resample} filtering: a "
            f"processor for it has image_processor.resample = {int(_RESAMPLE[found.resample])} (Google's has 3)."
        )
    if found.prompt:
        prompt = f"{found.prompt.before}{{question}}{found.prompt.behind}"
        by = ", which the chat template makes of a question" if has_files else ""
        out.append(f"Asked as in training: {prompt!r}{by}.")
    return [*out, *(found.notes if has_files else ())]


def told_of_adapter(config: Mapping[str, Any]) -> list[str]:
    """`told` for the adapter of a PaliGemma run, which is used with another processor; [] if the run doesn't say."""
    side = config.get("res")
    return told(of_config(config, side), side, has_files=False) if isinstance(side, int) else []


def _template(prompt):
    """A chat of one message, whose texts are the question. It doesn't write <image>: transformers' processor and vLLM
    put the image tokens in front, and a second set of them would ask for a second image."""
    before, behind = (json.dumps(part, ensure_ascii=False) for part in prompt)
    return (
        "{%- if messages | length != 1 or messages[0]['role'] != 'user' -%}\n"
        "{{- raise_exception('expected one message, of the user: a question about one image') -}}\n"
        "{%- endif -%}\n"
        "{{- " + before + " -}}\n"
        "{%- if messages[0]['content'] is string -%}\n"
        "{{- messages[0]['content'] -}}\n"
        "{%- else -%}\n"
        "{%- for part in messages[0]['content'] if part['type'] == 'text' -%}\n"
        "{{- part['text'] -}}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        "{{- " + behind + " -}}\n"
    )


def _tried(pp, side, question=_MARK):
    return get_preprocess_fn(pp)({"image": _picture(side)[1], "question": question})


def _picture(side):
    """A picture of another size than the model's: (PIL image, PNG)."""
    rng = np.random.default_rng(0)
    image = PIL.Image.fromarray(rng.integers(0, 256, (side + 37, side // 2 + 11, 3), np.uint8))
    out = io.BytesIO()
    image.save(out, "PNG")
    return image, out.getvalue()


def _resized(name, side):
    pixels = np.asarray(_picture(side)[0].resize((side, side), _RESAMPLE[name]))
    pp = get_preprocess_fn("value_range(-1, 1)")
    return pp({"image": pixels})["image"]


def _prompt_of(pp, tok, side):
    """The `Prompt` of a pp string; None if what transformers' processor makes of it differs in a token."""
    row = _tried(pp, side)
    ids = row["text"][row["mask_input"] > 0] if "mask_input" in row else row["text"]
    before, mark, behind = tok.to_str(ids.tolist(), stop_at_eos=False).partition(_MARK)
    if not mark or not behind.endswith("\n"):
        return None
    prompt = Prompt(before, behind[:-1])
    for question in _TRIED:
        row = _tried(pp, side, question)
        ids = row["text"][row["mask_input"] > 0] if "mask_input" in row else row["text"]
        if ids.tolist() != tok.to_int(f"{prompt.before}{question}{prompt.behind}\n", bos=True) or row.get("image_at"):
            return None
    return prompt
