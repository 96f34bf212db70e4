"""Images from folders and zip files: same behaviour, nothing leaves the root, damage is named."""

import hashlib
import io
import multiprocessing
import pickle
import zipfile

import numpy as np
import PIL.Image
import pytest

from data_prep.files import DataError
from data_prep.images import store as image_store
from data_prep.images.store import open_store

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"


def _png(value=0):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


FILES = {
    "images/a.png": _png(1),
    "images/deep/b.png": _png(2),
    "images/deep/a.png": _png(3),
    "images/pointer.png": POINTER,
    "images/half.png": _png(4)[:40],
    "__MACOSX/images/._a.png": b"\0\5",
    ".DS_Store": b"Bud1",
}


@pytest.fixture(params=["folder", "zip"])
def root(request, tmp_path):
    if request.param == "folder":
        for name, content in FILES.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return tmp_path / "root"
    with zipfile.ZipFile(tmp_path / "root.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.mkdir("images")
        for name, content in FILES.items():
            z.writestr(name, content)
    return tmp_path / "root.zip"


def test_reads_what_is_there(root):
    store = open_store(root)
    assert sorted(store.names()) == sorted(list(FILES)[:5])
    assert store.read("images/a.png") == store.read("images\\a.png") == FILES["images/a.png"]
    assert store.check("images/a.png").digest == hashlib.sha256(FILES["images/a.png"]).hexdigest()
    assert store.has("images/deep/b.png") and not store.has("b.png")
    assert not store.has("images") and not store.has("images/a.png/x")
    assert store.stamp("images/a.png") != store.stamp("images/deep/b.png")
    with pytest.raises(DataError, match="'b.png' is missing$"):
        store.read("b.png")


def test_by_name(root):
    store = open_store(root, by_name=True)
    assert store.read("b.png") == store.read("other/b.png") == FILES["images/deep/b.png"]
    assert store.read("images/a.png") == FILES["images/a.png"]
    assert not store.has("a.png")
    with pytest.raises(DataError, match="'a.png' lies in more than one of its folders"):
        store.read("a.png")


@pytest.mark.parametrize("name", ["../x", "images/../../x", "/etc/passwd", "C:\\x", "", "a\0b", 3])
def test_names_that_leave_the_root(root, name):
    store = open_store(root, by_name=True)
    for function in (store.has, store.read):
        with pytest.raises(DataError, match="inside"):
            function(name)


def test_damage_is_named(root):
    store = open_store(root)
    with pytest.raises(DataError, match="pointer.png: found a git-LFS pointer"):
        store.read("images/pointer.png")
    with pytest.raises(DataError, match="half.png: not a readable image"):
        store.check("images/half.png")


def _read_in_child(store, queue):
    queue.put(store.read("images/a.png"))


def test_other_processes_can_read(root):
    store = open_store(root, by_name=True)
    store.read("b.png")
    assert pickle.loads(pickle.dumps(store)).read("b.png") == FILES["images/deep/b.png"]
    assert len(pickle.dumps(store)) < 1000
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(store, queue)) for _ in range(2)]
    for child in children:
        child.start()
    for _ in children:
        assert queue.get(timeout=30) == FILES["images/a.png"]
    for child in children:
        child.join()


def test_zip_members_outside_or_backwards(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as z:
        z.writestr("../evil.png", _png())
        z.writestr("/abs.png", _png())
        z.writestr("win\\c.png", _png(9))
    store = open_store(tmp_path / "x.zip", by_name=True)
    assert list(store.names()) == ["win/c.png"]
    assert store.read("c.png") == store.read("win/c.png") == _png(9)
    assert not store.has("evil.png")


def test_broken_zip_files(tmp_path, monkeypatch):
    path = tmp_path / "x.zip"
    with pytest.raises(DataError, match="x.zip: can't be read .No such file"):
        open_store(path)
    path.write_bytes(POINTER)
    with pytest.raises(DataError, match="x.zip: found a git-LFS pointer, expected a zip file"):
        open_store(path)
    content = _png(5)
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a.png", content)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match="x.zip: not a whole zip file"):
        open_store(path)
    path.write_bytes(whole.replace(content[20:30], bytes(10)))
    with pytest.raises(DataError, match="x.zip/a.png: damaged or not readable"):
        open_store(path).read("a.png")
    path.write_bytes(whole)
    monkeypatch.setattr(image_store, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="a.png: .* expected an image of at most 10"):
        open_store(path).read("a.png")


def test_neither_folder_nor_zip(tmp_path):
    with pytest.raises(DataError, match="nothing: found no such folder"):
        open_store(tmp_path / "nothing")
