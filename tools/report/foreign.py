"""What a report says about others' predictions: our figures and intervals, beside ours on the same questions.

Others' files tell little about a question. Where one of our evaluations asked the same ones, which is seen by ids (or,
of lmms-eval, places in the split) with equal truth and question, images, patients, groups and the answers that need no
model are taken from there. Controls that need the model are not in such files, and that is said.
"""

import dataclasses
import re

from paligemma_med.metrics import answers, scoring
from paligemma_med.pp import rows as row_keys
from tools.report import blocks, contamination, evaluations, figures, foreign_files, sections

_OF_QUESTION = ("question_id", "image_id", "image_key", "patient_id", "question", "answer_type", row_keys.ACCEPTED)
_OF_QUESTION += row_keys.GROUPS
_ENOUGH = 0.5  # share of the smaller one's questions from which on they are taken for the same


@dataclasses.dataclass
class Foreign:
    """file: as read; evaluation: its figures; partner: ours on the same questions, or None; shared: the evaluation of
    these alone."""

    file: foreign_files.File
    evaluation: evaluations.Evaluation
    partner: evaluations.Evaluation | None
    shared: evaluations.Evaluation | None


def load(path, ours) -> Foreign:
    """A foreign file, beside that one of `ours` (a list of `Evaluation`) with which it shares most questions."""
    file = foreign_files.read(path)
    partner, found = None, [None] * len(file.rows)
    for e in ours:
        for rows in _partners(file, e):
            if sum(map(bool, rows)) > sum(map(bool, found)):
                partner, found = e, rows
    if partner and sum(map(bool, found)) < _ENOUGH * min(len(found), len(partner.rows)):
        partner, found = None, [None] * len(file.rows)
    whole = all(found)
    rows = [_joined(row, other, whole) if other else row for row, other in zip(file.rows, found)]
    for row in rows:
        row.pop("doc_id", None)
    notes = list(file.notes)
    if partner and not whole:
        missing = [row["question_id"] for row, other in zip(rows, found) if not other]
        shown = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        notes.append(f"{len(missing):,} of {len(rows):,} questions aren't those of {partner.label} ({shown})")
    of_all = _evaluation(file, rows, partner, notes)
    both = [row for row, other in zip(rows, found) if other]
    return Foreign(file, of_all, partner, _evaluation(file, both, partner, []) if both else None)


def _partners(file, e):
    """For each way to find them, the rows of `e` about the file's questions, or None."""
    if "dialogue_id" in e.rows[0]:
        return
    by_id = {str(row["question_id"]): row for row in e.rows}
    yield [_same(row, by_id.get(row["question_id"])) for row in file.rows]
    if all("doc_id" in row for row in file.rows):
        count = len(e.rows)
        yield [_same(row, e.rows[row["doc_id"]] if 0 <= row["doc_id"] < count else None) for row in file.rows]


def _same(row, other):
    """`other` if it is the same question with the same answer, else None."""
    if other is None or _bare(other["question"]) not in _bare(row["question"]):
        return None
    truths = {answers.normalise(x) for x in (other["answer"], other.get(row_keys.ANSWER_LETTER) or "") if x}
    return other if answers.normalise(row["answer"]) in truths else None


def _bare(text):
    return re.sub(r"\s+", " ", text).strip().casefold()


def _joined(row, other, whole):
    out = row | {k: other[k] for k in _OF_QUESTION if other.get(k)}
    out["question_id"] = str(other["question_id"])
    out |= scoring.correct(out["predictions"][0], scoring.truths(out))
    if whole and answers.normalise(row["answer"]) == answers.normalise(other["answer"]):
        for who in scoring.controls_of([other]):
            if who in scoring.ONE_TEXT:
                said = other[f"{who}_prediction"]
                out |= {f"{who}_prediction": said, **scoring.correct(said, scoring.truths(out), f"{who}_")}
    return out


def _evaluation(file, rows, partner, notes):
    if any(scoring.controls_of([row]) != scoring.controls_of(rows) for row in rows):
        rows = [{k: x for k, x in row.items() if not k.startswith(scoring.ONE_TEXT)} for row in rows]
    by_choices = figures.rule_of(rows) != "acc"
    protocol = "multiple_choice" if by_choices else partner.about.get("protocol", "vqa") if partner else "open"
    if protocol == "multiple_choice" and not by_choices:
        protocol = "vqa"
    about = dict(protocol=protocol, model=file.run, split=partner.about.get("split") if partner else file.name)
    if partner:
        about["data"] = partner.data
    metrics = scoring.summarise(rows, protocol, groups=tuple(dict.fromkeys([*scoring.GROUPS, *foreign_files.GROUPS])))
    return evaluations.Evaluation(
        run=file.run,
        name=file.name,
        folder=file.path,
        rows=rows,
        metrics=metrics,
        stored={},
        about=about,
        section={},
        config={},
        verdicts=[],
        problems=notes,
        foreign=file.kind,
    )


def sections_of(found: Foreign, lookup, num_questions: int) -> list[blocks.Section]:
    """The sections on one foreign file; lookup: `pictures.Lookup` of its partner's data set."""
    e = found.evaluation
    lacks = ", ".join(figures.title_of(c) for c in (*scoring.IMAGE_CONTROLS, scoring.QUESTION_ONLY))
    said = f"From {found.file.path.name}, read as {_KINDS[found.file.kind]}. "
    said += f"Its file has no answers to controls ({lacks}): whether this model looks at the image isn't known from it."
    if found.partner:
        said += f" Images, groups and the answers that need no model are those of {found.partner.label}."
    elif not any(map(sections.has_image, e.rows)):
        said += " Images aren't told apart: intervals take questions for independent."
    top = [blocks.Warning(f"{problem}.") for problem in e.problems]
    top += [blocks.Text(said), *sections.figures_of(e)]
    shown = [sections.question_block(e, row, lookup) for row in sections.worst(e, num_questions)]
    out = [blocks.Section(e.label, top)]
    if shown:
        out.append(blocks.Section(f"Wrong answers: {e.label}", shown, 3))
    if found.shared:
        out.append(sections.compare(found.partner, found.shared))
    title = f"Contamination: {found.file.path.name}"
    return [*out, contamination.section(title, contamination.ours(e))]


_KINDS = {
    "lmms-eval": "samples of lmms-eval",
    "VLMEvalKit": "a table of VLMEvalKit",
    "table": "a table of questions, answers and truths",
}
