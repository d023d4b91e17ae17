"""Train a target's unlearning adapter (O3, arXiv 2407.10223) and write it into the bundle.

The forget set is given again, checked by its digests, and not kept. The adapter is kept apart from
those of the bundle's other targets, routes are compared on the forget rows, and the bundle is
written last, in one transaction: a training that is interrupted leaves it as it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guard.adapter_choice import RouteChoice, compare_routes
from guard.adapter_data import (
    Levels,
    answered_pairs,
    find_levels,
    forget_prepared,
    prepare,
)
from guard.adapter_request import AdapterRequest, TrainableModel
from guard.build import ADAPTER_WEIGHTS, check_key, check_model
from guard.bundle import ADAPTER_FOLDER, Bundle, BundleStore, TargetEntry
from guard.errors import ArtifactError, ConfigError, DataError
from guard.forget_rows import check_same_rows
from guard.keys import GuardKey
from guard.learn_inputs import entry_of, make_prompter
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from guard.rows import read_rows
from guard.targets import DIGESTS_FILE, Prompter
from guard.types import AdapterUse, Progress, TargetRoute, WeightPolicy

if TYPE_CHECKING:
    from adapters.alternatives import Pairs
    from adapters.losses import Loss
    from adapters.orthogonal import Orthogonality
    from adapters.train import TrainReport, TrainSettings
    from adapters.unlearning import LossData

TRAINING: Final = "training"
"""Folder under `out` with the adapter, its checkpoints and the training's report."""

_VALIDATE_EVERY: Final = 6


