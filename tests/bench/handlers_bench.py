"""kfserver's handler in the benchmark: as trivial as the peers' own (`handle` in peers/common.py)."""

import os

from kfserver import HandlerRegistry, Message

registry = HandlerRegistry()


@registry.on("*")
def take(message: Message) -> None:
    """Do nothing, but leave a trace of the harness's own checking pushes."""
    if message.from_user_name == "probe":
        with open(os.environ["BENCH_PROBE_FILE"], "a", encoding="ascii") as trace:
            trace.write(".")
