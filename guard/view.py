"""The readings of a request: everything that detection looks at, and what of the request it shows.

Each segment is read as it stands (normalised) and, where it shows a sign of it, respelt, pieced
together, decoded or deciphered, up to three steps deep. Messages are also read one after another,
all roles and the user's alone, so that a question split over turns or parts is seen whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal, NamedTuple

from guard.ciphers import solve
from guard.decode import decode, decode_tags
from guard.json_text import read_json
from guard.normalise import normalise
from guard.pieces import piece_together
from guard.respell import respell
from guard.rewrite import all_but_final_mark
from guard.traced import Place, Traced, Weaver, merged
from guard.types import Segment, Span

Kind = Literal["segment", "decoded", "leet", "joined", "conversation"]

MAX_ALTERNATIVES: Final = 16
"""Alternative readings of one text; what is found beyond them is read as one text."""

STEPS: Final = 3
"""Guesses that may build on one another: decoded, then deciphered, then respelt."""

ALTERNATIVES_FACTOR: Final = 12
ALTERNATIVES_FLOOR: Final = 100_000
"""All alternatives of a text together may be so many times its length, and so many characters
more; what would go beyond that is not read, and the request is not read whole."""

PIECES_IN_GUESS: Final = 2_000
"""Characters of a guess that may itself hold a question in pieces."""

WINDOW: Final = 6
STRIDE: Final = 3
"""Messages in a conversation reading, and from one to the next: any four stand in one together."""

SEAM: Final = 300
"""Characters on each side of a seam where a word may be split between two messages."""

_MESSAGE: Final = re.compile(r"messages/(\d+)/(.+)")
_NOT_SAID: Final = re.compile(r"(?:^|/)(?:id|tool_call_id|name)$")


class Source(NamedTuple):
    """A segment's place in the text that a reading was made from."""

    start: int
    end: int
    segment: Segment
    normalised: Traced


@dataclass(frozen=True, slots=True)
class Reading:
    """One text to detect on.

    Attributes:
        kind: How it came about.
        traced: The text, and the way back to the normalised text of its sources.
        sources: The segments that it shows, in order.
        stretches: Places in the sources' text that an alternative reads in another way.
        unread: Characters of further alternatives that were too many to be read.
    """

    kind: Kind
    traced: Traced
    sources: tuple[Source, ...]
    stretches: tuple[Place, ...] = ()
    unread: int = 0

    @property
    def text(self) -> str:
        """The text."""
        return self.traced.text

    @property
    def is_own(self) -> bool:
        """True if it shows one segment and nothing else."""
        return len(self.sources) == 1

    def spans(self, start: int, end: int) -> list[Span]:
        """Return the characters, as sent, that `text[start:end]` stands for."""
        return [span for place in self.traced.places(start, end) for span in self._spans(place)]

    def changed(self) -> list[Span]:
        """Return what the reading reads in another way; of an ordinary one all but a final mark."""
        if not self.stretches:
            return [source_span(source) for source in self.sources]
        return [span for place in self.stretches for span in self._spans(place)]

    def _spans(self, place: Place) -> Iterator[Span]:
        for source in self.sources:
            start, end = max(place[0], source.start), min(place[1], source.end)
            if start < end:
                found = source.normalised.places(start - source.start, end - source.start)
                yield from (Span(source.segment.path, *one) for one in found)


def source_span(source: Source) -> Span:
    """All of a segment but a final mark, as sent."""
    return Span(source.segment.path, *all_but_final_mark(source.segment.text))


def readings(segments: Sequence[Segment], roles: Sequence[str] = ()) -> list[Reading]:
    """Return every reading of a request's segments.

    Args:
        segments: All its texts.
        roles: Role of each chat message; empty for other requests, whose prompts stand alone.

    Returns:
        For each segment, in order, its own reading with its alternatives behind it; then the
        conversation's. Only the readings of kind `segment` are the request itself.
    """
    own: list[Source] = []
    found: list[Reading] = []
    for segment in segments:
        normalised = normalise(segment.text)
        source = Source(0, len(normalised.text), segment, normalised)
        own.append(source)
        alternatives, unread = _alternatives(normalised.text, (source,))
        found.append(Reading("segment", Traced(normalised.text), (source,), unread=unread))
        found += alternatives
        found += _tags(source)
    if roles and len(own) > 1:
        found += _conversation(own, roles)
    return found


