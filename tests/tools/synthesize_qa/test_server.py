"""The server backend: what a request of a unit is, and that faults and kills neither lose a reply
nor ask for one twice."""

import collections
import hashlib
import json
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.servers import FAULTS, FakeModel, Proxy, Server, completion, name_of, send
from tools.synthesize_qa import journal, parse, run, server, sources, templates, units, write
from tools.synthesize_qa.configs import default

pytest.importorskip("openai")

ROOT = pathlib.Path(__file__).resolve().parents[3]
QUICK = dict(model="m", backoff=0.01)
CONCURRENCY = 6
TRANSPORT = tuple(f for f in FAULTS if f not in ("cut", "hostile"))


ABOUT = dict(model="m", weights="", backend="server", settings={}, seed=0, pairs=3, examples="")


def unit(caption, template="caption", number=0):
    digest = hashlib.sha256(caption.encode()).hexdigest()
    name = f"i{digest[:6]}"
    row = sources.Row(name, name, "", "train", {"caption": caption}, digest, "here")
    template = templates.load(template)
    key = units.key_of(row, template, ABOUT)
    return units.Unit(number, key, row, template, 3)


def many(n):
    return [unit(caption(i), number=i) for i in range(n)]


def caption(i):
    return f"An axial image of region {i} in colour."


def captions(path, n):
    """A table of so many."""
    path.write_text("image_id,caption\n" + "".join(f"{i},{caption(i)}\n" for i in range(n)))
    return str(path)


def name(of):
    """As servers and the proxy call what is asked about."""
    return name_of(dict(caption=of.row.fields["caption"]))


def pairs_of(texts):
    asked = dict.fromkeys(["What plane is it?", "Is it in colour?"], "Yes")
    asked["Which region is shown?"] = texts["caption"].split()[-3]
    return json.dumps({"pairs": [dict(question=q, answer=a) for q, a in asked.items()]})


def ask(path, todo, url, **kw):
    with journal.open_journal(path) as opened:
        return server.answer(todo, opened, read=parse.read_reply, base_url=url, **{**QUICK, **kw})


def records(path, todo):
    with journal.Journals([path]) as opened:
        return {name(u): opened.replies(u.key) for u in todo}


def test_a_request_and_its_record(tmp_path):
    todo = many(2)
    long = json.dumps([dict(question="q " * 3000 + "?", answer="a")])
    seen = []
    with FakeModel(lambda texts: long) as fake:
        said = ask(
            tmp_path / "j",
            todo,
            fake.url,
            settings={"temperature": 0.5, "max_tokens": 7},
            concurrency=1,
            progress=lambda *x: seen.append(x),
        )
    assert said == {"unanswered": {}, "faults": {}}
    assert seen == [(1, len(long.split()))] * 2
    first, second = fake.requests
    assert (first["temperature"], first["max_tokens"], first["model"]) == (0.5, 7, "m")
    assert first["messages"] == todo[0].messages()
    assert first["seed"] != second["seed"]
    found = records(tmp_path / "j", todo)[name(todo[0])]
    assert len(found) == 1 and found[0].keys() >= {"time", "seconds", "versions"}
    expected = dict(
        key=todo[0].key,
        score=1,
        reply=long,
        finish="stop",
        model="fake-model-1",
        problem="",
        attempt=0,
        row_id=todo[0].row.row_id,
        template="caption_v1",
        system_fingerprint=None,
    )
    assert found[0] | expected == found[0]
    assert found[0]["usage"][1] == len(long.split()) and found[0]["seconds"] > 0


def test_seeds_are_of_the_unit_and_the_attempt():
    found = {server.seed_of(s, k, a) for s in (0, 1) for k in ("k", "l") for a in (0, 1)}
    assert len(found) == 8 and all(0 <= s < 2**31 for s in found)
    assert server.seed_of(3, "k", 1) == server.seed_of(3, "k", 1)


def test_replies_are_held_to_the_templates_form_on_demand(tmp_path):
    todo = [unit("a b c"), unit("b c d", "choice")]
    with FakeModel(pairs_of) as fake:
        ask(tmp_path / "j", todo, fake.url, structured=True, concurrency=1)
        assert "response_format" in fake.requests[0]
        ask(tmp_path / "k", todo, fake.url)
        assert "response_format" not in fake.requests[-1]
    pairs, choices = (r["response_format"]["json_schema"]["schema"] for r in fake.requests[:2])
    assert shape(pairs) == {"pairs": [{"question": "string", "answer": "string"}]}
    options = dict.fromkeys("ABCD", "string")
    assert shape(choices) == {"pairs": [{"question": "string", "choices": options, "answer": [*"ABCD"]}]}


