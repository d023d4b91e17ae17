"""From what `bench serve` measured to figures, and to the ratios that they are read by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from benchmarks.report import Row, format_number
from benchmarks.serve_arms import DIRECT, GUARD, LITELLM, OFF, RELAY, ROUTER, Running
from benchmarks.serve_bench import (
    C1,
    C1_STREAM,
    C8_FIXED,
    C8_ONCE,
    STREAMS,
    STREAMS_BUSY,
    Found,
    Measured,
)
from benchmarks.serve_load import Outcome
from guard.types import FloatArray

RESAMPLES: Final = 500
MOST_DRAWN: Final = 10_000
_REFERENCES: Final = (DIRECT, RELAY, LITELLM, ROUTER, GUARD)
_STREAMED: Final = (STREAMS, STREAMS_BUSY)

_Figure = Callable[[Outcome], Sequence[float]]


def serve_rows(found: Found, running: Running, seed: int = 0) -> list[Row]:
    """Return every figure, and its ratio to each reference of the same rounds."""
    rows = [*_starts(running)]
    for (point, name), measured in found.items():
        rows += _figures(point, name, measured, seed)
    for (point, name), measured in found.items():
        for other in _REFERENCES:
            reference = found.get((point, other))
            if reference is not None and other != name:
                rows += _ratios(point, name, measured, other, reference, seed)
    return rows


def encoder_rows(found: Found, encoder_pass_ms: float) -> list[Row]:
    """Return the guards' p99 at concurrency 1 over one pass of the encoder, of the same run."""
    rows = []
    for (point, name), measured in found.items():
        if point != C1 or not name.startswith(GUARD):
            continue
        times = _pooled(measured, _latency)
        ratio = float(np.percentile(times, 99)) / encoder_pass_ms
        measure = "latency_p99_to_encoder_pass"
        rows.append(Row(name, point, measure, "all", ratio, None, None, len(times)))
    return rows


def _starts(running: Running) -> Iterable[Row]:
    """Yield what each server costs before it is asked anything."""
    for arm in running.arms:
        if arm.server is None:
            continue
        loaded = float(arm.server.maps("torch"))
        for measure, value in (
            ("cold_start_s", arm.server.cold_start_s),
            ("rss_start_mb", arm.rss_start_mb),
            ("torch_loaded", loaded),
        ):
            yield Row(arm.name, "start", measure, "all", value, None, None, 1)


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure that the guard is held against.

    Attributes:
        what: For people.
        system: As in `Row`; `many` is the guard with many targets, whatever its name.
        route: As in `Row`.
        measure: As in `Row`.
        group: As in `Row`.
        bound: What it should reach.
        at_least: Whether more is better.
    """

    what: str
    system: str
    route: str
    measure: str
    group: str
    bound: float
    at_least: bool = False


GOALS: Final = (
    Goal("requests/s over litellm's", OFF, C8_FIXED, "rps_ratio", f"to {LITELLM}", 25, True),
    Goal("requests/s over vllm-router's", OFF, C8_FIXED, "rps_ratio", f"to {ROUTER}", 0.2, True),
    Goal("the relay's over vllm-router's", RELAY, C8_FIXED, "rps_ratio", f"to {ROUTER}", 0.2, True),
    Goal("added p50, ms", GUARD, C1, "added_latency_p50_ms", f"to {DIRECT}", 3),
    Goal("added TTFT p50, ms", GUARD, C1_STREAM, "added_ttft_p50_ms", f"to {DIRECT}", 4),
    Goal("p99 over an encoder pass", GUARD, C1, "latency_p99_to_encoder_pass", "all", 3),
    Goal("requests/s, each text once", GUARD, C8_ONCE, "rps", "all", 300, True),
    Goal("cleared by the first stage", GUARD, "in process", "cleared_share", "plain", 0.95, True),
    Goal("stream delay p50, busy, ms", GUARD, STREAMS_BUSY, "relay_delay_p50_ms", "all", 1),
    Goal(
        "stream delay p99 over direct's",
        GUARD,
        STREAMS_BUSY,
        "relay_delay_p99_ratio",
        f"to {DIRECT}",
        3,
    ),
    Goal("words held back", GUARD, STREAMS_BUSY, "held_words", "all", 24),
    Goal("memory after start, MB", GUARD, "start", "rss_start_mb", "all", 200),
    Goal("cold start, s", GUARD, "start", "cold_start_s", "all", 3),
    Goal("torch loaded", GUARD, "start", "torch_loaded", "all", 0),
    Goal("memory, many targets, MB", "many", "start", "rss_start_mb", "all", 1000),
    Goal("p50 of many targets over one", "many", C1, "latency_p50_ratio", f"to {GUARD}", 1.5),
)


def goal_table(rows: Sequence[Row], many: str | None) -> list[tuple[str, str, str, str]]:
    """Return what the guard is held against beside what was found, for people.

    Args:
        rows: All figures.
        many: Name of the guard with many targets, if there is one.
    """
    known = {(row.system, row.route, row.measure, row.group): row.value for row in rows}
    lines = []
    for goal in GOALS:
        system = many if goal.system == "many" else goal.system
        value = known.get((system or "", goal.route, goal.measure, goal.group))
        sign, verdict = "≥" if goal.at_least else "≤", "-"
        if value is not None:
            met = value >= goal.bound if goal.at_least else value <= goal.bound
            verdict = "yes" if met else "no"
        lines.append((goal.what, format_number(value), f"{sign} {goal.bound:g}", verdict))
    return lines


def memory_rows(running: Running) -> list[Row]:
    """Return what each server holds now, after all that was asked."""
    return [
        Row(arm.name, "end", "rss_end_mb", "all", arm.server.rss_mb(), None, None, 1)
        for arm in running.arms
        if arm.server is not None
    ]


def _figures(point: str, name: str, measured: Measured, seed: int) -> list[Row]:
    rows = [*_failures(point, name, measured)]
    if point in _STREAMED:
        rows += _quantiles(point, name, "relay_delay", _pooled(measured, _delay), seed)
        held = [float(outcome.held) for outcome in measured.outcomes]
        row = Row(name, point, "held_words", "all", float(np.median(held)), None, None, len(held))
        return [*rows, row]
    rows += _quantiles(point, name, "latency", _pooled(measured, _latency), seed)
    if point == C1_STREAM:
        rows += _quantiles(point, name, "ttft", _pooled(measured, _first), seed)
    rps = [_rps(outcome) for outcome in measured.outcomes]
    rows.append(_over_rounds(name, point, "rps", "all", rps, seed))
    if name != DIRECT:
        cpu = _cpu_us(measured)
        rows.append(_over_rounds(name, point, "cpu_us_per_request", "all", cpu, seed))
    return rows


def _failures(point: str, name: str, measured: Measured) -> Iterable[Row]:
    """Yield how many requests got no good answer, where there are such."""
    total = sum(sum(outcome.statuses.values()) for outcome in measured.outcomes)
    good = sum(outcome.statuses.get("200", 0) for outcome in measured.outcomes)
    if total > good:
        yield Row(name, point, "not_answered", "all", float(total - good), None, None, total)


def _ratios(
    point: str, name: str, ours: Measured, other: str, theirs: Measured, seed: int
) -> list[Row]:
    """Return ratios (and, to the upstream, differences) of each round's figures."""
    group = f"to {other}"
    rounds = list(zip(ours.outcomes, theirs.outcomes, strict=True))
    rows = []
    for label, figure in _compared(point):
        for quantile in (50, 99):
            pairs = [(_q(figure(a), quantile), _q(figure(b), quantile)) for a, b in rounds]
            ratios = [a / b for a, b in pairs if b > 0]
            measure = f"{label}_p{quantile}"
            if ratios:
                rows.append(_over_rounds(name, point, f"{measure}_ratio", group, ratios, seed))
            if other == DIRECT:
                more = [a - b for a, b in pairs]
                rows.append(_over_rounds(name, point, f"added_{measure}_ms", group, more, seed))
    if point not in _STREAMED:
        rates = [_rps(a) / _rps(b) for a, b in rounds if _rps(b) > 0]
        rows.append(_over_rounds(name, point, "rps_ratio", group, rates, seed))
        pairs = list(zip(_cpu_us(ours), _cpu_us(theirs), strict=True))
        costs = [a / b for a, b in pairs if a > 0 and b > 0]  # the upstream's own is not counted
        if costs:
            rows.append(_over_rounds(name, point, "cpu_ratio", group, costs, seed))
    return rows


