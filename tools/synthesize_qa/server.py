"""The server backend: any OpenAI-compatible server answers units, many of them at a time.

vLLM, Ollama, llama.cpp, or a service: the way to use several GPUs, and models that don't fit here.
`judge.client` handles faults, limits and keys; this file makes the requests of units. A unit without any
reply stays without one, and the next run asks again; one whose prompt the server rejects as too long has
failed.
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

# How servers say that a prompt is too long: OpenAI, vLLM, SGLang, llama.cpp, Ollama, TGI.
_TOO_LONG = re.compile(
    r"context[ _](?:length|size|window)|maximum (?:model|sequence|input) length|"
    r"\b(?:prompt|input|request)s?\b.{0,40}\btoo (?:long|large)|"
    r"\binputs?\b.{0,40}must (?:be|have) (?:<=|less)",
    re.IGNORECASE,
)


def seed_of(seed: int, key: str, attempt: int) -> int:
    """The seed of a request, 0 up to 2^31: different for each unit and attempt, whatever the order of
    requests."""
    text = json.dumps([seed, key, attempt]).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big") >> 1


def schema(kind: str) -> dict[str, Any]:
    """`response_format` for servers that can enforce a reply's form ("structured outputs"): the form that
    templates of this kind ask for."""

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
    """Has a server answer all units that aren't settled; each reply is written to disk when it comes.

    Args:
      units: see `units`.
      journal: see `journal`; replies are added to it.
      model: the server's name for it.
      read: `parse.read_reply`.
      settings: arguments of the requests, some of `judge_client.SETTINGS`.
      seed: each request gets a seed derived from it; None: no seed, for servers that refuse one.
      structured: ask the server to hold replies to `schema`.
      progress: called with the number of replies and of new tokens after each reply. A unit whose
        first reply can't be used is asked once more, so that there may be more replies than units.
      client: further arguments of `judge_client.ask_all`: base_url, concurrency, timeout, ….

    Returns:
      {"unanswered": {key: why} of units that aren't settled (faults; a server that refused them),
      "faults": {kind: how often}}.

    Raises:
      ServerError: further requests are pointless; replies so far are kept.
      ValueError: settings, limits or an address that can't be; no key; openai isn't installed.
    """
    units = list(units)
    open_units = {u.key: u for u in units if not units_lib.settled(journal.replies(u.key))}
    requests = _Requests(open_units, journal, read, seed=seed, structured=structured, progress=progress)
    # Includes earlier replies, so that the server is known to answer.
    asked = [u.key for u in units if u.key in open_units or journal.score(u.key) is not None]
    why, faults = judge_client.ask_all(
        {key: functools.partial(requests.messages, key) for key in asked},
        requests.score,
        journal,
        model=model,
        settings=dict(settings or {}),
        settings_of=requests.settings,
        note=requests.note,
        refusal_of=requests.refusal,
        kept_characters=None,
        max_replies=units_lib.MAX_REPLIES,
        **client,
    )
    left = {k: text for k, text in why.items() if not units_lib.settled(journal.replies(k))}
    return {"unanswered": left, "faults": dict(faults)}


class _Requests:
    """What the client needs for each unit's requests, and how replies go into the journal.

    units: {key: unit} of those that are open. The others: as for `answer`.
    """

    def __init__(self, units, journal, read, *, seed, structured, progress):
        self._units, self._journal = units, journal
        self._seed, self._structured, self._progress = seed, structured, progress
        self._versions = {"openai": _version()}
        self._last = time.monotonic()

        @functools.lru_cache(1)  # the score and the note use the same reply
        def reply_of(key, text, finish):
            return read(text, units[key].template.kind, finish == "length")

        self._reply_of = reply_of

    def messages(self, key, attempt):
        earlier = self._journal.replies(key)
        return self._units[key].messages(attempt, earlier[-1]["problem"] if earlier else "")

    def settings(self, key, attempt):
        form = {"response_format": schema(self._units[key].template.kind)} if self._structured else {}
        return form | {"seed": None if self._seed is None else seed_of(self._seed, key, attempt)}

    def score(self, key, record):
        return len(self._reply_of(key, record["reply"], record["finish"]).pairs) or None

    def note(self, key, attempt, record):
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if self._progress:
            self._progress(1, record["usage"][1] if record["usage"] else 0)
        problem = self._reply_of(key, record["reply"], record["finish"]).problem
        return self._about(key, attempt, problem, seconds)

    def refusal(self, key, attempt, status, why):
        """A record for a prompt that is too long for the model; None for any other refusal."""
        if status not in (400, 413, 422) or not _TOO_LONG.search(why):
            return None
        if self._progress:
            self._progress(1, 0)
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
        return record | self._about(key, attempt, f"the prompt has no room in the model: {why}", 0.0)

    def _about(self, key, attempt, problem, seconds):
        unit = self._units[key]
        return dict(
            problem=problem,
            attempt=attempt,
            row_id=unit.row.row_id,
            template=f"{unit.template.name}_v{unit.template.version}",
            seconds=round(seconds, 4),
            versions=self._versions,
        )


def _version():
    try:
        return importlib.metadata.version("openai")
    except importlib.metadata.PackageNotFoundError:
        return ""
