"""Puts the model's public name back into an answer that an engine gave under a secret one.

A secret name is a random word that no text holds by chance. So it is replaced wherever it stands,
in whole answers, events and errors alike, and every other byte stays what it was.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import msgspec

from guard.errors import EngineError
from server.engines.base import EngineResponse


def with_model(body: bytes, name: str) -> bytes:
    """Return a request's body with another model's name; all other values keep their bytes.

    Raises:
        EngineError: The body is no JSON object.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError as error:
        raise EngineError(f"only a JSON object can be answered with an adapter: {error}") from None
    fields["model"] = msgspec.Raw(msgspec.json.encode(name))
    return msgspec.json.encode(fields)


def asked_model(body: bytes) -> str | None:
    """Return the model's name that a request's body asks for."""
    try:
        return msgspec.json.decode(body, type=_Asked).model
    except msgspec.MsgspecError:
        return None


class _Asked(msgspec.Struct):
    model: str | None = None


class Renamer:
    """Replaces one name in bytes that come in pieces, cut anywhere.

    Args:
        secret: The name that the engine used; letters and digits only.
        public: The name that goes in its place.
    """

    def __init__(self, secret: str, public: str) -> None:
        self._old = secret.encode("ascii")
        self._new = msgspec.json.encode(public)[1:-1]  # as it stands within a JSON string
        self._held = b""

    def feed(self, piece: bytes) -> bytes:
        """Take a piece and return what is certain; the start of a name is held back."""
        *before, last = (self._held + piece).split(self._old)
        kept = len(last) - self._start(last)
        self._held = last[kept:]
        return self._new.join([*before, last[:kept]])

    def flush(self) -> bytes:
        """Return what is held back: it was no name after all."""
        held, self._held = self._held, b""
        return held

    def _start(self, text: bytes) -> int:
        """Return how many of the last bytes may be the start of a name."""
        longest = min(len(text), len(self._old) - 1)
        return next((n for n in range(longest, 0, -1) if text.endswith(self._old[:n])), 0)


def renamed(
    response: EngineResponse, renamer: Renamer, ended: Callable[[], None]
) -> EngineResponse:
    """Return the same answer under the public name.

    Args:
        response: The engine's answer; its length is left out of the headers, for it may change.
        renamer: Replaces the name.
        ended: Called once, when the answer is read to its end, closed, or fails.
    """
    headers = [line for line in response.headers if line[0].lower() != "content-length"]
    return EngineResponse(response.status, headers, _Renamed(response, renamer, ended))


class _Renamed:
    """The pieces of an answer; a class for the reason that `vllm_relay.Relay` is one."""

    def __init__(
        self, response: EngineResponse, renamer: Renamer, ended: Callable[[], None]
    ) -> None:
        self._response, self._renamer = response, renamer
        self._ended: Callable[[], None] | None = ended

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            while True:
                piece = self._renamer.feed(await anext(self._response.chunks))
                if piece:
                    return piece
        except StopAsyncIteration:
            self._end()
            if rest := self._renamer.flush():
                return rest
            raise
        except BaseException:
            self._end()
            raise

    async def aclose(self) -> None:
        """Close the engine's answer."""
        try:
            await self._response.aclose()
        finally:
            self._end()

    def _end(self) -> None:
        ended, self._ended = self._ended, None
        if ended is not None:
            ended()
