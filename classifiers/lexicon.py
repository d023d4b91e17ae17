"""The lexicon of a target: rare names, titles and words that tell it from everything else.

Topic similarity finds paraphrases but cannot tell a forget author from a neighbouring one; names
can. One index holds the lexicons of all targets of a bundle: reading a text costs the same for one
target and for 10,000.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import threading
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from classifiers.fuzzy import DeletionIndex, SkeletonIndex, look_ups
from classifiers.sounds import SoundIndex, is_foreign
from classifiers.terms import DATE, PARTICLES, STOP_WORDS, Words, find_dates, split_words
from guard.errors import ArtifactError
from guard.types import BoolArray, FloatArray

FEATURES = 6
"""Numbers that `LexicalReading.features` gives per window."""

STRONG = 5.0
"""Weight (natural log-odds) from which a term alone points at the target."""

PART_WORTH = 4.9
"""Weight of a rare part of a full name at most: less than STRONG."""

FUZZY_FACTOR = 0.8
FUZZY_ALONE_LETTERS = 6
"""Letters that a misspelt word needs to count alone; a part of a longer name needs fewer."""

OTHER_NAME_FACTOR = 0.45
"""What is left of a surname's weight beside a stranger's given name, or of a common noun's."""

JOINED_LETTERS = 8
"""A name written as one word (`#harrypotter`) is known from this length on."""

MIDDLE_NAME_FACTOR = 0.9
"""What is left of a full name that holds one more name ("Ann Mary Example")."""

LEET = {"0": "o", "1": "il", "2": "z", "3": "e", "4": "a", "5": "s", "6": "gb", "7": "t", "8": "b"}
"""Letters that a digit stands for."""

MAX_LEET_LETTERS, MAX_LEET_WORDS = 24, 64

MAX_KNOWN_WORDS, LONGEST_KNOWN_WORD = 100_000, 64
"""Words of texts, and the letters of one, that are remembered with what they may be."""

MAX_OWNERS = 64
"""A term of more targets than this names none of them; it still counts beside another."""

BARE_LETTERS, BARE_LETTERS_OF_NAME = 6, 4
"""Consonants that a word, and a name of several, needs to be known without its vowels."""

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

Variant = tuple[str, float]
_QUOTES = tuple("\"'”’»“")
_BARE = re.compile("[b-df-hj-np-tv-z]+")


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Weighted terms of one target.

    Attributes:
        weights: Log-odds of each term.
        primary: Terms that name the target in full, and rare parts of such a name.
        others: Words that look like a misspelt name of the target but are something else.
        parts: Those primary terms that are parts of a full name.
        works: Titles of the target's works, each of two telling words at least.
        associates: Terms that name what is known beside the target: an employer, a film, a town.
    """

    weights: Mapping[Words, float]
    primary: frozenset[Words] = frozenset()
    others: frozenset[str] = frozenset()
    parts: frozenset[Words] = frozenset()
    works: frozenset[Words] = frozenset()
    associates: frozenset[Words] = frozenset()

    def to_json(self) -> bytes:
        """Serialise; personal data, so the caller encrypts it."""
        rows = [[list(term), round(weight, 4)] for term, weight in sorted(self.weights.items())]
        data = {
            "format": 2,
            "terms": rows,
            "primary": sorted(list(term) for term in self.primary),
            "parts": sorted(list(term) for term in self.parts),
            "others": sorted(self.others),
            "works": sorted(list(term) for term in self.works),
            "associates": sorted(list(term) for term in self.associates),
        }
        return json.dumps(data, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Lexicon:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: If it is not a lexicon.
        """
        try:
            found = json.loads(data)
            weights = {_read_term(term): _read_weight(weight) for term, weight in found["terms"]}
            primary = frozenset(_read_term(term) for term in found["primary"])
            parts = frozenset(_read_term(term) for term in found.get("parts", []))
            others = frozenset(_read_words(found["others"]))
            works = frozenset(_read_term(term) for term in found.get("works", []))
            beside = frozenset(_read_term(term) for term in found.get("associates", []))
            return cls(weights, primary, others, parts, works, beside)
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise ArtifactError(f"the target's lexicon cannot be read: {error!r}") from error


