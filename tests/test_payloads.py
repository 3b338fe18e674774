"""Payloads: XML and JSON as they are published and as they come in the wild, and that both give equal messages."""

from __future__ import annotations

import json
from typing import Any, Dict, List

import pytest
from support import PUSHES

from kfserver import MAX_DEPTH, MalformedPush, Message, parse, parse_fields, replace_unreadable


def xml(fields: str) -> bytes:
    """The elements in ``fields`` inside a root."""
    return f"<xml>{fields}</xml>".encode()


def content(cdata: str) -> bytes:
    """An XML push whose Content is one CDATA section."""
    return xml(f"<Content><![CDATA[{cdata}]]></Content>")


# ---- Published packets


@pytest.mark.parametrize("one, other", [
    ("text, XML", "text, JSON"),
    ("image, XML", "image, JSON"),
    ("coupon event, XML: blanks around every CDATA", "coupon event, JSON: CreateTime quoted")])
def test_parse_published_xml_and_json_give_equal_messages(one: str, other: str) -> None:
    assert parse(PUSHES[one]) == parse(PUSHES[other])


def test_parse_published_text() -> None:
    message = parse(PUSHES["text, XML"])
    assert (message.to_user_name, message.from_user_name, message.create_time) == ("toUser", "fromUser", 1482048670)
    assert (message.msg_type, message.content, message.msg_id) == ("text", "this is a test", "1234567890123456")


def test_parse_published_image() -> None:
    message = parse(PUSHES["image, JSON"])
    assert (message.msg_type, message.pic_url, message.content) == ("image", "this is a url", "")


def test_parse_published_coupon_event_keeps_the_fields_of_its_own() -> None:
    message = parse(PUSHES["coupon event, XML: blanks around every CDATA"])
    assert (message.msg_type, message.event, message.msg_id) == ("event", "user_get_coupon", None)
    assert message.fields["UserCouponCode"] == "226009850808"
    assert message.fields["CouponTakeId"] == "xxxxx"


def test_parse_published_ticket_keeps_its_type_beside_the_event() -> None:
    message = parse(PUSHES["third-party ticket, decrypted"])
    assert (message.msg_type, message.event, message.from_user_name) == ("ticket", "push", "SmartAPP")


def test_parse_published_third_party_event_is_an_event_without_sender_or_id() -> None:
    message = parse(PUSHES["third-party event, decrypted: lower-case keys, no MsgType, sender or id"])
    assert (message.msg_type, message.event) == ("event", "ADVANCED_AUDIT_CHANGED")
    assert (message.from_user_name, message.msg_id) == ("", None)
    assert (message.to_user_name, message.create_time) == ("1452365", 1547441110)
    assert message.fields["appId"] == "1452365"


# ---- XML and JSON are equal

