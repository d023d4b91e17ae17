"""The guard's secret, kept outside the bundle, and what is derived from it.

One 32-byte secret keys the encrypted lexicon, the digests in bundle and ledger, and the noise.
Each use has its own subkey (HKDF-SHA256, RFC 5869), so that none says anything about another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from guard.errors import ArtifactError, ConfigError, IncompatibleArtifactError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_BYTES = 32
ENV_KEY = "UNLEARN_GUARD_KEY"
_SALT = b"unlearn-guard/key/v1"
_MAGIC = b"UGE1"
_ID_BYTES = 8
_NONCE_BYTES = 12
_HEADER_BYTES = len(_MAGIC) + _ID_BYTES + _NONCE_BYTES


class GuardKey:
    """The secret of one bundle and its replicas.

    Args:
        secret: 32 random bytes.

    Raises:
        ConfigError: If `secret` has another length.
    """

    def __init__(self, secret: bytes) -> None:
        if len(secret) != KEY_BYTES:
            raise ConfigError(f"a key of {len(secret)} bytes; expected {KEY_BYTES}")
        self._secret = secret
        self._subkeys: dict[str, bytes] = {}
        self._id = self.subkey("key-id")[:_ID_BYTES]

    @classmethod
    def generate(cls) -> GuardKey:
        """Draw a new key."""
        return cls(secrets.token_bytes(KEY_BYTES))

    @classmethod
    def from_base64(cls, text: str, where: str = "the key") -> GuardKey:
        """Read a key from base64 (standard or URL-safe).

        Args:
            text: The encoded key; white space around it is ignored.
            where: Where it came from, for the error message. The key itself is never shown.

        Raises:
            ConfigError: If it isn't the base64 of 32 bytes.
        """
        try:
            standard = text.strip().replace("-", "+").replace("_", "/")
            secret = base64.b64decode(standard, validate=True)
        except (binascii.Error, ValueError):
            secret = b""
        if len(secret) != KEY_BYTES:
            raise ConfigError(
                f"{where} is not a key: expected the base64 of {KEY_BYTES} bytes "
                "(such as `openssl rand -base64 32` prints)"
            )
        return cls(secret)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> GuardKey | None:
        """Read the key from UNLEARN_GUARD_KEY; None if that isn't set.

        Raises:
            ConfigError: If it is set to something else than a key.
        """
        text = (os.environ if environ is None else environ).get(ENV_KEY)
        return cls.from_base64(text, f"environment variable {ENV_KEY}") if text else None

    @classmethod
    def load(cls, path: str | Path) -> GuardKey:
        """Read a key file.

        Raises:
            ConfigError: If there is none, it can't be read, or it holds no key.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="ascii")
        except FileNotFoundError:
            raise ConfigError(
                f"no key file at {path}: give the one that the bundle was made with "
                f"(--key-file, or {ENV_KEY})"
            ) from None
        except UnicodeDecodeError:
            text = ""
        except OSError as error:
            raise ConfigError(f"key file {path} can't be read: {error.strerror}") from error
        return cls.from_base64(text, f"key file {path}")

    @classmethod
    def load_or_create(cls, path: str | Path, create: bool = False) -> GuardKey:
        """Read a key file, or make it, readable by its owner alone, if `create` is true.

        Two processes that create it at once end up with the same key.

        Raises:
            ConfigError: If there is none and `create` is false, or it holds no key.
            ArtifactError: If it can't be written.
        """
        path = Path(path)
        if create and not path.exists():
            try:
                _create_key_file(path)
            except OSError as error:
                raise ArtifactError(
                    f"key file {path} can't be written: {error.strerror}"
                ) from error
        return cls.load(path)

    @property
    def id(self) -> str:
        """Public name of the key: says whether two keys are the same, and nothing else."""
        return self._id.hex()

    def subkey(self, purpose: str) -> bytes:
        """Derive the 32-byte key of one purpose."""
        found = self._subkeys.get(purpose)
        if found is None:
            found = self._subkeys[purpose] = _hkdf(self._secret, purpose)
        return found

    def digest(self, purpose: str, data: bytes) -> str:
        """Return the HMAC-SHA256 of `data` under the purpose's subkey, as 64 hex digits."""
        return hmac.new(self.subkey(purpose), data, hashlib.sha256).hexdigest()

    def encrypt(self, purpose: str, data: bytes, aad: bytes = b"") -> bytes:
        """Encrypt and authenticate with AES-256-GCM under the purpose's subkey.

        Args:
            purpose: Names the subkey.
            data: What to hide.
            aad: What the result is bound to, not hidden: its path in the bundle, so that two
                encrypted files can't be swapped.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._cipher(purpose).encrypt(nonce, data, _bind(purpose, aad))
        return _MAGIC + self._id + nonce + sealed

    def decrypt(self, purpose: str, data: bytes, aad: bytes = b"") -> bytes:
        """Undo `encrypt`.

        Raises:
            IncompatibleArtifactError: If another key was used.
            ArtifactError: If the data is not the guard's, or was altered or moved.
        """
        from cryptography.exceptions import InvalidTag

        if len(data) < _HEADER_BYTES or not data.startswith(_MAGIC):
            raise ArtifactError("not encrypted by this program, or cut short")
        self.check_id(data[len(_MAGIC) : len(_MAGIC) + _ID_BYTES].hex())
        nonce, sealed = data[_HEADER_BYTES - _NONCE_BYTES : _HEADER_BYTES], data[_HEADER_BYTES:]
        try:
            return self._cipher(purpose).decrypt(nonce, sealed, _bind(purpose, aad))
        except InvalidTag:
            raise ArtifactError(
                f"encrypted data ({purpose}) was altered, or stands in another place than it "
                "was written for"
            ) from None

    def check_id(self, key_id: str) -> None:
        """Compare with the id of the key that an artifact was made with.

        Raises:
            IncompatibleArtifactError: If they differ.
        """
        if key_id != self.id:
            raise IncompatibleArtifactError(
                f"made with key {key_id}, but the key given is {self.id}: give the key of that "
                f"bundle (--key-file, or {ENV_KEY})"
            )

    def _cipher(self, purpose: str) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self.subkey(f"encrypt/{purpose}"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GuardKey):
            return NotImplemented
        return hmac.compare_digest(self._secret, other._secret)

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"GuardKey(id={self.id!r})"

    def __reduce__(self) -> str:
        raise TypeError("a key is not to be pickled")


def default_key_file(bundle_root: str | Path) -> Path:
    """Return the key's usual place: beside the bundle, not in it, e.g. `bundles/default.key`."""
    root = Path(os.path.abspath(bundle_root))
    return root.with_name(root.name + ".key")


def key_file_warning(path: str | Path) -> str | None:
    """Say what is wrong with a key file's permissions, or None if it is readable by one alone."""
    mode = stat.S_IMODE(Path(path).stat().st_mode)
    if mode & 0o077 == 0:
        return None
    return f"key file {path} has mode {mode:04o}: others may read it; run `chmod 600 {path}`"


def _create_key_file(path: Path) -> None:
    """Write a new key under a name of its own, then link it to `path` if that is still free."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(base64.b64encode(secrets.token_bytes(KEY_BYTES)) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return  # another process was first: its key is the key
    finally:
        temporary.unlink()
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _hkdf(secret: bytes, purpose: str) -> bytes:
    """HKDF-SHA256 (RFC 5869) for one block of output."""
    extracted = hmac.new(_SALT, secret, hashlib.sha256).digest()
    return hmac.new(extracted, purpose.encode() + b"\x01", hashlib.sha256).digest()


def _bind(purpose: str, aad: bytes) -> bytes:
    return purpose.encode() + b"\x00" + aad
