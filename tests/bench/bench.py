"""Measure kfserver beside other ways to receive the same pushes.

All servers are started at once and stay idle but for the one that is loaded. The rounds go from server to server, so
that a slow minute of the machine falls on all of them, and the tables show the medians. See requirements.txt for what
the peers need; `--only kfserver` needs nothing but wrk.
"""

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import load
import report
import servers
import wire
from load import Series, Shape

Results = dict[tuple[str, Shape], Series]

COLUMNS = ((1, True), (32, True), (256, True), (8, False))
PACKAGES = (
    "flask",
    "wechatpy",
    "gunicorn",
    "WeRoBot",
    "waitress",
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "aiohttp",
)
ROWS: Mapping[str, str] = {
    "stock": "the standard library's ThreadingHTTPServer, as its manual shows it. It writes head and body of an answer "
    "apart, so Nagle's algorithm holds the body back until the client acknowledges the head, 40 ms later.",
    "stock-nodelay": "the same with that algorithm switched off, which few know to do.",
    "flask-wechatpy": "Flask and wechatpy under gunicorn, 1 gthread worker, 32 threads; JSON is parsed by Flask.",
    "werobot": "WeRoBot under waitress, 32 threads, sessions switched off; it cannot parse JSON, and is not sent any.",
    "fastapi": "FastAPI under uvicorn with uvloop and httptools.",
    "aiohttp": "aiohttp's own server with uvloop.",
    "asgi": "no framework, the bare ASGI interface under uvicorn with uvloop and httptools: the upper bound.",
}
COUNTS: Mapping[str, str] = {
    "socket_errors": "Connection errors",
    "timeouts": "Answers that took longer than 5 s",
    "repeats": "Pushes sent a second time, for want of further encrypted ones",
}
KEPT = Shape("xml", 32)
CLOSED = Shape("xml", 8, keep_alive=False)


@dataclass(frozen=True)
class Bar:
    """What kfserver is to reach: at least so many times a peer's rate, or at most so many times its p99 latency."""

    peer: str
    shape: Shape
    factor: float
    latency: bool = False


# Held to the stock server both ways: to beat it only where Nagle's algorithm slows it down would prove little.
BARS = (
    Bar("fastapi", KEPT, 2.0),
    Bar("stock", KEPT, 2.0),
    Bar("stock-nodelay", KEPT, 2.0),
    Bar("werobot", KEPT, 5.0),
    Bar("flask-wechatpy", KEPT, 8.0),
    Bar("fastapi", CLOSED, 1.3),
    Bar("stock", CLOSED, 3.0),
    Bar("stock-nodelay", CLOSED, 3.0),
    Bar("fastapi", KEPT, 2.0, latency=True),
)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=4, help="length of one round (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds for each server and load (default: 3)")
    parser.add_argument("--quick", action="store_true", help="one round of one second")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these servers")
    parser.add_argument("--kfserver-args", default="", metavar="ARGS", help="further arguments for every kfserver")
    variant = "another kfserver, with further arguments; {tmp} is a temporary folder"
    parser.add_argument("--variant", action="append", default=[], metavar="NAME=ARGS", help=variant)
    encrypted = "the same, which is sent safe-mode pushes; {aes_key} and {app_id} are what it needs to know"
    parser.add_argument("--variant-encrypted", action="append", default=[], metavar="NAME=ARGS", help=encrypted)
    parser.add_argument("--output", default="", metavar="FILE", help="write the report there instead of printing it")
    parser.add_argument("--update-readme", default="", metavar="FILE", help="put it between <!-- bench --> markers")
    parser.add_argument("--strict", action="store_true", help="exit with status 2 if a bar is missed")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1, 1
    return options


def chosen(options: argparse.Namespace) -> list[servers.Server]:
    """The servers to measure, kfserver first."""
    every = [servers.kfserver("kfserver", options.kfserver_args), *variants(options), *servers.peers()]
    known = [server.name for server in every]
    unknown = sorted(set(options.only or ()) - set(known))
    if unknown or len(set(known)) < len(known):
        raise SystemExit(f"no such server, or one name twice: {' '.join(unknown)}; servers: {' '.join(known)}")
    return [server for server in every if not options.only or server.name in options.only]


def variants(options: argparse.Namespace) -> Iterator[servers.Server]:
    """The further kfservers that were asked for."""
    for text in options.variant:
        name, _, args = text.partition("=")
        yield servers.kfserver(name, f"{options.kfserver_args} {args}")
    for text in options.variant_encrypted:
        import encrypt  # needs a package that only this case needs

        name, _, args = text.partition("=")
        args = args.replace("{aes_key}", encrypt.AES_KEY).replace("{app_id}", wire.APP_ID)
        yield servers.kfserver(name, f"{options.kfserver_args} {args}", encrypted=True)


def shapes() -> list[Shape]:
    """All kinds of load."""
    return [Shape(body_format, *column) for body_format in ("xml", "json") for column in COLUMNS]


def measure(targets: Sequence[servers.Running], options: argparse.Namespace, folder: Path) -> Results:
    """All rounds, interleaved."""
    results: Results = {}
    batches = load.Batches()
    for target, shape in schedule(targets, options.rounds):
        print(f"{target.server.name}: {label(shape)}, {shape.body_format}", file=sys.stderr)
        measured = load.run(target, shape, options.seconds, batches.next(), folder)
        results.setdefault((target.server.name, shape), Series([])).runs.append(measured)
        # Lets the server finish what was under way, so that it does not run into the next one's round.
        time.sleep(0.3)
    return results


