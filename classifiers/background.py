"""What is known of general text when a target is learned: features, words, folds.

Made once from the benign set and shared by all targets of a bundle, so that another target costs
its own rows and a few small linear systems, never a pass over the benign set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from classifiers.benign_tokens import BenignTokens
from classifiers.encoder import OnnxEncoder
from classifiers.folds import cluster_folds
from classifiers.fuzzy import DeletionIndex
from classifiers.lexical_reading import PreparedText, names_anything
from classifiers.space import FeatureSpace, fit_space, unit
from classifiers.terms import Words, find_dates, split_words
from classifiers.topic import Moments
from guard.errors import ArtifactError, DataError
from guard.types import BoolArray, FloatArray, IntArray, Progress

FOLDS = 4
MIN_BENIGN = 200
ENCODE_AT_ONCE = 256


@dataclass(frozen=True)
class Segments:
    """Texts cut into windows, in the shared space.

    Attributes:
        rows: Whitened features of every window, shape (windows, dimensions).
        owners: Text of each window, shape (windows,).
        places: Characters of each window, shape (windows, 2).
    """

    rows: FloatArray
    owners: IntArray
    places: IntArray

    @cached_property
    def units(self) -> FloatArray:
        """The rows at length 1."""
        return unit(self.rows)

    def best(self, scores: FloatArray, texts: int) -> FloatArray:
        """Return each text's best window score, shape (windows,) -> (texts,)."""
        out = np.full(texts, -np.inf, np.float32)
        np.maximum.at(out, self.owners, scores.astype(np.float32))
        return out


class WordIndex:
    """Which texts hold a term: posting lists, checked word by word.

    Args:
        texts: The texts, normalised.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = len(texts)
        self.words: list[list[tuple[str, int, int]]] = [split_words(text) for text in texts]
        self._postings: dict[str, set[int]] = {}
        for number, (text, words) in enumerate(zip(texts, self.words, strict=True)):
            for word in {word for word, _, _ in words} | {date for date, _, _ in find_dates(text)}:
                self._postings.setdefault(word, set()).add(number)
        self._near: DeletionIndex | None = None
        self._texts = texts
        self._prepared: dict[int, PreparedText] = {}

    def prepared(self, number: int) -> PreparedText:
        """Return a text as lexicons read it; every target reads it anew."""
        found = self._prepared.get(number)
        if found is None:
            found = self._prepared[number] = PreparedText(self._texts[number])
        return found

    def __contains__(self, word: str) -> bool:
        return word in self._postings

    def holders(self, term: Words) -> list[int]:
        """Return the texts that hold `term` as consecutive words."""
        found = self._postings.get(term[0], set())
        for word in term[1:]:
            found = found & self._postings.get(word, set())
        if len(term) == 1 or not found:
            return sorted(found)
        return sorted(number for number in found if _holds(self.words[number], term))

    def similar(self, word: str) -> list[str]:
        """Return the words of the texts that would pass for misspellings of `word`."""
        if self._near is None:
            self._near = DeletionIndex(self._postings)
        return [near.word for near in self._near.near(word)]


def _holds(words: Sequence[tuple[str, int, int]], term: Words) -> bool:
    size = len(term)
    return any(
        all(words[first + n][0] == term[n] for n in range(size))
        for first in range(len(words) - size + 1)
        if words[first][0] == term[0]
    )


@dataclass(slots=True)
class Background:
    """General text, ready for learning.

    Attributes:
        texts: The benign texts, normalised and distinct.
        space: The shared feature space.
        segments: Their windows in it.
        folds: Fold of each text, shape (texts,); whole clusters share one.
        names: True for windows that name somebody or something, shape (windows,).
        index: Their words.
        moments: Each fold's sums for the topic head.
    """

    texts: list[str]
    space: FeatureSpace
    segments: Segments
    folds: IntArray
    names: BoolArray
    index: WordIndex = field(init=False)
    moments: list[Moments] = field(init=False)
    _tokens: BenignTokens | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.index = WordIndex(self.texts)
        self.moments = fold_moments(self.segments, self.folds)

    def tokens(self, encoder: OnnxEncoder) -> BenignTokens:
        """Return the tokens of a sample of the texts; read when first asked for."""
        if self._tokens is None:
            self._tokens = BenignTokens.of(self.texts, self.folds, FOLDS, encoder)
        return self._tokens

    def to_arrays(self) -> dict[str, FloatArray]:
        """Return everything but the texts as arrays, for safetensors; rows in 16 bits."""
        return {
            **self.space.to_arrays(),
            "rows": self.segments.rows.astype(np.float16),
            "owners": self.segments.owners.astype(np.int32),
            "places": self.segments.places.astype(np.int32),
            "folds": self.folds.astype(np.int8),
            "names": self.names.astype(np.uint8),
        }

    @classmethod
    def from_arrays(cls, texts: list[str], arrays: Mapping[str, FloatArray]) -> Background:
        """Read what `to_arrays` gave, for the same texts.

        Raises:
            ArtifactError: If the arrays do not belong to these texts.
        """
        try:
            owners = arrays["owners"].astype(np.int64)
            folds = arrays["folds"].astype(np.int64)
            segments = Segments(
                arrays["rows"].astype(np.float32), owners, arrays["places"].astype(np.int64)
            )
            names = arrays["names"].astype(np.bool_)
        except KeyError as error:
            raise ArtifactError(f"the bundle's background lacks the array {error}") from error
        if len(folds) != len(texts) or (len(owners) and int(owners.max()) >= len(texts)):
            raise ArtifactError("the bundle's background is of another benign set")
        space = FeatureSpace.from_arrays(arrays)
        fits = names.shape == owners.shape and segments.places.shape == (len(owners), 2)
        if not fits or segments.rows.shape != (len(owners), space.dimensions):
            raise ArtifactError("the bundle's background is damaged: its arrays do not fit")
        return cls(texts, space, segments, folds, names)


def make_background(
    benign: Sequence[str], encoder: OnnxEncoder, seed: int = 0, progress: Progress | None = None
) -> Background:
    """Encode a benign set and fit the feature space on it.

    Args:
        benign: Normalised texts.
        encoder: The bundle's encoder.
        seed: Seeds the clusters that folds are made of.
        progress: Told how far it is.

    Raises:
        DataError: If there are fewer than MIN_BENIGN distinct texts.
    """
    texts = list(dict.fromkeys(text for text in benign if text.strip()))
    if len(texts) < MIN_BENIGN:
        raise DataError(f"{len(texts)} distinct benign texts; at least {MIN_BENIGN} are needed")
    features, owners, places = _states(texts, encoder, progress)
    space = fit_space(features.astype(np.float32))
    segments = Segments(space.project(features.astype(np.float32)), owners, places)
    folds = cluster_folds(text_means(segments, len(texts)), FOLDS, np.random.default_rng(seed))
    return Background(texts, space, segments, folds, naming_windows(texts, segments, encoder))


def naming_windows(texts: Sequence[str], segments: Segments, encoder: OnnxEncoder) -> BoolArray:
    """Say which windows name somebody or something, shape (windows,)."""
    bounds = np.searchsorted(segments.owners, np.arange(len(texts) + 1))
    found = np.zeros(len(segments.owners), np.bool_)
    for number, text in enumerate(texts):
        first, last = int(bounds[number]), int(bounds[number + 1])
        windows = [(int(start), int(end)) for start, end in segments.places[first:last]]
        found[first:last] = names_anything(text, windows, encoder.is_common)
    return found


def benign_digest(texts: Sequence[str]) -> str:
    """Return a digest by which a benign set is recognised."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def text_means(segments: Segments, texts: int) -> FloatArray:
    """Return the mean direction of each text's windows, shape (texts, dimensions)."""
    sums = np.zeros((texts, segments.rows.shape[1]), np.float32)
    np.add.at(sums, segments.owners, unit(segments.rows))
    return sums


