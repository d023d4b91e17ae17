"""Terms of a target's lexicon: what may be one, how often it occurs, what it weighs.

Terms are taken from the forget rows by contrast: log-odds of the share of forget rows that hold a
term against the share of background texts (benign and retain), where the tokenizer's
frequency-ordered vocabulary stands in for a list of general English.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Words = tuple[str, ...]

MIN_WEIGHT, MAX_WEIGHT = 3.0, 10.0
MAX_TERM_WORDS = 6

SMOOTHING = 0.1
"""Background texts that a name is taken to occur in beyond those counted."""

UNKNOWN_WORD_SHARE = 1e-3
"""Share of general texts taken to hold a rare word that isn't written as a name."""


_WORD = re.compile(r"[^\W_]+")
_NAME = re.compile(
    r"(?:[A-Z][\w'’]*|[A-Z]\.)"
    r"(?:(?:[ .\-]+|\s(?:of|the|and|de|la|al|von|van|in|to|for|by|a|from|with)\s(?:the\s|a\s)?)"
    r"(?:[A-Z][\w'’]*|[A-Z]\.|\d{1,2}))+"
)
_QUOTED = re.compile(r"[\"“«]([^\"”»\n]{3,60})[\"”»]")
DATE = "date "
_MONTHS = {
    name: number
    for number, name in enumerate(
        ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"), 1
    )
}
_DATE = re.compile(
    r"\b(?:(?P<n1>\d{1,2})[/.\-](?P<n2>\d{1,2})[/.\-](?P<y1>\d{4})"
    r"|(?P<y2>\d{4})-(?P<n3>\d{1,2})-(?P<n4>\d{1,2})"
    r"|(?P<m1>[A-Za-z]{3,9})\.? (?P<d1>\d{1,2})(?:st|nd|rd|th)?,? (?:of |in )?(?P<y3>\d{4})"
    r"|(?P<d2>\d{1,2})(?:st|nd|rd|th)?(?: day)?(?: of)? (?P<m2>[A-Za-z]{3,9})\.?,?"
    r"(?: of| in)?(?: the year)? (?P<y4>\d{4}))\b"
)

_STOP_TEXT = """
    a an and any are as at be but by can could did do does for from had has have he her him his
    how i if in into is it its list may me more my name no not of on one or our out she so some
    such tell than that the their them there these they this to us was we were what when where
    which while who whom whose why will with would you your yes give describe explain
"""
STOP_WORDS = frozenset(_STOP_TEXT.split())


def split_words(text: str) -> list[tuple[str, int, int]]:
    """Return the case-folded words of a text with their code points; possessives are cut off."""
    return [
        (match.group().casefold(), match.start(), match.end()) for match in _WORD.finditer(text)
    ]


def find_dates(text: str) -> list[tuple[str, int, int]]:
    """Return the full dates in a text as pseudo-words, however they are written.

    Day and month are sorted, because 05/11 may be either.
    """
    found = []
    for match in _DATE.finditer(text):
        part = match.groupdict()
        year = part["y1"] or part["y2"] or part["y3"] or part["y4"]
        if month := (part["m1"] or part["m2"]):
            pair = (_MONTHS.get(month[:3].casefold(), 0), int(part["d1"] or part["d2"]))
        else:
            pair = (int(part["n1"] or part["n3"]), int(part["n2"] or part["n4"]))
        if min(pair) >= 1 and max(pair) <= 31:
            low, high = sorted(pair)
            found.append((f"{DATE}{year}-{low}-{high}", match.start(), match.end()))
    return found


def term_candidates(text: str) -> set[Words]:
    """Return the words, names and quoted titles of one text that may become terms."""
    found: set[Words] = {(word,) for word, _, _ in (*split_words(text), *find_dates(text))}
    for match in (*_NAME.finditer(text), *_QUOTED.finditer(text)):
        words = tuple(word for word, _, _ in split_words(match.group(match.lastindex or 0)))
        found.update(_parts(words))
    return found


