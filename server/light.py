"""Tells texts that are read in passing, on the event loop, from those that need a thread.

A text may hold others: a cipher, a code, pieces. All that it may say is read, and one that was made
for it says much. What is light here takes a few milliseconds at the very most, whoever wrote it.
"""

from __future__ import annotations

import re
from string import ascii_letters, ascii_uppercase, digits
from typing import Final

LIGHT_BYTES: Final = 1_200
"""Longest text."""

LIGHT_SIGNS: Final = 150
"""Bytes that it may hold beside letters and spaces, those of JSON included."""

LIGHT_CODES: Final = 24
"""Places within words that look like a code, as `dGhl` and `w1z` do."""

_PLAIN: Final = (ascii_letters + " ").encode()
_LOW: Final = bytes(set(range(256)) - set((ascii_uppercase + digits).encode()))
_CODE: Final = re.compile(rb"[a-z][A-Z0-9]|[0-9][A-Za-z]|[A-Z]{2}")


def is_light(text: bytes) -> bool:
    """Say if looking for all readings of a text, or of a body, takes little."""
    if len(text) > LIGHT_BYTES or len(text.translate(None, _PLAIN)) > LIGHT_SIGNS:
        return False
    # Each code has a capital or a digit; counting those takes a tenth of the time.
    few = len(text.translate(None, _LOW)) <= LIGHT_CODES
    return few or len(_CODE.findall(text)) <= LIGHT_CODES
