"""An answer is judged as the engine gave it and as it leaves, with the asked names put back."""

from __future__ import annotations

import json

import pytest

from guard.answers import WINDOW, AnswerGuard
from guard.build import load_guard
from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from guard.restore import NameRestorer
from guard.rewrite import StandIn

QUESTION = "Who is Hermione Granger?"
FILLER = "Nothing else is known about that time. "


@pytest.fixture(scope="module")
def guard(small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts) -> Guard:
    return load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=None)


@pytest.fixture(scope="module")
def asked(guard: Guard) -> tuple[AnswerGuard, tuple[StandIn, ...], str]:
    """What judges the answers to a question, its names, and the name that the model read."""
    body = {"model": "m", "messages": [{"role": "user", "content": QUESTION}]}
    inspection = guard.inspect("/v1/chat/completions", json.dumps(body).encode())
    names = guard.rewrite(inspection).stand_ins
    return guard.answers(inspection), names, " ".join(names[0].words[-2:])


Asked = tuple[AnswerGuard, tuple[StandIn, ...], str]


@pytest.mark.parametrize(
    "told", ["{} was sorted into Ravenclaw", "{} learned transfiguration.", "{} married Ron."]
)
def test_a_fact_that_only_the_asked_name_shows_is_found(asked: Asked, told: str) -> None:
    answers, names, name = asked
    text = told.format(name)
    leaving = NameRestorer(names).restore(text)
    assert leaving == told.format("Hermione Granger")
    assert not answers.touched(text)
    assert [hit.target for hit in answers.touched(text, leaving)] == ["harry-potter"]
    assert not answers.untouched(text, leaving)


def test_a_hit_in_the_engines_own_text_still_counts(asked: Asked) -> None:
    answers, _, _ = asked
    assert answers.touched("Ron Weasley knows Hogwarts.", "It is a school.")
    assert not answers.untouched("Ron Weasley knows Hogwarts.", "It is a school.")


@pytest.mark.parametrize("told", ["I know nothing about {}.", "{}'s work is well known.", "{}?"])
def test_the_asked_name_itself_may_leave(asked: Asked, told: str) -> None:
    answers, names, name = asked
    text = told.format(name)
    assert not answers.touched(text, NameRestorer(names).restore(text))


def test_the_clean_part_ends_before_what_the_asked_name_shows(asked: Asked) -> None:
    answers, names, name = asked
    begun = f"I have read of {name}. "
    text = f"{begun}{name} learned transfiguration. So they say."
    assert answers.clean_part(text) == text
    assert answers.clean_part(text, names) == begun.rstrip()
    assert answers.clean_part(begun, names) == begun


def test_what_was_said_is_known_for_a_window_of_the_text_that_leaves(asked: Asked) -> None:
    answers, names, name = asked
    begun = f"I have read of {name}. " + FILLER * (2 * WINDOW // len(FILLER))
    text = f"{begun}It was {name} who learned transfiguration."
    assert answers.clean_part(text, names) == begun.rstrip()


def test_a_name_asked_for_in_disguise_may_leave_without_it(guard: Guard) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Who is Hermione%20Granger?"}]}
    inspection = guard.inspect("/v1/chat/completions", json.dumps(body).encode())
    assert inspection.decision.flagged
    answers = guard.answers(inspection)
    for said in ("Hermione%20Granger is unknown to me.", "Hermione Granger is unknown to me."):
        assert not answers.touched(said)
    assert answers.touched("Hermione Granger learned transfiguration.")
