"""How long a decision takes, and in which part: one text at a time, bundles beside one another.

Every prompt is read by every bundle before the next prompt comes, in an order that turns from round
to round, so that a noisy moment meets all bundles alike and their ratio means something. Verdicts
are not remembered; what a running server remembers of single words is, from the second round on,
and the first round is reported by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final

import numpy as np

from benchmarks.labelled import Example
from benchmarks.measures import share
from benchmarks.report import Row
from classifiers.detector import BundleDetector, _VerdictCache
from guard.errors import DataError
from guard.pipeline import Guard
from guard.types import BoolArray, FloatArray, IntArray, Progress

TOKENS: Final = 32
LEAST_TOKENS, MOST_TOKENS = 16, 40
"""Prompts of so many tokens count as of about `TOKENS`; of longer ones the first `TOKENS` do."""

ROUNDS: Final = 10
RESAMPLES: Final = 1000
QUANTILES: Final = (("p50", 50.0), ("p99", 99.0))

CLEARED, ENCODED = "cleared", "encoded"
STAGES: Final = ("first stage", "tokenising", "encoding", "heads and fusion")


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle that is timed.

    Attributes:
        name: Name of the system in the report.
        detector: Its detector; it remembers no verdicts.
        guard: A guard that decides by this detector.
    """

    name: str
    detector: BundleDetector
    guard: Guard


@dataclass(slots=True)
class Timings:
    """Times of one bundle, in milliseconds.

    Attributes:
        encoded: True for prompts that needed the encoder, shape (prompts,).
        verdicts: Of `BundleDetector.verdict`, shape (rounds, prompts).
        decisions: Of `Guard.decide`, shape (rounds, prompts).
        stages: Of each stage of a verdict, shape (rounds, prompts); from rounds of their own.
    """

    encoded: BoolArray
    verdicts: FloatArray
    decisions: FloatArray
    stages: Mapping[str, FloatArray]


def about_tokens(
    examples: Sequence[Example], offsets: Callable[[str], Sequence[tuple[int, int]]]
) -> list[Example]:
    """Return the examples of about `TOKENS` tokens; longer ones are cut, shorter ones left out.

    Args:
        examples: Texts.
        offsets: Returns the characters of each token of a text.

    Raises:
        DataError: If none is long enough.
    """
    found = []
    for example in examples:
        places = offsets(example.text)
        if len(places) > MOST_TOKENS:
            found.append(Example(example.text[: places[TOKENS - 1][1]], example.groups))
        elif len(places) >= LEAST_TOKENS:
            found.append(Example(example.text, example.groups))
    if not found:
        raise DataError(f"no prompt has {LEAST_TOKENS} tokens or more")
    return found


