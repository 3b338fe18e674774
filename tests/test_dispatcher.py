"""Dispatcher: which message runs when, beside which others, and what becomes of one that fails.

Nothing waits for a retry here: the clock stands still until a test moves it. Messages are made by hand, and known by
keys like ``ann/2``: the second message of ann.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from typing import Callable, List, Optional, Tuple, Type

import pytest
from support import PATIENCE, no_thread_left, wait_until

import kfserver
from kfserver import Busy, Dispatcher, Job, KfError, Message, Settings, attempt


def letter(key: str) -> Message:
    """The message of the sender that stands before the slash."""
    message = Message({"FromUserName": key.partition("/")[0]})
    message.key = key
    return message


def no_work(message: Message) -> None:
    """A handler that is done at once."""


class Office:
    """A dispatcher whose handler is ``work``, a clock that stands still, and a record of what happened."""

    def __init__(self, work: Callable[[Message], None] = no_work, settings: Optional[Settings] = None) -> None:
        self._work = work
        self.begun: List[str] = []
        self.delays: List[float] = []  # until the next try of what failed, in seconds
        self.settled: List[Tuple[str, Optional[BaseException]]] = []
        self.flushed: List[int] = []  # how many messages were settled at each flush
        self.now = 0.0
        self._settings = settings or Settings()
        self.dispatcher = Dispatcher(self._settings, self._handle, self._flush, lambda: self.now)

    def _handle(self, job: Job) -> None:
        self.begun.append(job.message.key)
        error = attempt(self._work, job.message)
        if error and job.tries + 1 < self._settings.tries and not isinstance(error, KfError):
            self._fail(job)
        else:
            self.dispatcher.settle(job, self._settle, job.message, error)

    def _fail(self, job: Job) -> None:
        job.tries += 1
        job.pause = 4.0 ** (job.tries - 1)
        self.delays.append(job.pause)

    def _settle(self, message: Message, error: Optional[BaseException]) -> None:
        self.settled.append((message.key, error))

    def _flush(self) -> None:
        self.flushed.append(len(self.settled))

    @property
    def done(self) -> List[str]:
        """The keys that are settled, in that order."""
        return [key for key, _ in self.settled]

    def submit(self, *keys: str) -> None:
        """Hand in one message for each key."""
        for key in keys:
            self.hand_in(letter(key))

    def hand_in(self, message: Message) -> None:
        """Hand in one message; raises `Busy` when there is no place for it."""
        self.dispatcher.reserve()
        self.dispatcher.post([message])

    def restore(self, *jobs: Job) -> None:
        """Bring back what the last run left."""
        self.dispatcher.restore(jobs)
        self.dispatcher.wake()

    def pass_time(self, seconds: float) -> None:
        """Move the clock."""
        self.now += seconds
        self.dispatcher.wake()

    def finish(self) -> None:
        """Let time pass until all messages are settled."""
        def is_over() -> bool:
            self.pass_time(1000.0)
            return self.dispatcher.join(0.0)
        wait_until(is_over)


class Gate:
    """A handler that holds the messages of ``held`` until it is opened, and counts those that are in it at once."""

    def __init__(self, held: str = "") -> None:
        self._held = held
        self._opened = threading.Event()
        self._lock = threading.Lock()
        self._let_through: List[str] = []
        self.inside: List[str] = []
        self.most = 0

    def __call__(self, message: Message) -> None:
        with self._lock:
            self.inside.append(message.key)
            self.most = max(self.most, len(self.inside))
        if message.key.startswith(self._held):
            wait_until(lambda: self._opened.is_set() or message.key in self._let_through)
        with self._lock:
            self.inside.remove(message.key)

    def open(self) -> None:
        """Let everything through, now and later."""
        self._opened.set()

    def open_for(self, key: str) -> None:
        """Let one message through."""
        self._let_through.append(key)


class Failing:
    """A handler that fails at the first ``times`` tries of each message, with ``error``."""

    def __init__(self, times: int, error: Type[BaseException] = ValueError) -> None:
        self._times, self._error = times, error
        self._tries: List[str] = []

    def __call__(self, message: Message) -> None:
        self._tries.append(message.key)
        if self._tries.count(message.key) <= self._times:
            raise self._error(f"try {self._tries.count(message.key)}")


# ---- Order


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_dispatcher_keeps_the_order_of_each_sender(workers: int) -> None:
    office = Office(settings=Settings(workers=workers))
    office.submit(*(f"{sender}/{number}" for number in range(50) for sender in "abcdefghij"))
    office.finish()
    for sender in "abcdefghij":
        assert [key for key in office.done if key[0] == sender] == [f"{sender}/{number}" for number in range(50)]


def test_dispatcher_runs_one_message_of_a_sender_at_a_time() -> None:
    gate = Gate("nobody")
    office = Office(gate, Settings(workers=8))
    office.submit(*(f"ann/{number}" for number in range(200)))
    office.finish()
    assert gate.most == 1


def test_dispatcher_tells_the_same_sender_in_two_apps_apart() -> None:
    gate = Gate()
    office = Office(gate)
    for app in ("first", "second"):
        message = Message({"ToUserName": app, "FromUserName": "ann"})
        message.key = app
        office.hand_in(message)
    wait_until(lambda: sorted(gate.inside) == ["first", "second"])
    gate.open()
    office.finish()


def test_dispatcher_runs_different_senders_beside_each_other() -> None:
    gate = Gate()
    office = Office(gate, Settings(workers=6))
    office.submit(*(f"{sender}/1" for sender in "abcdef"))
    wait_until(lambda: len(gate.inside) == 6)
    gate.open()
    office.finish()


def test_dispatcher_never_runs_more_than_its_workers() -> None:
    gate = Gate()
    office = Office(gate, Settings(workers=3))
    office.submit(*(f"{sender}/{number}" for sender in "abcdefghij" for number in range(5)))
    wait_until(lambda: len(gate.inside) == 3)
    gate.open()
    office.finish()
    assert gate.most == 3


def test_dispatcher_lets_one_slow_sender_hold_up_nobody_else() -> None:
    gate = Gate(held="slow")
    office = Office(gate, Settings(workers=2))
    others = [f"{sender}/{number}" for number in range(20) for sender in "abcde"]
    office.submit("slow/1", "slow/2", "slow/3", *others)
    wait_until(lambda: len(office.done) == len(others))
    assert gate.inside == ["slow/1"]
    gate.open()
    office.finish()
    assert office.done[-3:] == ["slow/1", "slow/2", "slow/3"]


def test_dispatcher_gives_every_sender_a_turn() -> None:
    gate = Gate(held="first")
    office = Office(gate, Settings(workers=1))
    office.submit("first/1", "many/1", "many/2", "many/3", "one/1")
    gate.open()
    office.finish()
    assert office.done == ["first/1", "many/1", "one/1", "many/2", "many/3"]


# ---- Retries


@pytest.mark.parametrize(("failures", "tries", "delays"), [
    pytest.param(0, 3, [], id="no failure"),
    pytest.param(1, 3, [1.0], id="one failure"),
    pytest.param(2, 3, [1.0, 4.0], id="two failures"),
    pytest.param(4, 5, [1.0, 4.0, 16.0, 64.0], id="four failures"),
])
def test_dispatcher_tries_again_later(failures: int, tries: int, delays: List[float]) -> None:
    office = Office(Failing(failures), Settings(tries=tries))
    office.submit("ann/1")
    office.finish()
    assert office.delays == delays
    assert office.begun == ["ann/1"] * (failures + 1)
    assert office.settled == [("ann/1", None)]


@pytest.mark.parametrize("tries", [1, 2, 4])
def test_dispatcher_settles_with_the_last_error(tries: int) -> None:
    office = Office(Failing(times=100), Settings(tries=tries))
    office.submit("ann/1", "ann/2")
    office.finish()
    assert office.begun == ["ann/1"] * tries + ["ann/2"] * tries
    assert [(key, str(error)) for key, error in office.settled] == [
        ("ann/1", f"try {tries}"), ("ann/2", f"try {tries}")]


def test_dispatcher_counts_the_tries_of_each_message_anew() -> None:
    office = Office(Failing(times=1), Settings(tries=2))
    office.submit("ann/1", "ann/2")
    office.finish()
    assert office.delays == [1.0, 1.0]
    assert office.settled == [("ann/1", None), ("ann/2", None)]


def test_dispatcher_lets_later_messages_of_the_sender_wait_for_a_retry() -> None:
    office = Office(Failing(times=1), Settings(workers=4))
    office.submit("ann/1", "ann/2")
    wait_until(lambda: office.delays)
    assert office.begun == ["ann/1"]
    office.finish()
    assert office.begun == ["ann/1", "ann/1", "ann/2", "ann/2"]


def test_dispatcher_keeps_no_worker_waiting_for_a_retry() -> None:
    failing = Failing(times=1)
    office = Office(lambda message: failing(message) if message.key == "ann/1" else None, Settings(workers=1))
    office.submit("ann/1")
    wait_until(lambda: office.delays)
    office.submit("bob/1")
    wait_until(lambda: office.done == ["bob/1"])
    office.finish()
    assert office.done == ["bob/1", "ann/1"]


def test_dispatcher_does_not_try_again_what_kfserver_itself_raised() -> None:
    # A wrong return value or an exhausted quota will be no better the next time.
    office = Office(Failing(1, KfError), Settings(tries=3))
    office.submit("ann/1")
    office.finish()
    assert office.begun == ["ann/1"]
    assert isinstance(office.settled[0][1], KfError)


@pytest.mark.parametrize("error", [
    pytest.param(ValueError, id="an ordinary error"),
    pytest.param(SystemExit, id="sys.exit()"),
    pytest.param(KeyboardInterrupt, id="one that Ctrl-C raises, elsewhere"),
    pytest.param(asyncio.CancelledError, id="a cancelled coroutine"),
])
def test_dispatcher_loses_no_worker_to_an_error(error: Type[BaseException]) -> None:
    office = Office(Failing(1, error), Settings(workers=1, tries=1))
    office.submit("ann/1", "ann/2", "bob/1")
    assert office.dispatcher.join(PATIENCE)
    assert sorted((key, type(failure)) for key, failure in office.settled) == [
        ("ann/1", error), ("ann/2", error), ("bob/1", error)]


@pytest.mark.parametrize("part", ["_fail", "_settle"])
def test_dispatcher_loses_no_worker_to_an_error_in_the_work_itself(
        part: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*arguments: object) -> None:
        raise UnicodeEncodeError("utf-8", "a user's words", 0, 1, "surrogates not allowed")
    monkeypatch.setattr(Office, part, fail)
    office = Office(Failing(1, ValueError), Settings(workers=1, tries=2))
    office.submit("ann/1", "bob/1", "ann/2")
    office.finish()
    assert {"ann/1", "bob/1", "ann/2"} == set(office.begun)
    assert "please report this" in caplog.text and "surrogates" not in caplog.text.replace('"surrogates', "")


def test_dispatcher_restore_goes_on_counting_tries() -> None:
    office = Office(Failing(times=100), Settings(tries=4))
    job = Job(letter("ann/1"))
    job.tries = 2
    office.restore(job)
    office.finish()
    assert office.delays == [16.0]
    assert office.done == ["ann/1"]


def test_dispatcher_waits_until_a_retry_is_due() -> None:
    office = Office(Failing(times=1))
    office.submit("ann/1")
    wait_until(lambda: office.delays)
    office.pass_time(0.9)
    assert not office.dispatcher.join(0.05)
    office.pass_time(0.2)
    assert office.dispatcher.join(PATIENCE)


@pytest.mark.parametrize("pause", [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5])
def test_dispatcher_runs_a_retry_that_is_due_while_a_worker_looks_at_the_clock(
        pause: float, monkeypatch: pytest.MonkeyPatch) -> None:
    # A second goes by between any two looks at it.
    failing, done, seconds = Failing(times=1), [], itertools.count()

    def handle(job: Job) -> None:
        if attempt(failing, job.message):
            job.pause = pause
        else:
            dispatcher.settle(job, done.append, job.message.key)

    monkeypatch.setattr(kfserver, "KEEP_THREAD", 0.0)
    dispatcher = Dispatcher(Settings(), handle, lambda: None, lambda: float(next(seconds)))
    dispatcher.reserve()
    dispatcher.post([letter("ann/1")])
    wait_until(lambda: done == ["ann/1"])
    assert dispatcher.join(PATIENCE)


@pytest.mark.parametrize("busy", ["", "bob/1"])
def test_dispatcher_runs_a_retry_without_being_called(busy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the real clock, and also when all who run have something else to do.
    gate, failing, done = Gate(held="bob"), Failing(times=1), []

    def handle(job: Job) -> None:
        if attempt(gate if job.sender[1] == "bob" else failing, job.message):
            job.pause = 0.1
        else:
            dispatcher.settle(job, done.append, job.message.key)

    monkeypatch.setattr(kfserver, "KEEP_THREAD", 0.0)
    dispatcher = Dispatcher(Settings(workers=2), handle, lambda: None)
    for key in filter(None, ("ann/1", busy)):
        dispatcher.reserve()
        dispatcher.post([letter(key)])
    wait_until(lambda: done == ["ann/1"])
    gate.open()
    assert dispatcher.join(PATIENCE)


# ---- Flush


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_dispatcher_flushes_all_that_is_settled(workers: int) -> None:
    office = Office(settings=Settings(workers=workers))
    office.submit(*(f"{sender}/{number}" for number in range(20) for sender in "abcdefghij"))
    office.finish()
    wait_until(lambda: 200 in office.flushed)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_dispatcher_flushes_before_a_handler_that_takes_long(workers: int) -> None:
    gate = Gate("slow")
    office = Office(gate, Settings(workers=workers))
    office.submit("ann/1", "bob/1", "slow/1")
    wait_until(lambda: gate.inside == ["slow/1"] and 2 in office.flushed)
    gate.open()
    office.finish()


def test_dispatcher_goes_on_when_a_flush_fails(
        caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    office = Office()
    monkeypatch.setattr(office, "flushed", None)  # what is flushed then cannot be written down
    office.submit("ann/1")
    office.finish()
    office.submit("ann/2")
    office.finish()
    assert office.done == ["ann/1", "ann/2"]
    assert {each.partition(" (")[0] for each in caplog.messages} == {"an error inside kfserver; please report this"}


# ---- Limits


def submit_fails(office: Office, key: str) -> bool:
    """Whether a message is refused, by whatever error."""
    try:
        office.submit(key)
    except (KfError, RuntimeError):
        return True
    return False


def test_dispatcher_submit_is_busy_when_the_queue_is_full() -> None:
    gate = Gate()
    office = Office(gate, Settings(workers=1, queue_size=3))
    office.submit("ann/1")
    wait_until(lambda: gate.inside)
    office.submit("ann/2", "bob/1", "eve/1")  # what a worker has in hand does not count
    with pytest.raises(Busy, match="the queue is full"):
        office.submit("bob/2")
    gate.open()
    office.finish()
    office.submit("bob/2")
    office.finish()
    assert sorted(office.done) == ["ann/1", "ann/2", "bob/1", "bob/2", "eve/1"]


def test_dispatcher_calls_a_worker_that_looks_by_itself_later_when_the_queue_is_full(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LOOK_SECONDS", 2 * PATIENCE)
    office = Office(settings=Settings(workers=1, queue_size=1))
    for key in ("ann/1", "bob/1", "eve/1"):
        office.submit(key)
        wait_until(lambda: office.done and office.done[-1] == key)  # noqa: B023
    office.dispatcher.drain(PATIENCE)


def test_dispatcher_submit_counts_what_waits_for_a_retry() -> None:
    office = Office(Failing(times=1), Settings(workers=1, queue_size=1))
    office.submit("ann/1")
    # The worker has to be done with the first message: until then that counts as in hand, and eve's as waiting.
    wait_until(lambda: office.delays)
    wait_until(lambda: submit_fails(office, "eve/1"))
    office.finish()


def test_dispatcher_reserve_keeps_a_place() -> None:
    office = Office(settings=Settings(queue_size=2))
    office.dispatcher.reserve()
    office.dispatcher.reserve()
    assert submit_fails(office, "eve/1")
    office.dispatcher.cancel()
    office.dispatcher.post([letter("ann/1")])
    assert office.dispatcher.join(PATIENCE)
    office.submit("eve/2")
    office.finish()
    assert office.done == ["ann/1", "eve/2"]


def test_dispatcher_restore_takes_more_than_the_queue_holds() -> None:
    # What was accepted before a restart cannot be refused after it.
    office = Office(settings=Settings(workers=1, queue_size=1))
    for number in range(20):
        office.dispatcher.restore([Job(letter(f"ann/{number}"))])
    office.finish()
    assert office.done == [f"ann/{number}" for number in range(20)]


def test_dispatcher_goes_on_when_a_thread_could_not_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    # Systems limit threads, and a crowd of connections can use them up for a moment.
    office = Office()
    with monkeypatch.context() as patch:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")
        patch.setattr(threading.Thread, "start", refuse)
        taken = [] if submit_fails(office, "ann/1") else ["ann/1"]
    office.submit("bob/1")
    assert office.dispatcher.join(PATIENCE)
    # What was refused comes again from the platform, so it must not be handled now; what was taken must.
    assert sorted(office.done) == [*taken, "bob/1"]


def test_dispatcher_works_on_the_thread_that_joins_when_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # From Python 3.12 on no thread can be started while the interpreter ends.
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    failing = Failing(times=1)
    office = Office(lambda message: failing(message) if message.key == "ann/1" else None)
    office.submit("ann/1", "bob/1")
    assert not office.dispatcher.join(0.1)
    assert office.done == ["bob/1"]
    office.pass_time(1.0)
    assert office.dispatcher.drain(PATIENCE) == []
    assert office.done == ["bob/1", "ann/1"]


def test_dispatcher_wake_begins_what_a_shortage_of_threads_held_up(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    office = Office()
    with monkeypatch.context() as patch:
        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")
        patch.setattr(threading.Thread, "start", refuse)
        office.submit("ann/1", "bob/1")
        office.dispatcher.wake()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    office.dispatcher.wake()
    wait_until(lambda: sorted(office.done) == ["ann/1", "bob/1"])


# ---- What may have ended the last run


def suspect(key: str) -> Job:
    """A message that may have been in hand when the process died."""
    job = Job(letter(key))
    job.is_suspect = True
    return job


def test_dispatcher_handles_suspects_alone_and_first() -> None:
    gate = Gate()
    office = Office(gate, Settings(workers=8))
    office.restore(Job(letter("eve/1")), suspect("ann/1"), Job(letter("ann/2")), suspect("bob/1"))
    office.submit("new/1")
    for expected in (["ann/1"], ["ann/1", "bob/1"]):
        wait_until(lambda expected=expected: office.begun == expected)  # type: ignore[misc]
        assert not office.dispatcher.join(0.01)
        assert office.begun == expected
        gate.open_for(expected[-1])
    wait_until(lambda: sorted(gate.inside) == ["ann/2", "eve/1", "new/1"])
    gate.open()
    office.finish()


def test_dispatcher_lets_the_others_go_on_when_a_suspect_has_failed() -> None:
    failing = Failing(times=1)
    office = Office(lambda message: failing(message) if message.key == "ann/1" else None)
    office.restore(suspect("ann/1"), Job(letter("bob/1")))
    wait_until(lambda: office.done == ["bob/1"])
    office.finish()
    assert office.done == ["bob/1", "ann/1"]


# ---- The end


def test_dispatcher_join_waits_until_nothing_is_left_to_do() -> None:
    gate = Gate()
    office = Office(gate)
    assert office.dispatcher.join(0.0)
    office.submit("ann/1", "ann/2")
    assert not office.dispatcher.join(0.01)
    gate.open()
    assert office.dispatcher.join(PATIENCE)
    assert office.done == ["ann/1", "ann/2"]


def test_dispatcher_drain_finishes_what_waits() -> None:
    office = Office(settings=Settings(workers=2))
    office.submit(*(f"{sender}/{number}" for number in range(10) for sender in "abc"))
    assert office.dispatcher.drain(PATIENCE) == []
    assert len(office.done) == 30


def test_dispatcher_drain_takes_no_more_messages() -> None:
    office = Office()
    office.dispatcher.drain(0.0)
    with pytest.raises(Busy, match="shutting down"):
        office.submit("ann/1")


def test_dispatcher_drain_tells_what_was_left_undone() -> None:
    gate = Gate(held="slow")
    office = Office(gate, Settings(workers=1))
    office.submit("slow/1", "slow/2", "ann/1")
    wait_until(lambda: gate.inside)
    assert sorted(office.dispatcher.drain(0.0)) == ["ann/1", "slow/1", "slow/2"]
    gate.open()


def test_dispatcher_begins_and_settles_nothing_after_drain() -> None:
    gate = Gate(held="slow")
    office = Office(gate, Settings(workers=1))
    office.submit("slow/1", "ann/1")
    wait_until(lambda: gate.inside)
    with no_thread_left():
        assert sorted(office.dispatcher.drain(0.0)) == ["ann/1", "slow/1"]
        gate.open()
    assert (office.begun, office.settled) == (["slow/1"], [])


def test_dispatcher_drain_tells_what_waits_for_a_retry() -> None:
    office = Office(Failing(times=1))
    office.submit("ann/1", "ann/2")
    wait_until(lambda: office.delays)
    assert office.dispatcher.drain(0.0) == ["ann/1", "ann/2"]


def test_dispatcher_keeps_no_thread_when_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "KEEP_THREAD", 0.0)
    with no_thread_left():
        office = Office(settings=Settings(workers=8))
        office.submit(*(f"sender{number}/1" for number in range(100)))
        office.finish()
