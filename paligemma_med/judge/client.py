"""Asks an OpenAI-compatible server many questions, each until there is a usable reply.

No reply is lost, since each is on disk before the next step; none is paid for twice, since what is on disk
isn't asked again; nothing is made up, since a question without a usable reply stays without one. The
callers, `judge` and tools/synthesize_qa, decide what is asked and how replies are read.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from paligemma_med.judge import connection, server
from paligemma_med.judge.outside import Outside
from paligemma_med.judge.replies import Cache, is_usage
from paligemma_med.judge.server import ServerError
from paligemma_med.pp import json_text

# Arguments of chat.completions.create that a caller may set. Others would change what a reply is
# (n, stream), or carry secrets into files (extra_headers).
SETTINGS = (
    "temperature",
    "top_p",
    "max_tokens",
    "max_completion_tokens",
    "seed",
    "stop",
    "response_format",
    "reasoning_effort",
    "frequency_penalty",
    "presence_penalty",
    "extra_body",
)
KEPT_CHARACTERS = 2000  # of a judge's reply; a usable one is short
_LONGEST_BACKOFF = 60.0  # s
# After this many the server is assumed to be misconfigured or gone, and the run ends.
_REFUSED_FROM_THE_START = 5
_GIVEN_UP_IN_A_ROW = 10


def ask_all(requests, read, cache, **kw) -> tuple[dict[str, str], collections.Counter]:
    """`ask_all_async` for callers that aren't coroutines; works in notebooks, too."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(ask_all_async(requests, read, cache, **kw))
    # A loop can't wait for another in its own thread.
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(ask_all, requests, read, cache, **kw).result()


async def ask_all_async(
    requests,
    read,
    cache,
    *,
    model,
    base_url=None,
    api_key=None,
    settings=None,
    concurrency=8,
    requests_per_minute=None,
    timeout=60.0,
    max_replies=4,
    max_faults=8,
    max_wait=300.0,
    backoff=1.0,
    retry_unusable=False,
    progress=None,
    settings_of=None,
    note=None,
    refusal_of=None,
    kept_characters=KEPT_CHARACTERS,
) -> tuple[dict[str, str], collections.Counter]:
    """Gets a usable reply to each request that the cache has none of.

    Faults (429, 5xx, 408, 409, a connection that breaks, no reply within `timeout`, a body that is
    no chat completion, any of these in a reply of status 200) are tried again after backoff·2^k s,
    up to 60 s, times a random number from 0.5 to 1.5; where the server names a time (Retry-After),
    no request at all begins before it. A reply that `read` can't use is kept, and asked for again
    with the next attempt's messages. No redirect is followed. The key is taken out of what the
    server says before any of it is kept or shown.

    Args:
      requests: {key: function from the attempt's number, 0 up, to messages}.
      read: function from a key and its new record, "reply" whole, to a score, or None where it is
        unusable.
      cache: a `replies.Cache`.
      model: as the server calls it.
      base_url: of the server, ".../v1"; None: OPENAI_BASE_URL, or OpenAI's own.
      api_key: None: OPENAI_API_KEY. Servers on this machine need none.
      settings: arguments of the request, some of SETTINGS.
      concurrency: requests under way at a time.
      requests_per_minute: at most so many are begun; None: no limit.
      timeout: s from a request's start to its reply's last byte.
      max_replies: replies to a request, in this and earlier runs, after which it is given up if
        none was usable.
      max_faults: faults in a row after which a request is given up; a later run asks again.
      max_wait: s that a Retry-After may ask for; a longer one ends the run.
      backoff: s before the second try.
      retry_unusable: count replies of this run alone, so that what was given up is asked again.
      progress: called with the number of requests to settle, after each that is settled.
      settings_of: function from key and attempt to settings of one request, on top of `settings`.
      note: function from key, attempt and the record to what else the record is to hold.
      refusal_of: function from key, attempt, HTTP status and the server's words to a record for the
        cache, where a refusal is about this one request and final, else None. Kept as soon as the
        server has replied to anything: one that refuses all is set up wrongly.
      kept_characters: of a reply, from its beginning and its end; None: all.

    Returns:
      ({key: why it has no score}, Counter of faults by kind).

    Raises:
      ServerError: the server refuses key, model or account, or the first five requests; can't be
        reached at all; leaves ten requests in a row without a reply; asks for too long a wait.
        What was received is kept.
      ValueError: settings or limits that can't be, no key, openai isn't installed.
    """
    openai = _import_openai()
    settings = check_settings(settings or {})
    _check_limits(concurrency, requests_per_minute, timeout, max_replies, max_faults)
    base_url = server.server_of(base_url)
    api_key = server.find_key(base_url, api_key)

    async def send(messages, own):
        async with asyncio.timeout(timeout):
            create = client.chat.completions.with_raw_response.create
            return (await create(model=model, messages=messages, **settings | own)).http_response

    asking = _Asking(
        requests=requests,
        read=read,
        cache=cache,
        send=send,
        openai=openai,
        outside=Outside(api_key),
        gap=60.0 / requests_per_minute if requests_per_minute else 0.0,
        concurrency=concurrency,
        max_replies=max_replies,
        max_faults=max_faults,
        max_wait=max_wait,
        backoff=backoff,
        retry_unusable=retry_unusable,
        progress=progress,
        settings_of=settings_of,
        note=note,
        refusal_of=refusal_of,
        kept_characters=kept_characters,
    )
    async with connection.open_client(base_url, api_key, timeout) as client:
        await asking.run()
    if asking.stop:
        raise ServerError(f"{base_url}: {asking.stop.rstrip('.')}.")
    return asking.unjudged, asking.faults


