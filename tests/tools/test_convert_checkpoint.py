"""The converter: exact round trips through all forms, adapters, and mistakes told in a line."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, adapter, hf, npz, peft, workdir
from paligemma_med.models import lora_targets, paligemma
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference
from tools.convert_checkpoint import convert

ROOT = pathlib.Path(__file__).parents[2]
RULES = [
    (".*/(query|out)/kernel", dict(rank=2, alpha=6)),
    (".*/kv_einsum/w:v", dict(rank=3, alpha=1.5)),
    ("img/head/kernel", dict(rank=1, alpha=4, rslora=True)),
]


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params, image, text, mask_ar):
    return model.apply({"params": params}, image, text, mask_ar)[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """base.npz, and run/, a workdir with adapters on it; the tree with them in."""
    folder = tmp_path_factory.mktemp("made")
    case, _, _, params, _ = reference.reference("mqa")
    npz.save_npz(folder / "base.npz", params)
    specs = adapter.resolve(RULES, params)
    rng = np.random.default_rng(0)
    flat = flatten_tree(params)
    factors = {}
    for target, spec in specs.items():
        shapes = lora_targets.factor_shapes(target, spec, flat[target.param].shape)
        for name, shape in zip(lora_targets.factor_names([target]), shapes):
            factors[name] = (0.3 * rng.normal(size=shape)).astype(np.float32)
    run = folder / "run"
    run.mkdir()
    model = dict(img=dict(variant=None, **case["img"]), llm=dict(variant=None, **case["llm"]))
    config = dict(model=model, model_init=str(folder / "base.npz"), lora=RULES)
    (run / "config.json").write_text(json.dumps(config))
    with workdir.Checkpoints(run) as saved:
        saved.save(5, factors, {})
    return folder, unflatten_tree({**flat, **factors})


def test_through_every_form_and_back_to_the_bit(made, tmp_path):
    base = made[0] / "base.npz"
    convert(base, tmp_path / "hf", "hf")
    convert(tmp_path / "hf", tmp_path / "orbax", "orbax")
    convert(tmp_path / "orbax", tmp_path / "w.npz", "npz")
    assert (tmp_path / "w.npz").read_bytes() == base.read_bytes()
    convert(base, tmp_path / "half", "orbax", dtype="bfloat16")
    convert(tmp_path / "half", tmp_path / "half_hf", "hf")
    convert(tmp_path / "half_hf", tmp_path / "half.npz", "npz")
    npz.save_npz(tmp_path / "want.npz", npz.load_npz(base), dtype="bfloat16")
    assert (tmp_path / "half.npz").read_bytes() == (tmp_path / "want.npz").read_bytes()


def test_what_shapes_do_not_tell_travels_from_hugging_face_and_workdirs(tmp_path):
    case, _, _, params, _ = reference.reference("gemma2_emb_per_head")
    model = dict(img=dict(variant=None, **case["img"]), llm=dict(variant=None, **case["llm"]))
    hf.save_hf(tmp_path / "a", params, **model)
    convert(tmp_path / "a", tmp_path / "b", "hf", dtype="float16")
    assert hf.model_config(tmp_path / "b") == hf.model_config(tmp_path / "a")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(dict(model=model)))
    npz.save_npz(tmp_path / "run/base.npz", params)
    head = flatten_tree(params)["img/head/bias"] + 1
    with workdir.Checkpoints(tmp_path / "run") as saved:
        saved.save(1, {"img/head/bias": head}, {})
    convert(str(tmp_path / "run"), tmp_path / "c", "hf")
    assert hf.model_config(tmp_path / "c") == hf.model_config(tmp_path / "a")
    np.testing.assert_array_equal(hf.open_hf(tmp_path / "c")["img"]["head"]["bias"], head)


def test_a_run_keeps_its_adapters_in_an_npz(made, tmp_path):
    folder, tree = made
    convert(folder / "run", tmp_path / "w.npz", "npz")
    assert_same(npz.open_npz(tmp_path / "w.npz"), tree)


def test_merged_weights_give_the_adapters_logits(made, tmp_path):
    folder, tree = made
    convert(folder / "run", tmp_path / "w", "hf", merge=True)
    _, _, model, params, batch = reference.reference("mqa")
    inputs = batch["image"], batch["text"], batch["mask_ar"]
    adapted = paligemma.Model(img=model.img, llm=model.llm, lora=RULES)
    want = logits(adapted, tree, *inputs)
    found = logits(model, checkpoints.load_params(tmp_path / "w"), *inputs)
    plain = logits(model, params, *inputs)
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
    assert np.abs(plain - want).max() > 1e-2


def test_an_adapter_is_written_and_put_into_weights(made, tmp_path):
    folder, tree = made
    convert(folder / "run", tmp_path / "adapter", "peft", base_model="google/paligemma")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "google/paligemma"
    found = peft.load_adapter(tmp_path / "adapter")
    want = adapter.extract_adapter(RULES, tree)
    assert {t: (s.rank, s.scale) for t, s in found.specs.items()} == {
        t: (s.rank, s.scale) for t, s in want.specs.items()
    }
    base = folder / "base.npz"
    convert(base, tmp_path / "with.npz", "npz", adapter_dir=tmp_path / "adapter")
    assert_same(npz.open_npz(tmp_path / "with.npz"), tree)
    convert(base, tmp_path / "a.npz", "npz", adapter_dir=tmp_path / "adapter", merge=True)
    convert(folder / "run", tmp_path / "b.npz", "npz", merge=True)
    assert_same(npz.open_npz(tmp_path / "a.npz"), npz.open_npz(tmp_path / "b.npz"))


def test_a_part(made, tmp_path):
    folder, tree = made
    convert(folder / "base.npz", tmp_path / "w.npz", "npz", part="img")
    assert npz.open_npz(tmp_path / "w.npz").keys() == {"img"}
    params = reference.reference("mqa")[3]
    assert_same(npz.open_npz(tmp_path / "w.npz:img"), params["img"])
    convert(f"{folder}/base.npz:llm", tmp_path / "llm.npz", "npz")
    assert_same(npz.open_npz(tmp_path / "llm.npz"), params["llm"])


@pytest.mark.parametrize(
    "src, kw, message",
    [
        ("run", dict(to="hf"), "adapters.*--merge.*--to peft"),
        ("run", dict(to="peft", merge=True), "no adapters left"),
        ("base.npz", dict(to="peft"), "has no adapters: name one with --adapter"),
        ("base.npz", dict(to="npz", merge=True), "has no adapters"),
        ("with.npz", dict(to="npz", merge=True), "doesn't record by what they are scaled"),
        ("base.npz", dict(to="hf", part="img"), "--part is for npz and orbax"),
        ("base.npz:img", dict(to="npz", part="llm"), "no part 'llm', only"),
        ("base.npz:img", dict(to="hf"), "not PaliGemma's"),
    ],
)
def test_what_can_not_be_done_is_said_and_nothing_written(src, kw, message, made, tmp_path):
    folder, tree = made
    npz.save_npz(folder / "with.npz", tree)
    with pytest.raises(CheckpointError, match=message):
        convert(f"{folder}/{src}", tmp_path / "w.npz", **kw)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["npz", "hf", "orbax", "peft"])
def test_what_is_there_is_kept_unless_told_otherwise(to, made, tmp_path):
    src = made[0] / ("run" if to == "peft" else "base.npz")
    dst = tmp_path / "w.npz"
    convert(src, dst, to)
    with pytest.raises(FileExistsError, match="w.npz exists; pass --overwrite"):
        convert(src, dst, to)
    convert(src, dst, to, overwrite=True)
    assert os.listdir(tmp_path) == ["w.npz"]


def run_program(*args):
    return subprocess.run(
        [sys.executable, "-m", "tools.convert_checkpoint", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_program(made, tmp_path):
    """What goes well is in tests/checkpoints/test_hub.py: starting a program costs seconds."""
    base_bytes = (made[0] / "base.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(base_bytes[: len(base_bytes) // 2])
    run = run_program(tmp_path / "cut.npz", tmp_path / "new", "--to=hf")
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
    assert "cut short" in run.stderr
    assert os.listdir(tmp_path) == ["cut.npz"]


def test_converting_needs_no_pytorch(made, tmp_path):
    code = f"""
