"""Compares a part of paligemma_med with what a user would take instead, on the same work.

    python -m tools.bench train_step --size=bench-s --peer=hf
    python -m tools.bench load --size=bench-s --peer=hf
    python -m tools.bench input --data=slake/en --manual_dir=~/Slake1.0 --peer=hf
    python -m tools.bench decode --peer=hf
    python -m tools.bench saliency --res=448
    python -m tools.bench synthesis --model=FILE.gguf --input=release:medpix2:FOLDER

Each part is a module here with `run(...)`. Ours and the peer take turns, so that a busy machine
slows both; what is printed are medians, and on the last line `ratio R`, the peer's time over ours.
(`saliency` has no peer: it tells the compiled program's memory. `synthesis` compares a batch with
one caption at a time.)
"""

import importlib
import json
import sys

from absl import app, flags

# The module of each part, and what it is given of the flags, with its own defaults of those that
# parts share. Modules are imported when they are asked for: some need what a GPU box lacks.
PARTS = {
    "train_step": (
        "train_speed",
        dict(size="bench-s", peer="hf", what="lora", dtype=None, batch_size=None,
             peer_batch_size=None, rounds=7, steps=2, remat_policy=None, scan=None, cores=None),
    ),
    "load": (
        "load_speed",
        dict(size="bench-s", peer="hf", what="lora", dtype=None, batch_size=None, rounds=3,
             remat_policy=None, scan=None, cores=None),
    ),
    "input": (
        "input_speed",
        dict(data="slake/en", split="train", data_dir=None, manual_dir=None, res=448, batch_size=32,
             rounds=5, batches=6, peer="hf", cores=1),
    ),
    "decode": (
        "decode_speed",
        dict(res=224, batch_size=4, rounds=5, samples=5, tokens=8, peer="hf", cores=2),
    ),
    "saliency": (
        "saliency_memory",
        dict(res=448, text_len=128, tokens=16, img="So400m/14", llm="gemma_2b"),
    ),
    "synthesis": (
        "synthesis_speed",
        dict(model=None, input=None, rows=16, tokens=96, rounds=3, batch_size=16, dtype="bfloat16",
             cores=2),
    ),
}  # fmt: skip


def main(argv):
    if len(argv) != 2 or argv[1] not in PARTS:
        raise app.UsageError(f"Give one of {sorted(PARTS)}; found {argv[1:]}.")
    module, defaults = PARTS[argv[1]]
    given = {k: flags.FLAGS[k].value for k in flags.FLAGS if flags.FLAGS[k].present}
    part = importlib.import_module(f"tools.bench.{module}")
    try:
        found = part.run(**{k: given.get(k, v) for k, v in defaults.items()})
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    row = found.pop("row", None)
    print(json.dumps(found, indent=1))
    if row:
        print(row)
    if "ratio" in found:
        print(f"ratio {found['ratio']:.2f}")


if __name__ == "__main__":
    flags.DEFINE_string("size", None, "train_step, load: of the model, as sizes.py names them.")
    flags.DEFINE_string("what", None, "train_step, load: what is trained: lora, stage1 or full.")
    flags.DEFINE_integer("peer_batch_size", None, "train_step: where it isn't --batch_size.")
    flags.DEFINE_integer("steps", None, "train_step: in a turn.")
    flags.DEFINE_string("remat_policy", None, "train_step, load: ours, in both towers.")
    flags.DEFINE_bool("scan", None, "train_step, load: ours loops over layers, or unrolls them.")
    flags.DEFINE_string("data", None, "input: data set, built with data_prep.build.")
    flags.DEFINE_string("split", None, "input: split of it.")
    flags.DEFINE_string("data_dir", None, "input: where it is built.")
    flags.DEFINE_string("manual_dir", None, "input: the released folder, which the peer reads.")
    flags.DEFINE_integer("res", None, "Pixels.")
    flags.DEFINE_integer("batch_size", None, "Examples in a batch.")
    flags.DEFINE_integer("rounds", None, "Turns of each.")
    flags.DEFINE_integer("batches", None, "input: batches a turn.")
    flags.DEFINE_integer("samples", None, "decode: answers to each question.")
    flags.DEFINE_integer("tokens", None, "decode, saliency, synthesis: of an answer.")
    flags.DEFINE_integer("text_len", None, "saliency: length of prompt and answer.")
    flags.DEFINE_string("img", None, "saliency: variant of the image tower.")
    flags.DEFINE_string("llm", None, "saliency: variant of the language model.")
    flags.DEFINE_integer("cores", None, "CPU cores that both are bound to.")
    flags.DEFINE_string("model", None, "synthesis: folder, .gguf file or name of the model.")
    flags.DEFINE_string("input", None, "synthesis: source of captions.")
    flags.DEFINE_integer("rows", None, "synthesis: captions.")
    flags.DEFINE_string("dtype", None, "train_step, load, synthesis: of the weights.")
    flags.DEFINE_enum("peer", None, ("hf", "big_vision", "none"), "What to compare with.")
    app.run(main)
