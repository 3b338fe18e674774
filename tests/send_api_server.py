"""The platform's send API, played by a real HTTP server on loopback: strictly, and with any trouble a test asks for.

It takes a request only if its method, path, query, headers and form are exactly the published ones. Anything else is
answered 400 and kept in ``breaches``, which must be empty at the end of every test. What is to go wrong is put into
``send_troubles`` or ``token_troubles`` beforehand: each spoils one request, and the rest go well.

As a program it prints its address, serves until its input ends, and prints what it counted as JSON.
"""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import socketserver
import ssl
import struct
import sys
import threading
from collections import deque
from http.server import BaseHTTPRequestHandler
from typing import Any, Callable, Deque, Dict, List, NamedTuple, Optional, Set, Tuple
from urllib.parse import parse_qsl, urlsplit

PUBLISHED: Dict[str, Any] = json.loads(
    (pathlib.Path(__file__).resolve().parent / "data" / "published.json").read_text("utf-8"))["send_api"]
TOKEN_PATH: str = urlsplit(PUBLISHED["token"]["url"]).path
SEND_PATH: str = urlsplit(PUBLISHED["send"]["url"]).path
# The platform's path for third parties, beside the published one.
THIRD_PARTY_SEND_PATH = SEND_PATH + "bytp"
# Seconds that a published token lives.
LIFETIME: int = PUBLISHED["token"]["answer"]["expires_in"]

APP_KEY = "app-key-of-the-tests"
APP_SECRET = "app-secret-of-the-tests"
# Seconds that a trouble lasts at most, when a test has failed before it could end it.
ENDURANCE = 10.0


class Breach(Exception):
    """A request that is not as published."""


def expect(holds: object, what: str) -> None:
    """Raise `Breach` unless it holds."""
    if not holds:
        raise Breach(what)


def read_fields(text: str) -> Dict[str, str]:
    """The fields of a query or form, each of them once."""
    pairs = parse_qsl(text, keep_blank_values=True, strict_parsing=True, errors="strict")
    expect(len(dict(pairs)) == len(pairs), "a field comes twice")
    return dict(pairs)


class Reply(NamedTuple):
    """A reply as its form brought it, but for the token, which stood in the query."""

    open_id: str
    msg_type: str
    content: str
    pic_url: str
    user_type: str
    token: str


class Exchange(BaseHTTPRequestHandler):
    """One connection, request by request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    def setup(self) -> None:
        """Note that there is one connection more."""
        super().setup()
        self.api = self.server.api
        self.api.opened(self.connection)

    def finish(self) -> None:
        """End it, and only then note that it is at its end: a test that waits for that may rely on it."""
        super().finish()
        with contextlib.suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)
        self.api.ended(self.connection)

    def do_POST(self) -> None:
        """A request for a token, or a reply."""
        if self.path.partition("?")[0] == TOKEN_PATH:
            self._serve("token", self._read_token_request)
        else:
            self._serve("send", self._read_reply)

    def _serve(self, kind: str, read: Callable[[], Callable[[], None]]) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode("ascii")
        trouble = self.api.count(kind)
        try:
            expect(self.headers["Host"] == urlsplit(self.api.base).netloc, "Host is not this server")
            expect("Proxy-Authorization" not in self.headers, "the proxy's password is none of our business")
            expect(self.headers["Content-Type"] == "application/x-www-form-urlencoded", "not a form")
            self.form = read_fields(body)
            self.answer_well = read()
        except (Breach, ValueError) as breach:
            self.api.breaches.append(f"{kind}: {breach}")
            self.answer({"error_msg": "bad request"}, 400)
            return
        trouble(self) if trouble else self.answer_well()

    def _read_token_request(self) -> Callable[[], None]:
        fields, published = self.form, PUBLISHED["token"]["query"]
        expect(self.path == TOKEN_PATH, "the token is asked for with a query, which is logged")
        expect(fields.keys() == published.keys(), "not the published fields")
        expect(all(fields[name] == published[name] for name in ("grant_type", "scope")), "another grant or scope")
        return lambda: self._grant(fields)

    def _grant(self, fields: Dict[str, str]) -> None:
        if (fields["client_id"], fields["client_secret"]) == (APP_KEY, APP_SECRET):
            token = self.api.issue_token()
            self.answer({**PUBLISHED["token"]["answer"], "access_token": token, "expires_in": LIFETIME})
        else:
            self.answer(PUBLISHED["token"]["failure"], 401)

    def _read_reply(self) -> Callable[[], None]:
        path, _, query = self.path.partition("?")
        tokens, form = read_fields(query), self.form
        expect(path == self.api.send_path, "replies go somewhere else")
        expect(tokens.keys() == PUBLISHED["send"]["query"].keys(), "the query is the token, and nothing else")
        expect(form.keys() == PUBLISHED["send"]["form"].keys(), "not the published fields")
        expect(form["user_type"] in ("1", "2"), "an unknown user_type")
        expect(form["msg_type"] in ("text", "image"), "an unknown msg_type")
        return lambda: self.answer(self.api.take(Reply(token=tokens["access_token"], **form)))

    def answer(self, value: object, status: int = 200, *headers: str) -> None:
        """Answer with JSON, in one piece."""
        body = json.dumps(value).encode()
        lines = [f"HTTP/1.1 {status} -", "Content-Type: application/json", f"Content-Length: {len(body)}", *headers]
        self.wfile.write("\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the counts tell."""


