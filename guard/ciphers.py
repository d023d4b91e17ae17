"""Letter ciphers and reversals: Caesar shifts, the mirrored alphabet, text written backwards.

A stretch is taken for one only if its letters look much more English read so than as they stand;
ordinary text of any language, names and code stay below. The statistics are in `guard.letters`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.letters import ALPHABETS, BACKWARDS, ENGLISH, READ_AS, Words, read_words, word_scores
from guard.traced import Altered, Place, Traced, Weaver, merged

STRANGE: Final = 5.0
"""Nats against English from which a run of words is worth a look."""
GAIN: Final = 12.0
"""Nats that a reading must gain over the text as it stands."""
MEAN: Final = 0.45
"""Nats per pair of letters that a reading must reach; English is near 1."""
DROP: Final = 8.0
"""A run ends where it has lost so much of its evidence."""
AROUND: Final = 100
"""Characters around a run, on its line, that are read with it: its words that look English."""
EAGER: Final = 0.4
"""Part of the evidence that is enough where the text speaks of a cipher, or was itself encoded."""
_WORDS_TURNED: Final = re.compile(r"backward|revers|right to left|last word", re.IGNORECASE)
_NAMES_ROT13: Final = re.compile(r"\brot[ -]?13\b", re.IGNORECASE)
_ROT13: Final = 2 * ALPHABETS.index("nopqrstuvwxyzabcdefghijklm")
_HINTS: Final = tuple(
    "rot13 rot-13 caesar cipher cypher shift backward revers atbash decod decrypt mirror "
    "scrambl".split()
)
_JUDGED: Final = 4000
"""Pairs of a run that are judged; the rest is read the same way."""


class Run(NamedTuple):
    """Words, by number, that belong to a cipher."""

    first: int
    last: int


def solve(source: Traced, eager: bool = False) -> Altered | None:
    """Read what `source` holds in a letter cipher or backwards; None if it holds no such thing.

    Args:
        source: The text.
        eager: Be content with less evidence.

    Returns:
        One text with all readings, a line each; text written backwards is read letter by letter
        and also word by word.
    """
    text = source.text
    words = read_words(text)
    if len(words.starts) == 0:
        return None
    part = EAGER if eager or _speaks_of_ciphers(text) else 1.0
    plain = word_scores(words, ENGLISH)
    runs = [*_runs(-plain, part * STRANGE)]
    runs += _runs(word_scores(words, BACKWARDS) - plain, part * GAIN)
    found = _keys(words, runs, part) if runs else []
    if _NAMES_ROT13.search(text):
        found.append((_ROT13, 0, len(text)))  # so it says, and names need not look English
    weaver, stretches = Weaver(source), [(start, end) for _, start, end in found]
    if part < 1.0 and _WORDS_TURNED.search(text):
        _turn_words(weaver)
        stretches.append((0, len(text)))
    elif not found:
        return None
    for key in sorted({key for key, _, _ in found}):
        spans = [_widened(text, start, end) for other, start, end in found if other == key]
        for start, end in merged(spans):
            _read(weaver, key, start, end)
    return Altered(weaver.traced(), tuple(merged(stretches)))


def _speaks_of_ciphers(text: str) -> bool:
    lower = text.lower()
    return any(hint in lower for hint in _HINTS)


def _runs(evidence: NDArray[np.float32], least: float) -> Iterator[Run]:
    """Yield runs of words whose summed evidence reaches `least` (Kadane's algorithm)."""
    if np.maximum(evidence, 0.0).sum() < least:
        return
    first, total, best, best_at = 0, 0.0, 0.0, -1
    for index, value in enumerate(evidence.tolist()):
        total += value
        if total > best:
            best, best_at = total, index
        if total <= 0 or total < best - DROP:
            if best >= least:
                yield Run(first, best_at)
            first, total, best = index + 1, 0.0, 0.0
    if best >= least:
        yield Run(first, best_at)


def _keys(words: Words, runs: Iterable[Run], part: float) -> list[tuple[int, int, int]]:
    """Find how each run must be read: number of the reading, start, end; what stands is left."""
    found = []
    for run in runs:
        start, end = int(words.starts[run.first]), int(words.ends[run.last])
        pairs = words.pairs[start : min(end + 1, start + _JUDGED)]
        counts = np.bincount(pairs, minlength=len(ENGLISH))
        counts[0] = 0
        scores = READ_AS @ counts
        best = int(scores.argmax())
        if (
            best
            and scores[best] - scores[0] >= part * GAIN
            and scores[best] >= part * MEAN * counts.sum()
        ):
            found.append((best, start, end))
    return found


def _widened(text: str, start: int, end: int) -> Place:
    """Take in the words around a run on its line, and its marks."""
    low, high = max(start - AROUND, 0), min(end + AROUND, len(text))
    low = max(low, text.rfind("\n", low, start) + 1)
    newline = text.find("\n", end, high)
    high = newline if newline >= 0 else high
    return low, high


def _read(weaver: Weaver, key: int, start: int, end: int) -> None:
    cipher, backwards = divmod(key, 2)
    text = weaver.source.text[start:end].translate(_table(ALPHABETS[cipher]))
    if not backwards:
        weaver.respell(text, start)
        weaver.say("\n")
        return
    weaver.turned(text[::-1], start)
    weaver.say("\n")
    for word_start, word_end in _word_places(text):
        weaver.turned(text[word_start:word_end][::-1], start + word_start)
        weaver.say(" ")
    weaver.say("\n")


def _turn_words(weaver: Weaver) -> None:
    """Write the words of the text from the last to the first."""
    for start, end in reversed(_word_places(weaver.source.text)):
        weaver.keep(start, end)
        weaver.say(" ")
    weaver.say("\n")


def _word_places(text: str) -> Sequence[Place]:
    places, at = [], 0
    for word in text.split():
        at = text.index(word, at)
        places.append((at, at + len(word)))
        at += len(word)
    return places


def _table(alphabet: str) -> dict[int, int]:
    plain = ALPHABETS[0]
    return str.maketrans(plain + plain.upper(), alphabet + alphabet.upper())
