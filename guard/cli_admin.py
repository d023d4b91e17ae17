"""The operator's commands: `doctor`, `config`, `bundle …`, `ledger …` and `model …`."""

from __future__ import annotations

from typing import Any

import click

from guard.cli_session import Session, bundle_option, json_option, model_options, print_json


@click.command("config")
@model_options
@bundle_option
@json_option
@click.pass_obj
def config(session: Session, /, as_json: bool, **flags: Any) -> None:
    """Show every setting, its effective value and where that is from; secrets are masked."""
    described = session.load(**flags).describe()
    if as_json:
        print_json(described)
        return
    from guard.console import print_table

    rows = [(name, entry["value"], entry["source"]) for name, entry in described.items()]
    print_table("", ("setting", "value", "from"), rows)


@click.command("doctor")
@model_options
@bundle_option
@json_option
@click.pass_obj
def doctor(session: Session, /, as_json: bool, **flags: Any) -> None:
    """Check installation, bundle, key, model, engine and ledger, and that they fit together.

    Exit code 0: all is well (warnings allowed); 3: engine, model files, encoder and bundle don't
    fit together; 2: no bundle, or not its key; 1: something else is wrong.
    """
    from guard.doctor import examine, verdict

    session.load(**flags)
    findings = examine(session)
    if as_json:
        print_json(
            {
                "ok": verdict(findings) == 0,
                "checks": [finding.to_dict() for finding in findings],
            }
        )
    else:
        from guard.console import print_table

        rows = [(f.check, f.status, f.detail) for f in findings]
        print_table("", ("check", "status", "detail"), rows)
    raise click.exceptions.Exit(verdict(findings))


@click.group("bundle")
def bundle_group() -> None:
    """Look at a bundle, and delete its old versions."""


@bundle_group.command("show")
@bundle_option
@json_option
@click.pass_obj
def bundle_show(session: Session, /, as_json: bool, **flags: Any) -> None:
    """Show the current version: model, encoder, targets, sizes; checks every file's hash."""
    session.load(**flags)
    bundle = session.store().current()
    bundle.verify()
    manifest = bundle.manifest
    figures = {
        "bundle": str(bundle.root),
        "version": bundle.version,
        "versions": session.store().versions(),
        "parent": manifest.parent,
        "created_at": manifest.created_at,
        "key_id": manifest.key_id,
        "fpr_budget": manifest.fpr_budget,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "targets": {name: entry.status for name, entry in manifest.targets.items()},
        "model": manifest.model,
        "encoder": manifest.encoder,
    }
    if as_json:
        print_json(figures)
        return
    from guard.console import print_figures

    print_figures("", figures)


@bundle_group.command("gc")
@click.option("--keep", type=click.IntRange(1), default=1, show_default=True)
@bundle_option
@json_option
@click.pass_obj
def bundle_gc(session: Session, /, keep: int, as_json: bool, **flags: Any) -> None:
    """Delete all versions but the newest --keep; one that a process still reads is left."""
    from guard.console import note

    session.load(**flags)
    store = session.store()
    deleted = store.gc(keep)
    left = [f"{version:06d}" for version in store.versions()]
    key = _key_if_there(session)
    if deleted:
        session.ledger(key).append("bundle", action="gc", deleted=deleted, left=left)
    if as_json:
        print_json({"deleted": deleted, "left": left})
    else:
        note(f"deleted {', '.join(deleted) or 'nothing'}; left {', '.join(left)}")


@click.group("ledger")
def ledger_group() -> None:
    """Look after the ledger."""


@ledger_group.command("verify")
@click.option("--ledger", type=click.Path(), help="The ledger's file [in the bundle's folder].")
@bundle_option
@json_option
@click.pass_obj
def ledger_verify(session: Session, /, as_json: bool, **flags: Any) -> None:
    """Check that no row was changed, moved, added or removed; exit code 1 if one was.

    With the key, the rows are also checked to be the guard's own.
    """
    from guard.console import note
    from guard.ledger import verify_ledger

    session.load(**flags)
    report = verify_ledger(session.ledger_path, _key_if_there(session))
    if as_json:
        print_json(report.to_dict())
    else:
        for line in (*report.breaks, *report.notes):
            click.echo(line)
        whose = {None: "no key to check signatures", True: "all signed by the key"}
        note(
            f"{report.path}: {report.rows} rows, "
            + (f"intact, {whose[report.authentic]}" if report.ok else "NOT intact")
        )
    if not report.ok:
        raise click.exceptions.Exit(1)


@click.group("model")
def model_group() -> None:
    """Prepare the models that packages carry."""


@model_group.command("prepare")
@click.option(
    "--packaged",
    type=click.Choice(["smollm2-135m", "gemma3-270m"]),
    default="smollm2-135m",
    show_default=True,
    help="Which of the models that Python packages carry.",
)
@click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept.")
@click.pass_obj
def model_prepare(session: Session, /, packaged: str, **flags: Any) -> None:
    """Dequantise a packaged model once, and print its directory: `vllm --model "$(…)"`."""
    from guard.console import progress_display
    from server.engines.embedded.packaged import packaged_model
    from server.engines.embedded.prepare import prepare_model

    settings = session.load(**flags).values
    with progress_display() as progress:
        directory = prepare_model(packaged_model(packaged), settings.cache_dir, progress)
    click.echo(str(directory))


def _key_if_there(session: Session) -> Any:
    """Return the bundle's key, or None where there is no key file (and no key was asked for)."""
    settings = session.settings
    if settings.key is None and settings.key_file is None and not session.key_file.exists():
        return None
    return session.key()
