"""Add and remove forget targets: learn from the forget set, then write a new bundle version.

Learning runs outside the bundle's lock; the version is written at the end in one transaction, so
an interrupted `target add` leaves nothing behind and can simply be run again. The forget set is
not kept: a keyed digest of each row is, by which a later command recognises the same file.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from guard.build import (
    BANK_FILE,
    ENCODER_DIR,
    HEAD_FILE,
    LEXICON_FILE,
    check_key,
    check_model,
    load_bank,
    make_corrupter,
)
from guard.bundle import Bundle, BundleDraft, BundleStore, Manifest, TargetEntry
from guard.errors import BundleNotFoundError, TargetExistsError, TargetNotFoundError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.normalise import normalise
from guard.prompts import ModelPrompts
from guard.rewrite import Corruption, all_but_final_mark, corrupted_embeddings, noise_seed
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
    from classifiers.learn import LearnedDetector
    from corruptions.spec import CorruptionSpec

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
    """

    name: str
    forget: Path
    retain: Path | None = None
    benign: Path | None = None
    status: Literal["enforced", "detecting"] = "enforced"
    fpr_budget: float = 0.001
    seed: int = 0
    threads: int | None = None


@dataclass(frozen=True, slots=True)
class _Data:
    forget: list[Row]
    retain: list[str]
    benign: list[str]


@dataclass(frozen=True, slots=True)
class _Learned:
    rows: list[Row]
    shared: dict[str, bytes]
    detector: LearnedDetector
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
    current = _current(store)
    if current is not None:
        check_key(current, key)
        check_model(current, prompts.fingerprint)
        _check_new(current.manifest, request.name, store.root)
    data = _read(request)
    with tempfile.TemporaryDirectory(prefix="unlearn-guard-") as scratch:
        encoder_dir = _encoder(current, Path(scratch), progress)
        bank = _bank(current, prompts)
        learned = _learn(request, data, encoder_dir, bank, key, prompts, engine, progress)
    entry = _write(request, learned, store, key, prompts)
    if ledger is not None:
        ledger.append("bundle", action="target add", target=entry.name, **_state(store))
    return entry


def remove_target(name: str, *, store: BundleStore, key: GuardKey, ledger: Ledger | None) -> None:
    """Write a version of the bundle that holds nothing of the target.

    Raises:
        TargetNotFoundError: If there is no such target.
    """
    check_key(store.current(), key)
    with store.transaction() as draft:
        if name not in draft.manifest.targets:
            known = ", ".join(sorted(draft.manifest.targets)) or "none"
            raise TargetNotFoundError(f"no target {name!r} in {store.root} (there: {known})")
        draft.remove(draft.manifest.targets.pop(name).prefix)
    if ledger is not None:
        ledger.append("bundle", action="target remove", target=name, **_state(store))


# --- Learning ------------------------------------------------------------------------------------


