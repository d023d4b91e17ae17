"""`unlearn-guard serve`, `chat` and `engine`: what answers."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import click

from guard.cli_session import Session, bundle_option, model_options

if TYPE_CHECKING:
    from guard.pipeline import Guard
    from guard.reload import LiveGuard
    from guard.settings import Settings
    from guard.types import Progress
    from server.engines.base import Engine
    from server.types import Readiness, ServerOptions

log = logging.getLogger(__name__)

PACKAGED_NAME = "smollm2-135m-instruct"
_RETRY_S = 5.0


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
    engine, guard, state = _prepare(session)
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
    engine, guard, state = _prepare(session)
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


# --- Putting the parts together ------------------------------------------------------------------


def make_engine(session: Session, progress: Progress | None = None) -> Engine:
    """Make the engine that the settings ask for.

    Raises:
        ConfigError: If it needs a setting, or an extra that is not installed.
    """
    from guard.errors import ConfigError

    settings = session.settings
    if settings.engine == "vllm":
        from server.engines.vllm import VllmEngine, VllmTimeouts

        if settings.upstream is None:
            raise ConfigError("--engine vllm needs --upstream URL, e.g. http://127.0.0.1:8001")
        secret = settings.upstream_api_key
        return VllmEngine(
            settings.upstream,
            api_key=None if secret is None else secret.get_secret_value(),
            timeouts=VllmTimeouts(
                connect=settings.connect_timeout_s, read=settings.engine_timeout_s
            ),
        )
    from importlib.util import find_spec

    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--engine embedded needs {' and '.join(missing)}: install the extra `embedded`, or "
            "guard a vLLM with --engine vllm --upstream URL"
        )
    from server.engines.embedded.engine import EmbeddedEngine

    name = settings.served_model_name or (PACKAGED_NAME if settings.model is None else None)
    return EmbeddedEngine(
        session.model(progress),
        served_name=name,
        max_queue=settings.max_queue,
        threads=settings.threads,
    )


def make_guard(session: Session, progress: Progress, closed: bool = False) -> LiveGuard:
    """Load the guard of the current bundle, ready to follow its changes.

    Raises:
        BundleNotFoundError: If there is no bundle.
        IncompatibleArtifactError: If it is for another model or key.
    """
    from guard.build import load_guard
    from guard.doctor import check_encoder
    from guard.reload import LiveGuard

    store, key = session.existing_bundle()
    prompts = session.prompts(progress)
    ledger, threads = session.ledger(key), session.settings.threads

    def load() -> Guard:
        if session.settings.self_check:
            check_encoder(store.current(), threads)
        return load_guard(store=store, key=key, prompts=prompts, ledger=ledger, threads=threads)

    return LiveGuard(load, store.current_version, closed)


def server_options(settings: Settings) -> ServerOptions:
    """Translate the settings for the server."""
    from server.types import ServerOptions

    secret = settings.metrics_key
    return ServerOptions(
        api_keys=tuple(key.get_secret_value() for key in settings.api_keys),
        metrics_key=None if secret is None else secret.get_secret_value(),
        on_error=settings.on_error,
        forward_authorization=settings.forward_authorization,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        workers=settings.workers,
        max_in_flight=settings.max_in_flight,
        decide_timeout_s=settings.decide_timeout_s,
        engine_timeout_s=settings.engine_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
    )


def _prepare(session: Session) -> tuple[Engine, LiveGuard, CheckState]:
    from guard.console import progress_display

    state = CheckState(session.settings.self_check)
    session.existing_bundle()  # before minutes of preparing a model
    with progress_display() as progress:
        engine = make_engine(session, progress)
        guard = make_guard(session, progress, closed=session.settings.self_check)
    return engine, guard, state


class CheckState:
    """Whether engine, model and bundle were found to fit together.

    Attributes:
        failure: What a check in the background found wrong.
        model: Name of the served model, once the engine was asked.
    """

    def __init__(self, wanted: bool) -> None:
        self.wanted = wanted
        self.failure: Exception | None = None
        self.model: str | None = None
        self._passed = False
        self._task: asyncio.Task[None] | None = None

    def readiness(self, guard: LiveGuard) -> Readiness:
        """Say what `/ready` reports."""
        from server.types import Readiness

        outcome = "passed" if self._passed else "failed" if self.wanted else "skipped"
        return Readiness(guard.guard.version, outcome)  # type: ignore[arg-type]

    async def check(self, engine: Engine, guard: LiveGuard) -> None:
        """Check, and let requests through if all is well.

        Raises:
            SelfCheckError: If something doesn't fit.
            EngineError: If the engine can't be asked.
        """
        if self.wanted:
            from server.selfcheck import SAMPLE, self_check

            prompts = guard.guard.prompts
            assert prompts is not None  # make_guard() gave them
            if engine.name == "vllm":
                report = await self_check(engine, prompts)
            else:  # it runs the very files that the guard reads: a short look will do
                report = await self_check(
                    engine, prompts, sample=SAMPLE[:1], roles=(), completions=False
                )
            report.require()
            self._passed, self.model = True, report.model
        else:
            log.warning("the self-check is off: nothing proves that model and bundle fit")
        guard.open()

    async def check_or_wait(self, engine: Engine, guard: LiveGuard) -> None:
        """Check now; if the engine can't be asked yet, go on trying in the background."""
        from guard.errors import EngineError

        try:
            await self.check(engine, guard)
        except EngineError as error:
            log.warning("requests are refused until the engine can be checked: %s", error)
            self._task = asyncio.create_task(self._until_checked(engine, guard))

    def raise_failure(self) -> None:
        """Raise what the background check found, if anything."""
        if self.failure is not None:
            raise self.failure

    async def _until_checked(self, engine: Engine, guard: LiveGuard) -> None:
        from guard.errors import EngineError, GuardError

        while True:
            await asyncio.sleep(_RETRY_S)
            try:
                await self.check(engine, guard)
                log.warning("the engine was checked: requests are answered now")
                return
            except EngineError as error:
                log.info("the engine can't be checked yet: %s", error)
            except GuardError as error:
                self.failure = error
                signal.raise_signal(signal.SIGTERM)  # an orderly stop
                return


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
    for question in ("Who is Harry Potter?", "What is the capital of France?"):
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
