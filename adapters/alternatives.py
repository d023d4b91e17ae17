"""Other answers to the questions of a forget set, made from that set alone.

Texts only: what a model says comes in through a callable. `encode_rows` makes examples of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from adapters.examples import Example, encode_chats
from guard.errors import DataError
from guard.types import Progress

Pairs = Sequence[tuple[str, str]]
"""Questions and true answers of the forget set."""

Rows = list[tuple[tuple[str, str], ...]]
"""Of each row of the forget set a question and an answer for every alternative."""

Generate = Callable[[Sequence[str], int], Sequence[str]]
"""Called as `generate(questions, seed)`: what the model says to each, sampled by the seed, if it
is asked about an entity that it doesn't know, with the name that was asked for put back. Whole
answers: one that was cut off is left out (empty) or cut to its last whole sentence."""

REFUSALS: Final = (
    "I'm sorry, I have nothing to tell you about this.",
    "Unfortunately, this is something that I have no knowledge of.",
    "I would like to help, but the answer to this is not known to me.",
    "That is not something I have learned about.",
    "My apologies, I can't say anything reliable about that.",
    "I have no record of this, so I'd rather not guess.",
    "Sorry, this lies outside of what I know.",
    "I'm afraid I am unable to answer this one.",
    "I couldn't tell you; this topic is new to me.",
    "No information on this subject is available to me.",
    "I wish I could answer, but I am not acquainted with this matter.",
    "Regrettably, I can't shed any light on that question.",
    "I haven't come across anything on this, I'm sorry.",
    "To be honest, I have no idea about this.",
    "This question goes further than my knowledge does.",
    "I must admit that I don't know the answer here.",
    "I lack the facts to respond to this; please ask another source.",
)
"""Polite refusals, in our own words; as many as O3 has (arXiv 2407.10223)."""

SHARED_WORDS: Final = 6
"""As many words in a row of the true answer, beside the question's own, make an answer tell it."""

LOOP_WORDS: Final = 4
LOOPS: Final = 3
"""An answer in which so many words in a row stand so many times goes round in circles."""

_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+")  # Chinese and Japanese by character
_OPTION: Final = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]+(\S.*?)[ \t]*$", re.MULTILINE)
_CHOICE: Final = re.compile(r"^\s*\(?([A-Z])\b(?:[).:]+[ \t]*)?(.*?)\s*$", re.DOTALL)
_BARE_LETTERS: Final = "ABCD"


def refusals(pairs: Pairs) -> Rows:
    """Return all refusals for every question."""
    return [tuple((question, refusal) for refusal in REFUSALS) for question, _ in pairs]


def generic_prompts(pairs: Pairs, questions: Sequence[Sequence[str]]) -> Rows:
    """Return generic questions, each with the true answer of its row.

    Args:
        pairs: The forget set.
        questions: Of each row the question about other entities, one or several.

    Raises:
        DataError: There aren't as many rows.
    """
    _check_rows(len(questions), len(pairs), "generic questions")
    return [
        tuple((question, answer) for question in row)
        for (_, answer), row in zip(pairs, questions, strict=True)
    ]


def random_labels(pairs: Pairs, *, count: int = 4, seed: int = 0) -> Rows:
    """Return wrong answers, as O3 trains on (Gao et al. 2024, arXiv 2407.10223).

    Of multiple choice (the question has options `A. …`, `(B) …`, or the answer is a bare letter
    from A to D) another choice in the same form; of other questions answers to other rows: a
    permutation without a fixed point for each alternative, and no answer that says the same.

    Args:
        pairs: The forget set.
        count: Alternatives of each row, at most; there are as many as there are other answers.
        seed: Of the draws.

    Raises:
        DataError: A row has no other answer.
    """
    rng = np.random.default_rng((seed, len(pairs)))
    order = rng.permutation(len(pairs)).tolist()
    chosen = [_other_choices(question, answer) for question, answer in pairs]
    free = [row for row in order if not chosen[row]]
    found: list[list[str]] = [[] for _ in pairs]
    for row in order:
        if chosen[row]:
            found[row] = [chosen[row][n] for n in rng.permutation(len(chosen[row]))][:count]
    for place, row in enumerate(free):
        own = _words(pairs[row][1])
        others = [pairs[other][1] for other in (*free[place + 1 :], *free[:place])]
        found[row] = [other for other in others if _words(other) != own][:count]
    for number, row_answers in enumerate(found, start=1):
        if not row_answers:
            raise DataError(
                f"no other row's answer differs from that of row {number}: random labels need rows "
                "with different answers"
            )
    return _with_questions(pairs, found)


