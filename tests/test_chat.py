"""Talking to the handlers in a terminal or by a script, and handlers that are loaded again when their file changes."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import logging
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import Callable, Dict, Iterator, List, Optional, Tuple

import pytest
from support import PATIENCE, ROOT, local

import kfserver
from kfserver import (
    WATCH_SECONDS,
    Chat,
    HandlerRegistry,
    Image,
    KfServer,
    Message,
    PrintedReplies,
    ReloadingHandlers,
    SettingsError,
    build_chat_parser,
    chat,
)

HANDLERS = r"""
    import json, re, sys
    from kfserver import HandlerRegistry, Image

    registry = HandlerRegistry()

    @registry.on("text", "hi")
    def greet(message):
        return "hello\nthere"

    @registry.on("text", re.compile(r"^order (\d+)$"))
    def order(message, number):
        return [f"looking for {number}", None, "", Image("https://shop.cn/map.png")]

    @registry.on("text", "steps")
    def steps(message):
        message.reply("one")
        print("working")
        message.reply(Image("https://shop.cn/two.png"))
        return "three"

    @registry.on("text", "quiet")
    @registry.on("image")
    def nothing(message):
        return None

    @registry.on("text", "fields")
    @registry.on("event")
    def fields(message):
        return json.dumps(dict(message.fields), sort_keys=True)

    @registry.on("text", "fail")
    def fail(message):
        return one_divided_by(0)

    def one_divided_by(number):
        return 1 / number

    @registry.on("text", "leave")
    def leave(message):
        sys.exit("by the handler")

    @registry.on("text", "hang")
    def hang(message):
        raise KeyboardInterrupt

    @registry.on("text", "many")
    def many(message):
        return ["1", "2", "3", "4", "5", "6"]

    @registry.on("text", "more and more")
    def more(message):
        for number in range(6):
            message.reply(str(number))

    @registry.on("text", "number")
    def number(message):
        return 5

    @registry.on_error
    def failed(message, error):
        message.reply("sorry")
