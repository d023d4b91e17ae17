"""The API as an OpenAPI document, made from what the parser itself reads by.

Bodies are the structs that requests are converted to, less the fields that `guard.fields` denies:
the document can't promise a field that is refused, nor lack one that is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from inspect import cleandoc
from typing import Any, Final, NamedTuple

import msgspec

from guard import __version__
from guard.dialect_fields import DIALECT_FIELDS
from guard.fields import FIELDS, Field
from guard.schema import BODIES
from server.dialects.embeddings import EMBEDDINGS, EmbeddingsBody
from server.dialects.messages import COUNT_TOKENS, MESSAGES
from server.dialects.messages_schema import CountBody, MessagesBody
from server.dialects.responses import RESPONSES
from server.dialects.responses_schema import ResponsesBody
from server.types import ServerOptions

OPENAPI: Final = "/openapi.json"
CHAT, TEXT = BODIES

Schema = dict[str, Any]

ERRORS: Final = {
    400: "The body is not acceptable, or holds content that can't be answered.",
    401: "The API key is missing or wrong.",
    403: "Not offered here, or not to this caller.",
    404: "There is no such route or model.",
    405: "The method is not allowed; see Allow.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not application/json, or is compressed.",
    429: "The API key's limit, or the engine's queue; see Retry-After.",
    431: "The headers are too large.",
    500: "A fault of the guard's.",
    502: "The engine can't be reached, or failed.",
    503: "Overloaded, not ready, or the guard could not decide.",
    504: "The engine did not answer in time.",
}
"""Errors of our own, by status; an engine's own error statuses come through as they are."""


class Problem(msgspec.Struct):
    """What was wrong, and what to do."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """Every error but those of `/v1/messages`."""

    error: Problem


class AnthropicProblem(msgspec.Struct):
    """What was wrong, and what to do."""

    type: str
    message: str


class AnthropicError(msgspec.Struct, tag_field="type", tag="error"):
    """An error of `/v1/messages`."""

    error: AnthropicProblem


class _Guarded(NamedTuple):
    """A route whose requests are judged: what it takes, and what an answer has in any case."""

    group: str
    body: type
    summary: str
    answer: tuple[str, ...]
    streams: bool = True


_GUARDED: Final = {
    CHAT: _Guarded("chat", BODIES[CHAT], "OpenAI's chat completions", ("choices",)),
    TEXT: _Guarded("chat", BODIES[TEXT], "OpenAI's completions", ("choices",)),
    MESSAGES: _Guarded(
        "messages",
        MessagesBody,
        "Anthropic's messages",
        ("type", "role", "content", "stop_reason", "usage"),
    ),
    COUNT_TOKENS: _Guarded(
        "messages", CountBody, "Tokens of such a request", ("input_tokens",), streams=False
    ),
    RESPONSES: _Guarded(
        "responses", ResponsesBody, "OpenAI's responses", ("object", "status", "output")
    ),
    EMBEDDINGS: _Guarded(
        "embeddings", EmbeddingsBody, "OpenAI's embeddings", ("data",), streams=False
    ),
}
_SMALL: Final = {
    "/v1/models": ("Public model names", ("object", "data"), (401, 500, 502)),
    "/health": ("Alive", ("status",), (500,)),
    "/ready": ("Able to answer", ("status", "engine", "bundle_version", "self_check"), (500, 503)),
    OPENAPI: ("This document", ("openapi", "info", "paths"), (401, 500)),
}
_TABLES: Final[dict[str, Mapping[str, Field]]] = {
    **FIELDS,
    **DIALECT_FIELDS,
    COUNT_TOKENS: DIALECT_FIELDS[MESSAGES],
}
_OPEN: Final = ("/health", "/ready", "/metrics")
_KEYS: Final[list[dict[str, list[str]]]] = [{"bearer": []}, {"x_api_key": []}]
_REF: Final = "#/components/schemas/"
_GONE: Final = "gone"


@lru_cache(maxsize=1)
def document(options: ServerOptions) -> bytes:
    """Return the OpenAPI 3.1 document of a server with these options, as JSON."""
    keys = bool(options.api_keys) or options.api_keys_file is not None
    made: Schema = {
        "openapi": "3.1.0",
        "info": {
            "title": "unlearn-guard",
            "version": __version__,
            "description": "A guard before a language model. What is not declared here is refused. "
            "Error statuses of the engine itself come through as they are.",
        },
        "paths": _paths(options, keys),
        "components": {"schemas": _bodies(options) | _errors()},
    }
    if keys:
        made["components"]["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "x_api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
    return msgspec.json.encode(made)


# --- Routes ---------------------------------------------------------------------------------------


def _paths(options: ServerOptions, keys: bool) -> Schema:
    found: Schema = {}
    for path, route in _offered(options).items():
        found[path] = {"post": _judged(route)}
    for path, (summary, answer, errors) in _SMALL.items():
        ok = _response(summary, {"application/json": _object(answer)})
        found[path] = {"get": {"summary": summary, "responses": {"200": ok} | _failures(errors)}}
    text = _response("Prometheus text", {"text/plain": {"type": "string"}})
    found["/metrics"] = {
        "get": {"summary": "Figures, for the operator", "responses": {"200": text}}
    }
    found["/metrics"]["get"]["responses"] |= _failures((401, 403, 500))
    if keys:
        for path in found.keys() - set(_OPEN):
            for operation in found[path].values():
                operation["security"] = _KEYS
    return found


def _offered(options: ServerOptions) -> dict[str, _Guarded]:
    left_out = EMBEDDINGS if options.embeddings == "deny" else ""
    return {path: route for path, route in _GUARDED.items() if path != left_out}


def _judged(route: _Guarded) -> Schema:
    body = {"$ref": f"{_REF}{_name(route)}"}
    media = {"application/json": _object(route.answer)}
    if route.streams:
        media["text/event-stream"] = {}  # each event is JSON of its own
    error = "AnthropicError" if route.group == "messages" else "ErrorBody"
    return {
        "summary": route.summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": _response("The answer", media)} | _failures(tuple(ERRORS), error),
    }


def _failures(statuses: tuple[int, ...], error: str = "ErrorBody") -> Schema:
    body = {"application/json": {"$ref": f"{_REF}{error}"}}
    return {str(status): _response(ERRORS[status], body) for status in statuses}


def _response(description: str, media: Mapping[str, Schema]) -> Schema:
    content = {kind: {"schema": schema} for kind, schema in media.items()}
    return {"description": description, "content": content}


def _object(required: tuple[str, ...]) -> Schema:
    return {"type": "object", "required": list(required)}


# --- Bodies ---------------------------------------------------------------------------------------


def _errors() -> Schema:
    template = f"{_REF}{{name}}"
    return msgspec.json.schema_components([ErrorBody, AnthropicError], ref_template=template)[1]


def _bodies(options: ServerOptions) -> Schema:
    """Return the schemas of all bodies, less what is denied."""
    found: Schema = {}
    for group in {route.group for route in _GUARDED.values()}:
        found |= _group(group)
    for path, table in _TABLES.items():
        root = found[_name(_GUARDED[path])]
        for name, row in table.items():
            if row.treatment == "deny" and getattr(options, row.setting or "_", "") != "pass":
                _deny(root, name, found)
    _forget(found, {f"{_REF}{name}" for name, schema in found.items() if _GONE in schema})
    # A message may leave its type out (`server.dialects.responses`).
    found["responses.MessageItem"]["required"].remove("type")
    wanted = [_name(route) for route in _offered(options).values()]
    for name in wanted:  # it grows on the way
        wanted += set(_references(found[name])) - set(wanted)
    return {name: found[name] for name in sorted(wanted)}


def _group(group: str) -> Schema:
    """Return the schemas of a dialect; structs of one name in two dialects stand apart."""
    types = [route.body for route in _GUARDED.values() if route.group == group]
    template = f"{_REF}{group}.{{name}}"
    _, made = msgspec.json.schema_components(types, ref_template=template)
    return {f"{group}.{name}": _tidy(schema) for name, schema in made.items()}


def _name(route: _Guarded) -> str:
    return f"{route.group}.{route.body.__name__}"


def _deny(root: Schema, path: str, schemas: Schema) -> None:
    """Take a field out; an object that can't be without it is marked."""
    *way, name = path.split(".")
    for holder in _at(root, way, schemas):
        if name in holder.get("required", ()):
            holder[_GONE] = True
        holder.get("properties", {}).pop(name, None)


