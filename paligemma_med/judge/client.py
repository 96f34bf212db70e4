"""Asks an OpenAI-compatible server many questions, each until there is a usable reply.

What it sees to: no reply is lost, since each is on the disk before the next step is taken; none is
paid for twice, since what is on the disk isn't asked again; nothing is made up, since a question
without a usable reply stays without one. What is asked and how replies are read is the caller's:
`judge`, and tools/synthesize_qa.
"""

import asyncio
import collections
import concurrent.futures
import dataclasses
import email.utils
import errno
import fcntl
import ipaddress
import json
import math
import os
import random
import re
import time
import urllib.parse

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


class ServerError(OSError):
    """The server can't be worked with: no key, no such model, no reply to anybody."""


# --- Cache ---


class Cache:
    """Every reply ever received, by key, in an append-only file of JSON lines.

    A line: key, score (None: the reply couldn't be used), reply (whole or its first characters),
    finish (why it ended), usage ([prompt, completion] tokens, or None where the server didn't say),
    model (as the server calls it), time (s since 1970), and what else the caller noted. Of several
    lines of a key the first with a score counts; each of them was paid for.

    In memory are places and scores alone, so that hundreds of thousands of long replies take some
    tens of megabytes.
    """

    def __init__(self, path, what="a judge's reply", write=True):
        """Opens or begins the file; the end of it that a crash cut off is dropped.

        Args:
          path: of the file.
          what: what a line is, in the message about one that isn't.
          write: whether to add to it. Without, the file must be there and is left as it is; others
            may read it at the same time, but none may write.

        Raises:
          ValueError: a line that isn't of this form; another process has the file; there is none.
        """
        self.path, self._places = path, {}
        if write:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        elif not os.path.isfile(path):
            raise ValueError(f"there is no {path}; expected a file of replies.")
        self._file = open(path, "a+b" if write else "rb", buffering=0)
        try:
            lock = fcntl.LOCK_EX if write else fcntl.LOCK_SH
            fcntl.flock(self._file, lock | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{path} is in use by another process; expected to be alone.") from None
        try:
            sound = self._read(what)
            if write:
                self._file.truncate(sound)
        except BaseException:
            self._file.close()
            raise

    def _read(self, what):
        """Takes in the lines; returns how many bytes of them are sound."""
        end, sound, waiting = 0, 0, []
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                if (record := _read_line(line)) is None:
                    raise ValueError(f"{self.path}, line {number}: found {line[:60]!r}; expected {what}.")
                waiting.append((record, end, len(line)))
                end += len(line)
                # Lines that were added together count together: a crash may have come between.
                if not record.get("rest"):
                    self._keep(waiting)
                    sound, waiting = end, []
        return sound

    def _keep(self, lines):
        for record, offset, length in lines:
            self._places.setdefault(record["key"], []).append((record["score"], offset, length))

    def count(self, key):
        """How many records a key has."""
        return len(self._places.get(key, ()))

    def score(self, key):
        """Its verdict, or None."""
        return next((s for s, *_ in self._places.get(key, ()) if s is not None), None)

    def replies(self, key):
        """The records of a key, in the order in which they came; read from the file."""
        fd = self._file.fileno()
        return [json.loads(os.pread(fd, n, at)) for _, at, n in self._places.get(key, ())]

    def add(self, record):
        """Appends a record; it is on the disk when this returns, or not at all (OSError)."""
        self.add_many([record])

    def add_many(self, records):
        """Appends records with one fsync; all of them are on the disk when this returns, or none.

        Each but the last has "rest", the number of those that follow: by it `Cache` knows after a
        crash that some are missing.
        """
        last = len(records) - 1
        numbered = [r if i == last else {**r, "rest": last - i} for i, r in enumerate(records)]
        lines = [(json.dumps(r) + "\n").encode() for r in numbered]
        data = b"".join(lines)
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) < len(data):  # so a full disk begins
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as e:
            self._file.truncate(size)  # half a line would spoil the next
            raise OSError(f"{self.path} can't be written: {e.strerror}.") from e
        for record, line in zip(records, lines):
            self._keep([(record, size, len(line))])
            size += len(line)

    def close(self):
        """Lets go of the file."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _read_line(line):
    """A line of the cache as a record, or None if it is of another form."""
    try:
        record = json.loads(line)
        score, usage = record["score"], record["usage"]
        # By kind: True == 1 in Python, and isn't a score.
        good = isinstance(record["key"], str) and (score is None or type(score) is int)
        good = good and isinstance(record.get("reply", ""), str)
        return record if good and _is_usage(usage) else None
    except (ValueError, TypeError, KeyError):
        return None


def totals(cache, keys):
    """What the replies to these keys took, in this and all earlier runs.

    Returns:
      {"replies", "unusable" (replies that weren't a verdict), "prompt_tokens",
      "completion_tokens", "without_usage" (replies whose tokens the server didn't tell)}.
    """
    out = dict.fromkeys(("replies", "unusable", "prompt_tokens", "completion_tokens", "without_usage"), 0)
    for record in (r for key in sorted(set(keys)) for r in cache.replies(key)):
        out["replies"] += 1
        out["unusable"] += record["score"] is None
        if record["usage"] is None:
            out["without_usage"] += 1
        else:
            out["prompt_tokens"] += record["usage"][0]
            out["completion_tokens"] += record["usage"][1]
    return out


# --- Asking ---


def ask_all(requests, read, cache, **kw):
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
):
    """Gets a usable reply to each request that the cache has none of.

    Faults (429, 5xx, 408, 409, a connection that breaks, no reply within `timeout`, a body that is
    no chat completion) are tried again after backoff·2^k s, up to 60 s, times a random number from
    0.5 to 1.5; where the server names a time (Retry-After), no request at all begins before. A
    reply that `read` can't use is kept, and asked for again with the next attempt's messages.

    Args:
      requests: {key: function from the attempt's number, 0 up, to messages}.
      read: function from a key and its new record, "reply" whole, to a score, or None where it is
        unusable.
      cache: a `Cache`.
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
      progress: called with their number after each request that is settled.
      settings_of: function from key and attempt to settings of one request, on top of `settings`.
      note: function from key, attempt, the record and the server's completion to what else the
        record is to hold.
      refusal_of: function from key, attempt, HTTP status and the server's words to a record for the
        cache, where a refusal is about this one request and final, else None. Kept as soon as the
        server has replied to anything: one that refuses all is set up wrongly.
      kept_characters: of a reply; None: all.

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
    base_url = server_of(base_url)
    api_key = find_key(base_url, api_key)
    clean = _cleaner(api_key)
    state = _State(replies=sum(map(cache.count, requests)))
    pace = _Pace(requests_per_minute, state)
    unjudged, faults = {}, collections.Counter()
    final = []  # records of `refusal_of` that aren't kept yet

    def keep_final():
        if final and state.replies:
            cache.add_many(final)
            final.clear()

    async def one(key):
        had = cache.count(key) if retry_unusable else 0
        in_a_row = 0
        while (attempt := cache.count(key)) < had + max_replies:
            await pace.turn()
            if state.stop:
                return
            messages = requests[key](attempt)
            own = check_settings(settings_of(key, attempt)) if settings_of else {}
            try:
                async with asyncio.timeout(timeout):
                    completion = await client.chat.completions.create(model=model, messages=messages, **settings | own)
                record = _record(key, completion)
            except _FAULTS + (openai.APIError,) as e:
                kind, why = _kind(e), clean(_sentence(e))
                faults[kind] += 1
                in_a_row += 1
                if ends := _ends_the_run(e, max_wait):
                    state.stop = state.stop or f"{ends}: {why}"
                    return
                if isinstance(e, openai.APIStatusError) and not _passes(e.status_code):
                    unjudged[key] = f"refused: {why}"
                    if refusal_of and (record := refusal_of(key, attempt, e.status_code, why)):
                        final.append(record)
                        keep_final()
                        return
                    state.refused += 1
                    if not state.replies and state.refused >= 5:
                        state.stop = f"every request is refused: {why}"
                    return
                state.unreachable += kind == "connection"
                if not state.replies and state.unreachable >= 3 * concurrency:
                    state.stop = f"it can't be reached: {why}"
                    return
                if in_a_row >= max_faults:
                    unjudged[key] = f"no reply in {in_a_row} tries, the last: {why}"
                    state.given_up += 1
                    if state.given_up >= 10:
                        state.stop = f"ten requests in a row got no reply, the last: {why}"
                    return
                pace.hold(_retry_after(e) or 0.0)
                seconds = min(60.0, backoff * 2 ** (in_a_row - 1))
                await _sleep(seconds * random.uniform(0.5, 1.5), state)
                continue
            in_a_row = state.given_up = 0
            state.replies += 1
            keep_final()
            record["reply"] = clean(record["reply"])
            record["score"] = score = read(key, record)
            record["reply"] = record["reply"][:kept_characters]
            cache.add(record | (note(key, attempt, record, completion) if note else {}))
            if score is not None:
                return
        unjudged[key] = f"no usable reply in {attempt}"

    async def worker():
        for key in pending:  # one iterator for all workers
            await one(key)
            if state.stop:
                return
            if progress:
                progress(len(missing))

    missing = [key for key in requests if cache.score(key) is None]
    pending = iter(missing)
    # Its own retries would hide what a reply took.
    client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0)
    async with client:
        # At a stop replies under way are waited for: they are paid for.
        await asyncio.gather(*(worker() for _ in range(concurrency)))
    if final:
        state.stop = state.stop or f"every request is refused: {unjudged[final[0]['key']]}"
    if state.stop:
        raise ServerError(f"{base_url}: {state.stop.rstrip('.')}.")
    return unjudged, faults


@dataclasses.dataclass
class _State:
    """What the workers know of each other."""

    replies: int  # in this and earlier runs
    refused: int = 0
    unreachable: int = 0
    given_up: int = 0  # since the last reply
    stop: str = ""  # why nobody should ask any more


class _NoCompletion(Exception):
    """A reply that isn't a chat completion."""


# Besides those of openai: its parser lets through what a body that isn't JSON raises.
_FAULTS = (TimeoutError, _NoCompletion, ValueError, RecursionError)


class _Pace:
    """When the next request may begin."""

    def __init__(self, per_minute, state):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._next, self._state = 0.0, state

    async def turn(self):
        # Again after each sleep: another may have taken the turn, or the server held all.
        while (wait := self._next - time.monotonic()) > 0 and not self._state.stop:
            await _sleep(wait, self._state)
        self._next = max(self._next, time.monotonic()) + self._gap

    def hold(self, seconds):
        self._next = max(self._next, time.monotonic() + seconds)


async def _sleep(seconds, state):
    """Sleeps, but no longer than there is something to wait for."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not state.stop:
        await asyncio.sleep(min(left, 0.5))


def _record(key, completion):
    """A reply as a line of the cache, without its score. A server can send anything."""
    try:
        choice = completion.choices[0]
        reply = choice.message.content
        if not isinstance(reply, str | None):
            raise TypeError
        # Of a refusal or a call of a tool there is no text; it was paid for all the same.
        reply = (reply or "").encode("utf-8", "replace").decode()
    except (AttributeError, TypeError, IndexError, KeyError):
        raise _NoCompletion("the body is no chat completion") from None
    usage = getattr(completion, "usage", None)
    usage = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    said = getattr(completion, "model", None)
    finish = getattr(choice, "finish_reason", None)
    return dict(
        key=key,
        score=None,
        reply=reply,
        finish=finish[:40] if isinstance(finish, str) else None,
        usage=usage if _is_usage(usage) else None,
        model=said[:200] if isinstance(said, str) else None,
        time=round(time.time(), 3),
    )


def _is_usage(x):
    return x is None or (isinstance(x, list) and len(x) == 2 and all(type(n) is int and 0 <= n < 2**40 for n in x))


def _passes(status):
    """Whether a status may be another one next time."""
    return status in (408, 409, 425, 429) or status >= 500


def _ends_the_run(e, max_wait):
    """Why it makes no sense to ask this server anything now, or ""."""
    if getattr(e, "status_code", None) in (401, 403, 404):
        return "key, address or model isn't accepted"
    if getattr(e, "code", None) == "insufficient_quota":
        return "the account is used up"
    wait = _retry_after(e)
    if wait is not None and wait > max_wait:
        return f"it asks to be left alone for {wait:.0f} s"
    return ""


def _kind(e):
    """An exception in a word, to count it by."""
    if isinstance(e, TimeoutError) or type(e).__name__ == "APITimeoutError":
        return "timeout"
    if isinstance(e, _FAULTS) or type(e).__name__ == "APIResponseValidationError":
        return "no completion"
    return str(getattr(e, "status_code", "connection"))


def _sentence(e):
    """An exception in a line, without what it quotes at length."""
    if _kind(e) == "timeout":
        return "timeout"
    status = getattr(e, "status_code", None)
    text = str(getattr(e, "message", None) or e)
    text = " ".join(text.split())[:300]
    return f"status {status}: {text}" if status else text


def _retry_after(e):
    """Seconds that the server wants to be left alone, or None where it doesn't say."""
    headers = getattr(getattr(e, "response", None), "headers", None) or {}
    found = None
    try:
        if (text := headers.get("retry-after-ms")) is not None:
            found = float(text) / 1000
        elif (text := headers.get("retry-after")) is not None:
            if re.fullmatch(r"\s*[\d.]+\s*", text):
                found = float(text)
            else:
                found = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, found) if found is not None and math.isfinite(found) else None


# --- Checks ---


def _import_openai():
    try:
        import openai
    except ImportError:
        raise ValueError("servers are asked through the openai package: pip install 'paligemma_med[judge]'.") from None
    return openai


def check_settings(settings):
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


def server_of(base_url=None):
    """The address that is asked: base_url, or OPENAI_BASE_URL, or OpenAI's own."""
    return base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"


def find_key(base_url, api_key=None):
    """The key to send: that given, or OPENAI_API_KEY, or none to a server on this machine.

    Raises:
      ValueError: no key for a server elsewhere; a base_url that is no http(s) address, or that
        holds a password, which would end up in files.
    """
    parts = urllib.parse.urlsplit(base_url)
    host = parts.hostname or ""
    if parts.username or parts.password or parts.query:
        raise ValueError("base_url holds a password or a query; expected http(s)://host/v1.")
    if parts.scheme not in ("http", "https") or not host:
        raise ValueError(f"base_url is {base_url!r}; expected http(s)://host/v1.")
    if key := api_key or os.environ.get("OPENAI_API_KEY"):
        return key
    if _is_loopback(host):
        return "none"
    raise ValueError(f"OPENAI_API_KEY is not set; expected a key for {host}.")


def _is_loopback(host):
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _cleaner(key):
    """A function that takes the key, and what looks like a part of one, out of a text."""

    def clean(text):
        text = text.replace(key, "[key]") if len(key) > 4 else text
        return re.sub(r"\bsk-[\w*.-]{4,}", "[key]", text)

    return clean
