"""Request bodies with one field in them, and the fields that the structs of `guard.schema` have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from guard.request import ENDPOINTS
from guard.schema import BODIES

CHAT, TEXT = ENDPOINTS


def leaves(kind: inspect.Type, path: str = "") -> Iterator[tuple[str, inspect.Type]]:
    """Yield every place where a struct holds a value that is not a struct or an array of them."""
    match kind:
        case inspect.Metadata():
            yield from leaves(kind.type, path)
        case inspect.UnionType():
            for one in kind.types:
                yield from leaves(one, path)
        case inspect.ListType() if holds_structs(kind.item_type):
            yield from leaves(kind.item_type, f"{path}[]")
        case inspect.StructType():
            dot = f"{path}." if path else ""
            if kind.tag_field:
                yield dot + kind.tag_field, inspect.LiteralType((kind.tag,))
            for one in kind.fields:
                yield from leaves(one.type, dot + one.encode_name)
        case _:
            yield path, kind


def holds_structs(kind: inspect.Type) -> bool:
    kinds = kind.types if isinstance(kind, inspect.UnionType) else (kind,)
    return any(isinstance(one, inspect.StructType) for one in kinds)


def declared(route: str) -> dict[str, list[inspect.Type]]:
    """Return the types of a route's fields, by path."""
    return declared_by(BODIES[route])


def declared_by(struct: type) -> dict[str, list[inspect.Type]]:
    """Return types by path; an array of structs is no value of its own, what is in it is."""
    found: dict[str, list[inspect.Type]] = {}
    for path, kind in leaves(inspect.type_info(struct)):
        found.setdefault(path, []).append(kind)
    return found


def body_with(route: str, path: str, value: Any) -> dict[str, Any]:
    """Return a request that holds a value at a path, and what is needed around it."""
    body: dict[str, Any] = {"model": "m"}
    body |= {"messages": [{"role": "user", "content": "hi"}]} if route == CHAT else {"prompt": "hi"}
    node: Any = body
    steps = path.split(".")
    for number, step in enumerate(steps[:-1]):
        name, is_list = step.removesuffix("[]"), step.endswith("[]")
        if name == "messages":
            node = node[name][0]
            node |= about_message(path)
            continue
        inner = about(".".join(steps[: number + 1]), path)
        node[name] = [inner] if is_list else inner
        node = inner
    node[steps[-1].removesuffix("[]")] = value
    return body


def about_message(path: str) -> dict[str, Any]:
    name = path.split(".")[1].partition("[")[0]
    roles = {"tool_call_id": "tool", "name": "user", "content": "user", "role": "user"}
    return {"role": "assistant" if "refusal" in path else roles.get(name, "assistant")}


def about(parent: str, path: str) -> dict[str, Any]:
    match parent.rpartition(".")[2]:
        case "content[]":
            kind = "refusal" if path.endswith("refusal") else "text"
            return {"type": kind, **({} if path.endswith(("text", "refusal")) else {"text": "hi"})}
        case "tool_calls[]":
            return {"id": "1", "function": {"name": "f", "arguments": ""}}
        case "function":
            return {"name": "f"} | ({"arguments": ""} if "tool_calls" in parent else {})
        case "function_call":
            return {"name": "f", "arguments": ""}
        case "tools[]" | "tool_choice":
            return {"type": "function", "function": {"name": "f"}}
        case "response_format":
            return {"type": "json_schema", "json_schema": {"name": "n"}}
        case "json_schema":
            return {"name": "n"}
    return {}
