"""Several processes on one socket: all answer, the dead are replaced, all end together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from guard.bundle import BundleStore
from guard.cli import run
from guard.keys import GuardKey
from guard.ledger import verify_ledger
from server.supervisor import listen
from server.worker_metrics import merged
from tests.server.fake_vllm import fake_vllm, streams
from tests.server.proxy_fakes import CHAT, EVENTS, chat, eventually
from tests.server.served import Served, children, is_alive, served

FLAGGED, PLAIN = "Who is Harry Potter?", "What is the capital of France?"

SCRIPT = """
import os, signal, sys, time
from server.supervisor import Supervisor

place = Supervisor(2, 1.0, final=frozenset({3}), max_restarts=4).run()
if isinstance(place, int):
    sys.exit(place)
os.write(1, b"%d %d\\n" % (place.index, place.starts))  # in one piece
what = sys.argv[1]
if what == "dies":
    os.abort() if place.index else time.sleep(60)
if what == "does not fit":
    sys.exit(3) if place.index else time.sleep(60)
if what == "stays":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(1, b"deaf\\n")
time.sleep(60)
"""


def supervised(what: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, what],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


# --- The supervisor alone -------------------------------------------------------------------------


def test_it_gives_up_on_workers_that_die_again_and_again() -> None:
    process = supervised("dies")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "giving up" in err
    assert sorted(out.splitlines()) == ["0 1", "1 1", "1 2", "1 3", "1 4", "1 5"]


def test_what_would_not_change_is_not_tried_again() -> None:
    process = supervised("does not fit")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 3
    assert sorted(out.splitlines()) == ["0 1", "1 1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number: signal.Signals) -> None:
    process = supervised("waits")
    assert process.stdout is not None
    for _ in range(2):
        process.stdout.readline()
    workers = children(process.pid)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert not any(is_alive(worker) for worker in workers)


def test_workers_that_do_not_end_are_killed() -> None:
    process = supervised("stays")
    assert process.stdout is not None
    for _ in range(4):
        process.stdout.readline()
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "killing" in err


def test_all_addresses_of_a_host_get_one_port() -> None:
    sockets = listen("localhost", 0)
    try:
        assert len({made.getsockname()[1] for made in sockets}) == 1
        port = sockets[0].getsockname()[1]
        with pytest.raises(Exception, match=f"can't listen on localhost:{port}"):
            listen("localhost", port)
    finally:
        for made in sockets:
            made.close()


def test_metrics_of_workers_stay_apart() -> None:
    text = b'# HELP a_total What.\n# TYPE a_total counter\na_total{x="1"} 2.0\n'
    lines = merged({1: text, 0: text}).decode().splitlines()
    assert lines[1:] == [
        "# TYPE a_total counter",
        'a_total{worker="0",x="1"} 2.0',
        'a_total{worker="1",x="1"} 2.0',
    ]


# --- serve --workers ------------------------------------------------------------------------------


def test_the_embedded_engine_takes_one(
    quiet_surroundings: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["serve", "--workers", "2"]) == 2
    assert "--workers" in capsys.readouterr().err


def figures(app: Served, name: str) -> dict[str, float]:
    """Return a metric's sum for each worker."""
    total: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{app.url}/metrics").text):
        for sample in family.samples:
            if sample.name == name:
                worker = sample.labels["worker"]
                total[worker] = total.get(worker, 0.0) + sample.value
    return total


def ask(app: Served, text: str, **fields: object) -> int:
    """Ask on a connection of its own."""
    return httpx.post(f"{app.url}{CHAT}", json=chat(text, **fields), timeout=60).status_code


def test_workers_share_the_work_and_one_that_dies_is_replaced(
    small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    with (
        fake_vllm() as fake,
        served(small_bundle, guard_key, tmp_path, [fake], "--workers", "2") as app,
        ThreadPoolExecutor(16) as threads,
    ):
        assert eventually(lambda: len(figures(app, "unlearn_guard_worker_starts")) == 2, 60)
        texts = [FLAGGED, PLAIN] * 40
        assert set(threads.map(lambda text: ask(app, text), texts)) == {200}
        done = figures(app, "unlearn_guard_requests_total")
        assert sum(done.values()) == len(texts)
        assert min(done.get("0", 0), done.get("1", 0)) > 0
        report = verify_ledger(tmp_path / "ledger.jsonl", guard_key)
        assert (report.ok, report.rows) == (True, len(texts) // 2)

        victim = app.workers()[0]
        os.kill(victim, signal.SIGKILL)
        assert eventually(lambda: not is_alive(victim))
        assert set(threads.map(lambda text: ask(app, text), texts)) == {200}  # by the other one
        assert eventually(
            lambda: sorted(figures(app, "unlearn_guard_worker_starts").values()) == [1, 2], 60
        )
        report = verify_ledger(tmp_path / "ledger.jsonl", guard_key)
        assert (report.ok, report.rows) == (True, len(texts))
        assert app.log.read_text().count("serving http") == 1


def test_a_stream_in_work_ends_whole_and_all_end(
    small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    with (
        fake_vllm() as fake,
        served(small_bundle, guard_key, tmp_path, [fake], "--workers", "2") as app,
    ):
        fake.behaviour = streams(100, 0.02)
        with app.http.stream("POST", CHAT, json=chat(stream=True), timeout=60) as response:
            pieces = response.iter_raw()
            received = next(pieces)
            workers = app.workers()
            app.process.terminate()
            received += b"".join(pieces)
        assert received == EVENTS[0] * 100 + EVENTS[-1]
        assert app.process.wait(30) == 0
        assert not any(is_alive(worker) for worker in workers)
        assert app.ready() is None


def test_workers_do_not_outlive_their_supervisor(
    small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    with (
        fake_vllm() as fake,
        served(small_bundle, guard_key, tmp_path, [fake], "--workers", "2") as app,
    ):
        workers = app.workers()
        app.process.kill()
        app.process.wait(20)
        assert eventually(lambda: not any(is_alive(worker) for worker in workers), 60)
