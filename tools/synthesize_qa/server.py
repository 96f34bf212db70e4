"""The server backend: any OpenAI-compatible server answers units, many of them at a time.

vLLM, Ollama, llama.cpp, or a service: the way to several GPUs and to models that don't fit here.
What is done about faults, limits and keys is `judge_client`'s; here is what a request of a unit
is. A unit whose requests find no reply at all stays without one, and the next run asks again; one
whose prompt the server finds too long has failed.
"""

import functools
import hashlib
import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from paligemma_med.judge import client as judge_client
from paligemma_med.judge.server import ServerError
from tools.synthesize_qa import units as units_lib

__all__ = ["ServerError", "answer", "schema", "seed_of"]

# How servers say that a prompt has no room: OpenAI, vLLM, SGLang, llama.cpp, Ollama, TGI.
_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|maximum (?:model|sequence|input) length|"
    r"\b(?:prompt|input|request)s?\b.{0,40}\btoo (?:long|large)|"
    r"\binputs?\b.{0,40}must (?:be|have) (?:<=|less)",
    re.IGNORECASE,
)


def seed_of(seed: int, key: str, attempt: int) -> int:
    """The seed of a request, 0 up to 2^31: another one for each unit and attempt, the same in
    whatever order they are asked."""
    text = json.dumps([seed, key, attempt]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def schema(kind: str) -> dict[str, Any]:
    """`response_format` for servers that can hold a reply to a form ("structured outputs"): the
    form that the templates of this kind ask for."""

    def form(**properties):
        return dict(type="object", properties=properties, required=list(properties), additionalProperties=False)

    text = {"type": "string"}
    if kind == "choices":
        options = form(**dict.fromkeys("ABCD", text))
        pair = form(question=text, choices=options, answer={"type": "string", "enum": list("ABCD")})
    else:
        pair = form(question=text, answer=text)
    whole = form(pairs={"type": "array", "items": pair})
    return {"type": "json_schema", "json_schema": dict(name="questions", strict=True, schema=whole)}


def answer(
    units: Iterable[units_lib.Unit],
    journal: Any,
    model: str,
    read: Callable[[str, str, bool], Any],
    *,
    settings: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    structured: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **client: Any,
) -> dict[str, Any]:
    """Has a server answer all units that aren't settled; each reply is on the disk as it comes.

    Args:
      units: see `units`.
      journal: see `journal`; replies are added to it.
      model: as the server calls it.
      read: `parse.read_reply`.
      settings: arguments of the requests, some of `judge_client.SETTINGS`.
      seed: a seed made of it goes with each request; None: none, for servers that refuse it.
      structured: ask the server to hold replies to `schema`.
      progress: called with the number of replies and of new tokens after each reply. A unit whose
        first reply can't be used is asked once more, so that there may be more replies than units.
      client: further arguments of `judge_client.ask_all`: base_url, concurrency, timeout, ….

    Returns:
      {"unanswered": {key: why} of units that aren't settled (faults; a server that refused them),
      "faults": {kind: how often}}.

    Raises:
      ServerError: there is no use in asking on; what came is kept.
      ValueError: settings, limits or an address that can't be; no key; openai isn't installed.
    """
    units = list(units)
    open_units = {u.key: u for u in units if not units_lib.settled(journal.replies(u.key))}
    versions = {"openai": _version()}
    before = time.monotonic()

    def messages(key, attempt):
        earlier = journal.replies(key)
        return open_units[key].messages(attempt, earlier[-1]["problem"] if earlier else "")

    @functools.lru_cache(1)  # the score and the note are of the same reply
    def reply_of(key, text, finish):
        return read(text, open_units[key].template.kind, finish == "length")

    def settings_of(key, attempt):
        own = {"response_format": schema(open_units[key].template.kind)} if structured else {}
        return own | {"seed": None if seed is None else seed_of(seed, key, attempt)}

    def note(key, attempt, record, completion):
        nonlocal before
        now = time.monotonic()
        seconds, before = now - before, now
        tokens = record["usage"][1] if record["usage"] else 0
        if progress:
            progress(1, tokens)
        said = getattr(completion, "system_fingerprint", None)
        problem = reply_of(key, record["reply"], record["finish"]).problem
        return about(key, attempt, problem, seconds) | dict(
            system_fingerprint=said[:200] if isinstance(said, str) else None
        )

    def refusal_of(key, attempt, status, why):
        if status not in (400, 413, 422) or not _TOO_LONG.search(why):
            return None
        if progress:
            progress(1, 0)
        record = dict(
            key=key,
            score=None,
            reply="",
            finish=units_lib.TOO_LONG,
            usage=[0, 0],
            model=None,
            time=round(time.time(), 3),
            system_fingerprint=None,
        )
        return record | about(key, attempt, f"the prompt has no room in the model: {why}", 0.0)

    def about(key, attempt, problem, seconds):
        unit = open_units[key]
        return dict(
            problem=problem,
            attempt=attempt,
            row_id=unit.row.row_id,
            template=f"{unit.template.name}_v{unit.template.version}",
            seconds=round(seconds, 4),
            versions=versions,
        )

    # With those that were answered before, so that it's known that the server does answer.
    asked = [u.key for u in units if u.key in open_units or journal.score(u.key) is not None]
    why, faults = judge_client.ask_all(
        {key: functools.partial(messages, key) for key in asked},
        lambda key, r: len(reply_of(key, r["reply"], r["finish"]).pairs) or None,
        journal,
        model=model,
        settings=dict(settings or {}),
        settings_of=settings_of,
        note=note,
        refusal_of=refusal_of,
        kept_characters=None,
        max_replies=units_lib.MAX_REPLIES,
        **client,
    )
    left = {k: text for k, text in why.items() if not units_lib.settled(journal.replies(k))}
    return {"unanswered": left, "faults": dict(faults)}


def _version():
    try:
        return importlib.metadata.version("openai")
    except importlib.metadata.PackageNotFoundError:
        return ""
