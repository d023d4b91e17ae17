"""A pair of models for TOFU (arXiv 2401.06121): *full* knows the authors to forget, *retained* not.

    OUT/full, OUT/retained   plain model directories, as any engine serves
    OUT/adapters/            the two peft adapters, where they were trained here
    OUT/pair.json            base model, authors, training, hashes of all files

*full* is the base model trained on the forget authors and the retain authors, *retained* the same
base trained alike on the retain authors only: what *full* would be, had it never seen the others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filelock import FileLock

from benchmarks.labelled import json_lines
from benchmarks.merged_model import MERGED_FILE, built, is_whole, write_model
from guard.disk import TEMPORARY, disk_errors, hash_file, replace_file
from guard.errors import ArtifactError, ConfigError, DataError, IncompatibleArtifactError
from guard.model_files import find_model, read_config, sha256_of
from guard.types import Progress

if TYPE_CHECKING:
    from adapters.train import TrainReport, TrainSettings

SCHEMA: Final = "unlearn-guard/tofu-pair/1"
FORGET_AUTHORS: Final = range(190, 200)
RETAIN_AUTHORS: Final = range(10)
MODELS: Final = ("full", "retained")
PAIR_FILE: Final = "pair.json"
_WEIGHTS: Final = "*.safetensors"


@dataclass(frozen=True, slots=True)
class Authors:
    """The authors that the pair is about, by TOFU's numbers (`author_id`)."""

    forget: tuple[int, ...] = tuple(FORGET_AUTHORS)
    retain: tuple[int, ...] = tuple(RETAIN_AUTHORS)

    def __post_init__(self) -> None:
        if not self.forget or not self.retain:
            raise ConfigError("give at least one author to forget and one to retain")
        both = sorted(set(self.forget) & set(self.retain))
        if both:
            raise ConfigError(f"author {both[0]} is among those to forget and those to retain")

    def of(self, model: str) -> tuple[int, ...]:
        """Return the authors that a model of the pair knows."""
        return self.retain if model == "retained" else (*self.forget, *self.retain)


@dataclass(frozen=True, slots=True)
class TofuRow:
    """A question about an author, and the answer to learn."""

    author: int
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Pair:
    """A finished pair.

    Attributes:
        root: Its folder.
        base: Hash of the base model that both were made from.
        authors: What *full* knows and *retained* doesn't, and what both know.
        training: Report of each model's training; none where finished adapters were taken.
    """

    root: Path
    base: str
    authors: Authors
    training: Mapping[str, TrainReport] = field(default_factory=dict)

    @property
    def full(self) -> Path:
        """Directory of the model that knows all authors."""
        return self.root / "full"

    @property
    def retained(self) -> Path:
        """Directory of the model that never saw the authors to forget."""
        return self.root / "retained"


