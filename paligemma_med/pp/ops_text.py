"""Ops on strings and tokens: prompt templates, tokenising, joining with masks, fixed length.

Names and arguments are those of big_vision's `pp/ops_text.py` and `pp/proj/paligemma/ops.py`. Two of
their silent failures are made visible: `tolen` records how many tokens it cut off, and `masked_concat`
refuses to put an answer into a prompt for decoding.
"""

import re
import string
from collections.abc import Callable

import numpy as np

from paligemma_med.pp.registry import Op, get, on_key, register, resolve_keys
from paligemma_med.pp.tokenizer import get_tokenizer


def as_str(value, what: str) -> str:
    """The string that `value` is, or a ValueError. Bytes are read as UTF-8."""
    if isinstance(value, np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bytes):
        return value.decode("utf-8")  # UnicodeDecodeError is a ValueError and says the position
    if not isinstance(value, str):
        raise ValueError(f"{what} must be one string, found {type(value).__name__}: {value!r}")
    return str(value)


def _show(value, key: str) -> str:
    """How `strfmt` writes a value: strings as they are, numbers, vectors as `[1 2 3]`."""
    if isinstance(value, (str, bytes)):
        return as_str(value, f"key {key!r}")
    array = np.asarray(value)
    if array.dtype.kind in "biuf" and array.ndim == 0:
        return str(array.item())
    if array.dtype.kind in "biufU" and array.ndim == 1:
        return "[" + " ".join(str(v) for v in array.tolist()) + "]"
    if array.dtype.kind in "OSU" and array.ndim == 0:
        return as_str(array.item(), f"key {key!r}")
    raise ValueError(f"key {key!r} is neither a string, a number nor a vector: {value!r}")


@register("strfmt")
def strfmt(template, outkey="text") -> Op:
    """Fills `{key}` fields of `template` from the example and stores the string in `outkey`.

    Only plain fields: no `{a.b}`, `{a[0]}`, `{0}`, `{a!r}` or `{a:>4}`, since a template must not
    reach into objects. Values are inserted, never parsed: braces in a question stay braces.
    `{{` and `}}` give literal braces.
    """
    parts = []
    for literal, field, spec, conversion in string.Formatter().parse(template):
        if field is not None and (not field or field.isdigit() or spec or conversion or set(field) & set(".[]!:")):
            raise ValueError(f"template {template!r}: only plain {{key}} fields are allowed, found {field!r}")
        parts.append((literal, field))

    def op(data, rng):
        del rng
        data[outkey] = "".join(
            literal + ("" if field is None else _show(get(data, field), field)) for literal, field in parts
        )
        return data

    return op


@register("lower")
@on_key("text")
def lower() -> Callable:
    """Lower-cases a string or each string of a list (all of Unicode; TF does ASCII only)."""

    def fn(text, rng):
        del rng
        if isinstance(text, (list, tuple)) or np.ndim(text) > 0:
            return [as_str(t, "each entry").lower() for t in text]
        return as_str(text, "the value").lower()

    return fn


@register("strip")
@on_key("text")
def strip() -> Callable:
    """Takes blanks and line breaks off both ends of a string: at the edge of a question they would merge with those of
    a template into other tokens."""

    def fn(text, rng):
        del rng
        return as_str(text, "the value").strip()

    return fn


@register("blip_text")
@on_key("text")
def blip_text(max_words=50) -> Callable:
    """The form in which BLIP, and MiniGPT-4 and PeFoMed after it, train on texts: lower case, `. ! " ( ) * # : ; ~` and
    runs of white space as one blank, at most `max_words` words (as LAVIS' BlipCaptionProcessor)."""
    if not isinstance(max_words, int) or max_words < 1:
        raise ValueError(f"max_words must be a whole number, 1 or more, found {max_words!r}")

    def fn(text, rng):
        del rng
        text = re.sub(r'[.!"()*#:;~]', " ", as_str(text, "the value").lower())
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
        return " ".join(text.split(" ")[:max_words])

    return fn


@register("strjoin")
@on_key()
def strjoin(glue, axis=None) -> Callable:
    """Joins a list of strings with `glue` between them."""
    if axis not in (None, 0, -1):
        raise ValueError(f"axis {axis} is not supported: lists of strings have one axis")

    def fn(texts, rng):
        del rng
        if isinstance(texts, (str, bytes)):
            raise ValueError(f"expected a list of strings, found one string {texts!r}")
        return glue.join(as_str(t, "each entry") for t in np.asarray(texts, object).ravel())

    return fn


def _to_length(tokens: np.ndarray, length, sticky_end: bool, pad_value) -> tuple[np.ndarray, int]:
    """(array of `length`, number of entries cut off); a falsy `length` leaves the array as it is."""
    if not length or len(tokens) == length:
        return tokens, 0
    if len(tokens) < length:
        if pad_value is None:
            raise ValueError("needs pad_value= or pad_key= to lengthen an array")
        return np.pad(tokens, (0, length - len(tokens)), constant_values=pad_value), 0
    cut = len(tokens) - length
    if sticky_end:
        return np.concatenate([tokens[: length - 1], tokens[-1:]]), cut
    return tokens[:length], cut


def _record_cut(data: dict, cut: int) -> None:
    # The maximum, because a text and its masks are cut by the same number of tokens.
    if cut:
        data["_truncated"] = np.int32(max(cut, int(data.get("_truncated", 0))))


