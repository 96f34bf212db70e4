"""big_vision's weights files: round trips, and every bad file named."""

import io
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.checkpoints import CheckpointError, Lazy, npz
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.trees import assert_same, tree

BF16 = np.dtype(ml_dtypes.bfloat16)


# --- round trips ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["params/", ""])
@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16"])
def test_round_trip(tmp_path, prefix, dtype):
    params = tree()
    params["llm"]["count"] = np.arange(3, dtype=np.int32)
    npz.save_npz(tmp_path / "w.npz", params, dtype=dtype, prefix=prefix)
    back = npz.load_npz(tmp_path / "w.npz")
    want = {
        k: v if dtype is None or v.dtype.kind != "f" else v.astype(BF16 if "b" in dtype else dtype)
        for k, v in flatten_tree(params).items()
    }
    assert_same(back, unflatten_tree(want))
    keys = np.load(tmp_path / "w.npz").files
    assert all(k.startswith(prefix + "img/") or k.startswith(prefix + "llm/") for k in keys)


def test_bfloat16_lies_in_the_file_as_numpy_itself_would_save_it(tmp_path):
    array = np.arange(6).reshape(2, 3).astype(BF16)
    npz.save_npz(tmp_path / "ours.npz", {"a": array}, prefix="")
    np.savez(tmp_path / "numpys.npz", a=array)
    ours, numpys = (zipfile.ZipFile(tmp_path / f).read("a.npy") for f in ("ours.npz", "numpys.npz"))
    assert b"V2" in ours and ours == numpys
    assert_same(npz.load_npz(tmp_path / "numpys.npz"), {"a": array})


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i4", "|u1", "|b1", "bfloat16"]),
    st.booleans(),
)
def test_any_shape_and_dtype_comes_back(tmp_path_factory, shape, dtype, fortran):
    path = tmp_path_factory.mktemp("any") / "w.npz"
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    array = array.astype(BF16 if dtype == "bfloat16" else dtype)
    array = np.asfortranarray(array) if fortran else array
    npz.save_npz(path, {"a": {"b": array}})
    back = npz.load_npz(path)["a"]["b"]
    assert back.dtype.isnative and back.shape == array.shape
    np.testing.assert_array_equal(back, array)


def test_equal_trees_give_equal_bytes_whatever_the_order(tmp_path):
    params = tree()
    npz.save_npz(tmp_path / "a.npz", params)
    npz.save_npz(tmp_path / "b.npz", {"llm": params["llm"], "img": params["img"]})
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_jax_arrays_can_be_saved(tmp_path):
    import jax.numpy as jnp

    npz.save_npz(tmp_path / "w.npz", {"a": jnp.ones((2, 3), jnp.bfloat16)})
    assert_same(npz.load_npz(tmp_path / "w.npz"), {"a": np.ones((2, 3), BF16)})


def test_only_params_are_taken_from_a_file_that_holds_more(tmp_path):
    np.savez(tmp_path / "w.npz", **{"params/img/a": np.ones(2), "opt/img/a": np.zeros(2)})
    assert_same(npz.load_npz(tmp_path / "w.npz"), {"img": {"a": np.ones(2)}})


@pytest.mark.parametrize("prefix", ["params/", ""])
def test_subtree(tmp_path, prefix):
    params = tree()
    path = str(tmp_path / "w.npz")
    npz.save_npz(path, params, prefix=prefix)
    assert_same(npz.load_npz(path, "img"), params["img"])
    assert_same(npz.load_npz(path + ":img"), params["img"])
    assert_same(npz.load_npz(path, "llm/layers"), params["llm"]["layers"])
    with pytest.raises(CheckpointError, match=r"no subtree 'im'.*img, llm"):
        npz.load_npz(path, "im")
    with pytest.raises(CheckpointError, match="single array"):
        npz.load_npz(path, "img/head/bias")


