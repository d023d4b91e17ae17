"""What `learn corruption` works on: the request, rows, space, prompts, and its log's identity.

All of it is checked before anything is evaluated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from guard.build import BANK_FILE, ENCODER_DIR, SPACE_FILE, read_target
from guard.bundle import Bundle, TargetEntry
from guard.errors import ConfigError, TargetNotFoundError
from guard.forget_rows import check_same_rows, read_examples
from guard.keys import GuardKey
from guard.prompts import ModelPrompts
from guard.targets import DIGESTS_FILE, Prompter, bank_of
from guard.types import Detector, LearningEngine

if TYPE_CHECKING:
    from corruptions.objectives import Example, Measure, Surrogate
    from corruptions.space import Space

TRACE_FILE: Final = "trace.jsonl"

Source = Literal["retained-model", "retained-value", "generic", "refusal", "chance"]


@dataclass(frozen=True, slots=True)
class LearnRequest:
    """What `learn corruption` was asked to do.

    Attributes:
        target: Name of a target of the bundle.
        forget: Its forget set, given again.
        out: Folder of the log.
        optimizer: `eco-zo`, or `nevergrad:NAME`.
        objective: Name in `corruptions.objectives.OBJECTIVES`; None chooses by the engines.
        surrogate: Where v_r comes from without a retained model; None chooses by the objective.
        retained_values: v_r by measure, where it is known as a number.
        joint: Search method, dims, strength, spans and frame; else strength alone.
        methods: Methods to search; for the strength alone at most one.
        dims: Dimensions of that one, in [1, hidden]; None keeps the bundle's.
        budget: Evaluations on the train rows, at least 3.
        sample: Rows of the forget set that are looked at, at least 2; None takes all.
        held_out: Share of them that chooses among the best, in (0, 1).
        draws: Draws of the noise that each evaluation averages, the served one first.
        seed: Of sample, split and optimiser.
        parallel: Candidates at a time; None takes the log's, or as many as there are engines.
        resume: Insist on a log to go on with.
        restart: Begin anew, whatever log there is.
        allow_changed: Take a forget set that is not the one of `target add`.
        apply: Write the result into the bundle.
        retain: Neighbouring data: reports how much of it would be corrupted.
    """

    target: str
    forget: Path
    out: Path
    optimizer: str
    objective: str | None = None
    surrogate: Surrogate | None = None
    retained_values: Mapping[str, float] = field(default_factory=dict)
    joint: bool = False
    methods: tuple[str, ...] = ()
    dims: int | None = None
    budget: int = 40
    sample: int | None = 30
    held_out: float = 0.3
    draws: int = 1
    seed: int = 0
    parallel: int | None = None
    resume: bool = False
    restart: bool = False
    allow_changed: bool = False
    apply: bool = True
    retain: Path | None = None


@dataclass(frozen=True, slots=True)
class NamedEngine:
    """An engine that candidates are evaluated on.

    Attributes:
        name: What messages call it.
        engine: The engine itself.
        scoring: False if it only generates.
        identity: Says which model it is: a digest of the weights, or `http`.
    """

    name: str
    engine: LearningEngine
    scoring: bool
    identity: str


@dataclass(frozen=True, slots=True)
class RetainedModel:
    """A model that never saw the forget set.

    Attributes:
        load: Loads it; not called where a log holds its values already.
        identity: A digest of its weights.
    """

    load: Callable[[], LearningEngine]
    identity: str


def entry_of(bundle: Bundle, name: str) -> TargetEntry:
    """Return a target's entry.

    Raises:
        TargetNotFoundError: If there is no such target.
    """
    entry = bundle.manifest.targets.get(name)
    if entry is None:
        known = ", ".join(sorted(bundle.manifest.targets)) or "none"
        raise TargetNotFoundError(f"no target {name!r} in {bundle.root} (there: {known})")
    return entry


def source_of(
    request: LearnRequest,
    objective: str,
    measures: Mapping[str, Measure],
    retained: RetainedModel | None,
) -> Source:
    """Say where v_r comes from, and refuse what doesn't fit together."""
    from corruptions.objectives import chance, default_surrogate

    given = [retained is not None, bool(request.retained_values), request.surrogate is not None]
    if sum(given) > 1:
        raise ConfigError(
            "--retained-engine, --retained-value and --surrogate each say what to aim at; give one"
        )
    if retained is not None:
        return "retained-model"
    if request.retained_values:
        if set(request.retained_values) != set(measures):
            raise ConfigError(
                f"--retained-value: objective {objective!r} compares {', '.join(measures)}, values "
                f"were given for {', '.join(request.retained_values)}; give each as NAME=VALUE"
            )
        return "retained-value"
    surrogate = request.surrogate or default_surrogate(objective)
    if surrogate == "chance":
        for name in measures:
            chance(name, [])
    return surrogate


