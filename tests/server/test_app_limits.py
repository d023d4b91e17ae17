"""Oversized, slow and broken clients: each gets a clear answer, and the server lives on."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from server.protocol import LimitedProtocol
from server.types import ServerOptions
from tests.server.proxy_fakes import ANSWER, CHAT, Live, chat, error_of, eventually, live

LIMIT = 10_000


@pytest.fixture(scope="module")
def shared() -> Iterator[Live]:
    options = ServerOptions(max_body_bytes=LIMIT, body_timeout_s=0.5)
    with live(options) as parts:
        yield parts


@pytest.fixture
def app(shared: Live) -> Iterator[Live]:
    shared.engine.posts.clear()
    yield shared
    assert shared.ask().status_code == 200


def connect(app: Live) -> socket.socket:
    address = urlsplit(app.url)
    found = socket.create_connection((address.hostname, address.port), timeout=20)
    found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def head(*lines: str) -> bytes:
    fixed = (f"POST {CHAT} HTTP/1.1", "host: x", "content-type: application/json")
    return "\r\n".join([*fixed, *lines, "", ""]).encode()


def answer(sock: socket.socket) -> tuple[int, dict[str, Any]]:
    """Read one answer up to the end of its body, and return status and JSON."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _more(sock)
    top, _, body = data.partition(b"\r\n\r\n")
    lines = top.decode().lower().split("\r\n")
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
    while len(body) < length:
        body += _more(sock)
    return int(lines[0].split()[1]), json.loads(body)


def _more(sock: socket.socket) -> bytes:
    data = sock.recv(65536)
    assert data, "closed before the answer was complete"
    return data


# --- Size ----------------------------------------------------------------------------------------


def test_body_at_the_limit_is_accepted_and_above_it_is_not(app: Live) -> None:
    empty = len(json.dumps(chat("")).encode())
    for extra, status in ((0, 200), (1, 413)):
        body = json.dumps(chat("a" * (LIMIT - empty + extra))).encode()
        headers = {"content-type": "application/json"}
        response = app.http.post(CHAT, content=body, headers=headers)
        assert response.status_code == status
    error = error_of(response)
    assert error["code"] == "request_too_large"
    assert str(LIMIT) in error["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_fifty_megabytes_are_answered_not_stored(app: Live, chunked: bool) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b"a" * 1_000_000

    headers = {"content-type": "application/json"}
    if not chunked:
        headers["content-length"] = str(50_000_000)
    response = app.http.post(CHAT, content=pieces(), headers=headers)
    assert (response.status_code, error_of(response)["code"]) == (413, "request_too_large")
    assert app.engine.posts == []


@pytest.mark.parametrize("framing", ["content-length: 50000000", "transfer-encoding: chunked"])
def test_too_large_is_said_before_the_body_is_over(app: Live, framing: str) -> None:
    with connect(app) as sock:
        sock.sendall(head(framing))
        if "chunked" in framing:
            sock.sendall(b"8000\r\n" + b"a" * 0x8000 + b"\r\n")
        status, body = answer(sock)
        assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_client_that_asks_first_is_spared_the_upload(app: Live) -> None:
    with connect(app) as sock:
        sock.sendall(head("content-length: 50000000", "expect: 100-continue"))
        assert answer(sock)[0] == 413
        body = json.dumps(chat()).encode()
    with connect(app) as sock:
        sock.sendall(head(f"content-length: {len(body)}", "expect: 100-continue"))
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert answer(sock)[0] == 200


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 40, "12, 13"])
def test_absurd_content_length_is_refused(app: Live, length: str) -> None:
    with connect(app) as sock:
        sock.sendall(head(f"content-length: {length}"))
        status, body = answer(sock)
        assert status in (400, 413)
        assert "error" in body


def test_length_and_chunks_together_are_refused(app: Live) -> None:
    with connect(app) as sock:
        sock.sendall(head("content-length: 4", "transfer-encoding: chunked") + b"0\r\n\r\n")
        assert answer(sock)[0] == 400
    assert app.engine.posts == []


# --- Time ----------------------------------------------------------------------------------------


def test_slow_body_is_408(app: Live) -> None:
    with connect(app) as sock:
        sock.sendall(head("content-length: 100") + b'{"model"')
        status, body = answer(sock)
        assert (status, body["error"]["code"]) == (408, "request_timeout")
        assert sock.recv(10) == b""