"""
# The mtime of the first file that a test saves, in ns. Each further one is 1 ns younger: all fall into one second.
FIRST_SAVE = 1_700_000_000_000_000_000


pytestmark = pytest.mark.usefixtures("empty_folder")


@pytest.fixture(autouse=True)
def _no_handlers_beside_kfserver(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "__file__", str(tmp_path / "elsewhere" / "kfserver.py"))


Save = Callable[..., str]


@pytest.fixture
def save() -> Save:
    """Writes a file, of handlers if nothing else is said, and returns its path."""
    times = itertools.count(FIRST_SAVE)

    def write(text: str, name: str = "handlers.py") -> str:
        pathlib.Path(name).write_text(textwrap.dedent(text), encoding="utf-8")
        now = next(times)
        os.utime(name, ns=(now, now))
        return os.path.abspath(name)
    return write


Recite = Callable[..., Tuple[int, str]]


@pytest.fixture
def recite(save: Save, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Recite:
    """Runs `chat` over a script, against HANDLERS; returns its exit status and what it printed."""
    save(HANDLERS)

    def run(*script: str) -> Tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(script)))
        status = chat(build_chat_parser().parse_args([]))
        return status, capsys.readouterr().out
    return run


def lines(text: str) -> str:
    """A transcript as it stands in a test, without the indentation of the test."""
    return textwrap.dedent(text).lstrip("\n")


# ---- chat: what is said, and what is answered


@pytest.mark.parametrize(("script", "transcript"), [
    pytest.param(["hi"], """
        user: hi
          @registry.on('text', 'hi') -> greet
          to user: hello
            there
    """, id="text of two lines"),
    pytest.param(["order 12"], r"""
        user: order 12
          @registry.on('text', re.compile(r"^order (\d+)$")) -> order
          to user: looking for 12
          to user: [image] https://shop.cn/map.png
    """, id="list with a picture"),
    pytest.param(["steps"], """
        user: steps
          @registry.on('text', 'steps') -> steps
          to user: one
        working
          to user: [image] https://shop.cn/two.png
          to user: three
    """, id="replies in the middle of a handler"),
    pytest.param(["/image https://user.cn/cat.png"], """
        user: /image https://user.cn/cat.png
          @registry.on('image') -> nothing
          @registry.on('text', 'quiet') -> nothing
    """, id="handler with two decorators and no answer"),
    pytest.param(["/as anna", "hi", "/as  user", "quiet"], """
        user: /as anna
        anna: hi
          @registry.on('text', 'hi') -> greet
          to anna: hello
            there
        anna: /as  user
        user: quiet
          @registry.on('image') -> nothing
          @registry.on('text', 'quiet') -> nothing
    """, id="another user"),
    pytest.param(["what?"], """
        user: what?
          nobody takes this; to take it, write: @registry.on("text")
    """, id="nobody takes it"),
    pytest.param(["what?", "what?"], """
        user: what?
          nobody takes this; to take it, write: @registry.on("text")
        user: what?
          nobody takes this; to take it, write: @registry.on("text")
    """, id="nobody takes it, twice"),
    pytest.param(['/raw {"MsgType": "video", "FromUserName": "zoe"}'], """
        user: /raw {"MsgType": "video", "FromUserName": "zoe"}
          nobody takes this; to take it, write: @registry.on("video")
    """, id="nobody takes the type"),
    pytest.param(["/raw <xml><Event>enter</Event><FromUserName>zoe</FromUserName></xml>"], """
        user: /raw <xml><Event>enter</Event><FromUserName>zoe</FromUserName></xml>
          @registry.on('event') -> fields
          @registry.on('text', 'fields') -> fields
          to zoe: {"Event": "enter", "FromUserName": "zoe"}
    """, id="packet in XML"),
    pytest.param(["", "  ", "\t"], "", id="blank lines"),
    pytest.param([], "", id="nothing"),
    pytest.param(["/quit", "hi"], "user: /quit\n", id="quit"),
    pytest.param(["/help"], "user: /help\n" + kfserver.CHAT_HELP + "\n", id="help"),
])
def test_chat_prints_what_is_said_who_takes_it_and_what_is_answered(
        script: List[str], transcript: str, recite: Recite) -> None:
    assert recite(*script) == (0, lines(transcript))


@pytest.mark.parametrize(("line", "told"), [
    pytest.param("/imagine x", "no command /imagine: /help lists them; ", id="no such command"),
    pytest.param("/", "no command /: /help lists them; for a slash at the start of a text type two", id="only a slash"),
    pytest.param("/image", "write /image URL", id="image without a URL"),
    pytest.param("/as ", "write /as OPENID", id="no openid"),
    pytest.param("/raw", "write /raw PACKET", id="no packet"),
    pytest.param("/event", "write /event NAME [FIELD=VALUE ...]", id="no event"),
    pytest.param("/event enter Scene", "a field of an event is written NAME=VALUE", id="event with a word"),
    pytest.param("/raw hi", "a server would refuse this: the body is neither an XML document nor a JSON object",
                 id="raw text"),
    pytest.param("/raw {", "a server would refuse this: not JSON: ", id="not JSON"),
])
def test_chat_says_what_is_wrong_with_a_line_and_goes_on(line: str, told: str, recite: Recite) -> None:
    status, printed = recite(line, "quiet")
    said, answer, next_said = printed.splitlines()[:3]
    assert (said, next_said, status) == (f"user: {line}", "user: quiet", 1)
    assert answer.startswith(f"  {told}")


@pytest.mark.parametrize(("line", "told"), [
    pytest.param("fail", "ZeroDivisionError: division by zero", id="exception"),
    pytest.param("leave", "SystemExit: by the handler", id="sys.exit()"),
    pytest.param("many", r"many at handlers.py:\d+: kfserver.HandlerError: .*5 replies.*", id="six replies"),
    pytest.param("number", r"number at handlers.py:\d+: kfserver.HandlerError: a handler returns None, a text, Image.*",
                 id="no answer"),
])
def test_chat_shows_an_error_runs_on_error_and_goes_on(line: str, told: str, recite: Recite) -> None:
    status, printed = recite(line, "quiet")
    assert re.search(rf"^  {told}\n  to user: sorry\nuser: quiet\n", printed, re.MULTILINE)
    assert status == 1


def test_chat_refuses_a_reply_to_a_packet_without_a_sender(recite: Recite) -> None:
    status, printed = recite('/raw {"event": "AUDIT", "tpAppId": 5}')
    assert "kfserver.HandlerError: this message has no sender to reply to" in printed
    assert (status, "  to " in printed) == (1, False)


def test_chat_shows_only_the_steps_of_an_error_that_are_the_handlers_own(recite: Recite) -> None:
    _, printed = recite("fail")
    path = os.path.abspath("handlers.py")
    assert re.findall(r'^    File "(.*)", line \d+, in (.*)', printed, re.MULTILINE) == [
        (path, "fail"), (path, "one_divided_by")]
    assert "return one_divided_by(0)" in printed


MORE_HANDLERS = r"""
    import asyncio
    from kfserver import HandlerRegistry, Image

    registry = HandlerRegistry()

    @registry.on("text", "async")
    async def reply_async(message):
        await asyncio.sleep(0)
        message.reply("one")
        return ["two", Image("https://shop.cn/map.png")]

    @registry.on("text", "async fail")
    async def fail_async(message):
        await asyncio.sleep(0)
        return 1 / 0

    @registry.on("text", lambda message: message.content == "bad pattern" and 1 / 0)
    def never(message):
        return None

    @registry.on("text", "set")
    @registry.on("text", lambda message: message.session.get("steps"))
    def step(message):
        message.session.setdefault("steps", []).append(message.content)
        if message.content == "bad":
            raise ValueError("nothing is kept")
        if message.content == "odd":
            message.session["odd"] = {1, 2}
        if message.content == "end":
            message.session.clear()
            return "ended"
        if message.content == "many":
            return ["1", "2", "3", "4", "5", "6"]
        return " ".join(message.session["steps"])

    @registry.around
    async def print_around(message, handle):
        print("before", flush=True)
        return await handle(message)

    @registry.on_error
    async def failed(message, error):
        await asyncio.sleep(0)
        message.session["steps"] = "of on_error"
        return "not sent"
