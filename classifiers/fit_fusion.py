"""Fit the universal fusion of evidence on generated targets, and write it.

    python -m classifiers.fit_fusion [--targets N] [--seed S] [--out FILE]

Every generated target is learned as a user would: most from twenty questions and answers, some
from a running text, some from its first sentence alone, some with neighbours to keep. Positives
are its unseen paraphrases, its questions without the name, and its rows in variants; negatives are
benign texts (held out), and what is asked about other targets of the same kind. No benchmark is
read.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from classifiers.augment import variants
from classifiers.background import Background, Segments, make_background, segment_texts
from classifiers.benign import load_benign
from classifiers.encoder import OnnxEncoder
from classifiers.evidence import SIGNS, Fusion, fuse, terms
from classifiers.fusion import FILE
from classifiers.learn import TargetLearner
from classifiers.logistic import fit_fusion
from classifiers.study import Neighbours
from classifiers.synthetic import SyntheticTarget, generate_targets
from classifiers.verbatim import GramHasher
from guard.types import BoolArray, FloatArray, IntArray

ROUNDS = 3
HARDEST, RANDOM = 60, 120
NEIGHBOURS = 12
SHARES = {"benign": 0.35, "neighbour": 0.15, "named": 0.3, "nameless": 0.1, "variant": 0.1}
"""What each kind of text counts, together 1."""


@dataclass(frozen=True)
class Row:
    """A forget row."""

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class Batch:
    """Evidence of windows; windows of one text share an owner and are one example.

    Attributes:
        evidence: Shape (windows, 7).
        owners: Text of each window.
        kind: One of SHARES.
    """

    evidence: FloatArray
    owners: IntArray
    kind: str


def forget_rows(target: SyntheticTarget, mode: int) -> list[Row]:
    """Return what a user would give: questions and answers, a running text, or one sentence."""
    if mode == 8:
        return [Row(target.biography, None)]
    if mode == 9:
        return [Row(target.biography.split(". ")[0] + ".", None)]
    return [Row(question, answer) for question, answer in target.rows]


def batches(
    targets: Sequence[SyntheticTarget], background: Background, encoder: OnnxEncoder, seed: int
) -> Iterator[Batch]:
    """Learn every target and yield its evidence."""
    rng = np.random.default_rng(seed)
    hasher = GramHasher(b"fusion")
    for number, target in enumerate(targets):
        others = [targets[int(n)] for n in rng.choice(len(targets), NEIGHBOURS) if n != number]
        keep = [question for other in others[:6] for question, _ in other.rows]
        neighbours = Neighbours.of(keep, encoder, background) if number % 5 == 0 else None
        learner = TargetLearner(background, encoder, hasher, str, neighbours, effort=3)
        study = learner.study(forget_rows(target, number % 10), seed=number)
        known = {text.casefold() for text in (target.entity,)}
        asked = [text for text in target.paraphrases if any(k in text.casefold() for k in known)]
        mates = background.texts
        varied = [v for text in target.paraphrases[:5] for v in variants(text, mates, rng)]
        for kind, texts in (
            ("named", asked),
            ("nameless", list(target.indirect)),
            ("variant", varied),
            ("neighbour", [t for o in others[6:] for t in (*o.paraphrases, *o.indirect)]),
        ):
            segments = segment_texts(texts, encoder, background.space)
            lexical = study.lexical(texts, segments)
            yield Batch(study.evidence(segments, lexical), segments.owners, kind)
        yield _hard(study.background_evidence(), background.segments, rng)


def _hard(evidence: FloatArray, segments: Segments, rng: np.random.Generator) -> Batch:
    """Return the benign windows that look most like the target, and some others."""
    chosen = {int(n) for n in np.argsort(-evidence[:, 0])[:HARDEST]}
    chosen |= {int(n) for n in np.argsort(-evidence[:, 1])[:HARDEST]}
    chosen |= {int(n) for n in np.flatnonzero(evidence[:, 4] > 0)[: 4 * HARDEST]}
    chosen |= {int(n) for n in rng.choice(len(evidence), RANDOM)}
    rows = np.array(sorted(chosen))
    named = evidence[rows, 3] >= 5.0
    rows = rows[~named]
    return Batch(evidence[rows], np.arange(len(rows)), "benign")


def fit(found: Sequence[Batch], start: Fusion) -> Fusion:
    """Fit by multiple-instance logistic regression: a text counts by its best window."""
    fusion = start
    for _ in range(ROUNDS):
        fusion = fit_fusion(*_examples(found, fusion), fusion)
    return fusion


def _examples(found: Sequence[Batch], fusion: Fusion) -> tuple[FloatArray, BoolArray, FloatArray]:
    points, labels, kinds = [], [], []
    for batch in found:
        if not len(batch.evidence):
            continue
        scores = fuse(batch.evidence, fusion)
        best: dict[int, int] = {}
        for row, owner in enumerate(batch.owners.tolist()):
            if owner not in best or scores[row] > scores[best[owner]]:
                best[owner] = row
        rows = sorted(best.values())
        points.append(terms(batch.evidence[rows]))
        labels += [batch.kind not in ("benign", "neighbour")] * len(rows)
        kinds += [batch.kind] * len(rows)
    names = np.array(kinds)
    weights = np.zeros(len(names))
    for kind, share in SHARES.items():
        weights[names == kind] = share / max(1, int((names == kind).sum()))
    return np.concatenate(points), np.array(labels, np.bool_), weights.astype(np.float32)


def main(argv: Sequence[str] | None = None) -> None:
    """Fit and write."""
    from guard.normalise import normalise

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--encoder", type=Path, required=True, help="folder of the exported encoder"
    )
    parser.add_argument("--targets", type=int, default=120)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=FILE)
    chosen = parser.parse_args(argv)
    encoder = OnnxEncoder(chosen.encoder)
    background = make_background([normalise(text).text for text in load_benign()], encoder)
    targets = list(generate_targets(chosen.targets, seed=chosen.seed))
    found = list(batches(targets, background, encoder, chosen.seed))
    fusion = fit(found, Fusion((0.0,) * len(SIGNS), 0.0))
    record = {
        "weights": fusion.weights,
        "bias": fusion.bias,
        "targets": chosen.targets,
        "seed": chosen.seed,
    }
    chosen.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
