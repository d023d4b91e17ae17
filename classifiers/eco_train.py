"""Training of ECO's prompt classifier: fine-tunes a whole encoder; needs torch and transformers.

Paper: Liu et al. 2024, arXiv 2406.07933: class-weighted cross-entropy, and of all epochs the one
with the fewest forget errors on held-out texts. Differs from the reference code: validation texts
are never trained on, training stops early, and (unless `truncate`) long texts are learned whole,
each window an example.
"""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from classifiers.eco import (
    EcoArtifact,
    EcoClassifier,
    EcoConfig,
    EncoderFacts,
    Epoch,
    WindowCutter,
    checked_texts,
    conformal_sets,
    rows_needed,
)
from classifiers.export import (
    FIRST_POSITIONS,
    ClassifierHead,
    encoder_shape,
    find_encoder_source,
    serving_tokenizer,
    write_classifier,
)
from guard.errors import ArtifactError, DataError, IncompatibleArtifactError, NotFittedError
from guard.types import FloatArray, IntArray, Progress

MIN_TEXTS = 4
"""Of either class: at least two to train on, one to validate and one to spare."""

DROPOUT = 0.1
MAX_WINDOW = 512
"""Of an encoder that doesn't say how much it can read."""
BUCKET = 16
"""Batches that are sorted by length together, so that little padding is computed."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Split:
    """Indices of the texts for each use; every text has one use."""

    train: IntArray
    validation: IntArray
    calibration: IntArray


def fit_eco(
    forget: Sequence[str],
    others: Sequence[str],
    *,
    encoder: str | Path | None = None,
    config: EcoConfig = EcoConfig(),  # noqa: B008 - frozen
    progress: Progress | None = None,
) -> EcoArtifact:
    """Fine-tune an encoder to tell forget prompts from others.

    Args:
        forget: Prompts about what is to be forgotten; equal ones count once.
        others: Prompts to keep, retain and benign ones; those that are in `forget` too are left
            out.
        encoder: Folder or hub name of a Hugging Face encoder with a fast tokenizer; the packaged
            MiniLM by default. BERT, ELECTRA, RoBERTa, XLM-R and CamemBERT are exported in
            `config.precision`, other families through torch in 32 bits.
        config: Hyper-parameters and the decision rule.
        progress: Called after each step as `("eco", done, total)`; early stopping jumps to the end.

    Raises:
        DataError: If there are too few texts, or something else than texts.
        ArtifactError: If the encoder cannot be read.
        IncompatibleArtifactError: If the tokenizer cannot be exported or marks no first and last
            token.
        NotFittedError: If training diverges.
    """
    texts, labels = _joined(forget, others)
    splits = split_texts(labels, config)
    with _seeded(config.seed):
        model, facts, tokenizer = _load(encoder, config)
        cut = WindowCutter(tokenizer, facts, config.truncate)
        windows = [cut(text) for text in texts]
        epochs, chosen = _Trainer(model, windows, labels, splits, config).run(progress)
    artifact = EcoArtifact(
        config=config,
        encoder=facts,
        model=_export(model, config),
        tokenizer=tokenizer,
        counts=_counts(splits, labels),
        epochs=tuple(epochs),
        chosen=chosen,
    )
    if config.rule == "conformal":
        artifact = _calibrated(artifact, texts, labels, splits)
    return _judged(artifact, texts, labels, splits)


def class_weights(labels: NDArray[np.int64]) -> tuple[float, float]:
    """Return the loss weights of the labels 0 and 1: n / (2 n_y), so that each class counts half.

    Raises:
        DataError: If a class is missing.
    """
    counts = np.bincount(labels, minlength=2)
    if not counts.all():
        raise DataError("the classifier needs both forget texts and other texts")
    return float(len(labels) / (2 * counts[0])), float(len(labels) / (2 * counts[1]))


def best_epoch(epochs: Sequence[Epoch]) -> int:
    """Return the epoch with fewest misses; ties by false alarms, then loss, then the earlier."""
    keys = [(epoch.misses, epoch.false_alarms, epoch.loss) for epoch in epochs]
    return keys.index(min(keys))


def is_stalled(epochs: Sequence[Epoch], patience: int) -> bool:
    """True once `patience` epochs have passed without fewer misses or, at as many, false alarms."""
    errors = [(epoch.misses, epoch.false_alarms) for epoch in epochs]
    return len(errors) - 1 - errors.index(min(errors)) >= patience


def split_texts(labels: NDArray[np.int64], config: EcoConfig) -> Split:
    """Deal the texts of either class to training, validation and (conformal only) calibration.

    Raises:
        DataError: If a class has too few texts to leave half of them for training.
    """
    rng = np.random.default_rng(config.seed)
    parts: list[list[IntArray]] = []
    for label, name in ((0, "other"), (1, "forget")):
        chosen = rng.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        held, kept = _sizes(len(chosen), config)
        if len(chosen) < MIN_TEXTS or 2 * (held + kept) > len(chosen):
            needed = max(MIN_TEXTS, 2 * (held + kept))
            raise DataError(
                f"{len(chosen)} different {name} texts are too few: {needed} are needed, half of "
                f"them to train on, {held} to choose the epoch and {kept} to calibrate"
            )
        parts.append([chosen[held + kept :], chosen[:held], chosen[held : held + kept]])
    return Split(*(np.sort(np.concatenate(uses)) for uses in zip(*parts, strict=True)))


def _sizes(count: int, config: EcoConfig) -> tuple[int, int]:
    held = max(1, round(config.validation_share * count))
    if config.rule == "simple":
        return held, 0
    return held, max(rows_needed(config.alpha), round(config.calibration_share * count))


def _joined(forget: Sequence[str], others: Sequence[str]) -> tuple[list[str], IntArray]:
    wanted = dict.fromkeys(checked_texts(forget, "forget texts"))
    rest = [t for t in dict.fromkeys(checked_texts(others, "other texts")) if t not in wanted]
    blank = [text for text in (*wanted, *rest) if not text.strip()]
    if blank:
        raise DataError(f"{len(blank)} of the texts are blank; leave them out")
    labels = np.array([1] * len(wanted) + [0] * len(rest), np.int64)
    return [*wanted, *rest], labels


def _counts(splits: Split, labels: IntArray) -> dict[str, int]:
    uses = {
        "train": splits.train,
        "validation": splits.validation,
        "calibration": splits.calibration,
    }
    return {
        f"{use}/{name}": int((labels[rows] == label).sum())
        for use, rows in uses.items()
        for label, name in ((0, "other"), (1, "forget"))
    }


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class _EncoderWithHead(nn.Module):
    """A Hugging Face encoder with pooling and two logits (other, forget)."""

    def __init__(self, encoder: Any, config: EcoConfig) -> None:
        super().__init__()
        width, spread = encoder.config.hidden_size, encoder.config.initializer_range
        self.encoder, self.pooling = encoder, config.pooling
        self.dense = nn.Linear(width, width) if config.pooling == "cls" else None
        self.out, self.dropout = nn.Linear(width, 2), nn.Dropout(DROPOUT)
        for layer in (self.dense, self.out):
            if layer is not None:
                nn.init.normal_(layer.weight, std=spread)
                nn.init.zeros_(layer.bias)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits, shape (batch, 2), of padded ids and their mask, shape (batch, length)."""
        states: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        if self.dense is None:
            share = mask[..., None].to(states.dtype)
            pooled = (states * share).sum(dim=1) / share.sum(dim=1)
        else:
            pooled = torch.tanh(self.dense(self.dropout(states[:, 0])))
        logits: Tensor = self.out(self.dropout(pooled))
        return logits