def shape(schema):
    """A JSON schema as an example; all of it is required, as "strict" asks for."""
    if schema["type"] == "array":
        return [shape(schema["items"])]
    if schema["type"] != "object":
        return schema.get("enum", schema["type"])
    assert schema["required"] == [*schema["properties"]] and not schema["additionalProperties"]
    return {name: shape(x) for name, x in schema["properties"].items()}


def test_no_seed_where_none_is_wanted(tmp_path):
    with FakeModel(pairs_of) as fake:
        ask(tmp_path / "j", many(1), fake.url, seed=None)
    assert "seed" not in fake.requests[0]


def test_an_unusable_reply_is_asked_for_once_more_with_the_reason(tmp_path):
    todo = many(2)
    with FakeModel(lambda t: "Sorry." if "region 0" in t["caption"] else pairs_of(t)) as fake:
        said = ask(tmp_path / "j", todo, fake.url, concurrency=1)
        assert said["unanswered"] == {}  # it failed, which is an answer
        assert fake.seen == {name(todo[0]): 2, name(todo[1]): 1}
        problem = parse.read_reply("Sorry.").problem
        assert fake.requests[1]["messages"] == todo[0].messages(1, problem)
        assert problem in fake.requests[1]["messages"][-1]["content"]
        assert fake.requests[0]["seed"] != fake.requests[1]["seed"]
        ask(tmp_path / "j", todo, fake.url)
        assert sum(fake.seen.values()) == 3
    found = records(tmp_path / "j", todo)[name(todo[0])]
    assert [(r["score"], r["attempt"], r["problem"]) for r in found] == [(None, 0, problem), (None, 1, problem)]


def test_the_reason_is_known_after_a_restart(tmp_path):
    (todo,) = many(1)
    with journal.open_journal(tmp_path / "j") as opened:
        opened.add(dict(key=todo.key, score=None, reply="x", usage=None, finish=None, model=None, problem="it was x"))
    with FakeModel(pairs_of) as fake:
        ask(tmp_path / "j", [todo], fake.url)
    assert [r["messages"] for r in fake.requests] == [todo.messages(1, "it was x")]


def check_proxied(log, found):
    """Whatever the faults: every reply that was delivered is kept once, in order, and nothing is
    asked about a unit that is settled."""
    delivered = collections.defaultdict(list)
    for entry in log:
        assert not units.settled(found[entry["name"]][: len(delivered[entry["name"]])])
        if entry["content"] is not None:
            delivered[entry["name"]].append(entry["content"])
    assert {k: [r["reply"] for r in rs] for k, rs in found.items()} == delivered
    assert all(units.settled(rs) for rs in found.values())


def test_faults_lose_nothing_and_nothing_is_asked_twice(tmp_path):
    todo = many(60)
    with FakeModel(pairs_of) as fake, Proxy(fake.url, stall=4.5, most=5) as proxy:
        said = ask(tmp_path / "j", todo, proxy.url, timeout=4.0, concurrency=16)
    assert {e["fault"] for e in proxy.log} == {"", *FAULTS}
    assert said["unanswered"] == {} and said["faults"]["429"] > 0
    found = records(tmp_path / "j", todo)
    check_proxied(proxy.log, found)
    # A reply that was cut off still has its whole pairs.
    cut = [r for rs in found.values() for r in rs if r["finish"] == "length"]
    assert cut and {r["score"] for r in cut} <= {None, 1, 2} and any(r["score"] for r in cut)
    assert sum(len(rs) == 2 for rs in found.values()) > 0


def test_a_unit_without_a_reply_is_told_and_asked_next_time(tmp_path):
    todo = many(4)

    class Broken(Proxy):
        def _fault(self, asked):
            return ("500" if asked == name(todo[2]) else ""), 0

    with FakeModel(pairs_of) as fake:
        with Broken(fake.url) as proxy:
            said = ask(tmp_path / "j", todo, proxy.url, max_faults=3)
        assert list(said["unanswered"]) == [todo[2].key]
        assert said["unanswered"][todo[2].key].startswith("no reply in 3 tries")
        assert ask(tmp_path / "j", todo, fake.url)["unanswered"] == {}
    assert fake.seen == {name(u): 1 for u in todo}


