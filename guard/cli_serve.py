"""`unlearn-guard serve` and `engine`: what answers over HTTP."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_compose import PACKAGED_NAME, CheckState, make_engine, prepare, server_options
from guard.cli_session import Session, async_runner, bundle_option, model_options

if TYPE_CHECKING:
    from socket import socket

    from guard.reload import LiveGuard
    from guard.settings import Settings
    from server.lifecycle import Lifecycle
    from server.proxy import Proxy
    from server.supervisor import Place
    from server.worker_metrics import WorkerMetrics


_GRACE_S = 10.0
"""What a worker may take beyond its own limits before it is killed."""


def _listen_options(command: Any) -> Any:
    command = click.option("--port", type=int, help="Port; 0 picks a free one [8000].")(command)
    return click.option("--host", help="Address to listen on [127.0.0.1].")(command)


@click.command("serve")
@model_options
@_listen_options
@click.option(
    "--on-error",
    type=click.Choice(["refuse", "pass"]),
    help="When the guard fails to decide: 503, or let through [refuse].",
)
@click.option("--ledger", type=click.Path(), help="The ledger's file [in the bundle's folder].")
@click.option(
    "--workers",
    "processes",
    type=int,
    help="Processes that serve, best one per core; more than 1 needs --engine vllm. The setting is "
    "`processes`; `workers` are the threads of each [1].",
)
@bundle_option
@click.pass_obj
def serve(session: Session, /, **flags: Any) -> None:
    """Serve the OpenAI API, guarded.

    With --engine embedded the model runs in this process; with --engine vllm an unmodified vLLM,
    started with --enable-prompt-embeds, answers at --upstream.
    """
    # Read when numpy is imported; products here are small, and each thread would hold buffers.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    settings = session.load(**flags).values
    if settings.processes == 1:
        _serve(session, None)
        return
    with _shared(settings) as shared:
        outcome = _supervised(settings)
        if isinstance(outcome, int):
            if outcome:
                raise click.exceptions.Exit(outcome)
            return
        _serve(session, _Worker(outcome, *shared))


def _serve(session: Session, worker: _Worker | None) -> None:
    """Serve in this process, alone or as one of several."""
    from guard.live_settings import LiveSettings
    from guard.memory import give_back
    from server.app import create_app
    from server.lifecycle import Lifecycle

    settings = session.settings
    engine, guard, state = prepare(session)
    lifecycle = Lifecycle(settings.drain_s)
    metrics = None if worker is None else worker.metrics(settings.processes)
    app = create_app(
        guard,
        engine,
        server_options(settings),
        lambda: state.readiness(guard),
        lifecycle,
        None if metrics is None else metrics.gather,
    )
    proxy = app.state.proxy
    proxy.metrics.follow_targets(lambda: guard.guard.targets)
    live = LiveSettings(
        settings, session.settings_file, session.reread, lambda new: _change(proxy, new)
    )

    async def before() -> None:
        if worker is not None and metrics is not None:
            await worker.begin(app, metrics)
        await engine.start()
        await state.check_or_wait(engine, guard)
        if (prompts := guard.guard.prompts) is not None:
            prompts.give_back()
        give_back()  # what the checks took

    def started(url: str) -> None:
        if worker is None or worker.greets:
            _greet(session, url, state, guard)

    guard.follow(settings.reload_s)
    live.follow(settings.reload_s)
    try:
        _run(app, settings, before, started, lifecycle, worker)
    finally:
        live.stop()
        guard.stop()
        if metrics is not None:
            metrics.close()
    state.raise_failure()


def _change(proxy: Proxy, settings: Settings) -> None:
    """Serve the next requests by new settings."""
    proxy.options = server_options(settings)


@click.command("engine")
@click.option("--model", help="Directory or Hugging Face id [the packaged SmolLM2].")
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@click.option("--served-model-name", help="The name that clients ask for.")
@click.option("--threads", type=int, help="Threads of the model.")
@click.option("--port", type=int, help="Port; 0 picks a free one [8000].")
@click.pass_obj
def engine(session: Session, /, **flags: Any) -> None:
    """Serve the embedded model WITHOUT any guard, on 127.0.0.1 only.

    A stand-in for vLLM on a laptop, and the unguarded reference to compare with.
    """
    from guard.console import note
    from server.lifecycle import Lifecycle
    from server.standin import create_standin

    settings = session.load(engine="embedded", host="127.0.0.1", **flags).values
    bare = make_engine(session)
    note("WARNING: no guard: this endpoint answers everything the model knows")
    app = create_standin(bare)
    _run(
        app, settings, bare.start, lambda url: note(f"unguarded engine at {url}"), Lifecycle(), None
    )


def _greet(session: Session, url: str, state: CheckState, guard: LiveGuard) -> None:
    """Say what is served where, and what to try."""
    from guard.console import note

    settings = session.settings
    name = state.model or settings.served_model_name or settings.model or PACKAGED_NAME
    targets = ", ".join(f"{n} ({p.status})" for n, p in guard.guard.targets.items()) or "none"
    generates = settings.upstream if settings.engine == "vllm" else "embedded"
    note(f"serving {url}  (engine {generates})")
    note(f"  model    {name}")
    note(f"  bundle   {settings.bundle}, version {guard.guard.version}; targets: {targets}")
    note("three things to try:")
    topic = next(iter(guard.guard.targets), "harry-potter").replace("-", " ").replace("_", " ")
    for question in (f"Who is {topic.title()}?", "What is the capital of France?"):
        # Greedy, for drawn at random a small model's answers say nothing of the guard.
        asked = [{"role": "user", "content": question}]
        body = {"model": name, "temperature": 0, "messages": asked}
        note(
            f"  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'"
        )
    note(f"  curl -s {url}/metrics")


# --- Several processes ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Worker:
    """One of several processes that serve.

    Attributes:
        place: Which one.
        sockets: What all of them listen on.
        folder: Where they tell one another their metrics.
    """

    place: Place
    sockets: Sequence[socket]
    folder: Path

    @property
    def greets(self) -> bool:
        """Whether this one tells people where to ask."""
        return self.place.index == 0 and self.place.starts == 1

    def metrics(self, count: int) -> WorkerMetrics:
        """Make this worker's side of the common metrics."""
        from server.worker_metrics import WorkerMetrics

        return WorkerMetrics(self.folder, self.place.index, count)

    async def begin(self, app: Any, metrics: WorkerMetrics) -> None:
        """Follow the supervisor, and tell the others this one's metrics."""
        own = app.state.proxy.metrics
        metrics.count_starts(own.registry, self.place.starts)
        self.place.follow()
        await metrics.serve(own.render)


