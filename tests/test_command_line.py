"""The command line: settings, handlers, what is printed, and how the process ends.

Where a process of its own makes a difference, one is run; all else calls `main` here, which is ten times as fast.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from typing import Any, Dict, Iterator, List, Sequence

import pytest
from send_api_server import APP_KEY, APP_SECRET, SendApiServer
from support import PATIENCE, ROOT, Client, Program, post, push, wait_until

import kfserver
from kfserver import SETTING_FIELDS, Settings, build_parser, end_at_signals, main, read_settings

# What is printed last before the first push; what comes later may stand between other threads' words.
LAST_OF_THE_FIRST_LINES = "no --app-key is set: what handlers return is not sent to users"

# A handler that tells when it begins, and is through when its test makes a file named "through".
SLOW_HANDLERS = """
    import os, time
    from kfserver import HandlerRegistry

    registry = HandlerRegistry()

    @registry.on("text")
    def slow(message):
        print("begins", message.content, flush=True)
        while not os.path.exists("through"):
            time.sleep(0.01)
        print("ends", message.content, flush=True)
"""

pytestmark = pytest.mark.usefixtures("empty_folder")


def write(name: str, text: str) -> str:
    """Write a file into the current folder; its path."""
    pathlib.Path(name).write_text(textwrap.dedent(text), encoding="utf-8")
    return os.path.abspath(name)


# ---- Settings


def as_typed(value: Any) -> str:
    """A case of the tables below as an operator would write it, to name the test."""
    if isinstance(value, dict):
        return " ".join(f"{name}={text}" for name, text in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


@pytest.mark.parametrize(("arguments", "environment", "name", "value"), [
    ([], {}, "port", 8080),
    ([], {"KF_PORT": "81"}, "port", 81),
    ([], {"KF_PORT": ""}, "port", 8080),
    ([], {"KF_PORT": "tcp://10.0.0.1:80"}, "port", 8080),
    (["--log-level", "WARNING"], {}, "log_level", "warning"),
    ([], {"KF_LOG_FORMAT": "Json"}, "log_format", "json"),
    (["--port", "82"], {"KF_PORT": "81"}, "port", 82),
    (["--port=0"], {"KF_PORT": "81"}, "port", 0),
    ([], {"KF_TOKEN": "secret"}, "token", "secret"),
    (["--token=other"], {"KF_TOKEN": "secret"}, "token", "other"),
    (["--token="], {"KF_TOKEN": "secret"}, "token", ""),
    (["--max-age", "2.5"], {}, "max_age", 2.5),
    ([], {"KF_MAX_AGE": "300"}, "max_age", 300.0),
    (["--max-body", "100"], {}, "max_body", 100),
    (["--path", "/kf"], {}, "path", "/kf"),
    (["--log-level", "debug"], {"KF_LOG_LEVEL": "error"}, "log_level", "debug"),
    ([], {}, "allow_unsigned", False),
    (["--allow-unsigned"], {}, "allow_unsigned", True),
    (["--allow-unsigned"], {"KF_ALLOW_UNSIGNED": "no"}, "allow_unsigned", True),
    ([], {"KF_ALLOW_UNSIGNED": "1"}, "allow_unsigned", True),
    ([], {"KF_ALLOW_UNSIGNED": "Yes"}, "allow_unsigned", True),
    ([], {"KF_ALLOW_UNSIGNED": "off"}, "allow_unsigned", False),
], ids=as_typed)
def test_read_settings_argument_beats_environment_beats_default(
        arguments: List[str], environment: Dict[str, str], name: str, value: object) -> None:
    settings = read_settings(vars(build_parser().parse_args(arguments)), environment)
    assert getattr(settings, name) == value


@pytest.mark.parametrize(("arguments", "environment", "told"), [
    (["--port", "http"], {}, "--port (KF_PORT) takes a whole number from 0 to 65535, not 'http'"),
    (["--port", "65536"], {}, "--port (KF_PORT) takes a whole number from 0 to 65535, not 65536"),
    (["--port", "-1"], {}, "--port (KF_PORT) takes a whole number from 0 to 65535, not -1"),
    (["--port", "1.5"], {}, "--port (KF_PORT) takes a whole number from 0 to 65535, not '1.5'"),
    (["--port", ""], {}, "--port (KF_PORT) takes a whole number from 0 to 65535, not ''"),
    ([], {"KF_PORT": "web"}, "--port (KF_PORT) takes a whole number from 0 to 65535, not 'web'"),
    (["--workers", "0"], {}, "--workers (KF_WORKERS) takes a whole number from 1 to 10000, not 0"),
    (["--queue-size", "0"], {}, "--queue-size (KF_QUEUE_SIZE) takes a whole number, 1 or more, not 0"),
    (["--dedup-size", "0"], {}, "--dedup-size (KF_DEDUP_SIZE) takes a whole number, 1 or more, not 0"),
    (["--max-body", "1M"], {}, "--max-body (KF_MAX_BODY) takes a whole number, 1 or more, not '1M'"),
    (["--tries", "0"], {}, "--tries (KF_TRIES) takes a whole number from 1 to 20, not 0"),
    (["--max-age", "soon"], {}, "--max-age (KF_MAX_AGE) takes a number"),
    (["--max-age", "nan"], {}, "--max-age (KF_MAX_AGE) takes a number"),
    (["--grace", "-1"], {}, "--grace (KF_GRACE) takes a number"),
    (["--grace", "inf"], {}, "--grace (KF_GRACE) takes a number"),  # no lock can be waited for that long
    (["--grace", "1e300"], {}, "--grace (KF_GRACE) takes a number"),
    (["--log-level", "loud"], {}, "--log-level (KF_LOG_LEVEL) takes one of debug, info, warning, error, not 'loud'"),
    (["--path", "kf"], {}, "--path (KF_PATH) must start with '/'"),
    ([], {"KF_ALLOW_UNSIGNED": "maybe"}, "--allow-unsigned (KF_ALLOW_UNSIGNED) takes true or false, not 'maybe'"),
], ids=as_typed)
def test_main_names_a_bad_setting(arguments: List[str], environment: Dict[str, str], told: str,
                                  monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["--check", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"kfserver: {told}")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(("arguments", "told"), [
    (["--prot", "secret"], "no option --prot: did you mean --port?"),
    (["--tokn=secret"], "no option --tokn: did you mean --token?"),
    (["push", "--jsno", "http://kf"], "no option --jsno: did you mean --json?"),
    (["--zzzzzz"], "no option --zzzzzz: see kfserver.py --help"),
    (["chat", "hi"], "one argument too many: 'hi'; see kfserver.py chat --help"),
    (["pusch"], "no command 'pusch': did you mean push?"),
    (["zzz"], "no command 'zzz': there are serve, push, chat, journal, help"),
    (["help", "pusch"], "no command 'pusch': did you mean push?"),
], ids=as_typed)
def test_main_suggests_what_was_meant(
        arguments: List[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"kfserver: {told}\n"


@pytest.mark.parametrize(("arguments", "usage"), [
    (["help"], "usage: kfserver.py [serve|push|chat|journal|help] [options]\n"),
    (["help", "serve"], "usage: kfserver.py [serve|push|chat|journal|help] [options]\n"),
    (["help", "push"], "usage: kfserver.py push [options] URL\n"),
    (["HELP", "Journal"], "usage: kfserver.py journal "),
    (["Push", "--help"], "usage: kfserver.py push [options] URL\n"),
], ids=as_typed)
def test_main_helps(arguments: List[str], usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(usage)


def test_main_help_tells_of_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    told = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert {f"--{name.replace('_', '-')}" for name in SETTING_FIELDS} <= told


def test_main_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kfserver {kfserver.__version__}\n"


# ---- Handlers


GOOD_HANDLERS = """
    import re
    from kfserver import HandlerRegistry

    registry = HandlerRegistry()

    @registry.on("text", "hi", re.compile(r"order (\\d+)"))
    def answer(message, number=None):
        return None

    @registry.on("*")
    def rest(message):
        return None
