"""Find a corruption's strength for a target: ECO's zeroth-order step, with forward passes only.

Minimise |m(sigma) - v_r| over log sigma, where m is the probability of the forget set's answers
after corrupted questions and v_r the same of a model that never saw them, or its surrogate.
Liu et al. 2024, arXiv 2406.07933. Differs from the published code: the distance is minimised (the
code minimises the value itself), a coarse scan finds the decade first (useful strengths span six
orders of magnitude), the two-point difference is divided by the distance between the points that
were really evaluated (the code's is wrong where a point is clamped), and only prompts are
corrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Final

import numpy as np

from corruptions.objective import FluencyFloor, answer_values, unrelated_prompt
from corruptions.seeding import Draws
from corruptions.spec import CorruptionSpec
from guard.types import LearningEngine, Message, Progress, Prompt

LOG_RANGE: Final = (-2.0, 6.0)
"""Searched strengths, log10 of multiples of the embeddings' RMS."""

DEFAULT_METHOD: Final = "mix-generic"
DEFAULT_STRENGTH_RMS: Final = 2.0
"""Strength in multiples of the RMS where nothing can be learned: beyond the distance of any two
tokens, so that `mix-generic` reads generic names. docs/corruptions.md says how it was chosen."""

DEFAULT_FRAME_RMS: Final = 0.85
"""Noise on the wording around the entity, in multiples of the RMS. A model remembers the wording of
questions beside names: with the name alone replaced, answers of the TOFU pair kept a ROUGE-L of .51
where the retained model has .30 (docs/corruptions.md)."""

MAX_ROWS: Final = 16
"""Rows of the forget set that an evaluation looks at."""

SPEECH_ROWS: Final = 8
"""Rows whose answers are generated for the fluency floor."""

SCAN_POINTS: Final = 5
BISECTIONS: Final = 4
TWO_POINT_STEP: Final = 0.0999
"""ECO, released code: half the distance of the two points; here in log10 sigma."""

MARGIN: Final = 2.0
"""Factor on the smallest strength that reaches the target: noise differs between prompts, and the
mean over rows hides the one whose entity is still half readable."""

LEAST_STRENGTH_RMS: Final = {"mix-generic": 1.5}
"""Least strength to choose, by method, in multiples of the RMS: short of the way to the generic
token, a token is still partly itself, and likelihood over a few rows does not show it (the search
once stopped at 0.56, where 2 of 13 answers held the fact)."""

MAX_SPEECHES: Final = 3
"""Candidates whose answers are generated; each costs seconds."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One evaluation: strength in embedding units, m, and the distance to the target value."""

    strength: float
    value: float
    loss: float


