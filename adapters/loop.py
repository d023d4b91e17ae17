"""The training loop: steps, validations between them, and its state.

Everything random is drawn from the seed and the step, and the learning rate is a function of the
step, so that a training that was interrupted and resumed makes, on a CPU and as many threads, the
very bytes that an uninterrupted one makes. Trainers of libraries keep their optimiser's state in
pickles; here it is safetensors (`adapters.checkpoint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor

from adapters.checkpoint import (
    Checkpoint,
    optimizer_tensors,
    read_checkpoint,
    restore,
    write_checkpoint,
)
from adapters.examples import Batch, Example, collate
from adapters.losses import Loss
from adapters.processes import Alone, Processes
from adapters.train_settings import TrainReport, TrainSettings
from guard.errors import ConfigError
from guard.types import Progress

START_DIVISOR: Final = 25.0
"""The first step's learning rate is the peak divided by it, as in torch's one-cycle schedule."""

Validation = Callable[[Any], float]
"""Says of a peft model in evaluation mode how good it is: the smaller the better."""


class Constraint(Protocol):
    """What an adapter must keep to besides its loss.

    It may keep no state between steps that `prepare` doesn't make: a resumed training has only the
    parameters.
    """

    @property
    def identity(self) -> Mapping[str, Any]:
        """What decides on its effect, as JSON; a checkpoint with another one is refused."""
        ...

    def prepare(self, network: Any) -> None:
        """Look at the peft model once; may set the fresh adapter's matrices."""
        ...

    def penalty(self, network: Any) -> Tensor | None:
        """Return what is added to the loss of each step, a scalar with gradients, if anything."""
        ...

    def after_step(self, network: Any) -> None:
        """Correct the adapter's matrices after a step; called without gradients."""
        ...


def one_cycle(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step: a cosine's rise, and its fall to 0."""
    rise = warmup * steps
    if step < rise:
        low = 1 / START_DIVISOR
        return low + (1 - low) * (1 - math.cos(math.pi * step / rise)) / 2
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


class Training:
    """The loop and its state."""

    def __init__(
        self,
        network: Any,
        examples: Sequence[Example],
        settings: TrainSettings,
        loss: Loss,
        identity: Mapping[str, Any],
        constraint: Constraint | None = None,
        validation: Validation | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.processes = processes or Alone()
        self.network, self.examples, self.settings = network, examples, settings
        self.loss, self.identity = loss, identity
        self.constraint, self.validation = constraint, validation
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
        self.validations: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self.seconds = 0.0
        if constraint is not None:
            with torch.no_grad():
                constraint.prepare(network)

    def resume(self, folder: Path) -> None:
        """Take up the checkpoint in the folder, if there is one."""
        state = read_checkpoint(folder)
        if state is None:
            return
        check_same(state.identity, self.identity, folder)
        restore(state, self.optimizer, self.parameters)
        self.losses, self.seconds = list(state.losses), state.seconds
        self.validations = list(state.validations)
        self.best = {name: one.to(self.network.device) for name, one in state.best.items()}

    def run(
        self, folder: Path, progress: Progress, what: str, interrupted: Callable[[], bool]
    ) -> None:
        """Take the remaining steps, with checkpoints between them."""
        progress(what, len(self.losses), self.steps)
        while not self._is_over():
            began = time.perf_counter()
            self._step(len(self.losses))
            self._validate()
            self.seconds += time.perf_counter() - began
            done = len(self.losses)
            progress(what, done, done if self._is_over() else self.steps)
            stop = self.processes.mean(interrupted()) > 0
            if stop or done % self.settings.checkpoint_every == 0:
                self._save(folder)
            if stop:
                raise KeyboardInterrupt

    def finish(self, facts: Mapping[str, Any]) -> TrainReport:
        """Put the best parameters into the network, and report."""
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(value)
        return TrainReport(
            tuple(self.losses),
            self.seconds,
            self.size,
            len(self.examples),
            facts,
            tuple(self.validations),
            self._best_step(),
        )

    def _is_over(self) -> bool:
        if len(self.losses) >= self.steps:
            return True
        best, patience = self._best_step(), self.settings.patience
        since = sum(step > best for step, _ in self.validations) if best is not None else 0
        return 0 < patience <= since

    def _best_step(self) -> int | None:
        """Return the first step of the lowest validation."""
        found = min(self.validations, key=lambda one: (one[1], one[0]), default=None)
        return None if found is None else found[0]

    def _step(self, step: int) -> None:
        seed_step(self.settings.seed, step, self.processes.number)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate * one_cycle(step, self.steps, self.settings.warmup)
        batch, weight = self._batch(step)
        loss = self.loss(self.network, batch)
        if weight != 1:
            loss = loss * weight
        value = self.processes.mean(float(loss.detach()))
        penalty = None if self.constraint is None else self.constraint.penalty(self.network)
        if penalty is not None:
            loss = loss + penalty
        total = self.processes.mean(float(loss.detach()))
        if not math.isfinite(total):
            raise ConfigError(f"the loss is {total} at step {step + 1}; lower the learning rate")
        self.optimizer.zero_grad(set_to_none=True)
        self.processes.backward(loss, self.parameters.values())
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_norm)
        self.optimizer.step()
        if self.constraint is not None:
            with torch.no_grad():
                self.constraint.after_step(self.network)
        self.losses.append(value)

    def _validate(self) -> None:
        done, every = len(self.losses), self.settings.validate_every
        if self.validation is None or not every or (done % every and done < self.steps):
            return
        devices = [self.network.device] if self.network.device.type == "cuda" else []
        self.network.eval()
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                value = self.processes.mean(float(self.validation(self.network)))
        finally:
            self.network.train()
        if not math.isfinite(value):
            raise ConfigError(f"the validation is {value} after step {done}")
        self.validations.append((done, value))
        if self._best_step() == done:
            self.best = {name: one.detach().clone() for name, one in self.parameters.items()}

    def _batch(self, step: int) -> tuple[Batch, float]:
        """Return this process's share of the step's batch, and its weight."""
        epoch, number = divmod(step, self.per_epoch)
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.examples))
        size = self.settings.batch
        rows = order[number * size : (number + 1) * size].tolist()
        chosen, weight = self.processes.share(rows)
        return collate(self.examples, chosen, step).to(self.network.device), weight

    def _save(self, folder: Path) -> None:
        if not self.processes.is_main:
            return
        tensors = optimizer_tensors(self.optimizer, self.parameters)
        state = Checkpoint(
            self.identity,
            tuple(self.losses),
            self.seconds,
            self.parameters,
            tensors,
            tuple(self.validations),
            self.best,
        )
        write_checkpoint(folder, state)


def check_same(found: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Refuse a training that another was made of.

    Raises:
        ConfigError: They differ; names in what.
    """
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


def seed_step(seed: int, step: int, process: int = 0) -> None:
    """Set torch's generators to what a step of a training draws from."""
    parts = (seed, step, process) if process else (seed, step)
    torch.manual_seed(int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0]))
