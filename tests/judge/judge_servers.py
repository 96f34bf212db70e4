"""The servers of `tests.servers` as the judge's tests want them: a fake judge, and a proxy whose
hostile replies hold a score somewhere.

    python -m tests.judge.judge_servers model SmolLM2-135M-Instruct.Q4_1.gguf 8001
    python -m tests.judge.judge_servers proxy http://127.0.0.1:8001/v1 8002 > proxy.jsonl
"""

import functools
import json

from tests import servers
from tests.servers import (  # noqa: F401
    FAULTS,
    RealModel,
    Server,
    completion,
    fenced,
    name_of,
    send,
    smollm2,
)

# Replies that hold a score somewhere, none of them a score and nothing else.
HOSTILE = (
    "Score: 1",
    "I would say 1.",
    '{"score": 1} {"score": 0}',
    '{"score": 1, "score": 0}',
    '{"score": "1"}',
    '{"score": true}',
    '{"score": 1.0}',
    '{"score": 7}',
    '{"verdict": 1}',
    "",
    "1\n0",
    "１",
    '[{"score": 1}]',
    "{" * 5000,
    "0/1",
)

Proxy = functools.partial(servers.Proxy, hostile=HOSTILE)


class FakeJudge(servers.FakeModel):
    """Says 1 where the candidate has the reference's first word, else 0; or what `rule` says."""

    def __init__(self, rule=None, delay=0.0):
        super().__init__(rule or self.rule, delay, "fake-judge-1")

    @staticmethod
    def rule(texts):
        good = texts["reference"].split()[0].lower() in texts["candidate"].lower().split()
        return json.dumps({"score": int(good)})


if __name__ == "__main__":
    servers.main(Proxy)
