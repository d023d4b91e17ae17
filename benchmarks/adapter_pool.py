"""The pool of adapters when there are more than it may load: hits, and what a miss costs.

    python -m benchmarks.adapter_pool --upstream URL --model DIR --out DIR

Random adapters on the attention of every layer, each request answered with one of them, drawn
evenly or by Zipf's law (the k-th most wanted is wanted 1/k as often). One request at a time and one
token an answer, so that the difference between two rows is the adapter's doing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks.report import Row, write_module_report
from guard.console import progress_display
from guard.errors import EngineError
from guard.types import AdapterUse, BoolArray, FloatArray, IntArray, Progress
from server.engines.adapter_choice import AdapterOptions
from server.engines.vllm import VllmEngine

CHAT: Final = "/v1/chat/completions"
JSON: Final = {"content-type": "application/json"}
PROJECTIONS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
WARM_UP: Final = 5
BARE: Final = 50


@dataclass(frozen=True, slots=True)
class Traffic:
    """What was asked in one run.

    Attributes:
        name: Of the law.
        max_loaded: How many adapters the pool may load at one time.
        wanted: Number of the adapter of each request.
    """

    name: str
    max_loaded: int
    wanted: IntArray


@dataclass(frozen=True, slots=True)
class _Timed:
    """Milliseconds of a run's requests: without adapters, and with; which of these were hits."""

    bare: FloatArray
    times: FloatArray
    hits: BoolArray
    load_ms: float
    loaded: int


def draw(law: str, adapters: int, requests: int, seed: int) -> IntArray:
    """Draw which adapter each request wants, `uniform` or `zipf`; shape (requests,)."""
    shares = np.ones(adapters) if law == "uniform" else 1 / np.arange(1, adapters + 1)
    drawn = np.random.default_rng(seed).choice(adapters, requests, p=shares / shares.sum())
    return drawn.astype(np.int64)


def write_adapters(model: Path, out: Path, count: int, rank: int, seed: int) -> list[AdapterUse]:
    """Write random adapters that fit a model's attention, in 16 bit.

    Args:
        model: The model's directory; its weights' names and shapes are read.
        out: Where to write them.
        count: How many.
        rank: Of each.
        seed: Of their values.
    """
    shapes = _projection_shapes(model)
    rng = np.random.default_rng(seed)
    uses = []
    for number in range(count):
        path = out / f"adapter-{number}"
        path.mkdir(parents=True)
        tensors = {}
        for module, (rows, columns) in shapes.items():
            name = f"base_model.model.{module}"
            down, up = rng.standard_normal((rank, columns)), rng.standard_normal((rows, rank))
            tensors[f"{name}.lora_A.weight"] = down.astype(np.float16)
            tensors[f"{name}.lora_B.weight"] = (up / 100).astype(np.float16)
        save_file(tensors, path / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
        text = json.dumps({**config, "target_modules": list(PROJECTIONS)})
        (path / "adapter_config.json").write_text(text)
        uses.append(AdapterUse(f"random-{number}", path, rank, 1.0))
    return uses


def _projection_shapes(model: Path) -> dict[str, tuple[int, int]]:
    shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dictionary
                module = name.removesuffix(".weight")
                if module.endswith(PROJECTIONS):
                    rows, columns = weights.get_slice(name).get_shape()
                    shapes[module] = (rows, columns)
    return shapes


async def measure(
    url: str, uses: Sequence[AdapterUse], traffic: Traffic, progress: Progress
) -> list[Row]:
    """Send one run's requests and return its figures."""
    options = AdapterOptions(strengths=1, max_loaded=traffic.max_loaded)
    engine = VllmEngine(url, adapters=options)
    await engine.start()
    try:
        model = (await engine.models())[0]
        bare = [await _ask(engine, model, (), -n) for n in range(WARM_UP + BARE)][WARM_UP:]
        start = time.perf_counter()
        await engine.sync_adapters(uses)
        load_ms, loaded = (time.perf_counter() - start) * 1000, engine.adapters_loaded
        times, hits = [], []
        for number, wanted in enumerate(traffic.wanted):
            before = engine.adapter_counts.hits
            times.append(await _ask(engine, model, [uses[wanted]], number))
            hits.append(engine.adapter_counts.hits > before)
            progress(
                f"{traffic.name}, {traffic.max_loaded} loaded", number + 1, len(traffic.wanted)
            )
        found = _Timed(np.array(bare), np.array(times), np.array(hits), load_ms / loaded, loaded)
        return _rows(traffic, found, engine.adapter_counts.evictions)
    finally:
        await engine.close()


async def _ask(
    engine: VllmEngine, model: str, adapters: Sequence[AdapterUse], number: int
) -> float:
    """Return the milliseconds of an answer; its number keeps vLLM's prefix cache out of it."""
    messages = [{"role": "system", "content": f"Request {number}."}]
    messages += [{"role": "user", "content": "Who are you?"}]
    body = {"model": model, "messages": messages, "max_tokens": 1, "temperature": 0}
    start = time.perf_counter()
    response = await engine.post(CHAT, json.dumps(body).encode(), JSON, adapters)
    answer = await response.read()
    if response.status != 200:
        raise EngineError(f"vLLM answered {response.status}: {answer[:300]!r}")
    return (time.perf_counter() - start) * 1000


def _rows(traffic: Traffic, found: _Timed, evictions: int) -> list[Row]:
    system, n = f"{traffic.name}, {traffic.max_loaded} loaded", len(found.times)
    rows = [
        Row(system, "vllm", "hit_rate", "all", float(found.hits.mean()), None, None, n),
        Row(system, "vllm", "evictions", "all", float(evictions), None, None, n),
        Row(system, "vllm", "load_ms", "at the start", found.load_ms, None, None, found.loaded),
    ]
    hit, miss = found.times[found.hits], found.times[~found.hits]
    for group, values in (("no adapter", found.bare), ("hit", hit), ("miss", miss)):
        for quantile in (50, 95):
            value = float(np.percentile(values, quantile)) if len(values) else None
            name = f"latency_p{quantile}_ms"
            rows.append(Row(system, "vllm", name, group, value, None, None, len(values)))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what the command line asks for and write the report."""
    args = _parser().parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder, progress_display() as progress:
        uses = write_adapters(args.model, Path(folder), args.adapters, args.rank, args.seed)
        for max_loaded in args.max_loaded:
            for law in ("uniform", "zipf"):
                wanted = draw(law, args.adapters, args.requests, args.seed)
                traffic = Traffic(law, max_loaded, wanted)
                rows += asyncio.run(measure(args.upstream, uses, traffic, progress))
    write_module_report(
        args.out, "benchmarks.adapter_pool", arguments, rows, seed=args.seed, vllm=args.vllm
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--upstream", required=True, help="URL of a vLLM that loads adapters")
    parser.add_argument("--model", type=Path, required=True, help="directory of its model")
    parser.add_argument("--vllm", default="0.32.0", help="its version, for the report")
    parser.add_argument("--adapters", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-loaded", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
