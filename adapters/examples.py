"""Questions and answers as token ids, rendered as serving renders them, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from guard.errors import ArtifactError, DataError

IGNORED: Final = -100
"""Label of the tokens that no loss is taken on."""

_MARK: Final = "The answer stands here."


@dataclass(frozen=True, slots=True)
class Example:
    """One question and its answer.

    Attributes:
        prompt: Tokens of the rendered chat up to where the assistant's turn opens.
        answer: Tokens of the answer, tokenised by itself, and the token that ends the turn.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples side by side, padded right, where causal attention never looks.

    Attributes:
        tokens: Prompt and answer, shape (rows, width).
        mask: 1 on tokens, 0 on padding, shape (rows, width).
        labels: The answers' tokens in their places, `IGNORED` elsewhere, shape (rows, width).
        indices: Which of the examples the rows are: a loss finds its own data of a row by it.
        step: The training step. With the seed it is all that a loss may draw random numbers from,
            so that a resumed training draws the same.
    """

    tokens: Tensor
    mask: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    step: int = 0

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            mask=self.mask.to(device),
            labels=self.labels.to(device),
        )


def encode_chats(
    tokenizer: Any, pairs: Sequence[tuple[str, str]], max_tokens: int = 1024
) -> list[Example]:
    """Render each question through the model's chat template, with its default system prompt.

    Args:
        tokenizer: A Hugging Face tokenizer with a chat template.
        pairs: Questions and answers.
        max_tokens: Longest example; longer answers are cut, and then don't end.

    Raises:
        ArtifactError: The tokenizer has no usable chat template.
        DataError: A question alone is too long, or an answer is empty.
    """
    end = end_of_turn(tokenizer)
    examples = []
    for number, (question, answer) in enumerate(pairs, start=1):
        prompt = _tokens(tokenizer, _render(tokenizer, {"role": "user", "content": question}))
        room = max_tokens - len(prompt)
        if room <= 0:
            raise DataError(f"question {number} has {len(prompt)} tokens; at most {max_tokens - 1}")
        ids = _tokens(tokenizer, answer)
        if not ids:
            raise DataError(f"the answer to question {number} is empty")
        examples.append(Example(tuple(prompt), tuple([*ids, end][:room])))
    return examples


def end_of_turn(tokenizer: Any) -> int:
    """Return the token that the chat template puts after an answer.

    It needn't be the tokenizer's end-of-sequence token: Gemma's turns end with another.

    Raises:
        ArtifactError: There is none, or no template.
    """
    turns = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK})
    after = _render(tokenizer, *turns, opened=False).rpartition(_MARK)[2]
    ids = _tokens(tokenizer, after)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    if ids and ids[0] in special:
        return ids[0]
    if tokenizer.eos_token_id is None:
        raise ArtifactError("neither chat template nor tokenizer say what token ends an answer")
    return int(tokenizer.eos_token_id)


def collate(examples: Sequence[Example], indices: Sequence[int], step: int = 0) -> Batch:
    """Put the examples at `indices` side by side.

    A loss that compares answers collates another list of examples by the same indices.
    """
    chosen = [examples[index] for index in indices]
    width = max(len(one.prompt) + len(one.answer) for one in chosen)
    tokens = torch.zeros(len(chosen), width, dtype=torch.long)
    mask = torch.zeros_like(tokens)
    labels = torch.full_like(tokens, IGNORED)
    for row, one in enumerate(chosen):
        start, stop = len(one.prompt), len(one.prompt) + len(one.answer)
        tokens[row, :stop] = torch.tensor([*one.prompt, *one.answer])
        labels[row, start:stop] = tokens[row, start:stop]
        mask[row, :stop] = 1
    return Batch(tokens, mask, labels, tuple(indices), step)


def _render(tokenizer: Any, *messages: dict[str, str], opened: bool = True) -> str:
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=opened
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"the model's chat template can't render a question: {error}"
        ) from error
    return text


def _tokens(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids
