"""`unlearn-guard decide`: what `serve` would decide, for a file of requests."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import click

from guard.cli_session import Session, bundle_option

if TYPE_CHECKING:
    from guard.bundle import Bundle
    from guard.prompts import ModelPrompts
    from guard.types import Progress

log = logging.getLogger(__name__)


@click.command("decide")
@click.option("--in", "source", required=True, help="File of requests; - is standard input.")
@click.option("--out", type=click.Path(path_type=Path), help="Where to write [standard output].")
@click.option("--model", help="Directory or Hugging Face id, to read token-id prompts.")
@click.option("--threads", type=int, help="Threads of the encoder.")
@bundle_option
@click.pass_obj
def decide(session: Session, /, source: str, out: Path | None, **flags: Any) -> None:
    """Say for each line what `serve` would decide; one JSON line each, in the same order.

    A line is {"messages"}, {"prompt"}, {"text"} or {"endpoint", "body"}, with an "id" if you
    like. What can't be accepted gives {"id", "error"}, as the server would answer 400.
    """
    from guard.build import load_guard
    from guard.console import note, progress_display
    from guard.decide import decide_lines

    settings = session.load(**flags).values
    store, key = session.existing_bundle()
    with ExitStack() as stack:
        file, total = stack.enter_context(_opened(source))
        output = stack.enter_context(_output(source, out))
        progress = stack.enter_context(progress_display())
        prompts = _prompts(session, store.current(), progress)
        guard = load_guard(
            store=store,
            key=key,
            prompts=prompts,
            ledger=None,
            threads=settings.threads,
            context=settings.context,
        )
        done = failed = flagged = 0
        for row in decide_lines(guard, file, settings.max_body_bytes, settings.images):
            output.write(json.dumps(row).encode() + b"\n")
            output.flush()
            done, failed = done + 1, failed + ("error" in row)
            flagged += bool(row.get("flagged"))
            progress("decide", done, total)
    note(f"{done} lines: {flagged} flagged, {failed} not acceptable")


def _prompts(session: Session, bundle: Bundle, progress: Progress) -> ModelPrompts | None:
    """Open the model's files, to read token-id prompts; none are needed for anything else."""
    from guard.build import check_model
    from guard.errors import ArtifactError

    if session.settings.model is not None:
        return session.prompts(progress)
    try:
        prompts = session.prompts(progress)
        check_model(bundle, prompts.fingerprint)
        return prompts
    except ArtifactError as error:
        log.info("token-id prompts can't be read, --model is needed for them: %s", error)
        return None


@contextmanager
def _opened(source: str) -> Iterator[tuple[Iterable[bytes], int]]:
    """Open the input; yields its lines and how many there are, 0 if nobody knows."""
    if source == "-":
        yield sys.stdin.buffer, 0
        return
    from guard.errors import DataError

    try:
        with open(source, "rb") as file:
            total = sum(1 for _ in file) if file.seekable() else 0
            if total:
                file.seek(0)
            yield file, total
    except OSError as error:
        if error.filename != source:
            raise
        raise DataError(f"can't be read: {error.strerror}", file=source) from error


@contextmanager
def _output(source: str, out: Path | None) -> Iterator[BinaryIO]:
    if out is None:
        yield sys.stdout.buffer
        return
    from guard.errors import ConfigError

    if source != "-" and out.exists() and out.samefile(source):
        raise ConfigError(f"--out {out} is the file that --in reads: choose another")
    try:
        file = out.open("wb")
    except OSError as error:
        raise ConfigError(f"--out {out} can't be written: {error.strerror}") from error
    with file:
        yield file
