"""A tiny random Gemma 3 with a SentencePiece-like tokenizer, as a model directory and as GGUF."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from guard.prompts import ModelPrompts
from server.engines.base import Engine
from server.engines.embedded.packaged import GEMMA3
from server.selfcheck import self_check

SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
LINE_ENDS = tuple("\n" * n for n in range(1, 4))
BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
HIDDEN = 24
TURN_END = SPECIAL.index("<end_of_turn>")

_TEXT = (
    "user model system Who is Harry Potter? He is a wizard, and his friends are Ron and Hermione.",
    "The lighthouse on the island is painted red and white. Tell me about the lighthouse.",
    "What did you just read? Answer in one sentence. Name three rivers in Europe and a number.",
    "größer als der Rhein — the three primary colours are red, yellow and blue. 0123456789",
)


def require_self_check(engine: Engine, prompts: ModelPrompts) -> None:
    """Let the engine pass the self-check; Gemma's template has no tool role."""

    async def check() -> Any:
        await engine.start()
        try:
            return await self_check(engine, prompts)
        finally:
            await engine.close()

    report = asyncio.run(check())
    report.require()
    assert report.roles == {"system": "passed", "assistant": "passed", "tool": "refused"}


def gemma_tokenizer() -> Tokenizer:
    """Return a BPE tokenizer with Gemma's parts: `▁` for spaces, line ends whole, byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trainer = BpeTrainer(
        vocab_size=560, special_tokens=[*SPECIAL, *LINE_ENDS, *BYTES], show_progress=False
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # pieces as Gemma's
    tokenizer.train_from_iterator(_TEXT, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [_added(token) for token in state["added_tokens"] if _is_added(token)]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return tokenizer


def _is_added(token: dict[str, Any]) -> bool:
    return token["content"] not in BYTES


def _added(token: dict[str, Any]) -> dict[str, Any]:
    return {**token, "special": token["content"] in SPECIAL, "normalized": False}


def gemma_network(seed: int = 0) -> Any:
    """Return a random Gemma 3 whose vocabulary is the tokenizer's."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=gemma_tokenizer().get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "sliding_attention"],
        max_position_embeddings=2048,
        pad_token_id=0,
        eos_token_id=[1, TURN_END],
        bos_token_id=2,
        initializer_range=0.3,
    )
    network = Gemma3ForCausalLM(config).eval()
    for name, weight in network.named_parameters():
        if name.endswith("norm.weight"):  # zeros at first, which would hide a wrong shift
            torch.nn.init.normal_(weight, std=0.2)
        elif "embed" in name:  # small beside what the layers add, or it would repeat one token
            torch.nn.init.normal_(weight, std=0.03)
    return network


def write_gemma(directory: Path, dtype: str = "float32") -> Path:
    """Write the tiny model as transformers does."""
    import torch

    gemma_network().to(getattr(torch, dtype)).save_pretrained(directory)
    gemma_tokenizer().save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text(GEMMA3.chat_template or "")
    return directory


def write_gguf(path: Path) -> None:
    """Write the tiny model as llama.cpp's converter does: other names, norms plus one."""
    import gguf

    network = gemma_network()
    writer = gguf.GGUFWriter(str(path), "gemma3")
    _write_settings(writer, network.config)
    _write_vocabulary(writer)
    back = {there: here for here, there in GEMMA3.layer_names.items()}
    for name, weight in network.state_dict().items():
        values = weight.numpy().astype(np.float32)
        if name == "lm_head.weight":
            continue
        writer.add_tensor(
            _gguf_name(name, back), values + 1 if name.endswith("norm.weight") else values
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, back: dict[str, str]) -> str:
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{back[rest.removesuffix('.weight')]}.weight"


def _write_settings(writer: Any, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(1_000_000.0)
    writer.add_sliding_window(config.sliding_window)


def _write_vocabulary(writer: Any) -> None:
    import gguf

    tokenizer = gemma_tokenizer()
    tokens = [str(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    kinds = [_kind(token, gguf.TokenType) for token in tokens]
    normal = gguf.TokenType.NORMAL
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) if k == normal else -1000.0 for i, k in enumerate(kinds)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def _kind(token: str, kinds: Any) -> Any:
    if token in SPECIAL:
        return kinds.CONTROL
    if token in LINE_ENDS:
        return kinds.USER_DEFINED
    return kinds.BYTE if token in BYTES else kinds.NORMAL