def _read_words(words: object) -> Words:
    if not (isinstance(words, list) and all(w and isinstance(w, str) for w in words)):
        raise ValueError(f"{words!r} is no list of words")
    return tuple(words)


def _read_term(words: object) -> Words:
    if not words:
        raise ValueError("a term has no words")
    return _read_words(words)


def _read_weight(weight: object) -> float:
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"{weight!r} is no weight")
    return float(weight)


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


@dataclass(slots=True)
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    term: Words = ()
    owners: dict[int, float] = field(default_factory=dict)
    primary: frozenset[int] = frozenset()
    parts: frozenset[int] = frozenset()
    works: frozenset[int] = frozenset()
    associates: frozenset[int] = frozenset()


class LexiconIndex:
    """Finds the terms of all targets in a text; safe to share between threads.

    Args:
        lexicons: The targets' lexicons; a target is known by its place among them.
        common: True for a folded word of general English, which is never taken for a typo.
        ranked: Words of general English, the most frequent first, to read texts without vowels.
    """

    def __init__(
        self,
        lexicons: Sequence[Lexicon],
        common: Callable[[str], bool],
        ranked: Sequence[str] = (),
    ) -> None:
        self._common = common
        self._root = _Node()
        self._words: set[str] = set()
        self._others: dict[str, set[int]] = {}
        self._mononyms = {
            number
            for number, lexicon in enumerate(lexicons)
            if lexicon.primary and all(len(t) == 1 for t in lexicon.primary - lexicon.parts)
        }
        for number, lexicon in enumerate(lexicons):
            self._add(number, lexicon)
        names = sorted(word for word in self._words if not word.startswith(DATE))
        self._near = DeletionIndex(names)
        self._bones = SkeletonIndex(names)
        self._restored = SkeletonIndex([*ranked, *names])
        self._sounds = SoundIndex(
            term for lexicon in lexicons for term in lexicon.primary - lexicon.parts
        )
        self._known: dict[str, tuple[Variant, ...]] = {}
        self._lock = threading.Lock()

    def _add(self, number: int, lexicon: Lexicon) -> None:
        for term, weight in lexicon.weights.items():
            named = term in lexicon.primary
            node = self._put(term, term, number, weight, named)
            if term in lexicon.parts:
                node.parts |= {number}
            if term in lexicon.works:
                node.works |= {number}
            if term in lexicon.associates:
                node.associates |= {number}
            self._words.update(term)
            joined = "".join(term)
            if len(term) > 1 and weight >= STRONG and len(joined) >= JOINED_LETTERS:
                self._put((joined,), term, number, weight, named)
                self._words.add(joined)
        for word in lexicon.others:
            self._others.setdefault(word, set()).add(number)

    def _put(self, path: Words, term: Words, number: int, weight: float, named: bool) -> _Node:
        node = self._root
        for word in path:
            node = node.children.setdefault(word, _Node())
        node.term = term
        node.owners[number] = max(weight, node.owners.get(number, 0.0))
        if named:
            node.primary |= {number}
        return node

    def read(self, text: str, prepared: PreparedText | None = None) -> LexicalReading:
        """Find every term in a text.

        Args:
            text: The text.
            prepared: The same text, prepared before, if it is read again and again.
        """
        ready = prepared or PreparedText(text)
        words, bare = ready.words, ready.bare
        variants = [self._variants(word, place in bare) for place, (word, _, _) in enumerate(words)]
        found = list(self._walk(text, words, variants))
        for date, start, end in ready.dates:
            node = self._root.children.get(date)
            if node is not None:
                found.append(_placed(node, start, end, 1.0))
        for heard in self._sounds.find(text):
            found.append(_placed(self._node(heard.name), heard.start, heard.end, FUZZY_FACTOR))
        return LexicalReading(text, ready, found, self._common, self._mononyms)

    def _node(self, term: Words) -> _Node:
        node = self._root
        for word in term:
            node = node.children[word]
        return node

    def strange(self, prepared: PreparedText, most: int) -> bool:
        """Say whether a text takes long: many words never met before, or letters of another script.

        Args:
            prepared: The text.
            most: Look-ups that words never met before may take, each a microsecond at most.
        """
        if is_foreign(prepared.text):
            return True
        known, met = self._words, self._known
        new = {word for word, _, _ in prepared.words if word not in met and word not in known}
        takes = [look_ups(word) for word in new if word.isalpha() and not self._common(word)]
        return sum(takes) + len(new) > most

    def restore_vowels(self, text: str) -> str | None:
        """Return the text with its vowels guessed where a run of words has none; else None."""
        words = split_words(text)
        bare = _bare_words(words)
        if not bare:
            return None
        out, at = [], 0
        for place in sorted(bare):
            word, start, end = words[place]
            known = self._restored.words(word)
            if known:
                out += [text[at:start], known[0]]
                at = end
        return "".join([*out, text[at:]])

    def _walk(
        self,
        text: str,
        words: Sequence[tuple[str, int, int]],
        variants: Sequence[tuple[Variant, ...]],
    ) -> Iterable[Match]:
        best: dict[tuple[int, int, Words], Match] = {}
        beginnings = self._root.children
        for first, options in enumerate(variants):
            if options[0][0] not in beginnings and (
                len(options) == 1 or not any(word in beginnings for word, _ in options)
            ):
                continue
            stack = [(self._root, first, 1.0)]
            while stack:
                node, at, factor = stack.pop()
                inside = at == first + 1 < len(words) - 1
                if inside and factor == 1.0 and _may_be_middle_name(text, words, at):
                    stack += self._past_middle_name(node, words, variants, at)
                if node.owners:
                    match = self._match(node, words, first, at, factor)
                    key = (first, at, node.term)
                    if match is not None and (key not in best or best[key].factor < factor):
                        best[key] = match
                if at < len(words):
                    for word, share in variants[at]:
                        child = node.children.get(word)
                        if child is not None:
                            stack.append((child, at + 1, min(factor, share)))
        return best.values()

    def _past_middle_name(
        self,
        node: _Node,
        words: Sequence[tuple[str, int, int]],
        variants: Sequence[tuple[Variant, ...]],
        at: int,
    ) -> Iterable[tuple[_Node, int, float]]:
        """Step over a middle name or initial between the parts of a full name."""
        if words[at][0] in node.children:
            return
        for word, share in variants[at + 1]:
            child = node.children.get(word)
            if share == 1.0 and child is not None and child.primary:
                yield child, at + 2, MIDDLE_NAME_FACTOR

    def _match(
        self,
        node: _Node,
        words: Sequence[tuple[str, int, int]],
        first: int,
        last: int,
        factor: float,
    ) -> Match | None:
        owners: Mapping[int, float] = node.owners
        if factor < 1.0:
            if len(node.term) == 1 and len(node.term[0]) < FUZZY_ALONE_LETTERS:
                return None
            written = [words[at][0] for at in range(first, last)]
            bare = [word for word in written if _BARE.fullmatch(word)]
            needed = BARE_LETTERS if len(written) == 1 else BARE_LETTERS_OF_NAME
            if len(bare) == len(written) and sum(map(len, bare)) < needed:
                return None  # "hs" is many a word
            strangers = set().union(
                *(self._others.get(words[at][0], set()) for at in range(first, last))
            )
            if strangers:
                owners = {n: weight for n, weight in owners.items() if n not in strangers}
        start, end = words[first][1], words[last - 1][2]
        named = node.primary, node.parts, node.works, node.associates
        return Match(start, end, first, last, node.term, owners, *named, factor)

    def _variants(self, word: str, bare: bool) -> tuple[Variant, ...]:
        """Return the known words that a word of a text may be, with what each is worth."""
        if bare:
            known = self._bones.words(word)
            return ((word, 1.0), *((name, FUZZY_FACTOR) for name in known))
        found = self._known.get(word)
        if found is None:
            exact = word in self._words or (len(word) < 4 and word.isalpha())
            found = ((word, 1.0),) if exact else self._mend(word)
            if len(word) > LONGEST_KNOWN_WORD:
                return found
            with self._lock:
                if len(self._known) > MAX_KNOWN_WORDS:
                    self._known.clear()
                self._known[word] = found
        return found

    def _unleet(self, word: str) -> tuple[Variant, ...]:
        """Return the known words that digits in a word may stand for: `w31` is Wei."""
        choices = [LEET.get(letter, letter) for letter in word[:MAX_LEET_LETTERS]]
        if math.prod(map(len, choices)) > MAX_LEET_WORDS or word.isdigit():
            return ()
        guesses = ("".join(letters) for letters in itertools.product(*choices))
        return tuple((guess, FUZZY_FACTOR) for guess in guesses if guess in self._words)

    def _mend(self, word: str) -> tuple[Variant, ...]:
        if word.endswith("s") and word[:-1] in self._words:
            return ((word[:-1], 1.0),)
        if not word.isalpha():
            return self._unleet(word) or ((word, 1.0),)
        if self._common(word):
            return ((word, 1.0),)
        return tuple((near.word, FUZZY_FACTOR) for near in self._near.near(word)) or ((word, 1.0),)