def time_bundles(
    subjects: Sequence[Subject],
    examples: Sequence[Example],
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> dict[str, Timings]:
    """Time every bundle on every prompt, `rounds` times, interleaved.

    Args:
        subjects: The bundles.
        examples: The prompts.
        rounds: How often; at least 2, since the first is apart.
        progress: Told how far it is.
    """
    report = progress or (lambda what, done, total: None)
    requests = [example.request() for example in examples]
    texts = [_read_by(subjects[0].guard, request) for request in requests]
    shape = (len(subjects), rounds, len(examples))
    verdicts, decisions = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    encoded = np.zeros((len(subjects), len(examples)), np.bool_)
    for turn in range(rounds):
        for at, text in enumerate(texts):
            for number in _order(len(subjects), turn + at):
                start = time.perf_counter_ns()
                verdict = subjects[number].detector.verdict(text)
                verdicts[number, turn, at] = _since(start)
                encoded[number, at] = verdict.encoded
        for at, request in enumerate(requests):
            for number in _order(len(subjects), turn + at):
                start = time.perf_counter_ns()
                subjects[number].guard.decide(request)
                decisions[number, turn, at] = _since(start)
        report("latency: rounds", turn + 1, rounds)
    stages = _time_stages(subjects, texts, rounds, report)
    return {
        subject.name: Timings(encoded[n], verdicts[n], decisions[n], stages[n])
        for n, subject in enumerate(subjects)
    }


def latency_rows(found: Mapping[str, Timings], files: Sequence[str], seed: int = 0) -> list[Row]:
    """Return the figures: quantiles, shares of stages, and ratios to the first bundle.

    Args:
        found: Times of each bundle.
        files: Group of each prompt, by the file it is from: how many of them a bundle has to
            encode is part of what it costs.
        seed: Of the intervals.
    """
    rows: list[Row] = []
    base = next(iter(found))
    by_file = {
        name: np.flatnonzero([name == one for one in files]) for name in dict.fromkeys(files)
    }
    for name, timings in found.items():
        for group, chosen in by_file.items():
            rows.append(_encoded_share(name, group, timings.encoded[chosen]))
            for route, times in (("verdict", timings.verdicts), ("decide", timings.decisions)):
                rows += _quantile_rows(name, route, group, times[1:, chosen], seed)
        for group, chosen in _groups(timings.encoded).items():
            rows.append(_count(name, group, chosen))
            if not len(chosen):
                continue
            for route, times in (("verdict", timings.verdicts), ("decide", timings.decisions)):
                rows += _quantile_rows(name, route, group, times[1:, chosen], seed)
            rows += _quantile_rows(name, "verdict", f"{group}, first", timings.verdicts[:1, chosen])
            rows += _stage_rows(name, group, timings.stages, chosen)
    for name, timings in found.items():
        if name != base:
            rows += _ratio_rows(name, timings, found[base], by_file, seed)
    return rows


def forgetful(guard: Guard) -> BundleDetector:
    """Return a loaded guard's detector after it was told to remember no verdict.

    Raises:
        TypeError: If the guard's detector is of another kind.
    """
    detector = guard.detector
    if not isinstance(detector, BundleDetector):
        raise TypeError(f"a {type(detector).__name__} can't be timed")
    detector._cache = _VerdictCache(0)
    return detector


def token_places(detector: BundleDetector) -> Callable[[str], Sequence[tuple[int, int]]]:
    """Return what gives the characters of each token of a text, by a detector's tokenizer."""
    encoder = detector._encoder

    def places(text: str) -> list[tuple[int, int]]:
        found = {place for window in encoder.windows(text) for place in window.offsets}
        return sorted(found)

    return places


@contextmanager
def metered(detector: BundleDetector) -> Iterator[dict[str, float]]:
    """Count the milliseconds that a detector spends in each stage until the block ends.

    The last stage is what is left of a verdict, so it isn't counted here.
    """
    spent = dict.fromkeys(STAGES[:-1], 0.0)
    index, quotes, encoder = detector._index, detector._quotes, detector._encoder
    places = (
        (STAGES[0], index, "read"),
        (STAGES[0], index, "restore_vowels"),
        (STAGES[0], quotes, "quotes"),
        (STAGES[0], detector, "_possible"),
        (STAGES[1], encoder, "segments"),
        (STAGES[2], encoder, "states"),
    )
    for stage, owner, method in places:
        setattr(owner, method, _counted(getattr(owner, method), stage, spent))
    try:
        yield spent
    finally:
        for _, owner, method in places:
            delattr(owner, method)


def _counted(method: Callable[..., Any], stage: str, spent: dict[str, float]) -> Callable[..., Any]:
    @wraps(method)
    def counted(*arguments: Any) -> Any:
        start = time.perf_counter_ns()
        try:
            return method(*arguments)
        finally:
            spent[stage] += _since(start)

    return counted


def _time_stages(
    subjects: Sequence[Subject], texts: Sequence[str], rounds: int, report: Progress
) -> list[dict[str, FloatArray]]:
    found = []
    for number, subject in enumerate(subjects, start=1):
        times = {stage: np.zeros((rounds, len(texts)), np.float32) for stage in STAGES}
        with metered(subject.detector) as spent:
            for turn in range(rounds):
                for at, text in enumerate(texts):
                    spent.update(dict.fromkeys(spent, 0.0))
                    start = time.perf_counter_ns()
                    subject.detector.verdict(text)
                    whole = _since(start)
                    for stage, value in spent.items():
                        times[stage][turn, at] = value
                    times[STAGES[-1]][turn, at] = whole - sum(spent.values())
        found.append(times)
        report("latency: stages", number, len(subjects))
    return found


def _read_by(guard: Guard, request: Any) -> str:
    """Return what the guard gives its detector of a request: its longest reading."""
    return max((reading.text for reading in guard._view(request).readings), key=len)


def _order(count: int, turn: int) -> list[int]:
    return [(turn + n) % count for n in range(count)]


def _since(start: int) -> float:
    return (time.perf_counter_ns() - start) / 1e6


# --- Figures ---------------------------------------------------------------------------------


def _groups(encoded: BoolArray) -> dict[str, IntArray]:
    return {CLEARED: np.flatnonzero(~encoded), ENCODED: np.flatnonzero(encoded)}


def _encoded_share(name: str, group: str, encoded: BoolArray) -> Row:
    found = share(int(encoded.sum()), len(encoded))
    interval = min(found.low, found.rate), max(found.high, found.rate)
    return Row(name, "verdict", "encoded_share", group, found.rate, *interval, found.total)


def _count(name: str, group: str, chosen: IntArray) -> Row:
    return Row(name, "verdict", "prompts", group, float(len(chosen)), None, None, len(chosen))


def _quantile_rows(
    name: str, route: str, group: str, times: FloatArray, seed: int | None = None
) -> list[Row]:
    """Return quantiles over all times, with bootstrap intervals over prompts if seeded."""
    rows = []
    for label, q in QUANTILES:
        low = high = None
        if seed is not None:
            drawn = _draws(times.shape[1], seed)
            values = [float(np.percentile(times[:, draw], q)) for draw in drawn]
            low, high = (float(v) for v in np.percentile(values, (2.5, 97.5)))
        value = float(np.percentile(times, q))
        rows.append(Row(name, route, f"latency_{label}_ms", group, value, low, high, times.size))
    return rows


def _stage_rows(
    name: str, group: str, stages: Mapping[str, FloatArray], chosen: IntArray
) -> list[Row]:
    sums = {stage: float(times[1:, chosen].sum()) for stage, times in stages.items()}
    whole = max(sum(sums.values()), 1e-9)
    count = next(iter(stages.values()))[1:, chosen].size
    rows = []
    for stage, total in sums.items():
        place = f"{group}: {stage}"
        rows.append(Row(name, "verdict", "stage_share", place, total / whole, None, None, count))
        mean = total / max(count, 1)
        rows.append(Row(name, "verdict", "stage_mean_ms", place, mean, None, None, count))
    return rows


def _ratio_rows(
    name: str, timings: Timings, base: Timings, by_file: Mapping[str, IntArray], seed: int
) -> list[Row]:
    """Return ratios to the first bundle: on all of a file, and where both did the same work."""
    both = {
        **by_file,
        CLEARED: np.flatnonzero(~timings.encoded & ~base.encoded),
        ENCODED: np.flatnonzero(timings.encoded & base.encoded),
    }
    rows = []
    for group, chosen in both.items():
        for route, ours, theirs in (
            ("verdict", timings.verdicts, base.verdicts),
            ("decide", timings.decisions, base.decisions),
        ):
            if not len(chosen):
                continue
            for label, q in QUANTILES:
                pair = ours[1:, chosen], theirs[1:, chosen]
                value, low, high = _ratio(*pair, q, seed)
                measure = f"latency_{label}_ratio"
                rows.append(Row(name, route, measure, group, value, low, high, pair[0].size))
    return rows


def _ratio(ours: FloatArray, theirs: FloatArray, q: float, seed: int) -> tuple[float, float, float]:
    """Return the ratio of two quantiles with its bootstrap interval; prompts are drawn in pairs."""
    values = [
        float(np.percentile(ours[:, draw], q) / np.percentile(theirs[:, draw], q))
        for draw in _draws(ours.shape[1], seed)
    ]
    low, high = (float(v) for v in np.percentile(values, (2.5, 97.5)))
    return float(np.percentile(ours, q) / np.percentile(theirs, q)), low, high


def _draws(count: int, seed: int) -> IntArray:
    rng = np.random.default_rng(seed)
    return rng.integers(count, size=(RESAMPLES, count))
