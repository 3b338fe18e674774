"""A short run of the fuzzer; `make fuzz` is the long one."""

from __future__ import annotations

import pathlib
import subprocess
import sys

FUZZ = pathlib.Path(__file__).with_name("fuzz.py")


def test_fuzz_breaks_no_law() -> None:
    # A process of its own: some seconds of it, and nothing of what it starts, belong to the other tests.
    run = subprocess.run([sys.executable, str(FUZZ), "--cases", "5000", "--raw", "300", "--seed", "7"],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert run.returncode == 0, run.stdout.decode("utf-8", "replace")