def plain_readings(segments: Sequence[Segment]) -> list[Reading]:
    """Return each segment as it stands, normalised, and no other reading."""
    found: list[Reading] = []
    for segment in segments:
        normalised = normalise(segment.text)
        source = Source(0, len(normalised.text), segment, normalised)
        found.append(Reading("segment", Traced(normalised.text), (source,)))
    return found


# --- Alternatives ---------------------------------------------------------------------------------


class _Guess(NamedTuple):
    kind: Kind
    traced: Traced
    stretches: tuple[Place, ...]


def _respell(source: Traced) -> _Guess | None:
    found = respell(source)
    if found is None:
        return None
    respelt, joined = found
    return _Guess("joined" if joined else "leet", respelt.traced, respelt.stretches)


def _piece_together(source: Traced) -> _Guess | None:
    found = piece_together(source)
    return None if found is None else _Guess("joined", found.traced, found.stretches)


def _decode(source: Traced) -> _Guess | None:
    found = decode(source)
    return None if found is None else _Guess("decoded", found.traced, found.stretches)


def _solve(source: Traced) -> _Guess | None:
    found = solve(source, eager=source.parent is not None)
    return None if found is None else _Guess("decoded", found.traced, found.stretches)


def _read_json(source: Traced) -> _Guess | None:
    found = None if source.parent is not None else read_json(source)
    return None if found is None else _Guess("decoded", found.traced, found.stretches)


_Guesser = Callable[[Traced], _Guess | None]
_Node = tuple[Traced, _Guesser | None]
"""A text and what made it."""

_GUESSERS: Final[tuple[_Guesser, ...]] = (
    _decode,
    _solve,
    _respell,
    _piece_together,
    _read_json,
)


def _alternatives(text: str, sources: tuple[Source, ...]) -> tuple[list[Reading], int]:
    """Guess at other readings of `text`, and at readings of those.

    Returns:
        The readings, and how many characters of further ones are left unread.
    """
    root = Traced(text)
    found: list[_Guess] = []
    seen = {text}
    room, unread = ALTERNATIVES_FACTOR * len(text) + ALTERNATIVES_FLOOR, 0
    level: list[_Node] = [(root, None)]
    for _ in range(STEPS):
        following: list[_Node] = []
        for source, by in level:
            for guesser in _GUESSERS:
                # Nothing undoes its own work: a cipher solved twice is the cipher again.
                guess = None if guesser is by or _is_far(source, guesser) else guesser(source)
                if guess is None or guess.traced.text in seen or not guess.traced.text.strip():
                    continue
                seen.add(guess.traced.text)
                if len(guess.traced.text) > room:
                    unread += len(guess.traced.text)
                    continue
                room -= len(guess.traced.text)
                found.append(guess._replace(stretches=_grounded(source, guess.stretches)))
                following.append((guess.traced, guesser))
        level = following
        if not level:
            break
    return [_reading(guess, sources) for guess in _bounded(found, root)], unread


def _is_far(source: Traced, guesser: _Guesser) -> bool:
    """True where pieces would be looked for in a long guess: all its words would become some."""
    return (
        guesser is _piece_together
        and source.parent is not None
        and len(source.text) > PIECES_IN_GUESS
    )


def _grounded(source: Traced, stretches: tuple[Place, ...]) -> tuple[Place, ...]:
    if source.parent is None:
        return stretches
    return tuple(merged(place for one in stretches for place in source.places(*one)))


