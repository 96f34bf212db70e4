"""One model's weights from several sources: what is taken of each, what is cut, and what begins afresh."""

import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, Lazy, compose, npz
from paligemma_med.checkpoints.hf import assemble
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.trees import assert_same, tree

ATTN = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0"
CROSS = "connector/layers/block_0/cross"


class Shape:
    def __init__(self, *shape):
        self.shape = shape


def lazy_ones(*shape):
    return Lazy(shape, np.float32, lambda: np.ones(shape, np.float32))


@pytest.mark.parametrize(
    "spec, want",
    [
        ("img=a,llm=b", dict(img="a", llm="b")),
        ("img=a/x,y.npz:img,connector=c,llm=~/b=2", dict(img="a/x,y.npz:img", connector="c", llm="~/b=2")),
        (dict(img="a", llm="b"), dict(img="a", llm="b")),
        ("out/img=a", None),
        ("x.npz:img", None),
        ("llms=a", None),
    ],
)
def test_parts_of(spec, want):
    assert compose.parts_of(spec) == want


def test_bad_parts():
    for spec in (dict(img="a"), "img=a", dict(img="a", llm="b", text="c")):
        with pytest.raises(ValueError, match="expected a path, or img and llm"):
            compose.parts_of(spec)
    with pytest.raises(ValueError, match="names a part twice"):
        compose.parts_of("img=a,img=b,llm=c")


def test_a_source_may_be_a_whole_model(tmp_path):
    npz.save_npz(tmp_path / "a.npz", tree(1))
    npz.save_npz(tmp_path / "b.npz", tree(2))
    want = dict(img=tree(1)["img"], llm=tree(2)["llm"])
    for img in (f"{tmp_path}/a.npz", f"{tmp_path}/a.npz:img"):
        assert_same(checkpoints.load_init(dict(img=img, llm=f"{tmp_path}/b.npz")), want)
        assert_same(checkpoints.load_params(f"img={img},llm={tmp_path}/b.npz:llm"), want)
    npz.save_npz(tmp_path / "c.npz", dict(llm=tree(2)["llm"]))
    with pytest.raises(CheckpointError, match="c.npz has no 'img', only llm"):
        checkpoints.load_init(dict(img=f"{tmp_path}/c.npz", llm=f"{tmp_path}/b.npz"))
    adapted = tree(2)["llm"] | {"q": {"lora_a": np.ones((2, 1), np.float32)}}
    npz.save_npz(tmp_path / "c.npz", dict(llm=adapted))
    with pytest.raises(CheckpointError, match="c.npz has adapters, such as q/lora_a, .* merge them first"):
        checkpoints.load_init(dict(img=f"{tmp_path}/a.npz", llm=f"{tmp_path}/c.npz"))


def test_heads_are_cut_as_the_model_has_them():
    x = np.arange(2 * 6 * 6, dtype=np.float32).reshape(2, 6, 6)
    loaded = {f"{ATTN}/query/kernel": x, f"{ATTN}/query/bias": x[:, 0], f"{ATTN}/out/kernel": x}
    want = {
        f"{ATTN}/query/kernel": Shape(2, 6, 3, 2),
        f"{ATTN}/query/bias": Shape(2, 3, 2),
        f"{ATTN}/out/kernel": Shape(2, 3, 2, 6),
    }
    got = compose.for_model(loaded, want)
    assert {n: a.shape for n, a in got.items()} == {n: s.shape for n, s in want.items()}
    np.testing.assert_array_equal(got[f"{ATTN}/query/kernel"][1, 4], x[1, 4].reshape(3, 2))
    # Four heads of 2 don't make 6: left as it is, for the message of what doesn't fit.
    assert compose.for_model(loaded, {f"{ATTN}/query/bias": Shape(2, 4, 2)})[f"{ATTN}/query/bias"].shape == (2, 6)


def test_a_tower_without_norm_reads_a_middle_layer(caplog):
    assemble.tell.cache_clear()
    block, norm = "img/Transformer/encoderblock/LayerNorm_0/scale", "img/Transformer/encoder_norm"
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    loaded = {block: x, f"{norm}/scale": x[0], f"{norm}/bias": x[0], "llm/layers/pre_ffw_norm/scale": x}
    got = compose.for_model(loaded, {block: Shape(3, 3), "llm/layers/pre_ffw_norm/scale": Shape(2, 3)})
    assert got.keys() == {block, "llm/layers/pre_ffw_norm/scale"}
    assert "gives what comes out of layer 3: later ones and its last norm are left out" in caplog.text
    np.testing.assert_array_equal(got[block], x[:3])
    assert len(got["llm/layers/pre_ffw_norm/scale"]) == 4  # of a language model nothing is left out
    whole = {block: Shape(3, 3), f"{norm}/scale": Shape(3), f"{norm}/bias": Shape(3)}
    assert len(compose.for_model(loaded, whole)[block]) == 4  # a tower with its norm has all its layers


def test_a_projection_is_the_head_of_a_model_without_connector():
    proj = {f"connector/proj/{n}": np.ones(2, np.float32) for n in ("kernel", "bias")}
    assert compose.for_model(proj, {"img/head/kernel": Shape(2)}).keys() == {"img/head/kernel", "img/head/bias"}
    assert compose.for_model(proj, {"connector/proj/kernel": Shape(2)}).keys() == proj.keys()
    own = np.zeros(2, np.float32)  # a run's, after training
    got = compose.for_model({**proj, "img/head/kernel": own}, {"img/head/kernel": Shape(2)})
    assert got["img/head/kernel"] is own


def test_what_begins_afresh(caplog):
    kernel, bias, head = f"{CROSS}/key/kernel", f"{CROSS}/key/bias", "img/head/kernel"
    want = {kernel: Shape(2, 5, 3, 4), bias: Shape(2, 3, 4), "connector/proj/kernel": Shape(12, 7), "llm/x": Shape(1)}
    spec = dict(img="tower", connector="blip2", llm="l")

    def found(loaded, want=want, spec=spec):
        caplog.clear()
        assemble.tell.cache_clear()
        return compose.afresh(loaded, want, spec), " ".join(r.getMessage() for r in caplog.records)

    fits = {n: lazy_ones(*x.shape) for n, x in want.items()}
    assert found(fits) == ([], "")
    for other in (lazy_ones(2, 9, 3, 4), lazy_ones(2, 9, 12)):
        names, said = found({**fits, kernel: other})
        assert names == [kernel]
        assert f"blip2 was made for parts of other widths: trained from fresh weights are {kernel}" in said
    assert found({**fits, "connector/proj/kernel": lazy_ones(12, 9)})[0] == ["connector/proj/kernel"]
    # Another number of heads, or another width of its own, is no such thing.
    assert found({**fits, kernel: lazy_ones(2, 5, 3, 5), bias: lazy_ones(3, 3, 4)}) == ([], "")
    rest = {n: x for n, x in fits.items() if n != "connector/proj/kernel"}
    names, said = found(rest)
    assert names == ["connector/proj/kernel"] and "blip2 has no connector/proj/kernel" in said
    names, said = found({"llm/x": fits["llm/x"]})
    assert names == [kernel, bias, "connector/proj/kernel"] and "blip2 has no connector/layers" in said
    assert found({}, {head: Shape(2, 3)}, dict(img="tower", llm="l"))[0] == [head]
    assert flatten_tree(unflatten_tree(fits)).keys() == fits.keys()
