"""Corruptions of prompt embeddings, and the offline learner of their strength."""
