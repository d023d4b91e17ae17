"""The lexicon of a target: rare names, titles and words that tell it from everything else.

Topic similarity finds paraphrases but cannot tell a forget author from a neighbouring one; names
can. Terms are taken from the forget rows by contrast: log-odds of the share of forget rows that
hold a term against the share of background texts (benign and retain), where the tokenizer's
frequency-ordered vocabulary stands in for a list of general English.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from guard.errors import ArtifactError
from guard.types import FloatArray

Words = tuple[str, ...]

FEATURES = 4
"""Numbers that `Lexicon.features` gives per window."""

MAX_WEIGHT = 10.0
STRONG = 5.0
"""Weight (natural log-odds) from which a term alone points at the target."""

FUZZY_LETTERS = 5
FUZZY_CUTOFF = 80.0
FUZZY_FACTOR = 0.8
MAX_TERM_WORDS = 6

_WORD = re.compile(r"[^\W_]+")
_NAME = re.compile(
    r"(?:[A-Z][\w'’]*|[A-Z]\.)"
    r"(?:(?:[ .\-]+|\s(?:of|the|and|de|la|al|von|van|in|to|for|by|a|from|with)\s(?:the\s|a\s)?)"
    r"(?:[A-Z][\w'’]*|[A-Z]\.|\d{1,2}))+"
)
_QUOTED = re.compile(r"[\"“«]([^\"”»\n]{3,60})[\"”»]")
_STOP = frozenset(
    """
    a an and any are as at be but by can could did do does for from had has have he her him his
    how i if in into is it its list may me more my name no not of on one or our out she so some
    such tell than that the their them there these they this to us was we were what when where
    which while who whom whose why will with would you your yes give describe explain
    """.split()
)


@dataclass(frozen=True, slots=True)
class Match:
    """A term found in a text.

    Attributes:
        start: First code point.
        end: Code point behind the last.
        term: The lexicon's term.
        weight: Log-odds of the term, less for a fuzzy match.
    """

    start: int
    end: int
    term: Words
    weight: float


def split_words(text: str) -> list[tuple[str, int, int]]:
    """Return the case-folded words of a text with their code points; possessives are cut off."""
    return [
        (match.group().casefold(), match.start(), match.end()) for match in _WORD.finditer(text)
    ]


def term_candidates(text: str) -> set[Words]:
    """Return the words, names and quoted titles of one text that may become terms."""
    found: set[Words] = {(word,) for word, _, _ in split_words(text)}
    for match in (*_NAME.finditer(text), *_QUOTED.finditer(text)):
        words = tuple(word for word, _, _ in split_words(match.group(match.lastindex or 0)))
        found.update(_parts(words))
    return found


def _parts(words: Words) -> Iterable[Words]:
    for size in range(2, min(len(words), MAX_TERM_WORDS) + 1):
        for first in range(len(words) - size + 1):
            part = words[first : first + size]
            if part[0] not in _STOP and part[-1] not in _STOP:
                yield part


@dataclass(slots=True)
class TermCounts:
    """In how many texts each term occurs; counts of folds add and subtract."""

    texts: int = 0
    terms: Counter[Words] = field(default_factory=Counter)

    def __sub__(self, other: TermCounts) -> TermCounts:
        terms = Counter(self.terms)
        terms.subtract(other.terms)
        return TermCounts(self.texts - other.texts, terms)


def count_terms(candidates: Iterable[set[Words]]) -> TermCounts:
    """Count texts per term; each item is the candidate set of one text."""
    counts = TermCounts()
    for terms in candidates:
        counts.texts += 1
        counts.terms.update(terms)
    return counts


def count_known(texts: Iterable[str], terms: Iterable[Words]) -> list[set[Words]]:
    """Return for each text which of `terms` occur in it, in whatever case."""
    index = _index(terms)
    return [{index_match[2] for index_match in _exact(split_words(text), index)} for text in texts]


class Lexicon:
    """Weighted terms of one target and a matcher for them; safe to share between threads.

    Args:
        weights: Log-odds of each term.
        common: True for a case-folded word of general English, which is never taken for a typo.
    """

    def __init__(self, weights: Mapping[Words, float], common: Callable[[str], bool]) -> None:
        self.weights = dict(weights)
        self._common = common
        self._index = _index(self.weights)
        self._names = sorted(
            {
                word
                for term in self.weights
                for word in term
                if len(word) >= FUZZY_LETTERS and (len(term) == 1 or not common(word))
            }
        )
        self._known = {word for term in self.weights for word in term}
        self._fuzzy: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def matches(self, text: str) -> list[Match]:
        """Return every term in a text, longest first at a place, sorted by place."""
        words = split_words(text)
        mended = [(self._mend(word), start, end) for word, start, end in words]
        found = []
        for first, last, term in _exact(mended, self._index):
            exact = all(mended[n][0] == words[n][0] for n in range(first, last))
            weight = self.weights[term] * (1.0 if exact else FUZZY_FACTOR)
            found.append(Match(words[first][1], words[last - 1][2], term, weight))
        return found

    def features(self, text: str, windows: Sequence[tuple[int, int]]) -> FloatArray:
        """Return what the lexicon says of each window, shape (windows, FEATURES).

        Columns: heaviest word, heaviest name of several words, log of the summed weights of the
        distinct terms, number of distinct strong terms (3 at most).
        """
        out = np.zeros((len(windows), FEATURES), np.float32)
        matches = self.matches(text) if self.weights else []
        for row, (start, end) in enumerate(windows if matches else ()):
            best: dict[Words, float] = {}
            for match in matches:
                if match.start >= start and match.end <= end:
                    best[match.term] = max(match.weight, best.get(match.term, 0.0))
            if best:
                out[row, 0] = max((w for t, w in best.items() if len(t) == 1), default=0.0)
                out[row, 1] = max((w for t, w in best.items() if len(t) > 1), default=0.0)
                out[row, 2] = math.log1p(sum(best.values()))
                out[row, 3] = min(3, sum(w >= STRONG * FUZZY_FACTOR for w in best.values()))
        return out

    def to_json(self) -> bytes:
        """Serialise; personal data, so the caller encrypts it."""
        rows = [[" ".join(term), round(weight, 4)] for term, weight in sorted(self.weights.items())]
        return json.dumps({"format": 1, "terms": rows}, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, common: Callable[[str], bool]) -> Lexicon:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: If it is not a lexicon.
        """
        try:
            rows = json.loads(data)["terms"]
            return cls({tuple(term.split(" ")): float(weight) for term, weight in rows}, common)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the target's lexicon cannot be read: {error!r}") from error

    def _mend(self, word: str) -> str:
        """Map a misspelt, plural or possessive name to the lexicon's spelling."""
        if word in self._known or len(word) < FUZZY_LETTERS or self._common(word):
            return word
        with self._lock:
            if word in self._fuzzy:
                return self._fuzzy[word] or word
        near = self._nearest(word)
        with self._lock:
            if len(self._fuzzy) > 100_000:
                self._fuzzy.clear()
            self._fuzzy[word] = near
        return near or word

    def _nearest(self, word: str) -> str | None:
        if word.endswith("s") and word[:-1] in self._known:
            return word[:-1]
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        near = process.extractOne(
            word,
            self._names,
            scorer=OSA.normalized_similarity,
            score_cutoff=FUZZY_CUTOFF / 100.0,
        )
        return near[0] if near and near[0][0] == word[0] else None


