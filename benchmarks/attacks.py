"""Attack wrappers: templates that dress a question up, and transforms that disguise it first.

A wrapper file is JSON lines of {"template", "transform", "kind", "id"}; the template's `{question}`
slot takes the transformed question. Other keys are ignored.
"""

from __future__ import annotations

import base64
import codecs
import difflib
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.labelled import json_lines
from guard.errors import DataError

SLOT: Final = "{question}"

_LEET: Final = str.maketrans("aeiostAEIOST", "431057431057")
_NO_VOWELS: Final = str.maketrans("", "", "aeiouAEIOU")
_HOMOGLYPHS: Final = str.maketrans("aceiopsxyABCEHIKMOPTX", "асеіорѕхуАВСЕНІКМОРТХ")
_JOINER: Final = "\u200d"


@dataclass(frozen=True, slots=True)
class Template:
    """One attack wrapper.

    Attributes:
        id: Unique in its file.
        text: Holds the slot.
        kind: The family of attacks that it belongs to.
        transform: What is done to the question first; a key of `TRANSFORMS`.
    """

    id: str
    text: str
    kind: str
    transform: str

    def wrap(self, question: str) -> str:
        """Return the attack on `question`."""
        # Not str.format: templates hold other braces.
        return self.text.replace(SLOT, TRANSFORMS[self.transform](question))


def load_templates(path: str | Path) -> list[Template]:
    """Read a file of attack wrappers.

    Raises:
        DataError: If the file can't be read or is empty, or a row lacks a field, has no slot or
            names a transform that isn't known.
    """
    return [_template(row, str(path), line) for line, row in json_lines(path)]


def _template(row: Mapping[str, Any], file: str, line: int) -> Template:
    values: dict[str, str] = {}
    for field, default in (
        ("template", None),
        ("kind", "other"),
        ("transform", "none"),
        ("id", str(line)),
    ):
        value = row.get(field, default)
        if not isinstance(value, str) or not value:
            raise DataError("missing; expected a string", file=file, line=line, field=field)
        values[field] = value
    if SLOT not in values["template"]:
        raise DataError(f"holds no slot {SLOT}", file=file, line=line, field="template")
    if values["transform"] not in TRANSFORMS:
        near = difflib.get_close_matches(values["transform"], TRANSFORMS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"{values['transform']!r} is not known{hint} (known: {', '.join(TRANSFORMS)})",
            file=file,
            line=line,
            field="transform",
        )
    return Template(values["id"], values["template"], values["kind"], values["transform"])


def _split_in_two_variables(text: str) -> str:
    middle = len(text) // 2
    return f'a = "{text[:middle]}"; b = "{text[middle:]}"'


TRANSFORMS: Final[Mapping[str, Callable[[str], str]]] = {
    "none": lambda text: text,
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "rot13": lambda text: codecs.encode(text, "rot13"),
    "hex": lambda text: text.encode().hex(),
    "leetspeak": lambda text: text.translate(_LEET),
    "reverse": lambda text: text[::-1],
    "urlencode": lambda text: urllib.parse.quote(text, safe=""),
    "drop_vowels": lambda text: text.translate(_NO_VOWELS),
    "spaced_letters": " ".join,
    "cyrillic_homoglyphs": lambda text: text.translate(_HOMOGLYPHS),
    "zero_width_joiners": _JOINER.join,
    "uppercase": str.upper,
    "split_in_two_variables": _split_in_two_variables,
}
"""What can be done to a question before it is wrapped, by name."""
