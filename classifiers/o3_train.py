"""Training of O3's detector on forget texts alone; needs torch, transformers, peft, scikit-learn.

A LoRA on the encoder's query, key and value is trained on two views of each forget text: tokens
masked for the trained encoder, clean for the key encoder. Per layer, the similarities of the two
views' pooled states over the batch become a distribution by softmax, and its entropy is made small
(contrastive entropy); beside it, masked tokens are to be told.
Paper: Gao et al. 2025, arXiv 2407.10223. Differs from the reference code: padding is never pooled;
a sentence encoder has no language head, so one is fitted on general text first (a transform, and
the word embeddings as decoder) and then kept; no retained text chooses the checkpoint.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from classifiers.benign import load_benign
from classifiers.encoder import OnnxEncoder
from classifiers.export import export_encoder, find_encoder_source
from classifiers.o3 import (
    ENCODER_FILES,
    O3Artifact,
    O3Config,
    O3Detector,
    OneClassHead,
    layer_states,
    load_encoder,
)
from classifiers.o3_scores import Doubles, GlocalScores
from classifiers.soft_weight import SoftWeight
from guard.errors import ArtifactError, DataError
from guard.types import FloatArray, IntArray, Progress

MIN_FORGET = 8
MIN_SPLIT = 3
"""Texts in either part of the forget set: leaving one out must leave two."""

FAR = 4.0
"""Deviations beyond the mean training score at which a layer's closeness is 0, at least."""

HEAD_RATE = 2e-3
GRADIENT_NORM = 1.0
SOURCE_FILES = ("config.json", "tokenizer.json", "model.safetensors")


@dataclass(frozen=True, slots=True)
class TrainedEncoder:
    """An encoder with its LoRA merged in.

    Attributes:
        files: `config.json`, `tokenizer.json`, `model.safetensors`, as `export_encoder` reads.
        entropy: Contrastive entropy of each step, summed over layers, nats.
        language: Masked-language loss of each step, nats; empty if its weight is 0.
    """

    files: Mapping[str, bytes]
    entropy: tuple[float, ...]
    language: tuple[float, ...]

    def write(self, folder: str | Path) -> Path:
        """Write the files into `folder`, which is made if need be."""
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for name, data in self.files.items():
            (out / name).write_bytes(data)
        return out


def fit_o3(
    forget: Sequence[str],
    *,
    general: Sequence[str] | None = None,
    encoder: str | Path | None = None,
    config: O3Config | None = None,
    progress: Progress | None = None,
) -> O3Artifact:
    """Learn a detector from forget texts alone.

    One part of them trains encoder, layer references and SVM; the other is held out and sets the
    threshold and the soft weight.

    Args:
        forget: At least `MIN_FORGET` distinct texts.
        general: Text that fits the language head and nothing else; the benign set by default.
        encoder: Folder with a BERT encoder's Hugging Face files; the installed one by default.
        config: Settings.
        progress: Called as `progress(step, done, total)`.

    Raises:
        DataError: If there are too few texts.
        ArtifactError: If the encoder cannot be read.
    """
    settings = config or O3Config()
    used, rest = split_texts(forget, settings)
    source = Path(encoder) if encoder else find_encoder_source()
    entropy: tuple[float, ...] = ()
    with tempfile.TemporaryDirectory() as name:
        if settings.steps:
            trained = train_o3_encoder(
                used, config=settings, general=general, encoder=source, progress=progress
            )
            source, entropy = trained.write(Path(name) / "source"), trained.entropy
        exported = export_encoder(Path(name) / "onnx", source, progress)
        files = {file: (exported / file).read_bytes() for file in ENCODER_FILES}
    return _fit_detector(used, rest, files, settings, entropy)


def split_texts(forget: Sequence[str], config: O3Config) -> tuple[list[str], list[str]]:
    """Deal the distinct texts at random into those that are fitted on and those held out.

    Raises:
        DataError: If there are too few.
    """
    texts = list(dict.fromkeys(text.strip() for text in forget if text.strip()))
    if len(texts) < MIN_FORGET:
        raise DataError(f"{len(texts)} distinct forget texts; O3 needs at least {MIN_FORGET}")
    wanted = round(config.train_share * len(texts))
    count = min(max(wanted, MIN_SPLIT), len(texts) - MIN_SPLIT)
    order = np.random.default_rng(config.seed).permutation(len(texts))
    return [texts[n] for n in sorted(order[:count])], [texts[n] for n in sorted(order[count:])]


