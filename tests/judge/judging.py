"""What tests of the judge share: rows of predictions, what a fake judge says of them, and a server by rule."""

import json
import time

from paligemma_med.judge import judge, replies
from tests.judge import judge_servers
from tests.judge.judge_servers import FakeJudge

QUICK = dict(model="m", api_key="sk-test-0123456789", backoff=0.01)


def row(i, predictions, answer="lung", **kw):
    return dict(
        question_id=f"q{i}",
        image_id=f"i{i // 2}",
        image_key=f"k{i // 2}",
        question="What is it?",
        answer=answer,
        answer_type="OPEN" if i % 3 else "CLOSED",
        predictions=predictions,
        **kw,
    )


def many_rows(n, samples=2):
    """n questions; answers differ, so that each question has one text to judge or two."""
    said = ["lung", "left lung", "the liver", "no", "heart and lung"]
    return [row(i, [f"{said[(i + j) % 5]} {i // 2}" for j in range(samples)], answer=f"lung {i}") for i in range(n)]


def write_rows(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (folder / "predictions.jsonl").write_text(text, encoding="utf-8")
    return folder


def scores_of(judgements):
    return {(x["question_id"], x["who"]): x["scores"] for x in judgements}


def expected(rows):
    """What FakeJudge says to each answer."""
    return {
        (r["question_id"], "model"): [
            json.loads(FakeJudge.rule(dict(reference=r["answer"], candidate=p)))["score"] for p in r["predictions"]
        ]
        for r in rows
    }


class Replies(judge_servers.Server):
    """Answers each request by what `rule` does with the handler and the number of the request."""

    def __init__(self, rule):
        super().__init__()
        self.times, self._rule = [], rule

    def respond(self, handler, body):
        with self.lock:
            self.times.append(time.monotonic())
            n = len(self.times)
        self._rule(handler, n)


def good(handler, **kw):
    reply = {**judge_servers.completion('{"score": 1}', (3, 2)), **kw}
    judge_servers.send(handler, 200, json.dumps(reply).encode())


def ask(server, tmp_path, rows=None, **kw):
    url = server.url if server else "http://127.0.0.1:9/v1"  # where nobody is
    with replies.Cache(tmp_path / "cache") as cache:
        return judge.judge(rows or [row(0, ["lung"])], "binary", cache=cache, base_url=url, **QUICK, **kw)


def lines_of(scores, who="model"):
    return [dict(question_id=f"q{i}", who=who, scores=s) for i, s in enumerate(scores)]
