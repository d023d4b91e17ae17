"""A finished adapter's two files, as peft and vLLM read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save

from adapters.checkpoint import replace_file

WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"


def write_adapter(out: Path, network: Any, dtype: torch.dtype, base_name: str | None) -> None:
    """Write what peft's `save_pretrained` writes, less the paths of this machine.

    Args:
        out: The adapter's folder.
        network: A peft model with one adapter, `default`.
        dtype: Of the file.
        base_name: The base model's name, for the config.
    """
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(network, save_embedding_layers=False)
    tensors = {name: value.detach().cpu().to(dtype).contiguous() for name, value in found.items()}
    config = network.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "target_modules": _module_suffixes(network),
    }
    text = json.dumps(config, indent=1, sort_keys=True, default=_plain) + "\n"
    replace_file(out / CONFIG, text.encode())
    replace_file(out / WEIGHTS, save(tensors, {"format": "pt"}))


def _module_suffixes(network: Any) -> list[str]:
    """Name the adapted layers by their last parts, where no other layer has them: peft lists all.

    So a model with other layers is told from the right one, and engines read a short list.
    """
    full = sorted(set(network.targeted_module_names))
    last = {name.rpartition(".")[2] for name in full}
    alike = {
        name
        for name, _ in network.get_base_model().named_modules()
        if name.rpartition(".")[2] in last
    }
    return sorted(last) if alike == set(full) else full


def _plain(value: Any) -> Any:
    """Sets and enumerations of peft's config as JSON."""
    return sorted(value) if isinstance(value, set | frozenset) else str(value)
