"""The work that every peer does for one push, so that only the server around it differs.

A peer whose framework has a facility of its own (wechatpy's parser, WeRoBot's signature check) uses that one; the rest
of the work, and all of it for the peers without such a facility, is here.
"""

import argparse
import hashlib
import hmac
import json
import os
from collections import OrderedDict
from collections.abc import Mapping
from threading import Lock
from typing import Any
from xml.etree import ElementTree

REMEMBERED = 10_000
PROBE = "probe"


class RecentKeys:
    """The last `size` keys seen, the least recently used dropped first."""

    def __init__(self, size: int = REMEMBERED) -> None:
        self._size = size
        self._keys: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        self._lock = Lock()

    def claim(self, key: tuple[str, str, str]) -> bool:
        """True the first time that this key comes."""
        with self._lock:
            if key in self._keys:
                self._keys.move_to_end(key)
                return False
            self._keys[key] = None
            if len(self._keys) > self._size:
                self._keys.popitem(last=False)
            return True


def handle(sender: str) -> None:
    """The trivial handler: does nothing, but leaves a trace of the harness's own checking pushes."""
    if sender == PROBE:
        with open(os.environ["BENCH_PROBE_FILE"], "a", encoding="ascii") as trace:
            trace.write(".")


def is_signed(token: str, query: Mapping[str, str]) -> bool:
    """Whether the query's signature is the one that this token gives."""
    parts = sorted([token, query.get("timestamp", ""), query.get("nonce", "")])
    expected = hashlib.sha1("".join(parts).encode()).hexdigest()
    return hmac.compare_digest(expected.encode(), query.get("signature", "").encode())


def parse_push(body: bytes) -> dict[str, Any]:
    """The fields of a push; its first byte tells JSON from XML."""
    if body.lstrip()[:1] == b"{":
        return dict(json.loads(body))
    return {child.tag: child.text or "" for child in ElementTree.fromstring(body)}


class Receiver:
    """Signature, parsing, deduplication and handler, for peers that bring none of these."""

    def __init__(self, token: str) -> None:
        self._token = token
        self._recent = RecentKeys()

    def receive(self, query: Mapping[str, str], body: bytes) -> bool:
        """Take one push; False when it is not signed, which the peer answers with 403."""
        if not is_signed(self._token, query):
            return False
        self.take(parse_push(body))
        return True

    def take(self, fields: Mapping[str, Any]) -> None:
        """Hand the message to the handler, unless it came before."""
        sender = str(fields["FromUserName"])
        if self._recent.claim((str(fields["ToUserName"]), sender, str(fields["MsgId"]))):
            handle(sender)


def arguments() -> argparse.Namespace:
    """What the harness tells every peer: `port` and `token`, and the files of a certificate if it is to serve HTTPS."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--token", required=True)
    parser.add_argument("--cert")
    parser.add_argument("--key")
    return parser.parse_args()
