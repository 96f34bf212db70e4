"""The main job from end to end, in minutes, on data and weights that are all here.

    python -m tools.quickstart

Builds the phantoms (drawn radiology-like images with questions), evaluates the tiny base model on
them, adapts it in two stages (the projection head, then LoRA in both towers), evaluates after each
with controls, asks it about one image, and prints a table. If interrupted, the same command resumes;
--overwrite starts again.
"""
# The docstring above is what --help prints. Nothing here does the work: each step is the library
# function behind the command that a user would run for it, and says which one that is.

import os
import pathlib
import shutil
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

from data_prep import build
from data_prep.files import DataError
from paligemma_med import evaluate, input_pipeline, predict, train
from paligemma_med.config import files as config_files
from paligemma_med.evaluation import results as evaluations
from paligemma_med.pp import command_line

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIG = "configs/quickstart.py"
GROUPS = {"closed": "answer_type/CLOSED", "open": "answer_type/OPEN", "overall": "overall"}
STEPS = 5
# Of phantoms in train, validate and test: more than the builder's own, since drawing is quick and new
# pictures teach more than the same ones again.
NUM_IMAGES = (1300, 120, 150)


def run(stage1, stage2, out, *, num_images=NUM_IMAGES) -> dict[str, dict]:
    """Runs the quickstart, or what is left of it.

    Args:
      stage1, stage2: ConfigDicts as `configs/quickstart.py` gives them. Their data are looked for,
        and built, in `out`/data; stage 2 starts from `out`/stage1, whatever its model_init.
      out: folder of everything that is written.
      num_images: of the phantoms in train, validate and test.

    Returns:
      Rows of the table: {row: metrics}, the figures under "model/…" whatever the row.

    Raises:
      ValueError: `out` holds a run with other settings.
    """
    out = pathlib.Path(out)
    base, first, second, data_dir = (out / x for x in ("base", "stage1", "stage2", "data"))
    place(stage1, stage2, out)
    _check_same(stage1, first)
    _check_same(stage2, second)
    (name, section), *_ = stage2.evals.items()

    sizes = ",".join(map(str, num_images))
    _announce(1, "build the data", f"python -m data_prep.build phantom --data_dir {data_dir} --num_images={sizes}")
    build.build("phantom", data_dir=data_dir, num_images=num_images)

    _announce(
        2,
        "evaluate the base model",
        f"python -m paligemma_med.evaluate --config={config_argument(1, out)} "
        f"--checkpoint={stage1.model_init} --out={base}",
    )
    before = _finished(base, name)
    if before is None:
        before = evaluate.evaluate(stage1, stage1.model_init, str(base))[name]

    _announce(
        3,
        "stage 1: train the projection head",
        f"python -m paligemma_med.train --config={config_argument(1, out)} --workdir={first}",
    )
    middle = _train(stage1, first, name)

    _announce(
        4,
        "stage 2: train LoRA in both towers",
        f"python -m paligemma_med.train --config={config_argument(2, out)} --workdir={second}",
    )
    after = _train(stage2, second, name)

    image, rows = _example(section.data, out)
    _announce(
        5,
        "ask it about an image",
        f'python -m paligemma_med.predict --workdir={second} --image={image} --question="{rows[0]["question"]}"',
    )
    questions = [r["question"] for r in rows]
    answered = predict.predict(stage2, str(second), rows[0]["image"], questions, max_new_tokens=12)
    for row, found in zip(rows, answered):
        answer = found["answers"][0]["answer"]
        print(f"  {row['question']}\n    model: {answer}    truth: {row['answer']}")

    results = {
        "base model": before,
        "majority answer per question (no image)": _as_model(after, "majority"),
        "after stage 1 (projection head)": middle,
        "after stage 2 (LoRA in both towers)": after,
        "after stage 2, images shuffled": _as_model(after, "shuffled_images"),
    }
    table = format_table(results)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\nPhantoms, {section.data.split} split: exact match, % (95 % interval)\n\n{table}\n")
    for what, path in {
        "this table": out / "table.md",
        "data": data_dir,
        "base model": base / "eval" / name,
        "stage 1": first,
        "stage 2": second,
        "its figures": second / "eval" / name / "metrics.json",
        "its answers": second / "eval" / name / "predictions.jsonl",
        "the image asked about": image,
    }.items():
        print(f"{what:<22} {path}")
    return results


