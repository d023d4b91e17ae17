"""Small durable file operations: hash, flush, replace, link, hold a folder against deletion."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guard.errors import ArtifactError

TEMPORARY = ".tmp-"
_CHUNK = 1 << 20


class GoneError(ArtifactError):
    """A folder went away, or is about to."""


def hash_file(path: Path) -> tuple[str, int]:
    """Return a file's SHA-256, as hex digits, and its size in bytes."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return digest.hexdigest(), size


def relative_files(root: Path) -> list[str]:
    """Return the relative paths of all files below `root`, sorted.

    Raises:
        ArtifactError: If there is anything but plain files and folders: a link could lead out.
    """
    found = []
    for folder, _, names in os.walk(root, followlinks=False, onerror=_raise):
        with os.scandir(folder) as entries:
            for entry in entries:
                plain = entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False)
                if not plain:
                    raise ArtifactError(f"{entry.path} is no plain file; a bundle holds no links")
        found += [os.path.relpath(os.path.join(folder, name), root) for name in names]
    return sorted(found)


def link_or_copy(source: Path, target: Path) -> None:
    """Give `target` the bytes of `source`: the same ones where the file system allows it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another device, too many links, no right to link, no links at all
        shutil.copyfile(source, target)


def replace_file(path: Path, data: bytes, durable: bool = True) -> None:
    """Replace a file's content at once: readers see the old or the new, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        flush_folder(path.parent)


def settle(root: Path) -> None:
    """Make every file below `root` read-only and flush all of it to disk.

    Files that other versions share are left alone: they are settled already.
    """
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            path = Path(folder, name)
            if path.stat().st_nlink == 1:
                path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
                _flush(path, os.O_RDONLY)
        flush_folder(Path(folder))


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk."""
    _flush(folder, os.O_RDONLY | os.O_DIRECTORY)


def delete(path: Path) -> None:
    """Delete a file or a whole folder; no error if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def delete_empty(root: Path) -> None:
    """Delete the folders below `root` that hold nothing."""
    for folder, _, _ in os.walk(root, topdown=False):
        if folder != str(root) and not os.listdir(folder):
            os.rmdir(folder)


def hold_folder(folder: Path) -> int:
    """Keep `delete_unread` from deleting `folder`, until the returned descriptor is closed.

    Raises:
        GoneError: If the folder isn't there, or is being deleted.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        raise GoneError(f"{folder} is not there") from None
    except OSError as error:
        raise ArtifactError(f"{folder} can't be read: {error.strerror}") from error
    try:
        with suppress(OSError):  # no locks on this file system: then gc deletes nothing either
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        if not folder.exists() or not os.path.samestat(folder.stat(), os.fstat(descriptor)):
            raise GoneError(f"{folder} was deleted")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def delete_unread(folder: Path) -> bool:
    """Delete `folder` unless a process holds it; say whether it was deleted."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # held, or this file system has no locks
            return False
        aside = folder.with_name(f"{TEMPORARY}{folder.name}-{secrets.token_hex(4)}")
        folder.rename(aside)  # from here on nobody opens it
    finally:
        os.close(descriptor)
    delete(aside)
    return True


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turn a file system's refusal into an ArtifactError that names `what`."""
    try:
        yield
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        raise ArtifactError(f"{what}: {error.strerror or error}{place}") from error


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _raise(error: OSError) -> None:
    raise error
