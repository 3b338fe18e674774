"""TLS and Unix sockets: the same server behind two other kinds of listeners.

The certificate is made by the openssl program, once, and is verified by every client here. Time limits are not waited
for: a test that needs one to be over puts the connection's deadline into the past.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import pathlib
import select
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import threading
import warnings
from typing import Any, Callable, Iterator, List, NamedTuple

import pytest
from support import PATIENCE, ROOT, Certificate, Client, Receiver, local, post, push, receiver, wait_until

import kfserver
from kfserver import HandlerRegistry, KfServer, SettingsError

GET = b"GET / HTTP/1.1\r\nHost: kf\r\n\r\n"
needs_openssl = pytest.mark.skipif(not shutil.which("openssl"), reason="there is no openssl program")
needs_unix = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no Unix sockets")


def openssl(folder: pathlib.Path, *arguments: str) -> None:
    """Run the openssl program in a folder."""
    subprocess.run(["openssl", *arguments], cwd=str(folder), check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=60)


class TlsClient(Client):
    """A client that speaks TLS and verifies the server."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(port)
        try:
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        except OSError:
            self.socket.close()
            raise

    def at_end(self) -> bool:
        """Whether the server hangs up; Python 3.7 does not yet know what OpenSSL 3 calls that."""
        try:
            return super().at_end()
        except ssl.SSLError as error:
            return "unexpected eof" in str(error)


Connect = Callable[[], TlsClient]


class Scene(NamedTuple):
    """A server that speaks TLS, and what makes clients of it."""

    kf: Receiver
    connect: Connect


@contextlib.contextmanager
def scene(certificate: Certificate, **settings: Any) -> Iterator[Scene]:
    """A scene for the length of a block; its clients hang up at the end."""
    with receiver(**certificate.settings(), **settings) as kf, contextlib.ExitStack() as clients:
        yield Scene(kf, lambda: clients.enter_context(TlsClient(kf.server.server_port, certificate.client_context())))


@pytest.fixture
def here(certificate: Certificate) -> Iterator[Scene]:
    """A scene with the usual settings."""
    with scene(certificate) as made:
        yield made


@pytest.fixture
def kf(here: Scene) -> Receiver:
    """Its server."""
    return here.kf


@pytest.fixture
def connect(here: Scene) -> Connect:
    """What makes clients of it."""
    return here.connect


def let_time_run_out(kf: Receiver) -> bool:
    """As if every limit of time was over; whether nobody is left. To be repeated: bytes under way begin a new limit."""
    for connection in list(kf.server.connections):
        connection.deadline = 0.0
    kf.server._next_tick = 0.0
    return not kf.server.connections


