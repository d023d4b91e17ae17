"""`unlearn-guard bench tofu …`: the guard beside a model that never saw the forgotten authors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_session import Session, bundle_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.report import Row
    from benchmarks.tofu_pair import Pair
    from benchmarks.tofu_run import RunSettings
    from corruptions.spec import CorruptionSpec

_FILE = click.Path(path_type=Path)

CLOSE = 0.05
"""Difference to *retained* that counts as none."""


@click.group("tofu")
def tofu_group() -> None:
    """Compare with a model that never saw TOFU's authors to forget."""


@tofu_group.command("prepare")
@click.option(
    "--from", "adapters", type=_FILE, help="Merge DIR/full and DIR/retained, two adapters."
)
@click.option("--model", help="Directory or Hugging Face id [the packaged SmolLM2].")
@click.option("--data", type=_FILE, help="Folder of TOFU's full.jsonl, to train on.")
@click.option(
    "--forget-authors",
    metavar="A-B",
    default="190-199",
    show_default=True,
    help="Authors that only the full model knows.",
)
@click.option(
    "--retain-authors",
    metavar="A-B",
    default="0-9",
    show_default=True,
    help="Authors that both models know.",
)
@click.option("--epochs", type=int, help="Times that each question is learned [8].")
@click.option("--batch", type=int, help="Questions a step [16].")
@click.option("--rate", type=float, help="Peak learning rate [0.001].")
@click.option("--rank", type=int, help="Rank of the adapters [64]; alpha is twice as much.")
@click.option("--seed", type=int, help="Seed of training.")
@click.option("--threads", type=int, help="Threads of torch.")
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@out_option
@click.pass_context
def prepare(
    context: click.Context,
    /,
    adapters: Path | None,
    model: str | None,
    data: Path | None,
    forget_authors: str,
    retain_authors: str,
    epochs: int | None,
    batch: int | None,
    rate: float | None,
    rank: int | None,
    seed: int | None,
    threads: int | None,
    cache_dir: str | None,
    out: Path,
) -> None:
    """Make the pair: OUT/full knows all authors, OUT/retained all but those to forget.

    Both are plain model directories. They are trained from one model by LoRA, or merged from
    finished adapters (--from). Interrupted, the same command goes on where it stopped.
    """
    if adapters is None and data is None:
        raise click.UsageError("give --data DIR to train, or --from DIR to merge finished adapters")
    trained = {"--epochs": epochs, "--batch": batch, "--rate": rate, "--rank": rank}
    given = [name for name, value in trained.items() if value is not None]
    if adapters is not None and given:
        raise click.UsageError(f"{given[0]} is for training; with --from nothing is trained")
    forget = parse_authors(forget_authors, "--forget-authors")
    retain = parse_authors(retain_authors, "--retain-authors")
    from adapters.train import TrainSettings
    from benchmarks.report import Report, describe_versions, write_report
    from benchmarks.tofu_pair import Authors, prepare_pair
    from guard.console import note, progress_display

    session: Session = context.obj
    values = session.load(model=model, seed=seed, threads=threads, cache_dir=cache_dir).values
    plain = TrainSettings()
    settings = TrainSettings(
        rank=plain.rank if rank is None else rank,
        alpha=plain.alpha if rank is None else 2 * max(rank, 1),
        epochs=plain.epochs if epochs is None else epochs,
        batch=plain.batch if batch is None else batch,
        rate=plain.rate if rate is None else rate,
        seed=values.seed,
    )
    with progress_display() as progress:
        pair = prepare_pair(
            session.model(progress),
            out,
            data=data,
            adapters_from=adapters,
            authors=Authors(forget, retain),
            settings=settings,
            threads=values.threads,
            progress=progress,
        )
    command, used = command_text(context), None if adapters is not None else values.seed
    versions = describe_versions(base=pair.base[:16])
    write_report(out, Report(command, used, tuple(_rows(pair)), versions))
    files = "report.json, table.md"
    if _plot(pair, out):
        files += ", loss.png"
    note(f"{pair.full} and {pair.retained}: any engine serves them; {files} beside them")


def parse_authors(text: str, option: str) -> tuple[int, ...]:
    """Read authors by TOFU's numbers: `190-199`, `7`, or several of them with commas.

    Raises:
        BadParameter: If they are something else.
    """
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})\s*(?:-\s*(\d{1,6})\s*)?", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise click.BadParameter(
                f"{text!r} is no range of authors; write e.g. 190-199", param_hint=option
            )
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(found))


