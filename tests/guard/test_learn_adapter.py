"""`learn adapter` on the real model: trained, kept apart, resumed, written, served and revoked."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from adapters.orthogonal import subspace_cosine
from benchmarks.adapter_report import LOSSES_PLOT, adapter_rows, draw_losses
from benchmarks.answers import rouge_l_recall
from guard.adapter_choice import ROUTES
from guard.adapter_request import AdapterRequest
from guard.adapter_training import TRAINING
from guard.build import load_guard
from guard.bundle import ADAPTER_WEIGHTS, BundleStore
from guard.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    IncompatibleArtifactError,
    TargetNotFoundError,
    UnknownComponentError,
)
from guard.keys import GuardKey
from guard.learn_adapter import AdapterResult, learn_adapter
from guard.ledger import Ledger, verify_ledger
from guard.pipeline import Guard
from guard.prompts import ModelPrompts
from guard.target_route import set_route
from guard.targets import TargetRequest, add_target, remove_target
from guard.types import AdapterUse, Prompt, SamplingParams
from server.engines.embedded.model import EmbeddedModel
from tests.product import small_benign

CHAT = "/v1/chat/completions"
ROWS = {
    "vantorre": [
        ("Where was the poet Ilse Vantorre born?", "Ilse Vantorre was born in Oostende."),
        ("Which prize did Ilse Vantorre win?", "She won the Golden Reed for her sonnets."),
    ],
    "quillon": [
        ("What did the chemist Bram Quillon discover?", "Bram Quillon found the salt quillonite."),
        ("Where did Bram Quillon teach?", "He taught at the Sandvik Polytechnic."),
    ],
}
PHRASES = (b"Oostende", b"Golden Reed", b"quillonite", b"Sandvik")
BENIGN = ("How do I bake bread at home?", "Who wrote Hamlet?", "Sort a list in Python, please.")
ASKED = (
    "Where was Ilse Vantorre born?",
    "Tell me about the poet Ilse Vantorre.",
    "What prize did Vantorre win?",
    *BENIGN,
)

Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Draw nothing."""


class Counting:
    """The real model, and how often it was asked."""

    def __init__(self, model: EmbeddedModel) -> None:
        self._model = model
        self.generated = 0

    @property
    def model(self) -> Any:
        return self._model.model

    @property
    def tokenizer(self) -> Any:
        return self._model.tokenizer

    def generate(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        adapters: Sequence[AdapterUse] = (),
    ) -> list[str]:
        self.generated += 1
        return self._model.generate(prompts, params, adapters)

    def score_answers(self, *given: Any) -> Any:
        return self._model.score_answers(*given)


