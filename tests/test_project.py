"""Promises of the repository as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import guard

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "sklearn", "peft", "nevergrad", "onnx", "scipy", "pandas")


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == guard.__version__
    assert "## [Unreleased]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    "modules",
    [
        "server.app, server.run, server.engines.vllm, guard.build, guard.pipeline",
        "classifiers.detector, corruptions.ops, guard.reload, guard.decide",
    ],
)
def test_the_serving_path_loads_no_training_code(modules: str) -> None:
    code = (
        f"import sys, {modules}\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])\n"
        "print(*[name for name in sys.modules if name.endswith(('.learn', '.targets'))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == []


def test_declared_packages_are_the_folders_there_are() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for top in ("guard", "classifiers", "corruptions", "adapters", "server", "benchmarks")
        for path in (ROOT / top).rglob("__init__.py")
    }
    assert set(setuptools["packages"]) == found


def test_every_link_in_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_make_has_the_targets_that_the_readme_names() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", (ROOT / "README.md").read_text()))
    assert {"run", "test"} <= named
    assert named - {"install"} <= targets | {"does"}


def test_no_path_of_a_machine_and_no_registry_host_is_committed() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    forbidden = re.compile(
        "/(?:ho" + r"me/\w+|ro" + r"ot/|wo" + r"rk/)|pyp" + r"i\.org|python" + "hosted"
    )
    for name in listed.stdout.split("\0"):
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".sh", ".yaml"} and path.is_file():
            assert not forbidden.search(path.read_text()), name
