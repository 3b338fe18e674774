"""Replies: what a handler returns reaches the user through the send API, once, in order, or fails with good advice.

The platform is a server of the tests' own, which refuses whatever is not as published. The clocks stand where the test
sets them.
"""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
import logging
import os
import pathlib
import re
import socket
import sys
import threading
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, Type

import pytest
import send_api_server
from send_api_server import (
    APP_KEY,
    APP_SECRET,
    LIFETIME,
    SEND_PATH,
    THIRD_PARTY_SEND_PATH,
    Proxy,
    Reply,
    SendApiServer,
    Trouble,
    closes_unsaid,
    drips,
    gateway_refuses,
    hangs_up,
    held,
    redirects,
    refuses,
    resets,
    says,
    stays_silent,
    writes,
)
import support
from support import PATIENCE, Certificate, Program, no_thread_left, push, wait_until

import kfserver
from kfserver import (
    ApiError,
    HandlerError,
    HttpClient,
    Image,
    KfServer,
    Message,
    NetworkError,
    Outbox,
    ReplyError,
    SendApi,
    Settings,
    SettingsError,
    Text,
    decode_replies,
    encode_replies,
    list_answers,
    retry_delay,
)

PICTURE = "https://shop.example/a.png?size=1&x=2"
FORM = "application/x-www-form-urlencoded"
# What no log and no error may tell.
TEXT = "my private words"


class Sender:
    """A client of the platform, with credentials unless the settings say otherwise."""

    def __init__(self, base: str, timeout: float = PATIENCE, **settings: Any) -> None:
        credentials = {} if "access_token" in settings else {"app_key": APP_KEY, "app_secret": APP_SECRET}
        self.timer = 0.0
        self.api = SendApi(Settings(**{"api_base": base, **credentials, **settings}),
                           lambda: self.timer, timeout)

    def __enter__(self) -> Sender:
        return self

    def __exit__(self, *error: object) -> None:
        self.api.close()

    def send(self, *texts: str) -> None:
        """Send each text to one user."""
        for text in texts:
            self.api.send_text("user", text)


@pytest.fixture
def platform() -> Iterator[SendApiServer]:
    """The platform, which at the end must have seen nothing that it does not document."""
    with SendApiServer() as server:
        yield server
        assert server.breaches == []


@pytest.fixture
def sender(platform: SendApiServer) -> Iterator[Sender]:
    """A client of the platform with the usual settings."""
    with Sender(platform.base) as made:
        yield made


def contents(platform: SendApiServer) -> List[str]:
    """What reached the user, in order: texts, and addresses of pictures."""
    return [reply.content or reply.pic_url for reply in platform.sent]


def together(count: int, function: Callable[[int], object]) -> List[BaseException]:
    """Call the function with 0, 1, … in as many threads, all at the same time; the errors that were raised."""
    errors: List[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait(PATIENCE)
        try:
            function(number)
        except BaseException as error:
            errors.append(error)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in threads)
    return errors


# ---- What goes to the platform


@pytest.mark.parametrize("text", [
    "hello", "你好 👋", "a&b=c+d %20 #?", "two\nlines\r\nand\ttabs", " blanks ", "\0", "<a>'x' \"y\"</a>", "x" * 20000,
], ids=lambda text: ascii(text)[:30])
def test_send_text_sends_the_text_to_the_letter(platform: SendApiServer, sender: Sender, text: str) -> None:
    sender.api.send_text("openid&+ 1", text)
    (token,) = platform.tokens
    assert platform.sent == [Reply("openid&+ 1", "text", text, "", "2", token)]


def test_send_text_sends_what_no_encoding_can_say_as_a_question_mark(platform: SendApiServer, sender: Sender) -> None:
    # Half a character: JSON can bring it, and a handler that echoes its message returns it.
    sender.send("a\ud83db")
    assert contents(platform) == ["a?b"]


def test_send_image_sends_the_address(platform: SendApiServer, sender: Sender) -> None:
    sender.api.send_image("user", PICTURE)
    (token,) = platform.tokens
    assert platform.sent == [Reply("user", "image", "", PICTURE, "2", token)]


@pytest.mark.parametrize("user_type", [1, 2])
def test_send_api_names_the_user_type_of_the_settings(platform: SendApiServer, user_type: int) -> None:
    with Sender(platform.base, user_type=user_type) as sender:
        sender.send("hello")
    assert platform.sent[0].user_type == str(user_type)


@pytest.mark.parametrize(("answer", "sent"), [
    ("a", ("text", "a", "2")),
    (Text("a"), ("text", "a", "2")),
    (Text("a", user_type=1), ("text", "a", "1")),
    (Image(PICTURE), ("image", PICTURE, "2")),
    (Image(PICTURE, user_type=1), ("image", PICTURE, "1")),
], ids=repr)
def test_send_api_sends_an_answer_to_its_own_user_type(
        platform: SendApiServer, sender: Sender, answer: Any, sent: Tuple[str, ...]) -> None:
    sender.api.send("user", answer)
    (reply,) = platform.sent
    assert (reply.msg_type, reply.content or reply.pic_url, reply.user_type) == sent


def test_send_api_sends_as_a_third_party() -> None:
    with SendApiServer(THIRD_PARTY_SEND_PATH) as platform:
        platform.tokens.add("authorised")
        with Sender(platform.base, access_token="authorised", third_party=True) as sender:
            sender.send("hello")
        assert [reply.token for reply in platform.sent] == ["authorised"]
        assert (platform.token_requests, platform.breaches) == (0, [])


def test_send_api_takes_a_base_that_ends_with_a_slash(platform: SendApiServer) -> None:
    with Sender(platform.base + "/") as sender:
        sender.send("hello")
    assert contents(platform) == ["hello"]


def test_send_api_takes_a_base_with_a_path() -> None:
    with SendApiServer("/proxy" + SEND_PATH) as platform:
        platform.tokens.add("given")
        with Sender(platform.base + "/proxy", access_token="given") as sender:
            sender.send("hello")
        assert (contents(platform), platform.breaches) == (["hello"], [])


# ---- The token


def test_send_api_fetches_one_token_for_many_threads(platform: SendApiServer, sender: Sender) -> None:
    gate = threading.Event()
    platform.token_troubles.append(held(gate))
    crowd = threading.Thread(target=together, args=(16, lambda number: sender.send(str(number))))
    crowd.start()
    wait_until(lambda: platform.token_requests)
    gate.set()
    crowd.join()
    assert sorted(contents(platform), key=int) == [str(number) for number in range(16)]
    assert platform.token_requests == 1


@pytest.mark.parametrize("expires_in", ["2592000", None, "soon", -1, []], ids=repr)
def test_send_api_keeps_the_token_until_the_api_calls_it_expired(
        platform: SendApiServer, sender: Sender, expires_in: object) -> None:
    platform.token_troubles.append(says({"access_token": platform.issue_token(), "expires_in": expires_in}))
    sender.send("one", "two")
    assert (contents(platform), platform.token_requests) == (["one", "two"], 1)
    platform.expire_tokens()
    sender.send("three")
    assert (contents(platform), platform.token_requests) == (["one", "two", "three"], 2)


@pytest.mark.parametrize("number", [110, 111, "110", "111"], ids=repr)
def test_send_api_fetches_another_token_when_one_is_refused(
        platform: SendApiServer, sender: Sender, number: Any) -> None:
    sender.send("one")
    platform.send_troubles.append(gateway_refuses(number, "Access token invalid or no longer valid"))
    sender.send("two")
    assert (contents(platform), platform.token_requests) == (["one", "two"], 2)


def test_send_api_fetches_another_token_once_for_many_threads(platform: SendApiServer, sender: Sender) -> None:
    sender.send("first")
    platform.expire_tokens()
    assert together(16, lambda number: sender.send("more")) == []
    assert (len(platform.sent), platform.token_requests) == (17, 2)


