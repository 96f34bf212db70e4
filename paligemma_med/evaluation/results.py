"""The files of an evaluation: while it runs, when it resumes, and at the end.

While it runs, predictions.part.jsonl grows by one line per batch, flushed to disk. Its first line says
what is evaluated: weights, data, settings. Started again, the same evaluation reuses the batches in it
and resumes after them; a different one starts again. At the end predictions.jsonl and metrics.json are
written, each whole or not at all, and the part is removed. The result is the same to the byte as without
an interruption.

In a run of several processes the first one reads and writes, and sends what it read to the others.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np

from paligemma_med import files
from paligemma_med.parallel import distributed
from paligemma_med.pp import json_text

# What `about` says that doesn't change the answers.
_NO_DIFFERENCE = ("checkpoint", "command")

PART = "predictions.part.jsonl"
PREDICTIONS = "predictions.jsonl"
METRICS = "metrics.json"


def digest(values) -> str:
    """sha256 of a sequence of JSON-able values, in hexadecimal digits."""
    sha = hashlib.sha256()
    for value in values:
        sha.update(json.dumps(value, ensure_ascii=False).encode() + b"\n")
    return sha.hexdigest()


def split_hash(rows) -> str:
    """A digest of the questions asked: their ids, images' ids, texts and answers, in order.

    Two figures are from the same split if these are equal. The rows are those of predictions.jsonl.
    """
    keys = ("question_id", "image_id", "question", "answer")
    return digest([row.get(key) for key in keys] for row in rows)


def prompt_hash(rows) -> str:
    """A digest of how they were asked: the prompts as the model read them, in order."""
    return digest(row["prompt"] for row in rows)


def read_rows(path) -> list[dict]:
    """The rows of a predictions.jsonl or judgements.jsonl; ValueError names a line that isn't an object."""
    return [row for _, row in json_text.lines(path, "a JSON object", root=dict, constants=True)]


def read_metrics(path) -> tuple[dict, dict]:
    """(figures {name: number}, about {…}) of a metrics.json; about is {} in one that has none. ValueError: it isn't
    of this form."""
    expected = "an object of numbers, as an evaluation writes it"
    metrics = json_text.read(path, expected, root=dict, constants=True)
    about = metrics.pop("about", {})
    if not isinstance(about, dict):
        raise ValueError(f"{path}: about is {json_text.name_of(about)}; expected an object")
    if odd := [key for key, x in metrics.items() if x is not None and not isinstance(x, int | float)]:
        raise ValueError(f"{path}: {odd[0]} is {json_text.name_of(metrics[odd[0]])}; expected {expected}")
    return metrics, about


def write(folder, rows, metrics, about, name=PREDICTIONS) -> None:
    """Writes predictions.jsonl, or what the rows are called, and metrics.json, and removes the part."""
    if not distributed.is_main():
        return
    folder = pathlib.Path(folder)
    files.write_text(folder / name, "".join(map(_line, rows)))
    files.write_text(folder / METRICS, json.dumps({**metrics, "about": about}, indent=2) + "\n")
    (folder / PART).unlink(missing_ok=True)


def identity(about) -> dict:
    """The part of `about` that decides whether an evaluation is the same as an interrupted or finished one."""
    return {k: v for k, v in about.items() if k not in _NO_DIFFERENCE}


def finished(folder, identity, name=PREDICTIONS) -> list[dict] | None:
    """The rows of an evaluation of `identity` that is complete in `folder`, or None. Collective."""
    rows = None
    if distributed.is_main():
        folder = pathlib.Path(folder)
        try:
            # Not `read_metrics`: the program whose rows these are may write figures of another form.
            about = json_text.read(folder / METRICS, "figures", root=dict, constants=True).get("about", {})
            # A part is removed last.
            if isinstance(about, dict) and not (folder / PART).exists() and _is_of(about, identity):
                rows = read_rows(folder / name)
        except (OSError, ValueError, AttributeError):
            pass
    return distributed.broadcast(rows)


def _is_of(about, identity):
    return all(key in about and about[key] == x for key, x in plain(identity, "about").items())


class Part:
    """The batches of an evaluation that isn't finished.

    Attributes:
      saved: {(name of the pass, number of the batch): [row, …]} from an interrupted run.
    """

    def __init__(self, folder, identity, resume=True):
        """Opens the file, or begins it. Collective.

        Args:
          folder: the evaluation's; None saves nothing.
          identity: JSON-able dict of everything that the answers depend on.
          resume: False ignores saved batches.
        """
        self.saved, self._file, self._use = {}, None, contextlib.ExitStack()
        if folder is None:
            return
        path = pathlib.Path(folder) / PART
        batches = []
        if distributed.is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._use.enter_context(files.sole_use(path.parent, "give another folder"))
            header = plain(identity, "about")
            length, batches = _read(path, header) if resume else (0, [])
            if not length:
                files.write_text(path, _line(header))
            else:
                os.truncate(path, length)
            self._file = open(path, "a", encoding="utf-8")
            if n := sum(len(rows) for name, _, rows in batches if name == "model"):
                print(f"{path}: resumes after {n} questions.", file=sys.stderr, flush=True)
        self.saved = {(name, i): rows for name, i, rows in distributed.broadcast(batches)}

    def add(self, name, batch, rows) -> None:
        """Keeps the rows of a batch; they are on the disk when this returns."""
        if self._file is not None:
            with files.named(self._file.name):
                self._file.write(_line([name, batch, rows]))
                self._file.flush()
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._use.close()


def _read(path, header):
    """(bytes of whole lines, [[pass, batch, rows], …]) of a part with this header; 0 bytes if the
    header is another, or there is no file. A last line that was cut off is left out."""
    batches, length = [], 0
    try:
        with open(path, "rb") as f:
            for line in f:
                is_whole = line.endswith(b"\n")
                value = json_text.parse(line, f"{path}", constants=True) if is_whole else None
                if value is None or (not length and value != header):
                    break
                if length:
                    name, batch, rows = value
                    is_batch = isinstance(name, str) and type(batch) is int and isinstance(rows, list)
                    if not is_batch or not all(isinstance(row, dict) for row in rows):
                        break
                    batches.append([name, batch, rows])
                length += len(line)
    except (OSError, ValueError, TypeError):
        pass
    return length, batches


def plain(value, what) -> Any:
    """A value as it would come back from a JSON file: numpy's numbers and arrays as numbers and
    lists. ValueError, which begins with `what`, names a type that can't be written."""

    def default(x):
        if isinstance(x, np.generic | np.ndarray):
            return x.tolist()
        raise ValueError(
            f"{what} has a value of type {type(x).__name__}, which can't be written to "
            "predictions.jsonl; leave its key out of the keep(...) of pp_fn."
        )

    return json.loads(json.dumps(value, default=default))


def _line(value):
    return json.dumps(value, ensure_ascii=False) + "\n"
