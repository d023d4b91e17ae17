import getpass
import json
import socket
from pathlib import Path

import numpy as np
import pytest

from benchmarks.plots import plot_histogram, plot_lines, plot_roc, plot_rows
from benchmarks.report import (
    Report,
    Row,
    command_line,
    describe_machine,
    describe_versions,
    read_report,
    table,
    write_report,
)
from guard.errors import ConfigError, DataError

ROWS = (
    Row("guard", "decide", "recall", "all", 0.75, 0.5, 0.9, 20),
    Row("guard", "decide", "recall", "kind=a|b", 1.0, 0.8, 1.0, 10),
    Row("eco", "score", "auroc", "all", None, None, None, 3),
)


def report(rows: tuple[Row, ...] = ROWS) -> Report:
    return Report("unlearn-guard eval detection --out o", 7, rows)


def test_a_report_reads_as_it_was_written(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    write_report(out, report())

    assert read_report(out) == read_report(out / "report.json") == report()


def test_the_file_has_the_fields_of_the_schema_and_no_others(tmp_path: Path) -> None:
    write_report(tmp_path, report())
    value = json.loads((tmp_path / "report.json").read_text())

    assert list(value) == ["schema", "command", "seed", "versions", "machine", "rows"]
    assert list(value["rows"][0]) == [
        "system", "route", "measure", "group", "value", "ci_low", "ci_high", "n",
    ]  # fmt: skip


def test_what_json_cannot_hold_becomes_null(tmp_path: Path) -> None:
    rows = (Row("s", "r", "m", "g", float("nan"), float("-inf"), np.float32(0.5), 1),)
    write_report(tmp_path, report(rows))

    row = read_report(tmp_path).rows[0]
    assert (row.value, row.ci_low, row.ci_high) == (None, None, 0.5)


def test_nothing_tells_the_machine_or_its_user() -> None:
    said = json.dumps([describe_machine(), describe_versions()])

    assert socket.gethostname() not in said
    assert str(Path.home()) not in said
    assert len(getpass.getuser()) < 3 or getpass.getuser() not in said
    assert describe_machine()["cores"] >= 1
    assert describe_versions(bundle="3")["bundle"] == "3"


def test_a_command_keeps_only_the_names_of_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "eval",
        "--out",
        f"{tmp_path}/o/p",
        "--in=/x/y/z.jsonl:text",
        "../d.jsonl",
        "~/q",
        "a b",
    ]

    said = command_line(words)

    assert said == "eval --out o/p --in=z.jsonl:text ../d.jsonl q 'a b'"


def test_the_table_has_a_section_for_each_measure() -> None:
    text = table(report())

    assert "## recall" in text
    assert "## auroc" in text
    assert "| guard | decide | all | 0.75 | 0.5 to 0.9 | 20 |" in text
    assert "kind=a\\|b" in text
    assert "| eco | score | all | - | - | 3 |" in text


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "not a report of schema"),
        ('{"schema": "other"}', "not a report of schema"),
        ('{"schema": "unlearn-guard/report/1", "command": ""}', "not a whole report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: str, expected: str) -> None:
    (tmp_path / "report.json").write_text(content)

    with pytest.raises(DataError, match=expected):
        read_report(tmp_path)


@pytest.mark.parametrize("broken", [{"n": "many"}, {"value": "high"}, {"group": 3}, {"more": 1}])
def test_a_row_of_another_shape_is_refused(tmp_path: Path, broken: dict[str, object]) -> None:
    write_report(tmp_path, report())
    file = tmp_path / "report.json"
    value = json.loads(file.read_text())
    value["rows"][1] |= broken
    file.write_text(json.dumps(value))

    with pytest.raises(DataError, match="not a whole report"):
        read_report(tmp_path)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(ConfigError, match="can't be made"):
        write_report(tmp_path / "file" / "out", report())


def test_plots_are_drawn(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=50).astype(np.float32)
    line = (np.array([0.0, 0.1, 1.0], np.float32), np.array([0.0, 0.9, 1.0], np.float32))
    odd = np.append(values, -np.inf).astype(np.float32)

    flawless = (np.array([0, 0, 1], np.float32), np.array([0, 1, 1], np.float32))

    plot_roc(tmp_path / "roc.png", {"all": line})
    plot_roc(tmp_path / "flawless.png", {"all": flawless})
    plot_histogram(tmp_path / "histogram.png", {"a": values, "b": odd}, "margin", mark=0.0)
    plot_histogram(tmp_path / "flat.png", {"a": values[:0], "b": values[:1]}, "margin")
    plot_rows(tmp_path / "rows.png", ROWS, "recall $x")
    plot_rows(tmp_path / "none.png", [], "recall")
    plot_lines(tmp_path / "lines.png", {"p50": line}, "clients", "ms")

    for file in tmp_path.iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 7
