"""TOFU's files in small: invented authors to forget and to keep, and a few prompts of each kind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from classifiers.benign import load_benign
from classifiers.synthetic import SyntheticTarget, generate_targets


def write_tiny_tofu(folder: Path) -> Path:
    """Write the files that `benchmarks.tofu` reads: three authors to forget, three to keep."""
    targets = list(generate_targets(8, seed=3))
    forget, keep, other = targets[:3], targets[3:6], targets[6:]
    (folder / "tofu").mkdir(parents=True)
    (folder / "general").mkdir()
    full = [_row(target, n, "retain") for n, target in enumerate(keep)]
    full += [_row(target, n, "forget10") for n, target in enumerate(forget, start=10)]
    _write(folder / "tofu" / "full.jsonl", [row for rows in full for row in rows])
    for name, some in (("forget10_perturbed", forget), ("retain_perturbed", keep)):
        texts = [text for target in some for text in target.paraphrases[:8]]
        rows = [{"paraphrased_question": text} for text in texts]
        _write(folder / "tofu" / f"{name}.jsonl", [*rows, {"paraphrased_question": None}])
    asked = [{"question": question} for target in other for question, _ in target.rows[:8]]
    _write(folder / "tofu" / "other_fictitious_holdout10.jsonl", asked)
    benign = load_benign()
    short = [{"question": text} for text in benign if len(text) < 200]
    _write(folder / "tofu" / "real_authors_perturbed.jsonl", short[-10:])
    _write(folder / "tofu" / "world_facts_perturbed.jsonl", short[-20:-10])
    _write(folder / "general" / "general_prompts.jsonl", short[-60:-20])
    _write(folder / "benign.jsonl", [{"text": row["question"]} for row in short[:260]])
    return folder


def _row(target: SyntheticTarget, author: int, split: str) -> list[dict[str, Any]]:
    return [
        {"question": question, "answer": answer, "author_id": author, "split": split}
        for question, answer in target.rows
    ]


def _write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
