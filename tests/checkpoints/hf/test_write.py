"""What isn't written, what isn't overwritten, and how little memory writing takes."""

import io
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import transformers

from paligemma_med.checkpoints import CheckpointError, hf, lazy
from paligemma_med.models import decoder
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.pp import get_preprocess_fn
from tests.checkpoints.hf.folders import theirs_saved
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference


def edited(name="mqa", drop=(), **leaves):
    flat = dict(flatten_tree(reference.reference(name)[3]))
    for key in drop:
        del flat[key]
    return unflatten_tree({**flat, **{k.replace("__", "/"): v for k, v in leaves.items()}})


@pytest.mark.parametrize(
    "params, message",
    [
        (lambda: edited(img__head__lora_a=np.ones((24, 2))), "adapters.*--merge.*--to peft"),
        (lambda: edited(drop=["img/head/bias"]), "img/head/bias: missing"),
        (lambda: edited(img__new=np.ones(2, np.float32)), "img/new: unexpected"),
        (lambda: edited(img__head__bias=np.ones(28, int)), "img/head/bias: has dtype int64"),
        (lambda: edited(img__head__bias=np.ones(29, np.float32)), r"bias: found shape \(29,\)"),
        (
            lambda: edited(llm__layers__attn__kv_einsum__w=np.ones((3, 3, 1, 28, 8), np.float32)),
            r"kv_einsum/w: found shape \(3, 3, 1, 28, 8\), expected \(3, 2, K, 28, 8\)",
        ),
        (lambda: edited(img__pos_embedding=np.ones((1, 8, 24), np.float32)), "square grid"),
    ],
)
def test_a_tree_that_does_not_fit_is_not_written(params, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        hf.save_hf(tmp_path / "w", params())
    assert not any(tmp_path.iterdir())


def test_soft_caps_come_from_the_dict_or_a_known_variant(tmp_path):
    case, _, _, params, _ = reference.reference("gemma2")
    with pytest.raises(CheckpointError, match="no known variant.*soft-caps.*llm=dict"):
        hf.save_hf(tmp_path / "w", params)
    assert not any(tmp_path.iterdir())
    sizes = {k: v for k, v in case["llm"].items() if not k.endswith("cap")}
    decoder.VARIANTS["tiny_test"] = dict(sizes, attn_logits_softcap=7.0, final_logits_softcap=9.0)
    try:
        hf.save_hf(tmp_path / "w", params)
    finally:
        del decoder.VARIANTS["tiny_test"]
    llm = hf.model_config(tmp_path / "w")["llm"]
    assert (llm["attn_logits_softcap"], llm["final_logits_softcap"]) == (7.0, 9.0)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(llm=dict(variant=None, width=29)), "llm says width=29, but the weights have 28"),
        (dict(llm={}), "llm says width=2048"),
        (dict(llm=dict(variant="gemma_3b")), "variant 'gemma_3b' is unknown"),
        (dict(llm=dict(variant=None, final_logits_softcap=3.0)), "soft-caps"),
        (dict(img=dict(variant=None, patch_size=16)), "img says patch_size"),
    ],
)
def test_dicts_that_contradict_the_weights_are_errors(kw, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        hf.save_hf(tmp_path / "w", reference.reference("mqa")[3], **kw)


@pytest.mark.parametrize("after", [0, 3, 40])
def test_an_interrupted_write_leaves_nothing(after, tmp_path):
    params = reference.reference("mqa")[3]
    seen = []

    def interrupt(n):
        seen.append(n)
        if len(seen) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(tmp_path / "w", params, progress=interrupt, max_shard_bytes=20_000)
    assert not any(tmp_path.iterdir())


def test_existing_folders(tmp_path):
    params = reference.reference("mqa")[3]
    hf.save_hf(tmp_path / "w", params, max_shard_bytes=20_000)
    with pytest.raises(FileExistsError, match="exists"):
        hf.save_hf(tmp_path / "w", params)
    hf.save_hf(tmp_path / "w", params, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["w"]
    assert sorted(os.listdir(tmp_path / "w")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="holds no model.safetensors"):
        hf.save_hf(tmp_path / "home", params, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()

    # A folder that can't be replaced in the end is still there.
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(tmp_path / "w", params, overwrite=True, progress=interrupt)
    assert_same(hf.open_hf(tmp_path / "w"), params)
    assert sorted(os.listdir(tmp_path)) == ["home", "w"]


def test_progress_counts_the_bytes_of_the_tree_and_one_leaf_is_held_at_a_time(tmp_path):
    params = reference.reference("gqa")[3]
    alive, most, done = [0], [0], []

    class Counted(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive[0] -= 1

    def watched(x):
        def read():
            out = np.empty(x.shape, x.dtype).view(Counted)
            out = Counted(x.shape, x.dtype)
            out[...] = x
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return out

        return lazy.Lazy(x.shape, x.dtype, read)

    hf.save_hf(tmp_path / "w", jax.tree.map(watched, params), progress=done.append)
    assert sum(done) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert most == [1]
    assert_same(hf.open_hf(tmp_path / "w"), params)


def test_converting_imports_neither_torch_nor_transformers(tmp_path):
    theirs_saved("mqa", tmp_path / "hf")
    code = (
        "import sys; from paligemma_med import checkpoints;"
        "from paligemma_med.checkpoints import hf;"
        f"hf.save_hf({str(tmp_path / 'new')!r}, hf.open_hf({str(tmp_path / 'hf')!r}));"
        f"checkpoints.load_params({str(tmp_path / 'new')!r});"
        "print([m for m in ('torch', 'transformers', 'tensorflow') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=pathlib.Path(__file__).parents[3],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def _processor():
    """transformers' image processor by PIL, which from version 5 on isn't the one without a suffix."""
    try:
        from transformers.models.siglip import image_processing_pil_siglip
    except ImportError:
        return transformers.SiglipImageProcessor
    return image_processing_pil_siglip.SiglipImageProcessorPil


@pytest.mark.parametrize("grey", [False, True])
def test_transformers_processor_makes_our_pixels(tmp_path, grey):
    """Exactly, with the settings that are written; with Google's own, which resize by other weights, it doesn't."""
    hf.save_hf(tmp_path / "w", reference.reference("mqa")[3])
    settings = json.loads((tmp_path / "w" / "preprocessor_config.json").read_text())
    side = settings["size"]["height"]
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50, 41) if grey else (50, 41, 3), np.uint8)
    image = PIL.Image.fromarray(pixels)
    coded = io.BytesIO()
    image.save(coded, "PNG")
    pp = get_preprocess_fn(f'decode|resize({side}, antialias=True)|value_range(-1, 1)|keep("image")')
    ours = pp({"image": coded.getvalue()})["image"]

    def theirs(**kw):
        made = _processor()(**{**settings, **kw})(image, return_tensors="np")["pixel_values"][0]
        return np.asarray(made).transpose(1, 2, 0)

    np.testing.assert_array_equal(theirs(), ours)
    assert np.abs(theirs(resample=3) - ours).max() > 0.05
