"""The detector of serving: every target of a bundle over one reading and one encoder pass.

What it costs does not grow with the targets: one index holds all their names, one all their
quotations, one all their rows; only the few targets that these point at get a full score.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from classifiers.calibrate import FAR, BundleCalibration
from classifiers.encoder import OnnxEncoder, Window
from classifiers.evidence import QUOTED_LOGIT, Fusion, fuse, gather, most_of_each
from classifiers.fusion import FUSION
from classifiers.lexical_reading import FEATURES, LexicalReading, PreparedText
from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex
from classifiers.prototypes import ByteArray, from_bytes, to_bytes
from classifiers.scorers import Judged, Scorer
from classifiers.space import FeatureSpace
from classifiers.span_head import told_places
from classifiers.spans import GAP, Place, blank_places, entity_places, merge_places
from classifiers.target import TargetArtifact
from classifiers.verbatim import GramHasher, VerbatimIndex
from guard.errors import IncompatibleArtifactError, TargetNotFoundError
from guard.types import Detection, FloatArray, TextHit

NAMED_CANDIDATES = 16
"""Targets that get a full score for a text, those that its terms point at most heavily."""

VERDICTS = 4096

LIGHT_LOOK_UPS = 2_000
"""Look-ups that words never met may take to be read in passing: each may be a misspelling, and a
look-up among 10,000 targets' names takes a microsecond."""

LIGHT_CHARS = 8_000
"""Characters that texts read in passing may have together."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found in one text.

    Attributes:
        scores: Score of each target looked at, by number.
        coverage: Share of its characters that were scored.
        encoded: True if the encoder was needed.
        judged: What the papers' detectors say, by number of the target that uses one.
    """

    scores: dict[int, float]
    coverage: float
    encoded: bool
    judged: Mapping[int, Judged] = field(default_factory=dict)


