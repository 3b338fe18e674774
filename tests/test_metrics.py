"""What operators see: the metrics and their format, the second listener, health, and logs as JSON.

The format is judged by a parser of its own, below, written from the description of the Prometheus text format 0.0.4.
It takes nothing that the description does not allow, and is tested itself: a judge who lets all pass proves nothing.
"""

from __future__ import annotations

import contextlib
import decimal
import gc
import json
import logging
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
from typing import Any, Callable, Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Tuple

import pytest
from conftest import TOKEN
from send_api_server import SendApiServer, refuses
from support import PATIENCE, ROOT, Answer, Client, Shop, local, no_thread_left, post, push, wait_until

import kfserver
from kfserver import (
    AdminEndpoint,
    HandlerRegistry,
    JsonFormatter,
    KfServer,
    MalformedPush,
    Message,
    Metrics,
    Request,
    Response,
    Settings,
    SettingsError,
)

# ---- The text format

Labels = FrozenSet[Tuple[str, str]]
Values = Dict[Tuple[str, Labels], float]

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"'
NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?|[+-]?Inf|NaN"
SAMPLE = re.compile(rf"({NAME})(?:\{{((?:{LABEL},?)*)\}})? ({NUMBER})")
COMMENT = re.compile(rf"# (HELP|TYPE) ({NAME}) (.+)")
KINDS = ("counter", "gauge", "histogram")


class Family(NamedTuple):
    """All that is said of one metric. A histogram's samples have names that are longer than its own."""

    kind: str
    values: Values

    def value(self, name: str, **labels: str) -> float:
        """The value of one sample."""
        return self.values[name, frozenset(labels.items())]


class Page:
    """A page in the text format, read strictly: raises `ValueError` for whatever breaks a rule."""

    def __init__(self, text: str) -> None:
        self.families: Dict[str, Family] = {}
        self._helped = ""  # the metric whose HELP line was the last line
        if not text.endswith("\n"):
            raise ValueError("the last line has no end")
        for line in text[:-1].split("\n"):
            self._read(line)
        for name, family in self.families.items():
            check_family(name, family)

    def _read(self, line: str) -> None:
        comment = COMMENT.fullmatch(line)
        if comment:
            self._open(*comment.groups())
            return
        sample = SAMPLE.fullmatch(line)
        if not sample or self._helped:
            raise ValueError(f"not a sample, or without its type: {line!r}")
        self._add(sample.group(1), sample.group(2) or "", float(sample.groups()[-1]))

    def _open(self, word: str, name: str, text: str) -> None:
        if (word == "HELP" and self._helped) or name in self.families:
            raise ValueError(f"{word} of {name} stands twice, or its samples in two places")
        if word == "HELP":
            if re.search(r"\\[^\\n]|\\$", text.replace("\\\\", "")):
                raise ValueError(f"a backslash that escapes nothing: {text!r}")
            self._helped = name
            return
        if self._helped != name or text not in KINDS:
            raise ValueError(f"TYPE of {name} is unknown, or not behind its HELP")
        self._helped = ""
        self.families[name] = Family(text, {})

    def _add(self, name: str, written: str, value: float) -> None:
        if not self.families:
            raise ValueError(f"a sample without a type: {name}")
        family_name, family = list(self.families.items())[-1]
        suffixes = ("_bucket", "_sum", "_count") if family.kind == "histogram" else ("",)
        labels = re.findall(LABEL, written)
        key = name, frozenset(labels)
        if name not in [family_name + suffix for suffix in suffixes] or key in family.values:
            raise ValueError(f"a sample of another metric, or twice: {name}{sorted(labels)}")
        if len(dict(labels)) < len(labels):
            raise ValueError(f"a label stands twice: {written}")
        family.values[key] = value

    def __getitem__(self, name: str) -> float:
        """The value of a metric that has no labels."""
        return self.families[name].value(name)


def check_family(name: str, family: Family) -> None:
    """The rules for a metric as a whole."""
    counts_down = any(value < 0 for value in family.values.values())
    if family.kind == "counter" and (counts_down or not name.endswith("_total")):
        raise ValueError(f"a counter that is negative, or does not say that it is one: {name}")
    if family.kind == "histogram":
        check_histogram(name, family)


def check_histogram(name: str, family: Family) -> None:
    """The rules for a histogram without labels of its own: buckets grow, and the last holds all."""
    buckets = [(dict(labels)["le"], count) for (part, labels), count in family.values.items() if labels]
    bounds, counts = [float(bound) for bound, _ in buckets], [count for _, count in buckets]
    if bounds != sorted(set(bounds)) or counts != sorted(counts):
        raise ValueError(f"the buckets of {name} do not grow")
    if buckets[-1] != ("+Inf", family.value(f"{name}_count")):
        raise ValueError(f"the last bucket of {name} does not hold all")
    if (family.value(f"{name}_sum") > 0) > (family.value(f"{name}_count") > 0):
        raise ValueError(f"{name} has a sum of nothing")


HEAD = "# HELP a_total Text.\n# TYPE a_total counter\n"
HISTOGRAM = "# HELP h Text.\n# TYPE h histogram\n"


