"""LoRA training of causal language models on peft, with a loss of the caller's choice.

Everything random is drawn from the seed and the step, and the learning rate is a function of the
step, so that a training that was interrupted and resumed makes, on a CPU and as many threads, the
very bytes that an uninterrupted one makes. Trainers of libraries keep their optimiser's state in
pickles; here it is safetensors (`adapters.checkpoint`).
"""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

from adapters.adapter_files import CONFIG, WEIGHTS, write_adapter
from adapters.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    optimizer_tensors,
    read_checkpoint,
    replace_file,
    restore,
    write_checkpoint,
)
from adapters.examples import Batch, Example, collate
from adapters.losses import Loss, cross_entropy
from guard.errors import ArtifactError, ConfigError, DataError
from guard.types import Progress

REPORT: Final = "training.json"

START_DIVISOR: Final = 25.0
"""The first step's learning rate is the peak divided by it, as in torch's one-cycle schedule."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How an adapter is trained.

    Attributes:
        rank: Columns of the two matrices. More hold more, and take more space.
        alpha: The adapter is scaled by alpha / rank.
        dropout: Share of the adapter's inputs left out at each step.
        modules: Names of the linear layers to adapt, or `all-linear`.
        epochs: Times that each example is seen.
        batch: Examples a step.
        rate: Peak of the one-cycle learning rate.
        warmup: Share of the steps in which it rises.
        weight_decay: AdamW's.
        gradient_norm: Longer gradients are cut to it.
        seed: Of initial weights, order and dropout.
        checkpoint_every: Steps between two checkpoints.
        dtype: Of the adapter's file. Training itself is in float32.
    """

    rank: int = 64
    alpha: int = 128
    dropout: float = 0.0
    modules: str | tuple[str, ...] = "all-linear"
    epochs: int = 8
    batch: int = 16
    rate: float = 1e-3
    warmup: float = 0.3
    weight_decay: float = 0.0
    gradient_norm: float = 1.0
    seed: int = 0
    checkpoint_every: int = 20
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "epochs", "batch", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("rate", "gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be above 0")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be in [0, 1)")


@dataclass(frozen=True, slots=True)
class TrainReport:
    """What a training did.

    Attributes:
        losses: Of each step, before it was taken.
        seconds: Time in training, all runs of it together.
        parameters: Numbers trained.
        examples: Examples trained on.
        facts: What the caller recorded with it.
    """

    losses: tuple[float, ...]
    seconds: float
    parameters: int
    examples: int
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.losses)

    def last_loss(self, steps: int = 5) -> float:
        """Return the mean loss of the last steps."""
        return float(np.mean(self.losses[-steps:]))


