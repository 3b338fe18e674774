"""Shared claims: several instances hand each message over once, through a real Redis, and alone when it is away."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import os
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple

import pytest
from support import PATIENCE, ROOT, Client, Shop, post, push, wait_until

import kfserver
from kfserver import Busy, ClaimCache, KfServer, Settings, SettingsError, SharedClaims, main

KEY = "app/user/text/1"
NAME = f"kfserver:{KEY}"  # in Redis, where it must stay: instances of different releases run side by side
# Milliseconds: a claim lives a minute and what was handled is remembered for a day, less what a slow machine takes.
MINUTE = range(30_000, 60_000 + 1)
DAY = range(86_400_000 - 30_000, 86_400_000 + 1)

needs_package = pytest.mark.skipif(
    not importlib.util.find_spec("redis"), reason="the redis package is not installed: pip install redis")


class RedisServer:
    """A redis-server of our own on 127.0.0.1, which keeps nothing when it is stopped."""

    def __init__(self) -> None:
        self._process: Optional[subprocess.Popen[bytes]] = None
        self.port = 0
        # Not a port that the system gives to clients: one that calls a server that is away could get hold of it.
        while not self._start_on(random.randint(20_000, 32_000)):
            pass

    def _start_on(self, port: int) -> bool:
        """Whether a server listens on the port: not if it is another program's."""
        self.port = port
        self._process = subprocess.Popen(
            ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no"],
            stdout=subprocess.DEVNULL)
        wait_until(lambda: self._ended() or self._answers())
        return not self._ended()

    def _ended(self) -> bool:
        return not self._process or self._process.poll() is not None

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), PATIENCE) as asking:
            asking.sendall(b"PING\r\n")
            return asking.recv(7) == b"+PONG\r\n"
        return False

    def start(self) -> None:
        """Start again, on the same port."""
        assert self._start_on(self.port)

    def stop(self) -> None:
        """Stop, and forget everything."""
        assert self._process
        self._process.terminate()
        self._process.wait(PATIENCE)

    @property
    def url(self) -> str:
        """What --redis takes."""
        return f"redis://127.0.0.1:{self.port}/0"


@pytest.fixture(scope="module")
def redis_server() -> Iterator[RedisServer]:
    """The one Redis of all tests here."""
    if not shutil.which("redis-server"):
        pytest.skip("redis-server is not installed")
    server = RedisServer()
    yield server
    server.stop()


@pytest.fixture
def store(redis_server: RedisServer) -> Iterator[Any]:
    """A client of our own to the Redis, which is empty."""
    import redis
    client = redis.Redis.from_url(redis_server.url)
    client.flushall()
    yield client
    client.close()


@pytest.fixture(autouse=True)
def _patience_with_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine must not make Redis seem to be away."""
    monkeypatch.setattr(kfserver, "REDIS_TIMEOUT", PATIENCE)


class Clockwork:
    """A clock that stands still, and the jobs that are due later, which run when a test wants."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.jobs: List[Tuple[float, Callable[[], None]]] = []

    def later(self, seconds: float, job: Callable[[], None]) -> None:
        """Takes the place of `Alarm.later`."""
        self.jobs.append((seconds, job))

    def run_next(self) -> float:
        """Run the job that was entered first; the seconds it should have waited."""
        seconds, job = self.jobs.pop(0)
        job()
        return seconds


class Instance:
    """The claims of one instance, and its clockwork."""

    def __init__(self, url: str) -> None:
        self.clockwork = Clockwork()
        self.claims = SharedClaims(url, ClaimCache(100), lambda: self.clockwork.now)


@pytest.fixture
def one(redis_server: RedisServer, store: Any) -> Instance:
    """An instance."""
    return Instance(redis_server.url)


@pytest.fixture
def other(redis_server: RedisServer, store: Any) -> Instance:
    """Another instance on the same Redis."""
    return Instance(redis_server.url)


# ---- Claims


