"""The embedded engine behind the proxy: OpenAI JSON in, OpenAI JSON or events out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Mapping,
    Sequence,
)
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import ArtifactError, EngineError, EngineUnavailableError, RequestError
from guard.types import AdapterUse
from server.engines.base import EngineResponse
from server.engines.embedded.openai_answers import DONE, Answer, error_body, error_event
from server.engines.embedded.openai_api import Job, parse_job
from server.engines.embedded.steps import Sampling, Step
from server.engines.embedded.worker import Generation, Worker

if TYPE_CHECKING:
    from server.engines.embedded.lora import LoadedAdapters
    from server.engines.embedded.model import EmbeddedModel
    from server.engines.embedded.prompts import EncodedPrompt

log = logging.getLogger(__name__)


class EmbeddedEngine:
    """Serves one model from this process; implements `server.engines.base.Engine`.

    One generation runs at a time, in a thread of its own.

    Args:
        model_dir: Directory of the model, or its id on the Hugging Face hub.
        served_name: Name that clients ask for; the directory's name, or the id, when None.
        max_queue: Requests that may wait; one more is refused as busy.
        threads: Threads of torch's CPU kernels; None leaves torch's choice.
        max_model_len: Tokens of prompt and answer at most; None is what the model was made for.
    """

    name = "embedded"

    def __init__(
        self,
        model_dir: str | Path,
        served_name: str | None = None,
        max_queue: int = 16,
        threads: int | None = None,
        max_model_len: int | None = None,
    ) -> None:
        self._model_dir, self._threads = model_dir, threads
        given = Path(model_dir)
        self.served_name = served_name or (given.name if given.is_dir() else str(model_dir))
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

    async def sync_adapters(self, adapters: Sequence[AdapterUse]) -> None:
        """Check that each adapter fits the model; see `Engine.sync_adapters`.

        Their matrices are read when they are first asked for.

        Raises:
            EngineUnavailableError: The engine is not started.
            EngineError: An adapter can't be loaded.
        """
        await asyncio.to_thread(_sync, self.model, tuple(adapters))

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        """Answer a request, with all the adapters at their exact weights; see `Engine.post`.

        An answer that isn't streamed is generated before this returns.

        Raises:
            EngineBusyError: The queue is full.
            EngineUnavailableError: The engine is not started.
            EngineError: The generation failed, or an adapter can't be loaded.
        """
        worker, model = self._running(), self.model
        worker.check_room()
        try:
            job = await asyncio.to_thread(self._parse, path, body)
            prompts = await asyncio.to_thread(self._encode, model, job)
        except RequestError as error:
            return json_response(error.status, error_body(error))
        loaded = await asyncio.to_thread(load_adapters, model, adapters)
        generation = worker.submit(_generator(model, job, prompts, loaded))
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

    def _parse(self, path: str, body: bytes) -> Job:
        job = parse_job(path, body, self.model.vocab_size)
        if job.model != self.served_name:
            raise RequestError(
                f"The model `{job.model}` does not exist.",
                status=404,
                code="model_not_found",
                param="model",
            )
        return job


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
    adapters: LoadedAdapters,
) -> Callable[[Callable[[], bool]], Generator[Step, None, None]]:
    """Return what makes the steps of all prompts, one prompt after the other."""

    def generate(cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        for index, (prompt, sampling) in enumerate(prompts):
            steps = model.stream(prompt, sampling, job.n, adapters=adapters, cancelled=cancelled)
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


def load_adapters(model: EmbeddedModel, adapters: Sequence[AdapterUse]) -> LoadedAdapters:
    """Read the adapters of a request.

    Done when the request comes and not when its turn does: by then a reload of the bundle may have
    deleted their files.

    Raises:
        EngineError: One can't be loaded.
    """
    try:
        return model.lora.load(adapters)
    except ArtifactError as error:
        raise _unusable(error) from error


def _sync(model: EmbeddedModel, adapters: Sequence[AdapterUse]) -> None:
    try:
        for use in adapters:
            model.lora.check(use)
    except ArtifactError as error:
        raise _unusable(error) from error
    model.lora.keep_only(adapters)


def _unusable(error: ArtifactError) -> EngineError:
    return EngineError(
        f"{error}; learn the adapter again for the model that is served, or give its target a "
        "route without one"
    )


def json_response(status: int, body: bytes) -> EngineResponse:
    """Return an answer that is whole."""
    headers = [*_headers("application/json"), ("content-length", str(len(body)))]
    return EngineResponse(status, headers, _once(body))


def _headers(content_type: str) -> list[tuple[str, str]]:
    return [("content-type", content_type)]


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body
