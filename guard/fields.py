"""What becomes of every field of a request, in one table.

`guard.schema` accepts exactly what is not denied here, and tests hold the table against its
structs, against `docs/api.md`, and against the request classes of the installed vLLM: a field that
vLLM has and this table lacks fails a test. At run time the rule is simpler still: what is not
declared is refused, known here or not.

A path names a field at depth: `messages[].content[].text`. A denied field is denied with all that
is in it; free JSON (a tool's parameters, an answer schema) is judged whole, keys and values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal

Treatment = Literal["judge", "pass", "cap", "strip", "deny", "translate"]
"""What the guard does with a field.

- `judge`: read as text; it decides on the request with all other texts.
- `pass`: sent on as it is; its type has no room for text (a flag, a name out of a list).
- `cap`: a number within bounds, sent on as it is.
- `strip`: accepted, and not sent on: the model has no use for it, and nobody judged it.
- `deny`: the request is refused.
- `translate`: becomes a field of a chat completion, and is treated as that.
"""


@dataclass(frozen=True, slots=True)
class Field:
    """A field's treatment.

    Attributes:
        treatment: What the guard does with it.
        bounds: Limits, by the names that `msgspec.Meta` gives them.
        why: Of a denied field, the reason that a client reads.
        harmless: Of a denied field, values that mean its absence and are accepted.
        setting: Of a denied field, the setting with which it is sent on instead.
    """

    treatment: Treatment
    bounds: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    harmless: tuple[Any, ...] = ()
    setting: str = ""


def _judge(**bounds: Any) -> Field:
    return Field("judge", bounds)


def _cap(**bounds: Any) -> Field:
    return Field("cap", bounds)


def _deny(why: str, *harmless: Any) -> Field:
    return Field("deny", why=why, harmless=harmless)


_JUDGE: Final = Field("judge")
_PASS: Final = Field("pass")
_STRIP: Final = Field("strip")
_TRANSLATE: Final = Field("translate")

_INT32: Final = 2**31 - 1

_TEMPLATE: Final = _deny("it changes the prompt after the guard has read it")
_PROBE: Final = _deny("it reads the likelihood of the prompt instead of an answer")
_CACHE: Final = _deny("it reaches caches of other prompts")
_STEER: Final = _deny("it can force an answer token by token")
_OPAQUE: Final = _deny("the guard can't read what it holds")
_SHOWS: Final = _deny("it shows the prompt as the engine got it")
_RENDER: Final = _deny("it is for the engine's operator")
_FORMAT: Final = _deny("use response_format")
_HYGIENE: Final = _deny("an answer's text comes without the model's own marks")
_STATE: Final = _deny("the guard reads what a request holds, not what the engine remembers")

# --- Chat completions and completions -------------------------------------------------------------

_COMMON: Final[dict[str, Field]] = {
    "model": _PASS,  # one of /v1/models, or 404
    "stream": _PASS,
    "stream_options.include_usage": _PASS,
    "stream_options.continuous_usage_stats": _PASS,
    "temperature": _cap(ge=0, le=2),
    "top_p": _cap(gt=0, le=1),
    "top_k": _cap(ge=-1, le=_INT32),
    "min_p": _cap(ge=0, le=1),
    "max_tokens": _cap(ge=1, le=_INT32),
    "min_tokens": _cap(ge=0, le=4096),
    "ignore_eos": _PASS,
    "stop": _judge(max_length=32),
    "stop_token_ids": _cap(max_length=256),
    "seed": _cap(ge=-(2**63), le=2**63 - 1),
    "n": _cap(ge=1, le=16),
    "presence_penalty": _cap(ge=-2, le=2),
    "frequency_penalty": _cap(ge=-2, le=2),
    "repetition_penalty": _cap(gt=0, le=10),
    "logit_bias": _judge(max_length=1024),  # the tokens it favours, read as text
    "response_format.type": _PASS,
    "response_format.json_schema.name": _JUDGE,
    "response_format.json_schema.description": _JUDGE,
    "response_format.json_schema.schema": _JUDGE,
    "response_format.json_schema.strict": _PASS,
    "user": _STRIP,
    # What vLLM has besides.
    "add_special_tokens": _TEMPLATE,
    "allowed_token_ids": _STEER,
    "bad_words": _STEER,
    "cache_salt": _CACHE,
    "ec_transfer_params": _CACHE,
    "include_stop_str_in_output": _HYGIENE,
    "kv_transfer_params": _CACHE,
    "length_penalty": _deny("it is for beam search"),
    "logprob_token_ids": _PROBE,
    "mm_payload": _RENDER,
    "priority": _RENDER,
    "prompt_embeds": _OPAQUE,
    "prompt_logprobs": _PROBE,
    "repetition_detection": _deny("the guard ends answers itself"),
    "request_id": _deny("send the header x-request-id"),
    "response_format.format": _STEER,
    "response_format.structures": _STEER,
    "response_format.triggers": _STEER,
    "return_mm_kwargs": _RENDER,
    "return_token_ids": _SHOWS,
    "return_token_offsets": _SHOWS,
    "return_tokens_as_token_ids": _SHOWS,
    "routed_experts_prompt_start": _SHOWS,
    "session_id": _CACHE,
    "skip_special_tokens": _HYGIENE,
    "spaces_between_special_tokens": _HYGIENE,
    "stream_interval": _deny("the chunks of an answer don't depend on the request"),
    "structured_outputs": _FORMAT,
    "thinking_token_budget": _STEER,
    "truncate_prompt_tokens": _TEMPLATE,
    "truncation_side": _TEMPLATE,
    "use_beam_search": _deny("beam search can't take the place of sampling here"),
    "vllm_xargs": _OPAQUE,
    "watermarking": _RENDER,
    # What vLLM and OpenAI had before.
    "guided_choice": _FORMAT,
    "guided_grammar": _STEER,
    "guided_json": _FORMAT,
    "guided_regex": _STEER,
}

_MESSAGE: Final[dict[str, Field]] = {
    "role": _PASS,
    "content": _JUDGE,
    "content[].type": _PASS,
    "content[].text": _JUDGE,
    "content[].refusal": _JUDGE,
    "name": _JUDGE,
    "tool_call_id": _JUDGE,
    "refusal": _JUDGE,
    "reasoning": _JUDGE,
    "reasoning_content": _JUDGE,
    "tool_calls[].id": _JUDGE,
    "tool_calls[].type": _PASS,
    "tool_calls[].index": _cap(ge=0, le=_INT32),
    "tool_calls[].function.name": _JUDGE,
    "tool_calls[].function.arguments": _JUDGE,
    "function_call.name": _JUDGE,
    "function_call.arguments": _JUDGE,
    # Clients echo the empty ones of an answer.
    "annotations": _cap(max_length=0),
    "audio": _deny(_OPAQUE.why, None),
    # What vLLM has besides.
    "author": _deny("use role and name"),
    "channel": _deny("use reasoning_content"),
    "content_type": _OPAQUE,
    "recipient": _deny("use tool_calls"),
    "task": _TEMPLATE,
    "tool_calls[].custom": _deny("use function"),
    "tools": _deny("declare tools beside the messages"),
    "content[].audio_embeds": _OPAQUE,
    "content[].audio_url": _OPAQUE,
    "content[].closed": _OPAQUE,
    "content[].data": _OPAQUE,
    "content[].file": _OPAQUE,
    "content[].image_embeds": _OPAQUE,
    "content[].image_pil": _OPAQUE,
    "content[].image_url": Field("deny", why=_OPAQUE.why, setting="images"),
    "content[].input_audio": _OPAQUE,
    "content[].name": _OPAQUE,
    "content[].prompt_cache_breakpoint": _CACHE,
    "content[].thinking": _deny("use reasoning_content"),
    "content[].uuid": _CACHE,
    "content[].video_embeds": _OPAQUE,
    "content[].video_url": _OPAQUE,
}

_CHAT: Final[dict[str, Field]] = {
    **_COMMON,
    **{f"messages[].{path}": treated for path, treated in _MESSAGE.items()},
    "max_completion_tokens": _cap(ge=1, le=_INT32),
    "logprobs": _PASS,
    "top_logprobs": _cap(ge=0, le=5),
    "tools[].type": _PASS,
    "tools[].function.name": _JUDGE,
    "tools[].function.description": _JUDGE,
    "tools[].function.parameters": _JUDGE,
    "tools[].function.strict": _PASS,
    "tool_choice": _PASS,  # a word out of a list, or a function by name
    "tool_choice.type": _PASS,
    "tool_choice.function.name": _JUDGE,
    "parallel_tool_calls": _PASS,
    "reasoning_effort": _PASS,
    "chat_template_kwargs": _JUDGE,
    "metadata": _STRIP,
    # What vLLM has besides.
    "add_generation_prompt": _TEMPLATE,
    "chat_template": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "documents": _deny(
        "put the documents into a message, the user's or a tool's: there they are read"
    ),
    "echo": _PROBE,
    "include_reasoning": _HYGIENE,
    "media_io_kwargs": _OPAQUE,
    "mm_processor_kwargs": _OPAQUE,
    "return_prompt_text": _SHOWS,
    "tools[].defer_loading": _TEMPLATE,
    "tools[].function.defer_loading": _TEMPLATE,
    # What OpenAI has besides, or had before.
    "audio": _OPAQUE,
    "function_call": _deny("use tool_choice"),
    "functions": _deny("use tools"),
}

_COMPLETION: Final[dict[str, Field]] = {
    **_COMMON,
    "prompt": _JUDGE,
    "logprobs": _cap(ge=0, le=5),
    "echo": _deny(_PROBE.why, False),
    "suffix": _deny("the engine can't take it with embeddings", ""),
    "best_of": _deny("it samples answers that nobody checks", 1),
}

FIELDS: Final[dict[str, dict[str, Field]]] = {
    "/v1/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
}
"""Every field that is known, by route and path; `guard.dialect_fields` has the dialects'."""

