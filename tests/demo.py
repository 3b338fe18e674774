"""Start a server, push one signed packet at it, show the answer and what the handler prints, and stop: `make demo`."""

from __future__ import annotations

import http.client
import pathlib
import sys
import time
from urllib.parse import urlencode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support import Program  # noqa: E402  (kfserver, which it imports, is in the folder above)

from kfserver import sign  # noqa: E402

TOKEN = "demo-token"
PACKET = """<xml>
   <ToUserName><![CDATA[toUser]]></ToUserName>
   <FromUserName><![CDATA[fromUser]]></FromUserName>
   <CreateTime>1482048670</CreateTime>
   <MsgType><![CDATA[text]]></MsgType>
   <Content><![CDATA[order 12345]]></Content>
   <MsgId>1234567890123456</MsgId>
</xml>"""


def main() -> int:
    command = [sys.executable, str(ROOT / "kfserver.py"), "--host", "127.0.0.1", "--port", "0", "--token", TOKEN]
    with Program(command=command, folder=ROOT, log_apart=True) as server:
        print("$", " ".join(["python3", "kfserver.py"] + command[2:]))
        server.read_until("listening on ")
        print(server.output, end="", flush=True)
        shown, answer = len(server.output), push(server.port)
        status = server.end()
        print(server.output[shown:], end="")
        print(server.log, end="", file=sys.stderr)
    return 0 if answer == b"success" and status == 0 else 1


def push(port: int) -> bytes:
    timestamp = str(int(time.time()))
    query = urlencode({"signature": sign(TOKEN, timestamp, "nonce"), "timestamp": timestamp, "nonce": "nonce"})
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request("POST", "/?" + query, PACKET.encode())
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    print(f"POST /?{query} -> {response.status} {answer.decode()}", flush=True)
    return answer


if __name__ == "__main__":
    sys.exit(main())
