"""The command: what it asks for, writes, goes on with, joins and refuses."""

import json
import math
import subprocess
import sys

import pytest
import torch

from tests.tools.synthesize_qa import tiny_llama
from tools.synthesize_qa import __main__, journal, loading, run, write
from tools.synthesize_qa.configs import default

DECODING = dict(max_new_tokens=16, temperature=1.0, top_p=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tiny_llama.save(tmp_path_factory.mktemp("llama") / "tiny")


@pytest.fixture
def rows(tmp_path):
    return str(tiny_llama.captions(tmp_path / "c.jsonl", 10))


def go(folder, rows, output, *, config="", **kw):
    kw = {
        "model": str(folder),
        "pairs": 3,
        "decoding": dict(DECODING),
        "local": dict(dtype="float32", batch_size=4),
        **kw,
    }
    return run.run([rows], output, default.get_config(config).to_dict(), **kw)


def files(output):
    paths = write.paths_of(output)
    return [p.read_bytes() for p in (paths.output, paths.drops, paths.failed)]


def test_end_to_end(folder, rows, tmp_path):
    report = go(folder, rows, tmp_path / "out" / "qa.jsonl")
    kept = [json.loads(line) for line in open(tmp_path / "out" / "qa.jsonl")]
    assert report["pairs"]["kept"] == len(kept) > 0
    assert report["units"]["units"] == 10 and not report["units"]["waiting"]
    assert report["sources"]["splits"]["rows"]["rows_kept"] == 10
    made = kept[0]["provenance"]
    assert made["model"] == folder.name and made["weights"] == loading.fingerprint(folder)
    ran = dict(batch_size=4, batch_tokens=65_536, device="cpu", threads=torch.get_num_threads())
    assert made["ran"] == ran
    assert made["settings"]["temperature"] == 1.0 and "torch" in made["versions"]
    assert str(tmp_path) not in json.dumps(kept)  # no folders of this machine in the rows


def test_written_anew_without_the_model(folder, rows, tmp_path, monkeypatch):
    output = tmp_path / "qa.jsonl"
    go(folder, rows, output)
    before = files(output)
    monkeypatch.setattr(loading, "load", None)
    go(None, rows, output, model=None, replay=True)
    assert files(output) == before
    report = go(None, rows, output, model=None, replay=True, config="drop=no")
    assert report["pairs"]["kept"] == report["pairs"]["all"]
    with pytest.raises(ValueError, match="run.json: pairs was 3 and is 4 now"):
        go(None, rows, output, model=None, replay=True, pairs=4)
    other = tiny_llama.captions(tmp_path / "d.jsonl", 3)
    other.write_text(other.read_text().replace("img", "pic"))
    with pytest.raises(ValueError, match="no reply to any of these 3 units"):
        go(None, str(other), output, model=None, replay=True)
    with pytest.raises(ValueError, match="there is no .*other.run.json"):
        go(None, rows, tmp_path / "other.jsonl", model=None, replay=True)


def test_shards_join(folder, rows, tmp_path):
    """Each unit in one shard; what is joined has each row once, in the order of the source."""
    output = tmp_path / "qa.jsonl"
    assert go(folder, rows, output, shard=(0, 2)) is None and not output.exists()
    with pytest.raises(ValueError, match="1-of-2 is missing"):
        go(None, rows, output, model=None, merge=True)
    with pytest.raises(ValueError, match="is a shard's journal; expected --shard"):
        go(folder, rows, output)
    half = go(None, rows, output, model=None, replay=True)
    assert half["units"]["waiting"] == 5
    go(folder, rows, output, shard=(1, 2))
    parts = [{json.loads(line)["key"] for line in open(p)} for p in journal.paths_of(output)]
    assert [len(p) for p in parts] == [5, 5] and not parts[0] & parts[1]
    report = go(None, rows, output, model=None, merge=True)
    assert report["units"]["waiting"] == 0 and report["units"]["units"] == 10
    order = [json.loads(line)["image_id"] for line in open(output)]
    assert order == sorted(order) and len(set(order)) > 3


def test_another_run_is_not_overwritten(folder, rows, tmp_path):
    output = tmp_path / "qa.jsonl"
    go(folder, rows, output)
    before = files(output)
    for change, says in (
        (dict(seed=1), "seed was 0 and is 1 now"),
        (dict(decoding={**DECODING, "max_new_tokens": 8}), "settings was"),
        (dict(pairs=2), "pairs was 3 and is 2"),
    ):
        with pytest.raises(ValueError, match=says):
            go(folder, rows, output, **change)
    assert files(output) == before
    # More rows are no other run.
    more = str(tiny_llama.captions(tmp_path / "c.jsonl", 13))
    size = (tmp_path / "qa.journal").stat().st_size
    assert go(folder, more, output)["units"]["units"] == 13
    assert (tmp_path / "qa.journal").read_bytes()[:size].count(b"\n") >= 10
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(ValueError, match="mine.jsonl is there, without mine.run.json"):
        go(folder, rows, tmp_path / "mine.jsonl")
    assert (tmp_path / "mine.jsonl").read_text() == "mine"


def test_refusals(folder, rows, tmp_path):
    for kw, says in (
        (dict(chosen=["caption", "caption"]), "one comes twice"),
        (dict(chosen=["nosuch"]), "no template 'nosuch'"),
        (dict(pairs=0), "--pairs is 0"),
        (dict(decoding={**DECODING, "temperature": math.nan}), "--temperature is nan"),
        (dict(config="max_share=much"), "max_share is 'much'; expected a number"),
    ):
        with pytest.raises(ValueError, match=says):
            go(folder, rows, tmp_path / "qa.jsonl", **kw)
    assert not list(tmp_path.glob("qa*"))
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="no such folder can be made"):
        go(folder, rows, tmp_path / "file" / "qa.jsonl")
    (tmp_path / "qa.run.json").write_text("[]")
    with pytest.raises(ValueError, match="isn't what a run of this program writes"):
        go(folder, rows, tmp_path / "qa.jsonl")


def test_dry_run(rows, capsys):
    run.dry_run([rows], chosen=("caption", "choice", "case"))
    out = capsys.readouterr().out
    assert "An image shows" in out and "--- system" in out
    assert "20 replies would be asked for (caption 10, choice 10, case 0)" in out
    assert "case: no diagnosis: 10" in out


@pytest.mark.parametrize("text", ["2/2", "0/0", "1", "-1/2", "a/b", "1/2/3"])
def test_shard_flag(text):
    assert __main__.shard_from(None) is None and __main__.shard_from("0/8") == (0, 8)
    with pytest.raises(ValueError, match=f"--shard={text}: expected i/n"):
        __main__.shard_from(text)


@pytest.mark.slow
def test_command(repo_root, rows, tmp_path):
    def call(*args):
        command = [sys.executable, "-m", "tools.synthesize_qa", *args]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True)

    bad = call(f"--input={rows}", f"--output={tmp_path}/q.jsonl", "--shard=2/2")
    assert bad.returncode == 1 and bad.stderr.startswith("error: --shard=2/2: expected i/n")
    assert "Traceback" not in bad.stderr
