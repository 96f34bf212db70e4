"""The report's tables of boxes, from rows made by hand."""

from paligemma_med.metrics import scoring
from tests.tools.report import reports
from tools.report import blocks
from tools.report.__main__ import make

A, B = "<loc0000><loc0000><loc0512><loc0512>", "<loc0512><loc0512><loc1023><loc1023>"


def test_boxes_by_name_size_and_control(tmp_path):
    rows = []
    for i in range(6):
        name = "liver" if i % 2 else "spleen <b>"
        row = reports.row(
            i, [f"{A} liver"], f"{A if i % 2 else B} liver", image=i, question="detect liver", box_name=name
        )
        row |= dict(mean_box_prediction="", box_size="large") | scoring.correct("", row["answer"], "mean_box_")
        rows.append(row)
    made = make([reports.save(tmp_path / "run", rows, protocol="detection", groups=["box_name", "box_size"])])
    tables = {b.caption: b for s in made for b in s.blocks if isinstance(b, blocks.Table)}
    boxes = tables["Boxes"]
    assert boxes.head[:4] == ["", "%", "IoU, model", "IoU, mean box"]
    found = {row[1]: row for row in boxes.rows}
    assert found["overall"][2].startswith("50.0 (") and found["liver"][2].startswith("100.0 (")
    assert found["spleen <b>"][3].startswith("0.0") and found["large"][-1] == "6"
    gain = tables["The model's boxes against its controls"].rows
    assert gain[0][0] == "mean box" and gain[0][1].startswith("+50.0 (")
    html = blocks.to_html("t", made)
    assert "spleen &lt;b&gt;" in html and "spleen <b>" not in html and "does NOT follow" not in html


def test_other_evaluations_have_no_such_tables(tmp_path):
    made = make([reports.save(tmp_path / "run", reports.rows())])
    assert not [b for s in made for b in s.blocks if isinstance(b, blocks.Table) and b.caption == "Boxes"]
