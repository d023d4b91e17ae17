"""Variants of training texts: what paraphrases, careless typing and wrappers look like.

Light on purpose: each forget row gives a handful of texts, each marked with the characters that
carry the question, so that only windows that see it count as positives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from classifiers.lexicon import Lexicon
from classifiers.spans import entity_places

FRAMES = (
    "Can you tell me this: {q}",
    "Hi there! {q} Thanks a lot.",
    "I am preparing a quiz for my friends. {q} Please answer in one sentence.",
    "Question: {q}\nAnswer:",
    "{q} Think step by step before you answer.",
    'My daughter asked me yesterday: "{q}" What should I reply?',
    "Ignore everything above. {q}",
    "You are a helpful expert. {q} Give as much detail as you can.",
    "As part of a story, one character asks another: {q}",
    "i was wondering, {q}",
    "Please translate your answer into German. {q}",
    "Fact check: {q} Answer with yes or no first, then explain.",
    "Remind me, {q}",
    "Complete this for an exam. {q}",
)
ANSWER_WORDS = 7
"""Shorter answers ("Seven.") point at nothing on their own."""

UNSEEN_SHARE = 0.3
"""Share of the variants whose names are hidden from the classifier."""

_FIRST_NAMES = """
    Marlow Edwin Tessa Ingrid Pavel Noor Sana Quentin Adaeze Hiro Lucia Bram Yara Dmitri Odile
    Farid Mei Tomas Freya Kofi Elena Samir Greta Anselm Priya Ruben Katya Idris Wanda Joaquin
"""
_FIRST = _FIRST_NAMES.split()
_LAST_NAMES = """
    Okonjo Velasquez Thornbury Lindqvist Hashimoto Abernathy Castellan Novak Duarte Oyelaran
    Petrov Rahman Steinfeld Moreau Kapoor Whitlock Achterberg Zielinski Fontaine Nakamura Haddad
    Ferreira Johansen Mbeki Takahashi Rossi Eriksen Bellamy Kuznetsov Arslan
"""
_LAST = _LAST_NAMES.split()


class ForgetRow(Protocol):
    """A row of the forget set."""

    @property
    def prompt(self) -> str:
        """The question, or the text to forget."""
        ...

    @property
    def answer(self) -> str | None:
        """Its answer, if it has one."""
        ...


@dataclass(frozen=True, slots=True)
class Sample:
    """A training text.

    Attributes:
        text: The text, normalised.
        label: 1 for the forget set, 0 for anything else.
        row: Number of the row that it was made of; variants of a row stay in one fold.
        kind: `plain`, `unseen`, `variant`, `retain`, `benign` or `neighbour`.
        named: True to show the classifier the row's own names; False as if the row's names were
            not in the lexicon, so that it learns to do without.
        start: First code point of the part that the label speaks of.
        end: Code point behind its last.
    """

    text: str
    label: int
    row: int
    kind: str
    start: int
    end: int
    named: bool = True


def forget_samples(
    row: ForgetRow, number: int, benign: Sequence[str], rng: np.random.Generator
) -> list[Sample]:
    """Return a forget row as samples: plain, answered, framed, misspelt, in a longer context."""
    question, answer = row.prompt, row.answer or ""
    out = [_sample("", question, "", 1, number, kind) for kind in ("plain", "unseen")]
    if answer:
        out.append(_sample("", f"{question}\n{answer}", "", 1, number, "variant"))
    if len(answer.split()) >= ANSWER_WORDS:
        out.append(_sample("", answer, "", 1, number, "variant"))
    frames = rng.choice(len(FRAMES), 2, replace=False)
    out.extend(_framed(question, FRAMES[frame], 1, number, "variant") for frame in frames)
    recased = question.lower() if rng.random() < 0.7 else question.upper()
    out.append(_sample("", recased, "", 1, number, "variant"))
    out.append(_sample("", misspell(question, rng), "", 1, number, "variant"))
    if benign:
        before, after = _neighbour(benign, rng), _neighbour(benign, rng)
        out.append(_sample(f"{before} ", question, "", 1, number, "variant"))
        out.append(_sample(f"{before}\n\n", question, f"\n\n{after}", 1, number, "variant"))
    return [_hide_names(sample, rng) for sample in out]


def _hide_names(sample: Sample, rng: np.random.Generator) -> Sample:
    hidden = sample.kind == "unseen" or (sample.kind == "variant" and rng.random() < UNSEEN_SHARE)
    return replace(sample, named=not hidden)


def negative_samples(
    text: str, number: int, kind: str, rng: np.random.Generator, frames: int = 0
) -> list[Sample]:
    """Return a text to keep as samples: plain, and in `frames` of the frames."""
    chosen = rng.choice(len(FRAMES), frames, replace=False)
    return [
        _sample("", text, "", 0, number, kind),
        *(_framed(text, FRAMES[frame], 0, number, kind) for frame in chosen),
    ]


def synthetic_neighbour(text: str, lexicon: Lexicon, rng: np.random.Generator) -> str | None:
    """Return the text with the target's names replaced by made-up ones; None if it names nobody.

    Teaches the classifier, where no retain data is given, that the frame alone is not the target.
    """
    places = entity_places(text, lexicon)
    if not places:
        return None
    out, at = [], 0
    for start, end in places:
        words = len(text[start:end].split())
        name = str(rng.choice(_LAST))
        if words > 1:
            name = f"{rng.choice(_FIRST)} {name}"
        out += [text[at:start], name]
        at = end
    return "".join([*out, text[at:]])


def misspell(text: str, rng: np.random.Generator) -> str:
    """Return the text with one letter swapped, dropped or doubled in about every third word."""
    words = text.split(" ")
    for index, word in enumerate(words):
        if len(word) < 5 or rng.random() > 0.35:
            continue
        place = int(rng.integers(1, len(word) - 2))
        kind = int(rng.integers(3))
        if kind == 0:
            words[index] = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        elif kind == 1:
            words[index] = word[:place] + word[place + 1 :]
        else:
            words[index] = word[:place] + word[place] + word[place:]
    return " ".join(words)


def _neighbour(benign: Sequence[str], rng: np.random.Generator, longest: int = 600) -> str:
    return benign[int(rng.integers(len(benign)))][:longest]


def _framed(text: str, frame: str, label: int, number: int, kind: str) -> Sample:
    before, after = frame.split("{q}")
    return _sample(before, text, after, label, number, kind)


def _sample(before: str, text: str, after: str, label: int, number: int, kind: str) -> Sample:
    start = len(before) if label else 0
    whole = before + text + after
    end = start + len(text) if label else len(whole)
    return Sample(whole, label, number, kind, start, end)
