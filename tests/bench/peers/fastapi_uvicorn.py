"""The peer on FastAPI, under uvicorn with its compiled parts, uvloop and httptools."""

import uvicorn
from common import Receiver, arguments
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse


def create_app(token: str) -> FastAPI:
    """The application."""
    app = FastAPI()
    receiver = Receiver(token)

    @app.post("/", response_class=PlainTextResponse)
    async def push(request: Request) -> PlainTextResponse:
        if receiver.receive(request.query_params, await request.body()):
            return PlainTextResponse("success")
        return PlainTextResponse("bad signature", status_code=403)

    return app


def main() -> None:
    """Serve until terminated."""
    options = arguments()
    app = create_app(options.token)
    uvicorn.run(app, port=options.port, loop="uvloop", http="httptools", access_log=False, log_level="warning",
                ssl_certfile=options.cert, ssl_keyfile=options.key)


if __name__ == "__main__":
    main()
