"""Which characters of a flagged text carry the forgotten entity (ECO's token classifier).

ECO marks person names with a downloaded NER model; here the target's own lexicon marks them, on
the same normalised text, and where names aren't all `classifiers.span_head` marks what tells of it.
Where nothing is found the caller corrupts all tokens but the last, as ECO does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from classifiers.lexical_reading import FUZZY_FACTOR, LexicalReading
from classifiers.lexicon import STRONG

Place = tuple[int, int]
EntityFinder = Callable[[str], list[Place]]
"""Returns the characters of a text that name somebody or something."""

GAP = 3
"""Characters between two marked words that are marked with them: a space, a hyphen, an initial."""


def merge_places(places: Iterable[Place], gap: int = 0) -> list[Place]:
    """Return sorted, disjoint places; those at most `gap` characters apart become one."""
    merged: list[Place] = []
    for start, end in sorted(places):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        elif end > start:
            merged.append((start, end))
    return merged


def entity_places(reading: LexicalReading, target: int) -> list[Place]:
    """Return the places of a target's names and titles in a text.

    Weak terms (a nationality, a common first name) count only right beside a strong one.
    """
    matches = reading.of(target)
    strong = [(m.start, m.end) for m, weight in matches if weight >= STRONG * FUZZY_FACTOR]
    every = merge_places(((match.start, match.end) for match, _ in matches), GAP)
    return [place for place in every if any(place[0] <= a and b <= place[1] for a, b in strong)]


def blank_places(text: str, places: Iterable[Place]) -> str:
    """Return the text with the places replaced by a neutral word of the same role."""
    out, at = [], 0
    for start, end in places:
        out.append(text[at:start])
        out.append("it")
        at = end
    return "".join([*out, text[at:]])
