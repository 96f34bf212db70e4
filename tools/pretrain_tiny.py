"""Makes tools/tiny_base.npz, the base model of the quickstart: draw shapes, train, export.

    python -m tools.pretrain_tiny --output=tools/tiny_base.npz

Everything comes from a fixed seed. The same machine and versions give the same file; others round
differently and give an equally good model. (The file in the repository was rounded to bfloat16 once
more, between lessons 2 and 3.) Started again with the same --workdir, training resumes from
its newest checkpoint.
"""

import os
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from configs import tiny_base
from data_prep import build
from data_prep.files import DataError
from paligemma_med import checkpoints, evaluate, train
from paligemma_med.pp import command_line


def pretrain(configs, workdir, output) -> dict:
    """Trains `configs`, each starting from the result of the previous one, and writes weights to `output`.

    Args:
      configs: ConfigDicts from `configs/tiny_base.py`; their runs are in `workdir`/lesson1, ….
      output: the .npz file, in bfloat16.

    Returns:
      {name of an eval: its metrics} for the weights as written, on the evals of the last config.
    """
    before = None
    for lesson, config in enumerate(configs, 1):
        data = config.input.data
        build.build(data.name, data_dir=data.get("data_dir"))
        if before:
            config.model_init = before
        before = os.path.join(workdir, f"lesson{lesson}")
        train.train(config, before)
    params = checkpoints.load_params(before)
    checkpoints.save_npz(output, params, dtype="bfloat16")
    print(f"Wrote {output}, {os.path.getsize(output) / 1e6:.2f} MB.", flush=True)
    return evaluate.evaluate(configs[-1], output, workdir)


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    try:
        pretrain([values[f"lesson{n}"].value for n in tiny_base.DATA], values.workdir, values.output)
    except DataError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    path = os.path.join(os.path.dirname(os.path.dirname(__file__)), "configs", "tiny_base.py")
    for lesson in tiny_base.DATA:
        config_flags.DEFINE_config_file(f"lesson{lesson}", f"{path}:lesson={lesson}", f"Experiment of lesson {lesson}.")
    command_line.define_path("workdir", "out/tiny_base", "Folder of the run.")
    command_line.define_path("output", "tools/tiny_base.npz", "Where the weights are written.")
    app.run(main, flags_parser=command_line.parse_flags)