@pytest.mark.parametrize(("text", "values"), [
    pytest.param(HEAD + "a_total 1\n", {("a_total", frozenset()): 1.0}, id="plain"),
    pytest.param(HEAD + 'a_total{b="c",d="e"} 1.5e+06\n', {("a_total", frozenset({("b", "c"), ("d", "e")})): 1.5e6},
                 id="labels"),
    pytest.param(HEAD + 'a_total{b="\\"\\\\\\n}"} 1\n', {("a_total", frozenset({("b", '\\"\\\\\\n}')})): 1.0},
                 id="escapes"),
    pytest.param(HEAD, {}, id="no samples"),
])
def test_page_reads(text: str, values: Values) -> None:
    assert Page(text).families["a_total"].values == values


@pytest.mark.parametrize("text", [
    pytest.param(HEAD + "a_total 1", id="no end of line"),
    pytest.param("a_total 1\n", id="no type"),
    pytest.param("# HELP a_total Text.\na_total 1\n", id="only help"),
    pytest.param("# TYPE a_total counter\na_total 1\n", id="no help"),
    pytest.param(HEAD + HEAD + "a_total 1\n", id="help twice"),
    pytest.param(HEAD + "a_total 1\n" + HEAD, id="help twice, around samples"),
    pytest.param(HEAD.replace("counter", "number") + "a_total 1\n", id="unknown type"),
    pytest.param(HEAD + "b_total 1\n", id="another metric's sample"),
    pytest.param(HEAD + "a_total 1\na_total 1\n", id="sample twice"),
    pytest.param(HEAD + 'a_total{b="1",c="2"} 1\na_total{c="2",b="1"} 1\n', id="sample twice, labels in another order"),
    pytest.param(HEAD + 'a_total{b="1",b="2"} 1\n', id="label twice"),
    pytest.param(HEAD + "a_total{b=1} 1\n", id="no quotes"),
    pytest.param(HEAD + 'a_total{b="""} 1\n', id="quote not escaped"),
    pytest.param(HEAD + 'a_total{b="\\x"} 1\n', id="unknown escape"),
    pytest.param(HEAD + 'a_total{b-c="1"} 1\n', id="label with a dash"),
    pytest.param(HEAD + "a_total true\n", id="no number"),
    pytest.param(HEAD + "a_total 1_0\n", id="a number as Python writes it"),
    pytest.param(HEAD + "a_total  1\n", id="two blanks"),
    pytest.param(HEAD + "a_total 1\n\n", id="empty line"),
    pytest.param(HEAD + "a_total -1\n", id="negative counter"),
    pytest.param(HEAD.replace("a_total", "a") + "a 1\n", id="counter that does not say so"),
    pytest.param(HEAD.replace("Text.", "\\x") + "a_total 1\n", id="help with an unknown escape"),
    pytest.param(HISTOGRAM + 'h_bucket{le="1"} 1\nh_bucket{le="+Inf"} 0\nh_sum 1\nh_count 0\n', id="shrinking buckets"),
    pytest.param(HISTOGRAM + 'h_bucket{le="2"} 1\nh_bucket{le="1"} 1\nh_bucket{le="+Inf"} 1\nh_sum 1\nh_count 1\n',
                 id="buckets in disorder"),
    pytest.param(HISTOGRAM + 'h_bucket{le="+Inf"} 1\nh_sum 1\nh_count 2\n', id="count is not that of the last bucket"),
    pytest.param(HISTOGRAM + 'h_bucket{le="1"} 1\nh_sum 1\nh_count 1\n', id="no last bucket"),
])
def test_page_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        Page(text)


# ---- Metrics


@pytest.mark.parametrize(("seconds", "counts"), [
    pytest.param([], [0, 0, 0], id="nothing"),
    pytest.param([0.0], [1, 1, 1], id="no time at all"),
    pytest.param([0.001], [1, 1, 1], id="just a bound"),
    pytest.param([0.0010001, 2.0], [0, 2, 2], id="between"),
    pytest.param([301.0, 1e9], [0, 0, 2], id="above all bounds"),
    pytest.param([0.0005, 0.5, 500.0], [1, 2, 3], id="one for each"),
])
def test_metrics_render_counts_what_is_below_each_bound(seconds: List[float], counts: List[int]) -> None:
    metrics = Metrics()
    for each in seconds:
        metrics.push(Response(200, b"", "accepted"), None, each)
        metrics.handler("menu", each, None)
    families = Page(metrics.render({})).families
    for name in ("kfserver_answer_seconds", "kfserver_handler_seconds"):
        assert [families[name].value(f"{name}_bucket", le=bound) for bound in ("0.001", "2.0", "+Inf")] == counts
        assert families[name].value(f"{name}_sum") == pytest.approx(sum(seconds))
        assert families[name].value(f"{name}_count") == len(seconds)


def pushes_of(page: Page) -> Dict[Tuple[str, str, str], float]:
    """How many pushes had which outcome, type and status."""
    pushes: Dict[Tuple[str, str, str], float] = {}
    for (_, labels), count in page.families["kfserver_pushes_total"].values.items():
        values = dict(labels)
        pushes[values.pop("outcome"), values.pop("type"), values.pop("status")] = count
        assert not values
    return pushes


