"""Learn a target's corruption offline, against the model itself, and write it into the bundle.

The forget set is given again, checked by its digests, and not kept. Candidates are corrupted by the
code that serves (`guard.targets.Prompter`): the same spans, tokens, rows and, in the first draw,
the same noise. Everything is logged under `--out`, so that the same command resumes; the bundle is
written last, in one transaction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from corruptions.evaluate import EnginePool, Figures, Judge
from corruptions.learner import Trial, before, search, validate
from corruptions.objectives import Example, default_objective, measures_of
from corruptions.search import make_optimiser
from corruptions.space import Space
from corruptions.spec import CorruptionSpec
from corruptions.trace import Trace
from guard.build import check_key, check_model
from guard.bundle import Bundle, BundleStore, TargetEntry
from guard.errors import ArtifactError
from guard.keys import GuardKey
from guard.learn_inputs import (
    TRACE_FILE,
    LearnRequest,
    NamedEngine,
    RetainedModel,
    Source,
    entry_of,
    identity_of,
    make_prompters,
    measurable_examples,
    parallel_of,
    source_of,
    space_of,
)
from guard.learn_reference import Comparison
from guard.ledger import Ledger
from guard.normalise import normalise
from guard.prompts import ModelPrompts
from guard.rows import read_rows
from guard.types import Detector, Progress


@dataclass(frozen=True, slots=True)
class LearnResult:
    """What the search found.

    Attributes:
        target: The target's name.
        optimizer: Which one searched.
        objective: What was compared.
        source: Where v_r came from.
        before: What the bundle held when the search began.
        finalists: The trials that validation rows chose among, best first.
        trials: All trials, in order.
        clean: Without corruption, by `train` and `validation`.
        retained: Mean v_r by measure, by `train` and `validation`.
        rows: Rows, by `train` and `validation`.
        retain_flagged: Rows of the retain set that the detector flags, and all; None without one.
        skipped: Forget rows that the objective can't measure.
        version: The bundle's version that holds the result; None if nothing was written.
    """

    target: str
    optimizer: str
    objective: str
    source: Source
    before: CorruptionSpec
    finalists: Sequence[Trial]
    trials: Sequence[Trial]
    clean: Mapping[str, Figures]
    retained: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, int]
    retain_flagged: tuple[int, int] | None
    skipped: int
    version: int | None = None

    @property
    def best(self) -> Trial:
        """The chosen trial."""
        return self.finalists[0]

    @property
    def knows(self) -> bool:
        """False if the model is as close to v_r without any corruption."""
        best = self.best
        last = (best.validation or best.train).loss
        clean = self.clean.get("validation", self.clean["train"]).loss
        return self.clean["train"].loss + clean > best.train.loss + last

    @property
    def notes(self) -> list[str]:
        """Sentences for the user."""
        best = self.best
        notes = []
        if not self.knows:
            notes.append(_UNKNOWN)
        elif best.spec == self.before:
            notes.append("nothing better than the bundle's corruption was found; it stays")
        if best.broken:
            notes.append(
                f"every finalist's answers are below the fluency floor ({', '.join(best.broken)}); "
                "the bundle stays as it is: give more --sample or --budget, or another --method"
            )
        if self.skipped:
            notes.append(f"{self.skipped} forget rows can't be measured by {self.objective}")
        if "validation" not in self.rows:
            notes.append("no rows were held out: the loss is that of the rows searched on")
        return notes

    def learned(self) -> dict[str, Any]:
        """Return what the bundle's manifest keeps of it: figures, no text."""
        validation = self.best.validation
        return {
            "optimizer": self.optimizer,
            "objective": self.objective,
            "surrogate": self.source,
            "evaluations": len(self.trials),
            "rows": dict(self.rows),
            "train": asdict(self.best.train),
            "validation": None if validation is None else asdict(validation),
            "clean_loss": self.clean["train"].loss,
            "retained_values": dict(self.retained["train"]),
            "model_knows": self.knows,
        }


_UNKNOWN = (
    "the model is as close to the retained value without any corruption: it does not seem to know "
    "the target; the bundle keeps its corruption"
)


def learn_corruption(
    request: LearnRequest,
    *,
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts,
    engines: Sequence[NamedEngine],
    retained: RetainedModel | None,
    ledger: Ledger | None,
    progress: Progress,
    note: Callable[[str], None],
    threads: int | None = None,
) -> LearnResult:
    """Search a target's corruption and, if asked, write it into a new version of the bundle.

    Args:
        request: What to search, and how.
        store: The bundle; it has to hold the target.
        key: Its key.
        prompts: Files of the served model.
        engines: Where candidates are evaluated, at least one.
        retained: A model that never saw the forget set, if there is one.
        ledger: Gets a row about the change.
        progress: Told the best so far after every evaluation.
        note: Told what happens to engines.
        threads: Threads of the detector's encoder.

    Raises:
        TargetNotFoundError: If the bundle holds no such target.
        DataError: If the forget set is another, or a row is wrong.
        ConfigError: If options don't fit together, or `out` holds another search.
        EngineUnavailableError: If every engine failed; the log is kept.
    """
    bundle = store.current()
    check_key(bundle, key)
    check_model(bundle, prompts.fingerprint)
    entry = entry_of(bundle, request.target)
    work = _open(request, bundle, entry, key, prompts, engines, retained, threads)
    pool = EnginePool([(one.name, one.engine) for one in engines], note)
    result = _search(work, pool, progress)
    better = result.knows and not result.best.broken
    if request.apply and better and result.best.spec != entry_spec(entry):
        result = replace(result, version=_write(result, entry, store))
        if ledger is not None:
            change = {"target": result.target, "bundle_version": result.version}
            ledger.append("bundle", action="learn corruption", **change)
    return result


