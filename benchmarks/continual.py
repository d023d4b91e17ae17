"""Requests to forget that come one after another: an adapter each, kept apart from those before.

    OUT/sequence.json         what the sequence rests on
    OUT/requests/NAME.jsonl   rows of each request
    OUT/bundle/               the bundle, which grows; its adapters are those of the first variant
    OUT/stages/after-05/      the bundle as it was after five requests
    OUT/prepared/NAME/        what the variants of one request's training share
    OUT/adapters/VARIANT/NAME/

All of it is kept, so that an interrupted run goes on where it stopped. `continual_measure` looks at
what came of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from benchmarks.answers import rouge_l_recall
from benchmarks.merged_model import built
from benchmarks.tofu_pair import base_fingerprint
from guard.bundle import ADAPTER_WEIGHTS, CURRENT, BundleStore
from guard.disk import disk_errors, link_or_copy, relative_files, replace_file
from guard.errors import ArtifactError, ConfigError
from guard.keys import GuardKey
from guard.types import Progress

if TYPE_CHECKING:
    from guard.prompts import ModelPrompts
    from server.engines.embedded.model import EmbeddedModel

Variant = Literal["project", "penalty", "none"]
"""How an adapter is kept apart: projected after each step, O3's penalty (0.1), or not at all."""

VARIANTS: Final[tuple[Variant, ...]] = get_args(Variant)
STAGES: Final = (1, 5, 10, 20)
"""Numbers of requests after which is measured; the last one is, too."""

_DONE: Final = "done.json"
_SEQUENCE: Final = "sequence.json"

Rows = list[tuple[str, str]]
"""Questions and answers."""


@dataclass(frozen=True, slots=True)
class ContinualSettings:
    """What is done, and how much of it is measured.

    Attributes:
        requests: How many come.
        variants: How adapters are kept apart; the first one's are the bundle's.
        training: Fields of `AdapterRequest` that differ from its defaults, such as `epochs`.
        utility: Questions of each kind to be kept; None takes all.
        others: Questions about authors that no model knows; None takes all.
        seed: Of learning and samples.
    """

    requests: int = 10
    variants: tuple[Variant, ...] = VARIANTS
    training: Mapping[str, Any] = field(default_factory=dict)
    utility: int | None = 30
    others: int | None = 60
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [one for one in self.variants if one not in VARIANTS]
        if unknown or not self.variants or len(set(self.variants)) < len(self.variants):
            raise ConfigError(
                f"variants are {', '.join(self.variants) or 'none'}; give one or more of "
                f"{', '.join(VARIANTS)}, each once"
            )
        if self.requests < 1:
            raise ConfigError(f"requests is {self.requests}; it must be at least 1")

    @property
    def stages(self) -> tuple[int, ...]:
        """Numbers of requests after which is measured."""
        return tuple(sorted({one for one in STAGES if one < self.requests} | {self.requests}))


@dataclass(frozen=True, slots=True)
class Stage:
    """What there is after some requests.

    Attributes:
        requests: How many.
        bundle: With a target for each, and the first variant's adapters.
        adapters: Folders of each variant's adapters, oldest first.
    """

    requests: int
    bundle: BundleStore
    adapters: Mapping[Variant, tuple[Path, ...]]


