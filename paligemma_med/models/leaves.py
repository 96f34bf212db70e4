"""Trees of parameters and their flat form, {"img/head/kernel": array}."""

from collections.abc import Mapping


class TreeError(ValueError):
    """Parameters that can't be read, or that don't fit the model; the message says which and why."""


def flatten_tree(tree: Mapping, *, sep: str = "/") -> dict:
    """Nested mapping -> {"a/b": leaf}. Keys must be strings without `sep`, subtrees non-empty."""
    flat = {}

    def walk(node, path):
        if not isinstance(node, Mapping):
            flat[sep.join(path)] = node
            return
        if not node:
            raise TreeError(f"{sep.join(path) or 'the tree'} is empty: expected arrays in it")
        for key, child in node.items():
            if not isinstance(key, str) or not key or sep in key:
                where = f" under {sep.join(path)}" if path else ""
                raise TreeError(f"key {key!r}{where}: expected a non-empty string without {sep!r}")
            walk(child, (*path, key))

    if not isinstance(tree, Mapping):
        raise TreeError(f"expected a nested dict of arrays, found {type(tree).__name__}")
    walk(tree, ())
    return flat


def unflatten_tree(flat: Mapping, *, sep: str = "/") -> dict:
    """{"a/b": leaf} -> nested dict; a key that is both a leaf and a folder is an error."""
    tree = {}
    folders = {()}
    leaves = set()
    for key, leaf in flat.items():
        *parents, name = parts = tuple(key.split(sep))
        if "" in parts:
            raise TreeError(f"key {key!r} has an empty part between its slashes")
        node = tree
        for depth, part in enumerate(parents, 1):
            if parts[:depth] in leaves:
                raise TreeError(f"key {key!r}: {sep.join(parts[:depth])!r} is an array too")
            folders.add(parts[:depth])
            node = node.setdefault(part, {})
        if parts in folders or parts in leaves:
            raise TreeError(f"key {key!r} stands for more than one thing")
        leaves.add(parts)
        node[name] = leaf
    return tree
