"""A search's log: what a killed run leaves is taken up, and only by the same search."""

from __future__ import annotations

from pathlib import Path

import pytest

from corruptions.trace import Trace, read_identity
from guard.errors import ConfigError

IDENTITY = {"target": "one", "seed": 3, "search": {"low": -2.0}}


def test_records_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "out" / "trace.jsonl"
    assert read_identity(path) is None
    trace = Trace(path, IDENTITY)
    assert not trace.resumed
    trace.add("train/0", {"loss": 0.25})
    again = Trace(path, IDENTITY)
    assert again.resumed
    assert again.records == {"train/0": {"loss": 0.25}}
    assert read_identity(path) == IDENTITY


def test_a_half_written_line_is_cut_away(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    Trace(path, IDENTITY).add("train/0", {"loss": 0.25})
    with path.open("a") as file:
        file.write('{"key": "train/1", "lo')
    again = Trace(path, IDENTITY)
    assert set(again.records) == {"train/0"}
    again.add("train/1", {"loss": 0.5})
    assert set(Trace(path, IDENTITY).records) == {"train/0", "train/1"}


def test_another_search_is_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    Trace(path, IDENTITY).add("train/0", {"loss": 0.25})
    with pytest.raises(ConfigError, match=r"seed differ.*--restart"):
        Trace(path, {**IDENTITY, "seed": 4})
    anew = Trace(path, {**IDENTITY, "seed": 4}, restart=True)
    assert not anew.records
    assert not Trace(path, {**IDENTITY, "seed": 4}).records


@pytest.mark.parametrize("text", ["[1]\n", "no json\n", '{"run": "x"}\n'])
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match="no log of a search"):
        Trace(path, IDENTITY)
    assert path.read_text() == text
