"""Recompiles: what happened, why, and how to avoid it."""
