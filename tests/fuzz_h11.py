"""Read the same bytes with kfserver's request reader and with h11, and compare where requests end and what is in them.

    .venv/fuzz/bin/python tests/fuzz_h11.py --cases 200000 --seed 1

Two readers that disagree on where a request ends let an attacker smuggle one past the first. So what both accept they
must frame alike, and what kfserver accepts and h11 refuses must have a reason that stands here in REASONS. kfserver may
refuse what h11 accepts: it is the stricter of the two on purpose. Needs h11, which `make fuzz` installs.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import re
import sys
from typing import Counter, Dict, List, NamedTuple, Optional, Tuple

TESTS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import h11  # noqa: E402

from fuzz import HTTP_TOKENS, Dice, draw_request, mutate  # noqa: E402
from kfserver import MAX_HEAD, RequestReader  # noqa: E402

MAX_BODY = 1 << 20

HEADS: List[bytes] = [
    b"Content-Length: 3\r\n", b"Content-Length: 3, 3\r\n", b"Content-Length : 3\r\n", b"content-length:3\r\n",
    b"Content-Length:\t3 \r\n", b"Content-Length: 03\r\n", b"Content-Length: 3\r\n\tfolded: 1\r\n",
    b"Content-Length:\r\n", b"Content-Length: 3\nX: y\r\n", b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: Chunked\r\n",
    b"Transfer-Encoding: identity\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"Transfer-Encoding:\x0bchunked\r\n",
    b"Transfer-Encoding: chunked, chunked\r\n", b"Transfer_Encoding: chunked\r\n", b"Connection: keep-alive\r\n",
    b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n", b"Expect: 100-continue\r\n", b"Host: kf\r\n",
    b"Host: k/f\r\n", b"X: \xff\r\n", b"X: a\x00b\r\n", b"X:\r\n", b": x\r\n", b"X\r\n", b" X: y\r\n"]
LINES: List[bytes] = [
    b"POST / HTTP/1.1", b"GET / HTTP/1.1", b"POST /a?b HTTP/1.0", b"HEAD / HTTP/1.1", b"POST http://kf/a HTTP/1.1",
    b"OPTIONS * HTTP/1.1", b"CONNECT kf:1 HTTP/1.1", b"post / HTTP/1.1", b"POST / HTTP/1.2", b"POST  / HTTP/1.1",
    b"POST /\xe4 HTTP/1.1", b"POST / HTTP/1.1 ", b"\r\nPOST / HTTP/1.1", b"POST / http/1.1", b"POST / HTTP/01.1"]
BODIES: List[bytes] = [
    b"", b"abc", b"3\r\nabc\r\n0\r\n\r\n", b"3;x=\"y\"\r\nabc\r\n0\r\nT: x\r\n\r\n", b"03\r\nabc\r\n00\r\n\r\n",
    b"3 \r\nabc\r\n0\r\n\r\n", b"3\nabc\n0\n\n", b"0x3\r\nabc\r\n0\r\n\r\n", b"3\r\nabcd\r\n0\r\n\r\n",
    b"+3\r\nabc\r\n0\r\n\r\n", b"-3\r\nabc\r\n0\r\n\r\n", b"3;\r\nabc\r\n0\r\n\r\n",
    b"3\r\nabc\r\n0\r\nbad trailer\r\n\r\n", b"3_0\r\nabc\r\n0\r\n\r\n"]

# What kfserver accepts and h11 does not, by h11's words, and why it may be accepted.
REASONS: Dict[str, str] = {
    "no request line received": "empty lines before a request are to be ignored (RFC 9112, section 2.2)",
    "illegal request line": "a byte above 0x7F in a target: senders that do not escape are understood by their bytes, "
                            "and no reader sees another end of the line in it",
}


class Read(NamedTuple):
    """What a reader made of the bytes: the requests that are complete, why it refused more, or that it waits."""

    requests: List[Tuple[str, str, bytes]]
    refusal: str
    ended: bool  # the connection ends after the last request: what comes later is nobody's


def read_ours(data: bytes) -> Read:
    """kfserver's reading."""
    reader, requests = RequestReader(MAX_BODY), []
    reader.feed(data)
    while True:
        request = reader.next_request()
        if request is None:
            return Read(requests, "", False)
        if request.problem:
            return Read(requests, str(request.problem), False)
        target = request.path + ("?" + request.query if request.query else "")
        requests.append((request.method, target, request.body))
        if reader.framing.closes:
            return Read(requests, "", True)


