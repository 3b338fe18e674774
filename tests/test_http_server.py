"""The HTTP server over real sockets of this machine: what is read as a request, what is refused, and who must leave.

The endpoint behind the server is the real one, and keeps what it was asked: so a test can tell not only what a client
was answered, but also that nothing else was taken for a request. Clients send bytes, since half of the cases are what
no HTTP library would send.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import socket
import threading
import time
import timeit
import weakref
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import pytest
from support import (
    PATIENCE,
    Client,
    Receiver,
    RecordingEndpoint,
    local,
    no_thread_left,
    post,
    push,
    receiver,
    wait_until,
)

import kfserver
from kfserver import (
    ANSWER,
    BODY,
    HEAD,
    IDLE,
    LINGER,
    NEW,
    PAUSE_SECONDS,
    PHASE_SECONDS,
    Connection,
    PushServer,
    Request,
    RequestReader,
    Response,
    parse_framing,
)

GET = b"GET / HTTP/1.1\r\nHost: kf\r\n\r\n"
# What a smuggler hides behind a request that two readers understand differently.
SMUGGLED = post(push("smuggled"), target="/smuggled")


@pytest.fixture
def kf() -> Iterator[Receiver]:
    """A server that listens, and whatever clients a test connects to it."""
    with receiver() as running:
        yield running


def head(*lines: str) -> bytes:
    """A POST's head with the given header lines behind Host."""
    return "\r\n".join(["POST / HTTP/1.1", "Host: kf", *lines]).encode("latin-1") + b"\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    """A request with the given bytes as its chunked body."""
    return head("Transfer-Encoding: chunked") + b"".join(pieces)


# ---- Requests and answers


def test_connection_answers_a_push(kf: Receiver) -> None:
    answer = kf.connect().ask(post(push()))
    assert (answer.status, answer.body) == (200, b"success")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["content-length"] == "7"
    assert answer.headers["date"].endswith(" GMT")


def test_connection_gives_the_endpoint_what_was_sent(kf: Receiver) -> None:
    kf.connect().ask(post(b"the body", target="/kf/push?nonce=%20a&nonce=b?c"))
    assert kf.requests == [Request("POST", "/kf/push", "nonce=%20a&nonce=b?c", b"the body")]


@pytest.mark.parametrize(("version", "connection", "kept"), [
    ("1.1", "", True),
    ("1.1", "close", False),
    ("1.1", "CLOSE", False),
    ("1.1", "keep-alive", True),
    ("1.1", "upgrade, Close", False),
    ("1.0", "", False),
    ("1.0", "keep-alive", False),
    ("1.0", "close", False),
    ("1.7", "", True),  # a version of tomorrow, which is understood as 1.1
])
def test_connection_keeps_the_connection(kf: Receiver, version: str, connection: str, kept: bool) -> None:
    client = kf.connect()
    headers = [f"Connection: {connection}"] if connection else []
    answer = client.ask(post(push(), *headers, version=version))
    assert answer.headers.get("connection") == (None if kept else "close")
    if kept:
        assert client.ask(GET).status == 200
    else:
        assert client.at_end()


def test_connection_serves_a_request_without_host_in_http_1_0(kf: Receiver) -> None:
    assert kf.connect().ask(b"GET / HTTP/1.0\r\n\r\n").status == 200


def test_connection_answers_head_as_get_without_the_body(kf: Receiver) -> None:
    client = kf.connect()
    by_get = client.ask(GET)
    client.send(GET.replace(b"GET", b"HEAD"))
    by_head = client.read_answer(bodiless=True)
    assert (by_head.status, by_head.headers) == (by_get.status, {**by_get.headers, "date": by_head.headers["date"]})
    assert client.ask(post(push())).body == b"success"


@pytest.mark.parametrize(("request_bytes", "status"), [
    pytest.param(b"BREW / HTTP/1.1\r\nHost: kf\r\n\r\n", 405, id="unknown method"),
    pytest.param(b"DELETE / HTTP/1.1\r\nHost: kf\r\nContent-Length: 3\r\n\r\nabc", 405, id="method with a body"),
    pytest.param(b"OPTIONS * HTTP/1.1\r\nHost: kf\r\n\r\n", 405, id="the server as a whole"),
    pytest.param(post(b"neither XML nor JSON"), 400, id="bad body"),
    pytest.param(post(b""), 400, id="no body"),
    pytest.param(head(), 400, id="no length"),
])
def test_connection_goes_on_after_a_refusal_by_the_endpoint(
        kf: Receiver, request_bytes: bytes, status: int) -> None:
    client = kf.connect()
    assert client.ask(request_bytes).status == status
    assert client.ask(post(push())).body == b"success"


def test_connection_names_the_methods_that_it_serves(kf: Receiver) -> None:
    assert kf.connect().ask(b"PUT / HTTP/1.1\r\nHost: kf\r\n\r\n").headers["allow"] == "GET, HEAD, POST"


# ---- Reading


@pytest.mark.parametrize("request_bytes", [
    pytest.param(post(b"hello"), id="Content-Length"),
    pytest.param(head("content-length:5") + b"hello", id="lower case, no blank"),
    pytest.param(head("Content-Length: \t 5 \t") + b"hello", id="blanks around"),
    pytest.param(head("Content-Length: 0005") + b"hello", id="leading zeros"),
    pytest.param(chunked(b"5\r\nhello\r\n0\r\n\r\n"), id="one chunk"),
    pytest.param(chunked(b"2\r\nhe\r\n1\r\nl\r\n2\r\nlo\r\n0\r\n\r\n"), id="several chunks"),
    pytest.param(chunked(b"0005\r\nhello\r\n000\r\n\r\n"), id="chunk with leading zeros"),
    pytest.param(chunked(b"5;name=\"value\"\r\nhello\r\n0;x\r\n\r\n"), id="chunk extensions"),
    pytest.param(chunked(b"5 ;x\r\nhello\r\n0\r\n\r\n"), id="blank before a chunk extension"),
    pytest.param(head("TRANSFER-encoding: Chunked") + b"5\r\nhello\r\n0\r\n\r\n", id="any case"),
    pytest.param(b"POST http://kf.example HTTP/1.1\r\nHost: kf\r\nContent-Length: 5\r\n\r\nhello", id="absolute"),
    pytest.param(b"\r\n\r\n" + post(b"hello"), id="empty lines before"),
    pytest.param(head("A: \xff", "Content-Length: 5") + b"hello", id="a header beyond ASCII"),
])
@pytest.mark.parametrize("in_one", [True, False], ids=["in one piece", "byte by byte"])
def test_request_reader_reads_a_body(kf: Receiver, request_bytes: bytes, in_one: bool) -> None:
    client = kf.connect()
    client.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
    for piece in [request_bytes] if in_one else [bytes([byte]) for byte in request_bytes]:
        client.send(piece)
    client.read_answer()
    assert kf.requests == [Request("POST", "/", "", b"hello")]
    assert client.ask(GET).status == 200  # not a byte of the body is left over


def test_request_reader_reads_a_chunk_whose_size_is_in_letters(kf: Receiver) -> None:
    body = bytes(range(256)) * 11
    kf.connect().ask(chunked(b"aFf\r\n", body[:0xAFF], b"\r\n1\r\n", body[0xAFF:], b"\r\n0\r\n\r\n"))
    assert kf.requests[0].body == body


def test_request_reader_reads_a_body_of_the_largest_size() -> None:
    with receiver(max_body=100000) as kf:
        client = kf.connect()
        client.ask(post(b"x" * 100000))
        client.ask(chunked(b"186a0\r\n", b"x" * 100000, b"\r\n0\r\n\r\n"))
        assert [len(request.body) for request in kf.requests] == [100000, 100000]


@pytest.mark.parametrize("lines", [
    pytest.param(["A:"] * 98, id="100 headers"),
    pytest.param(["A: " + "b" * 16000], id="a header of 16 kB"),
])
def test_request_reader_reads_a_large_head(kf: Receiver, lines: List[str]) -> None:
    assert kf.connect().ask(post(push(), *lines)).body == b"success"


@pytest.mark.parametrize("between", [b"", b"\r\n", b"\r\n\r\n"], ids=["nothing", "an empty line", "two empty lines"])
@pytest.mark.parametrize("request_bytes", [
    pytest.param(post(b"hello"), id="Content-Length"),
    pytest.param(chunked(b"5\r\nhello\r\n0\r\n\r\n"), id="chunked"),
    pytest.param(GET, id="GET"),
])
def test_request_reader_reads_requests_that_come_at_once(kf: Receiver, request_bytes: bytes, between: bytes) -> None:
    # Old clients send an empty line behind a body (RFC 9112, section 2.2).
    client = kf.connect()
    client.send(between.join([request_bytes] * 3) + between)
    answers = [client.read_answer() for _ in range(3)]
    assert len({answer.body for answer in answers}) == 1
    assert len(set(kf.requests)) == 1
    assert len(kf.requests) == 3
    assert client.ask(post(push())).body == b"success"


def test_connection_answers_in_the_order_of_the_requests(kf: Receiver) -> None:
    client = kf.connect()
    client.send(GET + post(push()) + post(b"?") + post(push()))
    assert [client.read_answer().status for _ in range(4)] == [200, 200, 400, 200]


# ---- Expect: 100-continue


def test_request_reader_tells_a_client_to_continue(kf: Receiver) -> None:
    client, body = kf.connect(), push()
    assert client.ask(head("Expect: 100-continue", f"Content-Length: {len(body)}")).status == 100
    assert client.ask(body).body == b"success"


def test_request_reader_tells_a_client_to_continue_with_chunks(kf: Receiver) -> None:
    client = kf.connect()
    assert client.ask(head("Expect: 100-Continue", "Transfer-Encoding: chunked")).status == 100
    client.ask(b"5\r\nhello\r\n0\r\n\r\n")
    assert kf.requests[0].body == b"hello"


@pytest.mark.parametrize("request_bytes", [
    pytest.param(post(push(), "Expect: 100-continue"), id="the body is here"),
    pytest.param(post(b"", "Expect: 100-continue"), id="there is no body"),
    pytest.param(post(push(), "Expect: 100-continue", version="1.0"), id="HTTP/1.0 does not know it"),
])
def test_request_reader_tells_nobody_to_continue_who_need_not_ask(kf: Receiver, request_bytes: bytes) -> None:
    assert kf.connect().ask(request_bytes).status in (200, 400)


@pytest.mark.parametrize(("lines", "status"), [
    (["Expect: 100-continue", "Content-Length: 99999999"], 413),
    (["Expect: the-moon", "Content-Length: 5"], 417),
    (["Expect: 100-continue", "Content-Length: nonsense"], 400),
])
def test_request_reader_refuses_before_the_body_is_sent(kf: Receiver, lines: List[str], status: int) -> None:
    client = kf.connect()
    assert client.ask(head(*lines)).status == status


def put_off(monkeypatch: pytest.MonkeyPatch, beginning: bytes) -> None:
    """What begins so is not taken by the client at once, as if it had not read for a while."""
    send = Connection._send
    put_off_once: List[bytes] = []

    def send_later(handler: Connection) -> None:
        if handler._unsent.startswith(beginning) and not put_off_once:
            put_off_once.append(beginning)
            raise BlockingIOError
        send(handler)
    monkeypatch.setattr(Connection, "_send", send_later)


def test_connection_says_continue_once_though_the_client_takes_it_late(
        kf: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    put_off(monkeypatch, b"HTTP/1.1 100")
    client = kf.connect()
    body = push()
    assert client.ask(GET).status == 200
    client.send(head("Expect: 100-continue", f"Content-Length: {len(body)}"))
    assert client.read_answer().status == 100
    client.send(body + GET)
    assert [client.read_answer().status for _ in range(2)] == [200, 200]


def test_connection_refuses_aloud_though_the_client_takes_it_late(
        kf: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    put_off(monkeypatch, b"HTTP/1.1 400")
    client = kf.connect()
    client.send(GET + b"BAD\r\n\r\n")
    assert [client.read_answer().status for _ in range(2)] == [200, 400]
    assert client.at_end()


@pytest.mark.parametrize("lines", [("Expect: much",), ("Content-Length: 99999999",), ("Content-Length: x",)])
def test_connection_refuses_head_without_a_body(kf: Receiver, lines: Tuple[str, ...]) -> None:
    client = kf.connect()
    client.send(head(*lines).replace(b"POST", b"HEAD"))
    assert client.read_answer(bodiless=True).status in (400, 413, 417)
    assert client.at_end()


def test_connection_refuses_with_a_body_what_follows_a_head_request(kf: Receiver) -> None:
    client = kf.connect()
    client.send(GET.replace(b"GET", b"HEAD") + b"BAD\r\n\r\n")
    assert client.read_answer(bodiless=True).status == 200
    assert client.read_answer().body == b"malformed request line\n"


@pytest.mark.parametrize("pieces", [
    pytest.param([b"\x16\x03\x01\x02"], id="TLS, where plain HTTP is spoken"),
    pytest.param([b"GET / HTTP/1.1\r\nHost: kf", b"\0"], id="NUL in a later piece"),
    pytest.param([b"GET / HTTP/1.1\r\nHost: kf", b"\n"], id="bare LF in a later piece"),
])
def test_connection_refuses_a_head_before_it_is_complete(kf: Receiver, pieces: List[bytes]) -> None:
    client = kf.connect()
    for piece in pieces[:-1]:
        client.send(piece)
        wait_until(lambda: [each.phase for each in list(kf.server.connections)] == [HEAD])
    client.send(pieces[-1])
    assert client.read_answer().status == 400
    assert client.at_end()


def test_parse_framing_takes_a_long_run_of_blanks_as_it_takes_letters() -> None:
    # An expression that looks at the rest of the run for each of its blanks would take a thousand times as long.
    def seconds(filler: str) -> float:
        block = f"Host: kf\r\nConnection: x{filler * 16000}x\r\n".encode()
        return min(timeit.repeat(lambda: parse_framing(block, 1), number=3, repeat=3))
    assert seconds(" ") < 50 * seconds("x")


# ---- Refusals: what two readers could understand differently, and what is too much


REFUSED = [
    pytest.param(head("Content-Length: 5", "Transfer-Encoding: chunked"), 400, id="both framings"),
    pytest.param(head("Transfer-Encoding: chunked", "Content-Length: 5"), 400, id="both framings, the other order"),
    pytest.param(head("Content-Length: 0", "Content-Length: 0"), 400, id="length twice"),
    pytest.param(head("Content-Length: 0", "content-length: 44"), 400, id="two lengths"),
    pytest.param(head("Content-Length: 0, 0"), 400, id="comma-joined lengths"),
    pytest.param(head("Content-Length: +0"), 400, id="signed length"),
    pytest.param(head("Content-Length: -1"), 400, id="negative length"),
    pytest.param(head("Content-Length: 0x0"), 400, id="length in hex"),
    pytest.param(head("Content-Length: 0 0"), 400, id="length with a blank"),
    pytest.param(head("Content-Length: 1_0"), 400, id="length as Python writes it"),
    pytest.param(head("Content-Length: 1.0"), 400, id="length with a point"),
    pytest.param(head("Content-Length: \xb2"), 400, id="a digit that is none"),
    pytest.param(head("Content-Length:"), 400, id="empty length"),
    pytest.param(head("Content-Length: " + "0" * 100), 400, id="length of 100 digits"),
    pytest.param(head("Content-Length: " + "9" * 5000), 400, id="length of 5,000 digits"),
    pytest.param(head("Content-Length: 99999999999999999"), 413, id="huge length"),
    pytest.param(head("Content-Length: 1048577"), 413, id="one byte too many"),
    pytest.param(head("Content-Length : 0"), 400, id="blank before the colon"),
    pytest.param(head("Content-Length\t: 0"), 400, id="tab before the colon"),
    pytest.param(head("Transfer-Encoding : chunked"), 400, id="blank before the coding's colon"),
    pytest.param(head("Transfer-Encoding: identity"), 400, id="coding identity"),
    pytest.param(head("Transfer-Encoding: gzip, chunked"), 400, id="two codings"),
    pytest.param(head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400, id="coding twice"),
    pytest.param(head("Transfer-Encoding: xchunked"), 400, id="unknown coding"),
    pytest.param(head("Transfer-Encoding: \"chunked\""), 400, id="coding in quotes"),
    pytest.param(head("Transfer-Encoding:"), 400, id="empty coding"),
    pytest.param(head("Transfer-Encoding: chunked").replace(b"1.1", b"1.0"), 400, id="chunked in HTTP/1.0"),
    pytest.param(head("A: b", " Content-Length: 0"), 400, id="folded line"),
    pytest.param(head("Transfer-Encoding:", " chunked"), 400, id="folded coding"),
    pytest.param(head(" A: b"), 400, id="blank before the first header"),
    pytest.param(head("no colon"), 400, id="no colon"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400, id="blank in the host"),
    pytest.param(b"GET / HTTP/1.1\r\nHost: kf/path\r\n\r\n", 400, id="path in the host"),
    pytest.param(b"GET / HTTP/1.0\r\nHost: me@kf\r\n\r\n", 400, id="user in the host"),
    pytest.param(b"GET /#?echoStr=x HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="fragment in the target"),
    pytest.param(head(": no name"), 400, id="no name"),
    pytest.param(head("B\xe9: c"), 400, id="name that is not ASCII"),
    pytest.param(head("A: b\nContent-Length: 0"), 400, id="bare LF in a header"),
    pytest.param(head("A: b\rContent-Length: 0"), 400, id="bare CR in a header"),
    pytest.param(head("A: b\0c"), 400, id="NUL in a header"),
    pytest.param(head("A\0: b"), 400, id="NUL in a name"),
    pytest.param(head("A: \x0b"), 400, id="control character in a header"),
    pytest.param(head("A: \x7f"), 400, id="DEL in a header"),
    pytest.param(head("Host: kf"), 400, id="Host twice"),
    pytest.param(b"POST / HTTP/1.1\r\n\r\n", 400, id="no Host"),
    pytest.param(b"POST / HTTP/1.1\nHost: kf\n\n", 400, id="lines end with LF"),
    pytest.param(b"POST / HTTP/1.1\rHost: kf\r\r", 400, id="lines end with CR"),
    pytest.param(b"POST  / HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="two blanks"),
    pytest.param(b"POST\t/ HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="tab for a blank"),
    pytest.param(b" POST / HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="blank before the method"),
    pytest.param(b"POST / HTTP/1.1 \r\nHost: kf\r\n\r\n", 400, id="blank after the version"),
    pytest.param(b"PO\0ST / HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="NUL in the method"),
    pytest.param(b"PO(ST) / HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="method that is no token"),
    pytest.param(b"POST /\0 HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="NUL in the target"),
    pytest.param(b"POST /a b HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="blank in the target"),
    pytest.param(b"POST kf HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="target without a slash"),
    pytest.param(b"POST ?a=b HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="target that is a query"),
    pytest.param(b"POST * HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="a push to the server as a whole"),
    pytest.param(b"POST ftp://kf/ HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="target of another scheme"),
    pytest.param(b"POST http:/ HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="target with half a scheme"),
    pytest.param(b"POST http:// HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="absolute target without a host"),
    pytest.param(b"POST http:///a HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="absolute target with an empty host"),
    pytest.param(b"POST http://k\xe9f/a HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="absolute target beyond ASCII"),
    pytest.param(b"CONNECT kf:80 HTTP/1.1\r\nHost: kf\r\n\r\n", 400, id="target of a tunnel"),
    pytest.param(b"GET /\r\n\r\n", 400, id="HTTP/0.9"),
    pytest.param(b"GET / HTTP/0.9\r\nHost: kf\r\n\r\n", 505, id="version 0.9"),
    pytest.param(b"GET / HTTP/2.0\r\nHost: kf\r\n\r\n", 505, id="version 2.0"),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, id="preface of HTTP/2"),
    pytest.param(b"GET / HTTP/11.1\r\nHost: kf\r\n\r\n", 400, id="version 11.1"),
    pytest.param(b"GET / HTTP/1\r\nHost: kf\r\n\r\n", 400, id="half a version"),
    pytest.param(b"GET / http/1.1\r\nHost: kf\r\n\r\n", 400, id="version in lower case"),
    pytest.param(b"GET / RTSP/1.0\r\nHost: kf\r\n\r\n", 400, id="another protocol"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, id="a TLS handshake"),
    pytest.param(b"\0" * 1000, 400, id="NULs"),
    pytest.param(b"\xff" * 20000, 431, id="a head without an end"),
    pytest.param(head("A: " + "b" * 100000), 431, id="a head of 100 kB"),
    pytest.param(b"POST /" + b"a" * 100000 + b" HTTP/1.1\r\nHost: kf\r\n\r\n", 431, id="a target of 100 kB"),
    pytest.param(head(*["A: b"] * 10000), 431, id="10,000 headers"),
    pytest.param(head(*["A:"] * 101), 431, id="101 short headers"),
    pytest.param(chunked(b"\r\n"), 400, id="chunk without a size"),
    pytest.param(chunked(b"g\r\n"), 400, id="chunk size that is no number"),
    pytest.param(chunked(b"-1\r\n"), 400, id="negative chunk size"),
    pytest.param(chunked(b"+5\r\nhello\r\n"), 400, id="signed chunk size"),
    pytest.param(chunked(b"0x5\r\nhello\r\n"), 400, id="chunk size with a prefix"),
    pytest.param(chunked(b" 5\r\nhello\r\n"), 400, id="blank before the chunk size"),
    pytest.param(chunked(b"5\nhello\r\n"), 400, id="chunk size ends with LF"),
    pytest.param(chunked(b"5\rhello\r\n"), 400, id="chunk size ends with CR"),
    pytest.param(chunked(b"5;a\nb\r\nhello\r\n"), 400, id="bare LF in a chunk extension"),
    pytest.param(chunked(b"5;\0\r\nhello\r\n"), 400, id="NUL in a chunk extension"),
    pytest.param(chunked(b"5;" + b"a" * 1000 + b"\r\nhello\r\n"), 400, id="long chunk extension"),
    pytest.param(chunked(b"4\r\nhello\r\n"), 400, id="chunk longer than it says"),
    pytest.param(chunked(b"5\r\nhello\n0\r\n\r\n"), 400, id="chunk ends with LF"),
    pytest.param(chunked(b"00000000000000005\r\nhello\r\n"), 400, id="chunk size of many zeros"),
    pytest.param(chunked(b"ffffffffffffffff\r\n"), 400, id="chunk size of 16 digits"),
    pytest.param(chunked(b"ffffffff\r\n"), 413, id="huge chunk"),
    pytest.param(chunked(b"80000\r\n" + b"x" * 0x80000 + b"\r\n80001\r\n"), 413, id="two chunks too large together"),
    pytest.param(chunked(b"1\r\nx\r\n" * 5000), 400, id="5,000 chunks"),
    pytest.param(chunked(b"5\r\nhello\r\n0\r\nA: b\r\n\r\n"), 400, id="a trailer"),
    pytest.param(chunked(b"0\r\nTrailer"), 400, id="the beginning of a trailer"),
]


@pytest.mark.parametrize(("request_bytes", "status"), REFUSED)
def test_connection_reads_nothing_behind_what_it_refuses(kf: Receiver, request_bytes: bytes, status: int) -> None:
    client = kf.connect()
    client.send(request_bytes + SMUGGLED * 3)
    answer = client.read_answer()
    assert (answer.status, answer.headers["connection"]) == (status, "close")
    client.send(SMUGGLED)  # nor what comes later
    client.socket.shutdown(socket.SHUT_WR)
    assert client.at_end()
    assert kf.requests == []


def test_connection_takes_the_path_of_an_absolute_target(kf: Receiver) -> None:
    kf.connect().ask(post(b"", target="https://kf.example/kf?a=b"))
    assert kf.requests[0][:3] == ("POST", "/kf", "a=b")


def test_connection_takes_the_query_of_an_absolute_target_without_a_path(kf: Receiver) -> None:
    kf.connect().ask(post(b"", target="http://kf.example?a=b"))
    assert kf.requests[0][:3] == ("POST", "/", "a=b")


# ---- Writing


class NotingSocket(socket.socket):
    """A socket that keeps what was sent by each call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sent: List[bytes] = []

    def sendall(self, data: Any, flags: int = 0) -> None:
        """Send all, and keep it."""
        self.sent.append(bytes(data))
        super().sendall(data, flags)

    def send(self, data: Any, flags: int = 0) -> int:
        """Send, and keep it."""
        self.sent.append(bytes(data))
        return super().send(data, flags)


