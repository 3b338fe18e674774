"""The upper bound: the bare ASGI interface under uvicorn with uvloop and httptools, no framework at all."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qsl

import uvicorn
from common import Receiver, arguments

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request."""
    event = await receive()
    body: bytes = event["body"]
    while event.get("more_body"):
        event = await receive()
        body += event["body"]
    return body


async def answer(send: Send, status: int, body: bytes) -> None:
    """Send a complete response."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class PushApp:
    """The application."""

    def __init__(self, token: str) -> None:
        self._receiver = Receiver(token)

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        query = dict(parse_qsl(scope["query_string"].decode()))
        if self._receiver.receive(query, await read_body(receive)):
            await answer(send, 200, b"success")
        else:
            await answer(send, 403, b"bad signature")


def main() -> None:
    """Serve until terminated."""
    options = arguments()
    settings: dict[str, Any] = {"loop": "uvloop", "http": "httptools", "lifespan": "off", "access_log": False,
                                "ssl_certfile": options.cert, "ssl_keyfile": options.key}
    uvicorn.run(PushApp(options.token), port=options.port, log_level="warning", **settings)


if __name__ == "__main__":
    main()
