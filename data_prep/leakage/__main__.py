"""Compare built data sets: which images are in both (by content, look, MedPix number, article), and which questions.

Examples:
  python -m data_prep.leakage vqa_rad/public medpix2/caption vqa_med_2019 --out=leakage
  python -m data_prep.leakage slake/en --out=leakage         # one set: its splits with each other

OUT gets leakage.html, a page of pairs, and leakage.json with all of them.
"""
# The docstring above is what --help prints.

import itertools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data_prep import files
from data_prep.files import DataError
from data_prep.leakage import compare, page, records
from paligemma_med.pp import command_line
from paligemma_med.pp.files import default_data_dir

JSON, PAGE = "leakage.json", "leakage.html"


def leakage(
    sets: dict[str, pathlib.Path], out: pathlib.Path, shown: int = 200, note: Any = print
) -> list[dict[str, Any]]:
    """Compares all splits of all sets, or the splits of a single one with each other, and writes page and JSON.

    Args:
      sets: {name: folder of the records}.
      out: folder, made if missing.
      shown: how many pairs of two splits the page shows.
      note: called with each line of the result.

    Returns:
      What leakage.json has of each two splits with anything in common: a, b, counts, pairs.
    """
    loaded, about = {}, {}
    for name, folder in sets.items():
        sizes = records.splits_of(folder)
        parts = loaded[name] = {s: records.pictures(name, folder, s, n) for s, n in sizes.items()}
        counts = {s: {"images": len(parts[s]), "rows": n} for s, n in sizes.items()}
        about[name] = {"folder": str(folder), "splits": counts}
    sections, told = [], []
    for (a, s), (b, t) in _to_compare({name: list(parts) for name, parts in loaded.items()}):
        one, other = loaded[a][s], loaded[b][t]
        pairs, counts = compare.compare(one, other)
        if not pairs and not counts["article"]["a"]:
            continue
        named = dict(a=f"{a} {s}", b=f"{b} {t}", counts=counts)
        note(_line(named))
        told.append(named | dict(pairs=[_plain(p, one, other) for p in pairs]))
        first = pairs[:shown]
        urls = (
            _urls(sets[a], s, {one[p.a].number for p in first}),
            _urls(sets[b], t, {other[p.b].number for p in first}),
        )
        cards = [(p, one[p.a], other[p.b], urls[0][one[p.a].number], urls[1][other[p.b].number]) for p in first]
        sections.append(named | dict(pairs=cards, of=len(pairs), number=len(sections)))
    if not told:
        note("nothing was found in common")
    files.write_json(out / JSON, dict(sets=about, ways=compare.WAYS, compared=told))
    with files.whole_file(out / PAGE) as f:
        f.write(page.render(about, sections, shown).encode("utf-8", "replace"))
    return told


def _to_compare(splits: dict[str, list[str]]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    if len(splits) == 1:
        ((name, own),) = splits.items()
        yield from (((name, s), (name, t)) for s, t in itertools.combinations(own, 2))
        return
    for a, b in itertools.combinations(splits, 2):
        yield from (((a, s), (b, t)) for s in splits[a] for t in splits[b])


def _urls(folder: pathlib.Path, split: str, numbers: set[int]) -> dict[int, str]:
    return {i: page.small(content) for i, content in records.contents(folder, split, numbers).items()}


def _plain(pair: compare.Pair, a: Sequence[records.Picture], b: Sequence[records.Picture]) -> dict[str, Any]:
    again = [dict(question=q, answer_a=x, answer_b=y) for q, x, y in pair.again]
    ids = dict(image_id_a=a[pair.a].image_id, image_id_b=b[pair.b].image_id)
    return ids | dict(ways=pair.ways, bits_that_differ=pair.distance, questions=again)


def _line(section: dict[str, Any]) -> str:
    counts = section["counts"]
    ways = [f"{counts[way]['a']:,} by {way}" for way in compare.WAYS if counts[way]["a"]]
    line = f"{section['a']} and {section['b']}: images of the first with a partner in the second: {', '.join(ways)}"
    if counts["questions"]:
        line += f"; {counts['questions']:,} questions of the second about such images stand in the first"
        line += f", {counts['answers']:,} with the same answer"
    return line


def main(argv: Sequence[str]) -> None:
    """Command line; exits with 1 and one line on bad input."""
    logging.set_verbosity(logging.WARNING)  # TFDS logs every file it reads
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        if len(argv) < 2:
            raise DataError("expected built data sets, such as slake/en; --help shows an example")
        if repeated := [name for i, name in enumerate(argv[1:]) if name in argv[1 : i + 1]]:
            raise DataError(f"{repeated[0]} is named twice; expected each data set once")
        data_dir = pathlib.Path(flags.FLAGS.data_dir or default_data_dir()).expanduser()
        sets = {name: files.built_folder(name, data_dir) for name in argv[1:]}
        leakage(sets, pathlib.Path(flags.FLAGS.out).expanduser(), flags.FLAGS.show)
    except (DataError, OSError) as e:
        sys.exit(f"error: {files.told(e, flags.FLAGS.out)}")
    print(f"{PAGE} and {JSON} are in {flags.FLAGS.out}")


if __name__ == "__main__":
    command_line.define_path("data_dir", None, "Where the data sets were built.")
    command_line.define_path("out", None, "Folder for page and JSON.", required=True)
    flags.DEFINE_integer("show", 200, "How many pairs of two splits the page shows.", lower_bound=0)
    app.run(main, flags_parser=command_line.parse_flags)
