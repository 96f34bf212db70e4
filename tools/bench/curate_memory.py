"""Time and peak memory of the filter of question-answer rows, on drawn rows.

    python -m tools.bench.curate_memory --rows=20000,100000,200000

Writes rows of 28 words without any resemblance (the most that has to be remembered), runs `python -m
data_prep.curate` with the paper's config on them, with near duplicates within cases and over all rows,
and prints a Markdown table.
"""

import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from paligemma_med.pp import command_line, markdown

CONFIG = "data_prep/curate/configs/paper.py"


def write_rows(path, n) -> None:
    """`n` rows, five an image and fifteen a case, in twenty categories."""
    rng = random.Random(0)
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26 % 26)}{i // 676}x" for i in range(8000)]
    with open(path, "w", encoding="utf-8") as f:
        for i in range(n):
            row = {
                "question_id": str(i),
                "image_id": f"i{i // 5}",
                "case_id": f"c{i // 15}",
                "category": f"category {rng.randrange(20)}",
                "question": f"What is the {' '.join(rng.choices(words, k=8))}?",
                "answer": " ".join(rng.choices(words, k=20)),
            }
            f.write(json.dumps(row) + "\n")


def measure(path, output, within) -> tuple:
    """(seconds, peak memory in MB) of one run of the command."""
    command = [sys.executable, "-m", "data_prep.curate", f"--config={CONFIG}:within={within}"]
    command += [f"--input={path}", f"--output={output}"]
    start = time.monotonic()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)  # the peak of only this child
    if status:
        sys.exit(f"error: {' '.join(command)} ended with status {status}")
    return time.monotonic() - start, usage.ru_maxrss / 1024


def main(argv) -> None:
    if len(argv) > 1:
        sys.exit(f"error: unexpected argument {argv[1]!r}")
    head = ("rows", "near duplicates within", "seconds", "rows a second", "peak memory")
    print(markdown.head(head, left=len(head)), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.jsonl"
        for n in map(int, flags.FLAGS.rows):
            write_rows(path, n)
            for within in ("case", "all"):
                output = pathlib.Path(folder) / f"{within}{n}.jsonl"
                seconds, memory = measure(path, output, within)
                speed = n / seconds
                cells = [f"{n:,}", within, f"{seconds:.0f}", f"{speed:,.0f}", f"{memory:,.0f} MB"]
                print(markdown.row(cells), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("rows", ["20000", "100000", "200000"], "Numbers of rows.")
    app.run(main, flags_parser=command_line.parse_flags)
