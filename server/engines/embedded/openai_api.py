"""OpenAI requests into what the model is asked to do; no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta

from guard.errors import RequestError
from server.engines.embedded.openai_prompts import Encode, chat_prompt, completion_prompts
from server.engines.embedded.steps import Sampling

if TYPE_CHECKING:
    from server.engines.embedded.prompts import EncodedPrompt, PromptEncoder

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"

_GREEDY_BELOW: Final = 1e-5
_Count = Annotated[int, Meta(ge=1)]


class _StreamOptions(msgspec.Struct):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class _Body(msgspec.Struct, kw_only=True):
    """What both endpoints share; fields of vLLM's that are not here are ignored, as vLLM does."""

    model: str
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: _Count | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0)] | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    use_beam_search: bool | None = None
    prompt_logprobs: int | None = None


class _ChatBody(_Body, kw_only=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class _CompletionBody(_Body, kw_only=True):
    prompt: str | list[Any] | None = None
    prompt_embeds: str | list[str] | None = None
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None


_AnyBody = TypeVar("_AnyBody", bound=_Body)


@dataclass(frozen=True, slots=True)
class Job:
    """One request, understood.

    Attributes:
        kind: Which endpoint it came to.
        model: The model name that it asked for.
        sampling: How to draw; `max_tokens` still to be fitted to the context.
        max_tokens: What the client asked for; None is as many as fit.
        prompts: Each encodes one prompt when given the model's encoder.
        n: Answers per prompt.
        stream: Whether to send events.
        usage: Whether the stream ends with a usage event.
        continuous_usage: Whether every event carries usage.
    """

    kind: Literal["chat", "completion"]
    model: str
    sampling: Sampling
    max_tokens: int | None
    prompts: tuple[Encode, ...]
    n: int
    stream: bool
    usage: bool
    continuous_usage: bool

    def encode(self, encoder: PromptEncoder) -> list[EncodedPrompt]:
        """Encode the prompts.

        Raises:
            RequestError: A prompt can't be encoded.
        """
        return [encode(encoder) for encode in self.prompts]

    def fit(self, prompt: EncodedPrompt, context: int) -> Sampling:
        """Return the sampling for a prompt in a context of that many tokens.

        Raises:
            RequestError: Prompt and answer don't fit together.
        """
        room, length = context - len(prompt.ids), len(prompt.ids)
        wanted = self.max_tokens
        if room < 1 or (wanted is not None and wanted > room):
            asked = "" if wanted is None else f" and you asked for {wanted} more"
            raise RequestError(
                f"This model's maximum context length is {context} tokens. However, your prompt "
                f"has {length}{asked}. Shorten the prompt or lower max_tokens.",
                code="context_length_exceeded",
                param="messages" if self.kind == "chat" else "prompt",
            )
        return replace(self.sampling, max_tokens=room if wanted is None else wanted)


def parse_job(path: str, body: bytes, vocabulary: int) -> Job:
    """Read a request.

    Args:
        path: The endpoint.
        body: JSON.
        vocabulary: Number of token ids that the model knows.

    Raises:
        RequestError: The request is malformed, or wants what this engine doesn't do.
    """
    if path == CHAT:
        chat = _decode(body, _ChatBody)
        _refuse_unsupported_chat(chat)
        options = chat.chat_template_kwargs or {}
        prompt = chat_prompt(chat.messages, chat.tools, options, _turn(chat))
        return _job("chat", chat, (prompt,), _chat_logprobs(chat), vocabulary)
    if path == COMPLETIONS:
        completion = _decode(body, _CompletionBody)
        _refuse_unsupported_completion(completion)
        prompts = completion_prompts(completion.prompt, completion.prompt_embeds)
        return _job("completion", completion, prompts, completion.logprobs, vocabulary)
    raise RequestError(f"the embedded engine has no {path}", status=404, code="not_found")


def _turn(chat: _ChatBody) -> dict[str, bool]:
    """Say whose turn the prompt ends in: a new one of the assistant's, or its last, left open."""
    continues = bool(chat.continue_final_message)
    opens = not continues if chat.add_generation_prompt is None else chat.add_generation_prompt
    if continues and opens:
        raise RequestError(
            "continue_final_message needs add_generation_prompt=false",
            param="continue_final_message",
        )
    return {"continue_final_message": continues, "add_generation_prompt": opens}


def _decode(body: bytes, kind: type[_AnyBody]) -> _AnyBody:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"the request body is not valid: {error}") from None


