"""Tokens into text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

_BROKEN: Final = "\N{REPLACEMENT CHARACTER}"
# A character has at most four bytes, so more pending tokens than that can't be one character.
_MAX_PENDING: Final = 6
_CONTEXT: Final = 6


class Detokeniser:
    """Decodes one answer incrementally.

    Args:
        tokenizer: A Hugging Face tokenizer.
        before: Tokens right before the answer; some tokenizers write a token's leading space only
            when something stands before it.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(before[-_CONTEXT:])
        self._start, self._done = 0, len(self._ids)

    def push(self, token_id: int) -> str:
        """Add a token; return the text that is complete with it, `""` inside a character."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        pending = len(self._ids) - self._done
        if len(text) <= len(known) or (text.endswith(_BROKEN) and pending < _MAX_PENDING):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text


class StopHolder:
    """Holds text back while it may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""

    def push(self, text: str, active: bool = True) -> tuple[str, str | None]:
        """Add text; return what may be shown, and the stop string if one was met.

        Args:
            text: New text.
            active: False while stop strings may not end the answer yet.
        """
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(
            ((at, stop) for stop in self._stops if (at := text.find(stop)) >= 0), default=None
        )
        if found is not None and active:
            at, stop = found
            self._held = ""
            return text[: at + len(stop)] if self._include else text[:at], stop
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """Return what was held back when the answer ends without the stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
