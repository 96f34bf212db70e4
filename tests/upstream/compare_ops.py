"""What `upstream.pp_ops` adds to big_vision, next to ours: a program for test_pp.

    python -m tests.upstream.compare_ops TEXTS [GEMMA_JSON GEMMA_MODEL]

TEXTS is a JSON list. Random ops are given the same numbers on both sides, and their own numbers are
compared as distributions. Ends with an error at the first difference; else prints what it checked.
"""

import importlib.resources
import json
import pathlib
import sys

import numpy as np

from paligemma_med import upstream
from paligemma_med.pp import get_preprocess_fn, ops_image
from paligemma_med.pp.tokenizer import get_tokenizer

upstream.install()
import big_vision.pp.builder as bv_builder  # noqa: E402  after install
import big_vision.pp.tokenizer as bv_tokenizer  # noqa: E402
import tensorflow as tf  # noqa: E402
from big_vision.pp import ops_text  # noqa: E402

from paligemma_med.upstream import pp_ops  # noqa: E402

IMAGE = np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8)


class Given:
    """In place of a np.random.Generator: the numbers that it is told to give."""

    def __init__(self, uniform=(), place=()):
        self._uniform, self._place = list(uniform), list(place)

    def uniform(self, low, high):
        value = self._uniform.pop(0)
        assert low <= value <= high
        return value

    def integers(self, n):
        return int(self._place.pop(0) * n)


def in_graph(pp):
    """big_vision's function of a pp string, compiled; it changes the dict that it is given."""
    fn = bv_builder.get_preprocess_fn(pp, log_data=False)
    return tf.function(lambda row: fn(dict(row)))


def tokenizers_agree(ours, theirs, texts):
    """The same ids and texts, one by one, in lists and as TensorFlow ops; it reads token sets in any text."""

    def of(text, **kw):
        return ours.to_int(text, special=ours.tokensets, **kw)

    for text in texts:
        ids = of(text, bos=True, eos=True)
        assert theirs.to_int(text, bos=True, eos=True) == ids, text
        assert theirs.to_str(ids) == ours.to_str(ids), text
    some = texts[:3]
    rows = theirs.to_int(some, eos=True)
    assert rows == [of(t, eos=True) for t in some]
    assert theirs.to_str(rows) == [ours.to_str(r) for r in rows]
    assert theirs.to_int_tf_op(some[0]).numpy().tolist() == of(some[0])
    ragged = theirs.to_int_tf_op(tf.constant(some)).to_list()
    assert ragged == [of(t) for t in some]
    assert theirs.to_str_tf_op(np.array(rows[0])).numpy().decode() == ours.to_str(rows[0])
    for name in ("pad_token", "eos_token", "bos_token", "vocab_size"):
        assert getattr(theirs, name) == getattr(ours, name), name
    print("tokenizers agree on", len(texts), "texts,", ours.vocab_size, "tokens")


def shifts():
    """Brightness and contrast by the same amount: the same image."""
    for x in (-0.1, -0.0431, 0.0, 0.07, 0.1):
        ours = get_preprocess_fn("brightness(0.1)")({"image": IMAGE}, Given([x]))["image"]
        theirs = pp_ops.shifted(tf.constant(IMAGE), lambda v, x=x: v + np.float32(x * 255))
        np.testing.assert_array_equal(ours, theirs.numpy())
    for x in (0.8, 0.913, 1.0, 1.25):
        ours = get_preprocess_fn("contrast(0.8, 1.25)")({"image": IMAGE}, Given([x]))["image"]
        theirs = pp_ops.shifted(tf.constant(IMAGE), lambda v, x=x: pp_ops.scaled_from_mean(v, np.float32(x))).numpy()
        # float32 means may differ in their last bit, and so a value that lies at a half.
        assert np.abs(ours.astype(int) - theirs).max() <= 1 and (ours != theirs).mean() < 1e-3
    print("brightness and contrast agree")


