"""The detector of serving: every target's classifier over one encoder pass.

All heads read the same window features, so another target costs one more column of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classifiers.calibrate import Calibration
from classifiers.eco import LinearHead
from classifiers.encoder import OnnxEncoder, TextFeatures
from classifiers.lexicon import FEATURES, Lexicon, entity_floor
from classifiers.spans import blank_places, entity_places, merge_places
from guard.errors import ArtifactError, IncompatibleArtifactError, TargetNotFoundError
from guard.types import Detection, FloatArray

TEXTS_AT_ONCE = 256
"""Bounds the memory of a large batch: 10 kB a window."""


@dataclass(frozen=True, slots=True)
class TargetArtifact:
    """What serving knows of one target: no sentence of the forget set, only names.

    Attributes:
        name: The target's name.
        head: The classifier; its inputs are the encoder's features, then the lexicon's.
        calibration: What its logits mean.
        lexicon: The target's names.
        encoder_hash: Digest of the encoder's source, as hexadecimal digits.
    """

    name: str
    head: LinearHead
    calibration: Calibration
    lexicon: Lexicon
    encoder_hash: str

    def head_bytes(self) -> bytes:
        """Serialise head and calibration as safetensors."""
        from safetensors.numpy import save

        arrays = {**self.head.to_arrays(), **self.calibration.to_arrays()}
        digest = np.frombuffer(bytes.fromhex(self.encoder_hash), np.uint8)
        return bytes(save({**arrays, "encoder_sha256": digest}))

    def lexicon_bytes(self) -> bytes:
        """Serialise the lexicon as JSON; personal data, so the caller encrypts it."""
        return self.lexicon.to_json()

    @classmethod
    def from_bytes(
        cls,
        name: str,
        head: bytes,
        lexicon: bytes,
        common: Callable[[str], bool] | None = None,
    ) -> TargetArtifact:
        """Read what `head_bytes` and `lexicon_bytes` wrote.

        Args:
            name: The target's name.
            head: Safetensors.
            lexicon: JSON, decrypted.
            common: True for a word of general English; `load_detector` puts the encoder's in.

        Raises:
            ArtifactError: If either is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            arrays = load(head)
            digest = arrays["encoder_sha256"].tobytes().hex()
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"the head of target {name!r} cannot be read: {error}") from error
        return cls(
            name,
            LinearHead.from_arrays(arrays),
            Calibration.from_arrays(arrays),
            Lexicon.from_json(lexicon, common or _no_word_is_common),
            digest,
        )


