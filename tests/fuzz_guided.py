"""Fuzz what reads an attacker's bytes, guided by the coverage that each input reaches.

    .venv/fuzz/bin/python tests/fuzz_guided.py --seconds 60

Needs atheris, which `make fuzz` installs into an environment of its own. Each target runs in a process of its own, one
after the other, begins with the small corpus that is kept for it under tests/data/corpus, and checks laws: an exception
that is not a refusal is a finding, and so is a result that another reading of the same bytes contradicts. A finding is
printed with the input that makes it, and the exit status is 1. `--only reader --input FILE` tries one input again.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

TESTS = pathlib.Path(__file__).resolve().parent
CORPUS = TESTS / "data" / "corpus"
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import atheris  # noqa: E402  (an instrumented import must come before any other of the same module)

with atheris.instrument_imports(include=["kfserver"]):
    import kfserver

import fuzz  # noqa: E402
from fuzz import ENVELOPE, SAFE, TOKEN, Case, Dice, World, check_message, law  # noqa: E402

# Bytes that an input may have. What costs more than this to read is bounded by counts, which tests/fuzz.py reaches.
LONGEST = 4096
# Cases that share an endpoint, and so its memory of what it has seen.
BATCH = 500
MAX_BODY = 2048


# ---- Targets


def read_all(pieces: Sequence[bytes]) -> List[Any]:
    """The requests in the bytes, as far as they are complete; what cannot be read is the last, as None."""
    reader = kfserver.RequestReader(MAX_BODY)
    found: List[Any] = []
    for piece in pieces:
        reader.feed(piece)
        while True:
            request = reader.next_request()
            if request is None:
                break
            if request.problem:
                return [*found, None]
            law(len(request.body) <= MAX_BODY, "a body above the limit")
            found.append((request.method, request.path, request.query, request.body, reader.framing))
    return found


def reader(data: bytes) -> None:
    """Bytes of a connection: the first says how long the pieces are in which the others come."""
    step, stream = data[0] % 64 + 1 if data else 1, data[1:]
    pieces = [stream[at:at + step] for at in range(0, len(stream), step)]
    law(read_all(pieces) == read_all([stream]), "what is read depends on how it was cut")


def payload(data: bytes) -> None:
    """A body: a message that journal, log and handlers can rely on, or a refusal."""
    with contextlib.suppress(kfserver.MalformedPush):
        message = kfserver.parse(data)
        message.key = kfserver.dedup_key(message)
        check_message(message, data)


CIPHER = kfserver.make_cipher(kfserver.decode_aes_key(SAFE["aes_key"]))


def unwrap(plaintext: bytes) -> Optional[bytes]:
    """The message inside, None if there is none: the platform's description once more, in other words."""
    padding = plaintext[-1]
    content, length = plaintext[:-padding], int.from_bytes(plaintext[16:20], "big")
    good = 1 <= padding <= 32 and plaintext[-padding:] == bytes([padding]) * padding
    fits = len(content) == 20 + length + len(SAFE["app_id"]) and content[20 + length:] == SAFE["app_id"].encode()
    return content[20:20 + length] if good and fits else None


def envelope(data: bytes) -> None:
    """Encrypt: an even first byte is followed by its text, an odd one by what comes out when it is decrypted."""
    if not data or data[0] % 2 == 0:
        with contextlib.suppress(kfserver.ForbiddenPush):
            ENVELOPE.open(data[1:].decode("latin-1"))
        return
    plaintext = data[1:1 + (len(data) - 1) // 16 * 16]
    if not plaintext:
        return
    opened: Optional[bytes] = None
    with contextlib.suppress(kfserver.ForbiddenPush):
        opened = ENVELOPE.open(base64.b64encode(CIPHER.encrypt(plaintext)).decode())
    law(opened == unwrap(plaintext), "an envelope is opened that should not be, or the reverse")


FORM_SETTINGS: Sequence[Dict[str, Any]] = ({}, {"token": TOKEN, "allow_unsigned": True}, SAFE)
_worlds: List[World] = []
_tried = [0]


def form(data: bytes) -> None:
    """A query and, after the first line end, a body: the endpoint's answer is in the table, and a handshake's is its
    echoStr. The first byte chooses the settings."""
    if _tried[0] % BATCH == 0:
        _worlds[:] = [World(kfserver.Settings(**values)) for values in FORM_SETTINGS]
    _tried[0] += 1
    query, _, body = data[1:].partition(b"\n")
    request = kfserver.Request("POST" if data[:1] > b"\x20" else "GET", "/kf", query.decode("latin-1"), body)
    _worlds[(data or b"\0")[0] % len(_worlds)].try_case(Case(request), Dice(len(data)))


TARGETS: Mapping[str, Callable[[bytes], None]] = {
    "reader": reader, "payload": payload, "envelope": envelope, "form": form}


# ---- Runs


class Run:
    """One target's process, and what it told about itself."""

    def __init__(self, name: str, seconds: int, folder: pathlib.Path) -> None:
        self.name = name
        length = f"-max_total_time={seconds}" if seconds else "-runs=0"
        command = [sys.executable, __file__, "--only", name, "--", length, f"-max_len={LONGEST}", "-rss_limit_mb=2048",
                   "-timeout=20", f"-artifact_prefix={folder}/{name}-"]
        grown = folder / name
        grown.mkdir()
        ended = subprocess.run([*command, str(grown), str(CORPUS / name)], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
        self.output, self.status = ended.stdout.decode("utf-8", "replace"), ended.returncode
        self.inputs = sorted(folder.glob(f"{name}-*"))

    def figure(self, pattern: str) -> int:
        """The last number that the fuzzer told under this name, or 0."""
        found: List[str] = re.findall(pattern, self.output)
        return int(found[-1]) if found else 0

    def row(self) -> str:
        """One line of the table."""
        executions, edges = self.figure(r"#(\d+)\s"), self.figure(r"cov: (\d+)")
        inputs, told = self.figure(r"corp: (\d+)"), "none" if self.status == 0 else "FOUND"
        return f"{self.name:<10}{executions:>12,}{edges:>10,}{inputs:>10,}  {told}"


def run_all(names: Sequence[str], seconds: int) -> int:
    """Fuzz each target; 1 if there are findings."""
    status = 0
    print(f"{'target':<10}{'executions':>12}{'coverage':>10}{'corpus':>10}  findings", flush=True)
    with tempfile.TemporaryDirectory(prefix="kfserver-fuzz-") as folder:
        for name in names:
            run = Run(name, seconds, pathlib.Path(folder))
            print(run.row(), flush=True)
            if run.status:
                status = 1
                print(run.output[-4000:])
                for path in run.inputs:
                    print(f"{path.name}: {path.read_bytes()!r}")
    return status


def try_again(name: str, path: str) -> int:
    """Try one input, for whoever looks into a finding."""
    TARGETS[name](pathlib.Path(path).read_bytes())
    return 0


def main() -> int:
    """Run as the arguments say; the exit status."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of foreign bytes, guided by coverage.")
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60); 0: the corpus alone")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these targets")
    parser.add_argument("--input", metavar="FILE", help="try this input and no other")
    parser.add_argument("fuzzer", nargs="*", help="after --: the fuzzer's own arguments, for one target")
    options = parser.parse_args()
    if options.input:
        return try_again(options.only[0], options.input)
    if not options.fuzzer:
        return run_all(options.only, options.seconds)
    with contextlib.closing(fuzz.LawfulLog()) as log:
        def test_one_input(data: bytes) -> None:
            TARGETS[options.only[0]](data)
            log.check()
        atheris.Setup([sys.argv[0], *options.fuzzer], test_one_input)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main())