def test_metrics_render_names_everything_before_anything_has_happened() -> None:
    page = Page(Metrics().render({}))
    assert list(page.families) == [
        "kfserver_pushes_total", "kfserver_answer_seconds", "kfserver_handler_seconds",
        "kfserver_handler_retries_total", "kfserver_messages_failed_total", "kfserver_replies_sent_total",
        "kfserver_replies_failed_total"]
    assert page["kfserver_replies_sent_total"] == 0


@pytest.mark.parametrize(("outcome", "status", "msg_type", "counted"), [
    ("accepted", 200, "text", ("accepted", "text", "200")),
    ("repeat", 200, "image", ("repeat", "image", "200")),
    ("accepted", 200, "event", ("accepted", "event", "200")),
    ("accepted", 200, "ticket", ("accepted", "ticket", "200")),
    ("accepted", 200, "video", ("accepted", "other", "200")),
    ("accepted", 200, "", ("accepted", "other", "200")),
    ("accepted", 200, 'a"b\\c\nd', ("accepted", "other", "200")),
    ("handshake", 200, None, ("handshake", "-", "200")),
    ("refused 403: wrong signature", 403, None, ("refused", "-", "403")),
    ('refused 400: not XML: "\\\n', 400, None, ("refused", "-", "400")),
    ("refused 503: the queue is full", 503, "text", ("refused", "text", "503")),
])
def test_metrics_push_counts_by_outcome_type_and_status(
        outcome: str, status: int, msg_type: Optional[str], counted: Tuple[str, str, str]) -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.push(Response(status, b"", outcome), None if msg_type is None else Message({"MsgType": msg_type}), 0.25)
    page = Page(metrics.render({}))
    assert pushes_of(page) == {counted: 3}
    assert page.families["kfserver_answer_seconds"].value("kfserver_answer_seconds_sum") == 0.75


@pytest.mark.parametrize("number", [0, 1, 999_999, 1_234_567, 2 ** 40 + 1])
def test_metrics_render_writes_whole_numbers_in_full(number: int) -> None:
    # Six digits would make a counter of millions stand still, and then jump.
    page = Page(Metrics().render({"replies_sent_total": number, "queue_messages": number}))
    assert (page["kfserver_replies_sent_total"], page["kfserver_queue_messages"]) == (number, number)


@pytest.mark.parametrize("value", [True, False, 0.0, 0.125, 1e-9, 1e300])
def test_metrics_render_writes_floats(value: float) -> None:
    page = Page(Metrics().render({"oldest_seconds": value}))
    assert page["kfserver_oldest_seconds"] == pytest.approx(float(value))


