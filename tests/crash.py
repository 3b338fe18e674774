"""Kill a server with a journal again and again, and count what became of the messages that it had acknowledged.

    python tests/crash.py --kills 100

Clients push as the platform does: each sender's messages one after the other, each again and again until it is answered
``success`` within 2 s, and some of them once more afterwards. SIGKILL ends the server at random moments; then it is
started on the same port and journal. What its handlers do is written to a file that no kill takes anything from. In the
end every acknowledged message must have been handled, in its sender's order, and only those may have been handled again
that were in a handler's hands at a kill: the journal, read after each kill, tells which. Exit status 1 if it is not so.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import pathlib
import random
import shutil
import socket
import sqlite3
import sys
import tempfile
import threading
import time
from typing import Dict, Iterator, List, NamedTuple, Optional, Set, Tuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from support import Program, push  # noqa: E402  (kfserver, which it imports, is in the folder above)

# Seconds that the platform waits for an answer, and that we wait for what must happen.
TIMEOUT = 2.0
PATIENCE = 30.0
WORKERS = 8
SENDERS = 12
FINISHED = 1  # the state in the journal

# A line for every step, written in one piece: what is written is kept by the system, whatever becomes of the process.
HANDLERS = """
import os, random, time
from kfserver import HandlerRegistry

