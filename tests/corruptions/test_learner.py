"""The search: logged, resumable to the same result, and independent of who finishes first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from corruptions.evaluate import EnginePool
from corruptions.learner import Trial, before, search, validate
from corruptions.search import make_optimiser
from corruptions.space import Space
from corruptions.trace import Trace
from guard.errors import ConfigError, EngineUnavailableError
from guard.types import AdapterUse, FloatArray, Prompt
from tests.corruptions.formula import BEST_LOG, JOINT, RMS, SPACE, Formula, judge, log_of

IDENTITY = {"search": "test"}
BUDGET = 18


def run(
    path: Path,
    engines: Sequence[Formula],
    optimizer: str = "nevergrad:CMA",
    space: Space = SPACE,
    parallel: int = 1,
    seed: int = 1,
) -> list[Trial]:
    pool = EnginePool([(str(n), one) for n, one in enumerate(engines)], print, 0.001)
    optimiser = make_optimiser(optimizer, space, BUDGET, seed, parallel)
    trace = Trace(path, IDENTITY)
    return search(space, optimiser, judge(), pool, trace, BUDGET, lambda *_: None)


def test_it_finds_the_best_strength(tmp_path: Path) -> None:
    trials = run(tmp_path / "log", [Formula()])
    best = min(trials, key=lambda one: one.train.loss)
    assert best.train.loss < 0.03
    assert abs(log_of_trial(best) - BEST_LOG) < 0.25
    assert [one.number for one in trials] == list(range(BUDGET))


@pytest.mark.parametrize("parallel", [1, 2, 3])
@pytest.mark.parametrize(
    ("optimizer", "space"),
    [
        ("eco-zo", SPACE),
        ("nevergrad:OnePlusOne", JOINT),
        ("nevergrad:TBPSA", SPACE),
        ("nevergrad:NGOpt", JOINT),
    ],
)
@pytest.mark.parametrize("stop_at", [0, 4, 9])
def test_interrupted_and_resumed_it_ends_the_same(
    tmp_path: Path, optimizer: str, space: Space, parallel: int, stop_at: int
) -> None:
    options = (optimizer, space, parallel)
    whole = Formula()
    wanted = run(tmp_path / "whole", [whole], *options)
    stopped = Formula(stop_at=stop_at, stop=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "log", [stopped], *options)
    rest = Formula()
    assert run(tmp_path / "log", [rest], *options) == wanted
    assert stopped.scored + rest.scored == whole.scored, "nothing is evaluated twice"
    silent = Formula()
    assert run(tmp_path / "log", [silent], *options) == wanted
    assert not silent.scored, "a finished search asks nothing"


class Slow(Formula):
    """Takes the longer the weaker the corruption is: the first asked may end last."""

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        if len(prompts[0]) and not isinstance(prompts[0][0].content, str):
            time.sleep(0.01 * max(0.0, 4 - log_of(prompts[0])))
        return super().score_answers(prompts, answers, adapters)


def test_who_finishes_first_does_not_matter(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", [Formula()], parallel=3)
    together = run(tmp_path / "together", [Slow(), Formula(), Slow()], parallel=3)
    assert together == alone


def test_engines_that_go_away_leave_a_log_to_go_on_with(tmp_path: Path) -> None:
    wanted = run(tmp_path / "whole", [Formula()], parallel=2)
    gone = [Formula(stop_at=3, stop=EngineUnavailableError("refused")) for _ in range(2)]
    with pytest.raises(EngineUnavailableError, match="resume"):
        run(tmp_path / "log", gone, parallel=2)
    assert sum(len(one.scored) for one in gone) == 6
    assert len(Trace(tmp_path / "log", IDENTITY).records) >= 6
    assert run(tmp_path / "log", [Formula()], parallel=2) == wanted


def test_a_log_of_other_points_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "log", [Formula()], seed=1)
    with pytest.raises(ConfigError, match="other points"):
        run(tmp_path / "log", [Formula()], seed=2)


def test_equal_corruptions_are_evaluated_once(tmp_path: Path) -> None:
    space = Space(SPACE.base, 64, RMS, True, ("shuffle", "reverse-order"))
    engine = Formula()
    trials = run(tmp_path / "log", [engine], "nevergrad:OnePlusOne", space)
    assert len(trials) == BUDGET
    assert len(engine.scored) == len({one.spec for one in trials}) < BUDGET


def test_held_out_rows_choose(tmp_path: Path) -> None:
    """On the train rows one strength is best, on the validation rows another."""
    trace = Trace(tmp_path / "log", IDENTITY)
    pool = EnginePool([("one", Formula())], print)
    other = EnginePool([("two", Formula(lambda log, method: 0.2 if log < 1.25 else 0.9))], print)
    old = before(SPACE.spec({"log_strength": -2.0}), judge(), pool, trace)
    assert old.number == -1
    optimiser = make_optimiser("eco-zo", SPACE, BUDGET, 0, 1)
    trials = search(SPACE, optimiser, judge(), pool, trace, BUDGET, lambda *_: None)
    finalists = validate([old, *trials], judge(), other, trace, lambda *_: None)
    by_train = min(trials, key=lambda one: one.train.loss)
    assert log_of_trial(by_train) > 1.25 > log_of_trial(finalists[0])
    assert finalists[0].validation.loss == pytest.approx(0.0, abs=1e-4)
    again = validate([old, *trials], judge(), EnginePool([], print), trace, lambda *_: None)
    assert again == finalists, "the log knows them"
    assert validate(trials, None, pool, trace, lambda *_: None)[0] == by_train


def test_below_the_floor_on_either_part_comes_last(tmp_path: Path) -> None:
    """The best on the train rows babbles on the validation rows alone."""
    trace = Trace(tmp_path / "log", IDENTITY)
    pool = EnginePool([("one", Formula())], print)
    optimiser = make_optimiser("eco-zo", SPACE, BUDGET, 0, 1)
    trials = search(SPACE, optimiser, judge(), pool, trace, BUDGET, lambda *_: None)
    best = min(trials, key=lambda one: one.train.loss)
    babble = "a b c d " * 8
    worse = Formula(
        speak=lambda log: babble if log == pytest.approx(log_of_trial(best)) else "Yes."
    )
    finalists = validate(
        trials, judge(), EnginePool([("two", worse)], print), trace, lambda *_: None
    )
    last = finalists[-1]
    assert last.spec == best.spec and last.broken
    assert not last.train.broken and not finalists[0].broken


def log_of_trial(trial: Trial) -> float:
    import math

    return math.log10(trial.spec.strength / RMS)