def test_metrics_take_what_several_threads_tell() -> None:
    metrics, count = Metrics(), 500

    def tell() -> None:
        for _ in range(count):
            metrics.push(Response(200, b"", "accepted"), None, 0.001)
            metrics.handler("menu", 0.001, None)
            metrics.count("replies_sent")
    threads = [threading.Thread(target=tell) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    page = Page(metrics.render({}))
    assert pushes_of(page) == {("accepted", "-", "200"): 8 * count}
    assert page.families["kfserver_handler_seconds"].value("kfserver_handler_seconds_count") == 8 * count
    assert page["kfserver_replies_sent_total"] == 8 * count
    report = metrics.report()
    assert sum(map(sum, report["steps"])) == 8 * count
    assert report["handlers"][0]["runs"] == 8 * count


class Half:
    """Metrics whose clock is set by hand, and what they report of the last half hour."""

    def __init__(self) -> None:
        self.now = 1_700_000_000.0
        self.metrics = Metrics(lambda: self.now)

    def answer(self, outcome: str = "accepted", status: int = 200, seconds: float = 0.001, key: str = "k") -> None:
        """A push was answered."""
        message = Message({"MsgType": "text"})
        message.key = key
        self.metrics.push(Response(status, b"", outcome), message, seconds)

    def report(self) -> Dict[str, Any]:
        """As the page gets it."""
        report: Dict[str, Any] = json.loads(json.dumps(self.metrics.report()))
        return report

    def outcomes(self) -> Dict[str, str]:
        """What became of each message in the list, the newest first."""
        return {each["key"]: each["outcome"] for each in self.report()["messages"]}


@pytest.mark.parametrize(("outcome", "status", "kind"), [
    ("accepted", 200, "accepted"), ("repeat", 200, "repeat"), ("handshake", 200, "other"),
    ("refused 403: wrong signature", 403, "refused"), ("refused 503: the queue is full", 503, "busy"),
    ("refused 500: an error inside kfserver", 500, "busy")])
def test_metrics_report_counts_each_kind_of_answer_in_its_step(outcome: str, status: int, kind: str) -> None:
    half = Half()
    half.answer(outcome, status)
    half.now += 3 * kfserver.STEP_SECONDS
    report = half.report()
    assert len(report["steps"]) * report["step_seconds"] == 30 * 60
    assert [sum(step) for step in report["steps"][-5:]] == [0, 1, 0, 0, 0]
    assert report["steps"][-4][report["kinds"].index(kind)] == 1


@pytest.mark.parametrize("jump", [kfserver.STEPS * kfserver.STEP_SECONDS, 1e6, -1e6], ids=["later", "far", "back"])
def test_metrics_report_forgets_what_is_older_than_half_an_hour(jump: float) -> None:
    half = Half()
    half.answer(seconds=3.0)
    half.now += jump
    report = half.report()
    assert (sum(map(sum, report["steps"])), report["late"], report["p99"]) == (0, 0, "–")
    for _ in range(2 * kfserver.STEPS):
        half.answer()
        half.now += kfserver.STEP_SECONDS
    assert len(half.metrics._bars) <= kfserver.STEPS


@pytest.mark.parametrize(("seconds", "percentiles", "late"), [
    ([], ("–", "–", "–"), 0),
    ([0.0001], ("≤ 0.5 ms",) * 3, 0),
    ([0.02] * 90 + [1.5] * 9 + [2.0], ("≤ 25 ms", "≤ 25 ms", "≤ 2000 ms"), 0),
    ([0.02] * 98 + [2.1] * 2, ("≤ 25 ms", "≤ 25 ms", "> 2 s"), 2),
], ids=["none", "one", "in time", "late"])
def test_metrics_report_tells_percentiles_of_the_answers(
        seconds: List[float], percentiles: Tuple[str, str, str], late: int) -> None:
    half = Half()
    for each in seconds:
        half.answer(seconds=each)
    report = half.report()
    assert tuple(report[name] for name in ("p50", "p90", "p99")) == percentiles
    assert report["late"] == late


def test_metrics_report_lists_the_last_messages_newest_first() -> None:
    half = Half()
    for number in range(kfserver.MAX_LISTED + 5):
        half.now += 1
        half.answer(key=str(number))
    assert list(half.outcomes()) == [str(number) for number in range(kfserver.MAX_LISTED + 4, 4, -1)]
    half.metrics.message(half.now, "text", "50", "handled", "menu", 1.5, 2, "")
    first = half.report()["messages"][0]
    assert first == {"time": half.now, "type": "text", "key": "50", "outcome": "handled", "handler": "menu", "ms": 1.5,
                     "replies": 2, "error": ""}
    assert len(half.outcomes()) == kfserver.MAX_LISTED
    for _ in range(20 * kfserver.MAX_LISTED):
        half.answer()
    assert len(half.metrics._messages) == 10 * kfserver.MAX_LISTED


def test_metrics_report_tells_a_message_handled_that_was_faster_than_its_answer() -> None:
    half = Half()
    half.metrics.message(half.now, "text", "k", "failed")
    half.answer(seconds=0.5)  # it began before that
    assert half.outcomes() == {"k": "failed"}
    half.now += 60
    half.answer(seconds=0.5)  # put back, or sent again after it had failed
    assert half.outcomes() == {"k": "waiting"}


def test_metrics_report_tells_of_each_handler_how_long_it_took() -> None:
    metrics = Metrics()
    metrics.handler("menu", 0.25, None)
    metrics.handler("menu", 0.75, ValueError())
    metrics.handler("answer", 0.5, None)
    assert metrics.report()["handlers"] == [
        {"name": "answer", "runs": 1, "failures": 0, "mean_ms": 500, "max_ms": 500},
        {"name": "menu", "runs": 2, "failures": 1, "mean_ms": 500, "max_ms": 750}]


# ---- AdminEndpoint


@pytest.mark.parametrize(("request_", "trouble", "status", "body"), [
    (Request("GET", "/metrics"), "", 200, b"page\n"),
    (Request("HEAD", "/metrics"), "", 200, b"page\n"),
    (Request("GET", "/metrics", "a=b"), "draining", 200, b"page\n"),
    (Request("GET", "/healthz"), "", 200, b"ok\n"),
    (Request("GET", "/healthz"), "draining", 503, b"draining\n"),
    (Request("GET", "/"), "", 200, kfserver.PAGE.encode()),
    (Request("GET", "/status.json"), "draining", 200, b'{"queue": 0}'),
    (Request("GET", "/metrics/"), "", 404, b"/, /status.json, /healthz and /metrics are here\n"),
    (Request("POST", "/metrics"), "", 405, b"only GET here\n"),
    (Request("POST", "/", "", push()), "", 405, b"only GET here\n"),
    (Request("DELETE", "/status.json"), "", 405, b"only GET here\n"),
], ids=lambda value: " ".join(value[:2]) if isinstance(value, Request) else None)
def test_admin_endpoint_handle(request_: Request, trouble: str, status: int, body: bytes) -> None:
    response = AdminEndpoint(lambda: "page\n", lambda: {"queue": 0}, lambda: trouble).handle(request_)
    assert (response.status, response.body) == (status, body)
    assert (("Allow", "GET, HEAD") in response.headers) == (status == 405)


def test_admin_endpoint_handle_all_answers_in_order() -> None:
    endpoint = AdminEndpoint(lambda: "", dict, lambda: "")
    requests = [Request("GET", "/metrics"), Request("GET", "/x"), Request("PUT", "/"), Request("GET", "/healthz")]
    assert [response.status for response in endpoint.handle_all(requests)] == [200, 404, 405, 200]


def test_admin_endpoint_refuse_unread_says_what_is_wrong() -> None:
    request = Request("", "", problem=MalformedPush("malformed header line"))
    response = AdminEndpoint(lambda: "", dict, lambda: "").handle(request)
    assert (response.status, response.body) == (400, b"malformed header line\n")


@pytest.mark.parametrize("path", ["/", "/status.json"])
def test_admin_endpoint_lets_the_page_load_nothing_from_elsewhere(path: str) -> None:
    headers = dict(AdminEndpoint(lambda: "", dict, lambda: "").handle(Request("GET", path)).headers)
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    assert {name: policy.pop(name) for name in ("default-src", "connect-src")} == {
        "default-src": "'none'", "connect-src": "'self'"}
    for name in ("style", "script"):
        assert re.fullmatch("'sha256-[A-Za-z0-9+/]{43}='", policy.pop(f"{name}-src"))
    assert set(policy.values()) == {"'none'"}
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"https?://|url\(|import", kfserver.PAGE)


