"""Normalise text for detection only; what is forwarded is never normalised (DESIGN section 3).

Undone: compatibility forms (NFKC), invisible and control characters, piles of combining marks,
letters in boxes, and letters of another script that stand in for Latin ones. Every result keeps a
map back, so that a span found in it can be named in the original text. Readings that may be wrong
(leetspeak, spaced letters, encodings) are alternatives: see `guard.respell` and `guard.decode`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final

from guard.traced import Traced, Weaver

# Letters drawn like a Latin one (Unicode TR39 calls them confusable), by script.
_STRICT: Final = str.maketrans(
    "аеорсухіјѕԁһԛԝӏүѵАВЕКМНОРСТУХІЈЅԌԚԜҮҺӀ"
    "αιονρυκηΑΒΕΖΗΙΚΜΝΟΡΤΥΧ"
    "օոսհցզՍՕՏԼ"
    "ᎠᎡᎢᎥᎩᎪᎫᎬᎳᎷᎻᏀᏃᏏᏒᏙᏚᏞᏟᏢᏦᏴᎻᏲᏧᏔᏳ"
    "ꓐꓑꓓꓔꓖꓗꓙꓚꓜꓝꓟꓠꓡꓢꓣꓦꓧꓪꓫꓬꓮꓰꓲꓳꓴ"
    "ⲟⲣⲥⲭⲀⲞⲢⲤ",
    "aeopcyxijsdhqwlyvABEKMHOPCTYXIJSGQWYHI"
    "aiovpuknABEZHIKMNOPTYX"
    "onuhgqUOSL"
    "DRTiYAJEWMHGZbRVSLCPKBHhdWG"
    "BPDTGKJCZFMNLSRVHWXYAEIOU"
    "opcxAOPC",
)
# These resemble a Latin letter only from afar: read so beside real Latin letters of one word.
_LOOSE: Final = _STRICT | str.maketrans("кмтнвпгёєγτχωεβσ", "kmthbnreeytxwebo")
# Phonetic and small-capital letters: never needed to tell words apart.
_KIN: Final = str.maketrans("ɑɡȷɩʋᴀʙᴄᴅᴇꜰɢʜɪᴊᴋʟᴍɴᴏᴘʀꜱᴛᴜᴠᴡʏᴢ", "agjivabcdefghijklmnoprstuvwyz")
_BOXED: Final = {
    first + index: chr(65 + index) for first in (0x1F150, 0x1F170) for index in range(26)
}
_FLAGS: Final = {0x1F1E6 + index: chr(65 + index) for index in range(26)}

_WORD: Final = re.compile(r"\w+")
_LATIN: Final = re.compile(r"[A-Za-zÀ-ÖØ-öø-ɏ]")
_FOREIGN: Final = re.compile(
    "[\u0370-\u03ff\u0400-\u052f\u0530-\u058f\u13a0-\u13ff\u2c80-\u2cff\ua4d0-\ua4ff]"
)
_TURKISH: Final = re.compile("[ğşçöüİĞŞÇÖÜ]")
_OVERLAY: Final = re.compile("[\u0305\u0332\u0333\u0334-\u0338\u20d0-\u20f0]")
_MARK: Final = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20f0]")
_MARKS: Final = 2
"""Marks that a letter bears in an alphabet of Europe or in Vietnamese, at most."""
_SUSPECT: Final = re.compile(
    "[" + "".join(map(chr, [*_KIN, *_BOXED, *_FLAGS])) + "ı]|" + _OVERLAY.pattern
    + "|" + _MARK.pattern + "{3}"
)  # fmt: skip
_ODD: Final = re.compile(r"[\t\n\r -~]?[^\t\n\r -~]+")
_KEPT_CONTROLS: Final = frozenset("\t\n\r")


def normalise(text: str) -> Traced:
    """Normalise `text`; ordinary text comes back as it is, without a map."""
    if _is_plain(text):
        return Traced(text)
    weaver, at = Weaver(Traced(text)), 0
    for odd in _ODD.finditer(text):
        weaver.keep(at, odd.start())
        for start, end in _clusters(text, *odd.span()):
            if end - start == 1 and text[start].isascii() and text[start].isprintable():
                weaver.keep(start, end)
            else:
                weaver.put(_plain_cluster(text[start:end]), start, end)
        at = odd.end()
    weaver.keep(at, len(text))
    woven = weaver.traced()
    return Traced(_fold_lookalikes(woven.text), woven.runs)


def _is_plain(text: str) -> bool:
    if text.isascii():
        return text.isprintable() or not any(_is_invisible(char) for char in set(text))
    return (
        unicodedata.is_normalized("NFKC", text)
        and not any(_is_invisible(char) for char in set(text))
        and _SUSPECT.search(text) is None
        and (_FOREIGN.search(text) is None or _LATIN.search(text) is None)
    )


@lru_cache(maxsize=4096)
def _is_invisible(char: str) -> bool:
    """True for format and control characters that no reader sees, and for variation selectors."""
    if char in _KEPT_CONTROLS:
        return False
    code = ord(char)
    return (
        unicodedata.category(char) in ("Cc", "Cf")
        or char in "\u034f\u115f\u1160\u3164\uffa0"
        or 0xFE00 <= code <= 0xFE0F
        or 0xE0100 <= code <= 0xE01EF
    )


def _clusters(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Split into a character and what is put on it or can't be seen: what NFKC may compose."""
    bounds = [
        index
        for index in range(start, end)
        if index == start or not (unicodedata.combining(text[index]) or _is_invisible(text[index]))
    ]
    return list(zip(bounds, [*bounds[1:], end], strict=True))


