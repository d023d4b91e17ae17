"""What the offline learner searches: points of named values, and the corruptions they stand for.

Useful strengths span eight decades (METHODS: ECO uses 1 to 1e6), so scales are searched by their
logarithm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, get_args

from corruptions.ops import CORRUPTIONS
from corruptions.spec import CorruptionSpec, SpanPolicy
from guard.errors import ConfigError

LOG_STRENGTH: Final = (-2.0, 6.0)
"""Searched strengths, log10 of multiples of the embeddings' RMS."""

LOG_FRAME: Final = (-2.0, 2.0)
"""Searched noise on the tokens around the entity, in the same unit."""

SCALELESS: Final = frozenset(
    {
        "zero-out-first-n",
        "zero-out-top-k",
        "flip-sign-first-n",
        "flip-sign-top-k",
        "reverse-order",
        "shuffle",
    }
)
"""Methods that ignore `strength`."""

WHOLE_TOKENS: Final = frozenset({"reverse-order", "shuffle", "mix-generic"})
"""Methods that ignore `dims`."""

STRENGTH_SCAN: Final = (0.3, 2.0, -0.7, 1.2, 4.0)
"""Strengths to begin with, log10 of multiples of the RMS: each decade's method is near one."""

Point = Mapping[str, Any]
"""Names of variables and their values."""


@dataclass(frozen=True, slots=True)
class Real:
    """A real variable in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Choice:
    """A variable that takes one of some values."""

    values: tuple[str, ...]


Variable = Real | Choice


@dataclass(frozen=True, slots=True)
class Space:
    """The corruptions among which the learner searches.

    Attributes:
        base: Gives every field that is not searched.
        hidden: Embedding dimensions of the model.
        rms: Root mean square of its embedding table; the unit of strengths.
        joint: Search method, dims, strength, span policy (and frame) at once; else strength alone.
        methods: For a joint search; empty takes all registered ones.

    Raises:
        ConfigError: If there is nothing to search: a strength that the method ignores.
        UnknownComponentError: If there is no such method.
    """

    base: CorruptionSpec
    hidden: int
    rms: float
    joint: bool = False
    methods: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        for name in (self.base.method, *self.methods):
            CORRUPTIONS[name]
        if not self.joint and self.base.method in SCALELESS:
            raise ConfigError(
                f"method {self.base.method!r} has no strength to search; give another --method, "
                "or --search joint"
            )

    @property
    def variables(self) -> dict[str, Variable]:
        """The variables, in a fixed order."""
        found: dict[str, Variable] = {"log_strength": Real(*LOG_STRENGTH)}
        if self.joint:
            found["method"] = Choice(self.methods or tuple(sorted(CORRUPTIONS)))
            found["log_dims"] = Real(0.0, math.log10(self.hidden))
            found["span_policy"] = Choice(get_args(SpanPolicy))
            found["frame"] = Choice(("off", "on"))
            found["log_frame"] = Real(*LOG_FRAME)
        return found

    def spec(self, point: Point) -> CorruptionSpec:
        """Return the corruption that a point stands for.

        Fields that its method ignores get one fixed value, so that equal corruptions are equal.
        """
        method = str(point.get("method", self.base.method))
        strength = self.rms * 10.0 ** float(point["log_strength"])
        changes: dict[str, Any] = {
            "method": method,
            "strength": 0.0 if method in SCALELESS else float(f"{strength:.6g}"),
            "dims": self._dims(method, point),
            "span_policy": point.get("span_policy", self.base.span_policy),
        }
        if "frame" in point:
            frame = self.rms * 10.0 ** float(point["log_frame"])
            changes["frame"] = float(f"{frame:.6g}") if point["frame"] == "on" else 0.0
        return replace(self.base, **changes)

    def anchors(self, budget: int) -> list[Point]:
        """Return the points to evaluate first: a coarse scan, at most a third of the budget.

        Far from the strength at which an answer changes the loss is flat, and no optimiser finds a
        slope there.
        """
        count = max(1, budget // 3)
        points: list[Point] = [{"log_strength": log} for log in STRENGTH_SCAN]
        return (self._joint_anchors() if self.joint else points)[:count]

    def _joint_anchors(self) -> list[Point]:
        blurred = self.base.frame > 0
        log = math.log10(self.base.frame / self.rms) if blurred else 0.0
        frame: dict[str, Any] = {
            "frame": "on" if blurred else "off",
            "log_frame": min(max(log, LOG_FRAME[0]), LOG_FRAME[1]),
        }
        starts = [start for start in _STARTS if start[0] in self._methods]
        starts = starts or [(name, 1.0, 0.3, "entity") for name in self._methods]
        return [
            {
                "log_strength": strength,
                "method": method,
                "log_dims": share * math.log10(self.hidden),
                "span_policy": policy,
                **frame,
            }
            for method, share, strength, policy in starts
        ]

    @property
    def _methods(self) -> tuple[str, ...]:
        return self.methods or tuple(sorted(CORRUPTIONS))

    def _dims(self, method: str, point: Point) -> int:
        if method in WHOLE_TOKENS:
            return self.hidden
        if "log_dims" not in point:
            return self.base.dims
        wanted: int = round(10.0 ** float(point["log_dims"]))
        return min(self.hidden, max(1, wanted))


_STARTS: Final[Sequence[tuple[str, float, float, str]]] = (
    ("mix-generic", 1.0, 0.3, "entity"),
    ("random-noise-first-n", 0.0, 2.0, "entity"),
    ("random-noise-first-n", 1.0, 0.3, "entity"),
    ("mix-generic", 1.0, -0.2, "entity"),
    ("mix-generic", 1.0, 0.3, "all-but-last"),
    ("random-noise-top-k", 0.5, 1.0, "entity"),
    ("zero-out-top-k", 1.0, 0.3, "entity"),
    ("random-noise-first-n", 1.0, -0.2, "all-but-last"),
    ("flip-sign-first-n", 1.0, 0.3, "entity"),
    ("shuffle", 1.0, 0.3, "all-but-last"),
)
"""Method, log10 dims as a share of log10 hidden, log10 strength, span policy: one of each kind that
docs/corruptions.md found to forget, and ECO's own setting."""
