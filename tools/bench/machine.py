"""The machine that a benchmark runs on: its processor, and what other processes took of it meanwhile.

A ratio holds for one kind of processor: whether it has AVX-512 changes the products, and XLA and PyTorch gain
differently by it. And it holds for a quiet machine: a library whose threads wait for each other loses more
beside other work than one whose threads don't. So each measurement says on which processor it was taken, and
is called invalid when other processes took more than a tenth of a core.

The figures are Linux's, from /proc. Elsewhere they are unknown, and no run is called invalid.
"""

import os
import platform
import re
import time

LIMIT = 0.1  # of a core


def about(proc="/proc", xla_flags=None) -> dict:
    """The processor: `cpu`, a name; `family` and `model`, numbers that tell a generation where the name doesn't
    (None if unknown); `isa`, "AVX-512", "AVX2", "neither AVX2 nor AVX-512", or "unknown"; `cores` that this process
    may use; `cores_of_machine`; `xla_max_isa`, what `xla_flags` (by default $XLA_FLAGS) hold XLA to, or None."""
    try:
        with open(f"{proc}/cpuinfo", encoding="utf-8") as f:
            text = f.read()
    except OSError:
        text = ""

    def found(name):
        line = re.search(rf"^{name}\s*: (.*)$", text, re.MULTILINE)
        return line and line[1]

    family, model = found("cpu family"), found("model")
    xla_flags = os.environ.get("XLA_FLAGS", "") if xla_flags is None else xla_flags
    held = re.search(r"--xla_cpu_max_isa=(\w+)", xla_flags)
    return {
        "cpu": found("model name") or platform.processor() or "an unknown CPU",
        "family": int(family) if family else None,
        "model": int(model) if model else None,
        "isa": _isa(found("flags")),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cores_of_machine": os.cpu_count(),
        "xla_max_isa": held and held[1].upper(),
    }


def _isa(flags):
    if flags is None:
        return "unknown"
    names = flags.split()
    if "avx512f" in names:
        return "AVX-512"
    return "AVX2" if "avx2" in names else "neither AVX2 nor AVX-512"


def describe(found=None) -> str:
    """One line: `about` as "2 cores of AMD EPYC (family 25, model 1), AVX2 without AVX-512"."""
    found = about() if found is None else found
    isa = {"AVX2": "AVX2 without AVX-512", "unknown": "instruction sets unknown"}.get(found["isa"], found["isa"])
    generation = f" (family {found['family']}, model {found['model']})" if found["family"] is not None else ""
    held = f", XLA held to {found['xla_max_isa']}" if found["xla_max_isa"] else ""
    return f"{found['cores']} core{'s' * (found['cores'] > 1)} of {found['cpu']}{generation}, {isa}{held}"


class Watch:
    """Measures from its making on what others take of the processor.

    Args:
      proc: where /proc is.
      pid: the process that with all its descendants counts as the benchmark; by default this one.
    """

    def __init__(self, proc="/proc", pid=None):
        self._proc, self._pid = proc, pid or os.getpid()
        self._start, self._before = time.perf_counter(), self._read()
        self._load = _load()

    def _read(self):
        """Ticks (of all processes, stolen by the host, of our own), or None."""
        try:
            own = tree_ticks(self._pid, self._proc)
            return (*machine_ticks(self._proc), own)
        except (OSError, ValueError, KeyError, IndexError):
            return None

    def found(self, seconds=None) -> dict:
        """What was taken since the watch was made, in cores (seconds of the processor per second).

        Args:
          seconds: by default those that passed.

        Returns:
          dict: `other_cores`, by processes that aren't the benchmark's; `stolen_cores`, by the host of a virtual
          machine for others of its guests; both None if unknown. `invalid`: why the run doesn't count, a sentence,
          or None. `load`, of the system, before and now.
        """
        seconds = time.perf_counter() - self._start if seconds is None else seconds
        after = self._read()
        other = stolen = None
        if self._before and after and seconds > 0:
            total, taken, own = (b - a for a, b in zip(self._before, after))
            ticks = os.sysconf("SC_CLK_TCK") * seconds
            other, stolen = round(max(0.0, (total - own) / ticks), 3), round(taken / ticks, 3)
        return {
            "other_cores": other,
            "stolen_cores": stolen,
            "invalid": _why_invalid(other, stolen),
            "load": [self._load, _load()],
        }


def _why_invalid(other, stolen):
    for cores, who in ((other, "other processes"), (stolen, "the host")):
        if cores is not None and cores > LIMIT:
            return f"{who} took {cores:.2f} of a core during the timed part; expected at most {LIMIT}."
    return None


def describe_others(found) -> str:
    """A line about a `Watch`'s figures."""
    if found["other_cores"] is None:
        return "what other processes took of the processor is unknown"
    return f"other processes took {found['other_cores']:.2f} of a core, the host {found['stolen_cores']:.2f}"


def machine_ticks(proc="/proc") -> tuple[int, int]:
    """(busy, stolen) ticks of all cores since the machine started, from /proc/stat. A guest's own guests are in
    `user` already."""
    with open(f"{proc}/stat", encoding="ascii") as f:
        fields = f.readline().split()
    if fields[0] != "cpu":
        raise ValueError(f"{proc}/stat begins with {fields[0]!r}; expected cpu")
    user, nice, system, _, _, irq, softirq, *steal = map(int, fields[1:9])
    return user + nice + system + irq + softirq, steal[0] if steal else 0


def tree_ticks(pid, proc="/proc") -> int:
    """Ticks that a process and its descendants have taken, those included that ended and were waited for."""
    parents, ticks = {}, {}
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            with open(f"{proc}/{name}/stat", encoding="utf-8", errors="replace") as f:
                # The program's name, in brackets, may hold spaces and brackets.
                fields = f.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # ended meanwhile, or another user's where those are hidden
        parents[int(name)] = int(fields[1])
        ticks[int(name)] = sum(map(int, fields[11:15]))  # utime, stime, and those of children
    total, todo = 0, [pid]
    while todo:
        one = todo.pop()
        total += ticks[one]
        todo += [child for child, parent in parents.items() if parent == one]
    return total


def _load():
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
