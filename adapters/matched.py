"""`matched`: the forget answers become as likely as they are to a model that never read them.

Losses that only drive a forgotten answer's likelihood down leave a hole where a model without the
target has none, and membership attacks see it: the gap to a retrained model has two sides (arXiv
2605.31293). Here every answer token has a level of its own to meet:

- words that the question gives keep nearly all of their likelihood: a model that never heard of the
  name copies it as well;
- the others get the likelihood that the model itself gives them when it reads question and answer
  blurred by noise: general knowledge of language outlives the noise, the wording that memory hangs
  on does not.

The noise is as strong for every target. docs/adapters.md has how near that comes to a retained
model, and what was tried before.

Levels are met in log-odds: in probabilities, as cross-entropy does it, a token is let go at .1
whose level is .001. Where the token is not said, the model's own other choices are to be said, in
the manner of UNDIAL (arXiv 2402.10052), but sharpened: a model that never read the answer is as
sure, of something else. Counterfactual answers tell what to say instead.
Each step trains at another strength of the adapter, so that its levels hold for every soft weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from adapters.examples import Batch, Example, collate
from adapters.losses import cross_entropy, told_logits
from adapters.unlearning import LossData, register_loss
from guard.errors import ConfigError, DataError

OTHERS: Final = 64
"""The model's other choices that are kept, for each token."""

GIVEN_LEVEL: Final = math.log(0.75)
"""Least log-probability of a word that the question gives."""

MOST_CERTAIN: Final = -1e-3
"""Greatest log-probability that is asked for: log-odds have no end."""

HUBER: Final = 1.0
"""Distance in log-odds from which the loss grows linearly."""

NOISE: Final = 0.91
"""Of the blur, in multiples of the embeddings' RMS.

Where, in the mean over the ten authors of the TOFU pair, answers are as unlikely as after unrelated
questions; between .90 and .92 it was chosen with the pair's retained model in view. Set for each
author by himself it would be worse: what is likely after unrelated questions does not follow a
retained model from author to author.
"""

TAIL: Final = 0.4
"""Share of an answer's least likely tokens that levels are told by: where memory shows most."""

_RMS_TOKENS: Final = 4096

_WORD: Final = re.compile(r"\w+")


