"""An adapter's peft config, as far as both engines can do what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from guard.bundle import ADAPTER_CONFIG
from guard.errors import ArtifactError, IncompatibleArtifactError

# Settings that change what the two matrices mean, or that another `lora_alpha` would not scale.
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


def read_config(path: Path) -> dict[str, Any]:
    """Return the config of the adapter in a folder.

    Raises:
        ArtifactError: There is none that can be read.
        IncompatibleArtifactError: It isn't plain LoRA, with one alpha and one rank.
    """
    try:
        config: dict[str, Any] = json.loads((path / ADAPTER_CONFIG).read_bytes())
        kind, alpha, rank = config["peft_type"], config["lora_alpha"], config["r"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"the {ADAPTER_CONFIG} of {path.name} is unusable: {error}") from None
    if kind != "LORA" or not isinstance(alpha, int | float) or not isinstance(rank, int):
        raise IncompatibleArtifactError(
            f"{path.name} is a {kind} adapter; only LORA is supported, with one alpha and rank"
        )
    used = [name for name in _UNSUPPORTED if config.get(name)]
    used += ["bias"] if config.get("bias", "none") != "none" else []
    if used:
        raise IncompatibleArtifactError(
            f"adapter {path.name} uses {', '.join(used)}; only plain LoRA matrices are supported"
        )
    return config
