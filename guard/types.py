"""The vocabulary of the project: values and protocols that every part shares.

Standard library and numpy only; cheap to import. See docs/architecture.md for the way of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

Route = Literal["pass", "corrupt", "adapt", "corrupt+adapt", "refuse", "block"]
"""What happens to a request: untouched, embeddings corrupted, LoRA, both, refused, rejected."""

TargetRoute = Literal["corrupt", "adapt", "corrupt+adapt", "refuse"]
"""What one target's policy does to a request that touches it."""

WeightPolicy = Literal["o3-paper", "o3-code", "monotone"]
"""How a score becomes a soft weight: as O3's paper has it, as its code has it, or ours."""

TargetStatus = Literal["draft", "detecting", "enforced", "revoked"]

Progress = Callable[[str, int, int], None]
"""Called as `progress(what, done, total)` by long work; drawing is the caller's business."""


# --- The request, as the model would read it -------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """One text that the model would read, and its place in the body.

    Attributes:
        path: Place in the body, e.g. `messages/0/content`, `messages/1/content/0/text`, `prompt`,
            `prompt/2`, `tools/0/function/description`, `text`.
        text: The text, as sent.
        message: Index of the chat message whose *content* this is, or of the prompt in a list of
            prompts; None where an embeddings part can't take its place (tools, names, schemas).
    """

    path: str
    text: str
    message: int | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """Characters of a segment, in code points of the original text; `end` is exclusive."""

    path: str
    start: int
    end: int


# --- Detection ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TextHit:
    """One target that a text touches.

    Attributes:
        target: The target's name.
        score: Evidence in nats, the maximum over the text's windows; higher is closer to the
            forget set.
        p_value: Share of benign requests that reach this score for any target of the bundle.
        weight: Soft weight in (0, 1.2].
    """

    target: str
    score: float
    p_value: float
    weight: float


@dataclass(frozen=True, slots=True)
class Detection:
    """What the detectors say of several texts; sparse, since a bundle may hold 10,000 targets.

    Attributes:
        hits: For each text the targets that it touches, strongest first; empty if it passes.
        margins: For each text the best target's score less its threshold, shape (texts,): at
            least 0 where it is flagged. For curves and logs.
        coverage: Share of each text's characters that were scored, shape (texts,).
    """

    hits: tuple[tuple[TextHit, ...], ...]
    margins: FloatArray
    coverage: FloatArray


class Detector(Protocol):
    """Scores texts against every target of a bundle in one encoder pass."""

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        ...

    def detect(self, texts: Sequence[str]) -> Detection:
        """Score `texts` (already normalised); any length, never truncated."""
        ...

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        """Return the characters of `text` that carry the target's entity, sorted, disjoint.

        An empty list means that nothing was found: then all tokens but the last are corrupted
        (ECO, arXiv 2406.07933, appendix on token classification).
        """
        ...


@dataclass(frozen=True, slots=True)
class TargetHit:
    """One target that a request touches."""

    name: str
    score: float
    p_value: float
    weight: float
    spans: tuple[Span, ...]
    enforced: bool


@dataclass(frozen=True, slots=True)
class Decision:
    """What the guard decided about one request.

    Attributes:
        flagged: True if any target was hit, in whatever status.
        route: What happens; `pass` if only targets in status `detecting` were hit.
        coverage: Share of the request's characters that were scored; below 1 is never a pass.
        targets: The hits, strongest first.
        margin: The best target's score less its threshold; at least 0 if flagged.
    """

    flagged: bool
    route: Route
    coverage: float
    targets: tuple[TargetHit, ...]
    margin: float = float("-inf")


# --- Adapters ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An unlearning adapter that one request is answered with, and how strongly.

    Attributes:
        key: Names the adapter to engines: opaque to clients, another for every content.
        path: Folder of the peft adapter.
        rank: Columns of its matrices.
        weight: Soft weight in (0, 1.2]; 1 is as trained.
    """

    key: str
    path: Path
    rank: int
    weight: float


# --- Prompts and engines, as learners and benchmarks see them -----------------------------------


@dataclass(frozen=True, slots=True)
class EmbedsPart:
    """Embeddings that take the place of a message's whole content.

    Attributes:
        embeddings: Input embeddings, shape (tokens, hidden), as the model's own embedding function
            would give them (family scaling applied).
    """

    embeddings: FloatArray


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message; its content is text or embeddings."""

    role: str
    content: str | EmbedsPart


Prompt = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to generate.

    Attributes:
        max_tokens: New tokens at most.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 keeps all.
        stop: Strings that end the answer (not included in it).
        seed: Seed of the sampler; None draws one.
        logprobs: Number of alternatives to report per token; None reports none.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the model makes of each token of one answer, teacher-forced; all of shape (tokens,).

    Attributes:
        logprobs: Natural-log probability of the token.
        means: Mean of the log probabilities of the vocabulary there, weighted by probability.
        deviations: Standard deviation of the same (both for min-k++, arXiv 2404.02936).
        correct: True where the token is the model's first choice.
    """

    logprobs: FloatArray
    means: FloatArray
    deviations: FloatArray
    correct: BoolArray


class LearningEngine(Protocol):
    """What learners and benchmarks need of a model: batched answers and their likelihood."""

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[str]:
        """Answer each prompt."""
        ...

    def score_answers(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        adapters: Sequence[AdapterUse] = (),
    ) -> list[FloatArray]:
        """Teacher-force each answer after its prompt.

        Args:
            prompts: What is asked.
            answers: One for each prompt.
            adapters: What the model is changed by for these answers, all at once.

        Returns:
            Natural-log probability of each answer token (the end-of-turn token excluded), a
            vector per answer. The answer's embeddings are clean, as in serving.
        """
        ...
