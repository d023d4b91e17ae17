"""A search's log: a header that says which search it is, and one JSON line for each evaluation.

A line is on disk before the next evaluation counts, so a killed search goes on where it was. Lines
hold points, specs and figures, never a text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from guard.errors import ConfigError

SCHEMA: Final = "unlearn-guard/corruption-trace/1"

Record = dict[str, Any]


class Trace:
    """The records of one search, on disk.

    Attributes:
        records: What is known so far, by key: `clean`, `retained`, `train/3`, `validation/…`.
        resumed: True if an earlier run's records were found.

    Args:
        path: The file; made if it isn't there.
        identity: All that the records depend on, as JSON values; digests, no texts.
        restart: Throw away what is there.

    Raises:
        ConfigError: If the file holds another search, or can't be read or written.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        plain = json.loads(json.dumps(identity, allow_nan=False))
        try:
            self.resumed = not restart and path.exists() and self._load(plain)
            if not self.resumed:
                path.parent.mkdir(parents=True, exist_ok=True)
                header = {"schema": SCHEMA, "identity": plain}
                path.write_text(json.dumps(header) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{path} can't be used: {error.strerror or error}") from error

    def add(self, key: str, record: Record) -> None:
        """Add a record; it is on disk before this returns."""
        line = json.dumps({"key": key, **record}, allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.records[key] = record

    def _load(self, identity: Mapping[str, Any]) -> bool:
        """Read the records, and cut away a half-written last line; False if no line is whole."""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole:
            return False
        header, records = _parse(whole, self.path)
        _check_same(header.get("identity"), identity, self.path)
        self.records = {str(record.pop("key")): record for record in records}
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))
        return True


def read_identity(path: Path) -> dict[str, Any] | None:
    """Return the identity of the search that a log belongs to; None if there is no log.

    Raises:
        ConfigError: If the file is no log of a search.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror or error}") from error
    whole = data[: data.find(b"\n") + 1]
    if not whole:
        return None
    found = _parse(whole, path)[0].get("identity")
    return found if isinstance(found, dict) else None


def _parse(data: bytes, path: Path) -> tuple[dict[str, Any], list[Record]]:
    try:
        header, *records = [json.loads(line) for line in data.splitlines()]
        good = isinstance(header, dict) and header.get("schema") == SCHEMA
        good = good and all(isinstance(one, dict) and "key" in one for one in records)
    except ValueError:
        good = False
    if not good:
        raise ConfigError(
            f"{path} is no log of a search by this program: choose another --out, or give "
            "--restart to write it anew"
        )
    return header, records


def _check_same(found: Any, wanted: Mapping[str, Any], path: Path) -> None:
    if found == wanted:
        return
    known = found if isinstance(found, dict) else {}
    keys = [key for key in {**wanted, **known} if known.get(key) != wanted.get(key)]
    raise ConfigError(
        f"{path} belongs to another search: {', '.join(sorted(keys))} differ; choose another "
        "--out, or give --restart to begin anew"
    )