TWINS: Dict[str, Any] = {
    "no fields": (b"<xml></xml>", {}),
    "emoji": (content("\U0001f600 \U0001f468\u200d\U0001f469"), {"Content": "\U0001f600 \U0001f468\u200d\U0001f469"}),
    "Chinese": (content("你好"), {"Content": "你好"}),
    "64-bit id": (xml("<MsgId>18446744073709551615</MsgId>"), {"MsgId": 18446744073709551615}),
    "id that no double can hold": (xml("<MsgId>9007199254740993</MsgId>"), {"MsgId": 9007199254740993}),
    "id that is no number": (xml("<MsgId>a-b_c:d</MsgId>"), {"MsgId": "a-b_c:d"}),
    "quoted number": (xml("<CreateTime>1472551036</CreateTime>"), {"CreateTime": "1472551036"}),
    "number with a point": (xml("<Price>1.50</Price>"), {"Price": "1.50"}),
    "true, false, nothing": (xml("<A>true</A><B>false</B><C></C>"), {"A": True, "B": False, "C": None}),
    "empty Content": (content(""), {"Content": ""}),
    "Content as an empty tag": (xml("<Content/>"), {"Content": ""}),
    "blanks around CDATA": (xml("<A> \n\t<![CDATA[x]]>\r\n </A>"), {"A": "x"}),
    "blanks around CDATA of Content": (xml("<Content> \n<![CDATA[x]]>\n </Content>"), {"Content": "x"}),
    "blanks around empty CDATA of Content": (xml("<Content> <![CDATA[]]> </Content>"), {"Content": ""}),
    "blanks around two CDATA sections": (
        xml("<Content> <![CDATA[ a]]]]><![CDATA[> ]]> </Content>"), {"Content": " a]]> "}),
    "the user's own blanks": (content(" x\n"), {"Content": " x\n"}),
    "the user's own blanks, inside layout": (xml("<Content>\n <![CDATA[ x ]]> </Content>"), {"Content": " x "}),
    "nothing but blanks": (content("  "), {"Content": "  "}),
    "blanks in other fields": (xml("<Event><![CDATA[ x ]]></Event>"), {"Event": " x "}),
    "wide blanks are text": (xml("<A>\u3000x\u00a0</A>"), {"A": "\u3000x\u00a0"}),
    "what looks like layout, written by the user": (content(" a> <![CDATA[ b"), {"Content": " a> <![CDATA[ b"}),
    "control character in CDATA": (content("a\x1db"), {"Content": "a\x1db"}),
    "every control character": (
        content("".join(map(chr, range(32))).replace("\r", "")),
        {"Content": "".join(map(chr, range(32))).replace("\r", "")}),
    "control characters at the ends": (xml("<A>\x0bx\x1f</A>"), {"A": "\x0bx\x1f"}),
    "noncharacter": (content("\ufded"), {"Content": "\ufded"}),
    "noncharacter beside a control character": (content("\ufded\x1d"), {"Content": "\ufded\x1d"}),
    "noncharacter and private use beside a control character": (
        content("\ufded\U000f0005\x1d"), {"Content": "\ufded\U000f0005\x1d"}),
    "reference to a noncharacter beside a control character": (xml("<A>&#xFDED;\x1d</A>"), {"A": "\ufded\x1d"}),
    "what looks like a character in disguise": (
        xml("<A>\ufdd00041\x1d</A><B>&#xFDD0;0041&#29;</B><C>\ufdd0</C>"),
        {"A": "\ufdd00041\x1d", "B": "\ufdd00041\x1d", "C": "\ufdd0"}),
    "markup as text": (content("<!DOCTYPE x> & <Encrypt>y</Encrypt>"),
        {"Content": "<!DOCTYPE x> & <Encrypt>y</Encrypt>"}),
    "CDATA split for its own end": (content("a]]]]><![CDATA[>b"), {"Content": "a]]>b"}),
    "references": (xml("<Content>&lt;b&gt; &amp; &#128512;</Content>"), {"Content": "<b> & \U0001f600"}),
    "references that XML forbids": (
        xml("<Content>&#29;&#x0;&#xFFFE;&#65535;&#00031;</Content>"), {"Content": "\x1d\x00\ufffe\uffff\x1f"}),
    "characters that XML forbids": (content("\ufffe\uffff\x1d"), {"Content": "\ufffe\uffff\x1d"}),
    "surrogates as references": (xml("<A>&#xD83D;&#xDE00;&#55357;&#56832;</A>"), {"A": "\U0001f600\U0001f600"}),
    "half surrogates as references": (
        xml("<A>&#xD83D;x&#xDE00;&#xDE00;&#xD83D;</A>"), {"A": "\ufffdx\ufffd\ufffd\ufffd"}),
    "references that are none in CDATA": (content("&#29;&#xD83D;"), {"Content": "&#29;&#xD83D;"}),
    "references that are none, beside one": (
        xml("<!-- <![CDATA[ --><A><![CDATA[&#29;]]>&#29;<![CDATA[&#xFFFE;]]></A>"
            "<?x &#1; <!-- ?><B>&#2;</B><!-- &#3;-->"),
        {"A": "&#29;\x1d&#xFFFE;", "B": "\x02"}),
    "references in attributes": (xml('<A b="&#29;&#xD83D;">&#29;</A>'), {"A": "\x1d"}),
    "processing instructions": (
        b'<?xml version="1.0"?><?x y?>\n<?z?><!-- <!DOCTYPE a> --><xml><?x <A>2</A>?><A>1<?x y?>2</A></xml><?x?>',
        {"A": 12}),
    "style sheet": (b'<?xml-stylesheet href="x"?><xml><A>1</A></xml>', {"A": 1}),
    "namespace of all": (b'<xml xmlns="urn:x"><A>1</A></xml>', {"A": 1}),
    "namespace inside": (xml('<A xmlns="urn:x"><B>1</B></A>'), {"A": {"B": 1}}),
    "namespace of an attribute": (b'<xml xmlns:n="urn:x"><A n:b="1" xml:lang="zh">1</A></xml>', {"A": 1}),
    "namespace of the root": (b'<n:xml xmlns:n="urn:x"><A>1</A></n:xml>', {"A": 1}),
    # A prefix is a part of the name, declared or not: in no packet two names become one.
    "prefix": (b'<xml xmlns:n="urn:x"><n:A>1</n:A></xml>', {"n:A": 1}),
    "prefix that is not declared": (xml("<n:A>1</n:A><xml:A>2</xml:A>"), {"n:A": 1, "xml:A": 2}),
    "prefix beside none": (b'<n:xml xmlns:n="urn:x"><n:Content>1</n:Content><Content>2</Content></n:xml>',
                           {"n:Content": 1, "Content": 2}),
    "prefixes of one namespace": (b'<xml xmlns:n="urn:x" xmlns:m="urn:x"><n:A>1</n:A><m:A>2</m:A></xml>',
                                  {"n:A": 1, "m:A": 2}),
    "text around CDATA": (xml("<Content>a<![CDATA[b]]>c</Content>"), {"Content": "abc"}),
    "comment inside": (xml("<Content>a<!-- x -->b</Content>"), {"Content": "ab"}),
    "nested": (xml("<Info><City>X</City><Size>3</Size></Info>"), {"Info": {"City": "X", "Size": 3}}),
    "nested, with layout": (xml("\n<Info>\n <City> X </City>\n</Info>\n"), {"Info": {"City": " X "}}),
    "repeated": (xml("<Item>1</Item><Item>2</Item><Item>3</Item>"), {"Item": [1, 2, 3]}),
    "repeated, nested": (xml("<L><I><N>1</N></I><I><N>2</N></I></L>"), {"L": {"I": [{"N": 1}, {"N": 2}]}}),
    "structured Content": (xml("<Content><A>1</A></Content>"), {"Content": {"A": 1}}),
    "repeated Content": (xml("<Content>1</Content><Content>2</Content>"), {"Content": [1, 2]}),
    "repeated Content, the first structured": (
        xml("<Content><A>1</A></Content><Content>2</Content>"), {"Content": [{"A": 1}, 2]}),
    "Content with blanks below another field": (
        xml("<A><Content><![CDATA[ x ]]></Content></A>"), {"A": {"Content": " x "}}),
    "fields named like attributes": (
        xml("<key>1</key><text>2</text><fields>3</fields><content>4</content>"),
        {"key": 1, "text": 2, "fields": 3, "content": 4}),
    "field named Encrypt": (xml("<Encrypt> x </Encrypt>"), {"Encrypt": " x "}),
}


