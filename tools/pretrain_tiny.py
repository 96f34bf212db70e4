"""Makes tools/tiny_base.npz, the base model of the quickstart: draw shapes, train, export.

    python -m tools.pretrain_tiny --output=tools/tiny_base.npz

Everything comes from a fixed seed. The same machine and the same versions give the same file;
other ones round differently and give a model that is as good. Started again with the same
--workdir, training goes on from its newest checkpoint.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from data_prep import build
from data_prep.files import DataError
from paligemma_med import checkpoints, evaluate, train


def pretrain(config, workdir, output):
    """Trains `config` in `workdir` and writes its weights to `output` in bfloat16.

    Returns:
      {name of an eval: its metrics}, of the weights as written, on the evals of the config.
    """
    data = config.input.data
    build.build(data.name, data_dir=data.get("data_dir"))
    train.train(config, workdir)
    params = checkpoints.load_params(workdir)
    checkpoints.save_npz(output, params, dtype="bfloat16")
    print(f"Wrote {output}, {os.path.getsize(output) / 1e6:.2f} MB.", flush=True)
    return evaluate.evaluate(config, output, workdir)


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    try:
        pretrain(values.config, values.workdir, values.output)
    except DataError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    config = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "tiny_base.py")
    config_flags.DEFINE_config_file("config", config, "Experiment.")
    flags.DEFINE_string("workdir", "out/tiny_base", "Folder of the run.")
    flags.DEFINE_string("output", "tools/tiny_base.npz", "Where the weights are written.")
    app.run(main)