class NotingServer(PushServer):
    """A server whose connections are noting sockets."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.accepted: List[NotingSocket] = []

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept, and keep the socket."""
        accepted, address = super().get_request()
        self.accepted.append(NotingSocket(fileno=accepted.detach()))
        return self.accepted[-1], address


def test_connection_sends_each_answer_by_one_call() -> None:
    with receiver(NotingServer) as kf:
        client = kf.connect()
        for request_bytes in (GET, post(push()), post(b"?"), b"garbage\r\n\r\n"):
            client.ask(request_bytes)
        sent = kf.server.accepted[0].sent  # type: ignore[attr-defined]
    assert [data.split(b"\r\n")[0] for data in sent] == [
        b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK", b"HTTP/1.1 400 Bad Request", b"HTTP/1.1 400 Bad Request"]
    assert all(data.partition(b"\r\n\r\n")[2] for data in sent)


def test_connection_sends_without_delay() -> None:
    with receiver(NotingServer) as kf:
        kf.connect().ask(GET)
        accepted = kf.server.accepted[0]  # type: ignore[attr-defined]
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# ---- Clients that vanish, are slow or never read


UNFINISHED = [
    pytest.param(b"", id="before a byte"),
    pytest.param(b"POST", id="in the request line"),
    pytest.param(b"POST / HTTP/1.1\r\nHost: k", id="in the head"),
    pytest.param(head("Content-Length: 100") + b"half", id="in the body"),
    pytest.param(head("Transfer-Encoding: chunked"), id="before a chunk"),
    pytest.param(chunked(b"64\r\nhalf"), id="in a chunk"),
    pytest.param(chunked(b"4\r\nfull\r\n0\r\n"), id="before the last line"),
]


@pytest.mark.parametrize("request_bytes", [
    *UNFINISHED,
    pytest.param(GET, id="before the answer"),
    pytest.param(b"garbage\r\n\r\n", id="before the refusal"),
    pytest.param(GET * 50 + b"GET", id="in a row of requests"),
])
@pytest.mark.parametrize("leave", [lambda client: client.socket.close(), lambda client: client.reset()],
                         ids=["closed", "reset"])
def test_push_server_loses_nothing_to_a_client_that_vanishes(
        request_bytes: bytes, leave: Callable[[Client], None], caplog: pytest.LogCaptureFixture) -> None:
    with no_thread_left(), receiver() as kf:
        clients = [kf.connect() for _ in range(3)]
        wait_until(lambda: len(kf.server.connections) == 3)
        for client in clients:
            client.send(request_bytes)
            leave(client)
        wait_until(lambda: len(kf.server.connections) == 0)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("request_bytes", UNFINISHED)
def test_push_server_takes_no_unfinished_request_for_one(kf: Receiver, request_bytes: bytes) -> None:
    client = kf.connect()
    client.send(request_bytes)
    client.socket.shutdown(socket.SHUT_WR)
    assert client.at_end()
    assert kf.requests == []


class ImpatientServer(PushServer):
    """A server that looks for clients whose time is up in every turn, instead of twice a second."""

    def service_actions(self) -> None:
        """Send away who is too slow."""
        self._next_tick = 0.0
        super().service_actions()


def limit_only(monkeypatch: pytest.MonkeyPatch, limited: str) -> None:
    """Let one limit of time be over as soon as it begins, and the others never be reached."""
    monkeypatch.setattr(kfserver, "PHASE_SECONDS", {**dict.fromkeys(PHASE_SECONDS, 600.0), limited: 0.0})


@pytest.mark.parametrize(("limited", "do"), [
    pytest.param(NEW, lambda client: None, id="silent"),
    pytest.param(HEAD, lambda client: client.send(b"POST / HT"), id="in a head"),
    pytest.param(HEAD, lambda client: client.send(GET + b"POST / HT"), id="in a second head"),
    pytest.param(IDLE, lambda client: client.send(b"\r\n"), id="sends empty lines"),
    pytest.param(BODY, lambda client: client.send(head("Content-Length: 9") + b"half"), id="in a body"),
    pytest.param(BODY, lambda client: client.send(chunked(b"5\r\nhe")), id="in a chunk"),
    pytest.param(IDLE, lambda client: client.ask(GET), id="between requests"),
    pytest.param(LINGER, lambda client: client.ask(b"garbage\r\n\r\n"), id="refused, and stays"),
])
def test_push_server_sends_away_whose_time_is_up(
        limited: str, do: Callable[[Client], None], monkeypatch: pytest.MonkeyPatch) -> None:
    limit_only(monkeypatch, limited)
    with receiver(ImpatientServer) as kf:
        client = kf.connect()
        do(client)
        wait_until(lambda: client.has_ended() and len(kf.server.connections) == 0)


class NarrowServer(ImpatientServer):
    """A server that can send little ahead, and so meets a client that does not read soon."""

    def get_request(self) -> Tuple[socket.socket, Any]:
        """Accept, and make the buffer small."""
        accepted, address = super().get_request()
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        return accepted, address


def flood(client: Client) -> bool:
    """Send requests and read no answer, until no buffer between the two takes any more; whether the server hung up."""
    client.socket.setblocking(False)
    sent = 0
    while select.select([], [client.socket], [], 0.05)[1]:
        try:
            sent += client.socket.send((GET * 1000)[sent % len(GET):])
        except ConnectionError:
            return True
    return False


def test_push_server_sends_away_who_reads_no_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    limit_only(monkeypatch, ANSWER)
    with receiver(NarrowServer) as kf:
        client = kf.connect()
        wait_until(lambda: flood(client))
        assert len(kf.server.connections) == 0


def test_push_server_makes_room_though_nobody_reads_his_answers() -> None:
    with receiver(NarrowServer, max_connections=2) as kf:
        for client in [kf.connect(), kf.connect()]:
            flood(client)
        assert kf.connect().ask(post(push())).body == b"success"


def test_push_server_sends_everything_to_a_client_that_reads_late() -> None:
    with receiver(NarrowServer) as kf:
        client, count = kf.connect(), 5000
        sending = threading.Thread(target=client.send, args=(GET * count + post(push()),), daemon=True)
        sending.start()
        wait_until(lambda: len(kf.requests) > 100)
        assert {client.read_answer().body for _ in range(count)} == {kfserver.UP.body}
        assert client.read_answer().body == b"success"
        sending.join(PATIENCE)


@pytest.mark.parametrize(("pieces", "seconds"), [
    pytest.param([b"P", b"OST / HTTP/1.1\r\n", b"Host: "], PHASE_SECONDS[HEAD], id="head"),
    pytest.param([head("Content-Length: 9"), b"h", b"a", b"l", b"f"], PHASE_SECONDS[BODY], id="body"),
    pytest.param([head("Transfer-Encoding: chunked"), b"5\r\n", b"hello\r\n"], PHASE_SECONDS[BODY], id="chunks"),
])
def test_push_server_measures_time_from_the_first_byte(kf: Receiver, pieces: List[bytes], seconds: float) -> None:
    # Measured from the last byte, a byte every few seconds would hold a connection for ever.
    client = kf.connect()
    wait_until(lambda: len(kf.server.connections) == 1)
    connection = next(iter(kf.server.connections))
    silent, before = connection.deadline, time.monotonic()
    client.send(pieces[0])
    wait_until(lambda: connection.deadline != silent)
    begun, now = connection.deadline, time.monotonic()
    assert before + seconds <= begun <= now + seconds
    for piece in pieces[1:]:
        client.send(piece)
    kf.connect().ask(GET)  # when this is answered, the pieces have been read
    assert connection.deadline == begun


# ---- PushServer: a turn is short and fair


def test_push_server_answers_one_request_of_a_connection_a_turn() -> None:
    with receiver(started=False) as kf:
        greedy, honest = kf.connect(), kf.connect()
        greedy.send(GET * 100 + post(push(number=1)))
        honest.send(post(push(number=2)))
        kf.start()  # so that both have come at once
        assert honest.read_answer().body == b"success"
        assert [request.method for request in kf.requests].index("POST") < 3
        assert [greedy.read_answer().status for _ in range(101)] == [200] * 101


@pytest.mark.parametrize("request_bytes", [GET, post(push()), chunked(b"2\r\nhe\r\n0\r\n\r\n")],
                         ids=["GET", "POST", "chunked"])
def test_push_server_goes_on_in_turn_with_clients_that_pipeline(request_bytes: bytes) -> None:
    with receiver(started=False) as kf:
        clients = [kf.connect() for _ in range(5)]
        for client in clients:
            client.send(request_bytes * 20 + GET.replace(b"/ ", b"/end "))
        kf.start()
        for client in clients:
            statuses = [client.read_answer().status for _ in range(21)]
            assert len(set(statuses)) <= 2
            client.send(GET)
            assert client.read_answer().status == 200


def test_push_server_answers_what_was_pipelined_before_the_client_said_no_more(kf: Receiver) -> None:
    client = kf.connect()
    client.send(post(push()) * 30)
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.read_answer().body for _ in range(30)] == [b"success"] * 30
    assert client.at_end()


