"""tools.report: texts stay texts in both forms; the program and its files."""

import html.parser
import importlib.util
import re
import subprocess
import sys

import pytest

from paligemma_med.pp import markdown
from tests.tools.report.reports import HOSTILE, Page, report, row, rows, save
from tests.tools.report.test_contamination import contaminated, write_sheet
from tools.report import (
    plots,
)
from tools.report.__main__ import check_installed, make, write

# --- Texts are data ---


def test_hostile_texts_stay_texts(tmp_path):
    made = rows(6)
    made[0] = row(0, [HOSTILE] * 5, HOSTILE + "!", kind=HOSTILE, question=HOSTILE, content_type="$x_$")
    for other in made[1:]:
        other["content_type"] = "$\\frac$"
        del other["majority_prediction"], other["shuffled_images_predictions"]
        for key in [k for k in other if k.startswith(("majority", "shuffled"))]:
            del other[key]
    save(tmp_path / "a", made, command2=HOSTILE)
    _, as_markdown, text, _ = report(tmp_path / "a")
    page = Page(text)
    assert not {"script", "iframe", "object", "embed", "base", "form", "link"} & {*page.tags}
    # Anchors within the page, and images within it: nothing else is referred to.
    assert page.links and all(x.startswith(("#", "data:image/jpeg;base64,")) for x in page.links)
    assert "<script>alert(1)</script>" in page.text  # shown as it was said
    assert "default-src 'none'" in html.unescape(text)
    assert not re.search(r"(?<!\\)<(script|img)", as_markdown)
    assert not re.search(r"(?<!\\)\]\(http", as_markdown)
    # Every line of every table has as many cells as its head.
    for block in re.findall(r"(?:^\|.*\n)+", as_markdown, re.MULTILINE):
        counts = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(counts) == 1
    assert "$x_$" in text  # no formula was made of it


def test_ids_in_plots_do_not_collide_and_follow_the_page(tmp_path):
    save(tmp_path / "a", rows())
    save(tmp_path / "b", rows(wrong=lambda i: i % 4 == 0))
    _, _, text, files = report(tmp_path / "a", tmp_path / "b")
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len({*ids})
    used = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'xlink:href="#([^"]+)"', text)
    assert used and {*used} < {*ids}
    assert "currentColor" in text and not re.search("#123456", text)
    assert "background:#fff" in plots.standalone(files["01.svg"])


def test_markdown_escapes():
    assert markdown.escape("a|b <i> *c* \n# d") == r"a\|b \<i\> \*c\* ⏎ \# d"
    assert markdown.escape("- a") == r"\- a" and markdown.escape("1. a") == r"1\. a"
    assert markdown.escape("---") == r"\---" and markdown.escape("1.5 cm") == "1.5 cm"
    assert markdown.escape("") == " "


# --- The program ---


def test_written_files_are_whole_and_refer_to_each_other(tmp_path):
    save(tmp_path / "a", rows())
    write("T", make([tmp_path / "a"]), tmp_path / "out")
    markdown = (tmp_path / "out" / "report.md").read_text()
    for name in re.findall(r"\]\((figures/[^)]+)\)", markdown):
        assert (tmp_path / "out" / name).read_text().startswith("<?xml")
    assert (tmp_path / "out" / "report.html").read_text().endswith("</html>")


@pytest.mark.parametrize("name", ["jinja2", "matplotlib", "openpyxl", "rouge_score", "sacrebleu"])
def test_a_missing_extra_is_named(monkeypatch, name):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda x: None if x == name else find(x))
    with pytest.raises(ValueError, match=f"needs {name}; pip install 'paligemma_med.report.'"):
        check_installed()


@pytest.mark.slow
def test_the_program(tmp_path):
    save(tmp_path / "a", rows())
    write_sheet(tmp_path / "f.xlsx", contaminated())
    command = [sys.executable, "-m", "tools.report", tmp_path / "a", f"--foreign={tmp_path}/f.xlsx"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("warning: 24 of 24 (100.0 %) of the predictions begin") == 1
    assert (tmp_path / "a" / "report" / "report.html").exists()
    run = subprocess.run([*command[:3], tmp_path / "none"], capture_output=True, text=True)
    assert run.returncode == 1 and run.stderr.strip().startswith("error: ")
    assert len(run.stderr.strip().splitlines()) == 1
