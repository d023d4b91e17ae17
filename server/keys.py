"""Who may ask, and how much: API keys known by their SHA-256, each with limits of its own.

A file of keys is YAML, a list:

    - name: alice
      sha256: "…"                  # of the whole key, in hexadecimal
      requests_per_minute: 60      # as many at once, refilled evenly; None: no limit
      concurrent: 4                # requests in work at one time; None: no limit
      max_body_bytes: 200000       # None: the server's own limit

Keys are long random strings (`unlearn-guard key new`), so a plain hash of one can't be guessed.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import secrets
import time
from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from starlette.types import Scope

from guard.errors import ConfigError
from guard.follow import file_state
from guard.strict_yaml import parse_yaml, read_yaml
from server.errors import ApiError, ApiErrorRaised
from server.limits import header

if TYPE_CHECKING:
    from aiolimiter import AsyncLimiter

log = logging.getLogger("unlearn_guard.keys")

NAME: Final = "^[A-Za-z0-9._-]{1,64}\\Z"
_PREFIX: Final = "ug-"
_WHAT: Final = "API keys file"
_LOOK_S: Final = 1.0
_EMPTY: Final = hashlib.sha256(b"").hexdigest()

_Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class KeyEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One key of the file.

    Attributes:
        name: What logs and traces call it.
        sha256: Of the whole key, lower-case hexadecimal.
        requests_per_minute: As many at once, refilled evenly over a minute; None: no limit.
        concurrent: Requests in work at one time; None: no limit.
        max_body_bytes: Longest body, if shorter than the server's own limit.
    """

    name: Annotated[str, msgspec.Meta(pattern=NAME)]
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}\\Z")]
    requests_per_minute: _Count | None = None
    concurrent: _Count | None = None
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1_000)] | None = None


def new_key() -> str:
    """Draw a key: 256 random bits."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_key(key: str) -> str:
    """Return what the file holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> tuple[KeyEntry, ...]:
    """Read a file of keys.

    Raises:
        ConfigError: If it can't be read, or an entry is unknown, malformed or given twice.
    """
    return _entries(read_yaml(path, _WHAT), path)


def parse_keys(text: str, path: Path) -> tuple[KeyEntry, ...]:
    """Read the text of a file of keys; see `read_keys`."""
    return _entries(parse_yaml(text, f"{_WHAT} {path}"), path)


def _entries(value: Any, path: Path) -> tuple[KeyEntry, ...]:
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"{_WHAT} {path}: expected a list of entries `- name: …`")
    entries: dict[str, KeyEntry] = {}
    owners: dict[str, str] = {}
    for place, item in enumerate(value or (), 1):
        where = f"{_WHAT} {path}, entry {place}"
        entry = _entry(item, where)
        if entry.name in entries:
            raise ConfigError(f"{where}: the name {entry.name!r} is given twice")
        if entry.sha256 in owners:
            raise ConfigError(f"{where}: {entry.name!r} has the key of {owners[entry.sha256]!r}")
        entries[entry.name], owners[entry.sha256] = entry, entry.name
    return tuple(entries.values())


