"""The figures of a learned target: held-out rates with their intervals, and never a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from classifiers.calibrate import TargetCalibration, wilson_interval
from guard.types import FloatArray


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out scores of forget texts.

    Attributes:
        plain: The rows as they are, each scored without its fold.
        varied: Their variants: framed, misspelt, recased, among other texts.
        held_out: False where there were too few rows to leave any out.
    """

    plain: FloatArray
    varied: FloatArray
    held_out: bool

    @property
    def all(self) -> FloatArray:
        """All scores."""
        return np.concatenate([self.plain, self.varied])


def held_out_report(
    counts: Mapping[str, int | str],
    forget: HeldOut,
    benign: FloatArray,
    retain: FloatArray,
    calibration: TargetCalibration,
) -> dict[str, Any]:
    """Return counts and quantiles of held-out scores; numbers only.

    Rates follow when the bundle's threshold is known: see `rates`.
    """
    return {
        "method": "guard",
        **counts,
        "held_out": forget.held_out,
        "forget_low": calibration.forget_low,
        "forget_median": calibration.forget_median,
        "benign_highest": float(calibration.scores[0]) if len(calibration.scores) else None,
        "scores": {
            "recall": _steps(forget.plain),
            "recall_variants": _steps(forget.varied),
            "fpr_benign": _steps(np.sort(benign)[::-1][:100], len(benign)),
            "fpr_retain": _steps(np.sort(retain)[::-1][:100], len(retain)),
        },
    }


def rates(report: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """Return a target's report with its rates at a threshold, and without the scores."""
    figures = {key: value for key, value in report.items() if key != "scores"}
    figures["threshold"] = threshold
    for key, (scores, total) in report.get("scores", {}).items():
        hits = sum(score >= threshold for score in scores)
        low, high = wilson_interval(hits, total)
        figures[key] = {
            "hits": hits,
            "n": total,
            "rate": hits / total if total else None,
            "interval95": [low, high],
        }
    return figures


def _steps(scores: FloatArray, total: int | None = None) -> tuple[list[float], int]:
    return [round(float(score), 3) for score in scores], len(scores) if total is None else total
