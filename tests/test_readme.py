"""The README: every example in it is run, every table walked, and every option, target and metric that it names exists.

It has two halves, Chinese and English, which are held together here: the same sections, examples and tables. Its
commands are run as they stand there, but for the port, which is a free one, and the address, which is 127.0.0.1.
"""

from __future__ import annotations

import ast
import configparser
import contextlib
import functools
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
from send_api_server import APP_KEY, APP_SECRET, SendApiServer
from settings_table import CHINESE, make_tables, read_tables
from support import PATIENCE, PUBLISHED, ROOT, Client, Program, local, push, wait_until

import kfserver
from kfserver import SETTING_FIELDS, Busy, HandlerRegistry, KfServer, Request, Response

README = (ROOT / "README.md").read_text("utf-8")
SOURCE = (ROOT / "kfserver.py").read_text("utf-8")
# The two halves. The English one begins at its first anchor.
HALF = README.index('<a id="en-top"></a>')
CHINESE_HALF, ENGLISH_HALF = HALVES = README[:HALF], README[HALF:]
both_halves = pytest.mark.parametrize("half", HALVES, ids=["chinese", "english"])


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
# Those of each half.
HALF_LINE = README.count("\n", 0, HALF) + 1
HALVES_OF_BLOCKS = [[block for block in BLOCKS if (block.line > HALF_LINE) == is_english]
                    for is_english in (False, True)]
both_halves_of_blocks = pytest.mark.parametrize("blocks", HALVES_OF_BLOCKS, ids=["chinese", "english"])


def name_block(block: Block) -> str:
    """What a test of the example is called."""
    return f"line {block.line}"


def the(language: str, blocks: Sequence[Block]) -> str:
    """The text of the one example in a language."""
    block, = [block for block in blocks if block.language == language]
    return block.text


def the_bot(blocks: Sequence[Block]) -> str:
    """The bot of three turns: the handlers that use a session."""
    block, = [block for block in blocks if is_handlers(block) and "message.session" in block.text]
    return block.text


def is_handlers(block: Block) -> bool:
    """Whether an example is a handlers.py: it registers handlers, and leaves it to kfserver.py to serve them."""
    return block.language == "python" and "@registry.on" in block.text and "KfServer" not in block.text


def handlers_above(line: int) -> str:
    """The handlers.py that the reader of a half has written, come to a line; empty if there is none yet."""
    half = HALVES_OF_BLOCKS[line > HALF_LINE]
    return next((block.text for block in reversed(half) if is_handlers(block) and block.line < line), "")


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


def start(*command: str) -> Program:
    """A program with the settings of the environment, which keep it on this machine."""
    settings = {name: value for name, value in os.environ.items() if name.startswith("KF_")}
    return Program(command=command, log_apart=True, **settings)


@contextlib.contextmanager
def server(*command: str) -> Iterator[Program]:
    """A kfserver that has printed all that it does before the first push; it must come to a good end."""
    with start(*command) as running:
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


# ---- The two halves

# The texts in examples that differ: Chinese, then English.
TRANSLATED = (
    ("1 营业时间，2 查询订单", "1 opening hours, 2 where is my order?"), ("菜单发给", "menu for"), ("菜单", "menu"),
    ("你好", "hi"), ("请稍等…", "One moment…"), ("订单 {number} 正在路上。", "Order {number} is on its way."),
    ("您的订单正在路上。", "Your order is on its way."), ("这是订单号吗？", "Is this an order number?"),
    ("正在为您查询。", "We are looking into it."), ("八点恢复服务。", "Back at eight."), ("下班", "closed"),
    ("请输入订单号。", "What is the order number?"), ("没有改动。", "Nothing has changed."),
    ("取消订单 {message.session['number']}？请回复是或否。",
     "Cancel order {message.session['number']}? Send yes or no."),
    ("订单 {number} 已取消。", "Order {number} is cancelled."), ("取消", "cancel"), ("订单", "order"), ("是", "yes"))
COMMENT = re.compile(r" *(?:^|(?<= ))# (?!client\.).*$", re.MULTILINE)


def compare_form(block: Block) -> Tuple[str, str]:
    """An example without its comments, its texts in English."""
    text = COMMENT.sub("", block.text)
    for chinese, english in TRANSLATED:
        text = text.replace(chinese, english)
    return block.language, text


def sections(half: str) -> List[Tuple[str, str]]:
    """The name of each anchor, and the level of the heading that follows it."""
    found = re.findall(r'^<a id="(?:zh|en)-([a-z-]+)"></a>\n(#+) \S', half, re.MULTILINE)
    assert len(found) == half.count("<a id=")
    return found