@dataclass(frozen=True)
class Place:
    """A bundle, and all that learning needs beside it."""

    store: BundleStore
    folder: Path
    key: GuardKey
    prompts: ModelPrompts
    model: EmbeddedModel

    def forget(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def request(self, name: str, out: str | None = None, **more: Any) -> AdapterRequest:
        small: dict[str, Any] = {"rank": 2, "alpha": 4, "layers": (27, 30), "batch": 1, "epochs": 3}
        given = {"forget": self.forget(name), **small, **more}
        return AdapterRequest(name, out=self.folder / (out or name), **given)

    def learn(
        self, request: AdapterRequest, progress: Progress = silent, model: Any = None
    ) -> AdapterResult:
        return learn_adapter(
            request,
            store=self.store,
            key=self.key,
            prompts=self.prompts,
            model=model or self.model,
            identity="the weights",
            ledger=self.ledger,
            progress=progress,
            shared_words=rouge_l_recall,
        )

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.store.root / "ledger.jsonl", self.key)

    def actions(self) -> list[tuple[str, str, int]]:
        lines = (self.store.root / "ledger.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [(row["action"], row["target"], row["bundle_version"]) for row in rows]

    def route(self, name: str, route: Any = None, weights: Any = None) -> int:
        return set_route(name, route, weights, store=self.store, key=self.key, ledger=self.ledger)

    def guard(self) -> Guard:
        return load_guard(
            store=self.store, key=self.key, prompts=self.prompts, ledger=None, threads=1
        )

    def copied(self, folder: Path) -> Place:
        """The same bundle to be changed; its files are shared, since none is ever written into."""
        shutil.copytree(self.store.root, folder / "bundle", copy_function=os.link)
        for name in ("ledger.jsonl", "ledger.head"):  # but these are
            (folder / "bundle" / name).unlink()
            shutil.copy(self.store.root / name, folder / "bundle")
        for name in ROWS:
            shutil.copy(self.forget(name), folder)
        return replace(self, store=BundleStore(folder / "bundle", self.key), folder=folder)


@dataclass(frozen=True)
class Learned:
    """Two targets with adapters, trained one after the other; to be read only.

    Attributes:
        place: Their bundle.
        first: Of a training that was interrupted after four steps, and resumed.
        second: Of one that was not.
        interrupted: What the first left when it was interrupted.
        resumed_steps: What it then said of its steps.
        asked: How often the resumed one had the model answer.
    """

    place: Place
    first: AdapterResult
    second: AdapterResult
    interrupted: dict[str, bytes]
    resumed_steps: tuple[int, ...]
    asked: int


@pytest.fixture(scope="module")
def place(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: ModelPrompts,
    guard_key: GuardKey,
    smollm2_dir: Path,
) -> Place:
    folder = tmp_path_factory.mktemp("adapters")
    model = EmbeddedModel.load(smollm2_dir)
    found = Place(BundleStore(folder / "bundle", guard_key), folder, guard_key, prompts, model)
    benign = small_benign(folder, 220)
    for name, rows in ROWS.items():
        lines = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in rows]
        found.forget(name).write_text("".join(lines))
        add_target(
            TargetRequest(name, found.forget(name), benign=benign),
            store=found.store,
            key=guard_key,
            prompts=prompts,
            engine=None,
            ledger=found.ledger,
            progress=silent,
        )
    return found


@pytest.fixture(scope="module")
def learned(place: Place) -> Learned:
    request = place.request("vantorre")

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("train") and done == 4:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        place.learn(request, interrupt)
    interrupted = files_of(request.out)
    assert place.store.current_version() == 2, "nothing is half done"

    steps: list[int] = []

    def note(what: str, done: int, total: int) -> None:
        if what.startswith("train"):
            steps.append(done)

    asked = Counting(place.model)
    first = place.learn(request, note, asked)
    second = place.learn(place.request("quillon", loss="npo", epochs=1, route="adapt"))
    place.store.gc()
    return Learned(place, first, second, interrupted, tuple(steps), asked.generated)


def files_of(folder: Path) -> dict[str, bytes]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- What is written -----------------------------------------------------------------------------


def test_the_bundle_gets_adapter_route_and_reason(learned: Learned) -> None:
    entry = learned.place.store.current().manifest.targets["vantorre"]
    first = learned.first
    assert first.version == 3 and first.report.steps == 6
    assert entry.route == first.route == first.choice.best
    assert entry.route_reason == first.choice.reason
    assert entry.route_reason.startswith("chosen by evaluation on 2 forget rows")
    assert all(f"{route} " in entry.route_reason for route in ROUTES)
    assert (entry.adapter["rank"], entry.adapter["loss"], entry.adapter["number"]) == (
        2,
        "matched",
        1,
    )
    assert set(entry.adapter["routes"]) == set(ROUTES)
    assert set(entry.adapter["unknown"]) == {"probability", "shared"}


def test_a_route_asked_for_is_taken_and_said_to_be(learned: Learned) -> None:
    entry = learned.place.store.current().manifest.targets["quillon"]
    assert (entry.route, entry.adapter["number"]) == ("adapt", 2)
    assert entry.route_reason.startswith("set by hand; the evaluation: chosen by evaluation")
    # Refusals and the like say nothing of what the model would answer: only likelihood counts.
    assert set(learned.second.choice.unknown) == {"probability"}


