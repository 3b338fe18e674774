"""The README's table of settings, made from `SETTING_FIELDS`: printed, or with --update written into the README."""

from __future__ import annotations

import pathlib
import re
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kfserver import SETTING_FIELDS  # noqa: E402  (the folder above is not on the path of a script)

README = ROOT / "README.md"
# What stands between the markers, which are comments in Markdown.
PLACE = re.compile("(?<=<!-- settings -->\n).*?(?=<!-- /settings -->)", re.DOTALL)
HEAD = ["| argument | environment | default | what it is |", "|---|---|---|---|"]


def show(default: Any) -> str:
    """A default as an operator would write it; nothing for an empty text."""
    if isinstance(default, bool):
        default = str(default).lower()
    elif isinstance(default, float):
        default = f"{default:g}"
    return f"`{default}`" if default != "" else ""


def make_table() -> str:
    """The table, a line for each setting, in the order of `Settings`."""
    rows = [
        f"| `--{name.replace('_', '-')}` | `KF_{name.upper()}` | {show(field.default)} | {field.metadata['help']} |"
        for name, field in SETTING_FIELDS.items()]
    return "\n".join([*HEAD, *rows, ""])


def read_table() -> str:
    """The table that stands in the README."""
    found = PLACE.search(README.read_text("utf-8"))
    assert found, "the README has no markers <!-- settings --> and <!-- /settings -->"
    return found.group()


def main() -> None:
    if "--update" in sys.argv[1:]:
        README.write_bytes(PLACE.sub(lambda found: make_table(), README.read_text("utf-8")).encode())
    else:
        print(make_table(), end="")


if __name__ == "__main__":
    main()
