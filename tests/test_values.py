"""Settings and messages: plain values that check themselves when they are made, and cannot be changed afterwards."""

from __future__ import annotations

import dataclasses
import time
import traceback
from typing import Any, Dict, List

import pytest
from support import PUBLISHED

from kfserver import (
    Answers,
    HandlerError,
    Message,
    Settings,
    SettingsError,
    describe_error,
    exc_info_of,
    printable,
    setting_names,
)

AES_KEY = PUBLISHED["encrypted"][0]["encoding_aes_key"]


# ---- Settings


@pytest.mark.parametrize("name, default", [
    ("host", "0.0.0.0"), ("port", 8080), ("path", ""), ("token", ""), ("allow_unsigned", False), ("max_age", 0),
    ("aes_key", ""), ("app_id", ""), ("compatible", False), ("handlers", ""), ("workers", 16), ("queue_size", 10000),
    ("tries", 3), ("dedup_size", 10000), ("max_body", 1024 * 1024), ("grace", 10), ("log_level", "info")])
def test_settings_defaults_are_the_documented_ones(name: str, default: object) -> None:
    assert getattr(Settings(), name) == default


GOOD_SETTINGS: List[Dict[str, Any]] = [
    {"port": 0}, {"port": 65535}, {"path": "/kf"}, {"max_age": 1}, {"max_age": 0.5}, {"grace": 0}, {"workers": 1},
    {"grace": 86400}, {"log_level": "debug"}, {"allow_unsigned": True}, {"tries": 1},
    {"aes_key": AES_KEY, "app_id": "app", "token": "t"},
    # Two bits of the last character are spare; keys that have them set are in use.
    {"aes_key": "A" * 42 + "/", "app_id": "app", "token": "t"}]


@pytest.mark.parametrize("values", GOOD_SETTINGS, ids=str)
def test_settings_take_every_value_that_can_work(values: Dict[str, Any]) -> None:
    settings = Settings(**values)
    assert {name: getattr(settings, name) for name in values} == values


BAD_SETTINGS: List[Dict[str, Any]] = [
    {"port": -1}, {"port": 65536}, {"port": "8080"}, {"port": 80.0}, {"port": True}, {"port": None},
    {"path": "kf"}, {"token": 1}, {"token": None}, {"allow_unsigned": 1}, {"allow_unsigned": "true"},
    {"max_age": -1}, {"max_age": float("nan")}, {"max_age": "1"}, {"workers": 0}, {"workers": 10001}, {"queue_size": 0},
    {"tries": 0}, {"tries": 21}, {"dedup_size": 0}, {"max_body": 0}, {"grace": -1}, {"log_level": "loud"},
    {"log_level": "INFO "}, {"aes_key": "short", "token": "t", "app_id": "a"},
    {"aes_key": AES_KEY + "A", "token": "t", "app_id": "a"}, {"aes_key": AES_KEY + "\n", "token": "t", "app_id": "a"},
    {"aes_key": AES_KEY[:-1] + "*", "token": "t", "app_id": "a"},
    {"aes_key": AES_KEY[:-1] + "é", "token": "t", "app_id": "a"}]


