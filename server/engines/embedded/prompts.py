"""Prompts into input embeddings, as vLLM does it: text and embeddings side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from guard.chat_template import PART_SEPARATOR, walks_parts
from guard.errors import RequestError
from guard.types import EmbedsPart, FloatArray, Prompt

PLACEHOLDER: Final = "<prompt_embeds>"
"""Stands for embeddings while a template is rendered; the name is vLLM's, and reserved there."""

EMBEDDED: Final = -1
"""Stands in `EncodedPrompt.ids` where the prompt has an embedding instead of a token."""


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt as the model takes it.

    Attributes:
        ids: Its tokens; `EMBEDDED` where there is none.
        embeds: Input embeddings, shape (tokens, hidden).
    """

    ids: list[int]
    embeds: Tensor


class PromptEncoder:
    """Renders, tokenises and embeds prompts.

    Args:
        tokenizer: A Hugging Face tokenizer. A reserved token is added to it, which splits the
            text around embeddings; it is refused wherever a client sends it.
        embed: The model's own embedding function, tokens (n,) to (n, hidden).
        hidden: Width of the embeddings.
        vocabulary: Rows of the embedding table.
    """

    def __init__(
        self, tokenizer: Any, embed: Callable[[Tensor], Tensor], hidden: int, vocabulary: int
    ) -> None:
        from tokenizers import AddedToken

        self.tokenizer, self._embed = tokenizer, embed
        self.hidden, self.vocabulary = hidden, vocabulary
        token = AddedToken(PLACEHOLDER, special=True, normalized=False)
        tokenizer.add_tokens([token], special_tokens=True)
        self._placeholder: int = tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        # The first call may switch off padding that the tokenizer's file asks for; later ones
        # change nothing, so that several threads may tokenise at once.
        tokenizer.encode(PLACEHOLDER)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        embeds: Sequence[FloatArray] = (),
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> EncodedPrompt:
        """Render messages through the chat template; each placeholder takes the next embeddings.

        Raises:
            RequestError: The template refuses the messages, or drops or doubles an embeddings part.
        """
        return self.splice(self._tokenise(self.render(messages, tools, options)), embeds)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> str:
        """Render messages through the model's chat template.

        Contents are text or text parts; the template gets what vLLM would give it.

        Raises:
            RequestError: The model has no template, or its template refuses the messages.
        """
        import jinja2

        try:
            source = self.tokenizer.get_chat_template(tools=list(tools) if tools else None)
            walks = walks_parts(source)
            text: str = self.tokenizer.apply_chat_template(
                [_cleaned(message, walks) for message in messages],
                tools=list(tools) if tools else None,
                tokenize=False,
                **{"add_generation_prompt": True, **(options or {})},
            )
        except (jinja2.TemplateError, ValueError, TypeError) as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from None
        return text

    def prompt(self, prompt: Prompt) -> EncodedPrompt:
        """Encode what learners and benchmarks call a prompt."""
        messages, embeds = [], []
        for message in prompt:
            content = message.content
            if isinstance(content, EmbedsPart):
                embeds.append(content.embeddings)
                content = PLACEHOLDER
            messages.append({"role": message.role, "content": content})
        return self.chat(messages, embeds)

    def text(self, text: str, add_special_tokens: bool = True) -> EncodedPrompt:
        """Encode raw text, without a template."""
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return self.splice(ids, ())

    def tokens(self, ids: Sequence[int]) -> EncodedPrompt:
        """Encode tokens.

        Raises:
            RequestError: An id is outside of the vocabulary.
        """
        wrong = next((i for i in ids if not 0 <= i < self.vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is out of vocabulary; allowed are 0 to {self.vocabulary - 1}",
                param="prompt",
            )
        return self.splice(list(ids), ())

    def embeddings(self, embeds: FloatArray) -> EncodedPrompt:
        """Take embeddings for the whole prompt."""
        return self.splice([self._placeholder], [embeds])

    def splice(self, ids: list[int], embeds: Sequence[FloatArray]) -> EncodedPrompt:
        """Put the embeddings in the places of the placeholder tokens.

        Raises:
            RequestError: There are more or fewer places than embeddings, or the width is wrong.
        """
        places = [i for i, token in enumerate(ids) if token == self._placeholder]
        if len(places) != len(embeds):
            raise RequestError(
                f"the rendered prompt has {len(places)} places for {len(embeds)} embeddings parts; "
                "the model's chat template must keep each once, and text must not contain "
                f"{PLACEHOLDER!r}",
                param="messages",
            )
        for array in embeds:
            self._check(array)
        known = [0 if token == self._placeholder else token for token in ids]
        table = self._embed(torch.tensor(known, dtype=torch.long))
        return _join(ids, table, places, embeds)

    def _tokenise(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _check(self, array: FloatArray) -> None:
        if array.ndim != 2 or array.shape[1] != self.hidden or not len(array):
            raise RequestError(
                f"prompt_embeds has shape {tuple(array.shape)}; it must be (tokens, {self.hidden})",
                param="prompt_embeds",
            )


def _cleaned(message: Mapping[str, Any], walks: bool) -> dict[str, Any]:
    """Return a message whose content is parts if the template walks them, else one text."""
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    parts = list(content or ())
    if walks and message.get("role") != "tool":
        return {**message, "content": parts}
    return {**message, "content": PART_SEPARATOR.join(part["text"] for part in parts)}


def _join(
    ids: Sequence[int], table: Tensor, places: Sequence[int], embeds: Sequence[FloatArray]
) -> EncodedPrompt:
    spliced: list[int] = []
    pieces: list[Tensor] = []
    start = 0
    for place, array in zip(places, embeds, strict=True):
        spliced += [*ids[start:place], *[EMBEDDED] * len(array)]
        pieces += [table[start:place], torch.tensor(array, dtype=table.dtype, device=table.device)]
        start = place + 1
    spliced += ids[start:]
    pieces.append(table[start:])
    return EncodedPrompt(spliced, torch.cat(pieces))
