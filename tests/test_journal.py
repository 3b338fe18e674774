"""The journal: what was acknowledged outlives the process and is handled, whatever becomes of the disk meanwhile."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import re
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
from typing import Any, Callable, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import unquote, urlsplit

import pytest
from support import PATIENCE, ROOT, Shop, push, wait_until

import kfserver
from kfserver import (
    JOURNAL_ID,
    JOURNAL_VERSION,
    call_later,
    HandlerRegistry,
    Journal,
    JournalError,
    KfServer,
    Message,
    Request,
    Response,
    Settings,
    SettingsError,
    attempt,
    dedup_key,
    main,
    parse,
)

# The clock of the journals that `opened` makes: Unix seconds.
NOW = 1_700_000_000.0
WAITING, FINISHED, DEAD = kfserver.WAITING, kfserver.FINISHED, kfserver.DEAD
# How the tests themselves open a file, apart from the connections of kfserver's that they watch.
connect = sqlite3.connect


class Stored(NamedTuple):
    """A row of the journal, as another program reads it."""

    key: str
    state: int
    tries: int
    payload: Optional[bytes]
    error: Optional[str]


class Connections:
    """The connections that kfserver opens, by path: to listen to them, or to hamper them by a ``pragma``."""

    def __init__(self) -> None:
        self._opened: Dict[str, sqlite3.Connection] = {}
        self._pragma = ""

    def open(self, path: str, **options: Any) -> sqlite3.Connection:
        """Stands in for ``sqlite3.connect``."""
        connection = connect(path, **options)
        self._opened[unquote(urlsplit(path).path)] = connection
        if self._pragma:
            connection.execute(self._pragma)
        return connection

    def ask(self, path: str, question: str) -> Any:
        """The one value that the connection to a file answers."""
        return self._opened[path].execute(question).fetchone()[0]

    def listen(self, path: str) -> List[str]:
        """The statements that are executed on a file from now on."""
        heard: List[str] = []
        self._opened[path].set_trace_callback(lambda statement: heard.append(statement))  # 3.7 hashes it
        return heard

    @contextlib.contextmanager
    def hampered(self, path: str, pragma: str) -> Iterator[None]:
        """Every connection to the file, the one that is open too, is under a pragma."""
        self._opened[path].execute(pragma)
        self._pragma = pragma
        yield
        self._pragma = ""
        # The program opens the file anew when it could not write; if it could all the same, this is still the old one.
        with contextlib.suppress(sqlite3.ProgrammingError):
            self._opened[path].execute("PRAGMA query_only = OFF")


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    """The connections that kfserver opens in this test."""
    made = Connections()
    monkeypatch.setattr(sqlite3, "connect", made.open)
    return made


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    """Where the journal of a test is, alone in its folder."""
    (tmp_path / "disk").mkdir()
    return str(tmp_path / "disk" / "kf.db")


Start = Callable[..., KfServer]


@pytest.fixture
def start(path: str) -> Iterator[Start]:
    """Makes servers with the journal of this test, and stops them at its end."""
    with contextlib.ExitStack() as servers:
        def make(registry: HandlerRegistry, **settings: Any) -> KfServer:
            server = KfServer(registry, Settings(**{"journal": path, "grace": PATIENCE, **settings}))
            servers.callback(server.stop)
            return server.open()
        yield make


def stored(path: str) -> List[Stored]:
    """What is in the journal, oldest first, on a connection of our own: only what is committed is seen."""
    with contextlib.closing(connect(path)) as db:
        found = db.execute("SELECT key, state, tries, payload, error FROM messages ORDER BY id").fetchall()
    return [Stored(*row) for row in found]


def states(path: str) -> Dict[str, int]:
    """The number and the state of each message of "user" in the journal."""
    return {row.key.rpartition("/")[2]: row.state for row in stored(path)}


def leave(path: str, *bodies: bytes) -> Journal:
    """An open journal with messages that were acknowledged and not handled, as a killed process leaves them."""
    journal = Journal(Settings(journal=path, dedup_size=100), call_later)
    for body in bodies:
        journal.add([(dedup_key(parse(body)), body)])
    return journal


def opened(path: str, **settings: Any) -> ContextManager[Journal]:
    """An open journal, for the length of a block, whose later looks at the file never come."""
    return contextlib.closing(Journal(Settings(journal=path, **settings), lambda seconds, job: None, lambda: NOW))


def left_by_a_kill(path: str) -> List[Stored]:
    """What would be in the journal if the process were killed now."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kf.db", "kf.db-wal"):
            with contextlib.suppress(FileNotFoundError):
                shutil.copy(os.path.join(os.path.dirname(path), name), folder)
        return stored(os.path.join(folder, "kf.db"))


def outcomes(server: KfServer, *bodies: bytes) -> List[str]:
    """The word for each push's answer, "refused 503" without its reason; each is waited for until it is handled."""
    words: List[str] = []
    for body in bodies:
        words.append(server.feed(body).outcome.partition(":")[0])
        assert server.join(PATIENCE)
    return words


def errors_in(caplog: pytest.LogCaptureFixture) -> List[str]:
    """The lines of the log at the level ERROR."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


# ---- Written down, and marked


def test_kf_server_writes_a_message_down_before_it_answers(start: Start, shop: Shop, path: str) -> None:
    shop.open.clear()
    server = start(shop.registry)
    assert server.feed(push(number=1)).body == b"success"
    assert stored(path) == [Stored("app/user/text/1", WAITING, 0, push(number=1), None)]


def test_kf_server_writes_a_message_down_before_its_handler_sees_it(start: Start, path: str) -> None:
    registry, seen = HandlerRegistry(), []
    registry.on("text")(lambda message: seen.append(states(path)))
    assert outcomes(start(registry), push(number=1)) == ["accepted"]
    assert seen == [{"1": WAITING}]


def test_kf_server_marks_what_is_through(start: Start, shop: Shop, path: str) -> None:
    assert outcomes(start(shop.registry), push(number=1)) == ["accepted"]
    assert stored(path) == [Stored("app/user/text/1", FINISHED, 0, None, None)]


def test_kf_server_writes_nothing_down_of_what_it_refuses(start: Start, shop: Shop, path: str) -> None:
    shop.open.clear()
    server = start(shop.registry, workers=1, queue_size=1)
    server.feed(push(number=1))
    wait_until(lambda: shop.served)
    assert [server.feed(push(number=number)).status for number in (2, 3)] == [200, 503]
    assert server.feed(b"?").status == 400
    assert states(path) == {"1": WAITING, "2": WAITING}


def test_kf_server_leaves_nothing_of_what_users_wrote_when_it_was_handled(start: Start, shop: Shop, path: str) -> None:
    server = start(shop.registry)
    assert outcomes(server, push(number=1, content="a secret")) == ["accepted"]
    server.stop()
    files = list(pathlib.Path(path).parent.iterdir())
    assert [file.name for file in files if b"a secret" in file.read_bytes()] == []


class Misbehaviour(Exception):
    """An error of the handlers' own."""


