"""Inbox: what becomes of messages when processes die, fork, stop and share a journal; conversations, waiting replies.

What a death does is shown by processes that die: each is a program of a few lines that embeds kfserver.
"""

from __future__ import annotations

import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap
import threading
from typing import Any, List, Tuple

import pytest
from send_api_server import APP_KEY, APP_SECRET, Exchange, SendApiServer
from support import PATIENCE, ROOT, Shop, local, push, wait_until

import kfserver
from kfserver import HandlerRegistry, KfError, KfServer, Message, NetworkError, Settings, SettingsError

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

# What every program below begins with. ``say`` prints a line at once.
PRELUDE = """
import os, sys, threading, time
sys.path[:0] = [{root!r}, {tests!r}]
from kfserver import HandlerRegistry, KfServer, Settings
from support import push
registry = HandlerRegistry()
def say(*words): os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def make(**settings):
    return KfServer(registry, Settings(**{{"journal": {journal!r}, "host": "127.0.0.1", "port": 0, **settings}}))
"""


class Programs:
    """Runs programs on one journal, one after the other."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.journal = str(folder / "kf.db")

    def start(self, code: str, *arguments: str) -> subprocess.Popen[str]:
        """A program that begins with the prelude, running."""
        prelude = PRELUDE.format(root=str(ROOT), tests=str(ROOT / "tests"), journal=self.journal)
        command = [sys.executable, "-c", prelude + textwrap.dedent(code), *arguments]
        return subprocess.Popen(command, stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)

    def run(self, code: str, *arguments: str) -> Tuple[int, List[str]]:
        """What a program ended with, and the lines that it printed."""
        with self.start(code, *arguments) as program:
            out, errors = program.communicate(timeout=3 * PATIENCE)
        assert "Traceback" not in errors, errors
        return program.returncode, out.splitlines()


@pytest.fixture
def programs(tmp_path: pathlib.Path) -> Programs:
    """Programs on a new journal."""
    return Programs(tmp_path)


# ---- A message that ends the process

POISONED = """
@registry.on("text", "poison")
def poison(message): os._exit(9)
@registry.on("text")
def fine(message): say("handled", message.content)
@registry.on("text", "first")
def first(message): all_fed.wait(5)
@registry.on_error
def failed(message, error): say("on_error", message.content, type(error).__name__)
all_fed = threading.Event()
"""


def go_on(tries: int, workers: int) -> str:
    """The program that goes on where the last one ended."""
    return POISONED + f"""
with make(tries={tries}, workers={workers}) as server:
    assert server.join(5)
"""


@pytest.mark.parametrize("tries", [1, 2])
def test_inbox_gives_up_a_message_that_ends_the_process_each_time(programs: Programs, tries: int) -> None:
    begin = f"""
server = make(tries={tries}, workers=1)
for number, content in enumerate(["first", "poison", "b", "c"], 1):
    server.feed(push("user", number, content))
