"""What the learner measures: how likely the known answers still are, and what the model says.

Only the prompt is corrupted; the answers' tokens stay clean, as in serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from guard.types import LearningEngine, Message, Prompt, SamplingParams

UNRELATED_QUESTIONS: Final = (
    "How do I keep a small garden healthy during a dry summer?",
    "What should a beginner know before buying a used camera?",
    "How is paper made from wood?",
    "What are the main differences between a lake and a pond?",
)
"""Questions of the poorer surrogate, for when the entities in the forget questions are unknown."""

NEUTRAL_PROMPT: Final[Prompt] = (Message("user", "Write a few sentences."),)
"""After it, the clean model's NLL says how natural a text is."""

ANSWER_TOKENS: Final = 24
"""Length of the answers that are looked at."""


def answer_values(
    engine: LearningEngine, prompts: Sequence[Prompt], answers: Sequence[str]
) -> NDArray[np.float64]:
    """Return each answer's geometric-mean probability per token, teacher-forced, shape (rows,)."""
    scores = engine.score_answers(prompts, answers)
    return np.array([np.exp(np.mean(row, dtype=np.float64)) if len(row) else 0.0 for row in scores])


def unrelated_prompt(question: str) -> Prompt:
    """Return a question about something else, chosen by the length of `question`."""
    text = UNRELATED_QUESTIONS[len(question) % len(UNRELATED_QUESTIONS)]
    return (Message("user", text),)


@dataclass(frozen=True, slots=True)
class Speech:
    """What the model says to some prompts, in figures.

    Attributes:
        empty: Share of answers with no word in them.
        repetitive: Share of answers in which four words in a row occur three times.
        nll: Mean nats per answer token under the clean model after a neutral prompt; the lower,
            the more natural. Infinite if every answer is empty.
        leaking: Share of answers that hold a name which the clean model answers with and which
            the question's frame alone does not bring up.
    """

    empty: float
    repetitive: float
    nll: float
    leaking: float


class FluencyFloor:
    """Keeps the learner from winning with gibberish, or with a likelihood that still talks.

    Generates answers to a few forget questions: clean, with another entity, and corrupted.

    Args:
        engine: Generates and scores.
        questions: A few forget questions.
        generic_prompt: The question about another entity, or another question.
    """

    NLL_MARGIN: Final = 1.5
    """Nats per token that corrupted answers may be less natural than clean ones."""

    LEAK_LIMIT: Final = 0.1
    """Share of answers that may still hold a name of the clean answers."""

    def __init__(
        self,
        engine: LearningEngine,
        questions: Sequence[str],
        generic_prompt: Callable[[str], Prompt],
    ) -> None:
        self._engine, self._questions = engine, tuple(questions)
        count = len(self._questions)
        clean: list[Prompt] = [(Message("user", question),) for question in self._questions]
        answers = self._generate([*clean, *(generic_prompt(q) for q in self._questions)])
        self._known = [
            names_in(known) - names_in(generic) - words_of(question)
            for question, known, generic in zip(
                self._questions, answers[:count], answers[count:], strict=True
            )
        ]
        self.clean = self._judge(answers[:count])

    def speech(self, corrupt_prompt: Callable[[str], Prompt]) -> Speech:
        """Let the model answer the corrupted questions, and judge the answers."""
        return self._judge(self._generate([corrupt_prompt(q) for q in self._questions]))

    def breaks(self, speech: Speech) -> str | None:
        """Say what is wrong with the answers, or None where they pass."""
        slack = 1.0 / len(self._questions)
        if speech.empty > self.clean.empty:
            return f"{speech.empty:.0%} of the answers are empty"
        if speech.repetitive > self.clean.repetitive + slack:
            return f"{speech.repetitive:.0%} of the answers repeat themselves"
        if speech.nll > self.clean.nll + self.NLL_MARGIN:
            return f"answers take {speech.nll:.2f} nats per token, clean ones {self.clean.nll:.2f}"
        if speech.leaking > self.LEAK_LIMIT:
            return f"{speech.leaking:.0%} of the answers still hold a name of the clean ones"
        return None

    def _generate(self, prompts: Sequence[Prompt]) -> list[str]:
        return self._engine.generate(prompts, SamplingParams(max_tokens=ANSWER_TOKENS))

    def _judge(self, answers: Sequence[str]) -> Speech:
        said = [answer for answer in answers if words_of(answer)]
        nll = float("inf")
        if said:
            scores = self._engine.score_answers([NEUTRAL_PROMPT] * len(said), said)
            nll = -float(np.mean(np.concatenate(scores)))
        leaks = [bool(names_in(a) & known) for a, known in zip(answers, self._known, strict=True)]
        return Speech(
            empty=1.0 - len(said) / len(answers),
            repetitive=float(np.mean([is_repetitive(answer) for answer in answers])),
            nll=nll,
            leaking=float(np.mean(leaks)),
        )


def words_of(text: str) -> set[str]:
    """Return the words of a text, casefolded."""
    return set(re.findall(r"\w+", text.casefold()))


def names_in(text: str) -> set[str]:
    """Return capitalised words of four letters or more that don't begin a sentence, casefolded."""
    inside = re.finditer(r"(?<![.!?:\n\"]\s)(?<!^)\b[^\W\d_]{4,}", text)
    return {m.group().casefold() for m in inside if m.group()[0].isupper()}


def is_repetitive(text: str) -> bool:
    """True if four words in a row occur three times or more."""
    words = re.findall(r"\w+", text.casefold())
    grams = [tuple(words[place : place + 4]) for place in range(len(words) - 3)]
    return any(grams.count(gram) >= 3 for gram in set(grams))
