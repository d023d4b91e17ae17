"""Names in another script: "Гарри Поттер" and "哈利·波特" name Harry Potter as well.

A name is carried into another script by its sound, each language in its own way: no table of
spellings holds them all. So what is written in other scripts is read in Latin letters (`anyascii`),
both sides become classes of sounds that scripts mix up (b and p, l and r, …), and an alignment says
how many bits of evidence a passage gives for a name. Needed is more than chance offers: the more
names are looked for and the more passages are tried, the more.
"""

from __future__ import annotations

import math
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, combinations
from typing import Final, Literal

MARKED_BITS: Final = 4.0
"""Evidence needed beyond what chance offers, where the text itself marks a foreign name: by a
middle dot, or by capitals."""

PARTED_BITS: Final = 5.0
"""The same for words between spaces."""

WITHIN_BITS: Final = 10.0
"""The same for a few characters among others of a script without spaces."""

LONGEST: Final = 6
"""Words in a row that are tried as one name."""

LONGEST_RUN: Final = 12
"""Characters of a script without spaces that are tried as one name."""

FEWEST_CARRIED: Final = 3
"""Characters that a Chinese name of a foreigner has at least."""

NEAR: Final = 0.66
"""Share of the bits of a name's own sound that a passage needs."""

NEAR_WITHIN: Final = 0.75
"""The same where nothing says where a name would begin or end."""

MAX_KNOWN: Final = 20_000

MAX_UNIONS: Final = 500

SHORTEST_KEY: Final = 3
"""Consonants that a name needs."""

_MARKS: Final = "".join(
    re.escape(chr(code))
    for code in range(0x300, 0x1E00)
    if unicodedata.category(chr(code)) in ("Mn", "Mc")
)
_UNSPACED: Final = re.compile("[\u0e00-\u0eff\u1780-\u17ff\u1000-\u109f\u3400-\u9fff]")
# Characters that Chinese writes foreign names with, in its two ways of writing them.
_CARRIERS: Final = (
    "布巴贝比博鲍邦班本宾伯彼波柏芭蓓普帕佩皮保庞潘彭平珀派坡德达戴迪多杜道丹登丁顿黛蒂邓特塔泰"
    "托图陶坦滕廷通汤唐提铁缇格加盖吉戈古高甘根金贡冈葛迦克卡凯基科库考坎肯孔康柯奇琪姬夫瓦韦维"
    "沃武文万温弗威旺法费菲福富芬方丰冯兹扎泽齐佐祖斯萨塞西索苏桑森辛松丝莎瑟赛撒诗什沙谢希肖舒"
    "尚申欣香雪查切乔朱钱琴琼杰贾焦詹珍丘千茨察采策措楚翠赫哈海黑霍胡豪汉亨兴洪何姆马梅米莫穆毛"
    "曼门明蒙玛麦迈密默摩墨恩纳内尼诺努瑙南嫩宁农娜妮奈涅尔拉莱利洛卢劳兰伦林隆莉丽琳蕾罗勒龙路"
    "朗莲里雷鲁瑞赖蓉吕萝露亚耶伊约尤扬延因英永雅叶阿埃艾奥乌安昂翁爱欧厄吾娅依瓜圭果夸奎阔华惠"
    "怀貝佈賓達圖湯蓋凱韋維溫費馮茲薩蘇謝喬錢瓊傑賈納內諾農萊盧勞蘭倫麗羅龍魯賴約亞葉歐愛華懷馬"
    "門瑪麥邁爾"
)
_CARRIED: Final = re.compile(f"[{_CARRIERS}]{{3,}}")
_CARRIED_HEAD: Final = re.compile(f"[{_CARRIERS}]+")
_CARRIED_TAIL: Final = re.compile(f"[{_CARRIERS}]+$")
_FOREIGN: Final = re.compile("[\u0370-\u1cff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7ff]")
_TOKEN: Final = re.compile(
    "[\u30a1-\u30fa\u30fc-\u30ff]+"  # katakana
    "|[\u3041-\u309f]+|[\u3400-\u9fff]+"
    f"|(?:(?![\u3041-\u9fff])[^\\W\\d_\u0000-\u036f])(?:[^\\W\\d_\u0000-\u02ff\u3041-\u9fff]|[{_MARKS}])*"
)
_LAST_OF_TWO_CASES: Final = "\u058f"  # Armenian; Georgian capitals are for headlines
_PROCLITICS: Final = frozenset("ولبفكوهבלמשכ")
_DOTS: Final = frozenset("·・•‧・＝=")
_GAP: Final = re.compile(r"[ \t\u00a0\u3000·・•‧・＝=\-‐–.]{1,2}")

