import json
import sys
from base64 import b64encode
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from benchmarks.mock_upstream import MODEL, PACED_MODEL, stamp_key
from benchmarks.report import Row, read_report
from benchmarks.serve_arms import BundlePlace, count_targets, without_targets
from benchmarks.serve_bench import Measured
from benchmarks.serve_delays import arrivals, relay_delays
from benchmarks.serve_load import Job, Load, Outcome, numbered
from benchmarks.serve_process import Client, Cores, Server, free_port
from benchmarks.serve_rows import goal_table, serve_rows
from benchmarks.serve_stages import stage_rows, time_stages
from guard.build import load_guard
from guard.bundle import BundleStore
from guard.cli import run
from guard.errors import EngineError
from guard.keys import GuardKey
from guard.prompts import ModelPrompts

MS = 1_000_000
QUESTIONS = [f"How many legs do {n} spiders have?" for n in range(40)]


@pytest.fixture(scope="module")
def mock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    port, log = free_port(), tmp_path_factory.mktemp("mock") / "mock.log"
    words = [sys.executable, "-m", "benchmarks.mock_upstream", "--port", str(port)]
    with Server([*words, "--pace-ms", "5"], port, "/health", Cores.pick().client, log) as server:
        server.wait()
        yield server


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client({"plain": QUESTIONS}, Cores.pick().client) as found:
        yield found


@pytest.fixture
def place(small_bundle: BundleStore, guard_key: GuardKey, tmp_path: Path) -> BundlePlace:
    key_file = tmp_path / "default.key"
    key_file.write_text(b64encode(guard_key._secret).decode())
    key_file.chmod(0o600)
    return BundlePlace.of(small_bundle.root, key_file)


# --- The mock -------------------------------------------------------------------------------


def ask(mock: Server, **fields: object) -> httpx.Response:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Why?"}], **fields}
    return httpx.post(f"http://127.0.0.1:{mock.port}/v1/chat/completions", json=body)


