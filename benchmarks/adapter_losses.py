"""Every loss of adapter training on one author of the TOFU pair, against the retained model.

All are trained alike (steps, rank, batch), at one or several learning rates, and measured at full
strength on their own forget questions: this compares what losses leave behind, not routing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from benchmarks.answers import name_echo, rouge_l_recall
from benchmarks.comparisons import membership_auc
from benchmarks.forgetting import (
    answer_probability,
    exact_memorisation,
    extraction_strength,
    min_k,
)
from benchmarks.report import Row
from benchmarks.tofu_rows import Question
from guard.types import AdapterUse, Message, Progress, Prompt, SamplingParams

if TYPE_CHECKING:
    from guard.adapter_request import AdapterRequest
    from server.engines.embedded.model import EmbeddedModel

TOKENS: Final = 32
Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Subject:
    """What is asked.

    Attributes:
        forget: Questions that the adapter was trained to forget.
        others: Questions about authors that no model knows.
    """

    forget: Sequence[Question]
    others: Sequence[Question]


def measure(
    model: EmbeddedModel,
    subject: Subject,
    adapters: Sequence[AdapterUse],
    others: Sequence[float] | None = None,
) -> tuple[Figures, list[float]]:
    """Measure a model on the forget questions.

    Args:
        model: The model.
        subject: What is asked.
        adapters: What changes it, for the forget questions alone.
        others: Min-k scores of the others' answers, if known: those pass unflagged.

    Returns:
        Figures by measure; min-k scores of the others' answers.
    """
    asked = [_prompt(one) for one in subject.forget]
    truths = [one.answer for one in subject.forget]
    scores = model.score_tokens(asked, truths, adapters)
    if others is None:
        prompts = [_prompt(one) for one in subject.others]
        found = model.score_tokens(prompts, [one.answer for one in subject.others])
        others = [min_k(one) for one in found]
    answers = model.generate(asked, SamplingParams(TOKENS), adapters)
    tails = [min_k(one) for one in scores]
    named = [
        name_echo(answer, one.name)
        for answer, one in zip(answers, subject.forget, strict=True)
        if one.name is not None
    ]
    figures = {
        "probability": float(np.mean([answer_probability(one) for one in scores])),
        "extraction": float(np.mean([extraction_strength(one) for one in scores])),
        "exact": float(np.mean([exact_memorisation(one) for one in scores])),
        "min_k": float(np.mean(tails)),
        "min_k_auc": membership_auc(tails, others).value,
        "rouge_l": float(
            np.mean([rouge_l_recall(a, t) for a, t in zip(answers, truths, strict=True)])
        ),
        "broken": _broken(answers),
    }
    if named:
        figures["name_echo"] = float(np.mean(named))
    return figures, list(others)


def compare_losses(
    losses: Sequence[tuple[str, float]],
    request: AdapterRequest,
    subject: Subject,
    model: EmbeddedModel,
    retained: Callable[[], EmbeddedModel],
    train: Callable[[AdapterRequest], AdapterUse],
    out: Path,
    progress: Progress,
) -> Mapping[str, Figures]:
    """Train and measure each loss; what was measured before is not done again.

    Args:
        losses: Name and learning rate.
        request: How to train; its loss, rate and folder are replaced.
        subject: What is asked.
        model: The model that knows the target.
        retained: Loads the one that never did.
        train: Trains.
        out: Keeps adapters and figures.
        progress: Told how far it is.

    Returns:
        Figures by system: `retained`, `full`, then each loss with its rate.
    """
    results: dict[str, Figures] = {}
    results["retained"] = _once(out / "retained.json", lambda: measure(retained(), subject, ())[0])
    path = out / "others.json"
    if not path.exists():
        figures, others = measure(model, subject, ())
        path.write_text(json.dumps({"figures": figures, "others": others}))
    known = json.loads(path.read_bytes())
    results["full"] = known["figures"]
    for number, (loss, rate) in enumerate(losses):
        progress("losses", number, len(losses))
        name = f"{loss} {rate:g}"
        folder = out / name.replace(" ", "-")
        asked = replace(request, loss=loss, rate=rate, out=folder, apply=False)

        def run(asked: AdapterRequest = asked) -> Figures:
            return measure(model, subject, (train(asked),), known["others"])[0]

        results[name] = _once(folder / "figures.json", run)
    progress("losses", len(losses), len(losses))
    return results


def loss_rows(results: Mapping[str, Figures], questions: int) -> list[Row]:
    """Return figures and differences to the retained model."""
    retained = results["retained"]
    rows = []
    for system, figures in results.items():
        for measured, value in figures.items():
            rows.append(Row(system, "adapt", measured, "forget", value, None, None, questions))
            if system != "retained" and measured in retained:
                gap = value - retained[measured]
                name = f"{measured} - retained"
                rows.append(Row(system, "adapt", name, "forget", gap, None, None, questions))
        if system != "retained":
            rows.append(
                Row(
                    system,
                    "adapt",
                    "distance",
                    "forget",
                    distance(figures, retained),
                    *_NONE,
                    questions,
                )
            )
    return rows


_NONE: Final = (None, None)
_COMPARED: Final = (
    "probability",
    "extraction",
    "exact",
    "min_k_auc",
    "rouge_l",
    "broken",
    "name_echo",
)


def distance(figures: Figures, retained: Figures) -> float:
    """Return the mean absolute difference over the measures that lie in [0, 1]."""
    return float(
        np.mean(
            [abs(figures[m] - retained[m]) for m in _COMPARED if m in figures and m in retained]
        )
    )


def _once(path: Path, make: Callable[[], Figures]) -> Figures:
    if not path.exists():
        figures = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures))
    found: Figures = json.loads(path.read_bytes())
    return found


def _broken(answers: Sequence[str]) -> float:
    from adapters.alternatives import is_degenerate

    return float(np.mean([is_degenerate(answer) for answer in answers]))


def _prompt(question: Question) -> Prompt:
    return (Message("user", question.text),)
