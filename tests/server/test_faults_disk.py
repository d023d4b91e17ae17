"""The guard's own disk fails, and what it runs with changes, in a server process under load."""

from __future__ import annotations

import asyncio
import hashlib
import json
import resource
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
import pytest

from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.ledger import verify_ledger
from tests.server.fake_vllm import FakeVllm, fake_vllm, streams
from tests.server.proxy_fakes import CHAT, EVENTS, chat, error_of, eventually
from tests.server.served import Served, served

FLAGGED = "Who is Harry Potter?"
WORDS = 40


@pytest.fixture
def fake() -> Iterator[FakeVllm]:
    with fake_vllm() as made:
        yield made


# --- Disk -----------------------------------------------------------------------------------------


def ask(app: Served, text: str, *, stream: bool) -> httpx.Response:
    return app.http.post(CHAT, json=chat(text, stream=stream), timeout=30)


def check_no_ledger(app: Served) -> None:
    """What is flagged is refused, as long as that can't be recorded; all else is answered."""
    for stream in (False, True):
        response = ask(app, FLAGGED, stream=stream)
        assert (response.status_code, error_of(response)["code"]) == (503, "guard_failed")
        assert ask(app, "hello", stream=stream).status_code == 200
    assert app.http.get("/health").status_code == 200


def is_answered(app: Served) -> Callable[[], bool]:
    return lambda: ask(app, FLAGGED, stream=False).status_code == 200


def limit_files(app: Served, size: int) -> None:
    """Let the server write no file beyond a size, as on a disk that is full there."""
    hard = resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE)[1]
    resource.prlimit(app.process.pid, resource.RLIMIT_FSIZE, (size, hard))


@pytest.mark.parametrize("room", [0, 100])
def test_a_disk_that_fills_up_and_is_cleared(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path, room: int
) -> None:
    """With some room, the beginning of a row could be written: it is taken back."""
    ledger = tmp_path / "ledger.jsonl"
    with served(small_bundle, guard_key, tmp_path, [fake]) as app:
        assert is_answered(app)()
        size = ledger.stat().st_size
        limit_files(app, size + room)
        check_no_ledger(app)
        assert ledger.stat().st_size == size
        limit_files(app, resource.RLIM_INFINITY)
        assert eventually(is_answered(app))
    report = verify_ledger(ledger, guard_key)
    assert report.ok, report
    kinds = [json.loads(line)["kind"] for line in ledger.read_bytes().splitlines()]
    assert kinds == ["decision", "decision"]


def test_a_folder_that_goes_and_returns(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    ledger = folder / "ledger.jsonl"
    with served(small_bundle, guard_key, tmp_path, [fake], ledger=ledger) as app:
        assert is_answered(app)()
        shutil.rmtree(folder)
        folder.write_text("in its place")
        check_no_ledger(app)
        folder.unlink()
        assert eventually(is_answered(app))
    assert ledger.exists()


# --- Changes under load ---------------------------------------------------------------------------


def entry(name: str) -> str:
    return f"- name: {name}\n  sha256: {hashlib.sha256(name.encode()).hexdigest()}\n"


async def streamed(session: aiohttp.ClientSession, key: str, text: str) -> str:
    headers = {"authorization": f"Bearer {key}"}
    async with session.post(CHAT, json=chat(text, stream=True), headers=headers) as response:
        raw = await response.read()
    if response.status != 200:
        return f"{key} {response.status}"
    whole = raw.endswith(EVENTS[-1]) and raw.count(EVENTS[0]) == WORDS
    return f"{key} whole" if whole else f"{key} CUT SHORT"


async def ask_at_once(url: str, count: int) -> Counter[str]:
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:
        texts = [FLAGGED if number % 4 == 0 else f"hello {number}" for number in range(count)]
        return Counter(await asyncio.gather(*(streamed(session, "none", text) for text in texts)))


@pytest.mark.slow
def test_a_thousand_streams_at_once_are_whole_or_refused_and_leave_nothing(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    """With the real guard, a quarter of them flagged, every answer read before it leaves."""
    with served(small_bundle, guard_key, tmp_path, [fake], max_in_flight=2_000) as app:
        assert is_answered(app)()
        opened = len(open_by(app))
        fake.behaviour = streams(WORDS, 0.25)
        ended = asyncio.run(ask_at_once(app.url, 1_000))
        # Those for which no worker is free in time are told so, before anything was sent on.
        assert set(ended) <= {"none whole", "none 503"} and ended["none whole"] > 500, ended
        assert "unlearn_guard_in_flight 0.0" in app.http.get("/metrics").text
        # Idle connections to vLLM may be kept for seconds.
        assert eventually(lambda: len(open_by(app)) <= opened + 2, 60)


def open_by(app: Served) -> list[Path]:
    return list(Path(f"/proc/{app.process.pid}/fd").iterdir())


async def ask_until(url: str, done: threading.Event) -> Counter[str]:
    """Have a dozen streams run at any time, of two keys, until the event and a little longer."""
    ended: Counter[str] = Counter()
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int) -> None:
            more = True
            while more:
                more = not done.is_set()
                text = FLAGGED if number % 3 == 0 else f"hello {number}"
                ended[await streamed(session, ("old", "kept")[number % 2], text)] += 1

        await asyncio.gather(*(client(number) for number in range(12)))
    return ended


def test_bundle_and_keys_change_under_load_and_no_stream_is_dropped(
    fake: FakeVllm, small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    store = BundleStore(shutil.copytree(small_bundle.root, tmp_path / "bundle"), guard_key)
    keys = tmp_path / "keys.yaml"
    keys.write_text(entry("old") + entry("kept"))
    fake.behaviour = streams(WORDS, 0.02)
    settings = {"api_keys_file": keys, "reload_s": 0.2}
    with served(store, guard_key, tmp_path, [fake], **settings) as app:
        first, done = version(app), threading.Event()

        def changes() -> None:
            try:
                for number in range(3):
                    with store.transaction() as draft:
                        draft.manifest.targets["harry-potter"].notes.append("another version")
                    assert eventually(lambda n=number: version(app) == first + n + 1, 30)
                keys.write_text(entry("kept") + entry("new"))
                assert eventually(lambda: status(app, "new") == 200)
                assert status(app, "old") == 401
            finally:
                done.set()

        thread = threading.Thread(target=changes)
        thread.start()
        ended = asyncio.run(ask_until(app.url, done))
        thread.join()
        assert version(app) == first + 3
        assert status(app, "new") == 200
    assert set(ended) <= {"old whole", "old 401", "kept whole"}, ended
    assert ended["old whole"] and ended["kept whole"], ended


def version(app: Served) -> int:
    answer = app.ready()
    assert answer is not None
    return int(answer.json()["bundle_version"])


def status(app: Served, key: str) -> int:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.get(f"{app.url}/v1/models", headers=headers).status_code
