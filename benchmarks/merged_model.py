"""Plain model directories that appear when they are whole, and know what they were made of."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from guard.disk import TEMPORARY, hash_file
from guard.errors import ConfigError
from guard.model_files import read_config

log = logging.getLogger(__name__)

MERGED_FILE: Final = "merged.json"
"""In each model's folder: what it was merged from, and the hashes of its files. Written last."""

# What an engine needs beside weights and config; none of it changes by training.
_CARRIED: Final = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
)


def write_model(folder: Path, model: Any, base: Path, source: Mapping[str, str]) -> None:
    """Write a plain model directory that any engine loads.

    Args:
        folder: An empty folder.
        model: A transformers model.
        base: Directory of the model that it was made from: tokenizer and template are its.
        source: What it was made of, by name; `is_whole` compares it.
    """
    model.save_pretrained(folder)
    config = read_config(folder)
    for key in ("_name_or_path", "name_or_path"):  # where this machine had it
        config.pop(key, None)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    for pattern in _CARRIED:
        for path in base.glob(pattern):
            place = folder / path.relative_to(base)
            place.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, place)
    files = {}
    for path in sorted(one for one in folder.rglob("*") if one.is_file()):
        path.chmod(0o644)
        files[str(path.relative_to(folder))] = hash_file(path)[0]
    merged = {"source": dict(source), "files": files}
    (folder / MERGED_FILE).write_text(json.dumps(merged, indent=1) + "\n", encoding="utf-8")


def is_whole(target: Path, source: Mapping[str, str]) -> bool:
    """Say whether a model is there, made of `source`, with the files it was made with.

    Raises:
        ConfigError: If it is made of something else.
    """
    if not target.exists():
        return False
    try:
        merged = json.loads((target / MERGED_FILE).read_bytes())
        made_of, files = dict(merged["source"]), dict(merged["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{target} is there already, and not by this command ({error}); delete it or give "
            "another folder"
        ) from error
    if made_of != dict(source):
        raise ConfigError(
            f"{target} was made of another base model or adapter; delete it or give another folder"
        )
    damaged = [name for name, sha in files.items() if not _has_hash(target / name, sha)]
    if damaged:
        log.warning("%s is damaged (%s); making it anew", target, damaged[0])
    return not damaged


def _has_hash(path: Path, sha: str) -> bool:
    return path.is_file() and hash_file(path)[0] == sha


@contextmanager
def built(target: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes the target's place when the block ends well."""
    folder = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{target.name}-", dir=target.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if target.exists():  # damaged; moved aside at once, lest a part of it stays
            os.replace(target, folder.with_name(f"{folder.name}-old"))
        os.replace(folder, target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder.with_name(f"{folder.name}-old"), ignore_errors=True)
