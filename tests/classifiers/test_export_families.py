import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import (
    BertConfig,
    CamembertConfig,
    DistilBertConfig,
    ElectraConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.models.auto import AutoModel

from classifiers.export import (
    ClassifierHead,
    encoder_shape,
    find_encoder_source,
    serving_tokenizer,
    write_classifier,
)
from guard.errors import IncompatibleArtifactError

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
    # Wide enough that a wrong row of a table shows.
    "initializer_range": 0.3,
}
FAMILIES = [
    BertConfig(**SIZES),
    ElectraConfig(**SIZES, embedding_size=32),
    RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1),
    XLMRobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=1),
    CamembertConfig(**SIZES, type_vocab_size=1, pad_token_id=1),
]


def head(pooling: Any, dense: bool) -> ClassifierHead:
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(2, 32)), rng.normal(size=2)
    layer = (rng.normal(size=(32, 32)) / 6, rng.normal(size=32))
    return ClassifierHead(
        pooling,
        weight.astype(np.float32),
        bias.astype(np.float32),
        (layer[0].astype(np.float32), layer[1].astype(np.float32)) if dense else None,
    )


def with_torch(model: Any, ids: np.ndarray, wanted: ClassifierHead) -> np.ndarray:
    with torch.no_grad():
        states = model(input_ids=torch.from_numpy(ids)).last_hidden_state[0].numpy()
    pooled = states.mean(axis=0) if wanted.pooling == "mean" else states[0]
    if wanted.dense is not None:
        pooled = np.tanh(wanted.dense[0] @ pooled + wanted.dense[1])
    return np.asarray(wanted.weight @ pooled + wanted.bias)


def with_onnx(model: Any, ids: np.ndarray, wanted: ClassifierHead, precision: Any) -> np.ndarray:
    shape, first = encoder_shape(model.config.to_dict())
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    content = write_classifier(weights, shape, wanted, first_position=first, precision=precision)
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"ids": ids})[0][0])


def build(config: Any) -> Any:
    torch.manual_seed(0)
    return AutoModel.from_config(config).eval()


@pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c.model_type)
@pytest.mark.parametrize(("pooling", "dense"), [("mean", False), ("cls", True)])
def test_a_family_with_a_head_agrees_with_torch(config: Any, pooling: str, dense: bool) -> None:
    model, wanted = build(config), head(pooling, dense)
    rng = np.random.default_rng(1)
    for length in (2, 11, 38):
        # Ids above the padding's: transformers derives RoBERTa's positions from the ids.
        ids = rng.integers(5, 60, (1, length))
        expected = with_torch(model, ids, wanted)
        np.testing.assert_allclose(
            with_onnx(model, ids, wanted, "float32"), expected, rtol=0, atol=2e-4
        )
        np.testing.assert_allclose(with_onnx(model, ids, wanted, "int8"), expected, rtol=0, atol=1)


def test_eight_bits_are_close_on_real_weights_and_a_quarter_of_the_size() -> None:
    model = AutoModel.from_pretrained(str(find_encoder_source())).eval()
    rng = np.random.default_rng(0)
    wanted = ClassifierHead(
        "mean", rng.normal(size=(2, 384)).astype(np.float32), np.zeros(2, np.float32)
    )
    ids = rng.integers(2000, 20000, (1, 24))
    expected = with_torch(model, ids, wanted)
    np.testing.assert_allclose(with_onnx(model, ids, wanted, "float32"), expected, atol=1e-4)
    rounded = with_onnx(model, ids, wanted, "int8")
    scale = float(np.linalg.norm(wanted.weight, axis=1).max())
    assert 0 < np.abs(rounded - expected).max() < 0.05 * scale


def test_a_classifier_is_written_the_same_way_twice() -> None:
    model, wanted = build(FAMILIES[2]), head("cls", True)
    shape, first = encoder_shape(model.config.to_dict())
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    first_time = write_classifier(weights, shape, wanted, first_position=first)
    assert first_time == write_classifier(weights, shape, wanted, first_position=first)
    assert len(first_time) < len(
        write_classifier(weights, shape, wanted, first_position=first, precision="float32")
    )


def test_first_positions_follow_the_padding_id() -> None:
    places = {c.model_type: encoder_shape(c.to_dict())[1] for c in FAMILIES}
    assert places == {"bert": 0, "electra": 0, "roberta": 2, "xlm-roberta": 2, "camembert": 2}
    moved = RobertaConfig(**SIZES, type_vocab_size=1, pad_token_id=3)
    assert encoder_shape(moved.to_dict())[1] == 4


@pytest.mark.parametrize(
    "config",
    [
        DistilBertConfig(vocab_size=60, dim=32, n_heads=4, n_layers=1),
        BertConfig(**SIZES, hidden_act="relu"),
        ElectraConfig(**SIZES, embedding_size=16),
    ],
)
def test_what_the_writer_does_not_know_is_refused(config: Any) -> None:
    with pytest.raises(IncompatibleArtifactError, match="cannot be exported"):
        encoder_shape(config.to_dict())


def test_relative_positions_are_refused() -> None:
    settings = {**FAMILIES[0].to_dict(), "position_embedding_type": "relative_key"}
    with pytest.raises(IncompatibleArtifactError, match="absolute"):
        encoder_shape(settings)


def test_a_missing_weight_is_named() -> None:
    model = build(FAMILIES[0])
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    del weights["encoder.layer.1.output.dense.bias"]
    shape, _ = encoder_shape(model.config.to_dict())
    with pytest.raises(IncompatibleArtifactError, match=r"layer\.1\.output\.dense\.bias"):
        write_classifier(weights, shape, head("mean", False))


def test_only_a_wordpiece_tokenizer_gets_its_words_cut() -> None:
    path: Path = find_encoder_source() / "tokenizer.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    cut = json.loads(serving_tokenizer(settings))
    assert cut["pre_tokenizer"]["type"] == "Sequence"
    assert settings["truncation"] is not None
    assert cut["truncation"] is None and cut["post_processor"] is None
    bytes_pairs = {**settings, "model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel"}}
    assert json.loads(serving_tokenizer(bytes_pairs))["pre_tokenizer"] == {"type": "ByteLevel"}
