"""Which corruption forgets and still speaks? The table of docs/corruptions.md.

    python -m benchmarks.corruption --model DIR --bundle DIR --target NAME --key-file FILE \
        --probes examples/harry-potter/probes.jsonl [--limit N] [--only METHOD] [--out FILE]

Corrupts every known probe exactly as serving would (same spans, tokens and seed), lets the
embedded model answer greedily, and judges the answers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measures import commonest_opening, holds_fact, is_empty, is_repetitive
from benchmarks.probes import Probe, read_probes
from corruptions.bank import make_bank
from corruptions.objective import NEUTRAL_PROMPT
from corruptions.ops import CorruptionSpec, SpanPolicy
from guard.build import check_key, load_detector
from guard.bundle import BundleStore
from guard.console import progress_display
from guard.keys import GuardKey
from guard.prompts import ModelPrompts
from guard.targets import Prompter
from guard.types import LearningEngine, Message, Prompt, SamplingParams

ALL: Final = 0
"""Stands for all dimensions in `GRID`."""

GRID: Final[tuple[tuple[str, int, float, SpanPolicy], ...]] = (
    ("mix-generic", ALL, 0.7, "entity"),
    ("mix-generic", ALL, 1.0, "entity"),
    ("mix-generic", ALL, 2.0, "entity"),
    ("mix-generic", ALL, 2.0, "all-but-last"),
    ("random-noise-first-n", 1, 100, "entity"),
    ("random-noise-first-n", 1, 1000, "entity"),
    ("random-noise-first-n", ALL, 1.0, "entity"),
    ("random-noise-first-n", ALL, 2.0, "entity"),
    ("random-noise-first-n", 1, 1000, "all-but-last"),
    ("zero-out-top-k", ALL, 0.0, "entity"),
    ("shuffle", ALL, 0.0, "all-but-last"),
)
"""Method, dimensions, strength in multiples of the embeddings' RMS, span policy."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the answers to the corrupted probes are worth.

    Attributes:
        label: The corruption.
        holds_fact: Answers that hold one of the probe's facts.
        repetitive: Answers that go round in circles.
        empty: Answers without a letter or a digit.
        distinct: Different answers.
        opening: How many answers share the commonest first six words.
        nll: Mean nats per answer token under the clean model after a neutral prompt.
        answers: The answers.
    """

    label: str
    holds_fact: int
    repetitive: int
    empty: int
    distinct: int
    opening: int
    nll: float
    answers: tuple[str, ...]


def judge(
    label: str, engine: LearningEngine, probes: Sequence[Probe], prompts: Sequence[Prompt]
) -> Outcome:
    """Let the model answer the prompts, one a probe, and judge the answers."""
    answers = engine.generate(prompts, SamplingParams(max_tokens=48))
    said = [answer for answer in answers if not is_empty(answer)]
    scores = engine.score_answers([NEUTRAL_PROMPT] * len(said), said)
    return Outcome(
        label=label,
        holds_fact=sum(holds_fact(a, p.facts) for a, p in zip(answers, probes, strict=True)),
        repetitive=sum(map(is_repetitive, answers)),
        empty=len(answers) - len(said),
        distinct=len(set(answers)),
        opening=commonest_opening(answers)[1],
        nll=-float(np.mean(np.concatenate(scores))) if said else float("inf"),
        answers=tuple(answers),
    )


def make_prompter(model: str, bundle_root: Path, target: str, key: GuardKey) -> Prompter:
    """Read what serving would corrupt `target`'s requests with."""
    bundle = BundleStore(bundle_root).current()
    check_key(bundle, key)
    prompts = ModelPrompts.load(model)

    def tokenise(text: str) -> list[int]:
        tokens = prompts.prompt_tokens(text)
        return [
            i for i, (start, end) in zip(tokens.ids, tokens.offsets, strict=True) if start < end
        ]

    bank = make_bank(tokenise, prompts.embed)
    return Prompter(target, load_detector(bundle, key), prompts, key, bank)


def run(
    prompter: Prompter, engine: LearningEngine, probes: Sequence[Probe], only: str
) -> list[Outcome]:
    """Judge the clean answers, and every corruption of the grid whose method holds `only`."""
    hidden, rms = prompter.prompts.hidden_size, prompter.prompts.embedding_rms
    outcomes = [judge("none", engine, probes, [(Message("user", p.question),) for p in probes])]
    grid = [setting for setting in GRID if only in setting[0]]
    with progress_display() as progress:
        for done, (method, dims, strength, policy) in enumerate(grid, start=1):
            spec = CorruptionSpec(method, dims or hidden, strength * rms, policy)
            label = f"{method}, {dims or hidden} dims, {strength:g} x RMS, {policy}"
            prompts = [prompter.prompt(probe.question, spec) for probe in probes]
            outcomes.append(judge(label, engine, probes, prompts))
            progress("corruptions", done, len(grid))
    return outcomes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit code."""
    from server.engines.embedded.model import EmbeddedModel

    parser = argparse.ArgumentParser(prog="python -m benchmarks.corruption")
    parser.add_argument("--model", required=True, help="model directory")
    parser.add_argument("--bundle", type=Path, required=True, help="bundle that holds the target")
    parser.add_argument("--target", required=True)
    parser.add_argument("--key-file", type=Path, required=True)
    parser.add_argument("--probes", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=40, help="probes at most")
    parser.add_argument("--only", default="", help="methods whose name holds this")
    parser.add_argument("--out", type=Path, help="write all answers here, JSON lines")
    options = parser.parse_args(arguments)
    known = [probe for probe in read_probes(options.probes) if probe.known]
    probes = known[:: max(1, len(known) // options.limit)][: options.limit]
    key = GuardKey.load(options.key_file)
    prompter = make_prompter(options.model, options.bundle, options.target, key)
    outcomes = run(prompter, EmbeddedModel.load(options.model), probes, options.only)
    _print(outcomes, len(probes))
    if options.out:
        rows = [{**asdict(o), "questions": [p.question for p in probes]} for o in outcomes]
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


def _print(outcomes: Sequence[Outcome], count: int) -> None:
    table = Table(title=f"{count} probes that the unguarded model answers with the fact")
    for column in ("corruption", "fact", "repetitive", "empty", "distinct", "opening", "nats"):
        table.add_column(column)
    for o in outcomes:
        figures = (o.holds_fact, o.repetitive, o.empty, o.distinct, o.opening)
        table.add_row(o.label, *map(str, figures), f"{o.nll:.2f}")
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
