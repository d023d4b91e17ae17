"""What the output guard does is counted: checks by outcome, and what is held back for how long."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import httpx
import pytest

from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from server.app import create_app
from server.types import ServerOptions
from tests.guard.routed import guard_of
from tests.server.proxy_fakes import CHAT, chat, running
from tests.server.test_output_guard import CLEAN, NAMELESS, TOLD, TalkingEngine

HOLD_BACK = 8
LONG = " ".join(f"word{number}" for number in range(40))


@pytest.fixture
def guard(prompts: ModelPrompts) -> Guard:
    return guard_of(prompts, {})


def counted(
    guard: Guard, texts: list[str | tuple[str, ...]], *, output_guard: bool = True, **fields: Any
) -> Mapping[str, float]:
    """Ask once, and return the samples of the server's metrics."""
    engine = TalkingEngine(texts=texts)
    options = ServerOptions(hold_back=HOLD_BACK, output_guard=output_guard)
    with running(create_app(guard, engine, options)) as url:
        answer = httpx.post(url + CHAT, json=chat(NAMELESS, **fields), timeout=20)
        assert answer.status_code == 200
        text = httpx.get(f"{url}/metrics").text
    return {
        name: float(value)
        for name, value in re.findall(r"^unlearn_guard_(\S+) (\S+)$", text, re.MULTILINE)
    }


def test_each_event_of_a_stream_is_held_back_for_some_time(guard: Guard) -> None:
    found = counted(guard, [LONG], stream=True)
    events = 40 + 2  # words, and the beginning and the end
    assert found["hold_back_seconds_count"] == events
    assert 0 < found["hold_back_seconds_sum"] < events * 20
    # The first event says nothing and leaves at once; then some leave whenever as many are held.
    assert found['hold_back_tokens_bucket{le="1.0"}'] <= 2
    assert found["hold_back_tokens_count"] >= events / HOLD_BACK
    assert (
        found[f'hold_back_tokens_bucket{{le="{HOLD_BACK}.0"}}'] == found["hold_back_tokens_count"]
    )
    assert found["hold_back_tokens_sum"] > found["hold_back_tokens_count"] * HOLD_BACK / 2


def test_what_is_not_checked_is_not_held_back(guard: Guard) -> None:
    for found in (
        counted(guard, [CLEAN]),  # whole
        counted(guard, [CLEAN], stream=True, output_guard=False),
    ):
        assert found["hold_back_seconds_count"] == found["hold_back_tokens_count"] == 0
    assert not any(name.startswith("answer_checks_total") for name in found)


@pytest.mark.parametrize("stream", [False, True])
def test_checks_are_counted_by_what_they_found(guard: Guard, stream: bool) -> None:
    clean = counted(guard, [CLEAN], stream=stream)
    # This detector has no first look, so every text is read whole.
    assert clean['answer_checks_total{outcome="suspected"}'] >= 1
    assert 'answer_checks_total{outcome="hit"}' not in clean
    told = counted(guard, [TOLD, CLEAN], stream=stream)
    assert told['answer_checks_total{outcome="hit"}'] == 1
    assert told['remakes_total{outcome="again"}'] == 1


def test_a_first_look_is_counted_as_such(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> None:
    detector: Any = guard.detector
    monkeypatch.setattr(type(detector), "detect_lightly", detector.detect.__func__, raising=False)
    found = counted(guard, [CLEAN])
    assert found['answer_checks_total{outcome="clean"}'] == 1
    assert 'answer_checks_total{outcome="suspected"}' not in found
