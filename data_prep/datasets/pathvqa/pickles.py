"""Reads a pickle of lists, dicts, texts and numbers, as PathVQA's question files are, and nothing else.

A pickle is a program for a small machine, and Python's own reader runs whatever it says. Here the steps that
`pickletools` lists are followed for plain data alone; one that would import, call or build anything refuses the file.
So does a list or dict that stands at two places, of which small files could build huge or endless ones.
"""

import pickletools
from typing import Any

from data_prep.files import DataError

_MARK = object()
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE", "SHORT_BINSTRING", "BINSTRING", "STRING")
_NUMBERS = ("BININT", "BININT1", "BININT2", "INT", "LONG", "LONG1", "BINFLOAT", "FLOAT")
_MAKES = {
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_NOTHING = ("PROTO", "FRAME")


def load(content: bytes, where: str) -> Any:
    """The lists, dicts, texts and numbers that a pickle holds.

    Raises:
      DataError: damaged, cut off, or with anything else in it; `where` names the file.
    """
    stack, memo = [], {}
    try:
        for step, value, _ in pickletools.genops(content):
            if step.name == "STOP":
                (found,) = stack
                return found
            _follow(step.name, value, stack, memo)
    except DataError as e:
        raise DataError(f"{where}: {e}") from None
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError) as e:
        raise DataError(f"{where}: a damaged pickle ({str(e) or type(e).__name__:.80})") from None
    raise DataError(f"{where}: a damaged pickle (it doesn't end)")


def _follow(name: str, value: Any, stack: list, memo: dict) -> None:
    if name in _TEXTS or name in _NUMBERS:
        stack.append(value)
    elif name in _MAKES:
        stack.append(_MAKES[name]())
    elif name == "MARK":
        stack.append(_MARK)
    elif name in ("LIST", "DICT"):
        items = _to_mark(stack)
        stack.append(items if name == "LIST" else dict(_pairs(items)))
    elif name in ("APPEND", "APPENDS"):
        items = [stack.pop()] if name == "APPEND" else _to_mark(stack)
        _of(list, stack).extend(items)
    elif name in ("SETITEM", "SETITEMS"):
        items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else _to_mark(stack)
        _of(dict, stack).update(_pairs(items))
    elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
        memo[value] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("BINGET", "LONG_BINGET", "GET"):
        if isinstance(memo[value], (list, dict)):
            raise DataError("the pickle has one list or dict at two places; expected each for itself")
        stack.append(memo[value])
    elif name not in _NOTHING:
        raise DataError(
            f"the pickle has the step {name}, which plain data doesn't need; expected lists, dicts and texts"
        )


def _of(kind: type, stack: list) -> Any:
    if not isinstance(stack[-1], kind):
        raise ValueError(f"no {kind.__name__} to add to")
    return stack[-1]


def _to_mark(stack: list) -> list:
    items = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _pairs(items: list) -> list[tuple]:
    return list(zip(items[::2], items[1::2], strict=True))
