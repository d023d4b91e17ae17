"""How long a proxy keeps the words of a stream, told from when they were sent and arrived."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final

_CONTENT: Final = re.compile(rb'"content"\s*:\s*"((?:[^"\\]|\\.)*)"')


def arrivals(pieces: Sequence[tuple[int, bytes]]) -> list[int]:
    """Return when each word of a stream's text arrived, however it was cut into events."""
    found: list[int] = []
    rest = b""
    for at, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        words = [word for line in lines for text in _CONTENT.findall(line) for word in text.split()]
        found += [at] * len(words)
    return found


def relay_delays(arrived: Sequence[int], sent: Sequence[int]) -> tuple[list[float], int]:
    """Return how long each word was on its way, in milliseconds, and how many were held back.

    A proxy that holds words back lets one go when a later one comes, so that is the event that its
    delay counts from: holding back is what it was asked for, the rest is its cost. How many words
    it holds may vary, as words may be let go by the dozen; one that waits for more of them than
    39 in 40 do is late.

    Args:
        arrived: When each word arrived, in nanoseconds.
        sent: When each word was sent, on the same clock.
    """
    if not sent:
        return [], 0
    last = len(sent) - 1
    ahead = [bisect_right(sent, at) - 1 - number for number, at in enumerate(arrived[: last + 1])]
    # What is let go at the end tells nothing of what is held.
    steady = sorted(n for n, at in zip(ahead, arrived, strict=False) if at < sent[last])
    held = max(0, steady[len(steady) // 2]) if steady else 0
    most = steady[len(steady) * 39 // 40] if held else 0
    found = [
        (at - sent[number + min(newer, most)]) / 1e6
        for number, (at, newer) in enumerate(zip(arrived, ahead, strict=False))
    ]
    return found, held
