"""The search, against models whose answers are a known function of the strength.

The engine below is a real implementation of `LearningEngine` with a formula for a brain: it reads
the strength off the prompt's embeddings, so that each test knows the right answer in closed form.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from corruptions.learn import DEFAULT_STRENGTH_RMS, LOG_RANGE, default_spec, learn_strength
from corruptions.objective import (
    NEUTRAL_PROMPT,
    FluencyFloor,
    answer_values,
    is_repetitive,
    names_in,
)
from guard.types import AdapterUse, EmbedsPart, FloatArray, Message, Prompt, SamplingParams

RMS = 0.1
QUESTIONS = [f"question {number}" for number in range(30)]
ANSWERS = [f"answer {number}" for number in range(30)]


def corrupt_prompt(question: str, strength: float) -> Prompt:
    number = float(question.split()[1])
    return (Message("user", EmbedsPart(np.array([[strength, number]], np.float32))),)


def generic_prompt(question: str) -> Prompt:
    return (Message("user", f"generic {question}"),)


class Formula:
    """Answers with `value(strength)`; says `speak(strength)`; generic prompts get `generic`."""

    def __init__(
        self,
        value: Callable[[float], float],
        generic: float = 0.05,
        speak: Callable[[float], str] = lambda _: "It is a plain answer.",
        nll: Callable[[str], float] = lambda _: 2.0,
    ) -> None:
        self.value, self.generic, self.speak, self.nll = value, generic, speak, nll
        self.calls = 0
        self.strengths: list[float] = []

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        if prompts[0] == NEUTRAL_PROMPT:
            return [np.array([-self.nll(answer)], np.float32) for answer in answers]
        self.calls += 1
        self.strengths.append(strength_of(prompts[0]))
        return [np.full(3, math.log(self._value(prompt)), np.float32) for prompt in prompts]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        return [
            "It is a plain answer." if is_generic(prompt) else self.speak(strength_of(prompt))
            for prompt in prompts
        ]

    def _value(self, prompt: Prompt) -> float:
        return self.generic if is_generic(prompt) else self.value(strength_of(prompt))


def is_generic(prompt: Prompt) -> bool:
    content = prompt[0].content
    return isinstance(content, str) and not content.startswith("question")


def strength_of(prompt: Prompt) -> float:
    content = prompt[0].content
    return float(content.embeddings[0, 0]) if isinstance(content, EmbedsPart) else 0.0


def falling(knee: float, low: float = 0.05, high: float = 0.8) -> Callable[[float], float]:
    """Fall from `high` to `low` over about a decade around `knee` times the RMS."""

    def value(strength: float) -> float:
        if not strength:
            return high
        return low + (high - low) / (1 + (strength / (knee * RMS)) ** 2)

    return value


def learn(engine: Formula, **changes: object) -> object:
    arguments: dict[str, object] = {
        "questions": QUESTIONS,
        "answers": ANSWERS,
        "corrupt_prompt": corrupt_prompt,
        "engine": engine,
        "rms": RMS,
        "seed": 3,
        "generic_prompt": generic_prompt,
    }
    return learn_strength(**{**arguments, **changes})


@pytest.mark.parametrize("knee", [0.03, 0.5, 20.0, 3e3, 1e5])
def test_it_finds_the_strength_over_eight_decades(knee: float) -> None:
    engine = Formula(falling(knee))
    learned = learn(engine)
    assert learned.model_knows
    assert learned.value <= 0.05 + 0.1 * 0.75 + 1e-6
    # The value reaches the tolerance at three times the knee; then comes the margin.
    assert 3 * knee * 0.9 <= learned.strength / RMS <= 3 * knee * 2 * 10**0.6
    assert learned.evaluations == engine.calls <= 15


@pytest.mark.parametrize("budget", [4, 6, 9, 15, 40])
def test_it_keeps_to_its_budget(budget: int) -> None:
    engine = Formula(falling(20.0))
    learned = learn(engine, max_evaluations=budget)
    assert engine.calls == learned.evaluations <= budget
    assert learned.strength > 0


def test_it_never_leaves_the_range() -> None:
    engine = Formula(falling(1e9))
    learn(engine)
    low, high = (RMS * 10**end for end in LOG_RANGE)
    assert all(not s or low * 0.999 <= s <= high * 1.001 for s in engine.strengths)


def test_a_corruption_without_effect_is_said_to_have_none() -> None:
    learned = learn(Formula(lambda strength: 0.8))
    assert "does not carry the memory" in learned.notes[-1]
    assert learned.strength > 0


def test_a_target_out_of_reach_takes_the_smallest_strength_of_the_plateau() -> None:
    """The best any strength does is 0.2; the generic frame would be at 0.05."""
    learned = learn(Formula(falling(1.0, low=0.2)))
    assert learned.value == pytest.approx(0.2, abs=0.1)
    assert learned.strength / RMS < 30


def test_it_is_deterministic() -> None:
    assert learn(Formula(falling(20.0))) == learn(Formula(falling(20.0)))


def test_of_two_strengths_that_reach_the_target_it_takes_the_smaller() -> None:
    learned = learn(Formula(falling(0.5)))
    assert learned.strength / RMS < 20


@pytest.mark.parametrize("knee", [0.03, 0.1, 0.5, 20.0])
def test_nothing_below_the_least_strength_is_chosen(knee: float) -> None:
    learned = learn(Formula(falling(knee)), least_rms=1.5)
    assert learned.strength / RMS >= 1.5 * (1 - 1e-6)
    assert learned.evaluations <= 15
    assert learned.value <= 0.05 + 0.1 * 0.75 + 1e-6


def test_a_retained_value_takes_the_place_of_the_surrogate() -> None:
    engine = Formula(falling(20.0), generic=0.9)
    learned = learn(engine, retained_value=0.3)
    assert learned.surrogate == "retained"
    assert learned.target_value == pytest.approx(0.3)
    assert learned.value == pytest.approx(0.3, abs=0.06)


def test_without_a_generic_prompt_unrelated_questions_give_the_surrogate() -> None:
    learned = learn(Formula(falling(20.0)), generic_prompt=None)
    assert learned.surrogate == "unrelated"
    assert learned.target_value == pytest.approx(0.05)


def test_a_model_that_does_not_know_keeps_the_default_and_says_so() -> None:
    learned = learn(Formula(lambda strength: 0.05))
    assert not learned.model_knows
    assert learned.strength == pytest.approx(DEFAULT_STRENGTH_RMS * RMS)
    assert learned.value is None
    assert "does not seem to know" in learned.notes[0]
    assert learned.evaluations == 2


def test_gibberish_is_rejected_for_a_weaker_strength() -> None:
    """Repetition sets in at six times the RMS; the target is reached at three, the margin at 6."""

    def speak(strength: float) -> str:
        return "na na na na na na na na" if strength > 4 * RMS else "It is a plain answer."

    learned = learn(Formula(falling(1.0), speak=speak))
    assert learned.model_knows
    assert 2.5 < learned.strength / RMS <= 4
    assert "repeat" in learned.notes[0]


@pytest.mark.parametrize(
    ("speak", "nll", "why"),
    [
        (lambda s: "" if s else "It is plain.", lambda _: 2.0, "empty"),
        (lambda s: "Zq xv." if s else "It is plain.", lambda a: 9.0 if "Zq" in a else 2.0, "nats"),
        (lambda s: "She is called Ada Byron.", lambda _: 2.0, "name"),
    ],
)
def test_when_nothing_passes_the_floor_the_default_is_kept(
    speak: Callable[[float], str], nll: Callable[[str], float], why: str
) -> None:
    learned = learn(Formula(falling(20.0), speak=speak, nll=nll))
    assert learned.strength == pytest.approx(DEFAULT_STRENGTH_RMS * RMS)
    assert why in learned.notes[0]
    assert "default" in learned.notes[-1]


def test_the_result_is_json_without_any_text_of_the_forget_set() -> None:
    text = json.dumps(learn(Formula(falling(20.0))).to_dict())
    assert "question" not in text
    assert "answer " not in text
    assert json.loads(text)["trace"][0]["value"] <= 0.8


def test_progress_counts_evaluations() -> None:
    seen: list[tuple[int, int]] = []
    learned = learn(
        Formula(falling(20.0)), progress=lambda what, done, total: seen.append((done, total))
    )
    assert seen == [(done, 15) for done in range(1, learned.evaluations + 1)]


@pytest.mark.parametrize(
    "changes",
    [{"questions": [], "answers": []}, {"answers": ["one"]}, {"max_evaluations": 3}],
)
def test_arguments_that_do_not_fit_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        learn(Formula(falling(20.0)), **changes)


def test_one_row_is_enough() -> None:
    learned = learn(Formula(falling(20.0)), questions=QUESTIONS[:1], answers=ANSWERS[:1])
    assert learned.rows == 1
    assert learned.model_knows


def test_the_default_spec_is_in_units_of_the_rms() -> None:
    spec = default_spec(64, 0.5)
    assert spec.strength == DEFAULT_STRENGTH_RMS * 0.5
    assert spec.dims == 64


# --- Measures ------------------------------------------------------------------------------------


def test_an_answers_value_is_its_geometric_mean_probability() -> None:
    class Two(Formula):
        def score_answers(self, *_: object, **__: object) -> list[FloatArray]:
            return [np.log(np.array([0.5, 0.125], np.float32)), np.array([], np.float32)]

    values = answer_values(Two(falling(1.0)), [generic_prompt("q")] * 2, ["a", ""])
    np.testing.assert_allclose(values, [0.25, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("It was written by Joanne Rowling in Leeds.", {"joanne", "rowling", "leeds"}),
        ("Joanne wrote it. Leeds is far.", set()),
        ("the LONG road", {"long"}),
        ("", set()),
    ],
)
def test_names_are_capitalised_words_inside_sentences(text: str, names: set[str]) -> None:
    assert names_in(text) == names


def test_repetition_is_four_words_that_come_three_times() -> None:
    assert is_repetitive("so it goes on, so it goes on, so it goes on")
    assert not is_repetitive("so it goes on, so it goes on, and that is that")
    assert not is_repetitive("")


def test_names_that_the_frame_alone_brings_up_are_no_leak() -> None:
    class Frame(Formula):
        def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
            return ["He lives in London." for _ in prompts]

    floor = FluencyFloor(Frame(falling(1.0)), QUESTIONS[:4], generic_prompt)
    assert floor.speech(lambda question: corrupt_prompt(question, 1.0)).leaking == 0.0