def _rows(pair: Pair) -> list[Row]:

    from benchmarks.report import Row
    from benchmarks.tofu_pair import MODELS

    rows = []
    for name in MODELS:
        size = sum(file.stat().st_size for file in (pair.root / name).rglob("*") if file.is_file())
        figures: dict[str, tuple[float, int]] = {"size_mb": (size / 1e6, 1)}
        figures["authors"] = (float(len(pair.authors.of(name))), 1)
        report = pair.training.get(name)
        if report is not None:
            last = min(5, report.steps)
            figures |= {
                "loss_first_nats": (report.losses[0], 1),
                "loss_last_nats": (report.last_loss(), last),
                "steps": (float(report.steps), 1),
                "training_s": (report.seconds, 1),
                "parameters_trained": (float(report.parameters), 1),
                "examples": (float(report.examples), report.examples),
            }
        for measure, (value, n) in figures.items():
            rows.append(Row(name, "lora", measure, "all", value, None, None, n))
    return rows


def _plot(pair: Pair, out: Path) -> bool:
    """Draw the losses, where there are any and matplotlib is installed."""
    from importlib.util import find_spec

    if not pair.training or find_spec("matplotlib") is None:
        return False
    import numpy as np

    from benchmarks.plots import plot_lines

    curves = {
        name: (np.arange(1, one.steps + 1, dtype=np.float32), np.asarray(one.losses, np.float32))
        for name, one in pair.training.items()
    }
    plot_lines(out / "loss.png", curves, "step", "training loss, nats a token")
    return True


@tofu_group.command("run")
@click.option("--pair", type=_FILE, required=True, help="What `bench tofu prepare` made.")
@click.option("--data", type=_FILE, required=True, help="Folder of TOFU's files.")
@click.option("--base", help="The untouched model [the packaged SmolLM2].")
@click.option(
    "--spec",
    "specs",
    multiple=True,
    metavar="NAME=FILE",
    help="Another corruption to measure: a JSON file with the fields of a spec.",
)
@click.option("--questions", type=click.IntRange(1), help="Forget questions, and others [60].")
@click.option("--utility", type=click.IntRange(1), help="Questions to be kept, a kind [30].")
@click.option("--tokens", type=click.IntRange(1), help="Length of answers [32].")
@click.option(
    "--leak",
    type=click.Choice(["none", "quick", "full"]),
    default="none",
    show_default=True,
    help="leak@k: `quick` 20 samples of 50 questions, `full` also 100 samples of 20.",
)
@click.option("--full", is_flag=True, help="Take all questions.")
@click.option("--seed", type=int, help="Seed of samples and samplers.")
@click.option("--threads", type=int, help="Threads of torch.")
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@out_option
@bundle_option
@click.pass_context
def run(
    context: click.Context,
    /,
    pair: Path,
    data: Path,
    base: str | None,
    specs: tuple[str, ...],
    leak: str,
    full: bool,
    out: Path,
    **options: Any,
) -> None:
    """Measure full, retained, and full behind the guard, with every corruption named.

    The guard is measured by every route: corruption, and where all targets of the bundle have
    adapters, those alone and both together. Which route a target has of its own doesn't count.

    Answers come from served endpoints; likelihoods are computed on exactly the prompts that those
    would send. Interrupted, the same command goes on with the next system. Writes report.json,
    table.md and closeness.png.
    """
    from benchmarks.plots import check_plots, plot_closeness
    from benchmarks.report import Report, describe_versions, write_report
    from benchmarks.tofu_pair import read_pair
    from benchmarks.tofu_rows import load_pair_data
    from benchmarks.tofu_run import ECO_SPEC, Plan, drawn, run_systems
    from benchmarks.tofu_table import tofu_rows
    from guard.console import note, progress_display

    check_plots()
    session: Session = context.obj
    names = ("bundle", "key_file", "seed", "threads", "cache_dir")
    settings = session.load(model=base, **{name: options.pop(name) for name in names}).values
    found = read_pair(pair)
    store, key = session.existing_bundle()
    amount = _run_settings(leak, full, settings.seed, options)
    data_found = load_pair_data(data, found.authors.forget, found.authors.retain)
    with progress_display() as progress:
        plan = Plan(
            pair=pair,
            base=Path(session.model(progress)),
            store=store,
            key=key,
            specs={"ECO": ECO_SPEC, **dict(map(_spec, specs))},
            data=drawn(data_found, amount),
            settings=amount,
            threads=settings.threads,
        )
        lacking = plan.without_adapter()
        if lacking:
            note(_adapters_left_out(lacking))
        systems = run_systems(plan, out, progress)
    rows = tofu_rows(systems, plan.asked(), settings.seed)
    versions = describe_versions(bundle=str(store.current_version()))
    write_report(out, Report(command_text(context), settings.seed, tuple(rows), versions))
    plot_closeness(out / "closeness.png", rows, " - retained", CLOSE)
    _show_closeness(rows)
    note(f"{out}: report.json, table.md, closeness.png, systems/")


