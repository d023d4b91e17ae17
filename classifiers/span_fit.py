"""Fit the span head: tokens of names and of telling words against all others.

Weakly supervised, as nobody marks tokens: what the lexicon finds in the forget rows is the entity,
what stands in them much more often than in other texts tells of it, and the rest doesn't. One ridge
regression a target over states that were taken once for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from classifiers.background import FOLDS, WordIndex
from classifiers.benign_tokens import MAX_CHARS, BenignTokens
from classifiers.encoder import OnnxEncoder
from classifiers.forgetset import ForgetSet
from classifiers.span_head import words_of_tokens
from classifiers.spans import EntityFinder, Place
from classifiers.study import Tools
from classifiers.terms import STOP_WORDS, split_words
from classifiers.topic import Moments, apply, fit_ridge
from guard.types import BoolArray, FloatArray, IntArray

QUICK_EFFORT = 1
"""Up to this effort no span head is learned."""

TEXTS = 30
"""Forget texts whose tokens are read."""

SALIENT, SURE = 3.0, 6.0
"""Natural log-odds from which a word tells of the target, and at which it counts as a name does."""

FRAME_RANK = 600
"""Words of general English more frequent than this make up the frames of questions."""

BENIGN_SHARE, OTHER_SHARE = 0.02, 0.1
"""Held-out tokens that may be marked at most: of benign texts, and of the forget rows' others.

Chosen on generated targets: half the benign share misses one name in ten learned from a sentence.
"""


@dataclass(frozen=True, slots=True)
class _Tokens:
    """Tokens of forget rows: scaled states, how surely each is the entity, and its fold."""

    states: FloatArray
    weights: FloatArray
    folds: IntArray

    @property
    def others(self) -> BoolArray:
        return np.asarray(self.weights == 0.0)


def learn_span_head(tools: Tools, forget: ForgetSet, names: EntityFinder) -> FloatArray | None:
    """Fit one target's head with what all targets are learned with; None at a quick effort."""
    if tools.effort <= QUICK_EFFORT:
        return None
    others = [tools.background.index]
    if tools.neighbours is not None:
        others.append(tools.neighbours.index)

    def marked(text: str) -> list[Place]:
        return [*names(text), *(tools.entities(text) if tools.entities else [])]

    salience = salient_words(forget, others, tools.encoder.word_rank)
    benign = tools.background.tokens(tools.encoder)
    return fit_span_head(benign, tools.encoder, forget, marked, salience)


def fit_span_head(
    benign: BenignTokens,
    encoder: OnnxEncoder,
    forget: ForgetSet,
    names: EntityFinder,
    salience: dict[str, float],
) -> FloatArray | None:
    """Fit one target's head; None where no token stands out from the others.

    Args:
        benign: Tokens of general text.
        encoder: The bundle's encoder.
        forget: The forget set.
        names: Finds the target's names in a text.
        salience: What `salient_words` gave.

    Returns:
        Weights of the states and, last, the intercept, shape (hidden + 1,), rounded to 16 bits;
        a token is marked from 0 on.
    """
    tokens = _forget_tokens(benign, encoder, _sample(forget), names, salience)
    if tokens.others.all() or not tokens.others.any():
        return None
    head = _fit(benign, tokens, None)
    head[-1] -= _threshold(benign, tokens)
    weight = head[:-1] / benign.scale
    intercept = head[-1] - weight @ benign.mean
    return np.append(weight, intercept).astype(np.float16).astype(np.float32)


def salient_words(
    forget: ForgetSet, others: Sequence[WordIndex], rank: Callable[[str], int | None]
) -> dict[str, float]:
    """Return the words that stand in forget rows rather than in others, by log-odds."""
    texts = len(forget.documents)
    counts = Counter(
        word for text in forget.documents for word in {word for word, _, _ in split_words(text)}
    )
    found = {}
    for word, count in counts.items():
        place = rank(word)
        if word in STOP_WORDS or (place is not None and place < FRAME_RANK):
            continue
        share = max((len(o.holders((word,))) + 0.5) / (o.texts + 1.0) for o in others)
        odds = math.log((count + 0.5) / (texts + 1.0) / share)
        if odds >= SALIENT:
            found[word] = odds
    return found


def _sample(forget: ForgetSet) -> list[str]:
    """Return questions and passages in turn, evenly drawn from each."""
    half = TEXTS // 2
    asked = _evenly(forget.questions, max(half, TEXTS - len(forget.passages)))
    return [*asked, *_evenly(forget.passages, TEXTS - len(asked))]


def _evenly(texts: Sequence[str], count: int) -> list[str]:
    places = np.linspace(0, len(texts) - 1, min(count, len(texts))).astype(int)
    return [texts[place][:MAX_CHARS] for place in places]


def _forget_tokens(
    benign: BenignTokens,
    encoder: OnnxEncoder,
    texts: Sequence[str],
    names: EntityFinder,
    salience: dict[str, float],
) -> _Tokens:
    parts, weights, folds = [], [], []
    for number, text in enumerate(texts):
        states, tokens = encoder.tokens(text)
        parts.append((states - benign.mean) / benign.scale)
        inside = _inside(tokens, names(text))
        for word, named in zip(words_of_tokens(text, tokens), inside, strict=True):
            told = 0.0 if word in STOP_WORDS else min(salience.get(word, 0.0) / SURE, 1.0)
            weights.append(1.0 if named else told)
        folds += [number % FOLDS] * len(tokens)
    states = np.concatenate(parts).astype(np.float32)
    return _Tokens(states, np.array(weights, np.float32), np.array(folds, np.int64))


def _inside(tokens: Sequence[Place], places: Iterable[Place]) -> list[bool]:
    found = list(places)
    return [any(a < end and start < b for a, b in found) for start, end in tokens]


def _fit(benign: BenignTokens, tokens: _Tokens, without: int | None) -> FloatArray:
    kept = tokens.folds != (-1 if without is None else without)
    mine = kept & ~tokens.others
    if not mine.any():
        kept = np.ones(len(kept), np.bool_)
        mine = ~tokens.others
    general = [part for fold, part in enumerate(benign.moments) if fold != without]
    return fit_ridge(
        Moments.of(tokens.states[mine], tokens.weights[mine]),
        [Moments.sum(general), Moments.of(tokens.states[kept & tokens.others])],
    )


def _threshold(benign: BenignTokens, tokens: _Tokens) -> float:
    """Return the score that only the allowed shares of held-out tokens reach."""
    general = np.empty(len(benign.states), np.float32)
    mine = np.empty(len(tokens.states), np.float32)
    for fold in range(FOLDS):
        head = _fit(benign, tokens, fold)
        general[benign.folds == fold] = apply(head, benign.states[benign.folds == fold])
        mine[tokens.folds == fold] = apply(head, tokens.states[tokens.folds == fold])
    return float(
        max(
            np.quantile(general, 1.0 - BENIGN_SHARE),
            np.quantile(mine[tokens.others], 1.0 - OTHER_SHARE),
        )
    )
