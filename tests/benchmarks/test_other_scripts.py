"""The measurement of names in other scripts counts what it says."""

import json
from pathlib import Path

from benchmarks.other_scripts import WRITTEN, main, measure
from benchmarks.report import read_report


def test_names_are_found_and_other_texts_are_not() -> None:
    rows = {(row.measure, row.group): row for row in measure(["Как испечь хлеб дома?"], [])}
    group = f"names={len(WRITTEN)}"
    recall, fpr = rows["recall", group], rows["fpr", group]
    assert recall.n == sum(map(len, WRITTEN.values())) and recall.value is not None
    assert 0.85 <= recall.value < 1, "one of them is no transliteration"
    assert fpr.n == 1 and fpr.value == 0


def test_a_text_with_a_name_counts_as_wrong_among_the_ordinary() -> None:
    rows = measure(["Кто такой Гарри Поттер?", "Как дела?"], [("ann", "other")])
    assert [row.value for row in rows if row.measure == "fpr"] == [0.5, 0.5]


def test_the_report_names_the_command(tmp_path: Path) -> None:
    general, names = tmp_path / "general.jsonl", tmp_path / "names.jsonl"
    general.write_text(json.dumps({"question": "Привет, как дела?"}) + "\n{}\n", "utf-8")
    names.write_text(json.dumps({"author_name": "Jane Somebody"}) + "\n", "utf-8")
    main(["--general", str(general), "--names", str(names), "--out", str(tmp_path / "out")])
    report = read_report(tmp_path / "out" / "report.json")
    assert len(report.rows) == 4 and "benchmarks.other_scripts" in report.command