@contextmanager
def _shared(settings: Settings) -> Iterator[tuple[Sequence[socket], Path]]:
    """Open what the workers have in common; the supervisor alone clears it away."""
    import os
    from shutil import rmtree
    from tempfile import mkdtemp

    from guard.errors import ConfigError
    from server.supervisor import listen

    if settings.engine != "vllm":
        raise ConfigError(
            "--workers: the embedded engine holds the model in its one process; take 1, or guard a "
            "vLLM with --engine vllm --upstream URL"
        )
    supervisor = os.getpid()
    sockets = listen(settings.host, settings.port)
    folder = Path(mkdtemp(prefix="unlearn-guard-workers-"))
    try:
        yield sockets, folder
    finally:
        if os.getpid() == supervisor:
            rmtree(folder, ignore_errors=True)


def _supervised(settings: Settings) -> Place | int:
    """Start the workers: return a worker's place in each of them, and an exit code here at last."""
    from guard.cli import BAD_INPUT, SELF_CHECK_FAILED
    from server.supervisor import Supervisor

    grace_s = settings.drain_s + settings.shutdown_timeout_s + _GRACE_S
    final = frozenset({BAD_INPUT, SELF_CHECK_FAILED})
    return Supervisor(settings.processes, grace_s, final=final).run()


# --- Running -------------------------------------------------------------------------------------


def _run(
    app: Any,
    settings: Settings,
    before: Callable[[], Coroutine[Any, Any, None]],
    on_started: Callable[[str], None],
    lifecycle: Lifecycle,
    worker: _Worker | None,
) -> None:
    """Serve until a signal; a stop by SIGINT or SIGTERM is an orderly end."""
    from guard.errors import EngineError
    from server.run import make_server

    server = make_server(
        app,
        settings.host,
        settings.port,
        shutdown_timeout_s=settings.shutdown_timeout_s,
        on_started=on_started,
        lifecycle=lifecycle,
    )

    async def main() -> None:
        await before()
        await server.serve(None if worker is None else list(worker.sockets))

    try:
        _run_async(main())
    except KeyboardInterrupt:
        if not server.started:
            raise
    except SystemExit as error:
        raise EngineError(
            f"can't listen on {settings.host}:{settings.port}: is the port in use? (--port)"
        ) from error


def _run_async(work: Coroutine[Any, Any, None]) -> None:
    with async_runner() as runner:
        runner.run(work)
