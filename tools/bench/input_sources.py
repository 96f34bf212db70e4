"""The input from each kind of source, on the same pictures: TFDS records, a table of files, DICOM files.

    python -m tools.bench sources
    python -m tools.bench sources --sources=tfds_jpeg,table_dicom_16 --rounds=9

All sources show the same pixels (`input_sets`; the first batch of each is compared), go through the same pp, and are
read by processes bound to the same cores, which take turns. The file format costs what it costs wherever the file lies:
so there are TFDS sets of JPEG and of PNG files, as our builders keep released files as they are and convert DICOM to
PNG. `cpu_against` is the processor's time of a source over that of `tfds_jpeg`, or of the first one measured: at most
1.10 is aimed at for tables and DICOM.
"""

import os
import tempfile

from paligemma_med.pp import markdown
from tools.bench import input_ours, input_sets, turns

SOURCES = {
    "tfds_jpeg": (input_sets.write_tfds, input_sets.jpeg),
    "tfds_png": (input_sets.write_tfds, input_sets.png),
    "table_jpeg": (input_sets.write_table, input_sets.jpeg),
    "table_png": (input_sets.write_table, input_sets.png),
    "table_dicom_8": (input_sets.write_table, input_sets.dicom_8),
    "table_dicom_16": (input_sets.write_table, input_sets.dicom_16),
}


def run(*, sources, res, text_len, batch_size, rounds, batches, cores) -> dict:
    """Measures them.

    Args:
      sources: names in SOURCES; None is all. The others are compared with the first.
      res: pixels.
      batch_size, rounds, batches: examples in a batch, turns of each source, and batches in a turn.

    Returns:
      dict: per source, examples per second and per second of the processor (medians over rounds), `cpu_against` and
      `against`, times over those of the first source; the conditions of the measurement, and "row", a Markdown table.

    Raises:
      ValueError: an unknown name, or sources that show other pixels.
    """
    sources = list(SOURCES) if sources is None else sources
    if unknown := sorted(set(sources) - set(SOURCES)):
        raise ValueError(f"--sources has {unknown}; expected some of {list(SOURCES)}.")
    turns.check("none", ("none",), rounds=rounds, batches=batches, batch_size=batch_size, cores=cores, res=res)
    turns.bind(cores)
    settings = dict(work="input", res=res, text_len=text_len, tokenizer="tiny", cores=cores)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = {}
        for name in sources:
            write, encode = SOURCES[name]
            data[name] = write(os.path.join(folder, name), encode)
        rows = dict.fromkeys(sources, batch_size)
        with turns.sides(rows, settings, {name: dict(data=data[name]) for name in sources}) as sides:
            digests = {n: s.ask(do="result")["result"] for n, s in sides.items()}
            first = digests[sources[0]]
            if other := [n for n, found in digests.items() if found != first]:
                raise ValueError(f"the first batch of {other[0]} isn't that of {sources[0]}: they do different work.")
            ahead = input_ours.AHEAD
            found = turns.take(sides, rows, rounds, batches, one=sources[0], ahead=ahead, peak=False)
            about = [s.about for s in sides.values()]
    for key in ("ratio", "cpu_ratio"):  # of the last source alone
        found.pop(key, None)
    wall, cpu = found["median_seconds"], found["median_cpu_seconds"]
    out = {
        "res": res,
        "batch_size": batch_size,
        "cores": cores,
        "rounds": rounds,
        "batches_a_round": batches,
        "examples_per_cpu_second": {n: round(batch_size / x, 1) for n, x in cpu.items()},
        "against": {n: round(x / wall[sources[0]], 3) for n, x in wall.items()},
        "cpu_against": {n: round(x / cpu[sources[0]], 3) for n, x in cpu.items()},
        **found,
        **turns.surroundings(about),
    }
    head = ["source", "examples a second", "of the processor", f"time over {sources[0]}'s", "of the processor"]
    lines = [
        markdown.row(
            [
                n,
                f"{out['per_second'][n]:.1f}",
                f"{out['examples_per_cpu_second'][n]:.1f}",
                f"{out['against'][n]:.2f}",
                f"{out['cpu_against'][n]:.2f}",
            ]
        )
        for n in sources
    ]
    return {**out, "row": "\n".join([markdown.head(head), *lines, f"\n{turns.where(out)}"])}
