"""Runs the evals of a config on weights, with their controls, and prints the tables.

    python -m paligemma_med.evaluate --workdir=out/s1          (a run: its own config and weights)
    python -m paligemma_med.evaluate --config=configs/x.py --checkpoint=w.npz --out=out/eval

Each evaluator writes metrics.json and predictions.jsonl under <workdir or out>/eval/<name>/. In
several processes (docs/clusters.md) the first one prints and writes.
"""

import os

from absl import app, flags

from paligemma_med import distributed, experiment, preflight, sharding
from paligemma_med.evaluators import vqa


def evaluate(config, checkpoint, out, only=None):
    """Runs config.evals on `checkpoint` and prints a table for each.

    Args:
      config: ConfigDict of an experiment.
      checkpoint: anything `checkpoints.load_params` takes.
      out: folder for eval/<name>/.
      only: names of the evals to run, or None for all.

    Returns:
      {name: {metric: value}}.
    """
    if unknown := sorted(set(only or []) - set(config.get("evals") or {})):
        raise ValueError(f"config.evals has no {unknown}; it has {sorted(config.evals)}.")
    experiment.check_config(config)
    preflight.check_evals(config, experiment.make_model(config))
    model, tok, mesh, params = experiment.load(config, checkpoint)
    evaluators = experiment.make_evaluators(config, model, tok, mesh, out)
    if not evaluators:
        raise ValueError("config.evals is empty: there is nothing to evaluate.")
    results = {}
    for name, (evaluator, _) in evaluators.items():
        if only and name not in only:
            continue
        with sharding.rules(config, mesh):
            results[name] = evaluator.run(params)
        if not distributed.is_main():
            continue
        print(f"\n{name} on {checkpoint}\n\n{vqa.format_table(results[name])}", flush=True)
        print(f"\nWritten to {os.path.join(out, 'eval', name)}", flush=True)
    return results


@experiment.command
def main(argv):
    del argv
    distributed.start_from_flags(awaits_sigterm=False)
    config, checkpoint = experiment.from_flags()
    out = flags.FLAGS.out or flags.FLAGS.workdir
    if out is None:
        raise app.UsageError("--out is needed with --checkpoint.")
    evaluate(config, checkpoint, out, flags.FLAGS.only)


if __name__ == "__main__":
    experiment.define_source_flags()
    flags.DEFINE_string("out", None, "Where eval/ goes; default: the workdir.")
    flags.DEFINE_list("only", None, "Names of the evals to run; default: all.")
    app.run(main, flags_parser=experiment.parse_flags)
