"""kfserver: receives the customer-service messages of Baidu smart mini-programs.

The platform POSTs every message of a user to one URL, waits two seconds for the
answer ``success``, and sends again what was not answered so. This module checks
where a push comes from, answers at once, drops repeats, and hands each message
once, in order, to plain Python functions in a registry. One file, the standard
library alone, CPython 3.7 or later:

    python3 kfserver.py --port 8080

The path of one push, through these ten objects:

    bytes -> Connection -> Request -> Endpoint -> Response -> bytes
                                         |  proves it, decrypts it, parses it
                                         v
                                      Message
                                         |
             Inbox.take: a key, claimed in the ClaimCache; a place in the queue
             Inbox.deliver: one write of the Journal for all pushes of a round
                                         |
                                         v
             Dispatcher: a Job in its sender's mailbox, until a worker comes
                                         |
                                         v
             HandlerRegistry -> handler(message) -> what it returns -> SendApi

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

Sections 1 to 8 are pure: they touch no socket, file or clock, and are given the clock,
the claims and the queue as arguments. Their one thread is that of async handlers.
"""

from __future__ import annotations  # kfserver needs Python 3.7 or later

import argparse
import base64
import bisect
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import heapq
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
import selectors
import signal
import socket
import ssl
import stat
import sys
import threading
import time
import traceback
import weakref
from collections import Counter, OrderedDict, deque
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import PurePath
from socketserver import TCPServer
from types import MappingProxyType, ModuleType, TracebackType
from typing import (TYPE_CHECKING, Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping,
                    NamedTuple, NoReturn, Optional, Sequence, Set, Tuple, Type, TypeVar, Union)
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlencode, urlsplit
from xml.parsers.expat import ErrorString, ExpatError, ParserCreate

if TYPE_CHECKING:
    import sqlite3
    from concurrent.futures import Future

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

__version__ = "1.0.0"
__all__ = ["HandlerRegistry", "Image", "KfServer", "Message", "SendApi", "Settings", "Text"]

log: logging.Logger = logging.getLogger("kfserver")  # Python 2 stops here: kfserver needs Python 3.7 or later


# ---- 1 Errors -------------------------------------------------------------------------------------------------------
# Law: one root, named by whose fault it is. An error that can answer a push carries the HTTP status that does so.
# The text of an error never repeats what a user wrote, nor a token, a signature or a secret.

class KfError(Exception):
    """The root of every error that kfserver raises on purpose."""


class PushError(KfError):
    """A push is refused with ``status``. The sender is told the reason, or ``public`` where there is one; ``advice``
    tells the operator, in the log, what to do."""

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


class PatternError(KfError):
    """A function that is a pattern raised an error: the try has failed, as if the handler had raised it."""


class ReplyError(KfError):
    """A reply did not reach the user, or it is not known whether it did. The handler is not run again because of it."""


class NetworkError(ReplyError):
    """The user does not have the reply, because the send API was away or busy: it can be sent again later."""


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
    """What the log shows of the error: its text, which may hold a user's words, only at the level debug."""
    if log.isEnabledFor(logging.DEBUG):
        return type(error), error, error.__traceback__
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


# Seconds between two lines of one kind in the log: an attacker must not be able to fill it.
TELL_SECONDS = 60.0


class Teller:
    """Tells the log about each kind of thing at most once a minute, and then how often it was left out before.

    ``timer`` gives seconds from anywhere. A kind is a text from this file, never from outside, so there are few. There
    is no lock: when two threads tell of one kind at the same moment, both lines may be written.
    """

    def __init__(self, timer: Callable[[], float]) -> None:
        self._timer = timer
        self._told: Dict[str, Tuple[float, int]] = {}  # of each kind: when it was told, how often it was left out since

    def warn(self, kind: str, text: str, *arguments: object) -> None:
        """Log a warning, unless one of this kind was logged in the last minute. The arguments are put into the text."""
        more = self._count(kind)
        if more is not None:
            log.warning(text + "%s", *arguments, more)

    def guard(self, function: Callable[..., object], *arguments: Any) -> bool:
        """Call what must not end the thread it runs on; whether it went well. Not even telling of an error raises."""
        error = attempt(function, *arguments)
        if error:
            attempt(self.report_bug, error)
            error.__traceback__ = None  # which up to Python 3.10 leads back to this frame: a cycle
        return error is None

    def report_bug(self, error: BaseException) -> None:
        """Tell of an error that should not be. Its kind is its type, and the line that raised it."""
        more = self._count(type(error).__name__ if isinstance(error, KfError) else describe_error(error))
        if more is not None:
            log.error("an error inside kfserver; please report this%s", more, exc_info=exc_info_of(error))

    def _count(self, kind: str) -> Optional[str]:
        """What to add to the line, if it is time for one; None if not."""
        now = self._timer()
        when, left_out = self._told.get(kind, (now - TELL_SECONDS, 0))
        if now - when < TELL_SECONDS:
            self._told[kind] = when, left_out + 1
            return None
        self._told[kind] = now, 0
        return f" ({left_out} more like this since the last such line)" if left_out else ""


# ---- 2 Values -------------------------------------------------------------------------------------------------------
# Law: plain values, read-only, that know nothing but themselves. Every other section may use them.

# An access token, or a function that returns the current one.
AccessToken = Union[str, Callable[[], str]]


def _setting(default: Any, text: str, low: Optional[float] = None, high: Optional[float] = None,
             choices: Sequence[str] = ()) -> Any:
    """A field of `Settings`: its default, its line of help, and the values that it takes."""
    return dataclasses.field(default=default, metadata={"help": text, "low": low, "high": high, "choices": choices})


def _secret(text: str) -> Any:
    """A text field of `Settings` that must not show when settings are printed."""
    return dataclasses.field(default="", repr=False, metadata=_setting("", text).metadata)


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
    app_id: str = _setting("", "the id that ends every safe-mode push: the mini-program's, or the third-party "
                               "platform's; several with commas between them")
    compatible: bool = _setting(False, "accept plain pushes beside encrypted ones, though an --aes-key is set")
    max_age: float = _setting(0.0, "seconds a signature's timestamp may be old or ahead; 0: not checked", 0)
    tls_cert: str = _setting("", "file of the certificate chain; serves HTTPS (TLS 1.2 or later)")
    tls_key: str = _setting("", "file of the certificate's private key; default: in the file of --tls-cert")
    app_key: str = _secret("App Key of the console, to send what handlers return")
    app_secret: str = _secret("App Secret of the console")
    access_token: AccessToken = _secret("instead of --app-key: an access token, or @FILE that always holds a valid one")
    api_base: str = _setting("https://openapi.baidu.com", "where the send API is")
    user_type: int = _setting(2, "who gets replies: 1 guests, 2 users with a Baidu account", 1, 2)
    third_party: bool = _setting(False, "send as a third-party platform, with the authorised app's --access-token")
    handlers: str = _setting("", "file or module of the handlers; default: handlers.py here, then beside kfserver.py")
    workers: int = _setting(16, "messages handled at the same time", 1, 10000)
    queue_size: int = _setting(10000, "messages that may wait; above it a push is answered 503", 1)
    tries: int = _setting(3, "times a failing handler is tried in all", 1, 20)
    dedup_size: int = _setting(10000, "messages remembered to drop repeats of", 1)
    max_body: int = _setting(1024 * 1024, "bytes that a push may have", 1)
    max_connections: int = _setting(1000, "connections at a time; more, and the longest waiting gives way", 1)
    journal: str = _setting("", "file in which messages survive a crash, as kf.db; empty: memory only")
    sessions: int = _setting(10000, "conversations remembered, the longest untouched forgotten first", 1)
    journal_sync: str = _setting("normal", "normal: survives a crash of the process; full: a power cut too",
                                 choices=("normal", "full"))
    redis: str = _secret("address of a Redis server through which several instances drop repeats as one")
    admin: str = _setting("", "address of a second listener: a page to look at, /healthz, /metrics; as 127.0.0.1:9090")
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
                (self.admin and not (re.fullmatch(r"\S*:\d{1,5}", self.admin)
                                     and int(self.admin.rpartition(":")[2]) < 65536), "admin",
                 "takes an address and a port, as 127.0.0.1:9090"),
                (self.aes_key and not re.fullmatch("[A-Za-z0-9+/]{43}", self.aes_key), "aes_key",
                 "takes the 43 characters that the console shows"),
                (self.app_id and not all(map(str.strip, self.app_id.split(","))), "app_id",
                 "takes one id, or several with commas between them"),
                (self.aes_key and not (self.token and self.app_id), "aes_key",
                 "needs --token and --app-id too: all three prove a push")):
            if is_wrong:
                raise SettingsError(f"{setting_names(name)} {rule}")


def _is_base(text: str) -> bool:
    """Whether the text is the address of a server, maybe with a path, and nothing else."""
    try:
        parts = urlsplit(text)
        parts.port  # noqa: B018  (raises ValueError for a bad port)
    except ValueError:
        return False
    return bool(re.fullmatch(r"https?://[^/?#@\s]+(/[^?#\s]*)?", text) and parts.hostname)


SETTING_FIELDS: Mapping[str, dataclasses.Field[Any]] = MappingProxyType(
    {field.name: field for field in dataclasses.fields(Settings)})


def setting_names(name: str) -> str:
    """How a user writes the setting: ``--max-body (KF_MAX_BODY)``."""
    return f"--{name.replace('_', '-')} (KF_{name.upper()})"


def check_setting(field: dataclasses.Field[Any], value: Any) -> None:
    """Raise `SettingsError` unless the setting takes the value."""
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    kinds, words = {"int": ((int,), "a whole number"), "float": ((int, float), "a number"),
                    "bool": ((bool,), "true or false"), "str": ((str,), "text"),
                    "AccessToken": ((str,), "text, or a function that returns it")}[str(field.type)]
    good = isinstance(value, kinds) and isinstance(value, bool) == (kinds == (bool,))
    good = good or str(field.type) == "AccessToken" and callable(value)
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
_SCIENTIFIC = re.compile(r"\d{1,20}(?:\.\d{1,20})?[eE][+-]?\d{1,2}", re.ASCII)


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


class Text(NamedTuple):
    """An answer that is a text, for a user whose ``user_type`` is known: 1 guest, 2 Baidu account, 0 as the settings
    say. Return it from a handler, as a plain str."""

    content: str
    user_type: int = 0


class Image(NamedTuple):
    """An answer that shows the picture at ``url``: return it from a handler. ``user_type`` is that of `Text`."""

    url: str
    user_type: int = 0


Answer = Union[str, Text, Image]
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

    __slots__ = ("fields", "inbox", "key", "kept_session", "outbox")

    def __init__(self, fields: Mapping[str, Any], outbox: Optional[Callable[[Answers], None]] = None,
                 session: Optional[Dict[str, Any]] = None) -> None:
        """``outbox`` takes what `reply` is given: in a test, the ``append`` of a list."""
        self.fields = MappingProxyType(fields) if isinstance(fields, dict) else fields
        self.key = ""
        self.outbox = outbox
        self.kept_session = session
        self.inbox: Any = None  # what opens the outbox and loads the session, when they are used for the first time

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.fields == other.fields

    def __repr__(self) -> str:
        # The kind and the key only: a repr ends up in logs, and the user's text must not.
        return f"<Message {self.msg_type} {self.key}>"

    @property
    def session(self) -> Dict[str, Any]:
        """What the dialogue with this sender must remember: a dict of what JSON has, saved when the handler returns."""
        if self.kept_session is None:
            self.kept_session = self.inbox.load_session(self) if self.inbox else {}
        return self.kept_session

    def reply(self, answers: Answers) -> None:
        """Send answers to the user now, from inside a handler that goes on; returning them sends them at its end.

        Raises `HandlerError` above the platform's quota of five for one message, `ReplyError` when they cannot be sent.
        """
        outbox = self.inbox.open_outbox(self) if self.inbox else self.outbox
        if outbox is None:
            raise HandlerError("this message has no way back: in a test, make it with "
                               "Message(fields, outbox=sent.append)")
        outbox(answers)

    def text(self, name: str) -> str:
        """Field ``name`` as text; empty where it is missing or structured."""
        value = self.fields.get(name, "")
        return value if isinstance(value, str) else ""

    from_user_name: str = _field("FromUserName", "The sender's openid; empty for events that have no sender.")
    content: str = _field("Content", "What the user wrote, to the letter; empty for other types than text.")
    pic_url: str = _field("PicUrl", "The address of the picture; empty for other types than image.")

    @property
    def to_user_name(self) -> str:
        """The mini-program's app id. Third-party events call the field appId."""
        return self.text("ToUserName") or self.text("appId")

    @property
    def create_time(self) -> int:
        """When the message was written, in Unix seconds; 0 where it is missing or cannot be read.

        Digits, a number in scientific notation, or, in eventTime of third-party events, Beijing's date and time.
        """
        text = self.text("CreateTime") or self.text("eventTime")
        if text.isdecimal() and len(text) < MAX_NUMBER:
            return int(text)
        if _SCIENTIFIC.fullmatch(text):
            number = float(text)
            return int(number) if number < 2 ** 63 else 0
        try:
            return max(0, int(datetime.datetime.strptime(text + "+0800", "%Y-%m-%d %H:%M:%S%z").timestamp()))
        except ValueError:
            return 0

    @property
    def msg_type(self) -> str:
        """``text``, ``image``, ``event`` or a type of tomorrow. A push with an event name and no type is an event."""
        return self.text("MsgType") or ("event" if self.event else "")

    @property
    def event(self) -> str:
        """The event's name; empty for a message. Third-party pushes write the field in lower case."""
        return self.text("Event") or self.text("event")

    @property
    def msg_id(self) -> Optional[str]:
        """The platform's id of the message, as text; None where there is none, as in events."""
        return self.text("MsgId") or None


# ---- 3 Signatures ---------------------------------------------------------------------------------------------------
# Law: texts in, a verdict out. Knows nothing of where in a request the texts travel.

def sign(*parts: str) -> str:
    """The platform's signature: SHA-1 over the parts, sorted by their bytes and joined, in lower-case hex."""
    ordered = sorted(parts)  # as text, which sorts as its UTF-8 does
    return hashlib.sha1(b"".join([part.encode("utf-8", "surrogatepass") for part in ordered])).hexdigest()


def verify(signature: str, *parts: str) -> bool:
    """Whether ``signature`` is that of the parts, compared in constant time and without regard to case.

    Any text may come, ASCII or not.
    """
    return hmac.compare_digest(sign(*parts).encode(), signature.lower().encode("utf-8", "surrogatepass"))


# ---- 4 Encryption ---------------------------------------------------------------------------------------------------
# Law: the envelope of safe mode, and AES-256-CBC beneath it. Texts and bytes in, bytes out, or `ForbiddenPush`; its
# reason is for the log only. Knows nothing of requests and messages.

# Bytes: of an AES block, of what the envelope pads to, of the random head and of the length that open its plaintext.
AES_BLOCK = 16
ENVELOPE_BLOCK = 32
RANDOM_HEAD = 16
LENGTH_FIELD = 4
# Rounds of AES with a key of 256 bits (FIPS 197, section 5).
ROUNDS = 14
# An app id as it may be shown in a log.
_APP_ID = re.compile(rb"[\w.-]{1,64}", re.ASCII)
# A key, a plaintext and what AES-256-CBC makes of it: FIPS 197, C.3, with our iv added to its block.
KNOWN_KEY, KNOWN_PLAIN = bytes(range(32)), bytes(range(0, 256, 16))
KNOWN_SEALED = bytes.fromhex("8ea2b7ca516745bfeafc49904b496089")


class Envelope:
    """Opens and seals what safe mode calls Encrypt, under the platform's EncodingAESKey and an app id.

    Plaintext: 16 random bytes, the message's length, the message, the app id, padded to 32 bytes by PKCS #7's rule.
    ``app_ids`` may name several ids, with commas between them: each of them opens, and the first one seals.
    """

    def __init__(self, encoding_aes_key: str, app_ids: str) -> None:
        self._app_ids = [app_id.strip().encode() for app_id in app_ids.split(",")]
        self._cipher = make_cipher(decode_aes_key(encoding_aes_key))

    def open(self, sealed: str) -> bytes:
        """The message in ``sealed``, base64 with blanks anywhere, its signature checked. Raises `ForbiddenPush`."""
        try:
            ciphertext = base64.b64decode("".join(sealed.split()), validate=True)
        except ValueError:
            raise ForbiddenPush("Encrypt is not base64") from None
        if not ciphertext or len(ciphertext) % AES_BLOCK:
            raise ForbiddenPush("Encrypt is not made of complete AES blocks")
        plaintext = self._cipher.decrypt(ciphertext)
        padding = plaintext[-1]
        if not 1 <= padding <= ENVELOPE_BLOCK or not plaintext.endswith(plaintext[-1:] * padding):
            raise ForbiddenPush("wrong padding", "set --aes-key to the EncodingAESKey that the console shows")
        start = RANDOM_HEAD + LENGTH_FIELD
        end = start + int.from_bytes(plaintext[RANDOM_HEAD:start], "big")
        if end > len(plaintext) - padding:
            raise ForbiddenPush("wrong length inside the envelope")
        found = plaintext[end:-padding]
        if found not in self._app_ids:
            # The id is signed, and not a secret. What does not look like an id may be a user's text.
            shown = found.decode() if _APP_ID.fullmatch(found) else "not readable"
            raise ForbiddenPush(f"sealed for another app, its id is {shown}",
                                "if the push is for you, add that id to --app-id, with a comma")
        return plaintext[start:end]

    def seal(self, message: bytes, random: bytes) -> str:
        """What `open` opens: ``message`` after the 16 ``random`` bytes, encrypted, in base64."""
        plaintext = random + len(message).to_bytes(LENGTH_FIELD, "big") + message + self._app_ids[0]
        padding = ENVELOPE_BLOCK - len(plaintext) % ENVELOPE_BLOCK
        return base64.b64encode(self._cipher.encrypt(plaintext + bytes([padding]) * padding)).decode()


def decode_aes_key(encoding_aes_key: str) -> bytes:
    """The 32 bytes of an EncodingAESKey. Its last character has two spare bits; keys with them set are in use."""
    return base64.b64decode(encoding_aes_key + "=")


def make_cipher(key: bytes) -> Union[Aes256Cbc, LibraryAes256Cbc]:
    """AES-256-CBC under ``key``: by the ``cryptography`` package where it is installed and works, else by our code."""
    return Aes256Cbc(key) if attempt(_try_library) else LibraryAes256Cbc(key)


def library_trouble() -> str:
    """Why the ``cryptography`` package, though it is installed, cannot be used; empty if it can, or is not there."""
    error = attempt(_try_library)
    if error is None or isinstance(attempt(importlib.import_module, "cryptography"), ModuleNotFoundError):
        return ""
    return f"{type(error).__name__}: {printable(str(error))[:200]}"


def _try_library() -> None:
    """Encrypt and decrypt a known block; raises whatever the package raises. A wrong or old one fails in many ways."""
    cipher = LibraryAes256Cbc(KNOWN_KEY)
    if cipher.encrypt(KNOWN_PLAIN) != KNOWN_SEALED or cipher.decrypt(KNOWN_SEALED) != KNOWN_PLAIN:
        raise ValueError("its AES is wrong")


class LibraryAes256Cbc:
    """AES-256-CBC, the key's first block as the iv, by the ``cryptography`` package. Raises what an import raises."""

    def __init__(self, key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        self._cipher = Cipher(algorithms.AES(key), modes.CBC(key[:AES_BLOCK]))

    def decrypt(self, data: bytes) -> bytes:
        """Complete blocks in, as many out."""
        return bytes(self._cipher.decryptor().update(data))

    def encrypt(self, data: bytes) -> bytes:
        """Complete blocks in, as many out."""
        return bytes(self._cipher.encryptor().update(data))


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
        # The columns' factors of MixColumns and of its inverse, row by row, applied after the substitution.
        self._forward: _Way = (keys, [box.translate(_multiples(factor)) for factor in (2, 3, 1, 1)], box, 1)
        unmix = [_multiples(factor) for factor in (14, 11, 13, 9)]
        # The equivalent inverse cipher (FIPS 197, section 5.3.5) has the same shape as the cipher, with unmixed keys.
        keys = [keys[-1], *(_mix(each, unmix) for each in keys[-2:0:-1]), keys[0]]
        self._backward: _Way = (keys, [inverse.translate(factor) for factor in unmix], inverse, -1)

    def decrypt(self, data: bytes) -> bytes:
        """Complete blocks in, as many out."""
        return _add(_run_rounds(data, self._backward), self._iv + data[:-AES_BLOCK])

    def encrypt(self, data: bytes) -> bytes:
        """Complete blocks in, as many out."""
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
    powers = [1]  # of 3: they are all of the field, so counting back finds an inverse
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
# recurses deeper than MAX_DEPTH, expands an entity, or builds more than MAX_MARKS values. One packet has one reading.

# Levels of nesting that fields may have; published packets have one. Parsers that recurse see only what has no more.
MAX_DEPTH = 32
# A body below this many bytes cannot hold enough values to cost more than 3 MiB, so only larger ones are counted.
CHEAP_BODY = 32 * 1024
# Values a large body may hold, counted by the marks that open or part them: 20,000 Python objects are about 2 MiB.
MAX_MARKS = 20000
# Blanks by XML's definition, section 2.3. str.strip() alone would eat control characters of a user's text too.
BLANKS = " \t\r\n"

_STRIP = operator.methodcaller("strip", BLANKS)

# Fields whose own blanks count: a user wrote the first, a signature covers the second, and the others are echoed.
VERBATIM = frozenset(("Content", "Encrypt", "echoStr", "echostr"))

_XML_OTHER_ENCODING = re.compile(rb"<\?xml\s[^>]*?\sencoding\s*=\s*[\"'](?!utf-?8[\"'])", re.IGNORECASE)
# What may stand before the root, but for a DOCTYPE.
_XML_ASIDE = re.compile(rb"(?:<\?.*?\?>|<!--.*?-->)[ \t\r\n]*", re.DOTALL)
_LONG_TAG = re.compile(rb"<[^!?<>][^<>]{1024}")
# Stands in front of a character that is written in hexadecimal digits, to pass the XML parser: one of those that
# Unicode sets aside for a program's own use. In a user's text, it is written so itself.
DISGUISE = "\ufdd0"
# What XML 1.0 forbids in any text, section 2.2, and the character that must not be taken for our own.
_XML_FORBIDDEN = re.compile(f"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff{DISGUISE}]")
_XML_DISGUISED = re.compile(f"{DISGUISE}(....)")
# A reference to a character (the groups), or a place where none can stand: a comment, an instruction, CDATA.
_XML_REFERENCE = re.compile(r"<!--.*?(?:-->|\Z)|<\?.*?(?:\?>|\Z)|<!\[CDATA\[.*?(?:\]\]>|\Z)"
                            r"|&#(?:0*([0-9]{1,7})|x0*([0-9a-fA-F]{1,6}));", re.DOTALL)
# An escape of JSON: a pair of surrogates, or half of one (the group), or any other.
_JSON_ESCAPE = re.compile(r"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
                          r"|(u[dD][89a-fA-F][0-9a-fA-F]{2})|.)", re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b'"[]{}'))
_QUOTED = re.compile(rb'"[^"]*"?')


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


def replace_unreadable(payload: bytes) -> bytes:
    """The payload with U+FFFD for bytes that are not UTF-8 and, in JSON, for escapes of half a surrogate pair.

    Only for what is proven: one bad character must not lose a message. A payload above CHEAP_BODY stays as it is.
    """
    if len(payload) > CHEAP_BODY:
        return payload
    text = payload.decode("utf-8", "replace")
    return (_replace_halves(text) if text.lstrip("\ufeff" + BLANKS).startswith("{") else text).encode()


def _replace_halves(text: str) -> str:
    """JSON with U+FFFD for each escape of half a surrogate pair."""
    return _JSON_ESCAPE.sub(lambda escape: "\\ufffd" if escape.group(1) else escape.group(), text)


def _refuse_costly(body: bytes, marks: Iterable[bytes]) -> None:
    if len(body) > CHEAP_BODY and sum(map(body.count, marks)) > MAX_MARKS:
        raise MalformedPush(f"more than {MAX_MARKS} values or pieces of text in one push")


def _parse_xml(body: bytes) -> Dict[str, Any]:
    if len(body) > CHEAP_BODY and _LONG_TAG.search(body):
        raise MalformedPush(f"a long tag in a body above {CHEAP_BODY} bytes")
    _refuse_costly(body, (b"<", b"=", b"&", b"]", b"\n", b"\r"))
    _check_prolog(body)
    try:
        return _read_xml(body)
    except MalformedPush:
        if len(body) > CHEAP_BODY:  # the copies that follow would cost too much
            raise
        text = _utf8(body)
        resolved = _resolve_forbidden(text)
        if resolved == text and not _XML_FORBIDDEN.search(text):
            raise
    # XML 1.0 forbids characters that users' messages have: each goes through the parser in disguise.
    disguised = _XML_FORBIDDEN.sub(lambda found: f"{DISGUISE}{ord(found.group()):04x}", resolved)
    fields: Dict[str, Any] = _map_texts(
        lambda text: _XML_DISGUISED.sub(lambda found: chr(int(found.group(1), 16)), text),
        _read_xml(disguised.encode()))
    return fields


def _check_prolog(body: bytes) -> None:
    """Refuse a DOCTYPE, which can stand nowhere but before the root, and every encoding but UTF-8.

    Entities exist only where a DOCTYPE does. Comments and processing instructions are passed over.
    """
    start, aside = 0, _XML_ASIDE.match(body)
    if aside and _XML_OTHER_ENCODING.match(body):
        raise MalformedPush("XML must be in UTF-8")
    while aside:
        start = aside.end()
        aside = _XML_ASIDE.match(body, start)
    # The parser takes a NUL here for UTF-16, and would read what we have not looked at.
    if not body.startswith(b"<", start) or body.startswith((b"<!", b"<\x00"), start):
        raise MalformedPush("XML starts with its root element, and a DOCTYPE is not accepted")


def _resolve_forbidden(text: str) -> str:
    """The text with references to forbidden characters replaced by these; halves of surrogate pairs become U+FFFD."""
    def resolve(found: re.Match[str]) -> str:
        decimal, hexadecimal = found.groups()
        if not (decimal or hexadecimal):
            return found.group()
        code = int(decimal) if decimal else int(hexadecimal, 16)
        return chr(code) if code <= 0xFFFF and _XML_FORBIDDEN.match(chr(code)) else found.group()
    text = _XML_REFERENCE.sub(resolve, text)
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")  # which joins the halves of a pair


def _read_xml(body: bytes) -> Dict[str, Any]:
    """The root's children: text for a leaf, a dict for one with children, a list of these for children of one name.

    A name is what stands in the tag, prefix and all: ``n:Content`` is a field of that name, and never Content, whatever
    namespaces are declared. So two fields that differ in the packet cannot become one. Attributes, namespaces among
    them, and processing instructions are ignored.
    """
    levels: List[Dict[str, Any]] = [{}]  # of the elements that are open, their children so far
    texts: List[str] = []  # since the last tag; an empty one stands where a CDATA section begins or ends

    def start(tag: str, attributes: Dict[str, str]) -> None:
        if len(levels) > MAX_DEPTH + 1:
            raise MalformedPush(f"nested deeper than {MAX_DEPTH} levels")
        texts.clear()
        levels.append({})

    def end(tag: str) -> None:
        value: Any = levels.pop()
        siblings = levels[-1]
        if not value:
            is_verbatim = len(levels) == 2 and tag in VERBATIM and tag not in siblings
            value = _exact_text(texts) if is_verbatim else "".join(texts).strip(BLANKS)
        texts.clear()
        if tag not in siblings:
            siblings[tag] = value
        elif isinstance(siblings[tag], list):
            siblings[tag].append(value)
        else:  # several of one name: blanks count in none of them
            siblings[tag] = _map_texts(_STRIP, [siblings[tag], value])
    parser = ParserCreate("utf-8")
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, texts.append
    parser.StartCdataSectionHandler = parser.EndCdataSectionHandler = functools.partial(texts.append, "")
    try:
        parser.Parse(body, True)
    except ExpatError as error:
        # The parser stops at the last of the three.
        is_unescaped = body[max(0, parser.ErrorByteIndex - 2):parser.ErrorByteIndex + 1] == b"]]>"
        reason = "the sender has not escaped ]]> inside a text" if is_unescaped else ErrorString(error.code)
        raise MalformedPush(f"not XML: {reason} at line {error.lineno}") from None
    (root,) = levels[0].values()
    return root if isinstance(root, dict) else {}


def _exact_text(texts: List[str]) -> str:
    """A text with its own blanks. Blanks in CDATA are the sender's, and blanks around it are layout."""
    pieces: Tuple[List[str], List[str]] = ([], [])  # outside, and inside
    is_inside = False
    for text in texts:
        is_inside ^= not text
        pieces[is_inside].append(text)
    is_layout = pieces[1] and not "".join(pieces[0]).strip(BLANKS)
    return "".join(pieces[1] if is_layout else texts)


def _parse_json(body: bytes) -> Dict[str, Any]:
    _refuse_costly(body, (b"{", b"[", b",", b"\\"))
    if len(body) > CHEAP_BODY and b"\\ud" in body.lower():
        raise MalformedPush(f"escaped surrogates in a body above {CHEAP_BODY} bytes")
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH:
        _check_nesting(body)
    text = _utf8(body)
    try:
        fields: Dict[str, Any] = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise MalformedPush(f"not JSON: {error.msg} at character {error.pos}") from None
    if ("\\ud" in text or "\\uD" in text) and _replace_halves(text) != text:
        raise MalformedPush("not JSON: half of a surrogate pair, which cannot be stored or sent on")
    # Most values are texts: a call for each would cost a tenth of it all.
    return {name: _map_texts(_STRIP, value) if not isinstance(value, str) else
            value if name in VERBATIM else value.strip(BLANKS) for name, value in fields.items()}


