"""A real server of a real vision-language model: transformers' own, with an export of the bundled tiny PaliGemma.

What it says must be what the same weights say here. Needs `pip install fastapi uvicorn`; skipped without.
"""

import csv
import json
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from configs import tiny_base
from data_prep.datasets.shapes_easy import raw
from paligemma_med import evaluate, table_eval
from paligemma_med.checkpoints import npz
from paligemma_med.evaluation.results import read_rows
from paligemma_med.served import program
from tests import environ, processes, servers, tiny
from tools.convert_checkpoint import convert

pytestmark = pytest.mark.slow
CONTROLS = ["shuffled_images", "blank_image", "noise_image"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(run, export, config): the bundled weights as a run, and as transformers loads them."""
    folder, config = tmp_path_factory.mktemp("vlm"), tiny_base.get_config()
    config.model_init = tiny_base.BASE
    bias = np.asarray(npz.load_npz(tiny_base.BASE)["img"]["head"]["bias"], np.float32)
    tiny.write_workdir(folder / "run", config, {"img/head/bias": bias})
    convert(folder / "run", folder / "export", "hf")
    return folder / "run", folder / "export", config


@pytest.fixture(scope="module")
def server(exported):
    """(address, name of the model) of `transformers serve`."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    port, path = processes.free_port(), exported[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(path)]
    command += [f"--port={port}", "--host=127.0.0.1", "--device=cpu", "--dtype=float32"]
    env = environ.of_program() | dict(HF_HUB_OFFLINE="1")
    with open(path.parent / "server.log", "wb") as log:
        started = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        for _ in range(600):
            time.sleep(0.2)
            assert started.poll() is None, (path.parent / "server.log").read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                pass
        yield f"http://127.0.0.1:{port}/v1", str(path)
    finally:
        started.kill()
        started.wait()


def test_the_same_weights_say_the_same_behind_a_server(exported, server, tmp_path):
    run, _, config = exported
    folder = raw.make_raw(tmp_path / "raw", num_images=(1, 1, 4))
    with open(tmp_path / "q.csv", "w", newline="") as f:
        lines = csv.writer(f)
        lines.writerow(["image", "question", "answer", "answer_type"])
        for row in json.loads((folder / "test.json").read_text()):
            lines.writerow([row["img_name"], row["question"], row["answer"], row["answer_type"]])
    (tmp_path / "plain.json").write_text('{"user": "{question}"}')  # the export's chat template has the rest
    data = table_eval.data_of(tmp_path / "q.csv", images=folder / "imgs")

    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.evals = {"q": table_eval.section(config, data, max_new_tokens=16)}
    evaluate.evaluate(config, str(run), str(tmp_path / "ours"), controls=CONTROLS)
    section = program.table_section(data, max_new_tokens=16)
    faults = [f for f in servers.FAULTS if f not in ("cut", "hostile", "timeout")]
    with servers.Proxy(server[0], faults, share=0.3, most=1) as proxy:
        kw = dict(model=server[1], template=tmp_path / "plain.json", controls=CONTROLS, concurrency=2, backoff=0.1)
        found = program.evaluate({"q": section}, str(tmp_path / "theirs"), server=proxy.url, **kw)
    assert any(entry["fault"] for entry in proxy.log)
    ours, theirs = (read_rows(tmp_path / x / "eval" / "q" / "predictions.jsonl") for x in ("ours", "theirs"))
    assert len(ours) == len(theirs) == found["q"]["n"] >= 8
    # Of these two controls both show another picture: a ring of other keys, noise of another size.
    for key in ("question_id", "predictions", "blank_image_predictions", "correct", "unfinished"):
        assert [row[key] for row in ours] == [row[key] for row in theirs], key
    assert len({row["predictions"][0] for row in ours}) > 3  # they look
