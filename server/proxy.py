"""The way of one request: limits, guard, engine, answer (DESIGN section 3)."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from starlette.types import Message, Receive, Scope, Send

from guard.errors import EngineError, StageError
from guard.request import ParsedRequest, parse_request
from guard.rewrite import StandIn
from guard.types import AdapterUse, Route, TextHit
from server.deadline import Deadline
from server.engines.base import Engine, EngineResponse
from server.errors import (
    ApiError,
    ApiErrorRaised,
    ClientGone,
    content_refused,
    guard_failed,
    log_failure,
    overloaded,
    send_error,
    server_ends,
    to_api_error,
)
from server.keys import KeyRing
from server.lifecycle import Lifecycle
from server.light import is_light
from server.limits import (
    Workers,
    check_content_type,
    pick_headers,
    read_body,
    send_and_linger,
)
from server.metrics import Metrics
from server.observe import Observation, Observer
from server.output_guard import ATTEMPTS, OutputGuard
from server.protocol import WATCHERS
from server.restoring import restored
from server.streaming import relay, relay_refusal, until_gone
from server.tracing import open_tracing
from server.types import GuardLike, ServerOptions

if TYPE_CHECKING:
    from guard.answers import Said
    from guard.pipeline import Inspection, Rewritten

T = TypeVar("T")

REQUEST_HEADERS: Final = (b"accept", b"x-request-id", b"traceparent", b"tracestate")
REWRITING: Final = ("corrupt", "adapt", "corrupt+adapt")
"""Routes on which the guard rewrites the request or has adapters answer it."""

_CLIENT_LEFT: Final = 499


class ModelNames:
    """The engine's models, remembered for a while."""

    def __init__(self, engine: Engine, ttl_s: float) -> None:
        self._engine, self._ttl_s = engine, ttl_s
        self._names: list[str] = []
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def get(self) -> list[str]:
        """Return the public names; remembered ones if the engine can't say just now.

        Raises:
            EngineError: If the engine never said.
        """
        if time.monotonic() < self._until:
            return self._names
        async with self._lock:
            if time.monotonic() >= self._until:
                try:
                    self._names = await self._engine.models()
                    self._until = time.monotonic() + self._ttl_s
                except EngineError:
                    if not self._names:
                        raise
        return self._names


class Proxy:
    """What all requests share.

    Args:
        guard: Decides and rewrites.
        engine: Answers.
        options: Limits and policies.
        lifecycle: Says when answers in work are to be cut.
    """

    def __init__(
        self,
        guard: GuardLike,
        engine: Engine,
        options: ServerOptions,
        lifecycle: Lifecycle | None = None,
    ) -> None:
        self.guard, self.engine, self.options = guard, engine, options
        self.lifecycle = lifecycle or Lifecycle()
        self.keys = KeyRing(options.api_keys, options.api_keys_file)
        threads = min(options.workers, len(os.sched_getaffinity(0)))
        self.workers = Workers(threads, options.max_waiting, yielding=True)
        # The ledger must not wait behind decisions: its lateness would mark flagged requests.
        self.recorder = Workers(1, options.max_in_flight, "ledger")
        # Running answers must not wait behind new requests.
        self.checkers = Workers(threads, options.max_in_flight, "answers", yielding=True)
        self.metrics = Metrics(lambda: self.workers.waiting, lambda: self.in_flight)
        self.observer = Observer(self.metrics, open_tracing(options.otlp_endpoint))
        counts = getattr(engine, "adapter_figures", None)
        if counts is not None:  # an engine that has a limited number of places for them
            self.metrics.follow_adapters(counts)
        self.models = ModelNames(engine, options.models_ttl_s)
        self.in_flight = 0

    def close(self) -> None:
        """Give the threads back."""
        self.workers.close()
        self.recorder.close()
        self.checkers.close()