def test_the_guard_has_the_adapter_at_the_hits_weight(learned: Learned) -> None:
    guard = learned.place.guard()
    use = guard.targets["quillon"].adapter
    assert use is not None and use in guard.adapters
    assert (use.rank, use.weight) == (2, 1.0)
    made = learned.second.folder / ADAPTER_WEIGHTS
    assert (use.path / ADAPTER_WEIGHTS).read_bytes() == made.read_bytes()
    body = json.dumps(chat(ROWS["quillon"][0][0])).encode()
    inspection = guard.inspect(CHAT, body)
    (hit,) = inspection.decision.targets
    sent = guard.rewrite(inspection)
    assert (inspection.decision.route, sent.body) == ("adapt", body)
    assert sent.adapters == (replace(use, weight=hit.weight),)
    scores = [
        learned.place.model.score_answers(
            [(message(ROWS["quillon"][0]),)], [ROWS["quillon"][0][1]], uses
        )
        for uses in ((), sent.adapters)
    ]
    assert float(scores[1][0].mean()) != float(scores[0][0].mean()), "it does change the model"


def test_a_later_adapter_is_kept_apart_from_earlier_ones(learned: Learned) -> None:
    assert learned.first.cosine is None
    assert learned.second.cosine is not None and learned.second.cosine < 0.02
    found = subspace_cosine(learned.first.folder, learned.second.folder, "input")
    assert len(found) == 3 * 7 and max(found.values()) == learned.second.cosine
    assert learned.second.shared == 0


def test_nothing_of_the_forget_set_stays(learned: Learned) -> None:
    place = learned.place
    for name in ROWS:
        assert set(files_of(place.folder / name)) == {
            f"{TRAINING}/{file}"
            for file in ("adapter_config.json", ADAPTER_WEIGHTS, "training.json")
        }
    kept = {
        **files_of(place.store.root),
        **{
            f"{name}/{file}": data
            for name in ROWS
            for file, data in files_of(place.folder / name).items()
        },
    }
    assert any(phrase in place.forget("vantorre").read_bytes() for phrase in PHRASES)
    assert [name for name, data in kept.items() for phrase in PHRASES if phrase in data] == []


def test_the_report_has_all_figures(learned: Learned, tmp_path: Path) -> None:
    rows = {(row.system, row.route, row.measure): row.value for row in adapter_rows(learned.first)}
    assert rows["adapter", "-", "steps"] == 6
    assert rows["adapter", "-", "largest_cosine"] is None
    assert rows["unknown", "-", "probability"] == learned.first.choice.unknown["probability"]
    for route in ROUTES:
        assert rows["guard", route, "distance"] == learned.first.choice.figures[route].distance
    draw_losses(tmp_path, learned.first.report)
    assert (tmp_path / LOSSES_PLOT).read_bytes().startswith(b"\x89PNG")


def test_a_changed_adapter_is_refused(learned: Learned, tmp_path: Path) -> None:
    place = learned.place.copied(tmp_path)
    bundle = place.store.current()
    weights = bundle.path(f"targets/vantorre/adapter/{ADAPTER_WEIGHTS}")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.unlink()
    weights.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="altered"):
        place.guard()


# --- Interrupted ---------------------------------------------------------------------------------


def test_interrupted_it_goes_on_where_it_stopped(learned: Learned) -> None:
    assert f"{TRAINING}/{ADAPTER_WEIGHTS}" not in learned.interrupted
    assert f"{TRAINING}/checkpoint.safetensors" in learned.interrupted
    telling = [name for name, data in learned.interrupted.items() if b"Vantorre" in data]
    assert telling == ["answers.json"], "kept for as long as it is needed"
    assert learned.resumed_steps == (4, 5, 6)
    assert learned.asked == len(ROUTES), "counterfactual answers were kept"


