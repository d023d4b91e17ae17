"""What each stage of a request costs, in this process and without a server."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from benchmarks.latency import STAGES as VERDICT_STAGES
from benchmarks.latency import forgetful, metered
from benchmarks.report import Row
from benchmarks.serve_load import FIXED_PROMPT
from guard.errors import StageError
from guard.pipeline import Guard
from guard.request import parse_request
from guard.types import FloatArray, Progress

CHAT: Final = "/v1/chat/completions"
ROUNDS: Final = 3
STAGES: Final = ("parse", "view", *VERDICT_STAGES, "judge", "inspect")
"""`judge` is what turns scores into a decision; `inspect` is all of it, measured as a whole."""


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Microseconds of every stage.

    Attributes:
        stages: By name, of each plain prompt (the rounds' medians), shape (prompts,).
        encoded: Of each plain prompt, whether the encoder was needed.
        rewrite: Of flagged prompts, to put embeddings in the place of text, shape (flagged,).
        serialise: To write a plain request's fields again, shape (prompts,).
        encoder_pass: One pass of the encoder over ~75 tokens, shape (passes,).
    """

    stages: dict[str, FloatArray]
    encoded: FloatArray
    rewrite: FloatArray
    serialise: FloatArray
    encoder_pass: FloatArray


def time_stages(
    guard: Guard,
    plain: Sequence[str],
    asked: Sequence[str] = (),
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> StageTimes:
    """Time every stage on every prompt, one at a time; verdicts are not remembered.

    Args:
        guard: A loaded guard; its detector is told to remember nothing from now on.
        plain: Prompts as they come.
        asked: Prompts that it should flag, for the cost of rewriting.
        rounds: How often each is read.
        progress: Told how far it is.
    """
    report = progress or (lambda what, done, total: None)
    detector = forgetful(guard)
    bodies = [_body(text) for text in plain]
    times = {stage: np.zeros((rounds, len(bodies)), np.float32) for stage in STAGES}
    encoded = np.zeros(len(bodies), np.float32)
    for turn in range(rounds):
        for at, body in enumerate(bodies):
            times["inspect"][turn, at] = _us(lambda body=body: guard.inspect(CHAT, body))  # type: ignore[misc]
        with metered(detector) as spent:
            for at, body in enumerate(bodies):
                _read(guard, body, spent, times, (turn, at))
                encoded[at] = spent[VERDICT_STAGES[2]] > 0
        report("serve: stages", turn + 1, rounds)
    raws = [parse_request(CHAT, body).raw for body in bodies]
    return StageTimes(
        stages={stage: np.median(found, axis=0) for stage, found in times.items()},
        encoded=encoded,
        rewrite=_rewrites(guard, asked),
        serialise=np.array([_us(lambda r=r: msgspec.json.encode(r)) for r in raws], np.float32),  # type: ignore[misc]
        encoder_pass=_passes(detector._encoder, 10 * rounds),
    )


def _read(
    guard: Guard,
    body: bytes,
    spent: dict[str, float],
    times: dict[str, FloatArray],
    place: tuple[int, int],
) -> None:
    """Time the stages of one request one after another."""
    spent.update(dict.fromkeys(spent, 0.0))
    begun = time.perf_counter_ns()
    request = parse_request(CHAT, body)
    parsed = time.perf_counter_ns()
    texts = list(dict.fromkeys(reading.text for reading in guard._view(request).readings))
    viewed = time.perf_counter_ns()
    guard.detector.detect(texts)
    detected = time.perf_counter_ns()
    times["parse"][place] = (parsed - begun) / 1e3
    times["view"][place] = (viewed - parsed) / 1e3
    for stage, value in spent.items():
        times[stage][place] = value * 1e3
    own = (detected - viewed) / 1e3 - sum(spent.values()) * 1e3
    times[VERDICT_STAGES[-1]][place] = own
    whole = _us(lambda: guard.decide(request))
    times["judge"][place] = max(0.0, whole - (detected - parsed) / 1e3)


def _rewrites(guard: Guard, asked: Sequence[str]) -> FloatArray:
    found = []
    for text in asked:
        inspection = guard.inspect(CHAT, _body(text))
        if inspection.decision.flagged and inspection.decision.route != "pass":
            try:
                found.append(_us(lambda one=inspection: guard.rewrite(one)))  # type: ignore[misc]
            except StageError:  # no model files: this guard only decides
                break
    return np.array(found, np.float32)


def _passes(encoder: Any, count: int) -> FloatArray:
    windows = encoder.windows(FIXED_PROMPT)
    encoder.states(windows)  # the first allocates
    return np.array([_us(lambda: encoder.states(windows)) for _ in range(count)], np.float32)


def stage_rows(found: StageTimes) -> list[Row]:
    """Return the figures of the stages."""
    rows: list[Row] = []
    count = len(found.encoded)
    for stage, times in found.stages.items():
        rows += _times("guard", stage, times)
    for stage, times in (
        ("serialise", found.serialise),
        ("rewrite", found.rewrite),
        ("encoder pass", found.encoder_pass),
    ):
        if len(times):
            rows += _times("guard", stage, times)
    cleared = float(1.0 - found.encoded.mean())
    rows.append(Row("guard", "in process", "cleared_share", "plain", cleared, None, None, count))
    return rows


def _times(system: str, stage: str, times: FloatArray) -> list[Row]:
    figures = {
        "stage_mean_us": float(times.mean()),
        "stage_p50_us": float(np.percentile(times, 50)),
        "stage_p99_us": float(np.percentile(times, 99)),
    }
    return [
        Row(system, "in process", measure, stage, value, None, None, len(times))
        for measure, value in figures.items()
    ]


def _body(text: str) -> bytes:
    message = {"role": "user", "content": text}
    return msgspec.json.encode({"model": "mock", "messages": [message], "max_tokens": 16})


def _us(work: Callable[[], object]) -> float:
    begun = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - begun) / 1e3