class Completions:
    """ASGI endpoint of one of the two completion routes."""

    def __init__(self, endpoint: str, proxy: Proxy) -> None:
        self._endpoint, self._proxy = endpoint, proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; never raises for what a client, the guard or the engine did."""
        proxy = self._proxy
        observation = proxy.observer.begin(self._endpoint, scope)
        exchange = _Exchange(self._endpoint, proxy, observation, scope, receive, send)
        status = _CLIENT_LEFT
        proxy.in_flight += 1
        try:
            status = await exchange.run()
        finally:
            proxy.in_flight -= 1
            observation.done(status)


class _Exchange:
    """One request and its answer."""

    def __init__(
        self,
        endpoint: str,
        proxy: Proxy,
        observation: Observation,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        self.observation = observation
        self.endpoint, self.proxy, self.options = endpoint, proxy, proxy.options
        self.scope, self.receive, self._send = scope, receive, send
        self.route: Route | str = "none"
        self._begun = time.perf_counter()
        self._started = False
        self._finished = False
        self._deadline = Deadline()

    async def send(self, message: Message) -> None:
        self._started = True
        self.observation.sent(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._finished = True
        await self._send(message)

    async def run(self) -> int:
        """Answer, and return the status that was sent."""
        try:
            return await self._answer()
        except ClientGone:
            return _CLIENT_LEFT
        except Exception as error:
            return await self._fail(error)
        finally:
            self._deadline.close()

    async def _fail(self, error: Exception) -> int:
        answer = to_api_error(error)
        if answer.status >= 500 and not isinstance(error, ApiErrorRaised):
            self.proxy.metrics.failures.labels(answer.code or "unknown").inc()
            log_failure(f"{self.endpoint} answered {answer.status}", error)
        if self._started:
            return answer.status  # too late to say so; returning unfinished breaks the connection
        if answer.status == 413:
            await send_and_linger(self.send, self.receive, answer)
        else:
            await send_error(self.send, answer)
        return answer.status

    async def _answer(self) -> int:
        async with self.proxy.keys.admit(self.scope) as caller:
            self.observation.key = caller.name
            return await self._admitted(caller.body_limit(self.options.max_body_bytes))

    async def _admitted(self, max_body_bytes: int) -> int:
        options = self.options
        if self.proxy.in_flight > options.max_in_flight:
            raise ApiErrorRaised(overloaded())
        check_content_type(self.scope)
        with _Cuttable(self.proxy.lifecycle), self.observation.stage("body"):
            body = await read_body(
                self.scope, self.receive, max_body_bytes, options.body_timeout_s, self._deadline
            )
        self.observation.bytes_in = len(body)
        watchers = (self.scope.get("state") or {}).get(WATCHERS)
        work = self._in_work(body)
        return await until_gone(self.receive, work, lambda: self._finished, watchers)

    async def _in_work(self, body: bytes) -> int:
        with _Cuttable(self.proxy.lifecycle):
            return await self._guarded(body)

    async def _guarded(self, body: bytes) -> int:
        inspection = await self._inspect(body)
        parsed = inspection.request if inspection else self._parsed(body)
        model = parsed.model
        if model not in await self.proxy.models.get():
            raise ApiErrorRaised(
                ApiError(
                    404,
                    f"the model '{model[:100]}' does not exist; GET /v1/models lists those that do",
                    code="model_not_found",
                    param="model",
                )
            )
        if inspection is None:
            return await self._relay(await self.post(parsed.body, self._deadline))
        return await self._decided(inspection, inspection.request.body)

    def _parsed(self, body: bytes) -> ParsedRequest:
        return parse_request(self.endpoint, body, self.options.images)

    async def _inspect(self, body: bytes) -> Inspection | None:
        """Decide; None if that failed and the operator wants such requests passed."""
        try:
            with self.observation.stage("decide"):
                inspection = await self._inspection(body)
        except (StageError, TimeoutError) as error:
            log_failure("the guard failed to decide", error)
            self.proxy.metrics.failures.labels("guard").inc()
            if self.options.on_error == "refuse":
                raise ApiErrorRaised(guard_failed()) from error
            self.route = self.observation.route = "pass"
            return None
        self.route = _route(inspection)
        self.observation.decided(inspection.decision, self.route)
        return inspection

    async def _inspection(self, body: bytes) -> Inspection:
        """Decide here if that is quick, as it mostly is; else in a thread, which costs more."""
        guard, observed = self.proxy.guard, self.observation.detecting
        begin = getattr(guard, "begin", None)
        if begin is not None and is_light(body):
            asked = time.perf_counter()
            begun: Inspection | Callable[[], Inspection] = begin(self.endpoint, body)
            if not callable(begun):
                self.proxy.metrics.worker_wait_seconds.observe(0.0)
                self.proxy.metrics.detect_seconds.observe(time.perf_counter() - asked)
                return begun
            work = observed(begun)
        else:
            work = observed(partial(guard.inspect, self.endpoint, body))
        async with asyncio.timeout(self.options.decide_timeout_s):
            return await self.proxy.workers.run(work)

    async def _decided(self, inspection: Inspection, body: bytes) -> int:
        """Act on a decision. The ledger is written while the engine works, not before."""
        record: asyncio.Task[None] | None = None
        if inspection.decision.flagged:
            record = asyncio.create_task(self.recorded(self.proxy.guard.record, inspection))
        try:
            response, stand_ins = await self._routed(inspection, body)
            try:
                if record is not None:
                    await asyncio.shield(record)
            except BaseException:
                await response.aclose()
                raise
        finally:
            if record is not None:
                await _settled(record)
        if response.status < 300:
            response = await self._checked(response, inspection, stand_ins)
        replaced = self.route in REWRITING
        return await self._relay(response, replaced=replaced)

    async def _routed(
        self, inspection: Inspection, body: bytes
    ) -> tuple[EngineResponse, tuple[StandIn, ...]]:
        if self.route not in REWRITING:
            await self._equalised()
            if self.route == "pass":
                return await self.post(body, self._deadline), ()
            raise ApiErrorRaised(content_refused())
        with self.observation.stage("rewrite"):
            rewritten = await self.proxy.workers.run(self.proxy.guard.rewrite, inspection)
        await self._equalised()
        response = await self.post(rewritten.body, self._deadline, rewritten.adapters)
        return response, rewritten.stand_ins

    async def _equalised(self) -> None:
        """Wait until the guard's own time is the same for all requests."""
        left = self._begun + self.options.equalise_s - time.perf_counter()
        if left > 0:
            await asyncio.sleep(left)

    async def _checked(
        self, response: EngineResponse, inspection: Inspection, stand_ins: Sequence[StandIn]
    ) -> EngineResponse:
        """Read the answer as the model gave it; then put back the names that were asked for."""
        options, names = self.options, list(stand_ins)
        answers = self.proxy.guard.answers(inspection)
        watched = options.output_guard and answers.watches
        if watched:
            guard = OutputGuard(
                answers,
                _Around(self, inspection),
                options.hold_back,
                options.idle_timeout_s,
                _wants_usage(inspection.request.raw),
                names,
                self.observation,
            )
            response = await guard.checked(response)
        elif not names:
            return response
        async with asyncio.timeout(options.idle_timeout_s):
            return await restored(response, names, may_grow=watched)

    async def recorded(self, function: Callable[..., None], *args: Any) -> None:
        """Write to the ledger; what can't be recorded is not answered."""
        try:
            await self.proxy.recorder.run(function, *args)
        except Exception as error:
            log_failure("the ledger could not be written", error)
            self.proxy.metrics.failures.labels("ledger").inc()
            raise ApiErrorRaised(guard_failed()) from error

    async def post(
        self, body: bytes, deadline: Deadline, adapters: Sequence[AdapterUse] = ()
    ) -> EngineResponse:
        """Send a request to the engine and wait for its answer to begin."""
        headers = pick_headers(self.scope, REQUEST_HEADERS)
        if self.options.forward_authorization:
            # A client without one must not be let in by our own key.
            headers |= {"authorization": "", **pick_headers(self.scope, (b"authorization",))}
        headers["content-type"] = "application/json"
        with self.observation.stage("upstream"):
            headers |= self.observation.headers()
            with deadline.within(self.options.engine_timeout_s):
                response = await self.proxy.engine.post(self.endpoint, body, headers, adapters)
        # A redirect, or our own key refused, is a fault of this set-up and not of the client.
        ours = response.status in (401, 403) and not self.options.forward_authorization
        if ours or not (200 <= response.status < 300 or 400 <= response.status < 600):
            await response.aclose()
            raise EngineError(f"the engine answered with status {response.status}")
        return response

    async def _relay(self, response: EngineResponse, *, replaced: bool = False) -> int:
        try:
            if replaced and response.status >= 400:
                return await relay_refusal(response, self.send, self.options.idle_timeout_s)
            lifecycle, timeout_s = self.proxy.lifecycle, self.options.idle_timeout_s
            return await relay(
                response, self.send, timeout_s, lambda: lifecycle.is_cut, self._deadline
            )
        finally:
            await response.aclose()


