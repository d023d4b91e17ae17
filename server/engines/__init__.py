"""Engines that generate: vLLM over HTTP, and the embedded transformers engine."""
