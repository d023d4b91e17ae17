"""The report of `learn corruption`: what was found, against what, and the way there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.plots import plot_lines
from benchmarks.report import Row
from corruptions.evaluate import Figures
from corruptions.learner import Trial
from corruptions.spec import CorruptionSpec
from guard.learn_corruption import LearnResult

TRACE_PLOT: Final = "trace.png"


def learn_rows(result: LearnResult, route: str) -> list[Row]:
    """Return the figures of a search: losses, values, distances, and every finalist.

    Args:
        result: What was found.
        route: What it was measured on: `embedded`, `http`.
    """
    counts, best = result.rows, result.best
    rows = _figures("clean", route, result.clean, counts)
    rows += _figures("learned", route, {"train": best.train, "validation": best.validation}, counts)
    for group, values in result.retained.items():
        rows += [
            Row(result.source, route, name, group, value, None, None, counts[group])
            for name, value in values.items()
        ]
    for trial in result.finalists:
        groups = {"train": trial.train, "validation": trial.validation}
        rows += [
            Row(
                describe(trial.spec), route, "finalist_loss", name, f.loss, None, None, counts[name]
            )
            for name, f in groups.items()
            if f is not None
        ]
    rows += _search_rows(result, route)
    if result.retain_flagged is not None:
        flagged, total = result.retain_flagged
        share = flagged / total if total else None
        rows.append(Row("guard", "decide", "retain_flagged", "all", share, None, None, total))
    return rows


def draw_search(out: Path, trials: Sequence[Trial]) -> None:
    """Draw the losses in order, and the best so far, into `trace.png`."""
    losses = np.array([trial.train.loss for trial in trials], dtype=np.float32)
    numbers = np.arange(1, len(losses) + 1, dtype=np.float32)
    curves = {
        "evaluated": (numbers, losses),
        "best so far": (numbers, np.minimum.accumulate(losses)),
    }
    plot_lines(out / TRACE_PLOT, curves, "evaluation", "loss on the train rows")


def describe(spec: CorruptionSpec) -> str:
    """Return a corruption in a few words."""
    words = [f"{spec.method} dims {spec.dims} strength {spec.strength:.4g} {spec.span_policy}"]
    return " ".join([*words, f"frame {spec.frame:.4g}"]) if spec.frame else words[0]


def _figures(
    system: str, route: str, groups: Mapping[str, Figures | None], counts: Mapping[str, int]
) -> list[Row]:
    rows = []
    for group, found in groups.items():
        if found is None:
            continue
        figures = {
            "loss": found.loss,
            "penalty": found.penalty,
            **found.values,
            **{f"distance_{name}": value for name, value in found.distances.items()},
        }
        rows += [
            Row(system, route, measure, group, value, None, None, counts[group])
            for measure, value in figures.items()
        ]
    return rows


def _search_rows(result: LearnResult, route: str) -> list[Row]:
    best = min((trial.train.loss, trial.number) for trial in result.trials)
    found = {"evaluations": len(result.trials), "best_found_at": best[1] + 1}
    return [
        Row(result.optimizer, route, name, "train", float(value), None, None, result.rows["train"])
        for name, value in found.items()
    ]
