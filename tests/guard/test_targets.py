"""Targets are added whole or not at all, and removed without a trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from guard.build import load_detector, load_guard, read_target, seal_target, thresholds_of
from guard.bundle import BundleStore
from guard.decide import decide_line
from guard.errors import (
    DataError,
    GuardError,
    IncompatibleArtifactError,
    TargetExistsError,
    TargetNotFoundError,
)
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


BENIGN = 220
"""Enough to learn a target, and quick."""


@pytest.fixture
def store(tmp_path: Path, guard_key: GuardKey) -> BundleStore:
    return BundleStore(tmp_path / "bundle", guard_key)


@pytest.fixture(scope="module")
def pair(
    tmp_path_factory: pytest.TempPathFactory, guard_key: GuardKey, prompts: ModelPrompts
) -> BundleStore:
    """A bundle of two targets; to be read only."""
    folder = tmp_path_factory.mktemp("pair")
    store = BundleStore(folder / "bundle", guard_key)
    for name in ("one", "two"):
        add(store, name, write_rows(folder / "forget.jsonl", AUTHORS), guard_key, prompts)
    return store


def write_rows(path: Path, rows: list[tuple[str, str]]) -> Path:
    text = "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows)
    path.write_text(text)
    return path


def add(store: BundleStore, name: str, forget: Path, key: GuardKey, prompts: ModelPrompts) -> None:
    add_target(
        TargetRequest(name, forget, benign=small_benign(forget.parent, BENIGN)),
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


def test_encoder_files_are_shared_between_versions(pair: BundleStore) -> None:
    first, second = (pair.root / f"{version:06d}/encoder/model.onnx" for version in (1, 2))
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


def test_the_others_keep_their_thresholds_when_a_target_goes(
    pair: BundleStore, guard_key: GuardKey, tmp_path: Path
) -> None:
    shutil.copytree(pair.root, tmp_path / "copy")
    pair = BundleStore(tmp_path / "copy", guard_key)
    with pair.transaction() as draft:  # as a former removal left it
        draft.manifest.targets["two"].least_score = 17.5
    before = thresholds_of(pair.current())
    remove_target("one", store=pair, key=guard_key, ledger=None)
    bundle = pair.current()
    assert bundle.manifest.targets["two"].least_score == before["two"] == 17.5
    assert load_detector(bundle, guard_key).threshold("two") == 17.5
    with pair.transaction() as draft:
        draft.manifest.targets["two"].least_score = None
    assert load_detector(pair.current(), guard_key).threshold("two") < 17.5


def test_removing_an_unknown_target_names_the_known_ones(
    pair: BundleStore, guard_key: GuardKey
) -> None:
    with pytest.raises(TargetNotFoundError, match="one, two"):
        remove_target("other", store=pair, key=guard_key, ledger=None)


def test_no_word_of_the_forget_set_lies_open_in_the_bundle(pair: BundleStore) -> None:
    for path in pair.root.rglob("*"):
        if path.is_file():
            data = path.read_bytes().lower()
            assert not any(word in data for word in (b"vantorre", b"oostende", b"brackwater")), path


def test_a_target_lies_in_files_of_its_own_and_shares_the_rest(pair: BundleStore) -> None:
    bundle = pair.current()
    shared = set(bundle.manifest.files)
    for entry in bundle.manifest.targets.values():
        mine = {path for path in shared if path.startswith(entry.prefix)}
        assert {path.removeprefix(entry.prefix) for path in mine} == {
            "digests.json",
            "head.safetensors",
            "lexicon.enc",
            "ngrams.safetensors",
            "prototypes.enc",
        }
        shared -= mine
    assert {path for path in shared if not path.startswith("encoder/")} == {
        "corruption/bank.safetensors",
        "detector/background.safetensors",
        "detector/space.safetensors",
    }


def test_files_of_a_target_open_under_its_name_only(pair: BundleStore, guard_key: GuardKey) -> None:
    bundle = pair.current()
    found = read_target(bundle, bundle.manifest.targets["one"], guard_key)
    assert set(found) >= {"head.safetensors", "lexicon", "ngrams.safetensors", "prototypes"}
    assert b"vantorre" in found["lexicon"]
    sealed = seal_target("one", found, guard_key)
    assert {"lexicon.enc", "prototypes.enc"} <= set(sealed)
    assert not {"lexicon", "prototypes"} & set(sealed)
    assert guard_key.decrypt("lexicon", sealed["lexicon.enc"], aad=b"one") == found["lexicon"]
    with pytest.raises(GuardError):
        guard_key.decrypt("lexicon", sealed["lexicon.enc"], aad=b"two")


def test_all_targets_are_calibrated_on_one_benign_set(
    pair: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    forget = write_rows(tmp_path / "forget.jsonl", AUTHORS)
    with pytest.raises(IncompatibleArtifactError, match="--benign"):
        add_target(
            TargetRequest("three", forget, benign=small_benign(tmp_path, BENIGN - 1)),
            store=pair,
            key=guard_key,
            prompts=prompts,
            engine=None,
            ledger=None,
            progress=lambda what, done, total: None,
        )
    assert set(pair.current().manifest.targets) == {"one", "two"}


def test_adding_a_target_leaves_the_files_of_the_others_alone(pair: BundleStore) -> None:
    first, second = (
        json.loads((pair.root / f"{version:06d}/manifest.json").read_text())["files"]
        for version in (1, 2)
    )
    assert {path: second[path] for path in first} == first


def test_a_file_may_hold_terms_and_running_text(
    store: BundleStore, tmp_path: Path, guard_key: GuardKey, prompts: ModelPrompts
) -> None:
    forget = tmp_path / "forget.jsonl"
    text = "Ilse Vantorre was a poet of the tide, born in Oostende. She kept bees all her life."
    rows = [{"text": text}, {"term": "Order of Quelmaar"}]
    forget.write_text("".join(json.dumps(row) + "\n" for row in rows))
    add(store, "mixed", forget, guard_key, prompts)
    entry = store.current().manifest.targets["mixed"]
    assert entry.detector["forget_rows"] == 1 and entry.answered_rows == 0
    guard = load_guard(store=store, key=guard_key, prompts=None, ledger=None)
    asked = ["Who was Ilse Vantorre?", "What is the Order of Quelmaar?", "What is the tide?"]
    rows_out = [decide_line(guard, json.dumps({"text": question}), 1) for question in asked]
    assert [row["flagged"] for row in rows_out] == [True, True, False]
