"""What an adapter is trained on beside its forget set: other answers, and levels to meet.

Counterfactual answers are asked for as serving would ask: the question goes through the target's
own corruption, and the asked name is put back into the answer. What is made here holds the target's
name, so it is kept (for a resumed training) only until the training is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guard.adapter_request import AdapterRequest, TrainableModel
from guard.errors import ArtifactError, DataError
from guard.restore import NameRestorer
from guard.targets import Prompter
from guard.types import Progress, SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from adapters.alternatives import Pairs, Rows
    from adapters.examples import Example
    from adapters.unlearning import LossData
    from corruptions.spec import CorruptionSpec

ANSWER_TOKENS: Final = 48
"""Length of counterfactual answers."""

_TEMPERATURE: Final = 0.7
_COUNT: Final = 2
_ANSWERS: Final = "answers.json"
_TEACHER: Final = "teacher.safetensors"
_LEVELS: Final = "levels.safetensors"


@dataclass(frozen=True, slots=True)
class Levels:
    """How likely the answers are to a model that never read them, as far as the model itself tells.

    Attributes:
        rows: Log-probabilities of each answer's tokens, the turn's end too, shape (tokens,).
    """

    rows: tuple[Tensor, ...]

    def only(self, places: Iterable[int]) -> Levels:
        """Return those of some rows."""
        return Levels(tuple(self.rows[place] for place in places))

    @property
    def tail(self) -> float:
        """Mean log-probability of the least likely 40 % of an answer's tokens, mean over rows."""
        from adapters.matched import tail_likelihood

        return tail_likelihood(self.rows)

    @property
    def probability(self) -> float:
        """Geometric mean probability of an answer's tokens, mean over rows."""
        told = (row[: max(len(row) - 1, 1)] for row in self.rows)
        return float(np.mean([float(row.mean().exp()) for row in told]))


def find_levels(
    request: AdapterRequest,
    pairs: Pairs,
    model: TrainableModel,
    identity: str,
    progress: Progress,
) -> Levels:
    """Measure `unknown_levels`, or take what an earlier run of the same model and rows found."""
    from adapters.examples import encode_chats
    from adapters.matched import NOISE, given_tokens, unknown_levels

    path = _folder(request) / _LEVELS
    key = f"{identity}/{_digest(pairs)}/{request.seed}/{NOISE}"
    kept = _kept_rows(path, key)
    if kept is not None:
        return Levels(kept)
    examples = encode_chats(model.tokenizer, pairs)
    given = [
        given_tokens(model.tokenizer, question, answer, len(example.answer))
        for (question, answer), example in zip(pairs, examples, strict=True)
    ]
    rows = unknown_levels(
        model.model,
        examples,
        given,
        seed=request.seed,
        progress=lambda done, total: progress("levels of the unknown", done, total),
    )
    _keep_rows(path, key, rows)
    return Levels(rows)


def prepare(
    request: AdapterRequest,
    pairs: Pairs,
    model: TrainableModel,
    prompter: Prompter,
    spec: CorruptionSpec,
    levels: Levels,
    progress: Progress,
) -> LossData:
    """Make what the request's loss needs, or take what an earlier run of the same made.

    Raises:
        DataError: A row has no usable alternative.
    """
    from adapters.alternatives import encode_rows
    from adapters.examples import encode_chats
    from adapters.unlearning import LOSSES, LossData

    needs = LOSSES[request.loss].needs
    examples = tuple(encode_chats(model.tokenizer, pairs))
    rows = _alternatives(request, needs, pairs, model, prompter, spec, progress)
    teacher: tuple[Tensor, ...] = ()
    if request.loss == "matched":
        teacher = _teacher(request, pairs, examples, model, levels)
    encoded = encode_rows(model.tokenizer, rows) if rows else ()
    return LossData(examples, encoded, seed=request.seed, teacher=teacher)


def forget_prepared(request: AdapterRequest) -> None:
    """Delete what was kept for resuming, unless the request names a folder for it."""
    if request.prepared is None:
        for name in (_ANSWERS, _TEACHER, _LEVELS):
            (request.out / name).unlink(missing_ok=True)