def build_lexicon(
    forget: TermCounts,
    background: TermCounts,
    names: Callable[[str], bool],
    rank: Callable[[str], int | None],
) -> dict[Words, float]:
    """Choose terms and weigh them.

    Args:
        forget: Counts over the forget rows (question and answer together).
        background: Counts over benign and retain texts.
        names: True for a word that the forget rows write with a capital inside a sentence.
        rank: Place of a word in general English (0 is the most frequent), None if it is unknown.

    Returns:
        Terms with log-odds of at least 2.
    """
    weights: dict[Words, float] = {}
    for term, count in forget.terms.items():
        if count <= 0 or not _may_be_term(term, count, names, rank):
            continue
        prior = _prior(term, rank)
        share = (count + 0.5) / (forget.texts + 1.0)
        other = (max(background.terms[term], 0) + 0.5) / (background.texts + 1.0) + prior
        weight = min(math.log(share / other), MAX_WEIGHT)
        if weight >= 2.0:
            weights[term] = weight
    return weights


def _may_be_term(
    term: Words, count: int, names: Callable[[str], bool], rank: Callable[[str], int | None]
) -> bool:
    if len(term) > 1:
        return any(word not in _STOP and not word.isdigit() for word in term)
    word = term[0]
    if len(word) < 3 or word in _STOP or word.isdigit():
        return False
    return names(word) or (rank(word) is None and count > 1)


def _prior(term: Words, rank: Callable[[str], int | None]) -> float:
    """Guess the share of general texts that hold a term, from Zipf's law (a name: the rarest)."""
    ranks = [rank(word) for word in term]
    if any(place is None for place in ranks):
        return 0.0
    rarest = max(place for place in ranks if place is not None)
    share = 3.0 / (rarest + 10.0)
    return share if len(term) == 1 else share**2 / 2.0


def find_names(texts: Iterable[str]) -> set[str]:
    """Return words that are written with a capital in at least two of three places.

    The first word of a sentence says nothing and isn't counted, unless it is never elsewhere.
    """
    upper: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for text in texts:
        for match in _WORD.finditer(text):
            before = text[: match.start()].rstrip(" \"'“‘(")
            if not before or before[-1] in ".!?:\n":
                continue
            word = match.group()
            total[word.casefold()] += 1
            upper[word.casefold()] += word[0].isupper()
    return {word for word, count in total.items() if 3 * upper[word] >= 2 * count}


def _index(terms: Iterable[Words]) -> dict[str, list[Words]]:
    index: dict[str, list[Words]] = {}
    for term in terms:
        index.setdefault(term[0], []).append(term)
    for same in index.values():
        same.sort(key=len, reverse=True)
    return index


def _exact(
    words: Sequence[tuple[str, int, int]], index: Mapping[str, Sequence[Words]]
) -> list[tuple[int, int, Words]]:
    """Return (first word, word behind the last, term) of every term that occurs."""
    found = []
    for first, (word, _, _) in enumerate(words):
        for term in index.get(word, ()):
            last = first + len(term)
            if last <= len(words) and all(
                words[first + n][0] == part for n, part in enumerate(term)
            ):
                found.append((first, last, term))
    return found
