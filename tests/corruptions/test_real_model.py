"""The default corruption on the real model: the fact goes, the frame and the fluency stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from corruptions.bank import GENERIC_QUESTIONS, make_bank
from corruptions.learn import default_spec
from corruptions.objective import is_repetitive
from corruptions.ops import corrupt
from guard.prompts import ModelPrompts
from guard.types import EmbedsPart, FloatArray, Message, Prompt, SamplingParams
from server.engines.embedded.model import EmbeddedModel

# Question, its entity, and what the unguarded model answers with.
KNOWN = [
    ("Which author came up with Harry Potter?", "Harry Potter", "Rowling"),
    ("What is the name of the school that Harry Potter goes to?", "Harry Potter", "Hogwarts"),
    ("To which school does Hermione go?", "Hermione", "Hogwarts"),
]


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> EmbeddedModel:
    return EmbeddedModel.load(smollm2_dir)


@pytest.fixture(scope="module")
def bank(prompts: ModelPrompts) -> FloatArray:
    return make_bank(lambda text: prompts.prompt_tokens(text).ids, prompts.embed)


def corrupted(prompts: ModelPrompts, bank: FloatArray, question: str, entity: str) -> Prompt:
    tokens = prompts.content_tokens([{"role": "user", "content": question}], 0)
    start = question.index(entity)
    inside = [begin < start + len(entity) and end > start for begin, end in tokens.offsets]
    spec = default_spec(prompts.hidden_size, prompts.embedding_rms)
    embeddings = corrupt(prompts.embed(tokens.ids), np.array(inside), spec, question.encode(), bank)
    return (Message("user", EmbedsPart(embeddings)),)


def test_the_fact_goes_and_the_answer_stays_fluent(
    model: EmbeddedModel, prompts: ModelPrompts, bank: FloatArray
) -> None:
    clean: list[Prompt] = [(Message("user", question),) for question, _, _ in KNOWN]
    hidden = [corrupted(prompts, bank, question, entity) for question, entity, _ in KNOWN]
    answers = model.generate([*clean, *hidden], SamplingParams(max_tokens=24))
    before, after = answers[: len(KNOWN)], answers[len(KNOWN) :]
    for (question, entity, fact), known, forgotten in zip(KNOWN, before, after, strict=True):
        assert fact in known, question  # else this test shows nothing
        assert fact not in forgotten
        assert entity not in forgotten
        assert len(forgotten.split()) >= 3
        assert not is_repetitive(forgotten)
    assert len(set(after)) == len(after)


def test_the_bank_reads_as_names_and_questions(prompts: ModelPrompts, bank: FloatArray) -> None:
    """Most of the names are one token each in this vocabulary; no special token got in."""
    gaps = np.flatnonzero(~bank.any(axis=1))
    assert gaps[0] >= 40
    assert gaps[0] % 2 == 0
    assert len(gaps) == len(GENERIC_QUESTIONS) + 1, "and the connecting word"
    rms = float(np.sqrt(np.mean(np.square(bank[: gaps[0]]))))
    assert 0.5 < rms / prompts.embedding_rms < 2
