"""Peak memory of reading, splitting and counting PMC-OA, the largest of the data sets: 1.6 million images and captions.

    python -m tools.bench.rows_memory --rows=50000,100000

Draws captions and a zip file in PMC-OA's layout, five images an article, and does what a build does before it writes
records: all rows are read twice, each is looked up in the zip file, placed in a split and counted, and goes to a
temporary file. Images are three bytes and aren't decoded; decoding holds one image at a time, and writing what
`tools.bench.build_memory` measures.
"""

import hashlib
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import tempfile
import zipfile
from unittest import mock

from absl import app, flags

from data_prep.builders import questioned
from data_prep.datasets.pmc_oa import pmc_oa_dataset_builder as pmc_oa
from data_prep.images.store import Store
from paligemma_med.cli import command
from paligemma_med.pp import command_line

_IMAGES = 5  # of an article
_CAPTION = "Axial contrast-enhanced computed tomography of the abdomen shows the lesion of case {} (arrow), image {}."


def write(folder: pathlib.Path, rows: int) -> pathlib.Path:
    """Draws `rows` lines and their images."""
    folder.mkdir(parents=True)
    with (
        open(folder / "pmc_oa.jsonl", "w", encoding="utf-8") as lines,
        zipfile.ZipFile(folder / "images.zip", "w") as images,
    ):
        for i in range(rows):
            article, figure = divmod(i, _IMAGES)
            name = f"PMC{3_000_000 + article}_Fig{figure // 2 + 1}_{figure % 2}.jpg"
            lines.write(json.dumps(dict(image=name, caption=_CAPTION.format(article, figure))) + "\n")
            images.writestr(zipfile.ZipInfo(f"caption_T060_filtered_top4_sep_v0_subfigures/{name}"), b"jpg")
    return folder


def read(folder: pathlib.Path) -> dict:
    """What a build does before it writes; {what: number}."""
    before = _peak()
    defaults = {name: option.default for name, option in pmc_oa.Builder.OPTIONS.items()}
    found = pmc_oa.read_questions(folder, "split_captions", defaults)
    with mock.patch.object(Store, "check", _check):
        made, _ = questioned.make_rows(found, folder, work_dir=folder / "rows", cache_dir=folder / "cache")
    counts = {split: writer.count for split, writer in made.items()}
    return dict(rows=sum(counts.values()), **counts, peak_mb=_peak(), of_them_before=before)


def _check(self, name):
    return hashlib.sha256(name.encode()).hexdigest(), ()


def _peak():
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)  # Linux gives kilobytes


@command
def main(argv) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Expected flags only; found {argv[1:]}.")
    if flags.FLAGS.read:
        print(json.dumps(read(pathlib.Path(flags.FLAGS.read))), flush=True)
        return
    for rows in flags.FLAGS.rows:
        folder = pathlib.Path(tempfile.mkdtemp(dir=flags.FLAGS.folder))
        try:
            made = write(folder / "raw", int(rows))
            # A process of its own, whose peak isn't that of drawing.
            subprocess.run([sys.executable, "-m", "tools.bench.rows_memory", f"--read={made}"], check=True)
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    flags.DEFINE_list("rows", ["50000", "100000"], "Rows, one number a set.")
    command_line.define_path("read", None, "A drawn folder that is to be read.")
    command_line.define_path("folder", None, "For temporary files, about a kilobyte a row; /tmp.")
    app.run(main, flags_parser=command_line.parse_flags)
