"""What an adapter is trained on beside its forget set: other answers, and levels to meet.

Counterfactual answers are asked for as serving would ask: the question goes through the target's
own corruption, and the asked name is put back into the answer. What is made here holds the target's
name, so it is kept (for a resumed training) only until the training is done.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from guard.adapter_request import AdapterRequest, TrainableModel
from guard.errors import ArtifactError, DataError
from guard.restore import NameRestorer
from guard.targets import Prompter
from guard.types import Message, Progress, SamplingParams

if TYPE_CHECKING:
    from adapters.alternatives import Pairs, Rows
    from adapters.matched import Teacher
    from adapters.unlearning import LossData
    from corruptions.spec import CorruptionSpec

ANSWER_TOKENS: Final = 48
"""Length of counterfactual answers."""

_TEMPERATURE: Final = 0.7
_COUNT: Final = 2
_ANSWERS: Final = "answers.json"
_TEACHER: Final = "teacher.safetensors"
_LEVELS: Final = "levels.json"


@dataclass(frozen=True, slots=True)
class Levels:
    """How likely the answers are to a model that never read them, as far as the model itself tells.

    After each of some unrelated questions; of these the least helpful counts, row by row.

    Attributes:
        tail: Mean log-probability of the least likely 40 % of an answer's tokens, mean over rows.
        probability: Geometric mean probability of an answer's tokens, mean over rows.
    """

    tail: float
    probability: float


def find_levels(
    request: AdapterRequest,
    pairs: Pairs,
    model: TrainableModel,
    identity: str,
    progress: Progress,
) -> Levels:
    """Measure `unrelated_levels`, or take what an earlier run of the same model and rows found."""
    path, key = _folder(request) / _LEVELS, f"{identity}/{_digest(pairs)}"
    if path.exists():
        try:
            kept = json.loads(path.read_bytes())
            if kept["identity"] == key:
                return Levels(float(kept["tail"]), float(kept["probability"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path} can't be read ({error}); delete it") from error
    levels = unrelated_levels(model, [answer for _, answer in pairs], progress)
    facts = {"identity": key, "tail": levels.tail, "probability": levels.probability}
    path.write_text(json.dumps(facts), encoding="utf-8")
    return levels


def unrelated_levels(model: TrainableModel, answers: Sequence[str], progress: Progress) -> Levels:
    """Measure the surrogate of a retained model's likelihoods."""
    import torch

    from adapters.matched import tail_of
    from corruptions.objective import UNRELATED_QUESTIONS

    tails, means = [], []
    for number, question in enumerate(UNRELATED_QUESTIONS):
        progress("levels of the unknown", number, len(UNRELATED_QUESTIONS))
        found = model.score_answers([(Message("user", question),)] * len(answers), answers)
        tails.append([float(tail_of(torch.from_numpy(row))) for row in found])
        means.append([float(row.mean()) for row in found])
    progress("levels of the unknown", len(UNRELATED_QUESTIONS), len(UNRELATED_QUESTIONS))
    least = np.min(means, axis=0)
    return Levels(float(np.mean(np.min(tails, axis=0))), float(np.mean(np.exp(least))))


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
    teacher: tuple[Any, ...] = ()
    if request.loss == "matched":
        teacher = _teacher(request, pairs, examples, model, levels, progress).rows
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
    examples: Sequence[Any],
    model: TrainableModel,
    levels: Levels,
    progress: Progress,
) -> Teacher:
    from safetensors.torch import load_file, save_file

    from adapters.matched import Teacher, given_tokens, make_teacher

    path = _folder(request) / _TEACHER
    identity = f"{_digest(pairs)}/{request.seed}/{levels.tail:.6f}"
    if path.exists():
        facts, names = _teacher_facts(path)
        if facts.get("identity") == identity:
            found = load_file(path)
            rows = tuple(found[name] for name in sorted(names))
            return Teacher(rows, *(float(facts[name]) for name in ("noise", "tail", "wanted")))
    given = [
        given_tokens(model.tokenizer, question, answer, len(example.answer))
        for (question, answer), example in zip(pairs, examples, strict=True)
    ]
    teacher = make_teacher(
        model.model,
        examples,
        given,
        levels.tail,
        seed=request.seed,
        progress=lambda done, total: progress("what each token has to meet", done, total),
    )
    found_at = {"noise": teacher.noise, "tail": teacher.tail, "wanted": teacher.wanted}
    save_file(
        {f"{row:06d}": value.contiguous() for row, value in enumerate(teacher.rows)},
        path,
        {"identity": identity, **{name: str(value) for name, value in found_at.items()}},
    )
    return teacher


def _teacher_facts(path: Path) -> tuple[dict[str, str], list[str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), list(file.keys())
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
