"""What came of a sequence of requests: routed to their adapters, and with all adapters at once.

*Routed* is the product: detector and router choose by the question, and most questions meet no
adapter. *Merged* is O3's way without its detector: every adapter acts at weight 1 on everything.
Figures are kept in the report's folder, and measured anew when what they rest on changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.continual import ContinualSettings, RequestSequence, Stage, Variant
from benchmarks.labelled import json_lines
from benchmarks.tofu_measure import (
    CHAT,
    Likelihoods,
    Scorer,
    System,
    as_json,
    from_json,
    likelihoods,
)
from benchmarks.tofu_pair import base_fingerprint
from benchmarks.tofu_rows import Question, load_pair_data, sample
from guard.bundle import BundleStore
from guard.disk import replace_file
from guard.errors import DataError
from guard.types import AdapterUse, Progress, TokenScores

if TYPE_CHECKING:
    from guard.pipeline import Guard
    from server.engines.embedded.model import EmbeddedModel

PARAPHRASED: Final = "forget10_perturbed.jsonl"


@dataclass(frozen=True, slots=True)
class ContinualData:
    """What is asked.

    Attributes:
        requests: Questions about each request's target, in order.
        paraphrases: The same in other words, as far as there are any: no detector learned them.
        others: About authors that no model knows: non-members.
        kept: By kind, what is to be kept.
    """

    requests: tuple[tuple[Question, ...], ...]
    paraphrases: tuple[tuple[str, ...], ...]
    others: tuple[Question, ...]
    kept: Mapping[str, tuple[Question, ...]]

    def first(self, requests: int) -> ContinualData:
        """Return the same for the first requests alone."""
        return replace(
            self, requests=self.requests[:requests], paraphrases=self.paraphrases[:requests]
        )

    @property
    def forget(self) -> list[Question]:
        """The questions of all requests, in order."""
        return [question for questions in self.requests for question in questions]

    def digest(self) -> str:
        """Return all texts as a digest."""
        sets = [self.forget, self.others, *self.kept.values()]
        texts = [[(row.text, row.answer) for row in rows] for rows in sets]
        return hashlib.sha256(json.dumps([texts, self.paraphrases]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Figures:
    """What one system makes of the questions.

    Attributes:
        likelihoods: By set: `forget` in the order of the requests, `others`, and the kinds kept.
        outcomes: What the router did with each question, by set: `questions` and `paraphrases`
            of the requests ("own", "own and others", "other", "missed"), and the kinds kept
            ("passed", "flagged"). None of it without a router.
        cosines: Largest cosine of a principal angle of any two adapters, by side.
    """

    likelihoods: dict[str, Likelihoods]
    outcomes: dict[str, list[str]] = field(default_factory=dict)
    cosines: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """All figures.

    Attributes:
        full: Of the model that knows all, bare.
        retained: Of the model that never saw the requests' targets, bare.
        routed: By number of requests.
        merged: By variant and number of requests.
    """

    full: Figures
    retained: Figures
    routed: Mapping[int, Figures]
    merged: Mapping[tuple[Variant, int], Figures]


def load_data(
    folder: Path, authors: Sequence[int], retain: Sequence[int], settings: ContinualSettings
) -> ContinualData:
    """Read TOFU's files, and draw as many questions as the settings say.

    Args:
        folder: With `forget10_perturbed.jsonl` and the like.
        authors: Numbers of the requests' authors, in order.
        retain: Of the authors that both models know.
        settings: How many questions are drawn.

    Raises:
        DataError: A file is missing or malformed, or holds no row of an author.
    """
    data = load_pair_data(folder, authors, retain)
    told: dict[int, list[str]] = {author: [] for author in authors}
    for _, row in json_lines(folder / PARAPHRASED):
        text = row.get("paraphrased_question")
        if isinstance(text, str) and row.get("author_id") in told:
            told[row["author_id"]].append(text)
    requests = tuple(tuple(q for q in data.forget if q.author == author) for author in authors)
    for author, questions in zip(authors, requests, strict=True):
        if not questions:
            raise DataError(f"holds no row of author {author}", file=str(folder / PARAPHRASED))
    seed = settings.seed
    return ContinualData(
        requests,
        tuple(tuple(told[author]) for author in authors),
        tuple(sample(data.others, settings.others, seed)),
        {kind: tuple(sample(rows, settings.utility, seed)) for kind, rows in data.kept.items()},
    )


def measure_sequence(
    sequence: RequestSequence, retained: Path, data: ContinualData, progress: Progress
) -> Measured:
    """Go through the sequence, and measure each stage as soon as it is there.

    Args:
        sequence: The requests.
        retained: Directory of the model that never saw their targets.
        data: What is asked.
        progress: Told of training and measuring.
    """
    bench = _Bench(sequence, data, progress)
    full = bench.kept("full", [sequence.identity], lambda: bench.bare(sequence.model))
    routed: dict[int, Figures] = {}
    merged: dict[tuple[Variant, int], Figures] = {}
    for stage in sequence.stages(progress):
        routed[stage.requests] = bench.routed(stage)
        for variant in stage.adapters:
            merged[variant, stage.requests] = bench.merged(stage, variant)
    known = bench.kept(
        "retained", [base_fingerprint(retained)], lambda: bench.bare(_load(retained))
    )
    return Measured(full, known, routed, merged)


def _load(model: Path) -> EmbeddedModel:
    from server.engines.embedded.model import EmbeddedModel

    return EmbeddedModel.load(model)


class _Bench:
    """Measures systems, each once."""

    def __init__(self, sequence: RequestSequence, data: ContinualData, progress: Progress) -> None:
        self.sequence, self.data, self.progress = sequence, data, progress
        self._seen: dict[bytes, TokenScores] = {}

    def kept(self, name: str, rests_on: list[Any], measure: Callable[[], Figures]) -> Figures:
        """Return what was measured of the very same, or measure it and keep it."""
        identity = hashlib.sha256(json.dumps([rests_on, self.data.digest()]).encode()).hexdigest()
        file = self.sequence.out / "measured" / f"{name}.json"
        found = _read(file, identity)
        if found is None:
            found = measure()
            file.parent.mkdir(exist_ok=True)
            replace_file(file, json.dumps({"identity": identity, **_as_json(found)}).encode())
        return found

    def bare(self, model: EmbeddedModel) -> Figures:
        """Measure a model as it is; the scores of one are no other's."""
        seen = self._seen if model is self.sequence.model else {}
        return Figures(self._likelihoods(System("bare", "none", model), self.data, seen))

    def routed(self, stage: Stage) -> Figures:
        """Measure the product after some requests."""
        manifest = stage.bundle.current().manifest
        facts = [file.sha256 for file in manifest.files.values()]
        return self.kept(
            f"routed-{stage.requests:02d}",
            [self.sequence.identity, facts],
            lambda: self._routed(stage),
        )

    def _routed(self, stage: Stage) -> Figures:
        data = self.data.first(stage.requests)
        guard = self._guard(stage.bundle)
        system = System(f"routed, {stage.requests}", "adapt", self.sequence.model, guard)
        found = self._likelihoods(system, data, self._seen)
        return Figures(found, _outcomes(guard, data, self.sequence.names, self.progress))

    def _guard(self, store: BundleStore) -> Guard:
        from guard.build import load_guard

        sequence = self.sequence
        return load_guard(
            store=store,
            key=sequence.key,
            prompts=sequence.prompts,
            ledger=None,
            threads=sequence.threads,
        ).routed("adapt")

    def merged(self, stage: Stage, variant: Variant) -> Figures:
        """Measure all adapters of a variant at once, after some requests."""
        uses = tuple(adapter_use(folder) for folder in stage.adapters[variant])
        return self.kept(
            f"merged-{variant}-{stage.requests:02d}",
            [self.sequence.identity, [use.key for use in uses]],
            lambda: self._merged(stage, variant, uses),
        )

    def _merged(self, stage: Stage, variant: Variant, uses: tuple[AdapterUse, ...]) -> Figures:
        from adapters.orthogonal import largest_cosine

        name = f"merged {variant}, {stage.requests}"
        system = System(name, "merged", self.sequence.model, adapters=uses)
        found = self._likelihoods(system, self.data.first(stage.requests), {})
        folders = stage.adapters[variant]
        return Figures(
            found,
            cosines={
                "input": largest_cosine(folders, "input"),
                "output": largest_cosine(folders, "output"),
            },
        )

    def _likelihoods(
        self, system: System, data: ContinualData, seen: dict[bytes, TokenScores]
    ) -> dict[str, Likelihoods]:
        scorer = Scorer(seen)
        sets = {"forget": data.forget, "others": data.others, **data.kept}
        return {
            name: likelihoods(
                system, _answers_only(rows), scorer, f"{system.name}: {name}", self.progress
            )
            for name, rows in sets.items()
        }


