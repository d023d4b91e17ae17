"""Packaged models as plain Hugging Face directories, made once from their GGUF files.

The packages (`server.engines.embedded.packaged`) carry quantised weights. They are dequantised to
float32, tensor by tensor, and verified by hash whenever the directory is used again.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from guard.errors import ArtifactError
from guard.types import FloatArray, Progress
from server.engines.embedded.packaged import EXTRA_HINT, SMOLLM2, PackagedModel

log = logging.getLogger(__name__)

MODEL_NAME: Final = SMOLLM2.name
MANIFEST: Final = "prepared.json"
FORMAT: Final = 1
"""Raised when what is written changes, so that older caches are made anew."""

_TOP_NAMES: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
# What transformers records about the machine that converted the tokenizer.
_MACHINE_KEYS: Final = ("is_local", "local_files_only", "_name_or_path", "_model_name_or_path")


def prepare_smollm2(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """Prepare the model that is served where none is named; see `prepare_model`.

    Raises:
        ArtifactError: The package or an extra is missing, or its file isn't the expected one.
    """
    return prepare_model(SMOLLM2, cache_dir, progress)


def prepare_model(
    model: PackagedModel, cache_dir: Path | None = None, progress: Progress | None = None
) -> Path:
    """Return the directory of a dequantised model, making it first if it isn't there.

    Safe for several processes: one makes it, the others wait. An interrupted run leaves nothing
    behind that a later one would take for a model.

    Args:
        model: Which packaged model.
        cache_dir: Folder of the cache; the user's cache directory when None.
        progress: Called with what is done, e.g. `dequantise SmolLM2-135M-Instruct`.

    Returns:
        A directory that `transformers` and vLLM load: config, float32 safetensors, tokenizer and
        chat template.

    Raises:
        ArtifactError: A package or an extra is missing, or the file isn't the expected one.
    """
    from filelock import FileLock

    report = progress or _silent
    root = _cache_root(cache_dir)
    root.mkdir(parents=True, exist_ok=True)
    target = root / f"{model.name}-{model.sha256[:8]}-v{FORMAT}"
    with FileLock(f"{target}.lock"):
        if target.exists():
            fault = find_fault(target, report, model)
            if fault is None:
                return target
            log.warning("the prepared model is damaged (%s); making it anew", fault)
            shutil.rmtree(target)
        for leftover in root.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        _make(model, target, report)
    return target


def find_fault(
    directory: Path, progress: Progress | None = None, model: PackagedModel = SMOLLM2
) -> str | None:
    """Say what is wrong with a prepared directory, or return None if every hash is right."""
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        files = dict(manifest["files"])
        if manifest["format"] != FORMAT or manifest["source_sha256"] != model.sha256:
            return f"{MANIFEST} is of another version"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read: {error}"
    for done, (name, digest) in enumerate(sorted(files.items()), start=1):
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} doesn't have the hash that was recorded"
        (progress or _silent)(f"verify {model.name}", done, len(files))
    return None


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _silent(what: str, done: int, total: int) -> None:
    """Draw nothing."""


def _cache_root(cache_dir: Path | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    from platformdirs import user_cache_path

    return user_cache_path("unlearn-guard") / "models"


def _make(model: PackagedModel, target: Path, report: Progress) -> None:
    missing = [m for m in ("gguf", "torch", "transformers") if not importlib.util.find_spec(m)]
    if missing:
        raise ArtifactError(f"the embedded engine needs {', '.join(missing)}; {EXTRA_HINT}")
    temporary = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=target.parent))
    try:
        joined, made = temporary / "gguf", temporary / "model"
        joined.mkdir()
        made.mkdir()
        _write_model(model, model.whole_file(joined), made, report)
        _write_manifest(model, made)
        os.chmod(made, 0o755)
        os.replace(made, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_model(model: PackagedModel, source: Path, directory: Path, report: Progress) -> None:
    from safetensors.numpy import save_file

    config = _write_config_and_tokenizer(model, source, directory, report)
    tensors = _dequantise(model, source, config, report)
    # `format: pt` is what transformers asks of a checkpoint; the tensors are plain float32.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def _write_config_and_tokenizer(
    model: PackagedModel, source: Path, directory: Path, report: Progress
) -> dict[str, Any]:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    what = f"read tokenizer of {model.name}"
    report(what, 0, 2)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    report(what, 1, 2)
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.architectures, config.dtype = [model.architecture], "float32"
    if model.turn_end is not None:
        ends = [config.eos_token_id, tokenizer.convert_tokens_to_ids(model.turn_end)]
        config.eos_token_id = ends
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.chat_template = model.chat_template or tokenizer.chat_template
    tokenizer.save_pretrained(directory)
    report(what, 2, 2)
    _edit_json(directory / "tokenizer_config.json", _drop_machine_keys)
    return _edit_json(directory / "config.json", _drop_machine_keys)


def _drop_machine_keys(settings: dict[str, Any]) -> None:
    for key in _MACHINE_KEYS:
        settings.pop(key, None)


def _edit_json(path: Path, edit: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    edit(settings)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return settings


def _dequantise(
    model: PackagedModel, source: Path, config: dict[str, Any], report: Progress
) -> dict[str, FloatArray]:
    """Return the model's tensors under their Hugging Face names, float32."""
    import gguf

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    quantised = gguf.GGUFReader(source).tensors
    tensors: dict[str, FloatArray] = {}
    for done, tensor in enumerate(quantised, start=1):
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        if tensor.name.startswith("blk."):
            _, layer, kind, _ = tensor.name.split(".")
            if model.rotary_pairs and kind in heads:
                values = _rotary_halves(values, heads[kind])
            name = f"model.layers.{layer}.{model.layer_names[kind]}.weight"
        else:
            name = _TOP_NAMES[tensor.name]
        if model.norm_shift and tensor.name.endswith("norm.weight"):
            values = values - np.float32(model.norm_shift)
        tensors[name] = np.ascontiguousarray(values)
        report(f"dequantise {model.name}", done, len(quantised))
    return tensors


def _rotary_halves(weight: FloatArray, heads: int) -> FloatArray:
    """Undo GGUF's row order: it stores rotary pairs side by side, Llama in two halves."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _write_manifest(model: PackagedModel, directory: Path) -> None:
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    for name in files:
        os.chmod(directory / name, 0o644)
    manifest = {
        "format": FORMAT,
        "model": model.name,
        "source": model.file,
        "source_sha256": model.sha256,
        "files": files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
