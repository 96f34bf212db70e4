"""Curves of evaluation loss: what is read of a run's metrics.jsonl, and what is drawn."""

import json
import math

import pytest

from paligemma_med.metrics import losses as metrics_losses
from tools.report import __main__ as report
from tools.report import blocks, losses


def write(folder, falls, name="val/mini"):
    folder.mkdir()
    rows = [{"step": 1, "tokens_seen": 10, "training_loss": 9.0}]
    for i in range(1, 4):
        avg = 3 - falls * i
        row = {"step": i, "tokens_seen": 100 * i, f"{name}/avg": avg, f"{name}/per_token": avg + 1}
        row |= {f"{name}/avg_low": avg - 0.5, f"{name}/avg_high": avg + 0.5}
        row |= {f"{name}/avg/answer_type/OPEN": avg + 2, f"{name}/per_token/answer_type/OPEN": 0.0}
        rows.append(row)
    rows.append({"step": 9, "val/mini/avg": 1.0, "val/mini/per_token": 1.0})  # of a run that didn't count tokens
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_curves_of_two_runs_are_drawn_without_any_other_evaluation(tmp_path):
    for run, falls in (("a", 0.1), ("b", 0.5)):
        write(tmp_path / run, falls)
    curves = losses.read([tmp_path / "a", tmp_path / "b"])
    assert [(c.run, c.name, c.group) for c in curves] == [
        (run, "val/mini", group) for run in "ab" for group in ("", "answer_type/OPEN")
    ]
    assert curves[2].points == [(100, 2.5, 2.0, 3.0), (200, 2.0, 1.5, 2.5), (300, 1.5, 1.0, 2.0)]
    assert curves[3].points[0] == (100, 4.5, None, None)
    made = report.make([str(tmp_path / "a"), str(tmp_path / "b")])
    html, (markdown, figures) = blocks.to_html("t", made), blocks.to_markdown("t", made)
    assert len(figures) == 1 and "tokens seen" in html and "nats a token" in next(iter(figures.values()))
    assert "| val/mini   | all       | b   |     3 |         300 | 1.500 (1.000–2.000) |" in markdown
    assert "| val/mini   | OPEN      | a   |     3 |         300 |               4.700 |" in markdown


def test_losses_of_evaluate_are_made_anew_from_their_rows(tmp_path):
    folder = tmp_path / "a" / "eval" / "val" / "mini"
    folder.mkdir(parents=True)
    rows = [
        dict(question_id=str(i), image_id=str(i), answer_type=("OPEN", "CLOSED")[i % 2], loss=2.0 + i, tokens=2)
        for i in range(4)
    ]
    (folder / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    figures = metrics_losses.summarise(rows)
    (folder / "metrics.json").write_text(
        json.dumps(figures | {"about": {"split": "x test", "groups": ["answer_type"]}})
    )
    made = report.make([str(tmp_path / "a")])
    (table,) = [b for s in made for b in s.blocks if b.kind == "table"]
    cells = ["1.750", "3.500", f"{math.exp(1.75):.3f}", "8", "4"]
    assert table.rows[0][:4] == ["a", "val/mini", "all", "x test"] and table.rows[0][5:] == cells
    assert [row[2] for row in table.rows] == ["all", "CLOSED", "OPEN"]
    assert not [b for s in made for b in s.blocks if b.kind == "warning"]
    (folder / "metrics.json").write_text(json.dumps(figures | {"avg": 1.0}))
    (warning,) = [b.text for s in report.make([str(tmp_path / "a")]) for b in s.blocks if b.kind == "warning"]
    assert "does NOT follow from losses.jsonl: avg is 1.0" in warning
    (folder / "losses.jsonl").write_text(json.dumps(rows[0] | {"tokens": "2"}) + "\n")
    with pytest.raises(ValueError, match="losses.jsonl, line 1: .*expected a number, a whole number"):
        report.make([str(tmp_path / "a")])


def test_a_run_without_losses_has_no_curve(tmp_path):
    assert losses.read([tmp_path, tmp_path / "nowhere"]) == []
