"""Several LoRA adapters as one, of the sum of their ranks: A stacked, B side by side.

With A = [A₁; A₂] and B = [s₁B₁, s₂B₂] the product BA is s₁B₁A₁ + s₂B₂A₂, exactly what putting both
on at once gives. All factors go into B, so that the new adapter's own scale (alpha / rank) is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from guard.embeds import widen_bfloat16
from guard.errors import ArtifactError, IncompatibleArtifactError

Source = tuple[Path, dict[str, Any], float]
"""An adapter's weights file, its peft config, and the strength that it is put on with."""

Matrix = NDArray[np.float32]
Pairs = dict[str, tuple[Matrix, Matrix]]

_DOWN: Final = ".lora_A.weight"
_UP: Final = ".lora_B.weight"
_DTYPES: Final = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def concatenate(sources: Sequence[Source], out: Path) -> dict[str, Any]:
    """Write the adapter that has the effect of all sources at once, in float32.

    Args:
        sources: At least one; may adapt different modules.
        out: The weights file to write.

    Returns:
        The new adapter's peft config.

    Raises:
        ArtifactError: A weights file can't be read.
        IncompatibleArtifactError: They were made for different models.
    """
    scaled = [_scaled(*source) for source in sources]
    tensors: dict[str, Matrix] = {}
    for module in sorted({name for pairs in scaled for name in pairs}):
        try:
            down, up = _joined([pairs[module] for pairs in scaled if module in pairs])
        except ValueError:
            raise IncompatibleArtifactError(
                f"the adapters differ in the width of {module}: they are for different models"
            ) from None
        tensors[module + _DOWN], tensors[module + _UP] = down, up
    rank = sum(int(config["r"]) for _, config, _ in sources)
    padded = _padded(tensors, rank)
    save_file(padded, out, {"format": "pt"})
    targets = sorted({name.removesuffix(_UP).rpartition(".")[2] for name in padded if _UP in name})
    own = {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": targets}
    return {**sources[0][1], **own}


def _joined(pairs: Sequence[tuple[Matrix, Matrix]]) -> tuple[Matrix, Matrix]:
    downs, ups = zip(*pairs, strict=True)
    return np.concatenate(downs, axis=0), np.concatenate(ups, axis=1)


def _padded(tensors: dict[str, Matrix], rank: int) -> dict[str, Matrix]:
    """Give modules that not all sources adapt the same rank: their other directions do nothing."""
    padded = {}
    for name, value in tensors.items():
        missing = rank - value.shape[0 if name.endswith(_DOWN) else 1]
        widths = ((0, missing), (0, 0)) if name.endswith(_DOWN) else ((0, 0), (0, missing))
        padded[name] = np.ascontiguousarray(np.pad(value, widths)) if missing else value
    return padded


def _scaled(path: Path, config: dict[str, Any], strength: float) -> Pairs:
    rank = int(config["r"])
    root = rank**0.5 if config.get("use_rslora") else rank
    factor = np.float32(strength * config["lora_alpha"] / root)
    return {name: (down, up * factor) for name, (down, up) in _read_pairs(path).items()}


def _read_pairs(path: Path) -> Pairs:
    tensors = _read(path)
    modules = {name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)}
    if {module + half for module in modules for half in (_DOWN, _UP)} != set(tensors):
        raise IncompatibleArtifactError(
            f"adapter {path.parent.name} holds tensors other than pairs of LoRA matrices"
        )
    return {module: (tensors[module + _DOWN], tensors[module + _UP]) for module in modules}


def _read(path: Path) -> dict[str, Matrix]:
    """Read all tensors as float32; safetensors' own numpy reader knows no bfloat16."""
    try:
        entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path.name} of {path.parent.name} can't be read: {error}") from None
    found = {}
    for name, entry in entries:
        stored = _DTYPES.get(entry["dtype"])
        if stored is None:
            raise IncompatibleArtifactError(
                f"{name} of adapter {path.parent.name} is {entry['dtype']}; expected one of "
                f"{', '.join(_DTYPES)}"
            )
        flat = np.frombuffer(entry["data"], dtype=stored).reshape(entry["shape"])
        wide = widen_bfloat16(flat) if entry["dtype"] == "BF16" else flat.astype(np.float32)
        found[name] = wide
    return found
