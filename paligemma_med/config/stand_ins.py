"""Supplies what big_vision's config files import while they are read.

Such a file begins with `import big_vision.configs.common`. If it lies in a checkout, that checkout is
imported; otherwise an installed big_vision, then $BIG_VISION_DIR. If there is none, this file supplies
the two modules that the PaliGemma transfer configs need. Neither big_vision nor TensorFlow is required,
and after the file is read nothing of it stays imported.
"""

import contextlib
import importlib.abc
import importlib.machinery
import os
import pathlib
import sys
from collections.abc import Iterator

import ml_collections

from paligemma_med.config import arguments

TOKENIZER = 'gemma(tokensets=("loc", "seg"))'
_HOW = "set BIG_VISION_DIR to a checkout of big_vision, or write that part without it"


@contextlib.contextmanager
def importable(config_file=None) -> Iterator[None]:
    """A context in which `import big_vision…` works, as far as config files need it, and a config file that lies in
    a package (configs/) finds its neighbours, whatever else of that name can be imported.

    Args:
      config_file: the file to be read.
    """
    path, before = list(sys.path), {name for name in sys.modules if _is_its(name)}
    own, named = checkout_of(config_file), os.path.expanduser(os.environ.get("BIG_VISION_DIR", ""))
    root, package = _package_of(config_file)
    sys.path[:] = [*filter(None, (root, own)), *path, *([named] if _is_checkout(named) else [])]
    hidden = _hide(package, root)
    finder = _Finder()
    sys.meta_path.append(finder)  # last, so that it is only asked for what no other finder has
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.path[:] = path
        for name in [n for n in sys.modules if _is_its(n) and n not in before]:
            del sys.modules[name]
        if hidden:
            _hide(package, None)
            sys.modules.update(hidden)


def _package_of(config_file):
    """(folder, name) of the package that a file lies in, the outermost one; (None, None) if it lies in none."""
    if config_file is None or not os.path.exists(config_file):
        return None, None
    folder = pathlib.Path(config_file).resolve().parent
    top = None
    while (folder / "__init__.py").is_file():
        folder, top = folder.parent, folder.name
    return (str(folder), top) if top else (None, None)