# Two letters that are one sound; `_` in the sounds is nothing.
_DIGRAPHS: Final = {
    "shch": "S", "dzh": "S", "tch": "S", "sch": "S", "ph": "P", "th": "T", "sh": "S", "ch": "S",
    "zh": "S", "ts": "S", "tz": "S", "dz": "S", "kh": "K", "gh": "K", "ck": "K", "qu": "K",
    "dh": "T", "bh": "P", "rh": "L",
}  # fmt: skip
_DIGRAPH: Final = re.compile("|".join(sorted(_DIGRAPHS, key=len, reverse=True)))
_LETTERS: Final = {
    "b": "P", "p": "P", "f": "P", "v": "P", "d": "T", "t": "T", "k": "K", "g": "K", "c": "K",
    "q": "K", "x": "KS", "s": "S", "z": "S", "j": "S", "l": "L", "r": "L", "n": "N", "m": "N",
    "h": "H", "a": "a", "e": "i", "i": "i", "y": "i", "o": "u", "u": "u", "w": "u",
}  # fmt: skip
_SOUNDS: Final = str.maketrans(_LETTERS)
_HAN: Final = str.maketrans({**_LETTERS, "q": "S", "x": "S", "c": "S"})
_GREEK: Final = {"ντ": "d", "μπ": "b", "γκ": "g", "χ": "h"}
_SOFT_C: Final = re.compile("c(?=[eiy])")
# A Spanish or German j, a w that is said v, a g that is said j.
_SAID_ELSEWHERE: Final = (
    (re.compile("j"), "h"),
    (re.compile("j"), "y"),
    (re.compile("w"), "v"),
    (re.compile("g(?=[eiy])"), "j"),
)
_NASAL: Final = re.compile("ng(?![aeiou])")
_REPEATED: Final = re.compile(r"([A-Z])\1+")
_VOWELS: Final = frozenset("aiu")
_BONES: Final = frozenset("PTKSLN")
_NO_CONSONANTS: Final = str.maketrans("", "", "HPTKSLN")
_NO_BONES: Final = str.maketrans("", "", "aiuH")

# Bits for two sounds that stand for one another.
_ALIKE: Final = {
    frozenset("HK"): 1.0,
    frozenset("KS"): -0.5,
    frozenset("TS"): -0.5,
    frozenset("Pu"): 0.5,
    frozenset("Si"): -0.5,
    frozenset("Ki"): -1.0,
}
_ALIKE_AT_MOST: Final = 0.5  # of two of the consonants of `_BONES`
_SAME, _SAME_VOWEL, _OTHER_VOWEL, _OTHER = 2.5, 1.0, 0.0, -3.0
_MISSING: Final = {"a": -0.3, "i": -0.3, "u": -0.3, "H": -0.3, "L": -1.0, "N": -1.5}
_DROPPED: Final = -2.5
_ENDING: Final = -0.3
_BOUNDARY: Final = 1.0
_MAX_ENDING: Final = 4


@dataclass(frozen=True, slots=True)
class Sounded:
    """A name that a passage sounds like.

    Attributes:
        start: First code point.
        end: Code point behind the last.
        name: Words of the name.
        bits: Evidence beyond what was needed, 0 or more.
    """

    start: int
    end: int
    name: tuple[str, ...]
    bits: float


_Kind = Literal["marked", "parted", "within"]
"""How a passage stands out from the text around it."""

_BITS: Final[dict[_Kind, float]] = {
    "marked": MARKED_BITS,
    "parted": PARTED_BITS,
    "within": WITHIN_BITS,
}


