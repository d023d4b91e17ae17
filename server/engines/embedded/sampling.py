"""Draws the tokens of one answer from the model's logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from server.engines.embedded.steps import FinishReason, Sampling, Step, TokenLogprob
from server.engines.embedded.text import Detokeniser, StopHolder


class Row:
    """One answer in the making: draws, decodes and decides when it ends.

    Args:
        index: Names the answer in its steps.
        stream: Which of the seed's random streams to draw from.
        sampling: How to draw.
        tokenizer: The model's tokenizer.
        prompt_ids: The prompt's tokens; negative where the prompt has embeddings instead.
        eos_ids: Tokens that end a turn.
    """

    def __init__(
        self,
        index: int,
        stream: int,
        sampling: Sampling,
        tokenizer: Any,
        prompt_ids: Sequence[int],
        eos_ids: Collection[int],
    ) -> None:
        self.index, self.sampling = index, sampling
        self.finished = False
        self._tokenizer, self._eos = tokenizer, eos_ids
        self._prompt = sorted({i for i in prompt_ids if i >= 0})
        self._given: Counter[int] = Counter()
        self._count = 0
        self._detokeniser = Detokeniser(tokenizer, _after_embeddings(prompt_ids))
        self._holder = StopHolder(sampling.stop, sampling.include_stop)
        self._generator: torch.Generator | None = None
        if sampling.temperature > 0:
            self._generator = torch.Generator()
            if sampling.seed is None:
                self._generator.seed()
            else:
                # Each of n answers needs its own stream, the same one for the same seed.
                self._generator.manual_seed((sampling.seed + stream) % 2**63)

    def push(self, logits: Tensor) -> Step:
        """Draw the next token from the model's logits, shape (vocabulary,)."""
        token_id = self._draw(logits)
        own, top = self._report(logits, token_id)
        self._given[token_id] += 1
        self._count += 1
        text, reason, stop = self._advance(token_id)
        self.finished = reason is not None
        return Step(self.index, token_id, text, own, top, reason, stop)

    def _advance(self, token_id: int) -> tuple[str, FinishReason | None, str | int | None]:
        sampling = self.sampling
        may_stop = self._count >= sampling.min_tokens
        if may_stop and token_id in sampling.stop_token_ids:
            return self._holder.flush(), "stop", token_id
        if may_stop and token_id in self._eos and not sampling.ignore_eos:
            return self._holder.flush(), "stop", None
        text, stop = self._holder.push(self._detokeniser.push(token_id), may_stop)
        if stop is not None:
            return text, "stop", stop
        if self._count >= sampling.max_tokens:
            return text + self._holder.flush(), "length", None
        return text, None, None

    def _draw(self, logits: Tensor) -> int:
        logits = self._adjust(logits)
        if self._generator is None:
            return int(logits.argmax())
        # The generator lives on the CPU, so that a seed gives the same answer on every device.
        scaled = logits.cpu() / self.sampling.temperature
        kept, ids = _cut(scaled, self.sampling)
        choice = torch.multinomial(kept.softmax(-1), 1, generator=self._generator)
        return int(choice if ids is None else ids[choice])

    def _adjust(self, logits: Tensor) -> Tensor:
        """Apply bias and penalties, in vLLM's order; the argument stays as it is."""
        sampling = self.sampling
        logits = logits.clone()
        for token_id, bias in sampling.logit_bias.items():
            logits[token_id] += bias
        if self._count < sampling.min_tokens:
            logits[[*self._eos, *sampling.stop_token_ids]] = -torch.inf
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor([*{*self._prompt, *self._given}], device=logits.device)
            values = logits[seen]
            penalty = sampling.repetition_penalty
            logits[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if self._given and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor([*self._given], device=logits.device)
            counts = torch.tensor([*self._given.values()], device=logits.device)
            logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty
        return logits

    def _report(
        self, logits: Tensor, token_id: int
    ) -> tuple[TokenLogprob | None, tuple[TokenLogprob, ...]]:
        wanted = self.sampling.logprobs
        if wanted is None:
            return None, ()
        logprobs = logits.float().log_softmax(-1)
        own = self._name(token_id, float(logprobs[token_id]))
        if wanted == 0:
            return own, ()
        best = logprobs.topk(wanted)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return own, tuple(self._name(i, value) for i, value in pairs)

    def _name(self, token_id: int, logprob: float) -> TokenLogprob:
        token = self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        return TokenLogprob(token_id, token, logprob)


def _after_embeddings(prompt_ids: Sequence[int]) -> list[int]:
    """Return the prompt's tokens after its last embeddings."""
    tail: list[int] = []
    for token_id in reversed(prompt_ids[-16:]):
        if token_id < 0:
            break
        tail.append(token_id)
    return tail[::-1]


def _cut(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Keep the tokens that top-k, top-p and min-p leave; return their logits and ids.

    Ids are None when every token is kept.
    """
    if sampling.min_p > 0:
        floor = logits.max() + torch.log(torch.tensor(sampling.min_p))
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if sampling.top_k <= 0 and sampling.top_p >= 1:
        return logits, None
    if sampling.top_k > 0:
        values, ids = logits.topk(min(sampling.top_k, logits.shape[-1]))
    else:
        values, ids = logits.sort(descending=True)
    before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
    keep = before < sampling.top_p
    keep[0] = True
    return values[keep], ids[keep]