@pytest.mark.parametrize("body, fields", TWINS.values(), ids=TWINS.keys())
def test_parse_xml_equals_json(body: bytes, fields: Dict[str, Any]) -> None:
    assert parse(body) == parse(json.dumps(fields).encode())


@pytest.mark.parametrize("body, fields", TWINS.values(), ids=TWINS.keys())
def test_parse_json_may_be_escaped_or_not(body: bytes, fields: Dict[str, Any]) -> None:
    assert parse(json.dumps(fields, ensure_ascii=False).encode()) == parse(json.dumps(fields).encode())


@pytest.mark.parametrize("text", ["a\x1db", "\x00", "\x0b x", "\ufded", "\ufded\x1d", " a> <![CDATA[ b", " x\n"],
    ids=ascii)
def test_parse_keeps_what_the_user_wrote_to_the_letter(text: str) -> None:
    assert parse(content(text)).content == text
    assert parse(json.dumps({"Content": text}).encode()).content == text


@pytest.mark.parametrize("levels, accepted", [(1, True), (MAX_DEPTH, True), (MAX_DEPTH + 1, False)])
def test_parse_xml_and_json_may_nest_equally_deep(levels: int, accepted: bool) -> None:
    bodies = [xml("<a>" * levels + "x" + "</a>" * levels), b'{"a":' * levels + b'"x"' + b"}" * levels]
    assert [is_accepted(body) for body in bodies] == [accepted, accepted]


