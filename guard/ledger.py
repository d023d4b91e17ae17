"""The ledger: what was decided and changed, a JSON line each, in a chain of hashes.

    {"seq": 2, "time": "…", "kind": "decision", …, "prev": "…", "hash": "…", "mac": "…"}

`hash` is the SHA-256 of the row without hash and mac; `prev` is the hash of the row before; `mac`
is an HMAC of the hash under the guard's key. The chain shows edits, reordering and gaps to anybody;
the key shows that the rows are the guard's. What a chain can't show, rows cut off its end, shows in
`ledger.head`, which says, signed, how far the ledger had come. (Who has an old copy of both files
can still turn the clock back: keep copies elsewhere if that matters.)

The ledger holds no text: callers give names, figures and keyed digests.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import Any

from guard.disk import disk_errors
from guard.errors import ArtifactError
from guard.keys import GuardKey

GENESIS = "0" * 64
_OWN_FIELDS = frozenset({"seq", "time", "kind", "prev", "hash", "mac"})
_ROW_PURPOSE = "ledger/row"
_HEAD_PURPOSE = "ledger/head"
_SECTOR = 512
_DURABLE_KINDS = frozenset({"bundle"})


@dataclass(frozen=True, slots=True)
class LedgerReport:
    """What a check of the ledger found.

    Attributes:
        path: The ledger.
        rows: Rows in it.
        ok: True if nothing is wrong.
        authentic: Whether all rows are the guard's own; None if no key was given to tell.
        breaks: Where something is wrong, e.g. `line 7: altered`; empty if `ok`.
        notes: What is unusual but explained, e.g. a write that a crash cut short.
    """

    path: str
    rows: int
    ok: bool
    authentic: bool | None
    breaks: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            "path": self.path,
            "ok": self.ok,
            "rows": self.rows,
            "authentic": self.authentic,
            "breaks": list(self.breaks),
            "notes": list(self.notes),
        }


@dataclass(frozen=True, slots=True)
class _Head:
    """The end of the ledger: sequence number and hash of its last row, and its length."""

    seq: int = 0
    hash: str = GENESIS
    size: int = 0


class Ledger:
    """Appends rows; safe for several threads and processes at once.

    Args:
        path: The file, `ledger.jsonl`; made, with its folder, by the first row.
        key: Signs the rows, if given.
    """

    def __init__(self, path: str | Path, key: GuardKey | None = None) -> None:
        self.path, self.key = Path(path), key

    def append(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Add a row and return it.

        Reads only the head file, unless that and the ledger don't fit together. Rows of kind
        `bundle` are flushed to disk; others are left to the operating system, which keeps them
        through a crash of this program, though not of the machine.

        Args:
            kind: What the row is about: `decision`, `bundle`, …
            **fields: Plain JSON values (numpy's numbers too), no text.

        Raises:
            ValueError: If a field has the name of one of the ledger's own, or is not JSON.
            ArtifactError: If the file can't be written.
        """
        if taken := _OWN_FIELDS & fields.keys():
            raise ValueError(f"fields {sorted(taken)} are the ledger's own")
        _canonical(fields)
        with disk_errors(f"ledger {self.path} can't be written"), _locked(self.path) as file:
            head = _read_head(self.path, self.key)
            if _size(file) != (head.size if head else 0):
                head = self._repair(file, head)
            row = self._write(file, head or _Head(), kind, fields)
        return row

    def _write(
        self, file: FileIO, head: _Head, kind: str, fields: dict[str, Any], prefix: bytes = b""
    ) -> dict[str, Any]:
        row = {"seq": head.seq + 1, "time": _now(), "kind": kind, **fields, "prev": head.hash}
        row["hash"] = hashlib.sha256(_canonical(row)).hexdigest()
        if self.key is not None:
            row["mac"] = self.key.digest(_ROW_PURPOSE, row["hash"].encode())
        _write_whole(file, prefix + _canonical(row) + b"\n")
        durable = kind in _DURABLE_KINDS
        if durable:
            os.fsync(file.fileno())
        _write_head(self.path, _Head(row["seq"], row["hash"], _size(file)), self.key, durable)
        return row

    def _repair(self, file: FileIO, head: _Head | None) -> _Head:
        """Find the true end after a crash or an intrusion, and put on record what was found."""
        scan = _scan(file, head)
        if scan.torn is not None:
            note = {"torn_sha256": hashlib.sha256(scan.torn).hexdigest()}
            row = self._write(file, _Head(scan.seq, scan.hash), "repair", note, prefix=b"\n")
            scan.seq, scan.hash = row["seq"], row["hash"]
        if problem := scan.head_problem():
            row = self._write(file, _Head(scan.seq, scan.hash), "gap", {"problem": problem})
            scan.seq, scan.hash = row["seq"], row["hash"]
        return _Head(scan.seq, scan.hash, _size(file))


