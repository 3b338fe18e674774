"""The servers under measurement: how each is started, checked and stopped."""

import http.client
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import wire

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent.parent
START_SECONDS = 20.0
STOP_SECONDS = 5.0
# A server has finished its work when it uses less than this share of a core for as long as this. One tick of the
# kernel's clock is 0.01 s.
REST_SHARE, REST_SECONDS = 0.1, 0.3


class WrongAnswer(Exception):
    """A server that does not do the work: its figures would mean nothing."""


@dataclass(frozen=True)
class Server:
    """A server and its command line, in which `{port}` and `{tmp}` stand for a free port and a temporary folder."""

    name: str
    command: tuple[str, ...]
    formats: tuple[str, ...] = ("xml", "json")
    encrypted: bool = False
    tls: bool = False


@dataclass
class Running:
    """A started server."""

    server: Server
    port: int
    pid: int
    probe_file: Path

    def handled(self) -> int:
        """How many of the checking pushes its handler has run for."""
        return self.probe_file.stat().st_size

    def cpu_seconds(self) -> float:
        """The processor's time that it and its children have used; children that have ended do not count."""
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it has just ended
                fields = path.read_text().rpartition(")")[2].split()
                total += (int(fields[11]) + int(fields[12])) * (int(fields[3]) == self.pid)  # the session's leader
        return total / os.sysconf("SC_CLK_TCK")

    def rest(self, seconds: float = 60.0) -> None:
        """Wait until it has nothing left to do, or so many seconds: its work must not run into the next one's round."""
        deadline, before = time.monotonic() + seconds, -1.0
        while time.monotonic() < deadline:
            spent = self.cpu_seconds()
            if spent - before < REST_SHARE * REST_SECONDS:
                return
            before = spent
            time.sleep(REST_SECONDS)


def kfserver(
    name: str, args: str = "", encrypted: bool = False, handlers: Path | None = None, tls: bool = False
) -> Server:
    """kfserver as it is, or a variant of it with further arguments."""
    args += " --tls-cert {tmp}/cert.pem --tls-key {tmp}/key.pem" if tls else ""
    script, handlers = ROOT / "kfserver.py", handlers or BENCH / "handlers_bench.py"
    command = [sys.executable, str(script), "--host", "127.0.0.1", "--port", "0", "--token", wire.TOKEN]
    command += ["--log-level", "warning", "--handlers", str(handlers), *shlex.split(args)]
    return Server(name, tuple(command), encrypted=encrypted, tls=tls)


def peer(name: str, script: str, *args: str, formats: tuple[str, ...] = ("xml", "json")) -> Server:
    """A peer of the folder peers/."""
    path = str(BENCH / "peers" / script)
    return Server(name, (sys.executable, path, "--port", "{port}", "--token", wire.TOKEN, *args), formats)


def tls_peer(name: str, script: str) -> Server:
    """A peer that serves HTTPS, with the certificate that `make_certificate` has made."""
    made = peer(name, script, "--cert", "{tmp}/cert.pem", "--key", "{tmp}/key.pem", formats=("xml",))
    return replace(made, tls=True)


def peers() -> tuple[Server, ...]:
    """All peers, in the order of the tables."""
    return (
        peer("stock", "stock.py"),
        peer("stock-nodelay", "stock.py", "--nodelay"),
        peer("flask-wechatpy", "flask_wechatpy.py"),
        peer("werobot", "werobot_waitress.py", formats=("xml",)),
        peer("fastapi", "fastapi_uvicorn.py"),
        peer("aiohttp", "aiohttp_web.py"),
        peer("asgi", "asgi_uvicorn.py"),
    )


def https() -> tuple[Server, ...]:
    """Those that are compared over HTTPS, all with one certificate."""
    return (
        replace(kfserver("kfserver-https", tls=True), formats=("xml",)),
        tls_peer("fastapi-https", "fastapi_uvicorn.py"),
        tls_peer("asgi-https", "asgi_uvicorn.py"),
    )


def durable() -> tuple[Server, ...]:
    """Those that lose nothing: a message is in a file before it is answered."""
    return (
        replace(kfserver("journal", "--journal {tmp}/journal.db"), formats=("xml",)),
        huey_peer("huey", "off"),
        replace(kfserver("journal-full", "--journal {tmp}/full.db --journal-sync full"), formats=("xml",)),
        huey_peer("huey-full", "full"),
    )


def huey_peer(name: str, sync: str) -> Server:
    """FastAPI with a queue of huey's; ``sync`` says whether it waits for the disk."""
    return peer(name, "fastapi_huey.py", "--file", f"{{tmp}}/{name}.db", "--sync", sync, formats=("xml",))


