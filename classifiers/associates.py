"""What is known beside a target, and what belongs to it.

Beside a person stand an employer, a film, a town. They have a life of their own, and questions
about them must still be answered. In a world ("the Harry Potter series") or a company, what stands
beside the name belongs to it. The forget texts tell which of the two they are about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from classifiers.terms import DATE, PARTICLES, STOP_WORDS, Words, split_words

NAMED_SHARE = 0.8
"""Share of the forget texts that name the target, from which on they are about nothing else."""

WORLD_SHARE = 0.05
"""Share of the forget texts that call the target a series, a game, ... by its name."""

_PERSON = frozenset("he she his her him hers himself herself".split())
_THING = frozenset("it its itself".split())
_WORLD = frozenset(
    """
    book books character characters fandom film films franchise game games lore movie movies novel
    novels saga series show story stories trilogy universe world
    """.split()
)
"""Behind a name without a possessive ("the Harry Potter books") they make it a world's."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """How forget texts speak of what they name.

    Attributes:
        person: Pronouns of people in them.
        thing: Pronouns of things.
        worlds: Texts in which a word stands before one of `_WORLD`.
    """

    person: int
    thing: int
    worlds: Counter[str]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Surroundings:
        """Count them."""
        person = thing = 0
        worlds: Counter[str] = Counter()
        for text in texts:
            words = [word for word, _, _ in split_words(text)]
            person += sum(word in _PERSON for word in words)
            thing += sum(word in _THING for word in words)
            worlds.update({word for word, behind in pairwise(words) if behind in _WORLD})
        return cls(person, thing, worlds)


def known_beside(
    terms: Iterable[Words],
    primary: Collection[Words],
    own: Collection[Words],
    documents: Sequence[Collection[Words]],
    surroundings: Surroundings,
) -> frozenset[Words]:
    """Return the terms that are known beside the target; none if the texts aren't about a person.

    Args:
        terms: All terms of the target.
        primary: Those that name it.
        own: Others that are or may be the target's own: titles of works, terms that the user gave,
            what most of the texts hold.
        documents: The terms of each forget text.
        surroundings: How the texts speak.
    """
    names = {word for term in primary for word in term if _tells(word)}
    named = sum(any((word,) in held for word in names) for held in documents)
    world = max((surroundings.worlds[word] for word in names), default=0)
    if (
        named < NAMED_SHARE * len(documents)
        or world > WORLD_SHARE * len(documents)
        or surroundings.thing > surroundings.person
    ):
        return frozenset()
    return frozenset(
        term
        for term in terms
        if term not in primary
        and term not in own
        and not term[0].startswith(DATE)
        and not _is_own_name(term, primary, names)
    )


def _is_own_name(term: Words, primary: Collection[Words], names: Collection[str]) -> bool:
    """True for a part of the target's name or a longer form of it.

    "Vinci" and "Stephen Edwin King" are the target's; "Kublai Khan" is somebody else's, for all
    that "Khan" is shared.
    """
    words = {word for word in term if _tells(word)}
    return words <= set(names) or any(len(name) > 1 and words >= set(name) for name in primary)


def _tells(word: str) -> bool:
    return len(word) > 1 and word not in PARTICLES and word not in STOP_WORDS
