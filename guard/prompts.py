"""What the served model reads: its tokenizer, chat template and input embeddings, without torch.

The guard replaces a flagged message's content by embeddings. Their rows must be those of the
tokens that the engine would have read, so the ids come from the tokenisation of the *rendered*
prompt: tokenizers treat the same text differently at the start of a string and inside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream

from guard.chat_template import PART_SEPARATOR, ChatTemplate, content_parts
from guard.embedding_table import EmbeddingTable, text_config
from guard.embeds import EmbedsDtype
from guard.errors import (
    ArtifactError,
    CannotCorruptError,
    IncompatibleArtifactError,
    RequestError,
)
from guard.model_files import find_model, read_config, read_tokenizer, sha256_of
from guard.types import FloatArray

PLACEHOLDER: Final = "<prompt_embeds>"
"""The token that vLLM puts in an embeddings part's place while it renders and tokenises."""

_FINGERPRINT_ROWS: Final = 256


@dataclass(frozen=True, slots=True)
class ModelFingerprint:
    """What tells one model from another, as far as the guard depends on it."""

    model_type: str
    hidden_size: int
    vocab_size: int
    tokenizer_sha256: str
    template_sha256: str
    embeddings_sha256: str
    embed_scale: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelFingerprint:
        """Read what `to_dict` gave.

        Raises:
            ArtifactError: Fields are missing or unknown.
        """
        names = {field.name for field in fields(cls)}
        if set(data) != names:
            raise ArtifactError(
                f"a model fingerprint has the fields {sorted(names)}; got {sorted(data)}"
            )
        return cls(**data)