def _check_nesting(body: bytes) -> None:
    """Refuse JSON that nests too deep before the decoder sees it, which recurses: a thread's stack may be small.

    It finds strings as the decoder does, up to the first error in the JSON, and the decoder stops there.
    """
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = unescaped.translate(None, _NO_BRACKETS).replace(b'""', b"")  # there may be very many strings without any
    brackets = _QUOTED.sub(b"", marks)
    if max(itertools.accumulate([1 if bracket in b"[{" else -1 for bracket in brackets]), default=0) > MAX_DEPTH:
        raise MalformedPush(f"nested deeper than {MAX_DEPTH} levels")


def _map_texts(function: Callable[[str], str], value: Any) -> Any:
    """The value with every text in it replaced; other scalars of JSON become the text that XML would have brought.
    It recurses, but no deeper than MAX_DEPTH, which was checked."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_texts(function, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(function, item) for item in value]
    return {True: "true", False: "false", None: ""}[value]


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
    raise MalformedPush("not JSON: NaN and Infinity are not numbers")


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
    # The end of a section cannot stand inside one: it is split between two.
    return str(value) if isinstance(value, int) else f"<![CDATA[{value.replace(']]>', ']]]]><![CDATA[>')}]]>"


def encode_json(fields: Fields) -> bytes:
    """The fields laid out as on the platform's pages, one a line; characters as they are, not escaped, to be read."""
    return json.dumps(fields, ensure_ascii=False, indent=2).encode("utf-8", "surrogateescape")


# ---- 6 Deduplication ------------------------------------------------------------------------------------------------
# Law: keys in, verdicts out. Knows nothing of why a message is claimed; a lock is all that it holds.

_PLAIN_KEY = re.compile(r"[\w.-]{0,64}(?:/[\w.-]{0,64})+", re.ASCII)
# What may stand in a log line as it is: no blank, no line break, nothing that steers a terminal.
_SAFE_KEY = re.compile("[!-~]{1,400}")
# Fields of the envelope, which differ when a retry is sealed anew.
_ENVELOPE_FIELDS = frozenset(("Encrypt", "MsgSignature", "TimeStamp", "Nonce"))


def dedup_key(message: Message) -> str:
    """The text that is equal for two pushes exactly when they are one message sent again.

    App, sender, type and MsgId. For an event, and for what has no MsgId or the MsgId 0: app, sender, type, CreateTime,
    Event and a digest of all fields but the envelope's, since two different events may fall into one second. Parts that
    are long or odd are digested, so that a key has at most 400 characters and is safe in a log.
    """
    parts = [message.to_user_name, message.from_user_name, message.msg_type]
    msg_id = message.msg_id
    if msg_id and msg_id != "0" and parts[2] != "event":
        parts.append(msg_id)
    else:
        own = message.fields
        if not _ENVELOPE_FIELDS.isdisjoint(own):
            own = {name: value for name, value in own.items() if name not in _ENVELOPE_FIELDS}
        parts += [str(message.create_time), message.event, _digest(own)]
    key = "/".join(parts)
    return key if _PLAIN_KEY.fullmatch(key) and key.count("/") == len(parts) - 1 else _digest(parts)


def safe_key(text: str) -> str:
    """A key that somebody else made: the text itself where it is fit for a log line, else its digest."""
    return text if _SAFE_KEY.fullmatch(text) else _digest(text)


def _digest(value: Any) -> str:
    digest = hashlib.sha256()
    _feed_digest(digest, value)
    return digest.hexdigest()[:32]


def _feed_digest(digest: Any, value: Any) -> None:
    """Feed the value piece by piece, each after its kind and length: no two values feed the same bytes."""
    if isinstance(value, str):
        data = value.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(data) + data)
        return
    items = sorted(value.items()) if isinstance(value, Mapping) else value
    digest.update(b"%s%d:" % (b"m" if items is not value else b"l", len(value)))
    for item in items:
        _feed_digest(digest, item)


class ClaimCache:
    """Which messages were seen, in memory: all that are in hand, and the last ``size`` that are finished.

    A key is claimed by exactly one push, then accepted (the message is safe with us), then finished. The queue bounds
    how many are in hand, so a claim is never refused for want of room. Safe to use from any thread.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()  # guards the two below: a key is in one of them at most
        self._held: Dict[str, bool] = {}  # in hand; whether accepted
        self._finished: OrderedDict[str, None] = OrderedDict()  # longest unused first

    def __len__(self) -> int:
        return len(self._held) + len(self._finished)

    def claim(self, key: str) -> bool:
        """True for exactly one caller; False for a repeat of what was accepted.

        Raises `BeingTaken` for a repeat of what is only claimed, because the first may yet be refused.
        """
        with self._lock:
            if key in self._finished:
                self._finished.move_to_end(key)
                return False
            if key in self._held:
                if self._held[key]:
                    return False
                raise BeingTaken("the same message is just being taken")
            self._held[key] = False
            return True

    def confirm(self, keys: Sequence[str]) -> List[Union[bool, PushError]]:
        """Whether the claims of a round hold everywhere. There is nowhere else: they do."""
        return [True] * len(keys)

    def accept(self, keys: Sequence[str]) -> None:
        """The claimed messages are safe: from now on their repeats are answered ``success``."""
        with self._lock:
            for key in keys:
                if key in self._held:  # its handler may have been faster, and finished it
                    self._held[key] = True

    def finish(self, key: str) -> None:
        """The message is done: remember the key until ``size`` others are finished."""
        with self._lock:
            self._held.pop(key, None)
            self._finished[key] = None
            self._finished.move_to_end(key)
            if len(self._finished) > self._size:
                self._finished.popitem(last=False)

    def release(self, key: str) -> None:
        """The message was refused, or failed for good: the same push may come again."""
        with self._lock:
            self._held.pop(key, None)

    def restore(self, key: str) -> None:
        """The message was accepted before a restart, and is in hand again."""
        with self._lock:
            self._held[key] = True

    def open(self) -> None:
        """Get ready to serve. Memory always is."""

    def close(self) -> None:
        """Write what is left to write, which is nothing here."""


# ---- 7 Handlers -----------------------------------------------------------------------------------------------------
# Law: which function takes which message, and how it is called, plain or async. Knows nothing of retries or where
# messages come from. Its one thread is that of the event loop, which exists only if a function is async.

Handler = Callable[..., Any]  # returns Answers, or an awaitable of them
ErrorHandler = Callable[[Message, BaseException], object]
HandlerT = TypeVar("HandlerT", bound=Callable[..., Any])
# What narrows a type down: a text, an expression, or a function that is given the message.
Pattern = Union[str, "re.Pattern[str]", Callable[[Message], object]]

# The types whose messages carry a text that patterns are compared with, and where it is.
_SUBJECTS: Mapping[str, Callable[[Message], str]] = MappingProxyType(
    {"text": lambda message: message.content.strip(), "event": lambda message: message.event})
# Kinds of unhandled message that are told of: bounds what a sender that invents types puts into memory and log.
MAX_KINDS_TOLD = 100


def encode_session(session: Dict[str, Any]) -> str:
    """The session as JSON text that decodes to an equal dict; empty for an empty one.

    Raises `HandlerError` that names the key whose value JSON does not have.
    """
    if not session:
        return ""
    try:
        text = json.dumps(session, allow_nan=False, separators=(",", ":"))
        if json.loads(text) == session:  # not so for tuples, which become lists, and for keys that are numbers
            return text
    except (TypeError, ValueError, RecursionError):
        pass
    if len(session) > 1:
        for key, value in session.items():
            encode_session({key: value})
    raise HandlerError(f"session[{next(iter(session))!r:.64}] is not what JSON has: keep None, True, False, numbers, "
                       "texts, lists, and dicts whose keys are texts")


def handler_name(function: object) -> str:
    """The name of a handler: a function's own, or that of the function in a partial, or of an object's class."""
    if isinstance(function, functools.partial):
        return handler_name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


def describe_handler(function: object) -> str:
    """A handler's name and where it stands, as in ``menu at handlers.py:12``; only the name if it is written in C."""
    code = getattr(inspect.unwrap(_called(function)), "__code__", None)
    place = f" at {PurePath(code.co_filename).name}:{code.co_firstlineno}" if code else ""
    return handler_name(function) + place


def _called(function: Any) -> Any:
    """The function that runs when this is called: of a partial, a method or an object the one inside."""
    while isinstance(function, functools.partial):
        function = function.func
    if not inspect.isroutine(function) and not inspect.isclass(function):
        function = inspect.getattr_static(type(function), "__call__", function)
    return getattr(function, "__func__", function)


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(_called(function))


class EventLoop:
    """One asyncio loop in a daemon thread. Both are made at the first use, and made again in a forked process.

    The thread ends when this object is garbage: then it cancels what is left on the loop, and closes it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the making of the two below
        self._thread: Optional[threading.Thread] = None
        self._loop: Any = None

    def is_current(self) -> bool:
        """Whether the caller runs on the loop, where waiting would stop everything else on it."""
        return self._thread is not None and self._thread is threading.current_thread()

    def wait(self, result: Any, caller: Optional[Future[Any]] = None) -> Any:
        """What a function has returned; if that can be awaited, its outcome, from the loop. It runs in the context
        variables of this thread, and is cancelled when ``caller``, which wants the outcome, is done before."""
        if not hasattr(result, "__await__"):
            return result
        import asyncio
        import concurrent.futures
        # Made before the task, or a Ctrl-C in the moment in which the task begins would leave it running.
        outcome: Future[Any] = concurrent.futures.Future()
        if caller:
            caller.add_done_callback(lambda _: outcome.cancel())
        try:
            with self._lock:
                if self._thread is None or not self._thread.is_alive():
                    loop = asyncio.new_event_loop()  # garbage, which closes itself, if no thread can be had
                    # The thread must not refer to this object, or that would never be garbage.
                    thread = threading.Thread(target=_run_loop, args=(loop, weakref.ref(self)), name="kfserver-async",
                                              daemon=True)
                    thread.start()
                    self._loop, self._thread = loop, thread
                    weakref.finalize(self, loop.call_soon_threadsafe, loop.stop).atexit = False
                self._loop.call_soon_threadsafe(_begin_task, self._loop, result, outcome)
            return outcome.result()
        finally:
            outcome.cancel()  # what is done stays as it is


def _begin_task(loop: Any, awaitable: Any, outcome: Future[Any]) -> None:
    """On the loop: run what can be awaited, until it is done or ``outcome`` is cancelled."""
    task = loop.create_task(_await(awaitable, loop))

    def tell(_: Any) -> None:
        if task.cancelled():
            outcome.cancel()
        elif task.exception():
            attempt(outcome.set_exception, task.exception())  # fails when nobody waits any more
        else:
            attempt(outcome.set_result, task.result())
    task.add_done_callback(tell)
    outcome.add_done_callback(lambda _: attempt(loop.call_soon_threadsafe, task.cancel))


async def _await(awaitable: Any, loop: Any) -> Any:
    try:
        return await awaitable
    finally:
        if threading.current_thread() is threading.main_thread():  # it has forked, and this is the child, which ends
            loop.set_exception_handler(lambda *_: None)  # 3.14 would tell that the loop is not running here
            loop.stop()


def _run_loop(loop: Any, owner: weakref.ReferenceType[EventLoop]) -> None:
    """Run the loop as long as its owner lives. asyncio lets sys.exit() of a handler end the loop: it is begun again,
    but not in a child that the handler has forked, where this thread is the main one."""
    while owner():
        attempt(loop.run_forever)
        if threading.current_thread() is threading.main_thread():
            return
    attempt(loop.run_until_complete, _cancel_tasks())
    loop.close()


async def _cancel_tasks() -> None:
    """Cancel everything else on the loop, and wait until it has ended."""
    import asyncio
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()


async def _call_in_thread(function: Callable[[Future[Any]], Any]) -> Any:
    """Call a plain function from the event loop, in a thread of its own, because it may wait. It gets the future of
    this call, and runs in the caller's context variables."""
    import asyncio
    import concurrent.futures
    import contextvars
    call: Future[Optional[BaseException]] = concurrent.futures.Future()
    context = contextvars.copy_context()
    results: List[Any] = []

    def work() -> None:
        error = attempt(lambda: results.append(context.run(function, call)))
        attempt(call.set_result, error)  # fails when the caller has stopped waiting
    threading.Thread(target=work, name="kfserver-plain", daemon=True).start()
    error = await asyncio.wrap_future(call)
    if error:
        raise error
    return results[0]


class Match(NamedTuple):
    """The handler that takes a message, and what the groups of its expression caught."""

    handler: Handler
    arguments: Tuple[Optional[str], ...] = ()


class HandlerRegistry:
    """The functions that take messages, by type and pattern. Register all before the server starts.

    The most specific kind wins (an equal text, then an expression or a function, then the type, then ``"*"``); in a
    kind, the first registered. Equal texts and types are found in one look-up however many there are; expressions and
    functions are tried in turn. ``key_of`` is the function of `dedup_key`, or None.

    All functions but patterns may be ``async``: they run on one event loop, which all messages share.
    """

    def __init__(self) -> None:
        self.key_of: Optional[Callable[[Message], str]] = None
        self._handlers: Dict[Tuple[str, Any], Match] = {}  # by type and pattern; None: the whole type
        self._tried: Dict[str, List[Tuple[Any, Handler]]] = {}  # expressions and functions, by type
        self._arounds: List[Callable[..., Any]] = []
        self._error_handlers: List[ErrorHandler] = []
        self._told: Set[str] = set()
        self._rules: List[Tuple[Handler, str]] = []
        self._loop = EventLoop()

    def __len__(self) -> int:
        return len(self._rules)

    @property
    def rules(self) -> Tuple[str, ...]:
        """One line for each registration, in order, as in ``@registry.on("text", "menu") -> menu``."""
        return tuple(rule for _, rule in self._rules)

    def rules_of(self, handler: Handler) -> Tuple[str, ...]:
        """Those of the `rules` that registered this function."""
        return tuple(rule for function, rule in self._rules if function is handler)

    def on(self, msg_type: str, *patterns: Pattern) -> Callable[[HandlerT], HandlerT]:
        """Decorator: the function takes messages of ``msg_type`` (``"*"``: of every type that nothing else takes).

        Patterns narrow that down, for ``"text"`` by Content and for ``"event"`` by Event name: a str equals all of it,
        blanks trimmed; a compiled expression is searched in it, and its groups become further arguments. For any type,
        a pattern may be a function: it is called with the message, and says whether the handler takes it.
        Returns the function unchanged. Raises `HandlerError` for what could never work. What another handler takes
        already is told in the log, by both names.
        """
        if not isinstance(msg_type, str):
            raise HandlerError('on() takes the type first: write @registry.on("text") or @registry.on("*")')
        shown = ", ".join([repr(msg_type), *(_show_pattern(msg_type, pattern) for pattern in patterns)])

        def register(function: HandlerT) -> HandlerT:
            counts = {getattr(pattern, "groups", 0) for pattern in patterns} or {0}
            advice = "".join(f"; or, if {each!r} is an expression, write re.compile(r\"{each}\")" for each in patterns
                             if isinstance(each, str) and re.search(r"\(.*\)", each))
            _check_function(function, f"@registry.on({msg_type!r})", counts, advice)
            for pattern in patterns or (None,):
                self._register(msg_type, pattern, function)
            self._rules.append((function, f"@registry.on({shown}) -> {handler_name(function)}"))
            return function
        return register

    def _register(self, msg_type: str, pattern: Optional[Pattern], function: Handler) -> None:
        key = pattern.strip() if isinstance(pattern, str) else id(pattern) if callable(pattern) else pattern
        first = self._handlers.setdefault((msg_type, key), Match(function)).handler
        if first is not function:
            shown = "" if pattern is None else f", {_show_pattern(msg_type, pattern)}"
            log.warning("%s is never called for @registry.on(%r%s): %s was registered for it first",
                        describe_handler(function), msg_type, shown, describe_handler(first))
        elif pattern is not None and not isinstance(pattern, str):
            self._tried.setdefault(msg_type, []).append((pattern, function))

    def on_error(self, function: HandlerT) -> HandlerT:
        """Decorator: the function gets ``(message, error)`` when the last try of a message has failed."""
        _check_function(function, "@registry.on_error", {1})
        self._error_handlers.append(function)
        return function

    def around(self, function: HandlerT) -> HandlerT:
        """Decorator: the function gets ``(message, handle)`` in the place of each handler; the first registered is the
        outermost. It returns what ``handle(message)`` returns, or something else; without that call no handler runs.

        In an async function, write ``await handle(message)``. Does not run for a message that no handler takes.
        """
        _check_function(function, "@registry.around", {1})
        self._arounds.append(function)
        return function

    def dedup_key(self, function: HandlerT) -> HandlerT:
        """Decorator: the function makes the deduplication key of a message, a text: equal texts are one message."""
        _check_plain(function, "@registry.dedup_key")
        if self.key_of not in (None, function):
            raise HandlerError(f"{describe_handler(self.key_of)} makes the deduplication keys already: remove one")
        self.key_of = function
        return function

    def find(self, message: Message) -> Optional[Match]:
        """The handler that takes the message, or None. Raises `PatternError` when a function that is a pattern does."""
        return self._find_among(message.msg_type, message) or self._find_among("*", message)

    def _find_among(self, kind: str, message: Message) -> Optional[Match]:
        subject_of = _SUBJECTS.get(kind)
        subject = subject_of(message) if subject_of else ""
        match = self._handlers.get((kind, subject))
        if match:
            return match
        for pattern, function in self._tried.get(kind, ()):
            found = _takes(pattern, message) if callable(pattern) else pattern.search(subject)
            if found:
                return Match(function, () if found is True else found.groups())
        return self._handlers.get((kind, None))

    def handle(self, message: Message) -> Answers:
        """Run the handler that takes the message, here and now: returns what it returns and raises what it raises."""
        if self._loop.is_current():
            raise HandlerError("an async function cannot wait for registry.handle(): await the other handler itself")
        return self.run(self.find(message), message)

    def run(self, match: Optional[Match], message: Message) -> Answers:
        """Run the handler that `find` found, inside the functions of `around`; waits for what is async.

        A message that nobody takes is told of in the log, once a kind, with the decorator that would take it.
        """
        if match is None:
            decorator = decorator_for(message)
            if decorator not in self._told and len(self._told) < MAX_KINDS_TOLD:
                self._told.add(decorator)
                log.warning("no handler takes this message; to take it, write: %s", decorator)
            return None
        result = self._call(match, 0, message, None) if self._arounds else match.handler(message, *match.arguments)
        answers: Answers = self._loop.wait(result) if hasattr(result, "__await__") else result
        return answers

    def _pass_on(self, match: Match, depth: int, caller: Optional[Future[Any]], message: Message) -> Any:
        """The ``handle`` of around-functions: what stands further in. On the event loop it is an awaitable."""
        if not self._loop.is_current():
            return self._loop.wait(self._call(match, depth, message, caller), caller)
        if _is_async([*self._arounds, match.handler][depth]):
            return self._call(match, depth, message, None)
        return _call_in_thread(lambda call: self._pass_on(match, depth, call, message))

    def _call(self, match: Match, depth: int, message: Message, caller: Optional[Future[Any]]) -> Any:
        if depth == len(self._arounds):
            return match.handler(message, *match.arguments)
        return self._arounds[depth](message, functools.partial(self._pass_on, match, depth + 1, caller))

    def handle_error(self, message: Message, error: BaseException) -> List[BaseException]:
        """Run all functions of `on_error`; the errors that they raised."""
        failed = [attempt(lambda: self._loop.wait(function(message, error)))  # noqa: B023  (called at once)
                  for function in self._error_handlers]
        return [each for each in failed if each]


def decorator_for(message: Message) -> str:
    """The decorator that would take the message. In ASCII: the names in it came from outside, and go to logs."""
    patterns = f', "{message.event[:64]}"' if message.msg_type == "event" else ""
    return ascii(f'@registry.on("{message.msg_type[:64] or "*"}"{patterns})')[1:-1]


def _takes(pattern: Callable[[Message], object], message: Message) -> bool:
    """Whether a function that is a pattern takes the message. Raises `PatternError` if it raises."""
    verdicts: List[bool] = []

    def ask() -> None:
        verdict = pattern(message)
        if hasattr(verdict, "__await__"):
            raise HandlerError("it returns what must be awaited: a pattern cannot be async")
        verdicts.append(bool(verdict))
    error = attempt(ask)
    if error:
        raise PatternError(f"the pattern {describe_handler(pattern)} failed: {describe_error(error)}") from error
    return verdicts[0]


def _show_pattern(msg_type: str, pattern: object) -> str:
    """How a pattern is written, or described. Raises `HandlerError` for what cannot be one for this type."""
    if callable(pattern):
        _check_plain(pattern, "a pattern")
        name = handler_name(pattern)
        return name if name.isidentifier() else describe_handler(pattern)
    if msg_type not in _SUBJECTS:
        raise HandlerError('only "text" and "event" take patterns that are texts or expressions: write '
                           f"@registry.on({msg_type!r}), or give a function that takes the message")
    if isinstance(pattern, str):
        return repr(pattern)
    if isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
        return f're.compile(r"{pattern.pattern}")'
    raise HandlerError('a pattern is a text, an expression or a function: write @registry.on("text", "menu") or '
                       f'@registry.on("text", re.compile(r"order (\\d+)")), not {type(pattern).__name__}')


def _check_function(function: object, decorator: str, further: Iterable[int], advice: str = "") -> None:
    """Raise `HandlerError` unless this can be called with a message and ``further`` more arguments."""
    name = handler_name(function)
    if not callable(function):
        raise HandlerError(f"{decorator} stands above a function: write it on the line before 'def answer(message):'")
    if inspect.isgeneratorfunction(_called(function)) or inspect.isasyncgenfunction(_called(function)):
        raise HandlerError(f"{name} has a yield, so that calling it does nothing: return a list of answers, or send "
                           "each with message.reply()")
    for count in further:
        try:
            inspect.signature(function).bind(*range(1 + count))
        except TypeError:
            raise HandlerError(f"{name} is called with the message and {count} more: one for each group of the "
                               "expression, the error for on_error, handle for around; give it as many parameters"
                               + advice) from None
        except ValueError:
            return  # some functions written in C do not tell


def _check_plain(function: object, use: str) -> None:
    """Raise `HandlerError` unless this can be called with a message, and is not async."""
    _check_function(function, use, {0})
    if _is_async(function):
        raise HandlerError(f"{use} cannot be async: write 'def {handler_name(function)}(message):' without async")


# ---- 8 Endpoint -----------------------------------------------------------------------------------------------------
# Law: one request in, one response out, and every decision that the outside can see on one screen, `Endpoint._decide`.
# Knows no socket and no thread; what takes the messages, and the clocks, are handed in.

# Bytes of a handshake in a body: four short values, in any format. A longer body is not a handshake.
MAX_HANDSHAKE = 4096
# The platform's page writes the first; receivers in production have met the second.
_ECHO_NAMES = ("echoStr", "echostr")
# XML or JSON with one of these fields is a message, or the envelope of one, and never a handshake.
_MESSAGE_FIELDS = frozenset(("MsgType", "MsgId", "FromUserName", "Event", "event", "Encrypt"))
# A message's signature, by its name in the query and by that in an envelope which carries it itself.
_SIGNATURE_FIELDS: Mapping[str, str] = MappingProxyType(
    {"msg_signature": "MsgSignature", "timestamp": "TimeStamp", "nonce": "Nonce"})
_PART_NAME = re.compile(rb"(?i)\r\nContent-Disposition:[^\r\n]*;[ \t]*name=\"?([^\";\r\n]*)")
TOO_LARGE = "raise --max-body if the platform really sends this much"

UP = Response(200, b"kfserver is up: pushes go here by POST\n", "up")
ACCEPTED = Response(200, b"success", "accepted")
REPEATED = Response(200, b"success", "repeat")


def refusal(error: PushError) -> Response:
    """The answer that an error stands for."""
    headers = {405: (("Allow", "GET, HEAD, POST"),), 503: (("Retry-After", "1"),)}.get(error.status, ())  # RFC 9110
    return Response(error.status, f"{error.public or error}\n".encode(), f"refused {error.status}: {error}", headers)


FAILED = refusal(PushError("an error inside kfserver", status=500))


class Gate:
    """Proves that a request comes from the platform; raises `ForbiddenPush` where that cannot be proven."""

    def __init__(self, settings: Settings, clock: Callable[[], float]) -> None:
        self._settings = settings
        self._clock = clock
        self._envelope = Envelope(settings.aes_key, settings.app_id) if settings.aes_key else None
        trouble = library_trouble() if self._envelope else ""
        if trouble:
            log.warning("the cryptography package cannot be used (%s): kfserver's own cipher is used instead, which is "
                        "slower; upgrade or remove the package", trouble)

    def open(self, query: Mapping[str, str], body: bytes) -> Tuple[bytes, bool]:
        """The message's own bytes, decrypted in safe mode, and whether a signature proved that they are the platform's:
        settings may do without."""
        outer = self._read_outer(body) if b"Encrypt" in body else {}
        sealed = outer.get("Encrypt")
        if isinstance(sealed, str) and self._envelope:
            self._check("msg_signature", _find_message_signature(query, outer), sealed)
            return self._envelope.open(sealed), True
        if self._envelope and not self._settings.compatible:
            raise ForbiddenPush("not encrypted", "choose safe mode in the console, or set --compatible")
        if sealed and "MsgType" not in outer:  # in compatible mode the plain fields stand beside it
            raise ForbiddenPush("encrypted, and no key is set", "set --aes-key, --app-id and --token as in the console")
        return body, self.prove(query)

    def _read_outer(self, body: bytes) -> Dict[str, Any]:
        try:
            return parse_fields(body)
        except MalformedPush as error:
            if self._envelope:
                raise ForbiddenPush(f"malformed envelope: {error}") from None
            return {}  # not an envelope: it is refused as a plain push, once it has proven where it comes from

    def prove(self, query: Mapping[str, str]) -> bool:
        """Whether ``query`` carries a valid signature; False if it has none and none is needed. Raises `ForbiddenPush`
        for one that is wrong, or missing."""
        if not self._settings.token or ("signature" not in query and self._settings.allow_unsigned):
            return False
        if "signature" not in query:
            raise ForbiddenPush("no signature", "if the platform does not sign your pushes, set --allow-unsigned")
        self._check("signature", query)
        return True

    def _check(self, name: str, values: Mapping[str, str], sealed: str = "") -> None:
        """Raise `ForbiddenPush` unless the signature of that name is right, and not too old."""
        signature, timestamp = values.get(name, ""), values.get("timestamp", "")
        parts = (self._settings.token, timestamp, values.get("nonce", ""))
        # Blanks around Encrypt may have been there when it was signed, or may be layout.
        if not (verify(signature, *parts, sealed) or verify(signature, *parts, sealed.strip())):
            raise ForbiddenPush("wrong signature" if not sealed else "wrong message signature",
                                "set --token to the Token that the platform's console shows")
        if self._settings.max_age:
            is_number = timestamp.isdecimal() and len(timestamp) < MAX_NUMBER
            if not is_number or abs(self._clock() - int(timestamp)) > self._settings.max_age:
                raise ForbiddenPush("stale signature", "check this machine's clock, or raise --max-age")


def _find_message_signature(query: Mapping[str, str], outer: Mapping[str, Any]) -> Dict[str, str]:
    """The message signature and what it is made from. They travel in the query, or in the body, or apart: the place
    that has the signature counts, and what is missing there is taken from the other."""
    inside = {name: outer[wire] for name, wire in _SIGNATURE_FIELDS.items() if isinstance(outer.get(wire), str)}
    return {**inside, **query} if "msg_signature" in query else {**query, **inside}


