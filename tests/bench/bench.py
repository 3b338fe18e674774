"""Measure kfserver beside other ways to receive the same pushes.

All servers are started at once and stay idle but for the one that is loaded. The rounds go from server to server, so
that a slow minute of the machine falls on all of them, and the tables show the medians. See requirements.txt for what
the peers need; `--only kfserver` needs nothing but wrk. Three comparisons: HTTP, HTTPS with one certificate for all,
and servers that have each message in a file before they answer.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import load
import plot
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
    "huey",
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
    "kfserver-https": "kfserver with --tls-cert and --tls-key. All of these have one certificate, of the curve P-256.",
    "fastapi-https": "fastapi with uvicorn's own TLS.",
    "asgi-https": "asgi with uvicorn's own TLS.",
    "journal": "kfserver --journal. What was answered survives a crash of the process; a power cut may take the last "
    "moment's messages, and leaves the file in order (SQLite's synchronous=NORMAL). Repeats are known after a restart.",
    "huey": "FastAPI that enqueues each message into huey's SQLite queue before it answers, with fsync=False. That "
    "survives a crash of the process; a power cut may damage the file (synchronous=OFF, less than journal gives). A "
    "second process, the consumer, runs the handlers. Repeats are dropped by memory, no longer known after a restart.",
    "journal-full": "kfserver --journal --journal-sync full. What was answered survives a power cut too: each group of "
    "messages that come together waits for the disk once.",
    "huey-full": "the same as huey with fsync=True: what was answered survives a power cut; each message waits for the "
    "disk by itself.",
}
COUNTS: Mapping[str, str] = {
    "socket_errors": "Connection errors",
    "timeouts": "Answers that took longer than 5 s",
    "repeats": "Pushes sent a second time, for want of further encrypted ones",
}


@dataclass(frozen=True)
class Comparison:
    """Servers that stand in one table, the first of which the others are compared with."""

    title: str
    names: tuple[str, ...]
    body_format: str = "xml"


HTTP = ("kfserver", *(server.name for server in servers.peers()))
HTTPS = tuple(server.name for server in servers.https())
DURABLE = tuple(server.name for server in servers.durable())
COMPARISONS = (
    Comparison("XML", HTTP),
    Comparison("JSON", HTTP, "json"),
    Comparison("HTTPS, XML", HTTPS),
    Comparison("nothing lost in a crash, XML", DURABLE[:2]),
    Comparison("nothing lost in a power cut, XML", DURABLE[2:]),
)

KEPT = Shape("xml", 32)
CLOSED = Shape("xml", 8, keep_alive=False)


@dataclass(frozen=True)
class Bar:
    """What kfserver is to reach: at least so many times a peer's rate, or at most so many times its p99 latency."""

    peer: str
    shape: Shape
    factor: float
    latency: bool = False
    own: str = "kfserver"


# The README's table: its rows by the name of the plain server, and who stands for it over HTTPS and with a file.
SUMMARY: Mapping[str, tuple[str, str, str]] = {
    "**kfserver**": ("kfserver", "kfserver-https", "journal"),
    "bare ASGI, uvicorn": ("asgi", "asgi-https", ""),
    "aiohttp": ("aiohttp", "", ""),
    "FastAPI, uvicorn": ("fastapi", "fastapi-https", "huey"),
    "http.server": ("stock-nodelay", "", ""),
    "WeRoBot, waitress": ("werobot", "", ""),
    "Flask, wechatpy, gunicorn": ("flask-wechatpy", "", ""),
}
SUMMARY_HEAD = (
    "pushes/s 每秒推送",
    "32 kept 长连接",
    "8 new 短连接",
    "HTTPS, 32 kept",
    "nothing lost 不丢消息, 32 kept",
)
PLOT_TITLES = (
    "Pushes answered a second, 32 kept connections, one process each",
    "每秒应答的推送数，32 个长连接，各一个进程",
)

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
    Bar("fastapi-https", KEPT, 1.0, own="kfserver-https"),
    Bar("huey", KEPT, 1.0, own="journal"),
    Bar("huey-full", KEPT, 1.0, own="journal-full"),
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
    readme = "put the summary between <!-- bench --> markers, wherever they stand"
    parser.add_argument("--update-readme", default="", metavar="FILE", help=readme)
    parser.add_argument("--update-tables", default="", metavar="FILE", help="put the report between such markers there")
    parser.add_argument("--plot", default="", metavar="FILE", help="draw the summary's first column as an SVG")
    parser.add_argument("--strict", action="store_true", help="exit with status 2 if a bar is missed")
    options = parser.parse_args()
    if options.quick:
        options.seconds, options.rounds = 1, 1
    return options


