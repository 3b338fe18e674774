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
import signal
import socket
import subprocess
import sys
import threading
import time
from types import ModuleType
from typing import Any, Callable, Iterator, List, Optional, Sequence, Tuple, Union

import pytest
from support import PATIENCE, ROOT, Client, Program, Shop, local, no_thread_left, post, push, wait_until

import kfserver
from kfserver import (
    BeingTaken,
    KfError,
    KfServer,
    Request,
    Settings,
    SettingsError,
    SharedClaims,
    check_redis,
    main,
)

KEY = "app/user/text/1"
NAME = f"kfserver:{KEY}"  # in Redis, where it must stay: instances of different releases run side by side
# Milliseconds: what is safe is remembered for a day, and conversations for two, less what a slow machine takes.
DAY = range(86_400_000 - 30_000, 86_400_000 + 1)
TWO_DAYS = range(2 * 86_400_000 - 30_000, 2 * 86_400_000 + 1)

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

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """It has stopped for the length of a block, and starts anew."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """It does nothing for the length of a block, though the system takes connections and bytes for it."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.thaw()

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

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
    """A busy machine must not make Redis seem to be away; one that was away is found again soon."""
    monkeypatch.setattr(kfserver, "REDIS_TIMEOUT", PATIENCE)
    monkeypatch.setattr(kfserver, "REDIS_PATIENCE", PATIENCE)
    monkeypatch.setattr(kfserver, "REDIS_PAUSE", 0.05)


Instances = Callable[..., SharedClaims]


@pytest.fixture
def instances(redis_server: RedisServer, store: Any) -> Iterator[Instances]:
    """Makes the claims of an instance on the Redis, or on another address."""
    with contextlib.ExitStack() as made:
        def make(url: str = redis_server.url) -> SharedClaims:
            return made.enter_context(contextlib.closing(SharedClaims(url, 100)))
        yield make


@pytest.fixture
def one(instances: Instances) -> SharedClaims:
    """The claims of an instance."""
    return instances()


@pytest.fixture
def other(instances: Instances) -> SharedClaims:
    """Those of another on the same Redis."""
    return instances()


def take(claims: SharedClaims, key: str = KEY) -> Union[bool, str]:
    """Claim a message, and confirm that: True, False for a repeat, or "being taken"."""
    try:
        fate = claims.claim(key) and claims.confirm([key])[0]
    except BeingTaken as error:
        fate = error
    return "being taken" if isinstance(fate, BeingTaken) else bool(fate)


def wait_for_mark(store: Any, key: str = KEY) -> None:
    """Until Redis has it that the message is safe; before that, whatever was owed earlier has been written."""
    wait_until(lambda: store.pttl(f"kfserver:{key}") in DAY)


