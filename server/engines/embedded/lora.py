"""LoRA adapters at an exact scale, with a base model that stays bit-identical.

Adapted weights are put in place of the base's for the time of a call and taken out again by
reference, so that no rounding is left behind and the base runs without any extra work.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from guard.errors import ArtifactError, IncompatibleArtifactError

_PREFIX: Final = "base_model.model."
_WEIGHTS: Final = "adapter_model.safetensors"
# Settings that change what the two matrices mean; vLLM refuses or ignores most of them as well.
_UNSUPPORTED: Final = (
    "use_dora",
    "use_qalora",
    "alora_invocation_tokens",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "lora_bias",
)


class LoraSwitch:
    """Puts one adapter at a time onto a model.

    Args:
        model: The transformers model.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._key: tuple[str, int, float] | None = None
        self._merged: dict[str, Tensor] = {}

    @contextmanager
    def applied(self, path: str | Path | None, scale: float = 1.0) -> Iterator[None]:
        """Run the block with the adapter at `path`; None or a scale of 0 is the base.

        Raises:
            ArtifactError: There is no readable adapter.
            IncompatibleArtifactError: It was made for another model or isn't plain LoRA.
        """
        if path is None or scale == 0:
            yield
            return
        merged = self._weights(Path(path), scale)
        originals = {name: self._model.get_submodule(name).weight for name in merged}
        try:
            for name, weight in merged.items():
                module = self._model.get_submodule(name)
                module.weight = torch.nn.Parameter(weight, requires_grad=False)
            yield
        finally:
            for name, weight in originals.items():
                self._model.get_submodule(name).weight = weight

    def _weights(self, path: Path, scale: float) -> dict[str, Tensor]:
        """Return the adapted weights by module; the last adapter and scale stay in memory."""
        file = path / _WEIGHTS
        if not file.is_file():
            raise ArtifactError(f"no LoRA adapter there: {path.name} has no {_WEIGHTS}")
        key = (str(path), file.stat().st_mtime_ns, scale)
        if key != self._key:
            self._key, self._merged = None, {}
            self._merged = self._merge(path, scale)
            self._key = key
        return self._merged

    @torch.inference_mode(False)
    @torch.no_grad()
    def _merge(self, path: Path, scale: float) -> dict[str, Tensor]:
        config = _read_config(path)
        merged: dict[str, Tensor] = {}
        for name, (down, up) in _read_pairs(path).items():
            weight = self._target(name, path)
            rank = down.shape[0]
            root = rank**0.5 if config.get("use_rslora") else rank
            delta = (up.to(weight) @ down.to(weight)) * (scale * config["lora_alpha"] / root)
            delta = delta.T if config.get("fan_in_fan_out") else delta
            if delta.shape != weight.shape:
                raise IncompatibleArtifactError(
                    f"adapter {path.name} has {tuple(delta.shape)} for {name}, the model "
                    f"{tuple(weight.shape)}: it was made for another model"
                )
            merged[name] = weight + delta
        return merged

    def _target(self, name: str, path: Path) -> Tensor:
        try:
            weight: Tensor = self._model.get_submodule(name).weight
        except AttributeError:
            raise IncompatibleArtifactError(
                f"adapter {path.name} changes {name}, which the model doesn't have"
            ) from None
        return weight


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((path / "adapter_config.json").read_bytes())
        kind, alpha = config["peft_type"], config["lora_alpha"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"the adapter_config.json of {path.name} is unusable: {error}"
        ) from None
    if kind != "LORA" or not isinstance(alpha, int | float):
        raise IncompatibleArtifactError(f"{path.name} is a {kind} adapter; only LORA is supported")
    used = [name for name in _UNSUPPORTED if config.get(name)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    if used:
        raise IncompatibleArtifactError(
            f"adapter {path.name} uses {', '.join(used)}; only plain LoRA matrices are supported"
        )
    return config


def _read_pairs(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the two matrices of each module, by the module's name in the model."""
    try:
        tensors = load_file(path / _WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{_WEIGHTS} of {path.name} can't be read: {error}") from None
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key in tensors:
        name, _, matrix = key.removeprefix(_PREFIX).partition(".lora_")
        if matrix not in ("A.weight", "B.weight"):
            raise IncompatibleArtifactError(f"adapter {path.name} has an unknown tensor {key}")
        other = f"{_PREFIX}{name}.lora_B.weight"
        if matrix == "A.weight" and other not in tensors:
            raise ArtifactError(f"adapter {path.name} lacks {other}")
        if matrix == "A.weight":
            pairs[name] = (tensors[key], tensors[other])
    return pairs
