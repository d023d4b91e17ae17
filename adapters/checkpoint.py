"""The state of a training in one safetensors file, so that it is replaced at once and never torn.

Tensors are `parameter/NAME`, `best/NAME` and `optimizer/NAME/KEY`; the rest is JSON in the file's
metadata.
Random numbers need no state: all are drawn from the seed and the step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from guard.errors import ArtifactError

CHECKPOINT: Final = "checkpoint.safetensors"
_META: Final = "training"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A training after some steps.

    Attributes:
        identity: What is trained, and how: see `adapters.train`.
        losses: Of each step taken.
        seconds: Time that the steps took.
        parameters: The trained parameters by name.
        optimizer: The optimiser's tensors of each parameter.
        validations: Steps taken and value of each validation.
        best: The parameters at the best of them; none before the first.
    """

    identity: Mapping[str, Any]
    losses: tuple[float, ...]
    seconds: float
    parameters: Mapping[str, Tensor]
    optimizer: Mapping[str, Mapping[str, Tensor]]
    validations: tuple[tuple[int, float], ...] = ()
    best: Mapping[str, Tensor] = field(default_factory=dict)


def write_checkpoint(folder: Path, state: Checkpoint) -> None:
    """Replace the checkpoint in `folder`."""
    tensors = {f"parameter/{name}": value for name, value in state.parameters.items()}
    tensors |= {f"best/{name}": value for name, value in state.best.items()}
    for name, values in state.optimizer.items():
        tensors |= {f"optimizer/{name}/{key}": value for key, value in values.items()}
    facts = {
        "identity": state.identity,
        "losses": state.losses,
        "seconds": state.seconds,
        "validations": state.validations,
    }
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    replace_file(folder / CHECKPOINT, save(plain, {_META: json.dumps(facts)}))


def read_checkpoint(folder: Path) -> Checkpoint | None:
    """Read the checkpoint in `folder`; None if there is none.

    Raises:
        ArtifactError: It can't be read.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[_META])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return _checkpoint(facts, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); delete it to train anew") from error


def _checkpoint(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Checkpoint:
    plain: dict[str, dict[str, Tensor]] = {"parameter": {}, "best": {}}
    optimizer: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        if kind == "optimizer":
            name, _, item = name.rpartition("/")
            optimizer.setdefault(name, {})[item] = value
        else:
            plain[kind][name] = value
    return Checkpoint(
        facts["identity"],
        tuple(facts["losses"]),
        float(facts["seconds"]),
        plain["parameter"],
        optimizer,
        tuple((int(step), float(value)) for step, value in facts.get("validations", ())),
        plain["best"],
    )


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Return an optimiser's state by the parameters' names."""
    return {
        name: dict(optimizer.state[parameter])
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def restore(
    state: Checkpoint, optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> None:
    """Put a checkpoint's tensors back in their places.

    Raises:
        ArtifactError: They are of other parameters.
    """
    if {name: p.shape for name, p in parameters.items()} != {
        name: p.shape for name, p in state.parameters.items()
    }:
        raise ArtifactError(f"{CHECKPOINT} is of another model; delete it to train anew")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
    # Through load_state_dict, which moves the tensors to where the optimiser wants them.
    saved = {
        number: dict(state.optimizer[name])
        for number, name in enumerate(parameters)
        if name in state.optimizer
    }
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved, "param_groups": groups})


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file's content at once: whoever reads sees the old or the new, never a part."""
    temporary = path.with_name(f".tmp-{path.name}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
