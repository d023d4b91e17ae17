"""Logs without content: one line per request, and of everything else nothing a client wrote.

An exception's message may quote a client's text, and other libraries log what they like. So an
exception is logged by its types and places. Of a library's line only the numbers are filled in;
of one whose lines are not known to be templates, only the place is told.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import random
import re
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from functools import lru_cache
from types import TracebackType
from typing import Any, Final, Literal, TextIO, TypeAlias

import msgspec
from pythonjsonlogger.msgspec import MsgspecFormatter
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.errors import DataError, EngineRefusedError, GuardError, RequestError, StageError
from server.errors import describe

ACCESS: Final = "unlearn_guard.access"
LogFormat = Literal["text", "json"]

SOON_S: Final = 0.05
"""How long the line of a request waits for others."""

MOST_LINES: Final = 100
"""Lines that wait at most."""

_OURS: Final = frozenset(
    {"unlearn_guard", "guard", "server", "classifiers", "corruptions", "adapters"}
)
_TEMPLATES: Final = frozenset({"asyncio", "opentelemetry", "uvicorn"})
_QUOTING: Final = (DataError, EngineRefusedError, RequestError, StageError)
_MAX_TEMPLATE: Final = 200
_HIDDEN: Final = "…"
# One word with a digit in it, or the form of a UUID: no place for a sentence.
_REQUEST_ID: Final = re.compile(
    r"(?:[a-z]{1,10}[-_])?(?=[A-Za-z]*[0-9])[0-9A-Za-z]{1,40}"
    r"|[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}"
)
_ExcInfo: TypeAlias = (
    tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]
)

logger = logging.getLogger(ACCESS)
_ALIKE: Final = vars(logger.makeRecord(ACCESS, logging.INFO, __file__, 0, "", (), None))


def request_id(given: str | None) -> str:
    """Return the client's request id if it has the form of one, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return f"{random.getrandbits(128):032x}"  # tells requests apart, and is no secret


def log_request(fields: dict[str, Any]) -> None:
    """Write a request's line: names and numbers, nothing that a client wrote.

    Args:
        fields: By name.
    """
    if logger.isEnabledFor(logging.INFO):
        logger.handle(_record(fields))


def _record(fields: dict[str, Any]) -> logging.LogRecord:
    """Return the record of a request's line.

    All but its time and fields are always the same, and making them anew takes longer than to
    write the line.
    """
    now = time.time()
    record = logging.LogRecord.__new__(logging.LogRecord)
    record.__dict__.update(_ALIKE, msg=fields, created=now, msecs=float(int(now % 1 * 1000)))
    return record


