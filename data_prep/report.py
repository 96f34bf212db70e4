"""What built data sets contain, for papers and checks: report.json, report.md, distributions.png.

Example:
  python -m data_prep.report slake/en medpix2/qa --data_dir ~/tensorflow_datasets --out out/report
  PALIGEMMA_TOKENIZER=gemma.json python -m data_prep.build slake --report out/report ...
"""
# The docstring above is what --help prints.
#
# Counts of rows read, dropped and shared between splits come from the build report next to the records;
# lengths and distributions from the records themselves, read one at a time, so that memory doesn't grow
# with the set.

import importlib.util
import os
import pathlib
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from absl import app, flags, logging

from data_prep import files
from data_prep.builders import tfrecord
from data_prep.builders.vqa import REPORT_NAME
from data_prep.files import DataError
from data_prep.ledger import FIRST
from data_prep.progress import progress
from paligemma_med.pp import command_line, markdown, tokenizer_files
from paligemma_med.pp.files import default_data_dir

TOKENIZER = "PALIGEMMA_TOKENIZER"
# Panel -> features that may hold its values; the first that a set has is used. Without question types,
# questions are grouped by their first word.
PANELS = {
    "Modality": ("modality",),
    "Body part": ("location_category", "location", "image_organ"),
    "Question type": ("content_type", "question_type"),
}
NONE = "(none)"
FIRST_WORD = "first word of the question"
_SHOWN = 12  # values of a panel; the rest is one bar
_BATCH = 512  # texts that are tokenized together


def check_installed() -> None:
    """Raises DataError if the extra `report` is missing, so that a build fails before it starts."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("--report needs matplotlib; pip install 'paligemma_med[report]'")


def write(out: str | os.PathLike, sets: Mapping[str, pathlib.Path]) -> dict[str, Any]:
    """Writes report.json, report.md and distributions.png into `out`.

    Args:
      out: folder, created if missing.
      sets: {"slake/en": folder of the records, ...}, as `data_prep.build.build` returns.

    Returns:
      What report.json holds: {"slake/en": {"build": …, "splits": …, "panels": …}, ...}.

    Raises:
      DataError: matplotlib is missing, or $PALIGEMMA_TOKENIZER names no tokenizer.
    """
    check_installed()
    out = pathlib.Path(out).expanduser()
    tokens = load_tokenizer(os.environ.get(TOKENIZER))
    found = {name: describe_set(name, folder, tokens) for name, folder in sets.items()}
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "report.json", found)
    with files.whole_file(out / "report.md") as f:
        f.write(to_markdown(found).encode())
    draw(found, out / "distributions.png")
    return found


def load_tokenizer(path: str | None) -> Callable[[list[str]], list[int]] | None:
    """Texts → their numbers of tokens, without special ones; None if no file is given.

    `path` is a SentencePiece `.model`, or a `tokenizers` JSON (also gzipped).
    """
    if not path:
        return None
    try:
        encode = tokenizer_files.read(path).encode
    except (OSError, ValueError) as e:
        raise DataError(f"{path}: no tokenizer ({e}); expected ${TOKENIZER} to name a .model or .json file") from None
    return lambda texts: [len(encode(text)) for text in texts]


def describe_set(name: str, folder: pathlib.Path, tokens: Callable[[list[str]], list[int]] | None) -> dict[str, Any]:
    """Build report, lengths and distributions of one built set."""
    path = folder / REPORT_NAME
    build = files.read_json(path) if path.is_file() else {"splits": {}}
    builder = files.open_built(folder)
    tfrecord.check_random_access(builder.info.file_format, folder)
    panels, splits = _panels(builder.info.features), {}
    for split in builder.info.splits:
        source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
        splits[split] = _describe_split(source, f"{name} {split}", panels, tokens)
    _leave_out_empty(panels, splits)
    return {
        "folder": str(folder),
        "build": {**build, "splits": {k: _normal(v) for k, v in build["splits"].items()}},
        "shared": build.get("shared") or _old_shared(build),
        "panels": panels,
        "splits": splits,
    }


def _panels(features: Any) -> dict[str, str]:
    found = {title: next((k for k in keys if k in features), None) for title, keys in PANELS.items()}
    return {title: key for title, key in found.items() if key} | {FIRST_WORD: FIRST_WORD}


def _leave_out_empty(panels: dict[str, str], splits: Mapping[str, Any]) -> None:
    """Drops features that are empty in all examples; question types have a substitute."""
    for title in PANELS:
        values = {v for split in splits.values() for v in split["tables"].get(title, ())}
        if values <= {NONE}:
            panels.pop(title, None)
            for split in splits.values():
                split["tables"].pop(title, None)
    panels.pop(FIRST_WORD)
    for split in splits.values():
        words = split["tables"].pop(FIRST_WORD)
        if "Question type" not in panels:
            split["tables"]["Question type"] = words
    panels.setdefault("Question type", FIRST_WORD)


def _describe_split(
    source: Any,
    what: str,
    panels: Mapping[str, str],
    tokens: Callable[[list[str]], list[int]] | None,
) -> dict[str, Any]:
    lengths = {f"{k}_{unit}": Counter() for k in ("question", "answer") for unit in _units(tokens)}
    tables = {title: Counter() for title in panels}
    waiting: dict[str, list[str]] = {"question": [], "answer": []}
    for i, example in enumerate(progress(source, f"reading {what}", len(source)), start=1):
        for key, texts in waiting.items():
            text = example[key].decode()
            lengths[f"{key}_words"][len(text.split())] += 1
            texts.append(text)
        for title, key in panels.items():
            tables[title][_value(example, key)] += 1
        if tokens and (i % _BATCH == 0 or i == len(source)):
            for key, texts in waiting.items():
                lengths[f"{key}_tokens"].update(tokens(texts))
        if i % _BATCH == 0:
            waiting = {key: [] for key in waiting}
    return {
        "examples": len(source),
        "lengths": {k: summary(counts) for k, counts in lengths.items()},
        "tables": {title: dict(table.most_common()) for title, table in tables.items()},
    }


def _units(tokens: object) -> Sequence[str]:
    return ("words", "tokens") if tokens else ("words",)


def _value(example: Mapping[str, Any], key: str) -> str:
    if key == FIRST_WORD:
        words = example["question"].decode().split()
        return words[0].strip(",.:;?!'\"").capitalize() if words else NONE
    return " ".join(example[key].decode().split()) or NONE


def summary(counts: Mapping[int, int]) -> dict[str, float]:
    """Mean, median, 95th percentile and maximum of counted lengths (nearest rank)."""
    ordered, total = sorted(counts.items()), sum(counts.values())
    if not total:
        return {}

    def rank(share: float) -> int:
        below = 0
        for length, n in ordered:
            below += n
            if below >= share * total:
                return length
        return ordered[-1][0]

    mean = sum(length * n for length, n in ordered) / total
    return {
        "mean": round(mean, 2),
        "median": rank(0.5),
        "p95": rank(0.95),
        "max": ordered[-1][0],
    }


def _normal(split: Mapping[str, Any]) -> dict[str, Any]:
    """A split's part of a build report in one form; some sets list all ids of dropped rows."""
    dropped = {
        reason: note if isinstance(note, Mapping) else {"count": len(note), "first": [str(i) for i in note[:FIRST]]}
        for reason, note in split["dropped"].items()
    }
    flags_ = dict(split.get("flags", {}))
    if n := split.get("duplicate_questions_kept"):
        flags_["asked twice about the same image"] = {"count": n, "first": []}
    return {**split, "dropped": dropped, "flags": flags_}