import sys
from tools.convert_checkpoint import convert
convert({str(made[0] / "run")!r}, {str(tmp_path / "w")!r}, "hf", merge=True)
convert({str(made[0] / "run")!r}, {str(tmp_path / "a")!r}, "peft")
print([m for m in ("torch", "transformers", "peft", "tensorflow") if m in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


def test_jax_arrays_and_lazy_ones_are_counted_alike(made):
    # The bar's total is the sum of what each leaf says of itself.
    opened = checkpoints.open_params(made[0] / "base.npz")
    read = jax.tree.map(np.asarray, opened)
    assert sum(x.nbytes for x in jax.tree.leaves(opened)) == sum(x.nbytes for x in jax.tree.leaves(read))


def test_a_processor_is_copied_as_it_is(made, tmp_path):
    theirs, base = tmp_path / "theirs", made[0] / "base.npz"
    theirs.mkdir()
    (theirs / "preprocessor_config.json").write_text('{"resample": 3}')
    with pytest.raises(FileNotFoundError, match="theirs has no processor: expected tokenizer.json or"):
        convert(base, tmp_path / "w", "hf", processor=theirs)
    assert not (tmp_path / "w").exists()
    (theirs / "tokenizer.json").write_text("{ }")
    (theirs / "model.safetensors").write_text("not theirs")
    convert(base, tmp_path / "w", "hf", processor=theirs)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        assert (tmp_path / "w" / name).read_bytes() == (theirs / name).read_bytes()
    assert_same(hf.open_hf(tmp_path / "w"), npz.open_npz(base))
    with pytest.raises(CheckpointError, match="--processor is for --to=hf"):
        convert(base, tmp_path / "w.npz", "npz", processor=theirs)