@dataclass(frozen=True, slots=True)
class LearnedStrength:
    """What the search found.

    Attributes:
        strength: sigma, in embedding units; never 0.
        value: m at `strength`; None where the default was kept without evaluating it.
        clean_value: m without corruption.
        target_value: v_r, or its surrogate.
        surrogate: Where v_r came from: `retained`, `generic` or `unrelated`.
        model_knows: False if the model gives the answers no likelier than v_r: it never knew.
        evaluations: Forward evaluations spent, those of m(0) and of the surrogate included.
        rows: Rows of the forget set in each evaluation.
        trace: Every strength that was evaluated, in order.
        notes: Sentences for the user.
    """

    strength: float
    value: float | None
    clean_value: float
    target_value: float
    surrogate: str
    model_knows: bool
    evaluations: int
    rows: int
    trace: tuple[Trial, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; holds no text of the forget set."""
        return asdict(self)


def default_spec(hidden_size: int, rms: float) -> CorruptionSpec:
    """Return the corruption of a target of which nothing is known.

    Args:
        hidden_size: Embedding dimensions of the model.
        rms: Root mean square of its embedding table.
    """
    return CorruptionSpec(
        DEFAULT_METHOD,
        hidden_size,
        DEFAULT_STRENGTH_RMS * rms,
        "entity",
        DEFAULT_FRAME_RMS * rms,
    )


def learn_strength(
    *,
    questions: Sequence[str],
    answers: Sequence[str],
    corrupt_prompt: Callable[[str, float], Prompt],
    engine: LearningEngine,
    rms: float,
    seed: int,
    retained_value: float | None = None,
    generic_prompt: Callable[[str], Prompt] | None = None,
    least_rms: float = 0.0,
    max_evaluations: int = 15,
    progress: Progress | None = None,
) -> LearnedStrength:
    """Find the strength at which the model answers as one that never knew.

    Among strengths whose value is within tolerance of the target, the smallest, times `MARGIN`
    where that still is: little corruption keeps the answers fluent. Candidates whose generated
    answers break the fluency floor are rejected. Deterministic: `corrupt_prompt` must be, too.

    Args:
        questions: Forget questions, at least one.
        answers: Their answers, the same number.
        corrupt_prompt: Corrupts a question at a strength in embedding units, as serving will.
        engine: The served model.
        rms: Root mean square of its embedding table; the unit of the search.
        seed: Chooses the rows that are looked at.
        retained_value: v_r measured on a retained model; None takes the surrogate.
        generic_prompt: Makes the surrogate's prompt: the question about another entity
            (`corruptions.bank.swap_entities`). None takes unrelated questions, a lower bound.
        least_rms: Strengths below this multiple of the RMS are evaluated but not chosen.
        max_evaluations: Evaluations in all, at least 4.
        progress: Told after every evaluation.

    Raises:
        ValueError: If there are no rows, lengths differ, or the budget is below 4.
    """
    if not questions or len(questions) != len(answers) or max_evaluations < 4:
        raise ValueError(
            f"got {len(questions)} questions, {len(answers)} answers and a budget of "
            f"{max_evaluations}; give as many answers as questions, at least one, and >= 4"
        )
    picked = Draws(b"rows %d" % seed).permutation(len(questions))[:MAX_ROWS]
    rows = [(questions[index], answers[index]) for index in picked]
    meter = _Meter(rows, corrupt_prompt, engine, rms, max_evaluations, progress)
    other = generic_prompt or unrelated_prompt
    clean = meter.clean()
    if retained_value is None:
        surrogate = "generic" if generic_prompt else "unrelated"
        target = meter.prompted([other(question) for question, _ in rows])
    else:
        surrogate, target = "retained", np.full(len(rows), retained_value)
    meter.aim(float(clean.mean()), float(target.mean()))
    if not _knows(clean, target):
        note = _UNKNOWN.format(meter.clean_value, meter.target)
        return _result(meter, surrogate, None, [note], knows=False)
    _search(meter)
    floor = FluencyFloor(engine, [question for question, _ in rows[:SPEECH_ROWS]], other)
    least = math.log10(least_rms) if least_rms > 0 else LOG_RANGE[0]
    chosen, notes = _choose(meter, floor, least)
    if meter.goal > (meter.clean_value + meter.target) / 2:
        notes.append(_FAR.format(meter.goal, meter.clean_value, meter.target))
    return _result(meter, surrogate, chosen, notes, knows=True)


_UNKNOWN: Final = (
    "the model does not seem to know the target: its answers have probability {0:.4f} without "
    "corruption and {1:.4f} by the retained value; the documented default strength is kept"
)


_FAR: Final = (
    "no strength brings the answers' probability below {0:.4f} ({1:.4f} without corruption, "
    "{2:.4f} by the retained value): what is corrupted does not carry the memory"
)


def _knows(clean: np.typing.NDArray[np.float64], target: np.typing.NDArray[np.float64]) -> bool:
    """True if the clean values lie above the target's by more than chance, row by row."""
    gap = clean - target
    error = float(gap.std(ddof=1)) / math.sqrt(len(gap)) if len(gap) > 1 else 0.0
    return bool(gap.mean() > max(2.0 * error, 0.05 * float(clean.mean())))


class _Meter:
    """Evaluates m, counts evaluations, remembers trials."""

    def __init__(
        self,
        rows: Sequence[tuple[str, str]],
        corrupt_prompt: Callable[[str, float], Prompt],
        engine: LearningEngine,
        rms: float,
        budget: int,
        progress: Progress | None,
    ) -> None:
        self.rows, self.rms, self.budget = rows, rms, budget
        self.corrupt, self._engine, self._progress = corrupt_prompt, engine, progress
        self.spent = 0
        self.trials: dict[float, Trial] = {}
        self.clean_value = self.target = self.goal = self.tolerance = 0.0

    @property
    def left(self) -> int:
        return self.budget - self.spent

    def prompted(self, prompts: Sequence[Prompt]) -> np.typing.NDArray[np.float64]:
        """Return the answers' values after these prompts, shape (rows,)."""
        values = answer_values(self._engine, prompts, [answer for _, answer in self.rows])
        self.spent += 1
        if self._progress is not None:
            self._progress("learning the corruption's strength", self.spent, self.budget)
        return values

    def clean(self) -> np.typing.NDArray[np.float64]:
        """Return the values without corruption, shape (rows,)."""
        return self.prompted([(Message("user", question),) for question, _ in self.rows])

    def aim(self, clean_value: float, target: float) -> None:
        """Fix the target value, and a tenth of the way to it as the tolerance."""
        self.clean_value, self.target, self.goal = clean_value, target, target
        self.tolerance = 0.1 * abs(clean_value - target)

    def at(self, log: float) -> Trial:
        """Evaluate at a strength, given as log10 of multiples of the RMS; clamped, cached."""
        log = round(min(max(log, LOG_RANGE[0]), LOG_RANGE[1]), 6)
        if log not in self.trials:
            strength = self.rms * 10.0**log
            prompts = [self.corrupt(question, strength) for question, _ in self.rows]
            value = float(self.prompted(prompts).mean())
            self.trials[log] = Trial(strength, value, abs(value - self.target))
        return self.trials[log]

    def reached(self, trial: Trial) -> bool:
        """True at or below the goal, within the tolerance."""
        return trial.value <= self.goal + self.tolerance

    def settle(self) -> None:
        """Where no strength reaches the target, the best that any does is the goal."""
        self.goal = max(self.target, min(trial.value for trial in self.trials.values()))

    def moved(self, trial: Trial) -> bool:
        """True where the corruption has an effect at all."""
        return abs(trial.value - self.clean_value) > self.tolerance

    def near(self, trial: Trial) -> bool:
        """True within the tolerance of the goal, on either side."""
        return abs(trial.value - self.goal) <= self.tolerance


def _search(meter: _Meter) -> None:
    """Scan decades upward until the target is reached, halve the bracket, then two-point steps."""
    before = None
    for log in np.linspace(*LOG_RANGE, SCAN_POINTS):
        if meter.left < 1:
            break
        trial = meter.at(float(log))
        # A value that stays the same to the last bit: nothing is left that more could corrupt.
        settled = before is not None and trial.value == before.value and meter.moved(trial)
        if meter.reached(trial) or settled:
            break
        before = trial
    meter.settle()
    scanned = sorted(meter.trials)
    place = next(i for i, log in enumerate(scanned) if meter.reached(meter.trials[log]))
    low, high = scanned[max(0, place - 1)], scanned[place]
    for _ in range(BISECTIONS):
        if meter.left < 1 or high - low < 2 * TWO_POINT_STEP:
            break
        middle = (low + high) / 2
        low, high = (low, middle) if meter.reached(meter.at(middle)) else (middle, high)
    _two_point(meter, high)


def _two_point(meter: _Meter, log: float) -> None:
    """Take one of ECO's steps from `log`: evaluates a point to either side and one downhill.

    The step is to where the line through the two points meets the target, at most three of their
    distances away.
    """
    if meter.left < 3:
        return
    ends = [
        min(max(log + step, LOG_RANGE[0]), LOG_RANGE[1])
        for step in (-TWO_POINT_STEP, TWO_POINT_STEP)
    ]
    before, after = meter.at(ends[0]), meter.at(ends[1])
    slope = (after.value - before.value) / (ends[1] - ends[0])
    if slope:
        step = (meter.goal - meter.at(log).value) / slope
        if abs(step) < TWO_POINT_STEP / 4:  # not worth an evaluation
            return
        meter.at(log + min(max(step, -3 * TWO_POINT_STEP), 3 * TWO_POINT_STEP))


def _choose(meter: _Meter, floor: FluencyFloor, least: float) -> tuple[float | None, list[str]]:
    """Return log10 of the best strength whose answers pass the floor, and notes."""
    notes: list[str] = []
    for log in _candidates(meter, least)[:MAX_SPEECHES]:
        strength = meter.rms * 10.0**log
        wrong = floor.breaks(floor.speech(partial(_at_strength, meter.corrupt, strength)))
        if wrong is None:
            return log, notes
        notes.append(f"strength {strength:.4g} was rejected: {wrong}")
    return None, [*notes, "no strength passed the fluency floor; the default strength is kept"]


def _at_strength(
    corrupt_prompt: Callable[[str, float], Prompt], strength: float, question: str
) -> Prompt:
    return corrupt_prompt(question, strength)


def _candidates(meter: _Meter, least: float) -> list[float]:
    """Return strengths in the order in which to try them; none is below `least` (log10)."""
    within = sorted(log for log, trial in meter.trials.items() if meter.near(trial))
    if not within:
        within = sorted(meter.trials, key=lambda log: (meter.trials[log].loss, log))
    wanted = max(within[0] + math.log10(MARGIN), least)
    roomier = round(min(wanted, LOG_RANGE[1]), 6)
    enough = [log for log in within if log >= least] or [roomier]
    if meter.left < 1 and roomier not in meter.trials:
        return [log for log in enough if log in meter.trials]
    if meter.at(roomier).loss > meter.trials[within[0]].loss + meter.tolerance:
        return enough
    return [roomier, *(log for log in enough if log != roomier)]


def _result(
    meter: _Meter, surrogate: str, log: float | None, notes: Sequence[str], *, knows: bool
) -> LearnedStrength:
    trial = meter.trials.get(log) if log is not None else None
    return LearnedStrength(
        strength=trial.strength if trial else DEFAULT_STRENGTH_RMS * meter.rms,
        value=trial.value if trial else None,
        clean_value=meter.clean_value,
        target_value=meter.target,
        surrogate=surrogate,
        model_knows=knows,
        evaluations=meter.spent,
        rows=len(meter.rows),
        trace=tuple(meter.trials.values()),
        notes=tuple(notes),
    )
