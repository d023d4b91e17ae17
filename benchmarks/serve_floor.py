"""How late streams are that a bare relay passes on while something else runs beside its loop.

    python -m benchmarks.serve_floor --encoder bundles/example/000001/encoder --rounds 5

The relay has no guard. What `bench serve` finds of the guard's streams, its detectors being busy,
can be no better than what is found here: of a thread that keeps Python busy, of one that runs the
encoder, and of the same in a process of its own. All have one core, as in `bench serve`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from benchmarks.serve_load import Job
from benchmarks.serve_process import Client, Cores, Server, free_port
from benchmarks.serve_relay import BESIDE

_STREAMS, _CHUNKS = 4, 100


def main() -> None:
    """Print the delays of each, and their ratios to those of no relay in the same round."""
    parser = argparse.ArgumentParser(description="Delays of streams through a bare relay.")
    parser.add_argument("--encoder", type=Path, required=True, help="Folder of its files.")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found: dict[str, list[list[float]]] = defaultdict(list)
    with ExitStack() as stack:
        work, cores = Path(stack.enter_context(tempfile.TemporaryDirectory())), Cores.pick()
        upstream = free_port()
        words = [sys.executable, "-m", "benchmarks.mock_upstream", "--port", str(upstream)]
        _start(stack, words, upstream, cores.client, work / "mock.log")
        client = stack.enter_context(Client({"plain": ["Say"]}, cores.client))
        relay = [sys.executable, "-m", "benchmarks.serve_relay"]
        relay += ["--upstream", f"http://127.0.0.1:{upstream}", "--encoder", str(options.encoder)]
        for turn in range(options.rounds):
            found["direct"].append(_delays(client, upstream, upstream, turn))
            for beside in (None, *BESIDE):
                port, own = free_port(), [] if beside is None else ["--beside", beside]
                with ExitStack() as running:
                    words = [*relay, "--port", str(port), *own]
                    _start(running, words, port, cores.server, work / "relay.log")
                    found[f"relay, {beside or 'alone'}"].append(
                        _delays(client, port, upstream, turn)
                    )
    _show(found)


def _start(stack: ExitStack, words: list[str], port: int, cores: frozenset[int], log: Path) -> None:
    """Run a server of ours until the stack unwinds; it serves once it passes a question on."""
    stack.enter_context(Server(words, port, "/health", cores, log)).wait()


def _delays(client: Client, port: int, upstream: int, turn: int) -> list[float]:
    """Follow paced streams, and return how late each of their words was, in milliseconds."""
    start = turn * _STREAMS
    return client.run(
        Job(streams=_STREAMS, chunks=_CHUNKS, upstream=upstream, port=port, start=start)
    ).delays_ms


def _show(found: dict[str, list[list[float]]]) -> None:
    """Print medians of the rounds' figures, and of their ratios."""
    figures = {
        name: np.array([np.percentile(one, (50, 99)) for one in rounds])
        for name, rounds in found.items()
    }
    for name, rows in figures.items():
        p50, p99 = np.median(rows, axis=0)
        ratio = float(np.median(rows[:, 1] / figures["direct"][:, 1]))
        line = {"system": name, "p50_ms": round(p50, 3), "p99_ms": round(p99, 3)}
        sys.stdout.write(json.dumps(line | {"p99_over_direct": round(ratio, 1)}) + "\n")


if __name__ == "__main__":
    main()
