"""The client: faults of servers, when it asks again, when it stops, and that the key is in no file."""

import asyncio
import json
import time

import numpy as np
import pytest

from paligemma_med.judge import figures, judge
from paligemma_med.judge import server as server_lib
from tests.judge import judge_servers
from tests.judge.judge_servers import FakeJudge
from tests.judge.judging import Replies, ask, good, many_rows, row, write_rows

pytest.importorskip("openai")


def test_nobody_asks_before_the_server_wants_it(tmp_path):
    def rule(handler, n):
        if n == 1:
            judge_servers.send(handler, 429, b"{}", {"Retry-After": "1"})
        else:
            good(handler)

    with Replies(rule) as server:
        ask(server, tmp_path, many_rows(4), concurrency=1)
    assert server.times[1] - server.times[0] >= 0.99
    assert server.times[-1] - server.times[1] < 0.5


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after-ms": "250"}, 0.25),
        ({}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
        ({"retry-after-ms": "-5"}, 0),
        ({"retry-after-ms": "inf"}, None),
        ({"retry-after": "1.2.3"}, None),
    ],
)
def test_retry_after_is_read(headers, seconds):
    error = type("E", (Exception,), dict(response=type("R", (), dict(headers=headers))))()
    assert server_lib.retry_after(error) == seconds


def test_requests_keep_their_distance(tmp_path):
    with Replies(lambda handler, n: good(handler)) as server:
        ask(server, tmp_path, many_rows(5), concurrency=4, requests_per_minute=600)
    gaps = np.diff(server.times)
    assert len(server.times) == 10 and gaps.sum() >= 0.85  # nine gaps of 0.1 s


def refuse(status, **error):
    body = json.dumps({"error": {"message": "no: sk-test-0123456789, sk-tes***6789", **error}})
    return lambda handler, n: judge_servers.send(handler, status, body.encode())


@pytest.mark.parametrize(
    "rule, says, requests",
    [
        (refuse(401), "status 401", 1),
        (refuse(404), "isn't accepted: status 404", 1),
        (refuse(429, code="insufficient_quota"), "used up", 1),
        (refuse(400), "every request is refused: status 400", 5),
        (lambda h, n: judge_servers.send(h, 503, b"", {"Retry-After": "3600"}), "3600 s", 1),
    ],
)
def test_a_server_that_will_not_work_is_not_asked_on(tmp_path, rule, says, requests):
    with Replies(rule) as server, pytest.raises(server_lib.ServerError, match=says) as e:
        ask(server, tmp_path, many_rows(20), concurrency=1)
    assert len(server.times) == requests
    assert "sk-tes" not in str(e.value)


def test_a_server_that_is_not_there_is_told_soon(tmp_path):
    with pytest.raises(server_lib.ServerError, match="can't be reached"):
        ask(None, tmp_path, many_rows(20), concurrency=2)


def test_replies_under_way_at_a_stop_are_kept(tmp_path):
    """Of four requests at once one ends the run; the others' replies are on the disk all the same,
    and the next run asks for that one alone."""

    def rule(handler, n):
        if n == 1:
            judge_servers.send(handler, 401, b"{}")
        else:
            time.sleep(0.3)
            good(handler)

    rows = [row(i, ["lung"], answer=f"a{i}") for i in range(4)]
    with Replies(rule) as server:
        with pytest.raises(server_lib.ServerError):
            ask(server, tmp_path, rows, concurrency=4)
        n = len(server.times)
        assert n > 1
        found, _ = ask(server, tmp_path, rows)
    assert len(server.times) == 5
    assert [x["scores"] for x in found] == [[1]] * 4


