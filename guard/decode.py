"""Encoded stretches of a text, decoded in place: base64, hex, escapes, codes, Morse, hidden tags.

A stretch is decoded only if what comes out reads like text, so that hashes, identifiers and
numbers stay as they are. Payloads are decoded again, up to three levels deep, ciphers included.
Each finder looks for a telling sign first; all are linear in the text's length.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
from collections.abc import Callable, Iterator
from typing import Final
from urllib.parse import unquote_to_bytes

from guard.ciphers import solve
from guard.letters import englishness
from guard.traced import Altered, Place, Traced, merged, places_in, substituted

DEPTH: Final = 3
"""Levels of encoding that are undone."""

SHORTEST: Final = 3
"""Characters that a decoded stretch must have."""

_UNLIKELY: Final = -0.6
"""Nats per pair of letters below which a code that numbers could be is not taken for letters."""

Edit = tuple[int, int, str]


def decode(source: Traced) -> Altered | None:
    """Decode every encoded stretch of `source`; None if there is none."""
    text, stretches = source, list[Place]()
    for _ in range(DEPTH):
        edits = _edits(text.text)
        if not edits:
            break
        for start, end, _new in edits:
            stretches += places_in(source, text, start, end)
        text = substituted(text, edits)
    return Altered(text, tuple(merged(stretches))) if stretches else None


def _edits(text: str) -> list[Edit]:
    """What each finder found; the earlier finder has a stretch that two claim."""
    found: list[Edit] = []
    if _ANY_SIGN.search(text) is None:
        return found
    for sign, find in _FINDERS:
        if sign.search(text) is not None:
            found += find(text)
    if len(found) < 2:
        return found
    kept, at = [], -1
    for edit in sorted(found, key=lambda edit: (edit[0], -edit[1])):
        if edit[0] >= at:
            kept.append(edit)
            at = edit[1]
    return kept


def read_bytes(data: bytes) -> str | None:
    """Return the text that `data` spells, or None if it spells none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return _read_wide(data)
    return text if _reads_like_text(text) else _read_wide(data)


def _read_wide(data: bytes) -> str | None:
    """Text in UTF-16, which has a zero byte beside each of its Latin letters."""
    if len(data) < 8 or len(data) % 2 or data.count(0) * 3 < len(data):
        return None
    for codec in ("utf-16-le", "utf-16-be"):
        try:
            text = data.decode(codec).lstrip("\ufeff")
        except UnicodeDecodeError:
            continue
        if _reads_like_text(text):
            return text
    return None


def _reads_like_text(text: str) -> bool:
    if len(text) < SHORTEST or not text.replace("\n", " ").replace("\t", " ").isprintable():
        return False
    return 5 * sum(char.isalnum() or char in " '-,.?\n" for char in text) >= 4 * len(text)


def _is_likely(text: str) -> bool:
    """True for letters that could be words."""
    letters = sum(char.isalpha() for char in text)
    return letters >= max(SHORTEST, 0.6 * len(text)) and englishness(text) > _UNLIKELY


def _is_payload(text: str) -> bool:
    """True for words, and for letters and digits that are in turn the code of words."""
    return _is_likely(text) or (
        len(text) >= 8
        and (
            _unbase64(text.strip()) is not None
            or any(_hex(text))
            or solve(Traced(text)) is not None
        )
    )


# --- Base64, base32 -------------------------------------------------------------------------------

_BASE64_TOKEN: Final = re.compile(r"(?<![A-Za-z0-9+/_-])={0,2}[A-Za-z0-9+/_-]{8,}={0,2}")
_BASE64_GROUPS: Final = re.compile(
    r"(?<![A-Za-z0-9+/=])(?:[A-Za-z0-9+/]{4}){1,30}(?:\s{1,3}(?:[A-Za-z0-9+/]{4}){1,30}){1,}"
    r"(?:\s{0,2}[A-Za-z0-9+/]{2,3}={1,2})?(?![A-Za-z0-9+/=])"
)
_BASE32_TOKEN: Final = re.compile(r"(?<![A-Za-z0-9])[A-Z2-7]{8,}={0,6}(?![A-Za-z0-9])")
_MIXED: Final = re.compile(r"[a-z][A-Z]|[A-Z]{2}[a-z]|[0-9+/=]")
_ROT13: Final = str.maketrans(
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "nopqrstuvwxyzabcdefghijklmNOPQRSTUVWXYZABCDEFGHIJKLM",
)


def _base64(text: str) -> Iterator[Edit]:
    for match in _BASE64_TOKEN.finditer(text):
        token = match[0]
        if _MIXED.search(token) is None:
            continue
        read = _unbase64(token) or _unbase64(token[::-1]) or _unbase64(token.translate(_ROT13))
        if read is not None:
            yield *match.span(), read


def _base64_groups(text: str) -> Iterator[Edit]:
    """Base64 that is wrapped over lines or broken into groups."""
    for match in _BASE64_GROUPS.finditer(text):
        joined = "".join(match[0].split())
        if _MIXED.search(joined) is not None and (read := _unbase64(joined)) is not None:
            yield *match.span(), read


def _unbase64(token: str) -> str | None:
    body = token.rstrip("=").replace("-", "+").replace("_", "/")
    if len(body) % 4 == 1 or "=" in body:
        return None
    try:
        return read_bytes(base64.b64decode(body + "=" * (-len(body) % 4), validate=True))
    except binascii.Error:
        return None


def _base32(text: str) -> Iterator[Edit]:
    for match in _BASE32_TOKEN.finditer(text):
        body = match[0].rstrip("=")
        try:
            read = read_bytes(base64.b32decode(body + "=" * (-len(body) % 8)))
        except binascii.Error:
            continue
        if read is not None and read.isascii() and _is_payload(read):
            yield *match.span(), read


# --- Numbers that stand for characters ------------------------------------------------------------

_HEX_RUN: Final = re.compile(
    r"(?<![0-9A-Za-z])(?:0[xX])?(?:[0-9A-Fa-f]{2}){4,}(?![0-9A-Za-z])"
    r"|(?<![0-9A-Za-z])(?:(?:0[xX])?[0-9A-Fa-f]{2}[\s,:;|-]{1,3}){2,}(?:0[xX])?[0-9A-Fa-f]{2}"
    r"(?![0-9A-Za-z])"
)
_HEX_GROUPS: Final = re.compile(
    r"(?<![0-9A-Za-z])(?:(?:[0-9A-Fa-f]{2}){1,8}[ \n]){2,}(?:[0-9A-Fa-f]{2}){1,8}(?![0-9A-Za-z])"
)
_HEX_PREFIX: Final = re.compile(r"0[xX]|[^0-9A-Fa-f]")
_BINARY_RUN: Final = re.compile(r"(?<![0-9A-Za-z])[01](?:0b|[01\s,_|-])*[01](?![0-9A-Za-z])")
_BITS: Final = re.compile(r"[01]+")
_NUMBERS: Final = re.compile(r"(?<![\w.])(?:\d{2,3}[\s,;|-]{1,3}){4,}\d{2,3}(?![\w.]\d|\w)")


def _hex(text: str) -> Iterator[Edit]:
    for pattern in (_HEX_RUN, _HEX_GROUPS):
        for match in pattern.finditer(text):
            digits = _HEX_PREFIX.sub("", match[0])
            if len(digits) % 2:
                continue
            read = read_bytes(bytes.fromhex(digits)) or read_bytes(bytes.fromhex(digits[::-1]))
            if read is not None and _is_payload(read):
                yield *match.span(), read


def _binary(text: str) -> Iterator[Edit]:
    for match in _BINARY_RUN.finditer(text):
        groups = _BITS.findall(match[0].replace("0b", " "))
        if len(match[0]) < 7 * SHORTEST:
            continue
        if len(groups) == 1 or any(len(group) not in (7, 8) for group in groups):
            bits = "".join(groups)
            groups = [bits[at : at + 8] for at in range(0, len(bits), 8)]
        read = read_bytes(bytes(int(group, 2) for group in groups))
        if read is not None and _is_payload(read):
            yield *match.span(), read


