"""Runs the evals of a config on weights, with their controls, and prints the tables.

    python -m paligemma_med.evaluate --workdir=out/s1          (a run: its own config and weights)
    python -m paligemma_med.evaluate --config=configs/x.py --checkpoint=w.npz --out=out/eval
    python -m paligemma_med.evaluate --workdir=out/s1 --config.evals.val.data.split='validate[:50]' --out=out/trial
    python -m paligemma_med.evaluate --workdir=out/s1 --table=q.csv --images=films --out=out/measured   (an own table)
    python -m paligemma_med.evaluate --server=http://127.0.0.1:8000/v1 --model=NAME --config=configs/x.py --out=out/m
                                              (a model behind a server, or with --table in place of --config)

Each evaluator writes metrics.json and predictions.jsonl to <workdir or out>/eval/<name>/. If it is killed,
the same command resumes after the last batch; evals that are finished for the same weights and settings
aren't run again. Of several processes (docs/clusters.md) the first one prints and writes.

    python -m paligemma_med.evaluate --config=configs/x.py --dry_run --chip=h200

compiles the programs of config.evals instead, and prints what they take and do (`forecast`): no weights, no data and no
such chip are needed.
"""

import os
import sys

from absl import app, flags

from paligemma_med import cli, experiment, forecast, preflight, table_eval, weights
from paligemma_med.checkpoints import workdir
from paligemma_med.config import values as config_values
from paligemma_med.metrics import scoring, tables
from paligemma_med.parallel import chips, distributed, notes, sharding
from paligemma_med.pp import command_line
from paligemma_med.served import program as served
from paligemma_med.setup import Setup


def evaluate(config, checkpoint, out, only=None, controls=None, resume=True) -> dict[str, dict]:
    """Runs config.evals on `checkpoint` and prints a table for each.

    Args:
      config: ConfigDict of an experiment; not changed.
      checkpoint: anything `checkpoints.load_params` takes.
      out: folder for eval/<name>/.
      only: names of the evals to run, or None for all. What the others need may be missing.
      controls: for all evals; None: the config's; "all": all controls, except for sections that name their
        own.
      resume: whether to resume an interrupted evaluation.

    Returns:
      {name: {metric: value}}.
    """
    config = _selected(config, only)
    _leave_to_training(config, checkpoint, only)
    _set_controls(config, controls)
    setup = Setup(config)
    config = setup.config
    preflight.check_evals(setup)
    model, tok, mesh, params = weights.load(config, checkpoint)
    evaluators = experiment.make_evaluators(config, model, tok, mesh, out, checkpoint)
    if not evaluators:
        raise ValueError("config.evals is empty: there is nothing to evaluate.")
    results = {}
    for name, (evaluator, _) in evaluators.items():
        evaluator.resume = resume
        with sharding.rules(config, mesh):
            results[name] = evaluator.run(params)
        if not distributed.is_main():
            continue
        print(f"\n{name} on {checkpoint}\n\n{tables.format_table(results[name])}", flush=True)
        print(f"\nWritten to {os.path.join(out, 'eval', name)}", flush=True)
    return results


def _selected(config, only):
    """A copy of the config with only these evals."""
    evals = config.get("evals") or {}
    if unknown := sorted(set(only or []) - set(evals)):
        raise ValueError(f"config.evals has no {unknown}; it has {sorted(evals)}.")
    config = config.copy_and_resolve_references()
    if only:
        with config.unlocked():
            for name in set(evals) - set(only):
                del config.evals[name]
    return config


