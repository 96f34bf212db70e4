"""Boxes as `<loc>` tokens by big_vision's own op and by ours: a program for test_pp.

    python -m tests.upstream.compare_boxes

big_vision writes boxes in one op with masks, whose codebook is replaced by random numbers; the <seg> tokens that they
give are left out. Ends with an error at the first difference.
"""

import re

import numpy as np

from paligemma_med import upstream
from paligemma_med.pp import boxes as boxes_lib

upstream.install()
import tensorflow as tf  # noqa: E402  after install
from big_vision.pp.proj.paligemma import segmentation  # noqa: E402


def random_codebook(model):
    """Weights in the shapes that the op reads."""
    del model
    rng, out = (
        np.random.default_rng(0),
        {"_vq_vae._embedding": np.float32(np.random.default_rng(1).normal(size=(128, 8)))},
    )
    convs = [(f"encoder.{2 * n}", 1 if n == 0 else 8, 4) for n in range(4)]
    convs += [(f"encoder.{8 + n}.net.{k}", 8, 3 if k < 4 else 1) for n in range(2) for k in (0, 2, 4)]
    for name, width, size in [*convs, ("encoder.10", 8, 1)]:
        out[f"{name}.weight"] = np.float32(rng.normal(size=(8, width, size, size)))
        out[f"{name}.bias"] = np.float32(rng.normal(size=8))
    return out


def main():
    segmentation.get_checkpoint = random_codebook
    op = segmentation.get_refcoco_mask2str()
    theirs = tf.function(lambda row: op(dict(row)))
    mask = tf.fill([50, 40, 3], np.uint8(255))
    rng, number = np.random.default_rng(2), 0
    low = rng.uniform(0, 0.85, (400, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.1, 0.15, low.shape)], 1).astype(np.float32)
    halves = (np.arange(100)[:, None] + [0.5, 3.5, 400.5, 601.5]) / 1023  # where rounding decides
    edges = np.array([[0, 0, 1, 1], [0, 0.5, 0.5, 1]])
    for box in [*boxes, *halves.astype(np.float32), *edges.astype(np.float32)]:
        said = theirs({"objects/mask": mask, "objects/refs/sentence": "x", "objects/bbox": tf.constant(box)})
        text = said["suffix"].numpy().decode()
        assert re.fullmatch(r"(<loc\d{4}>){4}(<seg\d{3}>){16}", text), text
        ours = boxes_lib.to_text([box])
        assert text.startswith(ours + "<seg"), (box, text, ours)
        number += 1
    print(f"the same text for {number} boxes")


if __name__ == "__main__":
    main()
