"""The figures of a learned target: held-out rates with their intervals, and never a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from classifiers.augment import Sample
from classifiers.calibrate import Calibration, wilson_interval
from guard.types import FloatArray


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out scores by kind of sample; benign and retain texts plain and framed."""

    forget: FloatArray
    unseen: FloatArray
    variants: FloatArray
    retain: FloatArray
    benign: FloatArray
    neighbours: FloatArray

    @classmethod
    def collect(cls, samples: Sequence[Sample], scores: FloatArray) -> HeldOut:
        """Sort the samples' held-out scores by kind."""
        kinds = np.array([sample.kind for sample in samples])
        return cls(
            *(
                scores[kinds == k]
                for k in ("plain", "unseen", "variant", "retain", "benign", "neighbour")
            )
        )


def held_out_report(
    counts: Mapping[str, int], scored: HeldOut, calibration: Calibration, budget: float
) -> dict[str, Any]:
    """Return counts, threshold, recall and false-positive rates; numbers only."""
    figures: dict[str, Any] = {
        "method": "eco",
        **counts,
        "fpr_budget": budget,
        "threshold": calibration.threshold,
        "median_forget": calibration.median_forget,
    }
    rates = {
        "recall": scored.forget,
        "recall_unseen_names": scored.unseen,
        "recall_variants": scored.variants,
        "fpr_benign": scored.benign,
        "fpr_retain": scored.retain,
        "fpr_synthetic_neighbours": scored.neighbours,
    }
    for key, scores in rates.items():
        hits = int((scores >= calibration.threshold).sum())
        low, high = wilson_interval(hits, len(scores))
        figures[key] = {
            "hits": hits,
            "n": len(scores),
            "rate": hits / len(scores) if len(scores) else None,
            "interval95": [low, high],
        }
    return figures