@pytest.mark.parametrize("error", [ValueError, KeyError, Misbehaviour, SystemExit])
def test_kf_server_keeps_what_failed_for_good_with_its_error_and_without_a_users_words(
        start: Start, path: str, error: Callable[[str], BaseException]) -> None:
    registry = HandlerRegistry()

    @registry.on("text")
    def fail(message: Message) -> None:
        raise error(message.content)
    assert outcomes(start(registry, tries=1), push(number=1, content="a secret")) == ["accepted"]
    row, = stored(path)
    assert row[:4] == ("app/user/text/1", DEAD, 1, push(number=1, content="a secret"))
    assert re.fullmatch(error.__name__ + r" at test_journal\.py:\d+", row.error or "")


# ---- Restart


def test_kf_server_handles_what_the_last_process_left_oldest_first(start: Start, shop: Shop, path: str) -> None:
    senders = ["ann", "bob", "eve"]
    leave(path, *[push(sender, number, f"{sender} {number}") for number in (1, 2) for sender in senders]).close()
    server = start(shop.registry, workers=1)
    assert server.join(PATIENCE)
    assert shop.served == ["ann 1", "bob 1", "eve 1", "ann 2", "bob 2", "eve 2"]
    assert {row.state for row in stored(path)} == {FINISHED}


def test_kf_server_keeps_each_senders_order_over_a_restart(start: Start, shop: Shop, path: str) -> None:
    leave(path, *[push("user", number, str(number)) for number in range(20)]).close()
    server = start(shop.registry)
    assert outcomes(server, push("user", 20, "20")) == ["accepted"]  # behind those that wait
    assert shop.served == [str(number) for number in range(21)]


def test_kf_server_handles_what_was_left_though_it_is_more_than_fits(start: Start, shop: Shop, path: str) -> None:
    leave(path, *[push(number=number, content=str(number)) for number in range(5)]).close()
    assert start(shop.registry, queue_size=1, dedup_size=2).join(PATIENCE)
    assert shop.served == ["0", "1", "2", "3", "4"]


def test_kf_server_drops_repeats_of_what_was_handled_before_a_restart(start: Start, shop: Shop) -> None:
    first = start(shop.registry)
    assert outcomes(first, push(number=1)) == ["accepted"]
    first.stop()
    assert outcomes(start(shop.registry), push(number=1), push(number=2)) == ["repeat", "accepted"]
    assert len(shop.served) == 2


def test_kf_server_drops_repeats_of_what_was_left_by_the_last_process(start: Start, shop: Shop, path: str) -> None:
    leave(path, push(number=1)).close()
    shop.open.clear()
    server = start(shop.registry)
    assert server.feed(push(number=1)).outcome == "repeat"
    shop.open.set()
    assert server.join(PATIENCE)
    assert len(shop.served) == 1


def test_kf_server_leaves_the_dead_alone_and_takes_them_when_they_come_again(
        start: Start, shop: Shop, path: str) -> None:
    left = leave(path, push(number=1))
    left.fail("app/user/text/1", "ValueError")
    left.close()
    server = start(shop.registry)
    assert server.join(PATIENCE)
    assert shop.served == []
    assert outcomes(server, push(number=1)) == ["accepted"]
    assert states(path) == {"1": FINISHED}


def test_kf_server_counts_tries_over_a_restart(start: Start, path: str) -> None:
    left = leave(path, push(number=1))
    left.tried("app/user/text/1", 2)
    left.close()
    registry, failures = HandlerRegistry(), []
    registry.on("text")(lambda message: 1 / 0)
    registry.on_error(lambda message, error: failures.append(message.key))
    assert start(registry, tries=3).join(PATIENCE)  # without the seconds that lie between two tries
    assert failures == ["app/user/text/1"]
    assert [(row.state, row.tries) for row in stored(path)] == [(DEAD, 3)]


