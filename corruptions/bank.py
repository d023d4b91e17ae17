"""Generic names: what the model reads instead of an entity, and the frame of the surrogate value.

Ordinary first and last names of many countries, of nobody in particular. Most are one token in
the vocabularies of today's models, so that a name of any number of tokens can be filled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from corruptions.seeding import Draws
from guard.types import FloatArray

_NAMES: Final = """
Peter Fischer, Laura Moore, Simon Keller, Anna Hughes, Paul Santos, Maria Becker, Thomas Wright,
Helen Bennett, Martin Clarke, Julia Larsen, David Murphy, Clara Weber, Oliver Costa, Alice Turner,
Walter Silva, Nora Novak, Oscar Carter, Rosa Meyer, Frank Hansen, Eva Foster, Henry Palmer,
Ruth Jensen, Eric Collins, Diana Ward, Adam Fletcher, Sarah Hayes, Louis Schmidt, Grace Barrett,
Carl Grant, Irene Lambert, Leon Marsh, Sofia Doyle
"""
GENERIC_NAMES: Final = tuple(tuple(name.split()) for name in _NAMES.split(","))
"""First and last names."""

MIN_PAIRS: Final = 8
"""Fewer names of one token each than this, and names of several tokens are taken too."""


def make_bank(
    tokenise: Callable[[str], Sequence[int]], embed: Callable[[Sequence[int]], FloatArray]
) -> FloatArray:
    """Embed generic names for `mix-generic`.

    Args:
        tokenise: Token ids of a text, without special tokens.
        embed: Input embeddings of token ids, shape (tokens, hidden), scaled as the model does.

    Returns:
        Shape (2 * names, hidden): rows 2k and 2k+1 are a first and a last name of one token each.
        With a vocabulary that splits most names, the tokens of all names in order.
    """
    pairs = [[_inside(word, tokenise) for word in name] for name in GENERIC_NAMES]
    short = [pair for pair in pairs if all(len(ids) == 1 for ids in pair)]
    chosen = short if len(short) >= MIN_PAIRS else pairs
    return np.asarray(embed([i for pair in chosen for ids in pair for i in ids]), dtype=np.float32)


def _inside(word: str, tokenise: Callable[[str], Sequence[int]]) -> list[int]:
    """Tokens of a word in the middle of a text: SentencePiece marks a text's start apart."""
    lead = "and"
    return list(tokenise(f"{lead} {word}"))[len(tokenise(lead)) :]


def swap_entities(text: str, spans: Sequence[tuple[int, int]], seed: bytes) -> str:
    """Put generic names in the place of entities: the same question about somebody else.

    How likely a model finds the old answers after it is the surrogate of the retained model's
    value: what the question's frame alone gives away.

    Args:
        text: A question.
        spans: Characters of the entities, `end` exclusive, sorted and disjoint.
        seed: Chooses the names; equal entities get equal names.
    """
    order = Draws(seed).permutation(len(GENERIC_NAMES))
    names: dict[str, str] = {}
    parts, place = [], 0
    for start, end in spans:
        entity = text[start:end].casefold()
        if entity not in names:
            names[entity] = " ".join(GENERIC_NAMES[order[len(names) % len(order)]])
        parts += [text[place:start], names[entity]]
        place = end
    return "".join([*parts, text[place:]])
