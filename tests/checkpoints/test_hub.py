"""Models by name: in the cache alone unless --download is given, safetensors alone, and a path wins over a name."""

import http.server
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import urllib.parse

import huggingface_hub
import ml_collections
import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, forms, hf, hub, npz, workdir
from paligemma_med.config import files as config_files
from paligemma_med.training import run_files
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference
from tools import convert_checkpoint

ROOT = pathlib.Path(__file__).parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "w"
    hf.save_hf(folder, reference.reference("mqa")[3])
    return folder


@pytest.fixture
def cache(saved, tmp_path, monkeypatch):
    """A cache that holds owner/tiny, as huggingface_hub lays it out, and nothing else."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "cache" / "models--owner--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    shutil.copytree(saved, model / "blobs")
    snapshot = model / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for file in (model / "blobs").iterdir():
        (snapshot / file.name).symlink_to(file)
    return tmp_path


@pytest.mark.parametrize("spec", ["owner/tiny", "hf:owner/tiny", "hf:owner/tiny@main", f"owner/tiny@{COMMIT}"])
def test_a_name_in_the_cache_is_read(spec, cache):
    assert checkpoints.kind_of(spec) == "hf"
    assert_same(checkpoints.load_params(spec), reference.reference("mqa")[3])
    assert config_files.absolute(spec) == f"hf:owner/tiny@{COMMIT}"
    assert config_files.absolute(f"img={spec},llm={spec}") == ",".join(
        f"{p}=hf:owner/tiny@{COMMIT}" for p in ("img", "llm")
    )


def test_a_path_wins(cache):
    (cache / "owner").mkdir()
    np.savez(cache / "owner" / "tiny", x=np.ones(1))
    os.rename("owner/tiny.npz", "owner/tiny")  # of no known form
    with pytest.raises(CheckpointError, match="owner/tiny is not a form of weights"):
        checkpoints.kind_of("owner/tiny")
    assert config_files.absolute("owner/tiny") == str(cache / "owner" / "tiny")
    (cache / "owner" / "run@v1").mkdir()
    assert hub.name_of("hf:owner/tiny") and not hub.name_of("owner/tiny")
    assert hub.name_of("owner/run@v2") and not hub.name_of("owner/run@v1") and not hub.name_of("owner/tiny@3")


def test_what_is_not_there_is_a_sentence_that_names_the_flag(cache, monkeypatch):
    for spec in ("hf:owner/other", "hf:owner/tiny@v2"):
        with pytest.raises(FileNotFoundError, match=f"^{spec} isn't whole in the cache .*: --download fetches it$"):
            checkpoints.open_params(spec)
        with pytest.raises(FileNotFoundError, match="--download fetches it"):
            forms.load_adapter(spec)
        assert config_files.absolute(spec) == spec
    with pytest.raises(
        FileNotFoundError, match="^no weights at out/stage1: .*; a model of that name .* by --download$"
    ):
        checkpoints.open_params("out/stage1")
    assert config_files.absolute("out/stage1") == str(cache / "out/stage1")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(FileNotFoundError, match=r"fetches it; huggingface_hub isn't installed \(pip install"):
        checkpoints.open_params("hf:owner/tiny")
    with pytest.raises(CheckpointError, match=r"can't be fetched .*: huggingface_hub isn't installed \(pip install"):
        hub.fetch("hf:owner/tiny")


@pytest.mark.parametrize(
    "spec",
    [
        "tiny",
        "/owner/tiny",
        "./owner/tiny",
        "../owner/tiny",
        "~/owner/tiny",
        "hf:../tiny",
        "hf:owner/..",
        "owner/a..b",
        "a/b/c",
    ]
    + [
        "hf:owner/tiny@../../x",
        "hf:owner/tiny@a/../b",
        "owner/tiny:img",
        "owner/tiny.npz",
        "owner/x.safetensors",
        "hf:",
        3,
        None,
    ],
)
def test_what_is_no_name(spec):
    assert hub.parse(spec) is None


def test_a_run_stays_with_the_commit_that_it_started_from(cache):
    run = cache / "run"
    (run / "checkpoints").mkdir(parents=True)
    config = ml_collections.ConfigDict(dict(model_init="owner/tiny"))
    (run / "config.json").write_text(config_files.to_json(config))
    with workdir.Checkpoints(run) as saved:
        saved.save(1, {"img/head/bias": np.zeros(2, np.float32)}, {})
    (cache / "cache/models--owner--tiny/refs/main").write_text("f" * 40)
    assert run_files.with_pinned_init(config, str(run)).model_init == f"hf:owner/tiny@{COMMIT}"
    assert convert_checkpoint._base_of(str(run)) == "owner/tiny"
    other = ml_collections.ConfigDict(dict(model_init="owner/other"))
    assert run_files.with_pinned_init(other, str(run)).model_init == "owner/other"


def test_fetching_follows_a_run_to_what_it_started_from(cache, monkeypatch, capsys):
    asked = []

    def fake(repo, *, revision, allow_patterns, local_files_only):
        assert {*allow_patterns} == {"*.safetensors", "*.json"} and not local_files_only
        asked.append((repo, revision))
        return str(cache / "cache/models--owner--tiny/snapshots" / COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    for name, init in dict(one="hf:owner/first@v1", two=str(cache / "one"), three=str(cache / "three")).items():
        (cache / name / "checkpoints").mkdir(parents=True)
        (cache / name / "config.json").write_text(json.dumps(dict(model_init=init, adapter_init="hf:owner/adapter")))
    hub.fetch("two")
    hub.fetch("three")  # which says that it started from itself
    hub.fetch("img=owner/tower,llm=x.npz")
    assert asked == [("owner/first", "v1")] + 3 * [("owner/adapter", None)] + [("owner/tower", None)]
    assert capsys.readouterr().err.count("from the Hugging Face Hub") == 5


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as huggingface_hub asks: owner/tiny, owner/pickled, and owner/gated, which refuses."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = urllib.parse.urlsplit(self.path).path
        self.server.asked.append(path)
        files = {p.name: p.read_bytes() for p in self.server.folder.iterdir()} | {"pytorch_model.bin": b"pickle"}
        if "pickled" in path:
            files = {n: x for n, x in files.items() if n.endswith((".bin", "config.json"))}
        if "gated" in path:
            return self.reply(b"{}", 403, {"X-Error-Code": "GatedRepo"})
        if "owner/none" in path:
            return self.reply(b"{}", 404, {"X-Error-Code": "RepoNotFound"})
        if "/tree/" in path:
            tree = [dict(type="file", path=n, size=len(x), oid=f"{len(x):040x}") for n, x in files.items()]
            return self.reply(json.dumps(tree).encode())
        if path.startswith("/api/"):
            info = dict(id="owner/tiny", sha=COMMIT, siblings=[dict(rfilename=n) for n in files])
            return self.reply(json.dumps(info).encode())
        body = files[path.rpartition("/")[2]]
        return self.reply(body, headers={"X-Repo-Commit": COMMIT, "ETag": f'"{len(body):040x}"'})

    def reply(self, body, status=200, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def test_from_a_hub_to_a_file(saved, tmp_path):
    """Against a server on this machine, at last with the converter's flag; what reads asks nothing."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked, server.folder = [], saved
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= dict(
        HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", HF_HOME=str(tmp_path / "home"), HF_HUB_DISABLE_XET="1"
    )
    env |= dict(no_proxy="*", PYTHONPATH=str(ROOT))
    # In one process, since importing takes the time.
    code = """
import os, runpy, sys, urllib.request
from paligemma_med.checkpoints import forms, hub
for spec in ("owner/tiny", "owner/gated", "owner/none", "owner/pickled"):
    try:
        forms.open_params("hf:" + spec)
    except FileNotFoundError as e:
        print(e)
urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/api/now")
print("now")
for spec in ("owner/gated", "owner/none", "owner/pickled"):
    try:
        hub.fetch(spec)
    except Exception as e:
        print(type(e).__name__, e)
sys.argv = ["convert", "owner/tiny", "w.npz", "--to=npz", "--dtype=bfloat16", "--download"]
runpy.run_module("tools.convert_checkpoint", run_name="__main__", alter_sys=True)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    server.shutdown()
    assert run.returncode == 0, run.stderr
    before, _, after = run.stdout.partition("now\n")
    assert before.count("--download fetches it") == 4
    gated, none, pickled, found = after.splitlines()
    assert "owner/gated isn't here, and can't be fetched" in gated and "accept the terms on its page" in gated
    assert "no model of that name" in none and "owner/pickled has no safetensors" in pickled
    assert found == "Wrote w.npz." and server.asked[0] == "/api/now"
    npz.save_npz(tmp_path / "want.npz", reference.reference("mqa")[3], dtype="bfloat16")
    assert (tmp_path / "w.npz").read_bytes() == (tmp_path / "want.npz").read_bytes()
    assert not any(path.endswith(".bin") for path in server.asked)