class RequestSequence:
    """The requests, the model that is to forget, and where everything is kept.

    Args:
        full: Directory of the model that knows all.
        rows: Questions and answers of each request by its target's name, in order.
        out: The folder.
        settings: What is done.
        benign: General traffic for the detector; None takes the set that ships.
        threads: Of model and encoder; None leaves them.

    Raises:
        ConfigError: There are fewer requests than wanted, or `out` holds another sequence.
    """

    def __init__(
        self,
        full: Path,
        rows: Mapping[str, Rows],
        out: Path,
        settings: ContinualSettings,
        benign: Path | None = None,
        threads: int | None = None,
    ) -> None:
        if settings.requests > len(rows):
            raise ConfigError(
                f"{settings.requests} requests are wanted, and {len(rows)} are possible: one for "
                "each author that only the full model knows"
            )
        self.full, self.out, self.settings = full, out, settings
        self.rows = {name: rows[name] for name in list(rows)[: settings.requests]}
        self.benign, self.threads = benign, threads
        # The sequence is to come out the same again: digests and noise hang on the key.
        secret = hashlib.sha256(f"bench continual, seed {settings.seed}".encode()).digest()
        self.key = GuardKey(secret)
        self.store = BundleStore(out / "bundle", self.key)
        self._settle()

    @property
    def names(self) -> list[str]:
        """The targets, in the order of the requests."""
        return list(self.rows)

    @cached_property
    def model(self) -> EmbeddedModel:
        """The model that knows all."""
        from server.engines.embedded.model import EmbeddedModel

        return EmbeddedModel.load(self.full, threads=self.threads)

    @cached_property
    def prompts(self) -> ModelPrompts:
        """Its files."""
        from guard.prompts import ModelPrompts

        return ModelPrompts.load(self.full)

    @cached_property
    def identity(self) -> str:
        """A digest of its weights."""
        return base_fingerprint(self.full)

    def stages(self, progress: Progress) -> Iterator[Stage]:
        """Yield each stage, as soon as it is there.

        Raises:
            ConfigError: The folder holds more requests, and not this stage of theirs.
            KeyboardInterrupt: On Ctrl-C, with all that was done saved.
        """
        done = 0
        for stage in self.settings.stages:
            root = self.out / "stages" / f"after-{stage:02d}"
            if not root.exists():
                self._check_not_beyond(stage)
                self._add_targets(stage, progress)
            for number in range(done, stage):
                for variant in self.settings.variants:
                    self._train(number, variant, progress)
            if not root.exists():
                _copy_current(self.store, root)
            done = stage
            adapters = {
                variant: tuple(self._adapter(variant, name) for name in self.names[:stage])
                for variant in self.settings.variants
            }
            yield Stage(stage, BundleStore(root, self.key), adapters)

    # --- Targets -------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Write what the sequence rests on, and the requests' rows; refuse another sequence."""
        digests = {name: _digest(pairs) for name, pairs in self.rows.items()}
        facts: dict[str, Any] = {
            "model": self.identity,
            "seed": self.settings.seed,
            "bundle": self.settings.variants[0],
            "training": json.loads(json.dumps(dict(self.settings.training))),
        }
        file = self.out / _SEQUENCE
        with disk_errors(f"{self.out} can't be written"):
            (self.out / "requests").mkdir(parents=True, exist_ok=True)
            if file.exists():
                digests = _continued(file, facts, digests)
            text = json.dumps({**facts, "requests": list(digests.items())}, indent=1) + "\n"
            replace_file(file, text.encode())
            for name, pairs in self.rows.items():
                lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in pairs]
                replace_file(self._forget(name), "".join(lines).encode())

    def _forget(self, name: str) -> Path:
        return self.out / "requests" / f"{name}.jsonl"

    def _check_not_beyond(self, stage: int) -> None:
        there = set(self.store.current().manifest.targets) if self.store.exists() else set()
        if there - set(self.names[:stage]):
            raise ConfigError(
                f"{self.out} holds a sequence of {len(there)} requests, whose bundle was not kept "
                f"after {stage}: give --requests {len(there)}, or another folder"
            )

    def _add_targets(self, stage: int, progress: Progress) -> None:
        """Learn to recognise what the requests up to this stage are about."""
        from guard.many import add_many
        from guard.targets import TargetRequest

        there = self.store.current().manifest.targets if self.store.exists() else {}
        new = [name for name in self.names[:stage] if name not in there]
        if not new:
            return
        with tempfile.TemporaryDirectory(prefix="unlearn-guard-") as scratch:
            for name in new:
                shutil.copyfile(self._forget(name), Path(scratch) / f"{name}.jsonl")
            request = TargetRequest("", Path(scratch), benign=self.benign, seed=self.settings.seed)
            add_many(
                Path(scratch),
                request,
                store=self.store,
                key=self.key,
                prompts=self.prompts,
                ledger=None,
                progress=progress,
                workers=self.threads,
            )

    # --- Adapters ------------------------------------------------------------------------------

    def _adapter(self, variant: Variant, name: str) -> Path:
        from guard.adapter_training import TRAINING

        return self._folder(variant, name) / TRAINING

    def _folder(self, variant: Variant, name: str) -> Path:
        return self.out / "adapters" / variant / name

    def _train(self, number: int, variant: Variant, progress: Progress) -> None:
        """Train one request's adapter by a variant, unless that was done."""
        from guard.adapter_request import AdapterRequest
        from guard.adapter_training import train_adapter
        from guard.learn_adapter import learn_adapter
        from guard.learn_inputs import entry_of, make_prompter

        name = self.names[number]
        folder = self._folder(variant, name)
        if (folder / _DONE).exists():
            return
        fields: dict[str, Any] = {
            "target": name,
            "forget": self._forget(name),
            "out": folder,
            "orthogonality": variant,
            "route": "adapt",
            "prepared": self.out / "prepared" / name,
            "earlier": [self._adapter(variant, one) for one in self.names[:number]],
            # With one seed for all, every A would start the same.
            "seed": self.settings.seed + number,
            "apply": variant == self.settings.variants[0],
        }
        what = f"request {number + 1} of {len(self.names)}, {variant}"
        shared: dict[str, Any] = {
            "key": self.key,
            "prompts": self.prompts,
            "model": self.model,
            "identity": self.identity,
            "progress": lambda step, done, total: progress(f"{what}: {step}", done, total),
        }
        request = AdapterRequest(**{**fields, **self.settings.training})
        if request.apply:
            seconds = learn_adapter(
                request,
                store=self.store,
                ledger=None,
                shared_words=rouge_l_recall,
                threads=self.threads,
                **shared,
            ).report.seconds
        else:
            bundle = self.store.current()
            entry = entry_of(bundle, name)
            prompter = make_prompter(name, bundle, entry, self.key, self.prompts, self.threads)
            trained = train_adapter(request, bundle=bundle, prompter=prompter, **shared)
            seconds = trained.report.seconds
        size = (self._adapter(variant, name) / ADAPTER_WEIGHTS).stat().st_size
        figures = {"train_s": seconds, "adapter_mb": size / 1e6}
        replace_file(folder / _DONE, json.dumps(figures).encode())

    def trained(self, variant: Variant) -> list[dict[str, float]]:
        """Return seconds and megabytes of each finished adapter, in the order of the requests."""
        files = [self._folder(variant, name) / _DONE for name in self.names]
        return [json.loads(file.read_bytes()) for file in files if file.exists()]


def _digest(pairs: Rows) -> str:
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _continued(file: Path, facts: Mapping[str, Any], digests: dict[str, str]) -> dict[str, str]:
    """Check that the folder's sequence is the same as far as both go; return the longer one."""
    try:
        there = json.loads(file.read_bytes())
        earlier = [(str(name), str(digest)) for name, digest in there.pop("requests")]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} can't be read ({error}); give another folder") from error
    other = [name for name, value in facts.items() if there.get(name) != value]
    ours = list(digests.items())
    shorter = min(len(ours), len(earlier))
    if ours[:shorter] != earlier[:shorter]:
        other.append("requests")
    if other:
        raise ConfigError(
            f"{file.parent} holds another sequence (its {other[0]} differs): give another folder"
        )
    return dict(ours if len(ours) > len(earlier) else earlier)


def _copy_current(store: BundleStore, root: Path) -> None:
    """Keep a bundle as it is now; the files' bytes are shared."""
    bundle = store.current()
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(f"{root} can't be written"), built(root) as folder:
            for rel in relative_files(bundle.dir):
                link_or_copy(bundle.dir / rel, folder / bundle.dir.name / rel)
            replace_file(folder / CURRENT, f"{bundle.dir.name}\n".encode())
    finally:
        bundle.close()