def test_kf_server_writes_down_a_failed_try_that_another_will_follow(
        start: Start, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LONGEST_PAUSE", 0.01)
    registry, begun, release = HandlerRegistry(), [], threading.Event()

    @registry.on("text")
    def fail_once(message: Message) -> None:
        begun.append(message.key)
        if len(begun) == 1:
            raise ValueError
        release.wait(PATIENCE)
    server = start(registry, tries=2, grace=PATIENCE)
    server.feed(push(number=1))
    wait_until(lambda: len(begun) == 2)
    assert [(row.state, row.tries) for row in stored(path)] == [(WAITING, 1)]
    release.set()


def test_journal_opens_after_a_kill_in_the_middle_of_a_checkpoint(path: str, tmp_path: pathlib.Path) -> None:
    # The first page tells of pages that the file does not have yet: only the log beside it has them.
    left = str(tmp_path / "left.db")
    with opened(path) as journal:
        journal.add([(f"a/{number}", bytes(1000)) for number in range(100)])
        for suffix in ("", "-wal"):
            shutil.copy(path + suffix, left + suffix)
    with open(path, "rb") as complete, open(left, "r+b") as file:
        file.write(complete.read(4096))
    assert main(["--check", "--journal", left]) == 0
    with opened(left) as journal:
        assert len(journal.waiting()) == 100


def test_kf_server_starts_though_a_message_that_was_left_cannot_be_read(start: Start, shop: Shop, path: str) -> None:
    left = leave(path)
    left.add([("app/user/text/1", b"?")])
    left.add([("app/user/text/2", push(number=2, content="good"))])
    left.close()
    assert start(shop.registry).join(PATIENCE)
    assert shop.served == ["good"]
    assert states(path) == {"1": DEAD, "2": FINISHED}


def test_journal_recovers_from_an_error_that_nobody_foresaw(path: str) -> None:
    with contextlib.closing(Journal(Settings(journal=path), call_later)) as journal:
        with pytest.raises(JournalError):
            journal.add([("a/1", b""), ("\ud83d", b"")])
        journal.add([("a/2", b"")])
        assert journal.healthy
    assert [row.key for row in stored(path)] == ["a/2"]


def test_journal_keeps_a_mark_that_was_to_share_a_commit_with_what_cannot_be_stored(path: str) -> None:
    with contextlib.closing(Journal(Settings(journal=path), lambda seconds, job: None)) as journal:
        journal.add([("a/1", b"")])
        journal.finish("a/1")
        with pytest.raises(JournalError):
            journal.add([("\ud83d", b"")])
    assert stored(path)[0].state == FINISHED


def test_journal_looks_again_though_nothing_comes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    due: List[Callable[[], None]] = []
    with contextlib.closing(Journal(Settings(journal=path), lambda seconds, job: due.append(job))) as journal:
        journal.add([("a/1", b"")])
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "_commit", fail_to_write)
            journal.finish("a/1")
            journal.flush()
            due.pop()()
            assert (journal.healthy, len(due)) == (False, 1)
        due.pop()()
        assert (journal.healthy, due) == (True, [])
        assert stored(path)[0].state == FINISHED


def fail_to_write(file: Journal, changes: object) -> None:
    """What a full disk does."""
    raise OSError("no space left on device")


def test_kf_server_leaves_a_message_to_the_next_start_that_was_in_hand_when_it_stopped(
        start: Start, shop: Shop, path: str, caplog: pytest.LogCaptureFixture) -> None:
    shop.open.clear()
    first = start(shop.registry, grace=0.0)
    first.feed(push(number=1))
    wait_until(lambda: shop.served)
    assert first.stop() == ["app/user/text/1"]
    second = Shop()
    assert start(second.registry).join(PATIENCE)
    assert second.served == ["hi"]
    shop.open.set()
    assert first.join(PATIENCE)  # its handler comes to its end now, and the journal is not its own any more
    assert errors_in(caplog) == []


def test_main_check_leaves_the_journal_to_the_server_that_runs(path: str) -> None:
    with contextlib.closing(leave(path, push(number=1))):
        assert main(["--check", "--journal", path]) == 0
        assert states(path) == {"1": WAITING}


# ---- Commits


def test_kf_server_writes_pushes_that_come_together_in_one_commit(
        start: Start, shop: Shop, path: str, connections: Connections) -> None:
    shop.open.clear()
    server = start(shop.registry)
    heard = connections.listen(path)
    requests = [Request("POST", "/", "", push(f"user {number}")) for number in range(10)]
    assert [response.status for response in server.endpoint.handle_all(requests)] == [200] * 10
    assert heard.count("COMMIT") == 1


