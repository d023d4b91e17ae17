"""Add and remove forget targets: learn from the forget set, then write a new bundle version.

Learning runs outside the bundle's lock; the version is written at the end in one transaction, so
an interrupted `target add` leaves nothing behind and can simply be run again. The forget set is
not kept: a keyed digest of each row is, by which a later command recognises the same file.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guard.build import (
    BACKGROUND_FILE,
    BANK_FILE,
    ENCODER_DIR,
    SPACE_FILE,
    check_key,
    check_model,
    load_bank,
    make_corrupter,
    names_of,
    read_target,
    seal_target,
    thresholds_of,
)
from guard.bundle import Bundle, BundleDraft, BundleStore, Manifest, TargetEntry
from guard.errors import ArtifactError, BundleNotFoundError, TargetExistsError, TargetNotFoundError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.normalise import normalise
from guard.prompts import ModelPrompts
from guard.rewrite import (
    Corruption,
    StandIn,
    all_but_final_mark,
    corrupted_embeddings,
    noise_seed,
)
from guard.rows import Row, read_rows, read_texts
from guard.types import (
    Detector,
    EmbedsPart,
    FloatArray,
    LearningEngine,
    Message,
    Progress,
    Prompt,
)

if TYPE_CHECKING:
    from classifiers.workshop import Workshop
    from corruptions.spec import CorruptionSpec

log = logging.getLogger(__name__)

DIGESTS_FILE = "digests.json"


@dataclass(frozen=True, slots=True)
class TargetRequest:
    """What `target add` was asked to do.

    Attributes:
        name: Name of the target, unique in the bundle.
        forget: File of the forget set.
        retain: File of neighbouring data to keep, if there is one.
        benign: File of general traffic; None takes the set that ships.
        status: `enforced` acts on requests, `detecting` only records.
        fpr_budget: Share of benign requests that may be flagged, in (0, 1).
        seed: Seeds everything random in learning.
        threads: Threads of the encoder; None leaves it to ONNX Runtime.
        kind: An entity is known by its names, a topic by what a text is about.
        detector: What decides: the guard's own detector, or one of the papers'.
    """

    name: str
    forget: Path
    retain: Path | None = None
    benign: Path | None = None
    status: Literal["enforced", "detecting"] = "enforced"
    fpr_budget: float = 0.001
    seed: int = 0
    threads: int | None = None
    kind: Literal["entity", "topic"] = "entity"
    detector: Literal["guard", "eco", "o3"] = "guard"


@dataclass(frozen=True, slots=True)
class Data:
    """What a target is learned from."""

    forget: list[Row]
    retain: list[str]
    benign: list[str]


@dataclass(frozen=True, slots=True)
class _Learned:
    rows: list[Row]
    shared: dict[str, bytes]
    files: dict[str, bytes]
    figures: dict[str, Any]
    corruption: dict[str, Any]
    notes: list[str]


def add_target(
    request: TargetRequest,
    *,
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts,
    engine: LearningEngine | None,
    ledger: Ledger | None,
    progress: Progress,
) -> TargetEntry:
    """Learn a target from its forget set and write it into a new version of the bundle.

    Args:
        request: What to learn from.
        store: The bundle; its first version is made if there is none.
        key: Encrypts the lexicon, keys digests and noise.
        prompts: Files of the served model.
        engine: The served model itself, to search the corruption's strength; None keeps the
            documented default.
        ledger: Gets a row about the change.
        progress: Told how far learning is.

    Raises:
        DataError: If a row of a file is wrong.
        TargetExistsError: If the bundle holds that target.
        IncompatibleArtifactError: If the bundle is for another model or key.
    """
    current = current_bundle(store)
    if current is not None:
        check_key(current, key)
        check_model(current, prompts.fingerprint)
        _check_new(current.manifest, request.name, store.root)
    data = read_data(request, read_rows(request.forget))
    with tempfile.TemporaryDirectory(prefix="unlearn-guard-") as scratch:
        encoder_dir = encoder_of(current, Path(scratch), progress)
        bank = bank_of(current, prompts)
        learned = _learn(request, data, current, encoder_dir, bank, key, prompts, engine, progress)
    entry = _write(request, learned, store, key, prompts)
    if ledger is not None:
        ledger.append("bundle", action="target add", target=entry.name, **_state(store))
    return entry


def remove_target(name: str, *, store: BundleStore, key: GuardKey, ledger: Ledger | None) -> None:
    """Write a version of the bundle that holds nothing of the target.

    Raises:
        TargetNotFoundError: If there is no such target.
    """
    bundle = store.current()
    check_key(bundle, key)
    scores = _thresholds(bundle)
    with store.transaction() as draft:
        if name not in draft.manifest.targets:
            known = ", ".join(sorted(draft.manifest.targets)) or "none"
            raise TargetNotFoundError(f"no target {name!r} in {store.root} (there: {known})")
        draft.remove(draft.manifest.targets.pop(name).prefix)
        # With fewer targets the others' thresholds would fall, and answers about them change.
        for other, entry in draft.manifest.targets.items():
            entry.least_score = scores.get(other, entry.least_score)
    if ledger is not None:
        ledger.append("bundle", action="target remove", target=name, **_state(store))


def _thresholds(bundle: Bundle) -> dict[str, float]:
    """Return the targets' thresholds; none where a file is damaged, which must not keep data."""
    try:
        return thresholds_of(bundle)
    except ArtifactError as error:
        log.warning(
            "the other targets' thresholds could not be read and kept, so that they may be hit "
            "by more requests than before: %s",
            error,
        )
        return {}


