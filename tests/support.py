"""What several test files share: patience, pushes as the platform sends them, a client that sends any bytes, a server.

Nothing here sleeps for a fixed time: what must happen is waited for, as long as PATIENCE, and no longer than it takes.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import struct
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence, Type

from kfserver import (
    ClaimCache,
    Endpoint,
    HandlerRegistry,
    Message,
    PushServer,
    Request,
    Response,
    Settings,
    dedup_key,
)

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What the platform's pages publish, and the pushes in it as they stand there, by name.
PUBLISHED: Dict[str, Any] = json.loads((ROOT / "tests" / "data" / "published.json").read_text("utf-8"))
PUSHES: Dict[str, bytes] = {push["name"]: push["body"].encode() for push in PUBLISHED["pushes"]}

# Seconds that a test waits for what must happen: far more than it takes, since machines that run tests are busy.
PATIENCE = 10.0


def wait_until(condition: Callable[[], object]) -> None:
    """Poll until ``condition`` holds; fails after PATIENCE."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


@contextlib.contextmanager
def no_thread_left() -> Iterator[None]:
    """Fails unless every thread that the block started comes to its end."""
    before = set(threading.enumerate())
    yield
    wait_until(lambda: before.issuperset(threading.enumerate()))


def local(**settings: Any) -> Settings:
    """Settings of a server that only this machine reaches, on a port that is free."""
    return Settings(**{"host": "127.0.0.1", "port": 0, **settings})


def push(sender: str = "user", number: int = 1, content: str = "hi") -> bytes:
    """The body of a text message, as the platform sends it; equal ``sender`` and ``number`` are one message."""
    return json.dumps({"ToUserName": "app", "FromUserName": sender, "CreateTime": 1482048670, "MsgType": "text",
                       "Content": content, "MsgId": number}).encode()


def post(body: bytes, *headers: str, target: str = "/", version: str = "1.1") -> bytes:
    """A whole request with ``body``; ``headers`` come beside Host and Content-Length."""
    lines = [f"POST {target} HTTP/{version}", "Host: kf", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


class Answer(NamedTuple):
    """One HTTP answer, the names of its headers in lower case."""

    status: int
    headers: Dict[str, str]
    body: bytes


class Client:
    """A connection to 127.0.0.1 that sends whatever it is given, and reads answers one at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
        self._received = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send all of it, even if the server hangs up meanwhile: what it answered can be read all the same."""
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def ask(self, request: bytes) -> Answer:
        """Send a request and read its answer."""
        self.send(request)
        return self.read_answer()

    def read_answer(self, bodiless: bool = False) -> Answer:
        """The next answer; ``bodiless`` is for answers to HEAD, which announce a body and have none."""
        head = self._cut(self._find_end_of_head())
        lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
        length = 0 if bodiless else int(headers.get("content-length", 0))
        while len(self._received) < length:
            self._receive()
        return Answer(int(lines[0].split(" ")[1]), headers, self._cut(length))

    def _find_end_of_head(self) -> int:
        while b"\r\n\r\n" not in self._received:
            self._receive()
        return self._received.index(b"\r\n\r\n") + 4

    def _receive(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the server hung up after {self._received!r}")
        self._received += data

    def _cut(self, count: int) -> bytes:
        cut, self._received = self._received[:count], self._received[count:]
        return cut

    def at_end(self) -> bool:
        """Whether the server sends nothing more and hangs up."""
        if self._received:
            return False
        try:
            return self.socket.recv(1) == b""
        except ConnectionError:
            return True

    def has_ended(self) -> bool:
        """Whether the server has hung up by now; reads and forgets what it sent."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(65536):
                pass
        except BlockingIOError:
            return False
        except ConnectionError:
            pass
        return True

    def reset(self) -> None:
        """Vanish without a farewell: the server's next read or write fails."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()


class Shop:
    """A registry with one handler for texts, which keeps their contents, fails for "bad", and waits while the shop is
    closed."""

    def __init__(self) -> None:
        self.registry = HandlerRegistry()
        self.registry.on("text")(self._serve)
        self.served: List[str] = []
        self.open = threading.Event()
        self.open.set()

    def _serve(self, message: Message) -> None:
        self.served.append(message.content)
        assert self.open.wait(PATIENCE)
        assert message.content != "bad"


class Nowhere:
    """An inbox whose messages go nowhere."""

    def __init__(self, settings: Settings) -> None:
        self._claims = ClaimCache(settings.dedup_size)

    def take(self, message: Message) -> bool:
        """Claim it."""
        message.key = dedup_key(message)
        return self._claims.claim(message.key)

    def deliver(self, taken: Any) -> List[bool]:
        """Accept them."""
        for message, _ in taken:
            self._claims.accept(message.key)
        return [True] * len(taken)

    def observe(self, *told: Any) -> None:
        """Nothing."""


class RecordingEndpoint(Endpoint):
    """The real endpoint, which keeps what it was asked, and answers while ``open`` is set. Its messages go nowhere."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, Nowhere(settings), time.time, time.monotonic)
        self.requests: List[Request] = []
        self.open = threading.Event()
        self.open.set()

    def handle_all(self, requests: Sequence[Request]) -> List[Response]:
        """Keep the requests, and answer them as the real endpoint does."""
        self.requests.extend(request for request in requests if not request.problem)
        assert self.open.wait(PATIENCE)
        return super().handle_all(requests)


class Receiver:
    """A listening `PushServer` without a dispatcher, its endpoint, and clients that are closed with it."""

    def __init__(self, settings: Settings, kind: Type[PushServer]) -> None:
        self.endpoint = RecordingEndpoint(settings)
        self.server = kind(settings, self.endpoint)
        self._clients = contextlib.ExitStack()
        # A short interval of polling, or a test of time limits would wait half a second for each.
        self._loop = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    @property
    def requests(self) -> List[Request]:
        """What the endpoint was asked, in order."""
        return self.endpoint.requests

    def start(self) -> None:
        """Begin to accept what has connected, and to answer."""
        self._loop.start()

    def connect(self) -> Client:
        """A new client of this server."""
        return self._clients.enter_context(Client(self.server.server_port))

    def close(self) -> None:
        """Hang up every client and stop the server; fails if it does not stop."""
        self.endpoint.open.set()
        self._clients.close()
        if self._loop.is_alive():  # else the test has stopped it
            threading.Thread(target=self.server.close, args=(PATIENCE,), daemon=True).start()
        self._loop.join(PATIENCE)
        assert not self._loop.is_alive(), "the server does not stop"


@contextlib.contextmanager
def receiver(kind: Type[PushServer] = PushServer, started: bool = True, **settings: Any) -> Iterator[Receiver]:
    """A `Receiver` for the length of a block; the block starts it itself unless it is ``started``."""
    running = Receiver(local(**settings), kind)
    if started:
        running.start()
    try:
        yield running
    finally:
        running.close()