def segment_texts(
    texts: Sequence[str],
    encoder: OnnxEncoder,
    space: FeatureSpace,
    progress: Progress | None = None,
) -> Segments:
    """Cut texts into windows and put them into the shared space."""
    features, owners, places = _states(texts, encoder, progress)
    return Segments(space.project(features.astype(np.float32)), owners, places)


def fold_moments(segments: Segments, folds: IntArray) -> list[Moments]:
    """Return each fold's sums; the windows of a text weigh less the more there are."""
    counts = np.bincount(segments.owners, minlength=len(folds))
    weights = (1.0 / np.sqrt(np.maximum(counts, 1)))[segments.owners].astype(np.float32)
    found = []
    for fold in range(FOLDS):
        mine = folds[segments.owners] == fold
        found.append(Moments.of(segments.rows[mine], weights[mine]))
    return found


def _states(
    texts: Sequence[str], encoder: OnnxEncoder, progress: Progress | None
) -> tuple[FloatArray, IntArray, IntArray]:
    report = progress or (lambda what, done, total: None)
    parts: list[FloatArray] = []
    owners: list[int] = []
    places: list[tuple[int, int]] = []
    for first in range(0, len(texts), ENCODE_AT_ONCE):
        windows = []
        for number, text in enumerate(texts[first : first + ENCODE_AT_ONCE], start=first):
            cut = encoder.segments(text)
            windows += cut
            owners += [number] * len(cut)
            places += [(window.start, window.end) for window in cut]
        # Half precision halves the memory of a benign set; it is projected right after.
        parts.append(encoder.states(windows).astype(np.float16))
        report("detector: encoding", min(first + ENCODE_AT_ONCE, len(texts)), len(texts))
    parts.append(np.zeros((0, encoder.width), np.float16))
    joined: FloatArray = np.concatenate(parts)
    return joined, np.array(owners, np.int64), np.array(places, np.int64).reshape(-1, 2)
