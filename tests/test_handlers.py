"""Handlers: which function takes which message, what a mistake says, and the shop's own handlers.py."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import importlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
from pathlib import Path
from typing import Any, Awaitable, Callable, Dict, List, Tuple

import pytest
from support import PATIENCE, ROOT, local, no_thread_left, push, wait_until

import kfserver
from kfserver import (
    MAX_KINDS_TOLD,
    HandlerError,
    HandlerRegistry,
    Message,
    PatternError,
    describe_error,
    describe_handler,
    encode_session,
    handler_name,
)


def text(content: str) -> Message:
    """A text of a user."""
    return Message({"MsgType": "text", "FromUserName": "user", "Content": content})


def event(name: str) -> Message:
    """An event."""
    return Message({"MsgType": "event", "Event": name})


def answering(answer: str) -> Callable[..., str]:
    """A handler that returns ``answer``, followed by what its expression caught."""
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


async def coroutine(message: Message, *more: Any) -> str:
    """A handler that is async."""
    await asyncio.sleep(0)
    return "-".join(["async", *map(str, more)])


def generator(message: Message) -> Any:
    """What a handler cannot be: to call it runs nothing."""
    yield "x"


async def async_generator(message: Message) -> Any:
    """What a handler cannot be either."""
    yield "x"


class AsyncCallable:
    """An object whose call is a coroutine."""

    async def __call__(self, message: Message, *more: Any) -> str:
        """Answer as an async function does."""
        return await coroutine(message, *more)


GOOD = answering("never run")
# What `on` gets, what it is put above, and what the error tells to write instead.
MISTAKES: Dict[str, Tuple[Tuple[Any, ...], Any, str]] = {
    "no parentheses": ((GOOD,), GOOD, '@registry.on("text")'),
    "an expression first": ((re.compile("x"),), GOOD, '@registry.on("text")'),
    "no function": (("text",), None, "def answer(message)"),
    "a text": (("text",), "menu", "def answer(message)"),
    "a generator": (("text",), generator, "return a list"),
    "an async generator": (("text",), async_generator, "return a list"),
    "a partial of a generator": (("text",), functools.partial(generator), "generator has a yield"),
    "an async pattern": (("text", coroutine), GOOD, "def coroutine(message):' without async"),
    "an async object as pattern": (("text", AsyncCallable()), GOOD, "def AsyncCallable(message):' without async"),
    "a pattern that takes nothing": (("text", lambda: True), GOOD, "is called with the message"),
    "a text that is an expression": (("text", "hi (.*)"), lambda message, name: None, 're.compile(r"hi (.*)")'),
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


@pytest.mark.parametrize("function", [None, 3, "menu"], ids=["None", "number", "text"])
@pytest.mark.parametrize("decorator", ["on_error", "around", "dedup_key"])
def test_decorators_refuse_what_is_not_a_function(decorator: str, function: Any) -> None:
    with pytest.raises(HandlerError, match=f"@registry.{decorator} stands above a function: .* 'def "):
        getattr(HandlerRegistry(), decorator)(function)


def test_on_registers_nothing_of_a_mistaken_line() -> None:
    registry = HandlerRegistry()
    with pytest.raises(HandlerError):
        registry.on("text", "menu", 3)(answering("x"))  # type: ignore[arg-type]
    assert registry.find(text("menu")) is None


# ---- Functions as patterns


def is_number(message: Message) -> bool:
    """A pattern."""
    return message.content.isdigit()


def fail_as_pattern(message: Message) -> bool:
    """A pattern that raises."""
    raise ZeroDivisionError("secret")


class StartsWith:
    """A pattern that is an object."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, start: str) -> None:
        self.start = start

    def __call__(self, message: Message) -> bool:
        return message.content.startswith(self.start)


