"""The README's tables of settings, made from `SETTING_FIELDS`: printed, or with --update written into the README.

There are two, one in each half: Chinese, then English.
"""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any, List

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kfserver import SETTING_FIELDS  # noqa: E402  (the folder above is not on the path of a script)

README = ROOT / "README.md"
# What stands between the markers, which are comments in Markdown.
PLACE = re.compile("(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)

# What each setting is, in Chinese. The English texts are those of --help.
CHINESE = {
    "host": "监听地址",
    "port": "监听端口；0 表示任选一个空闲端口",
    "unix": "监听 Unix 套接字的路径，代替地址和端口",
    "path": "接收推送的唯一路径；空：任何路径",
    "token": "控制台的 Token；空：任何人都能推送",
    "allow_unsigned": "设了 Token 也接受没有签名的推送",
    "aes_key": "控制台的 EncodingAESKey，用于安全模式；需要 --token 和 --app-id",
    "app_id": "安全模式推送末尾的 id：小程序的，或第三方平台的；可以有多个，用逗号分隔",
    "compatible": "设了 --aes-key 也接受未加密的推送（兼容模式）",
    "max_age": "签名的时间戳允许与本机相差的秒数；0：不检查",
    "tls_cert": "证书链文件；以 HTTPS 服务（TLS 1.2 及以上）",
    "tls_key": "证书私钥文件；默认在 --tls-cert 的文件里",
    "app_key": "控制台的 App Key，用来发送处理函数返回的内容",
    "app_secret": "控制台的 App Secret",
    "access_token": "代替 --app-key：access token，或 @文件，文件里始终是有效的 token",
    "api_base": "发送接口的地址",
    "user_type": "回复发给谁：1 游客，2 百度账号用户",
    "third_party": "以第三方平台的身份发送，需要所授权小程序的 --access-token",
    "handlers": "处理函数的文件或模块；默认先找当前目录的 handlers.py，再找 kfserver.py 旁边的",
    "workers": "同时处理的消息数",
    "queue_size": "可以等待的消息数；超过时推送得到 503",
    "tries": "失败的处理函数总共尝试的次数",
    "dedup_size": "为去重而记住的消息数",
    "max_body": "一个推送最多的字节数",
    "max_connections": "同时的连接数；超过时等待最久的让出",
    "journal": "让消息挺过崩溃的文件，如 kf.db；空：只在内存里",
    "sessions": "记住的会话数，最久没有动过的先忘记",
    "journal_sync": "normal：挺过进程崩溃；full：断电也能挺过",
    "redis": "Redis 服务器的地址，多个实例通过它统一去重",
    "admin": "第二个监听的地址，供页面、/healthz 和 /metrics，如 127.0.0.1:9090",
    "log_format": "text，或 json：每行一个对象",
    "reload": "文件改变时重新加载处理函数，供开发时使用",
    "grace": "停止时处理完等待消息的秒数",
    "log_level": "debug、info、warning 或 error",
}
ENGLISH = {name: str(field.metadata["help"]) for name, field in SETTING_FIELDS.items()}
# Of each half, in its order: the titles of the columns, and what each setting is.
HALVES = (("参数 | 环境变量 | 默认值 | 说明", CHINESE), ("argument | environment | default | what it is", ENGLISH))


def show(default: Any) -> str:
    """A default as an operator would write it; nothing for an empty text."""
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:g}"
    return f"`{default}`" if default != "" else ""


def make_tables() -> List[str]:
    """The table of each half, a line for each setting, in the order of `Settings`."""
    return ["\n".join([f"| {titles} |", "|---|---|---|---|", *(
        f"| `--{name.replace('_', '-')}` | `KF_{name.upper()}` | {show(field.default)} | {texts.get(name, '')} |"
        for name, field in SETTING_FIELDS.items()), ""]) for titles, texts in HALVES]


def read_tables() -> List[str]:
    """The tables that stand in the README."""
    return PLACE.findall(README.read_text("utf-8"))


def main() -> None:
    tables = make_tables()
    if "--update" in sys.argv[1:]:
        text = README.read_text("utf-8")
        assert len(read_tables()) == len(tables), "the README has a pair of markers <!-- settings --> in each half"
        left = iter(tables)
        README.write_bytes(PLACE.sub(lambda found: next(left), text).encode())
    else:
        print("\n".join(tables), end="")


if __name__ == "__main__":
    main()
