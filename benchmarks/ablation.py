"""What each part of the detector is worth: TOFU's forget set without one part at a time.

Every system is learned and calibrated anew by the library's own learner, so that its thresholds
keep the same budget; what all share is made once: the background, and the row of every window that
was ever encoded. Where evidence is taken away that the universal fusion leans on, the fusion is
fitted anew, without it, on the generated targets that the fusion that ships was fitted on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.curves import auroc, auroc_interval
from benchmarks.measures import share
from benchmarks.report import Row
from benchmarks.tofu import Fact, TextSet, Tofu
from classifiers.background import Background, Segments, make_background, segment_texts
from classifiers.calibrate import fit_bundle
from classifiers.detector import BundleDetector
from classifiers.encoder import OnnxEncoder, Window
from classifiers.evidence import NAMED_LOGIT, SIGNS, Fusion, nearest
from classifiers.export import Precision, export_encoder
from classifiers.fit_fusion import Batch, batches, fit
from classifiers.forgetset import ForgetSet
from classifiers.fusion import FUSION
from classifiers.learn import Kind, TargetLearner
from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex, Variant
from classifiers.space import FeatureSpace, unit
from classifiers.study import Neighbours, Study
from classifiers.synthetic import generate_targets
from classifiers.target import TargetArtifact
from classifiers.topic import apply
from classifiers.verbatim import GramHasher
from guard.normalise import normalise
from guard.types import FloatArray, IntArray, Progress

ROUTE: Final = "detector"
GENERATED, GENERATED_SEED = 50, 1
"""Generated targets that a fusion is fitted on, and their seed: those of the one that ships."""

AUROC_SAMPLE: Final = 2000
"""Texts of a set, at most, that a score by itself is judged on."""

_COSINE, _TOPIC = 0, 1
_CHUNK: Final = 1024
_NO_TERMS: Final = Lexicon({})


@dataclass(frozen=True, slots=True)
class Part:
    """What a system lacks of the full detector.

    Attributes:
        name: What is left out, as given to `--part`.
        system: Name of the system in the report.
        masked: Columns of evidence that are left out; the fusion is fitted without them.
        lexicon: What is left of a target's lexicon.
        kind: `topic` scores every text by rows and head, and fits its own fusion.
        fuzzy: False reads words as they are written.
        quotations: False drops the quotations.
        sentences: False reads by windows alone.
        normalised: False reads texts as they were sent.
        neighbours: False learns without synthetic neighbours.
        other_retain: True turns the use of retain texts round.
        precision: Of the encoder's weights.
    """

    name: str
    system: str
    masked: tuple[int, ...] = ()
    lexicon: Callable[[Lexicon], Lexicon] = lambda lexicon: lexicon
    kind: Kind = "entity"
    fuzzy: bool = True
    quotations: bool = True
    sentences: bool = True
    normalised: bool = True
    neighbours: bool = True
    other_retain: bool = False
    precision: Precision = "int8"


def _only_parts(lexicon: Lexicon) -> Lexicon:
    kept = {term: w for term, w in lexicon.weights.items() if term not in lexicon.primary}
    return replace(lexicon, weights=kept, primary=frozenset())


def _only_full(lexicon: Lexicon) -> Lexicon:
    kept = {term: w for term, w in lexicon.weights.items() if term in lexicon.primary}
    return replace(lexicon, weights=kept)


def _all_own(lexicon: Lexicon) -> Lexicon:
    return replace(lexicon, associates=frozenset())


FULL: Final = Part("nothing", "full")
PARTS: Final = (
    Part("rows", "without rows", masked=(_COSINE,)),
    Part("topic", "without topic head", masked=(_TOPIC,)),
    Part("full-names", "without names in full", lexicon=_only_parts),
    Part("parts", "without parts of names and titles", lexicon=_only_full),
    Part("beside", "without what is known beside", lexicon=_all_own),
    Part("misspelling", "without misspelling", fuzzy=False),
    Part("quotations", "without quotations", quotations=False),
    Part("sentences", "without sentence windows", sentences=False),
    Part("normaliser", "without normaliser", normalised=False),
    Part("retain", "retain data turned round", other_retain=True),
    Part("neighbours", "without synthetic neighbours", neighbours=False),
    Part("all-but-lexicon", "lexicon only", masked=(_COSINE, _TOPIC), quotations=False),
    Part(
        "all-but-rows-and-topic",
        "rows and topic head only",
        lexicon=lambda lexicon: _NO_TERMS,
        kind="topic",
        quotations=False,
    ),
    Part("int8", "float32 encoder", precision="float32"),
)
PART_NAMES: Final = tuple(part.name for part in PARTS)


@dataclass(frozen=True, slots=True)
class Plan:
    """How an ablation is run.

    Attributes:
        joint: One target of all authors; otherwise one for each.
        retain: Learn with TOFU's retain questions.
        budget: Share of benign requests that may be flagged.
        seed: Of everything random.
        threads: Windows encoded at the same time; None takes the CPUs available.
        generated: Generated targets that fusions are fitted on.
    """

    joint: bool = False
    retain: bool = False
    budget: float = 1e-3
    seed: int = 0
    threads: int | None = None
    generated: int = GENERATED


def run_ablation(
    data: Tofu, benign: Sequence[str], parts: Sequence[str], plan: Plan, progress: Progress
) -> list[Row]:
    """Judge the full detector, and what is left of it without each part.

    Args:
        data: The benchmark.
        benign: General texts that thresholds are set on.
        parts: Names of `PARTS`; none takes all.
        plan: How.
        progress: Told how far it is.

    Raises:
        DataError: If there are too few benign texts.
    """
    wanted = [part for part in PARTS if not parts or part.name in parts]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        bench = _Bench(data, benign, plan, Path(scratch), progress)
        for number, part in enumerate([FULL, *wanted], start=1):
            system = bench.learn(part)
            rows += bench.judge(part, system)
            if part in (FULL, *(p for p in wanted if p.precision == "float32")):
                rows += bench.scores_alone(part, system)
            progress("ablation: systems", number, 1 + len(wanted))
    return rows


# --- Encoding once ---------------------------------------------------------------------------


class ProjectedEncoder(OnnxEncoder):
    """An encoder whose states are rows of a feature space, each window encoded once.

    Args:
        folder: Folder of the exported encoder.
        source: The encoder of the same folder that does the work.
        space: Where its states are put.
        known: Rows of the windows known so far, by their tokens; shared and added to.
        sentences: False leaves out windows of single sentences.
    """

    def __init__(
        self,
        folder: Path,
        source: OnnxEncoder,
        space: FeatureSpace,
        known: dict[tuple[int, ...], FloatArray],
        sentences: bool = True,
    ) -> None:
        super().__init__(folder, 1, cache_size=0)
        self._source, self._space, self._rows = source, space, known
        self._sentences = sentences

    @property
    def width(self) -> int:
        """Length of a row."""
        return self._space.dimensions

    def segments(self, text: str) -> list[Window]:
        """Cut a text into windows, and into sentences if they are wanted."""
        return super().segments(text) if self._sentences else self.windows(text)

    def states(self, windows: Sequence[Window]) -> FloatArray:
        """Return the rows of windows, shape (windows, dimensions)."""
        missing = {w.ids: w for w in windows if w.ids not in self._rows}
        new = list(missing.values())
        for first in range(0, len(new), _CHUNK):
            some = new[first : first + _CHUNK]
            rows = self._space.project(self._source.states(some))
            self._rows.update(zip((w.ids for w in some), rows, strict=True))
        found = [self._rows[w.ids] for w in windows]
        return np.stack(found) if found else np.zeros((0, self.width), np.float32)


@dataclass(frozen=True, slots=True)
class Ground:
    """What systems of one encoder are learned on; rows stand for states."""

    encoder: ProjectedEncoder
    background: Background


def make_ground(
    folder: Path, benign: Sequence[str], plan: Plan, progress: Progress
) -> tuple[Ground, Ground]:
    """Encode the benign set; returns the ground with sentence windows, and that without."""
    source = OnnxEncoder(folder, plan.threads, cache_size=0)
    texts = [normalise(text).text.strip() for text in benign]
    made = make_background(texts, source, plan.seed, progress)
    known: dict[tuple[int, ...], FloatArray] = {}
    full, plain = (
        ProjectedEncoder(folder, source, made.space, known, sentences)
        for sentences in (True, False)
    )
    size = made.space.dimensions
    space = FeatureSpace(np.zeros(size, np.float32), np.eye(size, dtype=np.float32))
    whole = Background(made.texts, space, made.segments, made.folds, made.names)
    return Ground(full, whole), Ground(plain, _windows_only(whole, plain))


def _windows_only(background: Background, encoder: OnnxEncoder) -> Background:
    """Return the background without the windows of single sentences."""
    segments = background.segments
    starts = np.searchsorted(segments.owners, np.arange(len(background.texts)))
    counts = np.array([len(encoder.windows(text)) for text in background.texts])
    place = np.arange(len(segments.owners)) - starts[segments.owners]
    kept = place < counts[segments.owners]
    left = Segments(segments.rows[kept], segments.owners[kept], segments.places[kept])
    return Background(
        background.texts, background.space, left, background.folds, background.names[kept]
    )


# --- Leaving a part out ----------------------------------------------------------------------


class ExactIndex(LexiconIndex):
    """Reads words as they are written: no misspelling, no digits for letters, no lost vowels."""

    def restore_vowels(self, text: str) -> str | None:
        """Return None: nothing is guessed."""
        return None

    def _variants(self, word: str, bare: bool) -> tuple[Variant, ...]:
        if word not in self._words and word.endswith("s") and word[:-1] in self._words:
            return ((word[:-1], 1.0),)
        return ((word, 1.0),)


class _LoneStudy(Study):
    """Learns without synthetic neighbours."""

    def _make_neighbours(self, owners: IntArray) -> tuple[Segments, IntArray]:
        tools = self._tools
        return segment_texts([], tools.encoder, tools.background.space), np.zeros(0, np.int64)


class PartLearner(TargetLearner):
    """Learns targets without a part.

    Heads are those of the full detector (their synthetic neighbours need the whole lexicon); what
    the lexicon says, and all calibration, is what is left of it.
    """

    part = FULL

    def _study(self, forgotten: ForgetSet, seed: int, kind: Kind) -> Study:
        table = self._count(forgotten)
        made = Study if self.part.neighbours else _LoneStudy
        rng = np.random.default_rng(seed)
        study = made(self.tools, forgotten, table, rng, table.lexicon())
        study.lexicon = self.part.lexicon(study.lexicon)
        study._index = make_index([study.lexicon], self.tools.encoder, self.part)
        return study


class PartDetector(BundleDetector):
    """Detects without a part."""

    def without(
        self, part: Part, encoder: OnnxEncoder, lexicons: Sequence[Lexicon]
    ) -> PartDetector:
        """Read by what is left of the index of the artifacts' `lexicons`."""
        self._index = make_index(lexicons, encoder, part)
        return self