def assert_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing was logged as an error, and no traceback."""
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR or record.exc_info]
    assert [record.getMessage() for record in errors] == []


# ---- TLS: pushes


@needs_openssl
def test_kf_server_serves_https(certificate: Certificate) -> None:
    with KfServer(HandlerRegistry(), local(**certificate.settings())) as server:
        assert server.url == f"https://127.0.0.1:{server.port}/"
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, timeout=PATIENCE,
                                                 context=certificate.client_context())
        with contextlib.closing(connection):
            connection.request("POST", "/", push())
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b"success")


@needs_openssl
def test_kf_server_finds_the_key_in_the_certificates_file(certificate: Certificate) -> None:
    server = KfServer(HandlerRegistry(), local(tls_cert=certificate.both))
    with server, TlsClient(server.port, certificate.client_context()) as client:
        assert client.ask(post(push())).body == b"success"


@needs_openssl
@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_kf_server_speaks_tls(kf: Receiver, certificate: Certificate, version: str) -> None:
    context = certificate.client_context()
    context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with TlsClient(kf.server.server_port, context) as client:
        assert client.socket.version() == version.replace("_", ".")  # type: ignore[attr-defined]
        assert client.ask(post(push())).body == b"success"


@needs_openssl
@pytest.mark.parametrize("version", ["TLSv1", "TLSv1_1"])
def test_kf_server_refuses_old_tls(
        here: Scene, certificate: Certificate, version: str, caplog: pytest.LogCaptureFixture) -> None:
    context = certificate.client_context()
    context.set_ciphers("ALL:@SECLEVEL=0")  # or a client of today would not even offer what is old
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
    with pytest.raises(ssl.SSLError, match="(?i)alert.protocol.version"):
        TlsClient(here.kf.server.server_port, context)
    assert here.connect().ask(post(push())).body == b"success"
    assert_no_errors(caplog)


@needs_openssl
@pytest.mark.parametrize("request_bytes", [
    pytest.param(post(push()), id="HTTP"),
    pytest.param(post(push()) * 1000, id="much HTTP"),
    pytest.param(b"\r\n", id="an empty line"),
    pytest.param(b"\x16\x03\x01\xff\xff" + b"\xff" * 100, id="nearly TLS"),
    pytest.param(b"\0" * 100, id="NULs"),
])
def test_kf_server_hangs_up_who_does_not_speak_tls(
        kf: Receiver, connect: Connect, request_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    client = kf.connect()
    client.send(request_bytes)
    with contextlib.suppress(OSError):  # the server has hung up already
        client.socket.shutdown(socket.SHUT_WR)
    wait_until(client.has_ended)
    assert kf.requests == []
    assert connect().ask(post(push())).body == b"success"
    assert_no_errors(caplog)


# ---- TLS: connections


@needs_openssl
def test_connection_keeps_a_connection(connect: Connect) -> None:
    client = connect()
    assert [client.ask(post(push(number=number))).body for number in range(5)] == [b"success"] * 5


@needs_openssl
def test_connection_answers_requests_that_come_at_once_in_order(kf: Receiver, connect: Connect) -> None:
    client = connect()
    client.send(post(push()) + GET + post(b"?") + post(push()))
    assert [client.read_answer().status for _ in range(4)] == [200, 200, 400, 200]
    assert len(kf.requests) == 4


@needs_openssl
def test_connection_closes_the_connection_when_it_is_asked_to(connect: Connect) -> None:
    client = connect()
    assert client.ask(post(push(), "Connection: close")).headers["connection"] == "close"
    assert client.at_end()


@needs_openssl
def test_connection_reads_a_body_of_many_records(kf: Receiver, connect: Connect) -> None:
    body = bytes(range(256)) * 4000
    connect().ask(post(body))
    assert kf.requests[0].body == body


@needs_openssl
def test_connection_reads_a_request_of_tiny_records(kf: Receiver, connect: Connect) -> None:
    client, request_bytes = connect(), post(push())
    for place in range(len(request_bytes)):
        client.send(request_bytes[place:place + 1])
    assert client.read_answer().body == b"success"


@needs_openssl
def test_connection_tells_a_client_to_continue(connect: Connect) -> None:
    client, request_bytes = connect(), post(push(), "Expect: 100-continue")
    head, blank, body = request_bytes.partition(b"\r\n\r\n")
    assert client.ask(head + blank).status == 100
    assert client.ask(body).body == b"success"


@needs_openssl
def test_connection_answers_what_it_refuses_and_reads_nothing_behind_it(kf: Receiver, connect: Connect) -> None:
    client = connect()
    client.send(b"POST / HTTP/1.1\r\nNo-Host: kf\r\n\r\n" + post(push()) * 3)
    answer = client.read_answer()
    assert (answer.status, answer.headers["connection"]) == (400, "close")
    assert client.at_end()
    assert kf.requests == []


# ---- TLS: who holds a connection


def silent(here: Scene) -> Client:
    """A client that says nothing."""
    return here.kf.connect()


def half_a_hello(here: Scene) -> Client:
    """A client that begins a handshake."""
    client = here.kf.connect()
    client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
    return client


def only_a_handshake(here: Scene) -> Client:
    """A client that has nothing to say after the handshake."""
    return here.connect()


def half_a_head(here: Scene) -> Client:
    """A client that stops in the head of a request."""
    client = here.connect()
    client.send(b"POST / HT")
    return client


def half_a_body(here: Scene) -> Client:
    """A client that stops in the body of a request."""
    client = here.connect()
    client.send(post(push())[:-5])
    return client


def kept(here: Scene) -> Client:
    """A client between two requests."""
    client = here.connect()
    client.ask(GET)
    return client


Hold = Callable[[Scene], Client]
ALL_HOLDS: List[Hold] = [silent, half_a_hello, only_a_handshake, half_a_head, half_a_body, kept]
HOLDS = pytest.mark.parametrize("hold", ALL_HOLDS, ids=lambda hold: hold.__name__)


def wait_for_handshakes(kf: Receiver, count: int) -> None:
    """Wait until so many connections are open, and in or behind their handshake."""
    wait_until(lambda: len(kf.server.connections) == count)


@needs_openssl
@HOLDS
def test_push_server_lets_nobody_block_others_and_sends_him_away_in_time(
        here: Scene, hold: Hold, caplog: pytest.LogCaptureFixture) -> None:
    holders = [hold(here) for _ in range(3)]
    wait_for_handshakes(here.kf, 3)
    assert here.connect().ask(post(push(), "Connection: close")).body == b"success"
    wait_for_handshakes(here.kf, 3)
    wait_until(lambda: let_time_run_out(here.kf))
    assert all(holder.at_end() for holder in holders)
    assert_no_errors(caplog)


@needs_openssl
@HOLDS
def test_push_server_makes_room_for_a_new_client(certificate: Certificate, hold: Hold) -> None:
    with scene(certificate, max_connections=2) as here:
        first, _ = hold(here), hold(here)
        wait_for_handshakes(here.kf, 2)
        assert here.connect().ask(post(push())).body == b"success"
        assert first.at_end()
        assert len(here.kf.server.connections) <= 2


@needs_openssl
def test_push_server_lets_nobody_in_while_all_shake_hands(
        certificate: Certificate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "HANDSHAKE_SECONDS", 600.0)
    with scene(certificate, max_connections=2) as here:
        shaking = [half_a_hello(here), half_a_hello(here)]
        wait_for_handshakes(here.kf, 2)
        late = here.kf.connect()
        wait_until(lambda: not here.kf.server._accepting)
        assert len(here.kf.server.connections) == 2
        monkeypatch.setattr(kfserver, "HANDSHAKE_SECONDS", 0.0)
        wait_until(lambda: any(client.has_ended() for client in shaking))
        late.socket.close()
        assert here.connect().ask(post(push())).body == b"success"


def flood(client: Client) -> None:
    """Ask until the server, whose answers nobody reads, takes no more."""
    client.socket.setblocking(False)
    while select.select([], [client.socket], [], 0.3)[1]:
        with contextlib.suppress(ssl.SSLWantWriteError):
            client.socket.send(GET * 100)


@needs_openssl
def test_push_server_makes_room_though_nobody_reads_his_answers(certificate: Certificate) -> None:
    with scene(certificate, max_connections=1) as here:
        flood(here.connect())
        assert here.connect().ask(post(push())).body == b"success"


@needs_openssl
@HOLDS
@pytest.mark.parametrize("leave", [lambda client: client.socket.close(), lambda client: client.reset()],
                         ids=["closed", "reset"])
def test_push_server_keeps_no_place_and_no_thread_for_a_client_that_vanishes(
        here: Scene, hold: Hold, leave: Callable[[Client], None], caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    for _ in range(5):
        clients = [hold(here) for _ in range(3)]
        wait_for_handshakes(here.kf, 3)
        for client in clients:
            leave(client)
        wait_until(lambda: len(here.kf.server.connections) == 0)
    assert threading.active_count() - before < 15  # those of the first clients have served the later ones
    assert_no_errors(caplog)


@needs_openssl
# Before 3.13, Python forgets to close the socket that it is making when it finds that the client is gone.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_push_server_keeps_no_place_for_a_client_that_is_gone_before_its_handshake(
        certificate: Certificate, caplog: pytest.LogCaptureFixture) -> None:
    with receiver(started=False, **certificate.settings()) as kf:
        for client in [kf.connect() for _ in range(20)]:
            client.reset()
        kf.start()
        with TlsClient(kf.server.server_port, certificate.client_context()) as client:
            assert client.ask(post(push(), "Connection: close")).body == b"success"
        wait_until(lambda: len(kf.server.connections) == 0)
    assert_no_errors(caplog)


@needs_openssl
def test_push_server_stops_with_clients_in_every_state(here: Scene) -> None:
    holders = [hold(here) for hold in ALL_HOLDS]
    wait_for_handshakes(here.kf, len(holders))
    here.kf.server.shutdown(0.0)
    assert all(holder.at_end() for holder in holders)
    wait_until(lambda: len(here.kf.server.connections) == 0)


@needs_openssl
def test_push_server_shutdown_finishes_the_request_in_flight(kf: Receiver, connect: Connect) -> None:
    busy, request_bytes = connect(), post(push())
    busy.send(request_bytes[:-5])
    channel = next(iter(list(kf.server.connections)))
    wait_until(lambda: channel.phase == kfserver.BODY)
    closing = threading.Thread(target=kf.server.shutdown, args=(PATIENCE,), daemon=True)
    closing.start()
    wait_until(lambda: kf.server.closing)
    answer = busy.ask(request_bytes[-5:])
    assert (answer.body, answer.headers["connection"]) == (b"success", "close")
    closing.join(PATIENCE)
    assert not closing.is_alive()


# ---- TLS: a certificate that is renewed


class Files(NamedTuple):
    """Where a server looks for its certificate and key, and those that will take their place."""

    folder: pathlib.Path
    new_chain: str

    def replace(self, name: str) -> None:
        """Put the new file of that name into service."""
        shutil.copy(str(self.folder / f"new_{name}"), str(self.folder / f"{name}.new"))
        os.replace(str(self.folder / f"{name}.new"), str(self.folder / name))


@pytest.fixture
def files(certificate: Certificate, tmp_path: pathlib.Path) -> Files:
    """A copy of the certificate, and a new one for the other key."""
    shutil.copy(certificate.chain, str(tmp_path / "chain.pem"))
    shutil.copy(certificate.key, str(tmp_path / "key.pem"))
    shutil.copy(certificate.other_key, str(tmp_path / "new_key.pem"))
    openssl(tmp_path, "req", "-x509", "-new", "-key", "new_key.pem", "-out", "new_chain.pem", "-days", "3", "-sha256",
            "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    return Files(tmp_path, str(tmp_path / "new_chain.pem"))


def is_served(kf: Receiver, chain: str) -> bool:
    """Whether a client that trusts this certificate alone is answered."""
    try:
        with TlsClient(kf.server.server_port, ssl.create_default_context(cafile=chain)) as client:
            return client.ask(post(push())).body == b"success"
    except ssl.SSLError:
        return False


@contextlib.contextmanager
def watching(files: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    """A server that looks at its files in every turn."""
    monkeypatch.setattr(kfserver, "TICK_SECONDS", 0.0)
    with receiver(tls_cert=str(files.folder / "chain.pem"), tls_key=str(files.folder / "key.pem")) as kf:
        yield kf


@needs_openssl
@pytest.mark.parametrize("order", [("chain.pem", "key.pem"), ("key.pem", "chain.pem")], ids=lambda order: order[0])
def test_push_server_serves_a_renewed_certificate(
        files: Files, certificate: Certificate, order: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with watching(files, monkeypatch) as kf, contextlib.ExitStack() as clients:
        client = clients.enter_context(TlsClient(kf.server.server_port, certificate.client_context()))
        assert client.ask(GET).status == 200
        for name in order:
            assert is_served(kf, certificate.chain)
            files.replace(name)
        wait_until(lambda: is_served(kf, files.new_chain))
        assert not is_served(kf, certificate.chain)
        assert client.ask(post(push())).body == b"success"  # connections go on


@needs_openssl
def test_push_server_keeps_the_certificate_when_the_new_one_cannot_be_used(
        files: Files, certificate: Certificate, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture) -> None:
    def errors() -> List[str]:
        return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    with watching(files, monkeypatch) as kf:
        (files.folder / "chain.pem").write_text("broken")
        wait_until(errors)
        for _ in range(3):
            assert is_served(kf, certificate.chain)
        os.remove(str(files.folder / "chain.pem"))
        wait_until(lambda: len(errors()) == 2)
        assert is_served(kf, certificate.chain)
        assert len(errors()) == 2
        assert all("chain.pem" in text and "stays in service" in text for text in errors())


@needs_openssl
@pytest.mark.parametrize("limit", [1, 3])
def test_push_server_shakes_hands_with_everyone_who_comes_at_once(certificate: Certificate, limit: int) -> None:
    with scene(certificate, max_connections=limit) as here:
        answers: List[bytes] = []

        def ask() -> None:
            answers.append(here.connect().ask(post(push(), "Connection: close")).body)
        threads = [threading.Thread(target=ask, daemon=True) for _ in range(limit)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert answers == [b"success"] * limit


@needs_openssl
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from 3.12 on, Python warns of forks beside threads
def test_push_server_after_fork_ends_no_session_of_the_parent(kf: Receiver, connect: Connect) -> None:
    client = connect()
    assert client.ask(GET).status == 200
    child = os.fork()
    if not child:
        try:
            kf.server.after_fork()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert client.ask(post(push())).body == b"success"


# ---- TLS: certificates that cannot be used


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting but what a test gives."""
    for name in [name for name in os.environ if name.startswith("KF_")]:
        monkeypatch.delenv(name)