@pytest.mark.parametrize("rules, message, winner", [
    ([("text", is_number)], text("12"), "0"),
    ([("text", is_number)], text("x"), None),
    ([("text", lambda message: message.content)], text("x"), "0"),
    ([("text", StartsWith("a"))], text("ab"), "0"),
    ([("text", functools.partial(lambda word, message: word == message.content, "x"))], text("x"), "0"),
    ([("text", is_number), ("text", re.compile("1"))], text("12"), "0"),
    ([("text", re.compile("1")), ("text", is_number)], text("12"), "0"),
    ([("text", is_number), ("text", "12")], text("12"), "1"),
    ([("text",), ("text", is_number)], text("12"), "1"),
    ([("text", "a", re.compile("b"), is_number)], text("3"), "0"),
    ([("event", lambda message: message.fields.get("Scene") == "5")], Message({"event": "x", "Scene": "5"}), "0"),
    ([("image",), ("image", lambda message: True)], Message({"MsgType": "image"}), "1"),
    ([("*", lambda message: True), ("text",)], text("x"), "1"),
    ([("*",), ("*", lambda message: message.msg_type == "video")], Message({"MsgType": "video"}), "1"),
    ([("*", lambda message: False)], Message({"MsgType": "video"}), None),
    ([("text", lambda message: message.session.get("step") == 2)], Message({"MsgType": "text"}, session={"step": 2}),
     "0"),
], ids=range(16))
def test_find_tries_functions_with_the_expressions_in_the_order_of_registration(
        rules: List[Any], message: Message, winner: Any) -> None:
    assert registry_of(*rules).handle(message) == winner


@pytest.mark.parametrize("pattern, told", [
    (fail_as_pattern, r"the pattern fail_as_pattern at test_handlers.py:\d+ failed: ZeroDivisionError at test_hand"),
    (lambda message: message.nothing, r"the pattern <lambda> at test_handlers.py:\d+ failed: AttributeError at test_h"),
    (lambda message: sys.exit(), r"the pattern <lambda> .* failed: SystemExit at "),
    (lambda message: Awaited(), r"the pattern <lambda> .* failed: HandlerError: .* a pattern cannot be async"),
], ids=["function", "lambda", "sys.exit()", "async"])
def test_find_tells_which_pattern_failed_without_the_words_of_the_user(pattern: Any, told: str) -> None:
    with pytest.raises(PatternError, match=told) as caught:
        registry_of(("text", pattern)).find(text("x"))
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is not None


def test_pattern_that_fails_counts_as_a_failed_try(caplog: pytest.LogCaptureFixture) -> None:
    server = kfserver.KfServer(registry_of(("text", fail_as_pattern)), local(tries=2, grace=0))
    server.feed(push())
    told = "handler failed: .* try=1 of 2, PatternError: the pattern fail_as_pattern"
    wait_until(lambda: re.search(told, caplog.text))
    assert len(server.stop()) == 1


class Awaited:
    """What can be awaited, and is not a coroutine."""

    def __await__(self) -> Any:
        yield from coroutine(text("x")).__await__()
        return "awaited"


def test_rules_show_a_named_function_by_its_name_and_a_lambda_by_its_place() -> None:
    registry = HandlerRegistry()
    registry.on("text", is_number, lambda message: True)(coroutine)
    rule, = registry.rules
    assert re.fullmatch(r"@registry.on\('text', is_number, <lambda> at test_handlers.py:\d+\) -> coroutine", rule)


# ---- A second handler for the same


def first(message: Message) -> None:
    """Never run."""


def second(message: Message) -> None:
    """Never run."""


