"""Predictions of an evaluation in the formats of lmms-eval and VLMEvalKit, which `report --foreign` reads, too.

    python -m tools.export_predictions out/a/eval/slake_test --to=lmms-eval --out=out/lmms
    python -m tools.export_predictions out/a/eval/slake_test --to=vlmevalkit --out=out/vlmevalkit --task=SLAKE

lmms-eval: MODEL/DATE_samples_TASK.jsonl, which its --baseline takes; doc_id is a question's place, and doc has its own
id and texts. vlmevalkit: MODEL/MODEL_TASK.xlsx; index is a question's id, prediction its first answer. vlmevalkit-json:
the same as with PRED_FORMAT=json, for texts that a sheet can't hold.
"""
# The docstring above is what --help prints.

import hashlib
import io
import json
import os
import pathlib
import re
import time

from absl import app, flags

from paligemma_med import files
from paligemma_med.cli import command
from paligemma_med.evaluation import predictions, results
from paligemma_med.metrics import scoring
from paligemma_med.pp import command_line, table_forms
from paligemma_med.pp import rows as row_keys

FORMATS = ("lmms-eval", "vlmevalkit", "vlmevalkit-json")
# Of a row, what is about its question.
_MORE = ("image_id", "image_key", "patient_id", "answer_type", row_keys.ACCEPTED, *scoring.GROUPS)
_DOC = ("question_id", "question", "answer", *_MORE)
_CELL = 32_767  # characters of a cell of .xlsx


def export(folder, to, out, *, model=None, task=None) -> pathlib.Path:
    """Writes the predictions of an evaluation and returns the file's path.

    Args:
      folder: of an evaluation, with predictions.jsonl.
      to: one of FORMATS.
      out: folder to write below.
      model, task: names; None: of the run's folder, and of the evaluation's.

    Raises:
      ValueError: predictions that can't be read; a text that no cell holds; a name that is no part of a path.
      OSError: can't be read or written.
    """
    folder = pathlib.Path(folder)
    path = folder / results.PREDICTIONS
    rows = predictions.read(path, row_keys.NEEDED)
    model, task = _name("model", model or _run_of(folder)), _name("task", task or folder.resolve().name)
    if to == "lmms-eval":
        date = time.strftime("%Y%m%d_%H%M%S", time.gmtime(path.stat().st_mtime))
        target = pathlib.Path(out, model, f"{date}_samples_{task}.jsonl")
        content = "".join(json.dumps(sample(i, row), ensure_ascii=False) + "\n" for i, row in enumerate(rows)).encode()
    else:
        target = pathlib.Path(out, model, f"{model}_{task}.{'json' if to.endswith('json') else 'xlsx'}")
        lines = [line(row) for row in rows]
        content = json.dumps(lines, ensure_ascii=False, indent=4).encode() if to.endswith("json") else sheet(lines)
    with files.whole_file(target) as f:
        f.write(content)
    return target


def _run_of(folder):
    above = [p.name for p in folder.resolve().parents]
    return above[above.index("eval") + 1] if "eval" in above[:-1] else folder.resolve().parent.name


def _name(what, text):
    name = re.sub(r"[^\w.@+-]+", "_", text).strip("._")
    if not name:
        raise ValueError(f"the {what} is called {text!r}; --{what}=NAME gives it a name with letters or digits.")
    return name


def sample(number, row) -> dict:
    """A line of lmms-eval about row `number` of predictions.jsonl."""
    doc = {k: row[k] for k in _DOC if row.get(k) is not None}
    if "choices" in row:
        doc |= {k: row[k] for k in ("choices", row_keys.ANSWER_LETTER) if k in row}
    said = scoring.texts(row, "model")
    out = dict(doc_id=number, doc=doc, target=row["answer"])
    if row["predictions"] != said:  # with a thought before it
        out["resps"] = row["predictions"]
    digest = hashlib.sha256(json.dumps(doc, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()
    out |= dict(filtered_resps=said[0] if len(said) == 1 else said, doc_hash=digest, input=row.get("prompt") or "")
    return out | dict(score=float(scoring.score(said[0], scoring.truths(row))["acc"]))


def line(row) -> dict:
    """A row of VLMEvalKit's table."""
    out = dict(index=row["question_id"], question=row["question"])
    choices, letter = row.get("choices") or [], row.get(row_keys.ANSWER_LETTER)
    out |= {chr(ord("A") + i): text for i, text in enumerate(choices if letter else [])}
    out |= dict(answer=letter if choices and letter else row["answer"])
    out |= {k: row[k] for k in _MORE if isinstance(row.get(k), str | int)}
    return out | dict(prediction=scoring.texts(row, "model")[0])


def sheet(lines) -> bytes:
    """Lines of a table as .xlsx, all cells but whole numbers as texts, whatever they begin with."""
    openpyxl = table_forms.package("openpyxl", ".xlsx", "tables")
    columns = list(dict.fromkeys(key for x in lines for key in x if key != "prediction")) + ["prediction"]
    for x in lines:
        for column, value in x.items():
            if isinstance(value, str) and (why := _unfit(openpyxl, value)):
                raise ValueError(f"question {x['index']!r}: {column} has {why}; --to=vlmevalkit-json writes it.")
    book = openpyxl.Workbook(write_only=True)
    page = book.create_sheet("Sheet1")
    page.append(columns)
    for x in lines:
        page.append([_cell(openpyxl, page, x.get(c, "")) for c in columns])
    out = io.BytesIO()
    book.save(out)
    return out.getvalue()


def _unfit(openpyxl, text):
    """Why no cell holds a text, or ""."""
    if openpyxl.cell.cell.ILLEGAL_CHARACTERS_RE.search(text) or re.search("[\ud800-\udfff\ufffe\uffff]", text):
        return "characters that no sheet holds"
    return f"a text of {len(text):,} characters; a cell has {_CELL:,}" if len(text) > _CELL else ""


def _cell(openpyxl, page, value):
    if not isinstance(value, str):
        return value
    cell = openpyxl.cell.WriteOnlyCell(page, "")
    cell.value, cell.data_type = value, "s"  # "=" and "#N/A" are texts here
    return cell


@command
def main(argv) -> None:
    f = flags.FLAGS
    if len(argv) < 2:
        raise app.UsageError("name one or more folders of an evaluation, out/RUN/eval/NAME.")
    if len(argv) > 2 and f.task:
        raise app.UsageError("--task names one evaluation, and there are several.")
    for folder in argv[1:]:
        if not os.path.isfile(os.path.join(folder, results.PREDICTIONS)):
            raise ValueError(f"{folder} has no {results.PREDICTIONS}; expected the folder of one evaluation.")
    for folder in argv[1:]:
        print(f"Written: {export(folder, f.to, f.out, model=f.model, task=f.task)}")


if __name__ == "__main__":
    flags.DEFINE_enum("to", None, FORMATS, "Whose format.", required=True)
    command_line.define_path("out", None, "Folder to write below.", required=True)
    flags.DEFINE_string("model", None, "The model's name; default: the run's folder.")
    flags.DEFINE_string("task", None, "The data set's name, as the other program calls it; default: the evaluation's.")
    app.run(main, flags_parser=command_line.parse_flags)