@pytest.mark.parametrize("values", BAD_SETTINGS, ids=ascii)
def test_settings_refuse_a_bad_value_by_name(values: Dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as error:
        Settings(**values)
    assert setting_names(next(iter(values))) in str(error.value)


@pytest.mark.parametrize("values, says", [
    ({"port": 70000}, "--port (KF_PORT) takes a whole number from 0 to 65535, not 70000"),
    ({"workers": "many"}, "--workers (KF_WORKERS) takes a whole number from 1 to 10000, not 'many'"),
    ({"grace": -1}, "--grace (KF_GRACE) takes a number from 0 to 86400, not -1"),
    ({"allow_unsigned": 3}, "--allow-unsigned (KF_ALLOW_UNSIGNED) takes true or false, not 3"),
    ({"log_level": "loud"}, "--log-level (KF_LOG_LEVEL) takes one of debug, info, warning, error, not 'loud'"),
    ({"token": 5}, "--token (KF_TOKEN) takes text"),
], ids=lambda value: "" if isinstance(value, str) else str(value))
def test_settings_error_says_what_the_setting_takes(values: Dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError) as error:
        Settings(**values)
    assert str(error.value) == says


@pytest.mark.parametrize("app_id", ["a", "a,b", " a , b "])
def test_settings_app_id_may_name_several(app_id: str) -> None:
    assert Settings(token="t", aes_key=AES_KEY, app_id=app_id).app_id == app_id


@pytest.mark.parametrize("app_id", [",", "a,", ",a", "a,,b", "a, ,b", " "], ids=ascii)
def test_settings_app_id_names_no_empty_one(app_id: str) -> None:
    with pytest.raises(SettingsError, match="--app-id"):
        Settings(token="t", aes_key=AES_KEY, app_id=app_id)


@pytest.mark.parametrize("missing", ["token", "app_id"])
def test_settings_aes_key_is_useless_without_what_proves_a_push(missing: str) -> None:
    given = {"aes_key": AES_KEY, "token": "t", "app_id": "a", missing: ""}
    with pytest.raises(SettingsError, match="--aes-key"):
        Settings(**given)


@pytest.mark.parametrize("values", [
    {"token": 12345678}, {"aes_key": "s3cret", "token": "s3cret"}, {"aes_key": "s3cret" * 7 + "*"}], ids=str)
def test_settings_error_never_shows_a_secret(values: Dict[str, Any]) -> None:
    with pytest.raises(SettingsError) as error:
        Settings(**values)
    assert "s3cret" not in str(error.value)
    assert "12345678" not in str(error.value)


def test_settings_repr_shows_no_secret() -> None:
    settings = Settings(token="s3cret-token", aes_key=AES_KEY, app_id="app", app_key="s3cret-key", app_secret="s3cret")
    assert "s3cret" not in repr(settings)
    assert AES_KEY not in repr(settings)
    assert "s3cret" not in repr(Settings(access_token="s3cret-access", redis="redis://:s3cret@127.0.0.1"))


def test_settings_cannot_be_changed_once_checked() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().port = 1  # type: ignore[misc]


def test_setting_names_are_those_of_option_and_environment() -> None:
    assert setting_names("max_body") == "--max-body (KF_MAX_BODY)"


# ---- Message


WIRE = {"ToUserName": "app", "FromUserName": "user", "CreateTime": "1482048670", "MsgType": "text", "Content": " hi ",
        "MsgId": "18446744073709551615", "PicUrl": "http://x/y.png", "Event": "push"}


@pytest.mark.parametrize("attribute, value", [
    ("to_user_name", "app"), ("from_user_name", "user"), ("create_time", 1482048670), ("msg_type", "text"),
    ("content", " hi "), ("msg_id", "18446744073709551615"), ("pic_url", "http://x/y.png"), ("event", "push")])
def test_message_attributes_are_the_fields_in_snake_case(attribute: str, value: object) -> None:
    assert getattr(Message(WIRE), attribute) == value


@pytest.mark.parametrize("attribute, value", [
    ("to_user_name", ""), ("from_user_name", ""), ("create_time", 0), ("msg_type", ""), ("content", ""),
    ("msg_id", None), ("pic_url", ""), ("event", ""), ("key", "")])
def test_message_without_fields_has_every_attribute(attribute: str, value: object) -> None:
    assert getattr(Message({}), attribute) == value


@pytest.mark.parametrize("attribute", ["to_user_name", "create_time", "msg_type", "content", "msg_id", "event"])
def test_message_attributes_keep_their_type_when_the_field_is_structured(attribute: str) -> None:
    structured = Message({name: {"nested": "x"} for name in WIRE})
    assert getattr(structured, attribute) == getattr(Message({}), attribute)
    assert structured.fields["Content"] == {"nested": "x"}


@pytest.mark.parametrize("text, seconds", [
    ("1482048670", 1482048670), ("0", 0), ("", 0), ("-5", 0), ("1.5", 0), ("soon", 0), ("²", 0),
    ("0x10", 0), ("1_000", 0), ("9" * 5000, 0),
    ("1e9", 10 ** 9), ("1.482048670E9", 1482048670), ("1.48204867e+09", 1482048670), ("15e-1", 1), ("1e-99", 0),
    ("1e18", 10 ** 18), ("1e19", 0), ("1e99", 0), ("1e999", 0), ("-1e9", 0), ("1e", 0), ("e9", 0), ("1e9e9", 0),
    ("1" * 21 + "e9", 0), ("²e9", 0), ("1e" + "9" * 5000, 0)], ids=lambda value: ascii(value)[:16])
def test_message_create_time_is_a_number_whatever_came(text: str, seconds: int) -> None:
    assert Message({"CreateTime": text}).create_time == seconds


# What `date -u -d "2019-01-14 04:45:10" +%s` says: 12:45:10 in Beijing, which has no summer time.
WRITTEN = 1547441110


@pytest.mark.parametrize("fields, seconds", [
    ({"eventTime": "2019-01-14 12:45:10"}, WRITTEN), ({"CreateTime": "2019-01-14 12:45:10"}, WRITTEN),
    ({"eventTime": str(WRITTEN)}, WRITTEN), ({"CreateTime": "5", "eventTime": "2019-01-14 12:45:10"}, 5),
    ({"CreateTime": "", "eventTime": "2019-01-14 12:45:10"}, WRITTEN), ({"eventTime": "1970-01-01 08:00:00"}, 0),
    ({"eventTime": "1970-01-01 00:00:00"}, 0), ({"eventTime": "2019-02-30 12:45:10"}, 0),
    ({"eventTime": "2019-01-14 25:45:10"}, 0), ({"eventTime": "2019-01-14"}, 0), ({"eventTime": "0000-01-14 1:1:1"}, 0),
    ({"eventTime": "x" * 100000}, 0), ({"eventTime": {"a": "b"}}, 0)], ids=lambda value: ascii(value)[:60])
@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_message_create_time_of_a_written_time_is_that_of_beijing(
        fields: Dict[str, Any], seconds: int, zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert Message(fields).create_time == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("fields, app_id", [
    ({"appId": "15263713"}, "15263713"), ({"ToUserName": "app", "appId": "15263713"}, "app"),
    ({"ToUserName": "", "appId": "15263713"}, "15263713"), ({"tpAppId": "14242323"}, ""), ({"appId": ["1"]}, "")],
    ids=str)
def test_message_to_user_name_of_a_third_party_event_is_its_app_id(fields: Dict[str, Any], app_id: str) -> None:
    assert Message(fields).to_user_name == app_id


@pytest.mark.parametrize("fields, msg_type, event", [
    ({"MsgType": "event", "Event": "user_get_coupon"}, "event", "user_get_coupon"),
    ({"event": "PACKAGE_AUDIT_PASS"}, "event", "PACKAGE_AUDIT_PASS"),
    ({"Event": "push"}, "event", "push"),
    ({"MsgType": "ticket", "Event": "push"}, "ticket", "push"),
    ({"MsgType": "text", "Content": "x"}, "text", ""),
    ({"Content": "x"}, "", "")], ids=str)
def test_message_with_an_event_name_and_no_type_is_an_event(fields: Dict[str, str], msg_type: str, event: str) -> None:
    message = Message(fields)
    assert (message.msg_type, message.event) == (msg_type, event)


MEMBERS = [name for name in dir(Message) if not name.startswith("__")]


@pytest.mark.parametrize("name", MEMBERS + ["__class__", "__init__", "__eq__", "__dict__"])
def test_message_field_cannot_shadow_an_attribute_or_method(name: str) -> None:
    plain, hostile = Message(WIRE), Message({**WIRE, name: "shadow"})
    assert getattr(hostile, name, None) != "shadow"
    assert type(getattr(hostile, name, None)) is type(getattr(plain, name, None))
    assert hostile.fields[name] == "shadow"


@pytest.mark.parametrize("name", ["content", "msg_type", "create_time", "msg_id", "event", "surprise"])
def test_message_attributes_are_read_only(name: str) -> None:
    with pytest.raises(AttributeError):
        setattr(Message(WIRE), name, "changed")


def test_message_fields_are_read_only() -> None:
    with pytest.raises(TypeError):
        Message({"Content": "x"}).fields["Content"] = "changed"  # type: ignore[index]


def test_message_repr_shows_nothing_of_the_user() -> None:
    assert " hi " not in repr(Message(WIRE))


def test_message_equal_fields_make_equal_messages() -> None:
    assert Message({"A": "1", "B": "2"}) == Message({"B": "2", "A": "1"})
    assert Message({"A": "1"}) != Message({"A": "2"})
    assert Message({}) != {}


def test_message_reply_hands_answers_to_the_outbox() -> None:
    sent: List[Answers] = []
    message = Message(WIRE, sent.append)
    message.reply("one")
    message.reply(["two", "three"])
    assert sent == ["one", ["two", "three"]]


def test_message_reply_without_a_way_back_says_how_to_test() -> None:
    with pytest.raises(HandlerError, match="outbox"):
        Message(WIRE).reply("hello")


# ---- Texts for logs


@pytest.mark.parametrize(("text", "shown"), [
    ("menu 菜单 😀", "menu 菜单 😀"), ("", ""), ("two\nlines", "two\\nlines"), ("\x1b[2J", "\\x1b[2J"),
    ("half \ud83d", "half \\ud83d"), ("\u202eright", "\\u202eright"), ("\x7f\x85\xa0", "\\x7f\\x85\\xa0")])
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode()


def test_describe_error_tells_no_text_but_our_own() -> None:
    assert describe_error(SettingsError("half \ud83d")) == "SettingsError: half \\ud83d"
    assert describe_error(ValueError("secret")) == "ValueError"


def test_exc_info_of_has_the_traceback_and_not_the_text() -> None:
    try:
        int("secret")
    except ValueError as error:
        lines = traceback.format_exception(*exc_info_of(error))
    assert "secret" not in lines[-1]
    assert "ValueError at test_values.py:" in lines[-1]
    assert any("int(" in line for line in lines)


def test_exc_info_of_keeps_the_text_at_the_level_debug(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "kfserver")
    error = ValueError("what the user wrote")
    assert exc_info_of(error) == (ValueError, error, None)
