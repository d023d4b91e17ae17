"""Keeping a new adapter apart from the earlier ones: O3's orthogonal loss, and projection.

An adapter adds B A x to a layer's output. The rows of A span what it reads of the layer's input,
the columns of B what it writes into the output. A new adapter's A (or B) is kept orthogonal to
those of the earlier adapters, softly by a penalty or exactly by projecting it after each step.

Orthogonal subspaces don't keep two adapters from acting on one prompt: an input has parts in both.
How much they disturb one another when both are active is measured by `benchmarks`, not assumed.

A layer of some width holds width / rank such adapters. Beyond that, a new one is kept orthogonal to
the latest that leave it room, and so shares what the oldest ones read: see `kept_apart`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from adapters.adapter_files import WEIGHTS
from guard.errors import ArtifactError, ConfigError, IncompatibleArtifactError

Mode = Literal["none", "penalty", "project"]
Side = Literal["input", "output"]
Sides = Literal["input", "output", "both"]

O3_WEIGHT: Final = 0.1
"""Of the penalty, in O3's experiments."""

NUMERICAL_RANK: Final = 1e-3
"""Singular values below this share of the largest are rounding, in a file of 16 bit numbers."""

_MATRIX: Final[Mapping[Side, str]] = {"input": "lora_A", "output": "lora_B"}


@dataclass(frozen=True, slots=True)
class EarlierAdapters:
    """The subspaces of finished adapters, oldest first.

    Attributes:
        bases: By side and layer, of each adapter that has the layer, an orthonormal basis, shape
            (width, at most rank), float64.
        digests: SHA-256 of each adapter's file.
    """

    bases: Mapping[Side, Mapping[str, tuple[Tensor, ...]]]
    digests: tuple[str, ...]

    @classmethod
    def read(cls, folders: Sequence[Path]) -> EarlierAdapters:
        """Read adapters.

        Args:
            folders: Each a peft LoRA adapter's, the oldest first.

        Raises:
            ArtifactError: One is missing or can't be read.
        """
        bases: dict[Side, dict[str, tuple[Tensor, ...]]] = {"input": {}, "output": {}}
        digests = []
        for folder in folders:
            digests.append(hashlib.sha256(_bytes(folder / WEIGHTS)).hexdigest())
            for side, layers in _read_bases(folder / WEIGHTS).items():
                for layer, basis in layers.items():
                    bases[side][layer] = (*bases[side].get(layer, ()), basis)
        return cls(bases, tuple(digests))

    def left_out(self, rank: int, sides: Sides) -> dict[Side, dict[str, int]]:
        """Return from how many earlier adapters a new one isn't kept apart, where there are any.

        Args:
            rank: Of the new adapter.
            sides: That it is kept apart on.
        """
        found: dict[Side, dict[str, int]] = {}
        for side in _sides(sides):
            for layer, bases in self.bases[side].items():
                count = len(bases) - len(kept_apart(bases, rank))
                if count:
                    found.setdefault(side, {})[layer] = count
        return found


def kept_apart(bases: Sequence[Tensor], rank: int) -> tuple[Tensor, ...]:
    """Return the latest of a layer's bases that leave room for a new adapter beside them.

    With all of one rank these are the latest floor(width / rank) - 1.
    """
    kept: list[Tensor] = []
    room = bases[0].shape[0] - rank if bases else 0
    for basis in reversed(bases):
        room -= basis.shape[1]
        if room < 0:
            break
        kept.append(basis)
    return tuple(reversed(kept))


