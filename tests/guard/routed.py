"""A guard over made-up targets, with routes of a test's choice.

It flags texts that hold a target's name; corruptions fill rows with a number of the target's.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from guard.embeds import decode_embeds
from guard.keys import GuardKey
from guard.pipeline import Guard
from guard.policy import TargetPolicy
from guard.prompts import ModelPrompts
from guard.types import AdapterUse, BoolArray, Detection, FloatArray, TargetRoute, TextHit

WEIGHTS = {"ann": 0.5, "bob": 1.0, "cid": 0.75}
ANN = "Where does ann live?"
BOTH = "Did ann ever meet bob?"
BENIGN = "How do I bake bread?"


class Names:
    """Flags texts that hold a target's name; a later name is the surer hit."""

    targets = tuple(WEIGHTS)

    def detect(self, texts: Sequence[str]) -> Detection:
        hits = tuple(tuple(self._hits(text)) for text in texts)
        margins = np.array([1.0 if some else -1.0 for some in hits], np.float32)
        return Detection(hits, margins, np.ones(len(texts), np.float32))

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        start = text.find(target)
        return [(start, start + len(target))] if start >= 0 else []

    def _hits(self, text: str) -> list[TextHit]:
        return [
            TextHit(name, float(number), 0.01 / number, weight)
            for number, (name, weight) in enumerate(WEIGHTS.items(), start=1)
            if name in text
        ]


@dataclass(frozen=True)
class Filling:
    """Fills the marked rows with one number, so that a test sees who wrote them."""

    number: float

    def __call__(
        self, embeddings: FloatArray, positions: BoolArray, seed: bytes, frame: BoolArray
    ) -> FloatArray:
        filled = embeddings.copy()
        filled[positions] = self.number
        return filled

    def stand_ins(
        self, corrupted: FloatArray, positions: BoolArray
    ) -> list[tuple[int, int, tuple[str, ...]]]:
        return []


FILLED = {name: float(number) for number, name in enumerate(WEIGHTS, start=2)}


def adapter(name: str, weight: float = 1.0) -> AdapterUse:
    return AdapterUse(f"key of {name}", Path(name), 8, weight)


def policy(name: str, route: TargetRoute) -> TargetPolicy:
    return TargetPolicy("enforced", Filling(FILLED[name]), route=route, adapter=adapter(name))


def guard_of(
    prompts: ModelPrompts | None,
    routes: Mapping[str, TargetRoute],
    detecting: Sequence[str] = (),
) -> Guard:
    policies = {name: policy(name, routes.get(name, "corrupt")) for name in WEIGHTS}
    policies |= {name: replace(policies[name], status="detecting") for name in detecting}
    return Guard(Names(), policies, GuardKey(bytes(32)), prompts)


def chat(*contents: Any, **fields: Any) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def tool(words: str) -> dict[str, Any]:
    """A field of a request that no embeddings can take the place of."""
    return {"tools": [{"type": "function", "function": {"name": "f", "description": words}}]}


def fillings(part: str) -> set[float]:
    """Which targets' numbers fill whole rows of sent embeddings."""
    rows = decode_embeds(base64.b64decode(part), 10_000_000)
    return {number for number in FILLED.values() if (rows == number).all(axis=1).any()}


def filled(body: bytes, message: int = 0) -> set[float]:
    content = json.loads(body)["messages"][message]["content"]
    return fillings(content[0]["data"]) if isinstance(content, list) else set()
