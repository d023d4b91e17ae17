"""What `bench serve` sets beside one another: the bare upstream, a relay, the guard, its peers."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from benchmarks.mock_upstream import MODEL
from benchmarks.serve_process import Cores, Server, free_port
from guard.bundle import BundleStore
from guard.errors import ConfigError
from guard.keys import GuardKey, default_key_file
from guard.types import Progress

DIRECT, RELAY, OFF, GUARD = "direct", "relay", "guard, detection off", "guard"
LITELLM, ROUTER = "litellm", "vllm-router"
API_KEY: Final = "sk-bench-0b6f1d3c9a7e4825f1c0"


@dataclass(frozen=True, slots=True)
class BundlePlace:
    """A bundle and the file of its key."""

    path: Path
    key_file: Path

    @classmethod
    def of(cls, path: Path, key_file: Path | None = None) -> BundlePlace:
        """Take a bundle with its own key, or with the one that is given."""
        return cls(path, key_file or default_key_file(path))


@dataclass(frozen=True, slots=True)
class Arms:
    """What to measure.

    Attributes:
        bundle: The bundle of the guard with its detectors on.
        many: A bundle with many targets, to compare with.
        variants: Settings of further guards over the same bundle, by name.
        litellm: Its program; None leaves it out.
        router: vllm-router's program; None leaves it out.
        model: Model files that the guard enforces with; None is the packaged model.
    """

    bundle: BundlePlace
    many: BundlePlace | None = None
    variants: Sequence[tuple[str, str]] = ()
    litellm: str | None = None
    router: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """One thing that is measured.

    Attributes:
        name: Its system in the report.
        port: Where it listens.
        server: Its process; the upstream itself has none to be charged.
        kind: What it is: `direct`, `relay`, `off`, `on`, `variant`, `many` or `peer`.
        rss_start_mb: What it held before it was asked anything.
    """

    name: str
    port: int
    server: Server | None
    kind: str
    rss_start_mb: float = 0.0


@dataclass(slots=True)
class Running:
    """All that runs: the arms, and the mock behind them."""

    upstream: int
    arms: list[Arm] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Arm]:
        """Return the arms of some kinds."""
        return [arm for arm in self.arms if arm.kind in kinds]


@contextmanager
def running(
    arms: Arms, work: Path, cores: Cores, progress: Progress, only: Collection[str] | None = None
) -> Iterator[Running]:
    """Start everything, one after another, and stop it when the block ends.

    Args:
        arms: What to start.
        work: Folder for logs and made files.
        cores: Where servers, and client and mock, run.
        progress: Told how far it is.
        only: Kinds that are started beside the mock; None is all.

    Raises:
        EngineError: If something doesn't start.
    """
    with ExitStack() as stack:
        port = free_port()
        words = [sys.executable, "-m", "benchmarks.mock_upstream", "--port", str(port)]
        mock = Server(words, port, "/health", cores.client, work / "mock.log")
        stack.enter_context(mock)
        mock.wait()
        found = Running(port, [Arm(DIRECT, port, None, "direct")])
        plans = [plan for plan in _plans(arms, work, port) if only is None or plan[1] in only]
        for number, (name, kind, words, ready, environ) in enumerate(plans):
            progress("serve: starting", number, len(plans))
            own = free_port()
            filled = [word.replace("{port}", str(own)) for word in words]
            log = work / f"{number}-{name.partition(',')[0]}.log"
            server = stack.enter_context(Server(filled, own, ready, cores.server, log, environ))
            server.wait()
            found.arms.append(Arm(name, own, server, kind, server.rss_mb()))
        progress("serve: starting", len(plans), len(plans))
        yield found


_Plan = tuple[str, str, list[str], str, dict[str, str]]
"""Name, kind, command line with `{port}`, path that is ready, environment."""


def _plans(arms: Arms, work: Path, upstream: int) -> Iterator[_Plan]:
    """Yield what to start after the mock."""
    url, plain = f"http://127.0.0.1:{upstream}", dict(os.environ)
    relay = [sys.executable, "-m", "benchmarks.serve_relay", "--port", "{port}"]
    yield RELAY, "relay", [*relay, "--upstream", url], "/health", plain
    empty = without_targets(arms.bundle, work / "no-targets")
    yield _guard_plan(OFF, "off", empty, arms, work, url)
    yield _guard_plan(GUARD, "on", arms.bundle, arms, work, url)
    for name, value in arms.variants:
        system = f"{GUARD}, {name}={value}"
        yield _guard_plan(system, "variant", arms.bundle, arms, work, url, {name: value})
    if arms.many is not None:
        count = count_targets(arms.many)
        yield _guard_plan(f"{GUARD}, {count} targets", "many", arms.many, arms, work, url)
    if arms.litellm is not None:
        config = _litellm_config(work / "litellm.yaml", url)
        words = [arms.litellm, "--config", str(config), "--host", "127.0.0.1"]
        words += ["--port", "{port}", "--num_workers", "1"]
        environ = {"LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False"}
        yield LITELLM, "peer", words, "/health/liveliness", plain | environ
    if arms.router is not None:
        words = [arms.router, "--host", "127.0.0.1", "--port", "{port}", "--worker-urls", url]
        words += ["--policy", "round_robin", "--log-level", "error"]
        words += ["--prometheus-port", str(free_port())]
        yield ROUTER, "peer", words, "/health", plain


def _guard_plan(
    name: str,
    kind: str,
    bundle: BundlePlace,
    arms: Arms,
    work: Path,
    url: str,
    settings: Mapping[str, str] | None = None,
) -> _Plan:
    """Plan the product as its users start it, with keys, limits, logs and metrics on."""
    program = Path(sys.executable).with_name("unlearn-guard")
    if not program.exists():
        raise ConfigError(f"{program.name} is not installed beside this Python: pip install it")
    words = [str(program), "serve", "--engine", "vllm", "--upstream", url, "--port", "{port}"]
    words += ["--bundle", str(bundle.path), "--ledger", str(work / f"{kind}.ledger.jsonl")]
    words += ["--threads", "1", *(["--model", arms.model] if arms.model else [])]
    chosen = {"api_keys": API_KEY, "key_file": str(bundle.key_file), **_logging()}
    chosen |= settings or {}
    given = {f"UNLEARN_GUARD_{one.upper()}": value for one, value in chosen.items()}
    environ = {**os.environ, **given}
    environ.pop("UNLEARN_GUARD_KEY", None)
    return name, kind, words, "/ready", environ


def _logging() -> dict[str, str]:
    from guard.settings import Settings

    wanted = {"log_format": "json", "log_level": "info"}
    return {name: value for name, value in wanted.items() if name in Settings.model_fields}


def without_targets(bundle: BundlePlace, folder: Path) -> BundlePlace:
    """Copy a bundle and take all targets out of the copy: nothing is left to detect."""
    if folder.exists():
        shutil.rmtree(folder)
    shutil.copytree(bundle.path, folder)
    store = BundleStore(folder, GuardKey.load_or_create(bundle.key_file))
    with store.transaction() as draft:
        for entry in draft.manifest.targets.values():
            draft.remove(entry.prefix)
        draft.manifest.targets.clear()
    return BundlePlace(folder, bundle.key_file)


def count_targets(bundle: BundlePlace) -> int:
    """Return how many targets a bundle holds."""
    current = BundleStore(bundle.path).current()
    try:
        return len(current.manifest.targets)
    finally:
        current.close()


def _litellm_config(path: Path, url: str) -> Path:
    model = {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "unused"}
    value = {
        "model_list": [{"model_name": MODEL, "litellm_params": model}],
        "general_settings": {"master_key": API_KEY},
        "litellm_settings": {"telemetry": False},
    }
    path.write_text(json.dumps(value))  # JSON is YAML
    return path
