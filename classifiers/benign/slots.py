"""Hand-written seeds of the benign set, and the drawing of slot values from them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

SLOT = re.compile(r"\{(?:n:(\d+)-(\d+)|([a-z]+)(?:#(\d))?)\}")


@dataclass(frozen=True)
class Row:
    """One prompt of the set."""

    text: str
    category: str
    lang: str


def read_seeds(name: str) -> list[dict[str, Any]]:
    """The rows of `seeds/<name>.jsonl`."""
    source = resources.files(__package__).joinpath("seeds", f"{name}.jsonl")
    return [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]


def rng_for(part: str) -> random.Random:
    """A generator of its own per part, so that new seeds move only the part they are in."""
    return random.Random(f"unlearn-guard/benign/{part}")


class Deck:
    """Deals a slot's values evenly: each one once before any of them again."""

    def __init__(self, values: list[str], rng: random.Random) -> None:
        self._values = list(values)
        self._rng = rng
        self._left: list[str] = []

    def draw(self, taken: set[str]) -> str:
        """The next value that is not in `taken` (unless the deck holds nothing else)."""
        for _ in range(2 * len(self._values)):
            if not self._left:
                self._left = self._rng.sample(self._values, len(self._values))
            value = self._left.pop()
            if value not in taken:
                return value
        return self._values[0]


class Filler:
    """Fills `{slot}`, `{slot#2}` and `{n:low-high}` of a template."""

    def __init__(self, part: str) -> None:
        self.rng = rng_for(part)
        self._decks = {
            (seed["lang"], seed["slot"]): Deck(seed["values"], self.rng)
            for seed in read_seeds("entities")
        }

    def fill(self, text: str, lang: str) -> str:
        """`text` with every slot filled; a slot named twice gets the same value.

        Raises:
            KeyError: a slot of `text` has no values in `lang`.
        """
        chosen: dict[tuple[str, str], str] = {}

        def replace(match: re.Match[str]) -> str:
            low, high, slot, index = match.groups()
            if slot is None:
                return str(self.rng.randint(int(low), int(high)))
            key = (slot, index or "1")
            if key not in chosen:
                chosen[key] = self._decks[lang, slot].draw(set(chosen.values()))
            return chosen[key]

        return SLOT.sub(replace, text)

    def several(self, text: str, lang: str, count: int) -> Iterator[str]:
        """`count` fillings of `text`; one only where it has no slot."""
        for _ in range(count if SLOT.search(text) else 1):
            yield self.fill(text, lang)
