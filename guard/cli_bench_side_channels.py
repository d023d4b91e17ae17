"""`unlearn-guard bench side-channels`: what tells a flagged request but the text of its answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli_eval import command_text, out_option
from guard.cli_session import Session

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.report import Row

BEST_FILE = "best-features.json"


@click.command("side-channels")
@click.option("--guarded", metavar="URL", help="The guard, `equalise_s` off.")
@click.option("--equalised", metavar="URL", help="The guard with `equalise_s`.")
@click.option("--unguarded", metavar="URL", help="The engine without a guard: what prompts tell.")
@click.option(
    "--flagged-names",
    type=click.Path(path_type=Path),
    help="Names of a target, a line each [people of the example target].",
)
@click.option(
    "--sample",
    type=click.IntRange(20),
    default=200,
    show_default=True,
    help="Requests of flagged and of plain names, each, for every server.",
)
@click.option(
    "--tokens", type=click.IntRange(1), default=6, show_default=True, help="Length of answers."
)
@click.option("--model", help="The model that is served [the packaged SmolLM2].")
@click.option("--restart", is_flag=True, help="Throw away what was seen before.")
@click.option("--seed", type=int, help="Seed of requests, their order and the classifier.")
@out_option
@click.pass_context
def side_channels(
    context: click.Context,
    /,
    flagged_names: Path | None,
    sample: int,
    tokens: int,
    model: str | None,
    restart: bool,
    seed: int | None,
    out: Path,
    **urls: str | None,
) -> None:
    """Train a classifier to tell flagged from plain requests, without the answers' text.

    Names of a target and others, in pairs of as many tokens, are asked about in the same sentences,
    one request at a time, all servers in turn. Held-out areas under the curve are from status,
    headers, fields, usage and events alone, and with times. Nobody else may use the servers
    meanwhile. Interrupted, the same command goes on. Writes report.json, table.md, seen.jsonl and
    best-features.json.
    """
    from benchmarks.report import Report, describe_versions, make_folder, write_report
    from benchmarks.side_channels import (
        FLAGGED,
        FRAMES,
        PLAIN,
        ask_all,
        matched,
        open_log,
        plan,
    )
    from benchmarks.side_channels_rows import attack_rows
    from guard.console import progress_display
    from guard.errors import ConfigError

    session: Session = context.obj
    settings = session.load(seed=seed, model=model).values
    servers = {arm: url for arm, url in urls.items() if url is not None}
    if not servers:
        raise ConfigError("nobody to ask; give --guarded, --equalised or --unguarded URL")
    make_folder(out)
    flagged = FLAGGED if flagged_names is None else _names(flagged_names)
    with progress_display() as progress:
        prompts = session.prompts(progress)
        pairs = matched(
            flagged, PLAIN, lambda name: len(prompts.prompt_tokens(f"about {name}").ids)
        )
        if len(pairs) < 5:
            raise ConfigError(f"only {len(pairs)} names have a partner of as many tokens, of 5")
        asked = plan(list(servers), pairs, sample, settings.seed)
        facts = {"pairs": pairs, "frames": FRAMES, "tokens": tokens, "ids": [a.id for a in asked]}
        log = open_log(out, facts, restart)
        ask_all(asked, servers, prompts, tokens, log, progress)
    rows, best = attack_rows(asked, log.records, settings.seed)
    versions = describe_versions(pairs=str(len(pairs)), tokens=str(tokens))
    write_report(out, Report(command_text(context), settings.seed, tuple(rows), versions))
    _show(out, rows, best)


def _names(file: Path) -> list[str]:
    from guard.errors import DataError

    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"can't be read: {error}", file=str(file)) from error
    return [line.strip() for line in lines if line.strip()]


def _show(out: Path, rows: Sequence[Row], best: Mapping[str, Sequence[tuple[str, float]]]) -> None:
    import json

    from benchmarks.report import format_interval, format_number
    from benchmarks.side_channels_rows import verdict
    from guard.console import note, print_table
    from guard.disk import replace_file

    replace_file(out / BEST_FILE, (json.dumps(best, indent=1) + "\n").encode())
    lines = [
        (r.system, r.route, r.group, format_number(r.value), format_interval(r), r.n) for r in rows
    ]
    print_table("side channels", ("server", "from", "answers", "AUC", "95 %", "n"), lines)
    for line in verdict(rows):
        note(line)
    note(f"{out}: report.json, table.md, seen.jsonl, {BEST_FILE}")
