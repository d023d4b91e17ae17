"""Reads a client's request once, strictly, and says which texts the model would read.

What was classified must be what is sent: JSON that two parsers could read in two ways (duplicate
keys, NaN, lone surrogates, other encodings) is refused, and so is every field that is not declared
in `guard.schema`. `guard.fields` says what becomes of each field; `docs/api.md` lists them.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from guard.errors import CannotCorruptError, RequestError
from guard.fields import FIELDS, STEERING, stripped, why_denied
from guard.schema import BODIES, TEMPLATE_ARGUMENTS, ChatBody, CompletionBody, ImagePart
from guard.segments import DetokeniseField, chat_segments, prompt_segments
from guard.types import Segment

ENDPOINTS: Final = ("/v1/chat/completions", "/v1/completions")
RESERVED_TOKEN: Final = "<prompt_embeds>"
"""vLLM's placeholder for embeddings; it refuses text that holds it, and so do we."""

MAX_DEPTH: Final = 64
MAX_PROMPTS: Final = 256
MAX_BRACKETS: Final = 200_000
MAX_COMMAS: Final = 1_000_000

Detokenise = Callable[[Sequence[int]], str]
ImagePolicy = Literal["deny", "pass"]

_REPLACES: Final = "it would replace what the guard has read"
_DOCUMENTS: Final = FIELDS["/v1/chat/completions"]["documents"].why
_TEXT_PARTS: Final = ("text", "refusal")
_IMAGE: Final = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request that was accepted.

    Attributes:
        endpoint: One of `ENDPOINTS`.
        body: What the engine may get: the client's bytes, less the fields that are stripped.
        raw: The decoded body, less these; treat as read-only.
        model: Name of the model asked for.
        stream: True if the client wants server-sent events.
        content: The typed body.
    """

    endpoint: str
    body: bytes = field(repr=False)
    raw: dict[str, Any] = field(repr=False)
    model: str
    stream: bool
    content: ChatBody | CompletionBody = field(repr=False)

    def segments(self, detokenise: Detokenise | None = None) -> tuple[Segment, ...]:
        """Return every text that the model would read, in the order of the body; none is empty.

        Typed special tokens (`<|im_start|>`) stay in the text as they were sent.

        Args:
            detokenise: Turns token ids into text; needed for prompts made of token ids, and for
                tokens that `logit_bias` favours.

        Raises:
            RequestError: If it holds token ids that can't be turned into text.
        """
        if isinstance(self.content, ChatBody):
            found = chat_segments(self.content, _guarded(detokenise))
        else:
            found = prompt_segments(self.content, _guarded(detokenise))
        return tuple(segment for segment in found if segment.text)

    @property
    def has_images(self) -> bool:
        """Whether a message holds an image, which embeddings can't carry."""
        messages = self.content.messages if isinstance(self.content, ChatBody) else ()
        return any(
            isinstance(part, ImagePart)
            for message in messages
            if isinstance(message.content, list)
            for part in message.content
        )

    @property
    def has_token_ids(self) -> bool:
        """Whether texts of it are told by tokens' ids."""
        content = self.content
        told = isinstance(content, CompletionBody) and not isinstance(content.prompt, str)
        return told or bool(content.logit_bias)

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts of a completion request: one, or as many as the list holds."""
        if isinstance(self.content, ChatBody):
            return []
        return _prompt_list(self.content.prompt)


def parse_request(endpoint: str, body: bytes, images: ImagePolicy = "deny") -> ParsedRequest:
    """Decode and check a request body.

    Args:
        endpoint: One of `ENDPOINTS`.
        body: The client's bytes.
        images: Whether a user's messages may hold images beside text.

    Raises:
        RequestError: If anything in it is malformed, undeclared or out of range.
    """
    schema = BODIES.get(endpoint)
    if schema is None:
        raise RequestError(f"no such endpoint: {endpoint[:100]}", status=404, code="not_found")
    raw = decode_body(body)
    if isinstance(raw.get("messages"), list):
        _check_parts(raw["messages"], images)
    try:
        content: ChatBody | CompletionBody = msgspec.convert(raw, schema)
    except msgspec.ValidationError as error:
        raise _readable(str(error), endpoint) from None
    except (OverflowError, RecursionError):
        raise RequestError("a number is too large", code="invalid_value") from None
    _check_rules(content)
    raw, body = _without(stripped(endpoint), raw, body)
    return ParsedRequest(endpoint, body, raw, content.model, bool(content.stream), content)


def decode_body(body: bytes) -> dict[str, Any]:
    """Decode a JSON object that no two parsers can read in two ways.

    Args:
        body: The client's bytes.

    Raises:
        RequestError: If it is anything else, or holds the reserved token.
    """
    text = _text(body)
    raw = _decode(text)
    if _is_plain(text):
        _check_reserved(text)
    else:
        _check_tree(raw)
    return raw


def steering_dropped(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a body without what could steer a guarded answer back to what was asked.

    A JSON schema can force a choice between answers or spell one out, so JSON of any shape takes
    its place; `docs/api.md` says what is kept, and why.

    Args:
        raw: A decoded body.
    """
    kept = {name: value for name, value in raw.items() if name not in STEERING}
    if (raw.get("response_format") or {}).get("type") == "json_schema":
        kept["response_format"] = {"type": "json_object"}
    return kept


