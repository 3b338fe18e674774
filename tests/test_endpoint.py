"""The endpoint: every answer that the outside can see, the answers table row by row, without a socket or a sleep."""

from __future__ import annotations

import base64
import json
import logging
import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Tuple, Type
from urllib.parse import parse_qsl, quote_from_bytes, urlencode

import pytest
from conftest import NOW, TOKEN, World, signed_query
from support import PUBLISHED, PUSHES, push, receiver
from support import post as http_post

import kfserver
from kfserver import (
    TELL_SECONDS,
    MAX_DEPTH,
    MAX_HANDSHAKE,
    BeingTaken,
    Busy,
    Endpoint,
    Envelope,
    HandlerRegistry,
    KfServer,
    MalformedPush,
    Message,
    PushError,
    Request,
    Settings,
    decode_aes_key,
    dedup_key,
    encode_json,
    encode_xml,
    make_cipher,
    parse,
    sign,
)

BODY = push()
SEALED = PUBLISHED["encrypted"][0]
SAFE = {"token": SEALED["token"], "aes_key": SEALED["encoding_aes_key"], "app_id": SEALED["app_id"]}


def post(body: bytes = BODY, query: str = "") -> Request:
    """A push as it comes from the HTTP server."""
    return Request("POST", "/", query, body)


def signed(body: bytes = BODY, **values: Any) -> Request:
    """A push with a valid signature under `TOKEN`, but for what ``values`` of `signed_query` change."""
    return post(body, signed_query(values.pop("token", TOKEN), **values))


def sealed_query(encrypt: str, token: str = SAFE["token"], timestamp: object = NOW) -> str:
    """A query with a valid message signature over ``encrypt``."""
    signature = sign(token, str(timestamp), "nonce", encrypt)
    return urlencode({"msg_signature": signature, "timestamp": timestamp, "nonce": "nonce"})


def seal(plain: bytes = BODY, **changed: str) -> str:
    """What Encrypt holds for a message, under the published key and app id but for what is ``changed``."""
    made = {**SAFE, **changed}
    return Envelope(made["aes_key"], made["app_id"]).seal(plain, bytes(16))


# Bytes of padding that `envelope` leaves room for.
PADDING = 12


def envelope(padding: bytes) -> bytes:
    """The plaintext of an envelope with such a padding, which need not be what it should be."""
    app_id: bytes = SAFE["app_id"].encode()
    message = BODY.ljust(256 - PADDING - len(app_id) - 16 - 4)
    return bytes(16) + len(message).to_bytes(4, "big") + message + app_id + padding


def encrypt_raw(plaintext: bytes) -> str:
    """What Encrypt holds when the plaintext is just these bytes, whether they are an envelope or not."""
    return base64.b64encode(make_cipher(decode_aes_key(SAFE["aes_key"])).encrypt(plaintext)).decode()


def sealed(encrypt: str, **values: Any) -> Request:
    """An encrypted push with a valid message signature, but for what ``values`` of `sealed_query` change."""
    return post(json.dumps({"ToUserName": "app", "Encrypt": encrypt}).encode(), sealed_query(encrypt, **values))


ENCRYPT = seal()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[int], List[str]]:
    """What was logged at a level, in order."""
    caplog.set_level(logging.DEBUG, "kfserver")
    return lambda level: [record.getMessage() for record in caplog.records if record.levelno == level]


Lines = Callable[[int], List[str]]


# ---- The answers table


class Row(NamedTuple):
    """One row of the answers table: the server's settings, a request to it, what it answers and what it hands over."""

    settings: Dict[str, Any]
    request: Request
    status: int
    body: bytes
    runs: int


SIGNED: Dict[str, Any] = {"token": TOKEN}
AGED: Dict[str, Any] = {"token": TOKEN, "max_age": 300}
PLAIN_TOO: Dict[str, Any] = {**SAFE, "compatible": True}
UP = b"kfserver is up: pushes go here by POST\n"


def good(settings: Dict[str, Any], request: Request) -> Row:
    """A push that is accepted."""
    return Row(settings, request, 200, b"success", 1)


def forbidden(settings: Dict[str, Any], request: Request) -> Row:
    """A push that is refused with the one text that teaches nothing."""
    return Row(settings, request, 403, b"forbidden\n", 0)


def malformed(body: bytes) -> Row:
    """A push that is refused, and told why."""
    return Row({}, post(body), 400, b"", 0)


HANDSHAKE = urlencode({"signature": sign(TOKEN, "1", "2"), "timestamp": "1", "nonce": "2",
    "echoStr": "4375120948345356249"})

