"""Figures as texts, and that a metric of open answers needs nothing but its line in the table."""

import numpy as np
import pytest

from paligemma_med.metrics import scoring, tables, text_metrics
from tools.report import figures, sections


def rows(samples):
    return [
        dict(
            question_id=str(i),
            question="?",
            prompt="?",
            answer="left lung",
            answer_type="OPEN",
            image_key=str(i),
            predictions=["left", "lung", "the left lung"][:samples],
        )
        for i in range(3)
    ]


@pytest.mark.parametrize("samples", [1, 3])
def test_every_figure_has_a_title_and_is_in_the_table(samples):
    found = scoring.summarise(rows(samples), "open")
    names = figures.names(found)
    assert {*names} <= {*tables.FIGURES}
    text = tables.format_table(found)
    for metric in text_metrics.METRICS:
        for name, title in metric.titles.items():
            assert name in names and f"| overall, {title} " in text


def test_a_new_metric_is_scored_and_shown(monkeypatch):
    """As if its line stood in text_metrics.METRICS: one that is a mean, and one that is a total."""

    def score(predictions, answers):
        lengths = np.array([len(x) for x in predictions], float)
        return {"length": lengths / 100, "longest": lengths[:, None]}

    new = text_metrics.Metric(
        {"length": "length", "longest": "longest answer"}, score, totals={"longest": lambda x: float(x.max())}
    )
    monkeypatch.setattr(text_metrics, "METRICS", (*text_metrics.METRICS, new))
    monkeypatch.setattr(text_metrics, "MEANS", (*text_metrics.MEANS, "length"))
    monkeypatch.setattr(text_metrics, "TOTALS", text_metrics.TOTALS | new.totals)
    monkeypatch.setattr(tables, "FIGURES", tables.FIGURES | new.titles)
    found = scoring.summarise(rows(3), "open")
    assert found["model/overall/length"] == pytest.approx(0.04)
    assert found["model/overall/length_low"] == found["model/overall/length_high"]
    assert found["model/overall/longest"] == 4 and found["model/overall/longest_mean"] == 7
    assert "model/overall/longest_low" not in found
    table = " ".join(tables.format_table(found).split())
    assert "| overall, longest answer | 700.0 ± 519.6 | 3 |" in table and "| overall, length | 7.0 ± 5.2 (" in table
    evaluation = type("E", (), dict(metrics=found, controls=(), rule="acc", samples=3, about={}))
    assert {"length", "longest answer"} < {row[0] for row in sections.further_table(evaluation).rows}