def unsteered(request: ParsedRequest) -> bytes:
    """Return a request's body without steering; its bytes as they are, if there is none."""
    raw = steering_dropped(request.raw)
    return request.body if raw == request.raw else msgspec.json.encode(raw)


def replace_contents(
    request: ParsedRequest,
    replacements: Mapping[int, bytes],
    added: Mapping[str, Any] | None = None,
) -> bytes:
    """Put embeddings in the place of text; all else stays as it was, but for what would steer.

    Args:
        request: The request as parsed.
        replacements: Base64 of an embeddings archive, by index of message (chat: the message's
            whole content becomes one part) or of prompt (completions: all of them).
        added: Further fields of the body.

    Returns:
        The new body.

    Raises:
        CannotCorruptError: If some prompts of a list have no replacement: an engine takes either
            texts or embeddings.
    """
    raw = {**steering_dropped(request.raw), **(added or {})}
    if isinstance(request.content, ChatBody):
        messages = list(raw["messages"])
        for index, data in replacements.items():
            part = {"type": "prompt_embeds", "data": data.decode("ascii")}
            messages[index] = {**messages[index], "content": [part]}
        raw["messages"] = messages
        return msgspec.json.encode(raw)
    count = len(request.prompts())
    if sorted(replacements) != list(range(count)):
        raise CannotCorruptError("prompt", "all prompts of a list must be replaced together")
    embeds = [replacements[index].decode("ascii") for index in range(count)]
    value: Any = embeds if _is_batch(raw["prompt"]) else embeds[0]
    return msgspec.json.encode(
        {
            "prompt_embeds" if key == "prompt" else key: value if key == "prompt" else item
            for key, item in raw.items()
        }
    )


# --- JSON -----------------------------------------------------------------------------------------


def _text(body: bytes) -> str:
    # A body of nothing but brackets costs a hundred times its size; no conversation has as many.
    if body.count(b"{") + body.count(b"[") > MAX_BRACKETS or body.count(b",") > MAX_COMMAS:
        raise _bad_json("it holds too many objects, arrays or values")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad_json(f"not UTF-8 (byte {error.start})") from None


