"""Whether a server under a steady load for a long time keeps its memory, its descriptors and its threads."""

import argparse
import signal
import statistics
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

from live import Finding, Sample, Watch, conclude, settles, started, watching
from push_clients import RIGHT, Outcome, Push, paced, percentile, send_all

CLIENTS = 48
# Every tenth push ends its connection: both kinds of clients are there.
CLOSE_EVERY = 10
FLAT_MIB, WARM_SECONDS, SAMPLE_SECONDS, PATIENCE = 5.0, 60.0, 1.0, 40.0


class Tally:
    """Counts outcomes; to keep hundreds of thousands of them would be the client's own leak."""

    def __init__(self) -> None:
        self.answers: Counter[str] = Counter()
        self.milliseconds = array("f")
        self.late = 0.0

    def note(self, outcome: Outcome) -> None:
        """Count one more."""
        self.answers[outcome.answer] += 1
        self.milliseconds.append(outcome.milliseconds)
        self.late = max(self.late, outcome.sent - outcome.due)


def pushes(minutes: float, rate: float) -> Iterator[Push]:
    """All pushes of the run."""
    senders = [f"openid-{number:04d}" for number in range(5000)]
    for push in paced(count(), senders, rate, CLOSE_EVERY):
        if push.due > minutes * 60:
            return
        yield push


def soak(folder: Path, minutes: float, rate: float, args: str) -> Iterator[Finding]:
    """Push for so long, and look at the server meanwhile and afterwards."""
    tally = Tally()
    with started(folder, "soak", args) as live:
        before = live.files, live.threads
        with watching(live, SAMPLE_SECONDS) as watch:
            send_all(live.target, pushes(minutes, rate), CLIENTS, tally.note)
        total = sum(tally.answers.values())
        handled = live.await_handled(total, PATIENCE)
        spent = live.cpu_seconds
        returned = settles(lambda: live.files <= before[0] and live.threads <= before[1], PATIENCE)
        after, errors = (live.files, live.threads), live.errors()
    yield from answered(tally, total, minutes)
    good = len(handled) == total and max(handled.values()) == 1
    yield Finding("messages handled exactly once", f"{len(handled):,} of {total:,}", "all", good)
    yield from memory(watch)
    for name, index in (("descriptors", 0), ("threads", 1)):
        most = int(watch.most("files" if name == "descriptors" else "threads"))
        yield Finding(f"{name}: before / most / after", f"{before[index]} / {most} / {after[index]}",
                      "after as before", returned)
    yield Finding("processor time for each push", f"{spent / total * 1e6:.0f} us")
    yield Finding("errors in the log", f"{len(errors)} {errors[0][:80] if errors else ''}".strip(), "none", not errors)


def answered(tally: Tally, total: int, minutes: float) -> Iterator[Finding]:
    """How the pushes were answered, and when."""
    right = tally.answers[RIGHT]
    wrong = ", ".join(f"{times:,} x {answer}" for answer, times in tally.answers.items() if answer != RIGHT)
    yield Finding("answered `success`", f"{right:,} of {total:,}{wrong and '; '}{wrong}", "all", right == total)
    yield Finding("pushes a second", f"{total / minutes / 60:,.0f}; sent {tally.late * 1000:.0f} ms late at most")
    shown = " / ".join(f"{percentile(tally.milliseconds, share):.1f}" for share in (0.5, 0.99, 1.0))
    yield Finding("milliseconds: median / p99 / most", shown)


def memory(watch: Watch) -> Iterator[Finding]:
    """Whether memory was flat once the first minute was over."""
    warm = [sample for sample in watch.samples if sample.seconds >= WARM_SECONDS] or watch.samples[-1:]
    held = [sample.resident_mib for sample in warm]
    grown = max(held) - held[0]
    yield Finding("memory: start / first minute / least / most / end",
                  f"{watch.samples[0].resident_mib:.1f} / {held[0]:.1f} / {min(held):.1f} / {max(held):.1f} / "
                  f"{held[-1]:.1f} MiB", f"{FLAT_MIB:g} MiB more at most", grown <= FLAT_MIB)
    tenths = watch.samples[::max(1, len(watch.samples) // 10)]
    yield Finding("- over the run", " ".join(f"{sample.resident_mib:.1f}" for sample in tenths))
    yield Finding("slope of it after the first minute", f"{slope(warm) * 3600:+.2f} MiB an hour")


def slope(samples: Sequence[Sample]) -> float:
    """MiB a second, of the line that fits best."""
    if len(samples) < 2:
        return 0.0
    times, sizes = [sample.seconds for sample in samples], [sample.resident_mib for sample in samples]
    return statistics.linear_regression(times, sizes).slope


def main() -> int:
    """Measure and report; the exit status."""
    # A terminated harness must stop its servers, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: 10)")
    parser.add_argument("--rate", type=float, default=1000.0, help="pushes a second (default: 1000)")
    parser.add_argument("--kfserver-args", default="", metavar="ARGS", help="further arguments for kfserver")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kfserver-soak-") as folder:
        findings = list(soak(Path(folder), options.minutes, options.rate, options.kfserver_args))
    return conclude(findings)


if __name__ == "__main__":
    sys.exit(main())