"""


def test_chat_runs_async_handlers_and_functions_around_them(recite: Recite, save: Save) -> None:
    save(MORE_HANDLERS)
    status, printed = recite("async")
    assert (status, printed) == (0, lines("""
        user: async
          @registry.on('text', 'async') -> reply_async
        before
          to user: one
          to user: two
          to user: [image] https://shop.cn/map.png
    """))


def test_chat_shows_only_the_steps_of_an_async_error_that_are_the_handlers_own(recite: Recite, save: Save) -> None:
    path = save(MORE_HANDLERS)
    status, printed = recite("async fail")
    shown = re.findall(r'^    File "(.*)", line \d+, in (.*)', printed, re.MULTILINE)
    assert [each for each in shown if "asyncio" not in each[0]] == [(path, "print_around"), (path, "fail_async")]
    assert status == 1


def test_chat_names_a_pattern_that_fails(recite: Recite, save: Save) -> None:
    save(MORE_HANDLERS)
    status, printed = recite("bad pattern")
    assert re.search(r"^  kfserver.PatternError: the pattern <lambda> at handlers.py:\d+ failed: ZeroDivisionError at ",
                     printed, re.MULTILINE)
    assert "ZeroDivisionError: division by zero" in printed
    assert status == 1


def test_chat_keeps_a_session_for_each_user_if_the_handler_returned(recite: Recite, save: Save) -> None:
    save(MORE_HANDLERS)
    status, printed = recite("set", "x", "bad", "odd", "many", "/as anna", "x", "set", "/as user", "y", "end", "z")
    assert re.findall(r"to (\w+: .*)|(nobody takes this)|(session\['odd'\] is not what JSON has)", printed) == [
        ("user: set", "", ""), ("user: set x", "", ""), ("", "", "session['odd'] is not what JSON has"),
        ("", "nobody takes this", ""), ("anna: set", "", ""), ("user: set x y", "", ""), ("user: ended", "", ""),
        ("", "nobody takes this", "")]
    assert status == 1


def test_chat_sends_five_replies_and_shows_what_becomes_of_a_sixth(recite: Recite) -> None:
    status, printed = recite("more and more")
    assert re.findall(r"^  to user: (.*)", printed, re.MULTILINE) == ["0", "1", "2", "3", "4"]
    # The handler asks for one more than there are, and so does the function of on_error.
    assert len(re.findall("HandlerError: .*5 replies", printed)) == 2
    assert status == 1


def sent_fields(line: str, recite: Recite) -> Dict[str, str]:
    """The fields of the message that a line makes, as its handler sees them; of those that change, what they are."""
    _, printed = recite(line)
    answer: Dict[str, str] = kfserver.parse_fields(printed[printed.index("{"):].encode())
    assert abs(int(answer.pop("CreateTime")) - time.time()) < PATIENCE
    if "MsgId" in answer:
        assert re.fullmatch(r"[1-9]\d{15}", answer["MsgId"])
        answer["MsgId"] = "16 digits"
    return answer


@pytest.mark.parametrize(("line", "fields"), [
    ("fields", {"MsgType": "text", "Content": "fields", "MsgId": "16 digits"}),
    ("  fields ", {"MsgType": "text", "Content": "  fields ", "MsgId": "16 digits"}),
    ("/event enter", {"MsgType": "event", "Event": "enter"}),
    ("/event  coupon  CouponId=5 Note=a=b Empty=",
     {"MsgType": "event", "Event": "coupon", "CouponId": "5", "Note": "a=b", "Empty": ""}),
    ("/event enter FromUserName=zoe", {"MsgType": "event", "Event": "enter", "FromUserName": "zoe"}),
])
def test_chat_makes_messages_as_the_platform_does(line: str, fields: Dict[str, str], recite: Recite) -> None:
    assert sent_fields(line, recite) == {"ToUserName": "app", "FromUserName": "user", **fields}


def recording() -> Tuple[ReloadingHandlers, List[Message]]:
    """Handlers that keep every message, and where they keep them."""
    handlers, taken = ReloadingHandlers(""), []  # type: ignore[var-annotated]
    handlers.registry.on("*")(taken.append)
    return handlers, taken


def test_chat_gives_every_message_an_id_and_a_key_of_its_own_in_later_conversations_too() -> None:
    handlers, taken = recording()
    for _ in range(2):
        talk = Chat(handlers)
        for line in ("same", "same", "/image same"):
            talk.take(line)
    assert len({message.msg_id for message in taken}) == len({message.key for message in taken}) == 6


@pytest.mark.parametrize(("line", "content"), [
    ("//start", "/start"), ("//", "/"), ("///", "//"), (" /help", " /help"), ("1 / 2", "1 / 2"), ("你好", "你好"),
    ("\x1d", "\x1d")])
def test_chat_takes_a_text_to_the_letter(line: str, content: str) -> None:
    handlers, taken = recording()
    Chat(handlers).take(line)
    assert [message.content for message in taken] == [content]


def test_chat_takes_handlers_from_its_option_before_the_environment(
        save: Save, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    save(answering("by default"))
    monkeypatch.setenv("KF_HANDLERS", save(answering("by environment"), "environment.py"))
    told: List[str] = []
    options: List[List[str]] = [["--handlers", save(answering("by option"), "option.py")], []]
    for arguments in options:
        monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
        chat(build_chat_parser().parse_args(arguments))
        told.append(capsys.readouterr().out.splitlines()[-1])
    assert told == ["  to user: by option", "  to user: by environment"]


def test_chat_without_handlers_says_that_nobody_takes_a_message(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi"))
    assert chat(build_chat_parser().parse_args([])) == 0
    assert 'write: @registry.on("text")' in capsys.readouterr().out


def test_chat_refuses_handlers_that_do_not_load() -> None:
    with pytest.raises(SettingsError, match="cannot read the handlers .*missing.py"):
        chat(build_chat_parser().parse_args(["--handlers", "missing.py"]))


def test_build_chat_parser_has_a_help_that_fits_a_screen_and_lists_every_command(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as caught:
        build_chat_parser().parse_args(["--help"])
    printed = capsys.readouterr().out.splitlines()
    assert caught.value.code == 0
    assert len(printed) <= 24
    assert max(map(len, printed)) <= 80
    listed = set(re.findall(r"^  (/\w+)", "\n".join(printed), re.MULTILINE))
    assert listed == {"/" + name for name in kfserver.CHAT_COMMANDS}


class TextLike:
    """An answer with a text."""

    content = "text"


@pytest.mark.parametrize(("answer", "printed"), [
    ("text", "  to anna: text\n"), (TextLike(), "  to anna: text\n"),
    (Image("url"), "  to anna: [image] url\n")], ids=["str", "text", "image"])
def test_printed_replies_show_every_kind_of_answer(
        answer: object, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    PrintedReplies().send("anna", answer)
    assert capsys.readouterr().out == printed


def test_printed_replies_come_through_an_outbox(capsys: pytest.CaptureFixture[str]) -> None:
    message = Message({"FromUserName": "anna"})
    kfserver.Outbox(PrintedReplies(), message)(["a", Image("b")])  # type: ignore[arg-type]
    assert capsys.readouterr().out == "  to anna: a\n  to anna: [image] b\n"


# ---- chat at a terminal


class Keyboard(io.StringIO):
    """Standard input of a terminal: what is typed, in which ^C interrupts."""

    def isatty(self) -> bool:
        """Somebody sits here."""
        return True

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        """The next line."""
        line = super().readline()
        if "^C" in line:
            raise KeyboardInterrupt
        return line


@pytest.mark.parametrize(("keys", "shown"), [
    pytest.param("hi\n", """
        user>   @registry.on('text', 'hi') -> greet
          to user: hello
            there
        user>
    """, id="text, then Ctrl-D"),
    pytest.param("/quit\nhi\n", "user>", id="quit"),
    pytest.param("\n \n", "user> user> user>", id="blank lines"),
    pytest.param("half a li^C\n/as anna\n", """
        user>
          interrupted; /quit ends
        user> anna>
    """, id="Ctrl-C in a line"),
    pytest.param("hang\n", """
        user>   @registry.on('text', 'hang') -> hang

          interrupted; /quit ends
        user>
    """, id="Ctrl-C in a handler"),
])
def test_chat_at_a_terminal_prompts(keys: str, shown: str, save: Save, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    path = save(HANDLERS)
    monkeypatch.setattr(sys, "stdin", Keyboard(keys))
    assert chat(build_chat_parser().parse_args([])) == 0
    # The prompt ends with a blank, which the tables of a test cannot show.
    greeting, *printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert greeting == f"13 handlers from {path}; /help lists what can be typed"
    assert printed == lines(shown).splitlines()


def test_chat_at_a_terminal_never_fails(save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    save(HANDLERS)
    monkeypatch.setattr(sys, "stdin", Keyboard("/none\nfail\n"))
    assert chat(build_chat_parser().parse_args([])) == 0


def test_chat_at_a_terminal_says_that_there_are_no_handlers(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard())
    assert chat(build_chat_parser().parse_args([])) == 0
    assert capsys.readouterr().out.startswith("0 handlers: no handlers.py here; ")


# ---- ReloadingHandlers


def answering(answer: str) -> str:
    """The text of a file with one handler, which answers that."""
    return f"""
