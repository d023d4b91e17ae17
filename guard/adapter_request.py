"""What `learn adapter` is asked, and what it needs of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from guard.errors import ConfigError
from guard.types import AdapterUse, FloatArray, Prompt, SamplingParams, TargetRoute

RATE: Final = 6e-3
"""Peak of the learning rate: `matched` takes a higher one than losses in probabilities."""

RouteChoice = TargetRoute | Literal["auto"]


@dataclass(frozen=True, slots=True)
class AdapterRequest:
    """What `learn adapter` was asked to do.

    Attributes:
        target: Name of a target of the bundle.
        forget: Its forget set, given again.
        out: Folder of the training.
        loss: Name in `adapters.unlearning.LOSSES`.
        options: Of the loss, by name.
        retain: Neighbouring data that the adapter is to leave alone; None trains on the forget set
            alone.
        retain_weight: Weight of the retain regulariser.
        rank: Columns of the adapter's matrices.
        alpha: Scales the adapter by alpha / rank.
        layers: First of the adapted layers, and one after the last; None adapts all.
        epochs: Times that each row is seen.
        batch: Rows a step.
        rate: Peak of the learning rate.
        precision: `auto` multiplies in bfloat16 where the processor can.
        orthogonality: How the adapter is kept apart from the bundle's others.
        sides: On which side: input (A, as O3), output (B), or both.
        orthogonal_weight: Weight of the penalty (O3's lambda).
        held_out: Share of the rows that training stops early by, and isn't done on.
        patience: Validations without a new best until then.
        route: What a flagged request takes from now on; `auto` chooses by evaluation.
        prepared: Folder that keeps counterfactual answers and the teacher, to be used again.
        earlier: Adapters to keep apart from, oldest first; None takes the bundle's.
        seed: Of everything random.
        restart: Begin anew, whatever is in `out`.
        allow_changed: Take a forget set that is not the one of `target add`.
        apply: Write the result into the bundle.
    """

    target: str
    forget: Path
    out: Path
    loss: str = "matched"
    options: Mapping[str, Any] = field(default_factory=dict)
    retain: Path | None = None
    retain_weight: float = 1.0
    rank: int = 8
    alpha: int = 16
    layers: tuple[int, int] | None = None
    epochs: int = 12
    batch: int = 5
    rate: float = RATE
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    orthogonality: Literal["project", "penalty", "none"] = "project"
    sides: Literal["input", "output", "both"] = "input"
    orthogonal_weight: float = 0.1
    held_out: float = 0.0
    patience: int = 3
    route: RouteChoice = "auto"
    prepared: Path | None = None
    earlier: Sequence[Path] | None = None
    seed: int = 0
    restart: bool = False
    allow_changed: bool = False
    apply: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise ConfigError(f"held_out is {self.held_out}; it must be in [0, 1)")
        if not self.retain_weight > 0:
            raise ConfigError(f"retain_weight is {self.retain_weight}; it must be above 0")


class TrainableModel(Protocol):
    """A model in this process: what the embedded engine has."""

    @property
    def model(self) -> Any:
        """The transformers causal language model."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        ...

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        adapters: Sequence[AdapterUse] = (),
    ) -> list[str]:
        """Answer each prompt, with the adapters' changes."""
        ...

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        """Teacher-force each answer; see `guard.types.LearningEngine`."""
        ...
