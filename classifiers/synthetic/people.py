"""Names of invented people, out of naming cultures all over the world."""

from __future__ import annotations

import random
import unicodedata
from dataclasses import dataclass
from functools import cache
from typing import Any

from classifiers.synthetic.words import read_seed, words

_MIXED_SHARE = 0.06
"""People whose given name comes from another culture than the family name."""

_LETTERS = str.maketrans(
    {"ł": "l", "ø": "o", "ı": "i", "đ": "d", "ð": "d", "ə": "e", "ʼ": "", "’": "", "'": ""}
    | {"ß": "ss", "æ": "ae", "œ": "oe", "þ": "th"}
)


@dataclass(frozen=True, slots=True)
class PersonName:
    """A name and where it is at home.

    Attributes:
        full: The name as usually written.
        given: The first given name.
        family: The family name with its particles.
        country: A country of the naming culture.
        female: Whether the given name is a woman's.
    """

    full: str
    given: str
    family: str
    country: str
    female: bool


@dataclass(frozen=True, slots=True)
class _Culture:
    female: tuple[str, ...]
    male: tuple[str, ...]
    family: tuple[str, ...]
    particles: tuple[str, ...]
    countries: tuple[str, ...]
    rules: dict[str, Any]


def ascii_fold(text: str) -> str:
    """Lower the case and drop diacritics; letters without an ASCII cousin go."""
    plain = unicodedata.normalize("NFKD", text.casefold().translate(_LETTERS))
    return plain.encode("ascii", "ignore").decode()


@cache
def cultures() -> dict[str, _Culture]:
    """Return the naming cultures by name."""
    return {name: _culture(seed) for name, seed in read_seed("names").items()}


def _culture(seed: dict[str, Any]) -> _Culture:
    def names(key: str) -> tuple[str, ...]:
        return tuple(word.replace("_", " ") for word in seed.get(key, "").split())

    return _Culture(
        names("female"),
        names("male"),
        names("family"),
        tuple(p if p[-1] in "- " else f"{p} " for p in names("particles")),
        tuple(seed["countries"]),
        seed,
    )


@cache
def _blocked() -> frozenset[str]:
    return frozenset(words("blocked"))


def draw_person(rng: random.Random) -> PersonName:
    """Draw a name; well-known people's are never drawn."""
    while True:
        person = _draw(rng)
        if ascii_fold(f"{person.given} {person.family}") not in _blocked():
            return person


def _draw(rng: random.Random) -> PersonName:
    all_cultures = tuple(cultures().values())
    culture = rng.choice(all_cultures)
    giver = rng.choice(all_cultures) if rng.random() < _MIXED_SHARE else culture
    female = rng.random() < 0.5
    givens = giver.female if female else giver.male
    given = rng.choice(givens)
    family = _family(rng, culture, female)
    front = f"{given} {middle}" if (middle := _middle(rng, culture, givens, given)) else given
    order = culture.rules.get("order", "given")
    first = order == "family" or (order == "mixed" and rng.random() < 0.4)
    full = f"{family} {middle} {given}" if first and middle else f"{front} {family}"
    if first and not middle:
        full = f"{family} {given}"
    return PersonName(full, given, family, rng.choice(culture.countries), female)


def _family(rng: random.Random, culture: _Culture, female: bool) -> str:
    family = rng.choice(culture.family)
    if female:
        family = _feminine(family, culture.rules.get("gender"))
    chance = rng.random()
    if culture.particles and chance < 0.35 and "-" not in family:
        return rng.choice(culture.particles) + family
    if chance < culture.rules.get("double", 0):
        return f"{family} {rng.choice([name for name in culture.family if name != family])}"
    if chance < culture.rules.get("hyphen", 0) and "-" not in family:
        return f"{rng.choice([name for name in culture.family if '-' not in name])}-{family}"
    return family


def _feminine(family: str, rule: str | None) -> str:
    if rule == "slavic":
        for ending, other in (("ski", "ska"), ("cki", "cka"), ("sky", "skaya"), ("ny", "na")):
            if family.endswith(ending):
                return family.removesuffix(ending) + other
        return f"{family}a" if family.endswith(("ov", "ev", "in", "yn")) else family
    if rule == "czech":
        for ending, other in (("ý", "á"), ("ek", "ková"), ("ec", "cová"), ("a", "ová")):
            if family.endswith(ending):
                return family.removesuffix(ending) + other
        return f"{family}ová"
    return family


def _middle(
    rng: random.Random, culture: _Culture, givens: tuple[str, ...], given: str
) -> str | None:
    rule = culture.rules.get("middle")
    if rule is None or rng.random() > 0.28:
        return None
    if rule == "letter":
        return f"{rng.choice('ABCDEFGHJKLMNOPRSTVW')}."
    if rule == "patronymic":
        stem = rng.choice(("Alekseev", "Borisov", "Ivanov", "Leonidov", "Mikhailov", "Pavlov"))
        return f"{stem}{'na' if givens is cultures()['russian'].female else 'ich'}"
    return rng.choice([name for name in givens if name != given])
