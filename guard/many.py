"""`target add --many`: learn every file of a folder as a target, in one new bundle version.

What is learned is kept, encrypted, beside the bundle until all of it is, so that an interrupted
run goes on where it stopped. Workers are processes of their own, one a core: learning is CPU work
from end to end.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guard.build import check_key, check_model, read_target, seal_target
from guard.bundle import Bundle, BundleStore, TargetEntry
from guard.disk import replace_file
from guard.errors import DataError, TargetExistsError
from guard.keys import GuardKey
from guard.ledger import Ledger
from guard.manifest import check_name
from guard.prompts import ModelPrompts
from guard.rows import Row, read_rows
from guard.targets import (
    DIGESTS_FILE,
    Data,
    TargetRequest,
    bank_of,
    current_bundle,
    digests,
    encoder_of,
    make_workshop,
    read_data,
    share,
    write_shared,
)
from guard.types import Progress

if TYPE_CHECKING:
    from classifiers.workshop import Workshop

STAGING = ".learned-"
DONE = "done.json"
MANY_EFFORT = 1
"""Variants tried of each row: a tenth of the time of `target add`, a few points of the interval."""

QUEUED_PER_WORKER = 4


@dataclass(frozen=True, slots=True)
class _Job:
    """What a worker needs to open its workshop; paths only, so that it is cheap to send."""

    encoder_dir: Path
    benign: Path
    retain: Path
    background: Path
    key: bytes
    seed: int


def add_many(
    folder: Path,
    request: TargetRequest,
    *,
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts,
    ledger: Ledger | None,
    progress: Progress,
    workers: int | None = None,
) -> int:
    """Learn a target from each `NAME.jsonl` of a folder.

    Args:
        folder: The files; each one's stem names its target.
        request: What all have in common; its name and forget file are not looked at.
        store: The bundle; its first version is made if there is none.
        key: Encrypts names and rows, keys digests and hashes.
        prompts: Files of the served model.
        ledger: Gets a row about the change.
        progress: Told how far it is.
        workers: Processes; the CPUs available by default.

    Returns:
        How many targets were added.

    Raises:
        DataError: If a file is wrong; nothing is learned then.
        TargetExistsError: If the bundle holds a target of one of the names.
    """
    files = _files(folder)
    current = current_bundle(store)
    if current is not None:
        check_key(current, key)
        check_model(current, prompts.fingerprint)
        _check_new(current, files, store)
    rows = {name: read_rows(path) for name, path in files.items()}
    data = read_data(request, [])
    store.root.mkdir(parents=True, exist_ok=True)
    staging = store.root / f"{STAGING}{_digest(request, data, key)}"
    staging.mkdir(exist_ok=True)
    encoder_dir = encoder_of(current, staging / "encoder", progress)
    saved = staging / "background.safetensors"
    background = saved.read_bytes() if saved.exists() else None
    workshop = make_workshop(
        request, data, current, encoder_dir, key, progress, MANY_EFFORT, background
    )
    job = _prepare(staging, workshop, data, encoder_dir, key, request.seed)
    _learn_all(rows, job, staging, key, workers or len(os.sched_getaffinity(0)), progress)
    shared = share(encoder_dir, workshop, bank_of(current, prompts))
    _write(rows, request, staging, shared, store, key, prompts, progress)
    shutil.rmtree(staging)
    if ledger is not None:
        version = store.current_version()
        ledger.append("bundle", action="target add", many=len(rows), bundle_version=version)
    return len(rows)


def _files(folder: Path) -> dict[str, Path]:
    files = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not files:
        raise DataError("no .jsonl files in the folder; each is to be a target", file=str(folder))
    for name in files:
        check_name(name)
    return files


def _check_new(current: Bundle, files: Mapping[str, Path], store: BundleStore) -> None:
    taken = sorted(set(files) & set(current.manifest.targets))
    if taken:
        raise TargetExistsError(
            f"bundle {store.root} holds {len(taken)} of these targets already "
            f"({', '.join(taken[:5])}{', …' if len(taken) > 5 else ''}): remove their files from "
            "the folder, or the targets from the bundle"
        )


def _digest(request: TargetRequest, data: Data, key: GuardKey) -> str:
    """What learned targets depend on besides their rows."""
    digest = hashlib.sha256(f"{key.id} {request.seed} {request.kind}".encode())
    for text in (*data.benign, "\0", *data.retain):
        digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()[:16]


def _prepare(
    staging: Path,
    workshop: Workshop,
    data: Data,
    encoder_dir: Path,
    key: GuardKey,
    seed: int,
) -> _Job:
    """Write what the workers read: general and retain texts, never a forget row."""
    job = _Job(
        encoder_dir,
        staging / "benign.json",
        staging / "retain.json",
        staging / "background.safetensors",
        key.subkey("ngrams"),
        seed,
    )
    replace_file(job.benign, json.dumps(data.benign).encode())
    replace_file(job.retain, json.dumps(data.retain).encode())
    if not job.background.exists():
        replace_file(job.background, workshop.save())
    return job


def _learn_all(
    rows: Mapping[str, list[Row]],
    job: _Job,
    staging: Path,
    key: GuardKey,
    workers: int,
    progress: Progress,
) -> None:
    """Learn what is not learned yet, a few targets a worker ahead."""
    marks = {name: _mark(found, key) for name, found in rows.items()}
    left = [name for name in rows if not _is_done(staging / name, marks[name])]
    done = len(rows) - len(left)
    progress("detector: targets", done, len(rows))
    if not left:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_open, initargs=(job,)) as pool:
        waiting = iter(left)
        futures = {
            pool.submit(_learn, name, rows[name]): name
            for name in _some(waiting, workers * QUEUED_PER_WORKER)
        }
        try:
            while futures:
                for future in as_completed(futures):
                    name = futures.pop(future)
                    files, report = future.result()
                    _keep(staging / name, seal_target(name, files, key), report, marks[name])
                    done += 1
                    progress("detector: targets", done, len(rows))
                    for following in _some(waiting, 1):
                        futures[pool.submit(_learn, following, rows[following])] = following
                    break
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _some(names: Iterator[str], count: int) -> list[str]:
    return [name for _, name in zip(range(count), names, strict=False)]


_WORKSHOP: list[Workshop] = []
"""The workshop of this worker process."""


def _open(job: _Job) -> None:
    from classifiers.workshop import Settings, Workshop
    from guard.normalise import normalise

    _WORKSHOP[:] = [
        Workshop(
            job.encoder_dir,
            json.loads(job.benign.read_text(encoding="utf-8")),
            json.loads(job.retain.read_text(encoding="utf-8")),
            job.key,
            lambda text: normalise(text).text,
            Settings(job.seed, threads=1, effort=MANY_EFFORT),
            job.background.read_bytes(),
        )
    ]


def _learn(name: str, rows: Sequence[Row]) -> tuple[dict[str, bytes], dict[str, Any]]:
    learned = _WORKSHOP[0].learn(name, rows)
    return learned.artifact.files(), learned.report


def _mark(rows: Sequence[Row], key: GuardKey) -> str:
    text = "\n".join(row.raw_digest_text for row in rows)
    return key.digest("forget-rows", text.encode("utf-8", "surrogatepass"))


def _is_done(folder: Path, mark: str) -> bool:
    try:
        return bool(json.loads((folder / DONE).read_text())["mark"] == mark)
    except (OSError, ValueError, KeyError):
        return False


def _keep(folder: Path, files: Mapping[str, bytes], report: dict[str, Any], mark: str) -> None:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    # Last: a folder without it is learned again.
    replace_file(folder / DONE, json.dumps({"mark": mark, "report": report}).encode())


def _write(
    rows: Mapping[str, list[Row]],
    request: TargetRequest,
    staging: Path,
    shared: Mapping[str, bytes],
    store: BundleStore,
    key: GuardKey,
    prompts: ModelPrompts,
    progress: Progress,
) -> None:
    from classifiers.bundle import thresholds
    from classifiers.figures import rates
    from corruptions.learn import default_spec

    corruption = {
        "spec": default_spec(prompts.hidden_size, prompts.embedding_rms).to_dict(),
        "learned": None,
    }
    with store.transaction() as draft:
        write_shared(draft, shared, key, prompts, request.fpr_budget)
        current = current_bundle(store)
        if current is not None:
            _check_new(current, dict.fromkeys(rows, staging), store)
        heads = _heads(current, key)
        for number, (name, found) in enumerate(rows.items(), start=1):
            folder = staging / name
            report = json.loads((folder / DONE).read_text())["report"]
            entry = TargetEntry(
                name=name,
                status=request.status,
                rows=len(found),
                answered_rows=sum(row.answer is not None for row in found),
                detector=report,
                corruption=corruption,
                notes=["strength not learned: many targets at once take the documented default"],
            )
            draft.manifest.targets[name] = entry
            for path in folder.iterdir():
                if path.name != DONE:
                    draft.write(entry.prefix + path.name, path.read_bytes())
            draft.write(entry.prefix + DIGESTS_FILE, digests(found, key))
            heads[name] = (folder / "head.safetensors").read_bytes()
            progress("bundle: writing", number, len(rows))
        for name, threshold in thresholds(heads, draft.manifest.fpr_budget).items():
            if name in rows:
                entry = draft.manifest.targets[name]
                entry.detector = rates(entry.detector, threshold)


def _heads(current: Bundle | None, key: GuardKey) -> dict[str, bytes]:
    if current is None:
        return {}
    return {
        name: read_target(current, entry, key)["head.safetensors"]
        for name, entry in current.manifest.targets.items()
    }
