"""Turn a flagged text into corrupted embeddings: the tokens, their rows, the marked positions.

Serving and the offline learner both come through here, so that a strength is learned on exactly
what will be served (DESIGN section 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from guard.keys import GuardKey
from guard.prompts import ContentTokens, ModelPrompts
from guard.types import BoolArray, FloatArray


class Corrupter(Protocol):
    """One target's corruption, its spec bound in; pure and deterministic."""

    def __call__(self, embeddings: FloatArray, positions: BoolArray, seed: bytes) -> FloatArray:
        """Return corrupted embeddings.

        Args:
            embeddings: Shape (tokens, hidden); not modified.
            positions: True where a token may be corrupted, shape (tokens,).
            seed: Seeds every random draw.
        """
        ...


@dataclass(frozen=True, slots=True)
class Corruption:
    """What one target does to one text.

    Attributes:
        corrupter: The target's corruption.
        spans: Characters of the text to corrupt.
        seed: Seed of the noise, a function of key, target and text.
    """

    corrupter: Corrupter
    spans: tuple[tuple[int, int], ...]
    seed: bytes


def corrupted_embeddings(
    prompts: ModelPrompts, tokens: ContentTokens, corruptions: Sequence[Corruption]
) -> FloatArray:
    """Embed `tokens` and corrupt them by each target in turn.

    Returns:
        Embeddings, shape (tokens, hidden), float32.
    """
    embeddings = prompts.embed(tokens.ids)
    for corruption in corruptions:
        positions = marked_positions(tokens.offsets, corruption.spans)
        embeddings = corruption.corrupter(embeddings, positions, corruption.seed)
    return embeddings


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
    return 0, len(text.rstrip(" \t\n.,;:!?…。？！")) or len(text)


def noise_seed(key: GuardKey, target: str, text: str) -> bytes:
    """Seed of a target's noise on a text: the same text always gets the same noise."""
    return bytes.fromhex(key.digest("noise", f"{target}\0{text}".encode()))
