"""The environment of programs that tests start: that of the test run, with another number of devices.

What else $XLA_FLAGS holds is kept, so that `XLA_FLAGS=--xla_cpu_max_isa=AVX2 make test` means every
program of every test (test_package.py holds that no other file of the tests sets it).
"""

import os


def xla_flags(devices):
    """$XLA_FLAGS of the test run, with another number of devices."""
    ours = os.environ.get("XLA_FLAGS", "").split()
    kept = [x for x in ours if "host_platform_device_count" not in x]
    return " ".join([*kept, f"--xla_force_host_platform_device_count={devices}"])


def of_program(devices=1, **more):
    """The environment of a program with that many devices, and the variables in `more`."""
    return {**os.environ, "XLA_FLAGS": xla_flags(devices), **more}