def _adapters_left_out(lacking: Sequence[str]) -> str:
    more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
    return (
        f"the adapter routes are left out: {', '.join(lacking[:3])}{more} of the bundle's targets "
        "have no adapter (`unlearn-guard learn adapter`)"
    )


def _run_settings(leak: str, full: bool, seed: int, options: dict[str, Any]) -> RunSettings:
    from benchmarks.tofu_run import RunSettings

    leaks: dict[str, tuple[tuple[int, int], ...]] = {
        "none": (),
        "quick": ((20, 50),),
        "full": ((20, 50), (100, 20)),
    }
    given = {name: value for name, value in options.items() if value is not None}
    if full:
        given |= {"questions": None, "utility": None}
    return RunSettings(leaks=leaks[leak], seed=seed, **given)


def _spec(text: str) -> tuple[str, CorruptionSpec]:
    """Read `NAME=FILE`: the fields of a spec."""
    import json

    from corruptions.spec import CorruptionSpec
    from guard.errors import ConfigError, DataError

    name, equals, file = text.partition("=")
    if not (name and equals and file):
        raise ConfigError(f"--spec {text}: give NAME=FILE")
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"can't be read: {error}", file=file) from error
    if not isinstance(values, dict):
        raise DataError("holds no corruption spec", file=file)
    return name, CorruptionSpec.from_dict(values)


def _show_closeness(rows: Sequence[Row]) -> None:
    from benchmarks.report import format_number
    from guard.console import print_table

    measures = list(dict.fromkeys(row.measure for row in rows if row.group != "all"))
    systems = list(dict.fromkeys(row.system for row in rows))
    values = {(row.system, row.measure, row.group): row.value for row in rows}
    groups = {row.measure: row.group for row in rows if row.group in ("forget", "aggregate")}
    lines = [
        (measure, *(format_number(values.get((s, measure, groups[measure]))) for s in systems))
        for measure in measures
        if measure in groups
    ]
    print_table("beside retained", ("measure", *systems), lines)


@tofu_group.command("surrogates")
@click.option("--pair", type=_FILE, required=True, help="What `bench tofu prepare` made.")
@click.option("--data", type=_FILE, required=True, help="Folder of TOFU's files.")
@click.option("--questions", type=click.IntRange(1), help="Forget questions [60].")
@click.option("--seed", type=int, help="Seed of sample and intervals.")
@click.option("--threads", type=int, help="Threads of torch.")
@out_option
@bundle_option
@click.pass_context
def surrogates(
    context: click.Context,
    /,
    pair: Path,
    data: Path,
    questions: int | None,
    out: Path,
    **options: Any,
) -> None:
    """Say how far the learner's surrogates are from the retained model's true values."""
    from benchmarks.report import Report, describe_versions, write_report
    from benchmarks.surrogates import surrogate_rows
    from benchmarks.tofu_measure import System
    from benchmarks.tofu_pair import read_pair
    from benchmarks.tofu_rows import load_pair_data, sample
    from guard.build import load_guard
    from guard.console import note, progress_display
    from guard.prompts import ModelPrompts
    from server.engines.embedded.model import EmbeddedModel

    session: Session = context.obj
    settings = session.load(**options).values
    found = read_pair(pair)
    store, key = session.existing_bundle()
    rows = load_pair_data(data, found.authors.forget, found.authors.retain).forget
    asked = sample(rows, questions or 60, settings.seed)
    with progress_display() as progress:
        progress("surrogates: loading", 0, 1)
        prompts = ModelPrompts.load(str(found.full))
        guard = load_guard(store=store, key=key, prompts=prompts, ledger=None)
        full, retained = (
            EmbeddedModel.load(one, threads=settings.threads)
            for one in (found.full, found.retained)
        )
        system = System("full", "corrupt", full, guard)
        figures = surrogate_rows(
            asked, retained, system, store.current(), key, settings.seed, progress
        )
    report = Report(command_text(context), settings.seed, tuple(figures), describe_versions())
    write_report(out, report)
    note(f"{out}: report.json, table.md")
