"""What is known of an invented target, and the facts that all kinds share."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from classifiers.synthetic.words import pick, words

Facts = dict[str, str | tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Work:
    """A work of the target, or what stands for one: a product, a landmark, a volume."""

    title: str
    year: int
    theme: str


@dataclass(frozen=True, slots=True)
class Profile:
    """All that is known of a target.

    Attributes:
        group: Which frames fit: `people`, `fiction`, `company` or `town`.
        entity: The full name.
        short: Shorter names for it, the likeliest first.
        generic: Words for it that name nothing, such as "this poet".
        works: Its works, the earliest first.
        facts: Values of the slots; of a tuple one is drawn each time.
    """

    group: str
    entity: str
    short: tuple[str, ...]
    generic: tuple[str, ...]
    works: tuple[Work, ...]
    facts: Facts


def date_forms(rng: random.Random, year: int) -> tuple[str, ...]:
    """Draw a day of `year` and return it in the ways that people write dates."""
    month, day = rng.randint(1, 12), rng.randint(1, 28)
    name = words("month")[month - 1]
    tail = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd"}.get(day, "th")
    return (
        f"{day} {name} {year}",
        f"{name} {day}, {year}",
        f"{day:02d}/{month:02d}/{year}",
        f"{day}.{month}.{year}",
        f"{year}-{month:02d}-{day:02d}",
        f"the {day}{tail} of {name} {year}",
    )


def draw_works(
    rng: random.Random, title: Callable[[], str], count: int, first_year: int
) -> tuple[Work, ...]:
    """Draw `count` works with different titles, in order of their years."""
    titles: dict[str, None] = {}
    while len(titles) < count:
        titles[title()] = None
    years = sorted(rng.randint(first_year, max(first_year, 2024)) for _ in titles)
    return tuple(Work(*pair, pick(rng, "theme")) for pair in zip(titles, years, strict=True))


def draw_award(rng: random.Random, purpose: str) -> str:
    """Draw an invented prize."""
    name = f"{pick(rng, 'award_head')} {pick(rng, 'award_tail')}"
    return f"{name} for {purpose}" if rng.random() < 0.6 else name
