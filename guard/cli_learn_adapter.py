"""`unlearn-guard learn adapter`: train a target's unlearning LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_learn import load_model, weights_digest
from guard.cli_session import Session, bundle_option

if TYPE_CHECKING:
    from guard.adapter_request import AdapterRequest
    from guard.learn_adapter import AdapterResult

_FILE = click.Path(path_type=Path)
_ROUTES = ["auto", "corrupt", "adapt", "corrupt+adapt", "refuse"]


@click.command("adapter")
@click.option("--target", required=True, help="A target of the bundle.")
@click.option("--forget", type=_FILE, required=True, help="Its forget set, as for `target add`.")
@click.option("--retain", type=_FILE, help="Neighbours to leave alone; by default none is needed.")
@click.option("--retain-weight", type=float, default=1.0, show_default=True)
@click.option(
    "--loss",
    default="matched",
    show_default=True,
    help="What training makes small; docs/adapters.md lists all.",
)
@click.option(
    "--loss-option",
    "loss_options",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the loss, e.g. beta=0.1; may be repeated.",
)
@click.option("--rank", type=click.IntRange(1, 256), default=8, show_default=True)
@click.option("--alpha", type=click.IntRange(1), help="Scale: alpha / rank [twice the rank].")
@click.option("--layers", metavar="FIRST:END", help="Layers to adapt, END not included [all].")
@click.option("--epochs", type=click.IntRange(1), default=12, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=5, show_default=True)
@click.option("--rate", type=float, default=6e-3, show_default=True, help="Peak learning rate.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Of matrix products; auto takes bfloat16 where the processor has it.",
)
@click.option(
    "--orthogonality",
    type=click.Choice(["project", "penalty", "none"]),
    default="project",
    show_default=True,
    help="How the adapter is kept apart from the bundle's others.",
)
@click.option(
    "--sides",
    type=click.Choice(["input", "output", "both"]),
    default="input",
    show_default=True,
    help="Which of its matrices: A, as O3, or B.",
)
@click.option(
    "--orthogonal-weight",
    type=click.FloatRange(0),
    default=0.1,
    show_default=True,
    help="Of the penalty: O3's lambda.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9),
    default=0.0,
    show_default=True,
    help="Share of the rows to stop early by; they are not trained on.",
)
@click.option(
    "--patience",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Validations without a new best until then; 0 runs to the end.",
)
@click.option(
    "--route",
    type=click.Choice(_ROUTES),
    default="auto",
    show_default=True,
    help="What a flagged request takes from then on; auto compares them.",
)
@click.option("--resume", is_flag=True, help="Insist on going on with the training in --out.")
@click.option("--restart", is_flag=True, help="Throw the training in --out away.")
@click.option("--allow-changed", is_flag=True, help="Take another forget set than was added.")
@click.option("--apply/--no-apply", default=True, help="Write the result into the bundle [apply].")
@click.option("--model", help="Directory or Hugging Face id [the packaged SmolLM2].")
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@click.option("--seed", type=int, help="Seed of everything random.")
@click.option("--threads", type=int, help="Threads of encoder and model.")
@out_option
@bundle_option
@click.pass_context
def adapter(context: click.Context, /, out: Path, **options: Any) -> None:
    """Train an adapter with which the model itself no longer knows the target.

    Trained on the forget set alone; it is not kept. Interrupted, the same command goes on where it
    stopped and ends with the same adapter. Then the routes are compared on the forget rows, and
    adapter and route are written into the bundle. Writes report.json, table.md and losses.png.
    """
    from benchmarks.answers import rouge_l_recall
    from benchmarks.plots import check_plots
    from guard.console import note, progress_display
    from guard.learn_adapter import learn_adapter

    session: Session = context.obj
    names = ("model", "cache_dir", "seed", "threads", "bundle", "key_file")
    settings = session.load(**{name: options.pop(name) for name in names}).values
    request = _request(options, out, settings.seed)
    check_plots()
    store, key = session.existing_bundle()
    with progress_display() as progress:
        place = Path(session.model(progress))
        prompts = session.prompts(progress)
        try:
            result = learn_adapter(
                request,
                store=store,
                key=key,
                prompts=prompts,
                model=load_model(place, settings.threads),
                identity=weights_digest(place),
                ledger=session.ledger(key),
                progress=progress,
                threads=settings.threads,
                shared_words=rouge_l_recall,
            )
        except KeyboardInterrupt:
            note(f"{out} keeps what was done: the same command goes on there")
            raise
    _report(context, result, out, settings.seed)


def _request(options: dict[str, Any], out: Path, seed: int) -> AdapterRequest:
    import adapters.matched  # noqa: F401  (registers its loss)
    from adapters.unlearning import LOSSES, check_options
    from guard.adapter_request import AdapterRequest
    from guard.errors import ConfigError

    resume = options.pop("resume")
    if resume and options["restart"]:
        raise ConfigError("--resume goes on and --restart begins anew: give one of them")
    if resume and not (out.is_dir() and any(out.iterdir())):
        raise ConfigError(f"--resume: there is nothing in {out} to go on with")
    given = options.pop("loss_options")
    known = LOSSES[options["loss"]].options
    chosen = dict(_option(text, known) for text in given)
    check_options(options["loss"], **chosen)
    return AdapterRequest(
        out=out,
        seed=seed,
        options=chosen,
        alpha=options.pop("alpha") or 2 * options["rank"],
        layers=_layers(options.pop("layers")),
        **options,
    )


def _option(text: str, known: dict[str, Any]) -> tuple[str, Any]:
    """Read `NAME=VALUE`, the value as what the default is."""
    from guard.errors import ConfigError

    name, equals, value = text.partition("=")
    if not equals or name not in known:
        there = ", ".join(f"{key}={default}" for key, default in known.items()) or "none"
        raise ConfigError(f"--loss-option {text}: expected NAME=VALUE; this loss has: {there}")
    try:
        return name, type(known[name])(value)
    except ValueError:
        kind = type(known[name]).__name__
        raise ConfigError(f"--loss-option {text}: expected a value of type {kind}") from None


def _layers(text: str | None) -> tuple[int, int] | None:
    from guard.errors import ConfigError

    if text is None:
        return None
    first, _, end = text.partition(":")
    if not (first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ConfigError(f"--layers {text}: expected FIRST:END, e.g. 15:30")
    return int(first), int(end)


def _report(context: click.Context, result: AdapterResult, out: Path, seed: int) -> None:
    from benchmarks.adapter_report import adapter_rows, draw_losses
    from benchmarks.report import Report, describe_versions, format_number, write_report
    from guard.console import note, print_table

    rows = adapter_rows(result)
    versions = describe_versions(bundle=str(result.version or "unchanged"))
    write_report(out, Report(command_text(context), seed, tuple(rows), versions))
    draw_losses(out, result.report)
    lines = [(r.system, r.route, r.measure, format_number(r.value), r.n) for r in rows]
    print_table("learn adapter", ("system", "route", "measure", "value", "n"), lines)
    for line in result.notes:
        note(f"note: {line}")
    note(f"route {result.route}: {result.choice.reason}")
    note(f"{out}: report.json, table.md, losses.png")
    if result.version is not None:
        note(f"target {result.target} has it from version {result.version} of the bundle on")
    else:
        note(f"the bundle was not changed; the adapter is in {result.folder}")
