"""From a candidate to its loss: the distance to the retained values, and a floor of fluency.

All rows and all draws of the noise go to the engine as one batch. Candidates run in parallel over
several engines; one that fails is tried again, on another engine if there is one.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

import numpy as np

from corruptions.objective import (
    NEUTRAL_PROMPT,
    FluencyFloor,
    is_repetitive,
    names_in,
    words_of,
)
from corruptions.objectives import Example, Heard, Measure, Values, distance
from corruptions.spec import CorruptionSpec
from guard.errors import EngineError, EngineUnavailableError
from guard.types import LearningEngine, Prompt

T = TypeVar("T")

SPEECH_ROWS: Final = 8
"""Rows whose answers are generated for the floor alone, where no measure generates."""

PENALTY: Final = 0.5
"""Least loss added below the floor: more than any corruption gains by it."""

PromptMaker = Callable[[str, CorruptionSpec, int], Prompt]
"""Corrupts a question; the number chooses the draw of the noise, 0 being the one served."""


@dataclass(frozen=True, slots=True)
class Speech:
    """What a model says, in figures.

    Attributes:
        empty: Share of answers without a word.
        repetitive: Share of answers in which four words in a row occur three times.
        nll: Mean nats per answer token under the unguarded model after a neutral prompt, infinite
            if every answer is empty; None where the engine can't score.
        leaking: Share of answers that hold a name of the clean answers; 0 where that isn't asked.
    """

    empty: float
    repetitive: float
    nll: float | None
    leaking: float = 0.0


@dataclass(frozen=True, slots=True)
class Floor:
    """The least fluency that a corruption has to keep, and the names that must not come back.

    Attributes:
        reference: The figures of fluent answers: the worse of the clean model's and of *retained*'s
            (or its surrogate's).
        known: For each row the names that only a model that knows would say; empty where a measure
            looks at the answers itself.
    """

    reference: Speech
    known: tuple[frozenset[str], ...] = ()

    def excess(self, speech: Speech, rows: int) -> dict[str, float]:
        """Return by how much answers of `rows` rows break the floor; nothing if they pass."""
        slack = 1.0 / max(1, rows)
        over = {
            "empty": speech.empty - self.reference.empty,
            "repetitive": speech.repetitive - self.reference.repetitive - slack,
            "leaking": speech.leaking - FluencyFloor.LEAK_LIMIT if self.known else 0.0,
        }
        if speech.nll is not None and self.reference.nll is not None:
            over["unnatural"] = speech.nll - self.reference.nll - FluencyFloor.NLL_MARGIN
        return {name: min(float(by), 1.0) for name, by in over.items() if by > 1e-9}


@dataclass(frozen=True, slots=True)
class Figures:
    """What one evaluation found.

    Attributes:
        loss: Mean distance of the measures, and the penalty.
        penalty: 0 where the answers pass the floor.
        values: m by measure, mean over rows and draws.
        distances: Distance to v_r by measure.
        broken: What of the floor is broken, and by how much.
    """

    loss: float
    penalty: float
    values: Mapping[str, float]
    distances: Mapping[str, float]
    broken: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Judge:
    """Evaluates corruptions on some rows.

    Attributes:
        examples: The rows.
        measures: What is compared, by name.
        retained: v_r by measure, shape (rows,).
        by_row: False where v_r is one number for all rows.
        floor: The least fluency; its `known` belongs to the first rows.
        make_prompt: Corrupts a question.
        put_back: Makes of an answer to a corrupted question what a client would get, given the
            question, the corruption, the draw and the answer; None leaves answers as they are.
        draws: Draws of the noise to average over, at least 1.
        scoring: False where the engines only generate.
        seen: Figures by a digest of the corrupted prompts, of this run: beyond some strength many
            corruptions come out the same. In memory alone, as it is a digest of forget rows.
    """

    examples: Sequence[Example]
    measures: Mapping[str, Measure]
    retained: Mapping[str, Values]
    by_row: bool
    floor: Floor
    make_prompt: PromptMaker
    draws: int = 1
    scoring: bool = True
    put_back: Callable[[str, CorruptionSpec, int, str], str] | None = None
    seen: dict[bytes, Figures] = field(default_factory=dict)

    def evaluate(self, engine: LearningEngine, spec: CorruptionSpec) -> Figures:
        """Let the model answer the corrupted questions."""
        draws = self._prompts(spec)
        flat = [prompt for prompts in draws for prompt in prompts]
        digest = _digest(flat)
        if digest not in self.seen:
            heard = Heard(
                engine, flat, list(self.examples) * len(draws), partial(self._as_served, spec)
            )
            self.seen[digest] = self._figures(heard, len(draws))
        return self.seen[digest]

    def clean(self, engine: LearningEngine, prompts: Sequence[Prompt]) -> Figures:
        """Evaluate prompts as they are, one a row."""
        return self._figures(Heard(engine, prompts, self.examples), 1)

    def _figures(self, heard: Heard, draws: int) -> Figures:
        values = {
            name: one.values(heard).reshape(draws, len(self.examples))
            for name, one in self.measures.items()
        }
        distances = {
            name: distance(found, self.retained[name], by_row=self.by_row)
            for name, found in values.items()
        }
        broken = self._broken(heard)
        penalty = PENALTY + sum(broken.values()) if broken else 0.0
        loss = float(np.mean(list(distances.values()))) + penalty
        means = {name: float(found.mean()) for name, found in values.items()}
        return Figures(loss, penalty, means, distances, broken)

    def _broken(self, heard: Heard) -> dict[str, float]:
        # What a measure generated is there already; otherwise a few rows have to do.
        generated = "texts" in heard.__dict__
        rows = len(heard.prompts) if generated else min(SPEECH_ROWS, len(self.examples))
        some = (
            heard if generated else Heard(heard.engine, heard.prompts[:rows], [], heard.as_served)
        )
        known = () if generated else self.floor.known[:rows]
        speech = judge_speech(heard.engine, some.texts, self.scoring, known)
        return self.floor.excess(speech, rows)

    def _as_served(self, spec: CorruptionSpec, answers: Sequence[str]) -> list[str]:
        """Return answers, the rows' in order for each draw in turn, as clients get them."""
        if self.put_back is None:
            return list(answers)
        rows = len(self.examples)
        return [
            self.put_back(self.examples[place % rows].question, spec, place // rows, answer)
            for place, answer in enumerate(answers)
        ]

    def _prompts(self, spec: CorruptionSpec) -> list[list[Prompt]]:
        """Corrupt the questions, shape (draws, rows); a method without noise needs one draw."""
        questions = [example.question for example in self.examples]
        first = [self.make_prompt(question, spec, 0) for question in questions]
        others = []
        for draw in range(1, self.draws):
            prompts = [self.make_prompt(question, spec, draw) for question in questions]
            if _digest(prompts) == _digest(first):
                break
            others.append(prompts)
        return [first, *others]


def judge_speech(
    engine: LearningEngine,
    answers: Sequence[str],
    scoring: bool,
    known: Sequence[frozenset[str]] = (),
) -> Speech:
    """Judge answers.

    Args:
        engine: The unguarded model.
        answers: What was said, at least one.
        scoring: False if the engine can't score.
        known: Names that the answers must not hold, by answer; empty to leave that out.
    """
    said = [answer for answer in answers if words_of(answer)]
    nll: float | None = None
    if scoring:
        scores = engine.score_answers([NEUTRAL_PROMPT] * len(said), said) if said else []
        nll = -float(np.mean(np.concatenate(scores))) if scores else float("inf")
    leaks = [bool(names_in(a) & names) for a, names in zip(answers, known, strict=False)]
    return Speech(
        empty=1.0 - len(said) / len(answers),
        repetitive=float(np.mean([is_repetitive(answer) for answer in answers])),
        nll=nll,
        leaking=float(np.mean(leaks)) if leaks else 0.0,
    )


def known_names(
    questions: Sequence[str], clean: Sequence[str], other: Sequence[str]
) -> tuple[frozenset[str], ...]:
    """Return the names of clean answers that neither the question nor the other answer brings up.

    Args:
        questions: The forget questions.
        clean: The unguarded model's answers to them.
        other: Answers that show what the question's frame alone brings up.
    """
    return tuple(
        frozenset(names_in(known) - names_in(generic) - words_of(question))
        for question, known, generic in zip(questions, clean, other, strict=True)
    )


def _digest(prompts: Sequence[Prompt]) -> bytes:
    """Return a digest by which equal prompts are known."""
    whole = hashlib.sha256()
    for message in (message for prompt in prompts for message in prompt):
        content = message.content
        data = content.encode() if isinstance(content, str) else content.embeddings.tobytes()
        whole.update(hashlib.sha256(data).digest())
    return whole.digest()


# --- Several engines -----------------------------------------------------------------------------


class EnginePool:
    """Runs jobs over engines, one at a time on each.

    Args:
        engines: The engines by the names that notes use, at least one.
        note: Told when an engine is given up.
        retry_s: Seconds before the first try anew; each further one waits twice as long.
    """

    FAILURES: Final = 3
    """Failures in a row after which an engine is given up."""

    LONGEST_WAIT_S: Final = 30.0

    def __init__(
        self,
        engines: Sequence[tuple[str, LearningEngine]],
        note: Callable[[str], None],
        retry_s: float = 1.0,
    ) -> None:
        self._engines = list(engines)
        self._note, self._retry_s = note, retry_s
        self._failures = [0] * len(self._engines)
        self._last: Exception | None = None

    @property
    def alive(self) -> list[int]:
        """Engines that were not given up."""
        return [i for i, failed in enumerate(self._failures) if failed < self.FAILURES]

    def run(
        self, jobs: Sequence[Callable[[LearningEngine], T]], done: Callable[[int, T], None]
    ) -> None:
        """Run all jobs.

        Args:
            jobs: What to do with an engine.
            done: Told each job's number and result, in the order in which they end.

        Raises:
            EngineUnavailableError: If every engine was given up; `done` has seen what was finished.
        """
        if not jobs:
            return
        if len(self._engines) == 1:
            for number, job in enumerate(jobs):
                done(number, self._alone(job))
            return
        self._spread(jobs, done)

    def _alone(self, job: Callable[[LearningEngine], T]) -> T:
        """Run a job on the only engine, in this thread, so that Ctrl-C ends it at once."""
        while self.alive:
            self._pause(0)
            try:
                result = job(self._engines[0][1])
            except (EngineError, OSError) as error:
                self._failed(0, error)
            else:
                self._failures[0] = 0
                return result
        raise self._gone()

    def _spread(
        self, jobs: Sequence[Callable[[LearningEngine], T]], done: Callable[[int, T], None]
    ) -> None:
        waiting = deque(range(len(jobs)))
        failed_on: list[set[int]] = [set() for _ in jobs]
        running: dict[Future[T], tuple[int, int]] = {}
        executor = ThreadPoolExecutor(len(self._engines))
        try:
            while waiting or running:
                self._start(executor, jobs, waiting, failed_on, running)
                if not running:
                    raise self._gone()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number, engine = running.pop(future)
                    try:
                        result = future.result()
                    except (EngineError, OSError) as error:
                        self._failed(engine, error)
                        failed_on[number].add(engine)
                        waiting.appendleft(number)
                    else:
                        self._failures[engine] = 0
                        done(number, result)
        finally:
            executor.shutdown(wait=False, cancel_futures=True)

    def _start(
        self,
        executor: ThreadPoolExecutor,
        jobs: Sequence[Callable[[LearningEngine], T]],
        waiting: deque[int],
        failed_on: Sequence[set[int]],
        running: dict[Future[T], tuple[int, int]],
    ) -> None:
        """Give each idle engine a job, one that did not fail on it if there is one."""
        busy = {engine for _, engine in running.values()}
        alive = set(self.alive)
        for engine in sorted(alive - busy):
            fresh = [n for n in waiting if engine not in failed_on[n] or failed_on[n] >= alive]
            if fresh:
                waiting.remove(fresh[0])
                future = executor.submit(self._run, jobs[fresh[0]], engine)
                running[future] = (fresh[0], engine)

    def _run(self, job: Callable[[LearningEngine], T], engine: int) -> T:
        self._pause(engine)
        return job(self._engines[engine][1])

    def _pause(self, engine: int) -> None:
        """Wait before an engine that has just failed is tried again."""
        failures = self._failures[engine]
        if failures:
            time.sleep(min(self._retry_s * 2.0 ** (failures - 1), self.LONGEST_WAIT_S))

    def _failed(self, engine: int, error: Exception) -> None:
        self._last = error
        self._failures[engine] += 1
        if self._failures[engine] == self.FAILURES:
            self._note(
                f"engine {self._engines[engine][0]} failed {self.FAILURES} times in a row and is "
                f"left out: {error}"
            )

    def _gone(self) -> EngineUnavailableError:
        return EngineUnavailableError(
            f"no engine is left ({self._last}); what was evaluated is kept: run the same command "
            "again to resume"
        )
