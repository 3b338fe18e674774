"""Errors: what the log is told about things that happen again and again."""

from __future__ import annotations

from typing import List

import pytest

from kfserver import TELL_SECONDS, SettingsError, Teller


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still."""
    return Clock()


@pytest.fixture
def teller(clock: Clock) -> Teller:
    """A teller with that clock."""
    return Teller(clock)


def told(caplog: pytest.LogCaptureFixture) -> List[str]:
    """What the log was told, and forgets."""
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


def test_teller_warn_tells_of_a_kind_once_a_minute_and_how_often_it_was_left_out(
        teller: Teller, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    for number in range(3000):
        teller.warn("full", "the queue is full: %d of %d", number, 10)
    assert told(caplog) == ["the queue is full: 0 of 10"]
    clock.now += TELL_SECONDS
    teller.warn("full", "the queue is full: %d of %d", 7, 10)
    assert told(caplog) == ["the queue is full: 7 of 10 (2999 more like this since the last such line)"]
    clock.now += TELL_SECONDS
    teller.warn("full", "the queue is full")
    assert told(caplog) == ["the queue is full"]


def test_teller_warn_tells_of_different_kinds(teller: Teller, caplog: pytest.LogCaptureFixture) -> None:
    for kind in ("one", "other", "one"):
        teller.warn(kind, "a warning")
    assert told(caplog) == ["a warning", "a warning"]


def fail(error: BaseException) -> None:
    """Raise the error."""
    raise error


def test_teller_guard_tells_of_an_error_once_and_never_raises(
        teller: Teller, caplog: pytest.LogCaptureFixture) -> None:
    assert teller.guard(len, "fine")
    for error in (MemoryError(), MemoryError(), ZeroDivisionError("a user's words"), SettingsError("ours")):
        assert not teller.guard(fail, error)
    assert [record.exc_info and str(record.exc_info[1]).split(" at ")[0] for record in caplog.records] == [
        "MemoryError", "ZeroDivisionError", "SettingsError: ours"]


def test_teller_guard_survives_a_log_that_fails(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kfserver.log.error", lambda *arguments, **options: fail(MemoryError()))
    assert not teller.guard(fail, MemoryError())
