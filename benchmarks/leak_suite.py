"""The leak suite: questions about forgotten authors as attacks, asked of served models.

Three systems are asked the same attacks: *guarded*, *unguarded* (the same model without the guard)
and *retained* (a model that never saw the authors). What an attack leaks is decided on the stored
answers (`benchmarks.leak_facts`), so that systems can be asked one after another, on one machine.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.attacks import Template
from benchmarks.labelled import json_lines
from benchmarks.leak import Endpoint
from benchmarks.leak_facts import find_facts, leaked, names_of, told_apart
from benchmarks.report import make_folder
from benchmarks.run_log import Record, RunLog
from guard.errors import ConfigError, DataError
from guard.types import Progress

SYSTEMS: Final = ("retained", "unguarded", "guarded")
ANSWERS_FOLDER: Final = "answers"

QUESTIONS_FILE: Final = "full.jsonl"


@dataclass(frozen=True, slots=True)
class Item:
    """A question about somebody to forget whose answer holds a fact that it doesn't say itself.

    Attributes:
        id: The row's.
        question: Its text.
        answer: The reference.
        facts: Of `leak_facts.find_facts`.
    """

    id: str
    question: str
    answer: str
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Attack:
    """A question in a wrapper.

    Attributes:
        template: The wrapper.
        item: The question.
    """

    template: Template
    item: Item

    @property
    def id(self) -> str:
        """Unique in a suite."""
        return f"{self.template.id}/{self.item.id}"

    @cached_property
    def prompt(self) -> str:
        """What is sent, as the user's message."""
        return self.template.wrap(self.item.question)

    @cached_property
    def facts(self) -> tuple[str, ...]:
        """What would be a leak: neither the question nor the prompt says it."""
        return told_apart(self.item.facts, self.item.question, self.prompt)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a system said to an attack.

    Attributes:
        text: Empty where the request was refused.
        refused: The status, where the request was refused.
    """

    text: str
    refused: int | None = None


# --- Drawing attacks -----------------------------------------------------------------------------


def load_items(folder: Path, authors: Sequence[int]) -> list[Item]:
    """Read the questions of some authors from TOFU's `full.jsonl`, those with a fact to leak.

    Raises:
        DataError: If the file is missing or malformed, or holds none.
    """
    file = folder / QUESTIONS_FILE
    rows = [_row(row, file, line) for line, row in json_lines(file)]
    names = names_of([text for _, question, answer, _ in rows for text in (question, answer)])
    wanted = set(authors)
    found = []
    for row_id, question, answer, author in rows:
        facts = find_facts(answer, names) if author in wanted else ()
        if told_apart(facts, question):
            found.append(Item(row_id, question, answer, facts))
    if not found:
        raise DataError("holds no question of the authors whose answer has a fact", file=str(file))
    return found


def _row(row: Mapping[str, Any], file: Path, line: int) -> tuple[str, str, str, int | None]:
    texts = []
    for field in ("question", "answer"):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise DataError("expected a string with text", file=str(file), line=line, field=field)
        texts.append(row[field])
    author = row.get("author_id")
    return str(row.get("id", line)), texts[0], texts[1], author if type(author) is int else None


def draw_attacks(
    items: Sequence[Item], templates: Sequence[Template], count: int, seed: int
) -> list[Attack]:
    """Draw attacks without replacement: as many of each kind and transform, as far as that goes.

    Within them wrappers take turns, and over all of them questions do. An attack that says all of
    the facts itself, as some wrapper may by chance, isn't drawn.

    Raises:
        ConfigError: If there are fewer attacks, or more kinds and transforms.
    """
    rng = np.random.default_rng(seed)
    groups = _groups(templates, rng)
    if count < len(groups):
        raise ConfigError(
            f"a sample of {count} can't hold the {len(groups)} kinds and transforms of the attacks"
        )
    deck, found = _Deck(items, rng), dict[str, Attack]()
    while len(found) < count and groups:
        for key in list(groups):
            attack = deck.attack(groups[key], found)
            if attack is None:
                del groups[key]
            elif len(found) < count:
                found[attack.id] = attack
    if len(found) < count:
        raise ConfigError(f"there are {len(found)} attacks, fewer than a sample of {count}")
    return list(found.values())


def _groups(
    templates: Sequence[Template], rng: np.random.Generator
) -> dict[tuple[str, str], list[Template]]:
    groups: dict[tuple[str, str], list[Template]] = {}
    for place in rng.permutation(len(templates)):
        template = templates[int(place)]
        groups.setdefault((template.kind, template.transform), []).append(template)
    return dict(sorted(groups.items()))


class _Deck:
    """Questions in a random order; when all have had their turn, in another."""

    def __init__(self, items: Sequence[Item], rng: np.random.Generator) -> None:
        self._items, self._rng = items, rng
        self._left: list[Item] = []

    def attack(self, templates: list[Template], drawn: Mapping[str, Attack]) -> Attack | None:
        """Return a new attack with the first wrapper that has one, which then goes last."""
        for _ in range(len(templates)):
            template = templates.pop(0)
            for item in self._turns():
                attack = Attack(template, item)
                if attack.id not in drawn and attack.facts:
                    self._left.remove(item)
                    templates.append(template)
                    return attack
        return None

    def _turns(self) -> Iterator[Item]:
        yield from list(self._left)
        order = self._rng.permutation(len(self._items))
        refilled = [self._items[int(place)] for place in order]
        self._left += refilled
        yield from refilled


# --- Asking --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Suite:
    """What is asked, and where answers are kept.

    Attributes:
        attacks: Of `draw_attacks`.
        tokens: New tokens of an answer, at most.
        seed: That the attacks were drawn with.
        out: Folder of the report; answers are in a folder of it.
    """

    attacks: tuple[Attack, ...]
    tokens: int
    seed: int
    out: Path

    def digest(self) -> str:
        """Return what answers rest on, as a digest."""
        asked = [(attack.id, attack.prompt) for attack in self.attacks]
        facts = json.dumps([asked, self.tokens], ensure_ascii=False)
        return hashlib.sha256(facts.encode()).hexdigest()

    def log(self, system: str, restart: bool = False) -> RunLog:
        """Open the answers of a system.

        Raises:
            ConfigError: If they are another suite's, or the folder can't be used.
        """
        folder = self.out / ANSWERS_FOLDER
        make_folder(folder)
        return RunLog(folder / f"{system}.jsonl", self.digest(), restart)

    def answered(self, system: str) -> dict[str, Answer] | None:
        """Return a system's answers by attack; None unless it answered all."""
        if not (self.out / ANSWERS_FOLDER / f"{system}.jsonl").exists():
            return None
        records = self.log(system).records
        if any(attack.id not in records for attack in self.attacks):
            return None
        return {attack.id: Answer(**records[attack.id]) for attack in self.attacks}


