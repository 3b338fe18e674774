"""kfserver: receives the customer-service messages of Baidu smart mini-programs.

The platform POSTs every message of a user to one URL, waits two seconds for the
answer ``success``, and sends again what was not answered so. This module checks
where a push comes from, answers at once, drops repeats, and hands each message
once, in order, to plain Python functions in a registry. One file, the standard
library alone, CPython 3.7 or later:

    python3 kfserver.py --port 8080

The path of one push:

    bytes -> PushServer -> Request -> Endpoint -> Response -> bytes
                                         |
                                         v
                        Inbox: claim, journal, one mailbox a sender
                                         |
                                         v
                        HandlerRegistry -> handler(message) -> SendApi

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
    10 Journal
    11 Shared claims
    12 Replies
    13 Dispatcher
    14 Inbox
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
import importlib.util
import inspect
import io
import itertools
import json
import logging
import operator
import os
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
from types import MappingProxyType, ModuleType, TracebackType
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
    """A push is refused with ``status``; ``advice`` tells the operator, in the log, what can be done about it.

    The sender is told the reason, or ``public`` instead where there is one.
    """

    status = 400
    public = ""
    advice = ""

    def __init__(self, reason: str, advice: str = "", status: int = 0) -> None:
        super().__init__(reason)
        self.advice = advice or self.advice
        self.status = status or self.status


class MalformedPush(PushError):
    """Not XML or JSON, or not shaped like a message: 400, and why."""


class ForbiddenPush(PushError):
    """Not provably from the platform: 403, with one text whatever the reason, so that the answer teaches nothing."""

    status = 403
    public = "forbidden"


class Busy(PushError):
    """Our fault: the message cannot be taken now. 503; nothing is claimed, so a retry is accepted."""

    status = 503


class BeingTaken(Busy):
    """The same message is just being taken by another thread or instance, which may yet refuse it."""


class JournalError(Busy):
    """The journal cannot be written."""

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
    """The error's traceback for the log, with `describe_error` in place of its text, which may hold a user's words."""
    return KfError, KfError(describe_error(error)), error.__traceback__


def attempt(function: Callable[..., object], *arguments: Any) -> Optional[BaseException]:
    """Call what may fail in any way; the error that it raised, or None. The only place where everything is caught:
    sys.exit() in a handler must not end a worker. Ctrl-C passes: Python raises it in the main thread alone."""
    try:
        function(*arguments)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        return error
    return None


def guard(function: Callable[..., object], *arguments: Any) -> bool:
    """Call a part of our own that must not end the thread it runs on; whether it went well."""
    error = attempt(function, *arguments)
    if error:
        report_bug(error)
    return error is None


def report_bug(error: BaseException, more: str = "") -> None:
    """Tell of an error that should not be; ``more`` ends the line."""
    log.error("an error inside kfserver; please report this%s", more, exc_info=exc_info_of(error))


# Seconds between two lines of one kind in the log: an attacker must not be able to fill it.
TELL_SECONDS = 60.0
# Kinds that are remembered; there are a few dozen, so that more would be a mistake of ours.
MAX_KINDS = 1000


class Teller:
    """Tells the log about each kind of thing at most once a minute, and then how often it was left out before.

    ``timer`` gives seconds from anywhere. There is no lock: when two threads tell of one kind at the same moment, both
    lines may be written.
    """

    def __init__(self, timer: Callable[[], float]) -> None:
        self._timer = timer
        self._told: Dict[str, Tuple[float, int]] = {}  # of each kind: when it was told, how often it was left out since

    def warn(self, kind: str, text: str, *arguments: object) -> None:
        """Log a warning, unless one of this kind was logged in the last minute. The arguments are put into the text."""
        more = self._count(kind)
        if more is not None:
            log.warning(text + "%s", *arguments, more)

    def report_bug(self, error: BaseException) -> None:
        """Tell of an error that should not be. Its kind is its type, and the line that raised it."""
        more = self._count(type(error).__name__ if isinstance(error, KfError) else describe_error(error))
        if more is not None:
            report_bug(error, more)

    def guard(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Call what must not end the thread it runs on; whether it went well. Not even telling of an error raises."""
        error = attempt(function, *arguments)
        if error:
            attempt(self.report_bug, error)
            error.__traceback__ = None  # which up to Python 3.10 leads back to this frame: a cycle
        return error is None

    def _count(self, kind: str) -> Optional[str]:
        """What to add to the line, if it is time for one; None if not."""
        now = self._timer()
        when, left_out = self._told.get(kind, (now - TELL_SECONDS, 0))
        if now - when < TELL_SECONDS:
            self._told[kind] = when, left_out + 1
            return None
        if len(self._told) >= MAX_KINDS:
            self._told.clear()
        self._told[kind] = now, 0
        return f" ({left_out} more like this since the last such line)" if left_out else ""


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
        for is_wrong, name, rule in (
                (not re.fullmatch(r"(/[!\"$->@-~]*)?", self.path), "path",
                 "must start with '/', as in /kf, and be written as in URLs: percent-encoded, without '?' and '#'"),
                (self.app_key and not self.app_secret, "app_key", "goes together with --app-secret"),
                (self.app_secret and not self.app_key, "app_secret", "goes together with --app-key"),
                (not _is_base(self.api_base), "api_base", "takes an address like https://openapi.baidu.com"),
                (self.app_key and self.access_token, "access_token", "replaces --app-key and --app-secret: set either"),
                (self.third_party and not self.access_token, "third_party", "needs --access-token, the app's"),
                (self.tls_key and not self.tls_cert, "tls_key", "needs --tls-cert, the certificate that it belongs to"),
                (self.admin and not _is_address(self.admin), "admin", "takes an address and a port, as 127.0.0.1:9090"),
                (self.aes_key and not re.fullmatch("[A-Za-z0-9+/]{43}", self.aes_key), "aes_key",
                 "takes the 43 characters that the console shows"),
                (self.aes_key and not (self.token and self.app_id), "aes_key",
                 "needs --token and --app-id too: all three prove a push")):
            if is_wrong:
                raise SettingsError(f"{setting_names(name)} {rule}")


def _is_base(text: str) -> bool:
    """Whether the text is the address of a server, maybe with a path, and nothing else."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (raises ValueError for what is no port)
    except ValueError:
        return False
    return bool(re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", text) and parts.hostname)


def _is_address(text: str) -> bool:
    return bool(re.fullmatch(r"\S*:\d{1,5}", text)) and int(text.rpartition(":")[2]) < 65536


SETTING_FIELDS: Mapping[str, dataclasses.Field[Any]] = MappingProxyType(
    {field.name: field for field in dataclasses.fields(Settings)})


def setting_names(name: str) -> str:
    """How a user writes the setting: ``--max-body (KF_MAX_BODY)``."""
    return f"--{name.replace('_', '-')} (KF_{name.upper()})"


def check_setting(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise `SettingsError` unless the setting takes the value."""
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    kinds, words = {"int": ((int,), "a whole number"), "float": ((int, float), "a number"),
                    "bool": ((bool,), "true or false"), "str": ((str,), "text")}[str(field.type)]
    good = isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))
    if low is not None:
        words += f" from {low:g} to {high:g}" if high is not None else f", {low} or more"
        good = good and low <= value <= (float("inf") if high is None else high)
    if choices:
        words = "one of " + ", ".join(choices)
        good = good and value in choices
    if not good:
        shown = f", not {value!r}" if field.repr else ""
        raise SettingsError(f"{setting_names(field.name)} takes {words}{shown}")


# Characters that a number in a push may have. 64-bit ids have 20; arithmetic on thousands of digits is slow.
MAX_NUMBER = 64


class Request(NamedTuple):
    """One HTTP request, whichever server read it. ``query`` is raw, without the question mark.

    ``problem`` says why what came could not be read as a request; it is then answered by that.
    """

    method: str
    path: str
    query: str = ""
    body: bytes = b""
    problem: Optional[PushError] = None


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


def _field(name: str, text: str) -> Any:
    """An attribute of `Message`: the text of one of its fields."""
    return property(lambda message: message.text(name), doc=text)


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

    to_user_name: str = _field("ToUserName", "The mini-program's app id.")
    from_user_name: str = _field("FromUserName", "The sender's openid; empty for events that have no sender.")
    content: str = _field("Content", "What the user wrote, to the letter; empty for what is no text.")
    pic_url: str = _field("PicUrl", "The address of the picture; empty for what is no image.")

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
        self._forward: _Way = (keys, [box.translate(_multiples(factor)) for factor in (2, 3, 1, 1)], box, 1)
        unmix = [_multiples(factor) for factor in (14, 11, 13, 9)]
        # The equivalent inverse cipher (FIPS 197, section 5.3.5) has the same shape as the cipher, with unmixed keys.
        keys = [keys[-1], *(_mix(each, unmix) for each in keys[-2:0:-1]), keys[0]]
        self._backward: _Way = (keys, [inverse.translate(factor) for factor in unmix], inverse, -1)

    def decrypt(self, data: bytes) -> bytes:
        """Whole blocks in, as many out."""
        return _add(_run_rounds(data, self._backward), self._iv + data[:-AES_BLOCK])

    def encrypt(self, data: bytes) -> bytes:
        """Whole blocks in, as many out."""
        blocks = [self._iv]
        for start in range(0, len(data), AES_BLOCK):
            blocks.append(_run_rounds(_add(data[start:start + AES_BLOCK], blocks[-1]), self._forward))
        return b"".join(blocks[1:])


# What the rounds need one way: round keys as planes, the mixing tables, the last substitution, the rows' shift.
_Way = Tuple[List[bytes], List[bytes], bytes, int]


def _run_rounds(data: bytes, way: _Way) -> bytes:
    round_keys, mixing, last, shift = way
    count = len(data) // AES_BLOCK
    keys = [b"".join(key[place:place + 1] * count for place in range(AES_BLOCK)) for key in round_keys]
    state = _add(_to_planes(data), keys[0])
    for key in keys[1:-1]:
        state = _add(_mix(_shift_rows(state, shift * count), mixing), key)
    return _from_planes(_add(_shift_rows(state, shift * count).translate(last), keys[-1]))


def _to_planes(data: bytes) -> bytes:
    # A block is written column by column, four bytes each.
    return b"".join(data[4 * column + row::AES_BLOCK] for row in range(4) for column in range(4))


def _from_planes(state: bytes) -> bytes:
    data, count = bytearray(len(state)), len(state) // AES_BLOCK
    for plane in range(AES_BLOCK):
        row, column = divmod(plane, 4)
        data[4 * column + row::AES_BLOCK] = state[plane * count:(plane + 1) * count]
    return bytes(data)


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

_STRIP = operator.methodcaller("strip", BLANKS)

# Fields whose own blanks count: a user wrote the one, and a signature covers the other.
VERBATIM = frozenset(("Content", "Encrypt"))

_XML_PROLOG = re.compile(rb"(?:<\?xml\s[^>]*\?>)?\s*<[^!?]")
_XML_ENCODING = re.compile(rb"<\?xml\s[^>]*?\sencoding\s*=\s*[\"']([^\"']*)")
_XML_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r"))
_LONG_TAG = re.compile(rb"<[^!?<>][^<>]{1024}")
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
            return {name: _map_texts(lambda text: text.translate(show), value, 1)  # noqa: B023
                    for name, value in fields.items()}
    raise MalformedPush("XML with control characters, and with every character that could stand for them")


def _read_tree(body: bytes) -> Dict[str, Any]:
    # With the standard builder alone the parser stays within C, which takes 2 us less.
    builder = _StrictTree() if b"<?" in body[2:] else ElementTree.TreeBuilder()
    parser = ElementTree.XMLParser(target=builder, encoding="utf-8")
    try:
        parser.feed(body)
        root: ElementTree.Element = parser.close()
    except ElementTree.ParseError as error:
        raise MalformedPush(f"not XML: {ErrorString(error.code)} at line {error.position[0]}") from None
    # Without these two characters a name has no namespace.
    if (b":" in body or b"=" in body) and any("{" in name for each in root.iter() for name in (each.tag, *each.keys())):
        raise MalformedPush("XML with namespaces is not accepted")
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
        if tag not in values:
            values[tag] = value
        elif isinstance(values[tag], list):
            values[tag].append(value)
        else:
            values[tag] = [values[tag], value]
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
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise MalformedPush("not JSON: half of a surrogate pair, which cannot be stored or sent on") from None
    return {name: value if name in VERBATIM and isinstance(value, str) else _map_texts(_STRIP, value, 1)
            for name, value in fields.items()}