"""
GOOD_LIST = """\
2 handlers from {path}
  @registry.on('text', 'hi', re.compile(r"order (\\d+)")) -> answer
  @registry.on('*') -> rest
"""


@pytest.mark.parametrize(("name", "arguments"), [
    pytest.param("handlers.py", [], id="handlers.py in the current folder"),
    pytest.param("handlers.py", ["--handlers", "handlers.py"], id="a file"),
    pytest.param("bot", ["--handlers", "./bot"], id="a file with another ending"),
    pytest.param("the.bot.py", ["--handlers", "the.bot.py"], id="a file with a point in its name"),
])
def test_main_check_prints_the_handlers(
        name: str, arguments: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = write(name, GOOD_HANDLERS)
    assert main(["--check", *arguments]) == 0
    assert capsys.readouterr().out == GOOD_LIST.format(path=path)


def test_main_check_prints_the_handlers_of_a_module_in_the_current_folder(
        tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "shop").mkdir()
    path = write("shop/bot.py", GOOD_HANDLERS)
    assert main(["--check", "--handlers", "shop.bot"]) == 0
    assert capsys.readouterr().out == GOOD_LIST.format(path=path)


def test_main_check_takes_the_handlers_beside_kfserver_if_there_are_none_here(
        capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check"]) == 0
    assert f"handlers from {ROOT / 'handlers.py'}\n" in capsys.readouterr().out


def test_main_check_lets_handlers_import_their_neighbours(
        tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bot").mkdir()
    write("bot/prices.py", "TEA = 3\n")
    write("bot/handlers.py", GOOD_HANDLERS + "\n    from prices import TEA\n")
    assert main(["--check", "--handlers", "bot/handlers.py"]) == 0
    assert capsys.readouterr().out.startswith("2 handlers from ")


def test_main_check_finds_neighbours_of_the_handlers_before_all_other_modules(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, price in (("bot", 3), ("library", 4)):
        (tmp_path / folder).mkdir()
        write(f"{folder}/prices.py", f"TEA = {price}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "library"))
    sys.path.append(str(tmp_path / "bot"))
    write("bot/handlers.py", GOOD_HANDLERS + "\n    from prices import TEA\n    assert TEA == 3\n")
    assert main(["--check", "--handlers", "bot/handlers.py"]) == 0
    assert sys.path[0] == str(tmp_path / "bot")
    assert sys.path.count(str(tmp_path / "bot")) == 1


def test_main_check_tells_of_a_handler_that_is_never_called(
        capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    write("handlers.py", GOOD_HANDLERS + """
    @registry.on("*")
    def never(message): ...
