"""`learn corruption` on the real model: the same result resumed, and nothing kept of the rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from guard.build import load_guard
from guard.bundle import BundleStore
from guard.errors import ConfigError, DataError, TargetNotFoundError
from guard.keys import GuardKey
from guard.learn_corruption import LearnResult, learn_corruption
from guard.learn_inputs import LearnRequest, NamedEngine, RetainedModel
from guard.ledger import Ledger
from guard.prompts import ModelPrompts
from server.engines.embedded.model import EmbeddedModel

TARGET = "harry-potter"


@pytest.fixture(scope="module")
def model(smollm2_dir: Path) -> EmbeddedModel:
    return EmbeddedModel.load(smollm2_dir)


@pytest.fixture
def store(tmp_path: Path, small_bundle: BundleStore, guard_key: GuardKey) -> BundleStore:
    """A copy of the example's bundle, which a test may change."""
    shutil.copytree(small_bundle.root, tmp_path / "bundle")
    return BundleStore(tmp_path / "bundle", guard_key)


@pytest.fixture
def request_(tmp_path: Path, example_dir: Path) -> LearnRequest:
    return LearnRequest(
        TARGET,
        example_dir / "forget.jsonl",
        tmp_path / "out",
        "eco-zo",
        objective="probability",
        sample=3,
        budget=3,
    )


class Counting:
    """The real engine, and how often it was asked; raises at a call if told to."""

    def __init__(self, model: EmbeddedModel, stop_at: int | None = None) -> None:
        self.model, self.stop_at, self.calls = model, stop_at, 0

    def generate(self, *given: Any) -> list[str]:
        return self.model.generate(*given)

    def score_answers(self, *given: Any) -> Any:
        self.calls += 1
        if self.calls == self.stop_at:
            raise KeyboardInterrupt
        return self.model.score_answers(*given)


def learn(
    request: LearnRequest,
    store: BundleStore,
    prompts: ModelPrompts,
    engine: Any,
    scoring: bool = True,
    retained: RetainedModel | None = None,
) -> LearnResult:
    assert store.key is not None
    return learn_corruption(
        request,
        store=store,
        key=store.key,
        prompts=prompts,
        engines=[NamedEngine("one", engine, scoring, "weights")],
        retained=retained,
        ledger=Ledger(store.root / "ledger.jsonl", store.key),
        progress=lambda *_: None,
        note=print,
    )


def test_interrupted_it_resumes_and_writes_the_bundle(
    request_: LearnRequest, store: BundleStore, prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    with store.transaction() as draft:  # a corruption that is easy to beat: none
        draft.manifest.targets[TARGET].corruption["spec"] |= {"strength": 0.0, "frame": 0.0}
    request = replace(request_, methods=("random-noise-first-n",))
    whole = learn(replace(request, out=request.out / "whole", apply=False), store, prompts, model)
    assert whole.version is None
    assert store.current_version() == 2

    with pytest.raises(KeyboardInterrupt):
        learn(request, store, prompts, Counting(model, stop_at=7))
    assert store.current_version() == 2, "nothing is half done"
    result = learn(replace(request, resume=True), store, prompts, Counting(model))
    assert result.trials == whole.trials
    assert result.best == whole.best
    assert result.clean["train"].loss > result.best.train.loss

    entry = store.current().manifest.targets[TARGET]
    assert result.version == store.current_version() == 3
    assert entry.corruption["spec"] == result.best.spec.to_dict()
    assert entry.corruption["learned"]["surrogate"] == "generic"
    assert not any("not learned" in note for note in entry.notes)
    ledger = (store.root / "ledger.jsonl").read_text().splitlines()
    assert json.loads(ledger[-1])["action"] == "learn corruption"
    load_guard(store=store, key=store.key, prompts=prompts, ledger=None)  # it can be served

    silent = Counting(model)
    again = learn(request, store, prompts, silent)
    assert again.best == result.best
    assert silent.calls == 0, "a finished search is not done again"
    assert store.current_version() == 3


def test_no_word_of_the_forget_set_is_kept(
    request_: LearnRequest, store: BundleStore, prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    learn(request_, store, prompts, model)
    written = (request_.out / "trace.jsonl").read_text() + json.dumps(
        store.current().manifest.model_dump(mode="json")
    )
    for line in request_.forget.read_text().splitlines():
        row = json.loads(line)
        for text in row.values():
            assert not isinstance(text, str) or len(text) < 12 or text not in written
    assert "hermione" not in written.casefold()


def test_another_forget_set_is_refused(
    request_: LearnRequest,
    store: BundleStore,
    prompts: ModelPrompts,
    model: EmbeddedModel,
    tmp_path: Path,
) -> None:
    lines = request_.forget.read_text().splitlines()
    new = {"question": "Who wrote about the tide?", "answer": "Ilse Vantorre did."}
    changed = tmp_path / "changed.jsonl"
    changed.write_text("\n".join([*lines[2:], json.dumps(new)]))
    request = replace(request_, forget=changed)
    with pytest.raises(DataError, match=r"2 of its \d+ rows are missing, 1 rows are new"):
        learn(request, store, prompts, model)
    assert not (request.out / "trace.jsonl").exists()
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("\n".join(reversed(lines)))
    other = replace(request_, objective="truth-ratio")
    with pytest.raises(ConfigError, match="perturbed_answer"):  # the rows are the same: it goes on
        learn(replace(other, forget=shuffled), store, prompts, model)
    with pytest.raises(ConfigError, match="perturbed_answer"):
        learn(replace(other, forget=changed, allow_changed=True), store, prompts, model)


def test_a_retained_value_and_a_model_are_aimed_at(
    request_: LearnRequest, store: BundleStore, prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    """Where *retained* is the model itself, no corruption is closest, and the bundle stays."""
    result = learn(
        request_, store, prompts, model, retained=RetainedModel(lambda: model, "the same")
    )
    assert result.source == "retained-model"
    assert result.clean["train"].loss == pytest.approx(0.0, abs=1e-6)
    assert not result.knows
    assert any("does not seem to know" in note for note in result.notes)
    assert result.version is None
    assert store.current_version() == 1


def test_an_engine_that_only_generates(
    request_: LearnRequest, store: BundleStore, prompts: ModelPrompts, model: EmbeddedModel
) -> None:
    with pytest.raises(ConfigError, match="only generates"):
        learn(request_, store, prompts, model, scoring=False)
    engine = Counting(model)
    request = replace(request_, objective=None, joint=True, held_out=0.0)
    request = replace(request, optimizer="nevergrad:OnePlusOne", draws=2)
    result = learn(request, store, prompts, engine, scoring=False)
    assert result.objective == "rouge-l"
    assert engine.calls == 0
    assert "validation" not in result.rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "nobody"}, "no target 'nobody'"),
        ({"dims": 577}, "have 576"),
        ({"optimizer": "nevergrad:No"}, "no optimizer"),
        ({"resume": True}, "no log"),
        ({"surrogate": "chance"}, "multiple-choice"),
        ({"retained_values": {"rouge-l": 0.3}}, "compares probability"),
        ({"retained_values": {"probability": 0.3}, "surrogate": "generic"}, "give one"),
        ({"methods": ("shuffle", "set-noise")}, "--search joint"),
    ],
)
def test_what_does_not_fit_is_said_at_once(
    request_: LearnRequest,
    small_bundle: BundleStore,
    prompts: ModelPrompts,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises((ConfigError, TargetNotFoundError), match=message):
        learn(replace(request_, **changes), small_bundle, prompts, None)
    assert not request_.out.exists()
