"""The model's input embeddings, read row by row from its safetensors files.

Only the rows asked for are read (memory-mapped). Where a family scales inside its embedding
function, the same scaling is applied here by a declared rule, so that a row is exactly what the
model itself would look up.
"""

from __future__ import annotations

import json
import math
import mmap
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, cast

import numpy as np

from guard.embeds import EmbedsDtype, round_bfloat16, widen_bfloat16
from guard.errors import ArtifactError, IncompatibleArtifactError, ShapeError
from guard.types import FloatArray

_NAMES: Final = (
    "model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "transformer.wte.weight",
    "wte.weight",
    "gpt_neox.embed_in.weight",
    "model.decoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "transformer.word_embeddings.weight",
    "word_embeddings.weight",
    "model.tok_embeddings.weight",
    "backbone.embeddings.weight",
    "embed_tokens.weight",
)
_DTYPES: Final[dict[str, tuple[EmbedsDtype, str]]] = {
    "F32": ("float32", "<f4"),
    "F16": ("float16", "<f2"),
    "BF16": ("bfloat16", "<u2"),
}
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_MAX_HEADER: Final = 100_000_000
_RMS_ROWS: Final = 4096

# Families whose embedding *function* scales. Granite, Falcon-H1 and others scale later in the
# forward pass, where embeddings sent by a client are scaled too: they need no rule.
_SCALES: Final[dict[str, Callable[[Mapping[str, Any]], float]]] = {
    "gemma": lambda config: math.sqrt(config["hidden_size"]),
    "gemma2": lambda config: math.sqrt(config["hidden_size"]),
    "gemma3": lambda config: math.sqrt(config["hidden_size"]),
    "gemma3_text": lambda config: math.sqrt(config["hidden_size"]),
    "gemma4": lambda config: math.sqrt(config["hidden_size"]),
    "gemma4_text": lambda config: math.sqrt(config["hidden_size"]),
    "minicpm": lambda config: float(config["scale_emb"]),
    "minicpm3": lambda config: float(config["scale_emb"]),
}


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a model's config that describes its language model."""
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, dict) else dict(config)


def embed_scale(config: Mapping[str, Any]) -> float:
    """Return what the family multiplies its embeddings with, before rounding to the dtype.

    Raises:
        IncompatibleArtifactError: The model also looks tokens up layer by layer, which embeddings
            alone can't carry.
    """
    if config.get("hidden_size_per_layer_input"):
        raise IncompatibleArtifactError(
            f"models of type {config.get('model_type')!r} with per-layer embeddings can't be "
            "guarded by embeddings: they read the token ids in every layer"
        )
    rule = _SCALES.get(str(config.get("model_type")))
    return rule(config) if rule else 1.0


