"""The one place that turns errors into HTTP, in OpenAI's format, and that logs failures.

A failure's message may quote a client's text, so logs get the error's type and where it happened,
never its message.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from starlette.types import Send

from guard.errors import (
    CannotCorruptError,
    EngineBusyError,
    EngineError,
    EngineTimeoutError,
    EngineUnavailableError,
    RequestError,
    StageError,
)

logger = logging.getLogger("unlearn_guard.server")

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class ApiError:
    """An error as a client sees it.

    Attributes:
        status: HTTP status.
        message: What was wrong and what to do.
        type: OpenAI error type.
        code: Machine-readable code; `docs/api.md` lists all.
        param: The field at fault.
        retry_after_s: Seconds after which to try again.
        headers: Further headers.
        close: True if the connection can't be used again.
    """

    status: int
    message: str
    type: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None
    retry_after_s: int | None = None
    headers: Sequence[tuple[str, str]] = ()
    close: bool = False

    def body(self) -> bytes:
        """Return the JSON body."""
        fields = {"message": self.message, "type": self.type, "param": self.param}
        return msgspec.json.encode({"error": {**fields, "code": self.code}})

    def event(self) -> bytes:
        """Return the error as a server-sent event, on which OpenAI's clients raise."""
        return b"data: " + self.body() + b"\n\n"

    def header_lines(self, length: int) -> Headers:
        """Return the headers of the answer."""
        lines = [("content-type", "application/json"), ("content-length", str(length))]
        lines += self.headers
        if self.retry_after_s is not None:
            lines.append(("retry-after", str(self.retry_after_s)))
        if self.close:
            lines.append(("connection", "close"))
        return [(name.encode(), value.encode("latin-1")) for name, value in lines]


class ApiErrorRaised(Exception):
    """Carries an `ApiError` up to where it is sent."""

    def __init__(self, error: ApiError) -> None:
        self.error = error
        super().__init__(error.code)


class ClientGone(Exception):
    """The client left before it got its answer."""


def overloaded() -> ApiError:
    """Return the error for a proxy that has too much to do."""
    message = "the server has too many requests in work; try again in a moment"
    return ApiError(503, message, "server_error", "overloaded", retry_after_s=1)


def server_ends() -> ApiError:
    """Return the error for a request that was in work when the server had to end."""
    message = "the server ends and could not finish the answer; ask again"
    return ApiError(503, message, "server_error", "shutting_down", retry_after_s=1)


def guard_failed() -> ApiError:
    """Return the error for a guard that could not decide, rewrite or record.

    One text for all three, and none of the cause: it would tell flagged requests from others.
    """
    message = "the request could not be checked and was not sent on; try again later"
    return ApiError(503, message, "server_error", "guard_failed", retry_after_s=5)


def content_refused() -> ApiError:
    """Return the error for a request that can't be answered safely."""
    message = "this request can't be answered here; rephrase it or leave that content out"
    return ApiError(400, message, code="content_refused")


def to_api_error(error: BaseException) -> ApiError:
    """Say what a client is told about an error."""
    match error:
        case ApiErrorRaised():
            return error.error
        case RequestError():
            return ApiError(error.status, str(error), error.type, error.code, error.param)
        case CannotCorruptError():
            return content_refused()
        case StageError():
            return guard_failed()
        case EngineBusyError():
            message = "the model is busy; try again in a moment"
            seconds = max(1, error.retry_after_s)
            return ApiError(429, message, "rate_limit_error", "engine_busy", retry_after_s=seconds)
        case EngineTimeoutError() | TimeoutError():
            message = "the model did not answer in time; try again, or ask for fewer tokens"
            return ApiError(504, message, "server_error", "engine_timeout")
        case EngineUnavailableError():
            message = "the model can't be reached; try again later"
            return ApiError(502, message, "server_error", "engine_unavailable")
        case EngineError():
            message = "the model failed to answer; try again later"
            return ApiError(502, message, "server_error", "engine_error")
    return ApiError(500, "internal error", "server_error", "internal_error")


def log_failure(what: str, error: BaseException) -> None:
    """Log a failure of ours or the engine's: its type and place, without any message."""
    logger.error("%s: %s", what, describe(error))


def describe(error: BaseException | None) -> str:
    """Return the types of an error and its causes, and where they were raised; no message."""
    chain: list[str] = []
    while error is not None and len(chain) < 5:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(frames))
        chain.append(f"{type(error).__name__} ({where})")
        error = error.__cause__ or error.__context__
    return "; from ".join(chain)


async def send_error(send: Send, error: ApiError, *, finish: bool = True) -> None:
    """Send an error as the whole answer.

    Args:
        send: The ASGI callable.
        error: What to tell.
        finish: False leaves the end of the answer to the caller, who may still read the request.
    """
    body = error.body()
    headers = error.header_lines(len(body))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": not finish})
