"""What the offline learner produces and serving applies: one corruption, fully described."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from guard.errors import ConfigError

SpanPolicy = Literal["entity", "all-but-last"]
"""Which tokens of a flagged text: those of the target's entity, or all but the last."""


@dataclass(frozen=True, slots=True)
class CorruptionSpec:
    """A corruption method and its parameters.

    Attributes:
        method: Name in `corruptions.ops.CORRUPTIONS`.
        dims: Number of embedding dimensions touched, in [1, hidden]. Methods that move or replace
            whole tokens (`reverse-order`, `shuffle`, `mix-generic`) ignore it.
        strength: sigma, in embedding units, >= 0. Higher forgets more and costs fluency. Useful
            values span 1e-2 to 1e6 times the RMS of the embedding table. Methods without a scale
            (zero-out, flip-sign, reverse-order, shuffle) ignore it.
        span_policy: `entity` marks the tokens that the span finder found, and falls back to
            `all-but-last` where it found none (ECO, arXiv 2406.07933).
        frame: Noise on the other tokens of the sentences that hold marked ones, on all their
            dimensions, in embedding units, >= 0. A model remembers wordings beside names; noise
            well below the distance of two tokens blurs those and stays fluent.

    Raises:
        ConfigError: If a value is out of range.
    """

    method: str
    dims: int
    strength: float
    span_policy: SpanPolicy = "entity"
    frame: float = 0.0

    def __post_init__(self) -> None:
        _check(self.method, self.dims, self.span_policy)
        _check_scale("strength", self.strength)
        _check_scale("frame", self.frame)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CorruptionSpec:
        """Read back `to_dict`, refusing missing and unknown fields; `frame` may be missing.

        Raises:
            ConfigError: If a field is missing, unknown, of the wrong type or out of range.
        """
        names = {field.name for field in fields(cls)}
        wrong = sorted((names ^ set(values)) - {"frame"})
        if wrong:
            raise ConfigError(
                f"corruption spec: fields {', '.join(wrong)} are missing or unknown; "
                f"give exactly {', '.join(sorted(names))}"
            )
        return cls(**values)


def _check(method: object, dims: object, span_policy: object) -> None:
    """Check types too: the values may come from a file."""
    if not isinstance(method, str) or not method:
        raise ConfigError(f"corruption method is {method!r}; give a method's name")
    if isinstance(dims, bool) or not isinstance(dims, int) or dims < 1:
        raise ConfigError(f"corruption dims is {dims!r}; give a whole number >= 1")
    if span_policy not in get_args(SpanPolicy):
        allowed = ", ".join(get_args(SpanPolicy))
        raise ConfigError(f"span_policy is {span_policy!r}; allowed: {allowed}")


def _check_scale(name: str, value: object) -> None:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not 0 <= value < math.inf:  # type: ignore[operator]
        raise ConfigError(f"corruption {name} is {value!r}; give a finite number >= 0")
