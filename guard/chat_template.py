"""Chat templates: messages into the prompt text that the model reads, as vLLM renders it.

vLLM hands transformers a cleaned copy of the messages; both steps are repeated here, without
transformers. The self-check (server/selfcheck.py) proves on the running engine that the result is
the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from guard.content_format import loops_over_content
from guard.errors import ArtifactError, RequestError

PART_SEPARATOR: Final = "\n"
"""vLLM joins the parts of one message with it, unless the template walks the parts itself."""

_TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
_CONTINUE_TAG: Final = "<<continued here>>"


class _GenerationTag(Extension):
    """`{% generation %}` marks answers for training; for rendering its body is what counts."""

    tags: set[str] = {"generation"}  # noqa: RUF012  (jinja2's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class ChatTemplate:
    """The chat template of one model.

    Args:
        sources: Template text by name; `default`, and `tool_use` where a model has one for tools.
        special_tokens: What templates may name, e.g. `bos_token`.

    Raises:
        ArtifactError: A template is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = dict(sources)
        self._special = dict(special_tokens)
        environment = _environment()
        try:
            self._compiled = {
                name: environment.from_string(text) for name, text in self.sources.items()
            }
            self._walks_parts = {name: walks_parts(text) for name, text in self.sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise ArtifactError(f"the model's chat template is not valid Jinja: {error}") from error

    @classmethod
    def load(cls, directory: Path) -> ChatTemplate:
        """Read the template where transformers looks for it; a model may have none.

        Raises:
            ArtifactError: A file can't be read.
        """
        config = _read_json(directory / "tokenizer_config.json")
        return cls(_sources(directory, config), _special_tokens(directory, config))

    @cached_property
    def knows_developer(self) -> bool:
        """True if the template has a developer role; vLLM makes it a system message otherwise."""
        return any("'developer'" in t or '"developer"' in t for t in self.sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Render messages into the prompt.

        Args:
            messages: OpenAI messages; contents are text or text parts.
            tools: OpenAI tool definitions.
            add_generation_prompt: Open the assistant's turn at the end.
            continue_final_message: Leave the last message's turn open instead.
            **kwargs: Further template variables (`chat_template_kwargs`).

        Raises:
            RequestError: There is no template, or it refuses the messages.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self._compiled:
            raise RequestError("the model has no chat template; use /v1/completions")
        chat = self._conversation(messages, self._walks_parts[name])
        if continue_final_message:
            _tag_last(chat)
        variables = {**self._special, **kwargs, "messages": chat, "tools": tools or None}
        variables["add_generation_prompt"] = add_generation_prompt and not continue_final_message
        try:
            text = self._compiled[name].render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise RequestError(
                f"the model's chat template refuses the messages: {error}", param="messages"
            ) from error
        return _cut_at_tag(text) if continue_final_message else text

    def _conversation(
        self, messages: Sequence[Mapping[str, Any]], walks_parts: bool
    ) -> list[dict[str, Any]]:
        chat = [_message(message, walks_parts) for message in messages]
        if self.knows_developer or not any(m["role"] == "developer" for m in chat):
            return chat
        for message in chat:
            if message["role"] == "developer":
                message["role"] = "system"
                message.pop("tools", None)
        return _merge_system(chat)


@lru_cache(maxsize=16)
def walks_parts(source: str) -> bool:
    """Return True if a template loops over a message's content, and so wants parts, not a string.

    Raises:
        jinja2.TemplateSyntaxError: The template is not valid Jinja.
    """
    return loops_over_content(_environment().parse(source))


def content_parts(message: Mapping[str, Any]) -> list[str]:
    """Return the texts of a message's content, one per text part.

    Raises:
        RequestError: The content holds something else than text.
    """
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    texts = []
    for part in content:
        kind = "text" if isinstance(part, str) else part.get("type")
        text = part if isinstance(part, str) else part.get("text", part.get(str(kind)))
        if kind not in _TEXT_PARTS or not isinstance(text, str):
            raise RequestError(f"content part of type {kind!r} is not text", param="messages")
        texts.append(text)
    return texts


# --- Finding the template --------------------------------------------------------------------


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} can't be read: {error}") from error
    return value if isinstance(value, dict) else {}


def _sources(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for declared in (
        config.get("chat_template"),
        _read_json(directory / "chat_template.json").get("chat_template"),
    ):
        if isinstance(declared, str):
            found["default"] = declared
        elif isinstance(declared, list):
            found.update({item["name"]: item["template"] for item in declared})
    # A file of its own wins, as in transformers.
    file = directory / "chat_template.jinja"
    if file.is_file():
        found["default"] = file.read_text(encoding="utf-8")
    for extra in sorted((directory / "additional_chat_templates").glob("*.jinja")):
        found[extra.stem] = extra.read_text(encoding="utf-8")
    return found


def _special_tokens(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    tokens: dict[str, str] = {}
    for source in (_read_json(directory / "special_tokens_map.json"), config):
        for key, value in source.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str):
                tokens[key] = text
    return tokens


# --- Messages, as vLLM cleans them -----------------------------------------------------------


def _message(message: Mapping[str, Any], walks_parts: bool) -> dict[str, Any]:
    role = message["role"]
    texts = content_parts(message)
    parts: Any = [{"type": "text", "text": text} for text in texts]
    joined = PART_SEPARATOR.join(texts)
    cleaned = {"role": role, "content": parts if walks_parts and role != "tool" else joined}
    if role == "assistant":
        if message.get("tool_calls"):
            cleaned["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
        reasoning = next((message[key] for key in _REASONING if message.get(key)), None)
        if reasoning is not None:
            cleaned.update(dict.fromkeys(_REASONING, reasoning))
    elif role == "tool" and message.get("tool_call_id") is not None:
        cleaned["tool_call_id"] = message["tool_call_id"]
    elif role == "developer" and message.get("tools") is not None:
        cleaned["tools"] = message["tools"]
    if isinstance(message.get("name"), str):
        cleaned["name"] = message["name"]
    return cleaned


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Decode the arguments, which templates expect as an object; what is none becomes empty."""
    function = dict(call.get("function") or {})
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            arguments = {}
    function["arguments"] = arguments if isinstance(arguments, dict) else {}
    return {**call, "function": function}


def _merge_system(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Merge all system messages into the first, if one stands elsewhere than in front."""
    system = [message for message in chat if message["role"] == "system"]
    if system == [chat[0]]:
        return chat
    texts = []
    for message in system:
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(p["text"] for p in content)
        texts += [text] if text else []
    rest = [message for message in chat if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(texts)}, *rest]


def _tag_last(chat: list[dict[str, Any]]) -> None:
    content = chat[-1]["content"]
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_TAG
    elif content:
        content[-1]["text"] += _CONTINUE_TAG


def _cut_at_tag(text: str) -> str:
    at = text.rfind(_CONTINUE_TAG)
    if at < 0:
        raise RequestError(
            "continue_final_message is set, but the chat template drops the last message",
            param="continue_final_message",
        )
    return text[:at]