def _map_texts(function: Callable[[str], str], value: Any, depth: int) -> Any:
    """The value with every text in it replaced; other scalars of JSON become the text that XML would have brought."""
    if isinstance(value, str):
        return function(value)
    if not isinstance(value, (dict, list)):
        return {True: "true", False: "false", None: ""}[value]
    if depth >= MAX_DEPTH:
        raise MalformedPush(f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {name: _map_texts(function, item, depth + 1) for name, item in value.items()}
    return [_map_texts(function, item, depth + 1) for item in value]


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


Fields = Mapping[str, Union[str, int]]
Encode = Callable[[Fields], bytes]


def encode_xml(fields: Fields) -> bytes:
    """The fields laid out as on the platform's pages: text in CDATA, numbers bare."""
    lines = [f"   <{name}>{_to_xml(value)}</{name}>" for name, value in fields.items()]
    return "\n".join(("<xml>", *lines, "</xml>")).encode("utf-8", "surrogateescape")


def _to_xml(value: Union[str, int]) -> str:
    # The end of a section cannot stand in one, so it is parted between two.
    return str(value) if isinstance(value, int) else f"<![CDATA[{value.replace(']]>', ']]]]><![CDATA[>')}]]>"


def encode_json(fields: Fields) -> bytes:
    """The fields laid out as on the platform's pages, one a line; characters as they are, not escaped, to be read."""
    return json.dumps(fields, ensure_ascii=False, indent=2).encode("utf-8", "surrogateescape")


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
                if self._held[key]:
                    return False
                raise BeingTaken("the same message is just being taken")
            self._make_room()
            self._held[key] = False
            return True

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
        shown = ", ".join([repr(msg_type), *map(_show_pattern, patterns)])

        def register(function: HandlerT) -> HandlerT:
            counts = {getattr(pattern, "groups", 0) for pattern in patterns} or {0}
            _check_handler(function, f"@registry.on({msg_type!r})", counts)
            for pattern in patterns:
                if isinstance(pattern, str):
                    self._equal.setdefault((msg_type, pattern.strip()), function)
                else:
                    self._expressions.setdefault(msg_type, []).append((pattern, function))
            if not patterns:
                self._types.setdefault(msg_type, function)
            self._rules.append((function, f"@registry.on({shown}) -> {getattr(function, '__name__', repr(function))}"))
            return function
        return register

    def on_error(self, function: HandlerT) -> HandlerT:
        """Decorator: the function gets ``(message, error)`` when the last try of a message has failed."""
        _check_handler(function, "@registry.on_error", {1})
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
        failed = [attempt(function, message, error) for function in self._error_handlers]
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


def _show_pattern(pattern: object) -> str:
    """How a pattern is written. Raises `HandlerError` for what is none."""
    if isinstance(pattern, str):
        return repr(pattern)
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return f're.compile(r"{pattern.pattern}")'
    raise HandlerError('a pattern is a text or an expression: write @registry.on("text", "menu") or '
                       f'@registry.on("text", re.compile(r"order (\\d+)")), not {type(pattern).__name__}')


def _check_handler(function: object, decorator: str, further: Iterable[int]) -> None:
    """Raise `HandlerError` unless this is a plain function that takes a message and so many arguments behind it."""
    name = getattr(function, "__name__", "answer")
    if not callable(function):
        raise HandlerError(f"{decorator} stands above a function: write it on the line before 'def answer(message):'")
    called = function
    if not inspect.isroutine(function):  # a partial, or an object that can be called
        called = getattr(function, "func", inspect.getattr_static(type(function), "__call__"))
    if inspect.iscoroutinefunction(called) or inspect.isasyncgenfunction(called):
        raise HandlerError(f"handlers are plain functions: write 'def {name}(message):' without async")
    for count in further:
        try:
            inspect.signature(function).bind(*range(1 + count))
        except TypeError:
            raise HandlerError(f"{name} is called with the message and {count} more: one for each group of the "
                               "expression, the error for on_error; give it as many parameters") from None
        except ValueError:
            return  # some functions written in C do not tell


# ---- 8 Endpoint -----------------------------------------------------------------------------------------------------
# Law: one request in, one response out, and every decision that the outside can see on one screen, `Endpoint._decide`.
# Knows no socket and no thread; what takes the messages, and the clocks, are handed in.

# Bytes of a form-encoded handshake: four short values. A longer body is no handshake.
MAX_HANDSHAKE = 4096
# Seconds between two warnings with the same advice: an attacker shall not be able to fill the log with them.
ADVICE_INTERVAL = 60.0
# The platform's page writes the first; receivers in production have met the second.
_ECHO_NAMES = ("echoStr", "echostr")
# A message's signature, by its name in the query and by that in an envelope which carries it itself.
_SIGNATURE_FIELDS: Mapping[str, str] = MappingProxyType(
    {"msg_signature": "MsgSignature", "timestamp": "TimeStamp", "nonce": "Nonce"})
TOO_LARGE = "raise --max-body if the platform really sends this much"
_METHODS = (("Allow", "GET, HEAD, POST"),)  # RFC 9110, section 15.5.6
_LATER = (("Retry-After", "1"),)

UP = Response(200, b"kfserver is up: pushes go here by POST\n", "up")
ACCEPTED = Response(200, b"success", "accepted")
REPEATED = Response(200, b"success", "repeat")


def refusal(error: PushError) -> Response:
    """The answer that an error stands for."""
    headers = {405: _METHODS, 503: _LATER}.get(error.status, ())
    return Response(error.status, f"{error.public or error}\n".encode(), f"refused {error.status}: {error}", headers)


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
            inside = {name: str(outer.get(wire, "")) for name, wire in _SIGNATURE_FIELDS.items()}
            self._prove_sealed(query if "msg_signature" in query else inside, sealed)
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


class Platform:
    """Signs and seals pushes as the platform does: the other side of a `Gate`, to play it and to test with.

    ``random`` makes so many bytes that nobody can foretell. What is made is a query and a body.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float], random: Callable[[int], bytes]) -> None:
        self._token, self._app_id, self._clock, self._random = settings.token, settings.app_id, clock, random
        self._envelope = Envelope(settings.aes_key, settings.app_id) if settings.aes_key else None

    def _signed(self, **more: str) -> Dict[str, str]:
        timestamp, nonce = str(int(self._clock())), self._random(4).hex()
        return {"signature": sign(self._token, timestamp, nonce), "timestamp": timestamp, "nonce": nonce, **more}

    def push(self, message: bytes, encode: Encode, in_body: bool = False) -> Tuple[Dict[str, str], bytes]:
        """A message: as it is, or sealed in an envelope that ``encode`` writes, signed in the query or in the body."""
        if not self._envelope:
            return self._signed() if self._token else {}, message
        sealed, query = self._envelope.seal(message, self._random(RANDOM_HEAD)), self._signed()
        query["msg_signature"] = sign(self._token, query["timestamp"], query["nonce"], sealed)
        if not in_body:
            return query, encode({"ToUserName": self._app_id, "Encrypt": sealed})
        return {}, encode({"Encrypt": sealed, **{wire: query[name] for name, wire in _SIGNATURE_FIELDS.items()}})

    def handshake(self, in_body: bool = False) -> Tuple[Dict[str, str], bytes]:
        """A handshake, in the query or form-encoded in the body; its echoStr answers it."""
        values = self._signed(echoStr=str(int.from_bytes(self._random(8), "big")))
        return ({}, urlencode(values).encode()) if in_body else (values, b"")


class _Push:
    """A request on its way to its response, and the message in it."""

    __slots__ = ("request", "started", "response", "message", "payload", "too_soon")

    def __init__(self, request: Request, started: float) -> None:
        self.request, self.started = request, started
        self.response = UP
        self.message: Optional[Message] = None
        self.payload = b""
        self.too_soon = False  # it repeats what is just being taken


class Endpoint:
    """Answers requests, and never waits for a handler of the user's.

    ``inbox`` is an `Inbox`, or what has its methods `take`, `deliver` and `observe`. ``clock`` gives Unix seconds,
    ``timer`` seconds from anywhere.
    """

    def __init__(self, settings: Settings, inbox: Any, clock: Callable[[], float], timer: Callable[[], float]) -> None:
        self._settings, self._inbox, self._timer = settings, inbox, timer
        self._gate = Gate(settings, clock)
        self._advised: Dict[str, float] = {}

    def handle(self, request: Request) -> Response:
        """The answer to one request."""
        return self.handle_all((request,))[0]

    def handle_all(self, requests: Iterable[Request]) -> List[Response]:
        """The answers to requests that came together: what must be written down to be safe is written at once. What
        repeats another of them is decided again when that one is safe."""
        pushes = [_Push(request, self._timer()) for request in requests]
        self._handle(pushes)
        self._handle([push for push in pushes if push.too_soon])
        for push in pushes:
            self._record(push)
        return [push.response for push in pushes]

    def _handle(self, pushes: Sequence[_Push]) -> None:
        for push in pushes:
            error = attempt(self._decide, push)
            if error:
                self._refuse(push, error)
        taken = [push for push in pushes if push.response is ACCEPTED]
        error = attempt(self._inbox.deliver, [(push.message, push.payload) for push in taken]) if taken else None
        if error:
            for push in taken:
                self._refuse(push, error)

    def _decide(self, push: _Push) -> None:
        """The README's answers table, in its order: every decision that the outside can see."""
        request = push.request
        self._admit(request)                                                # 404, 405, 413, and what is no HTTP
        query = _parse_form(request.query)
        handshake = _find_handshake(query, request.body)
        if handshake:
            self._gate.prove(handshake)                                     # 403
            push.response = Response(200, _echo(handshake), "handshake")
        elif request.method == "POST":
            push.payload = self._gate.open(query, request.body)             # 403
            push.message = parse(push.payload)                              # 400
            is_new = self._inbox.take(push.message)                         # 503
            push.response = ACCEPTED if is_new else REPEATED

    def _admit(self, request: Request) -> None:
        if request.problem:
            raise request.problem
        if self._settings.path and request.path != self._settings.path:
            raise PushError("no such path", "the URL in the platform's console must have the path that --path names",
                            404)
        if request.method not in ("POST", "GET", "HEAD"):
            raise PushError("pushes come by POST", status=405)
        if len(request.body) > self._settings.max_body:
            raise PushError(f"more than {self._settings.max_body} bytes", TOO_LARGE, 413)

    def _refuse(self, push: _Push, error: BaseException) -> None:
        """Answer with the error; its advice goes to the log, at most once a minute."""
        if not isinstance(error, PushError):
            report_bug(error)
            error = Busy("an error inside kfserver")
        last = self._advised.get(error.advice, -ADVICE_INTERVAL)
        if error.advice and self._timer() - last >= ADVICE_INTERVAL:
            self._advised[error.advice] = self._timer()
            log.warning("push refused: %s; %s", error, error.advice)
        push.response, push.too_soon = refusal(error), isinstance(error, BeingTaken)

    def _record(self, push: _Push) -> None:
        if push.response is UP:
            return
        seconds = self._timer() - push.started
        self._inbox.observe(push.response, push.message, seconds)
        if log.isEnabledFor(logging.INFO):
            kind, key = (push.message.msg_type, push.message.key) if push.message else ("-", "-")
            log.info("push type=%(type)s key=%(key)s outcome=%(outcome)s ms=%(ms).2f", {
                "type": ascii(kind[:64])[1:-1], "key": key or "-", "outcome": push.response.outcome,
                "ms": seconds * 1000})


def _parse_form(text: str) -> Dict[str, str]:
    """Form-encoded text, a character for each byte that came, as a dict; of a name that stands twice, the last.
    Bytes that are not UTF-8 survive `_echo`."""
    if "%" not in text and "+" not in text and text.isascii():  # as in every signed push: parse_qsl takes 3 us longer
        return {name: value for name, _, value in (pair.partition("=") for pair in text.split("&"))}
    text = text.encode("latin-1", "replace").decode("ascii", "surrogateescape")
    return dict(parse_qsl(text, keep_blank_values=True, errors="surrogateescape"))


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
        self._render, self._trouble = render, trouble

    def handle_all(self, requests: Iterable[Request]) -> List[Response]:
        """The answers to requests, as `Endpoint` gives them."""
        return [self.handle(request) for request in requests]

    def handle(self, request: Request) -> Response:
        """The answer to one request."""
        if request.problem:
            return refusal(request.problem)
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET here\n", "refused", (("Allow", "GET, HEAD"),))
        if request.path == "/healthz":
            trouble = self._trouble()
            return Response(503 if trouble else 200, (trouble or "ok").encode() + b"\n", "health")
        if request.path == "/metrics":
            return Response(200, self._render().encode(), "metrics")
        return Response(404, b"/healthz and /metrics are here\n", "refused")


# ---- 10 Journal -----------------------------------------------------------------------------------------------------
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

# A statement and its values.
Change = Tuple[str, Sequence[Any]]
# Runs a job once, so many seconds from now.
Later = Callable[[float, Callable[[], None]], None]


class Row(NamedTuple):
    """A message in the journal. ``received`` in Unix seconds; ``payload`` is empty once the message is finished."""

    key: str
    tries: int
    received: float
    payload: bytes
    error: str


class Journal:
    """The messages that were acknowledged, in the SQLite file ``settings.journal``, which one process has at a time.

    Raises `SettingsError` for a file that cannot be used. ``clock`` gives Unix seconds.
    """

    def __init__(self, settings: Settings, later: Later, clock: Callable[[], float] = time.time) -> None:
        import sqlite3
        self._settings, self._later, self._clock = settings, later, clock
        self._path = os.path.realpath(settings.journal)  # handlers may change the current folder
        self._connect = functools.partial(sqlite3.connect, isolation_level=None, check_same_thread=False,
                                          timeout=LOCK_SECONDS)
        self._errors = (sqlite3.Error, OSError, SettingsError)
        self._lock = threading.Lock()  # guards all below, and the file
        self._marks: Deque[Change] = deque()  # what became of messages and is not yet written; appended to without it
        self._finished = 0  # since the last clean-up
        self._failing = self._closed = False
        _refuse_foreign_file(self._path)
        self._db = self._guard = self._take_hold()
        try:
            self._open()
            self._db.execute("SELECT 1 FROM messages LIMIT 1")
            found, = self._db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise OSError(found)
        except self._errors as error:
            self._db.close()
            self._guard.close()
            raise SettingsError(f"cannot use the journal {settings.journal}: {error}; "
                                "move it away, or name another --journal") from error

    def _take_hold(self) -> sqlite3.Connection:
        """Hold the right to write until the process ends, however it ends: the system frees the lock."""
        try:
            guard = self._connect(self._path + "-lock", timeout=0)
        except self._errors as error:
            raise SettingsError(f"cannot use the journal {self._path}: {error}; make its folder, and let this user "
                                "write there, or name another --journal") from error
        try:
            guard.execute("BEGIN EXCLUSIVE")
        except self._errors:
            guard.close()
            raise SettingsError(f"the journal {self._path} is in another process's hands: stop that one, "
                                "or name another --journal") from None
        return guard

    def _open(self) -> None:
        """Open the file, and make it if there is none."""
        _refuse_foreign_file(self._path)
        self._db = self._connect(self._path)
        if not self._db.execute("PRAGMA application_id").fetchone()[0]:
            # Before the switch to WAL: the head of the file itself must say whose it is from the first moment.
            for statement in ("BEGIN", _CREATE, f"PRAGMA application_id = {JOURNAL_ID}",
                              f"PRAGMA user_version = {JOURNAL_VERSION}", "COMMIT"):
                self._db.execute(statement)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute(f"PRAGMA synchronous = {self._settings.journal_sync}")
        self._inode = os.stat(self._path).st_ino

    def add(self, messages: Iterable[Tuple[str, bytes]]) -> None:
        """Write down messages, each its key and its bytes, in one commit: all of them, or none and `JournalError`."""
        now = self._clock()
        with self._lock:
            error = self._write([(_ADD, (key, now, payload)) for key, payload in messages])
        if error:
            raise JournalError("the journal cannot be written") from error

    def tried(self, key: str, tries: int) -> None:
        """The message's handler has failed for the ``tries``-th time, and is to be tried again."""
        self._marks.append((_TRIED, (tries, key)))
        self.flush()

    def fail(self, key: str, error: str) -> None:
        """The message's last try has failed; it is kept, with what is known of the error."""
        self._marks.append((_FAIL, (error, key)))
        self.flush()

    def finish(self, key: str) -> None:
        """The message is through, and its content to be forgotten: with the next commit, or by `flush`."""
        self._marks.append((_FINISH, (key,)))

    def flush(self) -> None:
        """Write what became of messages. When the file cannot be written, that is left to the next look at it."""
        with self._lock:
            if self._marks and not self._failing:
                self._write([])

    def _write(self, added: List[Change]) -> Optional[BaseException]:
        """Write all that is marked and what is added, or nothing, and the error that prevented it."""
        if self._closed:
            return JournalError("closed")
        marks = [self._marks.popleft() for _ in range(len(self._marks))]
        error = attempt(self._commit, marks + added)
        if error:
            self._marks.extendleft(reversed(marks))
            self._db.close()
            if not self._failing:
                self._failing = True
                known = isinstance(error, self._errors)
                log.error("the journal %s cannot be written: %s; pushes are answered 503 until it can: "
                          "free the disk, or mend its rights, or move the file away", self._settings.journal,
                          error if known else describe_error(error))
                self._later(LOOK_AGAIN_SECONDS, self._look_again)
        elif self._failing:
            self._failing = False
            log.warning("the journal %s is written again", self._settings.journal)
        return error

    def _commit(self, changes: List[Change]) -> None:
        if self._failing:
            self._open()
        if os.stat(self._path).st_ino != self._inode:
            raise OSError("the file was deleted or replaced")
        self._db.execute("BEGIN IMMEDIATE")
        for sql, values in changes:
            if not self._db.execute(sql, values).rowcount and sql is _FINISH:
                self._db.execute(_REMEMBER, values)
            self._finished += sql is _FINISH
        if self._finished >= TRIM_EVERY:
            self._db.execute(_TRIM, (self._settings.dedup_size,))
            self._finished = 0
        self._db.execute("COMMIT")

    def _look_again(self) -> None:
        """Write what is marked, or nothing, if the file can be written again though no message comes."""
        with self._lock:
            if self._failing and not self._closed and self._write([]):
                self._later(LOOK_AGAIN_SECONDS, self._look_again)

    @property
    def healthy(self) -> bool:
        """Whether the last change could be written."""
        return not self._failing

    def waiting(self) -> List[Row]:
        """The messages that are not through, oldest first."""
        return read_rows(self._db, WAITING)

    def finished_keys(self) -> List[str]:
        """The keys of what is through, oldest first, as many as are remembered."""
        found = self._db.execute("SELECT key FROM messages WHERE state = 1 ORDER BY id DESC LIMIT ?",
                                 (self._settings.dedup_size,))
        return [key for key, in found][::-1]

    def close(self) -> None:
        """Write what is marked, and let go of the file."""
        with self._lock:
            if self._marks:
                self._write([])
            self._closed = True
            self._db.close()
            self._guard.close()


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


# ---- 11 Shared claims -----------------------------------------------------------------------------------------------
# Law: several instances claim as one, through Redis. Works like a `ClaimCache`, and is one when Redis is away.

# Milliseconds that a claim lives until its message is safe, and that a message is remembered from then on.
CLAIM_MS = 60 * 1000
REMEMBER_MS = 24 * 60 * 60 * 1000
# Seconds for Redis to answer, and to leave it alone when it did not.
REDIS_TIMEOUT = 0.1
REDIS_PAUSE = 1.0

# A key's value is the owner's name, with "+" before it once the message is accepted. Only the owner may release it: the
# claim may have run out meanwhile, and be another instance's.
_RELEASE = """local value = redis.call('get', KEYS[1])
    if value == ARGV[1] or value == '+' .. ARGV[1] then redis.call('del', KEYS[1]) end"""


class SharedClaims:
    """`ClaimCache`'s methods over Redis at ``url``: a claim is one SET NX PX, prolonged to a day when it is accepted.

    ``local`` decides first, and alone when Redis is away or slower than 100 ms. ``timer`` gives seconds from anywhere.
    Raises `SettingsError` without the package, or for a bad address.
    """

    def __init__(self, url: str, local: ClaimCache, timer: Callable[[], float] = time.monotonic) -> None:
        self._local, self._timer = local, timer
        self._redis, self._error = connect_redis(url)
        self._owner = uuid.uuid4().hex
        self._away_until = 0.0  # by the timer; 0 when Redis answers

    def __len__(self) -> int:
        return len(self._local)

    def claim(self, key: str) -> bool:
        """True for exactly one caller on all instances; False for a repeat. Raises `Busy` as a `ClaimCache` does."""
        if not self._local.claim(key):
            return False
        if self._ask(True, "set", _name(key), self._owner, nx=True, px=CLAIM_MS):
            return True
        self._local.release(key)
        if (self._ask(b"", "get", _name(key)) or b"").startswith(b"+"):
            return False
        raise BeingTaken("another instance is just taking the same message")

    def accept(self, key: str) -> None:
        """The claimed message is safe: repeats are dropped by all instances for a day."""
        self._local.accept(key)
        self._remember(key)

    def finish(self, key: str) -> None:
        """The message is through: remembered from now on, also if Redis was away when it was accepted."""
        self._local.finish(key)
        self._remember(key)

    def release(self, key: str) -> None:
        """The message was refused, or failed for good: the same push may come again, to any instance."""
        self._local.release(key)
        self._ask(None, "eval", _RELEASE, 1, _name(key), self._owner)

    def restore(self, key: str) -> None:
        """The message was accepted before a restart, and is in hand again."""
        self._local.restore(key)
        self._remember(key)

    def _remember(self, key: str) -> None:
        self._ask(None, "set", _name(key), "+" + self._owner, px=REMEMBER_MS)

    def _ask(self, otherwise: Any, command: str, *arguments: Any, **options: Any) -> Any:
        """What Redis answers; ``otherwise`` while it is away. It is asked again after a pause."""
        if self._timer() < self._away_until:
            return otherwise
        try:
            answer = getattr(self._redis, command)(*arguments, **options)
        except self._error as error:
            if not self._away_until:  # two threads may find out at once, and both tell
                log.warning("Redis is away (%s): this instance drops only the repeats that it has seen itself; "
                            "check the server behind --redis", type(error).__name__)
            self._away_until = self._timer() + REDIS_PAUSE
            return otherwise
        if self._away_until:
            self._away_until = 0.0
            log.warning("Redis is back: instances share their claims again")
        return answer


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


# ---- 12 Replies -----------------------------------------------------------------------------------------------------
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
# Systems without Unix sockets get a number that no address family has.
UNIX_FAMILY = getattr(socket, "AF_UNIX", -1)

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
    """HTTP with the one server at ``base``, on connections that are kept: as many as requests are under way at once.

    ``base`` is http://… or https://…, perhaps with a path, or unix:PATH. ``tls`` is for https, instead of the default.
    """

    def __init__(self, base: str, timeout: float, tls: Optional[ssl.SSLContext] = None) -> None:
        parts = urlsplit(base)
        self._host, self._prefix = parts.netloc, parts.path.rstrip("/")
        if parts.scheme == "https":
            self._connect: Any = functools.partial(http.client.HTTPSConnection, self._host, timeout=timeout,
                                                   context=tls or ssl.create_default_context())
        elif parts.scheme == "unix":
            self._connect, self._prefix = functools.partial(_UnixConnection, parts.path, timeout=timeout), ""
        else:
            self._connect = functools.partial(http.client.HTTPConnection, self._host, timeout=timeout)
        self._kept: Deque[http.client.HTTPConnection] = deque()
        self._closed = False

    def exchange(self, method: str, path: str, body: bytes = b"", kind: str = "") -> Tuple[int, bytes]:
        """One request, with a body of that Content-Type or without, and its answer: the status and the body, cut at
        MAX_ANSWER. Raises OSError and HTTPException."""
        connection = self._take_kept() or self._connect()
        try:
            connection.request(method, self._prefix + path, body or None, {"Content-Type": kind} if body else {})
            response = connection.getresponse()
            answer = response.read(MAX_ANSWER)
            if response.length and len(answer) < MAX_ANSWER:
                raise http.client.IncompleteRead(answer, response.length)
        except BaseException:
            connection.close()
            raise
        if self._closed or response.will_close or not response.isclosed():
            connection.close()
        else:
            self._kept.append(connection)
        return response.status, answer

    def probe(self) -> None:
        """Connect, and keep the connection for the next request. Raises OSError when nobody listens."""
        connection = self._connect()
        try:
            connection.connect()
        except OSError:
            connection.close()
            raise
        self._kept.append(connection)

    def _take_kept(self) -> Optional[http.client.HTTPConnection]:
        """A kept connection on which the server has said nothing since: what it says unasked is farewell."""
        while self._kept:
            with contextlib.suppress(IndexError):  # another thread may take the last
                connection = self._kept.pop()
                if not _is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def close(self) -> None:
        """Close the connections that are kept, and those in use when they are free."""
        self._closed = True
        with contextlib.suppress(IndexError):  # two threads may be here
            while True:
                self._kept.pop().close()


class _UnixConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(UNIX_FAMILY)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


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
        self._client = HttpClient(settings.api_base, SEND_TIMEOUT)
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
        token = self._get_token("")
        number, words = self._post(token, form)
        if number in _TOKEN_ERRORS and not self._settings.access_token:
            number, words = self._post(self._get_token(token), form)
        if number != "0":
            raise ApiError(number, words)

    def _post(self, token: str, form: str) -> Tuple[str, str]:
        """The platform's number and words for one reply; the number of success is 0."""
        path = THIRD_PARTY_SEND_PATH if self._settings.third_party else SEND_PATH
        answer = self._ask("POST", f"{path}?{urlencode({'access_token': token})}", form)
        number = answer.get("error_code", answer.get("errno", "no errno"))
        return self._clean(number, token), self._clean(answer.get("error_msg") or answer.get("msg") or "", token)

    def _get_token(self, refused: str) -> str:
        """A token that has time left, and is not the refused one: another thread may have fetched one meanwhile."""
        with self._lock:
            if self._token == refused or self._clock() >= self._expires:
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
                status, text = self._client.exchange(method, path, form.encode(), "application/x-www-form-urlencoded")
                answer, problem = _json_or_none(text), f"status {status}"
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


# ---- 13 Dispatcher --------------------------------------------------------------------------------------------------
# Law: when and on which thread something runs, never what: a sender's messages one at a time and in order, different
# senders beside each other. Threads here are daemons: the process decides when it ends.

# Seconds a thread without work is kept.
KEEP_THREAD = 5.0


class Alarm:
    """Runs jobs later, on a thread that is there only while something is due. The jobs must be short."""

    def __init__(self) -> None:
        self._due = sched.scheduler(time.monotonic, self._sleep)
        self._wake = threading.Event()
        self._lock = threading.Lock()  # guards _running, and that nothing is entered while the thread leaves
        self._running = False

    def later(self, seconds: float, job: Callable[[], None]) -> None:
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


class _Job:
    """A message, since when it is here, by the monotonic clock, and how often its handler has failed."""

    __slots__ = ("message", "sender", "since", "tries")

    def __init__(self, message: Message, tries: int) -> None:
        self.message, self.since, self.tries = message, time.monotonic(), tries
        self.sender = message.to_user_name, message.from_user_name


_Mailbox = Deque[_Job]  # the messages of one sender, the first of them in hand
Handle = Callable[[Message, int], Optional[float]]


class Dispatcher:
    """Has each message handled, on up to ``settings.workers`` threads.

    ``handle`` gets a message and how often it has failed; it returns after how many seconds it is to be tried again, or
    None when it is through. ``flush`` is called behind one or more that are. ``later`` is that of an `Alarm`.
    """

    def __init__(self, settings: Settings, handle: Handle, flush: Callable[[], None], later: Later) -> None:
        self._settings, self._handle, self._flush, self._later = settings, handle, flush, later
        self._lock = threading.Lock()  # guards all below
        self._wanted = threading.Condition(self._lock)  # told when a mailbox is ready, and a worker spare
        self._empty = threading.Condition(self._lock)  # told when the last mailbox is emptied
        # One is ready, in a worker's hands, or waits for its next try; an empty one is not kept.
        self._mailboxes: Dict[Tuple[str, str], _Mailbox] = {}
        self._ready: Deque[_Mailbox] = deque()
        self._open = 0  # messages taken and not through
        self._busy = self._spare = 0  # workers that are called or at work, and those that wait for a call
        self._called = False  # whether a worker is called and not yet there
        self._unflushed = 0  # messages that are through since the last flush
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

    def cancel(self, count: int) -> None:
        """Give reserved places back."""
        with self._lock:
            self._open -= count

    def post(self, messages: Iterable[Message]) -> None:
        """Take messages into the places that were reserved for them."""
        with self._lock:
            for message in messages:
                self._add(_Job(message, 0))
            self._call_worker()

    def restore(self, messages: Sequence[Tuple[Message, int]]) -> None:
        """Take messages that were accepted before a restart, full or not, each with the number of its failed tries."""
        with self._lock:
            self._open += len(messages)
            for message, tries in messages:
                self._add(_Job(message, tries))

    def _add(self, job: _Job) -> None:
        mailbox = self._mailboxes.get(job.sender)
        if mailbox:
            mailbox.append(job)
        else:
            mailbox = self._mailboxes[job.sender] = deque((job,))
            self._ready.append(mailbox)

    def wake(self) -> None:
        """Call a worker if there is something to do, as after `restore`."""
        with self._lock:
            self._call_worker()

    def _call_worker(self) -> None:
        """See to it that a worker comes for what is ready. One is called at a time, and calls the next when it has
        taken a mailbox: under load it finds many, where a call for each would be a change of threads for each."""
        if not self._ready or self._called or self._busy >= self._settings.workers:
            return
        if self._spare:
            self._wanted.notify()
        else:
            try:
                threading.Thread(target=self._work, name="kfserver-worker", daemon=True).start()
            except RuntimeError as error:  # the system has no more threads; those that run go on
                log.error("no thread for a worker: %s; lower --workers, or raise the limit of threads", error)
                self._later(1.0, self.wake)
                return
        self._called = True
        self._busy += 1

    def _work(self) -> None:
        """A worker's life: when it is called, one message of each mailbox that is ready."""
        while self._await_call():
            mailbox = self._next_ready()
            while mailbox:
                guard(self._serve, mailbox)
                mailbox = self._next_ready()

    def _await_call(self) -> bool:
        """Wait to be called; False when nobody has called for so long that the thread may leave."""
        with self._lock:
            self._spare += 1
            self._wanted.wait_for(lambda: self._called, KEEP_THREAD)
            called, self._called = self._called, False
            self._spare -= 1
            return called

    def _next_ready(self) -> Optional[_Mailbox]:
        """The mailbox to serve next. What is through is flushed before, unless a worker is on its way, who will see to
        it: so those with quick handlers are flushed together, and no more messages than there are workers can be in
        hand, or through and not flushed."""
        with self._lock:
            mailbox = self._ready.popleft() if self._ready else None
            if mailbox:
                self._call_worker()
            else:
                self._busy -= 1
            if self._called and self._busy + self._unflushed < self._settings.workers:
                return mailbox
            self._unflushed = 0
        guard(self._flush)
        return mailbox

    def _serve(self, mailbox: _Mailbox) -> None:
        """Have the mailbox's first message handled; then it is ready for the next, or waits to try this one again."""
        job, seconds = mailbox[0], None
        try:
            seconds = self._handle(job.message, job.tries)
        finally:
            if seconds is None:
                self._advance(mailbox)
            else:
                job.tries += 1
                self._later(seconds, lambda: self._put_back(mailbox))

    def _put_back(self, mailbox: _Mailbox) -> None:
        with self._lock:
            self._ready.append(mailbox)
            self._call_worker()

    def _advance(self, mailbox: _Mailbox) -> None:
        with self._lock:
            job = mailbox.popleft()
            self._open -= 1
            self._unflushed += 1
            if mailbox:
                self._ready.append(mailbox)
                return
            del self._mailboxes[job.sender]
            if not self._mailboxes:
                self._empty.notify_all()

    def join(self, seconds: Optional[float] = None) -> bool:
        """Wait until nothing is left to do, for so many seconds at most; whether that was reached."""
        with self._lock:
            self._call_worker()
            return self._empty.wait_for(lambda: not self._mailboxes, seconds)

    def drain(self, seconds: float) -> List[str]:
        """Take no more messages, finish those that wait, for so many seconds; the keys of what was left undone."""
        with self._lock:
            self._closed = True
        self.join(seconds)
        with self._lock:
            return [job.message.key for mailbox in self._mailboxes.values() for job in mailbox]

    def samples(self) -> List[Sample]:
        """How much there is to do, for the metrics."""
        with self._lock:
            oldest = min((mailbox[0].since for mailbox in self._mailboxes.values()), default=None)
            waited = time.monotonic() - oldest if oldest is not None else 0.0
            waiting = max(0, self._open - self._busy)
            return [Sample("kfserver_queue_messages", "Messages that wait for a worker.", waiting),
                    Sample("kfserver_busy_workers", "Workers that run a handler.", self._busy),
                    Sample("kfserver_oldest_seconds", "Age of the oldest message that is not through.", waited)]


# ---- 14 Inbox -------------------------------------------------------------------------------------------------------
# Law: the way of a message from its push to the end of its handler, and what is remembered of it: claims, journal,
# dispatcher, handlers, replies. Knows nothing of HTTP.

def make_key(function: Callable[[Message], str], message: Message) -> str:
    """The key that an embedder's own function makes. Raises `Busy` if it fails, or makes what cannot be stored."""
    keys: List[str] = []
    error = attempt(lambda: keys.append(function(message).encode().decode()))
    if error:
        log.error("dedup_key failed: the push is answered 503; mend the function", exc_info=exc_info_of(error))
        raise Busy("the message has no key")
    return keys[0]


class Inbox:
    """Takes messages from an `Endpoint`, has them handled, and settles what became of them."""

    def __init__(self, registry: HandlerRegistry, settings: Settings, key_of: Callable[[Message], str]) -> None:
        alarm = Alarm()
        self.registry = registry
        self.metrics = Metrics()
        self.draining = False  # whether the end has begun, for monitors
        self._settings = settings
        self._key_of: Callable[[Message], str] = functools.partial(make_key, key_of)
        if key_of is dedup_key:  # which makes every message a key
            self._key_of = dedup_key
        local = ClaimCache(settings.dedup_size)
        self._claims: Union[ClaimCache, SharedClaims] = SharedClaims(settings.redis, local) if settings.redis else local
        self._api = SendApi(settings) if settings.app_key or settings.access_token else None
        self._dispatcher = Dispatcher(settings, self._handle, self._flush, alarm.later)
        self._journal = Journal(settings, alarm.later) if settings.journal else None
        if self._journal:
            self._recover(self._journal, local)

    def _recover(self, journal: Journal, local: ClaimCache) -> None:
        """Go on where the last process ended: remember what was finished, and queue what was not."""
        for key in journal.finished_keys():
            local.finish(key)
        left: List[Tuple[Message, int]] = []
        for row in journal.waiting():
            try:
                message = parse(row.payload)
            except PushError as error:
                journal.fail(row.key, describe_error(error))
                log.error("left by the last run, and cannot be read: key=%s", row.key)
                continue
            message.key = row.key
            self._claims.restore(row.key)
            left.append((message, row.tries))
        if left:
            log.info("%d messages are left from the last run", len(left))
        self._dispatcher.restore(left)

    def begin(self) -> None:
        """Handle what is left from the last run; the first message that comes makes that begin too."""
        self._dispatcher.wake()

    def take(self, message: Message) -> bool:
        """Claim a message, and keep a place for it; False for a repeat. Raises `Busy`."""
        message.key = self._key_of(message)
        if not self._claims.claim(message.key):
            return False
        try:
            self._dispatcher.reserve()
        except BaseException:
            self._claims.release(message.key)
            raise
        return True

    def deliver(self, taken: Sequence[Tuple[Message, bytes]]) -> None:
        """Make safe what was taken, and queue it: each message with its bytes. Raises `Busy`, and gives all back."""
        try:
            if self._journal:
                self._journal.add([(message.key, payload) for message, payload in taken])
        except BaseException:
            self._dispatcher.cancel(len(taken))
            for message, _ in taken:
                self._claims.release(message.key)
            raise
        for message, _ in taken:
            self._claims.accept(message.key)
        self._dispatcher.post([message for message, _ in taken])

    def observe(self, response: Response, message: Optional[Message], seconds: float) -> None:
        """A push was answered after so many seconds."""
        if self._settings.admin:
            self.metrics.push(response, message, seconds)

    def _handle(self, message: Message, tries: int) -> Optional[float]:
        """Run the handler; seconds until it is to be tried again, or None when the message is through."""
        error = attempt(self._run, message)
        if not error:
            if self._journal:
                self._journal.finish(message.key)
            self._claims.finish(message.key)
            return None
        if tries + 1 >= self._settings.tries or isinstance(error, KfError):
            self._give_up(message, error)
            return None
        seconds = 4.0 ** tries  # 1 s, 4 s, 16 s…: what failed by outage or overload needs time
        log.warning("handler failed: key=%s try=%d of %d, %s; again in %d s", message.key, tries + 1,
                    self._settings.tries, describe_error(error), seconds)
        self.metrics.count("handler_retries")
        if self._journal:
            self._journal.tried(message.key, tries + 1)
        return seconds

    def _run(self, message: Message) -> None:
        if message.outbox is None:
            message.outbox = Outbox(self._api, message, self.metrics.count)
        started = time.monotonic()
        try:
            answers = self.registry.handle(message)
        finally:
            if self._settings.admin:
                self.metrics.handler(time.monotonic() - started)
        if answers is not None:
            message.outbox(answers)

    def _give_up(self, message: Message, error: BaseException) -> None:
        self.metrics.count("messages_failed")
        if self._journal:
            self._journal.fail(message.key, describe_error(error))
        self._claims.release(message.key)
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
                Sample("kfserver_remembered_keys", "Messages known, to drop repeats of.", len(self._claims)),
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
# Connections accepted in one turn, before those that are open get their turn.
ACCEPT_BURST = 64
# Seconds of a turn for what can wait: handshakes, which cost up to a millisecond each, and pipelined requests.
BACKLOG_SECONDS = 0.005
# Seconds between two looks at deadlines, certificates and the like, and the longest sleep of the loop.
TICK_SECONDS = 1.0
# Seconds until the loop accepts again when it could not: no descriptor was free, or nobody could be closed for it.
PAUSE_SECONDS = 0.01
# Seconds that a TLS client has for its handshake before it may be closed to make room for another: its path to us is
# gone along three times. Accepted at full speed, those who say nothing would be past in a tenth of a second.
HANDSHAKE_SECONDS = 0.2
# Seconds without a turn after which the loop counts as stuck: it turns at least once in TICK_SECONDS.
STUCK_SECONDS = 3.0
# Seconds that `close` waits for the loop beyond the time that the connections get.
CLOSE_SECONDS = 3.0
# Descriptors kept free for other things than connections: logs, handlers' files, the send API.
RESERVED_FILES = 64
# Pieces a chunked body may come in, and the bytes of a line between them: senders of tiny chunks only cost time.
MAX_CHUNKS = 4096
MAX_CHUNK_LINE = 256
# Bytes asked of the system at a time: a push and its head have about 700, a record of TLS at most 16 KiB.
RECEIVE = 64 * 1024

# RFC 9110, section 5.6.2 (token) and 5.5 (field values); RFC 9112, sections 3 and 5: no blank before the colon, no line
# that continues another, no bare CR, LF or NUL.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!\"$-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n")
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":[\t -~\x80-\xff]*\r\n)*")
_FRAMING_FIELD = re.compile(rb"(?im)^(host|content-length|transfer-encoding|connection|expect):(.*)\r$")
_HOST = re.compile(rb"[!$%&'()*+,;=:\[\]._~0-9a-z-]*")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[\t ]*(?:;[\t -~\x80-\xff]*)?")
_NEVER_IN_HEAD = re.compile(rb"(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Framing(NamedTuple):
    """What a head says about where its request ends and what follows.

    ``length`` is -1 for a chunked body. ``connection`` is the header of that name in the answer, empty for none.
    """

    length: int
    connection: str
    expects_continue: bool


def parse_framing(block: bytes, minor: int) -> Framing:
    """The framing in a block of header lines of HTTP/1.``minor``; raises `PushError` for all that two readers could
    understand differently, because that is how requests are smuggled (RFC 9112, section 11.2)."""
    if not _FIELDS.fullmatch(block):
        raise MalformedPush("malformed header line")
    if block.count(b"\n") > MAX_HEADERS:
        raise PushError(f"more than {MAX_HEADERS} headers", status=431)
    found: Dict[bytes, List[bytes]] = {}
    for name, value in _FRAMING_FIELD.findall(block):
        found.setdefault(name.lower(), []).append(value.strip(b"\t ").lower())
    hosts, expectations = found.get(b"host", ()), found.get(b"expect", ())
    if len(hosts) > 1 or len(hosts) < minor or not all(map(_HOST.fullmatch, hosts)):
        raise MalformedPush("HTTP/1.1 needs exactly one Host header, with a host and maybe a port")
    if any(value != b"100-continue" for value in expectations):
        raise PushError("only 100-continue can be expected", status=417)
    options = {option.strip() for value in found.get(b"connection", ()) for option in value.split(b",")}
    if b"close" in options or not (minor or b"keep-alive" in options):
        connection = "close"
    else:
        connection = "" if minor else "keep-alive"
    length = _body_length(found.get(b"content-length", ()), found.get(b"transfer-encoding", ()), minor)
    return Framing(length, connection, bool(expectations) and minor > 0)


def _body_length(lengths: Sequence[bytes], codings: Sequence[bytes], minor: int) -> int:
    if codings:
        if lengths or not minor or list(codings) != [b"chunked"]:
            raise MalformedPush("a body is framed by Content-Length or by 'Transfer-Encoding: chunked', never by both")
        return -1
    if not lengths:
        return 0
    if len(lengths) > 1 or not lengths[0].isdigit() or len(lengths[0]) > 18:
        raise MalformedPush("Content-Length must be one number")
    return int(lengths[0])


def _origin_form(method: str, target: str) -> str:
    """Path and query of a request target; proxies write it with scheme and host (RFC 9112, section 3.2.2)."""
    if target.startswith("/") or (target == "*" and method == "OPTIONS"):
        return target
    found = re.fullmatch(r"(?i:https?)://[^/?#]+(/[^?#]*)?(\?[^#]*)?", target)
    if not found:
        raise MalformedPush("malformed request target")
    return (found.group(1) or "/") + (found.group(2) or "")


# What a connection waits for.
HANDSHAKE, IDLE, HEAD, BODY = "handshake", "idle", "head", "body"
PHASE_SECONDS: Mapping[str, float] = MappingProxyType(
    {HANDSHAKE: HEAD_SECONDS, IDLE: IDLE_SECONDS, HEAD: HEAD_SECONDS, BODY: BODY_SECONDS})


class RequestReader:
    """What a client has sent, cut into requests: `feed` bytes, and ask for the `next_request`. Touches no socket.

    The reading is written as one straight generator, which stops wherever more bytes are needed. ``phase`` tells what
    they are needed for, and ``framing`` is that of the request that was read last, or is being read.
    """

    def __init__(self, max_body: int, parse_framing: Callable[[bytes, int], Framing] = parse_framing) -> None:
        self._max_body, self._parse_framing = max_body, parse_framing
        self._buffer = bytearray()  # fed and not yet cut
        self._method = ""
        self._requests = self._read_requests()
        self.phase = IDLE
        self.framing = Framing(0, "close", False)

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data
        if self.phase == IDLE:
            self.phase = HEAD  # empty lines, which are then skipped, start the clock too

    def next_request(self) -> Optional[Request]:
        """The next request that is complete, or None until more is fed. After one with a ``problem`` comes no other."""
        try:
            return next(self._requests)
        except PushError as error:
            return Request(self._method, "", problem=error)

    def close(self) -> None:
        """Read no more; without this, memory would be held until the garbage collector comes by."""
        self._requests.close()

    def _read_requests(self) -> Generator[Optional[Request], None, None]:
        while True:
            line, fields = yield from self._read_head()
            self._method, major, minor = line.group(1).decode("ascii"), line.group(3), int(line.group(4))
            if major != b"1":
                raise PushError("HTTP/1.1 is spoken here", status=505)
            path, _, query = _origin_form(self._method, line.group(2).decode("latin-1")).partition("?")
            self.framing = self._parse_framing(fields, min(minor, 1))
            self._check_size(self.framing.length)
            self.phase = BODY
            if self.framing.length < 0:
                body = yield from self._read_chunks()
            else:
                body = yield from self._take(self.framing.length)
            self._skip_empty_lines()
            self.phase = HEAD if self._buffer else IDLE
            yield Request(self._method, path, query, body)
            self._method = ""

    def _check_size(self, size: int) -> None:
        if size > self._max_body:
            raise PushError(f"more than {self._max_body} bytes", TOO_LARGE, 413)

    def _skip_empty_lines(self) -> None:
        """Before a request they are ignored (RFC 9112, section 2.2)."""
        if self._buffer[:1] in (b"\r", b"\n"):
            del self._buffer[:len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]

    def _read_head(self) -> Generator[None, None, Tuple[Any, bytes]]:
        """The match of the request line, and the header lines, each with its CR LF."""
        self._skip_empty_lines()
        seen, end = 0, self._buffer.find(b"\r\n\r\n")
        while end < 0:
            # Only what is new is looked at: all of it again for each byte would cost an attacker little.
            if len(self._buffer) <= MAX_HEAD and _NEVER_IN_HEAD.search(self._buffer, seen):
                raise MalformedPush("no control characters in a head, and lines end with CR LF")
            self._check_head(len(self._buffer))
            seen = len(self._buffer)
            yield None
            self._skip_empty_lines()
            end = self._buffer.find(b"\r\n\r\n", max(0, seen - 3))
        self._check_head(end)
        head = yield from self._take(end + 4)
        line = _REQUEST_LINE.match(head)
        if not line:
            raise MalformedPush("malformed request line")
        return line, head[line.end():-2]

    def _check_head(self, size: int) -> None:
        if size > MAX_HEAD:
            raise PushError(f"a head of more than {MAX_HEAD} bytes", status=431)

    def _take(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _take_line(self) -> Generator[None, None, bytes]:
        while b"\r\n" not in self._buffer[:MAX_CHUNK_LINE + 2]:
            if len(self._buffer) > MAX_CHUNK_LINE:
                raise MalformedPush("a line too long between chunks")
            yield None
        line = yield from self._take(self._buffer.index(b"\r\n") + 2)
        return line[:-2]

    def _read_chunks(self) -> Generator[None, None, bytes]:
        """A chunked body, joined (RFC 9112, section 7.1); extensions and trailers are checked and dropped."""
        body = bytearray()
        for _ in range(MAX_CHUNKS):
            line = _CHUNK_LINE.fullmatch((yield from self._take_line()))
            if not line:
                raise MalformedPush("malformed chunk size")
            size = int(line.group(1), 16)
            if not size:
                yield from self._skip_trailers()
                return bytes(body)
            self._check_size(len(body) + size)
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
        raise PushError(f"more than {MAX_HEADERS} trailers", status=431)


def list_headers(response: Response) -> List[Tuple[str, str]]:
    """The headers of a response that every server sends, ours and WSGI's alike."""
    return [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(response.body))),
            *response.headers]


