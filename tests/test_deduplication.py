"""Deduplication: what counts as one message sent again, and that exactly one push of each gets through."""

from __future__ import annotations

import re
import threading
from typing import Any, Callable, Dict, List

import pytest
from support import PUSHES

from kfserver import Busy, ClaimCache, Message, dedup_key, parse, safe_key

TEXT = {"ToUserName": "app", "FromUserName": "user", "CreateTime": "1482048670", "MsgType": "text", "Content": "hi",
        "MsgId": "1"}
EVENT = {"ToUserName": "app", "FromUserName": "user", "CreateTime": "1482048670", "MsgType": "event", "Event": "push",
         "CouponId": "c"}


def key_of(fields: Dict[str, Any]) -> str:
    """The key of a message with these fields."""
    return dedup_key(Message(fields))


# ---- dedup_key


@pytest.mark.parametrize("one, other", [
    ("text, XML", "text, JSON"), ("image, XML", "image, JSON"),
    ("coupon event, XML: blanks around every CDATA", "coupon event, JSON: CreateTime quoted")])
def test_dedup_key_is_the_same_for_xml_and_json(one: str, other: str) -> None:
    assert dedup_key(parse(PUSHES[one])) == dedup_key(parse(PUSHES[other]))


@pytest.mark.parametrize("fields", [TEXT, EVENT, {}], ids=["text", "event", "nothing"])
def test_dedup_key_does_not_depend_on_the_order_of_fields(fields: Dict[str, str]) -> None:
    assert key_of(fields) == key_of(dict(reversed(list(fields.items()))))


def test_dedup_key_of_nested_fields_does_not_depend_on_their_order() -> None:
    assert key_of({**EVENT, "More": {"a": "1", "b": "2"}}) == key_of({**EVENT, "More": {"b": "2", "a": "1"}})


def test_dedup_key_is_the_same_after_a_restart() -> None:
    # Written down here, because a journal, other processes and users' handlers remember keys for longer than we run.
    assert dedup_key(parse(PUSHES["text, XML"])) == "toUser/fromUser/text/1234567890123456"
    assert key_of(EVENT) == "app/user/event/1482048670/push/cba369812ba3b56ec3a4b541059f6168"


def test_dedup_key_of_a_message_with_an_id_ignores_what_a_resend_may_change() -> None:
    assert key_of({**TEXT, "CreateTime": "1482048671"}) == key_of(TEXT)


@pytest.mark.parametrize("base, changed", [
    (TEXT, {"FromUserName": "other"}), (TEXT, {"ToUserName": "other"}), (TEXT, {"MsgType": "image"}),
    (TEXT, {"MsgId": "2"}), (TEXT, {"MsgId": ""}), (TEXT, {"MsgId": "01"}), (TEXT, {"MsgId": "0"}),
    ({**TEXT, "MsgId": "0"}, {"Content": "other"}), ({**TEXT, "MsgId": "0"}, {"CreateTime": "1"}),
    ({**EVENT, "MsgId": "1"}, {"Event": "pull"}), ({**EVENT, "MsgId": "1"}, {"CreateTime": "1"}),
    ({**EVENT, "MsgId": "1"}, {"MsgId": "2"}), ({"appId": "1", "event": "x"}, {"appId": "2"}),
    ({"appId": "1", "event": "x"}, {"eventTime": "2019-01-14 12:45:10"}),
    (EVENT, {"More": {"Nonce": "1"}}), ({**EVENT, "More": {"Nonce": "1"}}, {"More": {"Nonce": "2"}}),
    (EVENT, {"FromUserName": "other"}), (EVENT, {"ToUserName": "other"}), (EVENT, {"CreateTime": "1482048671"}),
    (EVENT, {"Event": "pull"}), (EVENT, {"CouponId": "d"}), (EVENT, {"More": ""}), (EVENT, {"MsgId": "1"}),
    (EVENT, {"CouponId": {"c": "c"}}), (EVENT, {"CouponId": ["c"]})], ids=str)
def test_dedup_key_tells_messages_apart(base: Dict[str, str], changed: Dict[str, Any]) -> None:
    assert key_of({**base, **changed}) != key_of(base)


@pytest.mark.parametrize("one, other", [
    (("a/b", "c", "text", "1"), ("a", "b/c", "text", "1")),
    (("a", "b/c", "text", "1"), ("a", "b", "c/text", "1")),
    (("a", "b", "text/1", "2"), ("a", "b", "text", "1/2")),
    (("a", "", "text", "/1"), ("a", "", "text/", "1")),
    (("a", '", "b', "text", "1"), ('a", "', "b", "text", "1"))], ids=str)
