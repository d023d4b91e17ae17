"""The application: routes, life cycle, and errors in OpenAI's format for everything else."""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from guard.errors import EngineError
from guard.request import ENDPOINTS
from server.access_log import RouteLog
from server.dialects.routes import translated_routes
from server.engines.base import Engine
from server.errors import ApiError, ApiErrorRaised, log_failure, to_api_error
from server.lifecycle import Lifecycle
from server.limits import BearerKeys
from server.openapi import OPENAPI, document
from server.proxy import Completions, Proxy
from server.types import GuardLike, Readiness, ServerOptions
from server.upstream_metrics import UpstreamFigures

_HEALTH_TIMEOUT_S = 10.0

Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    guard: GuardLike,
    engine: Engine,
    options: ServerOptions | None = None,
    readiness: Callable[[], Readiness] = Readiness,
    lifecycle: Lifecycle | None = None,
    gather: Callable[[bytes], Awaitable[bytes]] | None = None,
) -> Starlette:
    """Build the proxy.

    Args:
        guard: Decides on requests and rewrites the flagged ones.
        engine: Answers them; started and closed with the application.
        options: Limits and policies.
        readiness: Says what `/ready` reports of bundle and self-check.
        lifecycle: Says whether the server is about to end; the server's own.
        gather: Adds the other processes' metrics to this one's.

    Returns:
        The ASGI application; `app.state` holds its shared parts, `proxy` and `lifecycle`.
    """
    lifecycle = lifecycle or Lifecycle()
    proxy = Proxy(guard, engine, options or ServerOptions(), lifecycle)
    figures = getattr(engine, "upstream_figures", None)
    if figures is not None:  # an engine that is several
        proxy.metrics.registry.register(UpstreamFigures(figures))

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await engine.start()
        try:
            yield
        finally:
            proxy.close()
            await asyncio.to_thread(proxy.observer.close)
            await engine.close()

    operator = _Operator(proxy, readiness, lifecycle, gather)
    routes = [
        *(Route(path, Completions(path, proxy), methods=["POST"]) for path in ENDPOINTS),
        *translated_routes(proxy),
        Route("/v1/models", _safe(operator.models), methods=["GET"]),
        Route(OPENAPI, _safe(operator.openapi), methods=["GET"]),
        Route("/health", _safe(operator.health), methods=["GET"]),
        Route("/ready", _safe(operator.ready), methods=["GET"]),
        Route("/metrics", _safe(operator.metrics), methods=["GET"]),
    ]
    app = _Application(
        routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error}
    )
    app.direct = {path: Completions(path, proxy) for path in ENDPOINTS}
    app.router.redirect_slashes = False
    small = ("/v1/models", OPENAPI, "/health", "/ready", "/metrics")
    app.add_middleware(RouteLog, named=(*small, *ENDPOINTS), quiet=ENDPOINTS)
    app.state.proxy, app.state.lifecycle = proxy, lifecycle
    return app


class _Application(Starlette):
    """Starlette, but for the two routes that nearly all requests take: they answer by themselves.

    Attributes:
        direct: What answers a POST of exactly that path, and raises nothing.
    """

    direct: Mapping[str, Completions] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self.direct.get(scope["path"])
            if endpoint is not None:
                await endpoint(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


class _Operator:
    """The small routes."""

    def __init__(
        self,
        proxy: Proxy,
        readiness: Callable[[], Readiness],
        lifecycle: Lifecycle,
        gather: Callable[[bytes], Awaitable[bytes]] | None,
    ) -> None:
        self._proxy, self._readiness = proxy, readiness
        self._lifecycle, self._gather = lifecycle, gather
        self._metrics_key = BearerKeys([k] if (k := proxy.options.metrics_key) else [])
        self._created = int(time.time())

    async def models(self, request: Request) -> Response:
        self._proxy.keys.check(request.scope)
        entry = {"object": "model", "created": self._created, "owned_by": "unlearn-guard"}
        names = await self._proxy.models.get()
        return _json({"object": "list", "data": [{"id": name, **entry} for name in names]})

    async def openapi(self, request: Request) -> Response:
        self._proxy.keys.check(request.scope)
        return Response(document(self._proxy.options), media_type="application/json")

    async def health(self, request: Request) -> Response:
        return _json({"status": "alive"})

    async def ready(self, request: Request) -> Response:
        if self._lifecycle.draining:
            message = "not ready: the server ends; ask another"
            raise ApiErrorRaised(ApiError(503, message, "server_error", "draining"))
        state = self._readiness()
        reason = None
        if state.self_check == "failed":
            reason = "the self-check failed; see `unlearn-guard doctor`"
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self._proxy.engine.health()
        except (EngineError, TimeoutError) as error:
            log_failure("the engine is not healthy", error)
            reason = "the engine can't answer"
        if reason is not None:
            error_ = ApiError(503, f"not ready: {reason}", "server_error", "not_ready")
            raise ApiErrorRaised(error_)
        return _json(
            {
                "status": "ready",
                "engine": self._proxy.engine.name,
                "bundle_version": state.bundle_version,
                "self_check": state.self_check,
            }
        )

    async def metrics(self, request: Request) -> Response:
        if self._metrics_key:
            self._metrics_key.check(request.scope)
        elif not _is_local(request.scope):
            message = "metrics are for the operator: read them from this host, or set metrics_key"
            raise ApiErrorRaised(ApiError(403, message, code="forbidden"))
        metrics = self._proxy.metrics
        text = metrics.render()
        if self._gather is not None:
            text = await self._gather(text)
        return Response(text, media_type=metrics.content_type)


def _is_local(scope: Scope) -> bool:
    """True for loopback peers and Unix sockets."""
    client = scope.get("client")
    if not client:
        return True
    try:
        return ipaddress.ip_address(client[0]).is_loopback
    except ValueError:
        return False


def _safe(handler: Handler) -> Handler:
    """Turn whatever a handler raises into an error answer."""

    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except HTTPException:
            raise
        except Exception as error:
            answer = to_api_error(error)
            if not isinstance(error, ApiErrorRaised):
                log_failure(f"{request.url.path} answered {answer.status}", error)
            return _error(answer)

    return handle


async def _http_error(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    method, path = request.method[:20], request.url.path[:100]
    if status == 404:
        message, code = f"there is no route {path}; docs/api.md lists all", "not_found"
    elif status == 405:
        message, code = f"{method} is not allowed on {path}", "method_not_allowed"
    else:
        message, code = "the request was refused", "http_error"
    return _error(ApiError(status, message, code=code, headers=tuple(headers.items())))


def _error(error: ApiError) -> Response:
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    return Response(error.body(), error.status, headers, "application/json")


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
