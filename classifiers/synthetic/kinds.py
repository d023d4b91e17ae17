"""The kinds of targets and how often each is drawn."""

from __future__ import annotations

import random

from classifiers.synthetic.lives import draw_life
from classifiers.synthetic.profile import Profile
from classifiers.synthetic.things import draw_character, draw_company, draw_series, draw_town

KINDS = {
    "novelist": 12,
    "poet": 6,
    "scientist": 9,
    "athlete": 8,
    "politician": 8,
    "musician": 9,
    "entrepreneur": 7,
    "private": 11,
    "character": 8,
    "series": 6,
    "company": 8,
    "town": 8,
}
"""The kinds of targets, each with its weight among the targets drawn."""

_THINGS = {
    "character": draw_character,
    "series": draw_series,
    "company": draw_company,
    "town": draw_town,
}


def draw_profile(rng: random.Random, kind: str) -> Profile:
    """Draw a target of a kind out of `KINDS`."""
    return _THINGS[kind](rng) if kind in _THINGS else draw_life(rng, kind)
