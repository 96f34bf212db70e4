"""big_vision's own trainer, main and all, on batches that are given: `replay.py BATCHES.npz
--config=… --workdir=…`.

Its data reader alone is put aside, since what it shuffles can't be had again. BATCHES.npz holds the
keys of a batch, each with a leading axis of steps.
"""

import importlib
import sys

import numpy as np
from absl import app

from paligemma_med import cli, upstream
from paligemma_med.upstream import train

EXAMPLES = 100  # what the data set is said to have


def main(path):
    upstream.install()
    trainer = importlib.import_module(train.TRAINER)
    import tensorflow as tf

    with np.load(path) as f:
        batches = dict(f)

    def training(section):
        assert len(batches["text"][0]) == section.batch_size
        return tf.data.Dataset.from_tensor_slices(batches), EXAMPLES

    trainer.input_pipeline.training = training
    app.run(train.main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    main(sys.argv.pop(1))