def test_one_refused_text_stays_unjudged(tmp_path):
    """A filter that refuses a text doesn't end the run, and says why."""

    class Filter(FakeJudge):
        def respond(self, handler, body):
            if b"blood" in body:
                refuse(400)(handler, 0)
            else:
                super().respond(handler, body)

    rows = [row(i, [p]) for i, p in enumerate(["lung", "blood", "no"])]
    with Filter() as server:
        found, _ = ask(server, tmp_path, rows, concurrency=1)
    assert [x["scores"] for x in found] == [[1], [None], [0]]
    assert found[1]["unjudged"]["0"].startswith("refused: status 400")


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": -1, "completion_tokens": 1}, "7"])
def test_tokens_that_the_server_does_not_tell_are_not_made_up(tmp_path, usage):
    with Replies(lambda handler, n: good(handler, usage=usage)) as server:
        _, about = ask(server, tmp_path)
    assert (about["tokens"]["without_usage"], about["tokens"]["prompt_tokens"]) == (1, 0)
    assert figures.cost(about["tokens"], 1.0, 1.0) is None


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"7",
        b'"x"',
        b"{}",
        b'{"choices": []}',
        b'{"choices": null}',
        b"\xff",
        b'{"choices": [{"message": null}]}',
        b'{"choices": [{"message": {"content": 1}}]}',
        b'{"choices": [{"message": {"content": [1]}}]}',
        b'{"choices": [{"message": {"content": [{"type": "text"}]}}]}',
        b'{"choices": [{"message": {"content": [{"type": "text", "text": 1}]}}]}',
        b'{"choices": {"message": {"content": "1"}}}',
        b'{"usage": {"prompt_tokens": ' + b"9" * 6000 + b"}}",
        b'{"choices": [{}]}',
        b'{"choices": 3}',
        b"[" * 5000,
    ],
)
def test_a_body_that_is_no_completion_is_a_fault(tmp_path, body):
    def rule(handler, n):
        good(handler) if n > 1 else judge_servers.send(handler, 200, body)

    with Replies(rule) as server:
        found, about = ask(server, tmp_path)
    assert found[0]["scores"] == [1]
    assert about["tokens"]["replies"] == 1 and sum(about["faults"].values()) == 1


@pytest.mark.parametrize(
    "content, score",
    [
        ([{"type": "text", "text": '{"score": 1}'}], 1),
        ([{"type": "text", "text": '{"sco'}, {"type": "text", "text": 're": 0}'}], 0),
        (['{"score": ', "1}"], 1),
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "1"}]}, {"type": "text", "text": "0"}], 0),
        ([{"type": "reasoning", "text": "1"}, {"type": "output_text", "text": "0"}], 0),
        ([{"type": "text", "text": "1"}, {"type": "text", "text": "0"}], None),
        ([], None),
        ([{"type": "refusal", "refusal": "no"}], None),
        (None, None),
    ],
)
def test_the_parts_of_a_reply_are_joined(tmp_path, content, score):
    choice = dict(index=0, message=dict(role="assistant", content=content), finish_reason="stop")
    with Replies(lambda handler, n: good(handler, choices=[choice])) as server:
        found, about = ask(server, tmp_path, max_replies=1)
    assert found[0]["scores"] == [score] and about["tokens"]["replies"] == 1


def test_of_a_long_reply_its_beginning_and_end_are_kept(tmp_path):
    reply = f"<think>{'a' * 3000}</think>" + '{"score": 1}'
    choice = dict(index=0, message=dict(role="assistant", content=reply), finish_reason="stop")
    with Replies(lambda handler, n: good(handler, choices=[choice])) as server:
        found, _ = ask(server, tmp_path)
    kept = json.loads((tmp_path / "cache").read_text())["reply"]
    assert found[0]["scores"] == [1] and len(kept) < 2100
    assert kept.startswith("<think>aaa") and kept.endswith('aaa</think>{"score": 1}')


def test_the_key_is_in_no_file_and_no_log(tmp_path, monkeypatch, caplog):
    """Not even where a server repeats it in what it says."""
    key = "sk-very-secret-key"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    caplog.set_level("DEBUG")
    folder = write_rows(tmp_path / "eval", [row(0, ["lung"]), row(1, ["no"], answer="x")])

    class Parrot(FakeJudge):
        def respond(self, handler, body):
            if handler.headers["Authorization"] and b"lung" in body:
                refuse(400, code=key)(handler, 0)
            else:
                super().respond(handler, body)

    with Parrot(lambda texts: f"Your key is {key}.") as server:
        judge.judge_folder(folder, "binary", model="m", base_url=server.url, max_replies=1)
        assert server.keys == [f"Bearer {key}"]
    files = [p.read_text("utf-8") for p in folder.iterdir()]
    assert any("[key]" in text for text in files)
    assert not any("very-secret" in text for text in [*files, caplog.text])


@pytest.mark.parametrize(
    "base_url, says",
    [
        ("https://api.openai.com/v1", "OPENAI_API_KEY is not set"),
        ("https://elsewhere.org/v1", "expected a key for elsewhere.org"),
        ("127.0.0.1:8000/v1", "expected http"),
        ("http://me:pw@127.0.0.1/v1", "holds a password"),
    ],
)
def test_which_servers_need_a_key(monkeypatch, base_url, says):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for local in ("http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:1/v1"):
        assert server_lib.find_key(local)
    with pytest.raises(ValueError, match=says) as e:
        server_lib.find_key(base_url)
    assert "pw" not in str(e.value).replace("password", "")


def test_it_runs_where_a_loop_runs(tmp_path):
    """As in a notebook."""

    async def cell():
        with FakeJudge() as server:
            return ask(server, tmp_path)

    assert asyncio.run(cell())[0][0]["scores"] == [1]
