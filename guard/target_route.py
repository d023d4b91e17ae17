"""What a target's requests take, set by hand: its route, and how strongly its adapter acts."""

from __future__ import annotations

from guard.build import check_key
from guard.bundle import Bundle, BundleStore
from guard.errors import ConfigError
from guard.keys import GuardKey
from guard.learn_inputs import entry_of
from guard.ledger import Ledger
from guard.types import TargetRoute, WeightPolicy


def set_route(
    name: str,
    route: TargetRoute | None,
    weights: WeightPolicy | None,
    *,
    store: BundleStore,
    key: GuardKey,
    ledger: Ledger | None,
) -> int:
    """Set by hand what a target's requests take, and how strongly; return the new version.

    Args:
        name: The target.
        route: None leaves it.
        weights: Policy of the soft weight; None leaves it.
        store: The bundle.
        key: Its key.
        ledger: Gets a row about the change.

    Raises:
        TargetNotFoundError: There is no such target.
        ConfigError: The route needs an adapter and the target has none, or its detector has no
            such policy.
    """
    bundle = store.current()
    check_key(bundle, key)
    entry_of(bundle, name)
    if weights is not None and weights != "monotone":
        _check_policy(bundle, name, weights)
    with store.transaction() as draft:
        entry = draft.manifest.targets[name]
        if route is not None and "adapt" in route and not entry.adapter:
            raise ConfigError(
                f"target {name!r} has no adapter for the route {route}: train one with "
                f"`unlearn-guard learn adapter --target {name} --forget FILE --out DIR`"
            )
        if route is not None:
            entry.route, entry.route_reason = route, "set by hand"
        entry.weights = weights or entry.weights
        change = {"route": entry.route, "weights": entry.weights}
    version = store.current_version()
    if ledger is not None:
        ledger.append(
            "bundle", action="target route", target=name, bundle_version=version, **change
        )
    return version


def _check_policy(bundle: Bundle, name: str, weights: WeightPolicy) -> None:
    if bundle.manifest.targets[name].detector.get("method") != "o3":
        raise ConfigError(
            f"the weight policy {weights} is of O3's detector, and target {name!r} has another: "
            "add it with --detector o3, or keep monotone"
        )