# ---- The second listener


def get(path: str) -> bytes:
    """A request for a page."""
    return f"GET {path} HTTP/1.1\r\nHost: kf\r\n\r\n".encode()


class MonitoredShop(Shop):
    """A shop for all messages, in a server with a second listener."""

    def __init__(self, server_settings: Dict[str, Any]) -> None:
        super().__init__({"hi": "thank you"}, kind="*")
        self.server = KfServer(self.registry, local(**{"admin": "127.0.0.1:0", **server_settings}))

    def monitor(self, path: str) -> Answer:
        """What a monitor is answered."""
        with Client(self.server.admin_port) as client:
            return client.ask(get(path))

    def page(self) -> Page:
        """The metrics, read strictly."""
        return Page(self.monitor("/metrics").body.decode())

    def push(self, request: bytes) -> Answer:
        """What the platform is answered."""
        with Client(self.server.port) as client:
            return client.ask(request)

    def wait(self) -> None:
        """Wait until every message is handled."""
        assert self.server.join(PATIENCE)


@contextlib.contextmanager
def open_shop(**settings: Any) -> Iterator[MonitoredShop]:
    """A shop for the length of a block."""
    shop = MonitoredShop(settings)
    with shop.server:
        try:
            yield shop
        finally:
            shop.open.set()  # or the server would wait for a handler that waits


@pytest.fixture
def shop() -> Iterator[MonitoredShop]:
    """A shop with the usual settings."""
    with open_shop() as made:
        yield made


def test_kf_server_has_no_second_listener_unless_it_is_asked_for() -> None:
    with KfServer(HandlerRegistry(), local()) as server:
        assert server.admin_port == 0


def test_kf_server_serves_metrics_as_prometheus_reads_them(shop: MonitoredShop) -> None:
    answer = shop.monitor("/metrics")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert set(Page(answer.body.decode()).families) > {"kfserver_pushes_total", "kfserver_connections"}


@pytest.mark.parametrize("path", ["/metrics", "/healthz"])
def test_kf_server_tells_the_public_nothing(shop: MonitoredShop, path: str) -> None:
    answer = shop.push(get(path))
    assert (answer.status, answer.body) == (200, kfserver.UP.body)


def test_kf_server_tells_the_public_nothing_beside_its_one_path() -> None:
    with open_shop(path="/kf") as shop:
        assert [shop.push(get(path)).status for path in ("/metrics", "/healthz")] == [404, 404]


def test_kf_server_takes_no_pushes_on_the_second_listener(shop: MonitoredShop) -> None:
    with Client(shop.server.admin_port) as client:
        assert client.ask(post(push())).status == 405
    shop.wait()
    assert shop.served == []


def test_kf_server_closes_the_second_listener(shop: MonitoredShop) -> None:
    port = shop.server.admin_port
    shop.server.stop()
    with pytest.raises(ConnectionRefusedError):
        Client(port)


@pytest.mark.parametrize("admin", ["9090", "127.0.0.1", "127.0.0.1:", "127.0.0.1:http", "127.0.0.1:99999", "a b:9090"])
def test_settings_name_a_bad_address_of_the_second_listener(admin: str) -> None:
    with pytest.raises(SettingsError, match=r"^--admin \(KF_ADMIN\) takes an address and a port, as 127\.0\.0\.1:9090"):
        KfServer(HandlerRegistry(), Settings(admin=admin)).start()


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        yield other.getsockname()[1]


def test_kf_server_start_names_the_setting_of_the_listener_that_it_cannot_have() -> None:
    with taken_port() as port, pytest.raises(SettingsError, match=f"cannot listen on 127.0.0.1 port {port}: .*--admin"):
        KfServer(HandlerRegistry(), local(admin=f"127.0.0.1:{port}")).start()


