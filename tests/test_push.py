"""The push command: what it writes, how it reads answers, when it sends again, and what it prints.

It is run in this process, against the real HTTP server and endpoint where those can say what is asked, and against a
receiver that answers by a script where they would not. One test runs it as a program.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from typing import Any, Dict, Iterator, List, Optional

from urllib.parse import urlencode

import pytest
from conftest import NOW, TOKEN, World
from support import PATIENCE, PUSHES, ROOT, Certificate, Receiver, receiver

import kfserver
from kfserver import (
    Message,
    Platform,
    Request,
    Settings,
    SettingsError,
    build_push_parser,
    draft_pushes,
    encode_json,
    encode_xml,
    is_lost,
    parse,
    quote_bytes,
    read_push_url,
)

AES_KEY = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFG"
# Seconds for receivers that never answer.
IMPATIENT = 0.02
SUCCESS = b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nsuccess"


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token and no key but what a test gives."""
    for name in [name for name in os.environ if name.startswith("KF_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def kf() -> Iterator[Receiver]:
    """The real HTTP server and endpoint, without any settings."""
    with receiver() as running:
        yield running


def push(url: str, *options: object, answer_seconds: float = PATIENCE, pause_seconds: float = 0.01) -> int:
    """Run the command here; its exit status. It is as patient as tests are, and sends again soon."""
    return kfserver.push(build_push_parser().parse_args([url, *map(str, options)]), answer_seconds, pause_seconds)


def url_of(running: Receiver) -> str:
    """The address of a server."""
    return f"http://127.0.0.1:{running.server.server_port}/"


def messages_of(running: Receiver) -> List[Message]:
    """What a server was pushed, in order."""
    return [parse(request.body) for request in running.requests]


class Farewell(bytes):
    """An answer after which the receiver hangs up, without a word about it."""


def read_request(connection: socket.socket) -> bytes:
    """One whole request; http.client sends head and body apart."""
    received = b""
    while b"\r\n\r\n" not in received:
        data = connection.recv(65536)
        if not data or data.startswith(b"\x16"):  # a TLS hello: what is spoken here is asked
            return b""
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


class ScriptedReceiver:
    """Reads requests, and answers each with the next line of its script: bytes as they are, b"" to hang up, None to say
    nothing. The last line is for all further requests, on whatever connection they come."""

    def __init__(self, *script: Optional[bytes]) -> None:
        self._script = list(script)
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"
        self.requests: List[bytes] = []
        self.connections: List[socket.socket] = []
        self._lock = threading.Lock()  # guards the script

    def __enter__(self) -> ScriptedReceiver:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        # Shut down, not only closed, or the threads that wait in a call would wait on.
        for each in (self._listener, *self.connections):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self._listener.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.closing(connection):
            while True:
                request = read_request(connection)
                answer = self._answer_to(request) if request else b""
                if answer == b"":
                    return
                connection.sendall(answer or b"")
                if isinstance(answer, Farewell):
                    return

    def _answer_to(self, request: bytes) -> Optional[bytes]:
        with self._lock:
            self.requests.append(request)
            return self._script.pop(0) if len(self._script) > 1 else self._script[0]


# ---- URLs


@pytest.mark.parametrize(("text", "url"), [
    ("http://kf", ("http://kf", "/")),
    ("http://kf:8080/kf?a=b", ("http://kf:8080", "/kf?a=b")),
    ("https://kf:1/", ("https://kf:1", "/")),
    ("http://[::1]:80/", ("http://[::1]:80", "/")),
])
def test_read_push_url(text: str, url: object) -> None:
    assert read_push_url(text) == url


@pytest.mark.parametrize("text", [
    "", "kf", "kf:8080", "ftp://kf/", "http:/kf", "http://", "http:///kf", "http://kf:port/", "http://kf:65536/",
    "http://[::1/", "http://a b/", "http://kf/\r\nX: y", "http://kf/\u4f60", "http://me:secret@kf/", "http://kf/#there",
    "unix:"])
def test_read_push_url_refuses(text: str) -> None:
    with pytest.raises(SettingsError, match="push takes a URL like http://127.0.0.1:8080/kf") as told:
        read_push_url(text)
    assert "secret" not in str(told.value)


# ---- What is pushed


@pytest.mark.parametrize("encode", [encode_xml, encode_json])
@pytest.mark.parametrize("text", [
    "", "hello", " hello ", "你好 😀", "]]>", "a]]]]>>b]]>", "<b>&amp;</b>", "\"quoted\" \\", "two\nlines\tand a tab"])
def test_encode_xml_and_encode_json_write_what_parse_reads(encode: kfserver.Encode, text: str) -> None:
    fields = parse(encode({"Content": text, "MsgId": 2 ** 63 - 1})).fields
    assert fields == {"Content": text, "MsgId": str(2 ** 63 - 1)}


@pytest.mark.parametrize("encode", [encode_xml, encode_json])
def test_encode_xml_and_encode_json_pass_on_bytes_that_are_no_text(encode: kfserver.Encode) -> None:
    # As an argument in another encoding reaches a program.
    assert b"a\xffb" in encode({"Content": b"a\xffb".decode("utf-8", "surrogateescape")})


@pytest.mark.parametrize(("encode", "published"), [(encode_xml, "text, XML"), (encode_json, "text, JSON")])
def test_encode_xml_and_encode_json_write_as_the_platform_publishes(encode: kfserver.Encode, published: str) -> None:
    assert encode({"ToUserName": "toUser", "FromUserName": "fromUser", "CreateTime": 1482048670, "MsgType": "text",
                   "Content": "this is a test", "MsgId": 1234567890123456}) == PUSHES[published]


def write(*options: object) -> List[Message]:
    """The messages that the options ask for."""
    arguments = build_push_parser().parse_args(["http://kf/", *map(str, options)])
    return [parse(message) for message, _, _ in draft_pushes(arguments, Settings())]


@pytest.mark.parametrize(("options", "fields"), [
    ([], {"MsgType": "text", "Content": "hello", "FromUserName": "user", "ToUserName": "app"}),
    (["--text", ""], {"MsgType": "text", "Content": ""}),
    (["--json", "--text", "你好"], {"MsgType": "text", "Content": "你好"}),
    (["--image", "https://kf/a.png"], {"MsgType": "image", "PicUrl": "https://kf/a.png"}),
    (["--event", "user_get_coupon", "--field", "CouponId=7"],
     {"MsgType": "event", "Event": "user_get_coupon", "CouponId": "7"}),
    (["--field", "MsgType=video", "--field", "Url=a=b"], {"MsgType": "video", "Url": "a=b"}),
    (["--field", "MsgId=1"], {"MsgId": "1"}),
    (["--field", "ToUserName=shop", "--field", "FromUserName=me"], {"ToUserName": "shop", "FromUserName": "me"}),
    (["--field", "CouponId"], {"CouponId": ""}),
], ids=str)
def test_draft_pushes_writes_what_is_asked_for(options: List[str], fields: Dict[str, str]) -> None:
    written = write(*options)[0].fields
    assert {name: written.get(name) for name in fields} == fields


def test_draft_pushes_gives_every_message_an_id_of_64_bits() -> None:
    ids = {int(message.msg_id or 0) for message in write("--count", 50)}
    assert len(ids) == 50
    assert 2 ** 62 <= min(ids) <= max(ids) < 2 ** 63


def test_draft_pushes_gives_every_event_a_second_of_its_own() -> None:
    events = write("--event", "x", "--count", 5)
    assert [event.create_time - events[-1].create_time for event in events] == [-4, -3, -2, -1, 0]
    assert {event.msg_id for event in events} == {None}


# ---- Signed, sealed


def platform(**settings: str) -> Platform:
    """Plays the platform in the second in which a `World` stands."""
    return Platform(Settings(token=TOKEN, **settings), lambda: NOW, os.urandom)


def as_request(query: Dict[str, str], body: bytes) -> Request:
    """What a server makes of a push."""
    return Request("POST", "/", urlencode(query), body)


def test_platform_signs_what_the_endpoint_takes() -> None:
    world = World(token=TOKEN, max_age=10)
    query, body = platform().push(encode_xml({"MsgId": 1}), encode_xml)
    assert world.ask(as_request(query, body)).status == 200
    assert world.ask(as_request({}, body)).status == 403


def test_platform_shakes_hands_with_the_endpoint() -> None:
    query, body = platform().handshake()
    response = World(token=TOKEN, max_age=10).ask(as_request(query, body))
    assert (response.status, response.body) == (200, query["echoStr"].encode())


@pytest.mark.parametrize("encode", [encode_xml, encode_json])
def test_platform_seals_what_the_endpoint_takes(encode: kfserver.Encode) -> None:
    world = World(token=TOKEN, aes_key=AES_KEY, app_id="app", max_age=10)
    query, body = platform(aes_key=AES_KEY, app_id="app").push(encode({"Content": "你好", "MsgId": 1}), encode)
    assert world.ask(as_request(query, body)).status == 200
    assert [message.content for message in world.submitted] == ["你好"]


# ---- Answers


@pytest.mark.parametrize(("answer", "connections"), [
    (SUCCESS, 1),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 1),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nsuc\r\n4;x=y\r\ncess\r\n0\r\nX: y\r\n\r\n", 1),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\nConnection: close\r\n\r\nsuccess", 3),
    (b"HTTP/1.0 200 OK\r\nContent-Length: 7\r\n\r\nsuccess", 3),
    (Farewell(b"HTTP/1.1 200 OK\r\n\r\nsuccess"), 3),
], ids=str)
def test_push_understands_an_answer(answer: bytes, connections: int) -> None:
    with ScriptedReceiver(answer) as other:
        assert push(other.url, "--count", 3) == 0
        assert len(other.requests) == 3
        assert len(other.connections) == connections


