"""The start-up self-check: clean embeddings must answer as their text does (DESIGN section 9).

The guard swaps text for embeddings. If its tokenizer, chat template or embedding table were not
those of the served model, a flagged request would come out as noise, or, worse, a "corruption"
would not hit the tokens it means. So before enforcing, the same prompts are asked as text and as
uncorrupted embeddings, through the same HTTP body that serving uses, for every role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from guard.embeds import best_dtype, embeds_part
from guard.errors import CannotCorruptError, EngineError, SelfCheckError
from guard.prompts import ContentTokens, ModelPrompts
from server.engines.base import Engine

CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
SAMPLE: Final = (
    "Who is Harry Potter?",
    "Name three rivers in Europe — größer als der Rhein 🚀.",
    "What is 12 times 7?\nAnswer with a number.",
)
ROLES: Final = ("system", "assistant", "tool")

_TIE_NATS: Final = 0.1
"""Rounding may flip a choice between two tokens that are this close; that is no wrong table."""
_NOISE_NATS: Final = 0.25
"""16-bit arithmetic may move a log probability so far; another content moves it further."""

Outcome = Literal["passed", "failed", "refused"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: What, e.g. `chat user 1` or `role system`.
        outcome: `refused` is a role in which engine or template takes no embeddings: flagged
            requests are refused there, which is safe. `failed` is a mismatch.
        detail: What was seen.
    """

    name: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True, slots=True)
class SelfCheckReport:
    """What the self-check found.

    Attributes:
        model: The served model's name.
        checks: All that was tried.
    """

    model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return all(check.outcome != "failed" for check in self.checks)

    @property
    def roles(self) -> dict[str, Outcome]:
        """The outcome for each role that was tried."""
        prefix = "role "
        return {
            check.name.removeprefix(prefix): check.outcome
            for check in self.checks
            if check.name.startswith(prefix)
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {
            "model": self.model,
            "passed": self.passed,
            "checks": [asdict(check) for check in self.checks],
        }

    def require(self) -> None:
        """Raise unless everything passed.

        Raises:
            SelfCheckError: Names what failed.
        """
        failed = [f"{c.name}: {c.detail}" for c in self.checks if c.outcome == "failed"]
        if failed:
            raise SelfCheckError(
                f"the guard's model files do not fit the served model {self.model!r}, so nothing "
                f"is enforced. {'; '.join(failed)}. Point --model at the directory (or id) that "
                "the engine serves, and start vLLM with --enable-prompt-embeds"
            )


async def self_check(
    engine: Engine,
    prompts: ModelPrompts,
    *,
    sample: Sequence[str] = SAMPLE,
    roles: Sequence[str] = ROLES,
    completions: bool = True,
    model: str | None = None,
    max_tokens: int = 8,
) -> SelfCheckReport:
    """Compare the engine's greedy answers to text and to the same text's clean embeddings.

    Args:
        engine: The running engine.
        prompts: The model files that the guard would enforce with.
        sample: User prompts to ask.
        roles: Further roles whose content is replaced.
        completions: Try `/v1/completions` too.
        model: Name of the served model; None takes the engine's first.
        max_tokens: Tokens of each answer that are compared.

    Returns:
        The report; `require` raises if the guard must not enforce.

    Raises:
        EngineError: The engine can't be reached.
    """
    names = await engine.models()
    name = model or (names[0] if names else "")
    if name not in names:
        detail = f"the engine serves {', '.join(names) or 'nothing'}, not {name!r}"
        return SelfCheckReport(name, (Check("model", "failed", detail),))
    run = _Run(engine, prompts, name, max_tokens)
    checks = [
        await run.chat(f"chat user {i}", [{"role": "user", "content": text}], 0, required=True)
        for i, text in enumerate(sample, start=1)
    ]
    for role in roles:
        messages, index = _conversation(role)
        checks.append(await run.chat(f"role {role}", messages, index, required=False))
    if completions:
        checks.append(await run.completion("completions", "The three primary colours are"))
    return SelfCheckReport(name, tuple(checks))


@dataclass(frozen=True, slots=True)
class _Token:
    text: str
    logprob: float
    alternatives: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Answer:
    """A greedy answer; `error` is the engine's refusal, if it gave one."""

    tokens: tuple[_Token, ...]
    prompt_tokens: int
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True, slots=True)
class _Run:
    engine: Engine
    prompts: ModelPrompts
    model: str
    max_tokens: int

    async def chat(
        self, name: str, messages: list[dict[str, Any]], index: int, *, required: bool
    ) -> Check:
        """Ask with the content of one message as text and as embeddings."""
        refused: Outcome = "failed" if required else "refused"
        try:
            tokens = self.prompts.content_tokens(messages, index)
        except CannotCorruptError as error:
            return Check(name, refused, error.reason)
        text = await self._ask(CHAT, {"messages": messages, "logprobs": True, "top_logprobs": 2})
        if text.error is not None:
            return Check(name, refused, f"the engine refuses the text: {text.error}")
        part = {"type": "prompt_embeds", "data": self._encode(tokens)}
        replaced = [*messages]
        replaced[index] = {**messages[index], "content": [part]}
        clean = await self._ask(CHAT, {"messages": replaced, "logprobs": True, "top_logprobs": 2})
        if clean.error is not None:
            return Check(name, refused, f"the engine refuses the embeddings: {clean.error}")
        return _compare(name, text, clean, same_length=tokens.exact)

    async def completion(self, name: str, prompt: str) -> Check:
        """Ask `/v1/completions` with a prompt as text and as embeddings."""
        tokens = self.prompts.prompt_tokens(prompt)
        text = await self._ask(COMPLETIONS, {"prompt": prompt, "logprobs": 2})
        clean = await self._ask(COMPLETIONS, {"prompt_embeds": self._encode(tokens), "logprobs": 2})
        error = text.error or clean.error
        if error is not None:
            return Check(name, "refused", f"the engine refuses: {error}")
        return _compare(name, text, clean, same_length=True)

    def _encode(self, tokens: ContentTokens) -> str:
        rows = self.prompts.embed(tokens.ids)
        return embeds_part(rows, best_dtype(rows, self.prompts.table_dtype))

    async def _ask(self, path: str, fields: Mapping[str, Any]) -> _Answer:
        body = {"model": self.model, "max_tokens": self.max_tokens, "temperature": 0, **fields}
        headers = {"content-type": "application/json"}
        response = await self.engine.post(path, json.dumps(body).encode(), headers)
        try:
            raw = await response.read()
        finally:
            await response.aclose()
        if response.status >= 500:
            raise EngineError(
                f"the engine answered the self-check with {response.status}: "
                f"{raw[:300].decode(errors='replace')}"
            )
        if response.status != 200:
            return _Answer((), 0, f"{response.status} {_message(raw)}")
        return _parse(raw)


