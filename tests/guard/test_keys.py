import base64
import os
import pickle
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given
from hypothesis import strategies as st

from guard.errors import ArtifactError, ConfigError, IncompatibleArtifactError
from guard.keys import GuardKey, default_key_file, key_file_warning

KEY = GuardKey(b"k" * 32)


def test_a_created_key_file_is_private_and_gives_the_same_key_again(tmp_path: Path) -> None:
    path = tmp_path / "bundles" / "default.key"
    os.umask(os.umask(0))  # whatever the umask is, the file is private

    key = GuardKey.load_or_create(path, create=True)

    assert path.stat().st_mode & 0o777 == 0o600
    assert key_file_warning(path) is None
    assert GuardKey.load(path) == key == GuardKey.load_or_create(path, create=True)
    assert sorted(p.name for p in path.parent.iterdir()) == ["default.key"]


def test_without_leave_no_key_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no key file at"):
        GuardKey.load_or_create(tmp_path / "a.key", create=False)
    assert not list(tmp_path.iterdir())


def test_creators_at_once_agree_on_one_key(tmp_path: Path) -> None:
    keys: list[GuardKey] = []
    threads = [
        threading.Thread(
            target=lambda: keys.append(GuardKey.load_or_create(tmp_path / "a.key", create=True))
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len({key.id for key in keys}) == 1
    assert len(keys) == 8


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises((ArtifactError, ConfigError), match="key file"):
        GuardKey.load_or_create(tmp_path / "file" / "a.key", create=True)


def test_a_readable_key_file_is_warned_of(tmp_path: Path) -> None:
    path = tmp_path / "a.key"
    GuardKey.load_or_create(path, create=True)
    path.chmod(0o644)

    assert "chmod 600" in (key_file_warning(path) or "")
    GuardKey.load(path)  # a warning, no refusal


@pytest.mark.parametrize("content", [b"", b"short", base64.b64encode(b"k" * 31), b"\xff" * 44])
def test_what_is_no_key_is_refused_without_showing_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.key"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match="base64 of 32 bytes") as caught:
        GuardKey.load(path)
    assert "short" not in str(caught.value)


def test_the_environment_gives_a_key() -> None:
    text = base64.b64encode(b"k" * 32).decode()

    assert GuardKey.from_env({"UNLEARN_GUARD_KEY": text}) == KEY
    assert GuardKey.from_env({}) is None
    with pytest.raises(ConfigError, match="UNLEARN_GUARD_KEY"):
        GuardKey.from_env({"UNLEARN_GUARD_KEY": "nonsense"})


def test_both_alphabets_of_base64_are_read() -> None:
    secret = bytes(range(224, 256))

    assert GuardKey.from_base64(base64.urlsafe_b64encode(secret).decode()) == GuardKey(secret)
    assert GuardKey.from_base64(base64.b64encode(secret).decode() + "\n") == GuardKey(secret)


@given(st.binary(min_size=32, max_size=32), st.text(max_size=20))
def test_subkeys_are_those_of_the_rfc(secret: bytes, purpose: str) -> None:
    expected = HKDF(hashes.SHA256(), 32, b"unlearn-guard/key/v1", purpose.encode()).derive(secret)

    assert GuardKey(secret).subkey(purpose) == expected


@given(st.binary(max_size=300), st.binary(max_size=30))
def test_what_is_encrypted_comes_back(data: bytes, aad: bytes) -> None:
    sealed = KEY.encrypt("lexicon", data, aad)

    assert KEY.decrypt("lexicon", sealed, aad) == data
    assert len(data) < 8 or data not in sealed


def test_the_same_text_is_never_encrypted_the_same() -> None:
    assert KEY.encrypt("lexicon", b"x") != KEY.encrypt("lexicon", b"x")


def test_another_key_is_named_not_shown() -> None:
    other = GuardKey(b"o" * 32)

    with pytest.raises(IncompatibleArtifactError, match=f"{KEY.id}.*{other.id}"):
        other.decrypt("lexicon", KEY.encrypt("lexicon", b"x"))


@pytest.mark.parametrize("aad", [b"", b"targets/b/lexicon.enc"])
def test_encrypted_data_is_bound_to_its_place(aad: bytes) -> None:
    sealed = KEY.encrypt("lexicon", b"x", b"targets/a/lexicon.enc")

    with pytest.raises(ArtifactError, match="altered"):
        KEY.decrypt("lexicon", sealed, aad)
    with pytest.raises(ArtifactError, match="altered"):
        KEY.decrypt("other", sealed, b"targets/a/lexicon.enc")


def test_every_byte_of_encrypted_data_counts() -> None:
    sealed = KEY.encrypt("lexicon", b"some names")
    for at in range(len(sealed)):
        changed = bytearray(sealed)
        changed[at] ^= 1
        with pytest.raises(ArtifactError):
            KEY.decrypt("lexicon", bytes(changed))
        with pytest.raises(ArtifactError):
            KEY.decrypt("lexicon", sealed[:at])


def test_digests_differ_by_key_and_purpose() -> None:
    digests = {
        KEY.digest("rows", b"x"),
        KEY.digest("requests", b"x"),
        KEY.digest("rows", b"y"),
        GuardKey(b"o" * 32).digest("rows", b"x"),
    }

    assert len(digests) == 4
    assert KEY.digest("rows", b"x") == GuardKey(b"k" * 32).digest("rows", b"x")


def test_a_key_does_not_leak() -> None:
    assert repr(KEY) == str(KEY) == f"GuardKey(id='{KEY.id}')"
    assert len(KEY.id) == 16
    assert GuardKey.generate() != KEY
    assert KEY != "kkk"
    assert len({KEY, GuardKey(b"k" * 32)}) == 1
    with pytest.raises(TypeError):
        pickle.dumps(KEY)


def test_the_key_stands_beside_the_bundle_not_in_it() -> None:
    assert default_key_file("/srv/bundles/default") == Path("/srv/bundles/default.key")
    assert default_key_file("bundles/default/") == Path.cwd() / "bundles/default.key"
    assert default_key_file("bundles/v1.2") == Path.cwd() / "bundles/v1.2.key"