def _numbers(text: str) -> Iterator[Edit]:
    """ASCII codes, decimal or octal."""
    for match in _NUMBERS.finditer(text):
        numbers = re.findall(r"\d+", match[0])
        for base in (10, 8):
            try:
                codes = [int(number, base) for number in numbers]
            except ValueError:
                continue
            if all(32 <= code < 127 for code in codes):
                read = "".join(map(chr, codes))
                if _reads_like_text(read) and _is_payload(read):
                    yield *match.span(), read
                    break


# --- Escapes --------------------------------------------------------------------------------------

_PERCENT: Final = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_LONE_PERCENT: Final = re.compile(r"\s?%\d\d[\s.,;]?")
"""Percentages as Turkish and Basque write them."""
_PLUSES: Final = re.compile(r"(?<![^\s\"'(])[\w.,'!?%-]{1,200}(?:\+[\w.,'!?%-]{1,200}){1,200}")
_ENTITY: Final = re.compile(r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,24});")
_ESCAPE: Final = re.compile(
    r"(?:\\u\{([0-9A-Fa-f]{1,6})\}|\\u([0-9A-Fa-f]{4})|\\U([0-9A-Fa-f]{8})|\\x([0-9A-Fa-f]{2})"
    r"|U\+([0-9A-Fa-f]{4,6})(?:[ ,]{1,2}(?=U\+))?|\\([0-7]{3}))"
)
_QUOTED: Final = re.compile(r"(?:=[0-9A-F]{2}){2,}")


def _percent(text: str) -> Iterator[Edit]:
    for match in _PERCENT.finditer(text):
        if _LONE_PERCENT.fullmatch(text, max(match.start() - 1, 0), match.end() + 1):
            continue
        try:
            read = unquote_to_bytes(match[0]).decode("utf-8")
        except UnicodeDecodeError:
            continue
        if read.replace("\n", " ").replace("\t", " ").isprintable():
            yield *match.span(), read
    for match in _PLUSES.finditer(text):
        if "%" in match[0] or match[0].count("+") > 1:
            for plus in re.finditer(r"\+", match[0]):
                at = match.start() + plus.start()
                yield at, at + 1, " "


def _entities(text: str) -> Iterator[Edit]:
    for match in _ENTITY.finditer(text):
        read = html.unescape(match[0])
        if read != match[0]:
            yield *match.span(), read


def _escapes(text: str) -> Iterator[Edit]:
    for match in _ESCAPE.finditer(text):
        digits = next(group for group in match.groups() if group)
        code = int(digits, 8 if match[6] else 16)
        if code < 0x110000 and (chr(code).isprintable() or code in (9, 10)):
            yield *match.span(), chr(code)


def _quoted_printable(text: str) -> Iterator[Edit]:
    for match in _QUOTED.finditer(text):
        read = read_bytes(bytes.fromhex(match[0].replace("=", "")))
        if read is not None:
            yield *match.span(), read


def decode_tags(text: str) -> str:
    """Return the ASCII text that invisible tag characters (U+E0020 to U+E007E) spell."""
    return "".join(chr(ord(char) - 0xE0000) for char in _TAGS.findall(text))


_TAGS: Final = re.compile("[\U000e0020-\U000e007e]")


# --- Morse and pig Latin --------------------------------------------------------------------------