def test_push_server_reads_no_more_from_a_client_that_does_not_read() -> None:
    with receiver(NarrowServer) as kf:
        flood(kf.connect())

        def count_beside_another() -> int:
            before = len(kf.requests)
            assert kf.connect().ask(post(push())).body == b"success"
            return len(kf.requests) - before
        wait_until(lambda: count_beside_another() == 1)  # what lies between the two is full, and stays so


def test_push_server_loses_only_the_connection_whose_memory_runs_out(
        kf: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    feed = RequestReader.feed

    def feed_while_there_is_memory(reader: RequestReader, data: bytes) -> None:
        if b"large" in data:
            raise MemoryError
        feed(reader, data)
    monkeypatch.setattr(RequestReader, "feed", feed_while_there_is_memory)
    kept = kf.connect()
    assert kept.ask(GET).status == 200
    for _ in range(20):
        client = kf.connect()
        client.send(post(b"large"))
        wait_until(client.has_ended)
    assert kept.ask(post(push())).body == b"success"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    wait_until(lambda: len(kf.server.connections) == 1)


def test_push_server_leaves_nothing_to_the_garbage_collector(kf: Receiver) -> None:
    gc.collect()
    gc.disable()
    try:
        clients = [kf.connect() for _ in range(40)]
        wait_until(lambda: len(kf.server.connections) == 40)
        connections = [weakref.ref(connection) for connection in list(kf.server.connections)]
        for number, client in enumerate(clients):
            client.send((GET, b"garbage\r\n\r\n", GET * 50, b"POST / HT", post(b"?"))[number % 5])
            client.reset() if number % 3 else client.socket.close()
        wait_until(lambda: len(kf.server.connections) == 0)
        kf.connect().ask(GET)  # the turn that closed the last of them is over
        wait_until(lambda: not any(connection() for connection in connections))
    finally:
        gc.enable()


# ---- PushServer: its health, its end, and forks


def test_push_server_alive_tells_whether_the_loop_turns(kf: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kf.server.alive()
    monkeypatch.setattr(kfserver, "STUCK_SECONDS", 0.2)
    kf.endpoint.open.clear()
    kf.connect().send(GET)
    wait_until(lambda: not kf.server.alive())
    kf.endpoint.open.set()
    wait_until(kf.server.alive)


def test_push_server_calls_each_second_and_survives_its_errors(
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    threads: List[str] = []

    def fail() -> None:
        threads.append(threading.current_thread().name)
        raise ZeroDivisionError
    monkeypatch.setattr(kfserver, "TICK_SECONDS", 0.0)
    with receiver() as kf:
        kf.server.each_second = fail
        wait_until(lambda: len(threads) >= 3)
        assert kf.connect().ask(post(push())).body == b"success"
        assert set(threads) == {kf._loop.name}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_push_server_shutdown_gives_up_a_loop_that_is_stuck(
        kf: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kfserver, "CLOSE_SECONDS", 0.0)
    kf.endpoint.open.clear()
    kf.connect().send(GET)
    wait_until(lambda: kf.requests)
    kf.server.shutdown(0.0)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    with pytest.raises(ConnectionRefusedError):
        kf.connect()


def test_push_server_abandon_frees_the_address_of_a_server_that_was_never_started() -> None:
    server = PushServer(local(), RecordingEndpoint(local()))
    server.abandon()
    with pytest.raises(ConnectionRefusedError):
        Client(server.server_port)
    server.abandon()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from 3.12 on, Python warns of forks beside threads
def test_push_server_after_fork_takes_nothing_from_the_parent(kf: Receiver) -> None:
    client = kf.connect()
    assert client.ask(GET).status == 200
    child = os.fork()
    if not child:
        status = 1
        try:
            sockets = [kf.server.socket, *[connection.socket for connection in kf.server.connections]]
            kf.server.after_fork()
            status = int(any(each.fileno() >= 0 for each in sockets))
        finally:
            os._exit(status)
    assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 0
    assert client.ask(post(push())).body == b"success"
    assert kf.connect().ask(post(push())).body == b"success"


# ---- PushServer


def test_push_server_makes_room_for_a_new_client() -> None:
    with receiver(max_connections=2) as kf:
        silent = kf.connect()
        wait_until(lambda: len(kf.server.connections) == 1)
        slow = kf.connect()
        slow.send(b"POST / HT")
        wait_until(lambda: len(kf.server.connections) == 2)
        assert kf.connect().ask(post(push())).body == b"success"
        assert silent.at_end()
        assert len(kf.server.connections) == 2


def test_push_server_serves_a_push_among_silent_clients() -> None:
    with receiver(max_connections=10) as kf:
        for _ in range(100):
            kf.connect()
        assert kf.connect().ask(post(push())).body == b"success"
        assert len(kf.server.connections) <= 10


def test_push_server_answers_every_complete_request_however_few_places_there_are() -> None:
    with receiver(started=False, max_connections=2) as kf:
        clients = [kf.connect() for _ in range(7)]
        for number, client in enumerate(clients):
            client.send(post(push(number=number)))
        kf.start()  # so that all come at once
        assert [client.read_answer().body for client in clients] == [b"success"] * 7


@contextlib.contextmanager
def no_descriptor_free() -> Iterator[None]:
    """Use up every descriptor that this process may open."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open(os.devnull, os.O_RDONLY)]
    # Not all that the system allows, which may be millions: the limit is brought down first.
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, taken[0] + 100), hard))
    try:
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(taken[0]))
        yield
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def unconnected() -> Iterator[socket.socket]:
    """A socket that has its descriptor already."""
    with socket.socket() as client:
        client.settimeout(PATIENCE)
        yield client


def test_push_server_out_of_descriptors_lets_the_longest_waiting_give_way(kf: Receiver) -> None:
    silent = kf.connect()
    wait_until(lambda: len(kf.server.connections) == 1)
    with unconnected() as client:
        with no_descriptor_free():
            client.connect(("127.0.0.1", kf.server.server_port))
            client.sendall(GET)
            assert client.recv(12) == b"HTTP/1.1 200"
        assert silent.at_end()


def test_push_server_out_of_descriptors_pauses_and_goes_on(kf: Receiver) -> None:
    moments: List[float] = []

    def nobody_can_go() -> None:
        moments.append(time.monotonic())
    kf.server._find_oldest = nobody_can_go  # type: ignore[method-assign]
    with unconnected() as client:
        with no_descriptor_free():
            client.connect(("127.0.0.1", kf.server.server_port))
            client.sendall(GET)
            wait_until(lambda: len(moments) >= 3)
        assert client.recv(12) == b"HTTP/1.1 200"
    assert moments[2] - moments[0] >= PAUSE_SECONDS  # or the loop would take all of a processor


def test_push_server_survives_an_error_of_its_own(kf: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    def fail(requests: Sequence[Request]) -> List[Response]:
        raise ZeroDivisionError("a bug")
    handle_all, kf.endpoint.handle_all = kf.endpoint.handle_all, fail  # type: ignore[method-assign]
    client = kf.connect()
    client.send(post(push()))
    assert client.at_end()
    kf.endpoint.handle_all = handle_all  # type: ignore[method-assign]
    assert kf.connect().ask(post(push())).body == b"success"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_push_server_holds_a_thousand_clients_that_are_not_yet_accepted() -> None:
    assert PushServer.request_queue_size >= 1024


def test_push_server_asks_no_name_service(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise AssertionError("a name was looked up")
    for name in ("getfqdn", "gethostbyaddr", "getnameinfo"):
        monkeypatch.setattr(socket, name, refuse)
    with receiver() as kf:
        assert kf.connect().ask(post(push())).body == b"success"


def test_push_server_shutdown_finishes_the_request_in_flight(kf: Receiver) -> None:
    request_bytes = post(push())
    idle, busy = kf.connect(), kf.connect()
    idle.ask(GET)
    busy.send(request_bytes[:-5])
    kf.connect().ask(GET)  # when this is answered, the half of a request has been read
    closing = threading.Thread(target=kf.server.shutdown, args=(PATIENCE,), daemon=True)
    closing.start()
    assert idle.at_end()
    answer = busy.ask(request_bytes[-5:])
    assert (answer.body, answer.headers["connection"]) == (b"success", "close")
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_push_server_shutdown_answers_what_has_come(kf: Receiver) -> None:
    clients = [kf.connect() for _ in range(5)]
    wait_until(lambda: len(kf.server.connections) == 5)
    kf.endpoint.open.clear()
    kf.connect().send(GET)  # the server is busy with this one, and has not yet seen the others' requests
    wait_until(lambda: kf.requests)
    for number, client in enumerate(clients):
        client.send(post(push(number=number)))
    closing = threading.Thread(target=kf.server.shutdown, args=(PATIENCE,), daemon=True)
    closing.start()
    wait_until(lambda: kf.server.closing)
    kf.endpoint.open.set()
    assert [client.read_answer().body for client in clients] == [b"success"] * 5
    closing.join(PATIENCE)
    assert not closing.is_alive()


def test_push_server_shutdown_sends_away_whoever_is_not_through_in_time(kf: Receiver) -> None:
    client = kf.connect()
    client.send(b"POST / HT")
    wait_until(lambda: len(kf.server.connections) == 1)
    kf.server.shutdown(0.0)
    assert client.at_end()


def test_push_server_shutdown_stops_listening(kf: Receiver) -> None:
    kf.server.shutdown(PATIENCE)
    with pytest.raises(ConnectionRefusedError):
        kf.connect()


def test_push_server_shutdown_may_be_called_again(kf: Receiver) -> None:
    kf.server.shutdown(PATIENCE)
    kf.server.shutdown(PATIENCE)