@dataclass(frozen=True, slots=True)
class _Held:
    """A matrix that is held apart: rows of A, or of the transpose of B, and what they may not meet.

    `spans` are the earlier bases side by side, shape (width, sum of ranks); `basis` is an
    orthonormal basis of what they span together.
    """

    matrix: Tensor
    side: Side
    spans: Tensor
    basis: Tensor

    @property
    def rows(self) -> Tensor:
        return self.matrix if self.side == "input" else self.matrix.T

    def overlap(self) -> Tensor:
        """Return the sum over the earlier adapters of ||A_new Q_old||_F^2."""
        return (self.rows @ self.spans).square().sum()

    def project(self) -> None:
        rows = self.rows
        rows -= rows @ self.basis @ self.basis.T

    def restart(self, generator: torch.Generator) -> None:
        """Draw the rows anew in the complement, as long as they were.

        The rows themselves, projected, wouldn't do: of adapters that were drawn with one seed
        hardly anything is left.
        """
        rows, length = self.rows, self.rows.norm(dim=1, keepdim=True)
        rows.copy_(torch.randn(rows.shape, generator=generator))
        self.project()
        rows *= length / rows.norm(dim=1, keepdim=True)


@dataclass
class Orthogonality:
    """Keeps a new adapter's subspaces apart from those of earlier ones; a `Constraint`.

    penalty: adds weight * mean over layers of the sum over earlier adapters of ||A Q||_F^2, with Q
    an orthonormal basis of the earlier A's rows; for `output` ||B^T P||_F^2, with P one of the
    earlier B's columns. O3's code takes the earlier A as they are; bases make the penalty's weight
    mean the same however far the earlier adapters were trained, which for B decides all.

    project: A <- A - A Q Q^T (B <- B - P P^T B) after each step of the optimiser.

    Both draw A anew in the complement of the earlier rows, its rows as long as they were: a target
    is unlearned in few steps, in which a penalty doesn't get there from a random start.

    Measured with 20 targets of rank 8 on the 14 linear layers of SmolLM2's last two blocks, 16
    steps at 1e-3, largest cosine of any two A: none 0.45; penalty of 0.1 0.34, of 10 0.10, of 100
    0.02 (0.16 from a random start); project below 0.001. O3's 0.1 does next to nothing in so few
    steps. The penalty is a mean over the layers: with more of them it takes more weight.
    Paper: Gao et al., arXiv 2407.10223, orthogonal loss; METHODS 2 for what the code does.

    Attributes:
        earlier: The finished adapters.
        mode: How they are kept apart; `none` doesn't.
        sides: On which.
        weight: Of the penalty.
        starts_apart: False starts A at random, as O3 does.
    """

    earlier: EarlierAdapters
    mode: Mode = "project"
    sides: Sides = "input"
    weight: float = O3_WEIGHT
    starts_apart: bool = True
    _held: list[_Held] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode is {self.mode}; it must be one of {get_args(Mode)}")
        if self.sides not in get_args(Sides):
            raise ConfigError(f"sides is {self.sides}; it must be one of {get_args(Sides)}")
        if not self.weight >= 0:
            raise ConfigError(f"weight is {self.weight}; it must be at least 0")

    @property
    def identity(self) -> dict[str, Any]:
        """What decides on the effect."""
        found: dict[str, Any] = {"mode": self.mode}
        if self.mode != "none":
            found |= {
                "sides": self.sides,
                "starts_apart": self.starts_apart,
                "earlier": list(self.earlier.digests),
            }
        if self.mode == "penalty":
            found["weight"] = self.weight
        return found

    def prepare(self, network: Any) -> None:
        """Find the network's matrices, and start A apart from the earlier ones.

        Raises:
            IncompatibleArtifactError: The earlier adapters are of another model.
        """
        self._held = []
        if self.mode == "none":
            return
        for side in _sides(self.sides):
            self._held += _held(network, side, self.earlier.bases[side])
        if self.starts_apart:
            self._restart()

    def _restart(self) -> None:
        # From torch's own numbers, which the training seeded, and what came before: equal seeds
        # of two targets then don't mean equal matrices.
        before = hashlib.sha256("".join(self.earlier.digests).encode()).digest()
        drawn = int(torch.randint(2**62, ())) ^ int.from_bytes(before[:7], "big")
        generator = torch.Generator().manual_seed(drawn)
        with torch.no_grad():
            for one in self._held:
                if one.side == "input":
                    one.restart(generator)

    def penalty(self, network: Any) -> Tensor | None:
        """Return the weighted mean over the layers, of both sides together; None without any."""
        if self.mode != "penalty" or not self._held:
            return None
        total = torch.stack([one.overlap() for one in self._held]).sum()
        layers = len(self._held) / len({one.side for one in self._held})
        return self.weight * total / layers

    def after_step(self, network: Any) -> None:
        """Project, if that is the mode."""
        if self.mode == "project":
            with torch.no_grad():
                for one in self._held:
                    one.project()


