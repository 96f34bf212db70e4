"""What the benchmarks say of the machine: its processor, and whether others used it meanwhile."""

import os
import subprocess
import sys

import pytest

from tools.bench import machine

CPUINFO = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
flags\t\t: fpu sse4_2 {flags}
"""
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def proc(tmp_path):
    """A /proc in which the benchmark is process 100, with the child 101 and its child 102; 200 is another's."""

    class Proc:
        path = str(tmp_path)

        def cpuinfo(self, flags):
            (tmp_path / "cpuinfo").write_text(CPUINFO.format(flags=flags), "utf-8")

        def stat(self, busy, steal=0):
            """Seconds since the start: half of it as user, the rest in the other kinds."""
            half = int(busy * TICKS / 2)
            rest = int(busy * TICKS) - half
            fields = [half, 0, rest - 3, 99_999_999, 555, 1, 2, int(steal * TICKS), half, 0]
            (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, fields))}\ncpu0 1 2 3\n", "ascii")

        def process(self, pid, parent, seconds, ended=0.0, name="a (b) c"):
            (tmp_path / str(pid)).mkdir(exist_ok=True)
            times = [int(seconds * TICKS), 0, int(ended * TICKS), 0]
            # State, parent, nine more, then utime, stime, cutime, cstime.
            fields = ["S", parent, *range(9), *times, 20, 0]
            (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) {' '.join(map(str, fields))}\n", "utf-8")

    made = Proc()
    made.process(100, 1, 1.0)
    made.process(101, 100, 10.0)
    made.process(102, 101, 5.0)
    made.process(200, 1, 1000.0)
    made.stat(2000)
    return made


@pytest.mark.parametrize(
    "flags, isa, said",
    [
        ("avx avx2 avx512f avx512bw", "AVX-512", ", AVX-512"),
        ("avx avx2", "AVX2", ", AVX2 without AVX-512"),
        ("avx", "neither AVX2 nor AVX-512", ", neither AVX2 nor AVX-512"),
    ],
)
def test_the_processor_and_its_instructions(proc, flags, isa, said):
    proc.cpuinfo(flags)
    found = machine.about(proc.path, xla_flags="")
    assert (found["cpu"], found["family"], found["model"], found["isa"]) == ("AMD EPYC", 25, 1, isa)
    assert machine.describe({**found, "cores": 2}) == f"2 cores of AMD EPYC (family 25, model 1){said}"


def test_that_xla_is_held_back_is_said(proc):
    proc.cpuinfo("avx2 avx512f")
    found = machine.about(proc.path, xla_flags="--xla_dump_to=/tmp/x --xla_cpu_max_isa=avx2")
    assert machine.describe(found).endswith(", AVX-512, XLA held to AVX2")


def test_without_proc_nothing_is_claimed(tmp_path):
    found = machine.about(str(tmp_path))
    assert found["isa"] == "unknown" and "instruction sets unknown" in machine.describe(found)
    taken = machine.Watch(str(tmp_path), pid=100).found(seconds=10)
    assert (taken["other_cores"], taken["stolen_cores"], taken["invalid"]) == (None, None, None)
    assert "unknown" in machine.describe_others(taken)


def test_own_processes_count_with_their_descendants_and_those_that_ended(proc):
    assert machine.tree_ticks(100, proc.path) == 16 * TICKS
    proc.process(101, 100, 10.0, ended=5.0)  # its child ended, and was waited for
    os.remove(f"{proc.path}/102/stat")
    os.rmdir(f"{proc.path}/102")
    assert machine.tree_ticks(100, proc.path) == 16 * TICKS


@pytest.mark.parametrize(
    "others, steal, invalid",
    [
        (0.5, 0.0, None),
        (1.5, 0.0, "other processes took 0.15 of a core during the timed part; expected at most 0.1."),
        (0.0, 3.0, "the host took 0.30 of a core during the timed part; expected at most 0.1."),
    ],
)
def test_a_run_beside_others_is_invalid(proc, others, steal, invalid):
    """In ten seconds our side takes twelve of two cores; what /proc/stat has beyond is the others'."""
    watch = machine.Watch(proc.path, pid=100)
    proc.process(101, 100, 22.0)
    proc.stat(2012 + others, steal)
    found = watch.found(seconds=10)
    assert found["invalid"] == invalid
    assert found["other_cores"] == pytest.approx(others / 10, abs=0.002)
    assert found["stolen_cores"] == pytest.approx(steal / 10, abs=0.002)


def test_real_figures_of_this_machine():
    """A child that works counts as ours, in the figures of the real /proc."""
    before = machine.tree_ticks(os.getpid())
    watch = machine.Watch()
    code = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert 0.25 < (machine.tree_ticks(os.getpid()) - before) / TICKS < 5
    found = watch.found()
    assert found["other_cores"] is None or 0 <= found["other_cores"] <= os.cpu_count() + 0.5


RUNNER = """
import sys
from tools.bench import __main__, decode_speed, machine

decode_speed.run = lambda **_: dict(row="| a row |", ratio=2.0, invalid={invalid!r})
__main__.define_flags()
__main__.app.run(__main__.main, argv=["bench", "decode", *sys.argv[1:]], flags_parser=__main__.command_line.parse_flags)
"""


@pytest.mark.parametrize(
    "invalid, args, status, last",
    [
        ("others took it.", [], 3, "INVALID: others took it."),
        ("others took it.", ["--allow_busy"], 0, "INVALID: others took it."),
        (None, [], 0, "ratio 2.00"),
    ],
)
def test_an_invalid_run_is_told_and_has_a_status_of_its_own(repo_root, invalid, args, status, last):
    command = [sys.executable, "-c", RUNNER.format(invalid=invalid), *args]
    found = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60)
    assert (found.returncode, found.stdout.splitlines()[-1]) == (status, last), found.stderr
    assert "| a row |\nratio 2.00" in found.stdout