def test_a_subtree_is_read_without_touching_the_rest(tmp_path):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as z:
        buffer = io.BytesIO()
        np.save(buffer, np.ones(3, np.float32))
        z.writestr("params/img/a.npy", buffer.getvalue())
        z.writestr("params/llm/a.npy", b"nonsense")
    assert_same(npz.load_npz(path, "img"), {"a": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match="params/llm/a"):
        npz.load_npz(path)


@pytest.mark.parametrize(
    "spec, want",
    [
        ("x.npz", ("x.npz", None)),
        ("x.npz:img", ("x.npz", "img")),
        ("/a:b/x.npz", ("/a:b/x.npz", None)),
        (r"C:\w\x.npz", (r"C:\w\x.npz", None)),
        (r"C:\w\x.npz:llm/layers", (r"C:\w\x.npz", "llm/layers")),
        ("gs://bucket/x.npz:img", ("gs://bucket/x.npz", "img")),
        ("a.npz:b/x.npz:img", ("a.npz:b/x.npz", "img")),
        ("http://host:80/x.NPZ", ("http://host:80/x.NPZ", None)),
        ("some/workdir:1", ("some/workdir:1", None)),
    ],
)
def test_split_spec(spec, want):
    assert npz.split_spec(spec) == want


def test_split_spec_wants_a_name_after_the_colon():
    with pytest.raises(CheckpointError, match="after the colon"):
        npz.split_spec("x.npz:")


# --- bad files ------------------------------------------------------------------------------------


def write(path, content):
    path.write_bytes(content)
    return path


def npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def zip_bytes(**entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        for name, content in entries.items():
            z.writestr(name, content)
    return buffer.getvalue()


GOOD = npz_bytes(**{"img/a": np.arange(300.0), "img/b": np.ones(3)})


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "not a readable .npz"),
        (b"just some text", "not a readable .npz"),
        (b"\x80\x04K\x01.", "not a readable .npz"),  # a pickle
        (GOOD[:10], "not a readable .npz"),
        (GOOD[: len(GOOD) // 2], "not a readable .npz"),
        (npy_bytes(np.ones(3)), "single array"),
        (zip_bytes(), "holds no arrays"),
        (zip_bytes(**{"word/document.xml": b"<a/>"}), "word/document.xml"),
        (zip_bytes(**{"img/a.npy": npy_bytes(np.ones(9))[:-8]}), "img/a"),
        (npz_bytes(**{"img/a": np.array([{}, None], dtype=object)}), "'img/a'.*pickled"),
        (npz_bytes(**{"img/a": np.array(["text"])}), "'img/a' has dtype <U4"),
        (npz_bytes(**{"img/a": np.zeros(2, "V3")}), "'img/a' has dtype"),
        (npz_bytes(**{"img/a": np.zeros(2, [("x", "f4")])}), "'img/a' has dtype"),
        (npz_bytes(**{"img": np.ones(1), "img/a": np.ones(1)}), "'img"),
        (npz_bytes(**{"img/a": np.ones(1), "img": np.ones(1)}), "'img"),
        (npz_bytes(**{"img//a": np.ones(1)}), "'img//a'"),
    ],
)
def test_a_bad_file_gives_one_error_with_its_name(tmp_path, content, says):
    path = write(tmp_path / "some weights.npz", content)
    with pytest.raises(CheckpointError, match=says) as e:
        npz.load_npz(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_an_object_array_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "went off"),))

    path = write(tmp_path / "w.npz", npz_bytes(a=np.array([Bomb()], dtype=object)))
    with pytest.raises(CheckpointError, match="'a'"):
        npz.load_npz(path)
    assert not (tmp_path / "went off").exists()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255), st.booleans())
def test_damage_anywhere_is_an_error_of_ours_or_does_no_harm(tmp_path_factory, at, flip, cut):
    content = bytearray(GOOD[:at] if cut else GOOD)
    if not cut:
        content[at] ^= flip
    path = write(tmp_path_factory.mktemp("bad") / "w.npz", bytes(content))
    try:
        back = npz.load_npz(path)
    except CheckpointError as e:
        assert str(path) in str(e)
    else:
        assert not cut
        for array in flatten_tree(back).values():  # a flipped byte may sit in a name or date
            assert array.tobytes() in (np.arange(300.0).tobytes(), np.ones(3).tobytes())


def test_a_missing_file_and_a_remote_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing.npz"):
        npz.load_npz(tmp_path / "nothing.npz")
    with pytest.raises(FileNotFoundError, match="local file"):
        npz.load_npz("gs://bucket/x.npz:img")