def subspace_cosine(one: Path, other: Path, side: Side) -> dict[str, float]:
    """Return of each layer of both adapters the largest cosine of a principal angle.

    Args:
        one: Folder of a peft LoRA adapter.
        other: Folder of another.
        side: `input` compares the rows of A, `output` the columns of B.

    Returns:
        By layer: 0 of orthogonal subspaces (or of a matrix that is 0), 1 where they meet.

    Raises:
        ArtifactError: One is missing or can't be read.
        IncompatibleArtifactError: They are of different models.
    """
    first, second = (_read_bases(path / WEIGHTS)[side] for path in (one, other))
    return {layer: _cosine(first[layer], second[layer]) for layer in first.keys() & second.keys()}


def largest_cosine(folders: Sequence[Path], side: Side) -> float:
    """Return the largest cosine of a principal angle of any two adapters in any layer.

    Raises:
        ArtifactError: One is missing or can't be read.
        IncompatibleArtifactError: They are of different models.
    """
    layers = EarlierAdapters.read(folders).bases[side].values()
    return max(
        (
            _cosine(one, other)
            for bases in layers
            for number, one in enumerate(bases)
            for other in bases[:number]
        ),
        default=0.0,
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    if one.shape[0] != other.shape[0]:
        raise IncompatibleArtifactError("the adapters are of different models")
    if not one.shape[1] or not other.shape[1]:
        return 0.0
    return min(1.0, float(torch.linalg.svdvals(one.T @ other)[0]))


def _held(network: Any, side: Side, earlier: Mapping[str, tuple[Tensor, ...]]) -> Iterator[_Held]:
    for layer, matrix in _matrices(network.named_parameters(), side):
        width = matrix.shape[1 if side == "input" else 0]
        rank = matrix.numel() // width
        if any(basis.shape[0] != width for basis in earlier.get(layer, ())):
            raise IncompatibleArtifactError(f"an earlier adapter's {layer} has another width")
        kept = kept_apart(earlier.get(layer, ()), rank)
        if not kept:
            continue
        spans = torch.cat(kept, dim=1)
        yield _Held(matrix, side, spans.to(matrix), _basis(spans).to(matrix))


def _matrices(named: Iterator[tuple[str, Tensor]], side: Side) -> Iterator[tuple[str, Tensor]]:
    for name, value in named:
        layer, found, _ = name.partition(f".{_MATRIX[side]}.")
        if found:
            yield layer, value


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of what the columns span, shape (width, numerical rank)."""
    left, values, _ = torch.linalg.svd(columns.double(), full_matrices=False)
    kept = int((values > NUMERICAL_RANK * values[0]).sum()) if values.numel() else 0
    basis: Tensor = left[:, :kept]
    return basis


def _read_bases(path: Path) -> dict[Side, dict[str, Tensor]]:
    found: dict[Side, dict[str, Tensor]] = {"input": {}, "output": {}}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = [(key, file.get_tensor(key)) for key in file.keys()]  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"the adapter's {path} can't be read: {error}") from error
    for layer, value in _matrices(iter(tensors), "input"):
        found["input"][layer] = _basis(value.T)
    for layer, value in _matrices(iter(tensors), "output"):
        found["output"][layer] = _basis(value)
    return found


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"there is no adapter in {path.parent}: {error}") from error


def _sides(sides: Sides) -> tuple[Side, ...]:
    return ("input", "output") if sides == "both" else (sides,)
