"""Applies the verdicts of a review: drops discarded pairs and reports keep rates by template.

The CSV is the page's, or any with the columns question_id and verdict (note and pair are optional; pair
is the digest of the judged text). A verdict that matches no pair ends the run before anything is written:
a review that loses verdicts silently would be worse than none.
"""

import collections
import json
import pathlib
from collections.abc import Iterator

from paligemma_med.metrics import stats
from paligemma_med.pp import tables
from tools.review_qa import rows

VERDICTS = ("keep", "discard", "unsure")
EXPECTED = "expected a CSV with the columns question_id and verdict"


def read(path) -> dict[str, tuple]:
    """{question id: (verdict, note, digest of the pair or "", line)} of a CSV.

    Lines without a verdict are notes on undecided pairs: their verdict is "".

    Raises:
      ValueError: names the file and the line.
    """
    try:
        table = tables.read_file(path, ("question_id", "verdict"))
    except OSError as e:
        raise ValueError(f"{path}: can't be read ({e.strerror or e}); {EXPECTED}.") from None
    except ValueError as e:
        raise ValueError(f"{str(e).rstrip('.')}; {EXPECTED}.") from None
    found = {}
    for line, cells in table:
        row = {k.lower(): _cell(c) for k, c in cells.items()}
        question, verdict = row["question_id"], row["verdict"].strip().lower()
        if verdict and verdict not in VERDICTS:
            raise ValueError(f"{path} line {line}: verdict {row['verdict']!r}; expected {', '.join(VERDICTS)}, or ''.")
        if question in found:
            raise ValueError(
                f"{path} line {line}: question_id {question!r} has a verdict in line {found[question][3]} "
                "already; expected one each."
            )
        found[question] = verdict, row.get("note", ""), row.get("pair", ""), line
    return found


def _cell(text):
    """The text without the apostrophe that page.js puts before what a spreadsheet would execute."""
    return text[1:] if text[:1] == "'" and text[1:2] in set("=+-@'\t\r") else text


def apply(path, verdicts, csv_path, output, *, drop_unsure=False) -> dict:
    """Writes the file of pairs again, without the discarded ones.

    Args:
      path: the file of pairs.
      verdicts: from `read`; csv_path: their file, for messages.
      output: F2, the rows that stay: reviewed ones with "review": {verdict, note}, the others byte for
        byte as they were. Next to it F2.drops.jsonl (reason, note, row) and F2.report.json.
      drop_unsure: also drop pairs of which the reviewer was unsure.

    Returns:
      The report: {"pairs", "written", "templates": {name: {"reviewed", "keep", "discard", "unsure",
      "keep_rate", "low", "high"}}, ...}; the template "all" is over all of them. keep_rate is
      keep / (keep + discard), with Wilson's 95 % interval widened for pairs that share an image
      (`stats.wilson_clustered`); null if nothing was kept or discarded.

    Raises:
      ValueError: an id isn't in the file, or a pair was changed after its review.
    """
    rows.check_output(output, path, csv_path)
    seen, judged = 0, {}
    for _, _, row in rows.read(path):
        seen += 1
        if row["question_id"] not in verdicts:
            continue
        verdict, _, pair, line = verdicts[row["question_id"]]
        if pair and pair != rows.digest(row):
            raise ValueError(
                f"{csv_path} line {line}: question_id {row['question_id']!r} has another question "
                f"or answer in {path} than in its review; expected the file that was reviewed."
            )
        judged[row["question_id"]] = (rows.template(row), row["image_id"], verdict)
    for question, (_, _, _, line) in verdicts.items():
        if question not in judged:
            raise ValueError(
                f"{csv_path} line {line}: question_id {question!r} isn't in {path}; expected the "
                "file that was reviewed."
            )
    report = {
        "pairs": seen,
        "verdicts": pathlib.Path(csv_path).name,
        "drop_unsure": drop_unsure,
        "notes_without_verdict": sum(not v for _, _, v in judged.values()),
        "templates": _rates(judged.values()),
    }
    drops = pathlib.Path(f"{_stem(output)}.drops.jsonl")
    gone = {"discard", "unsure"} if drop_unsure else {"discard"}
    report["written"] = seen - sum(v in gone for _, _, v in judged.values())
    rows.write_whole(drops, _dropped(path, verdicts, gone))
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    rows.write_whole(f"{_stem(output)}.report.json", [text.encode("utf-8", "replace")])
    rows.write_whole(output, _kept(path, verdicts, gone))
    return report


def _stem(output):
    return str(output).removesuffix(".jsonl")


def _kept(path, verdicts, gone):
    for _, line, row in rows.read(path):
        verdict, note, _, _ = verdicts.get(row["question_id"], ("", "", "", 0))
        if verdict in gone:
            continue
        if verdict or note:
            line = _dump({**row, "review": dict(verdict=verdict, note=note)})
        yield line.rstrip(b"\r\n") + b"\n"


def _dropped(path, verdicts, gone):
    for _, _, row in rows.read(path):
        verdict, note, _, _ = verdicts.get(row["question_id"], ("", "", "", 0))
        if verdict in gone:
            yield _dump(dict(reason=f"review: {verdict}", note=note, row=row))


def _dump(value):
    # JSON can hold half a surrogate pair, which UTF-8 can't: it stays escaped.
    text = json.dumps(value, ensure_ascii=False)
    try:
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value).encode() + b"\n"


def _rates(judged):
    """Counts and keep rates by template, and of all."""
    groups = collections.defaultdict(list)
    for template, image, verdict in judged:
        if verdict:
            groups[template].append((image, verdict))
    names = sorted(groups)
    every = [x for name in names for x in groups[name]]
    return {name: _rate(found) for name, found in [("all", every), *((n, groups[n]) for n in names)]}


def _rate(found):
    counts = collections.Counter(verdict for _, verdict in found)
    decided = [(image, verdict == "keep") for image, verdict in found if verdict != "unsure"]
    out = dict(reviewed=len(found), **{v: counts[v] for v in VERDICTS})
    if not decided:
        return out | dict(keep_rate=None, low=None, high=None)
    images, kept = zip(*decided)
    low, high = stats.wilson_clustered(kept, images)
    return out | dict(keep_rate=counts["keep"] / len(decided), low=low, high=high)


def describe(report) -> Iterator[str]:
    """The report as lines of text."""
    yield f"{'template':24}{'reviewed':>9}{'keep':>6}{'discard':>9}{'unsure':>8}  keep rate (95 %)"
    for name, r in report["templates"].items():
        rate = "-"
        if r["keep_rate"] is not None:
            rate = f"{100 * r['keep_rate']:.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f})"
        yield (f"{name:24.24}{r['reviewed']:9,}{r['keep']:6,}{r['discard']:9,}{r['unsure']:8,}  {rate}")
    if n := report["notes_without_verdict"]:
        yield f"{n:,} notes without a verdict: those pairs count as not reviewed"
    yield f"{report['pairs']:,} pairs read, {report['written']:,} written"
