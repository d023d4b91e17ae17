"""What the lexicons say of one text: which targets its terms point at, and how heavily.

A term found is not yet a name: a surname beside a stranger's given name, a common noun in small
letters and the end of somebody else's longer name count less.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np

from classifiers.lexicon import STRONG
from classifiers.terms import STOP_WORDS, Words, find_dates, split_words
from guard.types import BoolArray, FloatArray

FEATURES = 6
"""Numbers that `LexicalReading.features` gives per window."""

PART_WORTH = 4.9
"""Weight of a rare part of a full name at most: less than STRONG."""

FUZZY_FACTOR = 0.8

OTHER_NAME_FACTOR = 0.45
"""What is left of a surname's weight beside a stranger's given name, or of a common noun's."""

MAX_OWNERS = 64
"""A term of more targets than this names none of them; it still counts beside another."""

BARE_RUN, BARE_SHARE = 5, 0.75
"""Words in a row, and the share of them without vowels, that make a text without vowels."""

HONORIFICS = frozenset(
    """
    mr mrs miss dr prof professor sir dame lord lady saint king queen prince princess president
    author writer novelist poet actor actress singer senator judge captain general doctor uncle aunt
    señor señora don doña herr frau monsieur madame mister
    """.split()
)
"""Capitalised words before a name that are no part of it."""

MIN_SMALL_TITLE = 3
"""Words of a title that is known as such in a text without capitals."""

_QUOTES = tuple("\"'”’»“")
BARE = re.compile("[b-df-hj-np-tv-z]+")
"""A word that has lost its vowels."""


@dataclass(frozen=True, slots=True)
class Match:
    """A term found in a text.

    Attributes:
        start: First code point.
        end: Code point behind the last.
        first: Number of its first word; -1 for a date, and for a name in another script.
        last: Number behind its last word.
        term: The term.
        owners: Weight of the term for each target that has it, by number.
        primary: Targets that it names in full.
        parts: Targets of whose full name it is a rare part.
        works: Targets of whose works it is the title.
        associates: Targets beside which it is known.
        factor: 1 for an exact match, less for a misspelt or transliterated one.
    """

    start: int
    end: int
    first: int
    last: int
    term: Words
    owners: Mapping[int, float]
    primary: frozenset[int]
    parts: frozenset[int]
    works: frozenset[int]
    associates: frozenset[int]
    factor: float


class PreparedText:
    """What of a text's reading does not depend on any target.

    Attributes:
        text: The text.
        words: Its folded words with their code points.
        bare: Places of words that have lost their vowels.
        dates: Its dates.
    """

    __slots__ = ("_names", "bare", "dates", "text", "words")

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = split_words(text)
        self.bare = bare_words(self.words)
        self.dates = find_dates(text)
        self._names: list[tuple[int, int]] | None = None

    def names(self, common: Callable[[str], bool]) -> list[tuple[int, int]]:
        """Return (number, place) of the words that name somebody or something."""
        if self._names is None:
            self._names = _name_words(self.text, self.words, common)
        return self._names


@dataclass(slots=True)
class Pointer:
    """How heavily terms point at a target: heaviest part, full name, all, and strong ones."""

    single: float = 0.0
    full: float = 0.0
    total: float = 0.0
    strong: int = 0

    def add(self, worth: float, full: float) -> None:
        """Count one more match, that names the target in full as heavily as `full`."""
        if full:
            self.full = max(self.full, full)
        else:
            self.single = max(self.single, worth)
        self.total += worth
        self.strong += worth >= STRONG * FUZZY_FACTOR


