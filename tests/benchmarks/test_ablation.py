from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ablation import (
    FULL,
    PART_NAMES,
    PARTS,
    ExactIndex,
    Part,
    Plan,
    ProjectedEncoder,
    _Bench,
    make_ground,
    mask,
    run_ablation,
)
from benchmarks.labelled import Source, load_examples
from benchmarks.report import Row
from benchmarks.tofu import (
    AMONG,
    Fact,
    Tofu,
    disguise,
    load_tofu,
    quotes,
    title_questions,
)
from classifiers.encoder import OnnxEncoder
from classifiers.export import export_encoder
from classifiers.fit_fusion import Batch
from classifiers.lexicon import Lexicon
from classifiers.lexicon_index import LexiconIndex
from guard.errors import DataError
from guard.normalise import normalise
from tests.benchmarks.tiny_tofu import write_tiny_tofu

PLAN = Plan(threads=2, generated=2)


def silent(what: str, done: int, total: int) -> None:
    """No progress."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_tofu(tmp_path_factory.mktemp("tofu") / "data")


@pytest.fixture(scope="module")
def data(folder: Path) -> Tofu:
    return load_tofu(folder)


@pytest.fixture(scope="module")
def benign(folder: Path) -> list[str]:
    return [one.text for one in load_examples(Source(str(folder / "benign.jsonl"))).examples]


@pytest.fixture(scope="module")
def bench(
    data: Tofu, benign: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[_Bench]:
    yield _Bench(data, benign, PLAN, tmp_path_factory.mktemp("bench"), silent)


def part(name: str) -> Part:
    return next(one for one in PARTS if one.name == name)


def rates(rows: list[Row], system: str) -> dict[str, float]:
    return {r.group: r.value or 0.0 for r in rows if r.system == system and r.measure != "auroc"}


# --- Texts -----------------------------------------------------------------------------------


def test_sets_hold_what_they_say(data: Tofu, folder: Path) -> None:
    assert load_tofu(folder) == data, "the same seed makes the same texts"
    assert load_tofu(folder, seed=1) != data
    sets = {one.name: one for one in data.sets}
    assert len(data.forget) == 3 and data.retain
    assert {name for name, one in sets.items() if one.to_flag} == {
        "paraphrases", "questions", "titles", "quotes", "among_8", "misspelt", "disguised",
    }  # fmt: skip
    assert len(sets["paraphrases"].texts) == 24, "rows without a paraphrase are left out"
    assert len(sets["questions"].texts) == sum(map(len, data.forget.values()))
    for text, plain in zip(sets["among_8"].texts, sets["paraphrases"].texts, strict=True):
        assert plain in text and text.count("\n") >= AMONG - 1
    assert sets["misspelt"].texts != sets["paraphrases"].texts


def test_titles_are_asked_about_without_their_author() -> None:
    facts = [
        Fact("Who wrote 'The Long Shore'?", "Ann Example wrote \"The Long Shore,\" and 'Ashes'."),
        Fact("What's Ann's book?", None),
    ]
    asked = title_questions(facts)
    assert [("The Long Shore" in text, "Ashes" in text) for text in asked] == [
        (False, True),
        (True, False),
    ]
    assert not any("Ann" in text for text in asked)


def test_quotes_are_eight_to_fourteen_words_of_an_answer() -> None:
    answer = " ".join(f"word{n}" for n in range(30))
    rng = np.random.default_rng(0)
    found = list(quotes([Fact("?", answer)] * 60 + [Fact("?", "too short")], rng))
    assert len(found) == 60
    sizes = {sum(word.startswith("word") for word in text.split()) for text in found}
    assert min(sizes) >= 8 and max(sizes) <= 14 and len(sizes) > 3
    for text in found:
        quoted = [word for word in text.split() if word.startswith("word")]
        assert " ".join(quoted) in answer


def test_the_normaliser_undoes_every_disguise() -> None:
    text = "Where was Joanna Example born?"
    for number in range(3):
        worn = disguise(text, number)
        assert worn != text
        assert normalise(worn).text.casefold() == text.casefold()


@pytest.mark.parametrize(
    "line", ['{"question": "Q?", "answer": "A"}', '{"question": " ", "answer": "A", "split": "x"}']
)
def test_a_row_that_lacks_a_field_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "tofu").mkdir()
    (tmp_path / "tofu" / "full.jsonl").write_text(line)
    with pytest.raises(DataError, match=r"full\.jsonl"):
        load_tofu(tmp_path)


# --- Parts -----------------------------------------------------------------------------------


def test_a_window_is_encoded_once_and_as_the_detector_would(
    encoder_dir: Path, benign: list[str]
) -> None:
    ground, plain = make_ground(encoder_dir, benign, PLAN, silent)
    text = "The keeper counted every ship. Then she climbed down the stairs."
    source = OnnxEncoder(encoder_dir, threads=1, cache_size=0)
    assert isinstance(ground.encoder, ProjectedEncoder)
    wanted = ground.encoder._space.project(source.states(source.segments(text)))
    assert np.allclose(ground.encoder.states(ground.encoder.segments(text)), wanted, atol=1e-4)
    before = len(ground.encoder._rows)
    ground.encoder.states(ground.encoder.segments(text))
    plain.encoder.states(plain.encoder.segments(text))
    assert len(ground.encoder._rows) == before == len(source.segments(text))
    assert plain.encoder.segments(text) == source.windows(text)
    owners = plain.background.segments.owners
    counts = [len(source.windows(t)) for t in plain.background.texts]
    assert np.bincount(owners).tolist() == counts


def test_an_exact_index_reads_words_as_they_are_written() -> None:
    lexicon = Lexicon({("joanna", "hartwellson"): 9.0}, frozenset({("joanna", "hartwellson")}))
    found = {}
    for kind in (LexiconIndex, ExactIndex):
        index = kind([lexicon], lambda word: False, ["there"])
        texts = ("Joanna Hartwellson's", "Joanna Hartwelson", "J0anna Hartwells0n")
        found[kind] = [bool(index.read(text).of(0)) for text in texts]
    assert found == {LexiconIndex: [True, True, True], ExactIndex: [True, False, False]}
    assert (
        ExactIndex([lexicon], lambda word: False).restore_vowels("jnn hrtwllsn ws brn hr") is None
    )


def test_masked_evidence_gets_no_weight(bench: _Bench) -> None:
    rows = bench.fusion(part("rows"))
    topic = bench.fusion(part("topic"))
    both = bench.fusion(part("all-but-lexicon"))
    cosine_terms, topic_terms = (0, 1, 2, 9, 10, 12), (3, 11)
    assert all(abs(rows.weights[n]) < 1e-6 for n in cosine_terms)
    assert all(abs(topic.weights[n]) < 1e-6 for n in topic_terms)
    assert all(abs(both.weights[n]) < 1e-6 for n in (*cosine_terms, *topic_terms))
    assert any(topic.weights[n] > 0 for n in cosine_terms)
    assert any(weight > 0 for weight in both.weights)


def test_masking_leaves_the_evidence_itself_alone() -> None:
    batch = Batch(np.ones((2, 7), np.float32), np.arange(2), "benign")
    (masked,) = mask([batch], (0, 3))
    assert masked.evidence.tolist() == [[0, 1, 1, 0, 1, 1, 1]] * 2
    assert (batch.evidence == 1).all()


def test_each_part_is_left_out_of_what_is_learned(bench: _Bench) -> None:
    full = bench.learn(FULL)
    names = bench.learn(part("full-names"))
    parts = bench.learn(part("parts"))
    bare = bench.learn(part("all-but-rows-and-topic"))
    assert all(a.lexicon.primary and len(a.grams) for a in full.artifacts)
    for whole, one in zip(full.artifacts, names.artifacts, strict=True):
        assert not one.lexicon.primary
        assert set(one.lexicon.weights) == set(whole.lexicon.weights) - whole.lexicon.primary
        assert np.array_equal(one.head, whole.head), "the head is the full detector's"
    for whole, one in zip(full.artifacts, parts.artifacts, strict=True):
        assert set(one.lexicon.weights) == whole.lexicon.primary & set(whole.lexicon.weights)
    for one in bare.artifacts:
        assert not one.lexicon.weights and not len(one.grams) and one.fusion is not None
    alone = bench.learn(part("neighbours"))
    heads = zip(full.artifacts, alone.artifacts, strict=True)
    assert not any(np.array_equal(one.head, other.head) for one, other in heads)


# --- The whole -------------------------------------------------------------------------------


def test_an_ablation_judges_every_system_on_every_set(data: Tofu, benign: list[str]) -> None:
    chosen = ("normaliser", "quotations", "all-but-lexicon", "retain")
    told: list[str] = []
    rows = run_ablation(data, benign, chosen, PLAN, lambda what, done, total: told.append(what))

    systems = dict.fromkeys(row.system for row in rows if row.measure != "auroc")
    assert set(systems) == {
        "full", "without normaliser", "without quotations", "with retain data", "lexicon only",
    }  # fmt: skip
    for system in systems:
        assert set(rates(rows, system)) == {one.name for one in data.sets}
    for row in rows:
        assert row.value is not None and row.ci_low is not None and row.ci_high is not None
        assert row.ci_low <= row.value <= row.ci_high and row.n > 0
    full = rates(rows, "full")
    assert full["paraphrases"] > 0.8 and full["disguised"] > 0.8 and full["quotes"] > 0.8
    assert rates(rows, "without normaliser")["disguised"] < full["disguised"] - 0.2
    assert rates(rows, "without quotations")["quotes"] <= full["quotes"]
    areas = {r.system: r.value for r in rows if r.group == "paraphrases against general"}
    assert set(areas) == {"cosine alone, int8", "topic score alone, int8"}
    assert min(area or 0 for area in areas.values()) > 0.8
    assert "ablation: systems" in told


def test_a_float32_encoder_is_another_one_and_agrees_nearly(
    data: Tofu, benign: list[str], encoder_dir: Path, tmp_path: Path
) -> None:
    wanted = ("paraphrases", "general", "retain_paraphrases", "other_fictitious")
    sets = [replace(s, texts=s.texts[:8]) for s in data.sets if s.name in wanted]
    small = Tofu(dict(list(data.forget.items())[:1]), data.retain, tuple(sets))
    rows = run_ablation(small, benign, ("int8",), PLAN, silent)
    areas = {r.system: r.value or 0.0 for r in rows if r.group == "paraphrases against general"}
    assert len(areas) == 4 and min(areas.values()) > 0.8
    assert abs(areas["cosine alone, int8"] - areas["cosine alone, float32"]) < 0.1

    exact = OnnxEncoder(export_encoder(tmp_path, precision="float32"), threads=1, cache_size=0)
    rounded = OnnxEncoder(encoder_dir, threads=1, cache_size=0)
    assert exact.source_hash != rounded.source_hash, "targets of one do not fit the other"
    states = [e.states(e.windows("Where was Joanna Example born?")) for e in (exact, rounded)]
    distance = np.linalg.norm(states[0] - states[1]) / np.linalg.norm(states[0])
    assert 0.001 < distance < 0.2


def test_joint_is_one_target_of_all_authors(bench: _Bench, data: Tofu) -> None:
    assert list(bench.targets()) == list(data.forget)
    joint = _Bench(data, [], Plan(joint=True), Path(), silent).targets()
    (rows,) = joint.values()
    assert len(rows) == sum(map(len, data.forget.values()))


def test_parts_have_names_of_their_own() -> None:
    assert len(set(PART_NAMES)) == len(PARTS) == len({one.system for one in PARTS})