def verify_ledger(path: str | Path, key: GuardKey | None = None) -> LedgerReport:
    """Check every row, the chain, and the end that the head file remembers.

    Args:
        path: The ledger.
        key: If given, the signatures of rows and head are checked too.

    Raises:
        ArtifactError: If there is no ledger, or it can't be read.
    """
    path = Path(path)
    if not path.exists() and not _head_path(path).exists():
        raise ArtifactError(f"no ledger at {path}: nothing was recorded yet")
    with disk_errors(f"ledger {path} can't be read"):
        if path.exists():
            with FileIO(path, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # not between a row and its head
                scan = _scan(file, _read_head(path, key), key)
        else:
            scan = _Scan(_read_head(path, key), key)
    breaks = list(scan.breaks)
    if problem := scan.head_problem():
        breaks.append(f"end: {problem}")
    if scan.torn is not None:
        scan.notes.append(f"line {scan.lines}: cut short by a crash; the next row will say so")
    return LedgerReport(
        path=str(path),
        rows=scan.rows,
        ok=not breaks,
        authentic=None if key is None else not breaks,
        breaks=tuple(breaks),
        notes=tuple(scan.notes),
    )


class _Scan:
    """Follows the chain line by line.

    Attributes:
        seq: Sequence number of the last row that could be read.
        hash: Its hash.
        torn: A last line without its line feed, or None.
        breaks: What is wrong, in order.
        notes: What is unusual, but explained.
    """

    def __init__(self, head: _Head | None, key: GuardKey | None = None) -> None:
        self.head, self.key = head, key
        self.seq, self.hash = 0, GENESIS
        self.lines = self.rows = self.size = 0
        self.torn: bytes | None = None
        self.breaks: list[str] = []
        self.notes: list[str] = []
        self._met_head = False
        self._not_a_row: tuple[int, bytes] | None = None

    def feed(self, line: bytes) -> None:
        """Take the next line, with its line feed."""
        self.lines += 1
        self.size += len(line)
        content = line.rstrip(b"\n")
        row = _parse(content)
        if self._not_a_row is not None:
            self._explain(row)
        if row is not None:
            self._follow(row, content)
        elif line.endswith(b"\n"):
            self._not_a_row = (self.lines, content)
        if not line.endswith(b"\n"):
            self.torn = line
        if self.head is not None and self.size == self.head.size:
            self._met_head = (self.seq, self.hash) == (self.head.seq, self.head.hash)

    def finish(self) -> None:
        """Note that there are no more lines."""
        if self._not_a_row is not None:
            self._explain(None)

    def head_problem(self) -> str | None:
        """Compare the end with what the head file remembers."""
        if self.head is None:
            # A crash right after the first row leaves no head; nothing else does.
            return "the head file is missing, damaged or not the guard's" if self.rows > 1 else None
        if self.size < self.head.size:
            return f"rows were cut off: {self.head.seq} were written, the last is now {self.seq}"
        return None if self._met_head else "the rows are not those that the head file remembers"

    def _explain(self, row: dict[str, Any] | None) -> None:
        """A line that is no row is explained by a next row that names its hash as torn."""
        number, content = self._not_a_row or (0, b"")
        if row is not None and row.get("torn_sha256") == hashlib.sha256(content).hexdigest():
            self.notes.append(f"line {number}: cut short by a crash, and repaired")
        else:
            self.breaks.append(f"line {number}: not a row")
        self._not_a_row = None

    def _follow(self, row: dict[str, Any], content: bytes) -> None:
        self.rows += 1
        bare = {name: value for name, value in row.items() if name not in ("hash", "mac")}
        if row["hash"] != hashlib.sha256(_canonical(bare)).hexdigest() or content != _canonical(
            row
        ):
            self.breaks.append(f"line {self.lines}: altered")
        elif self.key is not None and row.get("mac") != self._mac(row["hash"]):
            self.breaks.append(f"line {self.lines}: not signed with key {self.key.id}")
        elif (row["seq"], row["prev"]) != (self.seq + 1, self.hash):
            self.breaks.append(
                f"line {self.lines}: row {row['seq']} does not follow row {self.seq}: rows were "
                "removed, added, altered or moved"
            )
        if row["kind"] == "gap":
            self.breaks.append(f"line {self.lines}: a gap was noticed here: {row.get('problem')}")
        self.seq, self.hash = row["seq"], row["hash"]

    def _mac(self, row_hash: str) -> str:
        return "" if self.key is None else self.key.digest(_ROW_PURPOSE, row_hash.encode())


def _scan(file: FileIO, head: _Head | None, key: GuardKey | None = None) -> _Scan:
    scan = _Scan(head, key)
    with open(os.dup(file.fileno()), "rb") as lines:
        lines.seek(0)
        for line in lines:
            scan.feed(line)
    scan.finish()
    return scan


def _parse(content: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return None
    shape = {"seq": int, "kind": str, "prev": str, "hash": str}
    if not isinstance(row, dict) or any(type(row.get(k)) is not t for k, t in shape.items()):
        return None
    return row


def _canonical(value: dict[str, Any]) -> bytes:
    """Encode so that equal rows are equal bytes; the keys keep the order they are written in."""
    text = json.dumps(
        value, ensure_ascii=True, separators=(",", ":"), allow_nan=False, default=_plain
    )
    return text.encode("ascii")


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a number of numpy's
        return value.item()
    raise ValueError(f"a ledger can't hold a {type(value).__name__}")


def _write_whole(file: FileIO, line: bytes) -> None:
    """Append in one write; on a full disk, take a part back rather than leave it."""
    size = _size(file)
    try:
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        os.ftruncate(file.fileno(), size)
        raise


@contextmanager
def _locked(path: Path) -> Iterator[FileIO]:
    """Open for appending, readable by the owner alone, as the only writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
    with FileIO(descriptor, "rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _size(file: FileIO) -> int:
    return os.fstat(file.fileno()).st_size


def _head_path(path: Path) -> Path:
    return path.with_suffix(".head")


def _write_head(path: Path, head: _Head, key: GuardKey | None, durable: bool) -> None:
    """Overwrite the head in one write within one disk sector, which a crash does not tear.

    Replacing the file by a rename costs a hundred times as much on common file systems, and every
    reader and writer holds the ledger's lock.
    """
    value: dict[str, Any] = {"seq": head.seq, "hash": head.hash, "size": head.size}
    if key is not None:
        value["mac"] = key.digest(_HEAD_PURPOSE, _canonical(value))
    descriptor = os.open(_head_path(path), os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(descriptor, _canonical(value).ljust(_SECTOR - 1) + b"\n", 0)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_head(path: Path, key: GuardKey | None) -> _Head | None:
    """Read the head file; None if there is none, or it is damaged or not signed with `key`."""
    try:
        value = json.loads(_head_path(path).read_bytes()[:_SECTOR])
        head = _Head(int(value["seq"]), str(value["hash"]), int(value["size"]))
        mac = value.pop("mac", None)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if key is not None and mac != key.digest(_HEAD_PURPOSE, _canonical(value)):
        return None
    return head


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
