"""The lexicon of a target: rare names, titles and words that tell it from everything else.

Topic similarity finds paraphrases but cannot tell a forget author from a neighbouring one; names
can. `classifiers.lexicon_index` finds the terms of all targets in a text, and
`classifiers.lexical_reading` says what they mean there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from classifiers.terms import Words
from guard.errors import ArtifactError

STRONG = 5.0
"""Weight (natural log-odds) from which a term alone points at the target."""


@dataclass(frozen=True, slots=True)
class Lexicon:
    """Weighted terms of one target.

    Attributes:
        weights: Log-odds of each term.
        primary: Terms that name the target in full, and rare parts of such a name.
        others: Words that look like a misspelt name of the target but are something else.
        parts: Those primary terms that are parts of a full name.
        works: Titles of the target's works, each of two telling words at least.
        associates: Terms that name what is known beside the target: an employer, a film, a town.
    """

    weights: Mapping[Words, float]
    primary: frozenset[Words] = frozenset()
    others: frozenset[str] = frozenset()
    parts: frozenset[Words] = frozenset()
    works: frozenset[Words] = frozenset()
    associates: frozenset[Words] = frozenset()

    def to_json(self) -> bytes:
        """Serialise; personal data, so the caller encrypts it."""
        rows = [[list(term), round(weight, 4)] for term, weight in sorted(self.weights.items())]
        data = {
            "format": 2,
            "terms": rows,
            "primary": sorted(list(term) for term in self.primary),
            "parts": sorted(list(term) for term in self.parts),
            "others": sorted(self.others),
            "works": sorted(list(term) for term in self.works),
            "associates": sorted(list(term) for term in self.associates),
        }
        return json.dumps(data, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Lexicon:
        """Read what `to_json` wrote.

        Raises:
            ArtifactError: If it is not a lexicon.
        """
        try:
            found = json.loads(data)
            weights = {_read_term(term): _read_weight(weight) for term, weight in found["terms"]}
            primary = frozenset(_read_term(term) for term in found["primary"])
            parts = frozenset(_read_term(term) for term in found.get("parts", []))
            others = frozenset(_read_words(found["others"]))
            works = frozenset(_read_term(term) for term in found.get("works", []))
            beside = frozenset(_read_term(term) for term in found.get("associates", []))
            return cls(weights, primary, others, parts, works, beside)
        except (ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
            raise ArtifactError(f"the target's lexicon cannot be read: {error!r}") from error


def _read_words(words: object) -> Words:
    if not (isinstance(words, list) and all(w and isinstance(w, str) for w in words)):
        raise ValueError(f"{words!r} is no list of words")
    return tuple(words)


def _read_term(words: object) -> Words:
    if not words:
        raise ValueError("a term has no words")
    return _read_words(words)


def _read_weight(weight: object) -> float:
    if not isinstance(weight, int | float) or not math.isfinite(weight):
        raise ValueError(f"{weight!r} is no weight")
    return float(weight)
