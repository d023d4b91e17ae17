"""Prints, as JSON, the fields and routes of the vLLM that runs it.

Run by `test_fields.py` with the python of an environment with vLLM; it imports nothing of ours.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

SWITCHES = ("VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "VLLM_ENABLE_COHERE_API")
os.environ.update(dict.fromkeys(SWITCHES, "1"))  # routes that are off by default

import pydantic  # noqa: E402
import typing_extensions  # noqa: E402

_TRANSPARENT = {
    *(typing.Annotated, typing.Required, typing.NotRequired),
    *(typing_extensions.Required, typing_extensions.NotRequired),
}


def requests() -> dict[str, Any]:
    """Return the request class of each route that the guard reads."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.openai.responses.protocol import ResponsesRequest

    return {
        "/v1/chat/completions": ChatCompletionRequest,
        "/v1/completions": CompletionRequest,
        "/v1/messages": AnthropicMessagesRequest,
        "/v1/responses": ResponsesRequest,
    }


def hints(kind: type) -> dict[str, Any] | None:
    """Return the fields of a class that stands for a JSON object, by their names there."""
    if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
        found: dict[str, Any] = {}
        for name, field in kind.model_fields.items():
            if not field.alias or kind.model_config.get("populate_by_name"):
                found[name] = field.annotation
            if field.alias:
                found[field.alias] = field.annotation
        return found
    if typing_extensions.is_typeddict(kind) or dataclasses.is_dataclass(kind):
        return typing.get_type_hints(kind, include_extras=True)
    return None


def objects(annotation: Any, suffix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the JSON objects within a type, and how they hang there: `[]` in an array."""
    if isinstance(annotation, typing.TypeAliasType if sys.version_info >= (3, 12) else ()):
        annotation = annotation.__value__
    if isinstance(annotation, typing_extensions.TypeAliasType):
        annotation = annotation.__value__
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from objects(inner, suffix)
    elif origin in _TRANSPARENT:
        yield from objects(typing.get_args(annotation)[0], suffix)
    elif isinstance(origin, type) and issubclass(origin, Iterable):
        if not issubclass(origin, Mapping):
            for inner in typing.get_args(annotation):
                yield from objects(inner, suffix + "[]")
    elif hints(annotation) is not None:
        yield suffix, annotation


def graph(roots: dict[str, Any]) -> dict[str, dict[str, list[tuple[str, str]]]]:
    """Return, for every class within reach, its fields, and the classes of each with a suffix."""
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    waiting = list(roots.values())
    while waiting:
        kind = waiting.pop()
        if name_of(kind) in found:
            continue
        fields = found[name_of(kind)] = {}
        for field, annotation in (hints(kind) or {}).items():
            inner = list(objects(annotation))
            fields[field] = [(suffix, name_of(one)) for suffix, one in inner]
            waiting += [one for _, one in inner]
    return found


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _AllOn:
    """Settings of a server with every switch on."""

    profiler_config = None

    def __getattr__(self, name: str) -> _AllOn:
        return self


def routes() -> list[str]:
    """Return `METHOD path` of every route that vLLM can be made to have."""
    import importlib
    import pkgutil

    import vllm.entrypoints
    from fastapi import APIRouter, FastAPI
    from vllm.entrypoints.launchers.api_server.routers import register_api_routers
    from vllm.tasks import GENERATION_TASKS, POOLING_TASKS

    app = FastAPI()
    app.state.args = args = _AllOn()
    tasks = (*GENERATION_TASKS, *POOLING_TASKS, "render", "transcription", "realtime")
    register_api_routers(args, app, tasks, None)  # type: ignore[arg-type]
    found = set(served(app.routes))
    for module in pkgutil.walk_packages(vllm.entrypoints.__path__, "vllm.entrypoints."):
        if module.name.endswith("api_router") or "instrumentator" in module.name:
            try:
                router = getattr(importlib.import_module(module.name), "router", None)
            except ImportError as error:
                sys.stderr.write(f"{module.name}: {error}\n")
                continue
            if isinstance(router, APIRouter):
                found |= set(served(router.routes))
    return sorted(found)


def served(some: Iterable[Any]) -> Iterator[str]:
    for route in some:
        path = getattr(route, "path", None)
        default = {"WEBSOCKET" if "WebSocket" in type(route).__name__ else "MOUNT"}
        if hasattr(route, "original_router"):  # FastAPI keeps a router that was taken in whole
            yield from served(route.original_router.routes)
        elif path:
            for method in sorted(getattr(route, "methods", None) or default):
                yield f"{method} {path}"


if __name__ == "__main__":
    kinds = requests()
    roots = {route: name_of(kind) for route, kind in kinds.items()}
    sys.stdout.write(
        json.dumps({"roots": roots, "classes": graph(kinds), "routes": routes()}) + "\n"
    )