class Listener(socketserver.ThreadingTCPServer):
    """The listening socket, and a thread for each connection. Closing it waits for all of them."""

    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, api: SendApiServer) -> None:
        super().__init__(("127.0.0.1", 0), Exchange)
        self.api = api

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none of our business; all else is a mistake of this file's."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.api.breaches.append(repr(error))


class SendApiServer:
    """The platform. Starts as it is made; `close` it, or use it in a with block.

    ``certificate`` is a file with a certificate and its key, for https.
    """

    def __init__(self, send_path: str = SEND_PATH, certificate: str = "") -> None:
        self.send_path = send_path
        self.send_troubles: Deque[Trouble] = deque()
        self.token_troubles: Deque[Trouble] = deque()
        self.sent: List[Reply] = []  # what was taken, in order
        self.breaches: List[str] = []
        self.send_requests = self.token_requests = self.connections = 0
        self.tokens: Set[str] = set()  # those that are valid now
        self.open: Set[socket.socket] = set()  # connections that are open now
        self.over = threading.Event()  # the server is being closed
        self._issued: Set[str] = set()
        self._lock = threading.Lock()  # guards all above
        self._listener = Listener(self)
        if certificate:
            self._listener.socket = serve_tls(self._listener.socket, certificate)
        self.base = f"http{'s' if certificate else ''}://127.0.0.1:{self._listener.server_address[1]}"
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.002,))
        self._thread.start()

    def __enter__(self) -> SendApiServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up on everybody, and stop."""
        self.over.set()
        self._listener.shutdown()
        self._thread.join()
        self.hang_up()
        self._listener.server_close()

    def hang_up(self) -> None:
        """Close every connection without a word, as the platform does with those that were idle for long."""
        with self._lock:
            for connection in self.open:
                with contextlib.suppress(OSError):  # the client was faster
                    connection.shutdown(socket.SHUT_RDWR)

    def expire_tokens(self) -> None:
        """From now on, no token that was issued so far is valid."""
        with self._lock:
            self.tokens.clear()

    # What the connections call.

    def opened(self, connection: socket.socket) -> None:
        """Count a connection."""
        with self._lock:
            self.connections += 1
            self.open.add(connection)

    def ended(self, connection: socket.socket) -> None:
        """Forget a connection."""
        with self._lock:
            self.open.discard(connection)

    def count(self, kind: str) -> Optional[Trouble]:
        """Count a request for a token or to send; what is to become of it, None if it is to go well.

        In one step: whoever waits for the count may rely on it that the next request does not get this one's trouble.
        """
        with self._lock:
            if kind == "token":
                self.token_requests += 1
                return self.token_troubles.popleft() if self.token_troubles else None
            self.send_requests += 1
            return self.send_troubles.popleft() if self.send_troubles else None

    def issue_token(self) -> str:
        """A new token, shaped as the published one is."""
        with self._lock:
            token = f"1.token{len(self._issued)}.86400.1292922000-2346678-124328"
            self._issued.add(token)
            self.tokens.add(token)
            return token

    def take(self, reply: Reply) -> Dict[str, Any]:
        """Take a reply, or say what is wrong with it."""
        wanted = bool(reply.content), bool(reply.pic_url)
        with self._lock:
            if reply.token not in self.tokens:
                number = 111 if reply.token in self._issued else 110
                return {"error_code": number, "error_msg": "Access token invalid or no longer valid"}
            if not reply.open_id or wanted != (reply.msg_type == "text", reply.msg_type == "image"):
                return {"errno": 3001, "msg": "param error"}
            self.sent.append(reply)
            return dict(PUBLISHED["send"]["answer"])


def serve_tls(listener: socket.socket, certificate: str) -> ssl.SSLSocket:
    """The listening socket, under TLS. Each connection shakes hands in its own thread."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context.wrap_socket(listener, server_side=True, do_handshake_on_connect=False)


