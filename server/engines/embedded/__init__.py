"""The embedded engine: a Hugging Face causal language model served from this process.

Nothing here imports torch or transformers before a model is loaded.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from server.engines.embedded.engine import EmbeddedEngine
from server.engines.embedded.prepare import MODEL_NAME, prepare_smollm2

if TYPE_CHECKING:
    from server.engines.embedded.model import EmbeddedModel

__all__ = ["MODEL_NAME", "EmbeddedEngine", "EmbeddedModel", "prepare_smollm2"]

# Read once when torch's OpenMP is loaded. Threads that spin while they wait take the processor
# from everyone else: on two busy cores a token took ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """Import the model, and torch with it, when it is first asked for."""
    if name == "EmbeddedModel":
        from server.engines.embedded.model import EmbeddedModel

        return EmbeddedModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
