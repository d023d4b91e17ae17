"""An endpoint that speaks a dialect, around the one for chat completions.

The inner endpoint does everything it does for a chat completion: keys, limits, decision, answer. It
gets the translated body from a `receive` of ours, so a body is only read once the client's key was
accepted, and what goes wrong in translating is answered as every other error is.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from guard.errors import EngineError
from server.errors import Headers, to_api_error
from server.limits import read_body
from server.proxy import Proxy

_BROKEN: Final = EngineError("the engine's answer broke off")
_LAST_WORDS_S: Final = 5.0


class AnswerWriter(Protocol):
    """Writes the answer to one request in a dialect."""

    def whole(self, body: bytes) -> bytes:
        """Translate a whole chat completion.

        Raises:
            EngineError: If it can't be read.
        """
        ...

    def feed(self, chunk: bytes) -> bytes:
        """Translate a piece of a stream; a piece may give no event yet.

        Raises:
            EngineError: If it can't be read.
        """
        ...

    def end(self) -> bytes:
        """Return what is still to be said at the end of a stream: a failure, if it broke off."""
        ...


class Dialect(Protocol):
    """A way to ask for chat completions."""

    def inner_scope(self, scope: Scope) -> Scope:
        """Return the scope for the inner endpoint."""
        ...

    def read(self, body: bytes) -> tuple[bytes, AnswerWriter]:
        """Translate a request; called in a worker thread.

        Returns:
            The body of a chat completion, and what writes its answer.

        Raises:
            RequestError: If it can't be accepted.
        """
        ...

    def error(self, status: int, body: bytes) -> bytes:
        """Translate an error's body."""
        ...


class Translated:
    """ASGI endpoint of a dialect.

    Args:
        dialect: Translates requests and answers.
        completions: The endpoint of `/v1/chat/completions`.
        proxy: Its shared parts.
    """

    def __init__(self, dialect: Dialect, completions: ASGIApp, proxy: Proxy) -> None:
        self._dialect, self._completions, self._proxy = dialect, completions, proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = _Request(self._dialect, self._proxy, scope, receive)
        answer = _Answer(self._dialect, request, send)
        await self._completions(self._dialect.inner_scope(scope), request.receive, answer.send)
        await answer.complete()


class _Request:
    """The client's request, as the inner endpoint receives it."""

    def __init__(self, dialect: Dialect, proxy: Proxy, scope: Scope, receive: Receive) -> None:
        self._dialect, self._proxy, self._scope, self._receive = dialect, proxy, scope, receive
        self._asked = False
        self._ahead: list[Message] = []
        self.writer: AnswerWriter | None = None
        self.gone = False

    async def receive(self) -> Message:
        if not self._asked:
            self._asked = True
            await self._translate()
        if self._ahead:
            return self._ahead.pop(0)
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message

    async def _translate(self) -> None:
        options = self._proxy.options
        body = await read_body(
            self._scope, self._receive, options.max_body_bytes, options.body_timeout_s
        )
        translated, self.writer = await self._proxy.workers.run(self._dialect.read, body)
        # In two messages, so that who refuses the first for its size finds the end in the second.
        self._ahead = [
            {"type": "http.request", "body": translated, "more_body": True},
            {"type": "http.request", "body": b"", "more_body": False},
        ]


class _Answer:
    """The inner endpoint's answer on its way to the client."""

    def __init__(self, dialect: Dialect, request: _Request, send: Send) -> None:
        self._dialect, self._request, self._send = dialect, request, send
        self._status = 0
        self._headers: Headers = []
        self._length: int | None = None
        self._body = b""
        self._streams = False
        self._begun = False
        self._ended = False

    async def send(self, message: Message) -> None:
        """Take a message of the inner endpoint."""
        if message["type"] == "http.response.start":
            await self._start(message)
        elif self._streams:
            await self._piece(message.get("body", b""), bool(message.get("more_body")))
        else:
            await self._part(message.get("body", b""), bool(message.get("more_body")))

    async def complete(self) -> None:
        """End an answer that the inner endpoint left unfinished; its client must learn of it."""
        if self._status == 0 or self._ended or self._request.gone:
            return
        # A client that doesn't read is left as it is: its connection breaks.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._break_off()

    async def _break_off(self) -> None:
        if not self._begun:
            error = to_api_error(_BROKEN)
            self._status, self._headers = error.status, [(b"content-type", b"application/json")]
            await self._whole(self._dialect.error(error.status, error.body()), more=False)
        elif self._streams:
            await self._piece(b"", more=False)

    async def _start(self, message: Message) -> None:
        self._status = message["status"]
        found: dict[bytes, bytes] = dict(message["headers"])
        declared = found.get(b"content-length", b"")
        self._length = int(declared) if declared.isdigit() else None
        self._headers = [line for line in message["headers"] if line[0] != b"content-length"]
        kind = found.get(b"content-type", b"")
        if self._status < 300 and kind.startswith(b"text/event-stream"):
            self._streams = self._begun = True
            await self._send({**message, "headers": self._headers})

    async def _piece(self, body: bytes, more: bool) -> None:
        writer = self._request.writer
        if writer is None or self._ended:
            return
        translated = writer.feed(body) if body else b""
        if not more:
            self._ended = True
            translated += writer.end()
        if translated or not more:
            await self._send({"type": "http.response.body", "body": translated, "more_body": more})

    async def _part(self, body: bytes, more: bool) -> None:
        """Take a part of an answer that is translated as a whole."""
        if self._begun:
            if not more:
                self._ended = True
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
            return
        self._body += body
        # An error is told at once, while its sender may still read on: see `send_and_linger`.
        refused = self._status >= 400 and len(self._body) == self._length
        if not more or refused:
            await self._whole(self._translate(), more)

    def _translate(self) -> bytes:
        writer = self._request.writer
        if self._status >= 300 or writer is None:
            return self._dialect.error(self._status, self._body)
        return writer.whole(self._body)

    async def _whole(self, body: bytes, more: bool) -> None:
        headers = [*self._headers, (b"content-length", str(len(body)).encode())]
        start = {"type": "http.response.start", "status": self._status, "headers": headers}
        self._begun, self._ended = True, not more
        await self._send(start)
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