def read_h11(data: bytes) -> Read:
    """h11's reading; each request is answered, so that it goes on to the next."""
    connection, requests = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD + 4), []
    if data:  # nothing would mean to h11 that the client has hung up
        connection.receive_data(data)
    try:
        while True:
            request = read_one(connection)
            if request is None:
                return Read(requests, "", False)
            requests.append(request)
            connection.send(h11.Response(status_code=404, headers=[("Content-Length", "0")]))
            connection.send(h11.EndOfMessage())
            if connection.our_state is h11.MUST_CLOSE:
                return Read(requests, "", True)
            connection.start_next_cycle()
    except h11.RemoteProtocolError as error:
        return Read(requests, str(error), False)


def read_one(connection: h11.Connection) -> Optional[Tuple[str, str, bytes]]:
    """The next request, None if more bytes are needed."""
    head: Optional[h11.Request] = None
    body = b""
    while True:
        event = connection.next_event()
        if event in (h11.NEED_DATA, h11.PAUSED):  # it pauses for a change of protocol, which is then refused
            return None
        if isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
        elif isinstance(event, h11.EndOfMessage):
            assert head
            return head.method.decode("latin-1"), origin_form(head.target.decode("latin-1")), body


def origin_form(target: str) -> str:
    """A target as kfserver tells it: without scheme and host, and without a question mark that nothing follows."""
    found = re.fullmatch(r"(?i:https?)://[^/?#]+(/[^?#]*)?(\?[^#]*)?", target)
    target = (found.group(1) or "/") + (found.group(2) or "") if found else target
    path, _, query = target.partition("?")
    return path + ("?" + query if query else "")


def compare(data: bytes) -> str:
    """How the two readings differ, for the statistics; starts with FOUND if they must not differ so."""
    ours, other = read_ours(data), read_h11(data)
    for mine, theirs in zip(ours.requests, other.requests):
        if mine != theirs:
            return f"FOUND: framed differently: {mine!r}, h11 {theirs!r}"
    if len(ours.requests) > len(other.requests):
        return compare_longer(ours, other)
    if len(ours.requests) < len(other.requests):
        if ours.refusal or ours.ended:
            return "kfserver refuses: " + (ours.refusal or "what comes after a close")
        return "FOUND: kfserver waits for the end of a request that h11 has read"
    if ours.refusal:
        return "both refuse" if other.refusal else "kfserver refuses sooner"
    return "h11 refuses sooner" if other.refusal else "both accept"


def compare_longer(ours: Read, other: Read) -> str:
    """kfserver has read a request that h11 has not."""
    if other.ended:
        return "FOUND: kfserver reads on where h11 ends the connection"
    if not other.refusal:
        return "FOUND: kfserver reads a request for whose end h11 waits"
    reason = next((reason for words, reason in REASONS.items() if words in other.refusal), "")
    method, target, _ = ours.requests[len(other.requests)]
    if "illegal request line" in other.refusal and "\\x" not in other.refusal:  # h11 shows the line's bytes
        reason = ""
    return f"allowed: {reason}" if reason else f"FOUND: h11 refuses {method} {target}: {other.refusal}"


def draw(dice: Dice) -> bytes:
    """One to three requests, drawn like tests/fuzz.py's, or put together from parts that readers quarrel about."""
    data = b"".join(dice.choice([draw_request, draw_parts])(dice) for _ in range(dice.choice([1, 1, 2, 3])))
    return mutate(dice, data, HTTP_TOKENS + HEADS) if dice.often(0.3) else data


def draw_parts(dice: Dice) -> bytes:
    """A line, some header fields and a body."""
    host = b"Host: kf\r\n" if dice.often(0.9) else b""
    fields = b"".join(dice.choice(HEADS) for _ in range(dice.choice([0, 1, 1, 1, 2])))
    return dice.choice(LINES) + b"\r\n" + host + fields + b"\r\n" + dice.choice(BODIES)


def main() -> int:
    """Run as the arguments say; 1 if there are findings."""
    parser = argparse.ArgumentParser(description="Compare kfserver's request reader with h11.")
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    counts: Counter[str] = collections.Counter()
    findings: Dict[str, bytes] = {}
    for number in range(options.cases):
        data = draw(Dice(f"{options.seed}/{number}"))
        said = compare(data)
        if said.startswith("FOUND"):
            said = re.sub(r"'.*|\"b.*|[A-Z!-]+ /\S*", "…", said)
            if len(data) < len(findings.get(said, data + b" ")):
                findings[said] = data
        counts[said] += 1
    for said, count in counts.most_common():
        print(f"{count:>9}  {said}")
    for said, data in findings.items():
        print(f"\n{said}\n{data!r}"[:3000])
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
