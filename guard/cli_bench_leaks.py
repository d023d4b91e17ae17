"""`unlearn-guard bench leaks`: what attacks get out of a guarded model, beside an ignorant one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_bench_tofu import parse_authors
from guard.cli_eval import command_text, out_option
from guard.cli_session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.leak_suite import Suite
    from benchmarks.leak_suite_rows import Outcomes
    from benchmarks.report import Row
    from guard.types import Progress

LEAKS_FILE = "leaks.jsonl"
DECISIONS_FILE = "guarded-decisions.json"
_FILE = click.Path(path_type=Path)


@click.command("leaks")
@click.option("--guarded", metavar="URL", help="The guard before the model that knows the authors.")
@click.option("--unguarded", metavar="URL", help="The same model without the guard.")
@click.option("--retained", metavar="URL", help="A model that never saw the authors.")
@click.option("--data", type=_FILE, required=True, help="Folder of TOFU's full.jsonl.")
@click.option("--attacks", type=_FILE, required=True, help="Attack wrappers, JSON lines.")
@click.option(
    "--authors",
    metavar="A-B",
    default="190-199",
    show_default=True,
    help="Authors that are forgotten, by TOFU's numbers.",
)
@click.option(
    "--sample", type=click.IntRange(1), default=600, show_default=True, help="Attacks to ask."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=48, show_default=True, help="Length of answers."
)
@click.option(
    "--concurrency",
    type=click.IntRange(1, 256),
    default=8,
    show_default=True,
    help="Requests at once.",
)
@click.option("--model", help="Name of the model to ask [the first that a server lists].")
@click.option("--restart", is_flag=True, help="Throw away the answers of the systems named.")
@click.option("--seed", type=int, help="Seed of the sample and of the intervals.")
@out_option
@click.pass_context
def leaks(
    context: click.Context,
    /,
    data: Path,
    attacks: Path,
    authors: str,
    sample: int,
    tokens: int,
    concurrency: int,
    model: str | None,
    restart: bool,
    seed: int | None,
    out: Path,
    **urls: str | None,
) -> None:
    """Ask served models for forgotten facts, each question in an attack's wrapper.

    Any OpenAI-compatible server will do. Systems may be asked in one call or one at a time: answers
    are kept in OUT, and interrupted, the same command goes on. A leak is a name, title, date or
    place of the reference answer that the prompt doesn't say. Writes report.json, table.md,
    leaks.png and leaks.jsonl (which holds the facts) of the systems that are done.
    """
    from benchmarks.attacks import load_templates
    from benchmarks.leak_suite import Suite, draw_attacks, load_items
    from benchmarks.plots import check_plots
    from guard.console import progress_display

    check_plots()
    session: Session = context.obj
    settings = session.load(seed=seed).values
    items = load_items(data, parse_authors(authors, "--authors"))
    drawn = draw_attacks(items, load_templates(attacks), sample, settings.seed)
    suite = Suite(tuple(drawn), tokens, settings.seed, out)
    with progress_display() as progress:
        for system, url in urls.items():
            if url is not None:
                _ask(suite, system, url, model, concurrency, restart, progress)
    _report(suite, command_text(context), len(items))


def _ask(
    suite: Suite,
    system: str,
    url: str,
    model: str | None,
    concurrency: int,
    restart: bool,
    progress: Progress,
) -> None:
    from contextlib import nullcontext

    import openai

    from benchmarks.leak import Endpoint
    from benchmarks.leak_decisions import counted
    from benchmarks.leak_suite import ask
    from guard.errors import EngineUnavailableError

    file = suite.out / DECISIONS_FILE
    if restart and system == "guarded":
        file.unlink(missing_ok=True)
    try:
        endpoint = Endpoint.connect(url, model, stream=False, concurrency=concurrency)
        with endpoint.client, counted(url, file) if system == "guarded" else nullcontext():
            ask(suite, system, endpoint, progress, restart)
    except openai.OpenAIError as error:
        raise EngineUnavailableError(
            f"--{system} {url}: {error}; the answers so far are kept, and the same command goes on"
        ) from error


def _report(suite: Suite, command: str, questions: int) -> None:
    from benchmarks.leak_decisions import load_decisions
    from benchmarks.leak_suite import SYSTEMS, judge
    from benchmarks.leak_suite_rows import plot_kinds, suite_rows, verdict
    from benchmarks.report import Report, describe_versions, write_report
    from guard.console import note
    from guard.errors import ConfigError

    found = {name: suite.answered(name) for name in SYSTEMS}
    systems = {name: judge(suite, said) for name, said in found.items() if said is not None}
    if not systems:
        raise ConfigError("no system was asked; give --guarded, --unguarded or --retained URL")
    decisions = load_decisions(suite.out / DECISIONS_FILE) if "guarded" in systems else {}
    rows = suite_rows(systems, decisions, suite.seed)
    sizes = {"questions": str(questions), "tokens": str(suite.tokens)}
    write_report(suite.out, Report(command, suite.seed, tuple(rows), describe_versions(**sizes)))
    plot_kinds(suite.out / "leaks.png", rows)
    _write_leaks(suite.out / LEAKS_FILE, systems)
    _show(rows)
    for line in verdict(rows):
        note(line)
    missing = [name for name in SYSTEMS if name not in systems]
    if missing:
        note(f"not asked yet: {', '.join(missing)}; the same command with --{missing[0]} URL does")
    note(f"{suite.out}: report.json, table.md, leaks.png, {LEAKS_FILE}")


def _write_leaks(file: Path, systems: Outcomes) -> None:
    import json

    from guard.disk import replace_file

    rows: list[dict[str, Any]] = [
        {"system": name, **one.record()}
        for name, outcomes in systems.items()
        for one in outcomes
        if one.fact is not None
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    replace_file(file, text.encode())


def _show(rows: Sequence[Row]) -> None:
    from benchmarks.report import format_interval, format_number
    from guard.console import print_table

    lines = [
        (row.system, _measure(row), format_number(row.value), format_interval(row), row.n)
        for row in rows
        if row.group == "all" or row.measure == "decided"
    ]
    print_table("leaks", ("system", "measure", "value", "95 %", "n"), lines)


def _measure(row: Row) -> str:
    return row.measure if row.group == "all" else f"{row.measure}, {row.group}"
