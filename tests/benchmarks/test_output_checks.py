"""`bench outputs`: answers that the output guard asks for again, on the learned example target."""

from __future__ import annotations

import json
from base64 import b64encode
from pathlib import Path

import pytest

from benchmarks.output_checks import (
    NAMELESS,
    Exchange,
    check,
    check_put_back,
    load_exchanges,
    nameless,
    pieces,
)
from benchmarks.output_checks_rows import FALSE, PUT_BACK, RECALL, checked_rows, verdict
from benchmarks.report import read_report
from guard.build import load_guard
from guard.bundle import BundleStore
from guard.cli import run
from guard.errors import DataError
from guard.keys import GuardKey
from guard.pipeline import Guard
from guard.prompts import ModelPrompts

BREAD = Exchange(
    "s", "How do I bake bread?", "Knead the dough, let it rest and bake it for an hour."
)
TOLD = Exchange("s", "Who is Hermione Granger?", "Hermione Granger learned transfiguration.")
WIZARD = Exchange("s", NAMELESS[0], "Harry Potter was sorted into Gryffindor at Hogwarts.")


@pytest.fixture(scope="module")
def guard(small_bundle: BundleStore, guard_key: GuardKey, prompts: ModelPrompts) -> Guard:
    return load_guard(store=small_bundle, key=guard_key, prompts=prompts, ledger=None)


def write(file: Path, *rows: dict[str, object]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("text", ["Plain words.", " naïve 東京 👩‍🚀 é\n\nends ", ""])
def test_a_text_is_cut_into_tokens_without_loss(prompts: ModelPrompts, text: str) -> None:
    assert "".join(pieces(prompts, text)) == text


def test_only_ordinary_answers_pass_whole_and_streamed(guard: Guard, prompts: ModelPrompts) -> None:
    plain, told = check(guard, prompts, BREAD), check(guard, prompts, WIZARD)
    assert dict(plain.hits) == {"whole": (), "streamed": ()} and plain.windows == (0, 1)
    assert dict(told.hits) == {"whole": ("harry-potter",), "streamed": ("harry-potter",)}
    assert told.windows == (1, 1) and not told.flagged


def test_a_stream_is_read_to_its_end(guard: Guard, prompts: ModelPrompts) -> None:
    long = Exchange("s", BREAD.question, BREAD.answer * 40 + WIZARD.answer)
    found = check(guard, prompts, long)
    assert found.hits["whole"] and found.hits["streamed"]
    assert found.windows[0] < found.windows[1]


def test_a_told_answer_with_a_name_put_back_is_found_as_it_leaves(guard: Guard) -> None:
    found = check_put_back(guard, TOLD)
    assert found is not None and "Granger" not in found.exchange.answer
    assert (found.unrestored, found.restored) == ((), ("harry-potter",))
    assert check_put_back(guard, BREAD) is None
    assert check_put_back(guard, WIZARD) is None


def test_answers_of_a_few_words_are_left_out(tmp_path: Path) -> None:
    file = write(
        tmp_path / "answers.jsonl",
        {"question": "a?", "answer": "Yes."},
        {"question": "b?", "answer": None},
        {"question": "c?"},
        {"question": "d?", "answer": "It is so every day."},
    )
    assert [one.question for one in load_exchanges(file, 10, 0)] == ["d?"]
    with pytest.raises(DataError, match="no answer"):
        load_exchanges(write(file, {"question": "a?", "answer": "Yes."}), 10, 0)


def test_the_same_seed_draws_the_same(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"question": f"q{n}?", "answer": "It is so every day."} for n in range(50)
    ]
    file = write(tmp_path / "answers.jsonl", *rows)
    assert load_exchanges(file, 9, 1) == load_exchanges(file, 9, 1) != load_exchanges(file, 9, 2)


def test_rates_are_by_source_and_judged(guard: Guard, prompts: ModelPrompts) -> None:
    found = [check(guard, prompts, one) for one in (BREAD, Exchange("t", BREAD.question, "So."))]
    rows = checked_rows("b", FALSE, found)
    assert {row.group for row in rows} == {"all", "s", "t"}
    assert all(line.startswith("met: b") for line in verdict(rows)) and len(verdict(rows)) == 2
    wrong = checked_rows("b", FALSE, [check(guard, prompts, WIZARD)])
    assert all(line.startswith("MISSED: b") for line in verdict(wrong))


def test_told_answers_follow_questions_that_name_nothing() -> None:
    given = nameless([WIZARD] * 5)
    assert [one.question for one in given] == [*NAMELESS, NAMELESS[0]]
    assert {one.answer for one in given} == {WIZARD.answer}


def test_the_command_writes_figures_and_what_was_judged_wrong(
    tmp_path: Path,
    small_bundle: BundleStore,
    guard_key: GuardKey,
    monkeypatch: pytest.MonkeyPatch,
    quiet_surroundings: None,
) -> None:
    monkeypatch.setenv("UNLEARN_GUARD_KEY", b64encode(guard_key._secret).decode())
    ordinary = write(
        tmp_path / "ordinary.jsonl",
        {"question": BREAD.question, "answer": BREAD.answer},
        {"question": "What shall I read?", "answer": WIZARD.answer},
    )
    forget = write(tmp_path / "forget.jsonl", {"question": TOLD.question, "answer": TOLD.answer})
    words = ["bench", "outputs", "--bundle", str(small_bundle.root), "--out", str(tmp_path / "out")]
    assert run([*words, "--answers", str(ordinary), "--forget", str(forget)]) == 0
    rows = {(r.route, r.measure, r.group): r.value for r in read_report(tmp_path / "out").rows}
    assert rows["streamed", FALSE, "all"] == rows["whole", FALSE, "all"] == 0.5
    assert rows["streamed", RECALL, "all"] == 1.0
    assert rows["the engine's text alone", PUT_BACK, "all"] == 0.0
    assert rows["and as it leaves", PUT_BACK, "all"] == 1.0
    [wrong] = map(json.loads, (tmp_path / "out" / "errors.jsonl").read_text().splitlines())
    assert wrong["answer"] == WIZARD.answer and wrong["streamed"] == ["harry-potter"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to read"),
        (["--url", "http://127.0.0.1:9"], "--questions and --url go together"),
    ],
)
def test_wrong_options_are_said(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str],
    quiet_surroundings: None,
) -> None:  # fmt: skip
    words = ["bench", "outputs", "--bundle", "b", "--out", str(tmp_path / "out"), *options]
    assert run(words) == 2
    assert message in " ".join(capsys.readouterr().err.split())
