"""Tables in Markdown, the machine in words, and the place in the README where both go."""

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table: the first column left, the others right."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def number(value: float) -> str:
    """Three significant digits, or all that stand before the point."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def machine() -> str:
    """What the figures were measured on, in one sentence."""
    system = f"{platform.system()} {platform.release().split('-')[0]}"
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{cpu_model()}, {os.cpu_count()} cores, {system}, {python}, {wrk_version()}."


def cpu_model() -> str:
    """The processor's name, where the system tells it."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(errors="replace") if path.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def wrk_version() -> str:
    """The load generator and its version."""
    # wrk ends with status 1 after it has told its version.
    output = subprocess.run(["wrk", "-v"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10, check=False)
    found = re.match(rb"wrk \D*([\d.]+)", output.stdout)
    return "wrk " + found.group(1).decode() if found else "wrk"


def versions(names: Sequence[str]) -> str:
    """The installed versions of these packages; those that are not installed are left out."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in names if installed(name))


def installed(name: str) -> bool:
    """Whether a package is installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def publish(text: str, marker: str, output: str, readme: str) -> list[str]:
    """Write a report where it was asked for; where it went, or the report itself if nowhere."""
    if output:
        Path(output).write_text(text + "\n", encoding="utf-8")
    if readme:
        update(Path(readme), marker, text)
    return [path for path in (output, readme) if path] or [text]


def update(path: Path, marker: str, text: str) -> None:
    """Replace what stands between `<!-- marker -->` and `<!-- /marker -->`, in each place that is marked so."""
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before = path.read_text(encoding="utf-8")
    after, found = re.subn(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", before, flags=re.DOTALL)
    if not found or before.count(begin) != found or before.count(end) != found:
        raise SystemExit(f"{path} lacks {begin} or {end}")
    path.write_text(after, encoding="utf-8")
