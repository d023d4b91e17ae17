"""Train a target's unlearning adapter (O3, arXiv 2407.10223) and write it into the bundle.

The forget set is given again, checked by its digests, and not kept. The adapter is kept apart from
those of the bundle's other targets, routes are compared on the forget rows, and the bundle is
written last, in one transaction: a training that is interrupted leaves it as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.adapter_choice import RouteChoice, compare_routes
from guard.adapter_data import Levels, forget_prepared
from guard.adapter_request import AdapterRequest, TrainableModel
from guard.adapter_training import earlier_adapters, spec_of, train_adapter
from guard.build import check_key
from guard.bundle import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    Bundle,
    BundleStore,
    TargetEntry,
)
from guard.errors import ArtifactError
from guard.keys import GuardKey
from guard.learn_inputs import entry_of, make_prompter
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from guard.types import Progress, TargetRoute

if TYPE_CHECKING:
    from adapters.orthogonal import Orthogonality
    from adapters.train import TrainReport
    from adapters.unlearning import LossData


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
    shared_words: Callable[[str, str], float],
    threads: int | None = None,
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
        shared_words: ROUGE-L recall of an answer and the truth.
        threads: Threads of the encoder.

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
    # Rows that it was trained on flatter the adapter; where some were held out, those decide.
    choice = compare_routes(
        trained.unseen or trained.pairs,
        bool(trained.unseen),
        _said(request, trained.data, model) if not trained.unseen else [],
        model,
        prompter,
        spec_of(entry),
        trained.use,
        trained.levels,
        shared_words,
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


def _said(request: AdapterRequest, data: LossData, model: TrainableModel) -> list[list[str]]:
    """The counterfactual answers as text; none where the loss's alternatives are none."""
    from adapters.unlearning import LOSSES

    if LOSSES[request.loss].needs != "counterfactuals":
        return []
    decode = model.tokenizer.decode
    return [
        [decode(one.answer, skip_special_tokens=True) for one in row] for row in data.alternatives
    ]


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
    if request.route == "auto" and not choice.unseen:
        notes.append(
            "the routes were compared on rows that the adapter was trained on, which flatters it: "
            "--held-out 0.3 compares them on others"
        )
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
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
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
