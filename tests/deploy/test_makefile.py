"""Every test belongs to one of the Makefile's targets, and each target runs what it says."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def commands(target: str) -> str:
    """What `make TARGET` would run last."""
    done = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", target],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("target", "marks", "python"),
    [
        ("test", '-m "not vllm and not slow"', False),
        ("test-vllm", '-m "vllm and not slow"', True),
        ("test-slow", "-m slow", True),
    ],
)
def test_each_command_runs_its_share_of_the_tests(target: str, marks: str, python: bool) -> None:
    run = commands(target)
    assert run.endswith(f"/pytest {marks}")
    assert ("GUARD_TEST_VLLM_PYTHON=" in run) == python


def test_marks_name_the_command_that_runs_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for mark in project["tool"]["pytest"]["ini_options"]["markers"]:
        name, target = re.fullmatch(r"(\w+): .*\(make ([a-z-]+)\)", mark).groups()  # type: ignore[union-attr]
        assert name in commands(target)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
@pytest.mark.parametrize("target", ["test-vllm", "test-slow"])
def test_people_are_told(page: str, target: str) -> None:
    assert f"make {target}" in (ROOT / page).read_text()