@pytest.mark.parametrize("taken", ["port", "admin"])
def test_kf_server_start_leaves_nothing_behind_when_it_fails(taken: str) -> None:
    with taken_port() as port:
        addresses = {"port": port} if taken == "port" else {"admin": f"127.0.0.1:{port}"}
        server = KfServer(HandlerRegistry(), local(**{"admin": "127.0.0.1:0", **addresses}))
        with no_thread_left(), pytest.raises(SettingsError):
            server.start()
        assert server.stop() == []
    for each in (server.port, server.admin_port):
        with pytest.raises(ConnectionRefusedError):
            Client(each)
    del server
    gc.collect()  # what was not closed would be told of here


# ---- What is counted


def signed_away(body: bytes) -> bytes:
    """A push whose signature is wrong."""
    return post(body, target="/?signature=wrong&timestamp=1&nonce=2")


def text_of(msg_type: str) -> bytes:
    """A push of the type."""
    return post(json.dumps({"MsgType": msg_type, "MsgId": 7}).encode())


@pytest.mark.parametrize(("settings", "request_bytes", "counted"), [
    pytest.param({}, post(push()), ("accepted", "text", "200"), id="text"),
    pytest.param({}, text_of("image"), ("accepted", "image", "200"), id="image"),
    pytest.param({}, text_of("event"), ("accepted", "event", "200"), id="event"),
    pytest.param({}, text_of("shortvideo"), ("accepted", "other", "200"), id="a type of tomorrow"),
    pytest.param({}, text_of("-"), ("accepted", "-", "200"), id="a type that is a dash"),
    pytest.param({}, post(b"echoStr=1"), ("handshake", "-", "200"), id="handshake"),
    pytest.param({}, post(b"?"), ("refused", "-", "400"), id="malformed"),
    pytest.param({}, b"?\r\n\r\n", ("refused", "-", "400"), id="no HTTP"),
    pytest.param({"token": TOKEN}, post(push()), ("refused", "-", "403"), id="not signed"),
    pytest.param({"token": TOKEN}, signed_away(push()), ("refused", "-", "403"), id="signed by another"),
    pytest.param({"path": "/kf"}, post(push()), ("refused", "-", "404"), id="another path"),
    pytest.param({}, get("/").replace(b"GET", b"PUT"), ("refused", "-", "405"), id="another method"),
    pytest.param({"max_body": 10}, post(push()), ("refused", "-", "413"), id="too large"),
    pytest.param({"queue_size": 1, "workers": 1}, post(push()), ("refused", "text", "503"), id="no room"),
])
def test_kf_server_counts_pushes(settings: Dict[str, Any], request_bytes: bytes, counted: Tuple[str, str, str]) -> None:
    with open_shop(**settings) as shop:
        shop.open.clear()
        for number in (98, 99) if "queue_size" in settings else ():
            shop.push(post(push(number=number)))
        shop.push(request_bytes)
        assert pushes_of(shop.page())[counted] == 1


def test_kf_server_counts_a_repeat_as_such(shop: MonitoredShop) -> None:
    for _ in range(3):
        shop.push(post(push()))
    assert pushes_of(shop.page()) == {("accepted", "text", "200"): 1, ("repeat", "text", "200"): 2}


def test_kf_server_counts_no_questions_whether_it_is_up(shop: MonitoredShop) -> None:
    shop.push(get("/"))
    shop.monitor("/metrics")
    assert pushes_of(shop.page()) == {}


HOSTILE_TYPES = ['a"b', "a\\", "a\nb", "}", "é", "\U0001f600", "x" * 1000, "\x1d", "# HELP a b", *map(str, range(200))]


def test_kf_server_takes_label_values_from_a_fixed_set_whatever_is_pushed(shop: MonitoredShop) -> None:
    for number, name in enumerate(HOSTILE_TYPES):
        for fields in ({"MsgType": name}, {"Event": name}, {"event": name}):
            shop.server.feed(json.dumps({**fields, "MsgId": number, "FromUserName": name, "ToUserName": name}).encode())
    outcomes, types, statuses = (set(values) for values in zip(*pushes_of(shop.page())))
    assert outcomes <= {"accepted", "repeat", "handshake", "refused"}
    assert types <= {"text", "image", "event", "ticket", "other", "-"}
    assert statuses <= {"200", "400", "403", "404", "405", "413", "417", "431", "503", "505"}


def test_kf_server_measures_answers_and_handlers(shop: MonitoredShop) -> None:
    for number in range(4):
        shop.push(post(push(number=number)))
    shop.push(post(b"?"))
    shop.wait()
    families = shop.page().families
    for name, count in (("kfserver_answer_seconds", 5), ("kfserver_handler_seconds", 4)):
        assert families[name].value(f"{name}_count") == count
        assert 0 < families[name].value(f"{name}_sum") < PATIENCE


def test_kf_server_tells_how_much_there_is_to_do() -> None:
    with open_shop(workers=1) as shop:
        shop.open.clear()
        for number in range(3):
            shop.push(post(push(f"user {number}", number)))
        wait_until(lambda: shop.served)
        page = shop.page()
        assert (page["kfserver_busy_workers"], page["kfserver_queue_messages"]) == (1, 2)
        assert page["kfserver_oldest_seconds"] > 0
        assert page["kfserver_remembered_keys"] == 3
        shop.open.set()
        shop.wait()
        wait_until(lambda: shop.page()["kfserver_busy_workers"] == 0)
        page = shop.page()
        assert (page["kfserver_queue_messages"], page["kfserver_oldest_seconds"]) == (0, 0)
        assert page["kfserver_remembered_keys"] == 3


