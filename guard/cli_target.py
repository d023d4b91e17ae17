"""`unlearn-guard target …`: add, list, show and remove forget targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from guard.cli_session import Session, bundle_option, json_option, print_json

if TYPE_CHECKING:
    from guard.bundle import Bundle
    from guard.types import LearningEngine, Progress

_FILE = click.Path(path_type=Path)


@click.group("target")
def target_group() -> None:
    """Add, list, show and remove forget targets."""


@target_group.command("add")
@click.argument("name", required=False)
@click.option("--forget", type=_FILE, help="What to forget, JSON lines.")
@click.option(
    "--many", type=_FILE, help="Folder of NAME.jsonl files: a target each, without a NAME."
)
@click.option(
    "--kind",
    type=click.Choice(["entity", "topic"]),
    default="entity",
    show_default=True,
    help="An entity is known by its names, a topic by what a text is about.",
)
@click.option(
    "--detector",
    type=click.Choice(["guard", "eco", "o3"]),
    default="guard",
    show_default=True,
    help="What decides: the guard's detector, or a paper's with an encoder of its own (slow).",
)
@click.option("--retain", type=_FILE, help="Neighbouring data to keep, JSON lines.")
@click.option("--benign", type=_FILE, help="General traffic [the set that ships].")
@click.option(
    "--status",
    type=click.Choice(["enforced", "detecting"]),
    default="enforced",
    show_default=True,
    help="`detecting` decides and records, and never alters a request.",
)
@click.option(
    "--engine",
    type=click.Choice(["embedded", "none"]),
    default="embedded",
    show_default=True,
    help="What searches the corruption's strength; `none` takes the documented default.",
)
@click.option("--model", help="Directory or Hugging Face id [the packaged SmolLM2].")
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@click.option("--fpr-budget", type=float, help="Share of benign requests that may be flagged.")
@click.option("--seed", type=int, help="Seed of everything random in learning.")
@click.option("--threads", type=int, help="Threads of encoder and model.")
@bundle_option
@click.pass_obj
def add(
    session: Session,
    /,
    name: str | None,
    forget: Path | None,
    many: Path | None,
    kind: Any,
    detector: Any,
    retain: Path | None,
    benign: Path | None,
    status: Any,
    engine: str,
    **flags: Any,
) -> None:
    """Learn to recognise what --forget holds, and make the bundle forget it.

    The file itself is not kept. A line is {"question", "answer"}, {"prompt", "completion"},
    {"text"}, {"messages"} or {"term"}: a name, title or technical term that stands for the target.

    With --many DIR every NAME.jsonl of a folder becomes a target. Interrupted, the same command
    goes on where it stopped.
    """
    from guard.console import note, progress_display
    from guard.manifest import check_name
    from guard.targets import TargetRequest, add_target

    settings = session.load(**flags).values
    if many is not None:
        _add_many(session, many, name, forget, retain, benign, status, kind)
        return
    if name is None or forget is None:
        raise click.UsageError("give a NAME and --forget FILE, or --many DIR")
    check_name(name)
    request = TargetRequest(
        name=name,
        forget=forget,
        kind=kind,
        detector=detector,
        retain=retain,
        benign=benign,
        status=status,
        fpr_budget=settings.fpr_budget,
        seed=settings.seed,
        threads=settings.threads,
    )
    _check_inputs(session, request.name, forget, retain, benign)
    made_key = settings.key is None and not session.key_file.exists()
    key = session.key(create=not session.store().exists())
    if made_key:
        note(f"made the key {session.key_file}: keep it safe and apart from the bundle")
    store = session.store(key)
    with progress_display() as progress:
        entry = add_target(
            request,
            store=store,
            key=key,
            prompts=session.prompts(progress),
            engine=_learning_engine(session, engine, progress),
            ledger=session.ledger(key),
            progress=progress,
        )
    for line in entry.notes:
        note(f"note: {line}")
    note(_miss_rate(entry.detector))
    note(
        f"target {entry.name} is {entry.status} in {store.root}, version "
        f"{store.current_version()}: `unlearn-guard serve --bundle {store.root}`"
    )


def _add_many(
    session: Session,
    folder: Path,
    name: str | None,
    forget: Path | None,
    retain: Path | None,
    benign: Path | None,
    status: Any,
    kind: Any,
) -> None:
    from guard.console import note, progress_display
    from guard.many import add_many
    from guard.targets import TargetRequest

    if name is not None or forget is not None:
        raise click.UsageError(
            "--many takes the names of its files: give neither NAME nor --forget"
        )
    settings = session.settings
    made_key = settings.key is None and not session.key_file.exists()
    key = session.key(create=not session.store().exists())
    if made_key:
        note(f"made the key {session.key_file}: keep it safe and apart from the bundle")
    request = TargetRequest(
        name="",
        forget=folder,
        retain=retain,
        benign=benign,
        status=status,
        fpr_budget=settings.fpr_budget,
        seed=settings.seed,
        threads=settings.threads,
        kind=kind,
    )
    store = session.store(key)
    with progress_display() as progress:
        added = add_many(
            folder,
            request,
            store=store,
            key=key,
            prompts=session.prompts(progress),
            ledger=session.ledger(key),
            progress=progress,
            workers=settings.threads,
        )
    note(f"{added} targets are {status} in {store.root}, version {store.current_version()}")


_MANY_MISSES = 0.1


def _miss_rate(figures: dict[str, Any]) -> str:
    """Say how often the target will be missed, as far as the forget set can tell."""
    parts = []
    for key, what in (("recall", "as given"), ("recall_variants", "framed, misspelt or recased")):
        found = figures.get(key) or {}
        if found.get("rate") is not None:
            low, high = (1.0 - bound for bound in reversed(found["interval95"]))
            missed = 1.0 - found["rate"]
            parts.append(f"{what} {missed:.1%} ({low:.1%} to {high:.1%})")
    held = "" if figures.get("held_out") else " (too few rows to hold any out: optimistic)"
    told = f"estimated misses of forget rows: {', '.join(parts)}{held}"
    rate = (figures.get("recall") or {}).get("rate")
    if rate is not None and 1.0 - rate > _MANY_MISSES:
        told += (
            "\n  rows were left out in turn and asked about: one that names nobody, or whose names "
            'stand in no other row, is missed then; more rows, or {"term"} rows, help'
        )
    return told


@target_group.command("list")
@bundle_option
@json_option
@click.pass_obj
def list_targets(session: Session, /, as_json: bool, **flags: Any) -> None:
    """List the targets of a bundle."""
    bundle = _open(session, flags)
    targets = bundle.manifest.targets.values()
    if as_json:
        print_json(
            {
                "bundle": str(bundle.root),
                "version": bundle.version,
                "targets": [entry.model_dump(mode="json") for entry in targets],
            }
        )
        return
    from guard.console import print_table

    columns = ("target", "status", "route", "rows", "created", "notes")
    rows = [(e.name, e.status, e.route, e.rows, e.created_at, e.notes) for e in targets]
    print_table(f"{bundle.root}, version {bundle.version}", columns, rows)


@target_group.command("show")
@click.argument("name")
@bundle_option
@json_option
@click.pass_obj
def show(session: Session, /, name: str, as_json: bool, **flags: Any) -> None:
    """Show one target with all its figures."""
    bundle = _open(session, flags)
    entry = bundle.manifest.targets.get(name)
    if entry is None:
        raise _not_found(bundle, name)
    figures = {
        **entry.model_dump(mode="json"),
        "files": {
            path: file.size
            for path, file in bundle.manifest.files.items()
            if path.startswith(entry.prefix)
        },
    }
    if as_json:
        print_json(figures)
        return
    from guard.console import print_figures

    print_figures(f"target {name} of {bundle.root}, version {bundle.version}", figures)


@target_group.command("route")
@click.argument("name")
@click.argument(
    "route",
    required=False,
    type=click.Choice(["corrupt", "adapt", "corrupt+adapt", "refuse"]),
)
@click.option(
    "--weights",
    type=click.Choice(["monotone", "o3-paper", "o3-code"]),
    help="How strongly the adapter acts, by the score; the last two need --detector o3.",
)
@bundle_option
@click.pass_obj
def route(session: Session, /, name: str, route: Any, weights: Any, **flags: Any) -> None:
    """Set what a request that touches the target takes.

    `corrupt` blurs its embeddings, `adapt` answers with the target's adapter (`learn adapter`
    trains it, and chooses the route by evaluation), `corrupt+adapt` does both, `refuse` declines.
    """
    from guard.console import note
    from guard.target_route import set_route

    if route is None and weights is None:
        raise click.UsageError("give a ROUTE, or --weights, or both")
    bundle = _open(session, flags)
    if name not in bundle.manifest.targets:
        raise _not_found(bundle, name)
    bundle.close()
    key = session.key()
    store = session.store(key)
    version = set_route(name, route, weights, store=store, key=key, ledger=session.ledger(key))
    entry = store.current().manifest.targets[name]
    note(
        f"target {name} takes the route {entry.route}, weights {entry.weights}, from version "
        f"{version} on"
    )


@target_group.command("remove")
@click.argument("name")
@bundle_option
@click.pass_obj
def remove(session: Session, /, name: str, **flags: Any) -> None:
    """Remove a target: the new version holds nothing of it. `bundle gc` deletes the old ones."""
    from guard.console import note
    from guard.targets import remove_target

    bundle = _open(session, flags)
    if name not in bundle.manifest.targets:
        raise _not_found(bundle, name)
    bundle.close()
    key = session.key()
    store = session.store(key)
    remove_target(name, store=store, key=key, ledger=session.ledger(key))
    note(
        f"target {name} is gone from version {store.current_version()}; older versions still hold "
        f"it until `unlearn-guard bundle gc --bundle {store.root}`"
    )


def _check_inputs(session: Session, /, name: str, forget: Path, *others: Path | None) -> None:
    """Find what is wrong before minutes are spent: names taken, files missing or malformed."""
    from guard.errors import TargetExistsError
    from guard.rows import read_rows, read_texts

    store = session.store()
    if store.exists() and name in store.current().manifest.targets:
        raise TargetExistsError(
            f"bundle {store.root} holds a target {name!r} already: remove it first "
            f"(`unlearn-guard target remove {name}`), or choose another name"
        )
    read_rows(forget)
    retain, benign = others
    if retain is not None:
        read_rows(retain)
    if benign is not None:
        read_texts(benign)


def _learning_engine(session: Session, engine: str, progress: Progress) -> LearningEngine | None:
    if engine == "none":
        return None
    from guard.errors import ConfigError

    try:
        from server.engines.embedded.model import EmbeddedModel
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"learning the strength needs {error.name}: install the extras `embedded` and `learn`, "
            "or give --engine none to take the default strength"
        ) from error
    progress("load the model", 0, 1)
    model = EmbeddedModel.load(session.model(progress), threads=session.settings.threads)
    progress("load the model", 1, 1)
    return model


def _open(session: Session, flags: dict[str, Any]) -> Bundle:
    session.load(**flags)
    return session.store().current()


def _not_found(bundle: Bundle, name: str) -> Exception:
    from difflib import get_close_matches

    from guard.errors import TargetNotFoundError

    known = sorted(bundle.manifest.targets)
    close = get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    there = ", ".join(known) or "none"
    return TargetNotFoundError(f"no target {name!r} in bundle {bundle.root}{hint} (there: {there})")