def _placed(node: _Node, start: int, end: int, factor: float) -> Match:
    """Return the match of what is no row of words: a date, or a name in another script."""
    named = node.primary, node.parts, node.works, node.associates
    return Match(start, end, -1, -1, node.term, node.owners, *named, factor)


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
        self.bare = _bare_words(self.words)
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
    """Say which matches name what is known beside the target, or lie within such a name."""
    names = [(match.start, match.end) for match in matches if target in match.associates]
    return [
        any(start <= match.start and match.end <= end for start, end in names) for match in matches
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


def _may_be_middle_name(text: str, words: Sequence[tuple[str, int, int]], at: int) -> bool:
    """True for a word between two others that may be one name with them: "Ann Mary Example"."""
    (_, before, end), (word, start, stop) = words[at - 1], words[at]
    # Beside a word with a capital a small one is none ("Ann met Example"); small text may be.
    small = text[before].isupper() and text[start].islower() and word not in PARTICLES
    if small or (len(word) > 1 and word in STOP_WORDS):
        return False
    after = text[stop : words[at + 1][1]].removeprefix("." if len(word) == 1 else "")
    return not text[end:start].strip(" -\n") and not after.strip(" -\n")


def _begins_sentence(text: str, start: int) -> bool:
    before = text[max(0, start - 8) : start].rstrip(" \"'“‘(¿¡*#-")
    return (not before and start <= 8) or before[-1:] in (".", "!", "?", ":", "\n", "")


def _bare_words(words: Sequence[tuple[str, int, int]]) -> set[int]:
    """Return the places of words in runs that have lost their vowels."""
    bare = [_BARE.fullmatch(word) is not None for word, _, _ in words]
    found: set[int] = set()
    if sum(bare) < BARE_SHARE * BARE_RUN:
        return found
    for first in range(len(words) - BARE_RUN + 1):
        run = [at for at in range(first, first + BARE_RUN) if bare[at]]
        letters = sum(len(words[at][0]) for at in run)
        if len(run) >= BARE_SHARE * BARE_RUN and letters >= 2 * BARE_RUN:
            found.update(run)
    return found