def _job(
    kind: Literal["chat", "completion"],
    body: _Body,
    prompts: tuple[Encode, ...],
    logprobs: int | None,
    vocabulary: int,
) -> Job:
    _refuse_unsupported(body)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream=true", param="stream_options")
    options = body.stream_options or _StreamOptions()
    wanted = body.max_tokens
    if isinstance(body, _ChatBody) and body.max_completion_tokens is not None:
        wanted = body.max_completion_tokens
    if kind == "completion" and wanted is None:
        wanted = 16
    return Job(
        kind=kind,
        model=body.model,
        sampling=_sampling(body, logprobs, vocabulary),
        max_tokens=wanted,
        prompts=prompts,
        n=body.n or 1,
        stream=bool(body.stream),
        usage=bool(options.include_usage),
        continuous_usage=bool(options.include_usage and options.continuous_usage_stats),
    )


def _sampling(body: _Body, logprobs: int | None, vocabulary: int) -> Sampling:
    temperature = 1.0 if body.temperature is None else body.temperature
    if not math.isfinite(temperature):
        raise RequestError("temperature must be a finite number", param="temperature")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if "" in stop:
        raise RequestError("a stop string must not be empty", param="stop")
    return Sampling(
        temperature=0.0 if temperature < _GREEDY_BELOW else temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        min_p=body.min_p or 0.0,
        stop=tuple(stop),
        stop_token_ids=tuple(_known(body.stop_token_ids or [], vocabulary, "stop_token_ids")),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=body.min_tokens or 0,
        seed=body.seed,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=body.repetition_penalty or 1.0,
        logit_bias=_bias(body.logit_bias or {}, vocabulary),
        logprobs=logprobs,
    )


def _bias(bias: Mapping[str, float], vocabulary: int) -> dict[int, float]:
    try:
        ids = [int(key) for key in bias]
    except ValueError:
        raise RequestError("the keys of logit_bias must be token ids", param="logit_bias") from None
    values = (max(-100.0, min(100.0, value)) for value in bias.values())
    return dict(zip(_known(ids, vocabulary, "logit_bias"), values, strict=True))


def _known(ids: Sequence[int], vocabulary: int, param: str) -> Sequence[int]:
    wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
    if wrong is not None:
        raise RequestError(
            f"{param} has token id {wrong}; allowed are 0 to {vocabulary - 1}", param=param
        )
    return ids


# --- What this engine can't do -------------------------------------------------------------------


def _refuse_unsupported(body: _Body) -> None:
    if body.response_format is not None and body.response_format.get("type") != "text":
        raise _unsupported("response_format", "only {'type': 'text'}")
    if body.use_beam_search:
        raise _unsupported("use_beam_search", "only sampling")
    if body.prompt_logprobs is not None:
        raise _unsupported("prompt_logprobs", "only logprobs of the answer")


def _refuse_unsupported_chat(body: _ChatBody) -> None:
    if body.tool_choice not in (None, "none", "auto"):
        raise _unsupported("tool_choice", "only 'none' and 'auto'")


def _refuse_unsupported_completion(body: _CompletionBody) -> None:
    if body.echo:
        raise _unsupported("echo", "only false")
    if body.suffix:
        raise _unsupported("suffix", "no suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise _unsupported("best_of", "only the value of n")


def _unsupported(param: str, allowed: str) -> RequestError:
    return RequestError(
        f"the embedded engine doesn't support this {param}; it takes {allowed}",
        code="unsupported_parameter",
        param=param,
    )


def _chat_logprobs(body: _ChatBody) -> int | None:
    if not body.logprobs:
        if body.top_logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        return None
    return body.top_logprobs or 0
