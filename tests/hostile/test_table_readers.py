"""Every reader of tables is fed damaged ones: it reads them, or raises the house's own error.

What the tables' reader itself takes is in tests/pp/test_tables.py.
"""

import os
import random

from data_prep import qa_files
from data_prep.datasets.pmc_vqa import rows as pmc_vqa
from data_prep.files import DataError
from paligemma_med.explain import questions
from paligemma_med.judge import figures
from paligemma_med.pp import tables
from tests.hostile import mutations
from tools import fit_scaling_law
from tools.report import foreign, foreign_files
from tools.review_qa import verdicts
from tools.synthesize_qa import sources as synthesis_sources

CASES = int(os.environ.get("HOSTILE_CASES", "50"))
CELLS = (
    "",
    '"',
    '""',
    "x;y",
    "x\ty",
    "a" * 200_000,
    "1e999",
    "9" * 5001,
    "\u2028",
    "é",
    "²",
    "\r",
    '"open',
    "NaN",
    "=1+1",
)


def wrong_tables(good, count):
    """Yields damaged versions of a CSV text."""
    rng = random.Random(0)
    for _ in range(count):
        rows = [line.split(",") for line in good.splitlines()]
        row = rng.choice(rows)
        kind = rng.randrange(5)
        if kind == 0:
            row[rng.randrange(len(row))] = rng.choice(CELLS)
        elif kind == 1:
            del row[rng.randrange(len(row))]
        elif kind == 2:
            row.insert(rng.randrange(len(row) + 1), rng.choice(CELLS))
        elif kind == 3:
            rows.append(list(row))
        data = "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")
        yield mutations.of_bytes(data, rng) if kind == 4 else data


def check(path, good, read, errors=ValueError):
    path.write_text(good)
    read()
    for i, data in enumerate(wrong_tables(good, CASES)):
        path.write_bytes(data)
        try:
            read()
        except errors as e:
            assert type(e) is not UnicodeDecodeError, f"case {i}: {e}"
            str(e).encode()
        except Exception as e:
            raise AssertionError(f"case {i}: {type(e).__name__}: {e!s:.200} on {data!r:.300}") from e


QUESTIONS = "question_id,image_id,question,answer\n" + "".join(f"q{i},i{i},Is it {i}?,yes\n" for i in range(3))


def test_tables(tmp_path):
    check(tmp_path / "a.csv", QUESTIONS, lambda: tables.read_file(tmp_path / "a.csv", ["question"]))


def test_labels_of_people(tmp_path):
    rows = [dict(question_id=f"q{i}", predictions=["yes"]) for i in range(3)]
    good = "question_id,label\n" + "".join(f"q{i},1\n" for i in range(3))
    protocol = next(iter(figures.PROTOCOLS))
    check(tmp_path / "a.csv", good, lambda: figures.read_labels(tmp_path / "a.csv", rows, protocol))


def test_questions_to_explain(tmp_path):
    (tmp_path / "i.png").write_bytes(b"x")
    good = "image,question\n" + "i.png,Is it?\n" * 3
    check(tmp_path / "a.csv", good, lambda: questions.read_questions(tmp_path / "a.csv", tmp_path))


def test_answers_of_others(tmp_path):
    good = "question,answer,prediction,image\n" + "Is it?,yes,no,a.png\n" * 3
    check(tmp_path / "a.csv", good, lambda: foreign_files.read(tmp_path / "a.csv"))


def test_a_table_of_vlmevalkit(tmp_path):
    good = "index,question,A,B,answer,prediction\n" + "".join(f"{i},Is it?,x,y,A,b\n" for i in range(3))
    check(tmp_path / "a.csv", good, lambda: foreign.load(tmp_path / "a.csv", []))


def test_metrics_for_a_scaling_law(tmp_path):
    path = tmp_path / "a.csv"
    good = "x,d,loss\n" + "".join(f"{i}.0,5,{i}.5\n" for i in range(1, 4))
    check(path, good, lambda: fit_scaling_law.columns(fit_scaling_law.read_rows(path), path, "x", "d", "loss"))


def test_pairs_of_medm(tmp_path):
    check(tmp_path / "a.csv", QUESTIONS, lambda: list(qa_files.read_qa(tmp_path / "a.csv")), DataError)


def test_captions_to_synthesise_from(tmp_path):
    path, good = tmp_path / "a.csv", "image_id,caption\n" + "".join(f"i{i},A mass in the lung.\n" for i in range(3))

    def read():
        synthesis_sources.open_rows([str(path)], synthesis_sources.new_books())

    check(path, good, read, DataError)


def test_pmc_vqa(tmp_path):
    path = tmp_path / "a.csv"
    header = "Figure_path,Question,Answer,Choice A,Choice B,Choice C,Choice D,Answer_label"
    good = header + "\n" + "a.jpg,What?,x,A: x,B: y,C: z,D: w,A\n" * 3

    def read():
        for line, row in pmc_vqa.read_table(path):
            pmc_vqa.parse(row, "q", f"{path} line {line}", blank=False)

    check(path, good, read, DataError)


def test_verdicts_of_reviewers(tmp_path):
    good = "question_id,digest,verdict,note\n" + "".join(f"q{i},p0123456789ab,keep,\n" for i in range(3))
    check(tmp_path / "a.csv", good, lambda: verdicts.read(tmp_path / "a.csv"))
