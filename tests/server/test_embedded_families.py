"""Other model families through the same engine: small random models, compared with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    PretrainedConfig,
    Qwen3Config,
)

from guard.types import EmbedsPart, Message, Prompt, SamplingParams
from server.engines.embedded.model import EmbeddedModel

QUESTIONS = ("Hi", "Who wrote the longest of these books? Please tell me in many words.", "2+2?")
COMMON: dict[str, Any] = {"vocab_size": 49152, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = {
    **COMMON,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 2,
}
FAMILIES = (
    GPT2Config(n_embd=64, n_layer=2, n_head=4, **COMMON),
    Qwen3Config(**SMALL),
    # Scaled embeddings and a sliding window that the prompts outgrow.
    Gemma3TextConfig(
        sliding_window=16, layer_types=["sliding_attention", "full_attention"], **SMALL
    ),
)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config.model_type)
def test_a_family_answers_and_scores_as_transformers_does(
    config: PretrainedConfig, smollm2_dir: Path
) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    network = AutoModelForCausalLM.from_config(config)
    model = EmbeddedModel(network, tokenizer)
    params = SamplingParams(max_tokens=8)
    prompts: list[Prompt] = [(Message("user", question),) for question in QUESTIONS]
    texts = model.generate(prompts, params)
    assert texts == [model.generate([prompt], params)[0] for prompt in prompts]
    spliced = [spell(model, question) for question in QUESTIONS]
    assert model.generate(spliced, params) == texts
    for prompt, text, scores in zip(
        prompts, texts, model.score_answers(spliced, texts), strict=True
    ):
        np.testing.assert_allclose(scores, direct(model, prompt, text), atol=1e-4)


def spell(model: EmbeddedModel, question: str) -> Prompt:
    ids = model.tokenizer.encode(question, add_special_tokens=False)
    return (Message("user", EmbedsPart(model.embed_tokens(ids))),)


def direct(model: EmbeddedModel, prompt: Prompt, text: str) -> Any:
    ids = model.encoder.prompt(prompt).ids
    target = model.tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        logits = model.model(input_ids=torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None])[:, 0].numpy()
