"""Sides of a benchmark as processes that take turns and speak JSON, one line at a time.

Each side has a separate process, bound to the same cores, and sleeps during the others' turns. So their
memory can be measured separately, and thread pools don't share a process (measured on two cores,
`bench-s`: 0.93 and 1.43 s per step, in one process 1.00 and 1.48).

A side is a module with `device()` and `build(settings)`, run as `python -m MODULE JSON`. `build`
returns an object with

    step()       does the work once and returns its result (a training step: its loss), on the device
    value(x)     waits for a result of `step`, and returns a number for it
    result()     optional: what else sides are compared by, for JSON
    multiply(n)  multiplies two n × n matrices of the type once, and waits
    about        dict of facts to report
    peak()       the device's peak memory in bytes; None on a CPU

On a CPU, memory is the growth of the process's resident memory since before `build`, at its peak after
the first steps.
"""

import ctypes
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import time

# Work -> side -> module.
SIDES = {
    "train_step": {n: f"tools.bench.peers_{n}" for n in ("ours", "hf", "big_vision")},
    "decode": {n: f"tools.bench.decode_{n}" for n in ("ours", "hf")},
    "saliency": {n: f"tools.bench.saliency_{n}" for n in ("ours", "hf")},
    "input": {"ours": "tools.bench.input_ours"},
}
# Packages that a bare GPU box lacks: no side may import them (except big_vision, which does so itself).
UNWANTED = ("tensorflow_datasets", "grain", "ml_collections")


def resident(name) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as f:
        return int(re.search(rf"{name}:\s+(\d+) kB", f.read())[1]) * 1024


def forget_peak() -> None:
    """Returns free memory to the system, so that growth can be measured, and resets the peak."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
        f.write("5")


class Worker:
    """A side in a separate process, ready for its turn after construction.

    Args:
      name: the side's name in SIDES.
      settings: for its `build`; its `work` is one of SIDES.
      env: additional environment variables.
      module: instead of that of SIDES.
      tree: a folder with a checkout of this repository, whose code the side runs, instead of ours.

    Attributes:
      about: the side's own `about`.

    Raises:
      ValueError: the side refused, or ended.
    """

    def __init__(self, name, settings, env=None, module=None, tree=None):
        self.name = name
        settings = {**settings, "started": time.time()}
        env = {**os.environ, **_ENV, **(env or {})}
        if tree:
            env["PYTHONPATH"] = os.pathsep.join(filter(None, (tree, env.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module or SIDES[settings["work"]][name], json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=tree,
        )
        try:
            self.about = self._read()
        except ValueError:
            self.close()
            raise

    def ask(self, **request) -> dict:
        """The side's answer to one request of `serve`."""
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last line, or the lack of one, says more
        return self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise ValueError(f"{self.name} ended early (status {self._process.wait()}); see above.")
        found = json.loads(line)
        if "error" in found:
            raise ValueError(found["error"])
        return found

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


# Two sides share a GPU: JAX must not reserve all of its memory. Nothing may be downloaded.
_ENV = dict(XLA_PYTHON_CLIENT_PREALLOCATE="false", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def serve(device, build) -> None:
    """The side's own program: builds it, reports `about`, and answers requests until there are no more.

    Requests: {"do": "steps", "n": N} returns the seconds per step (`seconds`), processor seconds
    (`cpu_seconds`) and the value of each step (`values`); {"do": "result"} the side's `result`;
    {"do": "multiply", "n": N, "times": K} the FLOP/s of the best of K products; {"do": "forget"} resets
    the peak of memory; {"do": "memory"} returns its `bytes`.
    """
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not mix with the answers

    def say(**found):
        channel.write(json.dumps(found) + "\n")
        channel.flush()

    settings = json.loads(sys.argv[1])
    try:
        where = device()
        imported = time.time() - settings["started"]
        forget_peak()
        before = resident("VmRSS")
        side = build(settings)
        unwanted = [m for m in UNWANTED if m in sys.modules]
        seconds = dict(imported=imported, built=time.time() - settings["started"])
        say(**where, **side.about, unwanted=unwanted, seconds_from_start=seconds)
        for line in sys.stdin:
            say(**_answer(side, json.loads(line), before))
    except (ValueError, OSError) as e:
        say(error=str(e))
        raise SystemExit(1) from None
    except KeyboardInterrupt:  # the driver's, who tells of it
        raise SystemExit(130) from None


def _answer(side, request, before):
    if request["do"] == "steps":
        start, cpu = time.perf_counter(), time.process_time()
        values = [side.step() for _ in range(request["n"])]
        values = [side.value(x) for x in values]
        n = request["n"]
        return dict(
            seconds=(time.perf_counter() - start) / n,
            cpu_seconds=(time.process_time() - cpu) / n,
            values=values,
        )
    if request["do"] == "multiply":
        n, seconds = request["n"], []
        for _ in range(request["times"] + 1):
            start = time.perf_counter()
            side.multiply(n)
            seconds.append(time.perf_counter() - start)
        return dict(flops_per_second=2 * n**3 / min(seconds[1:]))
    if request["do"] == "result":
        return dict(result=side.result())
    if request["do"] == "forget":
        forget_peak()
        return {}
    assert request["do"] == "memory", request
    peak = side.peak()
    return dict(bytes=resident("VmHWM") - before if peak is None else peak)


def median(values) -> float:
    """The median, rounded so that JSON stays readable."""
    return round(statistics.median(values), 4)
