"""What the language model is asked: versioned texts in templates/, one file a template."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Template:
    """A way to ask. kind: "pairs" (question, answer) or "choices" (with four options).

    needs: fields without which a row can't be asked. shows: fields that are shown where present.
    per: "image", or "case" (only the first image of a case is asked). digest: of all of it.
    """

    name: str
    version: int
    kind: str
    per: str
    needs: tuple[str, ...]
    shows: tuple[str, ...]
    system: str
    user: str
    digest: str


def load(name) -> Template:
    """Reads a template by name, in its newest version or as NAME_vN."""
    raise NotImplementedError


def messages(template, row, pairs, attempt=0, problem="", examples=()):
    """[{"role": "system", "content"}, {"role": "user", "content"}]."""
    raise NotImplementedError