@lru_cache(maxsize=4096)
def _plain_cluster(cluster: str) -> str:
    seen = "".join(char for char in cluster if not _is_invisible(char))
    composed = unicodedata.normalize("NFKC", seen).translate(_BOXED)
    if len(cluster) == 1 or len(composed) == 1:
        # One regional letter is a letter; two are a flag, and stand in two clusters: see below.
        return "".join(char for char in composed if not _is_invisible(char))
    composed = _OVERLAY.sub("", composed) if composed[:1].isalpha() else composed
    if composed and ord(composed[0]) < 0x530 and _count_marks(seen) > _MARKS:
        return _MARK.sub("", unicodedata.normalize("NFKD", composed))
    return "".join(char for char in composed if not _is_invisible(char))


def _count_marks(text: str) -> int:
    return len(_MARK.findall(unicodedata.normalize("NFD", text)))


def _fold_lookalikes(text: str) -> str:
    """Write disguised words in Latin, character by character; honest words are left alone."""
    text = _LONE_FLAG.sub(lambda match: match[0].translate(_FLAGS), text.translate(_KIN))
    if "ı" in text and not _TURKISH.search(text):
        text = text.replace("ı", "i")
    if not (_FOREIGN.search(text) and _LATIN.search(text)):
        return text
    words = [word for word in _WORD.findall(text) if not word.isdigit()]
    latin = sum(_LATIN.search(word) is not None for word in words)
    honest = sum(not _LATIN.search(word) and not _could_be_latin(word) for word in words)
    return _WORD.sub(lambda match: _fold_word(match[0], latin > honest), text)


_LONE_FLAG: Final = re.compile(
    "(?<![\U0001f1e6-\U0001f1ff])[\U0001f1e6-\U0001f1ff](?![\U0001f1e6-\U0001f1ff])"
)


def _fold_word(word: str, among_latin: bool) -> str:
    if not _FOREIGN.search(word):
        return word
    if _LATIN.search(word):
        return word.translate(_LOOSE)
    return word.translate(_STRICT) if among_latin and _could_be_latin(word) else word


def _could_be_latin(word: str) -> bool:
    """True if every letter is drawn like a Latin one; a lone Greek letter is a symbol."""
    symbol = len(word) == 1 and "\u0370" <= word <= "\u03ff"
    return not symbol and _FOREIGN.search(word.translate(_STRICT)) is None
