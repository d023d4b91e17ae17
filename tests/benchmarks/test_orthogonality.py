"""The comparison of ways to keep adapters apart, on a small random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.examples import Example
from adapters.train import TrainSettings
from benchmarks.orthogonality import Arm, compare_arms

TARGETS = [
    [Example((1, 10 + n, 5), (20 + 5 * target + n, 40, 2)) for n in range(4)] for target in range(3)
]
ARMS = (Arm("none"), Arm("penalty", weight=1000.0), Arm("project", "both"))


def tiny() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config)


def test_each_arm_is_trained_in_sequence_and_compared(tmp_path: Path) -> None:
    settings = TrainSettings(
        rank=2, alpha=4, epochs=4, batch=2, rate=1e-2, modules=("q_proj",), dtype="float32"
    )
    works: list[str] = []

    def compare() -> dict[tuple[str, str], float | None]:
        rows = compare_arms(
            tiny(),
            TARGETS,
            settings,
            tmp_path,
            arms=ARMS,
            progress=lambda what, done, total: works.append(what),
        )
        assert {row.n for row in rows} == {3}
        return {(row.group, row.measure): row.value for row in rows}

    found = compare()
    value = {key: one or 0.0 for key, one in found.items()}
    assert value["arm=none", "cosine_input"] > 0.2
    # Another seed a target: with one for all, A would be the same from the start.
    assert value["arm=none", "cosine_input"] < 0.99
    assert value["arm=none", "cosine_output"] > 0.2
    assert value["arm=penalty-input-1000", "cosine_input"] < 0.1
    assert value["arm=penalty-input-1000", "cosine_output"] > 0.2
    for side in ("input", "output"):
        assert value["arm=project-both", f"cosine_{side}"] < 1e-3
    assert works[0] == "none: target 1 of 3" and works[-1] == "project-both: target 3 of 3"
    works.clear()
    assert compare() == pytest.approx(found) and works == []
