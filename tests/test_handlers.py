"""Handlers: which function takes which message, what a mistake says, and the shop's own handlers.py."""

from __future__ import annotations

import functools
import importlib
import logging
import re
from typing import Any, Callable, Dict, List, Tuple

import pytest

from kfserver import MAX_KINDS_TOLD, HandlerError, HandlerRegistry, Message


def text(content: str) -> Message:
    """A text of a user."""
    return Message({"MsgType": "text", "FromUserName": "user", "Content": content})


def event(name: str) -> Message:
    """An event."""
    return Message({"MsgType": "event", "Event": name})


def answering(answer: str) -> Callable[..., str]:
    """A handler that returns ``answer``, and behind it what its expression caught."""
    return lambda message, *groups: "-".join([answer, *map(str, groups)])


def registry_of(*rules: Tuple[Any, ...]) -> HandlerRegistry:
    """A registry with one handler for each rule, which answers with the rule's number, counted from 0."""
    registry = HandlerRegistry()
    for number, rule in enumerate(rules):
        registry.on(*rule)(answering(str(number)))
    return registry


# ---- find and handle


@pytest.mark.parametrize("rule, message, answer", [
    (("text",), text("anything"), "0"),
    (("text", "menu"), text("menu"), "0"),
    (("text", "menu"), text(" menu\n"), "0"),
    (("text", " menu "), text("menu"), "0"),
    (("text", "menu"), text("menus"), None),
    (("text", "menu"), text("Menu"), None),
    (("text", "你好"), text("你好"), "0"),
    (("text", "menu", "hi"), text("hi"), "0"),
    (("text", "a.c"), text("abc"), None),
    (("text", ""), text("  "), "0"),
    (("text", re.compile("order")), text("my order please"), "0"),
    (("text", re.compile("^order$")), text(" order "), "0"),
    (("text", re.compile(r"order (\d+)")), text("order 12"), "0-12"),
    (("text", re.compile(r"(\w+) (\d+)?")), text("order x"), "0-order-None"),
    (("text", re.compile(r"order (?P<number>\d+)")), text("order 12"), "0-12"),
    (("text", re.compile("a"), re.compile("(b)")), text("b"), "0-b"),
    (("event", "user_get_coupon"), event("user_get_coupon"), "0"),
    (("event", "user_get_coupon"), event("other"), None),
    (("event", re.compile("^PACKAGE_(.*)")), event("PACKAGE_AUDIT_PASS"), "0-AUDIT_PASS"),
    (("event",), event("any"), "0"),
    (("event", "x"), Message({"event": "x"}), "0"),
    (("image",), Message({"MsgType": "image"}), "0"),
    (("image",), text("image"), None),
    (("*",), Message({"MsgType": "hologram"}), "0"),
    (("*",), Message({}), "0"),
    (("",), Message({}), "0"),
    (("text", "menu"), Message({"MsgType": "text"}), None),
    (("text", "menu"), Message({"MsgType": "text", "Content": {"menu": "menu"}}), None),
], ids=str)
def test_handle_runs_the_handler_that_the_rule_names(rule: Tuple[Any, ...], message: Message, answer: Any) -> None:
    assert registry_of(rule).handle(message) == answer


ORDER = re.compile("order")


@pytest.mark.parametrize("rules, message, winner", [
    ([("*",), ("text",), ("text", ORDER), ("text", "order")], text("order"), "3"),
    ([("*",), ("text",), ("text", ORDER), ("text", "order")], text("an order"), "2"),
    ([("*",), ("text",), ("text", ORDER), ("text", "order")], text("menu"), "1"),
    ([("*",), ("text",), ("text", ORDER), ("text", "order")], Message({"MsgType": "image"}), "0"),
    ([("text", "a"), ("text", "a")], text("a"), "0"),
    ([("text", re.compile("a")), ("text", re.compile("ab"))], text("ab"), "0"),
    ([("text",), ("text",)], text("a"), "0"),
    ([("*",), ("*",)], text("a"), "0"),
    ([("event", "a"), ("text", "a")], text("a"), "1"),
], ids=["equal text", "expression", "type", "rest", "text twice", "two expressions", "type twice", "rest twice", "own"])
def test_find_the_most_specific_kind_wins_then_the_first(rules: List[Any], message: Message, winner: str) -> None:
    assert registry_of(*rules).handle(message) == winner


