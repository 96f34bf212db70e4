"""What tests of the input share: a data set of 32 rows, pp functions, and short runs over them."""

import io
import shutil

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from paligemma_med import input_pipeline

N_TRAIN, N_VALID, LENGTH = 23, 9, 12


def png(i):
    out = io.BytesIO()
    PIL.Image.new("RGB", (8 + i % 3, 8), (i, 2 * i, 255 - i)).save(out, "PNG")
    return out.getvalue()


def examples(first, count):
    for i in range(first, first + count):
        yield (
            str(i),
            {
                "image": png(i),
                "question": f"wo ist es, {i}? 在哪里",
                "answer": "left" if i % 2 else "right lung",
                "question_id": f"q{i}",
                "number": i,
                "choices": ["a", "β"],
                "boxes": [{"label": "Milz", "bbox": np.arange(4, dtype=np.float32)}] * (i % 3),
            },
        )


class TinyVqa(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Rows numbered 0..22 (train) and 100..108 (validate), built without TensorFlow."""

    VERSION = tfds.core.Version("1.10.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]

    def _info(self):
        text = tfds.features.Text()
        bbox = tfds.features.Tensor(shape=(4,), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "question": text,
                    "answer": text,
                    "question_id": text,
                    "number": np.int32,
                    "choices": tfds.features.Sequence(text),
                    "boxes": tfds.features.Sequence({"label": text, "bbox": bbox}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": examples(0, N_TRAIN),
            "validate": examples(100, N_VALID),
        }

    def _generate_examples(self):
        raise NotImplementedError


def make_pp(*, eos=True, cut=lambda n: 0, extra=lambda d: {}, fail_on=None, eos_lost_on=None):
    """A pp as a closure, which travels to workers by value."""

    def pp(d, rng):
        number = int(d["number"])
        if number == fail_on:
            raise ValueError("there is no such thing")
        text, mask_loss = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32)
        text[:4] = [2, 50 + number, 60, 1 if eos and number != eos_lost_on else 61]
        mask_loss[2:4] = 1
        out = {"text": text, "mask_loss": mask_loss, "number": d["number"], **extra(d)}
        if rng is not None:
            out["noise"] = rng.random(3).astype(np.float32)
        if cut(number):
            out["_truncated"] = np.int32(cut(number))
        return out

    return pp


def train(data, pp=None, *, steps, seed=7, mesh=None, start_step=0, **cfg):
    cfg = {"data": data, "pp": pp or make_pp(), "batch_size": 8, **cfg}
    with input_pipeline.training(cfg, seed=seed, mesh=mesh, start_step=start_step) as batches:
        return [next(batches) for _ in range(steps)]


def mix(data, weights, *, steps, total_steps=None, start_step=0, seed=7, mesh=None, **kw):
    """Batches of rows 0..22 ("big") and 100..108 ("small") mixed, and the epochs of each."""
    splits = dict(big="train", small="validate", other="train")
    sections = {name: dict(data={**data, "split": splits[name]}) for name in weights}
    cfg = {"data": weights, "pp": make_pp(), "batch_size": 8, **sections, **kw}
    total = total_steps or start_step + steps
    with input_pipeline.training(cfg, seed=seed, mesh=mesh, start_step=start_step, total_steps=total) as batches:
        return [next(batches) for _ in range(steps)], batches.epochs()


def mixture(data, total_steps=9, **kw):
    sets = dict(big=dict(data=data), small=dict(data={**data, "split": "validate"}))
    cfg = {"data": dict(big=2, small=1), "pp": make_pp(), "batch_size": 8, **sets, **kw}
    return cfg, dict(seed=7, total_steps=total_steps)


def breaks(*numbers):
    """A pp with random numbers drawn before and after the place where it fails for `numbers`."""
    good = make_pp()

    def pp(d, rng):
        before = rng.random()
        if int(d["number"]) in numbers:
            raise OSError("image file is truncated")
        return {**good(d, rng), "before": np.float32(before)}

    return pp


def skipping(data, pp, *, steps, seed=7, **kw):
    """Batches, what was skipped in them, and their question ids."""
    start_step = kw.get("start_step", 0)
    options = {k: kw.pop(k) for k in ("start_step", "total_steps") if k in kw}
    cfg = {"data": data, "pp": pp, "batch_size": 8, "on_error": "skip", **kw}
    with input_pipeline.training(cfg, seed=seed, **options) as batches:
        made = [next(batches) for _ in range(steps)]
        ids = [batches.question_ids(start_step + i) for i in range(steps)]
        return made, batches.skipped(), ids


def eval_pp(d, rng):
    assert rng is None
    return {
        "text": np.full(4, int(d["number"]), np.int32),
        "number": d["number"],
        "question_id": d["question_id"],
        "boxes": d["boxes"],
        "_truncated": np.int32(d["number"] == 3),
    }


def damaged_copy(data, data_dir, folder):
    """The data set anew with one wrong byte amid its records; (data, the file)."""
    copy = folder / "tiny_vqa" / "en" / "1.10.0"
    shutil.copytree(data_dir / "tiny_vqa" / "en" / "1.10.0", copy)
    shard = next(copy.glob("*train*"))
    whole = shard.read_bytes()
    # A checksum in the file finds it.
    at = whole.index(b"IHDR") if b"IHDR" in whole else len(whole) // 3
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    return data | {"data_dir": str(folder)}, shard


def assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def question_ids(rows):
    return [row["question_id"] for row in rows]
