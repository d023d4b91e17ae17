"""An adapter added to its model's weights for good, with peft."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from adapters.adapter_files import CONFIG, WEIGHTS
from guard.errors import ArtifactError, IncompatibleArtifactError


def merge_adapter(model: Any, adapter: Path) -> Any:
    """Merge an adapter into a model, at the strength it was trained at.

    Args:
        model: A transformers causal language model, in float32. It is changed in place, and is of
            no use after an error.
        adapter: Folder of a peft LoRA adapter.

    Returns:
        The model, a plain one.

    Raises:
        ArtifactError: There is no readable adapter.
        IncompatibleArtifactError: It was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    keys = _keys(adapter)
    with warnings.catch_warnings():  # of missing keys, which are checked below
        warnings.simplefilter("ignore")
        try:
            network = PeftModel.from_pretrained(model, str(adapter))
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise IncompatibleArtifactError(
                f"adapter {adapter.name} was made for another model: {reason}"
            ) from error
        expected = set(get_peft_model_state_dict(network, save_embedding_layers=False))
    if keys != expected:
        odd = sorted(keys ^ expected)[0]
        where = "the adapter" if odd in keys else "the model"
        raise IncompatibleArtifactError(
            f"adapter {adapter.name} was made for another model: only {where} has {odd}"
        )
    try:
        return network.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise ArtifactError(f"the adapter in {adapter} is broken: {error}") from error


def _keys(adapter: Path) -> set[str]:
    # Looked at before peft does, which would ask the network for what isn't there.
    for name in (CONFIG, WEIGHTS):
        if not (adapter / name).is_file():
            raise ArtifactError(f"there is no peft adapter in {adapter}: {name} is missing")
    try:
        kind = json.loads((adapter / CONFIG).read_bytes())["peft_type"]
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            keys = set(file.keys())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"the adapter in {adapter} can't be read: {error}") from error
    if kind != "LORA":
        raise IncompatibleArtifactError(f"{adapter} is a {kind} adapter; only LORA is supported")
    return keys
