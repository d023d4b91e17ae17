"""One training by several processes, such as `accelerate launch` starts: one a device.

All hold the whole model, since only an adapter is trained, and take the same steps: each works on
its share of a step's batch, and the gradients are averaged. Same settings then make the same
adapter, up to rounding, by however many processes (without dropout, whose masks differ).

Gradients are averaged here, once a step, rather than by wrapping the model: losses may run it
several times, and with the adapter off.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from guard.errors import ConfigError


class Processes(Protocol):
    """Those that train one adapter together."""

    number: int
    is_main: bool

    def place(self, model: Any) -> Any:
        """Put the model on this process's device."""
        ...

    def share(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Return this process's share of a batch, and what its mean loss weighs in the average."""
        ...

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Set the parameters' gradients to the average of all processes."""
        ...

    def mean(self, value: float) -> float:
        """Return the mean of all processes' values."""
        ...

    def wait(self) -> None:
        """Wait until all are here."""
        ...


class Alone:
    """One process, as usual."""

    number = 0
    is_main = True

    def place(self, model: Any) -> Any:
        """Leave it where it is."""
        return model

    def share(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Return all of it."""
        return list(indices), 1.0

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Set the parameters' gradients."""
        loss.backward()  # type: ignore[no-untyped-call]

    def mean(self, value: float) -> float:
        """Return the value."""
        return value

    def wait(self) -> None:
        """Don't."""


class Together:
    """Several processes, through accelerate.

    Raises:
        ConfigError: accelerate was told to split the model, or to train in another precision.
    """

    def __init__(self) -> None:
        from accelerate import Accelerator

        self._accelerator: Any = Accelerator()
        kind = self._accelerator.distributed_type.value
        if not kind.startswith("MULTI_") or self._accelerator.mixed_precision != "no":
            raise ConfigError(
                f"accelerate is set up for {kind} in {self._accelerator.mixed_precision} precision;"
                " adapters are trained in full precision with a whole model a device: launch with"
                " --multi_gpu (or --cpu) and --mixed_precision no"
            )
        self.number: int = self._accelerator.process_index
        self.is_main: bool = self._accelerator.is_main_process

    def place(self, model: Any) -> Any:
        """Put the model on this process's device."""
        return model.to(self._accelerator.device)

    def share(self, indices: Sequence[int]) -> tuple[list[int], float]:
        """Take every so manieth row; a process with none does one that counts for nothing."""
        count = self._accelerator.num_processes
        chosen = list(indices[self.number :: count])
        weight = len(chosen) * count / len(indices)
        return chosen or list(indices[:1]), weight

    def backward(self, loss: Tensor, parameters: Iterable[Tensor]) -> None:
        """Set the parameters' gradients to the average of all processes."""
        self._accelerator.backward(loss)
        gradients = [one.grad for one in parameters if one.grad is not None]
        flat = torch.cat([one.flatten() for one in gradients])
        mean = self._accelerator.reduce(flat, "mean")
        parts = mean.split([one.numel() for one in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def mean(self, value: float) -> float:
        """Return the mean of all processes' values."""
        mine = torch.tensor(value, dtype=torch.float64, device=self._accelerator.device)
        return float(self._accelerator.reduce(mine, "mean"))

    def wait(self) -> None:
        """Wait until all are here."""
        self._accelerator.wait_for_everyone()


def find_processes() -> Processes:
    """Return the processes that this one was started with.

    Raises:
        ConfigError: See `Together`.
    """
    # Set by accelerate's and torch's launchers alike; one alone may be there by chance.
    together = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return Together() if together else Alone()