def test_the_mock_answers_whole_and_lists_its_models(mock: Server) -> None:
    answer = ask(mock)

    assert answer.json()["choices"][0]["message"]["content"]
    assert 450 <= len(answer.content) <= 650
    listed = httpx.get(f"http://127.0.0.1:{mock.port}/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == [MODEL, PACED_MODEL]
    assert httpx.get(f"http://127.0.0.1:{mock.port}/v1/secrets").status_code == 404


@pytest.mark.parametrize("model", [MODEL, PACED_MODEL])
def test_the_mock_streams_as_many_events_as_tokens_are_asked(mock: Server, model: str) -> None:
    text = ask(mock, model=model, stream=True, max_tokens=7).text

    *events, done = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    choices = [json.loads(event)["choices"][0] for event in events]
    assert done == "[DONE]"
    assert len(choices) == 7
    assert [one["finish_reason"] for one in choices] == [None] * 6 + ["stop"]


def test_the_mock_tells_when_it_sent_what(mock: Server) -> None:
    ask(mock, model=PACED_MODEL, stream=True, max_tokens=5)

    url = f"http://127.0.0.1:{mock.port}/stamps?key={stamp_key('Why?')}"
    stamps = httpx.get(url).json()
    assert len(stamps) == 5
    assert all(later - earlier > 3 * MS for earlier, later in pairwise(stamps))


# --- The client -----------------------------------------------------------------------------


def test_a_load_asks_as_often_as_it_was_told(mock: Server, client: Client) -> None:
    outcome = client.run(Job(load=Load(port=mock.port, count=20, concurrency=2, seconds=20)))

    assert outcome.asked == 20
    assert outcome.statuses == {"200": 20}
    assert len(outcome.latency_ms) == 20
    assert all(
        first <= whole for first, whole in zip(outcome.first_ms, outcome.latency_ms, strict=True)
    )


def test_a_load_keeps_to_its_rate(mock: Server, client: Client) -> None:
    outcome = client.run(Job(load=Load(port=mock.port, concurrency=4, seconds=0.5, rate=20)))

    assert 5 <= outcome.asked <= 20


def test_a_server_that_is_not_there_is_counted(client: Client) -> None:
    outcome = client.run(Job(load=Load(port=free_port(), count=3, seconds=5)))

    assert outcome.statuses == {"0": 3}


def test_streams_are_followed_beside_a_load(mock: Server, client: Client) -> None:
    load = Load(port=mock.port, concurrency=2, rate=200)
    job = Job(load=load, streams=2, chunks=30, upstream=mock.port, port=mock.port)

    outcome = client.run(job)

    assert len(outcome.delays_ms) == 60
    assert min(outcome.delays_ms) >= 0
    assert outcome.held == 0
    assert outcome.statuses["200"] > 1


def test_no_text_is_asked_twice() -> None:
    texts = numbered(["a", "b"], start=1)

    assert [next(texts) for _ in range(4)] == ["b", "a (2)", "b (2)", "a (3)"]


def test_words_are_found_however_events_are_cut() -> None:
    event = b'data: {"choices":[{"delta":{"content": "one two \\"x\\" "}}]}\n\n'

    assert arrivals([(1, event[:30]), (2, event[30:]), (3, event)]) == [2, 2, 2, 3, 3, 3]


def test_holding_back_is_told_from_delay() -> None:
    sent = [n * 20 * MS for n in range(30)]
    held_words = 4
    arrived = [sent[min(n + held_words, 29)] + 2 * MS for n in range(30)]

    delays, held = relay_delays(arrived, sent)
    assert held == held_words
    assert delays == pytest.approx([2.0] * 30)

    by_the_dozen = [sent[n // 12 * 12 + 23] + MS for n in range(29 - 23)]
    assert relay_delays(by_the_dozen, sent)[0] == pytest.approx([1.0] * 6)

    late = [at + 50 * MS for at in sent]
    assert relay_delays([*sent[:20], *late[20:]], sent)[0][20:] == pytest.approx([50.0] * 10)


# --- The figures ----------------------------------------------------------------------------


class _Here:
    """Arms without processes."""

    arms: list[object] = []


def outcome(latency: float, count: int = 10, seconds: float = 1.0) -> Outcome:
    times = [latency] * count
    return Outcome(
        latency_ms=times, first_ms=times, seconds=seconds, asked=count, statuses={"200": count}
    )


def value(rows: list[Row], system: str, measure: str, group: str) -> float | None:
    return next(
        row.value
        for row in rows
        if (row.system, row.measure, row.group) == (system, measure, group)
    )


def test_ratios_are_taken_within_a_round() -> None:
    direct = Measured([outcome(1.0), outcome(10.0), outcome(100.0)], [0.0] * 3)
    guard = Measured([outcome(3.0), outcome(30.0), outcome(300.0)], [50.0, 70.0, 60.0])

    rows = serve_rows({("c1", "direct"): direct, ("c1", "guard"): guard}, _Here())  # type: ignore[arg-type]

    assert value(rows, "guard", "latency_p50_ratio", "to direct") == pytest.approx(3.0)
    assert value(rows, "guard", "added_latency_p50_ms", "to direct") == pytest.approx(20.0)
    assert value(rows, "guard", "cpu_us_per_request", "all") == pytest.approx(6.0)
    assert value(rows, "direct", "rps", "all") == pytest.approx(10.0)


def test_time_on_a_cpu_is_compared_where_both_have_some() -> None:
    found = {
        ("c1", name): Measured([outcome(1.0)], [spent])
        for name, spent in (("direct", 0.0), ("relay", 20.0), ("guard", 60.0))
    }

    rows = serve_rows(found, _Here())  # type: ignore[arg-type]

    groups = {row.group for row in rows if row.system == "guard" and row.measure == "cpu_ratio"}
    assert groups == {"to relay"}
    assert value(rows, "guard", "cpu_ratio", "to relay") == pytest.approx(3.0)


def test_what_got_no_answer_is_reported() -> None:
    broken = outcome(1.0)
    broken.statuses = {"200": 7, "503": 2, "0": 1}

    rows = serve_rows({("c1", "guard"): Measured([broken], [1.0])}, _Here())  # type: ignore[arg-type]

    assert value(rows, "guard", "not_answered", "all") == 3.0


def test_goals_are_told_reached_missed_or_not_measured() -> None:
    rows = [
        Row("guard", "c8 once", "rps", "all", 299.0, None, None, 1),
        Row("guard", "start", "cold_start_s", "all", 2.5, None, None, 1),
        Row("many", "start", "rss_start_mb", "all", 1.0, None, None, 1),
    ]

    told = {line[0]: line[3] for line in goal_table(rows, many=None)}

    assert told["requests/s, each text once"] == "no"
    assert told["cold start, s"] == "yes"
    assert told["memory, many targets, MB"] == "-"


# --- The guard's own ------------------------------------------------------------------------


def test_a_bundle_without_targets_detects_nothing(place: BundlePlace, tmp_path: Path) -> None:
    empty = without_targets(place, tmp_path / "empty")

    assert count_targets(empty) == 0
    assert count_targets(place) == 1
    key = GuardKey.load_or_create(empty.key_file)
    guard = load_guard(store=BundleStore(empty.path, key), key=key, prompts=None, ledger=None)
    assert not guard.detector.detect(["Who is Harry Potter?"]).hits[0]


def test_stages_are_timed(place: BundlePlace, prompts: ModelPrompts) -> None:
    key = GuardKey.load_or_create(place.key_file)
    store = BundleStore(place.path, key)
    guard = load_guard(store=store, key=key, prompts=prompts, ledger=None, threads=1)

    found = time_stages(guard, QUESTIONS[:5], ["Who is Harry Potter?"], rounds=1)

    rows = {row.group: row.value for row in stage_rows(found) if row.measure == "stage_p50_us"}
    assert rows["parse"] and rows["view"] and rows["inspect"]
    assert rows["encoder pass"] and rows["rewrite"]
    assert rows["inspect"] > rows["parse"]
    assert found.encoded.sum() == 0


def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('no such thing'); raise SystemExit(3)"]
    server = Server(words, free_port(), "/", Cores.pick().server, tmp_path / "log")
    with server, pytest.raises(EngineError, match="no such thing"):
        server.wait()


@pytest.mark.usefixtures("quiet_surroundings")
def test_the_command_measures_and_reports(
    place: BundlePlace, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "traffic.txt").write_text("\n".join(QUESTIONS))
    words = ["bench", "serve", "--bundle", str(place.path), "--key-file", str(place.key_file)]
    words += ["--prompts", "traffic.txt", "--no-peers", "--quick", "--out", "out"]

    assert run([*words, "--variant", "workers=1", "--many", "missing"]) == 2
    assert run([*words, "--variant", "no_such=1"]) == 2
    capfd.readouterr()

    assert run(words) == 0, capfd.readouterr().err

    rows = read_report(tmp_path / "out").rows
    assert {row.system for row in rows} == {"direct", "relay", "guard, detection off", "guard"}
    assert not [row for row in rows if row.measure == "not_answered"]
    known = {(row.system, row.route, row.measure, row.group): row.value for row in rows}
    assert known["guard", "start", "torch_loaded", "all"] == 0.0
    assert known["guard", "c8 fixed", "rps", "all"]
    assert known["guard", "c1", "added_latency_p50_ms", "to direct"]
    assert known["guard, detection off", "c8 fixed", "rps_ratio", "to relay"]
    assert known["guard", "in process", "cleared_share", "plain"] == 1.0
    assert "requests/s, each text once" in capfd.readouterr().out
