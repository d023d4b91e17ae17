"""Text that was made from another text, and the way back to it.

Detection reads texts that nobody sent: normalised, decoded, joined. What it finds there must be
named in the text as it was sent. Maps are kept as runs, so that a long text with one odd word
costs three entries, and as chains, so that a text decoded twice needs no map of its own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

Place = tuple[int, int]
"""Start and end in code points, end exclusive."""


AROUND: Final = 1000
"""Characters around a replaced stretch that are kept."""


class Run(NamedTuple):
    """Characters of a text that came from one stretch of its source.

    Attributes:
        at: Where the run starts; it ends where the next one starts.
        start: First code point of the stretch.
        end: Code point behind its last.
        step: 1 if each character stands for one of the stretch, -1 if in reverse, 0 if all stand
            for all of it (or for nothing, where the stretch is empty).
    """

    at: int
    start: int
    end: int
    step: Literal[1, 0, -1]


@dataclass(frozen=True, slots=True)
class Traced:
    """A text and where its characters came from.

    Attributes:
        text: The text.
        runs: Its runs, in order; None where every character stands for itself.
        parent: The source, if that was made from another text in turn.
    """

    text: str
    runs: tuple[Run, ...] | None = None
    parent: Traced | None = None

    def places(self, start: int, end: int) -> list[Place]:
        """Return the characters of the original that `text[start:end]` came from.

        Returns:
            Sorted, disjoint, none empty; an empty list for characters that came from nowhere.
        """
        found = [(start, end)] if self.runs is None else self._own_places(start, end)
        if self.parent is not None:
            found = [place for one in found for place in self.parent.places(*one)]
        return merged(found)

    def to_original(self, start: int, end: int) -> Place:
        """Return the smallest span of the original that holds all of a non-empty span's places."""
        places = self.places(start, end)
        return (places[0][0], places[-1][1]) if places else (start, end)

    def _own_places(self, start: int, end: int) -> list[Place]:
        runs = self.runs or ()
        found = []
        for index in range(max(bisect_right(runs, start, key=_at) - 1, 0), len(runs)):
            run = runs[index]
            if run.at >= end:
                break
            stop = runs[index + 1].at if index + 1 < len(runs) else len(self.text)
            low, high = max(start, run.at) - run.at, min(end, stop) - run.at
            if low < high:
                found.append(_stretch(run, low, high))
        return found


class Altered(NamedTuple):
    """A text read in another way.

    Attributes:
        traced: The other reading.
        stretches: Places of the text it was made from that it reads in another way.
    """

    traced: Traced
    stretches: tuple[Place, ...]


@dataclass(slots=True)
class Weaver:
    """Writes a text from pieces of `source`, and notes where each came from."""

    source: Traced
    _pieces: list[str] = field(default_factory=list)
    _runs: list[Run] = field(default_factory=list)
    _length: int = 0

    def keep(self, start: int, end: int) -> None:
        """Write `source.text[start:end]` as it is."""
        self.respell(self.source.text[start:end], start)

    def respell(self, text: str, start: int) -> None:
        """Write `text`, whose characters stand one by one for the source's from `start`."""
        self._add(text, start, start + len(text), 1)

    def turned(self, text: str, start: int) -> None:
        """Write `text`, whose characters stand for the source's from `start`, last one first."""
        self._add(text, start, start + len(text), -1)

    def put(self, text: str, start: int, end: int) -> None:
        """Write `text` in the place of `source.text[start:end]`."""
        self._add(text, start, end, 0)

    def say(self, text: str) -> None:
        """Write what comes from nowhere, such as a separator."""
        self._add(text, 0, 0, 0)

    def traced(self) -> Traced:
        """Return what was written."""
        return Traced("".join(self._pieces), tuple(self._runs), self.source)

    def _add(self, text: str, start: int, end: int, step: Literal[1, 0, -1]) -> None:
        if text:
            self._runs.append(Run(self._length, start, end, step))
            self._pieces.append(text)
            self._length += len(text)


def substituted(source: Traced, edits: Sequence[tuple[int, int, str]]) -> Traced:
    """Replace stretches of `source` and keep what is around them, `AROUND` characters each side.

    The source is read anyway: a long text with one odd word must not be read twice.

    Args:
        source: The text.
        edits: Start, end and new text of each stretch; sorted, disjoint.
    """
    weaver, at = Weaver(source), 0
    for start, end, text in [*edits, (len(source.text), len(source.text), "")]:
        if start - at > 2 * AROUND:
            if at:
                weaver.keep(at, at + AROUND)
                weaver.say("\n")
            at = start - AROUND if start < len(source.text) else start
        weaver.keep(at, start)
        weaver.put(text, start, end)
        at = end
    return weaver.traced()


def places_in(source: Traced, text: Traced, start: int, end: int) -> list[Place]:
    """Return the places of `source` that `text[start:end]` came from; `text` was made from it."""
    places = [(start, end)]
    while text is not source:
        step = Traced(text.text, text.runs)
        places = [place for one in places for place in step.places(*one)]
        if text.parent is None:
            raise ValueError("the text was not made from this source")
        text = text.parent
    return places


def merged(places: Iterable[Place]) -> list[Place]:
    """Sort places, drop empty ones and join those that touch."""
    found: list[Place] = []
    for start, end in sorted(places):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def _at(run: Run) -> int:
    return run.at


def _stretch(run: Run, low: int, high: int) -> Place:
    if run.step == 0:
        return run.start, run.end
    if run.step == 1:
        return run.start + low, run.start + high
    return run.end - high, run.end - low
