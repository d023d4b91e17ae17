import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.labelled import Example
from benchmarks.latency import (
    CLEARED,
    ENCODED,
    STAGES,
    Subject,
    Timings,
    about_tokens,
    forgetful,
    latency_rows,
    metered,
    time_bundles,
    token_places,
)
from benchmarks.report import Row
from guard.build import load_guard
from guard.bundle import BundleStore
from guard.errors import DataError
from guard.keys import GuardKey
from guard.types import FloatArray

BENIGN = "What is a good way to learn how to cook rice so that it does not stick to the pot?"
ASKED = (
    "Which spell does Harry Potter learn first, and who of his friends at school can do it best?"
)


@pytest.fixture(scope="module")
def subject(small_bundle: BundleStore, guard_key: GuardKey) -> Subject:
    guard = load_guard(store=small_bundle, key=guard_key, prompts=None, ledger=None, threads=1)
    return Subject("small", forgetful(guard), guard)


def words(text: str) -> list[tuple[int, int]]:
    found, at = [], 0
    for word in text.split():
        start = text.index(word, at)
        at = start + len(word)
        found.append((start, at))
    return found


def one(rows: Sequence[Row], **wanted: object) -> Row:
    (found,) = (r for r in rows if all(getattr(r, k) == v for k, v in wanted.items()))
    return found


def test_prompts_of_about_32_tokens_are_taken_and_longer_ones_cut() -> None:
    sizes = (3, 15, 16, 40, 41, 500)
    texts = [" ".join(f"w{n}" for n in range(size)) for size in sizes]
    found = about_tokens([Example(text) for text in texts], words)
    assert [len(one.text.split()) for one in found] == [16, 40, 32, 32]
    assert texts[-1].startswith(found[-1].text)
    with pytest.raises(DataError, match="16 tokens"):
        about_tokens([Example("too short")], words)


def test_tokens_are_those_of_the_detector(subject: Subject) -> None:
    text = "The keeper counted ships. " * 40
    places = token_places(subject.detector)(text)
    assert len(places) == 40 * 5
    assert [text[a:b] for a, b in places[:5]] == ["The", "keeper", "counted", "ships", "."]


def test_times_are_sorted_by_what_the_prompt_needed(subject: Subject) -> None:
    other = Subject("again", subject.detector, subject.guard)
    examples = [Example(BENIGN), Example(ASKED), Example(BENIGN.upper())]
    found = time_bundles([subject, other], examples, rounds=3)
    assert list(found) == ["small", "again"]
    for timings in found.values():
        assert timings.encoded.tolist() == [False, True, False]
        for times in (timings.verdicts, timings.decisions, *timings.stages.values()):
            assert times.shape == (3, 3)
        assert (timings.verdicts > 0).all() and (timings.decisions > 0).all()
        assert (timings.stages["encoding"][:, 1] > 0).all()
        assert not timings.stages["encoding"][:, [0, 2]].any(), "cleared without the encoder"
        assert (timings.stages["first stage"] > 0).all()


def test_a_verdict_is_made_anew_each_time(subject: Subject) -> None:
    with metered(subject.detector) as spent:
        subject.detector.verdict(ASKED)
        once = spent["encoding"]
        subject.detector.verdict(ASKED)
    assert 0 < once < spent["encoding"]


def test_a_meter_is_taken_off_again(subject: Subject) -> None:
    before = subject.detector.verdict(ASKED)
    with pytest.raises(ValueError, match="out of here"), metered(subject.detector):
        raise ValueError("out of here")
    with metered(subject.detector) as spent:
        assert subject.detector.verdict(ASKED) == before
    seen = dict(spent)
    assert set(seen) == set(STAGES[:-1])
    subject.detector.verdict(ASKED)
    assert spent == seen


def timings(verdicts: FloatArray, encoded: Sequence[bool]) -> Timings:
    stages = {stage: verdicts * (0.1 * (n + 1)) for n, stage in enumerate(STAGES)}
    return Timings(np.array(encoded, np.bool_), verdicts, 2 * verdicts, stages)


def test_figures_leave_the_first_round_apart() -> None:
    base = np.array([[50.0, 90.0], [1.0, 4.0], [1.0, 4.0]], np.float32)
    ours = np.array([[70.0, 99.0], [1.5, 6.0], [1.5, 6.0]], np.float32)
    both = [False, True]
    found = {"one": timings(base, both), "many": timings(ours, both)}
    rows = latency_rows(found, ["a", "a"])

    def p50(system: str, group: str, route: str = "verdict") -> float | None:
        return one(rows, system=system, group=group, route=route, measure="latency_p50_ms").value

    assert (p50("one", CLEARED), p50("one", ENCODED)) == (1.0, 4.0)
    assert (p50("many", CLEARED), p50("many", ENCODED, "decide")) == (1.5, 12.0)
    assert p50("one", f"{CLEARED}, first") == 50.0
    shares = [
        one(rows, system="one", group=f"{ENCODED}: {stage}", measure="stage_share").value
        for stage in STAGES
    ]
    assert shares == pytest.approx([0.1, 0.2, 0.3, 0.4])
    for group in ("a", CLEARED, ENCODED):
        row = one(rows, route="verdict", group=group, measure="latency_p50_ratio")
        assert row.system == "many" and row.value == pytest.approx(1.5)
        assert row.ci_low == pytest.approx(1.5) and row.ci_high == pytest.approx(1.5)


def test_ratios_compare_prompts_that_took_the_same_way() -> None:
    base = timings(np.full((3, 3), 1.0, np.float32), [False, False, True])
    slow = np.array([[9.0, 9.0, 9.0]] + [[2.0, 8.0, 3.0]] * 2, np.float32)
    rows = latency_rows({"one": base, "many": timings(slow, [False, True, True])}, ["a", "b", "b"])

    def ratio(group: str) -> Row:
        return one(rows, route="verdict", group=group, measure="latency_p50_ratio")

    assert ratio(CLEARED).value == pytest.approx(2.0)
    assert ratio(ENCODED).value == pytest.approx(3.0)
    assert ratio("a").value == pytest.approx(2.0) and ratio("a").n == 2
    assert ratio("b").value == pytest.approx(5.5) and ratio("b").n == 4
    shares = {(r.system, r.group): r.value for r in rows if r.measure == "encoded_share"}
    assert shares == {("one", "a"): 0, ("one", "b"): 0.5, ("many", "a"): 0, ("many", "b"): 1}
    counts = {(r.system, r.group): r.value for r in rows if r.measure == "prompts"}
    assert counts == {
        ("one", CLEARED): 2, ("one", ENCODED): 1, ("many", CLEARED): 1, ("many", ENCODED): 2,
    }  # fmt: skip


def test_a_group_without_prompts_has_no_figures() -> None:
    rows = latency_rows({"one": timings(np.ones((2, 2), np.float32), [False, False])}, ["a", "a"])
    assert not [r for r in rows if r.group == ENCODED and r.measure != "prompts"]
    assert one(rows, group=ENCODED, measure="prompts").value == 0


def test_a_slow_stage_shows(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    index = type(subject.detector._index)
    plain = index.read

    def slow(*arguments: object) -> object:
        time.sleep(0.05)
        return plain(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(index, "read", slow)
    found = time_bundles([subject], [Example(BENIGN)], rounds=2)["small"]
    assert found.stages["first stage"].min() >= 50.0
    assert found.stages["heads and fusion"].max() < 50.0
