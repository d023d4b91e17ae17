"""The embedded engine: a Hugging Face causal language model served from this process.

Nothing here imports torch or transformers before a model is loaded.
"""

from server.engines.embedded.prepare import prepare_smollm2

__all__ = ["prepare_smollm2"]
