"""The command line: `unlearn-guard`. The composition root, and the one place of exit codes.

    0 done   1 failed   2 bad input   3 self-check failed   130 interrupted; run it again

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version

import click

from guard.cli_admin import bundle_group, config, doctor, ledger_group, model_group
from guard.cli_bench import bench_group
from guard.cli_bench_adapters import losses
from guard.cli_bench_leaks import leaks
from guard.cli_bench_outputs import outputs
from guard.cli_bench_serve import serve_bench
from guard.cli_bench_side_channels import side_channels
from guard.cli_chat import chat
from guard.cli_decide import decide
from guard.cli_eval import eval_group
from guard.cli_keys import key_group
from guard.cli_learn import learn_group
from guard.cli_learn_adapter import adapter
from guard.cli_serve import engine, serve
from guard.cli_session import Session
from guard.cli_target import target_group
from guard.errors import (
    BundleNotFoundError,
    ConfigError,
    DataError,
    GuardError,
    IncompatibleArtifactError,
    SelfCheckError,
    TargetExistsError,
    TargetNotFoundError,
)

FAILED, BAD_INPUT, SELF_CHECK_FAILED, INTERRUPTED = 1, 2, 3, 130

_BAD_INPUT = (
    BundleNotFoundError,
    ConfigError,
    DataError,
    IncompatibleArtifactError,
    TargetExistsError,
    TargetNotFoundError,
)


def _version() -> str:
    try:
        return distribution_version("unlearn-guard")
    except PackageNotFoundError:  # run from a checkout that was not installed
        return "unknown"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--config",
    type=click.Path(dir_okay=False),
    help="YAML settings file [UNLEARN_GUARD_CONFIG].",
)
@click.option("-v", "--verbose", count=True, help="Log more; twice adds tracebacks.")
@click.version_option(_version(), prog_name="unlearn-guard")
@click.pass_context
def cli(context: click.Context, config: str | None, verbose: int) -> None:
    """Make a served language model behave as if it had never seen what it was asked to forget.

    Every setting can be a flag, an UNLEARN_GUARD_… variable or a line of one YAML file, in this
    order; `unlearn-guard config` shows what counts.
    """
    context.obj = Session(config, verbose)


for _command in (
    target_group,
    serve,
    chat,
    decide,
    learn_group,
    eval_group,
    bench_group,
    doctor,
    config,
    bundle_group,
    ledger_group,
    key_group,
    model_group,
    engine,
):
    cli.add_command(_command)
learn_group.add_command(adapter)
bench_group.add_command(leaks)
bench_group.add_command(losses)
bench_group.add_command(outputs)
bench_group.add_command(serve_bench)
bench_group.add_command(side_channels)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on standard error."""
    try:
        # Not cli.main(): that turns a broken pipe into a failure.
        words = list(sys.argv[1:] if arguments is None else arguments)
        with cli.make_context("unlearn-guard", words) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, EOFError, click.Abort):
        _complain("interrupted: nothing is half done; run the same command again to resume")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has enough (`| head`). Python would complain at exit once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> int:
    if logging.getLogger().isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    if isinstance(error, GuardError):
        _complain(f"error: {error}")
    elif isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        _complain(f"error: {error.strerror or error}{place}")
    else:
        _complain(
            f"internal error: {type(error).__name__}: {error} (`unlearn-guard -vv …` shows where)"
        )
    return exit_code(error)


def exit_code(error: BaseException) -> int:
    """Return the exit code that stands for an error."""
    if isinstance(error, SelfCheckError):
        return SELF_CHECK_FAILED
    return BAD_INPUT if isinstance(error, _BAD_INPUT) else FAILED


def _complain(message: str) -> None:
    with suppress(OSError):  # nobody may read standard error any more
        click.echo(" ".join(message.splitlines()), err=True)