class Platform:
    """Signs and seals pushes as the platform does: the other side of a `Gate`, to play it and to test with.

    ``random`` makes as many bytes as it is asked for, which nobody can foretell. What is made is a query and a body.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float], random: Callable[[int], bytes]) -> None:
        self._token, self._clock, self._random = settings.token, clock, random
        self._app_id = settings.app_id.partition(",")[0].strip()
        self._envelope = Envelope(settings.aes_key, settings.app_id) if settings.aes_key else None

    def _signed(self, **more: str) -> Dict[str, str]:
        timestamp, nonce = str(int(self._clock())), self._random(4).hex()
        return {"signature": sign(self._token, timestamp, nonce), "timestamp": timestamp, "nonce": nonce, **more}

    def push(self, message: bytes, encode: Encode) -> Tuple[Dict[str, str], bytes]:
        """A message: as it is, or sealed in an envelope that ``encode`` writes."""
        if not self._envelope:
            return self._signed() if self._token else {}, message
        sealed, query = self._envelope.seal(message, self._random(RANDOM_HEAD)), self._signed()
        query["msg_signature"] = sign(self._token, query["timestamp"], query["nonce"], sealed)
        return query, encode({"ToUserName": self._app_id, "Encrypt": sealed})

    def handshake(self) -> Tuple[Dict[str, str], bytes]:
        """A handshake; its echoStr answers it."""
        return self._signed(echoStr=str(int.from_bytes(self._random(8), "big"))), b""


class _Push:
    """A request on its way to its response, and the message in it."""

    __slots__ = ("request", "started", "response", "message", "payload")

    def __init__(self, request: Request, started: float) -> None:
        self.request, self.started = request, started
        self.response = UP
        self.message: Optional[Message] = None
        self.payload = b""


class Endpoint:
    """Answers requests, and never waits for a handler of the user's.

    ``inbox`` is an `Inbox`, or what has its methods `take`, `deliver`, `cancel`, `observe` and `keep_unreadable`.
    ``clock`` gives Unix seconds, ``timer`` seconds from anywhere.
    """

    def __init__(self, settings: Settings, inbox: Any, clock: Callable[[], float], timer: Callable[[], float]) -> None:
        self._settings, self._inbox, self._timer = settings, inbox, timer
        self._path = _decode_path(settings.path)
        self._gate = Gate(settings, clock)
        self._teller = Teller(timer)

    def handle(self, request: Request) -> Response:
        """The answer to one request."""
        return self.handle_all((request,))[0]

    def handle_all(self, requests: Iterable[Request]) -> List[Response]:
        """The answers to requests that came together: what must be written down to be safe is written at once. What
        repeats another of them is decided again when that one is safe. One request's error leaves the others alone."""
        pushes = [_Push(request, self._timer()) for request in requests]
        self._handle(self._handle(pushes))
        for push in pushes:
            if push.response is not UP:
                self._teller.guard(self._record, push)  # the answer stands: an accepted message is safe, and is handled
        return [push.response for push in pushes]

    def _handle(self, pushes: Sequence[_Push]) -> List[_Push]:
        """Set the responses; which pushes repeat what was just being taken."""
        taken: List[_Push] = []
        too_soon: List[_Push] = []
        try:
            for push in pushes:
                error = attempt(self._decide, push)
                if error:
                    self._refuse(push, error)
                    if isinstance(error, BeingTaken):
                        too_soon.append(push)
                elif push.response is ACCEPTED:
                    taken.append(push)
        except BaseException:  # Ctrl-C, where the main thread feeds: give back every claim
            for push in taken:
                self._inbox.cancel(push.message)
            raise
        if taken and not self._teller.guard(self._deliver, taken):
            for push in taken:
                push.response = FAILED
        return too_soon

    def _deliver(self, taken: Sequence[_Push]) -> None:
        outcomes = self._inbox.deliver([(push.message, push.payload) for push in taken])
        if outcomes.count(True) == len(taken):  # as nearly always
            return
        for push, outcome in zip(taken, outcomes):
            if outcome is False:
                push.response = REPEATED
            elif outcome is not True:
                self._refuse(push, outcome)

    def _decide(self, push: _Push) -> None:
        """The README's answers table, in its order: every decision that the outside can see."""
        request = push.request
        self._admit(request)                                                # 404, 405, 413, and what is not HTTP
        query = _parse_form(request.query)
        handshake = _find_handshake(query, request.body)
        if handshake:
            self._gate.prove(handshake)                                     # 403
            echo = next(handshake[name] for name in _ECHO_NAMES if name in handshake)
            push.response = Response(200, echo.encode("utf-8", "surrogateescape"), "handshake")
        elif request.method == "POST":
            push.payload, is_proven = self._gate.open(query, request.body)  # 403
            self._read(push, is_proven)                                     # 400
            is_new = self._inbox.take(push.message)                         # 503
            push.response = ACCEPTED if is_new else REPEATED

    def _admit(self, request: Request) -> None:
        if request.problem:
            raise request.problem
        if self._path and request.path != self._path and _decode_path(request.path) != self._path:
            raise PushError("no such path", "the URL in the platform's console must have the path that --path names",
                            404)
        if request.method not in ("POST", "GET", "HEAD"):
            raise PushError("pushes come by POST", status=405)
        if len(request.body) > self._settings.max_body:
            raise PushError(f"more than {self._settings.max_body} bytes", TOO_LARGE, 413)

    def _read(self, push: _Push, is_proven: bool) -> None:
        """Parse the message. What is not proven must be exact, to the last character. What is proven is read whatever
        its characters, and kept if it cannot be read all the same."""
        try:
            push.message = parse(push.payload)
            return
        except MalformedPush:
            if not is_proven:
                raise
        came, push.payload = push.payload, replace_unreadable(push.payload)
        try:
            push.message = parse(push.payload)
        except MalformedPush as error:
            if came:
                self._inbox.keep_unreadable(came, str(error))
            raise

    def _refuse(self, push: _Push, error: BaseException) -> None:
        """Answer with the error; one that nobody foresaw is this request's own."""
        if isinstance(error, PushError):
            push.response, advice = refusal(error), error.advice
            if advice:
                attempt(lambda: self._teller.warn(advice, "push refused: %s; %s", error, advice))
        else:
            push.response = FAILED
            attempt(self._teller.report_bug, error)
        error.__traceback__ = None  # it leads back to the frame that holds the error: a cycle

    def _record(self, push: _Push) -> None:
        seconds = self._timer() - push.started
        self._inbox.observe(push.response, push.message, seconds)
        if log.isEnabledFor(logging.INFO):
            kind, key = (push.message.msg_type, push.message.key) if push.message else ("-", "-")
            log.info("push type=%(type)s key=%(key)s outcome=%(outcome)s ms=%(ms).2f", {
                "type": ascii(kind[:64])[1:-1], "key": key or "-", "outcome": push.response.outcome,
                "ms": seconds * 1000})


def _decode_path(path: str) -> str:
    """The path without percent-encoding, a character for each byte: WSGI servers decode it, and HTTP does not."""
    return unquote(path, "latin-1")


def _parse_form(text: str) -> Dict[str, str]:
    """Form-encoded text, a character for each byte that came, as a dict; of a name that stands twice, the last.
    Bytes that are not UTF-8 survive until they are echoed."""
    if "%" not in text and "+" not in text and text.isascii():  # as in every signed push: parse_qsl takes 3 us longer
        return {name: value for name, _, value in (pair.partition("=") for pair in text.split("&"))}
    text = text.encode("latin-1", "replace").decode("ascii", "surrogateescape")
    return dict(parse_qsl(text, keep_blank_values=True, errors="surrogateescape"))


def _parse_multipart(body: bytes) -> Dict[str, str]:
    """The values of multipart/form-data (RFC 7578), by name. The first line is the boundary."""
    body = body.lstrip()
    boundary = body.partition(b"\r\n")[0].rstrip()
    values: Dict[str, str] = {}
    for part in (b"\r\n" + body).split(b"\r\n" + boundary):
        head, _, value = part.partition(b"\r\n\r\n")
        name = _PART_NAME.search(head)
        if name:
            values[name.group(1).decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
    return values


def _find_handshake(query: Dict[str, str], body: bytes) -> Optional[Dict[str, str]]:
    """The four values of a handshake, from the query or from the body; None if this is not one.

    The platform does not document where they travel, so they are taken in every format that a body can have.
    """
    if not query.keys().isdisjoint(_ECHO_NAMES):
        return query
    if b"echo" not in body or len(body) > MAX_HANDSHAKE:
        return None
    values = _read_values(body)
    return None if values.keys().isdisjoint(_ECHO_NAMES) else {**query, **values}


def _read_values(body: bytes) -> Dict[str, str]:
    """The texts in a body of any format, by name; empty if it is a message, or cannot be read."""
    start = body.lstrip()[:2]
    if start == b"--":
        return _parse_multipart(body)
    if start[:1] not in (b"<", b"{", b"\xef"):
        return _parse_form(body.decode("latin-1").strip(BLANKS))
    try:
        fields = parse_fields(body)
    except MalformedPush:
        return {}
    is_message = not fields.keys().isdisjoint(_MESSAGE_FIELDS)
    return {} if is_message else {name: value for name, value in fields.items() if isinstance(value, str)}


# ---- 9 Metrics ------------------------------------------------------------------------------------------------------
# Law: counts what happens, and tells it to Prometheus and to people. Is told, and never asks. All that it keeps is
# bounded, and holds nothing that the log does not show; label values come from a fixed set.

# Seconds that part the answers' histogram, around the platform's 2 s, and the handlers'.
ANSWER_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0)
HANDLER_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)
# The types that get a label of their own; "other" is all the rest, and "-" what was no message.
LABELLED_TYPES = frozenset(("text", "image", "event", "ticket", "-"))
# Seconds of one bar of the page's plot, and how many bars make its half hour.
STEP_SECONDS = 10
STEPS = 180
# How pushes were answered, as the plot tells them apart: "busy" is every 5xx, "other" a handshake or the like.
PUSH_KINDS = ("accepted", "repeat", "other", "refused", "busy")
# A step in which nothing has happened: no pushes of each kind, and no answers in each bucket.
NEW_BAR = (0,) * (len(PUSH_KINDS) + len(ANSWER_BUCKETS) + 1)
# Messages that the page lists. Ten times as many events are kept: enough for ten tries of each.
MAX_LISTED = 100
# What is kept of an event: its Unix time, and what has become of the message (waiting, retry, handled or failed);
# "error" is the type of what a handler or a reply failed with. A message that waits has only the first four.
EVENT_FIELDS = ("time", "type", "key", "outcome", "handler", "ms", "replies", "error")
# The metrics, and what each tells.
METRICS: Mapping[str, str] = MappingProxyType({
    "pushes_total": "Pushes answered.",
    "answer_seconds": "From taking a push up to its answer.",
    "handler_seconds": "Duration of one run of a handler.",
    "handler_retries_total": "Runs of a handler that failed and were tried again.",
    "messages_failed_total": "Messages whose last try failed.",
    "replies_sent_total": "Replies that the send API took.",
    "replies_failed_total": "Replies that did not reach the user.",
    "queue_messages": "Messages that wait for a worker.",
    "busy_workers": "Workers that run a handler.",
    "oldest_seconds": "Age of the oldest message that is not done.",
    "remembered_keys": "Messages known, to drop repeats of.",
    "journal_healthy": "0 while the journal cannot be written.",
    "connections": "Open connections of clients."})


def percentile(buckets: Sequence[int], share: float) -> str:
    """The bound below which that share of the answers came; in words."""
    for bound, total in zip(ANSWER_BUCKETS, itertools.accumulate(buckets)):
        if total >= share * sum(buckets):
            return f"≤ {bound * 1000:g} ms" if total else "–"
    return f"> {ANSWER_BUCKETS[-1]:g} s"


def list_messages(events: Iterable[Tuple[Any, ...]]) -> List[Dict[str, Any]]:
    """The last messages, the newest first, each as the last event tells."""
    last: Dict[str, Dict[str, Any]] = {}
    for event in sorted(events, key=operator.itemgetter(0))[::-1]:
        last.setdefault(event[EVENT_FIELDS.index("key")], dict(zip(EVENT_FIELDS, event)))
    return list(last.values())[:MAX_LISTED]


def sum_up(bounds: Sequence[float], buckets: Sequence[int], seconds: float) -> Dict[str, object]:
    """The values of a histogram, by what follows its name; ``seconds`` is the sum of all that it counts."""
    totals = list(itertools.accumulate(buckets))
    values = {f'_bucket{{le="{bound}"}}': total for bound, total in zip((*map(str, bounds), "+Inf"), totals)}
    return {**values, "_sum": f"{seconds:.6f}", "_count": totals[-1]}


class Metrics:
    """What has happened since the start, and in the last half hour. Safe to use from any thread. ``clock`` gives Unix
    seconds."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = threading.Lock()  # guards all below
        self._pushes: Counter[Tuple[str, str, int]] = Counter()  # by outcome, type and status
        self._bars: Dict[int, List[int]] = {}  # by step: see NEW_BAR
        self._answer_buckets = [0] * (len(ANSWER_BUCKETS) + 1)
        self._answer_seconds = 0.0
        self._handler_buckets = [0] * (len(HANDLER_BUCKETS) + 1)
        self._runs: Dict[str, Tuple[int, int, float, float]] = {}  # by handler: runs, failures, seconds in all, most
        self._messages: Deque[Tuple[Any, ...]] = deque(maxlen=10 * MAX_LISTED)  # values of EVENT_FIELDS
        self._events = dict.fromkeys(("handler_retries", "messages_failed", "replies_sent", "replies_failed"), 0)

    def push(self, response: Response, message: Optional[Message], seconds: float) -> None:
        """A push was answered after that time."""
        msg_type = message.msg_type if message else "-"
        label = msg_type if msg_type in LABELLED_TYPES else "other"
        outcome, status = response.outcome.partition(" ")[0], response.status
        kind = "busy" if status >= 500 else outcome if outcome in PUSH_KINDS else "other"
        bucket = bisect.bisect_left(ANSWER_BUCKETS, seconds)
        now = self._clock()
        step = int(now) // STEP_SECONDS
        with self._lock:
            if step not in self._bars:  # forget those that are too old, or of a clock that was wrong
                self._bars = {other: bar for other, bar in self._bars.items() if abs(step - other) < STEPS}
                self._bars[step] = list(NEW_BAR)
            bar = self._bars[step]
            bar[PUSH_KINDS.index(kind)] += 1
            bar[len(PUSH_KINDS) + bucket] += 1
            self._pushes[outcome, label, status] += 1
            self._answer_buckets[bucket] += 1
            self._answer_seconds += seconds
            if message and response.outcome == "accepted":
                # When it came: its handler may have been faster than this line.
                self._messages.append((now - seconds, msg_type[:64], message.key, "waiting"))

    def handler(self, name: str, seconds: float, error: Optional[BaseException]) -> None:
        """A handler has run for that time, well or not."""
        with self._lock:
            self._handler_buckets[bisect.bisect_left(HANDLER_BUCKETS, seconds)] += 1
            runs, failures, total, most = self._runs.get(name, (0, 0, 0.0, 0.0))
            self._runs[name] = runs + 1, failures + bool(error), total + seconds, max(most, seconds)

    def message(self, *values: Any) -> None:
        """Something has become of a message: the values of EVENT_FIELDS."""
        with self._lock:
            self._messages.append(values)

    def count(self, event: str) -> None:
        """One of the events in METRICS has happened; ``event`` is its name without _total."""
        with self._lock:
            self._events[event] += 1

    def render(self, state: Mapping[str, float]) -> str:
        """Everything, and the state of the server, in the Prometheus text format, version 0.0.4."""
        with self._lock:
            metrics: Dict[str, Mapping[str, object]] = {
                "pushes_total": {f'{{outcome="{outcome}",status="{status}",type="{label}"}}': count
                                 for (outcome, label, status), count in sorted(self._pushes.items())},
                "answer_seconds": sum_up(ANSWER_BUCKETS, self._answer_buckets, self._answer_seconds),
                "handler_seconds": sum_up(HANDLER_BUCKETS, self._handler_buckets,
                                          sum(total for _, _, total, _ in self._runs.values())),
                **{f"{event}_total": {"": count} for event, count in self._events.items()}}
        metrics.update({name: {"": value if value % 1 else int(value)} for name, value in state.items()})
        lines = []
        for name, values in metrics.items():
            kind = "counter" if name.endswith("_total") else "histogram" if "_sum" in values else "gauge"
            lines += [f"# HELP kfserver_{name} {METRICS[name]}", f"# TYPE kfserver_{name} {kind}",
                      *(f"kfserver_{name}{suffix} {value}" for suffix, value in values.items())]
        return "\n".join(lines) + "\n"

    def report(self) -> Dict[str, Any]:
        """What the page shows of it, as JSON has it: answers of the last half hour, the newest message first."""
        with self._lock:
            last = int(self._clock()) // STEP_SECONDS
            bars: List[Sequence[int]] = [self._bars.get(step, NEW_BAR) for step in range(last - STEPS + 1, last + 1)]
            buckets = [sum(counts) for counts in zip(*bars)][len(PUSH_KINDS):]
            return {
                "step_seconds": STEP_SECONDS, "kinds": PUSH_KINDS, "steps": [bar[:len(PUSH_KINDS)] for bar in bars],
                **{f"p{share}": percentile(buckets, share / 100) for share in (50, 90, 99)}, "late": buckets[-1],
                "handlers": [{"name": name, "runs": runs, "failures": failures, "mean_ms": total / runs * 1000,
                              "max_ms": most * 1000}
                             for name, (runs, failures, total, most) in sorted(self._runs.items())],
                "messages": list_messages(self._messages)}


PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>kfserver</title>
<style>
:root { color-scheme: light dark; --ink: #124; --soft: #667; --line: #dde; --card: #fff; --bg: #f6f7fa; --bad: #c4262e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eef; --soft: #99a; --line: #334; --card: #171c25; --bg: #0e1219; --bad: #ff7b80 } }
.accepted { --hue: #48f } .repeat { --hue: #9ab } .other { --hue: #1a9 } .refused { --hue: #fa2 } .busy { --hue: #e45 }
body { max-width: 72rem; margin: 1rem auto; padding: 0 1rem; background: var(--bg); color: var(--ink);
  font: 14px/1.5 system-ui, sans-serif }
h1, h2 { margin: 0 0 .5rem; font-size: 1.1rem }
section { margin-top: 1rem; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; overflow: auto; font-variant-numeric: tabular-nums }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: .75rem; margin: 0 }
dt, th, #legend { color: var(--soft); font-size: .85rem; font-weight: 400 }
#legend { display: flex; flex-wrap: wrap; gap: 0 1rem } #legend [id]::before { content: "■ "; color: var(--hue) }
dt::first-letter, th:not(.ms)::first-letter { text-transform: uppercase }
dd { margin: 0; font-size: 1.15rem }
table { width: 100%; border-collapse: collapse }
th, td { text-align: left; padding: .25rem .7rem .25rem 0; border-top: 1px solid var(--line); white-space: nowrap }
.runs, .failures, .mean_ms, .max_ms, .ms, .replies { text-align: right }
td.key { white-space: normal; overflow-wrap: anywhere; min-width: 12rem }
.bad, .bad td { color: var(--bad); font-weight: 600 }
svg { width: 100%; height: 9rem; border-bottom: 1px solid var(--line) } path { fill: var(--hue) }
input { font: inherit; margin-bottom: .5rem }
</style>
<h1>kfserver <span id="version"></span> · <span id="health"></span></h1>
<section><dl id="numbers"></dl></section>
<section><h2>Pushes of the last half hour</h2><svg id="plot" viewBox="0 0 180 100" preserveAspectRatio="none"></svg>
<div id="legend"></div></section>
<section><h2>Handlers</h2><table id="handlers"></table></section>
<section><h2>Last 100 messages</h2><input id="word" type="search"><table id="messages"></table></section>
<script>
"use strict";
const chinese = {"Pushes of the last half hour": "最近半小时的推送", Handlers: "处理函数",
  "Last 100 messages": "最近 100 条消息", filter: "筛选", "no answer": "没有应答", draining: "正在停止", ok: "正常",
  off: "未启用", away: "不可用", accepted: "已接收", repeat: "重复", other: "握手等", refused: "拒绝",
  busy: "繁忙或出错", highest: "最高", waiting: "等待中", retry: "将重试", handled: "已处理", failed: "失败",
  queue: "排队", busy_workers: "忙碌的工作线程", oldest_message: "最久等待", answers_p50: "应答 p50",
  answers_p90: "应答 p90", answers_p99: "应答 p99", answers_after_2_s: "超过 2 秒的应答", journal: "日志文件",
  send_api: "发送接口", name: "名称", runs: "次数", failures: "失败", mean_ms: "平均毫秒", max_ms: "最长毫秒",
  time: "时间", type: "类型", key: "键", outcome: "结果", handler: "函数", ms: "毫秒", replies: "回复", error: "错误"};
const inChinese = navigator.language.toLowerCase().startsWith("zh");
const say = word => inChinese && chinese[word] || word.replaceAll("_", " ");
const show = value => typeof value === "number" ? value.toLocaleString([], {maximumFractionDigits: 2}) : value ?? "";
const find = id => document.getElementById(id);
let report = null;

function make(tag, values, ...children) {
  const element = Object.assign(document.createElement(tag), values);
  element.append(...children);
  return element;
}
function showNumbers() {
  const numbers = [["queue", report.queue_messages], ["busy_workers", `${report.busy_workers} / ${report.workers}`],
    ["oldest_message", `${show(report.oldest_seconds)} s`, report.oldest_seconds > 60],
    ...["p50", "p90", "p99"].map(name => [`answers_${name}`, report[name], report[name].startsWith(">")]),
    ["answers_after_2_s", report.late, report.late > 0],
    ...["journal", "redis", "send_api"].map(name => [name, say(report[name]), !["ok", "off"].includes(report[name])])];
  find("numbers").replaceChildren(...numbers.map(([name, value, bad]) => make("div", {id: name},
    make("dt", {}, say(name)), make("dd", {className: bad ? "bad" : ""}, show(value)))));
}
function showPlot() {
  const sum = counts => counts.reduce((total, count) => total + count), highest = Math.max(...report.steps.map(sum));
  const tops = report.steps.map(() => 100);  // of each bar, as far as it is drawn
  const draw = kind => report.steps.map((step, x) => {
    const height = highest && step[kind] / highest * 96;
    tops[x] -= height;
    return height && `M${x} ${tops[x]}h.8v${height}h-.8z`;
  }).filter(Boolean).join("");
  find("plot").innerHTML = report.kinds.map((name, kind) => `<path class="${name}" d="${draw(kind)}"/>`).join("");
  find("legend").replaceChildren(...report.kinds.map((name, kind) => make("span", {id: name, className: name},
    `${say(name)} ${show(sum(report.steps.map(step => step[kind])))}`)),
    `${say("highest")} ${show(highest)} / ${report.step_seconds} s`);
}
function showTable(id, columns, rows) {
  const line = (tag, bad, texts) => make("tr", {className: bad ? "bad" : ""},
    ...columns.map(name => make(tag, {className: name}, show(texts(name)))));
  find(id).replaceChildren(line("th", false, say), ...rows.map(row => line("td", row.bad, name => row[name])));
}
function showTables() {
  showTable("handlers", ["name", "runs", "failures", "mean_ms", "max_ms"],
    report.handlers.map(each => ({...each, bad: each.failures > 0})));
  const columns = ["time", "type", "key", "outcome", "handler", "ms", "replies", "error"];
  const rows = report.messages.map(each => ({...each, time: new Date(each.time * 1000).toLocaleTimeString(),
    outcome: say(each.outcome), bad: each.outcome === "failed"}));
  const word = find("word").value.trim().toLowerCase();
  showTable("messages", columns, rows.filter(row =>
    columns.map(name => row[name]).join(" ").toLowerCase().includes(word)));
}
async function renew() {
  let health = "no answer";
  try {
    report = await (await fetch("status.json")).json();
    health = report.health;
    find("version").textContent = report.version;
    showNumbers();
    showPlot();
    showTables();
  } finally {
    Object.assign(find("health"), {textContent: say(health), className: health === "ok" ? "" : "bad"});
    setTimeout(renew, 2000);
  }
}
document.documentElement.lang = inChinese ? "zh" : "en";
for (const title of document.querySelectorAll("h2")) title.textContent = say(title.textContent);
find("word").placeholder = say("filter");
find("word").addEventListener("input", () => report && showTables());
renew();
</script>
"""


