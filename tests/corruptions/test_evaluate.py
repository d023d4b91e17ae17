"""From candidates to losses: batches, draws, the fluency floor, and engines that fail."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import pytest

from corruptions.evaluate import EnginePool, Floor, Speech, judge_speech, known_names
from guard.errors import ConfigError, EngineUnavailableError
from guard.types import LearningEngine
from tests.corruptions.formula import (
    BEST_LOG,
    EXAMPLES,
    RETAINED,
    RMS,
    SPACE,
    Formula,
    judge,
    valley,
)


def spec_at(log: float) -> object:
    return SPACE.spec({"log_strength": log})


def test_the_loss_is_the_distance() -> None:
    engine = Formula()
    figures = judge().evaluate(engine, spec_at(0.3))
    assert figures.values["probability"] == pytest.approx(valley(0.3, ""), rel=1e-4)
    assert figures.loss == pytest.approx(abs(valley(0.3, "") - RETAINED), rel=1e-4)
    assert judge().evaluate(engine, spec_at(BEST_LOG)).loss == pytest.approx(0.0, abs=1e-4)
    # One batch of all rows, and the answers as they are.
    assert engine.answers[: len(EXAMPLES)] == [one.answer for one in EXAMPLES]
    assert len(engine.scored) == 2


def test_draws_are_averaged_in_one_batch() -> None:
    engine = Formula()
    judge(draws=3).evaluate(engine, spec_at(0.3))
    assert len(engine.scored) == 1
    assert len(engine.answers) == 3 * len(EXAMPLES)


def test_corruptions_that_come_out_the_same_are_evaluated_once() -> None:
    engine, one = Formula(), judge()
    other = replace(spec_at(0.3), strength=spec_at(0.3).strength + 1e-9)
    assert other != spec_at(0.3)
    assert one.evaluate(engine, spec_at(0.3)) == one.evaluate(engine, other)
    assert len(engine.scored) == 1


@pytest.mark.parametrize(
    ("text", "broken"),
    [
        ("gib", "unnatural"),
        ("", "empty"),
        ("so it goes on " * 5, "repetitive"),
        ("She is called Vantorre.", "leaking"),
    ],
)
def test_gibberish_never_wins(text: str, broken: str) -> None:
    """At the best strength the answers are wrecked; a worse one that speaks has to win."""
    engine = Formula(speak=lambda log: text if log > 1 else "It is a plain answer.")
    one = judge(known=(frozenset({"vantorre"}),) * len(EXAMPLES))
    wrecked, fluent = (one.evaluate(engine, spec_at(log)) for log in (BEST_LOG, 0.0))
    assert broken in wrecked.broken
    assert wrecked.distances["probability"] < fluent.distances["probability"]
    assert fluent.penalty == 0
    assert fluent.loss < wrecked.loss


def test_the_worse_the_speech_the_greater_the_penalty() -> None:
    floor = Floor(Speech(0.0, 0.0, 2.0))
    some, more = (floor.excess(Speech(share, 0.0, 2.0), 10) for share in (0.1, 0.5))
    assert some["empty"] < more["empty"]
    assert not floor.excess(Speech(0.0, 0.1, 3.5), 10), "within the slack and the margin"
    assert not floor.excess(Speech(0.0, 0.0, None), 10), "an engine that can't score"


def test_speech_without_scores() -> None:
    speech = judge_speech(Formula(), ["One.", "", "gib"], scoring=False)
    assert speech == Speech(empty=pytest.approx(1 / 3), repetitive=0.0, nll=None)


def test_only_names_that_knowledge_brings_up_count() -> None:
    names = known_names(
        ["Who is Ilse Vantorre?"],
        ["The poet Ilse Vantorre came from Oostende in Belgium."],
        ["The poet Peter Fischer came from Berlin in Belgium."],
    )
    assert names == (frozenset({"oostende"}),)


# --- Several engines -----------------------------------------------------------------------------


class Broken(Formula):
    """An engine that fails at the given calls."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.fails, self.calls = fails, 0

    def work(self) -> None:
        self.calls += 1
        if self.fails(self.calls):
            raise EngineUnavailableError("connection refused")


def run(pool: EnginePool, count: int, pause: float = 0.0) -> dict[int, int]:
    def job(number: int) -> Callable[[LearningEngine], int]:
        def work(engine: LearningEngine) -> int:
            assert isinstance(engine, Broken)
            engine.work()
            time.sleep(pause)
            return number * number

        return work

    found: dict[int, int] = {}
    pool.run([job(number) for number in range(count)], found.__setitem__)
    return found


def squares(count: int) -> dict[int, int]:
    return {number: number * number for number in range(count)}


def test_all_jobs_are_done_on_all_engines() -> None:
    engines = [Broken(lambda call: False) for _ in range(3)]
    pool = EnginePool([(str(n), one) for n, one in enumerate(engines)], print)
    assert run(pool, 9, 0.01) == squares(9)
    assert all(one.calls for one in engines)


def test_a_failure_is_tried_again_elsewhere() -> None:
    once, good = Broken(lambda call: call == 1), Broken(lambda call: False)
    notes: list[str] = []
    pool = EnginePool([("once", once), ("good", good)], notes.append, retry_s=0.01)
    assert run(pool, 6, 0.01) == squares(6)
    assert not notes
    assert pool.alive == [0, 1]


def test_an_engine_that_keeps_failing_is_left_out() -> None:
    dead, good = Broken(lambda call: True), Broken(lambda call: False)
    notes: list[str] = []
    pool = EnginePool([("dead", dead), ("good", good)], notes.append, retry_s=0.01)
    assert run(pool, 12, 0.02) == squares(12)
    assert run(pool, 12, 0.02) == squares(12)
    assert pool.alive == [1]
    assert dead.calls == EnginePool.FAILURES
    assert len(notes) == 1
    assert "dead" in notes[0]


@pytest.mark.parametrize("count", [1, 2])
def test_when_all_are_gone_it_says_how_to_go_on(count: int) -> None:
    engines = [Broken(lambda call: call > 2) for _ in range(count)]
    pool = EnginePool([(str(n), one) for n, one in enumerate(engines)], lambda _: None, 0.01)
    found: dict[int, int] = {}

    def work(engine: LearningEngine) -> int:
        assert isinstance(engine, Broken)
        engine.work()
        return 1

    with pytest.raises(EngineUnavailableError, match="same command"):
        pool.run([work] * 20, found.__setitem__)
    assert len(found) == 2 * count, "what was finished was told"


def test_a_mistake_is_no_failure_of_the_engine() -> None:
    def wrong(engine: LearningEngine) -> int:
        raise ConfigError("no likelihood over HTTP")

    for count in (1, 2):
        engines = [(str(n), Broken(lambda call: False)) for n in range(count)]
        with pytest.raises(ConfigError, match="likelihood"):
            EnginePool(engines, print).run([wrong], lambda *_: None)


def test_engines_work_at_the_same_time() -> None:
    barrier = threading.Barrier(2, timeout=10)
    pool = EnginePool([(str(n), Broken(lambda call: False)) for n in range(2)], print)
    pool.run([lambda engine: barrier.wait()] * 2, lambda *_: None)
    assert RMS > 0
