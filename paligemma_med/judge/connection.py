"""The connection to a server: it goes where it was sent and nowhere else, and takes in so much and no more.

What is sent are patients' texts. So no redirect is followed, wherever it leads, and what answers in place of the server
is no reply. A reply is read up to a size and not decompressed, since a server could fill the memory either way.
"""

import importlib
from collections.abc import AsyncIterator
from typing import Any

from paligemma_med.judge import server

MOST_BYTES = 8 * 2**20  # of a reply: a long one has some hundred thousand


def open_client(base_url: str, api_key: str, timeout: float) -> Any:
    """An `openai.AsyncOpenAI` that raises `server.Redirected` and, for replies too long or compressed,
    `server.NoCompletion`; either may come as the cause of an `openai.APIConnectionError`."""
    import openai

    http = openai.DefaultAsyncHttpxClient(
        follow_redirects=False,
        headers={"Accept-Encoding": "identity"},
        event_hooks={"response": [_check]},
    )
    # The package's own retries would hide how many requests a reply took.
    return openai.AsyncOpenAI(base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0, http_client=http)


async def _check(response):
    """Called with a response whose body hasn't been read."""
    if 300 <= response.status_code < 400:
        raise server.Redirected(response.status_code, response.headers.get("location", "nowhere"))
    if response.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise server.NoCompletion("the reply is compressed, which wasn't asked for")
    response.stream = _bounded(response.stream)


def _bounded(stream):
    """A body's stream that ends in `server.NoCompletion` after MOST_BYTES."""
    # The HTTP library, which is openai's choice (httpx; from openai 3 on httpx2), wants its own kind of stream.
    library = importlib.import_module(type(stream).__module__.partition(".")[0])

    class Bounded(library.AsyncByteStream):
        async def __aiter__(self) -> AsyncIterator[bytes]:
            size = 0
            async for chunk in stream:
                size += len(chunk)
                if size > MOST_BYTES:
                    raise server.NoCompletion(f"the reply is longer than {MOST_BYTES // 2**20} MiB")
                yield chunk

        async def aclose(self) -> None:
            await stream.aclose()

    return Bounded()
