"""Every field and route of the installed vLLM is in the guard's table.

Needs vLLM's classes only, no running server.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from guard.dialect_fields import DIALECT_FIELDS
from guard.fields import FIELDS, ROUTES
from tests.vllm.conftest import PYTHON_VARIABLE, environment

DUMP = Path(__file__).with_name("protocol_dump.py")
LIMIT_S = 300
TABLES = FIELDS | DIALECT_FIELDS


@pytest.fixture(scope="module")
def protocol() -> dict[str, Any]:
    """What vLLM has: request class by route, fields by class, and routes."""
    python = os.environ.get(PYTHON_VARIABLE)
    if not python or not Path(python).is_file():
        pytest.fail(f"set {PYTHON_VARIABLE}; `make test-vllm` does so", pytrace=False)
    done = subprocess.run(
        [python, str(DUMP)], capture_output=True, text=True, timeout=LIMIT_S, env=environment()
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def unknown(
    classes: dict[str, Any], kind: str, table: dict[str, Any], place: str = ""
) -> Iterator[str]:
    """Yield fields of a class, and of those within it, that a table does not know."""
    for name, inner in classes[kind].items():
        path = place + name
        row = table.get(path)
        if row is not None and (row.treatment == "deny" or row.bounds.get("max_length") == 0):
            continue  # with all that is in it
        if row is None and not any(known.startswith((f"{path}.", f"{path}[")) for known in table):
            yield path
            continue
        for suffix, one in inner:
            yield from unknown(classes, one, table, f"{path}{suffix}.")


def test_every_field_of_vllm_has_a_treatment(protocol: dict[str, Any]) -> None:
    missing = {
        route: sorted(set(unknown(protocol["classes"], kind, TABLES[route])))
        for route, kind in protocol["roots"].items()
    }
    assert not {route: paths for route, paths in missing.items() if paths}
    assert protocol["roots"].keys() == TABLES.keys()


def test_a_field_that_the_table_lacks_is_named(protocol: dict[str, Any]) -> None:
    route = "/v1/chat/completions"
    gone = ("logit_bias", "messages[].content[].text", "tools[].function.parameters")
    table = {path: row for path, row in TABLES[route].items() if path not in gone}
    found = set(unknown(protocol["classes"], protocol["roots"][route], table))
    assert found == set(gone)


def test_every_route_of_vllm_has_a_treatment(protocol: dict[str, Any]) -> None:
    assert not sorted(set(protocol["routes"]) - ROUTES.keys())
    assert len(protocol["routes"]) > 70