all_fed.set()
server.join(5)
"""
    assert programs.run(POISONED + begin)[0] == 9
    lives = [programs.run(go_on(tries, 1)) for _ in range(tries + 1)]
    # It gets at least one more run, and as many as it has tries.
    assert [status for status, _ in lives] == [9] * tries + [0]
    assert lives[-1][1] == ["on_error poison HandlerError", "handled b", "handled c"]
    assert programs.run(go_on(tries, 1)) == (0, [])


def test_inbox_blames_no_innocent_for_the_end_of_the_process(programs: Programs) -> None:
    # All were in hand when the process died. With one try in all, each but the guilty one is handled all the same.
    held = """
    @registry.on("text")
    def hold(message): say("begun"); threading.Event().wait()
    server = make(tries=1, workers=8)
    for number in range(8): server.feed(push(f"user{number}", number, "poison" if number == 5 else "fine"))
    sys.stdin.readline()
    """
    with programs.start(held) as program:
        assert program.stdout
        assert [program.stdout.readline() for _ in range(8)] == ["begun\n"] * 8
        program.kill()
    lives = [programs.run(go_on(1, 8)) for _ in range(2)]
    assert [status for status, _ in lives] == [9, 0]
    lines = lives[0][1] + lives[1][1]
    assert (lines.count("handled fine"), lines.count("on_error poison HandlerError")) == (7, 1)


# ---- What a handler returned


def busy(exchange: Exchange) -> None:
    """The send API asks to be tried again later."""
    exchange.answer({}, 503)


ANSWERING = """
@registry.on("text", "plain")
def plain(message): say("plain")
@registry.on("text")
def answer(message): say("handled"); return ["one", "two"]
@registry.on_error
def failed(message, error): say("on_error", type(error).__name__)
"""


def keys_of(api: SendApiServer) -> str:
    """The settings that send to this API, as arguments."""
    return f"api_base={api.base!r}, app_key={APP_KEY!r}, app_secret={APP_SECRET!r}"


def test_inbox_sends_after_a_crash_what_a_handler_had_returned(programs: Programs) -> None:
    with SendApiServer() as api:
        api.send_troubles.extend([busy] * 100)
        begin = f"server = make({keys_of(api)})\nserver.feed(push())\nsys.stdin.readline()\n"
        with programs.start(ANSWERING + begin) as program:
            wait_until(lambda: api.send_requests)
            program.kill()
            assert program.stdout and program.stdout.read() == "handled\n"
        api.send_troubles.clear()
        again = f"with make({keys_of(api)}) as server: assert server.join(8)\n"
        assert programs.run(ANSWERING + again) == (0, [])
        assert [reply.content for reply in api.sent] == ["one", "two"]
        assert programs.run(ANSWERING + again) == (0, [])  # once, and not again
        assert len(api.sent) == 2


class Bot:
    """A server whose handler returns its text, sent by an API of the tests; what happened, in lists."""

    def __init__(self, api: SendApiServer, **settings: Any) -> None:
        self.handled: List[str] = []
        self.failed: List[BaseException] = []
        registry = HandlerRegistry()

        @registry.on("text", re.compile("^plain"))
        def plain(message: Message) -> None:
            self.handled.append(message.content)

        @registry.on("text")
        def answer(message: Message) -> str:
            self.handled.append(message.content)
            return message.content

        @registry.on_error
        def failed(message: Message, error: BaseException) -> None:
            self.failed.append(error)
        self.server = KfServer(registry, Settings(
            api_base=api.base, app_key=APP_KEY, app_secret=APP_SECRET, **settings))

    def __enter__(self) -> Bot:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()


def test_inbox_keeps_no_worker_for_a_reply_that_must_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "RETRY_REPLY_DELAYS", (0.1,))
    monkeypatch.setattr(kfserver, "PROBE_SECONDS", 0.1)
    with SendApiServer() as api:
        api.send_troubles.extend([busy] * 1000)
        with Bot(api, workers=2) as bot:
            for number in range(20):
                bot.server.feed(push(f"user{number}", number, "reply"))
            bot.server.feed(push("other", 100, "plain"))
            bot.server.feed(push("user0", 101, "plain later"))
            wait_until(lambda: "plain" in bot.handled)
            assert "plain later" not in bot.handled  # the sender's own messages wait
            api.send_troubles.clear()
            wait_until(lambda: "plain later" in bot.handled)
            assert bot.server.join(4 * PATIENCE)
            assert (len(api.sent), bot.failed) == (20, [])


def test_inbox_gives_up_a_reply_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "RETRY_REPLY_SECONDS", 0.1)
    monkeypatch.setattr(kfserver, "RETRY_REPLY_DELAYS", (0.01,))
    monkeypatch.setattr(kfserver, "PROBE_SECONDS", 0.01)
    with SendApiServer() as api:
        api.send_troubles.extend([busy] * 1000)
        with Bot(api) as bot:
            bot.server.feed(push())
            assert bot.server.join(PATIENCE)
            assert [type(error) for error in bot.failed] == [NetworkError]
            assert len(bot.handled) == 1


def test_inbox_runs_no_handler_again_because_a_reply_failed() -> None:
    with SendApiServer() as api:
        api.send_troubles.append(lambda exchange: exchange.answer({"errno": 3001, "msg": "param error"}))
        with Bot(api) as bot:
            for _ in range(2):
                assert bot.server.feed(push()).body == b"success"
                assert bot.server.join(PATIENCE)
            assert (bot.handled, [type(error) for error in bot.failed]) == (["hi"], [kfserver.ApiError])


def test_inbox_tells_the_handler_that_answers_a_message_without_a_sender(caplog: pytest.LogCaptureFixture) -> None:
    with SendApiServer() as api, Bot(api) as bot:
        bot.server.feed(push(sender=""))
        assert bot.server.join(PATIENCE)
        assert [type(error) for error in bot.failed] == [kfserver.HandlerError]
    assert "no sender" in caplog.text and "answer at test_inbox.py:" in caplog.text


# ---- Conversations


def test_inbox_keeps_a_conversation_for_each_sender() -> None:
    registry, seen = HandlerRegistry(), []

    @registry.on("text")
    def count(message: Message) -> None:
        message.session["count"] = message.session.get("count", 0) + 1
        seen.append((message.from_user_name, message.session["count"]))
        if message.content == "bad" and len(seen) < 4:
            raise ValueError
        if message.content == "bye":
            message.session.clear()
    server = KfServer(registry, Settings(workers=1))
    for number, (sender, content) in enumerate([
            ("ann", "hi"), ("bob", "hi"), ("ann", "hi"), ("ann", "bye"), ("ann", "hi")]):
        server.feed(push(sender, number, content))
    assert server.join(PATIENCE)
    assert sorted(seen) == [("ann", 1), ("ann", 1), ("ann", 2), ("ann", 3), ("bob", 1)]


def test_inbox_leaves_the_conversation_as_it_was_when_a_handler_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LONGEST_PAUSE", 0.01)
    registry, seen = HandlerRegistry(), []

    @registry.on("text")
    def fail_once(message: Message) -> None:
        message.session.setdefault("steps", []).append(len(seen))
        seen.append(list(message.session["steps"]))
        if len(seen) == 2:
            raise ValueError
    server = KfServer(registry)
    for number in range(2):
        server.feed(push(number=number))
        server.join(PATIENCE)
    assert seen == [[0], [0, 1], [0, 2]]


def test_inbox_refuses_a_session_that_is_not_json(caplog: pytest.LogCaptureFixture) -> None:
    registry = HandlerRegistry()

    @registry.on("text")
    def remember(message: Message) -> None:
        message.session["when"] = object()
    server = KfServer(registry)
    server.feed(push())
    assert server.join(PATIENCE)
    assert "HandlerError" in caplog.text and "'when'" in caplog.text


@pytest.mark.parametrize(("limit", "remembered"), [(1, [1, 1, 1]), (2, [1, 1, 2])])
def test_inbox_forgets_the_conversation_that_was_not_touched_for_longest(limit: int, remembered: List[int]) -> None:
    registry, seen = HandlerRegistry(), []

    @registry.on("text")
    def count(message: Message) -> None:
        message.session["count"] = message.session.get("count", 0) + 1
        seen.append(message.session["count"])
    server = KfServer(registry, Settings(workers=1, sessions=limit))
    for number, sender in enumerate(["ann", "bob", "ann"]):
        server.feed(push(sender, number))
        assert server.join(PATIENCE)
    assert seen == remembered


def test_conversations_forget_after_48_hours() -> None:
    now = [0.0]
    conversations = kfserver.Conversations(10, clock=lambda: now[0])
    conversations.save(("app", "ann"), {"step": 1})
    now[0] = 48 * 3600 - 1.0
    assert conversations.load(("app", "ann")) == {"step": 1}
    now[0] = 48 * 3600 + 1.0
    assert conversations.load(("app", "ann")) == {}


THREE_TURNS = """
@registry.on("text")
def order(message):
    step = message.session.get("step", "start")
    if message.content == "die": os._exit(9)
    if step == "start": message.session["step"] = "number"
    elif step == "number": message.session.update(step="confirm", number=message.content)
    else: say("ordered", message.session.pop("number")); message.session.clear()
