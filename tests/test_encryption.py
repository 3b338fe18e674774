"""Safe mode: the cipher against published vectors, the envelope against all that can be wrong with it, and both behind
a real server. What is said of them holds for our own AES and for the library's alike."""

from __future__ import annotations

import base64
import contextlib
import importlib
import json
import logging
import os
import pathlib
import random
import re
import sys
import warnings
from typing import Any, Callable, Dict, Iterator, List, Mapping, Tuple
from urllib.parse import urlencode

import pytest
from conftest import NOW, World, signed_query
from support import PATIENCE, PUBLISHED, PUSHES, Answer, Client, local, post, push

import kfserver
from kfserver import (
    Aes256Cbc,
    Envelope,
    ForbiddenPush,
    HandlerRegistry,
    KfServer,
    LibraryAes256Cbc,
    Message,
    Request,
    decode_aes_key,
    library_trouble,
    make_cipher,
    parse,
    sign,
)

SEALED = PUBLISHED["encrypted"][0]
TOKEN, KEY, APP_ID = SEALED["token"], SEALED["encoding_aes_key"], SEALED["app_id"]
SAFE: Dict[str, Any] = {"token": TOKEN, "aes_key": KEY, "app_id": APP_ID}
RANDOM_HEAD = bytes(range(16))
BODY = push(content="hello")


