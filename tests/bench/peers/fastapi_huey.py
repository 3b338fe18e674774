"""What a user would build so that nothing is lost: FastAPI that enqueues into huey's SQLite queue before it answers.

A consumer, a process of its own as huey's manual has it, runs the handler. Repeats are dropped by memory alone.
"""

import argparse
import subprocess
import sys

import uvicorn
from common import RecentKeys, handle, is_signed, parse_push
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from huey import SqliteHuey

# Seconds between two looks of an idle consumer at the queue: huey's own 10 s would only delay the first message.
LOOK_SECONDS = 0.1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--file", required=True, help="of the queue")
    parser.add_argument("--sync", choices=("off", "full"), required=True, help="whether each write waits for the disk")
    parser.add_argument("--consume", action="store_true", help="run the handlers, and serve nothing")
    return parser.parse_args()


OPTIONS = arguments()
# Results are of no use here, and would be one more write for each message.
QUEUE = SqliteHuey(filename=OPTIONS.file, fsync=OPTIONS.sync == "full", results=False)


@QUEUE.task()
def run_handler(sender: str) -> None:
    """What a message causes, in the consumer."""
    handle(sender)


def create_app(token: str) -> FastAPI:
    """The application."""
    app = FastAPI()
    recent = RecentKeys()

    @app.post("/", response_class=PlainTextResponse)
    async def push(request: Request) -> PlainTextResponse:
        if not is_signed(token, request.query_params):
            return PlainTextResponse("bad signature", status_code=403)
        fields = parse_push(await request.body())
        sender = str(fields["FromUserName"])
        if recent.claim((str(fields["ToUserName"]), sender, str(fields["MsgId"]))):
            run_handler(sender)
        return PlainTextResponse("success")

    return app


def main() -> None:
    """Serve, or consume, until terminated."""
    if OPTIONS.consume:
        QUEUE.create_consumer(workers=1, periodic=False, initial_delay=LOOK_SECONDS, max_delay=LOOK_SECONDS).run()
        return
    with subprocess.Popen([sys.executable, *sys.argv, "--consume"]):
        uvicorn.run(create_app(OPTIONS.token), port=OPTIONS.port, loop="uvloop", http="httptools", access_log=False,
                    log_level="warning")


if __name__ == "__main__":
    main()
