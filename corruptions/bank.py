"""Generic text: what the model reads instead of an entity, and the frame of the surrogate value.

Ordinary first and last names of many countries, of nobody in particular. Most are one token in
the vocabularies of today's models, so that a name of any number of tokens can be filled. Whole
texts that tell of the entity without naming it read as a question about everyday things.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from corruptions.seeding import Draws
from guard.types import BoolArray, FloatArray

_NAMES: Final = """
Peter Fischer, Laura Moore, Simon Keller, Anna Hughes, Paul Santos, Maria Becker, Thomas Wright,
Helen Bennett, Martin Clarke, Julia Larsen, David Murphy, Clara Weber, Oliver Costa, Alice Turner,
Walter Silva, Nora Novak, Oscar Carter, Rosa Meyer, Frank Hansen, Eva Foster, Henry Palmer,
Ruth Jensen, Eric Collins, Diana Ward, Adam Fletcher, Sarah Hayes, Louis Schmidt, Grace Barrett,
Carl Grant, Irene Lambert, Leon Marsh, Sofia Doyle
"""
GENERIC_NAMES: Final = tuple(tuple(name.split()) for name in _NAMES.split(","))
"""First and last names."""

CONNECTING_WORD: Final = "and"

GENERIC_QUESTIONS: Final = (
    "How can a family save water and energy at home without spending much on new machines",
    "What should a beginner know before buying a second hand camera for a long journey",
    "Which vegetables can be kept in a cool cellar through the winter months and how",
    "Why do so many people enjoy walking by the sea early in the morning before work",
    "What are some good ways to keep a small garden healthy during a long and dry summer",
    "How do bakers make bread that stays fresh for several days without any additives",
    "Which simple exercises help people who sit at a desk all day and have a stiff neck",
    "How is paper made from wood in a modern factory and how can it be recycled",
    "What makes a good letter to an old friend who moved to a city far away",
    "Why does the moon look larger when it is close to the horizon than high above",
    "What are the main differences between a lake and a pond for plants and fish",
    "How does a bicycle stay upright while somebody rides it along a narrow road",
    "What is the best way to clean wooden furniture that stood in a damp room",
    "How do farmers decide when the wheat is ready and the harvest can begin",
    "Which materials keep a house warm in winter and cool in the hot months",
    "How can neighbours share their tools and books without losing track of them",
    "What do bees need in a town to find enough food from spring to autumn",
    "How should a person prepare for a first interview at a small local company",
    "Why do leaves change their colour in autumn and fall to the ground",
    "How can a train station be made easier to use for people with heavy bags",
    "What are healthy lunches that can be cooked at home in half an hour",
    "How do people learn to play the piano when they are no longer young",
    "Why is salt put on roads in winter and what harm does it do to trees",
    "How can a teacher keep a class interested on a long and rainy afternoon",
)
"""Beginnings of questions, so worded that they may be cut off anywhere after the first words."""

MIN_PAIRS: Final = 8
"""Fewer names of one token each than this, and names of several tokens are taken too."""


def make_bank(
    tokenise: Callable[[str], Sequence[int]], embed: Callable[[Sequence[int]], FloatArray]
) -> FloatArray:
    """Embed generic names and questions for `mix-generic`.

    Args:
        tokenise: Token ids of a text, without special tokens.
        embed: Input embeddings of token ids, shape (tokens, hidden), scaled as the model does.

    Returns:
        Sections of rows with a row of zeros between them, shape (bank tokens, hidden). The first
        holds names: rows 2k and 2k+1 are a first and a last name of one token each, and the second
        a single word, which says so; with a vocabulary that splits most names, the tokens of all
        names in order, and no such section. Each of the others holds a question.
    """
    pairs = [[_inside(word, tokenise) for word in name] for name in GENERIC_NAMES]
    short = [pair for pair in pairs if all(len(ids) == 1 for ids in pair)]
    chosen = short if len(short) >= MIN_PAIRS else pairs
    rows = [embed([i for pair in chosen for ids in pair for i in ids])]
    joint = _inside(CONNECTING_WORD, tokenise)
    others = [joint] if chosen is short and len(joint) == 1 else []
    for ids in [*others, *(list(tokenise(question)) for question in GENERIC_QUESTIONS)]:
        rows += [np.zeros((1, rows[0].shape[1]), np.float32), embed(ids)]
    return np.concatenate(rows).astype(np.float32)


def bank_words(tokenise: Callable[[str], Sequence[int]]) -> tuple[str, ...]:
    """Return the word of each row of the bank's names; none where names are of several tokens."""
    short = [
        name for name in GENERIC_NAMES if all(len(_inside(word, tokenise)) == 1 for word in name)
    ]
    return tuple(word for name in short for word in name) if len(short) >= MIN_PAIRS else ()


def stand_ins(
    rows: FloatArray, positions: BoolArray, bank: FloatArray, words: Sequence[str]
) -> list[tuple[int, int, tuple[str, ...]]]:
    """Find the names that corrupted tokens now read as.

    Args:
        rows: Corrupted embeddings, shape (tokens, hidden).
        positions: The marked tokens, shape (tokens,).
        bank: What `make_bank` made.
        words: What `bank_words` gives for the same vocabulary.

    Returns:
        First token, token after the last, and the name's words, of each stretch of marked tokens
        that is nothing but the bank's names.
    """
    known = {row.tobytes(): word for row, word in zip(bank, words, strict=False)}
    edges = np.flatnonzero(np.diff(np.concatenate([[False], positions, [False]]).astype(np.int8)))
    found = []
    for start, end in edges.reshape(-1, 2).tolist():
        name = [known.get(rows[place].tobytes()) for place in range(start, end)]
        if name and None not in name:
            found.append((start, end, tuple(word for word in name if word)))
    return found


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