@dataclass(frozen=True, slots=True)
class _Token:
    """A word of another script.

    Attributes:
        start: First code point.
        end: Code point behind the last.
        written: The word.
        voiced: Whether its script writes vowels.
        loose: Whether its script has no spaces, so that a name may begin anywhere in it.
        carried: Where the foreign name at its end would begin, and that at its beginning end.
        lower: Whether it is in small letters, as names are not.
        joined: Whether it belongs to the token before it: 0 no, 1 yes, 2 as foreign names do.
    """

    start: int
    end: int
    written: str
    voiced: bool
    loose: bool
    carried: tuple[int, int]
    lower: bool
    joined: int


def is_foreign(text: str) -> bool:
    """True if a text has letters of scripts that names are carried into by sound."""
    return not text.isascii() and _FOREIGN.search(text) is not None


class SoundIndex:
    """Finds names by their sound in texts of other scripts; safe to share between threads.

    Args:
        names: The names, as folded words; those of a single word are left out, they have too few
            sounds to be told from other words.
    """

    def __init__(self, names: Iterable[tuple[str, ...]]) -> None:
        self._names: list[tuple[str, ...]] = []
        self._sounds: list[str] = []
        self._mosts: list[float] = []
        self._first, self._last, self._whole = _Lookup(), _Lookup(), _Lookup()
        wanted = sorted({name for name in names if len(name) > 1})
        self._chance = math.log2(max(1, len(wanted)))
        for name in wanted:
            for words in _ways(name):
                self._add(name, words)
        self._fitting = {
            (kind, words): frozenset(self._fit(kind, words))
            for kind in _BITS
            for words in range(LONGEST + 1)
        }

    def _add(self, name: tuple[str, ...], words: Sequence[str]) -> None:
        """Let a name be found by one way to say its words."""
        first, last = _bones(words[0]), _bones(words[-1])
        sounds = _REPEATED.sub(r"\1", "".join(words))
        if len(_bones(sounds)) < SHORTEST_KEY or max(len(first), len(last)) < 2:
            return
        most = _most(sounds, voiced=True)
        if most + _BOUNDARY * len(name) < MARKED_BITS + self._chance:
            return  # However well it fits, chance would make it among so many names.
        number = len(self._names)
        self._names.append(name)
        self._sounds.append(sounds)
        self._mosts.append(most)
        self._first.add(first, number)
        self._last.add(last, number)
        self._whole.add(_bones(sounds), number)

    def _fit(self, kind: _Kind, words: int) -> Iterator[int]:
        """Yield the names that a passage of so many words may be: a middle name may be left out."""
        for number, name in enumerate(self._names):
            if words and len(name) not in (words, words + 1):
                continue
            if self._mosts[number] + _BOUNDARY * words >= _BITS[kind] + self._chance:
                yield number

    def find(self, text: str) -> list[Sounded]:
        """Return the names that passages of `text` sound like; those of one name are apart."""
        if not self._names or not is_foreign(text):
            return []
        tokens = list(_tokens(text))
        if not tokens:
            return []
        pairs = sum(token.joined == 2 for token in tokens)
        needed = {
            kind: bits
            + self._chance
            + math.log2(max(1, pairs if kind == "marked" else len(tokens)))
            for kind, bits in _BITS.items()
        }
        found = []
        for passage, names in self._tried(text, tokens, needed):
            for number in names:
                bits = self._bits(passage, number, needed[passage.kind])
                if bits >= 0:
                    found.append(Sounded(passage.start, passage.end, self._names[number], bits))
        return _apart(found)

    def _bits(self, passage: _Passage, number: int, needed: float) -> float:
        """Return a passage's evidence for a name beyond `needed`; none where it is far from it."""
        needed -= _BOUNDARY * passage.words
        if self._mosts[number] < needed:
            return -math.inf
        name = self._sounds[number]
        near = NEAR_WITHIN if passage.kind == "within" else NEAR
        least = max(needed, near * _most(name, voiced=passage.voiced))
        if _at_most(name, passage.sounds) < least:
            return -math.inf
        bits = agreement(name, passage.sounds, least)
        return bits - needed if bits >= least else -math.inf

    def _tried(
        self, text: str, tokens: Sequence[_Token], needed: Mapping[_Kind, float]
    ) -> Iterator[tuple[_Passage, frozenset[int]]]:
        """Yield passages, and the names that each may be."""
        for last, token in enumerate(tokens):
            reach = 0
            while reach < LONGEST - 1 and last > reach and tokens[last - reach].joined:
                reach += 1
            if reach:
                yield from self._words(tokens[last - reach : last + 1], needed)
            if token.loose:
                yield from self._carried(text, token, needed["parted"])

    def _words(
        self, tokens: Sequence[_Token], needed: Mapping[_Kind, float]
    ) -> Iterator[tuple[_Passage, frozenset[int]]]:
        """Yield passages that end with the last of `tokens`."""
        final = tokens[-1]
        for last in _heads(final.written):
            ending = self._last.near(last.bones)
            between: list[str] = []
            most, end = last.most, final.start + last.cut
            for begin in range(len(tokens) - 2, -1, -1) if ending else ():
                words, token = len(tokens) - begin, tokens[begin]
                for first in _tails(token.written):
                    start = token.start + first.cut
                    kind = _kind(tokens[begin:], start, end)
                    if first.most + most + _BOUNDARY * words < needed[kind]:
                        continue
                    fitting = self._fitting[kind, words]
                    if found := ending & fitting & self._first.near_or_short(first.bones):
                        heard = "".join([first.sounds, *between[::-1], last.sounds])
                        heard = _REPEATED.sub(r"\1", heard)
                        yield _Passage(start, end, words, kind, heard, final.voiced), found
                whole = _whole(token.written)
                between.append(whole.sounds)
                most += whole.most

    def _carried(
        self, text: str, token: _Token, needed: float
    ) -> Iterator[tuple[_Passage, frozenset[int]]]:
        """Yield parts of runs of the characters that Chinese writes foreign names with."""
        for run in _CARRIED.finditer(text, token.start, token.end):
            heard = [_heard(char) for char in run.group()]
            for first in range(len(heard) - FEWEST_CARRIED + 1):
                shape = "".join(heard[first : first + FEWEST_CARRIED - 1])
                for last in range(first + FEWEST_CARRIED - 1, min(len(heard), first + LONGEST_RUN)):
                    shape = _REPEATED.sub(r"\1", shape + heard[last])
                    if _most(shape, voiced=True) >= needed:
                        start, end = run.start() + first, run.start() + last + 1
                        names = self._whole.near(_bones(shape)) & self._fitting["parted", 0]
                        yield _Passage(start, end, 0, "parted", shape), names


