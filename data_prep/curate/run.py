"""The filter from end to end: rows in; kept rows, drops and a report out. It can be resumed.

The verdict on each row is a line of OUTPUT.journal, in the order of the input. Resuming needs only the
journal: its rows aren't judged again, and the memory of near duplicates is rebuilt from its kept rows.
After the input, a second pass over the journal counts categories, and the results are written under
temporary names and renamed, OUTPUT itself last.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.curate import rules as rule_lib
from data_prep.curate.duplicates import NearDuplicates
from data_prep.curate.relevance import Relevance, repeats
from data_prep.curate.rows import MALFORMED, Source, open_source
from data_prep.files import DataError, whole_file
from data_prep.ledger import FIRST
from data_prep.progress import progress
from paligemma_med.pp import json_text

NEAR_DUPLICATE, CATEGORY = "near_duplicate", "category"
FLUSH_SECONDS = 2.0
VERSION = 1  # of the rules' behaviour; a journal of another version isn't resumed


@dataclasses.dataclass(frozen=True)
class Paths:
    """Files of a run, all in the output's folder."""

    output: pathlib.Path
    drops: pathlib.Path
    report: pathlib.Path
    journal: pathlib.Path


def paths_of(output: str | os.PathLike) -> Paths:
    """`kept.jsonl` -> also kept.drops.jsonl, kept.report.json, kept.journal."""
    output = pathlib.Path(output).expanduser()
    stem = output.name.removesuffix(".jsonl")
    return Paths(
        output,
        output.with_name(f"{stem}.drops.jsonl"),
        output.with_name(f"{stem}.report.json"),
        output.with_name(f"{stem}.journal"),
    )