@dataclass(frozen=True, slots=True)
class AdapterResult:
    """What was trained, and what it does.

    Attributes:
        target: The target's name.
        folder: The adapter.
        report: Of the training.
        levels: Likelihood of what the model doesn't know.
        choice: The routes side by side.
        route: The one that the target takes.
        cosine: Largest principal-angle cosine to an earlier adapter's input subspace; None if there
            is none.
        shared: Layers in which room was left only by sharing a subspace with the oldest adapters.
        bytes: Size of the adapter's file.
        version: The bundle's version that holds it; None if nothing was written.
        notes: Sentences for the user.
    """

    target: str
    folder: Path
    report: TrainReport
    levels: Levels
    choice: RouteChoice
    route: TargetRoute
    cosine: float | None
    shared: int
    bytes: int
    version: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter, before it is compared and written.

    Attributes:
        pairs: Questions and answers that it was trained on.
        data: What its loss was made from.
        levels: Likelihood of what the model doesn't know.
        report: Of the training.
        use: The adapter at its trained strength.
        apart: What it was kept apart from.
        skipped: Forget rows without an answer.
    """

    pairs: tuple[tuple[str, str], ...]
    data: LossData
    levels: Levels
    report: TrainReport
    use: AdapterUse
    apart: Orthogonality
    skipped: int


def learn_adapter(
    request: AdapterRequest,
    *,
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts,
    model: TrainableModel,
    identity: str,
    ledger: Ledger | None,
    progress: Progress,
    threads: int | None = None,
    shared_words: Callable[[str, str], float] | None = None,
) -> AdapterResult:
    """Train, compare the routes and, if asked, write a new version of the bundle.

    Args:
        request: What to train, and how.
        store: The bundle; it has to hold the target.
        key: Its key.
        prompts: Files of the served model.
        model: The served model itself.
        identity: Says which one it is: a digest of its weights.
        ledger: Gets a row about the change.
        progress: Told how far the work is.
        threads: Threads of the encoder.
        shared_words: ROUGE-L recall of an answer and the truth.

    Raises:
        TargetNotFoundError: There is no such target.
        DataError: The rows can't be trained on, or are not those of `target add`.
        ConfigError: A setting can't be used, or `out` holds another training.
        KeyboardInterrupt: On Ctrl-C, with all that was done saved: the same call goes on there.
    """
    bundle = store.current()
    check_key(bundle, key)
    entry = entry_of(bundle, request.target)
    prompter = make_prompter(request.target, bundle, entry, key, prompts, threads)
    trained = train_adapter(
        request,
        bundle=bundle,
        key=key,
        prompts=prompts,
        model=model,
        identity=identity,
        prompter=prompter,
        progress=progress,
    )
    choice = compare_routes(
        trained.pairs,
        _said(request, trained.data, model),
        model,
        prompter,
        _spec(entry),
        trained.use,
        trained.levels,
        shared_words or _overlap,
        progress,
    )
    route = choice.best if request.route == "auto" else request.route
    result = AdapterResult(
        target=request.target,
        folder=trained.use.path,
        report=trained.report,
        levels=trained.levels,
        choice=choice,
        route=route,
        cosine=_cosine(request, bundle, trained.use.path),
        shared=_shared(trained.apart, request),
        bytes=(trained.use.path / ADAPTER_WEIGHTS).stat().st_size,
        version=None,
        notes=_notes(request, choice, route, trained.skipped),
    )
    forget_prepared(request)
    if request.apply:
        version = _write(result, request, entry, store)
        result = replace(result, version=version)
        if ledger is not None:
            ledger.append(
                "bundle",
                action="learn adapter",
                target=entry.name,
                bundle_version=version,
                route=route,
            )
    return result


def train_adapter(
    request: AdapterRequest,
    *,
    bundle: Bundle,
    key: GuardKey,
    prompts: ModelPrompts,
    model: TrainableModel,
    identity: str,
    prompter: Prompter,
    progress: Progress,
) -> Trained:
    """Check the inputs, make what the loss needs, train: `learn_adapter` without what follows.

    Args:
        request: What to train, and how.
        bundle: Holds the target.
        key: Its key.
        prompts: Files of the served model.
        model: The served model itself.
        identity: Says which one it is.
        prompter: Corrupts the target's questions as serving does.
        progress: Told how far the work is.

    Raises:
        As `learn_adapter`.
    """
    check_key(bundle, key)
    check_model(bundle, prompts.fingerprint)
    entry = entry_of(bundle, request.target)
    pairs, skipped = _pairs(request, bundle, entry, key)
    held = _held_out(request, len(pairs))
    _check_settings(request, bool(held), model)
    rest = tuple(pair for row, pair in enumerate(pairs) if row not in held)
    if request.restart:
        forget_prepared(request)
    levels = find_levels(request, pairs, model, identity, progress)
    data = prepare(request, rest, model, prompter, _spec(entry), levels, progress)
    apart = _orthogonality(request, bundle)
    report = _train(request, data, model, apart, identity, levels, pairs, held, progress)
    folder = request.out / TRAINING
    digest = hashlib.sha256((folder / ADAPTER_WEIGHTS).read_bytes()).hexdigest()
    use = AdapterUse(digest, folder, request.rank, 1.0)
    return Trained(rest, data, levels, report, use, apart, skipped)


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


# --- Inputs -------------------------------------------------------------------------------------


def _pairs(
    request: AdapterRequest, bundle: Bundle, entry: TargetEntry, key: GuardKey
) -> tuple[list[tuple[str, str]], int]:
    rows = read_rows(request.forget)
    if not request.allow_changed:
        stored = bundle.read(entry.prefix + DIGESTS_FILE)
        check_same_rows(rows, stored, key, request.forget)
    pairs = answered_pairs(rows, request.forget)
    return pairs, len(rows) - len(pairs)


def _spec(entry: TargetEntry) -> Any:
    from corruptions.spec import CorruptionSpec

    return CorruptionSpec.from_dict(entry.corruption["spec"])


def _held_out(request: AdapterRequest, rows: int) -> frozenset[int]:
    count = round(request.held_out * rows)
    if request.held_out and not 0 < count < rows:
        raise DataError(
            f"{request.held_out:g} of {rows} rows can't be held out: give more rows, or "
            "--held-out 0",
            file=str(request.forget),
        )
    order = np.random.default_rng((request.seed, 3)).permutation(rows)
    return frozenset(int(place) for place in order[:count])


def earlier_adapters(bundle: Bundle, name: str) -> list[Path]:
    """Return the adapters of a bundle's other targets, oldest first."""
    others = [one for one in bundle.manifest.targets.values() if one.adapter and one.name != name]
    others.sort(key=lambda one: (str(one.adapter.get("number", 0)).zfill(9), one.name))
    return [bundle.path(f"{one.prefix}{ADAPTER_FOLDER}") for one in others]