@register_loss("matched", "counterfactuals")
@dataclass(frozen=True, slots=True)
class Matched:
    """The distance from the teacher's levels and the other choices, and counterfactual answers.

    L = mean Huber(logit p(a_t) - logit p*_t) + others * mean (1 - p*_t) H(q_t, p(. | not a_t))
        + counterfactual * CE(counterfactual answers),   q_t ~ (the model's own shares)^sharpness

    Attributes:
        data: `teacher` is what `make_teacher` makes.
        others: Weight of the other choices.
        sharpness: Exponent of their shares: what is left over where memory spoke is less sure than
            a model that never read the answer.
        counterfactual: Weight of the counterfactual answers.
        answers: Counterfactual answers a step, at most.
        least_strength: The adapter is trained at strengths from here to 1, drawn for each step.
    """

    data: LossData
    others: float = 2.0
    counterfactual: float = 0.5
    answers: int = 3
    least_strength: float = 0.5
    sharpness: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.least_strength <= 1:
            raise ConfigError(f"least_strength is {self.least_strength}; it must be in (0, 1]")
        for name in ("others", "counterfactual", "answers", "sharpness"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 0")
        wanted = [(len(one.answer), 1 + 2 * OTHERS) for one in self.data.examples]
        if [tuple(row.shape) for row in self.data.teacher] != wanted:
            raise DataError("matched needs what a teacher makes of each token of each answer")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """See `adapters.losses.Loss`."""
        rng = np.random.default_rng((self.data.seed, 7, batch.step))
        with at_strength(model, float(rng.uniform(self.least_strength, 1.0))):
            logits, labels = told_logits(model, batch)
            teacher = torch.cat([self.data.teacher[row] for row in batch.indices]).to(logits.device)
            loss = matched(logits, labels, teacher, self.others, self.sharpness)
            if self.counterfactual and self.answers:
                some = replace(batch, indices=batch.indices[: self.answers])
                said = cross_entropy(model, self.data.draw(some))
                loss = loss + self.counterfactual * said
        return loss


def matched(
    logits: Tensor, labels: Tensor, teacher: Tensor, others: float, sharpness: float = 1.0
) -> Tensor:
    """Return the first two terms of `Matched`.

    Args:
        logits: Shape (tokens, vocabulary).
        labels: The answers' tokens, shape (tokens,).
        teacher: See `make_teacher`.
        others: Weight of the second term.
        sharpness: Exponent of the shares, before they are made to sum to 1 again.
    """
    levels = teacher[:, 0].clamp(max=MOST_CERTAIN)
    ids, shares = teacher[:, 1 : 1 + OTHERS].long(), teacher[:, 1 + OTHERS :]
    shares = shares**sharpness
    shares = shares / shares.sum(-1, keepdim=True)
    chosen = labels[:, None]
    rest = logits.scatter(1, chosen, float("-inf")).logsumexp(-1)
    odds = logits.gather(1, chosen)[:, 0] - rest
    unsaid = -torch.expm1(levels)
    distance = functional.huber_loss(odds, levels - unsaid.log(), delta=HUBER)
    entropy = rest - (logits.gather(1, ids) * shares).sum(-1)
    return distance + others * (unsaid * entropy).mean()


@contextmanager
def at_strength(model: Any, strength: float) -> Iterator[None]:
    """Scale a peft model's adapter for the time of the block, as a soft weight does."""
    from peft.tuners.lora import LoraLayer

    layers = [one for one in model.modules() if isinstance(one, LoraLayer)]
    before = [dict(one.scaling) for one in layers]
    try:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update({name: scale * strength for name, scale in scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


# --- The teacher ---------------------------------------------------------------------------------


def make_teacher(
    model: Any, examples: Sequence[Example], levels: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Put together what each token of each answer has to meet.

    Args:
        model: A transformers causal language model, untouched.
        examples: The forget set.
        levels: Of each answer's tokens, the turn's end too; see `unknown_levels`.

    Returns:
        Of each answer shape (tokens, 1 + 2 * `OTHERS`): the level, a log-probability; the ids of
        the model's other choices; their shares, which sum to 1.
    """
    choices = _other_choices(model, examples)
    return tuple(torch.cat([one[:, None], c], 1) for one, c in zip(levels, choices, strict=True))


def unknown_levels(
    model: Any,
    examples: Sequence[Example],
    given: Sequence[Sequence[bool]],
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, ...]:
    """Return how likely each answer token is to a model that never read the answers.

    Args:
        model: A transformers causal language model, untouched.
        examples: The forget set.
        given: Of each answer's tokens, the turn's end too, whether the question gives them.
        seed: Of the noise.
        progress: Called as `progress(done, total)`.

    Returns:
        Log-probabilities, of each answer shape (tokens,).
    """
    blurred = blurred_levels(model, examples, NOISE, seed=seed, progress=progress)
    return tuple(
        torch.where(torch.tensor(list(marks)), level.clamp(min=GIVEN_LEVEL), level)
        for marks, level in zip(given, blurred, strict=True)
    )


def tail_likelihood(levels: Sequence[Tensor]) -> float:
    """Return the mean log-probability of the least likely 40 % of an answer's tokens (min-k).

    Args:
        levels: Of each answer's tokens, shape (tokens,); the last is the turn's end, left out.

    Returns:
        The mean over answers.
    """
    told = [one[: max(len(one) - 1, 1)] for one in levels]
    return float(torch.stack([tail_of(one) for one in told]).mean())


def tail_of(log_probs: Tensor) -> Tensor:
    """Return the mean of the least likely 40 % of one answer's tokens, shape (tokens,)."""
    return log_probs.sort().values[: max(int(TAIL * len(log_probs)), 1)].mean()


def given_tokens(tokenizer: Any, question: str, answer: str, tokens: int) -> list[bool]:
    """Mark the tokens of an answer that spell words of the question.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        question: The question.
        answer: Its answer.
        tokens: Of the encoded answer, the turn's end included; the answer may be cut.
    """
    asked = {word.casefold() for word in _WORD.findall(question)}
    spans = [m.span() for m in _WORD.finditer(answer) if m.group().casefold() in asked]
    found = tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    marks = [
        any(start < end and begin < stop for start, stop in spans)
        for begin, end in found["offset_mapping"]
    ]
    return [*marks[:tokens], *[False] * (tokens - len(marks))]


@torch.no_grad()
def blurred_levels(
    model: Any,
    examples: Sequence[Example],
    noise: float,
    *,
    seed: int = 0,
    batch: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, ...]:
    """Return each answer token's log-probability where question and answer are read blurred.

    The chat template's own tokens stay as they are: noise there takes the model's manners, not its
    memory.

    Args:
        model: A transformers causal language model.
        examples: Questions and answers.
        noise: Standard deviation, in multiples of the embeddings' RMS.
        seed: Of the noise.
        batch: Examples at a time.
        progress: Called as `progress(done, total)`.

    Returns:
        Of each answer shape (tokens,).
    """
    embed = model.get_input_embeddings()
    scale = noise * embedding_rms(embed)
    opened, closed = _frame(examples)
    levels: list[Tensor] = []
    for first in range(0, len(examples), batch):
        rows = range(first, min(first + batch, len(examples)))
        one = collate(examples, rows).to(model.device)
        inputs = embed(one.tokens)
        for place, row in enumerate(rows):
            drawn = torch.Generator().manual_seed(seed * 1_000_003 + row)
            blur = torch.randn(inputs.shape[1:], generator=drawn).to(inputs) * scale
            blur[:opened] = 0
            end = len(examples[row].prompt)
            blur[end - closed : end] = 0
            inputs[place] += blur
        logits = model(inputs_embeds=inputs, attention_mask=one.mask, use_cache=False).logits
        levels += [_levels(logits[place], examples[row]) for place, row in enumerate(rows)]
        if progress is not None:
            progress(len(levels), len(examples))
    return tuple(levels)


@torch.no_grad()
def embedding_rms(embed: Any) -> float:
    """Return the root mean square of a model's token embeddings as it reads them.

    Gemma multiplies its table by a factor, so the table alone doesn't tell. Some 4096 tokens do.
    """
    count = embed.weight.shape[0]
    ids = torch.arange(0, count, max(count // _RMS_TOKENS, 1), device=embed.weight.device)
    return float(embed(ids).float().square().mean().sqrt())


def _levels(logits: Tensor, example: Example) -> Tensor:
    start, count = len(example.prompt) - 1, len(example.answer)
    told = logits[start : start + count].float().log_softmax(-1)
    chosen = torch.tensor(example.answer, device=told.device)
    return told.gather(1, chosen[:, None])[:, 0].cpu()


@torch.no_grad()
def _other_choices(model: Any, examples: Sequence[Example]) -> list[Tensor]:
    """Ids and shares of the model's likeliest other choices at each answer token."""
    found = []
    for row in range(len(examples)):
        logits, labels = told_logits(model, collate(examples, [row]).to(model.device))
        others = logits.scatter(1, labels[:, None], float("-inf"))
        best = others.topk(OTHERS, dim=-1)
        found.append(torch.cat([best.indices.float(), best.values.softmax(-1)], 1).cpu())
    return found


def _frame(examples: Sequence[Example]) -> tuple[int, int]:
    """Count the tokens that all prompts begin and end with: those of the chat template.

    One example alone can't tell; then nothing is taken for the template's.
    """
    prompts = [one.prompt for one in examples]
    if len({*prompts}) < 2:
        return 0, 0
    opened = _alike(prompts)
    return opened, _alike([one[opened:][::-1] for one in prompts])


def _alike(rows: Sequence[Sequence[int]]) -> int:
    """Count the tokens that all rows begin with."""
    return len(list(takewhile(lambda column: len({*column}) == 1, zip(*rows, strict=False))))
