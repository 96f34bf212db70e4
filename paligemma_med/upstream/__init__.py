"""Runs big_vision if it is available: finds it, makes it run on today's JAX, and registers our modules.

big_vision (github.com/google-research/big_vision) isn't on the package index, so it is optional, and
everything that imports it or TensorFlow is in this folder. Nothing else in the library imports this
folder. docs/big_vision.md has the commands.

`install` makes these names resolvable in big_vision's config strings:

    model_name = "paligemma_med"              paligemma_med.upstream.model
    pp_modules = [..., "paligemma_med"]       paligemma_med.upstream.pp_ops
    evals[...].type = "paligemma_med"         paligemma_med.upstream.evaluators
    data.name = "slake/en", ...               what `data_prep.build --file_format=tfrecord` built
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

COMMIT = "0127fb6"
# What its PaliGemma trainer imports in addition to this project's own dependencies.
REQUIRED = ("clu", "editdistance", "einops", "overrides", "tensorflow")
NAME = "paligemma_med"
ALIASES = {
    f"big_vision.models.{NAME}": "paligemma_med.upstream.model",
    f"big_vision.pp.{NAME}": "paligemma_med.upstream.pp_ops",
    f"big_vision.evaluators.{NAME}": "paligemma_med.upstream.evaluators",
}
_HOW = (
    f"clone https://github.com/google-research/big_vision at commit {COMMIT}, set BIG_VISION_DIR "
    "to that folder, and pip install 'paligemma_med[big-vision]'"
)


def locate() -> str:
    """The folder that holds the package `big_vision`, as a str.

    An importable one is preferred, then $BIG_VISION_DIR.

    Raises:
      ValueError: there is none; the message says how to get it.
    """
    folder = os.path.expanduser(os.environ.get("BIG_VISION_DIR", ""))
    spec = importlib.util.find_spec("big_vision")
    if spec and spec.origin:  # without __init__.py it is a clone that happens to be next to us
        return os.path.dirname(os.path.dirname(os.path.abspath(spec.origin)))
    if os.path.isfile(os.path.join(folder, "big_vision", "utils.py")):
        return os.path.abspath(folder)
    where = (
        f"BIG_VISION_DIR is {folder!r}, which holds no big_vision/utils.py"
        if folder
        else ("big_vision can't be imported, and BIG_VISION_DIR isn't set")
    )
    raise ValueError(f"{where}: {_HOW}.")


def missing() -> str:
    """Why big_vision can't run here, as one sentence; "" if it can. Imports nothing."""
    try:
        locate()
    except ValueError as e:
        return str(e)
    lacking = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if lacking:
        return f"big_vision needs {', '.join(lacking)}: pip install 'paligemma_med[big-vision]'."
    return ""


def found() -> bool:
    """Whether big_vision and what it needs can be imported here."""
    return not missing()


def install() -> str:
    """Makes `import big_vision` work, and our modules resolvable under its prefixes. Idempotent.

    Call it before big_vision or TensorFlow is imported. Our modules behind the aliases are imported when
    they are needed.

    Returns:
      The folder of the checkout.

    Raises:
      ValueError: big_vision or something it needs is missing.
    """
    if why := missing():
        raise ValueError(why)
    folder = locate()
    if folder not in sys.path:
        sys.path.append(folder)
    if not any(isinstance(f, _Aliases) for f in sys.meta_path):
        sys.meta_path.insert(0, _Aliases())
    from paligemma_med.upstream import shims

    shims.apply()
    return folder


class _Aliases(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Returns our own module object when big_vision imports an alias."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in ALIASES:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec):
        module = importlib.import_module(ALIASES[spec.name])
        self._own = module.__spec__
        return module

    def exec_module(self, module):
        module.__spec__ = self._own  # the import system has just replaced it
