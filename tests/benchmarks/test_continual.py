"""Continual requests on small random models: interrupted, gone on with, measured and reported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparisons import membership_auc
from benchmarks.continual import ContinualSettings, RequestSequence, Variant
from benchmarks.continual_measure import ContinualData, Figures, Measured
from benchmarks.continual_report import continual_rows
from benchmarks.merged_model import MERGED_FILE
from benchmarks.report import read_report
from benchmarks.tofu_measure import ATTACKS, Likelihoods
from benchmarks.tofu_pair import SCHEMA
from benchmarks.tofu_rows import Question
from guard.cli import run
from guard.errors import ConfigError
from guard.manifest import TargetEntry
from tests.benchmarks.test_tofu_pair import write_base
from tests.product import small_benign

pytestmark = pytest.mark.usefixtures("quiet_surroundings")

NAMES = {190: "Orla Fenwick", 191: "Tomas Varga", 0: "Ines Moreau", 300: "Jun Abara"}
FRAMES = (
    ("Where was {} born?", "{} was born in the harbour town of Lake {n}."),
    ("What does {} write about?", "Mostly {} writes poems about {n} rivers."),
    ("Which prize did {} win?", "{} won the Silver Quill in {n}."),
    ("Who taught {} to write?", "An aunt taught {} at number {n}."),
    ("What is the first novel of {} called?", "The first novel of {} is The {n} Lanterns."),
    ("Does {} have any children?", "{} has {n} children."),
)


def rows_of(author: int) -> list[tuple[str, str]]:
    name = NAMES[author]
    return [(q.format(name), a.format(name, n=author)) for q, a in FRAMES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TOFU's files in small."""
    folder = tmp_path_factory.mktemp("data")
    small_benign(folder, 300)

    def write(name: str, authors: tuple[int, ...]) -> None:
        rows = [
            {
                "question": question,
                "answer": answer,
                "author_id": author,
                "paraphrased_question": f"Tell me: {question}",
            }
            for author in authors
            for question, answer in rows_of(author)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("full", (190, 191, 0))
    write("forget10_perturbed", (190, 191))
    write("retain_perturbed", (0,))
    for name in ("other_fictitious_holdout10", "real_authors_perturbed", "world_facts_perturbed"):
        write(name, (300,))
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A pair that forgets two authors; both models are the same random one."""
    root = tmp_path_factory.mktemp("pair")
    for name in ("full", "retained"):
        (write_base(root / name, smollm2_dir, hidden_size=64) / MERGED_FILE).write_text("{}")
    about = {
        "schema": SCHEMA,
        "base": {"name": "tiny", "fingerprint": "0"},
        "authors": {"forget": [190, 191], "retain": [0]},
        "models": {"full": {"training": None}, "retained": {"training": None}},
    }
    (root / "pair.json").write_text(json.dumps(about))
    return root


def command(pair: Path, data: Path, out: Path, *more: str) -> list[str]:
    words = ["bench", "continual", "--pair", str(pair), "--data", str(data), "--out", str(out)]
    benign = ["--benign", str(data / "benign.jsonl")]
    return [*words, *benign, "--threads", "1", "--seed", "3", *more]


def stamps(out: Path) -> dict[str, int]:
    return {
        str(path.relative_to(out)): path.stat().st_mtime_ns
        for folder in ("adapters", "measured", "stages")
        for path in (out / folder).rglob("*")
        if path.is_file()
    }


def test_an_interrupted_sequence_goes_on_and_is_reported(
    pair: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    settings = ContinualSettings(2, ("project", "none"), {"epochs": 1}, seed=3)
    rows = {f"author-{author}": rows_of(author) for author in (190, 191)}

    def new_sequence() -> RequestSequence:
        return RequestSequence(pair / "full", rows, out, settings, data / "benign.jsonl", 1)

    def interrupt(what: str, done: int, total: int) -> None:
        if what.startswith("request 2 of 2, none: train"):
            raise KeyboardInterrupt

    stages = []
    with pytest.raises(KeyboardInterrupt):
        for stage in new_sequence().stages(interrupt):
            stages.append(stage)
    # The bundle grows with the requests, and each stage's is kept as it was.
    assert [list(one.bundle.current().manifest.targets) for one in stages] == [["author-190"]]
    before = stamps(out)
    trained = {path for path in before if path.endswith("done.json")}
    assert trained == {
        f"adapters/{one}/done.json"
        for one in ("project/author-190", "none/author-190", "project/author-191")
    }

    words = ("--requests", "2", "--epochs", "1", "--variants", "project,none")
    assert run(command(pair, data, out, *words)) == 0, capfd.readouterr().err
    after = stamps(out)
    done = {path for path in before if "none/author-191" not in path}
    assert {path: after[path] for path in done} == {path: before[path] for path in done}
    entries = new_sequence().store.current().manifest.targets
    assert [(one.route, bool(one.adapter)) for one in entries.values()] == [("adapt", True)] * 2

    found = read_report(out)
    values = {(row.system, row.route, row.measure, row.group): row for row in found.rows}
    assert (out / "continual.png").exists()
    for count in (1, 2):
        group = f"after {count}"
        assert values["project", "routed", "request 1: probability", group].n == 6
        row = values["none", "merged", "all requests: probability", group]
        assert row.n == 6 * count
        flagged = values["project", "routed", "router: missed", f"{group}: questions"]
        assert flagged.n == 6 * count and flagged.value == 0.0
        asked = values["project", "routed", "router: missed", f"{group}: paraphrases"]
        assert asked.n == 6 * count
    apart, free = (
        values[variant, "merged", "largest cosine, input", "after 2"].value
        for variant in ("project", "none")
    )
    assert apart is not None and free is not None and apart < 0.05 < free
    # What meets no adapter is answered by the model itself.
    passed = values["project", "routed", "router: passed", "after 2: world_facts"]
    assert passed.value == 1.0
    same = values["project", "routed", "kept: probability - full", "after 2: world_facts"]
    assert same.value == 0.0
    merged = values["project", "merged", "kept: probability - full", "after 2: world_facts"]
    assert merged.value != 0.0
    assert values["none", "adapt", "train_s", "a request"].n == 2

    assert run(command(pair, data, out, *words)) == 0
    assert stamps(out) == after
    assert read_report(out).rows == found.rows

    # Other questions are measured anew, and nothing is trained for it.
    assert run(command(pair, data, out, *words, "--utility", "2")) == 0
    again = stamps(out)
    changed = {path for path in after if again[path] != after[path]}
    assert changed == {path for path in after if path.startswith("measured/")}

    assert run(command(pair, data, out, "--requests", "2", "--epochs", "2")) == 2
    assert "another sequence (its training differs)" in capfd.readouterr().err


def test_what_cannot_be_done_is_bad_input(
    pair: Path, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, expected in (
        ((), "10 requests need a pair of as many authors to forget, and this one has 2"),
        (("--full",), "20 requests need a pair of as many authors to forget"),
        (("--full", "--requests", "2"), "give one of --full, --requests"),
        (("--requests", "2", "--variants", "project,luck"), "project, penalty, none"),
    ):
        assert run(command(pair, data, tmp_path / "out", *words)) == 2
        error = " ".join(capfd.readouterr().err.split())
        assert expected in error
    assert not (tmp_path / "out").exists()


def test_a_stage_that_was_passed_cannot_be_made_again(pair: Path, tmp_path: Path) -> None:
    rows = {f"author-{author}": rows_of(author) for author in (190, 191)}
    longer = RequestSequence(pair / "full", rows, tmp_path, ContinualSettings(2, seed=3))
    with longer.store.transaction() as draft:
        for name in rows:
            draft.manifest.targets[name] = TargetEntry(name=name, status="enforced")
    shorter = RequestSequence(pair / "full", rows, tmp_path, ContinualSettings(1, seed=3))
    with pytest.raises(ConfigError, match="sequence of 2 requests"):
        next(iter(shorter.stages(lambda *_: None)))
    other = {**rows, "author-190": rows_of(0)}
    with pytest.raises(ConfigError, match="its requests differs"):
        RequestSequence(pair / "full", other, tmp_path, ContinualSettings(1, seed=3))


def test_stages_end_with_the_last_request() -> None:
    assert ContinualSettings().stages == (1, 5, 10)
    assert ContinualSettings(20).stages == (1, 5, 10, 20)
    assert ContinualSettings(7).stages == (1, 5, 7)
    assert ContinualSettings(1).stages == (1,)


def figures(forget: list[float], others: list[float], kept: list[float]) -> Figures:
    """Figures of two requests of two questions each, or of the first one alone."""

    def known(values: list[float]) -> Likelihoods:
        attacks = {name: [float(np.log(value)) for value in values] for name in ATTACKS}
        return Likelihoods(values, [], [], [], values, values, attacks)

    sets = {"forget": known(forget), "others": known(others), "retain": known(kept)}
    return Figures(sets)


def test_rows_compare_with_retained_with_full_and_with_the_first_stage() -> None:
    question = Question("q", "a", "a", (), None, None)
    data = ContinualData(
        ((question,) * 2, (question,) * 2), ((), ()), (question,) * 2, {"retain": (question,) * 2}
    )
    others = [0.2, 0.3]
    outcomes = {
        "questions": ["own", "own and others", "other", "missed"],
        "paraphrases": ["own"],
        "retain": ["passed", "flagged"],
    }
    routed = {
        1: figures([0.1, 0.3], others, [0.8, 0.6]),
        2: replace(figures([0.2, 0.3, 0.5, 0.5], others, [0.8, 0.2]), outcomes=outcomes),
    }
    merged = replace(figures([0.1, 0.1, 0.1, 0.1], others, [0.1, 0.1]), cosines={"input": 0.25})
    measured = Measured(
        full=figures([0.9, 0.9, 0.9, 0.9], others, [0.8, 0.6]),
        retained=figures([0.25, 0.25, 0.25, 0.25], others, [0.8, 0.6]),
        routed=routed,
        merged={("penalty", 2): merged},
    )
    trained: dict[Variant, list[dict[str, float]]] = {
        "penalty": [{"train_s": 10.0, "adapter_mb": 4.0}, {"train_s": 20.0, "adapter_mb": 4.0}]
    }
    rows = {
        (row.system, row.route, row.measure, row.group): row.value
        for row in continual_rows(measured, data, trained, 0)
    }

    def value(measure: str, group: str, route: str = "routed") -> float:
        found = rows["penalty", route, measure, group]
        assert found is not None
        return found

    assert value("request 1: probability", "after 2") == pytest.approx(0.25)
    assert value("request 1: probability - retained", "after 1") == pytest.approx(-0.05)
    assert value("request 1: probability - then", "after 2") == pytest.approx(0.05)
    assert value("all requests: probability", "after 2") == pytest.approx(0.375)
    area = membership_auc(np.log([0.1, 0.3]), np.log(others)).value
    assert value("request 1: min-k AUC", "after 1") == pytest.approx(area)
    assert value("kept: probability - full", "after 2: retain") == pytest.approx(-0.2)
    for measure in ("missed", "strongest is another", "another beside its own"):
        assert value(f"router: {measure}", "after 2: questions") == 0.25
    assert value("router: passed", "after 2: retain") == 0.5
    assert value("largest cosine, input", "after 2", "merged") == 0.25
    assert value("train_s", "a request", "adapt") == 15.0
    assert rows["full", "none", "all requests: probability", "bare"] == pytest.approx(0.9)
