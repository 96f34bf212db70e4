"""Many answers: a page for each and an index, worst first; an interrupted call can be resumed."""

import contextlib
import hashlib
import os
import pathlib
import sys

import numpy as np

import paligemma_med
from paligemma_med.config import files as config_files
from paligemma_med.evaluation import results
from paligemma_med.explain import page
from paligemma_med.explain.answer import explain
from paligemma_med.explain.files import slug, write_npz, write_page, write_pngs
from paligemma_med.files import whole_file
from paligemma_med.page import clean, shown
from paligemma_med.saliency import checks


def explain_many(loaded, title, asked, out, *, npz=False, png=False, **kw) -> int:
    """A page for each `questions.Asked`, and index.html, worst first.

    An image that can't be read gets a line in the index and no page. If interrupted at any point, the
    same call resumes: finished rows are in `results.PART` until the index is written.

    Args:
      title: what the images are from, such as a folder's name.
      asked: [Asked].
      out: folder for the pages.
      npz, png: also write these for each page.
      **kw: passed to `explain`.

    Returns:
      How many questions have no page.
    """
    identity = dict(
        weights=loaded.weights,
        settings=kw,
        npz=npz,
        png=png,
        config=config_files.to_json(loaded.config),
        software=paligemma_med.__version__,
        asked=[(*map(clean, one[:3]), *map(clean, one.choices.values())) for one in asked],
    )
    rows = []
    with contextlib.closing(results.Part(out, identity)) as part:
        for i, (name, question, given, read, choices) in enumerate(asked):
            content = _content(read)
            sha = isinstance(content, bytes) and hashlib.sha256(content).hexdigest()
            (row,) = part.saved.get(("model", i), [{}])
            there = not row.get("href") or os.path.exists(os.path.join(out, row["href"]))
            if row.get("sha256", "") != sha or not there:
                stem = os.path.join(out, f"{i + 1:04d}_{slug(pathlib.PurePath(name).stem)}")
                row = _row(loaded, content, name, question, given, stem, npz=npz, png=png, choices=choices, **kw)
                row["sha256"] = sha
                part.add("model", i, [row])
            rows.append(row)
            said = f"{row['name']}: {row['error'] or row['question'] + ' ' + shown(row['answer'])}"
            said = f"[{i + 1}/{len(asked)}] {' '.join(said.split())}"
            print(said, file=sys.stderr if row["error"] else sys.stdout, flush=True)
    raised = [[checks.Flag(*flag) for flag in row["raised"]] for row in rows]
    order = worst_first(rows, raised)
    title = f"{len(rows)} answers about images in {title}"
    with whole_file(os.path.join(out, "index.html")) as f:
        f.write(page.render_index([rows[i] for i in order], title).encode())
    os.remove(os.path.join(out, results.PART))
    return sum(row["error"] is not None for row in rows)


def _content(read):
    """The bytes of an image, or the error that reading it gave."""
    try:
        return read()
    except (OSError, ValueError) as e:
        return e


def _row(loaded, content, name, question, given, stem, *, npz, png, **kw):
    """Writes the files of one question, named `stem` plus an ending; returns its row of the index."""
    row = dict(
        name=clean(name),
        question=clean(question),
        given=clean(given),
        answer="",
        probability=None,
        flags=[],
        raised=[],
        thumb=None,
        href=None,
        error=None,
    )
    try:
        if isinstance(content, Exception):
            raise content
        made, raised = explain(loaded, content, question, title=name, given=given, **kw)
    except (OSError, ValueError) as e:
        return row | dict(error=clean(getattr(e, "strerror", None) or str(e)))
    write_page(made, f"{stem}.html")
    if npz:
        write_npz(made, f"{stem}.npz")
    if png:
        write_pngs(made, os.path.dirname(stem), f"{os.path.basename(stem)}_")
    return row | dict(
        answer=clean(made.answer),
        flags=made.flags,
        raised=results.plain(raised, name),
        probability=float(np.exp(min(0.0, made.logprobs.sum()))),
        thumb=page.data_url(made.picture, 96),
        href=f"{os.path.basename(stem)}.html",
    )


def worst_first(rows, raised) -> list[int]:
    """Indices in the index's order: failures, then by flags, then the least probable answer first."""
    by_flags = {i: place for place, i in enumerate(checks.worst_first(raised))}

    def key(i):
        row = rows[i]
        probability = row["probability"]
        return (
            row["error"] is None,
            [-x for x in checks.severity(raised[i])],
            -1 if probability is None else probability,
            by_flags[i],
        )

    return sorted(range(len(rows)), key=key)
