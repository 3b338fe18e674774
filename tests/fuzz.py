"""Mutated pushes through the endpoint, and mutated bytes at a server: no input may break the laws that stand here.

    python3 tests/fuzz.py --cases 200000 --raw 5000 --seed 1

The published packets are bent: bytes flipped, cut, repeated and spliced, fields with hostile values, queries with
holes, envelopes sealed and signed with the right key over wrong contents. Each goes through `Endpoint.handle` under any
kind of settings. An exception is a bug, whatever its type: refusals are answers. What each answer must be is worked out
once more in `Judge`, by other means than kfserver's. Then bytes that are nearly HTTP go to one running server over
connections that stop anywhere. Equal seeds make equal cases; the first that breaks a law is printed, whole.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import functools
import hashlib
import json
import logging
import pathlib
import random
import re
import socket
import sys
import time
import traceback
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlencode
from xml.sax.saxutils import escape

TESTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))

from support import PUBLISHED, PUSHES, Client, local, post, push, wait_until  # noqa: E402

from kfserver import (  # noqa: E402  (the folder above is on the path by now)
    MAX_DEPTH,
    MAX_HANDSHAKE,
    Busy,
    ClaimCache,
    Endpoint,
    Envelope,
    HandlerRegistry,
    JsonFormatter,
    KfServer,
    MalformedPush,
    Message,
    Request,
    Response,
    Settings,
    decode_aes_key,
    decorator_for,
    dedup_key,
    make_cipher,
    parse,
    replace_unreadable,
    sign,
)

PACKETS: List[bytes] = list(PUSHES.values())
SEALED = PUBLISHED["encrypted"][0]
TOKEN: str = SEALED["token"]
SAFE: Dict[str, Any] = {"token": TOKEN, "aes_key": SEALED["encoding_aes_key"], "app_id": SEALED["app_id"]}
ENVELOPE = Envelope(SAFE["aes_key"], SAFE["app_id"])
NOW = 1_700_000_000  # the second at which the endpoints' clock stands
MAX_AGE = 300

SETTINGS: Dict[str, Dict[str, Any]] = {
    "open": {}, "token": {"token": TOKEN}, "unsigned": {"token": TOKEN, "allow_unsigned": True},
    "aged": {"token": TOKEN, "max_age": MAX_AGE}, "one path": {"path": "/kf"}, "small": {"max_body": 700},
    "safe": SAFE, "safe and aged": {**SAFE, "max_age": MAX_AGE}, "compatible": {**SAFE, "compatible": True}}
# Cases that share an endpoint, and so its memory of what it has seen.
BATCH = 1000
# Connections that are open at the same time.
CROWD = 50


# ---- Mutations


class Dice(random.Random):
    """Chance, the same again from the same seed."""

    def often(self, probability: float) -> bool:
        """True as often as that."""
        return self.random() < probability

    def octets(self, count: int) -> bytes:
        """So many bytes."""
        return self.getrandbits(8 * count).to_bytes(count, "big") if count else b""

    def span(self, data: bytes, most: int) -> slice:
        """Any stretch of the data, of so many bytes at most; maybe none."""
        start = self.randint(0, len(data))
        return slice(start, min(len(data), start + self.randint(0, most)))


BODY_TOKENS: List[bytes] = [
    b"<![CDATA[", b"]]>", b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"&#29;", b"&#xD800;", b"&amp;", b"<?a b?>",
    b"&#xD83D;", b"&#xDE00;", b"&#xFFFE;", b"&#0;", b"\xef\xbf\xbf", b"<n:Content>1</n:Content>", b'<?a <!DOCTYPE b>?>',
    b'"echoStr":"1",', b"<echoStr>1</echoStr>", b'--X\r\nContent-Disposition: form-data; name="echoStr"\r\n\r\n1',
    b"<!--", b"-->", b"<?xml version='1.0' encoding='gbk'?>", b" xmlns='a'", b" xml:lang='a'", b"<a>", b"</a>",
    b"<a/>", b"</xml>", b"\xef\xbb\xbf", b"\x00", b"\x1d", b"\x85", b"\xa0", b"\xff", b"\xed\xa0\x80",
    b"\xf0\x9f\x98\x80", b"\xef\xb7\x90", b"\xf3\xb0\x80\x80", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\",
    b"\\ud800", b"\\u0000", b"\\ud83d\\ude00", b"NaN", b"-Infinity", b"1e999", b"9" * 70, b"null", b"true",
    b'"MsgId":1,', b"<MsgId>1</MsgId>", b"Encrypt", b"<Encrypt>AAAA</Encrypt>", b'"Encrypt":"AAAA",', b"echoStr=1&",
    b"&echoStr=%ff", b"\r\n", b" ", b"[" * 3000, b'{"a":' * 3000, b"<a>" * 3000]
QUERY_TOKENS: List[bytes] = [
    b"&", b"=", b"%", b"+", b";", b"?", b"#", b"%00", b"%ff", b"%ED%A0%80", b"\xff", b"\xc3\xa9", b"signature=",
    b"&signature=0", b"&msg_signature=0", b"&timestamp=1", b"&nonce=", b"&echoStr=a%20b", b"&echostr=", b"%73ignature=",
    b"&a" * 300]
HTTP_TOKENS: List[bytes] = [
    b"\r\n", b"\n", b"\r", b"\r\n\r\n", b" ", b"\t", b":", b"\0", b"\xff", b"HTTP/1.0", b"HTTP/2.0", b"Host: kf\r\n",
    b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n", b"Connection: close\r\n",
    b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Expect: 100-continue\r\n", b"0\r\n\r\n",
    b"5\r\nhello\r\n", b"ffffffff\r\n", b"-1\r\n", b"A: b\r\n" * 120, b"a" * 20000,
    b"GET / HTTP/1.1\r\nHost: kf\r\n\r\n"]


def _flip(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    place = dice.randrange(len(data) + 1)
    return data[:place] + dice.octets(1) + data[place + 1:]


def _cut(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    gap = dice.span(data, 40)
    return data[:gap.start] + data[gap.stop:]


def _truncate(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    return data[:dice.randint(0, len(data))]


def _insert(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    place = dice.randint(0, len(data))
    return data[:place] + dice.choice(tokens) + data[place:]


def _move(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    piece, place = data[dice.span(data, 80)], dice.randint(0, len(data))
    return data[:place] + piece + data[place:]


def _splice(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    other = dice.choice(PACKETS)
    return data[:dice.randint(0, len(data))] + other[dice.randint(0, len(other)):]


def _swell(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    """Sometimes beyond the size from which bodies are looked at more closely."""
    piece, place = dice.choice([data[dice.span(data, 30)], dice.choice(tokens)[:30]]), dice.randint(0, len(data))
    return data[:place] + piece * dice.choice([2, 10, 40, 40, 3000]) + data[place:]


def _recode(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    encoding = dice.choice(["utf-16", "utf-16-le", "utf-32-be", "gb18030", "latin-1", "utf-7", "utf-8-sig"])
    return data.decode("utf-8", "replace").encode(encoding, "replace")


Mutation = Callable[[Dice, bytes, Sequence[bytes]], bytes]
# As often as they stand here: the coarse ones leave little that is worth a look.
COARSE: List[Mutation] = [_splice, _truncate, _swell, _recode]
MUTATIONS: List[Mutation] = [_flip] * 4 + [_insert] * 8 + [_cut] * 3 + [_move] * 3 + COARSE


def mutate(dice: Dice, data: bytes, tokens: Sequence[bytes]) -> bytes:
    """The data with one to four things wrong, mostly one."""
    for _ in range(dice.choice([1, 1, 1, 2, 3, 4])):
        data = dice.choice(MUTATIONS)(dice, data, tokens)
    return data


# ---- Bodies

NESTED: Any = json.loads('{"a":' * (MAX_DEPTH + 1) + '"b"' + "}" * (MAX_DEPTH + 1))
HOSTILE: List[Any] = [
    "", " ", "\x1d", "a\x00b", "]]>", "<Encrypt>x</Encrypt>", "&echoStr=1&", "\ud800", "\ufdd0", "0" * 70, "-1", "²",
    "٣", "a/b", "x" * 500, "你好😀", "%s %d", "\n", "\u2028", " a \t", "\x85", "\xa0", None, True, False, 0, -1, 1.5,
    10 ** 40, float("nan"), [], {}, ["a"], ["a", {"b": [None]}], {"Encrypt": "x"}, NESTED]
NAMES = ["ToUserName", "FromUserName", "CreateTime", "MsgType", "MsgId", "Event", "event", "Content", "PicUrl",
         "Encrypt", "MsgSignature", "TimeStamp", "Nonce", "echoStr", "key", "reply", "", "a b", "xmlns", "é", "fields"]


def draw_fields(dice: Dice) -> Dict[str, Any]:
    """The fields of a published packet under an id of its own, and some of them replaced, added or missing."""
    fields: Dict[str, Any] = dict(parse(dice.choice(PACKETS)).fields)
    if "MsgId" in fields:
        fields["MsgId"] = dice.randint(1, 300)
    for _ in range(dice.choice([0, 0, 1, 2, 4])):
        name = dice.choice([*fields, dice.choice(NAMES)])
        if dice.often(0.2):
            fields.pop(name, None)
        else:
            fields[name] = dice.choice(HOSTILE)
    return fields


def write_json(dice: Dice, fields: Mapping[str, Any]) -> bytes:
    """The fields as JSON, or nearly."""
    text = json.dumps(fields, ensure_ascii=dice.often(0.5), indent=dice.choice([None, 2]))
    return text.encode("utf-8", "surrogatepass")


def write_xml(dice: Dice, fields: Mapping[str, Any]) -> bytes:
    """The fields as XML, or nearly: names and values are not checked."""
    return _write_element(dice, "xml", fields).encode("utf-8", "surrogatepass")


def _write_element(dice: Dice, name: str, value: Any) -> str:
    if isinstance(value, list):
        return "".join(_write_element(dice, name, item) for item in value)
    if isinstance(value, Mapping):
        inside = "".join(_write_element(dice, *item) for item in value.items())
    else:
        inside = f"<![CDATA[{value}]]>" if dice.often(0.6) else escape(str(value))
    blank = dice.choice(["", "", " ", "\r\n  "])
    return f"{blank}<{name}>{blank}{inside}{blank}</{name}>{blank}"


def draw_body(dice: Dice) -> bytes:
    """A body that is a message, or nearly."""
    body = dice.choice(PACKETS) if dice.often(0.4) else dice.choice([write_xml, write_json])(dice, draw_fields(dice))
    return mutate(dice, body, BODY_TOKENS) if dice.often(0.5) else body


# ---- Requests


class Case(NamedTuple):
    """A request, and what is known of it if its sender has the key: the timestamp under which it was sealed, the
    message inside, and whether the envelope opens. None is for what nobody knows."""

    request: Request
    sealed_at: Optional[str] = None
    message: Optional[bytes] = None
    opens: Optional[bool] = None


def draw_timestamp(dice: Dice) -> str:
    """Now, mostly."""
    odd = [NOW - MAX_AGE, NOW + MAX_AGE + 1, 0, "", "now", "²", "1e9", "9" * 70]
    return str(NOW if dice.often(0.85) else dice.choice(odd))


def draw_nonce(dice: Dice) -> str:
    """Digits, mostly."""
    return "486452656" if dice.often(0.8) else dice.choice(["", "é你", "a+b &=%", "\x00", "0" * 300])


def write_query(dice: Dice, values: Mapping[str, str]) -> str:
    """The values, in any order, and now and then with something wrong. A character for each byte, as it comes in."""
    pairs = list(values.items())
    dice.shuffle(pairs)
    query = urlencode(pairs)
    if dice.often(0.15):
        query = mutate(dice, query.encode(), QUERY_TOKENS).decode("latin-1")
    return query


def read_form(text: bytes) -> Dict[str, bytes]:
    """Form-encoded values; of a name that stands twice, the last."""
    pairs = [pair.replace(b"+", b" ").partition(b"=") for pair in text.split(b"&") if pair]
    return {unquote_to_bytes(name).decode("utf-8", "replace"): unquote_to_bytes(value) for name, _, value in pairs}


def signed_values(dice: Dice) -> Dict[str, str]:
    """What signs a plain push."""
    timestamp, nonce = draw_timestamp(dice), draw_nonce(dice)
    return {"signature": sign(TOKEN, timestamp, nonce), "timestamp": timestamp, "nonce": nonce}


def draw_plain(dice: Dice) -> Case:
    """A push that is not encrypted; one in ten has no signature."""
    query = write_query(dice, signed_values(dice)) if dice.often(0.9) else ""
    return Case(Request("POST", "/kf", query, draw_body(dice)))


ECHOES = ["4375120948345356249", "", " a b ", "é你", "\r\nX: y", "\x00"]


def write_multipart(dice: Dice, fields: Mapping[str, Any]) -> bytes:
    """The fields as a form of several parts."""
    parts = "".join(f'--X\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                    for name, value in fields.items())
    return f"{parts}--X--\r\n".encode()


def draw_handshake(dice: Dice) -> Case:
    """A handshake, its values in the query, in the body or in both."""
    echo = {dice.choice(["echoStr", "echostr"]): dice.choice(ECHOES)}
    proof = signed_values(dice)
    if dice.often(0.3):
        write = dice.choice([write_json, write_xml, write_multipart])
        more = {dice.choice(NAMES): "1"} if dice.often(0.3) else {}
        return Case(Request("POST", "/kf", "", write(dice, {**proof, **echo, **more})))
    if dice.often(0.4):
        body = draw_body(dice) if dice.often(0.1) else b""
        return Case(Request("POST", "/kf", write_query(dice, {**proof, **echo}), body))
    form = write_query(dice, {**proof, **echo}).encode("latin-1")
    if dice.often(0.2):
        form += b"&echoStr=" + dice.octets(4)
    return Case(Request("POST", "/kf", write_query(dice, proof) if dice.often(0.3) else "", form))


class Seal(NamedTuple):
    """What goes into Encrypt, the message that comes out of it again, and whether any does, if that is certain."""

    text: str
    message: Optional[bytes]
    opens: Optional[bool]


def seal_well(number: int) -> Seal:
    """An envelope as the platform makes it."""
    dice = Dice(f"well/{number}")
    message = draw_body(dice)
    message = message if len(message) < 1000 else dice.choice(PACKETS)
    return Seal(ENVELOPE.seal(message, dice.octets(16)), message, True)


def seal_by_hand(number: int) -> Seal:
    """The right key over a plaintext in which anything may be wrong."""
    dice = Dice(f"by hand/{number}")
    head, message, app_id = dice.octets(16), dice.choice(PACKETS), SAFE["app_id"].encode()
    good = inside = head + len(message).to_bytes(4, "big") + message + app_id
    if dice.often(0.6):
        length = dice.choice([len(message), len(message) - 1, len(message) + 1, 0, 2 ** 32 - 1, 2 ** 31])
        inside = head + length.to_bytes(4, "big") + message + dice.choice([app_id, b"", b"other", app_id + b"0"])
    padding = dice.choice([16, 32]) - len(inside) % 16
    right = bytes([padding]) * padding
    plaintext = inside + dice.choice([right, right, b"\x00" + right[1:], bytes(padding)])
    sealed = base64.b64encode(make_cipher(decode_aes_key(SAFE["aes_key"])).encrypt(plaintext)).decode()
    return Seal(sealed, message, plaintext == good + right)


@functools.lru_cache(maxsize=1000)
def seal(make: Callable[[int], Seal], number: int) -> Seal:
    """An envelope, made once: where the library is missing, that takes milliseconds."""
    return make(number)


def seal_badly(dice: Dice) -> Seal:
    """A good ciphertext, mutated: what comes out of it nobody knows."""
    if dice.often(0.5):
        text = mutate(dice, SEALED_WELL.encode(), [b" ", b"\n", b"=", b"*", b"AAAA", b"\xc3\xa9"])
        return Seal(text.decode("latin-1"), None, None)
    ciphertext = mutate(dice, base64.b64decode(SEALED_WELL), [bytes(16), bytes(32)])
    return Seal(base64.b64encode(ciphertext).decode(), None, None)


SEALED_WELL = ENVELOPE.seal(PACKETS[0], bytes(16))


def draw_seal(dice: Dice) -> Seal:
    """An envelope, mostly one that was drawn before."""
    make = dice.choice([seal_well] * 4 + [seal_by_hand])
    return seal_badly(dice) if dice.often(0.15) else seal(make, dice.randrange(dice.choice([40] * 7 + [100_000])))


def draw_sealed(dice: Dice) -> Case:
    """An encrypted push with a good message signature over whatever is in Encrypt, and now and then a later change."""
    text, message, opens = draw_seal(dice)
    blank, timestamp, nonce = dice.choice(["", "", "", " ", "\r\n"]), draw_timestamp(dice), draw_nonce(dice)
    text += blank
    proof = {"msg_signature": sign(TOKEN, timestamp, nonce, text), "timestamp": timestamp, "nonce": nonce}
    fields, query = draw_fields(dice) if dice.often(0.2) else {}, ""
    bent = bool(fields or blank)  # whether it may be refused for what is around Encrypt
    if dice.often(0.5):
        query = write_query(dice, {**proof, "signature": sign(TOKEN, timestamp, nonce)})
        bent |= any(read_form(query.encode("latin-1")).get(name) != value.encode() for name, value in proof.items())
    else:
        fields.update(MsgSignature=proof["msg_signature"], TimeStamp=timestamp, Nonce=nonce)
    body = dice.choice([write_xml, write_json])(dice, {**fields, "Encrypt": text})
    if dice.often(0.2):
        bent, body = True, mutate(dice, body, BODY_TOKENS)
    return Case(Request("POST", "/kf", query, body), timestamp, message, None if opens and bent else opens)


def draw_case(dice: Dice, in_safe_mode: bool) -> Case:
    """Any request at all, mostly of the kind that the settings ask for."""
    usual, unusual = (draw_sealed, draw_plain) if in_safe_mode else (draw_plain, draw_sealed)
    case = dice.choice([usual] * 8 + [unusual, draw_handshake])(dice)
    if dice.often(0.05):
        case = case._replace(request=case.request._replace(method=dice.choice(METHODS)))
    if dice.often(0.05):
        case = case._replace(request=case.request._replace(path=dice.choice(PATHS)))
    return case


METHODS = ["GET", "GET", "HEAD", "PUT", "post", "OPTIONS", "", "\xff"]
PATHS = ["/", "/kf/", "", "*", "/" + "a" * 5000, "/\xff", "//kf", "/kf%00"]


# ---- The laws


class Breach(Exception):
    """A law does not hold."""


def law(holds: object, text: str) -> None:
    """Raise `Breach` unless it ``holds``."""
    if not holds:
        raise Breach(text)


def echo_in(values: Mapping[str, bytes]) -> Optional[bytes]:
    """The value that a handshake wants back, if there is one."""
    return values.get("echoStr", values.get("echostr"))


def find_handshake(query: Dict[str, bytes], body: bytes) -> Optional[Dict[str, bytes]]:
    """The values of a handshake, from the query or else from the body; None if this is none."""
    if echo_in(query) is not None:
        return query
    values: Dict[str, bytes] = {}
    if len(body) <= MAX_HANDSHAKE and b"echo" in body:
        is_structured = body.lstrip()[:1] in (b"<", b"{", b"\xef")
        values = read_structured(body) if is_structured else read_form(body.strip(b" \t\r\n"))
        if body.lstrip().startswith(b"--"):
            values = read_multipart(body.lstrip())
    return {**query, **values} if echo_in(values) is not None else None


def read_structured(body: bytes) -> Dict[str, bytes]:
    """The texts in XML or JSON that is no message."""
    try:
        fields = parse(body).fields
    except MalformedPush:
        return {}
    if any(name in fields for name in ("MsgType", "MsgId", "FromUserName", "Event", "event", "Encrypt")):
        return {}
    return {name: value.encode() for name, value in fields.items() if isinstance(value, str)}


def read_multipart(body: bytes) -> Dict[str, bytes]:
    """The values of a form of several parts, none of which names a file or a type."""
    boundary = re.escape(body.split(b"\r\n")[0].rstrip())
    parts = re.split(b"(?:^|\r\n)" + boundary, body)
    disposition = re.compile(rb'(?is).*?\r\nContent-Disposition:[^\r\n]*;[ \t]*name="?([^";\r\n]*)')
    found = [disposition.match(part.split(b"\r\n\r\n")[0]) for part in parts]
    return {name.group(1).decode("utf-8", "replace"): part.partition(b"\r\n\r\n")[2]
            for name, part in zip(found, parts) if name}


class Judge:
    """What the answer to a request must be, worked out from the settings, the README's table and the platform's page.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def is_signed(self, values: Mapping[str, bytes]) -> bool:
        """Whether the values prove where a push or a handshake comes from."""
        if not self._settings.token or ("signature" not in values and self._settings.allow_unsigned):
            return True
        timestamp = values.get("timestamp", b"")
        parts = sorted([self._settings.token.encode(), timestamp, values.get("nonce", b"")])
        signature = hashlib.sha1(b"".join(parts)).hexdigest().encode()
        return values.get("signature", b"").lower() == signature and self._is_fresh(timestamp)

    def is_proven(self, case: Case) -> bool:
        """Whether a signature proves where the push comes from, and not only the settings' leave."""
        query = read_form(case.request.query.encode("latin-1"))
        return bool(self._settings.token) and (case.sealed_at is not None
                                               or ("signature" in query and self.is_signed(query)))

    def _is_fresh(self, timestamp: bytes) -> bool:
        good = bool(re.fullmatch(b"[0-9]{1,63}", timestamp)) and abs(NOW - int(timestamp)) <= self._settings.max_age
        return good or not self._settings.max_age

    def check(self, case: Case, response: Response) -> None:
        """Raise `Breach` if this is not the answer that the table gives."""
        status = self._status_of_what_is_not_for_us(case.request)
        if status:
            law(response.status == status, f"to be answered {status}")
            return
        query = read_form(case.request.query.encode("latin-1"))
        handshake = find_handshake(query, case.request.body)
        if handshake is not None:
            self._check_handshake(handshake, response)
        elif case.request.method != "POST":
            law(response[::2] == (200, "up"), "a GET is answered that the server is up")
        else:
            self._check_push(case, query, response)

    def _status_of_what_is_not_for_us(self, request: Request) -> int:
        if self._settings.path and request.path != self._settings.path:
            return 404
        if request.method not in ("POST", "GET", "HEAD"):
            return 405
        return 413 if len(request.body) > self._settings.max_body else 0

    def _check_handshake(self, values: Mapping[str, bytes], response: Response) -> None:
        if self.is_signed(values):
            law(response[:2] == (200, echo_in(values)), f"to be echoed: {echo_in(values)!r}")
        else:
            law(response.status == 403, "a handshake without proof")

    def _check_push(self, case: Case, query: Mapping[str, bytes], response: Response) -> None:
        law(response.status in (200, 400, 403, 503), "a status that no push is answered with")
        if self._settings.aes_key:
            self._check_push_in_safe_mode(case, self.is_signed(query), response)
        elif not self.is_signed(query):
            law(response.status == 403, "a push without proof")
        elif case.request.body in PACKETS:
            law(response.status in (200, 503), "a published push is refused")

    def _check_push_in_safe_mode(self, case: Case, is_signed: bool, response: Response) -> None:
        sealed = case.sealed_at is not None and self._is_fresh(case.sealed_at.encode())
        if not (sealed or (is_signed and self._settings.compatible)):
            law(response.status == 403, "a push without proof, in safe mode")
        elif case.opens is False and not self._settings.compatible:
            law(response.status == 403, "an envelope that does not open")
        elif sealed and case.opens and case.message in PACKETS:
            law(response.status in (200, 503), "a published push is refused, in safe mode")

    def check_payload(self, case: Case, payload: bytes) -> None:
        """Raise `Breach` if a message was taken that its sender has not sealed."""
        if self._settings.aes_key and not self._settings.compatible:
            law(case.sealed_at is not None, "taken, and nothing was sealed")
            law(case.message is None or payload in (case.message, replace_unreadable(case.message)),
                "taken, and not what was sealed")


