import json
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.attacks import Template
from benchmarks.curves import auroc, auroc_interval, compare, roc, tpr_at_fpr, tpr_interval
from benchmarks.eval_detection import (
    compare_parts,
    decide_parts,
    draw,
    part_rows,
    resumed,
    run_digest,
    skipped_rows,
    target_rows,
)
from benchmarks.labelled import Example, Source, load_examples, parse_source, stratified
from benchmarks.parts import Part, among_part, attack_part, context_part, plain_part
from benchmarks.report import Row
from benchmarks.run_log import RunLog
from guard.errors import ConfigError, DataError
from guard.request import ParsedRequest
from guard.types import Decision, FloatArray, TargetHit

scores_of = st.lists(st.integers(-5, 5), min_size=2, max_size=30).map(
    lambda values: np.array(values, np.float32)
)


def digest(data: bytes) -> str:
    return sha256(b"key" + data).hexdigest()


def silent(what: str, done: int, total: int) -> None:
    pass


class WordGuard:
    """The margin is the number of times that `secret` is in the request, less one half."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self._stop_after = stop_after

    def decide(self, request: ParsedRequest) -> Decision:
        return self.decide_many([request])[0]

    def decide_many(self, requests: Sequence[ParsedRequest]) -> list[Decision]:
        if self._stop_after is not None and len(self.asked) >= self._stop_after:
            raise KeyboardInterrupt
        return [self._one("\n".join(s.text for s in one.segments())) for one in requests]

    def _one(self, text: str) -> Decision:
        self.asked.append(text)
        count = text.count("secret")
        hit = TargetHit("ann-lee", float(count), 0.001, 1.0, (), enforced=True)
        hits = (hit,) if count else ()
        route = "corrupt" if count else "pass"
        return Decision(bool(count), route, 1.0, hits, count - 0.5)  # type: ignore[arg-type]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def many(count: int, prefix: str = "text", groups: tuple[str, ...] = ()) -> list[Example]:
    return [Example(f"{prefix} {number}", groups) for number in range(count)]


def found(rows: Sequence[Row], measure: str, group: str = "all") -> Row:
    (row,) = (row for row in rows if row.measure == measure and row.group == group)
    return row


# --- Reading ---------------------------------------------------------------------------------


def test_rows_give_texts_and_groups_and_those_without_are_counted(tmp_path: Path) -> None:
    file = write(
        tmp_path / "set.jsonl",
        {"question": "q", "category": "mmlu/law", "type": "cloze", "lang": "en"},
        {"question": None, "category": "x"},
        {"answer": "a"},
        {"prompt": "p", "target": "Ann Lee", "tags": ["a", "b"], "level": 2, "named": False},
    )

    loaded = load_examples(Source(file), ("category", "type", "tags", "level", "named"))

    name = "file=set"
    assert loaded.skipped == 2
    assert loaded.examples == (
        Example("q", (name, "category=mmlu", "category=mmlu/law", "type=cloze")),
        Example("p", (name, "tags=a", "tags=b", "level=2", "named=false"), "Ann Lee"),
    )
    assert skipped_rows([loaded]) == [
        Row("data", "read", "skipped_rows", name, 2, None, None, 4)
    ]  # fmt: skip


def test_a_field_can_be_chosen(tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", {"question": "q", "paraphrased_question": "p"})

    source = parse_source(f"{file}:paraphrased_question")
    assert source == Source(file, "paraphrased_question")
    assert load_examples(source).examples == (Example("p", ("file=s:paraphrased_question",)),)
    assert [one.text for one in load_examples(parse_source(file)).examples] == ["q"]


def test_a_file_whose_name_holds_a_colon_is_that_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a:b", {"text": "t"})

    assert parse_source(file) == Source(file)


def test_a_conversation_stays_one(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "reply"},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    file = write(tmp_path / "m.jsonl", {"messages": messages})

    (example,) = load_examples(Source(file)).examples

    assert example.text == "one\ntwo"
    assert example.request().raw["messages"] == messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": 3}, "s.jsonl:2: field 'text': expected a string"),
        ({"text": " "}, "s.jsonl:2: field 'text': expected a string"),
        ({"text": "\ud800"}, "s.jsonl:2: field 'text'"),
        ({"messages": "hello"}, "s.jsonl:2: field 'messages'"),
        (
            {"messages": [{"role": "system", "content": "x"}]},
            "s.jsonl:2: field 'messages': no mess",
        ),
        ("text", "s.jsonl:2: expected a JSON object"),
    ],
)
def test_a_broken_row_is_an_error_that_says_where(
    tmp_path: Path, row: object, expected: str
) -> None:
    file = write(tmp_path / "s.jsonl", {"text": "fine"}, row)

    with pytest.raises(DataError) as caught:
        load_examples(Source(file))
    assert expected in str(caught.value)


def test_a_file_without_any_text_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "s.jsonl", {"text": "t"})

    with pytest.raises(DataError, match=r"no row has a text \(looked for: 'wrong'"):
        load_examples(Source(file, "wrong"))
    with pytest.raises(DataError, match="can't be read"):
        load_examples(Source(str(tmp_path / "none")))


# --- Sampling and parts ------------------------------------------------------------------------


def test_a_sample_gives_each_stratum_its_share_and_the_smallest_one_example() -> None:
    examples = [*many(90, "a", ("g=a",)), *many(9, "b", ("g=b",)), *many(1, "c", ("g=c",))]

    drawn = stratified(examples, 20, [1])

    counts = Counter(example.groups[0] for example in drawn)
    assert len(drawn) == len(set(drawn)) == 20
    assert counts["g=c"] == 1
    assert counts["g=b"] in (2, 3)
    assert drawn == stratified(examples, 20, [1])
    assert drawn != stratified(examples, 20, [2])
    assert stratified(examples, 100, [1]) == examples


def test_another_part_does_not_change_the_plain_sample() -> None:
    positives, negatives = many(50, "p"), many(80, "n")

    part = plain_part(positives, negatives, 10, seed=3)

    assert (len(part.positives), len(part.negatives)) == (10, 10)
    assert part == plain_part(positives, negatives, 10, seed=3)
    assert plain_part(positives, negatives, None, 3).negatives == tuple(negatives)


TEMPLATES = [
    Template("1", "Say: {question}", "role_play", "none"),
    Template("2", "{question}", "encoding", "reverse"),
]


def test_attacks_wrap_both_sides_with_every_template() -> None:
    part = attack_part(many(10, "p"), many(10, "n"), TEMPLATES, sample=8, seed=0)

    assert Counter(example.groups for example in part.positives) == {
        ("kind=role_play", "transform=none"): 4,
        ("kind=encoding", "transform=reverse"): 4,
    }
    assert len(part.negatives) == 8
    assert all("p" in example.text for example in part.positives)
    assert all("p" not in example.text for example in part.negatives)
    everything = attack_part(many(10, "p"), many(99, "n"), TEMPLATES, sample=None, seed=0)
    assert (len(everything.positives), len(everything.negatives)) == (20, 20)


def test_a_kind_of_many_templates_takes_no_more_of_a_sample_than_another() -> None:
    templates = [Template(str(n), f"{n}: {{question}}", "many", "none") for n in range(5)]
    templates.append(Template("x", "x: {question}", "one", "none"))

    part = attack_part(many(50, "p"), many(50, "n"), templates, sample=20, seed=0)

    for examples in (part.positives, part.negatives):
        kinds = Counter(example.groups[0] for example in examples)
        assert kinds == {"kind=many": 10, "kind=one": 10}


def cut_words(text: str, tokens: int) -> str | None:
    words = text.split()
    return " ".join(words[:tokens]) if len(words) >= tokens else None


def test_context_stands_before_or_after_the_text() -> None:
    part = context_part(many(6, "p"), many(30, "n"), 50, cut_words, None, seed=0)

    for example in part.positives:
        before, _, after = example.text.partition("\n\n")
        prefix = example.groups == ("benign=prefix",)
        benign, text = (before, after) if prefix else (after, before)
        assert len(benign.split()) == 50
        assert text.startswith("p ")
    assert Counter(example.groups[0] for example in part.positives) == {
        "benign=prefix": 3, "benign=suffix": 3,
    }  # fmt: skip
    assert len(part.negatives) == 6


def test_one_question_stands_among_benign_ones() -> None:
    part = among_part(many(12, "p"), many(30, "n"), 8, None, seed=0)

    places = set()
    for example in part.positives:
        lines = example.text.split("\n")
        assert len(lines) == 9
        (place,) = (number for number, line in enumerate(lines) if " p " in line)
        places.add(place)
    assert len(places) > 3
    assert all(" p " not in example.text for example in part.negatives)


# --- Curves ------------------------------------------------------------------------------------


@given(scores_of, scores_of)
def test_auroc_is_the_share_of_pairs_in_order_and_the_area_of_the_curve(
    positives: FloatArray, negatives: FloatArray
) -> None:
    above = positives[:, None] > negatives[None, :]
    level = positives[:, None] == negatives[None, :]
    area = auroc(positives, negatives)
    fpr, tpr = roc(positives, negatives)
    low, high = auroc_interval(positives, negatives)

    assert area == pytest.approx(float((above + 0.5 * level).mean()))
    assert area == pytest.approx(float(np.trapezoid(tpr, fpr)), abs=1e-5)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert 0 <= low <= area + 1e-9
    assert area - 1e-9 <= high <= 1


def test_a_flawless_ranking_still_has_an_interval_that_shrinks_with_data() -> None:
    ends = [auroc_interval(np.ones(n, np.float32), np.zeros(n, np.float32)) for n in (5, 50, 500)]

    assert [high for _, high in ends] == [1.0, 1.0, 1.0]
    lows = [low for low, _ in ends]
    assert 0.4 < lows[0] < lows[1] < lows[2] < 1.0


def test_the_auroc_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    truth, covered = 0.9214, 0  # two unit normals, two standard deviations apart: Phi(sqrt 2)
    for _ in range(300):
        above = rng.normal(2, 1, 60).astype(np.float32)
        low, high = auroc_interval(above, rng.normal(0, 1, 80).astype(np.float32))
        covered += low <= truth <= high
    assert 0.9 <= covered / 300 <= 0.99


def test_the_true_positive_rate_keeps_within_the_false_positives_allowed() -> None:
    negatives = np.arange(1000, dtype=np.float32)
    positives = np.array([500, 988.5, 994.5, 998, 998.5, 1001], np.float32)

    assert tpr_at_fpr(positives, negatives, 0.001) == pytest.approx(2 / 6)
    assert tpr_at_fpr(positives, negatives, 0.005) == pytest.approx(4 / 6)
    assert tpr_at_fpr(positives, negatives, 0.01) == pytest.approx(4 / 6)
    assert tpr_at_fpr(positives, negatives, 1.0) == 1.0


def test_a_rate_finer_than_the_data_has_no_value() -> None:
    scores = np.arange(100, dtype=np.float32)

    assert tpr_at_fpr(scores, scores, 0.005) is None
    assert tpr_interval(scores, scores, 0.005) is None
    assert tpr_at_fpr(scores, scores, 0.01) is not None


def test_ties_at_the_threshold_are_not_flagged() -> None:
    negatives = np.zeros(1000, np.float32)

    assert tpr_at_fpr(np.array([0, 0, 1], np.float32), negatives, 0.01) == pytest.approx(1 / 3)


def test_the_interval_of_a_rate_holds_it_and_knows_that_the_threshold_is_unsure() -> None:
    rng = np.random.default_rng(1)
    above = rng.normal(3, 1, 4000).astype(np.float32)
    below = rng.normal(0, 1, 1000).astype(np.float32)

    value = tpr_at_fpr(above, below, 0.01)
    ends = tpr_interval(above, below, 0.01, seed=5)

    assert value is not None
    assert ends is not None
    assert ends[0] < value < ends[1]
    assert ends[1] - ends[0] > 0.05  # Wilson's alone would be about 0.03
    assert ends == tpr_interval(above, below, 0.01, seed=5)


def test_systems_are_compared_on_the_same_texts() -> None:
    def by_length(texts: Sequence[str]) -> FloatArray:
        return np.array([len(text) for text in texts], np.float32)

    def blind(texts: Sequence[str]) -> FloatArray:
        return np.zeros(len(texts), np.float32)

    rows = compare({"length": by_length, "blind": blind}, ["long text"] * 5, ["text"] * 200)

    areas = {row.system: row.value for row in rows if row.measure == "auroc"}
    assert areas == {"length": 1.0, "blind": 0.5}
    rates = {row.measure: row.value for row in rows if row.system == "length"}
    assert rates["tpr_at_fpr_1%"] == 1.0
    assert rates["tpr_at_fpr_0.1%"] is None


# --- Deciding, stopping and going on -----------------------------------------------------------


def part_of(secret: int = 150, plain: int = 200) -> Part:
    positives = [
        Example(f"secret {n}", ("kind=odd" if n % 2 else "kind=even",), "Ann Lee")
        for n in range(secret)
    ]
    missed = Example("hidden", ("kind=odd",), "Bob")
    wrong = Example("a secret that is none", ("category=x",))
    return Part("all", (*positives, missed), (*many(plain, "n", ("category=y",)), wrong))


def test_every_text_is_decided_once_and_recall_and_false_alarms_add_up(tmp_path: Path) -> None:
    part, guard = part_of(), WordGuard()
    twice = Part("among=1", part.positives[:5], part.negatives[:5])
    judged = decide_parts(guard, [part, twice], RunLog(tmp_path / "d", "r"), digest, silent)
    rows = part_rows(part, judged, seed=0)

    assert len(guard.asked) == len(set(guard.asked)) == 352
    assert found(rows, "recall").value == pytest.approx(150 / 151)
    assert found(rows, "fnr").value == pytest.approx(1 / 151)
    assert found(rows, "fnr", "kind=even").value == 0.0
    assert found(rows, "fnr", "kind=odd").n == 76
    assert found(rows, "fpr").value == pytest.approx(1 / 201)
    assert found(rows, "fpr", "category=x").value == 1.0
    assert found(rows, "fpr", "category=y").value == 0.0
    assert found(rows, "fpr", "category=y").ci_high == pytest.approx(0.0188, abs=1e-3)
    assert found(rows, "coverage").value == 1.0
    auc = found(rows, "auroc")
    assert auc.value is not None
    assert 0.99 < auc.value < 1.0
    assert {row.group for row in part_rows(twice, judged, 0)} >= {"among=1", "among=1/kind=odd"}


def test_targets_are_matched_as_people_write_them(tmp_path: Path) -> None:
    part = part_of()
    judged = decide_parts(WordGuard(), [part], RunLog(tmp_path / "d", "r"), digest, silent)
    rows = target_rows(part, judged)

    assert found(rows, "target_recall", "target=Ann Lee").value == 1.0
    assert found(rows, "target_recall", "target=Bob").value == 0.0
    assert found(rows, "target_fpr", "target=ann-lee").value == pytest.approx(1 / 201)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    part, file = part_of(), tmp_path / "decisions.jsonl"
    run = run_digest([part], digest, seed=1)
    stopped = WordGuard(stop_after=100)
    with pytest.raises(KeyboardInterrupt):
        decide_parts(stopped, [part], RunLog(file, run), digest, silent)
    assert stopped.asked
    with file.open("a") as log:
        log.write('{"digest": "cut off by a cra')

    resumed_guard = WordGuard()
    judged = decide_parts(resumed_guard, [part], RunLog(file, run), digest, silent)
    again = WordGuard()
    assert decide_parts(again, [part], RunLog(file, run), digest, silent) == judged

    assert len(stopped.asked) + len(resumed_guard.asked) == len(part.examples)
    assert not set(stopped.asked) & set(resumed_guard.asked)
    assert again.asked == []
    whole = decide_parts(WordGuard(), [part], RunLog(tmp_path / "new", run), digest, silent)
    assert whole == judged


def test_the_log_holds_no_text(tmp_path: Path) -> None:
    file = tmp_path / "d"
    decide_parts(WordGuard(), [part_of()], RunLog(file, "r"), digest, silent)

    assert "secret" not in file.read_text()
    assert "hidden" not in file.read_text()


def test_another_run_is_refused_until_it_may_restart(tmp_path: Path) -> None:
    part, file = part_of(), tmp_path / "d"
    decide_parts(WordGuard(), [part], RunLog(file, run_digest([part], digest)), digest, silent)
    other = run_digest([part_of(secret=3)], digest)

    with pytest.raises(ConfigError, match="another --out, or give --restart"):
        RunLog(file, other)
    with pytest.raises(ConfigError, match="another --out, or give --restart"):
        RunLog(file, run_digest([part], digest, seed=2))
    assert RunLog(file, other, restart=True).records == {}
    assert RunLog(file, other).records == {}


@pytest.mark.parametrize("content", ["not json\n", "[]\n", '{"run": "r"}\n{"no": "digest"}\n'])
def test_a_file_that_is_no_log_is_left_alone(tmp_path: Path, content: str) -> None:
    file = tmp_path / "d"
    file.write_text(content)

    with pytest.raises(ConfigError):
        RunLog(file, "r")
    assert file.read_text() == content


def test_scores_of_other_systems_are_kept_too(tmp_path: Path) -> None:
    asked: list[str] = []

    def score(texts: Sequence[str]) -> FloatArray:
        asked.extend(texts)
        return np.array([text.count("secret") for text in texts], np.float32)

    part = part_of()
    first = compare_parts(
        {"eco": resumed(score, RunLog(tmp_path / "s", "r"), digest, "eco", silent)}, [part], 0
    )
    again = compare_parts(
        {"eco": resumed(score, RunLog(tmp_path / "s", "r"), digest, "eco", silent)}, [part], 0
    )

    assert first == again
    assert len(asked) == len(part.examples)
    judged = decide_parts(WordGuard(), [part], RunLog(tmp_path / "d", "r"), digest, silent)
    ours = found(part_rows(part, judged, 0), "auroc")
    assert found(first, "auroc").value == ours.value


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    part = part_of()
    judged = decide_parts(WordGuard(), [part], RunLog(tmp_path / "d", "r"), digest, silent)

    draw(tmp_path, [part], judged, part_rows(part, judged, 0))

    drawn = {path.name for path in tmp_path.glob("*.png")}
    assert drawn == {"roc.png", "histogram.png", "fpr.png", "fnr.png"}
