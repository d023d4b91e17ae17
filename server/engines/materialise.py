"""Adapters on disk as vLLM wants them: one folder for each strength, one copy of the weights.

vLLM has no scale per request, but it reads `lora_alpha` from the adapter's config. So an adapter is
given to it several times over: the same weights file under another alpha. Everything here blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guard.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from guard.disk import delete, delete_unread, disk_errors, hold_folder, link_or_copy
from guard.types import AdapterUse
from server.engines.adapter_config import read_config
from server.engines.concatenate import concatenate

_OURS: Final = "guard-"


@dataclass(frozen=True, slots=True)
class Part:
    """An adapter at one of the materialised strengths.

    Attributes:
        use: The adapter.
        strength: What its `lora_alpha` is multiplied by, in (0, 1].
    """

    use: AdapterUse
    strength: float

    @property
    def id(self) -> tuple[str, float]:
        """Tell it from all others; the use's own weight plays no part."""
        return self.use.key, self.strength


def strength_steps(count: int) -> tuple[float, ...]:
    """Return `count` strengths, evenly spaced over (0, 1], weakest first."""
    return tuple((step + 1) / count for step in range(count))


def nearest_strength(weight: float, steps: Sequence[float]) -> float:
    """Return the step that is nearest to a soft weight, the stronger one of two as near.

    Never 0: an adapter that was asked for is put on, however weakly. Weights above 1 get 1.
    """
    return min(steps, key=lambda step: (round(abs(step - weight), 9), -step))


class AdapterFolder:
    """The folder that this process gives adapters to vLLM in.

    Args:
        root: Folder to make it in; None is the place for temporary files.
        upstream_root: What vLLM calls `root`, if it sees it under another path.
    """

    def __init__(self, root: Path | None = None, upstream_root: str | None = None) -> None:
        self._root, self._upstream_root = root, upstream_root
        self._path: Path | None = None
        self._held: int | None = None

    def write(self, name: str, parts: Sequence[Part]) -> str:
        """Write one adapter, of one part or of several side by side, unless it is there.

        Args:
            name: Its folder's name.
            parts: What it is made of; of several, the ranks add up.

        Returns:
            The folder's path as vLLM sees it.

        Raises:
            ArtifactError: A part can't be read, or the folder not be written.
            IncompatibleArtifactError: A part is not plain LoRA.
        """
        with disk_errors("the adapter folder can't be written"):
            home = self._open()
            folder = home / name
            if not folder.is_dir():
                unfinished = home / f".{name}-{secrets.token_hex(4)}"
                try:
                    unfinished.mkdir()
                    self._fill(unfinished, parts)
                    unfinished.rename(folder)
                finally:
                    delete(unfinished)
        return self._as_upstream(folder)

    def remove(self, name: str) -> None:
        """Delete one adapter's folder."""
        if self._path is not None:
            delete(self._path / name)

    def forget(self, key: str) -> None:
        """Delete the weights that all strengths of an adapter share; their own links stay."""
        if self._path is not None:
            delete(self._path / _weights_name(key))

    def close(self) -> None:
        """Delete everything; harmless when done before."""
        path, held, self._path, self._held = self._path, self._held, None, None
        if held is not None:
            os.close(held)
        if path is not None:
            delete(path)

    def _open(self) -> Path:
        if self._path is None:
            if self._root is None:
                self._path = Path(tempfile.mkdtemp(prefix="unlearn-guard-adapters-"))
            else:
                self._path = self._make(self._root.absolute())
            self._held = hold_folder(self._path)
        return self._path

    def _make(self, root: Path) -> Path:
        """Make a folder of our own beside those of other guards; clear away what dead ones left."""
        root.mkdir(parents=True, exist_ok=True)
        for left in root.glob(f"{_OURS}*"):
            with suppress(OSError):
                delete_unread(left)
        path = root / f"{_OURS}{secrets.token_hex(8)}"
        path.mkdir()
        return path

    def _as_upstream(self, folder: Path) -> str:
        if self._root is None or self._upstream_root is None:
            return str(folder)
        inside = folder.relative_to(self._root.absolute())
        return f"{self._upstream_root.rstrip('/')}/{inside.as_posix()}"

    def _fill(self, folder: Path, parts: Sequence[Part]) -> None:
        if len(parts) > 1:
            sources = [
                (part.use.path / ADAPTER_WEIGHTS, read_config(part.use.path), part.strength)
                for part in parts
            ]
            config = concatenate(sources, folder / ADAPTER_WEIGHTS)
        else:
            (part,) = parts
            config = read_config(part.use.path)
            config["lora_alpha"] *= part.strength
            link_or_copy(self._weights(part.use), folder / ADAPTER_WEIGHTS)
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, sort_keys=True) + "\n")

    def _weights(self, use: AdapterUse) -> Path:
        """Bring an adapter's weights onto our file system once, for all strengths to link to."""
        path = self._open() / _weights_name(use.key)
        if not path.is_file():
            unfinished = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
            link_or_copy(use.path / ADAPTER_WEIGHTS, unfinished)
            unfinished.replace(path)
        return path


def _weights_name(key: str) -> str:
    return f"weights-{hashlib.sha256(key.encode()).hexdigest()}"
