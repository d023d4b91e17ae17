"""Invented forget targets in any number, for training and for tests at scale.

Nothing here is a real person, company or town on purpose, and no row comes from a data set.
"""

from classifiers.synthetic.targets import SyntheticTarget, generate_targets, write_targets

__all__ = ["SyntheticTarget", "generate_targets", "write_targets"]
