"""`unlearn-guard eval …`: how well a bundle does, with a report for programs and for people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from guard.cli_session import Session, bundle_option

if TYPE_CHECKING:
    from benchmarks.curves import Scorer
    from benchmarks.labelled import Example, Loaded
    from benchmarks.parts import Part
    from benchmarks.report import Row
    from benchmarks.run_log import RunLog
    from guard.bundle import Bundle
    from guard.keys import GuardKey
    from guard.types import Progress

Command = TypeVar("Command", bound=Callable[..., Any])

SAMPLE = 4000
"""Texts to each side of each part; with wrappers, about ten minutes on two cores."""

WORST = 15
_FILE = click.Path(path_type=Path)


def out_option(command: Command) -> Command:
    """Add `--out`, the folder that a command's report goes to."""
    return click.option(
        "--out", type=_FILE, required=True, help="Folder for report.json, table.md and plots."
    )(command)


def command_text(context: click.Context) -> str:
    """Return what was asked for, as it stands in reports: options given, no folders of ours."""
    from benchmarks.report import command_line

    words = context.command_path.split()
    for parameter in context.command.params:
        given = parameter.name and context.get_parameter_source(parameter.name)
        if given != click.core.ParameterSource.COMMANDLINE:
            continue
        value = context.params.get(str(parameter.name))
        for one in value if isinstance(value, tuple) else (value,):
            words += _words(parameter, one)
    return command_line(["unlearn-guard", *words[1:]])


@dataclass(frozen=True, slots=True)
class _Choice:
    """What is evaluated: the options of `eval detection` that say so."""

    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    attacks: Path | None
    context: tuple[int, ...]
    among: tuple[int, ...]
    group_by: tuple[str, ...]
    sample: int | None
    seed: int


@dataclass(frozen=True, slots=True)
class _Work:
    """What is decided on, and where it is kept."""

    parts: Sequence[Part]
    key: GuardKey
    seed: int
    out: Path
    restart: bool
    progress: Progress

    def digest(self, data: bytes) -> str:
        """Return a digest that only holders of the key can guess at."""
        return self.key.digest("eval", data)

    def log(self, name: str, **more: Any) -> RunLog:
        """Open a log of these texts; `more` is what else its records rest on."""
        from benchmarks.eval_detection import run_digest
        from benchmarks.report import make_folder
        from benchmarks.run_log import RunLog

        make_folder(self.out)
        run = run_digest(self.parts, self.digest, seed=self.seed, **more)
        return RunLog(self.out / name, run, self.restart)


@click.group("eval")
def eval_group() -> None:
    """Measure how well a bundle does."""


@eval_group.command("detection")
@click.option(
    "--positives",
    required=True,
    multiple=True,
    metavar="FILE[:FIELD]",
    help="Texts to flag, JSON lines; FIELD holds the text [text, prompt, question, …].",
)
@click.option(
    "--negatives",
    required=True,
    multiple=True,
    metavar="FILE[:FIELD]",
    help="Texts to leave alone.",
)
@click.option("--attacks", type=_FILE, help="Attack wrappers to put both kinds of texts in.")
@click.option(
    "--context",
    type=click.IntRange(1, 100_000),
    multiple=True,
    help="Also judge texts beside so many tokens of benign text.",
)
@click.option(
    "--among",
    type=click.IntRange(1, 1000),
    multiple=True,
    help="Also judge questions among so many benign ones.",
)
@click.option(
    "--group-by", multiple=True, metavar="KEY", help="More keys of rows that make groups."
)
@click.option(
    "--sample",
    type=click.IntRange(1),
    help=f"Texts to draw to each side, by group [{SAMPLE}].",
)
@click.option("--full", is_flag=True, help="Judge all; stopped, the same command goes on.")
@click.option("--per-target", is_flag=True, help="Also by the target that a row names.")
@click.option(
    "--also",
    multiple=True,
    type=click.Choice(["eco", "o3"]),
    help="Also fit this paper's detector on --forget, and judge it.",
)
@click.option("--forget", type=_FILE, help="For --also: what to forget, JSON lines.")
@click.option("--retain", type=_FILE, help="For --also: what to keep [the benign set that ships].")
@click.option("--restart", is_flag=True, help="Forget what an earlier run in --out decided.")
@click.option("--seed", type=int, help="Seed of samples, wrappers and intervals.")
@click.option("--threads", type=int, help="Threads of the encoder.")
@out_option
@bundle_option
@click.pass_context
def detection(
    context: click.Context,
    /,
    out: Path,
    sample: int | None,
    full: bool,
    per_target: bool,
    also: tuple[str, ...],
    forget: Path | None,
    retain: Path | None,
    restart: bool,
    **options: Any,
) -> None:
    """Measure recall and false alarms of a bundle's detector, by category and attack.

    Texts go the way of real requests. Rows without the field are skipped and counted. Writes
    report.json, table.md, roc.png, histogram.png, fpr.png and fnr.png.
    """
    from benchmarks.baselines import check_baselines
    from benchmarks.eval_detection import compare_parts, draw, part_rows, skipped_rows, target_rows
    from benchmarks.plots import check_plots
    from benchmarks.report import Report, describe_versions, write_report
    from guard.console import note, progress_display
    from guard.errors import ConfigError

    session: Session = context.obj
    flags = {name: options.pop(name) for name in ("bundle", "key_file", "threads", "seed")}
    settings = session.load(**flags).values
    if full and sample is not None:
        raise ConfigError("--full judges all and --sample a part: give one of them")
    if also and forget is None:
        raise ConfigError("--also needs --forget, the file to fit those detectors on")
    check_plots()
    if also:
        check_baselines()
    count = None if full else sample or SAMPLE
    choice = _Choice(sample=count, seed=settings.seed, **options)
    store, key = session.existing_bundle()
    bundle = store.current()
    loaded, parts = _parts(choice, bundle)
    with progress_display() as progress:
        work = _Work(parts, key, choice.seed, out, restart, progress)
        scorers = _others(work, also, forget, retain)
        judged = _judge(work, session, bundle)
        rows = skipped_rows([*loaded[0], *loaded[1]])
        for part in parts:
            rows += part_rows(part, judged, choice.seed)
            rows += target_rows(part, judged) if per_target else []
        rows += compare_parts(scorers, parts, choice.seed)
    versions = describe_versions(bundle=str(bundle.version))
    report = Report(command_text(context), choice.seed, tuple(rows), versions)
    write_report(out, report)
    draw(out, parts, judged, rows, scorers)
    _show(rows, {part.name for part in parts})
    note(f"{out}: report.json, table.md, roc.png, histogram.png, fpr.png, fnr.png")


