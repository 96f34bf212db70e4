"""Manual review of a sample of question-answer pairs: makes a page to judge on, and applies its verdicts.

    python -m tools.review_qa qa.jsonl --out=review.html --images=release:medpix2:MedPix-2.0
    python -m tools.review_qa qa.jsonl --verdicts=review_qa.csv --output=reviewed.jsonl

The first writes one HTML page that needs no server: image, caption, pairs with scores and tags, and
buttons for keep, discard, unsure; it remembers verdicts and saves them as a CSV. The second leaves out
discarded pairs and prints the share kept of each template, with an interval.
"""
# The docstring above is what --help prints.

import pathlib

from absl import app, flags

from paligemma_med import cli
from paligemma_med.pp import command_line
from tools.review_qa import page, pictures, rows, verdicts


def write_page(path, out, *, count=100, seed=0, images=(), data_dir=None) -> tuple:
    """Writes the page of a sample; arguments like the flags. Returns (pairs, of how many, images missing).

    Raises:
      ValueError: pairs or images can't be read.
    """
    rows.check_output(out, path)
    chosen, total = rows.sample(path, count, seed)
    find = [pictures.open_pictures(spec, data_dir) for spec in images]
    text, missing = page.make(chosen, total, name=pathlib.Path(path).name, seed=seed, find=find)
    rows.write_whole(out, [text.encode()])
    return len(chosen), total, missing


@cli.command
def main(argv) -> None:
    f = flags.FLAGS
    if len(argv) != 2:
        raise app.UsageError(f"Give one file of pairs; found {argv[1:]}.")
    if bool(f.out) == bool(f.verdicts) or bool(f.verdicts) != bool(f.output):
        raise app.UsageError("Give --out=PAGE, or --verdicts=CSV with --output=FILE.")
    if f.out:
        shown, total, missing = write_page(
            argv[1], f.out, count=f.rows, seed=f.seed, images=f.images, data_dir=f.data_dir
        )
        print(
            f"{f.out}: {shown:,} of {total:,} pairs"
            + (f"; {missing:,} images aren't shown, the page says why" if missing else "")
        )
        return
    found = verdicts.read(f.verdicts)
    report = verdicts.apply(argv[1], found, f.verdicts, f.output, drop_unsure=f.drop_unsure)
    for line in verdicts.describe(report):
        print(line)
    print(f"Written: {f.output}, and next to it .drops.jsonl and .report.json")


if __name__ == "__main__":
    command_line.define_path("out", None, "HTML page to write.")
    flags.DEFINE_integer("rows", 100, "Pairs to draw; 0: all.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the drawing.")
    flags.DEFINE_multi_string(
        "images", [], "Folder or .zip of images, release:NAME:FOLDER or tfds:NAME/CONFIG[:SPLIT]."
    )
    command_line.define_path("data_dir", None, "Where TFDS data sets are.")
    command_line.define_path("verdicts", None, "CSV that the page saved.")
    command_line.define_path("output", None, "With --verdicts: JSONL of the pairs that stay.")
    flags.DEFINE_bool("drop_unsure", False, "With --verdicts: also leave out the unsure ones.")
    app.run(main, flags_parser=cli.parse_flags)