FORMS = {200: rb"[\x00-\xff]*", 403: rb"forbidden\n", 404: rb"no such path\n", 405: rb"pushes come by POST\n",
         413: rb"more than \d+ bytes\n", 400: rb"[ -~]{1,150}\n", 503: rb"[ -~]{1,150}\n"}
HEADERS = {405: "Allow", 503: "Retry-After"}


def check_form(response: Response) -> None:
    """The laws of the answer as such: its text, its headers, and the word for it in the logs."""
    law(re.fullmatch(FORMS.get(response.status, b""), response.body, re.DOTALL), "an answer that is not in the table")
    expected = [HEADERS[response.status]] if response.status in HEADERS else []
    law([name for name, _ in response.headers] == expected, "headers that belong to another answer")
    law(re.fullmatch("accepted|repeat|handshake|up|refused [ -~]+", response.outcome), "an outcome without a name")
    law(response.outcome not in ("accepted", "repeat") or response.body == b"success", "accepted, and not told so")


def identity(message: Message) -> str:
    """What makes two pushes one message, in other words than `dedup_key`."""
    has_id = message.msg_id not in (None, "0") and message.msg_type != "event"
    own = {name: value for name, value in message.fields.items()
           if name not in ("Encrypt", "MsgSignature", "TimeStamp", "Nonce")}
    known: List[Any] = [message.msg_id] if has_id else [message.event, own]
    return json.dumps([message.to_user_name, message.from_user_name, message.msg_type, known], sort_keys=True)


