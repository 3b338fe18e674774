"""The command ``kfserver.py journal``: what it tells of a journal, what it changes, and what it keeps to itself."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
from typing import Any, Callable, Dict, Iterator, List, Tuple

import pytest
from support import PATIENCE, ROOT, push

import kfserver
from kfserver import (
    FINISHED,
    JOURNAL_ID,
    JOURNAL_VERSION,
    WAITING,
    Journal,
    Settings,
    call_later,
    dedup_key,
    main,
    parse,
)

# When the messages of these tests came, and a clock two minutes later: Unix seconds.
RECEIVED = 1_700_000_000
NOW = RECEIVED + 120


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    """Where the journal of a test is, alone in its folder."""
    (tmp_path / "disk").mkdir()
    return str(tmp_path / "disk" / "kf.db")


@pytest.fixture(autouse=True)
def _clock_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time that the command takes for now."""
    monkeypatch.setattr(kfserver.time, "time", lambda: NOW)


@contextlib.contextmanager
def server_at_work(path: str) -> Iterator[Journal]:
    """A journal in a server's hands: one message is finished, two wait, of which one was tried, and one is dead."""
    settings = Settings(journal=path, dedup_size=100)
    with contextlib.closing(Journal(settings, call_later, lambda: RECEIVED)) as journal:
        for number, content in enumerate(["done", "a secret", "another secret", "a secret of the dead"], 1):
            body = push("user", number, content)
            journal.add([(dedup_key(parse(body)), body)])
        journal.finish("app/user/text/1")
        journal.tried("app/user/text/3", 1)
        journal.fail("app/user/text/4", "ValueError at handlers.py:7")
        journal.flush()
        yield journal


def add_more(journal: Journal) -> None:
    """A message whose replies wait, one whose replies failed, a push that could not be read, and a session."""
    for number in (5, 6):
        body = push("user", number, "handled")
        journal.add([(dedup_key(parse(body)), body)])
        journal.answered(f"app/user/text/{number}", '["a secret reply"]', ("app/user", '{"step": "a secret"}'))
    journal.fail("app/user/text/6", "ApiError")
    journal.keep_unreadable(b"<xml> a secret", "not XML: no element found")
    journal.flush()


@pytest.fixture
def journal(path: str) -> str:
    """The path of such a journal, whose server has stopped."""
    with server_at_work(path):
        return path


