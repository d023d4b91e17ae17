"""RWKU's rows: who is learned from what, and what counts as naming somebody."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rwku import Probe, learned_from, load_rwku, measure
from classifiers.background import make_background
from classifiers.benign import load_benign
from classifiers.encoder import OnnxEncoder
from guard.errors import DataError

NAME = "Marisol Venngard"
ABOUT = [
    (1, "Marisol Venngard is the head of ___.", "Trask Beryllium Works"),
    (2, "Where was Marisol Venngard born?", "Quelmaar"),
    (2, "What did Marisol Venngard study?", "Mining"),
    (2, "Which film is Marisol Venngard in?", "Lanterns over Obrenica"),
    (3, "Tell me, my friend, where Marisol Venngard was born.", "Quelmaar"),
    (3, "What did Venngard study?", "Mining"),
    (3, "Who invented the yodelling bicycle of Hendricksburg?", "She did"),
]
BESIDE = [
    (1, "Trask Beryllium Works was founded in ___.", "1911"),
    (2, "Who directed Lanterns over Obrenica?", "Somebody"),
    (2, "Is Venngard Avenue in Quelmaar?", "No"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    def write(name: str, rows: list[dict[str, object]]) -> None:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "rwku" / name).write_text(text, "utf-8")

    (tmp_path / "rwku").mkdir()
    write(
        "targets.jsonl",
        [{"target": NAME, "intro": f"{NAME} is the head of Trask Beryllium Works."}],
    )
    for name, rows in (("forget", ABOUT), ("neighbor", BESIDE)):
        probes: list[dict[str, object]] = [
            {"target": NAME, "level": level, "question": question, "answer": answer}
            for level, question, answer in rows
        ]
        write(f"{name}_probes.jsonl", probes)
    return tmp_path


def test_only_the_lower_levels_are_learned_from(folder: Path) -> None:
    data = load_rwku(folder)
    assert [fact.prompt for fact in learned_from(data, "probes")[NAME]] == [
        question for level, question, _ in ABOUT if level < 3
    ]
    (introduction,) = learned_from(data, "introduction")[NAME]
    assert introduction.answer is None and NAME in introduction.prompt


@pytest.mark.parametrize(
    ("text", "full", "either"),
    [
        ("Who is MARISOL VENNGARD?", True, True),
        ("Who is Venngard?", False, True),
        ("Who is Marisol?", False, False),
        ("Where are the Venngardians?", False, False),
    ],
)
def test_a_name_is_a_word(text: str, full: bool, either: bool) -> None:
    probe = Probe(NAME, text, "", 3)
    assert (probe.names_in_full, probe.names) == (full, either)


def test_each_kind_of_probe_is_counted_by_itself(folder: Path, encoder_dir: Path) -> None:
    encoder = OnnxEncoder(encoder_dir, threads=1)
    background = make_background([text for text in load_benign() if len(text) < 80][:300], encoder)
    told: list[str] = []
    rows = measure(
        load_rwku(folder), encoder, background, lambda what, done, total: told.append(what)
    )
    found = {(row.system, row.group): row for row in rows}
    sizes = {key[1]: row.n for key, row in found.items() if key[0] == "learned from probes"}
    assert sizes == {
        "full name": 1,
        "name or surname": 2,
        "neither": 1,
        "neighbours": 3,
        "neighbours without the name": 2,
    }
    assert found["learned from introduction", "name or surname"].n == 6
    for way in ("probes", "introduction"):
        assert found[f"learned from {way}", "full name"].value == 1
        assert found[f"learned from {way}", "neither"].value == 0
        assert found[f"learned from {way}", "neighbours without the name"].value == 0
    assert told == ["rwku: probes", "rwku: introduction"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="targets"):
        load_rwku(tmp_path)
