"""Gemma-3-270M from its packages, through engine, detector and corruption (make test-slow)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from guard.embeds import decode_embeds_part
from guard.prompts import ContentTokens, ModelPrompts
from guard.types import EmbedsPart, FloatArray, Message, SamplingParams
from server.engines.embedded import EmbeddedEngine, EmbeddedModel
from server.engines.embedded.packaged import GEMMA3
from server.engines.embedded.prepare import prepare_model
from server.engines.embedded.steps import Sampling
from tests.product import Recorder, ask, recording, run_command, running, small_benign
from tests.server.gemma_files import require_self_check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

MODEL = "gemma"
MAX_BYTES = 2**26
FLAGGED = ("By whom were the Harry Potter stories written?", "Which woman created Harry Potter?")
UNFLAGGED = ("What is the capital of France?", "Name three fruits.", "How do I boil an egg?")


@pytest.fixture(scope="module")
def gemma_dir() -> Path:
    return prepare_model(GEMMA3)


@pytest.fixture(scope="module")
def prompts(gemma_dir: Path) -> ModelPrompts:
    return ModelPrompts.load(gemma_dir)


@pytest.fixture(scope="module")
def model(gemma_dir: Path) -> EmbeddedModel:
    return EmbeddedModel.load(gemma_dir)


# --- The prepared directory ----------------------------------------------------------------------


def test_the_weights_are_those_that_transformers_reads(
    gemma_dir: Path, model: EmbeddedModel, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    whole = GEMMA3.whole_file(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=whole.name, dtype=torch.float32
    )
    wanted = theirs.state_dict()
    for name, ours in model.model.state_dict().items():
        torch.testing.assert_close(ours, wanted[name], atol=1e-6, rtol=1e-6, msg=name)


def test_it_knows_what_a_language_model_knows(model: EmbeddedModel) -> None:
    encoded = model.encoder.text("The three primary colours are")
    sampling = Sampling.from_params(SamplingParams(max_tokens=6))
    answer = "".join(step.text for step in model.stream(encoded, sampling))
    assert answer.startswith(" red, yellow and blue"), "a wrong norm or scale would babble"


def test_text_splits_as_sentencepiece_splits_it(prompts: ModelPrompts, tmp_path: Path) -> None:
    """By the rule of SentencePiece: of all neighbours, join the pair with the best score."""
    import gguf

    fields = gguf.GGUFReader(GEMMA3.whole_file(tmp_path)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    scores = fields["tokenizer.ggml.scores"].contents()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {t: scores[i] for t, i in ids.items() if kinds[i] == gguf.TokenType.NORMAL}
    for text in (
        "Who is Harry Potter, and who are his friends at Hogwarts?",
        "größer als der Rhein — naïve 你好 नमस्ते 👩‍🚀 𓀀",
        "def f(x): return x**2 # 3.14159, 2024-01-31, e.g. https://example.org/?q=a&b=c",
    ):
        pieces = list(text.replace(" ", "▁"))
        while (best := _best_pair(pieces, normal)) is not None:
            pieces[best : best + 2] = ["".join(pieces[best : best + 2])]
        wanted = [i for piece in pieces for i in _piece_ids(piece, ids)]
        assert prompts.prompt_tokens(text, add_special_tokens=False).ids == wanted


def _best_pair(pieces: list[str], scores: dict[str, float]) -> int | None:
    """Return where the pair with the best score begins, the first of equals."""
    found = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
    return -max(found)[1] if found else None


def _piece_ids(piece: str, ids: dict[str, int]) -> list[int]:
    return [ids[piece]] if piece in ids else [ids[f"<0x{b:02X}>"] for b in piece.encode()]


# --- Engine --------------------------------------------------------------------------------------


def test_clean_embeddings_are_answered_as_their_text(
    prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    params = SamplingParams(max_tokens=16)
    for question in (*FLAGGED, *UNFLAGGED):
        ids = prompts.content_tokens([{"role": "user", "content": question}], 0).ids
        rows = prompts.embed(ids)
        assert np.array_equal(rows, model.embed_tokens(ids))
        clean = model.generate([(Message("user", EmbedsPart(rows)),)], params)
        assert clean == model.generate([(Message("user", question),)], params)


def test_the_self_check_passes(gemma_dir: Path, prompts: ModelPrompts) -> None:
    require_self_check(EmbeddedEngine(gemma_dir), prompts)


# --- Detector and corruption ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(gemma_dir: Path, example_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    done = run_command(
        "target", "add", "harry-potter",
        "--forget", str(example_dir / "forget.jsonl"),
        "--retain", str(example_dir / "retain.jsonl"),
        "--benign", str(small_benign(folder)),
        "--engine", "none", "--model", str(gemma_dir), "--bundle", str(folder / "bundle"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "bundle"


@pytest.fixture(scope="module")
def plain_url(gemma_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("plain") / "engine.log"
    with running(
        "/health", log, "engine", "--model", str(gemma_dir), "--served-model-name", MODEL
    ) as url:
        yield url


@pytest.fixture(scope="module")
def recorder(plain_url: str) -> Iterator[Recorder]:
    with recording(plain_url) as relay:
        yield relay


@pytest.fixture(scope="module")
def guarded(
    bundle: Path, gemma_dir: Path, recorder: Recorder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    log = tmp_path_factory.mktemp("guarded") / "guard.log"
    with running(
        "/ready", log, "serve", "--engine", "vllm", "--upstream", recorder.url,
        "--model", str(gemma_dir), "--bundle", str(bundle),
    ) as url:  # fmt: skip
        yield url


@pytest.fixture(scope="module")
def table(prompts: ModelPrompts) -> FloatArray:
    return prompts.embed(range(prompts.fingerprint.vocab_size))


@pytest.mark.parametrize("question", FLAGGED)
def test_the_name_does_not_reach_the_engine_in_a_chat(
    question: str, guarded: str, recorder: Recorder, prompts: ModelPrompts, table: FloatArray
) -> None:
    assert ask(guarded, MODEL, question, max_tokens=8).strip()
    (message,) = json.loads(recorder.bodies[-1])["messages"]
    read = decode_embeds_part(message["content"][0]["data"], MAX_BYTES)
    sent = prompts.content_tokens([{"role": "user", "content": question}], 0)
    _check_name_is_gone(question, sent, read, prompts, table)


def test_the_name_does_not_reach_the_engine_in_a_completion(
    guarded: str, recorder: Recorder, prompts: ModelPrompts, table: FloatArray
) -> None:
    text = "Harry Potter's best friends are"
    assert _complete(guarded, {"model": MODEL, "prompt": text, "max_tokens": 8}).strip()
    embeds = json.loads(recorder.bodies[-1])["prompt_embeds"]
    read = decode_embeds_part(embeds[0] if isinstance(embeds, list) else embeds, MAX_BYTES)
    _check_name_is_gone(text, prompts.prompt_tokens(text), read, prompts, table)


def _check_name_is_gone(
    text: str, sent: ContentTokens, read: FloatArray, prompts: ModelPrompts, table: FloatArray
) -> None:
    """The model must read a name's tokens as others, and the text must keep its length."""
    assert len(read) == len(sent.ids)
    lengths = (table**2).sum(1)
    nearest = [int(np.argmin(lengths - 2 * (table @ row))) for row in read]
    start = text.index("Harry")
    end = start + len("Harry Potter")
    named = [i for i, (a, b) in enumerate(sent.offsets) if b > start and a < end]
    assert named
    spelled = prompts.decode([nearest[i] for i in named])
    assert "harry" not in spelled.lower()
    assert "potter" not in spelled.lower()


def test_flagged_answers_are_others(plain_url: str, guarded: str) -> None:
    """Not every one must be: this base model mostly repeats what it is asked."""
    changed = [
        ask(guarded, MODEL, question, max_tokens=24)
        != ask(plain_url, MODEL, question, max_tokens=24)
        for question in (*FLAGGED, "Who is Harry Potter?", "Where does Harry Potter live?")
    ]
    assert sum(changed) >= 3


@pytest.mark.parametrize("question", UNFLAGGED)
def test_an_unflagged_answer_is_the_same(question: str, plain_url: str, guarded: str) -> None:
    assert ask(guarded, MODEL, question, max_tokens=16) == ask(
        plain_url, MODEL, question, max_tokens=16
    )


def test_an_unflagged_completion_is_the_same(plain_url: str, guarded: str) -> None:
    body = {"model": MODEL, "prompt": "The three primary colours are", "max_tokens": 16}
    assert _complete(guarded, body) == _complete(plain_url, body)


def _complete(url: str, body: dict[str, Any]) -> str:
    answer = httpx.post(f"{url}/v1/completions", json={**body, "temperature": 0}, timeout=300)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])