def has_library() -> bool:
    """Whether the cryptography package is installed. That it warns of old Pythons is no error of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(ImportError):
            importlib.import_module("cryptography.hazmat.primitives.ciphers")
            return True
    return False


needs_library = pytest.mark.skipif(not has_library(), reason="the cryptography package is not installed")
CIPHERS = [pytest.param(Aes256Cbc, id="ours"), pytest.param(LibraryAes256Cbc, id="library", marks=needs_library)]
Cipher = Callable[[bytes], Any]


@pytest.fixture(params=CIPHERS)
def cipher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cipher:
    """Each cipher in turn, which is also the one that envelopes made by the test use."""
    made: Cipher = request.param
    monkeypatch.setattr(kfserver, "make_cipher", made)
    return made


def add(one: bytes, other: bytes) -> bytes:
    """The exclusive or of two blocks."""
    return bytes(a ^ b for a, b in zip(one, other))


# ---- AES-256, a block at a time

FIPS_197_KEY = bytes(range(32))
SP_800_38A_KEY = bytes.fromhex("603deb1015ca71be2b73aef0857d7781 1f352c073b6108d72d9810a30914dff4")
SP_800_38A_PLAIN = ["6bc1bee22e409f96e93d7e117393172a", "ae2d8a571e03ac9c9eb76fac45af8e51",
                    "30c81c46a35ce411e5fbc1191a0a52ef", "f69f2445df4f9b17ad2b417be66c3710"]
SP_800_38A_ECB = ["f3eed1bdb5d2a03c064b5a7e3db181f8", "591ccb10d410ed26dc5ba74a31362870",
                  "b6ed21b99ca6f4f9f153e7b1beafed1d", "23304b7a39f9f3ff067d8d8f9e24ecc7"]
SP_800_38A_CBC = ["f58c4c04d6e5f1ba779eabfb5f7bfbd6", "9cfc4e967edb808d679f777bc6702c7d",
                  "39f23369a9d9bacfa530e26304231461", "b2eb05e2c39be9fcda6c19078c6a9d1b"]

BLOCKS = [
    pytest.param(FIPS_197_KEY, "00112233445566778899aabbccddeeff", "8ea2b7ca516745bfeafc49904b496089",
                 id="FIPS 197, C.3"),
    *[pytest.param(SP_800_38A_KEY, plain, encrypted, id=f"SP 800-38A, F.1.5, block {number}")
      for number, (plain, encrypted) in enumerate(zip(SP_800_38A_PLAIN, SP_800_38A_ECB), 1)],
]


@pytest.mark.parametrize(("key", "plain", "encrypted"), BLOCKS)
def test_aes_256_of_a_block(cipher: Cipher, key: bytes, plain: str, encrypted: str) -> None:
    # The ciphers add their iv, the key's first half, to the first block: added before, it is gone.
    block = add(bytes.fromhex(plain), key[:16])
    assert cipher(key).encrypt(block).hex() == encrypted
    assert cipher(key).decrypt(bytes.fromhex(encrypted)) == block


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_aes_256_cbc_of_the_vector(cipher: Cipher, count: int) -> None:
    # SP 800-38A, F.2.5 and F.2.6, whose iv is 00 01 02 … 0f.
    plain, encrypted = (bytes.fromhex("".join(blocks[:count])) for blocks in (SP_800_38A_PLAIN, SP_800_38A_CBC))
    plain = add(add(plain[:16], bytes(range(16))), SP_800_38A_KEY[:16]) + plain[16:]
    assert cipher(SP_800_38A_KEY).encrypt(plain) == encrypted
    assert cipher(SP_800_38A_KEY).decrypt(encrypted) == plain


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 100])
def test_aes_256_cbc_decrypts_what_it_encrypted(cipher: Cipher, count: int) -> None:
    chance = random.Random(count)
    key, data = (chance.getrandbits(8 * size).to_bytes(size, "big") for size in (32, 16 * count))
    assert cipher(key).decrypt(cipher(key).encrypt(data)) == data


@needs_library
@pytest.mark.parametrize("seed", range(20))
def test_aes_256_cbc_is_that_of_the_library(seed: int) -> None:
    chance = random.Random(seed)
    key, data = (chance.getrandbits(8 * size).to_bytes(size, "big") for size in (32, 16 * chance.randint(1, 40)))
    assert Aes256Cbc(key).encrypt(data) == LibraryAes256Cbc(key).encrypt(data)
    assert Aes256Cbc(key).decrypt(data) == LibraryAes256Cbc(key).decrypt(data)


@pytest.mark.parametrize(("value", "substitute"), [
    (0x00, 0x63), (0x01, 0x7c), (0x0f, 0x76), (0x10, 0xca), (0x52, 0x00), (0x53, 0xed), (0x7c, 0x10), (0x80, 0xcd),
    (0xf0, 0x8c), (0xff, 0x16)], ids=lambda value: f"{value:02x}")
def test_substitution_box_is_that_of_the_standard(value: int, substitute: int) -> None:
    assert kfserver._substitution_box()[value] == substitute  # FIPS 197, figure 7


def test_substitution_box_takes_every_value_once_and_none_to_itself_or_its_opposite() -> None:
    box = kfserver._substitution_box()
    assert sorted(box) == list(range(256))
    assert {0x00, 0xff}.isdisjoint(value ^ substitute for value, substitute in enumerate(box))


@pytest.mark.parametrize(("modules", "kind"), [
    pytest.param({}, LibraryAes256Cbc, id="installed", marks=needs_library),
    pytest.param({"cryptography": None}, Aes256Cbc, id="not installed"),
])
def test_make_cipher_takes_the_library_where_it_is_installed(
        modules: Mapping[str, Any], kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in modules]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert type(make_cipher(bytes(32))) is kind


# What can be wrong with the package, as it was met: its import panics in Rust, which raises no Exception; a shared
# library is missing; a part is missing; its versions up to 3.0 want a backend; what comes out is wrong.
BROKEN: Dict[str, str] = {
    "its import panics": "class PanicException(BaseException): pass\nraise PanicException('Python API call failed')",
    "its import fails": "raise ImportError('libffi.so.7: cannot open shared object file')",
    "a part is missing": "import cryptography.hazmat.bindings",
    "it wants a backend": "class Cipher:\n def __init__(self, algorithm, mode, backend): pass",
    "it does nothing": ("class Cipher:\n def __init__(self, algorithm, mode): pass\n"
                        " encryptor = decryptor = lambda self: self\n"
                        " update = lambda self, data: data\n finalize = lambda self: b''"),
    "it exits": "raise SystemExit(3)",
}


@pytest.fixture(params=BROKEN.values(), ids=BROKEN.keys())
def broken_library(
        request: pytest.FixtureRequest, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cryptography package is installed, and cannot be used."""
    folder = tmp_path / "cryptography" / "hazmat" / "primitives"
    (folder / "ciphers").mkdir(parents=True)
    for each in (folder, folder.parent, folder.parent.parent):
        (each / "__init__.py").touch()
    (folder / "ciphers" / "__init__.py").write_text(
        "import types\nalgorithms = types.SimpleNamespace(AES=bytes)\nmodes = types.SimpleNamespace(CBC=bytes)\n"
        + request.param)
    real = forget_library()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    forget_library()
    sys.modules.update(real)


