"""`unlearn-guard serve`, `chat` and `engine`: what answers."""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from guard.cli_compose import PACKAGED_NAME, CheckState, make_engine, prepare, server_options
from guard.cli_session import Session, bundle_option, model_options

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


@click.command("chat")
@model_options
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True)
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True)
@click.option("--system", help="A system message.")
@click.option("--show-decisions", is_flag=True, help="Say after each turn what was decided.")
@bundle_option
@click.pass_obj
def chat(
    session: Session,
    /,
    max_tokens: int,
    temperature: float,
    system: str | None,
    show_decisions: bool,
    **flags: Any,
) -> None:
    """Talk to the model through the guard. /exit ends, /new begins a new conversation."""
    from guard.chat import ask
    from guard.console import note

    session.load(**flags)
    engine, guard, state = prepare(session)
    opening = [{"role": "system", "content": system}] if system else []

    async def turn(model: str, messages: list[dict[str, str]]) -> str:
        reply = await ask(guard, engine, model, messages, max_tokens, temperature)
        said = []
        async for piece in reply.answer:
            click.echo(piece, nl=False)
            said.append(piece)
        click.echo()
        if show_decisions:
            decision = reply.inspection.decision
            hits = ", ".join(f"{h.name} (p {h.p_value:.2g})" for h in decision.targets) or "none"
            note(f"route {decision.route}, targets {hits}")
        return "".join(said)

    async def talk() -> None:
        await engine.start()
        try:
            await state.check(engine, guard)
            model = (await engine.models())[0]
            note(f"{model}, guarded by {session.settings.bundle}; /exit ends, /new starts again")
            messages = list(opening)
            while (text := await asyncio.to_thread(_read_line)) not in (None, "/exit", "/quit"):
                if text == "/new":
                    messages = list(opening)
                elif text:
                    await _take_turn(turn, model, messages, text)
        finally:
            await engine.close()

    _run_async(talk())


async def _take_turn(
    turn: Callable[[str, list[dict[str, str]]], Coroutine[Any, Any, str]],
    model: str,
    messages: list[dict[str, str]],
    text: str,
) -> None:
    from guard.console import note
    from guard.errors import EngineError, RequestError, StageError

    messages.append({"role": "user", "content": text})
    try:
        answer = await turn(model, messages)
    except (RequestError, EngineError, StageError) as error:
        messages.pop()
        note(f"error: {error}")
        return
    messages.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    try:
        return input("> ").strip()
    except EOFError:
        return None


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
    """Run to the end on uvloop; SIGTERM stops like Ctrl-C."""
    import uvloop

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(work)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
