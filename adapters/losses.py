"""Losses of adapter training: functions of the adapted model and a batch."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from adapters.examples import IGNORED, Batch


class Loss(Protocol):
    """What training makes small.

    The model is a peft model: inside `with model.disable_adapter():` it is the untouched base, for
    losses that compare with it (under `torch.no_grad()`).
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
