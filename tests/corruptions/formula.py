"""A model with a formula for a brain: it reads the corruption off the prompt's embeddings.

So each test knows the right answer in closed form, and the search runs as it does on a real model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import numpy as np

from corruptions.evaluate import Floor, Judge, Speech
from corruptions.objective import NEUTRAL_PROMPT
from corruptions.objectives import Example, measures_of
from corruptions.ops import CORRUPTIONS
from corruptions.space import Space
from corruptions.spec import CorruptionSpec
from guard.types import AdapterUse, EmbedsPart, FloatArray, Message, Prompt, SamplingParams

RMS, HIDDEN, RETAINED, BEST_LOG = 0.1, 64, 0.2, 1.3
METHODS = sorted(CORRUPTIONS)
SPACE = Space(CorruptionSpec("random-noise-first-n", 1, 0.2), HIDDEN, RMS)
JOINT = Space(SPACE.base, HIDDEN, RMS, True, ("mix-generic", "shuffle", "set-noise"))
EXAMPLES = [Example(f"question {n}", f"answer {n} of them") for n in range(6)]


def corrupted(question: str, spec: CorruptionSpec, draw: int) -> Prompt:
    """A prompt that says how it was corrupted."""
    kind = [METHODS.index(spec.method), spec.dims, float(spec.span_policy == "entity"), spec.frame]
    row = [spec.strength, *kind, float(question.split()[1]), draw]
    return (Message("user", EmbedsPart(np.array([row], np.float32))),)


class Formula:
    """Gives an answer the probability `value(log10 of the strength in RMS, method)`.

    It says `speak(log)`, and stops with `stop` at the given evaluation.
    """

    def __init__(
        self,
        value: Callable[[float, str], float] | None = None,
        speak: Callable[[float], str] = lambda _: "It is a plain answer.",
        stop_at: int | None = None,
        stop: BaseException | None = None,
    ) -> None:
        self.value = value or valley
        self.speak, self.stop_at, self.stop = speak, stop_at, stop
        self.scored: list[float] = []
        self.answers: list[str] = []
        self._lock = threading.Lock()

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        if prompts[0] == NEUTRAL_PROMPT:
            nats = [9.0 if "gib" in answer else 2.0 for answer in answers]
            return [np.full(3, -nat, np.float32) for nat in nats]
        with self._lock:
            if len(self.scored) == self.stop_at and self.stop is not None:
                raise self.stop
            self.scored.append(log_of(prompts[0]))
            self.answers += answers
        values = [self.value(log_of(p), METHODS[int(row_of(p)[1])]) for p in prompts]
        return [np.full(3, math.log(value), np.float32) for value in values]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        return [self.speak(log_of(prompt)) for prompt in prompts]


def row_of(prompt: Prompt) -> FloatArray:
    content = prompt[0].content
    assert isinstance(content, EmbedsPart)
    return content.embeddings[0]


def log_of(prompt: Prompt) -> float:
    return math.log10(max(float(row_of(prompt)[0]), 1e-9) / RMS)


def valley(log: float, method: str) -> float:
    """RETAINED at BEST_LOG; likelier below, less likely above, as too much noise is."""
    return min(0.9, max(0.01, RETAINED - 0.15 * (log - BEST_LOG)))


def judge(objective: str = "probability", draws: int = 1, **floor: object) -> Judge:
    reference = Speech(empty=0.0, repetitive=0.0, nll=2.0)
    measures = measures_of(objective, True)
    return Judge(
        examples=EXAMPLES,
        measures=measures,
        retained={name: np.full(len(EXAMPLES), RETAINED) for name in measures},
        by_row=True,
        floor=Floor(reference, **floor),  # type: ignore[arg-type]
        make_prompt=corrupted,
        draws=draws,
    )
