"""Which materialised adapter answers a request: at what strength, and how many side by side."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from guard.types import AdapterUse
from server.engines.materialise import Part, nearest_strength, strength_steps

log = logging.getLogger(__name__)

Together = Literal["strongest", "concatenate"]

_RECURS: Final = 3


@dataclass(frozen=True, slots=True)
class AdapterOptions:
    """How adapters are given to vLLM.

    Attributes:
        strengths: Strengths that each is materialised at, evenly spaced over (0, 1].
        folder: Where; vLLM must be able to read it. None is a temporary folder of ours.
        upstream_folder: The path of `folder` as vLLM sees it, if another.
        max_loaded: Names that vLLM is given at one time, each strength being one; more are loaded
            on demand, at the cost of the least recently used. Best vLLM's `--max-cpu-loras`.
        together: What becomes of several adapters in one request: the strongest alone, until the
            same ones recur, or always one adapter of concatenated ranks.
        max_rank: Largest rank of a concatenation: vLLM's `--max-lora-rank`.
    """

    strengths: int = 3
    folder: Path | None = None
    upstream_folder: str | None = None
    max_loaded: int = 64
    together: Together = "strongest"
    max_rank: int = 16


class AdapterChoice:
    """Turns the adapters that a request asks for into those that it gets.

    Args:
        options: Strengths, and what becomes of several.
    """

    def __init__(self, options: AdapterOptions) -> None:
        self._options = options
        self.steps = strength_steps(options.strengths)
        self._seen: dict[frozenset[str], int] = {}
        self._warned: set[frozenset[str]] = set()

    def fitting(self, uses: Sequence[AdapterUse]) -> tuple[Part, ...]:
        """Return the first ones whose ranks add up to no more than vLLM takes; at least one.

        What is left out by that is warned of once. Each is at the nearest strength.
        """
        parts = tuple(Part(use, nearest_strength(use.weight, self.steps)) for use in uses)
        count, rank = 1, parts[0].use.rank
        while count < len(parts) and rank + parts[count].use.rank <= self._options.max_rank:
            rank += parts[count].use.rank
            count += 1
        if count < len(parts):
            self._warn(parts, count)
        return parts[:count]

    def recurs(self, parts: Sequence[Part]) -> bool:
        """Count a request for these together; say if it was one of several."""
        keys = _keys(parts)
        self._seen[keys] = self._seen.get(keys, 0) + 1
        return self._seen[keys] >= _RECURS

    def keep(self, keys: Collection[str]) -> None:
        """Forget what was counted for all other adapters."""
        known = frozenset(keys)
        self._seen = {pair: count for pair, count in self._seen.items() if pair <= known}
        self._warned = {pair for pair in self._warned if pair <= known}

    def _warn(self, parts: Sequence[Part], count: int) -> None:
        keys = _keys(parts)
        if keys not in self._warned:
            self._warned.add(keys)
            log.warning(
                "%d adapters were asked for in one request, but their ranks add up to more than "
                "%d: %d of them put on; raise max_lora_rank and vLLM's --max-lora-rank",
                len(parts),
                self._options.max_rank,
                count,
            )


def _keys(parts: Sequence[Part]) -> frozenset[str]:
    return frozenset(part.use.key for part in parts)
