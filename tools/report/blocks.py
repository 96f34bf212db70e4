"""What a report is made of, and its two forms: Markdown and one HTML page.

A report is a list of `Section`s of blocks. Both forms are made from the same blocks, so they can't
say different things. All texts are data (questions and answers come from models and outsiders): they are
escaped in both, and nothing in them is treated as markup.
"""

import dataclasses
import pathlib
import re

from paligemma_med import page
from paligemma_med.pp import markdown


@dataclasses.dataclass
class Text:
    """A paragraph."""

    text: str
    kind = "text"


@dataclasses.dataclass
class Warning:
    """A paragraph that readers mustn't miss."""

    text: str
    kind = "warning"


@dataclasses.dataclass
class Table:
    """head: titles; rows: lists of texts. The first `left` columns hold words, the others numbers.
    notes: lines below it. published: numbers of columns that aren't ours."""

    head: list
    rows: list
    caption: str = ""
    notes: list = dataclasses.field(default_factory=list)
    left: int = 1
    published: tuple = ()
    kind = "table"


@dataclasses.dataclass
class Figure:
    """An SVG drawn by `plots`; alt: what it shows, in words."""

    svg: str
    caption: str
    alt: str
    kind = "figure"


@dataclasses.dataclass
class Question:
    """A question with its answers.

    answers: [(text, right or not or None, remark)]; image: bytes of a JPEG, or None.
    """

    title: str
    prompt: str
    truth: str
    answers: list
    image: bytes | None = None
    kind = "question"

    @property
    def data_uri(self) -> str:
        return page.data_url(self.image, "image/jpeg")


@dataclasses.dataclass
class Section:
    """A heading and the blocks below it; level 2 or 3."""

    title: str
    blocks: list
    level: int = 2

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def to_html(title, sections) -> str:
    """The report as one self-contained page."""
    folder = pathlib.Path(__file__).parent
    return page.render(folder, "page.html.jinja", inline_styles=True, title=title, sections=sections)


def to_markdown(title, sections, figures="figures") -> tuple:
    """(the report in Markdown, {file name: SVG} for the folder `figures`).

    Images of questions are only in the HTML page.
    """
    lines, files = [f"# {markdown.escape(title)}", ""], {}
    for section in sections:
        lines += ["#" * section.level + " " + markdown.escape(section.title), ""]
        for block in section.blocks:
            if block.kind == "text":
                lines += [markdown.escape(block.text), ""]
            elif block.kind == "warning":
                lines += [f"> **Warning.** {markdown.escape(block.text)}", ""]
            elif block.kind == "table":
                lines += _table(block)
            elif block.kind == "figure":
                name = f"{len(files) + 1:02d}.svg"
                files[name] = block.svg
                lines += [f"![{markdown.escape(block.alt)}]({figures}/{name})", "", markdown.escape(block.caption)]
                lines += [""]
            else:
                lines += _question(block)
    return "\n".join(lines).rstrip() + "\n", files


def _table(block):
    lines = [f"**{markdown.escape(block.caption)}**", ""] if block.caption else []
    rows = [[markdown.escape(cell) for cell in row] for row in [block.head, *block.rows]]
    lines += [markdown.table(rows, block.left), ""]
    for note in block.notes:
        lines += [markdown.escape(note), ""]
    return lines


def _question(block):
    lines = [f"- **{markdown.escape(block.title)}**", f"  - prompt: {markdown.escape(block.prompt)}"]
    lines += [f"  - truth: {markdown.escape(block.truth)}"]
    for text, right, remark in block.answers:
        sign = {True: "right", False: "wrong", None: "answer"}[right]
        lines.append(
            f"  - {sign}: {markdown.escape(page.shown(text))}" + (f" ({markdown.escape(remark)})" if remark else "")
        )
    return [*lines, ""]
