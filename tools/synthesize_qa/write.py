"""Makes the output from a journal of replies: kept pairs, drops, failed units and a report.

No model is needed. The same units and replies give the same bytes, however often the run was killed; the
rules can be changed and the files written again.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_prep import qa_files
from data_prep.curate.words import as_words
from paligemma_med import files
from paligemma_med.pp import rows as row_keys
from tools.synthesize_qa import parse
from tools.synthesize_qa import units as units_lib
from tools.synthesize_qa.quality import Quality, Verdict

FIRST = 5  # examples listed for each reason
_SHOWN = 300  # characters of what was rejected


@dataclasses.dataclass(frozen=True)
class Paths:
    """Files made from the journal, all in the output's folder. For the journal see `journal.path_of`."""

    output: pathlib.Path
    drops: pathlib.Path
    failed: pathlib.Path
    report: pathlib.Path


def paths_of(output: str | os.PathLike) -> Paths:
    """`qa.jsonl` -> also qa.drops.jsonl, qa.failed.jsonl, qa.report.json."""
    output = pathlib.Path(output).expanduser()
    stem = output.name.removesuffix(".jsonl")
    names = (f"{stem}.drops.jsonl", f"{stem}.failed.jsonl", f"{stem}.report.json")
    return Paths(output, *map(output.with_name, names))