def _entry(item: Any, where: str) -> KeyEntry:
    try:
        entry = msgspec.convert(item, KeyEntry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}; `unlearn-guard key new` writes entries") from None
    if entry.sha256 == _EMPTY:
        raise ConfigError(f"{where}: sha256 is the hash of an empty key")
    return entry


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks.

    Attributes:
        name: The key's name; None where no key is asked for.
        max_body_bytes: Longest body of this caller; None: the server's own limit.
    """

    name: str | None = None
    max_body_bytes: int | None = None

    def body_limit(self, server_limit: int) -> int:
        """Return the longest body that is accepted from this caller."""
        own = self.max_body_bytes
        return server_limit if own is None else min(own, server_limit)


class KeyRing:
    """The keys that are accepted, and how much each has in work.

    Limits are kept in this process: with several, each counts for itself. Belongs to one event
    loop.

    Args:
        keys: Plain keys, without limits; named `api_keys[0]` and so on.
        file: File of hashed keys. It is read again when it changes; one that can't be used is
            reported and the keys stay as they were.

    Raises:
        ConfigError: If the file can't be used now.
    """

    def __init__(self, keys: Iterable[str] = (), file: Path | None = None) -> None:
        self._plain = tuple(
            KeyEntry(f"api_keys[{place}]", hash_key(key)) for place, key in enumerate(keys)
        )
        if any(entry.sha256 == _EMPTY for entry in self._plain):
            raise ConfigError("api_keys holds an empty key; leave it out")
        self._file = file
        self._secret = secrets.token_bytes(32)
        self._in_work: dict[str, int] = {}
        self._rates: dict[str, AsyncLimiter] = {}
        self._signature = None if file is None else file_state(file)
        self._look_at = time.monotonic() + _LOOK_S
        self._take(() if file is None else read_keys(file))

    def __bool__(self) -> bool:
        """True if a key is asked for; a file without entries lets nobody in."""
        return bool(self._plain) or self._file is not None

    def check(self, scope: Scope) -> Caller:
        """Say who asks, without counting it.

        Raises:
            ApiErrorRaised: 401, if a key is asked for and the request carries none of them.
        """
        entry = self._find(scope) if self else None
        return Caller() if entry is None else Caller(entry.name, entry.max_body_bytes)

    def admit(self, scope: Scope) -> AbstractAsyncContextManager[Caller]:
        """Count a request for as long as it is in work.

        Raises:
            ApiErrorRaised: 401 without a key; 429 with `retry-after` beyond the key's limits. On
                entering.
        """
        return _Admission(self, scope)

    async def begin(self, scope: Scope) -> tuple[KeyEntry | None, Caller]:
        """Let a request in; whoever gets an entry gives it back to `end`."""
        entry = self._find(scope) if self else None
        if entry is None:
            return None, Caller()
        self._begin(entry)
        if entry.requests_per_minute is not None:
            try:
                await self._spend(entry, entry.requests_per_minute)
            except BaseException:
                self.end(entry)
                raise
        return entry, Caller(entry.name, entry.max_body_bytes)

    def _begin(self, entry: KeyEntry) -> None:
        count = self._in_work.get(entry.name, 0)
        if entry.concurrent is not None and count >= entry.concurrent:
            what = f"{entry.concurrent} requests in work at one time"
            raise ApiErrorRaised(_too_many(what, retry_after_s=1))
        self._in_work[entry.name] = count + 1

    def end(self, entry: KeyEntry) -> None:
        """Count a request no longer."""
        left = self._in_work.pop(entry.name) - 1
        if left:
            self._in_work[entry.name] = left

    async def _spend(self, entry: KeyEntry, rate: int) -> None:
        limiter = self._rates.get(entry.name)
        if limiter is None or limiter.max_rate != rate:
            from aiolimiter import AsyncLimiter

            limiter = self._rates[entry.name] = AsyncLimiter(rate, 60)
        if not limiter.has_capacity():
            # One request's worth leaks out of the bucket within this time.
            raise ApiErrorRaised(_too_many(f"{rate} requests a minute", math.ceil(60 / rate)))
        await limiter.acquire()

    def _find(self, scope: Scope) -> KeyEntry | None:
        self._refresh()
        scheme, _, token = (header(scope, b"authorization") or "").partition(" ")
        if not scheme:  # Anthropic's clients
            scheme, token = "bearer", header(scope, b"x-api-key") or ""
        entry = self._match(token.strip())
        if entry is None or scheme.lower() != "bearer":
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            challenge = (("www-authenticate", "Bearer"),)
            error = ApiError(401, message, code="invalid_api_key", headers=challenge)
            raise ApiErrorRaised(error)
        return entry

    def _match(self, token: str) -> KeyEntry | None:
        # What is looked up is keyed with a secret of this process, so the time of the look-up
        # tells nothing of how near a guess is, whatever the number of keys.
        tag = self._tag(token)
        known = self._met.get(tag)
        if known is not None:
            return known
        given = hash_key(token)
        entry = self._by_tag.get(self._tag(given))
        if entry is None or not hmac.compare_digest(given, entry.sha256):
            return None
        self._met[tag] = entry
        return entry

    def _tag(self, word: str) -> bytes:
        return hashlib.blake2b(word.encode(), key=self._secret, digest_size=32).digest()

    def _take(self, listed: tuple[KeyEntry, ...]) -> None:
        entries = (*self._plain, *listed)
        self._by_tag = {self._tag(entry.sha256): entry for entry in entries}
        self._met: dict[bytes, KeyEntry] = {}  # by the tag of a key itself: one hash instead of two
        names = {entry.name for entry in entries}
        self._rates = {name: rate for name, rate in self._rates.items() if name in names}

    def _refresh(self) -> None:
        """Read the file again if it has changed; looked at once a second."""
        now = time.monotonic()
        if self._file is None or now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        signature = file_state(self._file)
        if signature == self._signature:
            return
        self._signature = signature
        try:
            self._take(read_keys(self._file))
        except ConfigError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.warning("the API keys were read again: %d are listed", len(self._by_tag))


class _Admission(AbstractAsyncContextManager[Caller]):
    """A request in work; a class, because a generator takes thrice as long."""

    __slots__ = ("_entry", "_ring", "_scope")

    def __init__(self, ring: KeyRing, scope: Scope) -> None:
        self._ring, self._scope = ring, scope
        self._entry: KeyEntry | None = None

    async def __aenter__(self) -> Caller:
        self._entry, caller = await self._ring.begin(self._scope)
        return caller

    async def __aexit__(self, *_: object) -> None:
        if self._entry is not None:
            self._ring.end(self._entry)


def _too_many(what: str, retry_after_s: int) -> ApiError:
    message = f"this API key may have {what}; try again in {retry_after_s} s"
    code = "rate_limit_exceeded"
    return ApiError(429, message, "rate_limit_error", code, retry_after_s=retry_after_s)