@needs_package
def test_shared_claims_claim_is_true_for_exactly_one(one: Instance, other: Instance) -> None:
    assert one.claims.claim(KEY)
    one.claims.accept(KEY)
    assert not other.claims.claim(KEY)
    assert not one.claims.claim(KEY)
    assert other.claims.claim("app/user/text/2")


@needs_package
def test_shared_claims_claim_raises_busy_while_the_first_may_yet_be_refused(one: Instance, other: Instance) -> None:
    assert one.claims.claim(KEY)
    with pytest.raises(Busy):  # a success here, and a refusal there, would lose the message
        other.claims.claim(KEY)
    one.claims.accept(KEY)
    assert not other.claims.claim(KEY)


@needs_package
def test_shared_claims_claim_lives_for_a_minute_and_a_day_when_accepted(one: Instance, store: Any) -> None:
    one.claims.claim(KEY)
    assert store.pttl(NAME) in MINUTE
    one.claims.accept(KEY)
    assert store.pttl(NAME) in DAY


@needs_package
def test_shared_claims_finish_is_remembered_by_all_for_a_day(one: Instance, other: Instance, store: Any) -> None:
    one.claims.claim(KEY)
    one.claims.accept(KEY)
    one.claims.finish(KEY)
    assert store.pttl(NAME) in DAY
    assert not other.claims.claim(KEY)


@needs_package
@pytest.mark.parametrize("accepted", [False, True], ids=["refused", "failed for good"])
def test_shared_claims_release_lets_any_instance_claim(
        one: Instance, other: Instance, store: Any, accepted: bool) -> None:
    one.claims.claim(KEY)
    if accepted:
        one.claims.accept(KEY)
        assert not other.claims.claim(KEY)  # and must not be remembered there as handled
    one.claims.release(KEY)
    assert store.exists(NAME) == 0
    assert other.claims.claim(KEY)
    other.claims.accept(KEY)
    assert not one.claims.claim(KEY)


@needs_package
def test_shared_claims_release_leaves_alone_what_is_anothers_by_now(one: Instance, other: Instance, store: Any) -> None:
    one.claims.claim(KEY)
    store.delete(NAME)  # as if its time had run out
    assert other.claims.claim(KEY)
    one.claims.release(KEY)
    assert store.pttl(NAME) in MINUTE


# ---- Servers


@needs_package
def test_kf_server_shares_its_claims(redis_server: RedisServer, store: Any, shop: Shop) -> None:
    servers = [KfServer(shop.registry, Settings(redis=redis_server.url)) for _ in range(2)]
    for server in servers:
        assert server.feed(push(number=1)).body == b"success"
        assert server.join(PATIENCE)
    assert shop.served == ["hi"]
    assert store.pttl(NAME) in DAY


@needs_package
def test_kf_server_claims_for_a_day_what_is_in_a_handlers_hands(
        redis_server: RedisServer, store: Any, shop: Shop) -> None:
    shop.open.clear()
    server = KfServer(shop.registry, Settings(redis=redis_server.url))
    server.feed(push(number=1))
    wait_until(lambda: shop.served)
    assert store.pttl(NAME) in DAY
    shop.open.set()
    assert server.join(PATIENCE)


@needs_package
def test_kf_server_releases_what_failed_for_good(redis_server: RedisServer, store: Any, shop: Shop) -> None:
    server = KfServer(shop.registry, Settings(redis=redis_server.url, tries=1))
    server.feed(push(number=1, content="bad"))
    assert server.join(PATIENCE)
    assert store.exists(NAME) == 0


@needs_package
def test_kf_server_releases_what_it_had_no_room_for(redis_server: RedisServer, store: Any, shop: Shop) -> None:
    server = KfServer(shop.registry, Settings(redis=redis_server.url))
    server.stop()
    assert server.feed(push(number=1)).status == 503
    assert store.exists(NAME) == 0
    another = KfServer(shop.registry, Settings(redis=redis_server.url))
    assert another.feed(push(number=1)).outcome == "accepted"
    assert another.join(PATIENCE)


