"""Nothing but its text tells an answer to a flagged request from another."""

from __future__ import annotations

import httpx
import pytest

from benchmarks.side_channels import FRAMES, KINDS, LABELS, Asked, Features, ask_one, token_count
from benchmarks.side_channels_rows import attack, twins
from guard.prompts import ModelPrompts

pytestmark = pytest.mark.timeout(1800)
"""The first test waits for a fit and two servers."""

MODEL = "smollm2-135m-instruct"
PAIRS = (
    ("Marie Curie", "Harry Potter"),
    ("Charles Darwin", "Hermione Granger"),
    ("Ada Lovelace", "Ron Weasley"),
    ("Isaac Newton", "Albus Dumbledore"),
)
LENGTH = 6
"""Tokens of each answer: so few that hardly one ends by itself."""


def requests() -> list[Asked]:
    """Every name in four frames and three of the six kinds, plain and flagged in turn."""
    return [
        Asked(f"guarded/{label}/{pair}/{frame}/{kind}", "guarded", pair, label, KINDS[kind], text)
        for pair, names in enumerate(PAIRS)
        for frame in range(4)
        for kind in range(len(KINDS))
        if (pair + frame + kind) % 2
        for label, text in zip(LABELS, (FRAMES[frame].format(name) for name in names), strict=True)
    ]


def test_no_classifier_tells_flagged_answers_from_others(
    guarded_url: str, prompts: ModelPrompts
) -> None:
    drawn = requests()
    with httpx.Client(base_url=guarded_url, timeout=300) as http:
        answers = {
            one: ask_one(http, one, MODEL, LENGTH, token_count(prompts, one.kind, one.text))
            for one in drawn
        }
    # How long an answer is, its text tells: a model may complete a question by nothing.
    ended = {twins(one) for one in drawn if answers[one].metadata["completion"] < LENGTH}
    asked = [one for one in drawn if twins(one) not in ended]
    assert len(asked) >= len(drawn) / 2
    seen = [answers[one].metadata for one in asked]
    labels = [int(one.label == "flagged") for one in asked]
    found = attack(seen, labels, [one.pair for one in asked], seed=0)
    differing = differences(seen, labels)
    assert found.auc <= 0.55 or not differing, (found, differing)


def differences(
    seen: list[Features], labels: list[int]
) -> dict[str, list[tuple[float, int, float]]]:
    """Features that are not the same for all requests of a kind, and their values."""
    pairs, found = list(zip(seen, labels, strict=True)), {}
    for name in sorted({name for one in seen for name in one}):
        values = {(one["kind"], label, one.get(name, -1.0)) for one, label in pairs}
        if len({(kind, value) for kind, _, value in values}) > len({one["kind"] for one in seen}):
            found[name] = sorted(values)
    return found