def test_journal_writes_what_threads_add_meanwhile_in_one_commit(
        path: str, connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LOCK_SECONDS", PATIENCE)
    asked: List[str] = []

    def messages(key: str) -> Iterator[Tuple[str, bytes]]:
        yield key, b""
        asked.append(key)  # all that is left to do is to write
    with opened(path) as journal:
        with locked(path, connections):  # the first thread waits, and the others for the first
            heard = connections.listen(path)
            threads = [threading.Thread(target=lambda key: journal.add(messages(key)), args=(f"a/{number}",))
                       for number in range(16)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(asked) == 16)
        for thread in threads:
            thread.join(PATIENCE)
        assert sorted(row.key for row in stored(path)) == sorted(asked)
        assert 1 < heard.count("COMMIT") < 16


def test_journal_tells_each_thread_that_a_shared_commit_failed(path: str, connections: Connections) -> None:
    failed: List[BaseException] = []
    with opened(path) as journal, read_only(path, connections):
        threads = [threading.Thread(target=lambda: failed.append(attempt(journal.add, [("a/1", b"")])))
                   for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    assert [type(error) for error in failed] == [JournalError] * 16


@pytest.mark.parametrize(("sync", "level"), [("normal", 1), ("full", 2)])
def test_settings_journal_sync_is_the_databases_own(
        start: Start, shop: Shop, path: str, connections: Connections, sync: str, level: int) -> None:
    start(shop.registry, journal_sync=sync)
    assert connections.ask(path, "PRAGMA synchronous") == level
    assert connections.ask(path, "PRAGMA journal_mode") == "wal"


@pytest.mark.parametrize("write", [
    Journal.flush, lambda journal: journal.add([("b/1", b"")]), lambda journal: journal.begin("b/1", 1)],
    ids=["flush", "another message", "an attempt that begins"])
def test_journal_marks_are_written_by(path: str, write: Callable[[Journal], None]) -> None:
    with opened(path) as journal:
        journal.add([(f"a/{number}", b"") for number in range(6)])
        before = stored(path)
        journal.finish("a/1")
        journal.tried("a/2", 1)
        journal.fail("a/3", "ValueError")
        journal.answered("a/4", "[]", ("app/user", "{}"))
        journal.answered("a/5", "[]")
        assert stored(path) == before
        write(journal)
        assert [(row.state, row.tries) for row in stored(path)[:4]] == [
            (WAITING, 0), (FINISHED, 0), (WAITING, 1), (DEAD, before[3].tries + 1)]
        assert [row.replies for row in journal.waiting() if row.key in ("a/4", "a/5")] == ["[]", "[]"]
        assert [name for name, _, _ in journal.sessions()] == ["app/user"]


def test_journal_finish_is_written_at_the_end(path: str) -> None:
    with contextlib.closing(Journal(Settings(journal=path), call_later)) as journal:
        journal.add([("a/1", b"")])
        journal.finish("a/1")
    assert stored(path)[0].state == FINISHED


def test_journal_flush_leaves_a_broken_file_to_the_next_look(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    due: List[Callable[[], None]] = []
    tried: List[object] = []
    with contextlib.closing(Journal(Settings(journal=path), lambda seconds, job: due.append(job))) as journal:
        journal.add([("a/1", b"")])
        journal.finish("a/1")
        with monkeypatch.context() as broken:
            broken.setattr(Journal, "_commit", lambda file, changes: fail_to_write(file, tried.append(changes)))
            journal.flush()
            journal.flush()
        assert (journal.healthy, len(tried)) == (False, 1)
        due.pop()()
        assert stored(path)[0].state == FINISHED


# ---- What became of a message


@pytest.mark.parametrize(("change", "tries", "begun", "replies"), [
    pytest.param(lambda journal: None, 0, False, "", id="nothing"),
    pytest.param(lambda journal: journal.begin("a/1", 1), 0, True, "", id="the first try begun"),
    pytest.param(lambda journal: journal.begin("a/1", 3), 2, True, "", id="the third try begun"),
    pytest.param(lambda journal: [journal.begin("a/1", 3), journal.tried("a/1", 3)], 3, False, "", id="begun, failed"),
    pytest.param(lambda journal: [journal.begin("a/1", 1), journal.answered("a/1", '["hi"]')], 0, False, '["hi"]',
                 id="begun, answered"),
    pytest.param(lambda journal: [journal.answered("a/1", '["a", "b"]'), journal.answered("a/1", '["b"]')], 0, False,
                 '["b"]', id="one reply sent"),
    pytest.param(lambda journal: journal.answered("a/1", "half \ud83d"), 0, False, "half ?", id="half a surrogate"),
])
def test_journal_waiting_tells_after(
        path: str, change: Callable[[Journal], object], tries: int, begun: bool, replies: str) -> None:
    with opened(path) as journal:
        journal.add([("a/1", b"payload")])
        change(journal)
    with opened(path) as journal:
        assert journal.waiting() == [("a/1", tries, begun, NOW, b"payload", "", replies)]


def test_journal_forgets_replies_and_content_of_what_is_finished(path: str) -> None:
    with opened(path) as journal:
        journal.add([("a/1", b"a secret")])
        journal.answered("a/1", '["a secret"]')
        journal.finish("a/1")
    assert b"a secret" not in pathlib.Path(path).read_bytes()


def test_journal_fail_counts_a_try_once_though_its_commit_went_into_a_deleted_file(path: str) -> None:
    with opened(path) as journal:
        journal.add([("a/1", b"")])
        os.unlink(path)
        journal.fail("a/1", "ValueError")
        journal.flush()
    assert [(row.state, row.tries) for row in stored(path)] == [(DEAD, 1)]


def test_journal_finished_keys_come_in_the_order_in_which_messages_were_finished(path: str) -> None:
    with opened(path) as journal:
        journal.add([(key, b"") for key in "abcdef"])
        for key in "ca":
            journal.finish(key)
    with opened(path) as journal:
        for key in "fb":
            journal.finish(key)
    with opened(path, dedup_size=3) as journal:
        assert journal.finished_keys() == ["a", "f", "b"]


def test_journal_finished_keys_hold_the_dead_whose_handlers_were_done(path: str) -> None:
    with opened(path) as journal:
        journal.add([(key, b"") for key in ("unhandled", "handled", "finished")])
        journal.answered("handled", '["hi"]')
        for key in ("unhandled", "handled"):
            journal.fail(key, "NetworkError")
        journal.finish("finished")
    with opened(path) as journal:
        assert journal.finished_keys() == ["handled", "finished"]


# ---- Sessions, and pushes that could not be read


def test_journal_sessions_come_back_the_longest_untouched_first(path: str) -> None:
    times = iter([NOW + second for second in range(100)])
    journal = Journal(Settings(journal=path, sessions=2), lambda seconds, job: None, lambda: next(times))
    with contextlib.closing(journal):
        for name in ("ann", "bob", "eve", "ann"):
            journal.finish("key", (name, f'{{"of": "{name}"}}'))
        journal.flush()
        assert [(name, text) for name, text, _ in journal.sessions()] == [
            ("eve", '{"of": "eve"}'), ("ann", '{"of": "ann"}')]


def test_journal_sessions_end_with_an_empty_text(path: str) -> None:
    with opened(path) as journal:
        journal.finish("key", ("ann", "{}"))
        journal.finish("key", ("ann", ""))
        journal.flush()
        assert journal.sessions() == []


def test_journal_sessions_are_forgotten_after_48_hours(path: str) -> None:
    with opened(path) as journal:
        journal.finish("key", ("ann", "{}"))
    for later, names in [(48 * 3600 - 1, ["ann"]), (48 * 3600, [])]:
        journal = Journal(Settings(journal=path), lambda seconds, job: None, lambda: NOW + later)  # noqa: B023
        with contextlib.closing(journal):
            assert [name for name, _, _ in journal.sessions()] == names


def test_journal_writes_a_session_in_the_commit_of_its_messages_mark(path: str, connections: Connections) -> None:
    with opened(path) as journal:
        journal.add([("a/1", b"")])
        heard = connections.listen(path)
        journal.finish("a/1", ("ann", "{}"))
        journal.flush()
        assert [word.split()[0] for word in heard] == ["BEGIN", "UPDATE", "INSERT", "COMMIT"]


def test_journal_keeps_the_beginnings_of_the_last_pushes_that_could_not_be_read(path: str) -> None:
    with opened(path) as journal:
        for number in range(150):
            journal.keep_unreadable(b"%d " % number + b"x" * 100_000, "not XML")
    with contextlib.closing(connect(path)) as db:
        rows = db.execute("SELECT received, error, payload FROM messages ORDER BY id").fetchall()
    assert [int(payload.split()[0]) for _, _, payload in rows] == list(range(50, 150))
    assert {(received, reason, len(payload)) for received, reason, payload in rows} == {(NOW, "not XML", 64 * 1024)}


def test_journal_lets_no_unreadable_push_wait_for_a_disk_that_fails(path: str, connections: Connections) -> None:
    with opened(path) as journal:
        with read_only(path, connections):
            with pytest.raises(JournalError):
                journal.add([("a/1", b"")])
            journal.keep_unreadable(b"?", "not XML")
        journal.add([("a/2", b"")])
        assert [row.key for row in stored(path)] == ["a/2"]


# ---- Size


def test_journal_remembers_as_many_finished_messages_as_it_shall(
        path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "TRIM_EVERY", 5)
    with contextlib.closing(Journal(Settings(journal=path, dedup_size=3), call_later)) as journal:
        for key in ["dead", "waiting", *map(str, range(20))]:
            journal.add([(key, b"")])
        journal.fail("dead", "ValueError")
        for number in range(20):
            journal.finish(str(number))
        journal.flush()
        assert journal.finished_keys() == ["17", "18", "19"]
        assert [row.key for row in journal.waiting()] == ["waiting"]
        assert [row.key for row in stored(path)] == ["dead", "waiting", "17", "18", "19"]


def test_journal_trims_all_but_the_dead(
        path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "TRIM_EVERY", 5)
    with opened(path, dedup_size=3, sessions=2) as journal:
        for number in range(200):
            key = str(number)
            journal.add([(key, b"")])
            journal.answered(key, "[]", (key, "{}"))
            journal.keep_unreadable(b"", "not XML")
            (journal.fail(key, "ApiError") if number % 2 else journal.finish(key))
        journal.flush()
        assert journal.finished_keys() == ["197", "198", "199"]
        with contextlib.closing(connect(path)) as db:
            counts = [db.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0]
                      for what in ("sessions", "messages WHERE state = 3", "messages WHERE state = 2",
                                   "messages WHERE state = 1")]
    assert counts[0] <= 2 + 10
    assert counts[1] == 100
    assert counts[2] == 100
    assert counts[3] <= 3 + 10


def test_journal_clean_up_does_not_read_the_dead(path: str) -> None:
    with opened(path), contextlib.closing(connect(path)) as db:
        plan = db.execute("EXPLAIN QUERY PLAN " + kfserver._FORGET, (1, "a/1")).fetchall()
    read = [row[-1] for row in plan if row[-1].startswith(("SCAN", "SEARCH"))]
    assert [step.split()[0] for step in read] == ["SEARCH"]


def test_journal_stops_growing(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "TRIM_EVERY", 10)
    sizes: List[int] = []
    with contextlib.closing(Journal(Settings(journal=path, dedup_size=20), call_later)) as journal:
        for number in range(2000):
            journal.add([(str(number), b"x" * 1000)])
            journal.finish(str(number))
            sizes.append(sum(file.stat().st_size for file in pathlib.Path(path).parent.iterdir()))
    assert max(sizes[1000:]) <= max(sizes[:1000])


# ---- A disk that fails, and comes back


@contextlib.contextmanager
def no_room(path: str, connections: Connections) -> Iterator[None]:
    """Files may not grow, as with a quota. The system's signal for it is one that Python ignores."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def locked(path: str, connections: Connections) -> Iterator[None]:
    """Another program is writing, and does not come to an end."""
    with contextlib.closing(connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield


@contextlib.contextmanager
def vanished(path: str, connections: Connections) -> Iterator[None]:
    """The folder is not there: a volume that is not mounted."""
    folder = pathlib.Path(path).parent
    folder.rename(folder.with_name("elsewhere"))
    yield
    folder.with_name("elsewhere").rename(folder)


@contextlib.contextmanager
def deleted(path: str, connections: Connections) -> Iterator[None]:
    """Somebody has tidied up."""
    os.unlink(path)
    yield


@contextlib.contextmanager
def damaged(path: str, connections: Connections, offset: int = 0) -> Iterator[None]:
    """The file's pages are garbage from ``offset`` on; at last somebody moves it away, as the log advises."""
    with contextlib.closing(connect(path)) as other:
        other.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or what is in the log would hide the damage
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"garbage" * 2000)
    yield
    os.rename(path, path + ".damaged")


def read_only(path: str, connections: Connections) -> ContextManager[None]:
    """Nothing can be written; rights alone do not bind every user who runs tests."""
    return connections.hampered(path, "PRAGMA query_only = ON")


def full(path: str, connections: Connections) -> ContextManager[None]:
    """No page is left: what SQLite makes of a disk without space."""
    return connections.hampered(path, "PRAGMA max_page_count = 1")  # that is, what there is and no more


Outage = Callable[[str, Connections], ContextManager[None]]
OUTAGES = [
    pytest.param(full, id="full"),
    pytest.param(no_room, id="no room"),
    pytest.param(read_only, id="read-only"),
    pytest.param(locked, id="locked by another program"),
    pytest.param(vanished, id="folder vanished"),
    pytest.param(deleted, id="deleted"),
    pytest.param(damaged, id="damaged"),
    pytest.param(functools.partial(damaged, offset=4096), id="damaged behind its first page"),
]
# More than fits into the pages that a small message leaves.
LONG = "x" * 50_000


@pytest.fixture(autouse=True)
def _little_patience_with_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is locked here stays so."""
    monkeypatch.setattr(kfserver, "LOCK_SECONDS", 0.01)


@pytest.mark.parametrize("outage", OUTAGES)
def test_kf_server_refuses_what_it_cannot_write_down_and_takes_it_when_the_disk_is_back(
        start: Start, shop: Shop, path: str, connections: Connections, caplog: pytest.LogCaptureFixture,
        outage: Outage) -> None:
    server = start(shop.registry, queue_size=1)  # a place that were not given back would be missed
    assert outcomes(server, push(number=1, content="one")) == ["accepted"]
    with outage(path, connections):
        refused = server.feed(push(number=2, content=LONG))
        assert (refused.status, dict(refused.headers)["Retry-After"]) == (503, "1")
        assert server.join(PATIENCE)
        assert shop.served == ["one"]
    assert outcomes(server, push(number=2, content=LONG), push(number=2, content=LONG)) == ["accepted", "repeat"]
    assert shop.served == ["one", LONG]
    assert states(path)["2"] == FINISHED
    error, = errors_in(caplog)
    assert error.startswith(f"the journal {path} cannot be written: ")
    assert f"the journal {path} is written again" in caplog.messages


@pytest.mark.parametrize("outage", OUTAGES)
def test_kf_server_remembers_over_an_outage_what_it_handled_meanwhile(
        start: Start, shop: Shop, path: str, connections: Connections, outage: Outage) -> None:
    shop.open.clear()
    first = start(shop.registry)
    first.feed(push(number=1, content="one"))
    wait_until(lambda: shop.served)
    with outage(path, connections):
        assert first.feed(push(number=2, content=LONG)).status == 503
        shop.open.set()
        assert first.join(PATIENCE)
    first.stop()
    second = start(shop.registry)
    assert second.join(PATIENCE)
    assert outcomes(second, push(number=1, content="one"), push(number=2, content=LONG)) == ["repeat", "accepted"]
    assert shop.served == ["one", LONG]


@pytest.mark.parametrize("outage", OUTAGES)
def test_kf_server_stops_in_an_outage(
        start: Start, shop: Shop, path: str, connections: Connections, outage: Outage) -> None:
    shop.open.clear()
    server = start(shop.registry)
    server.feed(push(number=1))
    with outage(path, connections):
        server.feed(push(number=2, content=LONG))
        shop.open.set()
        assert server.stop() == []


def test_kf_server_logs_an_outage_once_and_each_anew(
        start: Start, shop: Shop, path: str, connections: Connections, caplog: pytest.LogCaptureFixture) -> None:
    server = start(shop.registry)
    for outage in range(2):
        with locked(path, connections):
            refused = [server.feed(push(number=number)) for number in range(3)]
            assert {response.status for response in refused} == {503}
        assert outcomes(server, push(number=3 + outage)) == ["accepted"]
    assert len(errors_in(caplog)) == 2


def test_kf_server_waits_for_a_program_that_locks_the_journal_for_a_moment(
        start: Start, shop: Shop, path: str, connections: Connections, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LOCK_SECONDS", PATIENCE)
    server = start(shop.registry)
    answers: List[Response] = []
    with locked(path, connections):
        heard = connections.listen(path)
        pushing = threading.Thread(target=lambda: answers.append(server.feed(push())))
        pushing.start()
        wait_until(lambda: heard)
    pushing.join(PATIENCE)
    assert [answer.outcome for answer in answers] == ["accepted"]


def test_kf_server_leaves_a_foreign_file_alone_that_took_its_journals_place(
        start: Start, shop: Shop, path: str, tmp_path: pathlib.Path) -> None:
    server = start(shop.registry)
    write_database(str(tmp_path / "other.db"), application_id=0)
    content = (tmp_path / "other.db").read_bytes()
    os.replace(str(tmp_path / "other.db"), path)
    assert [server.feed(push(number=number)).status for number in range(3)] == [503] * 3
    assert pathlib.Path(path).read_bytes() == content
    os.unlink(path)
    assert outcomes(server, push(number=0)) == ["accepted"]


# ---- Files that are no journal of ours


def write_database(path: str, application_id: int, version: int = 0) -> None:
    """Make a database of another program, or of another version of ours."""
    with contextlib.closing(connect(path)) as db:
        db.execute("CREATE TABLE notes (text)")
        db.execute("INSERT INTO notes VALUES ('precious')")
        db.execute(f"PRAGMA application_id = {application_id}")
        db.execute(f"PRAGMA user_version = {version}")
        db.commit()


def write_text(path: str, text: str) -> None:
    """Make a file with some text."""
    pathlib.Path(path).write_text(text)


@pytest.mark.parametrize(("make", "told"), [
    pytest.param(functools.partial(write_text, text="Dear diary,"), "not a journal of kfserver", id="text"),
    pytest.param(functools.partial(write_text, text="x" * 5000), "not a journal of kfserver", id="more text"),
    pytest.param(functools.partial(write_text, text="SQLite format 3\0"), "not a journal of kfserver", id="cut off"),
    pytest.param(functools.partial(write_database, application_id=0), "not a journal of kfserver", id="a database"),
    pytest.param(functools.partial(write_database, application_id=1), "not a journal of kfserver", id="of a program"),
    pytest.param(functools.partial(write_database, application_id=JOURNAL_ID, version=JOURNAL_VERSION + 1),
                 "written by a newer kfserver", id="newer"),
])
def test_kf_server_refuses_a_foreign_file_and_leaves_it_as_it_is(
        path: str, shop: Shop, make: Callable[[str], None], told: str) -> None:
    make(path)
    content = pathlib.Path(path).read_bytes()
    with pytest.raises(SettingsError, match=told) as caught:
        KfServer(shop.registry, Settings(journal=path)).open()
    assert path in str(caught.value)
    assert pathlib.Path(path).read_bytes() == content
    assert os.listdir(os.path.dirname(path)) == ["kf.db"]


def damage(path: str, offset: int, data: bytes) -> None:
    """A journal of ours that has lost a part of itself."""
    leave(path, push(number=1)).close()
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("make", [
    pytest.param(os.mkdir, id="a folder"),
    pytest.param(functools.partial(damage, offset=100, data=b"garbage" * 2000), id="damaged"),
    pytest.param(functools.partial(damage, offset=4096, data=b"garbage" * 2000), id="damaged behind its first page"),
    pytest.param(functools.partial(write_database, application_id=JOURNAL_ID, version=JOURNAL_VERSION),
                 id="without a table"),
])
def test_kf_server_says_in_one_line_that_the_journal_cannot_be_used(
        path: str, shop: Shop, make: Callable[[str], None]) -> None:
    make(path)
    with pytest.raises(SettingsError, match=r"^[^\n]*kf\.db[^\n]*--journal[^\n]*$"):
        KfServer(shop.registry, Settings(journal=path)).open()


def test_main_says_in_one_line_that_the_journals_folder_is_missing(
        tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "missing" / "kf.db")
    assert main(["--port", "0", "--journal", path]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kfserver: cannot use the journal {path}: ")
    assert error.count("\n") == 1


def test_kf_server_takes_an_empty_file_for_a_new_journal(start: Start, shop: Shop, path: str) -> None:
    write_text(path, "")
    assert outcomes(start(shop.registry), push(number=1)) == ["accepted"]
    assert states(path) == {"1": FINISHED}


# ---- An older layout


def make_layout_1(path: str) -> None:
    """What kfserver wrote before there were replies: a row that waits, two that are finished, one that is dead."""
    with contextlib.closing(connect(path, isolation_level=None)) as db:
        db.execute("""CREATE TABLE messages (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, state INTEGER NOT NULL,
            tries INTEGER NOT NULL, received REAL NOT NULL, payload BLOB, error TEXT)""")
        db.execute(f"PRAGMA application_id = {JOURNAL_ID}")
        db.execute("PRAGMA user_version = 1")
        db.execute("PRAGMA journal_mode = WAL")
        for key, state, payload, error in [("a/1", WAITING, b"1", None), ("a/2", FINISHED, None, None),
                                           ("a/3", DEAD, b"3", "ValueError"), ("a/4", FINISHED, None, None)]:
            db.execute("INSERT INTO messages (key, state, tries, received, payload, error) VALUES (?, ?, 1, ?, ?, ?)",
                       (key, state, NOW, payload, error))


def test_journal_brings_layout_1_up_to_date(path: str) -> None:
    make_layout_1(path)
    with opened(path) as journal:
        assert pathlib.Path(path).read_bytes()[60:64] == b"\0\0\0\2"  # older programs look there
        assert journal.waiting() == [("a/1", 1, False, NOW, b"1", "", "")]
        assert journal.finished_keys() == ["a/2", "a/4"]
        journal.finish("a/1", ("ann", "{}"))
    with opened(path) as journal:
        assert (journal.waiting(), journal.finished_keys()) == ([], ["a/2", "a/4", "a/1"])
        assert len(journal.sessions()) == 1
    assert stored(path)[2] == Stored("a/3", DEAD, 1, b"3", "ValueError")


def test_journal_leaves_layout_1_as_it_is_when_it_cannot_be_brought_up_to_date(
        path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make_layout_1(path)
    content = pathlib.Path(path).read_bytes()
    first, second = kfserver._LAYOUTS
    monkeypatch.setattr(kfserver, "_LAYOUTS", (first, (*second, "CREATE TABLE messages (key)")))
    with pytest.raises(SettingsError, match="cannot use the journal"):
        opened(path)
    assert pathlib.Path(path).read_bytes() == content


# ---- Files that are deleted or replaced


def unlink(name: str) -> None:
    """An operator's rm, a cleaner of temporary files."""
    os.unlink(name)


def replace(name: str) -> None:
    """A copy takes the file's place, as some backups and editors do it."""
    shutil.copy2(name, name + ".copy")
    os.replace(name + ".copy", name)


@pytest.mark.parametrize("harm", [unlink, replace])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-lock"])
def test_kf_server_loses_nothing_when_its_files_are_deleted_or_replaced(
        start: Start, shop: Shop, path: str, suffix: str, harm: Callable[[str], None]) -> None:
    server = start(shop.registry)
    os.utime(os.path.dirname(path), (NOW, NOW))  # nothing was made or deleted there for long
    assert outcomes(server, push(number=1)) == ["accepted"]
    shop.open.clear()
    server.feed(push(number=2))
    harm(path + suffix)
    refused = server.feed(push(number=3)).status == 503  # unless a worker has noticed it before
    assert server.feed(push(number=4)).status == 200
    left = {row.key.rpartition("/")[2]: row.state for row in left_by_a_kill(path)}
    assert left == {"1": FINISHED, "2": WAITING, **({} if refused else {"3": WAITING}), "4": WAITING}


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_journal_add_refuses_what_would_go_into_deleted_files(path: str, suffix: str) -> None:
    with opened(path) as journal:
        journal.add([("a/1", b"1")])
        os.unlink(path + suffix)
        with pytest.raises(JournalError):
            journal.add([("a/2", b"2")])
        journal.add([("a/3", b"3")])
        assert [row.key for row in left_by_a_kill(path)] == ["a/1", "a/3"]


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_journal_flush_notices_deleted_files_though_nothing_comes(path: str, suffix: str) -> None:
    due: List[Callable[[], None]] = []
    journal = Journal(Settings(journal=path), lambda seconds, job: due.append(job), lambda: NOW)
    with contextlib.closing(journal):
        journal.add([("a/1", b"1")])
        journal.flush()
        assert (journal.healthy, due) == (True, [])
        os.unlink(path + suffix)
        assert not journal.healthy
        journal.flush()
        due.pop()()
        assert journal.healthy
        assert [row.key for row in left_by_a_kill(path)] == ["a/1"]


def test_journal_takes_everything_over_from_a_deleted_file(path: str) -> None:
    with opened(path) as journal:
        journal.add([(key, key.encode()) for key in "abcd"])
        journal.finish("a", ("ann", "{}"))
        journal.fail("b", "ValueError")
        journal.answered("c", '["hi"]')
        journal.keep_unreadable(b"?", "not XML")
        journal.begin("d", 2)
        before, waiting = stored(path), journal.waiting()
        os.unlink(path)
    with opened(path) as journal:
        assert (stored(path), journal.waiting()) == (before, waiting)
        assert (journal.finished_keys(), journal.sessions()) == (["a"], [("ann", "{}", NOW)])


# ---- For one user's eyes


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such modes")
@pytest.mark.parametrize("existing", [[], ["kf.db"]], ids=["new files", "files that others may read"])
def test_journal_files_are_for_one_user_alone(path: str, existing: List[str]) -> None:
    folder, mask = pathlib.Path(path).parent, os.umask(0)
    try:
        for name in existing:
            (folder / name).touch(0o666)
        with opened(path) as journal:
            journal.add([("a/1", b"1")])
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    finally:
        os.umask(mask)
    assert modes == dict.fromkeys(["kf.db", "kf.db-wal", "kf.db-shm", "kf.db-lock"], 0o600)


def test_journal_close_leaves_nothing_that_was_handled_though_somebody_reads(path: str) -> None:
    journal = opened(path)
    with contextlib.closing(connect(path)) as other:
        with journal as opened_journal:
            opened_journal.add([("a/1", b"a secret")])
            opened_journal.finish("a/1")
            other.execute("SELECT COUNT(*) FROM messages").fetchone()
        assert os.path.getsize(path + "-wal") == 0
        assert b"a secret" not in pathlib.Path(path).read_bytes()


def test_journal_overwrites_what_it_deletes(path: str, connections: Connections) -> None:
    with opened(path):
        assert connections.ask(path, "PRAGMA secure_delete") == 1


# ---- One process at a time


def attempt_elsewhere(path: str) -> str:
    """What another process is told that opens the journal."""
    code = textwrap.dedent("""
        import sys
        from kfserver import *
        from kfserver import Journal
        try:
            Journal(Settings(journal=sys.argv[1]), lambda seconds, job: None).close()
        except Exception as error:
            print(type(error).__name__, error)
    """)
    return subprocess.run([sys.executable, "-c", code, path], cwd=str(ROOT), capture_output=True, check=True,
                          timeout=PATIENCE).stdout.decode()


def copy_files(path: str) -> None:
    """A handler makes a backup: closing a descriptor frees the POSIX locks that the process has on the file."""
    for name in os.listdir(os.path.dirname(path)):
        pathlib.Path(path).with_name(name).read_bytes()


def try_a_second(path: str) -> None:
    """A second server in the same process."""
    with pytest.raises(SettingsError, match="in another process's hands"):
        opened(path)


@pytest.mark.parametrize("loosen", [
    pytest.param(lambda path: None, id="nothing"),
    pytest.param(copy_files, id="a handler copies the files"),
    pytest.param(try_a_second, id="a second journal in the process"),
    pytest.param(lambda path: main(["journal", path]), id="the command in the process"),
    pytest.param(lambda path: os.unlink(path + "-lock"), id="the lock's file is deleted"),
])
def test_journal_stays_the_only_one_after(path: str, loosen: Callable[[str], None]) -> None:
    with opened(path) as journal:
        journal.add([("a/1", b"1")])
        loosen(path)
        assert attempt_elsewhere(path).startswith(f"SettingsError the journal {path} is in another process's hands: ")
        if os.path.exists(path + "-lock"):
            journal.add([("a/2", b"2")])
    assert attempt_elsewhere(path) == ""


def test_journal_has_no_companions_after_its_end(path: str) -> None:
    with opened(path):
        pass
    assert os.listdir(os.path.dirname(path)) == ["kf.db"]


def test_journal_can_be_had_where_there_is_no_flock(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "fcntl", None)
    for _ in range(2):
        with opened(path) as journal:
            with pytest.raises(SettingsError, match="in another process's hands"):
                opened(path)
            journal.add([("a/1", b"")])
            assert journal.healthy


FORKS = textwrap.dedent("""
    import os, sys, threading
    from kfserver import *
    from kfserver import Journal, attempt
    path = sys.argv[1]
    journal = Journal(Settings(journal=path), lambda seconds, job: None)
    journal.add([("a/1", b"1")])
    ours = {(os.stat(path + name).st_dev, os.stat(path + name).st_ino) for name in ("", "-wal", "-shm", "-lock")}
    child = os.fork()
    if child == 0:
        journal.after_fork()
        for number in map(int, os.listdir("/dev/fd")):
            try:
                found = os.fstat(number)
            except OSError:
                continue
            if (found.st_dev, found.st_ino) in ours:
                os._exit(3)
        try:
            journal.add([("a/2", b"2")])
        except Exception as error:
            sys.exit(4 if type(error).__name__ == "JournalError" else 5)
    status = os.waitpid(child, 0)[1]
    taken = attempt(Journal, Settings(journal=path), print)
    journal.add([("a/3", b"3")])
    print(os.WEXITSTATUS(status), type(taken).__name__, journal.healthy, [row.key for row in journal.waiting()])
""")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_journal_after_fork_stays_the_parents(path: str) -> None:
    told = subprocess.run([sys.executable, "-c", FORKS, path], cwd=str(ROOT), capture_output=True, timeout=PATIENCE)
    assert (told.stdout.decode(), told.stderr) == ("4 SettingsError True ['a/1', 'a/3']\n", b"")



def test_program_refuses_a_journal_in_another_process(start: Start, shop: Shop, path: str) -> None:
    server = start(shop.registry)
    second = subprocess.run([sys.executable, str(ROOT / "kfserver.py"), "--port", "0", "--journal", path],
                            capture_output=True, timeout=PATIENCE)
    assert second.returncode == 2
    assert second.stdout == b""
    assert second.stderr.startswith(f"kfserver: the journal {path} is in another process's hands: ".encode())
    assert second.stderr.count(b"\n") == 1
    assert outcomes(server, push()) == ["accepted"]


def test_kf_server_refuses_a_journal_that_is_open_under_another_name(
        start: Start, shop: Shop, path: str, tmp_path: pathlib.Path) -> None:
    start(shop.registry)
    (tmp_path / "link.db").symlink_to(path)
    with pytest.raises(SettingsError, match="in another process's hands"):
        start(shop.registry, journal=str(tmp_path / "link.db"))


def test_kf_server_keeps_to_its_journal_when_a_handler_changes_the_folder(
        start: Start, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(os.path.dirname(path))
    registry = HandlerRegistry()
    registry.on("text")(lambda message: os.chdir("/"))
    server = start(registry, journal="kf.db")
    assert outcomes(server, push(number=1), push(number=2)) == ["accepted", "accepted"]
    assert states(path) == {"1": FINISHED, "2": FINISHED}


def test_kf_server_takes_a_journal_over_from_one_that_stopped(start: Start, shop: Shop) -> None:
    for number in range(3):
        server = start(shop.registry)
        assert outcomes(server, push(number=number)) == ["accepted"]
        server.stop()
    assert len(shop.served) == 3