@pytest.mark.parametrize("rules, told", [
    ([("text",), ("text",)], "@registry.on('text')"),
    ([("*",), ("*",)], "@registry.on('*')"),
    ([("text", "menu"), ("text", "hi", " menu ")], "@registry.on('text', ' menu ')"),
    ([("event", "x"), ("event", "x")], "@registry.on('event', 'x')"),
    ([("text", re.compile("a.c")), ("text", re.compile("a.c"))], """@registry.on('text', re.compile(r"a.c"))"""),
    ([("text", is_number), ("text", is_number)], "@registry.on('text', is_number)"),
    ([("text", re.compile("a")), ("text", re.compile("a", re.I))], ""),
    ([("text", "a"), ("event", "a")], ""),
    ([("text",), ("text", "a")], ""),
], ids=str)
def test_on_tells_by_both_names_that_another_handler_takes_that_already(
        rules: List[Any], told: str, caplog: pytest.LogCaptureFixture) -> None:
    registry = HandlerRegistry()
    for rule, function in zip(rules, (first, second)):
        registry.on(*rule)(function)
    assert ["@registry" + message.partition("@registry")[2].partition(": ")[0] for message in caplog.messages] == (
        [told] if told else [])
    if told:
        assert re.match(r"second at test_handlers.py:\d+ is never called for .*: first at test_handlers.py:\d+ was",
                        caplog.messages[0])


def test_on_tells_nothing_of_a_function_that_is_registered_twice_for_the_same(caplog: pytest.LogCaptureFixture) -> None:
    registry = HandlerRegistry()
    registry.on("text", "a")(registry.on("text", "a", "b")(first))
    assert caplog.messages == []


# ---- Sessions


def test_session_of_a_message_is_what_it_was_given_or_an_own_dict() -> None:
    given: Dict[str, Any] = {"step": 1}
    assert Message({}, session=given).session is given
    message = Message({})
    message.session["step"] = 2
    assert message.session == {"step": 2}
    assert Message({}).session == {}


@pytest.mark.parametrize("session", [
    {}, {"a": None, "b": [True, 1, -2.5, "你好", "\ud800", {"c": []}], "": {}}, {"big": 10 ** 100}], ids=str)
def test_encode_session_gives_json_that_decodes_to_the_same(session: Dict[str, Any]) -> None:
    encoded = encode_session(session)
    assert encoded.isascii() and (json.loads(encoded) == session if session else encoded == "")


LOOP: Dict[str, Any] = {}
LOOP["self"] = LOOP
DEEP: List[Any] = []
for _ in range(100000):
    DEEP = [DEEP]


@pytest.mark.parametrize("value", [
    {1, 2}, (1, 2), b"x", float("nan"), float("inf"), {1: 2}, [{"deep": {None: 1}}], object(), LOOP, DEEP, first,
], ids=["set", "tuple", "bytes", "nan", "inf", "number as key", "None as key", "object", "loop", "deep", "function"])
def test_encode_session_names_the_key_of_what_json_does_not_have(value: Any) -> None:
    with pytest.raises(HandlerError, match=r"session\['bad'\] is not what JSON has: keep None, True"):
        encode_session({"good": [1], "bad": value})


@pytest.mark.parametrize("key", [1, None, ("a", "b")], ids=str)
def test_encode_session_refuses_keys_that_are_not_texts(key: Any) -> None:
    with pytest.raises(HandlerError, match=r"session\["):
        encode_session({key: 1})


# ---- describe_handler and handler_name


@functools.wraps(first)
def decorated(message: Message) -> None:
    """Stands elsewhere than what it wraps."""


@pytest.mark.parametrize("function, name, has_place", [
    (first, "first", True), (coroutine, "coroutine", True),
    (functools.partial(functools.partial(first)), "first", True),
    (Counter(), "Counter", True), (Counter().__call__, "__call__", True), (AsyncCallable(), "AsyncCallable", True),
    (decorated, "first", True), (functools.lru_cache()(first), "first", True), (lambda message: None, "<lambda>", True),
    ("{}".format, "format", False), (dict, "dict", False), (functools.partial("{}".format), "format", False),
], ids=str)
def test_describe_handler_tells_name_and_place(function: Any, name: str, has_place: bool) -> None:
    assert handler_name(function) == name
    place = r" at test_handlers\.py:\d+" if has_place else ""
    assert re.fullmatch(re.escape(name) + place, describe_handler(function))


