"""Memory and time of an own table: rows and sparse image files are made up, it is opened, and rows are read at random.

python -m tools.bench.table_memory --rows=1000000 --files=200000 --folder=/tmp/made
"""

import argparse
import json
import os
import pathlib
import random
import resource
import time

from paligemma_med import input_pipeline


def held() -> int:
    """Bytes of memory that this process holds now (Linux)."""
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def make(folder: pathlib.Path, rows: int, files: int, size: int) -> None:
    """questions.csv of so many rows about so many files of `size` bytes, with holes in place of pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        with open(folder / f"{i:07d}.png", "wb") as f:
            f.truncate(size)
    with open(folder / "questions.csv", "w") as f:
        f.write("image,question,answer\n")
        for i in range(rows):
            f.write(f"{i % files:07d}.png,What is seen in the left lung of patient {i}?,nodule {i % 97}\n")


def measure(folder: pathlib.Path) -> dict:
    """Bytes a row after the table was opened and while it was, and seconds."""
    before, peak = held(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    source = input_pipeline.open_source(dict(name=f"table:{folder / 'questions.csv'}", split="all"))
    seconds, n = time.perf_counter() - start, len(source)
    after = held()
    rng, start = random.Random(0), time.perf_counter()
    for _ in range(2000):
        source.table[rng.randrange(n)]
    each = (time.perf_counter() - start) / 2000
    top = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return dict(
        rows=n,
        bytes_a_row=round((after - before) / n, 1),
        peak_bytes_a_row=round((top - max(peak, before)) / n, 1),
        seconds_to_open=round(seconds, 1),
        microseconds_a_row=round(each * 1e6, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--files", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=100_000)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    args = parser.parse_args()
    if not (args.folder / "questions.csv").is_file():
        make(args.folder, args.rows, args.files, args.size)
    print(json.dumps(measure(args.folder)))


if __name__ == "__main__":
    main()