class LexicalReading:
    """What the lexicons say of one text.

    Args:
        text: The text.
        prepared: Its words, and what of them does not depend on any target.
        matches: The terms in it.
        common: True for a folded word of general English.
        mononyms: Targets whose full name is a single word.
    """

    def __init__(
        self,
        text: str,
        prepared: PreparedText,
        matches: Sequence[Match],
        common: Callable[[str], bool],
        mononyms: Collection[int],
    ) -> None:
        self.text, self.words, self._common = text, prepared.words, common
        self.prepared = prepared
        self._mononyms = mononyms
        self.matches = sorted(matches, key=lambda match: (match.start, -match.end))

    def candidates(self) -> dict[int, Pointer]:
        """Return the targets that terms point at, and how heavily at most."""
        found: dict[int, Pointer] = {}
        for match in self.matches:
            if len(match.owners) > MAX_OWNERS:
                continue
            for number, weight in match.owners.items():
                known = found.get(number)
                if known is None:
                    known = found[number] = Pointer()
                worth = weight * match.factor
                known.add(worth, self._full(match, number, worth))
        for match in self.matches:
            if len(match.owners) > MAX_OWNERS:
                for number in found.keys() & match.owners.keys():
                    worth = match.owners[number] * match.factor
                    found[number].add(worth, self._full(match, number, worth))
        return found

    def _full(self, match: Match, target: int, worth: float) -> float:
        """Return how heavily a match names a target in full; 0 if it doesn't.

        A rare part of a name ("Mammadov") does, and so does the title of a work, but never as a
        full name would: others bear it.
        """
        if target in match.primary:
            return min(worth, PART_WORTH) if target in match.parts else worth
        if target in match.works and match.factor == 1.0 and self._is_title(match):
            return min(worth, PART_WORTH)
        return 0.0

    def _is_title(self, match: Match) -> bool:
        """True if words are written as a title: in quotation marks, or in capitals of their own."""
        if self.text[match.end : match.end + 2].strip(" ,.?!")[:1] in _QUOTES:
            return True
        words = [self.words[at] for at in range(match.first, match.last)]
        if self.text.islower():
            return len(words) >= MIN_SMALL_TITLE
        telling = [start for word, start, _ in words if word not in STOP_WORDS]
        if any(self.text[start].islower() for start in telling) or self._is_shouting:
            return False
        around = [*self.words[: match.first], *self.words[match.last :]]
        return not _in_capitals(self.text, around)

    def of(
        self, target: int, weights: Mapping[Words, float] | None = None
    ) -> list[tuple[Match, float]]:
        """Return the matches of one target with their weights, or with other `weights`."""
        mine = [match for match in self.matches if target in match.owners]
        covered = {at for match in mine for at in range(match.first, match.last)}
        found = []
        for match in mine:
            weight = match.owners[target] if weights is None else weights.get(match.term, 0.0)
            found.append((match, weight * self._share(match, target, covered)))
        return found

    def features(
        self,
        target: int,
        windows: Sequence[tuple[int, int]],
        weights: Mapping[Words, float] | None = None,
    ) -> FloatArray:
        """Return what the lexicon of one target says of each window, shape (windows, FEATURES).

        Columns: heaviest part of a name, title or other term; heaviest term that names the target
        in full; log of the summed weights of the distinct terms; number of distinct strong terms
        (3 at most); 1 where the window names something else and not the target in full; 1 where all
        that points at the target is known beside it.
        """
        out = np.zeros((len(windows), FEATURES), np.float32)
        mine = self.of(target, weights)
        covered = {at for match, _ in mine for at in range(match.first, match.last)}
        foreign = [place for at, place in self.prepared.names(self._common) if at not in covered]
        beside = _beside([match for match, _ in mine], target)
        for row, (start, end) in enumerate(windows):
            best: dict[Words, float] = {}
            full = single = 0.0
            known = True
            for place, (match, worth) in enumerate(mine):
                if match.start >= start and match.end <= end:
                    best[match.term] = max(worth, best.get(match.term, 0.0))
                    full = max(full, self._full(match, target, worth))
                    known = known and beside[place]
                    if target not in match.primary:
                        single = max(single, worth)
            if best:
                strong = sum(worth >= STRONG * FUZZY_FACTOR for worth in best.values())
                out[row, :4] = single, full, math.log1p(sum(best.values())), min(3, strong)
            near = bisect_left(foreign, start)
            out[row, 5] = known and bool(best)
            out[row, 4] = not full and near < len(foreign) and foreign[near] < end
        return out

    def _share(self, match: Match, target: int, covered: set[int]) -> float:
        """Return what is left of a term's weight: less if misspelt, or likely somebody else's."""
        if match.first < 0:
            return match.factor
        if len(match.term) > 1:
            stranger = self._is_longer_name(match, covered)
            return match.factor * (OTHER_NAME_FACTOR if stranger else 1.0)
        stranger = self._is_someone_else(match.first, covered)
        if target in match.primary and target in self._mononyms:
            return match.factor
        if stranger or (self._is_common_noun(match.first) and target not in match.primary):
            return match.factor * OTHER_NAME_FACTOR
        return match.factor

    def _is_someone_else(self, place: int, covered: set[int]) -> bool:
        """True if a single word stands inside a longer name of which the target knows no more."""
        if self._is_shouting:
            return False
        for other in (place - 1, place + 1):
            if not 0 <= other < len(self.words) or other in covered:
                continue
            word, start, end = self.words[other]
            gap = (
                self.text[end : self.words[place][1]]
                if other < place
                else self.text[self.words[place][2] : start]
            )
            if gap not in (" ", "-") or not self.text[start].isupper() or len(word) < 3:
                continue
            if not _begins_sentence(self.text, start) and word not in STOP_WORDS:
                return True
        return False

    def _is_longer_name(self, match: Match, covered: set[int]) -> bool:
        """True if a name is the end of a longer one that begins with somebody else's."""
        if self._is_title_case or self.text[match.start : match.end].isupper():
            return False
        before = match.first - 1
        if before < 0 or before in covered or self.words[match.first][0] in STOP_WORDS:
            return False
        word, start, end = self.words[before]
        return (
            self.text[end : match.start] == " "
            and self.text[start].isupper()
            and not self.text[start:end].isupper()
            and len(word) > 2
            and word not in STOP_WORDS
            and word not in HONORIFICS
            and not _begins_sentence(self.text, start)
        )

    @cached_property
    def _is_shouting(self) -> bool:
        """True for a text in capitals: they say nothing in it."""
        return self.text.isupper()

    @cached_property
    def _is_title_case(self) -> bool:
        """True for a headline: capitals say nothing in it."""
        return _in_capitals(self.text, self.words, without=True)

    def _is_common_noun(self, place: int) -> bool:
        """True for a word of general English in small letters, in a text that uses capitals."""
        word, start, _ = self.words[place]
        return self.text[start].islower() and self._common(word) and not self.text.islower()


