"""One unit of work: a row of a source and a template. Its key covers all that its reply depends on.

Replies are the expensive part. A backend puts each into the journal under its unit's key; everything else
is derived from the journal. The forms that the parts of this package share:

  A record of the journal (a line of F.journal) is {"key", "score" (number of usable pairs, None without
  any), "reply" (whole), "finish" ("stop", "length", "too_long", or what a server says),
  "usage" ([prompt, completion] tokens or None), "model" (as a server calls it, else None), "time",
  "problem" (why it can't be used, "" if it can), "seconds" (its share of the time it took),
  "versions" ({package: version}), "system_fingerprint" (of a server, or None), "ran" (of a local
  model: batch_size, batch_tokens, device, threads)}.

  A backend is `answer(units, journal, …, read, progress=…)`: it asks for each unit that isn't
  `settled` and adds the replies; `read` is `parse.read_reply`, and `progress(replies, new tokens)`
  is called after each step.

  `about` is what a whole run has in common: {"model", "weights" (fingerprint, "" for a server),
  "backend", "settings" (of decoding), "seed", "pairs", "examples" (digest, "" without)}.
"""

import dataclasses
import hashlib
import json

from tools.synthesize_qa import templates
from tools.synthesize_qa.sources import Row
from tools.synthesize_qa.templates import Template

MAX_REPLIES = 2  # the second request says why the first reply couldn't be used
TOO_LONG = "too_long"  # finish of a unit whose prompt is too long for the model; never asked again


@dataclasses.dataclass(frozen=True)
class Unit:
    """A row and a template. number: from 0 in source order. key: 64 hexadecimal digits."""

    number: int
    key: str
    row: Row
    template: Template
    pairs: int
    examples: tuple[dict, ...] = ()

    def messages(self, attempt: int = 0, problem: str = "") -> list[dict[str, str]]:
        """The chat messages that ask for its reply; see `templates.messages`."""
        return templates.messages(self.template, self.row, self.pairs, attempt, problem, self.examples)


def settled(records) -> bool:
    """Whether a unit with these records needs no (further) request."""
    return (
        len(records) >= MAX_REPLIES
        or any(r["score"] is not None for r in records)
        or any(r["finish"] == TOO_LONG for r in records)
    )


def digest(value) -> str:
    """SHA-256 of a JSON-able value, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def key_of(row: Row, template: Template, about: dict) -> str:
    """A digest of what a reply depends on: the row, the template, the model and its decoding."""
    return digest([row.digest, template.digest, about])


def plan(rows, chosen, about, books, examples=()) -> list[Unit]:
    """The units of rows and templates, row by row.

    Args:
      rows: from `sources.open_rows`.
      chosen: templates.
      about: what all units have in common; see above.
      books: from `sources.new_books`; counts each unit, and why a row has none.
      examples: from `templates.read_examples`.

    Returns:
      list of `Unit`.
    """
    units, cases = [], set()
    for row in rows:
        for template in chosen:
            books.read("units")
            missing = [k for k in template.needs if not row.fields.get(k)]
            case = (template.name, row.case_id or row.row_id)
            if missing:
                books.drop("units", f"{template.name}: no {missing[0]}", row.row_id)
            elif template.per == "case" and case in cases:
                books.drop("units", f"{template.name}: another image of the case", row.row_id)
            else:
                cases.add(case)
                key = key_of(row, template, about)
                units.append(Unit(len(units), key, row, template, about["pairs"], tuple(examples)))
                books.keep("units", {"image_id": row.image_id, "template": template.name})
    return units
