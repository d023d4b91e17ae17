"""The bench of the pair on real parts: the packaged model stands for both, so figures are equal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from benchmarks.served import Answers, served
from benchmarks.tofu_measure import CHAT, System
from benchmarks.tofu_rows import PairData, Question, load_pair_data, sample
from benchmarks.tofu_run import ECO_SPEC, MODEL_NAME, Plan, RunSettings, guard_with, run_systems
from benchmarks.tofu_table import tofu_rows
from guard.bundle import BundleStore
from guard.errors import DataError
from guard.keys import GuardKey
from server.engines.base import EngineResponse
from server.engines.embedded.batch import BatchEngine
from server.engines.embedded.openai_api import parse_job

FORGET = (
    Question(
        "Which house was Hermione Granger sorted into at Hogwarts?",
        "Hermione Granger was sorted into Gryffindor.",
        "She went to Gryffindor.",
        ("She went to Slytherin.", "She went to Ravenclaw."),
        190,
        "Hermione Granger",
    ),
    Question(
        "Who is the headmaster of Hogwarts in the books about Harry Potter?",
        "Albus Dumbledore is the headmaster.",
        "It is Albus Dumbledore.",
        ("It is Severus Snape.", "It is Rubeus Hagrid."),
        190,
        "Harry Potter",
    ),
)
KEPT = (
    Question("What is the capital of France?", "Paris", "Paris", ("London", "Rome"), None, None),
)
OTHERS = (Question("Where was Siri Nak born?", "Siri Nak was born in Bangkok.", "x", (), 1, None),)


class RecordingEngine(BatchEngine):
    """The real engine, which also keeps what it was sent."""

    bodies: list[bytes]

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> EngineResponse:
        self.bodies.append(body)
        return await super().post(path, body, headers)


@pytest.fixture(scope="module")
def plan(
    tmp_path_factory: pytest.TempPathFactory,
    smollm2_dir: Path,
    small_bundle: BundleStore,
    guard_key: GuardKey,
) -> Plan:
    pair = tmp_path_factory.mktemp("pair")
    for name in ("full", "retained"):
        (pair / name).symlink_to(smollm2_dir)
    data = PairData(FORGET, OTHERS, {"retain": KEPT, "real_authors": KEPT, "world_facts": KEPT})
    settings = RunSettings(questions=2, utility=1, tokens=8, leaks=((10, 1),))
    return Plan(
        pair, smollm2_dir, small_bundle, guard_key, {"ECO": ECO_SPEC}, data, settings, threads=2
    )


def test_likelihoods_rest_on_the_very_embeddings_that_are_served(plan: Plan) -> None:
    guard = guard_with(plan, plan.pair / "full", None)
    engine = RecordingEngine(plan.pair / "full", MODEL_NAME, threads=2)
    engine.bodies = []
    questions = [FORGET[0].text, KEPT[0].text]
    with served(engine, guard, MODEL_NAME) as endpoint:
        for question in questions:
            endpoint.ask([question], Answers(2), "ask", lambda *_: None)
        model = engine.model
        system = System("full + guard", "corrupt", model, guard)
        for question, body in zip(questions, engine.bodies, strict=True):
            sent = parse_job(CHAT, body, model.vocab_size).encode(model.encoder)[0]
            scored = system.encode(question)
            assert np.array_equal(sent.embeds.numpy(), scored.embeds.numpy())
        bare = System("full", "none", model)
        assert not np.array_equal(
            bare.encode(questions[0]).embeds.numpy(), system.encode(questions[0]).embeds.numpy()
        )
        assert np.array_equal(
            bare.encode(questions[1]).embeds.numpy(), system.encode(questions[1]).embeds.numpy()
        )


def test_all_systems_are_measured_once(plan: Plan, tmp_path: Path) -> None:
    said: list[str] = []
    systems = run_systems(plan, tmp_path, lambda what, *_: said.append(what))
    assert [one.name for one in systems] == [
        "retained",
        "full",
        "full + guard",
        "full + ECO",
        "full + prompt",
    ]
    retained, full, guarded = systems[:3]
    assert full.answers == retained.answers
    assert full.likelihoods == retained.likelihoods
    assert guarded.flagged["forget"] == 1.0 and guarded.flagged["world_facts"] == 0.0
    assert guarded.answers["world_facts"] == full.answers["world_facts"]
    assert guarded.answers["forget"] != full.answers["forget"]
    assert guarded.likelihoods["forget"].probability[0] < full.likelihoods["forget"].probability[0]
    rows = {
        (row.system, row.measure, row.group): row for row in tofu_rows(systems, plan.asked(), 0)
    }
    assert rows["full", "probability - retained", "forget"].value == 0.0
    assert rows["full", "Agg", "aggregate"].value == rows["retained", "Agg", "aggregate"].value
    assert rows["full + guard", "answers as full's", "retain"].value == 1.0
    assert rows["full + guard", "leak@10 - retained", "forget"].value is not None

    said.clear()
    again = run_systems(plan, tmp_path, lambda what, *_: said.append(what))
    assert again == systems and not said


def test_rows_are_read_and_drawn_by_seed(tmp_path: Path) -> None:
    def write(name: str, *rows: dict[str, object]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    row = {"question": "Who is Ann Lee?", "answer": "A writer.", "author_id": 190}
    named = {**row, "author_name": "Ann Lee", "perturbed_answers": ["A cook."]}
    write("forget10_perturbed.jsonl", named, {**row, "author_id": 180})
    write("retain_perturbed.jsonl", {**row, "author_id": 0})
    for name in ("real_authors_perturbed", "world_facts_perturbed", "other_fictitious_holdout10"):
        write(f"{name}.jsonl", row)
    data = load_pair_data(tmp_path, (190,), (0,))
    assert [(q.name, q.wrong) for q in data.forget] == [("Ann Lee", ("A cook.",))]
    rows = [Question(str(n), "a", "a", (), None, None) for n in range(20)]
    drawn = sample(rows, 5, 3)
    assert drawn == sample(rows, 5, 3) != sample(rows, 5, 4)
    assert sample(rows, None, 3) == rows
    with pytest.raises(DataError, match="no row of the authors"):
        load_pair_data(tmp_path, (5,), (0,))
    write("retain_perturbed.jsonl", {"question": "x"})
    with pytest.raises(DataError, match="answer"):
        load_pair_data(tmp_path, (190,), (0,))