def check_message(message: Message, payload: bytes) -> None:
    """The laws of a message that was taken: what handlers, journal and logs rely on."""
    law(parse(payload) == message, "the journal would bring back another message")
    law(message.key == dedup_key(parse(payload)), "the journal would bring the message back under another key")
    law(re.fullmatch("[!-~]{1,400}", message.key), "a key that is not fit for a log")
    law(is_short_ascii(decorator_for(message)), "a decorator that is not fit for a log")
    law(isinstance(message.create_time, int) and message.msg_id != "", "an attribute of the wrong kind")
    texts = [message.content, message.pic_url, message.event, message.msg_type, *texts_in(message.fields, 0)]
    "".join(texts).encode()  # or it could be neither stored nor sent on


def is_short_ascii(text: str) -> bool:
    """Whether the text is fit for a log. A line may hold two names of 64 characters, in ASCII ten times as long."""
    return bool(re.fullmatch("[ -~]{1,1500}", text))


def texts_in(value: Any, depth: int) -> Iterator[str]:
    """All texts in a field, and a law for what is neither text nor made of it."""
    if isinstance(value, str):
        yield value
        return
    law(depth <= MAX_DEPTH and isinstance(value, (Mapping, list)), "a field that is neither text nor made of texts")
    for item in value:
        yield from texts_in(item, depth + 1)
        if not isinstance(value, list):
            yield from texts_in(value[item], depth + 1)


