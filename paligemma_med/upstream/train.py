"""Train a config of ours with big_vision's own trainer.

Example:
  BIG_VISION_DIR=~/big_vision python -m paligemma_med.upstream.train \
      --config=configs/slake_mini.py --workdir=out/bv --config.input.batch_size=16
"""
# The docstring above is what --help prints.
#
# The loop, the data reader and the optimizer are big_vision's (trainers/proj/paligemma/train.py);
# the config file, the model, the evaluators and the data sets are ours. Flags are those of its
# trainer, which defines them when it is imported.

import importlib
import sys

from absl import app, flags, logging

from paligemma_med import compilation_cache, experiment, sharding, upstream
from paligemma_med.upstream import config as configs

TRAINER = "big_vision.trainers.proj.paligemma.train"


def check(config):
    """What our own trainer would refuse, but for evaluators of big_vision's; ValueError."""
    ours = config.copy_and_resolve_references()
    evals = ours.get("evals") or {}
    with ours.unlocked():
        ours.evals = {k: v for k, v in evals.items() if not configs.is_upstreams(v)}
    experiment.check_training_config(ours)
    experiment.make_tokenizer(ours, experiment.make_model(ours))


def train(config, workdir, trainer):
    """Runs `trainer`, big_vision's module, on our config in `workdir`.

    Its flags must have been parsed; --config and --workdir are set to what is given here.

    Raises:
      ValueError: the config has a mistake, or asks for what its trainer can't do.
    """
    check(config)
    theirs = configs.translate(config, note=lambda s: print(s, file=sys.stderr, flush=True))
    compilation_cache.start(config.get("compilation_cache", True) and bool(workdir), workdir)
    flags.FLAGS["config"].value = theirs
    flags.FLAGS["workdir"].value = workdir
    with sharding.rules(config, experiment.make_mesh(config)):
        trainer.main([])


@experiment.command
def main(argv):
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)  # where its trainer tells its metrics
    if flags.FLAGS.config is None:
        raise app.UsageError("--config is needed.")
    train(flags.FLAGS.config, flags.FLAGS.workdir, importlib.import_module(TRAINER))


def start():
    """The program: finds big_vision, has it define its flags, and runs."""
    try:
        upstream.install()
    except ValueError as e:
        sys.exit(f"error: {e}")
    importlib.import_module(TRAINER)
    app.run(main, flags_parser=experiment.parse_flags)


if __name__ == "__main__":
    start()
