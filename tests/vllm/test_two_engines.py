"""Learners' engine over two real vLLM processes: both give the same answers, side by side."""

from __future__ import annotations

import json
import shutil
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from guard.errors import EngineRefusedError
from guard.keys import default_key_file
from guard.prompts import ModelPrompts
from guard.types import EmbedsPart, FloatArray, Message, Prompt, SamplingParams
from server.engines.learning import HttpLearningEngine
from tests.product import read_jsonl, run_command

GREEDY = SamplingParams(max_tokens=12)
QUESTIONS = (
    "What is the capital of France?",
    "Who is Harry Potter?",
    "How many days does a week have?",
    "Name a large animal of Africa.",
)


@pytest.fixture(scope="module")
def engines(
    vllm_url: str, second_vllm_url: str
) -> Iterator[tuple[HttpLearningEngine, HttpLearningEngine]]:
    with HttpLearningEngine(vllm_url) as one, HttpLearningEngine(second_vllm_url) as two:
        yield one, two


def rows(prompts: ModelPrompts, question: str) -> FloatArray:
    return prompts.embed(prompts.content_tokens([{"role": "user", "content": question}], 0).ids)


def batch(prompts: ModelPrompts, sigma: float = 0.0) -> list[Prompt]:
    """The questions as embeddings, with noise on dimension 0 of every token but the last."""
    noise = np.random.default_rng(0)
    changed = []
    for question in QUESTIONS:
        table = rows(prompts, question).copy()
        table[:-1, 0] += sigma * noise.standard_normal(len(table) - 1, dtype=np.float32)
        changed.append((Message("user", EmbedsPart(table)),))
    return changed


def test_both_serve_one_model_and_read_embeddings_as_their_text(
    engines: tuple[HttpLearningEngine, HttpLearningEngine], prompts: ModelPrompts
) -> None:
    as_text = [(Message("user", question),) for question in QUESTIONS]
    answers = [engine.generate(as_text, GREEDY) for engine in engines]
    assert [engine.model for engine in engines] == ["smollm2", "smollm2"]
    assert answers[0] == answers[1]
    assert "Paris" in answers[0][0]
    for engine in engines:
        assert engine.generate(batch(prompts), GREEDY) == answers[0]


def test_candidates_are_measured_side_by_side_and_alike(
    engines: tuple[HttpLearningEngine, HttpLearningEngine], prompts: ModelPrompts
) -> None:
    """Eight strengths dealt out to two servers, then the other way round."""
    sigmas = [0.0, 0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0]

    def measure(shift: int) -> list[list[str]]:
        with ThreadPoolExecutor(len(engines)) as pool:
            futures = [
                pool.submit(engines[(i + shift) % 2].generate, batch(prompts, sigma), GREEDY)
                for i, sigma in enumerate(sigmas)
            ]
            return [future.result() for future in futures]

    once, swapped = measure(0), measure(1)
    assert once == swapped
    assert once[0] != once[-1]


def test_what_vllm_refuses_reaches_the_learner(
    engines: tuple[HttpLearningEngine, HttpLearningEngine],
) -> None:
    too_wide = EmbedsPart(np.zeros((3, 7), np.float32))
    with pytest.raises(EngineRefusedError) as refusal:
        engines[0].generate([(Message("user", too_wide),)], GREEDY)
    assert refusal.value.status == 400


def test_the_learner_searches_on_both(
    vllm_url: str, second_vllm_url: str, example_bundle: Path, example_dir: Path, tmp_path: Path
) -> None:
    """`learn corruption` with a small budget, into a copy of the bundle that other tests read."""
    root, out, forget = tmp_path / "example", tmp_path / "out", example_dir / "forget.jsonl"
    shutil.copytree(example_bundle, root, symlinks=True)
    shutil.copy(default_key_file(example_bundle), default_key_file(root))
    asked = [answered(url) for url in (vllm_url, second_vllm_url)]
    done = run_command(
        "learn", "corruption", "--target", "harry-potter",
        "--forget", str(forget), "--bundle", str(root), "--out", str(out),
        "--engine", vllm_url, "--engine", second_vllm_url, "--objective", "rouge-l",
        "--budget", "4", "--sample", "6", "--threads", "1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    more = [answered(url) - n for url, n in zip((vllm_url, second_vllm_url), asked, strict=True)]
    assert min(more) >= 1, more
    report = json.loads((out / "report.json").read_text())
    assert {row["route"] for row in report["rows"]} == {"http"}
    trials = [row for row in read_jsonl(out / "trace.jsonl") if "point" in row]
    assert len(trials) == 4
    assert all(0 <= trial["values"]["rouge-l"] <= 1 for trial in trials)


def answered(url: str) -> int:
    """How many requests a vLLM has answered."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return int(
        sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success"))
    )
