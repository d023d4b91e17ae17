"""What several tests of the server ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guard.bundle import BundleStore
from guard.keys import GuardKey
from guard.prompts import ModelPrompts
from tests.server.judged import Judged, judging


@pytest.fixture(scope="module")
def judged(
    small_bundle: BundleStore,
    guard_key: GuardKey,
    prompts: ModelPrompts,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Judged]:
    """The application over the example's small bundle, and what it decides."""
    ledger = tmp_path_factory.mktemp("judged") / "ledger.jsonl"
    with judging(small_bundle, guard_key, prompts, ledger) as made:
        yield made