def _decode(text: str) -> dict[str, Any]:
    try:
        raw = _JSON.decode(text)
    except json.JSONDecodeError as error:
        raise _bad_json(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _bad_json(f"nested too deeply (at most {MAX_DEPTH} levels)") from None
    if not isinstance(raw, dict):
        raise _bad_json(f"got {_kind(raw)} where an object was expected")
    return raw


def _bad_json(what: str) -> RequestError:
    return RequestError(f"the body is not acceptable JSON: {what}", code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _bad_json(f"the key {_short(twice)} appears twice in one object")
    return found


def _number(digits: str) -> int:
    # Beyond 64 bits parsers disagree; JSON schemas do use unsigned 64-bit limits.
    if len(digits) > 20 or not -(2**63) <= (value := int(digits)) < 2**64:
        raise _bad_json("an integer is too large (64 bits at most)")
    return value


def _fraction(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise _bad_json("a number is too large")
    return value


def _constant(name: str) -> float:
    raise _bad_json(f"{name} is not a JSON number")


_JSON: Final = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=_number, parse_float=_fraction, parse_constant=_constant
)


def _without(
    names: Sequence[str], raw: dict[str, Any], body: bytes
) -> tuple[dict[str, Any], bytes]:
    """Take fields out of a body; the others keep their bytes."""
    if raw.keys().isdisjoint(names):
        return raw, body
    values = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    kept = {name: value for name, value in values.items() if name not in names}
    return {name: raw[name] for name in kept}, msgspec.json.encode(kept)


def _is_plain(text: str) -> bool:
    r"""Say if `_check_tree` could only find the reserved token, and that in the text as it stands.

    Nothing lies deeper than there are brackets. UTF-8 holds no half of a surrogate pair, and but
    for `\u` no escape stands for one, or for a sign of the token.
    """
    return "\\u" not in text and text.count("{") + text.count("[") <= MAX_DEPTH


def _check_tree(raw: dict[str, Any]) -> None:
    """Refuse depth, lone surrogates and the reserved token, wherever they stand."""
    stack: list[tuple[Any, int]] = [(raw, 1)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise _bad_json(f"nested too deeply (at most {MAX_DEPTH} levels)")
            if isinstance(value, dict):
                stack.extend((key, depth) for key in value)
                stack.extend((item, depth + 1) for item in value.values())
            else:
                stack.extend((item, depth + 1) for item in value)


def _check_text(text: str) -> None:
    if not text.isascii() and _SURROGATE.search(text):
        raise _bad_json("a string holds half of a surrogate pair")
    _check_reserved(text)


def _check_reserved(text: str) -> None:
    if RESERVED_TOKEN in text:
        message = f"text may not hold the reserved token {RESERVED_TOKEN}; leave it out"
        raise RequestError(message, code="invalid_value")


# --- Rules that types can't say -------------------------------------------------------------------


def _check_parts(messages: list[Any], images: ImagePolicy) -> None:
    """Say clearly why content parts other than text are refused."""
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        for number, part in enumerate(parts if isinstance(parts, list) else ()):
            if not isinstance(part, dict):
                continue
            param = f"messages[{index}].content[{number}].type"
            if "type" not in part:
                code = "missing_required_parameter"
                raise RequestError(f"field '{param}' is required", code=code, param=param)
            kind = part["type"]
            if kind == "image_url" and images == "pass":
                _check_image(message, part, param)
            elif isinstance(kind, str) and kind not in _TEXT_PARTS:
                raise RequestError(
                    f"content parts of type {_short(kind)} are not accepted: the guard reads text "
                    "and can't tell what other parts hold; send parts of type 'text'",
                    code="unsupported_content",
                    param=param,
                )


def _check_image(message: Mapping[str, Any], part: Mapping[str, Any], param: str) -> None:
    """Refuse images of others than the user, and URLs that an engine would have to fetch."""
    if message.get("role") != "user":
        text = "images are accepted in the user's messages only"
        raise RequestError(text, code="unsupported_content", param=param)
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else None
    if isinstance(url, str) and not _IMAGE.fullmatch(url):
        raise RequestError(
            "images are accepted as 'data:image/png;base64,...' only (or jpeg, gif, webp): the "
            "engine fetches nothing that a request names",
            code="unsupported_content",
            param=f"{param.removesuffix('type')}image_url.url",
        )


def _check_rules(content: ChatBody | CompletionBody) -> None:
    if isinstance(content, ChatBody):
        for key in content.chat_template_kwargs or ():
            if key in TEMPLATE_ARGUMENTS:
                param = f"chat_template_kwargs.{key}"
                reason = _DOCUMENTS if key == "documents" else _REPLACES
                raise _refused(param, f"{param} is not accepted: {reason}")
        return
    if content.echo:
        raise _refused("echo", f"echo may not be true: {_why('echo')}")
    if content.suffix:
        raise _refused("suffix", f"suffix is not accepted: {_why('suffix')}")
    if content.best_of not in (None, 1):
        raise _refused("best_of", f"best_of may only be 1: {_why('best_of')}")
    _check_prompt(content.prompt)


def _why(name: str) -> str:
    return why_denied("/v1/completions", name)


def _check_prompt(prompt: Any) -> None:
    if isinstance(prompt, str):
        return
    kinds = {type(item) for item in prompt}
    if len(kinds) > 1 or any(item == [] for item in prompt):
        message = (
            "prompt must be a string, a list of strings, a list of token ids or a list of "
            "non-empty lists of token ids; mixed lists are not accepted"
        )
        raise RequestError(message, code="invalid_type", param="prompt")
    if kinds != {int} and len(prompt) > MAX_PROMPTS:
        message = f"got {len(prompt)} prompts, at most {MAX_PROMPTS} are allowed in one request"
        raise RequestError(message, code="invalid_value", param="prompt")


def _is_batch(prompt: Any) -> bool:
    return isinstance(prompt, list) and not isinstance(prompt[0], int)


def _prompt_list(prompt: Any) -> list[str | list[int]]:
    return list(prompt) if _is_batch(prompt) else [prompt]


def _guarded(detokenise: Detokenise | None) -> DetokeniseField:
    def turn(ids: Sequence[int], param: str) -> str:
        if detokenise is None:
            message = "token ids are not accepted here; send text"
            raise RequestError(message, code="unsupported_content", param=param)
        try:
            return detokenise(ids)
        except (ValueError, IndexError, OverflowError, TypeError):
            message = f"{param} holds token ids that the model doesn't have"
            raise RequestError(message, code="invalid_value", param=param) from None

    return turn


# --- Messages of msgspec, as a client should read them --------------------------------------------

_UNKNOWN: Final = "Object contains unknown field `"
_MISSING: Final = "Object missing required field `"
_ALLOWED: Final = {
    "role": "system, developer, user, assistant, tool, function",
    "tool_choice": "none, auto, required, or an object that names a function",
    "reasoning_effort": "none, minimal, low, medium, high, xhigh, max",
    "response_format.type": "text, json_object, json_schema",
}


def _readable(message: str, endpoint: str) -> RequestError:
    what, _, place = message.rpartition(" - at `")
    if not what:
        what, place = message, ""
    key = place.startswith("key` in `")
    base = place.removeprefix("key` in `").removesuffix("`").removeprefix("$").removeprefix(".")
    if what.startswith(_UNKNOWN):
        name = what.removeprefix(_UNKNOWN)[:-1]
        path = _join(base, name[:100])
        reason = why_denied(endpoint, path)
        return _refused(path, f"field '{path}' is not accepted on {endpoint}: {reason}")
    if what.startswith(_MISSING):
        path = _join(base, what.removeprefix(_MISSING)[:-1])
        code = "missing_required_parameter"
        return RequestError(f"field '{path}' is required", code=code, param=path)
    return _wrong_value(what, base, key)


def _wrong_value(what: str, path: str, key: bool) -> RequestError:
    is_value = what.startswith("Invalid") or re.search(r"[<>]|of length|regex", what)
    text = f"{'a key of ' if key else ''}'{path}': {what[:1].lower()}{what[1:]}"[:300]
    for end, allowed in _ALLOWED.items():
        if path.endswith(end) and is_value:
            text += f" (allowed: {allowed})"
    return RequestError(
        text, code="invalid_value" if is_value else "invalid_type", param=path or None
    )


def _refused(param: str, message: str) -> RequestError:
    return RequestError(message[:500], code="unknown_parameter", param=param)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(text: str) -> str:
    return repr(text if len(text) <= 100 else text[:97] + "...")


def _kind(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