@dataclass(frozen=True, slots=True)
class _Work:
    """One search, all of its inputs checked."""

    request: LearnRequest
    objective: str
    compare: Comparison
    examples: Sequence[Example]
    skipped: int
    space: Space
    current: CorruptionSpec
    parallel: int
    trace: Trace

    @property
    def parts(self) -> dict[str, slice]:
        """Places of the train and validation rows."""
        total = len(self.examples)
        held = min(total - 1, round(self.request.held_out * total))
        parts = {"train": slice(held, total), "validation": slice(0, held)}
        return parts if held else {"train": parts["train"]}


def _open(
    request: LearnRequest,
    bundle: Bundle,
    entry: TargetEntry,
    key: GuardKey,
    prompts: ModelPrompts,
    engines: Sequence[NamedEngine],
    retained: RetainedModel | None,
    threads: int | None,
) -> _Work:
    """Check everything that a user can get wrong, then open or resume the log."""
    scoring = all(one.scoring for one in engines)
    objective = request.objective or default_objective(scoring)
    measures = measures_of(objective, scoring)
    source = source_of(request, objective, measures, retained)
    examples, skipped = measurable_examples(request, bundle, entry, key, measures)
    space = space_of(request, entry, prompts)
    parallel = parallel_of(request, len(engines))
    make_optimiser(request.optimizer, space, request.budget, request.seed, parallel)
    rows = "".join(key.digest("learn-row", repr(one).encode()) for one in examples)
    identity = identity_of(request, bundle, entry, engines, retained, space) | {
        "objective": objective,
        "source": source,
        "parallel": parallel,
        "rows": hashlib.sha256(rows.encode()).hexdigest(),
    }
    trace = Trace(request.out / TRACE_FILE, identity, request.restart)
    prompters = make_prompters(request, bundle, entry, key, prompts, threads)
    compare = Comparison(measures, source, request.retained_values, retained, scoring, prompters)
    rest = (space, entry_spec(entry), parallel, trace)
    return _Work(request, objective, compare, examples, skipped, *rest)


def _search(work: _Work, pool: EnginePool, progress: Progress) -> LearnResult:
    """Measure what to compare with, search, choose."""
    request, parts, compare = work.request, work.parts, work.compare
    reference = compare.reference(work.examples, pool, work.trace)
    judges = {
        name: compare.judge(work.examples[part], part, reference, pool)
        for name, part in parts.items()
    }
    old = before(work.current, judges["train"], pool, work.trace)
    optimiser = make_optimiser(
        request.optimizer, work.space, request.budget, request.seed, work.parallel
    )
    trials = search(
        work.space, optimiser, judges["train"], pool, work.trace, request.budget, progress
    )
    finalists = validate([old, *trials], judges.get("validation"), pool, work.trace, progress)
    return LearnResult(
        target=request.target,
        optimizer=request.optimizer,
        objective=work.objective,
        source=compare.source,
        before=old.spec,
        finalists=finalists,
        trials=trials,
        clean={name: compare.clean(judges[name], parts[name], reference) for name in parts},
        retained={name: _means(judge) for name, judge in judges.items()},
        rows={name: len(judge.examples) for name, judge in judges.items()},
        retain_flagged=_retain_flagged(request, compare.prompters[0].detector),
        skipped=work.skipped,
    )


def _means(judge: Judge) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in judge.retained.items()}


def _retain_flagged(request: LearnRequest, detector: Detector) -> tuple[int, int] | None:
    """Count the neighbouring questions that would be corrupted."""
    if request.retain is None:
        return None
    texts = [normalise(row.prompt).text for row in read_rows(request.retain)]
    hits = detector.detect(texts).hits
    return sum(any(hit.target == request.target for hit in some) for some in hits), len(texts)


def entry_spec(entry: TargetEntry) -> CorruptionSpec:
    """Return the corruption that a target has in its bundle."""
    return CorruptionSpec.from_dict(entry.corruption["spec"])


def _write(result: LearnResult, entry: TargetEntry, store: BundleStore) -> int:
    """Write the result, unless the target was changed since the search began."""
    with store.transaction() as draft:
        found = draft.manifest.targets.get(result.target)
        if found is None or found.created_at != entry.created_at:
            raise ArtifactError(
                f"target {result.target!r} was removed or learned anew in {store.root} while its "
                "corruption was searched: nothing was written; run the same command again"
            )
        found.corruption = {"spec": result.best.spec.to_dict(), "learned": result.learned()}
        kept = [one for one in found.notes if "strength" not in one]
        found.notes = [*kept, *result.notes]
    return store.current_version()
