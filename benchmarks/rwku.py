"""RWKU (arXiv 2406.10890): ten famous people, learned from little, and their neighbours kept.

Each person is a target of one bundle, without retain data; learned from the level 1 and 2 probes
and judged on level 3, or learned from the one sentence that introduces them and judged on all
probes. A probe names the target if it holds the full name or the surname as a word.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.curves import share_row
from benchmarks.labelled import json_lines
from benchmarks.report import Row
from benchmarks.tofu import Fact
from classifiers.background import Background, make_background
from classifiers.benign import load_benign
from classifiers.calibrate import fit_bundle
from classifiers.detector import BundleDetector
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import NAMED_LOGIT
from classifiers.export import export_encoder
from classifiers.learn import TargetLearner
from classifiers.verbatim import GramHasher
from guard.normalise import normalise
from guard.types import Progress

JUDGED_LEVEL: Final = 3
WAYS: Final = ("probes", "introduction")
BUDGET: Final = 1e-3


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about a person, or about somebody or something beside them.

    Attributes:
        target: Whom the target is named after.
        text: The question.
        answer: Its answer.
        level: 1 and 2 are plain, 3 is an attack.
    """

    target: str
    text: str
    answer: str
    level: int

    @property
    def names_in_full(self) -> bool:
        """True if the person's full name stands in it."""
        return _holds(self.text, self.target)

    @property
    def names(self) -> bool:
        """True if full name or surname stand in it."""
        return _holds(self.text, self.target.split()[-1])


@dataclass(frozen=True, slots=True)
class Rwku:
    """The benchmark's data.

    Attributes:
        introductions: One sentence for each person.
        forget: Probes about them.
        neighbours: Probes about what is beside them.
    """

    introductions: Mapping[str, str]
    forget: tuple[Probe, ...]
    neighbours: tuple[Probe, ...]


def load_rwku(folder: Path) -> Rwku:
    """Read `folder/rwku`.

    Raises:
        DataError: If a file is missing or malformed.
    """
    rwku = folder / "rwku"
    people = {row["target"]: row["intro"] for _, row in json_lines(rwku / "targets.jsonl")}
    forget, neighbours = (
        tuple(_probe(row) for _, row in json_lines(rwku / f"{name}_probes.jsonl"))
        for name in ("forget", "neighbor")
    )
    return Rwku(people, forget, neighbours)


def learned_from(data: Rwku, way: str) -> dict[str, list[Fact]]:
    """Return the forget rows of each person, `way` one of WAYS."""
    if way == "introduction":
        return {name: [Fact(text, None)] for name, text in data.introductions.items()}
    rows: dict[str, list[Fact]] = {name: [] for name in data.introductions}
    for probe in data.forget:
        if probe.level < JUDGED_LEVEL:
            rows[probe.target].append(Fact(probe.text, probe.answer))
    return rows


def judge(data: Rwku, way: str, detector: BundleDetector) -> list[Row]:
    """Return what is flagged of each kind of probe."""
    asked = [p for p in data.forget if way == "introduction" or p.level == JUDGED_LEVEL]
    system = f"learned from {way}"

    def row(measure: str, group: str, probes: Iterable[Probe]) -> Row:
        texts = [normalise(probe.text).text for probe in probes]
        flagged = sum(map(bool, detector.detect(texts).hits))
        return share_row(system, "detect", measure, group, flagged, len(texts))

    return [
        row("recall", "full name", (p for p in asked if p.names_in_full)),
        row("recall", "name or surname", (p for p in asked if p.names)),
        row("recall", "neither", (p for p in asked if not p.names)),
        row("fpr", "neighbours", data.neighbours),
        row("fpr", "neighbours without the name", (p for p in data.neighbours if not p.names)),
    ]


def measure(
    data: Rwku, encoder: OnnxEncoder, background: Background, progress: Progress, seed: int = 0
) -> list[Row]:
    """Learn the people each way, and judge."""
    hasher = GramHasher(b"rwku")
    learner = TargetLearner(background, encoder, hasher, lambda text: normalise(text).text)
    rows: list[Row] = []
    for way in WAYS:
        people = learned_from(data, way)
        artifacts = []
        for name, facts in people.items():
            artifacts.append(learner.learn(name, facts, seed).artifact)
            progress(f"rwku: {way}", len(artifacts), len(people))
        found = [artifact.calibration for artifact in artifacts]
        calibration = fit_bundle(found, BUDGET, most=NAMED_LOGIT)
        detector = BundleDetector(encoder, background.space, artifacts, calibration, hasher)
        rows += judge(data, way, detector)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure it on the benign set that ships, and write the report."""
    from benchmarks.report import write_module_report
    from guard.console import progress_display

    args = _parser().parse_args(arguments)
    data = load_rwku(args.data)
    benign = [normalise(text).text.strip() for text in load_benign()]
    with tempfile.TemporaryDirectory() as scratch, progress_display() as progress:
        encoder = OnnxEncoder(export_encoder(Path(scratch) / "encoder"), threads=1)
        rows = measure(data, encoder, make_background(benign, encoder, args.seed), progress)
    write_module_report(args.out, "benchmarks.rwku", arguments, rows, seed=args.seed)


def _probe(row: Mapping[str, Any]) -> Probe:
    return Probe(str(row["target"]), str(row["question"]), str(row["answer"]), int(row["level"]))


def _holds(text: str, name: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) is not None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds `rwku`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