def chosen(options: argparse.Namespace) -> list[servers.Server]:
    """The servers to measure, kfserver first."""
    every = [servers.kfserver("kfserver", options.kfserver_args), *variants(options), *servers.peers()]
    every += [*servers.https(), *servers.durable()]
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
        target.rest()
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
        f"Medians of {options.rounds} rounds of {options.seconds} s, servers interleaved, 127.0.0.1, one process each "
        "(huey: two). In brackets: relative to the first row."
    )
    parts = [f"{report.machine()} {report.versions(PACKAGES)}.\n{how}"]
    for comparison in with_variants(names):
        for latency in (False, True):
            parts.append(one_table(comparison, results, latency))
    bars = "\n".join(bar_lines(results))
    return "\n\n".join(part for part in (*parts, *notes(names, results), bars) if part)


def with_variants(names: Sequence[str]) -> Iterator[Comparison]:
    """The comparisons of what was measured; variants of kfserver stand in the tables of HTTP."""
    known = {name for comparison in COMPARISONS for name in comparison.names}
    for comparison in COMPARISONS:
        wanted = [name for name in names if name in comparison.names]
        if comparison.names == HTTP:
            wanted = [name for name in names if name in HTTP or name not in known]
        if wanted:
            yield replace(comparison, names=tuple(wanted))


def one_table(comparison: Comparison, results: Results, latency: bool) -> str:
    """Requests per second or latency of one comparison."""
    columns = [shape for shape in shapes() if shape.body_format == comparison.body_format]
    title = f"{comparison.title}, {'p99 latency in ms' if latency else 'requests per second'}"
    rows = [
        [name, *(cell(results, name, comparison.names[0], shape, latency) for shape in columns)]
        for name in comparison.names
    ]
    return report.table([title, *(label(shape) for shape in columns)], rows)


def cell(results: Results, name: str, first: str, shape: Shape, latency: bool) -> str:
    """A figure, and its ratio to that of the first row."""
    if (name, shape) not in results:
        return "–"
    figure = value(results, name, shape, latency)
    if name == first or (first, shape) not in results:
        return report.number(figure)
    return f"{report.number(figure)} ({figure / value(results, first, shape, latency):.2f})"


def summarize(results: Results) -> str:
    """The README's table, and what it was measured on."""
    rows = [
        [row, *(report.number(results[key].rate) if key in results else "–" for key in keys)]
        for row, keys in ((row, summary_keys(names)) for row, names in SUMMARY.items())
        if any(key in results for key in keys)
    ]
    return f"{report.table(SUMMARY_HEAD, rows)}\n\n{report.machine()}"


def summary_keys(names: tuple[str, str, str]) -> list[tuple[str, Shape]]:
    """Which results stand in a row of the README's table."""
    plain, https, durable = names
    return [(plain, KEPT), (plain, CLOSED), (https, KEPT), (durable, KEPT)]


def draw(path: Path, results: Results) -> None:
    """Draw the first column of the README's table."""
    bars = [
        plot.Bar(row.strip("*"), results[names[0], KEPT].rate, names[0] == "kfserver")
        for row, names in SUMMARY.items()
        if (names[0], KEPT) in results
    ]
    if bars:
        plot.write(path, PLOT_TITLES, sorted(bars, key=lambda bar: -bar.value))


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
    own, other = (value(results, name, bar.shape, bar.latency) for name in (bar.own, bar.peer))
    return own <= bar.factor * other if bar.latency else own >= bar.factor * other


def measured_bars(results: Results) -> list[Bar]:
    """The bars whose both sides were measured."""
    return [bar for bar in BARS if (bar.own, bar.shape) in results and (bar.peer, bar.shape) in results]


def bar_lines(results: Results) -> Iterator[str]:
    """A line of the report for each bar."""
    for bar in measured_bars(results):
        own, other = (value(results, name, bar.shape, bar.latency) for name in (bar.own, bar.peer))
        verdict = "PASS" if met(bar, results) else "FAIL"
        what = f"p99 at most {bar.factor:g} x" if bar.latency else f"at least {bar.factor:g} x"
        yield f"- {verdict}: {bar.own}, {label(bar.shape)}: {what} {bar.peer}'s; it is {own / other:.2f} x"


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
        servers.make_certificate(folder)
        try:
            results = measure(start_all(stack, wanted, folder), options, folder)
        except servers.WrongAnswer as problem:
            print(f"WRONG: {problem}", file=sys.stderr)
            return 1
    text = compose([server.name for server in wanted], results, options)
    if options.update_readme:
        report.update(Path(options.update_readme), "bench", summarize(results))
    if options.plot:
        draw(Path(options.plot), results)
    print("\n".join(report.publish(text, "bench", options.output, options.update_tables)))
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