@register("tolen")
def tolen(length, *, sticky_end=False, pad_value=None, pad_key=None, key=None, inkey=None, outkey=None) -> Op:
    """Pads or cuts a 1-D array to `length` entries (0 or None leaves it as it is).

    Args:
        length: number of entries wanted.
        sticky_end: when cutting, keep the last entry (the EOS) as the last one.
        pad_value: value to pad with, or
        pad_key: the example's key that holds it (the first entry if it is an array).
        key, inkey, outkey: which array; no default.

    `data["_truncated"]` (int32) says how many entries were cut off, the maximum over all calls: an
    example whose suffix or EOS is cut off has a loss of 0 there, and somebody has to count it.
    """
    if length and (not isinstance(length, int) or length < 0):
        raise ValueError(f"length must be a whole number, found {length!r}")
    source, target = resolve_keys(key, inkey, outkey)

    def op(data, rng):
        del rng
        array = np.asarray(get(data, source))
        if array.ndim != 1:
            raise ValueError(f"key {source!r} must be a 1-D array, found shape {array.shape}")
        value = pad_value
        if pad_key is not None:
            value = np.asarray(get(data, pad_key)).ravel()[0]
        data[target], cut = _to_length(array, length, sticky_end, value)
        if cut and int(data.get("image_at", 0)) > length:
            raise ValueError(
                f"the image stands behind {data['image_at']} tokens of text, but the text is cut to {length}: raise "
                "this length (text_len in configs)"
            )
        _record_cut(data, cut)
        return data

    return op


@register("tok")
def tok(model, length=None, *, bos="no", eos="no", special="no", text=None, key=None, inkey=None, outkey=None) -> Op:
    """Tokenises the string under a key, or the constant `text`, into int32[n].

    Args:
        model: tokenizer as for `get_tokenizer`, e.g. `tiny` or `gemma(tokensets=("loc","seg"))`.
        length: if given, cut or pad (with the pad token) to this many tokens, see `tolen`.
        bos: "yes" puts BOS first.
        eos: "yes" puts EOS last; "sticky" keeps it there even when the tokens are cut.
        special: what a name like "<start_of_turn>" in the string is. "no": characters like others; "yes", for the
            constant `text` only: the tokenizer's token of that name; "tokensets": its "<loc0000>"… and "<seg000>"…,
            for answers that are boxes.
        text: constant to tokenise in place of a key's value; `outkey` or `key` says where to.
        key, inkey, outkey: where the string is and where the tokens go; no default.
    """
    if bos not in ("no", "yes"):
        raise ValueError(f"bos must be 'no' or 'yes', found {bos!r}")
    if eos not in ("no", "yes", "sticky"):
        raise ValueError(f"eos must be 'no', 'yes' or 'sticky', found {eos!r}")
    if special not in ("no", "yes", "tokensets"):
        raise ValueError(f"special must be 'no', 'yes' or 'tokensets', found {special!r}")
    if special == "yes" and text is None:
        raise ValueError("special='yes' is for a constant text=…: a question could end its turn")
    if text is not None and inkey is not None:
        raise ValueError("takes either text= or inkey=, not both")
    source, target = resolve_keys(key, inkey or (outkey if text is not None else None), outkey)
    tokenizer = get_tokenizer(model)
    names = () if special == "no" else tokenizer.special if special == "yes" else tokenizer.tokensets

    def tokens_of(string_):
        ids = tokenizer.to_int(string_, bos=bos == "yes", eos=eos != "no", special=names)
        ids = np.asarray(ids, np.int32)
        return _to_length(ids, length, eos == "sticky", tokenizer.pad_token)

    constant = None if text is None else tokens_of(as_str(text, "text="))

    def op(data, rng):
        del rng
        if constant is None:
            tokens, cut = tokens_of(as_str(get(data, source), f"key {source!r}"))
        else:
            tokens, cut = constant
        data[target] = tokens
        _record_cut(data, cut)
        return data

    return op


@register("masked_concat")
def masked_concat(keys, outkey="text", *, allow_suffix=False, image_after=None, **masks) -> Op:
    """Joins token arrays and makes masks that are constant on each of them.

    Args:
        keys: keys of 1-D token arrays, in order.
        outkey: where the joined int32[n] goes (may be one of `keys`).
        allow_suffix: see below.
        image_after: one of `keys`, behind whose tokens the model reads the image: `data["image_at"]` (int32) says how
            many tokens stand before it. Without it the image is in front.
        **masks: name=[one number a key]; each gives `data[name]`, int32[n].

    A string with `mask_input` is a prompt for decoding. If `suffix` is among its keys and holds
    tokens, the answer of the example would be part of the prompt and the model graded on copying
    it, so that is an error. `allow_suffix=True` is for those who want decoding to continue a
    given text. (Ground truth is called `answer` in every data set here, for the same reason.)
    """
    for name, values in masks.items():
        if len(values) != len(keys):
            raise ValueError(f"{name} has {len(values)} values for {len(keys)} keys {list(keys)}")
    if image_after is not None and list(keys).count(image_after) != 1:
        raise ValueError(f"image_after={image_after!r} must be one of the keys {list(keys)}, once")

    def op(data, rng):
        del rng
        parts = [np.asarray(get(data, k)) for k in keys]
        for k, part in zip(keys, parts):
            if part.ndim != 1 or part.dtype.kind not in "iu":
                raise ValueError(f"key {k!r} must hold tokens, found {data[k]!r}: tok it first")
        if "mask_input" in masks and "suffix" in keys and not allow_suffix and len(data["suffix"]):
            raise ValueError(
                "the example has a non-empty 'suffix', which would put the answer into the prompt;"
                " call the ground truth 'answer', or drop('suffix') first, or pass"
                " allow_suffix=True to decode on from it"
            )
        sizes = [len(part) for part in parts]
        data[outkey] = np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
        if image_after is not None:
            data["image_at"] = np.int32(sum(sizes[: list(keys).index(image_after) + 1]))
        for name, values in masks.items():
            data[name] = np.repeat(np.asarray(values, np.int32), sizes)
        return data

    return op
