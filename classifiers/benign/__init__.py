"""The benign calibration set: prompts that no target should ever flag.

A detector learns from one part of it as negatives and sets its threshold on another.
`classifiers.benign.generate` rewrites the file from the seeds; docs/benign.md describes it.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path


def benign_path() -> Path:
    """The file's place: JSONL rows with `text`, `category` and `lang`."""
    # The wheel is installed unzipped, so the resource is always a plain file.
    return Path(str(resources.files(__name__).joinpath("benign.jsonl")))


def load_benign() -> list[str]:
    """All texts of the set, in file order (shuffled when the file was made)."""
    with benign_path().open(encoding="utf-8") as file:
        return [str(json.loads(line)["text"]) for line in file]


__all__ = ["benign_path", "load_benign"]