def forget_library() -> Dict[str, Any]:
    """Take the package's modules out of those that are imported."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "cryptography"}


@pytest.mark.usefixtures("broken_library")
def test_make_cipher_does_without_a_library_that_does_not_work() -> None:
    assert type(make_cipher(bytes(32))) is Aes256Cbc


@pytest.mark.usefixtures("broken_library")
def test_endpoint_warns_once_of_a_library_that_does_not_work(caplog: pytest.LogCaptureFixture) -> None:
    world = World(**SAFE)
    assert [world.ask(in_query(write_json, seal())).status for _ in range(2)] == [200, 200]
    assert len([record for record in caplog.records if record.levelno == logging.WARNING]) == 1
    assert f"cryptography package cannot be used ({library_trouble()})" in caplog.text


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_library), False])
def test_library_trouble_is_none_where_the_library_works_or_is_missing(
        installed: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    if not installed:
        for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setitem(sys.modules, "cryptography", None)
    assert library_trouble() == ""
    World(**SAFE)
    assert caplog.text == ""


# ---- Envelope


def encrypt(plaintext: bytes, key: str = KEY) -> str:
    """What Encrypt holds when its plaintext is just this, an envelope or not."""
    return base64.b64encode(kfserver.make_cipher(decode_aes_key(key)).encrypt(plaintext)).decode()


def decrypt(sealed: str) -> bytes:
    """The plaintext of Encrypt, with all that is around the message."""
    return kfserver.make_cipher(decode_aes_key(KEY)).decrypt(base64.b64decode(sealed))  # type: ignore[no-any-return]


def plaintext(message: bytes = BODY, length: int = len(BODY), app_id: str = APP_ID) -> bytes:
    """An envelope's plaintext without its padding, in which the length need not be true."""
    return RANDOM_HEAD + length.to_bytes(4, "big") + message + app_id.encode()


def pad(data: bytes, padding: int = 0) -> bytes:
    """The data with the padding that it needs, or with so many bytes of it."""
    padding = padding or 32 - len(data) % 32
    return data + bytes([padding]) * padding


@pytest.mark.parametrize("length", range(32))
def test_envelope_seal_pads_to_32_bytes_and_open_takes_it_off(cipher: Cipher, length: int) -> None:
    envelope, message = Envelope(KEY, APP_ID), b"x" * length
    sealed = envelope.seal(message, RANDOM_HEAD)
    assert decrypt(sealed) == pad(plaintext(message, length))
    assert envelope.open(sealed) == message


def test_envelope_paddings_of_all_lengths_are_among_those_that_were_tested() -> None:
    assert {32 - len(plaintext(b"x" * length, length)) % 32 for length in range(32)} == set(range(1, 33))


@pytest.mark.parametrize("padding", [1, 15, 16])
def test_envelope_open_takes_padding_to_16_bytes(cipher: Cipher, padding: int) -> None:
    # AES itself needs no more, and senders that follow PKCS #7 to the letter write no more.
    message = b"x" * (-len(plaintext(b"", 0)) - padding + 160)
    assert Envelope(KEY, APP_ID).open(encrypt(pad(plaintext(message, len(message)), padding))) == message


@pytest.mark.parametrize("message", [b"", b"\x00" * 50, bytes(range(256)), APP_ID.encode(), "你好".encode() * 1000, *[
    pytest.param(body, id=name) for name, body in PUSHES.items()]], ids=lambda message: ascii(message)[:16])
