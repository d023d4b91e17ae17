"""Train one target's adapter: check the inputs, make what the loss needs, train.

What follows, the comparison of routes and the bundle, is `guard.learn_adapter`'s.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guard.adapter_data import Levels, answered_pairs, find_levels, forget_prepared, prepare
from guard.adapter_request import AdapterRequest, TrainableModel
from guard.build import check_key, check_model
from guard.bundle import ADAPTER_CONFIG, ADAPTER_FOLDER, ADAPTER_WEIGHTS, Bundle, TargetEntry
from guard.errors import ConfigError, DataError
from guard.forget_rows import check_same_rows
from guard.keys import GuardKey
from guard.learn_inputs import entry_of
from guard.prompts import ModelPrompts
from guard.rows import read_rows
from guard.targets import DIGESTS_FILE, Prompter
from guard.types import AdapterUse, Progress

if TYPE_CHECKING:
    from adapters.alternatives import Pairs
    from adapters.losses import Loss
    from adapters.orthogonal import Orthogonality
    from adapters.train import TrainReport, TrainSettings
    from adapters.unlearning import LossData
    from corruptions.spec import CorruptionSpec

TRAINING: Final = "training"
"""Folder under `out` with the adapter, its checkpoints and the training's report."""

_VALIDATE_EVERY: Final = 6


@dataclass(frozen=True, slots=True)
class Trained:
    """An adapter, before it is compared and written.

    Attributes:
        pairs: Questions and answers that it was trained on.
        unseen: Those that were held out.
        data: What its loss was made from.
        levels: How likely the answers are to a model that doesn't know them: those held out, if
            any, else those trained on.
        report: Of the training.
        use: The adapter at its trained strength.
        apart: What it was kept apart from.
        skipped: Forget rows without an answer.
    """

    pairs: tuple[tuple[str, str], ...]
    unseen: tuple[tuple[str, str], ...]
    data: LossData
    levels: Levels
    report: TrainReport
    use: AdapterUse
    apart: Orthogonality
    skipped: int


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
    kept = [row for row in range(len(pairs)) if row not in held]
    rest = tuple(pairs[row] for row in kept)
    if request.restart:
        forget_prepared(request)
    levels = find_levels(request, pairs, model, identity, progress)
    known = levels.only(kept)
    data = prepare(request, rest, model, prompter, spec_of(entry), known, progress)
    apart = _orthogonality(request, bundle)
    report = _train(request, data, model, apart, identity, levels, pairs, held, progress)
    folder = request.out / TRAINING
    digests = [
        hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
    ]
    use = AdapterUse("-".join(digests), folder, request.rank, 1.0)
    unseen = tuple(pairs[row] for row in sorted(held))
    compared = levels.only(sorted(held)) if held else levels
    return Trained(rest, unseen, data, compared, report, use, apart, skipped)


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


def spec_of(entry: TargetEntry) -> CorruptionSpec:
    """Return a target's corruption."""
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
        rows = [pairs[row] for row in sorted(held)]
        validation = _validation(model, rows, levels.only(sorted(held)))
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
