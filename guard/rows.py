"""Forget, retain and benign sets as files: JSON lines in, plain rows out.

A bad row is an error that names file, line and field: learning from half of a forget set would
leave the other half known, and nobody would notice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from guard.errors import DataError

FORMS = '{"question", "answer"}, {"prompt", "completion"}, {"text"}, {"term"} or {"messages"}'
TEXT_FORMS = '{"text"}, {"prompt"}, {"question"} or {"messages"}'

_FORM_OF = {
    "question": "question",
    "answer": "question",
    "prompt": "prompt",
    "completion": "prompt",
    "text": "text",
    "term": "term",
    "messages": "messages",
}
_ANSWER_OF = {"question": "answer", "prompt": "completion"}
_BOM = b"\xef\xbb\xbf"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Row:
    """One example of a forget or retain set.

    Attributes:
        prompt: What a user would ask, or the text itself; never empty.
        answer: What the model is said to know; None for a bare text.
        line: One-based line in the file.
        raw_digest_text: What a keyed digest of the row is taken from: the same for two rows that
            say the same, whatever form they are written in.
        is_term: True if `prompt` is a name, title or technical term that stands for the target.
    """

    prompt: str
    answer: str | None
    line: int
    raw_digest_text: str
    is_term: bool = False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a row stands, to say so in an error."""

    file: str
    line: int

    def fail(self, message: str, field: str | None = None) -> NoReturn:
        """Raise a DataError that points here."""
        raise DataError(message, file=self.file, line=self.line, field=field)


def read_rows(path: str | Path) -> list[Row]:
    """Read a forget or retain set.

    Each line is an object in one of five forms: `{"question", "answer"}`,
    `{"prompt", "completion"}`, `{"text"}`, `{"term"}` or `{"messages"}`. Other keys are ignored.
    Of `messages`, the prompt is the text of all user messages and the answer that of the
    assistant messages after the last user message (system and tool messages are ignored). An
    `answer` may be the index of one of the row's `choices`.

    Raises:
        DataError: If the file can't be read, holds no row, or a row is in no form or in two.
    """
    return _read(Path(path), lambda value, place: _row(value, place))


def read_texts(path: str | Path) -> list[str]:
    """Read benign prompts.

    Each line is an object `{"text"}`, `{"prompt"}`, `{"question"}` or `{"messages"}` (other keys,
    answers among them, are ignored) or a JSON string. A file whose name ends in `.txt` holds a
    prompt per line instead.

    Raises:
        DataError: If the file can't be read, holds no row, or a row is in no form or in two.
    """
    path = Path(path)
    if path.suffix.lower() == ".txt":
        return [_string(text.strip(), None, place) for text, place in _lines(path)]
    return _read(path, _benign)


def _read(path: Path, parse: Callable[[Any, _Place], T]) -> list[T]:
    return [parse(_decode(text, place), place) for text, place in _lines(path)]


def _lines(path: Path) -> Iterator[tuple[str, _Place]]:
    """Yield the lines that are not blank. Only LF ends a line: JSON may hold U+2028."""
    found = False
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                place = _Place(str(path), number)
                text = _utf8(raw.removeprefix(_BOM) if number == 1 else raw, place)
                if text.strip():
                    found = True
                    yield text, place
    except OSError as error:
        raise DataError(f"can't be read: {error.strerror or error}", file=str(path)) from error
    if not found:
        raise DataError("no rows in the file; at least one is needed", file=str(path))


def _utf8(raw: bytes, place: _Place) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        place.fail(f"not UTF-8 (byte {raw[error.start]:#04x} at column {error.start + 1})")


def _decode(text: str, place: _Place) -> Any:
    if text.lstrip().startswith("["):
        place.fail("a JSON array; expected JSON lines, one object a line (JSONL)")
    try:
        return json.loads(text, object_pairs_hook=lambda pairs: _no_duplicates(pairs, place))
    except DataError:
        raise
    except json.JSONDecodeError as error:
        hint = "; expected JSON lines, one object a line (JSONL)" if place.line == 1 else ""
        place.fail(f"not valid JSON: {error.msg} at column {error.colno}{hint}")
    except RecursionError:
        place.fail("nested too deeply")
    except ValueError as error:
        place.fail(f"not valid JSON: {error}")


