"""`unlearn-guard bench losses`: what each loss of adapter training leaves behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_learn import load_model, weights_digest
from guard.cli_session import Session, bundle_option

_FILE = click.Path(path_type=Path)


@click.command("losses")
@click.option("--pair", type=_FILE, required=True, help="What `bench tofu prepare` made.")
@click.option("--data", type=_FILE, required=True, help="Folder of TOFU's files.")
@click.option("--target", required=True, help="A target of the bundle: one author of the pair.")
@click.option("--forget", type=_FILE, required=True, help="Its forget set, as for `target add`.")
@click.option("--author", type=int, required=True, help="The author's number.")
@click.option(
    "--loss", "losses", multiple=True, metavar="NAME[@RATE]", help="May be repeated [all]."
)
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option("--threads", type=int, help="Threads of torch.")
@out_option
@bundle_option
@click.pass_context
def losses(
    context: click.Context,
    /,
    pair: Path,
    data: Path,
    target: str,
    forget: Path,
    author: int,
    losses: tuple[str, ...],
    epochs: int,
    out: Path,
    **flags: Any,
) -> None:
    """Train an adapter by every loss on one author, and measure it beside the retained model.

    Interrupted, the same command goes on where it stopped. Writes report.json and table.md.
    """
    import adapters.matched  # noqa: F401  (registers its loss)
    from adapters.unlearning import LOSSES
    from benchmarks.adapter_losses import Subject, compare_losses, loss_rows
    from benchmarks.report import Report, describe_versions, format_number, write_report
    from benchmarks.tofu_pair import read_pair
    from benchmarks.tofu_rows import load_pair_data
    from guard.adapter_request import AdapterRequest
    from guard.adapter_training import train_adapter
    from guard.console import note, print_table, progress_display
    from guard.learn_inputs import entry_of, make_prompter

    session: Session = context.obj
    found = read_pair(pair)
    place = found.root / "full"
    settings = session.load(model=str(place), **flags).values
    store, key = session.existing_bundle()
    asked = [_loss(text) for text in losses or LOSSES]
    questions = load_pair_data(data, found.authors.forget, found.authors.retain)
    subject = Subject([q for q in questions.forget if q.author == author], questions.others)
    out.mkdir(parents=True, exist_ok=True)
    request = AdapterRequest(
        target,
        forget,
        out,
        epochs=epochs,
        orthogonality="none",
        prepared=out / "prepared",
        seed=settings.seed,
        apply=False,
    )
    with progress_display() as progress:
        prompts, bundle = session.prompts(progress), store.current()
        entry = entry_of(bundle, target)
        prompter = make_prompter(target, bundle, entry, key, prompts, settings.threads)
        model, identity = load_model(place, settings.threads), weights_digest(place)
        results = compare_losses(
            asked,
            request,
            subject,
            model,
            lambda: load_model(found.root / "retained", settings.threads),
            lambda one: (
                train_adapter(
                    one,
                    bundle=bundle,
                    key=key,
                    prompts=prompts,
                    model=model,
                    identity=identity,
                    prompter=prompter,
                    progress=progress,
                ).use
            ),
            out,
            progress,
        )
    rows = loss_rows(results, len(subject.forget))
    report = Report(command_text(context), settings.seed, tuple(rows), describe_versions())
    write_report(out, report)
    columns = list(results["full"])
    table = [
        (name, *(format_number(figures.get(one)) for one in columns))
        for name, figures in results.items()
    ]
    print_table("losses", ("system", *columns), table)
    note(f"{out}: report.json, table.md")


def _loss(text: str) -> tuple[str, float]:
    """Read `NAME@RATE`; without a rate the default of `learn adapter`."""
    from adapters.unlearning import LOSSES
    from guard.adapter_request import RATE
    from guard.errors import ConfigError

    name, at, rate = text.partition("@")
    LOSSES[name]  # refuses an unknown one, before anything is trained
    try:
        return name, float(rate) if at else RATE
    except ValueError:
        raise ConfigError(f"--loss {text}: expected NAME or NAME@RATE, e.g. npo@1e-3") from None