class RouteLog:
    """ASGI middleware that writes the line of each request whose route doesn't write its own.

    Args:
        app: What answers.
        named: Paths that are named in the log; all others are `other`.
        quiet: Paths whose endpoints write more than is known here.
    """

    def __init__(self, app: ASGIApp, named: Collection[str], quiet: Collection[str] = ()) -> None:
        self._app, self._named, self._quiet = app, frozenset(named), frozenset(quiet)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and write its line."""
        answers_itself = scope["type"] != "http" or (
            scope["method"] == "POST" and scope["path"] in self._quiet
        )
        if answers_itself:
            await self._app(scope, receive, send)
            return
        begun, told = time.perf_counter(), {"status": 499, "bytes_out": 0}

        async def seen(message: Message) -> None:
            told["status"] = message.get("status", told["status"])
            told["bytes_out"] += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, seen)
        finally:
            log_request(self._line(scope, told, time.perf_counter() - begun))

    def _line(self, scope: Scope, told: dict[str, int], seconds: float) -> dict[str, Any]:
        given = [value for name, value in scope["headers"] if name == b"x-request-id"]
        path = scope["path"] if scope["path"] in self._named else "other"
        return {
            "event": "request",
            "request_id": request_id(given[0].decode("latin-1") if given else None),
            "endpoint": path,
            **told,
            "total_ms": round(1000 * seconds, 3),
        }


def start_logging(level: str, log_format: LogFormat, stream: TextIO | None = None) -> None:
    """Log without content from now on; every handler there was is taken away.

    Args:
        level: Least level of what is logged beside requests.
        log_format: `json` writes requests at every level; `text` writes them from `info` on.
        stream: Where to; None is standard error.
    """
    handler = RequestLines(stream or sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    # No line tells these, and finding them out takes longer than the rest of a record.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logger.setLevel(logging.INFO if log_format == "json" else logging.NOTSET)


class RequestLines(logging.StreamHandler[TextIO]):
    """Writes what is logged at once, but for the lines of requests: these together, soon.

    Each write is a system call, which takes as long as a tenth of all that the proxy does. A
    process that is killed loses the lines of its last requests; the ledger is another file.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record, or keep it for `SOON_S`."""
        loop = _running_loop() if record.name == ACCESS else None
        if loop is None:
            self._write()
            super().emit(record)
            return
        try:
            self._lines.append(self.format(record) + self.terminator)
        except Exception:
            self.handleError(record)
        if len(self._lines) == 1:
            loop.call_later(SOON_S, self.flush)
        elif len(self._lines) >= MOST_LINES:
            self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        self.acquire()
        try:
            self._write()
            with suppress(OSError, ValueError):
                super().flush()
        finally:
            self.release()

    def _write(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            with suppress(OSError, ValueError):  # a full disk, or a stream that was closed
                self.stream.write("".join(lines))


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


class _ContentFree(logging.Formatter):
    """Formats records after what clients may have written was taken out of them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        clean = copy.copy(record)
        if _top(record) not in _OURS:
            clean.msg, clean.args = _template(record), ()
        elif isinstance(record.args, tuple):
            clean.args = tuple(_quiet(arg) for arg in record.args)
        clean.exc_text = clean.stack_info = None
        return super().format(clean)

    def formatException(self, ei: _ExcInfo) -> str:
        """Return the types and places of an exception and its causes, without any message."""
        return describe(ei[1]) if ei[1] is not None else ""


class JsonLines(_ContentFree, MsgspecFormatter):
    """A line of JSON per record: time, level, logger, and message or fields."""

    converter = time.gmtime  # type: ignore[assignment]
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"

    def __init__(self) -> None:
        super().__init__(
            ["asctime", "levelname", "name", "message"],
            rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        )

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; that of a request is made of its fields alone."""
        if record.name != ACCESS or not isinstance(record.msg, dict):
            return super().format(record)
        head = {
            "time": self.default_msec_format % (_second(int(record.created)), record.msecs),
            "level": record.levelname,
            "logger": ACCESS,
        }
        return msgspec.json.encode(head | record.msg).decode()

    def process_log_record(self, log_data: dict[str, Any]) -> dict[str, Any]:
        """Leave out the message of a line that has fields instead."""
        if not log_data["message"]:
            del log_data["message"]
        return log_data


@lru_cache(maxsize=1)
def _second(second: int) -> str:
    return time.strftime(JsonLines.default_time_format, time.gmtime(second))


class TextLines(_ContentFree):
    """The plain lines of `logging`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


def _top(record: logging.LogRecord) -> str:
    return record.name.partition(".")[0]


def _quiet(arg: object) -> object:
    """Return an argument of ours as it may be logged: not every error's words are our own."""
    if not isinstance(arg, BaseException):
        return arg
    if isinstance(arg, GuardError) and not isinstance(arg, _QUOTING):
        return arg
    if isinstance(arg, OSError) and arg.strerror:
        return f"{type(arg).__name__}: {arg.strerror}"
    return describe(arg)


def _template(record: logging.LogRecord) -> str:
    """Return the first line of what was logged, with numbers filled in and all else hidden.

    asyncio writes an exception's own words on the lines after the first. Others may have put their
    values into the line before they logged it.
    """
    if _top(record) not in _TEMPLATES:
        return f"{_HIDDEN} ({record.filename}:{record.lineno})"
    first, *_ = str(record.msg).split("\n", 1)
    first = first[:_MAX_TEMPLATE]
    if not isinstance(record.args, tuple) or not record.args:
        return first if not record.args else _unfilled(first)
    given = [arg if isinstance(arg, (int, float)) else _HIDDEN for arg in record.args]
    try:
        return first % tuple(given)
    except (TypeError, ValueError):  # the template was cut, or wants other types
        return _unfilled(first)


def _unfilled(template: str) -> str:
    return re.sub(r"%(\(\w+\))?[-#0-9.+ ]*[a-zA-Z]", _HIDDEN, template)