def _apart(found: Iterable[Sounded]) -> list[Sounded]:
    """Return the best of those passages of each name that overlap, in the text's order."""
    kept: dict[tuple[str, ...], list[Sounded]] = {}
    for one in sorted(found, key=lambda one: (-one.bits, one.start)):
        others = kept.setdefault(one.name, [])
        if all(one.end <= other.start or other.end <= one.start for other in others):
            others.append(one)
    return sorted((one for some in kept.values() for one in some), key=lambda one: one.start)


def _kind(tokens: Sequence[_Token], start: int, end: int) -> _Kind:
    """Say how words from code point `start` to `end` stand out."""
    first, last = tokens[0], tokens[-1]
    if all(token.joined == 2 for token in tokens[1:]):
        whole = start in (first.start, first.carried[0]) and end in (last.end, last.carried[1])
        return "marked" if whole or not first.loose else "within"
    cut = (first.loose and start > first.start) or (last.loose and end < last.end)
    return "within" if cut or any(token.lower for token in tokens) else "parted"


@dataclass(frozen=True, slots=True)
class _Passage:
    """A passage that may be a name; of so many `words`, 0 in a run of characters."""

    start: int
    end: int
    words: int
    kind: _Kind
    sounds: str
    voiced: bool = True


_NONE: Final[frozenset[int]] = frozenset()


class _Lookup:
    """Finds names by consonants, of which one (of many two) may be missing on either side."""

    def __init__(self) -> None:
        self._owners: dict[str, list[int]] = {}
        self._short: set[int] = set()
        self._longest = 0
        self._either: dict[str, frozenset[int]] = {}
        self._near: OrderedDict[str, frozenset[int]] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, bones: str, number: int) -> None:
        """Let `number` be found by its consonants."""
        if len(bones) < 2:
            self._short.add(number)
            return
        self._longest = max(self._longest, len(bones))
        for key in _shortened(bones):
            self._owners.setdefault(key, []).append(number)

    def near(self, bones: str) -> frozenset[int]:
        """Return the names with about these consonants, and those with too few to tell."""
        if len(bones) > self._longest + 2:
            return _NONE
        with self._lock:
            known = self._near.get(bones)
        if known is None:
            found = {n for key in _shortened(bones) for n in self._owners.get(key, ())}
            known = frozenset(found | self._short if len(bones) < 3 else found)
            with self._lock:
                self._near[bones] = known
                if len(self._near) > MAX_KNOWN:
                    self._near.popitem(last=False)
        return known

    def near_or_short(self, bones: str) -> frozenset[int]:
        """Return the names with about these consonants, and all that have too few to tell."""
        if not self._short or len(bones) < 3:
            return self.near(bones)
        known = self._either.get(bones)
        if known is None:
            known = self._either[bones] = self.near(bones) | self._short
            if len(self._either) > MAX_UNIONS:
                self._either.clear()
        return known


