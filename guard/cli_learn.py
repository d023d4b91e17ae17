"""`unlearn-guard learn …`: search offline, against the model itself, what a target needs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_eval import command_text, out_option
from guard.cli_session import Session, bundle_option

if TYPE_CHECKING:
    from guard.learn_corruption import LearnResult
    from guard.learn_inputs import LearnRequest, NamedEngine, RetainedModel
    from guard.prompts import ModelPrompts
    from guard.types import Progress

_FILE = click.Path(path_type=Path)
EMBEDDED = "embedded"


@click.group("learn")
def learn_group() -> None:
    """Search what a target needs, offline and against the model itself."""


@learn_group.command("corruption")
@click.option("--target", required=True, help="A target of the bundle.")
@click.option("--forget", type=_FILE, required=True, help="Its forget set, as for `target add`.")
@click.option("--retain", type=_FILE, help="Neighbours: reports how many would be corrupted.")
@click.option(
    "--engine",
    "engines",
    multiple=True,
    default=(EMBEDDED,),
    show_default=True,
    metavar="embedded|DIR|URL",
    help="Where candidates are evaluated: in this process, or a plain vLLM; may be repeated.",
)
@click.option("--budget", type=click.IntRange(3), default=40, show_default=True)
@click.option(
    "--optimizer",
    help="eco-zo, or nevergrad:NAME, e.g. CMA [nevergrad:TBPSA; joint nevergrad:OnePlusOne].",
)
@click.option(
    "--objective",
    help="probability, rouge-l, truth-ratio, multiple-choice, mixed [mixed; on vLLM rouge-l].",
)
@click.option(
    "--search",
    "space",
    type=click.Choice(["strength", "joint"]),
    default="strength",
    show_default=True,
    help="The strength alone, or method, dims, strength, spans and frame at once.",
)
@click.option("--method", "methods", multiple=True, help="Search this method; with joint, these.")
@click.option("--dims", type=click.IntRange(1), help="Dimensions to touch [the bundle's].")
@click.option("--retained-engine", type=_FILE, help="Directory of a model that never saw it.")
@click.option(
    "--retained-value",
    "retained_values",
    multiple=True,
    metavar="[MEASURE=]X",
    help="What such a model scores, where that is known.",
)
@click.option(
    "--surrogate",
    type=click.Choice(["generic", "refusal", "chance"]),
    help="What stands in for such a model [generic; chance for multiple-choice].",
)
@click.option(
    "--sample",
    type=click.IntRange(2),
    default=30,
    show_default=True,
    help="Rows of the forget set to look at.",
)
@click.option("--all-rows", is_flag=True, help="Look at all of them.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 0.9),
    default=0.3,
    show_default=True,
    help="Share of the rows that chooses among the best.",
)
@click.option(
    "--draws",
    type=click.IntRange(1, 100),
    default=1,
    show_default=True,
    help="Draws of the noise to average; rows have noise of their own anyway.",
)
@click.option(
    "--parallel", type=click.IntRange(1), help="Candidates at a time [the number of engines]."
)
@click.option("--resume", is_flag=True, help="Insist on going on with the log in --out.")
@click.option("--restart", is_flag=True, help="Throw the log in --out away.")
@click.option("--allow-changed", is_flag=True, help="Take another forget set than was added.")
@click.option("--apply/--no-apply", default=True, help="Write the result into the bundle [apply].")
@click.option("--model", help="Files of the served model [those of a DIR engine, else SmolLM2].")
@click.option("--served-model-name", help="What a vLLM is asked for [the first it has].")
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@click.option("--seed", type=int, help="Seed of rows, split and optimizer.")
@click.option("--threads", type=int, help="Threads of encoder and model.")
@out_option
@bundle_option
@click.pass_context
def corruption(
    context: click.Context,
    /,
    engines: tuple[str, ...],
    retained_engine: Path | None,
    out: Path,
    **options: Any,
) -> None:
    """Search the corruption after which the model answers as one that never knew the target.

    Interrupted, the same command goes on where it stopped and ends with the same result. The
    forget set is not kept. Writes report.json, table.md, trace.jsonl and trace.png, and the
    corruption into the bundle.
    """
    from benchmarks.plots import check_plots
    from guard.console import note, progress_display
    from guard.learn_corruption import learn_corruption

    session: Session = context.obj
    names = ("model", "served_model_name", "cache_dir", "seed", "threads", "bundle", "key_file")
    flags = {name: options.pop(name) for name in names}
    if flags["model"] is None:
        flags["model"] = next((one for one in engines if _is_directory(one)), None)
    settings = session.load(**flags).values
    request = _request(options, out, settings.seed)
    check_plots()
    store, key = session.existing_bundle()
    opener = _Opener(session, engines)
    with progress_display() as progress, ExitStack() as stack:
        prompts = session.prompts(progress)
        try:
            result = learn_corruption(
                request,
                store=store,
                key=key,
                prompts=prompts,
                engines=opener.open(stack, prompts, progress),
                retained=_retained(retained_engine, settings.threads),
                ledger=session.ledger(key),
                progress=progress,
                note=note,
                threads=settings.threads,
            )
        except KeyboardInterrupt:
            note(f"{out} keeps what was evaluated: the same command goes on there")
            raise
    _report(context, result, out, settings.seed, opener.route)


def _request(options: dict[str, Any], out: Path, seed: int) -> LearnRequest:
    from corruptions.objectives import OBJECTIVES, default_objective
    from corruptions.search import DEFAULT_OPTIMIZERS
    from guard.errors import ConfigError
    from guard.learn_inputs import LearnRequest

    if options["resume"] and options["restart"]:
        raise ConfigError("--resume goes on and --restart begins anew: give one of them")
    objective, space = options["objective"], options.pop("space")
    measures = OBJECTIVES.get(objective or default_objective(True), ())
    return LearnRequest(
        out=out,
        seed=seed,
        joint=space == "joint",
        optimizer=options.pop("optimizer") or DEFAULT_OPTIMIZERS[space],
        sample=None if options.pop("all_rows") else options.pop("sample"),
        retained_values=_values(options.pop("retained_values"), measures),
        **{name: value for name, value in options.items() if name != "sample"},
    )


def _values(given: Sequence[str], measures: Sequence[str]) -> dict[str, float]:
    """Read `MEASURE=X`, or `X` where there is one measure."""
    from guard.errors import ConfigError

    found = {}
    for text in given:
        name, equals, number = text.rpartition("=")
        if not equals and len(measures) != 1:
            raise ConfigError(
                f"--retained-value {text}: this objective compares {', '.join(measures)}; give "
                "MEASURE=X for each of them"
            )
        try:
            value = float(number)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ConfigError(f"--retained-value {text}: expected a number from 0 to 1")
        found[name or measures[0]] = value
    return found


@dataclass(frozen=True, slots=True)
class _Opener:
    """Opens the engines that were named on the command line."""

    session: Session
    names: Sequence[str]

    @property
    def route(self) -> str:
        """How the model is reached, as it stands in reports."""
        kinds = {"http" if _is_url(name) else EMBEDDED for name in self.names}
        return "+".join(sorted(kinds))

    def open(
        self, stack: ExitStack, prompts: ModelPrompts, progress: Progress
    ) -> list[NamedEngine]:
        """Open all engines; the stack closes them."""
        found = []
        for number, name in enumerate(self.names):
            progress("open the engines", number, len(self.names))
            opened = self._http(name, stack, prompts) if _is_url(name) else self._local(name)
            found.append(opened)
        progress("open the engines", len(self.names), len(self.names))
        return found

    def _local(self, name: str) -> NamedEngine:
        from guard.errors import ConfigError
        from guard.learn_inputs import NamedEngine

        if name != EMBEDDED and not _is_directory(name):
            raise ConfigError(
                f"--engine {name}: neither {EMBEDDED!r}, nor a model directory, nor the http:// "
                "URL of a vLLM"
            )
        place = Path(self.session.model(None) if name == EMBEDDED else name)
        model = load_model(place, self.session.settings.threads)
        return NamedEngine(name, model, True, weights_digest(place))

    def _http(self, name: str, stack: ExitStack, prompts: ModelPrompts) -> NamedEngine:
        from guard.learn_inputs import NamedEngine
        from server.engines.learning import HttpLearningEngine

        settings = self.session.settings
        secret = settings.upstream_api_key
        engine = HttpLearningEngine(
            name,
            model=settings.served_model_name,
            api_key=secret.get_secret_value() if secret is not None else None,
            embeds_dtype=prompts.table_dtype,
        )
        stack.callback(engine.close)
        return NamedEngine(name, engine, False, "http")


def _retained(place: Path | None, threads: int | None) -> RetainedModel | None:
    from guard.errors import ConfigError
    from guard.learn_inputs import RetainedModel

    if place is None:
        return None
    if not _is_directory(str(place)):
        raise ConfigError(f"--retained-engine {place}: no model directory (with a config.json)")
    return RetainedModel(lambda: load_model(place, threads), weights_digest(place))


def load_model(place: Path, threads: int | None) -> Any:
    """Load a model into this process."""
    from guard.errors import ConfigError

    try:
        from server.engines.embedded.model import EmbeddedModel
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"an embedded engine needs {error.name}: install the extras `embedded` and `learn`, "
            "or give --engine the URL of a vLLM"
        ) from error
    return EmbeddedModel.load(place, threads=threads)


def weights_digest(place: Path) -> str:
    """Tell models apart whose embeddings are the same, as those of a fine-tuned pair are."""
    import hashlib

    if not place.is_dir():
        return str(place)
    whole = hashlib.sha256()
    for path in sorted(place.glob("*.safetensors")):
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, "sha256").digest())
    return whole.hexdigest()


def _is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def _is_directory(name: str) -> bool:
    return (Path(name) / "config.json").is_file()


def _report(context: click.Context, result: LearnResult, out: Path, seed: int, route: str) -> None:
    from benchmarks.learn_report import describe, draw_search, learn_rows
    from benchmarks.report import Report, describe_versions, format_number, write_report
    from guard.console import note, print_table

    rows = learn_rows(result, route)
    versions = describe_versions(bundle=str(result.version or "unchanged"))
    write_report(out, Report(command_text(context), seed, tuple(rows), versions))
    draw_search(out, result.trials)
    lines = [
        (row.system, row.measure, row.group, format_number(row.value), row.n)
        for row in rows
        if row.measure != "finalist_loss"
    ]
    print_table("learn corruption", ("system", "measure", "rows", "value", "n"), lines)
    for line in result.notes:
        note(f"note: {line}")
    note(f"best: {describe(result.best.spec)}; compared with {result.source}")
    note(f"{out}: report.json, table.md, trace.jsonl, trace.png")
    if result.version is not None:
        note(f"target {result.target} has it from version {result.version} of the bundle on")
    else:
        note("the bundle was not changed")