def test_kf_server_counts_connections_of_clients(shop: MonitoredShop) -> None:
    with Client(shop.server.port) as one, Client(shop.server.port) as other:
        for client in (one, other):
            client.ask(get("/"))
        assert shop.page()["kfserver_connections"] == 2
    wait_until(lambda: shop.page()["kfserver_connections"] == 0)


def test_status_json_tells_what_the_page_shows_and_nothing_that_a_user_wrote(tmp_path: pathlib.Path) -> None:
    with open_shop(tries=1, journal=str(tmp_path / "kf.db"), token=TOKEN) as shop:
        for number, content in enumerate(("hi", "bad", "secret words"), 1):
            shop.server.feed(push(f"user{number}", number, content))
        shop.wait()
        answer = shop.monitor("/status.json")
    assert answer.headers["content-type"] == "application/json"
    report = json.loads(answer.body.decode())
    assert sorted((each["key"].split("/")[-1], each["outcome"], each["error"]) for each in report["messages"]) == [
        ("1", "handled", ""), ("2", "failed", "ZeroDivisionError"), ("3", "handled", "")]
    assert [(each["name"], each["runs"], each["failures"]) for each in report["handlers"]] == [("_serve", 3, 1)]
    assert [report[name] for name in ("health", "journal", "redis", "send_api", "workers", "connections")] == [
        "ok", "ok", "off", "off", 16, 0]
    for secret in ("secret words", "thank you", "till", TOKEN):
        assert secret not in answer.body.decode()


def test_kf_server_keeps_nothing_to_show_without_admin() -> None:
    with open_shop(admin="", tries=1) as shop:
        shop.push(post(push()))
        shop.push(post(push(content="bad", number=2)))
        shop.wait()
        report = shop.server._inbox.handling.metrics.report()
    assert (report["messages"], report["handlers"], sum(map(sum, report["steps"]))) == ([], [], 0)


def test_kf_server_counts_messages_that_failed() -> None:
    with open_shop(tries=1) as shop:
        shop.push(post(push(content="bad")))
        shop.wait()
        page = shop.page()
    assert page["kfserver_messages_failed_total"] == 1
    assert page.families["kfserver_handler_seconds"].value("kfserver_handler_seconds_count") == 1


def test_kf_server_counts_tries_that_another_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LONGEST_PAUSE", 0.01)
    with open_shop(tries=3) as shop:
        shop.push(post(push(content="bad")))
        shop.wait()
        page = shop.page()
    assert (page["kfserver_handler_retries_total"], page["kfserver_messages_failed_total"]) == (2, 1)


@pytest.mark.parametrize("counted", ["sent", "failed"])
def test_kf_server_counts_replies(counted: str) -> None:
    with SendApiServer() as platform:
        if counted == "failed":
            platform.send_troubles.append(refuses(30022, "not this app's openid"))
        with open_shop(access_token=platform.issue_token(), api_base=platform.base) as shop:
            shop.push(post(push()))
            shop.wait()
            page = shop.page()
    assert {name: page[f"kfserver_replies_{name}_total"] for name in ("sent", "failed")} == {
        "sent": int(counted == "sent"), "failed": int(counted == "failed")}


# ---- Health


def test_healthz_is_well(shop: MonitoredShop) -> None:
    answer = shop.monitor("/healthz")
    assert (answer.status, answer.body) == (200, b"ok\n")


def a_handler_runs(shop: MonitoredShop) -> Callable[[], None]:
    """A message is being handled; what is returned ends that."""
    shop.open.clear()
    shop.push(post(push()))
    wait_until(lambda: shop.served)
    return shop.open.set


def a_request_is_under_way(shop: MonitoredShop) -> Callable[[], None]:
    """Half of a request has come; what is returned sends the rest, which is not too late."""
    client, request_bytes = Client(shop.server.port), post(push())
    client.send(request_bytes[:-5])
    wait_until(lambda: shop.page()["kfserver_connections"] == 1)

    def finish() -> None:
        with client:
            assert client.ask(request_bytes[-5:]).body == b"success"
    return finish


@pytest.mark.parametrize("keep_busy", [a_handler_runs, a_request_is_under_way], ids=lambda keep: keep.__name__)
def test_healthz_tells_that_the_server_is_draining(
        shop: MonitoredShop, keep_busy: Callable[[MonitoredShop], Callable[[], None]]) -> None:
    finish = keep_busy(shop)
    stopping = threading.Thread(target=shop.server.stop, daemon=True)
    stopping.start()
    try:
        wait_until(lambda: shop.monitor("/healthz")[::2] == (503, b"draining\n"))
        assert stopping.is_alive()
    finally:
        finish()
        stopping.join(PATIENCE)


