"""The metrics of several processes as one text: whichever is asked, asks the others.

Every sample gets a label `worker`. Sums would go down when a worker dies, and that is what
Prometheus takes for a restart of all of them; it adds the workers up itself, `sum without
(worker)`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

log = logging.getLogger(__name__)

_WAIT_S: Final = 2.0


class WorkerMetrics:
    """One worker's side of it.

    Args:
        folder: Where the workers' sockets are; nobody else may read it.
        index: This worker's number.
        count: How many there are.
    """

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self._folder, self._index, self._count = folder, index, count
        self._server: asyncio.Server | None = None

    def count_starts(self, registry: CollectorRegistry, starts: int) -> None:
        """Report how often this worker's place was started."""
        Gauge(
            "unlearn_guard_worker_starts",
            "How often this worker was started; above 1 it died before.",
            registry=registry,
        ).set(starts)

    async def serve(self, render: Callable[[], bytes]) -> None:
        """Tell the other workers this one's metrics whenever they ask.

        Args:
            render: Returns them in Prometheus' text format.
        """

        async def tell(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(ConnectionError):
                writer.write(render())
                await writer.drain()
            writer.close()

        path = self._path(self._index)
        path.unlink(missing_ok=True)  # of one that died in this place
        try:
            self._server = await asyncio.start_unix_server(tell, path)
        except OSError as error:
            log.warning("other workers can't show this one's metrics: %s", error)

    async def gather(self, own: bytes) -> bytes:
        """Return all workers' metrics; those of one that does not answer are left out."""
        others = [index for index in range(self._count) if index != self._index]
        texts = await asyncio.gather(*(self._ask(index) for index in others))
        told = {index: text for index, text in zip(others, texts, strict=True) if text}
        return merged({self._index: own, **told})

    def close(self) -> None:
        """Tell no more."""
        if self._server is not None:
            self._server.close()

    async def _ask(self, index: int) -> bytes:
        try:
            async with asyncio.timeout(_WAIT_S):
                reader, writer = await asyncio.open_unix_connection(self._path(index))
                try:
                    return await reader.read()
                finally:
                    writer.close()
        except OSError:  # a TimeoutError is one too
            return b""

    def _path(self, index: int) -> Path:
        return self._folder / f"{index}.sock"


def merged(texts: Mapping[int, bytes]) -> bytes:
    """Put texts of metrics together, each sample labelled with its worker's number."""
    families: dict[str, Metric] = {}
    for index, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text.decode()):
            into = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            into.samples += [
                sample._replace(labels={**sample.labels, "worker": str(index)})
                for sample in family.samples
            ]
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Yield them as they are."""
        yield from self._families.values()
