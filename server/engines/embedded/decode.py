"""The decode loop: prefill once, then a token a step for every unfinished answer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

from server.engines.embedded.sampling import Row
from server.engines.embedded.steps import Step

PREFILL_CHUNK: Final = 512
"""Prompt tokens per forward pass; between two passes a cancelled request stops."""


class Cancelled(Exception):
    """The generation was given up by whoever asked for it."""


class Network:
    """A causal language model with its cache, as the decode loop needs it.

    Args:
        model: A transformers causal language model in evaluation mode.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters

    def new_cache(self) -> Any:
        """Return an empty cache of the kind that the model's layers need."""
        return DynamicCache(config=self.model.config)

    def forward(self, keep: int | Tensor, **inputs: Any) -> Tensor:
        """Run the model; return logits at the last `keep` positions, or at those in `keep`."""
        if self._last_only:
            logits: Tensor = self.model(**inputs, logits_to_keep=keep).logits
            return logits
        logits = self.model(**inputs).logits
        return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


@torch.inference_mode()
def decode(
    network: Network,
    prompts: Sequence[Tensor],
    rows: Sequence[Row],
    cancelled: Callable[[], bool] | None = None,
) -> Iterator[list[Step]]:
    """Generate until every row is finished.

    Args:
        network: The model.
        prompts: Input embeddings, each (tokens, hidden): one per row, or one that all rows share.
        rows: The answers to draw.
        cancelled: Asked before every step; True ends the generation.

    Yields:
        The steps of the unfinished rows.

    Raises:
        Cancelled: `cancelled` said so.
    """
    cache = network.new_cache()
    logits, mask = _prefill(network, cache, prompts, cancelled)
    if len(prompts) < len(rows):
        cache.batch_repeat_interleave(len(rows))
        logits = logits.expand(len(rows), -1)
    active = list(rows)
    while True:
        steps = [row.push(logits[i]) for i, row in enumerate(active)]
        yield steps
        going = [i for i, row in enumerate(active) if not row.finished]
        if not going:
            return
        if cancelled is not None and cancelled():
            raise Cancelled
        if len(going) < len(active):
            index = torch.tensor(going, device=logits.device)
            cache.batch_select_indices(index)
            mask = None if mask is None else mask[index]
            active = [active[i] for i in going]
        tokens = torch.tensor([[steps[i].token_id] for i in going], device=logits.device)
        logits, mask = _step(network, cache, tokens, mask)


def _prefill(
    network: Network,
    cache: Any,
    prompts: Sequence[Tensor],
    cancelled: Callable[[], bool] | None,
) -> tuple[Tensor, Tensor | None]:
    """Fill the cache; return the last position's logits (prompts, vocabulary) and the mask."""
    if len(prompts) == 1:
        return _prefill_one(network, cache, prompts[0], cancelled), None
    embeds, mask = pad_left(prompts)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = network.forward(
        1,
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
    )
    return logits[:, -1], mask


def _prefill_one(
    network: Network, cache: Any, prompt: Tensor, cancelled: Callable[[], bool] | None
) -> Tensor:
    for start in range(0, len(prompt), PREFILL_CHUNK):
        if cancelled is not None and cancelled():
            raise Cancelled
        chunk = prompt[None, start : start + PREFILL_CHUNK]
        logits = network.forward(1, inputs_embeds=chunk, past_key_values=cache, use_cache=True)
    return logits[:, -1]


def _step(
    network: Network, cache: Any, tokens: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    inputs: dict[str, Any] = {}
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        inputs = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
    logits = network.forward(1, input_ids=tokens, past_key_values=cache, use_cache=True, **inputs)
    return logits[:, -1], mask


def pad_left(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack embeddings to (prompts, longest, hidden), and say where they are real."""
    longest = max(len(prompt) for prompt in prompts)
    first = prompts[0]
    embeds = first.new_zeros(len(prompts), longest, first.shape[-1])
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=first.device)
    for i, prompt in enumerate(prompts):
        embeds[i, longest - len(prompt) :] = prompt
        mask[i, longest - len(prompt) :] = 1
    return embeds, mask