def _folder(request: AdapterRequest) -> Path:
    folder = request.prepared or request.out
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _alternatives(
    request: AdapterRequest,
    needs: str,
    pairs: Pairs,
    model: TrainableModel,
    prompter: Prompter,
    spec: CorruptionSpec,
    progress: Progress,
) -> Rows:
    from adapters import alternatives

    if needs == "refusals":
        return alternatives.refusals(pairs)
    if needs == "random-labels":
        return alternatives.random_labels(pairs, seed=request.seed)
    if needs == "generic-prompts":
        return alternatives.generic_prompts(pairs, [[_generic(prompter, q)] for q, _ in pairs])
    if needs != "counterfactuals":
        return []
    identity = f"{_digest(pairs)}/{json.dumps(spec.to_dict(), sort_keys=True)}/{request.seed}"
    path = _folder(request) / _ANSWERS
    kept = _kept(path, identity)
    if kept is not None:
        return kept
    rows = alternatives.counterfactuals(
        pairs,
        lambda questions, seed: _asked(model, prompter, spec, questions, seed),
        count=_COUNT,
        seed=request.seed,
        progress=progress,
    )
    rows = [row or _stand_by(pair) for row, pair in zip(rows, pairs, strict=True)]
    path.write_text(json.dumps({"identity": identity, "rows": rows}), encoding="utf-8")
    return rows


def _stand_by(pair: tuple[str, str]) -> tuple[tuple[str, str], ...]:
    """Where the model has nothing usable to say about a row, it says that it doesn't know."""
    from adapters.alternatives import REFUSALS

    return tuple((pair[0], refusal) for refusal in REFUSALS)


def _asked(
    model: TrainableModel,
    prompter: Prompter,
    spec: CorruptionSpec,
    questions: Sequence[str],
    seed: int,
) -> list[str]:
    """Ask about somebody unknown, and name whom was asked for in the answers."""
    corrupted = [prompter.corrupted(question, spec) for question in questions]
    params = SamplingParams(ANSWER_TOKENS, temperature=_TEMPERATURE, seed=seed)
    answers = model.generate([prompt for prompt, _ in corrupted], params)
    named = [
        NameRestorer(stand_ins).restore(answer)
        for (_, stand_ins), answer in zip(corrupted, answers, strict=True)
    ]
    return [_whole_sentences(answer) for answer in named]


def _whole_sentences(answer: str) -> str:
    """Leave out a sentence that the limit cut, if another stands before it."""
    cut = max(answer.rfind(mark) for mark in ".!?")
    return answer[: cut + 1] if cut > 0 else answer


def _generic(prompter: Prompter, question: str) -> str:
    content = prompter.generic_prompt(question)[0].content
    assert isinstance(content, str)  # a generic prompt is text
    return content


def _teacher(
    request: AdapterRequest,
    pairs: Pairs,
    examples: Sequence[Example],
    model: TrainableModel,
    levels: Levels,
) -> tuple[Tensor, ...]:
    from adapters.matched import make_teacher

    path = _folder(request) / _TEACHER
    identity = f"{_digest(pairs)}/{request.seed}/{levels.tail:.6f}"
    kept = _kept_rows(path, identity)
    if kept is not None:
        return kept
    teacher = make_teacher(model.model, examples, levels.rows)
    _keep_rows(path, identity, teacher)
    return teacher


def _keep_rows(path: Path, identity: str, rows: Sequence[Tensor]) -> None:
    from safetensors.torch import save_file

    named = {f"{place:06d}": row.contiguous() for place, row in enumerate(rows)}
    save_file(named, path, {"identity": identity})


def _kept_rows(path: Path, identity: str) -> tuple[Tensor, ...] | None:
    """Return what was kept, if it is of the same; None otherwise."""
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            if (file.metadata() or {}).get("identity") != identity:
                return None
            return tuple(file.get_tensor(name) for name in sorted(file.keys()))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); delete it") from error


def _kept(path: Path, identity: str) -> Rows | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes())
        if value["identity"] != identity:
            return None
        return [tuple((str(q), str(a)) for q, a in row) for row in value["rows"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} can't be read ({error}); delete it") from error


def _digest(pairs: Pairs) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(list(pairs)).encode()).hexdigest()


def answered_pairs(rows: Sequence[Any], file: Path) -> list[tuple[str, str]]:
    """Return the rows that have an answer, as question and answer.

    Raises:
        DataError: None has.
    """
    pairs = [(row.prompt, row.answer) for row in rows if row.answer is not None]
    if not pairs:
        raise DataError(
            "no row has an answer: an adapter is trained on questions and answers, e.g. "
            '{"question": …, "answer": …}',
            file=str(file),
        )
    return pairs
