"""JSON from outside: one reader for the whole house, which refuses what the rest of it can't hold.

Python's own reads more than JSON has, and fails in more ways than one: lists nested so deeply that the next recursive
function fails, whole numbers of thousands of digits that no float holds, NaN, halves of surrogate pairs that can't be
written to UTF-8, another root than expected. Here each of these is one sentence with the file, the line or the key.
"""

import functools
import json
import math
import os
import re
from collections.abc import Iterator
from typing import Any

from paligemma_med.pp.files import is_lfs_pointer, lfs_message

# Far more than any file here has, far less than what Python's recursive functions can stand.
_DEPTH = 100
# Every whole number of so many digits is within a float's range.
_DIGITS = 300
_LINE = re.compile(r"\bline \d+$")
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_NAMES = {dict: "an object", list: "a list", str: "a text", bool: "a truth value", type(None): "null"}


class _Refused(ValueError):
    """JSON, but not what is read here; the message is the middle of a sentence."""


def _whole(text):
    if len(text) > _DIGITS:
        raise _Refused(f"a whole number of {len(text.lstrip('-')):,} digits, {text[:20]}…, which no float holds")
    return int(text)


def _float(text):
    value = float(text)
    if math.isinf(value):
        raise _Refused(f"the number {text:.40}, which no float holds")
    return value


def _constant(text):
    raise _Refused(f"{text}, which is not JSON")


@functools.cache
def decoder(constants: bool = False) -> json.JSONDecoder:
    """Python's decoder, made to refuse numbers that no float holds, and unless `constants` NaN and Infinity.

    What it decodes must still go through `check`. It raises ValueError (json.JSONDecodeError if it isn't JSON) and
    RecursionError.
    """
    return json.JSONDecoder(parse_int=_whole, parse_float=_float, parse_constant=None if constants else _constant)


def check(value: Any, text: str, halves: bool = False) -> None:
    """Raises ValueError, with the middle of a sentence, if a decoded value is nested too deeply, or unless `halves`
    has texts with half a surrogate pair; `text` is what it was decoded from."""
    level, depth = [value], 0
    while level := [x for x in level if isinstance(x, dict | list)]:
        depth += 1
        if depth > _DEPTH:
            raise _Refused(f"more than {_DEPTH} levels of lists and objects")
        level = [x for inner in level for x in (inner.values() if isinstance(inner, dict) else inner)]
    if not halves and _HALF.search(text) and (where := _half_in(value)) is not None:
        raise _Refused(f"half a surrogate pair{where}, which is no character")


def _half_in(value):
    """Where a decoded value has half a surrogate pair, as " in 'key'"; None if nowhere."""
    waiting = [(value, "")]
    while waiting:
        x, key = waiting.pop()
        if isinstance(x, str):
            if any("\ud800" <= c <= "\udfff" for c in x):
                return f" in {key!a}" if key else ""
        elif isinstance(x, list):
            waiting += [(y, key) for y in x]
        elif isinstance(x, dict):
            waiting += [(k, k) for k in x]
            waiting += [(y, k) for k, y in x.items()]
    return None


def parse(
    text: bytes | str,
    where: str,
    expected: str = "JSON",
    *,
    root: type | None = None,
    constants: bool = False,
    halves: bool = False,
    error: type[Exception] = ValueError,
) -> Any:
    """The value of a JSON text.

    Args:
      text: UTF-8, with or without a byte-order mark.
      where: file, and line or key, for messages.
      expected: what it should have been, for messages.
      root: dict or list; the type that the value must have.
      constants: whether NaN, Infinity and -Infinity are read; Python writes them, JSON has no such numbers.
      halves: whether texts may hold half a surrogate pair, for who writes them with care.
      error: class of what is raised.

    Raises:
      `error`, in one sentence: not UTF-8, not JSON, another root, nested more than 100 deep, numbers that no float
      holds, halves of surrogate pairs.
    """

    def refuse(found):
        return error(f"{where}: {found}; expected {expected}")

    if isinstance(text, bytes):
        if is_lfs_pointer(text):
            raise error(f"{where}: {lfs_message(expected)}")
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise refuse(f"not UTF-8 text at byte {e.start}") from None
    try:
        value = decoder(constants).decode(text)
        check(value, text, halves)
    except json.JSONDecodeError as e:
        if text and not text.strip("\0\r\n"):
            raise refuse(f"nothing but {text.count(chr(0)):,} NUL characters, as a power cut leaves them") from None
        line = "" if _LINE.search(where) else f"line {e.lineno} "
        raise refuse(f"not valid JSON at {line}column {e.colno} ({e.msg})") from None
    except RecursionError:
        raise refuse("JSON nested too deeply") from None
    except _Refused as e:
        raise refuse(f"found {e}") from None
    if root is not None and not isinstance(value, root):
        raise refuse(f"found {name_of(value)}")
    return value


def name_of(value: Any) -> str:
    """What a decoded value is, for messages: "a list", "the number 3", …"""
    return _NAMES.get(type(value)) or f"the number {value!r:.40}"


def shown(value: Any) -> str:
    """A decoded value for messages, at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def read(path: os.PathLike | str, expected: str, **kw) -> Any:
    """The value of a JSON file. Arguments and errors as of `parse`; OSError if the file can't be read."""
    with open(path, "rb") as f:
        return parse(f.read(), os.fspath(path), expected, **kw)


def lines(path: os.PathLike | str, expected: str, **kw) -> Iterator[tuple[int, Any]]:
    """Yields (number from 1, value) of each line of a file of JSON lines that isn't blank.

    Lines end at "\\n" alone: JSON's texts may hold other characters that `str.splitlines` splits at. Arguments and
    errors as of `parse`; OSError if the file can't be read.
    """
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, parse(line, f"{os.fspath(path)}, line {number}", expected, **kw)
