"""How English a stretch of letters looks: log-odds of its letter pairs against chance.

The table was counted over the English rows of the benign set (words only, one space between them).
It tells English from what a letter cipher or a reversal makes of it, and one guess from another.
"""

from __future__ import annotations

import re
from functools import lru_cache
from itertools import pairwise
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from guard.types import BoolArray, FloatArray, IntArray

_ROWS: Final = """
osppomploqehnonqngnruihr6j6 t4koo6jlco8lqnu2n0trtklgaoa nsj36w035od0q55v61qgfr100s0
nt5j2u01uq1qp01u0cnhrn040j5 zq60ltaf9q40i9aqb0npfkfe0k0 xqelqoigdj0dnlrfkbtrndkjij6
xp030rq40s04n0cu00sgqn050a0 wpa08u1kuq07nelp40tofm330g0 tua3by003r00b77s29lfnh020h0
nmhqpono463hqmwok1osu6n0i7d kxc88s888q8c888v88cq8v8c888 wl60cx05er86hfnj30ctfm093j0
ttc7pui54t0ftgbsg0bpllgd0o0 uun70w000r007oetp0gnfm030k0 wnanusbr7n9gj2jp907psme80i9
siikmhsi8j5lopupm0tooslqde9 ss3d5v60op00te5sq0rkpp0e0g0 o55555555a55n5555555rz5555a
wqgjnvaiar0lglnsb0lrojja0n0 ynaj8s90po0jjhcomb4mtn3i0d0 vo3f0s08xq00g98ra0oojl0m0m1
oommlp5pcl5drqtdo0ust3705id gr530z330u00330p003d03000j5 tu34ct00vt01g0ps00ol72000d0
wo5n5t955m99c55ew595vb599e5 zlfies640i06fecqe0fqgh04040 tsf99v9hhr9dtdrr9dddho99diu
"""
"""A row for each first letter, a digit in base 36 for each second one (quarter nats, from -6);
the blank comes before a. See the module's docstring."""

_UNSEEN: Final = -4.0
_LETTERS: Final = 27


def _read_table() -> FloatArray:
    values = [[int(digit, 36) / 4 - 6 for digit in row] for row in _ROWS.split()]
    return np.maximum(np.array(values, np.float32), _UNSEEN)


def _letter_codes() -> IntArray:
    codes = np.zeros(128, np.int64)
    for letter in range(26):
        codes[ord("a") + letter] = codes[ord("A") + letter] = letter + 1
    return codes


_TABLE: Final = _read_table()
_TABLE[0, 0] = 0.0
_CODES: Final = _letter_codes()
_CODE_OF: Final = {chr(point): int(code) for point, code in enumerate(_CODES)}
_SCORES: Final[list[list[float]]] = _TABLE.tolist()
_DIGIT: Final = re.compile(r"[0-9]")
_SHORT: Final = 64
"""Characters up to which plain Python is faster than arrays."""


class Words(NamedTuple):
    """A text as pairs of letter codes; anything but A-Z is a blank.

    Attributes:
        pairs: 27 * first + second, of the text with a blank before and behind it, shape
            (characters + 1,).
        starts: Index of the pair (equal to that of the first letter) where each word starts.
        ends: Index behind each word's last letter.
        whole: False for words that are parts of one with digits or other letters, shape (words,);
            None where all are whole.
    """

    pairs: IntArray
    starts: IntArray
    ends: IntArray
    whole: BoolArray | None


def read_words(text: str) -> Words:
    """Find the words of `text` and their pairs of letters."""
    if text.isascii():
        codes = _CODES[np.frombuffer(f" {text} ".encode(), np.uint8)]
        points = (
            None if _DIGIT.search(text) is None else np.frombuffer(f" {text} ".encode(), np.uint8)
        )
    else:
        points = np.frombuffer(f" {text} ".encode("utf-32-le", "replace"), np.uint32)
        codes = _CODES[np.minimum(points, 127)]
    blank = codes == 0
    edges = np.flatnonzero(blank[:-1] != blank[1:])
    starts, ends = edges[::2], edges[1::2]
    whole = None if points is None else ~_is_part(points[starts], points[ends + 1])
    return Words(codes[:-1] * _LETTERS + codes[1:], starts, ends, whole)


def _is_part(before: NDArray[Any], after: NDArray[Any]) -> BoolArray:
    """True for words beside a letter beyond ASCII (by and large), or between digits."""
    beside = (before, after)
    letters = [(points >= 0xC0) & ((points < 0x2000) | (points > 0x2BFF)) for points in beside]
    digits = [(points >= ord("0")) & (points <= ord("9")) for points in beside]
    found: BoolArray = letters[0] | letters[1] | (digits[0] & digits[1])
    return found


def word_scores(words: Words, table: FloatArray) -> FloatArray:
    """Sum a table of pairs over each word (one at least) and the blanks around it: (words,)."""
    sums = np.add.reduceat(table[words.pairs], words.starts)
    return sums if words.whole is None else np.asarray(sums * words.whole, np.float32)


def englishness(text: str) -> float:
    """Mean log-odds of the letter pairs of `text`, in nats: English is near 1, chance below -1."""
    if len(text) <= _SHORT:
        return _englishness_of_word(text)
    pairs = read_words(text).pairs
    pairs = pairs[pairs > 0]
    return float(ENGLISH[pairs].mean()) if len(pairs) else 0.0


@lru_cache(maxsize=4096)
def _englishness_of_word(text: str) -> float:
    codes = [0, *(_CODE_OF.get(char, 0) for char in text), 0]
    scores = [_SCORES[one][two] for one, two in pairwise(codes) if one or two]
    return sum(scores) / len(scores) if scores else 0.0


def _ciphers() -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Alphabets that a text may be written in, as what each of A-Z stands for; the plain first."""
    plain = np.arange(26)
    alphabets = [(plain + shift) % 26 for shift in range(26)] + [plain[::-1]]
    spelt = tuple("".join(chr(97 + code) for code in alphabet) for alphabet in alphabets)
    codes = np.zeros((len(alphabets), _LETTERS), np.int64)
    codes[:, 1:] = np.array(alphabets) + 1
    return spelt, codes


ALPHABETS, _DECODED = _ciphers()
"""What the letters a to z stand for in each cipher: none, 25 shifts, the mirrored alphabet."""

ENGLISH: Final = _TABLE.reshape(-1)
"""Log-odds of a pair read as it stands, shape (729,)."""

BACKWARDS: Final = np.ascontiguousarray(_TABLE.T).reshape(-1)
"""Log-odds of a pair read from right to left, shape (729,)."""

READ_AS: Final = np.stack(
    [
        table[codes[:, None], codes[None, :]].reshape(-1)
        for codes in _DECODED
        for table in (_TABLE, _TABLE.T)
    ]
)
"""Log-odds of a pair in each cipher, forwards and backwards, shape (2 * ciphers, 729)."""