def place(stage1, stage2, out) -> None:
    """Says in both configs where under `out` their data are, and that stage 2 follows stage 1."""
    for config in (stage1, stage2):
        with config.unlocked():  # configs that come from a flag are locked
            evals = config.evals.values()
            for data in (config.input.data, *(e[k] for e in evals for k in ("data", "train_data") if k in e)):
                data.data_dir = os.path.abspath(out / "data")
    with stage2.unlocked():
        stage2.model_init = os.path.abspath(out / "stage1")


def config_argument(stage, out) -> str:
    """What --config of `train` must be to get the config of a stage, if none was given by flag."""
    init = f",init={out / 'stage1'}" if stage == 2 else ""
    return f"{CONFIG}:stage={stage}{init},data_dir={out / 'data'}"


def _train(config, workdir, name):
    """Trains what is left to train; gives the metrics of eval `name` at the end."""
    found = train.train(config, str(workdir)).get(name) or _finished(workdir, name)
    return found or evaluate.evaluate(config, str(workdir), str(workdir))[name]


def format_table(results) -> str:
    """{row: metrics of the vqa evaluator} → Markdown, a row each, a column for each of GROUPS."""
    counts = next(iter(results.values()))
    heads = [f"{group} (n = {_count(counts, key):,})" for group, key in GROUPS.items()]
    lines = [["model", *heads], ["-" * 5, *("-" * 4 + ":" for _ in heads)]]
    for row, metrics in results.items():
        cells = []
        for key in GROUPS.values():
            values = (metrics.get(f"model/{key}/{x}") for x in ("acc", "acc_low", "acc_high"))
            acc, low, high = (100 * v if v is not None else float("nan") for v in values)
            cells.append(f"{acc:.1f} ({low:.1f}–{high:.1f})")
        lines.append([row, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for i, line in enumerate(lines):
        if i == 1:
            line[:] = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
        line[:] = [line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:]))]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _count(metrics, key):
    return metrics["n"] if key == "overall" else metrics.get(f"n/{key}", 0)


def _as_model(metrics, control):
    """The figures of a control as those of a model of its own."""
    out = {k: v for k, v in metrics.items() if k == "n" or k.startswith("n/")}
    for k, v in metrics.items():
        who, _, rest = k.partition("/")
        if who == control:
            out[f"model/{rest}"] = v
    return out


def _announce(step, what, command):
    print(f"\n[{step}/{STEPS}] {what}\n      as: {command_line.as_called(command)}\n", flush=True)


def _finished(workdir, name):
    """Metrics that an earlier run left, or None. They are written last, and whole."""
    path = workdir / "eval" / name / "metrics.json"
    return evaluations.read_metrics(path)[0] if path.is_file() else None


def _check_same(config, workdir):
    path = workdir / "config.json"
    text = config_files.to_json(config)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(f"{workdir} holds a run with other settings: give another --out, or --overwrite.")


def _example(data, out):
    """The first image of the split with a question on position: (its file, its rows)."""
    source = input_pipeline.open_source(data.to_dict())
    rows = [source[i] for i in range(len(source))]
    chosen = next((r for r in rows if r["content_type"] == "Position"), rows[0])
    path = out / "example.jpg"
    path.write_bytes(chosen["image"])
    return path, [r for r in rows if r["image_id"] == chosen["image_id"]]


def main(argv) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    out = pathlib.Path(values.out)
    started = time.monotonic()
    if values.overwrite:
        for name in ("base", "stage1", "stage2", "data"):  # --out may hold other things
            shutil.rmtree(out / name, ignore_errors=True)
    try:
        run(values.stage1, values.stage2, out)
    except KeyboardInterrupt:
        sys.exit("\nStopped; run the same command to resume.")
    except (DataError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    for stage in (1, 2):
        config_flags.DEFINE_config_file(
            f"stage{stage}", f"{ROOT / CONFIG}:stage={stage}", f"Experiment of stage {stage}."
        )
    command_line.define_path("out", "quickstart_out", "Folder of everything that is written.")
    flags.DEFINE_bool("overwrite", False, "Delete what an earlier run left there, and start anew.")
    app.run(main, flags_parser=command_line.parse_flags)
