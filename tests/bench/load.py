"""One run of the load generator, wrk with push.lua, and what it measured."""

import json
import secrets
import subprocess
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import servers
import wire

# More than any server here answers in safe mode; what exceeds it is sent again, and reported.
ENCRYPTED_PUSHES_PER_SECOND = 8000


@dataclass(frozen=True)
class Shape:
    """One kind of load."""

    body_format: str
    connections: int
    keep_alive: bool = True


@dataclass(frozen=True)
class Measured:
    """What one run gave; `rate` counts right answers alone.

    `repeats` are pushes sent a second time, which only a file that is too short causes.
    """

    rate: float
    p99_ms: float
    requests: int
    wrong: int
    example: str
    socket_errors: int
    timeouts: int
    repeats: int


class Batches:
    """Numbers that begin the ids of a run, so that no two runs share an id.

    They begin anywhere: a server that remembers ids beyond its end (a journal, a shared store) has not seen them.
    """

    def __init__(self) -> None:
        self._last = 10_000_000 + secrets.randbelow(80_000_000)

    def next(self) -> int:
        """A number that was not given before."""
        self._last += 1
        return self._last


def run(target: servers.Running, shape: Shape, seconds: int, batch: int, folder: Path) -> Measured:
    """Load one server for some seconds."""
    arguments = [f"format={shape.body_format}", f"close={int(not shape.keep_alive)}", f"batch={batch}"]
    arguments.append("query=" + wire.signed_query())
    if target.server.encrypted:
        arguments.append(f"file={encrypted_file(shape, seconds, batch, folder)}")
    # One thread: on two cores, one is the server's.
    command = ["wrk", "--threads", "1", "--connections", str(shape.connections), "--duration", f"{seconds}s"]
    command += ["--timeout", "5s", "--script", str(servers.BENCH / "push.lua")]
    command += [f"http{'s' if target.server.tls else ''}://127.0.0.1:{target.port}/", "--", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds + 60, check=False)
    return parse(done.stdout.decode(errors="replace"))


def encrypted_file(shape: Shape, seconds: int, batch: int, folder: Path) -> Path:
    """A file of pushes for one run: made for it alone, for signatures age and ids must be new."""
    import encrypt  # needs a package that only this case needs

    path = folder / "encrypted.pushes"
    encrypt.write_pushes(path, shape.body_format, seconds * ENCRYPTED_PUSHES_PER_SECOND, batch * 10**8)
    return path


def parse(output: str) -> Measured:
    """Read the line that push.lua prints."""
    lines = [line for line in output.splitlines() if line.startswith("BENCH ")]
    if not lines:
        raise servers.WrongAnswer("wrk measured nothing:\n" + output)
    found: dict[str, Any] = json.loads(lines[0][len("BENCH ") :])
    rate = (found["requests"] - found["wrong"]) / (found.pop("microseconds") / 1e6)
    p99_ms = found.pop("p99_us") / 1000
    found.pop("p50_us")
    return Measured(rate=rate, p99_ms=p99_ms, **found)


@dataclass
class Series:
    """The runs of one server under one kind of load."""

    runs: list[Measured]

    @property
    def rate(self) -> float:
        """Requests per second, the median of the runs."""
        return median(run.rate for run in self.runs)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the latency in milliseconds, the median of the runs."""
        return median(run.p99_ms for run in self.runs)

    def total(self, name: str) -> int:
        """The sum of a count over the runs."""
        return sum(getattr(run, name) for run in self.runs)

    @property
    def example(self) -> str:
        """A wrong answer; empty if there is none."""
        return next((run.example for run in self.runs if run.example), "")
