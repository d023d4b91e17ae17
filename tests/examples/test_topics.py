"""The topic forget sets: well formed, and without anything that instructs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from classifiers.terms import split_words
from guard.rows import Row, read_rows

TOPICS = Path(__file__).parents[2] / "examples" / "topics"
NAMES = ("biosecurity", "chemical-security", "cyber-offense")

_EVERYDAY_TEXT = """
    acid agent animal antibody attack bacteria base beacon binary bomb cell chemical chemistry code
    computer crime data disease dna drug enzyme exploit explosive file flu gas gene genetics hacker
    hacking hash immunity infection influenza internet kernel key laboratory login malicious
    medicine memory meltdown mosquito network outbreak packet pandemic password pathogen payload
    pesticide plant poison pressure process program protein reaction research safety sample scanner
    security server shell socket software solvent spectre spill stack synthesis target terrorism
    threat toxic toxin treaty vaccine vector virus vulnerability war weapon web windows worm
"""
EVERYDAY = frozenset(_EVERYDAY_TEXT.split())

QUANTITY = re.compile(
    r"\d\s*(?:[kmcnpuµμ]?(?:g|l|m|mol|M)|[kK]?Pa|bar|psi|atm|°|K|C|F|ppm|ppb|rpm|eV|Hz|%|"
    r"percent|grams?|kilograms?|milligrams?|lit(?:er|re)s?|millilit(?:er|re)s?|degrees?|"
    r"seconds?|minutes?|min|hours?|h|days?|weeks?|equivalents?|eq|moles?)(?![A-Za-z0-9])"
    r"|°\s*[CF]\b"
)
INSTRUCTIVE = {
    "code or a command": re.compile(r"[`{}<>$|\\;=]|\s--?\w|\b0x[0-9a-fA-F]+|\(\)"),
    "an address": re.compile(r"://|\bwww\.|\b\d{1,3}(?:\.\d{1,3}){3}\b"),
    "a registry number": re.compile(r"\b\d{2,7}-\d{2}-\d\b"),
    "a sequence": re.compile(r"\b[ACGTU]{8,}\b"),
    "a substitution": re.compile(r"\b[ACDEFGHIKLMNPQRSTVWY]\d{2,4}[ACDEFGHIKLMNPQRSTVWY]\b"),
    "a structure": re.compile(r"[A-Za-z]\(=?[A-Z]|[A-Z]#[A-Z]"),
    "a step": re.compile(
        r"\b(?:step \d|first,|then (?:add|run|heat|mix)|add(?:ing)? the|heat(?:ing)? to|how to)\b",
        re.IGNORECASE,
    ),
}


@pytest.fixture(params=NAMES)
def rows(request: pytest.FixtureRequest) -> list[Row]:
    return read_rows(TOPICS / f"{request.param}.jsonl")


def _folded(text: str) -> tuple[str, ...]:
    return tuple(word for word, _, _ in split_words(text))


def _names_an_everyday_word(term: str) -> bool:
    words = _folded(term)
    forms = {words[0], words[0].removesuffix("s"), words[0].removesuffix("es")}
    return len(words) == 1 and not EVERYDAY.isdisjoint(forms)


def _twice(keys: list[str]) -> list[str]:
    return sorted({key for key in keys if keys.count(key) > 1})


@pytest.mark.parametrize("name", NAMES)
def test_a_line_holds_a_text_or_a_term_and_nothing_else(name: str) -> None:
    for line in (TOPICS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        value = json.loads(line)
        assert set(value) in ({"text"}, {"term"}), line
        (said,) = value.values()
        assert said == " ".join(said.split()), line


def test_there_is_enough_of_each_form(rows: list[Row]) -> None:
    assert 120 <= sum(not row.is_term for row in rows) <= 420
    assert 200 <= sum(row.is_term for row in rows) <= 420


def test_no_text_comes_twice(rows: list[Row]) -> None:
    assert _twice([" ".join(_folded(row.prompt)) for row in rows if not row.is_term]) == []


def test_no_term_comes_twice_whatever_its_hyphens_or_plural(rows: list[Row]) -> None:
    keys = ["".join(_folded(row.prompt)).removesuffix("s") for row in rows if row.is_term]
    assert _twice(keys) == []


def test_a_term_is_short_and_a_text_is_a_sentence(rows: list[Row]) -> None:
    for row in rows:
        if row.is_term:
            assert 1 <= len(_folded(row.prompt)) <= 6, row
        else:
            assert 3 <= len(row.prompt.split()) <= 30, row
            assert row.prompt[-1] in ".?", row


def test_no_everyday_word_is_a_term_by_itself(rows: list[Row]) -> None:
    assert [r.prompt for r in rows if r.is_term and _names_an_everyday_word(r.prompt)] == []


def test_a_term_does_not_rest_on_single_letters_and_numbers(rows: list[Row]) -> None:
    """ "A-230" would be found in "a 230 page book"."""
    for row in rows:
        if row.is_term:
            assert max(len(w) for w in _folded(row.prompt) if not w.isdigit()) >= 2, row


def test_nothing_is_quantified(rows: list[Row]) -> None:
    assert [row.prompt for row in rows if QUANTITY.search(row.prompt)] == []


@pytest.mark.parametrize("what", INSTRUCTIVE)
def test_nothing_instructs(rows: list[Row], what: str) -> None:
    assert [row.prompt for row in rows if INSTRUCTIVE[what].search(row.prompt)] == []


@pytest.mark.parametrize(
    "text", ["Add 10 mg of it.", "Keep it at 37 °C.", "A 5% solution.", "Stir for 2 hours.", "3 mL"]
)
def test_a_quantity_would_be_seen(text: str) -> None:
    assert QUANTITY.search(text.replace("mL", "ml"))


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("code or a command", "nmap -sV host"),
        ("an address", "See 10.0.0.1."),
        ("a registry number", "50-00-0"),
        ("a sequence", "ACGTACGTACGT"),
        ("a substitution", "The change D614G."),
        ("a structure", "CC(=O)O"),
        ("a step", "Then add water."),
    ],
)
def test_an_instruction_would_be_seen(what: str, text: str) -> None:
    assert INSTRUCTIVE[what].search(text)


@pytest.mark.parametrize("term", ["virus", "Viruses", "Passwords", "network"])
def test_an_everyday_word_would_be_seen(term: str) -> None:
    assert _names_an_everyday_word(term)
    assert not _names_an_everyday_word(f"{term} forensics")


def test_the_readme_counts_as_the_files_do() -> None:
    readme = (TOPICS / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        rows = read_rows(TOPICS / f"{name}.jsonl")
        terms = sum(row.is_term for row in rows)
        assert f"| `{name}.jsonl` | {len(rows) - terms} | {terms} |" in readme
