"""Whether pushes get lost behind nginx, over HTTP/1.0 and HTTP/1.1, to a port and to a Unix socket."""

import argparse
import getpass
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import NamedTuple

import servers
from live import Finding, Live, conclude, settles, started
from push_clients import RIGHT, Outcome, Push, Target, percentile, send_all, wrong_answers

CLIENTS, PATIENCE = 16, 60.0

# What the README shows: into `http`, and into its `server`. nginx must let go of an idle connection before kfserver
# does, after 15 s: a push sent down a connection that is just being closed is lost, for nginx sends no POST twice.
UPSTREAM = Template("""\
upstream kfserver {
    server $server;
    keepalive 16;
    keepalive_timeout 10s;
}
""")
LOCATION = Template("""\
location /kf {
    proxy_pass http://kfserver;
    proxy_http_version $version;
    proxy_set_header Connection "$connection";
}
""")
AROUND = Template("""\
daemon off;
$user
pid $folder/nginx.pid;
error_log $folder/error.log warn;
events { worker_connections 1024; }
http {
access_log off;
client_body_temp_path $folder/body;
proxy_temp_path $folder/proxy;
fastcgi_temp_path $folder/fastcgi;
uwsgi_temp_path $folder/uwsgi;
scgi_temp_path $folder/scgi;
$upstream
server {
listen 127.0.0.1:$port;
$location
}
}
""")


class Case(NamedTuple):
    """How nginx speaks to kfserver."""

    version: str
    unix: bool

    @property
    def name(self) -> str:
        """In words."""
        return f"HTTP/{self.version}, {'Unix socket' if self.unix else 'port'}"


CASES = [Case(version, unix) for unix in (False, True) for version in ("1.0", "1.1")]


def ten_lines(case: Case, server: str) -> tuple[str, str]:
    """The lines of nginx's configuration that matter. With HTTP/1.0 each push has a connection of its own."""
    if case.version == "1.1":
        return UPSTREAM.substitute(server=server), LOCATION.substitute(version="1.1", connection="")
    upstream = "".join(line for line in UPSTREAM.template.splitlines(keepends=True) if "keepalive" not in line)
    return Template(upstream).substitute(server=server), LOCATION.substitute(version="1.0", connection="close")


@contextmanager
def nginx(folder: Path, lines: tuple[str, str], port: int) -> Iterator[Path]:
    """Run nginx in front, as whoever runs this; gives its error log."""
    # As root it would let its workers be nobody, who may not enter the folder.
    user = f"user {getpass.getuser()};" if os.geteuid() == 0 else ""
    config, log = folder / "nginx.conf", folder / "error.log"
    config.write_text(AROUND.substitute(user=user, folder=folder, port=port, upstream=lines[0], location=lines[1]))
    command = [shutil.which("nginx") or "/usr/sbin/nginx", "-p", str(folder), "-e", str(log), "-c", str(config)]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        servers.await_port(process, port, log)
        yield log
    finally:
        servers.stop(process)


def through(case: Case, folder: Path, pushes: int) -> Iterator[Finding]:
    """Push through nginx by several clients at once."""
    folder.mkdir()
    outcomes: list[Outcome] = []
    port = servers.free_port()
    with started(folder, "behind-nginx", f"--unix {folder}/kf.sock" if case.unix else "") as live:
        with nginx(folder, ten_lines(case, upstream(live)), port) as log:
            send_all(Target(port), messages(pushes), CLIENTS, outcomes.append)
            handled = live.await_handled(pushes, PATIENCE)
            complaints = log.read_text().splitlines()
        closed = settles(lambda: live.files <= 12, PATIENCE)
    yield from fared(case, outcomes, handled)
    yield Finding("- lines in nginx's log", f"{len(complaints)} {complaints[0][-90:] if complaints else ''}".strip(),
                  "none", not complaints)
    yield Finding("- connections closed afterwards", "all" if closed else "not all", "all", closed)


def upstream(live: Live) -> str:
    """What nginx calls it."""
    return f"unix:{live.target.unix}" if live.target.unix else f"127.0.0.1:{live.target.port}"


def messages(count: int) -> list[Push]:
    """So many, by 500 senders."""
    return [Push(number, f"openid-{number % 500:03d}") for number in range(count)]


def fared(case: Case, outcomes: list[Outcome], handled: Counter[int]) -> Iterator[Finding]:
    """What became of the pushes."""
    right, count = sum(outcome.answer == RIGHT for outcome in outcomes), len(outcomes)
    wrong = wrong_answers(outcomes)
    yield Finding(f"{case.name}: answered `success`", f"{right:,} of {count:,}{wrong and '; '}{wrong}", "all",
                  right == count)
    doubled = sum(times > 1 for times in handled.values())
    yield Finding("- messages handled", f"{len(handled):,} of {count:,}; {doubled:,} more than once",
                  "each exactly once", len(handled) == count and not doubled)
    times = [outcome.milliseconds for outcome in outcomes]
    seconds = max(outcome.done for outcome in outcomes) - min(outcome.sent for outcome in outcomes)
    shown = " / ".join(f"{percentile(times, share):.1f}" for share in (0.5, 0.99, 1.0))
    yield Finding("- pushes a second; ms: median / p99 / most", f"{count / seconds:,.0f}; {shown}")


def main() -> int:
    """Measure and report; the exit status."""
    # A terminated harness must stop its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pushes", type=int, default=10_000, help="in each case (default: 10000)")
    parser.add_argument("--show", action="store_true", help="print the lines of nginx's configuration, and no more")
    options = parser.parse_args()
    shown = "".join(ten_lines(Case("1.1", False), "127.0.0.1:8080"))
    if options.show:
        print(shown)
        return 0
    # Unix sockets have short paths: the folder's name is short, too.
    with tempfile.TemporaryDirectory(prefix="kf-") as folder:
        findings = [finding for number, case in enumerate(CASES)
                    for finding in through(case, Path(folder) / str(number), options.pushes)]
    status = conclude(findings)
    print(f"\nThe lines for HTTP/1.1 and a port:\n\n{shown}")
    return status


if __name__ == "__main__":
    sys.exit(main())
