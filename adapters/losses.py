"""Losses of adapter training: functions of the adapted model and a batch.

What unlearning makes small is in `adapters.unlearning`; here is what all of it is built from.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapters.examples import IGNORED, Batch, Example, collate
from guard.errors import ConfigError, DataError

_RETAIN: Final = 0x7E7A
"""Sets the draws of retained examples apart from other draws of the same seed and step."""


class Loss(Protocol):
    """What training makes small.

    The model is a peft model: inside `with untouched(model):` it is the base without the adapter,
    for losses that compare with it.
    """

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss of a batch, a scalar with gradients."""
        ...


def cross_entropy(model: Any, batch: Batch) -> Tensor:
    """Return the mean negative log-likelihood of the answers' tokens, nats."""
    logits, labels = answer_logits(model, batch)
    return functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED
    )


@dataclass(frozen=True, slots=True)
class Sum:
    """Losses added up, each times its weight.

    Attributes:
        terms: Weight and loss; a weight of 0 leaves its loss out.
    """

    terms: tuple[tuple[float, Loss], ...]

    def __post_init__(self) -> None:
        if not any(weight for weight, _ in self.terms):
            raise ConfigError("a sum of losses needs one with a weight other than 0")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the weighted sum."""
        values = [weight * loss(model, batch) for weight, loss in self.terms if weight]
        return torch.stack(values).sum()


@dataclass(frozen=True, slots=True)
class Retain:
    """Keeps the model as it is on examples that it shall not forget.

    `cross-entropy` teaches their answers; `kl` is the divergence KL(untouched model || model) at
    the answers' positions, which leaves a model alone that was never sure of them.

    Attributes:
        examples: What to keep.
        kind: Which of the two.
        size: Examples a step, drawn without replacement by seed and step; None takes as many as
            the batch has rows.
        seed: Of the draws.
    """

    examples: tuple[Example, ...]
    kind: Literal["cross-entropy", "kl"] = "kl"
    size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.examples:
            raise DataError("there are no retained examples to keep the model to")
        if self.kind not in ("cross-entropy", "kl"):
            raise ConfigError(f"no retain loss {self.kind!r}; there are cross-entropy and kl")
        if self.size is not None and self.size < 1:
            raise ConfigError(f"retained examples a step are {self.size}; at least 1")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """Return the loss on the step's retained examples."""
        kept = self.draw(batch)
        if self.kind == "cross-entropy":
            return cross_entropy(model, kept)
        logits, _ = told_logits(model, kept)
        with untouched(model):
            reference, _ = told_logits(model, kept)
        return kl_divergence(logits, reference)

    def draw(self, batch: Batch) -> Batch:
        """Return the retained examples that go with a batch."""
        size = min(self.size or len(batch.indices), len(self.examples))
        rng = np.random.default_rng((self.seed, batch.step, _RETAIN))
        chosen = rng.choice(len(self.examples), size, replace=False).tolist()
        return collate(self.examples, chosen, batch.step).to(batch.tokens.device)


def with_retain(
    loss: Loss,
    examples: Sequence[Example],
    *,
    kind: Literal["cross-entropy", "kl"] = "kl",
    weight: float = 1.0,
    size: int | None = None,
    seed: int = 0,
) -> Sum:
    """Return a loss with a retain regulariser of a weight beside it (see `Retain`).

    Raises:
        ConfigError: The weight isn't above 0, or there is no such kind.
        DataError: There are no examples.
    """
    if not weight > 0:
        raise ConfigError(f"the retain weight is {weight}; it must be above 0")
    return Sum(((1.0, loss), (weight, Retain(tuple(examples), kind, size, seed))))


def kl_divergence(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """Return the mean KL(reference || model), nats: sum_v p_ref(v) log(p_ref(v) / p(v)).

    Args:
        logits: Of the model, shape (tokens, vocabulary).
        reference_logits: Of the reference, same shape.
    """
    return functional.kl_div(
        logits.log_softmax(-1),
        reference_logits.log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Make a peft model its own base, without gradients and dropout, for the time of the block."""
    training = model.training
    model.eval()
    try:
        with model.disable_adapter(), torch.no_grad():
            yield
    finally:
        model.train(training)


def answer_log_probs(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the model; return how likely it finds the answers' tokens.

    Returns:
        Log-probabilities, nats, shape (rows, positions), 0 where a row has no token of its answer;
        and whether it has one, same shape.
    """
    logits, labels = answer_logits(model, batch)
    nll = functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -nll.view(labels.shape), labels != IGNORED


def told_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the model; keep exactly the positions from which the answers' tokens are told.

    Returns:
        Logits in float32, shape (tokens of all answers, vocabulary), row by row; and the tokens,
        shape (tokens of all answers,).
    """
    logits, labels = answer_logits(model, batch)
    told = labels != IGNORED
    return logits[told].float(), labels[told]


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Run the model; keep the positions from which any of the answers is told.

    Returns:
        Logits, shape (rows, positions, vocabulary), and the tokens to tell from them, shape (rows,
        positions), `IGNORED` where a row has none.
    """
    told = (batch.labels != IGNORED).any(dim=0).nonzero()[:, 0]
    keep = torch.arange(int(told[0]) - 1, int(told[-1]), device=batch.tokens.device)
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask, "use_cache": False}
    if _selects_positions(model):
        logits = model(**inputs, logits_to_keep=keep).logits
    else:
        logits = model(**inputs).logits[:, keep]
    return logits, batch.labels[:, keep + 1]


def _selects_positions(model: Any) -> bool:
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(network.forward).parameters


class InBfloat16:
    """A loss whose matrix products are in bfloat16: half the time where the processor has it.

    Parameters, gradients and all that is not a matrix product stay in float32.

    Args:
        loss: The loss.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `Loss`."""
        with torch.autocast(model.device.type, torch.bfloat16):
            return self._loss(model, batch)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16 without emulating it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