class Proxy:
    """Stands before the Redis, and passes requests on ``delay`` seconds late."""

    def __init__(self, port: int) -> None:
        self.delay = 0.0
        self._port, self._listener = port, socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(10)
        self._open: List[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}/0"

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            self._open += [client, server]
            for each in ((client, server, True), (server, client, False)):
                threading.Thread(target=self._pass, args=each, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        with contextlib.suppress(OSError):
            while True:
                data = source.recv(65536)
                if not data:
                    break
                time.sleep(self.delay if is_request else 0.0)
                target.sendall(data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        for each in self._open:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.fixture
def proxy(redis_server: RedisServer) -> Iterator[Proxy]:
    """A proxy before the Redis."""
    with contextlib.closing(Proxy(redis_server.port)) as made:
        yield made


# ---- Claims


@needs_package
def test_shared_claims_are_confirmed_for_exactly_one(one: SharedClaims, other: SharedClaims) -> None:
    assert take(one) is True
    one.accept([KEY])
    wait_until(lambda: take(other) is False)
    assert take(one) is False
    assert take(other, "app/user/text/2") is True


@needs_package
def test_shared_claims_confirm_refuses_while_the_first_may_yet_be_refused(
        one: SharedClaims, other: SharedClaims) -> None:
    assert take(one) is True
    assert take(other) == "being taken"  # a success here, and a refusal there, would lose the message


@needs_package
def test_shared_claims_confirm_judges_each_claim_of_a_round(
        one: SharedClaims, other: SharedClaims, store: Any) -> None:
    keys = ["free", "claimed", "safe", "free too"]
    for key in ("claimed", "safe"):
        assert take(other, key) is True
    other.accept(["safe"])
    wait_for_mark(store, "safe")
    for key in keys:
        one.claim(key)
    fates = one.confirm(keys)
    assert [fate if isinstance(fate, bool) else type(fate) for fate in fates] == [True, BeingTaken, False, True]
    assert [take(one, key) for key in keys] == ["being taken", "being taken", False, "being taken"]


@needs_package
def test_shared_claims_confirm_of_no_claims_is_nothing(one: SharedClaims) -> None:
    assert one.confirm([]) == []


@needs_package
def test_shared_claims_claim_lives_for_3_s_and_a_day_when_accepted(one: SharedClaims, store: Any) -> None:
    take(one)
    assert store.pttl(NAME) in range(3000 + 1)
    one.accept([KEY])
    wait_for_mark(store)


@needs_package
def test_shared_claims_claim_of_who_has_died_runs_out(
        one: SharedClaims, other: SharedClaims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "CLAIM_MS", 100)
    assert take(one) is True
    wait_until(lambda: take(other) is True)


@needs_package
def test_shared_claims_accept_marks_what_took_longer_than_the_claim_lived(one: SharedClaims, store: Any) -> None:
    take(one)
    store.delete(NAME)
    one.accept([KEY])
    wait_for_mark(store)


@needs_package
def test_shared_claims_finish_is_remembered_by_all_for_a_day(
        one: SharedClaims, other: SharedClaims, store: Any) -> None:
    take(one)
    one.accept([KEY])
    one.finish(KEY)
    wait_for_mark(store)
    assert take(other) is False


@needs_package
def test_shared_claims_finish_does_not_write_again_what_accept_wrote(one: SharedClaims, store: Any) -> None:
    take(one)
    one.accept([KEY])
    wait_for_mark(store)
    store.delete(NAME)
    one.finish(KEY)
    one.restore("later")
    wait_for_mark(store, "later")
    assert store.exists(NAME) == 0


@needs_package
@pytest.mark.parametrize("accepted", [False, True], ids=["refused", "failed for good"])
def test_shared_claims_release_lets_any_instance_claim(
        one: SharedClaims, other: SharedClaims, store: Any, accepted: bool) -> None:
    take(one)
    if accepted:
        one.accept([KEY])
        wait_for_mark(store)
        assert take(other) is False  # and must not be remembered there as handled
    one.release(KEY)
    wait_until(lambda: store.exists(NAME) == 0)
    assert take(other) is True
    assert take(one) == "being taken"


@needs_package
def test_shared_claims_release_leaves_alone_what_is_anothers_by_now(
        one: SharedClaims, other: SharedClaims, store: Any) -> None:
    take(one)
    store.delete(NAME)  # as if its time had run out
    assert take(other) is True
    one.release(KEY)
    one.restore("later")
    wait_for_mark(store, "later")
    assert store.exists(NAME) == 1


@needs_package
def test_shared_claims_release_of_what_was_not_confirmed_leaves_an_old_mark_alone(
        one: SharedClaims, store: Any) -> None:
    take(one)
    one.accept([KEY])
    one.finish(KEY)
    for number in range(100):  # so that it is forgotten here
        one.finish(str(number))
    assert one.claim(KEY)
    one.release(KEY)  # as when the queue is full
    one.restore("later")
    wait_for_mark(store, "later")
    assert store.pttl(NAME) in DAY


@needs_package
def test_shared_claims_release_that_was_lost_refuses_nobody_here(one: SharedClaims, store: Any) -> None:
    take(one)
    claim = store.get(NAME)
    one.release(KEY)
    wait_until(lambda: store.exists(NAME) == 0)
    store.set(NAME, claim)  # as if Redis had never got the release
    assert take(one) is True, "one's own claim refuses nobody"


@needs_package
def test_shared_claims_release_that_comes_late_does_not_undo_a_newer_claim(
        instances: Instances, proxy: Proxy, store: Any) -> None:
    claims = instances(proxy.url)
    take(claims, "first")
    proxy.delay = 0.1
    for _ in range(3):
        assert take(claims) is True
        claims.release(KEY)
    assert take(claims) is True
    proxy.delay = 0.0
    claims.restore("later")
    wait_for_mark(store, "later")
    assert store.exists(NAME) == 1


@needs_package
def test_shared_claims_restore_marks_what_was_left_by_the_last_run(
        one: SharedClaims, other: SharedClaims, store: Any) -> None:
    one.restore(KEY)
    wait_for_mark(store)
    assert (take(one), take(other)) == (False, False)


# ---- Conversations


@needs_package
def test_shared_claims_keep_a_conversation_for_all_instances(
        one: SharedClaims, other: SharedClaims, store: Any) -> None:
    name, text = "app/用户 \ud800", '{"step": "é\ud800"}'
    assert one.load_session(name) == ""
    one.save_session(name, text)
    assert other.load_session(name) == text
    assert [store.pttl(each) in TWO_DAYS for each in store.keys("kfserver-session:*")] == [True]
    other.save_session(name, "")
    assert one.load_session(name) == ""
    assert store.keys("kfserver-session:*") == []


@needs_package
def test_shared_claims_say_that_a_conversation_is_not_to_be_had_while_redis_is_away(
        redis_server: RedisServer, one: SharedClaims) -> None:
    one.save_session("name", "text")
    with redis_server.stopped():
        for function, arguments in ((one.load_session, ("name",)), (one.save_session, ("name", "other"))):
            with pytest.raises(ConnectionError) as caught:
                function(*arguments)
            assert not isinstance(caught.value, KfError), "such an error would be the last of its message"

    def is_back() -> bool:
        with contextlib.suppress(ConnectionError):
            return one.load_session("name") == ""
        return False
    wait_until(is_back)


# ---- Time


class Resolver:
    """Takes the place of `socket.getaddrinfo`, and does not answer before it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_answer = threading.Event()
        self._resolve = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, *arguments: Any) -> Any:
        """Wait, and resolve."""
        self.may_answer.wait(PATIENCE)
        return self._resolve(*arguments)


@needs_package
def test_shared_claims_wait_for_no_resolver_and_write_nothing_after_the_end(
        instances: Instances, store: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    store.ping()
    monkeypatch.setattr(kfserver, "REDIS_TIMEOUT", 0.1)
    monkeypatch.setattr(kfserver, "REDIS_PATIENCE", 0.2)
    with no_thread_left():
        resolver = Resolver(monkeypatch)
        claims, started = instances(), time.monotonic()
        assert take(claims) is True
        claims.accept([KEY])
        wait_until(lambda: take(claims, str(time.monotonic())) is True and warnings_in(caplog) == ["Redis is away"])
        claims.close()
        assert time.monotonic() - started < PATIENCE / 2
        resolver.may_answer.set()
    assert store.keys() == []


@needs_package
def test_kf_server_asks_redis_once_for_pushes_that_come_together(
        proxy: Proxy, servers: Servers, caplog: pytest.LogCaptureFixture) -> None:
    server = servers(redis=proxy.url)
    server.feed(push(number=1))
    proxy.delay, started = 0.25, time.monotonic()
    answers = server.endpoint.handle_all([Request("POST", "/", "", push(number=number)) for number in range(40)])
    assert [answer.outcome for answer in answers].count("accepted") == 39
    assert time.monotonic() - started < 40 * proxy.delay / 2
    proxy.delay = 0.0
    assert server.join(PATIENCE)
    assert warnings_in(caplog) == []


@needs_package
def test_shared_claims_of_several_threads_share_a_pipeline(instances: Instances, proxy: Proxy, store: Any) -> None:
    claims = instances(proxy.url)
    take(claims, "first")
    proxy.delay, started = 0.25, time.monotonic()
    fates: List[Union[bool, str]] = []
    threads = [threading.Thread(target=lambda key: fates.append(take(claims, key)), args=(str(number),))
               for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert fates == [True] * 20
    assert time.monotonic() - started < 20 * proxy.delay / 2


# ---- Servers


Servers = Callable[..., KfServer]


@pytest.fixture
def servers(redis_server: RedisServer, store: Any, shop: Shop) -> Iterator[Servers]:
    """Makes servers on the one Redis, with the handlers of the one shop."""
    with contextlib.ExitStack() as made:
        def make(**settings: Any) -> KfServer:
            server = KfServer(shop.registry, Settings(**{"redis": redis_server.url, **settings}))
            made.callback(server.stop)
            return server
        yield make
        shop.open.set()


@needs_package
def test_kf_server_shares_its_claims(servers: Servers, store: Any, shop: Shop) -> None:
    for server in (servers(), servers()):
        assert server.feed(push(number=1)).body == b"success"
        assert server.join(PATIENCE)
        wait_for_mark(store)
    assert shop.served == ["hi"]


@needs_package
def test_kf_server_claims_for_a_day_what_is_in_a_handlers_hands(servers: Servers, store: Any, shop: Shop) -> None:
    shop.open.clear()
    servers().feed(push(number=1))
    wait_until(lambda: shop.served)
    wait_for_mark(store)


@needs_package
def test_kf_server_releases_what_failed_for_good(servers: Servers, store: Any) -> None:
    server = servers(tries=1)
    server.feed(push(number=1, content="bad"))
    assert server.join(PATIENCE)
    wait_until(lambda: store.exists(NAME) == 0)


@needs_package
def test_kf_server_refuses_what_another_is_just_taking_and_gives_its_place_back(
        servers: Servers, store: Any, shop: Shop) -> None:
    server = servers(queue_size=1)
    store.set(NAME, "another:1")
    assert [server.feed(push(number=1)).status for _ in range(3)] == [503] * 3
    store.set(NAME, "+another:1")
    assert [server.feed(push(number=1)).outcome for _ in range(3)] == ["repeat"] * 3
    store.delete(NAME)
    assert server.feed(push(number=1)).outcome == "accepted"
    assert server.join(PATIENCE)
    assert shop.served == ["hi"]


@needs_package
def test_kf_server_asks_redis_for_nothing_that_it_has_no_room_for(servers: Servers, store: Any) -> None:
    server = servers()
    server.stop()
    assert server.feed(push(number=1)).status == 503
    assert store.exists(NAME) == 0
    another = servers()
    assert another.feed(push(number=1)).outcome == "accepted"
    assert another.join(PATIENCE)


@needs_package
def test_kf_server_stop_writes_what_is_owed_and_nothing_goes_on_after_it(
        redis_server: RedisServer, store: Any, shop: Shop) -> None:
    server = KfServer(shop.registry, local(redis=redis_server.url)).start()
    for number in range(50):
        server.feed(push(number=number))
    server.stop()
    assert len([key for key in store.keys("*") if store.pttl(key) in DAY]) == 50
    wait_until(lambda: "kfserver-redis" not in [thread.name for thread in threading.enumerate()])


# ---- Redis away, and back


def warnings_in(caplog: pytest.LogCaptureFixture) -> List[str]:
    """The beginnings of the log's warnings, and of what is worse."""
    return [record.getMessage()[:13] for record in caplog.records if record.levelno >= logging.WARNING]


@needs_package
def test_kf_server_refuses_nothing_while_redis_is_away_and_shares_again_when_it_is_back(
        redis_server: RedisServer, servers: Servers, store: Any, shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    server = servers()
    assert server.feed(push(number=1)).outcome == "accepted"
    wait_for_mark(store)
    with redis_server.stopped():
        assert [server.feed(push(number=number)).outcome for number in (2, 3, 2, 1)] == [
            "accepted", "accepted", "repeat", "repeat"]
        assert server.join(PATIENCE)
        wait_until(lambda: warnings_in(caplog))
    wait_until(lambda: warnings_in(caplog) == ["Redis is away", "Redis is back"])  # nobody has to push for that
    for number in (2, 3):
        wait_for_mark(store, f"app/user/text/{number}")  # which was owed
    assert [servers().feed(push(number=number)).outcome for number in (2, 3)] == ["repeat", "repeat"]
    assert len(shop.served) == 3


@needs_package
def test_shared_claims_owe_a_release_while_redis_is_away(
        redis_server: RedisServer, one: SharedClaims, store: Any) -> None:
    take(one)
    with redis_server.frozen():
        one.release(KEY)
    wait_until(lambda: store.exists(NAME) == 0)


@needs_package
def test_shared_claims_owe_the_newest_state_of_each_message_and_so_many_at_most(
        redis_server: RedisServer, one: SharedClaims, store: Any, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kfserver, "MAX_OWED", 10)
    with redis_server.stopped():
        for number in range(20):
            assert take(one, str(number)) is True
            one.accept([str(number)])
        one.release("19")
        wait_until(lambda: warnings_in(caplog))
    wait_for_mark(store, "18")
    assert sorted(store.keys("kfserver:*")) == sorted(f"kfserver:{number}".encode() for number in range(10, 19))


@needs_package
def test_shared_claims_make_up_for_what_a_hiccup_of_redis_kept_from_being_written(
        redis_server: RedisServer, one: SharedClaims, store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    one = SharedClaims(redis_server.url, 100)
    take(one, "first")
    with contextlib.closing(one), redis_server.frozen():
        started = time.monotonic()
        for number in range(20):  # one of them waits, until Redis is found to be slow
            assert take(one, str(number)) is True
            one.accept([str(number)])
        assert time.monotonic() - started < 2.0  # the platform's patience
        one.finish("0")
        redis_server.thaw()
        for number in range(20):
            wait_for_mark(store, str(number))
        wait_until(lambda: take(one, str(time.monotonic())) is True)


@needs_package
def test_kf_server_starts_though_redis_is_away(shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # nobody else gets this port, and nobody answers on it
        server = KfServer(shop.registry, Settings(redis=f"redis://127.0.0.1:{unheard.getsockname()[1]}"))
        assert [server.feed(push(number=1)).outcome for _ in range(2)] == ["accepted", "repeat"]
        assert server.join(PATIENCE)
        server.stop()
    assert warnings_in(caplog) == ["Redis is away"]


@needs_package
def test_shared_claims_take_a_redis_that_cannot_be_written_to_for_away(
        one: SharedClaims, store: Any, caplog: pytest.LogCaptureFixture) -> None:
    store.config_set("min-replicas-to-write", 1)
    try:
        assert take(one) is True
        one.accept([KEY])
        assert warnings_in(caplog) == ["Redis is away"]
    finally:
        store.config_set("min-replicas-to-write", 0)
    wait_until(lambda: warnings_in(caplog) == ["Redis is away", "Redis is back"])
    wait_for_mark(store)


@needs_package
def test_shared_claims_go_on_alone_while_there_is_no_thread_to_spare(
        one: SharedClaims, other: SharedClaims, store: Any, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")
    with monkeypatch.context() as shortage:
        shortage.setattr(threading.Thread, "start", start)
        assert take(one) is True
        one.accept([KEY])
        assert warnings_in(caplog) == ["Redis is away"]
    one.accept([KEY])
    wait_for_mark(store)
    assert take(other) is False


class SilentServer:
    """Takes connections on 127.0.0.1, and never says a word."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(100)
        self.url = f"redis://127.0.0.1:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


@needs_package
def test_shared_claims_wait_once_for_a_redis_that_is_silent_and_end_in_time(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.undo()
    with contextlib.closing(SilentServer()) as silent, no_thread_left():
        claims, started = SharedClaims(silent.url, 100), time.monotonic()
        for number in range(100):  # 10 s if each were waited for
            assert take(claims, str(number)) is True
            claims.finish(str(number))
        assert time.monotonic() - started < 2.0  # the platform's patience; 0.1 s on a machine that is not busy
        wait_until(lambda: warnings_in(caplog) == ["Redis is away"])
        claims.close()


FORK = """
import os, sys
from kfserver import HandlerRegistry, KfServer, Settings

bodies = [body.encode() for body in sys.argv[2:]]
registry = HandlerRegistry()
registry.on("text")(lambda message: None)
server = KfServer(registry, Settings(redis=sys.argv[1]))
outcomes = [server.feed(bodies[0]).outcome]
child = os.fork()
if not child:
    accepted = [server.feed(body).outcome == "accepted" for body in bodies]
    server.stop()
    print("child", accepted, flush=True)
    os._exit(0)
os.waitpid(child, 0)
outcomes.append(server.feed(bodies[1]).outcome)
server.stop()
print("parent", outcomes)
"""


@needs_package
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_kf_server_of_a_forked_process_claims_for_itself(redis_server: RedisServer, store: Any) -> None:
    bodies = [push(number=number).decode() for number in (1, 2)]
    result = subprocess.run([sys.executable, "-c", f"import kfserver; kfserver.REDIS_TIMEOUT = {PATIENCE}" + FORK,
                             redis_server.url, *bodies], cwd=str(ROOT), capture_output=True, timeout=6 * PATIENCE,
                            text=True)
    told = dict(line.split(" ", 1) for line in result.stdout.splitlines())
    assert told["parent"] == "['accepted', 'repeat']", result.stderr
    assert told["child"] == "[False, True]"


BEFORE_FIRST_USE = """
import kfserver, os, sys

kfserver.REDIS_TIMEOUT = float(sys.argv[2])
claims = kfserver.SharedClaims(sys.argv[1], 10)
child = os.fork()
if child:
    os.waitpid(child, 0)
claims.claim("key")
print(claims.confirm(["key"]), flush=True)
os._exit(0)
"""


@needs_package
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_shared_claims_made_before_a_fork_are_not_the_same_instance_in_both(
        redis_server: RedisServer, store: Any) -> None:
    result = subprocess.run([sys.executable, "-c", BEFORE_FIRST_USE, redis_server.url, str(PATIENCE)], cwd=str(ROOT),
                            capture_output=True, timeout=2 * PATIENCE, text=True)
    assert result.stdout.startswith("[True]\n[BeingTaken("), result.stderr


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
        SharedClaims(url, 100)
    assert "hunter" not in str(caught.value)


@needs_package
@pytest.mark.parametrize("options", [
    "decode_responses=True", "encoding=utf-16", "encoding=utf-16&decode_responses=True", "socket_timeout=0.000001",
    "socket_timeout=1000", "retry_on_timeout=True", "health_check_interval=1", "max_connections=1", "client_name=kf",
    "protocol=3"])
def test_shared_claims_take_no_harm_from_options_in_the_address(
        instances: Instances, redis_server: RedisServer, store: Any, options: str) -> None:
    one, other = (instances(f"{redis_server.url}?{options}") for _ in range(2))
    assert (take(one), take(other)) == (True, "being taken")
    one.accept([KEY])
    wait_for_mark(store)
    assert take(other) is False
    one.save_session("name", "é")
    assert other.load_session("name") == "é"


@needs_package
def test_shared_claims_do_without_what_version_3_of_the_package_lacks(
        instances: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    import redis
    monkeypatch.delattr(redis, "retry")
    assert take(instances()) is True


def test_shared_claims_say_that_what_is_called_redis_is_not_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", ModuleType("redis"))  # as from a redis.py beside the handlers
    with pytest.raises(SettingsError, match=r"needs the redis package \(.* is not it, or is broken\): pip install"):
        SharedClaims("redis://127.0.0.1", 100)


@needs_package
def test_check_redis_is_content_with_one_that_answers(redis_server: RedisServer, store: Any) -> None:
    with no_thread_left():
        check_redis(Settings())
        check_redis(Settings(redis=redis_server.url))


@needs_package
@pytest.mark.usefixtures("empty_folder")
def test_main_check_says_that_redis_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        assert main(["--check", "--redis", f"redis://:hunter2@127.0.0.1:{unheard.getsockname()[1]}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kfserver: --redis (KF_REDIS): no good answer from there (ConnectionError): ")
    assert (error.count("\n"), "hunter" in error) == (1, False)


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


@contextlib.contextmanager
def processes(count: int, folder: pathlib.Path, url: str) -> Iterator[List[int]]:
    """So many instances for the length of a block, by their ports; each must come to a good end."""
    (folder / "handlers.py").write_text(HANDLERS)
    command = [sys.executable, "-c", PROGRAM, "--host", "127.0.0.1", "--port", "0", "--redis", url,
               "--log-level", "warning"]
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(Program(command=command, folder=folder, PYTHONPATH=str(ROOT)))
                   for _ in range(count)]
        yield [program.port for program in started]
        for program in started:
            assert program.end() == 0
            assert "Redis" not in program.output


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
