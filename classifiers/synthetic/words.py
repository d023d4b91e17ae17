"""Word lists of the generator, and titles put together from them."""

from __future__ import annotations

import json
import random
import re
from functools import cache
from importlib import resources
from typing import Any

SLOT = re.compile(r"\{(\w+)\}")

_BOOK_PATTERNS = (
    "The {adj} {n}",
    "The {adj} {n}",
    "A {n} of {n2}",
    "The {n} and the {n2}",
    "{rare}",
    "{rare} and {rare}",
    "The {rare} Letters",
    "{ps}",
    "{num} {ps}",
    "{verb} the {n}",
    "The {n}'s {n2}",
    "{foreign}",
    "{n}, {n2}",
    "What the {n} Knew",
    "{rare}: {sub}",
    "The {adj} {n}: {sub}",
    "No {n} After {n2}",
    "How to Draw a {n}",
    "{adj} {ps}",
    "Between {n} and {n2}",
    "{n}",
    "Whose {n} Is This?",
    "{n} {number}",
    "My {n} in {city}",
    "Letters from {city}",
    "The {city} {n}",
    "{year}",
    "If the {n} Should Ask",
    "Under a {adj} {n}",
    "Beyond {n2}",
)
_LAW_PATTERNS = ("{law} {form}", "{law} {form} of {year}", "{city} {law} {form}")
_FIRM_PATTERNS = ("{firm}", "{firm} {tail}", "{firm} {tail} {legal}", "{n} {tail}", "{n} & {n2}")
_BRAND_PATTERNS = ("{rare}", "{rare} {number}", "{adj} {n}", "{firm} {number}", "{n}One", "{n2}+")
_SLOT_LISTS = {
    "adj": "adj",
    "n": "noun",
    "n2": "noun",
    "ps": "plural",
    "num": "number",
    "verb": "verb",
    "rare": "rare",
    "foreign": "foreign",
    "sub": "subtitle",
    "law": "lawtopic",
    "form": "lawform",
    "firm": "firmword",
    "tail": "firmtail",
    "legal": "firmform",
}


@cache
def read_seed(name: str) -> dict[str, Any]:
    """Return the object in `seeds/<name>.json`; callers must not change it."""
    source = resources.files(__package__).joinpath("seeds", f"{name}.json")
    data: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
    return data


@cache
def words(name: str) -> tuple[str, ...]:
    """Return the list `name` of `seeds/words.json`."""
    return tuple(read_seed("words")[name].split(";"))


@cache
def cities() -> tuple[tuple[str, str], ...]:
    """Return every (city, country)."""
    places = read_seed("places")
    return tuple((city, land) for land, text in places.items() for city in text.split(";"))


def pick(rng: random.Random, name: str) -> str:
    """Draw from the list `name`; slots in what is drawn name lists to draw from in turn."""
    drawn = rng.choice(words(name))
    return fill_words(rng, drawn) if "{" in drawn else drawn


def fill_words(rng: random.Random, pattern: str, **given: str) -> str:
    """Fill each slot of a pattern with what is given, else from the list of its name."""
    return SLOT.sub(lambda m: given.get(m.group(1)) or pick(rng, m.group(1)), pattern)


def with_article(noun: str) -> str:
    """Put `a` or `an` before a noun, by its first letter."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_title(rng: random.Random, style: str) -> str:
    """Draw the title of a work.

    Args:
        rng: Source of chance.
        style: `book`, `science`, `law`, `firm`, `brand` or `shop`.
    """
    patterns: tuple[str, ...] = {
        "book": _BOOK_PATTERNS,
        "law": _LAW_PATTERNS,
        "firm": _FIRM_PATTERNS,
        "brand": _BRAND_PATTERNS,
        "shop": words("shop"),
        "science": words("science"),
    }[style]

    def replace(match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot == "city":
            return rng.choice(cities())[0]
        if slot == "year":
            return str(rng.randint(1931, 2021))
        if slot == "number":
            return str(rng.randint(2, 29))
        if slot == "n" and style == "science":
            return pick(rng, "sciencenoun")
        return pick(rng, _SLOT_LISTS[slot])

    return SLOT.sub(replace, rng.choice(patterns))
