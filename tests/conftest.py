"""Fixtures that every test may use: the real embedded model, the real encoder, a fitted target."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parent.parent / "examples" / "harry-potter"


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """The embedded model as a plain model directory, prepared once per machine."""
    from server.engines.embedded.prepare import prepare_smollm2

    return prepare_smollm2(None)


@pytest.fixture(scope="session")
def encoder_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported MiniLM encoder."""
    from classifiers.export import export_encoder

    directory = tmp_path_factory.mktemp("encoder")
    export_encoder(directory)
    return directory


@pytest.fixture(scope="session")
def example_dir() -> Path:
    """The shipped example target's data."""
    return EXAMPLE
