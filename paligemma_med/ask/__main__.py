"""Answers a table of questions on images: one load of the weights, one line of answers.csv for each row.

    python -m paligemma_med.ask --workdir=out/s1 --table=q.csv --images=films --out=out/answers
    python -m paligemma_med.ask --config=configs/x.py --checkpoint=w.npz --table=q.xlsx --images=films --out=out/answers

The table (.csv, .tsv, .jsonl, .parquet, .xlsx) has columns image, a path below --images, and question; other names are
mapped by --columns=image=file,question=frage. DICOM files and folders of slices are read too. answers.csv keeps the
table's columns and adds model_answer, logprob, note and error. Killed at any time, the same command goes on. Not for
diagnosis.
"""

import os
import shlex
import sys

from absl import app, flags

from paligemma_med import cli
from paligemma_med.ask import sheet as sheets
from paligemma_med.ask.answering import Answerer
from paligemma_med.ask.table import ask_table, check_images, identity_of
from paligemma_med.parallel import distributed, ending
from paligemma_med.pp import command_line, own_table

_DECODING = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    distributed.start_from_flags(awaits_sigterm=False)
    if not ending.is_alone():
        raise app.UsageError("ask runs in one process, on all its devices.")
    if os.path.exists(values.out) and not os.path.isdir(values.out):
        raise ValueError(f"--out {values.out}: a file; expected a folder.")
    if values.batch_size < 0:
        raise app.UsageError(f"--batch_size={values.batch_size}; expected 0 or more.")
    # A row whose image is missing has a line of its own, which says so.
    table = own_table.open_table(
        values.table, images=values.images, columns=values.columns, missing_images=True, choose=values.choose
    )
    check_images(table)
    for sentence in table.summary():
        if not sentence.startswith(f"{table.name}: made up"):  # which nobody sees here
            print(sentence, file=sys.stderr)
    config, checkpoint = cli.from_flags()
    decoding = {k: values[k].value for k in _DECODING}
    answerer = Answerer(config, checkpoint, batch_size=values.batch_size, **decoding)
    settings = decoding | ({"choose": values.choose} if values.choose else {})
    identity = identity_of(answerer, table, images=values.images and os.path.abspath(values.images), settings=settings)
    if values.overwrite:
        sheets.remove(values.out)
    done = ask_table(answerer, table, values.out, identity, raw=values.raw_cells)
    tell(done, values, table)


def tell(done, values, table) -> None:
    """Says what came of it, and what can be done next."""
    before = f" ({done.before} of them from an earlier start)" if done.before else ""
    print(f"Rows: {done.rows}{before}; answers: {done.rows - done.failed}; images read: {done.images}.")
    if done.failed:
        print(f"Rows without an answer: {done.failed}; the column error says why.")
    if table.dropped:
        print(f"Rows of {values.table} that can't be asked, told above: {len(table.dropped)}.")
    if done.escaped:
        print(
            f"Cells that a spreadsheet would run as a formula: {done.escaped}; they begin with an apostrophe now, and "
            "--raw_cells leaves them as they are."
        )
    print(f"Written to {done.path}")
    if "answer" in table.own:
        given = [f"--{k}={values[k].value}" for k in ("workdir", "checkpoint", "adapter") if values[k].value]
        given += [a for a in sys.argv if a.startswith(("--config", "--images=", "--columns=", "--choose="))]
        command = [f"--table={values.table}", *given, f"--out={os.path.join(values.out, 'measured')}"]
        print(f"How many are right, with controls: python -m paligemma_med.evaluate {shlex.join(command)}")


if __name__ == "__main__":
    cli.define_source_flags()
    distributed.define_flags()
    command_line.define_path("table", None, "Table of questions: .csv, .tsv, .jsonl, .parquet, .xlsx.", required=True)
    command_line.define_path("images", None, "Folder that the table's images are in; default: the table's own.")
    flags.DEFINE_string("columns", None, "Names of the table's columns, such as image=file,question=frage.")
    command_line.define_choose()
    command_line.define_path("out", None, "Folder of answers.csv.", required=True)
    flags.DEFINE_integer("batch_size", 0, "Questions at a time; 0 chooses. Halved where memory doesn't suffice.")
    flags.DEFINE_bool("overwrite", False, "Delete the answers of an earlier start, and ask all anew.")
    flags.DEFINE_bool("raw_cells", False, "Leave cells that begin with = + - @ as they are, for programs.")
    flags.DEFINE_integer("max_new_tokens", 64, "Length of an answer, at most.")
    flags.DEFINE_float("temperature", 0.0, "0 gives the most probable answer.")
    flags.DEFINE_integer("top_k", 0, "Sampling from so many of the most probable tokens; 0: all.")
    flags.DEFINE_float("top_p", 1.0, "Nucleus sampling.")
    flags.DEFINE_integer("seed", 0, "Seed of the samples.")
    app.run(main, flags_parser=cli.parse_flags)
