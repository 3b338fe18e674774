"""Clients that push as the platform does: paced or as fast as it goes, and each answer timed.

Threads and blocking sockets: that suffices for a thousand pushes a second, and serves TCP, TLS and Unix sockets alike.
"""

import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import wire

TIMEOUT = 5.0
RIGHT = "200 success"


class Target(NamedTuple):
    """Where pushes go: a port of 127.0.0.1, maybe with TLS, or the path of a Unix socket."""

    port: int
    unix: str = ""
    tls: bool = False

    def connect(self) -> socket.socket:
        """A new connection."""
        if self.unix:
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(TIMEOUT)
            connection.connect(self.unix)
            return connection
        connection = socket.create_connection(("127.0.0.1", self.port), TIMEOUT)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        return trusting_context().wrap_socket(connection) if self.tls else connection


def trusting_context() -> ssl.SSLContext:
    """TLS with whoever answers: the certificate of a benchmark is signed by nobody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


class Push(NamedTuple):
    """A message to be pushed, ``due`` seconds after the start; ``close`` ends the connection behind it."""

    number: int
    sender: str
    due: float = 0.0
    close: bool = False

    def request(self) -> bytes:
        """Head and body."""
        body = wire.message("json", self.sender, self.number)
        head = (f"POST /kf?{wire.signed_query()} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\n" + "Connection: close\r\n" * self.close)
        return head.encode() + b"\r\n" + body


class Outcome(NamedTuple):
    """What became of a push; all times by the monotonic clock."""

    push: Push
    due: float
    sent: float
    done: float
    answer: str

    @property
    def milliseconds(self) -> float:
        """The time until the answer, from when the push should have been sent: a late client does not flatter."""
        return (self.done - self.due) * 1000


class Client:
    """One connection, opened when it is needed, and kept as long as both sides like."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._connection: socket.socket | None = None

    def exchange(self, push: Push) -> str:
        """Push; status and body of the answer, or what went wrong instead."""
        try:
            self._connection = self._connection or self._target.connect()
            self._connection.sendall(push.request())
            answer, kept = read_answer(self._connection)
        except OSError as error:
            answer, kept = f"{type(error).__name__}: {error}", False
        if push.close or not kept:
            self.close()
        return answer

    def close(self) -> None:
        """Hang up."""
        if self._connection:
            self._connection.close()
        self._connection = None


def read_answer(connection: socket.socket) -> tuple[str, bool]:
    """Status and body of an answer that has a Content-Length, and whether the connection is kept."""
    received = b""
    while True:
        head, found, body = received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if found and length and len(body) >= int(length.group(1)):
            kept = not re.search(rb"(?i)\r\nconnection: *close", head)
            return f"{head[9:12].decode()} {body.decode(errors='replace').strip()[:80]}", kept
        data = connection.recv(65536)
        if not data:
            raise ConnectionError("hung up before the answer")
        received += data


@dataclass
class Crew:
    """Clients that share one line of pushes: whoever is free takes the next, and waits until it is due."""

    target: Target
    line: Iterator[Push]
    note: Callable[[Outcome], None]

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # guards the line, and what is noted
        self._begun = time.monotonic()

    def work(self) -> None:
        """One client's life."""
        client = Client(self.target)
        while True:
            with self._lock:
                push = next(self.line, None)
            if push is None:
                client.close()
                return
            self._send(client, push)

    def _send(self, client: Client, push: Push) -> None:
        due = self._begun + push.due
        time.sleep(max(0.0, due - time.monotonic()))
        sent = time.monotonic()
        answer = client.exchange(push)
        outcome = Outcome(push, due if push.due else sent, sent, time.monotonic(), answer)
        with self._lock:
            self.note(outcome)


def send_all(target: Target, pushes: Iterable[Push], clients: int, note: Callable[[Outcome], None]) -> None:
    """Send all pushes by so many clients at once; each outcome is noted, by one thread at a time."""
    crew = Crew(target, iter(pushes), note)
    threads = [threading.Thread(target=crew.work, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def paced(numbers: Iterable[int], senders: Sequence[str], rate: float, close_every: int = 1) -> Iterator[Push]:
    """Pushes at a steady rate, by the senders in turn; every so many ends its connection."""
    for index, number in enumerate(numbers):
        yield Push(number, senders[index % len(senders)], (index + 1) / rate, index % close_every == 0)


def percentile(values: Iterable[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def wrong_answers(outcomes: Iterable[Outcome]) -> str:
    """What was answered instead of success, and how often; empty if nothing."""
    counts = Counter(outcome.answer for outcome in outcomes if outcome.answer != RIGHT)
    return ", ".join(f"{count:,} x {answer}" for answer, count in counts.most_common(5))
