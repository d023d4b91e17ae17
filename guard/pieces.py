"""A question in pieces: strings, variables, numbered parts or tags that are to be put together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Final, NamedTuple

from guard.traced import Altered, Place, Traced, Weaver, merged

_NAME: Final = (
    r"(?:(?:part|piece|half|chunk|fragment|segment|section|string|str|text|txt|var|variable|word|"
    r"token|line|msg|message|input|prefix|suffix|head|tail|start|end|left|right|first|second|"
    r"third|fourth|last|beginning|ending)"
    r"[ _\-#]{0,2}(?:one|two|three|four|first|second|third|\d{1,2}|[a-f]|i{1,3}|iv|"
    r"half|part|piece|chunk|fragment|string|variable)?"
    r"|(?:1st|2nd|3rd|4th)[ _-](?:half|part|piece|chunk|fragment|string)"
    r"|[a-z](?:_?\d{1,2}|_[a-f])?|\$\w{1,12}|\w{1,10}[_-]?\d)"
)
_QUOTED: Final = (
    r"\"[^\"\n]{1,600}\"|(?<![A-Za-z])'(?:[^'\n]|(?<=[a-z])'(?=[a-z])){1,600}'(?![A-Za-z])"
    r"|“[^“”\n]{1,600}”|‘[^‘’\n]{1,600}’|«[^«»\n]{1,600}»|„[^„“”\n]{1,600}[“”]|`[^`\n]{1,600}`"
)
_SIGN: Final = (
    r"(?::=|<-|←|->|=>|→|=|:|\b(?:is|be|equals|holds|contains|says)\b(?=\s{0,3}[\"'“‘«„`]))"
)
_NAMED: Final = re.compile(
    rf"(?<![\w$'’])[\"'\[(]?(?P<name>{_NAME})[\"'\])]?[ \t]{{0,3}}{_SIGN}[ \t]{{0,3}}\n?"
    rf"(?P<quoted>{_QUOTED})?",
    re.IGNORECASE,
)
_STRING: Final = re.compile(_QUOTED)
_TAGGED: Final = re.compile(r"<(\w{1,12})>([^<>]{1,600})</\1>")
_GLUE: Final = re.compile(
    r"[\s,;+&.|\[\]()]{0,8}(?:and|plus|then|concat|join)?[\s,;+&.|\[\](]{0,8}"
)
_PIECE_MARKS: Final = re.compile(
    r"[\"”“«»`=←+|]|->|</|<-|(?<![A-Za-z])['‘]\w[^'‘’\n]{0,600}['’][ ,;.+)\]\n]"
)
_PIECE_WORDS: Final = tuple(
    "part piece half chunk fragment segment string variable join concat combin merg append glu "
    "stitch assembl together remove".split()
)
_JOIN_WORDS: Final = re.compile(
    r"\b(?:join|concat\w*|combin\w+|merg\w+|append\w*|glue\w*|together|stitch\w*|assembl\w+|put)\b"
    r"|[a-z]\w?\s?\+\s?[a-z]",
    re.IGNORECASE,
)
_JOIN_CUE: Final = re.compile(
    r"\b(?:join|concat|combin|merg|append|glu(?:e|ing)|stitch|assembl|put\b.{0,40}\btogether|"
    r"remove the|without the)|\b[a-z1-9] ?\+ ?[b-z2-9]\b",
    re.IGNORECASE,
)
_BAR: Final = re.compile(
    r"[ \t]{0,3}(?:\|+|\+{2,3}|(?<=[a-z\"'] )\+(?= [a-z\"'])|\.{3,}|…|/{2}|~+|#+)[ \t]{0,3}"
)
_NUMBERED: Final = re.compile(
    r"(?:^|[ \t\n])[\[({<]?(?:[a-d]|[1-9]|i{1,3})[\])}>.][ \t]{0,3}"
    r"|[ \t,;]{0,3}\b[a-d][ \t]{0,3}->[ \t]{0,3}"
)
_FEW: Final = 8
_BEHIND: Final = " \t\r\n;,+([\"'”’»`"
_LINKS: Final = (" and", " let", " then", " set", " var", " const")
_SIGNS: Final = (":", "=", "<-", "←", "->", "→", *"\"'“‘«„`")
_MARK: Final = re.compile(r"[\"“”`]")


def piece_together(source: Traced) -> Altered | None:
    """Join what `source` holds in named or quoted pieces; None if it holds no such pieces.

    Returns:
        One text: the pieces without and with a blank between, in their order and, where their
        names say another, in that too.
    """
    if not _shows_pieces(source.text):
        return None
    weaver, stretches = Weaver(source), list[Place]()
    for pieces in _piece_lists(source.text):
        for order in _orders(pieces):
            for separator in ("", " ") if len(pieces) <= _FEW else ("",):
                _weave(weaver, order, separator)
        stretches += [piece.place for piece in pieces]
    if not stretches:
        return None
    return Altered(weaver.traced(), tuple(merged(stretches)))


def _shows_pieces(text: str) -> bool:
    lower = text.lower()
    return any(word in lower for word in _PIECE_WORDS) or _PIECE_MARKS.search(text) is not None


def _may_name(text: str) -> bool:
    """False only where `_NAMED` finds nothing: it wants a sign, or a word before a quotation."""
    return any(sign in text for sign in _SIGNS)


def _are_a_series(named: list[re.Match[str]]) -> bool:
    """True for a and b, part 1 and part 2, first and second half."""
    names = [re.sub(r"\W", "", match["name"].lower()) for match in named]
    return any(
        (one[:-1] == other[:-1] and ord(other[-1]) - ord(one[-1]) == 1)
        or (one.startswith(("first", "1st")) and other.startswith(("second", "2nd")))
        for one, other in pairwise(names)
    )


class _Piece(NamedTuple):
    name: str
    place: Place


def _piece_lists(text: str) -> Iterator[list[_Piece]]:
    named = list(_NAMED.finditer(text)) if _may_name(text) else []
    quoted = [match for match in named if match["quoted"]]
    if len(quoted) >= 2:
        yield [_Piece(match["name"].lower(), _inside(match, "quoted")) for match in quoted]
        if _hold_quotes(text, quoted):
            yield list(_unquoted(text, quoted))
    elif len(named) >= 2 and (_JOIN_WORDS.search(text) or _are_a_series(named)):
        yield list(_unquoted(text, named))
    tagged = list(_TAGGED.finditer(text))
    if len(tagged) >= 2:
        yield [_Piece(match[1].lower(), match.span(2)) for match in tagged]
    if len(quoted) < 2:
        yield from _neighbours(text)
    if _JOIN_CUE.search(text):
        yield from _separated(text)


def _hold_quotes(text: str, quoted: list[re.Match[str]]) -> bool:
    """True if a quoted piece seems to go on behind its second quotation mark."""
    ends = [match.start() for match in quoted[1:]] + [len(text)]
    return any(
        _MARK.search(text, match.end("quoted"), end) is not None
        for match, end in zip(quoted, ends, strict=True)
    )


def _unquoted(text: str, named: list[re.Match[str]]) -> Iterator[_Piece]:
    """Pieces that end where the next one's name begins, or with their line."""
    ends = [match.start() for match in named[1:]] + [len(text)]
    for match, end in zip(named, ends, strict=True):
        start = match.start("quoted") + 1 if match["quoted"] else match.end()
        newline = text.find("\n", start, end)
        end = newline if newline >= 0 else end
        end = start + len(_trimmed(text[start:end]))
        if start < end:
            yield _Piece(match["name"].lower(), (start, end))


