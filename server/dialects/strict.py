"""Reads a dialect's body as strictly as `guard.request` reads a chat completion's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec

from guard.errors import RequestError

B = TypeVar("B")

_UNKNOWN: Final = "Object contains unknown field `"
_MISSING: Final = "Object missing required field `"
_UNDECLARED: Final = "it is not among the declared fields"
_VALUE: Final = re.compile(r"^Invalid|[<>]|of length|regex")


def convert(raw: Mapping[str, Any], schema: type[B], reasons: Mapping[str, str]) -> B:
    """Turn a decoded body into its type.

    Args:
        raw: From `guard.request.decode_body`.
        schema: A struct that forbids unknown fields.
        reasons: Why some well-known fields are refused, by name.

    Raises:
        RequestError: If a field is unknown, missing, of a wrong type or out of range; names it.
    """
    try:
        return msgspec.convert(raw, schema)
    except msgspec.ValidationError as error:
        raise _readable(str(error), reasons) from None
    except (OverflowError, RecursionError):
        raise RequestError("a number is too large", code="invalid_value") from None


def check_part(part: Any, place: str, known: Mapping[str, str]) -> None:
    """Say clearly why a part is refused that can't be read as text.

    Args:
        part: One block of a content, decoded.
        place: Where it stands.
        known: Why some types are refused, by type.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and (why := known.get(kind)):
        message = f"'{place}': {kind} is not accepted: {why}"
        raise RequestError(message, code="unsupported_content", param=f"{place}.type")


def refuse(param: str, why: str) -> RequestError:
    """Return the error for a field that is known and not accepted."""
    message = f"'{param}' is not accepted: {why}"
    return RequestError(message[:500], code="unknown_parameter", param=param)


def items(value: Any) -> list[Any]:
    """Return a list as it is, and nothing for all else."""
    return value if isinstance(value, list) else []


def _readable(message: str, reasons: Mapping[str, str]) -> RequestError:
    what, _, place = message.rpartition(" - at `")
    if not what:
        what, place = message, ""
    base = place.removeprefix("key` in `").removesuffix("`").removeprefix("$").removeprefix(".")
    if what.startswith(_UNKNOWN):
        name = what.removeprefix(_UNKNOWN)[:-1]
        return refuse(_join(base, name[:100]), reasons.get(name, _UNDECLARED))
    if what.startswith(_MISSING):
        path = _join(base, what.removeprefix(_MISSING)[:-1])
        code = "missing_required_parameter"
        return RequestError(f"field '{path}' is required", code=code, param=path)
    code = "invalid_value" if _VALUE.search(what) else "invalid_type"
    text = f"'{base}': {what[:1].lower()}{what[1:]}"[:300]
    return RequestError(text, code=code, param=base or None)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
