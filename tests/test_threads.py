"""Threads: on which thread and when a job runs. The clock is the real one; only lower bounds of time are tested."""

from __future__ import annotations

import threading
import time
from typing import Callable, List

import pytest
from support import PATIENCE, no_thread_left, wait_until

from kfserver import Alarm


@pytest.fixture
def later() -> Callable[[float, Callable[[], None]], None]:
    """The method of a new alarm."""
    return Alarm().later


def test_alarm_later_waits_as_long_as_it_was_told(later: Callable[[float, Callable[[], None]], None]) -> None:
    started, rang = time.monotonic(), []
    later(0.05, lambda: rang.append(time.monotonic()))
    wait_until(lambda: rang)
    assert rang[0] - started >= 0.05


def test_alarm_later_runs_what_is_due_first_first(later: Callable[[float, Callable[[], None]], None]) -> None:
    rang: List[str] = []
    later(0.3, lambda: rang.append("entered first"))
    later(0.0, lambda: rang.append("due first"))
    wait_until(lambda: len(rang) == 2)
    assert rang == ["due first", "entered first"]


def test_alarm_later_runs_each_job_once_whoever_enters_it(later: Callable[[float, Callable[[], None]], None]) -> None:
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


def test_alarm_survives_a_job_that_fails(later: Callable[[float, Callable[[], None]], None]) -> None:
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


def test_alarm_keeps_no_thread_when_nothing_is_due(later: Callable[[float, Callable[[], None]], None]) -> None:
    with no_thread_left():
        rang = threading.Event()
        later(0.0, rang.set)
        assert rang.wait(PATIENCE)