# --- Learning ------------------------------------------------------------------------------------


def _learn(
    request: TargetRequest,
    data: Data,
    current: Bundle | None,
    encoder_dir: Path,
    bank: FloatArray,
    key: GuardKey,
    prompts: ModelPrompts,
    engine: LearningEngine | None,
    progress: Progress,
) -> _Learned:
    from classifiers.bundle import load_detector as assemble
    from classifiers.figures import rates

    workshop = make_workshop(request, data, current, encoder_dir, key, progress)
    learned = workshop.learn(request.name, data.forget, progress)
    files = learned.artifact.files()
    if request.detector != "guard":
        files |= workshop.paper_files(request.detector, data.forget, progress)
    shared = share(encoder_dir, workshop, bank)
    others = {} if current is None else _files_of_all(current, key)
    budget = request.fpr_budget if current is None else current.manifest.fpr_budget
    detector = assemble(
        encoder_dir,
        shared[SPACE_FILE],
        {**others, request.name: files},
        budget=budget,
        key=key.subkey("ngrams"),
        threads=request.threads,
    )
    prompter = Prompter(request.name, detector, prompts, key, bank)
    corruption, notes = _learn_corruption(request, data.forget, prompter, engine, progress)
    figures = rates(learned.report, detector.threshold(request.name))
    figures |= {"fpr_budget": budget, "method": request.detector}
    return _Learned(data.forget, shared, files, figures, corruption, notes)


def make_workshop(
    request: TargetRequest,
    data: Data,
    current: Bundle | None,
    encoder_dir: Path,
    key: GuardKey,
    progress: Progress,
    effort: int = 5,
    background: bytes | None = None,
) -> Workshop:
    """Open the bundle's background, or make it, with the request's neighbours."""
    from classifiers.workshop import Settings, Workshop

    if current is not None:
        background = current.read(BACKGROUND_FILE)
    return Workshop(
        encoder_dir,
        data.benign,
        data.retain,
        key.subkey("ngrams"),
        lambda text: normalise(text).text,
        Settings(request.seed, request.threads, effort, request.kind, request.fpr_budget),
        background,
        progress,
    )