_GUARDED_TOO: Final = (
    "/v1/messages", "/v1/messages/count_tokens", "/v1/responses", "/v1/embeddings",
)  # fmt: skip
_DENIED_ROUTES: Final = """
GET /docs /docs/oauth2-redirect /fault_tolerance/status /get_world_size /is_paused /is_sleeping
    /kv_event_sources /load /ping /redoc /server_info /tokenizer_info
    /v1/responses/{response_id} /version /weight_info
HEAD /docs /docs/oauth2-redirect /redoc
POST /abort_requests /classify /cohere/v2/chat /cohere/v2/chat/render /collective_rpc /detokenize
    /fault_tolerance/apply /finish_weight_update /generative_scoring /inference/v1/abort_requests
    /inference/v1/generate /init_weight_transfer_engine /invocations /is_scaling_elastic_ep /pause
    /ping /pooling /release_kv_cache_memory /rerank /reset_encoder_cache /reset_mm_cache
    /reset_prefix_cache /resume /scale_elastic_ep /score /shutdown_weight_transfer_engine /sleep
    /start_draft_weight_update /start_profile /start_weight_update /stop_profile /tokenize
    /update_weight_version /update_weights /v1/audio/transcriptions /v1/audio/translations
    /v1/chat/completions/batch /v1/chat/completions/derender /v1/chat/completions/render
    /v1/completions/derender /v1/completions/render /v1/load_lora_adapter /v1/messages/render
    /v1/rerank /v1/responses/render /v1/responses/{response_id}/cancel /v1/score /v1/systemone
    /v1/unload_lora_adapter /v2/embed /v2/rerank /wake_up /weight_checker
MOUNT /metrics /static
WEBSOCKET /v1/realtime
"""