# ---- Redis away, and back


def warnings_in(caplog: pytest.LogCaptureFixture) -> List[str]:
    """The beginnings of the log's warnings, and of what is worse."""
    return [record.getMessage()[:13] for record in caplog.records if record.levelno >= logging.WARNING]


@needs_package
def test_kf_server_refuses_nothing_while_redis_is_away_and_shares_again_when_it_is_back(
        redis_server: RedisServer, store: Any, shop: Shop, caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "REDIS_PAUSE", 0.0)
    server = KfServer(shop.registry, Settings(redis=redis_server.url))
    assert server.feed(push(number=1)).outcome == "accepted"
    redis_server.stop()
    try:
        assert [server.feed(push(number=number)).outcome for number in (2, 3, 2, 1)] == [
            "accepted", "accepted", "repeat", "repeat"]
        assert server.join(PATIENCE)
        assert warnings_in(caplog) == ["Redis is away"]
    finally:
        redis_server.start()
    assert server.feed(push(number=4)).outcome == "accepted"
    assert server.join(PATIENCE)
    assert warnings_in(caplog) == ["Redis is away", "Redis is back"]
    another = KfServer(shop.registry, Settings(redis=redis_server.url))
    assert another.feed(push(number=4)).outcome == "repeat"
    assert len(shop.served) == 4