class EmbeddingTable:
    """Rows of a model's input embeddings.

    Args:
        directory: The model's directory.
        config: Its language model's config (`text_config`).
        fetch: Makes a file of the model available locally, by its name.

    Raises:
        ArtifactError: There is no table, or it can't be read.
    """

    def __init__(
        self,
        directory: Path,
        config: Mapping[str, Any],
        fetch: Callable[[str], Path] | None = None,
    ) -> None:
        path, name = _find(directory, fetch or (lambda file: directory / file))
        offset, dtype, shape = _locate(path, name)
        self.name, self.dtype = name, _DTYPES[dtype][0]
        self.rows, self.hidden = shape
        hidden = config.get("hidden_size")
        if hidden is not None and hidden != self.hidden:
            raise ArtifactError(
                f"{name} in {path.name} has {self.hidden} columns, but the model's config says "
                f"hidden_size {hidden}; embeddings can't be sent to such a model"
            )
        self.scale = float(self._round(np.float32(embed_scale(config)).reshape(1))[0])
        self._stored: Any = np.memmap(path, _DTYPES[dtype][1], "r", offset, shape)

    def rows_of(self, ids: Sequence[int]) -> FloatArray:
        """Return the model's input embeddings of token ids.

        Returns:
            Shape (tokens, hidden), float32, family scaling applied.

        Raises:
            ShapeError: An id is outside of the table.
        """
        index = np.asarray(ids, dtype=np.int64).reshape(-1)
        if index.size and not (index.min() >= 0 and index.max() < self.rows):
            raise ShapeError(
                f"token ids must be in 0..{self.rows - 1}; got {index.min()}..{index.max()}"
            )
        plain = self._plain(index)
        return plain if self.scale == 1.0 else self._round(plain * np.float32(self.scale))

    def sample(self, count: int) -> FloatArray:
        """Return `count` rows spread evenly over the table, as stored, shape (count, hidden)."""
        rows = self._plain(np.unique(np.linspace(0, self.rows - 1, count).astype(np.int64)))
        self.give_back()
        return rows

    def give_back(self) -> None:
        """Let go of what was read of the file: else what lies around each row stays in memory."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._stored._mmap.madvise(mmap.MADV_DONTNEED)

    @cached_property
    def rms(self) -> float:
        """Root mean square of the scaled embeddings, over evenly spread rows."""
        values = self.sample(_RMS_ROWS).astype(np.float64) * self.scale
        return float(np.sqrt(np.mean(values**2)))

    def _plain(self, index: Any) -> FloatArray:
        stored = self._stored[index]
        if self.dtype == "bfloat16":
            return widen_bfloat16(stored)
        return cast(FloatArray, stored.astype(np.float32))

    def _round(self, values: Any) -> FloatArray:
        """Round to the table's dtype, as a product in that dtype is."""
        if self.dtype == "bfloat16":
            return widen_bfloat16(round_bfloat16(values))
        if self.dtype == "float16":
            return cast(FloatArray, values.astype(np.float16).astype(np.float32))
        return cast(FloatArray, values.astype(np.float32))


def _find(directory: Path, fetch: Callable[[str], Path]) -> tuple[Path, str]:
    """Return the file and the name of the table."""
    index = directory / _INDEX
    try:
        if index.is_file():
            files: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        else:
            path = fetch(_SINGLE)
            files = dict.fromkeys(_header(path)[1], _SINGLE)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"no readable safetensors weights in {directory} ({type(error).__name__}: {error}); "
            f"expected {_SINGLE} or {_INDEX}. Found: {_listing(directory)}"
        ) from error
    name = next((name for name in _NAMES if name in files), None)
    if name is None:
        embedding_like = sorted(n for n in files if "emb" in n or "wte" in n)[:10]
        raise ArtifactError(
            f"no input-embedding table known in {directory}: none of {', '.join(_NAMES)}; "
            f"names that look like one: {', '.join(embedding_like) or 'none'}"
        )
    file = files[name]
    if Path(file).name != file:
        raise ArtifactError(f"{index} names a file outside of the model's directory: {file!r}")
    return fetch(file), name


def _listing(directory: Path) -> str:
    return ", ".join(sorted(path.name for path in directory.glob("*"))[:20]) or "nothing"


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data begins, and the entries, of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
            raise ValueError(f"{path.name} is not a safetensors file")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def _locate(path: Path, name: str) -> tuple[int, str, tuple[int, int]]:
    """Return byte offset, safetensors dtype and shape of a tensor."""
    try:
        start, entries = _header(path)
        entry = entries[name]
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{name} can't be read from {path}: {error}") from error
    if dtype not in _DTYPES:
        raise ArtifactError(
            f"{name} in {path.name} has dtype {dtype}; the guard reads {', '.join(_DTYPES)}. Give "
            "it a directory with the unquantised model"
        )
    item = np.dtype(_DTYPES[dtype][1]).itemsize
    if len(shape) != 2 or end - begin != shape[0] * shape[1] * item:
        raise ArtifactError(f"{name} in {path.name} has shape {shape} and {end - begin} bytes")
    if start + end > path.stat().st_size:
        raise ArtifactError(f"{path} is cut off: {name} ends beyond the file")
    return start + begin, dtype, (shape[0], shape[1])
