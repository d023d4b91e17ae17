"""A plain vLLM as learners see it: batches of answers over HTTP, from any thread.

`HttpLearningEngine` is the `generate` half of `guard.types.LearningEngine`. It needs nothing but
`/v1/chat/completions` of an unmodified vLLM started with `--enable-prompt-embeds`, so a learner can
search on the very servers that a deployment runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from threading import Lock, Thread
from types import TracebackType
from typing import Any, Final, NoReturn, ParamSpec, Self, TypeVar

import aiohttp
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    before_sleep_log,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from guard.embeds import EmbedsDtype, best_dtype, embeds_part
from guard.errors import (
    ConfigError,
    EngineBusyError,
    EngineError,
    EngineRefusedError,
    EngineTimeoutError,
    EngineUnavailableError,
)
from guard.types import AdapterUse, EmbedsPart, FloatArray, Message, Prompt, SamplingParams
from server.engines.base import EngineResponse
from server.engines.vllm import VllmEngine, VllmTimeouts

log = logging.getLogger(__name__)

CHAT: Final = "/v1/chat/completions"
_JSON: Final = {"content-type": "application/json"}
_CLOSE_S: Final = 10.0
_LONGEST_RETRY_AFTER_S: Final = 120

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True, slots=True)
class HttpLimits:
    """How hard to press a server, and how long to put up with it.

    Attributes:
        concurrency: Prompts under way at a time, over all threads; vLLM batches them itself. More
            fills its batches better, until its queue only grows.
        request_s: For one answer, waiting in the server's queue included; then it counts as failed.
        connect_s: For a connection.
        attempts: Tries per prompt, the first included. Only what may pass by itself is tried again:
            no connection, 429, and 5xx.
        backoff_s: Longest wait before the second try; it doubles with each try. The wait is drawn
            at random below it, so that many learners don't come back at the same moment.
        longest_backoff_s: Where the doubling ends.
    """

    concurrency: int = 32
    request_s: float = 600.0
    connect_s: float = 5.0
    attempts: int = 6
    backoff_s: float = 1.0
    longest_backoff_s: float = 30.0


class HttpLearningEngine:
    """Answers prompts through a vLLM; safe to use from several threads.

    Give it the vLLM itself, never a guard: a guard would corrupt what the learner measures.
    Nothing is sent before the first use. Close it, or use it in a `with` block.

    Args:
        url: Where vLLM serves, e.g. `http://127.0.0.1:8001`; a trailing `/v1` is allowed.
        model: Name to ask for; None takes the first of `/v1/models` that is no LoRA adapter.
        api_key: The key that vLLM was started with.
        limits: Concurrency, timeouts and retries.
        embeds_dtype: dtype of the model's embedding table, in which embeddings are sent; those
            that don't fit it are sent as float32, exactly as the guard does when serving.

    Raises:
        ConfigError: The URL is none.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        limits: HttpLimits | None = None,
        embeds_dtype: EmbedsDtype = "float32",
    ) -> None:
        self._limits = limits or HttpLimits()
        self._dtype: EmbedsDtype = embeds_dtype
        timeouts = VllmTimeouts(connect=self._limits.connect_s, read=self._limits.request_s)
        self._engine = VllmEngine(url, api_key, timeouts, max_connections=self._limits.concurrency)
        self.url = self._engine.url
        self._model = model
        self._places = asyncio.Semaphore(self._limits.concurrency)
        self._naming = asyncio.Lock()
        self._loop = asyncio.new_event_loop()
        self._closing, self._closed = Lock(), False
        self._thread = Thread(target=self._loop.run_forever, name="learning-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def model(self) -> str:
        """Name of the model that is asked; the first use asks the server for it.

        Raises:
            EngineError: The server can't be reached or serves no model.
        """
        return self._run(self._model_name())

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        """Answer each prompt, many at a time.

        Args:
            prompts: Chat prompts; a message's content may be embeddings.
            params: How to draw. With a seed, each prompt draws from the same stream.
                `logprobs` has no effect.

        Returns:
            The answers, in the order of the prompts, without end-of-turn token and stop string.

        Raises:
            EngineRefusedError: The server found a prompt wrong, or still failed at the last try.
            EngineBusyError: Its queue was full at every try.
            EngineUnavailableError: It could not be reached at any try.
            EngineTimeoutError: An answer took too long; the server may be overloaded.
        """
        return self._run(self._answer_all(prompts, params))

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        """Not to be had over HTTP.

        Raises:
            ConfigError: Always.
        """
        _no_likelihood(self.url)

    def close(self) -> None:
        """Drop the connections, and with them all running generations; harmless when done."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(_CLOSE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_CLOSE_S)
        self._loop.close()

    # --- Between the threads and the loop --------------------------------------------------------

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        with self._closing:
            if self._closed:
                work.close()
                raise EngineUnavailableError(f"the engine at {self.url} was closed")
            future = asyncio.run_coroutine_threadsafe(work, self._loop)
        return self._wait(future)

    def _wait(self, future: Future[Result]) -> Result:
        try:
            return future.result()
        except CancelledError as error:
            raise EngineUnavailableError(f"the engine at {self.url} was closed") from error
        except BaseException:
            future.cancel()  # Ctrl-C: closes the connections, at which vLLM stops generating.
            raise

    async def _stop(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._engine.close()

    # --- Within the loop -------------------------------------------------------------------------

    async def _answer_all(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        if not prompts:
            return []
        model = await self._model_name()
        failures: tuple[Exception, ...] = ()
        tasks: list[asyncio.Task[str]] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks += [group.create_task(self._answer(model, p, params)) for p in prompts]
        except ExceptionGroup as failed:
            failures = failed.exceptions
        if failures:  # The group has cancelled the others; one cause says more than a bundle.
            raise failures[0]
        return [task.result() for task in tasks]

    async def _answer(self, model: str, prompt: Prompt, params: SamplingParams) -> str:
        async with self._places:
            body = _body(model, prompt, params, self._dtype)
            return await self._patiently(self._post, body)

    async def _model_name(self) -> str:
        async with self._naming:
            if self._model is None:
                names = await self._patiently(self._names)
                if not names:
                    raise EngineUnavailableError(f"vLLM at {self.url} serves no model")
                self._model = names[0]
            return self._model

    async def _names(self) -> list[str]:
        await self._engine.start()
        return await self._engine.models()

    async def _post(self, body: bytes) -> str:
        await self._engine.start()
        try:
            async with asyncio.timeout(self._limits.request_s):
                response = await self._engine.post(CHAT, body, _JSON)
                try:
                    raw = await response.read()
                finally:
                    await response.aclose()
        except TimeoutError as error:
            if isinstance(error, EngineError):
                raise
            raise EngineTimeoutError(
                f"vLLM at {self.url} did not answer within {self._limits.request_s:g} s; ask for "
                "fewer prompts at a time or allow more time"
            ) from error
        return _text(self.url, response, raw)

    async def _patiently(
        self,
        work: Callable[Arguments, Awaitable[Result]],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        limits = self._limits
        tries = AsyncRetrying(
            stop=stop_after_attempt(limits.attempts),
            wait=_Backoff(limits),
            retry=retry_if_exception(_may_pass),
            before_sleep=before_sleep_log(log, logging.WARNING),
            reraise=True,
        )
        return await tries(work, *args, **kwargs)


class _Backoff:
    """Random exponential waits, and never less than the server asks for."""

    def __init__(self, limits: HttpLimits) -> None:
        self._waits = wait_random_exponential(limits.backoff_s, limits.longest_backoff_s)

    def __call__(self, state: RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.retry_after_s if isinstance(error, EngineBusyError) else 0
        return max(self._waits(state), asked)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, EngineRefusedError):
        return error.status >= 500
    if isinstance(error, EngineTimeoutError):
        # Only while connecting: a slow server that is asked again has even more to do.
        return isinstance(error.__cause__, aiohttp.ConnectionTimeoutError)
    return isinstance(error, (EngineBusyError, EngineUnavailableError))


def _body(model: str, prompt: Prompt, params: SamplingParams, dtype: EmbedsDtype) -> bytes:
    fields: dict[str, Any] = {
        "model": model,
        "messages": [_message(message, dtype) for message in prompt],
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    if params.stop:
        fields["stop"] = list(params.stop)
    if params.seed is not None:
        fields["seed"] = params.seed
    return json.dumps(fields).encode()


def _message(message: Message, dtype: EmbedsDtype) -> dict[str, Any]:
    content = message.content
    if isinstance(content, EmbedsPart):
        rows = content.embeddings
        data = embeds_part(rows, best_dtype(rows, dtype))
        return {"role": message.role, "content": [{"type": "prompt_embeds", "data": data}]}
    return {"role": message.role, "content": content}


def _text(url: str, response: EngineResponse, raw: bytes) -> str:
    if response.status == 429:
        asked = dict(response.headers).get("retry-after", "")
        seconds = min(int(asked), _LONGEST_RETRY_AFTER_S) if asked.isdecimal() else 0
        raise EngineBusyError(f"vLLM at {url} is busy (429)", seconds)
    if response.status != 200:
        raise EngineRefusedError(response.status, raw)
    try:
        text = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(
            f"{url}{CHAT} did not answer as vLLM does ({type(error).__name__}); is it vLLM?"
        ) from error
    return text if isinstance(text, str) else ""


def _no_likelihood(url: str) -> NoReturn:
    raise ConfigError(
        f"{url} is a server: over HTTP there are only answers, no likelihood of a given answer "
        "(vLLM refuses prompt_logprobs beside prompt embeddings). Objectives that read answers, "
        "such as rouge-l, work; for probability, truth-ratio or multiple-choice, run the model in "
        "this process (--engine embedded)"
    )
