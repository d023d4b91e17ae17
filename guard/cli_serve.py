"""`unlearn-guard serve` and `engine`: what answers over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from guard.cli_compose import PACKAGED_NAME, CheckState, make_engine, prepare, server_options
from guard.cli_session import Session, async_runner, bundle_option, model_options

if TYPE_CHECKING:
    from guard.reload import LiveGuard
    from guard.settings import Settings


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
@bundle_option
@click.pass_obj
def serve(session: Session, /, **flags: Any) -> None:
    """Serve the OpenAI API, guarded.

    With --engine embedded the model runs in this process; with --engine vllm an unmodified vLLM,
    started with --enable-prompt-embeds, answers at --upstream.
    """
    from server.app import create_app

    settings = session.load(**flags).values
    engine, guard, state = prepare(session)
    app = create_app(guard, engine, server_options(settings), lambda: state.readiness(guard))

    async def before() -> None:
        await engine.start()
        await state.check_or_wait(engine, guard)

    guard.follow(settings.reload_s)
    try:
        _run(app, settings, before, lambda url: _greet(session, url, state, guard))
    finally:
        guard.stop()
    state.raise_failure()


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
    from server.standin import create_standin

    settings = session.load(engine="embedded", host="127.0.0.1", **flags).values
    bare = make_engine(session)
    note("WARNING: no guard: this endpoint answers everything the model knows")
    _run(create_standin(bare), settings, bare.start, lambda url: note(f"unguarded engine at {url}"))


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
        body = {"model": name, "messages": [{"role": "user", "content": question}]}
        note(
            f"  curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' "
            f"-d '{json.dumps(body)}'"
        )
    note(f"  curl -s {url}/metrics")


# --- Running -------------------------------------------------------------------------------------


def _run(
    app: Any,
    settings: Settings,
    before: Callable[[], Coroutine[Any, Any, None]],
    on_started: Callable[[str], None],
) -> None:
    """Serve until a signal; a stop by SIGINT or SIGTERM is an orderly end."""
    from guard.errors import EngineError
    from server.run import make_server

    server = make_server(app, settings.host, settings.port, on_started=on_started)

    async def main() -> None:
        await before()
        await server.serve()

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
