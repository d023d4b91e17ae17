"""A real model behind a real OpenAI endpoint no longer knows a topic; all else is unchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.measures import holds_fact, is_repetitive
from classifiers.benign import load_benign
from tests.product import Recorder, ask, flagged_in

pytestmark = pytest.mark.timeout(1800)
"""The first test waits for a fit and two servers."""

MODEL = "smollm2-135m-instruct"
PROBES = 12
"""Of the known probes; the benchmark asks them all (docs/results.md)."""


def test_the_model_knows_before_and_not_after(
    guarded_url: str, unguarded_url: str, known_probes: list[dict[str, Any]]
) -> None:
    held_before, held_after, answers = 0, 0, []
    asked = known_probes[:: len(known_probes) // PROBES]
    for probe in asked:
        before = ask(unguarded_url, MODEL, probe["question"], max_tokens=64)
        after = ask(guarded_url, MODEL, probe["question"], max_tokens=64)
        held_before += holds_fact(before, probe["facts"])
        held_after += holds_fact(after, probe["facts"])
        answers.append(after)
    assert held_before >= 0.9 * len(asked)
    assert held_after <= 1
    assert all(answer.strip() for answer in answers)
    assert sum(is_repetitive(answer) for answer in answers) <= 1
    assert len(set(answers)) >= len(answers) - 1, "answers must not be one template"


def test_streamed_and_whole_answers_of_a_flagged_request_are_the_same(
    guarded_url: str, known_probes: list[dict[str, Any]]
) -> None:
    question = known_probes[0]["question"]
    whole = ask(guarded_url, MODEL, question)
    assert ask(guarded_url, MODEL, question, stream=True) == whole
    assert ask(guarded_url, MODEL, question) == whole, (
        "asking again must not average the noise away"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_unflagged_requests_and_answers_pass_byte_for_byte(
    guarded_url: str, recorder: Recorder, stream: bool
) -> None:
    for prompt in load_benign()[::701]:
        # Odd spacing and escapes on purpose: a re-serialised body would differ.
        body = (
            f'{{ "model":"{MODEL}",  "stream": {json.dumps(stream)},\n"temperature":0.0,'
            f'"max_tokens":4, "messages":[{{"content":{json.dumps(prompt)},"role":"user"}}] }}'
        ).encode()
        answer = httpx.post(
            f"{guarded_url}/v1/chat/completions",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        assert recorder.bodies[-1] == body
        assert recorder.answers[-1] == answer.content


def test_a_flagged_request_reaches_the_engine_without_its_text(
    guarded_url: str, recorder: Recorder
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Which house was Hermione Granger sorted into at Hogwarts?"},
    ]
    answer = httpx.post(
        f"{guarded_url}/v1/chat/completions",
        json={"model": MODEL, "messages": messages, "max_tokens": 4},
        timeout=300,
    )
    assert answer.status_code == 200
    sent = json.loads(recorder.bodies[-1])
    assert sent["messages"][0] == messages[0]
    assert [part["type"] for part in sent["messages"][1]["content"]] == ["prompt_embeds"]
    assert b"Hermione" not in recorder.bodies[-1] and b"Hogwarts" not in recorder.bodies[-1]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_every_role_is_corrupted(guarded_url: str, recorder: Recorder, role: str) -> None:
    messages = flagged_in(role, "Please go on.")
    answer = httpx.post(
        f"{guarded_url}/v1/chat/completions",
        json={"model": MODEL, "messages": messages, "max_tokens": 2},
        timeout=300,
    )
    assert answer.status_code == 200, answer.text
    sent = json.loads(recorder.bodies[-1])["messages"]
    assert sent[0]["content"] == "Hello."
    assert sent[1]["content"][0]["type"] == "prompt_embeds"


def test_flagged_and_unflagged_answers_have_the_same_shape(guarded_url: str) -> None:
    def post(question: str) -> httpx.Response:
        return httpx.post(
            f"{guarded_url}/v1/chat/completions",
            json={
                "model": MODEL,
                "messages": [{"role": "user", "content": question}],
                "max_tokens": 8,
                "temperature": 0,
            },
            timeout=300,
        )

    flagged, plain = post("Who teaches potions at Hogwarts?"), post("Who painted the Mona Lisa?")
    assert set(flagged.headers) == set(plain.headers)
    one, other = flagged.json(), plain.json()
    assert one.keys() == other.keys()
    assert one["choices"][0].keys() == other["choices"][0].keys()
    assert one["usage"].keys() == other["usage"].keys()
    assert one["id"].split("-")[0] == other["id"].split("-")[0]


def test_completions_are_guarded_too(guarded_url: str, recorder: Recorder) -> None:
    def post(prompt: Any) -> dict[str, Any]:
        answer = httpx.post(
            f"{guarded_url}/v1/completions",
            json={"model": MODEL, "prompt": prompt, "max_tokens": 3, "temperature": 0},
            timeout=300,
        )
        assert answer.status_code == 200, answer.text
        sent: dict[str, Any] = json.loads(recorder.bodies[-1])
        return sent

    assert post("The capital of France is")["prompt"] == "The capital of France is"
    flagged = post("Harry Potter's best friends at Hogwarts are called")
    assert "prompt" not in flagged and isinstance(flagged["prompt_embeds"], str)
    mixed = post(["The capital of France is", "Harry Potter's school is called Hogwarts and"])
    assert len(mixed["prompt_embeds"]) == 2


def test_text_that_no_embedding_can_replace_is_refused(guarded_url: str) -> None:
    tool = {
        "type": "function",
        "function": {
            "name": "lookup",
            "description": "Which house was Hermione Granger sorted into at Hogwarts?",
            "parameters": {"type": "object", "properties": {}},
        },
    }
    answer = httpx.post(
        f"{guarded_url}/v1/chat/completions",
        json={
            "model": MODEL,
            "messages": [{"role": "user", "content": "Please use the tool."}],
            "tools": [tool],
        },
        timeout=300,
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "content_refused"


def test_no_text_in_bundle_ledger_or_log(
    guarded_url: str, example_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    question = "Which animal is the Animagus form of Professor McGonagall at Hogwarts?"
    ask(guarded_url, MODEL, question, max_tokens=2)
    ledger = (example_bundle / "ledger.jsonl").read_bytes()
    assert b'"decision"' in ledger
    logs = list(tmp_path_factory.getbasetemp().rglob("*.log"))
    assert logs
    for path in [*example_bundle.rglob("*"), *logs]:
        if path.is_file():
            data = path.read_bytes()
            for word in (b"McGonagall", b"Animagus", b"Gryffindor", b"Dumbledore"):
                # The encoder's own vocabulary is public and holds common words only.
                assert word not in data, path
                assert word.lower() not in data or path.name == "tokenizer.json", path
