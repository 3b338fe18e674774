"""Clients that hold connections and never complete a request, as a process of their own; see hostage.py.

Each connection sends nothing, or now and then a byte: of an endless head, or of the first record of a TLS handshake.
Each that is sent away comes back at once. Ends with its standard input, and then tells how often it connected and was
sent away.
"""

import argparse
import contextlib
import heapq
import itertools
import json
import random
import resource
import selectors
import socket
import sys
import time
from typing import NamedTuple

HEAD = b"POST /kf HTTP/1.1\r\nHost: bench\r\nX-Never-Ending: "
# A record of 16 KiB that begins a handshake, as far as a server looks before it has all of it.
HELLO = bytes.fromhex("16 0301 3fff 01 003ffb 0303")
TURN_SECONDS = 0.02


class Drop(NamedTuple):
    """A byte to come: when, a number that parts equal times, on which connection, and which byte of the head."""

    due: float
    order: int
    connection: socket.socket
    place: int


class Swarm:
    """The connections; ``drops`` is the heap of those that send, the next one first."""

    def __init__(self, port: int, seconds: float, head: bytes) -> None:
        self._port, self._head = port, head
        self._seconds = seconds
        self._selector = selectors.DefaultSelector()
        self._drops: list[Drop] = []
        self._order = itertools.count()
        self.counts = {"connected": 0, "sent_away": 0, "bytes": 0}

    def open(self) -> None:
        """One more connection, without waiting for it."""
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self._port))
        self._selector.register(connection, selectors.EVENT_READ)
        self.counts["connected"] += 1
        if self._seconds:
            # The first byte comes at any time within them: also of those that are soon sent away some send.
            self._push(random.uniform(0, self._seconds), connection, 0)

    def _push(self, wait: float, connection: socket.socket, place: int) -> None:
        heapq.heappush(self._drops, Drop(time.monotonic() + wait, next(self._order), connection, place))

    def come_back(self) -> None:
        """Replace the connections that were closed meanwhile."""
        for key, _ in self._selector.select(TURN_SECONDS):
            connection = key.fileobj
            assert isinstance(connection, socket.socket)
            if closed(connection):
                self._selector.unregister(connection)
                connection.close()
                self.counts["sent_away"] += 1
                self.open()

    def drip(self) -> None:
        """Send a byte wherever one is due."""
        while self._drops and self._drops[0].due <= time.monotonic():
            _, _, connection, place = heapq.heappop(self._drops)
            if connection.fileno() < 0:
                continue  # closed, and replaced
            with contextlib.suppress(OSError):  # not yet connected, or just closed
                self.counts["bytes"] += connection.send(self._head[place:place + 1] or b"x")
                place += 1
            self._push(self._seconds, connection, place)


def closed(connection: socket.socket) -> bool:
    """Whether the server has hung up."""
    try:
        return not connection.recv(4096)
    except BlockingIOError:
        return False
    except OSError:
        return True


def main() -> None:
    """Attack until the standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=5000)
    parser.add_argument("--seconds", type=float, default=0.0, help="between two bytes; 0: send nothing (default)")
    parser.add_argument("--tls", action="store_true", help="the bytes are those of a TLS handshake")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    swarm = Swarm(options.port, options.seconds, HELLO if options.tls else HEAD)
    for number in range(options.connections):
        swarm.open()
        if number % 100 == 0:
            swarm.come_back()
    watch_over(swarm)
    print(json.dumps(swarm.counts), flush=True)


def watch_over(swarm: Swarm) -> None:
    """Go on until the standard input ends."""
    with selectors.DefaultSelector() as control:
        control.register(sys.stdin, selectors.EVENT_READ)
        while not control.select(0):
            swarm.come_back()
            swarm.drip()


if __name__ == "__main__":
    main()