def test_dedup_key_cannot_be_forged_with_a_separator(one: Any, other: Any) -> None:
    names = ("ToUserName", "FromUserName", "MsgType", "MsgId")
    assert key_of(dict(zip(names, one))) != key_of(dict(zip(names, other)))


ENVELOPE = {"Encrypt": "AAAA", "MsgSignature": "s", "TimeStamp": "1", "Nonce": "n"}


@pytest.mark.parametrize("name", ENVELOPE)
@pytest.mark.parametrize("fields", [EVENT, {**TEXT, "MsgId": ""}, {**TEXT, "MsgId": "0"}, {"event": "x", "appId": "1"}],
    ids=["event", "empty id", "id of 0", "third-party event"])
def test_dedup_key_is_the_same_for_a_retry_that_is_sealed_anew(fields: Dict[str, str], name: str) -> None:
    assert key_of({**fields, **ENVELOPE}) == key_of({**fields, **ENVELOPE, name: "other"}) == key_of(fields)


def test_dedup_key_of_a_third_party_event_names_its_app_and_time() -> None:
    key = key_of({"appId": "15263713", "eventTime": "2019-01-14 12:45:10", "event": "AUTHORIZED"})
    assert key.startswith("15263713//event/1547441110/AUTHORIZED/")


@pytest.mark.parametrize("key", ["app/user/text/1", "42", "a:b|c%s", "~" * 400, dedup_key(Message(EVENT))], ids=str)
def test_safe_key_leaves_a_plain_key_as_it_is(key: str) -> None:
    assert safe_key(key) == key


@pytest.mark.parametrize("key", ["", "a b", "k\nERROR forged line", "\x1b[31m", "é", "\ud800", "\x00", "x" * 401,
                                 "\u2028", "x" * 10 ** 6, "a\n", "\x7f"], ids=lambda key: ascii(key)[:20])
def test_safe_key_digests_what_could_forge_a_log_line(key: str) -> None:
    assert re.fullmatch("[0-9a-f]{32}", safe_key(key))
    assert safe_key(key) == safe_key(key) != safe_key(key + "\n")


def test_dedup_key_of_a_message_is_never_that_of_an_event() -> None:
    event = dedup_key(Message(EVENT)).split("/")
    forged = {**TEXT, "MsgType": "event", "MsgId": "/".join(event[3:])}
    assert key_of(forged) != key_of(EVENT)


@pytest.mark.parametrize("value",
    ["x" * 1000000, "a\nb", "a\r\nINFO forged", "é", "\U0001f600", " ", "\x00", "%s", "a b"],
                         ids=lambda value: ascii(value)[:12])
@pytest.mark.parametrize("name", TEXT)
def test_dedup_key_is_short_and_safe_in_a_log(name: str, value: str) -> None:
    assert re.fullmatch(r"[\w./-]{1,400}", key_of({**TEXT, name: value}), re.ASCII)


@pytest.mark.parametrize("name", TEXT)
@pytest.mark.parametrize("value", [{}, [], {"a": {"b": "c"}}, ["a", {"b": "c"}]], ids=str)
def test_dedup_key_takes_structured_fields(name: str, value: Any) -> None:
    assert key_of({**TEXT, name: value})


# ---- ClaimCache


def accepted(size: int, *keys: str) -> ClaimCache:
    """A cache in which the keys are claimed and accepted, but not finished."""
    cache = ClaimCache(size)
    for key in keys:
        assert cache.claim(key)
        cache.accept([key])
    return cache


def finish_all(cache: ClaimCache, *keys: str) -> ClaimCache:
    """The cache, in which the keys are now finished too, in this order."""
    for key in keys:
        cache.finish(key)
    return cache


def finished(size: int, *keys: str) -> ClaimCache:
    """A cache in which the keys are finished, in this order."""
    return finish_all(accepted(size, *keys), *keys)


def test_claim_is_granted_once() -> None:
    cache = accepted(2, "a")
    assert cache.claim("b")
    assert not cache.claim("a")


def test_claim_of_what_may_yet_be_refused_is_busy() -> None:
    # Neither answer would do: success would be a lie if the first is refused, and a second run if it is not.
    cache = ClaimCache(2)
    assert cache.claim("a")
    with pytest.raises(Busy):
        cache.claim("a")


@pytest.mark.parametrize("step", [lambda cache: cache.accept(["a"]), lambda cache: cache.finish("a")],
                         ids=["accept", "finish"])