def empty(folder: pathlib.Path, certificate: Certificate) -> str:
    """A file without a word."""
    path = folder / "empty.pem"
    path.write_text("")
    return str(path)


def cut(folder: pathlib.Path, certificate: Certificate) -> str:
    """Half a certificate."""
    path, text = folder / "cut.pem", pathlib.Path(certificate.chain).read_text()
    path.write_text(text[:len(text) // 2])
    return str(path)


def missing(folder: pathlib.Path, certificate: Certificate) -> str:
    """No file."""
    return str(folder / "missing.pem")


def a_folder(folder: pathlib.Path, certificate: Certificate) -> str:
    """A folder."""
    return str(folder)


def chain(folder: pathlib.Path, certificate: Certificate) -> str:
    """A good certificate."""
    return certificate.chain


def other_key(folder: pathlib.Path, certificate: Certificate) -> str:
    """A good key of no certificate."""
    return certificate.other_key


Make = Callable[[pathlib.Path, Certificate], str]


@needs_openssl
@pytest.mark.parametrize("arguments", [["--check"], ["--port", "0", "--host", "127.0.0.1"]], ids=["check", "serve"])
@pytest.mark.parametrize(("certificate_file", "key_file"), [
    (missing, chain), (empty, chain), (cut, chain), (a_folder, chain), (other_key, other_key), (chain, missing),
    (chain, empty), (chain, a_folder), (chain, chain), (chain, other_key), (chain, None),
], ids=lambda make: "none" if make is None else make.__name__)
def test_main_says_in_one_line_that_a_certificate_cannot_be_used(
        certificate_file: Make, key_file: Any, arguments: List[str], certificate: Certificate, tmp_path: pathlib.Path,
        capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--tls-cert", certificate_file(tmp_path, certificate)]
    chosen += ["--tls-key", key_file(tmp_path, certificate)] if key_file else []
    assert kfserver.main([*arguments, *chosen]) == 2
    told = capsys.readouterr().err
    assert told.startswith("kfserver: cannot use the certificate ")
    assert chosen[1] in told
    assert told.count("\n") == 1


@needs_openssl
def test_main_names_the_key_file_when_that_is_what_is_missing(
        certificate: Certificate, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = str(tmp_path / "missing.pem")
    assert kfserver.main(["--check", "--tls-cert", certificate.chain, "--tls-key", key]) == 2
    assert key in capsys.readouterr().err


@needs_openssl
def test_program_asks_nobody_for_a_pass_phrase(certificate: Certificate) -> None:
    # A service has no terminal, and would only say that something is invalid. In a session of its own, this has none.
    command = [sys.executable, str(ROOT / "kfserver.py"), "--check", "--tls-cert", certificate.chain, "--tls-key",
               certificate.locked_key]
    result = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                            text=True, timeout=PATIENCE)
    assert result.returncode == 2
    assert result.stderr.startswith("kfserver: ")
    assert "pass phrase" in result.stderr
    assert result.stderr.count("\n") == 1


def test_main_refuses_a_key_without_a_certificate(capsys: pytest.CaptureFixture[str]) -> None:
    assert kfserver.main(["--check", "--tls-key", "key.pem"]) == 2
    assert capsys.readouterr().err.startswith("kfserver: --tls-key (KF_TLS_KEY) needs --tls-cert")


# ---- Unix sockets


class UnixClient(Client):
    """A client of a Unix socket."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self._received = b""
        try:
            self.socket.connect(path)
        except OSError:
            self.socket.close()
            raise


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    """A path that is free."""
    return str(tmp_path / "kf.sock")


def serve(path: str, **settings: Any) -> KfServer:
    """A server on a Unix socket."""
    return KfServer(HandlerRegistry(), local(unix=path, **settings))


def is_answered(path: str) -> bool:
    """Whether a push to the socket is answered as it should be."""
    with UnixClient(path) as client:
        return client.ask(post(push())).body == b"success"


def is_socket(path: str) -> bool:
    """Whether there is a socket at the path."""
    return os.path.exists(path) and stat.S_ISSOCK(os.stat(path).st_mode)


@needs_unix
def test_kf_server_serves_a_unix_socket_and_removes_it(path: str) -> None:
    with serve(path) as server:
        assert server.url == f"unix:{path}"
        assert is_answered(path)
        assert is_socket(path)
    assert not os.path.exists(path)


@needs_unix
def test_kf_server_has_no_port_on_a_unix_socket(path: str) -> None:
    with serve(path) as server:
        assert server.port == 0


@needs_unix
def test_kf_server_lets_a_proxy_of_another_user_in(path: str) -> None:
    with serve(path):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o666


@needs_unix
def test_kf_server_keeps_connections_of_a_unix_socket(path: str) -> None:
    with serve(path), UnixClient(path) as client:
        client.send(post(push(number=1)) + post(push(number=2)))
        assert [client.read_answer().body for _ in range(2)] == [b"success"] * 2
        assert client.ask(GET).status == 200


@needs_unix
@needs_openssl
def test_kf_server_speaks_tls_on_a_unix_socket(path: str, certificate: Certificate) -> None:
    with serve(path, **certificate.settings()), UnixClient(path) as client:
        client.socket = certificate.client_context().wrap_socket(client.socket, server_hostname="localhost")
        assert client.ask(post(push())).body == b"success"


@needs_unix
def test_kf_server_leaves_the_socket_alone_that_another_server_put_in_its_place(path: str) -> None:
    with serve(path):
        os.unlink(path)
        other = serve(path).start()
    try:
        assert is_answered(path)
    finally:
        other.stop()
    assert not os.path.exists(path)


@needs_unix
def test_kf_server_removes_its_socket_though_its_rights_were_changed(path: str) -> None:
    with serve(path):
        os.chmod(path, 0o600)
    assert not os.path.exists(path)


@needs_unix
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from 3.12 on, Python warns of forks beside threads
def test_push_server_after_fork_leaves_the_socket_file(path: str) -> None:
    with serve(path) as server:
        child = os.fork()
        if not child:
            try:
                assert server._http
                server._http.after_fork()
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        assert is_answered(path)


@needs_unix
def test_kf_server_replaces_the_socket_of_a_dead_server(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with serve(path):
        assert is_answered(path)


@needs_unix
def test_kf_server_leaves_the_socket_of_a_living_server_alone(path: str) -> None:
    with serve(path):
        with pytest.raises(SettingsError, match=f"cannot listen on {path}: .*--unix"):
            serve(path).start()
        assert is_answered(path)


def a_regular_file(path: str) -> None:
    """A file that someone needs."""
    pathlib.Path(path).write_text("precious")


def an_empty_file(path: str) -> None:
    """A file that was made for a reason."""
    pathlib.Path(path).write_text("")


def a_directory(path: str) -> None:
    """A folder."""
    os.mkdir(path)


def a_link_to_a_file(path: str) -> None:
    """Another name of a file that someone needs."""
    pathlib.Path(path + ".txt").write_text("precious")
    os.symlink(path + ".txt", path)


def a_link_to_nothing(path: str) -> None:
    """A name of what is not there, yet."""
    os.symlink(path + ".txt", path)


@needs_unix
@pytest.mark.parametrize("make", [a_regular_file, an_empty_file, a_directory, a_link_to_a_file, a_link_to_nothing],
                         ids=lambda make: make.__name__)
def test_kf_server_leaves_alone_what_is_no_socket(make: Callable[[str], None], path: str) -> None:
    make(path)
    before = os.lstat(path)
    with pytest.raises(SettingsError, match=f"cannot listen on {path}: .*--unix"):
        serve(path).start()
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode, after.st_size) == (before.st_ino, before.st_mode, before.st_size)


@needs_unix
@pytest.mark.parametrize("name", ["missing/kf.sock", "a" * 200], ids=["no such folder", "too long"])
def test_main_says_in_one_line_that_it_cannot_listen_on_a_path(
        name: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kfserver.main(["--unix", str(tmp_path / name)]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"kfserver: cannot listen on {tmp_path / name}: ")
    assert told.count("\n") == 1
