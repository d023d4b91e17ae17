"""What each term of a forget set weighs: log-odds against general and retain texts.

Learning only. The counts are kept apart from the weights, so that a benign text can be scored with
the weights that a lexicon made without it would have.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from classifiers.associates import Surroundings, known_beside
from classifiers.background import WordIndex
from classifiers.lexicon import Lexicon
from classifiers.terms import (
    DATE,
    MAX_WEIGHT,
    MIN_WEIGHT,
    PARTICLES,
    SMOOTHING,
    STOP_WORDS,
    Words,
    find_names,
    may_be_term,
    quoted_titles,
    split_words,
    term_candidates,
    zipf_prior,
)

MAX_TERMS = 600
ASSOCIATE_TEXTS, ASSOCIATE_SHARE, ASSOCIATE_FACTOR = 3, 0.1, 0.7
"""Texts, and share of the texts, beyond which a term that isn't the target's name counts less."""

FEW_TEXTS = 3
"""Texts up to which how often a name comes says nothing."""

MANY_TEXTS, SUBJECT_TEXTS, SUBJECT_SHARE = 60, 5, 0.02
"""Texts from which on a forget set may be about several things, and what makes one of them."""

PART_LETTERS = 4
"""A rare part of a name that is shorter ("Tae") is too many a thing to name the target alone."""

MONONYM_LETTERS = 5
"""A target's only name of so few letters ("Inca") may also be another thing's, like a part."""

PRIMARY_SHARE = 0.3
"""Share of the forget texts that a name of common words must stand in to be the target's own."""


WORK_WEIGHT = 6.0
"""Weight from which a quoted title points at the target's work: "The Symphony of Love" hardly."""