def _hide(package, root):
    """Takes a package's modules out of sys.modules, unless they are those below `root`; gives them."""
    found = sys.modules.get(package) if package else None
    if found is None or (root and root in (str(pathlib.Path(p).resolve().parent) for p in found.__path__)):
        return {}
    names = [n for n in sys.modules if n.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def checkout_of(path) -> str | None:
    """The checkout of big_vision that contains a file, as a str, or None."""
    if path is None:
        return None
    return next((str(p) for p in pathlib.Path(path).resolve().parents if _is_checkout(p)), None)


def _is_checkout(folder):
    return os.path.isfile(os.path.join(folder, "big_vision", "configs", "common.py"))


def _is_its(module_name):
    return module_name.partition(".")[0] == "big_vision"


# --- big_vision.configs.common ---


def parse_arg(arg, lazy=False, **spec) -> ml_collections.ConfigDict:
    """The argument after the colon of --config=file.py:… as a ConfigDict.

    "res=448,final_split" sets two of `spec`; a name without a value becomes True. A text without "="
    and "," is the value of the first of `spec`, unless it is one of the names.

    Args:
      arg: the text, or None.
      lazy: accept names that aren't in `spec`.
      **spec: {name: default, which gives the type, or (default, type)}.

    Raises:
      ValueError: an unknown name, or a value of another type.
    """
    arg = arg or ""
    if arg and spec and "," not in arg and "=" not in arg and arg not in spec:
        arg = f"{next(iter(spec))}={arg}"
    kinds = {name: x[1] if isinstance(x, tuple | list) else type(x) for name, x in spec.items()}
    texts = [name for name, kind in kinds.items() if kind is str and not lazy]
    given = {name: "True" if text is None else text for name, text in arguments.split(arg, spec, texts)}
    if not lazy and (unknown := sorted(set(given) - set(spec))):
        raise ValueError(f"Config argument {unknown[0]!r} is unknown; known are {sorted(spec)}.")
    out = ml_collections.ConfigDict(type_safe=False)
    for name, default in spec.items():
        default, kind = default if isinstance(default, tuple | list) else (default, type(default))
        out[name] = _read(name, given.pop(name), kind) if name in given else default
    for name, text in given.items():
        out[name] = _guess(text)
    return out


def _read(name, text, kind):
    if kind is bool and text.lower() in ("true", "false", ""):
        return text.lower() == "true"
    with contextlib.suppress(ValueError, TypeError):
        if kind is not bool:
            return kind(text)
    raise ValueError(f"Config argument {name}={text!r}: expected {kind.__name__}.")


def _guess(text):
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


# --- big_vision.configs.proj.paligemma.transfers.common ---


def tok(**kw) -> str:
    """The pp op that tokenises a text, by default with `TOKENIZER`."""
    return f"tok({', '.join(f'{k}={v!r}' for k, v in {**kw, 'model': kw.get('model', TOKENIZER)}.items())})"


def combine_and_keep_train(text_len, before=(), sep="\n") -> str:
    """pp ops that turn the texts "prefix" and "suffix" into what training reads, one token longer than
    text_len."""
    lengths = [("text", 0), ("mask_ar", 1), ("mask_loss", 0)]
    return "|".join(
        [
            *before,
            tok(key="prefix", bos="yes"),
            tok(key="suffix", eos="yes"),
            tok(key="septok", text=sep),
            _concat(mask_ar=[0, 0, 1], mask_loss=[0, 0, 1]),
            *(f'tolen({text_len + 1}, pad_value={pad}, key="{key}")' for key, pad in lengths),
            _keep("image", *(key for key, _ in lengths)),
        ]
    )


def combine_and_keep_eval(text_len, keep=(), before=(), sep="\n") -> str:
    """pp ops that turn the text "prefix" into a prompt for decoding, and keep `keep` for the evaluator. An
    example's "suffix" would be the beginning of its answer."""
    lengths = [("text", 0), ("mask_ar", 1), ("mask_input", 0)]
    return "|".join(
        [
            *before,
            tok(key="prefix", bos="yes"),
            tok(key="septok", text=sep),
            'setdefault("suffix", "")',
            tok(key="suffix", eos="no"),
            _concat(mask_ar=[0, 0, 1], mask_input=[1, 1, 1]),
            *(f'tolen({text_len}, pad_value={pad}, key="{key}")' for key, pad in lengths),
            _keep("image", *(key for key, _ in lengths), *keep),
        ]
    )


def _concat(**masks):
    masks = ", ".join(f"{k}={v}" for k, v in masks.items())
    return f'masked_concat(["prefix", "septok", "suffix"], outkey="text", {masks})'


def _keep(*keys):
    return "keep({})".format(", ".join(f'"{key}"' for key in keys))


# --- Under big_vision's names ---

_MODULES = {
    "big_vision.configs.common": {"parse_arg": parse_arg},
    "big_vision.configs.proj.paligemma.transfers.common": {
        "TOKENIZER": TOKENIZER,
        "tok": tok,
        "combine_and_keep_train": combine_and_keep_train,
        "combine_and_keep_eval": combine_and_keep_eval,
    },
}


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Supplies the modules of `_MODULES`, and the packages above them."""

    def find_spec(self, fullname, path=None, target=None):
        if not _is_its(fullname):
            return None
        is_package = any(name.startswith(f"{fullname}.") for name in _MODULES)
        if fullname not in _MODULES and not is_package:
            raise ModuleNotFoundError(f"{fullname} isn't here: {_HOW}.", name=fullname)
        return importlib.machinery.ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module):
        def missing(name):
            if name.startswith("__"):  # the import system asks for these
                raise AttributeError(name)
            raise ImportError(f"{module.__name__} has no {name!r} here: {_HOW}.", name=module.__name__)

        vars(module).update(_MODULES.get(module.__name__, {}))
        if not module.__spec__.submodule_search_locations and module.__name__ in _MODULES:
            module.__getattr__ = missing
