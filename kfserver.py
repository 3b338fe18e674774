"""kfserver: receives the customer-service messages of Baidu smart mini-programs.

The platform POSTs every message of a user to one URL, waits two seconds for the
answer ``success``, and sends again what was not answered so. This module proves
where a push comes from, answers at once, drops repeats, and hands each message
once, in order, to plain Python functions in a registry. One file, the standard
library alone, CPython 3.7 or later:

    python3 kfserver.py --port 8080

The path of one push:

    bytes -> HTTP server -> Request -> Endpoint.handle -> Response -> bytes
                                          |
                                          v
                                   Dispatcher: one mailbox a sender
                                          |
                                          v
                                   HandlerRegistry -> handler(message)

Sections, in the order of dependence; a name refers only to what stands above it:

     1 Errors
     2 Values
     3 Signatures
     4 Encryption
     5 Payloads
     6 Deduplication
     7 Handlers
     8 Endpoint
     9 Metrics
    10 Threads
    11 Journal
    12 Shared claims
    13 Replies
    14 Dispatcher
    15 HTTP server
    16 Server
    17 Push
    18 Handlers file
    19 Chat
    20 Journal command
    21 Command line

Sections 1 to 8 are pure: they touch no socket, file, clock or thread, and are given
the clock, the claims and the queue as arguments.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import hashlib
import hmac
import http.client
import importlib
import importlib.machinery
import importlib.util
import inspect
import io
import json
import logging
import os
import queue
import random
import re
import sched
import selectors
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import traceback
import uuid
import xml.etree.ElementTree as ElementTree
from collections import Counter, OrderedDict, deque
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath
from socketserver import TCPServer
from types import CodeType, MappingProxyType, ModuleType, TracebackType
from typing import (TYPE_CHECKING, Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple,
                    NoReturn, Optional, Pattern, Sequence, Set, TextIO, Tuple, Type, TypeVar, Union)
from urllib.parse import parse_qsl, quote, urlencode, urlsplit
from xml.parsers.expat import ErrorString, ParserCreate

if TYPE_CHECKING:
    import sqlite3

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

__version__ = "1.0.0"
__all__ = ["HandlerRegistry", "Image", "KfServer", "Message", "SendApi", "Settings"]

log = logging.getLogger("kfserver")


# ---- 1 Errors -------------------------------------------------------------------------------------------------------
# Law: one root, named by whose fault it is. An error that can answer a push carries the HTTP status that does so.
# The text of an error never repeats what a user wrote, nor a token, a signature or a secret.

class KfError(Exception):
    """The root of every error that kfserver raises on purpose."""


class PushError(KfError):
    """The sender's fault: the push is answered with ``status`` and refused.

    ``public`` is what the sender is told; None tells it the error's own text.
    ``advice`` is what the operator can do about it, for the log; empty where nothing is to be done.
    """

    status = 400
    public: Optional[str] = None
    advice = ""
    headers: Tuple[Tuple[str, str], ...] = ()

    def __init__(self, reason: str, advice: str = "") -> None:
        super().__init__(reason)
        self.advice = advice or self.advice


class MalformedPush(PushError):
    """Not HTTP, not XML or JSON, or not shaped like a message: 400, and why."""


class ForbiddenPush(PushError):
    """Not provably from the platform: 403, with one text whatever the reason, so that the answer teaches nothing."""

    status = 403
    public = "forbidden"


class UnknownPath(PushError):
    """A path other than the configured one: 404."""

    status = 404
    advice = "the URL in the platform's console must have the path that --path names"


class MethodNotAllowed(PushError):
    """A method that no push uses: 405, with the methods that are served (RFC 9110, section 15.5.6)."""

    status = 405
    headers = (("Allow", "GET, HEAD, POST"),)


class PushTooLarge(PushError):
    """A body above ``max_body``: 413."""

    status = 413
    advice = "raise --max-body if the platform really sends this much"


class UnsupportedVersion(PushError):
    """A version of HTTP other than 1.x: 505."""

    status = 505


class HeadTooLarge(PushError):
    """More head than any push has: 431 (RFC 6585)."""

    status = 431


class UnknownExpectation(PushError):
    """An Expect header other than 100-continue: 417."""

    status = 417


class Busy(PushError):
    """Our fault: the message cannot be taken now. 503 with Retry-After; nothing is claimed, so a retry is accepted."""

    status = 503
    headers = (("Retry-After", "1"),)


class BeingTaken(Busy):
    """The same message is just being taken by another thread or instance, which may yet refuse it."""


class JournalError(Busy):
    """The journal cannot be written: 503, and the push is not claimed, so that a retry is accepted."""

    advice = "see the ERROR line about the journal"


class SettingsError(KfError):
    """The operator's fault: a setting that cannot be used. The message names the setting and what it takes."""


class HandlerError(KfError):
    """The fault of who wrote the handlers: a registration or a return value that cannot work."""


class ReplyError(KfError):
    """A reply did not reach the user, through no fault of the handler's, which is therefore not run again."""


class NetworkError(ReplyError):
    """The send API could not be reached, or did not answer sensibly, as often as it was tried."""


def printable(text: str) -> str:
    """The text with escapes for all that could steer a terminal, break a line or not be encoded."""
    return text if text.isprintable() else "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def describe_error(error: BaseException) -> str:
    """The error without a user's words: our own errors in full, others by their type and the line that raised them."""
    if isinstance(error, KfError):
        return printable(f"{type(error).__name__}: {error}")
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + place


def exc_info_of(error: BaseException) -> Tuple[Type[BaseException], BaseException, Optional[TracebackType]]:
    """The error's traceback for the log, with `describe_error` in the place of its text, which may hold a user's."""
    return KfError, KfError(describe_error(error)), error.__traceback__


# ---- 2 Values -------------------------------------------------------------------------------------------------------
# Law: plain values, read-only, that know nothing but themselves. Every other section may use them.

def _setting(default: Any, text: str, low: Optional[float] = None, high: Optional[float] = None,
             choices: Sequence[str] = ()) -> Any:
    """A field of `Settings`: its default, its line of help, and the values that it takes."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


def _secret(text: str) -> Any:
    """A text field of `Settings` that must not show when settings are printed."""
    return dataclasses.field(default="", repr=False, metadata={"help": text, "low": None, "high": None, "choices": ()})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that can be set, checked when it is made; raises `SettingsError` that names the bad setting.

    Field ``max_body`` is ``--max-body`` on the command line and ``KF_MAX_BODY`` in the environment.
    """

    host: str = _setting("0.0.0.0", "address to listen on")
    port: int = _setting(8080, "port to listen on; 0 takes a free one", 0, 65535)
    unix: str = _setting("", "path of a Unix socket to listen on, instead of host and port")
    path: str = _setting("", "the one path that takes pushes; empty: any path")
    token: str = _secret("Token of the platform's console; empty: anyone may push")
    allow_unsigned: bool = _setting(False, "accept pushes that carry no signature, though a token is set")
    aes_key: str = _secret("EncodingAESKey of the console, for safe mode; needs --token and --app-id")
    app_id: str = _setting("", "app id of the mini-program, which safe mode seals into every push")
    compatible: bool = _setting(False, "accept plain pushes beside encrypted ones, though an --aes-key is set")
    max_age: float = _setting(0.0, "seconds a signature's timestamp may be old or ahead; 0: not checked", 0)
    tls_cert: str = _setting("", "file of the certificate chain; serves HTTPS (TLS 1.2 or later)")
    tls_key: str = _setting("", "file of the certificate's private key; default: in the file of --tls-cert")
    app_key: str = _secret("App Key of the console, to send what handlers return")
    app_secret: str = _secret("App Secret of the console")
    access_token: str = _secret("an access token got elsewhere, instead of --app-key and --app-secret")
    api_base: str = _setting("https://openapi.baidu.com", "where the send API is")
    user_type: int = _setting(2, "whom replies go to: 1 guests, 2 users with a Baidu account", 1, 2)
    third_party: bool = _setting(False, "send as a third-party platform, with the authorised app's --access-token")
    handlers: str = _setting("", "file or module of the handlers; default: handlers.py here, then beside kfserver.py")
    workers: int = _setting(16, "messages handled at the same time", 1, 10000)
    queue_size: int = _setting(10000, "messages that may wait; above it a push is answered 503", 1)
    tries: int = _setting(3, "times a failing handler is tried in all", 1, 20)
    dedup_size: int = _setting(10000, "messages remembered to drop repeats of", 1)
    max_body: int = _setting(1024 * 1024, "bytes that a push may have", 1)
    max_connections: int = _setting(1000, "connections at a time; more, and the longest waiting gives way", 1)
    journal: str = _setting("", "file in which messages survive a crash, as kf.db; empty: memory only")
    journal_sync: str = _setting("normal", "normal: survives a crash of the process; full: a power cut too",
                                 choices=("normal", "full"))
    redis: str = _secret("address of a Redis server through which several instances drop repeats as one")
    admin: str = _setting("", "address of a second listener for /healthz and /metrics, as 127.0.0.1:9090")
    log_format: str = _setting("text", "text, or json: one object a line", choices=("text", "json"))
    reload: bool = _setting(False, "load the handlers again when their file changes, for development")
    grace: float = _setting(10.0, "seconds to finish the waiting messages at shutdown", 0, 86400)
    log_level: str = _setting("info", "debug, info, warning or error", choices=("debug", "info", "warning", "error"))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_setting(field, getattr(self, field.name))
        if not re.fullmatch(r"(/[!\"$->@-~]*)?", self.path):
            raise SettingsError(f"{setting_names('path')} must start with '/', as in /kf, and be written as in URLs: "
                                "percent-encoded, without '?' and '#'")
        if bool(self.app_key) != bool(self.app_secret):
            raise SettingsError(f"{setting_names('app_key')} and {setting_names('app_secret')} go together")
        if not _is_base(self.api_base):
            raise SettingsError(f"{setting_names('api_base')} takes an address like https://openapi.baidu.com")
        if self.app_key and self.access_token:
            raise SettingsError(f"{setting_names('access_token')} replaces --app-key and --app-secret: set either")
        if self.third_party and not self.access_token:
            raise SettingsError(f"{setting_names('third_party')} needs --access-token, that of the authorised app")
        if self.tls_key and not self.tls_cert:
            raise SettingsError(f"{setting_names('tls_key')} needs --tls-cert, the certificate that it belongs to")
        if self.admin and not (re.fullmatch(r"\S*:\d{1,5}", self.admin) and int(self.admin.rpartition(":")[2]) < 65536):
            raise SettingsError(f"{setting_names('admin')} takes an address and a port, as 127.0.0.1:9090")
        if self.aes_key and not re.fullmatch("[A-Za-z0-9+/]{43}", self.aes_key):
            raise SettingsError(f"{setting_names('aes_key')} takes the 43 characters that the console shows")
        if self.aes_key and not (self.token and self.app_id):
            raise SettingsError(f"{setting_names('aes_key')} needs --token and --app-id too: all three prove a push")


def _is_base(text: str) -> bool:
    """Whether the text is the address of a server, maybe with a path, and nothing else."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (raises ValueError for what is no port)
    except ValueError:
        return False
    return bool(re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", text) and parts.hostname)


SETTING_FIELDS: Mapping[str, dataclasses.Field[Any]] = MappingProxyType(
    {field.name: field for field in dataclasses.fields(Settings)})


def setting_names(name: str) -> str:
    """How a user writes the setting: ``--max-body (KF_MAX_BODY)``."""
    return f"--{name.replace('_', '-')} (KF_{name.upper()})"


def _takes(field: dataclasses.Field[Any]) -> str:
    """What the values of a setting must be, in words."""
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    if choices:
        return "one of " + ", ".join(choices)
    kind = {"int": "a whole number", "float": "a number", "bool": "true or false"}.get(str(field.type), "text")
    if low is None:
        return kind
    return f"{kind} from {low:g} to {high:g}" if high is not None else f"{kind}, {low} or more"


def check_setting(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise `SettingsError` unless the setting takes the value."""
    kinds: Mapping[str, Tuple[type, ...]] = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    good = isinstance(value, kinds[str(field.type)]) and (str(field.type) == "bool" or not isinstance(value, bool))
    if good and low is not None:
        good = low <= value <= (float("inf") if high is None else high)
    if good and choices:
        good = value in choices
    if not good:
        shown = f", not {value!r}" if field.repr else ""
        raise SettingsError(f"{setting_names(field.name)} takes {_takes(field)}{shown}")


# Characters that a number in a push may have. 64-bit ids have 20; arithmetic on thousands of digits is slow.
MAX_NUMBER = 64


class Request(NamedTuple):
    """One HTTP request, whichever server read it. ``query`` is raw, without the question mark."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""


class Response(NamedTuple):
    """One answer. ``outcome`` is the word for it in logs and metrics, and is not sent."""

    status: int
    body: bytes
    outcome: str
    headers: Tuple[Tuple[str, str], ...] = ()


class Image(NamedTuple):
    """An answer that shows the picture at ``url``: return it from a handler."""

    url: str


Answer = Union[str, Image]
Answers = Union[None, Answer, Sequence[Answer]]


class Message:
    """One message of a user, or one event. Its attributes are the platform's fields in snake_case, read-only.

    ``fields`` holds every field that came, known or not, under its wire name: text for scalars, because XML has nothing
    else, and dicts and lists for what was structured. Blanks around a value are layout and dropped, but for Content.
    ``key`` is the deduplication key: the same after a restart, so a handler can use it to know a message again.
    """

    __slots__ = ("fields", "key", "outbox")

    def __init__(self, fields: Mapping[str, Any], outbox: Optional[Callable[[Answers], None]] = None) -> None:
        """``outbox`` takes what `reply` is given: in a test, the ``append`` of a list."""
        self.fields = MappingProxyType(fields) if isinstance(fields, dict) else fields
        self.key = ""
        self.outbox = outbox

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.fields == other.fields

    def __repr__(self) -> str:
        # The kind and the key only: a repr ends up in logs, and the user's text must not.
        return f"<Message {self.msg_type} {self.key}>"

    __hash__ = None  # type: ignore[assignment]

    def reply(self, answers: Answers) -> None:
        """Send answers to the user now, from inside a handler that goes on; returning them sends them at its end.

        Raises `HandlerError` above the platform's quota of five for one message, `ReplyError` when they cannot be sent.
        """
        if self.outbox is None:
            raise HandlerError("this message has no way back: in a test, make it with "
                               "Message(fields, outbox=sent.append)")
        self.outbox(answers)

    def text(self, name: str) -> str:
        """Field ``name`` as text; empty where it is missing or structured."""
        value = self.fields.get(name, "")
        return value if isinstance(value, str) else ""

    @property
    def to_user_name(self) -> str:
        """The mini-program's app id."""
        return self.text("ToUserName")

    @property
    def from_user_name(self) -> str:
        """The sender's openid; empty for events that have no sender."""
        return self.text("FromUserName")

    @property
    def create_time(self) -> int:
        """When the message was written, in Unix seconds; 0 where it is missing or not a number."""
        text = self.text("CreateTime")
        return int(text) if text.isdecimal() and len(text) < MAX_NUMBER else 0

    @property
    def msg_type(self) -> str:
        """``text``, ``image``, ``event`` or a type of tomorrow. A push with an event name and no type is an event."""
        return self.text("MsgType") or ("event" if self.event else "")

    @property
    def event(self) -> str:
        """The event's name; empty for what is no event. Third-party pushes write the field in lower case."""
        return self.text("Event") or self.text("event")

    @property
    def content(self) -> str:
        """What the user wrote, to the letter; empty for what is no text."""
        return self.text("Content")

    @property
    def pic_url(self) -> str:
        """The address of the picture; empty for what is no image."""
        return self.text("PicUrl")

    @property
    def msg_id(self) -> Optional[str]:
        """The platform's id of the message, as text; None where there is none, as in events."""
        return self.text("MsgId") or None


# ---- 3 Signatures ---------------------------------------------------------------------------------------------------
# Law: texts in, a verdict out. Knows nothing of where in a request the texts travel.

def sign(*parts: str) -> str:
    """The platform's signature: SHA-1 over the parts, sorted by their bytes and joined, in lower-case hex."""
    ordered = sorted(parts)  # as text, whose order is that of its UTF-8
    return hashlib.sha1(b"".join([part.encode("utf-8", "surrogatepass") for part in ordered])).hexdigest()


def verify(signature: str, *parts: str) -> bool:
    """Whether ``signature`` is that of the parts, compared in constant time. Any text may come, ASCII or not."""
    return hmac.compare_digest(sign(*parts).encode(), signature.encode("utf-8", "surrogatepass"))


# ---- 4 Encryption ---------------------------------------------------------------------------------------------------
# Law: the envelope of safe mode, and AES-256-CBC beneath it. Texts and bytes in, bytes out, or `ForbiddenPush`, whose
# reason is for the log only. Knows nothing of requests and messages.

# Bytes: of an AES block, of what the envelope pads to, of the random head and of the length that open its plaintext.
AES_BLOCK = 16
ENVELOPE_BLOCK = 32
RANDOM_HEAD = 16
LENGTH_FIELD = 4
# Rounds of AES with a key of 256 bits (FIPS 197, section 5).
ROUNDS = 14


class Envelope:
    """Opens and seals what safe mode calls Encrypt, under the platform's EncodingAESKey and the app id.

    Plaintext: 16 random bytes, the message's length, the message, the app id, padded to 32 bytes by PKCS #7's rule.
    """

    def __init__(self, encoding_aes_key: str, app_id: str) -> None:
        self._app_id = app_id.encode()
        self._cipher = make_cipher(decode_aes_key(encoding_aes_key))

    def open(self, sealed: str) -> bytes:
        """The message in ``sealed``, base64 with blanks anywhere, its signature checked. Raises `ForbiddenPush`."""
        try:
            ciphertext = base64.b64decode("".join(sealed.split()), validate=True)
        except ValueError:
            raise ForbiddenPush("Encrypt is not base64") from None
        if not ciphertext or len(ciphertext) % AES_BLOCK:
            raise ForbiddenPush("Encrypt is not a whole number of AES blocks")
        return self._unwrap(self._cipher.decrypt(ciphertext))

    def _unwrap(self, plaintext: bytes) -> bytes:
        padding = plaintext[-1]
        if not 1 <= padding <= ENVELOPE_BLOCK or not plaintext.endswith(plaintext[-1:] * padding):
            raise ForbiddenPush("wrong padding", "set --aes-key to the EncodingAESKey that the console shows")
        start = RANDOM_HEAD + LENGTH_FIELD
        end = start + int.from_bytes(plaintext[RANDOM_HEAD:start], "big")
        if end > len(plaintext) - padding:
            raise ForbiddenPush("wrong length inside the envelope")
        if not hmac.compare_digest(plaintext[end:-padding], self._app_id):
            raise ForbiddenPush("sealed for another app", "set --app-id to the app id that the console shows")
        return plaintext[start:end]

    def seal(self, message: bytes, random: bytes) -> str:
        """What `open` opens: ``message`` behind the 16 ``random`` bytes, encrypted, in base64."""
        plaintext = random + len(message).to_bytes(LENGTH_FIELD, "big") + message + self._app_id
        padding = ENVELOPE_BLOCK - len(plaintext) % ENVELOPE_BLOCK
        return base64.b64encode(self._cipher.encrypt(plaintext + bytes([padding]) * padding)).decode()


def decode_aes_key(encoding_aes_key: str) -> bytes:
    """The 32 bytes of an EncodingAESKey. Its last character has two spare bits; keys with them set are in use."""
    return base64.b64decode(encoding_aes_key + "=")


def make_cipher(key: bytes) -> Union[Aes256Cbc, LibraryAes256Cbc]:
    """AES-256-CBC under ``key``, by the ``cryptography`` package where it is installed, else by our own code."""
    try:
        return LibraryAes256Cbc(key)
    except ImportError:
        return Aes256Cbc(key)


class LibraryAes256Cbc:
    """AES-256-CBC, the key's first block as the iv, by the ``cryptography`` package. Raises ImportError without it."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        self._cipher = Cipher(algorithms.AES(key), modes.CBC(key[:AES_BLOCK]))

    def decrypt(self, data: bytes) -> bytes:
        """Whole blocks in, as many out."""
        decryptor = self._cipher.decryptor()
        return bytes(decryptor.update(data) + decryptor.finalize())

    def encrypt(self, data: bytes) -> bytes:
        """Whole blocks in, as many out."""
        encryptor = self._cipher.encryptor()
        return bytes(encryptor.update(data) + encryptor.finalize())


class Aes256Cbc:
    """AES-256-CBC, the key's first block as the iv, by the standard library alone (FIPS 197, NIST SP 800-38A).

    All blocks of a message go through the rounds together. The state is 16 planes, one for each place in a block, row
    by row, and a plane holds that place's byte of every block. So one bytes.translate substitutes for all blocks, or
    multiplies in the field, ShiftRows moves planes, and an addition is the exclusive or of two long integers.
    The decryption of CBC allows that; its encryption goes block by block, and is slower.
    """

    def __init__(self, key: bytes) -> None:
        box = _substitution_box()
        inverse = bytes(box.index(value) for value in range(256))
        self._iv = key[:AES_BLOCK]
        keys = _expand_key(key, box)
        # The columns' factors of MixColumns and of its inverse, row by row, behind the substitution that precedes them.
        self._forward = _Direction(keys, [box.translate(_multiples(factor)) for factor in (2, 3, 1, 1)], box, 1)
        unmix = [_multiples(factor) for factor in (14, 11, 13, 9)]
        # The equivalent inverse cipher (FIPS 197, section 5.3.5) has the same shape as the cipher, with unmixed keys.
        keys = [keys[-1], *(_mix(each, unmix) for each in keys[-2:0:-1]), keys[0]]
        self._backward = _Direction(keys, [inverse.translate(factor) for factor in unmix], inverse, -1)

    def decrypt(self, data: bytes) -> bytes:
        """Whole blocks in, as many out."""
        return _add(_run_rounds(data, self._backward), self._iv + data[:-AES_BLOCK])

    def encrypt(self, data: bytes) -> bytes:
        """Whole blocks in, as many out."""
        blocks = [self._iv]
        for start in range(0, len(data), AES_BLOCK):
            blocks.append(_run_rounds(_add(data[start:start + AES_BLOCK], blocks[-1]), self._forward))
        return b"".join(blocks[1:])


class _Direction(NamedTuple):
    """What the rounds need one way: round keys as planes, the mixing tables, the last substitution, the rows' shift."""

    keys: List[bytes]
    mixing: List[bytes]
    last: bytes
    shift: int


def _run_rounds(data: bytes, way: _Direction) -> bytes:
    count = len(data) // AES_BLOCK
    keys = [_repeat_bytes(key, count) for key in way.keys]
    state = _add(_to_planes(data), keys[0])
    for key in keys[1:-1]:
        state = _add(_mix(_shift_rows(state, way.shift * count), way.mixing), key)
    state = _add(_shift_rows(state, way.shift * count).translate(way.last), keys[-1])
    return _from_planes(state)


def _to_planes(data: bytes) -> bytes:
    # A block is written column by column, four bytes each.
    return b"".join(data[4 * column + row::AES_BLOCK] for row in range(4) for column in range(4))


def _from_planes(state: bytes) -> bytes:
    data, count = bytearray(len(state)), len(state) // AES_BLOCK
    for plane in range(AES_BLOCK):
        row, column = divmod(plane, 4)
        data[4 * column + row::AES_BLOCK] = state[plane * count:(plane + 1) * count]
    return bytes(data)


def _repeat_bytes(key: bytes, count: int) -> bytes:
    """Every byte of ``key`` so many times: the round key for as many blocks."""
    spaced = bytearray(len(key) * count)
    for offset in range(count):
        spaced[offset::count] = key
    return bytes(spaced)


def _shift_rows(state: bytes, step: int) -> bytes:
    """Row r turned left by r steps, a step being the length of a plane, negative to turn right."""
    size = len(state) // 4
    rows = [state[start:start + size] for start in range(0, len(state), size)]
    return b"".join(rows[r][r * step % size:] + rows[r][:r * step % size] for r in range(4))


def _mix(state: bytes, tables: List[bytes]) -> bytes:
    """MixColumns, and the substitution before it if ``tables`` hold it: each row becomes the sum of the rows below it
    in turn, each multiplied by the factor of its distance."""
    size, total = len(state) // 4, 0
    for distance, table in enumerate(tables):
        product = state.translate(table)
        total ^= int.from_bytes(product[distance * size:] + product[:distance * size], "big")
    return total.to_bytes(len(state), "big")


def _add(one: bytes, other: bytes) -> bytes:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).to_bytes(len(one), "big")


def _double(value: int) -> int:
    """``value`` times x in the field of AES (FIPS 197, section 4.2.1)."""
    return value << 1 ^ (0x11B if value & 0x80 else 0)


def _multiples(factor: int) -> bytes:
    """The table that multiplies by ``factor`` in the field."""
    doubled = bytes(map(_double, range(256)))
    table, power = bytes(256), bytes(range(256))
    for bit in range(factor.bit_length()):
        table = _add(table, power) if factor >> bit & 1 else table
        power = power.translate(doubled)
    return table


def _substitution_box() -> bytes:
    """The S-box: the inverse in the field, and a map of its bits (FIPS 197, section 5.1.1)."""
    powers = [1]  # of 3, which runs through the whole field, so that inverses are found by counting back
    for _ in range(254):
        powers.append(powers[-1] ^ _double(powers[-1]))
    box = bytearray([0x63]) * 256
    for exponent, value in enumerate(powers):
        twice = powers[-exponent % 255] * 0x101
        for turn in range(5):
            box[value] ^= twice >> (8 - turn) & 0xFF
    return bytes(box)


