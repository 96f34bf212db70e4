"""Files and folders that appear whole or not at all, whatever happens while they are written.

They are written beside their place under a hidden name, flushed to disk and moved there at the end. A program that is
killed leaves the hidden one, and what was there before; `sweep` removes such leavings. (`data_prep.files` has a
`whole_file` of its own, since the data are built without this package.) `sole_use` keeps a second program out of a
folder that grows.
"""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Iterator
from typing import BinaryIO

from absl import logging


@contextlib.contextmanager
def whole_file(path: os.PathLike | str) -> Iterator[BinaryIO]:
    """In a `with`: a binary file to write, which becomes `path`; missing folders are made.

    Several that belong together take their places in the reverse order of the `with`: the first one is there last.

    Raises:
      OSError: `path` can't be written, such as on a full disk; it names `path`.
    """
    temporary = _temporary(path)
    try:
        with named(path), open(temporary, "xb") as f:
            _mark_as_used(f)
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
def named(path: os.PathLike | str) -> Iterator[None]:
    """Gives an error of writing, which has no file's name, that of `path`."""
    try:
        yield
    except OSError as e:
        if e.errno is None or e.filename is not None:
            raise
        raise OSError(e.errno, e.strerror, os.fspath(path)) from e


def write_text(path: os.PathLike | str, text: str, *, errors: str = "strict") -> None:
    """Writes `text` as the UTF-8 file `path`, whole or not at all. errors: as in `str.encode`."""
    with whole_file(path) as f:
        f.write(text.encode("utf-8", errors))


@contextlib.contextmanager
def whole_folder(path: os.PathLike | str, *, replaces: Collection[str] | None = None) -> Iterator[str]:
    """In a `with`: an empty folder to fill, which becomes `path`; missing parents are made.

    Args:
      replaces: names; if `path` exists and has an entry of one of them, it is replaced. None replaces nothing. So a
        mistyped path never costs a folder that holds something else.

    Raises:
      FileExistsError: `path` exists and is not to be replaced.
    """
    _check_new(path, replaces)
    sweep(path)
    temporary = _temporary(path)
    os.mkdir(temporary)
    handle = os.open(temporary, os.O_RDONLY)
    try:
        _mark_as_used(handle)
        with named(path):
            yield temporary
            for parent, _, names in os.walk(temporary):
                for name in names:
                    _sync_file(os.path.join(parent, name))
                _sync_folder(parent)
        _move(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        os.close(handle)
    _sync_folder(os.path.dirname(os.path.abspath(path)))


def sweep(path: os.PathLike | str) -> None:
    """Removes what killed writers of `path` left beside it: hidden, older than a minute, and locked by nobody.

    `whole_folder` does so itself. A file is worth it if it is large, since the folder around it is looked through.
    """
    parent, name = os.path.split(os.path.abspath(path))
    left = re.compile(re.escape(f".{name}.") + r"[0-9a-f]{8}\.tmp")
    for entry in os.scandir(parent) if os.path.isdir(parent) else ():
        if left.fullmatch(entry.name) and abs(time.time() - entry.stat(follow_symlinks=False).st_mtime) > 60:
            with contextlib.suppress(OSError):
                _remove_unused(entry.path)


def _remove_unused(path):
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # or OSError: it is still written, or can't be locked
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    finally:
        os.close(handle)


def _mark_as_used(handle):
    """Locks a file or folder until it is closed, or the process ends."""
    with contextlib.suppress(OSError):  # some network file systems have no locks, and `sweep` then leaves it
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _check_new(path, replaces):
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
    old = _temporary(path)
    os.rename(path, old)
    try:
        os.rename(temporary, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _temporary(path):
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


@contextlib.contextmanager
def sole_use(folder: os.PathLike | str, remedy: str) -> Iterator[None]:
    """In a `with`: no second process, on this host or another, is in such a `with` for `folder`, which must exist.

    The lock is the operating system's (flock, which NFS passes on to its server), so it ends with the process,
    however that ends. The file .lock, which is held, names host and process, and is removed at the end.

    Args:
      remedy: the rest of the message: what to do instead of waiting.

    Raises:
      OSError: another process has it, or the folder can't be written to.
    """
    path = os.path.join(folder, ".lock")
    try:
        lock = _lock(path, folder)
    except BlockingIOError:
        user = _user(path) or "another process"
        raise OSError(f"{folder} is in use by {user}: wait for its end, or {remedy}.") from None
    except OSError as e:
        raise OSError(f"{path} can't be written: {e.strerror or e}.") from None
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # the folder may be gone
                os.remove(path)


def _lock(path, folder):
    """The file, open and locked, with this process's name in it. BlockingIOError: another process has it."""
    while True:
        lock = open(path, "a+", encoding="utf-8")
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise
            except OSError as e:  # a network file system without locks
                if _is_running_here(path):
                    raise BlockingIOError from None
                logging.warning("%s can't be locked (%s): a second run there would not be noticed.", folder, e.strerror)
            if os.path.exists(path) and os.path.samestat(os.fstat(lock.fileno()), os.stat(path)):
                break
        except BaseException:
            lock.close()
            raise
        lock.close()  # its last user has just removed it
    if (user := _user(path)) and not _is_of_this_host(user):
        # It was killed, or the lock isn't passed on between hosts.
        logging.warning("%s: %s didn't end by itself; if it is still running, stop one of the two.", folder, user)
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M')}")
    lock.flush()
    return lock


def _user(path):
    """Who uses a folder, as its .lock says; None if that says nothing."""
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return (re.match(r"process \d+ on \S+ since [\d :-]+", f.read(400)) or [None])[0]
    except OSError:
        return None


def _is_of_this_host(user):
    return user.split()[3] == socket.gethostname()


def _is_running_here(path):
    user = _user(path)
    if not user or not _is_of_this_host(user) or int(user.split()[1]) == os.getpid():
        return False
    try:
        os.kill(int(user.split()[1]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
