"""Plots of the reports, drawn without a screen. matplotlib comes with the extra `bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.report import Row
from guard.errors import ConfigError
from guard.types import FloatArray

if TYPE_CHECKING:
    from collections.abc import Iterator

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[FloatArray, FloatArray]
"""Values on the x axis and on the y axis."""

DPI = 120
BINS = 60
MAX_BARS = 60
LEAST_FPR = 1e-3


def check_plots() -> None:
    """Find out before long work whether plots can be drawn.

    Raises:
        ConfigError: If matplotlib isn't installed.
    """
    if find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib: install the extra `bench`")


def plot_roc(path: Path, curves: Mapping[str, Curve]) -> None:
    """Draw ROC curves, over a plain axis and over one that shows small false positive rates.

    Args:
        path: The PNG file to write.
        curves: False and true positive rates by name; both rise.
    """
    with _figure(path, columns=2) as (_, (plain, log)):
        for name, (fpr, tpr) in curves.items():
            plain.plot(fpr, tpr, label=name, drawstyle="steps-post")
            log.plot(fpr, tpr, label=name, drawstyle="steps-post")
        # A flawless ranking goes from 0 straight to 1: then the axis begins where we say.
        between = [float(rate) for fpr, _ in curves.values() for rate in fpr if 0 < rate < 1]
        smallest = min(between, default=LEAST_FPR)
        plain.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1))
        log.set(xlabel="false positive rate, log", xscale="log", xlim=(smallest, 1))
        for axes in (plain, log):
            axes.set_ylim(0, 1.02)
            axes.grid(alpha=0.3)
        plain.legend(loc="lower right")


def plot_histogram(
    path: Path, values: Mapping[str, FloatArray], label: str, mark: float | None = None
) -> None:
    """Draw histograms over one another, each as shares of its own values.

    Args:
        path: The PNG file to write.
        values: What to count, by name; infinite values stand at the edge.
        label: Of the x axis, with the unit.
        mark: Where a line is drawn, such as the threshold.
    """
    finite = [array[np.isfinite(array)] for array in values.values()]
    both = np.concatenate(finite) if finite else np.zeros(0)
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1.0, BINS + 1).tolist()
    with _figure(path) as (_, (axes,)):
        for name, array in values.items():
            weights = np.full(len(array), 1.0 / max(1, len(array)))
            clipped = np.clip(array, edges[0], edges[-1])
            axes.hist(
                clipped, bins=edges, weights=weights, alpha=0.55, label=f"{name} ({len(array)})"
            )
        if mark is not None:
            axes.axvline(mark, color="black", linestyle="--", linewidth=1)
        axes.set(xlabel=label, ylabel="share", yscale="log")
        axes.legend()


def plot_rows(path: Path, rows: Sequence[Row], label: str) -> None:
    """Draw figures with their intervals, one a line, the worst (largest) on top.

    Args:
        path: The PNG file to write.
        rows: Their groups are the names; rows without a value are left out, and so are the
            smallest of more than `MAX_BARS`.
        label: Of the x axis.
    """
    known = [row for row in rows if row.value is not None]
    known = sorted(known, key=lambda row: row.value or 0.0)[-MAX_BARS:]
    with _figure(path, height=1.2 + 0.22 * len(known)) as (_, (axes,)):
        for place, row in enumerate(known):
            value = row.value or 0.0
            low = value if row.ci_low is None else row.ci_low
            high = value if row.ci_high is None else row.ci_high
            axes.plot([low, high], [place, place], color="tab:blue", linewidth=1.2)
            axes.plot([value], [place], "o", color="tab:blue", markersize=4)
        names = [f"{row.group} ({row.n})" for row in known]
        axes.set_yticks(range(len(known)), names, fontsize=7, parse_math=False)
        axes.set_ylim(-1, max(1, len(known)))
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)


def plot_lines(path: Path, curves: Mapping[str, Curve], x_label: str, y_label: str) -> None:
    """Draw lines with points, such as latency over concurrency."""
    with _figure(path) as (_, (axes,)):
        for name, (x, y) in curves.items():
            axes.plot(x, y, "o-", label=name, markersize=4)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3)
        axes.legend()


def plot_closeness(path: Path, rows: Sequence[Row], suffix: str, band: float) -> None:
    """Draw differences to a reference by measure and system, with their intervals.

    Args:
        path: The picture.
        rows: Those whose measure ends in `suffix` are drawn; the rest are left out.
        suffix: What a difference's measure ends in.
        band: Target: differences up to this are marked as close.
    """
    found = [row for row in rows if row.measure.endswith(suffix) and row.value is not None]
    measures = list(dict.fromkeys(row.measure for row in found))
    systems = list(dict.fromkeys(row.system for row in found))
    with _figure(path, 2, 0.5 * len(measures) + 1.5) as (_, (axes, side)):
        axes.axvspan(-band, band, color="0.9")
        for number, system in enumerate(systems):
            mine = [row for row in found if row.system == system]
            values = np.array([row.value for row in mine], dtype=float)
            ends = np.array([(row.ci_low, row.ci_high) for row in mine], dtype=float)
            shift = 0.7 * (number / max(1, len(systems) - 1) - 0.5)
            places = np.array([measures.index(row.measure) for row in mine]) + shift
            errors = np.abs(ends.T - values)
            axes.errorbar(values, places, xerr=errors, fmt="o", markersize=4, label=system)
        axes.set_yticks(range(len(measures)), [name.removesuffix(suffix) for name in measures])
        axes.invert_yaxis()
        axes.axvline(0, color="0.5", linewidth=0.8)
        side.axis("off")
        side.legend(*axes.get_legend_handles_labels(), loc="upper left")


@contextmanager
def _figure(
    path: Path, columns: int = 1, height: float = 4.5
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """Open a figure with a row of axes; it is saved when the block ends."""
    check_plots()
    # Not pyplot: it keeps figures in a global list and may look for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * columns + 1.5, height), layout="constrained")
    FigureCanvasAgg(figure)
    yield figure, [figure.add_subplot(1, columns, number + 1) for number in range(columns)]
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
