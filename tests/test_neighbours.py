"""Packets of the platform's pages, and of what other receivers have met, through a running server: each as expected.

Those that name no settings come to one server, in the order of the file; each of the others to one of its own.
"""

from __future__ import annotations

import contextlib
import json
import logging
from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

import pytest
from support import PATIENCE, ROOT, local

from kfserver import HandlerRegistry, KfServer, Message, Request

PACKETS: List[Dict[str, Any]] = json.loads((ROOT / "tests" / "data" / "neighbours.json").read_text("utf-8"))


class Expected(NamedTuple):
    """The answer, and the messages that a handler gets: some of their attributes."""

    status: int
    body: bytes
    messages: Tuple[Dict[str, Any], ...] = ()


def runs(**attributes: Any) -> Expected:
    """Accepted, and handled once, as a message with these attributes."""
    return Expected(200, b"success", (attributes,))


REPEAT = Expected(200, b"success")
ECHO = Expected(200, b"12345abc")
TICKET = runs(msg_type="ticket", event="push", from_user_name="SmartApp")
COUPON = {"msg_type": "event", "event": "user_get_coupon", "to_user_name": "app_id", "create_time": 1472551036}


def third_party(event: str, to_user_name: str = "15263713") -> Expected:
    """An event that has neither a type, nor a sender, nor an id."""
    return runs(msg_type="event", event=event, to_user_name=to_user_name, from_user_name="", create_time=1547441110)


EXPECTED: Dict[str, Expected] = {
    "seed text, XML": runs(msg_type="text", content="this is a test", msg_id="1234567890123456"),
    "seed text, JSON: same MsgId": REPEAT,
    "seed image, XML: same MsgId": runs(msg_type="image", pic_url="this is a url", msg_id="1234567890123456"),
    "seed image, JSON: same MsgId": REPEAT,
    "ticket sealed for the third-party platform's numeric id (as a published production packet is)": TICKET,
    "the same, --app-id set to a mini-program": Expected(403, b"forbidden\n"),
    "MsgSignature in the body, timestamp and nonce only in the query": TICKET,
    "signature in upper-case hex": TICKET,
    "handshake, form body": ECHO,
    "handshake, query": ECHO,
    "handshake by GET": ECHO,
    "handshake, JSON body, token set": ECHO,
    "handshake, multipart body": ECHO,
    "compatible mode without key: event, first try": runs(event="user_get_coupon", to_user_name="app"),
    "compatible mode without key: event, retry sealed anew": REPEAT,
    "event with MsgId, first": runs(event="delivered", msg_id="77"),
    "another event with the same MsgId, 99 s later": runs(event="read", msg_id="77"),
    "coupon": runs(**COUPON),
    "another coupon in the same second": runs(**COUPON),
    "the first coupon again with one more field": runs(**COUPON),
    "third-party event AUTHORIZED": third_party("AUTHORIZED"),
    "third-party event UPDATE_AUTHORIZED": third_party("UPDATE_AUTHORIZED"),
    "third-party event PACKAGE_AUDIT_PASS": third_party("PACKAGE_AUDIT_PASS"),
    "third-party event  BASE_INFO_OFFLINE_AUDIT_FAIL": third_party("BASE_INFO_OFFLINE_AUDIT_FAIL"),
    "third-party event BRAND_WORD_AUDIT_SUCCESS": third_party("BRAND_WORD_AUDIT_SUCCESS"),
    "register event without appId": third_party("REGISTER_AUTH_SUCCESS", ""),
    "payment notice, form-encoded": Expected(400, b"the body is neither an XML document nor a JSON object\n"),
}
# Not pushes but answers of the send API: test_replies has them.
ANSWERS = {"send API answer: both kinds of number", "send API answer: busy, try again later"}


class Receiving:
    """A running server that keeps what its handler gets."""

    def __init__(self, server: KfServer, messages: List[Message]) -> None:
        self._server, self._messages = server, messages

    def ask(self, packet: Dict[str, Any]) -> Expected:
        """What the packet is answered, and every message that is handled because of it."""
        self._messages.clear()
        response = self._server.endpoint.handle(
            Request(packet.get("method", "POST"), "/", packet.get("query", ""), packet["body"].encode()))
        assert self._server.join(PATIENCE)
        shown = tuple({name: getattr(message, name) for each in EXPECTED[packet["name"]].messages for name in each}
                      for message in self._messages)
        return Expected(response.status, response.body, shown)


@contextlib.contextmanager
def receiving(**settings: Any) -> Iterator[Receiving]:
    """A server for the length of a block."""
    messages: List[Message] = []
    registry = HandlerRegistry()
    registry.on("*")(messages.append)
    with KfServer(registry, local(**settings)) as server:
        yield Receiving(server, messages)


def test_every_packet_is_expected_to_do_something() -> None:
    assert {packet["name"] for packet in PACKETS} == EXPECTED.keys() | ANSWERS


def test_kf_server_takes_every_packet_in_turn() -> None:
    with receiving() as server:
        for packet in PACKETS:
            if packet["name"] in EXPECTED and "settings" not in packet:
                assert server.ask(packet) == EXPECTED[packet["name"]], packet["name"]


@pytest.mark.parametrize(
    "packet", [packet for packet in PACKETS if "settings" in packet], ids=lambda packet: packet["name"])
def test_kf_server_takes_every_packet_that_needs_settings(packet: Dict[str, Any]) -> None:
    with receiving(**packet["settings"]) as server:
        assert server.ask(packet) == EXPECTED[packet["name"]]
        again = EXPECTED[packet["name"]]._replace(messages=())
        assert server.ask(packet) == again, "the same again runs nothing"


def test_kf_server_tells_the_id_that_a_push_was_sealed_for(caplog: pytest.LogCaptureFixture) -> None:
    packet = next(packet for packet in PACKETS if packet["name"] == "the same, --app-id set to a mini-program")
    with receiving(**packet["settings"]) as server:
        server.ask(packet)
    warning, = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "17328232" in warning
    assert "--app-id" in warning


def test_kf_server_takes_a_ticket_beside_a_mini_program() -> None:
    packet = next(packet for packet in PACKETS if packet["name"] == "the same, --app-id set to a mini-program")
    with receiving(**{**packet["settings"], "app_id": "17070187,17328232"}) as server:
        assert server.ask(packet)[:2] == (200, b"success")
