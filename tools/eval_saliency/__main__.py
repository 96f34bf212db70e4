"""Measures saliency maps against boxes: do they point at what the answer names?

    python -m tools.eval_saliency --workdir=out/slake_mini --split=validate --out=out/saliency

Takes the questions whose answer names an organ or a finding that has a box in the image, has the model
answer them, and compares each method's map of that answer with the boxes, and with maps that don't
depend on the model. Deletion and insertion curves ask the model itself whether the patches that a map
ranks first matter. docs/saliency.md explains the figures.

Writes predictions.jsonl (one line per question), metrics.json and saliency.md to --out. If interrupted,
the same command resumes.
"""
# The docstring above is what --help prints.

import contextlib
import pathlib
import sys

from absl import app, flags

from paligemma_med import cli, experiment, files, input_pipeline
from paligemma_med.evaluation import results
from paligemma_med.parallel import distributed, sharding
from paligemma_med.pp import command_line
from paligemma_med.saliency import occlusion
from tools.eval_saliency.measure import Subject, measure_all
from tools.eval_saliency.questions import boxed_questions
from tools.eval_saliency.summary import summarise
from tools.eval_saliency.tables import markdown

# Raise it when the content of rows changes: an evaluation with older rows then starts again.
ROWS_VERSION = 2


@cli.command
def main(argv) -> None:
    del argv
    v = flags.FLAGS
    if not v.out:
        raise app.UsageError("Give --out, the folder to write to.")
    config, checkpoint = cli.from_flags()
    data, train = (
        dict(name=v.data, split=s, **(dict(data_dir=v.data_dir) if v.data_dir else {}))
        for s in (v.split, v.train_split)
    )
    source, train_source = input_pipeline.open_source(data), input_pipeline.open_source(train)
    asked = boxed_questions(source)[: v.limit]
    subject = Subject(config, checkpoint)
    settings = dict(steps=v.steps, fill=v.fill, seed=v.seed, **(dict(own=True) if v.own_boxes else {}))
    section = dict(data=data, train=train, limit=v.limit, rows=ROWS_VERSION, **settings)
    about = experiment.about(section, checkpoint, subject.params)
    identity = {k: x for k, x in about.items() if k not in ("checkpoint", "command")}
    rows = results.finished(v.out, identity)
    if rows is None:
        part = results.Part(v.out, identity)
        with contextlib.closing(part), sharding.rules(config, subject.mesh):
            rows = measure_all(subject, source, train_source, asked, part, batch_size=v.batch_size, **settings)
    else:
        print(f"{v.out} is there for these weights.", file=sys.stderr)
    summary = summarise(rows, v.seed)
    results.write(v.out, rows, {"saliency": summary}, about)
    text = markdown(summary)
    files.write_text(pathlib.Path(v.out) / "saliency.md", text)
    print(text)


if __name__ == "__main__":
    cli.define_source_flags()
    distributed.define_flags()
    flags.DEFINE_string("data", "slake/en", "Data set, as built by data_prep, with boxes.")
    flags.DEFINE_string("split", "validate", "Split that is measured.")
    flags.DEFINE_string("train_split", "train", "Split whose boxes make the priors.")
    command_line.define_path("data_dir", None, "Where data sets are built; default: $TFDS_DATA_DIR.")
    command_line.define_path("out", None, "Folder to write to.")
    flags.DEFINE_integer("limit", None, "Only the first so many questions; default: all.")
    flags.DEFINE_integer("steps", 16, "Steps of the deletion and insertion curves.", lower_bound=1)
    flags.DEFINE_enum("fill", "blur", occlusion.FILLS, "What replaces patches.")
    flags.DEFINE_bool("own_boxes", False, 'Also compare maps with the boxes that the model says to "detect …".')
    flags.DEFINE_integer("batch_size", 32, "Images a pass.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "For random maps and the intervals' draws.")
    app.run(main, flags_parser=cli.parse_flags)
