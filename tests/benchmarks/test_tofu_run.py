"""The bench of the pair on real parts: the packaged model stands for both, so figures are equal."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.served import Answers, served
from benchmarks.tofu_measure import CHAT, Encoded, Likelihoods, Scorer, System
from benchmarks.tofu_rows import PairData, Question, load_pair_data, sample
from benchmarks.tofu_run import ECO_SPEC, MODEL_NAME, Plan, RunSettings, guard_with, run_systems
from benchmarks.tofu_table import tofu_rows
from guard.bundle import BundleStore
from guard.errors import ConfigError, DataError
from guard.keys import GuardKey
from guard.types import AdapterUse, TargetRoute
from server.engines.base import EngineResponse
from server.engines.embedded.batch import BatchEngine
from server.engines.embedded.openai_api import parse_job
from tests.server.random_lora import write_lora

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
    uses: list[tuple[AdapterUse, ...]]

    async def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str],
        adapters: Sequence[AdapterUse] = (),
    ) -> EngineResponse:
        self.bodies.append(body)
        self.uses.append(tuple(adapters))
        return await super().post(path, body, headers, adapters)


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


def with_adapters(store: BundleStore, root: Path, key: GuardKey) -> BundleStore:
    """Copy a bundle, and give its targets small adapters in a version of its own."""
    shutil.copytree(store.root, root)
    copy = BundleStore(root, key)
    adapter = write_lora(root.parent / "lora", spread=0.02)
    with copy.transaction() as draft:
        for entry in draft.manifest.targets.values():
            for file in adapter.iterdir():
                draft.write(f"{entry.prefix}adapter/{file.name}", file.read_bytes())
            entry.adapter, entry.route = {"rank": 2}, "adapt"
    return copy


@pytest.fixture(scope="module")
def adapted(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    root = tmp_path_factory.mktemp("adapted") / "bundle"
    return replace(plan, store=with_adapters(plan.store, root, plan.key))


def served_and_scored(
    plan: Plan, route: TargetRoute, questions: Sequence[str]
) -> list[tuple[Encoded, Encoded, Encoded]]:
    """For each question what the engine was sent, what is scored, and what a bare model reads."""
    guard = guard_with(plan, plan.pair / "full", None, route)
    engine = RecordingEngine(plan.pair / "full", MODEL_NAME, threads=2)
    engine.bodies, engine.uses = [], []
    with served(engine, guard, MODEL_NAME) as endpoint:
        for question in questions:
            endpoint.ask([question], Answers(2), "ask", lambda *_: None)
        model = engine.model
        sent = [
            Encoded(parse_job(CHAT, body, model.vocab_size).encode(model.encoder)[0], uses)
            for body, uses in zip(engine.bodies, engine.uses, strict=True)
        ]
        systems = System("full + guard", route, model, guard), System("full", "none", model)
        scored, bare = ([one.encode(question) for question in questions] for one in systems)
    return list(zip(sent, scored, bare, strict=True))


def same_prompt(one: Encoded, other: Encoded) -> bool:
    return np.array_equal(one.prompt.embeds.numpy(), other.prompt.embeds.numpy())


@pytest.mark.parametrize("route", ["corrupt", "adapt", "corrupt+adapt"])
def test_likelihoods_rest_on_the_very_embeddings_and_adapters_that_are_served(
    adapted: Plan, route: TargetRoute
) -> None:
    asked = served_and_scored(adapted, route, [FORGET[0].text, KEPT[0].text])
    for sent, scored, _ in asked:
        assert same_prompt(sent, scored) and sent.adapters == scored.adapters
    (_, flagged, bare), (_, kept, bare_kept) = asked
    assert same_prompt(flagged, bare) == (route == "adapt")
    assert same_prompt(kept, bare_kept) and kept.adapters == ()
    if route == "corrupt":
        assert flagged.adapters == ()
    else:
        (use,) = flagged.adapters
        assert 0 < use.weight <= 1.2 and use.rank == 2


def test_scores_of_other_adapters_or_weights_are_never_taken_for_one_another(
    adapted: Plan,
) -> None:
    (use,) = guard_with(adapted, adapted.pair / "full", None, "adapt").adapters
    engine = BatchEngine(adapted.pair / "full", MODEL_NAME, threads=2)
    with served(engine, None, MODEL_NAME):
        scorer = Scorer()
        pairs = [(FORGET[0].text, FORGET[0].answer), (FORGET[0].text, FORGET[0].answer)]
        found = [
            scorer.scores(
                System("x", "merged", engine.model, adapters=uses), pairs, "x", lambda *_: None
            )
            for uses in ((), (use,), (replace(use, weight=0.5),), ())
        ]
    means = [float(scores[0].logprobs.mean()) for scores in found]
    assert len({round(mean, 4) for mean in means}) == 3 and means[0] == means[3]
    for first, second in found:
        assert first is second


def test_routes_of_adapters_are_measured_where_all_targets_have_them(
    adapted: Plan, plan: Plan, tmp_path: Path
) -> None:
    said: list[str] = []
    small = replace(adapted, specs={}, settings=replace(adapted.settings, leaks=()))
    bare = replace(small, store=plan.store)
    assert bare.without_adapter() and not small.without_adapter()
    before = run_systems(bare, tmp_path, lambda *_: None)
    systems = run_systems(small, tmp_path, lambda what, *_: said.append(what))
    assert [(one.name, one.route) for one in systems] == [
        ("retained", "none"),
        ("full", "none"),
        ("full + guard", "corrupt"),
        ("full + guard: adapt", "adapt"),
        ("full + guard: corrupt+adapt", "corrupt+adapt"),
        ("full + prompt", "prompt"),
    ]
    # Adapters are nothing to the other systems: their figures are those of the version before.
    assert [*systems[:3], systems[-1]] == before
    assert {what.split(":")[1] for what in said} == {" adapt", " corrupt+adapt"}
    full, adapted_alone, both = systems[1], systems[3], systems[4]
    for one in (adapted_alone, both):
        assert one.flagged["forget"] == 1.0 and one.flagged["world_facts"] == 0.0
        assert one.answers["world_facts"] == full.answers["world_facts"]
        assert one.likelihoods["forget"] != full.likelihoods["forget"]
    assert both.likelihoods["forget"] != adapted_alone.likelihoods["forget"]
    with pytest.raises(ConfigError, match="adapter"):
        guard_with(bare, bare.pair / "full", None, "adapt")


def close(one: Likelihoods, other: Likelihoods) -> bool:
    """The same but for rounding: sums over threads may come in another order."""
    values = [one, other]
    plain = [
        [getattr(found, name) for name in Likelihoods.__slots__ if name != "attacks"]
        for found in values
    ]
    attacks = [[found.attacks[name] for name in sorted(found.attacks)] for found in values]
    pairs = [*zip(*plain, strict=True), *zip(*attacks, strict=True)]
    return all(a == pytest.approx(b, rel=1e-4, abs=1e-5) for a, b in pairs)


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
    for kind, found in full.likelihoods.items():
        assert close(found, retained.likelihoods[kind]), kind
    assert guarded.flagged["forget"] == 1.0 and guarded.flagged["world_facts"] == 0.0
    assert guarded.answers["world_facts"] == full.answers["world_facts"]
    assert guarded.answers["forget"] != full.answers["forget"]
    assert guarded.likelihoods["forget"].probability[0] < full.likelihoods["forget"].probability[0]
    rows = {
        (row.system, row.measure, row.group): row for row in tofu_rows(systems, plan.asked(), 0)
    }
    assert rows["full", "probability - retained", "forget"].value == pytest.approx(0.0, abs=1e-5)
    whole = rows["retained", "Agg", "aggregate"].value
    assert rows["full", "Agg", "aggregate"].value == pytest.approx(whole, abs=1e-4)
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
