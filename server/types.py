"""What the proxy is given: a guard, its state of readiness, and options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from guard.answers import AnswerGuard
    from guard.pipeline import Inspection, Rewritten


class GuardLike(Protocol):
    """The part of `guard.pipeline.Guard` that the proxy calls, always in a worker thread."""

    def inspect(self, endpoint: str, body: bytes) -> Inspection:
        """Parse a request strictly and decide on it."""
        ...

    def rewrite(self, inspection: Inspection) -> Rewritten:
        """Replace flagged contents by corrupted embeddings."""
        ...

    def record(self, inspection: Inspection) -> None:
        """Write a flagged decision to the ledger."""
        ...

    def answers(self, inspection: Inspection) -> AnswerGuard:
        """Return what judges the answers to a request."""
        ...


@dataclass(frozen=True, slots=True)
class Readiness:
    """What `/ready` says besides the engine's health.

    Attributes:
        bundle_version: Version of the bundle that is loaded; None if none is.
        self_check: Outcome of the start-up check; `failed` is never ready.
    """

    bundle_version: int | None = None
    self_check: Literal["passed", "failed", "skipped"] = "skipped"


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Limits and policies of the proxy; every time is in seconds, every size in bytes.

    Attributes:
        api_keys: Keys that clients may send as bearer tokens; empty lets everyone in.
        api_keys_file: Hashed keys with limits of their own; see `server.keys`. Where there is such
            a file, a key is asked for even if it lists none.
        otlp_endpoint: Base URL of an OpenTelemetry collector; None traces nothing.
        metrics_key: Bearer token for `/metrics`; without one, only loopback peers may read it,
            because its counters would tell a client whether its request was flagged.
        on_error: What happens when the guard fails to decide: `refuse` answers 503, `pass` sends
            the request on unguarded. A request known to be flagged is never passed.
        forward_authorization: Send the client's Authorization header to the engine, which decides
            by it; it takes the place of the engine's own key.
        max_body_bytes: Longest body; above it 413.
        body_timeout_s: Time for a client to send its body; above it 408.
        workers: Threads that decide and rewrite; no more than there are cores, for while one has
            a core, another that holds Python's lock can't give it to a running stream.
        max_waiting: Requests that may wait for a worker; above it 503.
        max_in_flight: Requests in work at one time; above it 503.
        decide_timeout_s: Time for a decision, waiting included; above it 503.
        engine_timeout_s: Time until the engine's answer begins; above it 504.
        idle_timeout_s: Time between two pieces of an answer, from the engine or to the client.
        output_guard: Read answers before they leave, and ask again for those that touch a target.
        hold_back: Tokens of a streamed answer that are held back for that, at most.
        embeddings: `pass` judges the inputs of `/v1/embeddings` and sends on those that are not
            flagged; `deny` sends none.
        images: `pass` sends images on beside texts that are not flagged; `deny` refuses them.
        equalise_s: Least time from a request's arrival until it is sent on or refused, flagged or
            not, so that the guard's own time tells nothing; 0 sends it on at once.
        models_ttl_s: How long the engine's list of models is remembered.
    """

    api_keys: tuple[str, ...] = ()
    api_keys_file: Path | None = None
    otlp_endpoint: str | None = None
    metrics_key: str | None = None
    on_error: Literal["refuse", "pass"] = "refuse"
    forward_authorization: bool = False
    max_body_bytes: int = 2_000_000
    body_timeout_s: float = 60.0
    workers: int = 2
    max_waiting: int = 128
    max_in_flight: int = 1024
    decide_timeout_s: float = 60.0
    engine_timeout_s: float = 600.0
    idle_timeout_s: float = 120.0
    output_guard: bool = True
    hold_back: int = 24
    equalise_s: float = 0.0
    embeddings: Literal["deny", "pass"] = "deny"
    images: Literal["deny", "pass"] = "deny"
    models_ttl_s: float = 10.0