def _fit_detector(
    used: Sequence[str],
    rest: Sequence[str],
    files: Mapping[str, bytes],
    config: O3Config,
    entropy: Sequence[float],
) -> O3Artifact:
    onnx = load_encoder(files)
    states, owners = _own_states(used, onnx)
    glocal = GlocalScores.fit(states, config.variant, config.gamma, config.shrinkage)
    own = glocal.score_own(states, owners, config.shrinkage)
    head = fit_head(own, config)
    used_scores = np.full(len(used), -np.inf)
    np.maximum.at(used_scores, owners, head.decide(own))
    report = {"forget_texts": len(used) + len(rest), "fitted_on": len(used), "held_out": len(rest)}
    blank = SoftWeight(0.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    draft = O3Artifact(config, glocal, head, blank, files, onnx.source_hash, report)
    rest_scores = O3Detector(draft, encoder=onnx).scores(rest)
    weight = SoftWeight.fit(used_scores.astype(np.float32), rest_scores, config.miss_share)
    if config.reference == "all":
        glocal = glocal.with_rows(_own_states(rest, onnx)[0])
    curve = {"entropy_first": entropy[0], "entropy_last": entropy[-1]} if entropy else {}
    facts = {**report, **curve, **weight.to_dict(), "layer_weights": head.weight.tolist()}
    return O3Artifact(config, glocal, head, weight, files, onnx.source_hash, facts)


def _own_states(texts: Sequence[str], encoder: OnnxEncoder) -> tuple[FloatArray, IntArray]:
    found = encoder.encode(texts)
    owners = np.repeat(np.arange(len(texts)), [len(text.features) for text in found])
    return np.concatenate([layer_states(text.features, encoder) for text in found]), owners


def fit_head(layer_scores: Doubles, config: O3Config) -> OneClassHead:
    """Fit scaling and one-class SVM to the training texts' layer scores, shape (n, layers).

    `o3-code` has its layer scores unscaled, as published; dividing all of them by gamma changes
    nothing but the unit of the decision.
    """
    from sklearn.svm import OneClassSVM

    layers = layer_scores.shape[1]
    if config.variant == "o3-code":
        origin, scale = np.zeros(layers), np.full(layers, max(config.gamma, 1.0))
    else:
        mean, scale = layer_scores.mean(axis=0), np.maximum(layer_scores.std(axis=0), 1e-6)
        # One unit beyond the farthest: then every training text is on the near side of 0.
        origin = mean + scale * max(FAR, 1.0 + float(((layer_scores - mean) / scale).max()))
    closeness = (origin - layer_scores) / scale
    svm = OneClassSVM(kernel="linear", nu=config.nu, tol=1e-6).fit(closeness)
    weight = np.asarray(svm.coef_[0], np.float64)
    return OneClassHead(origin, scale, weight, float(svm.intercept_[0]))


# --- The encoder ---------------------------------------------------------------------------------


def train_o3_encoder(
    texts: Sequence[str],
    *,
    config: O3Config | None = None,
    general: Sequence[str] | None = None,
    encoder: str | Path | None = None,
    progress: Progress | None = None,
) -> TrainedEncoder:
    """Train the LoRA on forget texts and merge it into the encoder.

    Args:
        texts: Forget texts.
        config: Settings.
        general: Text that fits the language head; the benign set by default.
        encoder: Folder with a BERT encoder's Hugging Face files; the installed one by default.
        progress: Called as `progress(step, done, total)`.

    Raises:
        DataError: If there are fewer than two texts.
        ArtifactError: If the encoder cannot be read.
    """
    settings = config or O3Config()
    report = progress or (lambda step, done, total: None)
    source = Path(encoder) if encoder else find_encoder_source()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trainer = O3Trainer(source, settings, report)
        if settings.mlm_weight:
            trainer.fit_language_head(load_benign() if general is None else general)
        trainer.train(texts)
        return trainer.merged()


@dataclass(frozen=True, slots=True)
class Batch:
    """Padded token ids, shape (texts, tokens); `attend` is 1 for tokens, 0 for padding."""

    ids: Tensor
    attend: Tensor


@dataclass(frozen=True, slots=True)
class _Special:
    cls: int
    sep: int
    pad: int
    mask: int


class O3Trainer:
    """Encoder, key encoder and language head of one training.

    Args:
        source: Folder with a BERT encoder's Hugging Face files.
        config: Settings.
        progress: Told of each step.
    """

    def __init__(self, source: Path, config: O3Config, progress: Progress) -> None:
        from peft import LoraConfig, get_peft_model

        self._source, self._config, self._report = source, config, progress
        self._windows, self._special = _load_tokens(source)
        base = _load_model(source)
        words = base.get_input_embeddings().weight.detach()
        self._vocabulary = len(words)
        self.head = LanguageHead(words)
        base.eval().requires_grad_(False)
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=0.0,
            target_modules=["query", "key", "value"],
        )
        with _quiet():
            self.model: Any = get_peft_model(base, lora)
        self.key: Any = copy.deepcopy(self.model).eval().requires_grad_(False)
        self._random = torch.Generator().manual_seed(config.seed)
        self.entropy: list[float] = []
        self.language: list[float] = []

    def fit_language_head(self, texts: Sequence[str]) -> list[float]:
        """Fit the head's transform on general text, the encoder unchanged; returns the losses."""
        steps, losses = self._config.head_steps, []
        optimiser = torch.optim.AdamW(self.head.parameters(), lr=HEAD_RATE)
        order = _batches(_at_least_two(texts), self._config.batch, self._random)
        self.model.eval()
        for step in range(steps):
            masked, labels = self._mask(self.batch([texts[n] for n in next(order)]))
            with torch.no_grad():
                last = self.states(self.model, masked)[-1]
            loss = self.head.loss(last, labels)
            _descend(optimiser, loss, self.head.parameters())
            losses.append(float(loss.detach()))
            self._report("O3: language head", step + 1, steps)
        self.head.requires_grad_(False)
        return losses

    def train(self, texts: Sequence[str]) -> None:
        """Train the LoRA on forget texts; the losses gather in `entropy` and `language`."""
        steps = self._config.steps
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(trained, lr=self._config.learning_rate)
        order = _batches(_at_least_two(texts), self._config.batch, self._random)
        self.model.train()
        for step in range(steps):
            _descend(optimiser, self.loss([texts[n] for n in next(order)]), trained)
            if self._config.key_encoder == "momentum":
                self._follow()
            self._report("O3: encoder", step + 1, steps)
        self.model.eval()

    def loss(self, texts: Sequence[str]) -> Tensor:
        """Return the loss of one batch: contrastive entropy plus weighted language loss."""
        clean = self.batch(texts)
        masked, labels = self._mask(clean)
        hidden = self.states(self.model, masked)
        with torch.no_grad():
            keys = self.states(self.key, clean)
        # The embedding layer has no LoRA; its entropy is a constant.
        views = [pool(layer, masked.attend) for layer in hidden[1:]]
        entropy = contrastive_entropy(views, [pool(layer, clean.attend) for layer in keys[1:]])
        self.entropy.append(float(entropy.detach()))
        if not self._config.mlm_weight:
            return entropy
        language = self.head.loss(hidden[-1], labels)
        self.language.append(float(language.detach()))
        return entropy + self._config.mlm_weight * language

    def batch(self, texts: Sequence[str]) -> Batch:
        """Return the texts' tokens as the serving encoder cuts them; of a long text, one window."""
        special, rows = self._special, []
        for text in texts:
            windows = self._windows.windows(text)
            pick = 0 if len(windows) == 1 else self._draw(len(windows))
            rows.append(torch.tensor([special.cls, *windows[pick].ids, special.sep]))
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=special.pad)
        lengths = torch.tensor([len(row) for row in rows])
        attend = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return Batch(ids, attend)

    def states(self, model: Any, batch: Batch) -> tuple[Tensor, ...]:
        """Return the states of embedding layer and every layer, each (texts, tokens, d)."""
        out = model(
            input_ids=batch.ids, attention_mask=batch.attend, output_hidden_states=True
        ).hidden_states
        return tuple(out)

    def merged(self) -> TrainedEncoder:
        """Return the encoder with the LoRA merged into its weights."""
        from safetensors.torch import save

        model = copy.deepcopy(self.model).merge_and_unload()
        weights = {name: value.contiguous() for name, value in model.state_dict().items()}
        files = {name: (self._source / name).read_bytes() for name in SOURCE_FILES[:2]}
        files["model.safetensors"] = bytes(save(weights))
        return TrainedEncoder(files, tuple(self.entropy), tuple(self.language))

    def _mask(self, batch: Batch) -> tuple[Batch, Tensor]:
        special = self._special
        words = batch.attend.bool() & (batch.ids != special.cls) & (batch.ids != special.sep)
        ids, labels = mask_tokens(
            batch.ids, words, self._config.mask_share, special.mask, self._vocabulary, self._random
        )
        return Batch(ids, batch.attend), labels

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (1,), generator=self._random))

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the key encoder's LoRA a little towards the trained one's."""
        trained = dict(self.model.named_parameters())
        for name, value in self.key.named_parameters():
            if trained[name].requires_grad:
                value.lerp_(trained[name], 1.0 - self._config.momentum)


class LanguageHead(nn.Module):
    """Tells masked tokens from last-layer states: a transform, and the word embeddings.

    Args:
        words: Word embeddings, shape (vocabulary, d); tied, never trained.
    """

    words: Tensor

    def __init__(self, words: Tensor) -> None:
        super().__init__()
        width = words.shape[1]
        self.transform = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.bias = nn.Parameter(torch.zeros(len(words)))
        self.register_buffer("words", words, persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """Return logits, shape (..., d) -> (..., vocabulary)."""
        return nn.functional.linear(self.transform(states), self.words, self.bias)

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the mean cross-entropy of the tokens whose label is not -100; 0 if none."""
        chosen = labels != -100
        if not chosen.any():
            return states.sum() * 0.0
        return nn.functional.cross_entropy(self(states[chosen]), labels[chosen])


