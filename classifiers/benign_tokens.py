"""Tokens of general text: what the span heads of all targets are fitted and held out against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from classifiers.encoder import OnnxEncoder
from classifiers.topic import Moments
from guard.types import FloatArray, IntArray

TEXTS, MAX_CHARS = 300, 400
"""Texts whose tokens are read, and how far into each."""


@dataclass(frozen=True, slots=True)
class BenignTokens:
    """Tokens of a sample of the benign texts, and the scale of states.

    Attributes:
        mean: Mean state, shape (hidden,).
        scale: What states less the mean are divided by, shape (hidden,).
        states: States of length about 1, shape (tokens, hidden).
        folds: Fold of each token's text, shape (tokens,).
        moments: Each fold's sums.
    """

    mean: FloatArray
    scale: FloatArray
    states: FloatArray
    folds: IntArray
    moments: list[Moments]

    @classmethod
    def of(
        cls, texts: Sequence[str], folds: IntArray, count: int, encoder: OnnxEncoder
    ) -> BenignTokens:
        """Read a sample, drawn evenly so that every kind of text is in it.

        Args:
            texts: The benign texts.
            folds: Fold of each text, shape (texts,).
            count: Number of folds.
            encoder: The bundle's encoder.
        """
        chosen = np.linspace(0, len(texts) - 1, min(TEXTS, len(texts))).astype(int)
        parts = [encoder.tokens(texts[number][:MAX_CHARS])[0] for number in chosen]
        states = np.concatenate(parts)
        mean = states.mean(axis=0)
        # Length about 1, so that the ridge penalty, meant for whitened rows, holds them back more:
        # a forget set has a few hundred tokens, and heads must mark names they did not see.
        scale = np.maximum(states.std(axis=0), 1e-3) * np.sqrt(np.float32(states.shape[1]))
        states = np.asarray((states - mean) / scale, np.float32)
        owners = np.repeat(folds[chosen], [len(part) for part in parts])
        moments = [Moments.of(states[owners == fold]) for fold in range(count)]
        return cls(mean, scale, states, owners, moments)