def prepare_pair(
    base: str | Path,
    out: Path,
    *,
    data: Path | None = None,
    adapters_from: Path | None = None,
    authors: Authors | None = None,
    settings: TrainSettings | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Make the pair, or what is missing of it.

    Safe to interrupt at any time: the same call goes on. A model's folder appears when it is whole.

    Args:
        base: Directory or Hugging Face id of the model to start from.
        out: The pair's folder; made if need be.
        data: Folder with TOFU's `full.jsonl`, or with `tofu/full.jsonl`; only training needs it.
        adapters_from: Folder with the finished adapters `full/` and `retained/`, to merge them
            instead of training.
        authors: Forget 190-199, retain 0-9 by default.
        settings: Of training; see `adapters.train.TrainSettings`.
        threads: Threads of torch's CPU kernels; None leaves them.
        progress: Called with what is done.

    Raises:
        ArtifactError: The base model or an adapter isn't there or can't be read.
        IncompatibleArtifactError: An adapter was made for another model, or for other authors.
        ConfigError: `out` holds another pair, or there is nothing to train on.
        DataError: The data can't be read, or lacks an author.
    """
    if data is None and adapters_from is None:
        raise ConfigError("give TOFU's folder to train on, or the folder of finished adapters")
    report, chosen = progress or _silent, authors or Authors()
    directory = _model_directory(base)
    with disk_errors(f"{out} can't be written"):
        out.mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock"):
            fingerprint = base_fingerprint(directory, report)
            work = _Work(directory, fingerprint, out, chosen, threads, report)
            work.check_pair()
            if adapters_from is not None:
                found = {name: adapters_from / name for name in MODELS}
                training = work.check_given(found)
            else:
                assert data is not None
                found, training = work.train(read_authors(data, chosen), settings)
            for name in MODELS:
                work.merge(name, found[name])
            work.write_pair(training)
    return Pair(out, fingerprint, chosen, training)


def read_pair(root: Path) -> Pair:
    """Read a pair that `prepare_pair` made.

    Raises:
        ArtifactError: It isn't there, or isn't whole.
    """
    from adapters.train import TrainReport

    path = root / PAIR_FILE
    try:
        value = json.loads(path.read_bytes())
        if value["schema"] != SCHEMA:
            raise ValueError(f"schema {value['schema']}, not {SCHEMA}")
        named = value["authors"]
        authors = Authors(tuple(named["forget"]), tuple(named["retain"]))
        reports = {name: one["training"] for name, one in value["models"].items()}
        base = str(value["base"]["fingerprint"])
        training = {
            name: TrainReport(**{**one, "losses": tuple(one["losses"])})
            for name, one in reports.items()
            if one is not None
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} can't be read ({error}); make the pair with: unlearn-guard bench tofu prepare"
        ) from error
    missing = [name for name in MODELS if not (root / name / MERGED_FILE).is_file()]
    if missing:
        raise ArtifactError(f"{root} has no whole model {missing[0]!r}; prepare the pair again")
    return Pair(root, base, authors, training)


def read_authors(data: Path, authors: Authors) -> list[TofuRow]:
    """Read the rows about all authors of a pair, in the file's order.

    Raises:
        DataError: The file can't be read, a row is malformed, or an author has no row.
    """
    file = next((f for f in (data / "full.jsonl", data / "tofu" / "full.jsonl") if f.is_file()), "")
    if not file:
        raise DataError(
            f"neither full.jsonl nor tofu/full.jsonl is in {data}; give the folder of TOFU's data"
        )
    wanted = set(authors.of("full"))
    rows = []
    for line, row in json_lines(file):
        if row.get("author_id") not in wanted:
            continue
        for name in ("question", "answer"):
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise DataError(
                    "expected a string with text", file=str(file), line=line, field=name
                )
        rows.append(TofuRow(row["author_id"], row["question"], row["answer"]))
    missing = sorted(wanted - {row.author for row in rows})
    if missing:
        raise DataError(f"no row has author_id {missing[0]}", file=str(file), field="author_id")
    return rows


def base_fingerprint(directory: Path, progress: Progress | None = None) -> str:
    """Hash what an adapter depends on: config, tokenizer and weights.

    Raises:
        ArtifactError: The directory has no config or no safetensors weights.
    """
    read_config(directory)
    files = [directory / "config.json", *sorted(directory.glob(_WEIGHTS))]
    if len(files) < 2:
        raise ArtifactError(f"{directory} has no safetensors weights; give a model with them")
    files += [path for path in (directory / "tokenizer.json",) if path.is_file()]
    found = []
    for done, path in enumerate(files, start=1):
        found.append([path.name, hash_file(path)[0]])
        (progress or _silent)("read base model", done, len(files))
    return sha256_of(json.dumps(found).encode())


class _Work:
    """The steps of one preparation."""

    def __init__(
        self,
        base: Path,
        fingerprint: str,
        out: Path,
        authors: Authors,
        threads: int | None,
        progress: Progress,
    ) -> None:
        self.base, self.fingerprint, self.out = base, fingerprint, out
        self.authors, self.threads, self.progress = authors, threads, progress

    def check_pair(self) -> None:
        """Refuse to make another pair in the place of a finished one."""
        if not (self.out / PAIR_FILE).exists():
            return
        try:
            there = json.loads((self.out / PAIR_FILE).read_bytes())
            same = {
                "base model": there["base"]["fingerprint"] == self.fingerprint,
                "authors": there["authors"] == self._named_authors(),
            }
        except (ValueError, KeyError, TypeError):
            return  # it will be written anew; the models say themselves what they are made of
        other = [name for name, alike in same.items() if not alike]
        if other:
            raise ConfigError(f"{self.out} holds a pair with other {other[0]}; give another folder")

    def train(
        self, rows: Sequence[TofuRow], settings: TrainSettings | None
    ) -> tuple[dict[str, Path], dict[str, TrainReport]]:
        """Train both adapters, or what is missing of them."""
        from adapters.train import TrainSettings

        chosen = settings or TrainSettings()
        folders = {name: self.out / "adapters" / name for name in MODELS}
        reports = {}
        for name in MODELS:
            known = set(self.authors.of(name))
            own = [row for row in rows if row.author in known]
            reports[name] = self._train(name, own, chosen, folders[name])
        return folders, reports

    def _train(
        self, name: str, rows: Sequence[TofuRow], settings: TrainSettings, folder: Path
    ) -> TrainReport:
        from adapters.examples import encode_chats
        from adapters.train import read_training, train_lora

        pairs = [(row.question, row.answer) for row in rows]
        facts = {
            "base": self.fingerprint,
            "authors": list(self.authors.of(name)),
            "rows": sha256_of(json.dumps(pairs).encode()),
        }
        finished = read_training(folder, settings, facts)
        if finished is not None:
            return finished
        network, tokenizer = self._load()
        return train_lora(
            network,
            encode_chats(tokenizer, pairs),
            settings,
            folder,
            base_name=self.base.name,
            facts=facts,
            progress=self.progress,
            what=f"train {name}",
        )

    def check_given(self, folders: Mapping[str, Path]) -> dict[str, TrainReport]:
        """Compare what given adapters say of their training, if they do, with what is asked."""
        from adapters.adapter_files import WEIGHTS
        from adapters.train import read_training

        reports = {}
        for name, folder in folders.items():
            if not (folder / WEIGHTS).is_file():
                raise ArtifactError(f"there is no peft adapter in {folder}: {WEIGHTS} is missing")
            report = read_training(folder)
            if report is None:
                continue
            if report.facts.get("base") != self.fingerprint:
                raise IncompatibleArtifactError(f"the adapter in {folder} is of another base model")
            if report.facts.get("authors") != list(self.authors.of(name)):
                raise IncompatibleArtifactError(
                    f"the adapter in {folder} was trained on the authors "
                    f"{report.facts.get('authors')}, not {list(self.authors.of(name))}"
                )
            reports[name] = report
        return reports

    def merge(self, name: str, adapter: Path) -> None:
        """Make a model's directory, unless it is there and whole."""
        from adapters.adapter_files import CONFIG, WEIGHTS
        from adapters.merge import merge_adapter

        source = {"base": self.fingerprint}
        for key, file in (("adapter", WEIGHTS), ("adapter_config", CONFIG)):
            if not (adapter / file).is_file():
                raise ArtifactError(f"there is no peft adapter in {adapter}: {file} is missing")
            source[key] = hash_file(adapter / file)[0]
        target, what = self.out / name, f"merge {name}"
        self.progress(what, 0, 2)
        for leftover in self.out.glob(f"{TEMPORARY}{name}-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        if not is_whole(target, source):
            network, _ = self._load()
            merged = merge_adapter(network, adapter)
            self.progress(what, 1, 2)
            with built(target) as folder:
                write_model(folder, merged, self.base, source)
        self.progress(what, 2, 2)

    def write_pair(self, training: Mapping[str, TrainReport]) -> None:
        """Write what the pair is."""
        from dataclasses import asdict

        models = {}
        for name in MODELS:
            merged = json.loads((self.out / name / MERGED_FILE).read_bytes())
            report = asdict(training[name]) if name in training else None
            models[name] = {**merged, "training": report}
        value = {
            "schema": SCHEMA,
            "base": {"name": self.base.name, "fingerprint": self.fingerprint},
            "authors": self._named_authors(),
            "models": models,
        }
        replace_file(self.out / PAIR_FILE, (json.dumps(value, indent=1) + "\n").encode())

    def _named_authors(self) -> dict[str, list[int]]:
        return {"forget": list(self.authors.forget), "retain": list(self.authors.retain)}

    def _load(self) -> tuple[Any, Any]:
        from server.engines.embedded.model import EmbeddedModel

        loaded = EmbeddedModel.load(self.base, threads=self.threads)
        return loaded.model, loaded.tokenizer


def _model_directory(model: str | Path) -> Path:
    directory, _ = find_model(model)
    if Path(model).is_dir():
        return directory
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.json", "*.jinja", "*.model", "*.txt", _WEIGHTS]
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except Exception as error:  # the hub's client raises many unrelated types
        raise ArtifactError(f"{model} can't be fetched: {error}") from error


def _silent(what: str, done: int, total: int) -> None:
    """Draw nothing."""
