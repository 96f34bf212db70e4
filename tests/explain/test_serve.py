"""The page to ask on: who is let in, what is refused, and that asking compiles nothing; by HTTP, then in Chromium."""

import http.client
import io
import json
import logging
import signal
import subprocess
import sys
import threading
import types
import urllib.request

import jax
import numpy as np
import PIL.Image
import pytest

from configs import common
from paligemma_med import explain
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.explain import asking, serve
from paligemma_med.pp import get_preprocess_fn
from tests import chromium, environ, tiny


def png(seed=0, size=(40, 50)):
    out = io.BytesIO()
    PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    tiny.write_workdir(folder / "w", tiny.config(evals={}))
    config = config_files.from_json(workdirs.read_config(folder / "w"))
    (folder / "film.png").write_bytes(png(1))
    (folder / "keep").mkdir()
    with serve.Server(0, [("film <b>.png", str(folder / "film.png"))]) as server:
        loaded = explain.load(config, str(folder / "w"))
        server.desk = asking.Desk(loaded, keep=str(folder / "keep"), max_new_tokens=3, num_samples=0)
        server.desk.warm_up()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server, method, rest, body=None, *, token=None, headers=None):
    """(status, headers, body, parsed where it is JSON) of a request as the page makes it, changed by `headers`."""
    port = server.server_address[1]
    sent = {"Host": f"127.0.0.1:{port}", "Origin": f"http://127.0.0.1:{port}", **(headers or {})}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, f"/{server.token if token is None else token}/{rest}", skip_host=True)
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    if body is not None:
        sent.setdefault("Content-Length", str(len(body)))
    for name, value in sent.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    if reply.getheader("Content-Type", "").startswith("application/json"):
        content = json.loads(content)
    return reply.status, reply.headers, content


