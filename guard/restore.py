"""Put asked names back where an answer speaks of their stand-ins.

A model that never saw the data answers about the name that it was asked for. One that read a
generic name instead (`mix-generic`) speaks of that; so the answer's generic name becomes the asked
one again before it leaves. Text comes in pieces, as it is streamed: what may be the beginning of a
name is held back until it is decided, a few words at most.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from guard.rewrite import StandIn


class NameRestorer:
    """Rewrites one answer, piece by piece.

    A run of a stand-in's words (two or more, in any order) becomes the asked name; one word alone
    becomes the asked name's first or last word, as it is a first or a last name.

    Args:
        stand_ins: Names to put back. Of equal words the first counts.
    """

    def __init__(self, stand_ins: Sequence[StandIn]) -> None:
        self._owner: dict[str, StandIn] = {}
        for stand_in in stand_ins:
            for word in stand_in.words:
                self._owner.setdefault(word, stand_in)
        words = sorted(self._owner, key=len, reverse=True)
        either = "|".join(map(re.escape, words)) or r"(?!)"
        self._run = re.compile(
            rf"(?<![\w-])(?:{either})(?![\w-])(?:[ \u00a0](?:{either})(?![\w-]))*"
        )
        self._open = re.compile(
            rf"(?<![\w-])(?:(?:{either})[ \u00a0])*(?:{_beginnings(words)})[ \u00a0]?$"
        )
        self._held = ""
        self._before = ""

    def feed(self, piece: str) -> str:
        """Take the next piece of the answer; return what of it can go out."""
        text = self._held + piece
        # A letter that went out already decides whether a word begins here.
        lead = self._before
        found = self._open.search(lead + text)
        cut = found.start() - len(lead) if found else len(text)
        cut = max(cut, 0)
        self._held = text[cut:]
        return self._release(text[:cut])

    def flush(self) -> str:
        """Return what was held back; the answer is over."""
        held, self._held = self._held, ""
        return self._release(held)

    def restore(self, text: str) -> str:
        """Rewrite a text that is whole."""
        return self._run.sub(self._asked, text)

    def continued(self, said: str, text: str) -> str:
        """Rewrite a text that goes on where another ended, which was no name's beginning."""
        lead = said[-1:]  # a letter decides whether a word begins after it
        return self.restore(lead + text)[len(lead) :]

    def is_open(self, text: str) -> bool:
        """Say if the end of a text may be a name's beginning, or a name that may go on."""
        return self._open.search(text) is not None

    def _release(self, text: str) -> str:
        if not text:
            return ""
        lead = self._before
        self._before = (lead + text)[-1:]
        return self.restore(lead + text)[len(lead) :]

    def _asked(self, match: re.Match[str]) -> str:
        words = re.split(r"[ \u00a0]", match.group())
        stand_in = self._owner[words[0]]
        asked = stand_in.asked
        if len(words) > 1 or len(stand_in.words) == 1:
            return asked
        parts = asked.split()
        first = stand_in.words.index(words[0]) == 0
        return parts[0] if first else parts[-1]


def _beginnings(words: Sequence[str]) -> str:
    """Every beginning of every word, as alternatives."""
    found = {word[:size] for word in words for size in range(1, len(word) + 1)}
    return "|".join(sorted(map(re.escape, found), key=len, reverse=True)) or r"(?!)"