registry = HandlerRegistry()
trace = os.open("trace", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

@registry.on("text")
def handle(message):
    os.write(trace, b"begin %s\\n" % message.key.encode())
    time.sleep(random.choice((0.0, 0.002, 0.01)))
    os.write(trace, b"end %s\\n" % message.key.encode())
"""


class Step(NamedTuple):
    """A line of the trace: a handler begins with a message, or has ended."""

    word: str
    key: str


class Life(NamedTuple):
    """What a process did until it was killed, and the keys that its journal has as finished, if it is ``healthy``."""

    steps: List[Step]
    finished: Set[str]
    healthy: bool

    def in_hand(self) -> Tuple[Set[str], Set[str]]:
        """What handlers had begun and not ended at the end of this life, and what they had ended, yet not marked."""
        begun = {step.key for step in self.steps if step.word == "begin"}
        ended = {step.key for step in self.steps if step.word == "end"}
        return begun - ended, ended - self.finished


def key_of(sender: str, number: int) -> str:
    """The message's deduplication key."""
    return f"app/{sender}/text/{number}"


class Sender(threading.Thread):
    """A user whose messages the platform pushes, one after the other, until ``over`` is set."""

    def __init__(self, name: str, port: int, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self._port = port
        self._random = random.Random(f"{seed} {name}")
        self._connection: Optional[http.client.HTTPConnection] = None
        self.over = threading.Event()
        self.acknowledged = 0  # messages 1 to this
        self.repeats = 0

    def run(self) -> None:
        while not self.over.is_set():
            self._push(self.acknowledged + 1)
            self.acknowledged += 1
            if self._random.random() < 0.1:  # as if the answer had been lost
                self._push(self._random.randint(max(1, self.acknowledged - 5), self.acknowledged))
                self.repeats += 1
        self._hang_up()

    def _push(self, number: int) -> None:
        while not self._is_taken(push(self.name, number)):
            self._hang_up()
            time.sleep(0.01)

    def _is_taken(self, body: bytes) -> bool:
        if not self._connection:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        try:
            self._connection.request("POST", "/", body)
            answer = self._connection.getresponse()
            return (answer.status, answer.read()) == (200, b"success")
        except (OSError, http.client.HTTPException):
            return False

    def _hang_up(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = None


class Server:
    """kfserver with a journal in a folder: started, killed, started again."""

    def __init__(self, folder: pathlib.Path, port: int) -> None:
        self.port = port
        self._folder = folder
        self._read = 0  # bytes of the trace that earlier lives wrote
        (folder / "handlers.py").write_text(HANDLERS)

    def start(self) -> None:
        """Start the process; it listens some time later."""
        options = ["--port", self.port, "--journal", "kf.db", "--workers", WORKERS, "--dedup-size", 10 ** 6]
        self._program = Program(*options, "--log-level", "error", folder=self._folder)

    def wait_until_up(self) -> None:
        """Return when the server listens."""
        deadline = time.monotonic() + PATIENCE
        while not is_listening(self.port):
            if self._program.process.poll() is not None or time.monotonic() > deadline:
                self._program.process.kill()
                self._program.wait()
                raise RuntimeError("the server does not start:\n" + self._program.output)
            time.sleep(0.01)

    def kill(self) -> Life:
        """End the process without a warning, and look at what it left."""
        self._program.kill()
        return self._look_back()

    def stop(self) -> Life:
        """End the process in peace: it handles what it has taken."""
        with self._program as program:
            if program.end():
                raise RuntimeError("the server left messages undone:\n" + program.output)
        return self._look_back()

    def _look_back(self) -> Life:
        """Read a copy, for a program that opens a journal mends it."""
        with tempfile.TemporaryDirectory() as copy:
            for name in ("kf.db", "kf.db-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(str(self._folder / name), copy)
            return Life(self._read_steps(), *read_journal(pathlib.Path(copy) / "kf.db"))

    def _read_steps(self) -> List[Step]:
        trace = self._folder / "trace"
        text = trace.read_bytes()[self._read:].decode() if trace.exists() else ""
        self._read += len(text)
        return [Step(*line.split(" ", 1)) for line in text.splitlines()]


def read_journal(path: pathlib.Path) -> Tuple[Set[str], bool]:
    """The keys that are marked as finished, and whether the file is undamaged."""
    with contextlib.closing(sqlite3.connect(str(path))) as db:
        if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
            return set(), True  # killed before it had made its table
        finished = {key for key, in db.execute("SELECT key FROM messages WHERE state = ?", (FINISHED,))}
        return finished, db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def is_listening(port: int) -> bool:
    """Whether a connection to the port succeeds."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), TIMEOUT):
        return True
    return False


def find_port(chance: random.Random) -> int:
    """A free port that the system gives to nobody else: clients that call a dead server's port could get hold of it."""
    while True:
        port = chance.randint(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


class Ledger:
    """What all lives add up to."""

    def __init__(self, senders: Dict[str, int], lives: List[Life]) -> None:
        self.acknowledged = {key_of(name, number) for name, last in senders.items() for number in range(1, last + 1)}
        self.ends = collections.Counter(step.key for life in lives for step in life.steps if step.word == "end")
        self.unended, self.unmarked = set(), set()
        self.most_in_hand = 0
        self.damaged = sum(not life.healthy for life in lives)
        self.needless: List[str] = []  # begun again though they were in nobody's hands at any kill before
        self.unordered: List[str] = []  # begun before an earlier message of the sender was done
        self._begun: Set[str] = set()
        self._ended: Dict[str, int] = {}  # the last number of each sender
        for life in lives:
            self._add(life)

    def _add(self, life: Life) -> None:
        for step in life.steps:
            self._follow(step)
        unended, unmarked = life.in_hand()
        self.unended |= unended
        self.unmarked |= unmarked
        self.most_in_hand = max(self.most_in_hand, len(unended | unmarked))
        self._begun -= unended | unmarked  # these may be begun again, once

    def _follow(self, step: Step) -> None:
        _, sender, _, number = step.key.split("/")
        if step.word == "end":
            self._ended[sender] = int(number)
            return
        if step.key in self._begun:
            self.needless.append(step.key)
        if int(number) not in (self._ended.get(sender, 0), self._ended.get(sender, 0) + 1):
            self.unordered.append(step.key)
        self._begun.add(step.key)

    @property
    def lost(self) -> Set[str]:
        """Acknowledged, and never handled to the end."""
        return self.acknowledged - set(self.ends)

    @property
    def twice(self) -> Set[str]:
        """Handled to the end more than once, though they were not in a handler's hands at a kill."""
        return {key for key, count in self.ends.items() if count > 1} - self.unended - self.unmarked

    def violations(self) -> Dict[str, int]:
        """What must not be: each count is zero if all is well."""
        return {"acknowledged and lost": len(self.lost), "finished twice without need": len(self.twice),
                "begun again without need": len(self.needless), "out of their sender's order": len(self.unordered),
                "kills that damaged the journal": self.damaged,
                f"in hand beyond the {WORKERS} workers": max(0, self.most_in_hand - WORKERS)}

    def counts(self) -> Dict[str, int]:
        """What happened."""
        return {"acknowledged": len(self.acknowledged),
                "handled once": sum(count == 1 for count in self.ends.values()),
                "handled again, as they were in hand": sum(count > 1 for count in self.ends.values()),
                "in a handler's hands at a kill": len(self.unended | self.unmarked),
                "  begun and not done": len(self.unended),
                "  done and not yet marked": len(self.unmarked)}


class Run:
    """So many kills of one server under load; the moments are drawn from ``seed``."""

    def __init__(self, kills: int, seed: int) -> None:
        self._chance = random.Random(seed)
        self._kills, self._seed = kills, seed
        self.early = 0  # kills before the server listened
        self.repeats = 0

    def go(self) -> Ledger:
        """Kill, start, and in the end let the server come to its end."""
        with tempfile.TemporaryDirectory() as folder:
            server = Server(pathlib.Path(folder), find_port(self._chance))
            server.start()
            server.wait_until_up()
            with self._load(server.port) as senders:
                lives = [self._live_and_die(server) for _ in range(self._kills)]
            lives.append(server.stop())
        self.repeats = sum(sender.repeats for sender in senders)
        return Ledger({sender.name: sender.acknowledged for sender in senders}, lives)

    @contextlib.contextmanager
    def _load(self, port: int) -> Iterator[List[Sender]]:
        """Senders that push for the length of a block, and after it until each one's last message is acknowledged."""
        senders = [Sender(f"user{number}", port, self._seed) for number in range(SENDERS)]
        for sender in senders:
            sender.start()
        yield senders
        for sender in senders:
            sender.over.set()
        for sender in senders:
            sender.join(PATIENCE)
            if sender.is_alive():
                raise RuntimeError("a push was not taken in time")

    def _live_and_die(self, server: Server) -> Life:
        """One kill: mostly of a server at work, now and then of one that is just starting."""
        if self._chance.random() < 0.8:
            server.wait_until_up()
        time.sleep(self._chance.uniform(0.0, 0.4))
        self.early += not is_listening(server.port)
        life = server.kill()
        server.start()
        return life


def print_table(rows: Dict[str, object]) -> None:
    """A line for each name and value."""
    for name, value in rows.items():
        print(f"{name:<44}{value:>10}")


def main() -> int:
    """Run as the arguments say, and print what came of it; 1 if anything is not as it must be."""
    parser = argparse.ArgumentParser(description="Kill a server with a journal, and count its messages.")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1, help="the moments of the kills")
    arguments = parser.parse_args()
    started, run = time.monotonic(), Run(arguments.kills, arguments.seed)
    ledger = run.go()
    print_table({"kills": arguments.kills, "  before the server listened": run.early, **ledger.counts(),
                 "pushed once more when acknowledged": run.repeats, **ledger.violations(),
                 "seconds": round(time.monotonic() - started), "seed": arguments.seed})
    return 1 if any(ledger.violations().values()) else 0


if __name__ == "__main__":
    sys.exit(main())