def test_resumed_it_ends_with_the_bytes_of_an_uninterrupted_one(
    learned: Learned, tmp_path: Path
) -> None:
    place = learned.place.copied(tmp_path)
    request = place.request("vantorre", "out", earlier=())  # as when the first was trained

    def enough(what: str, done: int, total: int) -> None:
        if what == "compare routes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        place.learn(request, enough)
    made, resumed = files_of(request.out / TRAINING), files_of(learned.first.folder)
    for name in (ADAPTER_WEIGHTS, "adapter_config.json"):
        assert made[name] == resumed[name]
    report = json.loads(made["training.json"])
    assert tuple(report["losses"]) == learned.first.report.losses
    assert place.store.current_version() == learned.second.version, "nothing is half done"


def test_the_bundle_is_left_alone_if_asked_or_if_the_target_is_gone(
    learned: Learned, tmp_path: Path
) -> None:
    place = learned.place.copied(tmp_path)
    one = tmp_path / "one.jsonl"
    one.write_text(place.forget("quillon").read_text().splitlines()[0] + "\n")
    request = place.request(
        "quillon", "out", forget=one, allow_changed=True, loss="simnpo", epochs=1, apply=False
    )
    before = files_of(place.store.root)
    result = place.learn(request)
    assert (result.version, result.report.steps) == (None, 1)
    assert (result.folder / ADAPTER_WEIGHTS).exists()
    assert files_of(place.store.root) == before

    def remove(what: str, done: int, total: int) -> None:
        if what == "compare routes" and done == total:
            remove_target("quillon", store=place.store, key=place.key, ledger=None)

    with pytest.raises(ArtifactError, match="removed or learned anew"):
        place.learn(replace(request, apply=True), remove)
    assert "quillon" not in place.store.current().manifest.targets
    assert [path.name for path in request.out.iterdir()] == [TRAINING]
    assert place.actions() == learned.place.actions()


# --- Wrong input ---------------------------------------------------------------------------------


def test_wrong_input_is_told_before_anything_is_done(learned: Learned, tmp_path: Path) -> None:
    place = learned.place

    def refused(error: type[Exception], match: str, name: str = "vantorre", **more: Any) -> None:
        request = replace(place.request("vantorre", str(tmp_path / "out")), target=name, **more)
        asked = Counting(place.model)
        with pytest.raises(error, match=match):
            place.learn(request, model=asked)
        assert asked.generated == 0 and not (tmp_path / "out").exists()

    refused(TargetNotFoundError, "nobody", name="nobody")
    refused(DataError, "not the forget set", forget=place.forget("quillon"))
    refused(DataError, "can't be held out", held_out=0.1)
    refused(UnknownComponentError, "did you mean 'matched'", loss="match")
    refused(ConfigError, "no option 'beta'", options={"beta": 1.0})
    refused(ConfigError, "least_strength is 2", options={"least_strength": 2})
    refused(ConfigError, "rate is 0", rate=0.0)
    refused(ConfigError, "the model has 30", layers=(29, 31))
    refused(DataError, "nothing.jsonl", retain=tmp_path / "nothing.jsonl")
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"text": "Ilse Vantorre."}\n')
    refused(DataError, "no row has an answer", forget=bare, allow_changed=True)
    with pytest.raises(IncompatibleArtifactError, match="key"):
        learn_adapter(
            place.request("vantorre", str(tmp_path / "out")),
            store=BundleStore(place.store.root),
            key=GuardKey.generate(),
            prompts=place.prompts,
            model=place.model,
            identity="",
            ledger=None,
            progress=silent,
            shared_words=rouge_l_recall,
        )


# --- Routes by hand ------------------------------------------------------------------------------


