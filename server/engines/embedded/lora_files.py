"""A peft LoRA adapter's two files: checked without reading the weights, or read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from guard.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from guard.disk import hash_file
from guard.errors import ArtifactError, IncompatibleArtifactError
from guard.types import AdapterUse
from server.engines.adapter_config import read_config

_PREFIX: Final = "base_model.model."
_MATRICES: Final = ("A.weight", "B.weight")

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What an adapter adds to one module's weight at weight 1: `strength * left @ right`.

    Attributes:
        left: Shape (rows, rank), in the file's dtype.
        right: Shape (rank, columns).
        strength: alpha / rank.
    """

    left: Tensor
    right: Tensor
    strength: float

    @property
    def shape(self) -> Shape:
        """Shape of the weight that it is added to."""
        return self.left.shape[0], self.right.shape[1]


def adapter_at(path: Path, weight: float = 1.0) -> AdapterUse:
    """Return the use of an adapter that stands in no bundle, named by its content.

    Raises:
        ArtifactError: There is no readable adapter.
        IncompatibleArtifactError: It isn't plain LoRA.
    """
    _read_config(path)
    ranks = [down[0] for down, _ in _read_shapes(path).values()]
    digests = [hash_file(path / name)[0] for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
    return AdapterUse("-".join(digests), path, max(ranks), weight)


def delta_shapes(path: Path) -> dict[str, Shape]:
    """Return the shape of what the adapter at `path` adds, by the module's name in the model.

    Raises:
        ArtifactError: There is no readable adapter.
        IncompatibleArtifactError: It isn't plain LoRA.
    """
    turned = _is_turned(_read_config(path))
    shapes = {name: (up[0], down[1]) for name, (down, up) in _read_shapes(path).items()}
    return {name: shape[::-1] if turned else shape for name, shape in shapes.items()}


def read_deltas(path: Path) -> dict[str, Delta]:
    """Return what the adapter at `path` adds, by the module's name in the model.

    The file is read whole and not mapped: it may be deleted or written over afterwards.

    Raises:
        ArtifactError: There is no readable adapter.
        IncompatibleArtifactError: It isn't plain LoRA.
    """
    config = _read_config(path)
    try:
        tensors = load(_weights_file(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    _check_pairs({key: tuple(tensor.shape) for key, tensor in tensors.items()}, path)
    return {name: _delta(name, tensors, config) for name in _names(tensors)}


def _delta(name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Delta:
    down, up = (tensors[key] for key in _keys(name))
    rank = down.shape[0]
    strength = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Delta(down.T, up.T, strength) if _is_turned(config) else Delta(up, down, strength)


def _is_turned(config: Mapping[str, Any]) -> bool:
    """Whether the model's layers keep their weights as (columns, rows), as GPT-2's do."""
    return bool(config.get("fan_in_fan_out"))


def _read_config(path: Path) -> dict[str, Any]:
    _weights_file(path)  # Without it the folder isn't an adapter's at all, which says more.
    return read_config(path)


def _weights_file(path: Path) -> Path:
    file = path / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ArtifactError(f"no LoRA adapter there: {path.name} has no {ADAPTER_WEIGHTS}")
    return file


def _unreadable(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{ADAPTER_WEIGHTS} of {path.name} can't be read: {error}")


def _read_shapes(path: Path) -> dict[str, tuple[Shape, Shape]]:
    """Return the shapes of each module's A and B, from the file's header alone."""
    try:
        with safe_open(_weights_file(path), framework="numpy") as file:
            keys = list(file.keys())
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    _check_pairs(shapes, path)
    pairs = {name: _keys(name) for name in _names(shapes)}
    return {name: (shapes[down], shapes[up]) for name, (down, up) in pairs.items()}


def _names(keys: Iterable[str]) -> list[str]:
    return sorted({key.removeprefix(_PREFIX).partition(".lora_")[0] for key in keys})


def _keys(name: str) -> tuple[str, str]:
    down, up = (f"{_PREFIX}{name}.lora_{matrix}" for matrix in _MATRICES)
    return down, up


def _check_pairs(shapes: Mapping[str, Shape], path: Path) -> None:
    """Raise if the tensors aren't pairs of matrices of one rank."""
    if not shapes:
        raise ArtifactError(f"adapter {path.name} holds no LoRA matrices")
    for key in shapes:
        if key.partition(".lora_")[2] not in _MATRICES:
            raise IncompatibleArtifactError(f"adapter {path.name} has an unknown tensor {key}")
    for name in _names(shapes):
        lacking = [key for key in _keys(name) if key not in shapes]
        if lacking:
            raise ArtifactError(f"adapter {path.name} lacks {lacking[0]}")
        down, up = (shapes[key] for key in _keys(name))
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or down[0] == 0:
            raise ArtifactError(
                f"the matrices of {name} in adapter {path.name} don't fit each other: "
                f"A is {down}, B is {up}"
            )
