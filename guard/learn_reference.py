"""What corruptions are compared with: the clean model, and v_r of a model that never knew.

Measured once, kept in the search's log as figures by row; the texts are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from corruptions.evaluate import (
    SPEECH_ROWS,
    EnginePool,
    Figures,
    Floor,
    Judge,
    Speech,
    judge_speech,
    known_names,
)
from corruptions.objectives import Example, Heard, Measure, Values, chance, distance
from corruptions.spec import CorruptionSpec
from corruptions.trace import Record, Trace
from guard.learn_inputs import RetainedModel, Source
from guard.restore import NameRestorer
from guard.targets import Prompter
from guard.types import LearningEngine, Message, Prompt

KEY = "reference"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How corruptions are compared.

    Attributes:
        measures: What is compared, by name.
        source: Where v_r comes from.
        values: v_r by measure, for the source `retained-value`.
        retained: The model that never saw the forget set, for the source `retained-model`.
        scoring: False if the engines only generate.
        prompters: Corrupt questions, by draw of the noise.
    """

    measures: Mapping[str, Measure]
    source: Source
    values: Mapping[str, float]
    retained: RetainedModel | None
    scoring: bool
    prompters: Sequence[Prompter]

    @property
    def by_row(self) -> bool:
        """True if v_r is known for each row, rather than as one number."""
        return self.source in ("retained-model", "generic")

    def reference(self, examples: Sequence[Example], pool: EnginePool, trace: Trace) -> Record:
        """Measure the clean model and v_r on all rows, or take them from the log."""
        if KEY not in trace.records:
            other = self.retained.load() if self.retained is not None else None
            pool.run(
                [partial(self._measure, examples, other)], lambda _, record: trace.add(KEY, record)
            )
        return trace.records[KEY]

    def judge(
        self, rows: Sequence[Example], part: slice, reference: Record, pool: EnginePool
    ) -> Judge:
        """Make the judge of some rows: those at `part` of the rows of the reference."""
        retained = {n: np.array(values[part]) for n, values in reference["retained"].items()}
        return Judge(
            examples=rows,
            measures=self.measures,
            retained=retained,
            by_row=self.by_row,
            floor=Floor(Speech(**reference["speech"]), self._known(rows, pool)),
            make_prompt=self._corrupted,
            draws=len(self.prompters),
            scoring=self.scoring,
            put_back=self._put_back,
        )

    def clean(self, judge: Judge, part: slice, reference: Record) -> Figures:
        """Return the figures of the rows without any corruption."""
        values = {n: np.array(found[part]) for n, found in reference["clean"].items()}
        distances = {
            name: distance(found, judge.retained[name], by_row=self.by_row)
            for name, found in values.items()
        }
        means = {name: float(found.mean()) for name, found in values.items()}
        return Figures(float(np.mean(list(distances.values()))), 0.0, means, distances, {})

    def _measure(
        self, examples: Sequence[Example], other: LearningEngine | None, engine: LearningEngine
    ) -> Record:
        clean = Heard(engine, _plain(examples), examples)
        frames = self._generic(examples) if other is None else _plain(examples)
        framed = Heard(other or engine, frames, examples)
        found: dict[str, Any] = {
            "clean": {name: one.values(clean).tolist() for name, one in self.measures.items()},
            "retained": {
                name: self._retained(name, one, clean, framed).tolist()
                for name, one in self.measures.items()
            },
        }
        spoken = [judge_speech(engine, _some_texts(h), self.scoring) for h in (clean, framed)]
        return found | {"speech": asdict(_worse(*spoken))}

    def _retained(self, name: str, measure: Measure, clean: Heard, framed: Heard) -> Values:
        """Return v_r of each row."""
        if self.source == "retained-value":
            return np.full(len(clean.examples), self.values[name])
        if self.source == "chance":
            return chance(name, clean.examples)
        return measure.refusal(clean) if self.source == "refusal" else measure.values(framed)

    def _known(self, rows: Sequence[Example], pool: EnginePool) -> tuple[frozenset[str], ...]:
        """Names that would show knowledge, where no measure looks at answers; never logged."""
        if not rows or any(not one.scores for one in self.measures.values()):
            return ()
        some = rows[:SPEECH_ROWS]
        both = [*_plain(some), *self._generic(some)]
        found: list[str] = []
        pool.run(
            [lambda engine: Heard(engine, both, []).texts], lambda _, texts: found.extend(texts)
        )
        questions = [one.question for one in some]
        return known_names(questions, found[: len(some)], found[len(some) :])

    def _generic(self, rows: Sequence[Example]) -> list[Prompt]:
        """Ask about somebody else; where the question names nobody, ask something else."""
        return [self.prompters[0].generic_prompt(one.question) for one in rows]

    def _corrupted(self, question: str, spec: CorruptionSpec, draw: int) -> Prompt:
        return self.prompters[draw].prompt(question, spec)

    def _put_back(self, question: str, spec: CorruptionSpec, draw: int, answer: str) -> str:
        _, stand_ins = self.prompters[draw].corrupted(question, spec)
        return NameRestorer(stand_ins).restore(answer)


def _plain(rows: Sequence[Example]) -> list[Prompt]:
    return [(Message("user", one.question),) for one in rows]


def _some_texts(heard: Heard) -> list[str]:
    """Return the answers that a measure asked for, or else those to a few questions."""
    if "texts" in heard.__dict__:
        return heard.texts
    return Heard(heard.engine, heard.prompts[-SPEECH_ROWS:], []).texts


def _worse(one: Speech, other: Speech) -> Speech:
    """Return the worse of both, figure by figure."""
    nlls = [nll for nll in (one.nll, other.nll) if nll is not None and np.isfinite(nll)]
    return Speech(
        empty=max(one.empty, other.empty),
        repetitive=max(one.repetitive, other.repetitive),
        nll=max(nlls, default=None),
    )