class LawfulLog(logging.Handler):
    """Takes what is logged until it is closed: each record is one line, of ASCII, in both formats, and no error."""

    def __init__(self) -> None:
        super().__init__()
        self._breaches: List[str] = []
        self._log = logging.getLogger("kfserver")
        self._before = self._log.level, self._log.propagate
        self._log.addHandler(self)
        self._log.setLevel(logging.DEBUG)
        self._log.propagate = False

    def close(self) -> None:
        """Leave the log as it was."""
        self._log.removeHandler(self)
        self._log.setLevel(self._before[0])
        self._log.propagate = self._before[1]
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what breaks a law: this may be another thread, which should go on."""
        line = JsonFormatter().format(record)
        if record.levelno >= logging.ERROR or not is_short_ascii(record.getMessage()) or not json.loads(line):
            self._breaches.append(line)

    def check(self) -> None:
        """Raise `Breach` if a law was broken."""
        law(not self._breaches, "not one short line of ASCII, or an error: " + "".join(self._breaches[:1]))


# ---- The endpoint under fire


class World:
    """An endpoint, and what it is known to have taken. Its queue is full now and then, its journal broken."""

    def __init__(self, settings: Settings) -> None:
        self._judge = Judge(settings)
        self._claims = ClaimCache(10 * BATCH)
        self._endpoint = Endpoint(settings, self, lambda: NOW, time.monotonic)
        self._taken: Set[str] = set()
        self._dice = Dice(0)

    def try_case(self, case: Case, dice: Dice) -> Response:
        """Send the request, maybe twice; raises `Breach`, or whatever the endpoint raised."""
        self._dice, self._case = dice, case
        for _ in range(dice.choice([1, 1, 2])):
            self._submitted: List[Message] = []
            self._message: Optional[Message] = None
            response = self._endpoint.handle(case.request)
            check_form(response)
            self._judge.check(case, response)
            self._check_once(response)
        return response

    def observe(self, response: Response, message: Optional[Message], seconds: float) -> None:
        self._message = message

    def take(self, message: Message) -> bool:
        """What the endpoint calls with a message."""
        message.key = dedup_key(message)
        if not self._claims.claim(message.key):
            return False
        try:
            self._fail_sometimes("the queue is full")
        except Busy:
            self._claims.release(message.key)
            raise
        return True

    def deliver(self, taken: Any) -> List[Any]:
        """What the endpoint calls with those that came together."""
        try:
            for message, payload in taken:
                self._judge.check_payload(self._case, payload)
                check_message(message, payload)
            self._fail_sometimes("the journal cannot be written")
        except Busy as error:
            for message, _ in taken:
                self._claims.release(message.key)
            return [error] * len(taken)
        self._claims.accept([message.key for message, _ in taken])
        self._submitted += [message for message, _ in taken]
        return [True] * len(taken)

    def keep_unreadable(self, payload: bytes, reason: str) -> None:
        """What the endpoint calls with what was proven and cannot be read."""
        law(self._judge.is_proven(self._case), "kept, and not proven")

    def cancel(self, message: Message) -> None:
        """What the endpoint calls with what was taken and cannot be delivered."""
        self._claims.release(message.key)

    def _fail_sometimes(self, reason: str) -> None:
        if self._dice.often(0.05):
            raise Busy(reason)

    def _check_once(self, response: Response) -> None:
        """Nothing runs twice, nothing that was not taken is called a repeat, and no claim is left behind."""
        law(len(self._submitted) == (response.outcome == "accepted"), "handed over, and not said so, or the reverse")
        if self._message and response.outcome in ("accepted", "repeat"):
            known = identity(self._message) in self._taken
            law(known == (response.outcome == "repeat"), "runs twice" if known else "a message is lost")
            self._taken.add(identity(self._message))
        law(len(self._claims) == len(self._taken), "claims and messages taken differ in number")
        for message in self._submitted:
            self._settle(message)

    def _settle(self, message: Message) -> None:
        fate = self._dice.random()
        if fate < 0.1:  # its last try has failed: it may come again
            self._claims.release(message.key)
            self._taken.discard(identity(message))
        elif fate < 0.5:
            self._claims.finish(message.key)


def run_cases(log: LawfulLog, seed: int, first: int, last: int) -> Dict[str, int]:
    """Try the cases; how many had which outcome. Raises `Broken` at the first that breaks a law."""
    worlds: Dict[str, World] = {}
    outcomes: Dict[str, int] = {}
    for number in range(first, last):
        dice = Dice(f"{seed}/{number}")
        if number % BATCH == 0 or not worlds:
            worlds = {name: World(Settings(**values)) for name, values in SETTINGS.items()}
        name = dice.choice(list(worlds))
        case = draw_case(dice, "aes_key" in SETTINGS[name])
        try:
            response = worlds[name].try_case(case, dice)
            log.check()
        except Exception as error:
            raise Broken(f"--seed {seed} --first {number - number % BATCH}, case {number}, settings {name!r}:\n"
                         f"{case!r}") from error
        word = response.outcome.partition(":")[0]
        outcomes[word] = outcomes.get(word, 0) + 1
    return outcomes


class Broken(Exception):
    """A case that breaks a law, told so that it can be repeated."""


# ---- The server under fire


class Shot(NamedTuple):
    """What one connection sends, piece by piece, and how it ends."""

    pieces: List[bytes]
    end: str


LENGTHS = ["-1", "+5", "²", "", "5, 5", "0x5", "9" * 17, "9" * 5000, "0"]
HEADER_LINES = ["Connection: close", "Expect: 100-continue", "A: " + "b" * 500, "Host: kf", "Content-Length: 0",
                "Transfer-Encoding: chunked", "Transfer-Encoding:", "Expect: x", " folded", "A : b", "no colon",
                "A: \0", "A: \r", ":"]


def draw_request(dice: Dice) -> bytes:
    """A request, or nearly."""
    query = write_query(dice, signed_values(dice)).encode("latin-1")
    body, target = draw_body(dice), "/?" + quote_from_bytes(query, safe="&=%+")
    headers = ["Host: kf"] + [dice.choice(HEADER_LINES) for _ in range(dice.choice([0, 0, 0, 1, 2]))]
    method = "GET" if dice.often(0.2) else "POST"
    if method == "POST" and dice.often(0.3):
        headers.append("Transfer-Encoding: chunked")
        body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in divide(dice, body) if piece) + b"0\r\n\r\n"
    elif method == "POST":
        headers.append("Content-Length: " + (dice.choice(LENGTHS) if dice.often(0.1) else str(len(body))))
    version = dice.choice(["1.1", "1.1", "1.1", "1.0"])
    head = "\r\n".join([f"{method} {target} HTTP/{version}", *headers, "", ""])
    return head.encode("latin-1") + (b"" if method == "GET" else body)


def divide(dice: Dice, data: bytes) -> List[bytes]:
    """The data in one to three pieces."""
    places = sorted(dice.randint(0, len(data)) for _ in range(dice.randint(0, 2)))
    return [data[start:end] for start, end in zip((0, *places), (*places, len(data)))]


def draw_shot(dice: Dice) -> Shot:
    """One to three requests on a connection, of which something is wrong mostly."""
    data = b"".join(draw_request(dice) for _ in range(dice.choice([1, 1, 2, 3])))
    if dice.often(0.9):
        data = mutate(dice, data, HTTP_TOKENS)
    return Shot(divide(dice, data), dice.choice(["stay", "stay", "half-close", "close", "reset"]))


ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [A-Za-z -]+\r\n((?:[A-Za-z-]+: [ -~]+\r\n)*)\r\n")
STATUSES = {b"100", b"200", b"400", b"403", b"404", b"405", b"413", b"417", b"431", b"503", b"505"}


def check_answers(received: bytes, is_whole: bool) -> None:
    """What a client received is answers and nothing else, each of them ``is_whole`` unless the connection was reset."""
    while received:
        head = ANSWER.match(received)
        law(head or not is_whole, f"not an answer: {received[:200]!r}")
        if not head:
            return
        length = int(re.findall(rb"Content-Length: (\d+)", head.group(2) + b"Content-Length: 0")[0])
        law(head.group(1) in STATUSES, f"a status that no request is answered with: {head.group(1)!r}")
        law(len(received) >= head.end() + length or not is_whole, "half an answer")
        received = received[head.end() + length:]


class Siege:
    """One running server, and crowds of clients that send it anything at all."""

    def __init__(self) -> None:
        self._handled: List[str] = []
        registry = HandlerRegistry()
        registry.on("*")(lambda message: self._handled.append(message.key))
        self._server = KfServer(registry, local(workers=1))
        self._pushed = 0

    def __enter__(self) -> Siege:
        self._http: Any = self._server.start()._http
        self._table = self._http.connections
        return self

    def __exit__(self, *error: object) -> None:
        self._server.stop()

    def attack(self, shots: Sequence[Shot]) -> None:
        """Fire all shots, each on a connection of its own; raises `Breach`."""
        clients = [Client(self._server.port) for _ in shots]
        try:
            for client, shot in zip(clients, shots):
                self._fire(client, shot)
            self._push()
            self._let_time_run_out()
            for client, shot in zip(clients, shots):
                self._check_end(client, shot)
        finally:
            for client in clients:
                client.socket.close()
        self._push()
        law(self._server.join(10.0), "a worker hangs")
        law(len(set(self._handled)) == len(self._handled), "a message was handled twice")

    @staticmethod
    def _fire(client: Client, shot: Shot) -> None:
        for piece in shot.pieces:
            client.send(piece)
        if shot.end == "reset":
            client.reset()
        elif shot.end == "close":
            client.socket.close()
        elif shot.end == "half-close":
            with contextlib.suppress(OSError):  # sent away already
                client.socket.shutdown(socket.SHUT_WR)

    def _push(self) -> None:
        """A good push is answered, whatever goes on beside it."""
        self._pushed += 1
        with Client(self._server.port) as client:
            answer = client.ask(post(push(number=self._pushed)))
            law((answer.status, answer.body) == (200, b"success"), f"a good push was answered {answer}")

    def _let_time_run_out(self) -> None:
        """As if the longest time limit was over: whoever has none would stay for ever."""
        wait_until(lambda: all(channel.deadline < float("inf") for channel in list(self._table)))
        wait_until(self._expire_all)

    def _expire_all(self) -> bool:
        for channel in list(self._table):
            channel.deadline = 0.0
        self._http._next_tick = 0.0
        self._push()  # wakes the server
        return len(self._table) == 0

    @staticmethod
    def _check_end(client: Client, shot: Shot) -> None:
        if shot.end in ("close", "reset"):
            return
        check_answers(*read_to_end(client.socket))


def read_to_end(connection: socket.socket) -> Tuple[bytes, bool]:
    """What was received until the other side hung up, and whether it did so without a reset."""
    received = b""
    try:
        while True:
            data = connection.recv(65536)
            if not data:
                return received, True
            received += data
    except ConnectionError:
        return received, False


def run_shots(log: LawfulLog, seed: int, count: int) -> None:
    """Fire so many shots, a crowd at a time. Raises `Broken` at the first crowd that breaks a law."""
    with Siege() as siege:
        for first in range(0, count, CROWD):
            dice = Dice(f"{seed}/raw/{first}")
            shots = [draw_shot(dice) for _ in range(min(CROWD, count - first))]
            try:
                siege.attack(shots)
                log.check()
            except Exception as error:
                told = "\n".join(map(repr, find_culprits(shots)))
                raise Broken(f"--seed {seed}, shots {first} to {first + len(shots) - 1}, of them:\n{told}") from error


def find_culprits(shots: Sequence[Shot]) -> Sequence[Shot]:
    """The first of the shots that breaks a law alone; all of them if none does."""
    return next(([shot] for shot in shots if breaks_a_law(shot)), shots)


def breaks_a_law(shot: Shot) -> bool:
    """Whether a server breaks a law when it gets this and nothing else."""
    with contextlib.closing(LawfulLog()) as log:
        try:
            with Siege() as siege:
                siege.attack([shot])
            log.check()
        except Exception:
            return True
        return False


# ---- Command line


def main() -> int:
    """Run as the arguments say, and print what came of it; 1 if a law is broken."""
    parser = argparse.ArgumentParser(description="Send mutated pushes to the endpoint and mutated bytes to a server.")
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--first", type=int, default=0, help=f"the case to begin with, a multiple of {BATCH}")
    parser.add_argument("--raw", type=int, default=5000, help="connections to the server")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        with contextlib.closing(LawfulLog()) as log:
            outcomes = run_cases(log, arguments.seed, arguments.first, arguments.first + arguments.cases)
            run_shots(log, arguments.seed, arguments.raw)
    except Broken:
        traceback.print_exc()
        return 1
    for word, count in sorted({**outcomes, "connections": arguments.raw}.items()):
        print(f"{word:<20}{count:>10}")
    print(f"{'seconds':<20}{round(time.monotonic() - started):>10}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
