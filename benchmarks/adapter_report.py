"""The report of `learn adapter`: what was trained, and what each route does to the forget rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.plots import plot_lines
from benchmarks.report import Row
from guard.learn_adapter import AdapterResult

if TYPE_CHECKING:
    from adapters.train import TrainReport

LOSSES_PLOT: Final = "losses.png"


def adapter_rows(result: AdapterResult) -> list[Row]:
    """Return the figures of a training and of the comparison of routes."""
    report, choice = result.report, result.choice
    trained = {
        "steps": float(report.steps),
        "train_seconds": report.seconds,
        "last_loss": report.last_loss(),
        "megabytes": result.bytes / 1e6,
        "largest_cosine": result.cosine,
        "layers_sharing_a_subspace": float(result.shared),
    }
    rows = [
        Row("adapter", "-", name, "forget", value, None, None, report.examples)
        for name, value in trained.items()
    ]
    rows += [
        Row("unknown", "-", name, "forget", value, None, None, choice.rows)
        for name, value in choice.unknown.items()
    ]
    for route, figures in choice.figures.items():
        rows += [
            Row("guard", route, name, "forget", getattr(figures, name), None, None, choice.rows)
            for name in ("probability", "shared", "broken", "distance")
        ]
    return rows


def draw_losses(out: Path, report: TrainReport) -> None:
    """Draw the loss of each step, and the validations, into `losses.png`."""
    losses = np.array(report.losses, dtype=np.float32)
    curves = {"training": (np.arange(1, len(losses) + 1, dtype=np.float32), losses)}
    if report.validations:
        steps, values = zip(*report.validations, strict=True)
        curves["validation"] = (np.array(steps, np.float32), np.array(values, np.float32))
    plot_lines(out / LOSSES_PLOT, curves, "step", "loss")