def test_envelope_open_gives_what_seal_was_given(cipher: Cipher, message: bytes) -> None:
    envelope = Envelope(KEY, APP_ID)
    assert envelope.open(envelope.seal(message, RANDOM_HEAD)) == message


def test_envelope_open_of_the_published_vector(cipher: Cipher) -> None:
    assert Envelope(KEY, APP_ID).open(json.loads(SEALED["body"])["Encrypt"]) == SEALED["plaintext"].encode()


@pytest.mark.parametrize("lay_out", [
    pytest.param(lambda text: f" {text} ", id="blanks around"),
    pytest.param(lambda text: f"\r\n{text}\n\t", id="newlines around"),
    pytest.param(lambda text: "\n".join(re.findall(".{1,64}", text)), id="in lines of 64"),
    pytest.param(lambda text: "\r\n".join(re.findall(".{1,76}", text)), id="in lines of 76"),
    pytest.param(" ".join, id="a blank between any two characters"),
])
def test_envelope_open_takes_blanks_for_layout(cipher: Cipher, lay_out: Callable[[str], str]) -> None:
    envelope = Envelope(KEY, APP_ID)
    assert envelope.open(lay_out(envelope.seal(BODY, RANDOM_HEAD))) == BODY


@pytest.mark.parametrize("last", ["A", "B", "C", "D"])
def test_envelope_opens_under_a_key_with_spare_bits(cipher: Cipher, last: str) -> None:
    # 43 characters hold 258 bits, two more than the key: what those two are makes no difference.
    key = "abcdefghijklmnopqrstuvwxyz0123456789ABCDE/"
    assert Envelope(key + last, APP_ID).open(Envelope(key + "A", APP_ID).seal(BODY, RANDOM_HEAD)) == BODY


GOOD = plaintext()
FAILURES: Dict[str, Tuple[Callable[[], str], str]] = {
    "not ASCII": (lambda: "é", "not base64"),
    "a character of no base64": (lambda: "*" + encrypt(pad(GOOD)), "not base64"),
    "the alphabet for URLs": (lambda: "--__" * 16, "not base64"),
    "a character missing": (lambda: encrypt(pad(GOOD))[:-3], "not base64"),
    "filling missing": (lambda: encrypt(pad(GOOD)[:32]).rstrip("="), "not base64"),
    "filling in the middle": (lambda: "AA==" + encrypt(pad(GOOD)), "not base64"),
    "only filling": (lambda: "====", "not base64"),
    "half a character": (lambda: "\ud800", "not base64"),
    "nothing": (lambda: "", "not made of complete AES blocks"),
    "blanks": (lambda: " \r\n", "not made of complete AES blocks"),
    "a byte too few": (lambda: base64.b64encode(bytes(63)).decode(), "not made of complete AES blocks"),
    "a byte too many": (lambda: base64.b64encode(bytes(65)).decode(), "not made of complete AES blocks"),
    "another key": (lambda: encrypt(pad(GOOD), "B" * 43), "wrong padding"),
    "padding of 0": (lambda: encrypt(GOOD.ljust(160, b"\x00")), "wrong padding"),
    "padding of 33": (lambda: encrypt(pad(b"x" * 31, 33)), "wrong padding"),
    "padding of 255": (lambda: encrypt(pad(b"x", 255)), "wrong padding"),
    "padding of different bytes": (lambda: encrypt(pad(GOOD)[:-2] + b"\x00" + pad(GOOD)[-1:]), "wrong padding"),
    "padding of more than there is": (lambda: encrypt(b"\x20" * 16), "wrong padding"),
    "padding and nothing else": (lambda: encrypt(pad(b"", 32)), "wrong length"),
    "no room for a length": (lambda: encrypt(pad(bytes(15), 1)), "wrong length"),
    "half a length": (lambda: encrypt(pad(bytes(18), 14)), "wrong length"),
    "length into the padding": (lambda: encrypt(pad(plaintext(length=len(BODY) + len(APP_ID) + 1))), "wrong length"),
    "length beyond the end": (lambda: encrypt(pad(plaintext(length=10 ** 6))), "wrong length"),
    "largest length": (lambda: encrypt(pad(plaintext(length=2 ** 32 - 1))), "wrong length"),
    "length too small by one": (lambda: encrypt(pad(plaintext(length=len(BODY) - 1))), "sealed for another app"),
    "length too large by one": (lambda: encrypt(pad(plaintext(length=len(BODY) + 1))), "sealed for another app"),
    "length over the app id": (lambda: encrypt(pad(plaintext(length=len(BODY + APP_ID.encode())))),
                               "sealed for another app"),
    "another app": (lambda: encrypt(pad(plaintext(app_id="other"))), "sealed for another app"),
    "an app whose id begins alike": (lambda: encrypt(pad(plaintext(app_id=APP_ID + "0"))), "sealed for another app"),
    "an app in capitals": (lambda: encrypt(pad(plaintext(app_id=APP_ID.upper()))), "sealed for another app"),
    "an app that is not ASCII": (lambda: encrypt(pad(plaintext(app_id="é"))), "sealed for another app"),
    "no app": (lambda: encrypt(pad(plaintext(app_id=""))), "sealed for another app"),
}


