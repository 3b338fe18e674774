"""A kfserver under observation: started as users start it, traced by its handler, watched through /proc.

servers.py starts what is compared; this starts kfserver alone, on TCP, with TLS or on a Unix socket, and looks inside.
"""

import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import report
import servers
from growth import resident_mib
from push_clients import Target

TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Live:
    """A started kfserver; ``start_seconds`` went by until it said where it listens."""

    process: "subprocess.Popen[bytes]"
    target: Target
    trace: Path
    log: Path
    start_seconds: float

    @property
    def resident_mib(self) -> float:
        """The memory it holds."""
        return resident_mib(self.process.pid)

    @property
    def files(self) -> int:
        """How many descriptors it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def threads(self) -> int:
        """How many threads it has."""
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def cpu_seconds(self) -> float:
        """The processor's time that it has used, to a hundredth of a second."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def runs(self) -> list[tuple[str, str, int]]:
        """What the handler has traced so far, in order: begin or end, the sender, the message's id."""
        lines = self.trace.read_text().splitlines() if self.trace.exists() else []
        return [(what, sender, int(number)) for what, sender, number in map(str.split, lines)]

    def handled(self) -> Counter[int]:
        """How often each message was handled to its end."""
        return Counter(number for what, _, number in self.runs() if what == "end")

    def await_handled(self, count: int, seconds: float) -> Counter[int]:
        """The same, as soon as so many messages are through, or the seconds are over."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and len(self.handled()) < count:
            time.sleep(0.2)
        time.sleep(0.5)  # a second run of a message would come late, if at all
        return self.handled()

    def errors(self) -> list[str]:
        """The lines of its log that tell of an error."""
        return [line for line in self.log.read_text(errors="replace").splitlines() if re.search("ERROR|Error", line)]


@contextmanager
def started(folder: Path, name: str, args: str = "", sleep: float = 0.0, module: bool = False) -> Iterator[Live]:
    """Start kfserver, as a file or as a module, with further arguments and a handler that sleeps; stop it at the end,
    whatever happens."""
    trace, log = folder / f"{name}.trace", folder / f"{name}.log"
    command = list(servers.kfserver(name, args, handlers=servers.BENCH / "handlers_trace.py").command)
    # kfserver takes settings from the environment, too; none of the caller's own may slip in.
    environment = {key: text for key, text in os.environ.items() if not key.startswith("KF_")}
    environment.update(BENCH_TRACE_FILE=str(trace), BENCH_SLEEP=str(sleep))
    if module:
        command[1:2] = ["-m", "kfserver"]
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # a module's bytecode is what this is about
    begun = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=output, env=environment, cwd=servers.ROOT,
                                   start_new_session=True)
    try:
        target = listening(process, log)
        yield Live(process, target, trace, log, time.monotonic() - begun)
    finally:
        servers.stop(process)


def listening(process: "subprocess.Popen[bytes]", log: Path) -> Target:
    """Where the first line that kfserver prints says that it listens."""
    assert process.stdout
    ready, _, _ = select.select([process.stdout], [], [], servers.START_SECONDS)
    line = process.stdout.readline().decode() if ready else ""
    found = re.search(r"listening on (?:unix:(?P<unix>.+)|http(?P<tls>s?)://[^\s/]+:(?P<port>\d+))", line)
    if not found:
        raise SystemExit(f"kfserver does not listen: {line}{log.read_text(errors='replace')}")
    return Target(int(found["port"] or 0), (found["unix"] or "").strip(), bool(found["tls"]))


class Sample(NamedTuple):
    """What /proc said at one moment."""

    seconds: float
    resident_mib: float
    files: int
    threads: int


@dataclass
class Watch:
    """The samples that were taken while something ran."""

    samples: list[Sample] = field(default_factory=list)

    def most(self, name: str) -> float:
        """The highest of the values of one name."""
        return max(float(getattr(sample, name)) for sample in self.samples)


@contextmanager
def watching(live: Live, interval: float) -> Iterator[Watch]:
    """Take a sample of the server now and then, for as long as the block runs."""
    watch, over, begun = Watch(), threading.Event(), time.monotonic()

    def look() -> None:
        watch.samples.append(Sample(time.monotonic() - begun, live.resident_mib, live.files, live.threads))

    def keep_looking() -> None:
        while not over.wait(interval) and live.process.poll() is None:
            look()
    look()
    thread = threading.Thread(target=keep_looking)
    thread.start()
    try:
        yield watch
    finally:
        over.set()
        thread.join()


def settles(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether the condition holds within so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


class Finding(NamedTuple):
    """One figure: what was measured, what came out, what it is held to, and whether it is met; None if it is not
    held to anything."""

    what: str
    figure: str
    bar: str = ""
    met: bool | None = None


def conclude(findings: Sequence[Finding]) -> int:
    """Print the machine, the command and the table; the exit status."""
    words = {True: "yes", False: "NO", None: ""}
    rows = [[finding.what, finding.figure, finding.bar, words[finding.met]] for finding in findings]
    command = " ".join(["python3", os.path.relpath(sys.argv[0], servers.ROOT), *sys.argv[1:]])
    print(f"{report.machine()}\n`{command}`\n\n{report.table(['', 'measured', 'bar', 'met'], rows)}", flush=True)
    return int(any(finding.met is False for finding in findings))
