import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guard.errors import ArtifactError
from guard.keys import GuardKey
from guard.ledger import Ledger, verify_ledger

KEY = GuardKey(b"k" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bundle" / "ledger.jsonl"


def fill(path: Path, rows: int = 5, key: GuardKey | None = KEY) -> list[bytes]:
    ledger = Ledger(path, key)
    for number in range(rows):
        ledger.append("decision", targets=["ann"], route="corrupt", score=number / 7)
    return path.read_bytes().splitlines(keepends=True)


def test_rows_form_a_chain(path: Path) -> None:
    lines = [json.loads(line) for line in fill(path)]

    assert [row["seq"] for row in lines] == [1, 2, 3, 4, 5]
    assert lines[0]["prev"] == "0" * 64
    assert [row["prev"] for row in lines[1:]] == [row["hash"] for row in lines[:-1]]
    assert path.stat().st_mode & 0o777 == 0o600
    for key in (KEY, None):
        report = verify_ledger(path, key)
        assert (report.ok, report.rows, report.breaks) == (True, 5, ())
        assert report.authentic is (None if key is None else True)
        assert json.loads(json.dumps(report.to_dict()))["rows"] == 5


def test_a_row_takes_plain_numbers_of_numpy(path: Path) -> None:
    row = Ledger(path, KEY).append("decision", score=np.float32(1.5), n=np.int64(3), ok=np.True_)

    assert json.loads(path.read_bytes())["score"] == row["score"] == 1.5
    assert verify_ledger(path, KEY).ok


@pytest.mark.parametrize("fields", [{"seq": 1}, {"mac": "x"}, {"x": float("nan")}, {"x": {1}}])
def test_what_cannot_be_recorded_is_refused_and_leaves_nothing(
    path: Path, fields: dict[str, object]
) -> None:
    with pytest.raises(ValueError):
        Ledger(path, KEY).append("decision", **fields)
    assert not path.exists()


def test_every_flipped_byte_is_noticed(path: Path) -> None:
    original = b"".join(fill(path, 3))
    unnoticed = []
    for at in range(0, len(original), 5):
        changed = bytearray(original)
        changed[at] ^= 1
        path.write_bytes(changed)
        if verify_ledger(path).ok:
            unnoticed.append(at)

    # Without the key, nobody can tell whether a signature is the guard's.
    in_mac = [i for i in unnoticed if original.rfind(b'"mac"', 0, i) > original.rfind(b"\n", 0, i)]
    assert unnoticed == in_mac
    for at in unnoticed:
        changed = bytearray(original)
        changed[at] ^= 1
        path.write_bytes(changed)
        assert not verify_ledger(path, KEY).ok


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda rows: [*rows[:2], *rows[3:]], "line 3"),
        (lambda rows: [rows[1], rows[0], *rows[2:]], "line 1"),
        (lambda rows: [*rows[:2], rows[1], *rows[2:]], "line 3"),
        (lambda rows: [*rows[:2], b"hello\n", *rows[2:]], "line 3"),
        (lambda rows: rows[1:], "line 1"),
        (lambda rows: [*rows[:1], rows[1].replace(b"corrupt", b"pass"), *rows[2:]], "line 2"),
        (lambda rows: [*rows[:1], rows[1].replace(b",", b", ", 1), *rows[2:]], "line 2"),
        (lambda rows: rows[:-1], "end"),
        (lambda rows: [], "end"),
    ],
)
def test_the_place_of_a_break_is_told(path: Path, change, place: str) -> None:  # type: ignore[no-untyped-def]
    rows = fill(path)
    path.write_bytes(b"".join(change(rows)))

    report = verify_ledger(path)

    assert not report.ok
    assert report.breaks[0].startswith(f"{place}:")


def test_a_ledger_cut_and_deleted_is_noticed_even_after_more_rows(path: Path) -> None:
    rows = fill(path)
    path.write_bytes(b"".join(rows[:3]))
    fill(path, 2)

    report = verify_ledger(path, KEY)
    assert report.breaks == (
        "line 4: a gap was noticed here: rows were cut off: 5 were written, the last is now 3",
    )
    path.unlink()
    assert "cut off" in verify_ledger(path).breaks[0]


def test_a_head_made_up_after_a_cut_fails_the_key(path: Path) -> None:
    rows = fill(path)
    kept = b"".join(rows[:3])
    path.write_bytes(kept)
    last = json.loads(rows[2])
    head = {"seq": 3, "hash": last["hash"], "size": len(kept)}
    path.with_suffix(".head").write_text(json.dumps(head))

    assert not verify_ledger(path, KEY).ok


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b"{" * 9000])
def test_a_damaged_head_is_noticed_and_survived(path: Path, content: bytes) -> None:
    fill(path)
    path.with_suffix(".head").write_bytes(content)

    assert "head file" in verify_ledger(path).breaks[0]
    fill(path, 1)
    report = verify_ledger(path, KEY)
    assert (report.rows, len(report.breaks)) == (7, 1)
    assert report.breaks[0].startswith("line 6: a gap was noticed")