@pytest.mark.parametrize(("make", "reason"), FAILURES.values(), ids=FAILURES.keys())
def test_envelope_open_refuses_for_a_reason_that_only_the_log_tells(
        cipher: Cipher, make: Callable[[], str], reason: str) -> None:
    with pytest.raises(ForbiddenPush) as refused:
        Envelope(KEY, APP_ID).open(make())
    assert reason in str(refused.value)
    assert (refused.value.status, refused.value.public) == (403, "forbidden")


@pytest.mark.parametrize("app_ids", [APP_ID, f"{APP_ID},other", f"other,{APP_ID}", f" other , {APP_ID} "])
def test_envelope_open_takes_each_of_several_app_ids(cipher: Cipher, app_ids: str) -> None:
    assert Envelope(KEY, app_ids).open(seal()) == BODY


def test_envelope_seal_uses_the_first_of_several_app_ids(cipher: Cipher) -> None:
    assert Envelope(KEY, APP_ID).open(Envelope(KEY, f" {APP_ID} , other").seal(BODY, RANDOM_HEAD)) == BODY


@pytest.mark.parametrize("app_id", ["other,more", f"{APP_ID},other", "", ","])
def test_envelope_open_takes_no_list_and_no_empty_id(cipher: Cipher, app_id: str) -> None:
    with pytest.raises(ForbiddenPush, match="another app"):
        Envelope(KEY, "other,more").open(encrypt(pad(plaintext(app_id=app_id))))


@pytest.mark.parametrize("found, shown", [
    ("17328232", "17328232"), ("a.b-c_d", "a.b-c_d"), ("", "not readable"), ("x" * 65, "not readable"),
    ("a b", "not readable"), ("a\nERROR forged", "not readable"), ("你好", "not readable"),
    ("\x1b[2J", "not readable")], ids=ascii)
def test_envelope_open_tells_the_id_that_it_found(cipher: Cipher, found: str, shown: str) -> None:
    with pytest.raises(ForbiddenPush) as refused:
        Envelope(KEY, APP_ID).open(encrypt(pad(plaintext(app_id=found))))
    assert str(refused.value) == f"sealed for another app, its id is {shown}"
    assert "--app-id" in refused.value.advice


# ---- Requests


def prove(encrypted: str, names: Tuple[str, str, str] = ("msg_signature", "timestamp", "nonce")) -> Dict[str, str]:
    """The message signature over Encrypt and what it is made from, under the names of a query or others."""
    return dict(zip(names, (sign(TOKEN, str(NOW), "nonce", encrypted), str(NOW), "nonce")))


def write_xml(fields: Mapping[str, str]) -> bytes:
    """The fields as the platform writes XML."""
    elements = "".join(f"<{name}><![CDATA[{value}]]></{name}>" for name, value in fields.items())
    return f"<xml>{elements}</xml>".encode()


def write_json(fields: Mapping[str, str]) -> bytes:
    """The fields as JSON."""
    return json.dumps(fields).encode()


