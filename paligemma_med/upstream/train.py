"""Train a config of ours with big_vision's own trainer.

Example:
  BIG_VISION_DIR=~/big_vision python -m paligemma_med.upstream.train \
      --config=configs/slake_mini.py --workdir=out/bv --config.input.batch_size=16
"""
# The docstring above is what --help prints.
#
# The loop, the data reader and the optimizer are big_vision's (trainers/proj/paligemma/train.py);
# the config file, the model, the evaluators and the data sets are ours. The flags are those of its
# trainer, which defines them on import.

import contextlib
import importlib
import os
import sys

import jax
from absl import app, flags, logging

from paligemma_med import cli, input_pipeline, upstream
from paligemma_med.parallel import compilation_cache, sharding
from paligemma_med.pp import json_text
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import run_files
from paligemma_med.upstream import config as configs
from paligemma_med.upstream import shims

TRAINER = "big_vision.trainers.proj.paligemma.train"


def check(config) -> TrainingSetup:
    """The setup of a config, after refusing what our own trainer would, and data sets that TensorFlow can't read.

    Raises:
      ValueError: a mistake, in one sentence.
    """
    setup = TrainingSetup.without_data(config)
    config = setup.config
    setup.batch_sharding, setup.tokenizer  # noqa: B018  (refuse a batch that doesn't divide, a token without a row)
    for data in _data_sets(config):
        if data["name"].startswith("bv:") or data["name"] == "from_data_dir":
            continue  # named in one of big_vision's own ways
        try:
            folder = input_pipeline.folder_of(data)
        except input_pipeline.InputError as e:
            raise ValueError(f"{e}; for big_vision, build it with --file_format=tfrecord") from e
        info = json_text.read(folder / "dataset_info.json", "what TFDS writes about a data set", root=dict)
        if (found := info.get("fileFormat")) != "tfrecord":
            raise ValueError(
                f"{folder} holds {found} files, but big_vision reads tfrecord: build the set with "
                "`python -m data_prep.build … --file_format=tfrecord` into another --data_dir, and "
                "point data.data_dir or $TFDS_DATA_DIR there."
            )
    return setup


def _data_sets(config):
    """Each `data` section of the config."""
    data = config.input.data
    is_mixture = not isinstance(data.get("name"), str)
    yield from (config.input[name].data for name in data) if is_mixture else (data,)
    for section in (config.get("evals") or {}).values():
        yield from (section[key] for key in ("data", "train_data") if section.get(key))


def train(config, workdir, trainer) -> None:
    """Runs `trainer`, big_vision's module, on our config in `workdir`.

    Its flags must have been parsed; --config and --workdir are set to these arguments.

    Raises:
      ValueError: the config has a mistake, or asks for something its trainer can't do.
    """
    if os.environ.pop("BV_JAX_INIT", ""):
        jax.distributed.initialize()  # its trainer would do it later, but our checks need devices first
    setup = check(config)
    config = setup.config
    theirs = configs.translate(config, note=lambda s: print(s, file=sys.stderr, flush=True))
    cache = config.get("compilation_cache", True)
    compilation_cache.start(cache if workdir or cache is not True else False, workdir)
    shims.number_metrics(trainer.u.BigVisionMetricWriter)
    flags.FLAGS["config"].value = theirs
    flags.FLAGS["workdir"].value = workdir
    alone = run_files.sole_use(workdir) if workdir else contextlib.nullcontext()
    with alone, sharding.rules(config, setup.mesh):
        trainer.main([])


@cli.command
def main(argv) -> None:
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)  # its trainer logs its metrics there
    if flags.FLAGS.config is None:
        raise app.UsageError("--config is needed.")
    if not flags.FLAGS.workdir:  # its trainer would train and save nothing
        raise app.UsageError("--workdir is needed.")
    workdir = os.path.expanduser(flags.FLAGS.workdir)  # its trainer defines the flag
    train(flags.FLAGS.config, workdir, importlib.import_module(TRAINER))


def start() -> None:
    """The program: finds big_vision, has it define its flags, and runs."""
    try:
        upstream.install()
    except ValueError as e:
        sys.exit(f"error: {e}")
    importlib.import_module(TRAINER)
    app.run(main, flags_parser=cli.parse_flags)


if __name__ == "__main__":
    start()