from kfserver import HandlerRegistry
registry = HandlerRegistry()

@registry.on("text")
def answer(message):
    return {answer!r}
"""


def ask(registry: Optional[HandlerRegistry]) -> object:
    """What the handlers of `answering` answer."""
    assert registry is not None
    return registry.handle(Message({"MsgType": "text", "Content": "hi"}))


@pytest.mark.parametrize("bytecode", [False, True], ids=["without bytecode", "with bytecode of the same second"])
def test_reloading_handlers_poll_gives_a_changed_version_once(
        bytecode: bool, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", not bytecode)
    save(answering("one"))
    handlers = ReloadingHandlers("")
    assert (ask(handlers.registry), handlers.poll()) == ("one", False)
    save(answering("two"))
    assert handlers.poll()
    assert (ask(handlers.registry), handlers.poll()) == ("two", False)


def test_reloading_handlers_poll_gives_a_version_that_replaced_the_file_with_its_time_and_size(save: Save) -> None:
    path = save(answering("one"))
    handlers = ReloadingHandlers(path)
    save(answering("two"), "new.py")
    os.utime("new.py", ns=(FIRST_SAVE, FIRST_SAVE))
    os.replace("new.py", path)
    assert ask(handlers.poll() and handlers.registry) == "two"


def test_reloading_handlers_poll_sees_what_was_saved_while_the_file_was_loaded(save: Save) -> None:
    save(f"import pathlib\npathlib.Path(__file__).write_text({answering('later')!r})\n" + answering("one"))
    handlers = ReloadingHandlers("")
    assert (ask(handlers.registry), ask(handlers.poll() and handlers.registry)) == ("one", "later")


def test_reloading_handlers_poll_waits_for_a_file_that_was_removed(
        save: Save, caplog: pytest.LogCaptureFixture) -> None:
    path = save(answering("one"))
    handlers = ReloadingHandlers("")
    os.unlink(path)
    assert (handlers.poll(), ask(handlers.registry), caplog.messages) == (False, "one", [])
    save(answering("two"))
    assert ask(handlers.poll() and handlers.registry) == "two"


def test_reloading_handlers_poll_finds_the_default_file_once_it_is_there(save: Save) -> None:
    handlers = ReloadingHandlers("")
    assert (len(handlers.registry), handlers.poll()) == (0, False)
    path = save(answering("one"))
    assert (ask(handlers.poll() and handlers.registry), handlers.path) == ("one", path)


def test_reloading_handlers_poll_finds_its_file_from_another_folder(
        save: Save, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(answering("one"), "bot.py")
    handlers = ReloadingHandlers("bot.py")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert not handlers.poll()
    save(answering("two"), path)
    assert ask(handlers.poll() and handlers.registry) == "two"


@pytest.mark.parametrize(("name", "wanted"), [("shop/bot.py", "shop.bot"), ("shop/__init__.py", "shop")])
def test_reloading_handlers_poll_loads_a_module_again(
        name: str, wanted: str, save: Save, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "library" / "shop").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    save("TEA = 'tea'\n", "library/shop/goods.py")
    save("from .goods import TEA\n" + answering("one"), f"library/{name}")
    handlers = ReloadingHandlers(wanted)
    assert (ask(handlers.registry), handlers.poll()) == ("one", False)
    save("from .goods import TEA\n" + answering("two"), f"library/{name}")
    assert ask(handlers.poll() and handlers.registry) == "two"


IMPORTING = """
from kfserver import HandlerRegistry
from goods import TEA
registry = HandlerRegistry()