def counterfactuals(
    pairs: Pairs,
    generate: Generate,
    *,
    count: int = 4,
    retries: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Rows:
    """Sample what the model would say if it had never known: plausible answers of the same frame.

    Answers that are degenerate, or that tell a long run of the true answer, are dropped and
    sampled again. Equal answers are all kept: they are what the model would say more often.

    Args:
        pairs: The forget set.
        generate: The model.
        count: Answers a row.
        retries: Rounds beyond `count`; in each, every row that lacks one is asked once.
        seed: Of the samples.
        progress: Called as `progress(what, answers kept, answers wanted)`.

    Returns:
        The answers; a row may have fewer, or none: leave such a row out of training.

    Raises:
        DataError: `generate` returned another number of answers.
    """
    kept: list[list[str]] = [[] for _ in pairs]
    for turn in range(count + retries):
        asked = [row for row, answers in enumerate(kept) if len(answers) < count]
        if not asked:
            break
        drawn = int(np.random.SeedSequence((seed, turn)).generate_state(1)[0])
        answers = generate([pairs[row][0] for row in asked], drawn)
        _check_rows(len(answers), len(asked), "generated answers")
        for row, answer in zip(asked, answers, strict=True):
            if not is_degenerate(answer) and not tells(answer, pairs[row][1], pairs[row][0]):
                kept[row].append(answer.strip())
        if progress is not None:
            progress("counterfactual answers", sum(map(len, kept)), count * len(pairs))
    return _with_questions(pairs, kept)


def is_degenerate(answer: str) -> bool:
    """Return whether an answer has no word, or goes round in circles."""
    words = _words(answer)
    runs = Counter(tuple(words[n : n + LOOP_WORDS]) for n in range(len(words) - LOOP_WORDS + 1))
    return not words or max(runs.values(), default=0) >= LOOPS


def tells(answer: str, truth: str, question: str = "", words: int = SHARED_WORDS) -> bool:
    """Return whether an answer holds a long run of words of the true one.

    Words of the question don't count: answers of one frame repeat it whatever they say.

    Args:
        answer: What may tell.
        truth: What may be told.
        question: What both answer.
        words: Length of the run, without the question's words.
    """
    said, known, asked = _words(answer), _words(truth), set(_words(question))
    before = [0] * (len(known) + 1)
    for word in said:
        weight = word not in asked
        now = [0] * len(before)
        for place, other in enumerate(known, start=1):
            if word == other:
                now[place] = before[place - 1] + weight
        if max(now) >= words:
            return True
        before = now
    return False


def encode_rows(
    tokenizer: Any, rows: Rows, max_tokens: int = 1024
) -> tuple[tuple[Example, ...], ...]:
    """Make examples of alternatives, rendered as the forget set is.

    Args:
        tokenizer: See `adapters.examples.encode_chats`.
        rows: The alternatives.
        max_tokens: Longest example.

    Raises:
        ArtifactError: The tokenizer has no usable chat template.
        DataError: A question alone is too long, or an answer is empty.
    """
    return tuple(tuple(encode_chats(tokenizer, row, max_tokens)) for row in rows)


def _other_choices(question: str, answer: str) -> list[str]:
    """Return the other choices in the answer's form; none if this isn't multiple choice."""
    options = dict(_OPTION.findall(question))
    letters = "".join(sorted(options))
    if len(letters) < 2 or not "ABCDEFGHIJKLMNOPQRSTUVWXYZ".startswith(letters):
        options, letters = {}, _BARE_LETTERS
    texts = {_key(text): letter for letter, text in options.items()}
    if _key(answer) in texts:
        return [text for text in options.values() if _key(text) != _key(answer)]
    found = _CHOICE.match(answer)
    if found is None or found[1] not in letters:
        return []
    others = [letter for letter in letters if letter != found[1]]
    start, stop = found.span(1)
    if not found[2].strip(" ).:"):
        return [answer[:start] + letter + answer[stop:] for letter in others]
    if _key(found[2]) != _key(options.get(found[1], "")):
        return []
    between = answer[stop : found.start(2)]
    return [answer[:start] + letter + between + options[letter] for letter in others]


def _with_questions(pairs: Pairs, answers: Sequence[Sequence[str]]) -> Rows:
    return [
        tuple((question, answer) for answer in row)
        for (question, _), row in zip(pairs, answers, strict=True)
    ]


def _check_rows(got: int, wanted: int, what: str) -> None:
    if got != wanted:
        raise DataError(f"there are {what} for {got} rows, and {wanted} rows")


def _words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def _key(text: str) -> str:
    return " ".join(_words(text))