""")
    assert main(["--check"]) == 0
    assert re.search(r"never at handlers.py:\d+ is never called for @registry.on\('\*'\): rest at handlers.py:\d+ was "
                     "registered for it first", caplog.text)


@pytest.mark.parametrize(("text", "told", "lines"), [
    pytest.param("registry = (\n", "SyntaxError", [1], id="syntax error"),
    pytest.param("one = 1\nzero = one / 0\n", "ZeroDivisionError", [2], id="exception"),
    pytest.param("def fail():\n    raise OSError('disk')\n\nfail()\n", "OSError", [4, 2], id="exception in a function"),
    pytest.param("import json\njson.loads('?')\n", "JSONDecodeError", [2], id="exception in a library"),
    pytest.param("import sys\nsys.exit('no')\n", "SystemExit", [2], id="sys.exit()"),
    pytest.param("import no_such_library\n", "ModuleNotFoundError", [1], id="a library that is not installed"),
    pytest.param("from kfserver import NoSuchName\n", "ImportError", [1], id="a name that kfserver has not"),
])
def test_main_shows_an_error_in_the_handlers_and_nothing_of_its_own(
        text: str, told: str, lines: Sequence[int], capsys: pytest.CaptureFixture[str]) -> None:
    path = write("bad.py", text)
    assert main(["--check", "--handlers", "bad.py"]) == 2
    error = capsys.readouterr().err
    shown = re.findall(r'^  File "(.*)", line (\d+)', error, re.MULTILINE)
    assert [int(line) for file, line in shown if file == path] == lines
    assert not [file for file, _ in shown if file.endswith("kfserver.py") or "importlib" in file]
    assert error.startswith(f"kfserver: {path} failed with the {told} below: correct it")


@pytest.mark.parametrize(("text", "told"), [
    pytest.param("", "bad.py has no registry: write 'from kfserver import HandlerRegistry'", id="no registry"),
    pytest.param("registry = {}", "bad.py has no registry: write 'from", id="a registry of another kind"),
    pytest.param("""
        from kfserver import HandlerRegistry
        registry = HandlerRegistry()
        @registry.on("text")
        def answer(message): yield "x"
    """, "bad.py, line [45]: answer has a yield, so that calling it does nothing: return a list", id="generator"),
    pytest.param("""
        from kfserver import HandlerRegistry
        registry = HandlerRegistry()
        @registry.on("text", "hi (.*)")
        def answer(message, name): ...
    """, "bad.py, line [45]: answer is called with the message and 0 more: .* write re.compile.r\"hi [(][.][*][)]\"",
                 id="expression in quotes only"),
    pytest.param("""
        from kfserver import HandlerRegistry
        registry = HandlerRegistry()
        registry.on("image", "hi")
    """, 'bad.py, line 4: only "text" and "event" take patterns', id="pattern for an image"),
])
def test_main_says_in_one_line_what_handlers_lack(
        text: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("bad.py", text)
    assert main(["--check", "--handlers", "bad.py"]) == 2
    error = capsys.readouterr().err
    assert re.match(f"kfserver: [^ ]*{told}", error)  # Pythons differ in the line that they tell of a decorator
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["missing.py", "no_such_module", "missing/handlers.py"])
def test_main_says_in_one_line_that_there_are_no_such_handlers(
        name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--handlers", name]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "--handlers names" in error
    assert error.count("\n") == 1


def forbid(path: pathlib.Path) -> None:
    """Make a file that nobody may read."""
    path.write_text("")
    path.chmod(0)
    if os.access(str(path), os.R_OK):
        pytest.skip("this user may read everything")


@pytest.mark.parametrize("make", [pathlib.Path.mkdir, forbid], ids=["a folder", "not permitted"])
def test_main_says_in_one_line_that_handlers_cannot_be_read(
        make: Any, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "handlers.py")
    assert main([]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"kfserver: cannot read the handlers {tmp_path / 'handlers.py'}: ")
    assert error.count("\n") == 1


# ---- Processes


def environment(**variables: str) -> Dict[str, str]:
    """The environment of a process, without this one's settings."""
    return {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONDONTWRITEBYTECODE": "1", **variables}


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the given options in the current folder, until it ends."""
    return subprocess.run([sys.executable, "-W", "error", *command], env=environment(),
                          capture_output=True, text=True, timeout=PATIENCE)


ALIASED_HANDLERS = """
    import sys
    import kfserver

    assert kfserver is sys.modules["__main__"]
    registry = kfserver.HandlerRegistry()
"""


@pytest.mark.parametrize(("name", "folder", "command"), [
    pytest.param("kfserver.py", ".", ["kfserver.py"], id="plain"),
    pytest.param("kfserver.py", ".", ["-m", "kfserver"], id="as a module"),
    pytest.param("receiver.py", ".", ["receiver.py"], id="renamed"),
    pytest.param("receiver.py", ".", ["-m", "receiver"], id="renamed, as a module"),
    pytest.param("kfserver.py", "elsewhere", ["../kfserver.py"], id="from another folder"),
    pytest.param("kfserver.py", ".", ["-I", "-S", "kfserver.py"], id="isolated"),
])
def test_program_is_the_module_that_handlers_import(
        name: str, folder: str, command: List[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(str(ROOT / "kfserver.py"), name)
    path = write("handlers.py", ALIASED_HANDLERS)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / folder)
    result = run(*command, "--check")
    assert (result.stdout, result.stderr, result.returncode) == (f"0 handlers from {path}\n", "", 0)


ASYNC_HANDLERS = """
    import asyncio
    from kfserver import HandlerRegistry

    registry = HandlerRegistry()

    @registry.on("text")
    async def answer(message):
        print(await asyncio.get_event_loop().run_in_executor(None, str, "handled"))
"""
# Uses what kfserver imports late: the cipher, SQLite and Redis where they are installed, and asyncio.
USE_EVERYTHING = """
import sys
sys.path.insert(0, {root!r})
import kfserver
handlers = kfserver.ReloadingHandlers(sys.argv[1])
settings = kfserver.Settings(journal="kf.db", token="x", app_id="x", aes_key="x" * 43)
server = kfserver.KfServer(handlers.registry, settings)
print(server.feed(b'{{"MsgType": "text", "MsgId": "1"}}').body, server.join(10))
server.stop()
for name in {installed}:
    assert "-packages" in __import__(name).__file__
"""
# Optional packages; a neighbour takes the name of one that is not installed, as it must.
INSTALLED = [name for name in ("redis", "cryptography") if importlib.util.find_spec(name)]


@pytest.mark.parametrize(("handlers", "neighbours"), [
    *((name, []) for name in ("redis", "sqlite3", "asyncio", "json")),
    ("handlers", [*INSTALLED, "sqlite3", "asyncio", "json", "logging", "queue", "select", "concurrent",
                  "selectors", "subprocess", "ssl", "contextvars", "datetime", "_sqlite3", "secrets", "_ssl"]),
], ids=["redis", "sqlite3", "asyncio", "json", "neighbours"])
def test_program_finds_its_libraries_whatever_the_handlers_and_their_neighbours_are_named(
        handlers: str, neighbours: List[str]) -> None:
    os.mkdir("bot")
    for name in neighbours:
        write(f"bot/{name}.py", "raise AssertionError('this is not the library')\n")
    write("use.py", USE_EVERYTHING.format(root=str(ROOT), installed=INSTALLED))
    result = run("use.py", write(f"bot/{handlers}.py", ASYNC_HANDLERS))
    assert (result.stdout, result.stderr, result.returncode) == ("handled\nb'success' True\n", "", 0)


@pytest.mark.parametrize("name", ["sqlite3", "redis", "queue"])
def test_program_finds_its_libraries_though_it_lies_beside_such_handlers(name: str) -> None:
    shutil.copy(str(ROOT / "kfserver.py"), "kfserver.py")
    write(f"{name}.py", "from kfserver import HandlerRegistry\nregistry = HandlerRegistry()\n")
    options = ["--handlers", f"{name}.py", "--journal", "kf.db"]
    command = [sys.executable, "-W", "error", "kfserver.py", "--host", "127.0.0.1", "--port", "0", *options]
    with Program(command=command, folder=pathlib.Path.cwd()) as program:
        program.push()
        assert program.end() == 0
    assert f"0 handlers from {os.path.abspath(name)}.py\n" in program.output


def test_program_needs_nothing_but_its_file() -> None:
    shutil.copy(str(ROOT / "kfserver.py"), "kfserver.py")
    result = run("-I", "-S", "kfserver.py", "--check")
    assert (result.stderr, result.returncode) == ("", 0)
    assert result.stdout.startswith("0 handlers: no handlers.py here")


def test_program_shows_no_traceback_of_its_own() -> None:
    path = write("handlers.py", "one = 1\nzero = one / 0\n")
    result = run(str(ROOT / "kfserver.py"))
    assert (result.stdout, result.returncode) == ("", 2)
    first, _, trace = result.stderr.partition("\n")
    assert first.startswith(f"kfserver: {path} failed with the ZeroDivisionError below: ")
    assert trace.startswith(f'Traceback (most recent call last):\n  File "{path}", line 2, in <module>\n')
    assert "kfserver.py" not in trace


def test_program_says_in_one_line_that_its_port_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        result = run(str(ROOT / "kfserver.py"), "--host", "127.0.0.1", "--port", str(port))
    assert (result.stdout, result.returncode) == ("", 2)
    assert result.stderr.startswith(f"kfserver: cannot listen on 127.0.0.1 port {port}: ")
    assert result.stderr.count("\n") == 1


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Program]:
    """A `Program` that listens, for the length of a block."""
    with Program(*arguments) as program:
        program.read_until(LAST_OF_THE_FIRST_LINES)
        yield program


def test_program_tells_where_it_listens_what_it_loaded_and_who_can_push() -> None:
    path = write("handlers.py", GOOD_HANDLERS)
    with running() as program:
        program.push(1, "hi")
        program.read_until("outcome=accepted")
        program.process.send_signal(signal.SIGTERM)
        assert program.wait() == 0
    first = f"kfserver {kfserver.__version__} listening on http://127.0.0.1:{program.port}/\n"
    assert program.output.startswith(first + GOOD_LIST.format(path=path))
    assert "no token is set: anyone who reaches this port can push; set --token (KF_TOKEN)\n" in program.output
    assert LAST_OF_THE_FIRST_LINES in program.output


def test_program_keeps_its_token_to_itself() -> None:
    write("handlers.py", GOOD_HANDLERS)
    with running("--token", "a-secret", "--log-level", "debug") as program:
        with Client(program.port) as client:
            assert client.ask(post(push(), target="/?signature=ab&timestamp=1&nonce=2")).status == 403
        program.read_until("outcome=refused 403")
        program.process.send_signal(signal.SIGTERM)
        assert program.wait() == 0
    assert "no token is set" not in program.output
    assert "a-secret" not in program.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_program_finishes_what_waits_before_it_ends(number: int) -> None:
    write("handlers.py", SLOW_HANDLERS)
    with running("--workers", "1", "--grace", str(PATIENCE)) as program:
        program.push(1, "one")
        program.push(2, "two")
        program.read_until("begins one")
        program.process.send_signal(number)
        program.read_until("shutting down")
        write("through", "")
        assert program.wait() == 0
    handled = re.findall(r"^(?:begins|ends) .*", program.output, re.MULTILINE)
    assert handled == ["begins one", "ends one", "begins two", "ends two"]


def test_program_tells_what_it_leaves_undone() -> None:
    write("handlers.py", SLOW_HANDLERS)
    with running("--grace", "0.05") as program:
        program.push(1, "one")
        program.push(2, "two")
        program.read_until("begins one")
        program.process.send_signal(signal.SIGTERM)
        assert program.wait() == 1
    assert re.findall(r"WARNING left undone: key=(.*)", program.output) == ["app/user/text/1", "app/user/text/2"]
    assert "Traceback" not in program.output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_program_ends_at_once_at_the_same_signal_again(number: int) -> None:
    write("handlers.py", SLOW_HANDLERS)
    with running("--grace", str(10 * PATIENCE)) as program:
        program.push(1, "one")
        program.read_until("begins one")
        program.process.send_signal(number)
        program.read_until("shutting down")
        program.process.send_signal(number)
        assert program.wait() == 1
    assert "Traceback" not in program.output


class _Ended(BaseException):
    """Stands for the end of the process."""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system's terminals do not hang up")
@pytest.mark.parametrize(("came", "ends"), [
    ([(signal.SIGINT, 0.0), (signal.SIGTERM, 0.5)], False),
    ([(signal.SIGTERM, 0.0), (signal.SIGINT, 1.0)], False),
    ([(signal.SIGINT, 0.0), (signal.SIGTERM, 1.1)], True),
    ([(signal.SIGTERM, 0.0), (signal.SIGTERM, 0.1)], True),
    ([(signal.SIGINT, 0.0), (signal.SIGTERM, 0.5), (signal.SIGINT, 0.6)], True),
], ids=["both within a second", "a second apart", "later", "the same", "the same, after both"])
def test_end_at_signals_counts_different_ones_within_a_second_as_one(
        came: Any, ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(status: int) -> None:
        raise _Ended
    monkeypatch.setattr(os, "register_at_fork", lambda **hooks: None)
    monkeypatch.setattr(os, "_exit", end)
    (first, _), *later = came
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    end_at_signals()
    try:
        now = [0.0]
        monkeypatch.setattr(kfserver.time, "monotonic", lambda: now[0])
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(first) if hasattr(signal, "raise_signal") else os.kill(os.getpid(), first)
        with pytest.raises(_Ended) if ends else contextlib.nullcontext():
            for number, now[0] in later:
                signal.raise_signal(number) if hasattr(signal, "raise_signal") else os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system's terminals do not hang up")
@pytest.mark.parametrize("ignored", [False, True], ids=["terminal closed", "under nohup"])
def test_program_finishes_what_waits_when_its_terminal_closes(ignored: bool) -> None:
    write("handlers.py", SLOW_HANDLERS)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with running("--workers", "1", "--grace", str(PATIENCE)) as program:
            program.push(1, "one")
            program.read_until("begins one")
            program.process.send_signal(signal.SIGHUP)
            if ignored:
                program.process.send_signal(signal.SIGTERM)
            program.read_until("shutting down")
            write("through", "")
            assert program.wait() == 0
            assert "ends one" in program.output
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("environment", "told"), [
    ({"KF_TOKN": "", "KF_TOKEN": "", "KF_ZZZZ": "", "HOME": ""},
     ["KF_TOKN in the environment is not a setting: did you mean KF_TOKEN?",
      "KF_ZZZZ in the environment is not a setting: see kfserver.py --help"]),
    ({"KF_PORT": "8080"}, []),
    ({"KF_PORT": "tcp://10.0.0.1:80"}, ["KF_PORT in the environment comes from Kubernetes and is not a setting"]),
    ({"KF_PORT": "tcp://10.0.0.1:80", "KF_SERVICE_HOST": "10.0.0.1", "KF_SERVICE_PORT_HTTP": "80", "KF_PORT_80_TCP": "",
      "KF_PORT_80_TCP_ADDR": "", "KF_REDIS_PORT": "udp://10.0.0.2:1", "KF_REDIS_SERVICE_HOST": ""},
     ["KF_PORT in the environment comes from Kubernetes and is not a setting"]),
], ids=["misspelt", "a port", "Kubernetes' port", "all of Kubernetes"])
def test_program_tells_of_variables_that_are_no_settings(environment: Dict[str, str], told: List[str]) -> None:
    assert list(kfserver._advice(Settings(token="t", access_token="a"), environment, False)) == told


def test_program_tells_where_its_parts_are(tmp_path: pathlib.Path) -> None:
    with running("--admin", ":0", "--journal", "kf.db") as program:
        pass
    assert re.search(r"\nadmin on http://0\.0\.0\.0:\d+/, at all addresses of this machine\n", program.output)
    assert f"\njournal in {tmp_path / 'kf.db'}\n" in program.output


# ---- Nobody reads


@contextlib.contextmanager
def started(*arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """kfserver as a process of its own, without this machine's PYTHONUNBUFFERED; ended with the block."""
    command = [sys.executable, str(ROOT / "kfserver.py"), "--host", "127.0.0.1", "--port", "0", *arguments]
    variables = environment()
    variables.pop("PYTHONUNBUFFERED", None)
    process = subprocess.Popen(command, env=variables, **options)
    watchdog = threading.Timer(3 * PATIENCE, process.kill)
    watchdog.start()
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        watchdog.cancel()
        watchdog.join()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


def port_of(line: bytes) -> int:
    """The port that the first line of the start tells."""
    return int(line.strip().rstrip(b"/").rpartition(b":")[2])


def push_often(port: int, count: int) -> None:
    """Push different messages of one user, all of which must be taken; a hundred are on their way at a time."""
    with Client(port) as client:
        for first in range(0, count, 100):
            client.send(b"".join(post(push("user", number)) for number in range(first, first + 100)))
            assert [client.read_answer().status for _ in range(100)] == [200] * 100


def test_program_answers_and_ends_though_nobody_reads_its_log() -> None:
    write("handlers.py", GOOD_HANDLERS)
    read, written = os.pipe()
    try:
        with started("--grace", "0", "--log-level", "info", stdout=subprocess.PIPE, stderr=written) as process:
            os.close(written)
            assert process.stdout
            push_often(port_of(process.stdout.readline()), 2500)
            process.terminate()
            assert process.wait(PATIENCE) in (0, 1)
    finally:
        os.close(read)


def test_program_tells_how_many_log_records_were_dropped() -> None:
    write("handlers.py", GOOD_HANDLERS)
    read, written = os.pipe()
    with started("--grace", str(PATIENCE), stdout=subprocess.PIPE, stderr=written) as process, open(read, "rb") as log:
        os.close(written)
        assert process.stdout
        push_often(port_of(process.stdout.readline()), 2500)
        lines = [log.readline()]
        while b" log records dropped" not in lines[-1]:
            lines.append(log.readline())
        process.terminate()
        lines += log.readlines()
        assert process.wait(PATIENCE) == 0
    dropped = [int(line.split()[-4]) for line in lines if b" WARNING " in line and line.endswith(b"records dropped\n")]
    pushes = sum(b"outcome=" in line for line in lines)
    assert pushes + sum(dropped) >= 2500 > pushes
    assert lines[-1].endswith(b"a second signal ends at once\n")  # the last records are written at the end


def test_program_writes_the_last_records_before_it_ends() -> None:
    write("handlers.py", SLOW_HANDLERS)
    with running("--grace", "0", "--workers", "1") as program:
        for number in range(200):
            program.push(number, "one")
        program.process.send_signal(signal.SIGTERM)
        assert program.wait() == 1
    assert program.output.count("outcome=accepted") == program.output.count("left undone") == 200


def test_program_tells_of_a_log_record_that_cannot_be_formatted_and_goes_on() -> None:
    write("handlers.py", """
        import logging
        from kfserver import HandlerRegistry
        registry = HandlerRegistry()

        @registry.on("text")
        def wrong(message):
            logging.getLogger("bot").warning("%d", "one")
            print("handled", message.content)
    """)
    with running() as program:
        program.push(1, "this")
        program.read_until("handled this")
        assert program.end() == 0
    assert " WARNING a log record of bot cannot be formatted: TypeError\n" in program.output


def test_program_prints_at_once_into_a_pipe() -> None:
    write("handlers.py", """
        from kfserver import HandlerRegistry
        registry = HandlerRegistry()
        registry.on("text")(lambda message: print("handled", message.content))
    """)
    with started(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        with Client(port_of(process.stdout.readline())) as client:
            assert client.ask(post(push(content="this"))).status == 200
        while process.stdout.readline() not in (b"handled this\n", b""):
            pass
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_program_starts_though_the_disk_under_stdout_is_full() -> None:
    with open("/dev/full", "wb") as full, started(stdout=full, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert b"cannot write to stdout: No space left on device" in process.stderr.readline()
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert b"Exception" not in process.stderr.read()


def test_program_prints_what_would_be_sent_on_a_terminal() -> None:
    pty = pytest.importorskip("pty")
    write("handlers.py", """
        from kfserver import HandlerRegistry, Image
        registry = HandlerRegistry()
        registry.on("text")(lambda message: ["you said " + message.content, Image("https://kf/a.png")])
    """)
    ours, theirs = pty.openpty()
    with started(stdout=theirs, stderr=subprocess.DEVNULL) as process, open(ours, "rb", buffering=0) as screen:
        os.close(theirs)
        shown = b""
        while b"but printed here" not in shown:
            shown += screen.read(4096)
        with Client(port_of(shown.split(b"\n")[0])) as client:
            assert client.ask(post(push(content="hi"))).status == 200
        while b"a.png" not in shown:
            shown += screen.read(4096)
        process.terminate()
        assert process.wait(PATIENCE) == 0
    assert b"  to user: you said hi\r\n  to user: [image] https://kf/a.png" in shown


def test_program_sends_replies_from_a_terminal_too_if_it_can() -> None:
    pty = pytest.importorskip("pty")
    write("handlers.py", """
        from kfserver import HandlerRegistry
        registry = HandlerRegistry()
        registry.on("text")(lambda message: "you said " + message.content)
    """)
    ours, theirs = pty.openpty()
    with SendApiServer() as api, open(ours, "rb", buffering=0) as screen:
        key = ["--app-key", APP_KEY, "--app-secret", APP_SECRET, "--api-base", api.base]
        with started(*key, stdout=theirs, stderr=subprocess.DEVNULL) as process:
            os.close(theirs)
            shown = b""
            while b"no token is set" not in shown:
                shown += screen.read(4096)
            with Client(port_of(shown.split(b"\n")[0])) as client:
                assert client.ask(post(push(content="hi"))).status == 200
            wait_until(lambda: api.sent)
            process.terminate()
            assert process.wait(PATIENCE) == 0
        with contextlib.suppress(OSError):  # EIO is the end of what a terminal shows
            while True:
                shown += screen.read(4096)
    assert [reply.content for reply in api.sent] == ["you said hi"]
    assert b"to user:" not in shown


# ---- Forks


FORKING_HANDLERS = """
    import logging, multiprocessing, os, signal
    from kfserver import HandlerRegistry

    registry = HandlerRegistry()

    @registry.on("text", "pool")
    def pool(message):
        with multiprocessing.get_context("fork").Pool(2) as workers:  # whose end is a SIGTERM to each
            print("pool", workers.map(abs, [-1, -2]))
        workers.join()
        print("pool has ended")

    @registry.on("text", "fork")
    def fork(message):
        child = os.fork()
        if not child:
            logging.getLogger("bot").warning("the child logs")
            as_before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
            # It prints nothing: another thread may have held the lock of stdout when this one forked.
            os._exit(7 if as_before == [signal.SIG_DFL, signal.default_int_handler, signal.SIG_DFL] else 8)
        print("child", os.waitpid(child, 0)[1] >> 8)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore")
def test_program_leaves_signals_and_logs_to_a_forked_child() -> None:
    write("handlers.py", FORKING_HANDLERS)
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with started("--workers", "1", **both) as process:
        assert process.stdout
        port = port_of(process.stdout.readline())
        with Client(port) as client:
            for number, content in enumerate(["fork", "pool"]):
                assert client.ask(post(push("user", number, content))).status == 200
        output = b""
        while b"pool has ended" not in output:
            line = process.stdout.readline()
            assert line, output
            output += line
        process.terminate()
        assert process.wait(PATIENCE) == 0
    for line in (b" WARNING the child logs\n", b"child 7\n", b"pool [1, 2]\n"):
        assert line in output


# ---- JSON


def read_objects(text: str) -> List[Dict[str, Any]]:
    """One JSON object for each line."""
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(("handlers", "arguments", "told"), [
    ("one = 1 / 0\n", [], "handlers.py failed with the ZeroDivisionError below: .*\nTraceback .*line 1, in <module>"),
    ("", [], "handlers.py has no registry: "),
    (GOOD_HANDLERS, ["--tls-cert", "missing.pem"], "cannot use the certificate missing.pem"),
], ids=["broken handlers", "no registry", "no certificate"])
def test_program_tells_why_it_cannot_start_as_one_object(handlers: str, arguments: List[str], told: str) -> None:
    write("handlers.py", handlers)
    result = run(str(ROOT / "kfserver.py"), "--port", "0", "--log-format", "json", *arguments)
    assert (result.returncode, result.stdout) == (2, "")
    line, = read_objects(result.stderr)
    assert line["level"] == "error"
    assert re.search(told, line["message"], re.DOTALL)


FAILING_HANDLERS = """
    from kfserver import HandlerRegistry
    registry = HandlerRegistry()

    @registry.on("text")
    def fail(message):
        1 / 0

    @registry.on_error
    def told(message, error):
        raise OSError
"""


def test_program_tells_of_failures_in_fields() -> None:
    write("handlers.py", FAILING_HANDLERS)
    with Program("--log-format", "json", "--tries", "2", log_apart=True) as program:
        program.push(1, "hi")
        program.read_until(LAST_OF_THE_FIRST_LINES)
        assert program.end() == 0
    lines = [line for line in read_objects(program.log) if "failed" in line["message"]]
    assert [(line["key"], line["error"].split(" at ")[0]) for line in lines] == [
        ("app/user/text/1", "ZeroDivisionError"), ("app/user/text/1", "ZeroDivisionError"),
        ("app/user/text/1", "OSError")]
    assert [line["try"] for line in lines[:2]] == [1, 2]
    assert all(re.search("^fail\\b", line["handler"]) for line in lines[:2])


def test_json_formatter_rounds_numbers_and_keeps_the_rest() -> None:
    values = {"ms": 1 / 3, "try": 2, "error": None, "path": pathlib.PurePosixPath("kf")}
    record = logging.LogRecord("kf", logging.INFO, "", 0, "took %(ms).2f", (values,), None)
    line = json.loads(kfserver.JsonFormatter().format(record))
    assert line.pop("time").endswith("+00:00")
    assert line == {"ms": 0.333, "try": 2, "error": None, "path": "kf", "level": "info", "message": "took 0.33"}


# ---- --check tries what the start would use


@pytest.mark.parametrize(("arguments", "told"), [
    (["--access-token", "@missing"], "--access-token (KF_ACCESS_TOKEN) cannot use its file: No such file"),
    (["--journal", "missing/kf.db"], "cannot write the journal missing/kf.db: make its folder"),
    (["--journal", "text"], "text is not a journal of kfserver"),
    (["--tls-cert", "text"], "cannot use the certificate text"),
], ids=as_typed)
def test_main_check_tries_the_parts(
        arguments: List[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    write("text", "no journal, no certificate")
    assert main(["--check", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"kfserver: {told}")


def test_main_check_makes_no_journal_and_disturbs_none(tmp_path: pathlib.Path) -> None:
    assert main(["--check", "--journal", "kf.db"]) == 0
    assert os.listdir(tmp_path) == []
    with running("--journal", "kf.db"):
        assert main(["--check", "--journal", "kf.db"]) == 0


# ---- Where little is as usual


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["--check", "chat", "push http://127.0.0.1:1/"])
def test_program_runs_though_its_streams_are_closed(closed: str, command: str) -> None:
    script = f'exec "{sys.executable}" "{ROOT / "kfserver.py"}" {command} {closed}'
    run = subprocess.run(["sh", "-c", script], env=environment(), stdin=subprocess.DEVNULL, capture_output=True,
                         timeout=PATIENCE)
    assert run.returncode == (2 if command.startswith("push") else 0)
    assert b"Traceback" not in run.stdout + run.stderr


@pytest.mark.parametrize("arguments", [["--check"], ["push", "--help"], ["--help"]])
def test_program_prints_whatever_the_terminal_knows(arguments: List[str]) -> None:
    write("handlers.py", GOOD_HANDLERS.replace('"hi"', '"你好"'))
    run = subprocess.run([sys.executable, str(ROOT / "kfserver.py"), *arguments], capture_output=True,
                         env={**os.environ, "PYTHONIOENCODING": "ascii"}, timeout=PATIENCE)
    assert (run.returncode, run.stderr) == (0, b"")


def test_program_ends_quietly_when_nobody_reads_what_it_prints() -> None:
    read, written = os.pipe()
    os.close(read)
    try:
        run = subprocess.run([sys.executable, str(ROOT / "kfserver.py"), "chat"], input=b"hi\n", stdout=written,
                             stderr=subprocess.PIPE, timeout=PATIENCE)
    finally:
        os.close(written)
    assert (run.returncode, run.stderr) == (141, b"")
