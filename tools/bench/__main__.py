"""Compares a part of paligemma_med with what a user would use instead, on the same work.

    python -m tools.bench train_step --size=bench-s --peer=hf
    python -m tools.bench decode --size=bench-s --peer=hf
    python -m tools.bench saliency --size=bench-s --peer=hf
    python -m tools.bench load --size=bench-s --peer=hf
    python -m tools.bench input --size=3b-448 --data=slake/en --manual_dir=~/Slake1.0 --peer=hf
    python -m tools.bench cpu
    python -m tools.bench sources
    python -m tools.bench profile --size=bench-s
    python -m tools.bench gpu --out=bench_gpu
    python -m tools.bench --base=HEAD~20

Each part is a module here with `run(...)`. Ours and the peer take turns, so that a busy machine
slows both. It prints medians as JSON, a line of a Markdown table, and on the last line `ratio R`, the
peer's time over ours. --peer=none measures only ours, without a ratio.

Each says on which processor it was taken (tools/bench/machine.py), and calls a run invalid in which other processes
took more than a tenth of a core: in the figures (`invalid`), in the row, on a last line, and by ending with status 3,
unless --allow_busy is given. --base compares two commits with each other (tools/bench/compare.py).

`cpu` is the measure for this processor: the share of its peak that a LoRA step reaches, ours and those of all peers
that are installed, and where our time goes (tools/bench/yardstick.py).
`gpu` runs all rows that need a GPU, each as one of the commands above (tools/bench/gpu.py).
`saliency_memory` measures what capture adds to a compiled program's memory; `synthesis` compares a
batch with one caption at a time. TFDS, Grain and ml_collections are only needed by `input` (and
ml_collections by --peer=big_vision).
"""

import importlib
import json
import os
import sys

from absl import app, flags

from paligemma_med import files
from paligemma_med.models import presets
from paligemma_med.pp import command_line

_MODEL = dict(size="bench-s", peer="hf", dtype=None, cores=None, weights=None)
_OURS = dict(scan=None, attn_impl=None)
_VARIANTS = {part: presets.DEFAULT[part]["variant"] for part in ("img", "llm")}
_INVALID = 3  # exit status
# The module of each part, and the flags that it takes, with its own defaults of shared flags. Modules are
# imported when needed: some need packages that a GPU box lacks.
PARTS = {
    "train_step": (
        "train_speed",
        dict(
            _MODEL,
            **_OURS,
            what="lora",
            batch_size=None,
            peer_batch_size=None,
            rounds=7,
            steps=2,
            remat_policy=None,
            frozen_dtype=None,
        ),
    ),
    "decode": (
        "decode_speed",
        dict(_MODEL, **_OURS, batch_size=None, rounds=5, samples=5, tokens=8),
    ),
    "saliency": ("saliency_speed", dict(_MODEL, rounds=5, steps=1)),
    "load": (
        "load_speed",
        dict(_MODEL, **_OURS, what="lora", batch_size=None, rounds=3, remat_policy=None),
    ),
    "input": (
        "input_speed",
        dict(
            size="3b-448",
            data="slake/en",
            split="train",
            data_dir=None,
            manual_dir=None,
            res=None,
            batch_size=32,
            rounds=5,
            batches=6,
            peer="hf",
            cores=1,
        ),
    ),
    "sources": (
        "input_sources",
        dict(sources=None, res=448, text_len=64, batch_size=32, rounds=5, batches=6, cores=1),
    ),
    "profile": (
        "profile_step",
        dict(
            size="bench-s",
            what="lora",
            dtype=None,
            batch_size=None,
            remat_policy=None,
            scan=None,
            attn_impl=None,
            top=25,
            weights=None,
        ),
    ),
    "cpu": (
        "yardstick",
        dict(size="bench-s", batch_size=None, cores=None, rounds=5, steps=1, remat_policy=None, scan=None),
    ),
    "compare": (
        "compare",
        dict(
            base=None,
            head=None,
            works=None,
            size="bench-s",
            dtype=None,
            batch_size=None,
            cores=None,
            rounds=7,
            steps=1,
            samples=5,
            tokens=8,
        ),
    ),
    "gpu": ("gpu", dict(size="3b-448", out=None, minutes=9.0, only=None, retry=False)),
    "saliency_memory": (
        "saliency_memory",
        dict(res=448, text_len=128, tokens=16, preset=None, **_VARIANTS),
    ),
    "synthesis": (
        "synthesis_speed",
        dict(model=None, input=None, rows=16, tokens=96, rounds=3, batch_size=16, dtype="bfloat16", cores=2),
    ),
}
_TYPES = {
    "DEFINE_integer": dict(
        batch_size="Examples in a batch, or questions; by default the size's own.",
        peer_batch_size="Where it isn't --batch_size.",
        rounds="Turns of each.",
        steps="Steps in a turn.",
        batches="Batches in a turn.",
        samples="Answers to each question.",
        tokens="Of an answer.",
        res="Pixels.",
        text_len="Of prompt and answer.",
        rows="Captions.",
        cores="CPU cores that all sides are bound to.",
        top="Longest operations to list.",
    ),
    "DEFINE_string": dict(
        size="Size of the model, a name in tools/bench/sizes.py.",
        what="Is trained: lora, stage1 or full.",
        dtype="Of the weights.",
        remat_policy="Ours, in both towers.",
        attn_impl="Ours, in both towers: xla or cudnn.",
        frozen_dtype="Type of our frozen weights, int8 or nf4, instead of --dtype.",
        weights="Folder in which the random weights are kept for other runs.",
        data="Data set, built with data_prep.build.",
        split="Of it.",
        data_dir="Where it is built.",
        manual_dir="The released folder, which the peer reads.",
        img="Variant of the image tower.",
        llm="Variant of the language model.",
        preset="A name in models/presets.py, in place of --img and --llm.",
        model="Folder, .gguf file or name.",
        input="Source of captions.",
        out="Folder for the figures of each row.",
        base="Commit to compare with; this makes `compare` the part, if none is given.",
        head="Commit that is compared, instead of this folder as it is.",
    ),
    "DEFINE_bool": dict(
        scan="Whether ours loops over layers or unrolls them.",
        retry="Rows that failed before, too.",
    ),
    "DEFINE_float": dict(minutes="No row is started that wouldn't end within this time."),
    "DEFINE_list": dict(
        only="Names of rows; by default all.", works="Names of works; by default all.", sources="Names of sources."
    ),
}


