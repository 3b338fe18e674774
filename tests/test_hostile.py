"""Hostile bodies: each is refused with 400, or taken, and at the size limit none costs more than 10 MiB of memory.

What is measured is the peak of what Python allocates while `Endpoint.handle` runs, the parsers in C included; the body
itself is the sender's, and is there before. No test here asks for time: a machine under load would fail it.
"""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from typing import Callable, Dict, Tuple

import pytest
from conftest import World, signed_query
from support import PUBLISHED, ROOT

from kfserver import MAX_DEPTH, Response, Settings

LIMIT = Settings().max_body
MOST_MEMORY = 10 * 1024 * 1024
BOM = b"\xef\xbb\xbf"
# Of values, or of levels: what hostile bodies are made of.
COUNT = 100_000


def fill(head: bytes, unit: bytes, tail: bytes = b"") -> Callable[[], bytes]:
    """A body of the size limit, made when it is needed: ``unit`` as often as there is room for it."""
    return lambda: head + unit * ((LIMIT - len(head) - len(tail)) // len(unit)) + tail


def measure(world: World, body: bytes) -> Tuple[Response, int]:
    """The answer to a push, and the most bytes that were allocated on the way to it."""
    tracemalloc.start()
    try:
        return world.push(body), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---- Small and malformed

DOCTYPE = ('<!DOCTYPE xml [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">'
           '<!ENTITY c SYSTEM "file:///etc/passwd">]>')
ENTITIES = "<xml><Content>&b;&c;</Content></xml>"
DECLARED = '<?xml version="1.0" encoding="{}"?>'

DOCTYPES: Dict[str, bytes] = {
    "first": (DOCTYPE + ENTITIES).encode(),
    "bare": b"<!DOCTYPE xml><xml/>",
    "in small letters": b"<!doctype xml><xml/>",
    "external": b'<!DOCTYPE xml SYSTEM "http://127.0.0.1/x.dtd"><xml/>',
    "after a BOM": BOM + (DOCTYPE + ENTITIES).encode(),
    "after blanks": (" \r\n\t" + DOCTYPE + ENTITIES).encode(),
    "after a declaration": (DECLARED.format("UTF-8") + DOCTYPE + ENTITIES).encode(),
    "after a declaration and blanks": (DECLARED.format("UTF-8") + "\n \n" + DOCTYPE + ENTITIES).encode(),
    "after a comment": ("<!-- <xml> -->" + DOCTYPE + ENTITIES).encode(),
    "after a declaration and a comment": (DECLARED.format("UTF-8") + "<!-- > -->" + DOCTYPE + ENTITIES).encode(),
    "after a processing instruction": ("<?x <xml> ?>" + DOCTYPE + ENTITIES).encode(),
    "after two declarations": (DECLARED.format("UTF-8") * 2 + DOCTYPE + ENTITIES).encode(),
    "after a control character": ("\x0c" + DOCTYPE + ENTITIES).encode(),
    "after a hidden control character": ("<\x00" + DOCTYPE[1:] + ENTITIES).encode(),
    "inside the root": f"<xml>{DOCTYPE}</xml>".encode(),
    "inside a field": f"<xml><Content>{DOCTYPE}&b;</Content></xml>".encode(),
    "after the root": f"<xml/>{DOCTYPE}".encode(),
    **{f"in {encoding}": (DOCTYPE + ENTITIES).encode(encoding)
       for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-7", "cp037")},
    **{f"in {encoding}, declared": (DECLARED.format(encoding) + DOCTYPE + ENTITIES).encode(encoding)
       for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037", "latin-1")},
}

XML: Dict[str, bytes] = {
    "unfinished": b"<xml><Content>hi", "unfinished tag": b"<xml", "mismatched": b"<xml></lmx>",
    "two roots": b"<xml/><xml/>", "text after the root": b"<xml/>hi", "text before the root": b"hi<xml/>",
    "no name": b"<>", "only a mark": b"<", "only a declaration": b'<?xml version="1.0"?>',
    "only a comment": b"<!-- -->", "CDATA for a root": b"<![CDATA[x]]>",
    "unfinished CDATA": b"<xml><![CDATA[x</xml>", "CDATA end in text": b"<xml><A>]]></A></xml>",
    "HTML": b"<html><body><p>Hello<br></body></html>", "entity that is not declared": b"<xml><A>&a;</A></xml>",
    "bare ampersand": b"<xml><A>a & b</A></xml>",
    "reference beyond Unicode": b"<xml><A>&#x110000;</A></xml>",
    "reference of many digits": b"<xml><A>&#" + b"9" * 5000 + b";</A></xml>",
    "attribute twice": b'<xml a="1" a="2"/>', "attribute without quotes": b"<xml a=1/>",
    "control character in a name": b"<x\x1dml/>",
    "instruction without a name": b"<??><xml/>", "unfinished instruction": b"<?x <xml/>",
    "unfinished comment": b"<!-- <xml/>", "comment that only looks finished": b"<!--><xml/>",
    "DOCTYPE after what only looks like a comment": b"<!--><xml>--><!DOCTYPE xml><xml/>",
    "DOCTYPE after instructions": b"<?a?>\n<!-- <xml> --><?b <xml>?><!DOCTYPE xml><xml/>",
    "declaration inside": b'<xml><?xml version="1.0"?></xml>',
    "CDATA end in text that is marked up": b"<xml><A><![CDATA[a]]>b]]></A></xml>",
}

ENCODINGS: Dict[str, bytes] = {
    **{f"{name}, unknown or not ours": (DECLARED.format(name) + "<xml><A>1</A></xml>").encode()
       for name in ("x", "", "gbk", "GB18030", "latin-1", "ISO-8859-1", "UTF-16", "UTF-16LE", "utf-32", "utf-7",
                    "cp037", "rot13", "idna", "unicode_escape", "utf-8\x00", "a" * 5000)},
    "single quotes": b"<?xml version='1.0' encoding='gbk'?><xml/>",
    "blanks around": b'<?xml version="1.0" encoding = "gbk"?><xml/>',
    "newlines around": b'<?xml\nversion="1.0"\nencoding\n=\n"gbk"\n?><xml/>',
    "encoding first": b'<?xml encoding="gbk" version="1.0"?><xml/>',
    "encoding last": b'<?xml version="1.0" standalone="yes" encoding="gbk"?><xml/>',
    "no blank before": b'<?xml version="1.0"encoding="gbk"?><xml/>',
    "US-ASCII, a lie": (DECLARED.format("us-ascii") + "<xml><A>你</A></xml>").encode(),
    "UTF-8, a lie": (DECLARED.format("UTF-8") + "<xml><A>é</A></xml>").encode("latin-1"),
    "UTF-8, in fact GBK": (DECLARED.format("UTF-8") + "<xml><A>你好</A></xml>").encode("gbk"),
    "UTF-8, in fact UTF-16": (DECLARED.format("UTF-8") + "<xml><A>1</A></xml>").encode("utf-16"),
    **{f"XML in {encoding}": "<xml><A>1</A></xml>".encode(encoding)
       for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp037")},
    **{f"JSON in {encoding}": '{"A": "1"}'.encode(encoding)
       for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp037")},
    **{f"XML, {name}": b"<xml><A>" + octets + b"</A></xml>" for name, octets in {
        "cut character": b"\xe4\xbd", "overlong": b"\xc0\xbc", "overlong NUL": b"\xc0\x80", "no lead": b"\x80",
        "half a character": b"\xed\xa0\x80", "half a character beside a control character": b"\x1d\xed\xa0\x80",
        "beyond Unicode": b"\xf4\x90\x80\x80", "FF": b"\xff", "FF beside a control character": b"\x1d\xff"}.items()},
    **{f"JSON, {name}": b'{"A": "' + octets + b'"}' for name, octets in {
        "cut character": b"\xe4\xbd", "overlong": b"\xc0\xa2", "half a character": b"\xed\xa0\x80",
        "beyond Unicode": b"\xf4\x90\x80\x80", "no lead": b"\x80", "FF": b"\xff"}.items()},
    "two BOMs, XML": BOM + BOM + b"<xml/>", "two BOMs, JSON": BOM + BOM + b"{}", "only a BOM": BOM,
    "BOM inside": b"{" + BOM + b'"A": 1}',
}

JSON: Dict[str, bytes] = {
    "array": b"[]", "array of a message": b'[{"MsgType": "text"}]', "text": b'"hi"', "number": b"1", "null": b"null",
    "true": b"true", "NaN alone": b"NaN", "unfinished": b'{"A": "hi', "no value": b'{"A"}', "only a mark": b"{",
    "two": b"{}{}", "something after": b"{}x", "NUL after": b"{}\x00", "comma at the end": b'{"A": 1,}',
    "comment": b'{"A": 1 /* x */}', "single quotes": b"{'A': 1}", "name without quotes": b"{A: 1}",
    "number for a name": b"{1: 1}", "leading zero": b'{"A": 01}', "plus": b'{"A": +1}', "bare point": b'{"A": .5}',
    "hexadecimal": b'{"A": 0x10}', "True": b'{"A": True}', "bad escape": b'{"A": "\\x"}',
    "short escape": b'{"A": "\\u12"}', "vertical tab for a blank": b'{"A":\x0b1}', "form": b"A=1&B=2",
    **{f"{name}": f'{{"A": {name}}}'.encode() for name in ("NaN", "Infinity", "-Infinity", "nan", "-NaN")},
    "NaN inside": b'{"A": {"B": [1, NaN]}}',
    "name twice": b'{"A": 1, "A": 1}', "name twice, inside": b'{"A": [{"B": 1, "B": 2}]}',
    "name twice, once escaped": b'{"A": 1, "\\u0041": 2}', "name many times": b'{"A": 1' + b', "A": 1' * 1000 + b"}",
    **{f"half a character: {escape}": f'{{"A": "{escape}"}}'.encode()
       for escape in ("\\ud800", "\\udfff", "\\uD83D", "\\uDBFF\\n", "\\ude00\\ud83d", "\\ud83dx",
                      "x\\ud83d\\ud83d\\ude00")},
    "half a character in a name": b'{"\\ud800": 1}', "half a character inside": b'{"A": [{"B": ["\\ud800"]}]}',
    "half a character in an inner name": b'{"A": {"\\udc00": 1}}',
    "5,000 digits": b'{"A": ' + b"9" * 5000 + b"}", "5,000 digits, negative": b'{"A": -' + b"9" * 5000 + b"}",
    "5,000 digits after the point": b'{"A": 0.' + b"9" * 5000 + b"}",
    "5,000 digits of an exponent": b'{"A": 1e' + b"9" * 5000 + b"}",
    "5,000 digits inside": b'{"A": [[' + b"9" * 5000 + b"]]}", "5,000 zeros": b'{"A": 0.' + b"0" * 5000 + b"}",
}

SMALL = {f"{group}: {name}": body for group, cases in (
    ("DOCTYPE", DOCTYPES), ("XML", XML), ("encoding", ENCODINGS), ("JSON", JSON)) for name, body in cases.items()}


@pytest.mark.parametrize("body", SMALL.values(), ids=SMALL.keys())
def test_handle_refuses_a_malformed_body(world: World, body: bytes) -> None:
    response, memory = measure(world, body)
    assert (response.status, world.submitted) == (400, [])
    assert memory < MOST_MEMORY


@pytest.mark.parametrize("body", SMALL.values(), ids=SMALL.keys())
def test_handle_refuses_every_beginning_of_a_malformed_body_without_an_error(body: bytes) -> None:
    # A sender may stop anywhere; what then is well-formed by chance may be taken, and nothing may raise.
    for end in range(0, len(body), 1 + len(body) // 20):
        assert World().push(body[:end]).status in (200, 400)


# ---- Hostile and large

LARGE: Dict[str, Callable[[], bytes]] = {
    "XML: 100,000 nested": lambda: b"<a>" * COUNT + b"</a>" * COUNT,
    "XML: 100,000 nested, unfinished": lambda: b"<a>" * COUNT,
    "XML: 9,000 nested": lambda: b"<a>" * 9000 + b"</a>" * 9000,
    "XML: 100,000 siblings": lambda: b"<xml>" + b"<a/>" * COUNT + b"</xml>",
    "XML: 100,000 siblings with a name each": lambda: b"<xml>" + b"".join(
        b"<a%d/>" % number for number in range(COUNT)) + b"</xml>",
    "XML: siblings of all kinds": fill(b"<xml>", b"<a/><!----><![CDATA[]]>", b"</xml>"),
    "XML: 100,000 attributes": lambda: b"<xml><a " + b"".join(
        b'b%d=""' % number for number in range(COUNT)) + b"/></xml>",
    "XML: attributes on every element": fill(b"<xml>", b'<a b="" c=""/>', b"</xml>"),
    "XML: megabyte name": fill(b"<xml><", b"a", b"/></xml>"),
    "XML: megabyte name, in Chinese": fill(b"<xml><", "你".encode(), b"/></xml>"),
    "XML: megabyte name, unfinished": fill(b"<xml><", b"a"),
    "XML: megabyte name of the root": fill(b"<", b"a", b"/>"),
    "XML: megabyte of the root's end": fill(b"<xml></", b"a", b">"),
    "XML: megabyte declaration": fill(b'<?xml version="1.0"', b" x", b"?><xml/>"),
    "XML: megabyte declaration, unfinished": fill(b"<?xml ", b" encoding="),
    "XML: megabyte encoding": fill(b'<?xml version="1.0" encoding="', b"a", b'"?><xml/>'),
    "XML: megabyte instruction first": fill(b"<?a ", b"<a>", b"?><xml/>"),
    "XML: megabyte of instructions first": fill(b"", b"<?a?>", b"<xml/>"),
    "XML: megabyte of comments first": fill(b"", b"<!---->", b"<xml/>"),
    "XML: megabyte of references to control characters": fill(b"<xml><A>", b"ab&#29;", b"</A></xml>"),
    "XML: megabyte DOCTYPE": fill(b"<!DOCTYPE xml [", b'<!ENTITY a "&a;">', b"]><xml/>"),
    "XML: megabyte comment, unfinished": fill(b"<xml><!--", b"- -\n"),
    "XML: megabyte CDATA, unfinished": fill(b"<xml><Content><![CDATA[", b"]]\n"),
    "XML: megabyte of lines, unfinished": fill(b"<xml><Content>", b"ab\n"),
    "XML: megabyte of references, unfinished": fill(b"<xml><Content>", b"ab&amp;"),
    "XML: megabyte of control characters, unfinished": fill(b"<xml><Content>", b"\x1d"),
    "XML: megabyte of emoji and control characters, unfinished": fill(b"<xml><Content>\xf0\x9f\x98\x80", b"a\x1d"),
    "XML: megabyte of marks": fill(b"", b"<"),
    "XML: megabyte of blanks": fill(b"<xml", b" \n"),
    "XML: megabyte namespace": fill(b'<xml xmlns="', b"a", b'"><b/></xml>'),
    "JSON: depth 100,000, arrays": lambda: b'{"a":' + b"[" * COUNT + b"]" * COUNT + b"}",
    "JSON: depth 100,000, objects": lambda: b'{"a":' * COUNT + b"1" + b"}" * COUNT,
    "JSON: depth 100,000, unfinished": lambda: b'{"a":' * COUNT,
    "JSON: depth 20,000, arrays": lambda: b'{"a":' + b"[" * 19990 + b"]" * 19990 + b"}",
    "JSON: depth 9,000, objects": lambda: b'{"a":' * 9000 + b"1" + b"}" * 9000,
    "JSON: 100,000 values": lambda: b'{"a": [' + b"1," * COUNT + b"1]}",
    "JSON: 100,000 empty objects": lambda: b'{"a": [' + b"{}," * COUNT + b"{}]}",
    "JSON: 100,000 names": lambda: ("{" + ",".join(f'"{number}":1' for number in range(COUNT)) + "}").encode(),
    "JSON: megabyte number": fill(b'{"a":', b"9", b"}"),
    "JSON: megabyte fraction": fill(b'{"a":0.', b"9", b"}"),
    "JSON: megabyte text, unfinished": fill(b'{"a":"\xf0\x9f\x98\x80', b"a"),
    "JSON: megabyte text with half a character": fill(b'{"a":"', b"a", b'\\ud800"}'),
    "JSON: megabyte text with an emoji and half a character": fill(b'{"a":"\xf0\x9f\x98\x80', b"a", b'\\ud800"}'),
    "JSON: megabyte text with an escaped emoji and half a one": fill(b'{"a":"\\ud83d\\ude00', b"a", b'\\ud83d"}'),
    "JSON: megabyte of half characters": fill(b'{"a":"', b"\\ud800", b'"}'),
    "JSON: megabyte of escapes, unfinished": fill(b'{"a":"', b"ab\\n"),
    "JSON: megabyte of one name": fill(b'{"a":1', b',"a":1', b"}"),
    "JSON: megabyte of marks": fill(b"", b"{"),
    "no format: megabyte of blanks": fill(b"", b" \n"),
    "no format: megabyte of NUL": fill(b"", b"\x00"),
    "no format: megabyte form": fill(b"echo", b"&"),
}


@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
def test_handle_refuses_a_large_hostile_body_in_little_memory(world: World, make: Callable[[], bytes]) -> None:
    body = make()
    assert len(body) <= LIMIT
    response, memory = measure(world, body)
    assert response.status == 400
    assert memory < MOST_MEMORY


# ---- Lawful and large

TEXT = b"<xml><MsgType>text</MsgType><Content><![CDATA["
TEXT_END = b"]]></Content></xml>"
EMOJI = "\U0001f600".encode()

HEAVY: Dict[str, Callable[[], bytes]] = {
    "XML text": fill(TEXT, b"a", TEXT_END),
    "XML text in Chinese": fill(TEXT, "你".encode(), TEXT_END),
    "XML text with an emoji": fill(TEXT + EMOJI, b"a", TEXT_END),
    "XML text of lines": fill(TEXT, b"ab\n", TEXT_END),
    "XML text of empty lines": fill(TEXT, b"\n", TEXT_END),
    "XML text of lines with returns": fill(TEXT, b"ab\r", TEXT_END),
    "XML text of brackets": fill(TEXT, b"ab]", TEXT_END),
    "XML text of references": fill(b"<xml><Content>", b"ab&amp;", b"</Content></xml>"),
    "XML text of Chinese lines": fill(TEXT, "你\n".encode(), TEXT_END),
    "XML text with blanks at its ends": fill(TEXT + b" " + EMOJI, b"a", b" " + TEXT_END),
    "XML text of control characters": fill(TEXT, b"\x1d", TEXT_END),
    "XML text with an emoji and a control character": fill(TEXT + EMOJI + b"\x1d", b"a", TEXT_END),
    "XML event of control characters": fill(b"<xml><Event><![CDATA[x", b"\x1d", b"]]></Event></xml>"),
    "XML MsgId": fill(b"<xml><MsgId>", b"9", b"</MsgId></xml>"),
    "XML sender": fill(b"<xml><FromUserName>", "你".encode(), b"</FromUserName></xml>"),
    "XML layout": fill(b"<xml>", b" \n", b"</xml>"),
    "XML comment": fill(b"<xml><!--", b"a\n", b"--></xml>"),
    "XML instruction": fill(b"<xml><?a ", b"a", b"?></xml>"),
    "XML instruction first": fill(b"<?a ", b"a", b"?><xml/>"),
    "XML of instructions first": lambda: b"<?a?>" * 19990 + b"<xml/>",
    "XML namespace": fill(b'<xml xmlns="', b"a", b'"><b/></xml>'),
    "XML text of U+FFFF": fill(TEXT, b"\xef\xbf\xbf", TEXT_END),
    "XML attribute": fill(b'<xml a="', b"a\n", b'"/>'),
    "XML attribute of references": fill(b'<xml a="', b"&amp;", b'"/>'),
    "XML of many names": lambda: b"<xml>" + b"".join(b"<n%042d/>" % number for number in range(19990)) + b"</xml>",
    "XML of many attributes": lambda: b"<xml><a " + b" ".join(
        b'n%042d=""' % number for number in range(19990)) + b"/></xml>",
    "XML of 64 KiB of elements": lambda: b"<xml>" + b"<a/>" * 16000 + b"</xml>",
    "XML of 64 KiB of attributes": lambda: b"<xml>" + b'<a b=""/>' * 7200 + b"</xml>",
    "JSON text": fill(b'{"Content":"', b"a", b'"}'),
    "JSON text with an emoji": fill(b'{"Content":"' + EMOJI, b"a", b'"}'),
    "JSON text with an escaped emoji": fill(b'{"Content":"\\ud83d\\ude00', b"a", b'"}'),
    "JSON text of emoji": fill(b'{"Content":"', EMOJI, b'"}'),
    "JSON text of escaped emoji": fill(b'{"Content":"', b"\\ud83d\\ude00", b'"}'),
    "JSON text of escapes": fill(b'{"Content":"', b"ab\\n", b'"}'),
    "JSON text of escaped characters": fill(b'{"Content":"', b"\\u4f60", b'"}'),
    "JSON text of control characters": fill(b'{"Content":"', b"\x1d", b'"}'),
    "JSON MsgId": fill(b'{"MsgId":"', b"9", b'"}'),
    "JSON name": fill(b'{"', b"a", b'":1}'),
    "JSON layout": fill(b'{"a":1', b" \n", b"}"),
    "JSON of many names": lambda: b"{" + b",".join(
        b'"%040d":"%06d"' % (number, number) for number in range(18000)) + b"}",
    "JSON of 64 KiB of empty objects": lambda: b'{"a":[' + b"{}," * 21000 + b"{}]}",
    "JSON of 64 KiB of objects": lambda: b'{"a":[' + b'{"":0},' * 9300 + b"{}]}",
    "JSON of 64 KiB of arrays": lambda: b'{"a":[' + b"[]," * 21000 + b"[]]}",
}


@pytest.mark.parametrize("make", HEAVY.values(), ids=HEAVY.keys())
def test_handle_takes_or_refuses_a_large_body_in_little_memory(world: World, make: Callable[[], bytes]) -> None:
    body = make()
    assert len(body) <= LIMIT
    response, memory = measure(world, body)
    assert response.status in (200, 400)
    assert memory < MOST_MEMORY


SEALED = PUBLISHED["encrypted"][0]


@pytest.mark.parametrize("make", [
    fill(b'{"Encrypt":"', b"A", b'"}'),
    fill(b"<xml><Encrypt>", b"AAAA\n", b"</Encrypt></xml>"),
    fill(b'{"Encrypt":"' + EMOJI, b"A", b'"}')], ids=["JSON", "XML", "JSON with an emoji"])
def test_handle_refuses_a_large_envelope_that_is_not_signed_in_little_memory(make: Callable[[], bytes]) -> None:
    world = World(token=SEALED["token"], aes_key=SEALED["encoding_aes_key"], app_id=SEALED["app_id"])
    response, memory = measure(world, make())
    assert response.status in (400, 403)
    assert memory < MOST_MEMORY


NO_TEXTS = [fill(b'{"Content":"' + head, unit, b'"}')
            for head in (b"", EMOJI, b"\\ud800") for unit in (b"\xff", b"a\xff", b"a")]


@pytest.mark.parametrize("make", [*LARGE.values(), *HEAVY.values(), *NO_TEXTS])
def test_handle_reads_what_is_proven_in_little_memory_too(make: Callable[[], bytes]) -> None:
    world, body = World(token="token"), make()
    tracemalloc.start()
    try:
        response = world.push(body, signed_query("token"))
        assert tracemalloc.get_traced_memory()[1] < MOST_MEMORY
    finally:
        tracemalloc.stop()
    assert response.status in (200, 400)


# ---- Deep

DEEP: Dict[str, Tuple[str, str]] = {
    "arrays": ("[", "]"), "objects": ('{"a":', "}"), "arrays and objects": ('[{"a":', "}]"),
    "arrays after texts": ('["\\"[",', "]"), "elements": ("<a>", "</a>"),
    "elements with texts": ("<a>b<![CDATA[</a>]]>", "</a>"), "elements and instructions": ("<a><?b?>", "</a>"),
    "elements with control characters": ("<a>\x1d&#29;", "</a>")}
# What threads get on some systems is 256 KiB or less; each of these runs recursive code out of that.
LEVELS = 60_000
IN_SMALL_THREADS = """
import sys, threading
sys.path[:0] = sys.argv[1:3]
from conftest import World, signed_query
from support import PUBLISHED
from test_hostile import DEEP, LEVELS

SEALED = PUBLISHED["encrypted"][0]
SAFE = {"token": SEALED["token"], "aes_key": SEALED["encoding_aes_key"], "app_id": SEALED["app_id"]}

def ask():
    for opening, closing in DEEP.values():
        for count in (LEVELS // len(opening), LEVELS):
            for ending in ("1" + closing * count, ""):
                deep = opening * count + ending
                xml = [deep, f"<xml><Encrypt>{deep}</Encrypt></xml>", f"<xml><echoStr>{deep}</echoStr></xml>"]
                json = ['{"a":' + deep + "}", '{"Encrypt":' + deep + "}", '{"echoStr":1,"a":' + deep]
                for body in xml if opening.startswith("<") else json:
                    for settings in ({}, {"token": SAFE["token"]}, SAFE, {**SAFE, "compatible": True}):
                        query = signed_query(SAFE["token"]) if settings else ""
                        statuses.add(World(max_body=2 ** 24, **settings).push(body.encode(), query).status)

statuses = set()
threading.stack_size(256 * 1024)
thread = threading.Thread(target=ask)
thread.start()
thread.join()
print(sorted(statuses))
"""


def test_handle_refuses_any_depth_on_a_small_stack() -> None:
    # A process of its own: what does not hold kills it.
    run = subprocess.run([sys.executable, "-c", IN_SMALL_THREADS, str(ROOT), str(ROOT / "tests")],
                         capture_output=True, timeout=300)
    assert (run.returncode, run.stdout.decode()) == (0, "[400, 403]\n"), run.stderr.decode()[-2000:]


@pytest.mark.parametrize("shape", DEEP.keys())
@pytest.mark.parametrize("levels, status", [(MAX_DEPTH - 1, 200), (MAX_DEPTH + 3, 400), (1000, 400)])
def test_handle_takes_what_is_not_too_deep(world: World, shape: str, levels: int, status: int) -> None:
    opening, closing = DEEP[shape]
    levels = levels // 2 if "and objects" in shape and status == 200 else levels
    deep = opening * levels + "1" + closing * levels
    body = f"<xml>{deep}</xml>" if opening.startswith("<") else f'{{"a":{deep}}}'
    assert world.push(body.encode()).status == status


@pytest.mark.parametrize("text", ["[" * 1000, '\\"' + "{" * 1000, "\\\\" + "[" * 1000, '\\\\\\"[' * 1000, "<a>" * 1000],
    ids=lambda text: text[:8])
def test_handle_does_not_count_brackets_in_texts(world: World, text: str) -> None:
    assert world.push(b'{"a":"' + text.encode() + b'","b":[[1]]}').status == 200
    assert world.push(f"<xml><a><![CDATA[{text}]]></a></xml>".encode()).status == 200
