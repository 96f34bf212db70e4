"""Questions about captions: a batch at a time against one caption at a time, by the same model.

Both sides are `tools.synthesize_qa.local.answer`, with the same captions, prompts, weights, threads
and greedy decoding; only --batch_size differs. So both compute the prompts' common part once and stop a
reply at its end: a batch runs until its longest reply ends, which counts against it. Every reply counts
as usable, so that each caption is asked about once. Turns alternate. On a shared machine `cpu_ratio`
(processor time) is the steadier figure.
"""

import os
import statistics
import time

from tools.bench import machine
from tools.synthesize_qa import loading, local, parse, sources, templates, units


class _Journal:
    """A journal in memory, since the disk isn't measured."""

    def __init__(self):
        self.records = {}

    def replies(self, key):
        return self.records.get(key, [])

    def count(self, key):
        return len(self.replies(key))

    def add_many(self, records):
        for record in records:
            self.records.setdefault(record["key"], []).append(record)


def run(*, model, input, rows, tokens, rounds, batch_size, dtype, cores) -> dict:
    """Measures both.

    Returns:
      dict: seconds of each turn, captions and new tokens per second of each side (medians over
      rounds), `ratio` (of captions per second), `cpu_ratio`, and the conditions of the measurement.

    Raises:
      ValueError: no model or input; fewer captions than a batch.
    """
    if not model or not input:
        raise ValueError("give --model and --input, as to tools.synthesize_qa.")
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
    loaded = loading.load(model, dtype=dtype, threads=cores, max_new_tokens=tokens, temperature=0.0, top_p=None)
    books = sources.new_books()
    found = sources.open_rows([input], books, max_rows=rows)
    if len(found) < batch_size:
        raise ValueError(f"{input} has {len(found)} captions; expected {batch_size} for a batch.")
    about = dict(
        model=loaded.name, weights=loaded.weights, backend="", settings=loaded.settings, seed=0, pairs=5, examples=""
    )
    planned = units.plan(found, [templates.load("caption")], about, books)

    def usable(*_):
        return parse.Reply((parse.Pair("", ""),), (), "", "")

    def turn(size):
        journal = _Journal()
        start, cpu = time.perf_counter(), time.process_time()
        local.answer(planned, journal, loaded, usable, batch_size=size)
        seconds = time.perf_counter() - start, time.process_time() - cpu
        return seconds, sum(r["usage"][1] for x in journal.records.values() for r in x)

    sides = {"batched": batch_size, "one_at_a_time": 1}
    local.answer(planned[:1], _Journal(), loaded, usable)  # computes the common part, and warms up
    turns = {name: [] for name in sides}
    watch = machine.Watch()
    for _ in range(rounds):
        for name, size in sides.items():
            turns[name].append(turn(size))
    others = watch.found()
    wall, cpu, made = (
        {name: statistics.median(pick(t) for t in x) for name, x in turns.items()}
        for pick in (lambda t: t[0][0], lambda t: t[0][1], lambda t: t[1])
    )
    return {
        "model": loaded.name,
        "dtype": dtype,
        "captions": len(planned),
        "max_new_tokens": tokens,
        "batch_size": batch_size,
        "cores": cores,
        "rounds": rounds,
        "seconds": {n: [round(t[0][0], 2) for t in x] for n, x in turns.items()},
        "new_tokens": made,
        "captions_per_second": {n: round(len(planned) / s, 3) for n, s in wall.items()},
        "tokens_per_second": {n: round(made[n] / s, 1) for n, s in wall.items()},
        "machine": machine.describe(),
        "processor": machine.about(),
        **others,
        "cpu_ratio": round(cpu["one_at_a_time"] / cpu["batched"], 2),
        "ratio": wall["one_at_a_time"] / wall["batched"],
    }
