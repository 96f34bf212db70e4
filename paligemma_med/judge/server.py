"""A server: its address and key, and what its faults mean."""

import email.utils
import ipaddress
import math
import os
import re
import time
import urllib.parse
from typing import Any

from paligemma_med.judge.outside import Outside


class ServerError(OSError):
    """The server can't be worked with: no key, no such model, no reply to anybody."""


# --- Its address and key ---


def server_of(base_url: str | None = None) -> str:
    """The address that is asked: base_url, or OPENAI_BASE_URL, or OpenAI's own.

    Raises:
      ValueError: it is no http(s) address; or it holds a password, a query or a fragment, which would end up in files.
    """
    name = "base_url" if base_url else "OPENAI_BASE_URL"
    url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
    if {*"@?#"} & {*url}:  # not shown, then
        raise ValueError(f"{name} holds a password, a query or a fragment; expected http(s)://host/v1.")
    try:
        parts = urllib.parse.urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url:
        raise ValueError(f"{name} is {url!r}; expected http(s)://host/v1.")
    return url


def find_key(base_url: str, api_key: str | None = None) -> str:
    """The key to send: that given, or OPENAI_API_KEY, or none to a server on this machine.

    Raises:
      ValueError: no key for a server elsewhere; a key that can't be sent, since it has a line break, say; an address
        that `server_of` refuses.
    """
    host = urllib.parse.urlsplit(server_of(base_url)).hostname
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):  # openai sends these as well
        _check_header(name, os.environ.get(name) or "")
    if key := api_key or os.environ.get("OPENAI_API_KEY"):
        _check_header("api_key" if api_key else "OPENAI_API_KEY", key)
        return key
    if is_loopback(host):
        return "none"
    raise ValueError(f"OPENAI_API_KEY is not set; expected a key for {host}.")


def _check_header(name, text):
    """Raises ValueError, which doesn't show the text, where it can't be sent in a header."""
    for i, c in enumerate(text):
        if not ("!" <= c <= "~"):
            what = "a line break" if c in "\r\n" else "a blank" if c.isspace() else "no printable ASCII"
            raise ValueError(
                f"{name} has {what} as character {i + 1} of {len(text)}; expected printable ASCII "
                "characters and no blanks."
            )


def is_loopback(host):
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- Its faults ---


class NoCompletion(Exception):
    """A reply that isn't a chat completion."""


class Redirected(NoCompletion):
    """The server sends to another address."""

    def __init__(self, status: int, location: str):
        super().__init__(f"it redirects to {location}, which isn't followed: give the address itself as base_url")
        self.status_code = status


class ErrorInReply(NoCompletion):
    """A reply of status 200 that holds an error, as gateways pass on those of the server behind them.

    Attributes:
      status_code: that of the error, or None where it isn't told; code: its word, or None; response: that of HTTP.
    """

    def __init__(self, error: Any, response: Any = None):
        error = error if isinstance(error, dict) else {"message": str(error)}
        super().__init__(str(error.get("message") or error))
        self.code, self.response = error.get("code") or error.get("type"), response
        told = [str(error.get(name)) for name in ("code", "status", "status_code")]
        status = next((int(x) for x in told if re.fullmatch("[45][0-9]{2}", x)), None)
        limited = isinstance(self.code, str) and self.code.lower().startswith(("rate_limit", "too_many"))
        self.status_code = 429 if status is None and limited else status


# Faults besides those of openai, whose parser lets through what a body that isn't JSON raises.
FAULTS = (TimeoutError, NoCompletion, ValueError, RecursionError)


def unwrapped(e: Exception) -> Exception:
    """A fault of this file that openai took for a broken connection, else the exception itself."""
    return e.__cause__ if isinstance(e.__cause__, NoCompletion) else e


def raise_error_in(body: Any, response: Any) -> None:
    """Raises ErrorInReply where a reply's JSON is an error, or its choice ended in one."""
    if not isinstance(body, dict):
        return
    if body.get("error"):
        raise ErrorInReply(body["error"], response)
    if body.get("object") == "error":  # vLLM's own form
        raise ErrorInReply(body, response)
    choices = body.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if isinstance(choice, dict) and choice.get("error"):  # OpenRouter's
        raise ErrorInReply(choice["error"], response)


def passes(status: int) -> bool:
    """Whether the same request may have another status next time."""
    return status in (408, 409, 425, 429) or status >= 500


def ends_the_run(e: Exception, max_wait: float) -> str:
    """Why it makes no sense to ask this server anything more now, or ""."""
    if isinstance(e, Redirected):
        return "it doesn't answer at this address"
    if getattr(e, "status_code", None) in (401, 403, 404):
        return "key, address or model isn't accepted"
    if getattr(e, "code", None) == "insufficient_quota":
        return "the account is used up"
    wait = retry_after(e)
    if wait is not None and wait > max_wait:
        return f"it asks to be left alone for {wait:.0f} s"
    return ""


def refuses(e: Exception) -> bool:
    """Whether the same request would be refused again."""
    status = getattr(e, "status_code", None)
    return isinstance(status, int) and status >= 300 and not passes(status)


def kind(e: Exception) -> str:
    """An exception in a word, to count it by."""
    if isinstance(e, TimeoutError) or type(e).__name__ == "APITimeoutError":
        return "timeout"
    status = getattr(e, "status_code", None)
    if status is None and isinstance(e, FAULTS) or type(e).__name__ == "APIResponseValidationError":
        return "no completion"
    return str(status or "connection")


def sentence(e: Exception, outside: Outside) -> str:
    """An exception in a line, without what it quotes at length and what is secret in it."""
    if kind(e) == "timeout":
        return "timeout"
    status = getattr(e, "status_code", None)
    text = outside.line(str(getattr(e, "message", None) or e))
    return f"status {status}: {text}" if status else text


def retry_after(e: Exception) -> float | None:
    """Seconds that the server wants to be left alone, or None where it doesn't say."""
    headers = getattr(getattr(e, "response", None), "headers", None) or {}
    seconds = None
    try:
        if (text := headers.get("retry-after-ms")) is not None:
            seconds = float(text) / 1000
        elif (text := headers.get("retry-after")) is not None:
            if re.fullmatch(r"\s*[\d.]+\s*", text):
                seconds = float(text)
            else:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds) if seconds is not None and math.isfinite(seconds) else None
