"""Start a server, push one signed packet at it, show the answer and what the handler prints, and stop: `make demo`."""

from __future__ import annotations

import http.client
import pathlib
import subprocess
import sys
import time
from urllib.parse import urlencode

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kfserver import sign  # noqa: E402  (the folder above is not on the path of a script)

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
    with subprocess.Popen(command, stdout=subprocess.PIPE, universal_newlines=True, cwd=str(ROOT)) as server:
        assert server.stdout is not None
        print("$", " ".join(["python3", "kfserver.py"] + command[2:]))
        line = server.stdout.readline()
        print(line, end="", flush=True)
        answer = push(int(line.rstrip().rstrip("/").rpartition(":")[2]))
        server.terminate()
        print(server.stdout.read(), end="")
    return 0 if answer == b"success" and server.returncode == 0 else 1


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
