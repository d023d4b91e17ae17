"""Other spellings of a text: leetspeak, spaced-out letters, drawn-out letters.

Each is a guess, so the text as it stands is always read too ("B2B", "H2O" and years are words of
their own). Patterns look for a telling sign first: ordinary prompts cost microseconds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from guard.letters import englishness
from guard.traced import Altered, Place, Traced, merged, places_in, substituted

LETTERS_IN_A_ROW: Final = 4
"""Single letters that make a spaced-out word."""

UNLIKE_ENGLISH: Final = -1.0
"""Nats per pair of letters below which a guess at letters is dropped: `a, b, c, d` is no word."""

_LEET: Final = str.maketrans("0134567895@$!|+€£", "oieasgtbgsasiltel")
_LEET_L: Final = str.maketrans("1!", "ll")
_LEET_CHARS: Final = r"\w@$!|+€£"
_LEET_STRONG: Final = re.compile(r"[A-Za-z][013-9@$!|+€£]+[A-Za-z]|(?<!\w)[013-57-9@$€][A-Za-z]{3}")
_LEET_TOKEN: Final = re.compile(rf"(?<![{_LEET_CHARS}])[{_LEET_CHARS}]+")
_LEET_DIGIT: Final = re.compile(r"[013-9@$!€£]")
_LEET_SHORT: Final = frozenset(("a", "i", "is", "it", "at", "to", "as"))
_FLUENT: Final = 3
"""Leetspeak words from which a text is taken to be written so throughout."""
_L_GAIN: Final = 0.6
"""Nats per pair of letters that reading 1 as l must gain over reading it as i."""
_DRAWN_OUT: Final = re.compile(r"([A-Za-z])\1{3,}")
_SPACED: Final = re.compile(
    r"(?<![^\W_])[A-Za-z0-9@$!](?:(?:[ \t.\-_/,|*+~·'\"]{1,5}|\r?\n)"
    r"[A-Za-z0-9@$!?'](?![^\W_])){3,}"
)
_CAMEL: Final = re.compile(r"(?<=[a-z])(?=[A-Z])")


def respell(source: Traced) -> tuple[Altered, bool] | None:
    """Join spaced-out letters, shorten drawn-out ones and read leetspeak; None if there is none.

    Returns:
        The text and whether letters were joined.
    """
    text, stretches = source, list[Place]()
    joined = [edit for match in _SPACED.finditer(text.text) for edit in _join(match)]
    if joined:
        stretches += [(start, end) for start, end, _ in joined]
        text = substituted(text, joined)
    for edits in (_shorten, _read_leet):
        found = list(edits(text.text))
        if found:
            for start, end, _ in found:
                stretches += places_in(source, text, start, end)
            text = substituted(text, found)
    if not stretches:
        return None
    return Altered(text, tuple(merged(stretches))), bool(joined)


def _join(match: re.Match[str]) -> Iterator[tuple[int, int, str]]:
    """Join the letters of a spaced-out run; wider gaps are the ends of words."""
    letters = re.findall(r"[A-Za-z0-9@$!?]", match[0])
    gaps = re.findall(r"(?<=[A-Za-z0-9@$!?])[^A-Za-z0-9@$!?]+(?=[A-Za-z0-9@$!?])", match[0])
    if sum(letter.isalpha() for letter in letters) < max(LETTERS_IN_A_ROW, 0.6 * len(letters)):
        return
    usual = max(set(gaps), key=gaps.count)
    wide = any(_is_wider(gap, usual) for gap in gaps)
    text = letters[0]
    for gap, letter in zip(gaps, letters[1:], strict=False):
        text += (" " if _is_wider(gap, usual) else "") + letter
    if not wide:
        text = _CAMEL.sub(" ", text)
    if englishness(text) > UNLIKE_ENGLISH:
        yield match.start(), match.end(), text


def _is_wider(gap: str, usual: str) -> bool:
    return len(gap) > len(usual) or (gap.isspace() and not usual.isspace())


def _shorten(text: str) -> Iterator[tuple[int, int, str]]:
    """Write a letter that is drawn out over four or more twice."""
    for match in _DRAWN_OUT.finditer(text):
        yield match.start(), match.end(), match[1] * 2


def _read_leet(text: str) -> Iterator[tuple[int, int, str]]:
    """Read digits and symbols inside words as letters, if some word asks for it."""
    if _LEET_DIGIT.search(text) is None or _LEET_STRONG.search(text) is None:
        return
    tokens = [match for match in _LEET_TOKEN.finditer(text) if _LEET_DIGIT.search(match[0])]
    strong = sum(_LEET_STRONG.search(token[0]) is not None for token in tokens)
    found = [(token, _leet_word(token[0], strong >= _FLUENT)) for token in tokens]
    if any(read and _LEET_STRONG.search(token[0]) for token, read in found):
        for token, read in found:
            if read:
                yield token.start(), token.start() + len(read), read


def _leet_word(token: str, fluent: bool) -> str | None:
    """Read one word, or say that it is none; among much leetspeak less is asked of it."""
    word = token.rstrip("!|+$")
    if re.match(r"\w{2,}@\w{2,}", word):
        return None
    read = word.translate(_LEET)
    if word.isdigit():
        return read if fluent and read in _LEET_SHORT else None
    if not fluent and not _LEET_STRONG.search(word):
        likely = len(word) >= 3 and word[:-1].isalpha()
        return read if likely and read.isalpha() else None
    other = word.translate(_LEET_L).translate(_LEET)
    if englishness(other) > englishness(read) + _L_GAIN:
        read = other
    least = UNLIKE_ENGLISH if fluent else UNLIKE_ENGLISH / 2
    return read if read.isalpha() and englishness(read) > least else None
