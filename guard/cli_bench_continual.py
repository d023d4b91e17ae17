"""`unlearn-guard bench continual`: requests to forget that come one after another."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.continual import ContinualSettings
    from benchmarks.report import Row

_FILE = click.Path(path_type=Path)

REQUESTS = 10
FULL_REQUESTS = 20

_SHOWN = ("request 1: probability", "request 1: min-k AUC - ", "router", "kept: probability - full",
          "largest cosine")  # fmt: skip
"""What the table on the screen holds; report and table.md have all."""


@click.command("continual")
@click.option("--pair", type=_FILE, required=True, help="What `bench tofu prepare` made.")
@click.option("--data", type=_FILE, required=True, help="Folder of TOFU's files.")
@click.option(
    "--requests",
    type=click.IntRange(1),
    help=f"How many come, an author each, of those only the full model knows [{REQUESTS}].",
)
@click.option(
    "--full", is_flag=True, help=f"{FULL_REQUESTS} requests: needs a pair of as many authors."
)
@click.option("--epochs", type=click.IntRange(1), help="Of each training.")
@click.option(
    "--variants",
    default="project,penalty,none",
    show_default=True,
    help="How adapters are kept apart; the first one's are routed to.",
)
@click.option("--utility", type=click.IntRange(1), help="Questions to be kept, a kind [30].")
@click.option("--benign", type=_FILE, help="General traffic [the set that ships].")
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option("--threads", type=int, help="Threads of model and encoder.")
@out_option
@click.pass_context
def continual(
    context: click.Context,
    /,
    pair: Path,
    data: Path,
    benign: Path | None,
    out: Path,
    **options: Any,
) -> None:
    """Forget one author after another, each by an adapter kept apart from those before.

    After 1, 5 and 10 requests it is measured what the guard makes of all of them (routed), and
    what all adapters do at once (merged). The bundle, in OUT, is made anew. Interrupted, the same
    command goes on where it stopped. Writes report.json, table.md and continual.png.
    """
    from benchmarks.continual import RequestSequence
    from benchmarks.continual_measure import load_data, measure_sequence
    from benchmarks.continual_report import continual_rows, plot_sequence
    from benchmarks.plots import check_plots
    from benchmarks.report import Report, describe_versions, write_report
    from benchmarks.tofu_pair import Authors, read_authors, read_pair
    from guard.console import note, progress_display

    check_plots()
    session: Session = context.obj
    flags = {name: options.pop(name) for name in ("seed", "threads")}
    values = session.load(**flags).values
    found = read_pair(pair)
    settings = _settings(options, len(found.authors.forget), values.seed)
    authors = found.authors.forget[: settings.requests]
    known = read_authors(data, Authors(authors, found.authors.retain))
    asked = load_data(data, authors, found.authors.retain, settings)
    rows = {
        f"author-{author}": [(row.question, row.answer) for row in known if row.author == author]
        for author in authors
    }
    sequence = RequestSequence(found.full, rows, out, settings, benign, values.threads)
    with progress_display() as progress:
        try:
            measured = measure_sequence(sequence, found.retained, asked, progress)
        except KeyboardInterrupt:
            note(f"{out} keeps what was done: the same command goes on there")
            raise
    trained = {variant: sequence.trained(variant) for variant in settings.variants}
    figures = continual_rows(measured, asked, trained, values.seed)
    report = Report(command_text(context), values.seed, tuple(figures), describe_versions())
    write_report(out, report)
    plot_sequence(out / "continual.png", measured, asked)
    _show(figures)
    note(f"{out}: report.json, table.md, continual.png; the bundle is {sequence.store.root}")


def _settings(options: dict[str, Any], possible: int, seed: int) -> ContinualSettings:
    """Put the settings together, and say how many requests the pair allows."""
    from benchmarks.continual import ContinualSettings
    from guard.errors import ConfigError

    full, given = options.pop("full"), options.pop("requests")
    if full and given is not None:
        raise ConfigError(f"--full takes {FULL_REQUESTS} requests: give one of --full, --requests")
    requests = FULL_REQUESTS if full else given or REQUESTS
    if requests > possible:
        raise ConfigError(
            f"{requests} requests need a pair of as many authors to forget, and this one has "
            f"{possible}: give --requests {possible}, or prepare a larger pair (`unlearn-guard "
            "bench tofu prepare --forget-authors 180-199`)"
        )
    epochs, utility = options["epochs"], options["utility"]
    more = {} if utility is None else {"utility": utility}
    return ContinualSettings(
        requests=requests,
        variants=tuple(name.strip() for name in options["variants"].split(",")),
        training={} if epochs is None else {"epochs": epochs},
        seed=seed,
        **more,
    )


def _show(rows: Sequence[Row]) -> None:
    from benchmarks.report import format_interval, format_number
    from guard.console import print_table

    columns = ("system", "route", "group", "measure", "value", "95 %", "n")
    lines = [
        (r.system, r.route, r.group, r.measure, format_number(r.value), format_interval(r), r.n)
        for r in rows
        if r.measure.startswith(_SHOWN)
    ]
    print_table("continual requests", columns, lines)
