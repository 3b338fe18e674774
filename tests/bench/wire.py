"""What the platform sends: message bodies and signatures, as the harness needs them outside of wrk."""

import hashlib
import time
from urllib.parse import urlencode

TOKEN = "benchtoken"
APP_ID = "bench-app"
PROBE = "probe"

_XML = """<xml>
<ToUserName><![CDATA[{app_id}]]></ToUserName>
<FromUserName><![CDATA[{sender}]]></FromUserName>
<CreateTime>1482048670</CreateTime>
<MsgType><![CDATA[text]]></MsgType>
<Content><![CDATA[你好，我的订单什么时候发货？]]></Content>
<MsgId>{msg_id}</MsgId>
</xml>"""

_JSON = (
    '{{"ToUserName": "{app_id}", "FromUserName": "{sender}", "CreateTime": 1482048670, "MsgType": "text", '
    '"Content": "你好，我的订单什么时候发货？", "MsgId": {msg_id}}}'
)


def message(body_format: str, sender: str, msg_id: int) -> bytes:
    """A text message; push.lua builds the same one."""
    template = _JSON if body_format == "json" else _XML
    return template.format(app_id=APP_ID, sender=sender, msg_id=msg_id).encode()


def signature(*parts: str) -> str:
    """The platform's signature of these strings."""
    return hashlib.sha1("".join(sorted(parts)).encode()).hexdigest()


def content_type(body_format: str) -> str:
    """What the platform's pushes in this format are labelled with here; kfserver does not look at it."""
    return "application/json" if body_format == "json" else "text/xml"


def signed_query(encrypted_text: str = "") -> str:
    """A query that is signed now, for an encrypted body too if its text is given."""
    timestamp, nonce = str(int(time.time())), "bench"
    query = {"signature": signature(TOKEN, timestamp, nonce), "timestamp": timestamp, "nonce": nonce}
    if encrypted_text:
        query["msg_signature"] = signature(TOKEN, timestamp, nonce, encrypted_text)
    return urlencode(query)
