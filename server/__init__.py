"""The OpenAI-compatible proxy. Importing it loads no training code and no torch."""
