"""Bundles on disk: immutable versions, and a pointer to the current one.

    bundles/<name>/current        the version that counts, e.g. `000002`; replaced atomically
    bundles/<name>/000002/        manifest.json, its seal, and the files that it lists
    bundles/<name>/.lock          held by the one writer
    bundles/<name>/.tmp-…         a version being written; whoever locks next removes leftovers

A version is written aside, flushed to disk, renamed, and only then pointed to: killed at any
moment, a writer leaves the old version current and whole. Readers need no lock, but hold a shared
`flock` on their version's folder, so that `gc` leaves it alone.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from guard.disk import (
    TEMPORARY,
    GoneError,
    delete,
    delete_empty,
    delete_unread,
    disk_errors,
    flush_folder,
    hash_file,
    hold_folder,
    link_or_copy,
    relative_files,
    replace_file,
    settle,
)
from guard.errors import ArtifactError, BundleNotFoundError
from guard.keys import GuardKey
from guard.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    SEAL,
    FileEntry,
    Manifest,
    TargetEntry,
    check_name,
    check_path,
    now,
    target_prefix,
)

__all__ = [
    "SCHEMA_VERSION",
    "Bundle",
    "BundleDraft",
    "BundleStore",
    "FileEntry",
    "Manifest",
    "TargetEntry",
    "check_name",
    "target_prefix",
]

CURRENT = "current"
DIGESTS_NAME = "digests.json"
ADAPTER_FOLDER = "adapter"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""An adapter's two files, as peft and vLLM name them."""
_VERSION = re.compile(r"[0-9]{6,}")
_SEAL_PURPOSE = "bundle/manifest"


class Bundle:
    """One version of a bundle, to be read.

    Keeps its version from `gc` for as long as the object lives.

    Attributes:
        root: The bundle's folder.
        version: Its number.
        dir: The version's folder.
        manifest: What it holds.
    """

    def __init__(self, root: Path, version: int, directory: Path, key: GuardKey | None) -> None:
        self.root, self.version, self.dir = root, version, directory
        self._key = key
        self._by_folder: dict[str, list[str]] | None = None
        descriptor = hold_folder(directory)
        self._release = weakref.finalize(self, os.close, descriptor)
        try:
            self.manifest = self._read_manifest()
        except BaseException:
            self._release()
            raise

    def path(self, rel: str) -> Path:
        """Return the place of a file that the manifest lists, or of a folder of such files.

        Raises:
            ArtifactError: If it lists no such file or folder.
        """
        folder = rel.rstrip("/") + "/"
        if rel not in self.manifest.files and not any(
            name.startswith(folder) for name in self.manifest.files
        ):
            raise ArtifactError(f"bundle {self.dir} holds no {rel!r}")
        return self.dir / rel

    def target_files(self, prefix: str) -> list[str]:
        """Return a target's detector files: not the digests of its forget rows, nor its adapter."""
        if self._by_folder is None:
            folders: dict[str, list[str]] = {}
            for rel in self.manifest.files:
                parts = rel.split("/")
                others = parts[-1] == DIGESTS_NAME or parts[2:3] == [ADAPTER_FOLDER]
                if parts[0] == "targets" and len(parts) > 2 and not others:
                    folders.setdefault("/".join(parts[:2]) + "/", []).append(rel)
            self._by_folder = folders
        return self._by_folder.get(prefix, [])

    def read(self, rel: str) -> bytes:
        """Read a file and check it against its hash.

        Raises:
            ArtifactError: If there is none, or it was altered.
        """
        path = self.path(rel)
        with disk_errors(f"{path} can't be read"):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.files[rel].sha256:
            raise ArtifactError(f"{path} was altered: its hash is not the manifest's")
        return data

    def verify(self) -> None:
        """Hash every file again; check that none is missing and none was added.

        Raises:
            ArtifactError: If anything differs from the manifest; lists what.
        """
        found = set(relative_files(self.dir)) - {MANIFEST, SEAL}
        listed = self.manifest.files
        problems = [f"{rel} is missing" for rel in sorted(listed.keys() - found)]
        problems += [f"{rel} is not in the manifest" for rel in sorted(found - listed.keys())]
        for rel in sorted(found & listed.keys()):
            if not _same(self.dir / rel, listed[rel]):
                problems.append(f"{rel} was altered")
        if problems:
            raise ArtifactError(f"bundle {self.dir} is damaged: {'; '.join(problems)}")

    def close(self) -> None:
        """Let `gc` delete this version again."""
        self._release()

    def _read_manifest(self) -> Manifest:
        place = str(self.dir / MANIFEST)
        with disk_errors(f"bundle {self.dir} can't be read"):
            data, seal = (self.dir / MANIFEST).read_bytes(), (self.dir / SEAL).read_bytes()
        sums = _read_seal(seal, f"{self.dir / SEAL}")
        if not hmac.compare_digest(hashlib.sha256(data).hexdigest(), sums["sha256"]):
            raise ArtifactError(f"{place} was altered: its hash is not the seal's")
        manifest = Manifest.from_bytes(data, place)
        if manifest.version != self.version:
            raise ArtifactError(f"{place} is that of version {manifest.version}")
        if self._key is not None:
            self._key.check_id(manifest.key_id)
            if not hmac.compare_digest(self._key.digest(_SEAL_PURPOSE, data), sums["hmac"]):
                raise ArtifactError(f"{place} was altered: its seal is not of the bundle's key")
        return manifest


