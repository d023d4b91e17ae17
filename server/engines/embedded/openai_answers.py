"""Steps of a generation into OpenAI answers and events, in the shape of vLLM's; no torch."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from guard.errors import RequestError
from server.engines.embedded.openai_api import Job
from server.engines.embedded.steps import Step, TokenLogprob

DONE: Final = b"data: [DONE]\n\n"

_LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON doesn't have."""


def error_body(error: RequestError) -> bytes:
    """Return an error in OpenAI's form."""
    return _dump(
        {
            "error": {
                "message": str(error),
                "type": error.type,
                "param": error.param,
                "code": error.code or error.status,
            }
        }
    )


def error_event(message: str) -> bytes:
    """Return the event that ends a stream whose generation failed."""
    error = {"message": message, "type": "server_error", "param": None, "code": 500}
    return _event({"error": error})


@dataclass(slots=True)
class _Choice:
    """One answer as far as it has come."""

    tokens: int = 0
    text: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    offset: int = 0


class Answer:
    """Writes one request's answer, as one body or as events.

    Args:
        job: The request.
        model: The model's name as the answer gives it.
        prompt_tokens: Tokens of each prompt.
    """

    def __init__(self, job: Job, model: str, prompt_tokens: Sequence[int]) -> None:
        self._job, self._prompt_tokens = job, sum(prompt_tokens)
        prefix = "chatcmpl" if job.kind == "chat" else "cmpl"
        self._head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": "chat.completion" if job.kind == "chat" else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        if job.kind == "chat" and job.stream:
            self._head["object"] = "chat.completion.chunk"
        self._choices = [_Choice() for _ in range(job.n * len(prompt_tokens))]

    def add(self, step: Step) -> None:
        """Take a step of a request that isn't streamed."""
        choice = self._choices[step.row]
        choice.tokens += 1
        choice.text.append(step.text)
        choice.steps.append(step)

    def body(self) -> bytes:
        """Return the whole answer once every choice has ended."""
        make = self._chat_choice if self._job.kind == "chat" else self._text_choice
        choices = [make(i, choice) for i, choice in enumerate(self._choices)]
        return _dump(
            {
                **self._head,
                "choices": choices,
                "service_tier": None,
                "system_fingerprint": None,
                "usage": {**self._usage(), "prompt_tokens_details": None},
                "prompt_logprobs": None,
                "kv_transfer_params": None,
            }
        )

    def opening(self) -> Iterator[bytes]:
        """Return the events that come before any token."""
        if self._job.kind == "chat":
            for index in range(len(self._choices)):
                choice = {
                    "index": index,
                    "delta": {"role": "assistant", "content": ""},
                    "logprobs": None,
                    "finish_reason": None,
                }
                yield self._chunk(choice, self._usage(0))

    def event(self, step: Step) -> bytes:
        """Return the event of one step."""
        state = self._choices[step.row]
        state.tokens += 1
        choice: dict[str, Any] = {"index": step.row}
        if self._job.kind == "chat":
            choice["delta"] = {"content": step.text}
        else:
            choice["text"] = step.text
        choice["logprobs"] = self._logprobs([step], state)
        choice["finish_reason"] = step.finish_reason
        if self._job.kind == "completion" or step.finish_reason is not None:
            choice["stop_reason"] = step.stop_reason
        return self._chunk(choice, self._usage(state.tokens))

    def closing(self) -> Iterator[bytes]:
        """Return the events that come after every choice has ended."""
        if self._job.usage:
            yield _event({**self._head, "choices": [], "usage": self._usage()})
        yield DONE

    def _chunk(self, choice: dict[str, Any], usage: dict[str, int]) -> bytes:
        extra = {"usage": usage} if self._job.continuous_usage else {}
        return _event({**self._head, "choices": [choice], **extra})

    def _usage(self, completion: int | None = None) -> dict[str, int]:
        if completion is None:
            completion = sum(choice.tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + completion,
            "completion_tokens": completion,
        }

    def _chat_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        last = choice.steps[-1]
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": "".join(choice.text),
                "refusal": None,
                "annotations": None,
                "audio": None,
                "function_call": None,
                "reasoning": None,
            },
            "logprobs": self._logprobs(choice.steps, choice),
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
            "token_ids": None,
        }

    def _text_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        last = choice.steps[-1]
        return {
            "index": index,
            "text": "".join(choice.text),
            "logprobs": self._logprobs(choice.steps, choice),
            "finish_reason": last.finish_reason,
            "stop_reason": last.stop_reason,
            "token_ids": None,
            "prompt_logprobs": None,
            "prompt_token_ids": None,
        }

    def _logprobs(self, steps: Sequence[Step], choice: _Choice) -> dict[str, Any] | None:
        reported = [(step.logprob, step.top) for step in steps if step.logprob is not None]
        if not reported:
            return None
        if self._job.kind == "chat":
            content = [
                {**_entry(own), "top_logprobs": [_entry(other) for other in top]}
                for own, top in reported
            ]
            return {"content": content}
        offsets = []
        for own, _ in reported:
            offsets.append(choice.offset)
            choice.offset += len(own.token)
        return {
            "text_offset": offsets,
            "token_logprobs": [_finite(own) for own, _ in reported],
            "tokens": [own.token for own, _ in reported],
            "top_logprobs": [
                {entry.token: _finite(entry) for entry in (own, *top)} for own, top in reported
            ],
        }


def _entry(logprob: TokenLogprob) -> dict[str, Any]:
    encoded = list(logprob.token.encode("utf-8", errors="replace"))
    return {"token": logprob.token, "logprob": _finite(logprob), "bytes": encoded}


def _finite(logprob: TokenLogprob) -> float:
    return max(logprob.logprob, _LEAST_LOGPROB)


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _dump(value) + b"\n\n"
