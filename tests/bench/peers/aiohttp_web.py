"""The peer on aiohttp's own server and compiled HTTP parser, on uvloop."""

import uvloop
from aiohttp import web
from common import Receiver, arguments


def create_app(token: str) -> web.Application:
    """The application."""
    receiver = Receiver(token)

    async def push(request: web.Request) -> web.Response:
        if receiver.receive(request.query, await request.read()):
            return web.Response(text="success")
        return web.Response(text="bad signature", status=403)

    app = web.Application()
    app.router.add_post("/", push)
    return app


def main() -> None:
    """Serve until terminated."""
    options = arguments()
    app = create_app(options.token)
    web.run_app(app, host="127.0.0.1", port=options.port, access_log=None, print=None, loop=uvloop.new_event_loop())


if __name__ == "__main__":
    main()