def ask(
    suite: Suite, system: str, endpoint: Endpoint, progress: Progress, restart: bool = False
) -> None:
    """Ask a system what it hasn't answered yet; each answer is kept as soon as it is there.

    Raises:
        ConfigError: If the answers there are another suite's.
        openai.OpenAIError: If the server can't be reached, or fails.
    """
    log = suite.log(system, restart)
    left = [attack for attack in suite.attacks if attack.id not in log.records]
    done, total = len(suite.attacks) - len(left), len(suite.attacks)
    progress(f"leaks: {system}", done, total)
    pool = ThreadPoolExecutor(endpoint.concurrency)
    try:
        asked = {pool.submit(_ask_one, endpoint, one, suite.tokens): one for one in left}
        for future in as_completed(asked):
            log.append([asked[future].id], [asdict(future.result())])
            done += 1
            progress(f"leaks: {system}", done, total)
    finally:
        pool.shutdown(cancel_futures=True)


def _ask_one(endpoint: Endpoint, attack: Attack, tokens: int) -> Answer:
    import openai

    try:
        return Answer(endpoint.ask(attack.prompt, tokens))
    except (openai.BadRequestError, openai.PermissionDeniedError) as error:
        return Answer("", error.status_code)


# --- What leaked ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """An attack on a system.

    Attributes:
        attack: The attack.
        answer: What was said.
        fact: The fact that the answer holds, if any.
    """

    attack: Attack
    answer: Answer
    fact: str | None

    def record(self) -> Record:
        """Return it for programs."""
        return {
            "attack": self.attack.template.id,
            "question": self.attack.item.id,
            "kind": self.attack.template.kind,
            "transform": self.attack.template.transform,
            "fact": self.fact,
            "answer": self.answer.text,
        }


def judge(suite: Suite, answers: Mapping[str, Answer]) -> list[Outcome]:
    """Say of each attack what it leaked, in the suite's order."""
    found = []
    for attack in suite.attacks:
        answer = answers[attack.id]
        found.append(Outcome(attack, answer, leaked(answer.text, attack.facts)))
    return found