@pytest.mark.parametrize("odd", [7, ["x"], {"a": 1}, "f" * 500, None])
def test_a_servers_fingerprint_is_kept_if_it_is_one(tmp_path, odd):
    class Odd(Server):
        def respond(self, handler, body):
            reply = completion(pairs_of(dict(caption="1 2 3 4 5 6")), (1, 1)) | {"system_fingerprint": odd}
            send(handler, 200, json.dumps(reply).encode())

    todo = many(1)
    with Odd() as fake:
        ask(tmp_path / "j", todo, fake.url)
    (found,) = records(tmp_path / "j", todo)[name(todo[0])]
    assert found["system_fingerprint"] == (odd[:200] if isinstance(odd, str) else None)


REFUSED = (
    "This model's maximum context length is 4096 tokens. However, you requested 9000 tokens.",
    "The decoder prompt (length 9000) is longer than the maximum model length of 4096.",
    "the request exceeds the available context size (4096 tokens), try increasing it",
    "the prompt is too long: 9000, model maximum length: 4096",
    "`inputs` must have less than 4095 tokens. Given: 9000",
)


class Narrow(FakeModel):
    """Has no room for region 0, nor 1, …, 6, and says so at once."""

    says, status = REFUSED[0], 400

    def respond(self, handler, body):
        if re.search("region [0-6] ", json.loads(body)["messages"][-1]["content"]):
            with self.lock:
                self.seen["refused"] = self.seen.get("refused", 0) + 1
            send(handler, self.status, json.dumps({"error": {"message": self.says}}).encode())
        else:
            super().respond(handler, body)


@pytest.mark.parametrize("says", REFUSED)
def test_a_prompt_too_long_for_the_server_is_never_asked_again(tmp_path, says):
    """Refusals come long before the first reply: even seven of them don't end the run."""
    todo, seen = many(9), []
    with Narrow(pairs_of, delay=0.3) as fake:
        fake.says = says
        said = ask(tmp_path / "j", todo, fake.url, concurrency=9, progress=lambda *x: seen.append(x))
        assert said["unanswered"] == {} and len(seen) == 9
        ask(tmp_path / "j", todo, fake.url)
        assert fake.seen.pop("refused") == 7 and set(fake.seen.values()) == {1}
    found = records(tmp_path / "j", todo)
    assert all(units.settled(x) for x in found.values())
    (record,) = found[name(todo[0])]
    assert record["finish"] == units.TOO_LONG and record["usage"] == [0, 0] and not record["score"]
    assert says[:40] in record["problem"] and record["row_id"] == todo[0].row.row_id


def test_a_server_without_room_for_any_prompt_settles_none(tmp_path):
    """A server with too small a context is the server's fault, not the prompts'."""
    todo = many(7)
    with Narrow(pairs_of) as fake:
        for _ in range(2):
            with pytest.raises(server.ServerError, match="every request is refused.*4096") as e:
                ask(tmp_path / "j", todo, fake.url)
            assert ".." not in str(e.value)
        assert fake.seen["refused"] == 14 and (tmp_path / "j").stat().st_size == 0
        # Another refusal is no matter of length.
        fake.says = "max_tokens is too large: 100000"
        with pytest.raises(server.ServerError, match="too large"):
            ask(tmp_path / "j", todo, fake.url, concurrency=1)
        assert fake.seen["refused"] == 19


def test_units_without_a_reply_are_counted(tmp_path, capsys):
    inputs, output = captions(tmp_path / "captions.csv", 9), tmp_path / "qa.jsonl"
    with FakeModel(pairs_of) as fake:
        synthesize(inputs, output, fake.url, rows=dict(max_rows=1))
    capsys.readouterr()
    with Narrow(pairs_of) as fake:
        fake.says = "I don't like it"
        report = synthesize(inputs, output, fake.url)
    assert report["units"]["waiting"] == 6
    told = capsys.readouterr().err
    assert "6 units are without a reply: " in told and told.count("I don't like it") == 5


def test_a_mistaken_name_of_the_model_can_be_mended(tmp_path):
    """What a run is stands written only once it had a reply."""
    inputs, output = captions(tmp_path / "captions.csv", 3), tmp_path / "qa.jsonl"

    class Named(FakeModel):
        def respond(self, handler, body):
            if json.loads(body)["model"] == "m":
                super().respond(handler, body)
            else:
                send(handler, 404, b'{"error": {"message": "no such model"}}')

    with Named(pairs_of) as fake:
        with pytest.raises(server.ServerError, match="no such model"):
            synthesize(inputs, output, fake.url, model="n")
        assert (tmp_path / "qa.run.json").exists()
        synthesize(inputs, output, fake.url)
        with pytest.raises(ValueError, match="model was 'm' and is 'n' now"):
            synthesize(inputs, output, fake.url, model="n")