def tell(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints when all is well."""
    assert main(["journal", *arguments]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def tell_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Dict[str, Any]:
    """What the command prints with --json."""
    told: Dict[str, Any] = json.loads(tell(capsys, "--json", *arguments))
    return told


def states(path: str) -> Dict[str, Tuple[int, int]]:
    """The state and the tries of each message, by its number."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        rows = db.execute("SELECT key, state, tries FROM messages").fetchall()
    return {key.rpartition("/")[2]: (state, tries) for key, state, tries in rows}


def without_times(text: str) -> str:
    """The text without dates and times, which depend on where this runs."""
    return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", "<time>", text)


# ---- What is told


def test_journal_command_tells_what_waits_and_what_is_dead(
        journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert without_times(tell(capsys, journal)) == (
        "waiting        2\n"
        "finished       1\n"
        "dead           1\n"
        "unreadable     0\n"
        "sessions       0\n"
        "waiting for 120 s: app/user/text/2 received <time>\n"
        "dead: app/user/text/4 received <time>, ValueError at handlers.py:7\n")


def test_journal_command_tells_of_replies_unreadable_pushes_and_sessions(
        path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server_at_work(path) as running:
        add_more(running)
        assert without_times(tell(capsys, path)) == (
            "waiting        3\n"
            "finished       1\n"
            "dead           2\n"
            "unreadable     1\n"
            "sessions       1\n"
            "waiting for 120 s: app/user/text/2 received <time>\n"
            "dead: app/user/text/4 received <time>, ValueError at handlers.py:7\n"
            "dead: app/user/text/6 received <time>, handled, replies to send, ApiError\n")
        told = tell_json(capsys, path)
    assert {name: told[name] for name in ("waiting", "dead", "unreadable", "sessions")} == {
        "waiting": 3, "dead": 2, "unreadable": 1, "sessions": 1}


def test_journal_command_shows_replies_and_unreadable_pushes_on_request(
        path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server_at_work(path) as running:
        add_more(running)
        lines = without_times(tell(capsys, "--show", path)).splitlines()
        shown = tell_json(capsys, "--show", path)
    assert lines.count('    ["a secret reply"]') == 2
    assert lines[-2:] == ["unreadable: unreadable 0 received <time>, not XML: no element found", "    <xml> a secret"]
    assert shown["dead_messages"][1]["replies"] == '["a secret reply"]'
    assert [(push["received"], push["error"], push["content"]) for push in shown["unreadable_pushes"]] == [
        (RECEIVED, "not XML: no element found", "<xml> a secret")]


def test_journal_command_tells_it_as_json(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = tell_json(capsys, journal)
    counts = {name: told[name] for name in ("requeued", "waiting", "finished", "dead")}
    assert counts == {"requeued": 0, "waiting": 2, "finished": 1, "dead": 1}
    assert told["oldest_waiting"] == {"key": "app/user/text/2", "received": RECEIVED, "tries": 0, "error": "",
                                      "handled": False}
    assert [(row["key"], row["error"]) for row in told["dead_messages"]] == [
        ("app/user/text/4", "ValueError at handlers.py:7")]


def test_journal_command_tells_that_there_is_nothing(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Journal(Settings(journal=path, dedup_size=100), call_later).close()
    assert tell(capsys, path) == (
        "waiting        0\nfinished       0\ndead           0\nunreadable     0\nsessions       0\n")
    assert tell_json(capsys, path)["oldest_waiting"] is None


@pytest.mark.parametrize("options", [[], ["--json"], ["--requeue"], ["--json", "--requeue"]], ids=" ".join)
def test_journal_command_keeps_what_users_wrote_to_itself(
        path: str, capsys: pytest.CaptureFixture[str], options: List[str]) -> None:
    with server_at_work(path) as running:
        add_more(running)
        assert "secret" not in tell(capsys, *options, path)


def test_journal_command_shows_what_users_wrote_to_who_asks(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = tell(capsys, "--show", journal)
    assert re.findall(r'"Content": "([^"]*)"', told) == ["a secret", "another secret", "a secret of the dead"]
    shown = tell_json(capsys, "--show", journal)
    assert [parse(row["content"].encode()).content for row in shown["waiting_messages"] + shown["dead_messages"]] == [
        "a secret", "another secret", "a secret of the dead"]


@pytest.mark.parametrize(("payload", "shown"), [
    pytest.param("谢谢".encode(), "谢谢", id="any language"),
    pytest.param(b"\x1b[2J\r\n\x07", r"\x1b[2J\r\n\x07", id="what would steer a terminal"),
    pytest.param("\u202e\u2028".encode(), r"\u202e\u2028", id="what would turn a line around"),
    pytest.param(b"\xff", r"\xff", id="bytes that are no text"),
])
def test_journal_command_shows_safely(
        path: str, payload: bytes, shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(Journal(Settings(journal=path, dedup_size=100), call_later)) as journal:
        journal.add([("key", payload)])
    assert tell(capsys, "--show", path).splitlines()[-1] == "    " + shown


# ---- What is changed


def test_journal_command_changes_nothing_by_itself(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = pathlib.Path(journal).read_bytes()
    tell(capsys, journal)
    tell(capsys, "--json", "--show", journal)
    assert pathlib.Path(journal).read_bytes() == content


def test_journal_command_requeue_puts_the_dead_back(journal: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = tell(capsys, "--requeue", journal).splitlines()
    assert told[0] == "1 put back, to be handled when the server starts the next time"
    assert told[1:4] == ["waiting        3", "finished       1", "dead           0"]
    assert states(journal) == {"1": (FINISHED, 0), "2": (WAITING, 0), "3": (WAITING, 1), "4": (WAITING, 0)}
    assert tell_json(capsys, "--requeue", journal)["requeued"] == 0


def test_journal_command_requeue_puts_replies_back_without_their_handler(
        path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server_at_work(path) as running:
        add_more(running)
    assert tell_json(capsys, "--requeue", path)["requeued"] == 2
    with server_at_work(path) as journal:
        replies = {row.key.rpartition("/")[2]: (row.tries, row.error, row.replies) for row in journal.waiting()}
        assert replies["6"] == (0, "", '["a secret reply"]')
        assert "app/user/text/6" not in journal.finished_keys()  # it is in hand again


@pytest.mark.parametrize("options", [[], ["--requeue"]], ids=["reading", "requeue"])
def test_journal_command_leaves_the_log_of_a_server_that_lost_its_locks(path: str, options: List[str]) -> None:
    with server_at_work(path) as running:
        for name in ("kf.db", "kf.db-wal", "kf.db-shm"):  # closing a descriptor frees the locks
            pathlib.Path(path).with_name(name).read_bytes()
        log = os.stat(path + "-wal").st_ino
        assert run(path, *options).returncode == 0
        assert os.stat(path + "-wal").st_ino == log
        assert running.healthy


def test_journal_command_sends_who_has_an_older_journal_to_the_server(
        path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE messages (key)")
        db.execute(f"PRAGMA application_id = {JOURNAL_ID}")
        db.execute("PRAGMA user_version = 1")
    assert main(["journal", path]) == 2
    assert "of an older kfserver: start the server once" in capsys.readouterr().err


def test_journal_command_works_while_a_server_runs(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server_at_work(path) as running:
        assert tell_json(capsys, path)["waiting"] == 2
        assert tell_json(capsys, "--requeue", path)["requeued"] == 1
        running.finish("app/user/text/2")
        running.flush()
        told = tell_json(capsys, path)
        assert [told[name] for name in ("waiting", "finished", "dead")] == [2, 2, 0]


def test_journal_command_reads_what_a_killed_server_left(
        path: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server_at_work(path):
        for name in ("kf.db", "kf.db-wal"):
            shutil.copy(os.path.join(os.path.dirname(path), name), str(tmp_path))
    assert tell_json(capsys, str(tmp_path / "kf.db"))["waiting"] == 2


# ---- Files that are no journal


def write_text(path: str) -> None:
    """Make a file of somebody's."""
    pathlib.Path(path).write_text("Dear diary,")


def write_newer(path: str) -> None:
    """Make a journal of a kfserver to come."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mails (text)")
        db.execute(f"PRAGMA application_id = {JOURNAL_ID}")
        db.execute(f"PRAGMA user_version = {JOURNAL_VERSION + 1}")


def write_damaged(path: str) -> None:
    """Make a journal of ours that has lost all but its first page."""
    Journal(Settings(journal=path, dedup_size=100), call_later).close()
    with open(path, "r+b") as file:
        file.seek(4096)
        file.write(b"garbage" * 2000)


@pytest.mark.parametrize("options", [[], ["--requeue"]], ids=["reading", "requeue"])
@pytest.mark.parametrize(("make", "told"), [
    pytest.param(lambda path: None, "there is no journal", id="missing"),
    pytest.param(os.mkdir, "cannot use the journal", id="a folder"),
    pytest.param(write_text, "is not a journal of kfserver", id="foreign"),
    pytest.param(lambda path: open(path, "w").close(), "cannot use the journal", id="empty"),
    pytest.param(write_newer, "written by a newer kfserver", id="newer"),
    pytest.param(write_damaged, "cannot use the journal", id="damaged"),
])
def test_journal_command_says_in_one_line_what_is_wrong_with_the_file(
        path: str, make: Callable[[str], Any], told: str, options: List[str],
        capsys: pytest.CaptureFixture[str]) -> None:
    make(path)
    existed = os.path.exists(path)
    assert main(["journal", path, *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("kfserver: ")
    assert told in printed.err
    assert path in printed.err
    assert printed.err.count("\n") == 1
    assert os.path.exists(path) == existed


# ---- As a program


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command as a process of its own."""
    return subprocess.run([sys.executable, "-W", "error", str(ROOT / "kfserver.py"), "journal", *arguments],
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
                          capture_output=True, timeout=PATIENCE)


@pytest.mark.parametrize("name", ["kf.db", "100%?#.db"])
def test_program_journal(path: str, name: str) -> None:
    renamed = os.path.join(os.path.dirname(path), name)
    with server_at_work(renamed):
        result = run(renamed)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.splitlines()[:3] == [b"waiting        2", b"finished       1", b"dead           1"]


def test_program_journal_shows_what_the_terminal_cannot(path: str) -> None:
    with contextlib.closing(Journal(Settings(journal=path, dedup_size=100), call_later)) as journal:
        journal.add([("key", "谢谢".encode())])
    result = run("--show", path, PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.splitlines()[-1] == rb"    \u8c22\u8c22"


def test_program_journal_needs_a_file() -> None:
    result = run()
    assert result.returncode == 2
    assert b"usage: kfserver.py journal " in result.stderr