TABLE: Dict[str, Row] = {
    "good": good({}, post()),
    "good: signed": good(SIGNED, signed()),
    "good: unsigned, as is allowed": good({**SIGNED, "allow_unsigned": True}, post()),
    "good: signed, though unsigned is allowed": good({**SIGNED, "allow_unsigned": True}, signed()),
    "good: signature of no concern without a token": good({}, post(query="signature=wrong")),
    "good: encrypted": good(SAFE, sealed(seal())),
    "good: encrypted, in compatible mode": good(PLAIN_TOO, sealed(seal())),
    "good: not encrypted, in compatible mode": good(PLAIN_TOO, signed(token=SAFE["token"])),
    "good: compatible mode's plain fields, no key set": good(
        {"token": SAFE["token"]}, signed(b'{"MsgType": "text", "Encrypt": "AAAA"}', token=SAFE["token"])),
    "good: on the one path": good({"path": "/kf"}, Request("POST", "/kf", "", BODY)),
    "good: of just the size that is allowed": good({"max_body": len(BODY)}, post()),
    "handshake": Row(SIGNED, post(b"", HANDSHAKE), 200, b"4375120948345356249", 0),
    "GET without a handshake": Row(SIGNED, Request("GET", "/"), 200, UP, 0),
    "HEAD without a handshake": Row({}, Request("HEAD", "/"), 200, UP, 0),
    "signature missing": forbidden(SIGNED, post()),
    "signature empty": forbidden(SIGNED, post(query="signature=&timestamp=1&nonce=2")),
    "signature empty, though unsigned is allowed": forbidden({**SIGNED, "allow_unsigned": True},
        post(query="signature=")),
    "signature wrong": forbidden(SIGNED, signed(token="other")),
    "signature wrong, though unsigned is allowed": forbidden({**SIGNED, "allow_unsigned": True}, signed(token="other")),
    "signature stale": forbidden(AGED, signed(timestamp=NOW - 301)),
    "signature of the future": forbidden(AGED, signed(timestamp=NOW + 301)),
    "handshake's signature missing": forbidden(SIGNED, post(b"", "echoStr=1")),
    "handshake's signature wrong": forbidden(SIGNED, post(b"", HANDSHAKE.replace("nonce=2", "nonce=3"))),
    "handshake's signature stale": forbidden(AGED, post(b"", HANDSHAKE)),
    "not encrypted though a key is set": forbidden(SAFE, signed(token=SAFE["token"])),
    "not encrypted nor signed though a key is set": forbidden(SAFE, post()),
    "not encrypted nor signed, in compatible mode": forbidden(PLAIN_TOO, post()),
    "encrypted though no key is set": forbidden({"token": SAFE["token"]}, sealed(seal())),
    "wrong key": forbidden(SAFE, sealed(seal(aes_key="B" * 43))),
    "wrong app id": forbidden(SAFE, sealed(seal(app_id="other"))),
    "good: encrypted by hand": good(SAFE, sealed(encrypt_raw(envelope(bytes([PADDING]) * PADDING)))),
    "padding of 0": forbidden(SAFE, sealed(encrypt_raw(envelope(bytes(PADDING))))),
    "padding of more than 32": forbidden(SAFE, sealed(encrypt_raw(envelope(bytes([PADDING + 32]) * (PADDING + 32))))),
    "padding of more than there is": forbidden(SAFE, sealed(encrypt_raw(b"\x20" * 16))),
    "padding of different bytes": forbidden(SAFE, sealed(encrypt_raw(envelope(bytes(PADDING - 1) + bytes([PADDING]))))),
    "length beyond the end": forbidden(SAFE, sealed(encrypt_raw(b"\xff" * 31 + b"\x01"))),
    "no room for a length": forbidden(SAFE, sealed(encrypt_raw(bytes(15) + b"\x01"))),
    "half a block": forbidden(SAFE, sealed("AAAA")),
    "no base64": forbidden(SAFE, sealed("é*")),
    "base64 with something between": forbidden(SAFE, sealed("*" + seal())),
    "nothing encrypted": forbidden(SAFE, sealed("")),
    "message signature missing": forbidden(SAFE, post(sealed(seal()).body)),
    "message signature wrong": forbidden(SAFE, sealed(seal(), token="other")),
    "message signature of another message": forbidden(SAFE, sealed(seal())._replace(query=sealed_query("AAAA"))),
    "message signature stale": forbidden({**SAFE, "max_age": 300}, sealed(seal(), timestamp=NOW - 301)),
    "signature in place of a message signature": forbidden(SAFE, signed(sealed(seal()).body, token=SAFE["token"])),
    "empty": malformed(b""),
    "not XML or JSON": malformed(b"Content=hi"),
    "not an object": malformed(b"[]"),
    "DOCTYPE": malformed(b"<!DOCTYPE xml><xml/>"),
    "too deep": malformed(b'{"a":' * (MAX_DEPTH + 2) + b"1" + b"}" * (MAX_DEPTH + 2)),
    "too large": Row({"max_body": len(BODY) - 1}, post(), 413, b"more than %d bytes\n" % (len(BODY) - 1), 0),
    "other method": Row({}, Request("PUT", "/", "", BODY), 405, b"pushes come by POST\n", 0),
    "method in lower case": Row({}, Request("post", "/", "", BODY), 405, b"pushes come by POST\n", 0),
    "other path": Row({"path": "/kf"}, Request("POST", "/", "", BODY), 404, b"no such path\n", 0),
    "path below the one": Row({"path": "/kf"}, Request("POST", "/kf/", "", BODY), 404, b"no such path\n", 0),
    "other path, by GET": Row({"path": "/kf"}, Request("GET", "/"), 404, b"no such path\n", 0),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_handle_answers_as_the_table_says(row: Row) -> None:
    world = World(**row.settings)
    response = world.ask(row.request)
    assert (response.status, len(world.submitted)) == (row.status, row.runs)
    assert response.body == row.body or (row.status == 400 and len(response.body) > 1)


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_handle_claims_only_what_it_hands_over(row: Row) -> None:
    world = World(**row.settings)
    world.ask(row.request)
    assert len(world.claims) == row.runs


def test_handle_refusals_for_lack_of_proof_do_not_differ() -> None:
    rows = [row for row in TABLE.values() if row.status == 403]
    assert len({World(**row.settings).ask(row.request)[:2] for row in rows}) == 1


def test_handle_names_the_methods_that_are_served() -> None:
    assert ("Allow", "GET, HEAD, POST") in World().ask(Request("DELETE", "/")).headers


@pytest.mark.parametrize("body", PUSHES.values(), ids=PUSHES.keys())
def test_handle_takes_every_published_push(world: World, body: bytes) -> None:
    assert world.push(body)[:2] == (200, b"success")
    assert world.submitted == [parse(body)]


# ---- The same again


@pytest.mark.parametrize("state", ["queued", "done"])
def test_handle_answers_success_to_a_repeat_and_runs_nothing(world: World, state: str) -> None:
    world.push(BODY)
    if state == "done":
        world.claims.finish(world.submitted[0].key)
    assert [world.push(BODY)[:2] for _ in range(3)] == [(200, b"success")] * 3
    assert len(world.submitted) == 1


def test_handle_knows_a_repeat_in_another_signature_and_layout() -> None:
    world = World(token=TOKEN)
    world.ask(signed(PUSHES["text, XML"], timestamp=NOW))
    response = world.ask(signed(PUSHES["text, JSON"], timestamp=NOW + 1))
    assert (response.outcome, len(world.submitted)) == ("repeat", 1)


def test_handle_is_busy_while_the_first_of_two_is_being_taken(world: World) -> None:
    world.claims.claim(dedup_key(parse(BODY)))
    assert world.push(BODY).status == 503
    assert world.submitted == []


def test_handle_takes_more_messages_than_are_remembered_once_they_are_done() -> None:
    world = World(dedup_size=1)
    outcomes = [world.push(push(number=number)).outcome for number in (1, 2, 1, 2)]
    assert outcomes == ["accepted", "accepted", "repeat", "repeat"]


def test_handle_takes_a_message_again_that_failed_for_good(world: World) -> None:
    world.push(BODY)
    world.claims.release(world.submitted[0].key)
    assert world.push(BODY).outcome == "accepted"
    assert len(world.submitted) == 2


def test_handle_gives_the_message_its_key(world: World) -> None:
    world.push(BODY)
    assert world.submitted[0].key == dedup_key(parse(BODY)) == "app/user/text/1"


def test_handle_asks_the_given_dedup_key() -> None:
    server = KfServer(HandlerRegistry(), dedup_key=lambda message: message.from_user_name)
    assert [server.endpoint.handle(post(push(number=number))).outcome for number in (1, 2)] == ["accepted", "repeat"]


# ---- Queue full, or shutting down


@pytest.mark.parametrize("when", ["full", "unsafe"])
@pytest.mark.parametrize("reason", ["the queue is full", "shutting down"])
def test_handle_answers_503_and_leaves_no_claim_so_that_a_retry_is_accepted(
        world: World, reason: str, when: str) -> None:
    setattr(world, when, Busy(reason))
    response = world.push(BODY)
    assert (response.status, response.body) == (503, reason.encode() + b"\n")
    assert ("Retry-After", "1") in response.headers
    setattr(world, when, None)
    assert world.push(BODY).outcome == "accepted"


def test_handle_answers_success_to_what_another_instance_has_had(world: World) -> None:
    world.elsewhere = True
    assert world.push(BODY)[:3] == (200, b"success", "repeat")
    assert world.submitted == []


# ---- Errors that nobody foresaw


FAILED = (500, b"an error inside kfserver\n", "refused 500: an error inside kfserver", ())


@pytest.mark.parametrize("when", ["full", "unsafe"])
@pytest.mark.parametrize("error", [ZeroDivisionError, MemoryError, RecursionError, SystemExit, GeneratorExit])
def test_handle_answers_500_when_a_bug_stops_it_and_leaves_no_claim(
        lines: Lines, world: World, when: str, error: Type[BaseException]) -> None:
    setattr(world, when, error("s3cret"))
    assert world.push(BODY) == FAILED
    assert len(world.claims) == 0
    told, = lines(logging.ERROR)
    assert "s3cret" not in told
    setattr(world, when, None)
    assert world.push(BODY).outcome == "accepted"


def fail_for(message: Message) -> str:
    """A key for every message but the second."""
    if message.msg_id == "2":
        raise ZeroDivisionError
    return dedup_key(message)


def test_handle_all_answers_500_to_one_and_the_others_go_on(
        lines: Lines, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conftest.dedup_key", fail_for)
    answers = world.endpoint.handle_all([post(push(number=number)) for number in (1, 2, 3, 2)])
    assert [answer.status for answer in answers] == [200, 500, 200, 500]
    assert [message.msg_id for message in world.submitted] == ["1", "3"]
    assert len(world.claims) == 2
    assert len(lines(logging.ERROR)) == 1


def test_handle_tells_of_one_kind_of_error_once_a_minute_with_a_count(lines: Lines, world: World) -> None:
    world.full = ZeroDivisionError("s3cret")
    for _ in range(30):
        world.push(BODY)
    assert len(lines(logging.ERROR)) == 1
    world.timer += TELL_SECONDS
    world.push(BODY)
    assert "(29 more like this since the last such line)" in lines(logging.ERROR)[1]


PATHS = {
    # what --path says, what a request's path is, whether they are one
    "equal": ("/kf", "/kf", True), "other": ("/kf", "/kg", False), "longer": ("/kf", "/kf/", False),
    "a space": ("/kf%20x", "/kf%20x", True), "encoded by the client": ("/kf", "/%6bf", True),
    "encoded by WSGI": ("/a!b", "/a%21b", True), "lower-case digits": ("/%E5%AE%A2", "/%e5%ae%a2", True),
    "bytes as they are": ("/%E5%AE%A2", "/\xe5\xae\xa2", True), "other bytes": ("/%ff", "/%fe", False),
    "encoded twice": ("/kf%20x", "/kf%2520x", False), "a plus is no space": ("/kf%20x", "/kf+x", False),
}


@pytest.mark.parametrize("path, came, is_one", PATHS.values(), ids=PATHS.keys())
def test_handle_compares_paths_decoded(path: str, came: str, is_one: bool) -> None:
    assert World(path=path).ask(Request("POST", came, "", BODY)).status == (200 if is_one else 404)


@pytest.mark.parametrize("path, info", [("/kf", "/kf"), ("/kf%20x", "/kf x"), ("/a!b", "/a!b"),
                                        ("/%e5%ae%a2", "/\xe5\xae\xa2")])
def test_wsgi_application_serves_the_path_that_its_server_has_decoded(path: str, info: str) -> None:
    server, statuses = KfServer(HandlerRegistry(), Settings(path=path)), []
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": info}
    list(server.wsgi(environ, lambda status, headers: statuses.append(status)))
    assert statuses == ["200 OK"]
    server.stop()


def test_handle_all_answers_500_to_all_whose_delivery_fails_and_logs_it_once(lines: Lines, world: World) -> None:
    world.unsafe = ZeroDivisionError()
    requests = [post(), post(push(number=2)), Request("GET", "/"), post(b""), post(b"", "echoStr=1")]
    assert [answer.status for answer in world.endpoint.handle_all(requests)] == [500, 500, 200, 400, 200]
    assert len(lines(logging.ERROR)) == 1


def test_handle_all_refuses_each_of_a_round_for_a_reason_of_its_own(world: World) -> None:
    outcomes = [True, Busy("the journal cannot be written"), False, BeingTaken("elsewhere"), True]
    world.deliver = lambda taken: outcomes  # type: ignore
    answers = world.endpoint.handle_all([post(push(number=number)) for number in range(1, 6)])
    assert [answer.outcome for answer in answers] == [
        "accepted", "refused 503: the journal cannot be written", "repeat", "refused 503: elsewhere", "accepted"]


@pytest.mark.parametrize("request_, outcome", [
    (post(), "accepted"), (post(b""), "refused 400: the body is empty"), (post(b"", "echoStr=1"), "handshake")],
    ids=["push", "refusal", "handshake"])
def test_handle_keeps_its_answer_when_it_cannot_be_counted(
        lines: Lines, world: World, request_: Request, outcome: str) -> None:
    world.observe = lambda *told: 1 // 0  # type: ignore
    assert [answer.outcome for answer in world.endpoint.handle_all([request_, Request("PUT", "/")])] == [
        outcome, "refused 405: pushes come by POST"]
    assert len(lines(logging.ERROR)) == 1


def test_handle_keeps_its_answer_when_it_cannot_be_logged(world: World) -> None:
    def fail(record: logging.LogRecord) -> bool:
        raise ZeroDivisionError
    log = logging.getLogger("kfserver")
    log.addFilter(fail)
    try:
        answers = world.endpoint.handle_all([post(), Request("PUT", "/"), post(b"", "echoStr=1"), sealed(ENCRYPT)])
        world.unsafe = ZeroDivisionError()
        answers.append(world.push(push(number=2)))
    finally:
        log.removeFilter(fail)
    assert [answer.status for answer in answers] == [200, 405, 200, 403, 500]


def test_handle_all_gives_back_what_it_took_when_it_is_interrupted(world: World) -> None:
    world.endpoint.handle(post(push(number=1)))

    def take(message: Message) -> bool:
        if message.msg_id == "3":
            raise KeyboardInterrupt
        return World.take(world, message)
    world.take = take  # type: ignore
    with pytest.raises(KeyboardInterrupt):
        world.endpoint.handle_all([post(push(number=number)) for number in (1, 2, 3)])
    assert len(world.claims) == 1


def test_push_server_answers_500_over_http_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "parse", lambda payload: fail_for(parse(payload)) and parse(payload))
    with receiver() as running:
        client = running.connect()
        assert [client.ask(http_post(push(number=number))).status for number in (1, 2, 3)] == [200, 500, 200]


# ---- Characters


ODD_TEXTS: Dict[str, Tuple[bytes, str]] = {
    "half a surrogate pair": (b'{"MsgId": 1, "Content": "a\\ud83d"}', "a\ufffd"),
    "bytes that are not UTF-8, JSON": (b'{"MsgId": 1, "Content": "\xff\xfe"}', "\ufffd\ufffd"),
    "bytes that are not UTF-8, XML": (b"<xml><MsgId>1</MsgId><Content>a\xe4\xbd</Content></xml>", "a\ufffd"),
}


@pytest.mark.parametrize("body, content", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
@pytest.mark.parametrize("settings, wrap", [
    (SIGNED, signed), (SAFE, lambda body: sealed(seal(body))), (PLAIN_TOO, lambda body: sealed(seal(body))),
    (PLAIN_TOO, lambda body: signed(body, token=SAFE["token"])), ({**SIGNED, "allow_unsigned": True}, signed)],
    ids=["signed", "safe", "compatible, sealed", "compatible, plain", "signed, though it need not be"])
def test_handle_refuses_no_proven_message_for_a_character(
        settings: Dict[str, Any], wrap: Callable[[bytes], Request], body: bytes, content: str) -> None:
    world, payloads = World(**settings), []
    deliver = world.deliver
    world.deliver = lambda taken: [payloads.append(payload) for _, payload in taken] and deliver(taken)  # type: ignore
    assert world.ask(wrap(body)).outcome == "accepted"
    assert [message.content for message in world.submitted] == [content]
    assert [parse(payload) for payload in payloads] == world.submitted, "what the journal gets must be readable"


@pytest.mark.parametrize("body", [body for body, _ in ODD_TEXTS.values()], ids=ODD_TEXTS.keys())
@pytest.mark.parametrize("settings, query", [
    ({}, ""), ({}, signed_query(TOKEN)), ({**SIGNED, "allow_unsigned": True}, "")],
    ids=["open", "no token", "unsigned"])
def test_handle_wants_every_character_of_what_is_not_proven(settings: Dict[str, Any], query: str, body: bytes) -> None:
    world = World(**settings)
    assert world.push(body, query).status == 400
    assert world.unreadable == []


@pytest.mark.parametrize("encrypt", [ENCRYPT + "\udcff", ENCRYPT[:-4] + "\udcff\udcff" + ENCRYPT[-2:]],
    ids=["after", "inside"])
def test_handle_wants_every_character_of_an_envelope(encrypt: str) -> None:
    body = b'{"Encrypt": "%s"}' % encrypt.encode("utf-8", "surrogateescape")
    for signed_text in (encrypt.replace("\udcff", "\ufffd"), encrypt.replace("\udcff", "")):
        assert World(**SAFE).push(body, sealed_query(signed_text)).status == 403


# ---- Proven, and unreadable


@pytest.mark.parametrize("payload, reason", [
    (b"<xml><Content>cut o", "not XML"), (b'{"Content": "cut o', "not JSON"), (b"hello", "neither"),
    (b"\xff", "neither"),
    (b"<xml><Content><![CDATA[a]]>b]]></Content></xml>", "has not escaped ]]>"), (b'{"a":' * 40, "nested")], ids=ascii)
@pytest.mark.parametrize("settings, wrap", [
    (SIGNED, signed), (SAFE, lambda body: sealed(seal(body)))], ids=["signed", "sealed"])
def test_handle_keeps_what_is_proven_and_cannot_be_read(
        settings: Dict[str, Any], wrap: Callable[[bytes], Request], payload: bytes, reason: str) -> None:
    world = World(**settings)
    answer = world.ask(wrap(payload))
    assert answer.status == 400
    (kept, why), = world.unreadable
    assert kept == payload
    assert reason in why
    assert why.encode() + b"\n" == answer.body


@pytest.mark.parametrize("settings, request_", [
    ({}, post(b"hello")), ({**SIGNED, "allow_unsigned": True}, post(b"hello")), (SIGNED, post(b"hello")),
    (SIGNED, signed(b"hello", token="other")), (SIGNED, signed(b"")), (SIGNED, signed()), (SAFE, sealed("AAAA"))],
    ids=["open", "unsigned", "no signature", "wrong signature", "empty", "good", "no envelope"])
def test_handle_keeps_nothing_else(settings: Dict[str, Any], request_: Request) -> None:
    world = World(**settings)
    world.ask(request_)
    assert world.unreadable == []


# ---- Several at once


def test_handle_all_answers_in_order() -> None:
    world = World(token=TOKEN)
    requests = [signed(), Request("GET", "/"), post(), signed(b"hello"), Request("PUT", "/"), post(b"", HANDSHAKE)]
    assert [each.status for each in world.endpoint.handle_all(requests)] == [200, 200, 403, 400, 405, 200]
    assert len(world.submitted) == 1


def test_handle_all_runs_a_message_once_that_comes_twice(world: World) -> None:
    statuses = [each.status for each in world.endpoint.handle_all([post()] * 3)]
    assert statuses[0] == 200
    assert set(statuses[1:]) <= {200, 503}
    assert len(world.submitted) == 1


def test_handle_all_hands_everything_over_before_it_waits_for_any() -> None:
    world, counts = World(), []
    deliver = world.deliver
    world.deliver = lambda taken: counts.append(len(taken)) or deliver(taken)  # type: ignore
    world.endpoint.handle_all([post(push(number=number)) for number in (1, 2, 3)])
    assert counts == [3]


def test_handle_all_of_nothing_is_nothing(world: World) -> None:
    assert world.endpoint.handle_all([]) == []


def test_handle_hands_over_the_bytes_of_the_message_decrypted() -> None:
    world, payloads = World(**SAFE), []
    world.deliver = lambda taken: payloads.extend(payload for _, payload in taken) or [True]  # type: ignore
    assert world.ask(sealed(seal())).status == 200
    assert payloads == [BODY]


# ---- Handshake


VECTOR = PUBLISHED["signatures"][0]
PROOF = {name: VECTOR[name] for name in ("signature", "timestamp", "nonce")}
ECHO = {"echoStr": VECTOR["echostr"]}

def multipart(values: Mapping[str, str], header: str = "") -> bytes:
    """The values as multipart/form-data, as browsers and HTTP libraries write it."""
    parts = "".join(f'--X1\r\nContent-Disposition: form-data; name="{name}"{header}\r\n\r\n{value}\r\n'
                    for name, value in values.items())
    return f"{parts}--X1--\r\n".encode()


HANDSHAKES: Dict[str, Request] = {
    "POST, query": Request("POST", "/", urlencode({**PROOF, **ECHO})),
    "GET, query": Request("GET", "/", urlencode({**PROOF, **ECHO})),
    "HEAD, query": Request("HEAD", "/", urlencode({**PROOF, **ECHO})),
    "POST, form": Request("POST", "/", "", urlencode({**PROOF, **ECHO}).encode()),
    "POST, form, newline after it": Request("POST", "/", "", urlencode({**PROOF, **ECHO}).encode() + b"\r\n"),
    "POST, echo first": Request("POST", "/", urlencode({**ECHO, **PROOF})),
    "POST, small name": Request("POST", "/", urlencode({**PROOF, "echostr": VECTOR["echostr"]})),
    "POST, small name, form": Request("POST", "/", "", urlencode({**PROOF, "echostr": VECTOR["echostr"]}).encode()),
    "POST, query and form": Request("POST", "/", urlencode(PROOF), urlencode(ECHO).encode()),
    "POST, other values beside": Request("POST", "/", urlencode({"a": "", **PROOF, **ECHO, "b": "é"})),
    "POST, query, with a push for a body": Request("POST", "/", urlencode({**PROOF, **ECHO}), BODY),
    "POST, signature in upper case": Request(
        "POST", "/", urlencode({**PROOF, **ECHO, "signature": PROOF["signature"].upper()})),
    "POST, JSON": post(json.dumps({**PROOF, **ECHO}).encode()),
    "POST, JSON, numbers": post(re.sub(r'"(\d+)"', r"\1", json.dumps({**PROOF, **ECHO})).encode()),
    "POST, JSON, small name": post(json.dumps({**PROOF, "echostr": VECTOR["echostr"]}).encode()),
    "POST, JSON after a BOM": post(b"\xef\xbb\xbf" + json.dumps({**PROOF, **ECHO}).encode()),
    "POST, JSON, other values beside": post(json.dumps({**PROOF, **ECHO, "appId": 1, "more": {"a": []}}).encode()),
    "POST, query and JSON": Request("POST", "/", urlencode(PROOF), json.dumps(ECHO).encode()),
    "POST, XML": post(encode_xml({**PROOF, **ECHO})),
    "POST, XML, numbers, with a declaration": post(b'<?xml version="1.0" encoding="UTF-8"?>' + encode_xml(
        {name: int(value) if value.isdecimal() else value for name, value in {**PROOF, **ECHO}.items()})),
    "POST, query and XML": Request("POST", "/", urlencode(PROOF), encode_xml(ECHO)),
    "POST, multipart": post(multipart({**PROOF, **ECHO})),
    "POST, multipart, headers beside": post(
        multipart({**PROOF, **ECHO}, "\r\nContent-Type: text/plain; charset=UTF-8")),
    "POST, multipart, newline before it": post(b"\r\n" + multipart({**PROOF, **ECHO})),
    "POST, multipart without an end": post(multipart({**PROOF, **ECHO, "more": ""})[:-8]),
    "POST, query and multipart": Request("POST", "/", urlencode(PROOF), multipart(ECHO)),
}


@pytest.mark.parametrize("request_", HANDSHAKES.values(), ids=HANDSHAKES.keys())
def test_handle_handshake_comes_in_many_ways(request_: Request) -> None:
    world = World(token=VECTOR["token"])
    assert world.ask(request_)[:3] == (200, VECTOR["echostr"].encode(), "handshake")
    assert world.submitted == []


@pytest.mark.parametrize("request_", HANDSHAKES.values(), ids=HANDSHAKES.keys())
def test_handle_handshake_must_be_proven_wherever_it_comes(request_: Request) -> None:
    assert World(token="other").ask(request_)[:2] == (403, b"forbidden\n")


SAFE_PROOF = dict(parse_qsl(signed_query(SAFE["token"])))


@pytest.mark.parametrize("settings", [SAFE, PLAIN_TOO], ids=["safe mode", "compatible mode"])
@pytest.mark.parametrize("write", [
    lambda values: post(b"", urlencode(values)), lambda values: post(urlencode(values).encode()),
    lambda values: post(json.dumps(values).encode()), lambda values: post(encode_xml(values)),
    lambda values: post(multipart(values))], ids=["query", "form", "JSON", "XML", "multipart"])
def test_handle_handshake_is_plain_in_every_mode(
        settings: Dict[str, Any], write: Callable[[Dict[str, str]], Request]) -> None:
    world = World(**settings)
    assert world.ask(write({**SAFE_PROOF, "echoStr": "123"}))[:2] == (200, b"123")
    assert world.ask(write({**SAFE_PROOF, "signature": sign("other", "1", "2"), "echoStr": "123"})).status == 403


@pytest.mark.parametrize("name", ["echoStr", "echostr", "signature", "timestamp"])
def test_handle_never_takes_a_sealed_push_for_a_handshake(name: str) -> None:
    world = World(**SAFE)
    assert world.ask(sealed(ENCRYPT)._replace(body=json.dumps({"Encrypt": ENCRYPT, name: "1"}).encode())).status == 200
    assert world.submitted == [parse(BODY)]
    body = json.dumps({"Encrypt": ENCRYPT, **SAFE_PROOF, "echoStr": "1"}).encode()
    assert World(**SAFE).push(body).status == 403, "a handshake's signature proves no envelope"


MESSAGES = [{"MsgType": "text"}, {"MsgType": ""}, {"event": "AUTHORIZED"}, {"Event": "x"}, {"MsgId": 1, "Content": "x"},
            {"FromUserName": "user"}, {"MsgType": {"a": "b"}}]


@pytest.mark.parametrize("fields", MESSAGES, ids=str)
def test_handle_never_takes_a_message_for_a_handshake(world: World, fields: Dict[str, Any]) -> None:
    assert world.push(json.dumps({**fields, "echoStr": "1"}).encode()).outcome == "accepted"
    assert len(world.submitted) == 1


@pytest.mark.parametrize("content", ["echoStr", "&echoStr=1&", '"echoStr": "1"', "<echoStr>1</echoStr>",
                                     '--X1\n\nContent-Disposition: form-data; name="echoStr"\n\n1'])
@pytest.mark.parametrize("write", [encode_xml, encode_json])
def test_handle_lets_users_write_of_handshakes(
        world: World, write: Callable[[Dict[str, str]], bytes], content: str) -> None:
    assert world.push(write({"MsgType": "text", "Content": content})).outcome == "accepted"
    assert [message.content for message in world.submitted] == [content]


@pytest.mark.parametrize("value", ["", " a b ", "\n1\n", "é你", "<&>]]>", "0", "\x1d"], ids=ascii)
@pytest.mark.parametrize("write", [encode_xml, encode_json, multipart])
def test_handle_handshake_in_a_body_echoes_to_the_letter(
        world: World, write: Callable[[Dict[str, str]], bytes], value: str) -> None:
    assert world.push(write({"echoStr": value}))[:3] == (200, value.encode(), "handshake")


@pytest.mark.parametrize("number", ["4375120948345356249", "1.0", "-0", "1e5", "99999999999999999999"])
def test_handle_handshake_echoes_a_number_to_the_digit(world: World, number: str) -> None:
    assert world.push(b'{"echoStr": %s}' % number.encode())[:2] == (200, number.encode())


@pytest.mark.parametrize("body", [
    b'{"echoStr": ["1"]}', b'{"echoStr": {"a": "1"}}', b"<xml><echoStr>1</echoStr><echoStr>2</echoStr></xml>",
    b'{"a": {"echoStr": "1"}}', b"<xml><a><echoStr>1</echoStr></a></xml>", b'{"echoStr": "1"', b'{"echoStr": "\xff"}',
    b"--X1\r\nContent-Disposition: form-data; filename=\"name=echoStr\"\r\n\r\n1\r\n--X1--\r\n", b"--echoStr", b"--",
    b"--X1\r\nX-Content-Disposition: form-data; name=echoStr\r\n\r\n1\r\n--X1--\r\n"], ids=ascii)
def test_handle_takes_no_other_shape_for_a_handshake(world: World, body: bytes) -> None:
    assert world.push(body).outcome != "handshake"


ECHOES = [b"", b"0", b" a b ", b"a+b", b"a&b=c%41", b"<xml>", "é你".encode(), b"\xff\xfe\x80", b"\r\nX: y", b"\x00",
    b"x" * 2000]


@pytest.mark.parametrize("value", ECHOES, ids=lambda value: ascii(value)[:16])
def test_handle_handshake_echoes_byte_for_byte(world: World, value: bytes) -> None:
    pair = f"echoStr={quote_from_bytes(value, safe='')}&timestamp=1"
    assert [world.ask(post(b"", pair)).body, world.ask(post(pair.encode())).body] == [value, value]


def test_handle_handshake_echoes_nothing_among_escaped_values(world: World) -> None:
    assert world.ask(post(b"", "timestamp=%31&echoStr=")).outcome == "handshake"


@pytest.mark.parametrize("value", [b"\xff\xfe", "é".encode(), "é".encode("latin-1")], ids=ascii)
def test_handle_handshake_echoes_bytes_that_were_not_escaped(world: World, value: bytes) -> None:
    # A query reaches us as HTTP servers and WSGI hand it on: one character for each byte.
    assert world.ask(post(b"", "echoStr=" + value.decode("latin-1"))).body == value
    assert world.ask(post(b"timestamp=1&echoStr=" + value)).body == value


NO_HANDSHAKES: Dict[str, Tuple[bytes, int]] = {
    "JSON that quotes one": (b'{"Content": "&echoStr=1&"}', 200),
    "JSON that quotes one after a BOM": (b'\xef\xbb\xbf{"Content": "&echoStr=1&"}', 200),
    "JSON that quotes one after blanks": (b' \r\n{"Content": "&echoStr=1&"}', 200),
    "another name": (b"echo=1", 400),
    "name in capitals": (b"ECHOSTR=1", 400),
    "longer than a handshake": (b"echoStr=" + b"1" * MAX_HANDSHAKE, 400),
    "JSON, longer than a handshake": (b'{"echoStr": "' + b"1" * MAX_HANDSHAKE + b'"}', 200),
    "multipart, longer than a handshake": (multipart({"echoStr": "1" * MAX_HANDSHAKE}), 400),
}


@pytest.mark.parametrize("body, status", NO_HANDSHAKES.values(), ids=NO_HANDSHAKES.keys())
def test_handle_takes_nothing_else_for_a_handshake(world: World, body: bytes, status: int) -> None:
    response = world.push(body)
    assert (response.status, response.outcome == "handshake") == (status, False)


# ---- Signatures in odd queries


ODD_QUERIES = ["signature", "signature&timestamp&nonce", "=", "&&&", "signature=é", "signature=%C3%A9&timestamp=%FF",
               "signature=%ED%A0%80", "signature=%00&timestamp=%00&nonce=%00", "signature=\xff",
               "signature=" + "0" * 100000,
               "signature[]=a", "Signature=a", "%73ignature=a", "signature=a;timestamp=1", "signature=%",
               "signature=%zz",
               "signature=a&signature=b", "timestamp=1&nonce=2", "&".join(f"a{number}=1" for number in range(10000))]


@pytest.mark.parametrize("query", ODD_QUERIES, ids=lambda query: ascii(query)[:40])
def test_handle_odd_query_is_forbidden_and_never_an_error(query: str) -> None:
    assert World(token=TOKEN).push(BODY, query)[:2] == (403, b"forbidden\n")


@pytest.mark.parametrize("query", ODD_QUERIES, ids=lambda query: ascii(query)[:40])
def test_handle_odd_query_is_ignored_without_a_token(world: World, query: str) -> None:
    assert world.push(BODY, query).outcome == "accepted"


@pytest.mark.parametrize("token, timestamp, nonce", [
    ("令牌", "1", "2"), ("t", "", ""), ("a+b/c= &", "1", "é&=+ %"), ("t", "时间", "\U0001f600")], ids=ascii)
def test_handle_takes_any_text_that_is_signed_well(token: str, timestamp: str, nonce: str) -> None:
    assert World(token=token).ask(signed(token=token, timestamp=timestamp, nonce=nonce)).outcome == "accepted"


def test_handle_takes_a_signature_whose_values_are_escaped_or_not() -> None:
    world = World(token=TOKEN)
    escaped = re.sub("[0-9a-f]$", lambda digit: f"%{ord(digit.group()):02x}", signed_query(TOKEN, nonce="a"))
    assert world.ask(post(query=escaped)).outcome == "accepted"


# ---- Age


@pytest.mark.parametrize("timestamp, status", [
    (NOW, 200), (NOW - 300, 200), (NOW + 300, 200), (NOW - 301, 403), (NOW + 301, 403), (0, 403), (-NOW, 403),
    ("", 403), ("now", 403), (f" {NOW}", 403), (f"{NOW}.0", 403), (f"+{NOW}", 403), ("1e9", 403), ("²", 403),
    ("9" * 5000, 403), ("0" * 5000 + str(NOW), 403)], ids=lambda value: ascii(value)[:16])
def test_handle_checks_the_age_of_what_is_signed(timestamp: object, status: int) -> None:
    assert World(token=TOKEN, max_age=300).ask(signed(timestamp=timestamp)).status == status


def test_handle_asks_the_clock_at_every_push() -> None:
    world = World(token=TOKEN, max_age=300)
    statuses = []
    for _ in range(3):
        statuses.append(world.ask(signed()).status)
        world.now += 200
    assert statuses == [200, 200, 403]


@pytest.mark.parametrize("timestamp", [0, "", "now", "9" * 5000], ids=lambda value: ascii(value)[:8])
def test_handle_checks_no_age_unless_it_is_told_to(timestamp: object) -> None:
    assert World(token=TOKEN).ask(signed(timestamp=timestamp)).status == 200


# ---- Safe mode


def test_handle_opens_the_published_encrypted_push() -> None:
    world = World(**SAFE)
    assert world.ask(post(SEALED["body"].encode(), urlencode(SEALED["query"])))[:2] == (200, b"success")
    assert world.submitted == [parse(SEALED["plaintext"].encode())]
    assert world.submitted[0].fields["debug_str"] == "hello world"


IN_BODY = {"Encrypt": ENCRYPT, "MsgSignature": sign(SAFE["token"], str(NOW), "nonce", ENCRYPT), "TimeStamp": str(NOW),
           "Nonce": "nonce"}
HALF_IN_BODY = json.dumps({"Encrypt": ENCRYPT, "MsgSignature": IN_BODY["MsgSignature"]}).encode()
XML_BODY = "<xml>" + "".join(f"<{name}><![CDATA[{value}]]></{name}>" for name, value in IN_BODY.items()) + "</xml>"

ENVELOPES: Dict[str, Request] = {
    "JSON, signature in the query": sealed(ENCRYPT),
    "JSON, signature in the body": post(json.dumps(IN_BODY).encode()),
    "JSON, TimeStamp a number": post(json.dumps({**IN_BODY, "TimeStamp": NOW}).encode()),
    "XML, signature in the query": post(f"<xml><Encrypt>{ENCRYPT}</Encrypt></xml>".encode(), sealed_query(ENCRYPT)),
    "XML, signature in the body": post(XML_BODY.encode()),
    "both, the query counts": sealed(ENCRYPT)._replace(body=json.dumps({**IN_BODY, "MsgSignature": "wrong"}).encode()),
    "a plain signature beside it": post(
        sealed(ENCRYPT).body, sealed_query(ENCRYPT) + "&signature=" + sign(SAFE["token"], str(NOW), "nonce")),
    "plain fields beside it": post(json.dumps({**IN_BODY, "MsgType": "text", "Content": "not proven"}).encode()),
    "blanks around it": post(f"<xml><Encrypt>\n {ENCRYPT} \n</Encrypt></xml>".encode(), sealed_query(ENCRYPT)),
    "blanks around it, signed with it": sealed(f"\n {ENCRYPT} \n"),
    "newlines inside it, signed with it": sealed("\r\n".join([ENCRYPT[:76], ENCRYPT[76:]])),
    "signature in upper case": post(sealed(ENCRYPT).body, re.sub(
        "(?<=msg_signature=)[0-9a-f]+", lambda found: found.group().upper(), sealed_query(ENCRYPT))),
    "signature in the body, timestamp and nonce in the query": post(HALF_IN_BODY, f"timestamp={NOW}&nonce=nonce"),
    "signature in the body, and a plain one in the query": post(HALF_IN_BODY, signed_query(SAFE["token"])),
    "signature in the query, timestamp and nonce in the body": post(
        json.dumps({**IN_BODY, "MsgSignature": ""}).encode(), f"msg_signature={IN_BODY['MsgSignature']}"),
    "processing instructions and a namespace": post(
        f'<?x?><xml xmlns="urn:x"><?y?><Encrypt>{ENCRYPT}</Encrypt></xml>'.encode(), sealed_query(ENCRYPT)),
    "a BOM before it": post(b"\xef\xbb\xbf" + sealed(ENCRYPT).body, sealed_query(ENCRYPT)),
}


@pytest.mark.parametrize("request_", ENVELOPES.values(), ids=ENVELOPES.keys())
def test_handle_opens_envelopes_of_every_shape(request_: Request) -> None:
    world = World(**SAFE)
    assert world.ask(request_)[:2] == (200, b"success")
    assert world.submitted == [parse(BODY)]


@pytest.mark.parametrize("body", PUSHES.values(), ids=PUSHES.keys())
def test_handle_opens_a_message_of_either_kind(body: bytes) -> None:
    world = World(**SAFE)
    world.ask(sealed(seal(body)))
    assert world.submitted == [parse(body)]


@pytest.mark.parametrize("body, query", [
    ({**IN_BODY, "TimeStamp": "1"}, f"timestamp={NOW}&nonce=nonce"),
    ({"Encrypt": ENCRYPT}, f"timestamp={NOW}&nonce=nonce&signature={IN_BODY['MsgSignature']}"),
    ({"Encrypt": ENCRYPT, "MsgSignature": "0" * 40}, sealed_query(ENCRYPT).replace("msg_signature", "MsgSignature")),
    (IN_BODY, "msg_signature=&timestamp=1"), ({**IN_BODY, "MsgSignature": [IN_BODY["MsgSignature"]]}, "")],
    ids=["another timestamp in the query", "another name", "another name in the query", "empty in the query", "a list"])
def test_handle_takes_a_message_signature_from_one_place(body: Dict[str, Any], query: str) -> None:
    assert World(**SAFE).push(json.dumps(body).encode(), query).status == 403


@pytest.mark.parametrize("prefix", ["n:", "xml:"])
@pytest.mark.parametrize("settings", [SAFE, PLAIN_TOO], ids=["safe", "compatible"])
def test_handle_takes_no_prefixed_field_for_the_envelope(settings: Dict[str, Any], prefix: str) -> None:
    body = f'<xml xmlns:n="urn:x"><{prefix}Encrypt>{ENCRYPT}</{prefix}Encrypt></xml>'.encode()
    assert World(**settings).push(body, sealed_query(ENCRYPT)).status == 403


@pytest.mark.parametrize("app_id, status", [
    ("17328232", 403), (f"17328232,{SAFE['app_id']}", 200), (f"{SAFE['app_id']}, 17328232", 200)])
def test_handle_takes_pushes_for_each_of_several_app_ids(lines: Lines, app_id: str, status: int) -> None:
    assert World(**{**SAFE, "app_id": app_id}).ask(sealed(ENCRYPT)).status == status
    assert all(SAFE["app_id"] in line and "--app-id" in line for line in lines(logging.WARNING))
    assert len(lines(logging.WARNING)) == (status == 403)


@pytest.mark.parametrize("body", [b"", b"hello", b"[]", b"<!DOCTYPE xml><xml/>"], ids=ascii)
def test_handle_refuses_a_sealed_message_that_is_none(body: bytes) -> None:
    assert World(**SAFE).ask(sealed(seal(body))).status == 400


@pytest.mark.parametrize("body", [
    json.dumps({"MsgType": "text", "MsgId": 1, "Content": '<Encrypt>x</Encrypt> "Encrypt": "y"'}).encode(),
    b"<xml><MsgType>text</MsgType><MsgId>1</MsgId><Content><![CDATA[<Encrypt>x</Encrypt>]]></Content></xml>",
    b"<xml><MsgType>text</MsgType><MsgId>1</MsgId><Content>&lt;Encrypt&gt;x</Content></xml>",
    json.dumps({"MsgType": "event", "Event": "x", "More": {"Encrypt": "y"}}).encode(),
], ids=["JSON", "XML", "XML, escaped", "nested"])
@pytest.mark.parametrize("settings", [{"token": SAFE["token"]}, SAFE, PLAIN_TOO], ids=["plain", "safe", "compatible"])
def test_handle_is_not_disturbed_by_a_user_who_writes_encrypt(settings: Dict[str, Any], body: bytes) -> None:
    world = World(**settings)
    world.ask(sealed(seal(body)) if settings is SAFE else signed(body, token=SAFE["token"]))
    assert world.submitted == [parse(body)]


@pytest.mark.parametrize("encrypt", [{}, {"a": "b"}, [], ["a"], None, 1, "", True], ids=str)
@pytest.mark.parametrize("settings", [{"token": SAFE["token"]}, SAFE, PLAIN_TOO], ids=["plain", "safe", "compatible"])
def test_handle_takes_no_harm_from_an_envelope_of_another_shape(settings: Dict[str, Any], encrypt: Any) -> None:
    body = json.dumps({"Encrypt": encrypt, "MsgSignature": encrypt, "TimeStamp": encrypt, "Nonce": encrypt}).encode()
    assert World(**settings).push(body)[:2] == (403, b"forbidden\n")


# ---- Logs


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE.keys())
def test_handle_logs_one_line_a_push(lines: Lines, row: Row) -> None:
    World(**row.settings).ask(row.request)
    # Health checks ask whether the server is up, all day long: they are no pushes.
    expected = 0 if row.body == UP else 1
    assert len(lines(logging.INFO)) == expected
    assert all(re.fullmatch(r"push type=\S+ key=\S+ outcome=.+ ms=\d+\.\d\d", line) for line in lines(logging.INFO))


def test_handle_logs_type_key_outcome_and_milliseconds(lines: Lines) -> None:
    times = iter([1.0, 1.0125])
    endpoint = Endpoint(Settings(), World(), float, lambda: next(times))
    endpoint.handle(post())
    assert lines(logging.INFO) == ["push type=text key=app/user/text/1 outcome=accepted ms=12.50"]


@pytest.mark.parametrize("outcome, ask", [
    ("accepted", lambda world: world.push(BODY)),
    ("repeat", lambda world: [world.push(BODY), world.push(BODY)]),
    ("handshake", lambda world: world.push(b"", "echoStr=1")),
    ("refused 400: the body is empty", lambda world: world.push(b"")),
    ("refused 405: pushes come by POST", lambda world: world.ask(Request("PUT", "/")))], ids=str)
def test_handle_logs_the_outcome(lines: Lines, world: World, outcome: str, ask: Callable[[World], object]) -> None:
    ask(world)
    assert f" outcome={outcome} " in lines(logging.INFO)[-1]


SECRETS = ["s3cret-content", TOKEN, SAFE["token"] + SAFE["token"], SAFE["aes_key"], "s3cret-echo", "s3cret-signature",
    ENCRYPT]
TELLTALES: Dict[str, Tuple[Dict[str, Any], Request]] = {
    "accepted": (SIGNED, signed(push(content="s3cret-content"))),
    "unsigned": (SIGNED, post(push(content="s3cret-content"))),
    "wrong signature": (SIGNED, post(query="signature=s3cret-signature")),
    "handshake": (SIGNED, post(b"", signed_query(TOKEN, echoStr="s3cret-echo"))),
    "not JSON": ({}, post(b'{"Content": "s3cret-content" "s3cret-content"}')),
    "not XML": ({}, post(b"<xml><Content>s3cret-content</Kontent></xml>")),
    "event without an id": ({}, post(b'{"event": "x", "Content": "s3cret-content"}')),
    "encrypted": (SAFE, sealed(seal(push(content="s3cret-content")))),
    "wrong message signature": (SAFE, sealed(ENCRYPT, token="other")),
    "wrong key": (SAFE, sealed(seal(aes_key="B" * 43))),
    "other path": ({"path": "/kf"}, Request("POST", "/s3cret-content", "a=s3cret-content", b"s3cret-content")),
    "other method": ({}, Request("S3CRET", "/s3cret-content", "a=s3cret-content", b"s3cret-content")),
}


@pytest.mark.parametrize("settings, request_", TELLTALES.values(), ids=TELLTALES.keys())
def test_handle_logs_nothing_of_users_and_secrets(
        caplog: pytest.LogCaptureFixture, settings: Dict[str, Any], request_: Request) -> None:
    caplog.set_level(logging.DEBUG, "kfserver")
    World(**settings).ask(request_)
    assert caplog.text
    assert sign(TOKEN, str(NOW), "nonce") not in caplog.text
    assert not [secret for secret in SECRETS if secret in caplog.text]


@pytest.mark.parametrize("name", ["ToUserName", "FromUserName", "MsgType", "MsgId", "Event", "CreateTime"])
@pytest.mark.parametrize("value", ["a\nINFO forged", "a\r\x1b[2J", "\u2028", "%s %d", "x" * 100000],
    ids=lambda value: ascii(value)[:8])
def test_handle_logs_odd_values_on_one_short_line_of_ascii(lines: Lines, world: World, name: str, value: str) -> None:
    world.push(json.dumps({name: value, "Content": "hi"}).encode())
    line, = lines(logging.INFO)
    assert line.isascii()
    assert line.isprintable()
    assert len(line) < 700


@pytest.mark.parametrize("settings, request_, advice", [
    (SIGNED, post(), "--allow-unsigned"),
    (SIGNED, signed(token="other"), "--token"),
    (AGED, signed(timestamp=0), "--max-age"),
    ({"max_body": 1}, post(), "--max-body"),
    ({}, sealed(ENCRYPT), "--aes-key"),
    (SAFE, signed(token=SAFE["token"]), "--compatible"),
    (SAFE, sealed(ENCRYPT, token="other"), "--token"),
    (SAFE, sealed(seal(aes_key="B" * 43)), "--aes-key"),
    (SAFE, sealed(seal(app_id="other")), "--app-id"),
], ids=["unsigned", "other token", "stale", "large", "no key", "plain", "token, sealed", "other key", "other app"])
def test_handle_warns_with_the_setting_that_would_help(
        lines: Lines, settings: Dict[str, Any], request_: Request, advice: str) -> None:
    World(**settings).ask(request_)
    warning, = lines(logging.WARNING)
    assert advice in warning


def test_handle_advises_on_a_full_queue(lines: Lines, world: World) -> None:
    world.full = Busy("the queue is full", "raise --queue-size")
    world.push(BODY)
    assert "--queue-size" in lines(logging.WARNING)[0]


def test_handle_advises_on_a_path_that_nothing_serves(lines: Lines) -> None:
    World(path="/kf").ask(Request("POST", "/else", "", BODY))
    assert "--path" in lines(logging.WARNING)[0]


def test_handle_advises_nothing_at_shutdown(lines: Lines, world: World) -> None:
    world.full = Busy("shutting down")
    world.push(BODY)
    assert lines(logging.WARNING) == []


def test_handle_gives_each_advice_at_most_once_a_minute(lines: Lines) -> None:
    world, counts = World(token=TOKEN), []
    for seconds in (0.0, 0.0, TELL_SECONDS - 1, TELL_SECONDS, TELL_SECONDS + 1, 2 * TELL_SECONDS):
        world.timer = seconds
        world.push(BODY)
        counts.append(len(lines(logging.WARNING)))
    assert counts == [1, 1, 1, 2, 2, 3]


def test_handle_gives_one_advice_beside_another(lines: Lines) -> None:
    world = World(token=TOKEN)
    world.push(BODY)
    world.ask(signed(token="other"))
    assert len(lines(logging.WARNING)) == 2


def test_handle_advises_nothing_where_only_the_sender_can_help(lines: Lines, world: World) -> None:
    world.push(b"hello")
    world.ask(Request("PUT", "/"))
    assert lines(logging.WARNING) == []


# ---- refuse_unread


@pytest.mark.parametrize("error, status, body", [
    (MalformedPush("malformed header line"), 400, b"malformed header line\n"),
    (PushError("more than 5 bytes", "", 413), 413, b"more than 5 bytes\n")], ids=["malformed", "too large"])
def test_refuse_unread_answers_what_was_no_request(
        lines: Lines, world: World, error: Any, status: int, body: bytes) -> None:
    assert world.ask(Request("", "", problem=error))[:2] == (status, body)
    assert lines(logging.INFO) == [f"push type=- key=- outcome=refused {status}: {error} ms=0.00"]
