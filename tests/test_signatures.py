"""Signatures, held against published ones, and against every text that a stranger may send in their place."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Callable, Dict, List, Tuple

import pytest
from support import PUBLISHED

from kfserver import sign, verify

VECTORS = PUBLISHED["signatures"]
SEALED = PUBLISHED["encrypted"][0]


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["nonce"])
def test_sign_gives_the_published_signature(vector: Dict[str, Any]) -> None:
    assert sign(vector["token"], vector["timestamp"], vector["nonce"]) == vector["signature"]


def test_sign_covers_a_fourth_part_in_safe_mode() -> None:
    query = SEALED["query"]
    encrypt = SEALED["body"].split('"')[-2]
    assert sign(SEALED["token"], query["timestamp"], query["nonce"], encrypt) == query["msg_signature"]


def test_sign_does_not_depend_on_the_order_of_the_parts() -> None:
    assert sign("b", "c", "a") == sign("a", "b", "c")


def test_sign_sorts_by_bytes_and_not_by_characters_or_numbers() -> None:
    # By UTF-16, as other languages sort, the emoji would stand before U+FF01; by number 9 before 10.
    parts = ("9", "10", "\uff01", "\U0001f600", "B", "a")
    by_bytes = "10" "9" "B" "a" "\uff01" "\U0001f600"
    assert sign(*parts) == hashlib.sha1(by_bytes.encode()).hexdigest()


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: vector["nonce"])
def test_verify_takes_the_published_signature(vector: Dict[str, Any]) -> None:
    assert verify(vector["signature"], vector["token"], vector["timestamp"], vector["nonce"])


GOOD = VECTORS[0]["signature"]


@pytest.mark.parametrize("signature", [
    "", " ", GOOD[:-1], GOOD + "0", GOOD + "\n", " " + GOOD, GOOD[:-1] + "\u0660", "é", "签名",
    "\U0001f600", "\ud800", "\udcff", "\x00", "0" * 100000], ids=lambda text: ascii(text)[:48])
def test_verify_refuses_every_other_text_and_never_raises(signature: str) -> None:
    vector = VECTORS[0]
    assert not verify(signature, vector["token"], vector["timestamp"], vector["nonce"])


@pytest.mark.parametrize("write", [str.upper, str.title, str.swapcase], ids=lambda write: write.__name__)
def test_verify_takes_letters_of_either_case(write: Callable[[str], str]) -> None:
    assert write(GOOD) != GOOD
    assert verify(write(GOOD), *(VECTORS[0][name] for name in ("token", "timestamp", "nonce")))


def test_verify_compares_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: List[Tuple[bytes, bytes]] = []

    def say_yes(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return True
    monkeypatch.setattr(hmac, "compare_digest", say_yes)
    assert verify(GOOD, "other", "parts"), "nothing but this comparison decides"
    assert compared == [(sign("other", "parts").encode(), GOOD.encode())]


@pytest.mark.parametrize("part", ["", "é", "令牌", "\ud800", "\udcff", "\x00"], ids=ascii)
def test_verify_takes_any_text_as_a_part(part: str) -> None:
    assert verify(sign(part, "1", "2"), part, "1", "2")


@pytest.mark.parametrize("parts", [
    ("BBBBB", "1714036504", "1514711492"), ("AAAAA", "1714036505", "1514711492"), ("AAAAA", "1714036504", "1514711493"),
    ("AAAAA", "1714036504", ""), ("", "1714036504", "1514711492")], ids="-".join)
def test_verify_refuses_the_signature_of_other_parts(parts: Any) -> None:
    assert not verify(GOOD, *parts)
