"""Others' files of predictions, as rows of our predictions.jsonl.

Read are samples of lmms-eval, tables of VLMEvalKit, and any other table with a column each for question, model's answer
and truth, such as those of the paper's authors. Layouts by their own code: lmms-eval at 75571cf,
`EvaluationTracker.save_results_samples` (a line a question: doc_id, input, target, filtered_resps, and each metric,
often an object that says more about the question; versions before 0.4 leave in doc, too, and nest the answers deeper);
VLMEvalKit at e8e78f0, `infer_data_job` (the columns of the data set without its image, and prediction; choices in
columns A, B, …).
"""

import dataclasses
import os
import pathlib
import re
import string
from collections.abc import Iterable
from typing import Any

from paligemma_med.metrics import answers, scoring
from paligemma_med.pp import json_text, own_rows, table_forms
from paligemma_med.pp import rows as row_keys

# Columns, ignoring case: the authors' Excel sheet, their JSON, VLMEvalKit's, and common names.
NAMES = {
    "question": ("question", "prompt"),
    "prediction": ("predicted_answer", "generated answer", "generated_answer", "prediction", "generation", "output"),
    "answer": ("label", "answer", "ground_truth", "ground truth", "truth"),
    "image": ("image id", "image_id", "image", "image_path"),
    "question_id": ("question_id", "index", "qid"),
}
_NEEDED = ("question", "prediction", "answer")
GROUPS = (*row_keys.GROUPS, "category", "l2-category", "split")
_FAILED = "Failed to obtain answer"  # what VLMEvalKit writes for a request without a reply
_LISTED = re.compile(r"\[(['\"]).*\1\]", re.DOTALL)
_SHOWN = 3


@dataclasses.dataclass
class File:
    """kind: "lmms-eval", "VLMEvalKit" or "table"; run, name: model and data set, as the file's name has them; rows: of
    predictions.jsonl, image_id None where the file doesn't tell images apart, and doc_id where it has one; notes:
    sentences on what was left out or is doubtful."""

    path: pathlib.Path
    kind: str
    run: str
    name: str
    rows: list[dict[str, Any]]
    notes: list[str]


def read(path) -> File:
    """Reads .jsonl of lmms-eval, or a table: .xlsx (first sheet), .csv, .tsv, .jsonl, or .json as a list of objects or
    as pandas writes it ({column: {row: value}}). Columns are found by name, see NAMES.

    Raises:
      ValueError: another kind of file, an empty one, a column or key that is missing, a question twice, a wrong row;
        names the row.
      OSError: can't be read.
    """
    path = pathlib.Path(path)
    records = [(where, r) for where, r in _records(path) if any(x not in (None, "") for x in r.values())]
    if not records:
        raise ValueError(f"{path} has no rows.")
    if all("doc_id" in r and ("filtered_resps" in r or "resps" in r) for _, r in records):
        kind, rows = "lmms-eval", _without_instruction([_sample(r, where) for where, r in records])
    else:
        columns = _columns(path, records)
        kind = "VLMEvalKit" if columns["question_id"] and str(columns["question_id"]).lower() == "index" else "table"
        rows = [_line(r, columns, i) for i, (_, r) in enumerate(records, 1)]
    _check_ids(rows, [where for where, _ in records])
    kept, notes = _with_truth(rows)
    if not kept:
        raise ValueError(f"{path}: no row has a true answer; expected one to compare with.")
    _check_samples(path, kept)
    notes += _doubts(kept)
    for row in kept:
        row |= scoring.correct(row["predictions"][0], scoring.truths(row))
    return File(path, kind, *_named(path, kind), kept, notes)


# --- Records: (where it stands, {column: value}) ---


