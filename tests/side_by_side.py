"""Run a test command on all test files, several processes at a time: most of the tests' time is the start of programs.

    python3 tests/side_by_side.py python3 -m pytest -q

The files wait in one line, the slow ones first, and each process that is free takes the next: so all cores are busy to
the end. The output of files that pass is shown at once, that of files that fail at the end. The last line has the sums,
in pytest's own form.
"""

from __future__ import annotations

import collections
import compileall
import os
import pathlib
import py_compile
import queue
import re
import subprocess
import sys
import threading
import time
from typing import Counter, List, NamedTuple

TESTS = pathlib.Path(__file__).resolve().parent

# The files that take two seconds or more, the slowest first. A list that is out of date costs time, and nothing else.
SLOWEST = ("test_command_line.py", "test_replies.py", "test_readme.py", "test_shared_claims.py", "test_hostile.py",
           "test_journal.py", "test_inbox.py", "test_tls_and_unix.py", "test_admin_page.py")
# How many of the other files share a process: a start of pytest takes longer than most of them.
TOGETHER = 7
# The words of pytest's closing line, in its order.
WORDS = ("failed", "passed", "skipped", "deselected", "xfailed", "xpassed", "warning", "error")


class Done(NamedTuple):
    """What a process told, and its exit status."""

    output: str
    status: int

    def closing_line(self) -> str:
        """pytest's last line, as ``3 passed, 1 skipped in 0.12s``; empty if it did not get so far."""
        found = re.findall(r"^=*\s*(\d+ [a-z]+(?:, \d+ [a-z]+)* in [\d.]+s.*)$", self.output, re.MULTILINE)
        return found[-1] if found else ""


def bundles() -> List[List[str]]:
    """All test files, those first that take longest, the quick ones several together."""
    slow = [str(TESTS / name) for name in SLOWEST if (TESTS / name).exists()]
    quick = sorted({str(path) for path in TESTS.glob("test_*.py")} - set(slow))
    return [[path] for path in slow] + [quick[at:at + TOGETHER] for at in range(0, len(quick), TOGETHER)]


def run(command: List[str], line: queue.Queue[List[str]], done: queue.Queue[Done]) -> None:
    """Run the command on one bundle after the other, until the line is empty."""
    while True:
        try:
            files = line.get_nowait()
        except queue.Empty:
            return
        ended = subprocess.run([*command, *files], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        done.put(Done(ended.stdout.decode("utf-8", "replace"), ended.returncode))


def count(every: List[Done]) -> Counter[str]:
    """The sums of all closing lines; a process that failed without one is an error."""
    sums: Counter[str] = collections.Counter()
    for each in every:
        for number, word in re.findall(r"(\d+) ([a-z]+)", each.closing_line()):
            sums[re.sub("s$", "", word)] += int(number)
        sums["error"] += bool(each.status and not each.closing_line())
    return sums


def write_sums(sums: Counter[str]) -> str:
    """The sums as pytest writes them."""
    several = {word: word + "s" * (word in ("warning", "error") and sums[word] > 1) for word in WORDS}
    return ", ".join(f"{sums[word]} {several[word]}" for word in WORDS if sums[word])


def main(command: List[str]) -> int:
    """The exit status: that of a process that failed, or 0."""
    begun, every = time.monotonic(), bundles()
    line: queue.Queue[List[str]] = queue.Queue()
    done: queue.Queue[Done] = queue.Queue()
    for files in every:
        line.put(files)
    # Many processes import kfserver, and the Makefile forbids them to keep its bytecode.
    compileall.compile_file(str(TESTS.parent / "kfserver.py"), quiet=1,
                            invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    # One more than there are cores: some of the tests wait for a pause to end.
    for _ in range((os.cpu_count() or 1) + 1):
        # A daemon, so that Ctrl-C ends them all: each is waiting for its own process, which gets the signal too.
        threading.Thread(target=run, args=(command, line, done), daemon=True).start()
    ended = []
    for _ in every:
        ended.append(done.get())
        dots = ended[-1].output.rstrip().rpartition("\n")[0]
        print("a test has failed: see below" if ended[-1].status else dots, flush=True)
    failed = [each for each in ended if each.status]
    for each in failed:
        print(each.output.rstrip().rpartition("\n")[0] if each.closing_line() else each.output)
    sums = count(ended)
    print(f"{write_sums(sums) or 'no tests ran'} in {time.monotonic() - begun:.2f}s", flush=True)
    return failed[0].status if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