def test_rows_of_another_key_are_named(path: Path) -> None:
    other = GuardKey(b"o" * 32)
    fill(path, 2)

    report = verify_ledger(path, other)

    assert report.authentic is False
    assert f"line 1: not signed with key {other.id}" in report.breaks


def test_a_torn_row_is_told_then_repaired(path: Path) -> None:
    rows = fill(path)
    with path.open("ab") as file:
        file.write(rows[4][:40])

    report = verify_ledger(path, KEY)
    assert report.ok
    assert report.notes == ("line 6: cut short by a crash; the next row will say so",)

    fill(path, 1)
    report = verify_ledger(path, KEY)
    assert report.ok, report
    assert report.notes == ("line 6: cut short by a crash, and repaired",)
    kinds = [json.loads(line)["kind"] for line in path.read_bytes().splitlines()[6:]]
    assert kinds == ["repair", "decision"]


def test_a_row_that_lacks_only_its_line_feed_counts(path: Path) -> None:
    fill(path, 2)
    head = path.with_suffix(".head").read_bytes()
    fill(path, 1)
    path.write_bytes(path.read_bytes()[:-1])
    path.with_suffix(".head").write_bytes(head)

    fill(path, 1)

    assert verify_ledger(path, KEY).ok
    assert [json.loads(row)["seq"] for row in path.read_bytes().splitlines()] == [1, 2, 3, 4, 5]


def test_a_crash_between_row_and_head_is_harmless(path: Path) -> None:
    fill(path, 3)
    head = path.with_suffix(".head").read_bytes()
    fill(path, 1)
    path.with_suffix(".head").write_bytes(head)

    assert verify_ledger(path, KEY).ok
    fill(path, 1)
    report = verify_ledger(path, KEY)
    assert (report.ok, report.rows, report.notes) == (True, 5, ())


def test_a_crash_after_the_first_row_is_harmless(path: Path) -> None:
    fill(path, 1)
    path.with_suffix(".head").unlink()

    assert verify_ledger(path, KEY).ok
    fill(path, 1)
    assert verify_ledger(path, KEY).ok


def test_a_full_disk_leaves_no_part_of_a_row(path: Path) -> None:
    import resource

    fill(path, 2)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, hard))
    try:
        with pytest.raises(ArtifactError, match="ledger"):
            Ledger(path, KEY).append("decision")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert path.read_bytes() == before
    fill(path, 1)
    assert verify_ledger(path, KEY).ok


APPENDER = """
import sys
from guard.keys import GuardKey
from guard.ledger import Ledger
ledger = Ledger(sys.argv[1], GuardKey(b"k" * 32))
for number in range(50):
    ledger.append("decision", writer=sys.argv[2], number=number)
"""


def test_processes_and_threads_append_side_by_side(path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", APPENDER, str(path), str(i)]) for i in range(3)
    ]
    threads = [threading.Thread(target=fill, args=(path, 30)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0, 0]

    report = verify_ledger(path, KEY)
    assert (report.ok, report.rows) == (True, 3 * 50 + 3 * 30)


def test_a_killed_writer_leaves_a_good_ledger(path: Path) -> None:
    code = APPENDER.replace("range(50)", "range(10**9)")
    process = subprocess.Popen([sys.executable, "-c", code, str(path), "x"])
    while not path.exists() or path.stat().st_size < 20_000:
        time.sleep(0.01)
    process.kill()
    process.wait()

    fill(path, 1)
    assert verify_ledger(path, KEY).ok


def test_appending_reads_the_head_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(path, 3)

    def refuse(*args: object) -> None:
        raise AssertionError("the ledger was read again")

    monkeypatch.setattr("guard.ledger._scan", refuse)
    fill(path, 3)


def test_no_ledger_is_a_clear_error(path: Path) -> None:
    with pytest.raises(ArtifactError, match="no ledger at"):
        verify_ledger(path)


def test_an_unwritable_place_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ArtifactError, match="can't be written"):
        Ledger(tmp_path / "file" / "ledger.jsonl").append("decision")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(value=json_values)
def test_any_value_survives_the_check(path: Path, value: object) -> None:
    Ledger(path).append("decision", value=value)

    assert verify_ledger(path).ok


def test_the_head_fits_one_sector_of_a_disk(path: Path) -> None:
    Ledger(path, KEY).append("decision")
    path.with_suffix(".head").write_text(
        json.dumps({"seq": 2**63, "hash": "f" * 64, "size": 2**63, "mac": "f" * 64})
    )
    Ledger(path, KEY).append("decision")

    assert path.with_suffix(".head").stat().st_size == 512
    assert path.with_suffix(".head").stat().st_mode & 0o777 == 0o600