def make_certificate(folder: Path) -> None:
    """cert.pem and key.pem in the folder: an elliptic curve's, as they are issued today, signed by itself."""
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "1", "-subj", "/CN=localhost", "-out", str(folder / "cert.pem")]
    command += ["-keyout", str(folder / "key.pem")]
    subprocess.run(command, stderr=subprocess.DEVNULL, timeout=START_SECONDS, check=True)


@contextmanager
def running(server: Server, folder: Path) -> Iterator[Running]:
    """Start a server, wait until it takes connections, stop it at the end, whatever happens."""
    port, log, probe_file = free_port(), folder / f"{server.name}.log", folder / f"{server.name}.probe"
    probe_file.touch()
    command = [part.replace("{port}", str(port)).replace("{tmp}", str(folder)) for part in server.command]
    # kfserver takes settings from the environment, too; none of the caller's own may slip in.
    environment = {name: text for name, text in os.environ.items() if not name.startswith("KF_")}
    environment.update(BENCH_PROBE_FILE=str(probe_file), PYTHONUNBUFFERED="1")
    with log.open("wb") as output:
        # A session of its own: gunicorn's worker is stopped together with gunicorn.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    try:
        if "{port}" not in server.command:
            port = announced_port(process, log)
        await_port(process, port, log)
        yield Running(server, port, process.pid, probe_file)
    finally:
        stop(process)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def poll(what: str, attempt: Callable[[], int | None], seconds: float) -> int:
    """Repeat until the attempt gives something, or fail."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = attempt()
        if found is not None:
            return found
        time.sleep(0.05)
    raise WrongAnswer(f"{what}: nothing within {seconds:g} s")


def announced_port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """The port that kfserver says it listens on."""

    def attempt() -> int | None:
        must_live(process, log)
        found = re.search(r"listening on https?://[^\s/]+:(\d+)", log.read_text(errors="replace"))
        return int(found.group(1)) if found else None

    return poll(f"the port in {log.name}", attempt, START_SECONDS)


def await_port(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    """Wait until the server takes connections."""

    def attempt() -> int | None:
        must_live(process, log)
        with socket.socket() as client:
            return port if client.connect_ex(("127.0.0.1", port)) == 0 else None

    poll(f"a connection, {log.name}", attempt, START_SECONDS)


def must_live(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Fail with the server's own words when it has ended."""
    if process.poll() is not None:
        raise WrongAnswer(f"{log.stem} ended with status {process.returncode}:\n{log.read_text(errors='replace')}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and its children."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            continue


def make_push(server: Server, body_format: str, sender: str, msg_id: int) -> tuple[str, bytes]:
    """Query and body of one push as this server wants it."""
    if server.encrypted:
        import encrypt  # needs a package that only this case needs

        return encrypt.push(body_format, sender, msg_id)
    return wire.signed_query(), wire.message(body_format, sender, msg_id)


def post(target: Running, body_format: str, query: str, body: bytes) -> tuple[int, bytes]:
    """Send one push; status and body of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=5)
    if target.server.tls:
        # The certificate of a benchmark is signed by nobody.
        context = ssl._create_unverified_context()
        connection = http.client.HTTPSConnection("127.0.0.1", target.port, timeout=5, context=context)
    try:
        connection.request("POST", "/?" + query, body, {"Content-Type": wire.content_type(body_format)})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def expect(holds: bool, name: str, what: str) -> None:
    """Fail unless it holds."""
    if not holds:
        raise WrongAnswer(f"{name}: {what}")


def prove(target: Running) -> None:
    """Check, in every format, that the server does the whole work that is measured."""
    for number, body_format in enumerate(target.server.formats, start=1):
        prove_format(target, body_format, number)
        # A second run of the handler would come late, if at all.
        time.sleep(0.2)
        expect(target.handled() == number, target.server.name, f"{body_format}: the handler ran for a repeat")


def prove_format(target: Running, body_format: str, number: int) -> None:
    """A push is handled and answered, a repeat only answered, a wrong signature refused."""
    name = target.server.name
    query, body = make_push(target.server, body_format, wire.PROBE, number)
    answer = post(target, body_format, query, body)
    expect(answer == (200, b"success"), name, f"{body_format}: answered {answer}")
    poll(f"{name}'s handler", lambda: target.handled() if target.handled() == number else None, 5)
    answer = post(target, body_format, query, body)
    expect(answer == (200, b"success"), name, f"{body_format}: a repeat was answered {answer}")
    _, unseen = make_push(target.server, body_format, wire.PROBE, number + 1000)
    answer = post(target, body_format, query.replace("signature=", "signature=0"), unseen)
    expect(answer[0] in (401, 403), name, f"{body_format}: a wrong signature was answered {answer}")