def _ways(name: Sequence[str]) -> list[list[str]]:
    """Return the sounds of a name's words, in each of the ways in which they may be said."""
    said = [[_sounds(_SOFT_C.sub("s", word), _SOUNDS) for word in name]]
    for letter, sound in _SAID_ELSEWHERE:
        if any(letter.search(word) for word in name):
            said.append(
                [_sounds(_SOFT_C.sub("s", letter.sub(sound, word)), _SOUNDS) for word in name]
            )
    return said


@lru_cache(maxsize=65536)
def _most(sounds: str, voiced: bool) -> float:
    """Return the bits that a name's own sounds would give, in a script with vowels or without."""
    return sum(_pair(sound, sound) for sound in sounds if voiced or sound not in _VOWELS)


@lru_cache(maxsize=65536)
def _at_most(name: str, passage: str) -> float:
    """Return a bound of `agreement` that is quick to find: no pair may give more than it does."""
    from rapidfuzz.distance import LCSseq

    mine, heard = _bones(name), _bones(passage)
    same = LCSseq.similarity(mine, heard)
    vowels = LCSseq.similarity(name.translate(_NO_CONSONANTS), passage.translate(_NO_CONSONANTS))
    beyond = max(0, len(heard) - len(mine))
    return (
        _SAME * (same + min(name.count("H"), passage.count("H")))
        + _ALIKE_AT_MOST * (len(mine) - same)
        + _SAME_VOWEL * vowels
        + _ENDING * min(beyond, _MAX_ENDING)
        + _MISSING["L"] * max(0, beyond - _MAX_ENDING)
    )


def agreement(name: str, passage: str, least: float = -math.inf) -> float:
    """Return the bits of evidence that the sounds of a passage give for those of a name.

    The passage may go on with an ending that is no part of the name, as words are inflected.

    Args:
        name: Sounds of the name.
        passage: Sounds of the passage.
        least: Less than this is nothing: returned as minus infinity.
    """
    gaps = [_gap(sound) for sound in passage]
    row = list(accumulate(gaps, initial=0.0))
    rest = _most(name, voiced=True)
    for mine in name:
        rest -= _PAIRS[mine + mine]
        missing = _gap(mine)
        left = row[0] + missing
        above, row = row, [left]
        for at, sound in enumerate(passage):
            left = max(above[at] + _PAIRS[mine + sound], above[at + 1] + missing, left + gaps[at])
            row.append(left)
        if max(row) + rest < least:
            return -math.inf
    last = len(row) - 1
    return max(
        row[at] + _ENDING * (last - at) for at in range(max(0, last - _MAX_ENDING), last + 1)
    )


def _pair(one: str, other: str) -> float:
    if one == other:
        return _SAME_VOWEL if one in _VOWELS else _SAME
    if one in _VOWELS and other in _VOWELS:
        return _OTHER_VOWEL
    return _ALIKE.get(frozenset((one, other)), _OTHER)


_PAIRS: Final = {one + other: _pair(one, other) for one in "aiuHPTKSLN" for other in "aiuHPTKSLN"}


def _gap(sound: str) -> float:
    return _MISSING.get(sound, _DROPPED)


def _sounds(word: str, letters: dict[int, str]) -> str:
    """Return the sounds of letters; doubled consonants are one."""
    heard = _DIGRAPH.sub(lambda match: _DIGRAPHS[match.group()], _NASAL.sub("n", word))
    return _REPEATED.sub(r"\1", heard.translate(letters))


