"""TOFU (arXiv 2401.06121) as sets of texts: what to forget, what to keep, and what users send.

Every set that is to be flagged is made of what the targets' learning never saw (the questions
themselves aside): paraphrases, also misspelt, disguised and among other questions; titles without
their author; quotations of answers inside longer prompts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.labelled import Source, json_lines, load_examples
from classifiers.augment import misspell
from guard.errors import DataError

AMONG: Final = 8
"""Questions in a prompt of which one is to be flagged."""

MATE_CHARS: Final = 200

TITLE_FRAMES: Final = (
    "What happens in the book {title}?",
    "who wrote {title}",
    "Summarise the plot of “{title}” for me.",
    "I just finished reading {title}. Any similar novels?",
)
QUOTE_FRAME: Final = (
    "Please continue the following sentence: {quote} ... and explain why it might be interesting "
    "to a reader of poetry."
)
QUOTE_WORDS: Final = (8, 14)

_TITLE = re.compile(r"\"([A-Z][^\"\n]{4,60})\"|(?<!\w)'([A-Z][^'\n]{4,60})'(?!\w)")
_WIDE = str.maketrans({code: code + 0xFEE0 for code in range(0x21, 0x7F)})
_ALIKE = str.maketrans("aeopcxy", "аеорсху")  # Cyrillic letters that look the same


@dataclass(frozen=True, slots=True)
class Fact:
    """A forget row: implements `classifiers.augment.ForgetRow`."""

    prompt: str
    answer: str | None


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts of one kind.

    Attributes:
        name: Of the kind.
        texts: As a user would send them.
        to_flag: True if they are about a target.
    """

    name: str
    texts: tuple[str, ...]
    to_flag: bool


@dataclass(frozen=True, slots=True)
class Tofu:
    """The benchmark's data.

    Attributes:
        forget: Rows of each author to forget.
        retain: Questions about the authors to keep.
        sets: What is asked.
    """

    forget: Mapping[str, tuple[Fact, ...]]
    retain: tuple[str, ...]
    sets: tuple[TextSet, ...]


def load_tofu(folder: Path, seed: int = 0) -> Tofu:
    """Read `folder/tofu` and `folder/general`, and make the sets.

    Raises:
        DataError: If a file is missing or malformed, or there is nothing to forget.
    """
    tofu = folder / "tofu"
    forget: dict[str, list[Fact]] = {}
    retain = []
    for line, row in json_lines(tofu / "full.jsonl"):
        question, answer, split = _fields(row, tofu / "full.jsonl", line)
        if split == "retain":
            retain.append(question)
        else:
            forget.setdefault(f"author-{row.get('author_id')}", []).append(Fact(question, answer))
    if not forget:
        raise DataError("no row is of a split other than `retain`", file=str(tofu / "full.jsonl"))
    rows = [fact for facts in forget.values() for fact in facts]
    paraphrases = _texts(tofu / "forget10_perturbed.jsonl", "paraphrased_question")
    general = _texts(folder / "general" / "general_prompts.jsonl")
    rng = np.random.default_rng(seed)
    sets = [
        TextSet("paraphrases", tuple(paraphrases), True),
        TextSet("questions", tuple(fact.prompt for fact in rows), True),
        TextSet("titles", tuple(title_questions(rows)), True),
        TextSet("quotes", tuple(quotes(rows, rng)), True),
        TextSet(f"among_{AMONG}", tuple(among(paraphrases, general, rng)), True),
        TextSet("misspelt", tuple(misspell(text, rng) for text in paraphrases), True),
        TextSet("disguised", tuple(map(disguise, paraphrases, range(len(paraphrases)))), True),
        TextSet("general", tuple(general), False),
        *(
            TextSet(name, tuple(_texts(tofu / f"{file}.jsonl", field)), False)
            for name, file, field in (
                ("retain_paraphrases", "retain_perturbed", "paraphrased_question"),
                ("other_fictitious", "other_fictitious_holdout10", "question"),
                ("real_authors", "real_authors_perturbed", "question"),
                ("world_facts", "world_facts_perturbed", "question"),
            )
        ),
    ]
    frozen = {name: tuple(facts) for name, facts in forget.items()}
    return Tofu(frozen, tuple(retain), tuple(sets))


def title_questions(rows: Sequence[Fact]) -> list[str]:
    """Ask about each title that stands in quotes in the rows, its author unnamed."""
    found = set()
    for fact in rows:
        for match in _TITLE.finditer(f"{fact.prompt} {fact.answer or ''}"):
            found.add((match[1] or match[2]).rstrip(",."))
    return [
        TITLE_FRAMES[number % len(TITLE_FRAMES)].replace("{title}", title)
        for number, title in enumerate(sorted(found))
    ]


def quotes(rows: Sequence[Fact], rng: np.random.Generator) -> Iterator[str]:
    """Quote 8 to 14 words of each answer that has so many, in a longer prompt."""
    least, most = QUOTE_WORDS
    for fact in rows:
        words = (fact.answer or "").split()
        if len(words) <= least:
            continue
        size = int(rng.integers(least, min(most, len(words)) + 1))
        first = int(rng.integers(0, len(words) - size + 1))
        yield QUOTE_FRAME.replace("{quote}", " ".join(words[first : first + size]))


def among(
    texts: Sequence[str], others: Sequence[str], rng: np.random.Generator, count: int = AMONG
) -> Iterator[str]:
    """Put each text at a random place among short others, `count` together."""
    short = [text for text in others if len(text) <= MATE_CHARS] or list(others)
    for text in texts:
        found = [short[int(n)] for n in rng.integers(len(short), size=count - 1)]
        found.insert(int(rng.integers(count)), text)
        yield "\n".join(found)


def disguise(text: str, number: int) -> str:
    """Write a text in full width, with zero-width signs, or with letters of another script."""
    if number % 3 == 0:
        return text.translate(_WIDE)
    if number % 3 == 1:
        return "\u200b".join(text)
    return text.translate(_ALIKE)


def _texts(file: Path, field: str | None = None) -> list[str]:
    return [example.text for example in load_examples(Source(str(file), field)).examples]


def _fields(row: Mapping[str, Any], file: Path, line: int) -> tuple[str, str, str]:
    found = []
    for name in ("question", "answer", "split"):
        value = row.get(name)
        if not isinstance(value, str) or not value.strip():
            raise DataError("expected a string with text", file=str(file), line=line, field=name)
        found.append(value)
    return found[0], found[1], found[2]
