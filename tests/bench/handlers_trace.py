"""A handler that leaves a trace: a line when it begins with a message, one when it ends, BENCH_SLEEP seconds later.

Each line is one write to a file opened for appending, so that lines of many threads never mix.
"""

import os
import time

from kfserver import HandlerRegistry, Message

registry = HandlerRegistry()
SLEEP = float(os.environ.get("BENCH_SLEEP", "0"))
TRACE = os.open(os.environ["BENCH_TRACE_FILE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


@registry.on("*")
def take(message: Message) -> None:
    """Take so long over the message as was asked for."""
    mark = f"{message.from_user_name} {message.msg_id}\n".encode()
    os.write(TRACE, b"begin " + mark)
    if SLEEP:
        time.sleep(SLEEP)
    os.write(TRACE, b"end " + mark)