def crops():
    """The same draws: the same box, the ones that don't fit left out alike."""
    rng, same, whole = np.random.default_rng(1), 0, 0
    height, width = IMAGE.shape[:2]
    for _ in range(300):
        area, aspect = rng.uniform(60, 100, 10), rng.uniform(np.log(0.3), np.log(3), 10)
        place = rng.uniform(size=2)
        given = Given(np.stack([area, aspect], 1).ravel(), place)
        ours = ops_image.inception_crop(None, 60, 100, 0.3, 3.0)({"image": IMAGE}, given)["image"]
        y, x, h, w = (
            int(v)
            for v in pp_ops.random_box(
                height,
                width,
                tf.constant(area / 100 * height * width, tf.float32),
                tf.constant(np.exp(aspect), tf.float32),
                tf.constant(place, tf.float32),
            )
        )
        theirs = IMAGE[y : y + h, x : x + w]
        same += ours.shape == theirs.shape and bool((ours == theirs).all())
        whole += (h, w) == (height, width)
    assert same >= 298, same  # float32 may round a side the other way
    assert 0 < whole < 30, whole
    print("crops agree:", same, "of 300")


def distributions():
    """Their own draws lie in the ranges asked for, and are spread as ours are."""
    pp = "inception_crop(None, 60, 100, 0.8, 1.25)"
    theirs = in_graph(pp)
    theirs = [theirs({"image": tf.constant(IMAGE)})["image"].shape for _ in range(600)]
    rng, fn = np.random.default_rng(2), get_preprocess_fn(pp)
    ours = [fn({"image": IMAGE}, rng)["image"].shape for _ in range(600)]
    sides = [np.array([[h, w] for h, w, _ in shapes], float) for shapes in (ours, theirs)]
    for of in (lambda s: s.prod(1), lambda s: np.log(s[:, 1] / s[:, 0])):
        a, b = (of(s) for s in sides)
        for q in (10, 50, 90):
            found = np.percentile(a, q) - np.percentile(b, q)
            assert abs(found) < 0.3 * a.std(), (q, found, a.std())
    h, w = sides[1].T
    assert (h * w >= 0.59 * 90 * 120).all() and len(set(map(tuple, sides[1]))) > 200
    change = in_graph("brightness(0.1)")
    grey = tf.fill([4, 4, 3], np.float32(100))
    deltas = np.array([change({"image": grey})["image"].numpy()[0, 0, 0] for _ in range(300)]) - 100
    assert -25.5 <= deltas.min() < -20 and 20 < deltas.max() <= 25.5 and abs(deltas.mean()) < 4
    print("distributions agree")


def calls():
    """big_vision's own calls of inception_crop go to its own op, ours to ours."""
    seen, real = [], pp_ops._their_inception_crop
    pp_ops._their_inception_crop = lambda *a, **k: seen.append((a, k)) or real(*a, **k)
    try:
        theirs = [
            "inception_crop(32)",
            "inception_crop(32, 10, 90, 'bilinear', True)",
            "inception_crop(size=32, antialias=True, key='image')",
        ]
        ours = [
            "inception_crop(32, 60, 100, 0.8, 1.25, antialias=True)",
            "inception_crop(32, aspect_min=1.0, aspect_max=1.0, inkey='image')",
        ]
        for pp in (*theirs, *ours):
            out = bv_builder.get_preprocess_fn(pp, log_data=False)({"image": tf.constant(IMAGE)})
            assert out["image"].shape == (32, 32, 3) and out["image"].dtype == tf.uint8
    finally:
        pp_ops._their_inception_crop = real
    assert len(seen) == len(theirs)
    print("calls go where they belong")


def main(texts, gemma_json=None, gemma_model=None):
    texts = json.loads(pathlib.Path(texts).read_text(encoding="utf-8"))
    tiny = importlib.resources.files("paligemma_med.pp") / "tiny_tokenizer.model"
    # By our name, and by the class of theirs that reads the file itself.
    tokenizers_agree(get_tokenizer("tiny"), bv_tokenizer.get_tokenizer("tiny"), texts)
    with importlib.resources.as_file(tiny) as path:
        theirs = ops_text.SentencepieceTokenizer(str(path))
        tokenizers_agree(get_tokenizer("tiny"), theirs, [t for t in texts if "\u2581" not in t])
    if gemma_json:
        spec = 'gemma(tokensets=("loc", "seg"), model={!r})'
        ours = get_tokenizer(spec.format(gemma_json))
        more = [*texts, "a<loc0001>b <seg001>"]
        tokenizers_agree(ours, bv_tokenizer.get_tokenizer(spec.format(gemma_json)), more)
        theirs = ops_text.SentencepieceTokenizer(gemma_model, tokensets=("loc", "seg"))
        tokenizers_agree(ours, theirs, more)
    shifts()
    crops()
    distributions()
    calls()


if __name__ == "__main__":
    main(*sys.argv[1:])
