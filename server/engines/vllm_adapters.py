"""Answers of vLLM with unlearning adapters: their secret names never leave this module.

vLLM loads adapters at run time through two routes of its own, and puts one on where a request's
`model` is its name.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from guard.errors import EngineError, EngineRefusedError, EngineUnavailableError
from guard.types import AdapterUse
from server.answer_model import Renamer, asked_model, renamed, with_model
from server.engines.adapter_choice import AdapterOptions
from server.engines.adapter_pool import AdapterPool, LoadedAdapter
from server.engines.base import EngineResponse

LOAD: Final = "/v1/load_lora_adapter"
UNLOAD: Final = "/v1/unload_lora_adapter"
START_FLAGS: Final = (
    "start it with --enable-lora --max-loras N --max-cpu-loras N --max-lora-rank R and with "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
)

Ask = Callable[[str, dict[str, Any]], Awaitable[tuple[int, bytes]]]
Exchange = Callable[[bytes], Awaitable[EngineResponse]]


class VllmAdapters:
    """What the vLLM engine does with adapters.

    Args:
        ask: Posts JSON to a route that isn't a client's, and gives status and body.
        models: Lists the public models.
        options: Where adapters are put, and how many.
    """

    def __init__(
        self, ask: Ask, models: Callable[[], Awaitable[list[str]]], options: AdapterOptions
    ) -> None:
        self._ask, self._models = ask, models
        self._served: str | None = None
        self.pool = AdapterPool(self, options)

    async def sync(self, adapters: Sequence[AdapterUse]) -> None:
        """Load what fits and give up all others; see `AdapterPool.sync`."""
        self._served = None
        await self.pool.sync(adapters)

    async def answer(
        self, body: bytes, adapters: Sequence[AdapterUse], exchange: Exchange
    ) -> EngineResponse:
        """Have a request answered with adapters.

        Args:
            body: The request's body.
            adapters: At least one, the most important first.
            exchange: Posts a body to the route that the client asked.

        Raises:
            EngineError: An adapter can't be loaded, or vLLM fails.
        """
        entry = await self.pool.acquire(adapters)
        try:
            served = await self._served_name()
            response = await self._exchanged(with_model(body, entry.name), entry, exchange)
            # vLLM answers under its first name, whichever of them was asked for; so do we, or
            # an alias would tell which answers were changed. An error repeats what was asked.
            public = asked_model(body) if response.status >= 400 else served
        except BaseException:
            self.pool.release(entry)
            raise
        renamer = Renamer(entry.name, public or "")
        return renamed(response, renamer, lambda: self.pool.release(entry))

    async def _exchanged(
        self, body: bytes, entry: LoadedAdapter, exchange: Exchange
    ) -> EngineResponse:
        """Post; if vLLM doesn't know the adapter any more, load it again and post once more."""
        times = entry.times
        response = await exchange(body)
        if response.status != 404:
            return response
        await response.aclose()
        await self.pool.reload(entry, times)
        response = await exchange(body)
        if response.status == 404:
            await response.aclose()
            raise EngineUnavailableError(
                "vLLM does not find an adapter that it has just loaded; give it "
                "--api-server-count 1, since each of its API servers knows only its own"
            )
        return response

    async def _served_name(self) -> str:
        if self._served is None:
            self._served = next(iter(await self._models()), "")
        return self._served

    async def load_adapter(self, name: str, path: str) -> None:
        """Make vLLM know an adapter.

        Raises:
            EngineError: It won't, and the message says what to change; or it can't be reached.
        """
        status, body = await self._ask(LOAD, {"lora_name": name, "lora_path": path})
        if status != 200 and not (status == 400 and b"already been loaded" in body):
            raise _refusal(status, body.replace(name.encode(), b"..."))

    async def unload_adapter(self, name: str) -> None:
        """Make vLLM forget an adapter, if it knows it.

        Raises:
            EngineError: It won't, or it can't be reached.
        """
        status, body = await self._ask(UNLOAD, {"lora_name": name})
        if status not in (200, 404):
            raise _refusal(status, body.replace(name.encode(), b"..."))


def _refusal(status: int, body: bytes) -> EngineError:
    message = _message(body)
    if message is None and status in (404, 405):
        return EngineError(f"vLLM can't load adapters at run time: {START_FLAGS}")
    if "not enabled" in (message or ""):
        return EngineError(f"vLLM was started without LoRA: {START_FLAGS}")
    if status == 404:
        return EngineError(
            "vLLM can't read the adapter's folder: set adapter_dir to a folder that it sees too, "
            f"and adapter_dir_upstream to its path there if that is another ({message})"
        )
    if "max_lora_rank" in (message or ""):
        return EngineError(f"vLLM's --max-lora-rank is too small for an adapter: {message}")
    return EngineRefusedError(status, body)


def _message(body: bytes) -> str | None:
    """Return the message of an error that is vLLM's own, not its web framework's."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return None