def in_code(text: str) -> Set[str]:
    """What a text shows as code inside its sentences, in English."""
    found = set(re.findall(r"`([^`]+)`", re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)))
    return {compare_form(Block("", each, 0))[1] for each in found}


def rows(half: str) -> List[Tuple[int, Set[str]]]:
    """Of each row of each table, how many cells it has, and what it shows as code."""
    return [(row.count("|"), in_code(row)) for row in re.findall(r"^\|.*$", half, re.MULTILINE)]


def test_halves_have_the_same_sections_in_the_same_order() -> None:
    assert sections(CHINESE_HALF) == sections(ENGLISH_HALF)
    for half in HALVES:
        without_code = re.sub(r"^ *```.*?^ *```$", "", half, flags=re.MULTILINE | re.DOTALL)
        assert len(re.findall(r"^#+ ", without_code, re.MULTILINE)) == len(sections(half)), "one has no anchor"


def test_links_inside_the_readme_lead_to_an_anchor() -> None:
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= set(re.findall(r'<a id="([^"]+)">', README))


def test_links_to_files_lead_to_files() -> None:
    named = set(re.findall(r"\]\((?!https?:|#)([^)]+)\)", README))
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("pattern", [
    r"https?://[^\s)`\"]+", r"(?<![\w-])--[a-z][a-z-]*", r"\bKF_[A-Z_]+", r"kfserver_\w+", r"\bmake [a-z-]+(?=`)",
    r"`message\.\w+`", r"\b[A-Z][a-z]+Error\b"])
def test_halves_name_the_same(pattern: str) -> None:
    assert set(re.findall(pattern, CHINESE_HALF)) == set(re.findall(pattern, ENGLISH_HALF))


def test_halves_have_the_same_examples() -> None:
    chinese, english = HALVES_OF_BLOCKS
    assert [compare_form(block) for block in chinese] == [compare_form(block) for block in english]


def test_halves_have_the_same_tables() -> None:
    assert rows(CHINESE_HALF) == rows(ENGLISH_HALF)


def test_halves_name_the_same_in_each_section() -> None:
    chinese, english = (re.split(r'<a id="\w\w-', half)[1:] for half in HALVES)
    for in_chinese, in_english in zip(chinese, english):
        assert in_code(in_chinese) == in_code(in_english), in_english.partition('"')[0]


def test_halves_have_as_many_points_in_each_list() -> None:
    chinese, english = (re.findall(r"^(?: *[-#]|\d\.)(?= )", half, re.MULTILINE) for half in HALVES)
    assert chinese == english


def test_halves_have_the_same_figures_of_speed() -> None:
    figures = [re.findall(r"<!-- bench -->.*?<!-- /bench -->", half, re.DOTALL) for half in HALVES]
    assert len(figures[0]) == 1
    assert figures[0] == figures[1]


# ---- Examples


def test_blocks_are_in_languages_that_are_tried_here() -> None:
    assert {block.language for block in BLOCKS} - {""} == {
        "python", "console", "sh", "ini", "nginx", "dockerfile"}


@both_halves_of_blocks
def test_first_push_sent_twice_runs_the_handler_once(blocks: Sequence[Block]) -> None:
    write("handlers.py", next(block.text for block in blocks if is_handlers(block)))
    first = next(block for block in blocks if block.language == "console")
    (command, _), (ask, shown) = commands_of(first.text)
    with server(sys.executable, *shlex.split(command)[1:], "--port", "0") as running:
        before = running.output
        ask = ask.replace(":8080/", f":{running.port}/")
        for words in (ask, ask, ask.replace('"MsgId": 1', '"MsgId": 2')):
            assert curl(shlex.split(words)).rstrip("\n") == shown.rstrip("\n")
    assert len(running.output[len(before):].splitlines()) == 2


def replies_of(platform: SendApiServer) -> List[str]:
    """What users were sent, in order. What a kill has cut off may have been sent twice: it counts once."""
    return list(dict.fromkeys(reply.content for reply in platform.sent))


@both_halves_of_blocks
def test_bot_goes_on_where_it_was_after_a_kill(blocks: Sequence[Block]) -> None:
    write("handlers.py", the_bot(blocks))
    begin, = re.findall(r'@registry\.on\("text", "(.*?)"\)', the_bot(blocks))
    agreed, = re.findall(r'== "(.*?)"', the_bot(blocks))
    with SendApiServer() as platform:
        for turn, content in enumerate((begin, "12345", agreed), 1):
            with start(sys.executable, "kfserver.py", "--port", "0", "--journal", "kf.db", "--app-key", APP_KEY,
                       "--app-secret", APP_SECRET, "--api-base", platform.base) as running:
                running.push(turn, content)
                wait_until(lambda wanted=turn: len(replies_of(platform)) == wanted)
                running.kill()
        replies = replies_of(platform)
    assert ["12345" in reply for reply in replies] == [False, True, True]


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_handlers(block)], ids=name_block)
def test_python_of_handlers_is_loaded_whole(
        block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "example", None)  # what the file becomes, so that it is gone afterwards
    write("example.py", block.text)
    assert kfserver.main(["--check", "--handlers", "example.py"]) == 0
    assert capsys.readouterr().out.startswith(f"{block.text.count('@registry.on(')} handlers from ")


