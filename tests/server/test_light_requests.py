"""Small, plain requests are decided on the event loop; all others, and failures, as ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from server.app import create_app
from server.light import LIGHT_BYTES, LIGHT_CODES, LIGHT_SIGNS
from tests.server.proxy_fakes import (
    CHAT,
    Inspected,
    ScriptedEngine,
    WordGuard,
    chat,
    error_of,
    running,
)


@dataclass
class BegunGuard(WordGuard):
    """Decides at once but on texts with `wizard`; tells which threads worked."""

    begun: list[str] = field(default_factory=list)
    inspected: list[str] = field(default_factory=list)

    def begin(self, endpoint: str, body: bytes) -> Inspected | Callable[[], Inspected]:
        self.begun.append(threading.current_thread().name)
        if b"wizard" in body:
            return lambda: self.inspect(endpoint, body)
        return super().inspect(endpoint, body)

    def inspect(self, endpoint: str, body: bytes) -> Inspected:
        self.inspected.append(threading.current_thread().name)
        return super().inspect(endpoint, body)


@dataclass
class Served:
    guard: BegunGuard
    engine: ScriptedEngine
    http: httpx.Client

    def ask(self, text: str) -> httpx.Response:
        return self.http.post(CHAT, json=chat(text))


@pytest.fixture
def served() -> Iterator[Served]:
    guard, engine = BegunGuard(), ScriptedEngine()
    app: Any = create_app(guard, engine)  # type: ignore[arg-type]
    with running(app) as url, httpx.Client(base_url=url, timeout=20) as http:
        yield Served(guard, engine, http)


def test_a_plain_request_takes_no_thread(served: Served) -> None:
    assert served.ask("hello").status_code == 200
    assert len(served.guard.begun) == 1 and served.guard.inspected == []
    assert len(served.engine.posts) == 1


def test_what_takes_long_goes_on_in_a_thread(served: Served) -> None:
    assert served.ask("the wizard").status_code == 200
    assert served.guard.recorded == ["corrupt"]
    (name,) = served.guard.inspected
    assert name.startswith("guard") and not served.guard.begun[0].startswith("guard")


@pytest.mark.parametrize(
    "text",
    ["x " * (LIGHT_BYTES // 2), "w- " * (LIGHT_SIGNS + 1), "dGh " * (LIGHT_CODES + 1)],
    ids=["long", "signs", "codes"],
)
def test_what_may_have_many_readings_is_not_even_begun(served: Served, text: str) -> None:
    assert served.ask(text).status_code == 200
    assert served.guard.begun == [] and len(served.guard.inspected) == 1


@pytest.mark.parametrize(
    ("text", "status"), [("forbidden", 400), ("unread", 400), ("broken", 503), ("bug", 500)]
)
def test_refusals_and_failures_reach_no_engine(served: Served, text: str, status: int) -> None:
    response = served.ask(text)
    assert response.status_code == status
    assert text not in error_of(response)["message"]
    assert served.guard.begun and served.engine.posts == []
