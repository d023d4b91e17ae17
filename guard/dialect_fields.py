"""What becomes of the fields of `/v1/messages` and `/v1/responses`, as `guard.fields` has it.

Both are translated into a chat completion, whose own fields are then judged, passed or capped.
The structs of `server.dialects` accept exactly what is not denied here.
"""

from __future__ import annotations

from typing import Final

from guard.fields import Field

_EMPTY: Final = Field("cap", {"max_length": 0})
_WHY: Final = "it has no counterpart in a chat completion that the guard accepts"


def _rows(prefix: str, words: str, row: Field) -> dict[str, Field]:
    return {prefix + word: row for word in words.split()}


def _taken(words: str, prefix: str = "") -> dict[str, Field]:
    return _rows(prefix, words, Field("translate"))


def _dropped(words: str, prefix: str = "") -> dict[str, Field]:
    return _rows(prefix, words, Field("strip"))


def _denied(words: str, prefix: str = "") -> dict[str, Field]:
    return _rows(prefix, words, Field("deny", why=_WHY))


def _images(words: str, prefix: str) -> dict[str, Field]:
    return _rows(prefix, words, Field("deny", why=_WHY, setting="images"))


def _absent(*values: object) -> Field:
    return Field("deny", why=_WHY, harmless=values)


_MESSAGES: Final[dict[str, Field]] = {
    **_taken("model max_tokens stop_sequences stream temperature top_k top_p system"),
    **_taken("type text", "system[]."),
    **_taken("role content", "messages[]."),
    **_taken(
        "type text thinking id name input tool_use_id content is_error", "messages[].content[]."
    ),
    **_taken("type text", "messages[].content[].content[]."),
    **_taken("name description input_schema strict type", "tools[]."),
    **_taken("type name disable_parallel_tool_use", "tool_choice."),
    **_taken("effort format.type format.schema", "output_config."),
    **_taken("thinking.type"),
    **_dropped("cache_control metadata.user_id service_tier thinking.budget_tokens"),
    **_dropped("system[].cache_control tools[].cache_control"),
    **_dropped("cache_control signature content[].cache_control", "messages[].content[]."),
    "system[].citations": _EMPTY,
    "messages[].content[].citations": _EMPTY,
    "messages[].content[].content[].citations": _EMPTY,
    # What vLLM has besides.
    **_denied("cache_salt chat_template_kwargs ec_transfer_params kv_transfer_params mm_payload"),
    **_denied("return_mm_kwargs vllm_xargs watermarking thinking.display tools[].defer_loading"),
    **_denied("data tool tool_name", "messages[].content[]."),
    **_images("source", "messages[].content[]."),
    **_denied("content data id input is_error name signature source", "system[]."),
    **_denied("thinking tool tool_name tool_use_id", "system[]."),
}

_RESPONSES: Final[dict[str, Field]] = {
    **_taken("model input instructions max_output_tokens temperature top_p stream"),
    **_taken("type role content call_id name arguments output", "input[]."),
    **_taken("type text refusal", "input[].content[]."),
    **_taken("type text", "input[].output[]."),
    **_taken("type text", "input[].summary[]."),
    **_taken("type name parameters description strict", "tools[]."),
    **_taken("tool_choice tool_choice.type tool_choice.name parallel_tool_calls reasoning.effort"),
    **_taken("type name schema description strict", "text.format."),
    **_dropped("store include service_tier metadata user safety_identifier prompt_cache_key"),
    **_dropped("stream_options.include_obfuscation"),
    **_dropped("id status phase", "input[]."),
    "input[].content[].annotations": _EMPTY,
    "input[].content[].logprobs": _EMPTY,
    "input[].encrypted_content": _absent(None),
    "background": _absent(False),
    "conversation": _absent(None),
    "max_tool_calls": _absent(None),
    "previous_response_id": _absent(None),
    "prompt": _absent(None),
    "top_logprobs": _absent(0),
    "truncation": _absent("disabled"),
    # What vLLM has besides.
    **_denied("cache_salt chat_template_kwargs ec_transfer_params enable_response_messages"),
    **_denied("frequency_penalty ignore_eos include_reasoning include_stop_str_in_output"),
    **_denied("kv_transfer_params logit_bias media_io_kwargs min_p mm_payload mm_processor_kwargs"),
    **_denied("presence_penalty previous_input_messages priority repetition_penalty request_id"),
    **_denied("return_mm_kwargs seed session_id skip_special_tokens stop stop_token_ids"),
    **_denied("structured_outputs top_k vllm_xargs watermarking text.verbosity"),
    **_denied("context generate_summary mode summary", "reasoning."),
    **_denied("mode server_label tools", "tool_choice."),
    **_denied("acknowledged_safety_checks action actions approval_request_id approve", "input[]."),
    **_denied("async background caller code container_id created_by environment", "input[]."),
    **_denied("error execution fingerprint input max_output_length namespace", "input[]."),
    **_denied("operation output_format outputs pending_safety_checks quality queries", "input[]."),
    **_denied("reason reasoning result results revised_prompt server_label size", "input[]."),
    **_denied("svg_usage text tools", "input[]."),
    **_denied("file_data file_id file_url filename", "input[].content[]."),
    **_images("detail image_url", "input[].content[]."),
    **_denied("prompt_cache_breakpoint", "input[].content[]."),
    **_denied(
        "created_by detail file_data file_id file_url filename image_url", "input[].output[]."
    ),
    **_denied("outcome prompt_cache_breakpoint stderr stdout", "input[].output[]."),
    **_denied("file_id image_url type", "input[].output."),
    **_denied("action allowed_callers allowed_tools async authorization background", "tools[]."),
    **_denied("complexity connector_id container defer_loading display_height", "tools[]."),
    **_denied("display_width environment execution external_web_access filters format", "tools[]."),
    **_denied("frame_count frame_duration_ms headers input_fidelity input_image_mask", "tools[]."),
    **_denied("max_num_results model moderation output_compression output_format", "tools[]."),
    **_denied("output_schema partial_images quality ranking_options require_approval", "tools[]."),
    **_denied("search_content_types search_context_size server_description", "tools[]."),
    **_denied("server_label server_url size svg tools tunnel_id user_location", "tools[]."),
    **_denied("vector_store_ids", "tools[]."),
}

DIALECT_FIELDS: Final[dict[str, dict[str, Field]]] = {
    "/v1/messages": _MESSAGES,
    "/v1/responses": _RESPONSES,
}
"""Every field that is known, by route and path."""
