"""The verbatim index: keyed hashes of the forget set's word 8-grams.

Who quotes eight words in a row is flagged whatever the topic, and the output guard refuses to
speak them. A hash is 64 bits under the guard's key: without the key the file says nothing of the
text, with it a text can only be recognised. Word hashes are keyed and joined by a polynomial over
64 bits, so that a text of any length costs one hash a word.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from classifiers.terms import split_words

GRAM = 8
"""Words of a quotation that is recognised."""

HashArray = NDArray[np.uint64]

_POWERS = np.array([pow(0x9E3779B97F4A7C15, GRAM - 1 - n, 1 << 64) for n in range(GRAM)], np.uint64)
_MAX_WORDS = 200_000
_LONGEST_KEPT = 64  # letters: a client can send words of a megabyte


class GramHasher:
    """Hashes the 8-grams of texts under a key; safe to share between threads.

    Args:
        key: Secret bytes, 64 at most.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._words: dict[str, int] = {}
        self._lock = threading.Lock()

    def grams(self, words: Sequence[str]) -> HashArray:
        """Return the hash of every 8 words in a row, shape (words - 7,); empty if fewer."""
        if len(words) < GRAM:
            return np.zeros(0, np.uint64)
        hashes = np.array([self._word(word) for word in words], np.uint64)
        rolling = np.lib.stride_tricks.sliding_window_view(hashes, GRAM)
        with np.errstate(over="ignore"):
            found = (rolling * _POWERS).sum(axis=1, dtype=np.uint64)
        return np.asarray(found, np.uint64)

    def _word(self, word: str) -> int:
        known = self._words.get(word)
        if known is None:
            digest = hashlib.blake2b(word.encode("utf-8", "replace"), digest_size=8, key=self._key)
            known = int.from_bytes(digest.digest(), "little")
            if len(word) > _LONGEST_KEPT:
                return known
            with self._lock:
                if len(self._words) > _MAX_WORDS:
                    self._words.clear()
                self._words[word] = known
        return known


def forget_grams(
    questions: Iterable[str],
    answers: Iterable[str],
    texts: Iterable[str],
    hasher: GramHasher,
    known: Collection[str],
    frequent: Callable[[str], bool],
    common: HashArray,
) -> HashArray:
    """Return the sorted hashes by which quotations of a forget set are recognised.

    Args:
        questions: The questions; of them only grams that hold one of the target's terms, since
            the frame of a question is anybody's.
        answers: Answers; of them every gram but those of nothing but frequent words, since an
            answer repeats the frame of its question.
        texts: Running texts; of them every gram.
        hasher: Hashes under the guard's key.
        known: Words of the target's terms.
        frequent: True for the words that frames are made of.
        common: Grams of general and retain texts, which recognise nothing.
    """
    parts = [hasher.grams(_folded(text)) for text in texts]
    parts += [_telling(question, hasher, known.__contains__) for question in questions]
    parts += [_telling(text, hasher, lambda word: not frequent(word)) for text in answers]
    found = np.unique(np.concatenate(parts)) if parts else np.zeros(0, np.uint64)
    return np.asarray(found[~np.isin(found, common)], np.uint64)


def _telling(text: str, hasher: GramHasher, tells: Callable[[str], bool]) -> HashArray:
    """Return the grams of a text that hold a telling word."""
    words = _folded(text)
    if len(words) < GRAM:
        return np.zeros(0, np.uint64)
    telling = np.array([tells(word) for word in words], bool)
    return hasher.grams(words)[np.lib.stride_tricks.sliding_window_view(telling, GRAM).any(axis=1)]


def _folded(text: str) -> list[str]:
    return [word for word, _, _ in split_words(text)]


class VerbatimIndex:
    """Recognises quotations of any target's forget set.

    Args:
        grams: Each target's hashes.
        hasher: The hasher that made them.
    """

    def __init__(self, grams: Sequence[HashArray], hasher: GramHasher) -> None:
        sizes = [len(mine) for mine in grams]
        joined = np.concatenate(grams) if grams else np.zeros(0, np.uint64)
        owners = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
        order = np.argsort(joined, kind="stable")
        self._hashes, self._owners = joined[order], owners[order]
        self._hasher = hasher

    def quotes(self, words: Sequence[tuple[str, int, int]]) -> dict[int, list[tuple[int, int]]]:
        """Return the quoted characters of a text for each target that is quoted.

        Args:
            words: The text's folded words with their code points.
        """
        if len(words) < GRAM or not len(self._hashes):
            return {}
        grams = self._hasher.grams([word for word, _, _ in words])
        first = np.searchsorted(self._hashes, grams, "left")
        known = self._hashes[np.minimum(first, len(self._hashes) - 1)] == grams
        found: dict[int, list[tuple[int, int]]] = {}
        for at in np.flatnonzero(known):
            place = (words[int(at)][1], words[int(at) + GRAM - 1][2])
            last = np.searchsorted(self._hashes, grams[at], "right")
            for owner in self._owners[first[at] : last]:
                found.setdefault(int(owner), []).append(place)
        return found
