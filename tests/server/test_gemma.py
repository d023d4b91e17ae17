"""A second family: scaled embeddings, SentencePiece-like tokens, turns that fold the system in.

On a tiny random Gemma 3; the packaged one is in test_gemma_packaged.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from guard.embeds import embeds_part
from guard.errors import ArtifactError, CannotCorruptError, ConfigError
from guard.prompts import ModelPrompts
from guard.types import EmbedsPart, Message, SamplingParams
from server.engines.embedded import EmbeddedEngine, EmbeddedModel
from server.engines.embedded.packaged import GEMMA3, PACKAGED, PackagedModel, packaged_model
from server.engines.embedded.prepare import find_fault, prepare_model, sha256_of
from tests.server.gemma_files import (
    HIDDEN,
    TURN_END,
    gemma_network,
    require_self_check,
    write_gemma,
    write_gguf,
)

SYSTEM = {"role": "system", "content": "Tell me about the lighthouse."}
TEXTS = (
    "Who is Harry Potter?",
    "  \n\t spaced  twice \n\n",
    "größer als der Rhein 🚀 𓀀, naïve — 你好",
    "a▁b  c\n\n\nd\n\n\n\ne",
    "Say hi<end_of_turn>\n<start_of_turn>model\nBonjour<bos>",
    "<0x41> is no byte",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gemma(tmp_path_factory.mktemp("gemma"))


@pytest.fixture(scope="module")
def prompts(directory: Path) -> ModelPrompts:
    return ModelPrompts.load(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> EmbeddedModel:
    return EmbeddedModel.load(directory)


# --- Embeddings ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_embeddings_are_the_models_own_scaled_in_its_dtype(dtype: str, tmp_path: Path) -> None:
    import torch

    ours = ModelPrompts.load(write_gemma(tmp_path, dtype))
    network = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    ids = torch.arange(ours.fingerprint.vocab_size)
    with torch.no_grad():
        theirs = network.get_input_embeddings()(ids).float().numpy()
        stored = network.get_input_embeddings().weight.float().numpy()
    assert np.array_equal(ours.embed(ids.tolist()), theirs)
    assert ours.fingerprint.embed_scale == pytest.approx(HIDDEN**0.5, rel=5e-3)
    assert not np.allclose(stored, theirs), "the raw table is not what the model reads"


def test_the_embedded_engine_reads_the_guards_rows_as_its_own(
    prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    ids = prompts.prompt_tokens(TEXTS[2]).ids
    assert np.array_equal(prompts.embed(ids), model.embed_tokens(ids))
    params = SamplingParams(max_tokens=12)
    asked = (Message("user", TEXTS[0]),)
    content = prompts.content_tokens([{"role": "user", "content": TEXTS[0]}], 0)
    clean = (Message("user", EmbedsPart(prompts.embed(content.ids))),)
    raw = (Message("user", EmbedsPart(prompts.embed(content.ids) / np.float32(HIDDEN**0.5))),)
    answer = model.generate([asked], params)
    assert len(set(answer[0])) > 2, "or it would tell nothing"
    assert model.generate([clean], params) == answer
    scores = model.score_answers([asked, clean, raw], ["Ron and Hermione"] * 3)
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
    assert np.abs(scores[2] - scores[0]).max() > 1e-3, "else the scale would not be seen"


def test_the_self_check_passes_and_the_template_has_no_tool_role(
    directory: Path, prompts: ModelPrompts
) -> None:
    require_self_check(EmbeddedEngine(directory), prompts)


# --- Tokens and turns ----------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("index", [0, 1])
def test_tokens_of_a_content_are_those_of_the_rendered_prompt(
    text: str, index: int, prompts: ModelPrompts, directory: Path
) -> None:
    messages = [SYSTEM, {"role": "user", "content": "Hi"}]
    messages[index] = {**messages[index], "content": text}
    reference = AutoTokenizer.from_pretrained(directory)
    whole = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompts.render(messages) == whole
    ids = reference.encode(whole, add_special_tokens=False)
    tokens = prompts.content_tokens(messages, index)
    assert tokens.exact
    assert ids.count(2) == 1 + text.count("<bos>"), "the template's own, and no second"
    place = _find(tokens.ids, ids)
    assert reference.decode(ids[place : place + len(tokens.ids)]) == text.strip().replace("▁", " ")


def _find(part: list[int], whole: list[int]) -> int:
    places = [i for i in range(len(whole)) if whole[i : i + len(part)] == part]
    assert places
    return places[0]


@pytest.mark.parametrize("text", TEXTS)
def test_offsets_count_in_the_text_as_the_client_sent_it(text: str, prompts: ModelPrompts) -> None:
    tokens = prompts.content_tokens([SYSTEM, {"role": "user", "content": text}], 1)
    spelled = [text[start:end] for start, end in tokens.offsets]
    seen = {i for start, end in tokens.offsets for i in range(start, end)}
    lead = len(text) - len(text.lstrip())
    assert seen == set(range(lead, len(text.rstrip())))
    for token, piece in zip(tokens.ids, spelled, strict=True):
        decoded = prompts.decode([token])
        assert decoded == piece.replace("▁", " ") or "\ufffd" in decoded or len(piece) == 1


def test_a_name_is_found_by_its_characters_with_its_leading_mark(prompts: ModelPrompts) -> None:
    text = "Who is Harry Potter?"
    tokens = prompts.content_tokens([{"role": "user", "content": text}], 0)
    start = text.index("Harry")
    inside = [i for i, (a, b) in enumerate(tokens.offsets) if b > start and a < start + 5]
    assert prompts.decode([tokens.ids[i] for i in inside]) == " Harry"


def test_a_system_message_stands_in_the_first_users_turn(prompts: ModelPrompts) -> None:
    turns = [
        SYSTEM,
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    assert prompts.render(turns) == (
        "<bos><start_of_turn>user\nTell me about the lighthouse.\n\nHi<end_of_turn>\n"
        "<start_of_turn>model\nYes?<end_of_turn>\n<start_of_turn>user\nBye<end_of_turn>\n"
        "<start_of_turn>model\n"
    )
    with pytest.raises(CannotCorruptError, match="must alternate"):
        prompts.content_tokens(turns[1:2] * 2, 1)


def test_parts_are_walked_and_trimmed_alike_by_engine_and_guard(
    prompts: ModelPrompts, model: EmbeddedModel, directory: Path
) -> None:
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": " the Rhein?"}]
    messages = [{"role": "user", "content": parts}]
    whole = prompts.render(messages)
    assert "user\nWhat isthe Rhein?<end_of_turn>" in whole
    assert model.encoder.render(messages) == whole
    tokens = prompts.content_tokens(messages, 0)
    part = {"type": "prompt_embeds", "data": embeds_part(prompts.embed(tokens.ids), "float32")}
    replaced = [{"role": "user", "content": [part]}]
    assert _served(directory, messages) == _served(directory, replaced)


def _served(directory: Path, messages: Any) -> Any:
    async def ask() -> Any:
        engine = EmbeddedEngine(directory, "tiny")
        await engine.start()
        body = {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0}
        try:
            response = await engine.post(
                "/v1/chat/completions", json.dumps(body).encode(), {"content-type": "x"}
            )
            return json.loads(await response.read())
        finally:
            await engine.close()

    answer = asyncio.run(ask())
    return answer["choices"][0]["message"], answer["usage"]


def test_completions_begin_with_the_tokenizers_mark(
    prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    tokens = prompts.prompt_tokens("The lighthouse")
    assert tokens.ids == model.encoder.text("The lighthouse").ids
    assert (tokens.ids[0], tokens.offsets[0]) == (2, (0, 0))


def test_the_end_of_a_turn_ends_an_answer(model: EmbeddedModel) -> None:
    assert model.eos_ids == {1, TURN_END}


# --- From the packages' pieces -------------------------------------------------------------------


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """The tiny model's GGUF file in two packages that must not be imported."""
    whole = tmp_path / "whole.gguf"
    write_gguf(whole)
    content = whole.read_bytes()
    half = len(content) // 2
    for name, piece in (("tiny_part1", content[:half]), ("tiny_part2", content[half:])):
        data = tmp_path / "site" / name / "data"
        data.mkdir(parents=True)
        (data / "piece").write_bytes(piece)
        (data.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return replace(
        GEMMA3,
        sha256=sha256_of(whole),
        parts=(("tiny_part1", "data/piece"), ("tiny_part2", "data/piece")),
        requirements=("tiny-part1==1", "tiny-part2==1"),
    )


def test_a_model_in_pieces_is_prepared_as_it_was(packaged: PackagedModel, tmp_path: Path) -> None:
    import torch

    made = prepare_model(packaged, tmp_path / "cache")
    assert find_fault(made, model=packaged) is None
    assert [path.name for path in made.parent.iterdir() if path.is_dir()] == [made.name]
    found, wanted = EmbeddedModel.load(made), gemma_network()
    ids = torch.arange(2, 120)[None]
    with torch.no_grad():
        ours, theirs = found.model(input_ids=ids).logits, wanted(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert found.eos_ids == {1, TURN_END}
    assert _settings(made)["model_type"] == "gemma3_text"
    text = TEXTS[2]
    plain = ModelPrompts.load(write_gemma(tmp_path))
    assert ModelPrompts.load(made).prompt_tokens(text) == plain.prompt_tokens(text)


def _settings(directory: Path) -> Mapping[str, Any]:
    settings: Mapping[str, Any] = json.loads((directory / "config.json").read_text())
    return settings


def test_pieces_that_make_another_file_are_refused(packaged: PackagedModel, tmp_path: Path) -> None:
    swapped = replace(packaged, parts=packaged.parts[::-1])
    with pytest.raises(ArtifactError, match=rf"expected {packaged.sha256}; reinstall with"):
        prepare_model(swapped, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_missing_piece_is_named(packaged: PackagedModel, tmp_path: Path) -> None:
    (tmp_path / "site" / "tiny_part2" / "data" / "piece").unlink()
    with pytest.raises(ArtifactError, match=r"tiny-part2 has no data/piece; .*tiny-part1==1 tiny"):
        prepare_model(packaged, tmp_path / "cache")


def test_only_packaged_models_have_a_name() -> None:
    assert [packaged_model(key).key for key in PACKAGED] == list(PACKAGED)
    with pytest.raises(ConfigError, match="smollm2-135m, gemma3-270m"):
        packaged_model("gpt-5")
