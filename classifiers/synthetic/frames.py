"""Questions, answers and running text from frames and the facts of a target."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from classifiers.synthetic.profile import Profile
from classifiers.synthetic.words import SLOT, read_seed

_WORD = re.compile(r"\w+")
_OTHER_ROWS, _OTHER_PARAPHRASES = 0.05, 0.15
"""Share of questions in another language than English."""

_SMALL_WORDS = frozenset("the of and an on in de la le el du der den da do dos di il".split())
_GENERIC = 0.1
"""Share of rows that say no more than "this author"."""


class Frame(NamedTuple):
    """A question with slots.

    Attributes:
        fact: What it asks for; the group has answers for it.
        text: The question.
        foreign: Whether it is in another language than English.
    """

    fact: str
    text: str
    foreign: bool


class Fill:
    """Fills the slots of one question and of its answer alike."""

    def __init__(self, rng: random.Random, profile: Profile, who: str | None = None) -> None:
        self._rng, self._profile = rng, profile
        works = profile.works
        index = rng.randrange(len(works))
        work, other = works[index], works[index - 1]
        self._chosen = {
            "work": work.title,
            "work2": other.title,
            "work_year": str(work.year),
            "theme": work.theme,
            "works": ", ".join(f'"{item.title}"' for item in works[:4]),
            "work_0": works[0].title,
            "year_0": str(works[0].year),
            "theme_0": works[0].theme,
        }
        self._who = who

    def __call__(self, text: str) -> str:
        """Return the text with its slots filled, and a capital where a slot begins it."""
        filled = SLOT.sub(self._value, text)
        return filled[0].upper() + filled[1:] if text[0] == "{" else filled

    def _value(self, match: re.Match[str]) -> str:
        slot = match.group(1)
        if slot == "who":
            return self._who or self._refer(0.7)
        if slot == "short":
            return self._refer(0.8)
        if slot not in self._chosen:
            value = self._profile.facts[slot]
            self._chosen[slot] = value if isinstance(value, str) else self._rng.choice(value)
        return self._chosen[slot]

    def _refer(self, full: float) -> str:
        if self._rng.random() < full:
            return self._profile.entity
        return self._rng.choices(self._profile.short, (3, 1)[: len(self._profile.short)])[0]


@cache
def _frames(group: str, use: str) -> tuple[Frame, ...]:
    by_fact = read_seed(f"frames_{group}")[use]
    foreign = use.startswith("other_")
    return tuple(Frame(fact, text, foreign) for fact, texts in by_fact.items() for text in texts)


@cache
def _asides() -> dict[str, Any]:
    return read_seed("asides")


def _shuffled(rng: random.Random, frames: tuple[Frame, ...]) -> list[Frame]:
    return rng.sample(frames, len(frames))


def _deal(rng: random.Random, group: str, use: str, share: float) -> Iterator[Frame]:
    """Deal all frames; of English ones each fact's first, `share` of them swapped for others."""
    other = _shuffled(rng, _frames(group, f"other_{use}"))
    again: list[Frame] = []
    met: set[str] = set()
    for frame in _shuffled(rng, _frames(group, use)):
        if frame.fact in met:
            again.append(frame)
            continue
        met.add(frame.fact)
        yield other.pop() if other and rng.random() < share else frame
    yield from again


def rows(rng: random.Random, profile: Profile, count: int) -> tuple[tuple[str, str], ...]:
    """Return `count` different questions with their answers."""
    found: dict[str, str] = {}
    for frame in _deal(rng, profile.group, "rows", _OTHER_ROWS):
        if len(found) == count:
            break
        question, answer = _row(rng, profile, frame)
        found.setdefault(question, answer)
    pairs = list(found.items())
    rng.shuffle(pairs)
    return tuple(pairs)


def _row(rng: random.Random, profile: Profile, frame: Frame) -> tuple[str, str]:
    generic = rng.choice(profile.generic) if rng.random() < _GENERIC else None
    fill = Fill(rng, profile, generic)
    question = fill(_with_pronoun(rng, frame.text))
    answers = read_seed(f"frames_{profile.group}")["answers"][frame.fact]
    return question, fill(answers[0] if frame.foreign else rng.choice(answers))


def _with_pronoun(rng: random.Random, text: str) -> str:
    """Name a work in the place of the entity, now and then; `{who}` is a subject in every frame."""
    if "{who}" not in text or "{work}" in text or "{short}" in text or rng.random() > 0.08:
        return text
    lead = rng.choice(_asides()["pronoun_leads"])
    return f"{lead} {text}".replace("{who}'s", "{his}").replace("{who}", "{he}")


def paraphrases(
    rng: random.Random, profile: Profile, count: int, seen: set[str]
) -> tuple[str, ...]:
    """Return `count` different questions that name the entity and aren't in `seen`."""
    found: dict[str, None] = {}
    for frame in _deal(rng, profile.group, "paraphrases", _OTHER_PARAPHRASES):
        if len(found) == count:
            break
        question = _dressed(rng, Fill(rng, profile)(frame.text))
        if question not in seen:
            found[question] = None
    return tuple(found)


def _dressed(rng: random.Random, text: str) -> str:
    """Add what people write around a question, or drop their capitals, in some cases."""
    chance = rng.random()
    if chance < 0.12:
        return f"{rng.choice(_asides()['before'])} {text}"
    if chance < 0.2:
        return f"{text} {rng.choice(_asides()['after'])}"
    if chance < 0.3:
        return text.lower().rstrip("?")
    return text


def indirect_questions(
    rng: random.Random, profile: Profile, count: int, seen: set[str]
) -> tuple[str, ...]:
    """Return `count` different questions that share no telling word with the entity's name."""
    every = read_seed(f"frames_{profile.group}")["indirect"]
    named = {
        word
        for word in _WORD.findall(profile.entity.casefold())
        if len(word) > 1 and word not in _SMALL_WORDS
    }
    found: dict[str, None] = {}
    frames: list[str] = []
    while len(found) < count:
        frames = frames or rng.sample(every, len(every))
        text = Fill(rng, profile)(frames.pop())
        if text not in seen and not named & set(_WORD.findall(text.casefold())):
            found[text] = None
    return tuple(found)


def biography(rng: random.Random, profile: Profile) -> str:
    """Return the facts as running text."""
    fill = Fill(rng, profile, profile.entity)
    return " ".join(fill(text) for text in read_seed(f"frames_{profile.group}")["biography"])
