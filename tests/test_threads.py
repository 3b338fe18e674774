"""Threads: on which thread and when a job runs. The clock is the real one; only lower bounds of time are tested."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Callable, List

import pytest
from support import PATIENCE, no_thread_left, wait_until

import kfserver
from kfserver import Alarm, ThreadCache


def thread_of_a_job(cache: ThreadCache) -> threading.Thread:
    """Run a job, wait until it is through, and tell on which thread it ran."""
    ran: List[threading.Thread] = []
    cache.run(lambda: ran.append(threading.current_thread()))
    wait_until(lambda: ran)
    return ran[0]


# ---- ThreadCache


def test_thread_cache_run_starts_every_job_at_once() -> None:
    cache, barrier, through = ThreadCache("test"), threading.Barrier(6), threading.Semaphore(0)

    def meet() -> None:
        barrier.wait(PATIENCE)  # passed only if all six are running
        through.release()
    for _ in range(6):
        cache.run(meet)
    assert all(through.acquire(timeout=PATIENCE) for _ in range(6))


def test_thread_cache_run_uses_a_kept_thread_again() -> None:
    cache = ThreadCache("test")
    seen = [thread_of_a_job(cache)]

    def seen_before() -> bool:
        seen.append(thread_of_a_job(cache))
        return seen[-1] in seen[:-1]
    # Not at the first attempt perhaps: a thread is spare a moment after its job is through.
    wait_until(seen_before)


def test_thread_cache_names_its_threads() -> None:
    assert thread_of_a_job(ThreadCache("some-name")).name == "some-name"


def test_thread_cache_uses_daemon_threads_that_never_hold_up_an_exit() -> None:
    assert thread_of_a_job(ThreadCache("test")).daemon


def test_thread_cache_lets_a_spare_thread_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "KEEP_THREAD", 0.01)
    cache = ThreadCache("test")
    first = thread_of_a_job(cache)
    first.join(PATIENCE)
    assert not first.is_alive()
    assert thread_of_a_job(cache) is not first


def test_thread_cache_loses_no_job_to_a_thread_that_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without patience every thread is about to leave at every moment: the race that a pause would only hide.
    monkeypatch.setattr(kfserver, "KEEP_THREAD", 0.0)
    cache, ran = ThreadCache("test"), []
    with no_thread_left():
        for number in range(50):
            cache.run(lambda number=number: ran.append(number))  # type: ignore[misc]
        wait_until(lambda: len(ran) == 50)
    assert sorted(ran) == list(range(50))


class Task:
    """A job whose end of life can be watched."""

    def __init__(self) -> None:
        self.ran = threading.Event()

    def __call__(self) -> None:
        self.ran.set()


def test_thread_cache_forgets_a_job_that_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "KEEP_THREAD", 600.0)  # not because the thread has left
    cache = ThreadCache("test")
    task = Task()
    cache.run(task)
    assert task.ran.wait(PATIENCE)
    reference = weakref.ref(task)
    del task
    wait_until(lambda: reference() is None)


# ---- Alarm


@pytest.fixture
def later() -> Callable[[float, kfserver.Job], None]:
    """The method of a new alarm."""
    return Alarm().later


def test_alarm_later_waits_as_long_as_it_was_told(later: Callable[[float, kfserver.Job], None]) -> None:
    started, rang = time.monotonic(), []
    later(0.05, lambda: rang.append(time.monotonic()))
    wait_until(lambda: rang)
    assert rang[0] - started >= 0.05


def test_alarm_later_runs_what_is_due_first_first(later: Callable[[float, kfserver.Job], None]) -> None:
    rang: List[str] = []
    later(0.3, lambda: rang.append("entered first"))
    later(0.0, lambda: rang.append("due first"))
    wait_until(lambda: len(rang) == 2)
    assert rang == ["due first", "entered first"]


def test_alarm_later_runs_each_job_once_whoever_enters_it(later: Callable[[float, kfserver.Job], None]) -> None:
    rang: List[int] = []

    def enter(first: int) -> None:
        for number in range(first, first + 100):
            later(0.0, lambda number=number: rang.append(number))  # type: ignore[misc]
    threads = [threading.Thread(target=enter, args=(first,)) for first in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    # Each time that nothing is due the alarm's thread leaves: entered at that moment, a job must not be forgotten.
    wait_until(lambda: len(rang) >= 400)
    assert sorted(rang) == list(range(400))


def test_alarm_survives_a_job_that_fails(later: Callable[[float, kfserver.Job], None]) -> None:
    ran = threading.Event()
    later(0.0, lambda: [][0])
    later(0.0, ran.set)
    assert ran.wait(PATIENCE)


def test_alarm_later_tries_again_when_no_thread_could_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    alarm, first, second = Alarm(), threading.Event(), threading.Event()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        alarm.later(0.0, first.set)
    alarm.later(0.0, second.set)
    assert first.wait(PATIENCE) and second.wait(PATIENCE)


def refuse(thread: threading.Thread) -> None:
    """What the system says when it has no more threads."""
    raise RuntimeError("can't start new thread")


def test_alarm_keeps_no_thread_when_nothing_is_due(later: Callable[[float, kfserver.Job], None]) -> None:
    with no_thread_left():
        rang = threading.Event()
        later(0.0, rang.set)
        assert rang.wait(PATIENCE)
