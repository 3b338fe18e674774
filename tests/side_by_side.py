"""Run a test command on the test files in two processes at once: most of the tests' time is the start of programs.

    python3 tests/side_by_side.py python3 -m pytest -q

The first half's output is shown as it comes, the other's after it; one that fails is shown last.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile
from typing import List

TESTS = pathlib.Path(__file__).resolve().parent


def main(command: List[str]) -> int:
    """The exit status: that of the half that failed, or 0."""
    files = sorted(map(str, TESTS.glob("test_*.py")))
    half = len(files) // 2
    with tempfile.TemporaryFile() as told:
        with subprocess.Popen([*command, *files[half:]], stdout=told, stderr=subprocess.STDOUT) as other:
            shown = subprocess.run([*command, *files[:half]]).returncode
        told.seek(0)
        sys.stdout.write(told.read().decode("utf-8", "replace"))
    if shown:
        print("the half that is shown first has failed")
    return shown or other.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