class BundleDetector:
    """Implements `guard.types.Detector`; safe to share between threads.

    Args:
        encoder: The encoder that the targets were learned on.
        space: The bundle's feature space.
        artifacts: The targets; may be empty.
        calibration: Their thresholds, in the same order.
        hasher: Hashes quotations under the guard's key.
        fusion: How evidence is weighed.
        verdicts: Texts whose verdict is remembered, by digest; 0 switches it off.
        scorers: The papers' detectors, by number of the target that uses one.

    Raises:
        IncompatibleArtifactError: If a target was learned on another encoder or space.
    """

    def __init__(
        self,
        encoder: OnnxEncoder,
        space: FeatureSpace,
        artifacts: Sequence[TargetArtifact],
        calibration: BundleCalibration,
        hasher: GramHasher,
        fusion: Fusion = FUSION,
        verdicts: int = VERDICTS,
        scorers: Mapping[int, Scorer] | None = None,
    ) -> None:
        for artifact in artifacts:
            _check(artifact, encoder, space)
        self._encoder, self._space = encoder, space
        self._calibration, self._fusion = calibration, fusion
        self._targets = tuple(artifact.name for artifact in artifacts)
        self._numbers = {name: number for number, name in enumerate(self._targets)}
        lexicons = [artifact.lexicon for artifact in artifacts]
        self._index = LexiconIndex(lexicons, encoder.is_common, encoder.common_words())
        self._quotes = VerbatimIndex([artifact.grams for artifact in artifacts], hasher)
        self._artifacts = tuple(_condensed(artifact) for artifact in artifacts)
        self._rows = [_Rows.of(artifact.prototypes) for artifact in artifacts]
        self._topics = [n for n, a in enumerate(artifacts) if a.fusion is not None]
        self._scorers = dict(scorers or {})
        self._cache = _VerdictCache(verdicts)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the targets."""
        return self._targets

    def threshold(self, target: str) -> float:
        """Return the score from which a target is hit.

        Raises:
            TargetNotFoundError: If there is no such target.
        """
        return float(self._calibration.thresholds[self._number(target)])

    def detect(self, texts: Sequence[str]) -> Detection:
        """Score `texts` (already normalised); any length, never truncated."""
        return self._detection([self.verdict(text) for text in texts])

    def detect_lightly(self, texts: Sequence[str]) -> Detection | None:
        """Do the same if it takes little: no encoder pass, and few words never met; else None."""
        if sum(map(len, texts)) > LIGHT_CHARS:
            return None
        verdicts = []
        for text in texts:
            found = self._light_verdict(text, LIGHT_LOOK_UPS // len(texts))
            if found is None:
                return None
            verdicts.append(found)
        return self._detection(verdicts)

    def _detection(self, verdicts: Sequence[Verdict]) -> Detection:
        hits = tuple(self._hits(verdict) for verdict in verdicts)
        margins = np.array([self._margin(verdict) for verdict in verdicts], np.float32)
        covered = np.array([verdict.coverage for verdict in verdicts], np.float32)
        return Detection(hits, margins, covered)

    def verdict(self, text: str) -> Verdict:
        """Return the score of every target that the text points at."""
        digest = _digest(text)
        known = self._cache.get(digest)
        if known is None:
            known = self._read(text)
            self._cache.put(digest, known)
        return known

    def _light_verdict(self, text: str, most: int) -> Verdict | None:
        digest = _digest(text)
        known = self._cache.get(digest)
        if known is None:
            known = self._read_lightly(text, most)
            if known is not None:
                self._cache.put(digest, known)
        return known

    def spans(self, text: str, target: str) -> list[tuple[int, int]]:
        """Return the characters of `text` that carry the target's entity, sorted, disjoint.

        The names are not enough where the text is flagged without them too (an indirect
        description): then the words that tell of the entity are marked beside them. Where it is
        flagged without those too, the flagged windows are marked whole, or, if the text is a single
        window, nothing is, which stands for all of it.

        Raises:
            TargetNotFoundError: If there is no such target.
        """
        number = self._number(target)
        reading = self._index.read(text)
        places = entity_places(reading, number)
        quoted = self._quotes.quotes(reading.words).get(number, [])
        if quoted:
            return merge_places([*places, *self._beside(text, places, quoted)])
        # Without a name, a text may be flagged for one of its sentences.
        cut = self._encoder.windows if places else self._encoder.segments
        if not self._is_flagged(number, blank_places(text, places), cut):
            return places
        told = merge_places([*places, *self._told(number, reading)], GAP)
        if told != places and not self._is_flagged(number, blank_places(text, told), cut):
            return told
        windows = self._encoder.windows(text)
        if len(windows) == 1:
            return []
        return merge_places([*places, *self._flagged(number, reading, windows)])

    def _beside(self, text: str, names: list[Place], quoted: list[Place]) -> list[Place]:
        """Return the quotations in sentences that name nobody.

        A sentence that names the target is about the target; its wording is the frame that
        corruption blurs.
        """
        named = [
            window
            for window in self._encoder.segments(text)
            if any(start < window.end and window.start < end for start, end in names)
        ]
        return [
            (start, end)
            for start, end in quoted
            if not any(start < window.end and window.start < end for window in named)
        ]

    def _told(self, number: int, reading: LexicalReading) -> list[Place]:
        """Return the words that tell of the target, in the flagged parts of the text.

        They are what the head marks, and terms that are too weak to stand for the target alone.
        """
        head = self._artifacts[number].span_head
        if head is None:
            return []
        parts = self._flagged(number, reading, self._encoder.segments(reading.text))
        found = told_places(reading.text, *self._encoder.tokens(reading.text), head)
        found += [(match.start, match.end) for match, _ in reading.of(number)]
        return [place for place in found if any(a < place[1] and place[0] < b for a, b in parts)]

    def _is_flagged(self, number: int, text: str, cut: Callable[[str], list[Window]]) -> bool:
        return bool(self._flagged(number, self._index.read(text), cut(text)))

    def _flagged(
        self, number: int, reading: LexicalReading, windows: Sequence[Window]
    ) -> list[Place]:
        hits = self._score(number, reading, windows) >= self._calibration.thresholds[number]
        return [(w.start, w.end) for w, hit in zip(windows, hits, strict=True) if hit]

    # --- One text --------------------------------------------------------------------------------

    def _read(self, text: str) -> Verdict:
        if not self._artifacts:
            return Verdict({}, 1.0, encoded=False)
        reading = self._index.read(text)
        scores = dict.fromkeys(self._quotes.quotes(reading.words), QUOTED_LOGIT)
        encoded = self._score_into(scores, reading)
        restored = self._index.restore_vowels(text) if reading.prepared.bare else None
        if restored is not None:
            encoded |= self._score_into(scores, self._index.read(restored))
        judged = {number: scorer.judge(text) for number, scorer in self._scorers.items()}
        # Every word was read by the lexicon and the verbatim index; what needs more was encoded.
        return Verdict(scores, 1.0, encoded, judged)

    def _read_lightly(self, text: str, most: int) -> Verdict | None:
        """Return what `_read` would, or None where that takes the encoder or long."""
        if not self._artifacts:
            return Verdict({}, 1.0, encoded=False)
        if self._topics or self._scorers:
            return None
        prepared = PreparedText(text)
        if prepared.bare or self._index.strange(prepared, most):
            return None
        reading = self._index.read(text, prepared)
        if self._possible(reading):
            return None
        scores = dict.fromkeys(self._quotes.quotes(reading.words), QUOTED_LOGIT)
        return Verdict(scores, 1.0, encoded=False)

    def _score_into(self, scores: dict[int, float], reading: LexicalReading) -> bool:
        """Score the targets that could be hit, where they could; say if the encoder was needed."""
        chosen = self._possible(reading)
        if not chosen and not self._topics:
            return False
        windows = self._encoder.segments(reading.text)
        if not self._topics:
            places = [
                (match.start, match.end)
                for match in reading.matches
                if any(number in match.owners for number in chosen)
            ]
            windows = [
                window
                for window in windows
                if any(start < window.end and window.start < end for start, end in places)
            ]
        chosen = list(dict.fromkeys([*chosen, *self._topics]))
        rows = self._space.project(self._encoder.states(windows))
        for number in chosen:
            best = float(self._fused(number, reading, windows, rows).max())
            scores[number] = max(best, scores.get(number, -FAR))
        return True

    def _possible(self, reading: LexicalReading) -> list[int]:
        """Return the targets whose threshold the text's terms could reach, whatever its topic.

        Without terms the fusion can't reach any threshold: this first stage clears most benign
        texts before the encoder, and loses nothing.
        """
        thresholds = self._calibration.thresholds
        pointers = {
            number: (pointer.single, pointer.full, pointer.total, pointer.strong)
            for number, pointer in reading.candidates().items()
            if self._artifacts[number].fusion is None and number not in self._scorers
        }  # the others are always looked at
        if not pointers:
            return []
        bounds = most_of_each(list(pointers.values()), self._fusion)
        found = [
            (float(bound), full + single, number)
            for bound, (number, (single, full, _, _)) in zip(bounds, pointers.items(), strict=True)
            if bound >= thresholds[number]
        ]
        found.sort(reverse=True)
        return [number for _, _, number in found[:NAMED_CANDIDATES]]

    def _score(self, number: int, reading: LexicalReading, windows: Sequence[Window]) -> FloatArray:
        """Return how a flagged text's windows tell of the target.

        What is known beside the target tells of it there: the text is about the target.
        """
        rows = self._space.project(self._encoder.states(windows))
        return self._fused(number, reading, windows, rows, capped=False)

    def _fused(
        self,
        number: int,
        reading: LexicalReading,
        windows: Sequence[Window],
        rows: FloatArray,
        capped: bool = True,
    ) -> FloatArray:
        artifact = self._artifacts[number]
        lexical = reading.features(number, [(window.start, window.end) for window in windows])
        if not capped:
            lexical[:, FEATURES - 1] = 0.0
        evidence = gather(rows, self._rows[number].floats(), artifact.head, 1.0, lexical)
        return fuse(evidence, artifact.fusion or self._fusion)

    # --- Judging ---------------------------------------------------------------------------------

    def _hits(self, verdict: Verdict) -> tuple[TextHit, ...]:
        calibration, hits = self._calibration, []
        for number, found in verdict.judged.items():
            if found.flagged:
                name = self._targets[number]
                hits.append(TextHit(name, found.score, found.p_value, found.weight))
        for number, score in verdict.scores.items():
            if number in verdict.judged:
                continue
            if score >= calibration.thresholds[number]:
                p_value = calibration.p_value(number, score)
                weight = calibration.weight(number, score)
                hits.append(TextHit(self._targets[number], score, p_value, weight))
        return tuple(sorted(hits, key=lambda hit: (hit.p_value, -hit.score, hit.target)))

    def _margin(self, verdict: Verdict) -> float:
        thresholds = self._calibration.thresholds
        if any(found.flagged for found in verdict.judged.values()):
            return 0.0
        margins = [
            score - float(thresholds[n])
            for n, score in verdict.scores.items()
            if n not in verdict.judged
        ]
        return max(margins, default=float("-inf"))

    def _number(self, target: str) -> int:
        try:
            return self._numbers[target]
        except KeyError:
            known = ", ".join(self._targets[:20]) or "none"
            raise TargetNotFoundError(
                f"there is no target {target!r} in the detector (known: {known})"
            ) from None


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


class _VerdictCache:
    """The last texts' verdicts, by digest: bounded, thread-safe, no text kept."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: OrderedDict[bytes, Verdict] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: bytes) -> Verdict | None:
        with self._lock:
            if key in self._items:
                self._items.move_to_end(key)
            return self._items.get(key)

    def put(self, key: bytes, value: Verdict) -> None:
        if not self._size:
            return
        with self._lock:
            self._items[key] = value
            self._items.move_to_end(key)
            while len(self._items) > self._size:
                self._items.popitem(last=False)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A target's prototypes, in the 8 bits that they were stored in: a quarter of the memory."""

    stored: ByteArray | FloatArray

    @classmethod
    def of(cls, rows: FloatArray) -> _Rows:
        packed = to_bytes(rows)
        return cls(packed if np.array_equal(from_bytes(packed), rows) else rows)

    def floats(self) -> FloatArray:
        if self.stored.dtype == np.int8:
            return from_bytes(self.stored)  # type: ignore[arg-type]
        return self.stored  # type: ignore[return-value]


def _condensed(artifact: TargetArtifact) -> TargetArtifact:
    """Leave out what the indexes hold for all targets together."""
    return replace(
        artifact,
        lexicon=Lexicon({}),
        grams=artifact.grams[:0].copy(),
        prototypes=artifact.prototypes[:0].copy(),
    )


def _check(artifact: TargetArtifact, encoder: OnnxEncoder, space: FeatureSpace) -> None:
    if artifact.encoder_hash != encoder.source_hash:
        raise IncompatibleArtifactError(
            f"target {artifact.name!r} was learned on another encoder than the bundle's; "
            "remove it and add it again"
        )
    if artifact.head.shape != (space.dimensions + 1,):
        raise IncompatibleArtifactError(
            f"the head of target {artifact.name!r} has {artifact.head.shape[0]} inputs, the "
            f"bundle's space gives {space.dimensions + 1}; add the target again"
        )
    if artifact.span_head is not None and artifact.span_head.shape != (encoder.hidden + 1,):
        raise IncompatibleArtifactError(
            f"the span head of target {artifact.name!r} has {artifact.span_head.shape[0]} inputs, "
            f"the bundle's encoder gives {encoder.hidden + 1}; add the target again"
        )
