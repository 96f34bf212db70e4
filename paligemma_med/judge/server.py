"""A server: its address and key, and what its faults mean."""

import email.utils
import ipaddress
import math
import os
import re
import time
import urllib.parse
from collections.abc import Callable


class ServerError(OSError):
    """The server can't be worked with: no key, no such model, no reply to anybody."""


def server_of(base_url: str | None = None) -> str:
    """The address that is asked: base_url, or OPENAI_BASE_URL, or OpenAI's own."""
    return base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"


def find_key(base_url: str, api_key: str | None = None) -> str:
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


def cleaner(key: str) -> Callable[[str], str]:
    """A function that removes the key, and what looks like a part of one, from a text."""

    def clean(text):
        text = text.replace(key, "[key]") if len(key) > 4 else text
        return re.sub(r"\bsk-[\w*.-]{4,}", "[key]", text)

    return clean


class NoCompletion(Exception):
    """A reply that isn't a chat completion."""


# Faults besides those of openai, whose parser lets through what a body that isn't JSON raises.
FAULTS = (TimeoutError, NoCompletion, ValueError, RecursionError)


def passes(status: int) -> bool:
    """Whether the same request may have another status next time."""
    return status in (408, 409, 425, 429) or status >= 500


def ends_the_run(e: Exception, max_wait: float) -> str:
    """Why it makes no sense to ask this server anything more now, or ""."""
    if getattr(e, "status_code", None) in (401, 403, 404):
        return "key, address or model isn't accepted"
    if getattr(e, "code", None) == "insufficient_quota":
        return "the account is used up"
    wait = retry_after(e)
    if wait is not None and wait > max_wait:
        return f"it asks to be left alone for {wait:.0f} s"
    return ""


def kind(e: Exception) -> str:
    """An exception in a word, to count it by."""
    if isinstance(e, TimeoutError) or type(e).__name__ == "APITimeoutError":
        return "timeout"
    if isinstance(e, FAULTS) or type(e).__name__ == "APIResponseValidationError":
        return "no completion"
    return str(getattr(e, "status_code", "connection"))


def sentence(e: Exception) -> str:
    """An exception in a line, without what it quotes at length."""
    if kind(e) == "timeout":
        return "timeout"
    status = getattr(e, "status_code", None)
    text = str(getattr(e, "message", None) or e)
    text = " ".join(text.split())[:300]
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