def _records(path) -> Iterable[tuple[str, dict[str, Any]]]:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        return _checked(path, "line", table_forms.Csv(path).scan())
    if kind == ".xlsx":
        return _checked(path, "row", table_forms.xlsx(path, formulas=True)[0].scan())
    if kind == ".jsonl":
        found = json_text.lines(path, "an object a line", root=dict, constants=True)
        return ((f"{path}, line {i}", r) for i, r in found)
    if kind != ".json":
        raise ValueError(f"{path}: expected a .xlsx, .csv, .tsv, .json or .jsonl file.")
    found = json_text.read(path, "a list of objects, or columns as pandas writes them", constants=True)
    if isinstance(found, dict) and found and all(isinstance(v, dict) for v in found.values()):
        keys = next(iter(found.values()))
        found = [{c: column.get(key) for c, column in found.items()} for key in keys]
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise ValueError(f"{path}: expected a list of objects, or columns as pandas writes them.")
    return ((f"{path}, row {i}", r) for i, r in enumerate(found, 1))


def _checked(path, unit, found):
    for number, _, _, record in found:
        if isinstance(record, str):
            raise ValueError(f"{path} {unit} {number}: {record}.")
        yield f"{path} {unit} {number}", record


# --- Tables ---


def _columns(path, records):
    """{key of NAMES: column, or None}."""
    columns = {str(key).strip().lower(): key for _, r in records[:100] for key in r}
    where = {k: next((columns[n] for n in names if n in columns), None) for k, names in NAMES.items()}
    for key in _NEEDED:
        if where[key] is None:
            raise ValueError(
                f"{path} has no column for the {key}: found {sorted(columns)}, expected one of {list(NAMES[key])}."
            )
    return where


def _line(record, columns, number):
    values = {k: table_forms.as_text(record.get(c)) if c else "" for k, c in columns.items()}
    choices, letter = _choices(record), values["answer"].strip().upper()
    if not _is_letter(letter, choices):
        choices = []
    row = dict(
        question_id=values["question_id"] or str(number),
        question=values["question"],
        answer=letter if choices else values["answer"],
        predictions=[values["prediction"]],
    )
    if choices:
        row |= {"choices": choices, row_keys.ANSWER_LETTER: letter}
    # The authors' sheet has the address of a Python object for an image.
    known = not re.match(r"<[\w.]+ image mode=.* at 0x", values["image"])
    return _completed(row, record, (values["image"] if known else "") or None)


def _choices(record):
    found = []
    for letter in string.ascii_uppercase:
        text = table_forms.as_text(record.get(letter))
        if not text:
            return found
        found.append(text)
    return found


# --- Samples of lmms-eval ---


def _sample(record, where):
    doc = record["doc"] if isinstance(record.get("doc"), dict) else {}
    said = record["filtered_resps"] if "filtered_resps" in record else record["resps"]
    asked = record.get("input") or (record.get("arguments") or [None])[0]
    if not isinstance(asked, str):
        raise ValueError(f"{where}: input is {json_text.shown(asked)}; expected a text.")
    if type(record["doc_id"]) is not int:
        raise ValueError(f"{where}: doc_id is {json_text.shown(record['doc_id'])}; expected a whole number.")
    if "target" not in record:
        raise ValueError(f"{where}: has no 'target'; expected the true answer.")
    more = {}  # metrics often say more about their question
    for part in (*(x for x in record.values() if isinstance(x, dict)), doc):
        more |= {str(k).lower(): x for k, x in part.items()}
    row = dict(
        question_id=_first(more, ("question_id", "qid", "id")) or str(record["doc_id"]),
        doc_id=record["doc_id"],
        question=_first(doc, ("question",)) or asked,
        answer=table_forms.as_text(record["target"]),
        predictions=_texts(said, where),
    )
    row = _completed(row, more, _first(more, ("image_id", "img_id", "img_name")))
    row["prompt"] = asked
    choices, letter = doc.get("choices"), doc.get(row_keys.ANSWER_LETTER)
    if isinstance(choices, list) and _is_letter(letter, choices) and all(isinstance(x, str) for x in choices):
        row |= {"choices": choices, row_keys.ANSWER_LETTER: letter}
    return row


def _without_instruction(rows):
    """Questions that are whole prompts, without the last lines in which all are alike, such as "Use a single word."."""
    prompts = [row["prompt"] for row in rows]
    alike = os.path.commonprefix([text[::-1] for text in prompts])[::-1]
    tail = alike[alike.find("\n") :] if "\n" in alike else ""
    if tail and len(rows) > 1 and all(len(text) > len(tail) for text in prompts):
        for row in rows:
            row["question"] = row["question"].removesuffix(tail)
    return rows


