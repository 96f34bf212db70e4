"""The key that is sent to a server, and passwords in addresses, appear in no file and no message, whatever it says."""

import json
import string
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.judge import judge, outside
from paligemma_med.judge import server as server_lib
from tests.judge.judging import Replies, row, write_rows
from tests.servers import completion, send
from tests.tools.synthesize_qa.test_server import captions, synthesize

pytest.importorskip("openai")

KEY = "test-SECRETKEY-abcdefghijklmnopqrstuvwxyz-0123456789"
LETTERS = string.ascii_letters + string.digits + "-_"


def leaked(text, key=KEY):
    """Parts of the key, of eight characters, that stand in a text in either case."""
    parts = {key[i : i + 8].lower() for i in range(len(key) - 7)}
    return sorted(part for part in parts if part in text.lower())


@given(st.text(LETTERS, min_size=9, max_size=60), st.data())
def test_no_part_of_a_key_gets_through(key, data):
    start = data.draw(st.integers(0, len(key) - 8))
    part = key[start : data.draw(st.integers(start + 8, len(key)))]
    shown = data.draw(st.sampled_from([part, part.upper(), part * 3, f"{part} {part[::-1]}"]))
    text = data.draw(st.text(max_size=400)) + shown + data.draw(st.text(max_size=400))
    clean = outside.Outside(key)
    for out in (clean.content(text), clean.line(text), clean.line(text, 40)):
        assert not leaked(out, key)
    assert len(clean.line(text, 40)) <= 40 and clean.line(text).isprintable()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("at http://me:pa55@host:1/v1", "at http://[…]@host:1/v1"),
        ("http://me:p@55@host/", "http://[…]@host/"),
        ("https://host/v1#secret now", "https://host/v1#[…] now"),
        ("https://host/v1?api_key=abc&n=3", "https://host/v1?api_key=[…]&n=3"),
        ("https://host/v1?n=3&X-Amz-Signature=abc#s", "https://host/v1?n=3&X-Amz-Signature=[…]#[…]"),
        ("a@b.c, 3# and 5", "a@b.c, 3# and 5"),
        ("Incorrect: sk-proj-***abcd.", "Incorrect: [key]"),
        ("\x1b[31mred\x1b[0m\n\ud800 two", "[31mred [0m two"),
    ],
)
def test_what_is_secret_in_addresses_is_not_shown(text, shown):
    assert outside.Outside("none").line(text) == shown


@pytest.mark.parametrize("text", ["://" * 100_000, "?" * 300_000, "?key" * 80_000, "x" * 300_000, "sk-" * 100_000])
def test_long_texts_take_no_time(text):
    before = time.process_time()
    outside.Outside(KEY).line(text)
    outside.Outside(KEY).content(text)
    outside.address(text[:20_000])
    assert time.process_time() - before < 20  # squared, it would be hours


def echoes():
    """{name: (status, body)} of servers that repeat the key."""
    error = {f"cut at {n}": "x" * n + KEY for n in (225, 235, 245, 255, 262, 270, 280, 290, 299)}
    error |= {"plain": f"Incorrect API key: {KEY}", "long": KEY * 3000, "half": KEY[5:17] + " " + KEY[-9:]}
    out = {
        f"{status}, {k}": (status, {"error": {"message": v}}) for k, v in error.items() for status in (200, 400, 401)
    }
    out["code and type"] = 400, {"error": {"message": "no", "code": KEY, "type": KEY}}
    good = completion('{"score": 1}', (3, 2))
    finish = {**good["choices"][0], "finish_reason": KEY}
    out["model"] = 200, good | {"model": KEY, "system_fingerprint": f"fp_{KEY}"}
    out["model, cut"] = 200, good | {"model": "m" * 190 + KEY, "system_fingerprint": "f" * 190 + KEY}
    out["finish"] = 200, good | {"choices": [finish]}
    out["reply"] = 200, completion(f"Your key is {KEY}.", (3, 2))
    out["reply, cut"] = 200, completion("x" * 1985 + KEY, (3, 2))
    return out


