"""Servers that send elsewhere, never end, or answer with something other than a completion."""

import ast
import gzip
import json
import pathlib

import pytest

from paligemma_med.judge import connection
from paligemma_med.judge import server as server_lib
from tests.judge.judging import Replies, ask, good, row
from tests.servers import completion, send
from tests.tools.synthesize_qa.test_server import captions, synthesize

pytest.importorskip("openai")

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "status, location",
    [
        *((status, "other") for status in (300, 301, 302, 303, 304, 307, 308)),
        *((307, location) for location in ("/v1/chat/completions", "file:///etc/passwd", "//", "", None)),
    ],
)
def test_no_redirect_is_followed_and_none_counts(tmp_path, status, location):
    """Not even where the body of the redirect is a verdict."""
    body = b"" if status == 304 else json.dumps(completion('{"score": 1}', (3, 2))).encode()
    with Replies(lambda handler, n: good(handler)) as other:
        where = f"{other.url}/chat/completions" if location == "other" else location
        headers = {} if where is None else {"Location": where}
        with Replies(lambda handler, n: send(handler, status, body, headers)) as server:
            with pytest.raises(
                server_lib.ServerError, match=f"status {status}: it redirects to .* isn't followed"
            ) as e:
                ask(server, tmp_path, concurrency=1)
    assert not other.times and len(server.times) == 1
    assert "\n" not in str(e.value) and not (tmp_path / "cache").read_bytes()


def test_synthesis_follows_no_redirect(tmp_path):
    with Replies(lambda handler, n: good(handler)) as other:
        headers = {"Location": f"{other.url}/chat/completions"}
        with Replies(lambda handler, n: send(handler, 307, b"", headers)) as server:
            with pytest.raises(server_lib.ServerError, match="isn't followed"):
                synthesize(captions(tmp_path / "in.csv", 2), str(tmp_path / "qa.jsonl"), server.url)
    assert not other.times


def flood(handler, status, announced):
    """Blanks without end; or until the client has gone."""
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(2**40)) if announced else handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    handler.server.sent = 0
    while handler.server.sent < 40 * connection.MOST_BYTES:
        handler.server.sent += handler.wfile.write(b" " * 2**20)


@pytest.mark.parametrize("status", [200, 400, 500])
@pytest.mark.parametrize("announced", [True, False])
def test_a_reply_without_end_is_cut_off(tmp_path, status, announced):
    with Replies(lambda handler, n: flood(handler, status, announced)) as server:
        found, about = ask(server, tmp_path, max_faults=1)
    assert found[0]["unjudged"]["0"] == "no reply in 1 tries, the last: the reply is longer than 8 MiB"
    assert about["faults"] == {"no completion": 1}
    assert server._server.sent < 4 * connection.MOST_BYTES  # what the sockets hold included


def test_a_long_reply_that_ends_is_read(tmp_path):
    body = json.dumps(completion('{"score": 1}', (3, 2))).encode()
    with Replies(lambda handler, n: send(handler, 200, body + b" " * (connection.MOST_BYTES - len(body)))) as server:
        assert ask(server, tmp_path)[0][0]["scores"] == [1]
    with Replies(lambda handler, n: send(handler, 200, body + b" " * connection.MOST_BYTES)) as server:
        assert ask(server, tmp_path / "b", max_faults=1)[0][0]["scores"] == [None]


def test_a_compressed_reply_is_not_unpacked(tmp_path):
    """Eight megabytes of it can be eight thousand."""
    body = gzip.compress(json.dumps(completion('{"score": 1}', (3, 2))).encode())
    with Replies(lambda handler, n: send(handler, 200, body, {"Content-Encoding": "gzip"})) as server:
        found, _ = ask(server, tmp_path, max_faults=1)
    assert found[0]["unjudged"]["0"].endswith("the reply is compressed, which wasn't asked for")


@pytest.mark.parametrize(
    "error, says, kind",
    [
        ({"code": 429, "message": "rate limit of the upstream provider"}, "status 429: rate limit of the up", "429"),
        ({"code": "429", "message": "slow"}, "status 429: slow", "429"),
        ({"code": "rate_limit_exceeded", "message": "slow"}, "status 429: slow", "429"),
        ({"status": 503, "message": "busy"}, "status 503: busy", "503"),
        ({"message": "busy"}, "busy", "no completion"),
        ("busy", "busy", "no completion"),
        (["busy", 1], "busy", "no completion"),
        ({"code": 10**200, "message": {"a": "busy"}}, "busy", "no completion"),
    ],
)
def test_an_error_in_a_reply_of_status_200_is_told_and_tried_again(tmp_path, error, says, kind):
    body = json.dumps({"error": error}).encode()
    with Replies(lambda handler, n: good(handler) if n > 2 else send(handler, 200, body)) as server:
        found, about = ask(server, tmp_path, row_of_one())
    assert found[0]["scores"] == [1] and about["faults"] == {kind: 2}
    with Replies(lambda handler, n: send(handler, 200, body)) as server:
        found, _ = ask(server, tmp_path / "b", row_of_one(), max_faults=2)
    assert says in found[0]["unjudged"]["0"]


def row_of_one():
    return [row(0, ["lung"])]


def test_a_wait_named_beside_an_error_of_status_200_is_kept(tmp_path):
    body = json.dumps({"error": {"code": 429, "message": "slow"}}).encode()

    def rule(handler, n):
        good(handler) if n > 1 else send(handler, 200, body, {"Retry-After": "0.5"})

    with Replies(rule) as server:
        ask(server, tmp_path)
    assert server.times[1] - server.times[0] >= 0.49


@pytest.mark.parametrize(
    "body, says",
    [
        ({"error": {"code": 401, "message": "no such key"}}, "isn't accepted: status 401: no such key"),
        ({"error": {"code": "insufficient_quota", "message": "pay"}}, "the account is used up: pay"),
        ({"object": "error", "code": 404, "message": "no model m"}, "isn't accepted: status 404: no model m"),
        ({"choices": [{"error": {"code": 403, "message": "no"}, "message": None}]}, "isn't accepted: status 403: no"),
    ],
)
def test_an_error_of_status_200_that_stays_ends_the_run(tmp_path, body, says):
    with Replies(lambda handler, n: send(handler, 200, json.dumps(body).encode())) as server:
        with pytest.raises(server_lib.ServerError, match=says):
            ask(server, tmp_path, concurrency=1)
    assert len(server.times) == 1


def test_nothing_else_here_opens_connections():
    """Redirects, sizes and keys are the connection's business: who asked servers another way would pass it by."""
    own = {"paligemma_med/judge/client.py", "paligemma_med/judge/connection.py"}
    own.add("paligemma_med/files.py")  # asks for this machine's name
    listens = {"paligemma_med/explain/serve.py": {"http.server", "socket"}}  # is asked, and asks nobody
    libraries = {
        "openai",
        "requests",
        "httpx",
        "httpx2",
        "urllib3",
        "aiohttp",
        "socket",
        "ftplib",
        "smtplib",
        "websockets",
    }
    for folder in ("paligemma_med", "data_prep", "tools", "configs"):
        for path in (ROOT / folder).rglob("*.py"):
            name, text = path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
            if not any(word in text for word in (*libraries, "urllib.request", "http.")):
                continue
            for node in ast.walk(ast.parse(text)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{a.name}" for a in node.names]
                found = [n for n in names if n.split(".")[0] in libraries or n.startswith(("urllib.request", "http."))]
                found = [n for n in found if n not in listens.get(name, ())]
                assert not found or name in own, f"{name} imports {found}"
