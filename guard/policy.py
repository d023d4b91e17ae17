"""What is done about a target that a request touches, and about all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from guard.errors import ConfigError
from guard.rewrite import Corrupter
from guard.types import AdapterUse, Route, Segment, TargetHit, TargetRoute, TargetStatus


@dataclass(frozen=True, slots=True)
class TargetPolicy:
    """What is done when one target is hit.

    Attributes:
        status: `enforced` acts, `detecting` only records.
        corrupter: The target's corruption.
        entity_only: Corrupt what the span finder names; otherwise all of a flagged text.
        route: What happens to a request that touches it.
        adapter: The target's adapter, for routes that adapt; its weight is the hit's to say.
    """

    status: TargetStatus
    corrupter: Corrupter
    entity_only: bool = True
    route: TargetRoute = "corrupt"
    adapter: AdapterUse | None = None

    def __post_init__(self) -> None:
        if self.adapts and self.adapter is None:
            raise ConfigError(f"the route {self.route} needs an adapter, and there is none")

    @property
    def corrupts(self) -> bool:
        """Whether the route corrupts embeddings."""
        return self.route in ("corrupt", "corrupt+adapt")

    @property
    def adapts(self) -> bool:
        """Whether the route uses the adapter."""
        return self.route in ("adapt", "corrupt+adapt")

    @property
    def refuses(self) -> bool:
        """Whether the route answers nothing."""
        return self.route == "refuse"


def route_of(
    hits: Sequence[TargetHit],
    targets: Mapping[str, TargetPolicy],
    segments: Sequence[Segment],
    coverage: float,
) -> Route:
    """Block what was not read whole, else do what the enforced targets' policies say, together.

    Refusing outdoes all. A text that no embeddings can take the place of is the adapter's, if its
    target has one in its route; else it is refused.
    """
    if coverage < 1.0:
        return "block"
    places = {segment.path: segment.message for segment in segments}
    corrupts = adapts = False
    for hit in hits:
        if not hit.enforced:
            continue
        policy = targets[hit.name]
        if policy.refuses:
            return "refuse"
        adapts |= policy.adapts
        if policy.corrupts:
            placed = [places[span.path] is not None for span in hit.spans]
            if not all(placed) and not policy.adapts:
                return "refuse"
            corrupts |= any(placed)
    if corrupts and adapts:
        return "corrupt+adapt"
    return "corrupt" if corrupts else "adapt" if adapts else "pass"
