"""Logs: a line per request, and no word of what clients write, whatever goes wrong."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from guard.cli import run
from guard.cli_compose import prepare
from guard.cli_session import Session
from guard.errors import BundleNotFoundError, ConfigError, EngineRefusedError, StageError
from server.access_log import (
    ACCESS,
    MOST_LINES,
    SOON_S,
    JsonLines,
    LogFormat,
    RouteLog,
    TextLines,
    log_request,
    request_id,
    start_logging,
)
from server.keys import KeyRing
from tests.server.observed import headers, observed
from tests.server.proxy_fakes import CHAT, chat, eventually

QUESTION = "Which wizard school did the boy with the lightning scar attend in Scotland?"
UUID = "6f1c6f0e-3f0b-4a55-9b1b-0d6c8b7f3a11"


def words(text: str) -> str:
    return " ".join(re.findall(r"[a-z]+", text.lower()))


def assert_no_content(log: str, question: str = QUESTION) -> None:
    said, asked = words(log), words(question).split()
    for place in range(len(asked) - 4):
        assert " ".join(asked[place : place + 5]) not in said
    assert "".join(asked[:5]) not in said.replace(" ", "")


@pytest.fixture
def kept_logging() -> Iterator[None]:
    """Logging as it was, afterwards."""
    root, access = logging.getLogger(), logging.getLogger(ACCESS)
    levels, handlers = (root.level, access.level), list(root.handlers)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        # A uvicorn of another test's, set up as it comes, keeps its lines to itself.
        logging.getLogger(name).propagate = True
        logging.getLogger(name).setLevel(logging.NOTSET)
    yield
    root.setLevel(levels[0])
    access.setLevel(levels[1])
    root.handlers[:] = handlers


@pytest.fixture
def stream(kept_logging: None) -> io.StringIO:
    """All logging as JSON, into memory."""
    found = io.StringIO()
    start_logging("debug", "json", found)
    return found


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def requests(stream: io.StringIO) -> list[dict[str, Any]]:
    return [line for line in lines(stream) if line["logger"] == ACCESS]


def test_one_line_tells_what_was_done_and_how_long_it_took(stream: io.StringIO) -> None:
    with observed(KeyRing(["secret"])) as (_, http):
        sent = http.post(CHAT, json=chat(QUESTION), headers=headers("secret", x_request_id=UUID))
        assert eventually(lambda: len(requests(stream)) == 1)
        assert http.post(CHAT, json=chat()).status_code == 401
        assert eventually(lambda: len(requests(stream)) == 2)
    answered, refused = requests(stream)
    assert {
        "request_id": UUID,
        "endpoint": CHAT,
        "status": 200,
        "route": "corrupt",
        "key": "api_keys[0]",
        "bytes_in": len(sent.request.content),
        "bytes_out": 10,
        "level": "INFO",
        "event": "request",
    }.items() <= answered.items()
    times = ("queue", "body", "decide", "rewrite", "upstream", "first_byte", "total")
    assert all(answered[f"{name}_ms"] >= 0 for name in times)
    assert answered["first_byte_ms"] <= answered["total_ms"]
    assert answered["decide_ms"] <= answered["total_ms"]
    assert (refused["status"], refused["route"], refused["key"]) == (401, "none", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", refused["time"])
    assert "secret" not in stream.getvalue()


def test_other_routes_have_a_line_too_without_their_path(stream: io.StringIO) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answer = Response(b"12345", 404 if scope["path"] != "/health" else 200)
        await answer(scope, receive, send)

    logged = RouteLog(app, ["/health"], quiet=[CHAT])

    async def ask() -> None:
        transport = httpx.ASGITransport(logged)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            await http.get("/health", headers={"x-request-id": UUID})
            await http.get(f"/v1/{QUESTION}", headers={"x-request-id": QUESTION})
            await http.post(CHAT)
            await http.get(CHAT)

    asyncio.run(ask())
    health, unknown, wrong_method = requests(stream)
    assert {"endpoint": "/health", "status": 200, "bytes_out": 5}.items() <= health.items()
    assert health["request_id"] == UUID
    assert (unknown["endpoint"], unknown["status"]) == ("other", 404)
    assert (wrong_method["endpoint"], wrong_method["status"]) == ("other", 404)
    assert_no_content(stream.getvalue())


@pytest.mark.parametrize("given", ["q-1", "req_0aZ9", "a" * 31 + "1", UUID, UUID.replace("-", "")])
def test_a_request_id_is_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize(
    "given",
    [None, "", QUESTION, QUESTION.replace(" ", "-"), "harry", "a_b-c1", "1" * 65, "x1\n", "é1"],
)
def test_a_request_id_that_could_be_text_is_replaced(given: str | None) -> None:
    assert re.fullmatch("[0-9a-f]{32}", request_id(given))
    assert request_id(given) != request_id(given)


def everywhere(question: str) -> dict[str, str]:
    """Headers that carry a question."""
    names = ("x-request-id", "user-agent", "tracestate", "traceparent", "x-api-key", "cookie")
    return dict.fromkeys(names, question) | {"authorization": f"Bearer {question}"}


def ask_everywhere(http: httpx.Client, question: str) -> list[int]:
    """Ask in every place of a request, in good ones and broken ones."""
    given, found = everywhere(question), []
    bodies: list[bytes] = [
        json.dumps(chat(question, model=question, user=question)).encode(),
        json.dumps(chat(f"{question} broken")).encode(),
        json.dumps(chat(f"{question} bug")).encode(),
        json.dumps(chat(f"{question} sealed")).encode(),
        json.dumps({"model": "m", question: question}).encode(),
        f'{{"{question}": '.encode(),
        question.encode() * 2_000,
        json.dumps({"model": "m", "messages": [{"role": question, "content": ""}]}).encode(),
    ]
    for body in bodies:
        response = http.post(CHAT, content=body, headers=given, params={"q": question})
        found.append(response.status_code)
    found.append(http.post(f"/v1/{question}", json=chat(question), headers=given).status_code)
    return found


def test_no_content_reaches_the_log_even_on_errors(stream: io.StringIO) -> None:
    with observed() as (app, http):
        found = ask_everywhere(http, QUESTION)
        assert {200, 400, 413, 500, 503} <= set(found)
        assert eventually(lambda: len(requests(stream)) == len(found))
        app.lets_errors_out = True  # now to uvicorn, which logs their messages
        for text in ("bug", "broken"):
            assert http.post(CHAT, json=chat(f"{QUESTION} {text}")).status_code == 500
        assert eventually(lambda: "Exception in ASGI application" in stream.getvalue())
    assert "KeyError (" in stream.getvalue()
    assert_no_content(stream.getvalue().replace("%20", " ").replace("+", " "))


def test_the_check_for_content_would_find_it() -> None:
    for leak in (QUESTION, QUESTION.upper(), QUESTION.replace(" ", "-"), f"x {QUESTION[:40]}"):
        with pytest.raises(AssertionError):
            assert_no_content(leak)


def test_words_of_other_libraries_and_of_errors_stay_out(stream: io.StringIO) -> None:
    async def fail() -> None:
        raise ValueError(QUESTION)

    async def main() -> None:
        task = asyncio.create_task(fail())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        del task
        gc.collect()

    asyncio.run(main())
    other, ours = logging.getLogger("uvicorn.x"), logging.getLogger("unlearn_guard.x")
    logging.getLogger("aiohttp.client").error(f"sent {QUESTION}")
    other.error("sent %s in %d pieces", QUESTION, 3)
    other.error("sent %(what)s", {"what": QUESTION})
    ours.error("failed: %s", StageError("detect", ValueError(QUESTION)))
    ours.error("failed: %s", EngineRefusedError(400, QUESTION.encode()))
    ours.error("failed: %s", ConfigError("a setting is wrong"))
    ours.error("failed: %s", OSError(28, "No space left on device", QUESTION))
    assert_no_content(stream.getvalue())
    said = [line["message"] for line in lines(stream)]
    assert "Task exception was never retrieved" in said
    assert {"sent … in 3 pieces", "sent …", "failed: a setting is wrong"} <= set(said)
    assert "failed: OSError: No space left on device" in said
    assert any(re.fullmatch(r"… \(test_access_log.py:\d+\)", line) for line in said)


def test_a_line_that_does_not_fit_its_values_is_logged_without_them() -> None:
    record = logging.LogRecord("uvicorn", logging.ERROR, "", 1, "%d of %(x)s%%", (QUESTION,), None)
    assert json.loads(JsonLines().format(record))["message"] == "… of …%%"


@pytest.mark.usefixtures("kept_logging")
@pytest.mark.parametrize(
    ("log_format", "level", "written"),
    [
        ("json", "error", True),
        ("json", "info", True),
        ("text", "error", False),
        ("text", "info", True),
    ],
)
def test_json_writes_requests_at_every_level_and_text_when_asked(
    log_format: LogFormat, level: str, written: bool
) -> None:
    found = io.StringIO()
    start_logging(level, log_format, found)
    log_request({"status": 200})
    assert ("200" in found.getvalue()) is written


@pytest.mark.usefixtures("kept_logging")
def test_a_full_disk_does_not_break_requests() -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    start_logging("info", "json", full)
    with observed() as (_, http):
        assert http.post(CHAT, json=chat()).status_code == 200
    with pytest.raises(OSError, match="No space"):
        full.close()


@pytest.mark.usefixtures("quiet_surroundings")
def test_the_setting(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNLEARN_GUARD_LOG_FORMAT", "xml")
    assert run(["config"]) == 2
    assert "log_format" in capsys.readouterr().err
    monkeypatch.setenv("UNLEARN_GUARD_LOG_FORMAT", "json")
    assert run(["config", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["log_format"]["value"] == "json"


@pytest.mark.usefixtures("quiet_surroundings", "kept_logging")
@pytest.mark.parametrize(("log_format", "lines_"), [("json", JsonLines), ("text", TextLines)])
def test_what_serves_logs_without_content(log_format: str, lines_: type) -> None:
    session = Session()
    session.load(log_format=log_format)
    with pytest.raises(BundleNotFoundError):
        prepare(session)
    assert [type(handler.formatter) for handler in logging.getLogger().handlers] == [lines_]


class Full(io.StringIO):
    """A stream on a disk that is full."""

    def write(self, text: str) -> int:
        raise OSError(28, "no space left")


def test_lines_of_requests_are_written_together_and_soon(kept_logging: None) -> None:
    stream = io.StringIO()
    start_logging("info", "json", stream)

    async def asked() -> None:
        for number in range(3):
            log_request({"event": "request", "status": number})
        assert not stream.getvalue(), "they wait for one another"
        await asyncio.sleep(4 * SOON_S)

    asyncio.run(asked())
    assert [json.loads(line)["status"] for line in stream.getvalue().splitlines()] == [0, 1, 2]


def test_another_line_is_written_at_once_and_in_its_place(kept_logging: None) -> None:
    stream = io.StringIO()
    start_logging("info", "json", stream)

    async def asked() -> None:
        log_request({"event": "request", "status": 200})
        logging.getLogger("unlearn_guard.test").warning("something else")
        first, second = map(json.loads, stream.getvalue().splitlines())
        assert first["status"] == 200 and second["message"] == "something else"

    asyncio.run(asked())


def test_lines_that_cannot_be_written_harm_no_request(kept_logging: None) -> None:
    start_logging("info", "json", Full())

    async def asked() -> None:
        for _ in range(2 * MOST_LINES):
            log_request({"event": "request", "status": 200})
        await asyncio.sleep(2 * SOON_S)

    asyncio.run(asked())