def adapter_use(folder: Path) -> AdapterUse:
    """Return an adapter at the strength that it was trained at."""
    from adapters.adapter_files import CONFIG, WEIGHTS

    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    rank = int(json.loads((folder / CONFIG).read_bytes())["r"])
    return AdapterUse(digest, folder, rank, 1.0)


def _answers_only(rows: Sequence[Question]) -> list[Question]:
    """Leave out the other answers, which nothing is computed from here."""
    return [replace(row, paraphrase=row.answer, wrong=()) for row in rows]


def _outcomes(
    guard: Guard, data: ContinualData, names: Sequence[str], progress: Progress
) -> dict[str, list[str]]:
    """Return what the router does with each question; see `Figures.outcomes`."""
    asked = {
        "questions": [[row.text for row in rows] for rows in data.requests],
        "paraphrases": data.paraphrases,
    }
    found = {
        kind: [
            _outcome(_hits(guard, text), name)
            for name, texts in zip(names, sets, strict=False)
            for text in texts
        ]
        for kind, sets in asked.items()
    }
    for number, (kind, rows) in enumerate(data.kept.items(), start=1):
        hits = [_hits(guard, row.text) for row in rows]
        found[kind] = ["flagged" if some else "passed" for some in hits]
        progress("routes", number, len(data.kept))
    return found


def _hits(guard: Guard, text: str) -> list[str]:
    """Return the targets that a question touches, the strongest first."""
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]})
    return [hit.name for hit in guard.inspect(CHAT, body.encode()).decision.targets]


def _outcome(hits: Sequence[str], own: str) -> str:
    if not hits:
        return "missed"
    if hits[0] != own:
        return "other"
    return "own" if len(hits) == 1 else "own and others"


def _as_json(found: Figures) -> dict[str, Any]:
    return {
        "likelihoods": as_json(found.likelihoods),
        "outcomes": found.outcomes,
        "cosines": found.cosines,
    }


def _read(file: Path, identity: str) -> Figures | None:
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"can't be read: {error}; delete it", file=str(file)) from error
    if value.pop("identity", None) != identity:
        return None
    return Figures(from_json(value["likelihoods"]), dict(value["outcomes"]), dict(value["cosines"]))
