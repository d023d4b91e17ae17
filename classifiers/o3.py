"""O3's out-of-distribution detector: how close a text is to the forget set, learned from it alone.

Layer scores of an encoder that was tuned on the forget texts (`classifiers.o3_train`), joined by a
linear one-class SVM; a soft weight says how strongly an adapter acts. Serving needs numpy, faiss
and ONNX Runtime; no torch, no scikit-learn.
Paper: Gao et al. 2025, arXiv 2407.10223. Differs from the reference code: texts are read through
windows, never cut off; pooling never counts padding; scores of training texts leave them out;
thresholds come from held-out forget texts, not from test sets; a score is higher for a *closer*
text, whatever the variant.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, OnnxEncoder
from classifiers.o3_scores import GAMMA, GlocalScores, ScoreVariant, ShrinkageMethod
from classifiers.soft_weight import SoftWeight
from guard.errors import ArtifactError, ConfigError, IncompatibleArtifactError, NotFittedError
from guard.types import BoolArray, FloatArray, WeightPolicy

FORMAT = 1
HEAD_FILE: Final = "o3.json"
REFERENCE_FILE: Final = "o3_reference.safetensors"
ENCODER_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {name: f"o3_encoder/{name}" for name in (MODEL_FILE, TOKENIZER_FILE, CONFIG_FILE)}
)
SECRET_FILES: Final = frozenset({REFERENCE_FILE})
"""Rows of features, and the mean and covariance of fewer rows than dimensions: both can be
inverted to, or tested for, sentences of the forget set. The caller encrypts them."""

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class O3Config:
    """How the detector is trained and fitted.

    Attributes:
        steps: Training steps of the encoder; 0 leaves it as it is (ablation).
        batch: Texts of a step; the entropy is taken over them.
        learning_rate: Of the LoRA, AdamW.
        rank: Of the LoRA on query, key and value.
        alpha: Its scale, times rank.
        mask_share: Share of the tokens that the masked view hides.
        key_encoder: Reads the clean view: `frozen` (authors' code) or `momentum` (paper), a
            moving average of the trained one.
        momentum: What of the average stays at each step.
        mlm_weight: Weight of the masked-language loss; 0 leaves it out (ablation).
        head_steps: Steps that fit the language head on general text.
        variant: How a layer score is made; see `classifiers.o3_scores`.
        gamma: Weight of the cosine in it.
        shrinkage: How the covariance is shrunk.
        nu: Of the one-class SVM: share of training texts that may lie outside.
        train_share: Share of the forget texts that encoder, references and SVM see; the rest is
            held out, for the second Gaussian and the threshold.
        reference: Whose rows the maximum cosine looks at: those of the `train` part, as published,
            or `all`. The held-out rows are added after threshold and weights are set; a cosine
            only grows by that, so that no more forget texts are missed than promised, but more of
            others may be flagged.
        miss_share: Share of held-out forget texts that the threshold leaves unflagged. Lower finds
            more and flags more neighbours.
        seed: The same seed, texts and CPU give the same artifact.
    """

    steps: int = 100
    batch: int = 32
    learning_rate: float = 3e-4
    rank: int = 8
    alpha: int = 16
    mask_share: float = 0.15
    key_encoder: Literal["frozen", "momentum"] = "frozen"
    momentum: float = 0.99
    mlm_weight: float = 1.0
    head_steps: int = 150
    variant: ScoreVariant = "o3"
    gamma: float = GAMMA
    shrinkage: ShrinkageMethod = "ledoit-wolf"
    nu: float = 0.01
    train_share: float = 0.5
    reference: Literal["train", "all"] = "train"
    miss_share: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        open_shares = ("mask_share", "nu", "train_share")
        for name in open_shares:
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"O3's {name} is {getattr(self, name)}; it must be in (0, 1)")
        for name in ("miss_share", "momentum"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ConfigError(f"O3's {name} is {getattr(self, name)}; it must be in [0, 1)")
        least = {"steps": 0, "head_steps": 0, "mlm_weight": 0, "batch": 2, "rank": 1, "alpha": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ConfigError(f"O3's {name} is {getattr(self, name)}; at least {low}")
        self._check_names()

    def _check_names(self) -> None:
        known = {
            "key_encoder": ("frozen", "momentum"),
            "variant": ("o3", "o3-code"),
            "shrinkage": ("ledoit-wolf", "oas"),
            "reference": ("train", "all"),
        }
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"O3's {name} is {getattr(self, name)!r}; one of {allowed}")


@dataclass(frozen=True, slots=True)
class OneClassHead:
    """A linear one-class SVM over layer closeness c = (origin - score) / scale.

    A linear one-class SVM parts the data from the point 0, so scores that are standardised about
    their mean would give it nothing to part: its weights would be 0. 0 therefore stands for a
    place beyond every training score of a layer, `o3_train.FAR` deviations off at least. All
    weights are then positive: a closer layer never counts against a text.

    Attributes:
        origin: Layer score that counts as 0, shape (layers,).
        scale: Layer scores per unit, shape (layers,).
        weight: The SVM's, shape (layers,).
        bias: Its intercept; the decision is 0 at its border, positive inside.
    """

    origin: Doubles
    scale: Doubles
    weight: Doubles
    bias: float

    def closeness(self, layer_scores: Doubles) -> Doubles:
        """Return c of layer scores, shape (n, layers)."""
        return np.asarray((self.origin - layer_scores) / self.scale, np.float64)

    def decide(self, layer_scores: Doubles) -> Doubles:
        """Return the SVM's decision, shape (n, layers) -> (n,); higher = closer."""
        # Not a matrix product: a row's last digits must not depend on the rows beside it.
        return np.asarray((self.closeness(layer_scores) * self.weight).sum(axis=1) + self.bias)

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers, for JSON."""
        lists = {name: getattr(self, name).tolist() for name in ("origin", "scale", "weight")}
        return {**lists, "bias": self.bias}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OneClassHead:
        """Read what `to_dict` gave.

        Raises:
            ArtifactError: If a number is missing, not finite, or a scale not positive.
        """
        try:
            origin, scale, weight = (
                np.array(values[name], np.float64) for name in ("origin", "scale", "weight")
            )
            bias = float(values["bias"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"the O3 detector's head is damaged: {error}") from error
        same = origin.ndim == 1 and origin.shape == scale.shape == weight.shape
        if not same or not np.isfinite([*origin, *scale, *weight, bias]).all():
            raise ArtifactError("the O3 detector's head holds numbers that do not fit together")
        if not (scale > 0).all():
            raise ArtifactError("the O3 detector's head has a scale that is not positive")
        return cls(origin, scale, weight, bias)


@dataclass(frozen=True, slots=True)
class O3Artifact:
    """A fitted detector: all that serving needs.

    Attributes:
        config: How it was made.
        glocal: The layer references; secret.
        head: Joins the layers.
        soft_weight: Threshold and weights.
        encoder: Files of the exported encoder, by name. It was tuned on forget texts.
        encoder_hash: Digest of what the encoder was exported from.
        report: Counts, losses, thresholds; numbers only, no text.
    """

    config: O3Config
    glocal: GlocalScores
    head: OneClassHead
    soft_weight: SoftWeight
    encoder: Mapping[str, bytes]
    encoder_hash: str
    report: Mapping[str, Any]

    def files(self) -> dict[str, bytes]:
        """Return the artifact's files by path; those in `SECRET_FILES` must be encrypted."""
        from safetensors.numpy import save

        settings = {
            "format": FORMAT,
            "config": asdict(self.config),
            "head": self.head.to_dict(),
            "soft_weight": self.soft_weight.to_dict(),
            "encoder_sha256": self.encoder_hash,
            "report": dict(self.report),
        }
        arrays = {k: np.ascontiguousarray(v) for k, v in self.glocal.to_arrays().items()}
        return {
            HEAD_FILE: json.dumps(settings, sort_keys=True).encode(),
            REFERENCE_FILE: bytes(save(arrays)),
            **{ENCODER_FILES[name]: data for name, data in self.encoder.items()},
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> O3Artifact:
        """Read what `files` gave (decrypted).

        Raises:
            ArtifactError: If a file is missing or damaged.
            IncompatibleArtifactError: If it was written by another version.
        """
        missing = sorted({HEAD_FILE, REFERENCE_FILE, *ENCODER_FILES.values()} - set(files))
        if missing:
            raise ArtifactError(f"the O3 detector lacks the files {missing}")
        settings = _read_settings(files[HEAD_FILE])
        config = _read_config(settings["config"])
        glocal = _read_reference(files[REFERENCE_FILE], config)
        head = OneClassHead.from_dict(settings["head"])
        if len(head.weight) != len(glocal.layers):
            raise ArtifactError(
                f"the O3 detector's head is for {len(head.weight)} layers, its reference for "
                f"{len(glocal.layers)}"
            )
        return cls(
            config,
            glocal,
            head,
            SoftWeight.from_dict(settings["soft_weight"]),
            {name: files[path] for name, path in ENCODER_FILES.items()},
            str(settings["encoder_sha256"]),
            settings["report"],
        )


class O3Detector:
    """Scores texts against one forget set; safe to share between threads.

    Args:
        artifact: The fitted detector.
        threads: Windows encoded at the same time.
        encoder: The artifact's encoder, if it is loaded already.

    Raises:
        ArtifactError: If the encoder's files are damaged.
        IncompatibleArtifactError: If the encoder is not the one that the detector was fitted on.
    """

    def __init__(
        self, artifact: O3Artifact, threads: int = 1, encoder: OnnxEncoder | None = None
    ) -> None:
        self._artifact = artifact
        self._encoder = encoder or load_encoder(artifact.encoder, threads)
        if self._encoder.source_hash != artifact.encoder_hash:
            raise IncompatibleArtifactError(
                "the O3 detector was fitted on another encoder than the one that lies beside it; "
                "add the target again"
            )

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], threads: int = 1) -> O3Detector:
        """Load a detector from `O3Artifact.files()`, secret ones decrypted."""
        return cls(O3Artifact.from_files(files), threads)

    @property
    def artifact(self) -> O3Artifact:
        """What the detector was loaded from."""
        return self._artifact

    def scores(self, texts: Sequence[str]) -> FloatArray:
        """Return each text's score, shape (n,): higher = closer to the forget set.

        A text is as close as its closest window.

        Raises:
            NotFittedError: If a score is not finite; nothing may pass on such a number.
        """
        out = np.empty(len(texts), np.float32)
        for row, text in enumerate(self._encoder.encode(texts)):
            states = layer_states(text.features, self._encoder)
            out[row] = self._artifact.head.decide(self._artifact.glocal.score(states)).max()
        if not np.isfinite(out).all():
            raise NotFittedError("the O3 detector gives scores that are not finite")
        return out

    def flags(self, scores: FloatArray) -> BoolArray:
        """True where a score reaches the threshold."""
        return self._artifact.soft_weight.flags(scores)

    def weights(
        self, scores: FloatArray, policy: WeightPolicy = "monotone", cutoffs: str = "tofu"
    ) -> FloatArray:
        """Return the adapter weight of each score, in [0, 1.2]; see `classifiers.soft_weight`."""
        return self._artifact.soft_weight.weights(scores, policy, cutoffs)


