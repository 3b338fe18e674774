"""How kfserver's cost grows: with connections, with the keys it remembers, with the patterns it has to try.

Every row is a kfserver of its own, idle but for its rounds, except that the rows of the first table share one. Keys
are filled in by pushing them: what is measured is a server after that many messages.
"""

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import load
import report
import servers
from load import Series, Shape

FILL_SHAPE = Shape("xml", 32)
FILL_SECONDS = 600
PAUSE = 0.5
DEDUP_SIZE = 1_000_000
USUAL = Shape("xml", 32)

KINDS: Mapping[str, str] = {"equal": 'f"order {number}"', "regex": 're.compile(rf"order {number} (.+)")'}
PATTERNS = Template("""

import re

for number in range($count):
    registry.on("text", $pattern)(lambda message, *groups: None)
""")


@dataclass
class Row:
    """One line of a table: a server, how it is loaded, how many keys it must know beforehand."""

    table: str
    name: str
    server: servers.Server
    shape: Shape = USUAL
    keys: int = 0
    series: Series = field(default_factory=lambda: Series([]))
    resident_mib: float = 0.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=4, help="length of one round (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each row (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of one second, and fewer keys")
    parser.add_argument("--output", default="", metavar="FILE", help="write the report there instead of printing it")
    parser.add_argument("--update-readme", default="", metavar="FILE", help="put it between <!-- growth --> markers")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1, 1
    return options


def rows(quick: bool, folder: Path) -> list[Row]:
    """All rows, table by table."""
    plain = servers.kfserver("plain")
    connections = [Row("Connections", f"{count:,}", plain, Shape("xml", count)) for count in (1, 8, 64, 512)]
    keys = [keys_row(count) for count in (10, 10_000, 100_000 if quick else 1_000_000)]
    patterns = [pattern_row(kind, count, folder) for kind in KINDS for count in (1, 100, 10_000)]
    return connections + keys + patterns


def keys_row(count: int) -> Row:
    """A server that has seen so many keys before its first round, and forgets none of them."""
    # One size for all: a cache as small as the fewest keys would be full of messages under way, and refuse the rest.
    server = servers.kfserver(f"keys-{count}", f"--dedup-size {DEDUP_SIZE}")
    return Row("Keys seen at the start", f"{count:,}", server, keys=count)


def pattern_row(kind: str, count: int, folder: Path) -> Row:
    """A server with so many patterns, of which the messages match none: every one of them has to be ruled out."""
    path = folder / f"handlers_{kind}_{count}.py"
    own = (servers.BENCH / "handlers_bench.py").read_text(encoding="utf-8")
    path.write_text(own + PATTERNS.substitute(count=count, pattern=KINDS[kind]), encoding="utf-8")
    server = servers.kfserver(f"{kind}-{count}", handlers=path)
    return Row("Patterns registered", f"{count:,} ({kind})", server)


def start_all(stack: ExitStack, every: Sequence[Row], folder: Path) -> dict[str, servers.Running]:
    """Start and check the servers of all rows, by name; the stack stops them."""
    targets: dict[str, servers.Running] = {}
    for row in every:
        if row.server.name not in targets:
            targets[row.server.name] = stack.enter_context(servers.running(row.server, folder))
            servers.prove(targets[row.server.name])
    return targets


def fill(target: servers.Running, keys: int, batches: load.Batches, folder: Path) -> None:
    """Push until the server has seen so many different messages."""
    seen = 0
    deadline = time.monotonic() + FILL_SECONDS
    while seen < keys:
        if time.monotonic() > deadline:
            raise servers.WrongAnswer(f"{target.server.name}: only {seen:,} of {keys:,} pushes in {FILL_SECONDS} s")
        measured = load.run(target, FILL_SHAPE, min(20, 1 + keys // 50_000), batches.next(), folder)
        seen += measured.requests - measured.wrong
        print(f"{target.server.name}: {seen:,} of {keys:,} keys", file=sys.stderr)


def resident_mib(pid: int) -> float:
    """The memory that a process holds, where the system tells it."""
    path = Path(f"/proc/{pid}/statm")
    pages = int(path.read_text().split()[1]) if path.exists() else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(
    every: Sequence[Row], targets: Mapping[str, servers.Running], seconds: int, rounds: int, folder: Path
) -> None:
    """All rounds, interleaved; the results go into the rows."""
    batches = load.Batches()
    for row in every:
        fill(targets[row.server.name], row.keys, batches, folder)
    for row in list(every) * rounds:
        print(f"{row.table}: {row.name}", file=sys.stderr)
        target = targets[row.server.name]
        row.series.runs.append(load.run(target, row.shape, seconds, batches.next(), folder))
        row.resident_mib = resident_mib(target.pid)
        # Lets the server finish what was under way, so that it does not run into the next one's round.
        time.sleep(PAUSE)


def compose(every: Sequence[Row], seconds: int, rounds: int) -> str:
    """The whole report in Markdown."""
    how = f"Medians of {rounds} rounds of {seconds} s, XML, keep-alive, 32 connections where nothing else is said."
    parts = [f"{report.machine()}\n{how}"]
    for title in dict.fromkeys(row.table for row in every):
        parts.append(one_table(title, [row for row in every if row.table == title]))
    return "\n\n".join(parts)


def one_table(title: str, some: Sequence[Row]) -> str:
    """The rows of one table, and each rate relative to the first one's."""
    head = (title, "requests per second", "relative", "p99 in ms", "not accepted", "memory in MiB")
    return report.table(head, [cells(row, some[0].series.rate) for row in some])


def cells(row: Row, first_rate: float) -> tuple[str, ...]:
    """One row; what was not accepted, for which a status stands as an example, does not count into the rate."""
    rate, refused = row.series.rate, f"{row.series.total('wrong'):,} {row.series.example[:3]}".strip()
    figures = (report.number(rate), f"{rate / first_rate:.2f}", report.number(row.series.p99_ms))
    return (row.name, *figures, refused, report.number(row.resident_mib))


def main() -> int:
    """Measure and report; the exit status."""
    # A terminated harness must stop its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kfserver-growth-")))
        every = rows(options.quick, folder)
        try:
            measure(every, start_all(stack, every, folder), options.seconds, options.rounds, folder)
        except servers.WrongAnswer as problem:
            print(f"WRONG: {problem}", file=sys.stderr)
            return 1
    text = compose(every, options.seconds, options.rounds)
    print("\n".join(report.publish(text, "growth", options.output, options.update_readme)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
