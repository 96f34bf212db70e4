"""JAX's persistent compilation cache in the workdir, so that a resumed run doesn't compile again.

On GPUs it also keeps the same kernels, which a new compilation would choose anew by timing them, so a
resumed run stays closer to the original.
"""

import os

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache

from paligemma_med.parallel import distributed, jax_private


def start(setting, workdir) -> str | None:
    """Sets up JAX's cache; call it before anything is compiled.

    Args:
      setting: config.compilation_cache: True for <workdir>/compilation_cache, False for none, or a
        folder. The environment's JAX_COMPILATION_CACHE_DIR overrides it.

    Returns:
      The folder, or None.

    Raises:
      ValueError: `setting` is something else.
    """
    if not isinstance(setting, bool | str) or setting == "":
        raise ValueError(f"config.compilation_cache is {setting!r}; expected True, False or a folder.")
    if folder := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return folder
    folder = None
    if setting:
        name = os.path.join(workdir, "compilation_cache") if setting is True else setting
        folder = os.path.abspath(os.path.expanduser(name))
        if distributed.is_main():  # only this process writes entries
            _remove_cut_entries(folder)
    if folder != jax.config.jax_compilation_cache_dir:
        compilation_cache.set_cache_dir(folder)
        compilation_cache.reset_cache()  # or a folder that is already open would stay in use
    return folder


def _remove_cut_entries(folder):
    """Removes entries that a killed process left half written. JAX would only warn, compile and never
    rewrite them, so every later start would compile."""
    if not os.path.isdir(folder):
        return
    for entry in os.scandir(folder):
        if not entry.name.endswith("-cache"):
            continue
        with open(entry.path, "rb") as f:
            whole = jax_private.is_whole_cache_entry(f.read())
        if not whole:
            logging.warning("%s was cut off, perhaps by a kill; removed.", entry.path)
            os.remove(entry.path)
