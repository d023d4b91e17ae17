"""A running server takes a changed settings file into use and drops no stream for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from guard.bundle import BundleStore
from guard.keys import GuardKey
from tests.server.fake_vllm import FakeVllm, fake_vllm, streams
from tests.server.proxy_fakes import CHAT, EVENTS, chat, eventually
from tests.server.served import Served, served

WORDS = 40


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_vllm() as made:
        yield made


def test_settings_change_under_a_running_stream(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    file = tmp_path / "guard.yaml"
    file.write_text("reload_s: 0.05\nmax_body_bytes: 5000\n")
    with served(small_bundle, guard_key, tmp_path, [fake], config=file) as app:
        at_once, fake.behaviour = fake.behaviour, streams(WORDS, 0.2)
        answers: list[httpx.Response] = []
        body = chat("hello", stream=True)
        asked = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{app.url}{CHAT}", json=body, timeout=60))
        )
        asked.start()
        assert eventually(lambda: bool(fake.posts), 20)
        fake.behaviour = at_once
        file.write_text("reload_s: 0.05\nmax_body_bytes: 1000\nmax_in_flight: 7\n")
        assert eventually(lambda: is_too_long(app), 20), app.log.read_text()
        assert "unlearn_guard_in_flight 1.0" in metrics(app), "the stream goes on meanwhile"
        file.write_text("max_body_bytes: none\n")
        assert eventually(lambda: "the settings stay as they were" in app.log.read_text(), 20)
        assert is_too_long(app)
        asked.join()
        (answer,) = answers
        assert answer.content.endswith(EVENTS[-1]) and answer.content.count(EVENTS[0]) == WORDS
        assert "takes a restart to have an effect: max_in_flight" in app.log.read_text()


def metrics(app: Served) -> str:
    return app.http.get("/metrics").text


def is_too_long(app: Served) -> bool:
    answer = app.http.post(CHAT, json=chat("word " * 400), timeout=30)
    assert answer.status_code in (200, 413)
    return answer.status_code == 413