def in_query(write: Callable[[Mapping[str, str]], bytes], encrypted: str, **beside: str) -> Request:
    """An encrypted push with its signature in the query."""
    return Request("POST", "/", urlencode(prove(encrypted)), write({**beside, "Encrypt": encrypted}))


def in_body(write: Callable[[Mapping[str, str]], bytes], encrypted: str, **beside: str) -> Request:
    """An encrypted push that carries its signature itself."""
    signature = prove(encrypted, ("MsgSignature", "TimeStamp", "Nonce"))
    return Request("POST", "/", "", write({**beside, **signature, "Encrypt": encrypted}))


def seal(message: bytes = BODY) -> str:
    """What Encrypt holds for a message."""
    return Envelope(KEY, APP_ID).seal(message, RANDOM_HEAD)


WRITES = pytest.mark.parametrize("write", [write_xml, write_json])
PLACES = pytest.mark.parametrize("place", [in_query, in_body])


@pytest.mark.parametrize("make", [make for make, _ in FAILURES.values()], ids=FAILURES.keys())
def test_handle_answers_every_failure_of_an_envelope_alike(cipher: Cipher, make: Callable[[], str]) -> None:
    response = World(**SAFE).ask(in_query(write_json, make()))
    assert (response.status, response.body, response.headers) == (403, b"forbidden\n", ())


@pytest.mark.parametrize("settings", [SAFE, {**SAFE, "compatible": True}], ids=["safe", "compatible"])
@WRITES
@PLACES
def test_handle_takes_encrypted_pushes(place: Callable[..., Request], write: Any, settings: Dict[str, Any]) -> None:
    world = World(**settings)
    assert world.ask(place(write, seal())).outcome == "accepted"
    assert world.submitted == [parse(BODY)]


@pytest.mark.parametrize(("settings", "status"), [(SAFE, 403), ({**SAFE, "compatible": True}, 200)],
                         ids=["safe", "compatible"])
@pytest.mark.parametrize("body", PUSHES.values(), ids=PUSHES.keys())
def test_handle_takes_plain_pushes_only_in_compatible_mode(body: bytes, settings: Dict[str, Any], status: int) -> None:
    assert World(**settings).push(body, signed_query(TOKEN)).status == status


def test_handle_wants_plain_pushes_signed_in_compatible_mode_too() -> None:
    assert World(**SAFE, compatible=True).push(BODY).status == 403


@WRITES
@PLACES
def test_handle_believes_what_is_encrypted_and_not_what_stands_beside_it(
        place: Callable[..., Request], write: Any) -> None:
    # The signature covers Encrypt, and not the plain fields that compatible mode has too.
    world = World(**SAFE, compatible=True)
    world.ask(place(write, seal(), MsgType="text", FromUserName="somebody else", MsgId="7"))
    assert world.submitted == [parse(BODY)]


@WRITES
def test_handle_without_a_key_takes_the_plain_fields_of_compatible_mode(write: Any) -> None:
    world, fields = World(token=TOKEN), {"MsgType": "text", "FromUserName": "user", "MsgId": "7"}
    assert world.push(write({**fields, "Encrypt": seal()}), signed_query(TOKEN)).status == 200
    assert world.submitted[0].msg_id == "7"


