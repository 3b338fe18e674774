"""Whether thousands of connections that never complete a request can keep true pushes from being answered in time."""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import servers
from live import Finding, Live, Watch, conclude, settles, started, watching
from push_clients import RIGHT, Outcome, paced, percentile, send_all, wrong_answers

RATE, MOST_MIB, RETURN_MIB = 40.0, 150.0, 10.0
# Milliseconds within which each true push is to be answered; a new TLS connection costs both sides a handshake.
WITHIN_MS, WITHIN_MS_TLS = 500.0, 1000.0
ASSEMBLY_SECONDS = 5.0
# Enough that those who wait for an answer of five seconds hold up nobody else.
CLIENTS = 128
PATIENCE = 30.0


class Attack(NamedTuple):
    """How many hostile connections there are, and the seconds between their bytes; 0 for none."""

    name: str
    connections: int
    byte_seconds: float
    tls: bool = False

    @property
    def within_ms(self) -> float:
        """The bar for true pushes."""
        return WITHIN_MS_TLS if self.tls else WITHIN_MS


def attacks(connections: int) -> dict[str, Attack]:
    """All kinds."""
    return {"drip": Attack(f"{connections:,} that send a byte every 2 s", connections, 2.0),
            "silent": Attack(f"{connections:,} that send nothing", connections, 0.0),
            "tls": Attack(f"{connections:,} that send nothing, TLS", connections, 0.0, True),
            "half-tls": Attack(f"{connections:,} in a TLS handshake, a byte every 2 s", connections, 2.0, True)}


@contextmanager
def attacking(attack: Attack, port: int, counts: dict[str, int]) -> Iterator[None]:
    """Attack from another process; afterwards ``counts`` says how often it connected."""
    command = [sys.executable, str(servers.BENCH / "attackers.py"), "--port", str(port)]
    command += ["--connections", str(attack.connections), "--seconds", str(attack.byte_seconds)]
    command += ["--tls"] * attack.tls
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    try:
        time.sleep(ASSEMBLY_SECONDS)
        yield
        output, _ = process.communicate(timeout=PATIENCE)
        counts.update(json.loads(output))
    finally:
        servers.stop(process)


def withstand(attack: Attack, folder: Path, seconds: float, args: str) -> Iterator[Finding]:
    """Push at a steady rate during the attack."""
    outcomes: list[Outcome] = []
    counts: dict[str, int] = {}
    name, count = attack.name.replace(" ", "-").replace(",", ""), int(RATE * seconds)
    if attack.tls:
        servers.make_certificate(folder)
        args += f" --tls-cert {folder}/cert.pem --tls-key {folder}/key.pem"
    with started(folder, name, args) as live:
        before = live.resident_mib, live.files
        with watching(live, 0.25) as watch, attacking(attack, live.target.port, counts):
            begun, spent = time.monotonic(), live.cpu_seconds
            send_all(live.target, paced(range(count), ["openid"], RATE), CLIENTS, outcomes.append)
            busy = (live.cpu_seconds - spent) / (time.monotonic() - begun)
            spent = live.cpu_seconds
        yield from pushed(attack, outcomes, live.await_handled(count, PATIENCE).total())
        yield from cost(live, watch, before)
    away = counts["sent_away"]
    figure = f"{busy:.0%} of one core; {spent / max(1, away) * 1e6:.0f} us for each connection sent away"
    yield Finding("- processor time of the server", figure)
    yield Finding("- connected, sent away, bytes sent", ", ".join(f"{number:,}" for number in counts.values()))


def pushed(attack: Attack, outcomes: Sequence[Outcome], handled: int) -> Iterator[Finding]:
    """How the true pushes fared."""
    right = sum(outcome.answer == RIGHT and outcome.milliseconds < attack.within_ms for outcome in outcomes)
    wrong = wrong_answers(outcomes)
    figure = f"{right:,} of {len(outcomes):,}{wrong and '; '}{wrong}"
    yield Finding(f"{attack.name}: answered within {attack.within_ms:g} ms", figure, "all", right == len(outcomes))
    times = [outcome.milliseconds for outcome in outcomes]
    shown = " / ".join(f"{percentile(times, share):.0f}" for share in (0.5, 0.99, 1.0))
    yield Finding("- milliseconds: median / p99 / most", shown)
    yield Finding("- runs of the handler", f"{handled:,} of {len(outcomes):,}", "all", handled == len(outcomes))


def cost(live: Live, watch: Watch, before: tuple[float, int]) -> Iterator[Finding]:
    """What the attack cost the server, and whether it got it back."""
    returned = settles(lambda: live.resident_mib <= before[0] + RETURN_MIB and live.files <= before[1], PATIENCE)
    most, files = watch.most("resident_mib"), int(watch.most("files"))
    yield Finding("- memory: before / most / after", f"{before[0]:.1f} / {most:.1f} / {live.resident_mib:.1f} MiB",
                  f"below {MOST_MIB:g} MiB, back within {RETURN_MIB:g}", most < MOST_MIB and returned)
    limit = open_files_limit(live.process.pid)
    yield Finding("- descriptors: before / most / after", f"{before[1]} / {files} / {live.files}",
                  f"below {limit:,}, and back", files < limit and live.files <= before[1])
    yield Finding("- threads: most / after", f"{int(watch.most('threads'))} / {live.threads}")
    errors = live.errors()
    yield Finding("- errors in the log", f"{len(errors)} {errors[0][:80] if errors else ''}".strip(), "none",
                  not errors)


def open_files_limit(pid: int) -> int:
    """How many descriptors the process may have."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    return int(next(line.split()[3] for line in lines if line.startswith("Max open files")))


def main() -> int:
    """Measure and report; the exit status."""
    # A terminated harness must stop its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="length of each attack (default: 30)")
    parser.add_argument("--connections", type=int, default=5000, help="hostile ones (default: 5000)")
    parser.add_argument("--only", nargs="+", choices=attacks(0), default=list(attacks(0)), help="only these attacks")
    parser.add_argument("--kfserver-args", default="", metavar="ARGS", help="further arguments for kfserver")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kfserver-hostage-") as folder:
        chosen = [attacks(options.connections)[name] for name in options.only]
        findings = [finding for attack in chosen
                    for finding in withstand(attack, Path(folder), options.seconds, options.kfserver_args)]
    return conclude(findings)


if __name__ == "__main__":
    sys.exit(main())
