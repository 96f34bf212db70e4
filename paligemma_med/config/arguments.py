"""The arguments of a config file, after the colon of --config=file.py:res=448,init=/x/w.npz, as (name, value) pairs.

Commas separate them, but paths have commas, too. A piece that is no argument itself belongs to the text before it, and
a value in quotes is taken as it is.
"""

import re
from collections.abc import Collection

# For messages about unknown arguments.
QUOTES = "A path with commas stands in quotes: init='a,b.npz'."

_PIECE = re.compile(r"""[^,=]*=(?P<quote>["']).*?(?P=quote)(?=,|$)|[^,]*""")


def split(text: str | None, known: Collection[str], texts: Collection[str]) -> list[tuple[str, str | None]]:
    """[(name, value or None where there is no "="), …] in order.

    Args:
      text: "res=448,init=/weights/a, b.npz,tiny"; None is empty.
      known: names of arguments.
      texts: those whose value is a text. A piece without "=" that follows one of them, and can't be a name, is the
        rest of its value, comma included.
    """
    out = []
    for piece in _pieces(text or ""):
        name, has_value, value = piece.partition("=")
        if out and out[-1][0] in texts and out[-1][1] is not None and name not in known and not name.isidentifier():
            out[-1] = (out[-1][0], f"{out[-1][1]},{piece}")
        elif piece:
            out.append((name, value if has_value else None))
    return [(name, _bare(value)) for name, value in out]


def _pieces(text):
    at = 0
    while at <= len(text):
        match = _PIECE.match(text, at)
        yield match[0]
        at = match.end() + 1


def _bare(value):
    is_quoted = value and len(value) > 1 and value[0] == value[-1] and value[0] in "\"'"
    return value[1:-1] if is_quoted else value
