"""The docs site's hooks and pictures, and that links between our pages lead somewhere."""

import pytest

from tools import docs_pictures, docs_site

PERCENT = """# ---
# jupytext: {}
# ---

# %% [markdown]
# # Title
#
# Text.

# %%
x = 1  # one
# %% [markdown]
# End.
"""


def test_links_lead_to_files(repo_root):
    pages = [p for folder in ("docs", "data_prep") for p in (repo_root / folder).rglob("*.md")] + [
        *repo_root.glob("*.md")
    ]
    assert len(pages) > 30
    broken = []
    for page in pages:
        path = page.relative_to(repo_root).as_posix()
        broken += [
            f"{path}: {link}"
            for link in docs_site.links(page.read_text("utf-8"))
            if docs_site.target_of(path, link) is None
        ]
    assert not broken


def test_which_links_are_ours():
    text = "[a](../x.md#y) [b](https://z) [c](#here) ![d](e.svg)\n```\n[f](g.md)\n```\n[h](i)"
    assert docs_site.links(text) == ["../x.md", "e.svg", "i"]
    assert docs_site.target_of("docs/a.md", "nosuch.md") is None
    assert docs_site.target_of("README.md", "../outside.md") is None
    assert docs_site.target_of("README.md", "docs") == "docs/README.md"


@pytest.mark.parametrize(
    "path, page",
    [
        ("docs/training.md", "training.md"),
        ("docs/notebooks/own_data.py", "notebooks/own_data.md"),
        ("docs/slurm.sh", "slurm.sh"),
        ("README.md", "repository/README.md"),
        ("configs/own_data.py", "repository/configs/own_data.py.md"),
        ("docker", "repository/docker/index.md"),
    ],
)
def test_pages_of_files(path, page):
    assert docs_site.page_of(path) == page
    assert docs_site.path_of(page) == path or path.startswith("docs/notebooks")


def test_a_notebook_is_markdown():
    assert docs_site.from_percent(PERCENT) == "# Title\n\nText.\n\n```python\nx = 1  # one\n```\n\nEnd.\n"


def test_pictures_are_small(repo_root):
    pictures = [*(repo_root / "docs" / "pictures").iterdir()]
    assert pictures and all(x.suffix == ".png" and x.stat().st_size < 150_000 for x in pictures)


def test_the_picture_of_a_report_is_its_first_table():
    other, mine = (
        "<h2 id=1>a</h2><div><table></table></div>",
        "<h2 id=2>b</h2><div><table>>exact match, %<</table></div>",
    )
    report = f"<head></head><body><main>{other}{mine}<p>c</p></main></body>"
    assert docs_pictures.first_table(report).endswith(f"<body><main>{mine}</main></body></html>")
    with pytest.raises(ValueError, match="its layout has changed"):
        docs_pictures.first_table("<body></body>")
