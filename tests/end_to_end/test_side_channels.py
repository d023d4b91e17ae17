"""Nothing but its text tells an answer to a flagged request from another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from guard.prompts import ModelPrompts

pytestmark = pytest.mark.timeout(1800)
"""The first test waits for a fit and two servers."""

MODEL = "smollm2-135m-instruct"
FLAGGED = ("Harry Potter", "Hermione Granger", "Ron Weasley", "Albus Dumbledore")
PLAIN = ("Marie Curie", "Charles Darwin", "Ada Lovelace", "Isaac Newton")
FRAMES = ("Who is {}?", "Where was {} born?", "Tell me something about {}.", "What did {} study?")
LENGTH = 6
"""Tokens of each answer: so few that none ends by itself, and lengths are no feature."""


def asked(name: str, frame: str, kind: int) -> tuple[str, dict[str, Any]]:
    """A request of one of six kinds."""
    text = frame.format(name)
    common = {"model": MODEL, "max_tokens": LENGTH, "temperature": 0, "stream": kind % 2 == 1}
    if common["stream"]:
        common["stream_options"] = {"include_usage": True}
    if kind >= 4:
        return "/v1/completions", {**common, "prompt": text}
    more = {"logprobs": True, "top_logprobs": 2} if kind >= 2 else {}
    return "/v1/chat/completions", {
        **common,
        **more,
        "messages": [{"role": "user", "content": text}],
    }


def paths(value: Any, at: str = "") -> Iterator[str]:
    """Every place in a JSON value, and what kind of value stands there; no text's own shape."""
    if at.endswith(("/bytes", "/top_logprobs/*", "/tokens")) and "/logprobs" in at:
        yield f"{at}:{type(value).__name__}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from paths(item, f"{at}/{key}")
    elif isinstance(value, list):
        yield f"{at}#{len(value)}"
        for item in value:
            yield from paths(item, f"{at}/*")
    else:
        yield f"{at}:{type(value).__name__}"


def bodies_of(response: httpx.Response) -> list[Any]:
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.json()]
    events = response.text.split("\n\n")[:-2]
    return [json.loads(event.removeprefix("data: ")) for event in events]


def features(response: httpx.Response, tokens: int) -> dict[str, float]:
    """All that a client sees of an answer but its text and its ids."""
    bodies = bodies_of(response)
    found = {"status": float(response.status_code), "bodies": float(len(bodies))}
    for name, value in response.headers.items():
        found[f"header {name}"] = 1.0 if name in ("date", "content-length") else float(len(value))
    for body in bodies:
        for path in paths(body):
            found[path] = found.get(path, 0.0) + 1.0
        found[f"model {body['model']}"] = 1.0
        for choice in body["choices"]:
            found[f"finish {choice['finish_reason']}"] = 1.0
    usage = next(body["usage"] for body in bodies if body.get("usage"))
    found["completion"] = float(usage["completion_tokens"])
    found["prompt"] = float(usage["prompt_tokens"] - tokens)
    return found


def test_no_classifier_tells_flagged_answers_from_others(
    guarded_url: str, prompts: ModelPrompts
) -> None:
    rows, labels = [], []
    with httpx.Client(base_url=guarded_url, timeout=300) as http:
        for label, names in enumerate((PLAIN, FLAGGED)):
            for number, (name, frame) in enumerate((n, f) for n in names for f in FRAMES):
                for kind in range(6):
                    if (number + kind) % 2:
                        continue
                    path, request = asked(name, frame, kind)
                    response = http.post(path, json=request)
                    tokens = prompt_tokens(prompts, request)
                    rows.append(features(response, tokens) | {"kind": float(kind)})
                    labels.append(label)
    columns = sorted({name for row in rows for name in row})
    table = np.array([[row.get(name, -1.0) for name in columns] for row in rows])
    forest = RandomForestClassifier(100, random_state=0)
    folds = StratifiedKFold(4, shuffle=True, random_state=0)
    guessed = cross_val_predict(forest, table, labels, cv=folds, method="predict_proba")[:, 1]
    auc = roc_auc_score(labels, guessed)
    kinds = table[:, columns.index("kind")]
    differing = {
        name: sorted(set(zip(kinds, labels, column, strict=True)))
        for name, column in zip(columns, table.T, strict=True)
        if len(set(zip(kinds, column, strict=True))) > len(set(kinds))
    }
    assert max(auc, 1 - auc) <= 0.55 or not differing, (auc, differing)


def prompt_tokens(prompts: ModelPrompts, request: dict[str, Any]) -> int:
    if "prompt" in request:
        return len(prompts.prompt_tokens(request["prompt"]).ids)
    text = prompts.render(request["messages"])
    return len(prompts.prompt_tokens(text, add_special_tokens=False).ids)


def test_the_attack_finds_a_difference_that_is_there() -> None:
    """The same classifier on answers that do differ: else the test above proves nothing."""
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 48)
    table = np.column_stack([rng.normal(size=96), 12 + labels * (rng.random(96) < 0.5)])
    forest = RandomForestClassifier(100, random_state=0)
    guessed = cross_val_predict(forest, table, labels, cv=4, method="predict_proba")[:, 1]
    assert roc_auc_score(labels, guessed) > 0.6
