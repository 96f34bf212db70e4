"""Files and folders that appear whole or not at all.

They are written beside their place under another name, flushed to disk and moved there at the end.
"""

import contextlib
import os
import secrets
import shutil


@contextlib.contextmanager
def file(path):
    """In a `with`: a binary file to write, which becomes `path`; missing folders are made."""
    temporary = _beside(path)
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise
    _sync_folder(os.path.dirname(os.path.abspath(path)))


@contextlib.contextmanager
def folder(path, *, replaces=None):
    """In a `with`: an empty folder to fill, which becomes `path`; missing parents are made.

    Args:
      replaces: names; if `path` exists and has an entry of one of them, it is replaced. None
        replaces nothing. So a folder that holds something else is never lost by a slip of the pen.

    Raises:
      FileExistsError: `path` exists and is not to be replaced.
    """
    check_new(path, replaces=replaces)
    temporary = _beside(path)
    os.mkdir(temporary)
    try:
        yield temporary
        for parent, _, names in os.walk(temporary):
            for name in names:
                _sync_file(os.path.join(parent, name))
            _sync_folder(parent)
        _move(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync_folder(os.path.dirname(os.path.abspath(path)))


def check_new(path, *, replaces=None):
    """FileExistsError if `folder` would refuse `path`."""
    if not os.path.lexists(path):
        return
    if replaces is None:
        raise FileExistsError(f"{path} exists; pass overwrite to replace it")
    if not os.path.isdir(path) or not {*replaces} & {*os.listdir(path)}:
        names = " or ".join(replaces)
        raise FileExistsError(f"{path} exists and holds no {names}, so it is not overwritten")


def _move(temporary, path):
    if not os.path.lexists(path):
        os.rename(temporary, path)
        return
    # No file system exchanges two folders portably: for a moment there is none.
    old = _beside(path)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(path):
    parent, name = os.path.split(os.path.abspath(path))
    os.makedirs(parent, exist_ok=True)
    return os.path.join(parent, f".{name}.{secrets.token_hex(4)}.tmp")


def _sync_file(path):
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def _sync_folder(path):
    # Makes the rename itself durable. Windows and some network drives can't, and need not.
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
