"""Hooks of the docs site (mkdocs.yml): links that leave docs/, and notebooks, become pages of it.

Pages in docs/ link to files of the checkout such as ../configs/own_data.py, as GitHub follows them. Each such file, and
what it links to, gets a page under repository/, so that the site is whole wherever it stands. Notebooks are scripts in
Jupytext's percent format: its text cells are Markdown already, its code becomes fenced blocks.

    pip install '.[docs]' && mkdocs build --strict      (or: make docs)
"""

import pathlib
import posixpath
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#|/)([^)\s#]+)")
_FENCE = re.compile(r"^(```.*?^```)", re.MULTILINE | re.DOTALL)
_LANGUAGES = {".py": "python", ".sh": "sh", ".yaml": "yaml", ".cff": "yaml", ".cpu": "docker", ".cuda": "docker"}


def on_files(files, config):
    """Adds the notebooks, and every file of the checkout that a page links to."""
    from mkdocs.structure.files import File, InclusionLevel  # here, so that tests of the rest don't need it

    for script in sorted((ROOT / "docs" / "notebooks").glob("*.py")):
        path = script.relative_to(ROOT).as_posix()
        files.remove(files.get_file_from_path(path.removeprefix("docs/")))
        files.append(File.generated(config, page_of(path), content=from_percent(script.read_text("utf-8"))))
    known = {file.src_uri for file in files}
    waiting = [(path_of(file.src_uri), file.content_string) for file in files.documentation_pages()]
    while waiting:
        for path in linked(*waiting.pop()):
            if not path.startswith("docs/") and page_of(path) not in known:
                known.add(page_of(path))
                text = _shown(path)
                # In no place of the navigation, and no fault of it: these are reached by links.
                page = File.generated(config, page_of(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(page)
                waiting.append((path, text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links to files of the checkout to their pages, and indents nested lists as Python-Markdown wants them."""
    path = path_of(page.file.src_uri)
    here = posixpath.dirname(page.file.src_uri) or "."

    def turned(match):
        target = target_of(path, match[1])
        if target is None:
            return match[1]  # MkDocs says that there is no such file
        return posixpath.relpath(page_of(target), here)

    parts = _FENCE.split(markdown)
    return "".join(
        part if part.startswith("```") else re.sub(r"^  - ", "    - ", _LINK.sub(turned, part), flags=re.MULTILINE)
        for part in parts
    )


def page_of(path: str) -> str:
    """Where a file of the checkout is in the site's sources: "docs/x.md" at x.md, "a/b.py" at repository/a/b.py.md."""
    if path.startswith("docs/"):
        path = path.removeprefix("docs/")
        return path.removesuffix(".py") + ".md" if path.startswith("notebooks/") else path
    if (ROOT / path).is_dir():
        return f"repository/{path}/index.md"
    return f"repository/{path}" if path.endswith(".md") else f"repository/{path}.md"


def path_of(page: str) -> str:
    """The file of the checkout that a page of the site shows."""
    if not page.startswith("repository/"):
        return f"docs/{page}"
    path = page.removeprefix("repository/")
    whole = path.removesuffix(".md")
    return posixpath.dirname(path) if path.endswith("/index.md") else path if (ROOT / path).is_file() else whole


def from_percent(script: str) -> str:
    """Markdown of a script in percent format. What stands before its first cell (Jupytext's header) is left out."""
    out = []
    for cell in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, _, body = cell.partition("\n")
        if "[markdown]" in kind:
            out.append(re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip("\n"))
        else:
            out.append("```python\n" + body.strip("\n") + "\n```")
    return "\n\n".join(out) + "\n"


def linked(path: str, text: str) -> list[str]:
    """Files and folders of the checkout that a file's Markdown links to; links that lead nowhere are left out."""
    return [target for link in links(text) if (target := target_of(path, link)) is not None]


def links(text: str) -> list[str]:
    """Relative links of a Markdown text, without what stands behind #, and outside its blocks of code."""
    return [link for part in _FENCE.split(text) if not part.startswith("```") for link in _LINK.findall(part)]


def target_of(path: str, link: str) -> str | None:
    """The file or folder of the checkout that a link in a file means; None if there is none."""
    base = path if (ROOT / path).is_dir() else posixpath.dirname(path)
    target = posixpath.normpath(posixpath.join(base, link))
    if target.startswith("..") or not (ROOT / target).exists():
        return None
    if (ROOT / target / "README.md").is_file():
        return posixpath.join(target, "README.md")
    return target


def _shown(path):
    """What the page of a file says: Markdown as it is, another file's text as a block, a folder's files as a list."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(x.name for x in file.iterdir() if x.is_file())
        return f"# {path}/\n\n" + "\n".join(f"- [{name}]({name})" for name in names) + "\n"
    text = file.read_text("utf-8")
    if file.suffix == ".md":
        return text
    return f"# {path}\n\n```{_LANGUAGES.get(file.suffix, '')}\n{text.rstrip()}\n```\n"
