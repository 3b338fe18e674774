"""What the main job promises, measured on a real server: slow handlers, repeats, an idle process, metrics."""

import argparse
import random
import signal
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

import servers
import wire
from live import Finding, Live, conclude, started
from push_clients import RIGHT, Outcome, Push, paced, percentile, send_all, wrong_answers

sys.path[:0] = [str(servers.ROOT), str(servers.ROOT / "tests")]

from kfserver import HandlerRegistry, KfServer, Settings  # noqa: E402

SLOW_PUSHES, SLOW_RATE, SLOW_SENDERS, SLOW_SECONDS, SLOW_P99_MS = 1000, 200, 500, 3.0, 50.0
REPEATED_PUSHES, REPEAT_CLIENTS = 10_000, 16
IDLE_MIB, IDLE_SECONDS, START_SECONDS, STARTS = 30.0, 10.0, 0.3, 5
METRICS_SHARE, COUNTED, TURNS, ROUNDS = 0.08, 100, 30, 9
# More than answers ever are on their way: the platform opens a connection for each push, and waits for none.
PLATFORM_CLIENTS = 64
PATIENCE = 60.0


def slow_handlers(folder: Path) -> Iterator[Finding]:
    """1,000 pushes at 200 a second from 500 senders, every handler sleeping 3 s."""
    senders = [f"openid-{number:03d}" for number in range(SLOW_SENDERS)] * (SLOW_PUSHES // SLOW_SENDERS)
    random.Random(1).shuffle(senders)
    outcomes: list[Outcome] = []
    with started(folder, "slow", "--workers 500", SLOW_SECONDS) as live:
        send_all(live.target, paced(range(SLOW_PUSHES), senders, SLOW_RATE), PLATFORM_CLIENTS, outcomes.append)
        handled = live.await_handled(SLOW_PUSHES, PATIENCE)
        runs = live.runs()
    yield from answered(outcomes, "pushes to slow handlers")
    p99 = percentile([outcome.milliseconds for outcome in outcomes], 0.99)
    yield Finding("p99 of their answers", f"{p99:.1f} ms", f"below {SLOW_P99_MS:g} ms", p99 < SLOW_P99_MS)
    yield once(handled, SLOW_PUSHES)
    wrong = sum(1 for _ in out_of_order(runs, outcomes))
    yield Finding("order of each sender broken", f"{wrong:,} times", "never", not wrong)


def answered(outcomes: Sequence[Outcome], what: str) -> Iterator[Finding]:
    """Whether every push was answered as it should."""
    right = sum(outcome.answer == RIGHT for outcome in outcomes)
    wrong = wrong_answers(outcomes)
    yield Finding(f"{what} answered `success`", f"{right:,} of {len(outcomes):,}{wrong and '; '}{wrong}", "all",
                  right == len(outcomes))


def once(handled: Counter[int], count: int) -> Finding:
    """Whether each message was handled exactly once."""
    missing, doubled = count - len(handled), sum(times > 1 for times in handled.values())
    figure = f"{len(handled):,} of {count:,}; {doubled:,} more than once"
    return Finding("messages handled", figure, "each exactly once", not (missing or doubled))


def out_of_order(runs: Sequence[tuple[str, str, int]], outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The senders with a message that began before the last one ended, or before one that was answered earlier."""
    by_number = {outcome.push.number: outcome for outcome in outcomes}
    for sender in {sender for _, sender, _ in runs}:
        own = [(what, number) for what, name, number in runs if name == sender]
        numbers = [number for what, number in own if what == "begin"]
        overtaken = any(by_number[later].done < by_number[sooner].sent for sooner, later in pairwise(numbers))
        if overtaken or own != [(what, number) for number in numbers for what in ("begin", "end")]:
            yield sender


def repeats(folder: Path) -> Iterator[Finding]:
    """Half of 10,000 pushes repeated, by 16 clients at once."""
    outcomes: list[Outcome] = []
    with started(folder, "repeats") as live:
        send_all(live.target, repeated_pushes(), REPEAT_CLIENTS, outcomes.append)
        handled = live.await_handled(REPEATED_PUSHES, PATIENCE)
    yield from answered(outcomes, "pushes, half of them repeated,")
    yield once(handled, REPEATED_PUSHES)


def repeated_pushes() -> list[Push]:
    """10,000 messages, of which 5,000 come again: half of these at once, through another client, half at any time."""
    pushes = [Push(number, f"openid-{number % SLOW_SENDERS:03d}") for number in range(REPEATED_PUSHES)]
    random.Random(2).shuffle(pushes)
    again, at_once, rest = pushes[:2500], pushes[2500:5000], pushes[5000:]
    mixed = again + rest + again
    random.Random(3).shuffle(mixed)
    for place, push in enumerate(at_once):
        mixed[place * 5:place * 5] = [push, push]
    return mixed


def idle(folder: Path) -> Iterator[Finding]:
    """How long kfserver takes to start, and what it costs while nothing happens."""
    yield from starting(folder, False)
    with started(folder, "idle") as live:
        yield from resting(live)
    yield from starting(folder, True)
    with started(folder, "idle", module=True) as live:
        time.sleep(0.5)
        yield Finding("- its memory", f"{live.resident_mib:.1f} MiB")


def starting(folder: Path, module: bool) -> Iterator[Finding]:
    """How long it takes to start from its file, or from the bytecode that Python keeps for a module."""
    seconds = []
    for _ in range(STARTS):
        with started(folder, "start", module=module) as live:
            seconds.append(live.start_seconds)
    median = statistics.median(seconds)
    figure = f"{median:.2f} s (median of {', '.join(f'{second:.2f}' for second in sorted(seconds))})"
    if module:
        yield Finding("the same with `python3 -m kfserver`", figure)
    else:
        yield Finding("from start to listening", figure, f"{START_SECONDS:g} s at most", median <= START_SECONDS)


def resting(live: Live) -> Iterator[Finding]:
    """Memory and processor time of a server that nobody pushes to."""
    time.sleep(0.5)
    before = live.cpu_seconds
    time.sleep(IDLE_SECONDS)
    spent, memory = live.cpu_seconds - before, live.resident_mib
    yield Finding("memory when idle", f"{memory:.1f} MiB", f"{IDLE_MIB:g} MiB at most", memory <= IDLE_MIB)
    # One tick of the kernel's clock: it may fall into any ten seconds.
    yield Finding(f"processor time in {IDLE_SECONDS:g} s idle", f"{spent:.2f} s", "0.01 s at most", spent <= 0.0101)


def metrics(folder: Path) -> Iterator[Finding]:
    """What --admin costs beside a push as a whole: read from a socket, answered and handled. Two servers in one process
    take turns of a few milliseconds, so that what else the machine does hits both alike."""
    without, with_admin = [], []
    registry = HandlerRegistry()
    registry.on("text")(lambda message: None)
    with ExitStack() as stack:
        plain, watched = (stack.enter_context(KfServer(registry, Settings(
            host="127.0.0.1", port=0, token=wire.TOKEN, admin=admin))) for admin in ("", "127.0.0.1:0"))
        for turn in range((ROUNDS + 1) * TURNS):
            pair = [(plain, without), (watched, with_admin)]
            for server, costs in pair[::1 if turn % 2 else -1]:
                costs.append(push_cost(server, turn * COUNTED))
    # The first round warms up.
    rounds = [(sum(without[at:at + TURNS]) / TURNS, sum(with_admin[at:at + TURNS]) / TURNS)
              for at in range(TURNS, len(without), TURNS)]
    shares = sorted(more / less - 1 for less, more in rounds)
    share, spread = statistics.median(shares), f"{shares[0]:.1%} to {shares[-1]:.1%}"
    whole = statistics.median(less for less, _ in rounds) * 1e6
    figure = f"{share:.1%} of {whole:.0f} us (median of {ROUNDS} rounds, {spread})"
    yield Finding("processor time that --admin adds to a push", figure, f"at most {METRICS_SHARE:.0%}",
                  share <= METRICS_SHARE)


def push_cost(server: KfServer, first: int) -> float:
    """Seconds of the processor that one push takes, of many by one client, the client's own included."""
    target = f"/?{wire.signed_query()}"
    requests = [f"POST {target} HTTP/1.1\r\nHost: kf\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                for body in (wire.message("json", f"openid-{number % SLOW_SENDERS}", number)
                             for number in range(first, first + COUNTED))]
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        started_at = time.process_time()
        for request in requests:
            client.sendall(request)
            assert client.recv(65536).endswith(b"success")
        assert server.join(PATIENCE)
        return (time.process_time() - started_at) / COUNTED


PROMISES: Mapping[str, Callable[[Path], Iterator[Finding]]] = {
    "slow": slow_handlers, "repeats": repeats, "idle": idle, "metrics": metrics}


def main() -> int:
    """Measure and report; the exit status."""
    # A terminated harness must stop its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PROMISES, default=list(PROMISES), help="only these")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kfserver-promises-") as folder:
        findings = [finding for name in options.only for finding in PROMISES[name](Path(folder))]
    return conclude(findings)


if __name__ == "__main__":
    sys.exit(main())