def _expand_key(key: bytes, box: bytes) -> List[bytes]:
    """The round keys, as planes (FIPS 197, section 5.2, for a key of eight words)."""
    words, constant = [key[start:start + 4] for start in range(0, 32, 4)], 1
    for index in range(8, 4 * (ROUNDS + 1)):
        word = words[-1]
        if index % 8 == 0:
            word = _add((word[1:] + word[:1]).translate(box), bytes([constant, 0, 0, 0]))
            constant = _double(constant)
        elif index % 8 == 4:
            word = word.translate(box)
        words.append(_add(word, words[-8]))
    return [_to_planes(b"".join(words[start:start + 4])) for start in range(0, len(words), 4)]


# ---- 5 Payloads -----------------------------------------------------------------------------------------------------
# Law: bytes in, a `Message` out, or `MalformedPush`. The bytes are an attacker's until proven otherwise: nothing here
# recurses deeper than MAX_DEPTH, expands an entity, or builds more than MAX_MARKS values.

# Levels of nesting that fields may have; published packets have one.
MAX_DEPTH = 32
# A body below this many bytes cannot hold enough values to cost more than 3 MiB, so only larger ones are counted.
CHEAP_BODY = 32 * 1024
# Values a large body may hold, counted by the marks that open or part them: 20,000 Python objects are about 2 MiB.
MAX_MARKS = 20000
# Blanks by XML's definition, section 2.3. str.strip() alone would eat control characters of a user's text too.
BLANKS = " \t\r\n"

# Fields whose own blanks count: a user wrote the one, and a signature covers the other.
VERBATIM = frozenset(("Content", "Encrypt"))

_XML_PROLOG = re.compile(rb"(?:<\?xml\s[^>]*\?>)?\s*<[^!?]")
_XML_ENCODING = re.compile(rb"<\?xml\s[^>]*?\sencoding\s*=\s*[\"']([^\"']*)")
_XML_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))
_LONG_TAG = re.compile(rb"<[^!?<>][^<>]{1024}")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Where 32 characters in a row mostly do not occur: the noncharacters that Unicode sets aside for a program's own use,
# U+FDD0 to U+FDEF, and two stretches of private use.
HIDING_PLACES = (0xFDD0, 0xF0000, 0x100000)


def parse(payload: bytes) -> Message:
    """The message in ``payload``: XML or JSON, told apart by the bytes. Raises `MalformedPush` for anything else."""
    return Message(parse_fields(payload))


def parse_fields(payload: bytes) -> Dict[str, Any]:
    """Every field in ``payload`` under its wire name. Raises `MalformedPush`."""
    body = (payload[3:] if payload.startswith(b"\xef\xbb\xbf") else payload).strip()
    if body.startswith(b"<"):
        return _parse_xml(body)
    if body.startswith(b"{"):
        return _parse_json(body)
    raise MalformedPush("the body is neither an XML document nor a JSON object" if body else "the body is empty")


def _refuse_costly(body: bytes, marks: Iterable[bytes]) -> None:
    if len(body) > CHEAP_BODY and sum(map(body.count, marks)) > MAX_MARKS:
        raise MalformedPush(f"more than {MAX_MARKS} values or pieces of text in one push")


class _StrictTree(ElementTree.TreeBuilder):
    """The standard tree builder, less processing instructions. `_check_prolog` has seen to the DOCTYPE."""

    def pi(self, target: str, text: Optional[str] = None) -> Any:
        raise MalformedPush("XML with processing instructions is not accepted")


def _parse_xml(body: bytes) -> Dict[str, Any]:
    _check_prolog(body)
    has_controls = len(body.translate(None, _XML_CONTROLS)) < len(body)
    if len(body) > CHEAP_BODY and (has_controls or _LONG_TAG.search(body)):
        raise MalformedPush(f"control characters or a long tag in a body above {CHEAP_BODY} bytes")
    _refuse_costly(body, (b"<", b"=", b"&", b"]", b"\n", b"\r"))
    return _parse_xml_with_controls(body) if has_controls else _read_tree(body)


def _check_prolog(body: bytes) -> None:
    """Refuse a document that holds more than a declaration before its root: a DOCTYPE can stand nowhere else."""
    if not _XML_PROLOG.match(body):
        raise MalformedPush("XML starts with its root element: no DOCTYPE, comment or processing instruction before it")
    declared = _XML_ENCODING.match(body)
    if declared and declared.group(1).lower() not in (b"utf-8", b"utf8"):
        raise MalformedPush("XML must be in UTF-8")


def _parse_xml_with_controls(body: bytes) -> Dict[str, Any]:
    """XML 1.0 has no control characters, and users' messages do: each travels through the parser in disguise."""
    text = _utf8(body)
    for first in HIDING_PLACES:
        if not re.search(f"[{chr(first)}-{chr(first + 31)}]", text):
            hide = {code: first + code for code in range(32) if chr(code) not in BLANKS}
            show = {hidden: code for code, hidden in hide.items()}
            fields = _read_tree(text.translate(hide).encode())
            return {name: _translate(value, show) for name, value in fields.items()}
    raise MalformedPush("XML with control characters, and with every character that could stand for them")


def _read_root(body: bytes) -> ElementTree.Element:
    # With the standard builder alone the parser stays within C, which takes 2 us less.
    builder = _StrictTree() if b"<?" in body[2:] else ElementTree.TreeBuilder()
    parser = ElementTree.XMLParser(target=builder, encoding="utf-8")
    try:
        parser.feed(body)
        root: ElementTree.Element = parser.close()
    except ElementTree.ParseError as error:
        raise MalformedPush(f"not XML: {ErrorString(error.code)} at line {error.position[0]}") from None
    return root


def _refuse_namespaces(root: ElementTree.Element) -> None:
    for element in root.iter():
        if "{" in element.tag or any("{" in name for name, _ in element.items()):
            raise MalformedPush("XML with namespaces is not accepted")


def _read_tree(body: bytes) -> Dict[str, Any]:
    root = _read_root(body)
    if b":" in body or b"=" in body:  # without these a name has no namespace
        _refuse_namespaces(root)
    fields = _children(root, 0)
    for name in VERBATIM:
        if isinstance(fields.get(name), str):
            fields[name] = _exact_text(root, name, body)
    return fields


def _children(element: ElementTree.Element, depth: int) -> Dict[str, Any]:
    """Text for each child that is a leaf, a dict for one with children, a list of these for children of one name."""
    if depth >= MAX_DEPTH:
        raise MalformedPush(f"nested deeper than {MAX_DEPTH} levels")
    values: Dict[str, Any] = {}
    for child in element:
        tag, text = child.tag, child.text
        value = _children(child, depth + 1) if len(child) else text.strip(BLANKS) if text else ""
        if tag in values:
            _append_value(values, tag, value)
        else:
            values[tag] = value
    return values


def _exact_text(root: ElementTree.Element, name: str, body: bytes) -> str:
    """The text of a field, its own blanks included. Blanks in its CDATA are the sender's, blanks around it are layout,
    which only a look at the sections themselves can tell apart."""
    text = root.findtext(name) or ""
    if (text[:1].strip(BLANKS) and text[-1:].strip(BLANKS)) or len(body) > CHEAP_BODY:
        return text
    sections = _text_in_cdata(name, body)
    return text if sections is None else sections


def _text_in_cdata(name: str, body: bytes) -> Optional[str]:
    """What the CDATA sections of the root's child ``name`` hold; None if it has none, or other text than blanks."""
    parser = ParserCreate("utf-8")
    path: List[str] = []
    inside: List[str] = []
    outside: List[str] = []

    def take_into(texts: List[str]) -> None:
        parser.CharacterDataHandler = lambda text: texts.append(text) if path[1:] == [name] else None
        parser.CharacterDataHandler("")  # an empty section counts too
    parser.StartElementHandler = lambda tag, attributes: path.append(tag)
    parser.EndElementHandler = lambda tag: path.pop()
    parser.StartCdataSectionHandler = functools.partial(take_into, inside)
    parser.EndCdataSectionHandler = functools.partial(take_into, outside)
    take_into(outside)
    parser.Parse(body, True)
    return None if "".join(outside).strip(BLANKS) or not inside else "".join(inside)


def _append_value(values: Dict[str, Any], tag: str, value: Any) -> None:
    """Add one more value under a name that is taken: the names with several values hold a list."""
    if not isinstance(values[tag], list):
        values[tag] = [values[tag]]
    values[tag].append(value)


def _parse_json(body: bytes) -> Dict[str, Any]:
    _refuse_costly(body, (b"{", b"[", b",", b"\\"))
    if len(body) > CHEAP_BODY and b"\\ud" in body.lower():
        raise MalformedPush(f"escaped surrogates in a body above {CHEAP_BODY} bytes")
    text = _utf8(body)
    try:
        fields: Dict[str, Any] = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedPush(f"not JSON: {error.msg} at character {error.pos}") from None
    except RecursionError:
        raise MalformedPush(f"nested deeper than {MAX_DEPTH} levels") from None
    fields = {name: value if name in VERBATIM and isinstance(value, str) else _json_value(value, 1)
              for name, value in fields.items()}
    if ("\\ud" in text or "\\uD" in text) and any(map(_SURROGATES.search, _texts_in(fields))):
        raise MalformedPush("not JSON: half of a surrogate pair, which cannot be stored, printed or sent on")
    return fields


def _json_value(value: Any, depth: int) -> Any:
    """The value as XML would have brought it: text, or dicts and lists of text."""
    if isinstance(value, str):
        return value.strip(BLANKS)
    if not isinstance(value, (dict, list)):
        return {True: "true", False: "false", None: ""}[value]
    if depth >= MAX_DEPTH:
        raise MalformedPush(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {name: _json_value(item, depth + 1) for name, item in value.items()}
    return [_json_value(item, depth + 1) for item in value]


def _texts_in(value: Any) -> Iterator[str]:
    """Every text in the value, names too."""
    if isinstance(value, str):
        yield value
        return
    for name in value:
        yield from _texts_in(name)
        if isinstance(value, dict):
            yield from _texts_in(value[name])


def _unique(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise MalformedPush("not JSON: a name stands twice in one object")
    return fields


def _number(text: str) -> str:
    if len(text) > MAX_NUMBER:
        raise MalformedPush(f"a number of more than {MAX_NUMBER} characters")
    return text


def _no_constant(text: str) -> NoReturn:
    raise MalformedPush("not JSON: NaN and Infinity are no numbers")


# strict=False lets control characters stand in strings: users' messages have them.
_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_number, parse_float=_number,
                         parse_constant=_no_constant, strict=False)


def _utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MalformedPush(f"not UTF-8 at byte {error.start}") from None


def _translate(value: Any, table: Mapping[int, int]) -> Any:
    """``value`` with every text in it translated."""
    if isinstance(value, str):
        return value.translate(table)
    if isinstance(value, list):
        return [_translate(item, table) for item in value]
    return {name: _translate(item, table) for name, item in value.items()}


# ---- 6 Deduplication ------------------------------------------------------------------------------------------------
# Law: keys in, verdicts out. Knows nothing of why a message is claimed; a lock is all that it holds.

_PLAIN_KEY = re.compile(r"[\w.-]{0,64}(?:/[\w.-]{0,64})+", re.ASCII)


def dedup_key(message: Message) -> str:
    """The text that is equal for two pushes exactly when they are one message sent again.

    App, sender, type and MsgId; for what has no MsgId (events) its CreateTime, event and a digest of all fields, since
    two different events may fall into one second. Values that are long or odd are digested, so that a key has at most
    400 characters and is safe in a log.
    """
    parts = [message.to_user_name, message.from_user_name, message.msg_type]
    msg_id = message.msg_id
    if msg_id:
        parts.append(msg_id)
    else:
        parts += [message.text("CreateTime"), message.event, _digest(message.fields)]
    key = "/".join(parts)
    return key if _PLAIN_KEY.fullmatch(key) and key.count("/") == len(parts) - 1 else _digest(parts)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed_digest(digest, value)
    return digest.hexdigest()[:32]


def _feed_digest(digest: Any, value: Any) -> None:
    """Feed the value piece by piece, each behind its kind and length: no two values feed the same bytes."""
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)
        return
    items = sorted(value.items()) if isinstance(value, Mapping) else value
    digest.update(b"%s%d:" % (b"m" if items is not value else b"l", len(value)))
    for item in items:
        _feed_digest(digest, item)


class ClaimCache:
    """Which messages were seen, in memory: at most ``size`` keys, the longest finished forgotten first.

    A key is claimed by exactly one push, then accepted (the message is safe with us), then finished. One that is not
    yet finished is never forgotten; when only such keys are left, a new one is refused. Safe to use from any thread.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()  # guards the two below: a key is in one of them at most
        self._held: Dict[str, bool] = {}  # in hand; whether accepted
        self._finished: OrderedDict[str, None] = OrderedDict()  # oldest first

    def __len__(self) -> int:
        return len(self._held) + len(self._finished)

    def claim(self, key: str) -> bool:
        """True for exactly one caller; False for a repeat of what was accepted.

        Raises `Busy` for a repeat of what is only claimed, because the first may yet be refused, and when every key is
        in hand.
        """
        with self._lock:
            if key in self._finished:
                self._finished.move_to_end(key)
                return False
            if key in self._held:
                return self._repeat_of_held(key)
            self._make_room()
            self._held[key] = False
            return True

    def _repeat_of_held(self, key: str) -> bool:
        if self._held[key]:
            return False
        raise BeingTaken("the same message is just being taken")

    def _make_room(self) -> None:
        while len(self._held) + len(self._finished) >= self._size:
            if not self._finished:
                raise Busy("as many messages are in hand as can be remembered", "raise --dedup-size")
            self._finished.popitem(last=False)

    def accept(self, key: str) -> None:
        """The claimed message is safe: from now on its repeats are answered ``success``."""
        with self._lock:
            if key in self._held:  # its handler may have been faster, and finished it
                self._held[key] = True

    def finish(self, key: str) -> None:
        """The message is through: remember the key as long as there is room."""
        with self._lock:
            if self._held.pop(key, None) is None:
                self._make_room()
            self._finished[key] = None

    def release(self, key: str) -> None:
        """The message was refused, or failed for good: the same push may come again."""
        with self._lock:
            self._held.pop(key, None)

    remember = finish  # before a restart; where claims are shared, the two differ

    def restore(self, key: str) -> None:
        """The message was accepted before a restart, and is in hand again, room or not."""
        with self._lock:
            self._held[key] = True


# ---- 7 Handlers -----------------------------------------------------------------------------------------------------
# Law: which function takes which message. Knows nothing of threads, retries or where messages come from.

Handler = Callable[..., Answers]
ErrorHandler = Callable[[Message, BaseException], object]
HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])

# The types whose messages carry a text that patterns can be held against, and where it is.
_SUBJECTS: Mapping[str, Callable[[Message], str]] = MappingProxyType(
    {"text": lambda message: message.content.strip(), "event": lambda message: message.event})
# Kinds of unhandled message that are told of; a sender that invents types shall not fill memory and log.
MAX_KINDS_TOLD = 100


class Match(NamedTuple):
    """The handler that takes a message, and what its expression's groups caught."""

    handler: Handler
    arguments: Tuple[Optional[str], ...] = ()

    @property
    def name(self) -> str:
        """The handler's name, for logs."""
        return getattr(self.handler, "__name__", repr(self.handler))


class HandlerRegistry:
    """The functions that take messages, by type and pattern. Register all before the server starts.

    The most specific kind wins (an equal text, then an expression, then the type, then ``"*"``); in a kind, the first
    registered. Equal texts and types are found in one look-up however many there are; expressions are tried in turn.
    """

    def __init__(self) -> None:
        self._equal: Dict[Tuple[str, str], Handler] = {}
        self._expressions: Dict[str, List[Tuple[Pattern[str], Handler]]] = {}
        self._types: Dict[str, Handler] = {}
        self._error_handlers: List[ErrorHandler] = []
        self._told: Set[str] = set()
        self._rules: List[Tuple[Handler, str]] = []

    def __len__(self) -> int:
        return len(self._rules)

    @property
    def rules(self) -> Tuple[str, ...]:
        """One line for each registration, in order, as in ``@registry.on("text", "menu") -> menu``."""
        return tuple(rule for _, rule in self._rules)

    def rules_of(self, handler: Handler) -> Tuple[str, ...]:
        """Those of the `rules` that registered this function: one for each of its decorators."""
        return tuple(rule for function, rule in self._rules if function is handler)

    def on(self, msg_type: str, *patterns: Union[str, Pattern[str]]) -> Callable[[HandlerT], HandlerT]:
        """Decorator: the function takes messages of ``msg_type`` (``"*"``: of every type that nothing else takes).

        Patterns narrow that down, for ``"text"`` by Content and for ``"event"`` by Event name: a str equals all of it,
        blanks trimmed; a compiled expression is searched in it, and its groups become further arguments.
        Returns the function unchanged. Raises `HandlerError` for what could never work.
        """
        if not isinstance(msg_type, str):
            raise HandlerError('on() takes the type first: write @registry.on("text") or @registry.on("*")')
        if patterns and msg_type not in _SUBJECTS:
            raise HandlerError(f'only "text" and "event" take patterns: write @registry.on({msg_type!r})')
        for pattern in patterns:
            _check_pattern(msg_type, pattern)

        def register(function: HandlerT) -> HandlerT:
            _check_handler(function, f"@registry.on({msg_type!r})")
            for groups in {0 if isinstance(pattern, str) else pattern.groups for pattern in patterns} or {0}:
                _check_parameters(function, groups)
            for pattern in patterns:
                self._add_pattern(msg_type, pattern, function)
            if not patterns:
                self._types.setdefault(msg_type, function)
            shown = ", ".join([repr(msg_type)] + [_show_pattern(pattern) for pattern in patterns])
            self._rules.append((function, f"@registry.on({shown}) -> {Match(function).name}"))
            return function
        return register

    def _add_pattern(self, msg_type: str, pattern: Union[str, Pattern[str]], function: Handler) -> None:
        if isinstance(pattern, str):
            self._equal.setdefault((msg_type, pattern.strip()), function)
        else:
            self._expressions.setdefault(msg_type, []).append((pattern, function))

    def on_error(self, function: HandlerT) -> HandlerT:
        """Decorator: the function gets ``(message, error)`` when the last try of a message has failed."""
        _check_handler(function, "@registry.on_error")
        _check_parameters(function, 1)
        self._error_handlers.append(function)
        return function

    def find(self, message: Message) -> Optional[Match]:
        """The handler that takes the message, or None."""
        msg_type = message.msg_type
        if msg_type in _SUBJECTS:
            match = self._find_by_pattern(msg_type, _SUBJECTS[msg_type](message))
            if match:
                return match
        handler = self._types.get(msg_type, self._types.get("*"))
        return None if handler is None else Match(handler)

    def _find_by_pattern(self, msg_type: str, subject: str) -> Optional[Match]:
        handler = self._equal.get((msg_type, subject))
        if handler is not None:
            return Match(handler)
        for expression, function in self._expressions.get(msg_type, ()):
            found = expression.search(subject)
            if found:
                return Match(function, found.groups())
        return None

    def handle(self, message: Message) -> Answers:
        """Run the handler that takes the message, here and now: returns what it returns and raises what it raises.

        A message that nobody takes is told of in the log, once a kind, with the decorator that would take it.
        """
        match = self.find(message)
        if match is None:
            self._tell_unhandled(message)
            return None
        return match.handler(message, *match.arguments)

    def handle_error(self, message: Message, error: BaseException) -> List[BaseException]:
        """Run all functions of `on_error`; the errors that they raised."""
        failed = [attempt(functools.partial(function, message, error)) for function in self._error_handlers]
        return [each for each in failed if each]

    def _tell_unhandled(self, message: Message) -> None:
        decorator = decorator_for(message)
        if decorator not in self._told and len(self._told) < MAX_KINDS_TOLD:
            self._told.add(decorator)
            log.warning("no handler takes this message; to take it, write: %s", decorator)


def decorator_for(message: Message) -> str:
    """The decorator that would take the message. In ASCII: the names in it came from outside, and go to logs."""
    patterns = f', "{message.event[:64]}"' if message.msg_type == "event" else ""
    return ascii(f'@registry.on("{message.msg_type[:64] or "*"}"{patterns})')[1:-1]


def _check_pattern(msg_type: str, pattern: object) -> None:
    is_expression = isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str)
    if not (is_expression or isinstance(pattern, str)):
        raise HandlerError(f'a pattern is a text or an expression: write @registry.on({msg_type!r}, "menu") or '
                           f'@registry.on({msg_type!r}, re.compile(r"order (\\d+)")), not {type(pattern).__name__}')


def _check_handler(function: object, decorator: str) -> None:
    name = getattr(function, "__name__", "answer")
    if not callable(function):
        raise HandlerError(f"{decorator} stands above a function: write it on the line before 'def answer(message):'")
    called = function if inspect.isroutine(function) else getattr(function, "func", _method_that_is_called(function))
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise HandlerError(f"handlers are plain functions: write 'def {name}(message):' without async")


def _check_parameters(function: Callable[..., object], further: int) -> None:
    """Raise `HandlerError` unless the function can be called with the message and so many arguments behind it."""
    try:
        inspect.signature(function).bind(*range(1 + further))
    except TypeError:
        name = getattr(function, "__name__", "answer")
        raise HandlerError(f"{name} is called with the message and {further} more: one for each group of the "
                           "expression, the error for on_error; give it as many parameters") from None
    except ValueError:
        return  # some functions written in C do not tell


def _method_that_is_called(function: object) -> Any:
    return inspect.getattr_static(type(function), "__call__")


def _show_pattern(pattern: Union[str, Pattern[str]]) -> str:
    return repr(pattern) if isinstance(pattern, str) else f're.compile(r"{pattern.pattern}")'


def attempt(function: Callable[[], object]) -> Optional[BaseException]:
    """Call what a user wrote; the error that it raised, or None. The only place where any error at all is caught:
    sys.exit() in a handler, or a task cancelled in it, must not end a worker without a word. Ctrl-C passes: it comes
    to the main thread alone."""
    try:
        function()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return error
    return None


def guard(function: Callable[[], object]) -> None:
    """Call a part of our own that must not end the thread it runs on."""
    error = attempt(function)
    if error:
        report_bug(error)


def report_bug(error: BaseException) -> None:
    """Tell of an error that should not be."""
    log.error("an error inside kfserver; please report this", exc_info=exc_info_of(error))


# ---- 8 Endpoint -----------------------------------------------------------------------------------------------------
# Law: one request in, one response out, and every decision that the outside can see on one screen, `Endpoint._decide`.
# Knows no socket and no thread; the world around it is handed in as `Surroundings`.

# Bytes of a form-encoded handshake: four short values. A longer body is no handshake.
MAX_HANDSHAKE = 4096
# Seconds between two warnings with the same advice: an attacker shall not be able to fill the log with them.
ADVICE_INTERVAL = 60.0
# The platform's page writes the first; receivers in production have met the second.
_ECHO_NAMES = ("echoStr", "echostr")

UP = Response(200, b"kfserver is up: pushes go here by POST\n", "up")
ACCEPTED = Response(200, b"success", "accepted")
REPEATED = Response(200, b"success", "repeat")


Confirm = Callable[[], None]


class Surroundings(NamedTuple):
    """What an `Endpoint` asks of the world around it.

    ``claims`` is a `ClaimCache` or what works like one. ``submit`` takes a message and its bytes, or raises `Busy`;
    what it returns waits until the message is safe, or raises `Busy`. ``clock`` gives Unix seconds, ``timer`` seconds
    from anywhere. ``observe`` is told each answer and the seconds it took.
    """

    claims: Any
    submit: Callable[[Message, bytes], Confirm]
    clock: Callable[[], float]
    timer: Callable[[], float]
    dedup_key: Callable[[Message], str] = dedup_key
    observe: Optional[Callable[[Response, Optional[Message], float], None]] = None


class Gate:
    """Proves that a request comes from the platform; raises `ForbiddenPush` where that cannot be proven."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._envelope = Envelope(settings.aes_key, settings.app_id) if settings.aes_key else None

    def open(self, query: Mapping[str, str], body: bytes) -> bytes:
        """The message's own bytes, proven to come from the platform and, in safe mode, decrypted."""
        outer = self._read_outer(body) if b"Encrypt" in body else {}
        sealed = outer.get("Encrypt")
        if isinstance(sealed, str) and self._envelope:
            self._prove_sealed(query if "msg_signature" in query else _lower_signature(outer), sealed)
            return self._envelope.open(sealed)
        if self._envelope and not self._settings.compatible:
            raise ForbiddenPush("not encrypted", "choose safe mode in the console, or set --compatible")
        if sealed and "MsgType" not in outer:  # in compatible mode the plain fields stand beside it
            raise ForbiddenPush("encrypted, and no key is set", "set --aes-key, --app-id and --token as in the console")
        self.prove(query)
        return body

    def _read_outer(self, body: bytes) -> Dict[str, Any]:
        try:
            return parse_fields(body)
        except MalformedPush as error:
            if self._envelope:
                raise ForbiddenPush(f"malformed envelope: {error}") from None
            return {}  # no envelope, then: to be refused as a plain push, once it has proven where it comes from

    def prove(self, query: Mapping[str, str]) -> None:
        """Raise `ForbiddenPush` unless ``query`` carries a valid signature, or none is needed."""
        token, signature = self._settings.token, query.get("signature")
        if not token or (signature is None and self._settings.allow_unsigned):
            return
        if signature is None:
            raise ForbiddenPush("no signature", "if the platform does not sign your pushes, set --allow-unsigned")
        if not verify(signature, token, query.get("timestamp", ""), query.get("nonce", "")):
            raise ForbiddenPush("wrong signature", "set --token to the Token that the platform's console shows")
        self._check_age(query.get("timestamp", ""))

    def _prove_sealed(self, values: Mapping[str, str], sealed: str) -> None:
        """Raise `ForbiddenPush` unless the message signature in ``values`` covers the exact text of Encrypt."""
        signature, timestamp = values.get("msg_signature", ""), values.get("timestamp", "")
        parts = (self._settings.token, timestamp, values.get("nonce", ""))
        # Blanks around it may have been there when it was signed, or may be layout.
        if not (verify(signature, *parts, sealed) or verify(signature, *parts, sealed.strip())):
            raise ForbiddenPush("wrong message signature", "set --token to the Token that the platform's console shows")
        self._check_age(timestamp)

    def _check_age(self, timestamp: str) -> None:
        if not self._settings.max_age:
            return
        good = timestamp.isdecimal() and len(timestamp) < MAX_NUMBER
        if not good or abs(self._clock() - int(timestamp)) > self._settings.max_age:
            raise ForbiddenPush("stale signature", "check this machine's clock, or raise --max-age")


