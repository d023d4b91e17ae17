"""LoRA training of causal language models on peft, with a loss of the caller's choice.

A training that was interrupted and resumed makes, on a CPU and as many threads, the very bytes that
an uninterrupted one makes: see `adapters.loop`. Started by `accelerate launch` with several
processes, they train together: see `adapters.processes`.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from adapters.adapter_files import CONFIG, WEIGHTS, write_adapter
from adapters.checkpoint import CHECKPOINT, replace_file
from adapters.examples import Example
from adapters.loop import (
    START_DIVISOR,
    Constraint,
    Training,
    Validation,
    check_same,
    one_cycle,
    seed_step,
)
from adapters.losses import Loss, cross_entropy
from adapters.processes import find_processes
from adapters.train_settings import TrainReport, TrainSettings
from guard.errors import ArtifactError, ConfigError, DataError
from guard.types import Progress

__all__ = [
    "REPORT",
    "START_DIVISOR",
    "Constraint",
    "TrainReport",
    "TrainSettings",
    "Validation",
    "one_cycle",
    "read_training",
    "train_lora",
]

REPORT: Final = "training.json"


def train_lora(
    model: Any,
    examples: Sequence[Example],
    settings: TrainSettings,
    out: Path,
    *,
    loss: Loss = cross_entropy,
    constraint: Constraint | None = None,
    validation: Validation | None = None,
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
        constraint: What the adapter must keep to besides; see `adapters.orthogonal`.
        validation: Says how good the network is, the smaller the better, every
            `settings.validate_every` steps. The best adapter is the one that is written. What it
            rests on belongs in `facts`.
        base_name: The model's name, for the adapter's config.
        facts: What else decides on the result (base model, loss and its settings): a checkpoint
            with other facts is refused. Kept in the report; must be JSON.
        progress: Called as `progress(what, steps done, steps)`.
        what: Names the work.
        resume: False throws away what an earlier training left.

    Raises:
        ConfigError: The folder holds another training, the settings don't fit the model, or a loss
            is no longer a number.
        DataError: There are no examples.
        ArtifactError: What an earlier training left can't be read.
        KeyboardInterrupt: On Ctrl-C.
    """
    if not examples:
        raise DataError("there are no examples to train on")
    if settings.validate_every and validation is None:
        raise ConfigError("validate_every is set, but there is nothing to validate with")
    processes = find_processes()
    if processes.is_main:
        out.mkdir(parents=True, exist_ok=True)
        if not resume:
            _clear(out)
    processes.wait()
    identity = {
        **_identity(settings, facts),
        "examples": _digest(examples),
        "constraint": _plain(None if constraint is None else dict(constraint.identity)),
    }
    finished = _read_finished(out, identity)
    if finished is not None:
        return finished
    model = processes.place(model)
    with _interrupt_later() as interrupted, _adapted(model, settings) as network:
        training = Training(
            network, examples, settings, loss, identity, constraint, validation, processes
        )
        training.resume(out)
        shown = progress if progress is not None and processes.is_main else _silent
        training.run(out, shown, what, interrupted)
        report = training.finish(facts or {})
        if processes.is_main:
            write_adapter(out, network, getattr(torch, settings.dtype), base_name)
            _write_report(out, report, identity)
    processes.wait()
    return report


def _write_report(out: Path, report: TrainReport, identity: Mapping[str, Any]) -> None:
    done = {**asdict(report), "identity": identity}
    replace_file(out / REPORT, (json.dumps(done, indent=1) + "\n").encode())
    (out / CHECKPOINT).unlink(missing_ok=True)


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


@contextmanager
def _adapted(model: Any, settings: TrainSettings) -> Iterator[Any]:
    """Put a fresh adapter on the model for the time of the block; torch's generators stay as is."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_module_names(model, settings),
        layers_to_transform=None if settings.layers is None else list(range(*settings.layers)),
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        seed_step(settings.seed, 0)
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


def _module_names(model: Any, settings: TrainSettings) -> str | list[str]:
    """Name the layers as peft takes them: beside numbers of layers, all of them by name."""
    count = model.config.num_hidden_layers
    if settings.layers is not None and settings.layers[1] > count:
        raise ConfigError(f"layers is {settings.layers}; the model has {count}")
    if not isinstance(settings.modules, str):
        return list(settings.modules)
    if settings.layers is None:
        return settings.modules
    if settings.modules != "all-linear":
        raise ConfigError("with layers, modules is a list of names or all-linear, no pattern")
    linear = [name for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)]
    # The output layer has no number.
    return sorted({name.rpartition(".")[2] for name in linear if re.search(r"\.\d+\.", name)})


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
        report = TrainReport(**data)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); delete it to train anew") from error
    check_same(found, identity, out)
    return report


def _identity(settings: TrainSettings, facts: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = _plain({"settings": settings.identity(), "facts": facts or {}})
    return found


def _plain(value: Any) -> Any:
    """Return a value as it is once read back from JSON."""
    return json.loads(json.dumps(value))


def _digest(examples: Sequence[Example]) -> str:
    text = json.dumps([[one.prompt, one.answer] for one in examples])
    return hashlib.sha256(text.encode()).hexdigest()


def _clear(out: Path) -> None:
    for name in (REPORT, CHECKPOINT, WEIGHTS, CONFIG):
        (out / name).unlink(missing_ok=True)


def _silent(what: str, done: int, total: int) -> None:
    """Draw nothing."""
