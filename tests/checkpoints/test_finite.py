"""Weights that aren't finite floats are refused by whoever reads them, with the file and the leaf."""

import ml_dtypes
import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, bv, finite, forms, npz, orbax, peft
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints import adapters
from tests.checkpoints.trees import tree
from tests.models import hf as models

LEAF = "img/Transformer/encoderblock/mlp/kernel"
TYPES = ["float64", "float32", "float16", ml_dtypes.bfloat16]


def spoilt(value, dtype=np.float32):
    """A tree with one odd number in one leaf."""
    flat = flatten_tree(tree())
    flat[LEAF] = flat[LEAF].astype(dtype)
    flat[LEAF][2, 5, 7] = value
    return unflatten_tree(flat)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_among_many(dtype, value):
    x = np.random.default_rng(0).standard_normal((3, 50_001)).astype(dtype)
    assert finite.is_finite(x) and finite.is_finite(x.T) and finite.is_finite(x[:, ::2])
    for at in ((0, 0), (1, 30_000), (2, 50_000)):
        y = x.copy()
        y[at] = value
        assert not finite.is_finite(y) and not finite.is_finite(y.T)
        y[at] = finite_extreme(dtype)
        assert finite.is_finite(y)
    assert finite.is_finite(x[:0]) and finite.is_finite(x[0, 0])


def finite_extreme(dtype):
    """The largest number that weights of a type may have."""
    return min(float(ml_dtypes.finfo(dtype).max), float(np.finfo(np.float32).max))


def test_numbers_that_float32_does_not_hold_are_infinite():
    x = np.array([1.0, 1e39])
    with pytest.raises(CheckpointError, match=r"^f: a has 1 of 2 numbers .* at \[1\]; expected finite weights"):
        finite.check(x, "f: a")


def save(form, path, params):
    """Writes a tree in one of the forms; returns its spec."""
    if form == "npz":
        npz.save_npz(path.with_suffix(".npz"), params)
        return str(path.with_suffix(".npz"))
    if form == "orbax":
        orbax.save_orbax(path, params)
        return str(path)
    bv.save_bv(path / "checkpoint.bv", 1, {"params": params, "opt": {}, "chrono": {}})
    return str(path)


@pytest.mark.parametrize("form", ["npz", "orbax", "big_vision"])
def test_every_form_is_checked_when_a_leaf_is_read(tmp_path, form):
    spec = save(form, tmp_path / "w", spoilt(np.nan))
    opened = flatten_tree(checkpoints.open_params(spec))
    np.asarray(opened["img/head/bias"])
    with pytest.raises(CheckpointError, match=rf"{spec}: {LEAF} has 1 of 144 numbers .*\[2, 5, 7\].*--allow_nonfinite"):
        np.asarray(opened[LEAF])
    back = flatten_tree(checkpoints.load_params(spec, allow_nonfinite=True))
    assert np.isnan(back[LEAF][2, 5, 7])


def test_hugging_face_folders_are_checked(tmp_path):
    case, _, _, params, _ = models.reference("mqa")
    flat = {n: np.array(x) for n, x in flatten_tree(params).items()}
    flat["llm/final_norm/scale"][1] = np.inf
    checkpoints.save_hf(tmp_path / "hf", unflatten_tree(flat), img=case["img"], llm=case["llm"])
    with pytest.raises(CheckpointError, match="hf: llm/final_norm/scale has 1 of"):
        checkpoints.load_params(tmp_path / "hf")
    checkpoints.load_params(tmp_path / "hf", allow_nonfinite=True)


@pytest.mark.parametrize("dtype", ["complex64", "int32", "int8", "bool", "uint16"])
def test_numbers_of_other_kinds_are_no_weights(tmp_path, dtype):
    flat = flatten_tree(tree())
    flat[LEAF] = np.ones(flat[LEAF].shape, dtype)
    spec = save("npz", tmp_path / "w", unflatten_tree(flat))
    for allowed in (False, True):
        with pytest.raises(CheckpointError, match=f"w.npz: {LEAF} has numbers of type {dtype}; expected weights"):
            checkpoints.open_params(spec, allow_nonfinite=allowed)


@pytest.mark.parametrize("factor", [0, 1])
def test_factors_of_adapters_are_checked(tmp_path, factor):
    made = adapters.random_adapter("mqa")
    target = next(iter(made.factors))
    made.factors[target][factor][0, 0, 0] = np.nan
    peft.save_adapter(tmp_path / "a", made)
    with pytest.raises(CheckpointError, match=rf"adapter_model.safetensors: .*lora_{'AB'[factor]}.* has 1 of"):
        checkpoints.load_adapter(tmp_path / "a")
    checkpoints.load_adapter(tmp_path / "a", allow_nonfinite=True)


def test_casts_that_overflow_are_refused(tmp_path):
    params = spoilt(7e4)
    assert finite.cast(flatten_tree(params)[LEAF], "bfloat16", "x").dtype == "bfloat16"
    with pytest.raises(CheckpointError, match=f"{LEAF} has numbers up to 70000, which float16 can't hold"):
        forms.save_params(tmp_path / "w.npz", params, "npz", dtype="float16")
    forms.save_params(tmp_path / "w.npz", tree(), "npz", dtype="float16")
