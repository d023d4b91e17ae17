"""The lexicon of a target: rare names, titles and words that tell it from everything else.

Topic similarity finds paraphrases but cannot tell a forget author from a neighbouring one; names
can. Terms are taken from the forget rows by contrast: log-odds of the share of forget rows that
hold a term against the share of background texts (benign and retain), where the tokenizer's
frequency-ordered vocabulary stands in for a list of general English.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from classifiers.terms import (
    DATE,
    STOP_WORDS,
    Words,
    find_dates,
    find_terms,
    index_terms,
    split_words,
)
from guard.errors import ArtifactError
from guard.types import FloatArray

FEATURES = 4
"""Numbers that `Lexicon.features` gives per window."""

STRONG = 5.0
"""Weight (natural log-odds) from which a term alone points at the target."""

ENTITY_LOGIT = 8.0
"""Score of a window that holds a strong name of several words, whatever its topic: nobody can be
let through who names the target in full. Calibration sees it too, so the budget still holds."""

FUZZY_LETTERS, FUZZY_ALONE_LETTERS = 4, 6
"""Letters that a misspelt word needs, as a part of a longer name and alone."""

OTHER_NAME_FACTOR = 0.5
"""What is left of a surname's weight beside a stranger's given name, or of a common noun's."""

FUZZY_CUTOFF = 0.79
FUZZY_FACTOR = 0.8


def entity_floor(scores: FloatArray, names: FloatArray) -> FloatArray:
    """Raise the scores of windows that name the target in full to `ENTITY_LOGIT`.

    Args:
        scores: Logits, shape (windows,).
        names: `Lexicon.features` of the same windows, shape (windows, FEATURES).
    """
    named = names[:, 1] >= STRONG
    return np.asarray(np.where(named, np.maximum(scores, ENTITY_LOGIT), scores), np.float32)


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


class Lexicon:
    """Weighted terms of one target and a matcher for them; safe to share between threads.

    Args:
        weights: Log-odds of each term.
        common: True for a case-folded word of general English, which is never taken for a typo.
        others: Words that look like a name of the target but are known to be something else.
    """

    def __init__(
        self,
        weights: Mapping[Words, float],
        common: Callable[[str], bool],
        others: Iterable[str] = (),
    ) -> None:
        self.weights = dict(weights)
        self.others = frozenset(others)
        self._common = common
        self._index = index_terms(self.weights)
        self._names = _by_first_letter(self.weights)
        self._known = {word for term in self.weights for word in term}
        self._fuzzy: dict[str, str | None] = {}
        self._lock = threading.Lock()

    def matches(self, text: str) -> list[Match]:
        """Return every term in a text, longest first at a place, sorted by place."""
        words = split_words(text)
        mended = [(self._mend(word), start, end) for word, start, end in words]
        found = []
        for first, last, term in find_terms(mended, self._index):
            exact = all(mended[n][0] == words[n][0] for n in range(first, last))
            if not exact and len(term) == 1 and len(term[0]) < FUZZY_ALONE_LETTERS:
                continue
            weight = self.weights[term] * (1.0 if exact else FUZZY_FACTOR)
            if len(term) == 1 and (
                self._is_someone_else(text, words, first)
                or self._is_common_noun(text, words[first])
            ):
                weight *= OTHER_NAME_FACTOR
            found.append(Match(words[first][1], words[last - 1][2], term, weight))
        for date, start, end in find_dates(text):
            if (date,) in self.weights:
                found.append(Match(start, end, (date,), self.weights[(date,)]))
        return found

    def without(self, words: Iterable[str]) -> Lexicon:
        """Return a lexicon that no longer takes any of these words for a misspelt name."""
        similar = {word for word in words if self._mend(word) != word}
        return Lexicon(self.weights, self._common, self.others | similar)

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
        rows = [[list(term), round(weight, 4)] for term, weight in sorted(self.weights.items())]
        data = {"format": 1, "terms": rows, "others": sorted(self.others)}
        return json.dumps(data, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes, common: Callable[[str], bool]) -> Lexicon:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: If it is not a lexicon.
        """
        try:
            found = json.loads(data)
            weights = {tuple(term): float(weight) for term, weight in found["terms"]}
            return cls(weights, common, found["others"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"the target's lexicon cannot be read: {error!r}") from error

    def _is_someone_else(
        self, text: str, words: Sequence[tuple[str, int, int]], place: int
    ) -> bool:
        """True if a single word stands inside a longer name of which the lexicon knows no more."""
        for other in (place - 1, place + 1):
            if not 0 <= other < len(words):
                continue
            word, start, end = words[other]
            gap = text[end : words[place][1]] if other < place else text[words[place][2] : start]
            if gap not in (" ", "-") or not text[start].isupper() or len(word) < 3:
                continue
            begins = start == 0 or text[:start].rstrip(" \"'“(")[-1:] in (
                "",
                ".",
                "!",
                "?",
                ":",
                "\n",
            )
            if not begins and word not in STOP_WORDS and self._mend(word) not in self._known:
                return True
        return False

    def _is_common_noun(self, text: str, word: tuple[str, int, int]) -> bool:
        """True for a word of general English in small letters, in a text that uses capitals."""
        return text[word[1]].islower() and self._common(word[0]) and not text.islower()

    def _mend(self, word: str) -> str:
        """Map a misspelt, plural or possessive name to the lexicon's spelling."""
        if word in self._known or len(word) < FUZZY_LETTERS:
            return word
        if word.endswith("s") and word[:-1] in self._known:
            return word[:-1]
        if word in self.others or self._common(word):
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
        from rapidfuzz import process
        from rapidfuzz.distance import OSA

        near = process.extractOne(
            word,
            self._names.get(word[0], ()),
            scorer=OSA.normalized_similarity,
            score_cutoff=FUZZY_CUTOFF,
        )
        return near[0] if near else None


def _by_first_letter(terms: Iterable[Words]) -> dict[str, list[str]]:
    """Return the words that a misspelling may stand for; people rarely miss the first letter."""
    names: dict[str, set[str]] = {}
    for term in terms:
        for word in term:
            if len(word) >= FUZZY_LETTERS and not word.startswith(DATE):
                names.setdefault(word[0], set()).add(word)
    return {letter: sorted(words) for letter, words in names.items()}
