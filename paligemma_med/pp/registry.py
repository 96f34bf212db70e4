"""The pp mini-language: `op(args)|op(args)` strings, parsed without ever evaluating code.

A preprocessing string names ops in order, each with literal arguments, as in big_vision:

    decode|resize(224, antialias=True)|value_range(-1, 1)|strfmt("answer en {question}", "prefix")

`register` puts a builder under a name; the builder gets the string's arguments and returns
`op(data, rng) -> data`, where `data` is the example's dict (the op may change it: each example's
dict is a fresh one) and `rng` a `np.random.Generator` or None.
"""

import ast
import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Op = Callable[[dict, np.random.Generator | None], dict]

_OPS: dict[str, Callable[..., Op]] = {}
_BEFORE: dict[str, str] = {}  # op: the one that it has to come before


def register(name: str, before: str = "") -> Callable:
    """Decorator: registers a builder as pp op `name`, which in a pp string comes before another.

    ValueError: the name is taken.
    """

    def add(builder):
        if name in _OPS:
            raise ValueError(f"pp op {name!r} is registered already, by {_OPS[name].__module__}")
        _OPS[name] = builder
        if before:
            _BEFORE[name] = before
        return builder

    return add


def on_key(default: str | None = "image") -> Callable:
    """Decorator for builders of one-value ops: adds big_vision's `key`, `inkey` and `outkey`.

    The decorated builder returns `fn(value, rng) -> value`. `key` sets both of the others; without any
    of the three, the value is read from and written to `default`.
    """

    def wrap(builder):
        def build(*args, key=None, inkey=None, outkey=None, **kwargs):
            source, target = resolve_keys(key, inkey, outkey, default)
            fn = builder(*args, **kwargs)

            def op(data, rng):
                data[target] = fn(get(data, source), rng)
                return data

            return op

        own = inspect.signature(builder)
        extra = [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=None) for k in ("key", "inkey", "outkey")]
        build.__signature__ = own.replace(parameters=[*own.parameters.values(), *extra])
        build.__doc__, build.__module__ = builder.__doc__, builder.__module__
        return build

    return wrap


def resolve_keys(key, inkey, outkey, default=None) -> tuple[str, str]:
    """(key to read, key to write) from the three arguments, as big_vision reads them."""
    source, target = inkey or key or default, outkey or key or default
    if not source or not target:
        raise ValueError("needs key=, or both inkey= and outkey=")
    return source, target


def get(data: Mapping, key: str) -> Any:
    """`data[key]`, or a ValueError that lists the existing keys."""
    if key not in data:
        raise ValueError(f"there is no key {key!r}; the example has {sorted(data)}")
    return data[key]


def need_rng(rng: np.random.Generator | None) -> np.random.Generator:
    """The generator, or a ValueError if it is None: a random op never falls back on a global seed."""
    if rng is None:
        raise ValueError("is random and got no rng: call fn(data, rng) with a np.random.Generator")
    return rng


def parse_call(text: str) -> tuple[str, tuple, dict[str, Any]]:
    """Parses `name` or `name(literals…)` into (name, args, kwargs).

    Raises ValueError for anything else: attribute access, operators, names or calls as arguments,
    `*` and `**`.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        raise ValueError(f"{text!r} is not of the form name(arguments): {e}") from e
    if isinstance(node, ast.Name):
        return node.id, (), {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise ValueError(f"{text!r} is not of the form name or name(arguments)")
    args = tuple(_literal(arg, text) for arg in node.args)
    kwargs = {}
    for kw in node.keywords:
        if kw.arg is None:
            raise ValueError(f"{text!r}: ** arguments are not allowed, write them out")
        kwargs[kw.arg] = _literal(kw.value, text)
    return node.func.id, args, kwargs


def _literal(node: ast.expr, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as e:
        found = ast.get_source_segment(text.strip(), node) or ast.dump(node)
        raise ValueError(
            f"{text!r}: argument {found!r} is not a literal (number, string, list, tuple, dict, True, False or None)"
        ) from e


def split(pp: str) -> list[str]:
    """Cuts a pp string at each `|` outside of quotes and brackets; empty sections are dropped."""
    sections, start, depth, quote, i = [], 0, 0, None, 0
    while i < len(pp):
        c = pp[i]
        if quote:
            if c == "\\":
                i += 1  # the escaped character cannot close the string
            elif c == quote:
                quote = None
        elif c in "'\"":
            quote = c
        elif c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "|" and depth <= 0:
            sections.append(pp[start:i])
            start = i + 1
        i += 1
    if quote:
        raise ValueError(f"pp string ends inside a {quote} string: {pp!r}")
    sections.append(pp[start:])
    return [s.strip() for s in sections if s.strip()]


def build(section: str) -> Op:
    """Builds the op that one section of a pp string names; errors say which section is wrong."""
    name, args, kwargs = parse_call(section)
    if name not in _OPS:
        near = difflib.get_close_matches(name, _OPS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(_OPS))}"
        raise ValueError(f"unknown pp op {name!r}; {hint}")
    try:
        inspect.signature(_OPS[name]).bind(*args, **kwargs)
    except TypeError as e:
        raise ValueError(f"pp op {section!r}: {e}; its arguments are {name}{inspect.signature(_OPS[name])}") from e
    try:
        return _OPS[name](*args, **kwargs)
    except ValueError as e:
        raise ValueError(f"pp op {section!r}: {e}") from e


class PreprocessFn:
    """What `get_preprocess_fn` returns: the built ops of one pp string, callable on an example.

    Built immediately, so that a mistake in a config shows before any data is read. Only the string is
    pickled: worker processes build the ops again, and no tokenizer is sent to them.
    """

    def __init__(self, pp: str):
        if not isinstance(pp, str):
            raise ValueError(f"a pp string is expected, found {type(pp).__name__}: {pp!r}")
        self.pp = pp
        self._ops = None
        self._build()

    def _build(self):
        if self._ops is None:
            self._ops = [(section, build(section)) for section in split(self.pp)]
            names = [parse_call(section)[0] for section, _ in self._ops]
            if wrong := [n for i, n in enumerate(names) if _BEFORE.get(n) in names[:i]]:
                raise ValueError(f"pp op {wrong[0]!r} comes before {_BEFORE[wrong[0]]!r}, found after it: {self.pp!r}")
        return self._ops

    def __call__(self, data: Mapping, rng: np.random.Generator | None = None) -> dict:
        """Applies the ops in order to a copy of `data`.

        Args:
            data: the example: key -> str, bytes, number or numpy array. Not changed.
            rng: for the ops that are random.

        Returns:
            A new dict.

        Raises:
            ValueError: names the op, what was wrong, and the example's question_id/image_id.
        """
        out = dict(data)
        for section, op in self._build():
            try:
                out = op(out, rng)
            except ValueError as e:
                row = ", ".join(f"{k} {data[k]!r}" for k in ("question_id", "image_id") if k in data)
                raise ValueError(f"pp op {section!r}{f' on {row}' if row else ''}: {e}") from e
        return out

    def __getstate__(self):
        return {"pp": self.pp, "_ops": None}

    def __repr__(self):
        return f"PreprocessFn({self.pp!r})"
