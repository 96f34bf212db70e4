"""The criteria of judging: what the judge is asked, and how its replies are read.

Judged texts come from other models and may hold anything, "reply 1" included. They are fenced by a
code that no text can contain, declared to be data, and a reply only counts if it is a score and nothing
else. Every prompt is a file in prompts/, identified by its name and digest; a changed prompt is a new file.
"""

import hashlib
import json
import pathlib
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

PROMPTS = pathlib.Path(__file__).parent / "prompts"


class Protocol(NamedTuple):
    """A criterion: its prompt's file, its scores from the lowest up, what the judge sees."""

    prompt: str
    scores: tuple
    sees: tuple
    source: str


PROTOCOLS = {
    "binary": Protocol(
        "binary_v1.txt",
        (0, 1),
        ("answer", "prediction"),
        "MedM, fig. 10: 1 if factually correct and aligned in meaning with the truth, else 0. As "
        "there, the judge sees generation and truth alone. The mean is the paper's accuracy.",
    ),
    "binary_question": Protocol(
        "binary_question_v1.txt",
        (0, 1),
        ("question", "answer", "prediction"),
        "The same with the question, as PeFoMed has it for VQA (gpt_eval/gpt_eval_medvqa.py): what "
        "an answer means depends on what was asked.",
    ),
    "pefomed5": Protocol(
        "pefomed5_v1.txt",
        (0, 1, 2, 3, 4),
        ("answer", "prediction"),
        "PeFoMed, arXiv 2401.02797: a Likert scale of five points, 0 to 4 in its code "
        "(gpt_eval/gpt_eval_iuxray.py), made for reports. The mean is its WASM, Σ k n_k / Σ n_k.",
    ),
}


# --- What is asked ---


class Prompt(NamedTuple):
    """A prompt's file: name, sha256 in hexadecimal digits, and its two parts with $names."""

    name: str
    digest: str
    system: str
    user: str


def load_prompt(name: str) -> Prompt:
    """Reads a file of prompts/: system text, a line of "=====", user text."""
    text = (PROMPTS / name).read_text("utf-8")
    system, line, user = text.partition("\n=====\n")
    if not line:
        raise ValueError(f"{PROMPTS / name} has no line of '====='; expected one between its parts.")
    return Prompt(name, hashlib.sha256(text.encode()).hexdigest(), system.strip(), user.strip())


def messages(prompt: Prompt, texts: Mapping[str, str], attempt: int = 0) -> list[dict[str, str]]:
    """The chat messages of one judgement.

    The fence's code is a digest of the prompt, the texts within the fence and the attempt. So it is
    the same whenever the same is asked, it differs from attempt to attempt (a model at temperature
    0 would repeat an unusable reply), and no text can hold it: that would take a text which holds
    its own digest.

    Args:
      prompt: a `Prompt`.
      texts: {name: text} of what the prompt shows.
      attempt: number of replies that couldn't be used.

    Returns:
      [{"role", "content"}, {"role", "content"}].
    """
    texts = {k: _sound(v) for k, v in texts.items()}
    marker = digest([prompt.digest, texts, attempt])[:24]
    # One pass: what stands in a text isn't replaced again.
    fill = {"marker": marker, **texts}
    return [
        {"role": "system", "content": string.Template(prompt.system).substitute(marker=marker)},
        {"role": "user", "content": string.Template(prompt.user).substitute(fill)},
    ]


def key_of(model: str, prompt: Prompt, texts: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """What a verdict depends on, as 64 hexadecimal digits: the cache's key."""
    return digest([model, prompt.digest, {k: _sound(v) for k, v in texts.items()}, settings])


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, in hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sound(text):
    """Without halves of surrogate pairs, which can't be sent."""
    return text.encode("utf-8", "replace").decode()


def schema(scores: Sequence[int]) -> dict:
    """`response_format` for servers that can hold a reply to a form ("structured outputs")."""
    score = {"type": "integer", "enum": list(scores)}
    form = dict(type="object", properties={"score": score}, required=["score"])
    return {
        "type": "json_schema",
        "json_schema": dict(name="verdict", strict=True, schema=form | {"additionalProperties": False}),
    }


# --- How replies are read ---


def parse(reply: str, scores: Sequence[int], cut: bool = False) -> int | None:
    """The score of a reply, or None for one that isn't a score and nothing else.

    Usable are a lone digit and a single JSON object {"score": digit} with no other key, with or
    without blanks around it; in place of bare JSON, a code fence that holds it and is the whole
    reply. All else is unusable: several scores, words around it, other keys, "1.0", "１", true, a
    score off the scale, a reply that was cut off. Whatever an answer says, no part of a reply is
    ever picked out, with one exception: what a reasoning model thinks first, up to </think>. That
    mark must stand there once, and the reply must have come to its end: a model may quote an answer
    that holds the mark and a score.

    Args:
      reply: text.
      scores: whole numbers, 0 to 9.
      cut: whether the reply ended because there was no room for more.

    Returns:
      One of scores, or None.
    """
    text = reply.strip()
    if "</think>" in text:
        thoughts, _, text = text.partition("</think>")
        if cut or "</think>" in text or "<think>" in thoughts.strip().removeprefix("<think>"):
            return None
        text = text.strip()
    if fenced := re.fullmatch(r"```(?:json)?\s*\n(\{.*\})\s*```", text, re.DOTALL):
        text = fenced[1]
    if re.fullmatch(r"[0-9]", text):
        return int(text) if int(text) in scores else None
    if len(text) > 200:  # so nothing deeply nested comes to the parser, either
        return None
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return None
    # As pairs, a key that stands there twice shows twice.
    if not (isinstance(pairs, list) and len(pairs) == 1 and isinstance(pairs[0], tuple)):
        return None
    key, value = pairs[0]
    return value if key == "score" and type(value) is int and value in scores else None