def _is_letter(letter, choices):
    return 2 <= len(choices) <= len(string.ascii_uppercase) and letter in [*string.ascii_uppercase[: len(choices)]]


def _first(record, keys):
    found = (table_forms.as_text(record[k]) for k in keys if isinstance(record.get(k), str | int))
    return next(filter(None, found), None)


def _texts(said, where):
    """The samples of an answer: a text, a list of texts, or of lists of one text each; [[text]] is one."""
    if isinstance(said, list) and len(said) == 1 and isinstance(said[0], list):
        said = said[0]
    flat = [x[0] if isinstance(x, list) and len(x) == 1 else x for x in (said if isinstance(said, list) else [said])]
    if not flat or not all(isinstance(x, str) for x in flat):
        raise ValueError(f"{where}: the answer is {json_text.shown(said)}; expected a text, or a list of samples.")
    return flat


# --- All ---


def _completed(row, record, image_id):
    """A row with image_id, prompt, answer_type and groups."""
    small = {str(k).strip().lower(): v for k, v in record.items()}
    groups = {k: table_forms.as_text(small[k]) for k in GROUPS if isinstance(small.get(k), str | int)}
    groups = {k: text for k, text in groups.items() if text}
    if isinstance(accepted := small.get(row_keys.ACCEPTED), str) and accepted:
        groups[row_keys.ACCEPTED] = accepted
    kind = groups.pop("answer_type", "").upper()
    if kind not in ("OPEN", "CLOSED"):
        kind = "CLOSED" if row.get("choices") or own_rows.is_yes_no(row["answer"]) else "OPEN"
    return row | dict(image_id=image_id, prompt=row["question"], answer_type=kind) | groups


def _check_ids(rows, places):
    seen = {}
    for row, where in zip(rows, places):
        key = row.get("doc_id", row["question_id"])
        if key in seen:
            raise ValueError(f"{where}: question {key!r} stands at {seen[key]}, too; expected each once.")
        seen[key] = where
    if len({row["question_id"] for row in rows}) < len(rows):  # ids of lmms-eval's metrics need not be unique
        for row in rows:
            row["question_id"] = str(row["doc_id"])


def _with_truth(rows):
    kept = [row for row in rows if not answers.is_empty(row["answer"])]
    left = [row["question_id"] for row in rows if answers.is_empty(row["answer"])]
    return kept, [_some(left, "of {} rows have no true answer and are left out", len(rows))] if left else []


def _check_samples(path, rows):
    count = len(rows[0]["predictions"])
    for row in rows:
        if len(row["predictions"]) != count:
            found = len(row["predictions"])
            raise ValueError(
                f"{path}: question {row['question_id']!r} has {found} answers; expected {count} as the first has."
            )


def _doubts(rows):
    signs = {
        "of {} answers are the message of a failed request, and count as wrong": lambda r: (
            _FAILED in r["predictions"][0]
        ),
        "of {} true answers are lists written as a text, and are compared as they stand": lambda r: bool(
            _LISTED.fullmatch(r["answer"])
        ),
        "of {} answers begin with = as formulas do; results of formulas aren't read": lambda r: any(
            x.startswith("=") for x in r["predictions"]
        ),
    }
    found = {said: [row["question_id"] for row in rows if is_so(row)] for said, is_so in signs.items()}
    return [_some(ids, said, len(rows)) for said, ids in found.items() if ids]


def _some(ids, said, total):
    more = ", …" if len(ids) > _SHOWN else ""
    return f"{len(ids):,} {said.format(f'{total:,}')} ({', '.join(map(str, ids[:_SHOWN]))}{more})"


def _named(path, kind):
    """(model, data set): DATE_samples_TASK.jsonl in the model's folder, or MODEL_DATASET.xlsx; else the file's name."""
    stem, folders = path.stem, [p.name for p in path.absolute().parents][:3]
    if kind == "lmms-eval" and "_samples_" in stem:
        return folders[0] or stem, stem.partition("_samples_")[2]
    for folder in folders:
        if kind == "VLMEvalKit" and folder and stem.startswith(f"{folder}_"):
            return folder, stem.removeprefix(f"{folder}_")
    return stem, kind
