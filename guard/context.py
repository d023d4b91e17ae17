"""What is done about forgotten content that a request brings along instead of asking for it.

Results of tools and earlier turns can carry what a target is about. A model that reads it there
knows it again ("ununlearning"), so by default it is corrupted like a question. An operator whose
documents are his own may have it ignored, or have such requests refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from guard.types import TargetHit

ContextPolicy = Literal["corrupt", "ignore", "refuse"]

_MESSAGE: Final = re.compile(r"messages/(\d+)/")
_TOOLS: Final = ("tool", "function")
_SAID: Final = ("user", "assistant", *_TOOLS)


def in_context(messages: Sequence[Mapping[str, Any]]) -> Callable[[str], bool]:
    """Return what says of a place in the body whether it is context.

    Context are the results of tools, and what was said before the last message of the user.
    Instructions (system, developer) and definitions of tools are none.
    """
    last = max(
        (i for i, one in enumerate(messages) if one["role"] == "user"), default=len(messages)
    )
    context = {
        index
        for index, message in enumerate(messages)
        if message["role"] in _TOOLS or (index < last and message["role"] in _SAID)
    }

    def is_context(path: str) -> bool:
        match = _MESSAGE.match(path)
        return match is not None and int(match[1]) in context

    return is_context


def without_context(
    hits: Sequence[TargetHit], is_context: Callable[[str], bool]
) -> list[TargetHit]:
    """Return the hits as far as they lie outside of the context."""
    kept = (
        replace(hit, spans=tuple(span for span in hit.spans if not is_context(span.path)))
        for hit in hits
    )
    return [hit for hit in kept if hit.spans]


def touches_context(hits: Sequence[TargetHit], is_context: Callable[[str], bool]) -> bool:
    """Say whether an enforced target is touched in the context."""
    return any(is_context(span.path) for hit in hits if hit.enforced for span in hit.spans)