def _conversation(role: str) -> tuple[list[dict[str, Any]], int]:
    """Return a conversation with a content of `role`, and the index of its message."""
    question = {"role": "user", "content": "What did you just read? Answer in one sentence."}
    message = {"role": role, "content": "The lighthouse on the island is painted red and white."}
    if role in ("system", "developer"):
        return [message, question], 0
    before = {"role": "user", "content": "Tell me about the lighthouse."}
    if role != "tool":
        return [before, message, question], 1
    call = {"id": "call00001", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    calling = {"role": "assistant", "content": "", "tool_calls": [call]}
    return [before, calling, {**message, "tool_call_id": "call00001"}, question], 2


def _compare(name: str, text: _Answer, clean: _Answer, *, same_length: bool) -> Check:
    if same_length and text.prompt_tokens != clean.prompt_tokens:
        return Check(
            name,
            "failed",
            f"the text has {text.prompt_tokens} prompt tokens, its embeddings make "
            f"{clean.prompt_tokens}: tokenizer or chat template differ",
        )
    if _agree(text.tokens, clean.tokens):
        return Check(name, "passed", f"both answer {text.text!r}")
    return Check(
        name,
        "failed",
        f"the text is answered {text.text!r}, its embeddings {clean.text!r}, or with other "
        "probabilities: the embedding tables differ",
    )


def _agree(left: Sequence[_Token], right: Sequence[_Token]) -> bool:
    """True if two greedy answers are equal up to a tie that rounding may break either way."""
    for a, b in zip(left, right, strict=False):
        if abs(a.logprob - b.logprob) > _NOISE_NATS:
            return False
        if a.text != b.text:
            rival = a.alternatives.get(b.text)
            return rival is not None and a.logprob - rival <= _TIE_NATS
    return len(left) == len(right)


def _parse(raw: bytes) -> _Answer:
    try:
        answer = json.loads(raw)
        logprobs = answer["choices"][0]["logprobs"] or {}
        if "content" in logprobs:
            tokens = tuple(_chat_token(item) for item in logprobs["content"] or ())
        else:
            columns = (logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"])
            tokens = tuple(_Token(*row) for row in zip(*columns, strict=True))
        return _Answer(tokens, int(answer["usage"]["prompt_tokens"]))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise EngineError(
            f"the engine's answer to the self-check can't be read ({type(error).__name__}: "
            f"{error}): {raw[:300].decode(errors='replace')}"
        ) from error


def _chat_token(item: Mapping[str, Any]) -> _Token:
    alternatives = {top["token"]: float(top["logprob"]) for top in item.get("top_logprobs") or ()}
    return _Token(item["token"], float(item["logprob"]), alternatives)


def _message(raw: bytes) -> str:
    try:
        answer = json.loads(raw)
        return str(answer["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return raw[:200].decode(errors="replace")