_MORSE: Final = dict(
    zip(
        ".- -... -.-. -.. . ..-. --. .... .. .--- -.- .-.. -- -. --- .--. --.- .-. ... - ..- "
        "...- .-- -..- -.-- --.. ----- .---- ..--- ...-- ....- ..... -.... --... ---.. ----. "
        "..--.. .-.-.- --..-- .----. -....-".split(),
        "abcdefghijklmnopqrstuvwxyz0123456789?.,'-",
        strict=True,
    )
)
_MORSE_RUN: Final = re.compile(
    r"(?<![\w.\-])[.\-·•−–—_]{1,6}(?:[ \t/|\n]{1,7}[.\-·•−–—_]{1,6}){3,}"
)
_MORSE_SIGNS: Final = str.maketrans("·•−–—_", "..----")
_PIG_WORD: Final = re.compile(r"[A-Za-z]{2,}ay\b")
_PIG_RUN: Final = re.compile(r"(?:\b[A-Za-z]{2,}ay\b[\s,.?!'\"-]*){3,}")
_PIG_ENDS: Final = re.compile(
    r"(?:sch|shr|spr|str|thr|scr|spl|[cgptsw]h|[bcdfgpt]r|[bcfgps]l|s[cfklmnptw]|tw|qu|kn|wr|[b-df-hj-np-tv-z])$"
)


def _morse(text: str) -> Iterator[Edit]:
    for match in _MORSE_RUN.finditer(text):
        signs = match[0].translate(_MORSE_SIGNS)
        words = re.split(r"\s*[/|\n]\s*|\s{2,}", signs)
        read = " ".join("".join(_MORSE.get(sign, "*") for sign in word.split()) for word in words)
        if "*" not in read and _is_likely(read):
            yield *match.span(), read


def _pig_latin(text: str) -> Iterator[Edit]:
    for run in _PIG_RUN.finditer(text):
        for match in _PIG_WORD.finditer(text, *run.span()):
            yield *match.span(), _from_pig(match[0][:-2])


def _from_pig(stem: str) -> str:
    if stem.endswith(("w", "y")) and stem[0].lower() in "aeiou":
        return stem[:-1]
    moved = _PIG_ENDS.search(stem)
    if moved is None:
        return stem
    guesses = {stem[at:] + stem[:at] for at in (moved.start(), len(stem) - 1)}
    return max(sorted(guesses), key=englishness)


# --- All of them ----------------------------------------------------------------------------------


def _deep(find: Callable[[str], Iterator[Edit]]) -> Callable[[str], Iterator[Edit]]:
    """Solve letter ciphers in what was decoded, and keep the text as decoded beside it."""

    def edits(text: str) -> Iterator[Edit]:
        for start, end, read in find(text):
            solved = solve(Traced(read), eager=True)
            yield start, end, read if solved is None else f"{read}\n{solved.traced.text}"

    return edits


_ANY_SIGN: Final = re.compile(
    r"[0-9%&\\+=/]|[a-z][A-Z]|[A-Z]{5}|[.\-·•−–—_][ /|][.\-·•−–—_]|ay\W+\w+ay\b"
)
"""What none of the finders can do without."""
_FINDERS: Final[tuple[tuple[re.Pattern[str], Callable[[str], Iterator[Edit]]], ...]] = (
    (re.compile("%[0-9A-Fa-f]{2}"), _percent),
    (re.compile("&#|&[a-z]+;"), _entities),
    (re.compile(r"\\[uUx0-7]|U\+[0-9A-Fa-f]{4}"), _escapes),
    (re.compile(r"(?:=[0-9A-F]{2}){2}"), _quoted_printable),
    (re.compile(r"[01]{7}"), _deep(_binary)),
    (
        re.compile(r"[0-9A-Fa-f]{2}[\s,:;|-]{1,3}(?:0[xX])?[0-9A-Fa-f]{2}\b|[0-9A-Fa-f]{8}"),
        _deep(_hex),
    ),
    (re.compile(r"\d\d[\s,;|-]{1,3}\d\d"), _deep(_numbers)),
    (re.compile(r"[A-Z2-7]{8}"), _deep(_base32)),
    (_MIXED, _deep(_base64)),
    (_MIXED, _deep(_base64_groups)),
    (re.compile(r"[.\-·•−–—_][ /|][.\-·•−–—_]"), _deep(_morse)),
    (re.compile(r"ay\W+\w+ay\b"), _pig_latin),
)