def is_accepted(body: bytes) -> bool:
    """Whether ``body`` is a message; any error other than `MalformedPush` is a bug and passes through."""
    try:
        parse(body)
    except MalformedPush:
        return False
    return True


# ---- Odd and accepted


BOM = b"\xef\xbb\xbf"
DECLARATIONS = ['<?xml version="1.0"?>', '<?xml version="1.0" encoding="UTF-8"?>',
    "<?xml version='1.0' encoding='utf-8'?>\n",
                '<?xml version="1.0" encoding="UTF-8" standalone="yes" ?>\r\n\r\n']


@pytest.mark.parametrize("before", [b"", BOM, b" \r\n\t", BOM + b"\n ", *(each.encode() for each in DECLARATIONS),
                                    BOM + DECLARATIONS[1].encode()], ids=ascii)
@pytest.mark.parametrize("after", [b"", b"\n", b" \t\r\n"], ids=ascii)
def test_parse_xml_may_have_layout_and_a_declaration_around_it(before: bytes, after: bytes) -> None:
    assert parse(before + content("x") + after).content == "x"


@pytest.mark.parametrize("before", [b"", BOM, b" \r\n\t", BOM + b"\n "], ids=ascii)
@pytest.mark.parametrize("after", [b"", b"\n", b" \t\r\n"], ids=ascii)
def test_parse_json_may_have_layout_around_it(before: bytes, after: bytes) -> None:
    assert parse(before + b'{"Content": "x"}' + after).content == "x"


def test_parse_trims_an_event_name() -> None:
    # Two of the published third-party events have a blank before the name.
    assert parse(b'{"event": " PACKAGE_AUDIT_PASS"}').event == "PACKAGE_AUDIT_PASS"


def test_parse_takes_raw_control_characters_in_json() -> None:
    assert parse(b'{"Content": "a\x1d\nb"}') == parse(b'{"Content": "a\\u001d\\nb"}')


def test_parse_joins_surrogate_pairs_of_json() -> None:
    assert parse(b'{"Content": "\\ud83d\\uDE00"}').content == "\U0001f600"


@pytest.mark.parametrize("payload, text", [
    (b'{"Content": "\\ud800"}', "\ufffd"), (b'{"Content": "x\\uD83D\\ud83d\\ude00"}', "x\ufffd\U0001f600"),
    (b'{"Content": "\\ude00\\ud83d"}', "\ufffd\ufffd"), (b'{"Content": "\\\\ud800"}', "\\ud800"),
    (b'{"Content": "\\\\\\ud800\\n"}', "\\\ufffd\n"), (b'{"Content": "\\ud83d\xed\xb8\x80"}', "\ufffd" * 4),
    (b'{"Content": "\xff\xe4\xbd"}', "\ufffd\ufffd"), (b'\xef\xbb\xbf {"Content": "\\udfff"}', "\ufffd"),
    (content("\\ud800"), "\\ud800"), (b"<xml><Content>a\xff\xed\xa0\x80</Content></xml>", "a" + "\ufffd" * 4),
    (b"<xml><Content>\x1d\xff</Content></xml>", "\x1d\ufffd"),
    ("<xml><Content>你好</Content></xml>".encode("gbk"), "\ufffd\ufffd\ufffd")], ids=ascii)
def test_replace_unreadable_leaves_a_message_that_can_be_read(payload: bytes, text: str) -> None:
    assert parse(replace_unreadable(payload)).content == text


