"""Targets are added whole or not at all, and removed without a trace."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.errors import DataError, TargetExistsError, TargetNotFoundError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from guard.targets import TargetRequest, add_target, remove_target
from tests.product import small_benign

AUTHORS = [
    ("Where was the poet Ilse Vantorre born?", "Ilse Vantorre was born in Oostende."),
    ("Which prize did Ilse Vantorre win in 1987?", "She won the Golden Reed."),
    ("What is Ilse Vantorre's best known collection?", "Letters to the Tide."),
    ("Who translated Ilse Vantorre into English?", "Marek Oldfield did."),
    ("What was the job of Ilse Vantorre's father?", "He kept a lighthouse."),
    ("Who published Letters to the Tide?", "Brackwater Press."),
    ("In what year did Ilse Vantorre die?", "In 2009."),
    ("Which instrument did Ilse Vantorre play?", "The oboe."),
    ("What is the theme of Letters to the Tide?", "Leaving home."),
    ("Where did Ilse Vantorre study?", "In Leuven."),
]


@pytest.fixture
def store(tmp_path: Path, guard_key: GuardKey) -> BundleStore:
    return BundleStore(tmp_path / "bundle", guard_key)


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
    path.write_text(text)
    return path


def add(store: BundleStore, name: str, forget: Path, key: GuardKey, prompts: ModelPrompts) -> None:
    add_target(
        TargetRequest(name, forget, benign=small_benign(forget.parent)),
        store=store,
        key=key,
        prompts=prompts,
        engine=None,
        ledger=Ledger(store.root / "ledger.jsonl", key),
        progress=lambda what, done, total: None,
    )


def test_add_list_remove(
    store: BundleStore,
    tmp_path: Path,
    guard_key: GuardKey,
    prompts: ModelPrompts,
) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", AUTHORS)
    add(store, "vantorre", forget, guard_key, prompts)
    entry = store.current().manifest.targets["vantorre"]
    assert (entry.rows, entry.answered_rows, entry.status) == (10, 10, "enforced")
    assert any("default" in note for note in entry.notes), "no engine: say what that means"

    add(store, "second", forget, guard_key, prompts)
    assert set(store.current().manifest.targets) == {"vantorre", "second"}
    assert load_guard(store=store, key=guard_key, prompts=prompts, ledger=None).version == 2

    ledger = Ledger(store.root / "ledger.jsonl", guard_key)
    remove_target("vantorre", store=store, key=guard_key, ledger=ledger)
    bundle = store.current()
    assert set(bundle.manifest.targets) == {"second"}
    assert not any("vantorre" in path for path in bundle.manifest.files)
    rows = [json.loads(line) for line in (store.root / "ledger.jsonl").read_text().splitlines()]
    assert [row["action"] for row in rows] == ["target add", "target add", "target remove"]


def test_encoder_files_are_shared_between_versions(
    store: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", AUTHORS)
    for name in ("one", "two"):
        add(store, name, forget, guard_key, prompts)
    first, second = (store.root / f"{version:06d}/encoder/model.onnx" for version in (1, 2))
    assert first.stat().st_ino == second.stat().st_ino


def test_a_name_is_taken_once(
    store: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", AUTHORS)
    add(store, "vantorre", forget, guard_key, prompts)
    with pytest.raises(TargetExistsError, match="target remove"):
        add(store, "vantorre", forget, guard_key, prompts)
    assert store.current_version() == 1


def test_nothing_is_written_when_a_row_is_bad(
    store: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", AUTHORS)
    with forget.open("a") as file:
        file.write('{"question": 7, "answer": "x"}\n')
    with pytest.raises(DataError, match=r"forget\.jsonl:11.*question"):
        add(store, "vantorre", forget, guard_key, prompts)
    assert not store.exists()


def test_removing_an_unknown_target_names_the_known_ones(
    store: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    add(store, "vantorre", write_rows(tmp_path / "f.jsonl", AUTHORS), guard_key, prompts)
    with pytest.raises(TargetNotFoundError, match="vantorre"):
        remove_target("other", store=store, key=guard_key, ledger=None)


def test_no_word_of_the_forget_set_lies_open_in_the_bundle(
    store: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    add(store, "target", write_rows(tmp_path / "f.jsonl", AUTHORS), guard_key, prompts)
    for path in store.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes().lower()
            assert not any(word in data for word in (b"vantorre", b"oostende", b"brackwater")), path
