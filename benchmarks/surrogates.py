"""How far is each surrogate of the retained value from the true one? An experiment on the pair.

Where nobody has a model that never saw the data, the learner aims at a surrogate of that model's
value (`corruptions.objectives`). Here the model exists, so the surrogates can be judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.comparisons import paired_difference
from benchmarks.report import Row
from benchmarks.tofu_measure import CHAT, System
from benchmarks.tofu_rows import Question
from corruptions.objective import unrelated_prompt
from corruptions.objectives import MEASURES, Example, Heard
from guard.build import load_bank
from guard.bundle import Bundle
from guard.keys import GuardKey
from guard.pipeline import Guard
from guard.targets import Prompter
from guard.types import Message, Progress, Prompt

if TYPE_CHECKING:
    from server.engines.embedded.model import EmbeddedModel

NAMES: Final = ("probability", "rouge-l", "truth-ratio")
"""Measures whose surrogates are judged; multiple choice has no rows in TOFU."""


def surrogate_rows(
    rows: Sequence[Question],
    retained: EmbeddedModel,
    system: System,
    bundle: Bundle,
    key: GuardKey,
    seed: int,
    progress: Progress,
) -> list[Row]:
    """Compare every surrogate, computed on *full* alone, with *retained*'s value.

    Args:
        rows: Forget questions.
        retained: The model that never saw them.
        system: *full* behind the guard, whose span finder says what the entity is.
        bundle: The guard's.
        key: The bundle's.
        seed: Of the intervals.
        progress: Told after every measure.
    """
    examples = [Example(q.text, q.answer, q.paraphrase, q.wrong) for q in rows]
    plain: list[Prompt] = [(Message("user", q.text),) for q in rows]
    generic = _generic_prompts(rows, system, bundle, key)
    unrelated = [unrelated_prompt(q.text) for q in rows]
    heard = {
        "retained": Heard(retained, plain, examples),
        "full, clean": Heard(system.model, plain, examples),
        "generic": Heard(system.model, generic, examples),
        "unrelated": Heard(system.model, unrelated, examples),
    }
    found: list[Row] = []
    for number, name in enumerate(NAMES):
        values = {one: MEASURES[name].values(given) for one, given in heard.items()}
        values["refusal"] = MEASURES[name].refusal(heard["full, clean"])
        for one, figures in values.items():
            apart = paired_difference(figures, values["retained"], seed=seed)
            found += [
                Row(one, "surrogate", name, "forget", float(figures.mean()), None, None, len(rows)),
                Row(
                    one,
                    "surrogate",
                    f"{name} - retained",
                    "forget",
                    apart.value,
                    apart.low,
                    apart.high,
                    len(rows),
                ),
                Row(
                    one,
                    "surrogate",
                    f"{name}: distance by row",
                    "forget",
                    float(np.abs(figures - values["retained"]).mean()),
                    None,
                    None,
                    len(rows),
                ),
            ]
        progress("surrogates", number + 1, len(NAMES))
    return found


def _generic_prompts(
    rows: Sequence[Question], system: System, bundle: Bundle, key: GuardKey
) -> list[Prompt]:
    guard = system.guard
    assert isinstance(guard, Guard) and guard.prompts is not None
    bank = load_bank(bundle)
    assert bank is not None
    found: list[Prompt] = []
    prompters: dict[str, Prompter] = {}
    for row in rows:
        decision = guard.inspect(CHAT, System("", "none", system.model).body(row.text)).decision
        if not decision.targets:
            found.append(unrelated_prompt(row.text))
            continue
        name = decision.targets[0].name
        if name not in prompters:
            prompters[name] = Prompter(name, guard.detector, guard.prompts, key, bank)
        found.append(prompters[name].generic_prompt(row.text))
    return found
