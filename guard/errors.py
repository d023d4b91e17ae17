"""All errors of the project.

    GuardError
      ConfigError (ValueError)             settings, flags, environment
        UnknownComponentError (KeyError)   a registry has no such name
      DataError (ValueError)               a row of an input file; names file, line and field
      RequestError (ValueError)            a client's request that cannot be accepted
      ArtifactError (RuntimeError)         bundle, model or key: missing, corrupt
        BundleNotFoundError                no bundle there
        IncompatibleArtifactError          made for another model, tokenizer or key
        TargetNotFoundError (KeyError)     no such target in the bundle
        TargetExistsError                  a target of that name is there already
      SelfCheckError (RuntimeError)        DESIGN section 9 failed: the guard must not enforce
      NotFittedError (RuntimeError)
      ShapeError (ValueError)
      StageError (RuntimeError)            a stage failed while a request was decided
      CannotCorruptError (RuntimeError)    a flagged text has no place for an embeddings part
      EngineError (RuntimeError)           what generates failed
        EngineBusyError                    queue full; try again after `retry_after_s`
        EngineUnavailableError (ConnectionError)
        EngineTimeoutError (TimeoutError)
        EngineRefusedError                 the engine answered a request with an error status

Each is the matching builtin too. A message says what was got, what is allowed and what to do.
Only `server/errors.py` turns them into HTTP, only `guard/cli.py` into exit codes.
"""

from __future__ import annotations


class GuardError(Exception):
    """Base of every error that the project raises on purpose."""


class ConfigError(GuardError, ValueError):
    """A setting that cannot be used."""


class UnknownComponentError(ConfigError, KeyError):
    """A registry was asked for a name that it doesn't have."""

    def __init__(self, kind: str, name: str, known: list[str], nearest: str | None) -> None:
        self.kind, self.name, self.known, self.nearest = kind, name, known, nearest
        hint = f"; did you mean {nearest!r}?" if nearest else ""
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {', '.join(known)})")

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(GuardError, ValueError):
    """A row of an input file is wrong.

    Args:
        message: What is wrong, and what is allowed.
        file: The file's name as the user gave it.
        line: One-based line number.
        field: Name of the field, or None when the row as a whole is wrong.
    """

    def __init__(
        self,
        message: str,
        *,
        file: str | None = None,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        self.file, self.line, self.field = file, line, field
        where = ":".join(str(part) for part in (file, line) if part is not None)
        what = f"field {field!r}: {message}" if field else message
        super().__init__(f"{where}: {what}" if where else what)


class RequestError(GuardError, ValueError):
    """A client's request that is refused before it reaches the engine.

    Args:
        message: What was wrong and what to do.
        status: HTTP status.
        type: OpenAI error type.
        code: OpenAI error code, machine readable.
        param: The field at fault, e.g. `messages[0].content`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        type: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        self.status, self.type, self.code, self.param = status, type, code, param
        super().__init__(message)


class ArtifactError(GuardError, RuntimeError):
    """Something on disk is missing, corrupt or unreadable."""


class BundleNotFoundError(ArtifactError):
    """There is no bundle at the given place."""


class IncompatibleArtifactError(ArtifactError):
    """An artifact was made for another model, tokenizer, encoder or key."""


class TargetNotFoundError(ArtifactError, KeyError):
    """The bundle holds no target of that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class TargetExistsError(ArtifactError):
    """The bundle holds a target of that name already."""


class SelfCheckError(GuardError, RuntimeError):
    """Engine, model files and bundle do not fit together; enforcing would be wrong."""


class NotFittedError(GuardError, RuntimeError):
    """Something was used before it was fitted."""


class ShapeError(GuardError, ValueError):
    """Arrays whose shapes do not fit together."""


class StageError(GuardError, RuntimeError):
    """A stage of the pipeline failed while it decided on a request.

    Args:
        stage: Name of the stage, e.g. `detect`.
        cause: The error that was raised there.
    """

    def __init__(self, stage: str, cause: BaseException) -> None:
        self.stage, self.cause = stage, cause
        super().__init__(f"stage {stage!r} failed: {type(cause).__name__}: {cause}")


class CannotCorruptError(GuardError, RuntimeError):
    """A flagged text stands where no embeddings part can take its place.

    Args:
        path: Where the text stands in the request.
        reason: Why it can't be replaced.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason = path, reason
        super().__init__(f"{path}: {reason}")


class EngineError(GuardError, RuntimeError):
    """What generates failed."""


class EngineBusyError(EngineError):
    """The engine's queue is full.

    Args:
        retry_after_s: Seconds after which a client should try again.
    """

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(message)


class EngineUnavailableError(EngineError, ConnectionError):
    """The engine can't be reached, or went away."""


class EngineTimeoutError(EngineError, TimeoutError):
    """The engine did not answer in time."""


class EngineRefusedError(EngineError):
    """The engine answered with an error status.

    Args:
        status: HTTP status of the engine's answer.
        body: The answer's body.
    """

    def __init__(self, status: int, body: bytes) -> None:
        self.status, self.body = status, body
        super().__init__(f"the engine answered {status}: {body[:300].decode(errors='replace')}")