class _Decision(NamedTuple):
    """What becomes of a request, before the message is known to be safe."""

    response: Response
    message: Optional[Message]
    confirm: Optional[Confirm]
    too_soon: bool
    started: float


class Endpoint:
    """Answers requests by `handle`, which never waits for a handler of the user's."""

    def __init__(self, settings: Settings, surroundings: Surroundings) -> None:
        self.settings = settings
        self._claims, self._submit, clock, self._timer, self._dedup_key, self._observe = surroundings
        if self._dedup_key is not dedup_key:  # which makes every message a key
            self._dedup_key = functools.partial(make_key, self._dedup_key)
        self._gate = Gate(settings, clock)
        self._advised: Dict[str, float] = {}

    def handle(self, request: Request) -> Response:
        """The answer to one request."""
        return self.handle_all((request,))[0]

    def handle_all(self, requests: Sequence[Request]) -> List[Response]:
        """The answers to requests that came together: all are decided first, so that what must be written to be safe is
        written at once. What repeats another of them is decided again when that one is safe."""
        decisions = [self._decide(request) for request in requests]
        responses = [None if decision.too_soon else self._conclude(decision) for decision in decisions]
        return [response or self._conclude(self._decide(request)) for request, response in zip(requests, responses)]

    def _decide(self, request: Request) -> _Decision:
        """The README's answers table, in its order: every decision that the outside can see."""
        started = self._timer()
        message = confirm = None
        too_soon = False
        try:
            self._admit(request)                                        # 404, 405, 413
            query = _parse_form(request.query)
            handshake = _find_handshake(query, request.body)
            if handshake:
                self._gate.prove(handshake)                             # 403
                response = Response(200, _echo(handshake), "handshake")
            elif request.method != "POST":
                response = UP
            else:
                payload = self._gate.open(query, request.body)          # 403
                message = parse(payload)                                # 400
                message.key = self._dedup_key(message)                  # 503
                if self._claims.claim(message.key):                     # 503
                    confirm = self._submit_claimed(message, payload)    # 503
                    response = ACCEPTED
                else:
                    response = REPEATED
        except PushError as error:
            response = self._refuse(error)
            too_soon = isinstance(error, BeingTaken)
        return _Decision(response, message, confirm, too_soon, started)

    def _submit_claimed(self, message: Message, payload: bytes) -> Confirm:
        """Hand the message over; one that could not be handed over leaves no claim."""
        confirm = None
        try:
            confirm = self._submit(message, payload)
        finally:
            if confirm is None:
                self._claims.release(message.key)
        return confirm

    def _conclude(self, decision: _Decision) -> Response:
        """Answer ``success`` only when the message is safe."""
        response, message, confirm, _, started = decision
        if message and confirm:
            try:
                self._confirm(message.key, confirm)
            except Busy as error:
                response = self._refuse(error)
        self._record(response, message, started)
        return response

    def _confirm(self, key: str, confirm: Confirm) -> None:
        safe = False
        try:
            confirm()
            safe = True
        finally:
            if not safe:
                self._claims.release(key)
        self._claims.accept(key)

    def refuse_unread(self, error: PushError) -> Response:
        """The answer to what could not even be read as a request."""
        response = self._refuse(error)
        self._record(response, None, self._timer())
        return response

    def _refuse(self, error: PushError) -> Response:
        """The answer that an error stands for; its advice goes to the log, at most once a minute."""
        last = self._advised.get(error.advice, -ADVICE_INTERVAL)
        if error.advice and self._timer() - last >= ADVICE_INTERVAL:
            self._advised[error.advice] = self._timer()
            log.warning("push refused: %s; %s", error, error.advice)
        public = str(error) if error.public is None else error.public
        return Response(error.status, public.encode() + b"\n", f"refused {error.status}: {error}", error.headers)

    def _admit(self, request: Request) -> None:
        if self.settings.path and request.path != self.settings.path:
            raise UnknownPath("no such path")
        if request.method not in ("POST", "GET", "HEAD"):
            raise MethodNotAllowed("pushes come by POST")
        if len(request.body) > self.settings.max_body:
            raise PushTooLarge(f"more than {self.settings.max_body} bytes")

    def _record(self, response: Response, message: Optional[Message], started: float) -> None:
        if response is UP:
            return
        if self._observe:
            self._observe(response, message, self._timer() - started)
        if log.isEnabledFor(logging.INFO):
            kind, key = (message.msg_type, message.key) if message else ("-", "-")
            log.info("push type=%(type)s key=%(key)s outcome=%(outcome)s ms=%(ms).2f", {
                "type": ascii(kind[:64])[1:-1], "key": key or "-", "outcome": response.outcome,
                "ms": (self._timer() - started) * 1000})


def make_key(function: Callable[[Message], str], message: Message) -> str:
    """The key that an embedder's own function makes. Raises `Busy` if it fails, or makes what cannot be stored: that
    refuses this push, and no other of its round."""
    keys: List[str] = []
    error = attempt(lambda: keys.append(function(message).encode().decode()))
    if error:
        log.error("dedup_key failed: the push is answered 503; mend the function", exc_info=exc_info_of(error))
        raise Busy("the message has no key")
    return keys[0]


def _parse_form(text: str) -> Dict[str, str]:
    """Form-encoded text, a character for each byte that came, as a dict; of a name that stands twice, the last.
    Bytes that are not UTF-8 survive `_echo`."""
    if "%" not in text and "+" not in text and text.isascii():  # as in every signed push: parse_qsl takes 3 us longer
        return {name: value for name, _, value in (pair.partition("=") for pair in text.split("&"))}
    text = text.encode("latin-1", "replace").decode("ascii", "surrogateescape")
    return dict(parse_qsl(text, keep_blank_values=True, errors="surrogateescape"))


def _lower_signature(outer: Mapping[str, Any]) -> Dict[str, str]:
    """The signature's values in an envelope that carries them itself, under the names that a query gives them."""
    names = {"msg_signature": "MsgSignature", "timestamp": "TimeStamp", "nonce": "Nonce"}
    return {name: str(outer.get(wire_name, "")) for name, wire_name in names.items()}


def _find_handshake(query: Dict[str, str], body: bytes) -> Optional[Dict[str, str]]:
    """The four values of a handshake, from the query or from a form-encoded body; None if this is none."""
    if not query.keys().isdisjoint(_ECHO_NAMES):
        return query
    if len(body) > MAX_HANDSHAKE or b"echo" not in body or body.lstrip()[:1] in (b"<", b"{", b"\xef"):
        return None
    form = _parse_form(body.decode("latin-1").strip(BLANKS))
    return None if form.keys().isdisjoint(_ECHO_NAMES) else {**query, **form}


def _echo(handshake: Mapping[str, str]) -> bytes:
    return next(handshake[name] for name in _ECHO_NAMES if name in handshake).encode("utf-8", "surrogateescape")


# ---- 9 Metrics ------------------------------------------------------------------------------------------------------
# Law: counts what happens, and says it in the Prometheus text format. Is told, and never asks; label values come from a
# fixed set, so that nobody outside can make them many.

# Seconds that part the answers' histogram, around the platform's 2 s, and the handlers'.
ANSWER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
HANDLER_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
# The types that get a label of their own; "other" is all the rest, and "-" what was no message.
LABELLED_TYPES = frozenset(("text", "image", "event", "ticket", "-"))


class Sample(NamedTuple):
    """One metric without labels: what it is called, what it counts, and how much; ``kind`` is gauge or counter."""

    name: str
    text: str
    value: float
    kind: str = "gauge"


class Histogram:
    """How long something took, in seconds, sorted into buckets. Not safe to use from several threads."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one more."""
        self._counts[bisect.bisect_left(self._bounds, seconds)] += 1
        self._sum += seconds

    def render(self, name: str, text: str) -> List[str]:
        """The lines that tell it."""
        lines, total = [f"# HELP {name} {text}", f"# TYPE {name} histogram"], 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*lines, f"{name}_sum {self._sum:.6f}", f"{name}_count {total}"]


class Metrics:
    """What has happened since the start. Safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards all below
        self._pushes: Counter[Tuple[str, str, int]] = Counter()
        self._events: Counter[str] = Counter()
        self._answers = Histogram(ANSWER_BUCKETS)
        self._handlers = Histogram(HANDLER_BUCKETS)

    def push(self, response: Response, message: Optional[Message], seconds: float) -> None:
        """A push was answered, after so many seconds."""
        msg_type = message.msg_type if message else "-"
        kind = msg_type if msg_type in LABELLED_TYPES else "other"
        outcome = response.outcome.partition(" ")[0]
        with self._lock:
            self._pushes[outcome, kind, response.status] += 1
            self._answers.add(seconds)

    def handler(self, seconds: float) -> None:
        """A handler has run for so many seconds, well or not."""
        with self._lock:
            self._handlers.add(seconds)

    def count(self, event: str) -> None:
        """One of EVENTS has happened."""
        with self._lock:
            self._events[event] += 1

    def render(self, samples: Iterable[Sample]) -> str:
        """Everything, and the samples, in the Prometheus text format, version 0.0.4."""
        with self._lock:
            lines = ["# HELP kfserver_pushes_total Pushes answered.", "# TYPE kfserver_pushes_total counter"]
            for (outcome, kind, status), count in sorted(self._pushes.items()):
                labels = f'outcome="{outcome}",status="{status}",type="{kind}"'
                lines.append(f"kfserver_pushes_total{{{labels}}} {count}")
            lines += self._answers.render("kfserver_answer_seconds", "From taking a push up to its answer.")
            lines += self._handlers.render("kfserver_handler_seconds", "Duration of one run of a handler.")
            counted = [Sample(f"kfserver_{event}_total", text, self._events[event], "counter")
                       for event, text in EVENTS.items()]
        for sample in (*counted, *samples):
            lines += [f"# HELP {sample.name} {sample.text}", f"# TYPE {sample.name} {sample.kind}",
                      f"{sample.name} {sample.value if sample.value % 1 else int(sample.value)}"]
        return "\n".join(lines) + "\n"


EVENTS: Mapping[str, str] = MappingProxyType({
    "handler_retries": "Runs of a handler that failed and were tried again.",
    "messages_failed": "Messages whose last try failed.",
    "replies_sent": "Replies that the send API took.",
    "replies_failed": "Replies that did not reach the user."})


class AdminEndpoint:
    """Answers a monitor's requests: /healthz and /metrics. ``trouble`` says what is wrong, or nothing."""

    def __init__(self, render: Callable[[], str], trouble: Callable[[], str]) -> None:
        self._render = render
        self._trouble = trouble

    def handle(self, request: Request) -> Response:
        """The answer to one request."""
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET here\n", "refused", (("Allow", "GET, HEAD"),))
        if request.path == "/healthz":
            trouble = self._trouble()
            return Response(503 if trouble else 200, (trouble or "ok").encode() + b"\n", "health")
        if request.path == "/metrics":
            return Response(200, self._render().encode(), "metrics")
        return Response(404, b"/healthz and /metrics are here\n", "refused")

    def handle_all(self, requests: Sequence[Request]) -> List[Response]:
        """The answers to several requests."""
        return [self.handle(request) for request in requests]

    def refuse_unread(self, error: PushError) -> Response:
        """The answer to what could not even be read as a request."""
        return Response(error.status, str(error).encode() + b"\n", "refused", error.headers)


# ---- 10 Threads -----------------------------------------------------------------------------------------------------
# Law: when and on which thread something runs, never what. Threads here are daemons: the process decides when it ends.

# Seconds a thread without work is kept for the next job.
KEEP_THREAD = 5.0

Job = Callable[[], None]


class ThreadCache:
    """Runs each job at once on a thread of its own, and keeps threads that are through for the jobs to come."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _spare
        self._spare = 0  # threads that wait for a job, less the jobs on their way to them

    def run(self, job: Job) -> None:
        """Start ``job`` on a kept thread, or on a new one if none is spare."""
        with self._lock:
            kept = self._spare > 0
            self._spare -= kept
        if not kept:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        self._jobs.put(job)

    def _work(self) -> None:
        job = self._wait_for_job()
        while job:
            job()
            del job  # or it would be kept alive, with all that it holds, while this thread waits
            with self._lock:
                self._spare += 1
            job = self._wait_for_job()

    def _wait_for_job(self) -> Optional[Job]:
        """A job for this thread, or None when there has been none for so long that it may leave."""
        while True:
            try:
                return self._jobs.get(timeout=KEEP_THREAD)
            except queue.Empty:
                with self._lock:
                    if self._spare:  # else a job is on its way to this thread
                        self._spare -= 1
                        return None


class Alarm:
    """Runs jobs later, on a thread that is there only while something is due. The jobs must be short."""

    def __init__(self) -> None:
        self._due = sched.scheduler(time.monotonic, self._sleep)
        self._wake = threading.Event()
        self._lock = threading.Lock()  # guards _running, and that nothing is entered while the thread leaves
        self._running = False

    def later(self, seconds: float, job: Job) -> None:
        """Run ``job`` once, ``seconds`` from now."""
        with self._lock:
            self._due.enter(seconds, 0, guard, (job,))
            if not self._running:
                with contextlib.suppress(RuntimeError):  # no thread to spare: the next call tries again
                    threading.Thread(target=self._work, name="kfserver-alarm", daemon=True).start()
                    self._running = True
        self._wake.set()

    def _sleep(self, seconds: float) -> None:
        self._wake.wait(seconds)
        self._wake.clear()

    def _work(self) -> None:
        while True:
            self._due.run()
            with self._lock:
                if self._due.empty():
                    self._running = False
                    return


# ---- 11 Journal -----------------------------------------------------------------------------------------------------
# Law: what was acknowledged survives the process. Keys, bytes and states in and out of one SQLite file; knows nothing
# of what a message means or who handles it.

# Marks a file as ours (SQLite's application_id: "KFsv") and says which layout it has (user_version).
JOURNAL_ID = 0x4B467376
JOURNAL_VERSION = 1
# Seconds to wait for a program that has locked the file: the platform waits 2 s for its answer.
LOCK_SECONDS = 1.0
# Seconds between two looks whether a file that could not be written can be.
LOOK_AGAIN_SECONDS = 1.0
# Finished messages between two clean-ups.
TRIM_EVERY = 1000

WAITING, FINISHED, DEAD = 0, 1, 2

_CREATE = """CREATE TABLE messages (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, state INTEGER NOT NULL,
    tries INTEGER NOT NULL, received REAL NOT NULL, payload BLOB, error TEXT)"""
_ADD = "INSERT OR REPLACE INTO messages (key, state, tries, received, payload) VALUES (?, 0, 0, ?, ?)"
_TRIED = "UPDATE messages SET tries = ? WHERE key = ?"
_FINISH = "UPDATE messages SET state = 1, payload = NULL WHERE key = ?"
# For a message whose row went with a file that was deleted or moved away while the handler was at work.
_REMEMBER = "INSERT INTO messages (key, state, tries, received) VALUES (?, 1, 0, strftime('%s', 'now'))"
_FAIL = "UPDATE messages SET state = 2, tries = tries + 1, error = ? WHERE key = ?"
_TRIM = """DELETE FROM messages WHERE state = 1 AND id <=
    (SELECT id FROM messages WHERE state = 1 ORDER BY id DESC LIMIT 1 OFFSET ?)"""
_SELECT = "SELECT key, tries, received, payload, error FROM messages WHERE state = ? ORDER BY id"
_REQUEUE = "UPDATE messages SET state = 0, tries = 0, error = NULL WHERE state = 2"


class Row(NamedTuple):
    """A message in the journal. ``received`` in Unix seconds; ``payload`` is empty once the message is finished."""

    key: str
    tries: int
    received: float
    payload: bytes
    error: str


class _Entry:
    """One change on its way to the disk. ``then`` is called when it is there; a change without it can wait."""

    __slots__ = ("sql", "values", "then", "written", "error")

    def __init__(self, sql: str, values: Sequence[Any], then: Optional[Callable[[], None]] = None) -> None:
        self.sql, self.values, self.then = sql, values, then
        self.written = False
        self.error: Optional[BaseException] = None


class JournalFile:
    """The SQLite file ``path``, in one process's hands. ``sync`` "normal" outlives the process, "full" a power cut too.

    Raises `SettingsError` for a file that is not ours, is newer than this program, or is in another process's hands;
    later, everything raises one of ``errors``.
    """

    def __init__(self, path: str, sync: str) -> None:
        import sqlite3
        self._path, self._sync = os.path.realpath(path), sync
        self._connect = functools.partial(sqlite3.connect, isolation_level=None, check_same_thread=False,
                                          timeout=LOCK_SECONDS)
        self.errors = (sqlite3.Error, OSError, SettingsError)
        _refuse_foreign_file(self._path)
        self._db = self._guard = self._lock_file()
        try:
            self.open()
            self._db.execute("SELECT 1 FROM messages LIMIT 1")
            found, = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise OSError(found)
        except self.errors as error:
            self.close()
            raise SettingsError(f"cannot use the journal {path}: {error}; "
                                "move it away, or name another --journal") from error

    def _lock_file(self) -> sqlite3.Connection:
        """Hold the right to write until the process ends, however it ends: the system frees the lock."""
        try:
            guard = self._connect(self._path + "-lock", timeout=0)
        except self.errors as error:
            raise SettingsError(f"cannot use the journal {self._path}: {error}; make its folder, and let this user "
                                "write there, or name another --journal") from error
        try:
            guard.execute("BEGIN EXCLUSIVE")
        except self.errors:
            guard.close()
            raise SettingsError(f"the journal {self._path} is in another process's hands: stop that one, "
                                "or name another --journal") from None
        return guard

    def open(self) -> None:
        """Open the file, and make it if there is none."""
        _refuse_foreign_file(self._path)
        self._db = self._connect(self._path)
        if not self._db.execute("PRAGMA application_id").fetchone()[0]:
            # Before the switch to WAL: the head of the file itself must say whose it is from the first moment.
            self._db.execute("BEGIN")
            self._db.execute(_CREATE)
            self._db.execute(f"PRAGMA application_id = {JOURNAL_ID}")
            self._db.execute(f"PRAGMA user_version = {JOURNAL_VERSION}")
            self._db.execute("COMMIT")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {self._sync}")
        self._inode = os.stat(self._path).st_ino

    def change(self, changes: Iterable[Tuple[str, Sequence[Any]]]) -> None:
        """Execute all of the statements, with their values, or none."""
        if os.stat(self._path).st_ino != self._inode:
            raise OSError("the file was deleted or replaced")
        self._db.execute("BEGIN IMMEDIATE")
        for sql, values in changes:
            if not self._db.execute(sql, values).rowcount and sql is _FINISH:
                self._db.execute(_REMEMBER, values)
        self._db.execute("COMMIT")

    def rows(self, state: int) -> List[Row]:
        """The messages in one state, oldest first."""
        return read_rows(self._db, state)

    def finished_keys(self, most: int) -> List[str]:
        """The keys of so many messages that are through, oldest first."""
        found = self._db.execute("SELECT key FROM messages WHERE state = 1 ORDER BY id DESC LIMIT ?", (most,))
        return [key for key, in found][::-1]

    def give_up(self) -> None:
        """Let go of a file that does not work, but not of the right to it."""
        with contextlib.suppress(*self.errors):
            self._db.close()

    def close(self) -> None:
        """Let go of the file."""
        self.give_up()
        self._guard.close()


class Journal:
    """The messages that were acknowledged, in a `JournalFile`; changes that come together share one commit.

    Remembers ``settings.dedup_size`` finished messages. ``later`` runs a job after so many seconds, ``clock`` gives
    Unix seconds.
    """

    def __init__(self, settings: Settings, later: Callable[[float, Job], None],
                 clock: Callable[[], float] = time.time) -> None:
        self._path, self._keep, self._later, self._clock = settings.journal, settings.dedup_size, later, clock
        self._file = JournalFile(settings.journal, settings.journal_sync)
        self._pending: Deque[_Entry] = deque()
        self._turn = threading.Lock()  # guards all below and the file: whoever holds it writes for all who wait
        self._finished = 0  # since the last clean-up
        self._failing = False
        self._looking = False  # whether a look is due
        self._closed = False

    def add(self, key: str, payload: bytes, then: Callable[[], None]) -> Callable[[], None]:
        """Take a message to be written down. What this returns waits until it is safe, with all that was added
        meanwhile, or raises `JournalError`; ``then`` is called when it is safe, in the order of the journal."""
        entry = _Entry(_ADD, (key, self._clock(), payload), then)
        self._pending.append(entry)
        return functools.partial(self._confirm, entry)

    def _confirm(self, entry: _Entry) -> None:
        self._settle(entry)
        if not entry.written:
            raise JournalError("the journal cannot be written") from entry.error

    def tried(self, key: str, tries: int) -> None:
        """The message's handler has failed for the ``tries``-th time, and is to be tried again."""
        self._write(_Entry(_TRIED, (tries, key)))

    def finish(self, key: str) -> None:
        """The message is through, and its content to be forgotten: with the next change, or by `flush`."""
        self._pending.append(_Entry(_FINISH, (key,)))

    def flush(self) -> None:
        """Write what can wait. When the file cannot be written, that is left to the next look at it."""
        with self._turn:
            if self._pending and not self._failing:
                self._write_pending()

    def fail(self, key: str, error: str) -> None:
        """The message's last try has failed; it is kept, with what is known of the error."""
        self._write(_Entry(_FAIL, (error, key)))

    def _write(self, entry: _Entry) -> None:
        self._pending.append(entry)
        self._settle(entry)

    def _settle(self, entry: _Entry) -> None:
        with self._turn:
            if not entry.written and entry.error is None:
                self._write_pending()

    def _write_pending(self) -> None:
        entries = [self._pending.popleft() for _ in range(len(self._pending))]
        if self._closed:
            for entry in entries:
                entry.error = JournalError("closed")
            return
        error = attempt(functools.partial(self._commit, entries))  # whatever it is: the entries are owed an answer
        if error:
            self._recover(entries, error)
            return
        if self._failing:
            self._failing = False
            log.warning("the journal %s is written again", self._path)
        for entry in entries:
            entry.written = True
            if entry.then:
                entry.then()

    def _commit(self, entries: Sequence[_Entry]) -> None:
        if self._failing:
            self._file.open()
        changes: List[Tuple[str, Sequence[Any]]] = [(entry.sql, entry.values) for entry in entries]
        self._finished += sum(entry.sql is _FINISH for entry in entries)
        if self._finished >= TRIM_EVERY:
            changes.append((_TRIM, (self._keep,)))
            self._finished = 0
        self._file.change(changes)

    def _recover(self, entries: Sequence[_Entry], error: BaseException) -> None:
        """Nothing of the entries is on the disk: new messages are refused, and what became of old ones is kept to be
        written with the next change, when the file is opened anew."""
        known = isinstance(error, self._file.errors)
        if not self._failing:
            log.error("the journal %s cannot be written: %s; pushes are answered 503 until it can: "
                      "free the disk, or mend its rights, or move the file away", self._path,
                      error if known else describe_error(error))
        self._failing = True
        self._file.give_up()
        for entry in entries:
            entry.error = error
        # The key of a finished message has been stored before: it is not what an unforeseen error is about.
        kept = [_Entry(entry.sql, entry.values) for entry in entries
                if not entry.then and (known or entry.sql is _FINISH)]
        self._pending.extendleft(reversed(kept))
        self._look_later()

    def _look_later(self) -> None:
        if not self._looking:
            self._looking = True
            self._later(LOOK_AGAIN_SECONDS, self._look_again)

    def _look_again(self) -> None:
        """Write what is pending, or nothing, if the file can be written again though no message comes."""
        with self._turn:
            self._looking = False
            if self._failing and not self._closed:
                self._write_pending()

    @property
    def healthy(self) -> bool:
        """Whether the last change could be written."""
        return not self._failing

    def waiting(self) -> List[Row]:
        """The messages that are not through, oldest first."""
        return self._file.rows(WAITING)

    def finished_keys(self) -> List[str]:
        """The keys of what is through, oldest first, as many as are remembered."""
        return self._file.finished_keys(self._keep)

    def close(self) -> None:
        """Write what is pending and let go of the file."""
        with self._turn:
            if self._pending:
                self._write_pending()
            self._closed = True
            self._file.close()


def read_rows(db: sqlite3.Connection, state: int) -> List[Row]:
    """The messages in one state, oldest first."""
    found = db.execute(_SELECT, (state,))
    return [Row(key, tries, received, payload or b"", error or "") for key, tries, received, payload, error in found]