def _routes() -> dict[str, Literal["guard", "serve", "deny"]]:
    found: dict[str, Literal["guard", "serve", "deny"]] = {
        f"POST {path}": "guard" for path in (*FIELDS, *_GUARDED_TOO)
    }
    served = ("/v1/models", "/openapi.json", "/health", "/metrics")
    found |= {f"GET {path}": "serve" for path in served}
    found["HEAD /openapi.json"] = "serve"
    method = ""
    for word in _DENIED_ROUTES.split():
        if word.startswith("/"):
            found[f"{method} {word}"] = "deny"
        else:
            method = word
    return found


ROUTES: Final = _routes()
"""What becomes of every route that vLLM can have, by method and path: `guard` judges what goes
through, `serve` answers itself (vLLM's own is out of reach), `deny` is a 404 or 405."""

STEERING: Final = ("logit_bias", "min_tokens", "ignore_eos")
"""Dropped from a request whose content was flagged: each can push an answer past its end, or into
words of the client's choosing, and the model would go on from there."""


_UNDECLARED: Final = "it is not among the declared fields"
_INDEX: Final = re.compile(r"\[\d+\]")


def why_denied(route: str, path: str) -> str:
    """Say why a field is refused.

    Args:
        route: Route of the request.
        path: The field as a client would write it: `messages[0].task`.
    """
    place = _INDEX.sub("[]", path)
    for table in (FIELDS[route], *FIELDS.values()):
        if why := table.get(place, _PASS).why:
            return why
    return _UNDECLARED


@cache
def stripped(route: str) -> tuple[str, ...]:
    """Return the fields of a route's body that are accepted and not sent on."""
    return tuple(path for path, row in FIELDS[route].items() if row.treatment == "strip")