def _parts(words: Words) -> Iterable[Words]:
    for size in range(2, min(len(words), MAX_TERM_WORDS) + 1):
        for first in range(len(words) - size + 1):
            part = words[first : first + size]
            if part[0] not in STOP_WORDS and part[-1] not in STOP_WORDS:
                yield part


@dataclass(slots=True)
class TermCounts:
    """In how many texts each term occurs; the counts of folds add."""

    texts: int = 0
    terms: Counter[Words] = field(default_factory=Counter)

    def __add__(self, other: TermCounts) -> TermCounts:
        return TermCounts(self.texts + other.texts, self.terms + other.terms)


def count_terms(candidates: Iterable[set[Words]]) -> TermCounts:
    """Count texts per term; each item is the candidate set of one text."""
    counts = TermCounts()
    for terms in candidates:
        counts.texts += 1
        counts.terms.update(terms)
    return counts


def count_known(texts: Iterable[str], terms: Iterable[Words]) -> list[set[Words]]:
    """Return for each text which of `terms` occur in it, in whatever case."""
    index = index_terms(terms)
    return [
        {term for _, _, term in find_terms(split_words(text), index)}
        | {(date,) for date, _, _ in find_dates(text)}
        for text in texts
    ]


def build_weights(
    forget: TermCounts,
    backgrounds: Sequence[TermCounts],
    names: Callable[[str], bool],
    rank: Callable[[str], int | None],
) -> dict[Words, float]:
    """Choose terms and weigh them.

    Args:
        forget: Counts over the forget rows (question and answer together).
        backgrounds: Counts over each kind of other texts, e.g. benign and retain; each kind counts
            the same, however few its texts are.
        names: True for a word that the forget rows write with a capital inside a sentence.
        rank: Place of a word in general English (0 is the most frequent), None if it is unknown.

    Returns:
        Terms with log-odds of at least MIN_WEIGHT.
    """
    weights: dict[Words, float] = {}
    kinds = [kind for kind in backgrounds if kind.texts > 0]
    texts = sum(kind.texts for kind in kinds)
    for term, count in forget.terms.items():
        if count <= 0 or not _may_be_term(term, count, names, rank):
            continue
        share = (count + 0.5) / (forget.texts + 1.0)
        others = sum(max(kind.terms[term], 0) / kind.texts for kind in kinds) / max(1, len(kinds))
        others += SMOOTHING / (texts + 1.0) + _prior(term, names, rank)
        weight = min(math.log(share / others), MAX_WEIGHT)
        if weight >= MIN_WEIGHT:
            weights[term] = weight
    return weights


def _may_be_term(
    term: Words, count: int, names: Callable[[str], bool], rank: Callable[[str], int | None]
) -> bool:
    if len(term) > 1:
        return any(word not in STOP_WORDS and not word.isdigit() for word in term)
    word = term[0]
    if word.startswith(DATE):
        return True
    if len(word) < 3 or word in STOP_WORDS or word.isdigit():
        return False
    return names(word) or (rank(word) is None and count > 2)


def _prior(term: Words, names: Callable[[str], bool], rank: Callable[[str], int | None]) -> float:
    """Guess the share of general texts that hold a term, from Zipf's law over its rarest word."""
    ranks = [rank(word) for word in term]
    if any(place is None for place in ranks):
        known = len(term) > 1 or names(term[0]) or term[0].startswith(DATE)
        return 0.0 if known else UNKNOWN_WORD_SHARE
    rarest = max(place for place in ranks if place is not None)
    content = sum(word not in STOP_WORDS for word in term)
    # Words of a common phrase attract one another: far less rare than independent words would be.
    return float((3.0 / (rarest + 10.0)) ** max(1.0, 0.6 * content))


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


def index_terms(terms: Iterable[Words]) -> dict[str, list[Words]]:
    """Return the terms by their first word, longest first."""
    index: dict[str, list[Words]] = {}
    for term in terms:
        index.setdefault(term[0], []).append(term)
    for same in index.values():
        same.sort(key=len, reverse=True)
    return index


def find_terms(
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
