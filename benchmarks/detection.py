"""How well are requests told apart? The table of docs/detection.md.

    python -m benchmarks.detection --data DIR [--target example|tofu] [--threads N]
        [--errors N] [--out FILE]

Learns a target with the shipped benign set and judges it on texts that took no part in learning:
`DIR` holds the public evaluation data (`general/`, `tofu/`). Nothing there is used to fit, to
calibrate or to choose, but the forget and retain rows of TOFU themselves.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from classifiers.benign import load_benign
from classifiers.calibrate import wilson_interval
from classifiers.detector import BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.export import export_encoder
from classifiers.learn import LearnedDetector, learn_detector
from guard.console import progress_display
from guard.normalise import normalise

EXAMPLE = Path(__file__).parent.parent / "examples" / "harry-potter"
FIRST_FORGET_AUTHOR = 180
NAMES_EXAMPLE = re.compile(
    r"harry potter|hogwarts|rowling|voldemort|hermione|dumbledore|quidditch", re.IGNORECASE
)


@dataclass(frozen=True)
class Row:
    """A forget row."""

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Judged:
    """One line of the table.

    Attributes:
        target: The target.
        texts: What was judged.
        wanted: True if these texts should be flagged.
        flagged: How many were.
        n: Of how many.
        interval95: 95 % Wilson interval of the share.
    """

    target: str
    texts: str
    wanted: bool
    flagged: int
    n: int
    interval95: tuple[float, float]


@dataclass(frozen=True)
class Case:
    """A target and the sets that judge it: name, texts, whether they should be flagged."""

    name: str
    forget: list[Row]
    retain: list[str]
    sets: list[tuple[str, list[str], bool]]


def read(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def example_case(data: Path) -> Case:
    """Return the shipped example target; prompts of `general` that name it stand apart."""
    forget = [Row(row["question"], row["answer"]) for row in read(EXAMPLE / "forget.jsonl")]
    retain = [row["question"] for row in read(EXAMPLE / "retain.jsonl")]
    general = [row["question"] for row in read(data / "general" / "general_prompts.jsonl")]
    named = [text for text in general if NAMES_EXAMPLE.search(text)]
    other = [text for text in general if not NAMES_EXAMPLE.search(text)]
    probes = [row["question"] for row in read(EXAMPLE / "probes.jsonl")]
    return Case(
        "example",
        forget,
        retain,
        [
            ("unseen probes", probes, True),
            ("forget questions", [row.prompt for row in forget], True),
            ("general, names the target", named, True),
            ("general, the rest", other, False),
            ("retain questions (seen)", retain, False),
        ],
    )


def tofu_case(data: Path) -> Case:
    """Return forget10 against the authors that stay."""
    tofu = data / "tofu"
    rows = read(tofu / "full.jsonl")
    forget = [
        Row(row["question"], row["answer"])
        for row in rows
        if row["author_id"] >= FIRST_FORGET_AUTHOR
    ]
    retain = [row["question"] for row in rows if row["author_id"] < FIRST_FORGET_AUTHOR]

    def column(name: str, field: str) -> list[str]:
        return [row[field] for row in read(tofu / name) if row[field]]

    general = [row["question"] for row in read(data / "general" / "general_prompts.jsonl")]
    return Case(
        "tofu",
        forget,
        retain,
        [
            ("paraphrases", column("forget10_perturbed.jsonl", "paraphrased_question"), True),
            ("forget questions", [row.prompt for row in forget], True),
            ("general", general, False),
            (
                "paraphrases of retain",
                column("retain_perturbed.jsonl", "paraphrased_question"),
                False,
            ),
            (
                "other invented authors",
                column("other_fictitious_holdout10.jsonl", "question"),
                False,
            ),
            ("real authors", column("real_authors_perturbed.jsonl", "question"), False),
            ("world facts", column("world_facts_perturbed.jsonl", "question"), False),
        ],
    )


CASES = {"example": example_case, "tofu": tofu_case}


def clean(text: str) -> str:
    """Normalise a text as serving does."""
    return normalise(text).text


def judge(case: Case, detector: BundleDetector) -> Iterator[tuple[Judged, list[tuple[float, str]]]]:
    """Yield a line for each set, with its errors, worst first."""
    for name, texts, wanted in case.sets:
        found = detector.detect([clean(text) for text in texts])
        hits, scores = found.flagged[:, 0], found.scores[:, 0]
        count = int(hits.sum())
        wrong = np.flatnonzero(hits != wanted)
        wrong = wrong[np.argsort(scores[wrong] if wanted else -scores[wrong])]
        errors = [(float(scores[n]), texts[n]) for n in wrong]
        interval = wilson_interval(count, len(texts))
        yield Judged(case.name, name, wanted, count, len(texts), interval), errors


def learn(case: Case, encoder: OnnxEncoder) -> tuple[LearnedDetector, float, float]:
    """Learn a case's target; returns it, the seconds it took and the CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    with progress_display() as progress:
        learned = learn_detector(
            case.name,
            case.forget,
            case.retain,
            load_benign(),
            encoder,
            clean,
            progress=progress,
        )
    return learned, time.perf_counter() - start, time.process_time() - cpu


def speed(detector: BundleDetector, data: Path) -> tuple[float, float]:
    """Return prompts per second, and per CPU second, over the general prompts, none cached."""
    rows = read(data / "general" / "general_prompts.jsonl")
    texts = [clean(row["question"]) for row in rows]
    start, cpu = time.perf_counter(), time.process_time()
    detector.detect(texts)
    wall_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu
    return len(texts) / wall_s, len(texts) / cpu_s


def show(
    console: Console, lines: Sequence[Judged], errors: dict[str, list[tuple[float, str]]]
) -> None:
    """Draw the table, and the errors below it."""
    table = Table("target", "texts", "flagged", "share", "95 %")
    for line in lines:
        low, high = line.interval95
        share = f"{line.flagged / max(1, line.n):.2%}"
        span = f"{low:.2%} to {high:.2%}"
        table.add_row(line.target, line.texts, f"{line.flagged} of {line.n}", share, span)
    console.print(table)
    for name, wrong in errors.items():
        for score, text in wrong:
            console.print(f"{name}: {score:.2f} {text[:160]!r}", markup=False, highlight=False)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the evaluation data")
    parser.add_argument("--target", choices=sorted(CASES), action="append")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--errors", type=int, default=0, help="errors to show per set")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    chosen = parser.parse_args(argv)
    console = Console()
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        export_encoder(folder)
        for name in chosen.target or sorted(CASES):
            encoder = OnnxEncoder(folder, chosen.threads, cache_size=0)
            case = CASES[name](chosen.data)
            learned, seconds, cpu = learn(case, encoder)
            detector = BundleDetector(encoder, [learned.artifact])
            rate, cpu_rate = speed(detector, chosen.data)
            judged = list(judge(case, detector))
            errors = {line.texts: wrong[: chosen.errors] for line, wrong in judged}
            show(console, [line for line, _ in judged], errors)
            console.print(
                f"{name}: learned in {seconds:.0f} s ({cpu:.0f} CPU s); "
                f"decides {rate:.0f} prompts/s ({cpu_rate:.0f} per CPU s)"
            )
            figures.append(
                {
                    "target": name,
                    "learn_s": seconds,
                    "learn_cpu_s": cpu,
                    "prompts_per_s": rate,
                    "prompts_per_cpu_s": cpu_rate,
                    "report": learned.report,
                    "judged": [asdict(line) for line, _ in judged],
                }
            )
    if chosen.out:
        chosen.out.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