def _load(
    source: str | Path | None, config: EcoConfig
) -> tuple[_EncoderWithHead, EncoderFacts, bytes]:
    """Read encoder and tokenizer; a tokenizer that serving can't use is refused before training."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    name = str(source or find_encoder_source())
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        encoder = AutoModel.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"the encoder {name!r} cannot be read: {error}") from error
    facts = EncoderFacts(
        family=str(encoder.config.model_type),
        window=min(config.max_tokens, _room(encoder.config)),
        first=_special(tokenizer, "cls_token_id"),
        last=_special(tokenizer, "sep_token_id"),
    )
    if not getattr(tokenizer, "is_fast", False):
        raise IncompatibleArtifactError(f"the encoder {name!r} has no fast tokenizer to export")
    text = serving_tokenizer(json.loads(tokenizer.backend_tokenizer.to_str()))
    return _EncoderWithHead(encoder, config), facts, text.encode()


def _room(config: Any) -> int:
    """Return how many tokens an encoder's position table holds."""
    try:
        _, reserved = encoder_shape(config.to_dict())
    except IncompatibleArtifactError:
        reserved = max(FIRST_POSITIONS.values())
    return int(getattr(config, "max_position_embeddings", MAX_WINDOW + reserved)) - reserved


def _special(tokenizer: Any, name: str) -> int:
    found = getattr(tokenizer, name, None)
    if found is None:
        raise IncompatibleArtifactError(f"the encoder's tokenizer has no {name}")
    return int(found)


