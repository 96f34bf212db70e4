"""MedICaT's lines, split by article; all figures made up."""

import json

import pytest

from data_prep.datasets.medicat import layout
from data_prep.files import DataError
from tests.data_prep import made

SHARES = (0.2, 0.3, 0)


def line(article, figure, **kw):
    found = dict(
        pdf_hash=f"{article:040x}",
        fig_key=f"Figure{figure}",
        fig_uri=f"{figure}-Figure{figure}-1.png",
        s2_caption=f"Figure {figure}. Shadow  {article}.",
        s2orc_caption="Another.",
        s2orc_references=["As in Figure 1.", "And again."],
        radiology=figure == 1,
        scope=False,
        predicted_type="Medical images",
        oa_info={"oa": {"license": "cc-by"}},
    )
    return found | kw


@pytest.fixture
def rows():
    return [line(a, f) for a in range(12) for f in (1, 2)]


def write(root, rows):
    made.write(root / "release" / "figures.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    made.write(root / "release" / "a_subcaptions.jsonl", json.dumps({"pdf_hash": "x", "subcaptions": []}) + "\n")
    for i, row in enumerate(rows):
        made.write(root / "figures" / f"{row['pdf_hash']}_{row['fig_uri']}", made.image(i, "PNG"))
    return root


def test_records_by_article(rows, tmp_path):
    root = write(tmp_path / "raw", rows)
    report, splits = made.built("medicat", root, tmp_path / "d", "caption", validate_fraction=0.2, test_fraction=0.3)
    papers = {s: {x["paper_id"] for x in some.values()} for s, some in splits.items()}
    assert sum(map(len, papers.values())) == 12 and sum(map(len, splits.values())) == 24
    assert report["shared"]["article"]["train+test"]["count"] == 0
    row = next(some[key] for some in splits.values() for key in some if key == f"{3:040x}_1-Figure1-1")
    wanted = dict(
        image=made.image(6, "PNG"),
        answer="Figure 1. Shadow 3.",
        radiology="yes",
        scope="no",
        references="As in Figure 1.\nAnd again.",
        licence="cc-by",
        paper_id=f"{3:040x}",
        predicted_type="Medical images",
    )
    assert row | wanted == row


def test_nulls_radiology_and_small_draws(rows, tmp_path):
    rows[0] |= dict(s2_caption=None, s2orc_references=None, oa_info=None, radiology=None)
    rows[2] |= dict(s2_caption=None, s2orc_caption=None)
    release = layout.read_folder(write(tmp_path / "raw", rows), (0.0, 0.0, 0))
    assert list(release.figures) == ["train"]  # a draw may leave splits without articles
    figures = [*release.figures["train"].values()]
    first = figures[0].features
    assert (first["caption"], first["references"], first["licence"], first["radiology"]) == ("Another.", "", "", "")
    assert figures[2].no_caption == "blank caption" and not figures[3].no_caption
    only = layout.read_folder(tmp_path / "raw", SHARES, radiology_only=True)
    assert sum(map(len, only.figures.values())) == 11
    assert only.notes["figures that aren't radiology, left out"] == 13


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(pdf_hash="../x"), "jsonl line 6: pdf_hash and fig_uri: .*expected a relative path"),
        (dict(pdf_hash=None), "line 6: pdf_hash is None; expected text"),
        (dict(s2_caption=["x"]), r"line 6: s2_caption is \['x'\]; expected text or null"),
        (dict(s2orc_references="x"), "line 6: s2orc_references is 'x'; expected a list"),
        (dict(pdf_hash=f"{1:040x}", fig_uri="1-Figure1-1.png"), "line 6: id .* comes twice"),
    ],
)
def test_lines_refused(rows, tmp_path, change, message):
    root = write(tmp_path / "raw", rows)
    rows[5] |= change
    made.write(root / "release" / "figures.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        layout.read_folder(root, SHARES)


def test_folders_refused(tmp_path):
    made.write(tmp_path / "a_subcaptions.jsonl", json.dumps({"pdf_hash": "x"}))
    with pytest.raises(DataError, match="no .jsonl with pdf_hash, fig_uri, s2_caption found"):
        layout.check_folder(tmp_path)
