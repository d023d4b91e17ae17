"""Finds the terms of all targets of a bundle in a text.

One index holds the lexicons of all of them: reading a text costs the same for one target and for
10,000.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from classifiers.fuzzy import DeletionIndex, SkeletonIndex, look_ups
from classifiers.lexical_reading import (
    BARE,
    FUZZY_FACTOR,
    LexicalReading,
    Match,
    PreparedText,
    bare_words,
)
from classifiers.lexicon import STRONG, Lexicon
from classifiers.sounds import SoundIndex, is_foreign
from classifiers.terms import DATE, PARTICLES, STOP_WORDS, Words, split_words

FUZZY_ALONE_LETTERS = 6
"""Letters that a misspelt word needs to count alone; a part of a longer name needs fewer."""

JOINED_LETTERS = 8
"""A name written as one word (`#harrypotter`) is known from this length on."""

MIDDLE_NAME_FACTOR = 0.9
"""What is left of a full name that holds one more name ("Ann Mary Example")."""

LEET = {"0": "o", "1": "il", "2": "z", "3": "e", "4": "a", "5": "s", "6": "gb", "7": "t", "8": "b"}
"""Letters that a digit stands for."""

MAX_LEET_LETTERS, MAX_LEET_WORDS = 24, 64

MAX_KNOWN_WORDS, LONGEST_KNOWN_WORD = 50_000, 64
"""Words of texts, and the letters of one, that are remembered with what they may be."""

BARE_LETTERS, BARE_LETTERS_OF_NAME = 6, 4
"""Consonants that a word, and a name of several, needs to be known without its vowels."""

Variant = tuple[str, float]


@dataclass(slots=True)
class _Node:
    children: dict[str, _Node] = field(default_factory=dict)
    term: Words = ()
    owners: dict[int, float] = field(default_factory=dict)
    primary: frozenset[int] = frozenset()
    parts: frozenset[int] = frozenset()
    works: frozenset[int] = frozenset()
    associates: frozenset[int] = frozenset()


class LexiconIndex:
    """Finds the terms of all targets in a text; safe to share between threads.

    Args:
        lexicons: The targets' lexicons; a target is known by its place among them.
        common: True for a folded word of general English, which is never taken for a typo.
        ranked: Words of general English, the most frequent first, to read texts without vowels.
    """

    def __init__(
        self,
        lexicons: Sequence[Lexicon],
        common: Callable[[str], bool],
        ranked: Sequence[str] = (),
    ) -> None:
        self._common = common
        self._root = _Node()
        self._words: set[str] = set()
        self._others: dict[str, set[int]] = {}
        self._mononyms = {
            number
            for number, lexicon in enumerate(lexicons)
            if lexicon.primary and all(len(t) == 1 for t in lexicon.primary - lexicon.parts)
        }
        for number, lexicon in enumerate(lexicons):
            self._add(number, lexicon)
        names = sorted(word for word in self._words if not word.startswith(DATE))
        self._near = DeletionIndex(names)
        self._bones = SkeletonIndex(names)
        self._restored = SkeletonIndex([*ranked, *names])
        self._sounds = SoundIndex(
            term for lexicon in lexicons for term in lexicon.primary - lexicon.parts
        )
        self._known: dict[str, tuple[Variant, ...]] = {}
        self._lock = threading.Lock()

    def _add(self, number: int, lexicon: Lexicon) -> None:
        alone = frozenset({number})  # one set for all nodes: thousands of targets have a million
        for term, weight in lexicon.weights.items():
            nodes = [self._put(term, term, number, weight)]
            self._words.update(term)
            joined = "".join(term)
            if len(term) > 1 and weight >= STRONG and len(joined) >= JOINED_LETTERS:
                nodes.append(self._put((joined,), term, number, weight))
                self._words.add(joined)
            for node in nodes:
                if term in lexicon.primary:
                    node.primary = _with(node.primary, alone)
                if term in lexicon.associates:
                    node.associates = _with(node.associates, alone)
            if term in lexicon.parts:
                nodes[0].parts = _with(nodes[0].parts, alone)
            if term in lexicon.works:
                nodes[0].works = _with(nodes[0].works, alone)
        for word in lexicon.others:
            self._others.setdefault(word, set()).add(number)

    def _put(self, path: Words, term: Words, number: int, weight: float) -> _Node:
        node = self._root
        for word in path:
            node = node.children.setdefault(word, _Node())
        node.term = term
        node.owners[number] = max(weight, node.owners.get(number, 0.0))
        return node

    def read(self, text: str, prepared: PreparedText | None = None) -> LexicalReading:
        """Find every term in a text.

        Args:
            text: The text.
            prepared: The same text, prepared before, if it is read again and again.
        """
        ready = prepared or PreparedText(text)
        words, bare = ready.words, ready.bare
        variants = [self._variants(word, place in bare) for place, (word, _, _) in enumerate(words)]
        found = list(self._walk(text, words, variants))
        for date, start, end in ready.dates:
            node = self._root.children.get(date)
            if node is not None:
                found.append(_placed(node, start, end, 1.0))
        for heard in self._sounds.find(text):
            found.append(_placed(self._node(heard.name), heard.start, heard.end, FUZZY_FACTOR))
        return LexicalReading(text, ready, found, self._common, self._mononyms)

    def _node(self, term: Words) -> _Node:
        node = self._root
        for word in term:
            node = node.children[word]
        return node

    def strange(self, prepared: PreparedText, most: int) -> bool:
        """Say whether a text takes long: many words never met before, or letters of another script.

        Args:
            prepared: The text.
            most: Look-ups that words never met before may take, each a microsecond at most.
        """
        if is_foreign(prepared.text):
            return True
        known, met = self._words, self._known
        new = {word for word, _, _ in prepared.words if word not in met and word not in known}
        takes = [look_ups(word) for word in new if word.isalpha() and not self._common(word)]
        return sum(takes) + len(new) > most

    def restore_vowels(self, text: str) -> str | None:
        """Return the text with its vowels guessed where a run of words has none; else None."""
        words = split_words(text)
        bare = bare_words(words)
        if not bare:
            return None
        out, at = [], 0
        for place in sorted(bare):
            word, start, end = words[place]
            known = self._restored.words(word)
            if known:
                out += [text[at:start], known[0]]
                at = end
        return "".join([*out, text[at:]])

    def _walk(
        self,
        text: str,
        words: Sequence[tuple[str, int, int]],
        variants: Sequence[tuple[Variant, ...]],
    ) -> Iterable[Match]:
        best: dict[tuple[int, int, Words], Match] = {}
        beginnings = self._root.children
        for first, options in enumerate(variants):
            if options[0][0] not in beginnings and (
                len(options) == 1 or not any(word in beginnings for word, _ in options)
            ):
                continue
            stack = [(self._root, first, 1.0)]
            while stack:
                node, at, factor = stack.pop()
                inside = at == first + 1 < len(words) - 1
                if inside and factor == 1.0 and _may_be_middle_name(text, words, at):
                    stack += self._past_middle_name(node, words, variants, at)
                if node.owners:
                    match = self._match(node, words, first, at, factor)
                    key = (first, at, node.term)
                    if match is not None and (key not in best or best[key].factor < factor):
                        best[key] = match
                if at < len(words):
                    for word, share in variants[at]:
                        child = node.children.get(word)
                        if child is not None:
                            stack.append((child, at + 1, min(factor, share)))
        return best.values()

    def _past_middle_name(
        self,
        node: _Node,
        words: Sequence[tuple[str, int, int]],
        variants: Sequence[tuple[Variant, ...]],
        at: int,
    ) -> Iterable[tuple[_Node, int, float]]:
        """Step over a middle name or initial between the parts of a full name."""
        if words[at][0] in node.children:
            return
        for word, share in variants[at + 1]:
            child = node.children.get(word)
            if share == 1.0 and child is not None and child.primary:
                yield child, at + 2, MIDDLE_NAME_FACTOR

    def _match(
        self,
        node: _Node,
        words: Sequence[tuple[str, int, int]],
        first: int,
        last: int,
        factor: float,
    ) -> Match | None:
        owners: Mapping[int, float] = node.owners
        if factor < 1.0:
            if len(node.term) == 1 and len(node.term[0]) < FUZZY_ALONE_LETTERS:
                return None
            written = [words[at][0] for at in range(first, last)]
            bare = [word for word in written if BARE.fullmatch(word)]
            needed = BARE_LETTERS if len(written) == 1 else BARE_LETTERS_OF_NAME
            if len(bare) == len(written) and sum(map(len, bare)) < needed:
                return None  # "hs" is many a word
            strangers = set().union(
                *(self._others.get(words[at][0], set()) for at in range(first, last))
            )
            if strangers:
                owners = {n: weight for n, weight in owners.items() if n not in strangers}
        start, end = words[first][1], words[last - 1][2]
        named = node.primary, node.parts, node.works, node.associates
        return Match(start, end, first, last, node.term, owners, *named, factor)

    def _variants(self, word: str, bare: bool) -> tuple[Variant, ...]:
        """Return the known words that a word of a text may be, with what each is worth."""
        if bare:
            known = self._bones.words(word)
            return ((word, 1.0), *((name, FUZZY_FACTOR) for name in known))
        found = self._known.get(word)
        if found is None:
            exact = word in self._words or (len(word) < 4 and word.isalpha())
            found = ((word, 1.0),) if exact else self._mend(word)
            if len(word) > LONGEST_KNOWN_WORD:
                return found
            with self._lock:
                if len(self._known) > MAX_KNOWN_WORDS:
                    self._known.clear()
                self._known[word] = found
        return found

    def _unleet(self, word: str) -> tuple[Variant, ...]:
        """Return the known words that digits in a word may stand for: `w31` is Wei."""
        choices = [LEET.get(letter, letter) for letter in word[:MAX_LEET_LETTERS]]
        if math.prod(map(len, choices)) > MAX_LEET_WORDS or word.isdigit():
            return ()
        guesses = ("".join(letters) for letters in itertools.product(*choices))
        return tuple((guess, FUZZY_FACTOR) for guess in guesses if guess in self._words)

    def _mend(self, word: str) -> tuple[Variant, ...]:
        if word.endswith("s") and word[:-1] in self._words:
            return ((word[:-1], 1.0),)
        if not word.isalpha():
            return self._unleet(word) or ((word, 1.0),)
        if self._common(word):
            return ((word, 1.0),)
        return tuple((near.word, FUZZY_FACTOR) for near in self._near.near(word)) or ((word, 1.0),)


def _with(known: frozenset[int], alone: frozenset[int]) -> frozenset[int]:
    return known | alone if known else alone


def _placed(node: _Node, start: int, end: int, factor: float) -> Match:
    """Return the match of what is no row of words: a date, or a name in another script."""
    named = node.primary, node.parts, node.works, node.associates
    return Match(start, end, -1, -1, node.term, node.owners, *named, factor)


def _may_be_middle_name(text: str, words: Sequence[tuple[str, int, int]], at: int) -> bool:
    """True for a word between two others that may be one name with them: "Ann Mary Example"."""
    (_, before, end), (word, start, stop) = words[at - 1], words[at]
    # Beside a word with a capital a small one is none ("Ann met Example"); small text may be.
    small = text[before].isupper() and text[start].islower() and word not in PARTICLES
    if small or (len(word) > 1 and word in STOP_WORDS):
        return False
    after = text[stop : words[at + 1][1]].removeprefix("." if len(word) == 1 else "")
    return not text[end:start].strip(" -\n") and not after.strip(" -\n")
