"""Turn a flagged text into corrupted embeddings: the tokens, their rows, the marked positions.

Serving and the offline learner both come through here, so that a strength is learned on exactly
what will be served (DESIGN section 5).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from guard.keys import GuardKey
from guard.prompts import ContentTokens, ModelPrompts
from guard.types import BoolArray, FloatArray

_FINAL_MARKS = " \t\n.,;:!?…。？！"
_SENTENCE_END = re.compile(r"(?<![A-Z]\.)(?<=[.!?…])\s+|(?<=[。？！])|\n+")
_POSSESSIVE = re.compile(r"['’](?:s|S)?$")


class Corrupter(Protocol):
    """One target's corruption, its spec bound in; pure and deterministic."""

    def __call__(
        self, embeddings: FloatArray, positions: BoolArray, seed: bytes, frame: BoolArray
    ) -> FloatArray:
        """Return corrupted embeddings.

        Args:
            embeddings: Shape (tokens, hidden); not modified.
            positions: True where a token may be corrupted, shape (tokens,).
            seed: Seeds every random draw.
            frame: True for the tokens of the sentences around, shape (tokens,).
        """
        ...

    def stand_ins(
        self, corrupted: FloatArray, positions: BoolArray
    ) -> list[tuple[int, int, tuple[str, ...]]]:
        """Return first token, token after the last, and words, of each name that now stands there.

        Args:
            corrupted: What the call returned, shape (tokens, hidden).
            positions: What it was called with, shape (tokens,).
        """
        ...


@dataclass(frozen=True, slots=True)
class Corruption:
    """What one target does to one text.

    Attributes:
        corrupter: The target's corruption.
        spans: Characters of the text to corrupt.
        seed: Seed of the noise, a function of key, target and text.
        wording: Further characters that touch the target: quotations of its rows.
    """

    corrupter: Corrupter
    spans: tuple[tuple[int, int], ...]
    seed: bytes
    wording: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StandIn:
    """A generic name that the model read in the place of the asked one.

    Attributes:
        words: Words of the generic name: first names, then last names.
        asked: The text whose place it took.
    """

    words: tuple[str, ...]
    asked: str


@dataclass(frozen=True, slots=True)
class CorruptedText:
    """A text as the model will read it.

    Attributes:
        embeddings: Shape (tokens, hidden), float32.
        stand_ins: Names that stand in it for asked ones.
    """

    embeddings: FloatArray
    stand_ins: tuple[StandIn, ...]


def corrupted_embeddings(
    prompts: ModelPrompts, tokens: ContentTokens, text: str, corruptions: Sequence[Corruption]
) -> CorruptedText:
    """Embed the tokens of a text and corrupt them by each target in turn."""
    embeddings = prompts.embed(tokens.ids)
    named = np.zeros(len(tokens.ids), dtype=np.bool_)
    for corruption in corruptions:
        named |= marked_positions(tokens.offsets, corruption.spans)
    stand_ins: list[StandIn] = []
    for corruption in corruptions:
        positions = marked_positions(tokens.offsets, corruption.spans)
        around = sentences_around(text, (*corruption.spans, *corruption.wording))
        # Another target's name must not be blurred: it has to read as the name it became.
        frame = marked_positions(tokens.offsets, around) & ~named
        embeddings = corruption.corrupter(embeddings, positions, corruption.seed, frame)
        for first, end, words in corruption.corrupter.stand_ins(embeddings, positions):
            place = slice(tokens.offsets[first][0], tokens.offsets[end - 1][1])
            stand_ins.append(StandIn(words, bare_name(text[place])))
    return CorruptedText(embeddings, tuple(stand_ins))


def sentences_around(text: str, spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Widen each span to the sentences that it lies in; their final marks stay outside.

    A request may hold a book's chapter beside one sentence that touches a target.
    """
    borders = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    wide = []
    for start, end in spans:
        first = max(border for border in borders if border <= start)
        last = min((border for border in borders if border >= end), default=len(text))
        wide.append((first, len(text[:last].rstrip(_FINAL_MARKS)) or last))
    return tuple(wide)


def bare_name(text: str) -> str:
    """Return what a marked stretch names: no space or possessive at its ends."""
    return _POSSESSIVE.sub("", text.strip())


def marked_positions(
    offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
) -> BoolArray:
    """Mark the tokens that overlap a span; all of them where no token does.

    A flagged text is never left clean, even if its spans fall between its tokens.

    Args:
        offsets: Characters of each token, (start, end).
        spans: Characters to mark, (start, end).
    """
    marked = np.zeros(len(offsets), dtype=np.bool_)
    for index, (start, end) in enumerate(offsets):
        marked[index] = any(start < stop and begin < end for begin, stop in spans)
    if marked.any():
        return marked
    # Tokens that spell no text (a beginning-of-sequence mark) stay.
    return np.array([end > start for start, end in offsets], dtype=np.bool_)


def all_but_final_mark(text: str) -> tuple[int, int]:
    """The span of a flagged text in which the finder names no entity.

    ECO (arXiv 2406.07933) then corrupts all tokens but the prompt's last. Here the template's own
    clean tokens follow every content, so only final punctuation needs to stay.
    """
    return 0, len(text.rstrip(_FINAL_MARKS)) or len(text)


def noise_seed(key: GuardKey, target: str, text: str) -> bytes:
    """Seed of a target's noise on a text: the same text always gets the same noise."""
    return bytes.fromhex(key.digest("noise", f"{target}\0{text}".encode()))
