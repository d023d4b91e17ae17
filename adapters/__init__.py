"""Orthogonal unlearning LoRAs (O3): value objects and, later, their trainer."""