def test_a_question_and_its_page_compile_nothing(server):
    compiled = []

    class Heard(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                compiled.append(record.getMessage())

    handler, logger = Heard(), logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            _, _, image = ask(server, "POST", "image", png(), headers={"X-Name": "a%20film.png"})
            assert (image["name"], image["width"], image["height"]) == ("a film.png", 50, 40)
            for question in ("A?", "Which of the organs is it that is seen here?"):
                status, _, found = ask(server, "POST", "ask", dict(image=image["id"], question=question, history=True))
                assert status == 200 and len(found["tokens"]) <= 3
                status, _, made = ask(server, "POST", "page", dict(answer=found["id"]))
                assert (status, made["page"]) == (200, f"page/{found['id']}")
    finally:
        logger.removeHandler(handler)
    assert compiled == []
    status, headers, page = ask(server, "GET", made["page"], headers={"Origin": None})
    assert status == 200 and b"Which of the organs" in page
    assert headers["Content-Security-Policy"].startswith("sandbox allow-scripts")
    assert headers["Cross-Origin-Opener-Policy"] is None
    with open(f"{server.desk.keep}/{asking.LOG}", encoding="utf-8") as f:
        assert json.loads(next(f))["question"] == "A?"


def test_the_page_and_its_headers(server):
    status, headers, page = ask(server, "GET", "", headers={"Origin": None})
    assert status == 200 and b"not for diagnosis" in page and b"film &lt;b&gt;.png" in page
    assert "connect-src 'self'" in headers["Content-Security-Policy"]
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


def test_a_port_that_is_taken(server):
    port = server.server_address[1]
    with pytest.raises(ValueError, match=f"--port={port}: .*0 takes a free one"):
        serve.Server(port)


@pytest.mark.parametrize(
    "method, rest, token, headers, status",
    [
        ("GET", "", "wrong", {}, 404),
        ("GET", "", "", {}, 404),
        ("GET", "", None, {"Host": "evil.example:80", "Origin": None}, 403),
        ("GET", "", None, {"Host": "127.0.0.1.evil.example", "Origin": None}, 403),
        ("POST", "ask", None, {"Origin": "http://evil.example"}, 403),
        ("POST", "ask", None, {"Origin": None}, 403),
        ("POST", "ask", None, {"Origin": "null"}, 403),
        ("POST", "ask", None, {"Sec-Fetch-Site": "cross-site"}, 403),
        ("GET", "../../etc/passwd", None, {}, 404),
        ("GET", "page/../../etc/passwd", None, {}, 404),
        ("GET", "page/999", None, {}, 404),
        ("POST", "image", None, {"Content-Length": str(10**12)}, 413),
        ("POST", "image", None, {"Content-Length": "-1"}, 400),
        ("POST", "image", None, {"Transfer-Encoding": "chunked"}, 411),
        ("DELETE", "", None, {}, 501),
    ],
)
def test_who_and_what_is_refused(server, method, rest, token, headers, status):
    found, got, said = ask(server, method, rest, b"{}" if method == "POST" else None, token=token, headers=headers)
    assert found == status and list(said) == ["error"]
    assert "default-src 'none'" in got["Content-Security-Policy"] and server.token not in str(said)


@pytest.mark.parametrize(
    "rest, body, status, says",
    [
        ("image", b"no image", 400, "The file image: not a readable image"),
        ("example", dict(index="../film.png", show=""), 404, "no such example"),
        ("example", dict(index=-1, show=""), 404, "no such example"),
        ("example", dict(index=0, show=["frame=1"]), 400, "isn't a text"),
        ("example", dict(index=0, show="frame=2"), 400, "no frame 2; the image has 1"),
        ("example", dict(index=0, show="frame=1-1"), 400, "expected one frame"),
        ("example", dict(index=0, show="window=tongue"), 400, "expected centre and width"),
        ("example", dict(index=0, show="slice=2"), 400, "expected frame=, window="),
        ("ask", dict(image="99", question="x", history=False), 404, "no longer kept"),
        ("ask", dict(image="/etc/passwd", question="x", history=False), 404, "no longer kept"),
        ("ask", dict(path="/etc/passwd"), 400, "expected"),
        ("ask", b"{", 400, "not valid JSON"),
        ("page", dict(answer=["1"]), 404, "no longer kept"),
    ],
)
def test_bad_requests_get_one_sentence(server, rest, body, status, says):
    found, _, said = ask(server, "POST", rest, body)
    assert found == status and says in said["error"]


def test_large_images_are_refused(server, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    status, _, said = ask(server, "POST", "image", png())
    assert status == 400 and "at most 1000" in said["error"]


def test_two_at_once_and_questions_that_cannot_be_asked(server):
    _, _, image = ask(server, "POST", "example", dict(index=0, show=""))
    found = []

    def one(question):
        found.append(ask(server, "POST", "ask", dict(image=image["id"], question=question, history=False)))

    threads = [threading.Thread(target=one, args=(q,)) for q in ("One?", "Two?")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [s for s, *_ in found] == [200, 200] and {f["question"] for *_, f in found} == {"One?", "Two?"}
    for question, says in ((" ", "empty"), ("x" * 2001, "at most 2,000")):
        status, _, said = ask(server, "POST", "ask", dict(image=image["id"], question=question, history=False))
        assert status == 400 and says in said["error"]


def test_a_dialogue_is_asked_as_dialogues_are_evaluated(server):
    _, _, image = ask(server, "POST", "example", dict(index=0, show=""))
    config = types.SimpleNamespace(res=tiny.RES, tokenizer="tiny")
    section = common.dialogue_eval(config, "x", "test", text_len=tiny.TEXT_LEN, max_new_tokens=3)
    history_pp, prompt_pp = (get_preprocess_fn(section[k]) for k in ("history_pp", "prompt_pp"))
    turns, read = [], []
    for question, history in (("A?", True), ("B?", True), ("C?", False), ("D?", True)):
        _, _, found = ask(server, "POST", "ask", dict(image=image["id"], question=question, history=history))
        used = found["turns_read"]
        assert used + found["turns_left_out"] == len(turns) * history
        before = np.concatenate([np.zeros(0, np.int32), *turns[len(turns) - used :]])
        wanted = prompt_pp(dict(question=question, answer="", history=before))
        row = server.desk._asked[found["id"]].row
        for key in ("text", "mask_ar", "mask_input"):
            np.testing.assert_array_equal(row[key], wanted[key])
        with open(f"{server.desk.keep}/{asking.LOG}", encoding="utf-8") as f:
            answer = json.loads(list(f)[-1])["answer"]
        turns.append(history_pp(dict(question=question, answer=answer))["text"])
        read.append(used)
    assert read[:3] == [0, 1, 0] and read[3] >= 1


def test_the_oldest_turns_are_left_out_where_they_do_not_fit(server):
    loaded = server.desk.loaded
    row = loaded.pp({"image": np.zeros((40, 50, 3), np.uint8), "question": "A?"})
    own, turn = asking._prompt(row), np.array([7, 8, 9], np.int32)
    made, used = asking._with_history(row, [np.arange(1000), turn])
    assert used == 1 and asking._prompt(made).tolist() == [own[0], 7, 8, 9, *own[1:]]
    assert asking._with_history(row, [np.arange(1000)])[1] == 0
    assert server.desk.has_turns


@pytest.mark.slow
def test_ctrl_c_ends_it_in_one_line(tmp_path, repo_root):
    tiny.write_workdir(tmp_path / "w", tiny.config(evals={}))
    command = [sys.executable, "-m", "paligemma_med.explain", "--serve", f"--workdir={tmp_path / 'w'}", "--port=0"]
    command += ["--methods=raw", "--num_samples=0", "--max_new_tokens=2", "--compilation_cache="]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    program = subprocess.Popen(command, cwd=repo_root, env=environ.of_program(), **pipes)
    try:
        address = program.stdout.readline().removeprefix("Ready: ").strip()
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address) as reply:
            assert reply.status == 200
        program.send_signal(signal.SIGINT)
        out, err = program.communicate(timeout=60)
    finally:
        program.kill()
    assert (
        out.splitlines()[-2:] == ["", "Ended. Nothing was kept."] and program.returncode == 130
    )  # after the terminal's ^C
    assert "Traceback" not in err and address.split("/")[3] not in err


@chromium.needed
def test_in_chromium(server, tmp_path):
    """With the model behind it; `test_ask_page` has the rest."""
    with chromium.browser(tmp_path) as browser:
        browser.open(server.address)
        browser.click("#examples button")
        browser.wait("document.activeElement.id == 'question'")
        browser.write("Is this an MRI?")
        browser.key("Enter")
        browser.wait("document.querySelector('iframe')")
        assert browser.count("article .chip") >= 1 and "Without the image" in browser.text(".blank")
        with browser.inside("iframe"):
            assert browser.text("h1") == "Is this an MRI?"
        assert browser.problems == []
