"""The embedded engine behind the proxy: OpenAI JSON in, OpenAI JSON or events out."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from guard.errors import EngineError, EngineUnavailableError, RequestError
from server.engines.base import EngineResponse
from server.engines.embedded.openai_answers import DONE, Answer, error_body, error_event
from server.engines.embedded.openai_api import Job, parse_job
from server.engines.embedded.steps import Sampling, Step
from server.engines.embedded.worker import Generation, Worker

if TYPE_CHECKING:
    from server.engines.embedded.model import EmbeddedModel
    from server.engines.embedded.prompts import EncodedPrompt

log = logging.getLogger(__name__)

ADAPTER_HEADER: Final = "x-unlearn-guard-adapter"
SCALE_HEADER: Final = "x-unlearn-guard-adapter-scale"


@dataclass(frozen=True, slots=True)
class _Adapter:
    """Which LoRA runs, and how strongly; no path is the base."""

    path: Path | None = None
    scale: float = 1.0


class EmbeddedEngine:
    """Serves one model from this process; implements `server.engines.base.Engine`.

    One generation runs at a time, in a thread of its own.

    Args:
        model_dir: Directory of the model, or its id on the Hugging Face hub.
        served_name: Name that clients ask for; the directory's name, or the id, when None.
        adapters: LoRA directories by name. Asking for the name selects the adapter; names are not
            listed.
        max_queue: Requests that may wait; one more is refused as busy.
        threads: Threads of torch's CPU kernels; None leaves torch's choice.
        max_model_len: Tokens of prompt and answer at most; None is what the model was made for.
    """

    name = "embedded"

    def __init__(
        self,
        model_dir: str | Path,
        served_name: str | None = None,
        adapters: Mapping[str, Path] | None = None,
        max_queue: int = 16,
        threads: int | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self._model_dir, self._threads = model_dir, threads
        given = Path(model_dir)
        self.served_name = served_name or (given.name if given.is_dir() else str(model_dir))
        self._adapters = dict(adapters or {})
        self._max_queue, self._max_model_len = max_queue, max_model_len
        self._model: EmbeddedModel | None = None
        self._worker: Worker | None = None
        self._starting = asyncio.Lock()

    @property
    def model(self) -> EmbeddedModel:
        """The loaded model, for learners and benchmarks in the same process.

        Raises:
            EngineUnavailableError: The engine was not started.
        """
        if self._model is None:
            raise EngineUnavailableError("the embedded engine is not started")
        return self._model

    async def start(self) -> None:
        """Load the model, in the worker's thread.

        Raises:
            ArtifactError: It can't be loaded.
        """
        async with self._starting:
            if self._worker is not None:
                return
            worker = Worker(self._max_queue)
            try:
                await worker.run(self._load)
            except BaseException:
                await worker.close()
                raise
            self._worker = worker

    async def close(self) -> None:
        """Cancel what runs and give the model back."""
        async with self._starting:
            worker, self._worker = self._worker, None
            if worker is not None:
                await worker.close()
            self._model = None

    async def health(self) -> None:
        """Return if the model is loaded; see `Engine.health`."""
        self._running()

    async def models(self) -> list[str]:
        """Return the one public name."""
        return [self.served_name]

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> EngineResponse:
        """Answer a request; see `Engine.post`.

        An answer that isn't streamed is generated before this returns.

        Raises:
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine is not started.
            EngineError: The generation failed.
        """
        worker, model = self._running(), self.model
        worker.check_room()
        try:
            job = await asyncio.to_thread(parse_job, path, body, model.vocab_size)
            adapter = self._select(job.model, headers)
            prompts = await asyncio.to_thread(self._encode, model, job)
        except RequestError as error:
            return json_response(error.status, error_body(error))
        generation = worker.submit(_generator(model, job, prompts, adapter))
        answer = Answer(job, job.model, [len(prompt.ids) for prompt, _ in prompts])
        if job.stream:
            chunks = _Events(generation, answer)
            return EngineResponse(200, _headers("text/event-stream; charset=utf-8"), chunks)
        return json_response(200, await _whole(generation, answer))

    def _load(self) -> None:
        from server.engines.embedded.model import EmbeddedModel

        self._model = EmbeddedModel.load(self._model_dir, threads=self._threads)

    def _running(self) -> Worker:
        if self._worker is None:
            raise EngineUnavailableError("the embedded engine is not started")
        return self._worker

    def _encode(self, model: EmbeddedModel, job: Job) -> list[tuple[EncodedPrompt, Sampling]]:
        context = min(self._max_model_len or model.max_model_len, model.max_model_len)
        return [(prompt, job.fit(prompt, context)) for prompt in job.encode(model.encoder)]

    def _select(self, model: str, headers: Mapping[str, str]) -> _Adapter:
        """Choose the adapter by model name or by the proxy's own headers."""
        lowered = {key.lower(): value for key, value in headers.items()}
        name = lowered.get(ADAPTER_HEADER)
        if model != self.served_name:
            name = model
        if name is None:
            return _Adapter()
        if name not in self._adapters:
            raise RequestError(
                f"The model `{name}` does not exist.",
                status=404,
                code="model_not_found",
                param="model",
            )
        try:
            scale = float(lowered.get(SCALE_HEADER, "1"))
        except ValueError:
            raise RequestError(f"{SCALE_HEADER} must be a number") from None
        if not math.isfinite(scale):
            raise RequestError(f"{SCALE_HEADER} must be finite, got {scale}")
        return _Adapter(self._adapters[name], scale)


class _Events:
    """The events of a streamed answer.

    A class and not an async generator, because a generator that was never begun can't clean up.
    """

    def __init__(self, generation: Generation, answer: Answer) -> None:
        self._generation = generation
        self._events = self._write(answer)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await self._events.__anext__()

    async def aclose(self) -> None:
        """Cancel the generation."""
        self._generation.cancel()
        await self._events.aclose()

    async def _write(self, answer: Answer) -> AsyncGenerator[bytes, None]:
        steps = self._generation.steps()
        try:
            first = True
            async for step in steps:
                if first:
                    first = False
                    for event in answer.opening():
                        yield event
                yield answer.event(step)
            for event in answer.closing():
                yield event
        except EngineError as error:
            log.error("a streamed generation failed: %s", error)
            yield error_event(str(error))
            yield DONE
        finally:
            await steps.aclose()


def _generator(
    model: EmbeddedModel,
    job: Job,
    prompts: list[tuple[EncodedPrompt, Sampling]],
    adapter: _Adapter,
) -> Callable[[Callable[[], bool]], Generator[Step, None, None]]:
    """Return what makes the steps of all prompts, one prompt after the other."""

    def generate(cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        for index, (prompt, sampling) in enumerate(prompts):
            steps = model.stream(
                prompt,
                sampling,
                job.n,
                adapter=adapter.path,
                scale=adapter.scale,
                cancelled=cancelled,
            )
            with closing(steps):
                for step in steps:
                    yield replace(step, row=index * job.n + step.row)

    return generate


async def _whole(generation: Generation, answer: Answer) -> bytes:
    steps = generation.steps()
    try:
        async for step in steps:
            answer.add(step)
    finally:
        generation.cancel()
        await steps.aclose()
    return answer.body()


def json_response(status: int, body: bytes) -> EngineResponse:
    """Return an answer that is whole."""
    headers = [*_headers("application/json"), ("content-length", str(len(body)))]
    return EngineResponse(status, headers, _once(body))


def _headers(content_type: str) -> list[tuple[str, str]]:
    return [("content-type", content_type)]


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