def train_lora(
    model: Any,
    examples: Sequence[Example],
    settings: TrainSettings,
    out: Path,
    *,
    loss: Loss = cross_entropy,
    base_name: str | None = None,
    facts: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    what: str = "train adapter",
    resume: bool = True,
) -> TrainReport:
    """Train an adapter, or go on where an interrupted training of the same kind stopped.

    Ctrl-C takes effect after the step, which is saved first; a second one takes effect at once, and
    then the last checkpoint counts.

    Args:
        model: A transformers causal language model, on its device, in float32. It is frozen, and
            left without the adapter.
        examples: See `adapters.examples.encode_chats`.
        settings: How to train.
        out: The adapter's folder; made if need be. It holds a peft adapter in the end.
        loss: What to make small.
        base_name: The model's name, for the adapter's config.
        facts: What else decides on the result (base model, loss and its settings): a checkpoint
            with other facts is refused. Kept in the report; must be JSON.
        progress: Called as `progress(what, steps done, steps)`.
        what: Names the work.
        resume: False throws away what an earlier training left.

    Raises:
        ConfigError: The folder holds another training, or the loss is no longer a number.
        DataError: There are no examples.
        ArtifactError: What an earlier training left can't be read.
        KeyboardInterrupt: On Ctrl-C.
    """
    if not examples:
        raise DataError("there are no examples to train on")
    out.mkdir(parents=True, exist_ok=True)
    if not resume:
        _clear(out)
    identity = {**_identity(settings, facts), "examples": _digest(examples)}
    finished = _read_finished(out, identity)
    if finished is not None:
        return finished
    with _interrupt_later() as interrupted, _adapted(model, settings) as network:
        training = _Training(network, examples, settings, loss, identity)
        training.resume(out)
        training.run(out, progress or _silent, what, interrupted)
        report = TrainReport(
            tuple(training.losses), training.seconds, training.size, len(examples), facts or {}
        )
        write_adapter(out, network, getattr(torch, settings.dtype), base_name)
    done = {**asdict(report), "identity": identity}
    replace_file(out / REPORT, (json.dumps(done, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)
    return report


def read_training(
    out: Path, settings: TrainSettings | None = None, facts: Mapping[str, Any] | None = None
) -> TrainReport | None:
    """Read the report of a finished training; None if there is none.

    Args:
        out: The adapter's folder.
        settings: Checked to be those that it was trained with, if given.
        facts: Checked with them.

    Raises:
        ArtifactError: It can't be read.
        ConfigError: The training was another.
    """
    return _read_finished(out, {} if settings is None else _identity(settings, facts))


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step: a cosine's rise, and its fall to 0."""
    rise = warmup * steps
    if step < rise:
        low = 1 / START_DIVISOR
        return low + (1 - low) * (1 - math.cos(math.pi * step / rise)) / 2
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


class _Training:
    """The loop and its state."""

    def __init__(
        self,
        network: Any,
        examples: Sequence[Example],
        settings: TrainSettings,
        loss: Loss,
        identity: Mapping[str, Any],
    ) -> None:
        self.network, self.examples, self.settings = network, examples, settings
        self.loss, self.identity = loss, identity
        self.parameters: dict[str, Tensor] = {
            name: one for name, one in network.named_parameters() if one.requires_grad
        }
        self.size = sum(one.numel() for one in self.parameters.values())
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.rate, weight_decay=settings.weight_decay
        )
        self.per_epoch = math.ceil(len(examples) / settings.batch)
        self.steps = self.per_epoch * settings.epochs
        self.losses: list[float] = []
        self.seconds = 0.0

    def resume(self, folder: Path) -> None:
        """Take up the checkpoint in the folder, if there is one."""
        state = read_checkpoint(folder)
        if state is None:
            return
        _check_same(state.identity, self.identity, folder)
        restore(state, self.optimizer, self.parameters)
        self.losses, self.seconds = list(state.losses), state.seconds

    def run(
        self, folder: Path, progress: Progress, what: str, interrupted: Callable[[], bool]
    ) -> None:
        """Take the remaining steps, with checkpoints between them."""
        progress(what, len(self.losses), self.steps)
        while len(self.losses) < self.steps:
            began = time.perf_counter()
            self._step(len(self.losses))
            self.seconds += time.perf_counter() - began
            progress(what, len(self.losses), self.steps)
            stop = interrupted()
            if stop or len(self.losses) % self.settings.checkpoint_every == 0:
                self._save(folder)
            if stop:
                raise KeyboardInterrupt

    def _step(self, step: int) -> None:
        _seed(self.settings.seed, step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * one_cycle(step, self.steps, self.settings.warmup)
        loss = self.loss(self.network, self._batch(step))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ConfigError(f"the loss is {value} at step {step + 1}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_norm)
        self.optimizer.step()
        self.losses.append(value)

    def _batch(self, step: int) -> Batch:
        epoch, number = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.examples))
        size = self.settings.batch
        chosen = order[number * size : (number + 1) * size].tolist()
        return collate(self.examples, chosen, step).to(self.network.device)

    def _save(self, folder: Path) -> None:
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        state = Checkpoint(
            self.identity, tuple(self.losses), self.seconds, self.parameters, tensors
        )
        write_checkpoint(folder, state)


@contextmanager
def _adapted(model: Any, settings: TrainSettings) -> Iterator[Any]:
    """Put a fresh adapter on the model for the time of the block; torch's generators stay as is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_module_names(settings),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        _seed(settings.seed, 0)
        with warnings.catch_warnings():  # peft and transformers warn of one another
            warnings.simplefilter("ignore")
            try:
                network = get_peft_model(model, config)
            except ValueError as error:
                raise ConfigError(f"no adapter fits this model: {error}") from error
        try:
            yield network.train()
        finally:
            network.unload()
            model.eval()


def _module_names(settings: TrainSettings) -> str | list[str]:
    return settings.modules if isinstance(settings.modules, str) else list(settings.modules)


@contextmanager
def _interrupt_later() -> Iterator[Callable[[], bool]]:
    """Note the first Ctrl-C instead of raising it in the middle of a step."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
    if asked.is_set():  # after the last step
        raise KeyboardInterrupt


def _read_finished(out: Path, identity: Mapping[str, Any]) -> TrainReport | None:
    path = out / REPORT
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_bytes())
        found = dict(data.pop("identity"))
        report = TrainReport(**{**data, "losses": tuple(data["losses"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); delete it to train anew") from error
    _check_same(found, identity, out)
    return report


def _identity(settings: TrainSettings, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    chosen = asdict(settings)
    del chosen["checkpoint_every"]  # changes nothing of the result
    found: dict[str, Any] = json.loads(json.dumps({"settings": chosen, "facts": facts or {}}))
    return found


def _check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    for part, values in wanted.items():
        there = found.get(part)
        if there == values:
            continue
        differing = part
        if isinstance(values, dict) and isinstance(there, dict):
            names = [n for n in {**values, **there} if values.get(n) != there.get(n)]
            differing = ", ".join(f"{part}.{name}" for name in sorted(names))
        raise ConfigError(
            f"{folder} holds a training with other {differing}; give another folder, or delete it"
        )


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps([[one.prompt, one.answer] for one in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def _seed(seed: int, step: int) -> None:
    torch.manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]))


def _clear(out: Path) -> None:
    for name in (REPORT, CHECKPOINT, WEIGHTS, CONFIG):
        (out / name).unlink(missing_ok=True)


def _silent(what: str, done: int, total: int) -> None:
    """Draw nothing."""
