"""What goes into a generation and what comes out of it, a token at a time. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from guard.types import SamplingParams

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw tokens; names and meaning are those of the OpenAI API and vLLM.

    Attributes:
        max_tokens: New tokens at most.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps all.
        top_k: Most likely tokens to keep; 0 or -1 keeps all.
        min_p: Least probability relative to the likeliest token; 0 keeps all.
        stop: Strings that end the answer.
        stop_token_ids: Tokens that end the answer.
        include_stop: Whether the stop string stays in the answer.
        ignore_eos: Whether to go on after the end-of-turn token.
        min_tokens: Tokens before which nothing ends the answer.
        seed: Seed of the sampler; None draws one.
        presence_penalty: Subtracted once from the logit of every token given before.
        frequency_penalty: Subtracted for every time that a token was given before.
        repetition_penalty: Divides positive and multiplies negative logits of tokens seen before,
            prompt included; 1 changes nothing.
        logit_bias: Added to logits, by token id.
        logprobs: Alternatives to report per token; 0 reports the drawn token only, None nothing.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    @classmethod
    def from_params(cls, params: SamplingParams) -> Sampling:
        """Take over what learners and benchmarks ask for."""
        return cls(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            stop=params.stop,
            seed=params.seed,
            logprobs=params.logprobs,
        )


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and its natural-log probability under the model, before any penalty or cut."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Step:
    """One drawn token of one answer.

    Attributes:
        row: Index of the answer.
        token_id: The token.
        text: Text that became final with it; may be empty, or hold text of earlier tokens.
        logprob: The token's own probability, if asked for.
        top: The likeliest alternatives, best first, if asked for.
        finish_reason: Why the answer ends with this token; None while it goes on.
        stop_reason: The stop string or token that ended it, if one of the request's did.
    """

    row: int
    token_id: int
    text: str
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