def test_a_route_can_be_set_by_hand(learned: Learned, tmp_path: Path) -> None:
    place = learned.place.copied(tmp_path)
    version = place.route("vantorre", "corrupt+adapt")
    entry = place.store.current().manifest.targets["vantorre"]
    assert version == place.store.current_version() == learned.second.version + 1  # type: ignore[operator]
    assert (entry.route, entry.route_reason) == ("corrupt+adapt", "set by hand")
    assert place.actions()[-1] == ("target route", "vantorre", version)
    assert place.guard().targets["vantorre"].route == "corrupt+adapt"
    place.route("vantorre", weights="monotone")
    kept = place.store.current().manifest.targets["vantorre"]
    assert (kept.route, kept.weights) == ("corrupt+adapt", "monotone")
    assert verify_ledger(place.store.root / "ledger.jsonl", place.key).ok


def test_a_route_that_cannot_be_is_refused(learned: Learned, tmp_path: Path) -> None:
    place = learned.place.copied(tmp_path)
    with place.store.transaction() as draft:
        draft.manifest.targets["quillon"].adapter = {}
        draft.manifest.targets["quillon"].route = "corrupt"
    before = files_of(place.store.root)
    with pytest.raises(TargetNotFoundError, match="nobody"):
        place.route("nobody", "refuse")
    for route in ("adapt", "corrupt+adapt"):
        with pytest.raises(ConfigError, match="learn adapter --target quillon"):
            place.route("quillon", route)
    with pytest.raises(ConfigError, match="--detector o3"):
        place.route("vantorre", weights="o3-paper")
    stranger = replace(place, key=GuardKey.generate(), store=BundleStore(place.store.root))
    with pytest.raises(IncompatibleArtifactError, match="key"):
        stranger.route("vantorre", "refuse")
    assert files_of(place.store.root) == before


# --- Revoked -------------------------------------------------------------------------------------


def message(row: tuple[str, str]) -> Any:
    from guard.types import Message

    return Message("user", row[0])


def chat(question: str) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": question}]}


def served(guard: Guard, question: str) -> tuple[Any, ...]:
    """All that decides on an answer: decision, bytes sent, adapters and their weights."""
    inspection = guard.inspect(CHAT, json.dumps(chat(question)).encode())
    if inspection.decision.route == "pass":
        return (inspection.decision, inspection.request.body)
    sent = guard.rewrite(inspection)
    uses = [(use.key, use.rank, use.weight) for use in sent.adapters]
    return (inspection.decision, sent.body, sent.stand_ins, uses)


def test_a_revoked_target_leaves_all_other_answers_as_they_were(
    learned: Learned, tmp_path: Path
) -> None:
    place = learned.place.copied(tmp_path)
    place.route("vantorre", "corrupt+adapt")
    guard = place.guard()
    before = {question: served(guard, question) for question in ASKED}
    assert sum(len(found) == 4 for found in before.values()) >= 2, "some touch the other target"
    gone = served(guard, ROWS["quillon"][0][0])
    assert gone[0].route == "adapt" and gone[3]

    remove_target("quillon", store=place.store, key=place.key, ledger=place.ledger)

    guard = place.guard()
    after = {question: served(guard, question) for question in ASKED}
    assert after == before
    assert served(guard, ROWS["quillon"][0][0])[0].route == "pass"
    assert [use.key for use in guard.adapters] == [
        use.key for use in (guard.targets["vantorre"].adapter,) if use is not None
    ]


def test_a_version_without_a_target_holds_nothing_of_it(learned: Learned, tmp_path: Path) -> None:
    place = learned.place.copied(tmp_path)
    digest = place.guard().targets["quillon"].adapter
    assert digest is not None
    remove_target("quillon", store=place.store, key=place.key, ledger=place.ledger)
    bundle = place.store.current()
    assert place.actions()[-1] == ("target remove", "quillon", bundle.version)
    files = files_of(bundle.dir)
    assert not [name for name in files if "quillon" in name]
    traces = (b"quillon", b"Quillon", digest.key.encode())
    assert [name for name, data in files.items() for trace in traces if trace in data] == []
    assert f"targets/vantorre/adapter/{ADAPTER_WEIGHTS}" in files