@dataclass(slots=True)
class TermTable:
    """Counts of a forget set's terms.

    Attributes:
        texts: Number of forget texts.
        counts: Forget texts that hold each term.
        kinds: Each kind of other text: size, and which of its texts hold each term.
        names: Words that the forget texts write as names.
        rank: Place of a word in general English, None if it is a rare one.
        occurrences: How often each term stands in the forget texts altogether.
        first: Where each term stands first.
        documents: The terms of each forget text.
        given: Terms that the user gave as such.
        titles: Titles of works that the forget texts quote.
        surroundings: How the forget texts speak of what they name.
    """

    texts: int
    counts: Counter[Words]
    kinds: list[tuple[int, dict[Words, list[int]]]]
    names: set[str]
    rank: Callable[[str], int | None]
    occurrences: Counter[Words]
    first: dict[Words, int]
    documents: list[set[Words]]
    given: frozenset[Words] = frozenset()
    others: frozenset[str] = field(default=frozenset())
    titles: frozenset[Words] = frozenset()
    surroundings: Surroundings = field(default_factory=lambda: Surroundings.of(()))

    @classmethod
    def count(
        cls,
        forget: Sequence[str],
        others: Sequence[WordIndex],
        rank: Callable[[str], int | None],
        given: Iterable[Words] = (),
    ) -> TermTable:
        """Count the terms of forget texts in them and in other kinds of texts."""
        names = find_names(forget, rank)
        documents = [term_candidates(text) for text in forget]
        counts: Counter[Words] = Counter()
        for terms in documents:
            counts.update(terms)
        wanted = frozenset(given)
        for term in wanted:
            counts[term] = max(counts[term], len(forget))
        kept = {
            term: n
            for term, n in counts.items()
            if term in wanted or may_be_term(term, n, names.__contains__, rank)
        }
        kinds = [
            (index.texts, {term: index.holders(term) for term in kept})
            for index in others
            if index.texts
        ]
        often, first = _occurrences(forget, kept)
        words = {word for term in kept for word in term if not word.startswith(DATE)}
        # A word of a single text proves nothing; and left out, that text shows what it would do.
        alike = {
            near
            for index in others
            for word in words
            for near in index.similar(word)
            if len(index.holders((near,))) > 1
        }
        return cls(
            len(forget),
            Counter(kept),
            kinds,
            names,
            rank,
            often,
            first,
            documents,
            wanted,
            frozenset(alike - words),
            frozenset(title for text in forget for title in quoted_titles(text)),
            Surroundings.of(forget),
        )

    def weight(self, term: Words, without: int | None = None, count: int | None = None) -> float:
        """Return a term's log-odds, MIN_WEIGHT at least for given terms.

        Args:
            term: The term.
            without: A kind of other texts, by number, of which one text that holds the term is
                left out.
            count: Forget texts that hold it, if not all of those counted.
        """
        mine = self.counts[term] if count is None else count
        share = (mine + 0.5) / (self.texts + 1.0)
        total = sum(size for size, _ in self.kinds)
        others = 0.0
        for number, (size, holders) in enumerate(self.kinds):
            held = len(holders.get(term, ())) - (number == without)
            others += max(held, 0) / size / len(self.kinds)
        others += SMOOTHING / (total + 1.0)
        others += zipf_prior(term, self.names.__contains__, self.rank)
        weight = min(math.log(max(share, 1e-9) / others), MAX_WEIGHT)
        return max(weight, MIN_WEIGHT) if term in self.given else weight

    def lexicon(self) -> Lexicon:
        """Return the terms that weigh enough."""
        weights = {term: self.weight(term) for term in self.counts}
        primary = self._primary(weights)
        weights = {
            term: weight * self._share_of_own(term, primary) for term, weight in weights.items()
        }
        kept = [term for term, weight in weights.items() if weight >= MIN_WEIGHT]
        # What the user gave, and what names the target, is kept however much else there is.
        kept.sort(key=lambda term: (term not in primary, -weights[term], term))
        chosen = {term: weights[term] for term in kept[:MAX_TERMS]}
        primary &= set(chosen)
        works = frozenset(
            title
            for title in self.titles - primary
            if len(title) > 1 and chosen.get(title, 0.0) >= WORK_WEIGHT
        )
        beside = self._beside(chosen, primary, works | self.given)
        return Lexicon(chosen, primary, self.others, self._parts(primary), works, beside)

    def _beside(
        self, terms: Iterable[Words], primary: frozenset[Words], own: frozenset[Words]
    ) -> frozenset[Words]:
        """Return what is known beside the target: nothing where it may be the target itself."""
        if self.texts <= FEW_TEXTS:
            if not any(self.occurrences[t] > 1 or self.first[t] <= 1 for t in primary):
                return frozenset()
        else:
            own |= {term for term, texts in self.counts.items() if 2 * texts > self.texts}
        return known_beside(terms, primary, own, self.documents, self.surroundings)

    def _parts(self, primary: frozenset[Words]) -> frozenset[Words]:
        """Return the words of full names: they name the target while few others bear them."""
        longer = {word for term in primary if len(term) > 1 for word in term}
        return frozenset(
            term
            for term in primary - self.given
            if len(term) == 1 and (term[0] in longer or len(term[0]) <= MONONYM_LETTERS)
        )

    def _share_of_own(self, term: Words, primary: frozenset[Words]) -> float:
        """Return what counts of a term's weight: less for what the target is known for.

        What stands in many of the texts beside the name (an employer, an empire, a famous
        painting) is an entity of its own, which must still be answered for; what stands in a few
        is the target's detail.
        """
        if term in primary or term[0].startswith(DATE) or any({*t} >= {*term} for t in primary):
            return 1.0
        often = self.counts[term] > max(ASSOCIATE_TEXTS, ASSOCIATE_SHARE * self.texts)
        return ASSOCIATE_FACTOR if often or self.texts <= ASSOCIATE_TEXTS else 1.0

    def _primary(self, weights: dict[Words, float]) -> frozenset[Words]:
        """Return the terms that name the target in full: what the forget texts are about."""
        found = {term for term in weights if term in self.given}
        names = [term for term in self.counts if self._is_name(term)]
        longer = [term for term in names if len(term) > 1]
        if self.texts >= MANY_TEXTS:
            for subject in self._subjects(names, longer):
                found |= self._with_parts(subject, longer)
            return frozenset(term for term in found if term in weights)
        main = self._most_frequent(longer)
        word = max(
            (term for term in names if len(term) == 1),
            key=lambda term: (self._alone(term, longer), -self.first[term]),
            default=None,
        )
        if word and (main is None or self._alone(word, longer) > 2 * self.occurrences[main]):
            found.add(word)
        elif main is not None:
            found |= self._with_parts(main, longer)
        return frozenset(term for term in found if term in weights)

    def _with_parts(self, main: Words, longer: Sequence[Words]) -> set[Words]:
        """Return a name and those of rare words that it shares: "Mammadov", not "Stephen"."""
        rare = {part for part in main if self.rank(part) is None}
        found = {main, *((part,) for part in rare if len(part) >= PART_LETTERS)}
        return found | {term for term in longer if rare & set(term)}

    def _subjects(self, names: Sequence[Words], longer: Sequence[Words]) -> list[Words]:
        """Return the names that many texts are about: a forget set may hold twenty people.

        A text is about the one of its names that most of the texts hold.
        """
        known = {
            term
            for term in names
            if len(term) > 1
            or (self.rank(term[0]) is None and 2 * self._alone(term, longer) > self.counts[term])
        }
        about: Counter[Words] = Counter()
        for held in self.documents:
            mine = held & known
            if mine:
                about[max(mine, key=lambda term: (self.counts[term], len(term), term))] += 1
        least = max(SUBJECT_TEXTS, SUBJECT_SHARE * self.texts)
        return sorted(term for term, texts in about.items() if texts >= least)

    def _most_frequent(self, names: Sequence[Words]) -> Words | None:
        """Return the name of several words that the texts speak of most; the longest of equals."""
        if not names:
            return None
        often = max(self.occurrences[term] for term in names)
        best = [term for term in names if self.occurrences[term] >= 0.9 * often]
        if self.texts <= FEW_TEXTS:
            # A sentence or two name their subject first, and everybody in them equally often.
            return min(best, key=lambda term: (self.first[term], -len(term)))
        main = max(best, key=lambda term: (len(term), self.occurrences[term], -self.first[term]))
        if self.counts[main] >= PRIMARY_SHARE * self.texts:
            return main
        # A biography names its subject once, at its beginning, and then says "she".
        return min(names, key=lambda term: (self.first[term], -len(term)))

    def _alone(self, word: Words, longer: Sequence[Words]) -> int:
        """How often a word stands outside longer names."""
        inside = max((self.occurrences[t] for t in longer if word[0] in t), default=0)
        return self.occurrences[word] - inside

    def _is_name(self, term: Words) -> bool:
        """True for written names: no sentence border, no words but names and particles."""
        content = [word for word in term if word not in PARTICLES and not _is_initial(word)]
        return (
            bool(content)
            and term[0] not in PARTICLES
            and term[-1] in content
            and not term[0].startswith(DATE)
            and all(word in self.names and word not in STOP_WORDS for word in content)
        )


def _is_initial(word: str) -> bool:
    """True for one letter; "s" is most often what is left of a possessive."""
    return len(word) == 1 and word.isalpha() and word != "s"


def _occurrences(
    forget: Sequence[str], terms: Iterable[Words]
) -> tuple[Counter[Words], dict[Words, int]]:
    """Return how often each term stands in the texts, and the number of the word it first does."""
    wanted = set(terms)
    sizes = sorted({len(term) for term in wanted})
    often: Counter[Words] = Counter()
    first: dict[Words, int] = dict.fromkeys(wanted, 0)
    place = 0
    for text in forget:
        words = [word for word, _, _ in split_words(text)]
        for at in range(len(words)):
            for size in sizes:
                term = tuple(words[at : at + size])
                if len(term) == size and term in wanted:
                    if not often[term]:
                        first[term] = place + at
                    often[term] += 1
        place += len(words)
    return often, first


def terms_of(text: str) -> Words:
    """Return a user's term as words."""
    return tuple(word for word, _, _ in split_words(text))
