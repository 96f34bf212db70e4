"""Peak memory and time of building PMC-VQA from a zip, for sets of several sizes.

    python -m tools.bench.build_memory --rows=10000,100000

Draws files in PMC-VQA's layout (two images for three questions, some 25 KB each), builds them with the
command that users run, and prints its peak resident memory: it should grow by about a kilobyte per row
for names and digests, and not with the images' size.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

from absl import app, flags

from data_prep.datasets.pmc_vqa import fake
from paligemma_med.cli import command
from paligemma_med.pp import command_line


def measure(rows: int, folder: pathlib.Path, pixels: int) -> dict:
    """Draws and builds `rows` train rows (and a tenth as many of test) below `folder`."""
    raw = fake.write(folder / "raw", train=rows, test=rows // 10, pixels=pixels)
    command = [sys.executable, "-m", "data_prep.build", "pmc_vqa", "--config=v1"]
    start = time.monotonic()
    child = subprocess.Popen([*command, f"--manual_dir={raw}", f"--data_dir={folder / 'data'}"])
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"the build of {rows:,} rows failed")
    built = sum(p.stat().st_size for p in (folder / "data").rglob("*.array_record*"))
    return {
        "rows": rows + rows // 10,
        "zip_mb": round((raw / "images.zip").stat().st_size / 2**20),
        "records_mb": round(built / 2**20),
        "seconds": round(time.monotonic() - start, 1),
        "peak_mb": round(usage.ru_maxrss / 2**10),  # Linux gives kilobytes
    }


@command
def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only; found {argv[1:]}.")
    for rows in flags.FLAGS.rows:
        folder = pathlib.Path(tempfile.mkdtemp(dir=flags.FLAGS.folder))
        try:
            print(json.dumps(measure(int(rows), folder, flags.FLAGS.pixels)), flush=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    flags.DEFINE_list("rows", ["10000", "100000"], "Rows of train, one number a set.")
    flags.DEFINE_integer("pixels", 224, "Side of the images.")
    command_line.define_path("folder", None, "For temporary files, three times the images; /tmp.")
    app.run(main, flags_parser=command_line.parse_flags)