def share(encoder_dir: Path, workshop: Workshop, bank: FloatArray) -> dict[str, bytes]:
    """Return the files that all targets of a bundle share."""
    from safetensors.numpy import save

    from classifiers.bundle import save_space

    shared = {
        f"{ENCODER_DIR}/{path.name}": path.read_bytes() for path in sorted(encoder_dir.iterdir())
    }
    shared[SPACE_FILE] = save_space(workshop.background.space)
    shared[BACKGROUND_FILE] = workshop.save()
    shared[BANK_FILE] = save({"bank": bank})
    return shared


def _files_of_all(bundle: Bundle, key: GuardKey) -> dict[str, dict[str, bytes]]:
    return {
        name: read_target(bundle, entry, key) for name, entry in bundle.manifest.targets.items()
    }


def _learn_corruption(
    request: TargetRequest,
    rows: list[Row],
    prompter: Prompter,
    engine: LearningEngine | None,
    progress: Progress,
) -> tuple[dict[str, Any], list[str]]:
    """Search the strength on the rows that have an answer, or keep the documented default."""
    from corruptions.learn import LEAST_STRENGTH_RMS, default_spec, learn_strength

    spec = default_spec(prompter.prompts.hidden_size, prompter.prompts.embedding_rms)
    answered = [row for row in rows if row.answer is not None]
    if engine is None or not answered:
        why = "no engine was given" if engine is None else "no forget row has an answer"
        note = f"strength not learned, because {why}; the documented default is used"
        return {"spec": spec.to_dict(), "learned": None}, [note]
    learned = learn_strength(
        questions=[row.prompt for row in answered],
        answers=[row.answer or "" for row in answered],
        corrupt_prompt=lambda question, strength: prompter.prompt(
            question, replace(spec, strength=strength)
        ),
        engine=engine,
        rms=prompter.prompts.embedding_rms,
        seed=request.seed,
        generic_prompt=prompter.generic_prompt,
        least_rms=LEAST_STRENGTH_RMS.get(spec.method, 0.0),
        progress=progress,
    )
    spec = replace(spec, strength=learned.strength)
    return {"spec": spec.to_dict(), "learned": learned.to_dict()}, list(learned.notes)


@dataclass(frozen=True, slots=True)
class Prompter:
    """Corrupts a forget question exactly as serving will: same spans, tokens, rows and seed.

    Attributes:
        name: The target's name.
        detector: A detector that knows the target.
        prompts: The served model's files.
        key: Seeds the noise.
        bank: Generic embeddings, for corruptions that need them.
        words: The words of the bank's names.
    """

    name: str
    detector: Detector
    prompts: ModelPrompts
    key: GuardKey
    bank: FloatArray
    words: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", names_of(self.prompts))

    def prompt(self, question: str, spec: CorruptionSpec) -> Prompt:
        """Return the question as one user message of corrupted embeddings."""
        return self.corrupted(question, spec)[0]

    def corrupted(self, question: str, spec: CorruptionSpec) -> tuple[Prompt, tuple[StandIn, ...]]:
        """Return the same, and the names that stand in it for asked ones."""
        spans = self._entities(question) if spec.span_policy == "entity" else ()
        corruption = Corruption(
            corrupter=make_corrupter({"spec": spec.to_dict()}, self.bank, self.words),
            spans=spans or (all_but_final_mark(question),),
            seed=noise_seed(self.key, self.name, question),
        )
        tokens = self.prompts.content_tokens([{"role": "user", "content": question}], 0)
        found = corrupted_embeddings(self.prompts, tokens, question, [corruption])
        return (Message("user", EmbedsPart(found.embeddings)),), found.stand_ins

    def generic_prompt(self, question: str) -> Prompt:
        """Return the question about a generic entity: the frame of the retained value's surrogate.

        A question that names nobody becomes an unrelated one.

        ECO (arXiv 2406.07933) takes a surrogate where no retained model exists.
        """
        from corruptions.bank import swap_entities
        from corruptions.objective import unrelated_prompt

        entities = self._entities(question)
        if not entities:  # left as it is, the question would measure the memory itself
            return unrelated_prompt(question)
        seed = noise_seed(self.key, f"{self.name}/generic", question)
        return (Message("user", swap_entities(question, entities, seed)),)

    def _entities(self, question: str) -> tuple[tuple[int, int], ...]:
        normalised = normalise(question)
        spans = self.detector.spans(normalised.text, self.name)
        return tuple(normalised.to_original(*span) for span in spans)


