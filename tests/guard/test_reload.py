import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from guard.errors import (
    ArtifactError,
    EngineError,
    EngineUnavailableError,
    StageError,
)
from guard.pipeline import Inspection, Rewritten
from guard.reload import LiveGuard
from guard.request import parse_request
from guard.types import AdapterUse, Decision

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()


@dataclass
class VersionedGuard:
    """A guard that only knows its version."""

    version: int
    recorded: list[Inspection] = field(default_factory=list)

    @property
    def adapters(self) -> tuple[AdapterUse, ...]:
        """One of every version's own, and one of all versions."""
        names = (f"of version {self.version}", "of all")
        return tuple(AdapterUse(name, Path(name), 8, 1.0) for name in names)

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


class Preparing:
    """What makes adapters ready: notes what was asked, and which version was in use then."""

    def __init__(self, live: LiveGuard, fails_at: int = 0, error: Exception | None = None) -> None:
        self.live, self.fails_at, self.error = live, fails_at, error
        self.calls: list[tuple[int, list[str]]] = []
        live.prepare = self

    def __call__(self, adapters: Sequence[AdapterUse]) -> None:
        self.calls.append((self.live.guard.version, [use.key for use in adapters]))
        if len(self.calls) == self.fails_at and self.error is not None:
            raise self.error


def test_adapters_of_both_versions_are_ready_while_they_change() -> None:
    shelf = Shelf()
    preparing = Preparing(shelf.live())
    assert preparing.live.refresh() is False
    assert preparing.calls == []
    shelf.version = 2
    assert preparing.live.refresh() is True
    assert preparing.calls == [
        (1, ["of version 1", "of all", "of version 2", "of all"]),
        (2, ["of version 2", "of all"]),
    ]


@pytest.mark.parametrize("error", [EngineError("no room"), ArtifactError("x"), OSError("full")])
def test_a_version_whose_adapters_cannot_be_made_ready_is_not_used(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    preparing = Preparing(shelf.live(), fails_at=1, error=error)
    shelf.version = 2
    assert preparing.live.refresh() is False
    assert preparing.live.guard.version == 1
    assert f"version 1 stays: {error}" in caplog.text
    shelf.version = 3
    assert preparing.live.refresh() is True
    assert preparing.calls[1:] == [
        (1, ["of version 1", "of all", "of version 3", "of all"]),
        (3, ["of version 3", "of all"]),
    ]


def test_a_version_is_tried_again_when_the_engine_was_only_away(
    caplog: pytest.LogCaptureFixture,
) -> None:
    shelf = Shelf()
    preparing = Preparing(shelf.live(), fails_at=1, error=EngineUnavailableError("restarting"))
    shelf.version = 2
    assert preparing.live.refresh() is False
    assert preparing.live.guard.version == 1
    assert "can't take the bundle's new version yet" in caplog.text
    assert preparing.live.refresh() is True
    assert preparing.live.guard.version == 2


@pytest.mark.parametrize("error", [EngineError("busy"), OSError("full")])
def test_a_version_is_used_though_old_adapters_cannot_be_given_up(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf()
    preparing = Preparing(shelf.live(), fails_at=2, error=error)
    shelf.version = 2
    assert preparing.live.refresh() is True
    assert preparing.live.guard.version == 2
    assert f"may still be loaded: {error}" in caplog.text
    assert preparing.live.refresh() is False


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