class BundleDraft:
    """The next version, while it is written.

    Files may also be written to `dir` directly, as new files: those carried over from the current
    version share their bytes with it and must be replaced through `write`, never edited.

    Attributes:
        dir: Its folder, under a temporary name.
        manifest: Its manifest; `files` is filled in at the end.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.dir, self.manifest = directory, manifest

    def write(self, rel: str, data: bytes) -> None:
        """Write or replace a file.

        Raises:
            ValueError: If `rel` is not a plain path inside the bundle.
        """
        path = self.dir / check_path(rel)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)  # it may be hard-linked: never write into it
        path.write_bytes(data)

    def remove(self, rel_prefix: str) -> list[str]:
        """Remove a file, or all files of a folder; return their paths.

        `targets/ann` removes `targets/ann/...`, and nothing of `targets/anna`.
        """
        prefix = rel_prefix.rstrip("/")
        gone = [rel for rel in self.files() if rel == prefix or rel.startswith(prefix + "/")]
        for rel in gone:
            (self.dir / rel).unlink()
        delete_empty(self.dir)
        return gone

    def files(self) -> list[str]:
        """Return the relative paths of all files so far, sorted."""
        return relative_files(self.dir)


class BundleStore:
    """All versions of one bundle.

    Args:
        root: The bundle's folder, `bundles/<name>`.
        key: If given, new manifests are sealed with it, and those read must be.
    """

    def __init__(self, root: str | Path, key: GuardKey | None = None) -> None:
        self.root = Path(root)
        self.key = key

    def current(self) -> Bundle:
        """Open the current version.

        Raises:
            BundleNotFoundError: If there is none.
            IncompatibleArtifactError: If another key or a newer program wrote it.
            ArtifactError: If it is damaged.
        """
        for _ in range(100):
            version = self.current_version()
            try:
                return Bundle(self.root, version, self.root / _folder(version), self.key)
            except GoneError:
                if self.current_version() == version:
                    break  # not a race with gc: the folder is not there
        raise ArtifactError(
            f"{self.root / CURRENT} points to version {version}, which is not there"
        )

    def current_version(self) -> int:
        """Return the number of the current version (cheap: reads one small file).

        Raises:
            BundleNotFoundError: If there is none.
            ArtifactError: If the pointer is damaged.
        """
        try:
            text = (self.root / CURRENT).read_text(encoding="ascii", errors="replace").strip()
        except (FileNotFoundError, NotADirectoryError):
            raise BundleNotFoundError(
                f"no bundle at {self.root}: make one with "
                f"`unlearn-guard target add NAME --forget FILE --bundle {self.root}`"
            ) from None
        except OSError as error:
            raise ArtifactError(f"{self.root / CURRENT} can't be read: {error}") from error
        if _VERSION.fullmatch(text) is None:
            raise ArtifactError(f"{self.root / CURRENT} holds {text[:40]!r}, not a version")
        return int(text)

    def exists(self) -> bool:
        """Say whether there is a current version."""
        return (self.root / CURRENT).exists()

    def versions(self) -> list[int]:
        """Return the numbers of all versions on disk, oldest first."""
        if not self.root.is_dir():
            return []
        return sorted(int(p.name) for p in self.root.iterdir() if _VERSION.fullmatch(p.name))

    @contextmanager
    def transaction(self, timeout_s: float = 60.0) -> Iterator[BundleDraft]:
        """Write the next version: all of it, or, if the block raises, nothing.

        Args:
            timeout_s: How long to wait for another writer.

        Yields:
            A draft that holds all the current version does.

        Raises:
            ArtifactError: If another writer holds the bundle, the current version is damaged, or
                the disk refuses.
        """
        with self._lock(timeout_s):
            base = self.current() if self.exists() else None
            version = max([0, *self.versions()]) + 1
            temporary = self.root / f"{TEMPORARY}{_folder(version)}-{secrets.token_hex(4)}"
            try:
                with disk_errors(f"bundle {self.root} can't be written"):
                    draft = _start(temporary, base, version)
                yield draft
                with disk_errors(f"bundle {self.root} can't be written"):
                    self._finish(draft, base)
            finally:
                delete(temporary)
                if base is not None:
                    base.close()

    def gc(self, keep: int = 1, timeout_s: float = 60.0) -> list[str]:
        """Delete old versions, and those that a crash left without a pointer.

        Args:
            keep: Versions to keep, the current one and older ones; at least 1.
            timeout_s: How long to wait for a writer.

        Returns:
            Names of the versions deleted. One that a process on this machine still reads (or
            whose file system can't tell) is left for the next time.

        Raises:
            BundleNotFoundError: If there is no bundle.
            ArtifactError: If `keep` is below 1, or a writer holds the bundle.
        """
        if keep < 1:
            raise ArtifactError(f"keep is {keep}; the current version is always kept: at least 1")
        self.current_version()
        with self._lock(timeout_s), disk_errors(f"bundle {self.root} can't be cleaned up"):
            current, there = self.current_version(), self.versions()
            kept = [version for version in there if version <= current][-keep:]
            spare = [_folder(version) for version in there if version not in kept]
            return [name for name in spare if delete_unread(self.root / name)]

    def _finish(self, draft: BundleDraft, base: Bundle | None) -> None:
        """Hash, seal, flush, rename, point: the last step is the one that counts."""
        manifest = draft.manifest
        manifest.files = _hash_all(draft, base)
        if self.key is not None:
            manifest.key_id = manifest.key_id or self.key.id
            self.key.check_id(manifest.key_id)
        data = manifest.to_bytes()
        sums = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "hmac": "" if self.key is None else self.key.digest(_SEAL_PURPOSE, data),
        }
        (draft.dir / MANIFEST).write_bytes(data)
        (draft.dir / SEAL).write_text(json.dumps(sums) + "\n")
        settle(draft.dir)
        name = _folder(manifest.version)
        os.replace(draft.dir, self.root / name)
        try:
            flush_folder(self.root)
            replace_file(self.root / CURRENT, f"{name}\n".encode())
        except BaseException:
            if not self.exists() or self.current_version() != manifest.version:
                delete(self.root / name)
            raise

    @contextmanager
    def _lock(self, timeout_s: float) -> Iterator[None]:
        """Be the one writer; clean up after one that was killed."""
        check_name(self.root.resolve().name, "bundle")
        lock, holder = FileLock(self.root / ".lock"), self.root / ".lock-holder"
        with disk_errors(f"bundle {self.root} can't be locked"):
            self.root.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(timeout=timeout_s)
            except Timeout:
                who = holder.read_text() if holder.exists() else "another process"
                raise ArtifactError(
                    f"bundle {self.root} is being changed by {who}; waited {timeout_s:g} s: "
                    "try again when it is done"
                ) from None
        try:
            with disk_errors(f"bundle {self.root} can't be written"):
                holder.write_text(f"process {os.getpid()} on {socket.gethostname()} since {now()}")
                for leftover in self.root.glob(f"{TEMPORARY}*"):
                    delete(leftover)
            yield
        finally:
            holder.unlink(missing_ok=True)
            lock.release()


def _start(directory: Path, base: Bundle | None, version: int) -> BundleDraft:
    """Make the draft's folder, with all that the current version holds."""
    directory.mkdir()
    if base is None:
        return BundleDraft(directory, Manifest(version=version))
    for rel, entry in base.manifest.files.items():
        link_or_copy(base.dir / rel, directory / rel)
        if (directory / rel).stat().st_size != entry.size:
            raise ArtifactError(f"{base.dir / rel} was altered: restore the bundle from a copy")
    manifest = base.manifest.model_copy(deep=True)
    manifest.version, manifest.parent, manifest.created_at = version, base.version, now()
    return BundleDraft(directory, manifest)


def _hash_all(draft: BundleDraft, base: Bundle | None) -> dict[str, FileEntry]:
    """Hash the draft's files; those shared with the current version must still be its."""
    entries = {}
    for rel in draft.files():
        try:
            check_path(rel)
        except ValueError as error:
            raise ArtifactError(f"a bundle can't hold {rel!r}: {error}") from None
        sha256, size = hash_file(draft.dir / rel)
        entries[rel] = FileEntry(sha256=sha256, size=size)
        if base is not None and rel in base.manifest.files:
            same = os.path.samefile(draft.dir / rel, base.dir / rel)
            if same and entries[rel] != base.manifest.files[rel]:
                raise ArtifactError(f"{base.dir / rel} was altered: restore it from a copy")
    return entries


def _same(path: Path, entry: FileEntry) -> bool:
    with disk_errors(f"{path} can't be read"):
        return hash_file(path) == (entry.sha256, entry.size)


def _read_seal(data: bytes, where: str) -> dict[str, str]:
    try:
        sums = json.loads(data)
        return {"sha256": str(sums["sha256"]), "hmac": str(sums["hmac"])}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ArtifactError(f"{where} was altered: not a seal") from None


def _folder(version: int) -> str:
    return f"{version:06d}"