@pytest.mark.parametrize("number", ["110", "111"])
def test_send_api_fetches_another_token_only_once(platform: SendApiServer, sender: Sender, number: str) -> None:
    platform.send_troubles.extend([gateway_refuses(int(number), "Access token invalid")] * 2)
    with pytest.raises(ApiError) as caught:
        sender.send("hello")
    assert caught.value.number == number
    assert (platform.token_requests, platform.send_requests) == (2, 2)


@pytest.mark.parametrize(("known", "number"), [(True, "111"), (False, "110")], ids=["expired", "invalid"])
def test_send_api_fetches_no_token_when_one_was_given(platform: SendApiServer, known: bool, number: str) -> None:
    given = platform.issue_token() if known else "unknown"
    platform.expire_tokens()
    with Sender(platform.base, access_token=given) as sender, pytest.raises(ApiError, match="--access-token") as caught:
        sender.send("hello")
    assert caught.value.number == number
    assert (platform.token_requests, platform.send_requests) == (0, 1)


@pytest.mark.parametrize(("answer", "status", "number", "told"), [
    pytest.param({"error": "invalid_client", "error_description": "unknown client id"}, 401, "invalid_client",
                 r"unknown client id\): check --app-key and --app-secret", id="unknown key"),
    pytest.param({"error": "invalid_scope", "error_description": "no such scope"}, 400, "invalid_scope",
                 "no such scope", id="another error"),
    pytest.param({"error_code": 17, "error_msg": "Open api daily request limit reached"}, 200, "17", "limit reached",
                 id="the gateway's"),
    pytest.param({"access_token": None}, 200, "no access_token", "answered no access_token", id="no token"),
    pytest.param({"access_token": ""}, 200, "no access_token", "answered no access_token", id="an empty token"),
    pytest.param({}, 200, "no access_token", "answered no access_token", id="nothing"),
])
def test_send_api_tells_why_it_gets_no_token(platform: SendApiServer, sender: Sender, answer: Dict[str, Any],
                                             status: int, number: str, told: str) -> None:
    platform.token_troubles.append(says(answer, status))
    with pytest.raises(ApiError, match=told) as caught:
        sender.send("hello")
    assert (caught.value.number, platform.send_requests) == (number, 0)


@pytest.mark.parametrize("wrong", ["app_key", "app_secret"])
def test_send_api_is_refused_with_wrong_credentials(platform: SendApiServer, wrong: str) -> None:
    settings: Dict[str, Any] = {wrong: "wrong"}
    with Sender(platform.base, **settings) as sender, pytest.raises(ApiError) as caught:
        sender.send("hello")
    assert caught.value.number == "invalid_client"


def test_send_api_asks_again_for_a_token_that_was_refused(platform: SendApiServer, sender: Sender) -> None:
    platform.token_troubles.append(says({"error": "invalid_client"}, 401))
    with pytest.raises(ApiError):
        sender.send("lost")
    sender.send("hello")
    assert (contents(platform), platform.token_requests) == (["hello"], 2)


@pytest.mark.parametrize("trouble", [
    pytest.param(says({}, 503), id="503"), pytest.param(says({"error": "invalid_client"}, 401), id="refused"),
])
def test_send_api_shares_a_failure_to_fetch_a_token(
        platform: SendApiServer, sender: Sender, trouble: Trouble) -> None:
    gate, waiting = threading.Event(), threading.Semaphore(0)

    def fail_late(exchange: Any) -> None:
        for _ in range(16):
            assert waiting.acquire(timeout=PATIENCE)
        trouble(exchange)
    platform.token_troubles.append(fail_late)

    class Watched:
        """The lock of the client, which tells who is about to wait for it."""

        def __init__(self, lock: Any) -> None:
            self._lock = lock

        def __enter__(self) -> None:
            waiting.release()
            self._lock.acquire()

        def __exit__(self, *error: object) -> None:
            self._lock.release()
    sender.api._token_lock = Watched(sender.api._token_lock)  # type: ignore[assignment]
    errors = together(16, lambda number: sender.send("lost"))
    gate.set()
    assert (len(errors), len({str(error) for error in errors}), platform.token_requests) == (16, 1, 1)
    assert len(set(map(id, errors))) == 16  # each thread has an error of its own, with its own traceback
    sender.timer += 5
    sender.send("hello")
    assert contents(platform) == ["hello"]


# ---- A token that others keep


