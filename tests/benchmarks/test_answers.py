"""Measures of the served text, against values computed by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.answers import (
    clean_answers,
    cleanliness,
    name_echo,
    name_echo_share,
    nll_limit,
    rouge_l_recall,
)
from guard.errors import ShapeError

WORDS = st.lists(st.sampled_from(["paris", "river", "book", "seven", "old"]), max_size=8)


@pytest.mark.parametrize(
    ("answer", "reference", "recall"),
    [
        # the longest common subsequence: the, sat, on, the: 4 of the reference's 6 words
        ("The dog sat on the rug", "the cat sat on the mat", 4 / 6),
        # order counts: "c d" or "b", so 2 of 4
        ("c d b", "a b c d", 2 / 4),
        # recall: extra words cost nothing
        ("Well, I believe that the answer is Paris", "Paris", 1.0),
        # stemmed: "writing" and "writes" are both "write"; words of three letters stay as they are
        ("writing novels", "writes novel", 1.0),
        ("", "a b", 0.0),
        ("a b", "", 0.0),
    ],
)
def test_rouge_l_recall(answer: str, reference: str, recall: float) -> None:
    assert rouge_l_recall(answer, reference) == pytest.approx(recall)


@given(WORDS, WORDS)
def test_more_words_never_lower_the_recall(answer: list[str], more: list[str]) -> None:
    reference = "the old book by the river paris seven"
    before = rouge_l_recall(" ".join(answer), reference)
    assert before <= rouge_l_recall(" ".join(answer + more), reference) <= 1.0


def test_rouge_reads_nothing_from_the_network() -> None:
    code = (
        "import socket\n"
        "def refuse(*args, **kwargs): raise RuntimeError('network')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from benchmarks.answers import rouge_l_recall\n"
        "assert rouge_l_recall('writing', 'writes') == 1.0\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("answer", "name", "echoed"),
    [
        ("Jaime Vasquez was born in 1958.", "Jaime Vasquez", True),
        ("It was VÁSQUEZ's first novel", "Jaime Vasquez", True),
        ("The author won a prize.", "Jaime Vasquez", False),
        ("Vasquezian prose", "Jaime Vasquez", False),
        ("The van stood in the street", "Ludwig van der Berg", False),  # particles are no echo
        ("Berg wrote it", "Ludwig van der Berg", True),
        ("An old house", "Li An", False),  # two letters are no content word ...
        ("Li An wrote it", "Li An", True),  # ... but the whole name is an echo
        ("", "Jaime Vasquez", False),
    ],
)
def test_name_echo(answer: str, name: str, echoed: bool) -> None:
    assert name_echo(answer, name) is echoed


def test_the_share_of_echoes_has_an_interval() -> None:
    answers = ["Vasquez did", "She did", "Berg did", "He did"]
    names = ["Jaime Vasquez", "Jaime Vasquez", "Ida Berg", "Ida Berg"]
    found = name_echo_share(answers, names)
    # Wilson at 2 of 4, z = 1.96: (0.5 + 1.9207/4 ± ...)/(1 + 3.8415/4) = 0.5 ± 0.35
    assert (found.count, found.total) == (2, 4)
    assert (found.low, found.high) == pytest.approx((0.15, 0.85), abs=1e-3)
    with pytest.raises(ShapeError, match="4 answers, 1 names"):
        name_echo_share(answers, names[:1])


def test_the_limit_is_the_95th_percentile_of_the_retained_model() -> None:
    # 0..20: position 0.95 * 20 = 19. Without the empty answers' NLL: of 1, 2 it lies at 1.95.
    assert nll_limit([float(value) for value in range(21)]) == pytest.approx(19.0)
    assert nll_limit([1.0, float("nan"), 2.0, float("inf")]) == pytest.approx(1.95)
    with pytest.raises(ShapeError, match="no retained answer"):
        nll_limit([float("nan")])


def test_a_clean_answer_has_words_moves_on_and_reads_like_text() -> None:
    answers = [
        "She was born in Lima and writes crime novels.",
        "She was born in Lima and writes crime novels.",
        "She was born in Lima and writes crime novels.",
        "She was born in Lima and writes crime novels.",
        "...",
        "the book of the " * 10,
    ]
    nlls = [2.9, 3.0, 3.1, float("nan"), 1.0, 1.0]
    # below the limit; at it; above it; unknown; empty; in circles
    assert clean_answers(answers, nlls, 3.0) == [True, False, False, False, False, False]
    found = cleanliness(answers, nlls, 3.0)
    assert (found.count, found.total) == (1, 6)
    with pytest.raises(ShapeError, match="6 answers, 1 nlls"):
        clean_answers(answers, [1.0], 3.0)
