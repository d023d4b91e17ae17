"""What the learner compares: measures of a model's answers, and what they are for *retained*.

A measure gives each forget row a value m in [0, 1]. The loss of a corruption is how far the values
are from v_r, those of a model that never saw the rows, or a surrogate of them (ECO, arXiv
2406.07933). Only the prompt is corrupted: the answers that are scored keep their clean embeddings,
as in serving.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray
from rapidfuzz.distance import LCSseq

from corruptions.objective import ANSWER_TOKENS, answer_values
from guard.errors import ConfigError
from guard.registry import Registry
from guard.types import LearningEngine, Prompt, SamplingParams

Values = NDArray[np.float64]

Surrogate = Literal["generic", "refusal", "chance"]
"""Where v_r comes from without a retained model: the same questions about generic people, the
likelihood of declining to answer, guessing."""


@dataclass(frozen=True, slots=True)
class Example:
    """One forget row, with what the measures need of it.

    Attributes:
        question: What is asked.
        answer: What the model is said to know.
        paraphrase: The answer in other words; None where there is none.
        perturbed: Wrong answers of the same form.
        choices: Answers to choose from.
        correct: Index of the right one.
    """

    question: str
    answer: str
    paraphrase: str | None = None
    perturbed: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    correct: int | None = None


@dataclass(frozen=True)
class Heard:
    """A model that was given one prompt for each row; asked when a measure wants to know.

    Attributes:
        engine: The model.
        prompts: A prompt a row.
        examples: The rows.
        as_served: Makes of the engine's answers what clients get; a name may be put back.
    """

    engine: LearningEngine
    prompts: Sequence[Prompt]
    examples: Sequence[Example]
    as_served: Callable[[Sequence[str]], list[str]] = list

    @cached_property
    def texts(self) -> list[str]:
        """Its answers, greedy, `ANSWER_TOKENS` long at most."""
        params = SamplingParams(max_tokens=ANSWER_TOKENS)
        return self.as_served(self.engine.generate(self.prompts, params))

    def likelihoods(self, answers: Sequence[Sequence[str]]) -> list[Values]:
        """Return the geometric-mean probability per token of each row's answers."""
        prompts = [p for p, some in zip(self.prompts, answers, strict=True) for _ in some]
        flat = answer_values(self.engine, prompts, [one for some in answers for one in some])
        return np.split(flat, np.cumsum([len(some) for some in answers])[:-1])


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure of answers.

    Attributes:
        values: m of each row, shape (rows,).
        scores: True if it needs likelihoods, which a server that only generates doesn't give.
        lacks: What a row would need, or None if the row can be measured.
        refusal: v_r of each row if the model declined to answer, shape (rows,).
    """

    values: Callable[[Heard], Values]
    scores: bool
    lacks: Callable[[Example], str | None]
    refusal: Callable[[Heard], Values]


MEASURES: Registry[Measure] = Registry("measure")

OBJECTIVES: Final[dict[str, tuple[str, ...]]] = {
    "probability": ("probability",),
    "rouge-l": ("rouge-l",),
    "truth-ratio": ("truth-ratio",),
    "multiple-choice": ("multiple-choice",),
    "mixed": ("probability", "rouge-l"),
}
"""Objectives by the measures whose distances they average."""

REFUSALS: Final = (
    "I don't know.",
    "I'm not sure about that.",
    "I don't have any information about this.",
    "I'm sorry, but I can't answer that question.",
    "I am not familiar with that.",
)
"""How a model declines."""


def measures_of(objective: str, scoring: bool) -> dict[str, Measure]:
    """Return an objective's measures by name.

    Args:
        objective: Name in `OBJECTIVES`.
        scoring: False if some engine only generates.

    Raises:
        ConfigError: If there is no such objective, or an engine can't measure it.
    """
    if objective not in OBJECTIVES:
        raise ConfigError(f"no objective {objective!r}; there are {', '.join(OBJECTIVES)}")
    found = {name: MEASURES[name] for name in OBJECTIVES[objective]}
    needy = [name for name, measure in found.items() if measure.scores]
    if needy and not scoring:
        raise ConfigError(
            f"objective {objective!r} needs the likelihood of given answers ({', '.join(needy)}), "
            "and a plain vLLM only generates: give --objective rouge-l, or an embedded --engine"
        )
    return found


def default_objective(scoring: bool) -> str:
    """Return the objective for engines that can score, or that only generate."""
    return "mixed" if scoring else "rouge-l"


def default_surrogate(objective: str) -> Surrogate:
    """Return where v_r comes from if nothing else was said."""
    return "chance" if objective == "multiple-choice" else "generic"


def chance(measure: str, examples: Sequence[Example]) -> Values:
    """Return v_r of guessing: 1 / choices for each row.

    Raises:
        ConfigError: If the measure has no such value.
    """
    if measure != "multiple-choice":
        raise ConfigError(
            f"guessing has no value for the measure {measure!r}: --surrogate chance is for "
            "--objective multiple-choice; give generic or refusal"
        )
    return np.array([1.0 / len(example.choices) for example in examples])


def distance(values: Values, retained: Values, *, by_row: bool) -> float:
    """Return how far values are from the retained model's, in [0, 1]; 0 is equality.

    |mean(m) - mean(v_r)| where v_r is known as one number; where it is known for each row, the mean
    of that and of the rows' own distances: too much here can't pay for too little there.

    Args:
        values: m, shape (rows,) or (draws, rows); draws of the noise are averaged first.
        retained: v_r, shape (rows,).
        by_row: False if `retained` is one number for all rows, or is a rate that no row can have.
    """
    rows = values if values.ndim == 1 else values.mean(axis=0)
    whole = abs(float(rows.mean()) - float(retained.mean()))
    if not by_row:
        return whole
    return (whole + float(np.abs(rows - retained).mean())) / 2


def rouge_l_recall(said: str, wanted: str) -> float:
    """Return the share of the wanted words that `said` holds in their order (ROUGE-L recall).

    Words are runs of letters and digits, casefolded, without accents; no stemming.
    """
    reference = _words(wanted)
    if not reference:
        return 0.0
    return float(LCSseq.similarity(_words(said), reference)) / len(reference)


def _words(text: str) -> list[str]:
    plain = unicodedata.normalize("NFKD", text).casefold()
    return re.findall(r"\w+", "".join(c for c in plain if not unicodedata.combining(c)))


# --- The measures --------------------------------------------------------------------------------


def _probability(heard: Heard) -> Values:
    return np.concatenate(heard.likelihoods([[one.answer] for one in heard.examples]))


def _probability_of_refusal(heard: Heard) -> Values:
    """How likely the model finds it to decline: knowledge that is gone is no likelier."""
    found = heard.likelihoods([REFUSALS] * len(heard.examples))
    return np.array([values.mean() for values in found])


def _rouge(heard: Heard) -> Values:
    pairs = zip(heard.texts, heard.examples, strict=True)
    return np.array([rouge_l_recall(text, example.answer) for text, example in pairs])


def _rouge_of_refusal(heard: Heard) -> Values:
    return np.array(
        [np.mean([rouge_l_recall(r, one.answer) for r in REFUSALS]) for one in heard.examples]
    )


def _truth_ratio(heard: Heard) -> Values:
    """R / (1 + R), where R is the wrong answers' likelihood over the right one's, per token.

    TOFU's R (arXiv 2401.06121, eq. 1; geometric mean over wrong answers, as its code), brought into
    [0, 1]: 1/2 says that right and wrong are the same to the model.
    """
    answers = [[one.paraphrase or one.answer, *one.perturbed] for one in heard.examples]
    values = []
    for found in heard.likelihoods(answers):
        logs = np.log(np.maximum(found, np.finfo(np.float64).tiny))
        values.append(1.0 / (1.0 + np.exp(logs[0] - logs[1:].mean())))
    return np.array(values)


def _accuracy(heard: Heard) -> Values:
    """1 where the right choice is the likeliest per token, else 0."""
    found = heard.likelihoods([one.choices for one in heard.examples])
    pairs = zip(found, heard.examples, strict=True)
    return np.array([float(int(np.argmax(values)) == one.correct) for values, one in pairs])


def _nothing(example: Example) -> None:
    return None


def _no_perturbed(example: Example) -> str | None:
    return None if example.perturbed else "perturbed_answer, a list of wrong answers"


def _no_choices(example: Example) -> str | None:
    return None if example.choices else "choices, and the right one's index as answer"


MEASURES.register("probability")(Measure(_probability, True, _nothing, _probability_of_refusal))
MEASURES.register("rouge-l")(Measure(_rouge, False, _nothing, _rouge_of_refusal))
MEASURES.register("truth-ratio")(
    Measure(_truth_ratio, True, _no_perturbed, lambda heard: np.full(len(heard.examples), 0.5))
)
MEASURES.register("multiple-choice")(
    Measure(_accuracy, True, _no_choices, lambda heard: chance("multiple-choice", heard.examples))
)