@pytest.mark.parametrize("name", echoes())
def test_a_key_that_a_judge_repeats_is_in_no_file_and_no_message(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    folder, (status, body) = write_rows(tmp_path / "eval", [row(0, ["lung"])]), echoes()[name]
    said = ""
    with Replies(lambda handler, n: send(handler, status, json.dumps(body).encode())) as server:
        try:
            judge.judge_folder(
                folder, "binary", model="m", base_url=server.url, max_replies=1, max_faults=1, backoff=0.01
            )
        except server_lib.ServerError as e:
            said = str(e)
    files = "".join(p.read_text("utf-8") for p in folder.iterdir())
    assert server.times and not leaked(files + said + "".join(capsys.readouterr()))


def test_a_key_that_a_server_of_synthesis_repeats_is_in_no_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    pairs = json.dumps({"pairs": [{"question": "What is shown?", "answer": f"A key, {KEY}"}]})
    body = completion(pairs, (3, 2)) | {"model": "m" * 190 + KEY, "system_fingerprint": "f" * 190 + KEY}
    with Replies(lambda handler, n: send(handler, 200, json.dumps(body).encode())) as server:
        synthesize(captions(tmp_path / "in.csv", 2), str(tmp_path / "out" / "qa.jsonl"), server.url)
    files = [p.read_text("utf-8") for p in (tmp_path / "out").iterdir()]
    assert any("[key]" in text for text in files)
    assert not leaked("".join([*files, *capsys.readouterr()]))


@pytest.mark.parametrize(
    "url",
    [
        "http://me:pa55word@127.0.0.1/v1",
        "http://pa55word@127.0.0.1/v1",
        "me:pa55word@127.0.0.1/v1",
        "ftp://me:pa55word@127.0.0.1/v1",
        "http://127.0.0.1/v1#pa55word",
        "http://127.0.0.1/v1?key=pa55word",
        "http://127.0.0.1:x/v1",
        "http://127.0.0.1:99999/v1",
        "http://[::1/v1",
        "http:///v1",
        "127.0.0.1:8000/v1",
        "http://127.0.0.1/v1\n",
        "http://a b/v1",
    ],
)
@pytest.mark.parametrize("from_environment", [False, True])
def test_addresses_that_hold_a_secret_or_are_none_are_refused_unshown(monkeypatch, url, from_environment):
    name = "OPENAI_BASE_URL" if from_environment else "base_url"
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(ValueError, match=rf"^{name} .*; expected http\(s\)://host/v1\.$") as e:
        server_lib.server_of(None if from_environment else url)
    assert "pa55" not in str(e.value) and "\n" not in str(e.value)


ODD_KEYS = [
    (KEY + "\n", r"a line break as character 53 of 53"),
    (KEY + "\r\n", r"a line break as character 53 of 54"),
    ("\t" + KEY, "a blank as character 1"),
    (KEY[:9] + " " + KEY[9:], "a blank as character 10"),
    (KEY + "é", "no printable ASCII as character 53"),
]
NO_VARIABLE_HOLDS = [(KEY + "\ud800", "no printable ASCII"), ("\x00" + KEY, "no printable ASCII")]


@pytest.mark.parametrize(
    "variable, key, what",
    [
        *((v, *odd) for v in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "api_key") for odd in ODD_KEYS),
        *(("api_key", *odd) for odd in NO_VARIABLE_HOLDS),
    ],
)
def test_a_key_that_can_not_be_sent_is_refused_before_anything_is(tmp_path, monkeypatch, variable, key, what):
    if variable != "api_key":
        monkeypatch.setenv(variable, key)
    folder = write_rows(tmp_path / "eval", [row(0, ["lung"])])
    with Replies(lambda handler, n: None) as server, pytest.raises(ValueError, match=f"{variable} has {what}") as e:
        judge.judge_folder(
            folder, "binary", model="m", base_url=server.url, api_key=key if variable == "api_key" else None
        )
    assert not server.times and not leaked(str(e.value))