def test_find_names_the_handler_and_what_its_groups_caught() -> None:
    registry = HandlerRegistry()

    @registry.on("text", re.compile(r"order (\d+)"))
    def order(message: Message, number: str) -> None:
        """Never run: it is only looked for."""
    match = registry.find(text("order 12"))
    assert match is not None
    assert (match.handler, match.arguments, match.handler.__name__) == (order, ("12",), "order")


def test_find_gives_none_for_what_nobody_takes() -> None:
    assert HandlerRegistry().find(text("x")) is None


def test_handle_passes_on_what_a_handler_raises() -> None:
    registry = HandlerRegistry()

    @registry.on("*")
    def fail(message: Message) -> None:
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError):
        registry.handle(text("x"))


# ---- on


def test_on_returns_the_function_unchanged() -> None:
    registry, function = HandlerRegistry(), answering("x")
    assert registry.on("text", "a")(function) is function
    assert registry.on_error(function) is function


def test_on_may_stand_above_a_function_several_times() -> None:
    registry = HandlerRegistry()
    function = registry.on("text")(registry.on("image")(answering("both")))
    assert [registry.handle(text("x")), registry.handle(Message({"MsgType": "image"}))] == ["both", "both"]
    assert callable(function)


class Counter:
    """A handler that is no function: an object that can be called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, message: Message) -> None:
        self.count += 1

    def __len__(self) -> int:
        return self.count


def test_on_takes_any_object_that_can_be_called_even_one_that_is_false() -> None:
    registry, counter = HandlerRegistry(), Counter()
    registry.on("text")(counter)
    registry.on("text", "hi")(counter)
    registry.handle(text("x"))
    registry.handle(text("hi"))
    assert counter.count == 2


def test_rules_are_the_registrations_as_they_are_written() -> None:
    registry = HandlerRegistry()

    def menu(message: Message, word: str = "") -> None:
        """Never run."""
    registry.on("text", "menu", re.compile(r"m(\w+)"))(menu)
    registry.on("*")(menu)
    assert registry.rules == ("""@registry.on('text', 'menu', re.compile(r"m(\\w+)")) -> menu""",
                              "@registry.on('*') -> menu")
    assert len(registry) == 2


ONE_GROUP = re.compile("order (.+)")


@pytest.mark.parametrize(("function", "patterns", "fits"), [
    pytest.param(lambda message: None, [], True, id="a message"),
    pytest.param(lambda: None, [], False, id="nothing"),
    pytest.param(lambda message, number: None, [], False, id="too many"),
    pytest.param(lambda message, number: None, [ONE_GROUP], True, id="a group"),
    pytest.param(lambda message: None, [ONE_GROUP], False, id="no room for the group"),
    pytest.param(lambda message, number: None, [ONE_GROUP, "order"], False, id="no group in one of two patterns"),
    pytest.param(lambda message, number=None: None, [ONE_GROUP, "order"], True, id="a default for it"),
    pytest.param(lambda *everything: None, [ONE_GROUP], True, id="anything"),
    pytest.param(lambda message, *, number: None, [], False, id="a keyword that nobody gives"),
    pytest.param(functools.partial(lambda shop, message: None, "shop"), [], True, id="a partial"),
    pytest.param("{}".format, [], True, id="a method written in C"),
    pytest.param(dict, [], True, id="one that does not tell"),
])
def test_on_refuses_a_function_that_could_not_be_called(function: Any, patterns: List[Any], fits: bool) -> None:
    registry = HandlerRegistry()
    if fits:
        registry.on("text", *patterns)(function)
    else:
        with pytest.raises(HandlerError, match="is called with the message and"):
            registry.on("text", *patterns)(function)
    assert len(registry) == fits


def test_on_error_refuses_a_function_that_takes_no_error() -> None:
    with pytest.raises(HandlerError, match="the error for on_error"):
        HandlerRegistry().on_error(lambda message: None)


async def coroutine(message: Message) -> None:
    """What a handler cannot be."""


async def generator(message: Message) -> Any:
    """What a handler cannot be either."""
    yield


class AsyncCallable:
    """An object whose call is a coroutine: it would never be awaited."""

    async def __call__(self, message: Message) -> None:
        """Never run."""


GOOD = answering("never run")
# What `on` gets, what it is put above, and what the error tells to write instead.
MISTAKES: Dict[str, Tuple[Tuple[Any, ...], Any, str]] = {
    "no parentheses": ((GOOD,), GOOD, '@registry.on("text")'),
    "an expression first": ((re.compile("x"),), GOOD, '@registry.on("text")'),
    "no function": (("text",), None, "def answer(message)"),
    "a text": (("text",), "menu", "def answer(message)"),
    "a coroutine function": (("text",), coroutine, "def coroutine(message)"),
    "an asynchronous generator": (("text",), generator, "def generator(message)"),
    "an asynchronous object": (("text",), AsyncCallable(), "without async"),
    "a pattern for images": (("image", "cat"), GOOD, "@registry.on('image')"),
    "a pattern for the rest": (("*", "cat"), GOOD, "@registry.on('*')"),
    "a list as pattern": (("text", ["a", "b"]), GOOD, '@registry.on("text", "menu")'),
    "an expression over bytes": (("text", re.compile(b"a")), GOOD, "re.compile("),
}


@pytest.mark.parametrize("arguments, function, instead", MISTAKES.values(), ids=MISTAKES.keys())
def test_on_refuses_a_mistake_at_once_with_the_line_to_write(
        arguments: Tuple[Any, ...], function: Any, instead: str) -> None:
    registry = HandlerRegistry()
    with pytest.raises(HandlerError) as error:
        registry.on(*arguments)(function)
    assert instead in str(error.value)
    assert len(registry) == 0


@pytest.mark.parametrize("function", [None, 3, "menu", coroutine], ids=["None", "number", "text", "coroutine"])
def test_on_error_refuses_a_mistake_at_once_with_the_line_to_write(function: Any) -> None:
    with pytest.raises(HandlerError, match="def "):
        HandlerRegistry().on_error(function)


def test_on_registers_nothing_of_a_mistaken_line() -> None:
    registry = HandlerRegistry()
    with pytest.raises(HandlerError):
        registry.on("text", "menu", 3)(answering("x"))  # type: ignore[arg-type]
    assert registry.find(text("menu")) is None


# ---- on_error


def test_handle_error_runs_every_function_of_on_error() -> None:
    registry, seen = HandlerRegistry(), []
    registry.on_error(lambda message, error: seen.append(("first", message, error)))
    registry.on_error(lambda message, error: seen.append(("second", message, error)))
    message, error = text("x"), ValueError()
    registry.handle_error(message, error)
    assert seen == [("first", message, error), ("second", message, error)]


def test_handle_error_runs_the_rest_when_one_fails() -> None:
    registry, seen, failure = HandlerRegistry(), [], KeyError()

    def fail(message: Message, error: BaseException) -> None:
        raise failure
    registry.on_error(fail)
    registry.on_error(lambda message, error: seen.append(error))
    error = ValueError()
    assert registry.handle_error(text("x"), error) == [failure]
    assert seen == [error]


def test_handle_error_without_functions_does_nothing() -> None:
    HandlerRegistry().handle_error(text("x"), ValueError())


# ---- Messages that nobody takes


def told(caplog: pytest.LogCaptureFixture, *messages: Message) -> List[str]:
    """What an empty registry tells of these messages."""
    registry = HandlerRegistry()
    with caplog.at_level(logging.WARNING, "kfserver"):
        for message in messages:
            assert registry.handle(message) is None
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("message, decorator", [
    (text("secret"), '@registry.on("text")'),
    (event("user_get_coupon"), '@registry.on("event", "user_get_coupon")'),
    (Message({"event": "PACKAGE_AUDIT_PASS"}), '@registry.on("event", "PACKAGE_AUDIT_PASS")'),
    (Message({"MsgType": "hologram"}), '@registry.on("hologram")'),
    (Message({}), '@registry.on("*")')], ids=str)
def test_handle_tells_the_decorator_that_would_take_the_message(
        caplog: pytest.LogCaptureFixture, message: Message, decorator: str) -> None:
    lines = told(caplog, message)
    assert len(lines) == 1
    assert lines[0].endswith(decorator)


def test_handle_tells_once_a_kind(caplog: pytest.LogCaptureFixture) -> None:
    assert len(told(caplog, text("a"), text("b"), event("x"), event("x"), event("y"))) == 3


def test_handle_tells_of_so_many_kinds_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    assert len(told(caplog, *(event(str(number)) for number in range(MAX_KINDS_TOLD + 50)))) == MAX_KINDS_TOLD


def test_handle_tells_nothing_of_what_the_user_wrote(caplog: pytest.LogCaptureFixture) -> None:
    assert "secret" not in "".join(told(caplog, text("secret")))


@pytest.mark.parametrize("name", ["a\nERROR forged", "\x1b[31m", "x" * 100000, "你好\u2028"],
    ids=lambda name: ascii(name)[:12])
def test_handle_tells_odd_names_on_one_short_line_of_ascii(caplog: pytest.LogCaptureFixture, name: str) -> None:
    line, = told(caplog, Message({"MsgType": "event", "Event": name}))
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 1000


# ---- handlers.py: the shop, as its owner would test it

shop = importlib.import_module("handlers").registry


@pytest.mark.parametrize("message, name, arguments", [
    (text("menu"), "menu", ()), (text(" hi "), "menu", ()), (text("你好"), "menu", ()),
    (text("order 12345"), "order", ("12345",)), (text("where is my ORDER #7?"), "order", ("7",)),
    (text("订单 88"), "order", ("88",)), (text("order please"), "question", ()), (text("how much?"), "question", ()),
    (Message({"MsgType": "image", "PicUrl": "http://x/y"}), "picture", ()),
    (event("user_get_coupon"), "coupon", ()), (event("other"), "rest", ()),
    (Message({"MsgType": "hologram"}), "rest", ()), (Message({}), "rest", ())], ids=str)
def test_shop_has_a_handler_for_every_message(message: Message, name: str, arguments: Tuple[str, ...]) -> None:
    match = shop.find(message)
    assert match is not None
    assert (match.handler.__name__, match.arguments) == (name, arguments)


@pytest.mark.parametrize("message, printed", [
    (text("hi"), "user"), (text("order 12345"), "12345"), (text("how much?"), "how much?"),
    (Message({"MsgType": "image", "PicUrl": "http://x/y.png"}), "http://x/y.png"),
    (Message({"MsgType": "event", "Event": "user_get_coupon", "CouponId": "c-1"}), "c-1"),
    (Message({"MsgType": "hologram"}), "hologram"), (Message({"event": "PACKAGE_AUDIT_PASS"}), "PACKAGE_AUDIT_PASS"),
    (Message({}), "")], ids=str)
def test_shop_prints_one_line_for_each_message(
        capsys: pytest.CaptureFixture[str], message: Message, printed: str) -> None:
    shop.handle(message)
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert printed in out


def test_shop_answers_an_order_with_its_number() -> None:
    assert "12345" in str(shop.handle(text("order 12345")))


def test_shop_prints_a_failure_without_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    shop.handle_error(text("secret"), ZeroDivisionError("secret"))
    out = capsys.readouterr().out
    assert "ZeroDivisionError" in out
    assert "secret" not in out
