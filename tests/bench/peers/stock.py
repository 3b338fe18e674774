"""The peer on the standard library's own server, written the way the manual suggests.

`--nodelay` turns Nagle's algorithm off. http.server sends the head and the body of a response in two writes; with the
algorithm on, the second one waits for the client's acknowledgement of the first. Few who write such a receiver know
that, but to beat only the unlucky version would prove little: the bars are held against the lucky one.
"""

import argparse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, urlsplit

from common import Receiver


class PushServer(ThreadingHTTPServer):
    """The stock threading server, with the receiver where its handlers find it."""

    def __init__(self, port: int, token: str, handler: type) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.receiver = Receiver(token)


class PushHandler(BaseHTTPRequestHandler):
    """One connection; HTTP/1.1, so that it stays open."""

    protocol_version = "HTTP/1.1"
    server: PushServer

    def do_POST(self) -> None:
        """Answer one push."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        query = dict(parse_qsl(urlsplit(self.path).query))
        if self.server.receiver.receive(query, body):
            self.answer(200, b"success")
        else:
            self.answer(403, b"bad signature")

    def answer(self, status: int, body: bytes) -> None:
        """Send a complete response."""
        self.send_response(status)
        self.send_header("Content-Type", "text/plain")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            # http.server does not say so by itself, and wrk would write its next request into a closed connection.
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """No access log."""


class PromptPushHandler(PushHandler):
    """The same without Nagle's algorithm."""

    disable_nagle_algorithm = True


def main() -> None:
    """Serve until terminated."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--nodelay", action="store_true")
    options = parser.parse_args()
    handler = PromptPushHandler if options.nodelay else PushHandler
    PushServer(options.port, options.token, handler).serve_forever()


if __name__ == "__main__":
    main()