@pytest.fixture
def token_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A file for an access token."""
    return tmp_path / "token"


def test_send_api_reads_the_token_from_a_file_at_start(platform: SendApiServer, token_file: pathlib.Path) -> None:
    platform.tokens.add("kept")
    token_file.write_text("\ufeff kept\n", encoding="utf-8")
    with Sender(platform.base, access_token=f"@{token_file}") as sender:
        token_file.unlink()
        sender.send("one", "two")
    assert (contents(platform), platform.token_requests) == (["one", "two"], 0)


def test_send_api_reads_the_file_anew_when_the_token_has_expired(
        platform: SendApiServer, token_file: pathlib.Path) -> None:
    token_file.write_text(platform.issue_token())
    with Sender(platform.base, access_token=f"@{token_file}") as sender:
        sender.send("one")
        platform.expire_tokens()
        token_file.write_text(platform.issue_token())
        sender.send("two")
    assert (contents(platform), platform.send_requests) == (["one", "two"], 3)


@pytest.mark.parametrize("content", ["", "two words", "\xff", None], ids=["empty", "words", "not ASCII", "missing"])
def test_send_api_tells_of_a_file_without_a_token(
        platform: SendApiServer, token_file: pathlib.Path, content: Optional[str]) -> None:
    if content is not None:
        token_file.write_text(content, encoding="latin-1")
    with pytest.raises(SettingsError, match="--access-token") as caught:
        Sender(platform.base, access_token=f"@{token_file}")
    assert content is None or content == "" or content not in str(caught.value)
    token_file.write_text(platform.issue_token())
    with Sender(platform.base, access_token=f"@{token_file}") as sender:
        platform.expire_tokens()
        token_file.unlink()
        if content is not None:
            token_file.write_text(content, encoding="latin-1")
        with pytest.raises(NetworkError, match="--access-token"):
            sender.send("hello")
        token_file.write_text(platform.issue_token())
        sender.send("hello")
    assert contents(platform) == ["hello"]


def test_send_api_waits_for_a_newer_token_in_the_file(platform: SendApiServer, token_file: pathlib.Path) -> None:
    token_file.write_text(platform.issue_token())
    platform.expire_tokens()
    with Sender(platform.base, access_token=f"@{token_file}") as sender:
        with pytest.raises(NetworkError, match="expired, and there is no other one yet"):
            sender.send("hello")
        assert platform.send_requests == 1
        token_file.write_text(platform.issue_token())
        sender.send("hello")
    assert contents(platform) == ["hello"]


def test_send_api_calls_a_function_for_the_token_when_it_needs_one(platform: SendApiServer) -> None:
    given: List[str] = []

    def current_token() -> str:
        given.append(platform.issue_token())
        return given[-1]
    with Sender(platform.base, access_token=current_token) as sender:
        assert given == []
        sender.send("one", "two")
        platform.expire_tokens()
        sender.send("three")
    assert (contents(platform), [reply.token for reply in platform.sent]) == (
        ["one", "two", "three"], [given[0], given[0], given[1]])


def fail_with_a_secret() -> str:
    raise OSError(TEXT)


def leave() -> str:
    raise SystemExit(TEXT)


@pytest.mark.parametrize(("function", "told"), [
    pytest.param(fail_with_a_secret, "no access token: OSError at test_replies.py", id="fails"),
    pytest.param(leave, "no access token: SystemExit at", id="sys.exit()"),
    pytest.param(lambda: None, "returned no text", id="None"),
    pytest.param(lambda: "", "returned no text", id="empty"),
])
def test_send_api_tells_of_a_function_that_gives_no_token(
        platform: SendApiServer, function: Callable[[], str], told: str) -> None:
    with Sender(platform.base, access_token=function) as sender, pytest.raises(NetworkError, match=told) as caught:
        sender.send("hello")
    assert TEXT not in whole_story(caught.value)


def test_send_api_does_not_wait_for_a_function_that_hangs(platform: SendApiServer) -> None:
    over = threading.Event()

    def hang() -> str:
        over.wait(PATIENCE)
        return "late"
    with no_thread_left(), Sender(platform.base, SHORT, access_token=hang) as sender:
        with pytest.raises(NetworkError, match="TimeoutError"):
            sender.send("hello")
        over.set()


@pytest.mark.parametrize("token", [5, True, b"token", ["token"]], ids=repr)
def test_settings_takes_a_text_or_a_function_for_a_token(token: Any) -> None:
    with pytest.raises(SettingsError, match="--access-token .* takes text, or a function") as caught:
        Settings(access_token=token)
    assert repr(token) not in str(caught.value)


def test_settings_takes_a_function_nowhere_else() -> None:
    for name in ("token", "app_key", "redis", "host"):
        with pytest.raises(SettingsError, match="takes text"):
            Settings(**{name: lambda: "text"})  # type: ignore[arg-type]


def test_settings_shows_no_token() -> None:
    assert "secret" not in repr(Settings(access_token="secret"))
    assert "lambda" not in repr(Settings(access_token=lambda: "secret"))


# ---- Errors of the API


@pytest.mark.parametrize(("trouble", "number", "advice"), [
    (refuses(3001, "param error"), "3001", "a parameter is wrong"),
    (refuses(30022, "open_id mismatch"), "30022", "--app-key"),
    (refuses(90001, "out of response count"), "90001", "five replies .* 48 hours"),
    (refuses(90002, "no permission"), "90002", "enable it"),
    (refuses(12345, "something new"), "12345", "the platform's page"),
    (gateway_refuses(6, "No permission to access data"), "6", "the platform's page"),
    (says({"errno": "90001", "msg": "as text"}), "90001", "48 hours"),
    (says({"errno": 3001, "msg": "with a status"}, 400), "3001", "a parameter is wrong"),
    (says({"errno": 0, "error_code": 17, "error_msg": "both"}), "17", r"\(both\).*the platform's page"),
    (says({"error_code": 0, "error_msg": "", "errno": 90001, "msg": "limit"}), "90001", r"\(limit\).* 48 hours"),
    (says({"error_code": 0, "error_msg": "success"}), "no errno", "the platform's page"),
    (says({"error_code": None, "errno": None, "msg": "success"}), "no errno", "the platform's page"),
    (says({"errno": False}), "false", "the platform's page"),
    (says({"errno": ""}), "no errno", "the platform's page"),
    (says({"errno": 0, "msg": "success"}, 403), "status 403", "the platform's page"),
    (says("forbidden", 403), "status 403", "the platform's page"),
], ids=["parameter", "openid", "quota", "not enabled", "unknown", "gateway", "text", "status 400", "error_code alone",
        "errno alone", "no errno", "nulls", "false", "empty", "success with status 403", "status 403, no object"])
def test_api_error_has_number_words_and_advice(
        platform: SendApiServer, sender: Sender, trouble: Trouble, number: str, advice: str) -> None:
    platform.send_troubles.append(trouble)
    with pytest.raises(ApiError, match=advice) as caught:
        sender.send(TEXT)
    assert caught.value.number == number
    assert platform.send_requests == 1


def test_api_error_quotes_the_platform(platform: SendApiServer, sender: Sender) -> None:
    platform.send_troubles.append(refuses(90001, "out of response count"))
    with pytest.raises(ApiError, match=r"answered 90001 \(out of response count\): "):
        sender.send("hello")


@pytest.mark.parametrize("answer", [
    {"errno": 3001, "msg": "one\nERROR another line"},
    {"errno": 3001, "msg": "w" * 60000},
    {"errno": "3\n" * 10000, "msg": ""},
    {"errno": {"deep": ["down"] * 900}, "msg": None},
], ids=["line", "words", "number", "structure"])
def test_api_error_is_one_short_line(platform: SendApiServer, sender: Sender, answer: Dict[str, Any]) -> None:
    platform.send_troubles.append(says(answer))
    with pytest.raises(ApiError) as caught:
        sender.send("hello")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("answer", [
    {"errno": 0, "msg": "success"}, {"errno": "0"}, {"errno": 0, "msg": None, "data": {}},
    {"errno": 0, "error_code": 0}, {"errno": 0, "error_code": "0"}, {"errno": 0, "error_code": None},
], ids=str)
def test_send_api_knows_success(platform: SendApiServer, sender: Sender, answer: Dict[str, Any]) -> None:
    platform.send_troubles.append(says(answer))
    sender.send("hello")
    assert platform.send_requests == 1


def test_send_text_is_refused_without_a_text(sender: Sender) -> None:
    with pytest.raises(ApiError) as caught:
        sender.send("")
    assert caught.value.number == "3001"


# ---- Errors of the network: whether the user may have the reply decides what can be done


# The platform has surely not taken the reply, or says that it could not: it can be sent again.
NOT_TAKEN = [
    pytest.param(says({}, 500), id="500"),
    pytest.param(says({"errno": 0, "msg": "success"}, 503), id="503 with success"),
    pytest.param(says({}, 429), id="429"),
    pytest.param(says({"errno": 5000, "msg": "网络繁忙，请稍后重试"}), id="5000"),
    pytest.param(refuses("5000", "busy"), id="5000 as text"),
    pytest.param(gateway_refuses(2, "Service temporarily unavailable"), id="2"),
    pytest.param(gateway_refuses(4, "Open api request limit reached"), id="4"),
    pytest.param(gateway_refuses(18, "Open api qps request limit reached"), id="18"),
    pytest.param(redirects("http://127.0.0.1:9/"), id="redirect"),
]
# It has the request in full, and nobody knows what it did with it.
MAYBE_TAKEN = [
    pytest.param(resets, id="reset"),
    pytest.param(hangs_up, id="hang-up"),
    pytest.param(writes(b"SSH-2.0-OpenSSH\r\n"), id="another protocol"),
    pytest.param(writes(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"), id="half an answer"),
    pytest.param(writes(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n"), id="bad chunk"),
    pytest.param(writes(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500 + b"\r\n{}"), id="too many headers"),
    pytest.param(writes(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 70000 + b"\r\n\r\n{}"), id="a header too long"),
]
# It answers at its own pace, or not at all. What goes on without end must be ended by us.
SLOW = [
    pytest.param(stays_silent, id="silence"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n"), id="dripping body"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 60000\r\n\r\n"),
                 id="dripping body of a connection that closes"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\n\r\n"), id="dripping body without a length"),
    pytest.param(drips(b"HTTP/1.1 200 OK\r\nX: "), id="dripping header"),
    pytest.param(drips(b"HTTP/1.1 200"), id="dripping status"),
]


# Seconds for an exchange that is to reach its deadline: enough to send a request on a machine that is busy.
SHORT = 0.25
# What is told when the time is over: by our own look at the clock or, if it waits just then, by the socket.
IN_TIME = "no answer in time|timed out"


@pytest.mark.parametrize("trouble", NOT_TAKEN)
def test_send_api_says_that_a_reply_can_be_sent_again(
        platform: SendApiServer, sender: Sender, trouble: Trouble) -> None:
    platform.send_troubles.append(trouble)
    with pytest.raises(NetworkError):
        sender.send("hello")
    assert platform.send_requests == 1
    sender.send("hello")
    assert contents(platform) == ["hello"]


@pytest.mark.parametrize("trouble", MAYBE_TAKEN)
def test_send_api_says_that_a_reply_may_have_arrived(platform: SendApiServer, sender: Sender, trouble: Trouble) -> None:
    sender.send("first")
    platform.send_troubles.append(trouble)
    with pytest.raises(ReplyError, match="may have arrived, so it is not sent again") as caught:
        sender.send("hello")
    assert type(caught.value) is ReplyError
    assert platform.send_requests == 2
    sender.send("another")
    assert contents(platform) == ["first", "another"]


@pytest.mark.parametrize("trouble", [*NOT_TAKEN, *MAYBE_TAKEN])
def test_send_api_says_that_a_reply_without_a_token_can_be_sent_again(
        platform: SendApiServer, sender: Sender, trouble: Trouble) -> None:
    platform.token_troubles.append(trouble)
    with pytest.raises(NetworkError):
        sender.send("hello")
    assert (platform.token_requests, platform.send_requests) == (1, 0)
    sender.send("hello")
    assert contents(platform) == ["hello"]


@pytest.mark.parametrize("trouble", SLOW)
def test_send_api_has_a_deadline_for_the_whole_exchange(platform: SendApiServer, trouble: Trouble) -> None:
    platform.tokens.add("given")
    platform.send_troubles.append(trouble)
    with no_thread_left(), Sender(platform.base, SHORT, access_token="given") as sender:
        with pytest.raises(ReplyError, match=f"({IN_TIME}).*may have arrived"):
            sender.send("hello")
        wait_until(lambda: not platform.open)


def test_send_api_has_a_deadline_for_the_token(platform: SendApiServer) -> None:
    platform.token_troubles.append(stays_silent)
    with Sender(platform.base, SHORT) as sender, pytest.raises(NetworkError, match=IN_TIME):
        sender.send("hello")
    assert (platform.token_requests, platform.send_requests) == (1, 0)


def test_send_api_has_a_deadline_for_the_look_up_of_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found, resolve = threading.Event(), socket.getaddrinfo

    def hang(*arguments: Any, **options: Any) -> Any:
        assert found.wait(PATIENCE)
        return resolve(*arguments, **options)
    with SendApiServer() as platform:
        platform.tokens.add("given")
        with no_thread_left(), Sender(platform.base, SHORT, access_token="given") as sender:
            monkeypatch.setattr(socket, "getaddrinfo", hang)
            with pytest.raises(NetworkError, match=f"cannot be reached .*({IN_TIME})"):
                sender.send("hello")
            found.set()
        # A name that is found after the deadline is too late: the caller may already send the reply again.
        assert (platform.send_requests, platform.sent) == (0, [])


@pytest.mark.parametrize("trouble", [
    pytest.param(lambda exchange: exchange.rfile.read(), id="silence"),
    pytest.param(drips(b"\x16\x03\x03\x3f\xff"), id="dripping"),
])
def test_send_api_has_a_deadline_for_the_handshake(monkeypatch: pytest.MonkeyPatch, trouble: Trouble) -> None:
    monkeypatch.setattr(send_api_server.Exchange, "handle", trouble)
    with SendApiServer() as mute, no_thread_left():
        told = f"cannot be reached .*({IN_TIME})"
        with Sender(mute.base.replace("http", "https"), SHORT) as sender, pytest.raises(NetworkError, match=told):
            sender.send("hello")
        wait_until(lambda: not mute.open)


def test_send_api_waits_five_seconds() -> None:
    assert kfserver.SEND_TIMEOUT == 5.0
    assert inspect.signature(SendApi).parameters["timeout"].default == kfserver.SEND_TIMEOUT


def test_send_api_sends_where_no_thread_can_be_started(
        platform: SendApiServer, sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("kfserver"):  # the platform's may
            raise RuntimeError("can't create new thread at interpreter shutdown")
        start(thread)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    sender.send("one", "two")
    assert contents(platform) == ["one", "two"]


def test_http_client_tries_each_address_of_a_name(platform: SendApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    resolve = socket.getaddrinfo

    def resolve_to_two(host: str, port: int, *more: Any) -> Any:
        if host != "send.example":
            return resolve(host, port, *more)
        # Nobody listens at the first address, which is this machine's too.
        return [*resolve("127.0.0.2", port, *more), *resolve("127.0.0.1", port, *more)]
    monkeypatch.setattr(socket, "getaddrinfo", resolve_to_two)
    with contextlib.closing(HttpClient(platform.base.replace("127.0.0.1", "send.example"), PATIENCE)) as client:
        assert client.exchange("GET", "/")[0] == 501


def test_send_api_tells_that_nobody_listens() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen: connections are refused
        port = nobody.getsockname()[1]
        with Sender(f"http://127.0.0.1:{port}") as sender, pytest.raises(NetworkError, match="ConnectionRefusedError"):
            sender.send("hello")


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".example"], ids=["empty label", "long label"])
def test_send_api_tells_that_a_name_cannot_be(host: str) -> None:
    with Sender(f"http://{host}") as sender, pytest.raises(NetworkError, match="cannot be reached"):
        sender.send("hello")


def test_send_api_follows_no_redirect(platform: SendApiServer, sender: Sender) -> None:
    with SendApiServer() as elsewhere:
        platform.send_troubles.append(redirects(elsewhere.base + SEND_PATH))
        platform.token_troubles.append(redirects(elsewhere.base))
        for _ in ("for the token", "for the reply"):
            with pytest.raises(NetworkError, match="redirects.*--api-base"):
                sender.send("hello")
        assert (elsewhere.connections, platform.sent) == (0, [])


def http_answer(body: bytes) -> bytes:
    """A whole answer that closes its connection."""
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % len(body) + body


@pytest.mark.parametrize("body", [
    pytest.param(b"", id="nothing"),
    pytest.param(b"success", id="text"),
    pytest.param(b"<html></html>", id="HTML"),
    pytest.param(b"<xml><errno>0</errno><access_token>x</access_token></xml>", id="XML"),
    pytest.param(b"null", id="null"),
    pytest.param(b"0", id="number"),
    pytest.param(b'"0"', id="string"),
    pytest.param(b"[]", id="list"),
    pytest.param(b"\xff\xfe", id="not UTF-8"),
    pytest.param(b'{"errno": 0', id="half an object"),
    pytest.param(b"[" * 60000, id="deep"),
    pytest.param(b'{"errno": 0, "msg": ' + b'[{"a": ' * 60 + b"0" + b"}]" * 60 + b"}", id="120 deep"),
    pytest.param(b'{"errno": ' + b"1" * 60000 + b"}", id="long number"),
    pytest.param(b'{"msg": "' + b"x" * 10_000_000 + b'", "errno": 0}', id="huge"),
])
@pytest.mark.parametrize("asked", ["token_troubles", "send_troubles"])
def test_send_api_refuses_an_answer_that_is_no_object(
        platform: SendApiServer, sender: Sender, asked: str, body: bytes) -> None:
    getattr(platform, asked).append(writes(http_answer(body)))
    # Of what kind does not matter, as long as the handler is not blamed for it, and run again.
    with pytest.raises(ReplyError):
        sender.send("hello")
    sender.send("hello")
    assert contents(platform) == ["hello"]


# ---- A send API that is away


def break_down(platform: SendApiServer, sender: Sender, *troubles: Trouble) -> None:
    """Fail with each of the troubles."""
    platform.send_troubles.extend(troubles)
    for _ in troubles:
        with pytest.raises(ReplyError):
            sender.send("lost")


@pytest.mark.parametrize("trouble", [*NOT_TAKEN, *MAYBE_TAKEN])
def test_send_api_is_away_after_three_failures(
        platform: SendApiServer, sender: Sender, trouble: Trouble, caplog: pytest.LogCaptureFixture) -> None:
    break_down(platform, sender, trouble, trouble)
    assert (sender.api.pause(), caplog.messages) == (0.0, [])
    break_down(platform, sender, trouble)
    assert sender.api.pause() == 5.0
    with pytest.raises(NetworkError, match="counts as away"):
        sender.send("refused at once")
    assert platform.send_requests == 3
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "counts as away after 3 failures in a row" in record.getMessage()


@pytest.mark.parametrize("trouble", [
    pytest.param(refuses(90001, "out of response count"), id="refused"), pytest.param(says({"errno": 0}), id="success"),
])
def test_send_api_is_not_away_while_it_answers(platform: SendApiServer, sender: Sender, trouble: Trouble) -> None:
    for _ in range(3):
        break_down(platform, sender, resets, resets)
        platform.send_troubles.append(trouble)
        with contextlib.suppress(ApiError):
            sender.send("hello")
    assert sender.api.pause() == 0.0


def test_send_api_that_is_away_is_tried_every_five_seconds(
        platform: SendApiServer, sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    break_down(platform, sender, *[resets] * 3)
    for _ in range(7):
        assert sender.api.pause() == 5.0
        sender.timer += 4.5
        assert sender.api.pause() == 0.5
        with pytest.raises(NetworkError, match="counts as away"):
            sender.send("too early")
        sender.timer += 0.5
        assert sender.api.pause() == 0.0
        break_down(platform, sender, resets)
    assert platform.send_requests == 3 + 7
    sender.timer += 5.0
    sender.send("hello")
    assert (contents(platform), sender.api.pause()) == (["hello"], 0.0)
    assert [line.split(" after")[0] for line in caplog.messages] == [
        "the send API counts as away", "the send API is back"]
    break_down(platform, sender, *[resets] * 3)
    assert sender.api.pause() == 5.0


def test_send_api_that_is_away_is_tried_by_one_thread_at_a_time(platform: SendApiServer, sender: Sender) -> None:
    break_down(platform, sender, *[resets] * 3)
    sender.timer += 5.0
    gate = threading.Event()
    platform.send_troubles.append(held(gate))
    probe = threading.Thread(target=sender.send, args=("probe",))
    probe.start()
    wait_until(lambda: platform.send_requests == 4)
    sender.timer += 4.0
    assert sender.api.pause() == 1.0
    errors = together(8, lambda number: sender.send("lost"))
    assert [type(error) for error in errors] == [NetworkError] * 8
    gate.set()
    probe.join(PATIENCE)
    assert sender.api.pause() == 0.0
    sender.send("hello")
    assert contents(platform) == ["probe", "hello"]


def test_send_api_that_breaks_down_for_many_threads_is_tried_again_after_five_seconds(
        platform: SendApiServer, sender: Sender, caplog: pytest.LogCaptureFixture) -> None:
    sender.send("first")
    gate = threading.Event()

    def fail(exchange: Any) -> None:
        gate.wait(PATIENCE)
        hangs_up(exchange)
    platform.send_troubles.extend([fail] * 16)
    crowd = threading.Thread(target=together, args=(16, lambda number: sender.send("lost")))
    crowd.start()
    wait_until(lambda: platform.send_requests == 17)
    gate.set()
    crowd.join(PATIENCE)
    assert (sender.api.pause(), len(caplog.messages)) == (5.0, 1)


@pytest.mark.parametrize(("tries", "seconds"), [(1, 0.5), (2, 2.0), (3, 8.0), (4, 30.0), (5, 30.0), (10 ** 9, 30.0)])
def test_retry_delay_grows_to_half_a_minute(tries: int, seconds: float) -> None:
    assert [retry_delay(tries, iter([random]).__next__) for random in (0.0, 0.5, 1.0)] == [
        seconds, seconds * 0.75, seconds * 0.5]


# ---- Connections


def test_send_api_can_send_again_what_met_a_connection_that_was_closed_before_it_took_the_request(
        platform: SendApiServer, sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    # The server closes in the moment between our look at the connection and the request.
    def look_too_early(connection: socket.socket) -> bool:
        connection.shutdown(socket.SHUT_WR)
        return False
    sender.send("one")
    monkeypatch.setattr(kfserver, "_is_readable", look_too_early)
    with pytest.raises(NetworkError):
        sender.send("two")
    sender.send("two")
    assert (contents(platform), platform.connections) == (["one", "two"], 2)


def test_http_client_opens_a_new_connection_after_some_idle_seconds(
        platform: SendApiServer, sender: Sender, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kfserver.SEND_TIMEOUT <= 5.0  # after which many servers close
    platform.tokens.add("given")
    with Sender(platform.base, access_token="given") as sender:
        sender.send("one", "two")
        assert platform.connections == 1
        later = time.monotonic() + PATIENCE
        monkeypatch.setattr(kfserver.time, "monotonic", lambda: later)
        sender.send("three")
    assert (platform.connections, len(platform.sent)) == (2, 3)


def test_http_client_gives_status_and_json(platform: SendApiServer) -> None:
    client = HttpClient(platform.base, PATIENCE)
    platform.send_troubles.append(says({"errno": 1}, 418))
    form = "user_type=2&open_id=user&msg_type=text&content=hello&pic_url="
    status, body = client.exchange("POST", SEND_PATH + "?access_token=x", form.encode(), FORM)
    assert (status, json.loads(body)) == (418, {"errno": 1})
    client.close()


def test_send_api_keeps_one_connection(platform: SendApiServer, sender: Sender) -> None:
    sender.send("one", "two", "three")
    assert (platform.connections, platform.token_requests, len(platform.sent)) == (1, 1, 3)


def test_send_api_has_as_many_connections_as_replies_at_once(platform: SendApiServer, sender: Sender) -> None:
    for _ in range(3):
        fill(platform, sender, 5)
    assert (platform.connections, len(platform.sent)) == (5, 15)


def fill(platform: SendApiServer, sender: Sender, count: int) -> None:
    """Send so many replies that each of them is under way before the first is answered."""
    gate, before = threading.Event(), platform.send_requests
    platform.send_troubles.extend([held(gate)] * count)
    crowd = threading.Thread(target=together, args=(count, lambda number: sender.send("hello")))
    crowd.start()
    wait_until(lambda: platform.send_requests == before + count)
    gate.set()
    crowd.join()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_send_api_is_not_held_up_by_connections_that_the_platform_has_closed(
        platform: SendApiServer, sender: Sender, count: int) -> None:
    fill(platform, sender, count)
    platform.hang_up()
    wait_until(lambda: not platform.open)
    sender.send("hello")
    assert len(platform.sent) == count + 1


def test_send_api_is_not_held_up_by_a_platform_that_keeps_nothing(platform: SendApiServer, sender: Sender) -> None:
    platform.send_troubles.extend([closes_unsaid] * 3)
    for number in range(3):
        sender.send(str(number))
        wait_until(lambda: not platform.open)
    assert contents(platform) == ["0", "1", "2"]


def test_send_api_close_hangs_up(platform: SendApiServer) -> None:
    with Sender(platform.base) as sender:
        fill(platform, sender, 3)
        assert len(platform.open) == 3
    wait_until(lambda: not platform.open)


def test_send_api_serves_many_threads(platform: SendApiServer, sender: Sender) -> None:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads get into each other's way as often as they can
    try:
        errors = together(8, lambda number: sender.send(*(f"{number}-{count}" for count in range(25))))
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert sorted(contents(platform)) == sorted(f"{number}-{count}" for number in range(8) for count in range(25))
    assert (platform.connections <= 8, platform.token_requests) == (True, 1)


# ---- HTTPS


def test_send_api_refuses_a_certificate_that_nobody_vouches_for(certificate: Certificate) -> None:
    with SendApiServer(certificate=certificate.both) as platform:
        with Sender(platform.base) as sender, pytest.raises(NetworkError, match="SSL"):
            sender.send("hello")
        assert (platform.token_requests, platform.send_requests) == (0, 0)


def test_send_api_refuses_a_certificate_of_another_name(
        certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificate.chain)
    with SendApiServer(certificate=certificate.both) as platform:
        base = platform.base.replace("127.0.0.1", "127.1")
        with Sender(base) as sender, pytest.raises(NetworkError, match="SSL|Certificate"):
            sender.send("hello")
        assert platform.token_requests == 0


def test_send_api_takes_a_certificate_that_is_trusted(
        certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where the library looks for those whom it trusts. So it was the certificate that was refused above, nothing else.
    monkeypatch.setenv("SSL_CERT_FILE", certificate.chain)
    with SendApiServer(certificate=certificate.both) as platform:
        with Sender(platform.base) as sender:
            sender.send("one", "two")
        assert (contents(platform), platform.connections) == (["one", "two"], 1)


# ---- A proxy


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy but what a test itself names."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("user", "credentials"), [
    ("", ""), ("me:pass%20word@", "Basic " + base64.b64encode(b"me:pass word").decode()),
], ids=["open", "with a password"])
def test_send_api_sends_through_a_proxy(
        certificate: Certificate, monkeypatch: pytest.MonkeyPatch, user: str, credentials: str) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificate.chain)
    with SendApiServer(certificate=certificate.both) as platform, Proxy() as proxy:
        monkeypatch.setenv("https_proxy", f"http://{user}{proxy.address}/")
        with Sender(platform.base) as sender:
            sender.send("one", "two")
        assert (contents(platform), platform.breaches) == (["one", "two"], [])
    assert proxy.asked == [("CONNECT", platform.base.partition("//")[2], credentials)]


@pytest.mark.parametrize(("name", "value"), [("no_proxy", "127.0.0.1"), ("NO_PROXY", "*")], ids=["by its name", "all"])
def test_send_api_does_without_a_proxy(
        certificate: Certificate, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", certificate.chain)
    monkeypatch.setenv(name, value)
    with SendApiServer(certificate=certificate.both) as platform, Proxy() as proxy:
        monkeypatch.setenv("https_proxy", proxy.address)
        with Sender(platform.base) as sender:
            sender.send("hello")
        assert (contents(platform), proxy.asked) == (["hello"], [])


def test_send_api_uses_no_proxy_where_it_sends_by_http(
        platform: SendApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.address)
        monkeypatch.setenv("https_proxy", proxy.address)
        with Sender(platform.base) as sender:
            sender.send("hello")
        assert (contents(platform), proxy.asked) == (["hello"], [])


def test_send_api_tells_that_a_proxy_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(refuses=True) as proxy:
        monkeypatch.setenv("https_proxy", f"http://me:password@{proxy.address}")
        told = "cannot be reached .*407"
        with Sender("https://127.0.0.1:9") as sender, pytest.raises(NetworkError, match=told) as caught:
            sender.send("hello")
    assert "password" not in whole_story(caught.value)


def test_send_api_has_a_deadline_for_a_proxy_that_drips(monkeypatch: pytest.MonkeyPatch) -> None:
    with SendApiServer() as proxy, no_thread_left():
        monkeypatch.setattr(send_api_server.Exchange, "do_CONNECT", drips(b"HTTP/1.1 200 OK\r\nX: "), raising=False)
        monkeypatch.setenv("https_proxy", proxy.base)
        with Sender("https://127.0.0.1:9", SHORT) as sender, pytest.raises(NetworkError, match=IN_TIME):
            sender.send("hello")
        wait_until(lambda: not proxy.open)


@pytest.mark.parametrize("proxy", [
    "socks5://127.0.0.1:1080", "http://me:password@", "http://me:password@host:port", "http://two words", "http://",
])
def test_send_api_refuses_what_cannot_be_a_proxy(monkeypatch: pytest.MonkeyPatch, proxy: str) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(SettingsError, match="HTTPS_PROXY takes the address of an HTTP proxy") as caught:
        SendApi(Settings(access_token="token"))
    assert "password" not in whole_story(caught.value)


def test_http_client_takes_no_proxy_from_the_environment(
        platform: SendApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # `push` shows how a receiver answers, and nothing between.
    monkeypatch.setenv("https_proxy", "127.0.0.1:9")
    with contextlib.closing(HttpClient(platform.base, PATIENCE)) as client:
        assert client.exchange("GET", "/")[0] == 501


# ---- What must not be told


def whole_story(error: Optional[BaseException]) -> str:
    """All that an error and those behind it say, the hidden ones too."""
    if error is None:
        return ""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    return "".join([*lines, repr(error.args), whole_story(error.__cause__), whole_story(error.__context__)])


def chatty(token: str) -> str:
    """Words of the platform that quote everything that it was sent."""
    return f"token={token}&client_id={APP_KEY}&client_secret={APP_SECRET}"


@pytest.mark.parametrize("trouble", [
    *NOT_TAKEN,
    *MAYBE_TAKEN,
    pytest.param(refuses(3001, chatty("given")), id="refused"),
    pytest.param(gateway_refuses(110, chatty("given")), id="token refused"),
    pytest.param(writes(http_answer(chatty("given").encode())), id="no JSON"),
    pytest.param(redirects("https://elsewhere.example/?" + chatty("given")), id="redirect"),
    pytest.param(writes(chatty("given").encode() + b"\r\n\r\n"), id="no HTTP"),
])
def test_send_api_tells_no_secret(platform: SendApiServer, sender: Sender, caplog: pytest.LogCaptureFixture,
                                  trouble: Trouble) -> None:
    caplog.set_level(logging.DEBUG)
    platform.token_troubles.append(says({"access_token": "given", "expires_in": LIFETIME}))
    platform.token_troubles.append(says({"error": "invalid_client", "error_description": chatty("given")}, 401))
    platform.send_troubles.extend([trouble] * 4)
    with pytest.raises(ReplyError) as caught:
        sender.send(TEXT)
    told = whole_story(caught.value) + caplog.text
    assert [secret for secret in (APP_KEY, APP_SECRET, "given&", TEXT) if secret in told] == []


@pytest.mark.parametrize("before", [150, 175, 185, 190, 195])
def test_api_error_tells_no_part_of_a_secret(platform: SendApiServer, sender: Sender, before: int) -> None:
    # Long words are cut, and the cut may go through a secret.
    platform.send_troubles.append(refuses(3001, "w" * before + APP_SECRET + "w" * 100))
    with pytest.raises(ApiError) as caught:
        sender.send("hello")
    assert APP_SECRET[:4] not in str(caught.value)


def test_api_error_tells_no_token_that_was_replaced_meanwhile(platform: SendApiServer, sender: Sender) -> None:
    sender.send("first")
    (old,) = platform.tokens
    gate = threading.Event()

    def quote_late(exchange: Any) -> None:
        gate.wait(PATIENCE)
        exchange.answer({"errno": 3001, "msg": f"bad token={old}"})
    platform.send_troubles.append(quote_late)
    errors: List[BaseException] = []
    late = threading.Thread(target=lambda: errors.extend(together(1, lambda number: sender.send("late"))))
    late.start()
    wait_until(lambda: platform.send_requests == 2)
    platform.expire_tokens()
    sender.send("another")  # fetches a token
    gate.set()
    late.join()
    assert [type(error) for error in errors] == [ApiError]
    assert old not in str(errors[0])


# ---- list_answers


@pytest.mark.parametrize(("answers", "listed"), [
    (None, []),
    ("hello", ["hello"]),
    ("", []),
    (Image(PICTURE), [Image(PICTURE)]),
    (["one", Image(PICTURE)], ["one", Image(PICTURE)]),
    (("one", "two"), ["one", "two"]),
    (["one", None, "", "two"], ["one", "two"]),
    ([], []),
    (["x"] * 9, ["x"] * 9),
    (Text("hello"), [Text("hello")]),
    (Text("", user_type=1), []),
    ([Text("one", user_type=1), "two"], [Text("one", user_type=1), "two"]),
    (Image(PICTURE, user_type=2), [Image(PICTURE, user_type=2)]),
], ids=repr)
def test_list_answers(answers: Any, listed: List[Any]) -> None:
    assert list_answers(answers) == listed


@pytest.mark.parametrize("answers", [
    7, True, False, 0, b"bytes", {"a": "dict"}, {"set"}, object, iter(["iterator"]), ["text", 7], ["text", ["list"]],
    Text(None), Image(None), Image(b"url"), [Text(7)],  # type: ignore[arg-type]
], ids=lambda answers: type(answers).__name__)
def test_list_answers_raises_for_what_cannot_be_sent(answers: Any) -> None:
    with pytest.raises(HandlerError, match="None, a text, Image"):
        list_answers(answers)


@pytest.mark.parametrize("user_type", [3, -1, True, "2", None], ids=repr)
@pytest.mark.parametrize("kind", [Text, Image])
def test_list_answers_raises_for_an_unknown_user_type(kind: Any, user_type: Any) -> None:
    with pytest.raises(HandlerError, match="user_type is 1 .* or 2 "):
        list_answers(kind("hello", user_type))


@pytest.mark.parametrize("answers", [
    [], ["one"], ["a\ud83db\0\n", "你好"], [Text("one"), Text("two", 1), Image(PICTURE), Image(PICTURE, 2)],
], ids=repr)
def test_decode_replies_gives_what_encode_replies_was_given(answers: Any) -> None:
    text = encode_replies(answers)
    assert text.isascii()
    decoded = decode_replies(text)
    assert (decoded, list(map(type, decoded))) == (answers, list(map(type, answers)))


@pytest.mark.parametrize("text", [
    "", "null", "5", "[5]", "[null]", "[[]]", '[["Text"]]', '[["Other", "x"]]', '[["Text", 5]]', '[["Text", "x", 7]]',
    '[[["Text"], "x"]]',
])
def test_decode_replies_raises_for_any_other_text(text: str) -> None:
    with pytest.raises(ValueError):
        decode_replies(text)


# ---- Outbox


def test_outbox_has_nobody_to_send_to_without_a_sender(platform: SendApiServer, sender: Sender) -> None:
    outbox = Outbox(sender.api, Message({"event": "PACKAGE_AUDIT_PASS", "tpAppId": "1"}))
    outbox(None)
    for answers in ("hello", [Image(PICTURE)]):
        with pytest.raises(HandlerError, match="no sender to reply to .*: return None"):
            outbox(answers)
    assert platform.connections == 0


@pytest.fixture
def outbox(sender: Sender) -> Outbox:
    """The way back to the sender of one message."""
    return Outbox(sender.api, Message({"FromUserName": "user"}))


def test_outbox_sends_in_order(platform: SendApiServer, outbox: Outbox) -> None:
    outbox(["one", Image(PICTURE), "three"])
    outbox("four")
    assert contents(platform) == ["one", PICTURE, "three", "four"]
    assert {reply.open_id for reply in platform.sent} == {"user"}


@pytest.mark.parametrize("calls", [
    [["1", "2", "3", "4", "5"]],
    ["1", "2", "3", "4", "5"],
    [["1", "2"], Image("3"), None, "", ["4", "5", None]],
], ids=["at once", "one by one", "mixed, with nothing between"])
def test_outbox_takes_five_replies(platform: SendApiServer, outbox: Outbox, calls: List[Any]) -> None:
    for answers in calls:
        outbox(answers)
    assert contents(platform) == ["1", "2", "3", "4", "5"]
    with pytest.raises(HandlerError, match="takes 5 replies to one message"):
        outbox("6")
    assert len(platform.sent) == 5


def test_outbox_sends_nothing_of_what_is_too_much(platform: SendApiServer, outbox: Outbox) -> None:
    outbox("one")
    with pytest.raises(HandlerError):
        outbox(["2", "3", "4", "5", "6"])
    outbox(["2", "3", "4", "5"])
    assert contents(platform) == ["one", "2", "3", "4", "5"]


def test_outbox_sends_nothing_behind_what_failed(platform: SendApiServer, outbox: Outbox) -> None:
    platform.send_troubles.append(refuses(90002, "no permission"))
    with pytest.raises(ApiError):
        outbox(["one", "two"])
    assert platform.send_requests == 1


def test_outbox_without_credentials_tells_each_reply_and_not_its_text(caplog: pytest.LogCaptureFixture) -> None:
    message = Message({"FromUserName": "user"})
    message.key = "app/user/text/1"
    Outbox(None, message)([TEXT, Image("https://private.example/")])
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert all(line.startswith("reply not sent: key=app/user/text/1") for line in caplog.messages)
    assert "private" not in caplog.text


# ---- The whole circle: KfServer


class ReplyingShop(support.Shop):
    """A shop whose server replies through the platform."""

    def __init__(self, platform: SendApiServer, answers: Dict[str, Any], **settings: Any) -> None:
        super().__init__(answers)
        self._pushed = 0
        self.server = KfServer(self.registry, Settings(
            **{"api_base": platform.base, "app_key": APP_KEY, "app_secret": APP_SECRET, **settings}))

    def __enter__(self) -> ReplyingShop:
        return self

    def __exit__(self, *error: object) -> None:
        self.server.stop()

    def push(self, *texts: str) -> None:
        """Push messages of one user."""
        for text in texts:
            self._pushed += 1
            assert self.server.feed(push(number=self._pushed, content=text)).body == b"success"

    def serve(self, *texts: str) -> None:
        """Push messages and wait until they are settled."""
        self.push(*texts)
        assert self.server.join(PATIENCE)


@pytest.mark.parametrize(("answer", "sent"), [
    (None, []),
    ("hello", ["hello"]),
    (Image(PICTURE), [PICTURE]),
    (["one", Image(PICTURE), "three"], ["one", PICTURE, "three"]),
    (("one", None, "two"), ["one", "two"]),
    (["1", "2", "3", "4", "5"], ["1", "2", "3", "4", "5"]),
], ids=repr)
def test_kf_server_sends_what_a_handler_returns(platform: SendApiServer, answer: Any, sent: List[str]) -> None:
    with ReplyingShop(platform, {"hi": answer}) as shop:
        shop.serve("hi")
    assert (contents(platform), shop.errors) == (sent, [])
    assert {reply.open_id for reply in platform.sent} <= {"user"}


def test_kf_server_keeps_the_order_of_a_senders_replies(platform: SendApiServer) -> None:
    def slowly(message: Message) -> List[str]:
        message.reply("a1")
        message.reply(["a2", "a3"])
        return ["a4", "a5"]
    gate = threading.Event()
    platform.send_troubles.append(held(gate))
    with ReplyingShop(platform, {"a": slowly, "b": ["b1", "b2"], "c": "c1"}) as shop:
        shop.push("a", "b", "c")
        wait_until(lambda: platform.send_requests)
        assert shop.served == ["a"]  # its replies come first
        gate.set()
        assert shop.server.join(PATIENCE)
    assert contents(platform) == ["a1", "a2", "a3", "a4", "a5", "b1", "b2", "c1"]


def test_kf_server_replies_to_different_senders_beside_each_other(platform: SendApiServer) -> None:
    gate = threading.Event()
    platform.send_troubles.extend([held(gate)] * 4)
    with ReplyingShop(platform, {"hi": "hello"}, workers=4) as shop:
        for number in range(4):
            shop.server.feed(push(f"user{number}", content="hi"))
        wait_until(lambda: platform.send_requests == 4)
        gate.set()
        assert shop.server.join(PATIENCE)
    assert {reply.open_id for reply in platform.sent} == {f"user{number}" for number in range(4)}


def replying(*progress: str, end: Any = None) -> Callable[[Message], Any]:
    """A handler that sends replies while it runs, and returns ``end``."""

    def handle(message: Message) -> Any:
        for text in progress:
            message.reply(text)
        return end
    return handle


@pytest.mark.parametrize(("answer", "sent"), [
    pytest.param(["x"] * 6, 0, id="returned"),
    pytest.param(replying("1", "2", "3", end=["4", "5", "6"]), 3, id="returned after replies"),
    pytest.param(replying("1", "2", "3", "4", "5", "6"), 5, id="replies"),
    pytest.param(replying("1", "2", "3", "4", "5", end="6"), 5, id="one returned after five replies"),
])
def test_kf_server_sends_no_sixth_reply(platform: SendApiServer, answer: Any, sent: int) -> None:
    with ReplyingShop(platform, {"hi": answer}) as shop:
        shop.serve("hi")
    assert len(platform.sent) == sent
    assert [type(error) for error in shop.errors] == [HandlerError]
    assert shop.served == ["hi"]


@pytest.mark.parametrize(("trouble", "kind"), [
    (refuses(90001, "out of response count"), ApiError),
    (resets, ReplyError),
    (writes(http_answer(b"[" * 60000)), ReplyError),
], ids=["refused", "reset", "nonsense"])
@pytest.mark.parametrize("answer", ["hello", replying("hello")], ids=["returned", "reply"])
def test_kf_server_runs_no_handler_again_because_a_reply_failed(
        platform: SendApiServer, answer: Any, trouble: Trouble, kind: Type[ReplyError]) -> None:
    platform.send_troubles.append(trouble)
    with ReplyingShop(platform, {"hi": answer, "next": "fine"}) as shop:
        shop.serve("hi", "next")
    assert shop.served == ["hi", "next"]
    assert [isinstance(error, kind) for error in shop.errors] == [True]
    assert contents(platform) == ["fine"]


def test_kf_server_tries_a_reply_again_and_not_its_handler(
        platform: SendApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "RETRY_REPLY_DELAYS", (0.01,))
    platform.token_troubles.extend([resets])
    platform.send_troubles.extend([says({}, 500)])
    with ReplyingShop(platform, {"hi": "hello"}) as shop:
        shop.serve("hi")
    assert (contents(platform), shop.served, shop.errors) == (["hello"], ["hi"], [])


def test_kf_server_on_error_gets_the_api_error(platform: SendApiServer) -> None:
    platform.send_troubles.append(refuses(90002, "no permission"))
    with ReplyingShop(platform, {"hi": "hello"}) as shop:
        shop.serve("hi")
    (error,) = shop.errors
    assert isinstance(error, ApiError)
    assert error.number == "90002"


def test_kf_server_lets_a_handler_go_on_when_a_reply_fails(platform: SendApiServer) -> None:
    def stubborn(message: Message) -> str:
        with pytest.raises(ApiError):
            message.reply("progress")
        return "result"
    platform.send_troubles.append(refuses(3001, "param error"))
    with ReplyingShop(platform, {"hi": stubborn}) as shop:
        shop.serve("hi")
    assert (contents(platform), shop.errors) == (["result"], [])


def test_kf_server_logs_neither_secret_nor_text_of_a_reply_that_failed(
        platform: SendApiServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    platform.send_troubles.append(refuses(3001, chatty("")))
    with ReplyingShop(platform, {"hi": TEXT}) as shop:
        shop.serve("hi")
    assert "message failed for good: key=app/user/text/" in caplog.text
    (token,) = platform.tokens
    assert [secret for secret in (APP_KEY, APP_SECRET, token, TEXT) if secret in caplog.text] == []


def test_kf_server_stop_drains_replies(platform: SendApiServer) -> None:
    gate = threading.Event()
    platform.send_troubles.append(held(gate))
    shop = ReplyingShop(platform, {"hi": ["one", "two"], "more": "three"})
    shop.push("hi", "more")
    wait_until(lambda: platform.send_requests)
    undone: List[List[str]] = []
    stopping = threading.Thread(target=lambda: undone.append(shop.server.stop()))
    stopping.start()
    wait_until(lambda: shop.server.feed(push("late")).status == 503)  # it is shutting down
    gate.set()
    stopping.join(PATIENCE)
    assert (contents(platform), undone) == (["one", "two", "three"], [[]])
    wait_until(lambda: not platform.open)


def test_kf_server_stop_does_not_wait_longer_than_its_grace(platform: SendApiServer) -> None:
    gate = threading.Event()
    platform.send_troubles.append(held(gate))
    shop = ReplyingShop(platform, {"hi": "hello"}, grace=0.0)
    shop.push("hi")
    wait_until(lambda: platform.send_requests)
    assert len(shop.server.stop()) == 1
    gate.set()
    assert shop.server.join(PATIENCE)
    wait_until(lambda: not platform.open)  # the connection that was in use is closed when it is free


def test_kf_server_without_credentials_handles_and_sends_nothing(
        platform: SendApiServer, caplog: pytest.LogCaptureFixture) -> None:
    with ReplyingShop(platform, {"hi": [TEXT, "and more"]}, app_key="", app_secret="") as shop:
        shop.serve("hi")
    assert (shop.served, shop.errors, platform.connections) == (["hi"], [], 0)
    assert [line.split(":")[0] for line in caplog.messages].count("reply not sent") == 2
    assert TEXT not in caplog.text


def test_kf_server_sends_as_a_third_party() -> None:
    with SendApiServer(THIRD_PARTY_SEND_PATH) as platform:
        platform.tokens.add("authorised")
        with ReplyingShop(platform, {"hi": "hello"}, app_key="", app_secret="", access_token="authorised",
                  third_party=True) as shop:
            shop.serve("hi")
        assert (contents(platform), platform.breaches) == (["hello"], [])


# ---- Settings


@pytest.mark.parametrize(("settings", "told"), [
    pytest.param({"app_key": "key"}, "--app-secret", id="a key alone"),
    pytest.param({"app_secret": "secret"}, "--app-key", id="a secret alone"),
    pytest.param({"app_key": "key", "app_secret": "secret", "access_token": "token"}, "--access-token", id="both ways"),
    pytest.param({"third_party": True}, "--access-token", id="third party without a token"),
    pytest.param({"third_party": True, "app_key": "key", "app_secret": "secret"}, "--access-token",
                 id="third party with an app's own key"),
    pytest.param({"user_type": 0}, "--user-type", id="user type 0"),
    pytest.param({"user_type": 3}, "--user-type", id="user type 3"),
    pytest.param({"user_type": "2"}, "--user-type", id="user type as text"),
    *(pytest.param({"api_base": base}, "--api-base", id=repr(base)) for base in [
        "", "openapi.baidu.com", "ftp://openapi.baidu.com", "https://", "https:///path", "https://host/?query=1",
        "https://host/#part", "https://two words", "https://host:port", "https://host:65536", "https://[::1",
        "https://user:password@host",
    ]),
])
def test_settings_refuses_what_makes_no_sense(settings: Dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)) as caught:
        Settings(**settings)
    assert not re.search("'(key|secret|token)'", str(caught.value))


@pytest.mark.parametrize("base", [
    "https://openapi.baidu.com", "https://openapi.baidu.com/", "http://127.0.0.1:8000", "http://[::1]:8000/proxy",
])
def test_settings_takes_an_api_base(base: str) -> None:
    assert Settings(api_base=base).api_base == base


# ---- Command line


HANDLERS = """
from kfserver import HandlerRegistry

registry = HandlerRegistry()

@registry.on("text")
def echo(message):
    return message.content
"""


def run_program(folder: pathlib.Path, *options: str) -> str:
    """Run kfserver with the handlers above, and push three texts of one user; all that it has printed and logged."""
    (folder / "handlers.py").write_text(HANDLERS, encoding="utf-8")
    with Program(*options, folder=folder) as program:
        for number, text in enumerate(["one", "two", TEXT]):
            program.push(number, text)
        assert program.end() == 0
        return program.output


def test_command_line_sends_what_handlers_return(platform: SendApiServer, tmp_path: pathlib.Path) -> None:
    output = run_program(tmp_path, "--api-base", platform.base, "--app-key", APP_KEY, "--app-secret", APP_SECRET)
    assert (contents(platform), platform.token_requests) == (["one", "two", TEXT], 1)
    assert [secret for secret in (APP_KEY, APP_SECRET, *platform.tokens, TEXT) if secret in output] == []


def test_command_line_says_once_that_credentials_are_missing(tmp_path: pathlib.Path) -> None:
    output = run_program(tmp_path)
    assert output.count("no --app-key is set") == 1
    assert output.count("reply not sent") == 3
    assert TEXT not in output