def _at(
    schema: Schema, way: list[str], schemas: Schema, *, listed: bool = False
) -> Iterator[Schema]:
    """Yield the objects at the end of a way of fields."""
    if "$ref" in schema:
        yield from _at(schemas[schema["$ref"].removeprefix(_REF)], way, schemas, listed=listed)
    for one in schema.get("anyOf", ()):
        yield from _at(one, way, schemas, listed=listed)
    kind = schema.get("type")
    if kind == "array" and listed:
        yield from _at(schema.get("items", {}), way, schemas)
    elif kind == "object" and not listed and not way:
        yield schema
    elif kind == "object" and not listed:
        inner = schema.get("properties", {}).get(way[0].removesuffix("[]"), {})
        yield from _at(inner, way[1:], schemas, listed=way[0].endswith("[]"))


def _forget(value: Any, gone: set[str]) -> None:
    """Remove what unions offer of objects that are gone."""
    if isinstance(value, dict) and "discriminator" in value:
        value["anyOf"] = [one for one in value["anyOf"] if one["$ref"] not in gone]
        mapping = value["discriminator"]["mapping"]
        for tag in [tag for tag, name in mapping.items() if name in gone]:
            del mapping[tag]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for one in inner:
        _forget(one, gone)


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "$ref" in value:
            yield value["$ref"].removeprefix(_REF)
        for one in value.values():
            yield from _references(one)
    elif isinstance(value, list):
        for one in value:
            yield from _references(one)


def _tidy(value: Any) -> Any:
    """Leave out `default: null`, which every optional field has, and docstrings' margins."""
    if isinstance(value, list):
        return [_tidy(one) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {name: one for name, one in value.items() if not (name == "default" and one is None)}
    if isinstance(about := kept.get("description"), str):
        kept["description"] = cleandoc(about)
    return {name: _tidy(one) for name, one in kept.items()}
