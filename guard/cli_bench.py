"""`unlearn-guard bench …`: what the detector's parts are worth, and how long a decision takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli_bench_continual import continual
from guard.cli_bench_tofu import tofu_group
from guard.cli_eval import command_text, out_option
from guard.cli_session import Session

if TYPE_CHECKING:
    from benchmarks.labelled import Example
    from benchmarks.latency import Subject
    from benchmarks.report import Row

PROMPTS = 300
"""Prompts timed of each file."""

_FILE = click.Path(path_type=Path)


@click.group("bench")
def bench_group() -> None:
    """Measure what parts are worth and what they cost."""


@bench_group.command("detection")
@click.option(
    "--data", type=_FILE, required=True, help="Folder with tofu/ and general/general_prompts.jsonl."
)
@click.option(
    "--targets",
    type=click.Choice(["joint", "each"]),
    default="each",
    show_default=True,
    help="All authors as one target, or a target for each.",
)
@click.option("--retain", is_flag=True, help="Learn with TOFU's retain questions.")
@click.option(
    "--part", multiple=True, metavar="NAME", help="Leave out this part only; all in turn otherwise."
)
@click.option("--benign", type=_FILE, help="General prompts [the benign set that ships].")
@click.option(
    "--generated",
    type=click.IntRange(1),
    help="Generated targets that a fusion without some evidence is fitted on [50].",
)
@click.option("--seed", type=int, help="Seed of learning and of the texts made.")
@click.option("--threads", type=int, help="Threads of the encoder.")
@out_option
@click.pass_context
def detection(
    context: click.Context,
    /,
    data: Path,
    targets: str,
    retain: bool,
    part: tuple[str, ...],
    benign: Path | None,
    generated: int | None,
    seed: int | None,
    threads: int | None,
    out: Path,
) -> None:
    """Judge the detector without each of its parts, on TOFU's forget set.

    Every system is learned and calibrated anew, at the same false-positive budget. Writes
    report.json and table.md.
    """
    from benchmarks.ablation import GENERATED, Plan, run_ablation
    from benchmarks.report import Report, write_report
    from benchmarks.tofu import load_tofu
    from classifiers.benign import load_benign
    from guard.console import note, progress_display
    from guard.rows import read_texts

    _check_parts(part)
    session: Session = context.obj
    settings = session.load(seed=seed, threads=threads).values
    loaded = load_tofu(data, settings.seed)
    general = load_benign() if benign is None else read_texts(benign)
    plan = Plan(
        targets == "joint",
        retain,
        settings.fpr_budget,
        settings.seed,
        settings.threads,
        generated or GENERATED,
    )
    with progress_display() as progress:
        rows = run_ablation(loaded, general, part, plan, progress)
    write_report(out, Report(command_text(context), settings.seed, tuple(rows)))
    _show("ablation", rows)
    note(f"{out}: report.json, table.md")


@bench_group.command("latency")
@click.option(
    "--bundle",
    "bundles",
    type=_FILE,
    multiple=True,
    required=True,
    help="A bundle; ratios are to the first.",
)
@click.option("--prompts", required=True, metavar="FILE[:FIELD]", help="Benign texts, JSON lines.")
@click.option("--positives", metavar="FILE[:FIELD]", help="Texts to flag, mixed with them.")
@click.option("--rounds", type=click.IntRange(2, 10_000), help="Times each prompt is read [10].")
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=PROMPTS,
    show_default=True,
    help="Prompts to draw from each file.",
)
@click.option("--key-file", type=click.Path(), help="File of the key, if all bundles share one.")
@click.option("--seed", type=int, help="Seed of samples and intervals.")
@out_option
@click.pass_context
def latency(
    context: click.Context,
    /,
    bundles: tuple[Path, ...],
    prompts: str,
    positives: str | None,
    rounds: int | None,
    sample: int,
    key_file: str | None,
    seed: int | None,
    out: Path,
) -> None:
    """Time decisions on prompts of about 32 tokens, one at a time, on one thread.

    Bundles are read in turn, prompt by prompt. Verdicts are not remembered. Writes report.json and
    table.md.
    """
    from benchmarks.latency import ROUNDS, latency_rows, time_bundles
    from benchmarks.report import Report, describe_versions, write_report
    from guard.console import note, progress_display

    session: Session = context.obj
    settings = session.load(key_file=key_file, seed=seed).values
    sources = [prompts] if positives is None else [prompts, positives]
    with progress_display() as progress:
        progress("latency: bundles", 0, len(bundles))
        subjects: list[Subject] = []
        for number, bundle in enumerate(bundles, start=1):
            earlier = [one.name for one in subjects]
            name = bundle.name if bundle.name not in earlier else f"{bundle.name}-{number}"
            subjects.append(_subject(session, bundle, name))
            progress("latency: bundles", number, len(bundles))
        examples = _examples(sources, subjects[0], sample, settings.seed)
        found = time_bundles(subjects, examples, rounds or ROUNDS, progress)
    files = [example.groups[0] for example in examples]
    rows = latency_rows(found, files, settings.seed)
    counts = {one.name: len(one.detector.targets) for one in subjects}
    sizes = {name: f"{n} target{'' if n == 1 else 's'}" for name, n in counts.items()}
    report = Report(command_text(context), settings.seed, tuple(rows), describe_versions(**sizes))
    write_report(out, report)
    _show("latency", rows)
    note(f"{out}: report.json, table.md")


def _check_parts(names: Sequence[str]) -> None:
    from benchmarks.ablation import PART_NAMES
    from guard.errors import ConfigError

    unknown = sorted(set(names) - set(PART_NAMES))
    if unknown:
        raise ConfigError(f"--part {unknown[0]}: no such part; there are {', '.join(PART_NAMES)}")


def _subject(session: Session, bundle: Path, name: str) -> Subject:
    """Load a bundle with its own key, or with the one that was given."""
    from benchmarks.latency import Subject, forgetful
    from guard.build import load_guard
    from guard.bundle import BundleStore
    from guard.keys import GuardKey, default_key_file

    given = session.settings.key or session.settings.key_file
    key = session.key() if given else GuardKey.load_or_create(default_key_file(bundle))
    store = BundleStore(bundle, key)
    guard = load_guard(store=store, key=key, prompts=None, ledger=None, threads=1)
    return Subject(name, forgetful(guard), guard)


def _examples(sources: Sequence[str], subject: Subject, sample: int, seed: int) -> list[Example]:
    from benchmarks.labelled import load_examples, parse_source, stratified
    from benchmarks.latency import about_tokens, token_places

    found: list[Example] = []
    for number, spec in enumerate(sources):
        loaded = load_examples(parse_source(spec)).examples
        fitting = about_tokens(loaded, token_places(subject.detector))
        found += stratified(fitting, sample, (seed, number))
    return found


def _show(title: str, rows: Sequence[Row]) -> None:
    from benchmarks.report import format_interval, format_number
    from guard.console import print_table

    columns = ("system", "route", "group", "measure", "value", "95 %", "n")
    lines = [
        (r.system, r.route, r.group, r.measure, format_number(r.value), format_interval(r), r.n)
        for r in rows
    ]
    print_table(title, columns, lines)


bench_group.add_command(tofu_group)
bench_group.add_command(continual)