def _orthogonality(request: AdapterRequest, bundle: Bundle) -> Orthogonality:
    from adapters.orthogonal import EarlierAdapters, Orthogonality

    folders = request.earlier
    if folders is None:
        folders = earlier_adapters(bundle, request.target)
    return Orthogonality(
        EarlierAdapters.read(folders),
        mode=request.orthogonality,
        sides=request.sides,
        weight=request.orthogonal_weight,
    )


# --- Training -----------------------------------------------------------------------------------


def _train(
    request: AdapterRequest,
    data: LossData,
    model: TrainableModel,
    apart: Orthogonality,
    identity: str,
    levels: Levels,
    pairs: Pairs,
    held: frozenset[int],
    progress: Progress,
) -> TrainReport:
    from adapters.train import train_lora

    settings = _settings(request, bool(held))
    loss, facts = _loss(request, data, model)
    validation = None
    if held:
        rows = [pair for row, pair in enumerate(pairs) if row in held]
        validation = _validation(model, rows, levels)
    return train_lora(
        model.model,
        data.examples,
        settings,
        request.out / TRAINING,
        loss=loss,
        facts={**facts, "model": identity, "held_out": sorted(held), "wanted": levels.tail},
        constraint=apart,
        validation=validation,
        progress=progress,
        what=f"train adapter ({request.loss})",
        resume=not request.restart,
    )


def _settings(request: AdapterRequest, validated: bool) -> TrainSettings:
    from adapters.train import TrainSettings

    return TrainSettings(
        rank=request.rank,
        alpha=request.alpha,
        layers=request.layers,
        epochs=request.epochs,
        batch=request.batch,
        rate=request.rate,
        warmup=0.15,
        seed=request.seed,
        checkpoint_every=5,
        validate_every=_VALIDATE_EVERY if validated else 0,
        patience=request.patience if validated else 0,
    )


def _check_settings(request: AdapterRequest, validated: bool, model: TrainableModel) -> None:
    """Tell now what would be told after minutes of preparation."""
    import adapters.matched  # noqa: F401  (registers its loss)
    from adapters.unlearning import check_options

    check_options(request.loss, **request.options)
    _settings(request, validated)
    count = model.model.config.num_hidden_layers
    if request.layers is not None and request.layers[1] > count:
        raise ConfigError(f"layers is {request.layers}; the model has {count}")
    if request.retain is not None:
        answered_pairs(read_rows(request.retain), request.retain)


def _loss(
    request: AdapterRequest, data: LossData, model: TrainableModel
) -> tuple[Loss, dict[str, Any]]:
    """The loss as asked, and all of it that decides on the result."""
    from adapters.examples import encode_chats
    from adapters.losses import InBfloat16, has_bfloat16, with_retain
    from adapters.unlearning import make_loss

    loss = make_loss(request.loss, data, **request.options)
    facts: dict[str, Any] = {
        "loss": request.loss,
        "options": dict(request.options),
        "data": data.fingerprint(),
    }
    if request.retain is not None:
        kept = answered_pairs(read_rows(request.retain), request.retain)
        examples = encode_chats(model.tokenizer, kept)
        loss = with_retain(
            loss, tuple(examples), weight=request.retain_weight, size=request.batch, seed=0
        )
        digest = hashlib.sha256(repr([(e.prompt, e.answer) for e in examples]).encode())
        facts["retain"] = [request.retain_weight, digest.hexdigest()]
    fast = request.precision == "bfloat16"
    if request.precision == "auto":
        fast = has_bfloat16(model.model.device)
    facts["precision"] = "bfloat16" if fast else "float32"
    return (InBfloat16(loss) if fast else loss), facts


