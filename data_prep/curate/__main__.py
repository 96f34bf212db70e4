"""Filter question-answer rows by a config's rules, and weigh them by pathology category.

Examples:
  python -m data_prep.curate --config=data_prep/curate/configs/paper.py \
      --input=rows.jsonl --output=kept.jsonl
  python -m data_prep.curate --config=data_prep/curate/configs/paper.py:min_cases=50 \
      --input=tfds:medpix2/qa:train --data_dir ~/tensorflow_datasets --output=kept.jsonl

If interrupted, the same command resumes. Next to the output it writes NAME.drops.jsonl (each dropped
row with its reasons) and NAME.report.json.
"""
# The docstring above is what --help prints.

import json
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from data_prep.curate.run import curate, describe, paths_of
from data_prep.files import DataError
from paligemma_med.pp import command_line
from paligemma_med.pp.files import default_data_dir


def main(argv: Sequence[str]) -> None:
    """Command line; exits with 1 and one line on bad input, with 130 when stopped by Ctrl-C."""
    values = flags.FLAGS
    logging.set_verbosity(logging.WARNING)  # TFDS logs what it loads
    try:
        if len(argv) > 1:
            raise DataError(f"unexpected argument {argv[1]!r}; --help shows an example")
        # JSON has lists where a ConfigDict may have tuples.
        config = json.loads(json.dumps(values.config.to_dict()))
        report = curate(
            config,
            values.input,
            values.output,
            data_dir=values.data_dir or default_data_dir(),
            overwrite=values.overwrite,
        )
    except DataError as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here", file=sys.stderr)
        sys.exit(130)
    for line in describe(report):
        print(line)
    paths = paths_of(values.output)
    there = "was already there: " if report.get("already_there") else ""
    print(f"{there}{paths.output}, {paths.drops.name}, {paths.report.name}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Rules and relevance; see configs/paper.py.")
    flags.DEFINE_multi_string("input", None, "JSONL, MedM's .json or .csv, or tfds:NAME:SPLIT.")
    command_line.define_path("output", None, "JSONL of the rows kept.")
    command_line.define_path("data_dir", None, "Where TFDS data sets are.")
    flags.DEFINE_bool("overwrite", False, "Begin anew, and replace what is there.")
    flags.mark_flags_as_required(["config", "input", "output"])
    app.run(main, flags_parser=command_line.parse_flags)
