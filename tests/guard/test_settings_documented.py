"""Every setting is in the docs with its default, and the docs know no other."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from guard.cli_serve import serve
from guard.settings import ENV_CONFIG, PREFIX, Settings

ROOT = Path(__file__).parents[2]
CLI = ROOT / "docs" / "cli.md"
PAGES = [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]
EXAMPLES = list((ROOT / "deploy").rglob("*.yaml"))

_ROW = re.compile(r"^\| (`[^|]+`) \|([^|]*)\|([^|]*)\|$", re.MULTILINE)
_NAME = re.compile(r"`([a-z_0-9]+)`")


def rows(text: str) -> Iterator[tuple[str, str]]:
    """Yield each setting of the table and what stands for its default."""
    table = text.partition("\n## Settings\n")[2].partition("\n## ")[0]
    for names, default, _ in _ROW.findall(table):
        found = _NAME.findall(names)
        cells = [cell.strip() for cell in default.split(", ")]
        for place, name in enumerate(found):
            yield name, cells[place] if len(cells) == len(found) else cells[0]


def shown(value: Any) -> str:
    """A default as the docs write it."""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"{value:,.6g}"
        if isinstance(value, float)
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def check(text: str) -> None:
    """Assert that a page lists the settings as they are, each once."""
    listed = list(rows(text))
    names = [name for name, _ in listed]
    assert sorted(names) == sorted(Settings.model_fields)
    for name, cell in listed:
        default = getattr(Settings(), name)
        if default is None or default == ():
            # The cell says in words what is done then.
            assert cell.strip("`").replace(",", "") not in ("None", "null", "()"), name
        else:
            assert cell.strip("`").replace(",", "") == shown(default).replace(",", ""), name


def test_the_table_lists_every_setting_with_its_default() -> None:
    check(CLI.read_text())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| `max_queue` | 16 |", "| `max_queue` | 17 |"),
        ("| `max_queue` | 16 |", "| `max_kueue` | 16 |"),
        ("| `self_check` | `true` |", "| `self_check` | `false` |"),
        ("| `fpr_budget`, `seed` | 0.001, 0 |", "| `fpr_budget`, `seed` | 0, 0.001 |"),
        ("| `threads` |", "| `threads`, `threads` |"),
        ("| `host`, `port` |", "| `host` |"),
    ],
)
def test_a_page_that_differs_is_told(old: str, new: str) -> None:
    text = CLI.read_text()
    assert text.count(old) == 1
    with pytest.raises(AssertionError):
        check(text.replace(old, new))


def test_the_class_says_what_each_is() -> None:
    text = inspect.getdoc(Settings) or ""
    described = re.findall(r"^ {4}(\w+): ", text.partition("Attributes:")[2], re.MULTILINE)
    assert described == list(dict.fromkeys(described))
    assert set(described) == set(Settings.model_fields)


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.name)
def test_no_page_or_example_names_a_variable_that_is_no_setting(page: Path) -> None:
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | {ENV_CONFIG, PREFIX}
    named = set(re.findall(rf"{PREFIX}[A-Z_0-9]*", page.read_text()))
    assert named <= known


def test_serve_tells_the_defaults_of_its_flags() -> None:
    told = {}
    for option in serve.params:
        assert isinstance(option, click.Option)
        default = re.search(r"\[([^\]]+)\]\.$", option.help or "")
        value = getattr(Settings(), option.name or "", None)
        if default is not None and value is not None:
            told[option.name] = (default[1], shown(value))
    assert {"host", "port", "on_error", "processes"} <= told.keys()
    assert all(says.replace(",", "") == is_.replace(",", "") for says, is_ in told.values()), told