def make_index(lexicons: Sequence[Lexicon], encoder: OnnxEncoder, part: Part) -> LexiconIndex:
    """Index lexicons, with or without misspelling."""
    kind = LexiconIndex if part.fuzzy else ExactIndex
    return kind(lexicons, encoder.is_common, encoder.common_words())


def mask(found: Sequence[Batch], columns: Sequence[int]) -> list[Batch]:
    """Return the evidence without some columns, so that a fusion gives them no weight."""
    masked = []
    for batch in found:
        evidence = batch.evidence.copy()
        evidence[:, list(columns)] = 0.0
        masked.append(replace(batch, evidence=evidence))
    return masked


# --- One system after the other --------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class System:
    """A learned detector."""

    artifacts: Sequence[TargetArtifact]
    detector: BundleDetector
    ground: Ground


class _Bench:
    """Learns and judges systems; what they share is made when first asked for."""

    def __init__(
        self, data: Tofu, benign: Sequence[str], plan: Plan, scratch: Path, progress: Progress
    ) -> None:
        self.data, self.benign, self.plan = data, benign, plan
        self.scratch, self.progress = scratch, progress
        self._hasher = GramHasher(b"ablation")
        self._grounds: dict[str, tuple[Ground, Ground]] = {}
        self._texts: dict[tuple[str, bool], list[str]] = {}
        self._kept: dict[tuple[str, bool], Neighbours] = {}

    def learn(self, part: Part) -> System:
        """Learn every target without a part."""
        ground = self.ground(part)
        clean: Callable[[str], str] = _normalised if part.normalised else str
        fusion = self.fusion(part)
        learner = PartLearner(
            ground.background, ground.encoder, self._hasher, clean, self.neighbours(part), fusion
        )
        learner.part = part
        artifacts = []
        for name, rows in self.targets().items():
            learned = learner.learn(
                name, rows, self.plan.seed, kind=part.kind, budget=self.plan.budget
            )
            artifact = learned.artifact
            if not part.quotations:
                artifact = replace(artifact, grams=artifact.grams[:0])
            artifacts.append(artifact)
        found = [artifact.calibration for artifact in artifacts]
        calibration = fit_bundle(found, self.plan.budget, most=NAMED_LOGIT)
        space = ground.background.space
        detector = PartDetector(
            ground.encoder, space, artifacts, calibration, self._hasher, fusion, verdicts=0
        )
        lexicons = [artifact.lexicon for artifact in artifacts]
        return System(artifacts, detector.without(part, ground.encoder, lexicons), ground)

    def judge(self, part: Part, system: System) -> list[Row]:
        """Return the share of each set that is flagged."""
        name = part.system
        if part.other_retain:
            name = f"{'without' if self.plan.retain else 'with'} retain data"
        rows = []
        for one in self.data.sets:
            texts = self.texts(one, part.normalised)
            if one.to_flag or part.kind == "topic":
                self._warm(system.ground, texts)
            flagged = sum(bool(hits) for hits in system.detector.detect(texts).hits)
            found = share(flagged, len(texts))
            measure = "recall" if one.to_flag else "fpr"
            # Rounding must not put a share of 1 beyond its own interval.
            interval = min(found.low, found.rate), max(found.high, found.rate)
            rows.append(Row(name, ROUTE, measure, one.name, found.rate, *interval, found.total))
            self.progress(f"ablation: {name}", len(rows), len(self.data.sets))
        return rows

    def scores_alone(self, part: Part, system: System) -> list[Row]:
        """Return how well cosine and topic score tell paraphrases from others by themselves."""
        sets = {one.name: one for one in self.data.sets}
        scores = {
            name: self._alone(system, self.texts(sets[name], part.normalised)[:AUROC_SAMPLE])
            for name in ("paraphrases", "general", "retain_paraphrases", "other_fictitious")
        }
        rows = []
        above = scores.pop("paraphrases")
        for column, label in enumerate(("cosine", "topic score")):
            for name, below in scores.items():
                pair = above[:, column], below[:, column]
                sizes = sum(map(len, pair))
                group = f"paraphrases against {name}"
                area, interval = auroc(*pair), auroc_interval(*pair)
                system_name = f"{label} alone, {part.precision}"
                rows.append(Row(system_name, ROUTE, "auroc", group, area, *interval, sizes))
        return rows

    def _alone(self, system: System, texts: Sequence[str]) -> FloatArray:
        """Return the highest cosine and topic score of each text, shape (texts, 2)."""
        ground = system.ground
        self._warm(ground, texts)
        segments = segment_texts(texts, ground.encoder, ground.background.space)
        best = np.full((len(segments.owners), 2), -np.inf, np.float32)
        for artifact in system.artifacts:
            best[:, 0] = np.maximum(best[:, 0], nearest(unit(segments.rows), artifact.prototypes))
            best[:, 1] = np.maximum(best[:, 1], apply(artifact.head, segments.rows))
        return np.stack([segments.best(column, len(texts)) for column in best.T], axis=1)

    # --- What systems share ------------------------------------------------------------------

    def targets(self) -> Mapping[str, Sequence[Fact]]:
        """Return the rows of each target."""
        if not self.plan.joint:
            return self.data.forget
        return {"forget": [fact for facts in self.data.forget.values() for fact in facts]}

    def ground(self, part: Part) -> Ground:
        """Return background and encoder of a precision."""
        kind = part.precision
        if kind not in self._grounds:
            folder = export_encoder(self.scratch / kind, precision=kind)
            told = _told(self.progress, kind)
            self._grounds[kind] = make_ground(folder, self.benign, self.plan, told)
        return self._grounds[kind][0 if part.sentences else 1]

    def neighbours(self, part: Part) -> Neighbours | None:
        """Return the retain texts, if this system learns with them."""
        if self.plan.retain == part.other_retain:
            return None
        key = (part.precision, part.sentences)
        if key not in self._kept:
            ground = self.ground(part)
            kept = [_normalised(text).strip() for text in self.data.retain]
            told = _told(self.progress, f"{part.precision}, retain")
            self._kept[key] = Neighbours.of(
                kept, ground.encoder, ground.background, self.plan.seed, told
            )
        return self._kept[key]

    def fusion(self, part: Part) -> Fusion:
        """Return the fusion that ships, or one fitted without what is masked."""
        if not part.masked:
            return FUSION
        start = Fusion((0.0,) * len(SIGNS), 0.0)
        return fit(mask(self._generated, part.masked), start)

    @cached_property
    def _generated(self) -> list[Batch]:
        ground = self.ground(FULL)
        targets = list(generate_targets(self.plan.generated, seed=GENERATED_SEED))
        found = []
        for batch in batches(targets, ground.background, ground.encoder, GENERATED_SEED):
            found.append(batch)
            done = sum(one.kind == "benign" for one in found)
            self.progress("ablation: generated targets", done, len(targets))
        return found

    def texts(self, one: TextSet, normalised: bool) -> list[str]:
        """Return a set's texts as the detector gets them."""
        key = (one.name, normalised)
        if key not in self._texts:
            clean = _normalised if normalised else str
            self._texts[key] = [clean(text) for text in one.texts]
        return self._texts[key]

    def _warm(self, ground: Ground, texts: Sequence[str]) -> None:
        """Encode what isn't known yet, several windows at a time."""
        encoder = ground.encoder
        for first in range(0, len(texts), _CHUNK):
            some = texts[first : first + _CHUNK]
            encoder.states([window for text in some for window in encoder.segments(text)])


def _normalised(text: str) -> str:
    return normalise(text).text


def _told(progress: Progress, about: str) -> Progress:
    return lambda what, done, total: progress(f"{what} ({about})", done, total)