def layer_states(features: FloatArray, encoder: OnnxEncoder) -> FloatArray:
    """Return the transformer layers' pooled states, (windows, width) -> (windows, layers, d).

    The embedding layer is left out, as in the paper.
    """
    return features.reshape(len(features), encoder.layers + 1, encoder.hidden)[:, 1:]


def load_encoder(files: Mapping[str, bytes], threads: int = 1) -> OnnxEncoder:
    """Load an exported encoder from its files' bytes."""
    with tempfile.TemporaryDirectory() as name:
        for file, data in files.items():
            (Path(name) / file).write_bytes(data)
        return OnnxEncoder(name, threads)


def _read_settings(data: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(data)
        known = {"config", "head", "soft_weight", "encoder_sha256", "report"} <= set(settings)
    except (ValueError, TypeError) as error:
        raise ArtifactError(f"the O3 detector's {HEAD_FILE} is not JSON: {error}") from error
    if not known or settings.get("format") != FORMAT:
        raise IncompatibleArtifactError(
            f"the O3 detector's {HEAD_FILE} was written by another version; add the target again"
        )
    return dict(settings)


def _read_config(values: Mapping[str, Any]) -> O3Config:
    unknown = set(values) - {field.name for field in fields(O3Config)}
    if unknown:
        raise IncompatibleArtifactError(f"the O3 detector has unknown settings {sorted(unknown)}")
    try:
        return O3Config(**values)
    except (TypeError, ConfigError) as error:
        raise ArtifactError(f"the O3 detector's settings are damaged: {error}") from error


def _read_reference(data: bytes, config: O3Config) -> GlocalScores:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
    except (SafetensorError, ValueError) as error:
        raise ArtifactError(f"the O3 detector's reference cannot be read: {error}") from error
    return GlocalScores.from_arrays(arrays, config.variant, config.gamma)
