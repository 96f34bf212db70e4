"""The main job from end to end, in minutes, on data and weights that are all here.

    python -m tools.quickstart

Builds the phantoms (drawn radiology-like images with questions), evaluates the tiny base model on
them, adapts it, evaluates the adapted model with its controls, asks it about one image, and prints
a table. Stopped at any point, the same command goes on where it was; --overwrite starts anew.
"""
# The docstring above is what --help prints. Nothing here does the work: each step is the library
# function behind the command that a user would run for it, and says which one that is.

import json
import os
import pathlib
import shutil
import sys
import time

from absl import app, flags, logging
from ml_collections import config_flags

from data_prep import build
from data_prep.files import DataError
from paligemma_med import evaluate, experiment, input_pipeline, predict, train

ROOT = pathlib.Path(__file__).resolve().parent.parent
GROUPS = {"closed": "answer_type/CLOSED", "open": "answer_type/OPEN", "overall": "overall"}
STEPS = 5


def run(config, out, *, num_images=None):
    """Runs the quickstart, or what is left of it.

    Args:
      config: ConfigDict as `configs/quickstart.py` gives it; its data are looked for, and built,
        in `out`/data.
      out: folder of everything that is written.
      num_images: of the phantoms in train, validate and test; None: the default size.

    Returns:
      Rows of the table: {row: metrics}, the figures under "model/…" whatever the row.

    Raises:
      ValueError: `out` holds a run with other settings.
    """
    out = pathlib.Path(out)
    base, adapted, data_dir = out / "base", out / "adapted", out / "data"
    (name, section), *_ = config.evals.items()
    with config.unlocked():  # configs that come from a flag are locked
        for data in (config.input.data, section.data, section.train_data):
            data.data_dir = os.path.abspath(data_dir)
    _check_same(config, adapted)
    fresh = config.copy_and_resolve_references  # evaluate and predict put their weights into it

    _announce(1, "build the data", f"python -m data_prep.build phantom --data_dir {data_dir}")
    build.build("phantom", data_dir=data_dir, num_images=num_images)

    _announce(2, "evaluate the base model", "python -m paligemma_med.evaluate --config=… "
              f"--checkpoint={config.model_init} --out={base}")  # fmt: skip
    before = _finished(base, name)
    if before is None:
        before = evaluate.evaluate(fresh(), config.model_init, str(base))[name]

    _announce(3, "adapt it to the data", f"python -m paligemma_med.train --config=… "
              f"--workdir={adapted}")  # fmt: skip
    after = train.train(fresh(), str(adapted)).get(name)

    _announce(4, "evaluate the adapted model, with controls",
              f"python -m paligemma_med.evaluate --workdir={adapted}")  # fmt: skip
    after = after or _finished(adapted, name)
    if after is None:
        after = evaluate.evaluate(fresh(), str(adapted), str(adapted))[name]
    else:
        print("done by the training run, at its end")

    image, rows = _example(section.data, out)
    _announce(5, "ask it about an image", f"python -m paligemma_med.predict --workdir={adapted} "
              f'--image={image} --question="{rows[0]["question"]}"')  # fmt: skip
    questions = [r["question"] for r in rows]
    answered = predict.predict(
        fresh(), str(adapted), rows[0]["image"], questions, max_new_tokens=12
    )
    for row, found in zip(rows, answered):
        answer = found["answers"][0]["answer"]
        print(f"  {row['question']}\n    model: {answer}    truth: {row['answer']}")

    results = {
        "base model": before,
        "majority answer per question (no image)": _as_model(after, "majority"),
        "adapted, images shuffled": _as_model(after, "shuffled_images"),
        "adapted": after,
    }
    table = format_table(results)
    (out / "table.md").write_text(table + "\n", encoding="utf-8")
    print(f"\nPhantoms, {section.data.split} split: exact match, % (95 % interval)\n\n{table}\n")
    for what, path in {
        "this table": out / "table.md",
        "data": data_dir,
        "base model": base / "eval" / name,
        "adapted model": adapted,
        "its figures": adapted / "eval" / name / "metrics.json",
        "its answers": adapted / "eval" / name / "predictions.jsonl",
        "the image asked about": image,
    }.items():
        print(f"{what:<22} {path}")
    return results


def format_table(results):
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
    print(f"\n[{step}/{STEPS}] {what}\n      as: {command}\n", flush=True)


def _finished(workdir, name):
    """Metrics that an earlier run left, or None. They are written last, and whole."""
    path = workdir / "eval" / name / "metrics.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _check_same(config, workdir):
    path = workdir / "config.json"
    text = experiment.config_to_json(config)
    if path.is_file() and path.read_text(encoding="utf-8") != text:
        raise ValueError(
            f"{workdir} holds a run with other settings: give another --out, or --overwrite."
        )


def _example(data, out):
    """The first image of the split with a question on position: (its file, its rows)."""
    source = input_pipeline.open_source(data.to_dict())
    rows = [source[i] for i in range(len(source))]
    chosen = next((r for r in rows if r["content_type"] == "Position"), rows[0])
    path = out / "example.jpg"
    path.write_bytes(chosen["image"])
    return path, [r for r in rows if r["image_id"] == chosen["image_id"]]


def main(argv):
    del argv
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    out = pathlib.Path(values.out)
    started = time.monotonic()
    if values.overwrite:
        for name in ("base", "adapted", "data"):  # its own alone: --out may hold other things
            shutil.rmtree(out / name, ignore_errors=True)
    try:
        run(values.config, out)
    except KeyboardInterrupt:
        sys.exit("\nStopped; the same command goes on from here.")
    except (DataError, ValueError) as e:
        sys.exit(f"error: {e}")
    print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    config_flags.DEFINE_config_file(
        "config", str(ROOT / "configs" / "quickstart.py"), "Experiment, perhaps with arguments."
    )
    flags.DEFINE_string("out", "quickstart_out", "Folder of everything that is written.")
    flags.DEFINE_bool("overwrite", False, "Delete what an earlier run left there, and start anew.")
    app.run(main)