@needs_package
def test_kf_server_starts_though_redis_is_away(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # nobody else gets this port, and nobody answers on it
        server = KfServer(shop.registry, Settings(redis=f"redis://127.0.0.1:{unheard.getsockname()[1]}"))
        assert [server.feed(push(number=1)).outcome for _ in range(2)] == ["accepted", "repeat"]
        assert server.join(PATIENCE)
    assert warnings_in(caplog) == ["Redis is away"]


class SilentServer:
    """Takes connections on 127.0.0.1, and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(100)
        self._socket.setblocking(False)
        self._taken: List[socket.socket] = []
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}"

    def count_calls(self) -> int:
        """How often somebody has connected so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self._taken.append(self._socket.accept()[0])
        return len(self._taken)

    def close(self) -> None:
        """Hang up."""
        for each in (self._socket, *self._taken):
            each.close()


@pytest.fixture
def silent_server() -> Iterator[SilentServer]:
    """A server that is too slow, whatever it is."""
    made = SilentServer()
    yield made
    made.close()


@needs_package
def test_shared_claims_wait_once_for_a_slow_redis_and_then_leave_it_alone(
        silent_server: SilentServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.undo()
    instance, started = Instance(silent_server.url), time.monotonic()
    assert instance.claims.claim(KEY)
    assert time.monotonic() - started < 2.0  # the platform's patience; 0.1 s on a machine that is not busy
    assert silent_server.count_calls() == 1
    for number in range(10):
        assert instance.claims.claim(f"app/user/text/1{number}")
        instance.claims.finish(f"app/user/text/1{number}")
    assert silent_server.count_calls() == 1
    instance.clockwork.now += kfserver.REDIS_PAUSE
    instance.claims.finish(KEY)
    assert silent_server.count_calls() == 2
    assert warnings_in(caplog) == ["Redis is away"]


# ---- Settings


def test_main_says_in_one_line_that_the_package_is_missing(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)  # what makes an import fail
    assert main(["--port", "0", "--redis", "redis://127.0.0.1"]) == 2
    assert capsys.readouterr().err == "kfserver: --redis (KF_REDIS) needs the redis package: pip install redis\n"


@needs_package
@pytest.mark.parametrize("url", [
    pytest.param("127.0.0.1:6379", id="no scheme"),
    pytest.param("http://127.0.0.1:6379", id="another scheme"),
    pytest.param("redis://127.0.0.1:port", id="no number"),
    pytest.param("redis://127.0.0.1:6379/0?no_such_option=1", id="unknown option"),
    pytest.param("redis://:hunter/2@127.0.0.1:6379", id="unquoted password"),
])
def test_shared_claims_say_in_one_line_that_the_address_is_wrong(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^--redis \(KF_REDIS\) takes an address like redis://[^\n]*$") as caught:
        Instance(url)
    assert "hunter" not in str(caught.value)


# ---- Several processes

HANDLERS = """
import os
from kfserver import HandlerRegistry

registry = HandlerRegistry()
handled = os.open("handled", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

@registry.on("text")
def keep(message):
    os.write(handled, message.key.encode() + b"\\n")
"""
PROGRAM = f"import kfserver, sys; kfserver.REDIS_TIMEOUT = {PATIENCE}; sys.exit(kfserver.main())"


class Process:
    """An instance in a process of its own."""

    def __init__(self, folder: pathlib.Path, url: str) -> None:
        command = [sys.executable, "-c", PROGRAM, "--host", "127.0.0.1", "--port", "0", "--redis", url,
                   "--log-level", "warning"]
        self._process = subprocess.Popen(
            command, cwd=str(folder), env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        # A read from a pipe has no time-out of its own.
        self._watchdog = threading.Timer(6 * PATIENCE, self._process.kill)
        self._watchdog.start()

    def wait_until_up(self) -> int:
        """The port, as the first line tells it."""
        assert self._process.stdout
        return int(self._process.stdout.readline().rstrip("/\n").rpartition(":")[2])

    def stop(self) -> Tuple[int, str]:
        """End it in peace: its status, and what it wrote about Redis."""
        self._process.terminate()
        output, _ = self._process.communicate()
        self._watchdog.cancel()
        self._watchdog.join()
        return self._process.returncode, "".join(line for line in output.splitlines() if "Redis" in line)


@contextlib.contextmanager
def processes(count: int, folder: pathlib.Path, url: str) -> Iterator[List[int]]:
    """So many instances for the length of a block, by their ports; each must come to a good end."""
    (folder / "handlers.py").write_text(HANDLERS)
    started = [Process(folder, url) for _ in range(count)]
    try:
        yield [process.wait_until_up() for process in started]
    finally:
        ends = [process.stop() for process in started]
    assert ends == [(0, "")] * count


class PairPusher(threading.Thread):
    """Sends each of its pushes to two instances at once, some at a time."""

    BATCH = 10

    def __init__(self, name: str, count: int, ports: Sequence[int]) -> None:
        super().__init__(name=name)
        self._count, self._ports = count, ports
        self.successes: List[int] = []  # of each push, one or two

    def run(self) -> None:
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(Client(port)) for port in self._ports]
            pairs = itertools.cycle(itertools.combinations(clients, 2))
            for first in range(0, self._count, self.BATCH):
                self._push(next(pairs), [post(push(self.name, number)) for number in range(first, first + self.BATCH)])

    def _push(self, pair: Tuple[Client, Client], requests: Sequence[bytes]) -> None:
        for client in pair:
            client.send(b"".join(requests))
        answers = [[client.read_answer().body for client in pair] for _ in requests]
        self.successes += [each.count(b"success") for each in answers]


@needs_package
def test_program_hands_each_message_over_once_whatever_instances_it_reaches(
        redis_server: RedisServer, store: Any, tmp_path: pathlib.Path) -> None:
    with processes(3, tmp_path, redis_server.url) as ports:
        pushers = [PairPusher(f"user{number}", 150, ports) for number in range(4)]
        for pusher in pushers:
            pusher.start()
        for pusher in pushers:
            pusher.join(3 * PATIENCE)
    successes = [count for pusher in pushers for count in pusher.successes]
    # A copy that overtakes the first by a hair is told to come again: the first could still be refused.
    assert (len(successes), set(successes) - {1, 2}) == (600, set())
    handled = (tmp_path / "handled").read_text().splitlines()
    assert len(handled) == len(set(handled)) == 600
