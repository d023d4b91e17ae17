"""Which words of a flagged text tell of the entity where its names don't (DESIGN section 4).

ECO's token classifier marks names of persons only. This head reads the token states of the encoder
that serves anyway, so that a description ("the poet born in Baku in 1991") has its telling words
marked and not the whole text. It is asked about flagged texts only, so others pay nothing for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from classifiers.spans import GAP, Place, merge_places
from classifiers.terms import STOP_WORDS, split_words
from guard.types import FloatArray

Words = Sequence[tuple[str, int, int]]


def told_places(
    text: str, states: FloatArray, tokens: Sequence[Place], head: FloatArray
) -> list[Place]:
    """Return the places of the words that the head marks, sorted and disjoint.

    A word is marked whole if one of its tokens is; stop words stand inside a place, never at its
    edges.

    Args:
        text: The text.
        states: Last-layer state of each token, shape (tokens, hidden).
        tokens: Characters of each token.
        head: Weights and, last, the intercept, shape (hidden + 1,); a token is marked from 0 on.
    """
    marks = token_scores(states, head) >= 0.0
    hit = [place for place, mark in zip(tokens, marks, strict=True) if mark]
    words = split_words(text)
    marked = _words_of(words, hit)
    runs: list[Place] = []
    first = 0
    while first < len(words):
        last = first
        while last < len(words) and last in marked and _is_near(words, first, last):
            last += 1
        runs += _trimmed(words[first:last])
        first = max(last, first + 1)
    return merge_places(runs)


def token_scores(states: FloatArray, head: FloatArray) -> FloatArray:
    """Return the head's score of each token, shape (tokens, hidden) -> (tokens,)."""
    return np.asarray(states @ head[:-1] + head[-1], np.float32)


def words_of_tokens(text: str, tokens: Sequence[Place]) -> list[str]:
    """Return the folded word that each token lies in, "" for signs."""
    words = split_words(text)
    found, at = [], 0
    for start, _ in tokens:
        while at < len(words) and words[at][2] <= start:
            at += 1
        inside = at < len(words) and words[at][1] <= start
        found.append(words[at][0] if inside else "")
    return found


def _words_of(words: Words, places: Sequence[Place]) -> set[int]:
    found, at = set(), 0
    for start, end in sorted(places):
        while at < len(words) and words[at][2] <= start:
            at += 1
        number = at
        while number < len(words) and words[number][1] < end:
            found.add(number)
            number += 1
    return found


def _is_near(words: Words, first: int, at: int) -> bool:
    return at == first or words[at][1] <= words[at - 1][2] + GAP


def _trimmed(run: Words) -> list[Place]:
    """Return the place of a run of words without the stop words at its edges; none if all are."""
    kept = [number for number, (word, _, _) in enumerate(run) if word not in STOP_WORDS]
    return [(run[kept[0]][1], run[kept[-1]][2])] if kept else []
