"""A short run of the fuzzer, of which `make fuzz` is the long one; and whether it would notice what must not be."""

from __future__ import annotations

import contextlib
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from fuzz import Breach, Broken, LawfulLog, check_answers, run_cases, run_shots

import kfserver

FUZZ = pathlib.Path(__file__).with_name("fuzz.py")


def test_fuzz_breaks_no_law() -> None:
    # A process of its own: some seconds of it, and nothing of what it starts, belong to the other tests.
    run = subprocess.run([sys.executable, str(FUZZ), "--cases", "2000", "--raw", "200", "--seed", "7"],
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300)
    assert run.returncode == 0, run.stdout.decode("utf-8", "replace")


def fail(*arguments: object) -> None:
    """What no function of kfserver may do."""
    raise ZeroDivisionError("a bug")


@pytest.mark.parametrize(("owner", "name", "bug"), [
    pytest.param(kfserver, "parse", fail, id="an exception"),
    pytest.param(kfserver, "verify", lambda *texts: True, id="every signature is good"),
    pytest.param(kfserver, "verify", lambda *texts: False, id="no signature is good"),
    pytest.param(kfserver.Envelope, "open", lambda envelope, sealed: b"{}", id="another message is in the envelope"),
    pytest.param(kfserver.ForbiddenPush, "public", None, id="a refusal tells why"),
    pytest.param(kfserver.ClaimCache, "claim", lambda claims, key: False, id="every message is a repeat"),
    pytest.param(kfserver.ClaimCache, "claim", lambda claims, key: True, id="no message is a repeat"),
    pytest.param(kfserver.ClaimCache, "release", lambda claims, key: None, id="claims are left behind"),
])
def test_run_cases_notices_a_bug(owner: Any, name: str, bug: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, bug)
    with contextlib.closing(LawfulLog()) as log, pytest.raises(Broken, match="--seed 7 --first 0, case [0-9]+"):
        run_cases(log, 7, 0, 1000)


def test_run_shots_notices_a_traceback_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "_body_length", lambda lengths, codings, minor: int((lengths or [b"0"])[0]))
    with contextlib.closing(LawfulLog()) as log, pytest.raises(Broken, match="--seed 7, shots 0 to 49"):
        run_shots(log, 7, 50)


ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsuccess"


@pytest.mark.parametrize(("received", "is_whole"), [
    pytest.param(b"", True, id="nothing"),
    pytest.param(ANSWER, True, id="one"),
    pytest.param(b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER * 2, True, id="several"),
    pytest.param(ANSWER + ANSWER[:-3], False, id="the last cut by a reset"),
    pytest.param(ANSWER[:20], False, id="a head cut by a reset"),
])
def test_check_answers_takes(received: bytes, is_whole: bool) -> None:
    check_answers(received, is_whole)


@pytest.mark.parametrize("received", [
    pytest.param(ANSWER[:-1], id="half a body"),
    pytest.param(ANSWER[:20], id="half a head"),
    pytest.param(ANSWER + b"Traceback", id="something behind"),
    pytest.param(b"success", id="no head"),
    pytest.param(ANSWER.replace(b"200", b"500"), id="a status of no row"),
])
def test_check_answers_refuses(received: bytes) -> None:
    with pytest.raises(Breach):
        check_answers(received, True)