class _Around:
    """What the output guard needs to check the answers of one request."""

    def __init__(self, exchange: _Exchange, inspection: Inspection) -> None:
        self._exchange, self._inspection = exchange, inspection
        self._proxy = exchange.proxy

    async def work(self, function: Callable[..., T], *args: Any) -> T:
        """Run a call of the guard in a thread; a failure ends the answer unsaid."""
        try:
            return await self._proxy.checkers.run(function, *args)
        except StageError:
            self._proxy.metrics.failures.labels("answer").inc()
            raise

    async def ask(self, rewritten: Rewritten) -> EngineResponse:
        """Send the request for the rest of an answer."""
        # Not the request's own: that one limits the wait for the answer that is asked for again.
        with closing(Deadline()) as deadline:
            response = await self._exchange.post(rewritten.body, deadline, rewritten.adapters)
        if response.status != 200:
            await response.aclose()
            raise EngineError(f"the engine answered with status {response.status}")
        return response

    async def note(self, hits: Sequence[TextHit], said: Said) -> None:
        """Write to the ledger that an answer touched targets."""
        outcome = "again" if said.attempt <= ATTEMPTS else "ended"
        self._proxy.metrics.remakes.labels(outcome).inc()
        answers = self._proxy.guard.answers(self._inspection)
        await self._exchange.recorded(answers.record, hits, said)


class _Cuttable:
    """Lets the end of the server be told instead of an answer."""

    __slots__ = ("_lifecycle", "_task")

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle

    def __enter__(self) -> None:
        self._task = self._lifecycle.begin()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lifecycle.end(self._task)
        if kind is asyncio.CancelledError and self._lifecycle.is_cut:
            raise ApiErrorRaised(server_ends()) from None


def _wants_usage(raw: Mapping[str, Any]) -> bool:
    return bool((raw.get("stream_options") or {}).get("include_usage"))


def _route(inspection: Inspection) -> Route:
    """The decision's route; what was not read whole never passes."""
    decision = inspection.decision
    return "block" if decision.route == "pass" and decision.coverage < 1.0 else decision.route


async def _settled(task: asyncio.Task[None]) -> None:
    """Let a task end by itself and take note of its outcome."""
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
