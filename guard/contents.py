"""The contents that an embeddings part can take the place of, and where a span lies in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guard.chat_template import PART_SEPARATOR, content_parts
from guard.errors import CannotCorruptError
from guard.request import ParsedRequest
from guard.types import Segment, Span


@dataclass(frozen=True, slots=True)
class Content:
    """The text of one message's content (or one prompt), and where each of its parts begins."""

    text: str
    parts: dict[str, int]


def contents_of(request: ParsedRequest, view: Sequence[Segment]) -> dict[int, Content]:
    """Everything that an embeddings part can replace, by index of message or prompt."""
    if request.endpoint == "/v1/completions":
        return {
            segment.message: Content(segment.text, {segment.path: 0})
            for segment in view
            if segment.message is not None
        }
    return {
        index: _joined(f"messages/{index}/content", message)
        for index, message in enumerate(request.raw["messages"])
    }


def _joined(path: str, message: Mapping[str, Any]) -> Content:
    """Join the parts as vLLM does; a part that is a string has the content's own path."""
    content = message.get("content")
    texts = content_parts(message)
    if not isinstance(content, list):
        return Content("".join(texts), {path: 0})
    starts: dict[str, int] = {}
    at = 0
    for number, (part, text) in enumerate(zip(content, texts, strict=True)):
        starts[f"{path}/{number}/{part['type']}"] = at
        at += len(text) + len(PART_SEPARATOR)
    return Content(PART_SEPARATOR.join(texts), starts)


def has_place(span: Span, contents: Mapping[int, Content]) -> bool:
    """Say whether embeddings can take the place of a span."""
    return any(span.path in content.parts for content in contents.values())


def locate(span: Span, contents: Mapping[int, Content]) -> tuple[int, int, int]:
    """Message index, and the span's place in that message's joined text."""
    for index, content in contents.items():
        if span.path in content.parts:
            base = content.parts[span.path]
            return index, base + span.start, base + span.end
    raise CannotCorruptError(span.path, "no embeddings can take the place of this field")
