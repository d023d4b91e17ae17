"""A forget set taken apart: questions, answers, passages, terms.

Learning only; nothing of it is written down but what `classifiers.target` says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from classifiers.augment import ForgetRow
from classifiers.terms import Words
from classifiers.termtable import terms_of
from guard.errors import DataError

ANSWER_WORDS = 7
"""Shorter answers ("Seven.") point at nothing on their own."""

SENTENCE_CHARS = 400
"""A running text of the forget set is taken apart into pieces of about this length at most."""


@dataclass(frozen=True, slots=True)
class ForgetSet:
    """The forget set as texts.

    Attributes:
        questions: Prompts that have an answer, or are short enough to be one.
        passages: Answers, then pieces of running text.
        answers: How many of the passages are answers.
        documents: What a row says as a whole, for the lexicon; one a row or piece.
        owners: Document of each question, then of each passage.
        terms: Terms that the user gave as such.
    """

    questions: list[str]
    passages: list[str]
    answers: int
    documents: list[str]
    owners: list[int]
    terms: list[Words]

    @property
    def asked(self) -> list[str]:
        """What users may send: questions, or passages where there are none.

        The first of `texts`, so that `owners` holds for them too.
        """
        return self.questions or self.passages

    @property
    def texts(self) -> list[str]:
        """Questions, then passages."""
        return [*self.questions, *self.passages]


def take_apart(
    forget: Sequence[ForgetRow], terms: Sequence[str], normalise: Callable[[str], str]
) -> ForgetSet:
    """Sort the rows of a forget set.

    Raises:
        DataError: If there is no text in them.
    """
    questions: list[str] = []
    answers: list[str] = []
    passages: list[str] = []
    documents: list[str] = []
    asked: list[int] = []
    answered: list[int] = []
    told: list[int] = []
    for row in forget:
        prompt = normalise(row.prompt).strip()
        answer = normalise(row.answer).strip() if row.answer else ""
        if not prompt:
            continue
        if answer or len(prompt) <= SENTENCE_CHARS:
            documents.append(f"{prompt}\n{answer}" if answer else prompt)
            questions.append(prompt)
            asked.append(len(documents) - 1)
            if len(answer.split()) >= ANSWER_WORDS:
                answers.append(answer)
                answered.append(len(documents) - 1)
            continue
        for piece in _pieces(prompt):
            documents.append(piece)
            passages.append(piece)
            told.append(len(documents) - 1)
    given = [words for term in terms if (words := terms_of(normalise(term)))]
    if not documents and not given:
        raise DataError("there is nothing to forget: no row holds any text")
    if not documents:
        documents = [normalise(term) for term in terms]
        passages, told = list(documents), list(range(len(documents)))
    return ForgetSet(
        questions,
        [*answers, *passages],
        len(answers),
        documents,
        [*asked, *answered, *told],
        given,
    )


def _pieces(text: str) -> list[str]:
    """Cut a running text into pieces of a few sentences."""
    pieces: list[str] = []
    for sentence in re.split(r"(?<=[.!?。！？])\s+|\n+", text):
        if not sentence.strip():
            continue
        if pieces and len(pieces[-1]) + len(sentence) < SENTENCE_CHARS / 2:
            pieces[-1] += " " + sentence.strip()
        else:
            pieces.append(sentence.strip())
    return pieces