def measurable_examples(
    request: LearnRequest,
    bundle: Bundle,
    entry: TargetEntry,
    key: GuardKey,
    measures: Mapping[str, Measure],
) -> tuple[list[Example], int]:
    """Return the sampled rows that can be measured, in random order, and how many can't."""
    from corruptions.seeding import Draws

    rows, examples = read_examples(request.forget)
    if not request.allow_changed:
        stored = bundle.read(entry.prefix + DIGESTS_FILE)
        check_same_rows(rows, stored, key, request.forget)
    lacks = [lack for one in examples for m in measures.values() if (lack := m.lacks(one))]
    fitting = [one for one in examples if not any(m.lacks(one) for m in measures.values())]
    if not fitting:
        what = lacks[0] if lacks else "an answer"
        raise ConfigError(
            f"{request.forget}: no row can be measured: rows need {what}; choose another "
            "--objective, or give rows that have it"
        )
    order = Draws(b"learn %d" % request.seed).permutation(len(fitting))[: request.sample]
    return [fitting[int(place)] for place in order], len(rows) - len(fitting)


def space_of(request: LearnRequest, entry: TargetEntry, prompts: ModelPrompts) -> Space:
    """Return what is searched; the bundle's corruption gives what isn't."""
    from corruptions.space import Space
    from corruptions.spec import CorruptionSpec

    base = CorruptionSpec.from_dict(entry.corruption["spec"])
    if not request.joint and request.methods:
        if len(request.methods) > 1:
            raise ConfigError("--search strength keeps to one --method; give --search joint")
        base = replace(base, method=request.methods[0])
    if request.dims is not None:
        if request.joint or request.dims > prompts.hidden_size:
            raise ConfigError(
                f"--dims {request.dims}: a joint search chooses them, and this model's embeddings "
                f"have {prompts.hidden_size}"
            )
        base = replace(base, dims=request.dims)
    methods = request.methods if request.joint else ()
    return Space(base, prompts.hidden_size, prompts.embedding_rms, request.joint, methods)


def parallel_of(request: LearnRequest, engines: int) -> int:
    """How many candidates at a time; a resumed search keeps to its own number."""
    from corruptions.trace import read_identity

    path = request.out / TRACE_FILE
    found = None if request.restart else read_identity(path)
    if request.resume and found is None:
        raise ConfigError(f"--resume: there is no log {path} to go on with")
    known = (found or {}).get("parallel")
    return request.parallel or (known if isinstance(known, int) else engines)


def identity_of(
    request: LearnRequest,
    bundle: Bundle,
    entry: TargetEntry,
    engines: Sequence[NamedEngine],
    retained: RetainedModel | None,
    space: Space,
) -> dict[str, Any]:
    """All that a log's records depend on. Which engines there are doesn't count, their model does.

    The bundle's strength doesn't either: a finished search has changed it.
    """
    files = bundle.manifest.files
    shared = [BANK_FILE, *bundle.target_files(entry.prefix)]
    fixed = None if space.joint else {**space.base.to_dict(), "strength": None}
    detector = json.dumps([(rel, files[rel].sha256) for rel in sorted(shared) if rel in files])
    return {
        "target": request.target,
        "detector": hashlib.sha256(detector.encode()).hexdigest(),
        "key": bundle.manifest.key_id,
        "model": sorted({one.identity for one in engines}),
        "retained": retained.identity if retained is not None else dict(request.retained_values),
        "optimizer": request.optimizer,
        "optimizer_version": _version("nevergrad"),
        "search": {"fixed": fixed, "variables": {n: str(v) for n, v in space.variables.items()}},
        "budget": request.budget,
        "held_out": request.held_out,
        "draws": request.draws,
        "seed": request.seed,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _detector(bundle: Bundle, entry: TargetEntry, key: GuardKey, threads: int | None) -> Detector:
    """Load the one target: what it marks doesn't depend on the bundle's others."""
    from classifiers.bundle import load_detector

    return load_detector(
        bundle.dir / ENCODER_DIR,
        bundle.read(SPACE_FILE),
        {entry.name: read_target(bundle, entry, key)},
        budget=bundle.manifest.fpr_budget,
        key=key.subkey("ngrams"),
        threads=threads,
    )


def make_prompter(
    name: str,
    bundle: Bundle,
    entry: TargetEntry,
    key: GuardKey,
    prompts: ModelPrompts,
    threads: int | None,
) -> Prompter:
    """Return what corrupts questions as serving does, with its spans remembered."""
    detector = _Remembered(_detector(bundle, entry, key, threads))
    return Prompter(name, detector, prompts, key, bank_of(bundle, prompts))


def make_prompters(
    request: LearnRequest,
    bundle: Bundle,
    entry: TargetEntry,
    key: GuardKey,
    prompts: ModelPrompts,
    threads: int | None,
) -> list[Prompter]:
    """Return what corrupts questions, by draw of the noise: the first as serving does."""
    served = make_prompter(request.target, bundle, entry, key, prompts, threads)
    # The key is all that seeds the noise.
    keys = [GuardKey(key.subkey(f"learn-draw-{draw}")) for draw in range(1, request.draws)]
    return [served, *(replace(served, key=one) for one in keys)]


class _Remembered:
    """A detector that remembers spans: each candidate asks for the same ones."""

    def __init__(self, detector: Detector) -> None:
        self.targets = detector.targets
        self.detect = detector.detect
        self.spans = lru_cache(maxsize=None)(detector.spans)
