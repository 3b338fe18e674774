"""Safe-mode pushes for the load generator, which cannot encrypt: made beforehand and written to a file.

AES comes from `cryptography`, not from kfserver: a mistake that both ends shared would go unseen.
"""

import base64
import os
import struct
from pathlib import Path

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import wire

AES_KEY = "BenchBenchBenchBenchBenchBenchBenchBenchBen"
_BLOCK = 32


def encrypt(plain: bytes) -> str:
    """The base64 text that safe mode puts into `Encrypt`."""
    key = base64.b64decode(AES_KEY + "=")
    packed = os.urandom(16) + struct.pack(">I", len(plain)) + plain + wire.APP_ID.encode()
    padding = _BLOCK - len(packed) % _BLOCK
    encryptor = Cipher(algorithms.AES(key), modes.CBC(key[:16])).encryptor()
    sealed = encryptor.update(packed + bytes([padding]) * padding) + encryptor.finalize()
    return base64.b64encode(sealed).decode()


def push(body_format: str, sender: str, msg_id: int) -> tuple[str, bytes]:
    """Query and body of one encrypted push; the body has no line break."""
    text = encrypt(wire.message(body_format, sender, msg_id))
    if body_format == "json":
        body = f'{{"ToUserName": "{wire.APP_ID}", "Encrypt": "{text}"}}'
    else:
        body = f"<xml><ToUserName><![CDATA[{wire.APP_ID}]]></ToUserName><Encrypt><![CDATA[{text}]]></Encrypt></xml>"
    return wire.signed_query(text), body.encode()


def write_pushes(path: Path, body_format: str, count: int, first_id: int) -> None:
    """Write `count` different pushes for push.lua: one a line, query TAB body."""
    with path.open("wb") as file:
        for number in range(count):
            query, body = push(body_format, f"openid-{number % 1000:03d}", first_id + number)
            file.write(query.encode() + b"\t" + body + b"\n")
