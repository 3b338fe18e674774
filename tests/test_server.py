"""KfServer: the whole receiver from a push to its handler, embedded in a program as the README shows it."""

from __future__ import annotations

import contextlib
import gc
import http.client
import io
import logging
import pathlib
import re
import socket
import sys
import threading
import types
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple
from urllib.parse import urlencode, urlsplit
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
from support import PATIENCE, Certificate, Client, Shop, local, post, push, wait_until

from kfserver import HandlerRegistry, KfServer, Message, PushServer, Request, Settings, SettingsError, sign

TOKEN = "a-token"


@pytest.fixture(autouse=True)
def _stop_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard library's servers look twice a second whether they shall stop; here, a hundred times."""
    serve = PushServer.serve_forever
    monkeypatch.setattr(PushServer, "serve_forever", lambda server, poll_interval=0.5: serve(server, 0.01))


def ask(server: KfServer, body: bytes) -> Tuple[int, bytes]:
    """Push ``body`` to the server's address with the standard library's client."""
    address = urlsplit(server.url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=PATIENCE)
    try:
        connection.request("POST", address.path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


# ---- Start and stop


def test_kf_server_serves_inside_a_with_block(shop: Shop) -> None:
    with KfServer(shop.registry, local()) as server:
        assert ask(server, push(content="hello")) == (200, b"success")
        assert server.join(PATIENCE)
    assert shop.served == ["hello"]


def test_kf_server_lets_go_of_a_message_that_is_through(shop: Shop, collector_off: None) -> None:
    with KfServer(shop.registry, local()) as server:
        before = count_messages()
        for number in range(20):
            server.feed(push(number=number))
        assert server.join(PATIENCE)
        wait_until(lambda: count_messages() <= before)


@pytest.fixture
def collector_off() -> Iterator[None]:
    """Without the garbage collector: what holds itself stays."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def count_messages() -> int:
    return sum(type(thing) is Message for thing in gc.get_objects())


def test_kf_server_start_and_stop(shop: Shop) -> None:
    server = KfServer(shop.registry, local(path="/kf"))
    assert server.port == 0
    assert server.start() is server
    assert server.url == f"http://127.0.0.1:{server.port}/kf"
    ask(server, push(content="hello"))
    assert server.stop() == []
    assert shop.served == ["hello"]
    with pytest.raises(ConnectionRefusedError):
        ask(server, push())
    assert server.stop() == []  # once more does no harm


def test_kf_server_listens_on_ipv6(shop: Shop) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with KfServer(shop.registry, local(host="::1")) as server:
        assert server.url == f"http://[::1]:{server.port}/"
        assert ask(server, push()) == (200, b"success")


def test_kf_server_stop_tells_what_was_left_undone(shop: Shop) -> None:
    shop.open.clear()
    server = KfServer(shop.registry, Settings(grace=0.0))
    server.feed(push(number=1))
    server.feed(push(number=2))
    assert server.stop() == ["app/user/text/1", "app/user/text/2"]


def test_kf_server_stop_takes_no_more_messages(shop: Shop) -> None:
    server = KfServer(shop.registry)
    server.stop()
    assert server.feed(push()).status == 503
    assert shop.served == []


def test_kf_server_start_raises_when_the_port_is_in_use(shop: Shop) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"cannot listen on 127\.0\.0\.1 port {port}: .*--port"):
            KfServer(shop.registry, local(port=port)).start()


def test_kf_server_start_raises_when_the_address_is_not_ours(shop: Shop) -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 192\.0\.2\.1 port 0: .*--host"):
        KfServer(shop.registry, local(host="192.0.2.1")).start()  # an address for documentation (RFC 5737)


def test_kf_server_speaks_plain_http_at_its_admin_address(
        shop: Shop, certificate: Certificate, tmp_path: pathlib.Path) -> None:
    for mode in (certificate.settings(), {"unix": str(tmp_path / "kf.sock")}):
        with KfServer(shop.registry, local(admin="127.0.0.1:0", **mode)) as server, Client(server.admin_port) as client:
            assert client.ask(b"GET /healthz HTTP/1.1\r\nHost: kf\r\n\r\n").status == 200


# ---- feed


@pytest.mark.parametrize("settings", [
    pytest.param(Settings(), id="by default"),
    pytest.param(Settings(token=TOKEN, max_age=60.0), id="signed"),
    pytest.param(Settings(path="/kf"), id="to the one path"),
])
def test_kf_server_feed_pushes_without_a_socket(shop: Shop, settings: Settings) -> None:
    server = KfServer(shop.registry, settings)
    answer = server.feed(push(content="hello"))
    assert (answer.status, answer.body) == (200, b"success")
    assert server.join(PATIENCE)
    assert shop.served == ["hello"]


def test_kf_server_feed_answers_as_the_server_does(shop: Shop) -> None:
    server = KfServer(shop.registry, Settings(max_body=200))
    assert server.feed(b"neither XML nor JSON").status == 400
    assert server.feed(b"x" * 201).status == 413


# ---- Each message once, in order, and never in the way of its answer


def test_kf_server_answers_before_the_handler_is_through(shop: Shop) -> None:
    shop.open.clear()
    with KfServer(shop.registry, local()) as server:
        assert ask(server, push(number=1, content="one")) == (200, b"success")
        wait_until(lambda: shop.served == ["one"])
        assert ask(server, push(number=2, content="two")) == (200, b"success")
        assert ask(server, push(number=1, content="one")) == (200, b"success")  # again, while it is being handled
        assert shop.served == ["one"]
        shop.open.set()
        assert server.join(PATIENCE)
    assert shop.served == ["one", "two"]


def test_kf_server_takes_another_key_for_what_is_the_same(shop: Shop) -> None:
    server = KfServer(shop.registry, dedup_key=lambda message: message.content)
    for number, content in enumerate(["a", "b", "a", "c", "b"]):
        assert server.feed(push(number=number, content=content)).body == b"success"
    assert server.join(PATIENCE)
    assert shop.served == ["a", "b", "c"]


@pytest.mark.parametrize("wrong", [
    lambda message: message.fields["missing"], lambda message: None, lambda message: 7, lambda message: "\ud83d"],
    ids=["raises", "None", "a number", "half a character"])
def test_kf_server_refuses_a_push_without_a_key_and_no_other_of_its_round(
        shop: Shop, wrong: Any, caplog: pytest.LogCaptureFixture) -> None:
    server = KfServer(shop.registry,
                      dedup_key=lambda message: message.content if len(message.content) == 3 else wrong(message))
    answers = server.endpoint.handle_all([
        Request("POST", "/", "", push(number=number, content=content))
        for number, content in enumerate(["one", "secret", "two"])])
    assert [answer.status for answer in answers] == [200, 503, 200]
    assert server.join(PATIENCE)
    assert sorted(shop.served) == ["one", "two"]
    assert "dedup_key failed" in caplog.text and "secret" not in caplog.text


@pytest.mark.parametrize("mode", [{}, {"token": TOKEN}, {"token": TOKEN, "app_id": "app", "aes_key": "a" * 43},
                                  {"token": TOKEN, "app_id": "app", "aes_key": "a" * 43, "max_age": 60.0}], ids=str)
def test_kf_server_feed_pushes_in_every_mode(shop: Shop, mode: Dict[str, Any]) -> None:
    server = KfServer(shop.registry, Settings(**mode))
    assert server.feed(push()).body == b"success"
    assert server.join(PATIENCE)
    assert shop.served == ["hi"]


def test_kf_server_leaves_no_claim_on_what_it_had_no_room_for(shop: Shop) -> None:
    shop.open.clear()
    server = KfServer(shop.registry, Settings(workers=1, queue_size=1))
    server.feed(push(number=1, content="one"))
    wait_until(lambda: shop.served)
    server.feed(push(number=2, content="two"))
    refused = server.feed(push(number=3, content="three"))
    assert (refused.status, dict(refused.headers)["Retry-After"]) == (503, "1")
    shop.open.set()
    assert server.join(PATIENCE)
    assert server.feed(push(number=3, content="three")).body == b"success"
    assert server.join(PATIENCE)
    assert shop.served == ["one", "two", "three"]


class Crowd:
    """Clients that push at once, each for senders of its own, and each on two connections."""

    CLIENTS, SENDERS, PUSHES = 16, 5, 25

    def __init__(self, port: int) -> None:
        self._port = port
        self._start = threading.Barrier(self.CLIENTS)
        self.answers: List[Tuple[int, int]] = []

    def push_all(self) -> None:
        """Push everything, half of it twice."""
        clients = [threading.Thread(target=self._push, args=(number,)) for number in range(self.CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join(PATIENCE)

    def _push(self, client: int) -> None:
        self._start.wait(PATIENCE)
        with Client(self._port) as one, Client(self._port) as other:
            for number in range(self.PUSHES):
                for sender in range(self.SENDERS):
                    request = post(push(f"{client}-{sender}", number, str(number)))
                    # Both copies are under way before either is answered, and before the sender's next push is sent.
                    copies = [one, other] if number % 2 else [one]
                    for connection in copies:
                        connection.send(request)
                    self.answers.append((len(copies), sum(
                        connection.read_answer().body == b"success" for connection in copies)))


def test_kf_server_hands_each_message_over_once_and_in_order() -> None:
    registry, handled = HandlerRegistry(), []

    @registry.on("text")
    def keep(message: Message) -> None:
        handled.append((message.from_user_name, int(message.content)))
    with KfServer(registry, local()) as server:
        crowd = Crowd(server.port)
        crowd.push_all()
        assert server.join(PATIENCE)
    # A copy that overtakes the first by a hair is told to come again: the first could still be refused.
    assert len(crowd.answers) == 2000
    assert all(1 <= successes <= copies for copies, successes in crowd.answers)
    senders = {f"{client}-{sender}" for client in range(crowd.CLIENTS) for sender in range(crowd.SENDERS)}
    assert by_sender(handled) == {sender: list(range(crowd.PUSHES)) for sender in senders}


def by_sender(handled: List[Tuple[str, int]]) -> Dict[str, List[int]]:
    """The numbers that were handled, in order, for each sender."""
    numbers: Dict[str, List[int]] = {}
    for sender, number in handled:
        numbers.setdefault(sender, []).append(number)
    return numbers


# ---- Handlers that fail


class Failure(NamedTuple):
    """What `on_error` was told."""

    content: str
    error: BaseException


class BrokenShop(Shop):
    """A shop whose handler fails while it is broken, and whose failures are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = True
        self.failures: List[Failure] = []
        self.registry.on_error(self._fail)

    def _serve(self, message: Message) -> None:
        if self.broken:
            raise ZeroDivisionError("the till is empty")
        super()._serve(message)

    def _fail(self, message: Message, error: BaseException) -> None:
        self.failures.append(Failure(message.content, error))


def test_kf_server_gives_back_the_claim_on_what_failed_for_good() -> None:
    shop = BrokenShop()
    server = KfServer(shop.registry, Settings(tries=1))
    server.feed(push(content="hello"))
    assert server.join(PATIENCE)
    shop.broken = False
    assert server.feed(push(content="hello")).body == b"success"
    assert server.join(PATIENCE)
    assert shop.served == ["hello"]


def test_kf_server_runs_on_error_when_the_last_try_failed() -> None:
    shop = BrokenShop()
    server = KfServer(shop.registry, Settings(tries=1))
    server.feed(push(content="hello"))
    assert server.join(PATIENCE)
    assert [(failure.content, type(failure.error)) for failure in shop.failures] == [("hello", ZeroDivisionError)]


def test_kf_server_logs_a_failure_once_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    server = KfServer(BrokenShop().registry, Settings(tries=1))
    server.feed(push(content="my secret"))
    assert server.join(PATIENCE)
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "key=app/user/text/1" in errors[0].getMessage()
    assert "raise ZeroDivisionError" in caplog.text
    assert re.search(r"KfError: ZeroDivisionError at test_server\.py:\d+$", caplog.text, re.M)


def test_kf_server_logs_no_text_of_an_error_for_it_may_be_the_users(caplog: pytest.LogCaptureFixture) -> None:
    registry = HandlerRegistry()
    registry.on("text")(lambda message: int(message.content))
    registry.on_error(lambda message, error: {}[message.content])
    server = KfServer(registry, Settings(tries=1))
    server.feed(push(content="my secret"))
    assert server.join(PATIENCE)
    assert "ValueError at test_server.py" in caplog.text and "KeyError at test_server.py" in caplog.text
    assert "my secret" not in caplog.text


def test_kf_server_survives_an_on_error_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    shop = BrokenShop()

    @shop.registry.on_error
    def fail_too(message: Message, error: BaseException) -> None:
        raise KeyError("no one to tell")
    server = KfServer(shop.registry, Settings(tries=1, workers=1))
    server.feed(push(number=1))
    assert server.join(PATIENCE)
    assert "on_error failed: key=app/user/text/1" in caplog.text
    shop.broken = False
    server.feed(push(number=2, content="next"))
    assert server.join(PATIENCE)
    assert shop.served == ["next"]


def test_kf_server_logs_two_lines_for_a_message_and_nothing_private(
        caplog: pytest.LogCaptureFixture, shop: Shop) -> None:
    caplog.set_level(logging.INFO, "kfserver")
    server = KfServer(shop.registry, Settings(token=TOKEN))
    server.feed(push(content="my secret"))
    assert server.join(PATIENCE)
    assert [record.name for record in caplog.records] == ["kfserver"] * 2
    pushed, handled = sorted(caplog.messages, reverse=True)
    assert pushed.startswith("push type=text key=app/user/text/1 outcome=accepted ms=")
    assert re.fullmatch(r"handled key=app/user/text/1 handler=_serve ms=\d+\.\d\d replies=0", handled)
    assert "secret" not in caplog.text
    assert TOKEN not in caplog.text


# ---- wsgi


class WsgiAnswer(NamedTuple):
    """What a WSGI application answered."""

    status: int
    headers: Dict[str, str]
    body: bytes


def call_wsgi(application: Any, body: bytes = b"", **environ: Any) -> WsgiAnswer:
    """Call an application as a server does."""
    complete: Dict[str, Any] = {"REQUEST_METHOD": "POST", "CONTENT_LENGTH": str(len(body)), "QUERY_STRING": "",
                                **environ}
    complete["wsgi.input"] = io.BytesIO(body)
    setup_testing_defaults(complete)
    begun: List[Tuple[int, Dict[str, str]]] = []

    def start_response(status: str, headers: List[Tuple[str, str]], exc_info: Any = None) -> Any:
        begun.append((int(status.split()[0]), dict(headers)))
    chunks = application(complete, start_response)
    try:
        text = b"".join(chunks)
    finally:
        if hasattr(chunks, "close"):
            chunks.close()
    return WsgiAnswer(*begun[0], text)


def signed_query() -> str:
    """The query of a push that is signed with the token."""
    return urlencode({"timestamp": "1482048670", "nonce": "n", "signature": sign(TOKEN, "1482048670", "n")})


@pytest.mark.parametrize(("body", "environ", "status", "text"), [
    pytest.param(push(), {}, 200, b"success", id="push"),
    pytest.param(b"?", {}, 400, None, id="bad body"),
    pytest.param(push(), {"QUERY_STRING": ""}, 403, b"forbidden\n", id="unsigned"),
    pytest.param(push(), {"PATH_INFO": "/other"}, 404, None, id="other path"),
    pytest.param(b"", {"REQUEST_METHOD": "DELETE"}, 405, None, id="other method"),
    pytest.param(b"x" * 301, {}, 413, None, id="too large"),
    pytest.param(b"", {"CONTENT_LENGTH": ""}, 400, None, id="no length"),
    pytest.param(b"", {"REQUEST_METHOD": "GET"}, 200, None, id="GET"),
    pytest.param(b"", {"REQUEST_METHOD": "HEAD"}, 200, b"", id="HEAD"),
    pytest.param(b"", {"REQUEST_METHOD": "HEAD", "PATH_INFO": "/other"}, 404, b"", id="HEAD refused"),
    pytest.param(b"echoStr=%20hi&" + signed_query().encode(), {}, 200, b" hi", id="handshake"),
])
def test_kf_server_wsgi_answers_as_the_server_does(
        shop: Shop, body: bytes, environ: Dict[str, str], status: int, text: Optional[bytes]) -> None:
    server = KfServer(shop.registry, Settings(token=TOKEN, path="/site/kf", max_body=300))
    here = {"SCRIPT_NAME": "/site", "PATH_INFO": "/kf", "QUERY_STRING": signed_query(), **environ}
    # The standard library's judge of WSGI, which raises for every breach of PEP 3333.
    answer = call_wsgi(validator(server.wsgi), body, **here)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.status == status
    if text is not None:
        assert answer.body == text
    if environ.get("REQUEST_METHOD") != "HEAD":
        assert answer.headers["Content-Length"] == str(len(answer.body))


def test_kf_server_wsgi_hands_messages_over_once(shop: Shop) -> None:
    server = KfServer(shop.registry)
    for _ in range(3):
        assert call_wsgi(validator(server.wsgi), push(content="hello")).body == b"success"
    assert server.join(PATIENCE)
    assert shop.served == ["hello"]


def test_kf_server_wsgi_tells_when_to_come_again(shop: Shop) -> None:
    server = KfServer(shop.registry)
    server.stop()
    answer = call_wsgi(validator(server.wsgi), push())
    assert answer.status == 503
    assert answer.headers["Retry-After"] == "1"


@pytest.mark.parametrize(("body", "status", "contents"), [(push(), 200, ["hi"]), (b"x" * 301, 413, [])])
def test_kf_server_wsgi_reads_a_chunked_body_to_the_end_that_its_server_knows(
        shop: Shop, body: bytes, status: int, contents: List[str]) -> None:
    # gunicorn and cheroot decode it, and say so; a read at its end gives nothing (PEP 3333 knows only lengths).
    server = KfServer(shop.registry, Settings(max_body=300))
    environ: Dict[str, Any] = {"CONTENT_LENGTH": "", "wsgi.input_terminated": True}
    assert call_wsgi(server.wsgi, body, **environ).status == status
    assert server.join(PATIENCE)
    assert shop.served == contents


@pytest.mark.parametrize(("path", "path_info"), [
    ("/kf", "/kf"), ("/kf%20x", "/kf x"), ("/%E5%AE%A2", "/\xe5\xae\xa2"), ("/a%2520b", "/a%20b")])
def test_kf_server_wsgi_knows_its_path_decoded(shop: Shop, path: str, path_info: str) -> None:
    assert call_wsgi(KfServer(shop.registry, Settings(path=path)).wsgi, push(), PATH_INFO=path_info).status == 200


def test_kf_server_wsgi_warns_once_that_several_processes_know_their_own_repeats_only(
        shop: Shop, caplog: pytest.LogCaptureFixture) -> None:
    server = KfServer(shop.registry)
    environ: Dict[str, Any] = {"wsgi.multiprocess": True}
    for number in (1, 2):
        assert call_wsgi(server.wsgi, push(number=number), **environ).status == 200
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "redis=" in caplog.text


@pytest.mark.parametrize(("options", "works"), [
    ({}, False), ({b"processes": b"4"}, False), ({b"enable-threads": True}, True), ({"threads": "2"}, True)])
def test_kf_server_refuses_a_uwsgi_without_threads(
        options: Dict[Any, Any], works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    uwsgi = types.ModuleType("uwsgi")  # as uWSGI itself gives it to the programs that it runs
    monkeypatch.setattr(uwsgi, "opt", options, raising=False)
    monkeypatch.setitem(sys.modules, "uwsgi", uwsgi)
    with contextlib.nullcontext() if works else pytest.raises(SettingsError, match="--enable-threads"):
        KfServer(HandlerRegistry())


@pytest.mark.parametrize("length", ["abc", "-1", "+1", "1,1", "\xb2", "9" * 5000])
def test_kf_server_wsgi_refuses_a_length_that_is_no_number(shop: Shop, length: str) -> None:
    # Without the judge, which does not let a server pass such a length on. Not all servers are so careful.
    answer = call_wsgi(KfServer(shop.registry).wsgi, push(), CONTENT_LENGTH=length)
    assert answer.status == 400