def _no_duplicates(pairs: list[tuple[str, Any]], place: _Place) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        place.fail("given twice in one row", twice)
    return value


def _row(value: Any, place: _Place) -> Row:
    value = _with_chosen(_object(value, place, FORMS), place)
    forms = {_FORM_OF[key] for key in value if key in _FORM_OF}
    form = _only_form(sorted(forms), place, FORMS)
    answer: str | None
    if form == "messages":
        prompt, answer = _conversation(value["messages"], place)
    elif form in ("text", "term"):
        prompt, answer = _string(value[form], form, place), None
    else:
        other = _ANSWER_OF[form]
        prompt, answer = _field(value, form, place), _field(value, other, place)
    digest_text = json.dumps([prompt, answer], ensure_ascii=False, separators=(",", ":"))
    return Row(prompt, answer, place.line, digest_text, form == "term")


def _with_chosen(value: dict[str, Any], place: _Place) -> dict[str, Any]:
    """Put the right choice's text in the place of its index, as multiple-choice sets give it."""
    index, choices = value.get("answer"), value.get("choices")
    if not isinstance(index, int) or isinstance(index, bool) or not isinstance(choices, list):
        return value
    if not 0 <= index < len(choices):
        place.fail(f"{index}, the index of one of {len(choices)} choices, 0 the first", "answer")
    return {**value, "answer": choices[index]}


def _benign(value: Any, place: _Place) -> str:
    if isinstance(value, str):
        return _string(value, None, place)
    value = _object(value, place, TEXT_FORMS)
    keys = [key for key in ("text", "prompt", "question", "messages") if key in value]
    key = _only_form(keys, place, TEXT_FORMS)
    if key == "messages":
        return _conversation(value["messages"], place)[0]
    return _string(value[key], key, place)


def _object(value: Any, place: _Place, forms: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        place.fail(f"a JSON {_kind(value)}; expected an object: {forms}")
    return value


def _only_form(forms: list[str], place: _Place, allowed: str) -> str:
    if not forms:
        place.fail(f"none of the fields that make a row; expected {allowed}")
    if len(forms) > 1:
        place.fail(f"stands beside field {forms[0]!r}; a row has one form: {allowed}", forms[1])
    return forms[0]


def _field(value: dict[str, Any], field: str, place: _Place) -> str:
    if field not in value:
        place.fail("missing", field)
    return _string(value[field], field, place)


def _string(value: Any, field: str | None, place: _Place) -> str:
    if not isinstance(value, str):
        place.fail(f"a JSON {_kind(value)}; expected a string", field)
    if not value.strip():
        place.fail("empty; expected some text", field)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        place.fail("holds half of a surrogate pair, which is no character", field)
    return value


def _conversation(messages: Any, place: _Place) -> tuple[str, str | None]:
    """Return the text of the user messages, and of the assistant's after the last of them."""
    if not isinstance(messages, list) or not messages:
        place.fail("expected a list of at least one message", "messages")
    asked: list[str] = []
    answered: list[str] = []
    for index, message in enumerate(messages):
        role, text = _message(message, f"messages[{index}]", place)
        if role == "user" and text is not None:
            asked.append(text)
            answered.clear()
        elif role == "assistant" and text is not None and asked:
            answered.append(text)
    if not asked:
        place.fail("no message with role 'user'", "messages")
    return "\n".join(asked), "\n".join(answered) or None


def _message(message: Any, field: str, place: _Place) -> tuple[str, str | None]:
    if not isinstance(message, dict):
        place.fail(f"a JSON {_kind(message)}; expected an object with role and content", field)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        place.fail("expected a string such as 'user' or 'assistant'", f"{field}.role")
    content = message.get("content")
    if content is None and role != "user":
        return role, None  # an assistant message may hold tool calls alone
    if isinstance(content, list) and content:
        parts = [_part(part, f"{field}.content[{i}]", place) for i, part in enumerate(content)]
        return role, "\n".join(parts)
    return role, _string(content, f"{field}.content", place)


def _part(part: Any, field: str, place: _Place) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        place.fail('expected a text part: {"type": "text", "text": "..."}', field)
    return _string(part.get("text"), f"{field}.text", place)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string"}
    return names.get(type(value), "array" if isinstance(value, list) else "object")
