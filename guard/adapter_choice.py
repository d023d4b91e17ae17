"""Which route a target should take: measured on its own forget rows, against a model's unknown.

No retained model is asked. What an answer should look like comes from the model itself: its
likelihood where question and answer are read blurred, and the words that it shares with the truth
when it is asked about somebody unknown (`guard.adapter_data`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from guard.adapter_data import Levels
from guard.adapter_request import TrainableModel
from guard.restore import NameRestorer
from guard.targets import Prompter
from guard.types import AdapterUse, Message, Progress, Prompt, SamplingParams, TargetRoute

if TYPE_CHECKING:
    from adapters.alternatives import Pairs
    from corruptions.spec import CorruptionSpec

ROWS: Final = 8
ANSWER_TOKENS: Final = 32
ROUTES: Final[tuple[TargetRoute, ...]] = ("corrupt", "adapt", "corrupt+adapt")


@dataclass(frozen=True, slots=True)
class RouteFigures:
    """What one route does to the forget rows.

    Attributes:
        probability: Geometric mean probability per token of the true answers.
        shared: Share of the true answer's words that the answer has, in order (ROUGE-L recall).
        broken: Share of answers that are empty or go round in circles.
        distance: |probability - unknown's| + |shared - unknown's| + broken.
    """

    probability: float
    shared: float
    broken: float
    distance: float


@dataclass(frozen=True, slots=True)
class RouteChoice:
    """The routes side by side.

    Attributes:
        figures: By route.
        unknown: Probability and shared words of what the model doesn't know.
        rows: Rows measured.
        unseen: Whether the adapter was trained without them.
    """

    figures: Mapping[TargetRoute, RouteFigures]
    unknown: Mapping[str, float]
    rows: int
    unseen: bool

    @property
    def best(self) -> TargetRoute:
        """The route that comes nearest."""
        return min(self.figures, key=lambda route: self.figures[route].distance)

    @property
    def reason(self) -> str:
        """Say what was compared, for people."""
        found = ", ".join(f"{route} {one.distance:.2f}" for route, one in self.figures.items())
        which = "that it was not trained on" if self.unseen else "that it was trained on"
        return (
            f"chosen by evaluation on {self.rows} forget rows {which}: distance to a model that "
            f"doesn't know them (likelihood, words, broken answers): {found}"
        )


def compare_routes(
    pairs: Pairs,
    unseen: bool,
    counterfactuals: Sequence[Sequence[str]],
    model: TrainableModel,
    prompter: Prompter,
    spec: CorruptionSpec,
    adapter: AdapterUse,
    levels: Levels,
    shared_words: Callable[[str, str], float],
    progress: Progress,
) -> RouteChoice:
    """Measure each route on some of the forget rows.

    Args:
        pairs: Forget rows.
        unseen: Whether the adapter was trained without them.
        counterfactuals: Of each row what the model says when it doesn't know; may be empty.
        model: The model.
        prompter: Corrupts as serving does.
        spec: The target's corruption.
        adapter: The target's adapter.
        levels: How likely the rows' answers are to a model that doesn't know them.
        shared_words: ROUGE-L recall of an answer and the truth.
        progress: Told how far it is.
    """
    chosen = np.random.default_rng(0).permutation(len(pairs))[:ROWS]
    some = [pairs[int(place)] for place in chosen]
    said = [
        shared_words(answer, pairs[int(place)][1])
        for place in chosen
        for answer in (counterfactuals[int(place)] if counterfactuals else ())
    ]
    unknown = {"probability": levels.only(int(place) for place in chosen).probability}
    if said:
        unknown["shared"] = float(np.mean(said))
    figures: dict[TargetRoute, RouteFigures] = {}
    for number, route in enumerate(ROUTES):
        progress("compare routes", number, len(ROUTES))
        uses = (adapter,) if route != "corrupt" else ()
        figures[route] = _measure(some, route, model, prompter, spec, uses, unknown, shared_words)
    progress("compare routes", len(ROUTES), len(ROUTES))
    return RouteChoice(figures, unknown, len(some), unseen)


def _measure(
    pairs: Pairs,
    route: TargetRoute,
    model: TrainableModel,
    prompter: Prompter,
    spec: CorruptionSpec,
    adapters: Sequence[AdapterUse],
    unknown: Mapping[str, float],
    shared_words: Callable[[str, str], float],
) -> RouteFigures:
    from adapters.alternatives import is_degenerate

    asked = [_asked(question, route, prompter, spec) for question, _ in pairs]
    prompts = [prompt for prompt, _ in asked]
    truths = [answer for _, answer in pairs]
    likely = model.score_answers(prompts, truths, adapters)
    answers = [
        restorer.restore(text)
        for (_, restorer), text in zip(
            asked, model.generate(prompts, SamplingParams(ANSWER_TOKENS), adapters), strict=True
        )
    ]
    probability = float(np.mean([np.exp(row.mean()) for row in likely]))
    shared = float(np.mean([shared_words(a, t) for a, t in zip(answers, truths, strict=True)]))
    broken = float(np.mean([is_degenerate(answer) for answer in answers]))
    distance = abs(probability - unknown["probability"]) + broken
    distance += abs(shared - unknown.get("shared", shared))
    return RouteFigures(probability, shared, broken, distance)


def _asked(
    question: str, route: TargetRoute, prompter: Prompter, spec: CorruptionSpec
) -> tuple[Prompt, NameRestorer]:
    if route == "adapt":
        return (Message("user", question),), NameRestorer(())
    prompt, stand_ins = prompter.corrupted(question, spec)
    return prompt, NameRestorer(stand_ins)
