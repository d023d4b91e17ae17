"""`unlearn-guard bench outputs`: how often the output guard asks for an answer again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_session import Session

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.output_checks import Checked, Exchange, PutBack
    from benchmarks.report import Row
    from guard.pipeline import Guard
    from guard.prompts import ModelPrompts
    from guard.types import Progress

ERRORS_FILE = "errors.jsonl"
_FILE = click.Path(path_type=Path)


@click.command("outputs")
@click.option("--bundle", "bundles", type=_FILE, multiple=True, required=True, help="A bundle.")
@click.option(
    "--answers",
    type=_FILE,
    multiple=True,
    help="Ordinary questions with answers, JSON lines; answers of under four words are left out.",
)
@click.option("--questions", type=_FILE, help="Ordinary questions that --url is asked.")
@click.option("--url", help="An unguarded server: its own answers are read too.")
@click.option("--forget", type=_FILE, help="What the bundle forgets, as questions with answers.")
@click.option(
    "--sample",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Answers to draw from each file.",
)
@click.option(
    "--asked", type=click.IntRange(1), default=300, show_default=True, help="Questions for --url."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=96, show_default=True, help="Length of answers."
)
@click.option("--model", help="The model whose tokens a stream has [the packaged SmolLM2].")
@click.option("--key-file", type=click.Path(), help="File of the key, if all bundles share one.")
@click.option("--restart", is_flag=True, help="Throw away the answers that --url gave.")
@click.option("--seed", type=int, help="Seed of the samples.")
@out_option
@click.pass_context
def outputs(
    context: click.Context,
    /,
    bundles: tuple[Path, ...],
    answers: tuple[Path, ...],
    questions: Path | None,
    url: str | None,
    forget: Path | None,
    sample: int,
    asked: int,
    tokens: int,
    model: str | None,
    key_file: str | None,
    restart: bool,
    seed: int | None,
    out: Path,
) -> None:
    """Count the answers that the output guard would ask the engine for again.

    Ordinary answers (--answers; those of --url to --questions) should not be, whole or streamed;
    answers that tell of a target (--forget), given to questions that name nothing, should. With
    --forget it also reads them as an engine says them that read generic names. Writes report.json,
    table.md and errors.jsonl, which holds the answers that were judged wrong. Interrupted, the same
    command keeps the answers of --url.
    """
    from benchmarks.output_checks import load_exchanges, nameless
    from benchmarks.output_checks_rows import FALSE, RECALL, checked_rows, put_back_rows, records
    from benchmarks.report import make_folder
    from guard.console import progress_display

    session: Session = context.obj
    settings = session.load(seed=seed, model=model, key_file=key_file).values
    _check_inputs(answers, questions, url, forget)
    make_folder(out)
    ordinary = [one for file in answers for one in load_exchanges(file, sample, settings.seed)]
    told = [] if forget is None else load_exchanges(forget, sample, settings.seed)
    rows: list[Row] = []
    wrong: list[dict[str, Any]] = []
    with progress_display() as progress:
        if url is not None and questions is not None:
            drawn = _Asked(questions, asked, tokens, settings.seed, restart)
            ordinary += _ask(url, drawn, out, progress)
        prompts = session.prompts(progress)
        for bundle in bundles:
            guard = _guard(session, bundle, prompts)
            for measure, given in ((FALSE, ordinary), (RECALL, nameless(told))):
                if given:
                    found = _checked(guard, prompts, given, f"{bundle.name}: {measure}", progress)
                    rows += checked_rows(bundle.name, measure, found)
                    wrong += records(bundle.name, measure, found)
            if told:
                rows += put_back_rows(bundle.name, _put_back(guard, told, bundle.name, progress))
    _report(out, rows, wrong, command_text(context), settings.seed)


def _check_inputs(
    answers: tuple[Path, ...], questions: Path | None, url: str | None, forget: Path | None
) -> None:
    from guard.errors import ConfigError

    if (questions is None) != (url is None):
        raise ConfigError("--questions and --url go together: questions, and whom to ask them")
    if not answers and url is None and forget is None:
        raise ConfigError("nothing to read; give --answers, --questions with --url, or --forget")


class _Asked:
    """What an unguarded server is asked."""

    def __init__(self, file: Path, count: int, tokens: int, seed: int, restart: bool) -> None:
        self.file, self.count, self.tokens = file, count, tokens
        self.seed, self.restart = seed, restart


def _ask(url: str, drawn: _Asked, out: Path, progress: Progress) -> list[Exchange]:
    import openai

    from benchmarks.leak import Endpoint
    from benchmarks.output_checks import ask_model, load_questions
    from guard.errors import EngineUnavailableError

    questions = load_questions(drawn.file, drawn.count, drawn.seed)
    try:
        endpoint = Endpoint.connect(url, None, stream=False, concurrency=1)
        with endpoint.client:
            return ask_model(endpoint, questions, drawn.tokens, out, progress, drawn.restart)
    except openai.OpenAIError as error:
        raise EngineUnavailableError(
            f"--url {url}: {error}; the answers so far are kept, and the same command goes on"
        ) from error


def _guard(session: Session, bundle: Path, prompts: ModelPrompts) -> Guard:
    """Load a bundle with its own key, or with the one that was given."""
    from guard.build import load_guard
    from guard.bundle import BundleStore
    from guard.keys import GuardKey, default_key_file

    given = session.settings.key or session.settings.key_file
    key = session.key() if given else GuardKey.load_or_create(default_key_file(bundle))
    store = BundleStore(bundle, key)
    return load_guard(store=store, key=key, prompts=prompts, ledger=None, threads=1)


def _checked(
    guard: Guard,
    prompts: ModelPrompts,
    exchanges: Sequence[Exchange],
    what: str,
    progress: Progress,
) -> list[Checked]:
    from benchmarks.output_checks import check

    found = []
    for number, exchange in enumerate(exchanges, start=1):
        found.append(check(guard, prompts, exchange))
        progress(what, number, len(exchanges))
    return found


def _put_back(
    guard: Guard, told: Sequence[Exchange], name: str, progress: Progress
) -> list[PutBack]:
    from benchmarks.output_checks import check_put_back

    found = []
    for number, exchange in enumerate(told, start=1):
        if (one := check_put_back(guard, exchange)) is not None:
            found.append(one)
        progress(f"{name}: names put back", number, len(told))
    return found


def _report(
    out: Path, rows: Sequence[Row], wrong: Sequence[dict[str, Any]], command: str, seed: int
) -> None:
    import json

    from benchmarks.output_checks_rows import verdict
    from benchmarks.report import (
        Report,
        describe_versions,
        format_interval,
        format_number,
        write_report,
    )
    from guard.console import note, print_table
    from guard.disk import replace_file

    write_report(out, Report(command, seed, tuple(rows), describe_versions()))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in wrong)
    replace_file(out / ERRORS_FILE, text.encode())
    lines = [
        (r.system, r.route, r.measure, r.group, format_number(r.value), format_interval(r), r.n)
        for r in rows
    ]
    print_table("outputs", ("bundle", "route", "measure", "answers", "value", "95 %", "n"), lines)
    for line in verdict(rows):
        note(line)
    note(f"{out}: report.json, table.md, {ERRORS_FILE}")