def _learn(
    request: TargetRequest,
    data: _Data,
    encoder_dir: Path,
    bank: FloatArray,
    key: GuardKey,
    prompts: ModelPrompts,
    engine: LearningEngine | None,
    progress: Progress,
) -> _Learned:
    from safetensors.numpy import save

    from classifiers.detector import BundleDetector
    from classifiers.encoder import OnnxEncoder
    from classifiers.learn import learn_detector

    encoder = OnnxEncoder(encoder_dir, threads=request.threads)
    learned = learn_detector(
        request.name,
        forget=data.forget,
        retain=data.retain,
        benign=data.benign,
        encoder=encoder,
        normalise=lambda text: normalise(text).text,
        seed=request.seed,
        fpr_budget=request.fpr_budget,
        progress=progress,
    )
    detector = BundleDetector(encoder, [learned.artifact])
    prompter = Prompter(request.name, detector, prompts, key, bank)
    corruption, notes = _learn_corruption(request, data.forget, prompter, engine, progress)
    shared = {
        f"{ENCODER_DIR}/{path.name}": path.read_bytes() for path in sorted(encoder_dir.iterdir())
    }
    shared[BANK_FILE] = save({"bank": bank})
    return _Learned(data.forget, shared, learned, corruption, notes)


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
    """

    name: str
    detector: Detector
    prompts: ModelPrompts
    key: GuardKey
    bank: FloatArray

    def prompt(self, question: str, spec: CorruptionSpec) -> Prompt:
        """Return the question as one user message of corrupted embeddings."""
        spans = self._entities(question) if spec.span_policy == "entity" else ()
        corruption = Corruption(
            corrupter=make_corrupter({"spec": spec.to_dict()}, self.bank),
            spans=spans or (all_but_final_mark(question),),
            seed=noise_seed(self.key, self.name, question),
        )
        tokens = self.prompts.content_tokens([{"role": "user", "content": question}], 0)
        embeddings = corrupted_embeddings(self.prompts, tokens, [corruption])
        return (Message("user", EmbedsPart(embeddings)),)

    def generic_prompt(self, question: str) -> Prompt:
        """Return the question about a generic entity: the frame of the retained value's surrogate.

        ECO (arXiv 2406.07933) takes a surrogate where no retained model exists.
        """
        from corruptions.bank import swap_entities

        seed = noise_seed(self.key, f"{self.name}/generic", question)
        return (Message("user", swap_entities(question, self._entities(question), seed)),)

    def _entities(self, question: str) -> tuple[tuple[int, int], ...]:
        normalised = normalise(question)
        spans = self.detector.spans(normalised.text, self.name)
        return tuple(normalised.to_original(*span) for span in spans)


def _read(request: TargetRequest) -> _Data:
    """Read all files before any work begins, so that a bad row costs no time."""
    forget = read_rows(request.forget)
    retain = [row.prompt for row in read_rows(request.retain)] if request.retain else []
    if request.benign is not None:
        return _Data(forget, retain, read_texts(request.benign))
    from classifiers.benign import load_benign

    return _Data(forget, retain, load_benign())


def _encoder(current: Bundle | None, scratch: Path, progress: Progress) -> Path:
    """The bundle's encoder, so that all its targets share one; exported if it has none yet."""
    if current is not None:
        return current.dir / ENCODER_DIR
    from classifiers.export import export_encoder

    export_encoder(scratch, progress=progress)
    return scratch


def _bank(current: Bundle | None, prompts: ModelPrompts) -> FloatArray:
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
        detector=learned.detector.report,
        corruption=learned.corruption,
        notes=learned.notes,
    )
    artifact = learned.detector.artifact
    with store.transaction() as draft:
        if not draft.manifest.model:
            draft.manifest.key_id = key.id
            draft.manifest.model = prompts.fingerprint.to_dict()
            draft.manifest.fpr_budget = request.fpr_budget
        _share(draft, learned.shared)
        # Another process may have written a version since learning began.
        _check_new(draft.manifest, request.name, store.root)
        draft.manifest.targets[request.name] = entry
        draft.write(entry.prefix + HEAD_FILE, artifact.head_bytes())
        draft.write(
            entry.prefix + LEXICON_FILE,
            key.encrypt("lexicon", artifact.lexicon_bytes(), aad=request.name.encode()),
        )
        draft.write(entry.prefix + DIGESTS_FILE, _digests(learned.rows, key))
    return entry


def _share(draft: BundleDraft, shared: Mapping[str, bytes]) -> None:
    """Write what all targets of a bundle share, where it isn't there yet."""
    there = set(draft.files())
    for path, data in shared.items():
        if path not in there:
            draft.write(path, data)
    described = json.loads(shared[f"{ENCODER_DIR}/encoder.json"])
    draft.manifest.encoder = {
        key: value for key, value in described.items() if isinstance(value, str | int)
    }


def _digests(rows: Sequence[Row], key: GuardKey) -> bytes:
    """A keyed digest per forget row: recognises the row, says nothing of it without the key."""
    digests = [key.digest("forget-row", row.raw_digest_text.encode()) for row in rows]
    return json.dumps({"rows": digests}, indent=0).encode()


def _current(store: BundleStore) -> Bundle | None:
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