def test_push_understands_an_answer_that_comes_byte_by_byte_or_ends_with_the_connection() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(8)
        thread = threading.Thread(target=_answer_slowly, args=(listener,), daemon=True)
        thread.start()
        assert push(f"http://127.0.0.1:{listener.getsockname()[1]}/") == 0
        thread.join(PATIENCE)


def _answer_slowly(listener: socket.socket) -> None:
    with listener.accept()[0] as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        read_request(connection)
        for byte in b"HTTP/1.0 200 OK\r\nServer: slow\r\n\r\nsuccess":
            connection.sendall(bytes((byte,)))


@pytest.mark.parametrize(("answer", "told"), [
    (b"HTTP/1.1 503 Busy\r\nContent-Length: 2\r\n\r\nno", "503 no\nnot answered: refused 503"),
    (b"HTTP/1.1 204 OK\r\n\r\n", "204 (nothing)\nnot answered: refused 204"),
    (b"HTTP/1.1 503 Busy\r\nContent-Length: 7\r\n\r\nsuccess", "503 success\nnot answered: refused 503"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\nSuccess", "200 Success\nnot answered: 200 with a wrong body"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nsuccess\n", "200 success\nnot answered: 200 with a wrong body"),
    (Farewell(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n"), "not answered: IncompleteRead(0 bytes read"),
    (b"", "not answered: Remote end closed connection without response"),
    (b"nonsense\r\n\r\n", "not answered: nonsense"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 70000\r\n\r\n" + b"x" * 70000, "not answered: 200 with a wrong body"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20000, "not answered: got more than 100 headers"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n\x1b[1m\xff\r\nx", "200 \\x1b[1m\\xff\n< 200 x\nnot answered"),
], ids=["503", "204", "503 success", "Success", "success and a line", "cut off", "hangs up", "not HTTP", "long body",
        "long head", "controls"])
def test_push_sends_again_what_was_not_answered(
        answer: bytes, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedReceiver(answer, SUCCESS) as other:
        assert push(other.url) == 0
        assert len(other.requests) == 2
        assert other.requests[0] == other.requests[1]
    shown = capsys.readouterr().out
    assert told in shown
    assert "try 2 of 4 in 0.01 s\n< 200 success\nanswered, after" in shown


@pytest.mark.parametrize("answer", [None, SUCCESS[:-1]])
def test_push_gives_up_after_three_retries(answer: Optional[bytes], capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedReceiver(answer) as other:
        assert push(other.url, answer_seconds=IMPATIENT) == 1
    assert capsys.readouterr().out.count("not answered: no answer in 0.02 s") == 4


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 413, 429])
def test_push_sends_once_what_will_get_the_same_answer_again(status: int, capsys: pytest.CaptureFixture[str]) -> None:
    with ScriptedReceiver(f"HTTP/1.1 {status} No\r\nContent-Length: 0\r\n\r\n".encode()) as other:
        assert push(other.url) == 1
        assert len(other.requests) == 1
    assert "not sent again: the answer would be the same\n" in capsys.readouterr().out


def test_push_opens_a_connection_anew_when_the_receiver_hangs_up_instead_of_answering() -> None:
    with ScriptedReceiver(SUCCESS, b"", SUCCESS) as other:
        assert push(other.url, "--count", 3) == 0
        assert len(other.requests) == 4


def test_push_opens_a_connection_anew_when_the_receiver_has_left_between_two_pushes() -> None:
    # One that leaves later, when the next push is under way already, is sent that push again.
    with ScriptedReceiver(Farewell(SUCCESS)) as other:
        assert push(other.url, "--count", 3) == 0
        assert len(set(other.requests)) == 3


def test_push_sends_again_at_once_when_the_answer_counts_as_lost_and_else_after_a_pause() -> None:
    with ScriptedReceiver(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", SUCCESS) as other:
        started = time.monotonic()
        assert push(other.url, "--count", 2, "--repeat", 100, pause_seconds=0.1) == 0
        assert time.monotonic() - started >= 0.1
        first, second = other.requests[0], other.requests[-1]
        assert other.requests == [first, first, first, second, second]


def test_push_sends_what_the_receiver_does_not_take_at_once(tmp_path: pathlib.Path) -> None:
    packet = encode_json({"Content": "x" * 5_000_000, "MsgId": 1})
    (tmp_path / "packet").write_bytes(packet)
    with receiver(max_body=6_000_000) as running:
        assert push(url_of(running), "--file", tmp_path / "packet") == 0
        assert [each.body for each in running.requests] == [packet]


# ---- One push


def test_push_shows_request_and_answer(kf: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(url_of(kf) + "kf?a=b", "--text", "你好", "--json") == 0
    shown = capsys.readouterr().out.split("\n")
    assert shown[0] == "> POST /kf?a=b"
    assert shown[2] == "> {"
    assert '>   "Content": "你好",' in shown
    assert shown[-3] == "< 200 success"
    assert shown[-2].startswith("answered, after ")
    assert [(each.path, each.query) for each in kf.requests] == [("/kf", "a=b")]


def test_push_shows_what_is_sealed_and_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    with receiver(token=TOKEN, aes_key=AES_KEY, app_id="app") as running:
        assert push(url_of(running), "--token", TOKEN, "--aes-key", AES_KEY, "--app-id", "app") == 0
    shown = capsys.readouterr().out
    assert "\nsealed in it:\n| <xml>\n" in shown
    assert "|    <Content><![CDATA[hello]]></Content>\n" in shown
    assert TOKEN not in shown
    assert AES_KEY not in shown


@pytest.mark.parametrize("form", [[], ["--json"]], ids=str)
@pytest.mark.parametrize("options", [[], ["--handshake"], ["--event", "x"], ["--image", "https://kf/"]], ids=str)
def test_push_plays_safe_mode(form: List[str], options: List[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KF_TOKEN", TOKEN)
    monkeypatch.setenv("KF_AES_KEY", AES_KEY)
    monkeypatch.setenv("KF_APP_ID", "app")
    with receiver(token=TOKEN, aes_key=AES_KEY, app_id="app", max_age=60) as running:
        assert push(url_of(running), *form, *options) == 0


@pytest.mark.parametrize("options", [[], ["--handshake"]], ids=str)
def test_push_signs_with_the_token(options: List[str], capsys: pytest.CaptureFixture[str]) -> None:
    with receiver(token=TOKEN, max_age=60) as running:
        assert push(url_of(running), "--token", TOKEN, *options) == 0
        assert push(url_of(running), "--token", "another", *options) == 1
    shown = capsys.readouterr().out
    assert shown.count("push with the receiver's own --token") == 1
    assert shown.count("not answered: refused 403") == 1


def test_push_takes_only_the_echo_for_an_answer_to_a_handshake() -> None:
    with ScriptedReceiver(SUCCESS) as other:
        assert push(other.url, "--handshake") == 1


def test_push_sends_a_file_as_it_is(kf: Receiver, tmp_path: pathlib.Path) -> None:
    packet = b" \xef\xbb\xbf{\xff not even JSON"
    (tmp_path / "packet").write_bytes(packet)
    assert push(url_of(kf), "--file", tmp_path / "packet") == 1
    assert [each.body for each in kf.requests] == [packet]


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:{port}/", "http://no.such.host.invalid/", "http://a..b/", "https://127.0.0.1:{port}/"])
def test_push_says_that_it_reaches_nobody(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(SettingsError, match=r"cannot reach http.*; start the receiver, or correct the URL"):
            push(url.format(port=bound.getsockname()[1]))
    assert capsys.readouterr().out.count("not answered") == 1


def test_push_sends_again_when_the_receiver_is_away_for_a_while(kf: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, tries = kfserver.HttpClient.exchange, []

    def fail_at_second(client: kfserver.HttpClient, *arguments: Any) -> Any:
        tries.append(arguments)
        if len(tries) == 2:
            raise ConnectionRefusedError
        return exchange(client, *arguments)
    monkeypatch.setattr(kfserver.HttpClient, "exchange", fail_at_second)
    assert push(url_of(kf), "--count", 2) == 0
    assert (len(tries), len(kf.requests)) == (3, 2)


@pytest.mark.parametrize(("options", "told"), [
    (["--count", "0"], "--count takes a whole number from 1, and --repeat one from 0 to 100"),
    (["--repeat", "101"], "--count takes a whole number from 1, and --repeat one from 0 to 100"),
    (["--file", "x", "--field", "a=b"], "leave out --field, or --file"),
    (["--file", "/no/packet"], "cannot read /no/packet: No such file or directory"),
    (["--aes-key", AES_KEY], "--aes-key (KF_AES_KEY) needs --token and --app-id too"),
    (["--aes-key", "short", "--token", "t", "--app-id", "a"], "--aes-key (KF_AES_KEY) takes the 43"),
], ids=str)
def test_push_names_a_bad_option_before_it_sends(kf: Receiver, options: List[str], told: str) -> None:
    with pytest.raises(SettingsError) as error:
        push(url_of(kf), *options)
    assert told in str(error.value)
    assert kf.requests == []


@pytest.mark.parametrize(("options", "told"), [
    (["--count", "1.5"], "argument --count: invalid int value: '1.5'"),
    (["--text", "", "--image", ""], "argument --image: not allowed with argument --text"),
    (["--event", "x", "--handshake"], "argument --handshake: not allowed with argument --event"),
], ids=str)
def test_build_push_parser_refuses(options: List[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        build_push_parser().parse_args(["http://kf/", *options])
    assert told in capsys.readouterr().err


# ---- Many pushes


def sums_of(shown: str) -> str:
    """The only line that was shown, without the seconds at its end."""
    assert re.fullmatch(r".*, \d+\.\d\d s\n", shown)
    return shown.rpartition(", ")[0]


@pytest.mark.parametrize(("percent", "repeated"), [(0, 0), (10, 5), (100, 50)])
def test_push_sends_many_and_tells_the_sums(
        kf: Receiver, percent: int, repeated: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(url_of(kf), "--count", 50, "--repeat", percent) == 0
    assert sums_of(capsys.readouterr().out) == f"sent: {50 + repeated}, answered: 50, repeated: {repeated}"
    ids = [message.msg_id for message in messages_of(kf)]
    assert (len(ids), len(set(ids))) == (50 + repeated, 50)


def test_push_repeats_one_message_and_shows_it(kf: Receiver, capsys: pytest.CaptureFixture[str]) -> None:
    assert push(url_of(kf), "--repeat", "100") == 0
    assert re.search(r"< 200 success\nanswered, after .* ms\nsent again, as if that answer had been lost\n"
                     r"< 200 success\nanswered, after .* ms\n$", capsys.readouterr().out)
    assert len(kf.requests) == 2


@pytest.mark.parametrize("percent", [0, 1, 33, 50, 99, 100])
def test_is_lost_for_so_many_of_a_hundred(percent: int) -> None:
    assert sum(is_lost(number, percent) for number in range(100)) == percent
    assert sum(is_lost(number, percent) for number in range(300, 400)) == percent


def test_push_keeps_one_connection() -> None:
    with ScriptedReceiver(SUCCESS) as other:
        assert push(other.url, "--count", 20) == 0
        assert len(other.connections) == 1


def test_push_counts_refusals_by_reason(capsys: pytest.CaptureFixture[str]) -> None:
    busy, gone = [b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % status for status in (503, 404)]
    with ScriptedReceiver(gone, busy, busy, SUCCESS, gone) as other:
        assert push(other.url, "--count", 3) == 1
    advice, sums = capsys.readouterr().out.split("\n", 1)
    assert advice == "refused 404: the receiver takes pushes at another path, its --path: put that into the URL"
    assert sums_of(sums) == "sent: 5, answered: 1, repeated: 0, refused 404: 2, refused 503: 2"


def test_push_tells_the_sums_after_an_interruption(
        kf: Receiver, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(number: int, percent: int) -> bool:
        if number == 2:
            raise KeyboardInterrupt
        return False
    monkeypatch.setattr(kfserver, "is_lost", interrupted)
    assert kfserver.main(["push", url_of(kf), "--count", "5"]) == 130
    assert sums_of(capsys.readouterr().out) == "sent: 2, answered: 2, repeated: 0"


# ---- What is shown


@pytest.mark.parametrize(("data", "shown"), [
    (b"a\r\n\tb", "a\n\\tb"), ("你好".encode(), "你好"), (b"\xff\x00\x1b[1m\x7f", "\\xff\\x00\\x1b[1m\\x7f"),
    ("\x9b1m".encode(), "\\x9b1m"), (b"a\rb", "a\\rb"), (b"x" * 4001, "x" * 4000 + "… (1 more)")], ids=repr)
def test_quote_bytes(data: bytes, shown: str) -> None:
    assert quote_bytes("", data) == "\n".join(f" {line}".rstrip() for line in shown.split("\n"))


def test_build_push_parser_has_help_that_fits_a_screen() -> None:
    lines = build_push_parser().format_help().splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 80


# ---- Other transports


def test_push_by_tls_checks_the_certificate(certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    told = "CERTIFICATE_VERIFY_FAILED.*--insecure takes any"
    with receiver(**certificate.settings()) as running:
        url = url_of(running).replace("http", "https")
        with pytest.raises(SettingsError, match=told):
            push(url)
        assert running.requests == []
        assert push(url, "--insecure", "--count", 50) == 0
        monkeypatch.setenv("SSL_CERT_FILE", certificate.chain)
        assert push(url) == 0
        with pytest.raises(SettingsError, match=told):
            push(url.replace("127.0.0.1", "127.1"))


@pytest.mark.parametrize(("spoken", "wrong"), [("http", "https"), ("https", "http")])
@pytest.mark.parametrize("count", [1, 3])
def test_push_says_that_the_scheme_is_wrong(spoken: str, wrong: str, count: int, certificate: Certificate) -> None:
    told = f"the receiver speaks {spoken} at this port, not {wrong}: push to {spoken}://"
    settings = certificate.settings() if spoken == "https" else {}
    with receiver(**settings) as running, pytest.raises(SettingsError, match=told):
        push(url_of(running).replace("http", wrong), "--count", count)


@pytest.mark.parametrize("spoken", [
    SUCCESS, b"HTTP/1.1 400 No\r\nContent-Length: 0\r\n\r\n", b"", b"nonsense\r\n\r\n"], ids=str)
def test_push_does_not_blame_a_scheme_that_is_right(spoken: bytes) -> None:
    with ScriptedReceiver(spoken) as other:
        assert push(other.url) == (0 if spoken == SUCCESS else 1)


def test_push_as_a_program_on_a_screen_without_the_characters(kf: Receiver) -> None:
    command = [sys.executable, str(ROOT / "kfserver.py"), "push", url_of(kf)]
    done = subprocess.run([*command, "--text", "你"], capture_output=True, text=True, timeout=PATIENCE,
                          env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "<![CDATA[\\u4f60]]>" in done.stdout
    assert "\n< 200 success\nanswered, after " in done.stdout
    assert [message.content for message in messages_of(kf)] == ["你"]