def test_healthz_tells_that_the_journal_cannot_be_written(
        tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kfserver, "LOCK_SECONDS", 0.01)
    import sqlite3  # not every Python has it: then there is no journal either
    path = tmp_path / "kf.db"
    with open_shop(journal=str(path)) as shop:
        assert (shop.monitor("/healthz").status, shop.page()["kfserver_journal_healthy"]) == (200, 1)
        with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")  # and nobody else can write
            assert shop.push(post(push())).status == 503
            assert shop.monitor("/healthz")[::2] == (503, b"the journal cannot be written\n")
            assert shop.page()["kfserver_journal_healthy"] == 0
        assert shop.push(post(push())).body == b"success"
        assert (shop.monitor("/healthz").status, shop.page()["kfserver_journal_healthy"]) == (200, 1)


# ---- Logs as JSON


def record(message: object, *arguments: Any, **more: Any) -> logging.LogRecord:
    """A record as a logger makes it."""
    return logging.LogRecord("kfserver", logging.WARNING, "kfserver.py", 1, message, arguments, more.get("error"))


def read_line(line: str) -> Dict[str, Any]:
    """The object on a line, of which there must be one."""
    assert "\n" not in line
    assert "\r" not in line
    fields: Dict[str, Any] = json.loads(line)
    return fields


@pytest.mark.parametrize(("made", "fields"), [
    pytest.param(record("hello"), {"level": "warning", "message": "hello"}, id="plain"),
    pytest.param(record("%s and %d", "a", 1), {"message": "a and 1"}, id="arguments"),
    pytest.param(record("type=%(type)s ms=%(ms).2f", {"type": "text", "ms": 1.2345}),
                 {"message": "type=text ms=1.23", "type": "text", "ms": 1.234}, id="values by name"),
    pytest.param(record('a"b\\c\nd\x1d\u2028'), {"message": 'a"b\\c\nd\x1d\u2028'}, id="odd characters"),
    pytest.param(record("你好\ud800"), {"message": "你好\ud800"}, id="beyond ASCII"),
    pytest.param(record({"a": 1}), {"message": "{'a': 1}"}, id="no text"),
    # Handlers log through the same formatter, and what they like.
    pytest.param(record("%(price)s", {"price": decimal.Decimal("1.50")}), {"message": "1.50"}, id="value of any kind"),
    pytest.param(record("%(message)s", {"message": "yours"}), {"message": "yours", "level": "warning"}, id="message"),
    pytest.param(record("low", {"level": 3, "time": 0}), {"message": "low", "level": "warning"}, id="names in use"),
    pytest.param(record("odd", {("a", "b"): 1}), {"message": "odd"}, id="a name that is none"),
])
def test_json_formatter_writes_one_object_a_line(made: logging.LogRecord, fields: Dict[str, Any]) -> None:
    line = read_line(JsonFormatter().format(made))
    assert {name: line.get(name) for name in fields} == fields
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", line["time"])


def test_json_formatter_writes_a_traceback_on_the_same_line() -> None:
    try:
        raise ZeroDivisionError("the till is empty")
    except ZeroDivisionError:
        line = read_line(JsonFormatter().format(record("failed", error=sys.exc_info())))
    assert line["message"] == "failed"
    assert line["traceback"].startswith("Traceback (most recent call last):\n")
    assert line["traceback"].endswith("ZeroDivisionError: the till is empty")
    assert line["error"] == "the till is empty"


HANDLERS = """
from kfserver import HandlerRegistry

registry = HandlerRegistry()

@registry.on("text")
def fail(message):
    raise ZeroDivisionError("the till is empty")
"""


def test_program_logs_one_object_a_line(tmp_path: pathlib.Path) -> None:
    (tmp_path / "handlers.py").write_text(HANDLERS)
    command = [sys.executable, str(ROOT / "kfserver.py"), "--host", "127.0.0.1", "--port", "0", "--tries", "1",
               "--log-format", "json", "--max-body", "300"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("KF_")}
    with subprocess.Popen(command, cwd=str(tmp_path), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stdout
        first = read_line(process.stdout.readline()[:-1])
        port = int(first["message"].rstrip("/").rpartition(":")[2])
        with Client(port) as client:
            for body in (push(), b"?", b"x" * 301):
                client.ask(post(body))
        process.send_signal(signal.SIGTERM)
        start, logged = process.stdout.read(), process.communicate(timeout=PATIENCE)[1]
    lines = [read_line(line[:-1]) for line in logged.splitlines(keepends=True)]
    assert [line["level"] for line in map(read_line, start.splitlines())] == ["info", "info", "warning", "warning"]
    pushes = [line for line in lines if "outcome" in line]
    assert {(line["type"], line["key"], line["outcome"].partition(":")[0]) for line in pushes} == {
        ("text", "app/user/text/1", "accepted"), ("-", "-", "refused 400"), ("-", "-", "refused 413")}
    assert all(isinstance(line["ms"], float) for line in pushes)
    told = [line["traceback"].splitlines()[-1] for line in lines if "traceback" in line]
    assert [re.sub("[0-9]+$", "N", line) for line in told] == ["KfError: ZeroDivisionError at handlers.py:N"]
