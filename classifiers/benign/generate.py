"""Builds the benign calibration set from its seeds: `python -m classifiers.benign.generate`."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator

from classifiers.benign import benign_path, compose
from classifiers.benign.slots import Filler, Row, read_seeds, rng_for
from classifiers.benign.styles import restyle

# The other languages have fewer templates each, so each of theirs is used more often.
ROWS_PER_TEMPLATE = {"templates_en": 5, "templates_other": 7}
RESTYLED_SHARE = 0.12


def free_rows() -> Iterator[Row]:
    """Prompts written by hand, as they are."""
    for name in ("free_en", "free_other"):
        for seed in read_seeds(name):
            yield Row(seed["text"], seed["category"], seed["lang"])


def template_rows() -> Iterator[Row]:
    """Every template, filled `ROWS_PER_TEMPLATE` times; some English rows restyled."""
    for name, times in ROWS_PER_TEMPLATE.items():
        filler = Filler(name)
        for seed in read_seeds(name):
            for text in filler.several(seed["text"], seed["lang"], times):
                if seed["lang"] == "en" and filler.rng.random() < RESTYLED_SHARE:
                    text = restyle(text, filler.rng)
                yield Row(text, seed["category"], seed["lang"])


def fingerprint(text: str) -> str:
    """What makes two prompts the same: letters, digits and signs, without case and spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return "".join(letter for letter in folded if not letter.isspace())


def unique(rows: Iterable[Row]) -> list[Row]:
    """The rows without later copies of an earlier one."""
    seen: dict[str, Row] = {}
    for row in rows:
        seen.setdefault(fingerprint(row.text), row)
    return list(seen.values())


def build() -> list[Row]:
    """The whole set, shuffled once so that any prefix is a fair sample; deterministic."""
    rows = unique([*free_rows(), *compose.all_rows(), *template_rows()])
    rng_for("order").shuffle(rows)
    return rows


def render(rows: Iterable[Row]) -> str:
    """The file's text: one JSON object per line."""
    return "".join(
        json.dumps(
            {"text": row.text, "category": row.category, "lang": row.lang}, ensure_ascii=False
        )
        + "\n"
        for row in rows
    )


def main() -> None:
    """Rewrite the shipped file."""
    benign_path().write_text(render(build()), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
