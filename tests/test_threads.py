"""Threads: on which thread and when a job runs. The clock is the real one; only lower bounds of time are tested."""

from __future__ import annotations

import threading
import time

import pytest
from support import PATIENCE, no_thread_left, wait_until

from kfserver import call_later


def test_call_later_waits_as_long_as_it_was_told() -> None:
    started, rang = time.monotonic(), []
    call_later(0.05, lambda: rang.append(time.monotonic()))
    wait_until(lambda: rang)
    assert rang[0] - started >= 0.05


def test_call_later_tells_of_a_job_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    call_later(0.0, lambda: [][0])
    wait_until(lambda: "please report this" in caplog.text)


def test_call_later_is_silent_when_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")
    monkeypatch.setattr(threading.Thread, "start", refuse)
    call_later(0.0, lambda: None)


def test_call_later_keeps_no_thread_when_the_job_is_done() -> None:
    with no_thread_left():
        rang = threading.Event()
        call_later(0.0, rang.set)
        assert rang.wait(PATIENCE)