def schedule(targets: Sequence[servers.Running], rounds: int) -> Iterator[tuple[servers.Running, Shape]]:
    """Who is loaded how, in order. The first of a round comes last in the next: none always follows the same one."""
    for number in range(rounds):
        first = number % len(targets)
        for shape in shapes():
            for target in [*targets[first:], *targets[:first]]:
                if shape.body_format in target.server.formats:
                    yield target, shape


def label(shape: Shape) -> str:
    """A kind of load, as a table's head has it."""
    return f"{'keep-alive' if shape.keep_alive else 'no keep-alive'}, {shape.connections}"


def compose(names: Sequence[str], results: Results, options: argparse.Namespace) -> str:
    """The whole report in Markdown."""
    how = (
        f"Medians of {options.rounds} rounds of {options.seconds} s, servers interleaved, one process each, 127.0.0.1."
    )
    parts = [f"{report.machine()} {report.versions(PACKAGES)}.\n{how} In brackets: relative to kfserver."]
    for body_format in ("xml", "json"):
        for latency in (False, True):
            parts.append(one_table(names, results, body_format, latency))
    bars = "\n".join(bar_lines(results))
    return "\n\n".join(part for part in (*parts, *notes(names, results), bars) if part)


def one_table(names: Sequence[str], results: Results, body_format: str, latency: bool) -> str:
    """Requests per second or latency for one body format."""
    columns = [shape for shape in shapes() if shape.body_format == body_format]
    title = f"{body_format.upper()}, {'p99 latency in ms' if latency else 'requests per second'}"
    rows = [[name, *(cell(results, name, shape, latency) for shape in columns)] for name in names]
    return report.table([title, *(label(shape) for shape in columns)], rows)


def cell(results: Results, name: str, shape: Shape, latency: bool) -> str:
    """A figure, and its ratio to kfserver's."""
    if (name, shape) not in results:
        return "–"
    figure = value(results, name, shape, latency)
    if name == "kfserver" or ("kfserver", shape) not in results:
        return report.number(figure)
    return f"{report.number(figure)} ({figure / value(results, 'kfserver', shape, latency):.2f})"


def value(results: Results, name: str, shape: Shape, latency: bool) -> float:
    """A median."""
    series = results[name, shape]
    return series.p99_ms if latency else series.rate


def notes(names: Sequence[str], results: Results) -> list[str]:
    """What a reader of the tables must know, one paragraph each."""
    rows = "\n".join(f"- {name}: {text}" for name, text in ROWS.items() if name in names)
    counted = [counts(names, results, field, text) for field, text in COUNTS.items()]
    return [text for text in (rows, *counted) if text]


def counts(names: Sequence[str], results: Results, field: str, text: str) -> str:
    """How often something irregular happened, by server; nothing if it did not."""
    sums = {name: sum(series.total(field) for key, series in results.items() if key[0] == name) for name in names}
    shown = ", ".join(f"{name} {total:,}" for name, total in sums.items() if total)
    return f"{text}: {shown}." if shown else ""


def met(bar: Bar, results: Results) -> bool:
    """Whether kfserver reaches a bar."""
    own, other = (value(results, name, bar.shape, bar.latency) for name in ("kfserver", bar.peer))
    return own <= bar.factor * other if bar.latency else own >= bar.factor * other


def measured_bars(results: Results) -> list[Bar]:
    """The bars whose both sides were measured."""
    return [bar for bar in BARS if ("kfserver", bar.shape) in results and (bar.peer, bar.shape) in results]


def bar_lines(results: Results) -> Iterator[str]:
    """A line of the report for each bar."""
    for bar in measured_bars(results):
        own, other = (value(results, name, bar.shape, bar.latency) for name in ("kfserver", bar.peer))
        verdict = "PASS" if met(bar, results) else "FAIL"
        what = f"p99 at most {bar.factor:g} x" if bar.latency else f"at least {bar.factor:g} x"
        yield f"- {verdict}: {label(bar.shape)}: {what} {bar.peer}'s; it is {own / other:.2f} x"


def wrong_lines(results: Results) -> list[str]:
    """A line for each server and load that had wrong answers."""
    return [
        f"WRONG: {name}, {label(shape)}, {shape.body_format}: {series.total('wrong'):,}, such as {series.example!r}"
        for (name, shape), series in results.items()
        if series.total("wrong")
    ]


def start_all(stack: ExitStack, wanted: Sequence[servers.Server], folder: Path) -> list[servers.Running]:
    """Start and check the servers; the stack stops them."""
    targets = [stack.enter_context(servers.running(server, folder)) for server in wanted]
    for target in targets:
        servers.prove(target)
    return targets


def main() -> int:
    """Measure and report; the exit status."""
    # A terminated harness must stop its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    options = arguments()
    wanted = chosen(options)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kfserver-bench-")))
        try:
            results = measure(start_all(stack, wanted, folder), options, folder)
        except servers.WrongAnswer as problem:
            print(f"WRONG: {problem}", file=sys.stderr)
            return 1
    text = compose([server.name for server in wanted], results, options)
    print("\n".join(report.publish(text, "bench", options.output, options.update_readme)))
    return verdict(results, options.strict)


def verdict(results: Results, strict: bool) -> int:
    """The exit status: 1 for wrong answers, 2 for a missed bar if that matters."""
    wrong = wrong_lines(results)
    for line in wrong:
        print(line, file=sys.stderr)
    missed = not all(met(bar, results) for bar in measured_bars(results))
    return 1 if wrong else 2 if strict and missed else 0


if __name__ == "__main__":
    sys.exit(main())