def _trimmed(piece: str) -> str:
    piece = piece.rstrip(_BEHIND)
    for link in _LINKS:
        if piece.endswith(link):
            return piece.removesuffix(link).rstrip(_BEHIND)
    return piece


def _separated(text: str) -> Iterator[list[_Piece]]:
    """Pieces with bars, dots or numbers between: `Who is Har | ry Potter`, `[1] Who [2] is`."""
    for pattern in (_BAR, _NUMBERED):
        ends = [match.span() for match in pattern.finditer(text)]
        if ends:
            starts = [0, *(end for _, end in ends)]
            stops = [*(start for start, _ in ends), len(text)]
            spans = list(zip(starts, stops, strict=True))
            yield [_Piece("", span) for span in spans if span[0] < span[1]]


def _neighbours(text: str) -> Iterator[list[_Piece]]:
    """Strings in a row: `"Who is Har" + "ry Potter"`, `["a", "b"]`."""
    group: list[_Piece] = []
    end = -1
    for match in _STRING.finditer(text):
        if group and _GLUE.fullmatch(text, end, match.start()) is None:
            if len(group) >= 2:
                yield group
            group = []
        group.append(_Piece("", _inside(match, 0)))
        end = match.end()
    if len(group) >= 2:
        yield group


def _inside(match: re.Match[str], group: int | str) -> Place:
    start, end = match.span(group)
    return start + 1, end - 1


def _orders(pieces: list[_Piece]) -> list[list[_Piece]]:
    """The order that stands, and the one that few, named pieces say."""
    by_name = sorted(pieces, key=lambda piece: piece.name)
    return [pieces, by_name] if by_name != pieces and len(pieces) <= _FEW else [pieces]


def _weave(weaver: Weaver, pieces: list[_Piece], separator: str) -> None:
    for number, piece in enumerate(pieces):
        if number:
            weaver.say(separator)
        weaver.keep(*piece.place)
    weaver.say("\n")
