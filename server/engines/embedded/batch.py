"""The embedded engine for many clients that wait for whole answers: requests run as batches.

For benchmarks: on a CPU, thirty-two answers take little longer than one. Requests that arrive
while a batch runs make the next one; a batch has one set of adapters at one weight each. Streamed
requests go the ordinary way, one at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Final

from guard.errors import EngineError, RequestError
from guard.types import AdapterUse
from server.engines.base import EngineResponse
from server.engines.embedded.engine import EmbeddedEngine, json_response, load_adapters
from server.engines.embedded.lora import LoadedAdapters
from server.engines.embedded.model import EmbeddedModel
from server.engines.embedded.openai_answers import Answer, error_body
from server.engines.embedded.openai_api import Job
from server.engines.embedded.prompts import EncodedPrompt
from server.engines.embedded.steps import Sampling, Step

WINDOW_S: Final = 0.05
"""Wait for further requests before a batch begins."""

Encoded = tuple[EncodedPrompt, Sampling]


@dataclass(slots=True)
class _Waiting:
    """One request, and where its answer goes."""

    job: Job
    prompts: list[Encoded]
    adapters: LoadedAdapters
    answer: Answer
    done: asyncio.Future[bytes]

    @property
    def rows(self) -> list[Encoded]:
        return [prompt for prompt in self.prompts for _ in range(self.job.n)]


class BatchEngine(EmbeddedEngine):
    """An `EmbeddedEngine` that answers together what may be answered whole."""

    _waiting: list[_Waiting]
    _runner: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the model; see `EmbeddedEngine.start`."""
        await super().start()
        self._waiting = []

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        """Answer a request; see `Engine.post`.

        Raises:
            EngineUnavailableError: The engine is not started.
            EngineError: The generation failed, or an adapter can't be loaded.
        """
        model = self.model
        try:
            job = await asyncio.to_thread(self._parse, path, body)
            if job.stream:
                return await super().post(path, body, headers, adapters)
            prompts = await asyncio.to_thread(self._encode, model, job)
        except RequestError as error:
            return json_response(error.status, error_body(error))
        loaded = await asyncio.to_thread(load_adapters, model, adapters)
        answer = Answer(job, job.model, [len(prompt.ids) for prompt, _ in prompts])
        done: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(job, prompts, loaded, answer, done)
        self._waiting.append(waiting)
        if self._runner is None or self._runner.done():
            self._runner = asyncio.create_task(self._run())
        return json_response(200, await waiting.done)

    async def _run(self) -> None:
        """Answer what waits, batch after batch."""
        while True:
            await asyncio.sleep(WINDOW_S)
            waiting = [one for one in self._waiting if not one.done.done()]
            self._waiting.clear()
            if not waiting:
                return
            for batch in _alike(waiting):
                await self._settle(batch)

    async def _settle(self, batch: Sequence[_Waiting]) -> None:
        try:
            await self._answer(batch)
        except Exception as error:
            for one in batch:
                if not one.done.done():
                    one.done.set_exception(EngineError(f"the batch failed: {error}"))

    async def _answer(self, batch: Sequence[_Waiting]) -> None:
        rows = [row for one in batch for row in one.rows]
        owners = [(one, place) for one in batch for place in range(len(one.rows))]
        generate = _generator(self.model, rows, batch[0].adapters)
        generation = self._running().submit(generate)
        steps = generation.steps()
        try:
            async for step in steps:
                owner, place = owners[step.row]
                owner.answer.add(replace(step, row=place))
        finally:
            generation.cancel()
            await steps.aclose()
        for one in batch:
            if not one.done.done():
                one.done.set_result(one.answer.body())


def _alike(waiting: Sequence[_Waiting]) -> list[list[_Waiting]]:
    """Put together what runs with the same adapters at the same weights; first come first."""
    batches: dict[tuple[AdapterUse, ...], list[_Waiting]] = {}
    for one in waiting:
        batches.setdefault(one.adapters.uses, []).append(one)
    return list(batches.values())


def _generator(
    model: EmbeddedModel, rows: Sequence[Encoded], adapters: LoadedAdapters
) -> Callable[[Callable[[], bool]], Generator[Step, None, None]]:
    def generate(cancelled: Callable[[], bool]) -> Generator[Step, None, None]:
        steps = model.generate_rows(rows, cancelled, adapters)
        with closing(steps):
            yield from steps

    return generate
