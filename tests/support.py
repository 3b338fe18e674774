"""What several test files share: patience, pushes as the platform sends them, a client that sends any bytes, a server.

Nothing here sleeps for a fixed time: what must happen is waited for, as long as PATIENCE, and no longer than it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Type

from kfserver import (
    ClaimCache,
    Endpoint,
    HandlerRegistry,
    KfServer,
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
    """A registry with one handler, which keeps the contents that it is given in ``served``, and waits while the shop is
    not ``open``. The errors that `on_error` is told are in ``errors``.

    ``answers`` maps a message's content to what the handler returns; a function is called with the message, an error is
    raised. "bad" is an error unless it is given. `opened` runs it in a server.
    """

    def __init__(self, answers: Optional[Mapping[str, Any]] = None, kind: str = "text") -> None:
        self._answers = {"bad": ZeroDivisionError("the till is empty"), **(answers or {})}
        self.registry = HandlerRegistry()
        self.registry.on(kind)(self._serve)
        self.registry.on_error(lambda message, error: self.errors.append(error))
        self.served: List[str] = []
        self.errors: List[BaseException] = []
        self.open = threading.Event()
        self.open.set()

    def _serve(self, message: Message) -> Any:
        self.served.append(message.content)
        assert self.open.wait(PATIENCE)
        answer = self._answers.get(message.content)
        if isinstance(answer, Exception):
            raise answer
        return answer(message) if callable(answer) else answer

    @contextlib.contextmanager
    def opened(self, **settings: Any) -> Iterator[KfServer]:
        """A server on a free port that serves the shop, for the length of a block."""
        with KfServer(self.registry, local(**settings)) as server:
            try:
                yield server
            finally:
                self.open.set()  # or the server would wait for a handler that waits


class Certificate(NamedTuple):
    """A certificate that signs itself, for localhost and 127.0.0.1: paths of its file, of its key's, of a key that does
    not belong to it, of its key under a pass phrase, and of key and certificate in one file."""

    chain: str
    key: str
    other_key: str
    locked_key: str
    both: str

    @classmethod
    def make(cls, folder: pathlib.Path) -> Certificate:
        """All files in a folder; the tests get it as the fixture ``certificate``."""
        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=str(folder), check=True, stdin=subprocess.DEVNULL,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)
        for key in ("key.pem", "other_key.pem"):
            openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
        openssl("req", "-x509", "-new", "-key", "key.pem", "-out", "chain.pem", "-days", "2", "-sha256", "-subj",
                "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
        openssl("ec", "-in", "key.pem", "-aes256", "-passout", "pass:secret", "-out", "locked_key.pem")
        (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "chain.pem").read_text())
        return cls(*(str(folder / f"{name}.pem") for name in cls._fields))

    def settings(self) -> Dict[str, Any]:
        """The settings that serve it."""
        return {"tls_cert": self.chain, "tls_key": self.key}

    def client_context(self) -> ssl.SSLContext:
        """What a client trusts: this certificate, and no other."""
        return ssl.create_default_context(cafile=self.chain)


class Program:
    """kfserver as a process on 127.0.0.1, on a free port unless ``options`` name one; warnings are errors.

    ``output`` is what was read of its output. Its log is in the same text, in order, or in ``log`` after `wait` if
    that is asked for. ``command`` may replace the interpreter and the script. ``more`` goes into its environment, in
    which there is no other setting. A context manager: it is killed at the end, and when it runs too long.
    """

    def __init__(self, *options: object, folder: Optional[pathlib.Path] = None, command: Sequence[str] = (),
                 log_apart: bool = False, **more: str) -> None:
        command = command or [sys.executable, "-W", "error", str(ROOT / "kfserver.py"), "--host", "127.0.0.1",
                              "--port", "0"]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("KF_")}
        self.process = subprocess.Popen(
            [*command, *map(str, options)], cwd=folder and str(folder),
            env={**environment, "PYTHONIOENCODING": "utf-8", **more}, encoding="utf-8", stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if log_apart else subprocess.STDOUT)
        # A read from a pipe has no time-out of its own.
        self._watchdog = threading.Timer(6 * PATIENCE, self.process.kill)
        self._watchdog.start()
        self.output, self.log = "", ""

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End it without a warning, if it still runs."""
        self.process.kill()
        self.process.wait(PATIENCE)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        self._watchdog.cancel()
        self._watchdog.join()

    def read_until(self, text: str) -> None:
        """Read lines of its output up to one that holds the text."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"{text!r} does not stand in {self.output!r}")

    @property
    def port(self) -> int:
        """The port that it tells in its first line, which is read if that has not been done."""
        if "\n" not in self.output:
            self.read_until("listening on ")
        found = re.search(r"listening on https?://[^\s/]+:(\d+)", self.output)
        assert found, self.output
        return int(found.group(1))

    def push(self, number: int = 1, content: str = "hi", sender: str = "user") -> None:
        """Push a text, which must be taken."""
        with Client(self.port) as client:
            assert client.ask(post(push(sender, number, content))).body == b"success"

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and `wait`."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Read what is left; the exit status."""
        rest, log = self.process.communicate()
        self.output += rest
        self.log += log or ""
        return self.process.returncode


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
        self._claims.accept([message.key for message, _ in taken])
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
            threading.Thread(target=self.server.shutdown, args=(PATIENCE,), daemon=True).start()
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
