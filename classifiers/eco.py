"""ECO's prompt classifier, as published: a whole encoder fine-tuned to tell forget prompts.

Serving only: numpy, onnxruntime and tokenizers; `classifiers.eco_train.fit_eco` trains it.
Paper: Liu et al. 2024, arXiv 2406.07933. The decision is one of the paper's two, a threshold on the
forget class's probability or conformal prediction. Differs from the reference code: scores are
kept (that returns 0 or 1), and a text is read through windows up to its end unless `truncate`
asks for the published cut at 512 tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from classifiers.encoder import _SURROGATES, _chunks
from classifiers.export import Precision
from guard.errors import ArtifactError, ConfigError, DataError, IncompatibleArtifactError
from guard.types import BoolArray, FloatArray

MODEL_FILE, TOKENIZER_FILE, CONFIG_FILE = "model.onnx", "tokenizer.json", "eco.json"
FORMAT = 1
OVERLAP = 0.25
"""Share of a window that the next one reads again, so that no sentence is only seen in halves."""


@dataclass(frozen=True, slots=True)
class EcoConfig:
    """How the classifier is trained and how it decides.

    Learning rate, weight decay, batch size, truncation length and `tau` are the released code's;
    that trains for 30 epochs.

    Attributes:
        rule: `simple`, flagged from probability `tau` on, or `conformal`.
        tau: In (0, 1). Higher flags less; the paper's runs use .99 to .9999.
        alpha: Share of texts of either class that the conformal sets may get wrong, in (0, 1).
        epochs: At most so many passes over the training texts; the learning rate falls to 0.
        patience: Epochs without fewer errors on the validation texts after which training ends.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of all matrices, not of biases and normalisations.
        batch_size: Windows a step.
        max_tokens: Length of a window, special tokens included; no more than the encoder can read.
        truncate: Read one window of each text only, as the reference code does.
        pooling: `mean`, a linear layer on the mean token state (how MiniLM was trained), or `cls`,
            RoBERTa's head: dropout, dense, tanh, dropout, linear on the first token's state.
        precision: Of the exported weights; `float32` is four times as large.
        validation_share: Share of either class held out for choosing the epoch.
        calibration_share: Share held out for `conformal`; more where `alpha` needs it.
        seed: Of splits, order, dropout and the head's start.
    """

    rule: Literal["simple", "conformal"] = "simple"
    tau: float = 0.99
    alpha: float = 0.05
    epochs: int = 6
    patience: int = 2
    learning_rate: float = 2e-5
    weight_decay: float = 0.1
    batch_size: int = 16
    max_tokens: int = 512
    truncate: bool = False
    pooling: Literal["mean", "cls"] = "mean"
    precision: Precision = "int8"
    validation_share: float = 0.1
    calibration_share: float = 0.15
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tau", "alpha", "validation_share", "calibration_share"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        for name, least in (("epochs", 1), ("patience", 1), ("batch_size", 1), ("max_tokens", 8)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; at least {least} is needed")
        if not (self.learning_rate > 0.0 and self.weight_decay >= 0.0):
            raise ConfigError("learning_rate must be above 0 and weight_decay not below")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )


_CHOICES = {
    "rule": ("simple", "conformal"),
    "pooling": ("mean", "cls"),
    "precision": ("int8", "float32"),
}


@dataclass(frozen=True, slots=True)
class ConformalSets:
    """Label-conditional split conformal prediction, in log-odds of the forget class.

    The nonconformity of label y is 1 - p(y|x), which orders texts as the log-odds do, so quantiles
    are kept in log-odds: they don't saturate where the probability rounds to 1.

    Attributes:
        forget_floor: Least log-odds at which `forget` is in the prediction set.
        other_ceiling: Greatest log-odds at which `other` is in it.
    """

    forget_floor: float
    other_ceiling: float

    def contains(self, scores: FloatArray) -> BoolArray:
        """Return for each score whether `forget` and `other` are in its set, shape (n, 2)."""
        return np.stack([scores >= self.forget_floor, scores <= self.other_ceiling], axis=1)

    def flags(self, scores: FloatArray) -> BoolArray:
        """Return where the set is {forget}, shape (n,).

        A text of another kind is flagged only if its own label is missing from the set, so false
        alarms are at most alpha on exchangeable texts. A set of both labels says that the
        classifier cannot tell, and an empty one that it has seen nothing like it: neither flags.
        """
        inside = self.contains(scores)
        return np.asarray(inside[:, 0] & ~inside[:, 1])


def conformal_quantile(nonconformity: FloatArray, alpha: float) -> float:
    """Return the ceil((n + 1)(1 - alpha))-th smallest value, infinity where n is too small.

    A new exchangeable value is at most that large with probability 1 - alpha or more.

    Args:
        nonconformity: Values of calibration texts of one label, shape (n,).
        alpha: Share that may lie beyond, in (0, 1).
    """
    rank = _rank(len(nonconformity), alpha)
    if rank > len(nonconformity):
        return math.inf
    return float(np.sort(nonconformity)[rank - 1])


def conformal_sets(forget: FloatArray, other: FloatArray, alpha: float) -> ConformalSets:
    """Calibrate on log-odds of forget texts (n,) and others (m,) that were never trained on.

    Raises:
        DataError: If a class has fewer texts than `rows_needed(alpha)`.
    """
    for name, scores in (("forget", forget), ("other", other)):
        if len(scores) < rows_needed(alpha):
            raise DataError(
                f"conformal prediction at alpha {alpha} needs {rows_needed(alpha)} {name} texts "
                f"for calibration, there are {len(scores)}: give more, or a larger alpha"
            )
    return ConformalSets(-conformal_quantile(-forget, alpha), conformal_quantile(other, alpha))


def rows_needed(alpha: float) -> int:
    """Return how many calibration texts of a label give a finite quantile at `alpha`."""
    count = 1
    while _rank(count, alpha) > count:
        count += 1
    return count


def _rank(count: int, alpha: float) -> int:
    # Rounded first: 20 * (1 - 0.05) is a hair above 19 in floating point.
    return max(1, math.ceil(round((count + 1) * (1.0 - alpha), 9)))


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """What serving must know of the encoder to read a text.

    Attributes:
        family: Hugging Face `model_type`.
        window: Tokens that it reads at once, special ones included.
        first: Id of the token before a text.
        last: Id of the token behind it.
    """

    family: str
    window: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """What the validation texts said after an epoch: numbers only.

    Attributes:
        misses: Forget texts with a probability below one half.
        false_alarms: Other texts with a probability of one half or more.
        loss: Class-weighted cross-entropy.
    """

    misses: int
    false_alarms: int
    loss: float


@dataclass(frozen=True, slots=True)
class EcoArtifact:
    """A fitted classifier as files; none holds a text of the forget set.

    Attributes:
        config: How it was fitted.
        encoder: How texts are read.
        model: ONNX model, `ids` -> `logits` (other, forget).
        tokenizer: The encoder's `tokenizer.json`.
        sets: The conformal calibration, None under the simple rule.
        counts: Number of texts by use: `train/forget`, `validation/other`, …; and of errors on the
            validation texts under the rule: `validation/missed`, `validation/false_alarms`.
        epochs: The validation results of each epoch.
        chosen: Index of the epoch whose weights are exported.
    """

    config: EcoConfig
    encoder: EncoderFacts
    model: bytes = field(repr=False)
    tokenizer: bytes = field(repr=False)
    sets: ConformalSets | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    epochs: tuple[Epoch, ...] = ()
    chosen: int = 0

    def files(self) -> dict[str, bytes]:
        """Return relative file name -> content; the same artifact gives the same bytes."""
        settings = {
            "format": FORMAT,
            "config": asdict(self.config),
            "encoder": asdict(self.encoder),
            "conformal": None if self.sets is None else asdict(self.sets),
            "training": {
                "counts": dict(self.counts),
                "epochs": [asdict(epoch) for epoch in self.epochs],
                "chosen": self.chosen,
            },
            "sha256": {MODEL_FILE: _hash(self.model), TOKENIZER_FILE: _hash(self.tokenizer)},
        }
        text = json.dumps(settings, indent=1, sort_keys=True, allow_nan=False)
        return {
            MODEL_FILE: self.model,
            TOKENIZER_FILE: self.tokenizer,
            CONFIG_FILE: text.encode(),
        }

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> EcoArtifact:
        """Read what `files` gave.

        Raises:
            ArtifactError: If a file is missing, damaged or not the one that was written.
            IncompatibleArtifactError: If it is of another format.
        """
        settings = _read_settings(files)
        try:
            training, sets = settings["training"], settings["conformal"]
            return cls(
                config=EcoConfig(**settings["config"]),
                encoder=EncoderFacts(**settings["encoder"]),
                model=files[MODEL_FILE],
                tokenizer=files[TOKENIZER_FILE],
                sets=None if sets is None else ConformalSets(**sets),
                counts=training["counts"],
                epochs=tuple(Epoch(**epoch) for epoch in training["epochs"]),
                chosen=training["chosen"],
            )
        except (KeyError, TypeError, ConfigError) as error:
            raise ArtifactError(f"the classifier's {CONFIG_FILE} is damaged: {error}") from error


def _read_settings(files: Mapping[str, bytes]) -> dict[str, Any]:
    missing = {MODEL_FILE, TOKENIZER_FILE, CONFIG_FILE} - set(files)
    if missing:
        raise ArtifactError(f"the classifier lacks {', '.join(sorted(missing))}")
    try:
        settings = json.loads(files[CONFIG_FILE])
    except ValueError as error:
        raise ArtifactError(f"the classifier's {CONFIG_FILE} is not JSON: {error}") from error
    found = settings.get("format") if isinstance(settings, dict) else None
    if found != FORMAT:
        raise IncompatibleArtifactError(
            f"the classifier's format is {found!r}, this version reads {FORMAT}; fit it again"
        )
    wanted = settings.get("sha256") or {}
    for name in (MODEL_FILE, TOKENIZER_FILE):
        if wanted.get(name) != _hash(files[name]):
            raise ArtifactError(f"the classifier's {name} is not the one that was fitted")
    return dict(settings)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class WindowCutter:
    """Cuts a text into the token windows that the classifier reads; the same in training.

    Args:
        tokenizer: Content of a `tokenizer.json` without truncation, padding and post-processor.
        encoder: Window length and special tokens.
        truncate: Keep the first window only.

    Raises:
        ArtifactError: If the tokenizer cannot be read.
    """

    def __init__(self, tokenizer: bytes, encoder: EncoderFacts, truncate: bool) -> None:
        from tokenizers import Tokenizer

        try:
            self._tokenizer: Any = Tokenizer.from_str(tokenizer.decode())
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(
                f"the classifier's {TOKENIZER_FILE} cannot be read: {error}"
            ) from error
        # "</s>" in a request is text, not structure.
        self._tokenizer.encode_special_tokens = True
        self._encoder, self._truncate = encoder, truncate

    def __call__(self, text: str) -> list[list[int]]:
        """Return the ids of each window, special tokens included; at least one window."""
        room = self._encoder.window - 2
        ids: list[int] = []
        # A lone surrogate has no UTF-8 form.
        clean = _SURROGATES.sub("\ufffd", text)
        for start, end in _chunks(clean):
            if self._truncate and len(ids) >= room:
                break
            ids += self._tokenizer.encode(clean[start:end], add_special_tokens=False).ids
        first, last = self._encoder.first, self._encoder.last
        return [[first, *ids[at : at + room], last] for at in self._starts(len(ids), room)]

    def _starts(self, length: int, room: int) -> list[int]:
        if self._truncate or length <= room:
            return [0]
        step = max(1, int(room * (1.0 - OVERLAP)))
        # The last window ends with the text, so that it is full too.
        return [*range(0, length - room, step), length - room]


class EcoClassifier:
    """Scores prompts; safe to share between threads.

    Args:
        artifact: A fitted classifier.
        threads: Windows that run at the same time, each on one core.

    Raises:
        ArtifactError: If the model or the tokenizer cannot be loaded.
    """

    def __init__(self, artifact: EcoArtifact, threads: int = 1) -> None:
        self.config, self._sets = artifact.config, artifact.sets
        if self.config.rule == "conformal" and self._sets is None:
            raise ArtifactError("the classifier decides by conformal sets and has none")
        self._cut = WindowCutter(artifact.tokenizer, artifact.encoder, self.config.truncate)
        self._session = _load_session(artifact.model)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="eco") if threads > 1 else None

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], threads: int = 1) -> EcoClassifier:
        """Load what `EcoArtifact.files` gave; raises what `EcoArtifact.from_files` raises."""
        return cls(EcoArtifact.from_files(files), threads)

    def scores(self, texts: Sequence[str]) -> FloatArray:
        """Return the log-odds of the forget class, the greatest over a text's windows, (texts,).

        A text's score does not depend on the texts beside it.

        Raises:
            DataError: If `texts` is one text, not a sequence of them, or holds something else.
        """
        cut = [self._cut(text) for text in checked_texts(texts, "texts to score")]
        flat = [window for windows in cut for window in windows]
        found = iter([*(map if self._pool is None else self._pool.map)(self._run, flat)])
        best = [max(next(found) for _ in windows) for windows in cut]
        return np.array(best, np.float32)

    def flags(self, scores: FloatArray) -> BoolArray:
        """Return which scores mean a forget prompt, shape (n,); one that is no number does too."""
        scores = np.asarray(scores, np.float32)
        if self.config.rule == "conformal" and self._sets is not None:
            decided = self._sets.flags(scores)
        else:
            decided = scores >= self.threshold
        return np.asarray(decided | np.isnan(scores))

    @property
    def threshold(self) -> float:
        """The simple rule's threshold as log-odds."""
        return math.log(self.config.tau) - math.log1p(-self.config.tau)

    def _run(self, ids: Sequence[int]) -> float:
        logits = self._session.run(["logits"], {"ids": np.array([ids], np.int64)})[0][0]
        return float(logits[1] - logits[0])


def checked_texts(texts: Sequence[str], name: str) -> list[str]:
    """Return the texts as a list.

    Raises:
        DataError: If they are one string or not all strings.
    """
    if isinstance(texts, str):
        raise DataError(f"the {name} are one string; a sequence of strings is needed")
    found = list(texts)
    for number, text in enumerate(found):
        if not isinstance(text, str):
            raise DataError(f"number {number} of the {name} is {type(text).__name__}, not a string")
    return found


def _load_session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no base class of their own
        raise ArtifactError(f"the classifier's {MODEL_FILE} cannot be loaded: {error}") from error