def _compared(point: str) -> list[tuple[str, _Figure]]:
    if point in _STREAMED:
        return [("relay_delay", _delay)]
    both: list[tuple[str, _Figure]] = [("latency", _latency)]
    return [*both, ("ttft", _first)] if point == C1_STREAM else both


def _latency(outcome: Outcome) -> Sequence[float]:
    return outcome.latency_ms


def _first(outcome: Outcome) -> Sequence[float]:
    return outcome.first_ms


def _delay(outcome: Outcome) -> Sequence[float]:
    return outcome.delays_ms


def _rps(outcome: Outcome) -> float:
    return outcome.statuses.get("200", 0) / outcome.seconds if outcome.seconds else 0.0


def _cpu_us(measured: Measured) -> list[float]:
    """Return each round's time on a CPU for a request: what other jobs on the machine spare."""
    asked = [max(outcome.asked, 1) for outcome in measured.outcomes]
    return [spent / count for spent, count in zip(measured.cpu_us, asked, strict=True)]


def _q(values: Sequence[float], quantile: float) -> float:
    return float(np.percentile(values, quantile)) if len(values) else 0.0


def _pooled(measured: Measured, figure: _Figure) -> FloatArray:
    return np.array([v for outcome in measured.outcomes for v in figure(outcome)], np.float32)


def _quantiles(point: str, name: str, label: str, times: FloatArray, seed: int) -> list[Row]:
    """Return quantiles over all rounds' times, with bootstrap intervals over the times.

    Of very many times the interval is narrower than what rounds differ by, and is left out.
    """
    if not len(times):
        return []
    rows = []
    for quantile in (50, 99):
        low = high = None
        if len(times) <= MOST_DRAWN:
            draws = np.random.default_rng(seed).integers(len(times), size=(RESAMPLES, len(times)))
            found = np.percentile(times[draws], quantile, axis=1)
            low, high = map(float, np.percentile(found, (2.5, 97.5)))
        value = float(np.percentile(times, quantile))
        measure = f"{label}_p{quantile}_ms"
        rows.append(Row(name, point, measure, "all", value, low, high, len(times)))
    return rows


def _over_rounds(
    name: str, point: str, measure: str, group: str, values: Sequence[float], seed: int
) -> Row:
    """Return the median over rounds; its interval, from three rounds on, is the bootstrap's."""
    if not values:
        return Row(name, point, measure, group, None, None, None, 0)
    low = high = None
    if len(values) > 2:
        found = np.array(values)
        draws = np.random.default_rng(seed).integers(len(found), size=(RESAMPLES, len(found)))
        low, high = map(float, np.percentile(np.median(found[draws], axis=1), (2.5, 97.5)))
    return Row(name, point, measure, group, float(np.median(values)), low, high, len(values))