def test_describe_handler_tells_the_place_of_what_a_decorator_wraps() -> None:
    assert describe_handler(decorated) == describe_handler(first)


# ---- dedup_key


def test_dedup_key_is_kept_and_returned_unchanged() -> None:
    registry = HandlerRegistry()
    assert registry.key_of is None
    assert registry.dedup_key(handler_name) is handler_name
    assert registry.key_of is handler_name


@pytest.mark.parametrize("function, told", [
    (lambda: "x", "is called with the message"), (lambda message, more: "x", "is called with the message"),
    (coroutine, "cannot be async"), (AsyncCallable(), "cannot be async"), (generator, "has a yield")])
def test_dedup_key_refuses_what_makes_no_key(function: Any, told: str) -> None:
    registry = HandlerRegistry()
    with pytest.raises(HandlerError, match=told):
        registry.dedup_key(function)
    assert registry.key_of is None


def test_dedup_key_refuses_a_second_function_and_names_the_first() -> None:
    registry = HandlerRegistry()
    registry.dedup_key(first)
    with pytest.raises(HandlerError, match="first at test_handlers.py"):
        registry.dedup_key(second)


# ---- async handlers


def returning(awaitable: Callable[[], Any]) -> Callable[[Message], Any]:
    """A plain handler that returns what can be awaited, as a careless decorator makes it."""
    return lambda message: awaitable()


class Bot:
    """Handlers that are methods."""

    async def answer(self, message: Message) -> str:
        """Async too."""
        return await coroutine(message, "method")


@pytest.mark.parametrize("function, answer", [
    (coroutine, "async"), (AsyncCallable(), "async"), (Bot().answer, "async-method"),
    (functools.partial(coroutine, text("x")), "async-<Message text >"),
    (returning(lambda: coroutine(text("x"))), "async"), (returning(Awaited), "awaited")],
    ids=["function", "object", "method", "partial", "decorated", "any awaitable"])
def test_handle_waits_for_what_is_async(function: Any, answer: str) -> None:
    registry = HandlerRegistry()
    registry.on("text")(function)
    assert registry.handle(text("x")) == answer


def test_handle_gives_an_async_handler_what_its_expression_caught() -> None:
    registry = HandlerRegistry()
    registry.on("text", re.compile(r"order (\d+)"))(coroutine)
    assert registry.handle(text("order 12")) == "async-12"


