import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guard import bundle as bundle_module
from guard.bundle import BundleStore, FileEntry, Manifest, TargetEntry, check_name
from guard.errors import (
    ArtifactError,
    BundleNotFoundError,
    ConfigError,
    IncompatibleArtifactError,
)
from guard.keys import GuardKey

BIG = bytes(range(256)) * 4000


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path / "bundles" / "default", GuardKey(b"k" * 32))


def fill(store: BundleStore, text: bytes = b"one") -> None:
    with store.transaction() as draft:
        draft.write("encoder/model.onnx", BIG)
        draft.write("targets/ann/head.safetensors", text)
        draft.manifest.targets["ann"] = TargetEntry(name="ann", status="enforced", rows=3)


def snapshot(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not path.name.startswith(".lock")
    }


def test_a_new_bundle_holds_what_was_written(store: BundleStore) -> None:
    fill(store)

    bundle = store.current()

    assert bundle.version == 1
    assert bundle.manifest.parent is None
    assert bundle.manifest.key_id == GuardKey(b"k" * 32).id
    assert bundle.read("targets/ann/head.safetensors") == b"one"
    assert bundle.manifest.targets["ann"].rows == 3
    bundle.verify()
    assert (store.root / "current").read_text() == "000001\n"


def test_a_bundle_says_where_its_files_and_folders_are(store: BundleStore) -> None:
    fill(store)
    bundle = store.current()

    assert bundle.path("encoder") == bundle.dir / "encoder"
    assert bundle.path("encoder/model.onnx").read_bytes() == BIG
    for rel in ("enc", "encoder/other", "../000001/encoder", "manifest.json", "."):
        with pytest.raises(ArtifactError, match="holds no"):
            bundle.path(rel)


def test_the_next_version_shares_unchanged_files_and_leaves_the_old_as_it_was(
    store: BundleStore,
) -> None:
    fill(store)
    old = store.current()
    with store.transaction() as draft:
        draft.write("targets/ann/head.safetensors", b"two")
        draft.manifest.fpr_budget = 0.01

    new = store.current()

    assert (new.version, new.manifest.parent) == (2, 1)
    assert os.path.samefile(old.path("encoder/model.onnx"), new.path("encoder/model.onnx"))
    assert old.read("targets/ann/head.safetensors") == b"one"
    assert new.read("targets/ann/head.safetensors") == b"two"
    old.verify()
    new.verify()