@dataclass(frozen=True, slots=True)
class ContentTokens:
    """The tokens of one message's content, or of one prompt.

    Attributes:
        ids: Token ids.
        offsets: Characters of each token, (start, end) in code points of the text. A token that
            spells no text (a beginning-of-sequence mark) has an empty span.
        exact: True if the prompt with these tokens in an embeddings part has exactly the tokens of
            the text prompt. False where the tokenizer merges characters across the border (a
            content that begins with a line end, say): then the prompt keeps its length where white
            space can be dropped for it, or else border characters come twice.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]
    exact: bool = True


class ModelPrompts:
    """Renders, tokenises and embeds prompts as the served model does.

    Args:
        tokenizer: The model's tokenizer.
        template: Its chat template.
        table: Its input embeddings.
        config: Its language model's config.
        tokenizer_sha256: Hash of what the tokenizer does.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        table: EmbeddingTable,
        config: Mapping[str, Any],
        tokenizer_sha256: str,
    ) -> None:
        self._tokenizer, self._template, self._table = tokenizer, template, table
        self._config, self._tokenizer_sha256 = dict(config), tokenizer_sha256
        tokenizer.add_special_tokens([AddedToken(PLACEHOLDER, special=True, normalized=False)])
        self._placeholder_id: int = tokenizer.encode(PLACEHOLDER, add_special_tokens=False).ids[0]

    @classmethod
    def load(cls, model: str | Path) -> ModelPrompts:
        """Read a model's files.

        Args:
            model: A model directory, or the id of a model on the Hugging Face hub.

        Raises:
            ArtifactError: Files are missing or can't be read.
            IncompatibleArtifactError: The model can't be guarded by embeddings.
        """
        directory, fetch = find_model(model)
        config = text_config(read_config(directory))
        tokenizer, digest = read_tokenizer(directory)
        table = EmbeddingTable(directory, config, fetch)
        if tokenizer.get_vocab_size(with_added_tokens=False) > table.rows:
            raise IncompatibleArtifactError(
                f"the tokenizer of {directory} has {tokenizer.get_vocab_size()} tokens, but the "
                f"embedding table only {table.rows} rows; they belong to different models"
            )
        return cls(tokenizer, ChatTemplate.load(directory), table, config, digest)

    def give_back(self) -> None:
        """Let go of the memory that reading the embeddings has taken; see `EmbeddingTable`."""
        self._table.give_back()

    # --- What the model is ---------------------------------------------------------------------

    @cached_property
    def fingerprint(self) -> ModelFingerprint:
        """Identify the model; the embeddings by rows spread over the table."""
        sample = self._table.sample(_FINGERPRINT_ROWS)
        templates = json.dumps(self._template.sources, sort_keys=True)
        return ModelFingerprint(
            model_type=str(self._config.get("model_type")),
            hidden_size=self._table.hidden,
            vocab_size=self._table.rows,
            tokenizer_sha256=self._tokenizer_sha256,
            template_sha256=sha256_of(templates.encode()),
            embeddings_sha256=sha256_of(sample.astype("<f4").tobytes()),
            embed_scale=self._table.scale,
        )

    @property
    def table_dtype(self) -> EmbedsDtype:
        """The dtype of the embedding table: in it, clean rows are sent without rounding."""
        return self._table.dtype

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return self._table.hidden

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the model's input embeddings (scaled), over sampled rows."""
        return self._table.rms

    # --- Text to tokens ------------------------------------------------------------------------

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Render messages through the chat template; see `ChatTemplate.render`.

        Raises:
            RequestError: There is no template, or it refuses the messages.
        """
        return self._template.render(
            messages, tools, add_generation_prompt=add_generation_prompt, **kwargs
        )

    def content_tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        index: int,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> ContentTokens:
        """Find the tokens of one message's content in the rendered prompt.

        Args:
            messages: The conversation.
            index: Which message.
            tools: Tool definitions of the request.
            **kwargs: Further arguments of `render`.

        Returns:
            The tokens; offsets count in the message's text (parts joined by a newline). Empty if
            the content is, or if the template trims it to nothing.

        Raises:
            CannotCorruptError: The template drops, doubles or alters the content.
        """
        place = f"messages/{index}/content"
        try:
            parts = content_parts(messages[index])
            marked = self.render(_with_placeholder(messages, index), tools, **kwargs)
            whole = self.render(messages, tools, **kwargs)
        except RequestError as error:
            raise CannotCorruptError(place, str(error)) from error
        start, stop = _content_place(marked, whole, place)
        where = _align(whole[start:stop], parts)
        if where is None:
            raise CannotCorruptError(place, "the chat template alters the content")
        return self._tokens_between(whole, start, stop, marked, where)

    def _tokens_between(
        self, whole: str, start: int, stop: int, marked: str, where: Sequence[int]
    ) -> ContentTokens:
        """Take the tokens of `whole` that overlap [start, stop)."""
        if start == stop:
            return ContentTokens([], [])
        encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        around = self._tokenizer.encode(marked, add_special_tokens=False).ids
        at = around.index(self._placeholder_id)
        inside = _inside(offsets, start, stop)
        if around[:at] + ids[inside] + around[at + 1 :] != ids:
            wanted = len(ids) - (len(around) - 1)
            inside = _settle_border(whole, offsets, inside, (start, stop), wanted)
        places = [_place(span, start, stop, where) for span in offsets[inside]]
        exact = around[:at] + ids[inside] + around[at + 1 :] == ids
        return ContentTokens(ids[inside], places, exact)

    def prompt_tokens(
        self, text: str | Sequence[int], add_special_tokens: bool = True
    ) -> ContentTokens:
        """Tokenise a prompt of `/v1/completions`; token ids are taken as they are.

        Args:
            text: The prompt, as text or token ids.
            add_special_tokens: Add what the tokenizer adds to a text by default, e.g. BOS.

        Returns:
            The tokens; for ids, offsets count in `decode(ids)`.

        Raises:
            RequestError: A token id is outside of the vocabulary.
        """
        if isinstance(text, str):
            encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
            return ContentTokens(encoding.ids, encoding.offsets)
        ids = list(text)
        self._check_ids(ids)
        return ContentTokens(ids, self._offsets_of(ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, special tokens included.

        Raises:
            RequestError: A token id is outside of the vocabulary.
        """
        self._check_ids(ids)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def embed(self, ids: Sequence[int]) -> FloatArray:
        """Look up the model's input embeddings, family scaling applied, shape (tokens, hidden).

        Raises:
            ShapeError: An id is outside of the table.
        """
        return self._table.rows_of(ids)

    def _check_ids(self, ids: Sequence[int]) -> None:
        wrong = next((i for i in ids if not 0 <= i < self._table.rows), None)
        if wrong is not None:
            raise RequestError(
                f"token id {wrong} is outside of the vocabulary (0..{self._table.rows - 1})",
                param="prompt",
            )

    def _offsets_of(self, ids: list[int]) -> list[tuple[int, int]]:
        """Return which characters of `decode(ids)` each token spells.

        Tokens that share a character (an emoji's bytes) get that character. Where the text can't
        be followed token by token, every token gets the whole text: too much is corrupted then,
        never too little.
        """
        stream = DecodeStream(skip_special_tokens=False)
        offsets: list[tuple[int, int]] = []
        done = waiting = 0
        pieces = []
        for token in ids:
            waiting += 1
            piece = stream.step(self._tokenizer, token)
            if piece is not None:
                offsets += [(done, done + len(piece))] * waiting
                done, waiting = done + len(piece), 0
                pieces.append(piece)
        whole = self._tokenizer.decode(ids, skip_special_tokens=False)
        if waiting or "".join(pieces) != whole:
            return [(0, len(whole))] * len(ids)
        return offsets