# Those of the Chinese half: the English ones differ in comments and texts only, as is tested above.
@pytest.mark.parametrize("block", [block for block in HALVES_OF_BLOCKS[0] if block.language == "python"
                                   and not is_handlers(block)], ids=name_block)
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
                port = str(servers.enter_context(server(sys.executable, *words[1:], "--port", "0")).port)
            else:
                execute(words, shown)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`((?:python3|printf) [^`]+)`", README))))
def test_commands_in_sentences_end_well(command: str) -> None:
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    KfServer(HandlerRegistry(), local(journal="kf.db")).open().stop()
    run("sh", "-c", command.replace("python3", shlex.quote(sys.executable)))


# ---- Deployment


def read_unit(blocks: Sequence[Block]) -> configparser.ConfigParser:
    """The systemd unit, its continued lines joined."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.read_string(re.sub(r"\\\n *", "", the("ini", blocks)))
    return unit


@both_halves_of_blocks
def test_unit_starts_kfserver(tmp_path: pathlib.Path, blocks: Sequence[Block]) -> None:
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    service = read_unit(blocks)["Service"]
    assert service["WorkingDirectory"] == "/opt/kf"  # the folder of the test, where kfserver.py is
    command = re.sub(r"/(opt/kf|run/kf|var/lib/kf)/", f"{tmp_path}/", service["ExecStart"])
    printed = run(sys.executable, *shlex.split(command)[1:], "--check")
    assert f" handlers from {tmp_path}/handlers.py\n" in printed


@both_halves_of_blocks
def test_unit_gives_the_server_more_time_than_it_takes_to_end(blocks: Sequence[Block]) -> None:
    given = int(read_unit(blocks)["Service"]["TimeoutStopSec"])
    assert given > SETTING_FIELDS["grace"].default + kfserver.FINISH_SECONDS


@both_halves_of_blocks
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_unit_is_what_systemd_understands(blocks: Sequence[Block]) -> None:
    write("kf.service", the("ini", blocks).replace("/usr/bin/python3", sys.executable))
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


@both_halves_of_blocks
@pytest.mark.skipif(not shutil.which("nginx"), reason="nginx is not installed")
def test_nginx_understands_its_part(tmp_path: pathlib.Path, blocks: Sequence[Block]) -> None:
    # It opens what it would listen on and write to.
    part = the("nginx", blocks).replace("listen 80;", "listen unix:nginx.sock;").replace("/var/log/nginx/", "")
    write("nginx.conf", NGINX.format(part=part))
    done = subprocess.run(["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout.decode()


@both_halves_of_blocks
def test_nginx_logs_no_query(blocks: Sequence[Block]) -> None:
    form, = re.findall(r"^log_format kf '(.*)';", the("nginx", blocks), re.MULTILINE)
    assert {"$request", "$request_uri", "$args", "$query_string"}.isdisjoint(re.findall(r"\$\w+", form))


@both_halves_of_blocks
def test_container_serves_with_the_files_that_it_copies(
        monkeypatch: pytest.MonkeyPatch, blocks: Sequence[Block]) -> None:
    lines = re.findall(r"^(FROM|WORKDIR|COPY|RUN|CMD) (.*)$", the("dockerfile", blocks), re.MULTILINE)
    _, _, (_, files), (_, prepare), (_, command) = lines
    assert [word for word, _ in lines] == ["FROM", "WORKDIR", "COPY", "RUN", "CMD"]
    assert files == "kfserver.py handlers.py ./"
    shutil.copy(str(ROOT / "handlers.py"), "handlers.py")
    run("sh", "-c", prepare.replace("python3", shlex.quote(sys.executable)))
    monkeypatch.setenv("KF_PORT", "0")
    program, *arguments = json.loads(command)
    assert program == "python3"
    with server(sys.executable, *arguments) as running:
        assert f" handlers from {os.path.join(os.getcwd(), 'handlers.py')}\n" in running.output
        running.push()


# ---- Tables


def test_settings_tables_are_made_from_the_settings() -> None:
    assert read_tables() == make_tables(), "run: python3 tests/settings_table.py --update"


def test_each_setting_has_a_chinese_text() -> None:
    assert list(CHINESE) == list(SETTING_FIELDS)


def test_each_half_has_one_table_of_settings() -> None:
    assert [half.count("<!-- settings -->") for half in HALVES] == [1, 1]


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
    """A request that a row of the answers table speaks of, and what it meets: settings, a push before it, no room,
    or an error of ours."""

    request: Request
    settings: Dict[str, Any] = {}
    before: Sequence[Request] = ()
    busy: str = ""
    unsafe: str = ""

    def ask(self) -> Tuple[World, Response]:
        """The answer, and the world after it."""
        world = World(**self.settings)
        for request in self.before:
            world.ask(request)
        world.submitted.clear()
        world.full = Busy(self.busy) if self.busy else None
        world.unsafe = ValueError(self.unsafe) if self.unsafe else None
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
    "an error that nobody foresaw": [Case(PUSH, unsafe="a mistake")],
    "queue full, or shutting down": [Case(PUSH, busy="the queue is full"), Case(PUSH, busy="shutting down")],
}
ANSWERS = read_rows("push | status, body | handler runs")
CHINESE_ANSWERS = read_rows("推送 | 状态码与响应体 | 处理函数是否执行")


def test_answers_table_has_a_row_for_each_kind_of_push() -> None:
    assert [push for push, _, _ in ANSWERS] == list(CASES)


def test_answers_tables_of_both_halves_say_the_same() -> None:
    in_english = {"一次": "once", "否": "no", "稍后": "later"}
    named = re.compile(r"\d{3}|`\w+`|\b[A-Z][\w-]*[a-z]\b")  # statuses, bodies and headers
    chinese = [(named.findall(told), in_english[runs]) for _, told, runs in CHINESE_ANSWERS]
    assert chinese == [(named.findall(told), runs) for _, told, runs in ANSWERS]


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
    for case in CASES["queue full, or shutting down"] + CASES["an error that nobody foresaw"]:
        world, _ = case.ask()
        world.full = world.unsafe = None
        assert world.ask(case.request).body == b"success"


def texts_of(node: ast.AST) -> Iterator[str]:
    """The texts in a call, what an f-string puts in replaced by %s."""
    for each in ast.walk(node):
        if isinstance(each, ast.JoinedStr):
            yield "".join(ast.literal_eval(part) if type(part).__name__ in ("Constant", "Str") else "%s"
                          for part in each.values)
        elif type(each).__name__ in ("Constant", "Str") and isinstance(ast.literal_eval(each), str):
            yield str(ast.literal_eval(each))


@functools.lru_cache(maxsize=None)
def logged_texts() -> List[str]:
    """The texts of all calls of the log in kfserver.py, and of the errors that it is given; that of refusals stands
    there once for each reason."""
    calls = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Call)]

    def texts_in(*names: str) -> List[str]:
        return [text for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in names
                for text in texts_of(call)]
    logged = [re.sub(r"%\(\w+\)", "%", text) for text in texts_in("info", "warning", "warn", "error")]
    refusals = [text for text in logged if "refused" in text]
    reasons = texts_in("ForbiddenPush", "Busy")
    return logged + texts_in("SettingsError") + [text.replace("%s", each, 1) for text in refusals for each in reasons]


LOG_LINES, CHINESE_LOG_LINES = read_rows("log line | what to do"), read_rows("日志行 | 怎么办")


def test_log_lines_of_both_halves_are_the_same() -> None:
    assert [cell for cell, _ in CHINESE_LOG_LINES] == [cell for cell, _ in LOG_LINES]


@pytest.mark.parametrize("cell", [cell for cell, _ in LOG_LINES])
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
    ours = re.sub(r"^```sh\n.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)  # comments on other programs
    of_others = {"--threads", "--enable-threads", "--now"}  # gunicorn's, uWSGI's and systemctl's
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", ours)) - options() == of_others


def test_environment_variables_of_the_readme_exist() -> None:
    assert set(re.findall(r"\bKF_[A-Z_]+", README)) - {f"KF_{name.upper()}" for name in SETTING_FIELDS} == set()


def test_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)(?:`|  )", README))
    rest = re.findall(r"(?:all the rest: |其余：)(.*)", README)
    assert len(rest) == 2
    assert named.union(*(each.split(", ") for each in rest)) <= targets


def get(path: str) -> bytes:
    """A whole request for a path."""
    return f"GET {path} HTTP/1.1\r\nHost: kf\r\n\r\n".encode()


def test_metrics_of_the_readme_are_served() -> None:
    with KfServer(HandlerRegistry(), local(admin="127.0.0.1:0")) as running, Client(running.admin_port) as client:
        assert client.ask(get("/healthz")).status == 200
        served = client.ask(get("/metrics")).body.decode()
    named = set(re.findall(r"kfserver_\w+", README))
    assert named - set(re.findall(r"^# TYPE (\w+)", served, re.MULTILINE)) == set()