def _leave_to_training(config, checkpoint, only):
    """Takes out of a copy of a config the evals of weights that aren't read here: of a run that averages its weights
    (config.ema_decay), those as trained."""
    run = workdir.split_spec(checkpoint) if isinstance(checkpoint, str) else None
    if run is None or not workdir.read_config(run[0]).get("ema_decay"):
        return
    left = [name for name, section in (config.get("evals") or {}).items() if not section.get("ema", True)]
    if chosen := [name for name in left if name in (only or [])]:
        raise ValueError(
            f"config.evals.{chosen[0]} has ema=False, so that it is only run in training: of {run[0]} the averaged "
            "weights are read here (config.ema_decay)."
        )
    for name in left:
        notes.say(f"config.evals.{name} has ema=False, so that it is only run in training: left out.", file=sys.stderr)
        with config.unlocked():
            del config.evals[name]


def _set_controls(config, controls):
    """Puts them into the sections of config.evals. Without train_data there are no majorities, and dialogues can't
    be asked with other images."""
    if controls is None:
        return
    for section in (config.get("evals") or {}).values():
        if config_values.is_big_visions(section) or section.get("type") == "perplexity":
            continue
        if controls == "all" and "controls" in section:
            continue
        names = scoring.CONTROLS if controls == "all" else controls
        if controls == "all" and not section.get("train_data"):
            names = [c for c in names if not c.startswith("majority")]
        if section.get("type") == "dialogue":
            names = [c for c in names if c not in scoring.IMAGE_CONTROLS]
        with section.unlocked():
            section.controls = list(names)


_OF_SERVER = ("model", "template", "send_images_to", "concurrency", "requests_per_minute", "timeout")


def _evaluate_served(values):
    """--server: the questions of --config or --table, and no weights of ours."""
    if not (values.model and values.out):
        raise app.UsageError("--server goes with --model and --out.")
    if given := [k for k in ("checkpoint", "workdir", "adapter", "base", "batch_size") if values[k].present]:
        raise app.UsageError(f"--{given[0]} is for weights of ours, and --server asks a model elsewhere: leave it out.")
    _check_table_flags(values)
    if values.table:
        kw = dict(images=values.images, columns=values.columns, choose=values.choose)
        train = table_eval.data_of(values.train_table, **kw) if values.train_table else None
        data = table_eval.data_of(values.table, split=values.split, **kw)
        section = served.table_section(data, train, max_new_tokens=values.max_new_tokens)
        sections = {table_eval.name_of(values.table): section}
    elif values.config:
        sections = _selected(values.config, values.only).get("evals") or {}
    else:
        raise app.UsageError("--server goes with --config or --table, which say what is asked.")
    served.evaluate(
        sections,
        values.out,
        server=values.server,
        controls="all" if values.controls == ["all"] else values.controls,
        resume=values.resume,
        **{k: values[k].value for k in _OF_SERVER},
    )


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    if values.server:
        _evaluate_served(values)
        return
    if given := [k for k in _OF_SERVER if values[k].present]:
        raise app.UsageError(f"--{given[0]} goes with --server.")
    distributed.start_from_flags(awaits_sigterm=False)
    if cli.check_chip_flags("dry_run", "find_batch_size"):
        _forecast(values)
        return
    if values.prompt_len is not None:
        raise app.UsageError("--prompt_len is for --dry_run and --find_batch_size alone.")
    config, checkpoint = cli.from_flags()
    if values.out is None and cli.is_changed_run():
        raise app.UsageError(
            "--config.… changes what the run is evaluated with: give --out, so that its own eval/ stays."
        )
    if values.out is None and values.table:
        raise app.UsageError("--table goes with --out, so that the run's own eval/ stays.")
    out = values.out or values.workdir
    if out is None:
        raise app.UsageError("--out is needed with --checkpoint.")
    config = _with_table(config, values)
    controls = "all" if values.controls == ["all"] else values.controls
    evaluate(config, checkpoint, out, values.only, controls, values.resume)


def _forecast(values):
    """--dry_run and --find_batch_size: what the programs take, for this machine's devices or for --chip."""
    config = _selected(_with_table(cli.config_from_flags(), values), values.only)
    if values.find_batch_size and values.chip is None:
        raise app.UsageError("--find_batch_size goes with --chip.")
    with chips.aimed_at(values.chip):
        setup = Setup(config)
        if values.find_batch_size:
            forecast.find_batch_sizes(setup, values.prompt_len)
        else:
            forecast.run(setup, forecast.of_evals(setup, values.prompt_len), forecast.ADVICE)


