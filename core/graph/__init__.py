"""Capturing a model's graph and cutting it into pieces."""
