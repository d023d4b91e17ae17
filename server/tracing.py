"""OpenTelemetry traces: a span for each request and for each of its parts.

Nothing of OpenTelemetry is imported unless a collector is named. Spans carry names and numbers,
never a client's text: no exception's message, and not the client's `tracestate`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from starlette.types import Scope

from guard.errors import ConfigError
from guard.types import Decision
from server.limits import header

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

SERVICE: Final = "unlearn-guard"
_TRACES: Final = "/v1/traces"
_EXPORT_TIMEOUT_S: Final = 5.0


def open_tracing(endpoint: str | None) -> Tracing | None:
    """Return what sends spans to a collector, or None where none is named.

    OpenTelemetry's own variables are respected: `OTEL_TRACES_SAMPLER`,
    `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_EXPORTER_OTLP_HEADERS`, `OTEL_BSP_…`.

    Args:
        endpoint: Base URL, e.g. `http://127.0.0.1:4318`.

    Raises:
        ConfigError: If the extra `otel` is not installed.
    """
    if endpoint is None:
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ConfigError("otlp_endpoint needs OpenTelemetry: install the extra `otel`") from None
    resource = Resource.create({"service.name": SERVICE})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint.rstrip("/") + _TRACES, timeout=_EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracing(provider)


class Tracing:
    """Begins traces.

    Args:
        provider: Where finished spans go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer(SERVICE)

    def request(self, endpoint: str, scope: Scope) -> RequestTrace:
        """Begin a request's span, below the client's if it names one."""
        return RequestTrace(self._tracer, endpoint, header(scope, b"traceparent"))

    def close(self) -> None:
        """Send what is left; takes some seconds if the collector is away."""
        self._provider.shutdown()


class RequestTrace:
    """The spans of one request.

    Args:
        tracer: Makes them.
        endpoint: Path of the route.
        traceparent: The client's header, if any; a malformed one is ignored.
    """

    def __init__(self, tracer: Tracer, endpoint: str, traceparent: str | None) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer, self._propagator = tracer, TraceContextTextMapPropagator()
        above = self._propagator.extract({"traceparent": traceparent} if traceparent else {})
        self._span = tracer.start_span(
            f"POST {endpoint}",
            context=above,
            kind=SpanKind.SERVER,
            attributes={"http.request.method": "POST", "http.route": endpoint},
        )
        self._context = set_span_in_context(self._span)
        self._current = self._span

    @property
    def trace_id(self) -> str:
        """The trace's id, hexadecimal."""
        return format(self._span.get_span_context().trace_id, "032x")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Trace a part of the request."""
        from opentelemetry.trace import SpanKind

        kind = SpanKind.CLIENT if name == "upstream" else SpanKind.INTERNAL
        span = self._tracer.start_span(name, context=self._context, kind=kind)
        outer, self._current = self._current, span
        try:
            yield
        except BaseException as error:
            _failed(span, type(error).__name__)
            raise
        finally:
            self._current = outer
            span.end()

    def headers(self) -> dict[str, str]:
        """Return the header that makes the engine's spans part of this trace."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(self._current))
        return {"traceparent": carrier["traceparent"]} if "traceparent" in carrier else {}

    def decided(self, decision: Decision, route: str) -> None:
        """Say what was decided."""
        self._span.set_attribute("unlearn_guard.route", route)
        self._span.set_attribute("unlearn_guard.coverage", decision.coverage)

    def end(self, status: int, key: str | None) -> None:
        """End the request's span."""
        self._span.set_attribute("http.response.status_code", status)
        if key is not None:
            self._span.set_attribute("unlearn_guard.key", key)
        if status >= 500:
            _failed(self._span, str(status))
        self._span.end()


def _failed(span: Span, what: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", what)
    span.set_status(StatusCode.ERROR)