def write(
    units: Iterable[units_lib.Unit],
    journal: Any,
    output: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    about: Mapping[str, Any],
    books: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the four files, each whole; the output itself last.

    Args:
      units: in source order.
      journal: has `replies(key)`, a unit's records in order; see `units` for their keys.
      output: JSON Lines of kept pairs.
      config: the filter's; see `quality` and configs/default.py.
      about: what all units have in common; see `units`.
      books: the sources' ledgers, for the report.

    Returns:
      The report. Its "speed" was measured; everything else follows from units and replies.

    Raises:
      DataError: an impossible config.
      ValueError: an existing output that isn't ours, or one that can't be written; a duplicate unit.
    """
    quality, paths, counts = Quality(config), paths_of(output), _Counts()
    if paths.output.exists() and not paths.report.exists():
        raise ValueError(
            f"{paths.output} is there, without {paths.report.name} of an earlier run beside it; expected a new name."
        )
    seen: set[bytes] = set()
    try:
        with (  # the output appears last
            files.whole_file(paths.output) as kept,
            files.whole_file(paths.drops) as drops,
            files.whole_file(paths.failed) as failed,
            files.whole_file(paths.report) as report_file,
        ):
            for unit in units:
                name = f"{_label(unit)} {unit.row.image_id}".encode("utf-8", "surrogatepass")
                name = hashlib.sha256(name).digest()[:16]
                if name in seen:
                    raise ValueError(f"image {unit.row.image_id} comes twice with {_label(unit)}; expected once.")
                seen.add(name)
                _write_unit(unit, journal, about, quality, counts, kept, drops, failed)
            report = counts.report(quality)
            report |= {"about": dict(about), "config": dict(config), "sources": books or {}}
            report_file.write(_line(report, indent=1))
    except OSError as e:
        raise ValueError(f"{paths.output} can't be written: {e.strerror or e}.") from None
    return report


def _write_unit(unit, journal, about, quality, counts, kept, drops, failed):
    """One unit's lines in the files, and what it adds to the counts."""
    records = journal.replies(unit.key)
    # A reply is parsed again: the parser may have improved since it came.
    replies = [parse.read_reply(r["reply"], unit.template.kind, cut=r["finish"] == "length") for r in records]
    used = next((i for i, reply in enumerate(replies) if reply.pairs), None)
    counts.unit(unit, records, replies, used)
    if used is None:
        if units_lib.settled(records):
            failed.write(_line(_failure(unit, records, replies)))
        return
    beside = {
        "source_text": "\n".join(unit.row.fields.values()),
        "example_pairs": {
            as_words(x["question"], x.get("choices", {}).get(x["answer"], x["answer"]))
            for shown in unit.examples
            for x in shown["pairs"]
        },
    }
    for number, pair in enumerate(replies[used].pairs, 1):
        row = _row(unit, pair, number, about)
        verdict = quality.judge({**row, **beside}, row["question_id"])
        row["quality"] = verdict.quality
        row["provenance"] = _provenance(unit, records[used], used, replies[used], about)
        counts.pair(unit, row, verdict)
        if verdict.reasons:
            reason, why = verdict.reasons[0]
            head = {"reason": reason, "why": why, "all_reasons": verdict.reasons}
            drops.write(_line({**head, "row": row}))
        else:
            kept.write(_line(row))


def _label(unit: units_lib.Unit) -> str:
    return f"{unit.template.name}_v{unit.template.version}"


def _row(unit: units_lib.Unit, pair: parse.Pair, number: int, about: Mapping[str, Any]):
    """A pair under the names that `data_prep.qa_files.read_qa` and the builders use."""
    row = {
        "question_id": f"{unit.row.image_id}_{_label(unit)}_{number}",
        "image_id": unit.row.image_id,
        "case_id": unit.row.case_id,
        "question": pair.question,
        "answer": pair.answer,
        "answer_type": "CLOSED" if pair.choices else qa_files.answer_type(pair.answer),
        "question_type": qa_files.question_word(pair.question),
    }
    if pair.choices:
        order = _draw(f"{about['seed']} {unit.key} {number}")
        right = row_keys.LETTERS.index(pair.letter)
        row |= {key: pair.choices[i] for key, i in zip(row_keys.CHOICES, order)}
        row[row_keys.ANSWER_LETTER] = row_keys.LETTERS[order.index(right)]
    return row | {
        "mode": unit.template.name,
        "split": unit.row.split,
        "caption": unit.row.fields.get("caption", ""),
        "location": unit.row.fields.get("location", ""),  # data_prep.curate's category
    }


def _draw(text: str) -> list[int]:
    """A random order of 0 to 3 that only depends on a text."""
    return sorted(range(4), key=lambda i: hashlib.sha256(f"{text} {i}".encode()).digest())


def _provenance(unit, record, attempt, reply, about):
    return {
        "model": record.get("model") or about["model"],
        "weights": about["weights"],
        "backend": about["backend"],
        "template": _label(unit),
        "template_digest": unit.template.digest,
        "seed": about["seed"],
        "settings": about["settings"],
        "pairs_asked": about["pairs"],
        "examples": about["examples"],
        "source": unit.row.source,
        "row_id": unit.row.row_id,
        "row_digest": unit.row.digest,
        "key": unit.key,
        "attempt": attempt,
        "form": reply.form,
        "reply": record["reply"],
        "finish": record["finish"],
        "system_fingerprint": record.get("system_fingerprint"),
        "versions": record.get("versions", {}),
        "ran": record.get("ran", {}),
    }


def _failure(unit, records, replies):
    return {
        "row_id": unit.row.row_id,
        "image_id": unit.row.image_id,
        "template": _label(unit),
        "source": unit.row.source,
        "row_digest": unit.row.digest,
        "key": unit.key,
        "replies": [
            {
                "problem": record.get("problem") or reply.problem,
                "finish": record["finish"],
                "reply": record["reply"],
                "rejected": [[reason, text[:_SHOWN]] for reason, text in reply.rejected],
            }
            for record, reply in zip(records, replies)
        ],
    }


# --- Counting ---


class _Counts:
    """The numbers of the report."""

    def __init__(self):
        self.units = collections.Counter()
        self.templates: dict[str, collections.Counter] = {}
        self.forms, self.rejected = collections.Counter(), {}
        self.pairs_per_reply = collections.Counter()
        self.replies, self.tokens = collections.Counter(), collections.Counter()
        self.seconds = self.timed_tokens = 0.0
        self.first, self.any, self.alone = (collections.Counter() for _ in range(3))
        self.examples: dict[str, list] = collections.defaultdict(list)
        self.types, self.letters = collections.Counter(), collections.Counter()
        self.leaks = {which: {name: [0, 0.0, 0] for name in ("leak", "caption_leak")} for which in ("all", "kept")}

    def unit(self, unit, records, replies, used):
        """Counts a unit, all its replies, and the index of the one that is used."""
        if used is not None:
            state = "answered"
        else:
            state = "failed" if units_lib.settled(records) else "waiting"
        table = self.templates.setdefault(_label(unit), collections.Counter())
        for counter in (self.units, table):
            counter["units"] += 1
            counter[state] += 1
        self.units["answered_at_once"] += used == 0
        self.units["asked_again"] += len(records) > 1
        self.units["answered_when_asked_again"] += bool(used)
        for record, reply in zip(records, replies):
            self.replies["replies"] += 1
            self.replies["usable"] += bool(reply.pairs)
            self.replies["unfinished"] += record["finish"] == "length"
            self.replies["too_long"] += record["finish"] == units_lib.TOO_LONG
            self.forms[reply.form or "none"] += 1
            for reason, text in reply.rejected:
                note = self.rejected.setdefault(reason, {"count": 0, "first": []})
                note["count"] += 1
                if len(note["first"]) < FIRST:
                    note["first"].append([unit.row.row_id, text[:80]])
            if record["usage"] is None:
                self.tokens["replies_without"] += 1
            else:
                self.tokens["prompt"] += record["usage"][0]
                self.tokens["completion"] += record["usage"][1]
                if record.get("seconds"):
                    self.seconds += record["seconds"]
                    self.timed_tokens += record["usage"][1]
        if used is not None:
            self.pairs_per_reply[len(replies[used].pairs)] += 1

    def pair(self, unit, row: Mapping[str, Any], verdict: Verdict):
        """Counts a pair of the reply that is used."""
        table = self.templates[_label(unit)]
        fates = ("all",) if verdict.reasons else ("all", "kept")
        for which in fates:
            table["pairs" if which == "all" else "kept"] += 1
            for name, (n, total, half) in self.leaks[which].items():
                score = verdict.scores[name]
                self.leaks[which][name] = [n + 1, total + score, half + (score >= 0.5)]
        if not verdict.reasons:
            self.types[row["answer_type"]] += 1
            if "answer_letter" in row:
                self.letters[row["answer_letter"]] += 1
        for name, why in verdict.failed:
            self.any[name] += 1
            if len(self.examples[name]) < FIRST:
                self.examples[name].append([row["question_id"], why])
        if verdict.reasons:
            self.first[verdict.reasons[0][0]] += 1
            self.alone[verdict.reasons[0][0]] += len(verdict.reasons) == 1

    def report(self, quality: Quality) -> dict[str, Any]:
        pairs = {which: table["leak"][0] for which, table in self.leaks.items()}
        states = ("units answered failed waiting answered_at_once asked_again answered_when_asked_again").split()
        replied = self.units["units"] - self.units["waiting"]
        return {
            "units": {name: self.units[name] for name in states},
            "parse_rate": _share(self.units["answered"], replied),
            "parse_rate_at_once": _share(self.units["answered_at_once"], replied),
            "replies": {name: self.replies[name] for name in ("replies", "usable", "unfinished", "too_long")},
            "forms": dict(self.forms.most_common()),
            "rejected": dict(sorted(self.rejected.items(), key=lambda x: (-x[1]["count"], x[0]))),
            "pairs": {"all": pairs["all"], "kept": pairs["kept"]},
            "pairs_per_reply": {str(n): self.pairs_per_reply[n] for n in sorted(self.pairs_per_reply)},
            "rules": {
                name: {
                    "drops": drops,
                    "dropped": self.first[name],
                    "fail_it": self.any[name],
                    "only_this_one": self.alone[name],
                    "first": self.examples[name],
                }
                for name, drops in quality.drops.items()
            },
            "leaks": {
                which: {
                    name: {"mean": _share(total, n), "at_least_half": _share(half, n)}
                    for name, (n, total, half) in table.items()
                }
                for which, table in self.leaks.items()
            },
            "answer_types": dict(sorted(self.types.items())),
            "answer_letters": dict(sorted(self.letters.items())),
            "templates": {
                name: {k: c[k] for k in ("units", "answered", "failed", "waiting", "pairs", "kept")}
                for name, c in self.templates.items()
            },
            "tokens": {k: self.tokens[k] for k in ("prompt", "completion", "replies_without")},
            "speed": {
                "seconds": round(self.seconds, 2),
                "new_tokens_per_second": _share(self.timed_tokens, self.seconds, 2),
            },
        }


def _share(part: float, whole: float, digits: int = 4) -> float | None:
    return round(part / whole, digits) if whole else None


# --- Telling ---


def describe(report: Mapping[str, Any]) -> Iterator[str]:
    """The report as lines for a person."""
    units, replies, tokens = report["units"], report["replies"], report["tokens"]
    yield (
        f"{units['units']:,} units: {units['answered']:,} answered "
        f"({units['answered_at_once']:,} at once, {units['answered_when_asked_again']:,} when "
        f"asked again), {units['failed']:,} failed, {units['waiting']:,} waiting"
    )
    yield (
        f"{replies['replies']:,} replies, parse rate {_percent(report['parse_rate'])}, at once "
        f"{_percent(report['parse_rate_at_once'])}; {replies['unfinished']:,} unfinished"
        + (f", {replies['too_long']:,} prompts too long" if replies["too_long"] else "")
    )
    yield "  forms: " + (", ".join(f"{k} {n:,}" for k, n in report["forms"].items()) or "none")
    for reason, note in report["rejected"].items():
        row, text = note["first"][0]
        yield f"  rejected, {reason}: {note['count']:,}  e.g. {row} {' '.join(text.split())!r:.60}"
    pairs, counts = report["pairs"], report["pairs_per_reply"]
    yield (
        f"{pairs['all']:,} pairs ({_ratio(pairs['all'], units['answered'])} a reply: "
        + (", ".join(f"{k} in {n:,}" for k, n in counts.items()) or "none")
        + f"), {pairs['kept']:,} kept ({_percent(_share(pairs['kept'], pairs['all']))})"
    )
    yield f"{'rule':16}{'dropped':>9}{'fail it':>9}{'only it':>9}  e.g."
    for name, rule in report["rules"].items():
        example = " ".join(rule["first"][0]) if rule["first"] else ""
        dropped = f"{rule['dropped']:9,}{rule['fail_it']:9,}{rule['only_this_one']:9,}"
        if not rule["drops"]:
            dropped = f"{'(tag)':>9}{rule['fail_it']:9,}{'':9}"
        yield f"{name:16}{dropped}  {example:.70}"
    for which, table in report["leaks"].items():
        texts = {"leak": "the answer's words", "caption_leak": "the caption's words"}
        yield f"leak into the question, {which} pairs: " + "; ".join(
            f"{texts[name]}: mean {_percent(x['mean'])}, half or more in {_percent(x['at_least_half'])}"
            for name, x in table.items()
        )
    for name, n in report["templates"].items():
        yield (
            f"template {name}: {n['units']:,} units, {n['answered']:,} answered, {n['pairs']:,} "
            f"pairs, {n['kept']:,} kept"
        )
    if letters := report["answer_letters"]:
        yield "right options: " + ", ".join(f"{k} {n:,}" for k, n in letters.items())
    speed = report["speed"]["new_tokens_per_second"]
    yield (
        f"{tokens['prompt']:,} prompt tokens, {tokens['completion']:,} new ones"
        + (f", {speed:,.1f} new ones a second" if speed else "")
        + (f"; {tokens['replies_without']:,} replies without a count" * bool(tokens["replies_without"]))
    )
    if units["waiting"]:
        yield f"WARNING: {units['waiting']:,} units have no reply yet; run the same command to resume"
    if units["units"] > units["waiting"] and not pairs["kept"]:
        yield "WARNING: no pair was kept; see the drops and the failed units"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.2f}" if whole else "–"


# --- Files ---


def _line(value: Any, **kw) -> bytes:
    """A line of JSON; half a surrogate pair, which UTF-8 can't hold, is escaped."""
    try:
        return json.dumps(value, ensure_ascii=False, **kw).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, **kw).encode() + b"\n"