# --- saving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, says",
    [
        ({"a": {"b/c": np.ones(1)}}, "'b/c' under a"),
        ({"a": {1: np.ones(1)}}, "key 1"),
        ({"a": {}}, "a is empty"),
        ({"a": {"b": None}}, "a/b: expected an array of numbers, found NoneType"),
        ({"a": {"b": "text"}}, "a/b: expected an array of numbers, found str"),
        (np.ones(3), "nested dict"),
    ],
)
def test_what_can_not_be_saved_is_named_and_leaves_no_file(tmp_path, params, says):
    with pytest.raises(CheckpointError, match=says):
        npz.save_npz(tmp_path / "w.npz", params)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "w.npz"
    npz.save_npz(path, {"a": np.ones(3)})
    before = path.read_bytes()
    with pytest.raises(CheckpointError):
        npz.save_npz(path, {"a": np.zeros(3), "b": None})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_save_overwrites_makes_folders_and_wants_an_npz_name(tmp_path):
    path = tmp_path / "new" / "folder" / "w.npz"
    for value in (1.0, 2.0):
        npz.save_npz(path, {"a": np.full(2, value)})
        assert npz.load_npz(path)["a"][0] == value
    with pytest.raises(CheckpointError, match="ends in .npz"):
        npz.save_npz(tmp_path / "w.bin", {"a": np.ones(1)})


# --- leaves that stay in the file -----------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=4),
    st.sampled_from(["<f4", ">f4", "<f8", "<f2", "<i4", "|u1", "|b1", "bfloat16"]),
    st.booleans(),
)
def test_shape_and_dtype_are_known_before_reading(tmp_path_factory, shape, dtype, fortran):
    path = tmp_path_factory.mktemp("any") / "w.npz"
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    array = array.astype(BF16 if dtype == "bfloat16" else dtype)
    np.savez(path, a=np.asfortranarray(array) if fortran else array)
    leaf = npz.open_npz(path)["a"]
    back = np.asarray(leaf)
    assert isinstance(leaf, Lazy) and back.dtype.isnative
    assert (leaf.shape, leaf.dtype, leaf.nbytes) == (back.shape, back.dtype, back.nbytes)
    np.testing.assert_array_equal(back, array)


def test_saving_lazy_leaves_gives_equal_bytes_and_reads_one_at_a_time(tmp_path):
    params = tree()
    npz.save_npz(tmp_path / "a.npz", params)
    reading, done = [], []

    def watched(key, x):
        def read():
            reading.append(key)
            return np.asfortranarray(x)

        return Lazy(x.shape, x.dtype, read)

    flat = {k: watched(k, x) for k, x in flatten_tree(params).items()}
    npz.save_npz(tmp_path / "b.npz", unflatten_tree(flat), progress=done.append)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert reading == sorted(flat)
    assert sum(done) == sum(x.nbytes for x in flat.values())


def test_large_leaves_are_cast_and_written_in_pieces(tmp_path, monkeypatch):
    params = {"a": np.random.default_rng(0).normal(size=(33, 7)).astype(np.float32)}
    npz.save_npz(tmp_path / "a.npz", params, dtype="bfloat16")
    monkeypatch.setattr(npz, "_PIECE", 20)
    done = []
    npz.save_npz(tmp_path / "b.npz", params, dtype="bfloat16", progress=done.append)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert len(done) == 47 and sum(done) == params["a"].nbytes


def test_an_interrupted_write_leaves_nothing(tmp_path):
    npz.save_npz(tmp_path / "w.npz", tree(1))

    def interrupt(_):
        raise KeyboardInterrupt

    for name in ("new", "w"):
        with pytest.raises(KeyboardInterrupt):
            npz.save_npz(tmp_path / f"{name}.npz", tree(2), progress=interrupt)
    assert os.listdir(tmp_path) == ["w.npz"]
    assert_same(npz.load_npz(tmp_path / "w.npz"), tree(1))


def test_a_file_that_changes_while_in_use_is_an_error(tmp_path):
    npz.save_npz(tmp_path / "w.npz", {"a": np.ones((2, 3)), "b": np.ones(2)})
    opened = npz.open_npz(tmp_path / "w.npz")
    npz.save_npz(tmp_path / "w.npz", {"a": np.ones((3, 2))})
    with pytest.raises(CheckpointError, match="'params/a' changed while"):
        np.asarray(opened["a"])
    with pytest.raises(CheckpointError, match="'params/b' can't be read"):
        np.asarray(opened["b"])
