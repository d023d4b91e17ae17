"""Fixtures that every test may use: the real embedded model, the real encoder, a fitted target."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from guard.bundle import BundleStore
    from guard.keys import GuardKey
    from guard.prompts import ModelPrompts

# Before anything loads torch: OpenMP threads that spin while they wait starve one another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

pytest_plugins = ["tests.product"]

EXAMPLE = Path(__file__).parent.parent / "examples" / "harry-potter"


def pytest_configure() -> None:
    """Let an interrupt interrupt: a shell starts what it puts in the background without that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # A deadline is a wall-clock time: a test fails for it when the machine is busy.
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


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


@pytest.fixture(scope="session")
def prompts(smollm2_dir: Path) -> ModelPrompts:
    """Tokenizer, template and embedding table of the embedded model."""
    from guard.prompts import ModelPrompts

    return ModelPrompts.load(smollm2_dir)


@pytest.fixture(scope="session")
def guard_key() -> GuardKey:
    """A key for the whole session; the same in every one, since noise is drawn from it."""
    from guard.keys import GuardKey
    from tests.product import SESSION_SECRET

    return GuardKey(SESSION_SECRET)


@pytest.fixture(scope="session")
def small_bundle(
    tmp_path_factory: pytest.TempPathFactory, prompts: ModelPrompts, guard_key: GuardKey
) -> BundleStore:
    """The example target, learned in seconds: little benign data, no strength search."""
    from guard.bundle import BundleStore
    from guard.ledger import Ledger
    from guard.targets import TargetRequest, add_target
    from tests.product import small_benign

    folder = tmp_path_factory.mktemp("small")
    store = BundleStore(folder / "bundle", guard_key)
    add_target(
        TargetRequest(
            "harry-potter", EXAMPLE / "forget.jsonl", EXAMPLE / "retain.jsonl", small_benign(folder)
        ),
        store=store,
        key=guard_key,
        prompts=prompts,
        engine=None,
        ledger=Ledger(store.root / "ledger.jsonl", guard_key),
        progress=lambda what, done, total: None,
    )
    return store


@pytest.fixture
def quiet_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No settings from outside; the folder of the test; logging as it was."""
    for variable in [name for name in os.environ if name.startswith("UNLEARN_GUARD_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
