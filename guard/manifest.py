"""What a version of a bundle says about itself: `manifest.json`.

Figures, fingerprints and file hashes only; never a word of a forget set.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from guard.errors import ArtifactError, ConfigError, IncompatibleArtifactError
from guard.types import TargetRoute, TargetStatus, WeightPolicy

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
SEAL = "manifest.seal.json"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


def check_name(name: str, what: str = "target") -> str:
    """Return `name` if it can name a target or bundle (and so a folder).

    Raises:
        ConfigError: If it can't.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(
            f"{what} name {name!r}: expected 1 to 64 of the characters A-Z a-z 0-9 . _ - "
            "that start with a letter or digit"
        )
    return name


def check_path(rel: str) -> str:
    """Return `rel` if it is a plain relative path that stays inside the version's folder.

    Raises:
        ValueError: If it isn't, or names the manifest itself.
    """
    if rel in (MANIFEST, SEAL):
        raise ValueError(f"{rel!r} is written by the bundle itself")
    if not all(_SEGMENT.fullmatch(segment) for segment in rel.split("/")):
        raise ValueError(f"{rel!r} is not a plain path inside the bundle")
    return rel


def target_prefix(name: str) -> str:
    """Return the folder of a target's files in the bundle, with a slash at the end.

    Raises:
        ConfigError: If that can't be a target's name.
    """
    return f"targets/{check_name(name)}/"


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=())


class FileEntry(_Strict):
    """A file of the bundle."""

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: Annotated[int, Field(ge=0)]


class TargetEntry(_Strict):
    """A target, and the figures that tell how well it was learned.

    Attributes:
        name: Its name, and its folder's under `targets/`.
        status: `detecting` decides and records; `enforced` acts.
        created_at: ISO 8601, UTC.
        route: What happens to a flagged request.
        route_reason: Who chose it, and by which figures.
        weights: How strongly its adapter acts, by the score.
        least_score: Score below which it is never hit; None sets none. Removing other targets would
            lower its threshold, and so change answers: it is kept here where it was.
        rows: Rows of the forget set.
        answered_rows: Those of them that had an answer.
        detector: Calibration: threshold, false-positive rate, recall with interval, counts.
        corruption: `CorruptionSpec.to_dict()` and how its strength was found.
        adapter: Rank, loss and figures of the adapter in the target's folder; empty without one.
        notes: What the user should know, e.g. that the model doesn't know the target.
    """

    name: Annotated[str, AfterValidator(check_name)]
    status: TargetStatus
    created_at: str = Field(default_factory=now)
    route: TargetRoute = "corrupt"
    route_reason: str = "the default"
    weights: WeightPolicy = "monotone"
    least_score: float | None = None
    rows: Annotated[int, Field(ge=0)] = 0
    answered_rows: Annotated[int, Field(ge=0)] = 0
    detector: dict[str, Any] = Field(default_factory=dict)
    corruption: dict[str, Any] = Field(default_factory=dict)
    adapter: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)

    @property
    def prefix(self) -> str:
        """Folder of the target's files in the bundle, with a slash at the end."""
        return target_prefix(self.name)


class Manifest(_Strict):
    """A version of a bundle.

    Attributes:
        version: Counts up from 1.
        parent: The version that it was made from.
        key_id: `GuardKey.id` of the key that its secrets are under.
        model: Fingerprint of the model that it was learned for; empty before the first target.
        encoder: What the encoder is, and its reference scores.
        fpr_budget: Share of benign requests that may be flagged.
        targets: By name.
        files: By relative path; every file but the manifest and its seal.
    """

    schema_version: int = SCHEMA_VERSION
    version: Annotated[int, Field(ge=1)] = 1
    parent: int | None = None
    created_at: str = Field(default_factory=now)
    key_id: str = ""
    model: dict[str, Any] = Field(default_factory=dict)
    encoder: dict[str, Any] = Field(default_factory=dict)
    fpr_budget: Annotated[float, Field(gt=0, lt=1)] = 0.001
    targets: dict[str, TargetEntry] = Field(default_factory=dict)
    files: dict[Annotated[str, AfterValidator(check_path)], FileEntry] = Field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Encode as JSON that people can read.

        Raises:
            ArtifactError: If a figure in it is not valid (drafts are plain mutable objects).
        """
        for name, entry in self.targets.items():
            if entry.name != name:
                raise ArtifactError(f"the manifest lists target {entry.name!r} as {name!r}")
        try:
            checked = Manifest.model_validate(self.model_dump()).model_dump()
            text = json.dumps(checked, indent=1, sort_keys=True, allow_nan=False)
        except (ValueError, TypeError) as error:  # numbers that are not finite or not plain too
            raise ArtifactError(f"the manifest to be written is not valid: {error}") from error
        return text.encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> Manifest:
        """Decode.

        Args:
            data: The file's content.
            where: The file's path, for error messages.

        Raises:
            IncompatibleArtifactError: If a newer program wrote it.
            ArtifactError: If it is not a manifest.
        """
        try:
            value = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ArtifactError(f"{where} is not valid JSON: {error}") from error
        schema = value.get("schema_version") if isinstance(value, dict) else None
        if isinstance(schema, int) and schema > SCHEMA_VERSION:
            raise IncompatibleArtifactError(
                f"{where} has schema version {schema}, this program reads up to "
                f"{SCHEMA_VERSION}: upgrade unlearn-guard"
            )
        if schema != SCHEMA_VERSION:
            raise ArtifactError(f"{where} has no schema_version {SCHEMA_VERSION}")
        try:
            return cls.model_validate(value)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise ArtifactError(f"{where}: {place}: {first['msg']}") from error