def define_flags() -> None:
    """One flag for each argument of a part; its help names the parts that take it."""
    for kind, flags_of_kind in _TYPES.items():
        for name, text in flags_of_kind.items():
            parts = ", ".join(part for part, (_, takes) in PARTS.items() if name in takes)
            getattr(flags, kind)(name, None, f"{parts}: {text}")
    flags.DEFINE_enum("peer", None, ("hf", "big_vision", "none"), "What to compare with.")
    command_line.define_path("json", None, "File to write the figures to, too.")
    flags.DEFINE_bool("allow_busy", False, "End with status 0 though other processes took more than 0.1 of a core.")


def main(argv) -> None:
    if len(argv) == 1 and flags.FLAGS.base:
        argv = [*argv, "compare"]
    if len(argv) != 2 or argv[1] not in PARTS:
        sys.exit(f"error: Give one of {sorted(PARTS)}; found {argv[1:]}.")
    module, takes = PARTS[argv[1]]
    known = {"peer", *(name for of_kind in _TYPES.values() for name in of_kind)}
    given = {k: flags.FLAGS[k].value for k in known if flags.FLAGS[k].present}
    if unknown := sorted(set(given) - set(takes)):
        sys.exit(f"error: {argv[1]} has no --{unknown[0]}; it takes {sorted(takes)}.")
    part = importlib.import_module(f"tools.bench.{module}")
    try:
        found = part.run(**{**takes, **given})
        if to := flags.FLAGS.json:
            files.write_text(os.path.expanduser(to), json.dumps(found, indent=1) + "\n")
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    row = found.pop("row", None)
    print(json.dumps(found, indent=1))
    if row:
        print(row)
    if "ratio" in found:
        print(f"ratio {found['ratio']:.2f}")
    if found.get("invalid"):
        print(f"INVALID: {found['invalid']}")
        sys.exit(0 if flags.FLAGS.allow_busy else _INVALID)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=command_line.parse_flags)
