"""The lines of a run after a crash or a power cut: what is damaged is left out, and told."""

import json

import pytest

from paligemma_med.checkpoints import keep, step_lines
from paligemma_med.training import run_files
from tests import tiny

ROW = b'{"step": 3, "val/model/overall/acc": 0.5}\n'
NULS = b"\0" * 64 + b"\n"


@pytest.mark.parametrize(
    "damaged, message",
    [
        (NULS, "line 2: nothing but 64 NUL characters, as a power cut leaves them"),
        (b'\0\0\0{"step": 4}\n', "line 2: not valid JSON"),
        (b'{"x": 1}\n', "line 2: its step is None; expected a whole number"),
        (b'{"step": "4"}\n', "line 2: its step is '4'"),
        (b"[4]\n", "line 2: found a list"),
        (b'{"step": ' + b"9" * 5000 + b"}\n", "line 2: found a whole number of 5,000 digits"),
        (b"\xff\n", "line 2: not UTF-8"),
    ],
)
def test_a_damaged_line_is_left_out_and_told(tmp_path, caplog, damaged, message):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROW + damaged + ROW.replace(b"3", b"5") + b'{"step": 7, "cut')
    assert [row["step"] for _, row in step_lines.read(path)] == [3, 5]
    assert message in caplog.text and str(path) in caplog.text
    best = keep.best_of(tmp_path, {"keep_best": {"metric": "val/model/overall/acc"}})
    assert best([3, 5]) == 3
    assert run_files.evals_at(tmp_path, 5, {"val"}) == {"val"}
    run_files.add_metrics(str(tmp_path), 5, {"other/acc": 1.0})
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == [3, 5]


def test_a_resumed_run_drops_it_from_its_files(tmp_path, caplog):
    for name in ("metrics.jsonl", "nonfinite.jsonl", "skipped.jsonl"):
        (tmp_path / name).write_bytes(ROW + NULS + ROW.replace(b"3", b"9"))
    run_files.start(str(tmp_path), tiny.config(), {}, first_step=5)
    for name in ("metrics.jsonl", "nonfinite.jsonl", "skipped.jsonl"):
        assert (tmp_path / name).read_bytes() == ROW
        assert f"{name}: left out: line 2" in caplog.text


def test_values_that_are_no_numbers_are_no_metric(tmp_path):
    rows = [{"step": 1, "val/acc": "high"}, {"step": 2, "val/acc": None}, {"step": 3, "val/acc": 0.1}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert keep.best_of(tmp_path, {"keep_best": {"metric": "val/acc"}})([1, 2, 3]) == 3
