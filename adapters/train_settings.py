"""How an adapter is trained, and what its training did: the value objects of `adapters.train`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

import numpy as np

from guard.errors import ConfigError

_WITHOUT_EFFECT: Final = ("checkpoint_every",)
"""Settings that change nothing of the result."""

_LATER: Final = ("layers", "validate_every", "patience")
"""Settings that came later: left out of what is compared where they change nothing, so that what
was trained before them is still told to be the same."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How an adapter is trained.

    Attributes:
        rank: Columns of the two matrices. More hold more, and take more space.
        alpha: The adapter is scaled by alpha / rank.
        dropout: Share of the adapter's inputs left out at each step.
        modules: Names of the linear layers to adapt, or `all-linear`.
        layers: First of the model's layers that are adapted, and the one after the last; None
            adapts all. Fewer cost less, and hold less.
        epochs: Times that each example is seen.
        batch: Examples a step, of all processes together.
        rate: Peak of the one-cycle learning rate.
        warmup: Share of the steps in which it rises.
        weight_decay: AdamW's.
        gradient_norm: Longer gradients are cut to it.
        seed: Of initial weights, order and dropout.
        checkpoint_every: Steps between two checkpoints.
        validate_every: Steps between two validations; 0 validates never. The last step is
            validated in any case.
        patience: Validations in a row without a new best after which training ends early; 0 trains
            to the end. Either way the best is kept.
        dtype: Of the adapter's file. Training itself is in float32.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0
    modules: str | tuple[str, ...] = "all-linear"
    layers: tuple[int, int] | None = None
    epochs: int = 8
    batch: int = 16
    rate: float = 1e-3
    warmup: float = 0.3
    weight_decay: float = 0.0
    gradient_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 20
    validate_every: int = 0
    patience: int = 0
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("validate_every", "patience"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
        for name in ("rate", "gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise ConfigError(f"layers is {self.layers}; it must be (first, one after the last)")
        if self.patience and not self.validate_every:
            raise ConfigError("patience counts validations; set validate_every too")

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide on the result."""
        chosen = asdict(self)
        for name in _WITHOUT_EFFECT:
            del chosen[name]
        for name in _LATER:
            if not chosen[name]:
                del chosen[name]
        return chosen


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did.

    Attributes:
        losses: Of each step, before it was taken, without a constraint's penalty.
        seconds: Time in training, all runs of it together.
        parameters: Numbers trained.
        examples: Examples trained on.
        facts: What the caller recorded with it.
        validations: Steps taken and value of each validation, the smaller the better.
        best_step: Steps after which the adapter was as it is written; None without validation,
            where it is as it was in the end.
    """

    losses: tuple[float, ...]
    seconds: float
    parameters: int
    examples: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    validations: tuple[tuple[int, float], ...] = ()
    best_step: int | None = None

    def __post_init__(self) -> None:
        # As tuples also where they were read from JSON.
        object.__setattr__(self, "losses", tuple(self.losses))
        pairs = tuple((int(step), float(value)) for step, value in self.validations)
        object.__setattr__(self, "validations", pairs)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def last_loss(self, steps: int = 5) -> float:
        """Return the mean loss of the last steps."""
        return float(np.mean(self.losses[-steps:]))
