"""Our input pipeline as a side of a benchmark: batches for training, on the device; see `workers`.

`tools.bench --base` puts this file into trees that are older than it, so it takes little for granted:
`input_pipeline.training` and `configs.common.train_pp`.
"""

import atexit
import hashlib

import jax
import numpy as np

from configs import common
from paligemma_med import input_pipeline
from tools.bench import workers

# More batches than are made ahead: after as many, a side makes one for each that it gives.
AHEAD = 4


def device() -> dict:
    """Only the host's work is measured."""
    jax.config.update("jax_platforms", "cpu")
    return dict(platform="cpu", device="cpu")


class InputSide:
    """See `workers`. A step takes a batch; its value is how many examples it had."""

    def __init__(self, batches):
        self.about = dict(jax=jax.__version__)
        self._batches = batches
        first = next(batches)
        content = [np.asarray(first[key]).tobytes() for key in ("image", "text")]
        self._digests = [hashlib.sha256(x).hexdigest() for x in content]

    def step(self) -> int:
        return len(jax.block_until_ready(next(self._batches))["image"])

    value = staticmethod(float)

    def result(self) -> list[str]:
        """Digests of the first batch's images and texts."""
        return self._digests

    def peak(self) -> None:
        return None


def build(settings) -> InputSide:
    """See `workers`. settings: data (as in a config), res, text_len, rows (a batch), cores, tokenizer."""
    batches = input_pipeline.training(
        dict(
            data=settings["data"],
            pp=common.train_pp(settings["res"], settings["text_len"], settings["tokenizer"]),
            batch_size=settings["rows"],
            num_threads=settings["cores"],
            prefetch=1,
        ),
        seed=0,
    )
    atexit.register(batches.close)  # its threads would still run while Python ends
    return InputSide(batches)


if __name__ == "__main__":
    workers.serve(device, build)
