"""`unlearn-guard key …`: the keys that clients send, of which only hashes are kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from guard.cli_session import Session, json_option, print_json

if TYPE_CHECKING:
    from server.keys import KeyEntry

_file_option = click.option(
    "--file",
    "file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The YAML file of keys [the setting api_keys_file].",
)


@click.group("key")
def key_group() -> None:
    """Make API keys with limits of their own."""


@key_group.command("new")
@click.option("--name", required=True, help="What logs call the key: letters, digits, . _ -")
@click.option("--requests-per-minute", type=click.IntRange(1), help="As many at once [no limit].")
@click.option("--concurrent", type=click.IntRange(1), help="In work at one time [no limit].")
@click.option("--max-body-bytes", type=click.IntRange(1_000), help="[the server's limit]")
@_file_option
@click.pass_obj
def key_new(session: Session, /, name: str, file: Path | None, **limits: int | None) -> None:
    """Draw a key, print it once, and append its hash to --file.

    A server that uses the file takes it within seconds, without a restart.
    """
    from guard.console import note
    from guard.errors import ConfigError
    from server.keys import NAME, hash_key, new_key

    if not re.fullmatch(NAME, name):
        raise ConfigError("--name takes up to 64 letters, digits, dots, underscores and dashes")
    path = _file(session, file)
    key = new_key()
    fields = {"name": f'"{name}"', "sha256": f'"{hash_key(key)}"', **limits}
    given = [f"{field}: {value}" for field, value in fields.items() if value is not None]
    _append(path, "- " + "\n  ".join(given) + "\n")
    click.echo(key)
    note(f"key {name!r} is in {path}; it is not shown again: only its hash is kept")


@key_group.command("list")
@_file_option
@json_option
@click.pass_obj
def key_list(session: Session, /, file: Path | None, as_json: bool) -> None:
    """Show the names and limits of a file's keys. To revoke one, delete its entry."""
    from server.keys import read_keys

    rows = [_shown(entry) for entry in read_keys(_file(session, file))]
    if as_json:
        print_json(rows)
        return
    from guard.console import print_table

    names = ("name", "requests_per_minute", "concurrent", "max_body_bytes")
    print_table("", names, [[row[name] for name in names] for row in rows])


def _shown(entry: KeyEntry) -> dict[str, str | int | None]:
    return {
        "name": entry.name,
        "sha256": entry.sha256,
        "requests_per_minute": entry.requests_per_minute,
        "concurrent": entry.concurrent,
        "max_body_bytes": entry.max_body_bytes,
    }


def _file(session: Session, file: Path | None) -> Path:
    from guard.errors import ConfigError

    found = file or session.load().values.api_keys_file
    if found is None:
        raise ConfigError("say which file: --file FILE, or the setting api_keys_file")
    return found


def _append(path: Path, entry: str) -> None:
    """Append an entry, or leave the file as it was; comments in it stay.

    Raises:
        ConfigError: If the file, or the file with the entry, is no file of keys.
    """
    from filelock import FileLock

    from guard.disk import replace_file
    from server.keys import parse_keys, read_keys

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        before = ""
        if path.exists():
            read_keys(path)
            before = path.read_text(encoding="utf-8")
        if before and not before.endswith("\n"):
            before += "\n"
        if before.strip() in ("[]", "---"):
            before = ""
        parse_keys(before + entry, path)
        replace_file(path, (before + entry).encode())
