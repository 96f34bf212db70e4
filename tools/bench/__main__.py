"""Compares a part of paligemma_med with what a user would take instead, on the same work.

    python -m tools.bench input --data=slake/en --manual_dir=~/Slake1.0 --peer=hf

Each part is a module here with `run(...)`. Ours and the peer take turns, so that a busy machine
slows both; what is printed are medians, and on the last line `ratio R`, the peer's time over ours.
"""

import json

from absl import app, flags

from tools.bench import input_speed

PARTS = {"input": input_speed.run}


def main(argv):
    if len(argv) != 2 or argv[1] not in PARTS:
        raise app.UsageError(f"Give one of {sorted(PARTS)}; found {argv[1:]}.")
    v = flags.FLAGS
    found = PARTS[argv[1]](
        data=v.data, split=v.split, data_dir=v.data_dir, manual_dir=v.manual_dir, res=v.res,
        batch_size=v.batch_size, rounds=v.rounds, batches=v.batches, peer=v.peer, cores=v.cores,
    )  # fmt: skip
    print(json.dumps(found, indent=1))
    if "ratio" in found:
        print(f"ratio {found['ratio']:.2f}")


if __name__ == "__main__":
    flags.DEFINE_string("data", "slake/en", "input: data set, built with data_prep.build.")
    flags.DEFINE_string("split", "train", "input: split of it.")
    flags.DEFINE_string("data_dir", None, "input: where it is built.")
    flags.DEFINE_string("manual_dir", None, "input: the released folder, which the peer reads.")
    flags.DEFINE_integer("res", 448, "Pixels.")
    flags.DEFINE_integer("batch_size", 32, "Examples in a batch.")
    flags.DEFINE_integer("rounds", 5, "Turns of each.")
    flags.DEFINE_integer("batches", 6, "Batches a turn.")
    flags.DEFINE_integer("cores", 1, "input: CPU cores that both are bound to.")
    flags.DEFINE_enum("peer", "hf", ("hf", "none"), "What to compare with.")
    app.run(main)