def test_claim_of_a_repeat_is_refused_however_far_the_first_is(step: Callable[[ClaimCache], None]) -> None:
    cache = ClaimCache(2)
    cache.claim("a")
    step(cache)
    assert not cache.claim("a")


@pytest.mark.parametrize("accept_first", [False, True])
def test_release_gives_the_claim_back(accept_first: bool) -> None:
    cache = ClaimCache(1)
    cache.claim("a")
    if accept_first:
        cache.accept(["a"])
    cache.release("a")
    assert len(cache) == 0
    assert cache.claim("a")


def test_release_of_an_unknown_key_is_nothing() -> None:
    cache = ClaimCache(1)
    cache.release("a")
    assert len(cache) == 0


def test_accept_after_finish_leaves_the_key_finished() -> None:
    # The handler may be through before the thread that took the push comes to accept it.
    cache = ClaimCache(1)
    cache.claim("a")
    cache.finish("a")
    cache.accept(["a"])
    assert finish_all(cache, "b").claim("a"), "a finished key is forgotten in its turn"


def test_claim_forgets_the_longest_finished_first() -> None:
    cache = finish_all(finished(3, "a", "b", "c"), "d")
    assert not cache.claim("b")
    assert not cache.claim("c")
    assert cache.claim("a")


def test_claim_of_a_repeat_keeps_it_remembered() -> None:
    cache = finished(2, "a", "b")
    assert not cache.claim("a")
    finish_all(cache, "c")
    assert not cache.claim("a"), "b was asked for longer ago"


def test_claim_never_forgets_nor_refuses_for_room_what_is_in_hand() -> None:
    keys = [str(number) for number in range(100)]
    cache = finish_all(accepted(2, *keys), "a", "b", "c")
    assert [cache.claim(key) for key in keys] == [False] * len(keys)


def test_claim_remembers_as_many_as_it_was_told_however_many_are_in_hand() -> None:
    # Were what is in hand counted, a long queue would leave no room for what is finished.
    keys = [f"done {number}" for number in range(30)]
    cache = finish_all(accepted(30, *(f"waiting {number}" for number in range(1000))), *keys)
    assert not any(cache.claim(key) for key in keys)


def test_confirm_lets_every_claim_stand() -> None:
    assert ClaimCache(1).confirm(["a", "b"]) == [True, True]


def test_claim_remembers_at_most_as_many_as_it_was_told() -> None:
    cache = ClaimCache(10)
    for number in range(1000):
        cache.claim(str(number))
        cache.finish(str(number))
    assert len(cache) == 10
    assert not any(cache.claim(str(number)) for number in range(990, 1000))


def side_by_side(count: int, function: Callable[[int], None]) -> None:
    """Run ``function`` on so many threads at once."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        function(number)
    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("number", range(3))
def test_restore_holds_a_key_again_room_or_not(number: int) -> None:
    cache = accepted(2, *map(str, range(number)))
    cache.restore("restored")
    assert not cache.claim("restored")
    cache.finish("restored")
    assert not cache.claim("restored")


def test_claim_has_exactly_one_winner_among_threads() -> None:
    cache = ClaimCache(1000)
    winners: List[List[int]] = [[] for _ in range(200)]

    def claim_all(number: int) -> None:
        for key, won in enumerate(winners):
            try:
                if cache.claim(str(key)):
                    won.append(number)
            except Busy:
                pass  # another has it in hand
    side_by_side(16, claim_all)
    assert [len(won) for won in winners] == [1] * len(winners)


def test_claim_cache_never_exceeds_its_size_and_what_is_in_hand_among_threads() -> None:
    cache = ClaimCache(8)
    sizes: List[int] = []

    def use(number: int) -> None:
        for turn in range(200):
            key = f"{number}/{turn}"
            assert cache.claim(key)
            sizes.append(len(cache))
            (cache.release if turn % 3 else cache.finish)(key)
    side_by_side(16, use)
    assert max(sizes) <= 8 + 16
    assert len(cache) == 8


def test_finish_counts_a_key_once_however_often_it_is_finished() -> None:
    cache = finish_all(ClaimCache(3), "a", "b", "a", "b", "c")
    assert (len(cache), [cache.claim(key) for key in "abc"]) == (3, [False] * 3)


def test_claim_cache_restore_may_exceed_the_size_and_is_forgotten_down_to_it() -> None:
    cache = ClaimCache(3)
    for number in range(10):
        cache.restore(str(number))
    finish_all(cache, *map(str, range(10)))
    assert len(cache) == 3