def read_data(request: TargetRequest, forget: list[Row]) -> Data:
    """Read all files before any work begins, so that a bad row costs no time."""
    retain = [row.prompt for row in read_rows(request.retain)] if request.retain else []
    if request.benign is not None:
        return Data(forget, retain, read_texts(request.benign))
    from classifiers.benign import load_benign

    return Data(forget, retain, load_benign())


def encoder_of(current: Bundle | None, scratch: Path, progress: Progress) -> Path:
    """The bundle's encoder, so that all its targets share one; exported if it has none yet."""
    if current is not None:
        return current.dir / ENCODER_DIR
    from classifiers.export import export_encoder

    return export_encoder(scratch, progress=progress)


def bank_of(current: Bundle | None, prompts: ModelPrompts) -> FloatArray:
    """The bundle's generic embeddings; made of the served model's own vocabulary the first time."""
    found = load_bank(current) if current is not None else None
    if found is not None:
        return found
    from corruptions.bank import make_bank

    return make_bank(
        lambda text: prompts.prompt_tokens(text, add_special_tokens=False).ids, prompts.embed
    )


# --- Writing -------------------------------------------------------------------------------------


def _write(
    request: TargetRequest,
    learned: _Learned,
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts,
) -> TargetEntry:
    entry = TargetEntry(
        name=request.name,
        status=request.status,
        rows=len(learned.rows),
        answered_rows=sum(row.answer is not None for row in learned.rows),
        detector=learned.figures,
        corruption=learned.corruption,
        notes=learned.notes,
    )
    with store.transaction() as draft:
        write_shared(draft, learned.shared, key, prompts, request.fpr_budget)
        # Another process may have written a version since learning began.
        _check_new(draft.manifest, request.name, store.root)
        draft.manifest.targets[request.name] = entry
        for name, data in seal_target(request.name, learned.files, key).items():
            draft.write(entry.prefix + name, data)
        draft.write(entry.prefix + DIGESTS_FILE, digests(learned.rows, key))
    return entry


def write_shared(
    draft: BundleDraft,
    shared: Mapping[str, bytes],
    key: GuardKey,
    prompts: ModelPrompts,
    fpr_budget: float,
) -> None:
    """Write what all targets of a bundle share, where it isn't there yet."""
    if not draft.manifest.model:
        draft.manifest.key_id = key.id
        draft.manifest.model = prompts.fingerprint.to_dict()
        draft.manifest.fpr_budget = fpr_budget
    there = set(draft.files())
    for path, data in shared.items():
        if path not in there:
            draft.write(path, data)
    described = json.loads(shared[f"{ENCODER_DIR}/encoder.json"])
    draft.manifest.encoder = {
        key: value for key, value in described.items() if isinstance(value, str | int)
    }


def digests(rows: Sequence[Row], key: GuardKey) -> bytes:
    """A keyed digest per forget row: recognises the row, says nothing of it without the key."""
    digests = [key.digest("forget-row", row.raw_digest_text.encode()) for row in rows]
    return json.dumps({"rows": digests}, indent=0).encode()


def current_bundle(store: BundleStore) -> Bundle | None:
    """Return the bundle's current version; None if there is none."""
    try:
        return store.current()
    except BundleNotFoundError:
        return None


def _check_new(manifest: Manifest, name: str, root: Path) -> None:
    if name in manifest.targets:
        raise TargetExistsError(
            f"bundle {root} holds a target {name!r} already; remove it first "
            "(`unlearn-guard target remove`) or choose another name"
        )


def _state(store: BundleStore) -> dict[str, Any]:
    """The version that a change made, for the ledger."""
    return {"bundle_version": store.current_version()}
