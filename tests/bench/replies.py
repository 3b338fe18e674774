"""How many replies a second go out: 1,000 of them over loopback, by 8 workers, to a send API in a process of its own.

Two rows: the client alone in 8 threads, and a whole kfserver whose handler returns a text. The bar holds for both:
1,000 replies a second, with one request for a token. Exits with 1 below it.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from send_api_server import APP_KEY, APP_SECRET  # noqa: E402  (the folders are on the path only from here on)

from kfserver import HandlerRegistry, KfServer, SendApi, Settings  # noqa: E402

WORKERS = 8
REPLIES_PER_SECOND = 1000
WAIT_SECONDS = 120.0


class Platform:
    """The send API of the tests, in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen([sys.executable, str(TESTS / "send_api_server.py")], text=True,
                                         stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout
        self.settings = Settings(api_base=self._process.stdout.readline().strip(), app_key=APP_KEY,
                                 app_secret=APP_SECRET, workers=WORKERS)

    def end(self) -> dict[str, Any]:
        """Stop it; what it has counted."""
        counts, _ = self._process.communicate(timeout=WAIT_SECONDS)
        return dict(json.loads(counts))


@contextlib.contextmanager
def timed(rates: list[float], replies: int) -> Iterator[None]:
    """Note how many replies a second left in the block."""
    begin = time.perf_counter()
    yield
    rates.append(replies / (time.perf_counter() - begin))


def by_client(settings: Settings, replies: int, rates: list[float]) -> None:
    """The client alone: each thread sends its share."""
    api = SendApi(settings)

    def send() -> None:
        for _ in range(replies // WORKERS):
            api.send_text("user", "hello")
    threads = [threading.Thread(target=send) for _ in range(WORKERS)]
    with timed(rates, replies // WORKERS * WORKERS):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    api.close()


def by_server(settings: Settings, replies: int, rates: list[float]) -> None:
    """A whole server: messages of many users are pushed into it, and each is answered by a handler."""
    registry = HandlerRegistry()
    registry.on("text")(lambda message: "hello")
    server = KfServer(registry, settings)
    pushes = [json.dumps({"ToUserName": "app", "FromUserName": f"user{number}", "CreateTime": 1482048670,
                          "MsgType": "text", "Content": "hi", "MsgId": number}).encode() for number in range(replies)]
    with timed(rates, replies):
        for push in pushes:
            server.feed(push)
        if not server.join(WAIT_SECONDS):
            raise SystemExit("the replies did not go out")
    server.stop()


ROWS: Mapping[str, Callable[[Settings, int, list[float]], None]] = {"SendApi": by_client, "KfServer": by_server}


def measure(name: str, replies: int) -> bool:
    """Run and print one row; whether it reaches the bar."""
    platform, rates = Platform(), list[float]()
    try:
        ROWS[name](platform.settings, replies, rates)
    finally:
        counts = platform.end()
    print(f"{name:8}  {rates[0]:6.0f} replies/s  {counts['replies']} arrived  {counts['token_requests']} token requests"
          f"  {counts['connections']} connections  {len(counts['breaches'])} breaches", flush=True)
    return (rates[0] >= REPLIES_PER_SECOND and counts["replies"] == replies and counts["token_requests"] == 1
            and not counts["breaches"])


def main() -> None:
    """Measure every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replies", type=int, default=1000, help="replies for each row (default: 1000)")
    replies = parser.parse_args().replies // WORKERS * WORKERS
    reached = [measure(name, replies) for name in ROWS]
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