def test_trickled_body_is_408_too(app: Live) -> None:
    stop = threading.Event()
    with connect(app) as sock, ThreadPoolExecutor(1) as pool:
        sock.sendall(head("content-length: 1000"))

        def trickle() -> None:
            while not stop.wait(0.02):
                try:
                    sock.sendall(b" ")
                except OSError:
                    return

        pool.submit(trickle)
        assert answer(sock)[0] == 408
        stop.set()


def test_client_that_sends_no_headers_is_let_go(app: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedProtocol, "header_timeout_s", 0.2)
    with connect(app) as silent, connect(app) as partial:
        partial.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: ")
        assert silent.recv(10) == b""
        assert partial.recv(10) == b""


def test_client_that_leaves_in_the_middle_of_its_body(app: Live) -> None:
    for _ in range(5):
        with connect(app) as sock:
            sock.sendall(head("content-length: 100") + b'{"model"')
    assert app.engine.posts == []


# --- Not HTTP ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/caf\xc3\xa9 HTTP/1.1\r\nbad header\r\n\r\n",
    ],
)
def test_what_is_not_http_is_400(app: Live, data: bytes) -> None:
    with connect(app) as sock:
        sock.sendall(data)
        status, body = answer(sock)
        assert (status, body["error"]["code"]) == (400, "bad_request")
        assert sock.recv(10) == b""


def test_endless_headers_are_431(app: Live) -> None:
    with connect(app) as sock:
        lines = [f"x-{number}: {'a' * 1000}" for number in range(80)]
        sock.sendall(head(*lines, "content-length: 2") + b"{}")
        status, body = answer(sock)
        assert (status, body["error"]["code"]) == (431, "headers_too_large")


def test_pipelined_requests_are_answered_in_order(app: Live) -> None:
    body = json.dumps(chat()).encode()
    one = head(f"content-length: {len(body)}") + body
    with connect(app) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + one)
        data = b""
        while data.count(b"HTTP/1.1 200") < 2 or not data.endswith(b"]}"):
            data += _more(sock)
        assert data.index(b"alive") < data.index(b"Hello")


# --- Load ----------------------------------------------------------------------------------------


def test_more_waiting_than_allowed_is_503() -> None:
    with (
        live(ServerOptions(workers=1, max_waiting=1)) as app,
        ThreadPoolExecutor(2) as pool,
    ):
        first = pool.submit(app.ask, "slow")
        second = pool.submit(app.ask, "slow")
        assert eventually(lambda: "unlearn_guard_waiting 1.0" in app.http.get("/metrics").text)
        response = app.ask("hello")
        assert (response.status_code, error_of(response)["code"]) == (503, "overloaded")
        assert int(response.headers["retry-after"]) >= 1
        app.guard.release.set()
        assert first.result(20).status_code == second.result(20).status_code == 200
        assert app.ask("hello").status_code == 200


def test_more_in_flight_than_allowed_is_503() -> None:
    with live(ServerOptions(max_in_flight=1)) as app, ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.ask, "slow")
        assert eventually(lambda: "unlearn_guard_in_flight 1.0" in app.http.get("/metrics").text)
        assert error_of(app.ask("hello"))["code"] == "overloaded"
        app.guard.release.set()
        assert first.result(20).status_code == 200
        assert eventually(lambda: app.ask("hello").status_code == 200)


def test_slow_decision_does_not_hold_up_the_others() -> None:
    with live(ServerOptions(workers=2)) as app, ThreadPoolExecutor(1) as pool:
        first = pool.submit(app.ask, "slow")
        assert eventually(lambda: "in_flight 1.0" in app.http.get("/metrics").text)
        assert app.ask("hello").status_code == 200
        assert not first.done()
        app.guard.release.set()
        assert first.result(20).status_code == 200


def test_many_requests_at_once_each_get_their_own_answer() -> None:
    def ask(number: int) -> tuple[int, str]:
        body = {"model": "m", "prompt": f"hello {number}"}
        response = app.http.post("/v1/completions", json=body)
        return response.status_code, str(number)

    with live() as app, ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(100)))
        sent = sorted(json.loads(body)["prompt"] for _, body, _ in app.engine.posts)
    assert {status for status, _ in results} == {200}
    assert sent == sorted(f"hello {number}" for number in range(100))


def test_shutdown_lets_a_running_answer_end() -> None:
    gate = threading.Event()
    headers = [("content-type", "application/json")]
    with ThreadPoolExecutor(1) as pool:
        with live(pieces=[gate, ANSWER], headers=headers) as app:
            future = pool.submit(httpx.post, app.url + CHAT, json=chat(), timeout=20)
            assert eventually(lambda: bool(app.engine.posts))
            threading.Timer(0.3, gate.set).start()
        assert future.result(20).content == ANSWER