def _bones(sounds: str) -> str:
    """Return the consonants by which names are looked up: h comes and goes between scripts."""
    return sounds.translate(_NO_BONES)


@lru_cache(maxsize=8192)
def _shortened(bones: str) -> frozenset[str]:
    """Return the consonants with none, one or (many) two of them left out."""
    found = {bones}
    for depth in range(1, 1 + (0 if len(bones) < 3 else 1 if len(bones) < 7 else 2)):
        for gone in combinations(range(len(bones)), depth):
            found.add("".join(sound for at, sound in enumerate(bones) if at not in gone))
    return frozenset(found)


# --- Passages -------------------------------------------------------------------------------------


def _latin(token: str) -> str:
    from anyascii import anyascii

    token = token.casefold()
    if "\u0370" <= token[0] <= "\u03ff":
        for written, heard in _GREEK.items():
            token = token.replace(written, heard)
    letters = anyascii(token).casefold()
    return "".join(letter for letter in letters if letter.isascii() and letter.isalpha())


@dataclass(frozen=True, slots=True)
class _Heard:
    """What a part of a word sounds like.

    Attributes:
        cut: Where in the word it begins or ends.
        sounds: Its sounds.
        bones: Its consonants.
        most: Bits that it may give at most.
    """

    cut: int
    sounds: str
    bones: str
    most: float

    @classmethod
    def of(cls, part: str, cut: int) -> _Heard:
        """Hear a part of a word."""
        sounds = _heard(part)
        return cls(cut, sounds, _bones(sounds), _most(sounds, voiced=True))


@lru_cache(maxsize=16384)
def _whole(word: str) -> _Heard:
    return _Heard.of(word, 0)


@lru_cache(maxsize=16384)
def _tails(word: str) -> tuple[_Heard, ...]:
    """Return the ends of a word that may begin a name."""
    return tuple(_Heard.of(word[cut:], cut) for cut in _openings(word))


@lru_cache(maxsize=16384)
def _heads(word: str) -> tuple[_Heard, ...]:
    """Return the beginnings of a word that may end a name."""
    return tuple(_Heard.of(word[:cut], cut) for cut in _endings(word))


@lru_cache(maxsize=16384)
def _heard(token: str) -> str:
    return _sounds(_latin(token), _HAN if "\u3400" <= token[0] <= "\u9fff" else _SOUNDS)


def _tokens(text: str) -> Iterator[_Token]:
    """Yield the words of other scripts in a text."""
    before, capital = -1, False
    for match in _TOKEN.finditer(text):
        start, end = match.span()
        written, was_capital = match.group(), capital
        capital = written[0] != written[0].lower()
        gap = text[before:start] if before >= 0 else ""
        joined = 0
        if _GAP.fullmatch(gap):
            joined = 2 if _DOTS.intersection(gap) or (capital and was_capital) else 1
        voiced = not "\u0590" <= written[0] <= "\u07bf"
        loose = _UNSPACED.match(written) is not None
        lower = not capital and written[0] < _LAST_OF_TWO_CASES and written[0].upper() != written[0]
        begin, stop = _carried_ends(written)
        carried = start + begin, start + stop
        yield _Token(start, end, written, voiced, loose, carried, lower, joined)
        before = end


def _carried_ends(word: str) -> tuple[int, int]:
    """Return where the carriers at a word's end begin, and where those at its beginning end."""
    head, tail = _CARRIED_HEAD.match(word), _CARRIED_TAIL.search(word)
    return (tail.start() if tail else len(word)), (head.end() if head else 0)


def _openings(word: str) -> Iterable[int]:
    """Return where in a word a name may begin: behind "and" in Arabic, anywhere in Chinese."""
    if _UNSPACED.match(word):
        return sorted({0, *range(max(0, len(word) - LONGEST), len(word))})
    return (0, 1) if word[0] in _PROCLITICS and len(word) > 3 else (0,)


def _endings(word: str) -> Iterable[int]:
    """Return where in a word a name may end: before a particle in Korean, anywhere in Chinese."""
    if _UNSPACED.match(word):
        return sorted({len(word), *range(1, min(len(word), LONGEST) + 1)})
    if "\uac00" <= word[0] <= "\ud7ff":
        return range(max(1, len(word) - 2), len(word) + 1)
    return (len(word),)
