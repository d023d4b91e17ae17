"""What learning a target needs, made once and shared: background, neighbours, encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from classifiers.augment import ForgetRow
from classifiers.background import Background, benign_digest, make_background
from classifiers.encoder import OnnxEncoder
from classifiers.learn import Kind, LearnedDetector, TargetLearner
from classifiers.scorers import Method, fit_scorer
from classifiers.study import Neighbours
from classifiers.verbatim import GramHasher
from guard.errors import ArtifactError, IncompatibleArtifactError
from guard.types import Progress

DIGEST = "benign_sha256"


class Row(ForgetRow, Protocol):
    """A row of a forget file."""

    @property
    def is_term(self) -> bool:
        """True if the prompt is a name, title or technical term that stands for the target."""
        ...


@dataclass(frozen=True, slots=True)
class Settings:
    """How targets are learned.

    Attributes:
        seed: The same seed and data give the same artifacts.
        threads: Windows encoded at the same time; None takes the CPUs available.
        effort: Variants tried of each forget row, 0 to 5.
        kind: What the targets are.
        budget: Share of benign requests that a topic may flag alone.
    """

    seed: int = 0
    threads: int | None = None
    effort: int = 5
    kind: Kind = "entity"
    budget: float = 1e-3


class Workshop:
    """Learns targets that share one benign set and one set of neighbours.

    Args:
        encoder_dir: Folder with the exported encoder.
        benign: General prompts, as given.
        retain: Texts to keep, as given; may be empty.
        key: Keys the hashes of quotations.
        normalise: What serving does to a text before it is read.
        settings: How targets are learned.
        background: What `save` gave for the same benign set; None makes it.
        progress: Told how far it is.

    Raises:
        DataError: If there are too few benign texts.
        ArtifactError: If `background` is damaged.
        IncompatibleArtifactError: If it is of another benign set.
    """

    def __init__(
        self,
        encoder_dir: Path,
        benign: Sequence[str],
        retain: Sequence[str],
        key: bytes,
        normalise: Callable[[str], str],
        settings: Settings = Settings(),
        background: bytes | None = None,
        progress: Progress | None = None,
    ) -> None:
        encoder = OnnxEncoder(encoder_dir, settings.threads, cache_size=0)
        texts = [normalise(text).strip() for text in benign]
        texts = list(dict.fromkeys(text for text in texts if text))
        self.digest = benign_digest(texts)
        if background is None:
            self.background = make_background(texts, encoder, settings.seed, progress)
        else:
            self.background = _load(background, texts, self.digest)
        kept = [normalise(text).strip() for text in retain]
        neighbours = (
            Neighbours.of(kept, encoder, self.background, settings.seed, progress)
            if any(kept)
            else None
        )
        self._settings, self._normalise, self._neighbours = settings, normalise, neighbours
        self._learner = TargetLearner(
            self.background,
            encoder,
            GramHasher(key),
            normalise,
            neighbours,
            effort=settings.effort,
        )

    def learn(
        self, name: str, rows: Sequence[Row], progress: Progress | None = None
    ) -> LearnedDetector:
        """Learn one target from its forget rows."""
        texts = [row for row in rows if not row.is_term]
        terms = [row.prompt for row in rows if row.is_term]
        chosen = self._settings
        return self._learner.learn(
            name, texts, chosen.seed, terms, progress, chosen.kind, chosen.budget
        )

    def paper_files(
        self, method: Method, rows: Sequence[Row], progress: Progress | None = None
    ) -> dict[str, bytes]:
        """Fit a paper's detector for a target, beside what `learn` gives; see `scorers`."""
        texts = [self._normalise(row.prompt).strip() for row in rows if not row.is_term]
        forget = list(dict.fromkeys(text for text in texts if text))
        kept = self._neighbours.texts if self._neighbours else []
        benign = self.background.texts
        others = [text for text in (*kept, *benign) if text not in set(forget)]
        return fit_scorer(method, forget, others, benign, self._settings.seed, progress)

    def save(self) -> bytes:
        """Return the background for later targets of the same bundle; it holds no text."""
        from safetensors.numpy import save

        digest = np.frombuffer(bytes.fromhex(self.digest), np.uint8)
        arrays = {name: np.ascontiguousarray(v) for name, v in self.background.to_arrays().items()}
        return bytes(save({**arrays, DIGEST: digest}))


def _load(data: bytes, texts: list[str], digest: str) -> Background:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays = load(data)
        made_of = arrays.pop(DIGEST).tobytes().hex()
    except (SafetensorError, KeyError) as error:
        raise ArtifactError(f"the bundle's background cannot be read: {error!r}") from error
    if made_of != digest:
        raise IncompatibleArtifactError(
            "the bundle's targets were calibrated on another benign set: give the same --benign "
            "as for its first target, or make a new bundle"
        )
    return Background.from_arrays(texts, arrays)
