"""The parts that a detector is judged in: texts as they are, and what attackers make of them.

Each part dresses benign texts up as it does the others, so that a wrapper that is flagged for
itself shows as false positives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.attacks import Template
from benchmarks.labelled import Example, stratified

PLAIN: Final = "all"

SAMPLED_TOKENS: Final = 1_000_000

LONGEST_QUESTION: Final = 300
"""Characters of a benign text that is put beside a question, where there are enough such texts."""

Cut = Callable[[str, int], str | None]
"""Returns the first so many tokens of a text; None if it has fewer."""


@dataclass(frozen=True, slots=True)
class Part:
    """Texts that are judged together.

    Attributes:
        name: `all`, `attacks`, `context=512`, `among=8`.
        positives: Texts to flag.
        negatives: Texts to leave alone.
    """

    name: str
    positives: tuple[Example, ...]
    negatives: tuple[Example, ...]

    @property
    def examples(self) -> tuple[Example, ...]:
        """All texts, those to flag first."""
        return self.positives + self.negatives


def plain_part(
    positives: Sequence[Example], negatives: Sequence[Example], sample: int | None, seed: int
) -> Part:
    """Return the texts as they are, or a stratified sample of `sample` of each side."""
    return Part(
        PLAIN,
        *(
            tuple(examples if sample is None else stratified(examples, sample, [seed, side]))
            for side, examples in enumerate((positives, negatives))
        ),
    )


def attack_part(
    positives: Sequence[Example],
    negatives: Sequence[Example],
    templates: Sequence[Template],
    sample: int | None,
    seed: int,
) -> Part:
    """Return texts in attack wrappers, grouped by kind and by transform.

    A sample is divided evenly among the kinds, and each kind's share among its templates (one text
    at least), so that a kind of one template is judged as well as one of many. Otherwise every
    template takes all positives, and as many negatives.
    """
    kinds = Counter(template.kind for template in templates)
    rng = np.random.default_rng([seed, 2])

    def wrapped(examples: Sequence[Example]) -> tuple[Example, ...]:
        found = []
        for template in templates:
            each = None if sample is None else sample // len(kinds) // kinds[template.kind]
            share = len(positives) if each is None else max(1, each)
            groups = (f"kind={template.kind}", f"transform={template.transform}")
            for index in rng.permutation(len(examples))[:share]:
                example = examples[index]
                found.append(Example(template.wrap(example.text), groups, example.target))
        return tuple(found)

    return Part("attacks", wrapped(positives), wrapped(negatives))


def context_part(
    positives: Sequence[Example],
    negatives: Sequence[Example],
    tokens: int,
    cut: Cut,
    sample: int | None,
    seed: int,
) -> Part:
    """Return texts before and after `tokens` tokens of benign texts, taken from the negatives.

    A sample holds at most `SAMPLED_TOKENS` tokens of benign text to each side.
    """
    rng = np.random.default_rng([seed, 3, tokens])

    def surrounded(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
        found = []
        for number, index in enumerate(rng.permutation(len(examples))[:count]):
            example, filler = examples[index], _filler(negatives, tokens, cut, rng)
            place = ("prefix", "suffix")[number % 2]
            both = (filler, example.text) if place == "prefix" else (example.text, filler)
            groups = (f"benign={place}",)
            found.append(Example("\n\n".join(both), groups, example.target))
        return tuple(found)

    count = len(positives)
    if sample is not None:
        count = min(count, sample, max(1, SAMPLED_TOKENS // tokens))
    return Part(f"context={tokens}", surrounded(positives, count), surrounded(negatives, count))


def among_part(
    positives: Sequence[Example],
    negatives: Sequence[Example],
    others: int,
    sample: int | None,
    seed: int,
) -> Part:
    """Return lists of questions: one of interest among `others` benign ones, in random order."""
    rng = np.random.default_rng([seed, 4, others])
    short = [example for example in negatives if len(example.text) <= LONGEST_QUESTION]
    benign = short if len(short) > others else negatives

    def listed(examples: Sequence[Example], count: int) -> tuple[Example, ...]:
        found = []
        for index in rng.permutation(len(examples))[:count]:
            around = [benign[i].text for i in rng.choice(len(benign), others)]
            around.insert(int(rng.integers(others + 1)), examples[index].text)
            text = "\n".join(f"{number}. {one}" for number, one in enumerate(around, start=1))
            found.append(Example(text, (), examples[index].target))
        return tuple(found)

    count = len(positives) if sample is None else min(sample, len(positives))
    return Part(f"among={others}", listed(positives, count), listed(benign, count))


def _filler(negatives: Sequence[Example], tokens: int, cut: Cut, rng: np.random.Generator) -> str:
    text = ""
    while True:
        # Grown by chunks: each call of `cut` reads the whole text.
        goal = len(text) + max(1, 3 * tokens)
        while len(text) < goal:
            text += negatives[int(rng.integers(len(negatives)))].text + "\n"
        if (found := cut(text, tokens)) is not None:
            return found