class BundleDetector:
    """Implements `guard.types.Detector`; safe to share between threads.

    Args:
        encoder: The encoder that the heads were trained on.
        artifacts: The targets, in the order of the columns; may be empty.

    Raises:
        IncompatibleArtifactError: If a target was learned on another encoder.
    """

    def __init__(self, encoder: OnnxEncoder, artifacts: Sequence[TargetArtifact]) -> None:
        self._encoder, self._artifacts = encoder, tuple(artifacts)
        self._targets = tuple(artifact.name for artifact in artifacts)
        for artifact in artifacts:
            self._check(artifact)
        folded = [artifact.head.folded() for artifact in artifacts]
        width = encoder.width
        empty = np.zeros((width + FEATURES, 0), np.float32)
        slopes = np.stack([slope for slope, _ in folded], axis=1) if folded else empty
        self._slopes = np.ascontiguousarray(slopes[:width])
        self._lexicon_slopes = slopes[width:]
        self._offsets = np.array([offset for _, offset in folded], np.float32)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets, in the order of the columns of `Detection`."""
        return self._targets

    def detect(self, texts: Sequence[str]) -> Detection:
        """Score `texts` (already normalised); any length, never truncated."""
        scores = np.empty((len(texts), len(self._targets)), np.float32)
        covered = np.empty(len(texts), np.float32)
        for first in range(0, len(texts), TEXTS_AT_ONCE):
            part = texts[first : first + TEXTS_AT_ONCE]
            for row, (text, features) in enumerate(
                zip(part, self._encoder.encode(part), strict=True), start=first
            ):
                scores[row] = self._window_scores(text, features).max(axis=0)
                covered[row] = features.coverage
        return self._judge(scores, covered)

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        """Return the characters of `text` that carry the target's entity, sorted, disjoint.

        The names are not enough where the text is flagged without them too (an indirect
        description, a quotation): then the flagged windows are marked whole, or, if the text is a
        single window, nothing is, which stands for all of it.

        Raises:
            TargetNotFoundError: If there is no such target.
        """
        column = self._column(target)
        artifact = self._artifacts[column]
        places = entity_places(text, artifact.lexicon)
        blanked = blank_places(text, places)
        features = self._encoder.encode([blanked])[0]
        over = self._window_scores(blanked, features)[:, column] >= artifact.calibration.threshold
        if not over.any():
            return places
        if len(features.windows) == 1:
            return []
        whole = self._encoder.encode([text])[0]
        flagged = self._window_scores(text, whole)[:, column] >= artifact.calibration.threshold
        windows = [place for place, hit in zip(whole.windows, flagged, strict=True) if hit]
        return merge_places([*places, *windows])

    def _window_scores(self, text: str, features: TextFeatures) -> FloatArray:
        # Per text, not per batch: the sum's order, and so its last digits, must not depend on
        # what else is asked at the same time.
        scores = features.features @ self._slopes + self._offsets
        for column, artifact in enumerate(self._artifacts):
            names = artifact.lexicon.features(text, features.windows)
            if names.any():
                joined = scores[:, column] + names @ self._lexicon_slopes[:, column]
                scores[:, column] = entity_floor(joined, names)
        return np.asarray(scores, np.float32)

    def _judge(self, scores: FloatArray, covered: FloatArray) -> Detection:
        p_values, weights = np.ones_like(scores), np.zeros_like(scores)
        flagged = np.zeros(scores.shape, np.bool_)
        for column, artifact in enumerate(self._artifacts):
            calibration = artifact.calibration
            p_values[:, column] = calibration.p_values(scores[:, column])
            weights[:, column] = calibration.weights(scores[:, column])
            flagged[:, column] = scores[:, column] >= calibration.threshold
        return Detection(scores, p_values, weights, flagged, covered)

    def _column(self, target: str) -> int:
        try:
            return self._targets.index(target)
        except ValueError:
            known = ", ".join(self._targets) or "none"
            raise TargetNotFoundError(
                f"there is no target {target!r} in the detector (known: {known})"
            ) from None

    def _check(self, artifact: TargetArtifact) -> None:
        inputs = self._encoder.width + FEATURES
        if artifact.encoder_hash != self._encoder.source_hash:
            raise IncompatibleArtifactError(
                f"target {artifact.name!r} was learned on another encoder than the bundle's; "
                "remove it and add it again"
            )
        if artifact.head.weight.shape != (inputs,):
            raise IncompatibleArtifactError(
                f"the head of target {artifact.name!r} has {artifact.head.weight.shape[0]} "
                f"inputs, the encoder and lexicon give {inputs}; add the target again"
            )


def load_detector(
    encoder_dir: Path, artifacts: Sequence[TargetArtifact], threads: int | None = None
) -> BundleDetector:
    """Load the encoder of a bundle and put the targets on it.

    Args:
        encoder_dir: Folder with the exported encoder.
        artifacts: The bundle's targets; may be empty.
        threads: Windows encoded at the same time; the CPUs available by default.

    Raises:
        ArtifactError: If a file is missing or damaged, or does not fit.
    """
    encoder = OnnxEncoder(encoder_dir, threads)
    bound = [
        TargetArtifact(
            artifact.name,
            artifact.head,
            artifact.calibration,
            Lexicon(artifact.lexicon.weights, encoder.is_common, artifact.lexicon.others),
            artifact.encoder_hash,
        )
        for artifact in artifacts
    ]
    return BundleDetector(encoder, bound)


def _no_word_is_common(word: str) -> bool:
    return False
