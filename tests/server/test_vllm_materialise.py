"""Adapters on disk: strengths that share their weights, concatenations that equal their sum."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

from guard.bundle import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from guard.errors import ArtifactError, IncompatibleArtifactError
from guard.types import AdapterUse
from server.engines.materialise import (
    AdapterFolder,
    Part,
    nearest_strength,
    strength_steps,
)

PREFIX = "base_model.model.model.layers"


def adapter(
    path: Path, rank: int = 4, seed: int = 0, modules: tuple[str, ...] = ("0.q", "1.q"), **more: Any
) -> AdapterUse:
    """Write a random adapter of 6 inputs and 5 outputs."""
    path.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {}
    for module in modules:
        tensors[f"{PREFIX}.{module}.lora_A.weight"] = rng.normal(size=(rank, 6)).astype("f2")
        tensors[f"{PREFIX}.{module}.lora_B.weight"] = rng.normal(size=(5, rank)).astype("f2")
    save_file(tensors, path / ADAPTER_WEIGHTS)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q"]}
    (path / ADAPTER_CONFIG).write_text(json.dumps({**config, **more}))
    return AdapterUse(path.name, path, rank, 1.0)


def deltas(folder: Path) -> dict[str, Any]:
    """What an adapter adds to each module's weights, as peft defines it."""
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    root = config["r"] ** (0.5 if config.get("use_rslora") else 1)
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    return {
        name.removesuffix(".lora_A.weight"): (config["lora_alpha"] / root)
        * tensors[name.replace("lora_A", "lora_B")].astype("f8")
        @ tensors[name].astype("f8")
        for name in tensors
        if "lora_A" in name
    }


def config_of(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, ADAPTER_CONFIG).read_text())
    return found


# --- Strengths -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "step"),
    [(1e-9, 1 / 3), (0.2, 1 / 3), (0.49, 1 / 3), (0.5, 2 / 3), (0.84, 1.0), (1.0, 1.0), (1.2, 1.0)],
)
def test_the_nearest_strength_is_never_zero(weight: float, step: float) -> None:
    assert strength_steps(3) == (1 / 3, 2 / 3, 1.0)
    assert nearest_strength(weight, strength_steps(3)) == step


def test_strengths_share_one_file_and_differ_in_alpha(tmp_path: Path) -> None:
    use = adapter(tmp_path / "a")
    folder = AdapterFolder(tmp_path / "out")
    paths = [folder.write(f"n{step}", [Part(use, step)]) for step in strength_steps(3)]
    inodes = {Path(path, ADAPTER_WEIGHTS).stat().st_ino for path in paths}
    assert inodes == {(use.path / ADAPTER_WEIGHTS).stat().st_ino}
    assert [config_of(path)["lora_alpha"] for path in paths] == pytest.approx([8 / 3, 16 / 3, 8])
    assert {config_of(path)["r"] for path in paths} == {4}
    full = deltas(use.path)
    for name, delta in deltas(Path(paths[0])).items():
        np.testing.assert_allclose(delta, full[name] / 3)


def test_the_folder_goes_with_its_process_and_dead_ones_are_cleared(tmp_path: Path) -> None:
    use = adapter(tmp_path / "a")
    one, two = AdapterFolder(tmp_path / "out"), AdapterFolder(tmp_path / "out")
    held = Path(one.write("n", [Part(use, 1.0)]))
    (tmp_path / "out" / "guard-dead" / "n").mkdir(parents=True)
    other = Path(two.write("n", [Part(use, 1.0)]))
    assert held.is_dir() and other.is_dir() and held != other
    assert not (tmp_path / "out" / "guard-dead").exists()
    one.close()
    assert not held.exists() and other.is_dir() and (use.path / ADAPTER_WEIGHTS).is_file()
    two.close()
    two.close()
    assert list((tmp_path / "out").iterdir()) == []


def test_vllm_is_told_the_path_that_it_sees(tmp_path: Path) -> None:
    use = adapter(tmp_path / "a")
    folder = AdapterFolder(tmp_path / "out", "/adapters/")
    path = folder.write("n", [Part(use, 1.0)])
    assert path.startswith("/adapters/guard-") and path.endswith("/n")
    assert (tmp_path / "out" / path.removeprefix("/adapters/") / ADAPTER_CONFIG).is_file()