def _validation(model: TrainableModel, rows: Pairs, levels: Levels) -> Callable[[Any], float]:
    """How far the held-out answers' least likely tokens are from those of the unknown, nats."""
    from adapters.examples import collate, encode_chats
    from adapters.losses import answer_log_probs
    from adapters.matched import tail_likelihood

    examples = encode_chats(model.tokenizer, rows)

    def validate(network: Any) -> float:
        found = []
        for row in range(len(examples)):
            batch = collate(examples, [row]).to(network.device)
            log_probs, told = answer_log_probs(network, batch)
            found.append(log_probs[told].float().cpu())
        return abs(tail_likelihood(found) - levels.tail)

    return validate


def _said(request: AdapterRequest, data: LossData, model: TrainableModel) -> list[list[str]]:
    """The counterfactual answers as text; none where the loss's alternatives are none."""
    from adapters.unlearning import LOSSES

    if LOSSES[request.loss].needs != "counterfactuals":
        return []
    decode = model.tokenizer.decode
    return [
        [decode(one.answer, skip_special_tokens=True) for one in row] for row in data.alternatives
    ]


def _overlap(answer: str, truth: str) -> float:
    """Share of the truth's words that an answer has too."""
    words = truth.casefold().split()
    there = set(answer.casefold().split())
    return sum(word in there for word in words) / max(len(words), 1)


# --- Result -------------------------------------------------------------------------------------


def _cosine(request: AdapterRequest, bundle: Bundle, folder: Path) -> float | None:
    from adapters.orthogonal import subspace_cosine

    folders = request.earlier
    if folders is None:
        folders = earlier_adapters(bundle, request.target)
    found = [max(subspace_cosine(one, folder, "input").values()) for one in folders]
    return max(found) if found else None


def _shared(apart: Orthogonality, request: AdapterRequest) -> int:
    left = apart.earlier.left_out(request.rank, request.sides)
    return sum(len(layers) for layers in left.values())


def _notes(
    request: AdapterRequest, choice: RouteChoice, route: TargetRoute, skipped: int
) -> tuple[str, ...]:
    notes = []
    if skipped:
        notes.append(f"{skipped} forget rows have no answer: nothing was trained on them")
    if route != choice.best:
        notes.append(f"the evaluation would have chosen the route {choice.best}")
    return tuple(notes)


def _write(
    result: AdapterResult, request: AdapterRequest, entry: TargetEntry, store: BundleStore
) -> int:
    """Write adapter, figures and route, unless the target was changed meanwhile."""
    with store.transaction() as draft:
        found = draft.manifest.targets.get(result.target)
        if found is None or found.created_at != entry.created_at:
            raise ArtifactError(
                f"target {result.target!r} was removed or learned anew in {store.root} while its "
                f"adapter was trained: nothing was written; the adapter is in {result.folder}"
            )
        prefix = f"{found.prefix}{ADAPTER_FOLDER}"
        draft.remove(prefix)
        for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
            draft.write(f"{prefix}/{name}", (result.folder / name).read_bytes())
        number = 1 + max(
            (int(one.adapter.get("number", 0)) for one in draft.manifest.targets.values()),
            default=0,
        )
        found.adapter = {"number": number, **_figures(result, request)}
        found.route = result.route
        by_hand = "set by hand; the evaluation: "
        found.route_reason = ("" if request.route == "auto" else by_hand) + result.choice.reason
    return store.current_version()


def _figures(result: AdapterResult, request: AdapterRequest) -> dict[str, Any]:
    """What the manifest keeps: figures, no text."""
    return {
        "rank": request.rank,
        "alpha": request.alpha,
        "loss": request.loss,
        "orthogonality": request.orthogonality,
        "largest_cosine": result.cosine,
        "steps": result.report.steps,
        "seconds": round(result.report.seconds, 1),
        "unknown": dict(result.choice.unknown),
        "routes": {route: asdict(one) for route, one in result.choice.figures.items()},
    }