def encode_answer(response: Response, second: int, connection: str) -> bytes:
    """The response as it is sent in that Unix second; ``connection`` is the header of that name, empty for none."""
    headers = [("Date", formatdate(second, usegmt=True)), *list_headers(response)]
    if connection:
        headers.append(("Connection", connection))
    lines = [f"HTTP/1.1 {response.status} {http.client.responses[response.status]}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + response.body


class Connection(BaseHTTPRequestHandler):
    """One client's connection: reads requests, and sends their answers. Nothing here ever waits.

    ``_step`` is what to do when the socket is ready, None when the connection is over. ``asked`` is the request that is
    complete and not yet answered. ``deadline`` is when the client's time is up, by the monotonic clock. Of one client
    there is never more in memory than a request, what came with it in one read, and an answer.

    What http.server reads through the email package and several buffers is read here directly and strictly: that took
    two thirds of a request's time. The names that it gives are kept.
    """

    server: PushServer

    def setup(self) -> None:
        """Prepare the connection; called by socketserver before `handle`."""
        self.socket: socket.socket = self.request
        if self.server.address_family != UNIX_FAMILY:
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.asked: Optional[Request] = None
        self.since = time.monotonic()
        self.deadline = self.since + HEAD_SECONDS
        # What the client is given time for; empty while it waits for us.
        self.phase = HANDSHAKE if self.server.tls else IDLE
        self.events = 0  # that the server's selector watches for
        self._reader = RequestReader(self.server.max_body, self.server.parse_framing)
        self._unsent = b""
        self._then: Optional[Callable[[], None]] = None  # when all is sent
        self._step: Optional[Callable[[], None]] = self._begin_tls if self.server.tls else self._receive
        self.server.connections[self] = None

    def handle(self) -> None:
        """Do the first step at once: mostly the request is here already."""
        self.ready()

    def finish(self) -> None:
        """Called by socketserver after `handle`; the connection goes on."""

    def ready(self) -> None:
        """Do the next step, unless an answer is due first. An error that nobody foresaw ends this connection alone."""
        if self._step and not self.asked and not self.server.teller.guard(self._go_on):
            self.close()

    def _go_on(self) -> None:
        """Do the next step, and watch for what the one after it needs."""
        step, events = self._step, 0
        try:
            if step:
                step()
        except ssl.SSLWantReadError:
            events = selectors.EVENT_READ
        except ssl.SSLWantWriteError:
            events = selectors.EVENT_WRITE
        except BlockingIOError:
            pass
        except OSError:  # the client is gone, or does not speak TLS
            self.close()
        if self._step and not self.asked:
            self.server.watch(self, events or (selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ))

    def _begin_tls(self) -> None:
        """Begin a session when the client has sent something: it takes 50 KiB, which silent clients must not cost. The
        first byte tells that it is a handshake (RFC 8446, section 5.1)."""
        if self.socket.recv(1, socket.MSG_PEEK) != b"\x16":
            self.close()
            return
        assert self.server.tls
        self.socket = self.server.tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self._put_off_handshake()

    def _put_off_handshake(self) -> None:
        self._step = self._shake_hands
        self.server.put_off(self)

    def _shake_hands(self) -> None:
        self._step = self._put_off_handshake  # when there is more to read
        self.socket.do_handshake()  # type: ignore[attr-defined]
        self._step, self.phase = self._receive, IDLE
        self._receive()

    def _receive(self) -> None:
        data = self.socket.recv(RECEIVE)
        if data:
            self._reader.feed(data)
            self._hand_in()
        else:
            self.close()

    def _hand_in(self) -> None:
        """Hand in the next request, or give the client time for the rest of it, counted from when it began."""
        self._step = self._receive
        self.asked = self._reader.next_request()
        if self.asked:
            self.phase, self.deadline = "", float("inf")
            self.server.complete.append(self)
        elif self._reader.phase != self.phase:
            self._give_time(self._reader.phase)
            if self.phase == BODY and self._reader.framing.expects_continue:
                self._to_send(b"HTTP/1.1 100 Continue\r\n\r\n", lambda: None)
                self._send()

    def _give_time(self, phase: str) -> None:
        self.phase = phase
        self.deadline = time.monotonic() + PHASE_SECONDS[phase]

    def is_new(self) -> bool:
        """Whether this client must still be given time for its handshake."""
        return self.phase == HANDSHAKE and time.monotonic() - self.since < HANDSHAKE_SECONDS

    def answer(self, response: Response) -> None:
        """Send the answer to the request that was handed in, and turn to the next one."""
        request, header = self.asked, self._reader.framing.connection
        assert request
        if request.problem:
            request.problem.__traceback__ = None  # which leads back to the request, and to this connection
        then = self._await_next
        if request.problem or header == "close" or self.server.closing:
            header, then = "close", self._linger if request.problem else self.close
        data = self.server.encode_answer(response, int(time.time()), header)
        if request.method == "HEAD":
            data = data[:len(data) - len(response.body)]
        self.asked = None
        self.deadline = time.monotonic() + WRITE_SECONDS
        self._to_send(data, then)  # in one piece: two would be two packets, and a wait for the first one's receipt
        self._go_on()

    def _to_send(self, data: bytes, then: Callable[[], None]) -> None:
        """Let the next steps send the data, and do ``then`` when the client has taken all of it."""
        self._unsent, self._then, self._step = data, then, self._send

    def _send(self) -> None:
        self._unsent = self._unsent[self.socket.send(self._unsent):]
        if not self._unsent and self._then:
            self._step = self._receive
            self._then()

    def _await_next(self) -> None:
        """Wait for the next request. One that is here already is handed in when it is this client's turn again."""
        self.server.connections.move_to_end(self)
        if self._reader.phase == IDLE:
            self._give_time(IDLE)
        else:
            self.deadline, self._step = float("inf"), self._hand_in
            self.server.put_off(self)

    def _linger(self) -> None:
        """Send no more, but read on for a while and drop it: closing with bytes unread would reset the connection, and
        the client could lose the answer (RFC 9112, section 9.6)."""
        self.deadline = time.monotonic() + LINGER_SECONDS
        self._end_session()
        socket.socket.shutdown(self.socket, socket.SHUT_WR)
        self._step = self._discard

    def _discard(self) -> None:
        if not self.socket.recv(RECEIVE):
            self.close()

    def _end_session(self) -> None:
        """Send what ends a TLS session (RFC 8446, section 6.1): without it the client must suspect an attacker."""
        if isinstance(self.socket, ssl.SSLSocket):
            with contextlib.suppress(OSError, ValueError):
                self.socket.unwrap()

    def close(self) -> None:
        """End the connection."""
        if self._step:
            self._step = self._then = None  # or each would hold the connection, and it them
            self._reader.close()
            self.server.forget(self)
            self._end_session()
            self.server.shutdown_request(self.socket)


class Listener(ThreadingHTTPServer):
    """Holds what a server has from the system: an address or a Unix socket, a certificate, connections, and the
    selector that watches them. Raises OSError when it cannot listen, `SettingsError` for a bad certificate."""

    # Connections that the system may hold for us before they are accepted; it cuts this down to what it allows.
    request_queue_size = 4096

    def __init__(self, settings: Settings) -> None:
        self._settings, self._unix = settings, settings.unix
        self._certificate_stamps = _stamps(settings.tls_cert, settings.tls_key)
        self._certificate_problem = ""  # not yet told
        self.tls = make_tls_context(settings) if settings.tls_cert else None
        self._socket_file = _UNKNOWN_FILE  # the stamp of the Unix socket that we made
        self.server_port = 0
        if self._unix:
            self.address_family = UNIX_FAMILY
        elif ":" in settings.host:
            self.address_family = socket.AF_INET6
        self.connections: OrderedDict[Connection, None] = OrderedDict()  # who has waited longest comes first
        self.backlog: OrderedDict[Connection, None] = OrderedDict()  # those with a step that can wait, in order
        self.selector = selectors.DefaultSelector()
        self.waker, self.woken = socket.socketpair()
        try:
            super().__init__(self._unix or (settings.host, settings.port), Connection)  # type: ignore[arg-type]
        except BaseException:
            self._close_selector()
            raise
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        """Bind without asking the name service for our own name, which can take seconds."""
        if self._unix:
            _remove_stale_socket(self._unix)
        TCPServer.server_bind(self)
        if self._unix:
            self._socket_file = _stamp(self._unix)
            os.chmod(self._unix, 0o666)  # the proxy runs as another user
        else:
            self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def server_close(self) -> None:
        """Stop listening. A Unix socket's file is removed, unless another server has put its own there."""
        if self._socket_file != _UNKNOWN_FILE and _stamp(self._unix) == self._socket_file:
            with contextlib.suppress(OSError):
                os.unlink(self._unix)
        self._socket_file = _UNKNOWN_FILE
        super().server_close()

    def renew_certificate(self) -> None:
        """Serve the certificate anew if its files have changed.

        The two are not replaced in one moment, so that one may not fit the other for a while: a certificate that cannot
        be used is told of when its files have stayed the same from one call to the next. The old one stays in service.
        """
        stamps = _stamps(self._settings.tls_cert, self._settings.tls_key)
        if stamps != self._certificate_stamps:
            self._certificate_stamps, self._certificate_problem = stamps, ""
            try:
                self.tls = make_tls_context(self._settings)
                log.info("the renewed certificate is in service")
            except SettingsError as error:
                self._certificate_problem = str(error)
        elif self._certificate_problem:
            log.error("%s; the certificate from before stays in service", self._certificate_problem)
            self._certificate_problem = ""

    def put_off(self, connection: Connection) -> None:
        """Let a connection do its next step when there is time, and not before."""
        self.backlog[connection] = None

    def watch(self, connection: Connection, events: int) -> None:
        """Call the connection when its client sends, or takes, as ``events`` say; not while it is put off."""
        if connection in self.backlog:
            events = 0
        if events == connection.events:
            return
        if not connection.events:
            self.selector.register(connection.socket, events, connection.ready)
        elif not events:
            self.selector.unregister(connection.socket)
        else:
            self.selector.modify(connection.socket, events, connection.ready)
        connection.events = events

    def forget(self, connection: Connection) -> None:
        """Watch a connection no more; to be called before it is closed."""
        self.connections.pop(connection, None)
        self.backlog.pop(connection, None)
        if connection.events:
            self.selector.unregister(connection.socket)

    def abandon(self) -> None:
        """Let go of the address and of everything else, also when it was never served."""
        self.server_close()
        self._close_selector()

    def _close_selector(self) -> None:
        self.selector.close()
        self.waker.close()
        self.woken.close()

    def after_fork(self) -> None:
        """In a forked child: let go of all that belongs to the parent. Descriptors are closed and nothing else is done:
        to shut a connection down, or to take it out of the selector, would do so for the parent as well."""
        self._socket_file = _UNKNOWN_FILE
        for connection in self.connections:
            connection.socket.close()
        self.connections.clear()
        self.backlog.clear()
        self.abandon()


class PushServer(Listener):
    """Accepts and serves. One thread watches all connections, reads what comes, and answers what is complete together:
    an answer takes microseconds, a change of threads as much again, and a slow client only waits.

    The loop's turns are short whatever clients do: in one turn a connection gets one request answered, and what can
    wait (handshakes, pipelined requests) gets a few milliseconds. ``each_second`` is called about once a second on the
    loop's thread.
    """

    def __init__(self, settings: Settings, endpoint: Union[Endpoint, AdminEndpoint]) -> None:
        super().__init__(settings)
        self.endpoint = endpoint
        self.max_body = settings.max_body
        self.each_second: Callable[[], None] = lambda: None
        self.teller = Teller(time.monotonic)
        # Heads differ in their first line only, as long as one client or proxy speaks: the rest is parsed once.
        self.parse_framing = functools.lru_cache(maxsize=256)(parse_framing)
        # Most answers differ in their date only, and that changes once a second.
        self.encode_answer = functools.lru_cache(maxsize=16)(encode_answer)
        self.closing = False
        self._accepting = False  # whether the selector watches the address
        self.complete: List[Connection] = []  # to be answered in this turn
        self._limit = _connection_limit(settings.max_connections)
        self._next_tick = self._close_by = 0.0
        self._turned = time.monotonic()  # when the last turn ended
        self._closed = threading.Event()

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        """Serve until `close` is called from another thread."""
        self.selector.register(self.woken, selectors.EVENT_READ, lambda: None)
        self._watch_address(True)
        try:
            while not self.closing:
                self.teller.guard(self._turn, poll_interval)
            self.teller.guard(self._turn, 0.0)  # what has come is still answered
            self.selector.unregister(self.woken)
            self._watch_address(False)
            self.server_close()
            while self.connections and time.monotonic() < self._close_by:
                self._close_all(lambda connection: connection.phase in (IDLE, HANDSHAKE))
                self.teller.guard(self._turn, 0.01)
            self._close_all(lambda connection: True)
        finally:
            self.abandon()
            self._closed.set()

    def alive(self) -> bool:
        """Whether the loop has turned in the last seconds."""
        return time.monotonic() - self._turned < STUCK_SECONDS

    def _turn(self, seconds: float) -> None:
        """Wait for what comes, ``seconds`` at most, read it, and answer all that is complete."""
        paused = not self._accepting and not self.closing
        if paused:
            seconds = PAUSE_SECONDS
        for key, _ in self.selector.select(0.0 if self.backlog else seconds):
            key.data()
        if paused:
            self._watch_address(True)
        self._work_off_backlog()
        self._answer_complete()
        self.service_actions()

    def _work_off_backlog(self) -> None:
        """Do steps that were put off, in order, for as long as a turn has time for them. Those that are put off
        meanwhile have to wait for the next turn. While handshakes are left over, nobody else is let in."""
        until = time.monotonic() + BACKLOG_SECONDS
        for _ in range(len(self.backlog)):
            self.backlog.popitem(last=False)[0].ready()
            if not self.backlog or time.monotonic() > until:
                break
        if self.backlog and next(iter(self.backlog)).phase == HANDSHAKE:
            self._watch_address(False)

    def _answer_complete(self) -> None:
        """Answer all that is complete, together: so their messages share a write to the disk."""
        asking, self.complete = self.complete, []
        if not asking:
            return
        responses: List[Response] = []
        requests = [connection.asked for connection in asking if connection.asked]
        self.teller.guard(lambda: responses.extend(self.endpoint.handle_all(requests)))
        for connection, response in itertools.zip_longest(asking, responses):
            if not (response and self.teller.guard(connection.answer, response)):
                connection.close()  # without an answer the push comes again

    def service_actions(self) -> None:
        """Called in every turn; does once a second what need not be done more often."""
        self._turned = now = time.monotonic()
        if now >= self._next_tick:
            self._next_tick = now + TICK_SECONDS
            self._close_all(lambda connection: connection.deadline < now)
            if self.tls:
                self.teller.guard(self.renew_certificate)
            self.teller.guard(self.each_second)

    def _close_all(self, condition: Callable[[Connection], bool]) -> None:
        for connection in list(filter(condition, self.connections)):
            connection.close()

    def close(self, seconds: float) -> None:
        """Stop accepting, give the requests in flight ``seconds`` to finish, close every connection. A loop that is
        stuck is waited for a few seconds longer, and then left alone."""
        if not self.closing:
            self._close_by = time.monotonic() + seconds
            self.closing = True
            with contextlib.suppress(OSError):  # closed, and so awake already
                self.waker.send(b"\0")
        if not self._closed.wait(seconds + CLOSE_SECONDS):
            log.error("the thread that answers does not come to an end; it is left alone")
            self.server_close()

    def shutdown(self) -> None:
        """End `serve_forever` at once."""
        self.close(0.0)

    def after_fork(self) -> None:
        """Let go of what belongs to the parent; there is nothing left to serve, or for `close` to wait for."""
        self.closing, self._closed = True, threading.Event()
        self._closed.set()
        self.complete.clear()
        super().after_fork()

    def _watch_address(self, accepting: bool) -> None:
        """Have the selector tell of new clients, or not: it would tell in every turn of those that cannot come in."""
        if accepting:
            self.selector.register(self.socket, selectors.EVENT_READ, self._accept)
        elif self._accepting:
            self.selector.unregister(self.socket)
        self._accepting = accepting

    def _accept(self) -> None:
        """Accept clients that wait, but not so many that the accepted must wait."""
        for accepted in range(ACCEPT_BURST):
            if len(self.connections) >= self._limit and next(iter(self.connections)).is_new():
                self._watch_address(False)
                return
            try:
                request, client_address = self.get_request()
            except OSError as error:
                # After the first perhaps nobody waits: the system looks for a descriptor before it looks for a client.
                is_short = not accepted and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
                if is_short and not self._make_way():
                    self._watch_address(False)
                return
            while len(self.connections) >= self._limit and not self._make_way():
                self._answer_complete()
            self.process_request(request, client_address)

    def _make_way(self) -> bool:
        """Close the connection that has waited longest for its request to become complete; False if there is none."""
        for _ in range(len(self.connections)):
            connection = next(iter(self.connections))
            if connection.phase != HANDSHAKE:
                self.backlog.pop(connection, None)
                connection.ready()  # what has come unseen may complete it
            if not connection.asked:
                connection.close()
                return True
            self.connections.move_to_end(connection)  # it is answered in this turn
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        """Take in a connection."""
        request.setblocking(False)
        try:
            self.finish_request(request, client_address)
        except OSError:
            self.shutdown_request(request)  # gone before it was served


# A file's device, number, size and time, which tell whether it is the same and unchanged.
_Stamp = Tuple[int, int, int, int]
_UNKNOWN_FILE: _Stamp = (0, 0, 0, 0)


def _stamp(path: str) -> _Stamp:
    """The stamp of a file that a link may lead to; that of no file if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return _UNKNOWN_FILE
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _stamps(*paths: str) -> List[_Stamp]:
    return [_stamp(path) for path in paths]


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
    """Remove the file of a Unix socket that a dead server left. OSError if a live one listens, or for another file."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EEXIST, "there is another file, not a socket")
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


def bind(settings: Settings, endpoint: Union[Endpoint, AdminEndpoint], options: str) -> PushServer:
    """A server that listens and does not serve yet. Raises `SettingsError`, which names the ``options`` for another
    address, when this one cannot be had."""
    try:
        return PushServer(settings, endpoint)
    except OSError as error:
        where = settings.unix or f"{settings.host} port {settings.port}"
        raise SettingsError(f"cannot listen on {where}: {error.strerror or error}; choose another {options}") from error


class KfServer:
    """A receiver: an endpoint, an inbox and, once started, an HTTP server in a thread of its own.

        with KfServer(registry, Settings(port=0)) as server:
            print(server.url)

    `feed` and `wsgi` work without a start. ``dedup_key`` replaces `dedup_key`: equal texts are one message.
    """

    def __init__(self, registry: HandlerRegistry, settings: Settings = Settings(),
                 dedup_key: Callable[[Message], str] = dedup_key) -> None:
        self.settings = settings
        self._inbox = Inbox(registry, settings, dedup_key)
        self.endpoint = Endpoint(settings, self._inbox, time.time, time.monotonic)
        self._http: Optional[PushServer] = None
        self._admin: Optional[PushServer] = None

    @property
    def registry(self) -> HandlerRegistry:
        """The handlers in service; another registry can be put in their place while the server runs."""
        return self._inbox.registry

    @registry.setter
    def registry(self, registry: HandlerRegistry) -> None:
        """Put other handlers in service."""
        self._inbox.registry = registry

    def start(self) -> KfServer:
        """Listen, and serve from a thread of its own. Raises `SettingsError` when an address cannot be had."""
        http = bind(self.settings, self.endpoint, "--host, --port or --unix")
        try:
            self._admin = self._bind_admin() if self.settings.admin else None
        except SettingsError:
            http.abandon()
            raise
        self._http = http
        for server in filter(None, (self._http, self._admin)):
            threading.Thread(target=server.serve_forever, name="kfserver-accept", daemon=True).start()
        self._inbox.begin()
        return self

    def _bind_admin(self) -> PushServer:
        host, _, port = self.settings.admin.rpartition(":")
        address = {"host": host.strip("[]"), "port": int(port), "unix": "", "tls_cert": "", "tls_key": ""}
        return bind(dataclasses.replace(self.settings, **address),
                    AdminEndpoint(self._render_metrics, self._inbox.trouble), "--admin")

    def _render_metrics(self) -> str:
        connections = len(self._http.connections) if self._http else 0
        return self._inbox.metrics.render([
            *self._inbox.samples(), Sample("kfserver_connections", "Open connections of clients.", connections)])

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
        self._inbox.draining = True
        if self._http:
            self._http.close(FINISH_SECONDS)
        undone = self._inbox.close()
        if self._admin:
            self._admin.close(0.0)
        return undone

    def __enter__(self) -> KfServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def feed(self, body: bytes) -> Response:
        """Push ``body`` as the platform would, without a socket: signed and sealed as the settings ask."""
        query, body = Platform(self.settings, time.time, os.urandom).push(body, encode_json)
        return self.endpoint.handle(Request("POST", self.settings.path or "/", urlencode(query), body))

    def join(self, seconds: Optional[float] = None) -> bool:
        """Wait until every message is handled, for so many seconds at most; whether that was reached."""
        return self._inbox.join(seconds)

    def wsgi(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """A WSGI application (PEP 3333) with the same endpoint, for an existing site."""
        method, length = environ["REQUEST_METHOD"], environ.get("CONTENT_LENGTH") or "0"
        path, body = environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "") or "/", b""
        problem: Optional[PushError] = None
        if not length.isdecimal() or len(length) > 18:
            problem = MalformedPush("Content-Length must be one number")
        elif int(length) > self.settings.max_body:
            problem = PushError(f"more than {self.settings.max_body} bytes", TOO_LARGE, 413)
        else:
            body = environ["wsgi.input"].read(int(length))
        response = self.endpoint.handle(Request(method, path, environ.get("QUERY_STRING", ""), body, problem))
        start_response(f"{response.status} {http.client.responses[response.status]}", list_headers(response))
        return [b"" if method == "HEAD" else response.body]


# ---- 17 Push --------------------------------------------------------------------------------------------------------
# Law: plays the platform against any receiver, over real connections, and judges answers as the platform does. Knows
# nothing of how a push is received and handled.

# Bodies that the platform takes for an answer, with status 200 (its page on customer-service messages).
GOOD_ANSWERS = (b"success", b"")
# Characters of a request or an answer that are shown.
MAX_SHOWN = 4000


class Patience(NamedTuple):
    """How long the sender of a push waits for the answer, and how often it sends again what was not answered.

    The platform's own, by default: 2 s for messages, and the three retries of its page on coupon events. How soon it
    sends again is not documented; a second is what a receiver that is busy asks for.
    """

    answer_seconds: float = 2.0
    retries: int = 3
    pause_seconds: float = 1.0


def read_push_url(text: str) -> Tuple[str, str]:
    """The base and the target of a URL: http://, https://, unix:PATH or, with a path for HTTP, unix:PATH:/kf as in
    nginx. Raises `SettingsError`, without the text, which can hold a password."""
    local = re.fullmatch(r"(unix:.+?)(?::(/[!-~]*))?", text)
    if local and UNIX_FAMILY >= 0:
        return local.group(1), local.group(2) or "/"
    found = re.fullmatch(r"(?i:(https?))://([^/?#@\s]+)(/[!-~]*|\?[!-~]*)?", text)
    base = f"{found.group(1).lower()}://{found.group(2)}" if found else ""
    if not found or not _is_base(base):
        raise SettingsError("push takes a URL like http://127.0.0.1:8080/kf, https://… or unix:/run/kf.sock")
    target = (found.group(3) or "/").partition("#")[0]
    return base, target if target.startswith("/") else "/" + target


class Draft(NamedTuple):
    """A push before it is sent: the message in the clear, what rides in the query, the body, and what answers it."""

    message: bytes
    query: Mapping[str, str]
    body: bytes
    expected: Sequence[bytes] = GOOD_ANSWERS


# The types of message that are written here, and the field that makes each.
_MAIN_FIELDS: Mapping[str, str] = MappingProxyType({"text": "Content", "image": "PicUrl", "event": "Event"})


class Drafter:
    """Drafts the pushes that the arguments ask for. Raises `SettingsError` for what does not go together.

    Each message is one of its own, or a receiver would drop it as a repeat: its MsgId of 63 bits is no other's. Events
    have none, and are known by their CreateTime: a sender's events lie a second apart, the last of them now.
    """

    def __init__(self, arguments: argparse.Namespace, settings: Settings) -> None:
        self._arguments, self._kind = arguments, _chosen_kind(arguments)
        if arguments.in_body and not (settings.aes_key or self._kind == "handshake"):
            raise SettingsError("--in-body is for encrypted pushes and handshakes: add --aes-key, --app-id, "
                                "or --handshake")
        self._platform = Platform(settings, time.time, os.urandom)
        self._encode = encode_json if arguments.form == "json" else encode_xml
        self._app = arguments.to or settings.app_id or "app"
        self._packet = read_packet(arguments.file) if self._kind == "file" else b""
        # Another start for each run, high enough that a receiver which reads ids as floating point shows it.
        self._first_id = 2 ** 62 + random.getrandbits(61)

    def draft(self, number: int) -> Draft:
        """The push of that number, from 0."""
        in_body = self._arguments.in_body
        if self._kind == "handshake":
            query, body = self._platform.handshake(in_body)
            echo = query.get("echoStr") or dict(parse_qsl(body.decode()))["echoStr"]
            return Draft(b"", query, body, (echo.encode(),))
        message = self._packet or self._encode(self.fields(number))
        return Draft(message, *self._platform.push(message, self._encode, in_body))

    def fields(self, number: int) -> Fields:
        """The fields of the message of that number."""
        wanted, now, content = self._arguments, int(time.time()), getattr(self._arguments, self._kind)
        fields: Dict[str, Union[str, int]] = {"ToUserName": self._app, "FromUserName": wanted.sender, "CreateTime": now,
                                              "MsgType": self._kind}
        if wanted.senders > 1:
            fields["FromUserName"] = f"{wanted.sender}-{number % wanted.senders + 1}"
        fields[_MAIN_FIELDS[self._kind]] = "hello" if content is None else content
        if self._kind == "event":
            fields["CreateTime"] = now - (wanted.count - 1 - number) // wanted.senders
        else:
            fields["MsgId"] = self._first_id + number
        return {**fields, **dict(wanted.field)}


def _chosen_kind(arguments: argparse.Namespace) -> str:
    """What is to be pushed; a text, unless something else is asked for."""
    kinds = ("text", "image", "event", "file", "handshake")
    chosen = [kind for kind in kinds if getattr(arguments, kind) not in (None, False)] or ["text"]
    if len(chosen) > 1:
        raise SettingsError(f"--{chosen[0]} and --{chosen[1]} are different pushes: choose one")
    if arguments.field and chosen[0] not in _MAIN_FIELDS:
        raise SettingsError(f"--field goes into a message that push writes itself: leave out --field, or --{chosen[0]}")
    return chosen[0]


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


class Outcome(NamedTuple):
    """What became of one try: an answer, or status 0 where none came. ``reason`` says why it does not count, and is
    empty if it does. ``seconds`` went by since the try began."""

    status: int
    body: bytes
    reason: str
    seconds: float


class PushRun:
    """Pushes ``count`` messages on ``connections`` threads, each until it is answered or was tried as often as the
    platform tries; counts what comes of it. ``told`` hears of each try, and whether another will follow."""

    def __init__(self, arguments: argparse.Namespace, client: HttpClient, target: str, patience: Patience) -> None:
        self._arguments, self._client, self._target, self._patience = arguments, client, target, patience
        self._lock = threading.Lock()  # guards all below
        self._numbers = iter(range(arguments.count))
        self._started = time.monotonic()
        self.counts: Counter[str] = Counter()  # messages answered; tries sent, retried and repeated
        self.refused: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.times: List[float] = []  # seconds to each answer that counts

    def run(self, draft: Callable[[int], Draft], told: Callable[[Draft, Outcome, str], None]) -> None:
        """Push them all, from threads; returns when all are through."""
        threads = [threading.Thread(target=self._work, args=(draft, told), daemon=True)
                   for _ in range(min(self._arguments.connections, self._arguments.count))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, draft: Callable[[int], Draft], told: Callable[[Draft, Outcome, str], None]) -> None:
        while True:
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            if self._arguments.rate:
                time.sleep(max(0.0, self._started + number / self._arguments.rate - time.monotonic()))
            self._push(number, draft(number), told)

    def _push(self, number: int, draft: Draft, told: Callable[[Draft, Outcome, str], None]) -> None:
        """Send one message as often as the platform would; the same bytes each time, by which it is known again."""
        lose_answer = is_lost(number, self._arguments.repeat)
        for retries_left in range(self._patience.retries + lose_answer, -1, -1):
            outcome = self._try(draft)
            if not outcome.reason and not lose_answer:
                next_step = ""
            elif not outcome.reason:
                next_step, lose_answer = "repeated", False
            else:
                next_step = "retried" if retries_left > lose_answer else ""
            self._count(outcome, next_step)
            told(draft, outcome, next_step)
            if not next_step:
                return
            time.sleep(self._patience.pause_seconds if outcome.reason else 0.0)

    def target_of(self, draft: Draft) -> str:
        """The path of the URL, and the query."""
        joint = "" if not draft.query else "&" if "?" in self._target else "?"
        return f"{self._target}{joint}{urlencode(draft.query)}"

    def _try(self, draft: Draft) -> Outcome:
        started, status, body = time.monotonic(), 0, b""
        try:
            status, body = self._client.exchange("POST", self.target_of(draft), draft.body, _content_type(draft.body))
            reason = judge(status, body, draft.expected)
        except (OSError, http.client.HTTPException) as error:
            reason = _explain_failure(error)
        seconds = time.monotonic() - started
        if seconds > self._patience.answer_seconds:
            status, reason = 0, f"no answer in {self._patience.answer_seconds:g} s"
        return Outcome(status, body, reason, seconds)

    def _count(self, outcome: Outcome, next_step: str) -> None:
        with self._lock:
            self.counts.update(["sent", next_step or ("unanswered" if outcome.reason else "answered")])
            if not outcome.reason:
                self.times.append(outcome.seconds)
            else:
                (self.refused if outcome.status else self.failed)[outcome.reason] += 1

    def state(self) -> str:
        """How far it is, in a line."""
        wrong = sum(self.refused.values()) + sum(self.failed.values())
        rate = len(self.times) / max(time.monotonic() - self._started, 0.001)
        return f"{self.counts['answered']}/{self._arguments.count}, {rate:.0f}/s" + (
            f", {wrong} tries failed" if wrong else "")

    def report(self) -> Dict[str, Any]:
        """Everything in plain values, for JSON: times in milliseconds, None where there was no answer."""
        times, seconds = sorted(self.times), time.monotonic() - self._started
        return {"messages": self._arguments.count, "sent": self.counts["sent"], "answered": self.counts["answered"],
                "unanswered": self._arguments.count - self.counts["answered"], "repeated": self.counts["repeated"],
                "retried": self.counts["retried"], "refused": dict(self.refused), "failed": dict(self.failed),
                "p50_ms": percentile_ms(times, 50), "p99_ms": percentile_ms(times, 99),
                "max_ms": percentile_ms(times, 100), "seconds": round(seconds, 3),
                "pushes_per_second": round(len(times) / seconds, 1)}


def is_lost(number: int, percent: int) -> bool:
    """Whether the first answer to the push of that number counts as lost: so many in a hundred, evenly spread and not
    by chance, so that the figures of a run can be checked to the unit."""
    return (number + 1) * percent // 100 > number * percent // 100


def _content_type(body: bytes) -> str:
    """By the first byte of the body; the platform documents none."""
    first = body.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    return {b"<": "text/xml", b"{": "application/json"}.get(first, "application/x-www-form-urlencoded")


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


def percentile_ms(times: Sequence[float], percent: int) -> Optional[float]:
    """The one of ``times``, seconds in order, that so many in a hundred do not exceed (the nearest rank), in
    milliseconds; None if there are none."""
    return round(times[max(0, -(-len(times) * percent // 100) - 1)] * 1000, 3) if times else None


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


_NOT_FOR_SCREENS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What can be done about an answer that does not count, by the reason of `judge`.
_PUSH_ADVICE: Mapping[str, str] = MappingProxyType({
    "200 with a wrong body": "a push is answered by success or nothing, a handshake by its echoStr, to the letter",
    "403": "push with the receiver's own --token, and with its --aes-key and --app-id if it has them",
    "404": "the receiver takes pushes at another path, its --path: put that into the URL",
    "503": "the receiver's queue is full: see its log, or push slower with --rate"})


def quote_bytes(mark: str, data: bytes) -> str:
    """The bytes as lines behind a mark, fit for a terminal: neither broken UTF-8 nor control characters."""
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    text = _NOT_FOR_SCREENS.sub(lambda found: f"\\x{ord(found.group()):02x}", text)
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text) - MAX_SHOWN} more)"
    return "\n".join(f"{mark} {line}".rstrip() for line in shown.split("\n"))


def _say(out: TextIO, text: str, end: str = "\n") -> None:
    """Print also the characters that the screen does not know, as escapes."""
    encoding = out.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, file=out, flush=True)


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
    add = parser.add_argument
    add("url", metavar="URL", help="where the receiver is")
    add("--text", metavar="T", help="a text message (hello)")
    add("--image", metavar="URL", help="a message with the picture at URL")
    add("--event", metavar="NAME", help="an event, as user_get_coupon")
    add("--field", metavar="K=V", action="append", type=_field_option, default=[],
        help="one more field, or another value; repeatable")
    add("--file", metavar="PACKET", help="a packet, sent as it is; - for the standard input")
    add("--handshake", action="store_true", help="the handshake of saving the URL in the console")
    add("--to", metavar="APP", help="the app it is for (--app-id, or app)")
    add("--sender", metavar="ID", default="user", help="the openid it is from (user)")
    add("--xml", dest="form", action="store_const", const="xml", default="xml", help="in XML (default)")
    add("--json", dest="form", action="store_const", const="json", help="in JSON")
    add("--token", metavar="T", help="sign with this Token (KF_TOKEN)")
    add("--aes-key", metavar="KEY", help="encrypt with this EncodingAESKey (KF_AES_KEY)")
    add("--app-id", metavar="APP", help="the app that is sealed in (KF_APP_ID)")
    add("--in-body", action="store_true", help="signature in the body instead of the query")
    add("--insecure", action="store_true", help="accept any certificate")
    for option, kind, low, high, default, text in (
            ("--count", int, 1, 10 ** 7, 1, "messages to push (1)"),
            ("--rate", float, 0, 10 ** 6, 0, "new ones a second; 0 (default): as fast as it goes"),
            ("--senders", int, 1, 10 ** 7, 1, "senders that they come from in turn (1)"),
            ("--repeat", int, 0, 100, 0, "of 100, so many sent again as after a lost answer"),
            ("--connections", int, 1, 1000, 16, "connections to push on (16)")):
        add(option, metavar="N", type=_number_option(option, kind, low, high), default=default, help=text)
    add("--json-report", metavar="FILE", help="write the figures as JSON too; - for stdout")
    return parser


PLATFORM_PATIENCE = Patience()


def push(arguments: argparse.Namespace, patience: Patience = PLATFORM_PATIENCE) -> int:
    """Push as the arguments of `build_push_parser` ask, and show what comes of it; 0 if all was answered, 1 if not.

    Raises `SettingsError` before anything is sent. A report on the standard output has that for itself.
    """
    base, target = read_push_url(arguments.url)
    secrets = {name: getattr(arguments, name) or os.environ.get(f"KF_{name.upper()}", "")
               for name in ("token", "aes_key", "app_id")}
    drafter = Drafter(arguments, Settings(**secrets))  # type: ignore[arg-type]
    client = HttpClient(base, patience.answer_seconds, _any_certificate() if arguments.insecure else None)
    with contextlib.ExitStack() as opened:
        report = _open_report(arguments.json_report, opened)  # before the run, lest that turn out to have been in vain
        out = sys.stderr if report is sys.stdout else sys.stdout
        run = PushRun(arguments, client, target, patience)
        try:
            client.probe()
        except ssl.SSLError:
            pass  # somebody is there, and the push will show what is wrong
        except OSError as error:
            reason = error.strerror or str(error)
            run.failed[reason] += 1
            _say(sys.stderr, f"nobody listens at {arguments.url}: {reason}; start the receiver, or correct the URL")
        if not run.failed:
            with contextlib.suppress(KeyboardInterrupt):
                (_push_one if arguments.count == 1 else _push_many)(run, drafter, patience, out)
        client.close()
        if report:
            _say(report, json.dumps(run.report(), indent=2))
    return 0 if run.counts["answered"] == arguments.count else 1


def _open_report(path: Optional[str], opened: contextlib.ExitStack) -> Optional[TextIO]:
    if not path or path == "-":
        return sys.stdout if path else None
    try:
        return opened.enter_context(open(path, "w", encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot write {path}: {error.strerror}; let --json-report name another file") from None


def _any_certificate() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _push_one(run: PushRun, drafter: Drafter, patience: Patience, out: TextIO) -> None:
    """Show the push before it is sent, since the answer may take its time, and what becomes of each try."""
    def tell(draft: Draft, outcome: Outcome, next_step: str) -> None:
        if outcome.status:
            _say(out, quote_bytes(f"< {outcome.status}", outcome.body.strip() or b"(nothing)"))
        verdict = f"not answered: {outcome.reason}" if outcome.reason else "answered"
        _say(out, f"{verdict}, after {outcome.seconds * 1000:.2f} ms")
        if run.counts["sent"] == 1 and outcome.reason in _PUSH_ADVICE:
            _say(out, _PUSH_ADVICE[outcome.reason])
        if next_step:
            _say(out, "sent again, as if that answer had been lost" if next_step == "repeated" else
                 f"try {run.counts['sent'] + 1} of {patience.retries + 1} in {patience.pause_seconds:g} s")
    draft = drafter.draft(0)
    _say(out, quote_bytes(">", f"POST {run.target_of(draft)}\n\n".encode() + draft.body))
    if draft.message not in draft.body:
        _say(out, "sealed in it:\n" + quote_bytes("|", draft.message))
    run.run(lambda number: draft, tell)


def _push_many(run: PushRun, drafter: Drafter, patience: Patience, out: TextIO) -> None:
    """Show a line of how it goes, now and then, and the figures at the end, be it an early one."""
    due = [time.monotonic() + 1.0]

    def tell(draft: Draft, outcome: Outcome, next_step: str) -> None:
        if time.monotonic() >= due[0]:
            due[0] = time.monotonic() + 1.0
            _say(out, run.state())
    try:
        run.run(drafter.draft, tell)
    finally:
        _say(out, format_table(run.report()))
        for reason in sorted(run.refused.keys() & _PUSH_ADVICE.keys()):
            _say(out, f"{reason}: {_PUSH_ADVICE[reason]}")


# ---- 18 Handlers file -----------------------------------------------------------------------------------------------
# Law: from a path or a module's name to a registry, and to the next one when the file changes. What is wrong with the
# file is told to its author: a line with what to do, and that file's traceback.

DEFAULT_HANDLERS = "handlers.py"
# Seconds between two looks at the file of the handlers.
WATCH_SECONDS = 1.0


def _default_handlers() -> str:
    """handlers.py in the current folder, or else beside kfserver.py; empty if there is neither."""
    folders = (os.getcwd(), os.path.dirname(os.path.abspath(__file__)))
    paths = [os.path.join(folder, DEFAULT_HANDLERS) for folder in folders]
    return next((path for path in paths if os.path.exists(path)), "")


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


def _import_handlers(wanted: str) -> ModuleType:
    """The module of a dotted name, or of a file by its path, run anew; a file's neighbours can be imported from it."""
    if wanted.endswith(".py") or os.path.exists(wanted):
        path = os.path.abspath(wanted)
        if os.path.dirname(path) not in sys.path:
            sys.path.append(os.path.dirname(path))
        return _run_file(ModuleType(os.path.splitext(os.path.basename(path))[0]), path)
    known = sys.modules.get(wanted)
    if known and known.__spec__ and known.__file__:  # importing it once more would not look at its file
        return _run_file(importlib.util.module_from_spec(known.__spec__), known.__file__)
    return importlib.import_module(wanted)


def _run_file(module: ModuleType, path: str) -> ModuleType:
    """Run the file as it is now in a new module: bytecode kept from an edit in the same second would pass for that of
    the last one. If that fails, a module that had its name before has it again."""
    name = module.__name__
    before, sys.modules[name], module.__file__ = sys.modules.get(name), module, path
    try:
        with open(path, "rb") as file:
            exec(compile(file.read(), path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        if before:
            sys.modules[name] = before
        raise
    return module


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

    def poll(self) -> bool:
        """Whether there is a version that is new since the last call, and loads: `registry` is then its own.

        Of one that does not load, the traceback is printed and the log tells, once.
        """
        stamp = _file_stamp(self.path or _default_handlers())
        if stamp is None or stamp == self._seen:  # None: some editors remove a file before they write it
            return False
        self._seen = stamp
        try:
            self.registry, self.path = load_handlers(self._wanted)
        except SettingsError as error:
            log.error("%s; until then the handlers from before stay in service", error)
            return False
        return True

    def watch(self, server: KfServer, later: Later) -> None:
        """Put new versions into service from now on. They run on the thread of ``later``: an `Alarm` of its own, or the
        server's retries would wait for them."""
        if self.poll():
            server.registry = self.registry
            log.info("%d handlers loaded again from %s", len(self.registry), self.path)
        later(WATCH_SECONDS, lambda: self.watch(server, later))

    def describe(self) -> List[str]:
        """How many handlers there are, from where, and each, in lines."""
        if not self.path:
            return ["0 handlers: no handlers.py here; every message is answered and dropped"]
        return [f"{len(self.registry)} handlers from {self.path}", *(f"  {rule}" for rule in self.registry.rules)]


def _file_stamp(path: str) -> Optional[Tuple[int, int, int]]:
    """What changes when a file is written or replaced; None if it is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


# ---- 19 Chat --------------------------------------------------------------------------------------------------------
# Law: a terminal or a script in the place of the platform. Messages are made from bytes as those of a push, and replies
# pass the same `Outbox`; only the network is missing. Knows nothing of servers and settings.

# What can be typed behind a slash, what must follow it, and what it does: a method of `Chat` has each one's name.
CHAT_COMMANDS: Mapping[str, Tuple[str, str]] = MappingProxyType({
    "image": ("URL", "send a picture"),
    "event": ("NAME [FIELD=VALUE ...]", "an event, and its fields"),
    "raw": ("PACKET", "any message, in JSON or XML on one line"),
    "as": ("OPENID", "be another user"),
    "help": ("", "show this list"),
    "quit": ("", "end, as the end of input does")})
CHAT_HELP = "\n".join(f"  {usage:<31}{purpose}" for usage, purpose in (
    ("any line", "a text message; type its first slash twice"),
    *((f"/{name} {usage}", purpose) for name, (usage, purpose) in CHAT_COMMANDS.items())))


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
    """A conversation with the handlers, printed as it goes. Each method ``do_…`` is one of CHAT_COMMANDS.

    ``user`` is the openid of who writes. ``failures`` counts the messages whose handler failed, and the lines that were
    not understood. ``over`` is set once the user wants to end.
    """

    def __init__(self, handlers: ReloadingHandlers) -> None:
        self.user = "user"
        self.failures = 0
        self.over = False
        self._handlers = handlers
        self._api: Any = PrintedReplies()
        # Microseconds, so that no later conversation has the same ids: handlers may remember what they have seen.
        self._ids = itertools.count(time.time_ns() // 1000)

    def take(self, line: str) -> None:
        """Do what a line says: it is a text to the handlers or, behind a slash, a command. A blank one says nothing."""
        if self._handlers.poll():
            _show(f"{len(self._handlers.registry)} handlers loaded again from {self._handlers.path}")
        if line.startswith("//") or not line.startswith("/"):
            if line.strip(BLANKS):
                self._send(MsgType="text", MsgId=next(self._ids), Content=line[line.startswith("//"):])
            return
        name, _, rest = line[1:].partition(" ")
        if name not in CHAT_COMMANDS:
            self._complain(f"no command /{name}: /help lists them; for a slash at the start of a text type two")
        elif CHAT_COMMANDS[name][0] and not rest.strip():
            self._complain(f"write /{name} {CHAT_COMMANDS[name][0]}")
        else:
            getattr(self, f"do_{name}")(rest.strip())

    def _complain(self, text: str) -> None:
        self.failures += 1
        _show(text)

    def do_image(self, url: str) -> None:
        """The user sends the picture at ``url``."""
        self._send(MsgType="image", MsgId=next(self._ids), PicUrl=url)

    def do_event(self, words: str) -> None:
        """An event: its name and, if it has any, its fields as NAME=VALUE."""
        name, *pairs = words.split()
        if all("=" in pair for pair in pairs):
            self._send(MsgType="event", Event=name, **dict(pair.split("=", 1) for pair in pairs))
        else:
            self._complain("a field of an event is written NAME=VALUE, without blanks; /raw takes what has some")

    def do_raw(self, packet: str) -> None:
        """A whole message, in JSON or XML, as a push brings it."""
        try:
            message = parse(packet.encode("utf-8", "replace"))
        except MalformedPush as error:
            self._complain(f"a server would refuse this: {error}")
            return
        message.key = dedup_key(message)
        message.outbox = Outbox(self._api, message)
        self._handle(message)

    def do_as(self, open_id: str) -> None:
        """Another user writes from now on."""
        self.user = open_id

    def do_help(self, _: str) -> None:
        """Print what can be typed."""
        print(CHAT_HELP, flush=True)

    def do_quit(self, _: str) -> None:
        """The user wants to end."""
        self.over = True

    def _send(self, **fields: Any) -> None:
        common = {"ToUserName": "app", "FromUserName": self.user, "CreateTime": int(time.time())}
        self.do_raw(json.dumps({**common, **fields}))

    def _handle(self, message: Message) -> None:
        registry = self._handlers.registry
        match = registry.find(message)
        if match is None:
            _show(f"nobody takes this; to take it, write: {decorator_for(message)}")
            return
        for rule in registry.rules_of(match.handler):
            _show(rule)
        error = attempt(lambda: message.reply(registry.handle(message)))
        if error:
            self.failures += 1
            _show_error(error)
            for failed in registry.handle_error(message, error):
                _show_error(failed)


def build_chat_parser() -> argparse.ArgumentParser:
    """The parser of the command ``chat``."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py chat", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Talk to your handlers without a network. They are loaded again when changed.",
        epilog=f"what can be typed:\n{CHAT_HELP}\n\nLines from a pipe or a file can be a test: "
               "then the exit status is 1\nif a handler failed or a line was not understood.")
    parser.add_argument("--handlers", metavar="FILE", default="", help=SETTING_FIELDS["handlers"].metadata["help"])
    return parser


def chat(arguments: argparse.Namespace) -> int:
    """Talk to the handlers until the input ends. 0 from a terminal; from a script, whose lines are printed behind their
    user's name, 1 if anything in it failed. Raises `SettingsError` when the handlers cannot be loaded."""
    handlers = ReloadingHandlers(arguments.handlers or os.environ.get("KF_HANDLERS", ""))
    talk = Chat(handlers)
    if sys.stdin.isatty():
        where = handlers.path or "nowhere: there is no handlers.py here"
        print(f"{len(handlers.registry)} handlers from {where}; /help lists what can be typed", flush=True)
        _converse(talk)
        return 0
    for line in filter(lambda line: line.strip(BLANKS), sys.stdin):
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
    # It never makes the file, and changes it only to put back.
    address = f"file:{quote(os.path.abspath(arguments.journal))}?mode={'rw' if arguments.requeue else 'ro'}"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS, isolation_level=None)) as db:
            requeued = db.execute(_REQUEUE).rowcount if arguments.requeue else 0
            report = _report_journal(db, requeued, arguments.show)
    except sqlite3.Error as error:
        raise SettingsError(f"cannot use the journal {arguments.journal}: {error}") from error
    _say(sys.stdout, json.dumps(report, indent=2) if arguments.json else _format_report(report))
    return 0


def _report_journal(db: sqlite3.Connection, requeued: int, show: bool) -> Report:
    """What the command tells, as JSON prints it."""
    def tell(row: Row) -> Report:
        told: Report = {"key": row.key, "received": row.received, "tries": row.tries, "error": row.error}
        return {**told, "content": row.payload.decode("utf-8", "backslashreplace")} if show else told
    db.execute("BEGIN")  # one moment's view, though a server writes meanwhile
    counts = dict(db.execute("SELECT state, COUNT(*) FROM messages GROUP BY state"))
    waiting = [tell(row) for row in read_rows(db, WAITING)]
    return {"requeued": requeued, "waiting": len(waiting), "finished": counts.get(FINISHED, 0),
            "dead": counts.get(DEAD, 0), "oldest_waiting": waiting[0] if waiting else None,
            "waiting_messages": waiting if show else None,
            "dead_messages": [tell(row) for row in read_rows(db, DEAD)]}


def _format_report(report: Report) -> str:
    """The report for people; characters that could steer a terminal are written as escapes."""
    def line(row: Report) -> str:
        received = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["received"]))
        error, content = row["error"] and f", {row['error']}", row.get("content", "")
        return printable(f"{row['key']} received {received}{error}") + (content and f"\n    {printable(content)}")
    put_back = f"{report['requeued']} put back, to be handled when the server starts the next time"
    lines = [put_back] if report["requeued"] else []
    lines += [f"{name:<9}{report[name]:>7}" for name in ("waiting", "finished", "dead")]
    waiting = report["waiting_messages"] or [report["oldest_waiting"]]
    lines += [f"waiting for {time.time() - row['received']:.0f} s: {line(row)}" for row in waiting if row]
    return "\n".join([*lines, *(f"dead: {line(row)}" for row in report["dead_messages"])])


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