def test_handle_runs_all_async_handlers_on_one_loop_and_beside_each_other() -> None:
    registry, loops = HandlerRegistry(), []
    met = threading.Barrier(2)

    @registry.on("text")
    async def meet(message: Message) -> None:
        loops.append(asyncio.get_event_loop())
        await asyncio.get_event_loop().run_in_executor(None, met.wait, PATIENCE)
    threads = [threading.Thread(target=registry.handle, args=(text("x"),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert len(loops) == 2
    assert loops[0] is loops[1]


class Odd(BaseException):
    """An error that few expect."""


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt, Odd, asyncio.CancelledError,
                                   asyncio.TimeoutError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("arounds", [0, 1], ids=["", "around"])
def test_handle_raises_what_an_async_handler_raises_and_the_loop_goes_on(error: Any, arounds: int) -> None:
    registry = HandlerRegistry()

    @registry.on("text", "fail")
    async def fail(message: Message) -> None:
        await asyncio.sleep(0)
        raise error
    registry.on("text")(coroutine)

    async def pass_on(message: Message, handle: Any) -> Any:
        return await handle(message)
    if arounds:
        registry.around(pass_on)
    for _ in range(2):
        with pytest.raises(BaseException) as caught:
            registry.handle(text("fail"))
        assert type(caught.value).__name__ == error.__name__
        assert registry.handle(text("x")) == "async"


def test_handle_raises_an_error_whose_traceback_leads_to_the_line_of_the_async_handler() -> None:
    registry = HandlerRegistry()

    @registry.on("text")
    async def fail(message: Message) -> None:
        await asyncio.sleep(0)
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError) as caught:
        registry.handle(text("x"))
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "fail"
    assert re.fullmatch(r"ZeroDivisionError at test_handlers.py:\d+", describe_error(caught.value))


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("around_is_async", [False, True], ids=["in plain", "in async"])
def test_handle_keeps_context_variables(is_async: bool, around_is_async: bool) -> None:
    registry = HandlerRegistry()
    user: contextvars.ContextVar[str] = contextvars.ContextVar("user")

    async def read(message: Message) -> str:
        return user.get()
    registry.on("text")(read if is_async else lambda message: user.get())

    async def pass_on(message: Message, handle: Any) -> Any:
        user.set("anna")
        return await handle(message)

    def pass_on_plainly(message: Message, handle: Any) -> Any:
        user.set("anna")
        return handle(message)
    registry.around(pass_on if around_is_async else pass_on_plainly)
    assert contextvars.copy_context().run(registry.handle, text("x")) == "anna"


def test_handle_is_refused_on_the_event_loop_where_it_would_wait_for_itself() -> None:
    registry = HandlerRegistry()

    @registry.on("text")
    async def again(message: Message) -> Any:
        return registry.handle(message)
    with pytest.raises(HandlerError, match="await the other handler itself"):
        registry.handle(text("x"))


def test_event_loop_ends_with_its_registry_and_cancels_what_is_left() -> None:
    ended = threading.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.set()

    async def leave_a_task(message: Message) -> None:
        asyncio.ensure_future(work())
        await asyncio.sleep(0)
    with no_thread_left():
        registry = HandlerRegistry()
        registry.on("text")(leave_a_task)
        registry.handle(text("x"))
        assert not ended.is_set()
        del registry
        gc.collect()
        assert ended.wait(PATIENCE)


def test_registry_without_async_functions_starts_no_thread_and_imports_no_asyncio() -> None:
    script = """
        import sys, threading, kfserver
        registry = kfserver.HandlerRegistry()
        registry.around(lambda message, handle: handle(message))
        registry.on("*")(lambda message: "plain")
        registry.on_error(lambda message, error: None)
        registry.handle_error(kfserver.Message({}), ValueError())
        print(registry.handle(kfserver.Message({})), "asyncio" in sys.modules, threading.active_count())
    """
    assert run(script) == ("plain False 1\n", "")


def run(script: str) -> Tuple[str, str]:
    """Run a script in a process of its own, warnings as errors; what it prints."""
    result = subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", textwrap.dedent(script)], cwd=str(ROOT),
                            capture_output=True, text=True, timeout=PATIENCE)
    return result.stdout, result.stderr


def test_load_handlers_imports_no_library_because_handlers_py_lies_beside_kfserver_too(tmp_path: Path) -> None:
    handlers = tmp_path / "handlers.py"
    handlers.write_text("from kfserver import HandlerRegistry\nregistry = HandlerRegistry()\n", "utf-8")
    assert (ROOT / "handlers.py").exists()
    assert run(f"""
        import kfserver, sys
        kfserver.load_handlers({str(handlers)!r})
        print(*{{"asyncio", "sqlite3"}}.intersection(sys.modules))
    """) == ("\n", "")


def test_event_loop_leaves_no_warning_at_the_end_of_the_process() -> None:
    assert run("""
        import asyncio, kfserver
        registry = kfserver.HandlerRegistry()

        @registry.on("*")
        async def answer(message):
            asyncio.ensure_future(asyncio.sleep(1000))
            await asyncio.sleep(0)
            return "async"
        print(registry.handle(kfserver.Message({})))
    """) == ("async\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_event_loop_is_made_again_in_a_forked_process() -> None:
    out, err = run("""
        import os, kfserver, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        registry = kfserver.HandlerRegistry()

        @registry.on("*")
        async def answer(message):
            return "async"
        for _ in range(2):
            print(registry.handle(kfserver.Message({})), flush=True)
            child = os.fork()
            if not child:
                print("child", registry.handle(kfserver.Message({})), flush=True)
                os._exit(0)
            os.waitpid(child, 0)
        print(registry.handle(kfserver.Message({})))
    """)
    assert (out.split(), err) == (["async", "child", "async"] * 2 + ["async"], "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("end", ["sys.exit()", "1 / 0", "return"])
def test_async_handler_that_forks_ends_the_child_with_its_own_end(end: str) -> None:
    out, err = run(f"""
        import asyncio, os, sys, kfserver, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        registry = kfserver.HandlerRegistry()

        @registry.on("text")
        async def fork(message):
            child = os.fork()
            if not child:
                {end}
            return child

        @registry.on("*")
        async def answer(message):
            return "goes on"
        os.waitpid(registry.handle(kfserver.Message({{"MsgType": "text"}})), 0)
        print(registry.handle(kfserver.Message({{}})))
    """)
    assert (out, err) == ("goes on\n", "")


def test_event_loop_goes_on_when_an_async_handler_stops_it() -> None:
    registry = HandlerRegistry()

    @registry.on("text", "stop")
    async def stop(message: Message) -> str:
        asyncio.get_event_loop().stop()
        await asyncio.sleep(0)
        return "stopped"
    registry.on("text")(coroutine)
    assert [registry.handle(text("stop")), registry.handle(text("x"))] == ["stopped", "async"]


# ---- around


@pytest.mark.parametrize("kinds", ["p", "a", "pp", "pa", "ap", "aa", "apa", "pap"])
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_around_runs_outermost_first_and_plain_functions_never_on_the_event_loop(kinds: str, is_async: bool) -> None:
    registry = HandlerRegistry()
    is_right: List[bool] = []

    def note(on_loop: bool) -> None:
        is_right.append((threading.current_thread().name == "kfserver-async") is on_loop)

    def add_around(number: int) -> None:
        async def async_around(message: Message, handle: Any) -> str:
            note(True)
            return f"{number}({await handle(message)})"

        def plain_around(message: Message, handle: Any) -> str:
            note(False)
            return f"{number}({handle(message)})"
        registry.around(async_around if kinds[number] == "a" else plain_around)

    def plain(message: Message) -> str:
        note(False)
        return "plain"
    for number in range(len(kinds)):
        add_around(number)
    registry.on("text")(coroutine if is_async else plain)
    answer = "async" if is_async else "plain"
    assert registry.handle(text("x")) == "(".join([*map(str, range(len(kinds))), answer]) + ")" * len(kinds)
    assert all(is_right)


def test_around_runs_plain_functions_on_the_thread_of_the_caller_when_nothing_is_async() -> None:
    registry, threads = HandlerRegistry(), []

    @registry.around
    def note(message: Message, handle: Any) -> Any:
        threads.append(threading.current_thread())
        return handle(message)

    @registry.on("text")
    def answer(message: Message) -> None:
        threads.append(threading.current_thread())
    registry.handle(text("x"))
    assert threads == [threading.current_thread()] * 2


def test_around_that_is_async_does_not_make_plain_handlers_wait_for_each_other() -> None:
    registry, met = HandlerRegistry(), threading.Barrier(20)
    registry.on("text")(lambda message: met.wait(PATIENCE))

    async def pass_on(message: Message, handle: Any) -> Any:
        return await handle(message)
    for function in (pass_on, lambda message, handle: handle(message), pass_on):
        registry.around(function)
    threads = [threading.Thread(target=registry.handle, args=(text("x"),)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not met.broken and not any(thread.is_alive() for thread in threads)


def test_around_returns_the_function_unchanged() -> None:
    function = answering("x")
    assert HandlerRegistry().around(function) is function


@pytest.mark.parametrize("function", [lambda message: None, generator, async_generator], ids=["one", "yield", "async"])
def test_around_refuses_a_function_that_could_not_be_called(function: Any) -> None:
    with pytest.raises(HandlerError, match=r"handle for around|yield"):
        HandlerRegistry().around(function)


def test_around_blocks_a_message_by_not_calling_handle() -> None:
    registry, ran = HandlerRegistry(), []
    registry.on("text")(ran.append)
    registry.around(lambda message, handle: "closed")
    assert registry.handle(text("x")) == "closed"
    assert ran == []


def test_around_can_give_the_handler_another_message_and_gets_what_it_raises() -> None:
    registry = HandlerRegistry()

    @registry.on("text")
    def fail(message: Message) -> None:
        raise KeyError(message.content)

    @registry.around
    async def replace(message: Message, handle: Callable[[Message], Awaitable[Any]]) -> str:
        try:
            await handle(text("other"))
        except KeyError as error:
            return f"caught {error}"
        return ""
    assert registry.handle(text("x")) == "caught 'other'"


def test_around_does_not_run_for_what_nobody_takes() -> None:
    registry = HandlerRegistry()
    registry.around(lambda message, handle: "around")
    assert registry.handle(text("x")) is None


@pytest.mark.parametrize("inner", ["", "p", "a", "pa"])
def test_around_can_give_up_an_async_handler_that_hangs(inner: str) -> None:
    registry, cancelled = HandlerRegistry(), threading.Event()

    @registry.on("text")
    async def hang(message: Message) -> None:
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    @registry.around
    async def limit(message: Message, handle: Any) -> str:
        try:
            await asyncio.wait_for(handle(message), 0.05)
        except asyncio.TimeoutError:
            return "too late"
        return ""

    async def async_around(message: Message, handle: Any) -> Any:
        return await handle(message)
    for kind in inner:
        registry.around(async_around if kind == "a" else lambda message, handle: handle(message))
    assert registry.handle(text("x")) == "too late"
    assert cancelled.wait(PATIENCE)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_gives_up_an_async_handler() -> None:
    registry, cancelled = HandlerRegistry(), threading.Event()

    @registry.on("text")
    async def hang(message: Message) -> None:
        asyncio.get_event_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise
    with pytest.raises(KeyboardInterrupt):
        registry.handle(text("x"))
    assert cancelled.wait(PATIENCE)


def test_around_may_call_handle_from_another_thread_and_several_times() -> None:
    registry = HandlerRegistry()
    registry.on("text")(coroutine)

    @registry.around
    async def elsewhere(message: Message, handle: Any) -> List[Any]:
        loop = asyncio.get_event_loop()
        return await asyncio.gather(handle(message), loop.run_in_executor(None, handle, message), handle(message))
    assert registry.handle(text("x")) == ["async"] * 3


def test_around_is_not_left_waiting_by_a_plain_handler_that_raises_stop_iteration() -> None:
    registry = HandlerRegistry()
    registry.on("text")(lambda message: next(iter([])))

    @registry.around
    async def pass_on(message: Message, handle: Any) -> Any:
        return await handle(message)
    with pytest.raises(RuntimeError):  # what a coroutine makes of a StopIteration
        registry.handle(text("x"))


# ---- on_error


def test_handle_error_waits_for_async_functions_and_runs_the_rest_when_one_fails() -> None:
    registry, seen = HandlerRegistry(), []

    @registry.on_error
    async def fail(message: Message, error: BaseException) -> None:
        await asyncio.sleep(0)
        raise KeyError

    @registry.on_error
    async def note(message: Message, error: BaseException) -> None:
        await asyncio.sleep(0)
        seen.append(error)
    error = ValueError()
    assert [type(each) for each in registry.handle_error(text("x"), error)] == [KeyError]
    assert seen == [error]


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


def test_handle_tells_of_a_limited_number_of_kinds(caplog: pytest.LogCaptureFixture) -> None:
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
