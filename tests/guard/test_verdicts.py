from collections.abc import Callable
from dataclasses import replace

import pytest

from guard.errors import StageError
from guard.types import Decision, Span, TargetHit
from guard.verdicts import MOST_SPANS, Verdicts

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PASS = Decision(flagged=False, route="pass", coverage=1.0, targets=(), margin=-1.0)


class Asked:
    """Decides, and counts how often it was asked to."""

    def __init__(self, decision: Decision = PASS) -> None:
        self.decision, self.times = decision, 0

    def __call__(self) -> Decision:
        self.times += 1
        return self.decision


def flagged(spans: int) -> Decision:
    places = tuple(Span("messages/0/content", n, n + 1) for n in range(spans))
    hit = TargetHit("wizard", 3.0, 0.001, 1.0, places, True)
    return replace(PASS, flagged=True, route="corrupt", targets=(hit,))


def test_a_body_that_comes_again_is_not_decided_again() -> None:
    verdicts, asked = Verdicts(), Asked(flagged(2))

    first = verdicts.decided(0, CHAT, b"{}", asked)

    assert verdicts.decided(0, CHAT, b"{}", asked) is first
    assert asked.times == 1


@pytest.mark.parametrize(("endpoint", "body"), [(CHAT, b"{} "), (TEXT, b"{}"), (CHAT[:-1], b"s{}")])
def test_every_byte_and_the_endpoint_count(endpoint: str, body: bytes) -> None:
    verdicts, asked = Verdicts(), Asked()
    verdicts.decided(0, CHAT, b"{}", asked)

    verdicts.decided(0, endpoint, body, asked)

    assert asked.times == 2


def test_the_decision_asked_for_longest_ago_is_forgotten_first() -> None:
    verdicts, asked = Verdicts(entries=2), Asked()
    for body in (b"1", b"2", b"1", b"3"):
        verdicts.decided(0, CHAT, body, asked)
    assert (asked.times, len(verdicts)) == (3, 2)

    verdicts.decided(0, CHAT, b"1", asked)
    assert asked.times == 3
    verdicts.decided(0, CHAT, b"2", asked)
    assert asked.times == 4


def test_a_new_version_forgets_everything() -> None:
    verdicts, old, new = Verdicts(version=1), Asked(), Asked(flagged(1))
    verdicts.decided(1, CHAT, b"{}", old)

    verdicts.clear(2)

    assert len(verdicts) == 0
    assert verdicts.decided(2, CHAT, b"{}", new).flagged


def test_what_an_old_version_decides_late_is_not_kept() -> None:
    verdicts = Verdicts(version=1)

    def swapped_meanwhile() -> Decision:
        verdicts.clear(2)
        return PASS

    assert verdicts.decided(1, CHAT, b"{}", swapped_meanwhile) is PASS

    assert len(verdicts) == 0
    assert verdicts.decided(2, CHAT, b"{}", Asked(flagged(1))).flagged
    assert not verdicts.decided(1, CHAT, b"{}", Asked()).flagged


def test_a_failure_is_not_remembered() -> None:
    verdicts = Verdicts()

    def fails() -> Decision:
        raise StageError("detect", ValueError("no"))

    with pytest.raises(StageError):
        verdicts.decided(0, CHAT, b"{}", fails)

    assert verdicts.decided(0, CHAT, b"{}", Asked()) is PASS


@pytest.mark.parametrize(
    "verdicts_and_decision",
    [
        pytest.param(lambda: (Verdicts(entries=0), PASS), id="switched off"),
        pytest.param(lambda: (Verdicts(), flagged(MOST_SPANS + 1)), id="too large"),
    ],
)
def test_some_decisions_are_made_every_time(
    verdicts_and_decision: Callable[[], tuple[Verdicts, Decision]],
) -> None:
    verdicts, decision = verdicts_and_decision()
    asked = Asked(decision)

    for _ in range(2):
        assert verdicts.decided(0, CHAT, b"{}", asked) is decision

    assert (asked.times, len(verdicts)) == (2, 0)


def test_nothing_that_is_kept_holds_text() -> None:
    verdicts = Verdicts()
    verdicts.decided(0, CHAT, b'{"secret wizard"}', Asked())

    assert all(b"wizard" not in digest and len(digest) == 16 for digest in verdicts._kept)
