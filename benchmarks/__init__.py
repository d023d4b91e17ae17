"""Measurements of the whole guard: forgetting, utility and cost."""
