"""What commands show while they work: all of it on standard error, so that output stays clean."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from guard.types import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

_LINE_EVERY_S = 5.0


def stderr_console() -> Console:
    """Return a console on standard error; it obeys NO_COLOR and plain pipes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Write a line for people."""
    stderr_console().print(text, markup=False)


@contextmanager
def progress_display() -> Iterator[Progress]:
    """Show progress: bars on a terminal, otherwise a plain line now and then.

    What follows ` · ` in the name of a work may change while it goes on, such as the best so far.
    """
    console = stderr_console()
    if not console.is_terminal:
        yield _Lines()
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int) -> None:
            work = what.partition(" · ")[0]
            if work not in tasks:
                tasks[work] = bars.add_task(what, total=total or None)
            bars.update(tasks[work], description=what, completed=done, total=total or None)

        yield show


class _Lines:
    """Progress as lines: the first and last step of each work, and one every few seconds."""

    def __init__(self) -> None:
        self._last: dict[str, float] = {}
        self._ended: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        work = what.partition(" · ")[0]
        ended = total > 0 and done >= total
        if work in self._ended and ended:
            return
        if ended or now - self._last.get(work, -_LINE_EVERY_S) >= _LINE_EVERY_S:
            self._last[work] = now
            click.echo(f"{what}: {done}/{total}" if total else f"{what}: {done}", err=True)
        if ended:
            self._ended.add(work)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table on standard output, for people; scripts take `--json`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200)
    plain = None if not console.is_terminal else box.HEAVY_HEAD
    table = Table(title=title or None, title_justify="left", box=plain, show_header=any(columns))
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console.print(table, markup=False)


def print_figures(title: str, figures: Mapping[str, object]) -> None:
    """Print names and values as a table; nested figures get dotted names."""
    print_table(title, ("", ""), [(name, value) for name, value in _flat(figures)])


def _flat(figures: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in figures.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _cell(value: object) -> str:
    from rich.markup import escape

    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return "\n".join(_cell(item) for item in value) or "-"
    return escape(str(value))
