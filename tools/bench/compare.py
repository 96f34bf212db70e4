"""Two commits on the same work: what a change costs.

    python -m tools.bench --base=HEAD~20
    python -m tools.bench --base=v1.2 --head=main --works=train_step --rounds=15

The base is checked out into a temporary git worktree, and --head as well; without it the other side is this folder as
it is, changes included. Each side is a process that runs the code of its own tree (tools/bench/peers_ours.py,
decode_ours.py, input_ours.py there), with the same weights, batch and cores; they take turns. Works:

    train_step   a LoRA step (`train_speed`); losses of the first steps are compared
    decode       sampled answers (`decode_speed`); greedy answers are compared
    input        batches of made pictures from a table of JPEG files (`input_sets`); the first batch is compared

`ratio` and `cpu_ratio` are the base's time over the head's: above 1, the head is faster. Results that differ are told,
not refused: a change may be meant to change them. If a tree can't do a work (older than it, or with other settings),
that is said, and the other works go on.

Weights are drawn by this folder's code, and read by each tree's own.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from paligemma_med.pp import markdown
from tools.bench import input_sets, sizes, turns, workers

# Work -> its side's module in each tree, and steps before each turn that aren't timed.
WORKS = {
    "train_step": ("tools.bench.peers_ours", 0),
    "decode": ("tools.bench.decode_ours", 0),
    "input": ("tools.bench.input_ours", 4),
}
_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
_WARM_UP = 3  # steps
_INPUT = dict(res=448, text_len=64, tokenizer="tiny")
_INPUT_BATCH = 32
_HEAD = ["work", "seconds: head, base", "processor's", "ratio", "of processor time", "memory, GB", "results"]


def run(*, base, head, works, size, dtype, batch_size, cores, rounds, steps, samples, tokens) -> dict:
    """Measures both.

    Args:
      base, head: commits, by any name that git takes; no head is this folder as it is.
      works: names in WORKS; None is all.
      size: a name in `sizes.SIZES`, which gives the defaults of dtype, batch_size and cores.
      rounds, steps: turns of each side, and steps in each.
      samples, tokens: answers to each question, and their length.

    Returns:
      dict: `works`, {work: figures, or dict(error=why it couldn't be compared)}; `invalid`, of the first work that is;
      the commits, the conditions of the measurement, and "row", a Markdown table.

    Raises:
      ValueError: an unknown name or commit; no git checkout; no work could be compared.
    """
    sizes.check(size, "lora", dtype)
    turns.check("none", ("none",), rounds=rounds, steps=steps, samples=samples, tokens=tokens, batch_size=batch_size)
    works = list(WORKS) if works is None else works
    if unknown := sorted(set(works) - set(WORKS)):
        raise ValueError(f"--works has {unknown}; expected some of {list(WORKS)}.")
    if not base:
        raise ValueError("give --base, the commit to compare with.")
    settings = turns.model_settings(size, dtype, cores)
    settings |= dict(what="lora", frozen_dtype=None, samples=samples, tokens=tokens)
    turns.bind(settings["cores"])
    found = {}
    with contextlib.ExitStack() as stack:
        trees = {"head": stack.enter_context(_tree(head)), "base": stack.enter_context(_tree(base))}
        folders = {name: folder for name, (folder, _) in trees.items()}
        weights = stack.enter_context(turns.weights(size, settings["dtype"])) if set(works) - {"input"} else None
        drawn = dict(settings, weights=weights)
        for work in works:
            print(f"{work}: {', '.join(said for _, said in trees.values())}", file=sys.stderr, flush=True)
            try:
                if work == "input":
                    with tempfile.TemporaryDirectory(prefix="bench-") as made:
                        data = input_sets.write_table(os.path.join(made, "set"), input_sets.jpeg)
                        given = dict(_INPUT, data=data, cores=settings["cores"] or 1)
                        found[work] = _compare(work, folders, given, batch_size or _INPUT_BATCH, rounds, steps)
                else:
                    rows = batch_size or sizes.SIZES[size].batch_size
                    found[work] = _compare(work, folders, drawn, rows, rounds, steps)
            except ValueError as e:
                found[work] = dict(error=str(e))
    if not any("error" not in x for x in found.values()):
        raise ValueError("nothing could be compared: " + " ".join(f"{work}: {x['error']}" for work, x in found.items()))
    commits = {name: said for name, (_, said) in trees.items()}
    lines = [markdown.head(_HEAD), *(_row(work, x) for work, x in found.items())]
    conditions = turns.surroundings([dict(device="cpu")])
    lines.append(f"\nhead: {commits['head']}; base: {commits['base']}; {conditions['machine']}.")
    return {
        **commits,
        "size": size,
        "cores": settings["cores"],
        "rounds": rounds,
        "works": found,
        "invalid": next((x["invalid"] for x in found.values() if x.get("invalid")), None),
        **conditions,
        "row": "\n".join(lines),
    }


def _compare(work, folders, settings, rows, rounds, steps):
    """Figures of a work."""
    module, ahead = WORKS[work]
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, folder in folders.items():
            _check_tree(name, folder, module)
            given = {**settings, "work": work, "rows": rows}
            try:
                sides[name] = stack.enter_context(workers.Worker(name, given, module=module, tree=folder))
            except ValueError as e:
                raise ValueError(f"the tree of {name} can't do this work: {e}") from None
        first = {n: s.ask(do="steps", n=_WARM_UP)["values"] for n, s in sides.items()}
        results = first if work == "train_step" else {n: s.ask(do="result")["result"] for n, s in sides.items()}
        about = {name: side.about for name, side in sides.items()}
        answers = settings.get("samples", 1) if work == "decode" else 1
        found = turns.take(
            sides, dict.fromkeys(sides, rows * answers), rounds, steps, one="head", ahead=ahead, peak=False
        )
    keys = ("parameters", "trained", "flops_a_step", "jax")
    found |= {
        "batch_size": rows,
        "results_equal": results["head"] == results["base"],
        "largest_difference": _difference(results) if work == "train_step" else None,
        "about": {name: {k: x[k] for k in keys if k in x} for name, x in about.items()},
    }
    if work == "train_step":
        found["losses"] = results
    return found


def _check_tree(name, folder, module):
    """Puts the side of the input into a temporary tree that is older than it; ValueError if another is missing."""
    path = os.path.join(*module.split(".")) + ".py"
    if os.path.isfile(os.path.join(folder, path)):
        return
    if module != WORKS["input"][0] or not os.path.isdir(os.path.join(folder, "tools", "bench")):
        raise ValueError(f"the tree of {name} lacks this work: it has no {path}.")
    shutil.copy(os.path.join(_ROOT, path), os.path.join(folder, path))


def _difference(losses):
    """The largest difference of the base's from the head's, relative."""
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(losses["base"], losses["head"], strict=True))


def _row(work, found):
    """A line under _HEAD."""
    if "error" in found:
        return markdown.row([work, *[""] * (len(_HEAD) - 2), f"not compared: {found['error']}"])

    def both(key, form):
        return ", ".join(form.format(x) for x in found[key].values())

    results = "equal" if found["results_equal"] else "differ"
    if not found["results_equal"] and found["largest_difference"] is not None:
        results += f" by {found['largest_difference']:.1g} of a loss"
    cells = [work, both("median_seconds", "{:.3f}"), both("median_cpu_seconds", "{:.3f}"), turns.ratio(found)]
    cells += [turns.ratio(found, "cpu_ratio"), both("memory_gb", "{:.2f}")]
    return markdown.row([*cells, results + (" (INVALID: the machine was busy)" if found["invalid"] else "")])


# --- Trees ---


@contextlib.contextmanager
def _tree(rev) -> Iterator[tuple[str, str]]:
    """(folder, what it is) of a commit's temporary worktree, or of this folder if `rev` is None."""
    if rev is not None:
        with worktree(_ROOT, rev) as (folder, commit):
            yield folder, f"{rev} ({commit[:9]})"
        return
    try:
        commit = _git(_ROOT, "rev-parse", "--short=9", "HEAD")
        changed = " with changes" if _git(_ROOT, "status", "--porcelain", "--untracked-files=no") else ""
    except ValueError:
        commit, changed = "no commit", ""
    yield _ROOT, f"{commit}{changed}"


@contextlib.contextmanager
def worktree(root, rev) -> Iterator[tuple[str, str]]:
    """(folder, commit) of a temporary git worktree of `rev`, which is gone after the block however that ends:
    Ctrl-C and SIGTERM included.

    Raises:
      ValueError: no git checkout, or no such commit.
    """
    if rev.startswith("-"):
        raise ValueError(f"found {rev!r}; expected a commit.")
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", f"{rev}^{{commit}}")
    except ValueError as e:
        raise ValueError(f"{rev!r} is no commit of {root}; expected one that git knows there. {e}".strip()) from None
    before = signal.signal(signal.SIGTERM, _end)
    folder = tempfile.mkdtemp(prefix="bench-")
    tree = os.path.join(folder, "tree")
    try:
        _git(root, "worktree", "add", "--quiet", "--detach", tree, commit)
        yield tree, commit
    finally:
        # A second Ctrl-C must not leave half of it behind.
        signals = {s: signal.signal(s, signal.SIG_IGN) for s in (signal.SIGINT, signal.SIGTERM)}
        remove = ["git", "-C", root, "worktree", "remove", "--force", tree]
        gone = subprocess.run(remove, capture_output=True, check=False).returncode == 0
        shutil.rmtree(folder, ignore_errors=True)
        if not gone:  # git only knew of the folder
            subprocess.run(["git", "-C", root, "worktree", "prune"], capture_output=True, check=False)
        signal.signal(signal.SIGINT, signals[signal.SIGINT])
        signal.signal(signal.SIGTERM, before)


def _end(*_):
    raise SystemExit(128 + signal.SIGTERM)


def _git(root, *args):
    """What git says; ValueError if it refuses, or isn't there."""
    try:
        done = subprocess.run(["git", "-C", root, *args], capture_output=True, text=True, check=False)
    except OSError as e:
        raise ValueError(f"git can't be run ({e.strerror}).") from None
    if done.returncode:
        raise ValueError(" ".join(done.stderr.split()))
    return done.stdout.strip()
