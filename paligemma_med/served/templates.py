"""How a question is put into messages: a JSON file, so that each model can be asked in the way it expects.

The file's keys: user (with {question}), and optionally system, user_with_choices (with {question} and {choices}; for
questions with choices) and image ("before" or "after" the text). Both texts may name other columns of a row, such as
{modality}, but never the answer.
"""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

from paligemma_med.evaluation import results
from paligemma_med.pp import json_text
from paligemma_med.pp import rows as row_keys

DEFAULT = pathlib.Path(__file__).parent / "default.json"
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")
_SECRET = ("answer", row_keys.ANSWER_LETTER)


@dataclasses.dataclass(frozen=True)
class Template:
    """system, user, user_with_choices: texts; image: "before" or "after" the text."""

    system: str
    user: str
    user_with_choices: str
    image: str

    @property
    def digest(self) -> str:
        return results.digest([dataclasses.asdict(self)])[:32]

    def check(self, keys: Sequence[str]) -> None:
        """Raises ValueError if a text names a column that rows with these keys lack, or the answer."""
        for text in (self.system, self.user, self.user_with_choices):
            for key in _PLACE.findall(text):
                if key in _SECRET:
                    raise ValueError(f"the template names {{{key}}}, which would tell the model the answer.")
                if key not in keys and key != "choices":
                    raise ValueError(f"the template names {{{key}}}; expected one of {', '.join(sorted(keys))}.")

    def fill(self, row: Mapping) -> tuple[str, str]:
        """(system, user) for a row; what a row's text has in braces stays as it is."""
        values = {k: str(v) for k, v in row.items()}
        choices = row.get("choices") or ()
        values["choices"] = "\n".join(f"{chr(ord('A') + i)}. {text}" for i, text in enumerate(choices))
        user = self.user_with_choices if choices else self.user
        return tuple(_PLACE.sub(lambda m: values[m[1]], text) for text in (self.system, user))


def read(path=None) -> Template:
    """The template of a file, or the default; ValueError names what is wrong with it."""
    path = path or DEFAULT
    found = json_text.read(path, "a template", root=dict)
    names = [f.name for f in dataclasses.fields(Template)]
    for key, value in found.items():
        if key not in names:
            raise ValueError(f"{path} has the key {key!r}; expected some of {', '.join(names)}.")
        if not isinstance(value, str):
            raise ValueError(f"{path}: {key} is {json_text.name_of(value)}; expected a text.")
    if "question" not in _PLACE.findall(found.get("user", "")):
        raise ValueError(f"{path}: user has no {{question}}; expected a text that asks it.")
    if found.setdefault("image", "before") not in ("before", "after"):
        raise ValueError(f"{path}: image is {found['image']!r}; expected before or after.")
    found.setdefault("user_with_choices", "{question}\n{choices}\nGive the letter of the right choice alone.")
    return Template(**{"system": "", **found})
