"""The README: every example in it is run, every table walked, and every option, target and metric that it names exists.

Its commands are run as they stand there, but for the port, which is a free one, and the address, which is 127.0.0.1.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import urllib.request
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple
from urllib.parse import urlencode

import pytest
from conftest import NOW, TOKEN, World, signed_query
from settings_table import make_table, read_table
from support import PATIENCE, PUBLISHED, ROOT, Client, Program, local, post, push

import kfserver
from kfserver import SETTING_FIELDS, Busy, HandlerRegistry, KfServer, Request, Response

README = (ROOT / "README.md").read_text("utf-8")
SOURCE = (ROOT / "kfserver.py").read_text("utf-8")


class Block(NamedTuple):
    """An example between two fences: its language, its text, and the README's line on which it begins."""

    language: str
    text: str
    line: int


def find_blocks() -> List[Block]:
    """All examples, in order."""
    fenced = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    return [Block(found.group(2), textwrap.dedent(found.group(3)), README.count("\n", 0, found.start()) + 2)
            for found in fenced.finditer(README)]


BLOCKS = find_blocks()


def name_block(block: Block) -> str:
    """What a test of the example is called."""
    return f"line {block.line}"


def the(language: str) -> str:
    """The text of the one example in a language."""
    block, = [block for block in BLOCKS if block.language == language]
    return block.text


def is_handlers(block: Block) -> bool:
    """Whether an example is a handlers.py: it registers handlers, and leaves it to kfserver.py to serve them."""
    return block.language == "python" and "@registry.on" in block.text and "KfServer" not in block.text


def handlers_above(line: int) -> str:
    """The handlers.py that the README's reader has written, come to a line; empty if there is none yet."""
    return next((block.text for block in reversed(BLOCKS) if is_handlers(block) and block.line < line), "")


# ---- A folder, as the reader's, and the commands that are typed in it


@pytest.fixture(autouse=True)
def _in_a_folder_with_kfserver(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside kfserver.py nothing, and of settings only those that keep a server on this machine, and out of the way."""
    for name in [name for name in os.environ if name.startswith("KF_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in {"KF_HOST": "127.0.0.1", "PYTHONWARNINGS": "error", "PYTHONIOENCODING": "utf-8",
                        "PYTHONDONTWRITEBYTECODE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    shutil.copy(str(ROOT / "kfserver.py"), "kfserver.py")


def write(name: str, text: str) -> None:
    """Write a file into the folder."""
    pathlib.Path(name).write_text(text, encoding="utf-8")


def run(*command: str, typed: str = "") -> str:
    """Run a command until it ends well; what it prints."""
    done = subprocess.run(command, input=typed.encode(), capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr.decode()) == (0, "")
    return done.stdout.decode()


@contextlib.contextmanager
def server(command: Sequence[str]) -> Iterator[Program]:
    """A kfserver that has printed all that it does before the first push; it must come to a good end."""
    with Program(command=command, log_apart=True) as running:
        running.read_until("no --app-key is set")
        yield running
        assert running.end() == 0


def curl(words: Sequence[str]) -> str:
    """What ``curl -d DATA URL`` prints, or would print if curl were here."""
    if shutil.which("curl"):
        return run("curl", "--silent", *words[1:])
    data, url = words[2:]
    with urllib.request.urlopen(url, data.encode(), timeout=PATIENCE) as answer:
        return str(answer.read().decode())


# ---- Examples


def test_blocks_are_in_languages_that_are_tried_here() -> None:
    assert {block.language for block in BLOCKS} - {""} == {
        "python", "console", "sh", "ini", "nginx", "dockerfile"}


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_handlers(block)], ids=name_block)
def test_python_of_handlers_is_loaded_whole(
        block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "example", None)  # what the file becomes, so that it is gone afterwards
    write("example.py", block.text)
    assert kfserver.main(["--check", "--handlers", "example.py"]) == 0
    assert capsys.readouterr().out.startswith(f"{block.text.count('@registry.on(')} handlers from ")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python" and not is_handlers(block)],
                         ids=name_block)
def test_python_runs(block: Block) -> None:
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    write("example.py", block.text)
    printed = run(sys.executable, "example.py")
    assert "print(" not in block.text or re.fullmatch(r"http://127\.0\.0\.1:\d+/\n", printed)


def commands_of(text: str) -> Iterator[Tuple[str, str]]:
    """The commands behind ``$`` in a terminal's text, and what it shows below each."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


def execute(words: Sequence[str], shown: str) -> None:
    """Run a command that ends; it prints what is shown, if anything is."""
    typed = re.findall(r"^user> (.*\n)", shown, re.MULTILINE)
    printed = curl(words) if words[0] == "curl" else run(sys.executable, *words[1:], typed="".join(typed))
    # Where a terminal shows a prompt and what is typed at it, a pipe shows "user:" and the line that was read.
    assert not shown or printed.rstrip("\n") == shown.replace("user> ", "user: ").rstrip("\n")


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "console"], ids=name_block)
def test_console_shows_what_is_printed(block: Block) -> None:
    if handlers_above(block.line):
        write("handlers.py", handlers_above(block.line))
    port = "8080"
    with contextlib.ExitStack() as servers:
        for command, shown in commands_of(block.text):
            words = shlex.split(command.replace(":8080/", f":{port}/"))
            if "--port" in words:
                port = servers.enter_context(server([sys.executable, *words[1:], "--port", "0"])).port
            else:
                execute(words, shown)


