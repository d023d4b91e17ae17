"""Texts with labels for evaluation: JSON lines in, examples with their groups out, samples of them.

A row's text stands in `text`, `prompt`, `question`, `paraphrased_question` or `messages`, or in the
field that `FILE:FIELD` names. Its other keys (`category`, `kind`, `type`, `lang`, …) make groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from guard.errors import DataError, RequestError
from guard.request import ParsedRequest, parse_request

FIELDS: Final = ("text", "prompt", "question", "paraphrased_question", "messages")
GROUP_KEYS: Final = ("category", "type", "kind", "attack")

_CHAT: Final = "/v1/chat/completions"
_BOM: Final = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Source:
    """A file of texts.

    Attributes:
        file: The file, as given.
        field: The field that holds the text; None takes the first of `FIELDS` that a row has.
    """

    file: str
    field: str | None = None

    @property
    def name(self) -> str:
        """Name of the group that the file makes."""
        stem = Path(self.file).stem
        return f"file={stem}" if self.field is None else f"file={stem}:{self.field}"


@dataclass(frozen=True, slots=True)
class Example:
    """One text.

    Attributes:
        text: What the user says; of a conversation, all user messages.
        groups: Groups that it belongs to, `key=value`.
        target: The target that it is about, where the row names one.
        conversation: The messages as JSON, where the row holds a conversation.
    """

    text: str
    groups: tuple[str, ...] = ()
    target: str | None = None
    conversation: str | None = None

    def body(self) -> bytes:
        """Return the body of the chat request that asks this."""
        messages = self.conversation or json.dumps([{"role": "user", "content": self.text}])
        return f'{{"model":"eval","messages":{messages}}}'.encode()

    def request(self) -> ParsedRequest:
        """Return that request as the server would parse it.

        Raises:
            RequestError: If the server would refuse it.
        """
        return parse_request(_CHAT, self.body())


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a file holds.

    Attributes:
        source: The file.
        examples: Its texts.
        skipped: Rows without one: the field is missing or null.
    """

    source: Source
    examples: tuple[Example, ...]
    skipped: int


def parse_source(spec: str) -> Source:
    """Read `FILE` or `FILE:FIELD`; a file whose name holds a colon counts as it is."""
    file, colon, field = spec.rpartition(":")
    if not colon or not field or "/" in field or Path(spec).exists():
        return Source(spec)
    return Source(file, field)


def load_examples(source: Source, group_keys: Sequence[str] = GROUP_KEYS) -> Loaded:
    """Read a file of texts.

    Args:
        source: The file.
        group_keys: Keys of rows that make groups; the file makes one by itself.

    Raises:
        DataError: If the file can't be read, a row is broken, or no row has a text.
    """
    examples, skipped = [], 0
    for line, row in json_lines(source.file):
        example = _example(row, source, line, group_keys)
        if example is None:
            skipped += 1
        else:
            examples.append(example)
    if not examples:
        wanted = repr(source.field) if source.field else ", ".join(FIELDS)
        raise DataError(f"no row has a text (looked for: {wanted})", file=source.file)
    return Loaded(source, tuple(examples), skipped)


def json_lines(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON lines file with their line numbers; blank lines are left out.

    Raises:
        DataError: If the file can't be read, holds no row, or a line is no JSON object.
    """
    found = False
    try:
        with Path(path).open("rb") as file:
            for number, raw in enumerate(file, start=1):
                data = raw.removeprefix(_BOM) if number == 1 else raw
                if data.strip():
                    found = True
                    yield number, _object(data, str(path), number)
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror or error}", file=str(path)) from error
    if not found:
        raise DataError("no rows in the file; at least one is needed", file=str(path))


def stratified(examples: Sequence[Example], count: int, seed: Sequence[int]) -> list[Example]:
    """Draw a sample in which every combination of groups has its share, and one example at least.

    Args:
        examples: To draw from.
        count: How many to draw; all are taken if there are no more.
        seed: The same seed draws the same examples.

    Returns:
        The sample, in the order of `examples`. Small strata are over-represented by at most one
        example each, so that each has a figure of its own (given `count` allows it).
    """
    if count >= len(examples):
        return list(examples)
    rng = np.random.default_rng(seed)
    strata: dict[tuple[str, ...], list[int]] = {}
    for index in rng.permutation(len(examples)):
        strata.setdefault(examples[index].groups, []).append(int(index))
    # Members of a stratum stand at even steps from 0 to 1; the first `count` of all are drawn.
    places = [
        (rank / len(stratum), order, index)
        for order, stratum in enumerate(strata.values())
        for rank, index in enumerate(stratum)
    ]
    return [examples[index] for index in sorted(index for *_, index in sorted(places)[:count])]


def _object(data: bytes, file: str, line: int) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", file=file, line=line) from error
    if not isinstance(value, dict):
        raise DataError("expected a JSON object a line (JSONL)", file=file, line=line)
    return value


def _example(
    row: Mapping[str, Any], source: Source, line: int, group_keys: Sequence[str]
) -> Example | None:
    fields = FIELDS if source.field is None else (source.field,)
    field = next((name for name in fields if row.get(name) is not None), None)
    if field is None:
        return None
    groups = (source.name, *dict.fromkeys(_groups(row, group_keys)))
    target = row.get("target")
    target = target if isinstance(target, str) and target else None
    try:
        if field == "messages":
            example = _conversation(row[field], groups, target)
        else:
            example = Example(_text(row[field]), groups, target)
        example.request()
    except (ValueError, TypeError) as error:  # a RequestError is a ValueError
        raise DataError(str(error), file=source.file, line=line, field=field) from error
    return example


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a string with some text in it")
    return value


def _conversation(messages: Any, groups: tuple[str, ...], target: str | None) -> Example:
    conversation = json.dumps(messages)
    request = Example("", groups, target, conversation).request()
    users = {
        index for index, message in enumerate(request.raw["messages"]) if message["role"] == "user"
    }
    texts = [one.text for one in request.segments() if one.message in users and one.text.strip()]
    if not texts:
        raise RequestError("no message of a user has text in it")
    return Example("\n".join(texts), groups, target, conversation)


def _groups(row: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """Yield `key=value`; of a value such as `mmlu/law` also `key=mmlu`, of a list each item."""
    for key in keys:
        value = row.get(key)
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                yield f"{key}={str(one).lower()}"
            elif isinstance(one, int | float):
                yield f"{key}={one}"
            elif isinstance(one, str) and one:
                if "/" in one:
                    yield f"{key}={one.partition('/')[0]}"
                yield f"{key}={one}"
