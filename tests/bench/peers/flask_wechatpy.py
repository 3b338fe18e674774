"""The peer on Flask with wechatpy, under gunicorn's threaded worker."""

import os
import sys

from common import Receiver, RecentKeys, arguments, handle
from flask import Flask, request
from wechatpy import parse_message
from wechatpy.exceptions import InvalidSignatureException
from wechatpy.utils import check_signature

THREADS = 32


def take_xml(recent: RecentKeys, body: bytes) -> None:
    """One XML push, through wechatpy's parser."""
    message = parse_message(body)
    if recent.claim((message.target, message.source, str(message.id))):
        handle(message.source)


def create_app(token: str) -> Flask:
    """The application; gunicorn calls this in its worker."""
    app = Flask(__name__)
    recent = RecentKeys()
    # wechatpy knows XML only, so JSON is parsed by Flask: the facility that its users have at hand.
    json_receiver = Receiver(token)

    @app.post("/")
    def push() -> tuple[str, int]:
        query = request.args
        try:
            check_signature(token, query.get("signature"), query.get("timestamp"), query.get("nonce"))
        except InvalidSignatureException:
            return "bad signature", 403
        if request.is_json:
            json_receiver.take(request.get_json())
        else:
            take_xml(recent, request.get_data())
        return "success", 200

    return app


def main() -> None:
    """Become gunicorn, with one worker and no access log."""
    options = arguments()
    os.chdir(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, "-m", "gunicorn", "--bind", f"127.0.0.1:{options.port}", "--log-level", "warning"]
    command += ["--graceful-timeout", "2", "--worker-class", "gthread", "--workers", "1", "--threads", str(THREADS)]
    command.append(f"flask_wechatpy:create_app({options.token!r})")
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
