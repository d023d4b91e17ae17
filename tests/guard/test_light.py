"""A request that is plain is decided at once, and as it would be in a thread."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.errors import EngineUnavailableError, RequestError, StageError
from guard.keys import GuardKey
from guard.pieces import _NAMED, _may_name
from guard.pipeline import Guard, Inspection
from guard.policy import TargetPolicy
from guard.prompts import ModelPrompts
from guard.reload import HeldInspection, LiveGuard
from guard.request import parse_request
from guard.types import BoolArray, Decision, Detection, FloatArray

CHAT = "/v1/chat/completions"
FLAGGED = "Which house was Hermione Granger sorted into at Hogwarts?"
PLAIN = "How do I bake bread at home?"


def chat(*contents: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"model": "m", "messages": messages}).encode()


@pytest.fixture(scope="module")
def guard(small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts) -> Guard:
    return load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=None)


def test_a_plain_request_is_decided_at_once(guard: Guard) -> None:
    for body in (chat(PLAIN), chat(PLAIN, "And why?"), chat("`a = 'x'` and b: y")):
        found = guard.begin(CHAT, body)
        assert isinstance(found, Inspection)
        assert found.decision == guard.inspect(CHAT, body).decision


def test_without_targets_everything_is_decided_at_once() -> None:
    nobody = Guard(NoDetector(), {}, GuardKey.generate())
    for body in (chat(PLAIN), chat(FLAGGED, "b3Zlcg=="), chat("")):
        found = nobody.begin(CHAT, body)
        assert isinstance(found, Inspection)
        assert found.decision == nobody.inspect(CHAT, body).decision
    tokens = json.dumps({"model": "m", "prompt": [1, 2]}).encode()
    for decide in (nobody.begin, nobody.inspect):
        with pytest.raises((RequestError, StageError)):
            decide("/v1/completions", tokens)


def test_what_may_be_flagged_is_left_to_a_thread_which_decides_as_ever(guard: Guard) -> None:
    for text in (FLAGGED, "Who is Har" + "|" + "ry Potter? Join it", "Hary Poter's 0wl H0gwarts"):
        body = chat(PLAIN, text)
        later = guard.begin(CHAT, body)
        found = later() if callable(later) else later
        assert found.decision == guard.inspect(CHAT, body).decision


def test_a_flagged_request_is_never_decided_at_once(guard: Guard) -> None:
    guard.inspect(CHAT, chat(FLAGGED))  # now its verdict is remembered
    assert callable(guard.begin(CHAT, chat(FLAGGED)))


def test_a_malformed_request_is_refused_at_once(guard: Guard) -> None:
    with pytest.raises(RequestError):
        guard.begin(CHAT, b'{"model": "m"}')


class NoDetector:
    """A detector of no target."""

    targets: tuple[str, ...] = ()

    def detect(self, texts: Sequence[str]) -> Detection:
        rows = len(texts)
        none, all_of_it = np.full(rows, -np.inf, np.float32), np.ones(rows, np.float32)
        return Detection(hits=((),) * rows, margins=none, coverage=all_of_it)

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        return []


class OldDetector:
    """A detector that can't be asked in passing."""

    targets = ("t",)

    def detect(self, texts: Sequence[str]) -> Detection:
        raise ValueError("broken")

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        return []


class BrokenDetector(OldDetector):
    """A detector that breaks in passing, too."""

    def detect_lightly(self, texts: Sequence[str]) -> Detection | None:
        raise ValueError("broken")


def unchanged(embeddings: FloatArray, positions: BoolArray, seed: bytes) -> FloatArray:
    return embeddings


def guard_of(detector: OldDetector) -> Guard:
    policy = TargetPolicy("enforced", unchanged)  # type: ignore[arg-type]
    return Guard(detector, {"t": policy}, GuardKey.generate())


def test_another_detector_is_asked_in_a_thread() -> None:
    later = guard_of(OldDetector()).begin(CHAT, chat(PLAIN))
    assert callable(later)
    with pytest.raises(StageError):
        later()


def test_a_detector_that_breaks_decides_nothing() -> None:
    broken = guard_of(BrokenDetector())
    with pytest.raises(StageError):
        broken.begin(CHAT, chat(PLAIN))
    decision = Decision(False, "pass", 1.0, ())
    answers = broken.answers(Inspection(parse_request(CHAT, chat(PLAIN)), decision))
    assert not answers.untouched(PLAIN)


def test_a_plain_answer_is_known_in_passing_and_no_other(guard: Guard) -> None:
    answers = guard.answers(guard.inspect(CHAT, chat(PLAIN)))
    for text in (PLAIN, "", "  ", "Knead it well; wait for an hour."):
        assert answers.untouched(text) and not answers.touched(text)
    assert not answers.untouched("Harry Potter went to Hogwarts with Hermione Granger.")


def test_a_live_guard_begins_with_the_version_that_it_will_act_with(guard: Guard) -> None:
    live = LiveGuard(lambda: guard, lambda: guard.version)
    begun, later = live.begin(CHAT, chat(PLAIN)), live.begin(CHAT, chat(FLAGGED))
    assert isinstance(begun, HeldInspection) and begun.guard is guard
    assert callable(later)
    held = later()
    assert held.guard is guard and held.decision.flagged


def test_before_the_self_check_nothing_is_begun(guard: Guard) -> None:
    live = LiveGuard(lambda: guard, lambda: guard.version, closed=True)
    with pytest.raises(EngineUnavailableError):
        live.begin(CHAT, chat(PLAIN))
    live.open()
    assert isinstance(live.begin(CHAT, chat(PLAIN)), HeldInspection)


_PARTS = st.sampled_from(
    ["part", " 1", "a", "b1", " is ", " be", " says", ": ", " = ", "<-", "→", '"x"', "'y'", "“z”",
     "«w»", "`v`", "„u“", " ", "\n", "$x", "first half", "word", "->", "=>", "(", "]"]
)  # fmt: skip


@given(st.lists(_PARTS, max_size=12).map("".join))
def test_named_pieces_are_not_looked_for_only_where_there_are_none(text: str) -> None:
    assert _may_name(text) or _NAMED.search(text) is None
