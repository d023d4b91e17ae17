"""What serving knows of one target, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from classifiers.calibrate import TargetCalibration
from classifiers.evidence import SIGNS, Fusion
from classifiers.lexicon import Lexicon
from classifiers.prototypes import from_bytes, to_bytes
from classifiers.verbatim import HashArray
from guard.errors import ArtifactError
from guard.types import FloatArray

HEAD, NAMES, ROWS, GRAMS = "head.safetensors", "lexicon", "prototypes", "ngrams.safetensors"
SECRET_FILES = frozenset({NAMES, ROWS})
"""Files that the caller encrypts: names are personal data, and embeddings can be inverted."""


@dataclass(frozen=True, slots=True)
class TargetArtifact:
    """One target; no sentence of the forget set.

    Attributes:
        name: The target's name.
        head: Topic head, in standard deviations of benign text, shape (dimensions + 1,).
        prototypes: Directions of its rows, shape (prototypes, dimensions).
        lexicon: Its names, titles and rare words.
        grams: Sorted keyed hashes of its 8-grams.
        calibration: What its scores mean.
        encoder_hash: Digest of the encoder's source, as hexadecimal digits.
        fusion: A topic's own weights of evidence; None takes the universal ones.
        span_head: Marks tokens that tell of it, shape (hidden + 1,), in 16 bits; None where it was
            learned in a hurry.
    """

    name: str
    head: FloatArray
    prototypes: FloatArray
    lexicon: Lexicon
    grams: HashArray
    calibration: TargetCalibration
    encoder_hash: str
    fusion: Fusion | None = None
    span_head: FloatArray | None = None

    def files(self) -> dict[str, bytes]:
        """Return the target as files; those of SECRET_FILES are to be encrypted."""
        from safetensors.numpy import save

        digest = np.frombuffer(bytes.fromhex(self.encoder_hash), np.uint8)
        head = {"head": self.head, "encoder_sha256": digest, **self.calibration.to_arrays()}
        if self.fusion is not None:
            head["fusion"] = np.array([*self.fusion.weights, self.fusion.bias], np.float32)
        if self.span_head is not None:
            head["span_head"] = self.span_head.astype(np.float16)
        return {
            HEAD: bytes(save(head)),
            NAMES: self.lexicon.to_json(),
            ROWS: bytes(save({"prototypes": to_bytes(self.prototypes)})),
            GRAMS: bytes(save({"grams": self.grams})),
        }

    @classmethod
    def from_files(cls, name: str, files: Mapping[str, bytes]) -> TargetArtifact:
        """Read what `files` gave, decrypted.

        Raises:
            ArtifactError: If a file is missing or damaged.
        """
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            head = load(files[HEAD])
            rows, grams = load(files[ROWS])["prototypes"], load(files[GRAMS])["grams"]
            lexicon = Lexicon.from_json(files[NAMES])
            digest = head["encoder_sha256"].tobytes().hex()
            weight = np.asarray(head["head"], np.float32)
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"target {name!r} cannot be read: {error!r}") from error
        fits = rows.ndim == 2 and weight.shape == (rows.shape[1] + 1,) and grams.ndim == 1
        if not fits or not np.isfinite(weight).all():
            raise ArtifactError(f"target {name!r} is damaged: its arrays do not fit together")
        calibration = TargetCalibration.from_arrays(head)
        fusion = _read_fusion(name, head["fusion"]) if "fusion" in head else None
        spans = _read_span_head(name, head["span_head"]) if "span_head" in head else None
        prototypes = from_bytes(rows)
        return cls(name, weight, prototypes, lexicon, grams, calibration, digest, fusion, spans)


def _read_fusion(name: str, values: FloatArray) -> Fusion:
    if values.shape != (len(SIGNS) + 1,) or not np.isfinite(values).all():
        raise ArtifactError(f"target {name!r} is damaged: its fusion has shape {values.shape}")
    return Fusion(tuple(float(value) for value in values[:-1]), float(values[-1]))


def _read_span_head(name: str, values: FloatArray) -> FloatArray:
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all():
        raise ArtifactError(f"target {name!r} is damaged: its span head is no row of numbers")
    return values.astype(np.float32)