@registry.on("text")
def answer(message):
    return TEA
"""


@pytest.mark.parametrize("bytecode", [False, True], ids=["without bytecode", "with bytecode of the same second"])
def test_reloading_handlers_poll_loads_neighbours_anew_that_were_imported(
        bytecode: bool, save: Save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", not bytecode)
    save("TEA = 'green'\n", "goods.py")
    handlers = ReloadingHandlers(save(IMPORTING))
    assert (ask(handlers.registry), handlers.poll()) == ("green", False)
    save("TEA = 'black'\n", "goods.py")
    assert (handlers.poll(), ask(handlers.registry), handlers.poll()) == (True, "black", False)


def test_reloading_handlers_poll_loads_all_modules_of_the_folder_together(save: Save) -> None:
    os.mkdir("shop")
    save("PRICE = 1\n", "shop/prices.py")
    save("from shop import prices\nTEA = prices.PRICE\n", "goods.py")
    handlers = ReloadingHandlers(save(IMPORTING))
    save("PRICE = 2\n", "shop/prices.py")
    assert (handlers.poll(), ask(handlers.registry)) == (True, 2)
    before = {name: sys.modules[name] for name in ("handlers", "goods", "shop.prices")}
    save("PRICE = 3\n", "shop/prices.py")
    save("from shop import prices\nTEA = 1 / 0\n", "goods.py")
    assert (handlers.poll(), ask(handlers.registry)) == (False, 2)
    assert {name: sys.modules[name] for name in before} == before
    assert sys.modules["shop"].prices is before["shop.prices"]
    assert not handlers.poll()
    save("from shop import prices\nTEA = prices.PRICE\n", "goods.py")
    assert (handlers.poll(), ask(handlers.registry)) == (True, 3)


def test_reloading_handlers_poll_loads_again_when_the_module_that_was_missing_is_there(save: Save) -> None:
    path = save(answering("one"))
    handlers = ReloadingHandlers(path)
    save(IMPORTING)
    assert (handlers.poll(), handlers.poll(), ask(handlers.registry)) == (False, False, "one")
    save("TEA = 1 / 0\n", "goods.py")
    assert (handlers.poll(), handlers.poll()) == (False, False)
    save("TEA = 'green'\n", "goods.py")
    assert (handlers.poll(), ask(handlers.registry)) == (True, "green")


def test_reloading_handlers_poll_watches_what_a_handler_imports_late(save: Save) -> None:
    save("TEA = 'green'\n", "goods.py")
    handlers = ReloadingHandlers(save(answering("one").replace("return 'one'", "import goods; return goods.TEA")))
    assert (ask(handlers.registry), handlers.poll()) == ("green", False)
    save("TEA = 'black'\n", "goods.py")
    assert (handlers.poll(), ask(handlers.registry)) == (True, "black")


def test_reloading_handlers_poll_leaves_alone_what_is_not_of_the_folder_or_was_there_before(save: Save) -> None:
    os.makedirs("venv/lib/site-packages")
    save("", "venv/lib/site-packages/installed.py")
    save("", "early.py")
    sys.path.insert(0, os.path.abspath("venv/lib/site-packages"))
    sys.path.insert(0, os.getcwd())
    importlib.import_module("early")
    handlers = ReloadingHandlers(save("import early, installed, kfserver\n" + answering("one")))
    before = [sys.modules[name] for name in ("early", "installed", "kfserver")]
    save("import early, installed, kfserver\n" + answering("two"))
    for path in ("early.py", "venv/lib/site-packages/installed.py"):
        save("1 / 0", path)
    assert ask(handlers.poll() and handlers.registry) == "two"
    assert [sys.modules[name] for name in ("early", "installed", "kfserver")] == before


def test_reloading_handlers_poll_while_a_handler_runs_lets_it_end(save: Save) -> None:
    save(answering("one").replace("def answer(message):", """async def answer(message):
    import asyncio
    message.reply("begins")
    await asyncio.get_event_loop().run_in_executor(None, message.fields["go"].wait)"""))
    handlers = ReloadingHandlers("")
    begins, go, answers = threading.Event(), threading.Event(), []
    message = Message({"MsgType": "text", "go": go}, outbox=lambda _: begins.set())
    old = handlers.registry
    thread = threading.Thread(target=lambda: answers.append(old.handle(message)))
    thread.start()
    assert begins.wait(PATIENCE)
    save(answering("two"))
    assert ask(handlers.poll() and handlers.registry) == "two"
    go.set()
    thread.join(PATIENCE)
    assert answers == ["one"]


@pytest.mark.parametrize(("broken", "told", "traced"), [
    pytest.param("registry = (\n", "handlers.py failed with the SyntaxError below", True, id="syntax error"),
    pytest.param(answering("two") + "1 / 0\n", "handlers.py failed with the ZeroDivisionError below", True, id="error"),
    pytest.param("import sys\nsys.exit()\n", "handlers.py failed with the SystemExit below", True, id="sys.exit()"),
    pytest.param("import handlers\nhandlers.ask()\n", "handlers.py failed with the AttributeError below", True,
                 id="a name that only the version before had"),
    pytest.param("", "handlers.py has no registry: write", False, id="empty file"),
    pytest.param(answering("two").replace('"text"', '"image", "x"'), 'only "text" and "event" take patterns', False,
                 id="wrong decorator"),
])
def test_reloading_handlers_poll_tells_once_of_a_broken_version_and_keeps_the_one_before(
        broken: str, told: str, traced: bool, save: Save, capsys: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture) -> None:
    path = save(answering("one") + "\ndef ask():\n    return answer(None)\n")
    handlers = ReloadingHandlers(path)
    kept = sys.modules["handlers"]
    save(broken)
    assert (handlers.poll(), ask(handlers.registry), handlers.poll()) == (False, "one", False)
    printed = capsys.readouterr().err
    assert printed == ""
    assert caplog.text.count(f'File "{path}"') == int(traced)
    assert "kfserver.py\"" not in caplog.text
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert told in caplog.text
    assert caplog.messages[0].startswith(f"the handlers from before stay in service: {path}")
    assert not traced or sys.modules["handlers"] is kept
    save(answering("mended"))
    assert ask(handlers.poll() and handlers.registry) == "mended"


def test_reloading_handlers_leave_no_module_behind_if_the_first_version_is_broken(save: Save) -> None:
    with pytest.raises(SettingsError):
        ReloadingHandlers(save("1 / 0\n", "broken_bot.py"))
    assert "broken_bot" not in sys.modules


def test_chat_loads_changed_handlers_before_the_next_line(
        save: Save, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(answering("one"))
    talk = Chat(ReloadingHandlers(""))
    talk.take("hi")
    save(answering("two"))
    talk.take("hi")
    save("1 / 0\n")
    talk.take("hi")
    rule = "  @registry.on('text') -> answer\n"
    assert capsys.readouterr().out == (f"{rule}  to user: one\n"
                                       f"  1 handlers loaded again from {path}\n{rule}  to user: two\n"
                                       f"{rule}  to user: two\n")
    assert talk.failures == 0


# ---- watch_handlers


def test_watch_handlers_puts_each_new_version_into_service(save: Save, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path = save(answering("one"))
    handlers = ReloadingHandlers("")
    server = KfServer(handlers.registry, local())
    due: List[Tuple[float, Callable[[], None]]] = []
    handlers.watch(server, lambda seconds, job: due.append((seconds, job)))
    answers = []
    for text in ("", answering("one"), answering("two"), "1 / 0\n", answering("three")):
        if text:
            save(text)
        (seconds, job), = due
        assert seconds == WATCH_SECONDS
        due.clear()
        job()
        answers.append(ask(server.registry))
    assert answers == ["one", "one", "two", "two", "three"]
    assert caplog.messages.count(f"1 handlers loaded again from {path}") == 3
    server.stop()


def test_watch_handlers_puts_a_version_without_handlers_into_service_too(save: Save) -> None:
    save(answering("one"))
    handlers = ReloadingHandlers("")
    server = KfServer(handlers.registry, local())
    save("from kfserver import HandlerRegistry\nregistry = HandlerRegistry()\n")
    handlers.watch(server, lambda seconds, job: None)
    assert len(server.registry) == 0
    server.stop()


# ---- Processes


COMMAND = [sys.executable, "-W", "error", str(ROOT / "kfserver.py"), "chat"]


def environment(**variables: str) -> Dict[str, str]:
    """The environment of a process: of this one's settings none, and readline's own habits."""
    return {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1", "INPUTRC": os.devnull,
            "TERM": "dumb", **variables}


def test_program_chat_takes_a_script_from_a_pipe(save: Save) -> None:
    save(HANDLERS)
    result = subprocess.run(COMMAND, input="hi\n你好\n/image https://user.cn/a.png\nfail".encode(), env=environment(),
                            capture_output=True, timeout=PATIENCE)
    assert (result.stderr, result.returncode) == (b"", 1)
    transcript = result.stdout.decode().replace(os.linesep, "\n")
    assert transcript.startswith(lines("""
        user: hi
          @registry.on('text', 'hi') -> greet
          to user: hello
            there
        user: 你好
          nobody takes this; to take it, write: @registry.on("text")
        user: /image https://user.cn/a.png
          @registry.on('image') -> nothing
          @registry.on('text', 'quiet') -> nothing
        user: fail
          @registry.on('text', 'fail') -> fail
          Traceback (most recent call last):
    """))
    assert transcript.endswith("\n  ZeroDivisionError: division by zero\n  to user: sorry\n")


def test_program_chat_survives_characters_that_its_encodings_do_not_know(save: Save) -> None:
    save(answering("你好"))
    result = subprocess.run(COMMAND, input=b"h\xffi\nhi\n", env=environment(PYTHONIOENCODING="ascii"),
                            capture_output=True, timeout=PATIENCE)
    assert (result.stderr, result.returncode) == (b"", 0)
    assert result.stdout.splitlines()[::3] == [b"user: h\\ufffdi", b"user: hi"]
    assert result.stdout.splitlines()[2::3] == [b"  to user: \\u4f60\\u597d"] * 2


class Terminal:
    """A pseudo-terminal in which the chat runs; ``output`` is what it has shown and nobody has read."""

    def __init__(self) -> None:
        pty = pytest.importorskip("pty")
        self._screen, inside = pty.openpty()
        self.process = subprocess.Popen(COMMAND, env=environment(), stdin=inside, stdout=inside, stderr=inside)
        os.close(inside)
        self.output = ""

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._screen, keys.encode())

    def read_until(self, text: str) -> str:
        """Wait for the text; what is shown before it."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.output:
            ready, _, _ = select.select([self._screen], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} does not stand in {self.output!r}"
            self.output += os.read(self._screen, 4096).decode()
        before, _, self.output = self.output.partition(text)
        return before

    def close(self) -> None:
        """End the chat, if it still runs."""
        self.process.kill()
        self.process.wait(PATIENCE)
        os.close(self._screen)


