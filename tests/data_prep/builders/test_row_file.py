"""Rows on disk: read back whole and in parts; progress in a log."""

from data_prep import progress as progress_lib
from data_prep.builders.row_file import PART, RowWriter, generate, read_rows


def test_parts_are_the_whole(tmp_path):
    rows = [{"i": i, "text": "é\n\u2028\t" * (i % 4)} for i in range(2 * PART + 3)]
    with RowWriter(tmp_path / "rows") as writer:
        for row in rows:
            writer.write(row)
    assert writer.count == len(rows) and len(writer.parts) == 3
    assert list(read_rows(writer.path)) == rows
    parts = [list(read_rows(writer.path, start, PART)) for start in writer.parts]
    assert [len(p) for p in parts] == [PART, PART, 3]
    assert sum(parts, []) == rows
    examples = generate(writer, lambda row: (row["i"], row), "writing", beam=False)
    assert list(examples) == [(row["i"], row) for row in rows]


def test_progress_tells_speed_and_time_to_go(capsys, monkeypatch):
    times = iter(range(0, 1000, 40))
    monkeypatch.setattr(progress_lib.time, "monotonic", lambda: next(times))
    assert list(progress_lib.progress("abcdef", "reading", 6)) == list("abcdef")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reading: 1 of 6 (17 %), 0.0 a second, about 7 min to go",
        "reading: 3 of 6 (50 %), 0.0 a second, about 3 min to go",
        "reading: 5 of 6 (83 %), 0.0 a second, about 1 min to go",
    ]