@WRITES
def test_handle_without_a_key_logs_the_settings_that_would_open_the_push(
        write: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert World(token=TOKEN).ask(in_query(write, seal())).status == 403
    warning, = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert all(name in warning for name in ("--aes-key", "--app-id", "--token"))


WRITTEN_BY_USERS = ["<Encrypt>x</Encrypt>", "<Encrypt><![CDATA[x", '", "Encrypt": "x", "a": "', "Encrypt", "&echoStr=1",
                    f"<Encrypt>{seal()}</Encrypt>"]
MODES: Dict[str, Dict[str, Any]] = {"plain": {"token": TOKEN}, "safe": SAFE, "compatible": {**SAFE, "compatible": True}}


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("content", WRITTEN_BY_USERS, ids=lambda content: content[:24])
@WRITES
def test_handle_is_not_disturbed_by_what_users_write(write: Any, content: str, settings: Dict[str, Any]) -> None:
    world, body = World(**settings), write({"MsgType": "text", "MsgId": "1", "Content": content})
    world.ask(in_query(write, seal(body)) if settings is SAFE else Request("POST", "/", signed_query(TOKEN), body))
    assert [message.content for message in world.submitted] == [content]


# ---- Over HTTP


class Inbox:
    """A running server in safe mode, and the messages that its handler got."""

    def __init__(self, **settings: Any) -> None:
        self.messages: List[Message] = []
        registry = HandlerRegistry()
        registry.on("*")(self._keep)
        self.server = KfServer(registry, local(**{**SAFE, **settings}))

    def _keep(self, message: Message) -> None:
        self.messages.append(message)

    def ask(self, request: Request) -> Answer:
        """Send a push over a socket."""
        with Client(self.server.port) as client:
            return client.ask(post(request.body, target=f"/?{request.query}"))

    def wait(self) -> List[Message]:
        """What has been handled, when all is."""
        assert self.server.join(PATIENCE)
        return self.messages


@pytest.fixture
def inbox(cipher: Cipher) -> Iterator[Inbox]:
    """A server in safe mode, once with each cipher."""
    made = Inbox()
    with made.server:
        yield made


def test_kf_server_takes_the_published_vector(inbox: Inbox) -> None:
    answer = inbox.ask(Request("POST", "/", urlencode(SEALED["query"]), SEALED["body"].encode()))
    assert (answer.status, answer.body) == (200, b"success")
    assert inbox.wait() == [parse(SEALED["plaintext"].encode())]


@WRITES
@PLACES
def test_kf_server_takes_the_published_message_in_every_envelope(
        inbox: Inbox, place: Callable[..., Request], write: Any) -> None:
    request = place(write, json.loads(SEALED["body"])["Encrypt"])
    assert [inbox.ask(request).body for _ in range(2)] == [b"success"] * 2
    assert inbox.wait() == [parse(SEALED["plaintext"].encode())]


@pytest.mark.parametrize("request_", [
    pytest.param(Request("POST", "/", "", BODY), id="not encrypted"),
    pytest.param(Request("POST", "/", signed_query(TOKEN), BODY), id="signed and not encrypted"),
    pytest.param(in_query(write_json, seal())._replace(query=""), id="not signed"),
    pytest.param(in_query(write_json, seal())._replace(query=signed_query(TOKEN)), id="a plain push's signature"),
    pytest.param(in_query(write_json, encrypt(pad(GOOD), "B" * 43)), id="another key"),
])
def test_kf_server_refuses_what_is_not_proven_and_stays(inbox: Inbox, request_: Request) -> None:
    refused = inbox.ask(request_)
    assert (refused.status, refused.body) == (403, b"forbidden\n")
    assert inbox.ask(in_query(write_json, seal())).body == b"success"


# ---- Start


@pytest.fixture(autouse=True)
def _without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting but what a test gives."""
    for name in [name for name in os.environ if name.startswith("KF_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize("key", [
    pytest.param(KEY[:-1], id="42 characters"), pytest.param(KEY + "A", id="44 characters"),
    pytest.param(KEY + "=", id="filled"), pytest.param(KEY[:-1] + "-", id="the alphabet for URLs"),
    pytest.param(KEY[:-1] + "\n", id="a newline"), pytest.param(" " + KEY[1:], id="a blank"),
    pytest.param("é" * 43, id="letters of no base64"), pytest.param("\uff21" * 43, id="wide letters"),
    pytest.param("٣" * 43, id="digits of another script"), pytest.param(bytes(32).hex(), id="hexadecimal"),
])
def test_main_refuses_a_key_that_is_none(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert kfserver.main(["--check", "--aes-key", key, "--token", TOKEN, "--app-id", APP_ID]) == 2
    told = capsys.readouterr().err
    assert told == "kfserver: --aes-key (KF_AES_KEY) takes the 43 characters that the console shows\n"