# ---- A proxy between the client and the platform


class Passage(BaseHTTPRequestHandler):
    """One connection of a client to the proxy."""

    protocol_version = "HTTP/1.1"
    server: Proxy

    def do_CONNECT(self) -> None:
        """A tunnel to the platform."""
        if self._may_pass():
            host, _, port = self.path.rpartition(":")
            with socket.create_connection((host, int(port)), ENDURANCE) as platform:
                self.send_response(200)
                self.end_headers()
                back = threading.Thread(target=relay, args=(platform, self.connection))
                back.start()
                relay(self.connection, platform)
                back.join()
        self.close_connection = True

    def _may_pass(self) -> bool:
        self.server.asked.append((self.command, self.path, self.headers["Proxy-Authorization"] or ""))
        if self.server.refuses:
            self.send_error(407)
        return not self.server.refuses

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def relay(source: socket.socket, target: socket.socket) -> None:
    """Carry bytes one way until their end."""
    with contextlib.suppress(OSError):
        for data in iter(lambda: source.recv(65536), b""):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


class Proxy(socketserver.ThreadingTCPServer):
    """An HTTP proxy. ``asked`` holds the method, the target and the credentials of each request that came."""

    daemon_threads = True

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Passage)
        self.refuses = refuses
        self.asked: List[Tuple[str, str, str]] = []
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.002,))

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


# ---- Troubles: what a request gets instead of its answer

Trouble = Callable[[Exchange], None]


def says(value: object, status: int = 200, *headers: str) -> Trouble:
    """Any other answer in JSON."""
    return lambda exchange: exchange.answer(value, status, *headers)


def refuses(number: int, words: str) -> Trouble:
    """An error of the send API."""
    return says({"errno": number, "msg": words})


def gateway_refuses(number: int, words: str) -> Trouble:
    """An error of the OpenAPI gateway, which stands before it."""
    return says({"error_code": number, "error_msg": words})


def redirects(url: str) -> Trouble:
    """The way to another place."""
    return says({"errno": 0, "msg": "success"}, 302, f"Location: {url}")


def drips(head: bytes) -> Trouble:
    """The beginning of an answer, and then a blank again and again, until the client hangs up."""

    def drip(exchange: Exchange) -> None:
        exchange.close_connection = True
        exchange.wfile.write(head)
        with contextlib.suppress(OSError):
            while not exchange.api.over.wait(0.01):
                exchange.wfile.write(b" ")
    return drip


def writes(data: bytes) -> Trouble:
    """Any bytes, and the end of the connection."""

    def write(exchange: Exchange) -> None:
        exchange.close_connection = True
        exchange.wfile.write(data)
    return write


def held(gate: threading.Event) -> Trouble:
    """The right answer, when the gate is opened."""

    def wait(exchange: Exchange) -> None:
        gate.wait(ENDURANCE)
        exchange.answer_well()
    return wait


def hangs_up(exchange: Exchange) -> None:
    """The end of the connection, in good order and without an answer."""
    exchange.close_connection = True


def resets(exchange: Exchange) -> None:
    """The end of the connection, abrupt."""
    exchange.close_connection = True
    # Closed here and now: the orderly end that would follow begins with a farewell.
    with socket.socket(fileno=exchange.connection.detach()) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stays_silent(exchange: Exchange) -> None:
    """Nothing, until the client gives up."""
    exchange.close_connection = True
    exchange.connection.settimeout(ENDURANCE)
    exchange.rfile.read(1)


def closes_unsaid(exchange: Exchange) -> None:
    """The right answer, and the end of the connection, which no header announced."""
    exchange.answer_well()
    exchange.close_connection = True


def main() -> None:
    """Serve until the input ends."""
    with SendApiServer() as api:
        print(api.base, flush=True)
        sys.stdin.read()
        print(json.dumps({"replies": len(api.sent), "token_requests": api.token_requests, "breaches": api.breaches,
                          "connections": api.connections}))


if __name__ == "__main__":
    main()
