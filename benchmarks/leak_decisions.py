"""What a guard says of its decisions at `/metrics`, before and after a run."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from guard.disk import replace_file

_COUNTER: Final = "unlearn_guard_decisions"
_TIMEOUT_S: Final = 10.0


def read_decisions(url: str) -> dict[str, float] | None:
    """Return how many decisions a server took by route; None if it doesn't tell."""
    from prometheus_client.parser import text_string_to_metric_families

    base = url.rstrip("/").removesuffix("/v1")
    try:
        with urllib.request.urlopen(f"{base}/metrics", timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
        families = list(text_string_to_metric_families(text))
    except (urllib.error.URLError, OSError, ValueError):
        return None
    return {
        sample.labels.get("route", ""): sample.value
        for family in families
        for sample in family.samples
        if family.name == _COUNTER and sample.name.endswith("_total")
    }


def load_decisions(file: Path) -> dict[str, float]:
    """Return what `counted` kept, by route; empty if nothing."""
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return {str(route): float(count) for route, count in found.items()}


@contextmanager
def counted(url: str, file: Path) -> Iterator[None]:
    """Add to `file` what a guard decides while the block runs, also if that is cut short.

    The counters are the whole server's: they are this run's if nobody else asks meanwhile.
    """
    before = read_decisions(url)
    try:
        yield
    finally:
        after = read_decisions(url)
        if before is not None and after is not None:
            replace_file(file, json.dumps(_added(load_decisions(file), before, after)).encode())


def _added(
    kept: Mapping[str, float], before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, float]:
    routes = sorted({*kept, *after})
    return {
        route: kept.get(route, 0.0) + max(0.0, after.get(route, 0.0) - before.get(route, 0.0))
        for route in routes
    }
