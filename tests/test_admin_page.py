"""The page of --admin, as a person sees it: a real browser, and a real kfserver that messages come to."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any, Iterator, List

import pytest
from browser import Browser, browser, find_programs
from support import Client, Program, post, wait_until

pytestmark = pytest.mark.skipif(bool(find_programs()), reason=find_programs())

HANDLERS = """
from kfserver import HandlerRegistry

registry = HandlerRegistry()

@registry.on("text", "hi")
def greet(message):
    pass

@registry.on("text")
def stumble(message):
    raise ZeroDivisionError("nobody may read this")
"""
RED = "rgb(196, 38, 46)"


@pytest.fixture
def program(tmp_path: pathlib.Path) -> Iterator[Program]:
    """A kfserver with a page, and one handler that works and one that fails."""
    (tmp_path / "handlers.py").write_text(HANDLERS)
    with Program("--admin", "127.0.0.1:0", "--tries", "1", "--handlers", "handlers.py", folder=tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The browser of all tests: its start takes longer than they do."""
    with browser(tmp_path_factory.mktemp("browser")) as made:
        yield made


def page_of(program: Program) -> str:
    """The address of the page, as the start tells it."""
    assert program.port
    if "admin on " not in program.output:
        program.read_until("admin on ")
    found = re.search(r"admin on (http://\S+/)", program.output)
    assert found, program.output
    return found.group(1)


def text(page: Browser, element_id: str) -> str:
    """What an element shows."""
    return str(page.run("return document.getElementById(arguments[0]).innerText", element_id))


def rows(page: Browser, table: str) -> List[Any]:
    """What the rows of a table show below its head: each with its colour, and the texts of its cells."""
    return list(page.run("""
        return [...document.querySelectorAll(`#${arguments[0]} tr`)].slice(1).map(row =>
            [getComputedStyle(row.cells[0]).color, ...[...row.cells].map(cell => cell.innerText)])""", table))


def test_page_shows_a_person_what_happens(page: Browser, program: Program) -> None:
    page.emulate(1200, 900, "light", "en")
    page.open(page_of(program))
    wait_until(lambda: text(page, "health") == "ok")
    assert text(page, "accepted") == "accepted 0"
    assert rows(page, "messages") == []

    for number in range(3):  # the numbers grow, without a new load of the page
        program.push(number)
    wait_until(lambda: text(page, "accepted") == "accepted 3" and len(rows(page, "messages")) == 3)
    heights = page.run("return [...document.querySelectorAll('#plot path')].map(path => path.getBBox().height)")
    assert [height > 0 for height in heights] == [True, False, False, False, False]
    program.push(3, sender="zoe")
    wait_until(lambda: text(page, "accepted") == "accepted 4" and len(rows(page, "messages")) == 4)
    assert [row[1:4] for row in rows(page, "handlers")] == [["greet", "4", "0"]]
    assert "≤" in text(page, "answers_p99") or ">" in text(page, "answers_p99")

    program.push(4, "a secret")  # a failure stands out
    wait_until(lambda: any("failed" in row for row in rows(page, "messages")))
    newest, *others = rows(page, "messages")
    assert (newest[0], newest[2:6], newest[-1]) == (
        RED, ["text", "app/user/text/4", "failed", "stumble"], "ZeroDivisionError")
    assert {row[0] for row in others} & {RED} == set()
    assert [(row[0] == RED, row[1]) for row in rows(page, "handlers")] == [(False, "greet"), (True, "stumble")]
    assert "secret" not in page.run("return document.body.innerText")

    page.type("word", "ZOE")  # the filter narrows the rows
    assert [row[3] for row in rows(page, "messages")] == ["app/zoe/text/3"]
    page.type("word", "!")
    assert rows(page, "messages") == []
    assert page.console() == []  # nothing failed, and the policy had nothing to block

    program.kill()
    wait_until(lambda: text(page, "health") == "no answer")


def test_page_speaks_chinese_in_the_dark_on_a_phone(page: Browser, program: Program) -> None:
    page.emulate(390, 800, "dark", "zh-CN")
    page.open(page_of(program))
    program.push()
    wait_until(lambda: text(page, "accepted") == "已接收 1" and "已处理" in text(page, "messages"))
    assert "最近半小时的推送" in page.run("return document.body.innerText")
    assert text(page, "health") == "正常"
    assert page.run("return document.documentElement.lang") == "zh"
    assert page.run("return document.documentElement.scrollWidth") <= 390
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(14, 18, 25)"


def test_page_shows_markup_in_a_message_as_text(page: Browser, program: Program) -> None:
    markup = "<img src=x onerror='document.title=1'>"
    with Client(program.port) as client:
        page.open(page_of(program))
        client.ask(post(json.dumps({"MsgType": markup, "MsgId": 1, "FromUserName": "user"}).encode()))
        wait_until(lambda: markup in text(page, "messages"))
        assert page.run("return document.images.length") == 0
        assert page.run("return document.title") == "kfserver"