def _bounded(guesses: list[_Guess], root: Traced) -> list[_Guess]:
    """Keep the number of readings within bounds: those beyond become one, each from its line."""
    if len(guesses) <= MAX_ALTERNATIVES:
        return guesses
    kept, rest = guesses[: MAX_ALTERNATIVES - 1], guesses[MAX_ALTERNATIVES - 1 :]
    weaver = Weaver(root)
    for guess in rest:
        start, end = guess.stretches[0][0], guess.stretches[-1][1]
        weaver.put(guess.traced.text, start, end)
        weaver.say("\n")
    places = merged(place for guess in rest for place in guess.stretches)
    return [*kept, _Guess("decoded", weaver.traced(), tuple(places))]


def _reading(guess: _Guess, sources: tuple[Source, ...]) -> Reading:
    return Reading(guess.kind, guess.traced, sources, guess.stretches)


def _tags(source: Source) -> Iterator[Reading]:
    """What invisible tag characters spell: normalisation drops them, some models read them."""
    text = source.segment.text
    if not text.isascii() and (hidden := decode_tags(text)):
        weaver = Weaver(Traced(source.normalised.text))
        weaver.say(hidden)
        yield Reading("decoded", weaver.traced(), (source,))


# --- Conversations --------------------------------------------------------------------------------


class _Turn(NamedTuple):
    role: str
    sources: list[Source]


def _conversation(own: Sequence[Source], roles: Sequence[str]) -> Iterator[Reading]:
    """Read messages one after another; a request of one message in one part has no such reading."""
    turns = _turns(own, roles)
    users = [source for turn in turns if turn.role == "user" for source in turn.sources]
    # What a user broke up over turns is guessed at in the user's turns alone.
    groups = [(users, True), *((turn.sources, True) for turn in turns)]
    groups += [(window, len(users) < 2) for window in _windows(turns)]
    seen: set[tuple[str, ...]] = set()
    for group, guess in groups:
        paths = tuple(source.segment.path for source in group)
        if len(group) > 1 and paths not in seen:
            seen.add(paths)
            yield from _joint(group, guess)


def _turns(own: Sequence[Source], roles: Sequence[str]) -> list[_Turn]:
    turns: dict[int, _Turn] = {}
    for source in own:
        match = _MESSAGE.fullmatch(source.segment.path)
        if match is None or _NOT_SAID.search(match[2]) or not source.normalised.text.strip():
            continue
        index = int(match[1])
        turns.setdefault(index, _Turn(roles[index], [])).sources.append(source)
    return [turns[index] for index in sorted(turns)]


def _windows(turns: list[_Turn]) -> Iterator[list[Source]]:
    """Segments of some messages in a row; the last windows overlap most."""
    last = max(len(turns) - WINDOW, 0)
    for first in [*range(0, last, STRIDE), last]:
        yield [source for turn in turns[first : first + WINDOW] for source in turn.sources]


def _joint(group: Sequence[Source], guess: bool) -> Iterator[Reading]:
    sources, at = list[Source](), 0
    for source in group:
        sources.append(source._replace(start=at, end=at + source.end))
        at += source.end + 1
    text = "\n".join(source.normalised.text for source in sources)
    placed = tuple(sources)
    alternatives, unread = _alternatives(text, placed) if guess else ([], 0)
    yield Reading("conversation", Traced(text), placed, unread=unread)
    yield from _seams(text, placed)
    for reading in alternatives:
        # What stands in one segment alone was guessed at there.
        if len({span.path for span in reading.changed()}) > 1:
            yield Reading("conversation", reading.traced, placed, reading.stretches)


def _seams(text: str, sources: tuple[Source, ...]) -> Iterator[Reading]:
    """Join a word that one message begins and the next one ends."""
    weaver, stretches = Weaver(Traced(text)), list[Place]()
    for source, following in pairwise(sources):
        if text[source.end - 1].isalpha() and text[following.start].islower():
            place = max(source.start, source.end - SEAM), min(following.end, following.start + SEAM)
            weaver.keep(place[0], source.end)
            weaver.keep(following.start, place[1])
            weaver.say("\n")
            stretches.append(place)
    if stretches:
        yield Reading("conversation", weaver.traced(), sources, tuple(stretches))