@dataclasses.dataclass(kw_only=True)
class _Asking:
    """Workers that settle requests one after another, and know of each other's faults.

    send: coroutine from messages and settings to the server's response. outside: what its texts go
    through. gap: s between the starts of two requests. The others: as for `ask_all_async`.
    """

    requests: Mapping[str, Callable[[int], list]]
    read: Callable[[str, dict], int | None]
    cache: Cache
    send: Callable
    openai: Any
    outside: Outside
    gap: float
    concurrency: int
    max_replies: int
    max_faults: int
    max_wait: float
    backoff: float
    retry_unusable: bool
    progress: Callable[[int], None] | None
    settings_of: Callable[[str, int], dict] | None
    note: Callable[[str, int, dict], dict] | None
    refusal_of: Callable[[str, int, int, str], dict | None] | None
    kept_characters: int | None

    unjudged: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    stop: str = ""  # why nobody should ask any more

    def __post_init__(self):
        self._replies = sum(map(self.cache.count, self.requests))  # in this and earlier runs
        self._refused = self._unreachable = 0
        self._given_up = 0  # since the last reply
        self._final = []  # records of `refusal_of` that aren't kept yet
        self._next_start = 0.0

    async def run(self) -> None:
        """Settles all requests; at a stop, waits for replies under way, since they are paid for."""
        missing = [key for key in self.requests if self.cache.score(key) is None]
        pending = iter(missing)  # one iterator for all workers

        async def worker():
            for key in pending:
                await self._settle(key)
                if self.stop:
                    return
                if self.progress:
                    self.progress(len(missing))

        await asyncio.gather(*(worker() for _ in range(self.concurrency)))
        if self._final:
            self.stop = self.stop or f"every request is refused: {self.unjudged[self._final[0]['key']]}"

    async def _settle(self, key):
        before = self.cache.count(key) if self.retry_unusable else 0
        in_a_row = 0
        while (attempt := self.cache.count(key)) < before + self.max_replies:
            await self._turn()
            if self.stop:
                return
            messages = self.requests[key](attempt)
            own = check_settings(self.settings_of(key, attempt)) if self.settings_of else {}
            try:
                record = _record(key, await self.send(messages, own), self.outside)
            except (*server.FAULTS, self.openai.APIError) as fault:
                e = server.unwrapped(fault)
                in_a_row += 1
                if self._is_settled_by(e, key, attempt, in_a_row):
                    return
                self._hold(server.retry_after(e) or 0.0)
                seconds = min(_LONGEST_BACKOFF, self.backoff * 2 ** (in_a_row - 1))
                await self._sleep(seconds * random.uniform(0.5, 1.5))
                continue
            in_a_row = 0
            if self._keep(key, attempt, record) is not None:
                return
        self.unjudged[key] = f"no usable reply in {attempt}"

    def _keep(self, key, attempt, record):
        """Puts a reply on the disk; its score, or None."""
        self._given_up = 0
        self._replies += 1
        self._keep_final()
        record["score"] = score = self.read(key, record)
        note = self.note(key, attempt, record) if self.note else {}
        self.cache.add(record | {"reply": _shortened(record["reply"], self.kept_characters)} | note)
        return score

    def _is_settled_by(self, e, key, attempt, in_a_row) -> bool:
        """Whether this fault is the last of a request, or of the run; if so, says why."""
        kind, why = server.kind(e), server.sentence(e, self.outside)
        self.faults[kind] += 1
        if ends := server.ends_the_run(e, self.max_wait):
            self.stop = self.stop or f"{ends}: {why}"
            return True
        if server.refuses(e):
            self._refuse(key, attempt, e.status_code, why)
            return True
        self._unreachable += kind == "connection"
        if not self._replies and self._unreachable >= 3 * self.concurrency:
            self.stop = f"it can't be reached: {why}"
            return True
        if in_a_row >= self.max_faults:
            self.unjudged[key] = f"no reply in {in_a_row} tries, the last: {why}"
            self._given_up += 1
            if self._given_up >= _GIVEN_UP_IN_A_ROW:
                self.stop = f"ten requests in a row got no reply, the last: {why}"
            return True
        return False

    def _refuse(self, key, attempt, status, why):
        """Takes note of a refusal that would be the same next time."""
        self.unjudged[key] = f"refused: {why}"
        if self.refusal_of and (record := self.refusal_of(key, attempt, status, why)):
            self._final.append(record)
            self._keep_final()
            return
        self._refused += 1
        if not self._replies and self._refused >= _REFUSED_FROM_THE_START:
            self.stop = f"every request is refused: {why}"

    def _keep_final(self):
        if self._final and self._replies:
            self.cache.add_many(self._final)
            self._final.clear()

    # --- When the next request may begin ---

    async def _turn(self):
        # Looked at again after each sleep: another may have taken the turn, or the server held all.
        while (wait := self._next_start - time.monotonic()) > 0 and not self.stop:
            await self._sleep(wait)
        self._next_start = max(self._next_start, time.monotonic()) + self.gap

    def _hold(self, seconds):
        self._next_start = max(self._next_start, time.monotonic() + seconds)

    async def _sleep(self, seconds):
        """Sleeps, but no longer than there is something to wait for."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and not self.stop:
            await asyncio.sleep(min(left, 0.5))


def _record(key, response, outside):
    """A reply as a line of the cache, without its score. A server can send anything."""
    body = json_text.parse(
        response.content, "the body", "a chat completion", constants=True, halves=True, error=server.NoCompletion
    )
    server.raise_error_in(body, response)
    try:
        choice = body["choices"][0]
        reply = _text(choice["message"].get("content"))
    except (AttributeError, TypeError, IndexError, KeyError):
        raise server.NoCompletion("the body is no chat completion") from None
    usage = body.get("usage")
    usage = [usage.get(k) if isinstance(usage, dict) else None for k in ("prompt_tokens", "completion_tokens")]

    def line(value, most):
        return outside.line(value, most) if isinstance(value, str) else None

    return dict(
        key=key,
        score=None,
        reply=outside.content(reply),
        finish=line(choice.get("finish_reason"), 40),
        usage=usage if is_usage(usage) else None,
        model=line(body.get("model"), 200),
        system_fingerprint=line(body.get("system_fingerprint"), 200),
        time=round(time.time(), 3),
    )


def _text(content):
    """A message's text: a string, or parts, of which those of text are joined and others (what the model thought) left
    out. A refusal or a call of a tool has none; it was paid for all the same."""
    if isinstance(content, list):
        parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        content = "".join(part["text"] for part in parts if part.get("type") in ("text", "output_text"))
    if not isinstance(content, str | None):
        raise TypeError
    return (content or "").encode("utf-8", "replace").decode()


def _shortened(text, most):
    """The beginning and the end of a text that is longer than `most`; None: it stays whole."""
    if most is None or len(text) <= most:
        return text
    return f"{text[: most // 2]} […] {text[len(text) - most // 2 :]}"


# --- Checks ---


def _import_openai():
    try:
        import openai
    except ImportError:
        raise ValueError("servers are asked through the openai package: pip install 'paligemma_med[judge]'.") from None
    return openai


def check_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, without those that are None; ValueError names one that isn't known."""
    if unknown := sorted(set(settings) - set(SETTINGS)):
        raise ValueError(f"settings has {unknown[0]!r}; expected some of {', '.join(SETTINGS)}.")
    return {k: v for k, v in settings.items() if v is not None}


def _check_limits(concurrency, requests_per_minute, timeout, max_replies, max_faults):
    for name, value in (
        ("concurrency", concurrency),
        ("max_replies", max_replies),
        ("max_faults", max_faults),
    ):
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} is {value!r}; expected a whole number, 1 or more.")
    for name, value in (("requests_per_minute", requests_per_minute), ("timeout", timeout)):
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}; expected a number above 0.")