@pytest.mark.parametrize("command", re.findall(r"`((?:python3|printf) [^`]+)`", README))
def test_commands_in_sentences_end_well(command: str) -> None:
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    KfServer(HandlerRegistry(), local(journal="kf.db")).open().stop()
    run("sh", "-c", command.replace("python3", shlex.quote(sys.executable)))


# ---- Deployment


def read_unit() -> configparser.ConfigParser:
    """The systemd unit, its continued lines joined."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(re.sub(r"\\\n *", "", the("ini")))
    return unit


def test_unit_starts_kfserver(tmp_path: pathlib.Path) -> None:
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    command = re.sub(r"/(opt/kf|run/kf|var/lib/kf)/", f"{tmp_path}/", read_unit()["Service"]["ExecStart"])
    printed = run(sys.executable, *shlex.split(command)[1:], "--check")
    assert f" handlers from {tmp_path}/handlers.py\n" in printed


def test_unit_gives_the_server_more_time_than_it_takes_to_end() -> None:
    assert int(read_unit()["Service"]["TimeoutStopSec"]) > SETTING_FIELDS["grace"].default + kfserver.FINISH_SECONDS


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_unit_is_what_systemd_understands() -> None:
    write("kf.service", the("ini").replace("/usr/bin/python3", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", "./kf.service"], stderr=subprocess.PIPE,
                          timeout=PATIENCE)
    # It tells of this machine's other units too, and ends well though a line is not understood.
    assert [line for line in done.stderr.decode().splitlines() if "kf.service" in line] == []


# What surrounds the README's part in nginx.conf; files go to the folder of the test.
NGINX = """
events {{}}
error_log stderr;
pid nginx.pid;
http {{
    access_log off;
    client_body_temp_path body; proxy_temp_path proxy; fastcgi_temp_path fastcgi; uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
{part}}}
"""


@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_understands_its_part(tmp_path: pathlib.Path) -> None:
    # It opens what it would listen on.
    part = the("nginx").replace("listen 80;", "listen unix:nginx.sock;")
    write("nginx.conf", NGINX.format(part=part))
    done = subprocess.run(["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout.decode()


def test_container_serves_with_the_files_that_it_copies(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, files, command = re.findall(r"^(?:FROM|COPY|CMD) (.*)$", the("dockerfile"), re.MULTILINE)
    assert files == "kfserver.py handlers.py /"
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    monkeypatch.setenv("KF_PORT", "0")
    program, *arguments = json.loads(command)
    assert program == "python3"
    with server([sys.executable, *(argument.replace("/", f"{tmp_path}/") for argument in arguments)]) as running:
        assert f" handlers from {tmp_path}/handlers.py\n" in running.output
        with Client(int(running.port)) as client:
            assert client.ask(post(push())).body == b"success"


# ---- Tables


def test_settings_table_is_made_from_the_settings() -> None:
    assert read_table() == make_table(), "run: python3 tests/settings_table.py --update"


def read_rows(head: str) -> List[List[str]]:
    """The rows of the table that has the head, as lists of cells."""
    table = README.partition(f"\n| {head} |\n")[2].partition("\n\n")[0]
    return [re.split(r" *(?<!\\)\| *", line)[1:-1] for line in table.splitlines()[1:]]


SEALED = PUBLISHED["encrypted"][0]
SAFE: Dict[str, Any] = {"token": SEALED["token"], "aes_key": SEALED["encoding_aes_key"], "app_id": SEALED["app_id"]}
SIGNED: Dict[str, Any] = {"token": TOKEN, "max_age": 300}
PUSH = Request("POST", "/", "", push())
SEALED_PUSH = Request("POST", "/", urlencode(SEALED["query"]), SEALED["body"].encode())


class Case(NamedTuple):
    """A request that a row of the answers table speaks of, and what it meets: settings, a push before it, no room."""

    request: Request
    settings: Dict[str, Any] = {}
    before: Sequence[Request] = ()
    busy: str = ""

    def ask(self) -> Tuple[World, Response]:
        """The answer, and the world after it."""
        world = World(**self.settings)
        for request in self.before:
            world.ask(request)
        world.submitted.clear()
        world.full = Busy(self.busy) if self.busy else None
        return world, world.ask(self.request)


# What each row of the README speaks of, in its order: a case for each thing that its first cell names.
CASES: Dict[str, List[Case]] = {
    "good": [Case(PUSH), Case(PUSH._replace(query=signed_query(TOKEN)), SIGNED), Case(SEALED_PUSH, SAFE)],
    "the same again (queued, running or done)": [Case(PUSH, before=[PUSH])],
    "handshake": [Case(Request(method, "/", signed_query(TOKEN, echoStr="4375120948345356249")), SIGNED)
                  for method in ("POST", "GET")],
    "GET without a handshake": [Case(Request("GET", "/"), SIGNED)],
    "signature missing, wrong or stale": [Case(PUSH._replace(query=query), SIGNED) for query in (
        "", signed_query("another token"), signed_query(TOKEN, NOW - 301))],
    "not encrypted though a key is set; wrong key, app id or padding": [
        Case(PUSH, SAFE), Case(PUSH._replace(query=signed_query(SAFE["token"])), SAFE),
        Case(SEALED_PUSH, {**SAFE, "aes_key": "B" * 43}), Case(SEALED_PUSH, {**SAFE, "app_id": "another"})],
    "not XML or JSON, not an object, DOCTYPE, too deep": [Case(Request("POST", "/", "", body)) for body in (
        b"hi", b"[]", b"<!DOCTYPE xml><xml/>", b"<a>" * 100 + b"</a>" * 100)],
    "too large": [Case(PUSH, {"max_body": 10})],
    "other method or path": [Case(Request("PUT", "/", "", push())), Case(PUSH, {"path": "/kf"})],
    "queue full, or shutting down": [Case(PUSH, busy="the queue is full"), Case(PUSH, busy="shutting down")],
}
ANSWERS = read_rows("push | status, body | handler runs")


def test_answers_table_has_a_row_for_each_kind_of_push() -> None:
    assert [push for push, _, _ in ANSWERS] == list(CASES)


@pytest.mark.parametrize(("kind", "told", "runs"), ANSWERS, ids=[kind for kind, _, _ in ANSWERS])
def test_answers_table_tells_the_status_and_whether_the_handler_runs(kind: str, told: str, runs: str) -> None:
    answers = [case.ask() for case in CASES[kind]]
    assert {response.status for _, response in answers} == {int(status) for status in re.findall(r"\d{3}", told)}
    assert {len(world.submitted) for world, _ in answers} == {1 if runs == "once" else 0}


@pytest.mark.parametrize(("kind", "body"), [
    ("good", b"success"),
    ("the same again (queued, running or done)", b"success"),
    ("handshake", b"4375120948345356249"),
    ("GET without a handshake", b"kfserver is up: pushes go here by POST\n"),
    ("not encrypted though a key is set; wrong key, app id or padding", b"forbidden\n"),
])
def test_answers_table_tells_the_body(kind: str, body: bytes) -> None:
    assert {case.ask()[1].body for case in CASES[kind]} == {body}


@pytest.mark.parametrize(("kind", "name"), [
    (kind, name) for kind, told, _ in ANSWERS for name in re.findall(r"with ([A-Z][\w-]+)", told)])
def test_answers_table_tells_headers(kind: str, name: str) -> None:
    assert name in dict(CASES[kind][0].ask()[1].headers)


def test_answers_table_promises_that_a_retry_is_accepted() -> None:
    for case in CASES["queue full, or shutting down"]:
        world, _ = case.ask()
        world.full = None
        assert world.ask(case.request).body == b"success"


def logged_texts() -> List[str]:
    """The texts of all calls of the log in kfserver.py; that of refusals stands there once for each reason."""
    calls = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Call)
             and getattr(node.func, "attr", "") in ("info", "warning", "warn", "error")]
    texts = [ast.literal_eval(argument) for call in calls for argument in call.args
             if type(argument).__name__ in ("Constant", "Str")]
    texts = [re.sub(r"%\(\w+\)", "%", text) for text in texts if isinstance(text, str)]
    reasons = re.findall(r'\b(?:ForbiddenPush|Busy)\("(.*?)"', SOURCE)
    return texts + [text.replace("%s", reason, 1) for text in texts if "refused" in text for reason in reasons]


@pytest.mark.parametrize("cell", [cell for cell, _ in read_rows("log line | what to do")])
def test_log_lines_to_look_for_are_logged(cell: str) -> None:
    # What the README leaves out or counts stands in the code as %s or %d.
    pattern = ".*".join(re.escape(re.sub(r"\d+", "%d", part.strip())) for part in cell.strip("`").split("…"))
    assert [text for text in logged_texts() if re.match(pattern, text)]


# ---- Names


def options() -> Set[str]:
    """The options of all commands."""
    parsers = [kfserver.build_parser(), kfserver.build_push_parser(), kfserver.build_chat_parser(),
               kfserver.build_journal_parser()]
    return {option for parser in parsers for option in parser._option_string_actions}


def test_options_of_the_readme_exist() -> None:
    ours = README.replace(the("sh"), "")  # where the options of other programs stand
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) - options() == set()


def test_environment_variables_of_the_readme_exist() -> None:
    assert set(re.findall(r"\bKF_[A-Z_]+", README)) - {f"KF_{name.upper()}" for name in SETTING_FIELDS} == set()


def test_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)(?:`|  )", README))
    rest = re.search(r"all the rest: (.*)", README)
    assert rest
    assert named | set(rest.group(1).split(", ")) <= targets


def get(path: str) -> bytes:
    """A whole request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: kf\r\n\r\n".encode()


def test_metrics_of_the_readme_are_served() -> None:
    with KfServer(HandlerRegistry(), local(admin="127.0.0.1:0")) as running, Client(running.admin_port) as client:
        assert client.ask(get("/healthz")).status == 200
        served = client.ask(get("/metrics")).body.decode()
    named = set(re.findall(r"kfserver_\w+", README))
    assert named - set(re.findall(r"^# TYPE (\w+)", served, re.MULTILINE)) == set()
