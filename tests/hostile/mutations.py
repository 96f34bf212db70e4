"""Wrong versions of a right JSON file: values of other types and sizes, lost keys, damaged text; always the same."""

import copy
import json
import random

ODD = (
    *(None, True, False, 0, -1, 3, 1.5, -0.0, 10**30, -(10**30), 2**63, 1e308, -1e308, 1e-320),
    *("", " ", "x", "²", "\u2028", "\0", "../x", "/etc/passwd", "(", "false", "1e999", "NaN", "@", "-", "a" * 5000),
    *([], {}, [[]], [{}], [None], [1, "x"], {"": 0}, {"a": None}, {"x": {"y": []}}),
)
# What no Python value writes; it takes the place of a mark.
RAW = (
    *("9" * 5001, "1" * 400, "1e999", "-1e999", "NaN", "Infinity", "-Infinity", '"\\ud800"', '"a\\udfffb"'),
    *("[" * 3000 + "]" * 3000, '{"a":' * 200 + "1" + "}" * 200, "tru", "'x'", "", "01", "0x10"),
)
WHOLE = (b"", b"\0" * 512, b"\n\n", b"[]", b"{}", b"3", b"null", b'"x"', b"[" * 100_000, b"\x89PNG\r\n")
_MARK = "\uf8ff-mark-\uf8ff"


def _places(value, path=()):
    """Paths of all nodes below the root."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from _places(child, (*path, key))


def _parent(value, path):
    for key in path[:-1]:
        value = value[key]
    return value


def _of_tree(value, rng):
    """Changes a value in place at one node; returns the text that stands for the mark."""
    path = rng.choice(list(_places(value)) or [None])
    if path is None:
        return ""
    parent, key = _parent(value, path), path[-1]
    kind = rng.randrange(8)
    if kind == 0:
        parent[key] = _MARK
        return rng.choice(RAW)
    if kind == 1:
        del parent[key]
    elif kind == 2 and isinstance(parent, dict):
        parent[rng.choice(["", "x", "²", str(key).upper(), f" {key}"])] = parent.pop(key)
    elif kind == 2:
        parent.insert(key, copy.deepcopy(parent[key]))
    elif kind == 3:
        other = rng.choice(list(_places(value)))
        parent[key] = copy.deepcopy(_parent(value, other)[other[-1]])
    else:
        parent[key] = copy.deepcopy(rng.choice(ODD))
    return ""


def of_bytes(data, rng) -> bytes:
    """Some bytes with one thing wrong: cut, overwritten, with others before or in between; or something else."""
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + b"\0" * 64 + data[at + 64 :]
    if kind == 2:
        return data[:at] + b"\xff\xfe" + data[at:]
    if kind == 3:
        return data[at:]
    if kind == 4:
        return b"\xef\xbb\xbf" + data
    if kind == 5:
        return rng.choice(
            [b"", b"\0" * 512, b"\n\n", b"[]", b"{}", b"3", b"null", b'"x"', b"[" * 100_000, b"\x89PNG\r\n"]
        )
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def mutations(good, count, seed=0, lines=False):
    """Yields `count` wrong files as bytes; a few may be right all the same.

    Args:
      good: the value of the right file; with `lines` a list of the values of its lines.
    """
    rng = random.Random(seed)
    for _ in range(count):
        value = copy.deepcopy(good)
        raw = [_of_tree(value, rng) for _ in range(rng.choice([1, 1, 1, 2, 3]))]
        texts = [json.dumps(x, ensure_ascii=rng.random() < 0.5) for x in (value if lines else [value])]
        data = ("\n".join(texts) + "\n").encode("utf-8", "surrogatepass")
        mark = json.dumps(_MARK).encode(), json.dumps(_MARK, ensure_ascii=False).encode()
        for text in filter(None, raw):
            data = data.replace(mark[0], text.encode(), 1).replace(mark[1], text.encode(), 1)
        yield of_bytes(data, rng) if rng.random() < 0.15 else data


def check(read, path, good, errors, count=60, seed=0, lines=False):
    """Feeds `read(path)` wrong files; only `errors` may be raised, with messages that can be shown.

    Returns:
      How many were refused.
    """
    refused = 0
    for i, data in enumerate(mutations(good, count, seed, lines)):
        path.write_bytes(data)
        try:
            read()
        except errors as e:
            refused += 1
            assert type(e) not in (UnicodeDecodeError, UnicodeEncodeError, json.JSONDecodeError), f"case {i}: {e!r}"
            assert str(e).strip() and len(str(e)) < 100_000, f"case {i}: {e!r:.300} on {data!r:.300}"
            str(e).encode()
        except Exception as e:
            raise AssertionError(f"case {i}: {type(e).__name__}: {e!s:.200} on {data!r:.600}") from e
    return refused