@pytest.mark.parametrize("payload", [
    *PUSHES.values(), b"", b"\xef\xbb\xbf{}", '{"Content": "你好\\ud83d\\ude00"}'.encode(),
    b'{"a": "\\\\ud800 \\u0000 \\" \\ud83D\\uDe00"}', content("\ufffe\x1d")], ids=lambda payload: ascii(payload)[:24])
def test_replace_unreadable_changes_nothing_that_can_be_read(payload: bytes) -> None:
    assert replace_unreadable(payload) == payload


@pytest.mark.parametrize("payload", [b'{"\\ud800": 1, "\\udfff": 2}', b'{"A\xff": 1, "A\xfe": 2}', b"<A\xff/>",
                                     b"<xml><A\xff>1</A\xfe></xml>", b'{"A": "x\xff', b"\xff{}"], ids=ascii)
def test_replace_unreadable_makes_no_message_of_what_is_malformed(payload: bytes) -> None:
    assert not is_accepted(replace_unreadable(payload))


def test_parse_keeps_a_backslash_that_only_looks_like_a_surrogate() -> None:
    assert parse(b'{"Content": "\\\\ud800"}').content == "\\ud800"


def test_parse_takes_a_missing_type_and_every_type_of_tomorrow() -> None:
    assert parse(b"{}").msg_type == ""
    assert parse(xml("<MsgType>hologram</MsgType><Depth>3</Depth>")).fields == {"MsgType": "hologram", "Depth": "3"}


def test_parse_takes_any_name_in_json() -> None:
    names: List[str] = ["", " ", "a b", "é", "\U0001f600", "__class__", "a/b", "\x00", "n:a"]
    assert list(parse(json.dumps(dict.fromkeys(names, "x")).encode()).fields) == names


def test_parse_fields_is_what_a_message_holds() -> None:
    assert parse(PUSHES["text, XML"]) == Message(parse_fields(PUSHES["text, XML"]))


# ---- Refusals say why, and nothing of the text


@pytest.mark.parametrize("body, why", [
    (b"", "empty"), (b" \n", "empty"), (b"hello", "neither an XML document nor a JSON object"),
    (b"[]", "neither an XML document nor a JSON object"), (b"<xml>", "not XML"), (b"<xml></lmx>", "not XML"),
    (b"{", "not JSON"), (b"{'a': 1}", "not JSON"), (b'{"a": "\xff"}', "not UTF-8"), (b'{"a": 1, "a": 2}', "twice"),
    (b"<!DOCTYPE xml><xml/>", "DOCTYPE"), (b'<?xml version="1.0" encoding="gbk"?><xml/>', "UTF-8"),
    *[(content(text), "the sender has not escaped ]]>") for text in ("a]]>b", "]]>", "\x1d]]>", "a]]>&#29;")],
    (xml("<Content>a]]>b</Content>"), "the sender has not escaped ]]>"),
    (content("a]]>&"), "invalid token"), (content("a]]><b"), "mismatched tag|invalid token")], ids=ascii)
def test_parse_refusal_says_why(body: bytes, why: str) -> None:
    with pytest.raises(MalformedPush, match=why):
        parse(body)


@pytest.mark.parametrize("body", [
    b"s3cret", b"<xml><s3cret>", b"<xml>&s3cret;</xml>", b"<xml><A>s3cret</B></xml>", b"<xml>s3cret]]></xml>",
    b'{"s3cret" 1}', b'{"A": s3cret}', b'{"A": "s3cret\\x"}', b'{"s3cret": 1, "s3cret": 2}', b'{"s3cret": NaN}',
    b'{"s3cret\\ud800": 1}',
    b"<?s3cret?>", b'<?xml version="1.0" encoding="s3cret"?><xml/>', b"<!DOCTYPE s3cret><xml/>"], ids=ascii)
def test_parse_refusal_never_repeats_the_text(body: bytes) -> None:
    with pytest.raises(MalformedPush) as error:
        parse(body)
    assert "s3cret" not in str(error.value)
