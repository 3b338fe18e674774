"""The peer on WeRoBot's own WSGI application, under waitress. WeRoBot parses XML only."""

import logging

from common import RecentKeys, arguments, handle
from waitress import serve
from werobot import WeRoBot
from werobot.messages.messages import WeChatMessage
from werobot.replies import SuccessReply

THREADS = 32


def create_robot(token: str) -> WeRoBot:
    """A robot that answers `success`, WeRoBot's way to say nothing to the user."""
    # Sessions would cost a write to SQLite for each message; no other peer keeps any.
    robot = WeRoBot(token=token, SESSION_STORAGE=False)
    recent = RecentKeys()

    @robot.handler
    def push(message: WeChatMessage) -> SuccessReply:
        if recent.claim((message.target, message.source, str(message.message_id))):
            handle(message.source)
        return SuccessReply(message=message)

    return robot


def main() -> None:
    """Serve until terminated."""
    options = arguments()
    # waitress warns of every request that finds all threads busy: an access log in all but name.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    app = create_robot(options.token).wsgi
    # The default limit of 100 connections would leave most of the 256 of one shape unserved.
    serve(app, host="127.0.0.1", port=options.port, threads=THREADS, connection_limit=1000)


if __name__ == "__main__":
    main()
