"""`/v1/embeddings`: denied, or its inputs are judged as the prompts of a completion would be.

Embeddings carry what the model knows of a text, and nothing can be put in the place of a flagged
one: such a request is refused.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, NoReturn

import msgspec
from msgspec import Meta
from starlette.types import Receive, Scope, Send

from guard.errors import CannotCorruptError, RequestError
from guard.request import MAX_PROMPTS, decode_body
from guard.types import AdapterUse
from server.dialects.strict import convert, items
from server.dialects.wrap import AnswerWriter, Translated
from server.engines.base import Engine, EngineResponse
from server.proxy import Completions, Proxy
from server.types import GuardLike

if TYPE_CHECKING:
    from guard.answers import AnswerGuard
    from guard.pipeline import Inspection

EMBEDDINGS: Final = "/v1/embeddings"
_JUDGED_AS: Final = "/v1/completions"


class EmbeddingsBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Body of `/v1/embeddings`."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    input: str | Annotated[list[str], Meta(min_length=1, max_length=MAX_PROMPTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=65_536)] | None = None
    user: Annotated[str, Meta(max_length=1024)] | None = None


class Embeddings:
    """ASGI endpoint of the route.

    Args:
        proxy: What all requests share.
    """

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        dialect = _Dialect(denied=self._proxy.options.embeddings == "deny")
        # The same keys, threads and metrics; another way to rewrite and to ask.
        view = copy.copy(self._proxy)
        view.options = replace(view.options, output_guard=False)  # no answer of theirs is text
        view.guard = _Refusing(self._proxy.guard)
        view.engine = _Embedding(self._proxy.engine, dialect)
        endpoint = Translated(dialect, Completions(_JUDGED_AS, view), view)
        await endpoint(scope, receive, send)


class _Dialect:
    """One request, as the prompts of a completion."""

    def __init__(self, *, denied: bool) -> None:
        self._denied = denied
        self.body = b""

    def inner_scope(self, scope: Scope) -> Scope:
        return scope

    def read(self, body: bytes) -> tuple[bytes, AnswerWriter]:
        if self._denied:
            message = "embeddings are not offered here; the operator can set 'embeddings: pass'"
            raise RequestError(message, status=403, code="forbidden")
        raw = decode_body(body)
        if any(not isinstance(item, str) for item in items(raw.get("input"))):
            message = "'input' must be a string or strings; token ids are not accepted"
            raise RequestError(message, code="unsupported_content", param="input")
        asked = convert(raw, EmbeddingsBody, {})
        fields = msgspec.to_builtins(asked)
        kept = {name: value for name, value in fields.items() if value is not None}
        kept.pop("user", None)
        self.body = msgspec.json.encode(kept)
        return msgspec.json.encode({"model": asked.model, "prompt": asked.input}), _AsItCame()

    def error(self, status: int, body: bytes) -> bytes:
        return body


class _AsItCame:
    """Leaves an answer as the engine gave it."""

    def whole(self, body: bytes) -> bytes:
        return body

    def feed(self, chunk: bytes) -> bytes:
        return chunk

    def end(self) -> bytes:
        return b""


class _Refusing:
    """A guard that has nothing to put in the place of a flagged text."""

    def __init__(self, guard: GuardLike) -> None:
        self._guard = guard

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        return self._guard.inspect(endpoint, body)

    def rewrite(self, inspection: Inspection) -> NoReturn:
        raise CannotCorruptError("input", "an embedding can't be made of embeddings")

    def record(self, inspection: Inspection) -> None:
        self._guard.record(inspection)

    def answers(self, inspection: Inspection) -> AnswerGuard:
        return self._guard.answers(inspection)


class _Embedding:
    """An engine that is asked for embeddings of what was judged."""

    def __init__(self, engine: Engine, dialect: _Dialect) -> None:
        self._engine, self._dialect = engine, dialect

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        return await self._engine.post(EMBEDDINGS, self._dialect.body, headers, adapters)
