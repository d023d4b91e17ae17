"""The search itself: ask, evaluate, log, tell; then choose among the best by rows not searched on.

Every evaluation is in the log before its loss counts. A resumed search asks again in the same
order and takes from the log what is there, so it ends as an uninterrupted one would.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

from corruptions.evaluate import EnginePool, Figures, Judge
from corruptions.search import Optimiser
from corruptions.space import Point, Space
from corruptions.spec import CorruptionSpec
from corruptions.trace import Record, Trace
from guard.errors import ConfigError
from guard.types import LearningEngine, Progress

FINALISTS: Final = 5
"""Best corruptions by train loss, among which the validation rows decide."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One corruption that was evaluated.

    Attributes:
        number: When, from 0.
        spec: The corruption.
        train: Its figures on the rows searched on.
        validation: On the others, if it was a finalist.
    """

    number: int
    spec: CorruptionSpec
    train: Figures
    validation: Figures | None = None

    @property
    def broken(self) -> tuple[str, ...]:
        """What is below the fluency floor, on either part of the rows."""
        both = [*self.train.broken, *(self.validation.broken if self.validation else ())]
        return tuple(dict.fromkeys(both))


def search(
    space: Space,
    optimiser: Optimiser,
    judge: Judge,
    pool: EnginePool,
    trace: Trace,
    budget: int,
    progress: Progress,
) -> list[Trial]:
    """Spend the budget; return every trial, in order.

    Args:
        space: What points stand for.
        optimiser: Fresh: it is told the log's losses first.
        judge: Evaluates on the train rows.
        pool: The engines.
        trace: The log; records of an earlier run in it are not evaluated again.
        budget: Evaluations in all; equal corruptions count, but are evaluated once.
        progress: Told the best loss so far.

    Raises:
        ConfigError: If the log's points are not those that the optimiser asks.
        EngineUnavailableError: If no engine is left.
    """
    trials: list[Trial] = []
    while len(trials) < budget:
        first = len(trials)
        count = min(optimiser.room, budget - first)
        points = [optimiser.ask() for _ in range(count)]
        _evaluate(space, points, first, judge, pool, trace, partial(_show, progress, trace, budget))
        for number in range(first, first + count):
            record = trace.records[_key(number)]
            trials.append(Trial(number, CorruptionSpec.from_dict(record["spec"]), _figures(record)))
            optimiser.tell(trials[-1].train.loss)
    return trials


def before(spec: CorruptionSpec, judge: Judge, pool: EnginePool, trace: Trace) -> Trial:
    """Evaluate what the bundle holds when the search begins; the search has to beat it."""

    def done(_: int, record: Record) -> None:
        trace.add("before", record)

    if "before" not in trace.records:
        pool.run([partial(_timed, judge, spec)], done)
    record = trace.records["before"]
    return Trial(-1, CorruptionSpec.from_dict(record["spec"]), _figures(record))


def validate(
    trials: Sequence[Trial],
    judge: Judge | None,
    pool: EnginePool,
    trace: Trace,
    progress: Progress,
) -> list[Trial]:
    """Evaluate the best trials on the validation rows; return them, the best by those first.

    Without a judge, the loss on the train rows has to decide.
    """
    best: dict[CorruptionSpec, Trial] = {}
    for trial in sorted(trials, key=lambda one: (one.train.loss, one.number)):
        best.setdefault(trial.spec, trial)
    finalists = list(best.values())[:FINALISTS]
    if judge is None:
        return finalists
    missing = [one for one in finalists if f"validation/{one.number}" not in trace.records]

    def done(place: int, record: Record) -> None:
        trace.add(f"validation/{missing[place].number}", record)
        known = sum(f"validation/{one.number}" in trace.records for one in finalists)
        progress("choose by validation rows", known, len(finalists))

    pool.run([partial(_timed, judge, one.spec) for one in missing], done)
    found = [
        Trial(one.number, one.spec, one.train, _figures(trace.records[f"validation/{one.number}"]))
        for one in finalists
    ]
    return sorted(found, key=_validation_loss)


def _validation_loss(trial: Trial) -> tuple[bool, float, float, int]:
    """Order finalists: what breaks the floor on either part of the rows comes last."""
    loss = trial.validation.loss if trial.validation is not None else trial.train.loss
    return bool(trial.broken), loss, trial.train.loss, trial.number


def _evaluate(
    space: Space,
    points: Sequence[Point],
    first: int,
    judge: Judge,
    pool: EnginePool,
    trace: Trace,
    show: Callable[[], None],
) -> None:
    """See to it that the log has a record of each point."""
    specs = [space.spec(point) for point in points]
    known = {
        CorruptionSpec.from_dict(record["spec"]): record
        for key, record in trace.records.items()
        if key.startswith("train/")
    }
    todo: dict[CorruptionSpec, int] = {}
    for place, (point, spec) in enumerate(zip(points, specs, strict=True)):
        record = trace.records.get(_key(first + place))
        if record is not None:
            _check_point(record, point, trace)
        elif spec not in known:
            todo.setdefault(spec, place)

    def done(number: int, record: Record) -> None:
        place = list(todo.values())[number]
        known[specs[place]] = record
        trace.add(_key(first + place), {"point": dict(points[place]), **record})
        show()

    pool.run([partial(_timed, judge, spec) for spec in todo], done)
    for place, spec in enumerate(specs):
        if _key(first + place) not in trace.records:
            copied = {**known[spec], "point": dict(points[place]), "seconds": 0.0}
            trace.add(_key(first + place), copied)
    show()


def _timed(judge: Judge, spec: CorruptionSpec, engine: LearningEngine) -> Record:
    begun = time.perf_counter()
    figures = judge.evaluate(engine, spec)
    record: Record = {"spec": spec.to_dict(), **asdict(figures)}
    return record | {"seconds": round(time.perf_counter() - begun, 3)}


def _figures(record: Mapping[str, Any]) -> Figures:
    return Figures(
        loss=record["loss"],
        penalty=record["penalty"],
        values=record["values"],
        distances=record["distances"],
        broken=record["broken"],
    )


def _show(progress: Progress, trace: Trace, budget: int) -> None:
    losses = [rec["loss"] for key, rec in trace.records.items() if key.startswith("train/")]
    if losses:
        progress(f"learn corruption · best loss {min(losses):.4f}", len(losses), budget)


def _check_point(record: Record, point: Point, trace: Trace) -> None:
    if record.get("point") != dict(point):
        raise ConfigError(
            f"{trace.path} can't be resumed: the optimizer asks for other points than the log "
            "holds (another version of it?); give --restart to begin anew"
        )


def _key(number: int) -> str:
    return f"train/{number}"
