"""Misspelt, devoweled and run-together names: which known word may an unknown word stand for?

A deletion index (the idea of SymSpell): a word and its misspelling share a string once a letter or
two are deleted from each. Looking a word up costs the same however many words are known, which a
scan over 10,000 targets' names would not.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

MIN_LETTERS = 4
"""Shorter words are never taken for misspellings."""

TWO_EDITS_LETTERS = 9
"""From this length on a word may differ by two edits."""

MAX_LETTERS = 24
"""Longer words are not indexed by deletions: no name is as long."""

VOWELS = frozenset("aeiou")
MIN_SKELETON = 1


@dataclass(frozen=True, slots=True)
class Near:
    """A known word that an unknown one may stand for.

    Attributes:
        word: The known word.
        edits: Edits between the two (optimal string alignment).
    """

    word: str
    edits: int


class DeletionIndex:
    """Finds known words within one edit, or two for long words; safe to share between threads.

    Args:
        words: The known words, case-folded.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = sorted({word for word in words if MIN_LETTERS <= len(word) <= MAX_LETTERS})
        hashes, sizes = array("I"), array("I")  # many millions for 10,000 targets
        for word in self._words:
            found = {zlib.crc32(part.encode()) for part in _deletions(word)}
            hashes.extend(found)
            sizes.append(len(found))
        keys = np.array(hashes, np.uint32)
        owners = np.repeat(np.arange(len(sizes), dtype=np.int32), np.array(sizes, np.int64))
        order = np.argsort(keys, kind="stable")
        self._hashes, self._owners = keys[order], owners[order]
        self._shift, self._seen = _bitmap(keys)

    def near(self, word: str) -> list[Near]:
        """Return the known words that `word` may be a misspelling of, nearest first."""
        if not MIN_LETTERS - 1 <= len(word) <= MAX_LETTERS or not len(self._hashes):
            return []
        keys = np.fromiter({zlib.crc32(part.encode()) for part in _deletions(word)}, np.uint32)
        # One look into memory for each key; a search among millions takes two dozen.
        places = keys >> self._shift
        keys = keys[(self._seen[places >> 3] >> (places & 7)) & 1 > 0]
        if not len(keys):
            return []  # most words are near no name
        first = np.searchsorted(self._hashes, keys, "left")
        known = self._hashes[np.minimum(first, len(self._hashes) - 1)] == keys
        if not known.any():
            return []
        from rapidfuzz.distance import OSA

        keys, first = keys[known], first[known]
        last = np.searchsorted(self._hashes, keys, "right")
        owners = {
            int(owner)
            for start, end in zip(first, last, strict=True)
            for owner in self._owners[start:end]
        }
        found = []
        for owner in sorted(owners):
            known = self._words[owner]
            edits = int(OSA.distance(word, known, score_cutoff=2))
            if 0 < edits <= allowed_edits(known) and known[0] in word[:2]:
                found.append(Near(known, edits))
        return sorted(found, key=lambda near: (near.edits, near.word))


def _bitmap(hashes: NDArray[np.uint32]) -> tuple[np.uint32, NDArray[np.uint8]]:
    """Return bits of which those at the hashes, shifted to the right, are set: a sixteenth."""
    width = min(max(len(hashes) * 16, 8).bit_length(), 32)
    shift = np.uint32(32 - width)
    seen = np.zeros(1 << width, np.bool_)
    seen[hashes >> shift] = True
    return shift, np.packbits(seen, bitorder="little")


class SkeletonIndex:
    """Finds known words by their consonants: `hpptr` is what is left of a name without vowels.

    Args:
        words: The known words, the likeliest first; the first of a skeleton wins.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words: dict[str, list[str]] = {}
        for word in words:
            bones = skeleton(word)
            if len(bones) >= MIN_SKELETON and bones != word:
                self._words.setdefault(bones, []).append(word)

    def words(self, bones: str) -> Sequence[str]:
        """Return the known words of a skeleton."""
        return self._words.get(bones, ())


def skeleton(word: str) -> str:
    """Return the word without its vowels."""
    return "".join(letter for letter in word if letter not in VOWELS)


def allowed_edits(word: str) -> int:
    """Return how many edits a misspelling of `word` may have."""
    return 2 if len(word) >= TWO_EDITS_LETTERS else 1


def look_ups(word: str) -> int:
    """Return how many keys `DeletionIndex.near` looks for at most."""
    size = len(word)
    if not MIN_LETTERS - 1 <= size <= MAX_LETTERS:
        return 0
    return 1 + size + (size * (size - 1) // 2 if allowed_edits(word) == 2 else 0)


def _deletions(word: str) -> set[str]:
    """Return the word with none, one or (long words) two of its letters deleted."""
    once = {word[:place] + word[place + 1 :] for place in range(len(word))}
    if allowed_edits(word) == 1:
        return {word, *once}
    pairs = combinations(range(len(word)), 2)
    return {word, *once, *(word[:i] + word[i + 1 : j] + word[j + 1 :] for i, j in pairs)}
