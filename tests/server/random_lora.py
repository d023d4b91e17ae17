"""Random LoRA adapters for SmolLM2, as peft would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ATTENTION = {"model.layers.3.self_attn.q_proj": (576, 576)}
FORWARD = {"model.layers.3.mlp.down_proj": (576, 1536)}


def write_lora(
    directory: Path,
    shapes: dict[str, tuple[int, int]] = FORWARD,
    *,
    seed: int = 0,
    rank: int = 2,
    spread: float = 1.0,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Write an adapter that changes the given modules, by the shape of their weight."""
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (rows, columns) in shapes.items():
        down = torch.randn(rank, columns, generator=draw)
        up = torch.randn(rows, rank, generator=draw) * spread
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.to(dtype)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    # `layers_to_transform` keeps peft from adapting the layers that the file doesn't have.
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 3 * rank,
        "target_modules": targets,
        "layers_to_transform": [3],
        "layers_pattern": "layers",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory
