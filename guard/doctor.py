"""`unlearn-guard doctor`: is everything there, and does it fit together?"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from guard.errors import (
    ArtifactError,
    BundleNotFoundError,
    ConfigError,
    EngineError,
    GuardError,
    IncompatibleArtifactError,
)

if TYPE_CHECKING:
    from guard.cli_session import Session
    from server.engines.base import Engine
    from server.selfcheck import SelfCheckReport

Status = Literal["ok", "warning", "failed", "skipped"]

_BASE = ("numpy", "onnxruntime", "faiss-cpu", "tokenizers", "cryptography", "uvicorn", "aiohttp")
_EMBEDDED = ("torch", "transformers")
_LEARN = ("scikit-learn", "onnx", "nevergrad")


@dataclass(frozen=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: What was checked.
        status: How it went; `skipped` where an earlier failure leaves nothing to check.
        detail: What was found, and what to do.
        code: Exit code that it calls for, if it failed.
    """

    check: str
    status: Status
    detail: str
    code: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {name: value for name, value in asdict(self).items() if name != "code"}


def examine(session: Session) -> list[Finding]:
    """Run all checks; none of them raises for what it finds."""
    findings: list[Finding] = []

    def look(check: str, work: Callable[[], str | Finding]) -> bool:
        try:
            found = work()
        except (GuardError, OSError) as error:
            found = Finding(check, "failed", str(error), _code(check, error))
        finding = found if isinstance(found, Finding) else Finding(check, "ok", found)
        findings.append(finding)
        return finding.status != "failed"

    def need(check: str, met: bool, work: Callable[[], str | Finding]) -> bool:
        if met:
            return look(check, work)
        findings.append(Finding(check, "skipped", "because of what failed above"))
        return False

    look("installation", lambda: _installation(session.settings.engine))
    has_bundle = look("bundle", lambda: _bundle(session))
    has_key = need("key", has_bundle, lambda: _key(session))
    fits = need("model", has_bundle, lambda: _model(session))
    need("encoder", has_bundle, lambda: _encoder(session))
    need("detector", has_key, lambda: _detector(session))
    need("self-check", has_key and fits, lambda: asyncio.run(_engine(session)))
    look("ledger", lambda: _ledger(session))
    return findings


def verdict(findings: Sequence[Finding]) -> int:
    """Return the exit code: 0 if nothing failed, otherwise the gravest."""
    return max((f.code for f in findings if f.status == "failed"), default=0)


def _code(check: str, error: BaseException) -> int:
    if isinstance(error, EngineError):
        return 1
    if check in ("model", "encoder", "detector", "self-check"):
        return 3
    bad_input = (BundleNotFoundError, IncompatibleArtifactError, ConfigError)
    return 2 if isinstance(error, bad_input) else 1


def _installation(engine: str) -> str | Finding:
    python = ".".join(str(part) for part in sys.version_info[:3])
    missing = {name for name in (*_BASE, *_EMBEDDED, *_LEARN) if _installed(name) is None}
    have = ", ".join(
        f"{name} {found}" for name in (*_BASE, *_EMBEDDED) if (found := _installed(name))
    )
    wanted = (*_BASE, *_EMBEDDED) if engine == "embedded" else _BASE
    if broken := sorted(missing.intersection(wanted)):
        return Finding("installation", "failed", f"missing: {', '.join(broken)}")
    if missing:
        detail = f"not installed: {', '.join(sorted(missing))} (extras `embedded` and `learn`)"
        return Finding("installation", "warning", detail)
    return f"Python {python}, {have}"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _bundle(session: Session) -> str | Finding:
    bundle = session.store().current()
    bundle.verify()
    names = [f"{name} ({e.status})" for name, e in bundle.manifest.targets.items()]
    detail = f"version {bundle.version}, {len(bundle.manifest.files)} files as they were written"
    if not names:
        return Finding("bundle", "warning", f"{detail}; no targets")
    return f"{detail}; targets: {', '.join(names)}"


def _key(session: Session) -> str | Finding:
    from guard.keys import key_file_warning

    _, key = session.existing_bundle()
    if session.settings.key is None and (warning := key_file_warning(session.key_file)):
        return Finding("key", "warning", warning)
    return f"key {key.id} is the bundle's"


def _model(session: Session) -> str:
    from guard.build import check_model

    prompts = session.prompts(None)
    check_model(session.store().current(), prompts.fingerprint)
    found = prompts.fingerprint
    return f"{found.model_type}, hidden size {found.hidden_size}, as the bundle was made for"


def _encoder(session: Session) -> str:
    from guard.build import check_encoder

    check_encoder(session.store().current(), session.settings.threads)
    return "reproduces its reference features"


def _detector(session: Session) -> str:
    from guard.build import load_guard

    store, key = session.existing_bundle()
    guard = load_guard(
        store=store, key=key, prompts=None, ledger=None, threads=session.settings.threads
    )
    return f"{len(guard.targets)} targets load"


async def _engine(session: Session) -> str | Finding:
    from guard.cli_compose import make_engine
    from server.selfcheck import self_check

    engine, prompts = make_engine(session), session.prompts(None)
    reports: list[SelfCheckReport] = []

    async def check(one: Engine) -> None:
        reports.append(await self_check(one, prompts))
        reports[-1].require()

    await engine.start()
    try:
        await engine.health()
        each = getattr(engine, "examine", None)  # an engine that is several
        await (check(engine) if each is None else each(check))
        figures: dict[str, dict[str, int]] = getattr(engine, "upstream_figures", dict)()
    finally:
        await engine.close()
    away = [label for label, one in figures.items() if not one["healthy"]]
    if away:
        text = f"upstreams that are away: {', '.join(away)}; the others fit"
        return Finding("self-check", "warning", text)
    report = reports[0]
    roles = ", ".join(f"{role} {outcome}" for role, outcome in report.roles.items())
    return f"{report.model} answers text and its clean embeddings alike; roles: {roles}"


def _ledger(session: Session) -> str | Finding:
    from guard.ledger import verify_ledger

    try:
        key = session.existing_bundle()[1]
    except GuardError:
        key = None
    try:
        report = verify_ledger(session.ledger_path, key)
    except ArtifactError as error:
        return Finding("ledger", "warning", str(error))
    if not report.ok:
        more = f" and {len(report.breaks) - 1} more" if len(report.breaks) > 1 else ""
        return Finding("ledger", "failed", f"not intact: {report.breaks[0]}{more}")
    return f"{report.rows} rows, intact"