def find_command(arguments: Sequence[str]) -> Tuple[str, Sequence[str]]:
    """The command that the arguments begin with, and the rest of them; to serve, if they begin with none.

    Raises `SettingsError` for a word that is no command, and suggests a near one.
    """
    if not arguments or arguments[0].startswith("-"):
        return "serve", arguments
    if arguments[0] in COMMANDS:
        return arguments[0], arguments[1:]
    near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
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
        print("\n".join(handlers.describe()))
        return 0
    server = KfServer(handlers.registry, settings).start()
    signals = _signals_to_end()
    with contextlib.suppress(KeyboardInterrupt):  # the first signal raises it here
        for each in signals:
            signal.signal(each, signal.default_int_handler)
        # In one write: what handlers print must not come between.
        print("\n".join([f"kfserver {__version__} listening on {server.url}", *handlers.describe(),
                         *_advice(settings, os.environ)]), flush=True)
        if settings.reload:
            handlers.watch(server, Alarm().later)
        while True:
            time.sleep(1.0)  # not for ever: a signal in the moment before it is only noticed at its end
    for each in signals:
        signal.signal(each, lambda number, frame: os._exit(1))
    log.info("shutting down: %g s for the messages that wait; a second signal ends at once", settings.grace)
    undone = server.stop()
    for key in undone:
        log.warning("left undone: key=%s", key)
    return 1 if undone else 0


def _signals_to_end() -> List[int]:
    hang_up = getattr(signal, "SIGHUP", None)  # of a terminal that closes; ignored under nohup
    if hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN:
        return [signal.SIGTERM, signal.SIGINT]
    return [signal.SIGTERM, signal.SIGINT, hang_up]


def check_parts(settings: Settings) -> None:
    """Raise `SettingsError` for a part that could not be made, without touching the port or the journal."""
    if settings.redis:
        connect_redis(settings.redis)
    if settings.tls_cert:
        make_tls_context(settings)


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


def _accept_any_character() -> None:
    """What the input's encoding does not know is read as U+FFFD, what the output's does not know is printed escaped."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


# The parser of each command, and what runs it and gives the exit status.
COMMANDS: Mapping[str, Tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int]]] = (
    MappingProxyType({"serve": (build_parser, serve), "push": (build_push_parser, push),
                      "chat": (build_chat_parser, chat), "journal": (build_journal_parser, journal_command)}))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The whole program, with the command line's arguments or others; the exit status."""
    _accept_any_character()
    try:
        command, rest = find_command(sys.argv[1:] if arguments is None else arguments)
        build, run = COMMANDS[command]
        return run(build().parse_args(rest))
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

