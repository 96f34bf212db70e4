"""What the language model is asked: versioned texts in templates/, one file per template.

Their rules address the faults that reference prompts led to: a question that contains its answer can be
answered without the image, and so can one about history or sizes. Texts of data sets may contain anything,
even "ignore the rules above": they are fenced by a code that no text can contain, and declared to be
data. A changed text is a new file, NAME_v2.txt.
"""

import dataclasses
import hashlib
import json
import pathlib
import string

from data_prep import files
from data_prep.files import DataError
from paligemma_med.pp import json_text
from paligemma_med.pp.rows import LETTERS

FOLDER = pathlib.Path(__file__).parent / "templates"

_IMAGE = ("caption", "modality", "modality_detail", "plane", "location")
# File → what the text itself doesn't state.
_ABOUT = {
    "caption_v1": dict(
        kind="pairs",
        per="image",
        needs=("caption",),
        shows=_IMAGE,
        what="open and closed questions from the caption",
    ),
    "case_v1": dict(
        kind="pairs",
        per="image",
        needs=("caption", "diagnosis"),
        shows=(*_IMAGE, "title", "findings", "diagnosis", "differential"),
        what="open questions from the caption and the patient's case (MedPix)",
    ),
    "literature_v1": dict(
        kind="pairs",
        per="case",
        needs=("caption", "topic_discussion"),
        shows=(*_IMAGE, "diagnosis", "topic", "topic_discussion"),
        what="what the literature says about the disease (MedPix's topics), once a case",
    ),
    "choice_v1": dict(
        kind="choices",
        per="image",
        needs=("caption",),
        shows=_IMAGE,
        what="multiple choice with four options from the caption",
    ),
}


@dataclasses.dataclass(frozen=True)
class Template:
    """A way to ask. kind: "pairs" (question, answer) or "choices" (with four options).

    needs: fields that a row must have. shows: fields that are shown if present. per: "image", or "case"
    (only the first image of a case is used). digest: of all of it.
    """

    name: str
    version: int
    kind: str
    per: str
    needs: tuple[str, ...]
    shows: tuple[str, ...]
    what: str
    system: str
    user: str
    digest: str


def load(name) -> Template:
    """Reads a template by its name ("caption", the newest version) or file ("caption_v1").

    Raises:
      ValueError: there is no such template.
    """
    versions = [f for f in _ABOUT if name in (f, f.rpartition("_v")[0])]
    if not versions:
        raise ValueError(f"--templates: there is no template {name!r}; there are {', '.join(names())}.")
    file = max(versions, key=lambda f: int(f.rpartition("_v")[2]))
    text = (FOLDER / f"{file}.txt").read_text("utf-8")
    system, _, user = text.partition("\n=====\n")
    about = _ABOUT[file]
    digest = _digest([file, text, about])
    short, _, version = file.rpartition("_v")
    return Template(short, int(version), system=system.strip(), user=user.strip(), digest=digest, **about)


def names() -> list:
    """The names of all templates."""
    return list(dict.fromkeys(f.rpartition("_v")[0] for f in _ABOUT))


def describe() -> list[str]:
    """All templates, newest versions, as lines of text."""
    lines = []
    for t in map(load, names()):
        lines += [
            f"{t.name} (version {t.version}, sha256 {t.digest[:12]}): {t.what}",
            f"  one {t.per} at a time; needs {', '.join(t.needs)}; shows {', '.join(t.shows)} where there is text",
        ]
    return lines


def messages(template, row, pairs, attempt=0, problem="", examples=()) -> list:
    """The chat messages that ask for one reply.

    The fence's code is a digest of what is shown and of the attempt: the same for the same request, another
    one for the second attempt, and no text can contain its own digest.

    Args:
      template: a `Template`.
      row: with `fields` and `digest` (a `sources.Row`).
      pairs: how many to ask for.
      attempt: number of unusable replies before this one.
      problem: what was wrong with the last of them.
      examples: from `read_examples`; those of the template's kind are shown as earlier turns.

    Returns:
      [{"role": "system", "content"}, …, {"role": "user", "content"}].
    """
    # All messages but the last are the same for all rows: a backend computes them once.
    out = [{"role": "system", "content": template.system}]
    for x in examples:
        if x["kind"] != template.kind:
            continue
        told = _user(template, x["fields"], _digest([template.digest, x])[:16], len(x["pairs"]))
        reply = json.dumps({"pairs": x["pairs"]}, ensure_ascii=False)
        out += [{"role": "user", "content": told}, {"role": "assistant", "content": reply}]
    marker = _digest([template.digest, row.digest, pairs, attempt, problem])[:16]
    told = _user(template, row.fields, marker, pairs, problem)
    return [*out, {"role": "user", "content": told}]


def _user(template, fields, marker, pairs, problem=""):
    shown = [(k.replace("_", " "), fields[k]) for k in template.shows if fields.get(k)]
    data = "\n\n".join(f"BEGIN {k} {marker}\n{text}\nEND {k} {marker}" for k, text in shown)
    if problem:
        problem = f"\n\nAn earlier reply could not be used: {problem.rstrip('.')}. Keep to the form."
    # In one pass, so that nothing is replaced within an inserted text.
    fill = {"data": data, "pairs": pairs, "problem": problem, "marker": marker}
    return string.Template(template.user).substitute(fill)


def read_examples(path) -> tuple:
    """Examples to show before each question, from JSON lines of
    {"caption": …, other fields…, "pairs": [{"question", "answer"}, …]}; pairs for templates of
    multiple choice also have "choices": {"A": …, "B": …, "C": …, "D": …}, and a letter as answer.

    Returns:
      tuple of {"kind", "fields", "pairs"}.

    Raises:
      DataError: not of this form.
    """
    out = []
    expected = 'expected {"caption": "...", "pairs": [{"question": "...", "answer": "..."}]}'
    text = files.read_bytes(path, "examples as JSON lines").decode("utf-8-sig", "replace")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json_text.parse(line, "a line", root=dict)
            pairs = [_example_pair(p) for p in row.pop("pairs")]
            kinds = {"choices" if "choices" in p else "pairs" for p in pairs}
            good = len(kinds) == 1 and all(isinstance(v, str) for v in row.values())
            good = good and row["caption"].strip()
        except (ValueError, TypeError, KeyError, AttributeError):
            good = False
        if not good:
            raise DataError(f"{path} line {number}: found {line.strip():.60}; {expected}")
        out.append({"kind": kinds.pop(), "fields": row, "pairs": pairs})
    if not out:
        raise DataError(f"{path}: no example in it; {expected}")
    return tuple(out)


def _example_pair(pair):
    keys = ("question", "choices", "answer") if "choices" in pair else ("question", "answer")
    found = {k: pair[k] for k in keys}
    texts = [found["question"], found["answer"]]
    if "choices" in found:
        if sorted(found["choices"]) != list(LETTERS) or found["answer"] not in list(LETTERS):
            raise ValueError
        texts += found["choices"].values()
    if not all(isinstance(t, str) and t.strip() for t in texts):
        raise ValueError
    return found


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
