"""Make a `Guard` from a bundle: the one place where the pillars meet.

The pillars are imported inside functions, so that nothing loads that a command does not need.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from guard.bundle import (
    ADAPTER_CONFIG,
    ADAPTER_FOLDER,
    ADAPTER_WEIGHTS,
    Bundle,
    BundleStore,
    TargetEntry,
)
from guard.context import ContextPolicy
from guard.errors import ArtifactError, IncompatibleArtifactError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.pipeline import Guard
from guard.policy import TargetPolicy
from guard.prompts import ModelFingerprint, ModelPrompts
from guard.request import ImagePolicy
from guard.rewrite import Corrupter
from guard.types import AdapterUse, BoolArray, Detector, FloatArray

if TYPE_CHECKING:
    from corruptions.spec import CorruptionSpec

ENCODER_DIR = "encoder"
SPACE_FILE = "detector/space.safetensors"
BACKGROUND_FILE = "detector/background.safetensors"
SEALED = ".enc"
BANK_FILE = "corruption/bank.safetensors"


def load_guard(
    *,
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts | None,
    ledger: Ledger | None,
    threads: int | None = None,
    context: ContextPolicy = "corrupt",
    images: ImagePolicy = "deny",
) -> Guard:
    """Load the current version of a bundle.

    Args:
        store: Where the bundle lies.
        key: The key it was made with.
        prompts: The served model's files; None gives a guard that only decides.
        ledger: Where flagged decisions go.
        threads: Threads of the encoder; None leaves it to ONNX Runtime.
        context: What is done about targets that results of tools and earlier turns touch.
        images: Whether requests may hold images beside their texts.

    Raises:
        BundleNotFoundError: If there is none.
        IncompatibleArtifactError: If it was made with another key or for another model.
        ArtifactError: If a file is missing or changed.
    """
    bundle = store.current()
    bundle.verify()
    check_key(bundle, key)
    if prompts is not None:
        check_model(bundle, prompts.fingerprint)
    bank = load_bank(bundle)
    words = names_of(prompts) if prompts is not None else ()
    return Guard(
        detector=load_detector(bundle, key, threads),
        targets={
            name: TargetPolicy(
                status=entry.status,
                corrupter=make_corrupter(entry.corruption, bank, words),
                entity_only=entry.corruption["spec"]["span_policy"] == "entity",
                route=entry.route,
                adapter=adapter_of(bundle, entry),
            )
            for name, entry in bundle.manifest.targets.items()
        },
        key=key,
        prompts=prompts,
        ledger=ledger,
        version=bundle.manifest.version,
        holds=bundle,
        context=context,
        images=images,
    )


def adapter_of(bundle: Bundle, entry: TargetEntry) -> AdapterUse | None:
    """Return a target's adapter at its trained strength; None if it has none."""
    if not entry.adapter:
        return None
    folder = f"{entry.prefix}{ADAPTER_FOLDER}"
    files = bundle.manifest.files
    key = "-".join(files[f"{folder}/{n}"].sha256 for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    return AdapterUse(key, bundle.path(folder), int(entry.adapter["rank"]), 1.0)


def check_key(bundle: Bundle, key: GuardKey) -> None:
    """Refuse a key that the bundle was not made with.

    Raises:
        IncompatibleArtifactError: Names both keys' ids.
    """
    if bundle.manifest.key_id != key.id:
        raise IncompatibleArtifactError(
            f"bundle {bundle.root} was made with key {bundle.manifest.key_id}, but key {key.id} "
            "was given; give the right one by --key-file or UNLEARN_GUARD_KEY"
        )


def check_model(bundle: Bundle, fingerprint: ModelFingerprint) -> None:
    """Refuse a model that the bundle was not made for.

    Raises:
        IncompatibleArtifactError: Names what differs.
    """
    made_for = ModelFingerprint.from_dict(bundle.manifest.model)
    ours, theirs = fingerprint.to_dict(), made_for.to_dict()
    differing = [
        f"{field} {ours[field]!r} instead of {theirs[field]!r}"
        for field in ours
        if ours[field] != theirs[field]
    ]
    if differing:
        raise IncompatibleArtifactError(
            f"bundle {bundle.root} was made for another model: {'; '.join(differing)}; "
            "serve the model it was made for, or make a bundle for this one"
        )


def check_encoder(bundle: Bundle, threads: int | None = None) -> None:
    """Let the bundle's encoder reproduce the reference features of its export.

    Raises:
        SelfCheckError: If it doesn't: thresholds would not mean what they did.
    """
    from classifiers.encoder import OnnxEncoder

    OnnxEncoder(bundle.path(ENCODER_DIR), threads=threads).self_check()


def load_detector(bundle: Bundle, key: GuardKey, threads: int | None = None) -> Detector:
    """Load encoder and targets of a bundle, and set the thresholds that keep its budget."""
    from classifiers.bundle import load_detector as load

    files = {
        name: read_target(bundle, entry, key) for name, entry in bundle.manifest.targets.items()
    }
    return load(
        bundle.dir / ENCODER_DIR,
        bundle.read(SPACE_FILE),
        files,
        budget=bundle.manifest.fpr_budget,
        key=key.subkey("ngrams"),
        threads=threads,
        weights={name: entry.weights for name, entry in bundle.manifest.targets.items()},
        least={
            name: entry.least_score
            for name, entry in bundle.manifest.targets.items()
            if entry.least_score is not None
        },
    )


def thresholds_of(bundle: Bundle) -> dict[str, float]:
    """Return the score from which each target of a bundle is hit."""
    from classifiers.bundle import thresholds
    from classifiers.target import HEAD

    targets = bundle.manifest.targets
    heads = {name: bundle.read(entry.prefix + HEAD) for name, entry in targets.items()}
    found = thresholds(heads, bundle.manifest.fpr_budget)
    return {
        name: score if (least := targets[name].least_score) is None else max(score, least)
        for name, score in found.items()
    }


def read_target(bundle: Bundle, entry: TargetEntry, key: GuardKey) -> dict[str, bytes]:
    """Read a target's detector files, those with personal data decrypted."""
    found = {}
    for path in bundle.target_files(entry.prefix):
        name, data = path.removeprefix(entry.prefix), bundle.read(path)
        if name.endswith(SEALED):
            name = name.removesuffix(SEALED)
            data = key.decrypt(name, data, aad=entry.name.encode())
        found[name] = data
    return found


def seal_target(name: str, files: Mapping[str, bytes], key: GuardKey) -> dict[str, bytes]:
    """Encrypt those of a target's detector files that hold personal data; see `read_target`."""
    from classifiers.bundle import SECRET_FILES

    return {
        f"{file}{SEALED}" if file in SECRET_FILES else file: key.encrypt(
            file, data, aad=name.encode()
        )
        if file in SECRET_FILES
        else data
        for file, data in files.items()
    }


def load_bank(bundle: Bundle) -> FloatArray | None:
    """Load the bundle's generic embeddings, shape (tokens, hidden), if it has any."""
    if BANK_FILE not in bundle.manifest.files:
        return None
    from safetensors.numpy import load

    return np.asarray(load(bundle.read(BANK_FILE))["bank"], dtype=np.float32)


def names_of(prompts: ModelPrompts) -> tuple[str, ...]:
    """Return the words of the bank's names, row by row, where a word is a token."""
    from corruptions.bank import bank_words

    return bank_words(lambda text: prompts.prompt_tokens(text, add_special_tokens=False).ids)


@dataclass(frozen=True, slots=True)
class SpecCorrupter:
    """A corruption with its spec bound in; implements `guard.rewrite.Corrupter`.

    Attributes:
        spec: What is done.
        bank: Generic embeddings, shape (tokens, hidden), if the method needs them.
        words: Words of the bank's names, row by row; without them no name is told of.
    """

    spec: CorruptionSpec
    bank: FloatArray | None
    words: tuple[str, ...]

    def __call__(
        self, embeddings: FloatArray, positions: BoolArray, seed: bytes, frame: BoolArray
    ) -> FloatArray:
        """See `Corrupter`."""
        from corruptions.ops import corrupt

        return corrupt(embeddings, positions, self.spec, seed, self.bank, frame)

    def stand_ins(
        self, corrupted: FloatArray, positions: BoolArray
    ) -> list[tuple[int, int, tuple[str, ...]]]:
        """See `Corrupter`."""
        from corruptions.bank import stand_ins

        if self.bank is None or not self.words or self.spec.method != "mix-generic":
            return []
        return stand_ins(corrupted, positions, self.bank, self.words)


def make_corrupter(
    corruption: Mapping[str, object], bank: FloatArray | None, words: Sequence[str] = ()
) -> Corrupter:
    """Bind a target's corruption spec.

    Args:
        corruption: As a manifest holds it.
        bank: The bundle's generic embeddings.
        words: Words of the bank's names (`bank_words`).

    Raises:
        ArtifactError: If the spec can't be read, or needs a bank that the bundle doesn't hold.
    """
    from corruptions.spec import CorruptionSpec

    spec_fields = corruption.get("spec")
    if not isinstance(spec_fields, Mapping):
        raise ArtifactError(f"corruption has no spec: {json.dumps(corruption)[:200]}")
    spec = CorruptionSpec.from_dict(spec_fields)

    return SpecCorrupter(spec, bank, tuple(words))
