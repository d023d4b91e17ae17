"""Names found by a token-classification model, as ECO finds them; optional, while learning only.

Where such a model lies on the disk it marks names that the lexicon of a small forget set misses, so
that the span head learns from more of them. Serving never loads it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from classifiers.spans import Place, merge_places
from guard.errors import DataError

STRIDE = 32
"""Tokens that neighbouring windows of a long text share."""


class NerSpans:
    """Finds names with a Hugging Face token-classification model.

    Args:
        model: Folder of the model and its fast tokenizer; nothing is downloaded.
        least: Score that a name needs.

    Raises:
        DataError: If there is no such model in the folder.
    """

    def __init__(self, model: str | Path, least: float = 0.5) -> None:
        self._pipeline, self._least = _load(Path(model)), least

    def __call__(self, text: str) -> list[Place]:
        """Return the characters of the names in a text of any length, sorted and disjoint."""
        if not text.strip():
            return []
        found = self._pipeline(text)
        kept = [(int(e["start"]), int(e["end"])) for e in found if e["score"] >= self._least]
        return merge_places(kept)


def _load(folder: Path) -> Any:
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    try:
        model = AutoModelForTokenClassification.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{str(folder)!r} holds no token-classification model: {error}; "
            "give the folder of one that is on this machine"
        ) from error
    longest = int(model.config.max_position_embeddings)
    tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return pipeline(
        "token-classification",
        model=model.eval(),
        tokenizer=tokenizer,
        aggregation_strategy="simple",
        stride=min(STRIDE, tokenizer.model_max_length // 4),
        device=-1,
    )