# --- Finding a content in a rendered prompt --------------------------------------------------


def _with_placeholder(messages: Sequence[Mapping[str, Any]], index: int) -> list[Mapping[str, Any]]:
    replaced = list(messages)
    replaced[index] = {**messages[index], "content": PLACEHOLDER}
    return replaced


def _content_place(marked: str, whole: str, place: str) -> tuple[int, int]:
    """Return where the content stands in `whole`, by what surrounds the placeholder."""
    if marked.count(PLACEHOLDER) != 1:
        raise CannotCorruptError(
            place,
            f"the rendered prompt has {marked.count(PLACEHOLDER)} places for an embeddings part; "
            f"the chat template must keep the content once, and no text may hold {PLACEHOLDER!r}",
        )
    before, _, after = marked.partition(PLACEHOLDER)
    fits = whole.startswith(before) and whole.endswith(after)
    if not fits or len(whole) < len(before) + len(after):
        raise CannotCorruptError(
            place, "the chat template renders differently around an embeddings part"
        )
    return len(before), len(whole) - len(after)


def _inside(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> slice:
    """Return which tokens overlap the characters [start, stop); none where no token does."""
    first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(offsets))
    backwards = reversed(range(len(offsets)))
    last = next((i for i in backwards if offsets[i][0] < stop), -1)
    return slice(first, max(first, last + 1))


def _settle_border(
    whole: str,
    offsets: Sequence[tuple[int, int]],
    inside: slice,
    content: tuple[int, int],
    wanted: int,
) -> slice:
    """Drop tokens of white space that reach across the border if that keeps the prompt's length.

    A prompt that is longer or shorter than its text would show in the answer's usage.
    """
    first, last = inside.start, inside.stop
    start, stop = content
    while last - first > wanted:
        begin, end = offsets[first]
        if begin < start and whole[start:end].isspace():
            first, start = first + 1, end
        elif offsets[last - 1][1] > stop and whole[offsets[last - 1][0] : stop].isspace():
            last, stop = last - 1, offsets[last - 1][0]
        else:
            return inside
    return slice(first, last)


def _place(span: tuple[int, int], start: int, stop: int, where: Sequence[int]) -> tuple[int, int]:
    """Return a token's characters in the original text, from its characters in the prompt."""
    begin, end = max(span[0], start), min(span[1], stop)
    if end <= begin:
        at = where[min(begin, stop - 1) - start]
        return at, at
    return where[begin - start], where[end - start - 1] + 1


def _align(body: str, parts: Sequence[str]) -> list[int] | range | None:
    """Return, for each character of `body`, its place in the parts joined by a newline.

    None if the template did more than trim the text, or its parts, or leave the newlines out.
    """
    joined = PART_SEPARATOR.join(parts)
    shift = _trimmed(body, joined)
    if shift is not None:
        return range(shift, shift + len(body))
    for trim in (False, True):
        places = _places_of(parts, trim)
        shift = _trimmed(body, "".join(joined[place] for place in places))
        if shift is not None:
            return places[shift : shift + len(body)]
    return None


def _places_of(parts: Sequence[str], trim: bool) -> list[int]:
    """Return where each part's characters stand in the parts joined by a newline."""
    places: list[int] = []
    at = 0
    for part in parts:
        lead = len(part) - len(part.lstrip()) if trim else 0
        kept = len(part.strip()) if trim else len(part)
        places += range(at + lead, at + lead + kept)
        at += len(part) + len(PART_SEPARATOR)
    return places


def _trimmed(body: str, text: str) -> int | None:
    """Return where `body` begins in `text` if it is a part of it, as trimming leaves it."""
    lead = len(text) - len(text.lstrip())
    for start in (0, lead):
        if text.startswith(body, start):
            return start
    return text.find(body) if text.count(body) == 1 else None
