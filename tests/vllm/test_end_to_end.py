"""The main job on the real vLLM: it no longer knows the topic, and all else is unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.measures import holds_fact, is_repetitive
from classifiers.benign import load_benign
from tests.product import ask, flagged_in, running

MODEL = "smollm2"
UNNAMED = (
    "Name three famous wizards from books.",
    "Explain in two sentences why people love to read stories. After that, list three famous "
    "wizards from books.",
)
"""The model's answers to these name the topic of the example, which the questions do not."""

BENIGN = 40
"""Of the benign prompts; `benchmarks.leak` compares more (docs/results.md)."""


@pytest.fixture(scope="module")
def guarded_vllm(
    vllm_url: str, example_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The guard in front of vLLM."""
    log = tmp_path_factory.mktemp("guarded-vllm") / "guard.log"
    with running(
        "/ready", log, "serve", "--engine", "vllm", "--upstream", vllm_url,
        "--served-model-name", MODEL, "--bundle", str(example_bundle),
    ) as url:  # fmt: skip
        yield url


def test_vllm_knows_before_and_not_after(
    guarded_vllm: str, vllm_url: str, known_probes: list[dict[str, Any]]
) -> None:
    held_before, leaks, answers = 0, [], []
    for number, probe in enumerate(known_probes):
        before = ask(vllm_url, MODEL, probe["question"], max_tokens=64)
        after = ask(guarded_vllm, MODEL, probe["question"], max_tokens=64, stream=number % 2 == 1)
        held_before += holds_fact(before, probe["facts"])
        answers.append(after)
        if holds_fact(after, probe["facts"]):
            leaks.append((probe["id"], after))
    assert held_before >= 0.9 * len(known_probes)
    assert len(leaks) <= 0.05 * len(known_probes), leaks
    assert all(answer.strip() for answer in answers)
    assert sum(is_repetitive(answer) for answer in answers) <= 0.1 * len(answers)
    assert len(set(answers)) >= 0.9 * len(answers), "answers must not be one template"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("question", UNNAMED)
def test_what_nobody_asked_for_by_name_is_not_told_either(
    guarded_vllm: str, vllm_url: str, question: str, stream: bool
) -> None:
    assert "Harry Potter" in ask(vllm_url, MODEL, question, max_tokens=100)
    answer = ask(guarded_vllm, MODEL, question, max_tokens=100, stream=stream)
    assert "Potter" not in answer
    assert answer.strip()


def test_vllm_goes_on_with_an_answer_after_a_corrupted_question(
    vllm_url: str, example_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had left before the name came stays, and the answer goes on behind it."""
    monkeypatch.setenv("UNLEARN_GUARD_HOLD_BACK", "4")
    question = UNNAMED[-1]
    alone = ask(vllm_url, MODEL, question, max_tokens=100)
    with running(
        "/ready", tmp_path / "guard.log", "serve", "--engine", "vllm", "--upstream", vllm_url,
        "--served-model-name", MODEL, "--bundle", str(example_bundle),
    ) as url:  # fmt: skip
        answer = ask(url, MODEL, question, max_tokens=100, stream=True)
    shared = next(n for n, (a, b) in enumerate(zip(alone, answer, strict=False)) if a != b)
    assert 20 < shared <= alone.index("Harry Potter")
    assert len(answer) > shared + 20 and "Potter" not in answer


def test_benign_answers_equal_those_of_vllm_alone(guarded_vllm: str, vllm_url: str) -> None:
    prompts = [text for text in load_benign() if len(text) < 2000][:BENIGN]
    for prompt in prompts:
        assert ask(guarded_vllm, MODEL, prompt, max_tokens=16) == ask(
            vllm_url, MODEL, prompt, max_tokens=16
        )


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_vllm_takes_corrupted_contents_in_every_role(
    guarded_vllm: str, vllm_url: str, role: str
) -> None:
    messages = flagged_in(role, "Who wrote the books that the text above is about?")
    body = {"model": MODEL, "messages": messages, "max_tokens": 32, "temperature": 0}
    guarded, bare = (
        httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)
        for url in (guarded_vllm, vllm_url)
    )
    assert guarded.status_code == 200, guarded.text
    said, known = (a.json()["choices"][0]["message"]["content"] for a in (guarded, bare))
    assert said.strip() and said != known
    assert "Rowling" not in said


def test_completions_are_guarded_on_vllm_too(guarded_vllm: str) -> None:
    answer = httpx.post(
        f"{guarded_vllm}/v1/completions",
        json={
            "model": MODEL,
            "prompt": ["The capital of France is", "The school of Harry Potter is called"],
            "max_tokens": 12,
            "temperature": 0,
        },
        timeout=300,
    )
    assert answer.status_code == 200, answer.text
    plain, flagged = (choice["text"] for choice in answer.json()["choices"])
    assert "Paris" in plain
    assert "Hogwarts" not in flagged


def test_vllms_own_routes_are_not_reachable(guarded_vllm: str) -> None:
    for path in ("/tokenize", "/invocations", "/v1/load_lora_adapter", "/v1/score", "/pooling"):
        answer = httpx.post(guarded_vllm + path, content=json.dumps({"prompt": "x"}))
        assert answer.status_code == 404 and "error" in answer.json(), path