def test_files_are_copied_where_links_are_refused(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    fill(store)
    monkeypatch.setattr(os, "link", refuse)
    with store.transaction() as draft:
        draft.manifest.fpr_budget = 0.01

    first, second = (store.root / v / "encoder/model.onnx" for v in ("000001", "000002"))
    assert not os.path.samefile(first, second)
    assert first.read_bytes() == second.read_bytes()
    store.current().verify()


def test_files_written_into_the_folder_count_too(store: BundleStore) -> None:
    with store.transaction() as draft:
        (draft.dir / "encoder").mkdir()
        (draft.dir / "encoder" / "tokenizer.json").write_text("{}")

    assert store.current().read("encoder/tokenizer.json") == b"{}"


def test_a_version_is_read_only(store: BundleStore) -> None:
    fill(store)

    assert store.current().path("encoder/model.onnx").stat().st_mode & 0o222 == 0


def test_removing_a_target_leaves_nothing_of_it(store: BundleStore) -> None:
    fill(store)
    with store.transaction() as draft:
        draft.write("targets/anna/head.safetensors", b"other")
        gone = draft.remove("targets/ann")
        del draft.manifest.targets["ann"]

    bundle = store.current()
    assert gone == ["targets/ann/head.safetensors"]
    assert not (bundle.dir / "targets" / "ann").exists()
    assert bundle.read("targets/anna/head.safetensors") == b"other"
    assert b'"ann"' not in (bundle.dir / "manifest.json").read_bytes()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_failing_change_changes_nothing(store: BundleStore, error: BaseException) -> None:
    fill(store)
    before = snapshot(store.root)

    with pytest.raises(type(error)), store.transaction() as draft:
        draft.write("targets/ann/head.safetensors", b"half")
        raise error

    assert snapshot(store.root) == before
    assert store.versions() == [1]
    fill(store, b"two")  # the lock is free again
    assert store.current().version == 2


@pytest.mark.parametrize("fatal_call", range(1, 4))
def test_a_failing_replace_or_flush_leaves_the_old_version(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch, fatal_call: int
) -> None:
    fill(store)
    before = snapshot(store.root)
    calls = 0

    def failing(what: str) -> None:
        real = getattr(os, what)

        def call(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls >= fatal_call:
                raise OSError(28, "No space left on device")
            return real(*args)

        monkeypatch.setattr(os, what, call)

    failing("replace")
    failing("fsync")
    with pytest.raises(ArtifactError, match="No space left"):
        fill(store, b"two")
    monkeypatch.undo()

    assert snapshot(store.root) == before
    store.current().verify()


def test_a_refused_pointer_leaves_no_orphan(
    store: BundleStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store)

    def refuse(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "replace_file", refuse)
    with pytest.raises(ArtifactError, match="No space left"):
        fill(store, b"two")

    assert store.versions() == [1]
    assert store.current().version == 1


WRITER = """
import sys
from pathlib import Path
from guard.bundle import BundleStore
from guard.keys import GuardKey
store = BundleStore(Path(sys.argv[1]), GuardKey(b"k" * 32))
print("ready", flush=True)
while True:
    with store.transaction() as draft:
        draft.write("targets/ann/head.safetensors", str(draft.manifest.version).encode())
        for i in range(20):
            draft.write(f"many/{i}.bin", bytes([i]) * draft.manifest.version)
"""


def start_writer(store: BundleStore) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(store.root)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("moment", range(6))
def test_killed_at_any_moment_the_bundle_stays_whole(store: BundleStore, moment: int) -> None:
    fill(store)
    process = start_writer(store)
    deadline = time.monotonic() + 60
    while store.current_version() < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.004 * moment)  # somewhere within a write; which part differs between runs
    process.send_signal(signal.SIGKILL)
    process.communicate()

    bundle = store.current()
    bundle.verify()
    assert bundle.version >= 2
    assert bundle.read("targets/ann/head.safetensors") == str(bundle.version).encode()
    with store.transaction() as draft:  # the lock died with its holder
        draft.manifest.fpr_budget = 0.02
    store.current().verify()
    assert not list(store.root.glob(".tmp-*"))


def test_readers_see_whole_versions_while_another_process_writes(store: BundleStore) -> None:
    fill(store)
    process = start_writer(store)
    seen = set()
    try:
        while len(seen) < 8:
            bundle = store.current()
            bundle.verify()
            if bundle.version > 1:
                text = bundle.read("targets/ann/head.safetensors")
                assert text == str(bundle.version).encode()
            seen.add(bundle.version)
            bundle.close()
    finally:
        process.kill()
        process.communicate()


def test_writers_take_turns(store: BundleStore) -> None:
    fill(store)

    def write(name: str) -> None:
        for _ in range(5):
            with store.transaction() as draft:
                draft.write(f"targets/{name}/{draft.manifest.version}.bin", b"x")

    threads = [threading.Thread(target=write, args=(name,)) for name in ("a", "b", "c")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    bundle = store.current()
    assert bundle.version == 16
    assert len(bundle.manifest.files) == 2 + 15


def test_a_busy_bundle_names_who_holds_it(store: BundleStore) -> None:
    fill(store)
    with (
        store.transaction(),
        pytest.raises(ArtifactError, match=f"process {os.getpid()} on .*waited 0.1 s"),
        BundleStore(store.root).transaction(timeout_s=0.1),
    ):
        pass


def test_no_bundle_is_a_clear_error(store: BundleStore) -> None:
    with pytest.raises(BundleNotFoundError, match="target add"):
        store.current()
    with pytest.raises(BundleNotFoundError):
        store.gc()
    assert not store.root.exists()
    assert store.versions() == []


@pytest.mark.parametrize("content", ["", "../../etc", "1", "000001/../000001", "0000012x"])
def test_a_damaged_pointer_is_refused(store: BundleStore, content: str) -> None:
    fill(store)
    (store.root / "current").write_text(content)

    with pytest.raises(ArtifactError, match="not a version"):
        store.current()


def test_a_pointer_to_nothing_is_refused(store: BundleStore) -> None:
    fill(store)
    (store.root / "current").write_text("000009\n")

    with pytest.raises(ArtifactError, match="version 9, which is not there"):
        store.current()


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


def test_verify_finds_a_flipped_byte(store: BundleStore) -> None:
    fill(store)
    flip(store.root / "000001/encoder/model.onnx", 77)
    bundle = store.current()

    with pytest.raises(ArtifactError, match=r"model\.onnx was altered"):
        bundle.verify()
    with pytest.raises(ArtifactError, match="altered"):
        bundle.read("encoder/model.onnx")


def test_verify_finds_missing_and_added_files(store: BundleStore) -> None:
    fill(store)
    bundle = store.current()
    bundle.path("encoder/model.onnx").unlink()
    (bundle.dir / "extra.txt").write_text("hello")

    with pytest.raises(ArtifactError, match=r"model\.onnx is missing; extra\.txt is not in the"):
        bundle.verify()


def test_verify_refuses_links(store: BundleStore, tmp_path: Path) -> None:
    fill(store)
    bundle = store.current()
    outside = tmp_path / "outside"
    outside.write_bytes(b"one")
    bundle.path("targets/ann/head.safetensors").unlink()
    (bundle.dir / "targets/ann/head.safetensors").symlink_to(outside)

    with pytest.raises(ArtifactError, match="links"):
        bundle.verify()


@pytest.mark.parametrize("name", ["manifest.json", "manifest.seal.json"])
def test_every_byte_of_manifest_and_seal_counts(store: BundleStore, name: str) -> None:
    fill(store)
    path = store.root / "000001" / name
    original = path.read_bytes()
    unnoticed = []
    for at in range(0, len(original), 7):
        flip(path, at)
        try:
            store.current()
            unnoticed.append(at)
        except ArtifactError:
            pass
        path.write_bytes(original)

    assert unnoticed == []


def test_a_manifest_edited_along_with_its_hash_fails_the_key(store: BundleStore) -> None:
    import hashlib

    fill(store)
    path, seal = (store.root / "000001" / n for n in ("manifest.json", "manifest.seal.json"))
    data = path.read_bytes().replace(b'"enforced"', b'"revoked"')
    for file in (path, seal):
        file.chmod(0o644)
    path.write_bytes(data)
    sums = json.loads(seal.read_text())
    seal.write_text(json.dumps({**sums, "sha256": hashlib.sha256(data).hexdigest()}))

    with pytest.raises(ArtifactError, match="not of the bundle's key"):
        store.current()


def test_another_key_is_named(store: BundleStore) -> None:
    fill(store)
    mine, other = GuardKey(b"k" * 32), GuardKey(b"o" * 32)

    with pytest.raises(IncompatibleArtifactError, match=f"{mine.id}.*{other.id}"):
        BundleStore(store.root, other).current()
    assert BundleStore(store.root).current().version == 1  # the figures need no key


def test_editing_a_shared_file_in_place_is_noticed(store: BundleStore) -> None:
    fill(store)

    with pytest.raises(ArtifactError, match="was altered"), store.transaction() as draft:
        flip(draft.dir / "encoder/model.onnx")


def test_gc_keeps_the_current_version(store: BundleStore) -> None:
    for text in (b"1", b"2", b"3", b"4"):
        fill(store, text)

    assert store.gc(keep=2) == ["000001", "000002"]
    assert store.gc() == ["000003"]
    assert store.gc() == []
    store.current().verify()
    with pytest.raises(ArtifactError, match="at least 1"):
        store.gc(keep=0)


def test_gc_leaves_a_version_that_is_read(store: BundleStore) -> None:
    fill(store)
    reading = store.current()
    fill(store, b"two")

    assert store.gc() == []
    reading.verify()
    reading.close()
    assert store.gc() == ["000001"]


def test_gc_removes_what_a_crash_left(store: BundleStore) -> None:
    fill(store)
    (store.root / "000007").mkdir()
    (store.root / ".tmp-000008-abc").mkdir()

    assert store.gc() == ["000007"]
    assert not (store.root / ".tmp-000008-abc").exists()


def test_a_newer_schema_asks_for_an_upgrade() -> None:
    data = Manifest().to_bytes().replace(b'"schema_version": 1', b'"schema_version": 2')

    with pytest.raises(IncompatibleArtifactError, match="upgrade"):
        Manifest.from_bytes(data, "manifest.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise"),
        ({"version": 0}, "version"),
        ({"schema_version": None}, "schema_version"),
        ({"targets": {"ann": {"name": "../ann", "status": "enforced"}}}, "name"),
        ({"targets": {"ann": {"name": "ann", "status": "unknown"}}}, "status"),
        ({"files": {"../x": {"sha256": "0" * 64, "size": 1}}}, "plain path"),
        ({"files": {"x": {"sha256": "zz", "size": 1}}}, "sha256"),
    ],
)
def test_what_is_no_manifest_is_refused(change: dict[str, object], message: str) -> None:
    data = json.dumps({**json.loads(Manifest().to_bytes()), **change}).encode()

    with pytest.raises(ArtifactError, match=message):
        Manifest.from_bytes(data, "manifest.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"null", b"[" * 100_000])
def test_garbage_is_no_manifest(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_bytes(data, "manifest.json")


def test_a_manifest_with_an_impossible_figure_is_not_written(store: BundleStore) -> None:
    fill(store)

    with pytest.raises(ArtifactError, match="not valid"), store.transaction() as draft:
        draft.manifest.targets["ann"].detector["threshold"] = float("nan")
    assert store.current().version == 1


@pytest.mark.parametrize(
    "rel",
    ["../x", "/etc/x", "a/../../x", "a//b", "", ".", "a/.hidden", "a\\b", "manifest.json", "a\n"],
)
def test_paths_stay_inside(store: BundleStore, rel: str) -> None:
    with pytest.raises(ValueError), store.transaction() as draft:
        draft.write(rel, b"x")


@given(st.text(max_size=70))
def test_only_safe_names_are_names(name: str) -> None:
    try:
        assert check_name(name) == name
    except ConfigError:
        return
    assert name.isascii()
    assert "/" not in name
    assert not name.startswith((".", "-"))
    assert Path("targets", name).name == name


def test_entries_say_where_their_files_are() -> None:
    assert TargetEntry(name="ann", status="detecting").prefix == "targets/ann/"
    assert FileEntry(sha256="0" * 64, size=0).size == 0