def _refuse_foreign_file(path: str) -> None:
    """Look at the head of the file (SQLite's file format, section 1.3) before SQLite touches it."""
    try:
        with open(path, "rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return
    except OSError as error:
        raise SettingsError(f"cannot read the journal {path}: {error.strerror}; name another --journal") from error
    if not head:
        return
    if not head.startswith(b"SQLite format 3\0") or int.from_bytes(head[68:72], "big") != JOURNAL_ID:
        raise SettingsError(f"{path} is no journal of kfserver, and was left as it is: name another --journal")
    if int.from_bytes(head[60:64], "big") > JOURNAL_VERSION:
        raise SettingsError(f"the journal {path} was written by a newer kfserver, and was left as it is: use that one")


# ---- 12 Shared claims -----------------------------------------------------------------------------------------------
# Law: several instances claim as one, through Redis. Works like a `ClaimCache`, and is one when Redis is away.

# Milliseconds that a claim lives without being renewed, and that a finished message is remembered.
CLAIM_MS = 60 * 1000
FINISHED_MS = 24 * 60 * 60 * 1000
# Seconds between two renewals of the claims in hand, to be answered by Redis, and to leave it alone when it was not.
RENEW_SECONDS = 20.0
# Claims renewed at once: some milliseconds, in which none can be let go.
RENEW_BATCH = 100
REDIS_TIMEOUT = 0.1
REDIS_PAUSE = 1.0

# Only who has the claim may give it back: it may have run out meanwhile, and be another instance's.
# A key's value is the owner's name, with "+" before it once the message is accepted.
_OURS = "local value = redis.call('get', KEYS[1]); local ours = value == ARGV[1] or value == '+' .. ARGV[1]; "
_RELEASE = _OURS + "if ours then redis.call('del', KEYS[1]) end"
_ACCEPT = _OURS + "if value == ARGV[1] then redis.call('set', KEYS[1], '+' .. ARGV[1], 'PX', ARGV[2]) end"
_RENEW = _OURS + """if ours then redis.call('pexpire', KEYS[1], ARGV[2])
    elseif not value then redis.call('set', KEYS[1], '+' .. ARGV[1], 'PX', ARGV[2]) end"""


class SharedClaims:
    """`ClaimCache`'s methods over Redis at ``url``: a claim is one SET NX PX, renewed while the message is in hand.

    ``local`` decides first, and alone when Redis is away or slower than 100 ms. ``later`` runs a job after so many
    seconds; ``timer`` gives seconds from anywhere. Raises `SettingsError` without the package, or for a bad address.
    """

    def __init__(self, url: str, local: ClaimCache, later: Callable[[float, Job], None],
                 timer: Callable[[], float] = time.monotonic) -> None:
        self._local, self._later, self._timer = local, later, timer
        self._redis, self._error = connect_redis(url)
        self._owner = uuid.uuid4().hex
        self._lock = threading.Lock()  # guards the two below, and that nothing is let go while it is renewed
        self._held: Set[str] = set()
        self._renewing = False
        self._away_until = 0.0  # by the timer; 0 when Redis answers

    def claim(self, key: str) -> bool:
        """True for exactly one caller on all instances; False for a repeat. Raises `Busy` as a `ClaimCache` does."""
        if not self._local.claim(key):
            return False
        if self._ask(lambda: self._redis.set(_name(key), self._owner, nx=True, px=CLAIM_MS), True):
            self._hold(key)
            return True
        self._local.release(key)
        if (self._ask(lambda: self._redis.get(_name(key)), b"") or b"").startswith(b"+"):
            return False
        raise BeingTaken("another instance is just taking the same message")

    def __len__(self) -> int:
        return len(self._local)

    def accept(self, key: str) -> None:
        """The claimed message is safe."""
        self._local.accept(key)
        self._ask(lambda: self._redis.eval(_ACCEPT, 1, _name(key), self._owner, CLAIM_MS), None)

    def finish(self, key: str) -> None:
        """The message is through: remembered by all instances for a day."""
        self._local.finish(key)
        self._let_go(key)
        self._ask(lambda: self._redis.set(_name(key), "+" + self._owner, px=FINISHED_MS), None)

    def release(self, key: str) -> None:
        """The message was refused, or failed for good: the same push may come again, to any instance."""
        self._local.release(key)
        self._let_go(key)
        self._ask(lambda: self._redis.eval(_RELEASE, 1, _name(key), self._owner), None)

    def remember(self, key: str) -> None:
        """The message was finished before a restart; Redis remembers that for itself."""
        self._local.finish(key)

    def restore(self, key: str) -> None:
        """The message was accepted before a restart, and is in hand again."""
        self._local.restore(key)
        self._ask(lambda: self._redis.set(_name(key), "+" + self._owner, px=CLAIM_MS), None)
        self._hold(key)

    def _hold(self, key: str) -> None:
        with self._lock:
            self._held.add(key)
            start = not self._renewing
            self._renewing = True
        if start:
            self._later(RENEW_SECONDS, self._renew)

    def _let_go(self, key: str) -> None:
        with self._lock:
            self._held.discard(key)

    def _renew(self) -> None:
        with self._lock:
            keys = list(self._held)
            self._renewing = bool(keys)
        for first in range(0, len(keys), RENEW_BATCH):
            with self._lock:
                self._ask(functools.partial(self._renew_all, keys[first:first + RENEW_BATCH]), None)
        if keys:
            self._later(RENEW_SECONDS, self._renew)

    def _renew_all(self, keys: Sequence[str]) -> None:
        pipeline = self._redis.pipeline(transaction=False)
        for key in self._held.intersection(keys):
            pipeline.eval(_RENEW, 1, _name(key), self._owner, CLAIM_MS)
        pipeline.execute()

    def _ask(self, command: Callable[[], Any], otherwise: Any) -> Any:
        """What Redis answers; ``otherwise`` while it is away. It is asked again after a pause."""
        if self._timer() < self._away_until:
            return otherwise
        try:
            answer = command()
        except self._error as error:
            self._went_away(error)
            return otherwise
        if self._away_until:
            self._away_until = 0.0
            log.warning("Redis is back: instances share their claims again")
        return answer

    def _went_away(self, error: BaseException) -> None:
        first = not self._away_until  # two threads may find out at once, and both tell
        self._away_until = self._timer() + REDIS_PAUSE
        if first:
            log.warning("Redis is away (%s): this instance drops only the repeats that it has seen itself; "
                        "check the server behind --redis", type(error).__name__)


def _name(key: str) -> str:
    return "kfserver:" + key


def connect_redis(url: str) -> Tuple[Any, Type[Exception]]:
    """A client that gives up soon and never tries again by itself, and the class of its errors."""
    try:
        import redis  # type: ignore[import]
    except ImportError:
        raise SettingsError("--redis (KF_REDIS) needs the redis package: pip install redis") from None
    try:
        client = redis.Redis.from_url(url, socket_timeout=REDIS_TIMEOUT, socket_connect_timeout=REDIS_TIMEOUT,
                                      retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
        client.connection_pool.make_connection()  # it connects later, and knows its options now
    except (ValueError, TypeError):  # whose texts may hold a part of the password
        raise SettingsError("--redis (KF_REDIS) takes an address like redis://127.0.0.1:6379/0, "
                            "a password in it percent-encoded") from None
    return client, redis.RedisError


# ---- 13 Replies -----------------------------------------------------------------------------------------------------
# Law: what handlers return goes to the user through the platform's send API. Knows nothing of registries and threads;
# whoever sends waits here until the platform has the reply, or until it is clear that it will not.

# Replies that the platform allows to one message of the user.
QUOTA = 5
# Seconds for the platform to take a request and to answer it.
SEND_TIMEOUT = 5.0
# Seconds before the further tries of a request that met a network error, each shortened at random by up to half, so
# that many workers do not come back in step.
SEND_DELAYS = (0.5, 2.0, 8.0)
# Seconds before its end at which a token is not used any more.
TOKEN_MARGIN = 60.0
# Bytes of an answer that are read: real ones have about 300.
MAX_ANSWER = 64 * 1024

TOKEN_PATH = "/oauth/2.0/token"
SEND_PATH = "/rest/2.0/smartapp/message/custom/send"
THIRD_PARTY_SEND_PATH = "/rest/2.0/smartapp/message/custom/sendbytp"

# The gateway's numbers for a token that is invalid or expired: with a new one the same request goes through.
_TOKEN_ERRORS = ("110", "111")
_API_ADVICE: Mapping[str, str] = MappingProxyType({
    "3001": "a parameter is wrong: mostly an empty text, or a picture's address that is no https URL",
    "30022": "the openid is not of this app: check that --app-key belongs to the app that the message came to",
    "90001": "over the quota: five replies to each message of the user, within 48 hours of it",
    "90002": "customer service is not enabled: enable it in the platform's console",
    "110": "the access token is invalid: check --access-token, or use --app-key and --app-secret instead",
    "111": "the access token has expired: renew --access-token, or use --app-key and --app-secret instead",
    "invalid_client": "check --app-key and --app-secret against the platform's console"})


class ApiError(ReplyError):
    """The send API refused. ``number`` is its errno or error_code as text; the message says why and what to do."""

    def __init__(self, number: str, words: str) -> None:
        advice = _API_ADVICE.get(number, "see the platform's page on the send API")
        super().__init__(f"the send API answered {number} ({words}): {advice}")
        self.number = number


class HttpClient:
    """JSON over HTTP from one server, on connections that are kept: as many as requests are under way at once."""

    def __init__(self, base: str) -> None:
        parts = urlsplit(base)
        self._host, self._prefix = parts.netloc, parts.path.rstrip("/")
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._kept: Deque[http.client.HTTPConnection] = deque()
        self._closed = False

    def exchange(self, method: str, path: str, form: str = "") -> Tuple[int, Any]:
        """One request and its answer: the status and the JSON value. Raises OSError and HTTPException."""
        connection = self._take_kept() or self._connect()
        try:
            connection.request(method, self._prefix + path, form or None,
                               {"Content-Type": "application/x-www-form-urlencoded"} if form else {})
            response = connection.getresponse()
            text = response.read(MAX_ANSWER)
            if response.length and len(text) < MAX_ANSWER:
                raise http.client.IncompleteRead(text, response.length)
        except BaseException:
            connection.close()
            raise
        if response.isclosed() and not response.will_close:
            self._kept.append(connection)
        else:
            connection.close()
        if self._closed:
            self.close()
        return response.status, _json_or_none(text)

    def _take_kept(self) -> Optional[http.client.HTTPConnection]:
        """A kept connection on which the server has said nothing since: what it says unasked is farewell."""
        while self._kept:
            with contextlib.suppress(IndexError):  # another thread may take the last
                connection = self._kept.pop()
                if not _is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def _connect(self) -> http.client.HTTPConnection:
        if self._context:
            return http.client.HTTPSConnection(self._host, timeout=SEND_TIMEOUT, context=self._context)
        return http.client.HTTPConnection(self._host, timeout=SEND_TIMEOUT)

    def close(self) -> None:
        """Close the connections that are kept, and those in use when they are free."""
        self._closed = True
        with contextlib.suppress(IndexError):  # two threads may be here
            while True:
                self._kept.pop().close()


def _is_readable(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def _json_or_none(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError):
        return None


class SendApi:
    """The platform's send API, with the app's own access token. Safe to use from any thread.

    ``rest`` waits so many seconds between tries, ``clock`` gives Unix seconds, ``random`` a number from 0 to 1.
    """

    def __init__(self, settings: Settings, rest: Callable[[float], object] = time.sleep,
                 clock: Callable[[], float] = time.time, random: Callable[[], float] = random.random) -> None:
        self._settings = settings
        self._client = HttpClient(settings.api_base)
        self._rest, self._clock, self._random = rest, clock, random
        self._lock = threading.Lock()  # guards the two below, and that only one thread fetches a token
        self._token = settings.access_token
        self._expires = float("inf") if settings.access_token else 0.0

    def send_text(self, open_id: str, text: str) -> None:
        """Send a text to the user. Raises `ApiError` when the platform refuses, `NetworkError` when it is away."""
        self._send({"open_id": open_id, "msg_type": "text", "content": text, "pic_url": ""})

    def send_image(self, open_id: str, url: str) -> None:
        """Send the picture at ``url`` to the user. Raises as `send_text` does."""
        self._send({"open_id": open_id, "msg_type": "image", "content": "", "pic_url": url})

    def close(self) -> None:
        """Close the connections that are kept."""
        self._client.close()

    def _send(self, fields: Dict[str, str]) -> None:
        form = urlencode({"user_type": self._settings.user_type, **fields}, errors="replace")
        token = self._current_token()
        number, words = self._post(token, form)
        if number in _TOKEN_ERRORS and not self._settings.access_token:
            number, words = self._post(self._renewed_token(token), form)
        if number != "0":
            raise ApiError(number, words)

    def _post(self, token: str, form: str) -> Tuple[str, str]:
        """The platform's number and words for one reply; the number of success is 0."""
        path = THIRD_PARTY_SEND_PATH if self._settings.third_party else SEND_PATH
        answer = self._ask("POST", f"{path}?{urlencode({'access_token': token})}", form)
        number = answer.get("error_code", answer.get("errno", "no errno"))
        return self._clean(number, token), self._clean(answer.get("error_msg") or answer.get("msg") or "", token)

    def _current_token(self) -> str:
        with self._lock:
            if self._clock() >= self._expires:
                self._fetch_token()
            return self._token

    def _renewed_token(self, refused: str) -> str:
        with self._lock:
            if self._token == refused:  # else another thread has fetched a new one meanwhile
                self._fetch_token()
            return self._token

    def _fetch_token(self) -> None:
        answer = self._ask("GET", TOKEN_PATH + "?" + urlencode({
            "grant_type": "client_credentials", "client_id": self._settings.app_key,
            "client_secret": self._settings.app_secret, "scope": "smartapp_snsapi_base"}))
        if not (isinstance(answer.get("access_token"), str) and answer["access_token"]):
            number = answer.get("error") or answer.get("error_code") or "no access_token"
            words = answer.get("error_description") or answer.get("error_msg") or ""
            raise ApiError(self._clean(number), self._clean(words))
        self._token = answer["access_token"]
        self._expires = self._clock() + _seconds(answer.get("expires_in")) - TOKEN_MARGIN

    def _ask(self, method: str, path: str, form: str = "") -> Dict[str, Any]:
        """The JSON object that the platform answers; network errors and 5xx are tried again, after a while."""
        for delay in (*SEND_DELAYS, None):
            try:
                status, answer = self._client.exchange(method, path, form)
                problem = f"status {status}"
                if status < 500:
                    break
            except (OSError, http.client.HTTPException) as error:
                problem = type(error).__name__
            if delay is None:
                raise NetworkError(f"the send API was tried {len(SEND_DELAYS) + 1} times, at last: {problem}; "
                                   "the network or the platform is down, or --api-base is wrong") from None
            self._rest(delay * (1 - self._random() / 2))
        if 300 <= status < 400:
            raise NetworkError(f"the send API redirects (status {status}), which is not followed: correct --api-base")
        if not isinstance(answer, dict):
            raise NetworkError(f"the send API answered no JSON object (status {status}): correct --api-base")
        return answer

    def _clean(self, words: object, token: str = "") -> str:
        """Words of the platform, fit for a log: without secrets, short, and in one line."""
        text = str(words)
        for secret in (token, self._token, self._settings.app_secret, self._settings.app_key):
            text = text.replace(secret, "…") if secret else text
        return printable(" ".join(text[:200].split()))


def _seconds(value: object) -> float:
    """A lifetime as the platform tells it, as a number or text; 0 for what is neither."""
    try:
        seconds = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 0.0
    except OverflowError:
        return float("inf")
    return seconds if seconds > 0 else 0.0  # neither is "not a number"


def list_answers(answers: Answers) -> List[Answer]:
    """What a handler returned, as a list without empty texts. Raises `HandlerError` for what cannot be sent."""
    listed = list(answers) if isinstance(answers, (list, tuple)) and not isinstance(answers, Image) else [answers]
    for answer in listed:
        if not (answer is None or isinstance(answer, (str, Image))):
            raise HandlerError("a handler returns None, a text, Image(url) or a list of these, "
                               f"not {type(answer).__name__}")
    return [answer for answer in listed if answer]


class Outbox:
    """The way back to the sender of one message: in order, and never more than QUOTA replies however they are made.

    ``count`` is told what became of each, by its name in the metrics.
    """

    def __init__(self, api: Optional[SendApi], message: Message, count: Callable[[str], object] = len) -> None:
        self._api = api
        # The message itself is not kept: each would hold the other, until the garbage collector comes by.
        self._openid = message.from_user_name
        self._key = message.key
        self._count = count
        self._left = QUOTA

    def __call__(self, answers: Answers) -> None:
        """Send the answers, one after the other. Raises `HandlerError` above the quota, before any is sent."""
        listed = list_answers(answers)
        if len(listed) > self._left:
            raise HandlerError(f"the platform takes {QUOTA} replies to one message, and there are more: join some")
        for answer in listed:
            self._left -= 1
            try:
                self._send(answer)
            except ReplyError:
                self._count("replies_failed")
                raise

    def _send(self, answer: Answer) -> None:
        if self._api is None:
            log.warning("reply not sent: key=%s; set --app-key and --app-secret, or --access-token", self._key)
            return
        if isinstance(answer, Image):
            self._api.send_image(self._openid, answer.url)
        else:
            self._api.send_text(self._openid, answer)
        self._count("replies_sent")


# ---- 14 Dispatcher --------------------------------------------------------------------------------------------------
# Law: a sender's messages one at a time and in order, different senders beside each other. Knows nothing of HTTP, nor
# of what a message is for: the work is handed in.

class Work(NamedTuple):
    """What is done with a message. ``run`` may raise; ``tried`` then gets the number of tries so far, if another will
    follow; ``settle`` gets the last error, or None. ``flush`` is called behind one or more that are settled."""

    run: Callable[[Message], None]
    tried: Callable[[Message, int], None]
    settle: Callable[[Message, Optional[BaseException]], None]
    flush: Callable[[], None]


class _Job:
    """A message and how often its handler has failed."""

    __slots__ = ("message", "sender", "since", "tries")

    def __init__(self, message: Message, tries: int) -> None:
        self.message = message
        self.sender = (message.to_user_name, message.from_user_name)
        self.tries = tries
        self.since = time.monotonic()


_Mailbox = Deque[_Job]  # the messages of one sender, the first of them in hand


class _Mailboxes:
    """The mailboxes of all senders. One is ready, in a worker's hands, or parked until its next try; an empty one is
    not kept. Not safe to use from several threads: the dispatcher's lock guards it."""

    def __init__(self) -> None:
        self._by_sender: Dict[Tuple[str, str], _Mailbox] = {}
        self.ready: Deque[_Mailbox] = deque()

    def __len__(self) -> int:
        return len(self._by_sender)

    def add(self, job: _Job) -> None:
        """Put the job behind its sender's others; a mailbox that was empty becomes ready."""
        mailbox = self._by_sender.get(job.sender)
        if mailbox:
            mailbox.append(job)
            return
        mailbox = self._by_sender[job.sender] = deque((job,))
        self.ready.append(mailbox)

    def advance(self, mailbox: _Mailbox) -> None:
        """The first message of a mailbox is through: it is ready for the next, or empty."""
        job = mailbox.popleft()
        if mailbox:
            self.ready.append(mailbox)
        else:
            del self._by_sender[job.sender]

    def oldest(self) -> Optional[float]:
        """When the message that is longest not through was taken, by the monotonic clock; None if all are."""
        return min((mailbox[0].since for mailbox in self._by_sender.values()), default=None)

    def keys(self) -> List[str]:
        """The keys of all messages that are not through."""
        return [job.message.key for mailbox in self._by_sender.values() for job in mailbox]


class Dispatcher:
    """Runs the work for each message on up to ``settings.workers`` threads; ``later`` runs a job after some seconds."""

    def __init__(self, settings: Settings, work: Work, later: Callable[[float, Job], None]) -> None:
        self._settings = settings
        self._work = work
        self._later = later
        self._threads = ThreadCache("kfserver-worker")
        self._lock = threading.Lock()  # guards all below
        self._empty = threading.Condition(self._lock)  # told when the last mailbox is emptied
        self._mailboxes = _Mailboxes()
        self._open = 0  # messages taken and not settled
        self._busy = 0  # workers called or at work
        self._called = False  # whether a worker is on its way
        self._closed = False

    def reserve(self) -> None:
        """Keep a place in the queue for a message that `post` will bring, or `cancel` will not. Raises `Busy`."""
        with self._lock:
            if self._closed:
                raise Busy("shutting down")
            if self._open - self._busy >= self._settings.queue_size:
                raise Busy("the queue is full", "handlers are slower than messages come: raise --workers or "
                           "--queue-size, or make the handlers faster")
            self._open += 1

    def cancel(self) -> None:
        """Give a reserved place back."""
        with self._lock:
            self._open -= 1

    def post(self, message: Message) -> None:
        """Put a message into the place that was reserved for it; `wake` sees to it that a worker comes."""
        with self._lock:
            self._mailboxes.add(_Job(message, 0))

    def wake(self) -> None:
        """Call a worker if there is something to do. Apart from `post`, because once is enough for many messages."""
        if self._mailboxes.ready and not self._called:
            with self._lock:
                self._call_worker()

    def restore(self, message: Message, tries: int) -> None:
        """Take a message that was accepted before a restart, full or not, after so many failed tries; then `wake`."""
        with self._lock:
            self._open += 1
            self._mailboxes.add(_Job(message, tries))

    def _call_worker(self) -> None:
        """See to it that a worker comes for what is ready. One is called at a time, and calls the next when it has
        taken a mailbox: under load it finds many, where a call for each would be a change of threads for each."""
        if self._mailboxes.ready and not self._called and self._busy < self._settings.workers:
            try:
                self._threads.run(self._serve)
            except RuntimeError as error:  # the system has no more threads; those that run go on
                log.error("no thread for a worker: %s; lower --workers, or raise the limit of threads", error)
                self._later(1.0, self.wake)
                return
            self._called = True
            self._busy += 1

    def _serve(self) -> None:
        """A worker's life: one message of each mailbox that is ready, until none is."""
        with self._lock:
            self._called = False
        mailbox = self._next_ready()
        while mailbox:
            parked = self._serve_one(mailbox)
            if not parked:
                self._advance(mailbox)
            mailbox = self._next_ready()

    def _serve_one(self, mailbox: _Mailbox) -> bool:
        """Try the mailbox's first message; whether it is parked, to be tried again."""
        job = mailbox[0]
        error = attempt(functools.partial(self._work.run, job.message))
        if error and job.tries + 1 < self._settings.tries and not isinstance(error, KfError):
            self._park(mailbox, job, error)
            return True
        guard(functools.partial(self._work.settle, job.message, error))
        return False

    def _park(self, mailbox: _Mailbox, job: _Job, error: BaseException) -> None:
        """Leave the mailbox alone for 1 s, then 4 s, 16 s…: what failed by outage or overload needs time."""
        seconds = 4.0 ** job.tries
        job.tries += 1
        guard(lambda: self._work.tried(job.message, job.tries))
        log.warning("handler failed: key=%s try=%d of %d, %s; again in %d s", job.message.key, job.tries,
                    self._settings.tries, describe_error(error), seconds)
        self._later(seconds, lambda: self._unpark(mailbox))

    def _unpark(self, mailbox: _Mailbox) -> None:
        with self._lock:
            self._mailboxes.ready.append(mailbox)
            self._call_worker()

    def _advance(self, mailbox: _Mailbox) -> None:
        with self._lock:
            self._mailboxes.advance(mailbox)
            self._open -= 1
            if not self._mailboxes:
                self._empty.notify_all()

    def _next_ready(self) -> Optional[_Mailbox]:
        """The mailbox to serve next. What is settled is flushed before, unless a worker is on its way, who will see to
        it: so no message waits for another's handler, and those with quick handlers are flushed together."""
        with self._lock:
            mailbox = self._mailboxes.ready.popleft() if self._mailboxes.ready else None
            if mailbox:
                self._call_worker()
            else:
                self._busy -= 1
            awaited = self._called
        if not awaited:
            guard(self._work.flush)
        return mailbox

    def join(self, seconds: Optional[float] = None) -> bool:
        """Wait until nothing is left to do, for so many seconds at most; whether that was reached."""
        self.wake()
        with self._empty:
            return self._empty.wait_for(lambda: not self._mailboxes, seconds)

    def samples(self) -> List[Sample]:
        """How much there is to do, for the metrics."""
        with self._lock:
            oldest = self._mailboxes.oldest()
            waited = time.monotonic() - oldest if oldest is not None else 0.0
            waiting = max(0, self._open - self._busy)
            return [Sample("kfserver_queue_messages", "Messages that wait for a worker.", waiting),
                    Sample("kfserver_busy_workers", "Workers that run a handler.", self._busy),
                    Sample("kfserver_oldest_seconds", "Age of the oldest message that is not through.", waited)]

    def drain(self, seconds: float) -> List[str]:
        """Take no more messages, finish those that wait, for so many seconds; the keys of what was left undone."""
        with self._lock:
            self._closed = True
        self.join(seconds)
        with self._lock:
            return self._mailboxes.keys()


# ---- 15 HTTP server -------------------------------------------------------------------------------------------------
# Law: bytes in, a `Request`, a `Response`, bytes out. Decides nothing about pushes; it only refuses what is not HTTP,
# what is too slow, and what is too much. Knows nothing of the dispatcher.

# Seconds from a head's first byte to its last, likewise for a body, between two requests of a kept connection, to take
# an answer, and to go on reading from a client that was refused. The platform itself gives up after 2 s.
HEAD_SECONDS = 5.0
BODY_SECONDS = 10.0
IDLE_SECONDS = 15.0
WRITE_SECONDS = 10.0
LINGER_SECONDS = 2.0
# Bytes of a request line and its headers together; nginx takes 8 KiB for each.
MAX_HEAD = 16 * 1024
MAX_HEADERS = 100
# Connections accepted in one go, before those that are open have their turn.
ACCEPT_BURST = 64
# Descriptors kept free for what is no client's connection: logs, handlers' files, the send API.
RESERVED_FILES = 64
# Pieces a chunked body may come in, and the bytes of a line between them: senders of tiny chunks only cost time.
MAX_CHUNKS = 4096
MAX_CHUNK_LINE = 256
# Bytes asked of the system at a time: a push and its head have about 700.
RECEIVE = 64 * 1024

# Systems without Unix sockets get a number that no address family has.
UNIX_FAMILY = getattr(socket, "AF_UNIX", -1)

# RFC 9110, section 5.6.2 (token) and 5.5 (field values); RFC 9112, sections 3 and 5: no blank before the colon, no line
# that continues another, no bare CR, LF or NUL.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_FIELD = _TOKEN + rb":[\t -~\x80-\xff]*\r\n"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!\"$-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n")
_FIELDS = re.compile(rb"(?:" + _FIELD + rb")*")
_FRAMING_FIELD = re.compile(rb"(?im)^(host|content-length|transfer-encoding|connection|expect):(.*)\r$")
_HOST = re.compile(rb"[!$%&'()*+,;=:\[\]._~0-9a-z-]*")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[\t ]*(?:;[\t -~\x80-\xff]*)?")
_NEVER_IN_HEAD = re.compile(rb"(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Framing(NamedTuple):
    """What a head says about where its request ends and what follows. ``length`` is -1 for a chunked body."""

    length: int
    keep_alive: bool
    expects_continue: bool


def parse_framing(block: bytes, minor: int) -> Framing:
    """The framing in a block of header lines of HTTP/1.``minor``; raises `PushError` for all that two readers could
    understand differently, because that is how requests are smuggled (RFC 9112, section 11.2)."""
    if not _FIELDS.fullmatch(block):
        raise MalformedPush("malformed header line")
    if block.count(b"\n") > MAX_HEADERS:
        raise HeadTooLarge(f"more than {MAX_HEADERS} headers")
    found = _find_framing_fields(block)
    hosts = found.get(b"host", ())
    if len(hosts) > 1 or len(hosts) < minor or not all(map(_HOST.fullmatch, hosts)):
        raise MalformedPush("HTTP/1.1 needs exactly one Host header, with a host and maybe a port")
    return Framing(_body_length(found, minor), _keeps_alive(found, minor), _expects_continue(found, minor))


FramingFields = Mapping[bytes, Sequence[bytes]]


def _find_framing_fields(block: bytes) -> FramingFields:
    """The values of the headers that frame a message, in lower case, as often as they stand there."""
    found: Dict[bytes, List[bytes]] = {}
    for name, value in _FRAMING_FIELD.findall(block):
        found.setdefault(name.lower(), []).append(value.strip(b"\t ").lower())
    return found


def _keeps_alive(found: FramingFields, minor: int) -> bool:
    options = {option.strip() for value in found.get(b"connection", ()) for option in value.split(b",")}
    return b"close" not in options and (minor > 0 or b"keep-alive" in options)


def _body_length(found: FramingFields, minor: int) -> int:
    lengths, codings = found.get(b"content-length"), found.get(b"transfer-encoding")
    if codings:
        if lengths or not minor or list(codings) != [b"chunked"]:
            raise MalformedPush("a body is framed by Content-Length or by 'Transfer-Encoding: chunked', never by both")
        return -1
    if not lengths:
        return 0
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
        raise MalformedPush("Content-Length must be one number")
    return int(lengths[0])


def _expects_continue(found: FramingFields, minor: int) -> bool:
    expectations = found.get(b"expect", ())
    if any(value != b"100-continue" for value in expectations):
        raise UnknownExpectation("only 100-continue can be expected")
    return bool(expectations) and minor > 0


class ConnectionTable:
    """The open connections: never more than ``limit``, none longer in a state than its deadline says.

    When all places are taken, the connection that has waited longest for its request to become complete gives way.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.RLock()  # guards all below; taken again when a connection that is sent away leaves
        self._open: Set[Channel] = set()
        self._waiting: OrderedDict[Channel, None] = OrderedDict()  # for the client, longest first

    def __len__(self) -> int:
        return len(self._open)

    def make_room(self) -> bool:
        """See to it that there is a place for one more; False if there is none yet."""
        with self._lock:
            if len(self._open) >= self._limit:
                self.make_way()
            return len(self._open) < self._limit

    def admit(self, handler: Channel) -> None:
        """Take in one more connection, for which there is room."""
        with self._lock:
            self._open.add(handler)
            self._waiting[handler] = None

    def make_way(self) -> bool:
        """Send away the connection that has waited longest; False if there is none."""
        with self._lock:
            while self._waiting:
                handler = next(iter(self._waiting))
                handler.last_look()
                if self._waiting.pop(handler, self) is None:
                    handler.abort()
                    return True
        return False

    def leave(self, handler: Channel) -> None:
        """Forget a connection."""
        with self._lock:
            self._open.discard(handler)
            self._waiting.pop(handler, None)

    def wait(self, handler: Channel) -> None:
        """From now on the client is waited for."""
        with self._lock:
            self._waiting[handler] = None

    def proceed(self, handler: Channel) -> None:
        """The client has done its part, and is not sent away while ours is done."""
        with self._lock:
            self._waiting.pop(handler, None)

    def reap(self) -> None:
        """Send away every client whose time is up."""
        now = time.monotonic()
        for handler in self._snapshot():
            if handler.deadline < now:
                handler.abort()

    def dismiss_idle(self) -> None:
        """Send away every client that is between two requests."""
        for handler in self._snapshot():
            if handler.idle:
                handler.abort()

    def dismiss_all(self) -> None:
        """Send away every client."""
        for handler in self._snapshot():
            handler.abort()

    def _snapshot(self) -> List[Channel]:
        with self._lock:
            return list(self._open)


# What a connection waits for.
IDLE, HEAD, BODY = "idle", "head", "body"
PHASE_SECONDS: Mapping[str, float] = MappingProxyType({IDLE: IDLE_SECONDS, HEAD: HEAD_SECONDS, BODY: BODY_SECONDS})


class Wire:
    """What a client has sent, cut into requests: `feed` bytes, and ask for the `next_body`.

    The reading is written as one straight generator, which stops wherever more bytes are needed. ``understand`` gets
    each head, a request line and header lines with CR LF behind each, and says how the body behind it is framed.
    """

    def __init__(self, understand: Callable[[bytes], Framing], most: int) -> None:
        self._understand = understand
        self._most = most
        self._buffer = bytearray()  # fed and not yet cut
        self._bodies = self._read_bodies()
        self.phase = IDLE

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data
        if self.phase == IDLE:
            self.phase = HEAD  # empty lines, which are then skipped, start the clock too

    def next_body(self) -> Optional[bytes]:
        """The body of the next request that is complete, or None until more is fed. Raises `PushError`, at the end."""
        return next(self._bodies)

    def close(self) -> None:
        """Cut no more; without this, memory would be held until the garbage collector comes by."""
        self._bodies.close()
        self._understand = _understand_nothing

    def _read_bodies(self) -> Generator[Optional[bytes], None, None]:
        while True:
            head = yield from self._read_head()
            framing = self._understand(head)
            if framing.length > self._most:
                raise PushTooLarge(f"more than {self._most} bytes")
            self.phase = BODY
            if framing.length < 0:
                body = yield from self._read_chunks()
            else:
                body = yield from self._take(framing.length)
            self._skip_empty_lines()
            self.phase = HEAD if self._buffer else IDLE
            yield body

    def _skip_empty_lines(self) -> None:
        """Before a request they are ignored (RFC 9112, section 2.2)."""
        if self._buffer[:1] in (b"\r", b"\n"):
            del self._buffer[:len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]

    def _read_head(self) -> Generator[None, None, bytes]:
        self._skip_empty_lines()
        seen, end = 0, self._buffer.find(b"\r\n\r\n")
        while end < 0:
            self._check_unfinished_head(seen)
            seen = len(self._buffer)
            yield None
            self._skip_empty_lines()
            end = self._buffer.find(b"\r\n\r\n", max(0, seen - 3))
        if end > MAX_HEAD:
            raise HeadTooLarge(f"a head of more than {MAX_HEAD} bytes")
        head = bytes(self._buffer[:end + 2])
        del self._buffer[:end + 4]
        return head

    def _check_unfinished_head(self, seen: int) -> None:
        """Look at what came behind ``seen``: to look at all of it again for each byte would cost an attacker little."""
        if len(self._buffer) > MAX_HEAD:
            raise HeadTooLarge(f"a head of more than {MAX_HEAD} bytes")
        if _NEVER_IN_HEAD.search(self._buffer, seen):
            raise MalformedPush("no control characters in a head, and lines end with CR LF")

    def _take(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _take_line(self) -> Generator[None, None, bytes]:
        end = self._buffer.find(b"\r\n")
        while end < 0 and len(self._buffer) <= MAX_CHUNK_LINE:
            yield None
            end = self._buffer.find(b"\r\n")
        if not 0 <= end <= MAX_CHUNK_LINE:
            raise MalformedPush("a line too long between chunks")
        line = yield from self._take(end + 2)
        return line[:-2]

    def _read_chunks(self) -> Generator[None, None, bytes]:
        """A chunked body, joined (RFC 9112, section 7.1); extensions and trailers are checked and dropped."""
        body = bytearray()
        for _ in range(MAX_CHUNKS):
            size = _chunk_size((yield from self._take_line()))
            if not size:
                yield from self._skip_trailers()
                return bytes(body)
            if len(body) + size > self._most:
                raise PushTooLarge(f"more than {self._most} bytes")
            body += yield from self._take(size)
            if (yield from self._take(2)) != b"\r\n":
                raise MalformedPush("a chunk longer than it says")
        raise MalformedPush(f"more than {MAX_CHUNKS} chunks")

    def _skip_trailers(self) -> Generator[None, None, None]:
        for _ in range(MAX_HEADERS):
            line = yield from self._take_line()
            if not line:
                return
            if not _FIELDS.fullmatch(line + b"\r\n"):
                raise MalformedPush("malformed trailer")
        raise HeadTooLarge(f"more than {MAX_HEADERS} trailers")


def _understand_nothing(head: bytes) -> Framing:
    raise MalformedPush("the connection is over")


def _chunk_size(line: bytes) -> int:
    found = _CHUNK_LINE.fullmatch(line)
    if not found:
        raise MalformedPush("malformed chunk size")
    return int(found.group(1), 16)


def _origin_form(method: bytes, target: str) -> str:
    """Path and query of a request target; proxies write it with scheme and host (RFC 9112, section 3.2.2)."""
    if target.startswith("/") or (target == "*" and method == b"OPTIONS"):
        return target
    found = re.fullmatch(r"(?i:https?)://[^/?#]+(/[^?#]*)?(\?[^#]*)?", target)
    if not found:
        raise MalformedPush("malformed request target")
    return (found.group(1) or "/") + (found.group(2) or "")


def list_headers(response: Response) -> List[Tuple[str, str]]:
    """The headers of a response, but for those that are the server's own affair."""
    return [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(response.body))),
            *response.headers]


def encode_answer(response: Response, date: str, connection: str) -> bytes:
    """The response as it is sent. ``connection`` is the header of that name, which is left out where it is empty."""
    headers = [("Date", date), *list_headers(response)]
    if connection:
        headers.append(("Connection", connection))
    lines = [f"HTTP/1.1 {response.status} {http.client.responses[response.status]}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + response.body


class Channel(BaseHTTPRequestHandler):
    """One client's connection: bytes in, bytes out, and whose time is up. Nothing here waits, but for `serve`.

    Names that socketserver and `BaseHTTPRequestHandler` give are kept: ``setup``, ``handle``, ``close_connection``…
    """

    server: PushServer

    def setup(self) -> None:
        """Prepare the connection; called by socketserver before `handle`."""
        self.connection: socket.socket = self.request
        if self.server.address_family != UNIX_FAMILY:
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.deadline = time.monotonic() + HEAD_SECONDS  # of the monotonic clock: when the client's time is up
        self.over = False
        self.watched = False  # by the server's selector
        self.unsent = b""
        self.handed_in: Optional[Request] = None  # complete, and not yet answered
        self.phase = IDLE  # what the client is given time for; empty while it has its part behind it
        self._lingering = False  # what comes is not understood any more

    def handle(self) -> None:
        """Nothing yet: `ready` is called whenever there is something to do, or `serve` does everything."""

    def finish(self) -> None:
        """Nothing to flush: answers are not buffered."""

    @property
    def idle(self) -> bool:
        """Whether the client is between two requests."""
        return self.phase == IDLE and not self.unsent

    def serve(self) -> None:
        """Serve the whole connection on a thread of its own; waits for the client, until `abort` ends that."""
        if self.server.tls is None:
            return
        with contextlib.suppress(OSError):  # plain HTTP, an old version of TLS, or nothing at all
            self.connection = self.server.tls.wrap_socket(self.request, server_side=True, do_handshake_on_connect=False)
            self.connection.do_handshake()
            while not self.over:
                self.receive()
                while self.handed_in:
                    self.answer(self.server.endpoint.handle(self.handed_in))
        self._say_goodbye()

    def _say_goodbye(self) -> None:
        """Send what ends a TLS session (RFC 8446, section 6.1): without it the client must suspect an attacker."""
        if isinstance(self.connection, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.connection.setblocking(False)  # the client's own goodbye is not waited for
                self.connection.unwrap()
            with contextlib.suppress(OSError):
                self.connection.setblocking(True)

    def ready(self, events: int) -> None:
        """The client has sent something, or takes something again."""
        if events & selectors.EVENT_WRITE:
            self._send_rest()
        else:
            self.receive()

    def receive(self) -> None:
        """Take in what the client has sent, if it is its turn."""
        if self.over or self.unsent or self.handed_in:
            return
        try:
            data = self.connection.recv(RECEIVE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.server.drop(self)
        elif not self._lingering:
            self.feed(data)

    def last_look(self) -> None:
        """Take in what has come unseen, lest a request that is complete be sent away."""
        if not self.server.threaded:  # with TLS only the connection's own thread can look, and the push comes again
            self.receive()

    def send(self, data: bytes) -> None:
        """Send as much as the client takes now; the rest goes when it takes more."""
        try:
            if self.server.threaded:
                self.deadline = time.monotonic() + WRITE_SECONDS
                self.server.connections.wait(self)  # who does not read can be sent away
                self.connection.sendall(data)
                return
            sent = 0 if self.unsent else self.connection.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self.server.drop(self)
            return
        if sent < len(data):
            self.unsent += data[sent:]
            self.deadline = time.monotonic() + WRITE_SECONDS
            self.server.connections.wait(self)
            self.server.watcher.watch(self)

    def _send_rest(self) -> None:
        rest, self.unsent = self.unsent, b""
        if rest and not self.over:
            self.send(rest)
        if not (self.unsent or self.over):
            self.server.watcher.watch(self)
            self.go_on()

    def linger(self) -> None:
        """Send no more, and read on for a while without understanding: closing with bytes unread would reset the
        connection, and with it the answer under way (RFC 9112, section 9.6)."""
        self.deadline = time.monotonic() + LINGER_SECONDS
        self._say_goodbye()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.connection, socket.SHUT_WR)

    def abort(self) -> None:
        """Send the client away: at once, or, from a thread of its own, as soon as that sees the end of the file."""
        if not self.server.threaded:
            self.server.drop(self)
            return
        with contextlib.suppress(OSError):  # it may be gone already
            # Not the socket's own method: on a TLS socket that one pulls the session from under the reading thread.
            socket.socket.shutdown(self.connection, socket.SHUT_RDWR)

    def feed(self, data: bytes) -> None:
        """Understand what was received."""
        raise NotImplementedError

    def end(self) -> None:
        """The connection is over."""

    def answer(self, response: Response) -> None:
        """Answer the request that was handed in."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Everything is sent."""
        raise NotImplementedError


class PushHandler(Channel):
    """Understands the requests of one connection and writes their answers, until either side has enough.

    What http.server reads through the email package and several buffers is read here directly and strictly: that took
    two thirds of a request's time.
    """

    def setup(self) -> None:
        """Prepare the connection; called by socketserver before `handle`."""
        super().setup()
        self._framing = Framing(0, False, False)  # of the request that is being read
        self.command = ""
        self._wire = Wire(self._understand, self.server.max_body)

    def feed(self, data: bytes) -> None:
        """Serve the request that is complete with ``data``, if any."""
        self._wire.feed(data)
        self.handle_one_request()

    def end(self) -> None:
        """The connection is over."""
        self._wire.close()

    def handle_one_request(self) -> None:
        """Serve the next request if all of it is here."""
        try:
            body = self._wire.next_body()
        except PushError as error:
            self._refuse(error)
            return
        if body is None:
            self._await_rest()
        else:
            self.handed_in = Request(self.command, self.path, self._query, body)
            self.do_POST()

    def do_POST(self) -> None:
        """Hand the request in. Whatever the method: the endpoint decides what becomes of it."""
        self.phase = ""
        self.deadline = float("inf")
        self.server.connections.proceed(self)
        if self.handed_in and not self.server.threaded:
            self.server.hand_in(self, self.handed_in)

    def _await_rest(self) -> None:
        """Give the client so much time for what it has begun, counted from when it began."""
        if self._wire.phase == self.phase:
            return
        self.phase = self._wire.phase
        self.deadline = time.monotonic() + PHASE_SECONDS[self.phase]
        if self.phase == BODY and self._framing.expects_continue:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _understand(self, head: bytes) -> Framing:
        self.raw_requestline = head
        self.parse_request()
        return self._framing

    def parse_request(self) -> bool:
        """Understand the head; raises `PushError` where two readers could understand it differently."""
        line = _REQUEST_LINE.match(self.raw_requestline)
        if not line:
            raise MalformedPush("malformed request line")
        method, target, major, minor = line.groups()
        if major != b"1":
            raise UnsupportedVersion("HTTP/1.1 is spoken here")
        self.command = method.decode("ascii")
        self.path, _, self._query = _origin_form(method, target.decode("latin-1")).partition("?")
        self.request_version = "HTTP/1.0" if minor == b"0" else "HTTP/1.1"
        self._framing = self.server.framing(self.raw_requestline[line.end():], minor != b"0")
        return True

    def answer(self, response: Response) -> None:
        """Send the response to the request that was handed in, and turn to the next one."""
        self.handed_in = None
        self.close_connection = not self._framing.keep_alive or self.server.closing
        self._write(response)
        self.command = ""
        if not self.unsent:
            self.go_on()

    def go_on(self) -> None:
        """Everything is sent: close, or wait for the next request, or serve it if it is here already."""
        if self._lingering:
            self.linger()
        if self._lingering or self.over or self.phase:  # with a phase, what was sent is 100 Continue
            return
        if self.close_connection:
            self.server.drop(self)
            return
        self.phase = IDLE
        self.deadline = time.monotonic() + IDLE_SECONDS
        self.server.connections.wait(self)
        if self._wire.phase != IDLE:
            self.handle_one_request()

    def _write(self, response: Response) -> None:
        """Send the answer in one piece: two would be two packets, and a wait for the first one's receipt."""
        kept = "keep-alive" if self.request_version == "HTTP/1.0" else ""
        answer = self.server.encode(response, self.server.date(), "close" if self.close_connection else kept)
        self.send(answer[:len(answer) - len(response.body)] if self.command == "HEAD" else answer)

    def _refuse(self, error: PushError) -> None:
        """Answer what is no request. What follows it on the connection is never read as one."""
        self.close_connection, self.request_version, self._lingering = True, "HTTP/1.1", True
        self._write(self.server.endpoint.refuse_unread(error))
        if not self.unsent:
            self.linger()


class Listener(ThreadingHTTPServer):
    """Listens on an address or a Unix socket. Raises OSError when it cannot, `SettingsError` for a bad certificate."""

    # Connections that the system may hold for us before they are accepted; it cuts this down to what it allows.
    request_queue_size = 4096

    def __init__(self, settings: Settings) -> None:
        self.tls = make_tls_context(settings) if settings.tls_cert else None
        self.threaded = self.tls is not None  # whether a connection has a thread of its own
        self._unix = settings.unix
        self._owns_file = False
        self.server_port = 0
        if self._unix:
            self.address_family = UNIX_FAMILY
        elif ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__(self._unix or (settings.host, settings.port), PushHandler)  # type: ignore[arg-type]
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind without asking the name service for our own name, which can take seconds."""
        if self._unix:
            self._bind_unix()
            return
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def _bind_unix(self) -> None:
        _remove_stale_socket(self._unix)
        TCPServer.server_bind(self)
        self._owns_file = True
        os.chmod(self._unix, 0o666)  # the proxy runs as another user

    def server_close(self) -> None:
        """Stop listening; a Unix socket's file goes too, if it is ours."""
        if self._owns_file:  # before another server can bind, and make the file its own
            with contextlib.suppress(OSError):
                os.unlink(self._unix)
        super().server_close()


class Watcher:
    """Calls whoever is to be called when a connection has something for it, and can be woken from another thread."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._waker, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, lambda events: None)

    def watch_listener(self, listener: socket.socket, accept: Callable[[int], None]) -> None:
        """Call ``accept`` when a client has come."""
        self._selector.register(listener, selectors.EVENT_READ, accept)

    def watch(self, handler: Channel) -> None:
        """Call the handler when its client sends, or, while it has something unsent, when its client takes."""
        events = selectors.EVENT_WRITE if handler.unsent else selectors.EVENT_READ
        if handler.watched:
            self._selector.modify(handler.connection, events, handler.ready)
        else:
            self._selector.register(handler.connection, events, handler.ready)
            handler.watched = True

    def forget(self, watched: socket.socket) -> None:
        """Watch a socket no more; to be called before it is closed."""
        self._selector.unregister(watched)

    def wait(self, seconds: float) -> List[Callable[[], None]]:
        """The calls that are due, as soon as there are any, or after so many seconds at most."""
        return [functools.partial(key.data, events) for key, events in self._selector.select(seconds)]

    def wake(self) -> None:
        """End the waiting for good."""
        with contextlib.suppress(OSError):  # closed, and so awake already
            self._waker.send(b"\0")

    def close(self) -> None:
        """Let go of everything."""
        self._selector.close()
        self._waker.close()
        self._woken.close()


class DateHeader:
    """The Date header (RFC 9110, section 6.6.1), made once a second."""

    def __init__(self) -> None:
        self._made = (0, "")

    def __call__(self) -> str:
        now = int(time.time())
        if self._made[0] != now:
            self._made = (now, formatdate(now, usegmt=True))
        return self._made[1]


class Round:
    """The requests that came together, and are answered together: so their messages can share a write to the disk."""

    def __init__(self, endpoint: Union[Endpoint, AdminEndpoint]) -> None:
        self._endpoint = endpoint
        self._waiting: List[Tuple[Channel, Request]] = []

    def add(self, handler: Channel, request: Request) -> None:
        """The handler's request is to be answered."""
        self._waiting.append((handler, request))

    def answer(self) -> Iterator[Channel]:
        """Answer all, and whatever they hand in after that; yields each handler that was served."""
        while self._waiting:
            handlers, requests = zip(*self._waiting)
            self._waiting = []
            responses: List[Response] = []
            guard(functools.partial(self._decide, requests, responses))
            for handler, response in zip(handlers, responses):
                handler.answer(response)
            for handler in handlers[len(responses):]:
                handler.abort()  # without an answer the push comes again
            yield from handlers

    def _decide(self, requests: Sequence[Request], responses: List[Response]) -> None:
        responses.extend(self._endpoint.handle_all(requests))


class ThreadPerConnection:
    """Serves each connection of a server with TLS on a thread of its own."""

    def __init__(self, server: PushServer) -> None:
        self._server = server
        self._threads = ThreadCache("kfserver-connection")

    def serve(self, handler: Channel) -> None:
        """Serve the connection, and close it."""
        try:
            self._threads.run(functools.partial(self._serve, handler))
        except RuntimeError as error:
            log.error("no thread for a connection: %s; lower --max-connections, or raise the limit of threads", error)
            self._end(handler)

    def _serve(self, handler: Channel) -> None:
        guard(handler.serve)
        self._end(handler)

    def _end(self, handler: Channel) -> None:
        handler.end()
        self._server.connections.leave(handler)
        self._server.shutdown_request(handler.connection)


class PushServer(Listener):
    """Accepts and serves. One thread watches all connections, and answers what is complete: an answer takes
    microseconds, a change of threads as much again, and a slow client only waits. With TLS, whose handshakes take
    milliseconds, each connection has a thread of its own instead.
    """

    def __init__(self, settings: Settings, endpoint: Union[Endpoint, AdminEndpoint]) -> None:
        super().__init__(settings)
        self.endpoint = endpoint
        self.max_body = settings.max_body
        self.closing = False
        self.connections = ConnectionTable(_connection_limit(settings.max_connections))
        # Heads differ in their first line only, as long as one client or proxy speaks: the rest is understood once.
        self.framing = functools.lru_cache(maxsize=256)(parse_framing)
        # Most answers differ in their date only, and that changes once a second.
        self.encode = functools.lru_cache(maxsize=16)(encode_answer)
        self._tls_threads = ThreadPerConnection(self)
        self._round = Round(endpoint)
        self.hand_in = self._round.add
        self.date = DateHeader()
        self._next_reap = 0.0
        self._close_by = 0.0
        self._closed = threading.Event()
        self.watcher = Watcher()

    def serve_forever(self, poll_interval: float = 0.5) -> None:
        """Serve until `close` is called from another thread."""
        try:
            self._serve(poll_interval)
        finally:
            self._closed.set()

    def _serve(self, poll_interval: float) -> None:
        self.watcher.watch_listener(self.socket, self._accept)
        while not self.closing:
            self._turn(poll_interval)
        self._stop_listening()
        while self.connections and time.monotonic() < self._close_by:
            self._turn(0.0)
            time.sleep(0.01)
        self.connections.dismiss_all()
        self.watcher.close()

    def _turn(self, seconds: float) -> None:
        """Wait for what comes, so many seconds at most, take it in, and answer all that is complete."""
        for call in (*self.watcher.wait(seconds), self._answer_round, self.service_actions):
            error = attempt(call)  # not by `guard`: this is done for every request
            if error:
                report_bug(error)

    def close(self, seconds: float) -> None:
        """Stop accepting, finish the requests in flight for so many seconds, close every connection."""
        if not self.closing:
            self._close_by = time.monotonic() + seconds
            self.closing = True
            self.watcher.wake()
        self._closed.wait()

    def shutdown(self) -> None:
        """End `serve_forever` at once."""
        self.close(0.0)

    def abandon(self) -> None:
        """Stop listening, without having served."""
        self.server_close()
        self.watcher.close()

    def _stop_listening(self) -> None:
        self._turn(0.0)  # who has come, and what has come from them, is still answered
        self.watcher.forget(self.socket)
        self.server_close()
        self.connections.dismiss_idle()

    def _accept(self, events: int) -> None:
        """Accept what waits, but not for so long that the accepted must wait."""
        for accepted in range(ACCEPT_BURST):
            try:
                request, client_address = self.get_request()
            except OSError as error:
                # Behind the first nobody may wait: the system looks for a descriptor before it looks for a client.
                if not accepted and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._out_of_descriptors()
                return
            self._make_room()
            self.process_request(request, client_address)

    def _make_room(self) -> None:
        while not (self.connections.make_room() or self.closing):
            self._answer_round()  # those in hand wait again after it, or are gone
            self.service_actions()
            if self.threaded:
                time.sleep(0.01)  # a thread that serves a connection leaves in its own time

    def _out_of_descriptors(self) -> None:
        """One connection gives way; if there is none, the loop pauses, or it would spin on the one that cannot come."""
        if not self.connections.make_way():
            time.sleep(0.05)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take in a connection, and serve it here or on a thread of its own."""
        request.setblocking(self.threaded)  # some systems hand the listener's own mode on
        try:
            handler = PushHandler(request, client_address, self)
        except OSError:
            self.shutdown_request(request)  # gone before it was served
            return
        self.connections.admit(handler)
        if self.threaded:
            self._tls_threads.serve(handler)
            return
        handler.receive()  # mostly the request is here already
        if not (handler.over or handler.handed_in):
            self.watcher.watch(handler)

    def _answer_round(self) -> None:
        for handler in self._round.answer():
            if not (handler.over or handler.watched):
                self.watcher.watch(handler)

    def drop(self, handler: Channel) -> None:
        """End a connection; one with a thread of its own is closed by that."""
        if handler.over:
            return
        handler.over = True
        if self.threaded:
            return
        if handler.watched:
            self.watcher.forget(handler.connection)
        handler.end()
        self.connections.leave(handler)
        self.shutdown_request(handler.connection)

    def service_actions(self) -> None:
        """Called in every turn: twice a second, send away who is too slow."""
        now = time.monotonic()
        if now >= self._next_reap:
            self._next_reap = now + 0.5
            self.connections.reap()


def make_tls_context(settings: Settings) -> ssl.SSLContext:
    """TLS 1.2 or later with the settings' certificate; raises `SettingsError` when that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # An empty pass phrase, or the terminal would be asked for one.
        context.load_cert_chain(settings.tls_cert, settings.tls_key or None, password="")
    except OSError as error:
        files = " and ".join(filter(None, (settings.tls_cert, settings.tls_key)))
        raise SettingsError(f"cannot use the certificate {files}: {error.strerror or error}; --tls-cert and --tls-key "
                            "name PEM files that belong together, the key without a pass phrase") from error
    return context


def _remove_stale_socket(path: str) -> None:
    """Remove the file of a Unix socket that a dead server left. OSError if a live one listens, or it is no socket."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EEXIST, "there is a file that is no socket")
    with contextlib.closing(socket.socket(UNIX_FAMILY)) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


def _connection_limit(wanted: int) -> int:
    """``wanted``, or what the system's limit of open files leaves beside RESERVED_FILES."""
    if resource is None:
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return wanted
    allowed = max(1, files - RESERVED_FILES)
    if allowed < wanted:
        log.warning("only %d connections at a time: the limit of open files is low; raise it with ulimit -n", allowed)
    return min(wanted, allowed)


# ---- 16 Server ------------------------------------------------------------------------------------------------------
# Law: builds the parts above from one `Settings` value and joins them. What embeds kfserver starts here.

# Seconds that requests in flight get at shutdown, before the waiting messages get theirs.
FINISH_SECONDS = 2.0

Environ = Dict[str, Any]
StartResponse = Callable[..., Any]


def make_claims(settings: Settings, later: Callable[[float, Job], None]) -> Union[ClaimCache, SharedClaims]:
    """The claims that the settings ask for: in memory, or shared through Redis."""
    local = ClaimCache(settings.dedup_size)
    return SharedClaims(settings.redis, local, later) if settings.redis else local


class Pipeline:
    """The way of a message from its claim to the end of its handler: journal, dispatcher, registry, replies."""

    def __init__(self, registry: HandlerRegistry, settings: Settings) -> None:
        alarm = Alarm()
        self.registry = registry
        self.metrics = Metrics()
        self._settings = settings
        self.draining = False  # whether the end has begun, for monitors
        self.claims = make_claims(settings, alarm.later)
        self._api = SendApi(settings) if settings.app_key or settings.access_token else None
        self._dispatcher = Dispatcher(settings, Work(self._run, self._tried, self._settle, self._flush), alarm.later)
        self._journal: Optional[Journal] = None
        if settings.journal:
            self._journal = Journal(settings, alarm.later)
            self._recover(self._journal)

    def submit(self, message: Message, payload: bytes) -> Confirm:
        """Take the message; what this returns waits until it is safe. Raises `Busy`, now or then."""
        self._dispatcher.reserve()
        if self._journal:
            confirm = self._journal.add(message.key, payload, functools.partial(self._dispatcher.post, message))
            return functools.partial(self._confirm, confirm)
        self._dispatcher.post(message)
        return self._dispatcher.wake

    def _confirm(self, confirm: Confirm) -> None:
        try:
            confirm()
        except JournalError:
            self._dispatcher.cancel()
            raise
        self._dispatcher.wake()

    def _recover(self, journal: Journal) -> None:
        """Go on where the last process ended: remember what was finished, and queue what was not."""
        for key in journal.finished_keys():
            self.claims.remember(key)
        rows = journal.waiting()
        for row in rows:
            try:
                message = parse(row.payload)
            except PushError as error:
                journal.fail(row.key, describe_error(error))
                log.error("left by the last run, and cannot be read: key=%s", row.key)
                continue
            message.key = row.key
            self.claims.restore(row.key)
            self._dispatcher.restore(message, row.tries)
        if rows:
            log.info("%d messages are left from the last run", len(rows))

    def begin(self) -> None:
        """Handle what is left from the last run; the first message that comes makes that begin too."""
        self._dispatcher.wake()

    def _tried(self, message: Message, tries: int) -> None:
        self.metrics.count("handler_retries")
        if self._journal:
            self._journal.tried(message.key, tries)

    def _run(self, message: Message) -> None:
        if message.outbox is None:
            message.outbox = Outbox(self._api, message, self.metrics.count)
        answers = self._timed_handle(message) if self._settings.admin else self.registry.handle(message)
        if answers is not None:
            message.outbox(answers)

    def _timed_handle(self, message: Message) -> Answers:
        started = time.monotonic()
        try:
            return self.registry.handle(message)
        finally:
            self.metrics.handler(time.monotonic() - started)

    def _settle(self, message: Message, error: Optional[BaseException]) -> None:
        if error is None:
            if self._journal:
                self._journal.finish(message.key)
            self.claims.finish(message.key)
            return
        self.metrics.count("messages_failed")
        if self._journal:
            self._journal.fail(message.key, describe_error(error))
        self.claims.release(message.key)
        log.error("message failed for good: key=%s; the platform will not send it again by itself", message.key,
                  exc_info=exc_info_of(error))
        for failed in self.registry.handle_error(message, error):
            log.error("on_error failed: key=%s", message.key, exc_info=exc_info_of(failed))

    def _flush(self) -> None:
        if self._journal:
            self._journal.flush()

    def trouble(self) -> str:
        """What keeps messages from being taken, in words; empty if nothing does."""
        if self.draining:
            return "draining"
        return "the journal cannot be written" if self._journal and not self._journal.healthy else ""

    def samples(self) -> List[Sample]:
        """The state of things, for the metrics."""
        healthy = self._journal is None or self._journal.healthy
        return [*self._dispatcher.samples(),
                Sample("kfserver_remembered_keys", "Messages known, to drop repeats of.", len(self.claims)),
                Sample("kfserver_journal_healthy", "0 while the journal cannot be written.", healthy)]

    def join(self, seconds: Optional[float]) -> bool:
        """Wait until every message is handled, for so many seconds at most; whether that was reached."""
        reached = self._dispatcher.join(seconds)
        self._flush()
        return reached

    def close(self) -> List[str]:
        """Take nothing more, and finish what waits within the settings' ``grace``; the keys of what was left undone."""
        self.draining = True
        undone = self._dispatcher.drain(self._settings.grace)
        if self._api:
            self._api.close()
        if self._journal:
            self._journal.close()
        return undone


def bind(settings: Settings, endpoint: Union[Endpoint, AdminEndpoint], options: str) -> PushServer:
    """A server that listens and does not serve yet. Raises `SettingsError`, which names the ``options`` for another
    address, when this one cannot be had."""
    try:
        return PushServer(settings, endpoint)
    except OSError as error:
        where = settings.unix or f"{settings.host} port {settings.port}"
        raise SettingsError(f"cannot listen on {where}: {error.strerror or error}; choose another {options}") from error


class KfServer:
    """A receiver: an endpoint, a dispatcher and, once started, an HTTP server in a thread of its own.

        with KfServer(registry, Settings(port=0)) as server:
            print(server.url)

    `feed` and `wsgi` work without a start. ``dedup_key`` replaces `dedup_key`: equal texts are one message.
    """

    def __init__(self, registry: HandlerRegistry, settings: Settings = Settings(),
                 dedup_key: Callable[[Message], str] = dedup_key) -> None:
        self.settings = settings
        self._pipeline = Pipeline(registry, settings)
        self.endpoint = Endpoint(settings, Surroundings(
            self._pipeline.claims, self._pipeline.submit, time.time, time.monotonic, dedup_key,
            self._pipeline.metrics.push if settings.admin else None))
        self._http: Optional[PushServer] = None
        self._admin: Optional[PushServer] = None

    @property
    def registry(self) -> HandlerRegistry:
        """The handlers in service; another registry can be put in their place while the server runs."""
        return self._pipeline.registry

    @registry.setter
    def registry(self, registry: HandlerRegistry) -> None:
        """Put other handlers in service."""
        self._pipeline.registry = registry

    def start(self) -> KfServer:
        """Listen, and serve from a thread of its own. Raises `SettingsError` when an address cannot be had."""
        admin = self._bind_admin() if self.settings.admin else None
        try:
            self._http = bind(self.settings, self.endpoint, "--host, --port or --unix")
        except SettingsError:
            if admin:
                admin.abandon()
            raise
        self._admin = admin
        for server in filter(None, (self._http, self._admin)):
            threading.Thread(target=server.serve_forever, name="kfserver-accept", daemon=True).start()
        self._pipeline.begin()
        return self

    def _bind_admin(self) -> PushServer:
        host, _, port = self.settings.admin.rpartition(":")
        address = {"host": host.strip("[]"), "port": int(port), "unix": "", "tls_cert": "", "tls_key": ""}
        return bind(dataclasses.replace(self.settings, **address),
                    AdminEndpoint(self._render_metrics, self._pipeline.trouble), "--admin")

    def _render_metrics(self) -> str:
        connections = len(self._http.connections) if self._http else 0
        return self._pipeline.metrics.render([
            *self._pipeline.samples(), Sample("kfserver_connections", "Open connections of clients.", connections)])

    @property
    def admin_port(self) -> int:
        """The port of the second listener; 0 if there is none."""
        return self._admin.server_port if self._admin else 0

    @property
    def port(self) -> int:
        """The port that is listened on; 0 before the start."""
        return self._http.server_port if self._http else 0

    @property
    def url(self) -> str:
        """The address of the server, for people and for tests."""
        if self.settings.unix:
            return f"unix:{self.settings.unix}"
        scheme, host = "https" if self.settings.tls_cert else "http", self.settings.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{self.settings.path or '/'}"

    def stop(self) -> List[str]:
        """Stop listening, finish requests in flight and, within ``grace`` seconds, messages; the keys of the others.

        What a handler finishes after that is not written down any more: a journal brings its message again.
        """
        self._pipeline.draining = True
        if self._http:
            self._http.close(FINISH_SECONDS)
        undone = self._pipeline.close()
        if self._admin:
            self._admin.close(0.0)
        return undone

    def __enter__(self) -> KfServer:
        return self.start()

    def __exit__(self, kind: Optional[Type[BaseException]], error: Optional[BaseException],
                 trace: Optional[TracebackType]) -> None:
        self.stop()

    def feed(self, body: bytes) -> Response:
        """Push ``body`` as the platform would, without a socket: signed and sealed as the settings ask."""
        token, timestamp = self.settings.token, str(int(time.time()))
        query = {"signature": sign(token, timestamp, "feed"), "timestamp": timestamp, "nonce": "feed"}
        if self.settings.aes_key:
            envelope = Envelope(self.settings.aes_key, self.settings.app_id)
            encrypted = envelope.seal(body, os.urandom(RANDOM_HEAD))
            query["msg_signature"] = sign(token, timestamp, "feed", encrypted)
            body = json.dumps({"Encrypt": encrypted}).encode()
        return self.endpoint.handle(Request("POST", self.settings.path or "/", urlencode(query), body))

    def join(self, seconds: Optional[float] = None) -> bool:
        """Wait until every message is handled, for so many seconds at most; whether that was reached."""
        return self._pipeline.join(seconds)

    def wsgi(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """A WSGI application (PEP 3333) with the same endpoint, for an existing site."""
        try:
            response = self.endpoint.handle(self._read_environ(environ))
        except PushError as error:
            response = self.endpoint.refuse_unread(error)
        start_response(f"{response.status} {http.client.responses[response.status]}", list_headers(response))
        return [b"" if environ["REQUEST_METHOD"] == "HEAD" else response.body]

    def _read_environ(self, environ: Environ) -> Request:
        length = environ.get("CONTENT_LENGTH") or "0"
        if not length.isdecimal() or len(length) > 18:
            raise MalformedPush("Content-Length must be one number")
        if int(length) > self.settings.max_body:
            raise PushTooLarge(f"more than {self.settings.max_body} bytes")
        body = environ["wsgi.input"].read(int(length))
        path = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "")
        return Request(environ["REQUEST_METHOD"], path or "/", environ.get("QUERY_STRING", ""), body)


# ---- 17 Push --------------------------------------------------------------------------------------------------------
# Law: plays the platform against any receiver, over real connections, and judges answers as the platform does. Shares
# signatures, envelopes and framing with the sections above; knows nothing of how a push is received and handled.

# How a run stays fast: one thread, one write and one read a push, heads of answers understood once a second. A change
# of threads, or the layers of http.client, would each cost more than all of that.

# Bodies that the platform takes for an answer, with status 200 (its page on customer-service messages).
GOOD_ANSWERS = (b"success", b"")
# Messages that may wait for another try: a receiver that is down shall not fill the memory with them.
MAX_UNANSWERED = 10000
# Characters of a request or an answer that are shown.
MAX_SHOWN = 4000
# Columns of the progress bar itself, and seconds between two states of it, and between two lines where no terminal is.
BAR_WIDTH = 30
BAR_SECONDS = 0.1
LINE_SECONDS = 1.0


class Patience(NamedTuple):
    """How long the sender of a push waits for the answer, and how often it sends again what was not answered.

    The platform's own, by default: 2 s for messages, and the three retries of its page on coupon events. How soon it
    sends again is not documented; a second is what a receiver that is busy asks for.
    """

    answer_seconds: float = 2.0
    retries: int = 3
    pause_seconds: float = 1.0


PLATFORM_PATIENCE = Patience()


class PushUrl(NamedTuple):
    """Where pushes go: to ``host`` and ``port``, or to the Unix socket ``unix``. ``authority`` is for the Host header,
    ``target`` is the path, with the query if there is one."""

    secure: bool
    host: str
    port: int
    unix: str
    authority: str
    target: str


def read_push_url(text: str) -> PushUrl:
    """The URL that ``text`` writes: http://, https://, unix:PATH or, with a path for HTTP, unix:PATH:/kf as in nginx.
    Raises `SettingsError`."""
    local = re.fullmatch(r"unix:(.+?)(?::(/[!-~]*))?", text)
    if local and UNIX_FAMILY >= 0:
        return PushUrl(False, "", 0, local.group(1), "localhost", local.group(2) or "/")
    url = _read_web_url(text) if re.fullmatch(r"(?i)https?://[!-~]+", text) else None
    if not url:
        # Without the text, which can hold a password.
        raise SettingsError("push takes a URL like http://127.0.0.1:8080/kf, https://… or unix:/run/kf.sock")
    return url


def _read_web_url(text: str) -> Optional[PushUrl]:
    """None for what is no URL, and for one with a user's name and password, which no push carries."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # half of a bracket, or a port above 65535
        return None
    if not parts.hostname or parts.username is not None:
        return None
    secure = parts.scheme == "https"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return PushUrl(secure, parts.hostname, port or (443 if secure else 80), "", parts.netloc, target)


# An address family and what a socket of it connects to.
Address = Tuple[int, Any]


def find_listener(url: PushUrl) -> Address:
    """The first of the URL's addresses where somebody listens. Raises OSError, and `SettingsError` for no host.

    A name can stand for several, as localhost does, and a receiver mostly listens on one of them.
    """
    problem = OSError("no address")
    for family, place in _list_addresses(url):
        try:
            with contextlib.closing(socket.socket(family)) as probe:
                probe.settimeout(PLATFORM_PATIENCE.answer_seconds)
                probe.connect(place)
                return family, place
        except OSError as error:
            problem = error
    raise problem


def _list_addresses(url: PushUrl) -> List[Address]:
    if url.unix:
        return [(UNIX_FAMILY, url.unix)]
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except UnicodeError:  # the codec for host names refuses empty and long parts this way
        raise SettingsError(f"push takes a URL with the name of a host, which {url.host!r} cannot be") from None
    return [(family, place) for family, _, _, _, place in found]


class Target(NamedTuple):
    """What connections are made to; with ``tls`` the receiver must be ``host``."""

    address: Address
    host: str
    tls: Optional[ssl.SSLContext]


Fields = Dict[str, Union[str, int]]
Encode = Callable[[Fields], bytes]

_TO_JSON = json.JSONEncoder(ensure_ascii=False).encode


def encode_xml(fields: Fields) -> bytes:
    """The fields laid out as on the platform's pages: text in CDATA, numbers bare."""
    lines = [f"   <{name}>{_to_xml(value)}</{name}>" for name, value in fields.items()]
    return "\n".join(("<xml>", *lines, "</xml>")).encode("utf-8", "surrogateescape")


def _to_xml(value: Union[str, int]) -> str:
    # The end of a section cannot stand in one, so it is parted between two.
    return str(value) if isinstance(value, int) else f"<![CDATA[{value.replace(']]>', ']]]]><![CDATA[>')}]]>"


def encode_json(fields: Fields) -> bytes:
    """The fields laid out as on the platform's pages, one a line; characters as they are, not escaped, to be read."""
    lines = [f"  {_TO_JSON(name)}: {_TO_JSON(value)}" for name, value in fields.items()]
    return ("{\n" + ",\n".join(lines) + "\n}").encode("utf-8", "surrogateescape")


# The types of message that are written here, and the field that makes each.
_MAIN_FIELDS: Mapping[str, str] = MappingProxyType({"text": "Content", "image": "PicUrl", "event": "Event"})


class MessageWriter:
    """Writes the messages of a run, to the app ``app_id``. ``source`` is random, ``clock`` gives Unix seconds.

    Each is a message of its own, or a receiver would drop it as a repeat: its MsgId of 63 bits is no other's. An event
    has none, and is known by its CreateTime: a sender's events lie a second apart, the last of them now.
    """

    def __init__(self, arguments: argparse.Namespace, app_id: str, source: random.Random,
                 clock: Callable[[], float]) -> None:
        self._type = _chosen_kind(arguments)
        content = getattr(arguments, self._type)
        self._constant: Fields = {"ToUserName": arguments.to or app_id or "app", "FromUserName": "", "CreateTime": 0,
                                  "MsgType": self._type,
                                  _MAIN_FIELDS[self._type]: "hello" if content is None else content}
        self._wanted: Fields = dict(arguments.field)
        self._encode = _chosen_encoding(arguments)
        self._sender, self._senders, self._count = arguments.sender, arguments.senders, arguments.count
        # Another start for each run, high enough that a receiver which reads ids as floating point shows it.
        self._first_id = 2 ** 62 + source.getrandbits(61)
        self._clock = clock

    def write(self, number: int) -> bytes:
        """The message of that number, from 0."""
        fields, now = self._constant.copy(), int(self._clock())
        fields["FromUserName"] = f"{self._sender}-{number % self._senders + 1}" if self._senders > 1 else self._sender
        if self._type == "event":
            fields["CreateTime"] = now - (self._count - 1 - number) // self._senders
        else:
            fields["CreateTime"], fields["MsgId"] = now, self._first_id + number
        fields.update(self._wanted)
        return self._encode(fields)


def _chosen_kind(arguments: argparse.Namespace) -> str:
    """What is to be pushed; a text, unless something else is asked for."""
    kinds = ("text", "image", "event", "file", "handshake")
    chosen = [kind for kind in kinds if getattr(arguments, kind) not in (None, False)] or ["text"]
    if len(chosen) > 1:
        raise SettingsError(f"--{chosen[0]} and --{chosen[1]} are different pushes: choose one")
    if arguments.field and chosen[0] not in _MAIN_FIELDS:
        raise SettingsError(f"--field goes into a message that push writes itself: leave out --field, or --{chosen[0]}")
    return chosen[0]


def _chosen_encoding(arguments: argparse.Namespace) -> Encode:
    """The same for a message and for the envelope around it, as the platform's console sets it."""
    return encode_json if arguments.form == "json" else encode_xml


class Draft(NamedTuple):
    """A push before it is framed for HTTP: the message in the clear, what rides in the query, the body, and the bodies
    that answer it."""

    message: bytes
    query: Mapping[str, str]
    body: bytes
    expected: Sequence[bytes] = GOOD_ANSWERS


class PlatformSigner:
    """Signs with the platform's token. ``source`` makes nonces, ``clock`` gives Unix seconds."""

    def __init__(self, token: str, source: random.Random, clock: Callable[[], float]) -> None:
        self._token, self._source, self._clock = token, source, clock

    def values(self) -> Dict[str, str]:
        """A signature of now, with the values that it is made of."""
        timestamp, nonce = str(int(self._clock())), str(self._source.getrandbits(32))
        return {"signature": sign(self._token, timestamp, nonce), "timestamp": timestamp, "nonce": nonce}

    def values_for(self, encrypted: str) -> Dict[str, str]:
        """The same, and the signature that covers what is encrypted."""
        values = self.values()
        values["msg_signature"] = sign(self._token, values["timestamp"], values["nonce"], encrypted)
        return values

    def sign_message(self, message: bytes) -> Draft:
        """The message as it is, signed in the query."""
        return Draft(message, self.values(), message)

    def shake_hands(self) -> Draft:
        """A handshake, in the query; only its echoStr answers it."""
        echo = str(self._source.getrandbits(62))
        return Draft(b"", {**self.values(), "echoStr": echo}, b"", (echo.encode(),))

    def shake_hands_in_body(self) -> Draft:
        """The same, form-encoded in the body."""
        draft = self.shake_hands()
        return draft._replace(query={}, body=urlencode(draft.query).encode())


class PlatformSealer:
    """Seals messages as the platform does in safe mode. ``encode`` writes what is around Encrypt.

    Both places of the signature are published, so a receiver must take it from either.
    """

    def __init__(self, settings: Settings, signer: PlatformSigner, encode: Encode, source: random.Random) -> None:
        self._envelope = Envelope(settings.aes_key, settings.app_id)
        self._app_id = settings.app_id
        self._signer, self._encode, self._source = signer, encode, source

    def seal(self, message: bytes) -> Draft:
        """The message encrypted in the body, and signed in the query."""
        encrypted = self._encrypt(message)
        body = self._encode({"ToUserName": self._app_id, "Encrypt": encrypted})
        return Draft(message, self._signer.values_for(encrypted), body)

    def seal_in_body(self, message: bytes) -> Draft:
        """The message encrypted in the body, and signed there."""
        encrypted = self._encrypt(message)
        values = self._signer.values_for(encrypted)
        return Draft(message, {}, self._encode({"Encrypt": encrypted, "MsgSignature": values["msg_signature"],
                                                "TimeStamp": values["timestamp"], "Nonce": values["nonce"]}))

    def _encrypt(self, message: bytes) -> str:
        return self._envelope.seal(message, self._source.getrandbits(8 * RANDOM_HEAD).to_bytes(RANDOM_HEAD, "big"))


def make_drafter(arguments: argparse.Namespace, settings: Settings, source: random.Random,
                 clock: Callable[[], float]) -> Callable[[int], Draft]:
    """What drafts the push of a number, as the arguments ask. Raises `SettingsError` for what does not go together."""
    signer = PlatformSigner(settings.token, source, clock)
    kind = _chosen_kind(arguments)
    if kind == "handshake":
        shake_hands = signer.shake_hands_in_body if arguments.in_body else signer.shake_hands
        return lambda number: shake_hands()
    wrap = _choose_wrap(arguments, settings, signer, source)
    if kind == "file":
        packet = read_packet(arguments.file)
        return lambda number: wrap(packet)
    writer = MessageWriter(arguments, settings.app_id, source, clock)
    return lambda number: wrap(writer.write(number))


def _choose_wrap(arguments: argparse.Namespace, settings: Settings, signer: PlatformSigner,
                 source: random.Random) -> Callable[[bytes], Draft]:
    """How the bytes of a message become a push. Without a token they go as they are, for a receiver without one."""
    if settings.aes_key:
        sealer = PlatformSealer(settings, signer, _chosen_encoding(arguments), source)
        return sealer.seal_in_body if arguments.in_body else sealer.seal
    if arguments.in_body:
        raise SettingsError("--in-body is for encrypted pushes and handshakes: add --aes-key, --app-id, or --handshake")
    return signer.sign_message if settings.token else lambda message: Draft(message, {}, message)


def read_packet(path: str) -> bytes:
    """The bytes of a file, or of the standard input for ``-``. Raises `SettingsError`."""
    if path == "-":
        return sys.stdin.buffer.read()
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}; --file names a packet, or - for the standard input"
                            ) from None


class Outgoing:
    """One message on its way. Each try sends the same bytes: a receiver must know the message again by what is in it,
    and takes a signature as often as it comes."""

    __slots__ = ("draft", "request", "lose_answer", "tries", "due")

    def __init__(self, draft: Draft, request: bytes, lose_answer: bool) -> None:
        self.draft = draft
        self.request = request
        self.lose_answer = lose_answer  # the first that counts: the message is then sent again, though it was answered
        self.tries = 0
        self.due = 0.0  # by the monotonic clock, not before


# By the first byte of the body; the platform documents none.
_CONTENT_TYPES: Mapping[bytes, str] = MappingProxyType({b"<": "text/xml", b"{": "application/json"})


def frame_push(url: PushUrl, draft: Draft) -> bytes:
    """The whole HTTP request, to be sent in one piece: in two, the second would wait for the receipt of the first."""
    joint = "" if not draft.query else "&" if "?" in url.target else "?"
    first = draft.body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    kind = _CONTENT_TYPES.get(first, "application/x-www-form-urlencoded")
    head = (f"POST {url.target}{joint}{urlencode(draft.query)} HTTP/1.1\r\nHost: {url.authority}\r\n"
            f"Content-Type: {kind}\r\nContent-Length: {len(draft.body)}\r\n\r\n")
    return head.encode("ascii") + draft.body


def is_lost(number: int, percent: int) -> bool:
    """Whether the first answer to the push of that number counts as lost: so many in a hundred, evenly spread and not
    by chance, so that the figures of a run can be checked to the unit."""
    return (number + 1) * percent // 100 > number * percent // 100


class Outcome(NamedTuple):
    """What became of one try: an answer, or status 0 where none came. ``reason`` says why it does not count, and is
    empty if it does. ``seconds`` went by since the try began."""

    status: int
    body: bytes
    reason: str
    seconds: float


class MalformedAnswer(KfError):
    """What came back is no HTTP answer, or none that has one meaning."""


class AnswerHead(NamedTuple):
    """What the head of an answer says. ``length`` is -1 for a chunked body, and None for one that ends with the
    connection."""

    status: int
    length: Optional[int]
    keep_alive: bool


# RFC 9112, section 4. Interim answers, 1xx, come only to who asks for them.
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([2-5][0-9]{2})(?: [\t -~\x80-\xff]*)?\r\n")


def parse_answer_head(head: bytes) -> AnswerHead:
    """Understand a status line and header lines, CR LF behind each. Raises `MalformedAnswer`, and `PushError` for
    framing that has two meanings."""
    line = _STATUS_LINE.match(head)
    if not line or not _FIELDS.fullmatch(head, line.end()):
        raise MalformedAnswer("what came back is not HTTP")
    minor, status = int(line.group(1)), int(line.group(2))
    found = _find_framing_fields(head[line.end():])
    framed = status in (204, 304) or not found.keys().isdisjoint((b"content-length", b"transfer-encoding"))
    return AnswerHead(status, _body_length(found, minor) if framed else None, framed and _keeps_alive(found, minor))


# A push under way: yields the events that it waits for, ends with the status and the body of the answer.
Steps = Generator[int, None, Tuple[int, bytes]]
ResultT = TypeVar("ResultT")


class PushConnection:
    """A connection to the receiver: opened when there is something to send, and kept as long as both sides like.

    One push at a time, and by steps that never wait: the selector tells when the next one is due. The steps are written
    as straight generators, which stop wherever they would wait.
    """

    outgoing: Outgoing
    started: float  # by the monotonic clock, when the try began

    def __init__(self, target: Target, selector: selectors.BaseSelector,
                 understand: Callable[[bytes], AnswerHead]) -> None:
        self._target, self._selector, self._understand = target, selector, understand
        self._socket: Optional[socket.socket] = None
        self._watched = 0
        self._steps: Steps

    def begin(self, outgoing: Outgoing) -> Optional[Outcome]:
        """Try to push; what became of it, if that is known at once."""
        self.outgoing, self.started = outgoing, time.monotonic()
        outgoing.tries += 1
        self._steps = self._exchange(outgoing.request)
        return self.step()

    def step(self) -> Optional[Outcome]:
        """Go on with the push as far as possible; what became of it, once that is known."""
        try:
            self._watch(next(self._steps))
        except StopIteration as end:
            status, body = end.value
            return self._outcome(status, body, judge(status, body, self.outgoing.draft.expected))
        except (OSError, KfError) as error:
            return self.fail(_explain_failure(error))
        return None

    def fail(self, reason: str) -> Outcome:
        """Hang up, and say why."""
        self.close()
        return self._outcome(0, b"", reason)

    def _outcome(self, status: int, body: bytes, reason: str) -> Outcome:
        return Outcome(status, body, reason, time.monotonic() - self.started)

    def close(self) -> None:
        """Hang up; the next push opens the connection anew."""
        if self._socket:
            if self._watched:
                self._selector.unregister(self._socket)
            self._socket.close()
        self._socket, self._watched = None, 0

    def _watch(self, events: int) -> None:
        if events == self._watched or not self._socket:
            return
        if self._watched:
            self._selector.modify(self._socket, events, self)
        else:
            self._selector.register(self._socket, events, self)
        self._watched = events

    def _exchange(self, request: bytes) -> Steps:
        # Nothing can have come before all is sent, so the first look for an answer waits for the selector's word.
        connection = self._socket or (yield from self._open())
        while request:
            sent = yield from _patiently(functools.partial(connection.send, request), selectors.EVENT_WRITE)
            request = request[sent:]
        yield selectors.EVENT_READ
        head, body = yield from _read_answer(functools.partial(connection.recv, RECEIVE), self._understand)
        if not head.keep_alive:
            self.close()
        return head.status, body

    def _open(self) -> Generator[int, None, socket.socket]:
        """Connect and, if need be, agree on keys, without making the other connections wait for that."""
        family, place = self._target.address
        self._socket = connection = socket.socket(family)
        connection.setblocking(False)
        if family != UNIX_FAMILY:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        with contextlib.suppress(BlockingIOError):
            connection.connect(place)
        yield selectors.EVENT_WRITE
        error = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if error:
            raise OSError(error, os.strerror(error))
        if self._target.tls:
            self._socket = secured = self._target.tls.wrap_socket(
                connection, server_hostname=self._target.host, do_handshake_on_connect=False)
            yield from _patiently(secured.do_handshake, selectors.EVENT_READ)
            return secured
        return connection


def _patiently(operation: Callable[[], ResultT], events: int) -> Generator[int, None, ResultT]:
    """The operation's result, once it has one; until then the ``events`` that it waits for, unless TLS wants others."""
    while True:
        try:
            return operation()
        except BlockingIOError:
            yield events
        except ssl.SSLWantReadError:
            yield selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            yield selectors.EVENT_WRITE


Receive = Callable[[], bytes]


def _read_answer(receive: Receive, understand: Callable[[bytes], AnswerHead]
                 ) -> Generator[int, None, Tuple[AnswerHead, bytes]]:
    """Only one answer can be under way, so nothing may be left over behind it."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += yield from _receive_more(receive, received)
    first, _, rest = received.partition(b"\r\n\r\n")
    head = understand(first + b"\r\n")
    body = yield from _read_body(receive, head, rest)
    return head, body


def _check_size(size: int) -> None:
    if size > MAX_ANSWER:
        raise MalformedAnswer(f"an answer of more than {MAX_ANSWER} bytes")


def _receive_more(receive: Receive, received: bytes) -> Generator[int, None, bytes]:
    """More of an answer of which ``received`` is here."""
    _check_size(len(received))
    data = yield from _patiently(receive, selectors.EVENT_READ)
    if not data:
        raise MalformedAnswer("hung up before the answer was complete")
    return data


def _read_body(receive: Receive, head: AnswerHead, rest: bytes) -> Generator[int, None, bytes]:
    """The body, of which ``rest`` is here already."""
    if head.length is None:
        return (yield from _read_to_end(receive, rest))
    if head.length < 0:
        return (yield from _read_chunks(receive, rest))
    _check_size(head.length)
    while len(rest) < head.length:
        rest += yield from _receive_more(receive, rest)
    if len(rest) > head.length:
        raise MalformedAnswer("more came back than one answer")
    return rest


def _read_to_end(receive: Receive, rest: bytes) -> Generator[int, None, bytes]:
    # Simple receivers, as those on http.server, say no length and speak HTTP/1.0.
    while True:
        _check_size(len(rest))
        data = yield from _patiently(receive, selectors.EVENT_READ)
        if not data:
            return rest
        rest += data


def _read_chunks(receive: Receive, rest: bytes) -> Generator[int, None, bytes]:
    # A wire takes a head first; this one has been understood already.
    wire = Wire(lambda head: Framing(-1, True, False), MAX_ANSWER)
    wire.feed(b"chunked\r\n\r\n" + rest)
    body = wire.next_body()
    while body is None:
        wire.feed((yield from _receive_more(receive, b"")))
        body = wire.next_body()
    return body


def judge(status: int, body: bytes, expected: Sequence[bytes]) -> str:
    """Why the platform would not take this for an answer; empty if it would."""
    if status != 200:
        return str(status)
    return "" if body in expected else "200 with a wrong body"


def _explain_failure(error: Exception) -> str:
    """Why no answer came, in the words of who can do something about it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate refused: {error.verify_message} (--insecure takes any)"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {error.reason or error}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


class PushTally:
    """What became of the pushes of a run of so many ``messages``, each of which can be sent several times.

    Tries are counted by what came back, messages by how they ended; what is neither answered nor given up when a run is
    interrupted was never answered either.
    """

    def __init__(self, messages: int) -> None:
        self.messages = messages
        self.sent = 0  # tries, of all messages
        self.answered = 0  # messages that the platform would not send again
        self.given_up = 0  # messages whose last try has failed
        self.repeated = 0  # sent again as if the answer had been lost
        self.retried = 0  # sent again because no answer came that counts
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.times: List[float] = []  # seconds to each answer that counts
        self.seconds = 0.0  # of the whole run

    def note(self, outcome: Outcome) -> None:
        """Count what became of a try."""
        if not outcome.reason:
            self.times.append(outcome.seconds)
        elif outcome.status:
            self.refused[outcome.reason] += 1
        else:
            self.failed[outcome.reason] += 1

    def report(self) -> Dict[str, Any]:
        """Everything in plain values, for JSON: times in milliseconds, None where there was no answer."""
        times = sorted(self.times)
        return {"messages": self.messages, "sent": self.sent, "answered": self.answered,
                "unanswered": self.messages - self.answered, "repeated": self.repeated, "retried": self.retried,
                "refused": dict(self.refused), "failed": dict(self.failed),
                "p50_ms": percentile_ms(times, 50), "p99_ms": percentile_ms(times, 99),
                "max_ms": percentile_ms(times, 100), "seconds": round(self.seconds, 3),
                "pushes_per_second": round(len(times) / self.seconds, 1) if self.seconds else 0.0}


def percentile_ms(times: Sequence[float], percent: int) -> Optional[float]:
    """The one of ``times``, seconds in order, that so many in a hundred do not exceed (the nearest rank), in
    milliseconds; None if there are none."""
    if not times:
        return None
    return round(times[max(0, -(-len(times) * percent // 100) - 1)] * 1000, 3)


def format_table(report: Mapping[str, Any]) -> str:
    """A report for people, one figure a line."""
    rows = [(name, str(report[name])) for name in ("messages", "sent", "answered")]
    rows.append(("never answered", str(report["unanswered"])))
    rows += [(f"refused {reason}", str(number)) for reason, number in sorted(report["refused"].items())]
    rows += [(reason, str(number)) for reason, number in sorted(report["failed"].items())]
    rows += [(name, str(report[name])) for name in ("retried", "repeated")]
    if report["max_ms"] is not None:
        rows += [(name, f"{report[name + '_ms']:.2f} ms") for name in ("p50", "p99", "max")]
    rows.append(("pushes a second", f"{report['pushes_per_second']:.0f}"))
    return "\n".join(f"{name:<24} {figure:>12}" for name, figure in rows)


class RunPlan(NamedTuple):
    """How a run goes: so many messages, so many new ones a second (0: as fast as it goes), on so many connections."""

    target: Target
    messages: int
    rate: float
    connections: int
    patience: Patience


class PushRun:
    """Pushes until every message is answered, or was tried as often as the platform tries. One thread watches all
    connections: a change of threads for each push would take longer than the push.

    ``compose`` makes the message of a number, ``told`` hears of each try. A connection is idle or busy; a message is in
    the hands of a busy connection, or waits to be sent again.
    """

    def __init__(self, plan: RunPlan, compose: Callable[[int], Outgoing], tally: PushTally,
                 told: Callable[[Outgoing, Outcome], None]) -> None:
        self._plan, self._compose, self._tally, self._told = plan, compose, tally, told
        self._selector = selectors.DefaultSelector()
        # Heads of answers differ by their date alone: what is the same for a second is understood once.
        understand = functools.lru_cache(maxsize=16)(parse_answer_head)
        self._idle = [PushConnection(plan.target, self._selector, understand) for _ in range(plan.connections)]
        self._busy: OrderedDict[PushConnection, None] = OrderedDict()  # the longest first
        self._again: Deque[Outgoing] = deque()  # in the order in which they are due
        self._composed = 0
        self._started = time.monotonic()

    def run(self) -> None:
        """Push them all. KeyboardInterrupt ends it early; the tally then holds what was done."""
        try:
            while self._tally.answered + self._tally.given_up < self._plan.messages:
                self._launch()
                self._serve()
                self._expire()
        finally:
            self._tally.seconds = time.monotonic() - self._started
            for connection in (*self._idle, *self._busy):
                connection.close()
            self._selector.close()

    def _launch(self) -> None:
        """Give what is due to idle connections, the one used last first: so few are opened where few are needed."""
        while self._idle:
            outgoing = self._next_due()
            if not outgoing:
                return
            connection = self._idle.pop()
            self._busy[connection] = None
            self._tally.sent += 1
            self._conclude(connection, connection.begin(outgoing))

    def _next_due(self) -> Optional[Outgoing]:
        """What is to be sent now, if anything: first what was sent before, since its user waits longest."""
        now = time.monotonic()
        if self._again and self._again[0].due <= now:
            return self._again.popleft()
        if self._new_due() > now:
            return None
        self._composed += 1
        return self._compose(self._composed - 1)

    def _new_due(self) -> float:
        """When the next new message is to be sent, by the monotonic clock."""
        if self._composed == self._plan.messages or len(self._again) >= MAX_UNANSWERED:
            return float("inf")
        return self._started + self._composed / self._plan.rate if self._plan.rate else 0.0

    def _serve(self) -> None:
        """Wait until something can go on, and go on with all that can."""
        for key, _ in self._selector.select(self._seconds_to_wait()):
            connection: PushConnection = key.data
            if connection in self._busy:
                self._conclude(connection, connection.step())
            else:
                connection.close()  # the receiver hung up between two pushes

    def _seconds_to_wait(self) -> float:
        """Until something is due that no connection tells of: a message to send, or the end of an answer's time."""
        due = float("inf")
        if self._idle:
            due = min(self._new_due(), self._again[0].due if self._again else due)
        if self._busy:
            due = min(due, next(iter(self._busy)).started + self._plan.patience.answer_seconds)
        return max(0.0, due - time.monotonic())

    def _expire(self) -> None:
        """Give up on answers that take too long."""
        limit = self._plan.patience.answer_seconds
        while self._busy:
            connection = next(iter(self._busy))
            if connection.started + limit > time.monotonic():
                return
            self._conclude(connection, connection.fail(f"no answer in {limit:g} s"))

    def _conclude(self, connection: PushConnection, outcome: Optional[Outcome]) -> None:
        """Take note of how a try ended, if it has ended: the connection is free, the message perhaps not through."""
        if not outcome:
            return
        del self._busy[connection]
        self._idle.append(connection)
        self._tally.note(outcome)
        self._told(connection.outgoing, outcome)
        self._settle(connection.outgoing, outcome)

    def _settle(self, outgoing: Outgoing, outcome: Outcome) -> None:
        """Decide whether the message is sent again: at once, where its answer counts as lost, else after a pause."""
        if not outcome.reason and outgoing.lose_answer:
            outgoing.lose_answer = False
            self._tally.repeated += 1
            self._again.appendleft(outgoing)
        elif not outcome.reason:
            self._tally.answered += 1
        elif outgoing.tries <= self._plan.patience.retries:
            self._tally.retried += 1
            outgoing.due = time.monotonic() + self._plan.patience.pause_seconds
            self._again.append(outgoing)
        else:
            self._tally.given_up += 1


_NOT_FOR_SCREENS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What can be done about an answer that does not count, by the reason of `judge`.
_PUSH_ADVICE: Mapping[str, str] = MappingProxyType({
    "200 with a wrong body": "a push is answered by success or nothing, a handshake by its echoStr, to the letter",
    "403": "push with the receiver's own --token, and with its --aes-key and --app-id if it has them",
    "404": "the receiver takes pushes at another path, its --path: put that into the URL",
    "503": "the receiver's queue is full: see its log, or push slower with --rate"})


def readable(data: bytes) -> str:
    """The bytes as text that a terminal can show: neither broken UTF-8 nor control characters."""
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    shown = _NOT_FOR_SCREENS.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
    return shown if len(shown) <= MAX_SHOWN else f"{shown[:MAX_SHOWN]}… ({len(shown) - MAX_SHOWN} more)"


def _say(out: TextIO, text: str, end: str = "\n") -> None:
    """Print also the characters that the screen does not know, as escapes."""
    encoding = out.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=out, flush=True)


class PushStory:
    """Tells of a single push: the request as it goes out, and each answer."""

    def __init__(self, out: TextIO, patience: Patience) -> None:
        self._out, self._patience = out, patience

    def begin(self, outgoing: Outgoing) -> None:
        """Show the request, and what is sealed in it."""
        self._quote(">", outgoing.request)
        if outgoing.draft.message not in outgoing.request:
            _say(self._out, "sealed in it:")
            self._quote("|", outgoing.draft.message)

    def _quote(self, mark: str, data: bytes) -> None:
        for line in readable(data).split("\n"):
            _say(self._out, f"{mark} {line}".rstrip())

    def tell(self, outgoing: Outgoing, outcome: Outcome) -> None:
        """Show what became of a try, and what follows."""
        if outcome.status:
            self._quote(f"< {outcome.status}", outcome.body.strip() or b"(nothing)")
        verdict = f"not answered: {outcome.reason}" if outcome.reason else "answered"
        _say(self._out, f"{verdict}, after {outcome.seconds * 1000:.2f} ms")
        self._tell_next(outgoing, outcome)

    def _tell_next(self, outgoing: Outgoing, outcome: Outcome) -> None:
        if outcome.reason in _PUSH_ADVICE and outgoing.tries == 1:
            _say(self._out, _PUSH_ADVICE[outcome.reason])
        if not outcome.reason and outgoing.lose_answer:
            _say(self._out, "sent again, as if that answer had been lost")
        if outcome.reason and outgoing.tries <= self._patience.retries:
            _say(self._out, f"try {outgoing.tries + 1} of {self._patience.retries + 1} "
                            f"in {self._patience.pause_seconds:g} s")


class PushProgress:
    """Shows how far a run is: on a terminal by a bar that is drawn over itself, else by a line now and then.

    ``timer`` gives seconds from anywhere.
    """

    def __init__(self, out: TextIO, tally: PushTally, timer: Callable[[], float] = time.monotonic) -> None:
        self._out, self._tally, self._timer = out, tally, timer
        self._started = timer()
        self._draw, self._interval = (self._bar, BAR_SECONDS) if out.isatty() else (self._line, LINE_SECONDS)
        self._next = self._started + self._interval

    def tell(self, outgoing: Outgoing, outcome: Outcome) -> None:
        """Show the state, unless that was done just now."""
        if self._timer() >= self._next:
            self._next = self._timer() + self._interval
            self._draw()

    def end(self) -> None:
        """Show the last state of a bar, and leave it on the screen; lines need no end."""
        if self._out.isatty():
            self._bar()
            _say(self._out, "")

    def _line(self) -> None:
        _say(self._out, self._state())

    def _bar(self) -> None:
        done = BAR_WIDTH * (self._tally.answered + self._tally.given_up) // self._tally.messages
        _say(self._out, f"\r[{'#' * done:.<{BAR_WIDTH}}] {self._state():<46}", end="")

    def _state(self) -> str:
        tally, seconds = self._tally, max(self._timer() - self._started, 0.001)
        wrong = sum(tally.refused.values()) + sum(tally.failed.values())
        # Tries, not messages: these are not lost yet, and the reader shall see at once that something is wrong.
        state = f"{tally.answered}/{tally.messages}, {len(tally.times) / seconds:.0f}/s"
        return f"{state}, {wrong} tries failed" if wrong else state


def _number_option(option: str, kind: Callable[[str], float], low: int, high: int) -> Callable[[str], float]:
    """What reads the value of an option; it raises `SettingsError`."""
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            noun = "a whole number" if kind is int else "a number"
            raise SettingsError(f"{option} takes {noun} from {low} to {high}, not {text!r}")
        return value
    return read


def _field_option(text: str) -> Tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
        raise SettingsError(f"--field takes NAME=VALUE, as in CouponId=7, not {text!r}")
    return name, value


def build_push_parser() -> argparse.ArgumentParser:
    """The parser of the push command. Its numbers and fields are read already; a bad one raises `SettingsError`."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py push", allow_abbrev=False, usage="kfserver.py push [options] URL",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=79),
        description="Plays the platform: pushes messages to a receiver and judges its answers.",
        epilog="URL: http://host:port/path, https://…, unix:/path/of/socket or unix:/socket:/path.")
    parser.add_argument("url", metavar="URL", help="where the receiver is")
    for add in (_add_message_options, _add_platform_options, _add_run_options):
        add(parser)
    return parser


def _add_message_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", metavar="T", help="a text message (hello)")
    parser.add_argument("--image", metavar="URL", help="a message with the picture at URL")
    parser.add_argument("--event", metavar="NAME", help="an event, as user_get_coupon")
    parser.add_argument("--field", metavar="K=V", action="append", type=_field_option, default=[],
                        help="one more field, or another value; repeatable")
    parser.add_argument("--file", metavar="PACKET", help="a packet, sent as it is; - for the standard input")
    parser.add_argument("--handshake", action="store_true", help="the handshake of saving the URL in the console")
    parser.add_argument("--to", metavar="APP", help="the app it is for (--app-id, or app)")
    parser.add_argument("--sender", metavar="ID", default="user", help="the openid it is from (user)")
    parser.add_argument("--xml", dest="form", action="store_const", const="xml", default="xml", help="in XML (default)")
    parser.add_argument("--json", dest="form", action="store_const", const="json", help="in JSON")


def _add_platform_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", metavar="T", help="sign with this Token (KF_TOKEN)")
    parser.add_argument("--aes-key", metavar="KEY", help="encrypt with this EncodingAESKey (KF_AES_KEY)")
    parser.add_argument("--app-id", metavar="APP", help="the app that is sealed in (KF_APP_ID)")
    parser.add_argument("--in-body", action="store_true", help="signature in the body instead of the query")
    parser.add_argument("--insecure", action="store_true", help="accept any certificate")


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    numbers: Sequence[Tuple[str, Callable[[str], float], int, int, int, str]] = (
        ("--count", int, 1, 10 ** 7, 1, "messages to push (1)"),
        ("--rate", float, 0, 10 ** 6, 0, "new ones a second; 0 (default): as fast as it goes"),
        ("--senders", int, 1, 10 ** 7, 1, "senders that they come from in turn (1)"),
        ("--repeat", int, 0, 100, 0, "of 100, so many sent again as after a lost answer"),
        ("--connections", int, 1, 10 ** 4, 16, "connections to push on (16)"))
    for option, kind, low, high, default, text in numbers:
        read = _number_option(option, kind, low, high)
        parser.add_argument(option, metavar="N", type=read, default=default, help=text)
    parser.add_argument("--json-report", metavar="FILE", help="write the figures as JSON too; - for stdout")


def read_push_settings(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Settings:
    """The token, the key and the app id to play the platform with. Raises `SettingsError`."""
    given: Dict[str, Any] = {name: getattr(arguments, name) or environment.get(f"KF_{name.upper()}", "")
                             for name in ("token", "aes_key", "app_id")}
    return Settings(**given)


@contextlib.contextmanager
def open_report(path: Optional[str]) -> Iterator[Optional[TextIO]]:
    """Where the report goes; None for none. It is opened before the run, lest that turn out to have been in vain.
    Raises `SettingsError`."""
    if path is None or path == "-":
        yield sys.stdout if path else None
        return
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(open(path, "w", encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"cannot write {path}: {error.strerror}; let --json-report name another file") from None
        yield file


def make_composer(arguments: argparse.Namespace, url: PushUrl) -> Callable[[int], Outgoing]:
    """What makes the push of a number ready to be sent. Raises as `make_drafter` does."""
    draft = make_drafter(arguments, read_push_settings(arguments, os.environ), random.Random(), time.time)

    def compose(number: int) -> Outgoing:
        drafted = draft(number)
        return Outgoing(drafted, frame_push(url, drafted), is_lost(number, arguments.repeat))
    return compose


def plan_run(arguments: argparse.Namespace, url: PushUrl, patience: Patience) -> RunPlan:
    """The run that the arguments ask for, to who listens at the URL. Raises as `find_listener` does."""
    tls = _make_client_context(arguments) if url.secure else None
    target = Target(find_listener(url), url.host, tls)
    return RunPlan(target, arguments.count, arguments.rate, arguments.connections, patience)


def _make_client_context(arguments: argparse.Namespace) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if arguments.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def push(arguments: argparse.Namespace, patience: Patience = PLATFORM_PATIENCE) -> int:
    """Push as the arguments of `build_push_parser` ask, and show what comes of it; 0 if all was answered, 1 if not.

    Raises `SettingsError` before anything is sent. A report on the standard output has that for itself.
    """
    url = read_push_url(arguments.url)
    compose = make_composer(arguments, url)
    tally = PushTally(arguments.count)
    with open_report(arguments.json_report) as report:
        out = sys.stderr if report is sys.stdout else sys.stdout
        try:
            plan = plan_run(arguments, url, patience)
        except OSError as error:
            reason = error.strerror or str(error)
            tally.failed[reason] += 1
            _say(sys.stderr, f"nobody listens at {arguments.url}: {reason}; start the receiver, or correct the URL")
        else:
            show = _push_one if plan.messages == 1 else _push_many
            show(plan, compose, tally, out)
        if report:
            _say(report, json.dumps(tally.report(), indent=2))
    return 0 if tally.answered == tally.messages else 1


def _push_one(plan: RunPlan, compose: Callable[[int], Outgoing], tally: PushTally, out: TextIO) -> None:
    """Show the request before it is sent: the answer may take its time."""
    outgoing, story = compose(0), PushStory(out, plan.patience)
    story.begin(outgoing)
    with contextlib.suppress(KeyboardInterrupt):
        PushRun(plan, lambda number: outgoing, tally, story.tell).run()


def _push_many(plan: RunPlan, compose: Callable[[int], Outgoing], tally: PushTally, out: TextIO) -> None:
    """Show how it goes, and the figures at the end, be it an early one."""
    progress = PushProgress(out, tally)
    with contextlib.suppress(KeyboardInterrupt):
        PushRun(plan, compose, tally, progress.tell).run()
    progress.end()
    _say(out, format_table(tally.report()))
    for reason in sorted(tally.refused.keys() & _PUSH_ADVICE.keys()):
        _say(out, f"{reason}: {_PUSH_ADVICE[reason]}")


# ---- 18 Handlers file -----------------------------------------------------------------------------------------------
# Law: from a path or a module's name to a registry, and to the next one when the file changes. What is wrong with the
# file is told to its author: a line with what to do, and that file's traceback.

DEFAULT_HANDLERS = "handlers.py"
# Seconds between two looks at the file of the handlers.
WATCH_SECONDS = 1.0


def load_handlers(wanted: str) -> Tuple[HandlerRegistry, str]:
    """The registry in a file or module, and where it was found; an empty one where none was wanted and none is there.

    Raises `SettingsError`; an error inside the file is printed first, with that file's traceback.
    """
    path = wanted or _default_handlers()
    if not path:
        return HandlerRegistry(), ""
    modules: List[ModuleType] = []
    error = attempt(lambda: modules.append(_import_handlers(path)))
    if error:
        raise _explain_import(path, error) from error
    registry = getattr(modules[0], "registry", None)
    if not isinstance(registry, HandlerRegistry):
        raise SettingsError(f"{path} has no registry: write 'from kfserver import HandlerRegistry' and "
                            "'registry = HandlerRegistry()' at its top")
    return registry, modules[0].__file__ or path


def _default_handlers() -> str:
    """handlers.py in the current folder, or else beside kfserver.py; empty if there is neither."""
    folders = (os.getcwd(), os.path.dirname(os.path.abspath(__file__)))
    paths = [os.path.join(folder, DEFAULT_HANDLERS) for folder in folders]
    return next((path for path in paths if os.path.exists(path)), "")


def _import_handlers(wanted: str) -> ModuleType:
    """The module of a dotted name, or of a file by its path, run anew; a file's neighbours can be imported from it."""
    if wanted.endswith(".py") or os.path.exists(wanted):
        path = os.path.abspath(wanted)
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))
        name = os.path.splitext(os.path.basename(path))[0]
        return _run_file(importlib.machinery.ModuleSpec(name, None, origin=path), path)
    known = sys.modules.get(wanted)
    if known and known.__spec__ and known.__file__:  # importing it once more would not look at its file
        return _run_file(known.__spec__, known.__file__)
    return importlib.import_module(wanted)


def _run_file(spec: importlib.machinery.ModuleSpec, path: str) -> ModuleType:
    """The module of ``spec``, run from its file. If that fails, a module that had its name before has it again."""
    loader = spec.loader = _SourceLoader(spec.name, path)
    module = importlib.util.module_from_spec(spec)
    module.__file__ = path
    before = sys.modules.get(spec.name)
    sys.modules[spec.name] = module
    try:
        loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        if before:
            sys.modules[spec.name] = before
        raise
    return module


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Runs a file as it is now: bytecode kept from an edit in the same second would pass for that of the last one."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _explain_import(path: str, error: BaseException) -> SettingsError:
    if isinstance(error, OSError) and error.filename and os.path.abspath(error.filename) == os.path.abspath(path):
        return SettingsError(f"cannot read the handlers {path}: {error.strerror}; --handlers names another file")
    if isinstance(error, ModuleNotFoundError) and error.name == path:
        return SettingsError(f"no file or module named {path} for the handlers; --handlers names a file or a module")
    trace = _trace_of_handlers(error)
    if isinstance(error, HandlerError) and trace:
        return SettingsError(f"{path}, line {trace.tb_lineno}: {error}")
    traceback.print_exception(type(error), error, trace)
    return SettingsError(f"{path} failed with the {type(error).__name__} above: mend it, or name another by --handlers")


def _trace_of_handlers(error: BaseException) -> Optional[TracebackType]:
    """The error's trace without the steps that led into the handlers: they are ours, and tell their author nothing."""
    ours = (_import_handlers.__code__.co_filename, importlib.__file__)
    trace = error.__traceback__
    while trace and (trace.tb_frame.f_code.co_filename in ours or "<frozen" in trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    return trace


class ReloadingHandlers:
    """The handlers in a file, loaded again when it changes. A broken version leaves the one before in service.

    Only the file itself is watched: what it imports is not loaded again, and threads that a version started go on.
    """

    def __init__(self, wanted: str) -> None:
        """Load what `load_handlers` takes; raises what it raises."""
        # Before the file is read, so that a change meanwhile is seen. Where a module's file is, only loading tells.
        before = _file_stamp(wanted or _default_handlers())
        self.registry, self.path = load_handlers(wanted)
        self._seen = before or _file_stamp(self.path)
        # A file by its full path from now on, since handlers may change the current folder.
        self._wanted = self.path if before else wanted

    def poll(self) -> Optional[HandlerRegistry]:
        """The registry of a version that is new since the last call, and loads; else None.

        Of one that does not load, the traceback is printed and the log tells, once.
        """
        stamp = _file_stamp(self.path or _default_handlers())
        if stamp is None or stamp == self._seen:  # None: some editors remove a file before they write it
            return None
        self._seen = stamp
        try:
            self.registry, self.path = load_handlers(self._wanted)
        except SettingsError as error:
            log.error("%s; until then the handlers from before stay in service", error)
            return None
        return self.registry


def _file_stamp(path: str) -> Optional[Tuple[int, int, int]]:
    """What changes when a file is written or replaced; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def watch_handlers(server: KfServer, handlers: ReloadingHandlers, later: Callable[[float, Job], None]) -> None:
    """Put new versions of the handlers into service from now on; ``later`` runs a job after so many seconds.

    New versions run on the thread of ``later``: give it an `Alarm` of its own, or the server's retries wait for them.
    """
    registry = handlers.poll()
    if registry is not None:
        server.registry = registry
        log.info("%d handlers loaded again from %s", len(registry), handlers.path)
    later(WATCH_SECONDS, functools.partial(watch_handlers, server, handlers, later))


# ---- 19 Chat --------------------------------------------------------------------------------------------------------
# Law: a terminal or a script in the place of the platform. Messages are made from bytes as those of a push, and replies
# pass the same `Outbox`; only the network is missing. Knows nothing of servers and settings.

# Who writes until /as names another, and the app that they write to.
CHAT_USER = "user"
CHAT_APP = "app"


def _show(text: str) -> None:
    """Print what the user did not say, which is indented."""
    print("  " + text.replace("\n", "\n  "), flush=True)


def _show_error(error: BaseException) -> None:
    _show("".join(traceback.format_exception(type(error), error, _trace_of_handlers(error))).rstrip())


class PrintedReplies:
    """Works like a `SendApi`, but for the network: every reply is printed, and so arrives."""

    def send_text(self, open_id: str, text: str) -> None:
        """Print a text to the user."""
        # Further lines of a text stand deeper than the beginning of the next.
        _show(f"to {open_id or 'nobody'}: {text}".replace("\n", "\n  "))

    def send_image(self, open_id: str, url: str) -> None:
        """Print the address of a picture to the user."""
        _show(f"to {open_id or 'nobody'}: [image] {url}")


class Chat:
    """A conversation with the handlers, printed as it goes.

    ``user`` is the openid of who writes. ``failures`` counts the messages whose handler failed, and the lines that were
    not understood. ``over`` is set once the user wants to end.
    """

    def __init__(self, handlers: ReloadingHandlers) -> None:
        self.user = CHAT_USER
        self.failures = 0
        self.over = False
        self._handlers = handlers
        self._api: Any = PrintedReplies()
        # Microseconds, so that no later conversation has the same ids: handlers may remember what they have seen.
        self._last_id = time.time_ns() // 1000

    def take(self, line: str) -> None:
        """Do what a line says: it is a text to the handlers or, behind a slash, a command. A blank one says nothing."""
        if self._handlers.poll() is not None:
            _show(f"{len(self._handlers.registry)} handlers loaded again from {self._handlers.path}")
        if line.startswith("//") or not line.startswith("/"):
            self.send_text(line)
        else:
            self._obey(line)

    def _obey(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        command = CHAT_COMMANDS.get(name)
        if command is None:
            self._complain(f"no command {name}: /help lists them; for a slash at the start of a text type two")
        elif " " in command.usage and not rest.strip():
            self._complain(f"write {command.usage}")
        else:
            command.run(self, rest.strip())

    def _complain(self, text: str) -> None:
        self.failures += 1
        _show(text)

    def send_text(self, line: str) -> None:
        """The user writes. Two slashes at the beginning stand for one."""
        if line.strip(BLANKS):
            self._send_numbered({"MsgType": "text", "Content": line[1:] if line.startswith("//") else line})

    def send_image(self, url: str) -> None:
        """The user sends the picture at ``url``."""
        self._send_numbered({"MsgType": "image", "PicUrl": url})

    def send_event(self, words: str) -> None:
        """An event: its name and, if it has any, its fields as NAME=VALUE."""
        event, *pairs = words.split()
        if not all("=" in pair for pair in pairs):
            self._complain("a field of an event is written NAME=VALUE, without blanks; /raw takes what has some")
            return
        self._send({"MsgType": "event", "Event": event, **dict(pair.split("=", 1) for pair in pairs)})

    def send_raw(self, packet: str) -> None:
        """A whole message, in JSON or XML, as a push brings it."""
        self._push(packet.encode("utf-8", "replace"))

    def become(self, open_id: str) -> None:
        """Another user writes from now on."""
        self.user = open_id

    def help(self, _: str) -> None:
        """Print what can be typed."""
        print(describe_chat(), flush=True)

    def end(self, _: str) -> None:
        """The user wants to end."""
        self.over = True

    def _send_numbered(self, fields: Mapping[str, str]) -> None:
        self._last_id += 1
        self._send({"MsgId": str(self._last_id), **fields})

    def _send(self, fields: Mapping[str, str]) -> None:
        common = {"ToUserName": CHAT_APP, "FromUserName": self.user, "CreateTime": str(int(time.time()))}
        self._push(json.dumps({**common, **fields}).encode())

    def _push(self, payload: bytes) -> None:
        try:
            message = parse(payload)
        except MalformedPush as error:
            self._complain(f"a server would refuse this: {error}")
            return
        message.key = dedup_key(message)
        message.outbox = Outbox(self._api, message)
        self._handle(message, message.outbox)

    def _handle(self, message: Message, outbox: Callable[[Answers], None]) -> None:
        registry = self._handlers.registry
        match = registry.find(message)
        if match is None:
            _show(f"nobody takes this; to take it, write: {decorator_for(message)}")
            return
        for rule in registry.rules_of(match.handler):
            _show(rule)
        error = attempt(lambda: outbox(registry.handle(message)))
        if error:
            self.failures += 1
            _show_error(error)
            for failed in registry.handle_error(message, error):
                _show_error(failed)


class ChatCommand(NamedTuple):
    """What can be typed behind a slash. ``run`` gets what follows the name; if ``usage`` shows any, there must be."""

    usage: str
    purpose: str
    run: Callable[[Chat, str], None]


CHAT_COMMANDS: Mapping[str, ChatCommand] = MappingProxyType({command.usage.split()[0]: command for command in (
    ChatCommand("/image URL", "send a picture", Chat.send_image),
    ChatCommand("/event NAME [FIELD=VALUE ...]", "an event, and its fields", Chat.send_event),
    ChatCommand("/raw PACKET", "any message, in JSON or XML on one line", Chat.send_raw),
    ChatCommand("/as OPENID", "be another user", Chat.become),
    ChatCommand("/help", "show this list", Chat.help),
    ChatCommand("/quit", "end, as the end of input does", Chat.end))})


def describe_chat() -> str:
    """What can be typed, a line for each."""
    rows = [("any line", "a text message; type its first slash twice")]
    rows += [(command.usage, command.purpose) for command in CHAT_COMMANDS.values()]
    return "\n".join(f"  {usage:<31}{purpose}" for usage, purpose in rows)


def build_chat_parser() -> argparse.ArgumentParser:
    """The parser of the command ``chat``."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py chat", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Talk to your handlers without a network. They are loaded again when changed.",
        epilog=f"what can be typed:\n{describe_chat()}\n\nLines from a pipe or a file can be a test: "
               "then the exit status is 1\nif a handler failed or a line was not understood.")
    parser.add_argument("--handlers", metavar="FILE", default="", help=SETTING_FIELDS["handlers"].metadata["help"])
    return parser


def chat(arguments: argparse.Namespace) -> int:
    """Talk to the handlers until the input ends: 0 from a terminal, else as `_recite` says.

    Raises `SettingsError` when the handlers cannot be loaded.
    """
    handlers = ReloadingHandlers(arguments.handlers or os.environ.get("KF_HANDLERS", ""))
    if not sys.stdin.isatty():
        return _recite(Chat(handlers), sys.stdin)
    where = handlers.path or "nowhere: there is no handlers.py here"
    print(f"{len(handlers.registry)} handlers from {where}; /help lists what can be typed", flush=True)
    _converse(Chat(handlers))
    return 0


def _recite(talk: Chat, script: Iterable[str]) -> int:
    """Take the lines of a script, each printed behind its user's name; 1 if anything in it failed, else 0."""
    for line in filter(lambda line: line.strip(BLANKS), script):
        text = line.rstrip("\r\n")
        print(f"{talk.user}: {text}", flush=True)
        talk.take(text)
        if talk.over:
            break
    return 1 if talk.failures else 0


def _converse(talk: Chat) -> None:
    """Take what is typed at a prompt. Ctrl-D ends it; Ctrl-C gives up a line, or a handler that does not come back."""
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # its presence gives input() editing and history
    while not talk.over:
        try:
            talk.take(input(f"{talk.user}> "))
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n  interrupted; /quit ends", flush=True)


# ---- 20 Journal command ---------------------------------------------------------------------------------------------
# Law: tells what is in a journal, and puts the dead back. Works beside the server that writes the file; shows a user's
# words only to who asks for them.

Report = Dict[str, Any]


def build_journal_parser() -> argparse.ArgumentParser:
    """The parser of ``kfserver.py journal``."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py journal", allow_abbrev=False,
        description="Tells what waits in a journal and what failed for good. A server may run on it meanwhile.")
    parser.add_argument("journal", metavar="FILE", help="what --journal named, as kf.db")
    parser.add_argument("--requeue", action="store_true",
                        help="put back what failed for good: it is handled when the server starts the next time")
    parser.add_argument("--show", action="store_true", help="show the messages too, with what users wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object; times are Unix seconds")
    return parser


def journal_command(arguments: argparse.Namespace) -> int:
    """Print what is in the journal, after putting the dead back if that is wanted; 0. Raises `SettingsError`."""
    import sqlite3
    if not os.path.exists(arguments.journal):
        raise SettingsError(f"there is no journal {arguments.journal}")
    _refuse_foreign_file(arguments.journal)
    try:
        with contextlib.closing(_connect_journal(arguments.journal, arguments.requeue)) as db:
            requeued = db.execute(_REQUEUE).rowcount if arguments.requeue else 0
            report = _report_journal(db, requeued, arguments.show)
    except sqlite3.Error as error:
        raise SettingsError(f"cannot use the journal {arguments.journal}: {error}") from error
    _say(sys.stdout, json.dumps(report, indent=2) if arguments.json else _format_report(report, time.time()))
    return 0


def _connect_journal(path: str, writing: bool) -> sqlite3.Connection:
    """A connection that never makes the file, and changes it only for ``writing``."""
    import sqlite3
    address = f"file:{quote(os.path.abspath(path))}?mode={'rw' if writing else 'ro'}"
    return sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS, isolation_level=None)


def _report_journal(db: sqlite3.Connection, requeued: int, show: bool) -> Report:
    """What the command tells, as JSON prints it."""
    db.execute("BEGIN")  # one moment's view, though a server writes meanwhile
    counts = dict(db.execute("SELECT state, COUNT(*) FROM messages GROUP BY state"))
    waiting = [_report_row(row, show) for row in read_rows(db, WAITING)]
    return {"requeued": requeued, "waiting": len(waiting), "finished": counts.get(FINISHED, 0),
            "dead": counts.get(DEAD, 0), "oldest_waiting": waiting[0] if waiting else None,
            "waiting_messages": waiting if show else None,
            "dead_messages": [_report_row(row, show) for row in read_rows(db, DEAD)]}


def _report_row(row: Row, show: bool) -> Report:
    told: Report = {"key": row.key, "received": row.received, "tries": row.tries, "error": row.error}
    return {**told, "content": row.payload.decode("utf-8", "backslashreplace")} if show else told


def _format_report(report: Report, now: float) -> str:
    """The report for people."""
    put_back = f"{report['requeued']} put back, to be handled when the server starts the next time"
    lines = [put_back] if report["requeued"] else []
    lines += [f"{name:<9}{report[name]:>7}" for name in ("waiting", "finished", "dead")]
    waiting = report["waiting_messages"] or [report["oldest_waiting"]]
    lines += [f"waiting for {now - row['received']:.0f} s: {_format_row(row)}" for row in waiting if row]
    lines += [f"dead: {_format_row(row)}" for row in report["dead_messages"]]
    return "\n".join(lines)


def _format_row(row: Report) -> str:
    """One message; characters that could steer a terminal are written as escapes."""
    error, content = row["error"] and f", {row['error']}", row.get("content", "")
    first = printable(f"{row['key']} received {_format_time(row['received'])}{error}")
    return first + (content and f"\n    {printable(content)}")


def _format_time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


# ---- 21 Command line ------------------------------------------------------------------------------------------------
# Law: arguments and environment in, an exit status out. Knows all, and is known by none.


def read_setting(name: str, text: str) -> Any:
    """The value that a text on the command line or in the environment means for a setting. Raises `SettingsError`."""
    field = SETTING_FIELDS[name]
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    convert: Mapping[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str,
                                                   "bool": lambda word: words[word.strip().lower()]}
    try:
        value = convert[str(field.type)](text)
    except (ValueError, KeyError):
        value = text  # of the wrong type, as the check says
    check_setting(field, value)
    return value


def read_settings(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings: an argument beats the environment, which beats the default. Raises `SettingsError`."""
    given = {name: environment.get(f"KF_{name.upper()}") or None for name in SETTING_FIELDS}
    given.update({name: text for name, text in arguments.items() if name in SETTING_FIELDS and text is not None})
    return Settings(**{name: read_setting(name, text) for name, text in given.items() if text is not None})


class Command(NamedTuple):
    """A command behind the program's name: its parser, and what runs it and gives the exit status."""

    build_parser: Callable[[], argparse.ArgumentParser]
    run: Callable[[argparse.Namespace], int]


def find_command(arguments: Sequence[str]) -> Tuple[Command, Sequence[str]]:
    """The command that the arguments begin with, and the rest of them; to serve, if they begin with none.

    Raises `SettingsError` for a word that is no command, and suggests a near one.
    """
    commands = {"serve": Command(build_parser, serve), "push": Command(build_push_parser, push),
                "chat": Command(build_chat_parser, chat), "journal": Command(build_journal_parser, journal_command)}
    if not arguments or arguments[0].startswith("-"):
        return commands["serve"], arguments
    if arguments[0] in commands:
        return commands[arguments[0]], arguments[1:]
    near = difflib.get_close_matches(arguments[0], commands, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(commands)}"
    raise SettingsError(f"no command {arguments[0]!r}: {hint}")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the serving command: an option for each setting, kept as text for `read_setting`."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py", allow_abbrev=False, usage="kfserver.py [serve|push|chat|journal] [options]",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=24, width=110),
        description="Receives the customer-service messages of Baidu smart mini-programs.",
        epilog="Each option is also read from the environment: --max-body as KF_MAX_BODY. "
               "Each command has a --help of its own.")
    parser.add_argument("--version", action="version", version=f"kfserver {__version__}")
    parser.add_argument("--check", action="store_true", help="load everything, print the handlers, and exit")
    for field in SETTING_FIELDS.values():
        option, text = f"--{field.name.replace('_', '-')}", field.metadata["help"].replace("%", "%%")
        if str(field.type) == "bool":
            parser.add_argument(option, action="store_const", const="true", help=text)
        else:
            default = "" if field.default == "" else f" ({field.default})"
            parser.add_argument(option, metavar="", help=text + default)
    return parser


class JsonFormatter(logging.Formatter):
    """A log record as one JSON object: time (RFC 3339), level, message, and the push's values each by its name."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        values = record.args if isinstance(record.args, dict) else {}
        line = {str(name): value for name, value in values.items()}
        line.update(time=datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc).isoformat(),
                    level=record.levelname.lower(), message=record.getMessage())
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _set_up_logging(settings: Settings) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])


def serve(arguments: argparse.Namespace) -> int:
    """Run the server until a signal ends it; 0 if every message was handled, 1 if some were left undone."""
    settings = read_settings(vars(arguments), os.environ)
    _set_up_logging(settings)
    handlers = ReloadingHandlers(settings.handlers)
    if arguments.check:
        check_parts(settings)
        print("\n".join(describe_handlers(handlers)))
        return 0
    signals = _catch_signals()
    server = KfServer(handlers.registry, settings).start()
    # In one write: what handlers print must not come between.
    print("\n".join([f"kfserver {__version__} listening on {server.url}", *describe_handlers(handlers),
                     *_advice(settings, os.environ)]), flush=True)
    if settings.reload:
        watch_handlers(server, handlers, Alarm().later)
    _wait_for_signal(signals)
    return _shut_down(server)


def check_parts(settings: Settings) -> None:
    """Raise `SettingsError` for a part that could not be made, without touching the port or the journal."""
    if settings.redis:
        connect_redis(settings.redis)
    if settings.tls_cert:
        make_tls_context(settings)


def describe_handlers(handlers: ReloadingHandlers) -> List[str]:
    """How many handlers there are, from where, and each, in lines."""
    if not handlers.path:
        return ["0 handlers: no handlers.py here; every message is answered and dropped"]
    count = len(handlers.registry)
    return [f"{count} handlers from {handlers.path}", *(f"  {rule}" for rule in handlers.registry.rules)]


def _advice(settings: Settings, environment: Iterable[str]) -> Iterator[str]:
    known = [f"KF_{name.upper()}" for name in SETTING_FIELDS]
    for name in sorted(set(environment) - set(known)):
        if name.startswith("KF_"):
            near = difflib.get_close_matches(name, known, n=1)
            yield f"{name} in the environment is no setting" + (f": did you mean {near[0]}?" if near else "")
    if not settings.token:
        yield "no token is set: anyone who reaches this port can push; set --token (KF_TOKEN)"
    if not (settings.app_key or settings.access_token):
        yield "no --app-key is set: what handlers return is not sent to users"


def _catch_signals() -> queue.SimpleQueue[int]:
    """A queue that gets the first signal to end; a second one ends the process at once."""
    # Of all that threads can wait for, only this queue may safely be told from inside a signal's handler.
    signals: queue.SimpleQueue[int] = queue.SimpleQueue()
    caught = [signal.SIGTERM, signal.SIGINT]
    hang_up = getattr(signal, "SIGHUP", None)  # of a terminal that closes; ignored under nohup
    if hang_up and signal.getsignal(hang_up) is not signal.SIG_IGN:
        caught.append(hang_up)

    def first(number: int, frame: object) -> None:
        for each in caught:
            signal.signal(each, lambda number, frame: os._exit(1))
        signals.put(number)
    for each in caught:
        signal.signal(each, first)
    return signals


def _wait_for_signal(signals: queue.SimpleQueue[int]) -> None:
    # Now and then awake: a signal in the moment before a wait is only noticed at its end.
    while True:
        with contextlib.suppress(queue.Empty):
            signals.get(timeout=1.0)
            return


def _shut_down(server: KfServer) -> int:
    log.info("shutting down: %g s for the messages that wait; a second signal ends at once", server.settings.grace)
    undone = server.stop()
    for key in undone:
        log.warning("left undone: key=%s", key)
    return 1 if undone else 0


def _accept_any_character() -> None:
    """What the input's encoding does not know is read as U+FFFD, what the output's does not know is printed escaped."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The whole program, with the command line's arguments or others; the exit status."""
    _accept_any_character()
    try:
        command, rest = find_command(sys.argv[1:] if arguments is None else arguments)
        return command.run(command.build_parser().parse_args(rest))
    except SettingsError as error:
        print(f"kfserver: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells count it: 128 and the signal's number
    except BrokenPipeError:  # who read our output has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still to be flushed
        return 141


if __name__ == "__main__":
    # handlers.py imports this module by its name: without the alias it would get a second copy of every class.
    sys.modules["kfserver"] = sys.modules["__main__"]
    sys.exit(main())
