"""Settings: flags over environment over one YAML file over defaults; unknown names are refused.

The one place that reads UNLEARN_GUARD_* variables.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from guard.errors import ConfigError
from guard.strict_yaml import read_yaml

PREFIX = "UNLEARN_GUARD_"
ENV_CONFIG = f"{PREFIX}CONFIG"
MASK = "********"

Seconds = Annotated[float, Field(gt=0, le=86_400)]


def _split(value: Any) -> Any:
    """Read a list from one string, `a,b`, as the environment gives it."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _join(value: Any) -> Any:
    """Write a list of names, as YAML gives it, as one string."""
    if isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    return value


def _checked_url(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected a URL such as http://127.0.0.1:8001")
    if parts.username or parts.password:
        raise ValueError("put credentials into upstream_api_key, not into the URL")
    if parts.query or parts.fragment:
        raise ValueError("expected a base URL without query or fragment")
    return value.rstrip("/").removesuffix("/v1")


class Settings(BaseSettings):
    """What can be set, with its default. Times are in seconds, sizes in bytes.

    Attributes:
        engine: `embedded` runs the model in this process; `vllm` asks one at `upstream`.
        upstream: Base URL of vLLM, e.g. `http://127.0.0.1:8001`; several, `a,b`, that serve one
            model share the requests.
        upstream_api_key: Sent to it as a bearer token; with `forward_authorization`, with the
            guard's own questions alone.
        upstream_check_s: How often each of several upstreams is looked at.
        upstream_fall: Failures in a row after which one of them gets no more requests.
        upstream_rise: Good checks in a row after which it gets some again.
        model: Directory or Hugging Face id of the served model; None is the packaged SmolLM2.
        served_model_name: The name that clients ask for; None takes it from `model`.
        bundle: Folder `bundles/<name>`.
        key_file: File of the bundle's key; None is `bundles/<name>.key`.
        key: The key itself, base64, instead of a file.
        ledger: The ledger's file; None is `ledger.jsonl` in the bundle's folder.
        cache_dir: Where prepared models are kept; None is the user's cache directory.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.
        api_keys: Keys that clients must send, one of them; empty lets everyone in.
        api_keys_file: YAML file of hashed keys with limits of their own; followed as it changes.
        metrics_key: Bearer token for `/metrics`; without it only this machine may read them.
        forward_authorization: Send the client's Authorization header to the engine, which alone
            decides who may ask; goes with no keys here.
        embeddings: `pass` serves `/v1/embeddings` for texts that are not flagged, `deny` for none.
        images: `pass` sends images of the user's messages on, unread, beside texts that are not
            flagged; `deny` refuses them.
        on_error: When the guard fails to decide: `refuse` answers 503, `pass` lets through.
        max_body_bytes: Longest request body.
        body_timeout_s: For a client to send its body.
        decide_timeout_s: For a decision, waiting for it included.
        engine_timeout_s: Until the engine's answer begins.
        idle_timeout_s: Between two pieces of an answer.
        context: What is done about forget targets in results of tools and earlier turns: corrupt
            them there, leave them be, or refuse the request.
        output_guard: Whether answers are read before they leave.
        hold_back: Tokens of a streamed answer that are held back for that, at most.
        equalise_s: Least seconds until a request is sent on or refused, flagged or not; 0 sends
            it on at once.
        connect_timeout_s: To connect to the upstream.
        max_queue: Requests that wait for the embedded engine; beyond it 429.
        adapter_strengths: Strengths that vLLM is given each adapter at, evenly spaced to 1.
        adapter_dir: Folder that vLLM reads adapters from; None is a temporary one, for a vLLM on
            this machine that runs as the same user.
        adapter_dir_upstream: What vLLM calls that folder, if it sees it under another path.
        max_loaded_adapters: Adapters, times strengths, that vLLM is given at one time.
        adapters_together: Several adapters in one request to vLLM: the `strongest` alone (until
            the same ones recur), or `concatenate` their ranks.
        max_lora_rank: Largest rank that vLLM takes.
        max_in_flight: Requests in work at one time; beyond it 503.
        workers: Threads that decide and rewrite, in each process; no more than it has cores.
        processes: Processes that serve (`serve --workers N`); more than one needs vLLM.
        drain_s: After SIGTERM `/ready` says `draining` for so long while all is answered as ever.
        shutdown_timeout_s: For running answers to end after that.
        threads: Threads of the encoder and the embedded model; None leaves it to them.
        reload_s: How often a new version of the bundle, and of the settings file, is looked for;
            0 never.
        self_check: Whether `serve` refuses to start when engine, model and bundle don't fit.
        fpr_budget: Share of benign requests that a new target may flag.
        seed: Of everything random in learning.
        log_level: Least level that is logged.
        log_format: `json` writes a line of JSON per event and per request, without any content.
        otlp_endpoint: Base URL of an OpenTelemetry collector (OTLP over HTTP); None traces nothing.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        env_ignore_empty=True,
    )

    engine: Literal["embedded", "vllm"] = "embedded"
    upstream: Annotated[str, BeforeValidator(_join)] | None = None
    upstream_api_key: SecretStr | None = None
    upstream_check_s: Seconds = 5.0
    upstream_fall: Annotated[int, Field(ge=1, le=100)] = 3
    upstream_rise: Annotated[int, Field(ge=1, le=100)] = 2
    model: str | None = None
    served_model_name: Annotated[str, Field(min_length=1)] | None = None
    bundle: Path = Path("bundles/default")
    key_file: Path | None = None
    key: SecretStr | None = None
    ledger: Path | None = None
    cache_dir: Path | None = None
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 8000
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split)] = ()
    api_keys_file: Path | None = None
    metrics_key: SecretStr | None = None
    forward_authorization: bool = False
    embeddings: Literal["deny", "pass"] = "deny"
    images: Literal["deny", "pass"] = "deny"
    on_error: Literal["refuse", "pass"] = "refuse"
    max_body_bytes: Annotated[int, Field(ge=1_000)] = 2_000_000
    body_timeout_s: Seconds = 60.0
    decide_timeout_s: Seconds = 60.0
    engine_timeout_s: Seconds = 600.0
    idle_timeout_s: Seconds = 120.0
    connect_timeout_s: Seconds = 5.0
    context: Literal["corrupt", "ignore", "refuse"] = "corrupt"
    output_guard: bool = True
    hold_back: Annotated[int, Field(ge=2, le=1024)] = 24
    equalise_s: Annotated[float, Field(ge=0, le=60)] = 0.0
    max_queue: Annotated[int, Field(ge=0)] = 16
    adapter_strengths: Annotated[int, Field(ge=1, le=10)] = 3
    adapter_dir: Path | None = None
    adapter_dir_upstream: Annotated[str, Field(min_length=1)] | None = None
    max_loaded_adapters: Annotated[int, Field(ge=1)] = 64
    adapters_together: Literal["strongest", "concatenate"] = "strongest"
    max_lora_rank: Annotated[int, Field(ge=1, le=512)] = 16
    max_in_flight: Annotated[int, Field(ge=1)] = 1024
    workers: Annotated[int, Field(ge=1, le=256)] = 2
    processes: Annotated[int, Field(ge=1, le=256)] = 1
    drain_s: Annotated[float, Field(ge=0, le=3_600)] = 0.0
    shutdown_timeout_s: Annotated[int, Field(ge=1, le=86_400)] = 30
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    reload_s: Annotated[float, Field(ge=0, le=86_400)] = 1.0
    self_check: bool = True
    fpr_budget: Annotated[float, Field(gt=0, lt=1)] = 0.001
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: str | None = None

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_collector(cls, value: str | None) -> str | None:
        if value is None:
            return None
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
            raise ValueError("expected a URL such as http://127.0.0.1:4318")
        return value.rstrip("/").removesuffix("/v1/traces")

    @field_validator("upstream")
    @classmethod
    def _check_url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        urls = [_checked_url(url) for url in _split(value)]
        if not urls:
            raise ValueError("expected a URL such as http://127.0.0.1:8001")
        if len(set(urls)) < len(urls):
            raise ValueError("one upstream is given twice")
        return ",".join(urls)

    @model_validator(mode="after")
    def _check_who_asks_for_keys(self) -> Self:
        if self.forward_authorization and (self.api_keys or self.api_keys_file is not None):
            # The one header can't carry a key of ours and one of the engine's.
            raise ValueError(
                "forward_authorization leaves authentication to the engine, and "
                f"{'api_keys' if self.api_keys else 'api_keys_file'} asks for keys here, which "
                "would be sent on: set one of the two (upstream_api_key is the engine's key)"
            )
        return self

    @property
    def upstreams(self) -> tuple[str, ...]:
        """The base URLs of vLLM, one for each replica."""
        return tuple(_split(self.upstream or ""))

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *others: PydanticBaseSettingsSource,
        **more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take values from `load_settings` alone, which knows where each is from."""
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class LoadedSettings:
    """Settings, and where each is from.

    Attributes:
        values: The effective settings.
        sources: By name: `flag`, `environment UNLEARN_GUARD_…`, `file …` or `default`.
    """

    values: Settings
    sources: dict[str, str]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return `{name: {"value", "source"}}` as plain JSON values, secrets masked."""
        return {
            name: {"value": _shown(getattr(self.values, name)), "source": self.sources[name]}
            for name in Settings.model_fields
        }


def load_settings(
    flags: Mapping[str, Any] | None = None,
    config: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
) -> LoadedSettings:
    """Put the settings together.

    Args:
        flags: From the command line, by setting; None values are flags that weren't given.
        config: The YAML file; None takes UNLEARN_GUARD_CONFIG, if set.
        environ: The environment; None takes the process's.

    Raises:
        ConfigError: If a name is unknown or a value can't be used; says which and from where.
    """
    environ = os.environ if environ is None else environ
    config = settings_file(config, environ)
    values: dict[str, Any] = {}
    sources = dict.fromkeys(Settings.model_fields, "default")
    for name, value in (_read_yaml(config) if config else {}).items():
        values[name], sources[name] = value, f"file {config}"
    for name, text in _read_environment(environ).items():
        values[name], sources[name] = text, f"environment {PREFIX}{name.upper()}"
    for name, value in (flags or {}).items():
        if value is not None:
            values[name], sources[name] = value, "flag"
    try:
        return LoadedSettings(Settings(**values), sources)
    except ValidationError as error:
        raise ConfigError(_explain(error, sources)) from None


def settings_file(
    config: str | Path | None, environ: Mapping[str, str] | None = None
) -> Path | None:
    """Return the YAML file that settings are read from, if any; see `load_settings`."""
    named = config or (os.environ if environ is None else environ).get(ENV_CONFIG)
    return Path(named) if named else None


def _read_environment(environ: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable == ENV_CONFIG:
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in Settings.model_fields or variable != f"{PREFIX}{name.upper()}":
            known = [f"{PREFIX}{field.upper()}" for field in [*Settings.model_fields, "config"]]
            raise ConfigError(
                f"unknown environment variable {variable}{_nearest(variable.upper(), known)}; "
                "`unlearn-guard config` lists all settings"
            )
        if environ[variable]:
            found[name] = environ[variable]
    return found


def _read_yaml(path: Path) -> dict[str, Any]:
    value = read_yaml(path, "settings file")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"settings file {path}: expected `name: value` lines")
    for name in value:
        if name not in Settings.model_fields:
            raise ConfigError(
                f"settings file {path}: unknown setting {name!r}"
                f"{_nearest(str(name), list(Settings.model_fields))}; "
                "`unlearn-guard config` lists all"
            )
    return value


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _explain(error: ValidationError, sources: Mapping[str, str]) -> str:
    first = error.errors()[0]
    if not first["loc"]:  # of several settings
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    message = first["msg"].removeprefix("Value error, ")
    got = "" if _is_secret(name) else f" (got {str(first['input'])[:80]!r})"
    return f"setting {name} from {sources.get(name, 'flag')}: {message}{got}"


def _is_secret(name: str) -> bool:
    field = Settings.model_fields.get(name)
    return field is not None and "SecretStr" in repr(field.annotation)


def _shown(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, tuple):
        return [_shown(item) for item in value]
    return str(value) if isinstance(value, Path) else value
