"""unlearn-guard: an inference-time unlearning guard.

Nearly empty on purpose: the pillars import `guard.types`, so an eager package would close a circle.
"""

__version__ = "0.1.0"