def _old_shared(build: Mapping[str, Any]) -> dict[str, Any]:
    pairs = build.get("images_shared", {})
    return {"image": {pair: {"count": n, "first": []} for pair, n in pairs.items()}}


def to_markdown(found: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# Data sets\n", "![Distributions](distributions.png)\n"]
    for name, r in found.items():
        parts.append(f"## {name}\n")
        if source := r["build"].get("folder"):
            parts.append(f"Built from `{source}`.\n")
        if made_with := r["build"].get("made_with"):
            settings = ", ".join(f"{k}={v}" for k, v in made_with.items())
            parts.append(f"Settings: {settings}.\n")
        books = r["build"]["splits"]
        rows = [
            (
                split,
                _n(books.get(split, {}).get("rows_read")),
                _n(described["examples"]),
                _n(sum(v["count"] for v in books.get(split, {}).get("dropped", {}).values())),
                _n(books.get(split, {}).get("images")),
            )
            for split, described in r["splits"].items()
        ]
        parts.append(_table("split, rows read, examples, dropped, images", rows))
        for word, key in (("Dropped", "dropped"), ("Kept, but worth knowing", "flags")):
            rows = [
                (split, reason, _n(note["count"]), ", ".join(note["first"]))
                for split, book in books.items()
                for reason, note in book[key].items()
            ]
            if rows:
                parts += [f"### {word}\n", _table("split, why, rows, first of them", rows)]
        rows = [
            (kind, pair.replace("+", " and "), _n(note["count"]), ", ".join(note["first"]))
            for kind, pairs in r["shared"].items()
            for pair, note in pairs.items()
        ]
        parts += ["### In two splits\n", _table("what, splits, number, first of them", rows)]
        rows = [
            (split, k.replace("_", ", "), *(v.get(s, "") for s in ("mean", "median", "p95", "max")))
            for split, described in r["splits"].items()
            for k, v in described["lengths"].items()
        ]
        parts += [
            "### Lengths\n",
            _table("split, of, mean, median, 95th percentile, longest", rows),
        ]
        for title in PANELS:
            if title not in r["panels"]:
                parts.append(f"### {title}\n\nNot recorded.\n")
                continue
            key = r["panels"][title]
            totals = _over_splits(r, title)
            rows = [(value, _n(n), f"{100 * n / totals.total():.1f} %") for value, n in _shown(totals)]
            parts += [f"### {title} (`{key}`)\n", _table("value, examples, share", rows)]
    return "\n".join(parts)


def _n(number: int | None) -> str:
    return "" if number is None else f"{number:,}"


def _table(columns: str, rows: Sequence[Sequence[Any]]) -> str:
    names = columns.split(", ")
    lines = [markdown.head(names, left=len(names)), *(markdown.row(map(markdown.cell, row)) for row in rows)]
    return "\n".join(lines) + "\n"


def _over_splits(described: Mapping[str, Any], title: str) -> Counter:
    total = Counter()
    for split in described["splits"].values():
        total.update(split["tables"][title])
    return total


def _shown(counts: Counter) -> list[tuple[str, int]]:
    """The most frequent values, and the rest as one."""
    common = counts.most_common()
    if len(common) <= _SHOWN + 1:
        return common
    rest = common[_SHOWN:]
    return [*common[:_SHOWN], (f"{len(rest)} others", sum(n for _, n in rest))]


def draw(found: Mapping[str, Any], path: pathlib.Path) -> None:
    """One row of bar charts per set (the paper's Figure 3): share of examples over all splits.

    Bars are identified by labels, not by colours.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.2 + 0.23 * _longest(r) for r in found.values()]
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    axes = figure.subplots(len(found), len(PANELS), squeeze=False, gridspec_kw={"height_ratios": heights})
    for (name, r), row in zip(found.items(), axes):
        examples = sum(s["examples"] for s in r["splits"].values())
        for title, ax in zip(PANELS, row):
            head = f"{name}\n{examples:,} examples" if title == next(iter(PANELS)) else ""
            ax.set_title(head, loc="left", fontsize=11, fontweight="bold")
            if title not in r["panels"]:
                ax.axis("off")
                ax.text(0.5, 0.5, f"{title}: not recorded", ha="center", fontsize=10, color="0.35")
                continue
            key = r["panels"][title]
            totals = _over_splits(r, title)
            values = [(_short(v), 100 * n / totals.total()) for v, n in _shown(totals)][::-1]
            # By position, not by name: two long names may be equal once cut.
            bars = ax.barh(range(len(values)), [share for _, share in values], color="#0072B2")
            ax.set_yticks(range(len(values)), [v for v, _ in values])
            ax.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
            ax.set_xlabel(f"{title} ({key}), % of examples", fontsize=9)
            ax.tick_params(labelsize=9)
            ax.margins(x=0.12)
            ax.set_ylim(len(values) - 0.5 - _longest(r), len(values) - 0.5)  # so that all bars are equally thick
            for side in ("top", "right"):
                ax.spines[side].set_visible(False)
    FigureCanvasAgg(figure).print_figure(path, dpi=110)


def _longest(described: Mapping[str, Any]) -> int:
    return max(4, *(len(_shown(_over_splits(described, t))) for t in described["panels"]))


def _short(text: str) -> str:
    text = text if len(text) <= 36 else text[:34].rstrip() + " …"
    return text.replace("$", r"\$")  # or it would be typeset as mathematics


def main(argv: Sequence[str]) -> None:
    """Command line; exits with 1 and one line on bad input."""
    logging.set_verbosity(logging.WARNING)  # TFDS logs every file it reads
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        if len(argv) < 2:
            raise DataError("expected built data sets, such as slake/en; --help shows an example")
        data_dir = pathlib.Path(flags.FLAGS.data_dir or default_data_dir()).expanduser()
        write(flags.FLAGS.out, {name: files.built_folder(name, data_dir) for name in argv[1:]})
    except (DataError, OSError) as e:
        if command_line.reader_is_gone(e):
            sys.exit(141)
        sys.exit(f"error: {files.told(e, flags.FLAGS.out)}")
    print(f"report.md, report.json and distributions.png are in {flags.FLAGS.out}")


if __name__ == "__main__":
    command_line.define_path("data_dir", None, "Where the data sets were built.")
    command_line.define_path("out", None, "Folder for the report.", required=True)
    app.run(main, flags_parser=command_line.parse_flags)
