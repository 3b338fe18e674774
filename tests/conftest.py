"""What many tests share: for the pure sections signatures and a world of plain values, and fixtures for the others."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import sys
from typing import Any, Iterator, List, Optional, Sequence, Tuple, Union
from urllib.parse import urlencode

import pytest

TESTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

from support import Certificate, Shop  # noqa: E402  (the folder above is on the path only from here on)

from kfserver import (  # noqa: E402
    ClaimCache,
    Endpoint,
    Message,
    PushError,
    Request,
    Response,
    Settings,
    dedup_key,
    sign,
)

# A shell starts what runs in the background with Ctrl-C ignored; tests of Ctrl-C would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TOKEN = "token-of-the-tests"
# The second at which the clock of a `World` stands.
NOW = 1_700_000_000


def signed_query(token: str, timestamp: object = NOW, nonce: str = "nonce", **more: str) -> str:
    """A query with a valid signature, and ``more`` beside it."""
    signature = sign(token, str(timestamp), nonce)
    return urlencode({"signature": signature, "timestamp": timestamp, "nonce": nonce, **more})


class World:
    """An endpoint, and its world: clocks that stand still, and a queue that records what it is given.

    With ``full`` set the queue raises that at once. With ``unsafe`` set a message cannot be made safe: a `PushError` is
    its outcome, and anything else is raised. With ``elsewhere`` set another instance has had it already.
    """

    def __init__(self, **settings: Any) -> None:
        self.submitted: List[Message] = []
        self.full: Optional[Exception] = None
        self.unsafe: Optional[Exception] = None
        self.elsewhere = False
        self.unreadable: List[Tuple[bytes, str]] = []
        self.now = float(NOW)  # Unix seconds
        self.timer = 0.0  # seconds from anywhere
        made = Settings(**settings)
        self.claims = ClaimCache(made.dedup_size)
        self.endpoint = Endpoint(made, self, lambda: self.now, lambda: self.timer)

    def take(self, message: Message) -> bool:
        """What the endpoint calls with a message."""
        message.key = dedup_key(message)
        if not self.claims.claim(message.key):
            return False
        if self.full:
            self.claims.release(message.key)
            raise self.full
        return True

    def deliver(self, taken: Sequence[Tuple[Message, bytes]]) -> List[Union[bool, PushError]]:
        """What the endpoint calls with those that came together."""
        for message, _ in taken:
            if self.unsafe:
                self.claims.release(message.key)
        if isinstance(self.unsafe, PushError):
            return [self.unsafe] * len(taken)
        if self.unsafe:
            raise self.unsafe
        self.claims.accept([message.key for message, _ in taken])
        if not self.elsewhere:
            self.submitted += [message for message, _ in taken]
        return [not self.elsewhere] * len(taken)

    def cancel(self, message: Message) -> None:
        """What the endpoint calls with what was taken and cannot be delivered."""
        self.claims.release(message.key)

    def keep_unreadable(self, payload: bytes, reason: str) -> None:
        """What the endpoint calls with what was proven and cannot be read."""
        self.unreadable.append((payload, reason))

    def observe(self, *told: Any) -> None:
        """What the endpoint calls with each answer."""

    def ask(self, request: Request) -> Response:
        """The endpoint's answer to any request."""
        return self.endpoint.handle(request)

    def push(self, body: bytes, query: str = "") -> Response:
        """The endpoint's answer to a POST of ``body``."""
        return self.ask(Request("POST", "/", query, body))


@pytest.fixture
def world() -> World:
    """A world with the settings of a server that was started without any."""
    return World()


@pytest.fixture
def shop() -> Iterator[Shop]:
    """A shop that is open, and at the end at the latest."""
    made = Shop()
    yield made
    made.open.set()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """A certificate that signs itself."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl program")
    return Certificate.make(tmp_path_factory.mktemp("certificate"))


@pytest.fixture
def empty_folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current folder is empty: no handlers.py, no setting and no imported handlers but what a test makes itself.

    Installed libraries that a test imports stay imported: to import them again for each test takes most of its time.
    """
    for name in [name for name in os.environ if name.startswith("KF_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if not str(getattr(sys.modules[name], "__file__", None)).startswith((sys.prefix, sys.base_prefix)):
            del sys.modules[name]