def _parts(choice: _Choice, bundle: Bundle) -> tuple[tuple[list[Loaded], list[Loaded]], list[Part]]:
    """Read all files and put the texts together."""
    from benchmarks import parts
    from benchmarks.attacks import load_templates
    from benchmarks.labelled import GROUP_KEYS, load_examples, parse_source

    keys = tuple(dict.fromkeys([*GROUP_KEYS, *choice.group_by]))
    loaded = tuple(
        [load_examples(parse_source(spec), keys) for spec in specs]
        for specs in (choice.positives, choice.negatives)
    )
    above, below = ([e for one in side for e in one.examples] for side in loaded)
    rest = (choice.sample, choice.seed)
    found = [parts.plain_part(above, below, *rest)]
    if choice.attacks is not None:
        found.append(parts.attack_part(above, below, load_templates(choice.attacks), *rest))
    for tokens in choice.context:
        found.append(parts.context_part(above, below, tokens, _cut(bundle), *rest))
    found += [parts.among_part(above, below, others, *rest) for others in choice.among]
    return (loaded[0], loaded[1]), found


def _cut(bundle: Bundle) -> Callable[[str, int], str | None]:
    """Return what cuts a text after so many tokens of the bundle's encoder."""
    from tokenizers import Tokenizer

    from guard.build import ENCODER_DIR

    tokenizer = Tokenizer.from_file(str(bundle.path(ENCODER_DIR) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def cut(text: str, tokens: int) -> str | None:
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        return text[: offsets[tokens - 1][1]] if len(offsets) >= tokens else None

    return cut


def _judge(work: _Work, session: Session, bundle: Bundle) -> dict[Example, Any]:
    """Decide on all texts by the bundle's guard."""
    from benchmarks.eval_detection import DECISIONS_FILE, decide_parts
    from guard.build import load_guard

    log = work.log(DECISIONS_FILE, manifest=bundle.manifest.model_dump_json())
    guard = load_guard(
        store=session.store(work.key),
        key=work.key,
        prompts=None,
        ledger=None,
        threads=session.settings.threads,
    )
    return decide_parts(guard, work.parts, log, work.digest, work.progress)


def _others(
    work: _Work, names: Sequence[str], forget: Path | None, retain: Path | None
) -> dict[str, Scorer]:
    """Return the papers' detectors, fitted when first asked; their scores are kept in `out`."""
    if not names or forget is None:
        return {}
    from benchmarks.baselines import fitted_when_asked
    from benchmarks.eval_detection import resumed
    from classifiers.benign import load_benign
    from guard.rows import read_rows

    rows = [row.prompt for row in read_rows(forget)]
    others = load_benign() if retain is None else [row.prompt for row in read_rows(retain)]
    scorers: dict[str, Scorer] = {}
    for name in dict.fromkeys(names):
        log = work.log(f"scores-{name}.jsonl", system=name, forget=rows, others=others)
        score = fitted_when_asked(name, rows, others, work.seed, work.progress)
        scorers[name] = resumed(score, log, work.digest, name, work.progress)
    return scorers


def _show(rows: Sequence[Row], parts: set[str]) -> None:
    """Print the figures of whole parts, and of the groups that do worst."""
    from benchmarks.report import format_interval, format_number
    from guard.console import print_table

    def lines(chosen: Sequence[Row]) -> list[tuple[object, ...]]:
        return [
            (r.system, r.group, r.measure, format_number(r.value), format_interval(r), r.n)
            for r in chosen
        ]

    columns = ("system", "group", "measure", "value", "95 %", "n")
    print_table("detection", columns, lines([row for row in rows if row.group in parts]))
    for measure in ("fnr", "fpr"):
        groups = [r for r in rows if r.measure == measure and r.group not in parts and r.value]
        groups.sort(key=lambda row: (-(row.ci_low or 0.0), row.group))
        if groups:
            title = f"{measure}: surely worst groups ({len(groups)} are above 0, table.md has all)"
            print_table(title, columns, lines(groups[:WORST]))


def _words(parameter: click.Parameter, value: object) -> list[str]:
    if not isinstance(parameter, click.Option):
        return [str(value)]
    if parameter.is_flag:
        return [parameter.opts[0]] if value else []
    return [parameter.opts[0], str(value)]
