"""What the strings of a JSON text say: arguments of tool calls and results of tools are JSON.

Read as it stands, a question among brackets and quotation marks isn't a question.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from guard.traced import Altered, Place, Traced, Weaver

# A string that doesn't end goes to the end of the text: so each character is looked at once.
_STRING: Final = re.compile(r'"((?:[^"\\]|\\.)*+)(?:"|\\?\Z)', re.DOTALL)
_ESCAPE: Final = re.compile(r'\\(?:u[0-9a-fA-F]{4}|[nrtbf"\\/])')
_MEANS: Final = {"n": "\n", "r": "\n", "t": "\t", "b": " ", "f": "\n"}


def read_json(source: Traced) -> Altered | None:
    """Return the strings of a JSON object or array, a line each; None for any other text.

    Names of fields are strings, too. What only looks like JSON is read in the same way: so does
    the model.
    """
    text = source.text.strip()
    if text[:1] + text[-1:] not in ("{}", "[]"):
        return None
    weaver, stretches = Weaver(source), list[Place]()
    for match in _STRING.finditer(source.text):
        if match[1].strip():
            _weave(weaver, source.text, *match.span(1))
            weaver.say("\n")
            stretches.append(match.span(1))
    return Altered(weaver.traced(), tuple(stretches)) if stretches else None


def _weave(weaver: Weaver, text: str, start: int, end: int) -> None:
    """Write a string with what its escapes stand for; surrogates in pairs stay as they are."""
    for at, stop, means in _escapes(text, start, end):
        weaver.keep(start, at)
        weaver.put(means, at, stop)
        start = stop
    weaver.keep(start, end)


def _escapes(text: str, start: int, end: int) -> Iterator[tuple[int, int, str]]:
    for match in _ESCAPE.finditer(text, start, end):
        sign = match[0][1]
        if sign == "u":
            code = int(match[0][2:], 16)
            if not 0xD800 <= code < 0xE000:
                yield *match.span(), chr(code)
        else:
            yield *match.span(), _MEANS.get(sign, sign)