def _check_table_flags(values):
    """Raises UsageError for a flag that would be ignored: those of --table without it, or --only with it."""
    of_table = ("images", "columns", "choose", "split", "train_table", "max_new_tokens", "batch_size")
    if values.table and values.only:
        raise app.UsageError("--only chooses among config.evals, of which --table runs none.")
    if not values.table and (given := [k for k in of_table if values[k].present]):
        raise app.UsageError(f"--{given[0]} goes with --table.")


def _with_table(config, values):
    """The config, or a copy whose only evaluation is that of --table."""
    _check_table_flags(values)
    if not values.table:
        return config
    kw = dict(images=values.images, columns=values.columns, choose=values.choose)
    data = table_eval.data_of(values.table, split=values.split, **kw)
    trained_on = table_eval.trained_on(config, data)
    train_data = table_eval.data_of(values.train_table, **kw) if values.train_table else trained_on
    if trained_on and table_eval.is_same_table(trained_on, data) and values.split == "all":
        notes.say(
            f"This run was trained on {values.table} (split {trained_on['split']}), whose rows are among those asked: "
            "--split=test takes others.",
            file=sys.stderr,
        )
    section = table_eval.section(
        config, data, train_data, max_new_tokens=values.max_new_tokens, batch_size=values.batch_size
    )
    if not train_data:
        notes.say(
            "No majority answers, which are counted in training questions: --train_table names them.", file=sys.stderr
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evals = {table_eval.name_of(values.table): section}
    return config


if __name__ == "__main__":
    cli.define_source_flags()
    distributed.define_flags()
    command_line.define_path("out", None, "Where eval/ goes; default: the workdir.")
    flags.DEFINE_list("only", None, "Names of the evals to run; default: all.")
    flags.DEFINE_list("controls", ["all"], f"Some of {', '.join(scoring.CONTROLS)}, or all.")
    command_line.define_path("table", None, "An own table to evaluate on, in place of config.evals (docs/own_data.md).")
    command_line.define_path("images", None, "Folder that the table's images are in; default: the table's own.")
    flags.DEFINE_string("columns", None, "Names of the table's columns, such as image=file,question=frage.")
    command_line.define_choose()
    flags.DEFINE_string("split", "all", "Which of the table's rows: all, test, 'validate[:50]', …")
    command_line.define_path("train_table", None, "Table of training questions, in which majority answers are counted.")
    flags.DEFINE_integer("max_new_tokens", 0, "Length of an answer to --table, at most; 0: as config.evals, or 64.")
    flags.DEFINE_integer("batch_size", 0, "Questions of --table at a time; 0: as config.evals, or 32.")
    flags.DEFINE_string("server", None, "Address, …/v1, of an OpenAI-compatible server to ask in place of weights.")
    flags.DEFINE_string("model", None, "The model that --server is asked for, as the server calls it.")
    command_line.define_path("template", None, "How --server is asked: a JSON file (docs/evaluation.md).")
    flags.DEFINE_string("send_images_to", None, "Host that images may be sent to, unless it is this machine.")
    flags.DEFINE_integer("concurrency", 8, "Requests to --server under way at a time.")
    flags.DEFINE_float("requests_per_minute", None, "At most so many requests to --server are begun.")
    flags.DEFINE_float("timeout", 120.0, "Seconds from a request to --server to its reply's end.")
    flags.DEFINE_bool("resume", True, "Resume an interrupted evaluation.")
    cli.define_chip_flags()
    flags.DEFINE_bool("find_batch_size", False, "How many questions at a time fit on --chip.")
    flags.DEFINE_integer("prompt_len", None, "--dry_run: tokens of the longest prompt; default: all that fit.", 1)
    app.run(main, flags_parser=cli.parse_flags)