def _beside(matches: Sequence[Match], target: int) -> list[bool]:
    """Say which matches name what is known beside the target, or lie within such a name.

    Args:
        matches: Of the target, by where they start.
        target: Its number.
    """
    names = [match for match in matches if target in match.associates]
    starts = [match.start for match in names]
    ends = list(accumulate((match.end for match in names), max))
    # A name that starts no later holds the match if the furthest end of those is no earlier.
    places = (bisect_right(starts, match.start) - 1 for match in matches)
    return [
        place >= 0 and match.end <= ends[place]
        for place, match in zip(places, matches, strict=True)
    ]


def _in_capitals(text: str, words: Sequence[tuple[str, int, int]], without: bool = False) -> bool:
    """True if most long words begin with a capital, as in a headline; `without` any, as told."""
    long = [text[start] for word, start, _ in words if len(word) > 3]
    return sum(letter.isupper() for letter in long) >= 0.7 * len(long) if long else without


def names_anything(
    text: str, windows: Sequence[tuple[int, int]], common: Callable[[str], bool]
) -> BoolArray:
    """Say which windows of a text name somebody or something, shape (windows,)."""
    places = [place for _, place in _name_words(text, split_words(text), common)]
    return np.array([any(start <= at < end for at in places) for start, end in windows], np.bool_)


def _name_words(
    text: str, words: Sequence[tuple[str, int, int]], common: Callable[[str], bool]
) -> list[tuple[int, int]]:
    """Return (number, place) of the words that name somebody or something."""
    shouting = text.isupper()
    found = []
    for at, (word, start, _) in enumerate(words):
        if len(word) < 3 or word in STOP_WORDS or not text[start].isalpha():
            continue
        capital = text[start].isupper() and not shouting and not _begins_sentence(text, start)
        if capital or not common(word):
            found.append((at, start))
    return found


def _begins_sentence(text: str, start: int) -> bool:
    before = text[max(0, start - 8) : start].rstrip(" \"'“‘(¿¡*#-")
    return (not before and start <= 8) or before[-1:] in (".", "!", "?", ":", "\n", "")


def bare_words(words: Sequence[tuple[str, int, int]]) -> set[int]:
    """Return the places of words in runs that have lost their vowels."""
    bare = [BARE.fullmatch(word) is not None for word, _, _ in words]
    found: set[int] = set()
    if sum(bare) < BARE_SHARE * BARE_RUN:
        return found
    for first in range(len(words) - BARE_RUN + 1):
        run = [at for at in range(first, first + BARE_RUN) if bare[at]]
        letters = sum(len(words[at][0]) for at in run)
        if len(run) >= BARE_SHARE * BARE_RUN and letters >= 2 * BARE_RUN:
            found.update(run)
    return found
