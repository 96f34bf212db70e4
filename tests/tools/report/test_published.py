"""Others' published results beside our runs: which tables appear, and what stands in them."""

from tests.tools.report.reports import report, rows, save
from tools.report import published


def tables_of(made):
    found = [s for s in made if s.title == "Beside published results"]
    return {block.caption: block for s in found for block in s.blocks}


def test_a_run_stands_among_the_published_results_of_its_data_set_alone(tmp_path):
    save(tmp_path / "a", rows(12), name="val", split="validate")
    save(tmp_path / "a", rows(9), name="test")
    made, markdown, html, _ = report(tmp_path / "a")
    found = tables_of(made)
    assert list(found) == ["SLAKE"]
    ours = [row for row in found["SLAKE"].rows if row[0].startswith("ours")]
    assert [row[0] for row in ours] == ["ours: a, model", "ours: a, majority answer", "ours: a, images shuffled"]
    # Questions 0, 3 and 6 of 9 are wrong; odd ones are closed. The test split stands for the run.
    assert [cell.split(" ")[0] for cell in ours[0][3:]] == ["60.0", "75.0", "66.7"]
    assert ours[0][2] == "slake/en test (test)" and "5 answers a question" in ours[0][1]
    theirs = {row[0]: row for row in found["SLAKE"].rows}
    assert theirs["PaliGemma, two stages"][4] == "79.00 ± 2.75" and theirs["M2I2"][3:] == ["74.7", "91.1", "81.2"]
    assert all(row[1] and row[2] for row in found["SLAKE"].rows)  # never a number without its protocol and source
    assert "Beside published results" in markdown and "Beside published results" in html


def test_all_tables_where_asked_and_none_for_own_data(tmp_path):
    save(tmp_path / "own", rows(4), name="own", data="table:q.csv", split="all")
    made, *_ = report(tmp_path / "own")
    assert tables_of(made) == {}
    made, *_ = report(tmp_path / "own", all_published=True)
    found = tables_of(made)
    assert list(found) == list(published.RESULTS) == list(published.NAMES)
    assert all(block.rows[0] == ["ours", "–", "–", *["not run"] * 3] for block in found.values())


def test_figures_are_in_percent():
    for results in published.RESULTS.values():
        for result in results:
            cells = [cell.removeprefix("F1 ").split(" ")[0] for cell in result[1:4]]
            assert any(cells) and all(0 < float(cell) <= 100 for cell in cells if cell), result