def _dump(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, which JSON allows and UTF-8 doesn't
        return json.dumps(value).encode() + b"\n"


def _made_by(head: bytes) -> str | None:
    """What a journal's first line says, or None if it isn't a journal's."""
    try:
        return json_text.parse(head, "the head", root=dict).get("made_by")
    except ValueError:
        return None


class Judge:
    """All rules together, and the memory that one of them needs."""

    def __init__(self, config: Mapping[str, Any]):
        specs = list(config.get("rules", ()))
        last = [s for s in specs if s.get("rule") == NEAR_DUPLICATE]
        if len(last) > 1 or (last and specs[-1] is not last[0]):
            raise DataError(f"rules: {NEAR_DUPLICATE} can stand once, as the last one")
        self.rules = rule_lib.make_rules([s for s in specs if s not in last])
        try:
            settings = config.get("relevance")
            self.relevance = None if settings is None else Relevance(**settings)
        except TypeError as e:
            raise DataError(f"relevance: {e}") from None
        self.near = None
        if last:
            settings = {k: v for k, v in last[0].items() if k != "rule"}
            try:
                self.near = NearDuplicates(**settings)
            except (TypeError, ValueError) as e:
                raise DataError(f"rules ({NEAR_DUPLICATE}): {e}") from None
        self.names = [MALFORMED, *(r.name for r in self.rules)]
        self.names += [NEAR_DUPLICATE] * bool(last) + [CATEGORY] * bool(self.relevance)

    def judge(self, row: Mapping[str, Any], name: str) -> dict[str, Any]:
        """The verdict on a row: {"reasons": [[rule, why], ...], "scores": {rule: number}, ...}."""
        reasons, scores = [], {}
        for rule in self.rules:
            why, score = rule.check(row)
            if score is not None:
                scores[rule.name] = score
            if why:
                reasons.append([rule.name, why])
        if self.near is not None and not reasons:
            like, similarity = self.near.find(row)
            scores[NEAR_DUPLICATE] = round(similarity, 4)
            if like:
                reasons.append([NEAR_DUPLICATE, f"{similarity:.2f} like {like}"])
        if not reasons:
            self.remember(row, name)
        fate = {"reasons": reasons, "scores": scores}
        if self.relevance:
            fate["category"] = self.relevance.category(row)
        return fate

    def remember(self, row: Mapping[str, Any], name: str) -> None:
        """Remembers a kept row, of this run or of the interrupted one."""
        if self.near is not None:
            self.near.add(row, name)


def curate(
    config: Mapping[str, Any],
    inputs: Sequence[str],
    output: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Filters rows; the same call resumes an interrupted one.

    Args:
      config: {"rules": [{"rule": name, ...}, ...], "relevance": {...} or None}.
      inputs: see `rows.open_source`; read one after another as one corpus.
      output: JSON Lines of kept rows. In its folder also NAME.drops.jsonl, NAME.report.json.
      data_dir: where TFDS data sets are.
      overwrite: start again and replace an output of other settings.

    Returns:
      The report.

    Raises:
      DataError: bad config or input; an output or journal of other settings without `overwrite`.
    """
    judge, paths = Judge(config), paths_of(output)
    if not inputs:
        raise DataError("no input; expected at least one file or tfds:NAME:SPLIT")
    sources = [open_source(spec, data_dir) for spec in inputs]
    plan = {"version": VERSION, "config": config, "inputs": [s.identity for s in sources]}
    made_by = hashlib.sha256(json.dumps(plan, sort_keys=True, default=list).encode()).hexdigest()
    if paths.output.exists() and not overwrite:
        report = {}
        if paths.report.is_file():
            report = json_text.read(paths.report, "a report of this program", root=dict, error=DataError)
        if report.get("made_by") == made_by:
            paths.journal.unlink(missing_ok=True)  # the run was killed just before doing this
            return {**report, "already_there": True}
        raise DataError(
            f"{paths.output}: exists, made from other rules or other input; expected a new name or --overwrite"
        )
    try:
        paths.output.parent.mkdir(parents=True, exist_ok=True)
        with open(paths.journal, "ab+") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{paths.journal}: another run is writing it") from None
            except OSError:
                pass  # some network file systems have no locks
            done = _resume(journal, paths, judge, made_by, overwrite)
            _judge_rest(journal, judge, sources, done)
            report = _finish(paths, judge, sources, config, made_by)
            paths.journal.unlink()
    except OSError as e:
        raise DataError(f"{e.filename or paths.output}: {e.strerror or e}") from None
    return report


def _resume(journal: Any, paths: Paths, judge: Judge, made_by: str, overwrite: bool) -> int:
    """How many rows the journal has judged already; cuts off a half-written line after a crash."""
    journal.seek(0)
    head = journal.readline()
    if not head.endswith(b"\n") or (overwrite and _made_by(head) != made_by):
        journal.truncate(0)
        journal.write(_dump({"made_by": made_by}))
        return 0
    if _made_by(head) != made_by:
        raise DataError(
            f"{paths.journal}: a run with other rules or other input was stopped there; run that "
            "one again, or pass --overwrite to begin anew"
        )
    done, end = 0, journal.tell()
    for line in journal:
        if not line.endswith(b"\n"):
            break
        try:
            fate = json_text.parse(line, "a row", root=dict, constants=True, halves=True)
            if not fate["reasons"]:
                judge.remember(fate["row"], fate["name"])
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"{paths.journal}: line {done + 2} is damaged; judged again from there", file=sys.stderr)
            break
        done, end = done + 1, end + len(line)
    journal.truncate(end)
    journal.seek(end)
    if done:
        print(f"going on after {done:,} rows judged before", flush=True)
    return done


def _all_rows(sources: Sequence[Source]) -> Iterator[tuple[Source, int, Any, str | None]]:
    for source in sources:
        for number, row, why in source.read():
            yield source, number, row, why


def _judge_rest(journal: Any, judge: Judge, sources: Sequence[Source], done: int) -> None:
    """Judges the rows from number `done` on; each verdict survives an interruption."""
    totals = [s.total for s in sources]
    total = None if None in totals else sum(totals) - done
    rows = _all_rows(sources)
    for _ in range(done):
        next(rows)
    last = time.monotonic()
    try:
        for source, number, row, why in progress(rows, "rows", total):
            name = f"{source.name}:{number}"
            fate = {"name": name, "file": source.name, "number": number, "row": row}
            if row is None:
                fate |= {"reasons": [[MALFORMED, why]], "scores": {}}
            else:
                fate |= judge.judge(row, str(row.get("question_id") or name))
                fate["name"] = str(row.get("question_id") or name)
            journal.write(_dump(fate))
            if (now := time.monotonic()) - last > FLUSH_SECONDS:
                last = now
                journal.flush()
                os.fsync(journal.fileno())
    finally:
        journal.flush()
        os.fsync(journal.fileno())


def _fates(paths: Paths) -> Iterator[dict[str, Any]]:
    with open(paths.journal, "rb") as f:
        f.readline()
        for line in f:
            yield json.loads(line)


class _Counts:
    """The numbers of the report."""

    def __init__(self, names: Sequence[str]):
        self.read, self.kept, self.written = 0, 0, 0
        self.first, self.any, self.alone = Counter(), Counter(), Counter()
        self.examples: dict[str, list[dict[str, str]]] = {name: [] for name in names}
        self.files: dict[str, Counter] = {}
        self.scores: dict[str, list[int]] = {}

    def add(self, fate: Mapping[str, Any], reasons: Sequence[Sequence[str]]) -> None:
        self.read += 1
        self.kept += not reasons
        self.files.setdefault(fate["file"], Counter())["kept" if not reasons else "dropped"] += 1
        for rule in {r for r, _ in reasons}:
            self.any[rule] += 1
            self.alone[rule] += len(reasons) == 1
        if reasons:
            rule, why = reasons[0]
            self.first[rule] += 1
            if len(self.examples[rule]) < FIRST:
                self.examples[rule].append({"row": fate["name"], "why": why})
        for rule, score in fate["scores"].items():
            self.scores.setdefault(rule, [0] * 10)[min(9, int(score * 10))] += 1


def _finish(
    paths: Paths,
    judge: Judge,
    sources: Sequence[Source],
    config: Mapping[str, Any],
    made_by: str,
) -> dict[str, Any]:
    """Counts categories, then writes the three files."""
    cases: dict[str, set[bytes]] = {}
    relevance = judge.relevance
    if relevance:
        for fate in _fates(paths):
            if not fate["reasons"]:
                case = _digest(relevance.counted(fate["row"]))
                cases.setdefault(fate["category"], set()).add(case)
    counts, rows_in, rows_out = _Counts(judge.names), Counter(), Counter()
    with (  # the output appears last: once it exists, the others do too
        whole_file(paths.output) as kept,
        whole_file(paths.drops) as dropped,
        whole_file(paths.report) as report_file,
    ):
        for fate in _fates(paths):
            reasons, category = fate["reasons"], fate.get("category", "")
            n = len(cases.get(category, ()))
            if relevance and not reasons:
                rows_in[category] += 1
                if why := relevance.reason(category, n):
                    reasons = [[CATEGORY, why]]
            counts.add(fate, reasons)
            where = {"file": fate["file"], "number": fate["number"], "scores": fate["scores"]}
            if reasons:
                line = {"reason": reasons[0][0], "why": reasons[0][1], "all_reasons": reasons}
                dropped.write(_dump({**line, **where, "row": fate["row"]}))
                continue
            where["rules_passed"] = judge.names[1:]
            if relevance:
                where |= {"category": category, "count": n, "weight": relevance.weight(category, n)}
            for again in range(_repeats(relevance, where, fate["name"])):
                row = dict(fate["row"])
                if again:
                    row["repeat"] = again
                    if "question_id" in row:
                        row["question_id"] = f"{row['question_id']}_again{again}"
                kept.write(_dump({**row, "curation": where}))
                counts.written += 1
                rows_out[category] += 1
        report = _report(counts, judge, sources, config, made_by)
        if relevance:
            report["categories"] = {
                name or "(none)": {
                    relevance.count: len(cases[name]),
                    "rows": rows_in[name],
                    "rows_written": rows_out[name],
                    "weight": relevance.weight(name, len(cases[name])),
                }
                for name in sorted(rows_in, key=lambda c: (-len(cases[c]), c))
            }
        report_file.write(json.dumps(report, indent=1).encode() + b"\n")
    return report


def _repeats(relevance: Relevance | None, where: Mapping[str, Any], name: str) -> int:
    if not relevance or relevance.reinforce != "repeat":
        return 1
    return repeats(where["weight"], int.from_bytes(_digest(name), "little") / 2**64)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _report(
    counts: _Counts,
    judge: Judge,
    sources: Sequence[Source],
    config: Mapping[str, Any],
    made_by: str,
) -> dict[str, Any]:
    return {
        "made_by": made_by,
        "rows_read": counts.read,
        "rows_kept": counts.kept,
        "rows_written": counts.written,
        "rules": {
            name: {
                "dropped": counts.first[name],
                "would_drop": counts.any[name],
                "only_this_one": counts.alone[name],
                "first": counts.examples[name],
            }
            for name in judge.names
        },
        "scores_by_tenth": counts.scores,
        "files": {name: dict(c) for name, c in counts.files.items()},
        "notes": [line for source in sources for line in source.notes()],
        "config": config,
    }


def describe(report: Mapping[str, Any]) -> Sequence[str]:
    """The report as lines for a person."""
    read, kept = report["rows_read"], report["rows_kept"]
    share = f" ({100 * kept / read:.1f} %)" if read else ""
    lines = [*report["notes"], f"{read:,} rows read, {kept:,} kept{share}"]
    if report["rows_written"] != kept:
        lines[-1] += f", {report['rows_written']:,} written with repeats"
    lines.append(f"{'rule':24}{'dropped':>9}{'fails it':>10}{'only it':>9}  e.g.")
    for name, r in report["rules"].items():
        example = f"{r['first'][0]['row']} {r['first'][0]['why']}" if r["first"] else ""
        lines.append(f"{name:24}{r['dropped']:9,}{r['would_drop']:10,}{r['only_this_one']:9,}  {example:.80}")
    counted = (report["config"].get("relevance") or {}).get("count", "cases")
    for name, c in report.get("categories", {}).items():
        lines.append(
            f"category {name}: {c[counted]:,} {counted}, {c['rows']:,} rows, "
            + (f"weight {c['weight']:g}" if c["rows_written"] else "dropped")
        )
    if read and not kept:
        lines.append("WARNING: nothing was kept; see the drops for the reasons")
    return lines
