"""A headless Chromium, driven by ChromeDriver over WebDriver's HTTP interface (W3C WebDriver, sections 8 to 13)."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any, Iterator

from support import PATIENCE

# The first ones are for root, for machines without a GPU, and for containers with little shared memory; the others
# keep it from calling home.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync")
# Runs in each page before its own scripts.
HURRY = "const later = setTimeout; setTimeout = (act, milliseconds) => later(act, 20)"
# Seconds that a browser may take for its start, or for one command.
BROWSER_PATIENCE = 6 * PATIENCE


def find_programs() -> str:
    """What is missing to run a browser, in words; empty if nothing is."""
    missing = [name for name in ("chromedriver", "chromium") if not shutil.which(name)]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Browser:
    """One browser with one window. ``port`` is ChromeDriver's. Whatever a page does later, it does at once."""

    def __init__(self, port: int, folder: pathlib.Path) -> None:
        self._port, self._session = port, ""
        options = {"binary": shutil.which("chromium"), "args": [*FLAGS, f"--user-data-dir={folder}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._session = "/" + made["sessionId"]
        self._command("Page.addScriptToEvaluateOnNewDocument", source=HURRY)

    def _call(self, method: str, path: str, values: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=BROWSER_PATIENCE)
        with contextlib.closing(connection):
            connection.request(method, f"/session{self._session}{path}", values and json.dumps(values))
            answer = json.loads(connection.getresponse().read().decode())["value"]
        if isinstance(answer, dict) and "error" in answer:
            raise RuntimeError(answer["message"])
        return answer

    def open(self, url: str) -> None:
        """Load a page."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function with that body returns in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def type(self, element_id: str, text: str) -> None:
        """Type into an element, key by key."""
        element = self._call("POST", "/element", {"using": "css selector", "value": f"#{element_id}"})
        self._call("POST", f"/element/{next(iter(element.values()))}/value", {"text": text})

    def console(self) -> Any:
        """What the page's errors, and what the policy has blocked, left in the console since the last call."""
        return [line for line in self._call("POST", "/se/log", {"type": "browser"}) if line["level"] == "SEVERE"]

    def _command(self, command: str, **values: Any) -> None:
        """A command of the Chrome DevTools Protocol."""
        self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": values})

    def emulate(self, width: int, height: int, scheme: str, language: str) -> None:
        """Show pages on a screen of that size, in a scheme, light or dark, to a person who reads that language."""
        self._command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                      mobile=width < 600)
        self._command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._command("Emulation.setUserAgentOverride", userAgent=self.run("return navigator.userAgent"),
                      acceptLanguage=language)

    def screenshot(self, path: pathlib.Path) -> None:
        """Write what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self._call("GET", "/screenshot")))

    def close(self) -> None:
        """End the browser."""
        self._call("DELETE", "")


@contextlib.contextmanager
def browser(folder: pathlib.Path) -> Iterator[Browser]:
    """A browser of a new user, whose folder must be empty, for a block."""
    driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert driver.stdout
        found = next(filter(None, (re.search(r"on port (\d+)\.", line) for line in driver.stdout)))
        made = Browser(int(found.group(1)), folder)
        try:
            yield made
        finally:
            made.close()
    finally:
        driver.kill()
        driver.communicate()