def pool(states: Tensor, attend: Tensor) -> Tensor:
    """Return the mean over tokens that are not padding, (n, tokens, d) -> (n, d)."""
    mask = attend.to(states.dtype)[:, :, None]
    return (states * mask).sum(dim=1) / mask.sum(dim=1)


def contrastive_entropy(views: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
    """Return the sum over layers of the mean entropy of softmax(z zᵀ_key), in nats.

    Nothing names the right partner and there is no temperature, as in the paper.

    Args:
        views: Pooled states of the masked view by layer, each (batch, d).
        keys: The same of the clean view.
    """
    total = views[0].new_zeros(())
    for view, key in zip(views, keys, strict=True):
        logs = nn.functional.log_softmax(view @ key.T, dim=1)
        total = total - (logs.exp() * logs).sum(dim=1).mean()
    return total


def mask_tokens(
    ids: Tensor,
    words: Tensor,
    share: float,
    mask_id: int,
    vocabulary: int,
    random: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Hide a share of the words: 80 % by the mask token, 10 % by a random one, 10 % stay.

    Every text with words hides at least one.

    Args:
        ids: Token ids, shape (texts, tokens); not modified.
        words: True where a token may be hidden, same shape.
        share: Share of words to hide.
        mask_id: Id of the mask token.
        vocabulary: Number of ids.
        random: Where the choice comes from.

    Returns:
        The ids, and the labels: the true id where a token was chosen, -100 elsewhere.
    """
    draw = torch.rand(ids.shape, generator=random).masked_fill(~words, 2.0)
    least = draw == draw.min(dim=1, keepdim=True).values
    chosen = ((draw < share) | least) & words
    kind = torch.rand(ids.shape, generator=random)
    other = torch.randint(vocabulary, ids.shape, generator=random)
    out = torch.where(chosen & (kind < 0.8), mask_id, ids)
    out = torch.where(chosen & (kind >= 0.9), other, out)
    return out, torch.where(chosen, ids, -100)


def _batches(count: int, size: int, random: torch.Generator) -> Iterator[list[int]]:
    """Yield batches without end, each of distinct texts and of the same size."""
    size = min(size, count)
    while True:
        order = torch.randperm(count, generator=random).tolist()
        for first in range(0, count - size + 1, size):
            yield order[first : first + size]


def _at_least_two(texts: Sequence[str]) -> int:
    if len(texts) < 2:
        raise DataError(f"{len(texts)} texts to train the O3 encoder on; at least 2 are needed")
    return len(texts)


def _descend(optimiser: torch.optim.Optimizer, loss: Tensor, parameters: Any) -> None:
    optimiser.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(parameters, GRADIENT_NORM)
    optimiser.step()


def _load_tokens(source: Path) -> tuple[OnnxEncoder, _Special]:
    """Return an encoder that cuts windows as serving does, and the ids of special tokens."""
    with tempfile.TemporaryDirectory() as name:
        windows = OnnxEncoder(export_encoder(name, source), threads=1, cache_size=0)
    words = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    try:
        ids = [int(words[f"[{token}]"]) for token in ("CLS", "SEP", "PAD", "MASK")]
    except KeyError as error:
        raise ArtifactError(f"the encoder's tokenizer has no token {error}") from error
    return windows, _Special(*ids)


def _load_model(source: Path) -> Any:
    from transformers import AutoModel

    try:
        with _quiet():
            return AutoModel.from_pretrained(source, add_pooling_layer=False)
    except (OSError, ValueError) as error:
        raise ArtifactError(f"the encoder cannot be loaded: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars, its report of unused weights and peft's old calls silent."""
    from transformers.utils import logging as levels

    before = levels.get_verbosity()
    levels.set_verbosity_error()
    levels.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        levels.set_verbosity(before)
        levels.enable_progress_bar()
