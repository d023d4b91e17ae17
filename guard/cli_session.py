"""What all commands share: settings, bundle, key, ledger and model, opened when asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from guard.bundle import BundleStore
    from guard.keys import GuardKey
    from guard.ledger import Ledger
    from guard.prompts import ModelPrompts
    from guard.settings import LoadedSettings, Settings
    from guard.types import Progress

Command = TypeVar("Command", bound=Callable[..., Any])
_LEVELS = {1: "info", 2: "debug"}


class Session:
    """One run of the program.

    Args:
        config: The settings file given by flag, if any.
        verbosity: How many times -v was given.
    """

    def __init__(self, config: str | None = None, verbosity: int = 0) -> None:
        self._config, self._verbosity = config, verbosity
        self._loaded: LoadedSettings | None = None
        self._flags: dict[str, Any] = {}
        self._prepared: Path | None = None

    def load(self, **flags: Any) -> LoadedSettings:
        """Put the settings together; the first call's flags count."""
        from guard.settings import load_settings

        if self._verbosity:
            flags["log_level"] = _LEVELS[min(self._verbosity, 2)]
        self._loaded, self._flags = load_settings(flags, self._config), flags
        _start_logging(self._loaded.values.log_level)
        return self._loaded

    @property
    def settings(self) -> Settings:
        """The effective settings."""
        return (self._loaded or self.load()).values

    @property
    def settings_file(self) -> Path | None:
        """The file that they are from, if any."""
        from guard.settings import settings_file

        return settings_file(self._config)

    def reread(self) -> Settings:
        """Put the settings together again; those of the session stay.

        Raises:
            ConfigError: If they can't be used.
        """
        from guard.settings import load_settings

        return load_settings(self._flags, self._config).values

    def key(self, create: bool = False) -> GuardKey:
        """Open the bundle's key: given itself, or in its file; made only if there is no bundle.

        Raises:
            ConfigError: If there is none.
        """
        from guard.keys import GuardKey

        secret = self.settings.key
        if secret is not None:
            return GuardKey.from_base64(secret.get_secret_value(), "the setting `key`")
        return GuardKey.load_or_create(self.key_file, create=create)

    @property
    def key_file(self) -> Path:
        """Where the key is kept."""
        from guard.keys import default_key_file

        return self.settings.key_file or default_key_file(self.settings.bundle)

    def store(self, key: GuardKey | None = None) -> BundleStore:
        """Open the bundle; with its key, manifests are checked to be the guard's own."""
        from guard.bundle import BundleStore

        return BundleStore(self.settings.bundle, key)

    def existing_bundle(self) -> tuple[BundleStore, GuardKey]:
        """Open a bundle that has to be there, and its key.

        Raises:
            BundleNotFoundError: If it isn't there.
            ConfigError: If its key isn't.
            IncompatibleArtifactError: If the key is another's.
        """
        self.store().current_version()  # no bundle is the plainer news than no key
        key = self.key()
        store = self.store(key)
        store.current().close()
        return store, key

    def ledger(self, key: GuardKey | None) -> Ledger:
        """Open the ledger."""
        from guard.ledger import Ledger

        return Ledger(self.ledger_path, key)

    @property
    def ledger_path(self) -> Path:
        """Where the ledger is kept."""
        return self.settings.ledger or self.settings.bundle / "ledger.jsonl"

    def model(self, progress: Progress | None) -> str | Path:
        """Return the model's directory or id; prepares the packaged model where none is set."""
        if self.settings.model is not None:
            return self.settings.model
        if self._prepared is None:
            from server.engines.embedded.prepare import prepare_smollm2

            self._prepared = prepare_smollm2(self.settings.cache_dir, progress)
        return self._prepared

    def prompts(self, progress: Progress | None) -> ModelPrompts:
        """Open tokenizer, template and embedding table of the model."""
        from guard.prompts import ModelPrompts

        return ModelPrompts.load(self.model(progress))


def bundle_option(command: Command) -> Command:
    """Add the options that say which bundle is meant."""
    command = click.option("--key-file", type=click.Path(), help="File of the bundle's key.")(
        command
    )
    return click.option(
        "--bundle", type=click.Path(), help="Folder bundles/<name> [bundles/default]."
    )(command)


def model_options(command: Command) -> Command:
    """Add the options that say which model is served, and by what."""
    for option in (
        click.option("--threads", type=int, help="Threads of encoder and embedded model."),
        click.option("--cache-dir", type=click.Path(), help="Where prepared models are kept."),
        click.option("--served-model-name", help="The name that clients ask for."),
        click.option("--model", help="Directory or Hugging Face id [the packaged SmolLM2]."),
        click.option("--upstream", help="Base URL of vLLM, for --engine vllm."),
        click.option(
            "--engine", type=click.Choice(["embedded", "vllm"]), help="What generates [embedded]."
        ),
    ):
        command = option(command)
    return command


def json_option(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")(command)


def print_json(value: object) -> None:
    """Print a value as JSON on standard output."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _start_logging(level: str) -> None:
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    if level == "debug":  # not theirs: they log what they send
        for noisy in ("filelock", "urllib3", "httpx", "httpcore", "asyncio", "huggingface_hub"):
            logging.getLogger(noisy).setLevel(logging.INFO)


def async_runner() -> asyncio.Runner:
    """Return a runner on uvloop; from now on SIGTERM stops like Ctrl-C."""
    import uvloop

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