server = make()
for number, content in enumerate(sys.argv[1:]): server.feed(push("ann", time.time_ns() // 1000, content))
server.join(5)
os._exit(7)
"""


def test_inbox_goes_on_with_a_conversation_after_a_kill(programs: Programs) -> None:
    lives = [programs.run(THREE_TURNS, turn) for turn in ("order", "12345", "yes")]
    assert lives == [(7, []), (7, []), (7, ["ordered 12345"])]


# ---- The end, and other processes


def test_inbox_reports_as_undone_exactly_what_the_journal_brings_again(tmp_path: pathlib.Path) -> None:
    runs: List[Tuple[str, str]] = []
    release = threading.Event()

    def make(name: str, grace: float) -> KfServer:
        registry = HandlerRegistry()

        @registry.on("text")
        def keep(message: Message) -> None:
            runs.append((name, message.key))
            if name == "old" and len(runs) > 3:
                release.wait(PATIENCE)
        return KfServer(registry, Settings(journal=str(tmp_path / "kf.db"), workers=1, grace=grace))
    old = make("old", 0.1)
    for number in range(8):
        old.feed(push(f"user{number}", number))
    undone = old.stop()
    release.set()
    new = make("new", 5)
    new.feed(push("last", 100))
    assert new.join(PATIENCE)
    again = [key for name, key in runs if name == "new"]
    assert sorted(again) == sorted([*undone, "app/last/text/100"])
    assert [name for name, _ in runs].count("old") == 4  # the stopped one has begun nothing more
    assert new.stop() == []


def test_kf_server_opens_nothing_until_it_is_used(tmp_path: pathlib.Path) -> None:
    before = set(threading.enumerate())
    KfServer(HandlerRegistry(), Settings(journal=str(tmp_path / "kf.db")))
    assert (list(tmp_path.iterdir()), set(threading.enumerate()) - before) == ([], set())


def test_kf_server_answers_503_while_another_has_the_journal_and_takes_over(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kfserver, "OPEN_AGAIN_SECONDS", 0.05)
    shop, settings = Shop(), Settings(journal=str(tmp_path / "kf.db"))
    first, second = KfServer(shop.registry, settings), KfServer(shop.registry, settings)
    assert first.feed(push(number=1)).status == 200
    assert [second.feed(push(number=number)).status for number in (2, 3)] == [503, 503]
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and "--redis" in errors[0].getMessage()
    first.stop()
    wait_until(lambda: second.feed(push(number=2)).status == 200)
    assert second.join(PATIENCE) and second.stop() == []


@needs_fork
def test_kf_server_works_in_a_process_that_was_forked_after_it_was_used(programs: Programs) -> None:
    code = """
    @registry.on("text")
    def keep(message): say(os.getpid() == parent, message.content)
    parent, server = os.getpid(), make(journal="")
    server.feed(push(content="before")); server.join(5)
    child = os.fork()
    server.feed(push("me", os.getpid(), "after")); server.join(5)
    if child: os.waitpid(child, 0)
    """
    assert sorted(programs.run(code)[1]) == ["False after", "True after", "True before"]


@needs_fork
@pytest.mark.parametrize(("ending", "status"), [
    ("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('words')", 1), ("1 / 0", 1), ("return", 0)])
def test_inbox_ends_a_child_that_a_handler_has_forked(programs: Programs, ending: str, status: int) -> None:
    code = f"""
    @registry.on("text", "fork")
    def fork(message):
        child = os.fork()
        if not child:
            {ending}
        say("child", os.waitpid(child, 0)[1] >> 8)
    @registry.on("text")
    def fine(message): say("handled", message.content)
    server = make(workers=1)
    for number, content in enumerate(["fork", "a", "b"]): server.feed(push(f"user{{number}}", number, content))
    server.join(5); server.stop()
    """
    with programs.start(textwrap.dedent(code)) as program:
        out, _ = program.communicate(timeout=3 * PATIENCE)
    assert out.splitlines() == [f"child {status}", "handled a", "handled b"]


@needs_fork
def test_inbox_ends_a_child_that_on_error_has_forked(programs: Programs) -> None:
    code = """
    @registry.on("text", "fail")
    def fail(message): 1 / 0
    @registry.on("text")
    def fine(message): say("handled", message.content)
    @registry.on_error
    def failed(message, error):
        child = os.fork()
        if not child: sys.exit(3)
        say("child", os.waitpid(child, 0)[1] >> 8)
    server = make(workers=1, tries=1)
    for number, content in enumerate(["fail", "a"], 1): server.feed(push(f"user{number}", number, content))
    server.join(5); server.stop()
    """
    with programs.start(code) as program:
        out, _ = program.communicate(timeout=3 * PATIENCE)
    assert out.splitlines() == ["child 3", "handled a"]


# ---- Starts


def test_kf_server_start_twice_or_after_stop_is_an_error() -> None:
    server = KfServer(HandlerRegistry(), local()).start()
    with pytest.raises(KfError, match="starts once"):
        server.start()
    server.stop()
    with pytest.raises(KfError, match="starts once"):
        server.start()


def test_kf_server_start_that_fails_leaves_nothing_locked(tmp_path: pathlib.Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        settings = local(port=taken.getsockname()[1], journal=str(tmp_path / "kf.db"))
        try:
            KfServer(HandlerRegistry(), settings).start()
        except SettingsError:
            with KfServer(HandlerRegistry(), local(journal=settings.journal)) as server:
                assert server.feed(push()).status == 200
