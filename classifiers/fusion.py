"""The universal fusion that ships: what `python -m classifiers.fit_fusion` wrote."""

from __future__ import annotations

import json
from pathlib import Path

from classifiers.evidence import Fusion

FILE = Path(__file__).with_name("fusion.json")


def load_fusion(path: Path = FILE) -> Fusion:
    """Read a fusion."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return Fusion(tuple(float(value) for value in found["weights"]), float(found["bias"]))


FUSION = load_fusion()