class _Trainer:
    """One fine-tuning run over texts that are cut already."""

    def __init__(
        self,
        model: _EncoderWithHead,
        windows: Sequence[list[list[int]]],
        labels: IntArray,
        splits: Split,
        config: EcoConfig,
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model, self._config = model.to(self._device), config
        self._windows, self._labels, self._splits = windows, labels, splits
        self._rows = [(i, ids) for i in splits.train.tolist() for ids in windows[i]]
        trained_on = labels[[index for index, _ in self._rows]]
        weights = torch.tensor(class_weights(trained_on), device=self._device)
        self._loss = nn.CrossEntropyLoss(weight=weights)
        self._rng = np.random.default_rng((config.seed, 1))
        self._padding = int(model.encoder.config.pad_token_id or 0)

    def run(self, progress: Progress | None) -> tuple[list[Epoch], int]:
        """Train; the model ends with the chosen epoch's weights, in evaluation mode."""
        config, report = self._config, progress or (lambda what, done, total: None)
        steps = -(-len(self._rows) // config.batch_size)
        total = config.epochs * steps
        optimizer = torch.optim.AdamW(
            _parameter_groups(self._model, config.weight_decay), lr=config.learning_rate
        )
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / total)
        epochs: list[Epoch] = []
        best: dict[str, Tensor] = {}
        for number in range(config.epochs):
            self._train_epoch(optimizer, decay, lambda n: report("eco", n, total), number * steps)
            epochs.append(self._validate())
            logger.debug("epoch %d: %s", number, epochs[-1])
            if best_epoch(epochs) == number:
                best = copy.deepcopy(self._model.state_dict())
            if is_stalled(epochs, config.patience):
                break
        report("eco", total, total)
        self._model.load_state_dict(best)
        self._model.cpu().eval()
        return epochs, best_epoch(epochs)

    def _train_epoch(
        self, optimizer: Any, decay: Any, report: Callable[[int], None], done: int
    ) -> None:
        self._model.train()
        for number, batch in enumerate(self._batches(), start=done + 1):
            targets = torch.from_numpy(self._labels[[index for index, _ in batch]])
            logits = self._logits([ids for _, ids in batch])
            loss = self._loss(logits, targets.to(self._device))
            if not torch.isfinite(loss):
                raise NotFittedError("training diverged: the loss is no number; lower the rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
            optimizer.step()
            decay.step()
            report(number)

    def _batches(self) -> Iterator[list[tuple[int, list[int]]]]:
        """Yield every training row once, in random batches of rows of about equal length."""
        size = self._config.batch_size
        order = self._rng.permutation(len(self._rows))
        batches: list[list[tuple[int, list[int]]]] = []
        for start in range(0, len(order), BUCKET * size):
            bucket = [self._rows[i] for i in order[start : start + BUCKET * size]]
            bucket.sort(key=lambda row: len(row[1]))
            batches += [bucket[at : at + size] for at in range(0, len(bucket), size)]
        for index in self._rng.permutation(len(batches)):
            yield batches[index]

    def _logits(self, rows: Sequence[list[int]]) -> Tensor:
        length = max(len(ids) for ids in rows)
        padded = [ids + [self._padding] * (length - len(ids)) for ids in rows]
        mask = [[1] * len(ids) + [0] * (length - len(ids)) for ids in rows]
        places = (torch.tensor(padded), torch.tensor(mask))
        logits: Tensor = self._model(*(place.to(self._device) for place in places))
        return logits

    @torch.no_grad()
    def _validate(self) -> Epoch:
        """Judge each held-out text by its window nearest to the forget set."""
        self._model.eval()
        rows = self._splits.validation
        logits = torch.stack([self._text_logits(self._windows[i]) for i in rows.tolist()])
        targets = torch.from_numpy(self._labels[rows])
        guessed = logits[:, 1] >= logits[:, 0]
        weights = torch.tensor(class_weights(self._labels[rows]))
        return Epoch(
            misses=int((~guessed & (targets == 1)).sum()),
            false_alarms=int((guessed & (targets == 0)).sum()),
            loss=round(float(nn.functional.cross_entropy(logits, targets, weights)), 9),
        )

    def _text_logits(self, windows: Sequence[list[int]]) -> Tensor:
        logits = torch.cat([self._logits([ids]) for ids in windows]).cpu()
        return logits[(logits[:, 1] - logits[:, 0]).argmax()]


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay matrices only, as is usual for transformers; the unused pooler has no gradient."""
    named = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _export(model: _EncoderWithHead, config: EcoConfig) -> bytes:
    try:
        shape, first_position = encoder_shape(model.encoder.config.to_dict())
    except IncompatibleArtifactError:
        return _trace(model)
    weights = {name: _array(value) for name, value in model.encoder.state_dict().items()}
    dense = model.dense
    head = ClassifierHead(
        pooling=config.pooling,
        weight=_array(model.out.weight),
        bias=_array(model.out.bias),
        dense=None if dense is None else (_array(dense.weight), _array(dense.bias)),
    )
    return write_classifier(
        weights, shape, head, first_position=first_position, precision=config.precision
    )


def _trace(model: _EncoderWithHead) -> bytes:
    """Export a family that the graph writer doesn't know through torch, in 32 bits."""
    length = torch.export.Dim("length", min=2, max=_room(model.encoder.config))
    # torch's exporter warns of its own internals.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program: Any = torch.onnx.export(
            _SingleWindow(model).eval(),
            (torch.tensor([[5, 6, 7, 8, 9]]),),
            dynamo=True,
            input_names=["ids"],
            output_names=["logits"],
            dynamic_shapes={"ids": {1: length}},
            verbose=False,
        )
    return bytes(program.model_proto.SerializeToString(deterministic=True))


class _SingleWindow(nn.Module):
    """The model as serving runs it: one window, no padding."""

    def __init__(self, model: _EncoderWithHead) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, torch.ones_like(ids))
        return logits


