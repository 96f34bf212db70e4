"""A name for a folder that Orbax and TensorStore take as it is.

Orbax looks for its files by patterns into which it puts the folder's own name, so that in "cohort [2]" it finds none,
and TensorStore writes what belongs below "a\\b" to another place, "a/b". Neither takes a name that isn't UTF-8. Such a
folder is handed over as a link to it that has a plain name.
"""

import atexit
import functools
import os
import re
import shutil
import tempfile

_MISREAD = re.compile(r"[\\*?\[\]\ud800-\udfff]")


def plain_path(folder: os.PathLike | str) -> str:
    """The absolute path of a folder, or that of a link to it, which ends with the process. The folder must exist."""
    path = os.path.abspath(os.fspath(folder))
    return _link(path) if _MISREAD.search(path) else path


@functools.cache
def _link(path):
    folder = tempfile.mkdtemp(prefix="paligemma-med-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = os.path.join(folder, "checkpoints")  # the same in all processes of a run
    os.symlink(path, link)
    return link
