"""The files of a Hugging Face model that the guard reads: where they are, what they must hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer

from guard.errors import ArtifactError

_TRIM: Final = re.compile(r'("trim_offsets"\s*:\s*)true')
_SMALL_FILES: Final = ("*.json", "*.jinja", "additional_chat_templates/*.jinja")
_NOT_HASHED: Final = frozenset({"version", "truncation", "padding"})


def sha256_of(data: bytes) -> str:
    """Return the SHA-256 of `data` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def find_model(model: str | Path) -> tuple[Path, Callable[[str], Path]]:
    """Return the model's directory, and how to get one more of its files.

    Raises:
        ArtifactError: There is no such model.
    """
    directory = Path(model)
    if directory.is_dir():
        return directory, lambda file: directory / file
    name = str(model)
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ArtifactError(f"there is no model directory {name!r}")
    from huggingface_hub import hf_hub_download, snapshot_download

    try:
        local = Path(snapshot_download(name, allow_patterns=list(_SMALL_FILES)))
    except Exception as error:  # the hub's client raises many unrelated types
        raise ArtifactError(
            f"{name!r} is neither a model directory nor a model that the Hugging Face hub (or its "
            f"local cache) gives: {type(error).__name__}: {error}"
        ) from error

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(name, file))
        except Exception as error:
            raise OSError(f"{file} of {name} can't be fetched: {error}") from error

    return local, fetch


def read_config(directory: Path) -> dict[str, Any]:
    """Read the model's config.json.

    Raises:
        ArtifactError: It is missing or no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} can't be read ({error}); give the directory of a Hugging Face model"
        ) from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} does not hold a JSON object")
    return config


def read_tokenizer(directory: Path) -> tuple[Tokenizer, str]:
    """Read the tokenizer and hash what it does, however the file is laid out.

    Raises:
        ArtifactError: There is no readable tokenizer.json.
    """
    path = directory / "tokenizer.json"
    try:
        text = path.read_text(encoding="utf-8")
        # Offsets must cover the spaces too, or tokens of white space at a border are lost.
        tokenizer = Tokenizer.from_str(_TRIM.sub(r"\1false", text))
        parsed = json.loads(text)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ArtifactError(
            f"{path} can't be read ({error}); the guard needs the fast tokenizer's tokenizer.json"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kept = {key: parsed.get(key) for key in sorted(parsed) if key not in _NOT_HASHED}
    return tokenizer, sha256_of(json.dumps(kept, sort_keys=True).encode())