def _array(value: Tensor) -> FloatArray:
    return np.asarray(value.detach().cpu().numpy(), np.float32)


def _calibrated(
    artifact: EcoArtifact, texts: Sequence[str], labels: IntArray, splits: Split
) -> EcoArtifact:
    """Calibrate on the scores that serving gives, 8-bit rounding included."""
    rows = splits.calibration
    simple = replace(artifact, config=replace(artifact.config, rule="simple"))
    scores = EcoClassifier(simple).scores([texts[i] for i in rows.tolist()])
    forget, other = (scores[labels[rows] == label] for label in (1, 0))
    return replace(artifact, sets=conformal_sets(forget, other, artifact.config.alpha))


def _judged(
    artifact: EcoArtifact, texts: Sequence[str], labels: IntArray, splits: Split
) -> EcoArtifact:
    """Count the validation errors of what is exported, under its own rule."""
    classifier, rows = EcoClassifier(artifact), splits.validation
    flagged = classifier.flags(classifier.scores([texts[i] for i in rows.tolist()]))
    forget = labels[rows] == 1
    missed, alarms = int((~flagged & forget).sum()), int((flagged & ~forget).sum())
    if 2 * missed > forget.sum():
        # After few epochs probabilities stop short of the paper's tau, however well texts part.
        logger.warning(
            "the %s rule misses %d of %d held-out forget texts: train for more epochs or at a "
            "higher rate, or lower tau or raise alpha",
            artifact.config.rule,
            missed,
            int(forget.sum()),
        )
    counts = {**artifact.counts, "validation/missed": missed, "validation/false_alarms": alarms}
    return replace(artifact, counts=counts)
