"""The kit of every HTML page that the project writes: templates, content policy, escaping, data URLs.

A page is a file and nothing else: no server, no network (but that of `explain --serve`, which asks its own server and
nobody else). Its content policy lets only its own style
and script run, by their hashes, and images only as data; texts are escaped by jinja2. So whatever a
question, an answer or a file's name holds is inert. jinja2 comes with the extra `report`.
"""

import base64
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def check_jinja() -> None:
    """ValueError where jinja2 isn't installed."""
    try:
        import jinja2  # noqa: F401
    except ImportError:
        raise ValueError(
            "The page needs jinja2, which is not installed: pip install 'paligemma_med[report]'."
        ) from None


def render(
    folder: os.PathLike | str,
    template: str,
    *,
    style: str | Sequence[str] | None = None,
    script: str | None = None,
    data: Any = None,
    inline_styles: bool = False,
    same_origin: bool = False,
    filters: Mapping[str, Callable] | None = None,
    **values: Any,
) -> str:
    """A page as text.

    Args:
      folder: of the template, the style and the script.
      template: file name; it finds `policy`, `style`, `script` and `data`, beside `values`.
      style, script: names of files whose content goes into the page; several styles follow one another.
      data: what JSON can hold, for the script to read: goes into the page as text that can't end
        its element.
      inline_styles: allow `style` attributes, as drawings inlined from matplotlib have them.
      same_origin: let the script ask the server that the page comes from, and frame its pages.
      filters: functions for the template, beside `shown`.
      **values: for the template, which escapes every text in them.

    Raises:
      ValueError: jinja2 isn't installed; `data` holds NaN.
    """
    check_jinja()
    import jinja2
    import markupsafe

    folder = pathlib.Path(folder)
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    env.filters.update({"shown": shown, **(filters or {})})
    own = {k: markupsafe.Markup(v) for k, v in _contents(folder, style, script).items()}
    if data is not None:
        own["data"] = markupsafe.Markup(embed(data))
    own["policy"] = policy(own.get("style"), own.get("script"), inline_styles=inline_styles, same_origin=same_origin)
    text = env.get_template(template).render(**own, **values)
    return text.encode("utf-8", "replace").decode()


def policy_of(
    folder: os.PathLike | str,
    *,
    style: str | Sequence[str] | None = None,
    script: str | None = None,
    same_origin: bool = False,
) -> str:
    """The content policy of the page that `render` makes of these arguments, for a server to send."""
    return policy(**_contents(folder, style, script), same_origin=same_origin)


def _contents(folder, style, script):
    """{"style", "script": text of those that are given}."""
    names = {"style": (style,) if isinstance(style, str) else style, "script": script and (script,)}
    read = {k: [pathlib.Path(folder, name).read_text(encoding="utf-8") for name in v] for k, v in names.items() if v}
    return {k: "\n".join(text.strip() for text in v) for k, v in read.items()}


def policy(
    style: str | None = None, script: str | None = None, *, inline_styles: bool = False, same_origin: bool = False
) -> str:
    """The content policy of a page with this style and this script, and nothing from anywhere else.

    A hash of the style would switch `inline_styles` off again, so that they stand for themselves.
    """
    styles = "'unsafe-inline'" if inline_styles else f"'{_hash(style)}'" if style else "'none'"
    scripts = f"'{_hash(script)}'" if script else "'none'"
    server = "connect-src 'self'; frame-src 'self'; " if same_origin else ""
    return (
        f"default-src 'none'; {server}img-src data:; style-src {styles}; script-src {scripts}; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embed(data: Any) -> str:
    """JSON that may stand in a <script>: nothing in it can end the element or open another."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def data_url(content: bytes, kind: str) -> str:
    """The content of an image file as an address. kind: "image/jpeg", "image/png", …"""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def shown(answer: str) -> str:
    """An answer as people see it: one that is empty or of white space alone would be shown as nothing at all."""
    if answer.strip():
        return answer
    return f"(white space alone: {answer!r})" if answer else "(nothing)"


def clean(value: Any) -> Any:
    """Texts without what HTML and UTF-8 can't carry: control characters (but newline and tab) and
    halves of surrogate pairs, as in file names that are no Unicode, become U+FFFD. Mappings, lists
    and tuples are cleaned throughout."""
    if isinstance(value, str):
        text = value.encode("utf-8", "replace").decode("utf-8")
        return "".join("\ufffd" if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 else c for c in text)
    if isinstance(value, dict):
        return {k: clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(clean(v) for v in value)
    return value
