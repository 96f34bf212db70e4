"""Files from outside: the default data folder, names that become paths, git-LFS pointers, and what to quote of other
libraries' errors."""

import os
import pathlib
import re
from typing import Any

_LFS_HEAD = b"version https://git-lfs.github.com/spec/"


def default_data_dir() -> pathlib.Path:
    """$TFDS_DATA_DIR, else ~/tensorflow_datasets, TFDS' own default."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def is_lfs_pointer(content: bytes) -> bool:
    """True for the ~130-byte text that git leaves in place of a file kept in git-LFS."""
    return content[: len(_LFS_HEAD)] == _LFS_HEAD


def lfs_message(what: str) -> str:
    """The rest of a message, after the file's name, about a git-LFS pointer in place of `what`."""
    return (
        f"found a git-LFS pointer, expected {what}; run `git lfs pull` where the folder was "
        "cloned, or download the file itself"
    )


def reason(error: Exception) -> str:
    """What an error of another library says, in one line without addresses of objects, at most 300 characters."""
    return re.sub(r" ?<[\w.]+ object at 0x[0-9a-f]+>", "", one_line(str(error)))[:300] or type(error).__name__


def one_line(text: str) -> str:
    """A message that quotes a stranger's file, fit for a terminal: no line breaks, no control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


def path_inside(root: os.PathLike | str, name: Any) -> pathlib.Path:
    """`root` joined with a relative path that a config, a table or another file names; never leaves `root`.

    Every such name comes through here. Windows separators are accepted (several released sets have them). Only the text
    of the path is checked: links inside `root` are the user's own and are followed.

    Raises:
      ValueError: empty, absolute, with a drive letter, a NUL or a `..` part, or not a string.
    """
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"expected a relative path inside {root}, found {name!r}")
    parts = name.replace("\\", "/").split("/")
    if "\0" in name or parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise ValueError(f"path {name!r} would leave {root}; expected a relative path inside it")
    return pathlib.Path(root).joinpath(*parts)