@pytest.mark.parametrize(
    "more",
    [{"use_dora": True}, {"alpha_pattern": {"q": 3}}, {"bias": "all"}, {"modules_to_save": ["q"]}],
    ids=str,
)
def test_what_alpha_does_not_scale_is_refused(tmp_path: Path, more: dict[str, Any]) -> None:
    use = adapter(tmp_path / "a", **more)
    with pytest.raises(IncompatibleArtifactError, match=next(iter(more))):
        AdapterFolder(tmp_path / "out").write("n", [Part(use, 0.5)])
    assert not list((tmp_path / "out").glob("*/n")), "nothing half-written may stay"


def test_a_missing_or_broken_adapter_is_an_artifact_error(tmp_path: Path) -> None:
    folder = AdapterFolder(tmp_path / "out")
    with pytest.raises(ArtifactError, match="a1"):
        folder.write("n", [Part(AdapterUse("k", tmp_path / "a1", 4, 1.0), 1.0)])
    use = adapter(tmp_path / "a2")
    (use.path / ADAPTER_WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(ArtifactError, match="a2"):
        folder.write("n", [Part(use, 1.0), Part(adapter(tmp_path / "a3"), 1.0)])


# --- Concatenation -------------------------------------------------------------------------------


def test_a_concatenation_adds_what_its_parts_add(tmp_path: Path) -> None:
    one = adapter(tmp_path / "a", rank=4, seed=1)
    two = adapter(tmp_path / "b", rank=3, seed=2, modules=("1.q", "2.k"), use_rslora=True)
    path = AdapterFolder(tmp_path / "out").write("n", [Part(one, 1.0), Part(two, 2 / 3)])
    config = config_of(path)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (7, 7, False)
    assert config["target_modules"] == ["k", "q"]
    first, second, both = deltas(one.path), deltas(two.path), deltas(Path(path))
    assert set(both) == {f"{PREFIX}.{module}" for module in ("0.q", "1.q", "2.k")}
    for name, delta in both.items():
        expected = first.get(name, 0) + second.get(name, 0) * 2 / 3
        np.testing.assert_allclose(delta, expected, rtol=1e-5, atol=1e-5)
    shapes = {t.shape for t in load_file(Path(path, ADAPTER_WEIGHTS)).values()}
    assert shapes == {(7, 6), (5, 7)}, "every module must have the rank that the config says"


def test_bfloat16_is_read_exactly(tmp_path: Path) -> None:
    uses = [adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for use in uses:
        matrices = load_file(use.path / ADAPTER_WEIGHTS)
        wide = {k: torch.from_numpy(v).bfloat16() for k, v in matrices.items()}
        save_torch(wide, use.path / ADAPTER_WEIGHTS)
        use.path.joinpath("wide").mkdir()
        save_torch({k: v.float() for k, v in wide.items()}, use.path / "wide" / ADAPTER_WEIGHTS)
        (use.path / "wide" / ADAPTER_CONFIG).write_text((use.path / ADAPTER_CONFIG).read_text())
    path = AdapterFolder(tmp_path / "out").write("n", [Part(use, 1.0) for use in uses])
    one, two = (deltas(use.path / "wide") for use in uses)
    for name, delta in deltas(Path(path)).items():
        np.testing.assert_allclose(delta, one[name] + two[name], rtol=1e-5, atol=1e-5)


def test_adapters_of_different_models_are_not_joined(tmp_path: Path) -> None:
    one, two = adapter(tmp_path / "a"), adapter(tmp_path / "b")
    tensors = load_file(two.path / ADAPTER_WEIGHTS)
    tensors[f"{PREFIX}.0.q.lora_A.weight"] = np.zeros((4, 7), "f2")
    save_file(tensors, two.path / ADAPTER_WEIGHTS)
    with pytest.raises(IncompatibleArtifactError, match=r"0\.q"):
        AdapterFolder(tmp_path / "out").write("n", [Part(one, 1.0), Part(two, 1.0)])