class AdminEndpoint:
    """Answers people and monitors, who can change nothing here. ``render`` makes what Prometheus reads, ``report`` what
    the page shows, and ``trouble`` says what is wrong, or nothing."""

    def __init__(self, render: Callable[[], str], report: Callable[[], Dict[str, Any]],
                 trouble: Callable[[], str]) -> None:
        self._render, self._report, self._trouble = render, report, trouble
        # The page's own style and script may be used, and nothing else, wherever it comes from (CSP level 3).
        style, script = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
                         for text in re.findall("(?s)<(?:style|script)>(.*?)</", PAGE))
        self._policy = (f"default-src 'none'; connect-src 'self'; style-src 'sha256-{style}'; script-src "
                        f"'sha256-{script}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

    def handle_all(self, requests: Iterable[Request]) -> List[Response]:
        """The answers to requests, as `Endpoint` gives them."""
        return [self.handle(request) for request in requests]

    def handle(self, request: Request) -> Response:
        """The answer to one request."""
        if request.problem:
            return refusal(request.problem)
        if request.method not in ("GET", "HEAD"):
            return Response(405, b"only GET here\n", "refused", (("Allow", "GET, HEAD"),))
        if request.path == "/metrics":
            return Response(200, self._render().encode(), "metrics")
        if request.path == "/healthz":
            trouble = self._trouble()
            return Response(503 if trouble else 200, (trouble or "ok").encode() + b"\n", "health")
        if request.path not in ("/", "/status.json"):
            return Response(404, b"/, /status.json, /healthz and /metrics are here\n", "refused")
        kind, text = ("text/html; charset=utf-8", PAGE) if request.path == "/" else (
            "application/json", json.dumps(self._report()))
        return Response(200, text.encode(), "page", (
            ("Content-Type", kind), ("Content-Security-Policy", self._policy), ("X-Content-Type-Options", "nosniff")))


# ---- 10 Journal -----------------------------------------------------------------------------------------------------
# Law: what was acknowledged survives the process. Keys, bytes and states in and out of one SQLite file; knows nothing
# of what a message means or who handles it.

# Marks a file as ours (SQLite's application_id: "KFsv") and says which layout it has (user_version).
JOURNAL_ID = 0x4B467376
JOURNAL_VERSION = 2
# Seconds to wait for a program that has locked the file: the platform waits 2 s for its answer.
LOCK_SECONDS = 1.0
# Seconds between two attempts to write a file that could not be written.
LOOK_AGAIN_SECONDS = 1.0
# Changes between two clean-ups.
TRIM_EVERY = 2000
# Seconds that a session is kept: the platform lets nobody be answered 48 hours after the last message.
SESSION_SECONDS = 48 * 60 * 60.0
# Pushes that could not be read: how many are kept, and how many bytes of each.
MAX_UNREADABLE = 100
MAX_UNREADABLE_BYTES = 64 * 1024

# The states of rows. A push that could not be read is a row too; its key has a blank, which no message's key has.
WAITING, FINISHED, DEAD, UNREADABLE = 0, 1, 2, 3

# What makes layout 1 of an empty file, layout 2 of layout 1. `done` numbers what is finished or dead, in that order.
_LAYOUTS = (
    ("""CREATE TABLE messages (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, state INTEGER NOT NULL,
        tries INTEGER NOT NULL, received REAL NOT NULL, payload BLOB, error TEXT)""",),
    ("ALTER TABLE messages ADD COLUMN begun INTEGER NOT NULL DEFAULT 0",
     "ALTER TABLE messages ADD COLUMN replies TEXT",
     "ALTER TABLE messages ADD COLUMN done INTEGER",
     "UPDATE messages SET done = id WHERE state = 1",
     "CREATE TABLE sessions (sender TEXT PRIMARY KEY, value TEXT NOT NULL, touched REAL NOT NULL)"))

_ADD = "INSERT OR REPLACE INTO messages (key, state, tries, received, payload) VALUES (?, 0, 0, ?, ?)"
_FINISH = "UPDATE messages SET state = 1, begun = 0, payload = NULL, replies = NULL, done = ? WHERE key = ?"
# For a message whose row went with a file that could not be read any more.
_REMEMBER = "INSERT OR IGNORE INTO messages (done, key, state, tries, received) VALUES (?, ?, 1, 0, 0)"
_KEEP_SESSION = "INSERT OR REPLACE INTO sessions (sender, value, touched) VALUES (?, ?, ?)"
# The clean-up.
_FORGET = "DELETE FROM messages WHERE done = ? AND key = ?"
_TRIM_SESSIONS = """DELETE FROM sessions WHERE touched < ? OR sender IN
    (SELECT sender FROM sessions ORDER BY value = '', touched DESC LIMIT -1 OFFSET ?)"""

# What tells a file from all others, whatever its name: its device and inode.
_IDENTITY = operator.attrgetter("st_dev", "st_ino")
# A statement and its values.
Change = Tuple[str, Sequence[Any]]
# Runs a job once, that number of seconds from now.
Later = Callable[[float, Callable[[], None]], None]
# A sender's name and the JSON text of the session; an empty text: there is none.
Session = Tuple[str, str]


class Row(NamedTuple):
    """A message in the journal. ``tries`` have failed; if ``begun``, one more was begun and the process ended in it.

    ``received`` in Unix seconds; ``payload`` is empty once the message is finished; ``replies`` wait to be sent: empty
    if the handler has not run.
    """

    key: str
    tries: int
    begun: bool
    received: float
    payload: bytes
    error: str
    replies: str


def read_rows(db: sqlite3.Connection, state: int) -> List[Row]:
    """The messages in one state, oldest first."""
    found = db.execute("""SELECT key, tries, begun, received, coalesce(payload, x''), coalesce(error, ''),
        coalesce(replies, '') FROM messages WHERE state = ? ORDER BY id""", (state,))
    return [Row(key, tries, bool(begun), *rest) for key, tries, begun, *rest in found]


def refuse_foreign_file(path: str) -> None:
    """Raise `SettingsError` for a file that is there and not ours, without touching it or what lies beside it.

    Only its head is looked at (SQLite's file format, section 1.3), and not by SQLite: after a crash in the middle of a
    write, SQLite must read what lies beside the file too. To be called while this process has the file not open: who
    closes a descriptor of it frees the locks that SQLite has on it.
    """
    head = b""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        head = file.read(100)
    if head:
        is_database = head.startswith(b"SQLite format 3\0")
        _check_marks(is_database and int.from_bytes(head[68:72], "big"), int.from_bytes(head[60:64], "big"), path)


def _check_marks(mark: int, version: int, path: str) -> None:
    """Raise `SettingsError` for marks of another program, or of a kfserver of the future."""
    if mark != JOURNAL_ID:
        raise SettingsError(f"{path} is not a journal of kfserver, and was left as it is: name another --journal")
    if version > JOURNAL_VERSION:
        raise SettingsError(f"the journal {path} was written by a newer kfserver, and was left as it is: use that one")


def connect_journal(path: str, mode: str) -> sqlite3.Connection:
    """A connection to the journal at ``path``, which must exist; ``mode`` as in an SQLite address. Raises
    `SettingsError` for a file that is not ours."""
    import sqlite3
    db = sqlite3.connect(f"file:{quote(os.fsencode(path))}?mode={mode}", uri=True, timeout=LOCK_SECONDS,
                         isolation_level=None, check_same_thread=False)
    try:
        mark, version, pages = [db.execute(f"PRAGMA {name}").fetchone()[0]
                                for name in ("application_id", "user_version", "page_count")]
        if pages:
            _check_marks(mark, version, path)
    except BaseException:
        db.close()
        raise
    return db


class JournalFile:
    """The SQLite file at ``path``, its companions and its lock, which one process has at a time. Not thread-safe.

    The lock is a flock(2) on a file of its own. SQLite's locks do not suffice: a process loses them when it closes any
    descriptor of the file, as a handler does that copies it. The lock's file does not suffice: it may be deleted.
    ``sync`` is SQLite's ``synchronous``.
    """

    def __init__(self, path: str, sync: str) -> None:
        import sqlite3
        self.path, self._sync = os.path.realpath(path), sync  # handlers may change the current folder
        self.errors = (sqlite3.Error, OSError, SettingsError)
        self._opened: Dict[str, Tuple[int, int]] = {}  # the files by their names, as they were opened
        self._lock: Optional[int] = None  # the descriptor of the lock's file
        self.db = sqlite3.connect(":memory:")
        self.db.close()  # whoever uses it before it is opened gets one of the errors

    def lock(self) -> None:
        """Hold the right to write until the process ends, in whatever way: the system frees the lock then. Raises
        BlockingIOError if another process has it."""
        if fcntl is None:  # Windows does not free SQLite's own locks too early
            return
        lock = os.open(self.path + "-lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(lock)
            raise
        self._lock = lock

    def open(self) -> None:
        """Open the file: make it if there is none, update an older layout.

        Raises `SettingsError` for a file that is not ours, "database is locked" if another process has it open, or
        another of ``errors``.
        """
        refuse_foreign_file(self.path)
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite gives its companions the same mode
        names = [self.path + suffix for suffix in ("", "-wal", "-shm")]
        for name in (*names, self.path + "-lock"):
            with contextlib.suppress(OSError):  # it is not there, or belongs to another user
                os.chmod(name, 0o600)
        self.db = connect_journal(self.path, "rw")
        version, = self.db.execute("PRAGMA user_version").fetchone()
        for statement in (
                "PRAGMA secure_delete = ON",
                # SQLite grants this lock only to who is alone; the next reading after NORMAL frees it.
                "PRAGMA busy_timeout = 100", "PRAGMA locking_mode = EXCLUSIVE", "BEGIN EXCLUSIVE",
                # Before the switch to WAL: the head of the file itself must say from the first moment that it is ours.
                *itertools.chain.from_iterable(_LAYOUTS[version:]),
                *((f"PRAGMA application_id = {JOURNAL_ID}", f"PRAGMA user_version = {JOURNAL_VERSION}")
                  if version < JOURNAL_VERSION else ()),
                "COMMIT", "PRAGMA locking_mode = NORMAL", f"PRAGMA busy_timeout = {LOCK_SECONDS * 1000:.0f}",
                "PRAGMA user_version", "PRAGMA journal_mode = WAL", f"PRAGMA synchronous = {self._sync}",
                "PRAGMA wal_checkpoint(TRUNCATE)"):
            self.db.execute(statement).fetchall()
        self._opened = {name: _IDENTITY(os.stat(name)) for name in names if os.path.exists(name)}

    def commit(self, changes: Iterable[Change]) -> None:
        """Write all changes, or none and one of ``errors``. What files hold that are not in their places is lost."""
        self.db.execute("BEGIN IMMEDIATE")
        for sql, group in itertools.groupby(changes, operator.itemgetter(0)):
            self.db.executemany(sql, [values for _, values in group])
        if self.has_moved():
            raise OSError("one of its files was deleted or replaced")
        self.db.execute("COMMIT")

    def has_moved(self) -> bool:
        """Whether a file that was opened is not in its place any more."""
        try:
            return [_IDENTITY(os.stat(name)) for name in self._opened] != [*self._opened.values()]
        except OSError:
            return True

    def rescue(self) -> List[Change]:
        """What writes into another file all that this one still holds; nothing if it cannot be read."""
        changes: List[Change] = []
        with contextlib.suppress(*self.errors):
            self.db.rollback()
            for table in ("messages", "sessions"):
                for row in self.db.execute(f"SELECT * FROM {table}").fetchall():
                    changes.append((f"INSERT OR REPLACE INTO {table} VALUES ({','.join('?' * len(row))})", row))
        return changes

    def close(self) -> None:
        """Leave nothing of what was handled in the files, close them, and free the lock."""
        with contextlib.suppress(*self.errors):
            self.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        if self._lock is not None:
            with contextlib.suppress(OSError):
                os.unlink(self.path + "-lock")
            os.close(self._lock)
            self._lock = None
        self.db.close()  # last: as long as it is open, nobody else can open the file

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's files. SQLite must not close them here: it would write to them."""
        null = os.open(os.devnull, os.O_RDONLY)  # it cannot be locked for writing, so SQLite deletes nothing
        for number in range(3, 4096):  # more than a process has open when it opens its journal
            with contextlib.suppress(OSError):
                if _IDENTITY(os.fstat(number)) in self._opened.values():
                    os.dup2(null, number, inheritable=False)  # not closed: SQLite keeps their numbers
        os.close(null)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        self._kept = self  # a frozen cycle is never collected, not even at the end: its connection is never closed
        gc.freeze()


class Journal:
    """The messages that were acknowledged, in the SQLite file ``settings.journal``, which one process has at a time.

    Raises `SettingsError` if another process has it, and for a file that cannot be used. ``clock`` gives Unix seconds.
    `add` and `begin` write at once. All other changes are marks: the next commit or `flush` writes them, and while the
    file cannot be written they wait.
    """

    def __init__(self, settings: Settings, later: Later, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._later, self._clock = settings, later, clock
        self._lock = threading.Lock()  # guards all below, and the file; the list is appended to without it
        # What is to be written. If a thread waits for it, the second list gets what became of it, None or an error.
        self._pending: List[Tuple[List[Change], Optional[List[Optional[BaseException]]]]] = []
        self._changes = 0  # since the last clean-up
        self._unreadable = itertools.count()  # pushes that could not be read
        self._failing = self._closed = False
        self._file = JournalFile(settings.journal, settings.journal_sync)
        try:
            self._file.lock()
            self._file.open()
            found, = self._file.db.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise OSError(" ".join(found.split()))
            # The finished messages, with the numbers in whose order they were done: what a clean-up may delete.
            self._finished: Deque[Tuple[int, str]] = deque(
                self._file.db.execute("SELECT done, key FROM messages WHERE state = 1 ORDER BY done"))
            last, = self._file.db.execute("SELECT coalesce(MAX(done), 0) FROM messages").fetchone()
        except self._file.errors as error:
            self._file.close()
            if isinstance(error, BlockingIOError) or str(error) == "database is locked":
                raise SettingsError(f"the journal {self._file.path} is in another process's hands: stop that one, or "
                                    "serve from one process with threads, or set --redis instead of --journal for "
                                    "several") from error
            if isinstance(error, SettingsError):
                raise
            raise SettingsError(f"cannot use the journal {settings.journal}: {error}; make its folder and let "
                                "this user write there, or move it away, or name another --journal") from error
        self._numbers = itertools.count(last + 1)

    # What is left from the last run

    def waiting(self) -> List[Row]:
        """The messages that are not done, oldest first."""
        return read_rows(self._file.db, WAITING)

    def finished_keys(self) -> List[str]:
        """The keys of the messages whose handlers were done, oldest first, as many as are remembered."""
        found = self._file.db.execute("""SELECT key FROM messages WHERE state = 1 OR state = 2 AND replies != ''
            ORDER BY done DESC LIMIT ?""", (self._settings.dedup_size,))
        return [key for key, in found][::-1]

    def sessions(self) -> List[Tuple[str, str, float]]:
        """The sessions, each with its sender, its text and when it was touched, in Unix seconds; the newest last."""
        found = self._file.db.execute("""SELECT sender, value, touched FROM sessions WHERE touched > ? AND value != ''
            ORDER BY touched DESC LIMIT ?""", (self._clock() - SESSION_SECONDS, self._settings.sessions))
        return found.fetchall()[::-1]

    # What becomes of a message

    def add(self, messages: Iterable[Tuple[str, bytes]]) -> None:
        """Write down messages, each its key and its bytes, in one commit: all of them, or none and `JournalError`."""
        now = self._clock()
        self._write_now([(_ADD, (key, now, payload)) for key, payload in messages])

    def begin(self, key: str, tries: int) -> None:
        """Write down that try number ``tries`` of a message of an earlier process begins. Raises `JournalError`."""
        self._write_now([("UPDATE messages SET tries = ?, begun = 1 WHERE key = ?", (tries - 1, key))])

    def tried(self, key: str, tries: int) -> None:
        """Try number ``tries`` of the message has failed, and another will follow."""
        self._mark("UPDATE messages SET tries = ?, begun = 0 WHERE key = ?", (tries, key))

    def answered(self, key: str, replies: str, session: Optional[Session] = None) -> None:
        """The message's handler is done; ``replies``, which may be any text but an empty one, wait to be sent."""
        self._mark("UPDATE messages SET replies = ?, begun = 0 WHERE key = ?", (_storable(replies), key), session)

    def finish(self, key: str, session: Optional[Session] = None) -> None:
        """The message is done: its content is forgotten."""
        done = next(self._numbers), key
        self._finished.append(done)
        self._mark(_FINISH, done, session)

    def fail(self, key: str, error: str) -> None:
        """The message's last try has failed; it is kept, with its replies and what is known of the error."""
        self._mark("UPDATE messages SET state = 2, tries = tries + 1, begun = 0, error = ?, done = ? WHERE key = ?",
                   (_storable(error), next(self._numbers), key))

    def _mark(self, sql: str, values: Sequence[Any], session: Optional[Session] = None) -> None:
        """Have a change written with the next commit, and the session in the same."""
        changes: List[Change] = [(sql, values)]
        if session:
            changes.append((_KEEP_SESSION, (session[0], _storable(session[1]), self._clock())))
        self._pending.append((changes, None))

    def keep_unreadable(self, payload: bytes, reason: str) -> None:
        """Keep the beginning of a push that could not be read, in the place of the oldest of many; it is lost while the
        file cannot be written."""
        number = next(self._unreadable) % MAX_UNREADABLE
        if not self._failing:
            self._mark("INSERT OR REPLACE INTO messages (key, state, tries, received, payload, error) "
                       "VALUES (?, 3, 0, ?, ?, ?)",
                       (f"unreadable {number}", self._clock(), payload[:MAX_UNREADABLE_BYTES],
                        _storable(reason)))
        if number == 0:  # no more of them wait for a commit than are kept
            self.flush()

    # Writing

    def flush(self) -> None:
        """Write the marks, and notice files that were deleted or replaced; to be called about once a second at least.
        When the file cannot be written, that is left to the next look at it."""
        with self._lock:
            if not self._failing and (self._pending or self._file.has_moved()):
                self._write()

    def _write_now(self, changes: List[Change]) -> None:
        """Write the changes, in one commit with those of other threads that wait for the lock."""
        outcome: List[Optional[BaseException]] = []
        self._pending.append((changes, outcome))
        with self._lock:
            if not outcome:  # else the thread that had the lock has written them
                self._write()
        if outcome[0]:
            raise JournalError("the journal cannot be written") from outcome[0]

    def _write(self) -> None:
        """Write all that is pending, or nothing: then marks stay pending, and the threads that wait are told."""
        pending = self._pending[:]
        changes = [change for each, _ in pending for change in each]
        error = JournalError("closed") if self._closed else attempt(self._commit, changes)
        self._pending[:len(pending)] = [each for each in pending if error and each[1] is None]
        for _, outcome in pending:
            if outcome is not None:
                outcome.append(error)
        if error and not self._closed:
            self._note_failure(error)
        elif self._failing and not error:
            self._failing = False
            log.warning("the journal %s is written again", self._settings.journal)

    def _commit(self, changes: List[Change]) -> None:
        if self._failing:
            self._file.open()
            changes = [*((_REMEMBER, values) for sql, values in changes if sql is _FINISH), *changes]
        self._changes += len(changes)
        if self._changes >= TRIM_EVERY:
            self._changes = 0
            old = [self._finished.popleft() for _ in range(len(self._finished) - self._settings.dedup_size)]
            changes = [*changes, *((_FORGET, values) for values in old),
                       (_TRIM_SESSIONS, (self._clock() - SESSION_SECONDS, self._settings.sessions))]
        self._file.commit(changes)

    def _note_failure(self, error: BaseException) -> None:
        if self._file.has_moved():
            self._pending.insert(0, (self._file.rescue(), None))
        self._file.db.close()
        if not self._failing:
            self._failing = True
            reason = error if isinstance(error, self._file.errors) else describe_error(error)
            log.error("the journal %s cannot be written: %s; pushes are answered 503 until it can: free the disk, "
                      "or correct the rights of its file, or move it away", self._settings.journal, reason)
            self._later(LOOK_AGAIN_SECONDS, self._look_again)

    def _look_again(self) -> None:
        """Write the marks, or nothing, if the file can be written again though no message comes."""
        with self._lock:
            if self._failing:
                self._write()
            if self._failing and not self._closed:
                self._later(LOOK_AGAIN_SECONDS, self._look_again)

    @property
    def healthy(self) -> bool:
        """Whether the last change could be written, and the files are where they were."""
        return not self._failing and not self._file.has_moved()

    def close(self) -> None:
        """Write the marks, and let go of the file."""
        with self._lock:
            for _ in range(2):  # the second makes anew what was deleted
                if self._pending or not self.healthy:
                    self._write()
            self._closed = True
            self._file.close()

    def after_fork(self) -> None:
        """In a forked child: the journal stays the parent's. Nothing is written from here."""
        self._lock = threading.Lock()  # another thread of the parent may have it
        self._closed = True
        self._file.after_fork()


def _storable(text: str) -> str:
    """The text with a mark in the place of half surrogates, which SQLite does not take."""
    return text.encode("utf-8", "replace").decode()


# ---- 11 Shared claims -----------------------------------------------------------------------------------------------
# Law: several instances claim as one, through Redis. Works like a `ClaimCache`, and is one when Redis is away. Only the
# threads of this section wait for Redis; a caller waits for them, no longer than a limit.

# Milliseconds that a claim lives until its message is safe, that a message is remembered from then on, and that a
# conversation is kept: after 48 h the platform lets nobody be answered.
CLAIM_MS = 3 * 1000
REMEMBER_MS = 24 * 60 * 60 * 1000
SESSION_MS = 48 * 60 * 60 * 1000
# Seconds that Redis may take before it counts as away, which is also what a round waits for its claims; that a
# connection and a conversation may take; and between two looks at a Redis that is away.
REDIS_TIMEOUT = 0.1
REDIS_PATIENCE = 1.0
REDIS_PAUSE = 1.0
# Seconds of silence after which a connection is tried: firewalls drop idle ones and tell nobody.
REDIS_IDLE = 30.0
# Writes that may be owed while Redis is away.
MAX_OWED = 10000

# A key's value is its owner, with "+" before it once the message is safe. Only the owner may release its claim.
_RELEASE = """local value = redis.pcall('get', KEYS[1])
if value == ARGV[1] or value == '+' .. ARGV[1] then redis.call('del', KEYS[1]) end
return 1"""

_Command = Tuple[Any, ...]
# Commands that go together, and what Redis answers to each: nothing until it does.
_Job = Tuple[Sequence[_Command], List[Any]]
# Whether Redis answers, runs scripts and can be written to, which a replica cannot.
_PROBE: _Command = ("EVAL", "redis.call('set', KEYS[1], '', 'px', 1) return 1", 1, "kfserver-probe")


def connect_redis(url: str) -> Any:
    """A client that connects at its first command, gives up soon and never tries again by itself.

    Raises `SettingsError` for a package that is missing or does not work, and for a bad address.
    """
    error = attempt(importlib.import_module, "redis")
    redis: Any = sys.modules.get("redis")
    if error or not hasattr(redis, "Redis"):
        found = f" ({getattr(redis, '__file__', None)} is not it, or is broken)" if redis else ""
        raise SettingsError(f"--redis (KF_REDIS) needs the redis package{found}: pip install redis")
    try:
        client = redis.Redis.from_url(url)
        pool = client.connection_pool
        # These replace what the address says, which would replace what `from_url` is given.
        pool.connection_kwargs.update(decode_responses=False, encoding="utf-8", encoding_errors="surrogatepass",
                                      socket_timeout=REDIS_PATIENCE, retry_on_timeout=False, health_check_interval=0)
        if hasattr(redis, "retry"):  # version 3 has none, and tries nothing again
            pool.connection_kwargs.update(socket_connect_timeout=REDIS_PATIENCE,
                                          retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0))
        pool.connection_class(**pool.connection_kwargs)  # it does not connect, and judges its options
    except (ValueError, TypeError):  # whose texts may hold a part of the password
        raise SettingsError("--redis (KF_REDIS) takes an address like redis://127.0.0.1:6379/0, "
                            "a password in it percent-encoded") from None
    return client


class RedisLine:
    """A connection to the Redis at ``url``, and the thread that alone uses it: resolving, connecting and waiting happen
    there.

    All that waits goes in one pipeline, in order: a claim never overtakes an older release. Redis is away after an
    error, or when it took longer than REDIS_TIMEOUT: nobody waits for it then, and what is owed is kept.
    """

    def __init__(self, url: str) -> None:
        self._client = connect_redis(url)
        self._changed = threading.Condition()  # guards all below; told when there is work, and when it is done
        self._jobs: OrderedDict[Union[str, int], _Job] = OrderedDict()  # by a number if somebody waits for the answers
        self._thread: Optional[threading.Thread] = None
        self._begun = 0.0  # when the pipeline in hand was begun, by the monotonic clock
        self._away = self._closed = False

    def open(self) -> None:
        """Get ready to serve: see to it that the thread runs, which connects at once. Waits for nothing."""
        with self._changed:
            if self._closed or (self._thread and self._thread.is_alive()):
                return
            self._thread = threading.Thread(target=self._work, name="kfserver-redis", daemon=True)
            error = attempt(self._thread.start)
            if error:  # no thread to spare, or the interpreter ends: the next call tries again
                self._note(error)

    def ask(self, commands: Sequence[_Command], seconds: float) -> List[Any]:
        """What Redis answers to each of the commands within ``seconds``; nothing if it does not, or is away."""
        self.open()
        answers: List[Any] = []
        started = time.monotonic()
        with self._changed:
            if self._away or self._closed:
                return []
            self._jobs[id(answers)] = commands, answers
            self._changed.notify_all()
            self._changed.wait_for(lambda: answers or self._away, seconds)
            self._jobs.pop(id(answers), None)
            # A pipeline that was begun later, after another's, may still be in time.
            if not answers and self._begun < started + REDIS_TIMEOUT / 10:
                self._note(TimeoutError())
            return answers[:]

    def owe(self, name: str, command: _Command) -> None:
        """Send the command soon, or when Redis is back, and wait for nothing; the last one of a name counts."""
        self.open()
        with self._changed:
            self._jobs[name] = (command,), []
            self._jobs.move_to_end(name)
            if len(self._jobs) > MAX_OWED:
                self._jobs.popitem(last=False)
            self._changed.notify_all()

    def _note(self, error: Optional[BaseException]) -> None:
        """Note whether Redis is away, and tell when that changes."""
        if error and not self._away:
            log.warning("Redis is away (%s): this instance drops only the repeats that it has seen itself; "
                        "check the server that --redis names", type(error).__name__)
        elif self._away and not error:
            log.warning("Redis is back: instances share their claims again")
        self._away = error is not None
        self._changed.notify_all()

    def _work(self) -> None:
        """The thread's life: send what waits. While Redis is away, and after a long silence, see whether it answers."""
        error: Optional[BaseException] = ConnectionError()
        while True:
            self._begun = time.monotonic()
            error = attempt(self._client.ping) if error else None  # resolves and connects, which may take long
            with self._changed:
                jobs = dict(self._jobs)
            if self._closed and not jobs:
                break
            error = error or attempt(self._exchange, jobs)
            with self._changed:
                self._note(error)
                if self._closed and error:
                    break
                took = 0.0 if error else time.monotonic() - self._begun
                self._changed.wait_for(lambda: self._closed or (self._jobs and not self._away),
                                       REDIS_PAUSE if error else REDIS_IDLE)
                # What is owed waits for a question as long as the last pipeline took, to go with it.
                self._changed.wait_for(lambda: self._closed or any(isinstance(name, int) for name in self._jobs), took)
        attempt(self._client.connection_pool.disconnect)

    def _exchange(self, jobs: Mapping[Union[str, int], _Job]) -> None:
        """Send what waits, and hand the answers out. Raises what the package raises, and TimeoutError if it is slow."""
        started, pipeline = time.monotonic(), self._client.pipeline(transaction=False)
        for command in [command for commands, _ in jobs.values() for command in commands] or [_PROBE]:
            pipeline.execute_command(*command)
        found = iter(pipeline.execute())
        with self._changed:
            for name, job in jobs.items():
                job[1].extend(itertools.islice(found, len(job[0])))
                if self._jobs.get(name) is job:  # else a newer one has come meanwhile
                    del self._jobs[name]
        if time.monotonic() - started > REDIS_TIMEOUT:
            raise TimeoutError

    def close(self) -> None:
        """Send what is owed, if Redis is there, for REDIS_PATIENCE at most. Nothing is sent afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread and self._thread.is_alive():
            self._thread.join(REDIS_PATIENCE)
        with self._changed:
            self._jobs.clear()

    def is_away(self) -> bool:
        """Whether Redis is away."""
        return self._away


class SharedClaims(RedisLine, ClaimCache):
    """A `ClaimCache` that asks the Redis at ``url`` too; the memory decides first, and alone while Redis is away.

    Redis keeps a claim for 3 s, and for a day once its message is safe; nobody waits until that is written. Keeps
    conversations too. Raises `SettingsError` without the package, or for a bad address.
    """

    def __init__(self, url: str, size: int) -> None:
        RedisLine.__init__(self, url)
        ClaimCache.__init__(self, size)
        self._instance = os.urandom(8).hex()
        self._known: Set[str] = set()  # keys in hand that Redis may have from us

    def _owner(self) -> str:
        return f"{self._instance}-{os.getpid()}"  # a forked process is another instance

    def confirm(self, keys: Sequence[str]) -> List[Union[bool, PushError]]:
        """Whether the claims of a round hold on all instances, one each: True it is ours, False another instance has
        the message safe, `BeingTaken` another is just taking it. While Redis is away, all are ours.

        Waits 100 ms at most. What is not ours is released.
        """
        self._known.update(keys)
        commands = [command for key in keys for command in (
            ("SET", "kfserver:" + key, self._owner(), "PX", CLAIM_MS, "NX"), ("GET", "kfserver:" + key))]
        answers = (keys and self.ask(commands, REDIS_TIMEOUT)) or [True, None] * len(keys)
        outcomes: List[Union[bool, PushError]] = []
        for key, is_set, value in zip(keys, answers[::2], answers[1::2]):
            if is_set or value == self._owner().encode():  # ours: its release was lost
                outcomes.append(True)
                continue
            self._known.discard(key)  # nothing there is to be released
            self.release(key)
            is_safe = bool(value) and value.startswith(b"+")
            outcomes.append(False if is_safe else BeingTaken("another instance is just taking the same message"))
        return outcomes

    def accept(self, keys: Sequence[str]) -> None:
        """The claimed messages are safe: repeats are dropped by all instances for a day."""
        super().accept(keys)
        for key in keys:
            self._known.add(key)
            self.owe(key, ("SET", "kfserver:" + key, "+" + self._owner(), "PX", REMEMBER_MS))

    def restore(self, key: str) -> None:
        """The message was accepted before a restart, and is in hand again."""
        super().restore(key)
        self.accept([key])

    def finish(self, key: str) -> None:
        """The message is done."""
        super().finish(key)
        self._known.discard(key)

    def release(self, key: str) -> None:
        """The message was refused, or failed for good: the same push may come again, to any instance."""
        super().release(key)
        if key in self._known:  # else Redis has nothing, or what was finished long ago
            self._known.discard(key)
            self.owe(key, ("EVAL", _RELEASE, 1, "kfserver:" + key, self._owner()))

    def load_session(self, name: str) -> str:
        """The text that any instance saved last for the conversation; empty if there is none.

        Waits 1 s at most. Raises ConnectionError when Redis is away: the try fails, and can be repeated.
        """
        text: bytes = self._ask_for_session("GET", name) or b""
        return text.decode("utf-8", "surrogatepass")

    def save_session(self, name: str, text: str) -> None:
        """Keep the text for 48 h; an empty one is deleted. Waits and raises as `load_session` does."""
        if text:
            self._ask_for_session("SET", name, text, "PX", SESSION_MS)
        else:
            self._ask_for_session("DEL", name)

    def _ask_for_session(self, verb: str, name: str, *arguments: Any) -> Any:
        for answer in self.ask([(verb, "kfserver-session:" + name, *arguments)], REDIS_PATIENCE):
            return answer
        raise ConnectionError("Redis is away, and conversations are there")


def check_redis(settings: Settings) -> None:
    """Raise `SettingsError` unless the Redis of the settings, if there is one, does what claims need."""
    if settings.redis:
        client = connect_redis(settings.redis)
        error = attempt(client.execute_command, *_PROBE)
        client.connection_pool.disconnect()
        if error:
            raise SettingsError(f"--redis (KF_REDIS): no good answer from there ({type(error).__name__}): check the "
                                "address and the server; without it, each instance drops only the repeats that it has "
                                "seen itself")


# ---- 12 Replies -----------------------------------------------------------------------------------------------------
# Law: what handlers return goes to the user through the platform's send API. Every call here ends within a deadline
# and never sleeps: whoever sends decides when to try again. Knows nothing of registries and queues.

# Replies that the platform allows to one message of the user.
QUOTA = 5
# Seconds for one exchange with the platform, from the name's look-up to the last byte of the answer.
SEND_TIMEOUT = 5.0
# Seconds that a reply is tried before its message counts as failed.
RETRY_REPLY_SECONDS = 600.0
# Seconds before a reply's second, third, … try; the last one also stands for all later tries.
RETRY_REPLY_DELAYS = (0.5, 2.0, 8.0, 30.0)
# Failures in a row after which the send API counts as away.
AWAY_AFTER = 3
# Seconds between two tries while it is away: no less than one exchange, so mostly one reply at a time is tried.
PROBE_SECONDS = 5.0
# Bytes of an answer that are read: real ones have about 300.
MAX_ANSWER = 64 * 1024

TOKEN_PATH = "/oauth/2.0/token"
SEND_PATH = "/rest/2.0/smartapp/message/custom/send"
THIRD_PARTY_SEND_PATH = "/rest/2.0/smartapp/message/custom/sendbytp"

# Where an answer has the number of an error, and words for it: of the token's page, of the gateway, of the send API.
_ERROR_FIELDS = (("error", "error_description"), ("error_code", "error_msg"), ("errno", "msg"))
# The gateway's numbers for a token that is invalid or expired: the same request succeeds with a new one.
_TOKEN_ERRORS = ("110", "111")
# Busy, try again later: 5000 is the API's; 2 (unavailable), 4 and 18 (too many requests at a time) are the gateway's.
_BUSY_ERRORS = ("2", "4", "18", "5000")
_API_ADVICE: Mapping[str, str] = MappingProxyType({
    "3001": "a parameter is wrong: mostly an empty text, or a picture's address that does not start with https",
    "30022": "the openid is not of this app: check that --app-key belongs to the app that the message came to",
    "90001": "over the quota: five replies to each message of the user, within 48 hours of it",
    "90002": "customer service is not enabled: enable it in the platform's console",
    "110": "the access token is invalid: check --access-token, or use --app-key and --app-secret instead",
    "111": "the access token has expired: renew --access-token, or use --app-key and --app-secret instead",
    "invalid_client": "check --app-key and --app-secret against the platform's console"})


class ApiError(ReplyError):
    """The send API refused, and would refuse again. ``number`` is its errno or error_code as text; the message says why
    and what to do."""

    def __init__(self, number: str, words: str) -> None:
        super().__init__(number, words)
        self.number = number

    def __str__(self) -> str:
        advice = _API_ADVICE.get(self.number, "see the platform's page on the send API")
        return f"the send API answered {self.number} ({self.args[1]}): {advice}"


class NoAnswer(OSError):
    """A request was sent in full, and no answer came, or a broken one: the server may have done what it asks."""


def run_within(seconds: float, function: Callable[[], object]) -> None:
    """Call what cannot be interrupted, like the look-up of a name, on a thread of its own. Raises what it raises, and
    TimeoutError after ``seconds``: the function may then still be running."""
    ended: List[Any] = []
    thread = threading.Thread(target=lambda: ended.append(attempt(function)), name="kfserver-wait", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # there are no more threads; Python 3.12 and later start none at exit
        ended.append(attempt(function))
    else:
        thread.join(seconds)
    if not ended:
        raise TimeoutError("no answer in time")
    if ended[0]:
        raise ended.pop()  # nothing here keeps it: it refers to these frames, and would keep itself alive


class HttpClient:
    """HTTP with the one server at ``base``, on connections that are kept: as many as requests are under way at once.

    ``base`` is http://… or https://…, perhaps with a path. ``timeout`` is the seconds for one exchange, from the
    look-up of the name to the last byte. ``tls`` is for https, instead of the default. ``proxy`` is what `find_proxy`
    gives.
    """

    def __init__(self, base: str, timeout: float, tls: Optional[ssl.SSLContext] = None, proxy: str = "") -> None:
        self.base, self.timeout = base, timeout
        self._server, self._proxy = urlsplit(base), urlsplit(proxy)
        self._tls = (tls or ssl.create_default_context()) if self._server.scheme == "https" else None
        self._kept: List[_Connection] = []
        self._closed = False

    def exchange(self, method: str, path: str, body: bytes = b"", kind: str = "") -> Tuple[int, bytes]:
        """One request, with a body of that Content-Type or without, and its answer: the status and the body, cut at
        MAX_ANSWER. Raises `NoAnswer` if the server may have the request, else OSError, HTTPException or ValueError."""
        connection = self._take_kept() or _Connection(self._server, self._tls, self._proxy)
        connection.ends = time.monotonic() + self.timeout
        try:
            answer = connection.ask(method, self._server.path.rstrip("/") + path, body,
                                    {"Content-Type": kind} if body else {})
        except BaseException:
            connection.ends = 0.0
            connection.close()
            raise
        if connection.sock:
            self._kept.append(connection)
        if self._closed:
            self.close()
        return answer

    def _take_kept(self) -> Optional[_Connection]:
        """A kept connection, until its last exchange should have ended: servers close theirs after 5 s or more, and a
        request must not meet that. Anything that the server sends unasked means that it closes."""
        with contextlib.suppress(IndexError):
            while True:
                connection = self._kept.pop()
                if time.monotonic() < connection.ends and not _is_readable(connection.sock):
                    return connection
                connection.close()
        return None

    def close(self) -> None:
        """Close the connections that are kept, and those in use when they are free."""
        self._closed = True
        with contextlib.suppress(IndexError):  # two threads may be here
            while True:
                self._kept.pop().close()


class _Connection(http.client.HTTPConnection):
    """A connection whose exchange has an end: ``ends``, of time.monotonic. What waits longer raises TimeoutError."""

    def __init__(self, base: SplitResult, tls: Optional[ssl.SSLContext], proxy: SplitResult) -> None:
        self._tls, self._name, self.ends = tls, base.hostname, 0.0
        self._answer: Callable[[], Optional[http.client.HTTPResponse]] = lambda: None  # the last one, while it is used
        self.default_port = 443 if tls else 80  # which the Host header need not name
        super().__init__((proxy.netloc or base.netloc).rpartition("@")[2])
        if proxy.netloc:
            login = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()  # RFC 7617
            self.set_tunnel(base.netloc, headers={
                "Proxy-Authorization": "Basic " + base64.b64encode(login).decode()} if proxy.username else {})

    def _left(self) -> float:
        """Seconds until the end. Raises TimeoutError."""
        seconds = self.ends - time.monotonic()
        if seconds <= 0:
            raise TimeoutError("no answer in time")
        return seconds

    def connect(self) -> None:
        """Connect, through the proxy and with TLS if need be. Raises OSError or ValueError."""
        run_within(self._left(), self._connect)

    def _connect(self) -> None:
        try:
            self.timeout = self._left()
            super().connect()
            if self._tls:
                self.sock.settimeout(self._left())  # the library takes this for the handshake as a whole
                self.sock = self._tls.wrap_socket(self.sock, server_hostname=self._name)
        except BaseException:
            answer = self._answer()
            if answer:  # the proxy's: before Python 3.12 the library leaves its reader open, and so the socket
                answer.close()
            raise
        finally:
            if not self.ends:  # too late: nobody waits for it any more
                self.close()

    def ask(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> Tuple[int, bytes]:
        """One request and its answer. Closes the connection if it cannot be used again. Raises as `exchange` does."""
        if self.sock is None:
            self.connect()
        self.request(method, path, body or None, headers)
        try:
            with self.getresponse() as response:
                answer = response.read(MAX_ANSWER)
                if response.length and len(answer) < MAX_ANSWER:
                    raise http.client.IncompleteRead(answer, response.length)
                if response.will_close or not response.isclosed():
                    self.close()
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise NoAnswer(str(error) or type(error).__name__) from error
        return response.status, answer

    def send(self, data: Any) -> None:
        """Send bytes, which http.client calls."""
        self.sock.settimeout(self._left())
        super().send(data)

    def response_class(  # type: ignore[override]  # a class there, which is called in the same way
            self, sock: socket.socket, *arguments: Any, **options: Any) -> http.client.HTTPResponse:
        """The reader of an answer, which http.client calls."""
        response = http.client.HTTPResponse(sock, *arguments, **options)
        self._answer = weakref.ref(response)
        # The time limit of a socket starts anew with each byte: without this, one byte a second would never end.
        response.fp.raw.readinto = functools.partial(self._receive, sock)  # type: ignore[method-assign]
        return response

    def _receive(self, sock: socket.socket, buffer: Any) -> int:
        sock.settimeout(self._left())
        return sock.recv_into(buffer)


def _is_readable(connection: socket.socket) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(0))


def find_proxy(base: str) -> str:
    """The address of the proxy to an https server, as the standard library finds it: HTTPS_PROXY, NO_PROXY or the
    system's own; empty for none. Raises `SettingsError`, without the address, which can hold a password."""
    from urllib.request import getproxies, proxy_bypass  # costs 0.2 MiB, so only who sends imports it
    parts, proxy = urlsplit(base), getproxies().get("https", "")
    if not proxy or parts.scheme != "https" or proxy_bypass(parts.netloc):
        return ""
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not _is_base(re.sub("//[^/?#@]*@", "//", proxy)):
        raise SettingsError("HTTPS_PROXY takes the address of an HTTP proxy, as http://proxy:3128")
    return proxy


class SendApi:
    """The platform's send API. Safe to use from any thread. A call takes one exchange and, at times, one or two more
    for a new token, each within ``timeout`` seconds; it never sleeps. ``timer`` gives seconds that never jump.

    What the sending methods raise says what can be done next. `ApiError`: the platform refuses, and would again.
    `NetworkError`: the user does not have the reply, and it can be sent again later. Another `ReplyError`: the user may
    have it. Raises `SettingsError` for a file of the access token that cannot be read, or a proxy that cannot be used.
    """

    def __init__(self, settings: Settings, timer: Callable[[], float] = time.monotonic,
                 timeout: float = SEND_TIMEOUT) -> None:
        self._settings, self._timer = settings, timer
        self._client = HttpClient(settings.api_base, timeout, proxy=find_proxy(settings.api_base))
        self._lock = threading.Lock()  # guards the two below
        self._failures, self._next_probe = 0, 0.0  # failures in a row; when an API that is away may be tried
        self._token_lock = threading.Lock()  # guards all below; its holder gets a token for all who wait
        self._token, self._attempts = "", 0  # attempts to get a token that have ended
        self._failure: Optional[Tuple[Type[ReplyError], Tuple[str, ...]]] = None  # of the last of them
        # Of the next token. The end of a token is not looked at: the API tells when it has expired.
        self._source: Optional[Callable[[], str]] = functools.partial(self._ask, {
            "grant_type": "client_credentials", "client_id": settings.app_key, "client_secret": settings.app_secret,
            "scope": "smartapp_snsapi_base"})
        given: Any = settings.access_token
        if isinstance(given, str) and given.startswith("@"):
            given = functools.partial(read_token, given[1:])
            self._token = given()
        if callable(given):
            self._source = functools.partial(self._call_for_token, given)
        elif given:
            self._token, self._source = given, None

    def send(self, open_id: str, answer: Answer) -> None:
        """Send what a handler returns to the user."""
        with self._lock:
            if self.pause():
                raise NetworkError("the send API counts as away, and another reply is tried first")
            self._next_probe = self._timer() + PROBE_SECONDS
        error = attempt(self._send, open_id, Text(answer) if isinstance(answer, str) else answer)
        # With an ApiError the API is there, and refuses.
        self._note("" if error is None or isinstance(error, ApiError) else describe_error(error))
        if error:
            raise error

    def send_text(self, open_id: str, text: str, user_type: int = 0) -> None:
        """Send a text to the user. ``user_type`` is 1 or 2; 0 means that of the settings."""
        self.send(open_id, Text(text, user_type))

    def send_image(self, open_id: str, url: str, user_type: int = 0) -> None:
        """Send the picture at ``url`` to the user."""
        self.send(open_id, Image(url, user_type))

    def pause(self) -> float:
        """Seconds until a reply may be tried, because the API counts as away; 0 for now."""
        return max(0.0, self._next_probe - self._timer()) if self.is_away() else 0.0

    def is_away(self) -> bool:
        """Whether the API counts as away, after too many failures in a row."""
        return self._failures >= AWAY_AFTER

    def close(self) -> None:
        """Close the connections that are kept."""
        self._client.close()

    def _note(self, problem: str) -> None:
        """A try has ended: well if ``problem`` is empty, else because of that."""
        with self._lock:
            before, self._failures = self._failures, self._failures + 1 if problem else 0
            self._next_probe = self._timer() + PROBE_SECONDS
        if problem and before == AWAY_AFTER - 1:
            log.warning("the send API counts as away after %d failures in a row, the last one: %s; replies wait, and "
                        "one at a time is tried", AWAY_AFTER, problem)
        elif before >= AWAY_AFTER and not problem:
            log.warning("the send API is back")

    def _send(self, open_id: str, answer: Union[Text, Image]) -> None:
        kind, text, url = ("image", "", answer.url) if isinstance(answer, Image) else ("text", answer.content, "")
        form = {"user_type": answer.user_type or self._settings.user_type, "open_id": open_id, "msg_type": kind,
                "content": text, "pic_url": url}
        token = self._get_token("")
        try:
            self._ask(form, token)
            return
        except ApiError as error:
            if error.number not in _TOKEN_ERRORS or not self._source:
                raise
        newer = self._get_token(token)
        if newer == token:
            raise NetworkError("the access token has expired, and there is no other one yet")
        self._ask(form, newer)

    def _get_token(self, refused: str) -> str:
        """A token that is not the refused one, if there is another. Threads that come while a thread gets one share
        what comes of it, a failure too."""
        seen = self._attempts
        with self._token_lock:
            if self._token == refused and self._source and self._attempts == seen:
                self._failure = None
                try:
                    self._token = self._source()
                except ReplyError as error:
                    self._failure = type(error), error.args
                self._attempts += 1
            if self._failure and self._token == refused:
                raise self._failure[0](*self._failure[1])  # each thread gets an error of its own
            return self._token

    def _call_for_token(self, function: Callable[[], str]) -> str:
        tokens: List[object] = []
        error = attempt(run_within, self._client.timeout, lambda: tokens.append(function()))
        if error or not (isinstance(tokens[0], str) and tokens[0]):
            problem = describe_error(error) if error else "Settings(access_token=function) returned no text"
            raise NetworkError(f"no access token: {problem}")
        return str(tokens[0])

    def _ask(self, form: Mapping[str, object], token: str = "") -> str:
        """Send a reply with the token or, without one, ask for a token, which is returned. By POST: in a URL the secret
        would reach the logs of servers and proxies. Raises as `send` does."""
        send_path = THIRD_PARTY_SEND_PATH if self._settings.third_party else SEND_PATH
        path = f"{send_path}?{urlencode({'access_token': token})}" if token else TOKEN_PATH
        kind: Type[ReplyError] = ReplyError if token else NetworkError
        status, answer, problem = 0, {}, ""
        try:
            status, text = self._client.exchange("POST", path, urlencode(form, errors="replace").encode(),
                                                 "application/x-www-form-urlencoded")
            answer = parse_fields(text if text.lstrip().startswith(b"{") else b"")
        except MalformedPush:
            problem = f"answered no JSON object (status {status})"
        except NoAnswer as error:
            problem = f"did not answer ({_explain(error.__cause__)})"
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a name that cannot be encoded
            problem, kind = f"cannot be reached ({self._clean(_explain(error))})", NetworkError
        if status >= 500 or status == 429:
            problem, kind = f"is out of order (status {status})", NetworkError
        elif status >= 400:
            problem = ""  # its number says more
        elif status >= 300:
            problem, kind = f"redirects (status {status}), which is not followed: correct --api-base", NetworkError
        if problem:
            advice = "" if kind is NetworkError else "; the reply may have arrived, so it is not sent again"
            raise kind(f"the send API {problem}{advice}")
        return self._judge(status, answer, token)

    def _judge(self, status: int, answer: Mapping[str, Any], token: str) -> str:
        """What the platform's answer brings: a token, or for a reply the 0 that says that it was taken."""
        for field, words in _ERROR_FIELDS:
            number, text = self._clean(answer.get(field) or "", token), self._clean(answer.get(words) or "", token)
            if number in _BUSY_ERRORS:
                raise NetworkError(f"the send API is busy: it answered {number} ({text})")
            if number not in ("", "0"):
                raise ApiError(number, text)
        name = "errno" if token else "access_token"
        if status >= 400 or not answer.get(name):
            raise ApiError(f"status {status}" if status >= 400 else f"no {name}", "")
        return str(answer[name])

    def _clean(self, words: object, token: str = "") -> str:
        """Words of the platform, fit for a log: without secrets, short, and in one line."""
        text = str(words)
        for secret in (token, self._token, self._settings.app_secret, self._settings.app_key):
            text = text.replace(secret, "…") if secret else text
        return printable(" ".join(text[:200].split()))


def _explain(error: Optional[BaseException]) -> str:
    """The error's kind, and its text unless that may quote what a server wrote."""
    return type(error).__name__ + (f": {error}" if isinstance(error, OSError) else "")


def read_token(path: str) -> str:
    """The access token that a file holds. Raises `SettingsError`."""
    problem: Optional[str] = "it must hold one word"
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            token = file.read(MAX_ANSWER).strip()
        if re.fullmatch("[!-~]+", token):
            return token
    except OSError as error:
        problem = error.strerror
    raise SettingsError(f"{setting_names('access_token')} cannot use its file: {problem}")


def list_answers(answers: Answers) -> List[Answer]:
    """What a handler returned, as a list without empty texts. Raises `HandlerError` for what cannot be sent."""
    given: Any = answers if type(answers) in (list, tuple) else (answers,)
    listed: List[Answer] = []
    for answer in given:
        if isinstance(answer, (Text, Image)) and isinstance(answer[0], str):
            if answer.user_type not in (0, 1, 2) or isinstance(answer.user_type, bool):
                raise HandlerError(f"user_type is 1 (guest) or 2 (Baidu account), not {answer.user_type!r}")
        elif not (answer is None or isinstance(answer, str)):
            raise HandlerError("a handler returns None, a text, Image(url), Text(content) or a list of these, "
                               f"not {type(answer).__name__}")
        if answer and (isinstance(answer, Image) or answer[0]):
            listed.append(answer)
    return listed


def encode_replies(answers: Iterable[Answer]) -> str:
    """Answers as JSON, for the journal."""
    return json.dumps([answer if isinstance(answer, str) else [type(answer).__name__, *answer] for answer in answers])


def decode_replies(text: str) -> List[Answer]:
    """What `encode_replies` was given. Raises ValueError for any other text."""
    kinds: Mapping[object, Any] = {"Text": Text, "Image": Image}
    try:
        return list_answers([each if isinstance(each, str) else kinds[each[0]](*each[1:]) for each in json.loads(text)])
    except (LookupError, TypeError, HandlerError) as error:
        raise ValueError("not the replies of a message") from error


def retry_delay(tries: int, random: Callable[[], float] = random.random) -> float:
    """Seconds from a reply's try number ``tries`` to the next, shortened at random by up to half, so that many replies
    do not come back in step. ``random`` gives a number from 0 to 1."""
    return RETRY_REPLY_DELAYS[min(tries, len(RETRY_REPLY_DELAYS)) - 1] * (1 - random() / 2)


class Outbox:
    """The way back to the sender of one message: in order, and never more than QUOTA replies however they are made.

    ``count`` is told what became of each, by its name in the metrics.
    """

    def __init__(self, api: Optional[SendApi], message: Message, count: Callable[[str], object] = len) -> None:
        self._api, self._count, self._left = api, count, QUOTA
        # The message itself is not kept: each would hold the other, until the garbage collector comes by.
        self._openid, self._key = message.from_user_name, message.key

    def __call__(self, answers: Answers) -> None:
        """Send the answers, one after the other, each in one try. Raises as `check` and `send` do."""
        try:
            for answer in self.check(answers):
                self.send(answer)
        except ReplyError:
            self._count("replies_failed")
            raise

    def check(self, answers: Answers) -> List[Answer]:
        """The answers as a list. Raises `HandlerError` for what cannot be sent, and then nothing is sent."""
        listed = list_answers(answers)
        if len(listed) > self._left:
            raise HandlerError(f"the platform takes {QUOTA} replies to one message, and there are more: join some")
        if listed and not self._openid:
            raise HandlerError("this message has no sender to reply to (a platform's event): return None for it")
        return listed

    def send(self, answer: Answer) -> None:
        """Send one answer, in one try. Raises as `SendApi` does; then none of the later answers may overtake it."""
        self._left -= 1
        if self._api is None:
            log.warning("reply not sent: key=%s; set --app-key and --app-secret, or --access-token", self._key)
            return
        self._api.send(self._openid, answer)
        self._count("replies_sent")


# ---- 13 Dispatcher --------------------------------------------------------------------------------------------------
# Law: when and on which thread something runs, never what: a sender's messages one at a time and in order, different
# senders beside each other. Threads here are daemons: the process decides when it ends.

# Seconds that a thread without work is kept.
KEEP_THREAD = 5.0
# Seconds after which a worker that has run out of work looks once more before it waits to be called. To call a thread
# costs more than to handle a message: when one comes after the other, those of a millisecond share a call.
LOOK_SECONDS = 0.001


def call_later(seconds: float, job: Callable[[], None]) -> None:
    """Run ``job`` once, ``seconds`` from now, on a thread of its own; not at all if no thread can be had."""
    timer = threading.Timer(seconds, Teller(time.monotonic).guard, (job,))
    timer.name, timer.daemon = "kfserver-timer", True
    with contextlib.suppress(RuntimeError):
        timer.start()


class Job:
    """A message from its push until it is done, and how far it has come."""

    tries = 0  # how often its handler has failed
    since = 0.0  # when it came, by the dispatcher's timer
    pause: Optional[float] = None  # after how many seconds it is to be handled again; None: it is done
    match: Optional[Match] = None  # the handler that it went to
    seconds = 0.0  # how long the handler's last run took
    session: Optional[Session] = None  # what the journal must write of it
    replies: Optional[List[Answer]] = None  # what is still to be sent; None until the handler is done
    sent = 0  # replies
    reply_tries = 0  # how often the next reply has failed, and since when
    failing_since = 0.0
    is_leftover = False  # whether it is a message of the last run
    is_suspect = False  # whether it may have ended that run
    is_settled = False
    error: Optional[BaseException] = None  # why it must not be handled again

    def __init__(self, message: Message) -> None:
        self.message = message
        self.sender = message.to_user_name, message.from_user_name


Mailbox = Deque[Job]  # the messages of one sender, the first of them next or in hand


class Mailboxes:
    """The messages that are not done, by sender. A mailbox is ready, taken, or waits until it is due; an empty one is
    dropped. ``limit`` is how many may be taken at a time: one while there are suspects, which come first, else
    ``workers``. ``timer`` gives seconds from anywhere. Not safe to use from several threads."""

    def __init__(self, workers: int, timer: Callable[[], float]) -> None:
        self.limit, self._workers, self._timer = workers, workers, timer
        self._suspects = 0  # mailboxes that begin with one
        self._all: Dict[Tuple[str, str], Mailbox] = {}
        self._ready: Deque[Mailbox] = deque()
        self._due: List[Tuple[float, int, Mailbox]] = []  # a heap; the number keeps the order of equal times
        self._count = itertools.count()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Job]:
        return itertools.chain.from_iterable(self._all.values())

    def add(self, job: Job) -> None:
        """Put a message after the others of its sender."""
        job.since = self._timer()
        mailbox = self._all.get(job.sender)
        if mailbox:
            mailbox.append(job)
        else:
            mailbox = self._all[job.sender] = deque((job,))
            self._ready.append(mailbox)

    def put_suspects_first(self) -> None:
        """Sort the ready mailboxes: first those that begin with a suspect."""
        self._ready = deque(sorted(self._ready, key=lambda mailbox: not mailbox[0].is_suspect))
        self._suspects = sum(mailbox[0].is_suspect for mailbox in self._ready)
        self.limit = 1 if self._suspects else self._workers

    def are_ready(self) -> bool:
        """Whether there is a mailbox to take: one that was ready, or one that is due by now."""
        while self._due and self._due[0][0] <= self._timer():
            self._ready.append(heapq.heappop(self._due)[2])
        return bool(self._ready)

    def next_due(self) -> Optional[float]:
        """When the next one is due, by the timer; None if none waits."""
        return self._due[0][0] if self._due else None

    def take(self) -> Mailbox:
        """The mailbox that has been ready for longest."""
        return self._ready.popleft()

    def put_back(self, mailbox: Mailbox) -> bool:
        """A mailbox that was taken waits if its first message has a ``pause``, else that is done; whether it is."""
        job = mailbox[0]
        if self._suspects:
            self._suspects -= 1
            self.limit = 1 if self._suspects else self._workers
        if job.pause is not None:
            heapq.heappush(self._due, (self._timer() + job.pause, next(self._count), mailbox))
            job.pause = None
            return False
        mailbox.popleft()
        if mailbox:
            self._ready.append(mailbox)
        else:
            del self._all[job.sender]
        return True


class Dispatcher:
    """Has each message handled, on up to ``settings.workers`` threads.

    ``handle`` gets a job and does what is next for it: it must `settle` the job, or set its ``pause``. ``flush`` is
    called after one or more are settled. ``timer`` gives seconds from anywhere.
    """

    def __init__(self, settings: Settings, handle: Callable[[Job], object], flush: Callable[[], None],
                 timer: Callable[[], float] = time.monotonic) -> None:
        self._settings, self._handle, self._flush, self._timer = settings, handle, flush, timer
        self._guard = Teller(timer).guard
        self._lock = threading.Lock()  # guards all below
        self._wanted = threading.Condition(self._lock)  # tells spare workers of a call, or of what will be due
        self._changed = threading.Condition(self._lock)  # tells that nothing is left to do, or that threads are short
        self._mailboxes = Mailboxes(settings.workers, timer)
        self._open = 0  # messages taken and not done
        self._busy = self._spare = 0  # workers that are called or at work, and those that wait for a call
        self._called = False  # whether a worker is called and not yet there
        self._looking = 0  # spare workers that look for themselves in a moment
        self._unflushed = 0  # messages that were settled since the last flush began
        self._short = False  # whether the system refused the last thread
        self._closed = False  # whether nothing more is taken
        self.has_ended = False  # whether nothing more is begun; read without the lock

    def reserve(self) -> None:
        """Keep a place in the queue for a message that `post` will bring, or `cancel` will not. Raises `Busy`."""
        with self._lock:
            if self._closed:
                raise Busy("shutting down")
            if self._is_full():
                raise Busy("the queue is full", "handlers are slower than messages come: raise --workers or "
                           "--queue-size, or make the handlers faster")
            self._open += 1

    def _is_full(self) -> bool:
        return self._open - self._busy >= self._settings.queue_size

    def cancel(self) -> None:
        """Give a reserved place back."""
        with self._lock:
            self._open -= 1

    def post(self, messages: Iterable[Message]) -> None:
        """Take messages into the places that were reserved for them."""
        with self._lock:
            for message in messages:
                self._mailboxes.add(Job(message))
            self._call_worker()

    def restore(self, jobs: Sequence[Job]) -> None:
        """Take what was accepted before a restart, oldest first, also when the queue is full; `wake` begins it.
        Suspects that are their sender's first message are handled alone, and before all others."""
        with self._lock:
            self._open += len(jobs)
            for job in jobs:
                self._mailboxes.add(job)
            self._mailboxes.put_suspects_first()

    def wake(self) -> None:
        """Call a worker if there is something to do: what was restored, or what waited when threads were short."""
        with self._lock:
            self._call_worker()

    def _call_worker(self) -> None:
        """See to it that a worker comes for what is ready, and that one waits for what will be due. One is called at a
        time, and calls the next when it has taken a mailbox: under load it finds many, where a call for each would be a
        change of threads for each."""
        if self._called or self._busy >= self._mailboxes.limit or self.has_ended:
            return
        if self._looking and not self._is_full():
            return
        is_ready = self._mailboxes.are_ready()
        if not is_ready and self._mailboxes.next_due() is None:
            return
        if not self._spare and not self._start_thread():
            return
        if is_ready:
            self._called = True
            self._busy += 1
        self._wanted.notify()

    def _start_thread(self) -> bool:
        try:
            threading.Thread(target=self._work, name="kfserver-worker", daemon=True).start()
        except RuntimeError as error:  # the system has no more; the threads that run go on
            if not (self._short or self._closed):
                log.error("no thread for a worker: %s; lower --workers, or raise the limit of threads", error)
            self._short = True
            self._changed.notify_all()
            return False
        self._short = False
        self._spare += 1
        return True

    def _work(self) -> None:
        """A worker's life: to handle what is ready when it is called, and what has come a moment later."""
        while self._await_call():
            self._handle_ready()
            while self._look_again():
                self._handle_ready()

    def _handle_ready(self) -> None:
        """Have one message of each mailbox that is ready handled."""
        mailbox = self._take_mailbox(None)
        while mailbox:
            self._guard(self._handle, mailbox[0])
            mailbox = self._take_mailbox(mailbox)

    def _await_call(self) -> bool:
        """Wait to be called; False when the thread may leave, because it was not needed for a while, or because the end
        has come. While something will be due, one thread stays."""
        with self._lock:
            leave_at = self._timer() + KEEP_THREAD
            while not self._called:
                if self._has_work():
                    self._called = True
                    self._busy += 1
                    break
                now, due = self._timer(), self._mailboxes.next_due()
                if self.has_ended or (now >= leave_at and (due is None or self._spare > 1)):
                    self._spare -= 1
                    return False
                until = leave_at if due is None or now < leave_at <= due else due
                self._wanted.wait(max(0.0, until - now))
            self._called = False
            self._spare -= 1
            return True

    def _look_again(self) -> bool:
        """Wait a moment, and see whether something has come, unless another worker is called; if not, flush."""
        with self._lock:
            self._looking += 1
            self._wanted.wait(LOOK_SECONDS)
            self._looking -= 1
            if self._has_work() and not self._called:
                self._busy += 1
                self._spare -= 1
                return True
            must_flush, self._unflushed = self._unflushed > 0, 0
        if must_flush:
            self._guard(self._flush)
        return False

    def _has_work(self) -> bool:
        return self._mailboxes.are_ready() and self._busy < self._mailboxes.limit and not self.has_ended

    def _take_mailbox(self, served: Optional[Mailbox]) -> Optional[Mailbox]:
        """Put back the mailbox that was served; the one to serve next.

        What is settled is flushed before, unless another worker, or this one, will come in a moment and flush: so
        messages with quick handlers share a write, and no more messages than there are workers can be in hand, or
        settled and not flushed.
        """
        with self._lock:
            if served:
                self._put_back(served)
            mailbox = self._mailboxes.take() if self._mailboxes.are_ready() and not self.has_ended else None
            if mailbox:
                self._call_worker()
            else:
                self._busy -= 1
                self._spare += 1
            somebody_comes = self._called or self._looking or not mailbox
            if somebody_comes and self._busy + self._unflushed < self._mailboxes.limit:
                return mailbox
            self._unflushed = 0
        self._guard(self._flush)
        return mailbox

    def _put_back(self, mailbox: Mailbox) -> None:
        if not self._mailboxes.put_back(mailbox):
            self._wanted.notify()  # a spare worker may have to wait less long now
            return
        self._open -= 1
        if not self._mailboxes:
            self._changed.notify_all()

    def settle(self, job: Job, mark: Callable[..., None], *arguments: Any) -> bool:
        """Call ``mark``, which must not wait, to note what became of the job. False, and no call, if the end has come
        first: then `drain` has told that the job was left undone."""
        with self._lock:
            if self.has_ended:
                return False
            mark(*arguments)
            job.is_settled = True
            self._unflushed += 1
            return True

    def note_flush(self) -> None:
        """The caller is about to flush what is settled."""
        with self._lock:
            self._unflushed = 0

    def join(self, seconds: Optional[float] = None) -> bool:
        """Wait until nothing is left to do, ``seconds`` at most; whether that was reached. When no thread can be had,
        as at the exit of an interpreter from 3.12 on, the calling thread works itself."""
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        while True:
            with self._lock:
                self._call_worker()
                left = deadline - time.monotonic()
                if not self._mailboxes or left <= 0:
                    return not self._mailboxes
                is_needed = self._short and self._has_work()
                if is_needed:
                    self._busy += 1
                    mailbox = self._mailboxes.take()
                else:  # when threads are short, nobody else looks for what is due
                    self._changed.wait(min(left, 0.05 if self._short else 1.0))
            if is_needed:
                self._guard(self._handle, mailbox[0])
                self._guard(self._flush)
                with self._lock:
                    self._put_back(mailbox)
                    self._busy -= 1

    def drain(self, seconds: float) -> List[str]:
        """Take no more messages, finish those that wait, within ``seconds``; the keys of what was left undone. After
        that nothing is begun, and nothing that is still in a handler can be settled."""
        with self._lock:
            self._closed = True
        self.join(seconds)
        with self._lock:
            self.has_ended = True
            self._wanted.notify_all()
        return [job.message.key for job in self.jobs()]

    def jobs(self) -> List[Job]:
        """All that is not settled, each sender's in order."""
        with self._lock:
            return [job for job in self._mailboxes if not job.is_settled]

    def state(self) -> Dict[str, float]:
        """How much there is to do, as METRICS names it."""
        with self._lock:
            waited = max((self._timer() - job.since for job in self._mailboxes), default=0.0)
            return {"queue_messages": max(0, self._open - self._busy), "busy_workers": self._busy,
                    "oldest_seconds": waited}


# ---- 14 Inbox -------------------------------------------------------------------------------------------------------
# Law: the way of a message from its push until it is done, and what is remembered of it: claims, journal, dispatcher,
# handlers, conversations, replies. Knows nothing of HTTP.

# Seconds until a journal that could not be opened, because another process has it for example, is tried again.
OPEN_AGAIN_SECONDS = 3.0
# Seconds at most between two tries of a handler.
LONGEST_PAUSE = 3600.0


def make_key(function: Callable[[Message], str], message: Message) -> str:
    """The key that a user's own function makes, fit for a log. Raises `Busy` if it fails, or if it makes no text."""
    keys: List[str] = []
    error = attempt(lambda: keys.append(safe_key(function(message).encode().decode())))
    if error:
        log.error("dedup_key failed: the push is answered 503; correct the function", exc_info=exc_info_of(error))
        raise Busy("the message has no key")
    return keys[0]


def name_of_handler(job: Job) -> str:
    """The name of the handler that a message went to; a dash if there is none."""
    return handler_name(job.match.handler) if job.match else "-"


def state_of(part: Any) -> str:
    """The state of what can be away, such as Redis, for the page: off if there is no such part."""
    return "off" if part is None else "away" if part.is_away() else "ok"


def restore_job(row: Row, tries: int) -> Job:
    """The job of a message that the last run left, of which a handler has ``tries``. Raises `PushError` if it cannot be
    read."""
    job = Job(parse(row.payload))
    job.message.key, job.tries, job.is_leftover, job.is_suspect = row.key, row.tries + row.begun, True, row.begun
    if row.replies:
        job.replies = decode_replies(row.replies)
    elif row.begun and job.tries >= tries:
        job.error = HandlerError(f"the process ended while this message was handled, at try {job.tries}; correct the "
                                 "handler, then put the message back with 'journal --requeue'")
    return job


def mark_suspects(jobs: Iterable[Job], workers: int) -> None:
    """Mark what may have been in hand when the process ended: at most the first message of a sender, and of as many
    senders as there are workers. What waits for its replies was not in a handler."""
    first: Dict[Tuple[str, str], Job] = {}
    for job in jobs:
        first.setdefault(job.sender, job)
    for job in itertools.islice(first.values(), workers):
        job.is_suspect = job.replies is None


def end_fork(error: Optional[BaseException]) -> NoReturn:
    """End a process that a handler has forked and that came back from it with ``error``: the queue is its parent's."""
    if error and not isinstance(error, SystemExit):
        traceback.print_exception(type(error), error, error.__traceback__)
    attempt(sys.stdout.flush)
    code = error.code or 0 if isinstance(error, SystemExit) else error is not None
    os._exit(code if isinstance(code, int) else 1)


class Conversations:
    """What `Message.session` held at the end of each sender's last message, as JSON: in ``shared``, where there is one,
    else in memory, for ``limit`` senders. The one that was not touched for longest is forgotten first. Safe to use from
    any thread."""

    def __init__(self, limit: int, shared: Optional[SharedClaims] = None,
                 clock: Callable[[], float] = time.time) -> None:
        self._limit, self._shared, self._clock = limit, shared, clock
        self._lock = threading.Lock()  # guards the texts
        self._texts: OrderedDict[str, Tuple[str, float]] = OrderedDict()  # and when each was touched; oldest first

    def load(self, sender: Tuple[str, str]) -> Dict[str, Any]:
        """The session of an app's sender: a new dict. Raises ConnectionError."""
        name = json.dumps(sender)
        if self._shared is not None:
            text = self._shared.load_session(name)
        else:
            text, touched = self._texts.get(name, ("", 0.0))
            text = text if self._clock() - touched < SESSION_SECONDS else ""
        session: Dict[str, Any] = json.loads(text) if text else {}
        return session

    def save(self, sender: Tuple[str, str], session: Dict[str, Any]) -> Optional[Session]:
        """Keep a session; what a journal must write of it. Raises `HandlerError` for what JSON has not, and
        ConnectionError."""
        name, text = json.dumps(sender), encode_session(session)
        if self._shared is not None:
            self._shared.save_session(name, text)
            return None
        self.restore(name, text, self._clock())
        return name, text

    def restore(self, name: str, text: str, touched: float) -> None:
        """Keep a text that was touched at that time; an empty one is forgotten."""
        with self._lock:
            self._texts.pop(name, None)
            if text:
                self._texts[name] = text, touched
            if len(self._texts) > self._limit:
                self._texts.popitem(last=False)


class Handling:
    """The way of a message from the queue until it is done, on a worker's thread: its handler, its replies, and what is
    noted of it. ``journal`` is None until it is opened, or if there is none. ``api`` is a `SendApi` or what works like
    one; None: what handlers return is not sent.
    """

    def __init__(self, registry: HandlerRegistry, settings: Settings, claims: ClaimCache, api: Any) -> None:
        self.registry, self.metrics = registry, Metrics()
        self.journal: Optional[Journal] = None
        self.dispatcher = Dispatcher(settings, self.handle, self.flush)
        self.conversations = Conversations(settings.sessions, claims if isinstance(claims, SharedClaims) else None)
        self._settings, self._claims, self._api = settings, claims, api
        self.is_forked = False  # whether this is a child of the process that the queue belongs to

    def handle(self, job: Job) -> None:
        """Do what is next for a message. It is settled then, or has a ``pause``."""
        if job.error:
            self._give_up(job, job.error)
        elif job.replies is None:
            self._run(job)
        elif job.replies:
            self._send_replies(job)
        else:
            self._finish(job)

    def _run(self, job: Job) -> None:
        """Run the handler, and go on with what it has returned."""
        # Or a message that ends the process would be run at every start. A run alone counts as a try.
        if job.is_leftover and self.journal and attempt(
                self.journal.begin, job.message.key, job.tries + job.is_suspect):
            job.pause = LOOK_AGAIN_SECONDS
            return
        started = time.monotonic()
        error = attempt(self._call_handler, job)
        if self.is_forked:
            end_fork(error)
        job.seconds = time.monotonic() - started
        if self._settings.admin:
            self.metrics.handler(name_of_handler(job), job.seconds, error)
        if error:
            self._fail(job, error)
        elif job.replies:
            self._send_replies(job)
        else:
            self._finish(job)

    def _call_handler(self, job: Job) -> None:
        """Run the handler; keep in the job what is to be sent, and in the conversations what is to be remembered."""
        message = job.message
        message.inbox, message.kept_session = self, None
        job.match = self.registry.find(message)
        returned = self.registry.run(job.match, message)
        answers = [] if returned is None else self.open_outbox(message).check(returned)
        if message.kept_session is not None:  # the handler has used it
            job.session = self.conversations.save(job.sender, message.kept_session)
        if answers and self.journal:
            # In one write with the mark that the handler has run: after a crash it is not run again.
            self.journal.answered(message.key, encode_replies(answers), job.session)
            self.journal.flush()
            job.session = None
        job.replies = answers

    def load_session(self, message: Message) -> Dict[str, Any]:
        """What the message's sender has in the conversations. Raises ConnectionError."""
        return self.conversations.load((message.to_user_name, message.from_user_name))

    def open_outbox(self, message: Message) -> Outbox:
        """The way back to the message's sender, which is made at its first use."""
        if not isinstance(message.outbox, Outbox):
            message.outbox = Outbox(self._api, message, self.metrics.count)
        return message.outbox

    def _fail(self, job: Job, error: BaseException) -> None:
        """A run of the handler has failed: try again later, or give up."""
        job.is_suspect = False
        job.tries += 1
        is_final = isinstance(error, KfError) and not isinstance(error, PatternError)
        if job.tries < self._settings.tries and not is_final:
            self._try_again(job, error)
        else:
            self._give_up(job, error)

    def _try_again(self, job: Job, error: BaseException) -> None:
        job.pause = min(4.0 ** (job.tries - 1), LONGEST_PAUSE)  # 1 s, 4 s, 16 s…: an outage needs time to end
        words = {**self._describe(job, error), "tries": self._settings.tries, "seconds": job.pause}
        log.warning("handler failed: key=%(key)s handler=%(handler)s try=%(try)d of %(tries)d, %(error)s; again in "
                    "%(seconds)d s", words, exc_info=exc_info_of(error) if log.isEnabledFor(logging.DEBUG) else None)
        self.metrics.count("handler_retries")
        if self._settings.admin:
            self._list(job, "retry", error)
        if self.journal:
            self.journal.tried(job.message.key, job.tries)
            self.journal.flush()

    def _send_replies(self, job: Job) -> None:
        """Send what the handler returned, one reply after the other. One that cannot be sent now waits, and no worker
        with it, RETRY_REPLY_SECONDS at most."""
        outbox = self.open_outbox(job.message)
        while job.replies:
            if self.dispatcher.has_ended:
                return
            error = attempt(outbox.send, job.replies[0])
            if error:
                self._fail_to_send(job, error)
                return
            job.failing_since, job.reply_tries = 0.0, 0
            job.sent += self._api is not None
            job.replies.pop(0)
            if job.replies and self.journal:
                self.journal.answered(job.message.key, encode_replies(job.replies))
        self._finish(job)

    def _fail_to_send(self, job: Job, error: BaseException) -> None:
        now = time.monotonic()
        job.failing_since = job.failing_since or now
        if isinstance(error, NetworkError) and now - job.failing_since < RETRY_REPLY_SECONDS:
            job.reply_tries += 1
            job.pause = float(self._api.pause()) + retry_delay(job.reply_tries)  # not all in the moment of the probe
        else:
            self.metrics.count("replies_failed")
            self._give_up(job, error)

    def _finish(self, job: Job) -> None:
        if self.dispatcher.settle(job, self._mark_done, job) and log.isEnabledFor(logging.INFO):
            log.info("handled key=%(key)s handler=%(handler)s ms=%(ms).2f replies=%(replies)d", {
                "key": job.message.key, "handler": name_of_handler(job),
                "ms": job.seconds * 1000, "replies": job.sent})

    def _mark_done(self, job: Job) -> None:
        if self._settings.admin:
            self._list(job, "handled")
        if self.journal:
            self.journal.finish(job.message.key, job.session)
        self._claims.finish(job.message.key)

    def _give_up(self, job: Job, error: BaseException) -> None:
        """The last try has failed, of the handler or of a reply: tell the functions of `on_error`."""
        if not self.dispatcher.settle(job, self._mark_failed, job, error):
            return
        self.flush()  # before what follows can end the process
        self.metrics.count("messages_failed")
        # An error of our own is told with the handler's name and line: its frames are kfserver's.
        is_ours = isinstance(error, KfError) and not log.isEnabledFor(logging.DEBUG)
        log.error("message failed for good: key=%(key)s handler=%(handler)s try=%(try)d, %(error)s; the platform will "
                  "not send it again by itself", self._describe(job, error),
                  exc_info=None if is_ours else exc_info_of(error))
        errors = self.registry.handle_error(job.message, error)
        if self.is_forked:
            end_fork(errors[0] if errors else None)
        for failed in errors:
            log.error("on_error failed: key=%(key)s error=%(error)s", {
                "key": job.message.key, "error": describe_error(failed)}, exc_info=exc_info_of(failed))

    def _mark_failed(self, job: Job, error: BaseException) -> None:
        if self._settings.admin:
            self._list(job, "failed", error)
        if self.journal:
            self.journal.fail(job.message.key, describe_error(error))
        if job.replies is None:
            self._claims.release(job.message.key)
        else:  # the handler is done: it must not run again, though a reply failed
            self._claims.finish(job.message.key)

    def _list(self, job: Job, outcome: str, error: Optional[BaseException] = None) -> None:
        self.metrics.message(time.time(), job.message.msg_type[:64], job.message.key, outcome, name_of_handler(job),
                             job.seconds * 1000, job.sent, type(error).__name__ if error else "")

    def _describe(self, job: Job, error: BaseException) -> Dict[str, Any]:
        handler = describe_handler(job.match.handler) if job.match else "-"
        return {"key": job.message.key, "handler": handler, "try": job.tries, "error": describe_error(error)}

    def flush(self) -> None:
        """Write what became of messages, if there is a journal."""
        if self.journal:
            self.journal.flush()


class Inbox:
    """Takes messages from an `Endpoint`, and has them handled.

    ``key_of`` makes deduplication keys; None: the registry's own, or `dedup_key`. ``api`` is that of a `Handling`.
    Files and threads are opened by `open`, or at the first message.
    """

    def __init__(self, registry: HandlerRegistry, settings: Settings, key_of: Optional[Callable[[Message], str]] = None,
                 api: Any = None) -> None:
        self.is_draining = False  # whether the end has begun, for monitors
        self._settings, self._key_of, self._api = settings, key_of, api
        self._claims = (SharedClaims(settings.redis, settings.dedup_size) if settings.redis
                        else ClaimCache(settings.dedup_size))
        self.handling = Handling(registry, settings, self._claims, api)
        self._dispatcher = self.handling.dispatcher
        self._journal: Optional[Journal] = None
        self._opening = threading.Lock()  # guards the two below, and that only one thread opens
        self._is_open = False
        self._problem = ""  # why the journal could not be opened

    # Opening

    def open(self) -> None:
        """Open the journal, if there is one, and begin what the last run left. Raises `SettingsError`."""
        with self._opening:
            if self._is_open or self.is_draining:
                return
            if self._settings.journal:
                self._journal = self.handling.journal = Journal(self._settings, call_later)
                self._recover(self._journal)
            self._claims.open()
            self._is_open, self._problem = True, ""
        self._dispatcher.wake()

    def begin(self) -> None:
        """Open at the first call, in the process that serves. Raises `Busy` while the journal cannot be used, which is
        told once, and tried again every few seconds."""
        if self._is_open:
            return
        if not self._problem:
            error = attempt(self.open)
            if not error:
                return
            self._problem = "the journal cannot be used"
            log.error("%s; until then every push is answered 503", describe_error(error))
            call_later(OPEN_AGAIN_SECONDS, self._open_again)
        raise Busy(self._problem, JournalError.advice)

    def _open_again(self) -> None:
        if attempt(self.open):
            call_later(OPEN_AGAIN_SECONDS, self._open_again)
        else:
            log.warning("the journal %s can be used now", self._settings.journal)

    def _recover(self, journal: Journal) -> None:
        """Go on where the last process ended: remember what was finished, and queue what was not."""
        for key in journal.finished_keys():
            self._claims.finish(key)
        for session in journal.sessions():
            self.handling.conversations.restore(*session)
        left: List[Job] = []
        for row in journal.waiting():
            error = attempt(lambda: left.append(restore_job(row, self._settings.tries)))  # noqa: B023
            if error:
                journal.fail(row.key, describe_error(error))
                log.error("left by the last run, and cannot be read: key=%s", row.key)
            else:
                self._claims.restore(row.key)
        mark_suspects(left, self._settings.workers)
        if left:
            log.info("%d messages are left from the last run", len(left))
        self._dispatcher.restore(left)

    # From a push to the queue, on the thread that answers

    def take(self, message: Message) -> bool:
        """Claim a message here, and keep a place for it; False for a repeat. Raises `Busy`."""
        self.begin()
        key_of = self._key_of or self.handling.registry.key_of
        message.key = make_key(key_of, message) if key_of else dedup_key(message)
        if not self._claims.claim(message.key):
            return False
        try:
            self._dispatcher.reserve()
        except BaseException:
            self._claims.release(message.key)
            raise
        return True

    def cancel(self, message: Message) -> None:
        """Give back what `take` gave: the message is refused."""
        self._dispatcher.cancel()
        self._claims.release(message.key)

    def deliver(self, taken: Sequence[Tuple[Message, bytes]]) -> List[Union[bool, PushError]]:
        """Make safe what a round has taken, and queue it: each message with its bytes. One outcome each: True if it is
        accepted, False if another instance has it already, or the error that refuses it."""
        try:
            outcomes = self._claims.confirm([message.key for message, _ in taken])
        except BaseException:
            for message, _ in taken:
                self.cancel(message)
            raise
        ours = [push for push, outcome in zip(taken, outcomes) if outcome is True]
        for _ in range(len(taken) - len(ours)):
            self._dispatcher.cancel()
        if self._journal and ours:
            self._dispatcher.note_flush()  # the marks go with them
            error = attempt(self._journal.add, [(message.key, payload) for message, payload in ours])
            if error:
                for message, _ in ours:
                    self.cancel(message)
                refusal = error if isinstance(error, PushError) else JournalError("the journal cannot be written")
                return [refusal if outcome is True else outcome for outcome in outcomes]
        self._claims.accept([message.key for message, _ in ours])
        self._dispatcher.post([message for message, _ in ours])
        return outcomes

    def keep_unreadable(self, payload: bytes, reason: str) -> None:
        """Keep a push that is proven and cannot be read, for a person to look at, if there is a journal."""
        if self._journal:
            self._journal.keep_unreadable(payload, reason)

    def observe(self, response: Response, message: Optional[Message], seconds: float) -> None:
        """A push was answered after that time."""
        if self._settings.admin:
            self.handling.metrics.push(response, message, seconds)

    # For who owns it

    def each_second(self) -> None:
        """Begin what a shortage of threads held up, and notice a journal that was deleted though nothing is written."""
        self._dispatcher.wake()
        self.handling.flush()

    def trouble(self) -> str:
        """What keeps messages from being taken, in words; empty if nothing does."""
        return "draining" if self.is_draining else self._journal_trouble()

    def _journal_trouble(self) -> str:
        return self._problem or (
            "the journal cannot be written" if self._journal and not self._journal.healthy else "")

    def state(self) -> Dict[str, float]:
        """The state of things, as METRICS names it."""
        return {**self._dispatcher.state(), "remembered_keys": len(self._claims),
                "journal_healthy": not self._journal_trouble()}

    def report(self) -> Dict[str, Any]:
        """The state of things, for the page: of each part ok, off, or what is wrong with it."""
        journal = (self._journal_trouble() or "ok") if self._settings.journal else "off"
        shared = self._claims if self._settings.redis else None
        return {**self.handling.metrics.report(), "workers": self._settings.workers, "redis": state_of(shared),
                "send_api": state_of(self._api if isinstance(self._api, SendApi) else None), "journal": journal}

    def join(self, seconds: Optional[float]) -> bool:
        """Wait until every message is handled, ``seconds`` at most; whether that was reached."""
        with contextlib.suppress(Busy):
            self.begin()
        reached = self._dispatcher.join(seconds)
        self.handling.flush()
        return reached

    def close(self) -> List[str]:
        """Take nothing more, and finish what waits within the settings' ``grace``; the keys of what was left undone."""
        self.is_draining = True
        undone = self._dispatcher.drain(self._settings.grace)
        with self._opening:
            if self._journal:
                self._journal.close()
        self._claims.close()
        if self._api:
            self._api.close()
        return undone

    def after_fork(self) -> None:
        """In a forked child: let go of the parent's files. This inbox must not be used any more."""
        self.handling.is_forked = True
        if self._journal:
            self._journal.after_fork()


# ---- 15 HTTP server -------------------------------------------------------------------------------------------------
# Law: bytes in, a `Request`, a `Response`, bytes out. Decides nothing about pushes; it only refuses what is not HTTP,
# what is too slow, and what is too much. Knows nothing of the dispatcher.

# What a client has time for, and the seconds: to say something or to finish its handshake, between two requests, from
# a head's first byte to its last, likewise for a body, to take an answer, and to hang up after a refusal. OURS is the
# time in which the client waits for us. The platform itself gives up after 2 s.
NEW, IDLE, HEAD, BODY, OURS, ANSWER, LINGER = "new", "idle", "head", "body", "ours", "answer", "linger"
PHASE_SECONDS: Mapping[str, float] = MappingProxyType(
    {NEW: 5.0, IDLE: 15.0, HEAD: 5.0, BODY: 10.0, OURS: float("inf"), ANSWER: 10.0, LINGER: 2.0})
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
# Seconds from its connect that a TLS client may shake hands before it can be closed to make room: three ways to us and
# back fit in. The longer this is, the longer those wait who are not accepted yet: beside 5,000 silent ones 0.6 s.
HANDSHAKE_SECONDS = 0.15
# Seconds without a turn after which the loop counts as stuck: it turns at least once in TICK_SECONDS.
STUCK_SECONDS = 3.0
# Seconds that `shutdown` waits for the loop beyond the time that the connections get.
CLOSE_SECONDS = 3.0
# Descriptors kept free for other things than connections: logs, handlers' files, the send API.
RESERVED_FILES = 64
# Pieces a chunked body may come in, and the bytes of a line between them: senders of tiny chunks only cost time.
MAX_CHUNKS = 4096
MAX_CHUNK_LINE = 256
# Bytes asked of the system at a time: a push and its head have about 700, a record of TLS at most 16 KiB.
RECEIVE = 64 * 1024
# Systems without Unix sockets get a number that no address family has.
UNIX_FAMILY = getattr(socket, "AF_UNIX", -1)

# RFC 9110, section 5.6.2 (token) and 5.5 (field values); RFC 9112, sections 3 and 5: no blank before the colon, no line
# that continues another, no bare CR, LF or NUL.
_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([!\"$-~\x80-\xff]+) HTTP/([0-9])\.([0-9])\r\n")
_FIELDS = re.compile(rb"(?:" + _TOKEN + rb":[\t -~\x80-\xff]*\r\n)*")
_FRAMING_FIELD = re.compile(rb"(?im)^(host|content-length|transfer-encoding|connection|expect):(.*)\r$")
_HOST = re.compile(rb"[!$%&'()*+,;=:\[\]._~0-9a-z-]*")
_CHUNK_LINE = re.compile(rb"([0-9A-Fa-f]{1,8})[\t ]*(?:;[\t -~\x80-\xff]*)?\r\n")
_NEVER_IN_HEAD = re.compile(rb"(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


class Framing(NamedTuple):
    """What a head says about where its request ends (``length`` is -1 for a chunked body), and what follows."""

    length: int
    closes: bool
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
    length = _body_length(found.get(b"content-length", ()), found.get(b"transfer-encoding", ()), minor)
    return Framing(length, not minor or b"close" in options, bool(expectations) and minor > 0)


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
    found = re.fullmatch(r"(?i:https?)://[!$%&'()*+,;=:\[\]._~0-9A-Za-z-]+(/[^?#]*)?(\?[^#]*)?", target)
    if not found:
        raise MalformedPush("malformed request target")
    return (found.group(1) or "/") + (found.group(2) or "")


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
        self.framing = Framing(0, True, False)

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

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
            self.phase = HEAD if self._buffer else IDLE
            yield Request(self._method, path, query, body)
            self._method = ""

    def _check_size(self, size: int) -> None:
        if size > self._max_body:
            raise PushError(f"more than {self._max_body} bytes", TOO_LARGE, 413)

    def _read_head(self) -> Generator[None, None, Tuple[Any, bytes]]:
        """The match of the request line, and the header lines, each with its CR LF."""
        seen, end = 0, -1
        while end < 0:
            if self._buffer[:1] in (b"\r", b"\n"):  # empty lines before a request are ignored (RFC 9112, section 2.2)
                del self._buffer[:len(self._buffer) - len(self._buffer.lstrip(b"\r\n"))]
            end = self._buffer.find(b"\r\n\r\n", max(0, seen - 3))
            if (len(self._buffer) if end < 0 else end) > MAX_HEAD:
                raise PushError(f"a head of more than {MAX_HEAD} bytes", status=431)
            if end < 0:
                # Only what is new is looked at: all of it again for each byte would cost an attacker little.
                if _NEVER_IN_HEAD.search(self._buffer, seen):
                    raise MalformedPush("no control characters in a head, and lines end with CR LF")
                seen = len(self._buffer)
                self.phase = HEAD if seen else IDLE
                yield None
        head = yield from self._take(end + 4)
        line = _REQUEST_LINE.match(head)
        if not line:
            raise MalformedPush("malformed request line")
        return line, head[line.end():-2]

    def _take(self, count: int) -> Generator[None, None, bytes]:
        while len(self._buffer) < count:
            yield None
        taken = bytes(self._buffer[:count])
        del self._buffer[:count]
        return taken

    def _read_chunks(self) -> Generator[None, None, bytes]:
        """A chunked body, joined (RFC 9112, section 7.1). Extensions are dropped, trailers are refused."""
        body = bytearray()
        for _ in range(MAX_CHUNKS):
            while b"\r\n" not in self._buffer[:MAX_CHUNK_LINE + 2]:
                if len(self._buffer) > MAX_CHUNK_LINE + 1:  # with its CR
                    raise MalformedPush("a line too long between chunks")
                yield None
            line = _CHUNK_LINE.fullmatch((yield from self._take(self._buffer.index(b"\r\n") + 2)))
            if not line:
                raise MalformedPush("malformed chunk size")
            size = int(line.group(1), 16)
            self._check_size(len(body) + size)
            body += yield from self._take(size)
            if (yield from self._take(2)) != b"\r\n":
                raise MalformedPush("a chunk longer than it says, or a trailer, which is not taken")
            if not size:
                return bytes(body)
        raise MalformedPush(f"more than {MAX_CHUNKS} chunks")


def list_headers(response: Response) -> List[Tuple[str, str]]:
    """The headers of a response that every server sends, ours and WSGI's alike."""
    return list({"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(response.body)),
                 **dict(response.headers)}.items())


def encode_answer(response: Response, second: int, closes: bool) -> bytes:
    """The response as it is sent in that Unix second. ``closes`` tells the client that the connection ends with it."""
    headers = [("Date", formatdate(second, usegmt=True)), *list_headers(response)]
    if closes:
        headers.append(("Connection", "close"))
    lines = [f"HTTP/1.1 {response.status} {http.client.responses[response.status]}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join((*lines, "", "")).encode("latin-1") + response.body


class Connection(BaseHTTPRequestHandler):
    """One client's connection: reads requests, and sends their answers. Nothing here ever waits.

    ``_step`` is what to do when the socket is ready, None when the connection is over. ``asked`` is the request that is
    complete and not yet answered. ``deadline`` is when the client's time is up, by the monotonic clock. Of one client
    there is never more in memory than a request, what came with it in one read, and an answer.

    Nothing is done by the base class: it reads through the email package and several buffers, which took two thirds of
    a request's time.
    """

    server: PushServer

    def __init__(self, request: Any, client_address: Any, server: PushServer) -> None:
        """Begin to serve the socket ``request``, whose first bytes are mostly here already."""
        self.server = server
        self.socket: socket.socket = request
        self.socket.setblocking(False)
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
        self.asked: Optional[Request] = None
        self._give_time(NEW)
        self._events = 0  # that the server's selector watches for
        self._reader = RequestReader(server.settings.max_body, server.parse_framing)
        self._unsent = b""
        self._then: Optional[Callable[[], None]] = None  # when all is sent
        self._step: Optional[Callable[[], None]] = self._put_off_handshake if server.tls else self._receive
        server.connections[self] = None
        self.ready()

    def _give_time(self, phase: str) -> None:
        self.phase = phase
        self.deadline = time.monotonic() + PHASE_SECONDS[phase]

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
            self._watch(events or (selectors.EVENT_WRITE if self._unsent else selectors.EVENT_READ))

    def _watch(self, events: int) -> None:
        """Be called when the client sends, or takes, as ``events`` say; not while this is in the backlog."""
        if self in self.server.backlog:
            events = 0
        if events == self._events:
            return
        if not self._events:
            self.server.selector.register(self.socket, events, self.ready)
        elif not events:
            self.server.selector.unregister(self.socket)
        else:
            self.server.selector.modify(self.socket, events, self.ready)
        self._events = events

    def _put_off_handshake(self) -> None:
        self._step = self._shake_hands
        self.server.backlog[self] = None

    def _shake_hands(self) -> None:
        """Go on with the handshake. A session takes 50 KiB, so it begins when the client has sent something. The first
        byte tells that it is a handshake (RFC 8446, section 5.1)."""
        self._step = self._put_off_handshake  # when there is more to read
        if not isinstance(self.socket, ssl.SSLSocket):
            if self.socket.recv(1, socket.MSG_PEEK) != b"\x16":
                self.close()
                return
            assert self.server.tls
            self.socket = self.server.tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.socket.do_handshake()
        self._step, self.phase = self._receive, IDLE
        self._receive()

    def _receive(self) -> None:
        data = self.socket.recv(RECEIVE)
        if not data:
            self.close()
        elif self.phase != LINGER:
            self._reader.feed(data)
            self._hand_in()

    def _hand_in(self) -> None:
        """Hand in the next request, or give the client time for the rest of it, counted from when it began."""
        self._step = self._receive
        self.asked = self._reader.next_request()
        if self.asked:
            self._give_time(OURS)
            self.server.complete.append(self)
        elif self._reader.phase != self.phase:
            self._give_time(self._reader.phase)
            if self.phase == BODY and self._reader.framing.expects_continue:
                self._unsent, self._then, self._step = b"HTTP/1.1 100 Continue\r\n\r\n", self._receive, self._send
                self._send()

    def answer(self, response: Response) -> None:
        """Send the answer to the request that was handed in, and turn to the next one."""
        request, closes = self.asked, self._reader.framing.closes or self.server.closing
        assert request
        then = self.close if closes else self._await_next
        if request.problem:
            request.problem.__traceback__ = None  # which leads back to the request, and to this connection
            closes, then = True, self._linger
        data = self.server.encode_answer(response, int(time.time()), closes)
        if request.method == "HEAD":
            data = data[:len(data) - len(response.body)]
        self.asked = None
        self._give_time(ANSWER)
        # In one piece: two would be two packets, and a wait for the first one's receipt.
        self._unsent, self._then, self._step = data, then, self._send
        self._go_on()

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
            self._give_time(OURS)
            self._step = self._hand_in
            self.server.backlog[self] = None

    def _linger(self) -> None:
        """Send no more, but read on for a while and drop it: closing with bytes unread would reset the connection, and
        the client could lose the answer (RFC 9112, section 9.6)."""
        self._give_time(LINGER)
        self._end_session()
        self.socket.shutdown(socket.SHUT_WR)

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
            self.server.connections.pop(self, None)
            self.server.backlog.pop(self, None)
            self._watch(0)
            self._end_session()
            self.server.shutdown_request(self.socket)


def _stamp(*paths: str) -> List[Tuple[int, ...]]:
    """What tells whether files are the same and unchanged: device, number, size and time of each that is there."""
    stamps: List[Tuple[int, ...]] = []
    for path in paths:
        with contextlib.suppress(OSError):
            found = os.stat(path)
            stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    return stamps


class PushServer(ThreadingHTTPServer):
    """Listens on an address or a Unix socket, accepts, and serves. Raises OSError when it cannot listen,
    `SettingsError` for a bad certificate.

    One thread watches all connections, reads what comes, and answers what is complete together: an answer takes
    microseconds, a change of threads as much again, and a slow client only waits. The loop's turns are short whatever
    clients do: in one turn a connection gets one request answered, and what can wait (handshakes, pipelined requests)
    gets a few milliseconds. ``each_second`` is called about once a second on the loop's thread.
    """

    # Connections that the system may hold for us before they are accepted; it cuts this down to what it allows.
    request_queue_size = 4096

    def __init__(self, settings: Settings, endpoint: Union[Endpoint, AdminEndpoint]) -> None:
        self.settings, self.endpoint = settings, endpoint
        self._certificate_files = _stamp(settings.tls_cert, settings.tls_key)
        self.tls = make_tls_context(settings) if settings.tls_cert else None
        self._socket_file: List[Tuple[int, ...]] = []  # the stamp of the Unix socket that we made
        self.server_port = 0
        if settings.unix:
            self.address_family = UNIX_FAMILY
        elif ":" in settings.host:
            self.address_family = socket.AF_INET6
        super().__init__(settings.unix or (settings.host, settings.port), Connection)  # type: ignore[arg-type]
        self.socket.setblocking(False)
        self._limit = _connection_limit(settings.max_connections)
        self.each_second: Callable[[], None] = lambda: None
        self.teller = Teller(time.monotonic)
        # Heads differ in their first line only, as long as one client or proxy speaks; most answers differ in their
        # date only, and that changes once a second.
        self.parse_framing = functools.lru_cache(maxsize=256)(parse_framing)
        self.encode_answer = functools.lru_cache(maxsize=16)(encode_answer)
        self.connections: OrderedDict[Connection, None] = OrderedDict()  # who has waited longest comes first
        self.backlog: OrderedDict[Connection, None] = OrderedDict()  # whose next step waits for time, in order
        self.complete: List[Connection] = []  # to be answered in this turn
        self.selector = selectors.DefaultSelector()
        self.waker, self.woken = socket.socketpair()
        self.closing = False
        self._accepting = False  # whether the selector watches the address
        self._next_tick = self._close_by = 0.0
        self._turned = time.monotonic()  # when the last turn ended
        self._closed = threading.Event()

    def server_bind(self) -> None:
        """Bind without asking the name service for our own name, which can take seconds."""
        if self.settings.unix:
            _remove_stale_socket(self.settings.unix)
        TCPServer.server_bind(self)
        if self.settings.unix:
            self._socket_file = _stamp(self.settings.unix)
            os.chmod(self.settings.unix, 0o666)  # the proxy runs as another user
        else:
            self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def server_close(self) -> None:
        """Stop listening. A Unix socket's file is removed, unless another server has put its own there."""
        if self._socket_file and _stamp(self.settings.unix) == self._socket_file:
            with contextlib.suppress(OSError):
                os.unlink(self.settings.unix)
        self._socket_file = []
        super().server_close()

    def abandon(self) -> None:
        """Let go of the address and of everything else, also when it was never served."""
        self.server_close()
        self.selector.close()
        self.waker.close()
        self.woken.close()

    def after_fork(self) -> None:
        """In a forked child: let go of all that belongs to the parent. Descriptors are closed and nothing else is done:
        to shut a connection down, or to take it out of the selector, would do so for the parent as well."""
        self._socket_file = []
        for connection in self.connections:
            connection.socket.close()
        self.abandon()

    def serve_forever(self, poll_interval: float = TICK_SECONDS) -> None:
        """Serve until `shutdown` is called from another thread."""
        self.selector.register(self.woken, selectors.EVENT_READ, lambda: self.woken.recv(1))
        try:
            while not self.closing:
                self.teller.guard(self._turn, poll_interval)
            self.teller.guard(self._turn, 0.0)  # what has come is still answered
            self._pause()
            self.server_close()
            while self.connections and time.monotonic() < self._close_by:
                self._close_all(lambda connection: connection.phase in (IDLE, NEW))
                self.teller.guard(self._turn, PAUSE_SECONDS)
            self._close_all(lambda connection: True)
        finally:
            self.abandon()
            self._closed.set()

    def alive(self) -> bool:
        """Whether the loop has turned in the last seconds."""
        return time.monotonic() - self._turned < STUCK_SECONDS

    def shutdown(self, seconds: float = 0.0) -> None:
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

    def _turn(self, seconds: float) -> None:
        """Wait for what comes, ``seconds`` at most, read it, and answer all that is complete."""
        paused = not self._accepting
        for key, _ in self.selector.select(0.0 if self.backlog else PAUSE_SECONDS if paused else seconds):
            key.data()
        if paused and not self.closing:
            self.selector.register(self.socket, selectors.EVENT_READ, self._accept)
            self._accepting = True
        self._work_off_backlog()
        self._answer_complete()
        self.service_actions()

    def _work_off_backlog(self) -> None:
        """Do steps that were put off, in order, for as long as a turn has time for them. Those that are put off
        meanwhile have to wait for the next turn."""
        until = time.monotonic() + BACKLOG_SECONDS
        for _ in range(len(self.backlog)):
            self.backlog.popitem(last=False)[0].ready()
            if not self.backlog or time.monotonic() > until:
                break

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

    def renew_certificate(self) -> None:
        """Serve the certificate anew if its files have changed. While it cannot be used, as when one of the two files
        is not replaced yet, the old one stays in service."""
        stamps = _stamp(self.settings.tls_cert, self.settings.tls_key)
        if stamps != self._certificate_files:
            self._certificate_files = stamps
            try:
                self.tls = make_tls_context(self.settings)
                log.info("the renewed certificate is in service")
            except SettingsError as error:
                log.error("%s; the certificate from before stays in service", error)

    def _accept(self) -> None:
        """Accept clients that wait, up to ACCEPT_BURST of them: then those that are accepted have their turn. Where
        there is no room, the oldest gives way; where nobody can, all who wait have to wait a little longer."""
        for accepted in range(ACCEPT_BURST):
            request = client_address = None
            full = len(self.connections) >= self._limit
            oldest = self._find_oldest() if full else None
            if oldest or not full:
                try:
                    request, client_address = self.get_request()
                except OSError as error:
                    # After the first perhaps nobody waits: the system looks for a descriptor, then for a client.
                    if accepted or error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        return
                    full, oldest = True, oldest or self._find_oldest()
            if full and not oldest:
                self._pause()
                return
            if oldest:
                oldest.close()
            if request:
                Connection(request, client_address, self)

    def _pause(self) -> None:
        """Accept nobody until the next turn: the selector would tell at once again of those who cannot come in."""
        if self._accepting:
            self.selector.unregister(self.socket)
            self._accepting = False

    def _find_oldest(self) -> Optional[Connection]:
        """The connection that has waited longest for its request to become complete, which may turn out to be closed
        already; None if those who came first must stay: they wait for us, or have time for their handshake."""
        young = time.monotonic() + PHASE_SECONDS[NEW] - HANDSHAKE_SECONDS
        for connection in list(itertools.islice(self.connections, ACCEPT_BURST)):
            if self.tls and connection.phase == NEW:
                must_stay = connection in self.backlog or connection.deadline > young
            else:
                self.backlog.pop(connection, None)
                connection.ready()  # what has come unseen may complete it
                must_stay = connection.asked is not None
            if not must_stay:
                return connection
        return None


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
    """Remove the file of a Unix socket that a dead server left. A live one's, or another file, lets binding fail."""
    if os.path.lexists(path) and stat.S_ISSOCK(os.lstat(path).st_mode):
        with contextlib.closing(socket.socket(UNIX_FAMILY)) as probe:
            if probe.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)


def _connection_limit(wanted: int) -> int:
    """``wanted``, or what the system's limit of open files leaves beside RESERVED_FILES."""
    if resource is None:
        return wanted
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    allowed = wanted if files == resource.RLIM_INFINITY else max(1, files - RESERVED_FILES)
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

    `feed` and `wsgi` work without a start. ``dedup_key`` replaces `dedup_key`: equal texts are one message. ``api``
    takes the place of a `SendApi`. Files and threads are opened at first use, so what is made before a fork works in
    every process that serves. Raises `SettingsError` for what is known to be wrong at once.
    """

    def __init__(self, registry: HandlerRegistry, settings: Settings = Settings(),
                 dedup_key: Optional[Callable[[Message], str]] = None, api: Any = None) -> None:
        refuse_uwsgi_without_threads(sys.modules.get("uwsgi"))
        self.settings = settings
        self._key_of, self._api = dedup_key, api
        self._http: Optional[PushServer] = None
        self._admin: Optional[PushServer] = None
        self._told_processes = False
        self._make_inbox(registry)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=functools.partial(_let_go_in_child, weakref.ref(self)))

    def _make_inbox(self, registry: HandlerRegistry) -> None:
        api = self._api
        if api is None and (self.settings.app_key or self.settings.access_token):
            api = SendApi(self.settings)
        self._inbox = Inbox(registry, self.settings, self._key_of, api)
        self.endpoint = Endpoint(self.settings, self._inbox, time.time, time.monotonic)

    def _after_fork(self) -> None:
        """In a forked child: what the parent opened is the parent's. What is done here from now on begins anew."""
        for server in filter(None, (self._http, self._admin)):
            server.after_fork()
        self._http = self._admin = None
        self._inbox.after_fork()
        self._forked_from = self._inbox  # kept: SQLite must not close the parent's files
        self._make_inbox(self.registry)

    @property
    def registry(self) -> HandlerRegistry:
        """The handlers in service; another registry can be put in their place while the server runs."""
        return self._inbox.handling.registry

    @registry.setter
    def registry(self, registry: HandlerRegistry) -> None:
        """Put other handlers in service."""
        self._inbox.handling.registry = registry

    def open(self) -> KfServer:
        """Open the journal now, and begin what the last run left, not at the first push. Raises `SettingsError`."""
        self._inbox.open()
        return self

    def start(self) -> KfServer:
        """Listen, and serve from a thread of its own. Raises `SettingsError` when an address or a file cannot be had,
        and then nothing stays open; `KfError` if the server was started or stopped before."""
        if self._http or self._inbox.is_draining:
            raise KfError("a KfServer starts once: make another for each start")
        with contextlib.ExitStack() as opened:
            http = bind(self.settings, self.endpoint, "--host, --port or --unix")
            opened.callback(http.abandon)
            admin = self._bind_admin() if self.settings.admin else None
            if admin:
                opened.callback(admin.abandon)
            self._inbox.open()
            opened.pop_all()
        http.each_second = self._inbox.each_second
        self._http, self._admin = http, admin
        for server in filter(None, (http, admin)):
            threading.Thread(target=server.serve_forever, name="kfserver-accept", daemon=True).start()
        return self

    def _bind_admin(self) -> PushServer:
        host, _, port = self.settings.admin.rpartition(":")
        settings = dataclasses.replace(
            self.settings, host=host.strip("[]"), port=int(port), unix="", tls_cert="", tls_key="")
        render = self._inbox.handling.metrics.render
        return bind(settings, AdminEndpoint(lambda: render(self._state()), self._report, self._trouble), "--admin")

    def _state(self) -> Dict[str, float]:
        return {**self._inbox.state(), "connections": len(self._http.connections) if self._http else 0}

    def _report(self) -> Dict[str, Any]:
        return {**self._state(), **self._inbox.report(), "health": self._trouble() or "ok", "version": __version__}

    def _trouble(self) -> str:
        if self._http and not self._http.alive():
            return "no push is answered: the thread that answers hangs"
        return self._inbox.trouble()

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

        After that nothing is begun. What a handler still finishes is not written down: a journal brings it again.
        """
        self._inbox.is_draining = True
        if self._http:
            self._http.shutdown(FINISH_SECONDS)
        undone = self._inbox.close()
        if self._admin:
            self._admin.shutdown()
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
        """Wait until every message is handled, ``seconds`` at most; whether that was reached."""
        return self._inbox.join(seconds)

    def wsgi(self, environ: Dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """A WSGI application (PEP 3333) with the same endpoint, for an existing site."""
        if environ.get("wsgi.multiprocess") and not self.settings.redis and not self._told_processes:
            self._told_processes = True
            log.warning("there are several processes, and each knows only the repeats that it has seen itself: run one "
                        "process with threads, or set redis=")
        with contextlib.suppress(Busy):  # told, and a push is answered by it
            self._inbox.begin()  # what the last run left, at the first request of any kind
        # The server has decoded the path; a setting and a request line are percent-encoded.
        path = quote((environ.get("SCRIPT_NAME", "") + environ.get("PATH_INFO", "") or "/").encode("latin-1"))
        body, problem = read_wsgi_body(environ, self.settings.max_body)
        method = environ["REQUEST_METHOD"]
        response = self.endpoint.handle(Request(method, path, environ.get("QUERY_STRING", ""), body, problem))
        start_response(f"{response.status} {http.client.responses[response.status]}", list_headers(response))
        return [b"" if method == "HEAD" else response.body]


def _let_go_in_child(server: weakref.ReferenceType[KfServer]) -> None:
    """Called in each forked child."""
    made = server()
    if made:
        made._after_fork()


def refuse_uwsgi_without_threads(uwsgi: Optional[ModuleType]) -> None:
    """Raise `SettingsError` under a uWSGI that has Python's threads switched off: no handler would ever run."""
    options = {str(name, "ascii") if isinstance(name, bytes) else name for name in getattr(uwsgi, "opt", ())}
    if uwsgi and not options & {"enable-threads", "threads"}:
        raise SettingsError("uWSGI runs Python without threads, so no handler would ever run: start it with "
                            "--enable-threads")


def read_wsgi_body(environ: Mapping[str, Any], limit: int) -> Tuple[bytes, Optional[PushError]]:
    """The body of a request to a WSGI application, or why it is refused, as one of more than ``limit`` bytes is.

    A chunked body has no length, but an end where the server says so (``wsgi.input_terminated``, as gunicorn does).
    """
    stated = environ.get("CONTENT_LENGTH") or ""
    if stated and not (stated.isdecimal() and len(stated) <= 18):
        return b"", MalformedPush("Content-Length must be one number")
    length, body = int(stated or 0), b""
    most = limit + 1 if not stated and environ.get("wsgi.input_terminated") else length
    if most and length <= limit:
        body = environ["wsgi.input"].read(most)
    if max(length, len(body)) > limit:
        return b"", PushError(f"more than {limit} bytes", TOO_LARGE, 413)
    return body, None


# ---- 17 Push --------------------------------------------------------------------------------------------------------
# Law: plays the platform against any receiver, over a real connection, and judges answers as the platform does. Knows
# nothing of how a push is received and handled. Made for development: one message after the other, never load.

# Bodies that the platform takes for an answer, with status 200 (its page on customer-service messages).
GOOD_ANSWERS = (b"success", b"")
# Characters of a request or an answer that are shown.
MAX_SHOWN = 4000
# Seconds that the platform waits for an answer, and how often it sends again what was not answered (its page on coupon
# events). How soon it does so is not documented; a receiver that is busy asks for one second.
ANSWER_SECONDS, RETRIES, RETRY_SECONDS = 2.0, 3, 1.0
# What can be done about an answer that does not count, by the reason.
_PUSH_ADVICE: Mapping[str, str] = MappingProxyType({
    "200 with a wrong body": "the body must be exactly success or empty; for a handshake, exactly its echoStr",
    "refused 403": "push with the receiver's own --token, and with its --aes-key and --app-id if it has them",
    "refused 404": "the receiver takes pushes at another path, its --path: put that into the URL"})
# The types of message that this section writes, and the main field of each.
_MAIN_FIELDS: Mapping[str, str] = MappingProxyType({"text": "Content", "image": "PicUrl", "event": "Event"})


def read_push_url(text: str) -> Tuple[str, str]:
    """The base and the target of a URL. Raises `SettingsError`, without the text, which can hold a password."""
    found = re.fullmatch(r"(https?://[^/?#@\s]+)(/[!-\"$-~]*)?", text)
    if not found or not _is_base(found.group(1)):
        raise SettingsError("push takes a URL like http://127.0.0.1:8080/kf or https://…")
    return found.group(1), found.group(2) or "/"


def draft_pushes(arguments: argparse.Namespace, settings: Settings) -> Iterator[Tuple[bytes, Dict[str, str], bytes]]:
    """The pushes that the arguments ask for: of each the plain message, the values of the query, and the body. Raises
    `SettingsError` before the first, for what cannot be pushed.

    A receiver drops repeats, so no two messages are the same: one second lies between two, and the last happens now.
    All but events have a MsgId of 63 bits too.
    """
    given = {kind: getattr(arguments, kind) for kind in (*_MAIN_FIELDS, "file", "handshake")}
    kind, content = next(((kind, text) for kind, text in given.items() if text is not None), ("text", "hello"))
    if arguments.field and kind not in _MAIN_FIELDS:
        raise SettingsError(f"--field goes into a message that push writes itself: leave out --field, or --{kind}")
    platform, encode = Platform(settings, time.time, os.urandom), encode_json if arguments.json else encode_xml
    message = read_packet(content) if kind == "file" else b""
    # Another start for each run, high enough that a receiver which reads ids as floating point shows it.
    first_id, first_second = 2 ** 62 + random.getrandbits(61), int(time.time()) - arguments.count + 1
    for number in range(arguments.count):
        if kind in _MAIN_FIELDS:
            fields = {"ToUserName": settings.app_id.split(",")[0] or "app", "FromUserName": "user",
                      "CreateTime": first_second + number, "MsgType": kind, _MAIN_FIELDS[kind]: content}
            if kind != "event":
                fields["MsgId"] = first_id + number
            message = encode({**fields, **dict(field.partition("=")[::2] for field in arguments.field)})
        yield (message, *(platform.handshake() if kind == "handshake" else platform.push(message, encode)))


def read_packet(path: str) -> bytes:
    """The bytes of a file. Raises `SettingsError`."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None


def is_lost(number: int, percent: int) -> bool:
    """Whether the first answer to the push of that number counts as lost. ``percent`` of a hundred do, evenly spread
    and not by chance, so that the sums of a run are known beforehand."""
    return (number + 1) * percent // 100 > number * percent // 100


def quote_bytes(mark: str, data: bytes) -> str:
    """The bytes as lines, each after ``mark``. Broken UTF-8 and control characters are escaped: a terminal reads this.
    """
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")
    shown = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}… ({len(text) - MAX_SHOWN} more)"
    return "\n".join(f"{mark} {printable(line)}".rstrip() for line in shown.split("\n"))


def build_push_parser() -> argparse.ArgumentParser:
    """The parser of the push command."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py push", allow_abbrev=False, usage="kfserver.py push [options] URL",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=79),
        description="Plays the platform: pushes messages to a receiver, one after the other, and judges its answers.")
    add, what = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    add("url", metavar="URL", help="where the receiver is: http://host:port/path or https://…")
    what("--text", metavar="T", help="a text message (hello)")
    what("--image", metavar="URL", help="a message with the picture at URL")
    what("--event", metavar="NAME", help="an event, as user_get_coupon")
    what("--file", metavar="PACKET", help="a packet, sent as it is")
    what("--handshake", action="store_const", const="", help="the handshake of saving the URL in the console")
    add("--field", metavar="K=V", action="append", default=[], help="one more field, or another value; repeatable")
    add("--json", action="store_true", help="in JSON instead of XML")
    add("--token", metavar="T", help="sign with this Token (KF_TOKEN)")
    add("--aes-key", metavar="KEY", help="encrypt with this EncodingAESKey (KF_AES_KEY)")
    add("--app-id", metavar="APP", help="the app that is sealed in (KF_APP_ID)")
    add("--insecure", action="store_true", help="accept any certificate")
    add("--count", metavar="N", type=int, default=1, help="messages to push (1); more are summed up, not shown")
    add("--repeat", metavar="P", type=int, default=0, help="of 100, send P again as after a lost answer (0)")
    return parser


class PushRun:
    """Pushes messages one after the other to ``target``. ``show`` is called with each step, in words.

    ``counts`` says how many tries were sent, how many messages were answered and how many repeated and, by the reason,
    how many tries were not answered.
    """

    def __init__(self, client: HttpClient, target: str, pause_seconds: float) -> None:
        self._client, self._target, self._pause_seconds = client, target, pause_seconds
        self.show: Callable[[str], object] = len
        self.counts: Counter[str] = Counter(sent=0, answered=0, repeated=0)

    def push(self, message: bytes, query: Mapping[str, str], body: bytes, is_lost: bool) -> None:
        """Send one message until it is answered, at most as often as the platform does; if its answer ``is_lost``, once
        more. Each time the same bytes are sent: by them the receiver knows it again. Raises `SettingsError` if the
        first of all cannot reach the receiver."""
        joint = "" if not query else "&" if "?" in self._target else "?"
        target = f"{self._target}{joint}{urlencode(query)}"
        expected = (query["echoStr"].encode(),) if "echoStr" in query else GOOD_ANSWERS
        self.show(quote_bytes(">", f"POST {target}\n\n".encode() + body))
        if message not in body:
            self.show("sealed in it:\n" + quote_bytes("|", message))
        answered = self._deliver(target, body, expected)
        if answered and is_lost:
            self.counts["repeated"] += 1
            self.show("sent again, as if that answer had been lost")
            answered = self._deliver(target, body, expected)
        self.counts["answered"] += answered

    def _deliver(self, target: str, body: bytes, expected: Sequence[bytes]) -> bool:
        for tries in range(1, RETRIES + 2):
            status, reason = self._try(target, body, expected)
            if not reason:
                return True
            self.counts[reason] += 1
            if self.counts["sent"] == 1:
                self._advise(status, reason)
            if 300 <= status < 500:
                self.show("not sent again: the answer would be the same")
                return False
            if tries <= RETRIES:
                self.show(f"try {tries + 1} of {RETRIES + 1} in {self._pause_seconds:g} s")
                time.sleep(self._pause_seconds)
        return False

    def _try(self, target: str, body: bytes, expected: Sequence[bytes]) -> Tuple[int, str]:
        """Send it once: the status of the answer, 0 if there was none, -1 if nobody was reached; and why the platform
        would not take it for an answer, empty if it would."""
        started = time.monotonic()
        self.counts["sent"] += 1
        try:
            kind = "application/json" if body.lstrip().startswith(b"{") else "text/xml"
            status, answer = self._client.exchange("POST", target, body, kind)
            wrong = "" if answer in expected else "200 with a wrong body"
            reason = wrong if status == 200 else f"refused {status}"
            self.show(quote_bytes(f"< {status}", answer.strip() or b"(nothing)"))
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a name that cannot be
            status = 0 if isinstance(error, (NoAnswer, BrokenPipeError, ConnectionResetError)) else -1
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        seconds = time.monotonic() - started
        if seconds > self._client.timeout:
            status, reason = 0, f"no answer in {self._client.timeout:g} s"
        self.show(f"{f'not answered: {reason}' if reason else 'answered'}, after {seconds * 1000:.2f} ms")
        return status, reason

    def _advise(self, status: int, reason: str) -> None:
        """Say what can be done about the first try of all. Raises `SettingsError` if nobody was reached, or one who
        answers the other scheme, http on a port for https or the reverse: that is asked."""
        scheme, _, rest = self._client.base.partition("://")
        if status in (-1, 0, 400):
            other = "http" if scheme == "https" else "https"
            client = HttpClient(f"{other}://{rest}", self._client.timeout, ssl._create_unverified_context())
            with contextlib.closing(client), contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                if client.exchange("GET", "/")[0] != 400:  # with this, nginx answers http on its port for https
                    raise SettingsError(f"the receiver speaks {other} at this port, not {scheme}: push to {other}://…")
        if status < 0:
            advice = "--insecure takes any" if "CERTIFICATE" in reason else "start the receiver, or correct the URL"
            raise SettingsError(f"cannot reach {self._client.base}: {reason}; {advice}")
        if reason in _PUSH_ADVICE:
            print(f"{reason}: {_PUSH_ADVICE[reason]}")


def push(arguments: argparse.Namespace, answer_seconds: float = ANSWER_SECONDS,
         pause_seconds: float = RETRY_SECONDS) -> int:
    """Push as the arguments of `build_push_parser` ask, and show what comes of it: one message in full, more in sums.

    Returns 0 if all was answered, 1 if not. Raises `SettingsError` for what cannot be pushed, or reaches nobody.
    """
    base, target = read_push_url(arguments.url)
    if arguments.count < 1 or not 0 <= arguments.repeat <= 100:
        raise SettingsError("--count takes a whole number from 1, and --repeat one from 0 to 100")
    secrets = {name: getattr(arguments, name) or os.environ.get(f"KF_{name.upper()}", "")
               for name in ("token", "aes_key", "app_id")}
    drafts = draft_pushes(arguments, Settings(**secrets))  # type: ignore[arg-type]
    client = HttpClient(base, answer_seconds, ssl._create_unverified_context() if arguments.insecure else None)
    run, started = PushRun(client, target, pause_seconds), time.monotonic()
    if arguments.count == 1:
        run.show = print
    try:
        for number, draft in enumerate(drafts):
            run.push(*draft, is_lost(number, arguments.repeat))
    finally:  # after Ctrl-C too
        client.close()
        if arguments.count > 1:
            sums = [f"{what}: {number}" for what, number in run.counts.items()]
            print(", ".join([*sums, f"{time.monotonic() - started:.2f} s"]))
    return 0 if run.counts["answered"] == arguments.count else 1


# ---- 18 Handlers file -----------------------------------------------------------------------------------------------
# Law: from a path or a module's name to a registry, and to the next one when a file changes. What is wrong with the
# file is told to its author: a line with what to do, and the traceback of that file.

DEFAULT_HANDLERS = "handlers.py"
# Seconds between two looks at the files of the handlers.
WATCH_SECONDS = 1.0
# What is imported only when it is needed, maybe after the handlers: libraries, and what these import late themselves.
LATE_IMPORTS = ("asyncio", "concurrent.futures.thread", "contextvars", "sqlite3", "redis", "cryptography",
                "cryptography.hazmat.primitives.ciphers")


def find_handlers(wanted: str) -> str:
    """The full path of a file, or the name of a module as it is. Where nothing is wanted, handlers.py in the current
    folder, or else beside kfserver.py; empty if there is neither."""
    if wanted:
        return os.path.abspath(wanted) if wanted.endswith(".py") or os.path.exists(wanted) else wanted
    folders = (os.getcwd(), os.path.dirname(os.path.abspath(__file__)))
    paths = [os.path.join(folder, DEFAULT_HANDLERS) for folder in folders]
    return next((path for path in paths if os.path.exists(path)), "")


def load_handlers(place: str) -> Tuple[HandlerRegistry, str]:
    """The registry in what `find_handlers` has found, and its file; an empty one where there is none.

    Raises `SettingsError`; for an error inside the file, with that file's traceback.
    """
    if not place:
        return HandlerRegistry(), ""
    modules: List[ModuleType] = []
    error = attempt(lambda: modules.append(_import_handlers(place)))
    if error:
        raise _explain_import(place, error) from error
    registry = getattr(modules[0], "registry", None)
    if not isinstance(registry, HandlerRegistry):
        raise SettingsError(f"{place} has no registry: write 'from kfserver import HandlerRegistry' and "
                            "'registry = HandlerRegistry()' at its top")
    return registry, modules[0].__file__ or place


def _import_handlers(place: str) -> ModuleType:
    """The module of a file, or of a dotted name, which is found from the current folder."""
    if not os.path.isabs(place):
        _put_first(os.getcwd())
        return importlib.import_module(place)
    _put_first(os.path.dirname(place))
    name = os.path.splitext(os.path.basename(place))[0]
    name = f"{name}_handlers" if name in {*sys.modules, *LATE_IMPORTS} else name
    # Not imported: bytecode that was kept before an edit in the same second would pass for that of the edited file.
    loader = SourceFileLoader(name, place)
    spec = ModuleSpec(name, loader, origin=place)
    spec.has_location = True  # the origin becomes __file__
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        exec(loader.source_to_code(loader.get_data(place), place), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _put_first(folder: str) -> None:
    """Have modules in the folder found before all others. If one of them has the name of a library, as redis.py or
    queue.py (handlers.py is not one), everything that kfserver may need is imported before."""
    elsewhere = [each for each in sys.path if os.path.abspath(each) != folder]
    with contextlib.suppress(OSError):  # no such folder, as reading the handlers will tell
        names = {name.partition(".")[0] for name in os.listdir(folder)} - {"__pycache__", "handlers"}
        if any(name.isidentifier() and PathFinder.find_spec(name, elsewhere) for name in names):
            sys.path[:] = elsewhere
            for late in LATE_IMPORTS:
                attempt(importlib.import_module, late)  # some may not be installed, or not work: told when used
    sys.path[:] = [folder, *elsewhere]


def _explain_import(place: str, error: BaseException) -> SettingsError:
    if isinstance(error, OSError) and error.filename == place:
        return SettingsError(f"cannot read the handlers {place}: {error.strerror}; --handlers names another file")
    if isinstance(error, ModuleNotFoundError) and error.name in (place, place.partition(".")[0]):
        return SettingsError(f"no file or module named {place} for the handlers; --handlers names a file or a module")
    trace = _trace_of_handlers(error)
    if isinstance(error, HandlerError) and trace.stack:
        return SettingsError(f"{place}, line {trace.stack[0].lineno}: {error}")
    return SettingsError(f"{place} failed with the {type(error).__name__} below: correct it, or name another file by "
                         f"--handlers\n{_format_trace(trace)}")


def _trace_of_handlers(error: BaseException) -> traceback.TracebackException:
    """The error's traceback without the frames of kfserver: they tell the author of the handlers nothing."""
    trace = traceback.TracebackException.from_exception(error)
    parts: List[Optional[traceback.TracebackException]] = [trace]
    for part in filter(None, parts):  # grows meanwhile
        part.stack = traceback.StackSummary.from_list([each for each in part.stack if not _is_ours(each.filename)])
        parts += [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
    return trace


def _is_ours(path: str) -> bool:
    """Whether a frame of this file belongs to kfserver, or to what it calls handlers and imports them by."""
    return (path in (_is_ours.__code__.co_filename, importlib.__file__) or "<frozen" in path
            or path.endswith(os.path.join("concurrent", "futures", "_base.py")))


def _format_trace(trace: traceback.TracebackException) -> str:
    """The traceback as Python prints it, but without the headline where no frame is left."""
    return re.sub(r"Traceback \(most recent call last\):\n(?!  File)", "", "".join(trace.format())).rstrip()


def _place_of(module: ModuleType) -> str:
    """The file of a module, or the folder of a package that has no file."""
    return str(getattr(module, "__file__", None) or [*getattr(module, "__path__", ()), ""][0])


class ReloadingHandlers:
    """The handlers in a file, loaded again when it, a Python file beside it, or a module that came with it changes.

    All modules of its folder are loaded anew together; a broken version leaves all from before in service. Threads and
    tasks that a version started go on.
    """

    def __init__(self, wanted: str) -> None:
        """Load what is wanted, as `find_handlers` takes it; raises what `load_handlers` raises."""
        self._foreign = dict(sys.modules)  # not ours to load again, kfserver itself among them
        self._place = find_handlers(wanted)  # found now: handlers may change the current folder
        self.path = ""
        before = self._stamp_files()  # so that a change while they are loaded is seen
        self.registry, self.path = load_handlers(self._place)
        self._seen = {**self._stamp_files(), **before}

    def _folder(self) -> str:
        return os.path.dirname(self.path or self._place)

    def _modules(self) -> Dict[str, ModuleType]:
        """The modules that came with the handlers and lie in their folder, by name."""
        start = (self._folder() or "\0") + os.sep
        found = {name: (module, _place_of(module)) for name, module in list(sys.modules.items())
                 if self._foreign.get(name) is not module}
        return {name: module for name, (module, place) in found.items() if place == self.path or place.startswith(start)
                and "-packages" not in place and not place.endswith(tuple(EXTENSION_SUFFIXES))}

    def _stamp_files(self) -> Dict[str, Tuple[int, int, int]]:
        """What changes when a file is written or replaced, of each file that is watched and there."""
        folder = self._folder()
        paths = {self.path or self._place, *map(_place_of, self._modules().values())}
        with contextlib.suppress(OSError):
            paths.update(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py"))
        stamps = {}
        for path in filter(os.path.isfile, paths):
            with contextlib.suppress(OSError):  # some editors remove a file before they write it
                status = os.stat(path)
                stamps[path] = status.st_mtime_ns, status.st_size, status.st_ino
        return stamps

    def poll(self) -> bool:
        """Whether there is a version that is new since the last call, and loads: `registry` is then its own. The log
        tells once of one that does not load."""
        self._place = self._place or find_handlers("")
        stamps = self._stamp_files()
        for place in map(_place_of, self._modules().values()):
            if place in stamps:  # maybe of a module that a handler has imported since
                self._seen.setdefault(place, stamps[place])
        if all(self._seen.get(path) == stamp for path, stamp in stamps.items()):
            return False
        self._seen = stamps
        kept = self._modules()
        for name, module in kept.items():
            del sys.modules[name]
            with contextlib.suppress(OSError, NotImplementedError):  # an edit in the same second would not be noticed
                os.unlink(importlib.util.cache_from_source(_place_of(module)))
        importlib.invalidate_caches()
        try:
            self.registry, self.path = load_handlers(self._place)
        except SettingsError as error:
            for name in self._modules():
                del sys.modules[name]
            sys.modules.update(kept)
            log.error("the handlers from before stay in service: %s", error)
            return False
        return True

    def watch(self, server: KfServer, later: Later) -> None:
        """Put new versions into service from now on; they are loaded on the threads of ``later``."""
        if self.poll():
            server.registry = self.registry
            log.info("%d handlers loaded again from %s", len(self.registry), self.path)
        later(WATCH_SECONDS, lambda: self.watch(server, later))

    def describe(self) -> List[str]:
        """How many handlers there are, from where, and each, in lines."""
        if not self.path:
            return ["0 handlers: no handlers.py here; every message is answered and dropped"]
        return [f"{len(self.registry)} handlers from {self.path}", *(f"  {rule}" for rule in self.registry.rules)]


# ---- 19 Chat --------------------------------------------------------------------------------------------------------
# Law: a terminal or a script in the place of the platform. Messages are made from bytes as those of a push, and replies
# go through the same `Outbox`; only the network is missing. Knows nothing of servers and settings.

# What can be typed after a slash, what must follow it, and what it does.
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


def _describe_failure(error: BaseException, handler: Optional[Handler] = None) -> str:
    """The traceback of an error; where no frame of it is the user's own, the place of the ``handler`` instead."""
    trace = _trace_of_handlers(error)
    place = f"{describe_handler(handler)}: " if handler and not trace.stack else ""
    return place + _format_trace(trace)


class PrintedReplies:
    """Works like a `SendApi`, but without a network: every reply is printed, and so arrives."""

    def send(self, open_id: str, answer: Answer) -> None:
        """Print an answer to the user."""
        answer = Text(answer) if isinstance(answer, str) else answer
        words = f"[image] {answer.url}" if isinstance(answer, Image) else answer.content
        # Further lines of a text are indented more than the first line of the next.
        _show(f"to {open_id}: {words}".replace("\n", "\n  "))

    def close(self) -> None:
        """There is nothing to close."""


class Chat:
    """A conversation with the handlers, printed as it goes. ``user`` is the openid of who writes; ``failures`` counts
    the messages whose handler failed, and the lines that were not understood."""

    def __init__(self, handlers: ReloadingHandlers) -> None:
        self.user = "user"
        self.failures = 0
        self._handlers = handlers
        self._api: Any = PrintedReplies()
        self._sessions: Dict[str, str] = {}  # in JSON, by openid
        # Microseconds, so that no later conversation has the same ids: handlers may remember what they have seen.
        self._ids = itertools.count(time.time_ns() // 1000)

    def take(self, line: str) -> None:
        """Do what a line says: a text to the handlers or, after a slash, a command. A blank line does nothing. Raises
        `EOFError` for /quit, as `input` does at the end."""
        if self._handlers.poll():
            _show(f"{len(self._handlers.registry)} handlers loaded again from {self._handlers.path}")
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            self._obey(name, rest.strip())
        elif line.strip(BLANKS):
            self._send(MsgType="text", MsgId=next(self._ids), Content=line[line.startswith("//"):])

    def _obey(self, name: str, rest: str) -> None:
        if name not in CHAT_COMMANDS:
            self._complain(f"no command /{name}: /help lists them; for a slash at the start of a text type two")
        elif CHAT_COMMANDS[name][0] and not rest:
            self._complain(f"write /{name} {CHAT_COMMANDS[name][0]}")
        elif name == "image":
            self._send(MsgType="image", MsgId=next(self._ids), PicUrl=rest)
        elif name == "event":
            event, *pairs = rest.split()
            if all("=" in pair for pair in pairs):
                self._send(MsgType="event", Event=event, **dict(pair.split("=", 1) for pair in pairs))
            else:
                self._complain("a field of an event is written NAME=VALUE, without blanks; /raw takes what has some")
        elif name == "raw":
            self._receive(rest)
        elif name == "as":
            self.user = rest
        elif name == "help":
            print(CHAT_HELP, flush=True)
        else:
            raise EOFError

    def _complain(self, text: str) -> None:
        self.failures += 1
        _show(text)

    def _send(self, **fields: Any) -> None:
        common = {"ToUserName": "app", "FromUserName": self.user, "CreateTime": int(time.time())}
        self._receive(json.dumps({**common, **fields}))

    def _receive(self, packet: str) -> None:
        """Handle a whole message, in JSON or XML, as a push brings it."""
        try:
            message = parse(packet.encode("utf-8", "replace"))
        except MalformedPush as error:
            self._complain(f"a server would refuse this: {error}")
            return
        message.key = dedup_key(message)
        message.outbox = Outbox(self._api, message)
        # A copy: what is done to it counts only if the handler returns.
        message.kept_session = json.loads(self._sessions.get(message.from_user_name, "{}"))
        taken_by: List[Handler] = []
        failure = attempt(self._run, message, taken_by)
        if failure:
            self._complain(_describe_failure(failure, *taken_by))
            for another in self._handlers.registry.handle_error(message, failure):
                _show(_describe_failure(another))

    def _run(self, message: Message, taken_by: List[Handler]) -> None:
        """Show and run the handler that takes the message, which is put into ``taken_by``; raises what it raises."""
        registry = self._handlers.registry
        match = registry.find(message)
        if not match:
            _show(f"nobody takes this; to take it, write: {decorator_for(message)}")
            return
        taken_by.append(match.handler)
        for rule in registry.rules_of(match.handler):
            _show(rule)
        answers = registry.run(match, message)
        session = encode_session(message.session) or "{}"
        message.reply(answers)
        self._sessions[message.from_user_name] = session


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
    """Talk to the handlers until the input ends. 0 from a terminal; from a script, whose lines are printed after their
    user's name, 1 if anything in it failed. Ctrl-C at a terminal gives up a line, or a handler that does not come back.
    Raises `SettingsError` when the handlers cannot be loaded."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # before the handlers, which may have a neighbour of that name
            importlib.import_module("readline")  # its presence gives input() editing and history
    handlers = ReloadingHandlers(arguments.handlers or os.environ.get("KF_HANDLERS", ""))
    if is_terminal:
        print(f"{handlers.describe()[0]}; /help lists what can be typed", flush=True)
    talk = Chat(handlers)
    while True:
        try:
            line = input(f"{talk.user}> " if is_terminal else "")
            if line.strip(BLANKS) and not is_terminal:
                print(f"{talk.user}: {line}", flush=True)
            talk.take(line)
        except EOFError:
            print(end="\n" if is_terminal else "")
            return 1 if talk.failures and not is_terminal else 0
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print("\n  interrupted; /quit ends", flush=True)


# ---- 20 Journal command ---------------------------------------------------------------------------------------------
# Law: tells what is in a journal, and puts the dead back. Works beside the server that writes the file; shows a user's
# words only on request.

Report = Dict[str, Any]
_REQUEUE = "UPDATE messages SET state = 0, tries = 0, error = NULL WHERE state = 2"


def build_journal_parser() -> argparse.ArgumentParser:
    """The parser of ``kfserver.py journal``."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py journal", allow_abbrev=False,
        description="Tells what waits in a journal and what failed for good. A server may run on it meanwhile.")
    parser.add_argument("journal", metavar="FILE", help="the file of --journal, as kf.db")
    parser.add_argument("--requeue", action="store_true",
                        help="put back what failed for good: it is handled, or its replies are sent, at the next start")
    parser.add_argument("--show", action="store_true",
                        help="show the messages, the replies and the unreadable pushes too, with what users wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object; times are Unix seconds")
    return parser


def journal_command(arguments: argparse.Namespace) -> int:
    """Print what is in the journal, after putting the dead back if that is asked for; 0. Raises `SettingsError`."""
    import sqlite3
    path = os.path.realpath(arguments.journal)
    if not os.path.exists(path):
        raise SettingsError(f"there is no journal {arguments.journal}")
    try:
        refuse_foreign_file(path)
        with contextlib.closing(connect_journal(path, "ro")) as db:
            if 0 < db.execute("PRAGMA user_version").fetchone()[0] < JOURNAL_VERSION:
                raise SettingsError(f"the journal {path} is of an older kfserver: start the server once, which updates "
                                    "it")
            requeued = 0
            if arguments.requeue:
                # `db`, which can only read, stays open longer: who closes the file last would delete its log, and the
                # locks that keep the server's log alive may have been lost.
                with contextlib.closing(connect_journal(path, "rw")) as writer:
                    requeued = writer.execute(_REQUEUE).rowcount
            report = _report_journal(db, requeued, arguments.show)
    except (sqlite3.Error, OSError) as error:
        raise SettingsError(f"cannot use the journal {arguments.journal}: {error}") from error
    print(json.dumps(report, indent=2) if arguments.json else _format_report(report))
    return 0


def _report_journal(db: sqlite3.Connection, requeued: int, show: bool) -> Report:
    """What the command tells, as JSON prints it."""
    def tell(row: Row) -> Report:
        told: Report = {"key": row.key, "received": row.received, "tries": row.tries, "error": row.error,
                        "handled": bool(row.replies)}
        shown = {"content": row.payload.decode("utf-8", "backslashreplace"), "replies": row.replies}
        return {**told, **shown} if show else told
    db.execute("BEGIN")  # one moment's view, though a server writes meanwhile
    waiting, dead, unreadable = ([tell(row) for row in read_rows(db, state)] for state in (WAITING, DEAD, UNREADABLE))
    finished, sessions = (db.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0]
                          for what in (f"messages WHERE state = {FINISHED}", "sessions WHERE value != ''"))
    return {"requeued": requeued, "waiting": len(waiting), "finished": finished, "dead": len(dead),
            "unreadable": len(unreadable), "sessions": sessions, "oldest_waiting": waiting[0] if waiting else None,
            "waiting_messages": waiting if show else None, "dead_messages": dead,
            "unreadable_pushes": unreadable if show else None}


def _format_report(report: Report) -> str:
    """The report for people; characters that could steer a terminal are written as escapes."""
    def line(what: str, row: Report) -> str:
        received = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["received"]))
        facts = [f"{what}: {row['key']} received {received}", "handled, replies to send" * row["handled"], row["error"]]
        texts = [", ".join(filter(None, facts)), row.get("content"), row.get("replies")]
        return "\n    ".join(printable(text) for text in texts if text)
    lines = [f"{name:<10}{report[name]:>6}" for name in ("waiting", "finished", "dead", "unreadable", "sessions")]
    if report["requeued"]:
        lines.insert(0, f"{report['requeued']} put back, to be handled when the server starts the next time")
    waiting = report["waiting_messages"] or [report["oldest_waiting"]]
    lines += [line(f"waiting for {time.time() - row['received']:.0f} s", row) for row in waiting if row]
    lines += [line("dead", row) for row in report["dead_messages"]]
    return "\n".join([*lines, *(line("unreadable", row) for row in report["unreadable_pushes"] or [])])


# ---- 21 Command line ------------------------------------------------------------------------------------------------
# Law: arguments and environment in, an exit status out; the process's own logs and signals. Uses every section; no
# section uses it.

# Log records that wait to be written at most, about 200 KB: a stderr that nobody reads must not fill the memory.
MAX_LOG_RECORDS = 1000
# Seconds that the thread that writes logs sleeps before it writes, so that it is woken once for many records.
LOG_PAUSE = 0.01
# Seconds for the last records at the exit: maybe nobody reads them.
LOG_EXIT_SECONDS = 2.0
# Seconds in which different signals count as one: Ctrl-C reaches all of a process group, and then a supervisor there
# sends SIGTERM.
ONE_END_SECONDS = 1.0
# Variables that Kubernetes makes for a service called kf, or kf-anything: KF_PORT=tcp://10.0.0.1:80 and others.
_OF_KUBERNETES = re.compile(r"KF_(\w+_)?(SERVICE_|PORT_\d)\w+=|KF_(\w+_)?PORT=\w+://")


def read_setting(name: str, text: str) -> Any:
    """The value that a text on the command line or in the environment means for a setting. Raises `SettingsError`."""
    field = SETTING_FIELDS[name]
    if field.metadata["choices"]:
        text = text.strip().lower()
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    convert: Mapping[str, Callable[[str], Any]] = {
        "int": int, "float": float, "bool": lambda word: words[word.strip().lower()]}
    value: Any = text
    with contextlib.suppress(ValueError, KeyError):  # of the wrong type, as the check says
        value = convert.get(str(field.type), str)(text)
    check_setting(field, value)
    return value


def read_settings(arguments: Mapping[str, Any], environment: Mapping[str, str]) -> Settings:
    """The settings: an argument beats the environment, which beats the default. Raises `SettingsError`."""
    given = {name: text for name in SETTING_FIELDS for text in [environment.get(f"KF_{name.upper()}")]
             if text and not is_foreign(f"KF_{name.upper()}", text)}
    given.update({name: text for name, text in arguments.items() if name in SETTING_FIELDS and text is not None})
    return Settings(**{name: read_setting(name, text) for name, text in given.items()})


def is_foreign(name: str, text: str) -> bool:
    """Whether a variable is not meant for us, though it begins like ours: it comes from Kubernetes."""
    return bool(_OF_KUBERNETES.match(f"{name}={text}"))


def find_command(arguments: Sequence[str]) -> Tuple[str, Sequence[str]]:
    """The command that the arguments begin with, and the other arguments. Without a command it is ``serve``;
    ``help push`` is ``push --help``. Raises `SettingsError` for an unknown word, with the command that is near it.
    """
    if not arguments or arguments[0].startswith("-"):
        return "serve", arguments
    word = arguments[0].lower()
    if word == "help":
        return find_command(arguments[1:2])[0], ["--help"]
    if word in COMMANDS:
        return word, arguments[1:]
    there_are = f"there are {', '.join(COMMANDS)}, help"
    raise SettingsError(f"no command {arguments[0]!r}: {_suggest(word, [*COMMANDS, 'help'], there_are)}")


def _suggest(word: str, known: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}?" if near else otherwise


def parse_arguments(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """What the parser reads. Raises `SettingsError` for an unknown option, with the one that is near it and without its
    value, which may be a secret."""
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        name, see_help = unknown[0].partition("=")[0], f"see {parser.prog} --help"
        raise SettingsError(
            f"no option {name}: {_suggest(name.lower(), parser._option_string_actions, see_help)}"
            if name.startswith("-") else f"one argument too many: {name!r}; {see_help}")
    return parsed


def build_parser() -> argparse.ArgumentParser:
    """The parser of the serving command: an option for each setting, kept as text for `read_setting`."""
    parser = argparse.ArgumentParser(
        prog="kfserver.py", allow_abbrev=False, usage="kfserver.py [serve|push|chat|journal|help] [options]",
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
    """A log record as one JSON object: time (RFC 3339), level, message, and the record's values, each by its name."""

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        values = record.args if isinstance(record.args, dict) else {}
        line = {str(name): round(value, 3) if isinstance(value, float) else value for name, value in values.items()}
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line.update(time=moment.isoformat(timespec="milliseconds"), level=record.levelname.lower(),
                    message=record.getMessage())
        if record.exc_info and record.exc_info[1]:
            line.setdefault("error", str(record.exc_info[1]))
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class LogWriter(logging.Handler):
    """Writes log records to stderr on a thread of its own: who logs never waits for who reads.

    At most MAX_LOG_RECORDS wait; more are dropped and counted. A forked child has no such thread and writes by itself.
    """

    def __init__(self, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._process = os.getpid()
        # Guards all here; told when lines come, and when they are written. `logging` holds its lock around `emit`, and
        # around `flush` at the exit, and makes it free in a forked child.
        self._changed = threading.Condition(self.lock)
        self._lines: List[str] = []  # not written yet
        self._dropped = 0
        threading.Thread(target=self._work, name="kfserver-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record. One that cannot be formatted is told of, and does not disturb who logs."""
        error = attempt(self._take, record)
        if error:
            log.warning("a log record of %s cannot be formatted: %s", record.name, type(error).__name__)

    def _take(self, record: logging.LogRecord) -> None:
        if os.getpid() != self._process:
            write_log(self.format(record) + "\n")
        elif len(self._lines) >= MAX_LOG_RECORDS:
            self._dropped += 1
        else:
            self._lines.append(self.format(record) + "\n")  # formatted here: later, its values may have changed
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._lines)
            time.sleep(LOG_PAUSE)
            lines = self._lines[:]
            write_log("".join(lines))
            with self._changed:
                del self._lines[:len(lines)]
                if self._dropped:
                    log.warning("%d log records dropped", self._dropped)
                self._dropped = 0
                self._changed.notify_all()

    def flush(self) -> None:
        """Wait until all is written, LOG_EXIT_SECONDS at most; `logging.shutdown` calls this at the exit."""
        if os.getpid() == self._process:
            with self._changed:
                self._changed.wait_for(lambda: not self._lines, LOG_EXIT_SECONDS)


def write_log(text: str) -> None:
    """Write to stderr, however long that takes. What cannot be written is lost: there is nowhere to tell it.

    Not by sys.stderr: its lock would be held while a write is blocked, and Python waits for that lock at its exit.
    """
    data = text.encode(sys.stderr.encoding or "utf-8", "backslashreplace")
    while data:
        try:
            data = data[os.write(2, data):]
        except BlockingIOError:  # who shares it has made it so
            time.sleep(LOG_PAUSE)
        except OSError:
            return


def end_at_signals() -> None:
    """Have SIGTERM, SIGINT and, from a terminal that closes, SIGHUP end the process: the first raises KeyboardInterrupt
    in the main thread, which then ends in order; a second one ends the process at once. Different ones within
    ONE_END_SECONDS are one."""
    came: Dict[int, float] = {}  # when each came, by the monotonic clock

    def take(number: int, frame: object) -> None:
        now = time.monotonic()
        if number in came or now - min(came.values(), default=now) > ONE_END_SECONDS:
            os._exit(1)
        came[number] = now
        if len(came) == 1:
            raise KeyboardInterrupt
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup
        numbers.append(signal.SIGHUP)
    for number in numbers:
        before = signal.signal(number, take) or signal.SIG_DFL
        if hasattr(os, "register_at_fork"):  # a forked child ends as it would without us
            os.register_at_fork(after_in_child=functools.partial(signal.signal, number, before))


def serve(arguments: argparse.Namespace) -> int:
    """Run the server until a signal ends it; 0 if every message was handled, 1 if some were left undone."""
    settings = read_settings(vars(arguments), os.environ)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler = LogWriter(JsonFormatter() if settings.log_format == "json" else text)
    logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
    try:
        handlers = ReloadingHandlers(settings.handlers)
        if not arguments.check:
            return _serve(settings, handlers)
        check_parts(settings, handlers.registry)
    except SettingsError as error:
        if settings.log_format != "json":
            raise
        log.error("%s", error)
        return 2
    print("\n".join(handlers.describe()))
    return 0


def _serve(settings: Settings, handlers: ReloadingHandlers) -> int:
    is_shown = sys.stdout.isatty() and not (settings.app_key or settings.access_token)
    server = KfServer(handlers.registry, settings, api=PrintedReplies() if is_shown else None).start()
    with contextlib.suppress(KeyboardInterrupt):  # the first signal raises it here
        end_at_signals()
        facts = [*_describe_start(server), *handlers.describe()]
        _print_start(settings, [*((logging.INFO, line) for line in facts),
                                *((logging.WARNING, line) for line in _advice(settings, os.environ, is_shown))])
        if settings.reload:
            handlers.watch(server, call_later)
        while True:
            time.sleep(1.0)  # not for ever: a signal in the moment before it is only noticed at its end
    log.info("shutting down: %g s for the messages that wait; a second signal ends at once", settings.grace)
    undone = server.stop()
    for key in undone:
        log.warning("left undone: key=%(key)s", {"key": key})
    release_stdout()
    return 1 if undone else 0


def _describe_start(server: KfServer) -> Iterator[str]:
    """Where the server listens, and where its other parts are."""
    yield f"kfserver {__version__} listening on {server.url}"
    host, _, port = server.settings.admin.rpartition(":")
    if port:
        everywhere = "" if host else ", at all addresses of this machine"
        yield f"admin on http://{host or '0.0.0.0'}:{server.admin_port}/{everywhere}"
    if server.settings.journal:
        yield f"journal in {os.path.abspath(server.settings.journal)}"


def _print_start(settings: Settings, told: Iterable[Tuple[int, str]]) -> None:
    """Print lines, each with its level, in one write: what handlers print must not come between."""
    form = JsonFormatter() if settings.log_format == "json" else logging.Formatter("%(message)s")
    records = [log.makeRecord(log.name, level, "", 0, line, (), None) for level, line in told]
    try:
        print("\n".join(map(form.format, records)), flush=True)
    except OSError as error:  # a full disk, or who read it has left: the server is needed all the same
        log.warning("cannot write to stdout: %s", error.strerror)


def check_parts(settings: Settings, registry: HandlerRegistry) -> None:
    """Raise `SettingsError` for a part that could not be made, and warn as a start would. Tries what the start would
    use, but for the port and the right to write the journal, which a server may have."""
    KfServer(registry, settings)  # the cipher, the access to the send API
    check_redis(settings)
    if settings.tls_cert:
        make_tls_context(settings)
    if settings.journal:
        _check_journal(settings.journal)


def _check_journal(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    if not (os.access(folder, os.W_OK) and (os.access(path, os.W_OK) or not os.path.exists(path))):
        raise SettingsError(f"cannot write the journal {path}: make its folder, and let this user write there, or name "
                            "another --journal")
    refuse_foreign_file(path)


def _advice(settings: Settings, environment: Mapping[str, str], is_shown: bool) -> Iterator[str]:
    """What an operator may have overlooked; ``is_shown``: whether replies are printed."""
    known = [f"KF_{name.upper()}" for name in SETTING_FIELDS]
    for name in sorted(name for name in environment if name.startswith("KF_")):
        if is_foreign(name, environment[name]):
            if name in known:
                yield f"{name} in the environment comes from Kubernetes and is not a setting"
        elif name not in known:
            yield f"{name} in the environment is not a setting: {_suggest(name, known, 'see kfserver.py --help')}"
    if not settings.token:
        yield "no token is set: anyone who reaches this port can push; set --token (KF_TOKEN)"
    if not (settings.app_key or settings.access_token):
        yield "no --app-key is set: what handlers return is not sent to users" + (
            ", but printed here" if is_shown else "")


def _prepare_streams() -> None:
    """Make stdin, stdout and stderr fit for a server.

    A closed one becomes /dev/null: else the next file or socket gets its number, and what is written to it. A printed
    line appears at once, in a pipe or a file too. What an encoding does not know is read as U+FFFD or printed escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False))
        stream, is_output = getattr(sys, name), mode == "w"
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace" if is_output else "replace", line_buffering=is_output)


def release_stdout() -> None:
    """Flush stdout, and if it cannot be written, forget what waits there, or Python would fail at its exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The parser of each command, and what runs it and gives the exit status.
COMMANDS: Mapping[str, Tuple[Callable[[], argparse.ArgumentParser], Callable[[argparse.Namespace], int]]] = (
    MappingProxyType({"serve": (build_parser, serve), "push": (build_push_parser, push),
                      "chat": (build_chat_parser, chat), "journal": (build_journal_parser, journal_command)}))


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """The whole program, with the command line's arguments or others; the exit status."""
    _prepare_streams()
    try:
        command, rest = find_command(sys.argv[1:] if arguments is None else arguments)
        build, run = COMMANDS[command]
        return run(parse_arguments(build(), rest))
    except SettingsError as error:
        print(f"kfserver: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells count it: 128 and the signal's number
    except BrokenPipeError:  # who read our output has left
        release_stdout()
        return 141


if __name__ == "__main__":
    # handlers.py imports this module by its name: without the alias it would get a second copy of every class.
    sys.modules["kfserver"] = sys.modules["__main__"]
    sys.exit(main())

