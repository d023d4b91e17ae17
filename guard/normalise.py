"""Normalise text for detection only; what is forwarded is never normalised (DESIGN section 3).

Undone: compatibility forms (NFKC), invisible and control characters, and letters of another
script that stand in for Latin ones inside an otherwise Latin word. Every result keeps a map back,
so that a span found in it can be named in the original text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

# Cyrillic and Greek letters that are drawn like a Latin one (Unicode TR39 calls them confusable).
_LOOKALIKES = str.maketrans(
    "аеорсухіјѕԁһԛԝӏАВЕКМНОРСТУХІЈЅԌԚԜҮαιονρυκηΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",
    "aeopcyxijsdhqwlABEKMHOPCTYXIJSGQWYaiovpuknABEZHIKMNOPTYX",
)
_WORD = re.compile(r"\w+")
_LATIN = re.compile(r"[A-Za-z]")
_OTHER_SCRIPT = re.compile(r"[Ͱ-ϿЀ-ԯ]")
_KEPT_CONTROLS = frozenset("\t\n\r")


@dataclass(frozen=True, slots=True)
class Normalised:
    """A normalised text and the way back.

    Attributes:
        text: The normalised text.
        origins: For each character of `text`, start and end of its source in the original, in code
            points; None where every character stands for itself.
    """

    text: str
    origins: tuple[tuple[int, int], ...] | None = None

    def to_original(self, start: int, end: int) -> tuple[int, int]:
        """Return the original's characters that a non-empty span of `text` came from."""
        if self.origins is None or start >= end:
            return start, end
        return self.origins[start][0], self.origins[end - 1][1]


def normalise(text: str) -> Normalised:
    """Normalise `text`; ordinary text comes back as it is, without a map."""
    if _is_plain(text):
        return Normalised(text)
    pieces: list[str] = []
    origins: list[tuple[int, int]] = []
    for start, end in _clusters(text):
        piece = "".join(
            char
            for char in unicodedata.normalize("NFKC", text[start:end])
            if not _is_invisible(char)
        )
        pieces.append(piece)
        origins.extend([(start, end)] * len(piece))
    return Normalised(_fold_lookalikes("".join(pieces)), tuple(origins))


def _is_plain(text: str) -> bool:
    if text.isascii():
        return text.isprintable() or not any(_is_invisible(char) for char in set(text))
    return (
        unicodedata.is_normalized("NFKC", text)
        and not any(_is_invisible(char) for char in set(text))
        and _OTHER_SCRIPT.search(text) is None
    )


def _is_invisible(char: str) -> bool:
    """True for format and control characters that no reader sees, and for variation selectors."""
    if char in _KEPT_CONTROLS:
        return False
    return unicodedata.category(char) in ("Cc", "Cf") or char in "\u034f\u115f\u1160\u3164\uffa0"


def _clusters(text: str) -> list[tuple[int, int]]:
    """Split into a character and the combining marks after it: what NFKC may compose."""
    bounds = [
        index for index, char in enumerate(text) if index == 0 or not unicodedata.combining(char)
    ]
    return list(zip(bounds, [*bounds[1:], len(text)], strict=True))


def _fold_lookalikes(text: str) -> str:
    """Write words of mixed scripts in Latin; words of one script are left alone."""
    return _WORD.sub(
        lambda match: (
            match[0].translate(_LOOKALIKES)
            if _LATIN.search(match[0]) and _OTHER_SCRIPT.search(match[0])
            else match[0]
        ),
        text,
    )
