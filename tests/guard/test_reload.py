import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from guard.errors import ArtifactError, EngineUnavailableError, StageError
from guard.pipeline import Inspection, Rewritten
from guard.reload import LiveGuard
from guard.request import parse_request
from guard.types import Decision

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()


@dataclass
class VersionedGuard:
    """A guard that only knows its version."""

    version: int
    recorded: list[Inspection] = field(default_factory=list)

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        return Inspection(parse_request(endpoint, body), Decision(True, "corrupt", 1.0, ()))

    def rewrite(self, inspection: Inspection) -> Rewritten:
        return Rewritten(f"rewritten by {self.version}".encode())

    def record(self, inspection: Inspection) -> None:
        self.recorded.append(inspection)


class Shelf:
    """A bundle whose version and health the test sets."""

    def __init__(self) -> None:
        self.version, self.broken = 1, False
        self.loads = 0

    def load(self) -> Any:
        self.loads += 1
        if self.broken:
            raise ArtifactError("damaged")
        return VersionedGuard(self.version)

    def live(self, **more: Any) -> LiveGuard:
        return LiveGuard(self.load, lambda: self.version, **more)


def test_a_new_version_is_swapped_in_and_running_requests_keep_theirs() -> None:
    shelf = Shelf()
    live = shelf.live()
    old_guard: Any = live.guard
    old = live.inspect(CHAT, BODY)

    shelf.version = 2
    assert live.refresh() is True
    new = live.inspect(CHAT, BODY)

    assert (live.rewrite(old).body, live.rewrite(new).body) == (
        b"rewritten by 1",
        b"rewritten by 2",
    )
    live.record(old)
    assert old_guard.recorded == [old]
    assert live.refresh() is False
    assert shelf.loads == 2


def test_a_version_that_cannot_be_loaded_is_tried_once_and_the_old_one_stays() -> None:
    shelf = Shelf()
    live = shelf.live()

    shelf.version, shelf.broken = 2, True
    assert live.refresh() is False
    assert live.refresh() is False
    assert (live.guard.version, shelf.loads) == (1, 2)

    shelf.version, shelf.broken = 3, False
    assert live.refresh() is True
    assert live.guard.version == 3


def test_a_pointer_that_cannot_be_read_is_survived() -> None:
    def gone() -> int:
        raise ArtifactError("no bundle")

    live = LiveGuard(Shelf().load, gone)

    assert live.refresh() is False
    assert live.inspect(CHAT, BODY).decision.flagged


def test_nothing_is_decided_before_the_self_check() -> None:
    live = Shelf().live(closed=True)

    with pytest.raises(EngineUnavailableError) as caught:
        live.inspect(CHAT, BODY)
    assert not isinstance(caught.value, StageError)  # which `on_error: pass` would let through
    live.open()
    assert live.inspect(CHAT, BODY).decision.flagged


def test_it_follows_by_itself() -> None:
    shelf = Shelf()
    live = shelf.live()
    live.follow(0.01)
    shelf.version = 2

    _wait_until(lambda: live.guard.version == 2)

    live.stop()
    shelf.version = 3
    assert live.guard.version == 2


def _wait_until(met: Callable[[], bool]) -> None:
    import time

    deadline = time.monotonic() + 60
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)