def test_a_server_that_will_not_work_ends_the_run_with_a_sentence(tmp_path):
    with pytest.raises(server.ServerError, match="127.0.0.1:9/v1: it can't be reached"):
        ask(tmp_path / "j", many(9), "http://127.0.0.1:9/v1", concurrency=2)
    with pytest.raises(ValueError, match="settings has 'n'"):
        ask(tmp_path / "j", many(1), "http://127.0.0.1:9/v1", settings={"n": 2})


# --- Being stopped ---


def synthesize(inputs, output, url, **kw):
    """The whole program, but for its flags."""
    config = json.loads(json.dumps(default.get_config().to_dict()))
    ask_by = dict(base_url=url, timeout=1.5, concurrency=CONCURRENCY, backoff=0.01)
    decoding = dict(max_new_tokens=100, temperature=0.0)
    kw = dict(pairs=3, backend="server", model="m", decoding=decoding, server=ask_by) | kw
    return run.run([inputs], output, config, **kw)


def outputs(output):
    paths = write.paths_of(output)
    return [p.read_bytes() for p in (paths.output, paths.drops, paths.failed)]


@pytest.mark.parametrize("kills", [(15,), pytest.param((5, 14, 24), marks=pytest.mark.slow)])
def test_killed_and_resumed(tmp_path, kills):
    """SIGKILL amid faults: in the end each unit was answered once, the files are those of an
    undisturbed run, and only what was under way at a kill was asked for again."""
    n = 36
    inputs = captions(tmp_path / "captions.csv", n)
    output, whole = tmp_path / "qa.jsonl", tmp_path / "whole.jsonl"
    kept_in = tmp_path / "qa.journal"
    with FakeModel(pairs_of, delay=0.03) as fake:
        with Proxy(fake.url, faults=TRANSPORT, share=0.4, stall=0.8) as proxy:
            code = (
                "from tests.tools.synthesize_qa.test_server import synthesize; "
                f"synthesize({inputs!r}, {str(output)!r}, {proxy.url!r})"
            )
            for kept in kills:
                command = [sys.executable, "-c", code]
                killed = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
                end = time.monotonic() + 60
                while not lines(kept_in) >= kept:
                    assert killed.poll() is None and time.monotonic() < end, killed.communicate()[1]
                    time.sleep(0.01)
                killed.send_signal(signal.SIGKILL)
                killed.communicate()
            time.sleep(0.9)  # what was under way has come in, to nobody
            assert kept <= lines(kept_in) < n and not output.exists()
            done = {json.loads(line)["row_id"] for line in kept_in.read_text().splitlines()}
            with open(kept_in, "ab") as f:
                f.write(b'{"key": "cut o')
            before = dict(fake.seen)
            synthesize(inputs, output, proxy.url)
            done = [name_of(dict(caption=caption(int(x)))) for x in done]
            assert [fake.seen[x] for x in done] == [before[x] for x in done]
            # Past the proxy's own losses (half bodies), at most what was under way at the kills.
            lost = sum(e["fault"] in ("half_body", "half_json") for e in proxy.log)
        assert n <= sum(fake.seen.values()) <= n + lost + len(kills) * CONCURRENCY
        synthesize(inputs, whole, fake.url)
    assert lines(kept_in) == n and outputs(output) == outputs(whole)
    assert lines(output) > n


def test_shards_merge_into_what_one_run_makes(tmp_path):
    inputs = captions(tmp_path / "captions.csv", 10)
    whole, shards = tmp_path / "whole.jsonl", tmp_path / "shards.jsonl"
    with FakeModel(pairs_of) as fake:
        synthesize(inputs, whole, fake.url)
        for i in (2, 0, 1):
            with pytest.raises(ValueError, match="is missing|there is no"):
                synthesize(inputs, shards, fake.url, merge=True)
            assert synthesize(inputs, shards, fake.url, shard=(i, 3)) is None
        assert set(fake.seen.values()) == {2}  # once each in both
    synthesize(inputs, shards, "http://127.0.0.1:9/v1", merge=True)
    assert outputs(shards) == outputs(whole)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0
