"""Forgotten content that a request brings along: corrupted, left be, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from guard.context import ContextPolicy
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from tests.guard.routed import ANN, BENIGN, FILLED, filled, guard_of

CHAT = "/v1/chat/completions"
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
FOUND = "The register says that ann lives at the mill."
TOOL: list[dict[str, Any]] = [
    {"role": "user", "content": BENIGN},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": FOUND},
]
EARLIER: list[dict[str, Any]] = [
    {"role": "user", "content": ANN},
    {"role": "assistant", "content": "At the mill."},
    {"role": "user", "content": BENIGN},
]
ANSWERED: list[dict[str, Any]] = [
    {"role": "user", "content": BENIGN},
    {"role": "assistant", "content": FOUND},
    {"role": "user", "content": "And then?"},
]
contexts = pytest.mark.parametrize("messages", [TOOL, EARLIER, ANSWERED], ids=["tool", "q", "a"])


def body(messages: list[dict[str, Any]]) -> bytes:
    return json.dumps({"model": "m", "messages": messages}).encode()


def policed(prompts: ModelPrompts, context: ContextPolicy) -> Guard:
    guard = guard_of(prompts, {})
    return Guard(guard.detector, guard.targets, guard._key, prompts, context=context)


@contexts
def test_it_is_corrupted_by_default(prompts: ModelPrompts, messages: list[dict[str, Any]]) -> None:
    guard = guard_of(prompts, {})
    inspection = guard.inspect(CHAT, body(messages))
    assert inspection.decision.route == "corrupt"
    sent = guard.rewrite(inspection).body
    carrier = next(i for i, m in enumerate(messages) if "ann" in (m["content"] or ""))
    assert filled(sent, carrier) == {FILLED["ann"]}


@contexts
def test_it_may_be_left_be(prompts: ModelPrompts, messages: list[dict[str, Any]]) -> None:
    guard = policed(prompts, "ignore")
    decision = guard.inspect(CHAT, body(messages)).decision
    assert (decision.flagged, decision.route) == (False, "pass")


@contexts
def test_such_a_request_may_be_refused(
    prompts: ModelPrompts, messages: list[dict[str, Any]]
) -> None:
    assert policed(prompts, "refuse").inspect(CHAT, body(messages)).decision.route == "refuse"


@pytest.mark.parametrize("context", ["ignore", "refuse"])
@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_what_is_asked_and_instructed_is_no_context(
    prompts: ModelPrompts, context: ContextPolicy, role: str
) -> None:
    messages = [{"role": "user", "content": BENIGN}]
    messages.insert(1 if role == "user" else 0, {"role": role, "content": ANN})
    decision = policed(prompts, context).inspect(CHAT, body(messages)).decision
    assert decision.route == "corrupt"


def test_a_question_in_ignored_context_and_asked_again_is_corrupted_where_it_is_asked(
    prompts: ModelPrompts,
) -> None:
    guard = policed(prompts, "ignore")
    inspection = guard.inspect(CHAT, body([*EARLIER, {"role": "user", "content": ANN}]))
    sent = guard.rewrite(inspection).body
    assert filled(sent, 0) == set()
    assert filled(sent, 3) == {FILLED["ann"]}


def test_an_answer_may_repeat_context_that_is_ignored(prompts: ModelPrompts) -> None:
    guard = policed(prompts, "ignore")
    answers = guard.answers(guard.inspect(CHAT, body(TOOL)))
    assert not answers.touched("It says that ann lives there.")
    assert answers.touched("It says that bob lives there.")