@pytest.fixture
def terminal(save: Save) -> Iterator[Terminal]:
    """A chat with three handlers, of which two do not come back."""
    save(answering("hello") + """
@registry.on("text", "hang")
def hang(message):
    import time
    print("hanging", flush=True)
    while True:  # a signal just before one long sleep would only be noticed at its end
        time.sleep(0.01)

@registry.on("text", "hang async")
async def hang_async(message):
    import asyncio
    print("hanging", flush=True)
    await asyncio.sleep(1000)
""")
    with contextlib.closing(Terminal()) as opened:
        yield opened


def test_program_chat_edits_a_typed_line_and_remembers_it(terminal: Terminal) -> None:
    pytest.importorskip("readline")
    assert terminal.read_until("user> ") == (
        f"3 handlers from {os.path.abspath('handlers.py')}; /help lists what can be typed\r\n")
    terminal.type("s anna\x01/a\r")  # Ctrl-A goes to the beginning of the line
    terminal.read_until("anna> ")
    terminal.type("hi\r")
    terminal.read_until("to anna: hello")
    terminal.type("\x10\r")  # Ctrl-P brings back the line before
    terminal.read_until("to anna: hello")
    terminal.read_until("anna> ")
    terminal.type("\x04")  # Ctrl-D ends the input
    assert terminal.process.wait(PATIENCE) == 0


@pytest.mark.parametrize("name", ["hang", "hang async"])
def test_program_chat_gives_up_a_handler_that_does_not_come_back(name: str, terminal: Terminal) -> None:
    terminal.read_until("user> ")
    terminal.type(f"{name}\r")
    terminal.read_until("hanging\r\n")  # all of the line: the handler prints on its own thread
    terminal.process.send_signal(signal.SIGINT)
    terminal.read_until("interrupted; /quit ends")
    terminal.read_until("user> ")
    terminal.type("/quit\r")
    assert terminal.process.wait(PATIENCE) == 0
