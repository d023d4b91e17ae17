"""A run's log: one JSON line for each text that is done, so that a killed run can go on.

The first line says which run it is. Records name texts by a keyed digest, and hold no text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guard.errors import ConfigError

Record = dict[str, Any]


class RunLog:
    """The records of a run, on disk.

    Args:
        path: The file; made if it isn't there.
        run: Digest of all that the records depend on: inputs, bundle, seed.
        restart: Throw away what is there.

    Raises:
        ConfigError: If the file holds another run, or can't be written.
    """

    def __init__(self, path: Path, run: str, restart: bool = False) -> None:
        self._path = path
        self.records: dict[str, Record] = {}
        try:
            if restart or not path.exists() or not self._load(run):
                path.write_text(json.dumps({"run": run}) + "\n", encoding="utf-8")
                self.records.clear()
        except OSError as error:
            raise ConfigError(f"{path} can't be used: {error.strerror or error}") from error

    def append(self, digests: Sequence[str], records: Sequence[Record]) -> None:
        """Add records, on disk before this returns."""
        lines = [
            json.dumps({"digest": digest, **record}, allow_nan=False) + "\n"
            for digest, record in zip(digests, records, strict=True)
        ]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        self.records.update(zip(digests, records, strict=True))

    def _load(self, run: str) -> bool:
        """Read the records, and cut away a half-written last line; False if no line is whole."""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if not lines:
            return False
        try:
            header, *records = [json.loads(line) for line in lines]
            known = header["run"] if isinstance(header, dict) else None
            self.records = {record.pop("digest"): record for record in records}
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{self._path} is no log of a run ({error}): choose another --out, or give "
                "--restart to write it anew"
            ) from error
        if known != run:
            raise ConfigError(
                f"{self._path} belongs to a run with other inputs, options, seed or bundle: choose "
                "another --out, or give --restart to begin anew"
            )
        if len(whole) < len(data):
            os.truncate(self._path, len(whole))
        return True
